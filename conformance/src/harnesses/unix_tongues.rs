//! The bus on a Unix socket where the tongue of TypeScript peers is spoken: between instances of ours, by every second of them, and
//! with a broker that is a process of Mastra.

use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::{
    Attempts, Capabilities, Closed, Deduplication, Event, LeaseProvider, LossNotice, Page, Positions, PubSub, PublishError,
    PublishOptions, Reach, Result, Start, StatusWatch, SubscribeOptions, Subscription, Topic, TopicStatus, TrimFilter,
};
use pubsub_unix::UnixSocketPubSub;

use super::mastra;
use super::unix::{MAX_PAYLOAD, UnixHarness, builder, failed};
use crate::{Harness, Timing};

/// Who speaks the tongue of TypeScript peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tongues {
    /// All instances, with a broker of ours: `unix-lines`.
    Lines,
    /// Every second instance, with a broker of ours: `unix-mixed`.
    Mixed,
    /// All, since the broker is a process of Mastra: `unix-mastra`.
    Mastra,
}

/// A bus on which two tongues are spoken. It can do no more than TypeScript peers can.
pub struct TonguesHarness {
    tongues: Tongues,
    bus: UnixHarness,
    /// The broker, where it is ours: an instance that does nothing else.
    broker: tokio::sync::OnceCell<UnixSocketPubSub>,
    made: AtomicU64,
}

impl TonguesHarness {
    /// A bus of its own.
    pub fn new(tongues: Tongues) -> Self {
        Self::on(tongues, UnixHarness::new())
    }

    fn on(tongues: Tongues, bus: UnixHarness) -> Self {
        Self { tongues, bus, broker: tokio::sync::OnceCell::new(), made: AtomicU64::new(0) }
    }
}

static PACKAGE: LazyLock<std::result::Result<std::path::PathBuf, String>> = LazyLock::new(mastra::package);

#[async_trait]
impl Harness for TonguesHarness {
    fn name(&self) -> &str {
        match self.tongues {
            Tongues::Lines => "unix-lines",
            Tongues::Mixed => "unix-mixed",
            Tongues::Mastra => "unix-mastra",
        }
    }

    fn unavailable(&self) -> Option<String> {
        if self.tongues == Tongues::Mastra { PACKAGE.as_ref().err().cloned() } else { None }
    }

    fn declared(&self) -> Capabilities {
        let mut declared = Capabilities::in_process();
        declared.reach = Reach::Host;
        declared.attempts = Attempts::Instance;
        declared.loss_notice = LossNotice::Silent;
        declared.publish_waits = false;
        declared.max_payload = Some(MAX_PAYLOAD);
        declared.keeps_identity = false;
        declared.deduplication = Deduplication::Retained { events: Some(10_000), age: None };
        declared
    }

    fn lacks(&self, property: &str) -> Option<&str> {
        let always = match property {
            "AD-01" | "CL-16" => Some("in lines an event is handed over once: what its holder leaves goes to nobody else"),
            "AD-22" => Some("what an instance was given waits beside its subscriptions' queues, and longer than they are"),
            _ => None,
        };
        let below = match property {
            "PS-11" => Some("JavaScript's numbers are doubles"),
            "LI-11" => Some("their codec leaves out what is called `__proto__`"),
            "IN-08" => Some("their broker reads and writes events: what looks like an envelope is one from the second time on"),
            _ => None,
        };
        let above = match property {
            "META-2" => Some("its broker keeps more than those who speak lines can count on: groups outlive their members"),
            _ => None,
        };
        let always = always.or(above.filter(|_| self.tongues != Tongues::Mastra));
        always.or(below.filter(|_| self.tongues == Tongues::Mastra))
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(Self::on(self.tongues, self.bus.another())))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        let socket = self.bus.socket();
        let broker = self.broker.get_or_try_init(async || {
            let path = socket.clone();
            if self.tongues == Tongues::Mastra {
                let served = tokio::task::spawn_blocking(move || serve(&path)).await.map_err(io::Error::other);
                served.flatten().map_err(failed)?;
            }
            // Where Mastra is the broker this is one more client.
            builder(&socket).connect().await
        });
        broker.await?;
        let speaks_lines = match self.tongues {
            Tongues::Mastra => false,
            Tongues::Lines => true,
            Tongues::Mixed => self.made.fetch_add(1, Ordering::Relaxed).is_multiple_of(2),
        };
        let builder = builder(&socket);
        let instance = if speaks_lines { builder.lines_only().connect().await? } else { builder.connect().await? };
        if self.tongues != Tongues::Mixed {
            return Ok(Arc::new(instance));
        }
        Ok(Arc::new(Modest { instance, declared: self.declared() }))
    }

    fn timing(&self) -> Timing {
        let mut timing = Timing::in_process().scaled(2.0);
        timing.patience = Duration::from_secs(15);
        timing.limit = Duration::from_secs(30);
        timing
    }
}

/// A process of Mastra that is the broker of all these buses.
struct Brokers {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Brokers {
    fn start() -> io::Result<Self> {
        let package = PACKAGE.as_ref().map_err(|why| io::Error::other(why.clone()))?;
        let mut command = Command::new("node");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/node/broker.mjs")).arg(package);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take().expect("it is piped");
        let stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        Ok(Self { child, stdin, stdout })
    }

    fn serve(&mut self, path: &Path) -> io::Result<()> {
        writeln!(self.stdin, "{}", path.display())?;
        let mut said = String::new();
        self.stdout.read_line(&mut said)?;
        if said.starts_with("serves") { Ok(()) } else { Err(io::Error::other(said)) }
    }
}

impl Drop for Brokers {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the process of Mastra serve a path. It ends with this process, which it reads from.
fn serve(path: &Path) -> io::Result<()> {
    static BROKERS: Mutex<Option<Brokers>> = Mutex::new(None);
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let mut brokers = BROKERS.lock();
    if brokers.is_none() {
        *brokers = Some(Brokers::start()?);
    }
    brokers.as_mut().expect("made above").serve(path)
}

/// An instance that is said to be able to do no more than others on its bus can.
#[derive(Debug)]
struct Modest {
    instance: UnixSocketPubSub,
    declared: Capabilities,
}

#[async_trait]
impl PubSub for Modest {
    fn capabilities(&self) -> Capabilities {
        self.declared.clone()
    }

    async fn publish(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> std::result::Result<Positions, PublishError> {
        self.instance.publish(topic, events, options).await.map(|_| Positions::none())
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        options.validate(topic, &self.declared)?;
        self.instance.subscribe(topic, options).await
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.instance.history(topic, from, limit).await?;
        Err(pubsub_core::Error::unsupported(pubsub_core::Capability::History))
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.instance.clear_topic(topic).await
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.instance.trim_topic(topic, filter).await
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.instance.inspect(topic).await
    }

    fn status(&self) -> StatusWatch {
        self.instance.status()
    }

    async fn flush(&self) -> Result<()> {
        self.instance.flush().await
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.instance.close(within).await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        None
    }
}
