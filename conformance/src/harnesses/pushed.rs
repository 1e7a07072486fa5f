//! Pushes over HTTP as a harness: every subscription of another harness's bus is pushed to a URL and taken in behind it, and what the
//! consumer decides travels back as the answer.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use pubsub_core::{
    AckMode, Capabilities, Closed, Control, Delivery, Error, ErrorKind, Event, EventId, Failure, LeaseProvider, Page,
    Positions, PubSub, PublishError, PublishOptions, Receipt, Result, Settled, Settlement, Settler, Source, Start, StatusWatch,
    SubscribeOptions, Subscription, SubscriptionHandle, SubscriptionStatus, Topic, TopicStatus, TrimFilter,
};
use pubsub_http::{Form, Intake, Push, Pushed, Secret, ServeOptions, serve};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

use crate::{Faults, Harness, Probe, Raw, Timing};

/// How long what was pushed waits for a consumer that had asked for it. Then it is given back, uncounted.
const UNASKED: Duration = Duration::from_millis(20);

/// The number of no delivery.
const NOTHING: u64 = u64::MAX;

/// More requests at once than any property has deliveries in hand.
const MANY: usize = 1 << 14;

/// Longer than any property takes: it is the consumer that decides how long it holds a delivery.
const LONG: Duration = Duration::from_secs(3600);

/// The bus of another harness, whose subscriptions are pushed over HTTP: `push-` and the other's name.
pub struct PushedHarness {
    name: String,
    inner: Arc<dyn Harness>,
}

impl PushedHarness {
    /// Pushes in between.
    pub fn over(inner: Arc<dyn Harness>) -> Self {
        Self { name: format!("push-{}", inner.name()), inner }
    }
}

#[async_trait]
impl Harness for PushedHarness {
    fn name(&self) -> &str {
        &self.name
    }

    fn unavailable(&self) -> Option<String> {
        self.inner.unavailable()
    }

    fn declared(&self) -> Capabilities {
        self.inner.declared()
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(Self::over(self.inner.fresh().await?)))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(PushedBus(self.inner.connect().await?)))
    }

    fn timing(&self) -> Timing {
        // Two ends make it slower; how soon a member counts as dead is the bus's affair.
        Timing { reclaim: self.inner.timing().reclaim, ..self.inner.timing().scaled(2.0) }
    }

    fn spans_instances(&self) -> bool {
        self.inner.spans_instances()
    }

    fn confirms(&self) -> bool {
        self.inner.confirms()
    }

    fn lacks(&self, property: &str) -> Option<&str> {
        match property.split_once('-') {
            _ if property == "AK-30" => Some("an answer says how a delivery ends; that it goes on cannot be said"),
            Some(("GR" | "AK", _)) => self.inner.lacks(property),
            _ => Some("pushing is about groups and settlement; the rest is that of the bus which is pushed from"),
        }
    }

    fn probe(&self) -> Option<&dyn Probe> {
        self.inner.probe()
    }

    fn faults(&self) -> Option<&dyn Faults> {
        self.inner.faults()
    }

    fn raw(&self) -> Option<&dyn Raw> {
        self.inner.raw()
    }
}

/// An instance whose subscriptions are pushed.
#[derive(Debug)]
struct PushedBus(Arc<dyn PubSub>);

