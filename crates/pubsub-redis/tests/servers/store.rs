//! The store, when its server fails.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pubsub_cache::{CachingPubSub, Generation, LogPage, ServerCache};
use pubsub_core::{Bus, ErrorKind, Event, TrimFilter};
use pubsub_redis::{RedisCacheBuilder, RedisServerCache};
use tokio::time::{sleep, timeout};

use crate::proxy::Proxy;
use crate::server::{Answer, Server};
use crate::support::{PATIENCE, at, connect, next, seed, start, topic, until};

fn configured(address: std::net::SocketAddr) -> RedisCacheBuilder {
    RedisServerCache::builder_on(at(address)).command_timeout(Duration::from_secs(3))
}

async fn store_on(server: &Server) -> RedisServerCache {
    configured(server.address).connect().await.unwrap()
}

fn event(kind: &str) -> Arc<Event> {
    Arc::new(Event::new(kind).with_run_id("run"))
}

fn kinds(page: &LogPage) -> Vec<String> {
    page.events.iter().map(|event| event.event_type().to_owned()).collect()
}

fn places(events: &[Arc<Event>]) -> Vec<u64> {
    events.iter().map(|event| event.index().unwrap().index).collect()
}

async fn whole(store: &RedisServerCache) -> LogPage {
    store.read(&topic("t"), 0, 100_000).await.unwrap()
}

pub(crate) async fn cut_appends() {
    let server = start();
    let proxy = Arc::new(Proxy::start(server.address, seed()).await.unwrap());
    let store = Arc::new(configured(proxy.address).connect().await.unwrap());
    // The first answer gets lost: it is done, nobody hears of it, and it is asked for again.
    store.append(&topic("t"), &[event("before")]).await.unwrap();
    proxy.deafen(true);
    let appending = {
        let store = store.clone();
        tokio::spawn(async move { store.append(&topic("t"), &[event("lost"), event("with it")]).await })
    };
    until("it is written", || async { server.ask(&["XLEN", "mastra:cache:log:t"]).unwrap().number() == 3 }).await;
    proxy.deafen(false);
    assert_eq!(places(&appending.await.unwrap().unwrap()), [1, 2], "the places of the first time");
    assert_eq!(kinds(&whole(&store).await), ["before", "lost", "with it"]);

    proxy.storm(true);
    let enough = proxy.cuts() + 3;
    let appending = (0..8).map(|appender| {
        let (store, proxy) = (store.clone(), proxy.clone());
        tokio::spawn(async move {
            let mut kept = Vec::new();
            for number in (0..).take_while(|number| *number < 100 || proxy.cuts() < enough) {
                let events = [event(&format!("{appender}.{number}")), event(&format!("{appender}.{number}b"))];
                // Whoever is not told tries again, as a publisher would.
                loop {
                    match store.append(&topic("t"), &events).await {
                        Ok(now) => {
                            kept.extend(now);
                            break sleep(Duration::from_millis(2)).await;
                        }
                        Err(error) => assert!(error.is_retryable(), "{error:?}"),
                    }
                }
            }
            kept
        })
    });
    let mut kept = Vec::new();
    for of_one in timeout(PATIENCE, futures::future::try_join_all(appending)).await.expect("a storm").unwrap() {
        kept.extend(of_one);
    }
    proxy.storm(false);
    let log = whole(&store).await;
    let distinct: BTreeSet<_> = log.events.iter().map(|event| event.id().clone()).collect();
    let all = 3 + kept.len();
    assert_eq!((log.events.len(), distinct.len(), log.next), (all, all, all as u64), "each is kept once");
    assert_eq!(places(&log.events), (0..all as u64).collect::<Vec<_>>(), "indices");
    for event in kept {
        assert_eq!(log.events[event.index().unwrap().index as usize].id(), event.id(), "what an append told");
    }
}

