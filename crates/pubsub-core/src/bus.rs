//! What applications hold: a cheap handle on a backend, with the conveniences.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::Either;
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;

use crate::dead_letter::{REDRIVE_GROUP, redriven};
use crate::machinery::yield_now_and_then;
use crate::subscription::Nudge;
use crate::{
    Capabilities, Capability, Closed, Cursor, Error, Event, Failure, Group, LeaseProvider, Message, Overflow, Page, Positions,
    PubSub, PublishError, PublishOptions, Result, RetryPolicy, RunReport, Start, StatusWatch, SubscribeOptions, Subscription,
    SubscriptionHandle, Topic, TopicStatus, TrimFilter, with_leases,
};

/// An event bus, whatever carries it. Cheap to clone; all clones are one instance of the backend.
///
/// Topics may be given as text, which is checked at each call, or as a [`Topic`], which has been.
#[derive(Debug, Clone)]
pub struct Bus {
    pubsub: Arc<dyn PubSub>,
    nudges: Arc<Mutex<Nudges>>,
}

/// The nudges of an instance's subscriptions. Those of subscriptions that are gone are thrown out before they are the most.
#[derive(Debug, Default)]
struct Nudges {
    all: Vec<Weak<Nudge>>,
    /// How many there were when they were last looked through.
    kept: usize,
}

impl Nudges {
    fn push(&mut self, nudge: Weak<Nudge>) {
        if self.all.len() >= 2 * self.kept.max(16) {
            self.all.retain(|nudge| nudge.strong_count() > 0);
            self.all.shrink_to(2 * self.all.len());
            self.kept = self.all.len();
        }
        self.all.push(nudge);
    }
}

impl<P: PubSub> From<P> for Bus {
    fn from(pubsub: P) -> Self {
        Self::new(Arc::new(pubsub))
    }
}

fn topic<T: TryInto<Topic, Error: Into<Error>>>(topic: T) -> Result<Topic> {
    topic.try_into().map_err(Into::into)
}

/// Fan-out from an earlier start. Its source retains, so no publisher has to wait for it.
fn replaying(start: Start) -> SubscribeOptions {
    SubscribeOptions::fan_out().start(start).overflow(Overflow::DropOldest)
}

#[cold]
fn without_index(event: &Arc<Event>) -> Arc<Event> {
    Arc::new(Event::clone(event).with_index(None))
}

impl Bus {
    /// A bus over a backend.
    pub fn new(pubsub: Arc<dyn PubSub>) -> Self {
        Self { pubsub, nudges: Arc::default() }
    }

    /// The backend.
    pub fn backend(&self) -> &Arc<dyn PubSub> {
        &self.pubsub
    }

    /// What the backend can do.
    pub fn capabilities(&self) -> Capabilities {
        self.pubsub.capabilities()
    }

    /// Checks at start-up that everything the application builds on is there.
    ///
    /// # Errors
    /// `Unsupported` with the first that is missing.
    pub fn require(&self, needed: impl IntoIterator<Item = Capability>) -> Result<()> {
        self.capabilities().require(needed)
    }

    /// Publishes one event, as far as the bus reaches. See [`PubSub::publish`].
    ///
    /// # Errors
    /// As [`PubSub::publish`]; the event was stamped before the call, so publishing a clone of it again is the safe repeat.
    pub async fn publish<T>(&self, to: T, event: impl Into<Arc<Event>>) -> Result<Positions, PublishError>
    where
        T: TryInto<Topic, Error: Into<Error>>,
    {
        let mut event = event.into();
        let to = topic(to).map_err(|error| PublishError::none_sent(error, 1))?;
        if event.index().is_some() {
            event = without_index(&event);
        }
        let events = std::slice::from_ref(&event);
        // As `send`, without a future within this one: it is what most publishers call.
        yield_now_and_then().await;
        match self.pubsub.publish_now(&to, events, &PublishOptions::new()) {
            Some(published) => published,
            None => self.pubsub.publish(&to, events, PublishOptions::new()).await,
        }
    }

