//! A process of a round, seen from within.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use pubsub_core::{BoxError, Event};
use tokio::net::UnixDatagram;

use super::spec::{Role, Spec, TICK};
use super::{ours, raw};
use crate::event::build_of;
use crate::report::quantile;

/// Plays the part that the specification says.
pub(crate) fn play(spec: &str) -> Result<(), BoxError> {
    let spec: Spec = serde_json::from_str(spec)?;
    match (spec.party.as_str(), spec.role) {
        (super::OURS, Role::Relay) => ours::relay(&spec),
        (super::OURS, Role::Receive) => ours::receive(&spec),
        (super::OURS, _) => ours::publish(&spec),
        (super::RAW, Role::Relay) => raw::relay(&spec),
        (super::RAW, Role::Receive) => raw::receive(&spec),
        (super::RAW, _) => raw::publish(&spec),
        _ => Err(format!("no party `{}`", spec.party).into()),
    }
}

/// Where a publisher puts its events.
pub(crate) trait Send {
    fn send(&mut self, events: Vec<Arc<Event>>) -> impl Future<Output = Result<(), BoxError>>;

    /// Returns when all has been sent.
    fn finish(&mut self) -> impl Future<Output = Result<(), BoxError>>;
}

/// Publishes as the role says, once it is told to go, and says how many.
pub(crate) async fn publish(spec: &Spec, mut to: impl Send) -> Result<(), BoxError> {
    let mut progress = Progress::of(spec)?;
    say("ready");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let mut published = 0;
    match spec.role {
        Role::Publish { seconds, batch } => {
            let until = Instant::now() + Duration::from_secs_f64(seconds);
            while Instant::now() < until {
                progress.until_within_reach(published).await?;
                to.send((0..batch as u64).map(|more| build_of(published + more, spec.size)).collect()).await?;
                published += batch as u64;
            }
        }
        Role::Pace { events } => {
            let mut due = Instant::now();
            while published < events {
                tokio::time::sleep_until(due.into()).await;
                due = (due + TICK).max(Instant::now());
                to.send(vec![build_of(nanos(), spec.size)]).await?;
                published += 1;
            }
        }
        Role::Relay | Role::Receive => return Err("it does not publish".into()),
    }
    to.finish().await?;
    say(published);
    Ok(())
}

/// How far a publisher may be ahead of who reads slowest, in bytes of payload and in events: a bus that keeps what fan-out has not
/// read, within a bound, lets it run on, and a process that copies does not.
const REACH_BYTES: u64 = 64 << 20;
const REACH: u64 = 6144;

/// How often a receiver says how far it is.
const STEP: u64 = REACH / 8;

/// Where receivers say how far they are, beside what is measured.
struct Progress {
    socket: Option<UnixDatagram>,
    read: BTreeMap<u32, u64>,
    receivers: usize,
    reach: u64,
}

fn progress_of(spec: &Spec) -> PathBuf {
    spec.address.with_extension("progress")
}

/// Whether a publisher waits for its receivers anyway: for a group, and where everything is merely copied.
fn pushes_back(spec: &Spec) -> bool {
    spec.group || spec.party == super::RAW
}

impl Progress {
    fn of(spec: &Spec) -> std::io::Result<Self> {
        let socket = if pushes_back(spec) { None } else { Some(UnixDatagram::bind(progress_of(spec))?) };
        let reach = REACH.min(REACH_BYTES / spec.size as u64);
        Ok(Self { socket, read: BTreeMap::new(), receivers: spec.receivers, reach })
    }

    async fn until_within_reach(&mut self, published: u64) -> std::io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        loop {
            let slowest = if self.read.len() < self.receivers { 0 } else { self.read.values().copied().min().unwrap_or(0) };
            let mut said = [0; 12];
            // Whatever was said is taken, needed or not: few of these have room, and receivers wait for it.
            match socket.try_recv(&mut said) {
                Ok(_) => {}
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error),
                Err(_) if published < slowest + self.reach => return Ok(()),
                Err(_) => {
                    socket.readable().await?;
                    continue;
                }
            }
            let (who, read) = said.split_at(4);
            let read = u64::from_le_bytes(read.try_into().expect("eight bytes"));
            self.read.insert(u32::from_le_bytes(who.try_into().expect("four bytes")), read);
        }
    }
}

/// What a receiver has read.
#[derive(Clone)]
pub(crate) struct Tally(Arc<Read>);

struct Read {
    /// To the publisher; none for a member of a group.
    progress: Option<(std::os::unix::net::UnixDatagram, PathBuf)>,
    step: u64,
    count: AtomicU64,
    /// At a steady pace: when each was published, and when read.
    times: Mutex<Vec<(u64, u64)>>,
}

/// Numbers that are times are greater.
const COUNTED: u64 = 1 << 40;

impl Tally {
    pub(crate) fn of(spec: &Spec) -> Self {
        let socket = || std::os::unix::net::UnixDatagram::unbound().expect("sockets can be made");
        let progress = (!pushes_back(spec)).then(|| (socket(), progress_of(spec)));
        let step = STEP.min(REACH_BYTES / spec.size as u64 / 8);
        Self(Arc::new(Read { progress, step, count: AtomicU64::new(0), times: Mutex::default() }))
    }

    /// Says that this is ready, and from now on answers questions. Ends the process when nobody asks any more.
    pub(crate) fn start(&self) {
        let read = self.0.clone();
        say("ready");
        std::thread::spawn(move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                match line.split_once(' ') {
                    None if line == "count" => say(read.count.load(Ordering::Acquire)),
                    None => say(serde_json::json!(read.latencies())),
                    Some((_, after)) => say(read.first_after(after.parse().expect("a time"))),
                }
            }
            std::process::exit(0);
        });
    }

    /// An event was read.
    pub(crate) fn add(&self, number: u64) {
        if number > COUNTED {
            self.0.times.lock().push((number, nanos()));
        }
        // One reader: one writer.
        let count = self.0.count.load(Ordering::Relaxed) + 1;
        self.0.count.store(count, Ordering::Release);
        if count.is_multiple_of(self.0.step)
            && let Some((socket, publisher)) = &self.0.progress
        {
            let said = [&std::process::id().to_le_bytes()[..], &count.to_le_bytes()].concat();
            let _ = socket.send_to(&said, publisher); // it may have ended
        }
    }
}

impl Read {
    fn latencies(&self) -> [f64; 2] {
        let mut taken: Vec<f64> = self.times.lock().iter().map(|(sent, read)| (read - sent) as f64 / 1e3).collect();
        taken.sort_by(f64::total_cmp);
        [quantile(&taken, 0.5), quantile(&taken, 0.99)]
    }

    /// When the first event was read that was published after this.
    fn first_after(&self, after: u64) -> u64 {
        loop {
            let found = self.times.lock().iter().find(|(sent, _)| *sent > after).map(|(_, read)| *read);
            match found {
                Some(read) => return read,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// Nanoseconds on the clock that all processes share.
pub(crate) fn nanos() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux has it");
    (now.tv_sec() * 1_000_000_000 + now.tv_nsec()) as u64
}

pub(crate) fn say(what: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    // Nobody reads any more: the round was given up, and standard input ends, too.
    let _ = writeln!(out, "{what}").and_then(|()| out.flush());
}

/// Waits until the round is over.
pub(crate) fn until_the_end() {
    std::io::stdin().lock().lines().map_while(Result::ok).for_each(drop);
}