#[async_trait]
impl PubSub for PushedBus {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        self.0.publish(topic, events, options).await
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let mut below = options.clone().ack_mode(AckMode::Manual);
        (below.filter, below.retry.handler_timeout) = (None, None); // they are the consumer's, at the other end
        let subscription = self.0.subscribe(topic, below).await?;
        let failed = |error: &dyn fmt::Display| Error::new(ErrorKind::Backend(error.to_string().into()));
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| failed(&error))?;
        let url = format!("http://{}/", listener.local_addr().map_err(|error| failed(&error))?);

        let secret = Secret::new("between the two ends of a push")?;
        let (hand, handed) = mpsc::unbounded_channel(); // holds what was asked for: one at a time
        let intake = Intake::new(Form::Events).secret(secret.clone()).handler_timeout(LONG).max_in_flight(MANY);
        let router = intake.handle(move |pushed| consume(hand.clone(), pushed))?;
        let push = Push::to(url).secret(secret).allow_private(true).timeout(LONG).in_flight(MANY).build()?;

        let shared = Arc::new(Shared {
            below: subscription.handle(),
            asked: AtomicBool::new(false),
            travelling: AtomicU64::new(NOTHING),
            stopped: AtomicBool::new(false),
            pusher: AtomicWaker::new(),
            consumer: AtomicWaker::new(),
            outcomes: Mutex::default(),
        });
        let held = Tap { shared: shared.clone(), deliveries: Mutex::default(), numbers: AtomicU64::new(0) };
        let (below, control) = (subscription.options().clone(), Arc::new(Handle(shared.clone())));
        let gate = Gate { source: subscription.into_source(), shared: shared.clone(), held: Arc::new(held) };
        let mut gated = Subscription::new(topic.clone(), below, Box::new(gate), control.clone());
        // Ends when what was pushed is settled and nothing more is: a consumer that goes stops it.
        tokio::spawn(async move {
            let (alive, ended) = oneshot::channel::<()>();
            let options = ServeOptions::new().max_connections(MANY).grace(Duration::ZERO);
            let serving = serve(listener, router, options, async { drop(ended.await) });
            let pushing = async move {
                let _ = push.run(&mut gated).await; // its error ends the consumer's stream, as its end does
                drop(alive);
            };
            let _ = futures::join!(serving, pushing);
        });
        let decisions = Decisions { shared, open: Mutex::default(), numbers: AtomicU64::new(0) };
        let arrivals = Arrivals { handed, decisions: Arc::new(decisions), settling: None };
        Ok(Subscription::new(topic.clone(), options, Box::new(arrivals), control))
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.0.history(topic, from, limit).await
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.0.clear_topic(topic).await
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.0.trim_topic(topic, filter).await
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.0.inspect(topic).await
    }

    fn status(&self) -> StatusWatch {
        self.0.status()
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.0.close(within).await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        self.0.leases()
    }
}

/// What was pushed, by whom it was taken, and what becomes of it.
struct Arrival {
    pushed: Pushed,
    taken: oneshot::Sender<()>,
    decide: oneshot::Sender<Settlement>,
}

/// The handler behind the URL: hands over, and answers as the consumer decides.
async fn consume(hand: mpsc::UnboundedSender<Arrival>, pushed: Pushed) -> Result<(), Failure> {
    let ((taken, is_taken), (decide, decided)) = (oneshot::channel(), oneshot::channel());
    let handed = hand.send(Arrival { pushed, taken, decide }).is_ok();
    if !handed || !matches!(tokio::time::timeout(UNASKED, is_taken).await, Ok(Ok(()))) {
        return Err(Failure::release());
    }
    match decided.await {
        Ok(Settlement::Done) => Ok(()),
        Ok(Settlement::Retry { after: None, reason }) => Err(Failure::retry(reason.unwrap_or_default())),
        Ok(Settlement::Retry { after: Some(after), reason }) => Err(Failure::retry_after(after, reason.unwrap_or_default())),
        Ok(Settlement::DeadLetter { reason }) => Err(Failure::dead_letter(reason)),
        _ => Err(Failure::release()),
    }
}

/// One hand-over: an event and which attempt it is.
type Key = (EventId, u32);

fn key(delivery: &Delivery) -> Key {
    (delivery.event().id().clone(), delivery.attempt())
}

/// What both ends of a subscription share.
struct Shared {
    below: SubscriptionHandle,
    /// The consumer asks for one more.
    asked: AtomicBool,
    /// The delivery that has neither been taken by the consumer nor given back: no other is pushed beside it, which could overtake it.
    travelling: AtomicU64,
    stopped: AtomicBool,
    pusher: AtomicWaker,
    consumer: AtomicWaker,
    outcomes: Mutex<Outcomes>,
}

