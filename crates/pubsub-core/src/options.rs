//! How to publish and how to subscribe.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use smol_str::SmolStr;

use crate::contain::contain;
use crate::retry::MAX_DURATION;
use crate::{
    Capabilities, Capability, Cursor, Error, ErrorKind, Event, Group, Groups, OnGap, Result, Retention, RetryPolicy, Topic,
};

/// The largest bound that options take for a queue.
pub(crate) const MOST_QUEUED: usize = 1 << 20;

/// How a publish call behaves.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct PublishOptions {
    /// Keep the events within this instance: its fan-out subscriptions and one local member of each group that has one.
    /// They are never serialised, stored or indexed, and may carry live values.
    pub local_only: bool,
    /// How long to wait at a full queue before failing with `Full`; none means the bus's own `publish_timeout` (5 s).
    pub timeout: Option<Duration>,
}

impl PublishOptions {
    /// The defaults: events go as far as the bus reaches.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps the events within this instance.
    pub fn local_only() -> Self {
        Self { local_only: true, ..Self::default() }
    }

    /// Sets how long to wait at a full queue; zero means not at all.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidOption`] naming the option.
    pub fn validate(&self) -> Result<()> {
        at_most_ten_years("timeout", self.timeout)
    }
}

/// Where a subscription starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// With what is published from now on.
    Latest,
    /// With the oldest event that is retained.
    Earliest,
    /// With the event of this dense index; needs [`Capability::Index`].
    Index(u64),
    /// Right behind this position.
    After(Cursor),
}

/// Who settles deliveries that are read as a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AckMode {
    /// Hand-over settles: a delivery is done as soon as it is in the consumer's hands.
    Auto,
    /// The consumer settles by hand; what is dropped unsettled is retried.
    Manual,
}

/// What happens when a subscription's queue is full and its source cannot be held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Overflow {
    /// Publishers wait, and fail with `Full` after their time-out.
    #[default]
    Wait,
    /// The oldest queued events are lost; the next delivery and the status say how many.
    DropOldest,
}

/// Which events a subscription wants. What it rejects is settled at once and counted nowhere.
#[derive(Clone, Default)]
pub struct Filter {
    types: Vec<SmolStr>,
    predicate: Option<Predicate>,
}

type Predicate = Arc<dyn Fn(&Event) -> bool + Send + Sync>;

impl Filter {
    /// Only events of these types.
    pub fn types(types: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        Self { types: types.into_iter().map(SmolStr::new).collect(), predicate: None }
    }

    /// Only events for which this returns true. It is called once per delivery, in the consumer's task. A panic is logged and
    /// admits the event: a broken filter loses nothing.
    pub fn predicate(predicate: impl Fn(&Event) -> bool + Send + Sync + 'static) -> Self {
        Self { types: Vec::new(), predicate: Some(Arc::new(predicate)) }
    }

    /// Adds a predicate: both must agree.
    #[must_use]
    pub fn and(mut self, predicate: impl Fn(&Event) -> bool + Send + Sync + 'static) -> Self {
        self.predicate = Some(match self.predicate.take() {
            Some(first) => Arc::new(move |event| first(event) && predicate(event)),
            None => Arc::new(predicate),
        });
        self
    }

    /// Whether the subscription wants this event.
    pub fn admits(&self, event: &Event) -> bool {
        (self.types.is_empty() || self.types.iter().any(|wanted| wanted == event.event_type()))
            && self.predicate.as_ref().is_none_or(|predicate| {
                contain(|| predicate(event)).unwrap_or_else(|panic| {
                    tracing::error!(event = %event.id(), %panic, "a filter panicked; it lets the event through");
                    true
                })
            })
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filter").field("types", &self.types).field("predicate", &self.predicate.is_some()).finish()
    }
}

