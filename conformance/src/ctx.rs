//! What a property works with: a bus under test, and helpers that bound every wait.

use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use pubsub_core::{
    Bus, Capabilities, Delivery, Event, EventId, Group, LateSettlement, PublishOptions, Receipt, RetryPolicy, RunReport,
    Settled, SubscribeOptions, Subscription, SubscriptionHandle, Topic,
};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::oracle::{Recorder, delivered};
use crate::{FENCE, Harness, Mismatch, Timing, Verdict};

/// How often [`Ctx::eventually`] looks.
const LOOK: Duration = Duration::from_millis(2);

/// What a property is given. Cheap to clone.
#[derive(Clone)]
pub struct Ctx(Arc<Inner>);

struct Inner {
    harness: Arc<dyn Harness>,
    capabilities: Capabilities,
    seed: u64,
    rng: Mutex<fastrand::Rng>,
    names: AtomicU64,
    events: AtomicU64,
    bus: tokio::sync::OnceCell<Bus>,
    broken: Mutex<Vec<String>>,
}

impl Ctx {
    pub(crate) fn new(harness: Arc<dyn Harness>, property: &str, seed: u64) -> Self {
        let salt = property.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        Self(Arc::new(Inner {
            capabilities: harness.declared(),
            harness,
            seed,
            rng: Mutex::new(fastrand::Rng::with_seed(seed ^ salt)),
            names: AtomicU64::new(0),
            events: AtomicU64::new(0),
            bus: tokio::sync::OnceCell::new(),
            broken: Mutex::default(),
        }))
    }

    /// The harness: fresh, and this property's own.
    pub fn harness(&self) -> &dyn Harness {
        &*self.0.harness
    }

