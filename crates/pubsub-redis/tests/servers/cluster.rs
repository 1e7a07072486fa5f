//! A cluster of three masters, one of them with a replica: topics on all of them, slots that move, a master that dies.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use parking_lot::Mutex;
use pubsub_cache::ServerCache;
use pubsub_core::{Acquired, Bus, ErrorKind, Event, Group, Origin, RetryPolicy, Settled, Start, SubscribeOptions, TrimFilter};
use pubsub_redis::{RedisServer, RedisServerCache};
use tokio::time::{sleep, timeout};

use crate::server::{Answer, Server};
use crate::storm::Handled;
use crate::support::{PATIENCE, configured, group, next, topic, until};

const MASTERS: usize = 3;

pub(crate) struct Cluster {
    /// The masters, then the replica of the first.
    nodes: Vec<Server>,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let mut nodes = Server::start_cluster(MASTERS).unwrap();
        nodes.push(Server::start_node_with(|_| Ok(Vec::new())).unwrap());
        nodes[MASTERS].meet(&nodes[0]).unwrap();
        let cluster = Self { nodes };
        let of_first = cluster.id(0);
        until("the replica is one", || async { cluster.nodes[MASTERS].ask(&["CLUSTER", "REPLICATE", &of_first]).is_ok() })
            .await;
        until("the replica follows", || async {
            cluster.info(MASTERS, &["INFO", "replication"], "master_link_status").as_deref() == Some("up")
        })
        .await;
        until("the cluster is there", || async {
            (0..=MASTERS).all(|at| cluster.info(at, &["CLUSTER", "INFO"], "cluster_state").as_deref() == Some("ok"))
        })
        .await;
        cluster
    }

    fn id(&self, at: usize) -> String {
        self.nodes[at].ask(&["CLUSTER", "MYID"]).unwrap().text().to_owned()
    }

    fn info(&self, at: usize, words: &[&str], name: &str) -> Option<String> {
        let info = self.nodes[at].ask(words).ok()?;
        let line = info.text().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned));
        line.map(|value| value.trim().to_owned())
    }

    /// Asks whoever has the key.
    fn ask(&self, words: &[&str]) -> Answer {
        let answers = self.nodes.iter().filter_map(|node| node.ask(words).ok());
        answers.into_iter().next().unwrap_or(Answer::Nothing)
    }

    fn server(&self) -> RedisServer {
        // Two are enough to find the rest.
        RedisServer::cluster(self.nodes[1..MASTERS].iter().map(|node| ("127.0.0.1".to_owned(), node.address.port())))
    }

    async fn connect(&self) -> Bus {
        configured(self.server()).connect().await.unwrap().into()
    }

    fn slot(&self, key: &str) -> u16 {
        self.nodes[0].ask(&["CLUSTER", "KEYSLOT", key]).unwrap().number().try_into().unwrap()
    }

    /// Moves a slot from one master to another, key by key.
    fn move_slot(&self, slot: u16, from: usize, to: usize) {
        let (slot, target) = (slot.to_string(), self.nodes[to].address.port().to_string());
        self.nodes[to].ask(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &self.id(from)]).unwrap();
        self.nodes[from].ask(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &self.id(to)]).unwrap();
        loop {
            let keys = self.nodes[from].ask(&["CLUSTER", "GETKEYSINSLOT", &slot, "10"]).unwrap();
            if keys.list().is_empty() {
                break;
            }
            for key in keys.list() {
                self.nodes[from].ask(&["MIGRATE", "127.0.0.1", &target, key.text(), "0", "5000"]).unwrap();
                std::thread::sleep(Duration::from_millis(20)); // long enough for others to meet it half-way
            }
        }
        for at in [to, from].into_iter().chain((0..MASTERS).filter(|at| ![to, from].contains(at))) {
            self.nodes[at].ask(&["CLUSTER", "SETSLOT", &slot, "NODE", &self.id(to)]).unwrap();
        }
    }
}

