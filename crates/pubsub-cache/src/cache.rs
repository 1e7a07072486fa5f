//! The store's contract: values, counters and lists, and logs of numbered events.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pubsub_core::{Deduplication, Error, ErrorKind, Event, Result, Topic, TrimFilter};

/// The longest key of a value, counter or list, in bytes.
pub const MAX_KEY: usize = 1024;

/// What a server-side cache keeps for the processes that share it: small values, counters and lists under keys, and one log of
/// events per topic.
///
/// It is a cache: everything in it is bounded, and what has to go for a bound is forgotten. A log never loses an event silently:
/// it forgets from its oldest end, and [`LogPage::floor`] says up to where.
///
/// Keys are 1 to [`MAX_KEY`] bytes of text; one key holds a value, a counter or a list. Topics have a space of their own. No
/// method has a default but [`append_now`](Self::append_now), so that a wrapper that forgets one does not compile. Every future may
/// be dropped at any await point; whether the store did what was asked is then unknown, and [`append`](Self::append) is idempotent
/// for that reason. The package `pubsub-conformance` holds a store to all of this.
#[async_trait]
pub trait ServerCache: Send + Sync + Debug + 'static {
    // Values.

    /// The value or counter under a key, if there is one.
    ///
    /// # Errors
    /// `InvalidName` for the key, `InvalidOption` if it holds a list, and what the store refuses.
    async fn get(&self, key: &str) -> Result<Option<Bytes>>;

    /// Puts a value under a key, in place of whatever was there, for `ttl` from now, or until it is forgotten for a bound.
    ///
    /// # Errors
    /// `InvalidName` for the key, `InvalidOption` for a time to live of zero, and what the store refuses.
    async fn set(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<()>;

    /// Forgets what is under a key; false if there was nothing.
    ///
    /// # Errors
    /// `InvalidName` for the key, and what the store refuses.
    async fn delete(&self, key: &str) -> Result<bool>;

    // Counters.

    /// Adds to the counter under a key, which begins at 0, and returns the sum, in one atomic step. With a `ttl` it lasts that long
    /// from now; without, for as long as it would have. A counter is a value that reads as a decimal number.
    ///
    /// # Errors
    /// `InvalidName` for the key, `InvalidOption` if it holds no number or the sum is beyond an `i64`, and what the store refuses.
    async fn increment(&self, key: &str, by: i64, ttl: Option<Duration>) -> Result<i64>;

    // Lists.

    /// Appends to the list under a key and returns its new length, in one atomic step. With a `ttl` the list lasts that long from
    /// now; without, for as long as it would have.
    ///
    /// # Errors
    /// `InvalidName` for the key, `InvalidOption` if it holds a value, and what the store refuses.
    async fn push(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64>;

    /// Up to `limit` values of the list under a key, from the 0-based place `from` on; none if there are none.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    async fn range(&self, key: &str, from: u64, limit: usize) -> Result<Vec<Bytes>>;

    // Logs.

    /// Numbers these events and keeps them in the topic's log, in order, in one atomic step: all of them or none. Returns them as
    /// kept, each with its [`index`](Event::index): dense within the log's generation, and 0 for the first of it.
    ///
    /// An event whose id the log still has, within [`deduplication`](Self::deduplication), is not kept again: its kept copy is
    /// returned in its place, also when it is given twice in one call. An index that a given event has is no matter. No events at all
    /// is `Ok`.
    ///
    /// # Errors
    /// `NotSerializable` if an event cannot be kept, `TooLarge` if it never could, and what the store refuses. After `Timeout` and
    /// `Unavailable` the events may have been kept.
    async fn append(&self, topic: &Topic, events: &[Arc<Event>]) -> Result<Vec<Arc<Event>>>;

    /// Appends as [`append`](Self::append) does if that needs no waiting at all; none, with nothing done, if it might. For stores
    /// within the process, which it spares a future on the heap.
    fn append_now(&self, topic: &Topic, events: &[Arc<Event>]) -> Option<Result<Vec<Arc<Event>>>> {
        let _ = (topic, events);
        None
    }

    /// Reads up to `limit` events of a topic's log from an index on, oldest first: from the oldest there is if that is later, and none
    /// from its end on. A limit of 0 reads where the log begins and ends.
    ///
    /// # Errors
    /// `Decode` if what is kept cannot be read, and what the store refuses.
    async fn read(&self, topic: &Topic, from: u64, limit: usize) -> Result<LogPage>;

    /// Forgets a topic's log and ends its generation: what is appended from now on is numbered from 0 in a later one. `Ok` where there
    /// is no log.
    ///
    /// # Errors
    /// What the store refuses.
    async fn clear(&self, topic: &Topic) -> Result<()>;

    /// Forgets those events of a topic's log that match, and returns how many. The others keep their indices, and the log its
    /// [floor](LogPage::floor).
    ///
    /// # Errors
    /// What the store refuses.
    async fn trim(&self, topic: &Topic, filter: &TrimFilter) -> Result<u64>;

    /// Within which window [`append`](Self::append) recognises an event that it has: never
    /// [`Deduplication::None`]. Constant for the life of the instance.
    fn deduplication(&self) -> Deduplication;
}

/// A piece of a topic's log, and where the log begins and ends.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct LogPage {
    /// The log's generation; none if the topic has no log.
    pub generation: Option<Generation>,
    /// What lies below this index was forgotten for a bound.
    pub floor: u64,
    /// The index that the next event to be appended will have.
    pub next: u64,
    /// How many events the whole log has.
    pub kept: u64,
    /// The events, oldest first, each with its index. Where indices between them are missing, a [trim](ServerCache::trim) took
    /// those events.
    pub events: Vec<Arc<Event>>,
}

