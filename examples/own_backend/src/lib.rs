//! A backend of one's own: a bus within one process, over the queues that all backends share.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};
use pubsub_core::machinery::{self, Aftermath, Closing, DeliveryQueue, Entry, Timer};
use pubsub_core::*;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

const INSTANCE: u64 = 0; // queues can tell the instances of a bus apart; here there is one

/// A bus for one process and one instance, with fan-out, groups, retries and dead letters. It keeps nothing for those who come later.
#[derive(Debug, Clone)]
pub struct TinyBus(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// One for each fan-out subscription of a topic, and one for each group.
    queues: Mutex<HashMap<Topic, Vec<Arc<DeliveryQueue>>>>,
    closing: Closing,
    timer: Arc<Timer>,
    status: watch::Sender<Status>,
    publish_timeout: Duration,
}

impl TinyBus {
    /// A new bus, at whose full queues publishers wait for so long. Fails outside a tokio runtime.
    pub fn new(publish_timeout: Duration) -> Result<Self> {
        let (timer, status) = (Arc::new(Timer::new()?), watch::Sender::new(Status::Connected));
        let (queues, closing) = (Mutex::default(), Closing::default());
        Ok(Self(Arc::new(Inner { queues, closing, timer, status, publish_timeout })))
    }

    fn open(&self) -> Result<MutexGuard<'_, HashMap<Topic, Vec<Arc<DeliveryQueue>>>>> {
        let queues = self.0.queues.lock(); // a close begins under this lock
        if self.0.closing.has_begun() { Err(Error::closed()) } else { Ok(queues) }
    }

    /// Gives an event to every queue of a topic, or to none and returns one that is full.
    fn offer(&self, topic: &Topic, event: &Arc<Event>) -> Result<Option<Arc<DeliveryQueue>>> {
        let mut aftermath = Aftermath::new(); // ends after the lock is released: it may run anything
        let all = self.open()?;
        let queues = all.get(topic).map_or(&[][..], Vec::as_slice);
        let full = queues.iter().find(|queue| queue.room() == 0 && !queue.is_ended());
        if full.is_none() {
            queues.iter().for_each(|queue| queue.push([Entry::new(event.clone())], &mut aftermath));
        }
        Ok(full.cloned())
    }
}

#[async_trait]
impl PubSub for TinyBus {
    fn capabilities(&self) -> Capabilities {
        Capabilities::in_process()
    }
    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        let prepared = self.open().map(drop).and_then(|()| machinery::prepare(events, &options, &self.capabilities()));
        prepared.map_err(|error| PublishError::none_sent(error.on(topic), events.len()))?;
        let deadline = Instant::now() + options.timeout.unwrap_or(self.0.publish_timeout);
        for (sent, event) in events.iter().enumerate() {
            let failed = |error: Error| PublishError::prefix_sent(error.on(topic), sent, events.len());
            while let Some(full) = self.offer(topic, event).map_err(failed)? {
                timeout_at(deadline, full.room_freed()).await.map_err(|_| failed(ErrorKind::Full.into()))?;
            }
        }
        Ok(Positions::none())
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.open().map(drop).and_then(|()| options.validate(topic, &self.capabilities()))?;
        let mut all = self.open()?;
        all.values_mut().for_each(|queues| queues.retain(|queue| !queue.is_ended()));
        all.retain(|_, queues| !queues.is_empty());
        let queues = all.entry(topic.clone()).or_default();
        let same_group = |queue: &&Arc<DeliveryQueue>| options.group.is_some() && queue.group_name() == options.group.as_ref();
        // A group cannot be joined once its last member has left, be it this very moment: then a new one begins.
        if let Some(joined) = queues.iter().find(same_group).and_then(|queue| queue.join(INSTANCE, options.clone(), || ())) {
            return Ok(joined);
        }
        let bus = Arc::downgrade(&self.0); // queues must not keep alive the bus that owns them
        let letters = machinery::publish_letters(PublishOptions::local_only(), move || Some(Arc::new(Self(bus.upgrade()?))));
        let (topic, timer) = (topic.clone(), self.0.timer.clone());
        queues.push(match options.group.clone() {
            Some(group) => DeliveryQueue::group(topic, group, timer, letters),
            None => DeliveryQueue::fan_out(topic, timer, letters),
        });
        Ok(queues[queues.len() - 1].join(INSTANCE, options, || ()).expect("a new queue has not ended"))
    }

    async fn history(&self, _: &Topic, _: Start, _: usize) -> Result<Page> {
        self.open().and_then(|_| Err(Error::unsupported(Capability::History)))
    }
    async fn clear_topic(&self, _: &Topic) -> Result<()> {
        self.open().map(drop)
    }
    async fn trim_topic(&self, _: &Topic, _: TrimFilter) -> Result<u64> {
        self.open().map(|_| 0)
    }
    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        let all = self.open()?;
        let queues = || all.get(topic).into_iter().flatten().filter(|queue| !queue.is_ended());
        let mut status = TopicStatus::default();
        (status.retained, status.groups) = (Some(0), queues().filter_map(|queue| queue.group_status()).collect());
        status.fan_out = Some(queues().filter(|queue| queue.group_name().is_none()).count() as u64);
        Ok(status)
    }

    fn status(&self) -> StatusWatch {
        StatusWatch::new(self.0.status.subscribe())
    }
    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        None
    }
    async fn flush(&self) -> Result<()> {
        Ok(()) // nothing is under way once its call has returned
    }
    async fn close(&self, within: Duration) -> Result<Closed> {
        let begins = {
            let all = self.0.queues.lock();
            let end = || machinery::end_queues(all.values().flatten().cloned().collect(), INSTANCE, within);
            self.0.closing.begin(&Handle::current(), end)
        };
        if begins {
            self.0.status.send_replace(Status::Closed);
        }
        self.0.closing.ended().await
    }
}
