//! The plain fred loop: what an application writes that uses the client library as it is.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use fred::clients::Client;
use fred::interfaces::{ClientLike, StreamsInterface};
use fred::types::config::{Config, ServerConfig};
use fred::types::streams::XReadResponse;
use fred::types::{Builder, RespVersion};
use futures::FutureExt;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use pubsub_core::{BoxError, Event, wire};

use super::{BLOCK, IN_FLIGHT, KEPT, Progress, READ, STREAM, TOGETHER};
use crate::memory::parties::{Publish, Receive};

pub(crate) async fn connect(address: SocketAddr) -> Result<Client, BoxError> {
    let server = ServerConfig::new_centralized(address.ip().to_string(), address.port());
    let client = Builder::from_config(Config { server, version: RespVersion::RESP3, ..Config::default() }).build()?;
    client.init().await?;
    Ok(client)
}

/// Calls under way, so many at a time.
pub(crate) struct Calls(FuturesUnordered<BoxFuture<'static, Result<(), BoxError>>>);

impl Calls {
    pub(crate) fn new() -> Self {
        Self(FuturesUnordered::new())
    }

    /// Begins one more, once there are few enough.
    pub(crate) async fn begin(
        &mut self,
        most: usize,
        call: impl Future<Output = Result<(), BoxError>> + Send + 'static,
    ) -> Result<(), BoxError> {
        while self.0.len() >= most {
            self.0.next().await.transpose()?;
        }
        self.0.push(call.boxed());
        // A future that nobody asks does nothing; those that have ended are asked first.
        while let Some(outcome) = self.0.next().now_or_never().flatten() {
            outcome?;
        }
        Ok(())
    }

    pub(crate) async fn end(&mut self) -> Result<(), BoxError> {
        while let Some(outcome) = self.0.next().await {
            outcome?;
        }
        Ok(())
    }
}

pub(crate) struct Publisher {
    client: Client,
    together: usize,
    waiting: Vec<Vec<u8>>,
    calls: Calls,
    progress: Arc<Progress>,
}

impl Publisher {
    pub(crate) async fn open(address: SocketAddr, together: usize, progress: Arc<Progress>) -> Result<Self, BoxError> {
        Ok(Self { client: connect(address).await?, together, waiting: Vec::new(), calls: Calls::new(), progress })
    }

    async fn send(&mut self) -> Result<(), BoxError> {
        let (client, events) = (self.client.clone(), std::mem::take(&mut self.waiting));
        let call = async move {
            let pipeline = client.pipeline();
            for event in events {
                let kept = ("MAXLEN", "~", KEPT);
                let _: () = pipeline.xadd(STREAM, false, kept, "*", ("event", Bytes::from(event))).await?;
            }
            let _: Vec<String> = pipeline.all().await?;
            Ok(())
        };
        self.calls.begin(IN_FLIGHT / TOGETHER, call).await
    }
}

impl Publish for Publisher {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        self.waiting.push(wire::encode(&event)?);
        if self.waiting.len() == self.together { self.send().await } else { Ok(()) }
    }

    async fn finish(&mut self, published: u64) -> Result<(), BoxError> {
        if !self.waiting.is_empty() {
            self.send().await?;
        }
        self.calls.end().await?;
        self.progress.finish(published);
        Ok(())
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        quit(&self.client);
    }
}

fn quit(client: &Client) {
    let client = client.clone();
    tokio::spawn(async move { client.quit().await });
}

pub(crate) struct Receiver {
    client: Client,
    from: String,
    waiting: VecDeque<Arc<Event>>,
    received: u64,
    progress: Arc<Progress>,
    /// The consumer's name, if it is of a group.
    consumer: Option<String>,
    unacknowledged: Vec<String>,
}

impl Receiver {
    pub(crate) async fn open(address: SocketAddr, consumer: Option<String>, progress: Arc<Progress>) -> Result<Self, BoxError> {
        let (from, waiting, unacknowledged) = ("0-0".to_owned(), VecDeque::new(), Vec::new());
        Ok(Self { client: connect(address).await?, from, waiting, received: 0, progress, consumer, unacknowledged })
    }

    async fn read(&mut self) -> Result<(), BoxError> {
        type Answer = Option<XReadResponse<String, String, String, Bytes>>;
        let (client, block) = (&self.client, Some(BLOCK.as_millis() as u64));
        let answer: Answer = match &self.consumer {
            None => client.xread(Some(READ), block, STREAM, &self.from).await?,
            Some(consumer) => {
                if !self.unacknowledged.is_empty() {
                    let _: u64 = client.xack(STREAM, "g", std::mem::take(&mut self.unacknowledged)).await?;
                }
                client.xreadgroup("g", consumer, Some(READ), block, false, STREAM, ">").await?
            }
        };
        let Some(entries) = answer.and_then(|mut answer| answer.remove(STREAM)) else { return Ok(()) };
        for (id, mut fields) in entries {
            let json = fields.remove("event").ok_or("an entry without an event")?;
            self.waiting.push_back(Arc::new(wire::decode(&json, None)?.event));
            if self.consumer.is_some() {
                self.unacknowledged.push(id);
            } else {
                self.from = id;
            }
        }
        Ok(())
    }
}

impl Receive for Receiver {
    type Item = Arc<Event>;

    async fn receive(&mut self) -> Result<Option<Arc<Event>>, BoxError> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                self.received += 1;
                self.progress.handled(self.consumer.is_some());
                return Ok(Some(event));
            }
            if self.progress.is_over(self.received, self.consumer.is_some()) {
                return Ok(None);
            }
            self.read().await?;
        }
    }

    fn done(&mut self, event: Arc<Event>) {
        drop(event);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        quit(&self.client);
    }
}
