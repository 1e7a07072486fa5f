//! Where a watch's exhausted deliveries go: to the bus below, like those of any other subscription.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use pubsub_core::machinery::DeadLetterSink;
use pubsub_core::{Event, PubSub, PublishOptions, Topic};
use tokio::time::Instant;

/// How long a bus that refuses a letter is asked again.
const PATIENCE: Duration = Duration::from_secs(60);

/// The back-off between two tries, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

pub(crate) struct Letters(pub(crate) Arc<dyn PubSub>);

impl DeadLetterSink for Letters {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        let (bus, topic, letter) = (self.0.clone(), topic.clone(), Arc::new(letter));
        let events = [letter];
        if let Some(Ok(_)) = bus.publish_now(&topic, &events, &PublishOptions::new()) {
            return None;
        }
        let deliver = async move {
            let give_up = Instant::now() + PATIENCE;
            let mut pause = BACKOFF.0;
            while let Err(error) = bus.publish(&topic, &events, PublishOptions::new()).await {
                if !error.kind().is_retryable() || Instant::now() >= give_up {
                    tracing::error!(%topic, letter = %events[0].id(), %error, "a dead letter could not be published");
                    return;
                }
                tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                pause = (pause * 2).min(BACKOFF.1);
            }
        };
        Some(deliver.boxed())
    }
}
