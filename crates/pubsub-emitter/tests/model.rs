//! Random histories of one topic, two instances and a few subscriptions, step by step against a small model of what may and what
//! must come next. `PROPTEST_CASES` sets how many.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use proptest::prelude::*;
use pubsub_core::{
    AckMode, Bus, Delivery, Event, Group, Origin, PublishOptions, RetryPolicy, Settled, Start, SubscribeOptions, Subscription,
    Topic,
};
use pubsub_emitter::EventEmitterPubSub;
use tokio::time::Instant;

const TOPIC: &str = "t";
const DEAD: &str = "dead";
const ATTEMPTS: u32 = 3;
const IN_FLIGHT: usize = 4;
/// Never a sum of the steps by which time passes, so that nothing hangs on the timer's grain of a millisecond.
const BACKOFF: Duration = Duration::from_millis(50);
const SLOTS: usize = 5;

#[derive(Debug, Clone, Copy)]
enum Step {
    Publish { from: usize, events: u8, local: bool },
    Subscribe { slot: usize, on: usize, kind: Kind },
    Next { slot: usize },
    Settle { which: usize, how: How },
    Leave { slot: usize, by_handle: bool },
    Pass { millis: u64 },
    Close { instance: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    FanOut,
    FanOutAuto,
    Group(u8),
}

#[derive(Debug, Clone, Copy)]
enum How {
    Done,
    Retry,
    RetryAtOnce,
    Release,
    DeadLetter,
    Drop,
}

/// Prints as one step a line.
struct Script(Vec<Step>);

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|step| write!(f, "\n    {step:?}"))
    }
}

fn script() -> impl Strategy<Value = Script> {
    let slot = 0..SLOTS;
    let kind = prop_oneof![
        Just(Kind::FanOut),
        Just(Kind::FanOutAuto),
        (0..2_u8).prop_map(Kind::Group),
        (0..2_u8).prop_map(Kind::Group)
    ];
    let how = prop_oneof![
        3 => Just(How::Done), 3 => Just(How::Retry), 1 => Just(How::RetryAtOnce), 1 => Just(How::Release), 1 => Just(How::DeadLetter), 1 => Just(How::Drop),
    ];
    let step = prop_oneof![
        4 => (0..2_usize, 1..4_u8, proptest::bool::weighted(0.3)).prop_map(|(from, events, local)| Step::Publish { from, events, local }),
        2 => (slot.clone(), 0..2_usize, kind).prop_map(|(slot, on, kind)| Step::Subscribe { slot, on, kind }),
        8 => slot.clone().prop_map(|slot| Step::Next { slot }),
        6 => (0..8_usize, how).prop_map(|(which, how)| Step::Settle { which, how }),
        1 => (slot, any::<bool>()).prop_map(|(slot, by_handle)| Step::Leave { slot, by_handle }),
        3 => prop_oneof![Just(20_u64), Just(40), Just(60), Just(200)].prop_map(|millis| Step::Pass { millis }),
        1 => proptest::bool::weighted(0.15).prop_flat_map(|close| if close { (0..2_usize).prop_map(|instance| Step::Close { instance }).boxed() }
            else { Just(Step::Pass { millis: 20 }).boxed() }),
    ];
    proptest::collection::vec(step, 1..80).prop_map(Script)
}

/// An event on its way to one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Item {
    event: u64,
    attempt: u32,
    only: Option<usize>,
}

/// What a fan-out subscription or a group is owed.
#[derive(Debug, Default)]
struct Queue {
    group: bool,
    ended: bool,
    ready: VecDeque<Item>,
    local: BTreeMap<usize, Local>,
    returned: Vec<Item>,
    delayed: Vec<(Instant, Item)>,
    /// The instance of each member.
    members: BTreeMap<usize, usize>,
}

/// What is for one instance of a group only. What came back comes in any order, the rest in the order it was pushed.
#[derive(Debug, Default)]
struct Local {
    ready: VecDeque<Item>,
    returned: Vec<Item>,
}

impl Queue {
    fn has_member_of(&self, instance: usize) -> bool {
        self.members.values().any(|of| *of == instance)
    }

