//! One fan-out subscription: it listens at a hub, and all its settlement is local.
//!
//! Where several listen, one that is slow must not stop the others: what it cannot take waits for it here. Only where nobody can take
//! anything more is the service made to wait.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::machinery::{Aftermath, DeliveryQueue, Entry};
use pubsub_core::{
    AckMode, Control, Delivery, Error, Event, Result, Source, SubscribeOptions, SubscriptionHandle, SubscriptionStatus,
};

use crate::channel::Channel;
use crate::hub::Hub;
use crate::node::{INSTANCE, Node};

/// How much waits for a listener that is slower than others of its topic. Beyond, it loses the oldest, and is told.
const BEHIND: usize = 10_000;

pub(crate) struct Listener {
    pub(crate) queue: Arc<DeliveryQueue>,
    pub(crate) options: SubscribeOptions,
    inner: SubscriptionHandle,
    /// What was published before, in milliseconds since 1970, is not for it.
    from: i64,
    behind: Mutex<Behind>,
    /// Whether anything is in `behind`, or was lost.
    is_behind: AtomicBool,
    /// Whether its hub found it full.
    was_full: AtomicBool,
    lagged: AtomicU64,
    malformed: AtomicU64,
    ended: AtomicBool,
    failed: Mutex<Option<Error>>,
}

#[derive(Default)]
struct Behind {
    waiting: VecDeque<(Arc<Event>, u32)>,
    /// Lost right before what waits.
    lost: u64,
    /// Lost right before events that are in the queue.
    told: VecDeque<(Arc<Event>, u64)>,
}

impl Listener {
    pub(crate) fn new(queue: Arc<DeliveryQueue>, options: SubscribeOptions, inner: SubscriptionHandle, from: i64) -> Arc<Self> {
        Arc::new(Self {
            queue,
            options,
            inner,
            from,
            behind: Mutex::default(),
            is_behind: AtomicBool::new(false),
            was_full: AtomicBool::new(false),
            lagged: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            failed: Mutex::default(),
        })
    }

    /// Whether it can take more.
    pub(crate) fn is_hungry(&self) -> bool {
        let look = || self.queue.room() > 0 && self.behind.lock().waiting.is_empty();
        if look() {
            return true;
        }
        // Said first and looked again: whoever frees room sees the one or is seen by the other.
        self.was_full.store(true, Ordering::SeqCst);
        look()
    }

    /// Takes what came, under the lock of its topic.
    pub(crate) fn push(&self, events: &[(Arc<Event>, u32, Option<i64>)], aftermath: &mut Aftermath) {
        let events = events.iter().filter(|(_, _, at)| at.is_none_or(|at| at >= self.from));
        let mut events = events.map(|(event, attempt, _)| (event.clone(), *attempt));
        let mut behind = self.behind.lock();
        if behind.waiting.is_empty() {
            let entry = |(event, attempt)| Entry::new(event).attempt(attempt);
            self.queue.push(events.by_ref().take(self.queue.room()).map(entry), aftermath);
        }
        for event in events {
            behind.waiting.push_back(event);
            if behind.waiting.len() > BEHIND
                && let Some((event, _)) = behind.waiting.pop_front()
            {
                behind.lost += 1;
                self.lagged.fetch_add(1, Ordering::Relaxed);
                aftermath.drop_later(event);
            }
        }
        if !behind.waiting.is_empty() {
            self.is_behind.store(true, Ordering::SeqCst);
        }
    }

    /// Moves what waits into the queue, as far as there is room.
    fn refill(&self, channel: &Channel) {
        channel.exclusively(|aftermath| {
            let mut behind = self.behind.lock();
            let count = self.queue.room().min(behind.waiting.len());
            if count > 0 && behind.lost > 0 {
                let lost = std::mem::take(&mut behind.lost);
                let first = behind.waiting[0].0.clone();
                behind.told.push_back((first, lost));
            }
            self.queue
                .push(behind.waiting.drain(..count).map(|(event, attempt)| Entry::new(event).attempt(attempt)), aftermath);
            let left = !behind.waiting.is_empty() || !behind.told.is_empty();
            self.is_behind.store(left, Ordering::SeqCst);
        });
    }

