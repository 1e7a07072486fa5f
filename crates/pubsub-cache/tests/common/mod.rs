//! A store that fails by a schedule, a bus that records what reaches it and fails by a schedule, and waits that end.
#![allow(dead_code)] // no test binary uses all of it

pub(crate) mod world;

use std::collections::{HashMap, VecDeque};
use std::future::{Future, pending};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use parking_lot::Mutex;
use pubsub_cache::{Generation, InMemoryServerCache, LogPage, ServerCache};
use pubsub_core::{
    AckMode, Capabilities, Closed, Deduplication, Delivery, Error, ErrorKind, Event, EventId, LeaseProvider, Page, Positions,
    PubSub, PublishError, PublishOptions, Result, Source, Start, StatusWatch, SubscribeOptions, Subscription, Topic,
    TopicStatus, TrimFilter,
};

/// The longest any wait may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} took more than {PATIENCE:?}"),
    }
}

pub(crate) fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

pub(crate) fn event(name: &str) -> Arc<Event> {
    Arc::new(Event::new(name).with_run_id("run"))
}

/// Their types are their numbers.
pub(crate) fn events(numbers: std::ops::Range<usize>) -> Vec<Arc<Event>> {
    numbers.map(|number| event(&number.to_string())).collect()
}

pub(crate) fn ids<'a>(events: impl IntoIterator<Item = &'a Arc<Event>>) -> Vec<EventId> {
    events.into_iter().map(|event| event.id().clone()).collect()
}

pub(crate) async fn next(subscription: &mut Subscription) -> Delivery {
    within("the next delivery", subscription.next()).await.expect("the stream goes on").expect("no error")
}

pub(crate) async fn take(subscription: &mut Subscription, count: usize) -> Vec<Arc<Event>> {
    let mut taken = Vec::new();
    for _ in 0..count {
        taken.push(next(subscription).await.event().clone());
    }
    taken
}

/// Reads up to and without an event of this id.
pub(crate) async fn until(subscription: &mut Subscription, fence: &EventId) -> Vec<Delivery> {
    let mut seen = Vec::new();
    loop {
        let delivery = next(subscription).await;
        if delivery.event().id() == fence {
            return seen;
        }
        seen.push(delivery);
    }
}

pub(crate) async fn publish(bus: &dyn PubSub, topic: &Topic, events: &[Arc<Event>]) -> Positions {
    within("publish", bus.publish(topic, events, PublishOptions::new())).await.expect("published")
}

/// What an operation comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Refused at once, not done; trying again can help.
    Retryable,
    /// Refused at once, not done, for good.
    Permanent,
    /// Not done, and never answered.
    Hang,
    /// Done, and answered after this time.
    Late(Duration),
    /// Done, and said to have failed.
    DoneUnavailable,
}

fn refusal(fault: Fault) -> ErrorKind {
    match fault {
        Fault::Permanent => ErrorKind::Backend("out of order".into()),
        _ => ErrorKind::Unavailable,
    }
}

/// Faults by the number of the operation, counted from 0, and for as long as it is set, one for all.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    count: AtomicUsize,
    plan: Mutex<HashMap<usize, Fault>>,
    all: Mutex<Option<Fault>>,
    names: Mutex<Vec<&'static str>>,
}

impl Schedule {
    pub(crate) fn at(&self, numbers: impl IntoIterator<Item = usize>, fault: Fault) {
        self.plan.lock().extend(numbers.into_iter().map(|number| (number, fault)));
    }

    /// The next operations, so many of them.
    pub(crate) fn next(&self, count: usize, fault: Fault) {
        let now = self.count();
        self.at(now..now + count, fault);
    }

    pub(crate) fn all(&self, fault: Option<Fault>) {
        *self.all.lock() = fault;
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.names.lock().clone()
    }

    fn coming(&self) -> Option<Fault> {
        self.all.lock().or_else(|| self.plan.lock().get(&self.count()).copied())
    }

    fn step(&self, name: &'static str) -> Option<Fault> {
        let fault = self.coming();
        self.count.fetch_add(1, Ordering::SeqCst);
        self.names.lock().push(name);
        fault
    }

    async fn run<T>(&self, name: &'static str, operation: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let Some(fault) = self.step(name) else { return operation.await };
        match fault {
            Fault::Retryable | Fault::Permanent => Err(refusal(fault).into()),
            Fault::Hang => pending().await,
            Fault::Late(by) => {
                let done = operation.await;
                tokio::time::sleep(by).await;
                done
            }
            Fault::DoneUnavailable => operation.await.and(Err(refusal(fault).into())),
        }
    }
}

