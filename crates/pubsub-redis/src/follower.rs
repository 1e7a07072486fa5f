//! One fan-out subscription: its queue, its stream, and what ends it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::task::{Context, Poll};

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::machinery::DeliveryQueue;
use pubsub_core::{
    AckMode, Control, Delivery, Error, Result, Source, SubscribeOptions, SubscriptionHandle, SubscriptionStatus, Topic,
};

use crate::channel::Channel;
use crate::entry::EntryId;
use crate::node::{INSTANCE, Node};

/// One fan-out subscription. All its settlement is local.
pub(crate) struct Follower {
    pub(crate) queue: Arc<DeliveryQueue>,
    options: SubscribeOptions,
    inner: SubscriptionHandle,
    /// How much its topic's window has for it beyond what its queue has taken.
    waiting: AtomicU64,
    /// Where its topic lists it, as far as it is known.
    place: AtomicUsize,
    /// How many were lost before an entry, until it is handed over.
    lost: Mutex<BTreeMap<EntryId, u64>>,
    /// Whether `lost` holds anything.
    lossy: AtomicBool,
    lagged: AtomicU64,
    malformed: AtomicU64,
    ended: AtomicBool,
    failed: Mutex<Option<Error>>,
}

impl Follower {
    pub(crate) fn new(queue: Arc<DeliveryQueue>, options: SubscribeOptions, inner: SubscriptionHandle) -> Arc<Self> {
        Arc::new(Self {
            queue,
            options,
            inner,
            waiting: AtomicU64::new(0),
            place: AtomicUsize::new(0),
            lost: Mutex::default(),
            lossy: AtomicBool::new(false),
            lagged: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            failed: Mutex::default(),
        })
    }

    /// So many were lost right before an entry.
    pub(crate) fn lose(&self, count: u64, before: EntryId) {
        *self.lost.lock().entry(before).or_default() += count;
        self.lossy.store(true, Ordering::Release);
        self.lagged.fetch_add(count, Ordering::Relaxed);
    }

    /// It passes over what is no event. Returns where its dead letters go.
    pub(crate) fn passes_over(&self) -> Option<&Topic> {
        self.malformed.fetch_add(1, Ordering::Relaxed);
        self.options.dead_letter.as_ref()
    }

    pub(crate) fn set_waiting(&self, count: u64) {
        self.waiting.store(count, Ordering::Release);
    }

    pub(crate) fn place(&self) -> usize {
        self.place.load(Ordering::Relaxed)
    }

    pub(crate) fn set_place(&self, place: usize) {
        self.place.store(place, Ordering::Relaxed);
    }

    /// Whether its queue is empty while something waits in the window.
    fn is_hungry(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0 && self.queue.room() >= self.options.prefetch.div_ceil(2)
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends its stream with an error.
    pub(crate) fn fail(&self, error: Error) {
        self.failed.lock().get_or_insert(error);
        self.inner.stop();
    }
}

/// A follower and what it lives on: ends the following when it is dropped.
pub(crate) struct Attachment {
    follower: Arc<Follower>,
    channel: Arc<Channel>,
    node: Arc<Node>,
}

impl Attachment {
    pub(crate) fn new(follower: Arc<Follower>, channel: Arc<Channel>, node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self { follower, channel, node })
    }

    /// Waits until nothing is left that only this instance could hand over, and nothing in its consumer's hands.
    pub(crate) async fn relieved(&self) {
        self.drained().await;
    }

    /// Ends it and takes back what is held. Returns how much was still queued, and how much was held.
    pub(crate) fn cut_off(&self) -> (u64, u64) {
        let queue = &self.follower.queue;
        let released = queue.burden(INSTANCE).1;
        self.end();
        (released, queue.revoke(INSTANCE))
    }

    fn end(&self) {
        if !self.follower.ended.swap(true, Ordering::AcqRel) {
            self.follower.inner.stop();
            self.channel.unfollow(&self.follower);
            self.node.readers().leave();
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
        // Ending is immediate: once `end` has returned, nothing can arrive. The connection goes with the last one.
        self.node.readers().left().await;
    }

    async fn drained(&self) {
        if !self.follower.is_ended() {
            self.channel.reached(&self.follower, self.node.link()).await;
        }
        self.follower.queue.drained().await;
    }

    fn status(&self) -> SubscriptionStatus {
        let mut status = self.follower.inner.status();
        status.lagged += self.follower.lagged.load(Ordering::Relaxed);
        status.dropped += self.follower.malformed.load(Ordering::Relaxed);
        status
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("channel", &self.channel).finish_non_exhaustive()
    }
}

/// A follower's stream.
pub(crate) struct FollowerSource {
    pub(crate) inner: Box<dyn Source>,
    pub(crate) attachment: Arc<Attachment>,
}

impl Source for FollowerSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let Attachment { follower, channel, node } = &*self.attachment;
        let delivery = loop {
            if follower.is_hungry() {
                channel.give(follower, node);
            }
            match self.inner.poll_next(cx, mode) {
                Poll::Ready(Some(delivery)) => break delivery?,
                Poll::Ready(None) => return Poll::Ready(follower.failed.lock().take().map(Err)),
                Poll::Pending => {
                    // Ordered against whoever finds its queue full and leaves something in the window.
                    fence(Ordering::SeqCst);
                    if follower.waiting.load(Ordering::Acquire) == 0 || !channel.give(follower, node) {
                        return Poll::Pending;
                    }
                }
            }
        };
        if !follower.lossy.load(Ordering::Acquire) || delivery.attempt() > 1 {
            return Poll::Ready(Some(Ok(delivery)));
        }
        let mut lost = follower.lost.lock();
        let at = delivery.cursor().map(|cursor| EntryId::from(cursor.position()));
        let lagged = delivery.lagged() + at.and_then(|at| lost.remove(&at)).unwrap_or(0);
        follower.lossy.store(!lost.is_empty(), Ordering::Release);
        Poll::Ready(Some(Ok(delivery.after_losing(lagged))))
    }
}

impl Drop for FollowerSource {
    fn drop(&mut self) {
        self.attachment.end();
    }
}
