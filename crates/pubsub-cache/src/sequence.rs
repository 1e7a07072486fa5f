//! In which order a watch hands events over: live ones and those read from the log become one sequence without gap or repeat. Knows
//! no store, no bus and no clock.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::mem;
use std::sync::Arc;

use pubsub_core::{Event, EventId};

use crate::{Generation, LogPage};

/// How many events without an index are remembered, so that they are not handed over again should they be in the log after all; how
/// many that were read from the log, should they come without an index; and how many that could not be read are let in when they come
/// late.
const REMEMBERED: usize = 1000;

/// How many live events that came before their turn are kept in hand. More are left to be read from the log.
const EARLY: usize = 256;

/// An event whose turn it is.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) event: Arc<Event>,
    pub(crate) attempt: u32,
    /// The history in which it stands at its index; none if nothing numbered it.
    pub(crate) generation: Option<Generation>,
    /// How many were lost right before it.
    pub(crate) lagged: u64,
}

/// A piece of the log that is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) generation: Option<Generation>,
    pub(crate) from: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Sequence {
    /// None while the topic is known to have no log.
    generation: Option<Generation>,
    /// Whether it is not known where the log ends: the first number to come is then as good as any.
    adrift: bool,
    /// The index whose turn it is.
    next: u64,
    /// What lies below is to be read from the log.
    target: u64,
    /// Live events that came before their turn, by index. They go behind what is read.
    early: BTreeMap<u64, Arc<Event>>,
    ready: VecDeque<Ready>,
    /// Lost, and not told yet.
    lost: u64,
    dropped: Dropped,
    /// What could not be read, and may come late.
    missing: BTreeSet<u64>,
    strangers: Strangers,
    /// What was read from the log last. Who published it may not know that it was kept, and send it without an index later.
    read: VecDeque<EventId>,
    /// A store whose numbers have been seen and that the log is not known to be another's than.
    suspected: Option<u32>,
    /// A store whose numbers have been seen and that is not the log's.
    foreign: Option<u32>,
}

impl Sequence {
    /// From this index of a log on; what lies below `target`, the log's end, is to be read. Without a generation there is no log yet.
    pub(crate) fn starting(generation: Option<Generation>, next: u64, target: u64) -> Self {
        Self { generation, next, target, dropped: Dropped::from(target), ..Self::default() }
    }

    /// So many events before the log's end may have come live already, and been dropped.
    pub(crate) fn allow_for_dropped(&mut self, count: u64) {
        self.dropped.left_out += count;
    }

    /// From wherever the bus is, with no log to be seen.
    pub(crate) fn adrift() -> Self {
        Self { adrift: true, ..Self::default() }
    }

    pub(crate) fn pop(&mut self) -> Option<Ready> {
        self.ready.pop_front()
    }

    /// How many wait to be popped.
    pub(crate) fn len(&self) -> usize {
        self.ready.len()
    }

    /// What is to be read of the log, if anything is.
    pub(crate) fn wants(&self) -> Option<Wanted> {
        let early = self.early.first_key_value().map_or(0, |(index, _)| *index);
        let behind = self.next < self.target.max(early);
        (behind || self.suspected.is_some()).then_some(Wanted { generation: self.generation, from: self.next })
    }

    /// Whether publishers are known to number events with another store than the log's.
    pub(crate) fn has_seen_another_store(&self) -> bool {
        self.foreign.is_some()
    }

    /// Numbers of another store: it is another's, or the log's own store was lost and made anew. The log can tell.
    fn suspect(&mut self, generation: Generation) {
        if self.foreign != Some(generation.store()) {
            self.suspected = Some(generation.store());
        }
    }

    /// Nothing more is to be read: the rest is left to whoever resumes. Returns how much of that was in hand.
    pub(crate) fn settle_for_less(&mut self) -> usize {
        (self.target, self.suspected) = (self.next, None);
        mem::take(&mut self.early).len()
    }

    /// The log is known to have what lies below this index, whether or not it comes live.
    pub(crate) fn known(&mut self, generation: Generation, next: u64) {
        let begins = match self.generation {
            Some(mine) => mine.store() == generation.store() && mine.number() < generation.number(),
            None => !self.adrift,
        };
        if begins {
            self.enter(generation);
        }
        if self.generation == Some(generation) {
            self.target = self.target.max(next);
        }
    }

    /// An event came live.
    pub(crate) fn live(&mut self, event: Arc<Event>, attempt: u32, dropped: u64) {
        self.dropped.said += dropped;
        let Some(place) = event.index() else { return self.stranger(event, attempt) };
        let (generation, index) = (Generation::from_index(place.generation), place.index);
        match self.generation {
            Some(mine) if mine == generation => {}
            Some(mine) if mine.store() != generation.store() => {
                self.suspect(generation);
                return self.stranger(event, attempt);
            }
            // Published before the topic was cleared.
            Some(mine) if mine.number() > generation.number() => return,
            Some(_) => self.enter(generation),
            None => {
                self.enter(generation);
                if mem::take(&mut self.adrift) {
                    (self.next, self.target, self.dropped) =
                        (index, index, Dropped { said: self.dropped.said, ..Dropped::from(index) });
                    // Of those that were numbered before it, some may come behind it.
                    self.missing.extend(index.saturating_sub(REMEMBERED as u64)..index);
                }
            }
        }
        self.lost += self.dropped.came(index);
        if index < self.next {
            if attempt > 1 || self.missing.remove(&index) {
                self.emit(event, attempt, Some(generation));
            }
        } else if index == self.next {
            self.take(event, attempt, index);
            self.pass_early(self.next);
        } else if self.early.len() < EARLY {
            self.early.insert(index, event);
        } else {
            self.target = self.target.max(index + 1);
        }
    }