/// A store whose operations fail by a schedule.
#[derive(Debug)]
pub(crate) struct FaultyStore {
    pub(crate) inner: Arc<InMemoryServerCache>,
    pub(crate) schedule: Schedule,
    /// Whether it appends without waiting.
    pub(crate) appends_now: bool,
    /// Makes reads fail as if what is kept were damaged.
    pub(crate) damaged: AtomicBool,
}

impl FaultyStore {
    pub(crate) fn new(appends_now: bool) -> Arc<Self> {
        Self::over(Arc::default(), appends_now)
    }

    pub(crate) fn over(inner: Arc<InMemoryServerCache>, appends_now: bool) -> Arc<Self> {
        Arc::new(Self { inner, schedule: Schedule::default(), appends_now, damaged: AtomicBool::new(false) })
    }

    /// What it has, whatever the schedule says; held to dense indices.
    pub(crate) async fn kept(&self, topic: &Topic) -> Vec<Arc<Event>> {
        let page = self.inner.read(topic, 0, usize::MAX).await.unwrap();
        let indices: Vec<_> = page.events.iter().map(|event| event.index().unwrap().index).collect();
        assert_eq!(indices, (0..page.next).collect::<Vec<_>>(), "indices are dense");
        assert!(
            page.events.iter().all(|event| Some(event.index().unwrap().generation) == page.generation.map(Generation::get))
        );
        page.events
    }
}

#[async_trait]
impl ServerCache for FaultyStore {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.schedule.run("get", self.inner.get(key)).await
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<()> {
        self.schedule.run("set", self.inner.set(key, value, ttl)).await
    }

    async fn delete(&self, key: &str) -> Result<bool> {
        self.schedule.run("delete", self.inner.delete(key)).await
    }

    async fn increment(&self, key: &str, by: i64, ttl: Option<Duration>) -> Result<i64> {
        self.schedule.run("increment", self.inner.increment(key, by, ttl)).await
    }

    async fn push(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
        self.schedule.run("push", self.inner.push(key, value, ttl)).await
    }

    async fn range(&self, key: &str, from: u64, limit: usize) -> Result<Vec<Bytes>> {
        self.schedule.run("range", self.inner.range(key, from, limit)).await
    }

    async fn append(&self, topic: &Topic, events: &[Arc<Event>]) -> Result<Vec<Arc<Event>>> {
        self.schedule.run("append", self.inner.append(topic, events)).await
    }

    fn append_now(&self, topic: &Topic, events: &[Arc<Event>]) -> Option<Result<Vec<Arc<Event>>>> {
        if !self.appends_now || matches!(self.schedule.coming(), Some(Fault::Hang | Fault::Late(_))) {
            return None;
        }
        Some(match self.schedule.step("append_now") {
            None => self.inner.append_now(topic, events)?,
            Some(Fault::DoneUnavailable) => {
                self.inner.append_now(topic, events)?.and(Err(refusal(Fault::DoneUnavailable).into()))
            }
            Some(fault) => Err(refusal(fault).into()),
        })
    }

    async fn read(&self, topic: &Topic, from: u64, limit: usize) -> Result<LogPage> {
        if self.damaged.load(Ordering::SeqCst) && limit > 0 {
            return Err(ErrorKind::Decode("a damaged entry".into()).into());
        }
        self.schedule.run("read", self.inner.read(topic, from, limit)).await
    }

    async fn clear(&self, topic: &Topic) -> Result<()> {
        self.schedule.run("clear", self.inner.clear(topic)).await
    }

    async fn trim(&self, topic: &Topic, filter: &TrimFilter) -> Result<u64> {
        self.schedule.run("trim", self.inner.trim(topic, filter)).await
    }

    fn deduplication(&self) -> Deduplication {
        self.inner.deduplication()
    }
}

/// A bus that records what reaches the one below, and whose publishes fail by a schedule.
#[derive(Debug)]
pub(crate) struct Spy {
    pub(crate) inner: Arc<dyn PubSub>,
    pub(crate) schedule: Schedule,
    /// Whether it publishes without waiting where the one below does.
    pub(crate) publishes_now: bool,
    /// What was published, in order; local-only events too.
    pub(crate) published: Mutex<Vec<(Arc<Event>, PublishOptions)>>,
    pub(crate) subscribed: Mutex<Vec<SubscribeOptions>>,
    pub(crate) flushed: AtomicUsize,
    pub(crate) closed: AtomicUsize,
    pub(crate) cleared: AtomicUsize,
    pub(crate) trimmed: AtomicUsize,
    /// Whether a new subscription first gets all that was published before, again.
    pub(crate) sends_backlog: AtomicBool,
    pub(crate) without_leases: AtomicBool,
    /// Deliveries to put into the next subscription before anything else.
    pub(crate) script: Mutex<Vec<(Arc<Event>, u32)>>,
}

