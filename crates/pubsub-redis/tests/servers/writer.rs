//! What the one task that writes owes to each of its publishers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use pubsub_core::{Bus, Event};
use tokio::time::{sleep, timeout};

use crate::server::Server;
use crate::support::{PATIENCE, at, configured, connect, start};

/// More than goes in one call, and not a multiple of it.
const PUBLISHERS: usize = 600;

/// Events of which two do not fit into one call.
const LARGE: usize = 6;
const SIZE: usize = 3 << 20;

fn length(server: &Server, topic: &str) -> u64 {
    server.ask(&["XLEN", &format!("mastra:topic:{topic}")]).unwrap().number()
}

pub(crate) async fn crowded() {
    let server = start();
    let bus = connect(at(server.address)).await;
    // Held by the server until all of them wait.
    server.ask(&["CLIENT", "PAUSE", "500", "WRITE"]).unwrap();
    let small = join_all((0..PUBLISHERS).map(|_| bus.publish("small", Event::new("x"))));
    let large = join_all((0..LARGE).map(|_| bus.publish("large", Event::new("x").with_data("x".repeat(SIZE)))));
    let (small, large) = timeout(PATIENCE, futures::future::join(small, large)).await.expect("in time");
    for published in small.into_iter().chain(large) {
        published.unwrap();
    }
    assert_eq!((length(&server, "small"), length(&server, "large")), (PUBLISHERS as u64, LARGE as u64));
}

pub(crate) async fn one_bad_topic() {
    // Other topics get their turn long before a publisher to the bad one loses patience.
    const LATEST: Duration = Duration::from_secs(5);
    let server = start();
    server.ask(&["SET", "mastra:topic:bad", "x"]).unwrap();
    let bus = Bus::from(configured(at(server.address)).publish_timeout(2 * LATEST).connect().await.unwrap());
    let done = Arc::new(AtomicBool::new(false));
    let bad = {
        let (bus, done) = (bus.clone(), done.clone());
        tokio::spawn(async move {
            while !done.load(Ordering::Acquire) {
                bus.publish("bad", Event::new("x")).await.unwrap_err();
            }
        })
    };
    for _ in 0..10 {
        // In the middle of a call to the bad topic, more often than not: what became of that has to be found out.
        server.ask(&["CLIENT", "KILL", "TYPE", "normal"]).unwrap();
        for _ in 0..20 {
            timeout(LATEST, bus.publish("good", Event::new("x"))).await.expect("its turn").unwrap();
        }
        sleep(Duration::from_millis(fastrand::u64(..50))).await; // at another moment each time
    }
    done.store(true, Ordering::Release);
    bad.await.unwrap();
    assert_eq!(length(&server, "good"), 200);
}
