//! The store within the process: bounded by entries, bytes and age, and idle without work.

mod builder;
mod log;
mod values;

use std::collections::HashMap;
use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use pubsub_core::{Deduplication, Error, ErrorKind, Event, Result, Topic, TrimFilter};
use smallvec::SmallVec;
use smol_str::SmolStr;
use tokio::time::Instant;

pub use self::builder::InMemoryBuilder;
use self::log::{Gone, Log};
use self::values::Values;
use crate::{Generation, LogPage, ServerCache, check_key, check_ttl};

/// What an event or a value is taken to need besides its data.
const OVERHEAD: usize = 256;

/// When something is done.
#[derive(Clone, Copy)]
struct Moment {
    /// Since the store was made.
    millis: u64,
    /// Tells what was used least recently, also within a millisecond.
    turn: u64,
}

/// Named stores of this process. Independent callers that know only a name must meet, so this table cannot be theirs.
static NAMED: LazyLock<Mutex<HashMap<SmolStr, Weak<InMemoryServerCache>>>> = LazyLock::new(Mutex::default);

/// A [`ServerCache`] within the process. Events are kept as they are, typed payloads and all: nothing is encoded.
///
/// Bounds are kept when something is put in or read: there is no task and no timer, and a store that is left alone holds what it
/// had. A log forgets from its oldest end, at `max_events`, and what is older than `max_age`. At `max_bytes` the logs and values that
/// were used least recently give way first, at `max_topics` and `max_values` likewise. Bytes are those of events' data,
/// [measured](pubsub_core::Payload::size) once for each, and of their metadata, plus 256 for each event and value.
pub struct InMemoryServerCache {
    bounds: InMemoryBuilder,
    /// Tells this store's generations from those of others.
    store: u32,
    began: Instant,
    generations: AtomicU32,
    turns: AtomicU64,
    /// What is kept, in bytes.
    bytes: AtomicUsize,
    /// Appending holds this shared, so that no log is forgotten under its hands.
    logs: RwLock<HashMap<Topic, Mutex<Log>, foldhash::fast::RandomState>>,
    /// At how many logs those that have run dry are next looked for.
    sweep_at: AtomicUsize,
    values: Mutex<Values>,
}

impl Default for InMemoryServerCache {
    fn default() -> Self {
        Self::new()
    }
}

impl InMemoryServerCache {
    /// A store with the default bounds.
    pub fn new() -> Self {
        Self::with(InMemoryBuilder::default())
    }

    /// Configures a store.
    pub fn builder() -> InMemoryBuilder {
        InMemoryBuilder::default()
    }

    fn with(bounds: InMemoryBuilder) -> Self {
        Self {
            bounds,
            store: fastrand::u32(..),
            began: Instant::now(),
            generations: AtomicU32::new(0),
            turns: AtomicU64::new(0),
            bytes: AtomicUsize::new(0),
            logs: RwLock::default(),
            sweep_at: AtomicUsize::new(64),
            values: Mutex::default(),
        }
    }

    /// The store of this name in the process, made with these bounds if there is none.
    fn named(name: &SmolStr, bounds: InMemoryBuilder) -> Result<Arc<Self>> {
        let mut named = NAMED.lock();
        if let Some(store) = named.get(name).and_then(Weak::upgrade) {
            if store.bounds == bounds {
                return Ok(store);
            }
            let why = format!("the store {name:?} exists with other bounds");
            return Err(Error::invalid_option("name", why).during("build"));
        }
        named.retain(|_, store| store.strong_count() > 0);
        let store = Arc::new(Self::with(bounds));
        named.insert(name.clone(), Arc::downgrade(&store));
        Ok(store)
    }

