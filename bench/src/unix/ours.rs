//! Ours, as the processes of an application hold it.

use std::sync::Arc;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use pubsub_core::{BoxError, Bus, Event, Group, Positions, PublishError, PublishOptions, SubscribeOptions, Topic};
use pubsub_unix::UnixSocketPubSub;

use super::child::{self, Send, Tally};
use super::spec::{Role, Spec};
use crate::event::read;
use crate::memory::parties::topic;

/// How many events a subscriber reads ahead.
const PREFETCH: usize = 1024;

/// How many events may be on their way at once.
const IN_FLIGHT: usize = 1024;
const IN_FLIGHT_BYTES: usize = 2 << 20;

pub(crate) fn relay(spec: &Spec) -> Result<(), BoxError> {
    let runtime = super::runtime()?;
    let _bus = runtime.block_on(UnixSocketPubSub::connect(&spec.address))?;
    child::say("ready");
    // The broker has a thread of its own; the runtime carries this instance's connection.
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    child::until_the_end();
    Ok(())
}

pub(crate) fn receive(spec: &Spec) -> Result<(), BoxError> {
    super::runtime()?.block_on(async {
        let bus = Bus::from(UnixSocketPubSub::connect(&spec.address).await?);
        let options = if spec.group { SubscribeOptions::group(Group::new("workers")?) } else { SubscribeOptions::fan_out() };
        let mut subscription = bus.subscribe_with(topic(), options.prefetch(PREFETCH)).await?;
        let tally = Tally::of(spec);
        tally.start();
        while let Some(delivery) = subscription.next().await {
            let delivery = delivery?;
            if delivery.lagged() > 0 {
                return Err("some were lost".into());
            }
            tally.add(read(delivery.event())?);
            drop(delivery.done());
        }
        Ok(())
    })
}

struct Publisher {
    bus: Bus,
    topic: Topic,
    sent: FuturesUnordered<BoxFuture<'static, Result<Positions, PublishError>>>,
    most: usize,
}

impl Send for Publisher {
    async fn send(&mut self, events: Vec<Arc<Event>>) -> Result<(), BoxError> {
        let (bus, topic) = (self.bus.clone(), self.topic.clone());
        self.sent.push(Box::pin(async move { bus.publish_with(topic, &events, PublishOptions::default()).await }));
        // It begins when it is polled.
        if let Some(Some(sent)) = self.sent.next().now_or_never() {
            sent?;
        }
        while self.sent.len() >= self.most
            && let Some(sent) = self.sent.next().await
        {
            sent?;
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), BoxError> {
        while let Some(sent) = self.sent.next().await {
            sent?;
        }
        Ok(())
    }
}

pub(crate) fn publish(spec: &Spec) -> Result<(), BoxError> {
    super::runtime()?.block_on(async {
        let bus = Bus::from(UnixSocketPubSub::connect(&spec.address).await?);
        let most = match spec.role {
            Role::Publish { batch, .. } => IN_FLIGHT.min(IN_FLIGHT_BYTES / spec.size).div_ceil(batch),
            _ => 1,
        };
        child::publish(spec, Publisher { bus, topic: topic(), sent: FuturesUnordered::new(), most }).await
    })?;
    child::until_the_end();
    Ok(())
}
