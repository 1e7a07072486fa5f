//! A member of a group: what it has taken and not handed over, and what is in its consumer's hands.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_core::machinery::{Due, InFlight};
use pubsub_core::{
    AckMode, Delivery, Event, Group, Position, Receipt, Result, Settled, Settlement, Settler, SubscribeOptions,
    SubscriptionStatus, Topic, dead_letter,
};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::client::{Remote, decode, store};
use super::server::{Notice, Place, Sent, What};
use super::subscription::{letter_of_malformed, poll_revoked, settled_if};

/// How many deliveries are taken at a time.
const TAKEN_TOGETHER: usize = 32;

/// How long what was taken waits to be asked for before others may have it.
const LINGER: Duration = Duration::from_millis(20);

pub(super) struct Member {
    remote: Arc<Remote>,
    topic: Topic,
    group: Group,
    number: u64,
    options: SubscribeOptions,
    me: Weak<Self>,
    state: Mutex<State>,
    /// The consumer wants more than there is.
    asked: Notify,
    /// How many were taken and not handed over.
    taken: watch::Sender<usize>,
    /// How many are in the consumer's hands.
    held: watch::Sender<usize>,
}

#[derive(Default)]
struct State {
    taken: VecDeque<Sent>,
    held: InFlight<Held>,
    waker: Option<Waker>,
    /// Whether the timer will call for the delivery that is held longest.
    armed: bool,
    ended: bool,
    lagged: u64,
    dead_lettered: u64,
    dropped: u64,
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
    pub(super) fn new(remote: &Arc<Remote>, topic: Topic, group: Group, options: SubscribeOptions) -> Arc<Self> {
        let (remote, number) = (remote.clone(), remote.server.number());
        Arc::new_cyclic(|me| Self {
            remote,
            topic,
            group,
            number,
            options,
            me: me.clone(),
            state: Mutex::default(),
            asked: Notify::new(),
            taken: watch::Sender::new(0),
            held: watch::Sender::new(0),
        })
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    fn record(&self, what: What) -> Receipt {
        let Self { topic, group, number: member, .. } = self;
        self.remote.notices.record(Notice { topic: topic.clone(), group: group.clone(), member: *member, what })
    }

    /// Takes deliveries when the consumer asks, and gives back in time what it then does not want after all.
    pub(super) async fn feed(self: Arc<Self>) {
        let mut changes = self.remote.server.changes();
        loop {
            self.asked.notified().await;
            let sent = loop {
                changes.borrow_and_update();
                let (topic, group, member) = (self.topic.clone(), self.group.clone(), self.number);
                let most = self.options.prefetch.min(TAKEN_TOGETHER);
                let taken = self.remote.link.ask(move |state| state.take(&topic, &group, member, most)).await;
                let Ok((sent, again)) = taken else { return };
                if !sent.is_empty() {
                    break sent;
                }
                let changed = changes.changed();
                match again {
                    Some(again) => drop(timeout_at(again, changed).await),
                    None => drop(changed.await),
                }
            };
            let waker = {
                let mut state = self.state.lock();
                state.taken.extend(sent);
                self.taken.send_replace(state.taken.len());
                state.waker.take()
            };
            waker.into_iter().for_each(Waker::wake);
            let mut taken = self.taken.subscribe();
            if timeout(LINGER, taken.wait_for(|taken| *taken == 0)).await.is_err() {
                let unwanted = std::mem::take(&mut self.state.lock().taken);
                self.taken.send_replace(0);
                let releases = unwanted.iter().map(|sent| self.record(What::Release(sent.place, sent.attempt)));
                // Only when they are back can they be taken again in order.
                futures::future::join_all(releases.collect::<Vec<_>>()).await;
            }
        }
    }

    /// Whether the consumer holds all it may; it is woken when it no longer does.
    pub(super) fn is_full(&self, cx: &Context<'_>, mode: AckMode) -> bool {
        let mut state = self.state.lock();
        let full = mode == AckMode::Manual && !state.ended && state.held.len() >= self.options.max_in_flight;
        if full {
            state.waker = Some(cx.waker().clone());
        }
        full
    }

    /// The next delivery that came from the server.
    pub(super) fn poll_next(&self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        loop {
            let sent = {
                let mut state = self.state.lock();
                if state.ended {
                    return Poll::Ready(None);
                }
                let Some(sent) = state.taken.pop_front() else {
                    state.waker = Some(cx.waker().clone());
                    self.asked.notify_one();
                    return Poll::Pending;
                };
                state.lagged += sent.lagged;
                self.taken.send_replace(state.taken.len());
                sent
            };
            if let Some(delivery) = self.hand_over(sent, mode) {
                return Poll::Ready(Some(Ok(delivery)));
            }
        }
    }

    /// Hands over what can be read and has an attempt left.
    fn hand_over(&self, sent: Sent, mode: AckMode) -> Option<Delivery> {
        let Sent { scope, place, attempt, lagged, .. } = &sent;
        let (place, attempt) = (*place, *attempt);
        let Ok(event) = decode(&sent).map(Arc::new) else {
            self.state.lock().dropped += 1;
            let letter = letter_of_malformed(&self.topic, &self.options, &sent);
            drop(self.record(What::Bury(place, attempt, letter)));
            return None;
        };
        if self.options.retry.is_over(attempt) {
            drop(self.give_up(&event, place, attempt, "attempts exhausted", attempt - 1));
            return None;
        }
        let delivery = match mode {
            AckMode::Auto => {
                drop(self.record(What::Done(place, attempt)));
                Delivery::settled(event, attempt)
            }
            AckMode::Manual => {
                drop(self.record(What::Started(place, attempt)));
                let held = Held::Remote { event: event.clone(), place, attempt, since: Instant::now(), revoked: None };
                self.hold(held, event, attempt)
            }
        };
        Some(delivery.at(scope.clone(), Position::from(place.offset)).after_losing(*lagged))
    }

    /// Hands over a delivery that came from the instance's own queue.
    pub(super) fn hand_over_local(&self, local: Delivery, mode: AckMode) -> Delivery {
        if mode == AckMode::Auto {
            return settled_if(mode, local);
        }
        let (event, attempt, lagged) = (local.event().clone(), local.attempt(), local.lagged());
        self.hold(Held::Local(local), event, attempt).after_losing(lagged)
    }

    fn hold(&self, held: Held, event: Arc<Event>, attempt: u32) -> Delivery {
        let is_remote = matches!(held, Held::Remote { .. });
        let (token, arm) = {
            let mut state = self.state.lock();
            let token = state.held.insert(held);
            self.held.send_replace(state.held.len());
            (token, is_remote && !std::mem::replace(&mut state.armed, true))
        };
        if arm {
            self.remote.timer.call_at(Instant::now() + self.options.max_hold, self.me.clone());
        }
        let me = self.me.upgrade().expect("called on one that is there");
        Delivery::held(event, attempt, me, token)
    }

    /// Takes a delivery out of the consumer's hands.
    fn let_go(&self, token: u64) -> Option<Held> {
        let (held, waker) = {
            let mut state = self.state.lock();
            let held = state.held.remove(token)?;
            self.held.send_replace(state.held.len());
            (held, state.waker.take())
        };
        waker.into_iter().for_each(Waker::wake);
        Some(held)
    }

    fn give_up(&self, event: &Event, place: Place, attempt: u32, reason: &str, attempts: u32) -> Receipt {
        let letter = self.options.dead_letter.as_ref().and_then(|to| {
            let letter = dead_letter(event, &self.topic, Some(&self.group), attempts, reason);
            Some((to.clone(), store(&letter).ok()?))
        });
        let mut state = self.state.lock();
        match letter {
            Some(_) => state.dead_lettered += 1,
            None => {
                state.dropped += 1;
                tracing::warn!(topic = %self.topic, group = %self.group, event = %event.id(), attempts, reason, "a delivery was given up");
            }
        }
        drop(state);
        self.record(What::Bury(place, attempt, letter))
    }

    /// A delivery comes back after a back-off, or is given up if it was tried often enough.
    fn retry(&self, event: &Event, place: Place, attempt: u32, after: Option<Duration>, reason: &str) -> Receipt {
        let policy = &self.options.retry;
        if policy.is_exhausted_after(attempt) {
            return self.give_up(event, place, attempt, reason, attempt);
        }
        let backoff = after.unwrap_or_else(|| policy.backoff_after(attempt, fastrand::f64()));
        self.record(What::Retry(place, attempt, backoff))
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
    pub(super) fn leave(&self) -> u64 {
        let (released, waker) = {
            let mut state = self.state.lock();
            if std::mem::replace(&mut state.ended, true) {
                return 0;
            }
            (std::mem::take(&mut state.taken).len() as u64, state.waker.take())
        };
        drop(self.record(What::Leave));
        waker.into_iter().for_each(Waker::wake);
        released
    }

    /// Takes back all that is held from the server, and returns how much that is.
    pub(super) fn revoke(&self) -> u64 {
        let is_remote = |held: &Held| matches!(held, Held::Remote { .. });
        let tokens: Vec<_> =
            self.state.lock().held.iter().filter(|(_, held)| is_remote(held)).map(|(token, _)| token).collect();
        tokens.iter().for_each(|token| self.take_back(*token, "its holder was closed"));
        tokens.len() as u64
    }

    /// Waits until nothing is in the consumer's hands.
    pub(super) async fn idle(&self) {
        // The sender is this very member's.
        let _ = self.held.subscribe().wait_for(|held| *held == 0).await;
    }

    /// Waits until the group has nothing queued, held or due, anywhere; for one that has left, until it holds nothing.
    pub(super) async fn drained(&self) {
        let mut changes = self.remote.server.changes();
        loop {
            changes.borrow_and_update();
            if self.state.lock().ended {
                return self.idle().await;
            }
            self.remote.notices.flush().await;
            let topic = self.topic.clone();
            let Ok(status) = self.remote.link.ask(move |state| state.status(&topic)).await else { return };
            let group = status.groups.iter().find(|status| status.group == self.group);
            if group.is_none_or(|status| (status.waiting, status.held) == (Some(0), Some(0))) {
                return;
            }
            let _ = changes.changed().await; // the server lives as long as this
        }
    }

    pub(super) fn add_to(&self, status: &mut SubscriptionStatus) {
        let state = self.state.lock();
        status.queued += state.taken.len() as u64;
        status.held = state.held.len() as u64;
        status.lagged += state.lagged;
        status.dead_lettered += state.dead_lettered;
        status.dropped += state.dropped;
        status.ended = state.ended;
    }
}

impl Due for Member {
    fn due(self: Arc<Self>, now: Instant) -> Option<Instant> {
        let until = |held: &Held| match held {
            Held::Remote { since, .. } => Some(*since + self.options.max_hold),
            Held::Local(_) => None,
        };
        let overdue: Vec<_> = {
            let state = self.state.lock();
            let overdue = state.held.iter().filter(|(_, held)| until(held).is_some_and(|until| until <= now));
            overdue.map(|(token, _)| token).collect()
        };
        overdue.iter().for_each(|token| self.take_back(*token, "held for too long"));
        let mut state = self.state.lock();
        let next = state.held.iter().filter_map(|(_, held)| until(held)).min();
        state.armed = next.is_some();
        next
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
            Settlement::Done => self.record(What::Done(place, attempt)),
            Settlement::DeadLetter { reason } => self.give_up(&event, place, attempt, &reason, attempt),
            Settlement::Retry { after, reason } => {
                self.retry(&event, place, attempt, after, reason.as_deref().unwrap_or("retried too often"))
            }
            // What is not known is given back.
            _ => self.record(What::Release(place, attempt)),
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
