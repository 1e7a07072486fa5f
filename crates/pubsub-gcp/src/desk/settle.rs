//! What consumers decide, and what becomes of it on the service.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use pubsub_core::machinery::SettleQueue;
use pubsub_core::{
    Delivery, Event, Receipt, Settled, Settlement, Settler, SubscribeOptions, SubscriptionStatus, Topic, dead_letter,
};
use tokio::time::Instant;

use super::{Desk, Held};
use crate::node::Services;
use crate::settle::{Notice, What};

/// How many dead letters are on their way at a time.
const BURIED_TOGETHER: usize = 100;

/// The longest deadline that Google takes.
const LONGEST_DEADLINE: u64 = 600;

impl Desk {
    /// A message is done.
    pub(super) fn acknowledge(&self, lease: u64) -> Receipt {
        let lease = {
            let mut state = self.state.lock();
            let removed = state.remove(lease);
            if let Some(lease) = &removed {
                state.acknowledged.insert(&lease.message_id);
            }
            removed
        };
        let Some(lease) = lease else { return Receipt::ready(Settled::TooLate) };
        self.record(lease.ack_id, What::Ack, lease.until)
    }

    /// A message goes back, for anybody after that time.
    pub(super) fn give_back(&self, lease: u64, after: Duration) -> Receipt {
        let lease = self.state.lock().remove(lease);
        let Some(lease) = lease else { return Receipt::ready(Settled::TooLate) };
        let seconds = after.as_millis().div_ceil(1000).min(LONGEST_DEADLINE.into());
        self.record(lease.ack_id, What::Deadline(i32::try_from(seconds).unwrap_or(0)), lease.until)
    }

    fn record(&self, ack_id: String, what: What, until: Instant) -> Receipt {
        let subscription = self.name.clone();
        self.services.notices.record(Notice { subscription, ack_ids: vec![ack_id], what, until, renews: None })
    }

    /// Gives back, in one go, what nobody has asked for.
    pub(super) fn release(&self, which: impl Fn(u64) -> bool) {
        let (ack_ids, events) = {
            let mut state = self.state.lock();
            let leases: Vec<_> = state.ahead.iter().copied().filter(|lease| which(*lease)).collect();
            let removed: Vec<_> = leases.into_iter().filter_map(|lease| state.remove(lease)).collect();
            let events: Vec<_> = removed.iter().map(|lease| lease.event.clone()).collect();
            (removed.into_iter().map(|lease| lease.ack_id).collect::<Vec<_>>(), events)
        };
        self.forget(&events);
        self.services.settle(&self.name, ack_ids, What::Deadline(0));
    }

    /// Gives back what is in nobody's hands and not on its way to a dead-letter topic, as after the last member.
    pub(super) fn release_unheld(&self) {
        let ack_ids = {
            let mut state = self.state.lock();
            let held: HashSet<_> = state.held.iter().filter_map(|(_, held)| held.lease).collect();
            let keep = |lease: &u64| held.contains(lease) || state.dying.contains(lease);
            let mut leases: Vec<_> = state.leases.keys().copied().filter(|lease| !keep(lease)).collect();
            leases.sort_unstable(); // in the order they came
            leases.into_iter().filter_map(|lease| state.remove(lease)).map(|lease| lease.ack_id).collect()
        };
        self.services.settle(&self.name, ack_ids, What::Deadline(0));
    }

    /// Takes events out of the local queue.
    pub(super) fn forget(&self, events: &[Arc<Event>]) {
        if !events.is_empty() {
            let gone: HashSet<_> = events.iter().map(Arc::as_ptr).collect();
            self.local().retain(|event| !gone.contains(&std::ptr::from_ref(event)));
        }
    }

    /// A delivery is over without having been handled: it becomes a dead letter, or is dropped.
    pub(super) fn give_up(
        &self,
        lease: u64,
        event: &Event,
        attempts: u32,
        reason: &str,
        options: &SubscribeOptions,
        inner: Option<Delivery>,
    ) -> Receipt {
        let (topic, group) = (self.topic(), &self.group);
        let letter = options.dead_letter.clone().map(|to| (to, dead_letter(event, topic, Some(group), attempts, reason)));
        {
            let mut state = self.state.lock();
            match letter {
                Some(_) => state.counts.dead_lettered += 1,
                None => state.counts.dropped += 1,
            }
        }
        if letter.is_none() {
            tracing::warn!(%topic, %group, event = %event.id(), attempts, reason, "a delivery was given up: no attempt left and no dead-letter topic");
        }
        self.bury(lease, letter, inner)
    }

    /// Acknowledges what was given up, once its letter, if there is one, is confirmed.
    pub(super) fn bury(&self, lease: u64, letter: Option<(Topic, Event)>, inner: Option<Delivery>) -> Receipt {
        match self.me.upgrade() {
            Some(desk) => {
                self.state.lock().dying.insert(lease);
                self.services.burials.record(Burial { desk, lease, letter, inner })
            }
            None => Receipt::ready(Settled::Unconfirmed), // it is being dropped: nobody holds anything of it
        }
    }

