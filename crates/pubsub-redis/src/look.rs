//! What is known of a stream, and where a subscription starts in it. The decisions are pure.

use std::sync::LazyLock;

use fred::types::Value;
use pubsub_core::{Cursor, Error, ErrorKind, Gap, OnGap, Result, Scope, Start};

use crate::entry::EntryId;
use crate::errors::Fault;
use crate::keys::Keys;
use crate::link::{Cmd, Link, Script};
use crate::reply;

static LOOK: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/look.lua")));

/// A stream at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Look {
    pub(crate) exists: bool,
    /// The id given last.
    pub(crate) last: EntryId,
    /// The oldest entry there is.
    pub(crate) first: Option<EntryId>,
    pub(crate) length: u64,
    /// How many were ever added.
    pub(crate) added: u64,
    /// Whether single entries were deleted, so that lengths do not add up.
    pub(crate) gaps: bool,
    /// Whether the group that was asked about is there.
    pub(crate) grouped: bool,
    /// What was given up to here belongs to an earlier generation.
    pub(crate) cleared: Option<EntryId>,
}

/// Looks at a stream, and for a group in it.
pub(crate) async fn look(link: &Link, stream: &str, group: Option<&str>) -> std::result::Result<Look, Fault> {
    let call = LOOK.call(&[stream]).arg(group.unwrap_or_default());
    let cleared = Cmd::new("GET").key(&Keys::cleared(stream));
    let (looked, cleared) = futures::join!(link.eval(&LOOK, call), link.call(cleared));
    let [exists, last, first, length, added, gaps, grouped] = reply::tuple(looked?)?;
    let first = if matches!(first, Value::Null | Value::Boolean(false)) { None } else { Some(reply::id(&first)?) };
    Ok(Look {
        exists: reply::number(&exists)? == 1,
        last: reply::id(&last)?,
        first,
        length: reply::number(&length)?,
        added: reply::number(&added)?,
        gaps: reply::number(&gaps)? == 1,
        grouped: reply::number(&grouped)? == 1,
        // Somebody else's text there is nobody's generation.
        cleared: reply::id(&cleared?).ok(),
    })
}

impl Look {
    /// How many entries there were before the oldest that is left, where that can be known.
    pub(crate) fn trimmed(&self) -> Option<u64> {
        (!self.gaps).then(|| self.added.saturating_sub(self.length))
    }

    /// The entry behind which a subscription starts.
    pub(crate) fn start(&self, start: &Start, on_gap: OnGap, scope: &Scope) -> Result<EntryId> {
        let found = match start {
            Start::Latest => Ok(self.last),
            Start::Earliest => Ok(EntryId::ZERO),
            Start::After(cursor) => self.after(cursor, scope),
            // Refused by the options' own check: there are no indices.
            Start::Index(_) => return Err(Error::unsupported(pubsub_core::Capability::Index)),
        };
        match (found, on_gap) {
            (Ok(id), _) => Ok(id),
            (Err(_), OnGap::Earliest) => Ok(EntryId::ZERO),
            (Err(gap), OnGap::Fail) => Err(ErrorKind::Gap(gap).into()),
        }
    }

    fn after(&self, cursor: &Cursor, scope: &Scope) -> Result<EntryId, Gap> {
        let id = EntryId::from(scope.admits(cursor)?);
        let recreated = self.added == self.length && self.first.is_some_and(|first| first > id);
        if !self.exists || self.cleared.is_some_and(|cleared| id <= cleared) || recreated {
            Err(Gap::OtherGeneration)
        } else if id > self.last {
            Err(Gap::Ahead)
        } else if id < self.last && self.first.is_none_or(|first| first > id) {
            // Perhaps nothing lay between the position and what is left, but that is not known any more.
            Err(Gap::Trimmed { missed: None })
        } else {
            Ok(id)
        }
    }

    /// What the server is to take as read by a group that starts behind an entry, so that it can count what the group loses.
    pub(crate) fn read_at(&self, id: EntryId) -> Option<u64> {
        match id {
            EntryId::ZERO => self.trimmed(),
            id if id == self.last => Some(self.added),
            _ => None, // the server finds out
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn id(text: &str) -> EntryId {
        text.parse().unwrap()
    }

    /// Ids 5-0 to 9-0 are left of ten that were added.
    fn stream() -> Look {
        Look { exists: true, last: id("9-0"), first: Some(id("5-0")), length: 5, added: 10, ..Look::default() }
    }

    fn after(look: &Look, text: &str) -> Result<EntryId, Gap> {
        let scope = Arc::new(Scope::new("redis-a", "0").unwrap());
        look.after(&Cursor::new(scope.clone(), id(text).position()), &scope)
    }

    #[test]
    fn resumes_from_what_is_retained_and_tells_the_rest() {
        let look = stream();
        assert_eq!(
            (after(&look, "5-0"), after(&look, "7-3"), after(&look, "9-0")),
            (Ok(id("5-0")), Ok(id("7-3")), Ok(id("9-0")))
        );
        assert_eq!(after(&look, "4-9"), Err(Gap::Trimmed { missed: None }));
        assert_eq!(after(&look, "9-1"), Err(Gap::Ahead));
        let other = Scope::new("redis-b", "0").unwrap();
        let cursor = Cursor::new(Arc::new(Scope::new("redis-a", "0").unwrap()), id("6-0").position());
        assert_eq!(look.after(&cursor, &other), Err(Gap::OtherBus));
    }

    #[test]
    fn a_cleared_or_recreated_stream_is_another_generation() {
        let cleared = Look { cleared: Some(id("6-0")), ..stream() };
        assert_eq!((after(&cleared, "6-0"), after(&cleared, "6-1")), (Err(Gap::OtherGeneration), Ok(id("6-1"))));
        let recreated = Look { added: 5, ..stream() };
        assert_eq!(after(&recreated, "4-0"), Err(Gap::OtherGeneration));
        assert_eq!(after(&Look::default(), "4-0"), Err(Gap::OtherGeneration));
    }

    #[test]
    fn an_emptied_stream_can_be_resumed_at_its_end() {
        let empty = Look { first: None, length: 0, ..stream() };
        assert_eq!((after(&empty, "9-0"), after(&empty, "8-0")), (Ok(id("9-0")), Err(Gap::Trimmed { missed: None })));
    }

    #[test]
    fn gaps_can_be_passed_over() {
        let scope = Scope::new("redis-a", "0").unwrap();
        let start = Start::After(Cursor::new(Arc::new(scope.clone()), id("9-1").position()));
        assert_eq!(stream().start(&start, OnGap::Earliest, &scope).unwrap(), EntryId::ZERO);
        let refused = stream().start(&start, OnGap::Fail, &scope).unwrap_err();
        assert_eq!(refused.kind(), &ErrorKind::Gap(Gap::Ahead));
        assert_eq!(stream().start(&Start::Latest, OnGap::Fail, &scope).unwrap(), id("9-0"));
    }

    #[test]
    fn what_a_new_group_has_read() {
        let look = stream();
        assert_eq!((look.read_at(EntryId::ZERO), look.read_at(id("9-0")), look.read_at(id("6-0"))), (Some(5), Some(10), None));
        assert_eq!(Look { gaps: true, ..look }.read_at(EntryId::ZERO), None);
    }
}