    /// What it is taken to hold, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn now(&self) -> Moment {
        let millis = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Moment { millis, turn: self.turns.fetch_add(1, Ordering::Relaxed) }
    }

    /// When what is kept must have been appended not to be forgotten for its age; none while the store is younger than that.
    fn horizon(&self, now: Moment) -> Option<u64> {
        now.millis.checked_sub(u64::try_from(self.bounds.max_age.as_millis()).unwrap_or(u64::MAX))
    }

    /// What each of these events is taken to need. Writing an event's data is its publisher's code, so no lock is held.
    fn measure(&self, events: &[Arc<Event>]) -> Result<SmallVec<[usize; 1]>> {
        let limit = self.bounds.max_bytes;
        let measure = |event: &Arc<Event>| {
            let data = event.payload().size().map_err(|error| error.on(event.id()))?;
            let metadata: usize = event.metadata().iter().map(|(key, value)| key.len() + value.len()).sum();
            match data + metadata + OVERHEAD {
                size if size > limit => Err(Error::new(ErrorKind::TooLarge { size, limit }).on(event.id())),
                size => Ok(size),
            }
        };
        events.iter().map(measure).collect()
    }

    fn keep(&self, topic: &Topic, events: &[Arc<Event>]) -> Result<Vec<Arc<Event>>> {
        let sizes = self.measure(events)?;
        let now = self.now();
        let mut gone = Gone::default();
        let append = |log: &mut Log, gone: &mut Gone| {
            log.expire(self.horizon(now), gone);
            let appended = log.append(events, &sizes, now, &self.bounds, gone);
            // A full log mostly takes as much as it lets go.
            match (appended.added, mem::take(&mut gone.bytes)) {
                (added, gone) if added > gone => self.bytes.fetch_add(added - gone, Ordering::Relaxed),
                (added, gone) if added < gone => self.bytes.fetch_sub(gone - added, Ordering::Relaxed),
                _ => 0,
            };
            appended
        };
        let appended = {
            let logs = self.logs.read();
            logs.get(topic).map(|log| append(&mut log.lock(), &mut gone))
        };
        let appended = appended.unwrap_or_else(|| {
            let mut logs = self.logs.write();
            if !logs.contains_key(topic) {
                self.make_room(&mut logs, now, &mut gone);
                logs.insert(topic.clone(), Mutex::new(Log::new(self.next_generation())));
            }
            append(&mut logs[topic].lock(), &mut gone)
        });
        self.account(gone);
        Ok(appended.events)
    }

    fn next_generation(&self) -> Generation {
        Generation::new(self.store, self.generations.fetch_add(1, Ordering::Relaxed))
    }

    /// Counts what is gone, and keeps the bound on bytes. To be called without any lock: what is gone is dropped here, and the
    /// destructors of payloads are user code. What was added was counted under its lock: others may have made it go by now, and the
    /// count must not fall below nothing.
    fn account(&self, gone: Gone) {
        if gone.bytes > 0 {
            self.bytes.fetch_sub(gone.bytes, Ordering::Relaxed);
        }
        drop(gone);
        if self.bytes() > self.bounds.max_bytes {
            self.evict();
        }
    }

    /// Makes room for one more log: those that have run dry go, and if that is not enough, those used least recently.
    fn make_room(&self, logs: &mut HashMap<Topic, Mutex<Log>, foldhash::fast::RandomState>, now: Moment, gone: &mut Gone) {
        let full = logs.len() >= self.bounds.max_topics;
        if full || logs.len() >= self.sweep_at.load(Ordering::Relaxed) {
            let horizon = self.horizon(now);
            logs.retain(|_, log| {
                let log = log.get_mut();
                log.expire(horizon, gone);
                !log.is_empty()
            });
            self.sweep_at.store((2 * logs.len()).max(64), Ordering::Relaxed);
        }
        if logs.len() >= self.bounds.max_topics {
            let mut used: Vec<u64> = logs.values_mut().map(|log| log.get_mut().used).collect();
            let least = logs.len() + 1 - self.bounds.max_topics + self.bounds.max_topics / 16;
            let (_, &mut until, _) = used.select_nth_unstable((least - 1).min(logs.len() - 1));
            let mut left = least;
            logs.retain(|_, log| {
                let goes = left > 0 && log.get_mut().used <= until;
                if goes {
                    left -= 1;
                    log.get_mut().forget_all(gone);
                }
                !goes
            });
        }
        shrink(logs);
    }

    /// Brings what is kept under the bound, and a little below, from what was used least recently on.
    fn evict(&self) {
        let goal = self.bounds.max_bytes - self.bounds.max_bytes / 16;
        let mut gone = Gone::default();
        {
            let mut logs = self.logs.write();
            let mut values = self.values.lock();
            let excess = self.bytes.load(Ordering::Relaxed).saturating_sub(goal);
            let mut order: Vec<(u64, Option<&mut Log>)> =
                logs.values_mut().map(Mutex::get_mut).map(|log| (log.used, Some(log))).collect();
            order.extend(values.ages().map(|used| (used, None)));
            order.sort_unstable_by_key(|(used, _)| *used);
            for (used, log) in order {
                if gone.bytes >= excess {
                    break;
                }
                match log {
                    Some(log) => log.forget_oldest(excess, &mut gone),
                    None => values.forget_used_at(used, &mut gone),
                }
            }
            // Under the locks, so that the next to look does not find too much as well.
            self.bytes.fetch_sub(gone.bytes, Ordering::Relaxed);
        }
        drop(gone);
    }

    /// Does something with the values, and accounts for it.
    fn with_values<R>(&self, operate: impl FnOnce(&mut Values, Moment, &InMemoryBuilder, &mut Gone) -> (R, usize)) -> R {
        let mut gone = Gone::default();
        let result = {
            let mut values = self.values.lock();
            let (result, added) = operate(&mut values, self.now(), &self.bounds, &mut gone);
            self.bytes.fetch_add(added, Ordering::Relaxed);
            result
        };
        self.account(gone);
        result
    }
}

