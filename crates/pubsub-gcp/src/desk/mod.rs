//! A group of a topic as one instance takes part in it.
//!
//! The service assigns messages to instances, the local queue assigns them to members, as those ask. The local queue also keeps what is
//! to be retried until it is due: its message stays leased, so that nobody else notices, and neither does what comes behind it. Here is
//! what is leased, and what becomes of it on the service.

mod keep;
mod settle;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::Duration;

use futures::FutureExt;
use parking_lot::Mutex;
use pubsub_core::machinery::{self, DeliveryQueue, InFlight};
use pubsub_core::{AckMode, Delivery, Error, Event, Group, Scope, SubscribeOptions, Topic, dead_letter};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub(crate) use self::settle::{Burial, bury_all};
use crate::channel::Channel;
use crate::errors::Fault;
use crate::hub::Remembered;
use crate::message::{Arrival, Content};
use crate::node::Services;
use crate::provision::Spec;
use crate::settle::What;
use crate::stream::{self, Bell, Opening};

/// See the [module](self).
pub(crate) struct Desk {
    pub(crate) services: Arc<Services>,
    pub(crate) channel: Arc<Channel>,
    pub(crate) group: Group,
    spec: Arc<Spec>,
    name: Arc<str>,
    /// Assigns what has come to members, and keeps what is to be retried. It ends with the last member; the next one begins another.
    local: Mutex<Arc<DeliveryQueue>>,
    me: Weak<Self>,
    /// Of the streams there are; they end with it.
    bell: Mutex<Bell>,
    state: Mutex<State>,
    /// How much is in consumers' hands.
    in_hands: watch::Sender<usize>,
    /// How many goodbyes are under way.
    leaving: watch::Sender<usize>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// Marks what came from the service, in the local queue.
    scope: Arc<Scope>,
}

#[derive(Default)]
struct State {
    members: HashMap<u64, Member>,
    next_member: u64,
    leases: HashMap<u64, Lease>,
    by_message: HashMap<Arc<str>, u64>,
    next_lease: u64,
    /// Of the leases, those that nobody has asked for yet.
    ahead: BTreeSet<u64>,
    held: InFlight<Held>,
    /// Of the leases, those on their way to a dead-letter topic.
    dying: HashSet<u64>,
    /// What was acknowledged last, and comes again if that did not arrive.
    acknowledged: Remembered,
    /// Members whose last poll found nothing.
    asking: HashSet<u64>,
    /// Nothing is pulled until somebody asks.
    cold: bool,
    /// When something came or was taken last.
    progress: Option<Instant>,
    renew_at: Option<Instant>,
    armed: Option<Instant>,
    failed: Option<Fault>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    dead_lettered: u64,
    dropped: u64,
}

struct Member {
    options: Arc<SubscribeOptions>,
    held: usize,
    left: bool,
}

/// A message that is this instance's for now.
struct Lease {
    ack_id: String,
    message_id: Arc<str>,
    event: Arc<Event>,
    /// Until when it is certainly this instance's.
    until: Instant,
}

/// What is in a consumer's hands.
struct Held {
    /// Its delivery in the local queue.
    inner: Delivery,
    /// None if it never left the instance.
    lease: Option<u64>,
    attempt: u32,
    member: u64,
    revoked: Option<Waker>,
}

impl State {
    fn present(&self) -> impl Iterator<Item = &Member> {
        self.members.values().filter(|member| !member.left)
    }

    fn has_members(&self) -> bool {
        self.present().next().is_some()
    }

    /// A message is this instance's from now on. Returns the number of its lease.
    fn lease(&mut self, ack_id: String, message_id: String, event: Arc<Event>, until: Instant) -> u64 {
        let (number, message_id) = (self.next_lease, Arc::<str>::from(message_id));
        self.next_lease += 1;
        self.by_message.insert(message_id.clone(), number);
        self.leases.insert(number, Lease { ack_id, message_id, event, until });
        number
    }

