//! What a backend can do, as data that is checked once at start-up.

use std::fmt;
use std::time::Duration;

use crate::{Error, Result};

/// How far events travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reach {
    /// Within one process.
    Process,
    /// Between the processes of one host.
    Host,
    /// Between hosts.
    Network,
}

/// In which order first deliveries reach a fan-out subscription, or a group with a single member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Order {
    /// Each publisher's order, and all subscriptions see the same order.
    Total,
    /// Each publisher's order.
    PerPublisher,
    /// Each ordering key's order per publisher.
    PerKey,
    /// None.
    Unordered,
}

/// What an `Ok` of `publish` outlives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Durability {
    /// Nothing: taken means queued in this process.
    Process,
    /// The death of any processes on the host.
    ProcessDeath,
    /// The publishing host: a server has confirmed it.
    Server,
}

/// What a topic keeps for those who come later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Retention {
    /// Nothing but dead letters, if those.
    Nothing,
    /// What was not settled yet, for groups that exist; no history to read.
    Backlog,
    /// A bounded history that can be read and resumed from.
    History,
}

/// What a consumer group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Groups {
    /// There are none.
    Unsupported,
    /// It lasts while it has a member.
    Ephemeral,
    /// It keeps its place without members.
    Durable,
}

/// Who counts the attempts of a group's event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Attempts {
    /// The bus: also across instances and, where members can be killed, crashes.
    Bus,
    /// Each instance by itself.
    Instance,
}

/// How a backend answers a settlement that comes after its delivery was lost to another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LateSettlement {
    /// It can tell, and refuses: [`Settled::TooLate`](crate::Settled::TooLate).
    Refused,
    /// It cannot always tell: [`Settled::Unconfirmed`](crate::Settled::Unconfirmed).
    Unconfirmed,
}

/// How a group learns that events it had not read are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LossNotice {
    /// With their number.
    Counted,
    /// That it happened.
    Noticed,
    /// Not at all.
    Silent,
}

/// What repeating a publish of the same stamped event does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Deduplication {
    /// A second publish is a second event.
    None,
    /// One copy as long as the first is among the last `events` of its topic, and no older than `age`, where set.
    Window {
        /// How many events back a repeat is recognised, if that is bounded.
        events: Option<u64>,
        /// How long a repeat is recognised, if that is bounded.
        age: Option<Duration>,
    },
    /// The same for what is retained and for fan-out subscriptions. A group may get the event once for each publish.
    Retained {
        /// How many events back a repeat is recognised, if that is bounded.
        events: Option<u64>,
        /// How long a repeat is recognised, if that is bounded.
        age: Option<Duration>,
    },
}

/// What one backend, as configured, can do. Non-exhaustive: start from [`Capabilities::in_process`] and change what differs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// How far events travel.
    pub reach: Reach,
    /// In which order they arrive.
    pub order: Order,
    /// What an `Ok` of `publish` outlives.
    pub durability: Durability,
    /// What topics keep.
    pub retention: Retention,
    /// Whether dead-letter topics keep what was dead-lettered, to be listed and redriven. True wherever topics retain.
    pub dead_letter_history: bool,
    /// What groups are.
    pub groups: Groups,
    /// Whether a new group can start in the past: with what its topic retains. Unset, it then does (clause B3).
    pub group_history: bool,
    /// Who counts attempts.
    pub attempts: Attempts,
    /// What a late settlement is answered.
    pub late_settlement: LateSettlement,
    /// How lost events are told.
    pub loss_notice: LossNotice,
    /// What a repeated publish does.
    pub deduplication: Deduplication,
    /// Whether the backend gives events a dense index and reads history by it (see [`Start::Index`](crate::Start)).
    pub indexed: bool,
    /// Whether `local_only` events may carry live values.
    pub live_values: bool,
    /// Whether a publish may wait, and fail with `Full`, because a subscriber's queue is full.
    pub publish_waits: bool,
    /// The most bytes of encoded data plus metadata per event, if bounded.
    pub max_payload: Option<usize>,
    /// How far leases reach, if there are any.
    pub leases: Option<Reach>,
    /// Whether ids and times that were stamped reach every subscriber unchanged. Only a foreign broker breaks this.
    pub keeps_identity: bool,
    /// Whether payloads are encoded and decoded even where they need not be.
    pub strict_payloads: bool,
}

