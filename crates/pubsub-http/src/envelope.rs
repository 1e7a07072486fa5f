//! The envelope in which Google Cloud Pub/Sub pushes a message.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use pubsub_core::wire;
use pubsub_core::{Event, EventId, Payload, Timestamp};
use serde::Deserialize;

use crate::refusal::Refusal;

/// The type of an event made of a message that is none.
pub(crate) const FOREIGN_TYPE: &str = "google.pubsub.message";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    message: Message,
    subscription: Option<String>,
    delivery_attempt: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Message {
    data: Option<String>,
    attributes: Option<BTreeMap<String, String>>,
    message_id: String,
    publish_time: Option<String>,
    ordering_key: Option<String>,
}

/// What was in an envelope.
pub(crate) struct Opened {
    pub(crate) event: Event,
    pub(crate) attempt: u32,
    pub(crate) subscription: Option<String>,
}

/// Opens an envelope. Data that is an event, with an id and a time of its own, is that event; other data becomes one, though it may have a
/// type as well, with the message's id and time. Attributes become
/// metadata, where the event has none of that name.
pub(crate) fn open(json: &[u8]) -> Result<Opened, Refusal> {
    let bad = |why: String| Refusal::bad(format!("not a pushed message: {why}"));
    let Envelope { message, subscription, delivery_attempt } =
        serde_json::from_slice(json).map_err(|error| bad(error.to_string()))?;
    let id = EventId::new(&message.message_id)?;
    let created_at = message.publish_time.as_deref().map_or_else(|| Ok(Timestamp::now()), Timestamp::parse)?;
    let base64 = message.data.unwrap_or_default();
    let data = Bytes::from(STANDARD.decode(&base64).map_err(|error| bad(error.to_string()))?);
    let mut event = match wire::decode(&data, None) {
        Ok(decoded) => decoded.event.with_index(None),
        Err(_) => Event::stamped(id, FOREIGN_TYPE, created_at)
            .with_run_id(message.ordering_key.unwrap_or_default())
            .with_payload(foreign(data, base64)?),
    };
    for (key, value) in message.attributes.unwrap_or_default() {
        if !event.metadata().contains_key(&key) {
            event = event.with_metadata(key, value);
        }
    }
    Ok(Opened { event, attempt: delivery_attempt.unwrap_or(1).max(1), subscription })
}

/// JSON as it is, text as text, and anything else in the base64 it came in.
fn foreign(data: Bytes, base64: String) -> Result<Payload, Refusal> {
    if data.is_empty() {
        return Ok(Payload::null());
    }
    if let Ok(payload) = Payload::json(data.clone()) {
        return Ok(payload);
    }
    let text = String::from_utf8(data.into()).unwrap_or(base64);
    Ok(Payload::json_of(&text)?)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn opened(data: &[u8]) -> Opened {
        let envelope = json!({
            "message": {
                "data": STANDARD.encode(data),
                "attributes": {"origin": "shop", "k": "theirs"},
                "messageId": "2070443601311540",
                "message_id": "2070443601311540",
                "publishTime": "2021-02-26T19:13:55.749Z",
                "publish_time": "2021-02-26T19:13:55.749Z",
                "orderingKey": "run-7",
            },
            "subscription": "projects/p/subscriptions/s",
            "deliveryAttempt": 3,
        });
        open(envelope.to_string().as_bytes()).unwrap_or_else(|refusal| panic!("{refusal:?}"))
    }

    fn data_of(opened: &Opened) -> Value {
        opened.event.data::<Value>().unwrap().into_owned()
    }

    #[test]
    fn an_event_is_itself() {
        let event = Event::new("order.placed").with_data(json!({"n": 1})).with_metadata("k", "mine");
        let opened = opened(&wire::encode(&event).unwrap());
        assert_eq!((opened.event.id(), opened.event.event_type()), (event.id(), "order.placed"));
        assert_eq!((opened.attempt, opened.subscription.as_deref()), (3, Some("projects/p/subscriptions/s")));
        assert_eq!((&*opened.event.metadata()["k"], &*opened.event.metadata()["origin"]), ("mine", "shop"));
    }

    #[test]
    fn other_data_becomes_one() {
        for (data, expected) in [
            (&br#"{"not":"an event"}"#[..], json!({"not": "an event"})),
            (br#"{"type":"invoice","amount":5}"#, json!({"type": "invoice", "amount": 5})),
            (b"text", json!("text")),
            (b"\xff\xfe", json!("//4=")),
            (b"", Value::Null),
        ] {
            let opened = opened(data);
            assert_eq!((opened.event.event_type(), opened.event.run_id()), (FOREIGN_TYPE, "run-7"));
            assert_eq!(opened.event.id().to_string(), "2070443601311540");
            assert_eq!(
                (opened.event.created_at().to_string().as_str(), data_of(&opened)),
                ("2021-02-26T19:13:55.749Z", expected)
            );
        }
    }

    #[test]
    fn what_is_null_is_not_there() {
        let json = r#"{"message":{"messageId":"1","data":null,"attributes":null,"orderingKey":null},"deliveryAttempt":0}"#;
        let opened = open(json.as_bytes()).unwrap_or_else(|refusal| panic!("{refusal:?}"));
        assert_eq!((data_of(&opened), opened.attempt), (Value::Null, 1));
    }

    #[test]
    fn what_is_no_envelope_is_refused() {
        for bad in [
            "",
            "{}",
            "[]",
            r#"{"message":{}}"#,
            r#"{"message":{"messageId":""}}"#,
            r#"{"message":{"messageId":"1","data":"%"}}"#,
            r#"{"message":{"messageId":"1","publishTime":"noon"}}"#,
            r#"{"message":{"messageId":1}}"#,
        ] {
            assert!(open(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
