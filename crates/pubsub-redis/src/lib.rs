//! The event bus over Redis Streams: between hosts, with durable groups, history and leases.
//!
//! # Example
//!
//! ```no_run
//! use futures::StreamExt;
//! use pubsub_core::{Bus, Event};
//! use pubsub_redis::RedisStreamsPubSub;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> pubsub_core::Result<()> {
//! let bus = Bus::from(RedisStreamsPubSub::builder("127.0.0.1", 6379).connect().await?);
//! let mut worker = bus.subscribe_group("orders", "billing").await?;
//! bus.publish("orders", Event::new("order.placed").with_data(42)).await?;
//! let delivery = worker.next().await.expect("the bus is open")?;
//! assert_eq!(*delivery.data::<u32>()?, 42);
//! delivery.done().await;
//! # Ok(())
//! # }
//! ```
//!
//! # Delivery semantics
//!
//! The clauses of [`pubsub_core::guide`] hold, with these particulars.
//!
//! - `Ok` of a publish means: the server has it. What that outlives is the server's matter, its append-only file and its replicas.
//! - All subscriptions of a topic see one order. Events of concurrent publishers travel together: up to 250 of a topic are one call of a
//!   script, which adds all or none, trims the topic and renews its time to live. One that goes alone is a plain command, and renews the time
//!   to live of its topic once a minute (or in a 64th of that time, if that is less), or with the first event of a new stream.
//! - When the outcome of a publish is unknown because the connection broke, a script finds out which of its events are there and adds
//!   the others: each is stored once, provided that the server allows `CLIENT KILL` (else what was still on its way may come behind
//!   the script), that its clock does not jump by more than ten seconds meanwhile, and that nothing is trimmed that fast. It is tried
//!   for [`publish_timeout`](RedisBuilder::publish_timeout); then the error says that the fate is unknown. Publishing the same event
//!   again by oneself stores it again.
//! - Fan-out needs no object on the server: positions are the subscription's own. Retries of fan-out are local to the instance. What one
//!   reader has read is decoded once for all of a topic's subscriptions here, and read no further ahead than one of them takes.
//! - A group is a consumer group of Redis, on one key, and keeps its place without members. A retry is never written again: the
//!   pending entry is given to nobody (the consumer `~nobody`), its back-off kept in the server's idle clock, so that it survives
//!   whoever asked for it and any member may take it when it is due. A back-off that is longer than
//!   [`reclaim_after`](RedisBuilder::reclaim_after) is kept by the instance, and comes that early if it dies.
//! - Attempts are the server's count, so a crash counts. What had merely been read ahead beside it is counted once too many if the
//!   crash comes within [`linger`](RedisBuilder::linger) of its being read; from an entry's second crash on it is taken over only
//!   when nothing else of its group is held by the instance, so that one event that kills its holders exhausts only itself.
//! - What a silent member held goes to others after `reclaim_after`, looked for every eighth to quarter of it. What is held is renewed every
//!   third of it. A member that was paused for longer cannot take anything away from who has it now: its settlement is `TooLate`.
//! - A group that loses unread events to the bound on retention is told how many, unless
//!   [`trim_topic`](pubsub_core::PubSub::trim_topic) was used on the topic: then the server cannot count. A fan-out subscription that is
//!   outrun by its publishers likewise: with the next delivery, [`lagged`](pubsub_core::Delivery::lagged) says how many it lost.
//! - Streams, groups and entries are those of the TypeScript system: both may be on one bus, and members of one group. Its retries are
//!   new entries, which are read with their attempt.
//!
//! # Configuration
//!
//! [`RedisStreamsPubSub::builder`] or [`from_url`](RedisStreamsPubSub::from_url); a [`RedisServer`] says where, and who to be there. The
//! cargo feature `tls` adds encryption, with rustls over ring; the feature `cache` adds `RedisServerCache`, the store for the replay
//! decorator `pubsub-cache`. Instances share a bus by sharing server, database and prefix.
//!
//! A user needs the commands of streams, `GET`, `SET`, `PEXPIRE`, `EVAL`, `EVALSHA`, `MULTI`, `EXEC`, `CLIENT ID`, `CLIENT SETNAME`, `INFO`
//! and `PING`, on keys `*PREFIX:*`; and should have `CLIENT KILL` (see above), `CLIENT UNBLOCK`, without which a subscription to a further
//! topic may start up to five seconds late, and `CLIENT TRACKING` (see below). In a cluster it needs `CLUSTER SLOTS` and `ASKING` as
//! well.
//!
//! # Limits
//!
//! Redis 7.0 or later. 4 MiB of data and metadata per event ([`max_payload`](RedisBuilder::max_payload)). A topic keeps about 10,000
//! events, and goes 7 days after the last publish. An instance has one connection to write and settle, one for all fan-out, and one for each name of a group it
//! has members of, which reads all its topics. Beyond 64 topics, fan-out is told by the server which of them have changed
//! (`CLIENT TRACKING`), and costs it the same for each event however many there are; then a topic whose notice went missing, as after
//! `FLUSHALL`, is read up to five seconds late. A group's reader, and fan-out where tracking is refused, blocks over all its topics, which
//! costs the server time in proportion to their number for each wake: some hundred are nothing, ten thousand are 13 ms.
//!
//! In a cluster it is a connection to write for each master, one for what has no key, one for fan-out for each master that has topics
//! of it, and for groups one for each name and slot, since one read cannot be of several slots: topics that share a hash tag, `{orders}.placed` and `{orders}.paid`,
//! share a slot. A node that hangs or is gone holds up the topics that it has, and no others while fewer than 1,024 publish calls wait for
//! it. Fan-out there needs `CLIENT TRACKING`; without the right to it everything is read twenty times a second. A key
//! whose slot is on its way is followed by what writes; what reads waits until the slot has arrived.
//!
//! A cursor knows prefix and topic, not the server: one from another server with the same prefix is told by its position alone.
//!
//! # When the peer dies
//!
//! A connection that breaks is made again, with a jittered back-off from 20 ms to 2 s, and [`status`](pubsub_core::PubSub::status) says so
//! meanwhile. A silent one is given up after [`command_timeout`](RedisBuilder::command_timeout). Subscriptions carry on: fan-out from
//! its own positions, groups from the server's. After a `FLUSHALL`, or when a stream or a group was deleted, members make their group
//! anew where they had read to, or from the start of a new stream. What cannot heal, such as wrong credentials, a missing permission or
//! a key of another type, is an error at once, and ends the subscriptions it concerns with that error. So is a certificate that is not
//! to be trusted.
//!
//! When sentinels or a cluster make a replica the master, connections and subscriptions move there within the time that takes. Redis
//! replicates behind what it confirms: what the old master had confirmed and not passed on is lost, and groups may be handed again, as
//! the same attempt, what they had settled just before. `min-replicas-to-write` bounds how much that is.
//!
//! # What operators see
//!
//! Events of `tracing`, those of a kind at most every ten seconds with how often it happened meanwhile: connections that are lost and there
//! again, what was taken over from silent members, what was trimmed away before a group had read it, groups that had to be made anew,
//! deliveries that were given up, settlements that were refused. [`inspect`](pubsub_core::PubSub::inspect) says for each group what waits, what
//! is held, how old the oldest is, and how many members there are; what the server cannot tell is none, not 0. User names and
//! passwords are in none of that.

mod add;
mod ask;
mod builder;
#[cfg(feature = "cache")]
mod cache;
mod channel;
mod cluster;
mod desk;
mod entry;
mod errors;
mod fan_out;
mod follower;
mod groups;
mod keeper;
mod keys;
mod lane;
mod leases;
mod link;
mod look;
mod node;
mod page;
mod publish;
mod reader;
mod readers;
mod redis;
mod reply;
mod server;
mod settle;
mod told;
mod tracking;
mod window;
mod writer;

pub use builder::RedisBuilder;
#[cfg(feature = "cache")]
pub use cache::{RedisCacheBuilder, RedisServerCache};
pub use redis::RedisStreamsPubSub;
pub use server::RedisServer;
