//! What the suite cannot do to a bus on Redis: connections killed under load, streams and groups deleted, permissions refused,
//! processes killed and paused. On real servers; without one installed every test is shown as ignored, and fails where
//! `PUBSUB_REQUIRE` names redis.

#[path = "common/trials.rs"]
mod trials;

#[path = "../../../conformance/src/harnesses/port.rs"]
mod port;

#[expect(dead_code)] // others use more of it
#[path = "../../../conformance/src/harnesses/redis/server.rs"]
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use pubsub_core::{
    Bus, ErrorKind, Event, Fate, Group, Origin, PublishOptions, RetryPolicy, Settled, Start, SubscribeOptions, Subscription,
    Topic,
};
use pubsub_redis::{RedisBuilder, RedisStreamsPubSub};
use tokio::time::{sleep, timeout};

use self::server::{Answer, Server};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// After how long silent members lose what they hold.
const RECLAIM: Duration = Duration::from_millis(600);

/// What a process that is started once more is to do.
const JOB: &str = "PUBSUB_REDIS_JOB";

type Test = fn(Arc<Server>) -> BoxFuture<'static, ()>;

fn main() -> ExitCode {
    if let Ok(job) = std::env::var(JOB) {
        return member(&job);
    }
    let tests: &[(&str, Test)] = &[
        ("each event is written once, however often connections are killed", |server| killed_under_load(server).boxed()),
        ("subscribers outlive FLUSHALL, and retention is restored", |server| emptied(server, &["FLUSHALL"]).boxed()),
        ("subscribers outlive the deletion of their stream", |server| emptied(server, &["DEL", "mastra:topic:t"]).boxed()),
        ("members outlive the deletion of their group", |server| group_destroyed(server).boxed()),
        ("a wrong password is told at once", |server| wrong_password(server).boxed()),
        ("a missing permission is told at once, with nothing sent", |server| no_permission(server).boxed()),
        ("a key of another type is told at once, also to who reads already", |server| wrong_type(server).boxed()),
        ("one that kills its holders exhausts only itself", |server| poison(server).boxed()),
        ("a paused member takes nothing away from who took over", |server| paused(server).boxed()),
        ("consumers of killed members are removed", |server| tidied(server).boxed()),
        ("entries have the shape that the TypeScript side reads and writes", |server| golden(server).boxed()),
        ("a retry is claimable by anybody when it is due, and not before", |server| back_off_on_server(server).boxed()),
        ("followers that are outrun get or are told of everything, in order", |server| outrun(server).boxed()),
        ("following many topics loses nothing when its connection is killed", |server| tracking_killed(server).boxed()),
        ("following many topics outlives FLUSHALL", |server| tracking_emptied(server).boxed()),
        ("following many topics works without the right to be told of changes", |server| tracking_refused(server).boxed()),
        ("an instance has a connection to write, one for fan-out, one for each name of a group", |server| few(server).boxed()),
    ];
    let with_server = |test: Test| move || async move { test(Arc::new(Server::start().unwrap())).await }.boxed();
    trials::run(tests.iter().map(|&(name, test)| (name, with_server(test))), 2 * PATIENCE)
}

fn builder(url: &str) -> RedisBuilder {
    let builder = RedisStreamsPubSub::from_url(url).unwrap().reclaim_after(RECLAIM).linger(Duration::from_millis(50));
    builder.command_timeout(Duration::from_secs(3)).publish_timeout(Duration::from_secs(5))
}

fn url(server: &Server) -> String {
    format!("redis://{}", server.address)
}

async fn connect(server: &Server) -> Bus {
    builder(&url(server)).max_len(None).connect().await.unwrap().into()
}

fn group(name: &str) -> SubscribeOptions {
    let retry = RetryPolicy::new().backoff(Duration::from_millis(20), Duration::from_millis(20));
    SubscribeOptions::group(Group::new(name).unwrap()).retry(retry)
}

