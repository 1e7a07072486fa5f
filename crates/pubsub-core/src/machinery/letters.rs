//! Dead letters as what they are to most buses: events to publish.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::{Instant, sleep};

use super::{DeadLetterSink, Pause};
use crate::{Event, PubSub, PublishOptions, Topic};

/// How long a bus that refuses a letter is asked again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Publishes dead letters on a bus, which is asked again for a minute while its errors are retryable. Then the letter is given up, and
/// that is logged.
///
/// `bus` returns none once there is no bus any more: queues must not keep alive the bus that owns them.
pub fn publish_letters(
    options: PublishOptions,
    bus: impl Fn() -> Option<Arc<dyn PubSub>> + Send + Sync + 'static,
) -> Arc<dyn DeadLetterSink> {
    Arc::new(Letters { options, bus })
}

struct Letters<B> {
    options: PublishOptions,
    bus: B,
}

impl<B: Fn() -> Option<Arc<dyn PubSub>> + Send + Sync + 'static> DeadLetterSink for Letters<B> {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        let (bus, topic, options) = ((self.bus)()?, topic.clone(), self.options.clone());
        let events = [Arc::new(letter)];
        if let Some(Ok(_)) = bus.publish_now(&topic, &events, &options) {
            return None;
        }
        let deliver = async move {
            let give_up = Instant::now() + PATIENCE;
            let mut pause = Pause::new();
            while let Err(error) = bus.publish(&topic, &events, options.clone()).await {
                if !error.kind().is_retryable() || Instant::now() >= give_up {
                    tracing::error!(%topic, letter = %events[0].id(), %error, "a dead letter could not be published");
                    return;
                }
                sleep(pause.step()).await;
            }
        };
        Some(deliver.boxed())
    }
}