#[async_trait]
impl ServerCache for InMemoryServerCache {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        check_key(key)?;
        self.with_values(|values, now, _, gone| (values.get(key, now, gone), 0))
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<()> {
        check_key(key)?;
        check_ttl(ttl)?;
        let (size, limit) = (value.len() + key.len() + OVERHEAD, self.bounds.max_bytes);
        if size > limit {
            return Err(Error::new(ErrorKind::TooLarge { size, limit }).on(key));
        }
        self.with_values(|values, now, bounds, gone| ((), values.set(key, value, ttl, now, bounds, gone)));
        Ok(())
    }

    async fn delete(&self, key: &str) -> Result<bool> {
        check_key(key)?;
        Ok(self.with_values(|values, now, _, gone| (values.delete(key, now, gone), 0)))
    }

    async fn increment(&self, key: &str, by: i64, ttl: Option<Duration>) -> Result<i64> {
        check_key(key)?;
        check_ttl(ttl)?;
        self.with_values(|values, now, bounds, gone| values.increment(key, by, ttl, now, bounds, gone))
    }

    async fn push(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
        check_key(key)?;
        check_ttl(ttl)?;
        let (size, limit) = (value.len() + key.len() + OVERHEAD, self.bounds.max_bytes);
        if size > limit {
            return Err(Error::new(ErrorKind::TooLarge { size, limit }).on(key));
        }
        self.with_values(|values, now, bounds, gone| values.push(key, value, ttl, now, bounds, gone))
    }

    async fn range(&self, key: &str, from: u64, limit: usize) -> Result<Vec<Bytes>> {
        check_key(key)?;
        self.with_values(|values, now, _, gone| (values.range(key, from, limit, now, gone), 0))
    }

    async fn append(&self, topic: &Topic, events: &[Arc<Event>]) -> Result<Vec<Arc<Event>>> {
        self.keep(topic, events)
    }

    fn append_now(&self, topic: &Topic, events: &[Arc<Event>]) -> Option<Result<Vec<Arc<Event>>>> {
        Some(self.keep(topic, events))
    }

    async fn read(&self, topic: &Topic, from: u64, limit: usize) -> Result<LogPage> {
        let now = self.now();
        let mut gone = Gone::default();
        let page = {
            let logs = self.logs.read();
            logs.get(topic).map(|log| {
                let mut log = log.lock();
                log.expire(self.horizon(now), &mut gone);
                log.page(from, limit, now)
            })
        };
        self.account(gone);
        Ok(page.unwrap_or_default())
    }

    async fn clear(&self, topic: &Topic) -> Result<()> {
        let mut gone = Gone::default();
        let log = {
            let mut logs = self.logs.write();
            let log = logs.remove(topic);
            shrink(&mut logs);
            log
        };
        if let Some(log) = log {
            log.into_inner().forget_all(&mut gone);
        }
        self.account(gone);
        Ok(())
    }

    async fn trim(&self, topic: &Topic, filter: &TrimFilter) -> Result<u64> {
        let mut gone = Gone::default();
        // Judged without the lock: writing an event's data as JSON is its publisher's code.
        let kept = self.logs.read().get(topic).map(|log| log.lock().page(0, usize::MAX, self.now()).events);
        let matching: Vec<_> = kept.into_iter().flatten().filter(|event| filter.matches(event)).collect();
        let trimmed = self.logs.read().get(topic).map_or(0, |log| log.lock().remove(&matching, &mut gone));
        self.account(gone);
        Ok(trimmed)
    }

    fn deduplication(&self) -> Deduplication {
        Deduplication::Window { events: Some(self.bounds.window as u64), age: Some(self.bounds.max_age) }
    }
}

/// A burst of topics gives its memory back.
fn shrink<V>(logs: &mut HashMap<Topic, V, foldhash::fast::RandomState>) {
    if logs.capacity() > 64 && logs.len() < logs.capacity() / 4 {
        logs.shrink_to_fit();
    }
}

impl fmt::Debug for InMemoryServerCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let topics = self.logs.read().len();
        f.debug_struct("InMemoryServerCache").field("topics", &topics).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
