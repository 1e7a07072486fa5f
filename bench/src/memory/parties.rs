//! Everybody's way to publish and to receive, in one shape.

use std::hint::black_box;
use std::sync::Arc;

use flume::r#async::RecvStream;
use futures::StreamExt;
use pubsub_core::{BoxError, Bus, Delivery, Event, Group, Subscription, SubscriptionHandle, Topic};
use pubsub_emitter::EventEmitterPubSub;
use tokio::sync::{Mutex, broadcast, mpsc};

use crate::event::QUEUE;

/// Where a publisher puts its events. Dropped when the publisher has ended.
pub(crate) trait Publish: Send + 'static {
    fn publish(&mut self, event: Arc<Event>) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// That was all, so many: what is still on its way is waited for.
    fn finish(&mut self, published: u64) -> impl Future<Output = Result<(), BoxError>> + Send {
        let _ = published;
        std::future::ready(Ok(()))
    }
}

/// Where a subscriber takes its events from.
pub(crate) trait Receive: Send + 'static {
    type Item: AsRef<Event> + Send;

    /// The next event, or none at the end.
    fn receive(&mut self) -> impl Future<Output = Result<Option<Self::Item>, BoxError>> + Send;

    /// It has been read.
    fn done(&mut self, item: Self::Item);
}

/// What a round begins with: one publisher, its subscribers, and how to tell them that it was all.
pub(crate) struct Setup<P, R> {
    pub(crate) publisher: P,
    pub(crate) subscribers: Vec<R>,
    /// Drained, then stopped, once the publisher has ended. Empty where dropping the publisher says as much.
    pub(crate) handles: Vec<SubscriptionHandle>,
}

pub(crate) fn topic() -> Topic {
    Topic::new("orders").expect("a valid topic")
}

/// What the limit calls.
type Handler = Box<dyn Fn(&Arc<Event>) + Send>;

/// The limit: handlers, called.
pub(crate) struct Direct(pub(crate) Vec<Handler>);

impl Publish for Direct {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        // As a subscriber of a bus does, each handler has the event in its own right.
        black_box(&self.0).iter().for_each(|handler| handler(&event.clone()));
        Ok(())
    }
}

/// Ours, as applications hold it.
pub(crate) struct Ours {
    bus: Bus,
    topic: Topic,
}

impl Ours {
    /// A bus that somebody has set up.
    pub(crate) fn over(bus: Bus) -> Self {
        Self { bus, topic: topic() }
    }

    /// A bus with this many subscribers: all of one group, or each on its own.
    pub(crate) async fn setup(subscribers: usize, group: Option<&str>) -> Result<Setup<Self, Subscription>, BoxError> {
        let ours = Self::over(EventEmitterPubSub::new().into());
        let mut all = Vec::new();
        for _ in 0..subscribers {
            all.push(match group {
                Some(group) => ours.bus.subscribe_group(ours.topic.clone(), Group::new(group)?).await?,
                None => ours.bus.subscribe(ours.topic.clone()).await?,
            });
        }
        let handles = all.iter().map(Subscription::handle).collect();
        Ok(Setup { publisher: ours, subscribers: all, handles })
    }
}

impl Publish for Ours {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        self.bus.publish(self.topic.clone(), event).await?;
        Ok(())
    }
}

impl Receive for Subscription {
    type Item = Delivery;

    async fn receive(&mut self) -> Result<Option<Delivery>, BoxError> {
        Ok(self.next().await.transpose()?)
    }

    fn done(&mut self, delivery: Delivery) {
        drop(delivery.done());
    }
}

/// tokio's broadcast channel. It makes nobody wait but drops the oldest, so its publisher looks before it overruns anybody.
pub(crate) struct Broadcast {
    sender: broadcast::Sender<Arc<Event>>,
    /// How many more can be sent before looking again.
    credit: usize,
}

impl Broadcast {
    pub(crate) fn setup(subscribers: usize) -> Setup<Self, broadcast::Receiver<Arc<Event>>> {
        let sender = broadcast::Sender::new(QUEUE);
        let subscribers = (0..subscribers).map(|_| sender.subscribe()).collect();
        Setup { publisher: Self { sender, credit: 0 }, subscribers, handles: Vec::new() }
    }
}

