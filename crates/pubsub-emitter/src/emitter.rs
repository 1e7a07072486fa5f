//! The backend: one instance of an in-process bus.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::machinery::{self, Aftermath, Closing, DeliveryQueue, InstanceId, yield_now_and_then};
use pubsub_core::{
    Capabilities, Capability, Closed, Error, ErrorKind, Event, Groups, LeaseProvider, Page, Positions, PubSub, PublishError,
    PublishOptions, REDRIVE_GROUP, Reach, Result, Retention, Start, Status, StatusWatch, SubscribeOptions, Subscription,
    SubscriptionHandle, Topic, TopicStatus, TrimFilter,
};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::EmitterBuilder;
use crate::hub::Hub;
use crate::inline::{Inline, InlineSubscription, MAX_INLINE_DEPTH, is_too_deep};
use crate::leases::InstanceLeases;
use crate::topic::TopicState;

/// An event bus within the process. Clones are the same instance; see the [crate](crate) for what it promises.
#[derive(Clone)]
pub struct EventEmitterPubSub(Arc<Instance>);

struct Instance {
    id: InstanceId,
    hub: Arc<Hub>,
    config: EmitterBuilder,
    status: watch::Sender<Status>,
    closed: watch::Sender<bool>,
    /// Begun while nothing can be attached.
    closing: Closing,
    attached: Mutex<Attached>,
}

/// What this instance has attached, so that closing can end it.
#[derive(Default)]
struct Attached {
    subscriptions: HashMap<u64, (Arc<DeliveryQueue>, SubscriptionHandle)>,
    /// Queues of subscriptions that have ended while their consumers held something.
    held_on: Vec<Weak<DeliveryQueue>>,
    inline: Vec<Weak<Inline>>,
}

impl Instance {
    /// A subscription has ended.
    fn forget(&self, number: u64) {
        let mut attached = self.attached.lock();
        let Some((queue, handle)) = attached.subscriptions.remove(&number) else { return };
        if queue.burden(self.id).0 > 0 {
            attached.held_on.retain(|queue| queue.strong_count() > 0);
            attached.held_on.push(Arc::downgrade(&queue));
        }
        let capacity = attached.subscriptions.capacity();
        if capacity > 64 && attached.subscriptions.len() < capacity / 4 {
            attached.subscriptions.shrink_to_fit(); // a burst of subscriptions gives its memory back
        }
        drop(attached);
        drop(handle);
    }
}

impl Default for EventEmitterPubSub {
    fn default() -> Self {
        Self::new()
    }
}

impl EventEmitterPubSub {
    /// A bus of its own, with the default configuration.
    pub fn new() -> Self {
        Self::builder().build().expect("the default configuration is valid")
    }

    /// An instance of the bus of this name, which is shared within the process.
    ///
    /// # Errors
    /// `InvalidOption` if the name is empty.
    pub fn named(name: impl AsRef<str>) -> Result<Self> {
        Self::builder().name(name).build()
    }

    /// Configures an instance.
    pub fn builder() -> EmitterBuilder {
        EmitterBuilder::default()
    }

    /// Another instance on the same bus, configured alike: it receives what this one publishes, but for `local_only` events, and
    /// is closed by itself.
    #[must_use]
    pub fn connect(&self) -> Self {
        Self::on(self.0.hub.clone(), self.0.config.clone())
    }

    pub(crate) fn on(hub: Arc<Hub>, config: EmitterBuilder) -> Self {
        let status = watch::Sender::new(Status::Connected);
        let closed = watch::Sender::new(false);
        Self(Arc::new(Instance {
            id: hub.number(),
            hub,
            config,
            status,
            closed,
            closing: Closing::default(),
            attached: Mutex::default(),
        }))
    }

    /// Subscribes a handler that is called in the publisher's task, before its publish returns: the fastest way, without queue,
    /// settlement, retry, filter or back-pressure (clause I1). It sees each publisher's events in order. A panic is caught and
    /// logged. A handler that publishes uses [`publish_now`](PubSub::publish_now): it cannot await, and a future polled only once
    /// may have yielded to the runtime before it published.
    ///
    /// # Errors
    /// `Closed`.
    pub fn subscribe_inline(
        &self,
        topic: &Topic,
        handler: impl Fn(&Arc<Event>) + Send + Sync + 'static,
    ) -> Result<InlineSubscription> {
        let Instance { id, hub, attached, closing, .. } = &*self.0;
        let inline = Inline::new(*id, handler);
        {
            let mut attached = attached.lock();
            if closing.has_begun() {
                return Err(Error::closed().during("subscribe_inline").on(topic));
            }
            attached.inline.retain(|inline| inline.strong_count() > 0);
            attached.inline.push(Arc::downgrade(&inline));
        }
        hub.with_topic(topic, |state| state.attach_inline(inline.clone()));
        Ok(InlineSubscription { inline, hub: hub.clone(), topic: topic.clone() })
    }

    /// The instance's number on its bus; `local_only` events stay with it.
    fn only(&self, options: &PublishOptions) -> Option<InstanceId> {
        options.local_only.then_some(self.0.id)
    }

