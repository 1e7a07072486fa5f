//! The bus on Google Cloud Pub/Sub beside gcloud-sdk used by hand, on Google's emulator: its speed is the emulator's, so that what
//! the client spends of its own counts as much.

mod by_hand;

use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use nix::time::{ClockId, clock_gettime};
use pubsub_conformance::harnesses::gcp::{Emulator, program};
use pubsub_core::{BoxError, Bus, Event, Group, PublishOptions};
use pubsub_gcp::{GcpBuilder, GoogleCloudPubSub};

use crate::event::{build, read};
use crate::memory::on_runtime;
use crate::memory::parties::topic;
use crate::redis::Calls;
use crate::report::{Role, Unit};
use crate::rounds::{Contest, Party};

pub(crate) const BACKEND: &str = "gcp";

/// gcloud-sdk, used by hand.
pub(crate) const BY_HAND: &str = "gcloud-sdk";

/// How many events are published by one call, and how many calls are on their way at a time.
const TOGETHER: usize = 64;
const CALLS: usize = 16;

/// How many events a round pulls over each stream: the emulator's are slow.
const PULLED: u64 = 2_000;

/// How many streams pull.
const STREAMS: [usize; 2] = [1, 5];

/// Every contest of this backend.
pub(crate) fn contests() -> Vec<Contest> {
    let emulator = match program().ok_or_else(|| std::io::Error::other("it is not installed")).and_then(|_| Emulator::start()) {
        Ok(emulator) => Rc::new(emulator),
        Err(why) => {
            eprintln!("bench: SKIPPED {BACKEND}: Google's emulator: {why}");
            return Vec::new();
        }
    };
    let contest = |names: [&'static str; 2], parties| {
        let settings = vec![(names[0], Unit::Events), (names[1], Unit::Microseconds)];
        Contest { backend: BACKEND, settings, rounds: None, parties }
    };
    let publishers = vec![
        party("ours", Role::Ours, &emulator, |place, time| async move { publish(Ours::open(&place, 1).await?, time).await }),
        party(BY_HAND, Role::Peer, &emulator, |place, time| async move {
            publish(by_hand::Publisher::open(&place).await?, time).await
        }),
    ];
    let pullers = |streams| {
        vec![
            party("ours", Role::Ours, &emulator, move |place, _| async move {
                let ours = Ours::open(&place, streams).await?;
                pull(&place, streams, |all| ours.pull(all)).await
            }),
            party(BY_HAND, Role::Peer, &emulator, move |place, _| async move {
                pull(&place, streams, |all| by_hand::pull(place.clone(), streams, all)).await
            }),
        ]
    };
    vec![
        contest(["publish", "publish, client CPU"], publishers),
        contest(["pull, 1 stream", "pull, 1, client CPU"], pullers(STREAMS[0])),
        contest(["pull, 5 streams", "pull, 5, client CPU"], pullers(STREAMS[1])),
    ]
}

/// Where a round takes place: in a project of its own.
#[derive(Debug, Clone)]
struct Place {
    url: String,
    project: String,
}

fn party<F>(
    name: &'static str,
    role: Role,
    emulator: &Rc<Emulator>,
    mut round: impl FnMut(Place, Duration) -> F + 'static,
) -> Party
where
    F: Future<Output = Result<Vec<f64>, BoxError>>,
{
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let emulator = emulator.clone();
    Party::new(name, role, move |time| {
        let project = format!("bench-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let place = Place { url: format!("http://{}", emulator.address), project };
        on_runtime(time, round(place, time))
    })
}

/// The processor time that this process has used: the emulator is another.
fn cpu() -> Result<Duration, BoxError> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

/// Publishes several events at a time.
trait Publish {
    fn publish(&mut self, events: Vec<Arc<Event>>) -> impl Future<Output = Result<(), BoxError>>;
    fn finish(&mut self) -> impl Future<Output = Result<(), BoxError>>;
}

/// Events per second that were confirmed, and the client's processor time for each (us).
async fn publish(mut publisher: impl Publish, time: Duration) -> Result<Vec<f64>, BoxError> {
    let (started, used, mut published) = (Instant::now(), cpu()?, 0);
    while started.elapsed() < time {
        publisher.publish((published..published + TOGETHER as u64).map(build).collect()).await?;
        published += TOGETHER as u64;
    }
    publisher.finish().await?;
    let (took, used) = (started.elapsed(), cpu()? - used);
    Ok(vec![published as f64 / took.as_secs_f64(), used.as_secs_f64() * 1e6 / published as f64])
}

/// Events per second from the first request until the last acknowledgement was confirmed, and the client's processor time for each (us).
async fn pull<F>(place: &Place, streams: usize, pull: impl FnOnce(u64) -> F) -> Result<Vec<f64>, BoxError>
where
    F: Future<Output = Result<(), BoxError>>,
{
    let all = PULLED * streams as u64;
    by_hand::prepare(place).await?;
    let mut publisher = by_hand::Publisher::open(place).await?;
    for first in (0..all).step_by(TOGETHER) {
        publisher.publish((first..all.min(first + TOGETHER as u64)).map(build).collect()).await?;
    }
    publisher.finish().await?;
    let (started, used) = (Instant::now(), cpu()?);
    pull(all).await?;
    let (took, used) = (started.elapsed(), cpu()? - used);
    Ok(vec![all as f64 / took.as_secs_f64(), used.as_secs_f64() * 1e6 / all as f64])
}

/// Ours, as applications hold it.
struct Ours {
    bus: Bus,
    calls: Calls,
}

fn builder(place: &Place) -> GcpBuilder {
    // Everybody's events are of one run: with ordering there would be one request at a time.
    GoogleCloudPubSub::builder(&place.project).endpoint(&place.url).ordering(false)
}

impl Ours {
    async fn open(place: &Place, streams: usize) -> Result<Self, BoxError> {
        Ok(Self { bus: builder(place).streams(streams).connect().await?.into(), calls: Calls::new() })
    }

    async fn pull(self, all: u64) -> Result<(), BoxError> {
        let mut member = self.bus.subscribe_group(topic(), Group::new(by_hand::GROUP)?).await?;
        for _ in 0..all {
            let delivery = member.next().await.ok_or("the stream ended")??;
            black_box(read(delivery.event())?);
            drop(delivery.done());
        }
        self.bus.flush().await?;
        Ok(())
    }
}

impl Publish for Ours {
    async fn publish(&mut self, events: Vec<Arc<Event>>) -> Result<(), BoxError> {
        let bus = self.bus.clone();
        let call = async move {
            bus.publish_with(topic(), &events, PublishOptions::new()).await?;
            Ok(())
        };
        self.calls.begin(CALLS, call).await
    }

    async fn finish(&mut self) -> Result<(), BoxError> {
        self.calls.end().await
    }
}