async fn next(subscription: &mut Subscription) -> pubsub_core::Delivery {
    timeout(PATIENCE, subscription.next()).await.expect("a delivery in time").expect("a stream").expect("no error")
}

async fn kinds(subscription: &mut Subscription, count: usize) -> Vec<String> {
    let mut kinds = Vec::new();
    for _ in 0..count {
        let delivery = next(subscription).await;
        kinds.push(delivery.event().event_type().to_owned());
        drop(delivery.done());
    }
    kinds
}

async fn killed_under_load(server: Arc<Server>) {
    const PUBLISHERS: usize = 4;
    const EACH: usize = 400;
    let (bus, others) = (connect(&server).await, [connect(&server).await, connect(&server).await]);
    let mut listener = bus.subscribe("t").await.unwrap();
    let handled = Arc::new(parking_lot::Mutex::new(BTreeMap::<String, Vec<u32>>::new()));
    for other in &others {
        let (mut member, handled) = (other.subscribe_with("t", group("g")).await.unwrap(), handled.clone());
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = member.next().await {
                handled.lock().entry(delivery.event().event_type().to_owned()).or_default().push(delivery.attempt());
                drop(delivery.done());
            }
        });
    }
    let killing = {
        let server = server.clone();
        tokio::spawn(async move {
            for _ in 0..25 {
                sleep(Duration::from_millis(40)).await;
                server.ask(&["CLIENT", "KILL", "TYPE", "normal"]).unwrap();
            }
        })
    };
    let publishing = (0..PUBLISHERS).map(|publisher| {
        let bus = bus.clone();
        tokio::spawn(async move {
            for number in 0..EACH / 4 {
                let events: Vec<_> =
                    (0..4).map(|part| Arc::new(Event::new(format!("{publisher}.{}", 4 * number + part)))).collect();
                bus.publish_with("t", &events, PublishOptions::new()).await.unwrap();
                sleep(Duration::from_millis(5)).await;
            }
        })
    });
    futures::future::try_join_all(publishing).await.unwrap();
    killing.await.unwrap();
    let all = PUBLISHERS * EACH;
    assert_eq!(server.ask(&["XLEN", "mastra:topic:t"]).unwrap().number(), all as u64, "entries written");
    let mut seen = BTreeSet::new();
    for _ in 0..all {
        let delivery = next(&mut listener).await;
        assert!(seen.insert(delivery.event().event_type().to_owned()), "{delivery:?} came twice");
    }
    for publisher in 0..PUBLISHERS {
        assert!((0..EACH).all(|number| seen.contains(&format!("{publisher}.{number}"))));
    }
    timeout(PATIENCE, async {
        while handled.lock().len() < all {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the group handles everything");
    for (event, attempts) in std::mem::take(&mut *handled.lock()) {
        let distinct: BTreeSet<_> = attempts.iter().collect();
        assert_eq!(distinct.len(), attempts.len(), "{event} was handled twice at one attempt: {attempts:?}");
    }
    for bus in others.iter().chain([&bus]) {
        bus.close(PATIENCE).await.unwrap();
    }
    assert_eq!(clients(&server), 0, "connections left");
}

/// How many connections there are but the one that asks.
fn clients(server: &Server) -> usize {
    server.ask(&["CLIENT", "LIST"]).unwrap().text().lines().count() - 1
}

/// How many commands the server has carried out.
fn commands(server: &Server) -> u64 {
    let info = server.ask(&["INFO", "stats"]).unwrap();
    let line = info.text().lines().find_map(|line| line.strip_prefix("total_commands_processed:").map(str::to_owned));
    line.unwrap().trim().parse().unwrap()
}

async fn emptied(server: Arc<Server>, how: &'static [&'static str]) {
    let bus = connect(&server).await;
    let (mut listener, mut member) = (bus.subscribe("t").await.unwrap(), bus.subscribe_with("t", group("g")).await.unwrap());
    for round in 0..3 {
        let names: Vec<_> = (0..3).map(|number| format!("{round}.{number}")).collect();
        for name in &names {
            bus.publish("t", Event::new(name)).await.unwrap();
        }
        assert_eq!((kinds(&mut listener, 3).await, kinds(&mut member, 3).await), (names.clone(), names), "round {round}");
        bus.flush().await.unwrap();
        let ttl = server.ask(&["PTTL", "mastra:topic:t"]).unwrap().number();
        assert!(ttl > 0, "the topic is kept for ever");
        // A member that waits is the one that notices.
        let waiting = futures::poll!(member.next());
        assert!(waiting.is_pending());
        sleep(Duration::from_millis(50)).await;
        server.ask(how).unwrap();
        sleep(Duration::from_millis(100)).await;
        let before = commands(&server);
        sleep(Duration::from_millis(500)).await;
        let spent = commands(&server) - before;
        assert!(spent < 60, "{spent} commands in half a second in which nothing happened");
    }
}

async fn group_destroyed(server: Arc<Server>) {
    let buses = [connect(&server).await, connect(&server).await];
    let mut members =
        [buses[0].subscribe_with("t", group("g")).await.unwrap(), buses[1].subscribe_with("t", group("g")).await.unwrap()];
    let (mut seen, mut expected) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..3 {
        for number in 0..10 {
            expected.insert(format!("{round}.{number}"));
            buses[0].publish("t", Event::new(format!("{round}.{number}"))).await.unwrap();
        }
        // Some may come twice: whoever makes the group anew knows only what it has read itself.
        while seen != expected {
            let [one, other] = &mut members;
            let delivery = tokio::select! {
                delivery = one.next() => delivery,
                delivery = other.next() => delivery,
                () = sleep(PATIENCE) => panic!("round {round}: {} of {}", seen.len(), expected.len()),
            };
            let delivery = delivery.unwrap().unwrap();
            seen.insert(delivery.event().event_type().to_owned());
            drop(delivery.done());
        }
        buses[0].flush().await.unwrap();
        buses[1].flush().await.unwrap();
        server.ask(&["XGROUP", "DESTROY", "mastra:topic:t", "g"]).unwrap();
        // Published before anybody has made the group anew.
        expected.insert(format!("{round}.x"));
        buses[0].publish("t", Event::new(format!("{round}.x"))).await.unwrap();
    }
}

async fn wrong_password(server: Arc<Server>) {
    server.ask(&["ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all"]).unwrap();
    let started = std::time::Instant::now();
    let refused = builder(&format!("redis://worker:wrong-one@{}", server.address)).connect().await.unwrap_err();
    assert_eq!(refused.kind(), &ErrorKind::Denied, "{refused:?}");
    assert!(started.elapsed() < Duration::from_secs(1), "told after {:?}", started.elapsed());
    let said = format!("{refused} {refused:?}");
    assert!(!said.contains("wrong-one"), "the password is in {said}");
    let right = builder(&format!("redis://worker:secret@{}", server.address)).connect().await.unwrap();
    let said = format!("{right:?}");
    assert!(!said.contains("secret"), "the password is in {said}");
    Bus::from(right).publish("t", Event::new("x")).await.unwrap();
}

async fn no_permission(server: Arc<Server>) {
    server.ask(&["ACL", "SETUSER", "reader", "on", ">secret", "~*", "&*", "+@all", "-xadd"]).unwrap();
    let bus = Bus::from(builder(&format!("redis://reader:secret@{}", server.address)).connect().await.unwrap());
    let refused = timeout(Duration::from_secs(1), bus.publish("t", Event::new("x"))).await.expect("at once").unwrap_err();
    assert_eq!((refused.kind(), refused.fates()), (&ErrorKind::Denied, &[Fate::NotSent][..]), "{refused:?}");
    // What may be added and not be looked after is not added either.
    for right in ["-pexpire", "-xtrim"] {
        server.ask(&["ACL", "SETUSER", "keeper", "reset", "on", ">secret", "~*", "&*", "+@all", right]).unwrap();
        let aged = builder(&format!("redis://keeper:secret@{}", server.address)).max_age(Some(Duration::from_secs(60)));
        let bus = Bus::from(aged.connect().await.unwrap());
        let refused = timeout(Duration::from_secs(1), bus.publish("t", Event::new("x"))).await.expect("at once").unwrap_err();
        assert_eq!((refused.kind(), refused.fates()), (&ErrorKind::Denied, &[Fate::NotSent][..]), "{right}: {refused:?}");
        assert!(matches!(server.ask(&["EXISTS", "mastra:topic:t"]).unwrap(), Answer::Number(0)), "{right}");
    }
    server.ask(&["ACL", "SETUSER", "writer", "on", ">secret", "~*", "&*", "+@all", "-xread"]).unwrap();
    let bus = Bus::from(builder(&format!("redis://writer:secret@{}", server.address)).connect().await.unwrap());
    let mut listener = bus.subscribe("t").await.unwrap();
    let error = timeout(PATIENCE, listener.next()).await.expect("in time").expect("an error").unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Denied, "{error:?}");
}

