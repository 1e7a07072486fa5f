//! A member of a group: what it has taken and not handed over, and what is in its consumer's hands.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_core::machinery::{Due, InFlight};
use pubsub_core::{
    AckMode, Delivery, Event, Group, Position, Receipt, Result, Scope, Settled, Settlement, Settler, SubscribeOptions,
    SubscriptionStatus, Topic, dead_letter,
};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::convert::{letter_of_malformed, scope};
use crate::protocol::{Handed, Place, Query, Request, Seat, What};
use crate::record::{Run, Stored};
use crate::remote::Remote;
use crate::subscription::{poll_revoked, settled_if};

/// How long what was taken waits to be asked for before others may have it.
const LINGER: Duration = Duration::from_millis(20);

/// How many deliveries are taken at once at most.
const TAKEN_TOGETHER: usize = 64;

/// A crash counts as an attempt against all that had been taken. So no more is taken at once than was last handled within this time:
/// one delivery, unless the consumer settles them faster than it would be worth asking for each.
const BRIEFLY: Duration = Duration::from_millis(2);

pub(crate) struct Member {
    remote: Arc<Remote>,
    topic: Topic,
    group: Group,
    pub(crate) seat: Seat,
    options: SubscribeOptions,
    me: Weak<Self>,
    state: Mutex<State>,
    /// Rings when nothing is in the consumer's hands, for those who wait for it.
    idle: Notify,
}

#[derive(Default)]
struct State {
    taken: VecDeque<Taken>,
    held: InFlight<Held>,
    /// Whether somebody waits until nothing is held.
    idle_wanted: bool,
    waker: Option<Waker>,
    /// Whether a take is on its way.
    asked: bool,
    /// How many to take next, how many came last, when, and how many were settled since.
    window: usize,
    came: usize,
    since: Option<Instant>,
    settled: usize,
    /// When the timer will call.
    armed: Option<Instant>,
    /// When what was taken and not handed over goes back.
    linger: Option<Instant>,
    ended: bool,
    lagged: u64,
    dead_lettered: u64,
    dropped: u64,
}

struct Taken {
    scope: Arc<Scope>,
    place: Place,
    attempt: u32,
    lagged: u64,
    stored: Stored,
}

enum Held {
    Remote {
        event: Arc<Event>,
        place: Place,
        attempt: u32,
        since: Instant,
        revoked: Option<Waker>,
    },
    /// It never left the instance: its own queue settles it.
    Local(Delivery),
}

impl Member {
    pub(crate) fn new(remote: &Arc<Remote>, topic: Topic, group: Group, options: SubscribeOptions) -> Arc<Self> {
        let seat = Seat { topic: topic.as_str().into(), group: group.as_str().into(), member: remote.number() };
        let remote = remote.clone();
        Arc::new_cyclic(|me| Self {
            remote,
            topic,
            group,
            seat,
            options,
            me: me.clone(),
            state: Mutex::new(State { window: 1, ..State::default() }),
            idle: Notify::new(),
        })
    }

    fn settle_as(&self, place: Place, attempt: u32, what: What) -> Receipt {
        self.remote.link.settle(&self.seat, place, attempt, what)
    }

    /// Deliveries came, or word that the seat is no longer this member's: it was taken for dead.
    pub(crate) fn taken(&self, bus: &str, generation: u64, handed: Option<Vec<Handed>>, events: &Run) {
        let Some(handed) = handed else { return self.rejoin() };
        let scope = scope(bus, generation);
        let until = Instant::now() + LINGER;
        let (waker, unwanted) = {
            let mut state = self.state.lock();
            state.asked = false;
            (state.came, state.since, state.settled) = (handed.len(), Some(Instant::now()), 0);
            let taken = handed.into_iter().zip(events.iter()).map(|(Handed { offset, attempt, lagged }, stored)| Taken {
                scope: scope.clone(),
                place: Place { generation, offset },
                attempt,
                lagged,
                stored,
            });
            state.taken.extend(taken);
            let unwanted = if state.ended { std::mem::take(&mut state.taken) } else { VecDeque::new() };
            state.linger = Some(until);
            (state.waker.take(), unwanted)
        };
        self.release(unwanted);
        self.arm(until);
        waker.into_iter().for_each(Waker::wake);
    }