/// Reads until the stream ends, and says what came.
fn hear(mut subscription: pubsub_core::Subscription, heard: Handled) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        while let Some(Ok(delivery)) = subscription.next().await {
            let name = format!("{}/{}", subscription.topic(), delivery.event().event_type());
            heard.lock().entry(name).or_default().push(delivery.attempt());
            drop(delivery.done());
        }
    })
}

pub(crate) async fn everything() {
    const TOPICS: usize = 24;
    let cluster = Cluster::start().await;
    let (one, other) = (cluster.connect().await, cluster.connect().await);
    let owners: BTreeSet<_> =
        (0..TOPICS).map(|number| usize::from(cluster.slot(&format!("mastra:topic:t{number}"))) * MASTERS / 16384).collect();
    assert_eq!(owners.len(), MASTERS, "topics on all nodes");
    let heard = Handled::default();
    let mut tasks = Vec::new();
    for number in 0..TOPICS {
        tasks.push(hear(other.subscribe(format!("t{number}")).await.unwrap(), heard.clone()));
    }
    let handled = Handled::default();
    for number in 0..6 {
        for bus in [&one, &other] {
            tasks.push(hear(bus.subscribe_with(format!("t{number}"), group("g")).await.unwrap(), handled.clone()));
        }
    }
    for round in 0..20 {
        for number in 0..TOPICS {
            one.publish(format!("t{number}"), Event::new(round.to_string())).await.unwrap();
        }
    }
    until("all is heard", || async { heard.lock().len() == 20 * TOPICS }).await;
    until("all is handled", || async { handled.lock().len() == 20 * 6 }).await;
    assert!(heard.lock().values().chain(handled.lock().values()).all(|attempts| attempts == &[1]), "something came twice");

    // A retry, then a dead letter to a topic elsewhere.
    let retry = RetryPolicy::new().max_attempts(2).backoff(Duration::from_millis(5), Duration::from_millis(5));
    let failing = SubscribeOptions::group(Group::new("failing").unwrap()).retry(retry).dead_letter(topic("dead"));
    let mut member = one.subscribe_with("work", failing).await.unwrap();
    other.publish("work", Event::new("hopeless")).await.unwrap();
    for attempt in 1..=2 {
        let delivery = next(&mut member).await;
        assert_eq!(delivery.attempt(), attempt);
        assert_eq!(delivery.retry().await, Settled::Done);
    }
    until("the letter is there", || async { !other.history("dead", Start::Earliest, 9).await.unwrap().entries.is_empty() })
        .await;
    let letters = other.history("dead", Start::Earliest, 9).await.unwrap();
    assert_eq!(Origin::of(&letters.entries[0].1).unwrap().attempts, 2);

    let leases = one.leases().unwrap();
    let ttl = Duration::from_secs(60);
    for key in ["a", "b{x}", "c}d"] {
        assert!(matches!(leases.acquire(key, "me", ttl).await.unwrap(), Acquired::Yes(_)), "{key}");
        assert!(matches!(other.leases().unwrap().acquire(key, "you", ttl).await.unwrap(), Acquired::HeldBy(_)), "{key}");
        assert!(leases.release(key, "me").await.unwrap());
    }
    let status = one.inspect("t0").await.unwrap();
    assert_eq!((status.retained, status.groups.len(), status.groups[0].members), (Some(20), 1, Some(2)), "{status:?}");
    assert_eq!(one.trim_topic("t0", TrimFilter::run("nobody's")).await.unwrap(), 0);
    one.clear_topic("t0").await.unwrap();
    assert_eq!(one.inspect("t0").await.unwrap().retained, Some(0));

    let store = RedisServerCache::builder_on(cluster.server()).connect().await.unwrap();
    for number in 0..TOPICS {
        let name = topic(&format!("t{number}"));
        store.append(&name, &[Arc::new(Event::new("x")), Arc::new(Event::new("y"))]).await.unwrap();
        assert_eq!(store.read(&name, 0, 9).await.unwrap().events.len(), 2);
        assert_eq!(store.increment(&format!("n{number}"), 2, None).await.unwrap(), 2);
    }
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    for bus in [one, other] {
        bus.close(PATIENCE).await.unwrap();
    }
}