impl Spy {
    pub(crate) fn over(inner: impl PubSub) -> Arc<Self> {
        Self::with(inner, true)
    }

    pub(crate) fn with(inner: impl PubSub, publishes_now: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::new(inner),
            schedule: Schedule::default(),
            publishes_now,
            published: Mutex::default(),
            subscribed: Mutex::default(),
            flushed: AtomicUsize::new(0),
            closed: AtomicUsize::new(0),
            cleared: AtomicUsize::new(0),
            trimmed: AtomicUsize::new(0),
            sends_backlog: AtomicBool::new(false),
            without_leases: AtomicBool::new(false),
            script: Mutex::default(),
        })
    }

    pub(crate) fn published(&self) -> Vec<Arc<Event>> {
        self.published.lock().iter().map(|(event, _)| event.clone()).collect()
    }

    /// How many fan-out subscriptions the bus below has.
    pub(crate) async fn fan_out(&self, topic: &Topic) -> u64 {
        self.inner.inspect(topic).await.unwrap().fan_out.unwrap()
    }

    fn record(&self, events: &[Arc<Event>], options: &PublishOptions) {
        self.published.lock().extend(events.iter().map(|event| (event.clone(), options.clone())));
    }
}

/// A source that yields what it was given, then what the subscription below yields. Nothing may be left for others to settle.
struct Scripted {
    first: VecDeque<(Arc<Event>, u32)>,
    rest: Box<dyn Source>,
    is_group: bool,
}

impl Source for Scripted {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        assert!(mode == AckMode::Auto || self.is_group, "what is suppressed would not be settled");
        match self.first.pop_front() {
            Some((event, attempt)) => Poll::Ready(Some(Ok(Delivery::settled(event, attempt)))),
            None => self.rest.poll_next(cx, mode),
        }
    }
}

#[derive(Debug)]
struct Handle(pubsub_core::SubscriptionHandle);

#[async_trait]
impl pubsub_core::Control for Handle {
    fn stop(&self) {
        self.0.stop();
    }

    async fn stopped(&self) {
        self.0.stopped().await;
    }

    async fn drained(&self) {
        self.0.drained().await;
    }

    fn status(&self) -> pubsub_core::SubscriptionStatus {
        self.0.status()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl PubSub for Spy {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.inner.capabilities();
        capabilities.leases = capabilities.leases.filter(|_| !self.without_leases.load(Ordering::SeqCst));
        capabilities
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        let fault = self.schedule.step("publish");
        match fault {
            Some(fault @ (Fault::Retryable | Fault::Permanent)) => {
                return Err(PublishError::none_sent(refusal(fault), events.len()));
            }
            Some(Fault::Hang) => pending().await,
            _ => {}
        }
        self.record(events, &options);
        let published = self.inner.publish(topic, events, options).await;
        match fault {
            Some(Fault::Late(by)) => tokio::time::sleep(by).await,
            Some(_) => {
                let unknown = vec![pubsub_core::Fate::Unknown; events.len()];
                return Err(PublishError::new(Error::new(ErrorKind::Unavailable), unknown));
            }
            None => {}
        }
        published
    }

    fn publish_now(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Option<Result<Positions, PublishError>> {
        if !self.publishes_now || self.schedule.coming().is_some() {
            return None;
        }
        let published = self.inner.publish_now(topic, events, options)?;
        self.schedule.step("publish_now");
        self.record(events, options);
        Some(published)
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.subscribed.lock().push(options.clone());
        let is_group = options.group.is_some();
        let rest = self.inner.subscribe(topic, options.clone()).await?;
        let mut first: VecDeque<_> = std::mem::take(&mut *self.script.lock()).into();
        if self.sends_backlog.load(Ordering::SeqCst) {
            first.extend(self.published().into_iter().map(|event| (event, 1)));
        }
        let handle = Arc::new(Handle(rest.handle()));
        Ok(Subscription::new(topic.clone(), options, Box::new(Scripted { first, rest: rest.into_source(), is_group }), handle))
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.inner.history(topic, from, limit).await
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.cleared.fetch_add(1, Ordering::SeqCst);
        self.inner.clear_topic(topic).await
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.trimmed.fetch_add(1, Ordering::SeqCst);
        self.inner.trim_topic(topic, filter).await
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.inner.inspect(topic).await
    }

    fn status(&self) -> StatusWatch {
        self.inner.status()
    }

    async fn flush(&self) -> Result<()> {
        self.flushed.fetch_add(1, Ordering::SeqCst);
        self.inner.flush().await
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.closed.fetch_add(1, Ordering::SeqCst);
        self.inner.close(within).await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        self.inner.leases().filter(|_| !self.without_leases.load(Ordering::SeqCst))
    }
}
