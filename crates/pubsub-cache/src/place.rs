//! Cursors in a topic's log.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;
use pubsub_core::{Cursor, Event, Gap, Page, Positions, Scope, Start, Topic};

use crate::{Generation, LogPage};

/// How many topics' scopes are remembered.
const REMEMBERED: usize = 4096;

/// The scopes of topics published to of late: making one costs as much as publishing.
#[derive(Debug, Default)]
pub(crate) struct Scopes(RwLock<HashMap<Topic, (Generation, Arc<Scope>), foldhash::fast::RandomState>>);

impl Scopes {
    pub(crate) fn of(&self, topic: &Topic, generation: Generation) -> Arc<Scope> {
        if let Some((known, scope)) = self.0.read().get(topic)
            && *known == generation
        {
            return scope.clone();
        }
        let scope = Arc::new(scope(topic, generation));
        let mut scopes = self.0.write();
        if scopes.len() >= REMEMBERED {
            scopes.clear();
        }
        scopes.insert(topic.clone(), (generation, scope.clone()));
        scope
    }

    /// Where kept events stand.
    pub(crate) fn positions(&self, topic: &Topic, kept: &[Arc<Event>]) -> Positions {
        let Some(first) = kept.iter().find_map(|event| event.index()) else { return Positions::none() };
        let scope = self.of(topic, Generation::from_index(first.generation));
        let cursor = |event: &Arc<Event>| event.index().map(|place| Cursor::new(scope.clone(), place.index));
        kept.iter().filter_map(cursor).collect()
    }
}

/// The scope of a topic's log: the store and the topic, and which life of the log it is.
pub(crate) fn scope(topic: &Topic, generation: Generation) -> Scope {
    let bus = format!("{:06x}{}", generation.store(), topic_name(topic));
    Scope::new(bus, generation.number().to_string()).expect("digits make a scope")
}

/// A topic in a cursor, which has less room than names have: its FNV-1a hash (<http://www.isthe.com/chongo/tech/comp/fnv/>), which is
/// the same in every process.
fn topic_name(topic: &Topic) -> String {
    let hash = topic
        .as_str()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

/// Whether a cursor was given for this topic by a store, rather than by the bus below.
pub(crate) fn is_of(topic: &Topic, cursor: &Cursor) -> bool {
    let text = cursor.to_string();
    let bus = text.split('.').next().unwrap_or_default();
    bus.len() == 22 && bus.ends_with(&topic_name(topic)) && bus.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The index at which a start lies in a log, given its empty page.
pub(crate) fn first_of(topic: &Topic, start: &Start, log: &LogPage) -> Result<u64, Gap> {
    match (log.generation, start) {
        (Some(generation), start) => scope(topic, generation).first_of(start, log.floor, log.next),
        (None, Start::After(cursor)) if !is_of(topic, cursor) => Err(Gap::OtherBus),
        // It was cleared, or forgotten, and nothing came since.
        (None, Start::After(_)) => Err(Gap::OtherGeneration),
        (None, Start::Index(index)) if *index > 0 => Err(Gap::Ahead),
        (None, _) => Ok(0),
    }
}

/// A page of history, of what was read and whether there is more.
pub(crate) fn history(topic: &Topic, log: LogPage, limit: usize) -> Page {
    let Some(generation) = log.generation else { return Page::default() };
    let scope = Arc::new(scope(topic, generation));
    let cursor = |index: u64| Cursor::new(scope.clone(), index);
    let place = |event: &Arc<Event>| event.index().map(|place| place.index);
    let reaches = log.events.last().and_then(place).map_or(log.floor, |last| last + 1);
    let more = log.events.len() == limit && limit > 0 && reaches < log.next;
    let entries: Vec<_> =
        log.events.into_iter().filter_map(|event| place(&event).map(|index| (cursor(index), event))).collect();
    let next = entries.last().filter(|_| more).map(|(last, _)| last.clone());
    let mut page = Page { entries, next, ..Page::default() };
    if log.kept > 0 {
        (page.floor, page.head) = (Some(cursor(log.floor)), Some(cursor(log.next - 1)));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_of_another_store_topic_or_life_is_told_apart() {
        let (orders, other) = (Topic::new("orders").unwrap(), Topic::new("other").unwrap());
        let log = |generation, floor, next| LogPage::new(generation, floor, next, next - floor, Vec::new());
        let at = |topic: &Topic, generation| Start::After(Cursor::new(Arc::new(scope(topic, generation)), 4));
        let mine = Generation::new(7, 1);
        let first = |start: Start| first_of(&orders, &start, &log(mine, 2, 9));
        assert_eq!(first(at(&orders, mine)), Ok(5));
        assert_eq!(first(at(&orders, Generation::new(7, 2))), Err(Gap::OtherGeneration));
        assert_eq!(first(at(&orders, Generation::new(8, 1))), Err(Gap::OtherBus));
        assert_eq!(first(at(&other, mine)), Err(Gap::OtherBus));
        let nothing = |start: Start| first_of(&orders, &start, &LogPage::default());
        assert_eq!(nothing(at(&orders, mine)), Err(Gap::OtherGeneration));
        assert_eq!(nothing(at(&other, mine)), Err(Gap::OtherBus));
        assert_eq!((nothing(Start::Index(0)), nothing(Start::Index(1))), (Ok(0), Err(Gap::Ahead)));
    }
}
