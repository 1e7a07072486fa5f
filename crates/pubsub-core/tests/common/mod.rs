//! What the tests of this crate share: queues with a journal of dead letters, numbered events, and waits that end.
#![allow(dead_code, unreachable_pub)] // each test file uses its part, as a module of its own

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use pubsub_core::machinery::{Aftermath, DeadLetterSink, DeliveryQueue, Entry, InstanceId, Timer};
use pubsub_core::{AckMode, Delivery, Event, Group, RetryPolicy, SubscribeOptions, Subscription, Topic};

/// The instance that tests are on unless they say otherwise.
pub const HERE: InstanceId = 1;
pub const THERE: InstanceId = 2;

pub fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub fn name<T: for<'a> TryFrom<&'a str>>(text: &str) -> T {
    T::try_from(text).ok().expect("a valid name")
}

/// Keeps dead letters.
#[derive(Default)]
pub struct Letters(pub Mutex<Vec<(Topic, Event)>>);

impl DeadLetterSink for Letters {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        self.0.lock().push((topic.clone(), letter));
        None
    }
}

/// A timer on the test's runtime, and a place for dead letters.
pub struct Bench {
    pub timer: Arc<Timer>,
    pub letters: Arc<Letters>,
}

impl Bench {
    pub fn new() -> Self {
        Self { timer: Arc::new(Timer::new().expect("within a runtime")), letters: Arc::default() }
    }

    pub fn fan_out(&self, options: SubscribeOptions) -> (Arc<DeliveryQueue>, Subscription) {
        let queue = DeliveryQueue::fan_out(name("t"), self.timer.clone(), self.letters.clone());
        let subscription = join(&queue, HERE, options);
        (queue, subscription)
    }

    pub fn group(&self) -> Arc<DeliveryQueue> {
        DeliveryQueue::group(name("t"), name("g"), self.timer.clone(), self.letters.clone())
    }

    pub fn durable_group(&self, capacity: usize) -> Arc<DeliveryQueue> {
        DeliveryQueue::durable_group(name("t"), name("g"), capacity, self.timer.clone(), self.letters.clone())
    }
}

pub fn join(queue: &Arc<DeliveryQueue>, instance: InstanceId, options: SubscribeOptions) -> Subscription {
    queue.join(instance, options, || ()).expect("the queue has not ended")
}

pub fn member() -> SubscribeOptions {
    SubscribeOptions::group(name::<Group>("g"))
}

/// Retries without jitter: the first back-off, and no attempt limit.
pub fn patient(backoff: Duration) -> RetryPolicy {
    RetryPolicy::new().backoff(backoff, Duration::from_secs(60)).jitter(0.0).max_attempts(0)
}

pub fn event(number: u32) -> Arc<Event> {
    Arc::new(Event::new("numbered").with_data(number))
}

pub fn entries(numbers: impl IntoIterator<Item = u32>) -> impl Iterator<Item = Entry> {
    numbers.into_iter().map(|number| Entry::new(event(number)))
}

pub fn by_hand() -> SubscribeOptions {
    SubscribeOptions::fan_out().ack_mode(AckMode::Manual)
}

pub fn local(numbers: impl IntoIterator<Item = u32>, instance: InstanceId) -> impl Iterator<Item = Entry> {
    entries(numbers).map(move |entry| entry.only(instance))
}

pub fn push(queue: &DeliveryQueue, numbers: impl IntoIterator<Item = u32>) {
    push_entries(queue, entries(numbers));
}

pub fn push_entries(queue: &DeliveryQueue, entries: impl IntoIterator<Item = Entry>) {
    let mut aftermath = Aftermath::new();
    queue.push(entries, &mut aftermath);
    aftermath.finish();
}

pub fn number(delivery: &Delivery) -> u32 {
    *delivery.data::<u32>().expect("a numbered event")
}

/// A wait that ends: with the test's clock paused it costs no time, and nothing that should come takes an hour.
pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(3600), future).await.expect("it should have come")
}

/// The first result of asking a few times in a row: a member that finds nothing may look again before it waits to be woken.
pub fn now<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    (0..10).find_map(|_| ask())
}

/// The next delivery, which is there already, or none. A waker that nobody hears stays behind.
pub fn ready(subscription: &mut Subscription) -> Option<Delivery> {
    // Unconstrained: without awaiting anything, the test would soon have used up what its task may do in one go.
    let next = now(|| tokio::task::coop::unconstrained(subscription.next()).now_or_never());
    next.flatten().map(|delivery| delivery.expect("no error"))
}

/// The next delivery, waited for.
pub async fn next(subscription: &mut Subscription) -> Delivery {
    soon(subscription.next()).await.expect("the stream goes on").expect("no error")
}

/// Takes what is there, settles it as done, and returns its numbers.
pub fn drain(subscription: &mut Subscription) -> Vec<u32> {
    let mut numbers = Vec::new();
    while let Some(delivery) = ready(subscription) {
        numbers.push(number(&delivery));
        drop(delivery.done());
    }
    numbers
}

/// Whether the stream has ended.
pub fn has_ended(subscription: &mut Subscription) -> bool {
    matches!(now(|| tokio::task::coop::unconstrained(subscription.next()).now_or_never()), Some(None))
}