pub(crate) async fn flushed() {
    let server = start();
    let (store, other) = (store_on(&server).await, store_on(&server).await);
    let mut seen = BTreeSet::new();
    for round in 0..4 {
        let kept = store.append(&topic("t"), &[event("x"), event("y")]).await.unwrap();
        assert_eq!(places(&kept), [0, 1], "round {round}");
        other.append(&topic("u"), &[event("x")]).await.unwrap();
        let of = |page: LogPage| page.generation.unwrap();
        let (t, u) = (of(whole(&other).await), of(store.read(&topic("u"), 0, 0).await.unwrap()));
        assert_eq!(t.store(), u.store(), "one store");
        assert!(seen.insert(t.store()), "the same store after FLUSHALL: {t:?}");
        server.ask(&["FLUSHALL"]).unwrap();
        assert_eq!(whole(&store).await.generation, None);
        assert_eq!(store.trim(&topic("t"), &TrimFilter::run("run")).await.unwrap(), 0);
    }
    // Cleared again and again within a second: numbers grow all the same.
    let mut last = None::<Generation>;
    for _ in 0..5 {
        store.append(&topic("t"), &[event("x")]).await.unwrap();
        let generation = whole(&store).await.generation;
        assert!(generation.map(Generation::number) > last.map(Generation::number), "{generation:?} after {last:?}");
        last = generation;
        store.clear(&topic("t")).await.unwrap();
    }
}

pub(crate) async fn scripts_forgotten() {
    let server = start();
    let store = store_on(&server).await;
    for round in 0..3 {
        store.append(&topic("t"), &[event("x")]).await.unwrap();
        assert_eq!(whole(&store).await.next, round + 1);
        store.increment("count", 1, None).await.unwrap();
        store.push("list", Bytes::from_static(b"v"), None).await.unwrap();
        server.ask(&["SCRIPT", "FLUSH"]).unwrap();
    }
    assert_eq!(store.trim(&topic("t"), &TrimFilter::run("run")).await.unwrap(), 3);
    server.ask(&["SCRIPT", "FLUSH"]).unwrap();
    store.clear(&topic("t")).await.unwrap();
    assert_eq!(store.get("count").await.unwrap(), Some(Bytes::from_static(b"3")));
}

pub(crate) async fn gone() {
    let server = start();
    let store = configured(server.address).command_timeout(Duration::from_millis(300)).connect().await.unwrap();
    let (t, one) = (topic("t"), [event("x")]);
    store.append(&t, &one).await.unwrap();
    server.kill();
    let value = || Bytes::from_static(b"v");
    let told = [
        store.append(&t, &one).await.map(drop),
        store.read(&t, 0, 1).await.map(drop),
        store.clear(&t).await,
        store.trim(&t, &TrimFilter::run("run")).await.map(drop),
        store.get("k").await.map(drop),
        store.set("k", value(), None).await,
        store.delete("k").await.map(drop),
        store.increment("n", 1, None).await.map(drop),
        store.push("l", value(), None).await.map(drop),
        store.range("l", 0, 1).await.map(drop),
    ];
    for (at, told) in told.into_iter().enumerate() {
        let error = told.expect_err("the server is gone");
        assert_eq!(error.kind(), &ErrorKind::Unavailable, "operation {at}: {error:?}");
        assert!(error.operation().is_some() && error.subject().is_some(), "operation {at}: {error:?}");
    }
    let refused = configured(server.address).connect().await.unwrap_err();
    assert_eq!(refused.kind(), &ErrorKind::Unavailable, "{refused:?}");
    server.spawn().unwrap();
    until("it is found again", || async { store.read(&t, 0, 1).await.is_ok() }).await;
    assert_eq!(
        places(&store.append(&t, &[one[0].clone(), event("y")]).await.unwrap()),
        [0, 1],
        "what it knows, and what is new"
    );
    assert_eq!(store.increment("n", 1, None).await.unwrap(), 1);

    // Nothing but strangers' keys under the names: permanent, and said so.
    server.ask(&["SET", "mastra:cache:log:u", "x"]).unwrap();
    let error = store.append(&topic("u"), &one).await.unwrap_err();
    assert!(!error.is_retryable(), "{error:?}");
}