    fn settle_held(&self, held: Held, options: Option<Arc<SubscribeOptions>>, settlement: Settlement) -> Receipt {
        let Held { inner, lease, attempt, .. } = held;
        // It never left the instance: its queue settles it.
        let Some(lease) = lease else { return inner.settle(settlement) };
        if Self::is_revoked(&inner) {
            drop(inner.done());
            return Receipt::ready(Settled::TooLate);
        }
        let Some(options) = options else { return Receipt::ready(Settled::TooLate) };
        let event = inner.event().clone();
        match settlement {
            Settlement::Done => {
                let receipt = self.acknowledge(lease);
                drop(inner.done());
                receipt
            }
            Settlement::DeadLetter { reason } => self.give_up(lease, &event, attempt, &reason, &options, Some(inner)),
            Settlement::Retry { reason, .. } if options.retry.is_exhausted_after(attempt) => {
                let reason = reason.as_deref().unwrap_or("retried too often");
                self.give_up(lease, &event, attempt, reason, &options, Some(inner))
            }
            Settlement::Retry { after, reason } => {
                let after = after.unwrap_or_else(|| options.retry.backoff_after(attempt, fastrand::f64()));
                match inner.settle(Settlement::Retry { after: Some(after), reason }).now() {
                    // Nobody is left here for it to come back to.
                    Some(Settled::TooLate) => self.give_back(lease, after),
                    _ => Receipt::ready(Settled::Done),
                }
            }
            // What is not known is given back.
            _ => match inner.release().now() {
                Some(Settled::TooLate) => self.give_back(lease, Duration::ZERO),
                _ => {
                    self.waits_again(lease);
                    Receipt::ready(Settled::Done)
                }
            },
        }
    }

    /// It was given back to whoever asks next; if nobody does here, to others.
    fn waits_again(&self, lease: u64) {
        {
            let mut state = self.state.lock();
            if state.leases.contains_key(&lease) {
                state.ahead.insert(lease);
                state.progress = Some(Instant::now());
            }
        }
        self.arm();
    }

    /// Whether a member has left.
    pub(crate) fn has_left(&self, number: u64) -> bool {
        self.state.lock().members.get(&number).is_none_or(|member| member.left)
    }

    pub(crate) fn add_to(&self, number: u64, status: &mut SubscriptionStatus) {
        let state = self.state.lock();
        status.held = state.members.get(&number).map_or(0, |member| member.held as u64);
        status.dead_lettered += state.counts.dead_lettered;
        status.dropped += state.counts.dropped;
        status.ended = state.members.get(&number).is_none_or(|member| member.left);
    }
}

impl Settler for Desk {
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        match self.let_go(token) {
            Some((held, options)) => self.settle_held(held, options, settlement),
            None => Receipt::ready(Settled::TooLate),
        }
    }

    fn extend(&self, token: u64) -> Receipt {
        match self.state.lock().held.get(token) {
            Some(held) => held.inner.extend(),
            None => Receipt::ready(Settled::TooLate),
        }
    }

    fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()> {
        let _replaced; // dropped after the lock
        let mut state = self.state.lock();
        let Some(held) = state.held.get_mut(token) else { return Poll::Ready(()) };
        _replaced = held.revoked.replace(cx.waker().clone());
        pin!(held.inner.revoked()).poll(cx)
    }
}

/// Something that was given up, on its way to where dead letters are kept and then out of its group.
pub(crate) struct Burial {
    desk: Arc<Desk>,
    lease: u64,
    letter: Option<(Topic, Event)>,
    /// Its delivery in the local queue, which counts as held until it is buried.
    inner: Option<Delivery>,
}

/// Buries what is given up, until the future is dropped.
pub(crate) async fn bury_all(burials: SettleQueue<Burial>, services: Weak<Services>) {
    loop {
        let batch = burials.next_batch(BURIED_TOGETHER).await;
        let Some(services) = services.upgrade() else { return };
        let burying = batch.into_iter().map(|mut open| {
            let services = &services;
            async move {
                let buried = match open.what_mut().letter.take() {
                    Some((to, letter)) => services.bury(&to, &letter).await,
                    None => true,
                };
                let Burial { desk, lease, .. } = open.what();
                desk.state.lock().dying.remove(lease);
                // Without its letter it goes back: it is given up again by whoever gets it.
                let settled = match buried {
                    true => desk.acknowledge(*lease),
                    false => desk.give_back(*lease, Duration::ZERO),
                }
                .await;
                drop(open.what_mut().inner.take().map(Delivery::done));
                open.answer(if buried { settled } else { Settled::Unconfirmed });
            }
        });
        futures::future::join_all(burying).await;
    }
}
