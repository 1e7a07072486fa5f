//! Topics and subscriptions on the service: made when they are first needed, attached to where they exist, and made anew where a
//! server has forgotten them.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use gcloud_sdk::google::pubsub::v1::{DeadLetterPolicy, ExpirationPolicy, Subscription, Topic};
use gcloud_sdk::prost_types;
use gcloud_sdk::tonic::Code;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::errors::Fault;
use crate::link::Link;

/// What the service calls the topic of a subscription whose topic was deleted.
const DELETED: &str = "_deleted-topic_";

/// How often making a topic and a subscription on it is tried if one of them is gone again.
const ATTEMPTS: usize = 5;

/// What is to be on the service.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) subscription: Subscription,
    /// From when on, if not from its making on.
    pub(crate) since: Option<prost_types::Timestamp>,
}

impl Spec {
    pub(crate) fn name(&self) -> &str {
        &self.subscription.name
    }
}

pub(crate) fn seconds(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

/// A subscription that lasts for ever, or goes when nobody has used it for so long.
pub(crate) fn expires(after: Option<Duration>) -> Option<ExpirationPolicy> {
    Some(ExpirationPolicy { ttl: after.map(seconds) })
}

pub(crate) fn dead_letters(topic: String, attempts: u32) -> DeadLetterPolicy {
    DeadLetterPolicy { dead_letter_topic: topic, max_delivery_attempts: i32::try_from(attempts).unwrap_or(i32::MAX) }
}

struct Known {
    since: Instant,
    /// Until when publishing to it waits, if it was made anew.
    until: Option<Instant>,
}

pub(crate) struct Provision {
    link: Arc<Link>,
    /// Whether unknown topics are made.
    create_topics: bool,
    topic_retention: Option<Duration>,
    /// How long publishing waits when a topic was forgotten by its server, for the subscriptions of others to come back.
    grace: Duration,
    /// Topics that were there.
    known: Mutex<HashMap<String, Known>>,
    /// What this instance has on the service.
    specs: Mutex<Vec<Weak<Spec>>>,
}

impl Provision {
    pub(crate) fn new(link: Arc<Link>, create_topics: bool, topic_retention: Option<Duration>, grace: Duration) -> Self {
        Self { link, create_topics, topic_retention, grace, known: Mutex::default(), specs: Mutex::default() }
    }

    /// A topic is there.
    pub(crate) fn seen(&self, topic: &str) {
        let mut known = self.known.lock();
        if !known.contains_key(topic) {
            known.insert(topic.to_owned(), Known { since: Instant::now(), until: None });
        }
    }

    /// Makes a topic, unless it is there.
    pub(crate) async fn make_topic(&self, topic: &str) -> Result<(), Fault> {
        if !self.create_topics {
            return Err(Fault::new(Code::NotFound, format!("{topic} does not exist, and create_topics is off")));
        }
        let retention = self.topic_retention.map(seconds);
        let made = Topic { name: topic.to_owned(), message_retention_duration: retention, ..Topic::default() };
        match self.link.create_topic(made).await {
            Err(fault) if !fault.is_taken() => Err(fault),
            _ => Ok(()),
        }
    }

    /// A topic was not there, as the answer said to what was asked then: makes it. If it had been there before, its server has forgotten
    /// it, and with it all subscriptions: they come back first.
    pub(crate) async fn topic(&self, topic: &str, asked: Instant) -> Result<(), Fault> {
        self.make_topic(topic).await?;
        let waits = {
            let mut known = self.known.lock();
            match known.get_mut(topic) {
                // Others of this instance asked at the same time, and were first.
                Some(Known { since, until: None }) if *since >= asked => return Ok(()),
                Some(Known { until, .. }) => {
                    let waits = until.filter(|until| *until > Instant::now()).unwrap_or_else(|| Instant::now() + self.grace);
                    *until = Some(waits);
                    waits
                }
                None => {
                    known.insert(topic.to_owned(), Known { since: Instant::now(), until: None });
                    return Ok(());
                }
            }
        };
        tracing::warn!(topic, "a topic was gone and is made anew, and what is on it");
        let specs: Vec<_> = {
            let mut specs = self.specs.lock();
            specs.retain(|spec| spec.strong_count() > 0);
            specs.iter().filter_map(Weak::upgrade).filter(|spec| spec.subscription.topic == topic).collect()
        };
        for spec in specs {
            self.attach(&spec).await?;
        }
        tokio::time::sleep_until(waits).await;
        Ok(())
    }

    /// Keeps a subscription in mind, to be made anew with its topic.
    pub(crate) fn remember(&self, spec: &Arc<Spec>) {
        let mut specs = self.specs.lock();
        if specs.len() == specs.capacity() {
            specs.retain(|spec| spec.strong_count() > 0);
        }
        specs.push(Arc::downgrade(spec));
    }

    /// Makes a subscription, and its topic if need be, or attaches to the one that exists.
    pub(crate) async fn ensure(&self, spec: &Spec) -> Result<(), Fault> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            match self.attach(spec).await {
                Err(fault) if fault.is_not_found() && attempt < ATTEMPTS => {
                    // Nobody need wait for what is on it: that is made here.
                    self.make_topic(&spec.subscription.topic).await?;
                    self.seen(&spec.subscription.topic);
                }
                outcome => return outcome,
            }
        }
    }

    async fn attach(&self, spec: &Spec) -> Result<(), Fault> {
        match self.link.create_subscription(spec.subscription.clone()).await {
            Ok(()) => {
                self.seen(&spec.subscription.topic);
                match &spec.since {
                    Some(time) => self.link.seek(spec.name(), *time).await,
                    None => Ok(()),
                }
            }
            Err(fault) if fault.is_taken() => {
                let there = self.link.get_subscription(spec.name()).await?;
                compare(&spec.subscription, &there)?;
                self.seen(&spec.subscription.topic);
                Ok(())
            }
            Err(fault) => Err(fault),
        }
    }
}

