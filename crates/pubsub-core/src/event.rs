//! What travels: the event, stamped once and immutable from then on.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;
use smol_str::SmolStr;
use uuid::Uuid;

use crate::{Data, Error, ErrorKind, Payload, Result};

mod civil;

/// Extra text about an event, such as `traceparent`. Backends carry it unchanged.
pub type Metadata = BTreeMap<String, String>;

/// Fields of an event's JSON form that this version does not know, kept and passed on.
pub(crate) type Foreign = serde_json::Map<String, serde_json::Value>;

/// Who an event is: a uuid, or the text a service gave it. Every copy of an event bears the same id.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventId(IdRepr);

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum IdRepr {
    Uuid(Uuid),
    Text(SmolStr),
}

impl EventId {
    /// A fresh random id (a version 4 uuid).
    pub fn random() -> Self {
        Self(IdRepr::Uuid(Uuid::new_v4()))
    }

    /// The id that prints as `text`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] if it is empty or over 255 bytes.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        let text = text.as_ref();
        if text.is_empty() || text.len() > 255 {
            return Err(Error::new(ErrorKind::InvalidName("an event id has 1 to 255 bytes".into())));
        }
        // Only the canonical spelling becomes a uuid, so that every id prints as it came.
        if text.len() == 36
            && let Ok(uuid) = Uuid::try_parse(text)
            && uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text
        {
            return Ok(Self(IdRepr::Uuid(uuid)));
        }
        Ok(Self(IdRepr::Text(text.into())))
    }

    /// The id as a uuid, if it is one.
    pub fn as_uuid(&self) -> Option<Uuid> {
        match &self.0 {
            IdRepr::Uuid(uuid) => Some(*uuid),
            IdRepr::Text(_) => None,
        }
    }
}

impl From<Uuid> for EventId {
    fn from(uuid: Uuid) -> Self {
        Self(IdRepr::Uuid(uuid))
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            IdRepr::Uuid(uuid) => uuid.hyphenated().fmt(f),
            IdRepr::Text(text) => f.write_str(text),
        }
    }
}

/// A moment to the millisecond, in UTC: what event times are on every wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The system clock's time. Clocks jump: nothing in this workspace orders events by it.
    pub fn now() -> Self {
        SystemTime::now().into()
    }

    /// Milliseconds since 1970-01-01T00:00:00Z.
    ///
    /// # Errors
    /// [`ErrorKind::Decode`] outside the years -9999 to 9999.
    pub fn from_millis(millis: i64) -> Result<Self> {
        match jiff::Timestamp::from_millisecond(millis) {
            Ok(_) => Ok(Self(millis)),
            Err(error) => Err(Error::new(ErrorKind::Decode(error.to_string().into()))),
        }
    }

    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub fn as_millis(self) -> i64 {
        self.0
    }

    /// Reads RFC 3339; what is finer than a millisecond is cut off.
    ///
    /// # Errors
    /// [`ErrorKind::Decode`] if it is none.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(usual) = civil::parse(text.as_bytes()) {
            return Ok(Self(usual));
        }
        match text.parse::<jiff::Timestamp>() {
            Ok(time) => Ok(Self(time.as_millisecond())),
            Err(error) => Err(Error::new(ErrorKind::Decode(error.to_string().into()))),
        }
    }
}

impl Timestamp {
    /// As it is displayed, for the years 0 to 9999.
    pub(crate) fn rfc3339(self) -> Option<[u8; civil::LENGTH]> {
        civil::format(self.0)
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let millis = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_millis()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_millis()).map_or(i64::MIN, |millis| -millis),
        };
        // A clock set outside what RFC 3339 can say still yields a time that prints.
        let (min, max) = (jiff::Timestamp::MIN.as_millisecond(), jiff::Timestamp::MAX.as_millisecond());
        Self(millis.clamp(min, max))
    }
}

/// RFC 3339 with milliseconds and `Z`, as JavaScript's `toISOString` writes it.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(usual) = self.rfc3339() {
            return f.write_str(std::str::from_utf8(&usual).map_err(|_| fmt::Error)?);
        }
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(time) => write!(f, "{time:.3}"),
            Err(_) => Err(fmt::Error),
        }
    }
}

/// The place of an event in a topic's kept history, given by a replay decorator and by nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplayIndex {
    /// Which history it counts in: clearing a topic starts another.
    pub generation: u64,
    /// Dense and 0-based within the generation.
    pub index: u64,
}

/// An event: who it is, what happened, and the data about it.
///
/// Id and time are stamped by [`Event::new`] and stay as they are on every backend. Publishing the same stamped event
/// again is the idempotent way to repeat a publish whose outcome is unknown.
///
/// ```
/// # use pubsub_core::Event;
/// let event = Event::new("order.placed").with_run_id("run-7").with_data(vec![1, 2, 3]);
/// assert_eq!(*event.data::<Vec<u64>>()?, [1, 2, 3]);
/// # Ok::<(), pubsub_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Event {
    id: EventId,
    event_type: SmolStr,
    run_id: SmolStr,
    created_at: Timestamp,
    payload: Payload,
    index: Option<ReplayIndex>,
    rest: Option<Box<Rest>>,
}

