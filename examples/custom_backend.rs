//! A backend of one's own, whole: an in-process bus over the queues that all backends share, and the URL it is connected by.
//!
//! ```text
//! cargo run --example custom_backend -- 'tiny:?max_payload=1KiB'
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use futures::TryStreamExt;
use futures::future::{BoxFuture, FutureExt, join_all};
use parking_lot::Mutex;
use pubsub_connect::{BusUrl, Registry};
use pubsub_core::machinery::{Aftermath, DeadLetterSink, DeliveryQueue, Entry, Timer};
use pubsub_core::{
    Bus, Capabilities, Capability, Closed, Error, ErrorKind, Event, GroupStatus, LeaseProvider, Page, Positions, PubSub,
    PublishError, PublishOptions, Result, Start, Status, StatusWatch, SubscribeOptions, Subscription, Topic, TopicStatus,
    TrimFilter,
};
use tokio::sync::{OnceCell, watch};
use tokio::time::{Instant, timeout, timeout_at};

/// How long publishers and dead letters wait at a full queue.
const PATIENCE: Duration = Duration::from_secs(5);

/// Every subscription belongs to the one instance there is.
const INSTANCE: u64 = 0;

#[derive(Debug)]
struct Tiny {
    hub: Arc<Hub>,
    timer: Arc<Timer>,
    max_payload: Option<usize>,
    status: watch::Sender<Status>,
    closed: OnceCell<Closed>,
}

#[derive(Debug, Default)]
struct Hub(Mutex<HashMap<Topic, Vec<Arc<DeliveryQueue>>>>);

impl Hub {
    /// Gives an event to every queue of a topic, or to none and returns one that is full.
    fn offer(&self, topic: &Topic, event: &Arc<Event>) -> Option<Arc<DeliveryQueue>> {
        let mut aftermath = Aftermath::new();
        {
            let topics = self.0.lock();
            let queues = topics.get(topic).map_or(&[][..], Vec::as_slice);
            if let Some(full) = queues.iter().find(|queue| queue.room() == 0 && !queue.is_ended()) {
                return Some(full.clone());
            }
            queues.iter().for_each(|queue| queue.push([Entry::new(event.clone())], &mut aftermath));
        }
        aftermath.finish(); // not under the lock: it is somebody else's code
        None
    }

    fn tidy(&self, topic: &Topic) {
        let mut topics = self.0.lock();
        if let Some(queues) = topics.get_mut(topic) {
            queues.retain(|queue| !queue.is_ended());
            if queues.is_empty() {
                topics.remove(topic);
            }
        }
    }
}

/// Dead letters are published like any other event.
struct Letters(Weak<Hub>);

impl DeadLetterSink for Letters {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        let (hub, topic, letter) = (self.0.upgrade()?, topic.clone(), Arc::new(letter));
        let deliver = async move {
            while let Some(full) = hub.offer(&topic, &letter) {
                full.room_freed().await;
            }
        };
        Some(timeout(PATIENCE, deliver).map(drop).boxed())
    }
}

impl Tiny {
    fn check_open(&self) -> Result<()> {
        if matches!(*self.status.borrow(), Status::Closed) { Err(Error::closed()) } else { Ok(()) }
    }

    fn check(&self, events: &[Arc<Event>], options: &PublishOptions) -> Result<()> {
        self.check_open()?;
        options.validate()?;
        for event in events.iter().filter(|_| !options.local_only) {
            event.check_size(self.max_payload.unwrap_or(usize::MAX))?; // which also refuses a live value
        }
        Ok(())
    }
}