async fn wrong_type(server: Arc<Server>) {
    let bus = connect(&server).await;
    server.ask(&["SET", "mastra:topic:text", "x"]).unwrap();
    let is_permanent =
        |kind: &ErrorKind| matches!(kind, ErrorKind::Backend(why) if why.contains("something else than a stream"));
    let refused = timeout(Duration::from_secs(1), bus.publish("text", Event::new("x"))).await.expect("at once").unwrap_err();
    assert!(is_permanent(refused.kind()) && refused.fates() == [Fate::NotSent], "{refused:?}");
    for options in [SubscribeOptions::fan_out(), group("g")] {
        let refused = timeout(Duration::from_secs(1), bus.subscribe_with("text", options)).await.expect("at once").unwrap_err();
        assert!(is_permanent(refused.kind()), "{refused:?}");
    }
    // It becomes one while somebody reads: only the topic concerned ends.
    let mut broken = [bus.subscribe("t").await.unwrap(), bus.subscribe_with("t", group("g")).await.unwrap()];
    let mut whole = [bus.subscribe("u").await.unwrap(), bus.subscribe_with("u", group("g")).await.unwrap()];
    bus.publish("t", Event::new("x")).await.unwrap();
    for subscription in &mut broken {
        kinds(subscription, 1).await;
        assert!(futures::poll!(subscription.next()).is_pending());
    }
    server.ask(&["SET", "mastra:topic:t", "x"]).unwrap();
    for subscription in &mut broken {
        let error = timeout(PATIENCE, subscription.next()).await.expect("in time").expect("an error").unwrap_err();
        assert!(is_permanent(error.kind()), "{error:?}");
    }
    bus.publish("u", Event::new("y")).await.unwrap();
    for subscription in &mut whole {
        assert_eq!(kinds(subscription, 1).await, ["y"]);
    }
}

