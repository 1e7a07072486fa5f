//! A decorator over an emitter and a store, both watched, and what tests do with it.

use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::FutureExt;
use pubsub_cache::{CachingPubSub, OnStoreFailure};
use pubsub_core::{AckMode, Delivery, Event, PubSub, Result, RetryPolicy, Start, SubscribeOptions, Subscription};
use pubsub_emitter::EventEmitterPubSub;

use super::{FaultyStore, Spy, event, publish, topic, until, within};

pub(crate) const SOON: Duration = Duration::from_secs(5);

pub(crate) struct World {
    pub(crate) bus: CachingPubSub,
    pub(crate) spy: Arc<Spy>,
    pub(crate) store: Arc<FaultyStore>,
}

/// A decorator over an emitter and a store, both watched.
pub(crate) fn world() -> World {
    made(|_| (), OnStoreFailure::Continue, true)
}

pub(crate) fn made(with: impl Fn(&FaultyStore), mode: OnStoreFailure, now: bool) -> World {
    let (spy, store) = (Spy::with(EventEmitterPubSub::new(), now), FaultyStore::new(now));
    with(&store);
    let builder = CachingPubSub::builder(spy.clone(), store.clone()).on_store_failure(mode);
    World { bus: builder.store_timeout(Duration::from_secs(1)).build().unwrap(), spy, store }
}

pub(crate) async fn subscribe(bus: &CachingPubSub, name: &str, options: SubscribeOptions) -> Result<Subscription> {
    within("subscribe", bus.subscribe(&topic(name), options)).await
}

pub(crate) async fn from(bus: &CachingPubSub, name: &str, start: Start) -> Subscription {
    subscribe(bus, name, SubscribeOptions::fan_out().start(start)).await.unwrap()
}

pub(crate) fn manual(start: Start) -> SubscribeOptions {
    let retry = RetryPolicy::new().max_attempts(3).backoff(Duration::from_millis(5), Duration::from_millis(5));
    SubscribeOptions::fan_out().start(start).ack_mode(AckMode::Manual).retry(retry)
}

pub(crate) fn indices<'a>(events: impl IntoIterator<Item = &'a Arc<Event>>) -> Vec<Option<u64>> {
    events.into_iter().map(|event| event.index().map(|place| place.index)).collect()
}

pub(crate) fn events_of(deliveries: &[Delivery]) -> Vec<Arc<Event>> {
    deliveries.iter().map(|delivery| delivery.event().clone()).collect()
}

/// Publishes a fence, and reads up to it.
pub(crate) async fn rest(bus: &CachingPubSub, name: &str, subscription: &mut Subscription) -> Vec<Arc<Event>> {
    let fence = event("fence");
    publish(bus, &topic(name), std::slice::from_ref(&fence)).await;
    events_of(&until(subscription, fence.id()).await)
}

/// Polls a future so many times, or until it is ready.
pub(crate) async fn poll_times<F: Future + Unpin>(future: &mut F, times: usize) -> Option<F::Output> {
    for time in 0..times {
        if let Poll::Ready(output) = future.poll_unpin(&mut Context::from_waker(Waker::noop())) {
            return Some(output);
        }
        if time + 1 < times {
            tokio::task::yield_now().await;
        }
    }
    None
}
