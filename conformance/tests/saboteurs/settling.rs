//! Buses that settle wrongly.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_conformance::Process;
use pubsub_core::{
    AckMode, Delivery, Event, PublishOptions, Receipt, Result, RetryPolicy, Settled, Settlement, SubscribeOptions,
    Subscription, SubscriptionStatus, Topic,
};

use crate::publishing::{FOREVER, discard};
use crate::wrapper::{Honest, Parcel, Sabotage, View};
use crate::{Base, Saboteur, saboteur};

pub(crate) fn saboteurs() -> Vec<Saboteur> {
    vec![
        saboteur::<ByHand>("leaves a stream of fan-out unsettled at hand-over", &["S1"], &["AK-42"]),
        saboteur::<AtHandOver>("settles a group's deliveries at hand-over", &["S1", "S2"], &["AK-05", "AK-20", "AK-01"]),
        saboteur::<DropIsDone>("takes what is dropped unsettled for done", &["S2"], &["AK-20"]),
        saboteur::<EatsOne>("loses what it takes while it is stopped", &["S2", "C4"], &["CC-04"]),
        saboteur::<LeavesForGood>("takes what its members held with them when they leave", &["S2"], &["GR-09"]),
        saboteur::<LeavesForGood>("keeps nothing for a durable group that its last member held", &["S2"], &["GR-12"])
            .over(Base::SlowRemote),
        saboteur::<ReleaseCounts>("counts a release as an attempt", &["S2"], &["AD-01"]),
        saboteur::<ForgetsAttempts>("forgets attempts", &["S3"], &["AK-01", "AK-02"]),
        saboteur::<SkipsAttempts>("counts each retry twice", &["S3"], &["AK-01", "AK-02"]),
        saboteur::<StartsAtZero>("begins to count at 2", &["S3"], &["PS-09"]),
        saboteur::<RetriesToAll>("retries to everybody, as a new event", &["S3"], &["AK-19", "GR-16"]),
        saboteur::<RetriesToAll>("stores a retry once more", &["S3"], &["AK-34"]).over(Base::SlowRemote),
        saboteur::<NeverRetries>("never retries", &["S3"], &["AK-01", "BA-08"]),
        saboteur::<BlocksOnRetry>("holds everything back while a retry waits", &["S3"], &["AK-16"]),
        saboteur::<ForgetsTheRest>("forgets metadata on a retry", &["S3"], &["AD-11"]),
        saboteur::<AtOnce>("retries without back-off", &["S4"], &["AK-39"]),
        saboteur::<Endless>("never gives up", &["S4"], &["AK-06", "AD-03"]),
        saboteur::<Impatient>("gives up after the third attempt", &["S4"], &["AK-07", "AK-08"]),
        saboteur::<LosesLetters>("drops what it should dead-letter", &["S4"], &["AD-03", "AK-46"]),
        saboteur::<KeepsId>("dead-letters the event itself", &["S4"], &["AD-03"]),
        saboteur::<NoOrigin>("does not say where a dead letter comes from", &["S4"], &["AD-03", "AD-14"]),
        saboteur::<SilentDrop>("does not count what it drops", &["S4"], &["AK-06", "AK-46"]),
        saboteur::<HoldsForGood>("ignores `max_hold`", &["S5"], &["AK-04", "AD-07"]),
        saboteur::<Snatches>("takes from a member that is alive", &["S5"], &["AK-21"]),
        saboteur::<Immortals>("does not notice that a member was killed", &["S5"], &["GR-13", "FR-16"]).over(Base::SlowRemote),
        saboteur::<NoExtension>("says that it extends, and does not", &["S5", "S6"], &["AK-30"]),
        saboteur::<SaysDone>("answers late settlements as if they counted", &["S6"], &["AK-29", "AD-07"]),
        saboteur::<WaitsForFlush>("settles only when it is flushed", &["S6"], &["AK-10", "AK-11"]),
        saboteur::<NeverAnswers>("never answers a settlement", &["S6"], &["AK-03", "CL-07"]),
        saboteur::<Malformed>("hands out what it cannot read", &["S7"], &["AK-33"]).over(Base::SlowRemote),
        saboteur::<Stalls>("stalls at what it cannot read", &["S7"], &["AK-33"]).over(Base::SlowRemote),
        saboteur::<ForgetsDropped>("does not settle what a batch drops", &["T1"], &["BA-09"]),
        saboteur::<Reorders>("reorders what a batch is made of", &["T1"], &["BA-02", "BA-06"]),
    ]
}

#[derive(Default)]
struct ByHand;

impl Sabotage for ByHand {
    fn mode(&self, _: AckMode) -> AckMode {
        AckMode::Manual
    }
}

#[derive(Default)]
struct AtHandOver;

impl Sabotage for AtHandOver {
    fn mode(&self, _: AckMode) -> AckMode {
        AckMode::Auto
    }
}