    /// What was wanted was read, with this limit.
    pub(crate) fn page(&mut self, wanted: Wanted, page: LogPage, limit: usize) {
        if wanted.generation != self.generation {
            return; // another began meanwhile: the page may be from before that
        }
        let Some(generation) = page.generation else { return self.skip() };
        if self.generation != Some(generation) {
            // Cleared, or forgotten, since it was asked for: the next one is read from its start.
            self.enter(generation);
            self.target = page.next;
            return;
        }
        self.foreign = self.suspected.take().or(self.foreign);
        if page.floor > self.next {
            let early = self.early.first_key_value().map_or(0, |(index, _)| *index);
            self.lose_up_to(page.floor.min(self.target.max(early)));
            if page.floor > self.next {
                return; // what lies between may still come live
            }
        }
        let whole = page.events.len() < limit;
        for event in page.events {
            let Some(index) = event.index().map(|place| place.index).filter(|index| *index >= self.next) else { continue };
            self.early.remove(&index);
            if self.read.len() == REMEMBERED {
                self.read.pop_front();
            }
            self.read.push_back(event.id().clone());
            self.take(event, 1, index);
        }
        if whole {
            // Trims took the rest.
            self.pass_early(page.next);
        }
        self.pass_early(self.next);
    }

    /// The log could not be read: on without what it was to give.
    pub(crate) fn skip(&mut self) {
        self.suspected = None;
        while self.wants().is_some() {
            let end = self.early.first_key_value().map_or(self.target, |(index, _)| *index);
            let room = REMEMBERED.saturating_sub(self.missing.len());
            self.missing.extend((self.next..end).take(room));
            self.lose_up_to(end);
            self.pass_early(self.next);
        }
    }

    /// What lies below this index is lost, but for what is in hand.
    fn lose_up_to(&mut self, end: u64) {
        while self.next < end {
            let early = self.early.first_key_value().map_or(end, |(index, _)| (*index).min(end));
            self.lost += early - self.next;
            self.next = early;
            self.pass_early(early);
        }
    }

    /// Hands over what is in hand up to this index and right behind it: nothing before it is to come.
    fn pass_early(&mut self, up_to: u64) {
        while let Some(first) = self.early.first_entry().filter(|first| *first.key() <= up_to.max(self.next)) {
            let (index, event) = first.remove_entry();
            if index >= self.next {
                self.take(event, 1, index);
            }
        }
        self.next = self.next.max(up_to);
    }

    /// An event of the sequence whose turn it is.
    fn take(&mut self, event: Arc<Event>, attempt: u32, index: u64) {
        self.next = index + 1;
        // It may have come without a number before.
        if attempt > 1 || !self.strangers.forget(event.id()) {
            self.emit(event, attempt, self.generation);
        }
    }

    /// An event that nothing numbered passes at once.
    fn stranger(&mut self, event: Arc<Event>, attempt: u32) {
        self.lost += self.dropped.account();
        if attempt == 1 && self.read.contains(event.id()) {
            return;
        }
        self.strangers.remember(event.id());
        self.emit(event, attempt, None);
    }

    fn emit(&mut self, event: Arc<Event>, attempt: u32, generation: Option<Generation>) {
        self.ready.push_back(Ready { event, attempt, generation, lagged: mem::take(&mut self.lost) });
    }

    /// A generation begins, at 0. What was left of the one before is gone, but for what is in hand.
    fn enter(&mut self, generation: Generation) {
        self.skip();
        self.generation = Some(generation);
        (self.next, self.target, self.dropped) = (0, 0, Dropped::default());
        (self.suspected, self.foreign) = (None, None);
        self.early.clear();
        self.missing.clear();
    }
}

/// What the bus says to have dropped. The log may have it: as many as there are indices that did not come live.
///
/// It says how many, not which. Publishers overtake each other, so that up to [`EARLY`] of what nothing accounts for is taken to be
/// on its way, or to have been when this began: what is told to be lost is lost, and of events without an index so many go untold.
#[derive(Debug)]
struct Dropped {
    /// Said to be dropped, and not accounted for.
    said: u64,
    /// The index from which on it counts.
    base: u64,
    /// The index that would be next on the bus.
    next: u64,
    /// How many from the base up to that did not come, and account for nothing yet.
    left_out: u64,
}

impl Dropped {
    fn from(base: u64) -> Self {
        Self { said: 0, base, next: base, left_out: EARLY as u64 }
    }

    /// An event came live. Returns how many nothing accounts for.
    fn came(&mut self, index: u64) -> u64 {
        match index.checked_sub(self.next) {
            Some(passed_over) => (self.next, self.left_out) = (index + 1, self.left_out + passed_over),
            None if index >= self.base => self.left_out = self.left_out.saturating_sub(1), // it was overtaken
            None => {}
        }
        self.account()
    }

    fn account(&mut self) -> u64 {
        let accounted_for = self.said.min(self.left_out);
        self.left_out -= accounted_for;
        mem::take(&mut self.said) - accounted_for
    }
}

impl Default for Dropped {
    fn default() -> Self {
        Self::from(0)
    }
}

/// The events that came without a number.
#[derive(Debug, Default)]
struct Strangers {
    ids: HashSet<EventId>,
    order: VecDeque<EventId>,
}

impl Strangers {
    fn remember(&mut self, id: &EventId) {
        if self.ids.insert(id.clone()) {
            self.order.push_back(id.clone());
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }

    /// Whether this came; it will not come again.
    fn forget(&mut self, id: &EventId) -> bool {
        !self.ids.is_empty() && self.ids.remove(id)
    }
}

#[cfg(test)]
mod tests;
