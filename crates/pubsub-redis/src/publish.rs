//! Writing to streams: one task, one pipeline at a time, which carries what all publishers have handed in meanwhile.
//!
//! Each event carries its publisher and a number. When a pipeline's outcome is unknown nothing else is written until a script has
//! found out which of its events are there and added the others; the old connection is ended first, so that nothing of it can still
//! arrive behind the script. So each event is written once, as long as the server lets connections be ended and knows the time to ten
//! seconds.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use fred::types::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::RedisBuilder;
use crate::entry::{EVENT, EntryId, NUMBER, PUBLISHER};
use crate::errors::Fault;
use crate::link::{Cmd, Link, Script};
use crate::pause::Pause;
use crate::reply;

/// How many publish calls wait for the writer before the next one waits to be taken.
const WAITING_CALLS: usize = 1024;

/// The most events and bytes of one pipeline; beyond that they go in the next.
const EVENTS_TOGETHER: usize = 1000;
const BYTES_TOGETHER: usize = 4 << 20;

/// How far the server's clock may jump within a publish whose outcome is unknown.
const CLOCK_SLACK: Duration = Duration::from_secs(10);

static ADD_MISSING: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/publish.lua")));

/// A publish that failed: the first events were published, of the next so many it is not known, the rest was not sent.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) fault: Fault,
    pub(crate) published: usize,
    pub(crate) unknown: usize,
}

struct Job {
    stream: Arc<str>,
    events: Vec<Bytes>,
    /// Set by whoever comes first: the writer that starts on it, or the caller who gives up.
    claimed: Arc<AtomicBool>,
    reply: oneshot::Sender<Result<Vec<EntryId>, Failed>>,
}

/// Where publishers hand in their events. The writer's task ends with the last clone.
#[derive(Clone)]
pub(crate) struct Writer(mpsc::Sender<Job>);

impl Writer {
    pub(crate) fn start(link: Arc<Link>, options: &RedisBuilder) -> Self {
        let (sender, jobs) = mpsc::channel(WAITING_CALLS);
        let publisher = format!("{:016x}", fastrand::u64(..));
        let task = Task { link, publisher, next: 0, retention: Retention::new(options), patience: options.publish_timeout };
        tokio::spawn(task.run(jobs));
        Self(sender)
    }

    /// Writes events to a stream and returns their ids; waits to be taken for this long at most, and for all of it until then. Once it
    /// waits for the answer they are written whether or not anybody waits.
    pub(crate) async fn publish(
        &self,
        stream: Arc<str>,
        events: Vec<Bytes>,
        wait: Duration,
        until: Instant,
    ) -> Result<Vec<EntryId>, Failed> {
        let (count, claimed) = (events.len(), Arc::new(AtomicBool::new(false)));
        let not_sent = |why: &str| Failed { fault: Fault::Unknown(why.into()), published: 0, unknown: 0 };
        let (reply, answer) = oneshot::channel();
        let job = Job { stream, events, claimed: claimed.clone(), reply };
        match timeout_at(until.min(Instant::now() + wait), self.0.send(job)).await {
            Err(_) => return Err(Failed { fault: Fault::Full, published: 0, unknown: 0 }),
            Ok(Err(_)) => return Err(not_sent("the connection was closed")),
            Ok(Ok(())) => {}
        }
        match timeout_at(until, answer).await {
            Ok(Ok(outcome)) => outcome,
            Err(_) if !claimed.swap(true, Ordering::AcqRel) => Err(not_sent("it was not written within publish_timeout")),
            Ok(Err(_)) | Err(_) => {
                let fault = Fault::Unknown("it was not confirmed within publish_timeout".into());
                Err(Failed { fault, published: 0, unknown: count })
            }
        }
    }

    /// Waits until what was handed in before has its answer.
    pub(crate) async fn flush(&self) {
        let (reply, answer) = oneshot::channel();
        let job = Job { stream: "".into(), events: Vec::new(), claimed: Arc::default(), reply };
        if self.0.send(job).await.is_ok() {
            let _ = answer.await; // a writer that is gone has nothing left
        }
    }
}

/// What is kept, as options of commands.
struct Retention {
    add: Vec<Value>,
    max_age: Option<u64>,
    idle_ttl: Option<u64>,
}