/// Another process, which is a member of the group `g` on topic `t`.
struct Other(Child);

impl Other {
    fn start(server: &Server, job: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(JOB, format!("{job} {}", url(server))).stdin(Stdio::null()).stdout(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap().success());
    }

    async fn says(&mut self) -> String {
        let mut stdout = self.0.stdout.take().unwrap();
        let (line, stdout) = tokio::task::spawn_blocking(move || {
            let mut line = Vec::new();
            let mut byte = [0];
            while std::io::Read::read(&mut stdout, &mut byte).is_ok_and(|count| count == 1) && byte[0] != b'\n' {
                line.push(byte[0]);
            }
            (String::from_utf8(line).unwrap(), stdout)
        })
        .await
        .unwrap();
        self.0.stdout = Some(stdout);
        line
    }

    async fn ended(mut self) -> (bool, Vec<String>) {
        tokio::task::spawn_blocking(move || {
            let lines = BufReader::new(self.0.stdout.take().unwrap()).lines().map_while(Result::ok).collect();
            (self.0.wait().unwrap().success(), lines)
        })
        .await
        .unwrap()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What another process does.
fn member(job: &str) -> ExitCode {
    let (job, url) = job.split_once(' ').unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let bus = Bus::from(builder(url).connect().await.unwrap());
        let options = group("g").dead_letter(Topic::new("dead").unwrap());
        match job {
            // Handles what comes and dies of one, or ends when there is nothing for a while.
            "mortal" => {
                let retry = RetryPolicy::new().max_attempts(3);
                let mut member = bus.subscribe_with("t", options.retry(retry)).await.unwrap();
                while let Ok(Some(Ok(delivery))) = timeout(3 * RECLAIM, member.next()).await {
                    if delivery.event().event_type() == "poison" {
                        std::process::abort();
                    }
                    println!("{} {}", delivery.event().event_type(), delivery.attempt());
                    delivery.done().await;
                }
                bus.close(Duration::from_secs(1)).await.unwrap();
            }
            // Takes one and settles it when it is woken from a long sleep.
            "sleeper" => {
                let mut member = bus.subscribe_with("t", options).await.unwrap();
                let delivery = member.next().await.unwrap().unwrap();
                println!("taken");
                let (mut now, mut passed) = (std::time::Instant::now(), Duration::ZERO);
                while passed < RECLAIM {
                    // Not asleep as a task: paused as a process, with its clock going on.
                    std::thread::sleep(Duration::from_millis(10));
                    passed = now.elapsed();
                    now = std::time::Instant::now();
                }
                println!("{:?}", delivery.done().await);
            }
            _ => {
                let mut member = bus.subscribe_with("t", options).await.unwrap();
                let _held = member.next().await.unwrap().unwrap();
                println!("taken");
                std::future::pending::<()>().await;
            }
        }
    });
    ExitCode::SUCCESS
}