#[derive(Default)]
struct DropIsDone;

impl Sabotage for DropIsDone {
    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        match settlement {
            Settlement::Retry { after: None, reason: Some(reason) } if &*reason == "dropped unsettled" => delivery.done(),
            other => delivery.settle(other),
        }
    }
}

/// Takes one more after it was stopped, which nobody gets to see.
#[derive(Default)]
struct EatsOne(Mutex<HashSet<u64>>);

impl Sabotage for EatsOne {
    fn stop(&self, view: &View) {
        if view.handle.status().queued == 0 {
            view.handle.stop();
        } else {
            self.0.lock().insert(view.number);
        }
    }

    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        if self.0.lock().remove(&view.number) {
            view.handle.stop();
            return discard(parcel);
        }
        vec![parcel]
    }
}

#[derive(Default)]
struct LeavesForGood;

impl Sabotage for LeavesForGood {
    fn settle(&self, view: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        if view.handle.status().ended { delivery.done() } else { delivery.settle(settlement) }
    }
}

#[derive(Default)]
struct ReleaseCounts;

impl Sabotage for ReleaseCounts {
    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        delivery.settle(if settlement == Settlement::Release {
            Settlement::Retry { after: Some(Duration::ZERO), reason: None }
        } else {
            settlement
        })
    }
}

#[derive(Default)]
struct ForgetsAttempts;

impl Sabotage for ForgetsAttempts {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        parcel.attempt = 1;
        vec![parcel]
    }
}

#[derive(Default)]
struct SkipsAttempts;

impl Sabotage for SkipsAttempts {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        parcel.attempt = 2 * parcel.attempt - 1;
        vec![parcel]
    }
}

#[derive(Default)]
struct StartsAtZero;

impl Sabotage for StartsAtZero {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        parcel.attempt += 1;
        vec![parcel]
    }
}

#[derive(Default)]
struct RetriesToAll;

impl Sabotage for RetriesToAll {
    fn settle(&self, view: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        if let (Settlement::Retry { .. }, Some(honest)) = (&settlement, view.honest()) {
            // An id of its own, or a bus that knows repeats would not be fooled.
            let event = delivery.event();
            let again = Event::new(event.event_type()).with_run_id(event.run_id()).with_payload(event.payload().clone());
            publish_later(honest, view.topic.clone(), Arc::new(again));
            return delivery.done();
        }
        delivery.settle(settlement)
    }
}

/// Publishes in a task of its own; outside a runtime, not at all.
fn publish_later(honest: Honest, topic: Topic, event: Arc<Event>) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(async move { drop(honest.publish(&topic, &[event], PublishOptions::new()).await) });
    }
}

#[derive(Default)]
struct NeverRetries;

impl Sabotage for NeverRetries {
    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        if matches!(settlement, Settlement::Retry { .. }) { delivery.done() } else { delivery.settle(settlement) }
    }
}

/// With one delivery at a time, and that one kept until its back-off has passed.
#[derive(Default)]
struct BlocksOnRetry;

#[async_trait]
impl Sabotage for BlocksOnRetry {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.max_in_flight(1)).await
    }

    fn settle(&self, view: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        if let (Settlement::Retry { after, .. }, Ok(runtime)) = (&settlement, tokio::runtime::Handle::try_current()) {
            let backoff = after.unwrap_or_else(|| view.options.retry.backoff_after(delivery.attempt(), 0.0));
            runtime.spawn(async move {
                tokio::time::sleep(backoff).await;
                drop(delivery.retry_after(Duration::ZERO));
            });
            return Receipt::ready(Settled::Done);
        }
        delivery.settle(settlement)
    }
}

#[derive(Default)]
struct ForgetsTheRest;

impl Sabotage for ForgetsTheRest {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        if parcel.attempt > 1 {
            let event = &parcel.event;
            let bare = Event::stamped(event.id().clone(), event.event_type(), event.created_at());
            parcel.event = Arc::new(bare.with_run_id(event.run_id()).with_payload(event.payload().clone()));
        }
        vec![parcel]
    }
}

#[derive(Default)]
struct AtOnce;