pub(crate) async fn runs_out() {
    let server = start();
    let store = configured(server.address).max_age(Duration::from_millis(150)).connect().await.unwrap();
    store.append(&topic("t"), &[event("a"), event("b")]).await.unwrap();
    let generation = whole(&store).await.generation;
    // Kept alive by what comes later, so that it is the age of each that counts.
    until("what is old goes", || async {
        store.append(&topic("t"), &[event("c")]).await.unwrap();
        whole(&store).await.floor >= 2
    })
    .await;
    until("all of it goes, by itself", || async { server.ask(&["EXISTS", "mastra:cache:log:t"]).unwrap().number() == 0 }).await;
    let log = whole(&store).await;
    assert_eq!((log.generation, log.floor, log.kept), (generation, log.next, 0), "{log:?}");
    let again = store.append(&topic("t"), &[event("d")]).await.unwrap();
    assert_eq!((places(&again), whole(&store).await.generation), (vec![log.next], generation), "the numbering goes on");
    // Everything runs out, some day.
    store.increment("n", 1, None).await.unwrap();
    store.increment("n", 1, Some(Duration::from_secs(60))).await.unwrap();
    store.increment("n", 1, None).await.unwrap();
    let left = server.ask(&["PTTL", "mastra:cache:value:n"]).unwrap().number();
    assert!((1..=60_001).contains(&left), "a counter that was told to last a minute lasts {left} ms");
    store.push("l", Bytes::new(), None).await.unwrap();
    for key in server.ask(&["KEYS", "*"]).unwrap().list() {
        let left = server.ask(&["PTTL", key.text()]).unwrap();
        let lasts = left == Answer::Number(-1);
        assert_eq!(lasts, key.text() == "mastra:cache:store", "{key:?} has {left:?}");
    }
}

pub(crate) async fn evicted() {
    let server = start();
    let store = store_on(&server).await;
    let events: Vec<_> = (0..5).map(|number| event(&number.to_string())).collect();
    store.append(&topic("t"), &events).await.unwrap();
    let generation = whole(&store).await.generation;
    // The events alone.
    server.ask(&["DEL", "mastra:cache:log:t"]).unwrap();
    let log = whole(&store).await;
    assert_eq!((log.floor, log.next, log.kept, log.generation), (5, 5, 0, generation), "{log:?}");
    assert_eq!(places(&store.append(&topic("t"), &events[..1]).await.unwrap()), [5], "what it does not have is new");
    // The place in the numbering.
    server.ask(&["DEL", "{mastra:cache:log:t}:place"]).unwrap();
    assert_eq!(whole(&store).await.generation, None);
    sleep(Duration::from_millis(1100)).await; // the clock of generations counts seconds
    assert_eq!(places(&store.append(&topic("t"), &events[..2]).await.unwrap()), [0, 1]);
    let anew = whole(&store).await;
    assert_eq!(anew.kept, 2, "nothing of the earlier generation");
    assert!(anew.generation.map(Generation::number) > generation.map(Generation::number));
    // Their ids.
    server.ask(&["DEL", "{mastra:cache:log:t}:ids"]).unwrap();
    assert_eq!(places(&store.append(&topic("t"), &[event("new")]).await.unwrap()), [2]);
}

/// Publisher and listener with a connection each, to bus and store, as two processes have.
pub(crate) async fn across_instances() {
    let server = start();
    let decorated = || async {
        let (bus, store) = (connect(at(server.address)).await, store_on(&server).await);
        Bus::from(CachingPubSub::new(bus.backend().clone(), Arc::new(store)))
    };
    let (publisher, listener) = (decorated().await, decorated().await);
    for number in 0..50 {
        publisher.publish_data("t", "x", number).await.unwrap();
    }
    let mut replayed = listener.subscribe_with_replay("t").await.unwrap();
    for number in 50..100 {
        publisher.publish_data("t", "x", number).await.unwrap();
    }
    let mut cursor = None;
    for number in 0..100_u64 {
        let delivery = next(&mut replayed).await;
        assert_eq!(delivery.event().index().unwrap().index, number);
        cursor = delivery.cursor().or(cursor);
    }
    drop(replayed);
    publisher.publish_data("t", "x", 100).await.unwrap();
    // Who comes back goes on, also with another instance and after a restart of the server.
    server.restart().unwrap();
    let returned = decorated().await;
    let mut resumed = returned.subscribe_after("t", cursor.unwrap()).await.unwrap();
    assert_eq!(next(&mut resumed).await.event().index().unwrap().index, 100);
    until("the publisher finds its server again", || async { publisher.publish_data("t", "x", 101).await.is_ok() }).await;
    assert_eq!(next(&mut resumed).await.event().index().unwrap().index, 101);
    let closing = async { futures::join!(publisher.close(PATIENCE), listener.close(PATIENCE), returned.close(PATIENCE)) };
    timeout(PATIENCE, closing).await.unwrap().0.unwrap();
}
