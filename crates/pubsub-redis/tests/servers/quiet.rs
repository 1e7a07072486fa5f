//! What operators are told, and what nobody is.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_cache::ServerCache;
use pubsub_core::{Bus, Event, PublishOptions, Status, Subscription, TrimFilter};
use pubsub_redis::{RedisServer, RedisServerCache};
use tokio::time::{sleep, timeout};

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

/// What a group has on the server that is not settled.
fn pending(server: &Server) -> u64 {
    server.ask(&["XPENDING", STREAM, "g"]).map_or(0, |pending| pending.list()[0].number())
}

async fn publish(bus: &Bus, numbers: std::ops::Range<u64>) {
    let events: Vec<_> = numbers.map(|number| Arc::new(Event::new(number.to_string()))).collect();
    bus.publish_with("t", &events, PublishOptions::new()).await.unwrap();
}

async fn take(member: &mut Subscription, count: u64) {
    for _ in 0..count {
        next(member).await.done().await;
    }
}

/// A member that was quick, so that 16 are read ahead for it, and that takes its time now. All there was has been read, twice, and with 11
/// at hand nothing is read any more. Returns the first of those, too.
async fn busy(server: &Server) -> (Bus, Subscription, u64) {
    let patient = configured(at(server.address)).reclaim_after(Duration::from_secs(60)).linger(Duration::from_secs(10));
    let bus = Bus::from(patient.connect().await.unwrap());
    let mut member = bus.subscribe_with("t", group("g").prefetch(16)).await.unwrap();
    for first in (64..).step_by(64 + 11).take(50) {
        publish(&bus, first - 64..first).await;
        take(&mut member, 64).await;
        publish(&bus, first..first + 6).await;
        until("they are taken ahead", || async { pending(server) == 6 }).await;
        publish(&bus, first + 6..first + 11).await;
        let more = until("these are, too", || async { pending(server) == 11 });
        if timeout(Duration::from_millis(500), more).await.is_ok() {
            return (bus, member, first);
        }
        take(&mut member, 11).await; // less is read ahead: it was not quick enough
    }
    panic!("no member is so quick");
}

pub(crate) async fn trimmed_while_busy() {
    let server = start();
    let (bus, mut member, first) = busy(&server).await;
    let end = first + 11 + 40;
    publish(&bus, first + 11..end).await;
    server.ask(&["XTRIM", STREAM, "MAXLEN", "5"]).unwrap();
    let (mut due, mut lost) = (first, 0);
    while due < end {
        let delivery = next(&mut member).await;
        let is: u64 = delivery.event().event_type().parse().unwrap();
        (due, lost) = (due + delivery.lagged() + 1, lost + delivery.lagged());
        assert_eq!(due, is + 1, "missing without being told, or told wrongly");
        delivery.done().await;
    }
    assert_eq!(lost, 40 - 5);
}

pub(crate) async fn destroyed_while_busy() {
    let server = start();
    let (bus, mut member, first) = busy(&server).await;
    let held = next(&mut member).await;
    server.ask(&["XGROUP", "DESTROY", STREAM, "g"]).unwrap();
    publish(&bus, first + 11..first + 20).await;
    let mut seen = vec![held.event().event_type().to_owned()];
    held.done().await;
    while seen.len() < 20 {
        let delivery = next(&mut member).await;
        seen.push(delivery.event().event_type().to_owned());
        delivery.done().await;
    }
    assert_eq!(seen, (first..first + 20).map(|number| number.to_string()).collect::<Vec<_>>());
    until("nothing is left", || async { pending(&server) == 0 }).await;
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
