//! Dead letters: new events that say where they come from, and their way back.

use crate::{Event, Group, Metadata, Topic};

const EVENT: &str = "dead-letter.event";
const TOPIC: &str = "dead-letter.topic";
const GROUP: &str = "dead-letter.group";
const ATTEMPTS: &str = "dead-letter.attempts";
const REASON: &str = "dead-letter.reason";
const REDRIVEN: &str = "redriven.event";

/// The group as which dead letters are redriven, so that each is redriven once.
pub const REDRIVE_GROUP: &str = "redrive";

/// Where a dead letter comes from. It travels in the event's metadata under `dead-letter.event`, `.topic`, `.group`,
/// `.attempts` and `.reason`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Origin {
    /// The id of the event that was given up.
    pub event: String,
    /// The topic it was on.
    pub topic: Topic,
    /// The group that gave it up; none for a fan-out subscription.
    pub group: Option<Group>,
    /// How often it was attempted.
    pub attempts: u32,
    /// The last error.
    pub reason: String,
}

impl Origin {
    /// Where a dead letter comes from; none if the event is no dead letter.
    pub fn of(event: &Event) -> Option<Self> {
        let metadata = event.metadata();
        Some(Self {
            event: metadata.get(EVENT)?.clone(),
            topic: Topic::new(metadata.get(TOPIC)?).ok()?,
            group: metadata.get(GROUP).and_then(|group| Group::new(group).ok()),
            attempts: metadata.get(ATTEMPTS)?.parse().ok()?,
            reason: metadata.get(REASON).cloned().unwrap_or_default(),
        })
    }
}

/// The dead letter of an event: a new event with its own id and time, the old one's type, run, data and metadata, and its
/// [`Origin`]. For backends.
pub fn dead_letter(event: &Event, topic: &Topic, group: Option<&Group>, attempts: u32, reason: &str) -> Event {
    let letter = copy(event, |key| !key.starts_with("dead-letter."))
        .with_metadata(EVENT, event.id().to_string())
        .with_metadata(TOPIC, topic.as_str())
        .with_metadata(ATTEMPTS, attempts.to_string())
        .with_metadata(REASON, reason);
    match group {
        Some(group) => letter.with_metadata(GROUP, group.as_str()),
        None => letter,
    }
}

/// The event a dead letter is redriven as: a new event again, which names the one that was given up as `redriven.event`.
pub(crate) fn redriven(letter: &Event) -> Event {
    let event = copy(letter, |key| !key.starts_with("dead-letter."));
    match letter.metadata().get(EVENT) {
        Some(origin) => event.with_metadata(REDRIVEN, origin),
        None => event,
    }
}

fn copy(event: &Event, keeps: impl Fn(&str) -> bool) -> Event {
    let metadata: Metadata =
        event.metadata().iter().filter(|(key, _)| keeps(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
    let copy = Event::new(event.event_type())
        .with_run_id(event.run_id())
        .with_payload(event.payload().clone())
        .with_foreign(event.foreign().cloned().unwrap_or_default());
    metadata.into_iter().fold(copy, |copy, (key, value)| copy.with_metadata(key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_tells_its_origin_and_finds_its_way_back() {
        let event = Event::new("x").with_run_id("r").with_data(7).with_metadata("traceparent", "00-1");
        let (topic, group) = (Topic::new("t").unwrap(), Group::new("g").unwrap());
        let letter = dead_letter(&event, &topic, Some(&group), 5, "boom");
        let origin = Origin::of(&letter).unwrap();
        assert_eq!((origin.event, origin.topic, origin.group), (event.id().to_string(), topic, Some(group)));
        assert_eq!((origin.attempts, origin.reason.as_str()), (5, "boom"));
        assert_ne!(letter.id(), event.id());

        let back = redriven(&letter);
        assert_eq!((back.event_type(), back.run_id(), *back.data::<i32>().unwrap()), ("x", "r", 7));
        assert_eq!(back.metadata()["traceparent"], "00-1");
        assert_eq!(back.metadata()[REDRIVEN], event.id().to_string());
        assert_eq!(Origin::of(&back), None);
    }
}
