//! What consumers decide, and what is given up.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use pubsub_core::machinery::SettleQueue;
use pubsub_core::{
    Delivery, Event, Receipt, Settled, Settlement, Settler, SubscribeOptions, SubscriptionStatus, Topic, dead_letter,
};
use tokio::time::Instant;

use super::{Desk, FAR, Held, Remote};
use crate::entry::EntryId;
use crate::node::Letters;
use crate::settle::{Notice, What};

impl Desk {
    pub(super) fn record(&self, id: EntryId, count: u64, what: What) -> Receipt {
        self.node.notices().record(Notice { place: self.place.clone(), id, count, what })
    }

    pub(super) fn done(&self, id: EntryId, count: u64, touched: Instant) -> Receipt {
        self.record(id, count, What::Done { held_until: touched + self.reclaim().mul_f64(2.0 / 3.0) })
    }

    /// Gives an entry to anybody from then on, counted as delivered so often.
    pub(super) fn free(&self, id: EntryId, count: u64, counts: u64, due: Instant) -> Receipt {
        let reclaim = self.reclaim();
        {
            let mut state = self.state.lock();
            if due > Instant::now() + reclaim {
                state.postponed.push(due - reclaim, (id, count, due));
                drop(state);
                self.arm();
                return self.record(id, count, What::Keep);
            }
            state.due.push(due, ());
        }
        self.arm();
        self.record(id, count, What::Free { due, count: counts })
    }

    /// Gives back what was read ahead.
    pub(crate) fn release_ahead(&self) {
        self.release(|_| true);
    }

    pub(super) fn release(&self, which: impl Fn(EntryId) -> bool) {
        let now = Instant::now();
        let released: Vec<_> = {
            let mut state = self.state.lock();
            let ids: Vec<_> = state.ahead.keys().copied().filter(|id| which(*id)).collect();
            if ids.is_empty() {
                return;
            }
            (state.cold, state.claim, state.most_ahead) = (true, true, (state.most_ahead / 2).max(1));
            if state.alone.is_some_and(|alone| ids.contains(&alone)) {
                state.alone = None;
            }
            ids.into_iter().filter_map(|id| Some((id, state.ahead.remove(&id)?))).collect()
        };
        let events: HashSet<_> = released.iter().map(|(_, ahead)| Arc::as_ptr(&ahead.event)).collect();
        self.local().retain(|event| !events.contains(&std::ptr::from_ref(event)));
        for (id, ahead) in &released {
            let what = What::Free { due: now, count: ahead.count.saturating_sub(1) };
            drop(self.record(*id, ahead.count, what));
        }
    }

    #[expect(clippy::too_many_arguments)] // all that makes a dead letter
    pub(super) fn give_up(
        &self,
        event: &Event,
        id: EntryId,
        count: u64,
        attempts: u32,
        reason: &str,
        options: &SubscribeOptions,
        inner: Option<Delivery>,
    ) -> Receipt {
        let group = &self.place.group;
        let letter =
            options.dead_letter.clone().map(|to| (to, dead_letter(event, self.topic(), Some(group), attempts, reason)));
        {
            let mut state = self.state.lock();
            match letter {
                Some(_) => state.counts.dead_lettered += 1,
                None => state.counts.dropped += 1,
            }
            state.dying.insert(id, count);
        }
        if letter.is_none() {
            let topic = self.topic();
            tracing::warn!(%topic, %group, event = %event.id(), attempts, reason, "a delivery was given up: no attempt left and no dead-letter topic");
        }
        self.bury(id, count, letter, inner)
    }

    /// Acknowledges what was given up, once its letter, if there is one, is confirmed.
    pub(super) fn bury(&self, id: EntryId, count: u64, letter: Option<(Topic, Event)>, inner: Option<Delivery>) -> Receipt {
        match self.me.upgrade() {
            Some(desk) => self.node.burials().record(Burial { desk, id, count, letter, inner }),
            None => Receipt::ready(Settled::Unconfirmed), // it is being dropped: nobody holds anything of it
        }
    }

    /// A delivery comes back after a back-off, or is given up if it was tried often enough.
    pub(super) fn retry(&self, remote: Remote, after: Option<Duration>, reason: &str, options: &SubscribeOptions) -> Receipt {
        let Remote { inner, id, count, attempt, .. } = remote;
        let policy = &options.retry;
        if policy.is_exhausted_after(attempt) {
            let event = inner.event().clone();
            return self.give_up(&event, id, count, attempt, reason, options, Some(inner));
        }
        let backoff = after.unwrap_or_else(|| policy.backoff_after(attempt, fastrand::f64())).min(FAR);
        drop(inner.done());
        self.free(id, count, count, Instant::now() + backoff)
    }

    pub(super) fn options_of(&self, token: u64) -> Option<Arc<SubscribeOptions>> {
        let state = self.state.lock();
        let member = state.held.get(token)?.member();
        Some(state.members.get(&member)?.options.clone())
    }

