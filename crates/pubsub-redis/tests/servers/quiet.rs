//! What operators are told, and what nobody is.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_cache::ServerCache;
use pubsub_core::{Bus, Event, PublishOptions, Status, TrimFilter};
use pubsub_redis::{RedisServer, RedisServerCache};
use tokio::time::sleep;

use crate::server::Server;
use crate::support::{PATIENCE, RECLAIM, STREAM, at, configured, connect, group, next, start, topic, until};

const SECRET: &str = "s3cr3t";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).unwrap()
    }

    fn count(&self, what: &str) -> usize {
        self.text().lines().filter(|line| line.contains(what)).count()
    }
}

/// On a thread of its own, so that all of it goes to one log and nothing else does.
pub(crate) async fn told() {
    let log = Log::default();
    let writer = log.clone();
    let logged = tokio::task::spawn_blocking(move || {
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
        let subscriber = subscriber.with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work(&log));
        });
    });
    logged.await.unwrap();
}

async fn work(log: &Log) {
    let server = Server::start_with(|_, _| {
        let words = ["--user", "worker", "on", ">s3cr3t", "~*", "&*", "+@all"];
        Ok(words.map(str::to_owned).into())
    })
    .unwrap();
    let url = |password: &str| format!("redis://worker:{password}@{}", server.address);
    let mut said = String::new();
    for wrong in [url("s3cr3t-but-wrong"), format!("redis://worker:{SECRET}@127.0.0.1:1"), format!("redis://:{SECRET}@[x")] {
        match RedisServer::from_url(&wrong) {
            Ok(server) => {
                said += &format!("{server:?} {:?}", configured(server.clone()));
                let refused = configured(server.clone()).connect().await.unwrap_err();
                said += &format!("{refused} {refused:?}");
                let refused = RedisServerCache::builder_on(server).connect().await.unwrap_err();
                said += &format!("{refused} {refused:?}");
            }
            Err(error) => said += &format!("{error} {error:?}"),
        }
    }
    let right = RedisServer::from_url(&url(SECRET)).unwrap();
    let bus = Bus::from(configured(right.clone()).connect().await.unwrap());
    let store = RedisServerCache::builder_on(right).connect().await.unwrap();
    store.append(&topic("t"), &[Arc::new(Event::new("x"))]).await.unwrap();
    said += &format!("{bus:?} {store:?}");

    // Taken over from a member that fell silent, over and over.
    let mut member = bus.subscribe_with("t", group("g")).await.unwrap();
    drop(member);
    for _ in 0..3 {
        for _ in 0..4 {
            bus.publish("t", Event::new("x")).await.unwrap();
        }
        server.ask(&["XREADGROUP", "GROUP", "g", "ghost", "COUNT", "4", "STREAMS", STREAM, ">"]).unwrap();
        member = bus.subscribe_with("t", group("g")).await.unwrap();
        for _ in 0..4 {
            next(&mut member).await.done().await;
        }
        drop(member);
    }
    assert_eq!(log.count("took over what a silent member held"), 1, "{}", log.text());

    // Trimmed away before it was read.
    bus.flush().await.unwrap();
    for _ in 0..20 {
        bus.publish("t", Event::new("x")).await.unwrap();
    }
    server.ask(&["XTRIM", STREAM, "MAXLEN", "5"]).unwrap();
    member = bus.subscribe_with("t", group("g")).await.unwrap();
    assert_eq!(next(&mut member).await.lagged(), 15);
    assert_eq!(log.count("were trimmed away before a group had read them"), 1, "{}", log.text());

    // A server that comes and goes.
    let status = bus.status();
    for _ in 0..3 {
        server.kill();
        until("the loss is noticed", || async { matches!(status.get(), Status::Reconnecting { .. }) }).await;
        server.spawn().unwrap();
        until("it is there again", || async { matches!(status.get(), Status::Connected) }).await;
    }
    assert_eq!(log.count("the connection is lost and is being made again"), 1, "{}", log.text());
    assert_eq!(log.count("the connection is there again"), 1, "{}", log.text());
    bus.close(PATIENCE).await.unwrap();
    let logged = log.text();
    assert!(!logged.contains(SECRET) && !said.contains(SECRET), "a secret is told: {said}\n{logged}");
}

