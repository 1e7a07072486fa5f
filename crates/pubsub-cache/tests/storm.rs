//! Many publish while many join, leave and resume, over several instances on one store.
//!
//! `CONFORMANCE_SEED=n` repeats a run's choices, `CONFORMANCE_STRESS=n` runs it `n` times.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{PATIENCE, event, events, topic, within};
use futures::StreamExt;
use futures::future::join_all;
use pubsub_cache::{CachingPubSub, InMemoryServerCache};
use pubsub_core::{AckMode, Cursor, Event, EventId, Overflow, PubSub, PublishOptions, Start, SubscribeOptions};
use pubsub_emitter::EventEmitterPubSub;

const PUBLISHERS: usize = 8;
const EACH: usize = 250;
const SUBSCRIBERS: usize = 40;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Waits for a random moment of the storm, in steps of the scheduler: there is no time here.
async fn later(random: &mut fastrand::Rng) {
    for _ in 0..random.usize(0..60) {
        tokio::task::yield_now().await;
    }
}

async fn publisher(bus: CachingPubSub, seed: u64) -> Vec<Arc<Event>> {
    let (mut random, mut sent) = (fastrand::Rng::with_seed(seed), Vec::new());
    while sent.len() < EACH {
        let batch = events(0..random.usize(1..4));
        within("publish", bus.publish(&topic("storm"), &batch, PublishOptions::new())).await.expect("published");
        sent.extend(batch);
        later(&mut random).await;
    }
    sent
}

/// What one client saw, from which index on.
struct Seen {
    from: Option<u64>,
    events: Vec<(u64, EventId)>,
}

/// Joins somewhere, leaves and resumes at random, on whichever instance, and reads up to the fence.
async fn subscriber(buses: Arc<[CachingPubSub]>, seed: u64, fence: EventId) -> Seen {
    let mut random = fastrand::Rng::with_seed(seed);
    later(&mut random).await;
    let topic = topic("storm");
    let mut seen = Seen { from: None, events: Vec::new() };
    let mut at: Option<Cursor> = None;
    loop {
        let bus = &buses[random.usize(0..buses.len())];
        let start = match (&at, seen.events.last()) {
            (Some(cursor), _) if random.bool() => Start::After(cursor.clone()),
            (Some(_), Some((index, _))) => Start::Index(index + 1),
            _ => match random.u8(0..4) {
                0 => Start::Latest,
                1 => Start::Earliest,
                2 => Start::Index(0),
                _ => {
                    let page = within("history", bus.history(&topic, Start::Earliest, 1000)).await.unwrap();
                    let place = random.usize(0..page.entries.len().max(1));
                    page.entries.into_iter().nth(place).map_or(Start::Earliest, |(cursor, _)| Start::After(cursor))
                }
            },
        };
        if at.is_none() {
            seen.from = match &start {
                Start::Latest => None,
                Start::Earliest => Some(0),
                Start::Index(index) => Some(*index),
                Start::After(cursor) => Some(cursor.position().major + 1),
            };
        }
        let ack = if random.bool() { AckMode::Auto } else { AckMode::Manual };
        let overflow = if random.bool() { Overflow::Wait } else { Overflow::DropOldest };
        let options = SubscribeOptions::fan_out().start(start).ack_mode(ack).overflow(overflow).prefetch(random.usize(1..300));
        let mut subscription = within("subscribe", bus.subscribe(&topic, options)).await.unwrap();
        let mut left = random.usize(1..400);
        while left > 0 {
            let delivery = within("the next delivery", subscription.next()).await.expect("the stream goes on").unwrap();
            assert_eq!(delivery.lagged(), 0, "seed {seed}: told to be lost");
            assert_eq!(delivery.attempt(), 1, "seed {seed}");
            if delivery.event().id() == &fence {
                return seen;
            }
            seen.events.push((delivery.event().index().expect("kept").index, delivery.event().id().clone()));
            at = delivery.cursor();
            drop(delivery.done());
            left -= 1;
            if random.u8(0..16) == 0 {
                later(&mut random).await;
            }
        }
        if random.bool() {
            within("unsubscribe", subscription.unsubscribe()).await;
        } else {
            drop(subscription);
        }
        later(&mut random).await;
    }
}

async fn storm(seed: u64) {
    let emitter = EventEmitterPubSub::builder().publish_timeout(PATIENCE).build().unwrap();
    let store = Arc::new(InMemoryServerCache::new());
    let instance = |_| CachingPubSub::new(Arc::new(emitter.connect()), store.clone());
    let buses: Arc<[_]> = (0..3).map(instance).collect();
    let mut random = fastrand::Rng::with_seed(seed);
    let fence = event("fence");
    let subscribers: Vec<_> =
        (0..SUBSCRIBERS).map(|_| tokio::spawn(subscriber(buses.clone(), random.u64(..), fence.id().clone()))).collect();
    let publishers = (0..PUBLISHERS).map(|number| tokio::spawn(publisher(buses[number % 3].clone(), random.u64(..))));
    let sent = join_all(publishers).await.into_iter().map(Result::unwrap).collect::<Vec<_>>();
    // Who joins at the latest and late must still see the fence: it is sent again, as one event, until everybody has.
    let until_seen = async {
        let all = join_all(subscribers);
        let mut all = std::pin::pin!(all);
        loop {
            within("publish", buses[0].publish(&topic("storm"), std::slice::from_ref(&fence), PublishOptions::new()))
                .await
                .unwrap();
            if let Ok(seen) = tokio::time::timeout(Duration::from_millis(100), &mut all).await {
                return seen;
            }
        }
    };
    let seen = within("all subscribers", until_seen).await;

    let page = buses[1].history(&topic("storm"), Start::Earliest, 10_000).await.unwrap();
    let kept: Vec<_> = page.entries.iter().map(|(_, event)| (event.index().unwrap().index, event.id().clone())).collect();
    let count = sent.iter().map(Vec::len).sum::<usize>();
    assert_eq!(kept.len(), count + 1, "seed {seed}");
    assert!(kept.iter().enumerate().all(|(place, (index, _))| *index == place as u64), "seed {seed}: dense indices");
    for (number, events) in sent.iter().enumerate() {
        let mut log = kept.iter();
        assert!(events.iter().all(|event| log.any(|(_, id)| id == event.id())), "seed {seed}: publisher {number}'s order");
    }
    for (number, seen) in seen.into_iter().map(Result::unwrap).enumerate() {
        let from = seen.from.or(seen.events.first().map(|(index, _)| *index)).unwrap_or(count as u64);
        let due = &kept[from as usize..count];
        assert!(seen.events == due, "seed {seed}: subscriber {number} saw {:?}.. of {from}..{count}", seen.events.len());
    }
    for bus in buses.iter() {
        let closed = within("close", bus.close(Duration::from_secs(5))).await.unwrap();
        assert!(closed.is_clean(), "seed {seed}: {closed:?}");
    }
    assert_eq!(emitter.inspect(&topic("storm")).await.unwrap().fan_out, Some(0), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_sees_exactly_its_suffix_once_in_order() {
    let first = number("CONFORMANCE_SEED").unwrap_or_else(|| fastrand::u64(..));
    for run in 0..number("CONFORMANCE_STRESS").unwrap_or(1).max(1) {
        let seed = first.wrapping_add(run);
        println!("CONFORMANCE_SEED={seed}");
        storm(seed).await;
    }
}
