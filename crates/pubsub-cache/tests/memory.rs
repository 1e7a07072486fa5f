//! What comes and goes leaves nothing behind.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{events, topic};
use futures::StreamExt;
use futures::executor::block_on;
use pubsub_cache::{CachingPubSub, InMemoryServerCache, ServerCache};
use pubsub_core::{Event, PubSub, PublishOptions, Start, SubscribeOptions};
use pubsub_emitter::EventEmitterPubSub;

/// What this process has in memory, in bytes.
#[cfg(target_os = "linux")]
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}

/// A round of a million events through fifty topics, read live by one watch each and replayed by others.
#[cfg(target_os = "linux")]
async fn round(bus: &CachingPubSub, per_topic: usize) {
    const TOPICS: usize = 50;
    const BATCH: usize = 100;
    let topics: Vec<_> = (0..TOPICS).map(|number| topic(&format!("t{number}"))).collect();
    let mut watches = Vec::new();
    for topic in &topics {
        watches.push(bus.subscribe(topic, SubscribeOptions::fan_out()).await.unwrap());
    }
    for turn in 0..per_topic / BATCH {
        for (topic, watch) in topics.iter().zip(&mut watches) {
            let batch: Vec<_> = (0..BATCH).map(|number| Arc::new(Event::new("x").with_data(number))).collect();
            bus.publish(topic, &batch, PublishOptions::new()).await.unwrap();
            for _ in 0..BATCH {
                drop(watch.next().await.unwrap().unwrap());
            }
            if turn % 50 == 0 {
                let mut replay = bus.subscribe(topic, SubscribeOptions::fan_out().start(Start::Earliest)).await.unwrap();
                for _ in 0..BATCH {
                    drop(replay.next().await.unwrap().unwrap());
                }
            }
        }
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_million_events_through_bounded_topics_end_where_they_started() {
    let store = InMemoryServerCache::builder().max_events(500).build().unwrap();
    let bus = CachingPubSub::new(Arc::new(EventEmitterPubSub::new()), store.clone());
    round(&bus, 1000).await; // all bounds are reached
    let (before, bytes) = (resident(), store.bytes());
    round(&bus, 20_000).await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more after a million events");
    assert_eq!(store.bytes(), bytes);
    for number in 0..50 {
        bus.clear_topic(&topic(&format!("t{number}"))).await.unwrap();
    }
    assert_eq!(store.bytes(), 0);
}

/// Adding, forgetting for a bound and clearing at once: the count of bytes never says more or less than there is.
#[test]
fn what_goes_before_it_is_counted_takes_nothing_else_along() {
    let store = InMemoryServerCache::builder().max_events(1).max_bytes(1 << 20).build().unwrap();
    let witness = topic("witness");
    block_on(store.append(&witness, &events(0..1))).unwrap();
    let size = store.bytes();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, done) = (&store, &done);
            scope.spawn(move || {
                let shared = topic("shared");
                for turn in 0..20_000 {
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    match (thread + turn) % 4 {
                        0 => block_on(store.clear(&shared)).unwrap(),
                        1 => {
                            let value = bytes::Bytes::from(vec![0; 1000]);
                            block_on(store.set("value", value, Some(Duration::from_secs(9)))).unwrap();
                            block_on(store.delete("value")).unwrap();
                        }
                        _ => drop(store.append_now(&shared, &events(0..2))),
                    }
                }
                done.store(true, Ordering::Relaxed);
            });
        }
    });
    let page = block_on(store.read(&witness, 0, 9)).unwrap();
    assert_eq!(page.events.len(), 1, "forgotten though there was room");
    block_on(store.clear(&topic("shared"))).unwrap();
    assert_eq!(store.bytes(), size);
}
