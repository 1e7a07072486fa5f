//! One bounded queue of deliveries with members that ask for work: a fan-out subscription has one member, a group has many.
//!
//! Work is assigned when a member asks, so a member that never asks holds nothing back. Lock order: a backend's own locks,
//! then the queue's state; nothing else is locked under the state, and wakers, sinks and timers are called without it.

use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::BoxFuture;
use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{Due, InFlight, RetryQueue, Timer};
use crate::{
    AckMode, Control, Delivery, Event, Group, Overflow, Position, Receipt, Result, Scope, Settled, Settlement, Settler, Source,
    SubscribeOptions, Subscription, SubscriptionStatus, Timestamp, Topic, dead_letter,
};

/// Which instance of a bus a member belongs to: members of one queue may belong to several.
pub type InstanceId = u64;

/// Wakers collected under a lock, to be woken after it.
pub type Wakers = SmallVec<[Waker; 4]>;

/// How long a member that was woken may take to ask before others are woken too: the bound on how long a consumer that
/// stopped polling can delay what it was woken for.
const WAKE_PATIENCE: Duration = Duration::from_millis(2);

/// How many deliveries a member may take in a row before it yields to its runtime.
const BUDGET: u32 = 128;

/// How often a member that finds nothing looks again before it waits to be woken. Waking a parked thread costs publisher and
/// consumer several times what handing over a delivery does.
static LINGER_: std::sync::LazyLock<u32> = std::sync::LazyLock::new(|| std::env::var("LINGER").ok().and_then(|s| s.parse().ok()).unwrap_or(4));

/// Where exhausted deliveries go.
pub trait DeadLetterSink: Send + Sync + 'static {
    /// Takes a dead letter for a topic. `None` means it has been taken; a future is run by the queue, and until it ends the
    /// delivery it came from counts as unsettled.
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>>;
}

/// An event on its way into a queue.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The event.
    pub event: Arc<Event>,
    /// Its attempt: 1, unless a server counted more.
    pub attempt: u32,
    /// Where it stands in its topic, where that is retained.
    pub place: Option<(Arc<Scope>, Position)>,
    /// The one instance it is for, if it is local to one.
    pub only: Option<InstanceId>,
}

impl Entry {
    /// An event at its first attempt, for any instance, retained nowhere.
    pub fn new(event: Arc<Event>) -> Self {
        Self { event, attempt: 1, place: None, only: None }
    }
}

/// A queue's contents, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueStatus {
    /// Not handed to a member, retries that wait included.
    pub waiting: u64,
    /// Handed over and not settled.
    pub held: u64,
    /// Age of the oldest event in it.
    pub oldest: Option<Duration>,
    /// Members.
    pub members: u64,
}

/// A bounded queue of deliveries; see the [module](super).
pub struct DeliveryQueue {
    topic: Topic,
    /// The group it serves; none for the queue of one fan-out subscription.
    group: Option<Group>,
    /// Whether it outlives its members.
    durable: bool,
    /// Itself, for the deliveries and deadlines it hands out.
    me: Weak<Self>,
    timer: Arc<Timer>,
    sink: Arc<dyn DeadLetterSink>,
    state: Mutex<State>,
    /// Entries that count towards the bound; changed under the state's lock, read without.
    len: AtomicUsize,
    capacity: AtomicUsize,
    /// Whether it loses the oldest rather than make publishers wait: as a durable group, or because all its members chose to.
    lossy: AtomicBool,
    /// Entries in the hands of the only member's source, not handed over yet (fan-out).
    stashed: AtomicUsize,
    /// Publishers waiting for room, and the bell they wait for.
    room_wanted: AtomicUsize,
    room: Notify,
    /// Waiters for the queue to drain, and the bell they wait for.
    drain_wanted: AtomicUsize,
    drained: Notify,
}

#[derive(Default)]
struct State {
    /// What was pushed, bounded.
    ready: VecDeque<Item>,
    /// What was pushed for one instance only; counts towards the same bound.
    local: Vec<(InstanceId, VecDeque<Item>)>,
    /// What came back: retries that are due and releases. Goes before what is ready.
    returned: VecDeque<Item>,
    delayed: RetryQueue<Item>,
    held: InFlight<Held>,
    members: InFlight<Member>,
    /// Members that asked and found nothing, longest first.
    parked: VecDeque<u64>,
    /// The member that was woken and has not asked yet.
    woken: Option<u64>,
    /// Dead letters on their way.
    dying: usize,
    /// Lost right before the next entry that is ready.
    lagged: u64,
    counts: Counts,
    /// When the timer will call, the earliest last.
    armed: SmallVec<[Instant; 4]>,
    /// When the delivery held longest reaches its limit, or earlier.
    hold_due: Option<Instant>,
    ended: bool,
}