    /// Ends a lease.
    fn remove(&mut self, lease: u64) -> Option<Lease> {
        self.ahead.remove(&lease);
        let removed = self.leases.remove(&lease)?;
        self.by_message.remove(&removed.message_id);
        Some(removed)
    }
}

impl Desk {
    pub(crate) fn new(
        services: Arc<Services>,
        channel: Arc<Channel>,
        group: Group,
        spec: Spec,
        local: Arc<DeliveryQueue>,
    ) -> Arc<Self> {
        let state = State { cold: true, ..State::default() };
        let name = spec.name().into();
        let desk = Arc::new_cyclic(|me| Self {
            services,
            channel,
            group,
            spec: Arc::new(spec),
            name,
            local: Mutex::new(local),
            me: me.clone(),
            bell: Mutex::new(Bell::new()),
            state: Mutex::new(state),
            in_hands: watch::Sender::new(0),
            leaving: watch::Sender::new(0),
            tasks: Mutex::default(),
            scope: Arc::new(Scope::new("lease", "0").expect("letters make a scope")),
        });
        desk.services.provision.remember(&desk.spec);
        desk
    }

    /// Starts its streams, unless they are there.
    pub(crate) fn start(self: &Arc<Self>) {
        let mut tasks = self.tasks.lock();
        tasks.retain(|task| !task.is_finished());
        let opening = Opening {
            subscription: self.name.clone(),
            deadline: self.services.deadline(),
            client_id: self.services.instance.clone(),
        };
        for _ in tasks.len()..self.services.options.streams {
            tasks.push(stream::start(self, &self.bell.lock(), self.services.link.clone(), opening.clone()));
        }
    }

    pub(crate) fn local(&self) -> Arc<DeliveryQueue> {
        self.local.lock().clone()
    }

    /// Begins another local queue. What only the last one had goes back.
    pub(crate) fn set_local(&self, local: Arc<DeliveryQueue>) {
        *self.local.lock() = local;
        self.release_unheld();
    }

    fn ring(&self) {
        self.bell.lock().ring();
    }

    fn topic(&self) -> &Topic {
        &self.channel.topic
    }

    // Members.

    /// Adds a member.
    pub(crate) fn join(&self, options: SubscribeOptions) -> u64 {
        let mut state = self.state.lock();
        let number = state.next_member;
        state.next_member += 1;
        state.members.insert(number, Member { options: Arc::new(options), held: 0, left: false });
        number
    }

    /// A member leaves; what it holds it may still settle. Returns whether it was the last.
    pub(crate) fn leave(&self, number: u64) -> bool {
        let last = {
            let mut state = self.state.lock();
            let Some(member) = state.members.get_mut(&number).filter(|member| !member.left) else { return false };
            member.left = true;
            if member.held == 0 {
                state.members.remove(&number);
            }
            state.asking.remove(&number);
            !state.has_members()
        };
        if last {
            self.farewell();
        }
        last
    }

    /// After the last member: gives back what nobody holds, and ends the streams.
    fn farewell(&self) {
        let (tasks, bell) = {
            let mut tasks = self.tasks.lock();
            if self.state.lock().has_members() {
                return; // somebody came meanwhile
            }
            (std::mem::take(&mut *tasks), std::mem::replace(&mut *self.bell.lock(), Bell::new()))
        };
        drop(bell);
        self.release_unheld();
        let Some(me) = self.me.upgrade().filter(|_| !tasks.is_empty()) else { return };
        self.leaving.send_modify(|count| *count += 1);
        self.services.timer.runtime().spawn(async move {
            stream::wind_up(tasks, Instant::now() + crate::node::UNHEARD_WORDS).await;
            me.leaving.send_modify(|count| *count -= 1);
        });
    }

