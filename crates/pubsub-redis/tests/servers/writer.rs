//! What the one task that writes owes to each of its publishers.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::{join, join_all};
use pubsub_core::{Bus, Event, PublishOptions};
use tokio::time::{sleep, timeout};

use crate::proxy::Proxy;
use crate::server::Server;
use crate::support::{PATIENCE, STREAM, at, configured, connect, group, next, start, until, written};

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

/// What the server does with this is not heard of: the connection ends with its first answer.
async fn unheard<T>(proxy: &Proxy, publishing: impl Future<Output = T>) -> T {
    let cuts = proxy.cuts();
    proxy.deafen(true);
    let hearing = async {
        until("an answer is lost", || async { proxy.cuts() > cuts }).await;
        proxy.deafen(false);
    };
    timeout(PATIENCE, join(publishing, hearing)).await.expect("in time").0
}

pub(crate) async fn forgotten_and_unheard() {
    const EACH: usize = 250;
    let server = start();
    let proxy = Proxy::start(server.address, 0).await.unwrap();
    let bus = connect(at(proxy.address)).await;
    bus.publish("t", Event::new("0")).await.unwrap();
    let batch = async |first: usize| {
        let events: Vec<_> = (first..first + EACH).map(|number| Arc::new(Event::new(number.to_string()))).collect();
        bus.publish_with("t", &events, PublishOptions::new()).await
    };
    for round in 0..5 {
        // Both are on their way when the first is refused, and nobody hears of that.
        server.ask(&["SCRIPT", "FLUSH"]).unwrap();
        let first = 1 + 2 * EACH * round;
        let (one, other) = unheard(&proxy, join(batch(first), batch(first + EACH))).await;
        one.unwrap();
        other.unwrap();
    }
    let expected: Vec<_> = (0..=10 * EACH).map(|number| number.to_string()).collect();
    assert_eq!(written(&server), expected);
}

pub(crate) async fn restarts() {
    let kept = |_: &Path, _| Ok(["--appendfsync", "always"].map(str::to_owned).into());
    let server = Arc::new(Server::start_with(kept).unwrap());
    let done = Arc::new(AtomicBool::new(false));
    // So patient that only a writer which looks by itself is in time.
    let builder = configured(at(server.address)).publish_timeout(10 * PATIENCE);
    let bus = Bus::from(builder.connect().await.unwrap());
    // One after another, so that some are handed in at the very moment that the connection ends.
    let publishers: Vec<_> = (0..4)
        .map(|publisher| {
            let (bus, done) = (bus.clone(), done.clone());
            tokio::spawn(async move {
                let mut sent = 0;
                while !done.load(Ordering::Acquire) {
                    let publishing = bus.publish(format!("t{publisher}"), Event::new("x"));
                    timeout(PATIENCE, publishing).await.expect("in time").unwrap();
                    sent += 1;
                }
                sent
            })
        })
        .collect();
    for _ in 0..10 {
        sleep(Duration::from_millis(fastrand::u64(20..100))).await;
        let again = server.clone();
        tokio::task::spawn_blocking(move || again.restart()).await.unwrap().unwrap();
    }
    done.store(true, Ordering::Release);
    for (publisher, sent) in join_all(publishers).await.into_iter().enumerate() {
        assert_eq!(length(&server, &format!("t{publisher}")), sent.unwrap(), "each is there, once");
    }
}

pub(crate) async fn clock_set_back() {
    const AHEAD: &str = "9999999999999-5";
    let server = start();
    let proxy = Proxy::start(server.address, 0).await.unwrap();
    let (publisher, bus) = (connect(at(proxy.address)).await, connect(at(server.address)).await);
    let (mut listener, mut member) = (bus.subscribe("t").await.unwrap(), bus.subscribe_with("t", group("g")).await.unwrap());
    publisher.publish("t", Event::new("0")).await.unwrap();
    assert_eq!(next(&mut listener).await.event().event_type(), "0");
    next(&mut member).await.done().await;
    assert!(futures::poll!(futures::StreamExt::next(&mut listener)).is_pending());
    // As the stream is after a server's clock has been set back by centuries.
    let event = r#"{"type":"1","id":"0b1e5c0e-6a34-4e0e-9d5e-5f2f6e0f6a11","runId":"r","data":null,"createdAt":"2026-01-02T03:04:05.006Z"}"#;
    server.ask(&["XADD", STREAM, AHEAD, "event", event]).unwrap();
    publisher.publish("t", Event::new("2")).await.unwrap();
    let mut later = bus.subscribe("t").await.unwrap();
    unheard(&proxy, publisher.publish("t", Event::new("3"))).await.unwrap();
    publisher.publish("t", Event::new("4")).await.unwrap();
    assert_eq!(written(&server), ["0", "1", "2", "3", "4"]);
    for kind in ["1", "2", "3", "4"] {
        assert_eq!(next(&mut listener).await.event().event_type(), kind);
        let delivery = next(&mut member).await;
        assert_eq!((delivery.event().event_type(), delivery.attempt()), (kind, 1));
        delivery.done().await;
    }
    for kind in ["3", "4"] {
        assert_eq!(next(&mut later).await.event().event_type(), kind);
    }
    // A back-off is by the server's clock alone.
    publisher.publish("t", Event::new("5")).await.unwrap();
    next(&mut member).await.retry().await;
    assert_eq!(next(&mut member).await.attempt(), 2);
}
