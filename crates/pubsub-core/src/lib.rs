//! The contract of an event bus, and what its backends share.
//!
//! Components publish [`Event`]s to named [`Topic`]s; others subscribe and react. An application holds a [`Bus`]; a backend
//! implements [`PubSub`]; both are held to the clauses of the [`guide`]. How far events travel is the backend's matter:
//! within a process, between the processes of one host, between hosts.
//!
//! | to | see |
//! | --- | --- |
//! | publish | [`Bus::publish`], [`Event`], [`Payload`], [`PublishOptions`] |
//! | subscribe | [`Bus::subscribe`], [`Bus::subscribe_group`], [`SubscribeOptions`], [`Subscription`] |
//! | settle | [`Delivery`], [`Receipt`], [`RetryPolicy`] |
//! | run handlers | [`Subscription::run`], [`Bus::on`], [`Failure`] |
//! | read in batches | [`Subscription::batches`], [`BatchPolicy`] |
//! | resume | [`Start`], [`Cursor`], [`Bus::history`] |
//! | lock | [`LeaseGuard`], [`LeaseProvider`] |
//! | write a backend | [`guide::backends`], [`machinery`] |
#![cfg_attr(docsrs, feature(doc_cfg))]

mod batch;
mod bus;
mod capabilities;
mod contain;
mod cursor;
mod dead_letter;
mod delivery;
mod error;
mod event;
pub mod guide;
mod lease;
pub mod machinery;
mod options;
mod payload;
mod pubsub;
mod retry;
mod runner;
mod status;
mod subscription;
mod topic;
pub mod wire;

pub use batch::{Batch, BatchOverflow, BatchPolicy, Batcher, Batches, Due, KeepSet};
pub use bus::{Bus, Handler};
pub use capabilities::{
    Attempts, Capabilities, Capability, Deduplication, Durability, Groups, LateSettlement, LossNotice, Order, Reach, Retention,
};
pub use cursor::{Cursor, Gap, OnGap, Page, Position, Scope};
pub use dead_letter::{Origin, REDRIVE_GROUP, dead_letter};
pub use delivery::{Delivery, Receipt, Settled, Settlement, Settler};
pub use error::{BoxError, Error, ErrorKind, Fate, PublishError, Result};
pub use event::{Event, EventId, Metadata, ReplayIndex, Timestamp};
pub use lease::{Acquired, Lease, LeaseGuard, LeaseProvider, check_lease, with_leases};
pub use options::{AckMode, Filter, Overflow, PublishOptions, Start, SubscribeOptions, TrimFilter};
pub use payload::{Data, Payload};
pub use pubsub::{Positions, PubSub};
pub use retry::RetryPolicy;
pub use runner::{Failure, Message, RunReport};
pub use status::{Closed, GroupStatus, Status, StatusWatch, SubscriptionStatus, TopicStatus};
pub use subscription::{Control, Source, Subscription, SubscriptionHandle};
pub use topic::{Group, Topic};