async fn poison(server: Arc<Server>) {
    let bus = connect(&server).await;
    let mut expected = BTreeSet::new();
    for number in 0..40 {
        let name = if number == 10 { "poison".to_owned() } else { format!("fine-{number}") };
        bus.publish("t", Event::new(&name)).await.unwrap();
        expected.insert(name);
    }
    expected.remove("poison");
    let (mut deaths, mut handled) = (0, BTreeSet::new());
    loop {
        let (lived, lines) = Other::start(&server, "mortal").ended().await;
        handled.extend(lines.iter().filter_map(|line| Some(line.split_once(' ')?.0.to_owned())));
        if lived {
            break;
        }
        deaths += 1;
        assert!(deaths <= 4, "it kills again and again");
    }
    assert_eq!(deaths, 3, "as many as there are attempts");
    assert_eq!(handled, expected);
    let letters = bus.history("dead", Start::Earliest, 100).await.unwrap();
    let given_up: Vec<_> =
        letters.entries.iter().map(|(_, letter)| (letter.event_type(), Origin::of(letter).unwrap().attempts)).collect();
    assert_eq!(given_up, [("poison", 3)]);
}

async fn paused(server: Arc<Server>) {
    let bus = connect(&server).await;
    let event = Event::new("x");
    bus.publish("t", event.clone()).await.unwrap();
    let mut sleeper = Other::start(&server, "sleeper");
    assert_eq!(sleeper.says().await, "taken");
    sleeper.signal("-STOP");
    let mut member = bus.subscribe_with("t", group("g")).await.unwrap();
    let taken_over = next(&mut member).await;
    assert_eq!((taken_over.event().id(), taken_over.attempt()), (event.id(), 2));
    sleeper.signal("-CONT");
    assert_eq!(sleeper.says().await, "TooLate", "the answer to who was paused");
    // It is not acknowledged away: it can still be retried.
    assert_eq!(taken_over.retry().await, Settled::Done);
    let again = next(&mut member).await;
    assert_eq!((again.event().id(), again.attempt()), (event.id(), 3));
    assert_eq!(again.done().await, Settled::Done);
}