    /// Takes a delivery back as a retry, at once, and tells its holder.
    pub(super) fn take_back(&self, token: u64, reason: &str) {
        let options = self.options_of(token);
        match self.let_go(token) {
            Some(Held::Remote(mut remote)) => {
                let revoked = remote.revoked.take();
                if let Some(options) = options {
                    drop(self.retry(*remote, Some(Duration::ZERO), reason, &options));
                }
                revoked.into_iter().for_each(Waker::wake);
            }
            Some(Held::Local { delivery, .. }) => drop(delivery.retry()),
            None => {}
        }
    }

    /// Takes back all that is held from the server, and returns how much that is.
    pub(crate) fn revoke(&self) -> u64 {
        let is_remote = |held: &Held| held.remote().is_some();
        let tokens: Vec<_> =
            self.state.lock().held.iter().filter(|(_, held)| is_remote(held)).map(|(token, _)| token).collect();
        tokens.iter().for_each(|token| self.take_back(*token, "its holder was closed"));
        tokens.len() as u64
    }

    /// Waits until nothing is in consumers' hands.
    pub(crate) async fn idle(&self) {
        // The sender is this very desk's.
        let _ = self.in_hands.subscribe().wait_for(|held| *held == 0).await;
    }

    /// Whether a member has left.
    pub(crate) fn has_left(&self, number: u64) -> bool {
        self.state.lock().members.get(&number).is_none_or(|member| member.left)
    }

    pub(crate) fn add_to(&self, number: u64, status: &mut SubscriptionStatus) {
        let state = self.state.lock();
        status.held = state.members.get(&number).map_or(0, |member| member.held as u64);
        status.delayed += (state.due.len() + state.postponed.len()) as u64;
        status.lagged += state.counts.lagged;
        status.dead_lettered += state.counts.dead_lettered;
        status.dropped += state.counts.dropped;
        status.ended = state.members.get(&number).is_none_or(|member| member.left);
    }
}

impl Settler for Desk {
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        let options = self.options_of(token);
        let remote = match self.let_go(token) {
            None => return Receipt::ready(Settled::TooLate),
            Some(Held::Local { delivery, .. }) => return delivery.settle(settlement),
            Some(Held::Remote(remote)) => *remote,
        };
        let Some(options) = options else { return Receipt::ready(Settled::TooLate) };
        match settlement {
            Settlement::Done => {
                let receipt = self.done(remote.id, remote.count, remote.touched);
                drop(remote.inner.done());
                receipt
            }
            Settlement::DeadLetter { reason } => {
                let Remote { inner, id, count, attempt, .. } = remote;
                let event = inner.event().clone();
                self.give_up(&event, id, count, attempt, &reason, &options, Some(inner))
            }
            Settlement::Retry { after, reason } => {
                self.retry(remote, after, reason.as_deref().unwrap_or("retried too often"), &options)
            }
            // What is not known is given back.
            _ => {
                drop(remote.inner.done());
                self.free(remote.id, remote.count, remote.count.saturating_sub(1), Instant::now())
            }
        }
    }

    fn extend(&self, token: u64) -> Receipt {
        let (id, count) = match self.state.lock().held.get_mut(token) {
            None => return Receipt::ready(Settled::TooLate),
            Some(Held::Local { delivery, .. }) => return delivery.extend(),
            Some(Held::Remote(remote)) => {
                remote.since = Instant::now();
                (remote.id, remote.count)
            }
        };
        self.record(id, count, What::Keep)
    }

    fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()> {
        match self.state.lock().held.get_mut(token) {
            Some(Held::Local { delivery, .. }) => pin!(delivery.revoked()).poll(cx),
            Some(Held::Remote(remote)) => {
                remote.revoked = Some(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

/// Something that was given up, on its way to where dead letters are kept and then out of its group.
pub(crate) struct Burial {
    desk: Arc<Desk>,
    id: EntryId,
    count: u64,
    letter: Option<(Topic, Event)>,
    /// Its delivery in the local queue, which counts as held until it is buried.
    inner: Option<Delivery>,
}

/// Buries what is given up, until the future is dropped.
pub(crate) async fn bury_all(burials: SettleQueue<Burial>, letters: Letters) {
    loop {
        let batch = burials.next_batch(BURIED_TOGETHER).await;
        let burying = batch.into_iter().map(|mut open| async {
            let letter = open.what_mut().letter.take();
            let buried = match letter {
                Some((to, letter)) => letters.clone().bury(to, letter).await,
                None => true,
            };
            let Burial { desk, id, count, .. } = open.what();
            // Without its letter it stays pending: others will give it up again.
            let settled = match buried {
                true => desk.record(*id, *count, What::Done { held_until: Instant::now() }).await,
                false => Settled::Unconfirmed,
            };
            desk.state.lock().dying.remove(id);
            let desk = desk.clone();
            drop(open.what_mut().inner.take().map(Delivery::done));
            open.answer(settled);
            desk.farewell();
        });
        futures::future::join_all(burying).await;
    }
}

/// How many dead letters are on their way at a time.
const BURIED_TOGETHER: usize = 100;
