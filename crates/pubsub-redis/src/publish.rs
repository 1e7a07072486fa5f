//! Writing to streams: one task, which carries what all publishers have handed in meanwhile.
//!
//! What goes to one stream together is one call (`add.rs`). Several may be on their way, those for one stream in their order. Each says who
//! publishes and a number. When the outcome of one is unknown nothing else is written until a script has found out whether its events
//! are there and added them if not; the old connection is ended first, so that nothing of it can still arrive behind the script. So each
//! event is written once, as long as the server lets connections be ended and knows the time to ten seconds. In a cluster each stream has
//! one call on its way, and waits for its own node alone.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use pubsub_core::Fate;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::RedisBuilder;
use crate::add::{Outcome, Renewed, Retention, Shared};
use crate::entry::EntryId;
use crate::errors::Fault;
use crate::link::Link;

/// How many publish calls wait for the writer before the next one waits to be taken; and how many it works on.
const WAITING_CALLS: usize = 1024;

/// The most events and bytes of one call; beyond that they go in the next.
const EVENTS_TOGETHER: usize = 250;
const BYTES_TOGETHER: usize = 4 << 20;

/// A second call for a stream goes out before the first is answered if it has so many events.
const WORTH_SENDING: usize = 32;

/// A publish that failed, and what became of each event.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) fault: Fault,
    pub(crate) fates: Vec<Fate>,
}

impl Failed {
    fn all(fault: Fault, fate: Fate, count: usize) -> Self {
        Self { fault, fates: vec![fate; count] }
    }
}

/// Where the outcome of a publish goes.
type Reply = oneshot::Sender<Result<Vec<EntryId>, Failed>>;

struct Job {
    stream: Arc<str>,
    events: Vec<Bytes>,
    /// Set by whoever comes first: the writer that starts on it, or the caller who gives up.
    claimed: Arc<AtomicBool>,
    reply: Reply,
}

/// Where publishers hand in their events. The writer's task ends with the last clone.
#[derive(Clone)]
pub(crate) struct Writer(mpsc::Sender<Job>);