    fn give_back(&mut self, item: Item) {
        match item.only {
            Some(instance) if self.group => {
                if self.has_member_of(instance) {
                    self.local.entry(instance).or_default().returned.push(item);
                }
            }
            _ => self.returned.push(item),
        }
    }

    /// Moves what has come due.
    fn pass(&mut self, now: Instant) {
        let (due, waiting): (Vec<_>, Vec<_>) = self.delayed.drain(..).partition(|(at, _)| *at <= now);
        self.delayed = waiting;
        due.into_iter().for_each(|(_, item)| self.give_back(item));
    }

    fn leave(&mut self, slot: usize) {
        let Some(instance) = self.members.remove(&slot) else { return };
        if !self.has_member_of(instance) {
            self.local.remove(&instance);
        }
        if self.members.is_empty() {
            *self = Self { group: self.group, ended: true, ..Self::default() };
        }
    }
}

struct Slot {
    /// None once it was dropped.
    subscription: Option<Subscription>,
    queue: usize,
    kind: Kind,
    instance: usize,
    /// Tells it from those that had its place before.
    member: usize,
}

struct Hand {
    delivery: Delivery,
    item: Item,
    queue: usize,
    member: usize,
    instance: usize,
    /// Taken back when its instance was closed.
    revoked: bool,
}

struct World {
    buses: Vec<Bus>,
    closed: [bool; 2],
    slots: Vec<Option<Slot>>,
    queues: Vec<Queue>,
    hands: Vec<Hand>,
    next_event: u64,
    joined: usize,
    ids: BTreeMap<String, u64>,
    /// Event and attempts of each dead letter there must be.
    letters: Vec<(u64, u32)>,
}

impl World {
    fn new() -> Self {
        let here = EventEmitterPubSub::new();
        let there = here.connect();
        Self {
            buses: vec![here.into(), there.into()],
            closed: [false; 2],
            slots: (0..SLOTS).map(|_| None).collect(),
            queues: Vec::new(),
            hands: Vec::new(),
            next_event: 0,
            joined: 0,
            ids: BTreeMap::new(),
            letters: Vec::new(),
        }
    }

    async fn take(&mut self, step: Step) {
        self.queues.iter_mut().for_each(|queue| queue.pass(Instant::now()));
        match step {
            Step::Publish { from, events, local } => self.publish(from, events, local).await,
            Step::Subscribe { slot, on, kind } => self.subscribe(slot, on, kind).await,
            Step::Next { slot } => self.next(slot),
            Step::Settle { which, how } => self.settle(which, how),
            Step::Leave { slot, by_handle } => self.leave(slot, by_handle),
            Step::Pass { millis } => pass(Duration::from_millis(millis)).await,
            Step::Close { instance } => self.close(instance).await,
        }
    }

    async fn publish(&mut self, from: usize, events: u8, local: bool) {
        let numbers: Vec<u64> = (0..u64::from(events)).map(|i| self.next_event + i).collect();
        self.next_event += u64::from(events);
        let events: Vec<_> = numbers.iter().map(|n| std::sync::Arc::new(Event::new("model").with_data(*n))).collect();
        self.ids.extend(events.iter().map(|event| event.id().to_string()).zip(numbers.iter().copied()));
        let options = if local { PublishOptions::local_only() } else { PublishOptions::new() };
        let published = self.buses[from].publish_with(TOPIC, &events, options).await;
        assert_eq!(published.is_err(), self.closed[from], "{published:?}");
        if self.closed[from] {
            return;
        }
        let only = local.then_some(from);
        for queue in self.queues.iter_mut().filter(|queue| !queue.ended) {
            for event in &numbers {
                let item = Item { event: *event, attempt: 1, only };
                match only {
                    Some(instance) if !queue.has_member_of(instance) => {}
                    Some(instance) if queue.group => queue.local.entry(instance).or_default().ready.push_back(item),
                    _ => queue.ready.push_back(item),
                }
            }
        }
    }