impl Retention {
    fn new(options: &RedisBuilder) -> Self {
        let add = match options.max_len {
            Some(events) => vec!["MAXLEN".into(), "~".into(), i64::try_from(events).unwrap_or(i64::MAX).into()],
            None => Vec::new(),
        };
        Self { add, max_age: options.max_age.map(millis), idle_ttl: options.idle_ttl.map(millis) }
    }

    /// What follows the events of a stream in their transaction.
    fn upkeep(&self, stream: &str) -> impl Iterator<Item = Cmd> {
        let trim = self.max_age.map(|age| {
            // By this machine's clock: off by as much as the clocks disagree.
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            Cmd::new("XTRIM").key(stream).arg("MINID").arg("~").number(millis(now).saturating_sub(age))
        });
        let expire = self.idle_ttl.map(|ttl| Cmd::new("PEXPIRE").key(stream).number(ttl));
        trim.into_iter().chain(expire)
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The connection that something was written on, and what the server called it, if that is known.
type OldConnection = (Arc<Link>, Option<i64>);

struct Task {
    link: Arc<Link>,
    publisher: String,
    /// The number of the next event.
    next: u64,
    retention: Retention,
    patience: Duration,
}

/// A job that was begun.
struct Open {
    job: Job,
    /// The number of its first event.
    number: u64,
    /// Of the events that were written.
    ids: Vec<EntryId>,
}

/// The events of one pipeline for one stream, by number; and how many of them belong to each open job.
struct Lane {
    stream: Arc<str>,
    events: Vec<(u64, Bytes)>,
    parts: Vec<(usize, usize)>,
}

impl Task {
    async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let (mut taken, mut open) = (Vec::new(), VecDeque::new());
        loop {
            if open.is_empty() && jobs.recv_many(&mut taken, WAITING_CALLS).await == 0 {
                return;
            }
            while taken.len() < WAITING_CALLS
                && let Ok(job) = jobs.try_recv()
            {
                taken.push(job);
            }
            for job in taken.drain(..) {
                if !job.claimed.swap(true, Ordering::AcqRel) {
                    let number = self.next;
                    self.next += job.events.len() as u64;
                    open.push_back(Open { job, number, ids: Vec::new() });
                }
            }
            let lanes = next_lanes(&open);
            let outcomes = self.write(&lanes).await;
            let mut failed: Vec<Option<(Fault, usize)>> = vec![None; open.len()];
            for (lane, outcome) in lanes.iter().zip(outcomes) {
                let mut ids = outcome.as_ref().map(Vec::as_slice).unwrap_or_default();
                for &(job, count) in &lane.parts {
                    match &outcome {
                        Ok(_) => {
                            let (these, rest) = ids.split_at(count);
                            open[job].ids.extend(these);
                            ids = rest;
                        }
                        Err(fault) => failed[job] = Some((fault.clone(), if fault.is_unknown() { count } else { 0 })),
                    }
                }
            }
            let mut failed = failed.into_iter();
            let mut rest = VecDeque::new();
            for one in open.drain(..) {
                let Open { job, ids, .. } = &one;
                match failed.next().flatten() {
                    Some((fault, unknown)) => {
                        let failure = Failed { fault, published: ids.len(), unknown };
                        let _ = one.job.reply.send(Err(failure)); // nobody may be waiting, here and below
                    }
                    None if rest.is_empty() && ids.len() == job.events.len() => drop(one.job.reply.send(Ok(one.ids))),
                    None => rest.push_back(one),
                }
            }
            open = rest;
        }
    }

    /// Writes what goes together, each lane whole or not at all.
    async fn write(&mut self, lanes: &[Lane]) -> Vec<Result<Vec<EntryId>, Fault>> {
        if lanes.is_empty() {
            return Vec::new();
        }
        let sent = Instant::now();
        // By connection: one, but in a cluster.
        let mut ways: Vec<(Arc<Link>, Vec<usize>)> = Vec::new();
        let mut outcomes: Vec<Result<Vec<EntryId>, Fault>> = Vec::with_capacity(lanes.len());
        let mut old: Vec<Option<OldConnection>> = Vec::with_capacity(lanes.len());
        for (at, lane) in lanes.iter().enumerate() {
            old.push(None);
            outcomes.push(Err(Fault::Nonsense("a transaction without an answer")));
            match self.link.beside(&lane.stream).await {
                Ok(link) => match ways.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &link)) {
                    Some((_, of_way)) => of_way.push(at),
                    None => ways.push((link, vec![at])),
                },
                Err(fault) => outcomes[at] = Err(fault),
            }
        }
        let sending = ways.iter().map(|(link, of_way)| self.send(link, of_way.iter().map(|at| &lanes[*at])));
        for ((link, of_way), (id, answers)) in ways.iter().zip(futures::future::join_all(sending).await) {
            for (at, outcome) in of_way.iter().zip(answers) {
                outcomes[*at] = outcome;
                old[*at] = Some((link.clone(), id));
            }
        }
        for ((lane, outcome), old) in lanes.iter().zip(&mut outcomes).zip(&mut old) {
            let moved = |fault: &Fault| fault.is_elsewhere() && self.link.cluster().is_some();
            if matches!(outcome, Err(fault) if fault.is_unknown() || moved(fault)) {
                *outcome = self.add_missing(lane, sent, old).await;
            }
        }
        outcomes
    }

    /// Sends lanes in one pipeline, and returns on which connection that was and what came of each.
    async fn send<'a>(
        &self,
        link: &Link,
        lanes: impl Iterator<Item = &'a Lane>,
    ) -> (Option<i64>, Vec<Result<Vec<EntryId>, Fault>>) {
        let id = link.known_id().await;
        let (mut commands, mut counts) = (Vec::new(), Vec::new());
        for lane in lanes {
            let before = commands.len();
            commands.push(Cmd::new("MULTI").beside(&lane.stream));
            commands.extend(lane.events.iter().map(|(number, event)| self.add(&lane.stream, *number, event)));
            commands.extend(self.retention.upkeep(&lane.stream));
            commands.push(Cmd::new("EXEC").beside(&lane.stream));
            counts.push((commands.len() - before, lane.events.len()));
        }
        let mut answers = link.pipeline(commands).await.into_iter();
        let of_lane = |(count, events)| ids_of(answers.by_ref().take(count), events);
        (id, counts.into_iter().map(of_lane).collect())
    }

    fn add(&self, stream: &str, number: u64, event: &Bytes) -> Cmd {
        let add = self.retention.add.iter().cloned().fold(Cmd::new("XADD").key(stream), Cmd::arg);
        add.arg("*").arg(EVENT).arg(event.clone()).arg(PUBLISHER).arg(self.publisher.as_str()).arg(NUMBER).number(number)
    }

    /// Finds out what became of a lane, and adds what is missing, for as long as there is patience.
    async fn add_missing(&self, lane: &Lane, sent: Instant, old: &mut Option<OldConnection>) -> Result<Vec<EntryId>, Fault> {
        let (until, mut pause) = (sent + self.patience, Pause::new());
        loop {
            let fault = match self.try_add_missing(lane, sent, old).await {
                Ok(ids) => return Ok(ids),
                // Said of this attempt: what became of the first is as unknown as before.
                Err(fault) => Fault::Unknown(fault.to_string()),
            };
            let next = Instant::now() + pause.next();
            if next >= until {
                return Err(fault);
            }
            tokio::time::sleep_until(next).await;
        }
    }

    async fn try_add_missing(
        &self,
        lane: &Lane,
        sent: Instant,
        old: &mut Option<OldConnection>,
    ) -> Result<Vec<EntryId>, Fault> {
        let link = self.link.beside(&lane.stream).await?;
        if let Some((written_on, Some(written_as))) = old {
            // A node that has handed its slots on is gone, or carries nothing out for them any more.
            let is_same = Arc::ptr_eq(written_on, &link);
            if is_same && link.id().await? != *written_as {
                // Refused, if it is not allowed or long gone: then what is still on its way may come behind the script.
                let _ = link.call(Cmd::new("CLIENT").arg("KILL").arg("ID").arg(*written_as)).await;
            }
            *old = None;
        }
        let ago = millis(sent.elapsed() + CLOCK_SLACK);
        let call = ADD_MISSING.call(&[&lane.stream]).arg(self.publisher.as_str()).number(ago);
        let call = call.number(self.retention.add.len() as u64);
        let call = self.retention.add.iter().cloned().fold(call, Cmd::arg);
        let call = lane.events.iter().fold(call, |call, (number, event)| call.number(*number).arg(event.clone()));
        let ids: Vec<_> =
            reply::array(self.link.eval(&ADD_MISSING, call).await?)?.iter().map(reply::id).collect::<Result<_, _>>()?;
        for command in self.retention.upkeep(&lane.stream) {
            self.link.call(command).await?;
        }
        if ids.len() == lane.events.len() { Ok(ids) } else { Err(Fault::Nonsense("another number of entries was added")) }
    }
}

