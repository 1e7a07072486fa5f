//! A bus wrapped so that one thing about it can be wrong: the hooks of a saboteur, and what calls them.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use parking_lot::Mutex;
use pubsub_conformance::{Faults, Harness, Inline, InlineHandler, Job, Probe, Process, Processes, Raw, Timing};
use pubsub_core::machinery::InFlight;
use pubsub_core::{
    AckMode, Capabilities, Closed, Control, Cursor, Delivery, Event, LeaseProvider, Page, Positions, PubSub, PublishError,
    PublishOptions, Receipt, Result, Settled, Settlement, Settler, Source, Start, StatusWatch, SubscribeOptions, Subscription,
    SubscriptionHandle, SubscriptionStatus, Timestamp, Topic, TopicStatus, TrimFilter,
};

/// The bus below, which is right.
pub(crate) type Honest = Arc<dyn PubSub>;

/// What a saboteur can get its hands on. Each hook does what is right unless it is overridden. One saboteur serves all instances
/// of one bus.
#[async_trait]
pub(crate) trait Sabotage: Send + Sync + 'static {
    /// What the harness says the bus can do.
    fn declared(&self, honest: Capabilities) -> Capabilities {
        honest
    }

    /// What the bus itself says.
    fn advertised(&self, honest: Capabilities) -> Capabilities {
        honest
    }

    async fn publish(
        &self,
        honest: &Honest,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        honest.publish(topic, events, options).await
    }

    /// Subscribes below, read by hand and unfiltered: that is done above.
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        honest.subscribe(topic, options).await
    }

    /// The options that the subscription above is made with.
    fn options(&self, asked: SubscribeOptions) -> SubscribeOptions {
        asked
    }

    /// Who settles.
    fn mode(&self, asked: AckMode) -> AckMode {
        asked
    }

    /// A delivery on its way up: what is handed over for it, and whether there is something to be handed over at all.
    fn deliver(&self, _view: &View, parcel: Parcel) -> Vec<Parcel> {
        vec![parcel]
    }

    /// A settlement on its way down.
    fn settle(&self, _view: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        delivery.settle(settlement)
    }

    fn extend(&self, delivery: &Delivery) -> Receipt {
        delivery.extend()
    }

    fn stop(&self, view: &View) {
        view.handle.stop();
    }

    async fn drained(&self, honest: &SubscriptionHandle) {
        honest.drained().await;
    }

    fn subscription_status(&self, honest: SubscriptionStatus) -> SubscriptionStatus {
        honest
    }

    async fn history(&self, honest: &Honest, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        honest.history(topic, from, limit).await
    }

    async fn clear_topic(&self, honest: &Honest, topic: &Topic) -> Result<()> {
        honest.clear_topic(topic).await
    }

    async fn trim_topic(&self, honest: &Honest, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        honest.trim_topic(topic, filter).await
    }

    async fn inspect(&self, honest: &Honest, topic: &Topic) -> Result<TopicStatus> {
        honest.inspect(topic).await
    }

    fn status(&self, honest: &Honest) -> StatusWatch {
        honest.status()
    }

    async fn flush(&self, honest: &Honest) -> Result<()> {
        honest.flush().await
    }

    async fn close(&self, honest: &Honest, within: Duration) -> Result<Closed> {
        honest.close(within).await
    }

    fn leases(&self, honest: &Honest) -> Option<Arc<dyn LeaseProvider>> {
        honest.leases()
    }

    /// The handle of the bus is dropped.
    fn handle_dropped(&self) {}

    /// What another process is asked to do.
    fn job(&self, asked: Job) -> Job {
        asked
    }

    /// Another process is killed.
    async fn kill(&self, process: Box<dyn Process>) -> Result<()> {
        process.kill().await
    }

    fn subscribe_inline(&self, honest: &dyn Inline, topic: &Topic, handler: InlineHandler) -> Result<Box<dyn Any + Send>> {
        honest.subscribe(topic, handler)
    }

    async fn inject_raw(&self, honest: &dyn Raw, _bus: &Honest, topic: &Topic, bytes: &[u8]) -> Result<()> {
        honest.inject(topic, bytes).await
    }
}

/// Does no harm: proof that the wrapper by itself changes nothing.
pub(crate) struct Harmless;

impl Sabotage for Harmless {}

/// A delivery on its way up.
pub(crate) struct Parcel {
    pub(crate) event: Arc<Event>,
    pub(crate) attempt: u32,
    pub(crate) lagged: u64,
    pub(crate) cursor: Option<Cursor>,
    /// The delivery itself; a copy has none.
    pub(crate) delivery: Option<Delivery>,
}

