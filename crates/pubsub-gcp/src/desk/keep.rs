//! Pulling as members ask, renewing what is leased, giving back what nobody asks for.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::task::Waker;

use futures::FutureExt;
use futures::future::BoxFuture;
use gcloud_sdk::google::pubsub::v1::ReceivedMessage;
use pubsub_core::machinery::Due;
use tokio::time::Instant;

use super::{Desk, Held};
use crate::errors::Fault;
use crate::hub::Remembered;
use crate::message::Arrival;
use crate::settle::{Notice, Renewal, What};
use crate::stream::{Feed, Want};

/// How many ack ids are renewed in one record.
const RENEWED_TOGETHER: usize = 500;

/// How many bytes the service may send ahead of a group's members, where it keeps to that.
const BYTES_AHEAD: usize = 16 << 20;

impl Desk {
    /// Leases were renewed, as was asked for then.
    pub(crate) fn renewed(&self, leases: &[u64], at: Instant) {
        let until = at + self.services.options.ack_deadline;
        let mut state = self.state.lock();
        for lease in leases {
            if let Some(lease) = state.leases.get_mut(lease) {
                lease.until = lease.until.max(until);
            }
        }
    }

    /// Says that everything is held still, and lets go of what is not any more.
    fn renew(&self, now: Instant) {
        let (tokens, events, kept) = {
            let mut state = self.state.lock();
            let lost: Vec<_> = state.leases.iter().filter(|(_, lease)| lease.until <= now).map(|(n, _)| *n).collect();
            let gone: HashSet<_> = lost.iter().copied().collect();
            let is_over = |held: &Held| Self::is_revoked(&held.inner) || held.lease.is_some_and(|lease| gone.contains(&lease));
            let tokens: Vec<_> = state.held.iter().filter(|(_, held)| is_over(held)).map(|(token, _)| token).collect();
            let events: Vec<_> = lost.iter().filter_map(|lease| state.remove(*lease)).map(|lease| lease.event).collect();
            let kept: Vec<_> = state.leases.iter().map(|(number, lease)| (*number, lease.ack_id.clone())).collect();
            (tokens, events, kept)
        };
        for (Held { inner, revoked, .. }, _) in tokens.into_iter().filter_map(|token| self.let_go(token)) {
            drop(inner.done());
            revoked.into_iter().for_each(Waker::wake);
        }
        self.forget(&events);
        for some in kept.chunks(RENEWED_TOGETHER) {
            let leases = some.iter().map(|(number, _)| *number).collect();
            let renews = Some(Renewal { desk: self.me.clone(), leases, at: now });
            let ack_ids = some.iter().map(|(_, ack_id)| ack_id.clone()).collect();
            // What comes too late for this renewal is for the next.
            let until = now + self.services.options.ack_deadline / 3;
            let what = What::Deadline(self.services.deadline());
            drop(self.services.notices.record(Notice { subscription: self.name.clone(), ack_ids, what, until, renews }));
        }
    }

    /// A server that has forgotten all gives its message ids anew, and knows nothing of what is leased: that is lost at the next renewal.
    fn forget_server(&self) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.acknowledged = Remembered::default();
        state.by_message.clear();
        state.leases.values_mut().for_each(|lease| lease.until = now);
    }

    /// When something is due next.
    fn next_deadline(&self, now: Instant) -> Option<Instant> {
        let mut state = self.state.lock();
        if state.leases.is_empty() {
            state.renew_at = None;
        } else if state.renew_at.is_none() {
            state.renew_at = Some(now + self.services.options.ack_deadline / 3);
        }
        let lingering = state.progress.filter(|_| !state.ahead.is_empty());
        let lingering = lingering.map(|progress| progress + self.services.options.linger);
        [lingering, state.renew_at].into_iter().flatten().min()
    }

    /// Makes sure that the timer calls for whatever is due next.
    pub(super) fn arm(&self) {
        let Some(next) = self.next_deadline(Instant::now()) else { return };
        {
            let mut state = self.state.lock();
            if state.armed.is_some_and(|armed| armed <= next) {
                return;
            }
            state.armed = Some(next);
        }
        let me: Weak<dyn Due> = self.me.clone();
        self.services.timer.call_at(next, me);
    }
}

impl Due for Desk {
    fn due(self: Arc<Self>, now: Instant) -> Option<Instant> {
        let (lingered, renew) = {
            let mut state = self.state.lock();
            state.armed = None;
            let linger = self.services.options.linger;
            let lingered = !state.ahead.is_empty() && state.progress.is_none_or(|progress| progress + linger <= now);
            if lingered {
                (state.cold, state.progress) = (true, None);
                state.asking.clear(); // who was woken and did not come is not asking
            }
            let renew = state.renew_at.is_some_and(|at| at <= now);
            if renew {
                state.renew_at = None;
            }
            (lingered, renew)
        };
        if lingered {
            self.release(|_| true);
            self.ring();
        }
        if renew {
            self.renew(now);
        }
        let next = self.next_deadline(now);
        self.state.lock().armed = next;
        next
    }
}

impl Feed for Desk {
    fn want(&self) -> Want {
        let local = self.local();
        let state = self.state.lock();
        if state.cold || state.failed.is_some() || !state.has_members() {
            return Want::Nothing;
        }
        let most = state.present().map(|member| member.options.prefetch).max().unwrap_or(1);
        // Half of it is enough to ask for more.
        if state.ahead.len() > most / 2 || local.room() == 0 { Want::Wait } else { Want::More }
    }

    fn ahead(&self) -> (usize, usize) {
        let state = self.state.lock();
        // What is held counts there, too.
        let most = state.present().map(|member| member.options.prefetch.saturating_add(member.options.max_in_flight)).sum();
        (most, BYTES_AHEAD)
    }

    fn take(&self, received: Vec<ReceivedMessage>) {
        self.arrive(received.into_iter().map(Arrival::read).collect());
    }

    fn give_back(&self, received: Vec<ReceivedMessage>) {
        let ack_ids = received.into_iter().map(|received| received.ack_id).collect();
        self.services.settle(&self.name, ack_ids, What::Deadline(0));
    }

    fn mend(self: Arc<Self>, fault: Fault, lost: bool) -> BoxFuture<'static, Result<(), Fault>> {
        async move { self.services.mend(&self.spec, fault, lost, || self.forget_server()).await }.boxed()
    }

    fn flows(&self) {
        self.services.well();
    }

    fn fail(&self, fault: Fault) {
        tracing::warn!(subscription = %self.name, %fault, "a subscription cannot be read any more");
        self.end_with(fault);
    }
}