    async fn subscribe(&mut self, slot: usize, on: usize, kind: Kind) {
        self.leave(slot, false);
        let retry = RetryPolicy::new().max_attempts(ATTEMPTS).backoff(BACKOFF, BACKOFF).jitter(0.0);
        let options = match kind {
            Kind::FanOut => SubscribeOptions::fan_out().ack_mode(AckMode::Manual),
            Kind::FanOutAuto => SubscribeOptions::fan_out(),
            Kind::Group(group) => SubscribeOptions::group(Group::new(format!("g{group}")).unwrap()),
        };
        let options = options.retry(retry).max_in_flight(IN_FLIGHT).prefetch(1024).dead_letter(Topic::new(DEAD).unwrap());
        let subscribed = self.buses[on].subscribe_with(TOPIC, options).await;
        assert_eq!(subscribed.is_err(), self.closed[on]);
        let Ok(subscription) = subscribed else { return };
        let group = matches!(kind, Kind::Group(_));
        let same = |other: &Slot| group && other.kind == kind && !self.queues[other.queue].ended;
        let queue = self.slots.iter().flatten().find(|other| same(other)).map(|other| other.queue).unwrap_or_else(|| {
            self.queues.push(Queue { group, ..Queue::default() });
            self.queues.len() - 1
        });
        self.queues[queue].members.insert(slot, on);
        self.slots[slot] = Some(Slot { subscription: Some(subscription), queue, kind, instance: on, member: self.joined });
        self.joined += 1;
    }

    fn next(&mut self, slot: usize) {
        let Some(Slot { subscription: Some(subscription), queue: place, kind, instance, member }) = &mut self.slots[slot]
        else {
            return;
        };
        let next = tokio::task::coop::unconstrained(subscription.next()).now_or_never();
        let queue = &mut self.queues[*place];
        if !queue.members.contains_key(&slot) {
            assert!(matches!(next, Some(None)), "slot {slot} has ended, but gave {next:?}");
            return;
        }
        let held = self.hands.iter().filter(|hand| hand.member == *member && !hand.revoked).count();
        let manual = *kind != Kind::FanOutAuto;
        let full = manual && held >= IN_FLIGHT;
        let mut fresh: Vec<Item> = queue.ready.front().copied().into_iter().collect();
        if let Some(local) = queue.local.get(instance) {
            fresh.extend(local.returned.iter().chain(local.ready.front()));
        }
        let owed = !queue.returned.is_empty() || !fresh.is_empty();
        let Some(Some(Ok(delivery))) = next else {
            assert!(next.is_none(), "slot {slot} gave {next:?}");
            assert!(full || !owed, "slot {slot} gave nothing, but is owed {:?} or {fresh:?}", queue.returned);
            return;
        };
        let (event, attempt) = (*delivery.data::<u64>().unwrap(), delivery.attempt());
        let is = |item: &Item| item.event == event && item.attempt == attempt;
        let may = queue.returned.iter().chain(&fresh).any(is);
        assert!(may && !full, "slot {slot} gave event {event}, attempt {attempt}; owed {:?}, {fresh:?}", queue.returned);
        let item = if let Some(at) = queue.returned.iter().position(is) {
            queue.returned.remove(at)
        } else if queue.ready.front().is_some_and(is) {
            queue.ready.pop_front().unwrap()
        } else {
            let local = queue.local.get_mut(instance).unwrap();
            match local.returned.iter().position(is) {
                Some(at) => local.returned.remove(at),
                None => local.ready.pop_front().unwrap(),
            }
        };
        if let Some(only) = item.only {
            assert_eq!(only, *instance, "local to another instance");
        }
        if manual {
            let (queue, instance, member) = (*place, *instance, *member);
            self.hands.push(Hand { delivery, item, queue, member, instance, revoked: false });
        } else {
            assert!(delivery.is_settled() && attempt == 1);
        }
    }

