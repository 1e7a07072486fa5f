//! Messages: what an event is on the service, and what can be read from a message. Pure.

use std::sync::Arc;

use bytes::Bytes;
use gcloud_sdk::google::pubsub::v1::{PubsubMessage, ReceivedMessage};
use gcloud_sdk::prost::Message;
use pubsub_core::{Error, ErrorKind, Event, EventId, Result, Timestamp, wire};

use crate::names::{Route, TOPIC};

/// Google's limit on a message, and on a request: 10 MB, of which the request needs some.
pub(crate) const LARGEST: usize = 10_000_000 - 4096;

/// Google's limit on an ordering key.
const LONGEST_KEY: usize = 1024;

/// Writes an event as a message.
///
/// # Errors
/// `NotSerializable`; `TooLarge` if with everything around its data it is over Google's limit.
pub(crate) fn encode(event: &Event, route: &Route, ordered: bool) -> Result<PubsubMessage> {
    let mut message = PubsubMessage { data: wire::encode(event)?, ..PubsubMessage::default() };
    if let Some(topic) = route.attribute() {
        message.attributes.insert(TOPIC.to_owned(), topic.to_owned());
    }
    if ordered {
        message.ordering_key = ordering_key(event.run_id());
    }
    let size = message.encoded_len();
    if size > LARGEST {
        return Err(Error::new(ErrorKind::TooLarge { size, limit: LARGEST }).on(event.id()));
    }
    Ok(message)
}

/// A run's key: its id, or as much of it as a key takes. Runs that agree so far share their order.
fn ordering_key(run_id: &str) -> String {
    let mut end = run_id.len().min(LONGEST_KEY);
    while !run_id.is_char_boundary(end) {
        end -= 1;
    }
    run_id[..end].to_owned()
}

/// A message as it was read.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) ack_id: String,
    pub(crate) message_id: String,
    /// When the service took it, in milliseconds since 1970, if it says so.
    pub(crate) published: Option<i64>,
    /// What the attribute `topic` says.
    pub(crate) topic: Option<String>,
    pub(crate) content: Content,
}

#[derive(Debug)]
pub(crate) enum Content {
    /// An event, and which attempt at it this is as far as the service or its publisher has counted.
    Event { event: Arc<Event>, attempt: u32 },
    /// What is no event.
    Malformed { bytes: Bytes, why: String },
}

impl Arrival {
    /// Reads a message.
    pub(crate) fn read(received: ReceivedMessage) -> Self {
        let ReceivedMessage { ack_id, message, delivery_attempt } = received;
        let PubsubMessage { data, mut attributes, message_id, publish_time, .. } = message.unwrap_or_default();
        let published = publish_time.map(|time| time.seconds * 1000 + i64::from(time.nanos / 1_000_000));
        let data = Bytes::from(data);
        let stamp = || {
            let created_at = Timestamp::from_millis(published?).ok()?;
            Some(wire::Stamp { id: EventId::new(&message_id).ok()?, created_at })
        };
        let content = match wire::decode(&data, stamp()) {
            Ok(decoded) => {
                let counted = u32::try_from(delivery_attempt).unwrap_or(0);
                let attempt = counted.max(decoded.attempt.unwrap_or(1)).max(1);
                Content::Event { event: Arc::new(decoded.event), attempt }
            }
            Err(error) => Content::Malformed { bytes: data, why: error.to_string() },
        };
        Self { ack_id, message_id, published, topic: attributes.remove(TOPIC), content }
    }