    /// Publishes stamped events in order, in one call. An index set by the application is stripped: only a replay decorator
    /// gives events a place.
    ///
    /// # Errors
    /// As [`PubSub::publish`].
    pub async fn publish_with<T>(
        &self,
        to: T,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError>
    where
        T: TryInto<Topic, Error: Into<Error>>,
    {
        let to = topic(to).map_err(|error| PublishError::none_sent(error, events.len()))?;
        if events.iter().all(|event| event.index().is_none()) {
            return self.send(&to, events, options).await;
        }
        let stripped: Vec<_> = events.iter().map(without_index).collect();
        self.send(&to, &stripped, options).await
    }

    async fn send(&self, to: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        yield_now_and_then().await;
        match self.pubsub.publish_now(to, events, &options) {
            Some(published) => published,
            None => self.pubsub.publish(to, events, options).await,
        }
    }

    /// Publishes a value as the data of a new event.
    ///
    /// # Errors
    /// As [`PubSub::publish`].
    pub async fn publish_data<T, D>(&self, to: T, event_type: impl AsRef<str>, data: D) -> Result<Positions, PublishError>
    where
        T: TryInto<Topic, Error: Into<Error>>,
        D: Serialize + DeserializeOwned + Send + Sync + 'static,
    {
        self.publish(to, Event::new(event_type).with_data(data)).await
    }

    /// Subscribes to every event of a topic from now on.
    ///
    /// # Errors
    /// As [`PubSub::subscribe`].
    pub async fn subscribe<T: TryInto<Topic, Error: Into<Error>>>(&self, to: T) -> Result<Subscription> {
        self.subscribe_with(to, SubscribeOptions::fan_out()).await
    }

    /// Joins a consumer group: each event goes to one of its members.
    ///
    /// # Errors
    /// As [`PubSub::subscribe`].
    pub async fn subscribe_group<T, G>(&self, to: T, group: G) -> Result<Subscription>
    where
        T: TryInto<Topic, Error: Into<Error>>,
        G: TryInto<Group, Error: Into<Error>>,
    {
        let group = group.try_into().map_err(Into::into)?;
        self.subscribe_with(to, SubscribeOptions::group(group)).await
    }

    /// Subscribes to everything that is retained, then to what comes: no gap, no repeat.
    ///
    /// It makes no publisher wait ([`Overflow::DropOldest`]): what a slow consumer misses live, it reads from what is retained.
    ///
    /// # Errors
    /// `Unsupported` where nothing is retained; else as [`PubSub::subscribe`].
    pub async fn subscribe_with_replay<T: TryInto<Topic, Error: Into<Error>>>(&self, to: T) -> Result<Subscription> {
        self.subscribe_with(to, replaying(Start::Earliest)).await
    }

    /// Subscribes from the event with this dense index on.
    ///
    /// It makes no publisher wait ([`Overflow::DropOldest`]): what a slow consumer misses live, it reads from what is retained.
    ///
    /// # Errors
    /// `Unsupported` where events have no index, `Gap` if it is gone; else as [`PubSub::subscribe`].
    pub async fn subscribe_from_offset<T: TryInto<Topic, Error: Into<Error>>>(
        &self,
        to: T,
        index: u64,
    ) -> Result<Subscription> {
        self.subscribe_with(to, replaying(Start::Index(index))).await
    }

    /// Subscribes right behind a cursor.
    ///
    /// It makes no publisher wait ([`Overflow::DropOldest`]): what a slow consumer misses live, it reads from what is retained.
    ///
    /// # Errors
    /// `Gap` if the position is gone; else as [`PubSub::subscribe`].
    pub async fn subscribe_after<T: TryInto<Topic, Error: Into<Error>>>(&self, to: T, cursor: Cursor) -> Result<Subscription> {
        self.subscribe_with(to, replaying(Start::After(cursor))).await
    }

    /// Subscribes with options.
    ///
    /// # Errors
    /// As [`PubSub::subscribe`].
    pub async fn subscribe_with<T>(&self, to: T, options: SubscribeOptions) -> Result<Subscription>
    where
        T: TryInto<Topic, Error: Into<Error>>,
    {
        let subscription = self.pubsub.subscribe(&topic(to)?, options).await?;
        self.nudges.lock().push(Arc::downgrade(&subscription.nudge()));
        Ok(subscription)
    }

    /// Runs a handler over a topic in a task of its own, up to `concurrency` at a time; see [`Subscription::run`].
    ///
    /// # Errors
    /// As [`PubSub::subscribe`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn on<T, F, Fut>(&self, to: T, options: SubscribeOptions, concurrency: usize, handler: F) -> Result<Handler>
    where
        T: TryInto<Topic, Error: Into<Error>>,
        F: Fn(Message) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let mut subscription = self.subscribe_with(to, options).await?;
        let handle = subscription.handle();
        let task = tokio::spawn(async move { subscription.run(concurrency, handler).await });
        Ok(Handler { handle, task })
    }

