//! A server on a free port, and clients that speak HTTP by hand: what is tested is what is on the wire.

#![allow(dead_code)] // each test program uses a part

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use pubsub_cache::{CachingPubSub, InMemoryServerCache};
use pubsub_core::{Bus, Event};
use pubsub_emitter::EventEmitterPubSub;
use pubsub_http::{Access, HttpBuilder, ServeOptions, Verdict, serve};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The longest wait for something that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn anybody(_: Access<'_>) -> Verdict {
    Verdict::Allow
}

/// A bus that retains.
pub(crate) fn kept() -> Bus {
    kept_in(Arc::new(InMemoryServerCache::new()))
}

pub(crate) fn kept_in(store: Arc<InMemoryServerCache>) -> Bus {
    CachingPubSub::new(Arc::new(EventEmitterPubSub::new()), store).into()
}

/// A bus that does not.
pub(crate) fn bare() -> Bus {
    EventEmitterPubSub::new().into()
}

pub(crate) fn http(bus: &Bus) -> HttpBuilder {
    HttpBuilder::new(bus.clone()).authorize(anybody)
}

/// Waits for a condition, a bounded time.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("in vain: {what}"));
}

pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("in vain: {what}"))
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<pubsub_core::Result<()>>,
}

impl Server {
    pub(crate) async fn start(router: Router) -> Self {
        Self::start_with(router, ServeOptions::new()).await
    }

    pub(crate) async fn start_with(router: Router, options: ServeOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let stopped = async move { drop(stopped.await) };
        Self { address, stop, task: tokio::spawn(serve(listener, router, options, stopped)) }
    }

    pub(crate) async fn stop(self) {
        let _ = self.stop.send(());
        soon("the server ends", self.task).await.unwrap().unwrap();
    }

    /// A whole request as it is, and the answer.
    pub(crate) async fn raw(&self, request: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        Answer::read(&mut BufReader::new(stream)).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.raw(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
    }

    pub(crate) async fn post(&self, path: &str, headers: &str, body: &str) -> Answer {
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
        self.raw(&(head + body)).await
    }

    pub(crate) async fn post_json(&self, path: &str, body: &str) -> Answer {
        self.post(path, "content-type: application/json\r\n", body).await
    }

    /// Opens a stream, as an `EventSource` does.
    pub(crate) async fn follow(&self, path: &str, last: Option<&str>) -> Stream {
        let last = last.map(|id| format!("last-event-id: {id}\r\n")).unwrap_or_default();
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n{last}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader).await;
        assert_eq!((status, header(&headers, "content-type")), (200, Some("text/event-stream")));
        Stream { reader, text: String::new(), last: None, comments: 0 }
    }
}

async fn read_head(reader: &mut BufReader<TcpStream>) -> (u16, Vec<(String, String)>) {
    let mut line = String::new();
    soon("a status line", reader.read_line(&mut line)).await.unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
    let mut headers = Vec::new();
    loop {
        line.clear();
        soon("a header", reader.read_line(&mut line)).await.unwrap();
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.to_owned())),
            None => return (status, headers),
        }
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    async fn read(reader: &mut BufReader<TcpStream>) -> Self {
        let (status, headers) = read_head(reader).await;
        let mut body = vec![0; header(&headers, "content-length").map_or(0, |length| length.parse().unwrap())];
        soon("a body", reader.read_exact(&mut body)).await.unwrap();
        Self { status, headers, body: String::from_utf8(body).unwrap() }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// A stream of server-sent events.
pub(crate) struct Stream {
    reader: BufReader<TcpStream>,
    text: String,
    /// What `Last-Event-ID` would be.
    pub(crate) last: Option<String>,
    pub(crate) comments: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) name: String,
    pub(crate) data: String,
}

impl Message {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap()
    }

    pub(crate) fn kind(&self) -> String {
        self.json()["type"].as_str().unwrap().to_owned()
    }
}

impl Stream {
    /// The next event; none at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        soon("an event", self.read_event()).await
    }

    /// The types of the next so many messages.
    pub(crate) async fn kinds(&mut self, count: usize) -> Vec<String> {
        let mut kinds = Vec::new();
        for _ in 0..count {
            let message = self.next().await.expect("it goes on");
            assert_eq!(message.name, "message", "{message:?}");
            kinds.push(message.kind());
        }
        kinds
    }

    /// Waits for so many heartbeats, before which no event comes.
    pub(crate) async fn heartbeats(&mut self, count: usize) {
        let due = self.comments + count;
        while self.comments < due {
            let block = soon("a heartbeat", self.read_block()).await.expect("it goes on");
            assert_eq!(self.parse(&block), None);
        }
    }

    async fn read_event(&mut self) -> Option<Message> {
        loop {
            let block = self.read_block().await?;
            if let Some(message) = self.parse(&block) {
                return Some(message);
            }
        }
    }

    /// What comes up to the next empty line; none at the end.
    async fn read_block(&mut self) -> Option<String> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                return Some(block);
            }
            if !self.read_chunk().await {
                assert_eq!(self.text, "", "half an event");
                return None;
            }
        }
    }

    fn parse(&mut self, block: &str) -> Option<Message> {
        let (mut name, mut data) = ("message".to_owned(), Vec::new());
        for line in block.lines() {
            match line.split_once(": ") {
                Some(("id", id)) => self.last = Some(id.to_owned()),
                Some(("event", event)) => name = event.to_owned(),
                Some(("data", line)) => data.push(line),
                _ if line.starts_with(':') => self.comments += 1,
                _ => {}
            }
        }
        (!data.is_empty()).then(|| Message { name, data: data.join("\n") })
    }

    /// Reads one chunk; false after the last.
    async fn read_chunk(&mut self) -> bool {
        let mut size = String::new();
        self.reader.read_line(&mut size).await.unwrap();
        let size = usize::from_str_radix(size.trim_end(), 16).unwrap_or_else(|_| panic!("cut off: {size:?}"));
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk).await.unwrap();
        self.text += std::str::from_utf8(&chunk[..size]).unwrap();
        size > 0
    }

    /// Waits until what a stream says first has been read.
    pub(crate) async fn opened(&mut self) -> String {
        let opened = async {
            while self.last.is_none() {
                assert!(self.read_chunk().await);
                let text = std::mem::take(&mut self.text);
                let (block, rest) = text.split_once("\n\n").unwrap();
                self.text = rest.to_owned();
                assert!(self.parse(block).is_none());
            }
        };
        soon("the opening", opened).await;
        self.last.clone().unwrap()
    }
}

/// Publishes events of the types `from`, `from + 1`, ...
pub(crate) async fn publish(bus: &Bus, topic: &str, numbers: std::ops::Range<u32>) {
    for number in numbers {
        bus.publish(topic, Event::new(number.to_string())).await.unwrap();
    }
}

pub(crate) fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

/// How many fan-out subscriptions a topic has.
pub(crate) async fn followers(bus: &Bus, topic: &str) -> u64 {
    bus.inspect(topic).await.unwrap().fan_out.unwrap()
}