    /// What the backend is declared to do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.0.capabilities
    }

    /// The durations that suit the backend.
    pub fn timing(&self) -> Timing {
        self.0.harness.timing()
    }

    /// The seed of this run.
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// A source of chance that is the same for the same seed, as long as the calls come in the same order.
    pub fn rng(&self) -> fastrand::Rng {
        self.0.rng.lock().fork()
    }

    /// The property's main instance, the same at every call.
    pub async fn bus(&self) -> Verdict<Bus> {
        self.0.bus.get_or_try_init(|| self.connect()).await.cloned()
    }

    /// Another instance on the same bus.
    pub async fn connect(&self) -> Verdict<Bus> {
        Ok(Bus::new(self.within("connect", self.0.harness.connect()).await??))
    }

    /// An instance on another bus of the same kind.
    pub async fn elsewhere(&self) -> Verdict<Bus> {
        let other = self.within("a fresh bus", self.0.harness.fresh()).await??;
        Ok(Bus::new(self.within("connect", other.connect()).await??))
    }

    /// A topic that nobody else uses; the hint makes it readable.
    pub fn topic(&self, hint: &str) -> Topic {
        Topic::new(self.name(hint)).expect("a hint is a short plain word")
    }

    /// A group that nobody else uses.
    pub fn group(&self, hint: &str) -> Group {
        Group::new(self.name(hint)).expect("a hint is a short plain word")
    }

    fn name(&self, hint: &str) -> String {
        // Unique in the world, for harnesses whose fresh buses share a server.
        let unique = EventId::random().to_string();
        format!("{hint}.{}.{}", self.0.names.fetch_add(1, Ordering::Relaxed), &unique[..8])
    }

    /// A new event whose type is `conformance.event` and whose data is a number, one more each time.
    pub fn event(&self) -> Arc<Event> {
        let number = self.0.events.fetch_add(1, Ordering::Relaxed);
        Arc::new(Event::new("conformance.event").with_run_id("run").with_data(number))
    }

    /// So many [events](Self::event).
    pub fn events(&self, count: usize) -> Vec<Arc<Event>> {
        (0..count).map(|_| self.event()).collect()
    }

    /// Publishes so many new events one by one and returns them.
    pub async fn publish(&self, bus: &Bus, topic: &Topic, count: usize) -> Verdict<Vec<Arc<Event>>> {
        let events = self.events(count);
        for event in &events {
            self.within("publish", bus.publish(topic, event.clone())).await??;
        }
        Ok(events)
    }

    /// Publishes these events in one call.
    pub async fn publish_all(&self, bus: &Bus, topic: &Topic, events: &[Arc<Event>]) -> Verdict {
        self.within("publish", bus.publish_with(topic, events, PublishOptions::new())).await??;
        Ok(())
    }

    /// The default retry policy with the harness's back-off, four times that at most, without jitter.
    pub fn retry(&self) -> RetryPolicy {
        let backoff = self.timing().backoff;
        RetryPolicy::new().backoff(backoff, 4 * backoff).jitter(0.0)
    }

    /// Fan-out with the retry policy of [`retry`](Self::retry).
    pub fn fan_out(&self) -> SubscribeOptions {
        SubscribeOptions::fan_out().retry(self.retry())
    }

    /// Membership with the retry policy of [`retry`](Self::retry).
    pub fn member(&self, group: &Group) -> SubscribeOptions {
        SubscribeOptions::group(group.clone()).retry(self.retry())
    }

    /// Subscribes, within the harness's patience.
    pub async fn subscribe(&self, bus: &Bus, topic: &Topic, options: SubscribeOptions) -> Verdict<Subscription> {
        Ok(self.within("subscribe", bus.subscribe_with(topic, options)).await??)
    }

    /// Waits for something that must happen, as long as the harness has patience.
    ///
    /// # Errors
    /// Says what did not happen.
    pub async fn within<T>(&self, what: impl Display, future: impl Future<Output = T>) -> Verdict<T> {
        let patience = self.timing().patience;
        match tokio::time::timeout(patience, future).await {
            Ok(done) => Ok(done),
            Err(_) => Err(Mismatch::new(format!("{what}: not within {patience:?}"))),
        }
    }

    /// Waits until a condition holds, as long as the harness has patience.
    ///
    /// # Errors
    /// Says what did not become true.
    pub async fn eventually(&self, what: impl Display, condition: impl Fn() -> bool) -> Verdict {
        let until = Instant::now() + self.timing().patience;
        while !condition() {
            if Instant::now() >= until {
                return Err(Mismatch::new(format!("never came true: {what}")));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Like [`eventually`](Self::eventually), for conditions that must be asked for.
    ///
    /// # Errors
    /// Says what did not become true, and what asking fails with.
    pub async fn eventually_async<F, Fut>(&self, what: impl Display, condition: F) -> Verdict
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Verdict<bool>>,
    {
        let until = Instant::now() + self.timing().patience;
        while !self.within(&what, condition()).await?? {
            if Instant::now() >= until {
                return Err(Mismatch::new(format!("never came true: {what}")));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The next delivery, unsettled if the subscription settles by hand.
    ///
    /// # Errors
    /// If none comes, or the stream ends.
    pub async fn next(&self, subscription: &mut Subscription) -> Verdict<Delivery> {
        match self.within("the next delivery", subscription.next()).await? {
            Some(delivery) => Ok(delivery?),
            None => Err(Mismatch::new("the stream ended where a delivery was due")),
        }
    }

    /// The next so many deliveries, unsettled if the subscription settles by hand: keep `max_in_flight` in mind.
    ///
    /// # Errors
    /// Says how many came, if fewer do.
    pub async fn collect(&self, subscription: &mut Subscription, count: usize) -> Verdict<Vec<Delivery>> {
        let mut deliveries = Vec::with_capacity(count);
        while deliveries.len() < count {
            let next = self.next(subscription).await;
            deliveries.push(next.map_err(|why| why.at(format!("after {} of {count}", deliveries.len())))?);
        }
        Ok(deliveries)
    }

    /// Reads so many deliveries, settles each as done, and returns their ids.
    ///
    /// # Errors
    /// Says how many came, if fewer do.
    pub async fn collect_done(&self, subscription: &mut Subscription, count: usize) -> Verdict<Vec<EventId>> {
        let mut ids = Vec::with_capacity(count);
        while ids.len() < count {
            let next = self.next(subscription).await;
            let delivery = next.map_err(|why| why.at(format!("after {} of {count}", ids.len())))?;
            ids.push(delivery.event().id().clone());
            drop(delivery.done());
        }
        Ok(ids)
    }

    /// Waits for the stream to end, discarding (settling) nothing: a delivery before the end is a mismatch.
    ///
    /// # Errors
    /// If it does not end, or yields something first.
    pub async fn ended(&self, subscription: &mut Subscription) -> Verdict {
        match self.within("the end of the stream", subscription.next()).await? {
            None => Ok(()),
            Some(Ok(delivery)) => Err(Mismatch::new(format!("{delivery:?} where the stream should have ended"))),
            Some(Err(error)) => Err(Mismatch::new(format!("{error} where the stream should have ended"))),
        }
    }

    /// Publishes a fence: an event of type [`FENCE`] that must arrive behind whatever was published before it.
    pub async fn fence(&self, bus: &Bus, topic: &Topic) -> Verdict<EventId> {
        let fence = Arc::new(Event::new(FENCE).with_run_id("run"));
        self.within("publish a fence", bus.publish(topic, fence.clone())).await??;
        Ok(fence.id().clone())
    }

    /// Reads up to a fence and returns what came before it, unsettled if the subscription settles by hand; the fence is
    /// settled. Where the backend declares no order, it also reads until nothing has come for the quiet time. For fan-out
    /// and for groups with a single member.
    ///
    /// # Errors
    /// If the fence does not come.
    pub async fn until(&self, subscription: &mut Subscription, fence: &EventId) -> Verdict<Vec<Delivery>> {
        let mut before = Vec::new();
        loop {
            let next = self.next(subscription).await;
            let delivery = next.map_err(|why| why.at(format!("waiting for a fence, after {} others", before.len())))?;
            if delivery.event().id() == fence {
                drop(delivery.done());
                break;
            }
            before.push(delivery);
        }
        if !self.capabilities().supports(pubsub_core::Capability::PublisherOrder) {
            while let Ok(Some(late)) = tokio::time::timeout(self.timing().quiet, subscription.next()).await {
                before.push(late?);
            }
        }
        Ok(before)
    }

    /// Publishes a fence and holds the subscription to delivering nothing before it.
    ///
    /// # Errors
    /// Names what was delivered.
    pub async fn nothing_before_fence(&self, subscription: &mut Subscription, bus: &Bus, topic: &Topic) -> Verdict {
        let fence = self.fence(bus, topic).await?;
        let extra = self.until(subscription, &fence).await?;
        crate::ensure!(extra.is_empty(), "nothing was due, but there came {extra:?}");
        Ok(())
    }

    /// Watches for the quiet time that a subscription delivers nothing. A second line of defence for what no fence orders:
    /// retries that must not come.
    ///
    /// # Errors
    /// Names what was delivered.
    pub async fn quiet(&self, subscription: &mut Subscription) -> Verdict {
        match tokio::time::timeout(self.timing().quiet, subscription.next()).await {
            Err(_) => Ok(()),
            Ok(None) => Err(Mismatch::new("the stream ended where it should have been quiet")),
            Ok(Some(next)) => Err(Mismatch::new(format!("nothing was due, but there came {:?}", next?))),
        }
    }

    /// Reads a subscription in a task of its own, records every hand-over and settles it as done.
    pub fn consume(&self, subscription: Subscription, recorder: &Recorder, name: &str) -> Consumer {
        self.consume_with(subscription, recorder, name, |delivery| {
            drop(delivery.done());
            std::future::ready(())
        })
    }

    /// Reads a subscription in a task of its own, records every hand-over, and then does what `then` says with it, one at a
    /// time. An error of the stream, or a panic, fails the property.
    pub fn consume_with<F, Fut>(&self, mut subscription: Subscription, recorder: &Recorder, name: &str, then: F) -> Consumer
    where
        F: Fn(Delivery) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send,
    {
        let handle = subscription.handle();
        let (recorder, ctx, by) = (recorder.clone(), self.clone(), name.to_owned());
        let task = self.spawn(async move {
            while let Some(next) = subscription.next().await {
                match next {
                    Ok(delivery) => {
                        recorder.received(by.as_str(), &delivery);
                        then(delivery).await;
                    }
                    Err(error) => ctx.broken(format!("the stream of {by} failed: {error}")),
                }
            }
        });
        Consumer { handle, name: name.to_owned(), task }
    }

    /// Runs something beside the property. A panic in it fails the property.
    pub fn spawn<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> JoinHandle<Option<T>> {
        let ctx = self.clone();
        tokio::spawn(async move {
            match std::panic::AssertUnwindSafe(future).catch_unwind().await {
                Ok(done) => Some(done),
                Err(panic) => {
                    ctx.broken(format!("a task of the property panicked: {}", crate::suite::panic_text(&*panic)));
                    None
                }
            }
        })
    }

    /// Waits for what [`spawn`](Self::spawn) runs.
    ///
    /// # Errors
    /// If it does not end in time or panics.
    pub async fn join<T>(&self, what: impl Display, task: JoinHandle<Option<T>>) -> Verdict<T> {
        match self.within(&what, task).await? {
            Ok(Some(done)) => Ok(done),
            Ok(None) | Err(_) => Err(Mismatch::new(format!("{what}: panicked"))),
        }
    }

    /// How many tasks live on this property's runtime, which nothing else uses; itself included.
    pub fn alive_tasks(&self) -> usize {
        tokio::runtime::Handle::current().metrics().num_alive_tasks()
    }

    /// Publishes a fence and waits until each of these consumers, all of them fan-out, has recorded it.
    pub async fn fence_consumers(&self, bus: &Bus, topic: &Topic, recorder: &Recorder, consumers: &[&Consumer]) -> Verdict {
        let fence = self.fence(bus, topic).await?;
        for consumer in consumers {
            let what = format!("the fence at {}", consumer.name);
            self.eventually(what, || recorder.saw_by(&consumer.name, &fence)).await?;
        }
        Ok(())
    }

    /// Waits until each of these consumers has nothing queued, held or due to come back.
    pub async fn drained(&self, consumers: &[&Consumer]) -> Verdict {
        for consumer in consumers {
            self.within(format!("{} drained", consumer.name), consumer.handle.drained()).await?;
        }
        Ok(())
    }

    pub(crate) fn broken(&self, what: String) {
        self.0.broken.lock().push(what);
    }

    pub(crate) fn take_broken(&self) -> Vec<String> {
        std::mem::take(&mut self.0.broken.lock())
    }
}

/// A consumer in a task of its own. Dropping it cancels the task, and with it the subscription.
#[derive(Debug)]
pub struct Consumer {
    handle: SubscriptionHandle,
    name: String,
    task: JoinHandle<Option<()>>,
}

impl Consumer {
    /// The handle of its subscription.
    pub fn handle(&self) -> &SubscriptionHandle {
        &self.handle
    }

    /// The name it records under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stops the subscription and waits until its task has ended: it records nothing more.
    pub async fn leave(mut self, ctx: &Ctx) -> Verdict {
        self.handle.stop();
        let task = std::mem::replace(&mut self.task, tokio::spawn(std::future::ready(Some(()))));
        ctx.join(format!("{} to end", self.name), task).await
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Panics as a property means its handlers to, without the message and back trace that look like trouble.
pub fn panic_on_purpose(why: &'static str) -> ! {
    std::panic::resume_unwind(Box::new(why))
}

/// Holds deliveries to exactly these events, each once, in whatever order.
///
/// # Errors
/// Names what is missing, extra and repeated.
pub fn exactly<'a>(sent: &[Arc<Event>], deliveries: impl IntoIterator<Item = &'a Delivery>) -> Verdict {
    crate::oracle::exactly_once(&crate::oracle::ids(sent), &delivered(deliveries))
}

/// What several sections ask about settlements.
impl Ctx {
    /// The answer of a receipt, within the harness's patience.
    ///
    /// # Errors
    /// If it does not resolve.
    pub async fn answer(&self, receipt: Receipt) -> Verdict<Settled> {
        self.within("the answer to a settlement", receipt).await
    }

    /// Holds a receipt to [`Settled::Done`]; a backend that does not [confirm](crate::Harness::confirms) everything may be silent.
    ///
    /// # Errors
    /// If it says otherwise, or does not resolve.
    pub async fn confirmed(&self, receipt: Receipt) -> Verdict {
        let answer = self.answer(receipt).await?;
        crate::ensure!(self.is_done(answer), "a settlement was answered {answer:?}");
        Ok(())
    }

    /// Whether an answer is what a settlement that reached the backend gets from it.
    pub fn is_done(&self, answer: Settled) -> bool {
        answer == Settled::Done || (answer == Settled::Unconfirmed && !self.harness().confirms())
    }

    /// Holds a runner to having had all its settlements confirmed, as far as the backend confirms them.
    ///
    /// # Errors
    /// Says how many were not.
    pub fn all_confirmed(&self, report: &RunReport) -> Verdict {
        crate::ensure!(report.unconfirmed == 0 || !self.harness().confirms(), "unconfirmed settlements in {report:?}");
        Ok(())
    }

    /// Holds the answer to a settlement or an extension by somebody who has lost the delivery to what the backend declares.
    ///
    /// # Errors
    /// If it says otherwise, or does not resolve.
    pub async fn refused(&self, receipt: Receipt) -> Verdict {
        let answer = self.answer(receipt).await?;
        let may_not_know = self.capabilities().late_settlement == LateSettlement::Unconfirmed;
        let fits = answer == Settled::TooLate || (may_not_know && answer == Settled::Unconfirmed);
        crate::ensure!(fits, "a late settlement was answered {answer:?}");
        Ok(())
    }

    /// Holds subscriptions, all of them fan-out or the only members of their groups, to being done with a topic: they drain
    /// without a delivery, a fence is the next they get, and nothing comes in the quiet time behind it.
    ///
    /// # Errors
    /// Names what was delivered.
    pub async fn nothing_more<const N: usize>(
        &self,
        bus: &Bus,
        topic: &Topic,
        subscriptions: [&mut Subscription; N],
    ) -> Verdict {
        let mut subscriptions = subscriptions;
        for subscription in &mut subscriptions {
            let handle = subscription.handle();
            let drained = std::pin::pin!(handle.drained());
            // Read meanwhile, so that what should not have come is named.
            match self.within("drained", futures::future::select(drained, subscription.next())).await? {
                futures::future::Either::Left(_) => {}
                futures::future::Either::Right((next, _)) => {
                    return Err(Mismatch::new(format!("nothing was due, but there came {next:?}")));
                }
            }
        }
        let fence = self.fence(bus, topic).await?;
        for subscription in subscriptions {
            let extra = self.until(subscription, &fence).await?;
            crate::ensure!(extra.is_empty(), "nothing was due, but there came {extra:?}");
            self.quiet(subscription).await?;
        }
        Ok(())
    }
}

/// Holds deliveries to exactly these events, each once, in this order.
///
/// # Errors
/// Names what is missing, extra and repeated, or the first pair that is the wrong way round.
pub fn in_sequence(sent: &[Arc<Event>], deliveries: &[Delivery]) -> Verdict {
    exactly(sent, deliveries)?;
    crate::oracle::in_order(&crate::oracle::ids(sent), &delivered(deliveries))
}

/// A publisher beside the property: what sections about arriving in the middle of a stream of events have in common.
impl Ctx {
    /// Publishes events of one run, one after the other, in a task of its own, and notes each under the run's name before it
    /// is sent.
    pub fn publisher(
        &self,
        bus: &Bus,
        topic: &Topic,
        recorder: &Recorder,
        run: &str,
        count: usize,
    ) -> JoinHandle<Option<Verdict>> {
        let (ctx, bus, topic, recorder, run) = (self.clone(), bus.clone(), topic.clone(), recorder.clone(), run.to_owned());
        self.spawn(async move {
            for _ in 0..count {
                let event = Arc::new(Event::clone(&ctx.event()).with_run_id(&run));
                recorder.published(run.as_str(), &event);
                ctx.within("publish", bus.publish(&topic, event)).await??;
            }
            Ok(())
        })
    }
}
