//! Buses that keep, replay and forget wrongly.

use std::collections::HashSet;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::{
    Capabilities, Delivery, OnGap, Page, Receipt, ReplayIndex, Result, Retention, Settlement, Start, SubscribeOptions,
    Subscription, SubscriptionHandle, Topic, TrimFilter,
};

use crate::publishing::{changed, discard};
use crate::wrapper::{Honest, Parcel, Sabotage, View};
use crate::{Base, Saboteur, saboteur};

pub(crate) fn saboteurs() -> Vec<Saboteur> {
    let durable = vec![
        saboteur::<AlwaysLatest>("starts everything at the latest", &["B3", "R1"], &["SP-01", "RP-06"]),
        saboteur::<AlwaysEarliest>("starts everything at the earliest", &["B3"], &["SP-01", "SP-03"]),
        saboteur::<NewGroupEachTime>("forgets a group's place", &["B3"], &["SP-04", "SP-05"]),
        saboteur::<SkipsGaps>("skips gaps without a word", &["B4"], &["RP-10"]),
        saboteur::<LosesFirstLive>("loses an event between history and what is live", &["R1"], &["RP-06"]),
        saboteur::<RepeatsLast>("repeats an event between history and what is live", &["R1"], &["RP-06"]),
        saboteur::<CountsFromOne>("counts indices from 1", &["R2"], &["RP-02"]),
        saboteur::<OneGeneration>("goes on with the old generation after a topic was cleared", &["R2"], &["RP-25"]),
        saboteur::<BackwardsHistory>("lists history last first", &["R2"], &["RP-02", "OR-04"]),
        saboteur::<DropsRetries>("takes a retry for a repetition", &["R3"], &["RP-13"]),
        saboteur::<ClearsNothing>("does not forget what is cleared", &["R4"], &["CT-01"]),
        saboteur::<ClearStops>("ends subscriptions when their topic is cleared", &["R4"], &["CT-03"]),
        saboteur::<TrimsAll>("trims the runs of others, too", &["R4"], &["CT-09"]),
        saboteur::<TrimmedComesBack>("hands out for ever what was trimmed while it was held", &["R4"], &["CT-10"]),
        saboteur::<NoCursors>("gives pages without a way on", &["B3"], &["AD-06"]),
    ];
    let mut all: Vec<_> = durable.into_iter().map(|saboteur| saboteur.over(Base::SlowRemote)).collect();
    all.extend([
        saboteur::<QuietStart>("quietly starts at the latest where nothing is retained", &["B3", "K1"], &["SP-02", "LI-14"]),
        saboteur::<EmptyHistory>("has an empty history instead of none", &["R6", "K1"], &["RP-01", "META-2"]),
        saboteur::<TrimsUnkept>("says that it trimmed what it never kept", &["R6"], &["CT-02"]),
        saboteur::<ClearStops>("ends subscriptions when a topic is cleared that keeps nothing", &["R4"], &["CT-03"]),
        saboteur::<Boasts>("declares a history it does not have", &["K1"], &["META-2"]),
        saboteur::<QuietRedrive>("redrives letters that it does not keep, without a word", &["K1"], &["AK-45"])
            .over(Base::Forgetful),
        saboteur::<Modest>("declares less than it advertises", &["K1"], &["META-1"]),
    ]);
    all
}

#[derive(Default)]
struct AlwaysLatest;

#[async_trait]
impl Sabotage for AlwaysLatest {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.start(Start::Latest)).await
    }
}

#[derive(Default)]
struct AlwaysEarliest;

#[async_trait]
impl Sabotage for AlwaysEarliest {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.start(Start::Earliest)).await
    }
}

#[derive(Default)]
struct NewGroupEachTime(Mutex<u64>);

#[async_trait]
impl Sabotage for NewGroupEachTime {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        if let Some(group) = &mut options.group {
            let mut count = self.0.lock();
            *count += 1;
            *group = pubsub_core::Group::new(format!("{}-{count}", &group.as_str()[..6]))?;
        }
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct SkipsGaps;

#[async_trait]
impl Sabotage for SkipsGaps {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.on_gap(OnGap::Earliest)).await
    }
}

/// Knows what was there when a subscription began.
#[derive(Default)]
struct Boundary(Mutex<HashSet<u64>>);

impl Boundary {
    /// Whether this is the first event of a subscription that was not there when it began.
    fn is_crossed(&self, view: &View, parcel: &Parcel) -> bool {
        view.options.start.is_some() && parcel.event.created_at() > view.since && self.0.lock().insert(view.number)
    }
}

#[derive(Default)]
struct LosesFirstLive(Boundary);

impl Sabotage for LosesFirstLive {
    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        if self.0.is_crossed(view, &parcel) { discard(parcel) } else { vec![parcel] }
    }
}

#[derive(Default)]
struct RepeatsLast(Boundary);

impl Sabotage for RepeatsLast {
    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        if self.0.is_crossed(view, &parcel) { vec![parcel.copy(), parcel] } else { vec![parcel] }
    }
}

fn indexed(parcel: &mut Parcel, change: impl FnOnce(ReplayIndex) -> ReplayIndex) {
    if let Some(index) = parcel.event.index() {
        parcel.event = changed(&parcel.event, |event| event.with_index(Some(change(index))));
    }
}