/// What was published to each topic: confirmed or not.
#[derive(Default)]
struct Sent {
    confirmed: BTreeSet<String>,
    refused: BTreeMap<String, String>,
}

/// Publishes to these topics in turn.
fn load(bus: &Bus, topics: usize, calls: usize, sent: &Arc<Mutex<Sent>>) -> tokio::task::JoinHandle<()> {
    let (bus, sent) = (bus.clone(), sent.clone());
    tokio::spawn(async move {
        for call in 0..calls {
            let (to, kind) = (format!("t{}", call % topics), call.to_string());
            let published = bus.publish(&*to, Event::new(&kind)).await;
            let name = format!("{to}/{kind}");
            match published {
                Ok(_) => drop(sent.lock().confirmed.insert(name)),
                Err(error) => drop(sent.lock().refused.insert(name, format!("{error:?}"))),
            }
            sleep(Duration::from_millis(3)).await;
        }
    })
}

pub(crate) async fn slots_move() {
    const TOPICS: usize = 6;
    let cluster = Arc::new(Cluster::start().await);
    let (publisher, worker) = (cluster.connect().await, cluster.connect().await);
    let (heard, handled) = (Handled::default(), Handled::default());
    for number in 0..TOPICS {
        hear(worker.subscribe(format!("t{number}")).await.unwrap(), heard.clone());
        hear(worker.subscribe_with(format!("t{number}"), group("g")).await.unwrap(), handled.clone());
    }
    let sent = Arc::new(Mutex::new(Sent::default()));
    let loading = load(&publisher, TOPICS, 700, &sent);
    let moving = {
        let cluster = cluster.clone();
        tokio::task::spawn_blocking(move || {
            for number in 0..TOPICS {
                let slot = cluster.slot(&format!("mastra:topic:t{number}"));
                let from = (0..MASTERS).find(|at| {
                    let own = cluster.nodes[*at].ask(&["CLUSTER", "COUNTKEYSINSLOT", &slot.to_string()]).unwrap();
                    own.number() > 0
                });
                let from = from.unwrap();
                cluster.move_slot(slot, from, (from + 1) % MASTERS);
                std::thread::sleep(Duration::from_millis(100));
            }
        })
    };
    moving.await.unwrap();
    loading.await.unwrap();
    let sent = std::mem::take(&mut *sent.lock());
    assert_eq!(sent.refused, BTreeMap::new(), "slots that move refuse nothing");
    until("all is heard", || async { sent.confirmed.iter().all(|event| heard.lock().contains_key(event)) }).await;
    until("all is handled", || async { sent.confirmed.iter().all(|event| handled.lock().contains_key(event)) }).await;
    assert!(heard.lock().values().all(|attempts| attempts == &[1]), "heard twice: {:?}", heard.lock());
    for (event, attempts) in &*handled.lock() {
        let distinct: BTreeSet<_> = attempts.iter().collect();
        assert_eq!(distinct.len(), attempts.len(), "{event} was handled twice at one attempt: {attempts:?}");
    }
    let mut written = 0;
    for number in 0..TOPICS {
        written += cluster.ask(&["XLEN", &format!("mastra:topic:t{number}")]).number();
    }
    assert_eq!(written, 700, "written once");
    for bus in [publisher, worker] {
        bus.close(PATIENCE).await.unwrap();
    }
}