    /// How many were lost right before an event.
    fn lost_before(&self, event: &Arc<Event>) -> u64 {
        let mut behind = self.behind.lock();
        match behind.told.pop_front_if(|(told, _)| Arc::ptr_eq(told, event)) {
            Some((_, lost)) => lost,
            None => 0,
        }
    }

    pub(crate) fn count_malformed(&self) {
        self.malformed.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends its stream with an error.
    pub(crate) fn fail(&self, error: Error) {
        self.failed.lock().get_or_insert(error);
        self.inner.stop();
    }

    fn waiting(&self) -> u64 {
        self.behind.lock().waiting.len() as u64
    }
}

/// A listener and what it lives on: ends the listening when it is dropped.
pub(crate) struct Attachment {
    listener: Arc<Listener>,
    channel: Arc<Channel>,
    pub(crate) hub: Arc<Hub>,
    node: Arc<Node>,
}

impl Attachment {
    pub(crate) fn new(listener: Arc<Listener>, channel: Arc<Channel>, hub: Arc<Hub>, node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self { listener, channel, hub, node })
    }

    /// Waits until nothing is left that only this instance could hand over, and nothing in its consumer's hands.
    pub(crate) async fn relieved(&self) {
        self.drained().await;
    }

    /// Ends it and takes back what is held. Returns how much was still queued, and how much was held.
    pub(crate) fn cut_off(&self) -> (u64, u64) {
        let queue = &self.listener.queue;
        let released = queue.burden(INSTANCE).1 + self.listener.waiting();
        self.end();
        (released, queue.revoke(INSTANCE))
    }

    fn end(&self) {
        if !self.listener.ended.swap(true, Ordering::AcqRel) {
            self.listener.inner.stop();
            if self.channel.leave(&self.listener, &self.hub) {
                self.hub.end();
            } else {
                self.hub.ring(); // the others may want more than it did
            }
            self.node.tidy(&self.channel);
        }
    }
}

#[async_trait]
impl Control for Attachment {
    fn stop(&self) {
        self.end();
    }

    async fn stopped(&self) {
        // Ending is immediate: once `end` has returned, nothing can arrive. The last one takes what was on the service with it.
        if self.hub.has_ended() {
            self.hub.gone().await;
        }
    }

    async fn drained(&self) {
        // What waits behind the queue moves on as the queue is read.
        loop {
            self.hub.caught_up().await;
            self.listener.queue.drained().await;
            if self.listener.waiting() == 0 || self.listener.ended.load(Ordering::Acquire) {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    fn status(&self) -> SubscriptionStatus {
        let mut status = self.listener.inner.status();
        status.queued += self.listener.waiting();
        status.lagged += self.listener.lagged.load(Ordering::Relaxed);
        status.dropped += self.listener.malformed.load(Ordering::Relaxed);
        status
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("channel", &self.channel).finish_non_exhaustive()
    }
}

/// A listener's stream.
pub(crate) struct ListenerSource {
    pub(crate) inner: Box<dyn Source>,
    pub(crate) attachment: Arc<Attachment>,
}

impl ListenerSource {
    /// After something was taken there is room, perhaps.
    fn make_room(&self) {
        let Attachment { listener, channel, hub, .. } = &*self.attachment;
        if listener.is_behind.load(Ordering::SeqCst) {
            listener.refill(channel);
        }
        if listener.was_full.load(Ordering::SeqCst) && listener.queue.room() > 0 {
            listener.was_full.store(false, Ordering::SeqCst);
            hub.ring();
        }
    }
}

impl Source for ListenerSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let polled = self.inner.poll_next(cx, mode);
        self.make_room();
        let listener = &self.attachment.listener;
        let Some(delivery) = ready!(polled).transpose()? else {
            return Poll::Ready(listener.failed.lock().take().map(Err));
        };
        if !listener.is_behind.load(Ordering::Acquire) {
            return Poll::Ready(Some(Ok(delivery)));
        }
        let lagged = delivery.lagged() + listener.lost_before(delivery.event());
        Poll::Ready(Some(Ok(delivery.after_losing(lagged))))
    }
}

impl Drop for ListenerSource {
    fn drop(&mut self) {
        self.attachment.end();
    }
}
