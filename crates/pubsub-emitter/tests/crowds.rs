//! Many that come and go: what they cost, and what they leave behind. One test at a time: each looks at the whole process.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pubsub_core::{Bus, Event, Subscription, Topic};
use pubsub_emitter::EventEmitterPubSub;

static ALONE: Mutex<()> = Mutex::new(());

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// Lets so many subscriptions of one topic come, and times their going, oldest first.
async fn come_and_go(count: usize) -> Duration {
    let (bus, topic) = (Bus::from(EventEmitterPubSub::new()), Topic::new("t").unwrap());
    let mut crowd: Vec<Subscription> = Vec::with_capacity(count);
    for _ in 0..count {
        crowd.push(bus.subscribe(&topic).await.unwrap());
    }
    let started = Instant::now();
    crowd.into_iter().for_each(drop);
    started.elapsed()
}

#[test]
fn leaving_a_crowded_topic_costs_no_search() {
    let _alone = ALONE.lock();
    // Eight times as many take eight times as long, and not 64 times; a noisy machine may try again.
    let mut factors = Vec::new();
    for _ in 0..5 {
        let (few, many) = block_on(async { (come_and_go(2000).await, come_and_go(16_000).await) });
        factors.push(many.as_secs_f64() / few.as_secs_f64());
        if factors.last().is_some_and(|factor| *factor < 20.0) {
            return;
        }
    }
    panic!("eight times as many took {factors:.0?} times as long");
}

/// Resident bytes of this process.
#[cfg(target_os = "linux")]
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

#[test]
#[cfg(target_os = "linux")]
fn topics_that_are_gone_leave_nothing_behind() {
    let _alone = ALONE.lock();
    let emitter = EventEmitterPubSub::new();
    let bus = Bus::from(emitter.clone());
    let round = async |round: usize| {
        let mut crowd = Vec::new();
        for number in 0..10_000 {
            let topic = Topic::new(format!("topic-{round}-{number}")).unwrap();
            crowd.push(bus.subscribe(&topic).await.unwrap());
            bus.publish(&topic, Event::new("x").with_data(number)).await.unwrap();
        }
        drop(crowd);
        resident()
    };
    let (first, last) = block_on(async {
        round(0).await;
        let first = round(1).await;
        round(2).await;
        (first, round(3).await)
    });
    assert!(format!("{emitter:?}").contains("topics: 0"), "{emitter:?}");
    // Each round's topics took more than ten times that.
    assert!(last < first + (2 << 20), "{first} bytes, then {last}");
}
