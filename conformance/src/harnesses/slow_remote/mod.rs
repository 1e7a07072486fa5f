//! A slow remote backend, imitated in process: a model of what a backend with a server has to cope with, before there is one.
//!
//! Publishes travel and are confirmed late. Settlements are recorded at once, sent in batches, and some are never confirmed.
//! Members take more than they hand over and give it back late. Connections are cut, the server restarts, clients die. Payloads
//! are always bytes in between. Topics retain a bounded history that can be resumed from, and groups are durable.
//!
//! [`server`] is the imitation; [`connection`] is the wire; the rest is a backend as one would be written: [`client`] the trait,
//! [`subscription`] and [`member`] the two kinds of stream.

mod client;
mod connection;
mod member;
mod server;
mod subscription;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use pubsub_core::{
    Capabilities, Delivery, Event, EventId, Group, PubSub, PublishOptions, Result, SubscribeOptions, Subscription, Timestamp,
    Topic,
};

use self::client::SlowRemote;
use self::connection::{Server, Weather};
use self::server::{State, Stored};
use crate::{Fault, Faults, Harness, Job, Probe, Process, Processes, Raw, Timing};

/// The imitation of a slow remote server: `slow-remote`.
pub struct SlowRemoteHarness {
    server: Arc<Server>,
    seed: AtomicU64,
}

impl SlowRemoteHarness {
    /// A server of its own. What chance decides on it (delays, lost confirmations) follows from the seed.
    pub fn new(seed: u64) -> Self {
        Self { server: Server::new(seed), seed: AtomicU64::new(seed) }
    }

    fn weather(&self, change: impl FnOnce(&mut Weather)) {
        self.server.weather.send_modify(change);
    }
}

#[async_trait]
impl Harness for SlowRemoteHarness {
    fn name(&self) -> &str {
        "slow-remote"
    }

    fn declared(&self) -> Capabilities {
        client::capabilities()
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(Self::new(self.seed.fetch_add(1, Ordering::Relaxed))))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(SlowRemote::connect(&self.server)?))
    }

    fn timing(&self) -> Timing {
        let mut timing = Timing::in_process().scaled(2.0);
        timing.reclaim = Duration::from_secs(4);
        timing.patience = Duration::from_secs(15);
        timing
    }

    fn confirms(&self) -> bool {
        false
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
impl Probe for SlowRemoteHarness {
    async fn stored(&self, topic: &Topic) -> Result<u64> {
        Ok(self.server.with(|state| state.status(topic)).retained.unwrap_or(0))
    }

    async fn pending(&self, topic: &Topic, group: &Group) -> Result<u64> {
        Ok(self.server.with(|state| state.pending(topic, group)))
    }

    async fn resources(&self) -> Result<BTreeMap<String, u64>> {
        Ok(self.server.with(|state| state.resources()))
    }
}

#[async_trait]
impl Faults for SlowRemoteHarness {
    fn can(&self, _: Fault) -> bool {
        true
    }

    async fn inject(&self, fault: Fault) -> Result<()> {
        match fault {
            Fault::Sever => self.weather(|weather| weather.cuts += 1),
            Fault::Restart => {
                self.weather(|weather| (weather.up, weather.cuts) = (false, weather.cuts + 1));
                tokio::time::sleep(Duration::from_millis(20)).await;
                self.server.with(State::hear_of_all);
                self.weather(|weather| weather.up = true);
            }
            Fault::Outage => self.weather(|weather| weather.up = false),
            Fault::Heal => {
                self.server.with(State::hear_of_all);
                self.weather(|weather| (weather.up, weather.delay) = (true, None));
            }
            Fault::Delay(delay) => self.weather(|weather| weather.delay = Some(delay)),
            Fault::FailWrites(count) => self.server.with(|state| state.failing = count),
            Fault::LoseConfirmations(count) => self.server.with(|state| state.losing = count),
        }
        Ok(())
    }
}

#[async_trait]
impl Raw for SlowRemoteHarness {
    async fn inject(&self, topic: &Topic, bytes: &[u8]) -> Result<()> {
        let json = Bytes::copy_from_slice(bytes);
        let stored = Stored { id: EventId::random(), created_at: Timestamp::now(), json };
        // An injected fault is for the backend to meet.
        while self.server.with(|state| state.append(topic, std::slice::from_ref(&stored))).is_err() {}
        Ok(())
    }
}

/// An instance that can be killed: it falls silent, and the server has to find out.
struct Killable {
    instance: SlowRemote,
    held: Option<(Subscription, Vec<Delivery>)>,
}

#[async_trait]
impl Processes for SlowRemoteHarness {
    async fn start(&self, job: Job) -> Result<Box<dyn Process>> {
        let instance = SlowRemote::connect(&self.server)?;
        let mut held = None;
        match job {
            Job::Publish { topic, count } => {
                for number in 0..count {
                    let event = Arc::new(Event::new(number.to_string()));
                    instance.publish(&topic, &[event], PublishOptions::new()).await?;
                }
            }
            Job::Hold { topic, group, count } => {
                let mut member = instance.subscribe(&topic, SubscribeOptions::group(group)).await?;
                let mut deliveries = Vec::new();
                while deliveries.len() < count
                    && let Some(next) = member.next().await
                {
                    deliveries.push(next?);
                }
                instance.flush().await?;
                held = Some((member, deliveries));
            }
        }
        Ok(Box::new(Killable { instance, held }))
    }
}

#[async_trait]
impl Process for Killable {
    async fn kill(self: Box<Self>) -> Result<()> {
        drop(self);
        Ok(())
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        self.instance.kill();
        self.held = None; // what it would still say is not heard
    }
}
