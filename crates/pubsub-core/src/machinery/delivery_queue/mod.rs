//! One bounded queue of deliveries with members that ask for work: a fan-out subscription has one member, a group has many.
//!
//! Work is assigned when a member asks, so a member that never asks holds nothing back. Lock order: a backend's own locks,
//! then the queue's state; nothing else is locked under the state, and wakers, sinks and timers are called without it.

mod aftermath;
mod entry;
mod member;
mod settle;
mod state;

use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::Instant;

pub use self::aftermath::Aftermath;
use self::aftermath::{discard, wake};
pub use self::entry::Entry;
use self::member::{Hand, Holder, Membership, QueueSource};
use self::state::{Chores, Local, Rare, State};
use super::{Due, Timer};
use crate::{
    AckMode, Delivery, Event, Group, GroupStatus, Receipt, Result, SubscribeOptions, Subscription, SubscriptionStatus,
    Timestamp, Topic,
};

/// Which instance of a bus a member belongs to: members of one queue may belong to several.
pub type InstanceId = u64;

/// Where exhausted deliveries go.
pub trait DeadLetterSink: Send + Sync + 'static {
    /// Takes a dead letter for a topic. `None` means it has been taken; a future is run by the queue, and until it ends the
    /// delivery it came from counts as unsettled.
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>>;
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
    /// Itself, for the deliveries and deadlines it hands out.
    me: Weak<Self>,
    timer: Arc<Timer>,
    sink: Arc<dyn DeadLetterSink>,
    state: Mutex<State>,
    hand: Arc<Hand>,
    /// Entries that count towards the bound; changed under the state's lock, read without.
    len: AtomicUsize,
    capacity: AtomicUsize,
    /// Whether it loses the oldest rather than make publishers wait: as a durable group, or because all its members chose to.
    lossy: AtomicBool,
    /// Publishers waiting for room, and the bell they wait for.
    room_wanted: AtomicUsize,
    room: Notify,
    /// Waiters for the queue to drain, and the bell they wait for.
    drain_wanted: AtomicUsize,
    drained: Notify,
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
        let is_group = group.is_some();
        Arc::new_cyclic(|me| Self {
            topic,
            group,
            me: me.clone(),
            timer,
            sink,
            state: Mutex::new(State::new(is_group, durable.is_some())),
            hand: Arc::default(),
            len: AtomicUsize::new(0),
            capacity: AtomicUsize::new(durable.unwrap_or(1)),
            lossy: AtomicBool::new(durable.is_some()),
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
        let options = Arc::new(options);
        // A fan-out member's source takes up to half of its bound in one go; the other half stays open to publishers.
        let (capacity, stash) = match self.group {
            Some(_) => (options.prefetch, 0),
            None => (options.prefetch.div_ceil(2), options.prefetch / 2),
        };
        let (member, durable) = {
            let mut state = self.state.lock();
            if state.ended {
                return None;
            }
            let member = state.join(instance, options.clone());
            self.lossy.store(state.is_lossy(), Ordering::Relaxed);
            (member, state.durable)
        };
        if !durable {
            self.capacity.fetch_max(capacity, Ordering::Relaxed);
        }
        self.ring_drained(); // what waits may have been a burden to another instance alone
        let on_end = Box::new(on_end);
        let membership = Arc::new(Membership { queue: self.clone(), member, ended: AtomicBool::new(false), on_end });
        let source = QueueSource::new(membership.clone(), stash + 1);
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

    /// Whether somebody waits for room.
    pub fn is_room_wanted(&self) -> bool {
        self.room_wanted.load(Ordering::SeqCst) > 0
    }

    /// Waits until there may be room again, or the queue has ended. Cancel safe.
    pub async fn room_freed(&self) {
        let freed = self.room.notified();
        let mut freed = std::pin::pin!(freed);
        freed.as_mut().enable();
        let _wanted = Wanted::new(&self.room_wanted);
        // Being counted in comes before this lock, and looking comes after it: whoever frees room under it sees the one or lets
        // the other be seen.
        drop(self.state.lock());
        if self.room() == 0 && !self.is_ended() {
            freed.await;
        }
    }

    /// Whether it outlives its members.
    pub fn is_durable(&self) -> bool {
        self.state.lock().durable
    }

    /// Makes the queue of a group outlive its members from now on, as a [`durable_group`](Self::durable_group) does. What it has
    /// it keeps.
    pub fn make_durable(&self, capacity: usize, aftermath: &mut Aftermath) {
        let mut state = self.state.lock();
        if state.ended || state.durable {
            return;
        }
        state.durable = true;
        self.capacity.fetch_max(capacity, Ordering::Relaxed);
        self.lossy.store(true, Ordering::Relaxed);
        // It makes no publisher wait any more.
        if let Some(me) = self.me.upgrade() {
            aftermath.make_room(me);
        }
    }

    /// Whether it has ended: it takes and gives nothing more.
    pub fn is_ended(&self) -> bool {
        self.hand.has_ended.load(Ordering::Acquire)
    }

    /// Whether what waits here can be taken without this instance: by members of others, or by members to come.
    pub fn is_shared_beyond(&self, instance: InstanceId) -> bool {
        let state = self.state.lock();
        state.durable || state.has_member_beyond(instance)
    }

    /// Adds entries, in order. Beyond the bound the oldest are lost, and the next one handed over says how many: a caller that
    /// wants to lose none asks for [`room`](Self::room) first, under a lock that keeps other publishers out.
    ///
    /// Entries local to an instance without a member are refused by doing nothing.
    pub fn push(&self, entries: impl IntoIterator<Item = Entry>, aftermath: &mut Aftermath) {
        let mut state = self.state.lock();
        if state.ended {
            return;
        }
        let len = state.push(entries.into_iter(), self.capacity.load(Ordering::Relaxed), aftermath);
        self.len.store(len, Ordering::Release);
        if state.is_anyone_parked() {
            self.wake_parked(state, aftermath);
        }
    }

    #[inline(never)] // pushing to who is busy is to stay small
    fn wake_parked(&self, mut state: MutexGuard<'_, State>, aftermath: &mut Aftermath) {
        let mut chores = Chores::default();
        state.wake(&mut chores);
        drop(state);
        chores.take_wakers().for_each(|waker| aftermath.wake(waker));
        self.finish(chores);
    }

    /// Ends the queue: what waits is dropped, members' streams end. Returns how many entries were dropped.
    pub fn end(&self) -> u64 {
        let mut chores = Chores::default();
        let dropped = {
            let mut state = self.state.lock();
            let dropped = self.stashed(&state) + state.end(&mut chores);
            self.publish_state(&state);
            dropped
        };
        self.finish(chores);
        dropped
    }

    /// Forgets what waits and does not pass; members stay, and what is held stays held. Returns how many were forgotten.
    pub fn retain(&self, keep: impl Fn(&Event) -> bool) -> u64 {
        // Judged without the lock: writing an event's data as JSON is its publisher's code.
        let waiting: Vec<Arc<Event>> = self.state.lock().waiting_events().cloned().collect();
        let gone = waiting.iter().filter(|event| !keep(event)).map(Arc::as_ptr).collect();
        let mut chores = Chores { room: true, drained: true, ..Chores::default() };
        {
            let mut state = self.state.lock();
            state.remove(&gone, &mut chores);
            self.len.store(state.bounded_len(), Ordering::Release);
        }
        let forgotten = chores.rare().dropped.len() as u64;
        self.finish(chores);
        forgotten
    }

    /// Takes back all that this instance's members hold, as if they had died: they are retries for the others, if there are
    /// any. Returns how many were held.
    pub fn revoke(&self, instance: InstanceId) -> u64 {
        let mut chores = Chores { drained: true, ..Chores::default() };
        let count = {
            let mut state = self.state.lock();
            let tokens: Vec<u64> = state.held_by(instance).collect();
            for token in &tokens {
                state.take_back(*token, "its holder was closed", &mut chores);
            }
            state.wake(&mut chores);
            tokens.len() as u64
        };
        self.finish(chores);
        count
    }

    /// What the only member's source took and did not hand over; nothing once the queue has ended, whatever the source may still
    /// be storing. While the lock is held it only becomes less.
    fn stashed(&self, state: &State) -> u64 {
        if state.ended { 0 } else { self.hand.stashed.load(Ordering::SeqCst) as u64 }
    }

    /// Whether nothing is queued, held, or due to come back.
    pub fn is_drained(&self) -> bool {
        let state = self.state.lock();
        state.is_drained() && self.stashed(&state) == 0
    }

    /// Waits until [`is_drained`](Self::is_drained). Cancel safe.
    pub async fn drained(&self) {
        self.when(Self::is_drained).await;
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
        let held = state.held_by(instance).count() as u64;
        let others = state.durable || state.has_member_beyond(instance);
        let waiting = if others { 0 } else { state.waiting() + self.stashed(&state) };
        (held, waiting)
    }

    /// What is in it. The age of the oldest is by the clock that stamped it.
    pub fn status(&self) -> QueueStatus {
        let state = self.state.lock();
        let queued = state.ready.front().into_iter().chain(state.returned.iter()).chain(state.delayed.iter());
        let queued = queued.chain(state.local.iter().flat_map(Local::entries));
        let oldest = queued.chain(state.held.iter().map(|(_, held)| &held.entry)).map(|entry| entry.event.created_at()).min();
        let age = |time: Timestamp| {
            Duration::from_millis(Timestamp::now().as_millis().saturating_sub(time.as_millis()).try_into().unwrap_or(0))
        };
        QueueStatus {
            waiting: state.waiting() + self.stashed(&state),
            held: state.held.len() as u64,
            oldest: oldest.map(age),
            members: state.members() as u64,
        }
    }

    /// The status of the group it serves; none for fan-out, and none once it has ended.
    pub fn group_status(&self) -> Option<GroupStatus> {
        let group = self.group.clone().filter(|_| !self.is_ended())?;
        let QueueStatus { waiting, held, oldest, members } = self.status();
        let mut status = GroupStatus::new(group);
        (status.waiting, status.held, status.oldest, status.members) = (Some(waiting), Some(held), oldest, Some(members));
        Some(status)
    }

    fn member_status(&self, member: u64) -> SubscriptionStatus {
        let state = self.state.lock();
        SubscriptionStatus {
            queued: state.queued() as u64 + self.stashed(&state),
            held: state.held.iter().filter(|(_, held)| held.member == member).count() as u64,
            delayed: state.delayed.len() as u64,
            lagged: state.counts.lagged,
            dead_lettered: state.counts.dead_lettered,
            dropped: state.counts.dropped,
            ended: state.member(member).is_none(),
        }
    }

    /// What a member asks for: the next delivery, or to be woken when there is one. What it takes beyond that goes into `stash`,
    /// up to `take` in all, if it is the only member.
    #[inline(never)] // what needs no lock is to stay small
    fn poll_take(
        self: &Arc<Self>,
        token: u64,
        stash: &mut VecDeque<Entry>,
        take: usize,
        holder: &mut Option<Arc<Holder>>,
        cx: &mut Context<'_>,
        mode: AckMode,
    ) -> Poll<Option<Result<Delivery>>> {
        loop {
            let mut chores = Chores::default();
            let _replaced; // dropped after the lock
            let mut state = self.state.lock();
            state.asks(token);
            let Some(member) = state.member(token) else { return Poll::Ready(None) };
            if mode == AckMode::Manual && member.held >= member.options.max_in_flight {
                _replaced = state.wait_for_hands(token, cx);
                state.wake(&mut chores); // meanwhile the work is for others
                drop(state);
                self.finish(chores);
                return Poll::Pending;
            }
            let Some(entry) = state.next_for(token, stash) else {
                _replaced = state.park(token, cx);
                drop(state);
                self.timer.go_on(); // what it waits for may have to come back first
                return Poll::Pending;
            };
            _replaced = state.found(token);
            if self.group.is_none() && mode == AckMode::Auto && stash.is_empty() {
                // Handing these over will need no lock.
                let more = (take - 1).min(state.ready.len());
                if more == state.ready.len() {
                    mem::swap(stash, &mut state.ready);
                } else {
                    stash.extend(state.ready.drain(..more));
                }
            }
            self.hand.stashed.store(stash.len(), Ordering::Release);
            self.len.store(state.bounded_len(), Ordering::Release);
            chores.room = true;
            state.wake(&mut chores);
            let options = |state: &State| state.member(token).expect("looked up above").options.clone();
            if entry.attempt > 1 && options(&state).retry.is_over(entry.attempt) {
                // Counted elsewhere: by a server, or by a member with a more patient policy.
                let (options, attempts) = (options(&state), entry.attempt - 1);
                state.give_up(entry, attempts, "attempts exhausted".into(), &options, &mut chores);
                chores.drained = true;
                drop(state);
                self.finish(chores);
                continue;
            }
            let delivery = match mode {
                AckMode::Auto => {
                    chores.drained = true;
                    entry.settled()
                }
                AckMode::Manual => {
                    let Entry { event, attempt, extras } = entry.clone();
                    let in_flight = state.hold(entry, token, Instant::now(), &mut chores);
                    Delivery::held(event, attempt, holder.get_or_insert_with(|| Holder::new(self)).clone(), in_flight)
                        .with_extras(extras)
                }
            };
            drop(state);
            self.finish(chores);
            return Poll::Ready(Some(Ok(delivery)));
        }
    }

    fn leave(&self, member: u64) {
        let mut chores = Chores { room: true, drained: true, ..Chores::default() };
        {
            let mut state = self.state.lock();
            state.leave(member, &mut chores);
            self.publish_state(&state);
        }
        self.finish(chores);
    }

    /// Makes readable without the lock what leaving and ending change.
    fn publish_state(&self, state: &State) {
        self.hand.has_ended.store(state.ended, Ordering::Release);
        self.lossy.store(state.is_lossy(), Ordering::Relaxed);
        self.len.store(state.bounded_len(), Ordering::Release);
    }

    /// Does what must not be done under the lock. Returns the receipt of a dead letter, if there was one.
    #[inline]
    fn finish(&self, chores: Chores) -> Option<Receipt> {
        if chores.is_more_than_ringing() {
            return self.finish_all(chores);
        }
        self.ring(chores.room, chores.drained);
        mem::forget(chores); // nothing is in it
        None
    }

    #[inline(never)]
    fn finish_all(&self, chores: Chores) -> Option<Receipt> {
        let Chores { waker, arm, room, drained, rare } = chores;
        if let Some(when) = arm {
            let me: Weak<dyn Due> = self.me.clone();
            self.timer.call_at(when, me);
        }
        let Rare { wakers, letters, dropped, gone } = rare.map_or_else(Rare::default, |rare| *rare);
        waker.into_iter().chain(wakers).for_each(wake);
        let receipt = letters.into_iter().map(|letter| self.bury(letter)).last();
        self.ring(room, drained);
        discard(dropped);
        drop(gone);
        receipt
    }

    #[inline]
    fn ring(&self, room: bool, drained: bool) {
        if room && self.room_wanted.load(Ordering::SeqCst) > 0 {
            self.room.notify_waiters();
        }
        if drained {
            self.ring_drained();
        }
    }

    #[inline]
    fn ring_drained(&self) {
        if self.drain_wanted.load(Ordering::SeqCst) > 0 {
            self.drained.notify_waiters();
        }
    }
}

impl Drop for DeliveryQueue {
    fn drop(&mut self) {
        self.timer.target_gone();
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