impl Writer {
    pub(crate) fn start(link: Arc<Link>, id: i64, options: &RedisBuilder) -> Self {
        let (sender, jobs) = mpsc::channel(WAITING_CALLS);
        let shared = Shared {
            link,
            publisher: format!("{:016x}", fastrand::u64(..)).into(),
            retention: Retention::new(options),
            patience: options.publish_timeout,
        };
        tokio::spawn(Task::new(shared, id).run(jobs));
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
        let not_sent = |fault| Failed::all(fault, Fate::NotSent, count);
        let (reply, answer) = oneshot::channel();
        let job = Job { stream, events, claimed: claimed.clone(), reply };
        let closed = || Fault::Unknown("the connection was closed".into());
        match self.0.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Closed(_)) => return Err(not_sent(closed())),
            Err(TrySendError::Full(job)) => match timeout_at(until.min(Instant::now() + wait), self.0.send(job)).await {
                Err(_) => return Err(not_sent(Fault::Full)),
                Ok(Err(_)) => return Err(not_sent(closed())),
                Ok(Ok(())) => {}
            },
        }
        match timeout_at(until, answer).await {
            Ok(Ok(outcome)) => outcome,
            Err(_) if !claimed.swap(true, Ordering::AcqRel) => {
                Err(not_sent(Fault::Unknown("it was not written within publish_timeout".into())))
            }
            Ok(Err(_)) | Err(_) => {
                let fault = Fault::Unknown("it was not confirmed within publish_timeout".into());
                Err(Failed::all(fault, Fate::Unknown, count))
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

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Events that go to one stream together.
pub(crate) struct Call {
    pub(crate) stream: Arc<str>,
    /// The number of the first.
    pub(crate) number: u64,
    pub(crate) events: Vec<Bytes>,
    parts: Vec<Part>,
    pub(crate) sent: Instant,
}

/// Which of a job's events are among those of a call.
struct Part {
    job: u64,
    offset: usize,
    count: usize,
}

/// A job that was begun.
struct Open {
    reply: Reply,
    claimed: Arc<AtomicBool>,
    ids: Vec<EntryId>,
    fates: Vec<Fate>,
    /// How many of its events have gone out, and how many have their fate.
    sent: usize,
    settled: usize,
    fault: Option<Fault>,
}

impl Open {
    fn answer(self) {
        let outcome = match self.fault {
            None => Ok(self.ids),
            Some(fault) => Err(Failed { fault, fates: self.fates }),
        };
        let _ = self.reply.send(outcome); // nobody may be waiting
    }
}

/// What goes to one stream.
#[derive(Default)]
struct Lane {
    /// Jobs, and what of them has not gone out; and how much that is.
    waiting: VecDeque<(u64, VecDeque<Bytes>)>,
    events: usize,
    /// Calls that have no outcome yet, and whether no other may join them.
    on_their_way: usize,
    alone: bool,
    /// The greatest number that was certainly added.
    added: u64,
}

impl Lane {
    fn may_send(&self, on_their_way: usize) -> bool {
        self.events > 0
            && !self.alone
            && self.on_their_way < on_their_way
            && (self.on_their_way == 0 || self.events >= WORTH_SENDING)
    }

    /// The next events that go together; none if whoever handed them in has given up.
    fn next_call(&mut self, stream: &Arc<str>, open: &mut BTreeMap<u64, Open>, next: &mut u64) -> Option<Call> {
        let mut call =
            Call { stream: stream.clone(), number: *next, events: Vec::new(), parts: Vec::new(), sent: Instant::now() };
        let mut bytes = 0;
        while let Some((job, events)) = self.waiting.front_mut() {
            // Nothing is claimed that this call has no room for.
            let first = events.front().map_or(0, Bytes::len);
            if call.events.len() == EVENTS_TOGETHER || (bytes > 0 && bytes + first > BYTES_TOGETHER) {
                break;
            }
            let Some(of_job) = open.get_mut(job).filter(|job| job.sent > 0 || !job.claimed.swap(true, Ordering::AcqRel)) else {
                self.events -= events.len();
                open.remove(job);
                self.waiting.pop_front();
                continue;
            };
            let offset = of_job.sent;
            while let Some(event) = events.front()
                && call.events.len() < EVENTS_TOGETHER
                && (bytes == 0 || bytes + event.len() <= BYTES_TOGETHER)
            {
                bytes += event.len();
                call.events.extend(events.pop_front());
                of_job.sent += 1;
            }
            if of_job.sent > offset {
                call.parts.push(Part { job: *job, offset, count: of_job.sent - offset });
            }
            if !events.is_empty() {
                break;
            }
            self.waiting.pop_front();
        }
        self.events -= call.events.len();
        *next += call.events.len() as u64;
        (!call.events.is_empty()).then_some(call)
    }

    /// Forgets what of a job has not gone out, and returns how much that was.
    fn forget(&mut self, job: u64) -> usize {
        let forgotten = self.waiting.iter().filter(|(of, _)| *of == job).map(|(_, events)| events.len()).sum();
        self.waiting.retain(|(of, _)| *of != job);
        self.events -= forgotten;
        forgotten
    }
}

struct Task {
    shared: Arc<Shared>,
    /// What the server calls the connection that calls are sent on, and whether that may have changed.
    id: i64,
    stale: bool,
    /// Whether the server knows the script.
    known: bool,
    /// The number of the next event, and of the next job.
    next: u64,
    next_job: u64,
    open: BTreeMap<u64, Open>,
    lanes: HashMap<Arc<str>, Lane>,
    /// Lanes that may have something to send.
    ready: Vec<Arc<str>>,
    renewed: Renewed,
    /// Who waits for everything before a job.
    flushes: VecDeque<(u64, Reply)>,
    calls: FuturesUnordered<BoxFuture<'static, (Call, Outcome)>>,
    /// Calls to be looked into once nothing is on its way any more.
    doubtful: Vec<(Call, Fault)>,
}

impl Task {
    fn new(shared: Shared, id: i64) -> Self {
        Self {
            renewed: Renewed::new(&shared.retention, shared.link.cluster().is_some()),
            shared: Arc::new(shared),
            id,
            stale: false,
            known: false,
            next: 1,
            next_job: 0,
            open: BTreeMap::new(),
            lanes: HashMap::new(),
            ready: Vec::new(),
            flushes: VecDeque::new(),
            calls: FuturesUnordered::new(),
            doubtful: Vec::new(),
        }
    }

    async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let (mut taken, mut closed) = (Vec::new(), false);
        loop {
            self.send().await;
            if self.take_ended() {
                continue;
            }
            if closed && self.calls.is_empty() {
                return;
            }
            let room = WAITING_CALLS.saturating_sub(self.open.len());
            tokio::select! {
                biased;
                Some((call, outcome)) = self.calls.next(), if !self.calls.is_empty() => {
                    self.ended(call, outcome);
                    self.take_ended(); // before anything new
                }
                count = jobs.recv_many(&mut taken, room), if room > 0 && !closed => {
                    closed = count == 0;
                    taken.drain(..).for_each(|job| self.begin(job));
                }
            }
        }
    }

    /// Takes a job.
    fn begin(&mut self, job: Job) {
        let Job { stream, events, claimed, reply } = job;
        let number = self.next_job;
        if events.is_empty() {
            self.flushes.push_back((number, reply));
            return;
        }
        self.next_job += 1;
        let count = events.len();
        let (ids, fates) = (vec![EntryId::ZERO; count], vec![Fate::NotSent; count]);
        self.open.insert(number, Open { reply, claimed, ids, fates, sent: 0, settled: 0, fault: None });
        let lane = self.lanes.entry(stream.clone()).or_default();
        lane.events += count;
        lane.waiting.push_back((number, events.into()));
        self.ready.push(stream);
    }

    /// Sends what may go out now.
    async fn send(&mut self) {
        let in_cluster = self.shared.link.cluster().is_some();
        if !in_cluster && self.shared.link.reconnected() {
            (self.stale, self.known) = (true, false);
        }
        loop {
            if self.calls.is_empty() {
                self.clear_up().await;
            }
            if !self.doubtful.is_empty() {
                break; // first everything has to come back
            }
            let Some(stream) = self.ready.pop() else { break };
            let Self { lanes, open, calls, next, shared, renewed, .. } = self;
            let Some(lane) = lanes.get_mut(&stream) else { continue };
            while lane.may_send(shared.on_their_way()) {
                if !in_cluster && !calls.is_empty() && (self.stale || !self.known) {
                    self.ready.push(stream);
                    return self.answer_flushes();
                }
                let Some(call) = lane.next_call(&stream, open, next) else { continue };
                lane.alone = self.known && lane.on_their_way == 0 && call.events.len() == 1 && renewed.is_fresh(&stream);
                lane.on_their_way += 1;
                let (shared, alone, in_full) = (shared.clone(), lane.alone, !self.known);
                let adding = async move {
                    let outcome = match (in_cluster, alone) {
                        (true, _) => shared.add_in_cluster(&call).await,
                        (false, true) => shared.add_alone(&call).await,
                        (false, false) => shared.add(&call, in_full).await,
                    };
                    (call, outcome)
                };
                calls.push(adding.boxed());
            }
            if lane.on_their_way == 0 && lane.events == 0 {
                lanes.remove(&stream);
            }
        }
        self.answer_flushes();
    }

    /// Begins the calls that were added, and takes what has come back. Returns whether anything has.
    ///
    /// Nobody is to be woken for it: a set of futures that has asked all of them wakes its task again at once, which would send the task to
    /// the end of its worker's queue, and wake another worker.
    fn take_ended(&mut self) -> bool {
        let mut any = false;
        while let Some(Some((call, outcome))) = self.calls.next().now_or_never() {
            self.ended(call, outcome);
            any = true;
        }
        any
    }

    /// A call has come back.
    fn ended(&mut self, call: Call, outcome: Outcome) {
        match outcome {
            Err(fault) if (fault.is_unknown() || fault.is("NOSCRIPT")) && self.shared.link.cluster().is_none() => {
                self.known &= !fault.is("NOSCRIPT");
                self.doubtful.push((call, fault));
            }
            outcome => {
                self.known |= outcome.is_ok();
                self.settle(call, outcome);
            }
        }
    }

    /// Finds out what became of doubtful calls, in the order they were sent in, while nothing else is on its way.
    async fn clear_up(&mut self) {
        if self.stale
            && let Ok(id) = self.shared.link.id().await
        {
            (self.id, self.stale) = (id, false);
        }
        self.doubtful.sort_by_key(|(call, _)| call.number);
        let mut doubtful = VecDeque::from(std::mem::take(&mut self.doubtful));
        while let Some((call, fault)) = doubtful.pop_front() {
            let outcome = if !fault.is("NOSCRIPT") {
                self.shared.add_missing(&call, Some(&mut self.id)).await
            } else if doubtful.iter().any(|(later, fault)| later.stream == call.stream && !fault.is("NOSCRIPT")) {
                Err(out_of_order()) // what was sent behind it may have been added
            } else {
                self.add_again(&call).await
            };
            self.settle(call, outcome);
        }
    }

    /// Adds what was refused because the server had forgotten the script.
    async fn add_again(&mut self, call: &Call) -> Outcome {
        if self.lanes.get(&call.stream).is_some_and(|lane| lane.added > call.number) {
            // What was sent behind it was added: another instance has made the script known in between.
            return Err(out_of_order());
        }
        match self.shared.add(call, true).await {
            Err(fault) if fault.is_unknown() => self.shared.add_missing(call, Some(&mut self.id)).await,
            outcome => outcome,
        }
    }

    /// Tells those whose events were in a call what came of it.
    fn settle(&mut self, call: Call, outcome: Outcome) {
        let Some(lane) = self.lanes.get_mut(&call.stream) else { return };
        let by_script = !std::mem::take(&mut lane.alone);
        lane.on_their_way -= 1;
        if outcome.is_ok() {
            if by_script {
                self.renewed.note(&call.stream, call.sent);
            }
            lane.added = lane.added.max(call.number);
        }
        let mut place = 0;
        for Part { job, offset, count } in call.parts {
            let Some(open) = self.open.get_mut(&job) else { continue };
            let these = offset..offset + count;
            match &outcome {
                Ok(ids) => {
                    open.ids[these.clone()].copy_from_slice(&ids[place..place + count]);
                    open.fates[these].fill(Fate::Published);
                }
                Err(fault) => {
                    open.fates[these].fill(if fault.is_unknown() { Fate::Unknown } else { Fate::NotSent });
                    open.fault.get_or_insert_with(|| fault.clone());
                    // What would come behind it is not sent.
                    open.settled += lane.forget(job);
                }
            }
            place += count;
            open.settled += count;
            if open.settled == open.ids.len() {
                self.open.remove(&job).into_iter().for_each(Open::answer);
            }
        }
        self.ready.push(call.stream);
    }

    /// Tells those who wait for what came before them that it has its answer.
    fn answer_flushes(&mut self) {
        let first = self.open.keys().next().copied().unwrap_or(u64::MAX);
        while self.flushes.front().is_some_and(|(before, _)| *before <= first) {
            let Some((_, reply)) = self.flushes.pop_front() else { return };
            let _ = reply.send(Ok(Vec::new())); // nobody may be waiting
        }
    }
}

/// Why what was refused is not added any more.
fn out_of_order() -> Fault {
    Fault::Refused("TRYAGAIN the server forgot a script, and the order would be lost".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::add::ON_THEIR_WAY;

    /// Jobs of so many events of these sizes, all for one stream.
    fn lane(jobs: &[&[usize]]) -> (Lane, BTreeMap<u64, Open>) {
        let (mut lane, mut open) = (Lane::default(), BTreeMap::new());
        for (number, sizes) in jobs.iter().enumerate() {
            let events: VecDeque<_> = sizes.iter().map(|size| Bytes::from(vec![0; *size])).collect();
            let (ids, fates) = (vec![EntryId::ZERO; events.len()], vec![Fate::NotSent; events.len()]);
            let (reply, claimed) = (oneshot::channel().0, Arc::default());
            open.insert(number as u64, Open { reply, claimed, ids, fates, sent: 0, settled: 0, fault: None });
            lane.events += events.len();
            lane.waiting.push_back((number as u64, events));
        }
        (lane, open)
    }

    /// Its number, how many events it has, and of which jobs: the job, from where, how many.
    type Shape = (u64, usize, Vec<(u64, usize, usize)>);

    fn calls(lane: &mut Lane, open: &mut BTreeMap<u64, Open>) -> Vec<Shape> {
        let (stream, mut next) = ("s".into(), 100);
        std::iter::from_fn(|| lane.next_call(&stream, open, &mut next))
            .map(|call| {
                let parts = call.parts.iter().map(|part| (part.job, part.offset, part.count)).collect();
                (call.number, call.events.len(), parts)
            })
            .collect()
    }

    #[test]
    fn what_waits_goes_together_in_order_and_bounded() {
        let (mut one, mut open) = lane(&[&[1, 1], &[1], &[1; EVENTS_TOGETHER]]);
        let rest = EVENTS_TOGETHER - 3;
        let expected = [
            (100, EVENTS_TOGETHER, vec![(0, 0, 2), (1, 0, 1), (2, 0, rest)]),
            (100 + EVENTS_TOGETHER as u64, 3, vec![(2, rest, 3)]),
        ];
        assert_eq!((calls(&mut one, &mut open), one.events), (expected.to_vec(), 0));
        let (mut large, mut open) = lane(&[&[BYTES_TOGETHER + 1, 1]]);
        assert_eq!(calls(&mut large, &mut open), [(100, 1, vec![(0, 0, 1)]), (101, 1, vec![(0, 1, 1)])], "one is always taken");
        // What does not fit any more is neither claimed nor forgotten.
        let (mut full, mut open) = lane(&[&[1; EVENTS_TOGETHER], &[1]]);
        let second = 100 + EVENTS_TOGETHER as u64;
        let expected = [(100, EVENTS_TOGETHER, vec![(0, 0, EVENTS_TOGETHER)]), (second, 1, vec![(1, 0, 1)])];
        assert_eq!(calls(&mut full, &mut open), expected);
        let (mut heavy, mut open) = lane(&[&[BYTES_TOGETHER - 1], &[BYTES_TOGETHER - 1]]);
        assert_eq!(calls(&mut heavy, &mut open), [(100, 1, vec![(0, 0, 1)]), (101, 1, vec![(1, 0, 1)])]);
    }

    #[test]
    fn what_was_given_up_is_not_sent() {
        let (mut lane, mut open) = lane(&[&[1], &[1, 1], &[1]]);
        open[&1].claimed.store(true, Ordering::Release);
        assert_eq!(calls(&mut lane, &mut open), [(100, 2, vec![(0, 0, 1), (2, 0, 1)])]);
        assert_eq!((open.contains_key(&1), lane.events), (false, 0));
    }

    #[test]
    fn a_few_more_wait_for_what_is_on_its_way() {
        let (mut lane, _) = lane(&[&[1; WORTH_SENDING - 1]]);
        assert!(lane.may_send(ON_THEIR_WAY));
        lane.on_their_way = 1;
        assert!(!lane.may_send(ON_THEIR_WAY));
        lane.events = WORTH_SENDING;
        assert!(lane.may_send(ON_THEIR_WAY));
        lane.on_their_way = ON_THEIR_WAY;
        assert!(!lane.may_send(ON_THEIR_WAY));
    }
}