#[derive(Default)]
struct Counts {
    lagged: u64,
    dead_lettered: u64,
    dropped: u64,
}

struct Item {
    entry: Entry,
    lagged: u64,
}

struct Member {
    instance: InstanceId,
    options: Arc<SubscribeOptions>,
    waker: Option<Waker>,
    parked: bool,
    held: usize,
}

struct Held {
    entry: Entry,
    member: u64,
    instance: InstanceId,
    options: Arc<SubscribeOptions>,
    since: Instant,
    waker: Option<Waker>,
}

/// What is to be done once the state's lock is released.
#[derive(Default)]
struct After {
    wakers: Wakers,
    arm: Option<Instant>,
    letters: SmallVec<[Letter; 1]>,
    room: bool,
    drained: bool,
}

enum Take {
    Delivery(Delivery),
    Nothing,
    Ended,
    Again,
}

struct Letter {
    event: Arc<Event>,
    attempts: u32,
    reason: Box<str>,
    topic: Option<Topic>,
}

impl DeliveryQueue {
    /// The queue of one fan-out subscription.
    pub fn fan_out(topic: Topic, timer: Arc<Timer>, sink: Arc<dyn DeadLetterSink>) -> Arc<Self> {
        Self::new(topic, None, None, timer, sink)
    }

    /// The queue of a group that ends with its last member.
    pub fn group(topic: Topic, group: Group, timer: Arc<Timer>, sink: Arc<dyn DeadLetterSink>) -> Arc<Self> {
        Self::new(topic, Some(group), None, timer, sink)
    }

    /// The queue of a group that outlives its members. It holds up to `capacity` entries; it makes no publisher wait and loses
    /// the oldest beyond that.
    pub fn durable_group(
        topic: Topic,
        group: Group,
        capacity: usize,
        timer: Arc<Timer>,
        sink: Arc<dyn DeadLetterSink>,
    ) -> Arc<Self> {
        Self::new(topic, Some(group), Some(capacity), timer, sink)
    }

