//! Resumable streams over any event bus: [`CachingPubSub`] numbers each event, keeps it in a store, and publishes it; whoever was
//! away reads what it missed and goes on with what is live, without a gap and without a repeat.
//!
//! # Example
//!
//! ```
//! use std::sync::Arc;
//!
//! use futures::StreamExt;
//! use pubsub_cache::{CachingPubSub, InMemoryServerCache};
//! use pubsub_core::Bus;
//! use pubsub_emitter::EventEmitterPubSub;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> pubsub_core::Result<()> {
//! let bus = Bus::from(CachingPubSub::new(Arc::new(EventEmitterPubSub::new()), Arc::new(InMemoryServerCache::new())));
//! for token in ["no ", "gap, ", "no ", "repeat"] {
//!     bus.publish_data("answer", "chunk", token.to_owned()).await?;
//! }
//! let mut stream = bus.subscribe_with_replay("answer").await?;
//! let first = stream.next().await.expect("it goes on")?;
//! let seen = first.cursor().expect("what is kept has a place"); // a client remembers this, as text
//! drop(stream);
//! let mut resumed = bus.subscribe_after("answer", seen).await?;
//! assert_eq!(*resumed.next().await.expect("it goes on")?.data::<String>()?, "gap, ");
//! # Ok(())
//! # }
//! ```
//!
//! # Delivery semantics
//!
//! The clauses are those of the [guide](pubsub_core::guide).
//!
//! - **A publish** appends first: the store numbers the events and keeps them in one atomic step, densely from 0 within a
//!   [generation](Generation). Then they are published with their ids, times and indices. `Ok` means what it means on the bus below.
//!   A publish that fails below is told as `Unknown` for what is in the log already: it may still reach those who watch. Repeating it
//!   is safe, since the store recognises the event within its [window](ServerCache::deduplication). A publish that is dropped is
//!   carried to its end in a task of its own, so that nothing is kept and never published.
//! - **A fan-out subscription** on a topic that is kept is a *watch*: it hands events over in the order of their indices, each once.
//!   What comes live before its turn waits for what is missing, which is read from the log. So is what a full queue dropped
//!   ([`Overflow::DropOldest`](pubsub_core::Overflow::DropOldest)), and what is in the log although publishing it failed. What the log
//!   has forgotten for a bound is told by the next delivery ([`lagged`](pubsub_core::Delivery::lagged)). Of events without an index
//!   that a full queue dropped, up to 256 go untold: they cannot be told from what the log has. A watch begins at the head of the log,
//!   at its oldest event, at an index, or behind a cursor; retries stay within the subscription.
//! - **A group** passes through to the bus below. Its deliveries bear their indices; a start by index, or behind a cursor of the log, is
//!   looked up in the history below, where there is one. Cursors of its deliveries are those of the bus below.
//! - **Local-only events**, and topics that [`should_cache`](CachingBuilder::should_cache) leaves out, pass by: not kept, not
//!   numbered. A watch hands them over as they come.
//! - **Clearing** a topic starts a new generation. A watch goes on at its 0, and what was published before the clear and comes behind
//!   it is dropped. **Trimming** takes events out; indices keep their meaning.
//! - **Dead letters** go to the bus below, which keeps and redrives them as it does those of others.
//! - **Leases, batches, inline handlers** are those of the bus below.
//!
//! Publishers and listeners may use different instances, in different processes, over one store that both reach, such as the
//! `RedisServerCache` of `pubsub-redis`. Where they use different stores, events pass live and cannot be resumed from; a warning says so once per subscription.
//!
//! # Configuration
//!
//! | option | default | |
//! | --- | --- | --- |
//! | [`on_store_failure`](CachingBuilder::on_store_failure) | [`Continue`](OnStoreFailure::Continue) | whether live delivery goes on when the store fails, or the publish fails with it |
//! | [`store_timeout`](CachingBuilder::store_timeout) | 5 s | how long the store may take for one operation |
//! | [`should_cache`](CachingBuilder::should_cache) | every topic | which topics are kept |
//!
//! # Limits
//!
//! [`InMemoryServerCache`] keeps 10,000 events of each of 10,000 topics, for an hour, in 256 MiB; the oldest go first, and readers are
//! told. It encodes nothing, but measures each event once. A watch keeps at most 256 live events in hand that came before their turn;
//! more are read from the log.
//!
//! # When the peer dies
//!
//! Nothing of a watch is on any server. A publisher that is killed between the two steps has kept an event that was not published:
//! those who watch find it in the log with the next one; groups do not get it, and publishing it again is safe. A store that is lost
//! and comes back empty has another name in its generations: cursors of the old one are told apart, and watches follow the new one.
//! While a store fails and live delivery goes on, events that nothing numbered are handed over as they come, ahead of what waits to be
//! read.
//!
//! # A store of one's own
//!
//! Implement [`ServerCache`], and hold it to its contract with `pubsub_conformance::stores`.

mod builder;
mod cache;
mod caching;
mod carried;
mod memory;
mod place;
mod sequence;
mod watch;

pub use builder::{CachingBuilder, OnStoreFailure};
pub use cache::{Generation, LogPage, MAX_KEY, ServerCache, check_key, check_ttl};
pub use caching::CachingPubSub;
pub use memory::{InMemoryBuilder, InMemoryServerCache};
