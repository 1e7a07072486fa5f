//! Keeping what is held, taking over what nobody holds any more, and what comes due.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::task::Waker;

use pubsub_core::Error;
use pubsub_core::machinery::Due;
use tokio::time::Instant;

use super::{Arrival, Desk, FAR, Held};
use crate::entry::EntryId;
use crate::settle::{Answer, What};

impl Desk {
    /// What is to be said to be held still; nothing if it is not time yet.
    pub(crate) fn to_renew(&self) -> Vec<(EntryId, u64)> {
        let mut state = self.state.lock();
        if !std::mem::take(&mut state.renew) {
            return Vec::new();
        }
        let held = state.held.iter().filter_map(|(_, held)| held.remote()).map(|remote| (remote.id, remote.count));
        let ahead = state.ahead.iter().map(|(id, ahead)| (*id, ahead.count));
        let postponed = state.postponed.iter().map(|(id, count, _)| (*id, *count));
        let dying = state.dying.iter().map(|(id, count)| (*id, *count));
        held.chain(ahead).chain(postponed).chain(dying).collect()
    }

    /// What came of saying so, `asked` being when it was said.
    pub(crate) fn renewed(&self, asked: Instant, renewals: &[(EntryId, u64)], answers: &[Answer]) {
        let mut lost = Vec::new();
        {
            let mut state = self.state.lock();
            let answers: HashMap<_, _> = renewals.iter().map(|(id, _)| *id).zip(answers.iter().copied()).collect();
            let tokens: Vec<_> = state.held.iter().map(|(token, _)| token).collect();
            for token in tokens {
                let Some(Held::Remote(remote)) = state.held.get_mut(token) else { continue };
                match answers.get(&remote.id) {
                    Some(Answer::Done) => remote.touched = asked,
                    Some(_) => lost.push(token),
                    None => {}
                }
            }
            state.ahead.retain(|id, ahead| match answers.get(id) {
                Some(Answer::Done) => {
                    ahead.touched = asked;
                    true
                }
                Some(_) => false, // its copy in the local queue is passed over
                None => true,
            });
        }
        for token in lost {
            if let Some(Held::Remote(mut remote)) = self.let_go(token) {
                remote.revoked.take().into_iter().for_each(Waker::wake);
                drop(remote.inner.done());
            }
        }
    }

    /// How much to take over now: of nobody's, of silent holders', and whether one that has to run alone; none if nothing is wanted.
    /// With an answer, [`claimed`](Self::claimed) has to be called.
    pub(crate) fn to_claim(&self) -> Option<(usize, usize, bool)> {
        let mut state = self.state.lock();
        let wanted = !state.asking.is_empty() || !state.cold;
        if !state.claim
            || state.busy
            || !wanted
            || state.alone.is_some()
            || state.failed.is_some()
            || state.present().next().is_none()
        {
            return None;
        }
        let room = self.local().room();
        let free = state.most_ahead.saturating_sub(state.ahead.len()).max(state.asking.len()).min(room);
        let silent = state.asking.len().saturating_sub(state.ahead.len()).min(room);
        if free == 0 {
            return None;
        }
        let waited = state.isolating.is_some_and(|since| since.elapsed() > self.reclaim());
        let alone = silent > 0 && ((state.held.is_empty() && state.ahead.is_empty()) || waited);
        (state.busy, state.claim) = (true, false);
        Some((free, silent, alone))
    }

    /// What came of it: what was taken over, and whether there may be more.
    pub(crate) fn claimed(&self, claimed: Option<Claimed>, more: bool) {
        let Claimed { arrivals, lost, mine, left_alone, alone, of_silent } = claimed.unwrap_or_default();
        let (forgotten, again) = {
            let mut state = self.state.lock();
            state.busy = false;
            state.claim |= more;
            state.lost += lost;
            state.counts.lagged += lost;
            state.alone = state.alone.or(alone);
            state.isolating = if left_alone { state.isolating.or(Some(Instant::now())) } else { None };
            // What is not known here was read, and the answer got lost.
            let forgotten: Vec<_> = mine.into_iter().filter(|(id, _)| !state.knows(*id)).collect();
            state.claim |= !forgotten.is_empty();
            (forgotten, state.claim && !state.asking.is_empty())
        };
        for (id, count) in forgotten {
            drop(self.record(id, count, What::Free { due: Instant::now(), count: count.saturating_sub(1) }));
        }
        self.tell_lost(lost);
        if of_silent > 0
            && let Some(count) = self.node.told.taken_over.count(of_silent)
        {
            let (topic, group) = (self.topic(), &self.place.group);
            tracing::warn!(%topic, %group, count, "took over what a silent member held");
        }
        self.arrive(arrivals);
        if again {
            self.node.keeper().tend(self.me.clone());
        }
        self.reader.ring();
    }

