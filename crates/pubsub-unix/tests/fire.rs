//! Elections under fire: real processes under load, killed, stopped and continued at random, the broker first of all. Each keeps a
//! journal, and the journals are held against the history that is left.
//!
//! `PUBSUB_UNIX_FIRE=seconds` says for how long; from 30 on it is 20 processes instead of 5.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use pubsub_core::{Bus, Event, PublishOptions, RetryPolicy, Start, SubscribeOptions};
use pubsub_unix::UnixSocketPubSub;
use tokio::time::timeout;

const CHILD: &str = "PUBSUB_UNIX_CHILD";
const MANY: u64 = 1 << 20;

async fn connect(path: &Path) -> Bus {
    Bus::from(UnixSocketPubSub::builder(path).max_events(MANY).connect().await.unwrap())
}

/// One of many: publishes, listens and works, and writes down what it has seen before it says so.
#[test]
#[ignore = "is a process that the other tests start"]
fn child() {
    let Ok(job) = std::env::var(CHILD) else { return };
    let [socket, journal, what] = job.split('|').collect::<Vec<_>>()[..] else { panic!("{job}") };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let bus = connect(Path::new(socket)).await;
        let journal = File::options().create(true).append(true).open(journal).unwrap();
        let say = |line: String| (&journal).write_all(line.as_bytes()).unwrap();
        if what == "hold" {
            let mut member = bus.subscribe_group("t", "g").await.unwrap();
            let held = member.next().await.unwrap().unwrap();
            say("holds\n".into());
            held.revoked().await;
            say("revoked\n".into());
        }
        let mut listener = bus.subscribe("t").await.unwrap();
        let retry = RetryPolicy::new().max_attempts(0).backoff(Duration::ZERO, Duration::ZERO);
        let options = SubscribeOptions::group("g".try_into().unwrap()).retry(retry);
        let mut worker = bus.subscribe_with("t", options).await.unwrap();
        say("ready\n".into());
        let publishing = async {
            for number in 0.. {
                let event = [Arc::new(Event::new(format!("{}-{number}", std::process::id())))];
                // The same event again until it is confirmed: it is stored once.
                while bus.publish_with("t", &event, PublishOptions::new()).await.is_err() {}
                say(format!("published {} {}\n", event[0].event_type(), event[0].id()));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let listening = async {
            while let Some(next) = listener.next().await {
                let next = next.unwrap();
                assert_eq!(next.lagged(), 0);
                say(format!("saw {}\n", next.event().id()));
            }
        };
        let working = async {
            while let Some(next) = worker.next().await {
                let next = next.unwrap();
                say(format!("had {} {}\n", next.event().id(), next.attempt()));
                next.done();
            }
        };
        futures::join!(publishing, listening, working);
    });
}

struct Other {
    child: Child,
    journal: PathBuf,
}

impl Other {
    fn start(directory: &Path, number: usize) -> Self {
        Self::start_to(directory, number, "work")
    }