#[async_trait]
impl Sabotage for AtOnce {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        options.retry = options.retry.backoff(Duration::ZERO, Duration::ZERO);
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct Endless;

#[async_trait]
impl Sabotage for Endless {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        options.retry = options.retry.max_attempts(0);
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct Impatient;

#[async_trait]
impl Sabotage for Impatient {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        let RetryPolicy { max_attempts, .. } = &options.retry;
        let fewer = max_attempts.map_or(3, |attempts: NonZeroU32| attempts.get().min(3));
        options.retry = options.retry.max_attempts(fewer);
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct LosesLetters;

#[async_trait]
impl Sabotage for LosesLetters {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, mut options: SubscribeOptions) -> Result<Subscription> {
        options.dead_letter = None;
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct KeepsId;

impl Sabotage for KeepsId {
    fn settle(&self, view: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        let gives_up = match &settlement {
            Settlement::Retry { .. } => view.options.retry.is_exhausted_after(delivery.attempt()),
            other => matches!(other, Settlement::DeadLetter { .. }),
        };
        if let (true, Some(dead), Some(honest)) = (gives_up, view.options.dead_letter.clone(), view.honest()) {
            publish_later(honest, dead, delivery.event().clone());
            return delivery.done();
        }
        delivery.settle(settlement)
    }
}

#[derive(Default)]
struct NoOrigin;

impl Sabotage for NoOrigin {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        if pubsub_core::Origin::of(&parcel.event).is_some() {
            let event = &parcel.event;
            let bare = Event::stamped(event.id().clone(), event.event_type(), event.created_at());
            parcel.event = Arc::new(bare.with_run_id(event.run_id()).with_payload(event.payload().clone()));
        }
        vec![parcel]
    }
}

#[derive(Default)]
struct SilentDrop;

impl Sabotage for SilentDrop {
    fn subscription_status(&self, mut honest: SubscriptionStatus) -> SubscriptionStatus {
        (honest.dropped, honest.dead_lettered) = (0, 0);
        honest
    }
}

#[derive(Default)]
struct HoldsForGood;

#[async_trait]
impl Sabotage for HoldsForGood {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.max_hold(FOREVER)).await
    }
}

#[derive(Default)]
struct Snatches;

#[async_trait]
impl Sabotage for Snatches {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options.max_hold(Duration::from_millis(20))).await
    }
}

#[derive(Default)]
struct Immortals;

#[async_trait]
impl Sabotage for Immortals {
    async fn kill(&self, process: Box<dyn Process>) -> Result<()> {
        std::mem::forget(process);
        Ok(())
    }
}

#[derive(Default)]
struct NoExtension;

impl Sabotage for NoExtension {
    fn extend(&self, _: &Delivery) -> Receipt {
        Receipt::ready(Settled::Done)
    }
}

#[derive(Default)]
struct SaysDone;

impl Sabotage for SaysDone {
    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        drop(delivery.settle(settlement));
        Receipt::ready(Settled::Done)
    }
}

#[derive(Default)]
struct WaitsForFlush(Mutex<Vec<(Delivery, Settlement)>>);

#[async_trait]
impl Sabotage for WaitsForFlush {
    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        self.0.lock().push((delivery, settlement));
        Receipt::ready(Settled::Done)
    }

    async fn flush(&self, honest: &Honest) -> Result<()> {
        let waiting = std::mem::take(&mut *self.0.lock());
        waiting.into_iter().for_each(|(delivery, settlement)| drop(delivery.settle(settlement)));
        honest.flush().await
    }
}

#[derive(Default)]
struct NeverAnswers(Mutex<Vec<tokio::sync::oneshot::Sender<Settled>>>);

impl Sabotage for NeverAnswers {
    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        drop(delivery.settle(settlement));
        let (answer, receipt) = Receipt::pending();
        self.0.lock().push(answer);
        receipt
    }
}

#[derive(Default)]
struct Malformed;

#[async_trait]
impl Sabotage for Malformed {
    async fn inject_raw(&self, _: &dyn pubsub_conformance::Raw, bus: &Honest, topic: &Topic, bytes: &[u8]) -> Result<()> {
        let text = String::from_utf8_lossy(bytes).into_owned();
        bus.publish(topic, &[Arc::new(Event::new("unreadable").with_data(text))], PublishOptions::new()).await?;
        Ok(())
    }
}

/// What cannot be read is never settled, and nothing behind it is handed over.
#[derive(Default)]
struct Stalls(Mutex<Option<Topic>>);

#[async_trait]
impl Sabotage for Stalls {
    async fn inject_raw(&self, _: &dyn pubsub_conformance::Raw, _: &Honest, topic: &Topic, _: &[u8]) -> Result<()> {
        self.0.lock().replace(topic.clone());
        Ok(())
    }

    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        if self.0.lock().as_ref() == Some(&view.topic) { discard(parcel) } else { vec![parcel] }
    }
}

#[derive(Default)]
struct ForgetsDropped;

impl Sabotage for ForgetsDropped {
    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        // What a batch drops is done before anything else of it is.
        if settlement == Settlement::Done { Receipt::ready(Settled::Done) } else { delivery.settle(settlement) }
    }
}

/// Swaps pairs.
#[derive(Default)]
struct Reorders(Mutex<HashMap<u64, Parcel>>);

impl Sabotage for Reorders {
    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        match self.0.lock().remove(&view.number) {
            Some(first) => vec![parcel, first],
            None if view.handle.status().queued > 0 => {
                self.0.lock().insert(view.number, parcel);
                Vec::new()
            }
            None => vec![parcel],
        }
    }
}