    fn check_open(&self, operation: &'static str, topic: &Topic) -> Result<()> {
        if self.0.closing.has_begun() { Err(Error::closed().during(operation).on(topic)) } else { Ok(()) }
    }

    /// Whether a publish is what most are: `check` would find nothing to refuse and nothing to change. It is asked for every event,
    /// and has to be quick.
    #[inline]
    fn is_usual(&self, events: &[Arc<Event>], options: &PublishOptions) -> bool {
        let EmitterBuilder { strict_payloads, max_payload, .. } = &self.0.config;
        let plain = || !strict_payloads && max_payload.is_none() && events.iter().all(|event| !event.payload().is_live());
        !self.0.closing.has_begun() && options.timeout.is_none() && !is_too_deep() && (options.local_only || plain())
    }

    /// All that can be refused before anything is sent; and what [`machinery::prepare`] returns.
    #[cold]
    fn check(&self, topic: &Topic, events: &[Arc<Event>], options: &PublishOptions) -> Result<Option<Vec<Arc<Event>>>> {
        self.check_open("publish", topic)?;
        options.validate()?;
        if is_too_deep() {
            return Err(ErrorKind::Recursion { limit: MAX_INLINE_DEPTH }.into());
        }
        machinery::prepare(events, options, &self.capabilities())
    }

    /// The slow way, when a queue is full or other publishers wait already.
    async fn publish_waiting(
        &self,
        topic: &TopicState,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Result<Positions, PublishError> {
        let deadline = Instant::now() + options.timeout.unwrap_or(self.0.config.publish_timeout);
        let only = self.only(options);
        let mut closed = self.0.closed.subscribe();
        let taken = AtomicUsize::new(0); // shared by the closure and what follows; no other thread sees it
        let offer = || {
            let so_far = taken.load(Ordering::Relaxed);
            let now = so_far + topic.offer(&events[so_far..], only);
            taken.store(now, Ordering::Relaxed);
            now == events.len()
        };
        let timer = self.0.hub.timer().map_err(|error| PublishError::none_sent(error, events.len()))?;
        let runtime = timer.runtime();
        let waiting = std::pin::pin!(topic.wait_for_room(&runtime, deadline, only, offer));
        let closing = std::pin::pin!(closed.wait_for(|closed| *closed));
        let error = match futures::future::select(waiting, closing).await {
            futures::future::Either::Left((true, _)) => return Ok(Positions::none()),
            futures::future::Either::Left((false, _)) => ErrorKind::Full,
            futures::future::Either::Right(_) => ErrorKind::Closed,
        };
        let error = Error::new(error).during("publish").on(topic.topic());
        Err(PublishError::prefix_sent(error, taken.load(Ordering::Relaxed), events.len()))
    }
}

#[async_trait]
impl PubSub for EventEmitterPubSub {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::in_process();
        capabilities.dead_letter_history = true;
        capabilities.max_payload = self.0.config.max_payload;
        capabilities.leases = Some(Reach::Process);
        capabilities.strict_payloads = self.0.config.strict_payloads;
        capabilities
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        yield_now_and_then().await;
        if let Some(published) = self.publish_now(topic, events, &options) {
            return published;
        }
        // Checked just now, and refused by a full queue.
        let prepared = machinery::prepare(events, &options, &self.capabilities()).map_err(refused(topic, events))?;
        let events = prepared.as_deref().unwrap_or(events);
        match self.0.hub.topic(topic) {
            Some(state) => self.publish_waiting(&state, events, &options).await,
            None => Ok(Positions::none()), // all its subscriptions have gone meanwhile
        }
    }

