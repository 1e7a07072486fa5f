//! Publishing: a lane for each topic and ordering key, which sends what has gathered while its last request was under way.
//!
//! Of a key one request is under way at a time, so that a retry overtakes nothing and nothing overtakes it. What has no key may
//! overtake: several requests are under way at once. A lane has a task while it has something to send.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use gcloud_sdk::google::pubsub::v1::PubsubMessage;
use gcloud_sdk::prost::Message;
use gcloud_sdk::tonic::Code;
use parking_lot::Mutex;
use pubsub_core::machinery::Pause;
use pubsub_core::{Error, ErrorKind, Fate};
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout_at};

use crate::GcpBuilder;
use crate::errors::Fault;
use crate::link::Link;
use crate::provision::Provision;

/// How many requests without a key are under way at a time, of each topic.
const UNORDERED_TOGETHER: usize = 8;

/// What bytes on their way are counted in, so that a semaphore can.
const UNIT: usize = 1024;

/// A publish that failed, and what became of each event.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) fault: Reason,
    pub(crate) fates: Vec<Fate>,
}

#[derive(Debug)]
pub(crate) enum Reason {
    Fault(Fault),
    /// Too much was on its way for too long.
    Full,
    /// It was not confirmed in time.
    Late,
}

impl Failed {
    /// Whether the same call can succeed later.
    pub(crate) fn is_temporary(&self) -> bool {
        match &self.fault {
            Reason::Fault(fault) => fault.is_temporary(),
            Reason::Full | Reason::Late => true,
        }
    }
}

impl From<Reason> for Error {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Fault(fault) => fault.into(),
            Reason::Full => Self::new(ErrorKind::Full),
            Reason::Late => Self::new(ErrorKind::Timeout),
        }
    }
}

/// Where publishers hand in their events.
#[derive(Clone)]
pub(crate) struct Publisher(Arc<Shared>);

struct Shared {
    link: Arc<Link>,
    provision: Arc<Provision>,
    runtime: Handle,
    limits: Limits,
    events: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    lanes: Mutex<HashMap<Key, Lane>>,
    open: Mutex<Open>,
    ended: Notify,
    closing: watch::Sender<bool>,
}

struct Limits {
    batch_events: usize,
    batch_bytes: usize,
    batch_delay: Duration,
    patience: Duration,
    max_events: usize,
    max_bytes: usize,
}

/// Calls that were taken and have not ended.
#[derive(Default)]
struct Open {
    next: u64,
    calls: BTreeSet<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    topic: Arc<str>,
    key: Box<str>,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Item>,
    bytes: usize,
    tasks: usize,
    /// Rung when a batch is full.
    full: Arc<Notify>,
}

struct Item {
    message: PubsubMessage,
    size: usize,
    call: Arc<Call>,
    place: usize,
}

/// One publish call.
struct Call {
    state: Mutex<CallState>,
    done: Notify,
    number: u64,
    shared: Arc<Shared>,
    /// What it may have on its way.
    _room: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

struct CallState {
    events: Vec<Stage>,
    left: usize,
    /// What the service calls them, if anybody wants to know.
    ids: Option<Vec<String>>,
    fault: Option<Fault>,
    /// The caller has stopped waiting: what was not sent is not sent any more.
    abandoned: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Sent,
    Ended(Fate),
}

impl Drop for Call {
    fn drop(&mut self) {
        self.shared.open.lock().calls.remove(&self.number);
        self.shared.ended.notify_waiters();
    }
}

impl Call {
    /// Takes an event out of the queue to be sent; false if nobody wants it sent any more.
    fn send(&self, place: usize) -> bool {
        let mut state = self.state.lock();
        if state.abandoned {
            return false;
        }
        state.events[place] = Stage::Sent;
        true
    }

    fn is_abandoned(&self) -> bool {
        self.state.lock().abandoned
    }

    fn published(&self, place: usize, id: String) {
        self.end(place, Fate::Published, |state| {
            if let Some(ids) = &mut state.ids {
                ids.push(id);
            }
        });
    }

    fn failed(&self, place: usize, fate: Fate, fault: &Fault) {
        self.end(place, fate, |state| {
            state.fault.get_or_insert_with(|| fault.clone());
        });
    }

    fn end(&self, place: usize, fate: Fate, note: impl FnOnce(&mut CallState)) {
        let mut state = self.state.lock();
        state.events[place] = Stage::Ended(fate);
        state.left -= 1;
        note(&mut state);
        let ended = state.left == 0;
        drop(state);
        if ended {
            self.done.notify_one();
        }
    }

