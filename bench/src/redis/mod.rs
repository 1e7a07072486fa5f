//! The bus on a Redis server, beside the plain fred loop and the protocol written by hand, on a server of their own.

mod many;
mod plain;
mod resp;
#[cfg(feature = "sea-streamer")]
mod sea;
mod server;

use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pubsub_core::{BoxError, Bus, Event, Group, PublishOptions, Subscription};
use pubsub_redis::RedisStreamsPubSub;

pub(crate) use self::plain::Calls;
use self::server::Server;
use crate::event::{QUEUE, read};
use crate::memory::parties::{Publish, Receive, Setup, topic};
use crate::memory::{latency, on_runtime};
use crate::report::{Role, Unit};
use crate::rounds::{Contest, Party};

pub(crate) use self::many::measure_here as measure_many_here;

pub(crate) const BACKEND: &str = "redis";

/// The plain loop.
pub(crate) const FRED: &str = "fred";

/// The stream of the topic that everybody uses.
const STREAM: &str = "mastra:topic:orders";

/// How many entries the stream keeps: more than a round writes, so that nobody loses anything, and trimming is asked for all the same.
const KEPT: &str = "2000000";

/// How many events are published by one call, and how many are on their way at a time.
const TOGETHER: usize = 64;
const IN_FLIGHT: usize = QUEUE;

/// How many entries the loops read at a time, and how long they block.
const READ: u64 = 100;
const BLOCK: Duration = Duration::from_millis(100);

const FAN_OUT: usize = 10;
const GROUP: usize = 4;

/// Every contest of this backend.
pub(crate) fn contests(peers: bool) -> Vec<Contest> {
    let server = match Server::start() {
        Ok(server) => Rc::new(server),
        Err(why) => {
            eprintln!("bench: SKIPPED {BACKEND}: {why}");
            return Vec::new();
        }
    };
    let contest = |settings, parties| Contest { backend: BACKEND, settings, rounds: None, parties };
    let mut contests = vec![
        contest(
            vec![("1 to 1", Unit::Events), ("server CPU", Unit::Microseconds), ("server memory", Unit::Bytes)],
            parties(&server, 1, None),
        ),
        contest(vec![("1 to 10", Unit::Deliveries)], parties(&server, FAN_OUT, None)),
        contest(vec![("group of 4", Unit::Events)], parties(&server, GROUP, Some("g"))),
        contest(vec![("latency p50", Unit::Microseconds), ("latency p99", Unit::Microseconds)], latencies(&server)),
    ];
    if peers {
        join(&mut contests, &server);
    }
    contests.extend(many::contests(&server));
    contests
}

/// Adds the peer that is built only if it is asked for.
#[cfg(feature = "sea-streamer")]
fn join(contests: &mut [Contest], server: &Rc<Server>) {
    let throughput = |subscribers: usize, group: Option<&'static str>| {
        let copies = if group.is_some() { 1 } else { subscribers };
        party(sea::SEA_STREAMER, Role::Peer, server, move |server, time| async move {
            play(&server, sea::STREAM, sea::setup(&server, subscribers, group).await?, copies, time).await
        })
    };
    let latency = party(sea::SEA_STREAMER, Role::Peer, server, |server, time| async move {
        latency::play(sea::setup(&server, 1, None).await?, time).await
    });
    let parties = [throughput(1, None), throughput(FAN_OUT, None), throughput(GROUP, Some("g")), latency];
    contests.iter_mut().zip(parties).for_each(|(contest, party)| contest.parties.push(party));
}

#[cfg(not(feature = "sea-streamer"))]
fn join(_: &mut [Contest], _: &Rc<Server>) {
    eprintln!("bench: SKIPPED sea-streamer: it is built by `cargo xtask bench --peers`");
}

/// Plays a round on an empty server.
fn party<F>(
    name: &'static str,
    role: Role,
    server: &Rc<Server>,
    mut round: impl FnMut(Rc<Server>, Duration) -> F + 'static,
) -> Party
where
    F: Future<Output = Result<Vec<f64>, BoxError>>,
{
    let server = server.clone();
    Party::new(name, role, move |time| {
        server.ask(&["FLUSHALL"])?;
        on_runtime(time, round(server.clone(), time))
    })
}