    /// Whether it is time to look after consumers that are gone.
    pub(crate) fn time_to_look_after(&self) -> bool {
        let mut state = self.state.lock();
        let due = state.looked_after.is_none_or(|at| at.elapsed() > self.reclaim());
        if due {
            state.looked_after = Some(Instant::now());
        }
        due
    }

    /// Ends its members' streams with an error.
    pub(crate) fn fail(&self, error: Error) {
        self.state.lock().failed.get_or_insert_with(|| Arc::new(error));
        self.local().end();
    }

    /// The error its members' streams end with.
    pub(crate) fn failure(&self) -> Option<Error> {
        let failed = self.state.lock().failed.clone()?;
        Some(Error::new(failed.kind().clone()).during("read").on(&self.place.group).caused_by(failed.to_string()))
    }

    /// Begins to find out what an answer that got lost had said; false if somebody takes something over just now. With true,
    /// [`claimed`](Self::claimed) has to be called.
    pub(crate) fn begin_recovery(&self) -> bool {
        let mut state = self.state.lock();
        state.behind = true;
        !std::mem::replace(&mut state.busy, true)
    }

    /// Makes sure that the timer calls for whatever is due next.
    pub(crate) fn arm(&self) {
        let when = {
            let mut state = self.state.lock();
            let Some(next) = state.next_deadline(self.node.options().linger, self.reclaim()) else { return };
            if state.armed.is_some_and(|armed| armed <= next) {
                return;
            }
            state.armed = Some(next);
            next
        };
        let me: Weak<dyn Due> = self.me.clone();
        self.node.timer().call_at(when, me);
    }
}

/// What was taken over.
#[derive(Default)]
pub(crate) struct Claimed {
    pub(crate) arrivals: Vec<Arrival>,
    /// How many were trimmed away while they were pending.
    pub(crate) lost: u64,
    /// What this instance is said to hold and has not renewed.
    pub(crate) mine: Vec<(EntryId, u64)>,
    /// How many were held by members that fell silent.
    pub(crate) of_silent: u64,
    /// Whether one was left that has to run alone.
    pub(crate) left_alone: bool,
    /// The one that runs alone.
    pub(crate) alone: Option<EntryId>,
}

impl Due for Desk {
    fn due(self: Arc<Self>, now: Instant) -> Option<Instant> {
        let linger = self.node.options().linger;
        let (mut overdue, mut postponed, mut lingering) = (Vec::new(), Vec::new(), false);
        let tend = {
            let mut state = self.state.lock();
            let state = &mut *state;
            state.armed = None;
            if state.hold_due.is_some_and(|due| due <= now) {
                let holder = |held: &Held| state.members.get(&held.member()).map_or(FAR, |member| member.options.max_hold);
                let until = |held: &Held| held.remote().map(|remote| remote.since + holder(held));
                overdue.extend(
                    state.held.iter().filter(|(_, held)| until(held).is_some_and(|until| until <= now)).map(|(t, _)| t),
                );
                state.hold_due = state.held.iter().filter_map(|(_, held)| until(held)).filter(|until| *until > now).min();
            }
            while state.due.pop_due(now).is_some() {
                state.claim = true;
            }
            while let Some(one) = state.postponed.pop_due(now) {
                postponed.push(one);
            }
            lingering =
                lingering || (!state.ahead.is_empty() && state.progress.is_none_or(|progress| progress + linger <= now));
            if state.sweep_at.is_some_and(|at| at <= now) {
                // One that has left everything need not look after anything.
                let attends = state.members.values().any(|member| !member.left);
                state.claim |= attends;
                state.sweep_at = attends.then(|| now + self.sweep_interval());
            }
            if state.renew_at.is_some_and(|at| at <= now) {
                (state.renew, state.renew_at) = (true, None);
            }
            state.renew || state.claim
        };
        overdue.iter().for_each(|token| self.take_back(*token, "held for too long"));
        for (id, count, due) in postponed {
            drop(self.free(id, count, count, due));
        }
        if lingering {
            self.release_ahead();
        }
        if tend {
            self.node.keeper().tend(self.me.clone());
        }
        let mut state = self.state.lock();
        let next = state.next_deadline(linger, self.reclaim());
        state.armed = next;
        next
    }
}
