//! The trait every backend implements.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::{
    Capabilities, Closed, Cursor, Event, LeaseProvider, Page, PublishError, PublishOptions, Result, Start, StatusWatch,
    SubscribeOptions, Subscription, Topic, TopicStatus, TrimFilter,
};

/// An event bus backend.
///
/// Applications hold a [`Bus`](crate::Bus), which adds conveniences; backends and decorators implement this. The
/// [guide](crate::guide) numbers what each method promises. No method has a default but [`publish_now`](Self::publish_now): a
/// decorator that forgets one does not compile, rather than quietly losing what it wraps.
///
/// Every future may be dropped at any await point (clause C4): nothing accepted is lost and nothing acquired is stranded.
#[async_trait]
pub trait PubSub: Send + Sync + Debug + 'static {
    /// What this backend, as configured, can do. Constant for the life of the instance.
    fn capabilities(&self) -> Capabilities;

    /// Publishes stamped events to a topic, in order (clauses P1 to P7). An empty slice is `Ok` while the bus is open.
    ///
    /// Dropping the future leaves each event either taken or not, never half.
    ///
    /// # Errors
    /// [`PublishError`] tells the fate of each event. `TooLarge`, `NotSerializable` and `InvalidOption` refuse the call
    /// before anything is sent.
    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError>;

    /// Publishes as [`publish`](Self::publish) does if that needs no waiting at all; none, with nothing done, if it might.
    ///
    /// [`Bus`](crate::Bus) asks this first. It is for backends within the process, which it spares a future on the heap; a
    /// decorator that does not forward it loses that and nothing else.
    fn publish_now(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Option<Result<Positions, PublishError>> {
        let _ = (topic, events, options);
        None
    }

    /// Subscribes (clauses B1 to B7): whatever is published after this has returned is seen.
    ///
    /// Dropping the future leaves nothing attached.
    ///
    /// # Errors
    /// `InvalidOption`, `Unsupported`, `Gap`, `Closed`, and what the backend's server refuses.
    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription>;

    /// Reads up to `limit` retained events, at least one, oldest first (clause R6). `Start::Latest` reads nothing but tells floor
    /// and head.
    /// Dropping the future loses the answer and nothing else.
    ///
    /// # Errors
    /// `Unsupported` where nothing is retained; `Gap` if `from` cannot be resumed from; `InvalidOption` for a limit of zero, which
    /// could not tell where the next page starts.
    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page>;

    /// Forgets what the topic retains (clause R4). Subscriptions live on. A no-op where nothing is retained. Once the future is
    /// dropped it may be done or not; it may be called again.
    ///
    /// # Errors
    /// `Closed`, and what the backend's server refuses.
    async fn clear_topic(&self, topic: &Topic) -> Result<()>;

    /// Removes retained events of one run (clause R4) and returns how many; 0 where nothing is retained. Once the future is dropped
    /// it may be done or not, or in part; it may be called again.
    ///
    /// # Errors
    /// `Closed`, and what the backend's server refuses.
    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64>;

    /// What is known about a topic. An unknown topic has a status, an empty one. Dropping the future loses the answer and nothing
    /// else.
    ///
    /// # Errors
    /// `Closed`, and what the backend's server refuses.
    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus>;

    /// The state of the connection, to be watched (clause N1).
    fn status(&self) -> StatusWatch;

    /// Returns when earlier publishes are confirmed and recorded settlements sent (clause C1). `Ok` when closed or idle. Dropping
    /// the future leaves everything on its way.
    ///
    /// # Errors
    /// What the backend's server refuses.
    async fn flush(&self) -> Result<()>;

    /// Ends this instance within a bounded time (clause C2): refuses new work, drains what was accepted, ends every stream,
    /// releases the rest. Idempotent; concurrent calls share one close. Dropping the future does not reopen anything: the
    /// instance stays closed, and what was not waited for ends by itself.
    ///
    /// # Errors
    /// What the backend's server refuses; the instance is closed all the same.
    async fn close(&self, within: Duration) -> Result<Closed>;

    /// The leases of this bus, if it has any (clauses L1 to L4).
    fn leases(&self) -> Option<Arc<dyn LeaseProvider>>;
}

/// Where published events stand in their topic, in the order they were given; empty where the backend retains nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Positions(Cursors);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Cursors {
    #[default]
    None,
    One(Cursor),
    Many(Box<[Cursor]>),
}

impl Positions {
    /// No positions.
    pub const fn none() -> Self {
        Self(Cursors::None)
    }

    /// The cursor of the event given at this place.
    pub fn get(&self, event: usize) -> Option<&Cursor> {
        self.as_slice().get(event)
    }

    /// All of them.
    pub fn as_slice(&self) -> &[Cursor] {
        match &self.0 {
            Cursors::None => &[],
            Cursors::One(cursor) => std::slice::from_ref(cursor),
            Cursors::Many(cursors) => cursors,
        }
    }
}

impl FromIterator<Cursor> for Positions {
    fn from_iter<I: IntoIterator<Item = Cursor>>(cursors: I) -> Self {
        let mut cursors = cursors.into_iter();
        Self(match (cursors.next(), cursors.next()) {
            (None, _) => Cursors::None,
            (Some(one), None) => Cursors::One(one),
            (Some(first), Some(second)) => Cursors::Many([first, second].into_iter().chain(cursors).collect()),
        })
    }
}

impl From<Vec<Cursor>> for Positions {
    fn from(cursors: Vec<Cursor>) -> Self {
        cursors.into_iter().collect()
    }
}
