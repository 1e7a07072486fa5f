//! How long an event takes from before it is published until it is received, at a steady thousand a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pubsub_core::BoxError;
use tokio::time::MissedTickBehavior;

use super::parties::{Broadcast, Ours, Publish, Receive, Setup};
use super::{BACKEND, Contest, Party, Role, Unit, on_runtime};
use crate::event::{build, read};
use crate::report::quantile;

pub(crate) const SETTINGS: [(&str, Unit); 2] = [("latency p50", Unit::Microseconds), ("latency p99", Unit::Microseconds)];

/// The time between two events.
pub(crate) const TICK: Duration = Duration::from_millis(1);

/// How many events a round has at least, so that one in a hundred is more than a few.
pub(crate) const MIN_EVENTS: u64 = 2000;

pub(crate) fn contest() -> Contest {
    let parties = vec![
        Party::new("ours", Role::Ours, |time| {
            on_runtime(rounded(time), async move { play(Ours::setup(1, None).await?, time).await })
        }),
        Party::new("tokio broadcast", Role::Peer, |time| on_runtime(rounded(time), play(Broadcast::setup(1), time))),
    ];
    Contest { backend: BACKEND, settings: SETTINGS.to_vec(), rounds: None, parties }
}

/// How long a round takes that has enough events.
fn rounded(time: Duration) -> Duration {
    time.max(TICK * MIN_EVENTS as u32)
}

/// Gives the median and the 99th percentile, in microseconds.
pub(crate) async fn play<P: Publish, R: Receive>(setup: Setup<P, R>, time: Duration) -> Result<Vec<f64>, BoxError> {
    let Setup { mut publisher, mut subscribers, handles } = setup;
    let mut subscriber = subscribers.pop().ok_or("there is one subscriber")?;
    let count = (rounded(time).as_micros() / TICK.as_micros()) as u64;
    let clock = Instant::now();
    let nanos = move || clock.elapsed().as_nanos() as u64;
    let sent: Arc<Vec<AtomicU64>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
    let when = sent.clone();
    let subscriber = tokio::spawn(async move {
        let mut taken = Vec::with_capacity(count as usize);
        while let Some(item) = subscriber.receive().await? {
            let arrived = nanos();
            let number = read(item.as_ref())?;
            subscriber.done(item);
            taken.push((arrived - when[number as usize].load(Ordering::Acquire)) as f64 / 1e3);
        }
        Ok::<_, BoxError>(taken)
    });
    let publisher = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        for number in 0..count {
            ticks.tick().await;
            let event = build(number);
            sent[number as usize].store(nanos(), Ordering::Release);
            publisher.publish(event).await?;
        }
        publisher.finish(count).await?;
        Ok::<_, BoxError>(())
    });
    publisher.await??;
    for handle in handles {
        handle.drained().await;
        handle.stop();
    }
    let mut taken = subscriber.await??;
    if taken.len() as u64 != count {
        return Err(format!("{} events arrived of {count}", taken.len()).into());
    }
    taken.sort_by(f64::total_cmp);
    Ok(vec![quantile(&taken, 0.5), quantile(&taken, 0.99)])
}
