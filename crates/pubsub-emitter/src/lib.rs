//! The in-process event bus: fan-out, groups, retries, dead letters and leases, with nothing to install.
//!
//! # Example
//!
//! ```
//! use futures::StreamExt;
//! use pubsub_core::{Bus, Event};
//! use pubsub_emitter::EventEmitterPubSub;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> pubsub_core::Result<()> {
//! let bus = Bus::from(EventEmitterPubSub::new());
//! let mut worker = bus.subscribe_group("orders", "billing").await?;
//! bus.publish("orders", Event::new("order.placed").with_data(42)).await?;
//! let delivery = worker.next().await.expect("the bus is open")?;
//! assert_eq!(*delivery.data::<u32>()?, 42);
//! delivery.done();
//! # Ok(())
//! # }
//! ```
//!
//! # Delivery semantics
//!
//! The clauses of [`pubsub_core::guide`] hold, with these particulars.
//!
//! - `Ok` of a publish means: queued for every subscription there was. Nothing outlives the process, and nothing is kept for
//!   subscriptions to come, except dead letters.
//! - All subscriptions of a topic see one order.
//! - A typed payload is shared as it is, without serialisation, unless [`strict_payloads`](EmitterBuilder::strict_payloads) is
//!   on.
//! - A publish is taken by all subscriptions or by none: at one full queue it waits, up to
//!   [`publish_timeout`](EmitterBuilder::publish_timeout), while the others get nothing of it either. Waiting publishers of a
//!   topic take turns. A batch that does not fit goes in piece by piece, each of which is taken by all or none.
//! - A group lasts while it has a member; what its last member leaves behind is gone. Groups on a dead-letter topic are
//!   durable, also those that were there before it became one: they last while it is one. A group that is made on one starts with
//!   what is kept.
//! - A dead-letter topic keeps its last 1,000 letters (see [`dead_letter_retention`](EmitterBuilder::dead_letter_retention)), to be
//!   read with `history` and redriven. A topic is one while a subscription names it or it keeps a letter. Whatever is published to
//!   it counts as a letter, unless it is local-only: a decorator, or a program of one's own, may bury there too.
//!
//! # Configuration
//!
//! [`EventEmitterPubSub::builder`]. [`EventEmitterPubSub::new`] is a bus of its own; instances that
//! [share a name](EventEmitterPubSub::named), or were made by [`connect`](EventEmitterPubSub::connect), share one bus.
//!
//! # Limits
//!
//! No limit on payloads unless [`max_payload`](EmitterBuilder::max_payload) sets one. Queues are bounded by the subscriptions'
//! options. An inline handler may cause publishes to further inline handlers [`MAX_INLINE_DEPTH`] deep. A subscription costs
//! less than two kilobytes while idle, and no task; a bus has one task from its first deadline on.
//!
//! # When the peer dies
//!
//! There is none: publisher, bus and subscribers live and die together.
//!
//! A bus may be used from several runtimes, and outlive the one its first subscription was made on. Its deadlines (retries, hold
//! limits, time-outs) then go on where it is next used: by a poll of one of its subscriptions that finds nothing, a settlement, a
//! subscription, or a publish that has to wait. Until then they are late: a consumer that waited already is not woken for them.

mod builder;
mod emitter;
mod hub;
mod inline;
mod leases;
mod topic;

pub use builder::EmitterBuilder;
pub use emitter::EventEmitterPubSub;
pub use inline::{InlineSubscription, MAX_INLINE_DEPTH};