    /// Waits until the streams of members that have left have ended.
    pub(crate) async fn stopped(&self) {
        // The sender is this very desk's.
        let _ = self.leaving.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Gives up what its streams are still doing.
    pub(crate) fn abort(&self) {
        self.tasks.lock().drain(..).for_each(|task| task.abort());
    }

    /// What was taken and nobody holds.
    pub(crate) fn unheld(&self) -> u64 {
        let state = self.state.lock();
        state.leases.len().saturating_sub(state.held.len()) as u64
    }

    /// Ends its members' streams with an error.
    pub(super) fn end_with(&self, fault: Fault) {
        self.state.lock().failed.get_or_insert(fault);
        self.local().end();
    }

    /// The error its members' streams end with.
    pub(crate) fn failure(&self) -> Option<Error> {
        let fault = self.state.lock().failed.clone()?;
        Some(Error::from(fault).during("read").on(&self.group))
    }

    // What comes.

    /// Puts what has come where members find it; what nobody can take goes back.
    fn arrive(&self, arrivals: Vec<Arrival>) {
        let now = Instant::now();
        let until = now + self.services.options.ack_deadline;
        let (mut entries, mut acked, mut back, mut malformed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        {
            let mut state = self.state.lock();
            let wanted = state.has_members() && state.failed.is_none();
            for arrival in arrivals {
                let Arrival { ack_id, message_id, published, topic, content } = arrival;
                if state.acknowledged.knows(&message_id) {
                    acked.push(ack_id);
                    continue;
                }
                let known = state.by_message.get(&*message_id).copied();
                if let Some(lease) = known.and_then(|known| state.leases.get_mut(&known)) {
                    // It was sent again although it is held here: it is this ack id that counts now.
                    (lease.ack_id, lease.until) = (ack_id, until);
                    continue;
                }
                match content {
                    Content::Event { event, .. } if !self.channel.route.admits(topic.as_deref(), event.run_id()) => {
                        acked.push(ack_id);
                    }
                    _ if !wanted => back.push(ack_id),
                    Content::Event { event, attempt } => {
                        let number = state.lease(ack_id, message_id, event.clone(), until);
                        state.ahead.insert(number);
                        entries.push(machinery::Entry::new(event).attempt(attempt).at(self.scope.clone(), number));
                    }
                    Content::Malformed { bytes, why } => {
                        state.counts.dropped += 1;
                        let stand_in = Arc::new(Arrival::stand_in(&message_id, published, &bytes));
                        let number = state.lease(ack_id, message_id, stand_in.clone(), until);
                        malformed.push((number, stand_in, why));
                    }
                }
            }
            if !entries.is_empty() {
                state.progress = Some(now);
            }
        }
        self.services.settle(&self.name, acked, What::Ack);
        self.services.settle(&self.name, back, What::Deadline(0));
        if !entries.is_empty() {
            // Where the service sends more than it was asked for, the local queue takes it all the same: its bound makes publishers of
            // local events wait, and loses nothing as long as it is told to take what it has room for.
            let left = self.offer(entries);
            self.release(|lease| left.contains(&lease));
        }
        for (lease, stand_in, why) in malformed {
            self.channel.warn(&stand_in.id().to_string(), &why);
            let to = self.state.lock().members.values().find_map(|member| member.options.dead_letter.clone());
            let letter = to.map(|to| (to, dead_letter(&stand_in, self.topic(), Some(&self.group), 1, "not an event")));
            drop(self.bury(lease, letter, None));
        }
        self.arm();
    }

    /// Offers entries to the local queue, and returns the leases it had no room for.
    fn offer(&self, entries: Vec<machinery::Entry>) -> BTreeSet<u64> {
        let local = self.local();
        let mut entries = entries.into_iter();
        self.channel.exclusively(|aftermath| {
            let room = local.room();
            local.push(entries.by_ref().take(room), aftermath);
        });
        entries.filter_map(|entry| entry.position()).map(|position| position.major).collect()
    }

    // Asking and handing over.

    /// A member's poll found nothing.
    pub(crate) fn ask(&self, number: u64) {
        {
            let mut state = self.state.lock();
            let busy = |member: &Member| member.left || member.held >= member.options.max_in_flight;
            if state.members.get(&number).is_none_or(busy) || (!state.asking.insert(number) && !state.cold) {
                return;
            }
            state.cold = false;
        }
        self.ring();
    }

    /// Hands over what the local queue gave a member; none if it is not this instance's any more, or was given up.
    pub(crate) fn hand_over(self: &Arc<Self>, number: u64, inner: Delivery, mode: AckMode) -> Option<Delivery> {
        let lease = inner.cursor().map(|cursor| cursor.position().major);
        let (event, attempt, lagged) = (inner.event().clone(), inner.attempt(), inner.lagged());
        let (options, gone, ring) = {
            let mut state = self.state.lock();
            let gone = lease.is_some_and(|lease| !state.leases.contains_key(&lease));
            if let Some(lease) = lease
                && state.ahead.remove(&lease)
            {
                state.progress = Some(Instant::now());
            }
            state.asking.remove(&number);
            (state.members.get(&number).map(|member| member.options.clone()), gone, state.ahead.is_empty())
        };
        if ring {
            self.ring();
        }
        let (Some(options), false) = (options, gone) else {
            drop(inner.done()); // it went back meanwhile
            return None;
        };
        if let Some(lease) = lease
            && options.retry.is_over(attempt)
        {
            drop(self.give_up(lease, &event, attempt - 1, "attempts exhausted", &options, Some(inner)));
            return None;
        }
        let delivery = match mode {
            AckMode::Auto => {
                drop(inner.done());
                if let Some(lease) = lease {
                    drop(self.acknowledge(lease));
                }
                Delivery::settled(event, attempt)
            }
            AckMode::Manual => {
                let token = self.hold(Held { inner, lease, attempt, member: number, revoked: None });
                Delivery::held(event, attempt, self.clone(), token)
            }
        };
        Some(delivery.after_losing(lagged))
    }

    fn hold(&self, held: Held) -> u64 {
        let mut state = self.state.lock();
        if let Some(member) = state.members.get_mut(&held.member) {
            member.held += 1;
        }
        let token = state.held.insert(held);
        self.in_hands.send_replace(state.held.len());
        token
    }

    /// Takes a delivery out of a consumer's hands.
    fn let_go(&self, token: u64) -> Option<(Held, Option<Arc<SubscribeOptions>>)> {
        let mut state = self.state.lock();
        let held = state.held.remove(token)?;
        let mut options = None;
        if let Some(member) = state.members.get_mut(&held.member) {
            member.held -= 1;
            options = Some(member.options.clone());
            if member.left && member.held == 0 {
                state.members.remove(&held.member);
            }
        }
        self.in_hands.send_replace(state.held.len());
        Some((held, options))
    }

    /// Waits until nothing is in consumers' hands.
    pub(crate) async fn idle(&self) {
        // The sender is this very desk's.
        let _ = self.in_hands.subscribe().wait_for(|held| *held == 0).await;
    }

    /// Takes back all that is held, and returns how much that is.
    pub(crate) fn revoke(&self) -> u64 {
        let tokens: Vec<_> = self.state.lock().held.iter().map(|(token, _)| token).collect();
        let taken: Vec<_> = tokens.into_iter().filter_map(|token| self.let_go(token)).collect();
        let count = taken.len() as u64;
        for (Held { inner, lease, revoked, .. }, _) in taken {
            drop(inner.done());
            if let Some(lease) = lease {
                drop(self.give_back(lease, Duration::ZERO));
            }
            revoked.into_iter().for_each(Waker::wake);
        }
        count
    }

    /// Whether somebody else has a delivery by now.
    fn is_revoked(inner: &Delivery) -> bool {
        inner.revoked().now_or_never().is_some()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.services.timer.target_gone();
    }
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").field("topic", self.topic()).field("group", &self.group).finish_non_exhaustive()
    }
}