    fn start_to(directory: &Path, number: usize, what: &str) -> Self {
        let (socket, journal) = (directory.join("bus"), directory.join(format!("journal-{number}")));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child", "--ignored", "--nocapture"]);
        command.env(CHILD, format!("{}|{}|{what}", socket.display(), journal.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Self { child: command.spawn().unwrap(), journal }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.journal).unwrap_or_default()
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Who claimed the last epoch, as the register says for readers.
fn broker(directory: &Path) -> Option<u32> {
    let register = fs::read_to_string(directory.join("bus.epoch")).ok()?;
    register.lines().last()?.trim().strip_prefix("pid ")?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_while_processes_are_killed_and_stopped() {
    let seconds = std::env::var("PUBSUB_UNIX_FIRE").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let many = if seconds >= 30 { 20 } else { 5 };
    let directory = tempfile::tempdir().unwrap();
    let mut rng = fastrand::Rng::new();
    let mut others: Vec<Other> = (0..many).map(|number| Other::start(directory.path(), number)).collect();
    let (mut dead, mut stopped) = (Vec::new(), Vec::<(Instant, Pid)>::new());
    let (until, mut number, mut brokers, mut together) = (Instant::now() + Duration::from_secs(seconds), others.len(), 0, 0);
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(200)).await;
        stopped.retain(|(until, pid)| {
            let goes_on = *until <= Instant::now();
            if goes_on {
                let _ = kill(*pid, Signal::SIGCONT); // it may have been killed meanwhile
            }
            !goes_on
        });
        if rng.u8(..3) == 0 {
            // Somebody sleeps: most often for a moment, now and then for so long that he is superseded, or taken for dead.
            let pid = others[rng.usize(..others.len())].pid();
            kill(pid, Signal::SIGSTOP).unwrap();
            let for_long = rng.u8(..8) == 0;
            stopped.push((
                Instant::now() + Duration::from_millis(if for_long { rng.u64(3000..12_000) } else { rng.u64(..500) }),
                pid,
            ));
        }
        // The broker, and with it in every fourth round somebody who publishes through it.
        let broker = broker(directory.path());
        let mut victims: Vec<usize> = others.iter().position(|other| Some(other.child.id()) == broker).into_iter().collect();
        brokers += victims.len();
        if victims.is_empty() || rng.u8(..4) == 0 {
            together += victims.len();
            victims.push(rng.usize(..others.len()));
        }
        victims.sort_unstable();
        victims.dedup();
        // All at once: what is killed later could still do something about it.
        victims.iter().for_each(|victim| kill(others[*victim].pid(), Signal::SIGKILL).unwrap());
        for victim in victims.into_iter().rev() {
            let mut killed = others.swap_remove(victim);
            killed.kill();
            dead.push(killed);
            others.push(Other::start(directory.path(), number));
            number += 1;
        }
    }
    for (_, pid) in stopped {
        let _ = kill(pid, Signal::SIGCONT); // it may have been killed meanwhile
    }
    eprintln!("{} killed, {brokers} of them as broker, {together} of those together with another", dead.len());
    assert!(brokers > 0, "no broker was killed");
    // It goes on: everybody is ready, and then this process reads what is left.
    let ready = async {
        while !others.iter().all(|other| other.said().contains("published")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(60), ready).await.expect("those who are left go on");
    let bus = connect(&directory.path().join("bus")).await;
    dead.extend(others.drain(..).map(|mut other| {
        other.kill();
        other
    }));
    let retry = RetryPolicy::new().max_attempts(0);
    let group = SubscribeOptions::group("g".try_into().unwrap()).retry(retry);
    let mut worker = timeout(Duration::from_secs(10), bus.subscribe_with("t", group)).await.unwrap().unwrap();
    let mut had: HashMap<String, BTreeSet<u32>> = HashMap::new();
    let handle = worker.handle();
    let rest = async {
        while let Some(next) = worker.next().await {
            let next = next.unwrap();
            let first = had.entry(next.event().id().to_string()).or_default().insert(next.attempt());
            assert!(first, "{} twice at one attempt", next.event().id());
            next.done();
        }
    };
    let drained = async {
        tokio::time::sleep(Duration::from_millis(400)).await; // the grace of those that were killed last
        handle.drained().await;
        handle.stop();
    };
    timeout(Duration::from_secs(30), async { futures::join!(rest, drained) }).await.expect("the group is worked off");
    judge(&history(&bus).await, &dead, had);
    bus.close(Duration::from_secs(1)).await.unwrap();
}

async fn history(bus: &Bus) -> Vec<(String, String)> {
    let (mut all, mut from) = (Vec::new(), Start::Earliest);
    loop {
        let page = bus.history("t", from, 1000).await.unwrap();
        all.extend(page.entries.iter().map(|(_, event)| (event.id().to_string(), event.event_type().to_owned())));
        let Some(next) = page.next else { return all };
        from = Start::After(next);
    }
}

fn judge(history: &[(String, String)], journals: &[Other], mut had: HashMap<String, BTreeSet<u32>>) {
    let places: HashMap<&str, usize> = history.iter().enumerate().map(|(place, (id, _))| (id.as_str(), place)).collect();
    assert_eq!(places.len(), history.len(), "an event is stored twice");
    let mut by_publisher: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, name) in history {
        let (publisher, number) = name.split_once('-').unwrap();
        let next = by_publisher.entry(publisher).or_default();
        assert_eq!(number.parse::<u64>().unwrap(), *next, "the order of {publisher}");
        *next += 1;
    }
    let (mut published, mut repeats) = (0, 0);
    for journal in journals {
        let mut last = None;
        for line in journal.said().lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["published", name, id] => {
                    published += 1;
                    assert!(places.contains_key(id), "{name} was confirmed and is lost");
                }
                // One after the other, from wherever it began: nothing is left out, and nothing comes twice.
                ["saw", id] => {
                    let place = places[id];
                    assert!(
                        last.is_none_or(|last| place == last + 1),
                        "{} saw {place} after {last:?}",
                        journal.journal.display()
                    );
                    last = Some(place);
                }
                ["had", id, attempt] => {
                    repeats += u64::from(attempt != "1");
                    let first = had.entry(id.to_owned()).or_default().insert(attempt.parse().unwrap());
                    assert!(first, "{id} twice at attempt {attempt}");
                }
                _ => {}
            }
        }
    }
    let missed: Vec<_> = history.iter().filter(|(id, _)| !had.contains_key(id)).collect();
    assert!(missed.is_empty(), "the group never had {missed:?}");
    eprintln!("{published} published by {} processes, {} in the history, {repeats} repeats", journals.len(), history.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_process_serves_soon_after_the_broker_was_killed() {
    let directory = tempfile::tempdir().unwrap();
    let mut took = Vec::new();
    for round in 0..5 {
        let mut first = Other::start(directory.path(), round);
        while !first.said().contains("published") {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let bus = connect(&directory.path().join("bus")).await;
        let mut listener = bus.subscribe("after").await.unwrap();
        bus.publish_data("after", "x", 0).await.unwrap();
        drop(listener.next().await.unwrap().unwrap());
        let since = Instant::now();
        first.kill();
        bus.publish_data("after", "x", round).await.unwrap();
        drop(listener.next().await.unwrap().unwrap());
        took.push(since.elapsed());
        bus.close(Duration::from_secs(1)).await.unwrap();
    }
    took.sort();
    eprintln!("from the kill to the first event: {took:?}");
    assert!(took[2] < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_stopped_is_superseded_and_comes_back_as_one_of_many() {
    let directory = tempfile::tempdir().unwrap();
    let mut stopped = Other::start(directory.path(), 0);
    while !stopped.said().contains("published") {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let bus = connect(&directory.path().join("bus")).await;
    let mut listener = bus.subscribe("after").await.unwrap();
    assert_eq!(broker(directory.path()), Some(stopped.child.id()));
    kill(stopped.pid(), Signal::SIGSTOP).unwrap();
    waitpid(stopped.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap(); // it may have gone on for a moment
    let event = [Arc::new(Event::new("x"))];
    let served = async { while bus.publish_with("after", &event, PublishOptions::new()).await.is_err() {} };
    timeout(Duration::from_secs(20), served).await.expect("another serves");
    assert_eq!(broker(directory.path()), Some(std::process::id()));
    let before = stopped.said().len();
    kill(stopped.pid(), Signal::SIGCONT).unwrap();
    let goes_on = async {
        while stopped.said().len() < before + 1000 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), goes_on).await.expect("it goes on as a client");
    assert_eq!(broker(directory.path()), Some(std::process::id()), "and leaves the new broker alone");
    assert_eq!(listener.next().await.unwrap().unwrap().event().id(), event[0].id());
    stopped.kill();
    bus.close(Duration::from_secs(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_stopped_loses_what_it_holds_and_is_told_when_it_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let builder = UnixSocketPubSub::builder(directory.path().join("bus")).hang_timeout(Duration::from_secs(2));
    let bus = Bus::from(builder.connect().await.unwrap());
    let mut stopped = Other::start_to(directory.path(), 0, "hold");
    bus.publish_data("t", "x", 1).await.unwrap();
    let says = async |what: &str| {
        let said = async {
            while !stopped.said().contains(what) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(10), said).await.expect(what);
    };
    says("holds").await;
    kill(stopped.pid(), Signal::SIGSTOP).unwrap();
    let mut member = bus.subscribe_group("t", "g").await.unwrap();
    let found = timeout(Duration::from_secs(10), member.next()).await.expect("it goes to another").unwrap().unwrap();
    assert_eq!(found.attempt(), 2);
    found.done();
    kill(stopped.pid(), Signal::SIGCONT).unwrap();
    says("revoked").await;
    stopped.kill();
    bus.close(Duration::from_secs(1)).await.unwrap();
}
