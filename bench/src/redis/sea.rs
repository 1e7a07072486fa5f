//! The peer: `sea-streamer-redis`, a library for streams of messages, with its defaults.

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use pubsub_core::{BoxError, Event, wire};
use sea_streamer_redis::{
    AutoCommit, AutoStreamReset, RedisConnectOptions, RedisConsumer, RedisConsumerOptions, RedisProducer, RedisStreamer,
    SendFuture,
};
use sea_streamer_types::{
    Buffer, Consumer, ConsumerGroup, ConsumerId, ConsumerMode, ConsumerOptions, Message, Producer, SharedMessage, StreamKey,
    Streamer,
};

use super::server::Server;
use super::{BLOCK, IN_FLIGHT, Progress};
use crate::memory::parties::{Publish, Receive, Setup};

/// The party's name, and its stream's, which may have no colons in it.
pub(crate) const SEA_STREAMER: &str = "sea-streamer";
pub(crate) const STREAM: &str = "orders";

pub(crate) async fn setup(
    server: &Server,
    subscribers: usize,
    group: Option<&str>,
) -> Result<Setup<Publisher, Receiver>, BoxError> {
    let uri = format!("redis://{}", server.address).parse()?;
    let streamer = RedisStreamer::connect(uri, RedisConnectOptions::default()).await?;
    let (key, progress) = (StreamKey::new(STREAM)?, Progress::new());
    let producer = streamer.create_producer(key.clone(), Default::default()).await?;
    let mut receivers = Vec::new();
    for number in 0..subscribers {
        let mut options =
            RedisConsumerOptions::new(if group.is_some() { ConsumerMode::LoadBalanced } else { ConsumerMode::RealTime });
        options.set_auto_stream_reset(AutoStreamReset::Earliest);
        if let Some(group) = group {
            options.set_consumer_group(ConsumerGroup::new(group))?;
            options.set_consumer_id(ConsumerId::new(format!("c{number}")));
            options.set_mkstream(true).set_auto_commit(AutoCommit::Rolling);
        }
        let consumer = streamer.create_consumer(std::slice::from_ref(&key), options).await?;
        let of_group = group.is_some();
        receivers.push(Receiver { consumer, received: 0, progress: progress.clone(), of_group });
    }
    Ok(Setup {
        publisher: Publisher { producer, receipts: FuturesUnordered::new(), progress },
        subscribers: receivers,
        handles: Vec::new(),
    })
}

pub(crate) struct Publisher {
    producer: RedisProducer,
    receipts: FuturesUnordered<SendFuture>,
    progress: Arc<Progress>,
}

impl Publish for Publisher {
    /// The library itself sends together what waits.
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        while self.receipts.len() >= IN_FLIGHT {
            self.receipts.next().await.transpose()?;
        }
        self.receipts.push(self.producer.send(wire::encode(&event)?.as_slice())?);
        while let Some(receipt) = self.receipts.next().now_or_never().flatten() {
            receipt?;
        }
        Ok(())
    }

    async fn finish(&mut self, published: u64) -> Result<(), BoxError> {
        while let Some(receipt) = self.receipts.next().await {
            receipt?;
        }
        self.progress.finish(published);
        Ok(())
    }
}

pub(crate) struct Receiver {
    consumer: RedisConsumer,
    received: u64,
    progress: Arc<Progress>,
    of_group: bool,
}

/// An event, and the message that is to be acknowledged for it.
pub(crate) struct Received(Event, SharedMessage);

impl AsRef<Event> for Received {
    fn as_ref(&self) -> &Event {
        &self.0
    }
}

impl Receive for Receiver {
    type Item = Received;

    async fn receive(&mut self) -> Result<Option<Received>, BoxError> {
        loop {
            if self.progress.is_over(self.received, self.of_group) {
                return Ok(None);
            }
            let Ok(message) = tokio::time::timeout(BLOCK, self.consumer.next()).await else { continue };
            let message = message?;
            let event = wire::decode(&Bytes::copy_from_slice(message.message().as_bytes()), None)?.event;
            self.received += 1;
            self.progress.handled(self.of_group);
            return Ok(Some(Received(event, message)));
        }
    }

    fn done(&mut self, Received(event, message): Received) {
        drop(event);
        if self.of_group {
            self.consumer.ack(&message).expect("its task runs");
        }
    }
}