impl Parcel {
    fn of(delivery: Delivery) -> Self {
        let (event, attempt, lagged) = (delivery.event().clone(), delivery.attempt(), delivery.lagged());
        Self { event, attempt, lagged, cursor: delivery.cursor(), delivery: Some(delivery) }
    }

    /// The same once more, without anything to be settled.
    pub(crate) fn copy(&self) -> Self {
        let Self { event, attempt, lagged, cursor, .. } = self;
        Self { event: event.clone(), attempt: *attempt, lagged: *lagged, cursor: cursor.clone(), delivery: None }
    }
}

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// One subscription, seen from within the wrapper.
pub(crate) struct View {
    pub(crate) topic: Topic,
    pub(crate) options: SubscribeOptions,
    /// What it was subscribed with below.
    pub(crate) below: SubscribeOptions,
    /// One that no other subscription has.
    pub(crate) number: u64,
    /// When it was made.
    pub(crate) since: Timestamp,
    honest: Weak<dyn PubSub>,
    pub(crate) handle: SubscriptionHandle,
    sabotage: Arc<dyn Sabotage>,
    held: Mutex<InFlight<Option<Delivery>>>,
}

impl View {
    /// The bus below, while anybody holds it.
    pub(crate) fn honest(&self) -> Option<Honest> {
        self.honest.upgrade()
    }

    fn hand_over(self: &Arc<Self>, parcel: Parcel, mode: AckMode) -> Delivery {
        let Parcel { event, attempt, lagged, cursor, delivery } = parcel;
        let up = match mode {
            AckMode::Auto => {
                drop(delivery.map(Delivery::done));
                Delivery::settled(event, attempt)
            }
            AckMode::Manual => {
                let token = self.held.lock().insert(delivery);
                Delivery::held(event, attempt, self.clone(), token)
            }
        };
        let up = up.after_losing(lagged);
        match cursor {
            Some(cursor) => up.at(cursor.scope().clone(), cursor.position()),
            None => up,
        }
    }
}

impl Settler for View {
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        let held = self.held.lock().remove(token);
        match held {
            Some(Some(delivery)) => self.sabotage.settle(self, delivery, settlement),
            Some(None) => Receipt::ready(Settled::Done),
            None => Receipt::ready(Settled::TooLate),
        }
    }

    fn extend(&self, token: u64) -> Receipt {
        match self.held.lock().get(token) {
            Some(Some(delivery)) => self.sabotage.extend(delivery),
            _ => Receipt::ready(Settled::TooLate),
        }
    }

    fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()> {
        match self.held.lock().get(token) {
            Some(Some(delivery)) => pin!(delivery.revoked()).poll(cx),
            Some(None) => Poll::Pending,
            None => Poll::Ready(()),
        }
    }
}

#[async_trait]
impl Control for View {
    fn stop(&self) {
        self.sabotage.stop(self);
    }

    async fn stopped(&self) {
        // The wrapped backends end at once.
    }

    async fn drained(&self) {
        self.sabotage.drained(&self.handle).await;
    }

    fn status(&self) -> SubscriptionStatus {
        self.sabotage.subscription_status(self.handle.status())
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("topic", &self.topic).finish_non_exhaustive()
    }
}

struct ViewSource {
    inner: Subscription,
    view: Arc<View>,
    ready: VecDeque<Parcel>,
}

impl Source for ViewSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        loop {
            if let Some(parcel) = self.ready.pop_front() {
                let mode = self.view.sabotage.mode(mode);
                return Poll::Ready(Some(Ok(self.view.hand_over(parcel, mode))));
            }
            match std::task::ready!(self.inner.poll_next_unpin(cx)) {
                Some(Ok(delivery)) => self.ready.extend(self.view.sabotage.deliver(&self.view, Parcel::of(delivery))),
                last => return Poll::Ready(last),
            }
        }
    }
}

/// One instance of the wrapped bus.
struct Sabotaged {
    honest: Honest,
    sabotage: Arc<dyn Sabotage>,
}

#[async_trait]
impl PubSub for Sabotaged {
    fn capabilities(&self) -> Capabilities {
        self.sabotage.advertised(self.honest.capabilities())
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        self.sabotage.publish(&self.honest, topic, events, options).await
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let since = Timestamp::now();
        let mut below = options.clone().ack_mode(AckMode::Manual);
        below.filter = None;
        let inner = self.sabotage.subscribe(&self.honest, topic, below).await?;
        let options = self.sabotage.options(options);
        let view = Arc::new(View {
            topic: topic.clone(),
            options: options.clone(),
            below: inner.options().clone(),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            since,
            honest: Arc::downgrade(&self.honest),
            handle: inner.handle(),
            sabotage: self.sabotage.clone(),
            held: Mutex::default(),
        });
        let source = ViewSource { inner, view: view.clone(), ready: VecDeque::new() };
        Ok(Subscription::new(topic.clone(), options, Box::new(source), view))
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.sabotage.history(&self.honest, topic, from, limit).await
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.sabotage.clear_topic(&self.honest, topic).await
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.sabotage.trim_topic(&self.honest, topic, filter).await
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.sabotage.inspect(&self.honest, topic).await
    }

