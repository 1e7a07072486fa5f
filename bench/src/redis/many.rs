//! What following many topics costs: 10,000 subscriptions over 1,000 topics, and one each on fewer and more topics. Events come one by
//! one, each to another topic; the server's processor time for each is what is looked at.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fred::interfaces::StreamsInterface;
use fred::types::streams::XReadResponse;
use futures::StreamExt;
use futures::stream::select_all;
use pubsub_core::{BoxError, Bus, Event, Subscription, wire};
use pubsub_redis::RedisStreamsPubSub;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::server::{Server, cpu_of};
use super::{BACKEND, FRED, plain};
use crate::event::{build, read};
use crate::memory::idle::resident;
use crate::report::{Role, Unit, quantile};
use crate::rounds::{Contest, Party};

/// The time between two events, and how many there are.
const TICK: Duration = Duration::from_millis(1);
const EVENTS: usize = 2000;

/// How long everything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many topics are subscribed to when there are that many already.
const JOINS: usize = 20;

const OURS: &str = "ours";

/// What one process finds out.
struct Figures {
    /// The server's processor time for each event, in microseconds.
    cpu: f64,
    /// The median time from before an event is published until it is received, in microseconds.
    latency: f64,
    /// Resident bytes of the client for each subscription.
    memory: f64,
    /// The median time from before a topic is subscribed to until an event published to it then is received, in microseconds.
    join: f64,
}

pub(crate) fn contests(server: &Rc<Server>) -> Vec<Contest> {
    let party = |name, role, topics: usize, each: usize, pick: fn(Figures) -> Vec<f64>| {
        let server = server.clone();
        Party::new(name, role, move |_| {
            server.ask(&["FLUSHALL"])?;
            Ok(pick(measure(&server, name, topics, each)?))
        })
    };
    let contest = |settings, parties| Contest { backend: BACKEND, settings, rounds: Some(1), parties };
    let us = Unit::Microseconds;
    let cpu: fn(Figures) -> Vec<f64> = |figures| vec![figures.cpu, figures.latency];
    let both = |topics, each| vec![party(OURS, Role::Ours, topics, each, cpu), party(FRED, Role::Peer, topics, each, cpu)];
    let alone: fn(Figures) -> Vec<f64> = |figures| vec![figures.memory, figures.join];
    vec![
        contest(vec![("10,000 subscriptions", us), ("latency of these", us)], both(1000, 10)),
        contest(
            vec![("memory of these", Unit::Bytes), ("one more of these", us)],
            vec![party(OURS, Role::Ours, 1000, 10, alone)],
        ),
        contest(vec![("100 topics", us), ("latency of 100", us)], both(100, 1)),
        contest(vec![("10,000 topics", us), ("latency of 10,000", us)], both(10_000, 1)),
        contest(
            vec![("memory of 10,000", Unit::Bytes), ("one more of 10,000", us)],
            vec![party(OURS, Role::Ours, 10_000, 1, alone)],
        ),
    ]
}

/// Measures in a fresh process: what was freed before would hide what is taken now.
fn measure(server: &Server, party: &str, topics: usize, each: usize) -> Result<Figures, BoxError> {
    let job = format!("{party} {} {} {topics} {each}", server.address, server.id());
    let output = Command::new(std::env::current_exe()?).args(["--many", &job]).output()?;
    match serde_json::from_slice::<[f64; 4]>(&output.stdout) {
        Ok([cpu, latency, memory, join]) if output.status.success() => Ok(Figures { cpu, latency, memory, join }),
        _ => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()).into()),
    }
}

/// Measures in this process, and gives the figures in their order.
pub(crate) fn measure_here(job: &str) -> Result<[f64; 4], BoxError> {
    let words: Vec<_> = job.split(' ').collect();
    let [party, address, process, topics, each] = words[..] else { return Err("no such job".into()) };
    let (address, process, topics, each) = (address.parse()?, process.parse()?, topics.parse()?, each.parse()?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let playing = async {
            match party {
                OURS => ours(address, process, topics, each).await,
                _ => plainly(address, process, topics, each).await,
            }
        };
        let Figures { cpu, latency, memory, join } =
            tokio::time::timeout(PATIENCE, playing).await.map_err(|_| "the round did not end")??;
        Ok([cpu, latency, memory, join])
    })
}

fn name(topic: usize) -> String {
    format!("topic-{topic}")
}

async fn connect(address: SocketAddr) -> Result<Bus, BoxError> {
    Ok(RedisStreamsPubSub::builder(address.ip().to_string(), address.port()).connect().await?.into())
}

/// What was received, and when.
type Arrivals = mpsc::UnboundedReceiver<(u64, Instant)>;