fn parties(server: &Rc<Server>, subscribers: usize, group: Option<&'static str>) -> Vec<Party> {
    let copies = if group.is_some() { 1 } else { subscribers };
    vec![
        party("ours", Role::Ours, server, move |server, time| async move {
            let setup = Ours::setup(&server, subscribers, group, TOGETHER).await?;
            play(&server, STREAM, setup, copies, time).await
        }),
        party("RESP by hand", Role::Limit, server, move |server, time| async move {
            let setup = by_hand(&server, subscribers, group, TOGETHER).await?;
            play(&server, STREAM, setup, copies, time).await
        }),
        party(FRED, Role::Peer, server, move |server, time| async move {
            let setup = plainly(&server, subscribers, group, TOGETHER).await?;
            play(&server, STREAM, setup, copies, time).await
        }),
    ]
}

fn latencies(server: &Rc<Server>) -> Vec<Party> {
    vec![
        party("ours", Role::Ours, server, |server, time| async move {
            latency::play(Ours::setup(&server, 1, None, 1).await?, time).await
        }),
        party("RESP by hand", Role::Limit, server, |server, time| async move {
            latency::play(by_hand(&server, 1, None, 1).await?, time).await
        }),
        party(FRED, Role::Peer, server, |server, time| async move {
            latency::play(plainly(&server, 1, None, 1).await?, time).await
        }),
    ]
}

async fn by_hand(
    server: &Server,
    subscribers: usize,
    group: Option<&str>,
    together: usize,
) -> Result<Setup<resp::Publisher, resp::Receiver>, BoxError> {
    let progress = Progress::of(server, group)?;
    let mut receivers = Vec::new();
    match group {
        // One connection for all that listen: read once, decoded once, handed over to each.
        None => receivers.push(resp::Receiver::open(server.address, subscribers, None, progress.clone()).await?),
        Some(_) => {
            for number in 0..subscribers {
                let consumer = Some(format!("c{number}"));
                receivers.push(resp::Receiver::open(server.address, 1, consumer, progress.clone()).await?);
            }
        }
    }
    let publisher = resp::Publisher::open(server.address, together, progress).await?;
    Ok(Setup { publisher, subscribers: receivers, handles: Vec::new() })
}

async fn plainly(
    server: &Server,
    subscribers: usize,
    group: Option<&str>,
    together: usize,
) -> Result<Setup<plain::Publisher, plain::Receiver>, BoxError> {
    let progress = Progress::of(server, group)?;
    let mut receivers = Vec::new();
    for number in 0..subscribers {
        let consumer = group.map(|_| format!("c{number}"));
        receivers.push(plain::Receiver::open(server.address, consumer, progress.clone()).await?);
    }
    let publisher = plain::Publisher::open(server.address, together, progress).await?;
    Ok(Setup { publisher, subscribers: receivers, handles: Vec::new() })
}

/// How loops know that they have seen everything.
pub(crate) struct Progress {
    published: AtomicU64,
    handled: AtomicU64,
}

impl Progress {
    fn new() -> Arc<Self> {
        Arc::new(Self { published: AtomicU64::new(u64::MAX), handled: AtomicU64::new(0) })
    }

    /// Of a group that is made now.
    fn of(server: &Server, group: Option<&str>) -> Result<Arc<Self>, BoxError> {
        if let Some(group) = group {
            server.ask(&["XGROUP", "CREATE", STREAM, group, "$", "MKSTREAM"])?;
        }
        Ok(Self::new())
    }

    fn finish(&self, published: u64) {
        self.published.store(published, Ordering::Release);
    }

