//! What the tests share.

use std::future::Future;
use std::time::Duration;

use futures::StreamExt;
use pubsub_core::{Bus, Delivery, Group, RetryPolicy, SubscribeOptions, Subscription, Topic};
use pubsub_redis::{RedisBuilder, RedisServer, RedisStreamsPubSub};
use tokio::time::{sleep, timeout};

use crate::server::{Answer, Server};

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// After how long silent members lose what they hold.
pub(crate) const RECLAIM: Duration = Duration::from_millis(600);

pub(crate) const STREAM: &str = "mastra:topic:t";

pub(crate) fn start() -> Server {
    Server::start().unwrap()
}

pub(crate) fn at(address: std::net::SocketAddr) -> RedisServer {
    RedisServer::new(address.ip().to_string(), address.port())
}

pub(crate) fn configured(server: RedisServer) -> RedisBuilder {
    let builder = RedisStreamsPubSub::builder_on(server).reclaim_after(RECLAIM).linger(Duration::from_millis(50));
    builder.command_timeout(Duration::from_secs(2)).publish_timeout(Duration::from_secs(8)).max_len(None)
}

pub(crate) async fn connect(server: RedisServer) -> Bus {
    configured(server).connect().await.unwrap().into()
}

pub(crate) fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

pub(crate) fn group(name: &str) -> SubscribeOptions {
    let retry = RetryPolicy::new().max_attempts(100).backoff(Duration::from_millis(20), Duration::from_millis(20));
    SubscribeOptions::group(Group::new(name).unwrap()).retry(retry)
}

pub(crate) async fn next(subscription: &mut Subscription) -> Delivery {
    timeout(PATIENCE, subscription.next()).await.expect("a delivery in time").expect("a stream").expect("no error")
}

/// Waits until something is so.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let waiting = async {
        while !holds().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// What chance decides, and how to have it decide the same again.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("PUBSUB_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    // Shown with what fails.
    eprintln!("PUBSUB_SEED={seed}");
    seed
}

/// How many connections there are but the one that asks.
pub(crate) fn clients(server: &Server) -> usize {
    server.ask(&["CLIENT", "LIST"]).unwrap().text().lines().count() - 1
}

/// The consumers that a group has on the topic `t`.
pub(crate) fn consumers(server: &Server, group: &str) -> Vec<String> {
    let Ok(found) = server.ask(&["XINFO", "CONSUMERS", STREAM, group]) else { return Vec::new() };
    found.list().iter().map(|consumer| consumer.list()[1].text().to_owned()).collect()
}

/// The types of all events that the topic `t` has, in order.
pub(crate) fn written(server: &Server) -> Vec<String> {
    let entries = server.ask(&["XRANGE", STREAM, "-", "+"]).unwrap();
    let kind = |entry: &Answer| {
        let fields: Vec<_> = entry.list()[1].list().iter().map(Answer::text).collect();
        let event: serde_json::Value = serde_json::from_str(fields[1]).unwrap();
        event["type"].as_str().unwrap().to_owned()
    };
    entries.list().iter().map(kind).collect()
}
