//! Stream entries: their ids, their fields, and what can be read from them. Pure.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use pubsub_core::{Event, EventId, Position, Timestamp, wire};

/// The field that holds the event.
pub(crate) const EVENT: &str = "event";

/// The id of a stream entry: the server's milliseconds, and a number within them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct EntryId(Position);

impl EntryId {
    /// Before every entry.
    pub(crate) const ZERO: Self = Self(Position { major: 0, minor: 0 });

    pub(crate) fn position(self) -> Position {
        self.0
    }

    pub(crate) fn millis(self) -> u64 {
        self.0.major
    }

    /// All ids from this to another, if there are so many between them and they are consecutive.
    pub(crate) fn to(self, last: Self, count: usize) -> Option<Vec<Self>> {
        let Position { major, minor } = self.0;
        let fits = major == last.0.major && last.0.minor.checked_sub(minor)?.checked_add(1)? == count as u64;
        fits.then(|| (minor..=last.0.minor).map(|minor| Self(Position { major, minor })).collect())
    }
}

impl From<Position> for EntryId {
    fn from(position: Position) -> Self {
        Self(position)
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.major, self.0.minor)
    }
}

/// Not an entry's id.
#[derive(Debug)]
pub(crate) struct NotAnId;

impl FromStr for EntryId {
    type Err = NotAnId;
    fn from_str(text: &str) -> Result<Self, NotAnId> {
        let (major, minor) = text.split_once('-').ok_or(NotAnId)?;
        let number = |text: &str| text.parse().map_err(|_| NotAnId);
        Ok(Self(Position { major: number(major)?, minor: number(minor)? }))
    }
}

/// An entry as it was read.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) id: EntryId,
    pub(crate) content: Content,
    /// How many bytes of JSON it holds.
    pub(crate) size: usize,
}

#[derive(Debug, Clone)]
pub(crate) enum Content {
    /// An event, and how often it had been attempted before this entry was written: a TypeScript member retries by writing again.
    Event { event: Arc<Event>, earlier: u32 },
    /// What is no event.
    Malformed { bytes: Bytes, why: String },
}

impl Entry {
    /// Reads an entry's fields.
    pub(crate) fn read(id: EntryId, fields: impl IntoIterator<Item = (Bytes, Bytes)>) -> Self {
        let field = fields.into_iter().find(|(name, _)| name == EVENT);
        let size = field.as_ref().map_or(0, |(_, json)| json.len());
        let content = match field {
            None => Content::Malformed { bytes: Bytes::new(), why: "has no field `event`".into() },
            Some((_, json)) => match wire::decode(&json, stamp(id)) {
                Ok(decoded) => {
                    let earlier = decoded.attempt.unwrap_or(1).saturating_sub(1);
                    Content::Event { event: Arc::new(decoded.event), earlier }
                }
                Err(error) => Content::Malformed { bytes: json, why: error.to_string() },
            },
        };
        Self { id, content, size }
    }

    /// An event that stands for what is no event, to be dead-lettered.
    pub(crate) fn stand_in(id: EntryId, bytes: &Bytes) -> Event {
        let stamped = match stamp(id) {
            Some(wire::Stamp { id, created_at, .. }) => Event::stamped(id, "malformed", created_at),
            None => Event::new("malformed"),
        };
        stamped.with_data(String::from_utf8_lossy(bytes).into_owned())
    }
}

/// What an entry's id says of an event that lacks an id or a time.
fn stamp(id: EntryId) -> Option<wire::Stamp> {
    let created_at = Timestamp::from_millis(i64::try_from(id.millis()).ok()?).ok()?;
    Some(wire::Stamp { id: EventId::new(id.to_string()).ok()?, created_at })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> EntryId {
        text.parse().unwrap()
    }

    fn read(fields: &[(&'static str, &'static str)]) -> Content {
        let fields =
            fields.iter().map(|(name, value)| (Bytes::from_static(name.as_bytes()), Bytes::from_static(value.as_bytes())));
        Entry::read(id("1700000000120-3"), fields).content
    }

    #[test]
    fn ids_are_ordered_and_print_as_they_came() {
        assert_eq!(id("1700000000120-3").to_string(), "1700000000120-3");
        assert!(id("9-10") > id("9-9") && id("10-0") > id("9-10") && EntryId::ZERO < id("0-1"));
        assert_eq!(id(&format!("{0}-{0}", u64::MAX)).millis(), u64::MAX);
        for bad in ["", "1", "-", "1-", "1-x", "1-2-3", "-1-2"] {
            assert!(bad.parse::<EntryId>().is_err(), "{bad}");
        }
    }

    /// Entries as `@mastra/redis` writes them.
    #[test]
    fn reads_what_the_typescript_side_writes() {
        let json = r#"{"type":"workflow.start","id":"0b1e5c0e-6a34-4e0e-9d5e-5f2f6e0f6a11","runId":"r","data":{"a":1},"createdAt":"2026-01-02T03:04:05.006Z","deliveryAttempt":3}"#;
        let Content::Event { event, earlier } = read(&[("event", json)]) else { panic!("malformed") };
        assert_eq!((event.event_type(), event.run_id(), earlier), ("workflow.start", "r", 2));
        assert_eq!(event.created_at().to_string(), "2026-01-02T03:04:05.006Z");
    }

    #[test]
    fn takes_from_the_entry_what_the_event_lacks() {
        let Content::Event { event, earlier } = read(&[("p", "x"), ("event", r#"{"type":"t","runId":"r"}"#)]) else { panic!() };
        assert_eq!((event.id().to_string().as_str(), earlier), ("1700000000120-3", 0));
        assert_eq!(event.created_at().as_millis(), 1_700_000_000_120);
    }

    #[test]
    fn what_is_no_event_is_told_apart() {
        assert!(matches!(read(&[("other", "{}")]), Content::Malformed { bytes, .. } if bytes.is_empty()));
        assert!(matches!(read(&[("event", "{")]), Content::Malformed { bytes, .. } if bytes == "{"));
        let stand_in = Entry::stand_in(id("5-1"), &Bytes::from_static(b"\xff"));
        assert_eq!((stand_in.id().to_string().as_str(), stand_in.event_type()), ("5-1", "malformed"));
        assert!(Entry::stand_in(id(&format!("{}-0", u64::MAX)), &Bytes::new()).data::<String>().is_ok());
    }
}