/// What settlements come to below, by event and attempt.
#[derive(Default)]
struct Outcomes {
    /// Who waits to hear it.
    waiting: HashMap<Key, oneshot::Sender<Settled>>,
    /// What was lost below: the pusher hangs up, and a decision that crosses with that reaches nobody.
    lost: HashSet<Key>,
}

impl Shared {
    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.below.stop();
        self.pusher.wake();
        self.consumer.wake();
    }

    /// Whether the next may be pushed.
    fn wants(&self) -> bool {
        let asked = self.asked.load(Ordering::SeqCst) && self.travelling.load(Ordering::SeqCst) == NOTHING;
        asked || self.stopped.load(Ordering::SeqCst)
    }

    /// Where to hear what a settlement came to; none if it is too late for any.
    fn outcome(&self, key: Key) -> Option<Receipt> {
        let mut outcomes = self.outcomes.lock();
        if outcomes.lost.contains(&key) {
            return None;
        }
        let (tell, told) = Receipt::pending();
        outcomes.waiting.insert(key, tell);
        Some(told)
    }

    fn lose(&self, key: Key) {
        let mut outcomes = self.outcomes.lock();
        let waiting = outcomes.waiting.remove(&key);
        outcomes.lost.insert(key);
        let _ = waiting.map(|waiting| waiting.send(Settled::TooLate)); // nobody may want to know
    }

    fn arrived(&self) {
        self.travelling.store(NOTHING, Ordering::SeqCst);
        self.pusher.wake();
    }
}

/// What is pushed: taken from the bus when the consumer at the other end asks, and not before, as a handler that is free does.
struct Gate {
    source: Box<dyn Source>,
    shared: Arc<Shared>,
    held: Arc<Tap>,
}

/// Passes settlements on to the bus, and what they came to on to who decided.
struct Tap {
    shared: Arc<Shared>,
    deliveries: Mutex<HashMap<u64, Delivery>>,
    numbers: AtomicU64,
}

impl Source for Gate {
    fn poll_next(&mut self, cx: &mut Context<'_>, _: AckMode) -> Poll<Option<Result<Delivery>>> {
        self.shared.pusher.register(cx.waker());
        if !self.shared.wants() {
            return Poll::Pending;
        }
        let next = ready!(self.source.poll_next(cx, AckMode::Manual));
        self.shared.asked.store(false, Ordering::SeqCst);
        Poll::Ready(next.map(|next| next.map(|delivery| self.held.hold(delivery))))
    }
}

impl Tap {
    fn hold(self: &Arc<Self>, delivery: Delivery) -> Delivery {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let held = Delivery::held(delivery.event().clone(), delivery.attempt(), self.clone(), number);
        self.deliveries.lock().insert(number, delivery);
        self.shared.travelling.store(number, Ordering::SeqCst);
        held
    }
}

impl Settler for Tap {
    fn settle(&self, number: u64, settlement: Settlement) -> Receipt {
        let Some(delivery) = self.deliveries.lock().remove(&number) else { return Receipt::ready(Settled::TooLate) };
        let key = key(&delivery);
        let receipt = delivery.settle(settlement);
        if self.shared.travelling.load(Ordering::SeqCst) == number {
            self.shared.arrived(); // back
        }
        let Some(waiting) = self.shared.outcomes.lock().waiting.remove(&key) else { return receipt };
        if let Some(settled) = receipt.now() {
            let _ = waiting.send(settled); // nobody may want to know
            return receipt;
        }
        let (tell, told) = Receipt::pending();
        tokio::spawn(async move {
            let settled = receipt.await;
            let _ = (waiting.send(settled), tell.send(settled)); // nobody may want to know
        });
        told
    }

    fn extend(&self, number: u64) -> Receipt {
        self.deliveries.lock().get(&number).map_or(Receipt::ready(Settled::TooLate), Delivery::extend)
    }