/// What goes into the next pipeline: the first of what is open, by stream.
fn next_lanes(open: &VecDeque<Open>) -> Vec<Lane> {
    let (mut lanes, mut events, mut bytes): (Vec<Lane>, _, _) = (Vec::new(), 0, 0);
    for (place, Open { job, number, ids }) in open.iter().enumerate() {
        let mut count = 0;
        let stream = &job.stream;
        for (at, event) in job.events.iter().enumerate().skip(ids.len()) {
            if events == EVENTS_TOGETHER || (bytes > 0 && bytes + event.len() > BYTES_TOGETHER) {
                break;
            }
            let lane = lanes.iter().position(|lane| lane.stream == *stream).unwrap_or_else(|| {
                lanes.push(Lane { stream: stream.clone(), events: Vec::new(), parts: Vec::new() });
                lanes.len() - 1
            });
            lanes[lane].events.push((number + at as u64, event.clone()));
            if count == 0 {
                lanes[lane].parts.push((place, 0));
            }
            count += 1;
            lanes[lane].parts.last_mut().expect("pushed above").1 = count;
            (events, bytes) = (events + 1, bytes + event.len());
        }
        if ids.len() + count < job.events.len() {
            break; // what is behind it must not overtake it
        }
    }
    lanes
}

/// The ids in the answers to a transaction of so many additions.
fn ids_of(answers: impl Iterator<Item = Result<Value, Fault>>, count: usize) -> Result<Vec<EntryId>, Fault> {
    match reply::executed(answers)? {
        answers if answers.len() >= count => answers[..count].iter().map(reply::id).collect(),
        _ => Err(Fault::Nonsense("a transaction with another answer")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(stream: &str, sizes: &[usize], written: usize) -> Open {
        let events = sizes.iter().map(|size| Bytes::from(vec![0; *size])).collect();
        let job = Job { stream: stream.into(), events, claimed: Arc::default(), reply: oneshot::channel().0 };
        Open { job, number: 100, ids: vec![EntryId::ZERO; written] }
    }

    type Shape = (String, Vec<u64>, Vec<(usize, usize)>);

    fn shape(open: impl IntoIterator<Item = Open>) -> Vec<Shape> {
        let lanes = next_lanes(&open.into_iter().collect()).into_iter();
        lanes.map(|lane| (lane.stream.to_string(), lane.events.iter().map(|(n, _)| *n).collect(), lane.parts)).collect()
    }

    #[test]
    fn what_goes_together_is_ordered_by_stream() {
        let lanes = shape([open("a", &[1, 1], 1), open("b", &[1], 0), open("a", &[1], 0)]);
        assert_eq!(lanes, [("a".into(), vec![101, 100], vec![(0, 1), (2, 1)]), ("b".into(), vec![100], vec![(1, 1)])]);
    }

    #[test]
    fn a_pipeline_is_bounded_and_nothing_overtakes() {
        let lanes = shape([open("a", &[1; 1500], 0), open("b", &[1], 0)]);
        assert_eq!((lanes.len(), lanes[0].1.len(), lanes[0].2.as_slice()), (1, 1000, &[(0, 1000)][..]));
        let lanes = shape([open("a", &[BYTES_TOGETHER + 1, 1], 0), open("b", &[1], 0)]);
        assert_eq!((lanes.len(), lanes[0].1.len()), (1, 1), "one event is always taken");
    }

    #[test]
    fn answers_to_a_transaction() {
        let refused = |text: &str| Fault::Refused(text.into());
        let ok = || Ok(Value::from("QUEUED"));
        let id = "5-1".parse().unwrap();
        let done = Ok(Value::Array(vec!["5-1".into(), 1.into()]));
        assert_eq!(ids_of([ok(), ok(), done].into_iter(), 1), Ok(vec![id]));
        let aborted = [ok(), Err(refused("NOPERM no")), Err(refused("EXECABORT discarded"))];
        assert_eq!(ids_of(aborted.into_iter(), 1), Err(refused("NOPERM no")));
        assert_eq!(ids_of([ok(), Err(refused("WRONGTYPE"))].into_iter(), 1), Err(refused("WRONGTYPE")));
        assert!(ids_of([Err(Fault::Unknown("cut".into()))].into_iter(), 1).unwrap_err().is_unknown());
    }
}