    /// Reads retained events; see [`PubSub::history`].
    ///
    /// # Errors
    /// As [`PubSub::history`].
    pub async fn history<T: TryInto<Topic, Error: Into<Error>>>(&self, of: T, from: Start, limit: usize) -> Result<Page> {
        self.pubsub.history(&topic(of)?, from, limit).await
    }

    /// Redrives dead letters to a handler, one at a time: each letter of the topic that was not redriven yet, until it is handled,
    /// once. Returns when none is left.
    ///
    /// A letter whose handler fails is tried again, with the default back-off and as often as it takes; a handler that wants to be
    /// rid of one returns [`Failure::dead_letter`]. The letters are read as the group [`REDRIVE_GROUP`]; those not handled when the
    /// future is dropped come next time. [`Origin::of`](crate::Origin::of) tells where each comes from.
    ///
    /// # Errors
    /// `Unsupported` where dead letters are not kept; else as [`PubSub::subscribe`].
    pub async fn redrive<T, F, Fut>(&self, dead_letters: T, handler: F) -> Result<RunReport>
    where
        T: TryInto<Topic, Error: Into<Error>>,
        F: Fn(Message) -> Fut,
        Fut: Future<Output = Result<(), Failure>>,
    {
        self.require([Capability::DeadLetterHistory]).map_err(|error| error.during("redrive"))?;
        let patient = RetryPolicy::new().max_attempts(0);
        let options = SubscribeOptions::group(Group::new(REDRIVE_GROUP)?).start(Start::Earliest).retry(patient);
        let mut subscription = self.subscribe_with(dead_letters, options).await?;
        let handle = subscription.handle();
        let end_when_drained = async {
            handle.drained().await;
            handle.stop();
        };
        // It may end before it is drained: the bus was closed, and letters are kept all the same.
        let run = std::pin::pin!(subscription.run(1, handler));
        match futures::future::select(run, std::pin::pin!(end_when_drained)).await {
            Either::Left((report, _)) => report,
            Either::Right(((), run)) => run.await,
        }
    }

    /// Redrives dead letters to a topic, as new events with the data, type, run and metadata of those that were given up. The
    /// metadata `redriven.event` names the id of the event that was given up.
    ///
    /// # Errors
    /// As [`redrive`](Self::redrive), and `InvalidOption` if `target` is the dead-letter topic itself. A letter that cannot be
    /// published stays and is tried again.
    pub async fn redrive_to<T, U>(&self, dead_letters: T, target: U) -> Result<RunReport>
    where
        T: TryInto<Topic, Error: Into<Error>>,
        U: TryInto<Topic, Error: Into<Error>>,
    {
        let (dead_letters, target) = (topic(dead_letters)?, &topic(target)?);
        if dead_letters == *target {
            let why = "names the dead-letter topic itself: letters would come round again";
            return Err(Error::invalid_option("target", why).during("redrive").on(target));
        }
        self.redrive(dead_letters, async |letter| {
            self.publish(target, redriven(letter.event())).await?;
            Ok(())
        })
        .await
    }

    /// Forgets what a topic retains; see [`PubSub::clear_topic`].
    ///
    /// # Errors
    /// As [`PubSub::clear_topic`].
    pub async fn clear_topic<T: TryInto<Topic, Error: Into<Error>>>(&self, of: T) -> Result<()> {
        self.pubsub.clear_topic(&topic(of)?).await
    }

