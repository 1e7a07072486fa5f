//! A member's side of a queue: its stream and its handles.

use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use async_trait::async_trait;
use tokio::task::coop;

use super::{DeliveryQueue, Entry, discard};
use crate::{AckMode, Control, Delivery, Receipt, Result, Settlement, Settler, Source, SubscriptionStatus};

/// A member's place in a queue, shared by its source and its handles.
pub(super) struct Membership {
    pub(super) queue: Arc<DeliveryQueue>,
    pub(super) member: u64,
    pub(super) ended: AtomicBool,
    pub(super) on_end: Box<dyn Fn() + Send + Sync>,
}

impl Membership {
    fn end(&self) {
        // Also by whoever comes second: it must not go on before the first has left.
        self.queue.leave(self.member);
        if !self.ended.swap(true, Ordering::AcqRel) {
            (self.on_end)();
        }
    }
}

#[async_trait]
impl Control for Membership {
    fn stop(&self) {
        self.end();
    }

    async fn stopped(&self) {
        // Leaving is immediate: once `end` has returned, nothing can arrive.
    }

    async fn drained(&self) {
        self.queue.drained().await;
    }

    fn status(&self) -> SubscriptionStatus {
        self.queue.member_status(self.member)
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Membership").field("queue", &self.queue).field("ended", &self.ended).finish_non_exhaustive()
    }
}

/// A member's stream.
pub(super) struct QueueSource {
    membership: Arc<Membership>,
    queue: Arc<DeliveryQueue>,
    hand: Arc<Hand>,
    /// Taken and not handed over; only a fan-out member has any.
    stash: VecDeque<Entry>,
    /// The most to take in one go.
    take: usize,
    member: u64,
    /// Made by the first delivery that is held.
    holder: Option<Arc<Holder>>,
}

/// How what a member holds refers to the queue: members count their references in memory of their own, not all in the queue's.
pub(super) struct Holder(Arc<DeliveryQueue>);

impl Holder {
    pub(super) fn new(queue: &Arc<DeliveryQueue>) -> Arc<Self> {
        Arc::new(Self(queue.clone()))
    }
}

impl Settler for Holder {
    #[inline]
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        self.0.settle(token, settlement)
    }

    fn extend(&self, token: u64) -> Receipt {
        self.0.extend(token)
    }

    fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()> {
        self.0.poll_revoked(token, cx)
    }
}

/// What a consumer that takes ahead looks at and writes with every delivery, in memory of its own: publishers write to the queue
/// meanwhile, and neither is to wait for the other's cache line.
#[derive(Default)]
pub(super) struct Hand {
    /// Entries in the hands of the only member's source, not handed over yet (fan-out).
    pub(super) stashed: AtomicUsize,
    /// The state's `ended`, to be read without its lock.
    pub(super) has_ended: AtomicBool,
}

impl QueueSource {
    pub(super) fn new(membership: Arc<Membership>, take: usize) -> Self {
        let (queue, member) = (membership.queue.clone(), membership.member);
        Self { hand: queue.hand.clone(), queue, membership, stash: VecDeque::new(), take, member, holder: None }
    }

    /// The next delivery without a lock, where nothing needs one: it is settled by being handed over, at its first attempt.
    #[inline]
    fn next_stashed(&mut self) -> Option<Delivery> {
        if self.hand.has_ended.load(Ordering::Acquire) {
            return None;
        }
        let entry = self.stash.pop_front_if(|entry| entry.attempt == 1)?;
        self.hand.stashed.store(self.stash.len(), Ordering::Release);
        if self.stash.is_empty() {
            // Ordered against a waiter that counts itself in and then looks.
            std::sync::atomic::fence(Ordering::SeqCst);
            self.queue.ring_drained();
        }
        Some(entry.settled())
    }
}

impl Source for QueueSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        // Yields now and then, however much there is to take.
        std::task::ready!(coop::poll_proceed(cx)).made_progress();
        if mode == AckMode::Auto
            && let Some(delivery) = self.next_stashed()
        {
            return Poll::Ready(Some(Ok(delivery)));
        }
        self.queue.poll_take(self.member, &mut self.stash, self.take, &mut self.holder, cx, mode)
    }
}

impl Drop for QueueSource {
    fn drop(&mut self) {
        self.membership.end();
        discard(mem::take(&mut self.stash));
    }
}