#[derive(Default)]
struct CountsFromOne;

#[async_trait]
impl Sabotage for CountsFromOne {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        indexed(&mut parcel, |index| ReplayIndex { index: index.index + 1, ..index });
        vec![parcel]
    }

    async fn history(&self, honest: &Honest, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        let mut page = honest.history(topic, from, limit).await?;
        for (_, event) in &mut page.entries {
            let index = event.index().map(|index| ReplayIndex { index: index.index + 1, ..index });
            *event = changed(event, |event| event.with_index(index));
        }
        Ok(page)
    }
}

#[derive(Default)]
struct OneGeneration;

impl Sabotage for OneGeneration {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        indexed(&mut parcel, |index| ReplayIndex { generation: 0, ..index });
        vec![parcel]
    }
}

#[derive(Default)]
struct BackwardsHistory;

#[async_trait]
impl Sabotage for BackwardsHistory {
    async fn history(&self, honest: &Honest, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        let mut page = honest.history(topic, from, limit).await?;
        page.entries.reverse();
        Ok(page)
    }
}

/// A filter for repetitions that does not look at the attempt.
#[derive(Default)]
struct DropsRetries(Mutex<HashSet<(u64, String)>>);

impl Sabotage for DropsRetries {
    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        let new = self.0.lock().insert((view.number, parcel.event.id().to_string()));
        if new { vec![parcel] } else { discard(parcel) }
    }
}

#[derive(Default)]
struct ClearsNothing;

#[async_trait]
impl Sabotage for ClearsNothing {
    async fn clear_topic(&self, _: &Honest, _: &Topic) -> Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct ClearStops(Mutex<Vec<SubscriptionHandle>>);

#[async_trait]
impl Sabotage for ClearStops {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let subscription = honest.subscribe(topic, options).await?;
        self.0.lock().push(subscription.handle());
        Ok(subscription)
    }

    async fn clear_topic(&self, honest: &Honest, topic: &Topic) -> Result<()> {
        self.0.lock().iter().for_each(SubscriptionHandle::stop);
        honest.clear_topic(topic).await
    }
}

#[derive(Default)]
struct TrimsAll;

#[async_trait]
impl Sabotage for TrimsAll {
    async fn trim_topic(&self, honest: &Honest, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        let page = honest.history(topic, Start::Earliest, 1000).await?;
        let mut trimmed = 0;
        let runs: HashSet<_> = page.entries.iter().map(|(_, event)| event.run_id().to_owned()).collect();
        for run in runs.into_iter().chain([filter.run_id]) {
            trimmed += honest.trim_topic(topic, TrimFilter::run(run)).await?;
        }
        Ok(trimmed)
    }
}

#[derive(Default)]
struct TrimmedComesBack(Mutex<bool>);

#[async_trait]
impl Sabotage for TrimmedComesBack {
    async fn trim_topic(&self, honest: &Honest, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        *self.0.lock() = true;
        honest.trim_topic(topic, filter).await
    }

    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        if *self.0.lock() { delivery.release() } else { delivery.settle(settlement) }
    }
}

/// Keeps no dead letters, and says so: no saboteur, but a bus of its kind.
#[derive(Default)]
pub(crate) struct Forgetful;

impl Sabotage for Forgetful {
    fn declared(&self, mut honest: Capabilities) -> Capabilities {
        honest.dead_letter_history = false;
        honest
    }

    fn advertised(&self, honest: Capabilities) -> Capabilities {
        self.declared(honest)
    }
}

/// Does not declare that it keeps letters, but says to who asks that it does.
#[derive(Default)]
struct QuietRedrive;

impl Sabotage for QuietRedrive {
    fn advertised(&self, mut honest: Capabilities) -> Capabilities {
        honest.dead_letter_history = true;
        honest
    }
}

#[derive(Default)]
struct NoCursors;

#[async_trait]
impl Sabotage for NoCursors {
    async fn history(&self, honest: &Honest, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        Ok(Page { next: None, ..honest.history(topic, from, limit).await? })
    }
}

#[derive(Default)]
struct QuietStart;

#[async_trait]
impl Sabotage for QuietStart {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        if !honest.capabilities().supports(pubsub_core::Capability::History) {
            options.start = None;
        }
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct EmptyHistory;

#[async_trait]
impl Sabotage for EmptyHistory {
    async fn history(&self, honest: &Honest, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        Ok(honest.history(topic, from, limit).await.unwrap_or_default())
    }
}

#[derive(Default)]
struct TrimsUnkept;

#[async_trait]
impl Sabotage for TrimsUnkept {
    async fn trim_topic(&self, honest: &Honest, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        Ok(honest.trim_topic(topic, filter).await?.max(1))
    }
}

#[derive(Default)]
struct Boasts;

impl Sabotage for Boasts {
    fn declared(&self, mut honest: Capabilities) -> Capabilities {
        honest.retention = Retention::History;
        honest
    }

    fn advertised(&self, honest: Capabilities) -> Capabilities {
        self.declared(honest)
    }
}

#[derive(Default)]
struct Modest;

impl Sabotage for Modest {
    fn declared(&self, mut honest: Capabilities) -> Capabilities {
        honest.leases = None;
        honest
    }
}