#[async_trait]
impl PubSub for Tiny {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::in_process();
        capabilities.max_payload = self.max_payload;
        capabilities
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        let refuse = |error: Error| PublishError::none_sent(error.on(topic), events.len());
        self.check(events, &options).map_err(refuse)?;
        let deadline = Instant::now() + options.timeout.unwrap_or(PATIENCE);
        for (sent, event) in events.iter().enumerate() {
            loop {
                let fail = |error: Error| PublishError::prefix_sent(error.on(topic), sent, events.len());
                self.check_open().map_err(fail)?;
                let Some(full) = self.hub.offer(topic, event) else { break };
                timeout_at(deadline, full.room_freed()).await.map_err(|_| fail(ErrorKind::Full.into()))?;
            }
        }
        Ok(Positions::none())
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.check_open().map_err(|error| error.during("subscribe").on(topic))?;
        options.validate(topic, &self.capabilities())?;
        let on_end = {
            let (hub, topic) = (Arc::downgrade(&self.hub), topic.clone());
            move || {
                if let Some(hub) = hub.upgrade() {
                    hub.tidy(&topic);
                }
            }
        };
        let (timer, sink) = (self.timer.clone(), Arc::new(Letters(Arc::downgrade(&self.hub))));
        let mut topics = self.hub.0.lock();
        self.check_open().map_err(|error| error.during("subscribe").on(topic))?;
        let queues = topics.entry(topic.clone()).or_default();
        let queue = match options.group.clone() {
            None => DeliveryQueue::fan_out(topic.clone(), timer, sink),
            Some(group) => {
                // The group's queue, unless its last member has just left and it takes no more.
                for queue in queues.iter().filter(|queue| queue.group_name() == Some(&group)) {
                    if let Some(subscription) = queue.join(INSTANCE, options.clone(), on_end.clone()) {
                        return Ok(subscription);
                    }
                }
                DeliveryQueue::group(topic.clone(), group, timer, sink)
            }
        };
        queues.push(queue.clone());
        Ok(queue.join(INSTANCE, options, on_end).expect("a new queue has not ended"))
    }

    async fn history(&self, topic: &Topic, _: Start, _: usize) -> Result<Page> {
        self.check_open()?;
        Err(Error::unsupported(Capability::History).during("history").on(topic))
    }

    async fn clear_topic(&self, _: &Topic) -> Result<()> {
        self.check_open()
    }

    async fn trim_topic(&self, _: &Topic, _: TrimFilter) -> Result<u64> {
        self.check_open().map(|()| 0)
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.check_open()?;
        let mut status = TopicStatus::default();
        (status.retained, status.fan_out) = (Some(0), Some(0));
        for queue in self.hub.0.lock().get(topic).into_iter().flatten().filter(|queue| !queue.is_ended()) {
            let Some(group) = queue.group_name() else {
                status.fan_out = status.fan_out.map(|count| count + 1);
                continue;
            };
            let (counts, mut group) = (queue.status(), GroupStatus::new(group.clone()));
            (group.waiting, group.held) = (Some(counts.waiting), Some(counts.held));
            (group.oldest, group.members) = (counts.oldest, Some(counts.members));
            status.groups.push(group);
        }
        Ok(status)
    }

    fn status(&self) -> StatusWatch {
        StatusWatch::new(self.status.subscribe())
    }

    async fn flush(&self) -> Result<()> {
        Ok(()) // publishes and settlements are done when their calls have returned
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.status.send_replace(Status::Closed);
        let queues: Vec<_> = self.hub.0.lock().values().flatten().cloned().collect();
        let end = async move {
            drop(timeout(within, join_all(queues.iter().map(|queue| queue.relieved(INSTANCE)))).await);
            let mut closed = Closed::default();
            for queue in queues {
                closed.released += queue.end();
                closed.cut_off += queue.revoke(INSTANCE);
            }
            closed
        };
        // In a task of its own, so that a close that nobody waits for any more comes to its end too.
        let end = || async { tokio::spawn(end).await.unwrap_or_default() };
        Ok(*self.closed.get_or_init(end).await)
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        None
    }
}

/// Takes its options out of the URL; what it does not ask for is refused. The future would be the place to dial a server.
fn tiny(url: &mut BusUrl) -> Result<impl Future<Output = Result<Bus>> + use<>> {
    let max_payload = url.size("max_payload")?;
    Ok(async move {
        let (status, closed) = (watch::Sender::new(Status::Connected), OnceCell::new());
        Ok(Bus::from(Tiny { hub: Arc::default(), timer: Arc::new(Timer::new()?), max_payload, status, closed }))
    })
}

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::args().nth(1).unwrap_or("tiny:?max_payload=64KiB".into());
    let bus = Registry::with_defaults().register("tiny", tiny)?.connect(&url).await?;

    let mut worker = bus.subscribe_group("orders", "billing").await?;
    let mut audit = bus.subscribe("orders").await?;
    bus.publish_data("orders", "order.placed", 3).await?;

    let first = worker.try_next().await?.expect("the bus is open");
    println!("billing, attempt {}: {}", first.attempt(), *first.data::<u32>()?);
    first.retry().await;
    let second = worker.try_next().await?.expect("the bus is open");
    println!("billing, attempt {}: {}", second.attempt(), *second.data::<u32>()?);
    second.done().await;
    println!("audit: {}", audit.try_next().await?.expect("the bus is open").event().event_type());

    let closed = bus.close(PATIENCE).await?;
    println!("closed {}", if closed.is_clean() { "cleanly" } else { "in the middle of something" });
    Ok(())
}
