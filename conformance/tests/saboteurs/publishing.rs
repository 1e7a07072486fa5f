//! Buses that publish wrongly.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_conformance::Job;
use pubsub_core::{Event, Fate, Payload, Positions, PublishError, PublishOptions, ReplayIndex, Result, Timestamp, Topic};

use crate::wrapper::{Counter, Honest, Parcel, Sabotage, View};
use crate::{Base, Saboteur, saboteur};

pub(crate) fn saboteurs() -> Vec<Saboteur> {
    vec![
        saboteur::<Loses>("loses every fifth event", &["P1"], &["PS-02", "PS-10", "GR-03"]),
        saboteur::<Doubles>("publishes every fifth event twice", &["P1"], &["PS-02", "PS-10", "GR-01"]),
        saboteur::<HoldsBack>("says it has published while the last event waits for the next", &["P1"], &["PS-04", "GR-03"]),
        saboteur::<NoEcho>("does not publish to the publisher's own subscriptions", &["P1"], &["PS-04"]),
        saboteur::<ToOthersOnly>("forgets other instances", &["P1"], &["PS-03", "GR-06"]),
        saboteur::<DiesTooEarly>("loses what a process published last before it died", &["P1"], &["PS-15"])
            .over(Base::SlowRemote),
        saboteur::<FailsUnheard>("refuses to publish where nobody listens", &["P1"], &["PS-14"]),
        saboteur::<ForgetsFates>("says of nothing that it was published when a call fails half way", &["B5"], &["AD-13"]),
        saboteur::<ForgetsFates>("says of nothing that it was published when a write fails half way", &["P1"], &["AD-04"])
            .over(Base::SlowRemote),
        saboteur::<BackwardsTogether>("publishes the events of one call last first", &["P3", "P2"], &["OR-01", "BA-02"]),
        saboteur::<LateFirst>("lets every fifth event overtake the one before it", &["P2"], &["OR-01", "GR-03"]),
        saboteur::<Leaks>("publishes `local_only` events to everybody", &["P4"], &["LO-02"]),
        saboteur::<LocalNowhere>("publishes `local_only` events to nobody", &["P4"], &["LO-01", "LO-04"]),
        saboteur::<LocalAsks>("asks the server before it publishes `local_only` events", &["P4"], &["LO-15"])
            .over(Base::SlowRemote),
        saboteur::<LocalAsText>("serialises `local_only` events", &["P4"], &["LO-03"]),
        saboteur::<Restamps>("gives each event a new id", &["P5"], &["PS-01", "PS-08", "PS-12"]),
        saboteur::<Retimes>("gives each event the time of its publishing", &["P5"], &["PS-07", "PS-12"]),
        saboteur::<TrustsIndex>("gives events an index although nothing is retained", &["P5"], &["PS-12"]),
        saboteur::<Partial>("publishes what is small enough before it refuses the rest", &["P6"], &["LI-02"])
            .over(Base::SlowRemote),
        saboteur::<NoLimit>("cuts what is too large instead of refusing it", &["P6"], &["LI-02"]).over(Base::SlowRemote),
        saboteur::<Rounds>("writes numbers as floating point", &["P7"], &["PS-11"]),
        saboteur::<Lenient>("lets pass what does not survive JSON", &["P7"], &["AD-05"]).over(Base::MemoryStrict),
        saboteur::<Strips>("drops metadata", &["S3", "S4"], &["AD-11"]),
    ]
}

type Published = Result<Positions, PublishError>;

/// Publishes some of the events in place of all, and says that it was all.
async fn instead(honest: &Honest, topic: &Topic, events: Vec<Arc<Event>>, options: PublishOptions) -> Published {
    honest.publish(topic, &events, options).await
}

#[derive(Default)]
struct Loses(Counter);

#[async_trait]
impl Sabotage for Loses {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let kept = events.iter().filter(|_| !self.0.next("").is_multiple_of(5)).cloned().collect();
        instead(honest, topic, kept, options).await
    }
}

#[derive(Default)]
struct Doubles(Counter);

#[async_trait]
impl Sabotage for Doubles {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let twice =
            |event: &Arc<Event>| std::iter::repeat_n(event.clone(), if self.0.next("").is_multiple_of(5) { 2 } else { 1 });
        instead(honest, topic, events.iter().flat_map(twice).collect(), options).await
    }
}

#[derive(Default)]
struct HoldsBack(Mutex<HashMap<Topic, Arc<Event>>>);

