//! A bus that takes its leases from another.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pubsub_core::{
    Bus, Capabilities, Closed, Event, LeaseProvider, Page, Positions, PubSub, PublishError, PublishOptions, Result, Start,
    StatusWatch, SubscribeOptions, Subscription, Topic, TopicStatus, TrimFilter, with_leases,
};
use tokio::time::Instant;

/// The bus with the lender's leases beside it. The lender is the caller's no more: it is closed, or dropped, with the bus.
pub(crate) fn lend(bus: Bus, lender: Bus, leases: Arc<dyn LeaseProvider>) -> Bus {
    let inner = with_leases(bus.backend().clone(), leases);
    Bus::from(Lent { inner, lender })
}

/// Everything is the inner bus's, but closing closes the lender too.
#[derive(Debug)]
struct Lent {
    inner: Arc<dyn PubSub>,
    lender: Bus,
}

#[async_trait]
impl PubSub for Lent {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        self.inner.publish(topic, events, options).await
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.inner.subscribe(topic, options).await
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.inner.history(topic, from, limit).await
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.inner.clear_topic(topic).await
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.inner.trim_topic(topic, filter).await
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.inner.inspect(topic).await
    }

    fn status(&self) -> StatusWatch {
        self.inner.status()
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        // One after the other: handlers that are finishing may still need their leases.
        let started = Instant::now();
        let closed = self.inner.close(within).await;
        let lender = self.lender.close(within.saturating_sub(started.elapsed())).await;
        closed.and_then(|closed| lender.map(|_| closed))
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        self.inner.leases()
    }
}
