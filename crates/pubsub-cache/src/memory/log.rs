//! One topic's log: numbered events, forgotten from the oldest end.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;

use bytes::Bytes;
use foldhash::fast::RandomState;
use pubsub_core::{Event, ReplayIndex};
use smallvec::SmallVec;

use super::{InMemoryBuilder, Moment};
use crate::{Generation, LogPage};

/// What was forgotten, to be dropped and accounted for without a lock.
#[derive(Default)]
pub(super) struct Gone {
    /// Room for what one append makes go in a full log.
    pub(super) events: SmallVec<[Arc<Event>; 1]>,
    pub(super) values: Vec<Bytes>,
    pub(super) bytes: usize,
}

pub(super) struct Log {
    generation: Generation,
    /// What lies below was forgotten for a bound.
    floor: u64,
    next: u64,
    kept: VecDeque<Kept>,
    /// The newest of what is kept: indices by the hash of the id. Of two ids with one hash the newer is known, which no number of
    /// events makes likely and nobody can bring about, since the hash is seeded at random.
    known: HashMap<u64, u64, RandomState>,
    /// When it was last appended to or read.
    pub(super) used: u64,
}

struct Kept {
    event: Arc<Event>,
    /// Of its id, so that forgetting looks at no event that has gone cold.
    hash: u64,
    index: u64,
    size: usize,
    since: u64,
}

/// What came of appending.
pub(super) struct Appended {
    pub(super) events: Vec<Arc<Event>>,
    pub(super) added: usize,
}

impl Log {
    pub(super) fn new(generation: Generation) -> Self {
        Self { generation, floor: 0, next: 0, kept: VecDeque::new(), known: HashMap::default(), used: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    pub(super) fn append(
        &mut self,
        events: &[Arc<Event>],
        sizes: &[usize],
        now: Moment,
        bounds: &InMemoryBuilder,
        gone: &mut Gone,
    ) -> Appended {
        self.used = now.turn;
        let mut appended = Appended { events: Vec::with_capacity(events.len()), added: 0 };
        for (event, size) in events.iter().zip(sizes) {
            let hash = self.known.hasher().hash_one(event.id());
            if let Some(kept) = self.known(hash).filter(|kept| kept.event.id() == event.id()) {
                appended.events.push(kept.event.clone());
                continue;
            }
            let index = ReplayIndex { generation: self.generation.get(), index: self.next };
            let event = Arc::new(Event::clone(event).with_index(Some(index)));
            self.known.insert(hash, self.next);
            self.kept.push_back(Kept { event: event.clone(), hash, index: self.next, size: *size, since: now.millis });
            self.next += 1;
            appended.added += size;
            appended.events.push(event);
            if let Some(old) = self.kept.len().checked_sub(bounds.window + 1) {
                self.unlearn(self.kept[old].hash, self.kept[old].index);
            }
            if self.kept.len() > bounds.max_events {
                self.forget_first(gone);
            }
        }
        appended
    }

    fn known(&self, hash: u64) -> Option<&Kept> {
        self.at(*self.known.get(&hash)?)
    }

    /// A repeat of this one is not recognised from now on.
    fn unlearn(&mut self, hash: u64, index: u64) {
        if let Entry::Occupied(known) = self.known.entry(hash)
            && *known.get() == index
        {
            known.remove();
        }
    }

    fn place(&self, index: u64) -> usize {
        self.kept.partition_point(|kept| kept.index < index)
    }

    fn at(&self, index: u64) -> Option<&Kept> {
        self.kept.get(self.place(index)).filter(|kept| kept.index == index)
    }

    fn forget_first(&mut self, gone: &mut Gone) {
        let Some(first) = self.kept.pop_front() else { return };
        self.floor = first.index + 1;
        self.drop_kept(first, gone);
    }

    fn drop_kept(&mut self, kept: Kept, gone: &mut Gone) {
        self.unlearn(kept.hash, kept.index);
        gone.bytes += kept.size;
        gone.events.push(kept.event);
    }

    /// Forgets what was appended before the horizon.
    pub(super) fn expire(&mut self, horizon: Option<u64>, gone: &mut Gone) {
        let Some(horizon) = horizon else { return };
        while self.kept.front().is_some_and(|kept| kept.since < horizon) {
            self.forget_first(gone);
        }
        self.shrink();
    }

    /// Forgets its oldest events until so many bytes are gone in all.
    pub(super) fn forget_oldest(&mut self, bytes: usize, gone: &mut Gone) {
        while gone.bytes < bytes && !self.kept.is_empty() {
            self.forget_first(gone);
        }
        self.shrink();
    }

    pub(super) fn forget_all(&mut self, gone: &mut Gone) {
        self.forget_oldest(usize::MAX, gone);
    }

    /// Forgets these events, wherever they are, and returns how many there were.
    pub(super) fn remove(&mut self, events: &[Arc<Event>], gone: &mut Gone) -> u64 {
        let matching: HashSet<_> = events.iter().map(Arc::as_ptr).collect();
        let (out, kept): (VecDeque<_>, _) =
            std::mem::take(&mut self.kept).into_iter().partition(|kept| matching.contains(&Arc::as_ptr(&kept.event)));
        self.kept = kept;
        let count = out.len() as u64;
        out.into_iter().for_each(|kept| self.drop_kept(kept, gone));
        count
    }

    pub(super) fn page(&mut self, from: u64, limit: usize, now: Moment) -> LogPage {
        self.used = now.turn;
        let events = if limit == 0 || from >= self.next {
            Vec::new()
        } else {
            let first = self.place(from);
            self.kept.range(first..).take(limit).map(|kept| kept.event.clone()).collect()
        };
        LogPage::new(self.generation, self.floor, self.next, self.kept.len() as u64, events)
    }

    /// A burst gives its memory back once nothing of it is left.
    fn shrink(&mut self) {
        if self.kept.is_empty() && self.kept.capacity() > 16 {
            (self.kept, self.known) = (VecDeque::new(), HashMap::default());
        }
    }
}
