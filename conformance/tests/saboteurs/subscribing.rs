//! Buses that attach, queue and separate subscriptions wrongly.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::{
    Delivery, Event, Filter, Group, Positions, PublishError, PublishOptions, Receipt, Result, Settlement, SubscribeOptions,
    Subscription, SubscriptionHandle, Topic, TopicStatus,
};
use tokio::sync::Notify;

use crate::publishing::{FOREVER, discard};
use crate::wrapper::{Honest, Parcel, Sabotage, View};
use crate::{Base, Saboteur, saboteur};

pub(crate) fn saboteurs() -> Vec<Saboteur> {
    vec![
        saboteur::<LateStart>("says that a subscription is attached a little too early", &["B1"], &["PS-16"]),
        saboteur::<LateStart>("attaches members a little after it said so", &["B1"], &["CC-14"]),
        saboteur::<Echoes>("delivers to every topic of an instance", &["B2"], &["PS-05", "PS-26"]),
        saboteur::<OneTopic>("takes topics for the same if they only differ in spelling", &["B2"], &["PS-13"]),
        saboteur::<Merges>("merges equal subscriptions", &["B2"], &["PS-17", "PS-02"]),
        saboteur::<OneGroup>("feeds all groups of a topic as if they were one", &["B2"], &["GR-04", "GR-15"]),
        saboteur::<NoGroup>("gives each event to every member of a group", &["P1", "B2"], &["GR-01", "GR-06", "CC-18"]),
        saboteur::<GroupPerInstance>("has a group per instance", &["B2"], &["GR-06"]),
        saboteur::<StopsAll>("stops all subscriptions of a topic with one", &["B2"], &["CC-15"]),
        saboteur::<NeverStops>("delivers after unsubscribing", &["B2"], &["CC-01", "GR-10"]),
        saboteur::<OneForAll>("lets a stuck consumer hold up the publishers", &["B2", "B5"], &["PS-22"]),
        saboteur::<RoundRobin>("assigns events to members before they ask", &["B2", "S2"], &["GR-02"]),
        saboteur::<CountsNothing>("says of what it knows that it is nothing", &["B2"], &["AD-09"]),
        saboteur::<Unbounded>("queues without a bound", &["B5"], &["AD-02"]),
        saboteur::<WaitsForEver>("waits for ever at a full queue", &["B5"], &["AD-02"]),
        saboteur::<LosesWhenFull>("loses the oldest at a full queue although nobody asked for that", &["B5"], &["AD-02"]),
        saboteur::<ManyInFlight>("ignores `max_in_flight`", &["B5"], &["AK-38"]),
        saboteur::<LosesUnsaid>("does not tell what was lost at a full queue", &["B5"], &["AD-22"]),
        saboteur::<LosesUnsaid>("does not tell a group what is no longer retained", &["R5"], &["CT-08"]).over(Base::SlowRemote),
        saboteur::<WaitsForHandlers>("lets publishers wait until handlers are done", &["B6"], &["PS-24"]),
        saboteur::<Unfiltered>("ignores filters", &["B7"], &["AK-31"]),
        saboteur::<RetriesFiltered>("retries what a filter rejects", &["B7"], &["AK-31"]),
    ]
}

/// What is published first after a subscription was made is not seen by anybody.
#[derive(Default)]
struct LateStart(Mutex<HashSet<Topic>>);

#[async_trait]
impl Sabotage for LateStart {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.0.lock().insert(topic.clone());
        honest.subscribe(topic, options).await
    }

    async fn publish(
        &self,
        honest: &Honest,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        let too_early = self.0.lock().remove(topic);
        if too_early { Ok(Positions::none()) } else { honest.publish(topic, events, options).await }
    }
}

/// Publishes to the topics it has seen before, too.
#[derive(Default)]
struct Echoes(Mutex<Vec<Topic>>);

#[async_trait]
impl Sabotage for Echoes {
    async fn publish(
        &self,
        honest: &Honest,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        let others = self.0.lock().clone();
        for other in others.iter().filter(|other| *other != topic) {
            honest.publish(other, events, options.clone()).await?;
        }
        honest.publish(topic, events, options).await
    }

    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.0.lock().push(topic.clone());
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct OneTopic;

fn folded(topic: &Topic) -> Topic {
    let plain: String = topic.as_str().to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    Topic::new(plain).unwrap_or_else(|_| topic.clone())
}

#[async_trait]
impl Sabotage for OneTopic {
    async fn publish(
        &self,
        honest: &Honest,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        honest.publish(&folded(topic), events, options).await
    }

    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(&folded(topic), options).await
    }
}

#[derive(Default)]
struct Merges;

