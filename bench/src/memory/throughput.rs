//! How many events a second: one publisher as fast as it can, for a while; the clock stops when the last event is handled.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pubsub_core::{BoxError, Event};
use pubsub_emitter::EventEmitterPubSub;

use super::parties::{Broadcast, Direct, Flume, Mpsc, Ours, Publish, Receive, Setup, topic};
use super::{BACKEND, Contest, Party, Role, Unit, on_runtime};
use crate::event::{build, read};

const FAN_OUT: usize = 10;
const GROUP: usize = 4;

/// How many events are published between two looks at the clock.
const BETWEEN_LOOKS: u64 = 256;

pub(crate) fn contests() -> Vec<Contest> {
    let contest = |setting, unit, parties| Contest { backend: BACKEND, settings: vec![(setting, unit)], rounds: None, parties };
    vec![
        contest("queued 1 to 1", Unit::Events, fan_out(1)),
        contest("inline 1 to 1", Unit::Events, vec![Party::new("ours", Role::Ours, inline), direct(1)]),
        contest("queued 1 to 10", Unit::Deliveries, fan_out(FAN_OUT)),
        contest("group of 4", Unit::Events, group()),
    ]
}

fn fan_out(subscribers: usize) -> Vec<Party> {
    vec![
        Party::new("ours", Role::Ours, move |time| {
            on_runtime(time, async move { play(Ours::setup(subscribers, None).await?, subscribers, time).await })
        }),
        direct(subscribers),
        Party::new("tokio broadcast", Role::Peer, move |time| {
            on_runtime(time, play(Broadcast::setup(subscribers), subscribers, time))
        }),
        Party::new("tokio mpsc", Role::Peer, move |time| on_runtime(time, play(Mpsc::setup(subscribers), subscribers, time))),
        Party::new("flume", Role::Peer, move |time| on_runtime(time, play(Flume::setup(subscribers), subscribers, time))),
    ]
}

/// Ours with acks; the channels have none.
fn group() -> Vec<Party> {
    vec![
        Party::new("ours", Role::Ours, |time| {
            on_runtime(time, async move { play(Ours::setup(GROUP, Some("workers")).await?, 1, time).await })
        }),
        direct(1),
        Party::new("tokio mpsc", Role::Peer, |time| on_runtime(time, play(Mpsc::shared(GROUP), 1, time))),
        Party::new("flume", Role::Peer, |time| on_runtime(time, play(Flume::shared(GROUP), 1, time))),
    ]
}

/// The limit: every event is built, stamped, and given to handlers by calling them.
fn direct(handlers: usize) -> Party {
    Party::new("direct call", Role::Limit, move |time| {
        on_runtime(time, async move {
            let publisher = Direct((0..handlers).map(|_| Box::new(handle) as _).collect());
            let started = Instant::now();
            let published = tokio::spawn(publish_for(publisher, time)).await??;
            Ok(vec![rate(published * handlers as u64, started)])
        })
    })
}

fn handle(event: &Arc<Event>) {
    black_box(read(event).expect("a sample"));
}

/// Ours, handled in the publisher's task.
fn inline(time: Duration) -> Result<Vec<f64>, BoxError> {
    let handled = Arc::new(AtomicU64::new(0));
    let counter = handled.clone();
    on_runtime(time, async move {
        let emitter = EventEmitterPubSub::new();
        let subscription = emitter.subscribe_inline(&topic(), move |event| {
            handle(event);
            counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed); // one publisher: one writer
        })?;
        let started = Instant::now();
        let published = tokio::spawn(publish_for(Ours::over(emitter.into()), time)).await??;
        let figure = rate(published, started);
        drop(subscription);
        all_arrived(published, handled.load(Ordering::Relaxed))?;
        Ok(vec![figure])
    })
}

/// Publishes for this long and counts. Dropping the publisher at the end closes a channel.
async fn publish_for(mut publisher: impl Publish, time: Duration) -> Result<u64, BoxError> {
    let until = Instant::now() + time;
    let mut published = 0;
    loop {
        published += 1;
        publisher.publish(build(published)).await?;
        if published % BETWEEN_LOOKS == 0 && Instant::now() >= until {
            return Ok(published);
        }
    }
}

/// One publisher and its subscribers, each in a task of its own; each event comes in so many copies. Gives deliveries per second.
pub(crate) async fn play<P: Publish, R: Receive>(
    setup: Setup<P, R>,
    copies: usize,
    time: Duration,
) -> Result<Vec<f64>, BoxError> {
    let Setup { publisher, subscribers, handles } = setup;
    let started = Instant::now();
    let subscribers: Vec<_> = subscribers.into_iter().map(|subscriber| tokio::spawn(receive_all(subscriber))).collect();
    let published = tokio::spawn(publish_for(publisher, time)).await??;
    for handle in handles {
        handle.drained().await;
        handle.stop();
    }
    let mut received = 0;
    for subscriber in subscribers {
        received += subscriber.await??;
    }
    let figure = rate(received, started);
    all_arrived(published * copies as u64, received)?;
    Ok(vec![figure])
}

async fn receive_all<R: Receive>(mut subscriber: R) -> Result<u64, BoxError> {
    let mut received = 0;
    while let Some(item) = subscriber.receive().await? {
        black_box(read(item.as_ref())?);
        subscriber.done(item);
        received += 1;
    }
    Ok(received)
}

fn all_arrived(published: u64, received: u64) -> Result<(), BoxError> {
    if published == received { Ok(()) } else { Err(format!("{received} deliveries arrived of {published}").into()) }
}

fn rate(count: u64, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64()
}