pub(crate) async fn trimmed_while_busy() {
    const EVENTS: u64 = 115;
    let server = start();
    let bus = connect(at(server.address)).await;
    let mut member = bus.subscribe_with("t", group("g").prefetch(16)).await.unwrap();
    let publish = async |range: std::ops::Range<u64>| {
        let events: Vec<_> = range.map(|number| Arc::new(Event::new(number.to_string()))).collect();
        bus.publish_with("t", &events, PublishOptions::new()).await.unwrap();
    };
    // How much is, and whether it is read further, follows how fast the member was.
    let taken_ahead = async || {
        let pending = || async { server.ask(&["XPENDING", STREAM, "g"]).unwrap().list()[0].number() > 0 };
        until("something is taken ahead", pending).await;
    };
    // A member that is quick is read ahead for.
    publish(0..64).await;
    for _ in 0..64 {
        next(&mut member).await.done().await;
    }
    // Read to the end of what there is; then there is enough at hand, and nothing is read.
    publish(64..70).await;
    taken_ahead().await;
    publish(70..75).await;
    taken_ahead().await;
    publish(75..EVENTS).await;
    server.ask(&["XTRIM", STREAM, "MAXLEN", "5"]).unwrap();
    let (mut due, mut lost) = (64, 0);
    while due < EVENTS {
        let delivery = next(&mut member).await;
        let is: u64 = delivery.event().event_type().parse().unwrap();
        (due, lost) = (due + delivery.lagged() + 1, lost + delivery.lagged());
        assert_eq!(due, is + 1, "missing without being told, or told wrongly");
        delivery.done().await;
    }
    assert!(lost > 0, "nothing was trimmed before it was read");
}

pub(crate) async fn destroyed_while_busy() {
    let server = start();
    let bus = connect(at(server.address)).await;
    let mut member = bus.subscribe_with("t", group("g").prefetch(16)).await.unwrap();
    let publish = async |range: std::ops::Range<u64>| {
        let events: Vec<_> = range.map(|number| Arc::new(Event::new(number.to_string()))).collect();
        bus.publish_with("t", &events, PublishOptions::new()).await.unwrap();
    };
    let pending = || server.ask(&["XPENDING", STREAM, "g"]).map_or(0, |pending| pending.list()[0].number());
    // A member that is quick is read ahead for.
    publish(0..64).await;
    for _ in 0..64 {
        next(&mut member).await.done().await;
    }
    publish(64..70).await;
    until("they are taken ahead", || async { pending() == 6 }).await;
    let held = next(&mut member).await;
    server.ask(&["XGROUP", "DESTROY", STREAM, "g"]).unwrap();
    publish(70..75).await;
    assert_eq!(held.event().event_type(), "64");
    held.done().await;
    let mut seen: Vec<u64> = vec![64];
    while *seen.last().unwrap() != 74 {
        let delivery = next(&mut member).await;
        seen.push(delivery.event().event_type().parse().unwrap());
        delivery.done().await;
    }
    assert_eq!(seen, (64..75).collect::<Vec<_>>());
    until("nothing is left", || async { pending() == 0 }).await;
    assert_eq!(bus.inspect("t").await.unwrap().groups[0].waiting, Some(0));
}

pub(crate) async fn inspected() {
    let server = start();
    let (one, other) = (connect(at(server.address)).await, connect(at(server.address)).await);
    let mut members =
        [one.subscribe_with("t", group("g")).await.unwrap(), other.subscribe_with("t", group("g")).await.unwrap()];
    for number in 0..9 {
        let event = Event::new(number.to_string()).with_run_id(if number < 3 { "early" } else { "late" });
        one.publish("t", event).await.unwrap();
    }
    let held = [next(&mut members[0]).await, next(&mut members[1]).await];
    sleep(Duration::from_millis(60)).await;
    for bus in [&one, &other] {
        let status = bus.inspect("t").await.unwrap();
        let of_group = &status.groups[0];
        assert_eq!((status.retained, status.groups.len()), (Some(9), 1), "{status:?}");
        assert_eq!((of_group.members, of_group.held.unwrap() + of_group.waiting.unwrap()), (Some(2), 9), "{status:?}");
        assert!(of_group.held.unwrap() >= 2 && of_group.oldest.unwrap() >= Duration::from_millis(60), "{status:?}");
    }
    for delivery in held {
        delivery.retry_after(RECLAIM / 2).await;
    }
    drop(members);
    // Nobody holds anything, and what waits for its back-off waits.
    until("it has gone back", || async {
        let status = one.inspect("t").await.unwrap();
        (status.groups[0].held, status.groups[0].waiting, status.groups[0].members) == (Some(0), Some(9), Some(0))
    })
    .await;
    // Of a stream from which single entries were deleted, the server cannot count what is unread.
    one.publish("t", Event::new("unread")).await.unwrap();
    assert_eq!(other.trim_topic("t", TrimFilter::run("late")).await.unwrap(), 6);
    let status = one.inspect("t").await.unwrap();
    assert_eq!(
        (status.retained, status.groups[0].waiting, status.groups[0].held),
        (Some(4), None, Some(0)),
        "unknown is not 0"
    );
    assert!(status.groups[0].oldest.is_some(), "{status:?}");
    // A topic that never was.
    let nothing = one.inspect("nothing").await.unwrap();
    assert_eq!((nothing.retained, nothing.groups.len()), (Some(0), 0));
}