#[async_trait]
impl Sabotage for Merges {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        options.group = options.group.or_else(|| Group::new("everybody").ok());
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct OneGroup;

#[async_trait]
impl Sabotage for OneGroup {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        options.group = options.group.and_then(|_| Group::new("the-group").ok());
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct NoGroup;

#[async_trait]
impl Sabotage for NoGroup {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        options.group = None;
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct GroupPerInstance;

#[async_trait]
impl Sabotage for GroupPerInstance {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        let instance = Arc::as_ptr(honest).cast::<()>() as usize;
        options.group = options.group.and_then(|group| Group::new(format!("{}-{instance}", &group.as_str()[..8])).ok());
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct StopsAll(Mutex<Vec<SubscriptionHandle>>);

#[async_trait]
impl Sabotage for StopsAll {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let subscription = honest.subscribe(topic, options).await?;
        self.0.lock().push(subscription.handle());
        Ok(subscription)
    }

    fn stop(&self, _: &View) {
        let all = self.0.lock().clone();
        all.iter().for_each(SubscriptionHandle::stop);
    }
}

#[derive(Default)]
struct NeverStops;

impl Sabotage for NeverStops {
    fn stop(&self, _: &View) {}
}

#[derive(Default)]
struct OneForAll;

#[async_trait]
impl Sabotage for OneForAll {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.prefetch(1)).await
    }
}

/// Each member is a group of its own, and its turn comes whether it asks or not.
#[derive(Default)]
struct RoundRobin(AtomicUsize);

#[async_trait]
impl Sabotage for RoundRobin {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        if options.group.is_some() {
            options.group = Some(Group::new(self.0.fetch_add(1, Ordering::SeqCst).to_string())?);
        }
        honest.subscribe(topic, options).await
    }

    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        let turn = parcel.event.id().to_string().bytes().map(usize::from).sum::<usize>() % self.0.load(Ordering::SeqCst).max(1);
        let me = view.below.group.as_ref().map(|member| member.as_str().to_owned());
        if me.is_none_or(|me| me == turn.to_string()) { vec![parcel] } else { discard(parcel) }
    }
}

#[derive(Default)]
struct CountsNothing;

#[async_trait]
impl Sabotage for CountsNothing {
    async fn inspect(&self, honest: &Honest, topic: &Topic) -> Result<TopicStatus> {
        let mut status = honest.inspect(topic).await?;
        for group in &mut status.groups {
            (group.waiting, group.held) = (Some(0), Some(0));
        }
        Ok(status)
    }
}

#[derive(Default)]
struct Unbounded;

#[async_trait]
impl Sabotage for Unbounded {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.prefetch(1 << 20)).await
    }
}

#[derive(Default)]
struct WaitsForEver;

#[async_trait]
impl Sabotage for WaitsForEver {
    async fn publish(
        &self,
        honest: &Honest,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        honest.publish(topic, events, options.timeout(FOREVER)).await
    }
}

#[derive(Default)]
struct LosesWhenFull;

#[async_trait]
impl Sabotage for LosesWhenFull {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.overflow(pubsub_core::Overflow::DropOldest)).await
    }
}

#[derive(Default)]
struct ManyInFlight;

#[async_trait]
impl Sabotage for ManyInFlight {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.max_in_flight(1 << 20)).await
    }
}

#[derive(Default)]
struct LosesUnsaid;

impl Sabotage for LosesUnsaid {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        parcel.lagged = 0;
        vec![parcel]
    }
}

/// A publish returns when nothing is in anybody's hands.
#[derive(Default)]
struct WaitsForHandlers {
    held: AtomicU64,
    settled: Notify,
}

#[async_trait]
impl Sabotage for WaitsForHandlers {
    async fn publish(
        &self,
        honest: &Honest,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        let done = honest.publish(topic, events, options).await;
        while self.held.load(Ordering::SeqCst) > 0 {
            let _ = tokio::time::timeout(Duration::from_millis(5), self.settled.notified()).await;
        }
        done
    }

    fn deliver(&self, _: &View, parcel: Parcel) -> Vec<Parcel> {
        self.held.fetch_add(1, Ordering::SeqCst);
        vec![parcel]
    }

    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        self.held.fetch_sub(1, Ordering::SeqCst);
        self.settled.notify_one();
        delivery.settle(settlement)
    }
}

#[derive(Default)]
struct Unfiltered;

impl Sabotage for Unfiltered {
    fn options(&self, mut asked: SubscribeOptions) -> SubscribeOptions {
        asked.filter = None;
        asked
    }
}

/// Filters by itself, and lets what it rejects fall.
#[derive(Default)]
struct RetriesFiltered(Mutex<Option<Filter>>);

impl Sabotage for RetriesFiltered {
    fn options(&self, mut asked: SubscribeOptions) -> SubscribeOptions {
        if let Some(filter) = asked.filter.take() {
            self.0.lock().replace(filter);
        }
        asked
    }

    fn deliver(&self, _: &View, parcel: Parcel) -> Vec<Parcel> {
        let admitted = self.0.lock().as_ref().is_none_or(|filter| filter.admits(&parcel.event));
        if admitted { vec![parcel] } else { Vec::new() }
    }
}