fn consumers(server: &Server) -> Vec<String> {
    let found = server.ask(&["XINFO", "CONSUMERS", "mastra:topic:t", "g"]).unwrap();
    found.list().iter().map(|consumer| consumer.list()[1].text().to_owned()).collect()
}

async fn tidied(server: Arc<Server>) {
    let bus = connect(&server).await;
    let mut member = bus.subscribe_with("t", group("g")).await.unwrap();
    for _ in 0..3 {
        bus.publish("t", Event::new("x")).await.unwrap();
    }
    let mut others: Vec<_> = (0..3).map(|_| Other::start(&server, "holder")).collect();
    for other in &mut others {
        assert_eq!(other.says().await, "taken");
        other.signal("-KILL");
    }
    kinds(&mut member, 3).await;
    assert!(futures::poll!(member.next()).is_pending());
    timeout(PATIENCE, async {
        while consumers(&server).iter().filter(|name| name.starts_with("rust-")).count() > 1 {
            sleep(Duration::from_millis(50)).await;
            let _ = futures::poll!(member.next());
        }
    })
    .await
    .expect("the consumers of the dead are removed");
    bus.close(PATIENCE).await.unwrap();
    assert_eq!((consumers(&server), clients(&server)), (Vec::new(), 0), "left behind");
}

async fn golden(server: Arc<Server>) {
    let bus = connect(&server).await;
    let event = Event::new("step.end").with_run_id("run-1").with_data(serde_json::json!({"a": [1]}));
    let expected = serde_json::json!({"type": "step.end", "id": event.id().to_string(), "runId": "run-1", "data": {"a": [1]},
        "createdAt": event.created_at().to_string()});
    // The first is added by a script, the second without.
    for number in 0..2 {
        bus.publish("t", event.clone()).await.unwrap();
        let entries = server.ask(&["XRANGE", "mastra:topic:t", "-", "+"]).unwrap();
        let fields: Vec<_> = entries.list()[number].list()[1].list().iter().map(Answer::text).collect();
        assert_eq!((fields.len(), fields[0], fields[2]), (4, "event", "p"));
        assert_eq!(serde_json::from_str::<serde_json::Value>(fields[1]).unwrap(), expected);
    }
    let calls = server.ask(&["INFO", "commandstats"]).unwrap();
    assert!(calls.text().contains("cmdstat_eval:calls=1,"), "{calls:?}");
    // A TypeScript member retries by writing the event again, with the attempt in it.
    let mut member = bus.subscribe_with("t", group("g")).await.unwrap();
    let mut listener = bus.subscribe("t").await.unwrap();
    kinds(&mut member, 2).await;
    let retried = r#"{"type":"w","id":"0b1e5c0e-6a34-4e0e-9d5e-5f2f6e0f6a11","runId":"r","data":null,"createdAt":"2026-01-02T03:04:05.006Z","deliveryAttempt":3}"#;
    server.ask(&["XADD", "mastra:topic:t", "MAXLEN", "~", "10000", "*", "event", retried]).unwrap();
    assert_eq!(next(&mut listener).await.attempt(), 3);
    let delivery = next(&mut member).await;
    assert_eq!((delivery.attempt(), delivery.event().event_type()), (3, "w"));
    delivery.retry().await;
    assert_eq!(next(&mut member).await.attempt(), 4);
}

