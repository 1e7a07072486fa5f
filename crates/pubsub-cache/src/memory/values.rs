//! Values, counters and lists under keys.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use pubsub_core::{Error, Result};

use super::log::Gone;
use super::{InMemoryBuilder, Moment, OVERHEAD};

#[derive(Default)]
pub(super) struct Values {
    slots: HashMap<String, Slot>,
}

struct Slot {
    what: What,
    size: usize,
    /// When it is forgotten.
    until: Option<u64>,
    /// When it was last written or read.
    used: u64,
}

enum What {
    Value(Bytes),
    List(Vec<Bytes>),
}

/// What came of an operation, and how many bytes it added.
type Added<T> = (Result<T>, usize);

impl Slot {
    fn forget(self, gone: &mut Gone) {
        gone.bytes += self.size;
        match self.what {
            What::Value(value) => gone.values.push(value),
            What::List(values) => gone.values.extend(values),
        }
    }
}

fn deadline(ttl: Option<Duration>, now: Moment) -> Option<u64> {
    ttl.map(|ttl| now.millis.saturating_add(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1)))
}

fn wrong_kind(holds: &'static str) -> Error {
    Error::invalid_option("key", holds)
}

impl Values {
    /// What is under a key and has not run out.
    fn slot(&mut self, key: &str, now: Moment, gone: &mut Gone) -> Option<&mut Slot> {
        if self.slots.get(key)?.until.is_some_and(|until| until <= now.millis) {
            self.slots.remove(key)?.forget(gone);
            return None;
        }
        let slot = self.slots.get_mut(key)?;
        slot.used = now.turn;
        Some(slot)
    }

    pub(super) fn get(&mut self, key: &str, now: Moment, gone: &mut Gone) -> Result<Option<Bytes>> {
        match self.slot(key, now, gone).map(|slot| &slot.what) {
            None => Ok(None),
            Some(What::Value(value)) => Ok(Some(value.clone())),
            Some(What::List(_)) => Err(wrong_kind("holds a list")),
        }
    }

    pub(super) fn set(
        &mut self,
        key: &str,
        value: Bytes,
        ttl: Option<Duration>,
        now: Moment,
        bounds: &InMemoryBuilder,
        gone: &mut Gone,
    ) -> usize {
        let size = value.len() + key.len() + OVERHEAD;
        self.put(key, Slot { what: What::Value(value), size, until: deadline(ttl, now), used: now.turn }, now, bounds, gone);
        size
    }

    fn put(&mut self, key: &str, slot: Slot, now: Moment, bounds: &InMemoryBuilder, gone: &mut Gone) {
        if !self.slots.contains_key(key) {
            self.make_room(now, bounds, gone);
        }
        if let Some(old) = self.slots.insert(key.to_owned(), slot) {
            old.forget(gone);
        }
    }

    pub(super) fn delete(&mut self, key: &str, now: Moment, gone: &mut Gone) -> bool {
        let was = self.slot(key, now, gone).is_some();
        if let Some(slot) = self.slots.remove(key) {
            slot.forget(gone);
        }
        was
    }

    pub(super) fn increment(
        &mut self,
        key: &str,
        by: i64,
        ttl: Option<Duration>,
        now: Moment,
        bounds: &InMemoryBuilder,
        gone: &mut Gone,
    ) -> Added<i64> {
        let refused = |why| (Err(wrong_kind(why)), 0);
        let slot = self.slot(key, now, gone);
        let until = deadline(ttl, now).or(slot.as_ref().and_then(|slot| slot.until));
        let count = match slot.map(|slot| &slot.what) {
            None => 0,
            Some(What::List(_)) => return refused("holds a list"),
            Some(What::Value(value)) => match std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()) {
                Some(count) => count,
                None => return refused("holds no number"),
            },
        };
        let Some(sum) = i64::checked_add(count, by) else { return refused("holds a number that would be beyond 64 bits") };
        let value = Bytes::from(sum.to_string());
        let size = value.len() + key.len() + OVERHEAD;
        self.put(key, Slot { what: What::Value(value), size, until, used: now.turn }, now, bounds, gone);
        (Ok(sum), size)
    }

    pub(super) fn push(
        &mut self,
        key: &str,
        value: Bytes,
        ttl: Option<Duration>,
        now: Moment,
        bounds: &InMemoryBuilder,
        gone: &mut Gone,
    ) -> Added<u64> {
        let size = value.len() + OVERHEAD;
        let until = deadline(ttl, now);
        match self.slot(key, now, gone) {
            Some(Slot { what: What::Value(_), .. }) => (Err(wrong_kind("holds a value")), 0),
            Some(Slot { what: What::List(values), size: whole, until: ends, .. }) => {
                values.push(value);
                *whole += size;
                *ends = until.or(*ends);
                (Ok(values.len() as u64), size)
            }
            None => {
                let size = size + key.len();
                self.put(key, Slot { what: What::List(vec![value]), size, until, used: now.turn }, now, bounds, gone);
                (Ok(1), size)
            }
        }
    }

    pub(super) fn range(&mut self, key: &str, from: u64, limit: usize, now: Moment, gone: &mut Gone) -> Result<Vec<Bytes>> {
        match self.slot(key, now, gone).map(|slot| &slot.what) {
            None => Ok(Vec::new()),
            Some(What::Value(_)) => Err(wrong_kind("holds a value")),
            Some(What::List(values)) => {
                let from = usize::try_from(from).unwrap_or(usize::MAX);
                Ok(values.iter().skip(from).take(limit).cloned().collect())
            }
        }
    }

    /// Makes room for one more key: those that have run out go, and if that is not enough, those used least recently.
    fn make_room(&mut self, now: Moment, bounds: &InMemoryBuilder, gone: &mut Gone) {
        if self.slots.len() < bounds.max_values {
            return;
        }
        self.forget_where(|slot| slot.until.is_some_and(|until| until <= now.millis), gone);
        if self.slots.len() >= bounds.max_values {
            let mut used: Vec<u64> = self.ages().collect();
            let sixteenth = used.len() / 16;
            let (_, &mut until, _) = used.select_nth_unstable(sixteenth);
            self.forget_where(|slot| slot.used <= until, gone);
        }
    }

    fn forget_where(&mut self, goes: impl Fn(&Slot) -> bool, gone: &mut Gone) {
        self.slots.extract_if(|_, slot| goes(slot)).for_each(|(_, slot)| slot.forget(gone));
        if self.slots.capacity() > 64 && self.slots.len() < self.slots.capacity() / 4 {
            self.slots.shrink_to_fit();
        }
    }

    /// When each was last used.
    pub(super) fn ages(&self) -> impl Iterator<Item = u64> {
        self.slots.values().map(|slot| slot.used)
    }

    /// Forgets what was last used at this time.
    pub(super) fn forget_used_at(&mut self, used: u64, gone: &mut Gone) {
        self.forget_where(|slot| slot.used == used, gone);
    }
}