pub(crate) async fn master_dies() {
    const TOPICS: usize = 12;
    let cluster = Cluster::start().await;
    let (publisher, worker) = (cluster.connect().await, cluster.connect().await);
    let (heard, handled) = (Handled::default(), Handled::default());
    for number in 0..TOPICS {
        hear(worker.subscribe(format!("t{number}")).await.unwrap(), heard.clone());
        hear(worker.subscribe_with(format!("t{number}"), group("g")).await.unwrap(), handled.clone());
    }
    let sent = Arc::new(Mutex::new(Sent::default()));
    load(&publisher, TOPICS, 120, &sent).await.unwrap();
    assert_eq!(sent.lock().refused, BTreeMap::new());
    let there = cluster.info(0, &["INFO", "replication"], "master_repl_offset");
    until("the replica has it all", || async {
        cluster.info(MASTERS, &["INFO", "replication"], "slave_repl_offset").and_then(|offset| offset.parse::<u64>().ok())
            >= there.as_ref().and_then(|offset| offset.parse().ok())
    })
    .await;
    cluster.nodes[0].kill();
    let later = Arc::new(Mutex::new(Sent::default()));
    load(&publisher, TOPICS, 240, &later).await.unwrap();
    assert_eq!(cluster.info(MASTERS, &["INFO", "replication"], "role").as_deref(), Some("master"), "the replica took over");
    let later = std::mem::take(&mut *later.lock());
    assert!(later.refused.len() <= 2, "publishing waits until somebody takes over: {:?}", later.refused);
    let all: BTreeSet<_> = sent.lock().confirmed.union(&later.confirmed).cloned().collect();
    until("all is heard", || async { all.iter().all(|event| heard.lock().contains_key(event)) }).await;
    until("all is handled", || async { all.iter().all(|event| handled.lock().contains_key(event)) }).await;
    for bus in [publisher, worker] {
        bus.close(PATIENCE).await.unwrap();
    }
}

/// A node that hangs or is gone holds up nobody who publishes to the others.
pub(crate) async fn node_down() {
    const LATEST: Duration = Duration::from_secs(1);
    const PAUSE: Duration = Duration::from_secs(3);
    let cluster = Cluster::start().await;
    for node in &cluster.nodes {
        node.ask(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]).unwrap();
    }
    let bus = Bus::from(configured(cluster.server()).publish_timeout(2 * PAUSE).connect().await.unwrap());
    let owner = |name: &str| usize::from(cluster.slot(&format!("mastra:topic:{name}"))) * MASTERS / 16384;
    let (bad, good): (Vec<_>, Vec<_>) = (0..24).map(|number| format!("t{number}")).partition(|name| owner(name) == 1);
    assert!(bad.len() > 3 && good.iter().any(|name| owner(name) == 0) && good.iter().any(|name| owner(name) == 2));
    for name in bad.iter().chain(&good) {
        bus.publish(name, Event::new("first")).await.unwrap();
    }
    let to_all = |names: &[String]| {
        let publishing = names.iter().cloned().map(|name| {
            let bus = bus.clone();
            tokio::spawn(async move { bus.publish(name, Event::new("x")).await })
        });
        publishing.collect::<Vec<_>>()
    };
    let in_time = async || {
        for published in to_all(&good) {
            timeout(LATEST, published).await.expect("its turn").unwrap().unwrap();
        }
    };
    cluster.nodes[1].ask(&["CLIENT", "PAUSE", &PAUSE.as_millis().to_string(), "ALL"]).unwrap();
    let held = to_all(&bad);
    for _ in 0..20 {
        in_time().await;
    }
    assert!(held.iter().all(|published| !published.is_finished()), "the node has not hung");
    for published in held {
        published.await.unwrap().unwrap();
    }
    for name in &bad {
        assert_eq!(cluster.ask(&["XLEN", &format!("mastra:topic:{name}")]).number(), 2, "written once");
    }

    cluster.nodes[1].kill();
    let lost = to_all(&bad);
    while lost.iter().any(|published| !published.is_finished()) {
        in_time().await;
    }
    for published in lost {
        let refused = published.await.unwrap().unwrap_err();
        assert_eq!(refused.kind(), &ErrorKind::Unavailable, "{refused:?}");
    }
    in_time().await;
    bus.close(PATIENCE).await.unwrap();
}