async fn back_off_on_server(server: Arc<Server>) {
    let bus = connect(&server).await;
    let mut member = bus.subscribe_with("t", group("g")).await.unwrap();
    bus.publish("t", Event::new("x")).await.unwrap();
    let backoff = RECLAIM / 2;
    assert_eq!(next(&mut member).await.retry_after(backoff).await, Settled::Done);
    drop(member); // whoever asked for it need not be there
    let reclaim = RECLAIM.as_millis().to_string();
    // As a TypeScript member takes over what has been idle for so long.
    let due = || server.ask(&["XPENDING", "mastra:topic:t", "g", "IDLE", &reclaim, "-", "+", "10"]).unwrap().list().to_vec();
    let started = std::time::Instant::now();
    assert_eq!(due(), [], "claimable too early");
    while due().is_empty() {
        assert!(started.elapsed() < PATIENCE);
        sleep(Duration::from_millis(10)).await;
    }
    assert!(started.elapsed() > backoff / 2, "claimable after {:?}", started.elapsed());
    let pending = due().remove(0);
    let id = pending.list()[0].text().to_owned();
    assert_eq!(pending.list()[3].number(), 1, "attempts that count");
    let claimed = server.ask(&["XCLAIM", "mastra:topic:t", "g", "ts-member", &reclaim, &id]).unwrap();
    assert_eq!(claimed.list().len(), 1);
    assert_eq!(server.ask(&["XLEN", "mastra:topic:t"]).unwrap().number(), 1, "a retry is not written again");
}

/// One publisher, ten followers in its process, and a stream that keeps little: what is not handed over is told, to the last event.
async fn outrun(server: Arc<Server>) {
    const EVENTS: u64 = 40_000;
    const TOGETHER: u64 = 200;
    let bus = Bus::from(builder(&url(&server)).max_len(Some(2_000)).connect().await.unwrap());
    let mut following = Vec::new();
    for number in 0..10 {
        let mut follower = bus.subscribe("t").await.unwrap();
        following.push(tokio::spawn(async move {
            let (mut due, mut lost) = (0, 0);
            loop {
                let delivery = match timeout(PATIENCE / 2, follower.next()).await {
                    Ok(delivery) => delivery.unwrap().unwrap(),
                    Err(_) => panic!("follower {number} stands still: {due} of {EVENTS}, of which {lost} were told to be lost"),
                };
                let is: u64 = delivery.event().event_type().parse().unwrap();
                assert_eq!(due + delivery.lagged(), is, "follower {number}: missing without being told, or told wrongly");
                (due, lost) = (is + 1, lost + delivery.lagged());
                if is == EVENTS - 1 {
                    break lost;
                }
                if number < 3 && is.is_multiple_of(100) {
                    sleep(Duration::from_millis(1)).await; // some are slower than others
                }
            }
        }));
    }
    for first in (0..EVENTS).step_by(TOGETHER as usize) {
        let events: Vec<_> = (first..first + TOGETHER).map(|number| Arc::new(Event::new(number.to_string()))).collect();
        bus.publish_with("t", &events, PublishOptions::new()).await.unwrap();
    }
    for follower in following {
        follower.await.unwrap();
    }
}

/// More topics than are read by one read that blocks.
const MANY: usize = 200;

async fn follow_many(bus: &Bus) -> Vec<Subscription> {
    let subscribing = (0..MANY).map(|topic| bus.subscribe(format!("t{topic}")));
    futures::future::try_join_all(subscribing).await.unwrap()
}

/// The connections that are told what has changed.
fn tracking(server: &Server) -> Vec<String> {
    let list = server.ask(&["CLIENT", "LIST"]).unwrap();
    let field = |line: &str, name: &str| line.split(' ').find_map(|field| field.strip_prefix(name).map(str::to_owned));
    let is = |line: &&str| field(line, "flags=").is_some_and(|flags| flags.contains('t'));
    list.text().lines().filter(is).filter_map(|line| field(line, "id=")).collect()
}