#[async_trait]
impl Sabotage for HoldsBack {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let mut due = Vec::new();
        for event in events {
            due.extend(self.0.lock().insert(topic.clone(), event.clone()));
        }
        instead(honest, topic, due, options).await
    }
}

/// Which instance published what, and which is told of it.
#[derive(Default)]
struct NoEcho(Mutex<HashMap<String, usize>>);

fn name(honest: &Honest) -> usize {
    Arc::as_ptr(honest).cast::<()>() as usize
}

#[async_trait]
impl Sabotage for NoEcho {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        self.0.lock().extend(events.iter().map(|event| (event.id().to_string(), name(honest))));
        honest.publish(topic, events, options).await
    }

    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        let publisher = self.0.lock().get(&parcel.event.id().to_string()).copied();
        if view.honest().is_some_and(|honest| Some(name(&honest)) == publisher) { discard(parcel) } else { vec![parcel] }
    }
}

#[derive(Default)]
struct ToOthersOnly;

#[async_trait]
impl Sabotage for ToOthersOnly {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], mut options: PublishOptions) -> Published {
        options.local_only = true;
        honest.publish(topic, events, options).await
    }
}

/// Settles a delivery as if it had been handed over.
pub(crate) fn discard(parcel: Parcel) -> Vec<Parcel> {
    drop(parcel.delivery.map(pubsub_core::Delivery::done));
    Vec::new()
}

#[derive(Default)]
struct DiesTooEarly;

impl Sabotage for DiesTooEarly {
    fn job(&self, asked: Job) -> Job {
        let mut asked = asked;
        if let Job::Publish { count, .. } = &mut asked {
            *count -= 1;
        }
        asked
    }
}

#[derive(Default)]
struct LocalAsks;

#[async_trait]
impl Sabotage for LocalAsks {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        honest.flush().await.map_err(|error| PublishError::none_sent(error, events.len()))?;
        honest.publish(topic, events, options).await
    }
}

#[derive(Default)]
struct FailsUnheard;

#[async_trait]
impl Sabotage for FailsUnheard {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let status = honest.inspect(topic).await.map_err(|error| PublishError::none_sent(error, events.len()))?;
        if status.fan_out == Some(0) && status.groups.is_empty() {
            return Err(PublishError::none_sent(pubsub_core::ErrorKind::NotFound, events.len()));
        }
        honest.publish(topic, events, options).await
    }
}

#[derive(Default)]
struct ForgetsFates;

#[async_trait]
impl Sabotage for ForgetsFates {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let failed = match honest.publish(topic, events, options).await {
            Err(failed) if failed.fates().contains(&Fate::Published) => failed,
            done => return done,
        };
        Err(PublishError::none_sent(failed.kind().clone(), events.len()))
    }
}

#[derive(Default)]
struct BackwardsTogether;

#[async_trait]
impl Sabotage for BackwardsTogether {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        instead(honest, topic, events.iter().rev().cloned().collect(), options).await
    }
}

/// Keeps every fifth event until the next has been published.
#[derive(Default)]
struct LateFirst {
    count: Counter,
    kept: Mutex<HashMap<Topic, Arc<Event>>>,
}

#[async_trait]
impl Sabotage for LateFirst {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let mut due = Vec::new();
        for event in events {
            let kept = self.kept.lock().remove(topic);
            if kept.is_none() && self.count.next(topic).is_multiple_of(5) {
                self.kept.lock().insert(topic.clone(), event.clone());
            } else {
                due.push(event.clone());
                due.extend(kept);
            }
        }
        instead(honest, topic, due, options).await
    }
}

#[derive(Default)]
struct Leaks;

#[async_trait]
impl Sabotage for Leaks {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], mut options: PublishOptions) -> Published {
        options.local_only = false;
        honest.publish(topic, events, options).await
    }
}

#[derive(Default)]
struct LocalNowhere;

#[async_trait]
impl Sabotage for LocalNowhere {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        if options.local_only { Ok(Positions::none()) } else { honest.publish(topic, events, options).await }
    }
}

#[derive(Default)]
struct LocalAsText;

#[async_trait]
impl Sabotage for LocalAsText {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let text = |event: &Arc<Event>| {
            let json = event.payload().to_json().unwrap_or_else(|_| "null".into());
            changed(event, |event| event.with_payload(Payload::json(json).expect("JSON is JSON")))
        };
        let events = if options.local_only { events.iter().map(text).collect() } else { events.to_vec() };
        instead(honest, topic, events, options).await
    }
}

pub(crate) fn changed(event: &Arc<Event>, change: impl FnOnce(Event) -> Event) -> Arc<Event> {
    Arc::new(change(Event::clone(event)))
}