    fn release(&self, taken: VecDeque<Taken>) {
        // The last first: each goes back in front of what came after it.
        for Taken { place, attempt, .. } in taken {
            drop(self.settle_as(place, attempt, What::Release));
        }
    }

    /// What is held went to others long ago; from now on this is a new member.
    pub(crate) fn rejoin(&self) {
        let (lost, waker) = {
            let mut state = self.state.lock();
            state.asked = false;
            state.taken.clear();
            let lost: Vec<u64> = state.held.iter().filter(|(_, held)| held.is_remote()).map(|(token, _)| token).collect();
            let lost: Vec<Held> = lost.into_iter().filter_map(|token| state.held.remove(token)).collect();
            self.ring_if_idle(&mut state);
            if state.ended {
                return;
            }
            (lost, state.waker.take())
        };
        tracing::warn!(topic = %self.topic, group = %self.group, "a member was taken for dead and joins its group again");
        let request = Request::Join { seat: self.seat.clone(), begin: None, or_earliest: true };
        drop(self.remote.link.call(request));
        lost.into_iter().filter_map(Held::revoked).for_each(Waker::wake);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Whether the consumer holds all it may; it is woken when it no longer does.
    pub(crate) fn is_full(&self, cx: &Context<'_>, mode: AckMode) -> bool {
        let mut state = self.state.lock();
        let full = mode == AckMode::Manual && !state.ended && state.held.len() >= self.options.max_in_flight;
        if full {
            state.waker = Some(cx.waker().clone());
        }
        full
    }

    /// The next delivery that came from the broker.
    pub(crate) fn poll_next(&self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        loop {
            let taken = {
                let mut state = self.state.lock();
                if state.ended {
                    return Poll::Ready(None);
                }
                let Some(taken) = state.taken.pop_front() else {
                    state.waker = Some(cx.waker().clone());
                    state.linger = None;
                    if !std::mem::replace(&mut state.asked, true) {
                        let most = self.window(&mut state);
                        drop(state);
                        self.remote.link.take(&self.seat, most, &self.me);
                    }
                    return Poll::Pending;
                };
                state.linger = Some(Instant::now() + LINGER);
                taken
            };
            if let Some(delivery) = self.hand_over(taken, mode) {
                return Poll::Ready(Some(Ok(delivery)));
            }
        }
    }

    fn window(&self, state: &mut State) -> u32 {
        let brief = state.since.is_some_and(|since| since.elapsed() <= BRIEFLY);
        state.window = if brief && state.settled >= state.came { 2 * state.window } else { 1 };
        let room = self.options.max_in_flight.saturating_sub(state.held.len());
        state.window = state.window.min(TAKEN_TOGETHER).min(self.options.prefetch).min(room).max(1);
        u32::try_from(state.window).unwrap_or(1)
    }

    /// Hands over what can be read and has an attempt left.
    fn hand_over(&self, taken: Taken, mode: AckMode) -> Option<Delivery> {
        let Taken { scope, place, attempt, lagged, stored } = taken;
        self.state.lock().lagged += lagged;
        let Ok(event) = self.remote.read(&stored, place).map(Arc::new) else {
            self.state.lock().dropped += 1;
            let letter = letter_of_malformed(&self.topic, &self.options, &stored, attempt);
            drop(self.settle_as(place, attempt, What::Bury(letter)));
            return None;
        };
        if self.options.retry.is_over(attempt) {
            drop(self.give_up(&event, place, attempt, "attempts exhausted", attempt - 1));
            return None;
        }
        let delivery = match mode {
            AckMode::Auto => {
                self.state.lock().settled += 1;
                drop(self.settle_as(place, attempt, What::Done));
                Delivery::settled(event, attempt)
            }
            AckMode::Manual => {
                let held = Held::Remote { event: event.clone(), place, attempt, since: Instant::now(), revoked: None };
                self.hold(held, event, attempt)
            }
        };
        let delivery = if place.is_foreign() { delivery } else { delivery.at(scope, Position::from(place.offset)) };
        Some(delivery.after_losing(lagged))
    }

    /// Hands over a delivery that came from the instance's own queue.
    pub(crate) fn hand_over_local(&self, local: Delivery, mode: AckMode) -> Delivery {
        if mode == AckMode::Auto {
            return settled_if(mode, local);
        }
        let (event, attempt, lagged) = (local.event().clone(), local.attempt(), local.lagged());
        self.hold(Held::Local(local), event, attempt).after_losing(lagged)
    }

    fn hold(&self, held: Held, event: Arc<Event>, attempt: u32) -> Delivery {
        let is_remote = held.is_remote();
        let token = {
            let mut state = self.state.lock();
            state.held.insert(held)
        };
        if is_remote {
            self.arm(Instant::now() + self.options.max_hold);
        }
        let me = self.me.upgrade().expect("called on one that is there");
        Delivery::held(event, attempt, me, token)
    }

    /// Has the timer call then, unless it calls before.
    fn arm(&self, when: Instant) {
        {
            let mut state = self.state.lock();
            if state.armed.is_some_and(|armed| armed <= when) {
                return;
            }
            state.armed = Some(when);
        }
        self.remote.timer.call_at(when, self.me.clone());
    }

    /// Takes a delivery out of the consumer's hands.
    fn let_go(&self, token: u64) -> Option<Held> {
        let (held, waker) = {
            let mut state = self.state.lock();
            let held = state.held.remove(token)?;
            state.settled += 1;
            self.ring_if_idle(&mut state);
            (held, state.waker.take())
        };
        waker.into_iter().for_each(Waker::wake);
        Some(held)
    }

    fn give_up(&self, event: &Event, place: Place, attempt: u32, reason: &str, attempts: u32) -> Receipt {
        let letter = self.options.dead_letter.as_ref().and_then(|to| {
            let letter = dead_letter(event, &self.topic, Some(&self.group), attempts, reason);
            Some((to.as_str().into(), self.remote.store(&letter, usize::MAX).ok()?))
        });
        {
            let mut state = self.state.lock();
            match letter {
                Some(_) => state.dead_lettered += 1,
                None => state.dropped += 1,
            }
        }
        if letter.is_none() {
            tracing::warn!(topic = %self.topic, group = %self.group, event = %event.id(), attempts, reason, "a delivery was given up");
        }
        self.settle_as(place, attempt, What::Bury(letter))
    }

    /// A delivery comes back after a back-off, or is given up if it was tried often enough.
    fn retry(&self, event: &Event, place: Place, attempt: u32, after: Option<Duration>, reason: &str) -> Receipt {
        let policy = &self.options.retry;
        if policy.is_exhausted_after(attempt) {
            return self.give_up(event, place, attempt, reason, attempt);
        }
        let backoff = after.unwrap_or_else(|| policy.backoff_after(attempt, fastrand::f64()));
        let millis = u64::try_from(backoff.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        self.settle_as(place, attempt, What::Retry(millis))
    }

    /// Takes a delivery back as a retry, at once, and tells its holder.
    fn take_back(&self, token: u64, reason: &str) {
        match self.let_go(token) {
            Some(Held::Remote { event, place, attempt, revoked, .. }) => {
                drop(self.retry(&event, place, attempt, Some(Duration::ZERO), reason));
                revoked.into_iter().for_each(Waker::wake);
            }
            Some(Held::Local(delivery)) => drop(delivery.retry()),
            None => {}
        }
    }

    /// Leaves the group; what was not handed over is released. Returns how much that is.
    pub(crate) fn leave(&self) -> u64 {
        let (unwanted, waker) = {
            let mut state = self.state.lock();
            if std::mem::replace(&mut state.ended, true) {
                return 0;
            }
            (std::mem::take(&mut state.taken), state.waker.take())
        };
        let released = unwanted.len() as u64;
        self.release(unwanted);
        let heard = self.remote.link.forget(self.seat.member);
        drop(self.remote.link.insist(Request::Leave { seat: self.seat.clone(), heard }));
        waker.into_iter().for_each(Waker::wake);
        released
    }

    /// Takes back all that is held from the broker, and returns how much that is.
    pub(crate) fn revoke(&self) -> u64 {
        let tokens: Vec<_> =
            self.state.lock().held.iter().filter(|(_, held)| held.is_remote()).map(|(token, _)| token).collect();
        tokens.iter().for_each(|token| self.take_back(*token, "its holder was closed"));
        tokens.len() as u64
    }

    /// Waits until nothing is in the consumer's hands.
    pub(crate) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            let mut idle = pin!(idle);
            idle.as_mut().enable();
            {
                let mut state = self.state.lock();
                if state.held.is_empty() {
                    return;
                }
                state.idle_wanted = true;
            }
            idle.await;
        }
    }