    fn publish_now(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Option<Result<Positions, PublishError>> {
        let only = self.only(options);
        let taken = if self.is_usual(events, options) {
            self.0.hub.offer_all(topic, events, only)
        } else {
            match self.check(topic, events, options) {
                Ok(prepared) => self.0.hub.offer_all(topic, prepared.as_deref().unwrap_or(events), only),
                Err(error) => return Some(Err(refused(topic, events)(error))),
            }
        };
        taken.then(|| Ok(Positions::none()))
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.check_open("subscribe", topic)?;
        let Instance { id, hub, attached, closing, .. } = &*self.0;
        let redrives = options.group.as_ref().is_some_and(|group| group.as_str() == REDRIVE_GROUP);
        let mut capabilities = self.capabilities();
        let keeps_letters = redrives || hub.topic(topic).is_some_and(|state| state.keeps_letters());
        if keeps_letters && options.group.is_some() {
            (capabilities.groups, capabilities.group_history, capabilities.retention) =
                (Groups::Durable, true, Retention::History);
        }
        options.validate(topic, &capabilities)?;

        let number = hub.number();
        let instance = Arc::downgrade(&self.0);
        let naming = Mutex::new(options.dead_letter.as_ref().map(|dead_letter| hub.name_dead_letter(dead_letter)));
        let (end_hub, end_topic) = (hub.clone(), topic.clone());
        // Kept here as well: what it owns tidies up when dropped, which must not happen under the hub's lock.
        let on_end: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            if let Some(instance) = instance.upgrade() {
                instance.forget(number);
            }
            end_hub.tidy(&end_topic);
            naming.lock().take();
        });
        let mut aftermath = Aftermath::new(); // finished when it is dropped, after the lock
        let mut attached = attached.lock();
        if closing.has_begun() {
            return Err(Error::closed().during("subscribe").on(topic));
        }
        let attach = |state: &Arc<TopicState>| {
            if redrives {
                aftermath = state.keep_letters(hub);
            }
            state.subscribe(hub, *id, &options, on_end.clone())
        };
        match hub.with_topic(topic, attach) {
            Ok((queue, subscription)) => {
                attached.subscriptions.insert(number, (queue, subscription.handle()));
                Ok(subscription)
            }
            Err(error) => {
                hub.tidy(topic);
                Err(error.during("subscribe").on(topic))
            }
        }
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.check_open("history", topic)?;
        Page::check_limit(limit).map_err(|error| error.during("history").on(topic))?;
        let kept = self.0.hub.topic(topic).and_then(|state| state.history(&from, limit));
        let page = kept.unwrap_or_else(|| Err(Error::unsupported(Capability::History)));
        page.map_err(|error| error.during("history").on(topic))
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.check_open("clear_topic", topic)?;
        if let Some(state) = self.0.hub.topic(topic) {
            state.clear(&self.0.hub);
            self.0.hub.tidy(topic);
        }
        Ok(())
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.check_open("trim_topic", topic)?;
        let Some(state) = self.0.hub.topic(topic) else { return Ok(0) };
        let trimmed = state.trim(&filter);
        self.0.hub.tidy(topic);
        Ok(trimmed)
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.check_open("inspect", topic)?;
        let nothing = || {
            let mut status = TopicStatus::default();
            (status.retained, status.fan_out) = (Some(0), Some(0));
            status
        };
        Ok(self.0.hub.topic(topic).map_or_else(nothing, |state| state.inspect()))
    }

    fn status(&self) -> StatusWatch {
        StatusWatch::new(self.0.status.subscribe())
    }

    async fn flush(&self) -> Result<()> {
        // Publishes and settlements are done when their calls have returned.
        Ok(())
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        let Instance { id, hub, closing, .. } = &*self.0;
        let (begins, inline): (_, Vec<_>) = {
            let mut attached = self.0.attached.lock();
            let held_on: Vec<_> = attached.held_on.drain(..).filter_map(|queue| queue.upgrade()).collect();
            let subscriptions: Vec<_> = attached.subscriptions.values().cloned().collect();
            let begins = if subscriptions.is_empty() && held_on.is_empty() {
                closing.at_once(Closed::default())
            } else {
                // Subscriptions have made the timer.
                closing.begin(&hub.timer()?.runtime(), || end(*id, subscriptions, held_on, within))
            };
            (begins, attached.inline.drain(..).filter_map(|inline| inline.upgrade()).collect())
        };
        if begins {
            self.0.closed.send_replace(true);
            self.0.status.send_replace(Status::Closed);
            inline.iter().for_each(|inline| inline.end());
        }
        closing.ended().await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        let Instance { hub, closed, .. } = &*self.0;
        Some(Arc::new(InstanceLeases::new(hub.leases().clone(), closed.subscribe())))
    }
}

/// An error of a call that sent nothing.
fn refused(topic: &Topic, events: &[Arc<Event>]) -> impl Fn(Error) -> PublishError {
    move |error| PublishError::none_sent(error.during("publish").on(topic), events.len())
}

/// Drains an instance's subscriptions within the time, then ends them. What others share and can take is left to them at once.
async fn end(
    id: InstanceId,
    subscriptions: Vec<(Arc<DeliveryQueue>, SubscriptionHandle)>,
    held_on: Vec<Arc<DeliveryQueue>>,
    within: Duration,
) -> Closed {
    let start = Instant::now();
    // A group with several members here is one queue.
    let queues = subscriptions.iter().map(|(queue, _)| queue).chain(&held_on);
    let queues: HashMap<_, _> = queues.map(|queue| (Arc::as_ptr(queue).addr(), queue)).collect();
    let relieved = || futures::future::join_all(queues.values().map(|queue| queue.relieved(id)));
    for (_, handle) in subscriptions.iter().filter(|(queue, _)| queue.is_shared_beyond(id)) {
        handle.stop();
    }
    drop(tokio::time::timeout(within, relieved()).await);
    let mut closed = Closed::default();
    closed.released = queues.values().map(|queue| queue.burden(id).1).sum();
    for (_, handle) in &subscriptions {
        handle.stop();
    }
    // Nothing is handed over any more. What came from other instances meanwhile, and just was, has what is left of the time.
    drop(tokio::time::timeout(within.saturating_sub(start.elapsed()), relieved()).await);
    closed.cut_off = queues.values().map(|queue| queue.revoke(id)).sum();
    closed
}

impl fmt::Debug for EventEmitterPubSub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventEmitterPubSub").field("instance", &self.0.id).field("hub", &self.0.hub).finish_non_exhaustive()
    }
}