    /// An event that stands for what is no event, to be dead-lettered.
    pub(crate) fn stand_in(message_id: &str, published: Option<i64>, bytes: &[u8]) -> Event {
        let stamp =
            published.and_then(|at| Timestamp::from_millis(at).ok()).and_then(|at| Some((EventId::new(message_id).ok()?, at)));
        let event = match stamp {
            Some((id, at)) => Event::stamped(id, "malformed", at),
            None => Event::new("malformed"),
        };
        event.with_data(String::from_utf8_lossy(bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use gcloud_sdk::prost_types;
    use pubsub_core::Topic;

    use super::*;
    use crate::names::Names;

    fn route(topic: &str) -> Route {
        Names::new(vec!["workflow.events.v2".into()], Vec::new()).route(&Topic::new(topic).unwrap())
    }

    fn received(data: &str, attempt: i32) -> ReceivedMessage {
        let time = prost_types::Timestamp { seconds: 1_767_323_045, nanos: 6_500_000 };
        let message = PubsubMessage {
            data: data.as_bytes().to_vec(),
            message_id: "77".into(),
            publish_time: Some(time),
            ordering_key: "workflows".into(),
            ..PubsubMessage::default()
        };
        ReceivedMessage { ack_id: "ack".into(), message: Some(message), delivery_attempt: attempt }
    }

    /// As `@mastra/google-cloud-pubsub` publishes: without `id` and `createdAt`, under one constant key.
    #[test]
    fn reads_what_the_typescript_side_writes() {
        let read = Arrival::read(received(r#"{"type":"workflow.start","runId":"r","data":{"workflowId":"w"}}"#, 0));
        let Content::Event { event, attempt } = read.content else { panic!("malformed") };
        assert_eq!(
            (event.event_type(), event.run_id(), event.id().to_string().as_str(), attempt),
            ("workflow.start", "r", "77", 1)
        );
        assert_eq!(event.created_at().to_string(), "2026-01-02T03:04:05.006Z");
    }

    /// As `@mastra/google-cloud-pubsub` reads: the data is the event's JSON.
    #[test]
    fn writes_what_the_typescript_side_reads() {
        let event = Event::new("workflow.start").with_run_id("r").with_data(serde_json::json!({"workflowId": "w"}));
        let message = encode(&event, &route("workflows"), true).unwrap();
        assert_eq!((message.ordering_key.as_str(), message.attributes.len()), ("r", 0));
        let json: serde_json::Value = serde_json::from_slice(&message.data).unwrap();
        let expected = serde_json::json!({
            "type": "workflow.start", "id": event.id().to_string(), "runId": "r",
            "data": {"workflowId": "w"}, "createdAt": event.created_at().to_string(),
        });
        assert_eq!(json, expected);
        assert_eq!(encode(&event, &route("workflows"), false).unwrap().ordering_key, "");
    }

    #[test]
    fn what_shares_a_topic_says_which_it_is_of() {
        let event = Event::new("watch").with_run_id("r");
        let message = encode(&event, &route("workflow.events.v2.r"), true).unwrap();
        assert_eq!(message.attributes.get("topic").map(String::as_str), Some("workflow.events.v2.r"));
    }

    #[test]
    fn the_greatest_count_of_attempts_is_the_right_one() {
        let attempt = |data, counted| match Arrival::read(received(data, counted)).content {
            Content::Event { attempt, .. } => attempt,
            Content::Malformed { why, .. } => panic!("{why}"),
        };
        assert_eq!(attempt(r#"{"type":"t","deliveryAttempt":3}"#, 0), 3);
        assert_eq!(attempt(r#"{"type":"t","deliveryAttempt":3}"#, 7), 7);
        assert_eq!(attempt(r#"{"type":"t"}"#, -1), 1);
    }

    #[test]
    fn what_is_no_event_is_told_apart() {
        assert!(matches!(Arrival::read(received("{", 0)).content, Content::Malformed { bytes, .. } if bytes == "{"));
        assert!(matches!(Arrival::read(ReceivedMessage::default()).content, Content::Malformed { .. }));
        let stand_in = Arrival::stand_in("5", Some(0), b"\xff");
        assert_eq!((stand_in.id().to_string().as_str(), stand_in.event_type()), ("5", "malformed"));
        assert!(Arrival::stand_in("", None, b"x").data::<String>().is_ok());
    }

    #[test]
    fn what_google_refuses_is_refused_before() {
        let large = Event::new("x").with_data("x".repeat(LARGEST));
        assert!(matches!(encode(&large, &route("t"), true).unwrap_err().kind(), ErrorKind::TooLarge { limit: LARGEST, .. }));
        assert_eq!(ordering_key(&"ä".repeat(600)).len(), 1024);
        assert_eq!(ordering_key(&format!("a{}", "ä".repeat(600))).len(), 1023);
    }
}