impl Capabilities {
    /// What an in-process bus can do that keeps nothing: a base to start from.
    pub fn in_process() -> Self {
        Self {
            reach: Reach::Process,
            order: Order::Total,
            durability: Durability::Process,
            retention: Retention::Nothing,
            dead_letter_history: false,
            groups: Groups::Ephemeral,
            group_history: false,
            attempts: Attempts::Bus,
            late_settlement: LateSettlement::Refused,
            loss_notice: LossNotice::Counted,
            deduplication: Deduplication::None,
            indexed: false,
            live_values: true,
            publish_waits: true,
            max_payload: None,
            leases: None,
            keeps_identity: true,
            strict_payloads: false,
        }
    }

    /// Whether one thing is supported.
    pub fn supports(&self, capability: Capability) -> bool {
        match capability {
            Capability::History => self.retention == Retention::History,
            Capability::Index => self.indexed,
            Capability::Groups => self.groups >= Groups::Ephemeral,
            Capability::DurableGroups => self.groups >= Groups::Durable,
            Capability::GroupHistory => self.group_history,
            Capability::DeadLetterHistory => self.dead_letter_history,
            Capability::Leases => self.leases.is_some(),
            Capability::LiveValues => self.live_values,
            Capability::PublisherOrder => matches!(self.order, Order::Total | Order::PerPublisher),
            Capability::TotalOrder => self.order == Order::Total,
            Capability::HostReach => self.reach >= Reach::Host,
            Capability::NetworkReach => self.reach >= Reach::Network,
            Capability::SurvivesProcessDeath => self.durability >= Durability::ProcessDeath,
            Capability::SurvivesHostDeath => self.durability >= Durability::Server,
            Capability::Deduplication => matches!(self.deduplication, Deduplication::Window { .. }),
            Capability::KeepsIdentity => self.keeps_identity,
        }
    }

    /// Checks at start-up that everything an application builds on is there.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) with the first that is missing.
    pub fn require(&self, needed: impl IntoIterator<Item = Capability>) -> Result<()> {
        match needed.into_iter().find(|capability| !self.supports(*capability)) {
            Some(missing) => Err(Error::unsupported(missing).during("require")),
            None => Ok(()),
        }
    }
}

/// One thing a backend can do or not: what applications [`require`](Capabilities::require) and what errors name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Capability {
    /// Reading what a topic retains, cursors, and starting from anything but the latest; for groups see [`Capability::GroupHistory`].
    History,
    /// Dense indices, and starting at one.
    Index,
    /// Consumer groups.
    Groups,
    /// Groups that keep their place without members.
    DurableGroups,
    /// Groups that start with what their topic retains.
    GroupHistory,
    /// Dead letters that can be listed and redriven.
    DeadLetterHistory,
    /// Leases.
    Leases,
    /// Values that travel within the process as they are.
    LiveValues,
    /// Each publisher's order is kept.
    PublisherOrder,
    /// All subscriptions see one order.
    TotalOrder,
    /// Events reach other processes of the host.
    HostReach,
    /// Events reach other hosts.
    NetworkReach,
    /// What was published outlives any process.
    SurvivesProcessDeath,
    /// What was published outlives the publishing host.
    SurvivesHostDeath,
    /// A repeated publish of one event is one event, for everybody.
    Deduplication,
    /// Ids and times arrive as they were stamped.
    KeepsIdentity,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::History => "history",
            Self::Index => "event indices",
            Self::Groups => "consumer groups",
            Self::DurableGroups => "durable groups",
            Self::GroupHistory => "groups that start with what is retained",
            Self::DeadLetterHistory => "a history of dead letters",
            Self::Leases => "leases",
            Self::LiveValues => "live values",
            Self::PublisherOrder => "publisher order",
            Self::TotalOrder => "total order",
            Self::HostReach => "delivery to other processes",
            Self::NetworkReach => "delivery to other hosts",
            Self::SurvivesProcessDeath => "surviving a killed process",
            Self::SurvivesHostDeath => "surviving a lost host",
            Self::Deduplication => "deduplication of repeated publishes",
            Self::KeepsIdentity => "keeping stamped ids and times",
        })
    }
}
