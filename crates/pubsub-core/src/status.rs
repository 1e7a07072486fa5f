//! What a bus says about itself: its connection, its topics, its subscriptions.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use crate::{Error, Group};

/// The state of a bus's connection to what carries its events.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Status {
    /// Working.
    Connected,
    /// The connection is lost and is being made again by itself.
    Reconnecting {
        /// Since when.
        since: SystemTime,
    },
    /// It cannot heal by itself (credentials, a deleted resource); the error says why.
    Failed(Arc<Error>),
    /// [`close`](crate::PubSub::close) was called.
    Closed,
}

/// A view of a bus's [`Status`] that can be read and awaited. Cheap to clone; it does not keep the bus alive.
#[derive(Debug, Clone)]
pub struct StatusWatch(watch::Receiver<Status>);

impl StatusWatch {
    /// A view of a backend's status channel.
    pub fn new(receiver: watch::Receiver<Status>) -> Self {
        Self(receiver)
    }

    /// The status now.
    pub fn get(&self) -> Status {
        self.0.borrow().clone()
    }

    /// Waits for a status this view has not returned yet; none once the bus is gone.
    ///
    /// Cancel safe: a change missed by a dropped future is returned by the next call.
    pub async fn changed(&mut self) -> Option<Status> {
        self.0.changed().await.ok()?;
        Some(self.0.borrow_and_update().clone())
    }

    /// Waits until the status is one of these; false if the bus is gone before.
    pub async fn wait_for(&mut self, wanted: impl FnMut(&Status) -> bool) -> bool {
        self.0.wait_for(wanted).await.is_ok()
    }
}

/// A topic as its backend sees it. What a backend cannot know is none, which is not zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicStatus {
    /// Events retained.
    pub retained: Option<u64>,
    /// Fan-out subscriptions attached, of all instances if the backend knows them, else of this one.
    pub fan_out: Option<u64>,
    /// Its groups, by name.
    pub groups: Vec<GroupStatus>,
}

/// A group as its backend sees it. What a backend cannot know is none, which is not zero.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupStatus {
    /// The group.
    pub group: Group,
    /// Events not handed to any member yet, retries that wait included.
    pub waiting: Option<u64>,
    /// Deliveries in members' hands, not settled yet.
    pub held: Option<u64>,
    /// Age of the oldest event that is not settled, by the clock that stamped it.
    pub oldest: Option<Duration>,
    /// Members attached.
    pub members: Option<u64>,
}

impl GroupStatus {
    /// A group of which nothing is known yet.
    pub fn new(group: Group) -> Self {
        Self { group, waiting: None, held: None, oldest: None, members: None }
    }
}

/// What one subscription has seen and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriptionStatus {
    /// Deliveries waiting to be handed over. For a member of a group, those of its group within this instance.
    pub queued: u64,
    /// Deliveries handed over and not settled.
    pub held: u64,
    /// Deliveries waiting for their back-off to end.
    pub delayed: u64,
    /// Events lost at a full queue, in all.
    pub lagged: u64,
    /// Deliveries whose attempts were exhausted and that went to the dead-letter topic.
    pub dead_lettered: u64,
    /// Deliveries that were given up: exhausted without a dead-letter topic, or malformed.
    pub dropped: u64,
    /// Whether the subscription has ended.
    pub ended: bool,
}

/// What a [`close`](crate::PubSub::close) left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Closed {
    /// Deliveries queued here that were not handed over: given back to their groups, or lost with the last subscription.
    pub released: u64,
    /// Deliveries in consumers' hands that were not settled in time. They count as retries.
    pub cut_off: u64,
}

impl Closed {
    /// Whether everything was handed over and settled in time.
    pub fn is_clean(&self) -> bool {
        self.released == 0 && self.cut_off == 0
    }
}