/// How a subscription behaves. The default is fan-out, from the latest, 256 prefetched, 1,000 in flight.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SubscribeOptions {
    /// The consumer group to join; none is fan-out.
    pub group: Option<Group>,
    /// Where to start; none leaves it to the kind: a new group from the earliest where groups are durable, everything
    /// else from the latest. An existing group keeps its place whatever is asked for.
    pub start: Option<Start>,
    /// What to do when the start is a gap.
    pub on_gap: OnGap,
    /// Who settles; none leaves it to the kind and the way of reading: a fan-out stream settles at hand-over, a group's
    /// stream by hand; `run` and `batches` settle by outcome.
    pub ack_mode: Option<AckMode>,
    /// The most deliveries taken from the bus and not handed over yet (256). A fan-out subscription in process lets publishers
    /// fill one half of it; the other is what it takes ahead once it is read.
    pub prefetch: usize,
    /// The most deliveries handed over and not settled yet (1,000).
    pub max_in_flight: usize,
    /// What happens at a full queue.
    pub overflow: Overflow,
    /// How failures are retried.
    pub retry: RetryPolicy,
    /// Where exhausted deliveries go; none drops them with a warning and a count.
    pub dead_letter: Option<Topic>,
    /// How long one delivery may be held unsettled, its renewals included, before it may go to another (one hour).
    pub max_hold: Duration,
    /// Which events are wanted.
    pub filter: Option<Filter>,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self {
            group: None,
            start: None,
            on_gap: OnGap::default(),
            ack_mode: None,
            prefetch: 256,
            max_in_flight: 1000,
            overflow: Overflow::default(),
            retry: RetryPolicy::default(),
            dead_letter: None,
            max_hold: Duration::from_secs(3600),
            filter: None,
        }
    }
}

impl SubscribeOptions {
    /// Fan-out: every event of the topic.
    pub fn fan_out() -> Self {
        Self::default()
    }

    /// Membership of a group: each event goes to one member.
    pub fn group(group: Group) -> Self {
        Self { group: Some(group), ..Self::default() }
    }

    /// Sets where to start.
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.start = Some(start);
        self
    }

    /// Sets what to do when the start is a gap.
    #[must_use]
    pub fn on_gap(mut self, on_gap: OnGap) -> Self {
        self.on_gap = on_gap;
        self
    }

    /// Sets who settles.
    #[must_use]
    pub fn ack_mode(mut self, mode: AckMode) -> Self {
        self.ack_mode = Some(mode);
        self
    }

    /// Sets the most deliveries taken and not handed over.
    #[must_use]
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Sets the most deliveries handed over and not settled.
    #[must_use]
    pub fn max_in_flight(mut self, max: usize) -> Self {
        self.max_in_flight = max;
        self
    }

    /// Sets what happens at a full queue.
    #[must_use]
    pub fn overflow(mut self, overflow: Overflow) -> Self {
        self.overflow = overflow;
        self
    }

    /// Sets how failures are retried.
    #[must_use]
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Sets where exhausted deliveries go.
    #[must_use]
    pub fn dead_letter(mut self, topic: Topic) -> Self {
        self.dead_letter = Some(topic);
        self
    }

    /// Sets how long one delivery may be held.
    #[must_use]
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.max_hold = max_hold;
        self
    }

    /// Sets which events are wanted.
    #[must_use]
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = Some(filter);
        self
    }

    /// Checks the options against each other and against what the backend can do, so that every backend refuses alike.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidOption`] naming the option, or [`ErrorKind::Unsupported`].
    pub fn validate(&self, topic: &Topic, capabilities: &Capabilities) -> Result<()> {
        self.check(topic, capabilities).map_err(|error| error.during("subscribe").on(topic))
    }

    fn check(&self, topic: &Topic, capabilities: &Capabilities) -> Result<()> {
        for (option, value) in [("prefetch", self.prefetch), ("max_in_flight", self.max_in_flight)] {
            if value == 0 || value > MOST_QUEUED {
                return Err(Error::invalid_option(option, format!("is {value}; it must be from 1 to {MOST_QUEUED}")));
            }
        }
        if self.max_hold.is_zero() {
            return Err(Error::invalid_option("max_hold", "must be longer than zero"));
        }
        at_most_ten_years("max_hold", Some(self.max_hold))?;
        self.retry.validate()?;
        if self.dead_letter.as_ref() == Some(topic) {
            return Err(Error::invalid_option("dead_letter", "names the topic itself: dead letters would come round again"));
        }
        if self.group.is_some() && capabilities.groups == Groups::Unsupported {
            return Err(Error::unsupported(Capability::Groups));
        }
        match &self.start {
            None | Some(Start::Latest) => Ok(()),
            Some(Start::Index(_)) if !capabilities.indexed => Err(Error::unsupported(Capability::Index)),
            Some(_) if self.group.is_some() && capabilities.groups != Groups::Durable => {
                Err(Error::unsupported(Capability::DurableGroups))
            }
            Some(_) if self.group.is_some() && !capabilities.group_history => Err(Error::unsupported(Capability::GroupHistory)),
            Some(Start::Earliest) if self.group.is_some() => Ok(()),
            Some(_) if capabilities.retention != Retention::History => Err(Error::unsupported(Capability::History)),
            Some(_) => Ok(()),
        }
    }
}

