//! The JSON form of an event, shared by every backend whose events leave the process.
//!
//! `{"type", "id", "runId", "data", "createdAt", "index"?, "generation"?, "metadata"?, "deliveryAttempt"?}`: the shape the
//! TypeScript framework Mastra writes, with `generation` and `metadata` added. Unknown fields are kept and written again.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::event::Foreign;
use crate::{Error, ErrorKind, Event, EventId, Metadata, Payload, ReplayIndex, Result, Timestamp};

/// An event as it was read, and the attempt that came with it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Decoded {
    /// The event.
    pub event: Event,
    /// `deliveryAttempt`, which TypeScript members write into the copies they retry.
    pub attempt: Option<u32>,
}

/// What a service knows about a message whose JSON lacks it.
#[derive(Debug, Clone)]
pub struct Stamp {
    /// The id it was given.
    pub id: EventId,
    /// The time it was taken.
    pub created_at: Timestamp,
}

/// Writes an event as JSON.
///
/// # Errors
/// [`ErrorKind::NotSerializable`] if its payload cannot be written.
pub fn encode(event: &Event) -> Result<Vec<u8>> {
    let mut json = Vec::new();
    encode_into(event, &mut json)?;
    Ok(json)
}

/// Appends an event as JSON to a buffer.
///
/// # Errors
/// [`ErrorKind::NotSerializable`] if its payload cannot be written; nothing has been appended then.
pub fn encode_into(event: &Event, json: &mut Vec<u8>) -> Result<()> {
    // Checked when the payload was made, so it is only copied.
    let data = event.payload().to_json()?;
    let length = json.len();
    json.reserve(data.len() + 192);
    let written = write(event, &data, json);
    if written.is_err() {
        json.truncate(length);
    }
    written.map_err(|error| Error::new(ErrorKind::NotSerializable(error.to_string().into())))
}

fn write(event: &Event, data: &[u8], json: &mut Vec<u8>) -> serde_json::Result<()> {
    json.extend_from_slice(b"{\"type\":");
    value(event.event_type(), json)?;
    json.extend_from_slice(b",\"id\":");
    match event.id().as_uuid() {
        Some(uuid) => quoted(uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()), json),
        None => value(&event.id().to_string(), json)?,
    }
    json.extend_from_slice(b",\"runId\":");
    value(event.run_id(), json)?;
    json.extend_from_slice(b",\"data\":");
    json.extend_from_slice(data);
    json.extend_from_slice(b",\"createdAt\":");
    match event.created_at().rfc3339() {
        Some(text) => {
            json.push(b'"');
            json.extend_from_slice(&text);
            json.push(b'"');
        }
        None => quoted(&event.created_at().to_string(), json),
    }
    if let Some(ReplayIndex { generation, index }) = event.index() {
        json.extend_from_slice(b",\"index\":");
        value(&index, json)?;
        json.extend_from_slice(b",\"generation\":");
        value(&generation, json)?;
    }
    if !event.metadata().is_empty() {
        json.extend_from_slice(b",\"metadata\":");
        value(event.metadata(), json)?;
    }
    for (key, foreign) in event.foreign().into_iter().flatten() {
        // Somebody else's `metadata` gives way to the event's own, as when it becomes a dead letter: a key twice reads back as none.
        if key == "metadata" && !event.metadata().is_empty() {
            continue;
        }
        json.push(b',');
        value(key, json)?;
        json.push(b':');
        value(foreign, json)?;
    }
    json.push(b'}');
    Ok(())
}

fn value<T: Serialize + ?Sized>(value: &T, json: &mut Vec<u8>) -> serde_json::Result<()> {
    serde_json::to_writer(json, value)
}

/// Text in which nothing has to be escaped.
fn quoted(text: &str, json: &mut Vec<u8>) {
    json.push(b'"');
    json.extend_from_slice(text.as_bytes());
    json.push(b'"');
}

/// The fields as they are in the input, borrowed from it. Read by hand: what `flatten` needs for the fields that are not known costs
/// each event more than all else here.
#[derive(Default)]
struct Wire<'a> {
    event_type: Option<Cow<'a, str>>,
    id: Option<Cow<'a, str>>,
    run_id: Option<Cow<'a, str>>,
    data: Option<&'a RawValue>,
    created_at: Option<Cow<'a, str>>,
    index: Option<u64>,
    generation: Option<u64>,
    metadata: Option<serde_json::Value>,
    delivery_attempt: Option<u32>,
    foreign: Foreign,
}