impl LogPage {
    /// A page of a log that has a generation.
    pub fn new(generation: Generation, floor: u64, next: u64, kept: u64, events: Vec<Arc<Event>>) -> Self {
        Self { generation: Some(generation), floor, next, kept, events }
    }
}

/// Which life of which store's log an index counts in: 21 bits that tell stores apart, and the number of the life, which only grows
/// within its store. It has 53 bits, so that it passes unharmed through JSON in JavaScript.
///
/// A store draws the first part once and keeps it for as long as it keeps its logs, so that indices of another store are told from
/// those of an earlier generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Generation(u64);

impl Generation {
    /// How many bits tell stores apart.
    pub const STORE_BITS: u32 = 21;

    /// A generation of a store; of `store` only the lowest [`STORE_BITS`](Self::STORE_BITS) count.
    pub const fn new(store: u32, number: u32) -> Self {
        let store = store & ((1 << Self::STORE_BITS) - 1);
        Self((store as u64) << 32 | number as u64)
    }

    /// As it stands in an event's [`ReplayIndex`](pubsub_core::ReplayIndex).
    pub const fn get(self) -> u64 {
        self.0
    }

    /// A generation read from an event's [`ReplayIndex`](pubsub_core::ReplayIndex).
    pub const fn from_index(generation: u64) -> Self {
        Self(generation)
    }

    /// What tells its store from others.
    pub const fn store(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Which life it is.
    pub const fn number(self) -> u32 {
        self.0 as u32
    }
}

/// Checks a key, so that every store refuses alike.
///
/// # Errors
/// `InvalidName`.
pub fn check_key(key: &str) -> Result<()> {
    if key.is_empty() || key.len() > MAX_KEY {
        let why = format!("a key has 1 to {MAX_KEY} bytes, not {}", key.len());
        return Err(Error::new(ErrorKind::InvalidName(why.into())));
    }
    Ok(())
}

/// Checks a time to live, so that every store refuses alike.
///
/// # Errors
/// `InvalidOption` for one of zero or over ten years.
pub fn check_ttl(ttl: Option<Duration>) -> Result<()> {
    const MOST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
    match ttl {
        Some(Duration::ZERO) => Err(Error::invalid_option("ttl", "must be longer than zero")),
        Some(ttl) if ttl > MOST => Err(Error::invalid_option("ttl", "is longer than ten years")),
        _ => Ok(()),
    }
}