    /// One more was handled, by one of a group.
    fn handled(&self, of_group: bool) {
        if of_group {
            self.handled.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn is_over(&self, received: u64, of_group: bool) -> bool {
        let handled = if of_group { self.handled.load(Ordering::Acquire) } else { received };
        handled == self.published.load(Ordering::Acquire)
    }
}

/// Ours, as applications hold it: several events in a call, and several calls under way.
struct Ours {
    bus: Bus,
    together: usize,
    waiting: Vec<Arc<Event>>,
    calls: Calls,
}

async fn connect(server: &Server) -> Result<Bus, BoxError> {
    let builder = RedisStreamsPubSub::builder(server.address.ip().to_string(), server.address.port());
    Ok(builder.max_len(Some(KEPT.parse()?)).connect().await?.into())
}

impl Ours {
    async fn setup(
        server: &Server,
        subscribers: usize,
        group: Option<&str>,
        together: usize,
    ) -> Result<Setup<Self, Subscription>, BoxError> {
        let bus = connect(server).await?;
        let mut all = Vec::new();
        for _ in 0..subscribers {
            all.push(match group {
                Some(group) => bus.subscribe_group(topic(), Group::new(group)?).await?,
                None => bus.subscribe(topic()).await?,
            });
        }
        let handles = all.iter().map(Subscription::handle).collect();
        let publisher = Self { bus, together, waiting: Vec::new(), calls: Calls::new() };
        Ok(Setup { publisher, subscribers: all, handles })
    }

    async fn send(&mut self) -> Result<(), BoxError> {
        let (bus, events) = (self.bus.clone(), std::mem::take(&mut self.waiting));
        let call = async move {
            bus.publish_with(topic(), &events, PublishOptions::new()).await?;
            Ok(())
        };
        self.calls.begin(IN_FLIGHT / TOGETHER, call).await
    }
}

impl Publish for Ours {
    async fn publish(&mut self, event: Arc<Event>) -> Result<(), BoxError> {
        self.waiting.push(event);
        if self.waiting.len() == self.together { self.send().await } else { Ok(()) }
    }

    async fn finish(&mut self, _: u64) -> Result<(), BoxError> {
        if !self.waiting.is_empty() {
            self.send().await?;
        }
        self.calls.end().await
    }
}

/// One publisher and its subscribers, each in a task of its own. Gives deliveries per second until the last was handled, the server's
/// processor time per event (us), and its memory per event.
async fn play<P: Publish, R: Receive>(
    server: &Server,
    stream: &str,
    setup: Setup<P, R>,
    copies: usize,
    time: Duration,
) -> Result<Vec<f64>, BoxError> {
    let Setup { mut publisher, subscribers, handles } = setup;
    let (started, cpu) = (Instant::now(), server.cpu()?);
    let subscribers: Vec<_> = subscribers.into_iter().map(|subscriber| tokio::spawn(receive_all(subscriber))).collect();
    let publishing = tokio::spawn(async move {
        let (until, mut published) = (Instant::now() + time, 0);
        while !published_enough(published, until) {
            published += 1;
            publisher.publish(crate::event::build(published)).await?;
        }
        publisher.finish(published).await?;
        Ok::<_, BoxError>(published)
    });
    let published = publishing.await??;
    for handle in handles {
        handle.drained().await;
        handle.stop();
    }
    let (mut received, mut last) = (0, started);
    for subscriber in subscribers {
        let (count, at) = subscriber.await??;
        (received, last) = (received + count, last.max(at));
    }
    if received != published * copies as u64 {
        return Err(format!("{received} deliveries arrived of {}", published * copies as u64).into());
    }
    let cpu = (server.cpu()? - cpu).as_secs_f64() * 1e6 / published as f64;
    let memory: f64 = server.ask(&["MEMORY", "USAGE", stream, "SAMPLES", "0"])?.parse()?;
    Ok(vec![received as f64 / (last - started).as_secs_f64(), cpu, memory / published as f64])
}

/// Looks at the clock now and then.
fn published_enough(published: u64, until: Instant) -> bool {
    published.is_multiple_of(256) && Instant::now() >= until
}

/// Counts, and says when the last one came.
async fn receive_all<R: Receive>(mut subscriber: R) -> Result<(u64, Instant), BoxError> {
    let (mut received, mut last) = (0, Instant::now());
    while let Some(item) = subscriber.receive().await? {
        black_box(read(item.as_ref())?);
        subscriber.done(item);
        received += 1;
        if received % 64 == 0 {
            last = Instant::now();
        }
    }
    Ok((received, last))
}