async fn until_tracking(server: &Server, count: usize) {
    timeout(PATIENCE, async {
        while tracking(server).len() != count {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the connections that are told what has changed");
}

async fn tracking_killed(server: Arc<Server>) {
    const ROUNDS: usize = 60;
    let (bus, publisher) = (connect(&server).await, connect(&server).await);
    let mut subscriptions = follow_many(&bus).await;
    until_tracking(&server, 1).await;
    let killing = {
        let server = server.clone();
        tokio::spawn(async move {
            for _ in 0..15 {
                for id in tracking(&server) {
                    server.ask(&["CLIENT", "KILL", "ID", &id]).unwrap();
                }
                sleep(Duration::from_millis(100)).await;
            }
        })
    };
    let publishing = tokio::spawn(async move {
        for round in 0..ROUNDS {
            let publishing = (0..MANY).map(|topic| publisher.publish(format!("t{topic}"), Event::new(round.to_string())));
            futures::future::try_join_all(publishing).await.unwrap();
            sleep(Duration::from_millis(20)).await;
        }
    });
    let expected: Vec<_> = (0..ROUNDS).map(|round| round.to_string()).collect();
    for subscription in &mut subscriptions {
        assert_eq!(kinds(subscription, ROUNDS).await, expected);
    }
    publishing.await.unwrap();
    killing.await.unwrap();
    // What comes when nobody kills any more is told at once again.
    until_tracking(&server, 1).await;
    bus.publish("t7", Event::new("last")).await.unwrap();
    assert_eq!(kinds(&mut subscriptions[7], 1).await, ["last"]);
    // With few topics left it blocks again.
    subscriptions.truncate(10);
    until_tracking(&server, 0).await;
    bus.publish("t7", Event::new("blocking")).await.unwrap();
    assert_eq!(kinds(&mut subscriptions[7], 1).await, ["blocking"]);
}

async fn tracking_emptied(server: Arc<Server>) {
    let bus = connect(&server).await;
    let mut subscriptions = follow_many(&bus).await;
    until_tracking(&server, 1).await;
    for round in 0..2 {
        for topic in 0..MANY {
            bus.publish(format!("t{topic}"), Event::new(round.to_string())).await.unwrap();
        }
        for subscription in &mut subscriptions {
            assert_eq!(kinds(subscription, 1).await, [round.to_string()]);
        }
        server.ask(&["FLUSHALL"]).unwrap();
    }
    // A stream that is deleted and comes back between two looks is one that has changed.
    bus.publish("t3", Event::new("before")).await.unwrap();
    assert_eq!(kinds(&mut subscriptions[3], 1).await, ["before"]);
    server.ask(&["DEL", "mastra:topic:t3"]).unwrap();
    bus.publish("t3", Event::new("after")).await.unwrap();
    assert_eq!(kinds(&mut subscriptions[3], 1).await, ["after"]);
}

async fn tracking_refused(server: Arc<Server>) {
    server.ask(&["ACL", "SETUSER", "plain", "on", ">secret", "~*", "&*", "+@all", "-client|tracking"]).unwrap();
    let bus = Bus::from(builder(&format!("redis://plain:secret@{}", server.address)).connect().await.unwrap());
    let mut subscriptions = follow_many(&bus).await;
    for topic in [0, MANY / 2, MANY - 1] {
        bus.publish(format!("t{topic}"), Event::new("x")).await.unwrap();
        assert_eq!(kinds(&mut subscriptions[topic], 1).await, ["x"]);
    }
    assert_eq!(tracking(&server).len(), 0);
}

async fn few(server: Arc<Server>) {
    let bus = connect(&server).await;
    assert_eq!(clients(&server), 1);
    let mut subscriptions = Vec::new();
    for topic in 0..20 {
        for _ in 0..5 {
            subscriptions.push(bus.subscribe(format!("t{topic}")).await.unwrap());
        }
        for name in ["a", "b"] {
            subscriptions.push(bus.subscribe_with(format!("t{topic}"), group(name)).await.unwrap());
        }
    }
    assert_eq!(clients(&server), 4);
    // Many topics need no more, though they are followed in another way.
    let many = follow_many(&bus).await;
    until_tracking(&server, 1).await;
    assert_eq!(clients(&server), 4);
    drop(many);
    for topic in 0..20 {
        bus.publish(format!("t{topic}"), Event::new("x")).await.unwrap();
    }
    for subscription in &mut subscriptions {
        assert_eq!(kinds(subscription, 1).await, ["x"]);
    }
    drop(subscriptions);
    timeout(PATIENCE, async {
        while clients(&server) > 1 {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("connections end with those who need them");
}
