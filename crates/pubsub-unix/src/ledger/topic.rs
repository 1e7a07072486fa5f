//! A topic: a bounded log of events that counts densely within a generation, and the groups that read it.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::hash::BuildHasher;

use foldhash::HashMap;
use foldhash::fast::RandomState;
use pubsub_core::{Cursor, Scope, TrimFilter, wire};
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::group::{HandedOver, Seated};
use super::{STRETCH_BYTES, STRETCH_LEAST};
use crate::protocol::{Begin, ClientId, GroupState, NoStart, Offsets, Place, Stretch, Take};
use crate::record::{Run, Stored};

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Topic {
    pub(super) generation: u64,
    /// The offset of the first of `events`; what lies below was lost to a bound.
    floor: u64,
    /// None where an event was trimmed.
    events: VecDeque<Option<Stored>>,
    trimmed: u64,
    /// Where each event is, by id: a repeated one is not another.
    #[serde(skip)]
    ids: HashMap<u64, u64>,
    /// The keys of `events`, which are found there: hashes of ids, under a secret of this process.
    #[serde(skip)]
    keys: VecDeque<u64>,
    #[serde(skip)]
    hasher: RandomState,
    pub(super) groups: BTreeMap<SmolStr, Seated>,
    pub(super) bytes: u64,
    /// When it was last published to, among all topics.
    pub(super) used: u64,
}

impl Topic {
    pub(super) fn new(generation: u64) -> Self {
        Self { generation, ..Self::default() }
    }

    fn next(&self) -> u64 {
        self.floor + self.events.len() as u64
    }

    pub(super) fn retained(&self) -> u64 {
        self.events.len() as u64 - self.trimmed
    }

    /// Appends an event, unless it is here already. Returns its offset.
    pub(super) fn append(&mut self, event: Stored) -> u64 {
        let (offset, key) = (self.next(), self.key(&event));
        if let Some(known) = self.ids.insert(key, offset) {
            if self.at_offset(known).is_some_and(|kept| kept.id_bytes() == event.id_bytes()) {
                self.ids.insert(key, known);
                return known;
            }
            // Of two ids with one hash, the newer is the one that is recognised.
        }
        self.bytes += event.len();
        self.events.push_back(Some(event));
        self.keys.push_back(key);
        offset
    }

    fn key(&self, event: &Stored) -> u64 {
        self.hasher.hash_one(event.id_bytes())
    }

    fn at_offset(&self, offset: u64) -> Option<&Stored> {
        self.events.get(usize::try_from(offset.checked_sub(self.floor)?).ok()?)?.as_ref()
    }

    pub(super) fn count_new(&self, events: &Run) -> u64 {
        let known = |event: &Stored| {
            let kept = self.ids.get(&self.key(event)).and_then(|offset| self.at_offset(*offset));
            kept.is_some_and(|kept| kept.id_bytes() == event.id_bytes())
        };
        events.iter().filter(|event| !known(event)).count() as u64
    }

    /// Makes the index that is not written down.
    pub(super) fn index(&mut self) {
        self.keys = self.events.iter().map(|event| event.as_ref().map_or(0, |event| self.key(event))).collect();
        let numbered = (self.floor..).zip(&self.events).zip(&self.keys);
        self.ids = numbered.filter_map(|((offset, event), key)| event.as_ref().map(|_| (*key, offset))).collect();
    }

    /// An event at this offset is no longer recognised.
    fn forget(&mut self, key: u64, offset: u64) {
        if let Entry::Occupied(known) = self.ids.entry(key)
            && *known.get() == offset
        {
            known.remove();
        }
    }

    /// Lets go of the oldest event. Returns its bytes.
    pub(super) fn lose_oldest(&mut self) -> u64 {
        let mut freed = 0;
        while let Some(oldest) = self.events.pop_front() {
            let (offset, key) = (self.floor, self.keys.pop_front());
            self.floor += 1;
            match oldest {
                Some(lost) => {
                    freed = lost.len();
                    key.into_iter().for_each(|key| self.forget(key, offset));
                    self.groups.values_mut().for_each(|group| group.loses(offset));
                    break;
                }
                None => self.trimmed -= 1,
            }
        }
        self.bytes -= freed;
        freed
    }

    /// Whether the oldest event is one that every group has read which holds publishers back.
    pub(super) fn may_lose_oldest(&self) -> bool {
        self.retained() > 1 && self.oldest_unread().is_none_or(|unread| self.floor < unread)
    }

    /// The offset of the first event that a group which holds publishers back has not read.
    pub(super) fn oldest_unread(&self) -> Option<u64> {
        self.groups.values().filter(|group| group.holds_back()).map(|group| group.next).min()
    }

    /// The floor once so many of the oldest events are gone.
    pub(super) fn oldest_after(&self, count: u64) -> u64 {
        let kept = self.events.iter().enumerate().filter(|(_, event)| event.is_some());
        let after = kept.map(|(place, _)| place as u64 + 1).nth(usize::try_from(count).unwrap_or(usize::MAX).saturating_sub(1));
        self.floor + after.unwrap_or(self.events.len() as u64 + count)
    }

    /// Whether nobody would miss more than its history.
    pub(super) fn is_expendable(&self) -> bool {
        self.groups.is_empty() || self.groups.values().all(|group| group.is_idle() && group.next >= self.next())
    }

    pub(super) fn has_from(&self, offset: u64) -> bool {
        self.from(offset).next().is_some()
    }