    fn ring_if_idle(&self, state: &mut State) {
        if state.idle_wanted && state.held.is_empty() {
            state.idle_wanted = false;
            self.idle.notify_waiters();
        }
    }

    /// Waits until the group has nothing queued, held or due, anywhere; for one that has left, until it holds nothing.
    pub(crate) async fn drained(&self) {
        if self.state.lock().ended {
            return self.idle().await;
        }
        self.remote.link.flush().await;
        let Seat { topic, group, .. } = self.seat.clone();
        let _ = self.remote.link.ask(Query::Idle { topic, group }).await; // an error is the end of the instance
    }

    pub(crate) fn add_to(&self, status: &mut SubscriptionStatus) {
        let state = self.state.lock();
        status.queued += state.taken.len() as u64;
        status.held = state.held.len() as u64;
        status.lagged += state.lagged;
        status.dead_lettered += state.dead_lettered;
        status.dropped += state.dropped;
        status.ended = state.ended;
    }
}

impl Held {
    fn is_remote(&self) -> bool {
        matches!(self, Self::Remote { .. })
    }

    fn revoked(self) -> Option<Waker> {
        match self {
            Self::Remote { revoked, .. } => revoked,
            Self::Local(_) => None,
        }
    }
}

impl Due for Member {
    fn due(self: Arc<Self>, now: Instant) -> Option<Instant> {
        let until = |held: &Held| match held {
            Held::Remote { since, .. } => Some(*since + self.options.max_hold),
            Held::Local(_) => None,
        };
        let (overdue, unwanted) = {
            let mut state = self.state.lock();
            state.armed = None;
            let overdue = state.held.iter().filter(|(_, held)| until(held).is_some_and(|until| until <= now));
            let overdue: Vec<u64> = overdue.map(|(token, _)| token).collect();
            let lingered = state.linger.is_some_and(|linger| linger <= now);
            (overdue, if lingered { std::mem::take(&mut state.taken) } else { VecDeque::new() })
        };
        self.release(unwanted);
        overdue.iter().for_each(|token| self.take_back(*token, "held for too long"));
        let mut state = self.state.lock();
        let linger = state.linger.filter(|_| !state.taken.is_empty());
        let next = state.held.iter().filter_map(|(_, held)| until(held)).chain(linger).min();
        let earlier = next.filter(|next| state.armed.is_none_or(|armed| *next < armed));
        state.armed = earlier.or(state.armed);
        earlier
    }
}