    fn status(&self) -> StatusWatch {
        self.sabotage.status(&self.honest)
    }

    async fn flush(&self) -> Result<()> {
        self.sabotage.flush(&self.honest).await
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.sabotage.close(&self.honest, within).await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        self.sabotage.leases(&self.honest)
    }
}

impl Drop for Sabotaged {
    fn drop(&mut self) {
        self.sabotage.handle_dropped();
    }
}

impl fmt::Debug for Sabotaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sabotaged").field("honest", &self.honest).finish_non_exhaustive()
    }
}

/// A harness over buses with one saboteur each.
pub(crate) struct SabotagedHarness {
    base: Arc<dyn Harness>,
    make: fn() -> Arc<dyn Sabotage>,
    sabotage: Arc<dyn Sabotage>,
}

impl SabotagedHarness {
    pub(crate) fn new(base: Arc<dyn Harness>, make: fn() -> Arc<dyn Sabotage>) -> Self {
        Self { base, make, sabotage: make() }
    }
}

#[async_trait]
impl Harness for SabotagedHarness {
    fn name(&self) -> &str {
        self.base.name()
    }

    fn declared(&self) -> Capabilities {
        self.sabotage.declared(self.base.declared())
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(Self::new(self.base.fresh().await?, self.make)))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(Sabotaged { honest: self.base.connect().await?, sabotage: self.sabotage.clone() }))
    }

    fn timing(&self) -> Timing {
        // What a saboteur keeps from happening is waited for in vain.
        let mut timing = self.base.timing();
        timing.patience = timing.reclaim.mul_f64(1.5).max(Duration::from_secs(4));
        timing.limit = Duration::from_secs(10);
        timing
    }

    fn spans_instances(&self) -> bool {
        self.base.spans_instances()
    }

    fn confirms(&self) -> bool {
        self.base.confirms()
    }

    fn probe(&self) -> Option<&dyn Probe> {
        self.base.probe()
    }

    fn faults(&self) -> Option<&dyn Faults> {
        self.base.faults()
    }

    fn processes(&self) -> Option<&dyn Processes> {
        self.base.processes().map(|_| self as &dyn Processes)
    }

    fn raw(&self) -> Option<&dyn Raw> {
        self.base.raw().map(|_| self as &dyn Raw)
    }

    fn inline(&self) -> Option<&dyn Inline> {
        self.base.inline().map(|_| self as &dyn Inline)
    }
}

#[async_trait]
impl Processes for SabotagedHarness {
    async fn start(&self, job: Job) -> Result<Box<dyn Process>> {
        let process = self.base.processes().expect("asked before").start(self.sabotage.job(job)).await?;
        Ok(Box::new(SabotagedProcess { process, sabotage: self.sabotage.clone() }))
    }
}

struct SabotagedProcess {
    process: Box<dyn Process>,
    sabotage: Arc<dyn Sabotage>,
}

#[async_trait]
impl Process for SabotagedProcess {
    async fn kill(self: Box<Self>) -> Result<()> {
        self.sabotage.kill(self.process).await
    }
}

#[async_trait]
impl Raw for SabotagedHarness {
    async fn inject(&self, topic: &Topic, bytes: &[u8]) -> Result<()> {
        let honest = self.base.raw().expect("asked before");
        let bus = self.base.connect().await?;
        self.sabotage.inject_raw(honest, &bus, topic, bytes).await
    }
}

impl Inline for SabotagedHarness {
    fn subscribe(&self, topic: &Topic, handler: InlineHandler) -> Result<Box<dyn Any + Send>> {
        self.sabotage.subscribe_inline(self.base.inline().expect("asked before"), topic, handler)
    }

    fn max_depth(&self) -> usize {
        self.base.inline().expect("asked before").max_depth()
    }
}

/// Counts by key, shared by all instances of a bus.
#[derive(Default)]
pub(crate) struct Counter(Mutex<BTreeMap<String, u64>>);

impl Counter {
    /// One more; 1 is the first.
    pub(crate) fn next(&self, key: impl fmt::Display) -> u64 {
        let mut counts = self.0.lock();
        let count = counts.entry(key.to_string()).or_default();
        *count += 1;
        *count
    }
}