    /// Stops waiting, and says what became of each event until now.
    fn abandon(&self) -> Vec<Fate> {
        let mut state = self.state.lock();
        state.abandoned = true;
        let fate = |stage: &Stage| match stage {
            Stage::Waiting => Fate::NotSent,
            Stage::Sent => Fate::Unknown,
            Stage::Ended(fate) => *fate,
        };
        state.events.iter().map(fate).collect()
    }
}

impl Publisher {
    pub(crate) fn new(link: Arc<Link>, provision: Arc<Provision>, runtime: Handle, options: &GcpBuilder) -> Self {
        let limits = Limits {
            batch_events: options.batch_events,
            batch_bytes: options.batch_bytes,
            batch_delay: options.batch_delay,
            patience: options.publish_timeout,
            max_events: options.max_outstanding_events,
            max_bytes: options.max_outstanding_bytes.div_ceil(UNIT),
        };
        Self(Arc::new(Shared {
            link,
            provision,
            runtime,
            events: Arc::new(Semaphore::new(limits.max_events)),
            bytes: Arc::new(Semaphore::new(limits.max_bytes)),
            limits,
            lanes: Mutex::default(),
            open: Mutex::default(),
            ended: Notify::new(),
            closing: watch::Sender::new(false),
        }))
    }

    /// Publishes messages to a topic; waits to be taken for so long at most. Once it waits for the answer they are sent whether or not
    /// anybody waits.
    /// Returns what the service calls the messages, in no order, if that is wanted.
    pub(crate) async fn publish(
        &self,
        topic: &Arc<str>,
        messages: Vec<PubsubMessage>,
        wait: Duration,
        wants_ids: bool,
    ) -> Result<Vec<String>, Failed> {
        let count = messages.len();
        let sizes: Vec<_> = messages.iter().map(Message::encoded_len).collect();
        let until = Instant::now() + self.0.limits.patience;
        let Some(room) = self.room(count, sizes.iter().sum(), until.min(Instant::now() + wait)).await else {
            return Err(Failed { fault: Reason::Full, fates: vec![Fate::NotSent; count] });
        };
        let number = {
            let mut open = self.0.open.lock();
            open.next += 1;
            let number = open.next;
            open.calls.insert(number);
            number
        };
        let state = CallState {
            events: vec![Stage::Waiting; count],
            left: count,
            ids: wants_ids.then(Vec::new),
            fault: None,
            abandoned: false,
        };
        let (state, done, shared) = (Mutex::new(state), Notify::new(), self.0.clone());
        let call = Arc::new(Call { state, done, number, shared, _room: room });
        self.enqueue(topic, messages, &sizes, &call);
        let late = tokio::select! {
            ended = timeout_at(until, call.done.notified()) => ended.is_err(),
            () = self.0.closed() => false,
        };
        let fates = call.abandon();
        let (ids, fault) = {
            let mut state = call.state.lock();
            (state.ids.take().unwrap_or_default(), state.fault.take())
        };
        if fates.iter().all(|fate| *fate == Fate::Published) {
            return Ok(ids);
        }
        let fault = match fault {
            Some(fault) => Reason::Fault(fault),
            None if late => Reason::Late,
            None => Reason::Fault(Fault::new(Code::Cancelled, "the bus was closed")),
        };
        Err(Failed { fault, fates })
    }

    async fn room(&self, events: usize, bytes: usize, until: Instant) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let Shared { limits, events: all_events, bytes: all_bytes, .. } = &*self.0;
        // A call that is larger than the bound waits until it is alone.
        let permits = |count: usize, most: usize| u32::try_from(count.clamp(1, most)).unwrap_or(u32::MAX);
        let events = all_events.clone().acquire_many_owned(permits(events, limits.max_events));
        let bytes = all_bytes.clone().acquire_many_owned(permits(bytes.div_ceil(UNIT), limits.max_bytes));
        let both = async { Some((events.await.ok()?, bytes.await.ok()?)) };
        timeout_at(until, both).await.ok().flatten()
    }