/// Publishes one by one, each to another topic. Gives the server's processor time for each and their median latency.
async fn drive(
    publisher: &Bus,
    process: u32,
    topics: usize,
    each: usize,
    mut arrivals: Arrivals,
) -> Result<(f64, f64), BoxError> {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let before = cpu_of(process)?;
    let mut sent = Vec::with_capacity(EVENTS);
    for number in 0..EVENTS {
        ticks.tick().await;
        sent.push(Instant::now());
        // A step that shares no factor with the number of topics reaches all of them.
        publisher.publish(name(number * 7919 % topics), Event::clone(&build(number as u64))).await?;
    }
    let mut taken = Vec::with_capacity(EVENTS * each);
    while taken.len() < EVENTS * each {
        let (number, at) = arrivals.recv().await.ok_or("a stream has ended")?;
        taken.push((at - sent[number as usize]).as_secs_f64() * 1e6);
    }
    let cpu = (cpu_of(process)? - before).as_secs_f64() * 1e6 / EVENTS as f64;
    taken.sort_by(f64::total_cmp);
    Ok((cpu, quantile(&taken, 0.5)))
}

async fn ours(address: SocketAddr, process: u32, topics: usize, each: usize) -> Result<Figures, BoxError> {
    let (bus, publisher) = (connect(address).await?, connect(address).await?);
    // What an instance has once is there before the count begins.
    let mut first = bus.subscribe("warm-up").await?;
    publisher.publish("warm-up", Event::clone(&build(0))).await?;
    let _ = first.next().await.ok_or("the stream has ended")??;
    let before = resident()?;
    let mut subscriptions: Vec<Subscription> = Vec::with_capacity(topics * each);
    for topic in 0..topics {
        for _ in 0..each {
            subscriptions.push(bus.subscribe(name(topic)).await?);
        }
        publisher.publish(name(topic), Event::clone(&build(0))).await?;
    }
    for subscription in &mut subscriptions {
        let _ = subscription.next().await.ok_or("the stream has ended")??;
        assert!(futures::poll!(subscription.next()).is_pending(), "one event was published");
    }
    let memory = (resident()? - before) / (topics * each) as f64;
    let mut joins = Vec::with_capacity(JOINS);
    for topic in topics..topics + JOINS {
        let started = Instant::now();
        let mut joined = bus.subscribe(name(topic)).await?;
        publisher.publish(name(topic), Event::clone(&build(0))).await?;
        let _ = joined.next().await.ok_or("the stream has ended")??;
        joins.push(started.elapsed().as_secs_f64() * 1e6);
    }
    joins.sort_by(f64::total_cmp);
    let (arrived, arrivals) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut all = select_all(subscriptions);
        while let Some(Ok(delivery)) = all.next().await {
            let at = Instant::now();
            if arrived.send((read(delivery.event()).expect("a sample"), at)).is_err() {
                return;
            }
        }
    });
    let (cpu, latency) = drive(&publisher, process, topics, each, arrivals).await?;
    Ok(Figures { cpu, latency, memory, join: quantile(&joins, 0.5) })
}

/// A read that blocks over all topics, on one connection, and handlers that are called.
async fn plainly(address: SocketAddr, process: u32, topics: usize, each: usize) -> Result<Figures, BoxError> {
    let (publisher, client) = (connect(address).await?, plain::connect(address).await?);
    let (arrived, arrivals) = mpsc::unbounded_channel();
    let (began, begun) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let streams: Vec<_> = (0..topics).map(|topic| format!("mastra:topic:{}", name(topic))).collect();
        let mut from: HashMap<_, _> = streams.iter().map(|stream| (stream.clone(), "0-0".to_owned())).collect();
        let mut began = Some(began);
        loop {
            let ids: Vec<_> = streams.iter().map(|stream| from[stream].clone()).collect();
            let block = Some(super::BLOCK.as_millis() as u64);
            let reading = client.xread(Some(super::READ), block, streams.clone(), ids);
            began.take().map(|began| began.send(()));
            let answer: Option<XReadResponse<String, String, String, Bytes>> = reading.await?;
            for (stream, entries) in answer.into_iter().flatten() {
                for (id, fields) in entries {
                    let at = Instant::now();
                    let event = wire::decode(&fields["event"], None)?.event;
                    for _ in 0..each {
                        if arrived.send((read(&event)?, at)).is_err() {
                            return Ok::<_, BoxError>(());
                        }
                    }
                    from.insert(stream.clone(), id);
                }
            }
        }
    });
    begun.await?;
    let (cpu, latency) = drive(&publisher, process, topics, each, arrivals).await?;
    Ok(Figures { cpu, latency, memory: 0.0, join: 0.0 })
}
