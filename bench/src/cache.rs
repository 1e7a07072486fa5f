//! The replay decorator over the in-process bus, beside the same bus without it and a plain vector of events.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use pubsub_cache::{CachingPubSub, InMemoryServerCache};
use pubsub_core::{BoxError, Bus, Event, Subscription};
use pubsub_emitter::EventEmitterPubSub;

use crate::event::{build, read};
use crate::memory::on_runtime;
use crate::memory::parties::{Ours, Publish, Setup, topic};
use crate::memory::throughput::play;
use crate::node;
use crate::report::{Role, Unit};
use crate::rounds::{Contest, Party};

pub(crate) const BACKEND: &str = "cache";

/// The same as the bus, without the decorator.
pub(crate) const BARE: &str = "bare emitter";

/// How many events are replayed at a time: what the store keeps of a topic by default.
const KEPT: usize = 10_000;

/// How many events a vector keeps that nothing else bounds.
const VECTOR: usize = 10_000;

pub(crate) fn contests(peers: bool) -> Vec<Contest> {
    let contest = |setting, unit, parties| Contest { backend: BACKEND, settings: vec![(setting, unit)], rounds: None, parties };
    let mut contests = vec![
        contest(
            "publish",
            Unit::Events,
            vec![
                Party::new("ours", Role::Ours, |time| {
                    on_runtime(time, async move { play(setup(cached()).await?, 1, time).await })
                }),
                Party::new("vector and emitter", Role::Limit, |time| on_runtime(time, vector_and_emitter(time))),
                Party::new(BARE, Role::Peer, |time| {
                    on_runtime(time, async move { play(setup(EventEmitterPubSub::new().into()).await?, 1, time).await })
                }),
            ],
        ),
        contest(
            "replay",
            Unit::Deliveries,
            vec![
                Party::new("ours", Role::Ours, |time| on_runtime(time, replay(time))),
                Party::new("vector", Role::Limit, |time| on_runtime(time, read_vector(time))),
            ],
        ),
    ];
    if peers {
        node::join(&mut contests);
    }
    contests
}

fn cached() -> Bus {
    CachingPubSub::new(Arc::new(EventEmitterPubSub::new()), Arc::new(InMemoryServerCache::new())).into()
}

/// A bus with one subscriber.
async fn setup(bus: Bus) -> Result<Setup<Ours, Subscription>, BoxError> {
    let subscriber = bus.subscribe(topic()).await?;
    let handles = vec![subscriber.handle()];
    Ok(Setup { publisher: Ours::over(bus), subscribers: vec![subscriber], handles })
}

/// The least that keeping costs: a ring of events, beside the bare bus.
struct VectorAndEmitter {
    kept: std::collections::VecDeque<Arc<Event>>,
    bus: Ours,
}

impl Publish for VectorAndEmitter {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        self.kept.push_back(event.clone());
        if self.kept.len() > VECTOR {
            self.kept.pop_front();
        }
        self.bus.publish(event).await
    }
}

async fn vector_and_emitter(time: Duration) -> Result<Vec<f64>, BoxError> {
    let Setup { publisher, subscribers, handles } = setup(EventEmitterPubSub::new().into()).await?;
    let publisher = VectorAndEmitter { kept: std::collections::VecDeque::new(), bus: publisher };
    play(Setup { publisher, subscribers, handles }, 1, time).await
}

/// Replays a whole topic, again and again.
async fn replay(time: Duration) -> Result<Vec<f64>, BoxError> {
    let bus = cached();
    for number in 0..KEPT as u64 {
        bus.publish(topic(), build(number)).await?;
    }
    let reader = tokio::spawn(async move {
        let started = Instant::now();
        let mut seen = 0;
        while started.elapsed() < time {
            let mut replay = bus.subscribe_with_replay(topic()).await?;
            for due in 0..KEPT as u64 {
                let delivery = replay.next().await.ok_or("a replay ended early")??;
                if read(delivery.event())? != due {
                    return Err("a replay out of order".into());
                }
            }
            seen += KEPT;
        }
        Ok::<_, BoxError>(seen as f64 / started.elapsed().as_secs_f64())
    });
    Ok(vec![reader.await??])
}

/// The least that a replay does: each event of a vector, in the reader's own right.
async fn read_vector(time: Duration) -> Result<Vec<f64>, BoxError> {
    let kept: Vec<Arc<Event>> = (0..KEPT as u64).map(build).collect();
    let reader = tokio::spawn(async move {
        let started = Instant::now();
        let mut seen = 0;
        while started.elapsed() < time {
            for (due, event) in black_box(&kept).iter().enumerate() {
                let event = black_box(event.clone());
                if read(&event)? != due as u64 {
                    return Err("out of order".into());
                }
            }
            seen += KEPT;
        }
        Ok::<_, BoxError>(seen as f64 / started.elapsed().as_secs_f64())
    });
    Ok(vec![reader.await??])
}