    fn enqueue(&self, topic: &Arc<str>, messages: Vec<PubsubMessage>, sizes: &[usize], call: &Arc<Call>) {
        let mut start = Vec::new();
        {
            let mut lanes = self.0.lanes.lock();
            let mut messages = messages.into_iter().zip(sizes).enumerate().peekable();
            while let Some((_, (first, _))) = messages.peek() {
                // Those of one call have mostly one key: its lane is looked up once for all that stand together.
                let key = Key { topic: topic.clone(), key: first.ordering_key.as_str().into() };
                let most = if key.key.is_empty() { UNORDERED_TOGETHER } else { 1 };
                let lane = lanes.entry(key.clone()).or_default();
                while let Some((place, (message, size))) =
                    messages.next_if(|(_, (message, _))| *message.ordering_key == *key.key)
                {
                    lane.waiting.push_back(Item { message, size: *size, call: call.clone(), place });
                    lane.bytes += size;
                }
                let wanted = lane.waiting.len().div_ceil(self.0.limits.batch_events).min(most);
                while lane.tasks < wanted {
                    lane.tasks += 1;
                    start.push(key.clone());
                }
                if self.0.limits.is_full(lane) {
                    lane.full.notify_one();
                }
            }
        }
        for key in start {
            self.0.runtime.spawn(self.0.clone().drive(key));
        }
    }

    /// Gives up what has not been sent, and what is on its way.
    pub(crate) fn close(&self) {
        self.0.closing.send_replace(true);
    }

    /// Waits until what was handed in before has ended.
    pub(crate) async fn flush(&self) {
        let before = self.0.open.lock().next;
        loop {
            let ended = self.0.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            if self.0.open.lock().calls.first().is_none_or(|first| *first > before) {
                return;
            }
            ended.await;
        }
    }
}

impl Limits {
    fn is_full(&self, lane: &Lane) -> bool {
        lane.waiting.len() >= self.batch_events || lane.bytes >= self.batch_bytes
    }
}

impl Shared {
    /// Sends what a lane has until it has nothing more, or the instance is closed.
    async fn drive(self: Arc<Self>, key: Key) {
        let sending = async {
            loop {
                self.gather(&key).await;
                let Some(batch) = self.next_batch(&key) else { return };
                self.send(&key, batch).await;
            }
        };
        tokio::select! {
            () = sending => {}
            () = self.closed() => drop(self.lanes.lock().remove(&key)),
        }
    }

    async fn closed(&self) {
        // The sender is this very publisher's.
        let _ = self.closing.subscribe().wait_for(|closing| *closing).await;
    }

    /// Lets more come for as long as was chosen.
    async fn gather(&self, key: &Key) {
        if self.limits.batch_delay.is_zero() {
            return;
        }
        let until = Instant::now() + self.limits.batch_delay;
        loop {
            let full = match self.lanes.lock().get(key) {
                Some(lane) if !lane.waiting.is_empty() && !self.limits.is_full(lane) => lane.full.clone(),
                _ => return,
            };
            if timeout_at(until, full.notified()).await.is_err() {
                return;
            }
        }
    }

    /// The next request of a lane; none if it has nothing, and then this was its task's last question.
    fn next_batch(&self, key: &Key) -> Option<Vec<Item>> {
        let mut lanes = self.lanes.lock();
        let lane = lanes.get_mut(key)?;
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < self.limits.batch_events
            && let Some(item) =
                lane.waiting.pop_front_if(|item| batch.is_empty() || bytes + item.size <= self.limits.batch_bytes)
        {
            lane.bytes -= item.size;
            if item.call.send(item.place) {
                bytes += item.size;
                batch.push(item);
            }
        }
        if !batch.is_empty() {
            return Some(batch);
        }
        lane.tasks -= 1;
        if lane.tasks == 0 {
            lanes.remove(key);
        }
        None
    }

    async fn send(&self, key: &Key, mut batch: Vec<Item>) {
        let (mut pause, mut unknown) = (Pause::new(), false);
        let until = Instant::now() + self.limits.patience;
        let fault = loop {
            let asked = Instant::now();
            let messages = batch.iter().map(|item| item.message.clone()).collect();
            let fault = match self.link.publish(key.topic.to_string(), messages).await {
                Ok(ids) => {
                    self.provision.seen(&key.topic);
                    batch.iter().zip(ids).for_each(|(item, id)| item.call.published(item.place, id));
                    return;
                }
                Err(fault) => fault,
            };
            let (fault, made) = match fault.is_not_found() {
                true => match self.provision.topic(&key.topic, asked).await {
                    Ok(()) => (fault, true),
                    Err(fault) => (fault, false),
                },
                false => (fault, false),
            };
            unknown |= fault.is_unknown();
            let again = Instant::now() + pause.step();
            if !(made || fault.is_temporary()) || again >= until {
                break fault;
            }
            tokio::time::sleep_until(again).await;
            // Who does not wait any more has been told that its fate is unknown; it need not go out again.
            batch.retain(|item| !item.call.is_abandoned());
            if batch.is_empty() {
                return;
            }
        };
        let fate = if unknown { Fate::Unknown } else { Fate::NotSent };
        batch.iter().for_each(|item| item.call.failed(item.place, fate, &fault));
    }
}