/// Text, borrowed where nothing in it is escaped.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

impl<'de> Deserialize<'de> for Wire<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WireVisitor;
        impl<'de> Visitor<'de> for WireVisitor {
            type Value = Wire<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an event")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Wire<'de>, A::Error> {
                let (mut wire, mut has_data, mut has_metadata) = (Wire::default(), false, false);
                while let Some(Text(key)) = map.next_key()? {
                    match &*key {
                        "type" => once(&mut wire.event_type, &mut map, "type")?,
                        "id" => once(&mut wire.id, &mut map, "id")?,
                        "runId" => once(&mut wire.run_id, &mut map, "runId")?,
                        "createdAt" => once(&mut wire.created_at, &mut map, "createdAt")?,
                        "data" if !std::mem::replace(&mut has_data, true) => wire.data = map.next_value()?,
                        "metadata" if !std::mem::replace(&mut has_metadata, true) => wire.metadata = map.next_value()?,
                        "index" if wire.index.is_none() => wire.index = map.next_value()?,
                        "generation" if wire.generation.is_none() => wire.generation = map.next_value()?,
                        "deliveryAttempt" if wire.delivery_attempt.is_none() => wire.delivery_attempt = map.next_value()?,
                        "data" | "metadata" | "index" | "generation" | "deliveryAttempt" => {
                            map.next_value::<IgnoredAny>()?;
                            return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
                        }
                        _ => drop(wire.foreign.insert(key.into_owned(), map.next_value()?)),
                    }
                }
                Ok(wire)
            }
        }
        deserializer.deserialize_map(WireVisitor)
    }
}

/// Reads a field of text that may be null, and may not be there twice.
fn once<'de, A: MapAccess<'de>>(field: &mut Option<Cow<'de, str>>, map: &mut A, name: &'static str) -> Result<(), A::Error> {
    let text: Option<Text<'de>> = map.next_value()?;
    match text.map(|Text(text)| text) {
        Some(_) if field.is_some() => Err(A::Error::duplicate_field(name)),
        Some(text) => {
            *field = Some(text);
            Ok(())
        }
        None => Ok(()),
    }
}