impl Settler for Member {
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        let (event, place, attempt) = match self.let_go(token) {
            None => return Receipt::ready(Settled::TooLate),
            Some(Held::Local(delivery)) => return delivery.settle(settlement),
            Some(Held::Remote { event, place, attempt, .. }) => (event, place, attempt),
        };
        match settlement {
            Settlement::Done => self.settle_as(place, attempt, What::Done),
            Settlement::DeadLetter { reason } => self.give_up(&event, place, attempt, &reason, attempt),
            Settlement::Retry { after, reason } => {
                self.retry(&event, place, attempt, after, reason.as_deref().unwrap_or("retried too often"))
            }
            // What is not known is given back.
            _ => self.settle_as(place, attempt, What::Release),
        }
    }

    fn extend(&self, token: u64) -> Receipt {
        match self.state.lock().held.get_mut(token) {
            Some(Held::Local(delivery)) => return delivery.extend(),
            Some(Held::Remote { since, .. }) => *since = Instant::now(),
            None => return Receipt::ready(Settled::TooLate),
        }
        Receipt::ready(Settled::Done)
    }

    fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()> {
        match self.state.lock().held.get_mut(token) {
            Some(Held::Local(delivery)) => poll_revoked(delivery, cx),
            Some(Held::Remote { revoked, .. }) => {
                *revoked = Some(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}