    fn poll_revoked(&self, number: u64, cx: &mut Context<'_>) -> Poll<()> {
        let deliveries = self.deliveries.lock();
        let Some(delivery) = deliveries.get(&number) else { return Poll::Ready(()) };
        ready!(pin!(delivery.revoked()).poll(cx));
        self.shared.lose(key(delivery));
        Poll::Ready(())
    }
}

/// What arrives at the URL, as a consumer's source.
struct Arrivals {
    handed: mpsc::UnboundedReceiver<Arrival>,
    decisions: Arc<Decisions>,
    /// What is settled by being handed over, until it is settled below.
    settling: Option<(Pushed, Receipt)>,
}

/// Where a consumer's decisions go.
struct Decisions {
    shared: Arc<Shared>,
    open: Mutex<HashMap<u64, (Key, oneshot::Sender<Settlement>)>>,
    numbers: AtomicU64,
}

impl Source for Arrivals {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let shared = self.decisions.shared.clone();
        shared.consumer.register(cx.waker());
        loop {
            if shared.stopped.load(Ordering::SeqCst) {
                return Poll::Ready(None);
            }
            if let Some((pushed, settled)) = &mut self.settling {
                let settled = ready!(settled.poll_unpin(cx));
                let delivery = Delivery::settled(pushed.event().clone(), pushed.attempt());
                self.settling = None;
                if settled != Settled::TooLate {
                    return Poll::Ready(Some(Ok(delivery)));
                }
            }
            match self.handed.poll_recv(cx) {
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some(Arrival { pushed, taken, decide })) => {
                    if taken.send(()).is_err() {
                        continue; // it is given back
                    }
                    shared.arrived();
                    if mode == AckMode::Auto {
                        let key = (pushed.event().id().clone(), pushed.attempt());
                        // What was lost goes to another.
                        let Some(settled) = shared.outcome(key.clone()) else { continue };
                        if decide.send(Settlement::Done).is_err() {
                            shared.lose(key);
                        }
                        self.settling = Some((pushed, settled));
                        continue;
                    }
                    let (event, attempt) = (pushed.event().clone(), pushed.attempt());
                    let number = self.decisions.numbers.fetch_add(1, Ordering::Relaxed);
                    self.decisions.open.lock().insert(number, ((event.id().clone(), attempt), decide));
                    return Poll::Ready(Some(Ok(Delivery::held(event, attempt, self.decisions.clone(), number))));
                }
                Poll::Pending => {
                    shared.asked.store(true, Ordering::SeqCst);
                    shared.pusher.wake();
                    return Poll::Pending;
                }
            }
        }
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.decisions.shared.stop();
    }
}

impl Settler for Decisions {
    fn settle(&self, number: u64, settlement: Settlement) -> Receipt {
        let Some((key, decide)) = self.open.lock().remove(&number) else { return Receipt::ready(Settled::TooLate) };
        let Some(outcome) = self.shared.outcome(key.clone()) else { return Receipt::ready(Settled::TooLate) };
        if decide.send(settlement).is_err() {
            self.shared.lose(key); // the pusher has hung up
        }
        outcome
    }

    fn extend(&self, _: u64) -> Receipt {
        Receipt::ready(Settled::Unconfirmed) // an answer is all that a receiver has to say
    }

    fn poll_revoked(&self, number: u64, cx: &mut Context<'_>) -> Poll<()> {
        match self.open.lock().get_mut(&number) {
            Some((_, decide)) => decide.poll_closed(cx),
            None => Poll::Ready(()),
        }
    }
}

/// The consumer's handle: the subscription below, and the consumer's end of it.
struct Handle(Arc<Shared>);

#[async_trait]
impl Control for Handle {
    fn stop(&self) {
        self.0.stop();
    }

    async fn stopped(&self) {
        self.0.below.stopped().await;
    }

    async fn drained(&self) {
        self.0.below.drained().await;
    }

    fn status(&self) -> SubscriptionStatus {
        self.0.below.status()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Handle").field(&self.0.below).finish()
    }
}
