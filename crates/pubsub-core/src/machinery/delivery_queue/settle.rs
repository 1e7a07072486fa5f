//! What consumers do with deliveries, and what time does to them.

use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use tokio::time::Instant;

use super::state::{Chores, Held, Letter};
use super::{DeliveryQueue, Entry};
use crate::contain::contain;
use crate::machinery::Due;
use crate::retry::MAX_DURATION;
use crate::{Receipt, Settled, Settlement, dead_letter};

/// The queue's side of [`Settler`].
impl DeliveryQueue {
    pub(super) fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        let mut chores = Chores { drained: true, ..Chores::default() };
        let settled = self.record(token, settlement, &mut chores);
        self.timer.go_on();
        self.finish(chores).unwrap_or_else(|| Receipt::ready(settled))
    }

    pub(super) fn extend(&self, token: u64) -> Receipt {
        let extended = self.state.lock().extend(token, Instant::now());
        Receipt::ready(if extended { Settled::Done } else { Settled::TooLate })
    }

    pub(super) fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()> {
        // Its own statement: what is replaced must outlive the lock.
        let watching = self.state.lock().watch(token, cx);
        if watching.is_some() { Poll::Pending } else { Poll::Ready(()) }
    }

    fn record(&self, token: u64, settlement: Settlement, chores: &mut Chores) -> Settled {
        let held; // what is left of it goes without the lock
        let mut state = self.state.lock();
        let options = if matches!(settlement, Settlement::Done) { None } else { state.holder_options(token) };
        held = state.let_go(token, chores);
        let Some(Held { entry, .. }) = held else { return Settled::TooLate };
        let Some(options) = options else { return Settled::Done };
        let attempts = entry.attempt;
        match settlement {
            Settlement::Done => {} // returned above
            Settlement::DeadLetter { reason } => state.give_up(entry, attempts, reason, &options, chores),
            // Nobody is left for it to come back to.
            _ if state.ended => return Settled::TooLate,
            Settlement::Release => state.give_back(entry, chores),
            Settlement::Retry { reason, .. } if options.retry.is_exhausted_after(attempts) => {
                let reason = reason.unwrap_or_else(|| "retried too often".into());
                state.give_up(entry, attempts, reason, &options, chores);
            }
            Settlement::Retry { after, .. } => {
                let backoff = after.unwrap_or_else(|| options.retry.backoff_after(attempts, fastrand::f64()));
                let entry = Entry { attempt: attempts + 1, ..entry };
                if backoff.is_zero() {
                    state.give_back(entry, chores);
                } else {
                    state.retry_at(Instant::now() + backoff.min(MAX_DURATION), entry, chores);
                }
            }
        }
        state.wake(chores);
        Settled::Done
    }

    /// Hands a letter to the sink. Returns a receipt that resolves when it has been taken.
    pub(super) fn bury(&self, letter: Letter) -> Receipt {
        let Letter { event, attempts, reason, topic } = letter;
        let group = self.group.as_ref();
        let Some(target) = topic else {
            tracing::warn!(
                topic = %self.topic, group = group.map(tracing::field::display), event = %event.id(), attempts, %reason,
                "a delivery was given up: no attempt left and no dead-letter topic"
            );
            return Receipt::ready(Settled::Done);
        };
        let letter = dead_letter(&event, &self.topic, group, attempts, &reason);
        let Some(taking) = contain(|| self.sink.take(&target, letter)).unwrap_or_else(|panic| {
            tracing::error!(topic = %target, event = %event.id(), %panic, "a dead-letter sink panicked");
            None
        }) else {
            self.buried();
            return Receipt::ready(Settled::Done);
        };
        let (answer, receipt) = Receipt::pending();
        let burial = Burial(self.me.clone());
        self.timer.runtime().spawn(async move {
            taking.await;
            drop(burial);
            let _ = answer.send(Settled::Done); // nobody may be waiting
        });
        receipt
    }

    fn buried(&self) {
        self.state.lock().dying -= 1;
        self.ring_drained();
    }
}

/// A letter on its way. However that ends, a panicking sink included, the queue no longer waits for it.
struct Burial(Weak<DeliveryQueue>);

impl Drop for Burial {
    fn drop(&mut self) {
        if let Some(queue) = self.0.upgrade() {
            queue.buried();
        }
    }
}

impl Due for DeliveryQueue {
    fn due(self: Arc<Self>, now: Instant) -> Option<Instant> {
        let mut chores = Chores::default();
        self.state.lock().due(now, &mut chores);
        let next = chores.arm.take();
        self.finish(chores);
        next
    }
}
