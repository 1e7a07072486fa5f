//! What an idle subscription costs in memory: 10,000 of them over 1,000 topics, each of which has seen an event and waits.

use std::process::Command;
use std::sync::Arc;

use futures::StreamExt;
use pubsub_core::{BoxError, Bus, Event, Subscription, Topic};
use pubsub_emitter::EventEmitterPubSub;
use tokio::sync::broadcast;

use super::{BACKEND, Contest, Party, Role, Unit};
use crate::event::{QUEUE, build};

const TOPICS: usize = 1000;
const PER_TOPIC: usize = 10;

const OURS: &str = "ours";
const BROADCAST: &str = "tokio broadcast";

pub(crate) fn contest() -> Contest {
    let party = |name, role| Party::new(name, role, move |_| measure(name));
    let parties = vec![party(OURS, Role::Ours), party(BROADCAST, Role::Peer)];
    Contest { backend: BACKEND, settings: vec![("idle memory", Unit::Bytes)], rounds: None, parties }
}

/// Measures one party in a fresh process: what was freed before would hide what is taken now.
fn measure(party: &str) -> Result<Vec<f64>, BoxError> {
    let output = Command::new(std::env::current_exe()?).args(["--idle", party]).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    match said.trim().parse() {
        Ok(bytes) if output.status.success() => Ok(vec![bytes]),
        _ => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()).into()),
    }
}

/// Measures one party in this process, in bytes per subscription.
pub(crate) fn measure_here(party: &str) -> Result<f64, BoxError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(async {
        match party {
            OURS => ours().await,
            BROADCAST => broadcast().await,
            other => Err(format!("there is no party `{other}`").into()),
        }
    })
}

async fn ours() -> Result<f64, BoxError> {
    let bus = Bus::from(EventEmitterPubSub::new());
    // What every bus has once, and what the process needs to run at all, is there before the count begins.
    drop(bus.subscribe("warm-up").await?);
    let mut subscriptions: Vec<Subscription> = Vec::with_capacity(TOPICS * PER_TOPIC);
    let before = resident()?;
    for number in 0..TOPICS {
        let topic = Topic::new(format!("topic-{number}"))?;
        let first = subscriptions.len();
        for _ in 0..PER_TOPIC {
            subscriptions.push(bus.subscribe(topic.clone()).await?);
        }
        bus.publish(topic, build(0)).await?;
        for subscription in &mut subscriptions[first..] {
            drop(subscription.next().await.ok_or("the stream has ended")??);
            let waits = futures::poll!(subscription.next()).is_pending();
            assert!(waits, "one event was published");
        }
    }
    per_subscription(before)
}

async fn broadcast() -> Result<f64, BoxError> {
    type Ends = (broadcast::Sender<Arc<Event>>, Vec<broadcast::Receiver<Arc<Event>>>);
    let mut topics: Vec<Ends> = Vec::with_capacity(TOPICS);
    let before = resident()?;
    for _ in 0..TOPICS {
        let sender = broadcast::Sender::new(QUEUE);
        let mut receivers: Vec<_> = (0..PER_TOPIC).map(|_| sender.subscribe()).collect();
        sender.send(build(0)).map_err(|_| "nobody listens")?;
        for receiver in &mut receivers {
            drop(receiver.recv().await?);
        }
        topics.push((sender, receivers));
    }
    per_subscription(before)
}

fn per_subscription(before: f64) -> Result<f64, BoxError> {
    Ok((resident()? - before) / (TOPICS * PER_TOPIC) as f64)
}

/// Resident bytes of this process, as Linux counts them.
pub(crate) fn resident() -> Result<f64, BoxError> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| format!("/proc/self/status: {error}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("/proc/self/status has no VmRSS")?;
    let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes * 1024.0)
}
