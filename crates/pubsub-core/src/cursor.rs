//! Positions in what a topic retains: cursors, pages of history, and the gaps told when a position is gone.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use crate::{Error, ErrorKind, Event, Start};

/// The history that positions count in: one topic of one bus, in one generation.
///
/// Clearing a topic, or losing the store below it, starts a new generation; positions of another one are never mixed
/// up with it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    bus: SmolStr,
    generation: SmolStr,
}

impl Scope {
    /// A scope from two opaque names a backend chooses: one for bus and topic, one for the generation.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidName`] if either is empty or holds anything but ASCII letters, digits, `-` and `_`.
    pub fn new(bus: impl AsRef<str>, generation: impl AsRef<str>) -> Result<Self, Error> {
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        let (bus, generation) = (bus.as_ref(), generation.as_ref());
        if plain(bus) && plain(generation) {
            return Ok(Self { bus: bus.into(), generation: generation.into() });
        }
        Err(Error::new(ErrorKind::InvalidName("a cursor's scope takes ASCII letters, digits, `-` and `_`".into())))
    }

    /// Whether a cursor belongs here.
    ///
    /// # Errors
    /// The [`Gap`] that says why not.
    pub fn admits(&self, cursor: &Cursor) -> Result<Position, Gap> {
        if cursor.scope.bus != self.bus {
            Err(Gap::OtherBus)
        } else if cursor.scope.generation != self.generation {
            Err(Gap::OtherGeneration)
        } else {
            Ok(cursor.position)
        }
    }

    /// The first position to read of a log that counts densely, still has what is at `floor` and above, and gives `next` to what
    /// comes; for backends.
    ///
    /// # Errors
    /// The [`Gap`] that says why `start` cannot be resumed from.
    pub fn first_of(&self, start: &Start, floor: u64, next: u64) -> Result<u64, Gap> {
        let from = match start {
            Start::Latest => return Ok(next),
            Start::Earliest => return Ok(floor),
            Start::Index(index) => *index,
            Start::After(cursor) => self.admits(cursor)?.major.saturating_add(1),
        };
        if from > next {
            Err(Gap::Ahead)
        } else if from < floor {
            Err(Gap::Trimmed { missed: Some(floor - from) })
        } else {
            Ok(from)
        }
    }
}

/// A place within a scope. Backends give it meaning: a dense index, a log offset, or both halves of a stream entry's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Position {
    /// Compared first.
    pub major: u64,
    /// Compared second.
    pub minor: u64,
}

impl From<u64> for Position {
    fn from(major: u64) -> Self {
        Self { major, minor: 0 }
    }
}

/// An opaque, printable position of one event: subscribing *after* a cursor resumes right behind that event.
///
/// Print it with `Display`, read it back with `parse`. Applications store and return cursors; they do not look inside.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cursor {
    scope: Arc<Scope>,
    position: Position,
}

impl Cursor {
    /// The cursor of a position; for backends.
    pub fn new(scope: Arc<Scope>, position: impl Into<Position>) -> Self {
        Self { scope, position: position.into() }
    }

    /// The place within its scope; for backends.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The scope it counts in; for backends.
    pub fn scope(&self) -> &Arc<Scope> {
        &self.scope
    }
}

/// `bus.generation.major.minor`: text that is safe in URLs, headers and JSON.
impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Position { major, minor } = self.position;
        write!(f, "{}.{}.{major}.{minor}", self.scope.bus, self.scope.generation)
    }
}

impl FromStr for Cursor {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::new(ErrorKind::Decode("not a cursor".into())).on(text);
        let mut parts = text.split('.');
        let mut next = || parts.next().ok_or_else(bad);
        let scope = Scope::new(next()?, next()?).map_err(|_| bad())?;
        let major = next()?.parse().map_err(|_| bad())?;
        let minor = next()?.parse().map_err(|_| bad())?;
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self { scope: Arc::new(scope), position: Position { major, minor } })
    }
}

impl Serialize for Cursor {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cursor {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a position cannot be resumed from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Gap {
    /// What came after it is no longer retained.
    Trimmed {
        /// How many events are missing, if known.
        missed: Option<u64>,
    },
    /// It lies beyond the newest event.
    Ahead,
    /// The topic was cleared since, or its store was lost.
    OtherGeneration,
    /// It belongs to another bus or topic.
    OtherBus,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Trimmed { missed: Some(n) } => write!(f, "{n} events after the position are no longer retained"),
            Self::Trimmed { missed: None } => f.write_str("events after the position are no longer retained"),
            Self::Ahead => f.write_str("the position lies beyond the newest event"),
            Self::OtherGeneration => f.write_str("the topic was cleared, or its store lost, since the position was given"),
            Self::OtherBus => f.write_str("the position belongs to another bus or topic"),
        }
    }
}

/// What to do when a subscription's start position is a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OnGap {
    /// Refuse the subscription with [`ErrorKind::Gap`].
    #[default]
    Fail,
    /// Start at the earliest event that is retained.
    Earliest,
}

/// A page of a topic's history.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// The events, oldest first, each with its cursor.
    pub entries: Vec<(Cursor, std::sync::Arc<Event>)>,
    /// Where the next page starts (`Start::After` of it), or none if this page reached the newest event.
    pub next: Option<Cursor>,
    /// The oldest position retained, or none if nothing is.
    pub floor: Option<Cursor>,
    /// The newest position retained, or none if nothing is.
    pub head: Option<Cursor>,
}

impl Page {
    /// Refuses a limit that no page can keep to; for backends.
    ///
    /// # Errors
    /// `InvalidOption` for zero.
    pub fn check_limit(limit: usize) -> Result<(), Error> {
        if limit == 0 { Err(Error::invalid_option("limit", "must be at least 1")) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_log_is_resumed_where_it_still_is() {
        let scope = Arc::new(Scope::new("orders", "1").unwrap());
        let after = |major: u64| Start::After(Cursor::new(scope.clone(), major));
        let first = |start| scope.first_of(&start, 3, 7);
        assert_eq!((first(Start::Earliest), first(Start::Latest)), (Ok(3), Ok(7)));
        assert_eq!((first(after(2)), first(after(6)), first(Start::Index(7))), (Ok(3), Ok(7), Ok(7)));
        assert_eq!((first(after(7)), first(Start::Index(8))), (Err(Gap::Ahead), Err(Gap::Ahead)));
        assert_eq!(first(after(0)), Err(Gap::Trimmed { missed: Some(2) }));
    }

    #[test]
    fn cursors_print_and_read_back() {
        let scope = Arc::new(Scope::new("orders-1f", "g2").unwrap());
        let cursor = Cursor::new(scope.clone(), Position { major: 7, minor: 1 });
        assert_eq!(cursor.to_string(), "orders-1f.g2.7.1");
        assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
        assert_eq!(scope.admits(&cursor), Ok(Position { major: 7, minor: 1 }));
        let other = |bus, generation| Scope::new(bus, generation).unwrap().admits(&cursor);
        assert_eq!(other("orders-1f", "g3"), Err(Gap::OtherGeneration));
        assert_eq!(other("x", "g2"), Err(Gap::OtherBus));
        for bad in ["", "a.b.1", "a.b.1.x", "a.b.1.2.3", "ä.b.1.2"] {
            assert!(bad.parse::<Cursor>().is_err(), "{bad}");
        }
    }
}
