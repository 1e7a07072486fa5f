//! What was read of a topic last, decoded once, for all who follow it and have not taken it yet. Pure.

use std::collections::VecDeque;
use std::sync::Arc;

use pubsub_core::{Scope, machinery};

use crate::entry::{Content, Entry, EntryId};

/// How many entries are kept for those who have not taken them. Who falls behind further reads by itself.
pub(crate) const ENTRIES: usize = 1024;

/// How many bytes of them, beside the one that is newest.
pub(crate) const BYTES: u64 = 4 << 20;

/// An entry that was read.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) id: EntryId,
    /// How many were added to the stream before it, where that is known.
    pub(crate) number: Option<u64>,
    pub(crate) item: Item,
    /// How many bytes were read before it.
    before: u64,
}

#[derive(Debug)]
pub(crate) enum Item {
    /// An event, ready for any number of queues.
    Event(machinery::Entry),
    /// What is no event.
    Malformed(Entry),
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Window {
    reads: VecDeque<Read>,
    /// The place of the first of them, counted from whatever was read first.
    first: u64,
    /// What was given up to here is not in it.
    floor: EntryId,
    /// Up to where was read.
    at: EntryId,
    /// How many were added to the stream up to there, where that is known.
    number: Option<u64>,
    /// How many bytes were ever read.
    bytes: u64,
}

impl Window {
    /// Begins anew behind an entry.
    pub(crate) fn restart(&mut self, at: EntryId, number: Option<u64>) {
        self.first += self.reads.len() as u64;
        self.reads.clear();
        (self.floor, self.at, self.number) = (at, at, number);
    }

    /// Up to where was read.
    pub(crate) fn at(&self) -> EntryId {
        self.at
    }

    /// The place behind the last one.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.reads.len() as u64
    }

    /// The place of whatever follows an entry; none if that is not certain to be here.
    pub(crate) fn behind(&self, id: EntryId) -> Option<u64> {
        (id >= self.floor).then(|| self.first + self.reads.partition_point(|read| read.id <= id) as u64)
    }

    /// Whether a place is still, or not yet, here.
    pub(crate) fn has(&self, place: u64) -> bool {
        place >= self.first
    }

    /// What is here from a place on.
    pub(crate) fn from(&self, place: u64) -> impl Iterator<Item = &Read> {
        self.range(place, self.end())
    }

    /// What is between two places.
    pub(crate) fn range(&self, from: u64, to: u64) -> impl Iterator<Item = &Read> {
        // Places within the window differ by what a deque can hold.
        self.reads.range((from - self.first) as usize..(to - self.first) as usize)
    }

    /// Whether there is so much from a place on that nothing more is to be read on its account: half of the window.
    pub(crate) fn is_enough(&self, place: u64) -> bool {
        let bytes = self.from(place).next().map_or(0, |read| self.bytes - read.before);
        self.end() - place > ENTRIES as u64 / 2 || bytes > BYTES / 2
    }

    /// Whether what is at a place would be over the bounds with so many more.
    pub(crate) fn is_tight(&self, place: u64, more: usize) -> bool {
        let bytes = self.from(place).next().map_or(0, |read| self.bytes - read.before);
        self.end() - place + more as u64 > ENTRIES as u64 || bytes > BYTES / 2
    }

    /// The stream was looked at while it was read: so many had been added to it, so many of them trimmed away. What is known of
    /// numbers is corrected. Returns whether another stream has taken its place.
    pub(crate) fn correct(&mut self, added: u64, trimmed: Option<u64>) -> bool {
        let recreated = self.number.is_some_and(|number| added < number);
        self.number = match (self.number, trimmed) {
            (Some(_), Some(trimmed)) if recreated => Some(trimmed),
            (Some(number), Some(trimmed)) => Some(number.max(trimmed)),
            _ => None,
        };
        recreated
    }

    /// Adds what was read.
    pub(crate) fn push(&mut self, entry: Entry, scope: &Arc<Scope>) {
        let Entry { id, size, .. } = entry;
        let number = self.number;
        let item = match entry.content {
            Content::Event { event, earlier } => {
                Item::Event(machinery::Entry::new(event).attempt(1 + earlier).at(scope.clone(), id.position()))
            }
            Content::Malformed { .. } => Item::Malformed(entry),
        };
        self.reads.push_back(Read { id, number, item, before: self.bytes });
        self.bytes += size as u64;
        (self.at, self.number) = (self.at.max(id), number.map(|number| number + 1));
    }

    /// Forgets what nobody needs, whose least place is given, and what is over the bounds.
    pub(crate) fn trim(&mut self, needed: u64) {
        while let Some(read) = self.reads.front()
            && (self.first < needed || self.reads.len() > ENTRIES || (self.reads.len() > 1 && self.bytes - read.before > BYTES))
        {
            self.floor = self.floor.max(read.id);
            self.reads.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use pubsub_core::{Event, Position};

    use super::*;

    fn id(number: u64) -> EntryId {
        Position { major: number, minor: 0 }.into()
    }

    fn window(entries: std::ops::RangeInclusive<u64>, size: usize) -> Window {
        let mut window = Window::default();
        window.restart(id(entries.start() - 1), Some(100));
        let scope = Arc::new(Scope::new("redis-a", "0").unwrap());
        for number in entries {
            let content = Content::Event { event: Arc::new(Event::new("x")), earlier: 0 };
            window.push(Entry { id: id(number), content, size }, &scope);
        }
        window
    }

    #[test]
    fn places_are_found_by_what_comes_before_them() {
        let mut window = window(5..=9, 1);
        assert_eq!((window.behind(id(3)), window.behind(id(4)), window.behind(id(6))), (None, Some(0), Some(2)));
        assert_eq!((window.behind(id(9)), window.behind(id(20))), (Some(5), Some(5)));
        window.trim(3);
        assert_eq!((window.behind(id(6)), window.behind(id(7)), window.has(2), window.has(3)), (None, Some(3), false, true));
        assert_eq!(
            window.from(3).map(|read| (read.id, read.number)).collect::<Vec<_>>(),
            [(id(8), Some(103)), (id(9), Some(104))]
        );
        window.trim(u64::MAX);
        assert_eq!((window.at(), window.end(), window.behind(id(8)), window.behind(id(9))), (id(9), 5, None, Some(5)));
    }

    #[test]
    fn is_bounded_in_number_and_bytes() {
        let mut many = window(1..=ENTRIES as u64 + 10, 1);
        assert!(many.is_enough(0) && !many.is_enough(many.end()));
        assert!(many.is_tight(many.end() - 1000, 100) && !many.is_tight(many.end() - 900, 100));
        many.trim(0);
        assert_eq!((many.end(), many.has(9), many.has(10)), (ENTRIES as u64 + 10, false, true));
        let mut large = window(1..=3, BYTES as usize);
        assert!(large.is_enough(2) && !large.is_enough(3));
        large.trim(0);
        assert!(!large.has(1) && large.has(2), "the newest stays");
    }

    #[test]
    fn numbers_tell_what_was_lost() {
        let mut window = window(5..=6, 1); // 102 were added up to here
        assert!(!window.correct(110, Some(90)) && window.number == Some(102));
        assert!(!window.correct(210, Some(150)) && window.number == Some(150));
        assert!(window.correct(7, Some(3)) && window.number == Some(3), "another stream");
        assert!(!window.correct(9, None) && window.number.is_none());
        assert!(!window.correct(9, Some(3)) && window.number.is_none(), "what was unknown is not guessed");
    }
}
