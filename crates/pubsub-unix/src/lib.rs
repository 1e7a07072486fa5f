//! The event bus for the processes of a host, over a Unix socket. There is no service to install: processes that name the same path
//! share a bus, one of them is the broker, and when it goes another takes its place. For Linux.
//!
//! # Example
//!
//! ```
//! use futures::StreamExt;
//! use pubsub_core::{Bus, Event};
//! use pubsub_unix::UnixSocketPubSub;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("bus.sock");
//! // Every process does this; the first is the broker.
//! let bus = Bus::from(UnixSocketPubSub::connect(path).await?);
//! let mut worker = bus.subscribe_group("orders", "billing").await?;
//! bus.publish("orders", Event::new("order.placed").with_data(42)).await?;
//! let delivery = worker.next().await.expect("the bus is open")?;
//! assert_eq!(*delivery.data::<u32>()?, 42);
//! delivery.done();
//! # bus.close(std::time::Duration::from_secs(1)).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Delivery semantics
//!
//! The clauses of [`pubsub_core::guide`] hold, with these particulars.
//!
//! - `Ok` of a publish means: written to the broker's log. The death of any processes, the publisher and the broker among them, does
//!   not lose it. With [`sync`](UnixBuilder::sync) it outlives a loss of power too.
//! - All subscriptions of a topic see one order. Each topic keeps its last 10,000 events ([`max_events`](UnixBuilder::max_events)), to be
//!   read with `history` and resumed from by cursors, as long as the files are there.
//! - Events bear their place as an index, dense from 0 until the topic is cleared, unless a replay decorator gave them one.
//! - A publish that was repeated is one event while the first is kept.
//! - Groups are durable. While a group has members, publishers wait for it rather than have it lose what it has not read, and fail with
//!   `Full` in the end. A group without members holds nobody back: what it loses to the bound it is told, with the number.
//! - The broker counts attempts. A crash counts against what the member had taken: one delivery, and only where deliveries are
//!   settled within a millisecond or two up to 64.
//! - Fan-out reads at its own pace: a slow subscription costs publishers nothing, and is told what it lost when it falls behind the log.
//! - Leases are kept by the broker and its log; their time is a clock that all processes share and nobody sets.
//!
//! # Configuration
//!
//! [`UnixSocketPubSub::builder`]. What concerns the log is that of the process which is the broker, so all had better agree. Nothing needs
//! to be the same for them to understand each other.
//!
//! # Limits
//!
//! The socket's absolute path has at most 98 bytes. Its directory belongs to the same user or to root, and is on a local file system;
//! if anybody may write to it, it has the sticky bit. A directory that is missing is made for its owner alone (0700); socket and files are
//! 0600. Only processes of the same user, and root, are served, and whoever is [admitted](UnixBuilder::allow_users). An event has at most 16 MiB ([`max_payload`](UnixBuilder::max_payload)).
//! A bus has 65,536 topics, each of them 1,024 groups, and 10,000 peers at most. An instance has one task and no thread, the broker one
//! thread; a subscription has neither.
//!
//! # When the peer dies
//!
//! - *A member*: what it held goes to the others after a grace of 250 ms ([`grace`](UnixBuilder::grace)), as its next attempt. One that is
//!   stopped, and answers nothing for 10 s ([`hang_timeout`](UnixBuilder::hang_timeout)), is taken for dead; should it come back, it is a new
//!   member, and its old deliveries are revoked.
//! - *The broker*: its connections end, another process is elected within milliseconds, reads the log, and everybody says again what was
//!   not answered. Nothing is lost, doubled or reordered by it. A broker that is stopped is superseded after 3 s, and when it comes back
//!   nobody believes it.
//! - *The disk is full*: publishes fail with `Unavailable`, their events not sent; settlements are repeated until they can be written.
//!
//! # With TypeScript
//!
//! The socket can be shared with processes of Mastra (`@mastra/core` 1.71, its `UnixSocketPubSub`): whoever is the broker, all of them are on
//! one bus, and its elections are one. The broker translates where the two tongues meet, and only there.
//!
//! - *Under a broker of ours* they have what they are used to, and more: what they publish is written to the log, a slow or a busy
//!   process loses nothing, and groups keep their place. They are told nothing that their tongue has no words for: they settle what
//!   was written to their connection, and their publishes wait where ours would fail.
//! - *Under a broker of theirs* an instance can do what such a broker can: events are given out once, to those who are there, in one
//!   order, under ids and times of the broker's; there is no history, no durable group, no lease, and nothing outlives the broker.
//!   Attempts are counted, and retries kept, by each instance. [`capabilities`](pubsub_core::PubSub::capabilities) says so while it lasts, and changes when brokers do;
//!   what has to hold at all times is had with [`native_only`](UnixBuilder::native_only).
//! - *A process of theirs may not come back* from an election: if the new broker goes too while it subscribes again, its start waits for itself,
//!   and all its calls hang (1.71; rare, and only where brokers are killed in quick succession). It has to be started again.
//! - *Data* is plain JSON in both directions. A `Date` is read as text, a `BigInt` as a number, a `Map` as an object; the table is [below](#envelopes).
//!   With [`envelopes`](UnixBuilder::envelopes) an application reads and writes the tagged envelopes themselves.

#![doc = include_str!("../PROTOCOL.md")]

mod abroad;
mod broker;
mod builder;
mod convert;
mod election;
mod entry;
mod files;
mod frame;
mod guests;
mod journal;
mod leases;
mod ledger;
mod link;
mod member;
mod node;
mod pipe;
mod protocol;
mod reader;
mod record;
mod remote;
mod serve;
mod session;
mod subscription;
mod unix;

#[doc(hidden)]
pub mod fuzz;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod model;

pub use builder::UnixBuilder;
pub use unix::UnixSocketPubSub;