/// What most events do not have, kept out of the way so that events stay small.
#[derive(Debug, Clone, Default)]
struct Rest {
    metadata: Metadata,
    foreign: Foreign,
}

impl Event {
    /// A new event of this type, stamped with a fresh id and the current time. Its data is `null` and its run id empty
    /// until they are set.
    pub fn new(event_type: impl AsRef<str>) -> Self {
        Self::stamped(EventId::random(), event_type, Timestamp::now())
    }

    /// An event that was stamped elsewhere.
    pub fn stamped(id: EventId, event_type: impl AsRef<str>, created_at: Timestamp) -> Self {
        Self {
            id,
            event_type: SmolStr::new(event_type),
            run_id: SmolStr::default(),
            created_at,
            payload: Payload::null(),
            index: None,
            rest: None,
        }
    }

    /// Sets the run this event belongs to. On Google Cloud it is the ordering key by default.
    #[must_use]
    pub fn with_run_id(mut self, run_id: impl AsRef<str>) -> Self {
        self.run_id = SmolStr::new(run_id);
        self
    }

    /// Sets the data to a value: shared as it is within the process, written as JSON when it leaves it.
    #[must_use]
    pub fn with_data<T: Serialize + DeserializeOwned + Send + Sync + 'static>(self, value: T) -> Self {
        self.with_payload(Payload::typed(value))
    }

    /// Sets the payload, for JSON that exists already and for live values.
    #[must_use]
    pub fn with_payload(mut self, payload: Payload) -> Self {
        self.payload = payload;
        self
    }

    /// Adds one entry of metadata.
    #[must_use]
    pub fn with_metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.rest.get_or_insert_default().metadata.insert(key.into(), value.into());
        self
    }

    /// The same event with its place in a kept history, or without one. For replay decorators; an index set by an
    /// application does not survive [`Bus::publish`](crate::Bus::publish).
    #[must_use]
    pub fn with_index(mut self, index: Option<ReplayIndex>) -> Self {
        self.index = index;
        self
    }

    pub(crate) fn with_foreign(mut self, foreign: Foreign) -> Self {
        if !foreign.is_empty() {
            self.rest.get_or_insert_default().foreign = foreign;
        }
        self
    }

    /// Who the event is.
    pub fn id(&self) -> &EventId {
        &self.id
    }

    /// What happened.
    pub fn event_type(&self) -> &str {
        &self.event_type
    }

    /// The run it belongs to; empty if none was set.
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// When it was stamped.
    pub fn created_at(&self) -> Timestamp {
        self.created_at
    }

    /// Its place in a kept history, if a replay decorator gave it one.
    pub fn index(&self) -> Option<ReplayIndex> {
        self.index
    }

    /// The payload.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The data as a `T`; see [`Payload::get`].
    ///
    /// # Errors
    /// [`ErrorKind::Decode`] if the data is not a `T`.
    pub fn data<T: DeserializeOwned + 'static>(&self) -> Result<Data<'_, T>> {
        self.payload.get()
    }

    /// All metadata.
    pub fn metadata(&self) -> &Metadata {
        static NONE: Metadata = Metadata::new();
        self.rest.as_ref().map_or(&NONE, |rest| &rest.metadata)
    }

    pub(crate) fn foreign(&self) -> Option<&Foreign> {
        self.rest.as_ref().map(|rest| &rest.foreign)
    }

    /// What counts against a backend's payload limit: the encoded data plus metadata, in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::NotSerializable`] if the data cannot be encoded.
    pub fn encoded_size(&self) -> Result<usize> {
        let metadata: usize = self.metadata().iter().map(|(key, value)| key.len() + value.len()).sum();
        Ok(self.payload.to_json()?.len() + metadata)
    }

    /// Checks [`encoded_size`](Self::encoded_size) against a limit.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] over the limit, and the errors of `encoded_size`.
    pub fn check_size(&self, limit: usize) -> Result<()> {
        let size = self.encoded_size()?;
        if size > limit { Err(ErrorKind::TooLarge { size, limit }.into()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_as_they_came() {
        for text in ["7b5a8a2e-94b1-4d5b-9c3e-0a6a4f9f6c11", "7B5A8A2E-94B1-4D5B-9C3E-0A6A4F9F6C11", "12345", "é"] {
            assert_eq!(EventId::new(text).unwrap().to_string(), text);
        }
        assert!(EventId::new("7b5a8a2e-94b1-4d5b-9c3e-0a6a4f9f6c11").unwrap().as_uuid().is_some());
        assert!(EventId::new("").is_err());
    }

    #[test]
    fn times_are_written_as_javascript_writes_them() {
        let time = Timestamp::from_millis(1_700_000_000_120).unwrap();
        assert_eq!(time.to_string(), "2023-11-14T22:13:20.120Z");
        assert_eq!(Timestamp::parse("2023-11-14T23:13:20.120999+01:00").unwrap(), time);
        assert!(Timestamp::parse("yesterday").is_err());
        assert!(Timestamp::from_millis(i64::MAX).is_err());
    }
}