impl Publish for Broadcast {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        while self.credit == 0 {
            self.credit = QUEUE - self.sender.len();
            if self.credit == 0 {
                tokio::task::yield_now().await;
            }
        }
        self.credit -= 1;
        self.sender.send(event).map_err(|_| "nobody listens")?;
        Ok(())
    }
}

impl Receive for broadcast::Receiver<Arc<Event>> {
    type Item = Arc<Event>;

    async fn receive(&mut self) -> Result<Option<Arc<Event>>, BoxError> {
        match self.recv().await {
            Ok(event) => Ok(Some(event)),
            Err(broadcast::error::RecvError::Closed) => Ok(None),
            Err(lagged) => Err(lagged.into()),
        }
    }

    fn done(&mut self, event: Arc<Event>) {
        drop(event);
    }
}

/// One bounded channel of tokio's for each subscriber.
pub(crate) struct Mpsc(Vec<mpsc::Sender<Arc<Event>>>);

impl Mpsc {
    pub(crate) fn setup(subscribers: usize) -> Setup<Self, mpsc::Receiver<Arc<Event>>> {
        let (senders, subscribers) = (0..subscribers).map(|_| mpsc::channel(QUEUE)).unzip();
        Setup { publisher: Self(senders), subscribers, handles: Vec::new() }
    }

    /// One channel whose receiver is shared.
    pub(crate) fn shared(workers: usize) -> Setup<Self, SharedMpsc> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let shared = SharedMpsc(Arc::new(Mutex::new(receiver)));
        Setup { publisher: Self(vec![sender]), subscribers: vec![shared; workers], handles: Vec::new() }
    }
}

impl Publish for Mpsc {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        let (last, others) = self.0.split_last().ok_or("nobody listens")?;
        for sender in others {
            sender.send(event.clone()).await.map_err(|_| "nobody listens")?;
        }
        last.send(event).await.map_err(|_| "nobody listens")?;
        Ok(())
    }
}

impl Receive for mpsc::Receiver<Arc<Event>> {
    type Item = Arc<Event>;

    async fn receive(&mut self) -> Result<Option<Arc<Event>>, BoxError> {
        Ok(self.recv().await)
    }

    fn done(&mut self, event: Arc<Event>) {
        drop(event);
    }
}

/// A worker's share of one tokio channel.
#[derive(Clone)]
pub(crate) struct SharedMpsc(Arc<Mutex<mpsc::Receiver<Arc<Event>>>>);

impl Receive for SharedMpsc {
    type Item = Arc<Event>;

    async fn receive(&mut self) -> Result<Option<Arc<Event>>, BoxError> {
        Ok(self.0.lock().await.recv().await)
    }

    fn done(&mut self, event: Arc<Event>) {
        drop(event);
    }
}

/// One bounded flume channel for each subscriber.
pub(crate) struct Flume(Vec<flume::Sender<Arc<Event>>>);

impl Flume {
    pub(crate) fn setup(subscribers: usize) -> Setup<Self, RecvStream<'static, Arc<Event>>> {
        let (senders, receivers): (_, Vec<_>) = (0..subscribers).map(|_| flume::bounded(QUEUE)).unzip();
        let subscribers = receivers.into_iter().map(flume::Receiver::into_stream).collect();
        Setup { publisher: Self(senders), subscribers, handles: Vec::new() }
    }

    /// One channel that all workers receive from.
    pub(crate) fn shared(workers: usize) -> Setup<Self, RecvStream<'static, Arc<Event>>> {
        let (sender, receiver) = flume::bounded(QUEUE);
        let subscribers = (0..workers).map(|_| receiver.clone().into_stream()).collect();
        Setup { publisher: Self(vec![sender]), subscribers, handles: Vec::new() }
    }
}

impl Publish for Flume {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        let (last, others) = self.0.split_last().ok_or("nobody listens")?;
        for sender in others {
            sender.send_async(event.clone()).await.map_err(|_| "nobody listens")?;
        }
        last.send_async(event).await.map_err(|_| "nobody listens")?;
        Ok(())
    }
}

impl Receive for RecvStream<'static, Arc<Event>> {
    type Item = Arc<Event>;

    async fn receive(&mut self) -> Result<Option<Arc<Event>>, BoxError> {
        Ok(self.next().await)
    }

    fn done(&mut self, event: Arc<Event>) {
        drop(event);
    }
}