/// Another event in place of one: what `Event` does not let be changed.
fn stamped_anew(event: &Event, anew: &Event) -> Arc<Event> {
    let id = if anew.created_at() == event.created_at() { anew.id().clone() } else { event.id().clone() };
    let copy = Event::stamped(id, event.event_type(), anew.created_at())
        .with_run_id(event.run_id())
        .with_payload(event.payload().clone())
        .with_index(event.index());
    Arc::new(event.metadata().iter().fold(copy, |copy, (key, value)| copy.with_metadata(key, value)))
}

#[derive(Default)]
struct Restamps;

#[async_trait]
impl Sabotage for Restamps {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let anew = |event: &Arc<Event>| {
            let new = Event::stamped(pubsub_core::EventId::random(), event.event_type(), event.created_at());
            stamped_anew(event, &new)
        };
        instead(honest, topic, events.iter().map(anew).collect(), options).await
    }
}

#[derive(Default)]
struct Retimes;

#[async_trait]
impl Sabotage for Retimes {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let later = |event: &Arc<Event>| {
            let time = Timestamp::from_millis(event.created_at().as_millis() + 1).unwrap_or(event.created_at());
            stamped_anew(event, &Event::stamped(event.id().clone(), event.event_type(), time))
        };
        instead(honest, topic, events.iter().map(later).collect(), options).await
    }
}

#[derive(Default)]
struct TrustsIndex(Counter);

impl Sabotage for TrustsIndex {
    fn deliver(&self, view: &View, mut parcel: Parcel) -> Vec<Parcel> {
        let index = ReplayIndex { generation: 0, index: self.0.next(&view.topic) };
        parcel.event = changed(&parcel.event, |event| event.with_index(Some(index)));
        vec![parcel]
    }
}

#[derive(Default)]
struct Partial;

#[async_trait]
impl Sabotage for Partial {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let limit = honest.capabilities().max_payload.unwrap_or(usize::MAX);
        let fits = events.iter().take_while(|event| event.check_size(limit).is_ok()).cloned().collect::<Vec<_>>();
        if fits.len() < events.len() {
            honest.publish(topic, &fits, options.clone()).await?;
        }
        honest.publish(topic, events, options).await
    }
}

#[derive(Default)]
struct NoLimit;

#[async_trait]
impl Sabotage for NoLimit {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let limit = honest.capabilities().max_payload.unwrap_or(usize::MAX);
        let cut = |event: &Arc<Event>| match event.check_size(limit) {
            Ok(()) => event.clone(),
            Err(_) => changed(event, |event| event.with_payload(Payload::null())),
        };
        instead(honest, topic, events.iter().map(cut).collect(), options).await
    }
}

#[derive(Default)]
struct Rounds;

#[async_trait]
impl Sabotage for Rounds {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let rounded = |event: &Arc<Event>| {
            let Ok(json) = event.payload().to_json() else { return event.clone() };
            let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(&json) else { return event.clone() };
            round(&mut value);
            changed(event, |event| event.with_payload(Payload::json_of(&value).expect("a value is JSON")))
        };
        instead(honest, topic, events.iter().map(rounded).collect(), options).await
    }
}

fn round(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Number(number) if number.as_f64().is_some_and(|float| float.abs() > 1e15) => {
            *value = number.as_f64().into();
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(round),
        serde_json::Value::Object(fields) => fields.values_mut().for_each(round),
        _ => {}
    }
}

#[derive(Default)]
struct Lenient;

#[async_trait]
impl Sabotage for Lenient {
    async fn publish(&self, honest: &Honest, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Published {
        let json = |event: &Arc<Event>| match event.payload().to_json() {
            Ok(json) => changed(event, |event| event.with_payload(Payload::json(json).expect("JSON is JSON"))),
            Err(_) => changed(event, |event| event.with_payload(Payload::null())),
        };
        let events = if options.local_only { events.to_vec() } else { events.iter().map(json).collect() };
        instead(honest, topic, events, options).await
    }
}

#[derive(Default)]
struct Strips;

impl Sabotage for Strips {
    fn deliver(&self, _: &View, mut parcel: Parcel) -> Vec<Parcel> {
        let event = &parcel.event;
        let bare = Event::stamped(event.id().clone(), event.event_type(), event.created_at())
            .with_run_id(event.run_id())
            .with_payload(event.payload().clone())
            .with_index(event.index());
        parcel.event = Arc::new(bare);
        vec![parcel]
    }
}

/// Longer than any property waits.
pub(crate) const FOREVER: Duration = Duration::from_secs(3600);