/// Reads an event from JSON. What lacks an id or a time takes those of the `stamp`.
///
/// # Errors
/// [`ErrorKind::Decode`] if it is not an event, or lacks an id or a time without there being a stamp.
pub fn decode(json: &Bytes, stamp: Option<Stamp>) -> Result<Decoded> {
    let bad = |why: String| Error::new(ErrorKind::Decode(why.into()));
    let wire: Wire<'_> = serde_json::from_slice(json).map_err(|error| bad(error.to_string()))?;
    let (stamp_id, stamp_time) = stamp.map_or((None, None), |stamp| (Some(stamp.id), Some(stamp.created_at)));
    let event_type = wire.event_type.ok_or_else(|| bad("an event without a type".into()))?;
    let id = match wire.id {
        Some(id) => EventId::new(id)?,
        None => stamp_id.ok_or_else(|| bad("an event without an id".into()))?,
    };
    let created_at = match wire.created_at {
        Some(time) => Timestamp::parse(&time)?,
        None => stamp_time.ok_or_else(|| bad("an event without a time".into()))?,
    };
    let payload = match wire.data {
        // A slice of the input: no copy.
        Some(data) => Payload::json_unchecked(json.slice_ref(data.get().as_bytes())),
        None => Payload::null(),
    };
    let mut foreign = wire.foreign;
    let metadata = match wire.metadata {
        None => Metadata::new(),
        // Somebody else's field of that name is theirs: kept as it is.
        Some(value) => serde_json::from_value(value.clone()).unwrap_or_else(|_| {
            foreign.insert("metadata".into(), value);
            Metadata::new()
        }),
    };
    let index = wire.index.map(|index| ReplayIndex { generation: wire.generation.unwrap_or(0), index });
    let event = Event::stamped(id, event_type, created_at)
        .with_run_id(wire.run_id.unwrap_or_default())
        .with_payload(payload)
        .with_index(index)
        .with_foreign(foreign);
    let event = metadata.into_iter().fold(event, |event, (key, value)| event.with_metadata(key, value));
    Ok(Decoded { event, attempt: wire.delivery_attempt })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_reads_back_whole() {
        let event = Event::new("step.end")
            .with_run_id("run 1")
            .with_data(serde_json::json!({"text": "a\u{2028}\"\\/\0🦀", "n": [i64::MIN, u64::MAX], "f": 1e300}))
            .with_metadata("traceparent", "00-ab")
            .with_index(Some(ReplayIndex { generation: 3, index: 9 }));
        let json = Bytes::from(encode(&event).unwrap());
        let read = decode(&json, None).unwrap().event;
        assert_eq!((read.id(), read.event_type(), read.run_id()), (event.id(), "step.end", "run 1"));
        assert_eq!((read.created_at(), read.index(), read.metadata()), (event.created_at(), event.index(), event.metadata()));
        assert_eq!(read.payload().to_json().unwrap(), event.payload().to_json().unwrap());
        assert!(json.as_ptr_range().contains(&read.payload().to_json().unwrap().as_ptr()), "data is a slice of the input");
    }

    #[test]
    fn foreign_fields_survive() {
        let json = r#"{"type":"t","id":"1","runId":"r","createdAt":"2026-01-02T03:04:05.006Z","deliveryAttempt":2,"metadata":{"n":1},"x":{"y":[1]}}"#;
        let read = decode(&Bytes::from_static(json.as_bytes()), None).unwrap();
        assert_eq!(read.attempt, Some(2));
        let again: serde_json::Value = serde_json::from_slice(&encode(&read.event).unwrap()).unwrap();
        assert_eq!(
            (&again["x"]["y"][0], &again["metadata"]["n"], &again["data"]),
            (&1.into(), &1.into(), &serde_json::Value::Null)
        );
    }

    #[test]
    fn a_stamp_fills_in_what_is_missing() {
        let json = Bytes::from_static(br#"{"type":"t","runId":"r","data":1}"#);
        assert!(decode(&json, None).is_err());
        let stamp = Stamp { id: EventId::new("77").unwrap(), created_at: Timestamp::now() };
        let read = decode(&json, Some(stamp.clone())).unwrap().event;
        assert_eq!((read.id(), read.created_at()), (&stamp.id, stamp.created_at));
    }

    #[test]
    fn a_field_that_is_there_twice_is_refused() {
        let whole = r#"{"type":"t","id":"a","createdAt":"2026-01-02T03:04:05.006Z","runId":"r","index":1,"generation":1,"metadata":{},"data":1"#;
        assert!(decode(&Bytes::from(format!("{whole}}}")), None).is_ok());
        for twice in ["type", "id", "createdAt", "runId", "index", "generation", "metadata", "data"] {
            let value = if ["index", "generation", "data", "metadata"].contains(&twice) { "2" } else { "\"b\"" };
            assert!(decode(&Bytes::from(format!(r#"{whole},"{twice}":{value}}}"#)), None).is_err(), "{twice}");
        }
    }

    #[test]
    fn what_is_escaped_reads_back() {
        let json =
            r#"{"ty\u0070e":"a\nb","id":"\u00e9","createdAt":"2026-01-02T03:04:05+00:00","runId":null,"data":null,"f\"":[]}"#;
        let event = decode(&Bytes::from_static(json.as_bytes()), None).unwrap().event;
        assert_eq!((event.event_type(), event.id().to_string().as_str(), event.run_id()), ("a\nb", "é", ""));
        let again = decode(&Bytes::from(encode(&event).unwrap()), None).unwrap().event;
        assert_eq!((again.event_type(), again.id(), again.foreign()), ("a\nb", event.id(), event.foreign()));
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for bad in ["", "[]", "{}", r#"{"type":1,"id":"a"}"#, r#"{"type":"t","id":"a","createdAt":"x"}"#, r#"{"id":"a"}"#] {
            assert!(decode(&Bytes::from(bad.to_owned()), None).is_err(), "{bad}");
        }
    }
}