    /// Removes retained events of one run; see [`PubSub::trim_topic`].
    ///
    /// # Errors
    /// As [`PubSub::trim_topic`].
    pub async fn trim_topic<T: TryInto<Topic, Error: Into<Error>>>(&self, of: T, filter: TrimFilter) -> Result<u64> {
        self.pubsub.trim_topic(&topic(of)?, filter).await
    }

    /// What is known about a topic; see [`PubSub::inspect`].
    ///
    /// # Errors
    /// As [`PubSub::inspect`].
    pub async fn inspect<T: TryInto<Topic, Error: Into<Error>>>(&self, of: T) -> Result<TopicStatus> {
        self.pubsub.inspect(&topic(of)?).await
    }

    /// The state of the connection, to be watched.
    pub fn status(&self) -> StatusWatch {
        self.pubsub.status()
    }

    /// Returns when earlier publishes are confirmed and recorded settlements sent; makes partial batches due at once. It waits
    /// for nothing in consumers' hands, so a handler may call it.
    ///
    /// # Errors
    /// As [`PubSub::flush`].
    pub async fn flush(&self) -> Result<()> {
        let nudges: Vec<_> = self.nudges.lock().all.iter().filter_map(Weak::upgrade).collect();
        nudges.iter().for_each(|nudge| nudge.hurry());
        self.pubsub.flush().await
    }

    /// Ends this instance within a bounded time; see [`PubSub::close`].
    ///
    /// # Errors
    /// As [`PubSub::close`].
    pub async fn close(&self, within: Duration) -> Result<Closed> {
        let nudges: Vec<_> = self.nudges.lock().all.iter().filter_map(Weak::upgrade).collect();
        nudges.iter().for_each(|nudge| nudge.hurry());
        self.pubsub.close(within).await
    }

    /// The leases of this bus, if it has any.
    pub fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        self.pubsub.leases()
    }

    /// This bus with leases from elsewhere beside it.
    #[must_use]
    pub fn with_leases(self, leases: Arc<dyn LeaseProvider>) -> Self {
        Self { pubsub: with_leases(self.pubsub, leases), nudges: self.nudges }
    }
}

/// A handler running in a task of its own; made by [`Bus::on`]. Dropping it leaves it running.
#[derive(Debug)]
pub struct Handler {
    handle: SubscriptionHandle,
    task: JoinHandle<Result<RunReport>>,
}

impl Handler {
    /// The subscription's handle.
    pub fn handle(&self) -> &SubscriptionHandle {
        &self.handle
    }

    /// Stops taking events and waits until the running handlers have ended. Once the future is dropped they end by themselves, and no
    /// further one begins.
    ///
    /// # Errors
    /// The error the subscription had ended with.
    pub async fn stop(self) -> Result<RunReport> {
        self.handle.stop();
        self.ended().await
    }

    /// Waits until the subscription has ended. Dropping the future leaves the handler running.
    ///
    /// # Errors
    /// The error the subscription ended with; `Closed` if its runtime ended first.
    pub async fn ended(self) -> Result<RunReport> {
        self.task.await.unwrap_or_else(|_| Err(Error::closed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nudges_of_what_is_gone_do_not_gather() {
        let mut nudges = Nudges::default();
        let alive: Vec<Arc<Nudge>> = (0..1000).map(|_| Arc::default()).collect();
        alive.iter().for_each(|nudge| nudges.push(Arc::downgrade(nudge)));
        drop(alive);
        let alive: Vec<Arc<Nudge>> = (0..10).map(|_| Arc::default()).collect();
        for number in 0..5000 {
            let nudge = alive.get(number / 500).filter(|_| number % 500 == 0);
            nudges.push(nudge.map_or_else(Weak::new, Arc::downgrade));
        }
        let live = nudges.all.iter().filter(|nudge| nudge.strong_count() > 0).count();
        assert_eq!(live, 10);
        drop(alive);
        for _ in 0..5000 {
            nudges.push(Weak::new());
        }
        assert!(nudges.all.len() <= 32 && nudges.all.capacity() <= 64, "{}", nudges.all.len());
    }
}