    fn settle(&mut self, which: usize, how: How) {
        if self.hands.is_empty() {
            return;
        }
        let Hand { delivery, item, queue, revoked, .. } = self.hands.remove(which % self.hands.len());
        let now = Instant::now();
        let receipt = match how {
            How::Done => Some(delivery.done()),
            How::Retry => Some(delivery.retry()),
            How::RetryAtOnce => Some(delivery.retry_after(Duration::ZERO)),
            How::Release => Some(delivery.release()),
            How::DeadLetter => Some(delivery.dead_letter("model")),
            How::Drop => {
                drop(delivery);
                None
            }
        };
        let queue = &mut self.queues[queue];
        let again = Item { attempt: item.attempt + 1, ..item };
        let mut settled = Settled::Done;
        match how {
            _ if revoked => settled = Settled::TooLate,
            How::Done => {}
            How::DeadLetter => self.letters.push((item.event, item.attempt)),
            _ if queue.ended => settled = Settled::TooLate,
            How::Release => queue.give_back(item),
            _ if item.attempt == ATTEMPTS => self.letters.push((item.event, item.attempt)),
            How::RetryAtOnce => queue.give_back(again),
            How::Retry | How::Drop => queue.delayed.push((now + BACKOFF, again)),
        }
        if let Some(receipt) = receipt {
            assert_eq!(receipt.now(), Some(settled), "{how:?} of {item:?}");
        }
    }

    fn leave(&mut self, slot: usize, by_handle: bool) {
        let Some(Slot { subscription, queue, .. }) = &mut self.slots[slot] else { return };
        self.queues[*queue].leave(slot);
        if by_handle {
            if let Some(subscription) = subscription {
                subscription.handle().stop();
            }
        } else {
            drop(subscription.take());
        }
    }

    async fn close(&mut self, instance: usize) {
        self.buses[instance].close(Duration::ZERO).await.unwrap();
        if std::mem::replace(&mut self.closed[instance], true) {
            return;
        }
        let members: Vec<(usize, usize)> = self
            .slots
            .iter()
            .enumerate()
            .filter_map(|(slot, of)| of.as_ref().filter(|of| of.instance == instance).map(|of| (slot, of.queue)))
            .collect();
        // Its members leave, and what they hold is for those who are left, if there are any.
        for (slot, queue) in members {
            self.queues[queue].leave(slot);
        }
        for hand in self.hands.iter_mut().filter(|hand| hand.instance == instance && !hand.revoked) {
            hand.revoked = true;
            let queue = &mut self.queues[hand.queue];
            if queue.ended {
                continue;
            }
            if hand.item.attempt == ATTEMPTS {
                self.letters.push((hand.item.event, hand.item.attempt));
            } else {
                queue.give_back(Item { attempt: hand.item.attempt + 1, ..hand.item });
            }
        }
    }

    /// At the end, everything that is owed comes, and the dead letters are those there must be.
    async fn finish(mut self) {
        for _ in 0..200 {
            while !self.hands.is_empty() {
                self.settle(0, How::Done);
            }
            self.queues.iter_mut().for_each(|queue| queue.pass(Instant::now()));
            (0..SLOTS).for_each(|slot| self.next(slot));
            pass(Duration::from_millis(60)).await;
        }
        assert!(self.hands.is_empty(), "it never ends");
        for (slot, of) in self.slots.iter().enumerate() {
            let Some(Slot { queue, .. }) = of.as_ref().filter(|of| self.queues[of.queue].members.contains_key(&slot)) else {
                continue;
            };
            let Queue { ready, returned, delayed, .. } = &self.queues[*queue];
            assert!(
                ready.is_empty() && returned.is_empty() && delayed.is_empty(),
                "slot {slot} is owed {:?}",
                self.queues[*queue]
            );
        }
        // An observer that was never part of the story lists the letters.
        let Some(bus) = self.buses.iter().zip(self.closed).find(|(_, closed)| !closed).map(|(bus, _)| bus) else { return };
        let mut letters = Vec::new();
        if let Ok(page) = bus.history(DEAD, Start::Earliest, 10_000).await {
            for (_, letter) in page.entries {
                let origin = Origin::of(&letter).unwrap();
                letters.push((self.ids[&origin.event], origin.attempts));
            }
        }
        letters.sort_unstable();
        self.letters.sort_unstable();
        assert_eq!(letters, self.letters, "dead letters");
    }
}

/// Lets time pass, and what comes due by it happen.
async fn pass(time: Duration) {
    tokio::time::advance(time).await;
    for _ in 0..4 {
        tokio::task::yield_now().await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_bus_does_what_the_model_says(script in script()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut world = World::new();
            for step in script.0 {
                world.take(step).await;
            }
            world.finish().await;
        });
    }
}
