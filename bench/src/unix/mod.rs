//! The bus of a host's processes, beside the same work over plain sockets; every party a process of its own.

pub(crate) mod child;
mod ours;
mod raw;
mod spec;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use pubsub_core::BoxError;

use self::child::nanos;
use self::spec::{Role, Spec};
use crate::report::{self, Unit};
use crate::rounds::{Contest, Party};

pub(crate) const BACKEND: &str = "unix";

const OURS: &str = "ours";
const RAW: &str = "two hops";

const FAN_OUT: usize = 10;
const GROUP: usize = 4;

/// How many events a publisher gives in one call.
const BATCH: usize = 64;

/// How many events a second and what else a round of a steady pace has.
const PACED: u64 = 2000;

/// How often the broker is killed, each time in processes of their own.
const TAKEOVERS: u32 = 50;

/// How long an answer of a process may take beyond the time of a round.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn contests() -> Vec<Contest> {
    let contest = |setting, unit, parties| Contest { backend: BACKEND, settings: vec![(setting, unit)], rounds: None, parties };
    let throughput =
        |receivers, group, batch, size| both(move |name, time| throughput(name, Load { receivers, group, batch, size }, time));
    let takeover = Party::new(OURS, report::Role::Ours, |_| takeover(OURS));
    vec![
        contest("1 to 1", Unit::Events, throughput(1, false, BATCH, 256)),
        contest("1 to 1, singly", Unit::Events, throughput(1, false, 1, 256)),
        contest("1 to 10", Unit::Deliveries, throughput(FAN_OUT, false, BATCH, 256)),
        contest("group of 4", Unit::Events, throughput(GROUP, true, BATCH, 256)),
        contest("64 KiB", Unit::Throughput, throughput(1, false, 1, 64 << 10)),
        Contest {
            backend: BACKEND,
            settings: vec![("latency p50", Unit::Microseconds), ("latency p99", Unit::Microseconds)],
            rounds: None,
            parties: both(|name, _| latency(name)),
        },
        Contest {
            backend: BACKEND,
            settings: vec![("takeover", Unit::Microseconds)],
            rounds: Some(TAKEOVERS),
            parties: vec![takeover],
        },
    ]
}

/// Ours and the limit.
fn both(round: impl Fn(&'static str, Duration) -> Result<Vec<f64>, BoxError> + Copy + 'static) -> Vec<Party> {
    vec![
        Party::new(OURS, report::Role::Ours, move |time| round(OURS, time)),
        Party::new(RAW, report::Role::Limit, move |time| round(RAW, time)),
    ]
}

/// One thread for each process: a core is what it may use.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

struct Load {
    receivers: usize,
    group: bool,
    batch: usize,
    size: usize,
}

/// A directory of its own for a round, with the socket in it.
struct Place(PathBuf);

impl Place {
    fn new() -> std::io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pubsub-bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory)?;
        Ok(Self(directory))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0); // a temporary directory
    }
}

/// A process that plays a part. Dropped, it is killed.
struct Actor {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Actor {
    fn start(spec: &Spec) -> Result<Self, BoxError> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--play").arg(serde_json::to_string(spec)?);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take().ok_or("no standard input")?;
        let stdout = child.stdout.take().ok_or("no standard output")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let actor = Self { child, stdin, answers };
        match actor.answer(Duration::ZERO)?.as_str() {
            "ready" => Ok(actor),
            other => Err(format!("{other:?} instead of being ready").into()),
        }
    }

    fn answer(&self, time: Duration) -> Result<String, BoxError> {
        Ok(self.answers.recv_timeout(time + PATIENCE).map_err(|_| "a process of the round has ended, or hangs")?)
    }

    fn ask(&mut self, what: impl std::fmt::Display, time: Duration) -> Result<String, BoxError> {
        writeln!(self.stdin, "{what}")?;
        self.answer(time)
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}

/// The processes of a round; what is dropped first is who publishes.
struct Cast {
    publisher: Actor,
    receivers: Vec<Actor>,
    relay: Actor,
    _place: Rc<Place>,
}

impl Cast {
    fn start(party: &str, receivers: usize, group: bool, size: usize, publisher: Role) -> Result<Self, BoxError> {
        let place = Rc::new(Place::new()?);
        let address = place.0.join("bus.sock");
        let actor = |role| Actor::start(&Spec { party: party.into(), role, address: address.clone(), receivers, group, size });
        let relay = actor(Role::Relay)?;
        let receivers = (0..receivers).map(|_| actor(Role::Receive)).collect::<Result<_, _>>()?;
        Ok(Self { publisher: actor(publisher)?, receivers, relay, _place: place })
    }
}

/// One publisher as fast as it can, for a while; the clock stops when the last event was read. Gives deliveries per second, or for
/// large events bytes.
fn throughput(party: &'static str, load: Load, time: Duration) -> Result<Vec<f64>, BoxError> {
    let Load { receivers, group, batch, size } = load;
    let role = Role::Publish { seconds: time.as_secs_f64(), batch };
    let mut cast = Cast::start(party, receivers, group, size, role)?;
    let started = Instant::now();
    let published: u64 = cast.publisher.ask("go", time)?.parse()?;
    let due = published * if group { 1 } else { receivers as u64 };
    loop {
        let mut read = 0;
        for receiver in &mut cast.receivers {
            read += receiver.ask("count", Duration::ZERO)?.parse::<u64>()?;
        }
        let taken = started.elapsed();
        if read == due {
            let figure = due as f64 / taken.as_secs_f64();
            return Ok(vec![if size > 4096 { figure * size as f64 } else { figure }]);
        }
        if read > due || taken > time + PATIENCE {
            return Err(format!("{read} deliveries arrived of {due}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A thousand events a second: the median and the 99th percentile, in microseconds.
fn latency(party: &'static str) -> Result<Vec<f64>, BoxError> {
    let mut cast = Cast::start(party, 1, false, 256, Role::Pace { events: PACED })?;
    cast.publisher.ask("go", spec::TICK * PACED as u32)?;
    let receiver = &mut cast.receivers[0];
    let until = Instant::now() + PATIENCE;
    while receiver.ask("count", Duration::ZERO)?.parse::<u64>()? < PACED {
        if Instant::now() > until {
            return Err("not all events arrived".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(serde_json::from_str(&receiver.ask("latencies", Duration::ZERO)?)?)
}

/// From the kill of the broker until an event arrives that was published after it, at a thousand a second; in microseconds.
fn takeover(party: &'static str) -> Result<Vec<f64>, BoxError> {
    let mut cast = Cast::start(party, 1, false, 256, Role::Pace { events: u64::MAX })?;
    writeln!(cast.publisher.stdin, "go")?;
    let until = Instant::now() + PATIENCE;
    while cast.receivers[0].ask("count", Duration::ZERO)?.parse::<u64>()? < 100 {
        if Instant::now() > until {
            return Err("nothing arrives".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let killed = nanos();
    cast.relay.child.kill()?;
    let arrived: u64 = cast.receivers[0].ask(format!("after {killed}"), Duration::ZERO)?.parse()?;
    Ok(vec![(arrived - killed) as f64 / 1e3])
}
