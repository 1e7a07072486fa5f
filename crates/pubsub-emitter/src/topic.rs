//! One topic: who is attached to it, and the letters it keeps if it is a dead-letter topic.
//!
//! Lock order: the hub's map of topics, then a topic's `attached`, then a queue's state. User code (inline handlers, aftermath) is
//! called without any of them.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use pubsub_core::machinery::{Aftermath, DeliveryQueue, Entry, InstanceId, Timer};
use pubsub_core::{
    Capability, Cursor, Error, ErrorKind, Event, Group, GroupStatus, OnGap, Page, Result, Scope, Start, SubscribeOptions,
    Subscription, Topic, TopicStatus, TrimFilter,
};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::hub::Hub;
use crate::inline::{Inline, call};

pub(crate) struct TopicState {
    topic: Topic,
    attached: Mutex<Attached>,
    /// Subscriptions that name this as their dead-letter topic.
    pub(crate) named: AtomicUsize,
    /// Publishers that found a queue full and take turns in `lane`.
    waiting: AtomicUsize,
    lane: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Attached {
    /// By number.
    fan_out: Vec<FanOut>,
    /// The number of the next fan-out subscription.
    next: u64,
    groups: Vec<Arc<DeliveryQueue>>,
    /// How many more events are sure to fit into every queue: counted once, less what was pushed since. Only pushing and
    /// attaching make it less.
    sure_room: usize,
    /// Replaced as a whole, so that a publisher calls the handlers without a lock.
    inline: Handlers,
    letters: Option<Letters>,
}

struct FanOut {
    number: u64,
    instance: InstanceId,
    queue: Arc<DeliveryQueue>,
}

/// What a dead-letter topic keeps.
struct Letters {
    scope: Arc<Scope>,
    kept: VecDeque<(u64, Arc<Event>)>,
    next: u64,
    retention: usize,
}

/// The inline handlers of a topic, to be called without a lock.
pub(crate) type Handlers = Arc<[Arc<Inline>]>;

impl TopicState {
    pub(crate) fn new(topic: Topic) -> Self {
        Self {
            topic,
            attached: Mutex::default(),
            named: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            lane: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn topic(&self) -> &Topic {
        &self.topic
    }

    /// Gives the events to every queue, if every queue has room for all of them and no publishers wait already; none if not. What
    /// is returned are the inline handlers to call. Events `only` for one instance go to that instance's subscriptions, and only
    /// publishers that wait for those come before them.
    #[inline]
    pub(crate) fn push_all(
        &self,
        events: &[Arc<Event>],
        only: Option<InstanceId>,
        aftermath: &mut Aftermath,
    ) -> Option<Option<Handlers>> {
        let others_wait = self.waiting.load(Ordering::Acquire) > 0;
        if others_wait && only.is_none() {
            return None;
        }
        let mut attached = self.attached.lock();
        if others_wait && attached.queues(only).any(|queue| queue.is_room_wanted()) {
            return None;
        }
        attached.has_room(events.len(), only).then(|| attached.push(events, only, aftermath))
    }

    /// Gives as many of the events, in order, as every queue has room for, to all, and returns how many those were.
    pub(crate) fn offer(&self, events: &[Arc<Event>], only: Option<InstanceId>) -> usize {
        let mut aftermath = Aftermath::new();
        let (taken, inline) = {
            let mut attached = self.attached.lock();
            let taken = attached.room(only).min(events.len());
            (taken, attached.push(&events[..taken], only, &mut aftermath))
        };
        aftermath.finish();
        if let Some(inline) = inline {
            call(&inline, &self.topic, &events[..taken], only);
        }
        taken
    }

    /// Waits in turn until `offer` says that all has been taken; false if the deadline comes first. Cancel safe.
    /// The clock is that of `runtime`: the caller may be on another executor.
    pub(crate) async fn wait_for_room(
        &self,
        runtime: &Handle,
        deadline: Instant,
        only: Option<InstanceId>,
        mut offer: impl FnMut() -> bool,
    ) -> bool {
        let _waiting = Waiting::new(&self.waiting);
        let in_turn = async {
            let _turn = self.lane.lock().await;
            while !offer() {
                // One full queue is enough to wait for: the others are looked at again when it has room.
                let full = self.attached.lock().full(only);
                if let Some(queue) = full {
                    queue.room_freed().await;
                }
            }
        };
        let timed = {
            let _entered = runtime.enter();
            tokio::time::timeout_at(deadline, in_turn)
        };
        timed.await.is_ok()
    }

    /// Attaches a subscription. Called under the hub's lock on its topics, so the caller keeps the options: what their filter closes
    /// over may be the last of anything.
    pub(crate) fn subscribe(
        self: &Arc<Self>,
        hub: &Arc<Hub>,
        instance: InstanceId,
        options: &SubscribeOptions,
        on_end: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<(Arc<DeliveryQueue>, Subscription)> {
        let timer = hub.timer()?;
        let ended = |on_end: &Arc<dyn Fn() + Send + Sync>| {
            let on_end = on_end.clone();
            move || on_end()
        };
        let mut attached = self.attached.lock();
        attached.sure_room = 0;
        let Some(group) = options.group.clone() else {
            let queue = DeliveryQueue::fan_out(self.topic.clone(), timer, hub.sink());
            let (number, state) = (attached.next, Arc::downgrade(self));
            let leaves = move || {
                let left = state.upgrade().and_then(|state| state.attached.lock().remove(number));
                drop(left); // without the lock
                on_end();
            };
            let subscription = queue.join(instance, options.clone(), leaves).expect("a new queue has not ended");
            attached.fan_out.push(FanOut { number, instance, queue: queue.clone() });
            attached.next += 1;
            return Ok((queue, subscription));
        };
        // A group whose last member has just left has ended, and refuses: a new one takes its place.
        for queue in attached.groups.iter().filter(|queue| queue.group_name() == Some(&group)) {
            if let Some(subscription) = queue.join(instance, options.clone(), ended(&on_end)) {
                return Ok((queue.clone(), subscription));
            }
        }
        let queue = attached.new_group(hub, &self.topic, group, options, timer)?;
        let subscription = queue.join(instance, options.clone(), ended(&on_end)).expect("a new queue has not ended");
        attached.groups.push(queue.clone());
        Ok((queue, subscription))
    }

    /// Attaches an inline handler. Called under the hub's lock on its topics.
    pub(crate) fn attach_inline(&self, inline: Arc<Inline>) {
        let mut attached = self.attached.lock();
        attached.inline = attached.inline.iter().cloned().chain([inline]).collect();
    }

    /// Makes the topic a dead-letter topic. Called under the hub's lock on its topics.
    #[must_use = "to be finished without the lock"]
    pub(crate) fn keep_letters(&self, hub: &Hub) -> Aftermath {
        let mut aftermath = Aftermath::new();
        self.attached.lock().letters(hub, &self.topic, &mut aftermath);
        aftermath
    }

    /// Whether the topic is a dead-letter topic.
    pub(crate) fn keeps_letters(&self) -> bool {
        self.attached.lock().letters.is_some()
    }

    /// Keeps a dead letter, for history and durable groups. Called under the hub's lock on its topics.
    #[must_use = "to be finished without the lock"]
    pub(crate) fn keep(&self, hub: &Hub, letter: &Arc<Event>) -> Aftermath {
        let mut aftermath = Aftermath::new();
        let mut attached = self.attached.lock();
        let entry = attached.letters(hub, &self.topic, &mut aftermath).keep(letter, &mut aftermath);
        attached.durable().for_each(|queue| queue.push([entry.clone()], &mut aftermath));
        aftermath
    }

    /// Gives a dead letter to those who listen and are not durable; false if one of them has no room.
    pub(crate) fn offer_letter(&self, letter: &Arc<Event>) -> bool {
        let mut aftermath = Aftermath::new();
        let inline = {
            let mut attached = self.attached.lock();
            if !attached.has_room(1, None) {
                return false;
            }
            attached.sure_room -= 1;
            for queue in attached.queues(None).filter(|queue| !queue.is_durable()) {
                queue.push([Entry::new(letter.clone())], &mut aftermath);
            }
            attached.inline.clone()
        };
        aftermath.finish();
        call(&inline, &self.topic, std::slice::from_ref(letter), None);
        true
    }

    /// What is kept, oldest first; none if this is no dead-letter topic.
    pub(crate) fn history(&self, from: &Start, limit: usize) -> Option<Result<Page>> {
        self.attached.lock().letters.as_ref().map(|letters| letters.page(from, limit))
    }

    /// Forgets what is kept. Subscriptions live on.
    pub(crate) fn clear(&self, hub: &Hub) {
        let (queues, _forgotten): (Vec<_>, _) = {
            let mut attached = self.attached.lock();
            let Some(letters) = &mut attached.letters else { return };
            let forgotten = std::mem::replace(letters, Letters::new(hub, &self.topic));
            (attached.durable().collect(), forgotten)
        };
        for queue in queues {
            queue.retain(|_| false);
        }
    }

    /// Forgets what is kept and matches, and returns how many.
    pub(crate) fn trim(&self, filter: &TrimFilter) -> u64 {
        // Judged without the lock: writing an event's data as JSON is its publisher's code.
        let kept: Vec<_> = self.attached.lock().letters.iter().flat_map(|letters| letters.kept.iter().cloned()).collect();
        let gone: Vec<u64> = kept.iter().filter(|(_, letter)| filter.matches(letter)).map(|(number, _)| *number).collect();
        let (queues, trimmed): (Vec<_>, _) = {
            let mut attached = self.attached.lock();
            let Some(letters) = &mut attached.letters else { return 0 };
            let before = letters.kept.len();
            letters.kept.retain(|(number, _)| gone.binary_search(number).is_err());
            let trimmed = before - letters.kept.len();
            (attached.durable().collect(), trimmed as u64)
        };
        for queue in queues {
            queue.retain(|event| !filter.matches(event));
        }
        trimmed
    }

    pub(crate) fn inspect(&self) -> TopicStatus {
        let attached = self.attached.lock();
        let mut status = TopicStatus::default();
        status.retained = Some(attached.letters.as_ref().map_or(0, |letters| letters.kept.len() as u64));
        status.fan_out = Some((attached.fan_out.len() + attached.inline.len()) as u64);
        for queue in &attached.groups {
            let Some(name) = queue.group_name().filter(|_| !queue.is_ended()) else { continue };
            let queue = queue.status();
            let mut group = GroupStatus::new(name.clone());
            (group.waiting, group.held, group.oldest) = (Some(queue.waiting), Some(queue.held), queue.oldest);
            group.members = Some(queue.members);
            status.groups.push(group);
        }
        status
    }

    /// Forgets what has ended; true if that leaves nothing. Called under the hub's lock on its topics.
    pub(crate) fn tidy(&self) -> bool {
        let mut attached = self.attached.lock();
        attached.groups.retain(|queue| !queue.is_ended());
        if attached.inline.iter().any(|inline| inline.has_ended()) {
            attached.inline = attached.inline.iter().filter(|inline| !inline.has_ended()).cloned().collect();
        }
        let named = self.named.load(Ordering::Acquire) > 0;
        if named || attached.letters.as_ref().is_some_and(|letters| !letters.kept.is_empty()) {
            return false;
        }
        // Nothing is kept that a durable group could have a place in.
        attached.groups.retain(|queue| queue.status().members > 0 || !queue.is_drained());
        attached.fan_out.is_empty() && attached.groups.is_empty() && attached.inline.is_empty()
    }
}

impl Attached {
    /// The queues that events `only` for one instance, or for all, go to.
    fn queues(&self, only: Option<InstanceId>) -> impl Iterator<Item = &Arc<DeliveryQueue>> {
        let fan_out = self.fan_out.iter().filter(move |one| only.is_none_or(|only| only == one.instance));
        fan_out.map(|one| &one.queue).chain(&self.groups)
    }

    /// Gives events to every queue; they are known to fit.
    #[inline]
    fn push(&mut self, events: &[Arc<Event>], only: Option<InstanceId>, aftermath: &mut Aftermath) -> Option<Handlers> {
        self.sure_room = self.sure_room.saturating_sub(events.len());
        match only {
            None if self.letters.is_some() => self.push_kept(events, aftermath),
            None => self.queues(None).for_each(|queue| queue.push(events.iter().cloned().map(Entry::new), aftermath)),
            Some(instance) => {
                let entry = |event: &Arc<Event>| Entry::new(event.clone()).only(instance);
                self.queues(only).for_each(|queue| queue.push(events.iter().map(entry), aftermath));
            }
        }
        (!self.inline.is_empty()).then(|| self.inline.clone())
    }

    /// A dead-letter topic keeps whatever is published to it.
    #[cold]
    fn push_kept(&mut self, events: &[Arc<Event>], aftermath: &mut Aftermath) {
        for event in events {
            let kept = self.letters.as_mut().map(|letters| letters.keep(event, aftermath));
            for queue in self.queues(None) {
                let entry = kept.clone().filter(|_| queue.is_durable());
                queue.push([entry.unwrap_or_else(|| Entry::new(event.clone()))], aftermath);
            }
        }
    }

    fn has_room(&mut self, count: usize, only: Option<InstanceId>) -> bool {
        if self.sure_room < count {
            self.sure_room = self.room(None);
        }
        self.sure_room >= count || (only.is_some() && self.room(only) >= count)
    }

    fn room(&self, only: Option<InstanceId>) -> usize {
        self.queues(only).map(|queue| queue.room()).min().unwrap_or(usize::MAX)
    }

    fn full(&self, only: Option<InstanceId>) -> Option<Arc<DeliveryQueue>> {
        self.queues(only).find(|queue| queue.room() == 0).cloned()
    }

    fn durable(&self) -> impl Iterator<Item = Arc<DeliveryQueue>> {
        self.groups.iter().filter(|queue| queue.is_durable()).cloned()
    }

    /// A fan-out subscription has ended.
    fn remove(&mut self, number: u64) -> Option<FanOut> {
        let place = self.fan_out.binary_search_by_key(&number, |one| one.number).ok()?;
        let gone = self.fan_out.remove(place);
        if self.fan_out.len() < self.fan_out.capacity() / 4 {
            self.fan_out.shrink_to(2 * self.fan_out.len()); // a burst gives its memory back
        }
        Some(gone)
    }

    /// What is kept. A topic that was no dead-letter topic becomes one, and its groups durable.
    fn letters(&mut self, hub: &Hub, topic: &Topic, aftermath: &mut Aftermath) -> &mut Letters {
        let groups = &self.groups;
        self.letters.get_or_insert_with(|| {
            groups.iter().for_each(|queue| queue.make_durable(hub.retention(), aftermath));
            Letters::new(hub, topic)
        })
    }

    /// A group on a dead-letter topic is durable and starts with what is kept; any other begins empty.
    fn new_group(
        &mut self,
        hub: &Hub,
        topic: &Topic,
        group: Group,
        options: &SubscribeOptions,
        timer: Arc<Timer>,
    ) -> Result<Arc<DeliveryQueue>> {
        let Some(letters) = &self.letters else {
            return Ok(DeliveryQueue::group(topic.clone(), group, timer, hub.sink()));
        };
        let from = letters.start(options.start.as_ref().unwrap_or(&Start::Earliest), options.on_gap)?;
        let queue = DeliveryQueue::durable_group(topic.clone(), group, letters.retention, timer, hub.sink());
        let backlog = letters.kept.iter().filter(|(number, _)| *number >= from);
        let backlog = backlog.map(|(number, letter)| Entry::new(letter.clone()).at(letters.scope.clone(), *number));
        queue.push(backlog, &mut Aftermath::new()); // nobody waits on a new queue
        Ok(queue)
    }
}

impl Letters {
    /// Nothing kept yet, in a generation of its own.
    fn new(hub: &Hub, topic: &Topic) -> Self {
        // The topic belongs to the scope, so that a cursor of another one is told apart; names hold more than a scope can.
        let mut hasher = DefaultHasher::new();
        topic.hash(&mut hasher);
        let bus = format!("{}-{:x}", hub.id(), hasher.finish());
        let scope = Scope::new(bus, hub.number().to_string()).expect("a uuid and numbers make a scope");
        Self { scope: Arc::new(scope), kept: VecDeque::new(), next: 0, retention: hub.retention() }
    }

    /// Keeps one more, and gives what a durable group gets of it.
    fn keep(&mut self, letter: &Arc<Event>, aftermath: &mut Aftermath) -> Entry {
        let entry = Entry::new(letter.clone()).at(self.scope.clone(), self.next);
        self.kept.push_back((self.next, letter.clone()));
        self.next += 1;
        if self.kept.len() > self.retention
            && let Some((_, oldest)) = self.kept.pop_front()
        {
            aftermath.drop_later(oldest);
        }
        entry
    }

    /// The number of the first letter from a start on.
    fn start(&self, start: &Start, on_gap: OnGap) -> Result<u64> {
        if let Start::Index(_) = start {
            return Err(Error::unsupported(Capability::Index));
        }
        let floor = self.kept.front().map_or(self.next, |(number, _)| *number);
        let gap = match self.scope.first_of(start, floor, self.next) {
            Ok(first) => return Ok(first),
            Err(gap) => gap,
        };
        match on_gap {
            OnGap::Earliest => Ok(floor),
            OnGap::Fail => Err(ErrorKind::Gap(gap).into()),
        }
    }

    fn page(&self, from: &Start, limit: usize) -> Result<Page> {
        let from = self.start(from, OnGap::Fail)?;
        let cursor = |number: u64| Cursor::new(self.scope.clone(), number);
        let mut rest = self.kept.iter().filter(|(number, _)| *number >= from);
        let entries: Vec<_> = rest.by_ref().take(limit).map(|(number, letter)| (cursor(*number), letter.clone())).collect();
        let next = rest.next().and(entries.last()).map(|(last, _)| last.clone());
        let floor = self.kept.front().map(|(number, _)| cursor(*number));
        let head = self.kept.back().map(|(number, _)| cursor(*number));
        Ok(Page { entries, next, floor, head })
    }
}

/// Counts a publisher as waiting.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