    /// How many there are at this offset and behind it; not counted beyond so many.
    pub(super) fn count_from(&self, offset: u64, enough: usize) -> usize {
        self.from(offset).take(enough).count()
    }

    /// What is retained at this offset and behind it.
    fn from(&self, offset: u64) -> impl Iterator<Item = (u64, &Stored)> + Clone {
        let first = offset.max(self.floor);
        let skipped = usize::try_from(first - self.floor).unwrap_or(usize::MAX).min(self.events.len());
        let numbered = (first..).zip(self.events.range(skipped..));
        numbered.filter_map(|(offset, event)| Some((offset, event.as_ref()?)))
    }

    pub(super) fn ends(&self) -> (Option<u64>, Option<u64>) {
        let last = self.events.iter().rposition(Option::is_some).map(|place| self.floor + place as u64);
        (self.from(0).next().map(|(offset, _)| offset), last)
    }

    pub(super) fn start(&self, scope: &str, begin: &Begin, or_earliest: bool) -> Result<u64, NoStart> {
        let found = match begin {
            Begin::Latest => Ok(self.next()),
            // A group has no part in terms: to it everything is new.
            Begin::Earliest | Begin::Term => Ok(self.floor),
            Begin::Index(index) => self.at(*index),
            Begin::After(cursor) => self.behind(scope, cursor),
        };
        found.or_else(|gap| if or_earliest { Ok(self.floor) } else { Err(gap) })
    }

    fn behind(&self, scope: &str, cursor: &str) -> Result<u64, NoStart> {
        let cursor: Cursor = cursor.parse().map_err(|_| NoStart::OtherBus)?;
        let own = |generation: &str| Scope::new(scope, generation).map_err(|_| NoStart::OtherBus);
        let position = own(&self.generation.to_string())?.admits(&cursor).map_err(|gap| match gap {
            pubsub_core::Gap::OtherGeneration => NoStart::OtherGeneration,
            _ => NoStart::OtherBus,
        })?;
        self.at(position.major.saturating_add(1))
    }

    /// This offset, if it can be started from.
    fn at(&self, from: u64) -> Result<u64, NoStart> {
        if from > self.next() {
            Err(NoStart::Ahead)
        } else if from < self.floor {
            Err(NoStart::Trimmed(self.floor - from))
        } else {
            Ok(from)
        }
    }

    /// What is new at a place and behind it; none if there is nothing. A reader of another generation starts anew.
    pub(super) fn read(&self, bus: SmolStr, from: Place, most: u32) -> Option<Stretch> {
        let offset = if from.generation == self.generation { from.offset } else { 0 };
        let lagged = self.floor.saturating_sub(offset);
        let (mut offsets, mut events, mut bytes, mut next) = (Offsets::default(), Run::default(), 0, offset.max(self.floor));
        let mut count = 0;
        for (offset, stored) in self.from(offset).take(most.max(1) as usize) {
            if count >= STRETCH_LEAST && bytes + stored.len() > STRETCH_BYTES {
                break;
            }
            count += 1;
            bytes += stored.len();
            next = offset + 1;
            offsets.push(offset);
            events.push(stored.clone());
        }
        let next = Place { generation: self.generation, offset: next };
        (bytes > 0 || from.generation != self.generation).then_some(Stretch { bus, offsets, events, lagged, next })
    }

    pub(super) fn take(&mut self, client: ClientId, take: &Take, now: u64) -> Option<HandedOver> {
        // Out of its topic meanwhile: it reads what the topic has.
        let mut group = std::mem::take(self.groups.get_mut(&take.seat.group)?);
        let fresh = |offset| self.from(offset).next().map(|(offset, stored)| (offset, stored.clone()));
        let handed = group.take(client, take, now, fresh);
        self.groups.insert(take.seat.group.clone(), group);
        handed
    }

    /// Forgets everything but the groups and their members. Returns the bytes that were kept.
    pub(super) fn clear(&mut self, generation: u64) -> u64 {
        let bytes = self.bytes;
        let mut groups = std::mem::take(&mut self.groups);
        groups.values_mut().for_each(Seated::clear);
        *self = Self { generation, groups, used: self.used, ..Self::default() };
        bytes
    }

    /// Forgets events of a run. Returns how many, and their bytes.
    pub(super) fn trim(&mut self, run: &str, up_to: Option<i64>) -> (u64, u64) {
        let mut filter = TrimFilter::run(run);
        filter.produced_up_to = up_to;
        let goes =
            |stored: &Stored| wire::decode(&stored.shared_json(), None).is_ok_and(|decoded| filter.matches(&decoded.event));
        let (mut count, mut bytes) = (0, 0);
        for place in 0..self.events.len() {
            if let Some(gone) = self.events[place].take_if(|stored| goes(stored)) {
                (count, bytes) = (count + 1, bytes + gone.len());
                self.forget(self.keys[place], self.floor + place as u64);
            }
        }
        self.groups.values_mut().for_each(|group| group.trim(goes));
        (self.trimmed, self.bytes) = (self.trimmed + count, self.bytes - bytes);
        (count, bytes)
    }

    pub(super) fn states(&self) -> Vec<GroupState> {
        let state = |(name, group): (&SmolStr, &Seated)| group.state(name, self.from(group.next).map(|(_, stored)| stored));
        self.groups.iter().map(state).collect()
    }
}