/// Reports in what an existing subscription differs from what is wanted.
///
/// # Errors
/// Where it could not do what it is for.
fn compare(wanted: &Subscription, there: &Subscription) -> Result<(), Fault> {
    let name = &there.name;
    let refuse = |why: String| Err(Fault::new(Code::FailedPrecondition, format!("{name} exists, {why}")));
    if there.topic == DELETED {
        return refuse("but its topic was deleted".into());
    }
    if there.topic != wanted.topic {
        return refuse(format!("on another topic, {}", there.topic));
    }
    if there.push_config.as_ref().is_some_and(|push| !push.push_endpoint.is_empty()) {
        return refuse("and its messages are pushed elsewhere".into());
    }
    if !there.filter.is_empty() && there.filter != wanted.filter {
        return refuse(format!("with another filter, {}", there.filter));
    }
    for label in wanted.labels.keys().filter(|label| label.starts_with("pubsub-group-")) {
        if there.labels.get(label) != wanted.labels.get(label) {
            return refuse("and is another group's".into());
        }
    }
    let differences = [
        ("ordering", wanted.enable_message_ordering.to_string(), there.enable_message_ordering.to_string()),
        ("exactly_once", wanted.enable_exactly_once_delivery.to_string(), there.enable_exactly_once_delivery.to_string()),
        ("ack_deadline", wanted.ack_deadline_seconds.to_string(), there.ack_deadline_seconds.to_string()),
        ("service_dead_letters", format!("{:?}", wanted.dead_letter_policy), format!("{:?}", there.dead_letter_policy)),
    ];
    for (option, wanted, there) in differences.into_iter().filter(|(_, wanted, there)| wanted != there) {
        tracing::warn!(subscription = %name, option, wanted, there, "an existing subscription has another option, and keeps it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_serve_is_refused_and_the_rest_attached_to() {
        let wanted = Subscription { name: "s".into(), topic: "t".into(), ..Subscription::default() };
        assert_eq!(compare(&wanted, &wanted), Ok(()));
        for (change, why) in [
            (Subscription { topic: DELETED.into(), ..wanted.clone() }, "deleted"),
            (Subscription { topic: "other".into(), ..wanted.clone() }, "another topic"),
            (Subscription { filter: "x".into(), ..wanted.clone() }, "another filter"),
        ] {
            let refused = compare(&wanted, &change).unwrap_err();
            assert!(refused.to_string().contains(why) && !refused.is_temporary(), "{refused}");
        }
        let other = Subscription { ack_deadline_seconds: 10, enable_message_ordering: true, ..wanted.clone() };
        assert_eq!(compare(&wanted, &other), Ok(()));
        let labelled =
            |value: &str| Subscription { labels: [("pubsub-group-0".to_owned(), value.to_owned())].into(), ..wanted.clone() };
        assert!(compare(&labelled("61"), &labelled("62")).is_err());
    }
}
