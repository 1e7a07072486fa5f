//! The JSON form of an event, shared by every backend whose events leave the process.
//!
//! `{"type", "id", "runId", "data", "createdAt", "index"?, "generation"?, "metadata"?, "deliveryAttempt"?}`: the shape the
//! TypeScript framework Mastra writes, with `generation` and `metadata` added. Unknown fields are kept and written again.

use bytes::Bytes;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

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
    let data = event.payload().to_json()?;
    let refuse = |error: serde_json::Error| Error::new(ErrorKind::NotSerializable(error.to_string().into()));
    // Checked when the payload was made, so this only borrows.
    let data: &RawValue = serde_json::from_slice(&data).map_err(refuse)?;
    let mut json = Vec::with_capacity(data.get().len() + 192);
    let mut serializer = serde_json::Serializer::new(&mut json);
    write(event, data, &mut serializer).map_err(refuse)?;
    Ok(json)
}

fn write<S: Serializer>(event: &Event, data: &RawValue, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    map.serialize_entry("type", event.event_type())?;
    map.serialize_entry("id", &Text(event.id()))?;
    map.serialize_entry("runId", event.run_id())?;
    map.serialize_entry("data", data)?;
    map.serialize_entry("createdAt", &Text(event.created_at()))?;
    if let Some(ReplayIndex { generation, index }) = event.index() {
        map.serialize_entry("index", &index)?;
        map.serialize_entry("generation", &generation)?;
    }
    if !event.metadata().is_empty() {
        map.serialize_entry("metadata", event.metadata())?;
    }
    for (key, value) in event.foreign().into_iter().flatten() {
        // Somebody else's `metadata` gives way to the event's own, as when it becomes a dead letter: a key twice reads back as none.
        if key == "metadata" && !event.metadata().is_empty() {
            continue;
        }
        map.serialize_entry(key, value)?;
    }
    map.end()
}

struct Text<T>(T);

impl<T: std::fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an event")]
struct Wire<'a> {
    #[serde(rename = "type")]
    event_type: String,
    id: Option<String>,
    run_id: Option<String>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    created_at: Option<String>,
    index: Option<u64>,
    generation: Option<u64>,
    metadata: Option<serde_json::Value>,
    delivery_attempt: Option<u32>,
    #[serde(flatten)]
    foreign: Foreign,
}

/// Reads an event from JSON. What lacks an id or a time takes those of the `stamp`.
///
/// # Errors
/// [`ErrorKind::Decode`] if it is not an event, or lacks an id or a time without there being a stamp.
pub fn decode(json: &Bytes, stamp: Option<Stamp>) -> Result<Decoded> {
    let bad = |why: String| Error::new(ErrorKind::Decode(why.into()));
    let wire: Wire<'_> = serde_json::from_slice(json).map_err(|error| bad(error.to_string()))?;
    let (stamp_id, stamp_time) = stamp.map_or((None, None), |stamp| (Some(stamp.id), Some(stamp.created_at)));
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
    let event = Event::stamped(id, wire.event_type, created_at)
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
    fn what_is_no_event_is_refused() {
        for bad in ["", "[]", "{}", r#"{"type":1,"id":"a"}"#, r#"{"type":"t","id":"a","createdAt":"x"}"#] {
            assert!(decode(&Bytes::from(bad.to_owned()), None).is_err(), "{bad}");
        }
    }
}