fn at_most_ten_years(option: &'static str, duration: Option<Duration>) -> Result<()> {
    match duration {
        Some(duration) if duration > MAX_DURATION => {
            Err(ErrorKind::InvalidOption { option: option.into(), reason: "is longer than ten years".into() }.into())
        }
        _ => Ok(()),
    }
}

/// Which of a run's retained events [`PubSub::trim_topic`](crate::PubSub::trim_topic) removes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrimFilter {
    /// The run whose events go.
    pub run_id: String,
    /// Only those whose `data.producedAt` (milliseconds since 1970) is at most this, and whose `data.pinned` is not set.
    pub produced_up_to: Option<i64>,
}

impl TrimFilter {
    /// All events of a run.
    pub fn run(run_id: impl Into<String>) -> Self {
        Self { run_id: run_id.into(), produced_up_to: None }
    }

    /// Only what was produced up to this time and is not pinned.
    #[must_use]
    pub fn produced_up_to(mut self, millis: i64) -> Self {
        self.produced_up_to = Some(millis);
        self
    }

    /// Whether an event is to go. An event whose data cannot tell stays.
    pub fn matches(&self, event: &Event) -> bool {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Produced {
            produced_at: Option<f64>,
            #[serde(default)]
            pinned: serde_json::Value,
        }
        if event.run_id() != self.run_id {
            return false;
        }
        let Some(limit) = self.produced_up_to else { return true };
        // Through JSON, not `data::<Produced>()`: the publisher's own type may be anything.
        let Ok(json) = event.payload().to_json() else { return false };
        let Ok(produced) = serde_json::from_slice::<Produced>(&json) else { return false };
        let pinned = !matches!(produced.pinned, serde_json::Value::Null | serde_json::Value::Bool(false));
        !pinned && produced.produced_at.is_some_and(|at| at <= limit as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_names_its_option() {
        let topic = Topic::new("t").unwrap();
        let refused =
            |options: SubscribeOptions| options.validate(&topic, &Capabilities::in_process()).unwrap_err().kind().clone();
        for (options, named) in [
            (SubscribeOptions::fan_out().prefetch(0), "prefetch"),
            (SubscribeOptions::fan_out().max_in_flight(usize::MAX), "max_in_flight"),
            (SubscribeOptions::fan_out().max_hold(Duration::ZERO), "max_hold"),
            (SubscribeOptions::fan_out().max_hold(Duration::MAX), "max_hold"),
            (SubscribeOptions::fan_out().dead_letter(topic.clone()), "dead_letter"),
            (SubscribeOptions::fan_out().retry(RetryPolicy::new().jitter(2.0)), "jitter"),
        ] {
            assert!(matches!(refused(options), ErrorKind::InvalidOption { option, .. } if option == named), "{named}");
        }
        let group = SubscribeOptions::group(Group::new("g").unwrap());
        for (options, capability) in [
            (SubscribeOptions::fan_out().start(Start::Earliest), Capability::History),
            (SubscribeOptions::fan_out().start(Start::Index(0)), Capability::Index),
            (group.clone().start(Start::Earliest), Capability::DurableGroups),
        ] {
            assert_eq!(refused(options), ErrorKind::Unsupported(capability));
        }
        let mut capabilities =
            Capabilities { groups: Groups::Durable, retention: Retention::History, ..Capabilities::in_process() };
        let earliest = group.start(Start::Earliest);
        let refused = earliest.validate(&topic, &capabilities).unwrap_err();
        assert_eq!(*refused.kind(), ErrorKind::Unsupported(Capability::GroupHistory));
        capabilities.group_history = true;
        earliest.validate(&topic, &capabilities).unwrap();
    }

    #[test]
    fn trims_one_run_and_spares_what_is_pinned() {
        let event = |data: serde_json::Value| Event::new("x").with_run_id("r").with_data(data);
        let old = TrimFilter::run("r").produced_up_to(10);
        assert!(TrimFilter::run("r").matches(&event(serde_json::Value::Null)));
        assert!(!TrimFilter::run("s").matches(&event(serde_json::Value::Null)));
        assert!(old.matches(&event(serde_json::json!({"producedAt": 10}))));
        assert!(!old.matches(&event(serde_json::json!({"producedAt": 11}))));
        assert!(!old.matches(&event(serde_json::json!({"producedAt": 1, "pinned": true}))));
        assert!(!old.matches(&event(serde_json::json!("text"))));
    }
}