    fn new(
        topic: Topic,
        group: Option<Group>,
        durable: Option<usize>,
        timer: Arc<Timer>,
        sink: Arc<dyn DeadLetterSink>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            topic,
            group,
            durable: durable.is_some(),
            me: me.clone(),
            timer,
            sink,
            state: Mutex::default(),
            len: AtomicUsize::new(0),
            capacity: AtomicUsize::new(durable.unwrap_or(1)),
            lossy: AtomicBool::new(durable.is_some()),
            stashed: AtomicUsize::new(0),
            room_wanted: AtomicUsize::new(0),
            room: Notify::new(),
            drain_wanted: AtomicUsize::new(0),
            drained: Notify::new(),
        })
    }

    /// The group it serves; none for fan-out.
    pub fn group_name(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// Makes a subscription of a new member; none if the queue has ended, as a group's does when its last member leaves. `on_end`
    /// is called once, without any lock of the queue, when the member has left in whatever way.
    pub fn join(
        self: &Arc<Self>,
        instance: InstanceId,
        options: SubscribeOptions,
        on_end: impl Fn() + Send + Sync + 'static,
    ) -> Option<Subscription> {
        // A fan-out member's source takes up to half of its bound in one go; the other half stays open to publishers.
        let (capacity, stash) = match self.group {
            Some(_) => (options.prefetch, 0),
            None => (options.prefetch.div_ceil(2), options.prefetch / 2),
        };
        let member = {
            let mut state = self.state.lock();
            if state.ended {
                return None;
            }
            let member = Member { instance, options: Arc::new(options.clone()), waker: None, parked: false, held: 0 };
            let member = state.members.insert(member);
            self.lossy.store(self.durable || state.is_lossy(), Ordering::Relaxed);
            member
        };
        if !self.durable {
            self.capacity.fetch_max(capacity, Ordering::Relaxed);
        }
        let membership = Membership { queue: self.clone(), member, ended: AtomicBool::new(false), on_end: Box::new(on_end) };
        let membership = Arc::new(membership);
        let source = QueueSource { membership: membership.clone(), stash: VecDeque::new(), take: stash + 1, budget: BUDGET, lingered: 0 };
        Some(Subscription::new(self.topic.clone(), options, Box::new(source), membership))
    }

    /// How many entries can be pushed without losing any to the bound, or any number if its members chose to lose the oldest.
    /// Only pushing makes it less.
    pub fn room(&self) -> usize {
        if self.lossy.load(Ordering::Relaxed) {
            return usize::MAX;
        }
        self.capacity.load(Ordering::Relaxed).saturating_sub(self.len.load(Ordering::Acquire))
    }

    /// Waits until there may be room again, or the queue has ended. Cancel safe.
    pub async fn room_freed(&self) {
        let freed = self.room.notified();
        let mut freed = std::pin::pin!(freed);
        freed.as_mut().enable();
        let _wanted = Wanted::new(&self.room_wanted);
        if self.room() == 0 && !self.is_ended() {
            freed.await;
        }
    }

    /// Whether it outlives its members.
    pub fn is_durable(&self) -> bool {
        self.durable
    }

    /// Whether it has ended: it takes and gives nothing more.
    pub fn is_ended(&self) -> bool {
        self.state.lock().ended
    }

    /// Whether what waits here can be taken without this instance: by members of others, or by members to come.
    pub fn is_shared_beyond(&self, instance: InstanceId) -> bool {
        self.durable || self.state.lock().members.iter().any(|(_, member)| member.instance != instance)
    }

    /// Adds entries, in order. Beyond the bound the oldest are lost, and the next one handed over says how many: a caller that
    /// wants to lose none asks for [`room`](Self::room) first, under a lock that keeps other publishers out.
    ///
    /// Entries local to an instance without a member are refused by doing nothing.
    pub fn push(&self, entries: impl IntoIterator<Item = Entry>, wakers: &mut Wakers) {
        let mut after = After::default();
        {
            let mut state = self.state.lock();
            let state = &mut *state;
            if state.ended {
                return;
            }
            for entry in entries {
                let item = Item { entry, lagged: 0 };
                match item.entry.only {
                    // A fan-out queue has one member; its backend pushes only what is for it.
                    Some(instance) if self.group.is_some() => {
                        if !state.members.iter().any(|(_, member)| member.instance == instance) {
                            continue;
                        }
                        state.local_of(instance).push_back(item);
                    }
                    _ => state.ready.push_back(item),
                }
            }
            let capacity = self.capacity.load(Ordering::Relaxed);
            let mut len = state.bounded_len();
            while len > capacity && state.lose_oldest() {
                len -= 1;
            }
            self.len.store(len, Ordering::Release);
            self.wake(state, &mut after);
        }
        wakers.append(&mut after.wakers);
        self.finish(after);
    }

    /// Ends the queue: what waits is dropped, members' streams end. Returns how many entries were dropped.
    pub fn end(&self) -> u64 {
        let mut after = After::default();
        let dropped = {
            let mut state = self.state.lock();
            let dropped = self.end_state(&mut state, &mut after);
            let members: Vec<u64> = state.members.iter().map(|(token, _)| token).collect();
            for token in members {
                after.wakers.extend(state.members.remove(token).and_then(|member| member.waker));
            }
            dropped
        };
        self.finish(after);
        dropped
    }

    /// Forgets what waits and does not pass; members stay, and what is held stays held. Returns how many were forgotten.
    pub fn retain(&self, keep: impl Fn(&Event) -> bool) -> u64 {
        let forgotten = {
            let mut state = self.state.lock();
            let before = state.waiting();
            let keeps = |item: &Item| keep(&item.entry.event);
            state.ready.retain(keeps);
            state.returned.retain(keeps);
            state.local.iter_mut().for_each(|(_, items)| items.retain(keeps));
            state.delayed.retain(keeps);
            self.len.store(state.bounded_len(), Ordering::Release);
            before - state.waiting()
        };
        self.finish(After { room: true, drained: true, ..After::default() });
        forgotten
    }

    /// Takes back all that this instance's members hold, as if they had died: they are retries for the others, if there are
    /// any. Returns how many were held.
    pub fn revoke(&self, instance: InstanceId) -> u64 {
        let mut after = After { drained: true, ..After::default() };
        let count = {
            let mut state = self.state.lock();
            let tokens: Vec<u64> =
                state.held.iter().filter(|(_, held)| held.instance == instance).map(|(token, _)| token).collect();
            for token in &tokens {
                self.take_back(&mut state, *token, "its holder was closed", &mut after);
            }
            self.wake(&mut state, &mut after);
            tokens.len() as u64
        };
        self.finish(after);
        count
    }

    /// Whether nothing is queued, held, or due to come back.
    pub fn is_drained(&self) -> bool {
        let state = self.state.lock();
        self.stashed.load(Ordering::SeqCst) == 0
            && state.held.is_empty()
            && state.dying == 0
            && state.returned.is_empty()
            && state.delayed.is_empty()
            && state.bounded_len() == 0
    }

    /// Waits until [`is_drained`](Self::is_drained). Cancel safe.
    pub async fn drained(&self) {
        self.when(|queue| queue.is_drained()).await;
    }

    /// Waits until this instance's [`burden`](Self::burden) is nothing. Cancel safe.
    pub async fn relieved(&self, instance: InstanceId) {
        self.when(|queue| queue.burden(instance) == (0, 0)).await;
    }

    async fn when(&self, reached: impl Fn(&Self) -> bool) {
        let _wanted = Wanted::new(&self.drain_wanted);
        loop {
            let changed = self.drained.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if reached(self) {
                return;
            }
            changed.await;
        }
    }

    /// How many this instance's members hold, and how many wait that only they could take.
    pub fn burden(&self, instance: InstanceId) -> (u64, u64) {
        let state = self.state.lock();
        let held = state.held.iter().filter(|(_, held)| held.instance == instance).count() as u64;
        let others = self.durable || state.members.iter().any(|(_, member)| member.instance != instance);
        let waiting = if others { 0 } else { state.waiting() + self.stashed.load(Ordering::SeqCst) as u64 };
        (held, waiting)
    }

    /// What is in it. The age of the oldest is by the clock that stamped it.
    pub fn status(&self) -> QueueStatus {
        let state = self.state.lock();
        let queued = state.ready.front().into_iter().chain(state.returned.iter()).chain(state.delayed.iter());
        let queued = queued.chain(state.local.iter().flat_map(|(_, items)| items)).map(|item| &item.entry);
        let oldest = queued.chain(state.held.iter().map(|(_, held)| &held.entry)).map(|entry| entry.event.created_at()).min();
        let age = |time: Timestamp| {
            Duration::from_millis(Timestamp::now().as_millis().saturating_sub(time.as_millis()).try_into().unwrap_or(0))
        };
        QueueStatus {
            waiting: state.waiting() + self.stashed.load(Ordering::SeqCst) as u64,
            held: state.held.len() as u64,
            oldest: oldest.map(age),
            members: state.members.len() as u64,
        }
    }

    /// What a member asks for: the next delivery, or to be woken when there is one.
    fn poll_take(
        self: &Arc<Self>,
        member: u64,
        stash: &mut VecDeque<Item>,
        take: usize,
        cx: &mut Context<'_>,
        mode: AckMode,
    ) -> Poll<Option<Result<Delivery>>> {
        loop {
            let mut after = After::default();
            let mut state = self.state.lock();
            let polled = self.take(&mut state, member, stash, take, cx, mode, &mut after);
            drop(state);
            self.finish(after);
            match polled {
                Take::Delivery(delivery) => return Poll::Ready(Some(Ok(delivery))),
                Take::Ended => return Poll::Ready(None),
                Take::Nothing => return Poll::Pending,
                Take::Again => {}
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // one caller, which only adds the lock
    fn take(
        self: &Arc<Self>,
        state: &mut MutexGuard<'_, State>,
        token: u64,
        stash: &mut VecDeque<Item>,
        take: usize,
        cx: &mut Context<'_>,
        mode: AckMode,
        after: &mut After,
    ) -> Take {
        let state = &mut **state;
        if state.woken == Some(token) {
            state.woken = None;
        }
        let Some(member) = state.members.get_mut(token) else { return Take::Ended };
        if mode == AckMode::Manual && member.held >= member.options.max_in_flight {
            // Woken by a settlement; meanwhile the work is for others.
            set_waker(&mut member.waker, cx);
            self.wake(state, after);
            return Take::Nothing;
        }
        let (instance, options) = (member.instance, member.options.clone());
        let item = match stash.pop_front() {
            Some(item) => Some(item),
            None => state.next_for(instance),
        };
        let Some(item) = item else {
            let member = state.members.get_mut(token).expect("looked up above");
            set_waker(&mut member.waker, cx);
            if !mem::replace(&mut member.parked, true) {
                state.parked.push_back(token);
            }
            return Take::Nothing;
        };
        // A fan-out member takes more while it has the lock; nobody else could.
        if self.group.is_none() && stash.is_empty() {
            let more = (take - 1).min(state.ready.len());
            if more == state.ready.len() {
                mem::swap(stash, &mut state.ready);
            } else {
                stash.extend(state.ready.drain(..more));
            }
        }
        self.stashed.store(stash.len(), Ordering::Relaxed);
        self.len.store(state.bounded_len(), Ordering::Release);
        after.room = true;
        self.wake(state, after);
        let Item { entry, lagged } = item;
        if options.retry.is_over(entry.attempt) {
            // Counted elsewhere: by a server, or by a member with a more patient policy.
            let reason = "attempts exhausted".into();
            self.give_up(state, entry.event, entry.attempt - 1, reason, &options, after);
            return Take::Again;
        }
        let (event, attempt, place) = (entry.event.clone(), entry.attempt, entry.place.clone());
        let delivery = match mode {
            AckMode::Auto => {
                after.drained = true;
                Delivery::settled(event, attempt)
            }
            AckMode::Manual => {
                let now = Instant::now();
                let held = Held { entry, member: token, instance, options: options.clone(), since: now, waker: None };
                let in_flight = state.held.insert(held);
                state.members.get_mut(token).expect("looked up above").held += 1;
                let until = now + options.max_hold;
                if state.hold_due.is_none_or(|due| until < due) {
                    state.hold_due = Some(until);
                    state.want(until, after);
                }
                Delivery::held(event, attempt, self.clone(), in_flight)
            }
        };
        let delivery = delivery.after_losing(lagged);
        Take::Delivery(match place {
            Some((scope, position)) => delivery.at(scope, position),
            None => delivery,
        })
    }

    /// Wakes one member if there is work that nobody was woken for.
    fn wake(&self, state: &mut State, after: &mut After) {
        if self.group.is_none() {
            // The only member; its waker is there exactly while it waits.
            if (!state.ready.is_empty() || !state.returned.is_empty())
                && let Some(token) = state.parked.pop_front()
            {
                after.wakers.extend(state.unpark(token));
            }
            return;
        }
        for (instance, items) in &state.local {
            let of_instance = |token: &u64| state.members.get(*token).is_some_and(|member| member.instance == *instance);
            if !items.is_empty()
                && let Some(place) = state.parked.iter().position(of_instance)
            {
                let token = state.parked.remove(place).expect("found just now");
                after.wakers.extend(state.members.get_mut(token).and_then(|member| {
                    member.parked = false;
                    member.waker.take()
                }));
            }
        }
        if state.woken.is_some() || (state.ready.is_empty() && state.returned.is_empty()) {
            return;
        }
        while let Some(token) = state.parked.pop_front() {
            if let Some(waker) = state.unpark(token) {
                state.woken = Some(token);
                after.wakers.push(waker);
                if !state.parked.is_empty() {
                    // Should it not ask in time, the others are woken too.
                    state.want(Instant::now() + WAKE_PATIENCE, after);
                }
                return;
            }
        }
    }

    /// Gives a delivery up: to the dead-letter topic once the lock is released, or dropped with a warning.
    fn give_up(
        &self,
        state: &mut State,
        event: Arc<Event>,
        attempts: u32,
        reason: Box<str>,
        options: &SubscribeOptions,
        after: &mut After,
    ) {
        match &options.dead_letter {
            Some(_) => {
                state.counts.dead_lettered += 1;
                state.dying += 1;
            }
            None => state.counts.dropped += 1,
        }
        after.letters.push(Letter { event, attempts, reason, topic: options.dead_letter.clone() });
    }

    /// Hands a letter to the sink. Returns a receipt that resolves when it has been taken.
    fn bury(&self, letter: Letter) -> Receipt {
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
        match self.sink.take(&target, letter) {
            None => {
                self.buried();
                Receipt::ready(Settled::Done)
            }
            Some(taking) => {
                let (answer, receipt) = Receipt::pending();
                let queue = self.me.clone();
                self.timer.runtime().spawn(async move {
                    taking.await;
                    if let Some(queue) = queue.upgrade() {
                        queue.buried();
                    }
                    let _ = answer.send(Settled::Done); // nobody may be waiting
                });
                receipt
            }
        }
    }

    fn buried(&self) {
        self.state.lock().dying -= 1;
        self.finish(After { drained: true, ..After::default() });
    }

    /// Puts what is held back into the queue, one attempt higher, or gives it up.
    fn take_back(&self, state: &mut State, token: u64, reason: &str, after: &mut After) {
        let Some(held) = state.held.remove(token) else { return };
        after.wakers.extend(held.waker);
        state.let_go(held.member, after);
        if state.ended {
            return;
        }
        if held.options.retry.is_exhausted_after(held.entry.attempt) {
            self.give_up(state, held.entry.event, held.entry.attempt, reason.into(), &held.options, after);
        } else {
            let entry = Entry { attempt: held.entry.attempt + 1, ..held.entry };
            state.give_back(entry, self.group.is_some());
        }
    }

    fn end_state(&self, state: &mut State, after: &mut After) -> u64 {
        state.ended = true;
        let dropped = state.forget_waiting();
        self.len.store(0, Ordering::Release);
        for token in mem::take(&mut state.parked) {
            after.wakers.extend(state.unpark(token));
        }
        dropped
    }

    fn leave(&self, token: u64) {
        let mut after = After { room: true, drained: true, ..After::default() };
        {
            let mut state = self.state.lock();
            let state = &mut *state;
            let Some(member) = state.members.remove(token) else { return };
            after.wakers.extend(member.waker);
            state.parked.retain(|parked| *parked != token);
            if state.woken == Some(token) {
                state.woken = None;
            }
            if !state.members.iter().any(|(_, other)| other.instance == member.instance) {
                state.local.retain(|(instance, _)| *instance != member.instance);
                self.len.store(state.bounded_len(), Ordering::Release);
            }
            self.lossy.store(self.durable || state.is_lossy(), Ordering::Relaxed);
            if state.members.is_empty() && !self.durable {
                self.end_state(state, &mut after);
            } else {
                self.wake(state, &mut after);
            }
        }
        self.finish(after);
    }

    /// Does what must not be done under the lock. Returns the receipt of a dead letter, if there was one.
    fn finish(&self, after: After) -> Option<Receipt> {
        let After { wakers, arm, letters, room, drained } = after;
        if let Some(when) = arm {
            let me: Weak<dyn Due> = self.me.clone();
            self.timer.call_at(when, me);
        }
        wakers.into_iter().for_each(Waker::wake);
        if room && self.room_wanted.load(Ordering::SeqCst) > 0 {
            self.room.notify_waiters();
        }
        let receipt = letters.into_iter().map(|letter| self.bury(letter)).last();
        if drained && self.drain_wanted.load(Ordering::SeqCst) > 0 {
            self.drained.notify_waiters();
        }
        receipt
    }
}

impl State {
    /// Whether all members chose to lose the oldest: one that wants to lose nothing decides for all.
    fn is_lossy(&self) -> bool {
        !self.members.is_empty() && self.members.iter().all(|(_, member)| member.options.overflow == Overflow::DropOldest)
    }

    fn local_of(&mut self, instance: InstanceId) -> &mut VecDeque<Item> {
        let place = self.local.iter().position(|(of, _)| *of == instance).unwrap_or_else(|| {
            self.local.push((instance, VecDeque::new()));
            self.local.len() - 1
        });
        &mut self.local[place].1
    }

    fn bounded_len(&self) -> usize {
        self.ready.len() + self.local.iter().map(|(_, items)| items.len()).sum::<usize>()
    }

    fn waiting(&self) -> u64 {
        (self.bounded_len() + self.returned.len() + self.delayed.len()) as u64
    }

    fn next_for(&mut self, instance: InstanceId) -> Option<Item> {
        if let Some(item) = self.returned.pop_front() {
            return Some(item);
        }
        if let Some((_, items)) = self.local.iter_mut().find(|(of, _)| *of == instance)
            && let Some(item) = items.pop_front()
        {
            return Some(item);
        }
        let mut item = self.ready.pop_front()?;
        item.lagged = mem::take(&mut self.lagged);
        Some(item)
    }

    fn lose_oldest(&mut self) -> bool {
        let lost = self.ready.pop_front().or_else(|| self.local.iter_mut().find_map(|(_, items)| items.pop_front()));
        self.lagged += u64::from(lost.is_some());
        self.counts.lagged += u64::from(lost.is_some());
        lost.is_some()
    }

    fn give_back(&mut self, entry: Entry, group: bool) {
        let item = Item { entry, lagged: 0 };
        match item.entry.only {
            Some(instance) if group => {
                if self.members.iter().any(|(_, member)| member.instance == instance) {
                    self.local_of(instance).push_front(item);
                }
            }
            _ => self.returned.push_back(item),
        }
    }

    /// A member has one delivery less in its hands; it may have been waiting for that.
    fn let_go(&mut self, member: u64, after: &mut After) {
        if let Some(member) = self.members.get_mut(member) {
            member.held -= 1;
            if !member.parked {
                after.wakers.extend(member.waker.take());
            }
        }
    }

    fn unpark(&mut self, token: u64) -> Option<Waker> {
        let member = self.members.get_mut(token)?;
        member.parked = false;
        member.waker.take()
    }

    fn forget_waiting(&mut self) -> u64 {
        let waiting = self.waiting();
        self.ready = VecDeque::new();
        self.local = Vec::new();
        self.returned = VecDeque::new();
        self.delayed.clear();
        self.lagged = 0;
        waiting
    }

    /// Asks for a call by the timer, unless an earlier one is on its way, which will ask anew.
    fn want(&mut self, when: Instant, after: &mut After) {
        if self.armed.last().is_none_or(|earliest| when < *earliest) {
            self.armed.push(when);
            after.arm = Some(when);
        }
    }
}

impl Due for DeliveryQueue {
    fn due(self: Arc<Self>, now: Instant) -> Option<Instant> {
        let mut after = After::default();
        {
            let mut state = self.state.lock();
            let state = &mut *state;
            while state.armed.last().is_some_and(|armed| *armed <= now) {
                state.armed.pop();
            }
            while let Some(item) = state.delayed.pop_due(now) {
                state.give_back(item.entry, self.group.is_some());
            }
            if state.hold_due.is_some_and(|due| due <= now) {
                let over = |held: &Held| held.since + held.options.max_hold <= now;
                let overdue: Vec<u64> = state.held.iter().filter(|(_, held)| over(held)).map(|(token, _)| token).collect();
                for token in overdue {
                    self.take_back(state, token, "held for too long", &mut after);
                }
                state.hold_due = state.held.iter().map(|(_, held)| held.since + held.options.max_hold).min();
            }
            if state.woken.take().is_some() && !(state.ready.is_empty() && state.returned.is_empty()) {
                // Whoever was woken did not ask in time: everybody may.
                for token in mem::take(&mut state.parked) {
                    after.wakers.extend(state.unpark(token));
                }
            }
            self.wake(state, &mut after);
            let next = state.delayed.next_due().into_iter().chain(state.hold_due).min();
            if let Some(next) = next {
                state.want(next, &mut after);
            }
            after.drained = true;
        }
        let next = after.arm.take();
        self.finish(after);
        next
    }
}

impl Settler for DeliveryQueue {
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        let mut after = After { drained: true, ..After::default() };
        let settled = {
            let mut state = self.state.lock();
            let state = &mut *state;
            let Some(held) = state.held.remove(token) else { return Receipt::ready(Settled::TooLate) };
            state.let_go(held.member, &mut after);
            let Held { entry, options, .. } = held;
            let settled = match settlement {
                Settlement::Done => Settled::Done,
                Settlement::DeadLetter { reason } => {
                    self.give_up(state, entry.event, entry.attempt, reason, &options, &mut after);
                    Settled::Done
                }
                // Nobody is left for it to come back to.
                _ if state.ended => Settled::TooLate,
                Settlement::Release => {
                    state.give_back(entry, self.group.is_some());
                    Settled::Done
                }
                Settlement::Retry { reason, .. } if options.retry.is_exhausted_after(entry.attempt) => {
                    let reason = reason.unwrap_or_else(|| "retried too often".into());
                    self.give_up(state, entry.event, entry.attempt, reason, &options, &mut after);
                    Settled::Done
                }
                Settlement::Retry { after: backoff, .. } => {
                    let backoff = backoff.unwrap_or_else(|| options.retry.backoff_after(entry.attempt, fastrand::f64()));
                    let entry = Entry { attempt: entry.attempt + 1, ..entry };
                    if backoff.is_zero() {
                        state.give_back(entry, self.group.is_some());
                    } else {
                        let due = Instant::now() + backoff.min(crate::retry::MAX_DURATION);
                        state.delayed.push(due, Item { entry, lagged: 0 });
                        state.want(due, &mut after);
                    }
                    Settled::Done
                }
            };
            self.wake(state, &mut after);
            settled
        };
        self.finish(after).unwrap_or_else(|| Receipt::ready(settled))
    }

    fn extend(&self, token: u64) -> Receipt {
        Receipt::ready(match self.state.lock().held.get_mut(token) {
            Some(held) => {
                held.since = Instant::now();
                Settled::Done
            }
            None => Settled::TooLate,
        })
    }

    fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()> {
        match self.state.lock().held.get_mut(token) {
            Some(held) => {
                set_waker(&mut held.waker, cx);
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

impl fmt::Debug for DeliveryQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryQueue")
            .field("topic", &self.topic)
            .field("group", &self.group)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// A member's place in a queue, shared by its source and its handles.
struct Membership {
    queue: Arc<DeliveryQueue>,
    member: u64,
    ended: AtomicBool,
    on_end: Box<dyn Fn() + Send + Sync>,
}

impl Membership {
    fn end(&self) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            self.queue.leave(self.member);
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
        let state = self.queue.state.lock();
        let stashed = self.queue.stashed.load(Ordering::SeqCst);
        SubscriptionStatus {
            queued: (state.bounded_len() + state.returned.len() + stashed) as u64,
            held: state.held.iter().filter(|(_, held)| held.member == self.member).count() as u64,
            delayed: state.delayed.len() as u64,
            lagged: state.counts.lagged,
            dead_lettered: state.counts.dead_lettered,
            dropped: state.counts.dropped,
            ended: state.members.get(self.member).is_none(),
        }
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Membership").field("queue", &self.queue).field("ended", &self.ended).finish_non_exhaustive()
    }
}

/// A member's stream.
struct QueueSource {
    membership: Arc<Membership>,
    /// Taken and not handed over; only a fan-out member has any.
    stash: VecDeque<Item>,
    /// The most to take in one go.
    take: usize,
    budget: u32,
    /// Times in a row it found nothing and looked again.
    lingered: u32,
}

impl Source for QueueSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        if *BUD { let b=tokio::task::consume_budget(); if std::future::Future::poll(std::pin::pin!(b), cx).is_pending() {return Poll::Pending;} self.budget=BUDGET; }
        self.budget -= 1;
        if self.budget == 0 {
            self.budget = BUDGET;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if mode == AckMode::Auto
            && let Some(delivery) = self.next_stashed()
        {
            return Poll::Ready(Some(Ok(delivery)));
        }
        let Membership { queue, member, .. } = &*self.membership;
        if self.lingered < *LINGER_ && self.stash.is_empty() && queue.len.load(Ordering::Acquire) == 0 {
            self.lingered += 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.lingered = 0;
        let polled = queue.poll_take(*member, &mut self.stash, self.take, cx, mode);
        if polled.is_pending() {
            self.budget = BUDGET;
        }
        polled
    }
}

impl QueueSource {
    /// The next delivery without a lock, where nothing needs one: it is settled by being handed over, at its first attempt.
    fn next_stashed(&mut self) -> Option<Delivery> {
        let first = self.stash.front().is_some_and(|item| item.entry.attempt == 1);
        if !first || self.membership.ended.load(Ordering::Acquire) {
            return None;
        }
        let Item { entry, lagged } = self.stash.pop_front()?;
        let queue = &self.membership.queue;
        queue.stashed.store(self.stash.len(), Ordering::Release);
        if self.stash.is_empty() {
            // Ordered against a waiter that counts itself in and then looks.
            std::sync::atomic::fence(Ordering::SeqCst);
            queue.finish(After { drained: true, ..After::default() });
        }
        let delivery = Delivery::settled(entry.event, entry.attempt).after_losing(lagged);
        Some(match entry.place {
            Some((scope, position)) => delivery.at(scope, position),
            None => delivery,
        })
    }
}

impl Drop for QueueSource {
    fn drop(&mut self) {
        self.membership.queue.stashed.store(0, Ordering::SeqCst);
        self.membership.end();
    }
}

/// Counts somebody as waiting for a bell.
struct Wanted<'a>(&'a AtomicUsize);

impl<'a> Wanted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn set_waker(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}

static BUD: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| std::env::var_os("BUD").is_some());
