//! The bus over Redis Streams as a harness, on a real server: `redis`.

mod cluster;
mod server;
mod store;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use pubsub_core::{
    Capabilities, Durability, Error, ErrorKind, Group, Groups, LossNotice, PubSub, Reach, Result, Retention, Topic,
};
use pubsub_redis::{RedisBuilder, RedisStreamsPubSub};

pub use self::cluster::RedisClusterHarness;
use self::server::{Answer, Server};
pub use self::store::RedisStoreHarness;
use super::port;
use super::process;
use super::proxy::Proxy;
use crate::{Fault, Faults, Harness, Job, Probe, Process, Processes, Raw, Timing};

/// After how long what a silent member held goes to others.
const RECLAIM: Duration = Duration::from_millis(1200);

static INSTALLED: LazyLock<bool> = LazyLock::new(server::is_installed);

/// The bus over Redis Streams. Those made of the first have a server each, started when it is first asked for; those made of them share
/// it under other prefixes.
#[derive(Default)]
pub struct RedisHarness {
    running: Arc<OnceLock<Running>>,
    /// Which bus on its server it is; none for the first.
    number: Option<u64>,
}

struct Running {
    server: Server,
    proxy: Proxy,
}

fn failed(error: io::Error) -> Error {
    Error::new(ErrorKind::Backend("the server of the harness".into())).caused_by(error)
}

/// The bound on payloads: properties about it are about any bound, and an unoptimised build takes its time for the usual one.
const MAX_PAYLOAD: usize = 1 << 20;

/// How instances are configured.
fn builder(url: &str, prefix: &str) -> Result<RedisBuilder> {
    let builder = RedisStreamsPubSub::from_url(url)?.prefix(prefix).reclaim_after(RECLAIM).linger(Duration::from_millis(50));
    Ok(builder.command_timeout(Duration::from_secs(4)).publish_timeout(Duration::from_secs(6)).max_payload(MAX_PAYLOAD))
}

/// An instance in another process, by the URL and the prefix of its bus.
pub(super) async fn connect(place: &str) -> Result<Arc<dyn PubSub>> {
    let (url, prefix) = place.split_once(' ').unwrap_or_default();
    Ok(Arc::new(builder(url, prefix)?.connect().await?))
}

impl RedisHarness {
    fn another(&self) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let running = if self.number.is_some() { self.running.clone() } else { Arc::default() };
        Self { running, number: Some(NEXT.fetch_add(1, Ordering::Relaxed)) }
    }

    fn running(&self) -> Result<&Running> {
        if let Some(running) = self.running.get() {
            return Ok(running);
        }
        let server = Server::start().map_err(failed)?;
        let proxy = Proxy::start(server.address).map_err(failed)?;
        Ok(self.running.get_or_init(|| Running { server, proxy }))
    }

    fn ask(&self, words: &[&str]) -> Result<Answer> {
        self.running()?.server.ask(words).map_err(failed)
    }

    fn prefix(&self) -> String {
        format!("bus{}", self.number.unwrap_or(0))
    }

    fn stream(&self, topic: &Topic) -> String {
        format!("{}:{topic}", self.prefix())
    }

    fn url(&self) -> Result<String> {
        Ok(format!("redis://{}", self.running()?.proxy.address))
    }
}

#[async_trait]
impl Harness for RedisHarness {
    fn name(&self) -> &str {
        "redis"
    }

    fn unavailable(&self) -> Option<String> {
        (!*INSTALLED).then(|| "needs `redis-server`, which is not installed".into())
    }

    fn declared(&self) -> Capabilities {
        let mut declared = Capabilities::in_process();
        declared.reach = Reach::Network;
        declared.durability = Durability::Server;
        declared.retention = Retention::History;
        declared.dead_letter_history = true;
        declared.groups = Groups::Durable;
        declared.group_history = true;
        declared.loss_notice = LossNotice::Counted;
        declared.publish_waits = false;
        declared.max_payload = Some(MAX_PAYLOAD);
        declared.leases = Some(Reach::Network);
        declared
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(self.another()))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(builder(&self.url()?, &self.prefix())?.connect().await?))
    }

    fn timing(&self) -> Timing {
        let mut timing = Timing::in_process().scaled(2.0);
        timing.reclaim = Duration::from_secs(3);
        timing.patience = Duration::from_secs(15);
        timing
    }

    fn confirms(&self) -> bool {
        true
    }

    fn probe(&self) -> Option<&dyn Probe> {
        Some(self)
    }

    fn faults(&self) -> Option<&dyn Faults> {
        Some(self)
    }

    fn processes(&self) -> Option<&dyn Processes> {
        Some(self)
    }

    fn raw(&self) -> Option<&dyn Raw> {
        Some(self)
    }
}

#[async_trait]
impl Probe for RedisHarness {
    async fn stored(&self, topic: &Topic) -> Result<u64> {
        Ok(self.ask(&["XLEN", &self.stream(topic)])?.number())
    }

    async fn pending(&self, topic: &Topic, group: &Group) -> Result<u64> {
        let pending = self.ask(&["XPENDING", &self.stream(topic), group.as_str()])?;
        Ok(pending.list().first().map_or(0, Answer::number))
    }

    async fn resources(&self) -> Result<BTreeMap<String, u64>> {
        let clients = self.ask(&["CLIENT", "LIST"])?;
        let connections = clients.text().lines().count() as u64 - 1; // but this one
        let mut consumers = 0;
        for key in self.ask(&["KEYS", "*"])?.list() {
            let Ok(groups) = self.ask(&["XINFO", "GROUPS", key.text()]) else { continue };
            // Each group is a flat list of names and values: name, consumers, ...
            consumers += groups.list().iter().filter_map(|group| group.list().get(3)).map(Answer::number).sum::<u64>();
        }
        Ok([("connections".to_owned(), connections), ("consumers".to_owned(), consumers)].into())
    }
}

#[async_trait]
impl Faults for RedisHarness {
    fn can(&self, fault: Fault) -> bool {
        !matches!(fault, Fault::FailWrites(_) | Fault::LoseConfirmations(_))
    }

    async fn inject(&self, fault: Fault) -> Result<()> {
        let Running { server, proxy } = self.running()?;
        match fault {
            Fault::Sever => drop(self.ask(&["CLIENT", "KILL", "TYPE", "normal"])?),
            Fault::Restart => server.restart().map_err(failed)?,
            Fault::Outage => proxy.weather.send_modify(|weather| weather.out = true),
            Fault::Heal => proxy.weather.send_modify(|weather| (weather.out, weather.delay) = (false, Duration::ZERO)),
            Fault::Delay(delay) => proxy.weather.send_modify(|weather| weather.delay = delay),
            _ => return Err(Error::new(ErrorKind::Backend("a fault that cannot be injected".into()))),
        }
        Ok(())
    }
}

#[async_trait]
impl Raw for RedisHarness {
    async fn inject(&self, topic: &Topic, bytes: &[u8]) -> Result<()> {
        let stream = self.stream(topic);
        let words: [&[u8]; 5] = [b"XADD", stream.as_bytes(), b"*", b"event", bytes];
        self.running()?.server.ask(&words).map(drop).map_err(failed)
    }
}

#[async_trait]
impl Processes for RedisHarness {
    async fn start(&self, job: Job) -> Result<Box<dyn Process>> {
        process::start("redis", &format!("{} {}", self.url()?, self.prefix()), &job).await
    }
}
