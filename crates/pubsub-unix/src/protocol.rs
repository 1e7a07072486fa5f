//! What client and broker say to each other, as data.
//!
//! A client's [`Call`]s change something. They are numbered, carried out in order and exactly once: what was not answered when a
//! connection broke is said again to whoever is the broker then, and the broker's ledger knows which numbers it has carried out.
//! An [`Ask`](ToBroker::Ask) changes nothing and may be said again as often as needed; a read waits at the broker until there is
//! something to read. A [`Take`] asks for deliveries of a group, one at a time for each member; a repeated one is answered with what
//! it was answered before.

use pubsub_core::Gap;
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use crate::frame::Frame;
use crate::record::{Run, Stored};

/// The version of all this. A broker of another version is told by its welcome.
pub(crate) const VERSION: u32 = 1;

/// Who a client is, drawn at random when an instance is made.
pub(crate) type ClientId = u64;

/// A place in a topic: the next event to be read there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) generation: u64,
    pub(crate) offset: u64,
}

/// Generations from here on are those of what an instance keeps for itself while a TypeScript peer is the broker.
pub(crate) const FOREIGN: u64 = 1 << 63;

impl Place {
    /// Whether it is in what an instance keeps for itself, not in a broker's log.
    pub(crate) fn is_foreign(self) -> bool {
        self.generation >= FOREIGN
    }
}

/// Where to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Begin {
    Latest,
    Earliest,
    Index(u64),
    /// Right behind this cursor, as text.
    After(String),
    /// With what was published since the broker is one: for those who were under a TypeScript peer until then.
    Term,
}

/// What a start that cannot be resumed from is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum NoStart {
    Trimmed(u64),
    Ahead,
    OtherGeneration,
    OtherBus,
}

impl From<NoStart> for Gap {
    fn from(gap: NoStart) -> Self {
        match gap {
            NoStart::Trimmed(missed) => Self::Trimmed { missed: Some(missed) },
            NoStart::Ahead => Self::Ahead,
            NoStart::OtherGeneration => Self::OtherGeneration,
            NoStart::OtherBus => Self::OtherBus,
        }
    }
}

/// A member of a group: the topic, the group, and its number among its client's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Seat {
    pub(crate) topic: SmolStr,
    pub(crate) group: SmolStr,
    pub(crate) member: u64,
}

/// What a client changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    Publish {
        topic: SmolStr,
        count: usize,
        #[serde(skip)]
        events: Run,
    },
    /// Makes a member, and the group if there is none.
    Join {
        seat: Seat,
        begin: Option<Begin>,
        or_earliest: bool,
    },
    /// What it holds it may still settle; what was handed to it by takes behind `heard` it never saw.
    Leave {
        seat: Seat,
        heard: u64,
    },
    /// Deliveries to one member, in the order in which they were settled.
    Settle {
        seat: Seat,
        generation: u64,
        settled: Vec<Settling>,
    },
    Clear {
        topic: SmolStr,
    },
    Trim {
        topic: SmolStr,
        run: String,
        up_to: Option<i64>,
    },
    Lease {
        key: String,
        what: OnLease,
    },
}

impl Request {
    pub(crate) fn publish(topic: SmolStr, events: Run, count: usize) -> Self {
        Self::Publish { topic, count, events }
    }

    /// An event by itself.
    pub(crate) fn publish_one(topic: SmolStr, event: Stored) -> Self {
        Self::publish(topic, Run::from_iter([event]), 1)
    }
}

/// One delivery, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settling {
    pub(crate) offset: u64,
    pub(crate) attempt: u32,
    pub(crate) what: What,
}

/// What becomes of a delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum What {
    Done,
    /// It comes back after so many milliseconds, one attempt higher.
    Retry(u64),
    /// It comes back at once, uncounted.
    Release,
    /// It is given up, and its letter published in the same step.
    Bury(Option<(SmolStr, Stored)>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum OnLease {
    Acquire { owner: String, ttl: u64 },
    Renew { owner: String, ttl: u64 },
    Release { owner: String },
    Transfer { from: String, to: String, ttl: u64 },
}

/// A change, and its number. What is below `below` the client has been answered and will not ask again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Call {
    pub(crate) number: u64,
    pub(crate) below: u64,
    pub(crate) request: Request,
}

/// A member asks for up to so many deliveries. Its takes are numbered from 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Take {
    pub(crate) seat: Seat,
    pub(crate) number: u64,
    pub(crate) most: u32,
}

/// What a client wants to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Query {
    Start {
        topic: SmolStr,
        begin: Begin,
        or_earliest: bool,
    },
    /// Answered once there is something behind the place.
    Read {
        topic: SmolStr,
        from: Place,
        most: u32,
    },
    Page {
        topic: SmolStr,
        begin: Begin,
        most: u32,
    },
    /// Answered once a group has nothing waiting and nothing held.
    Idle {
        topic: SmolStr,
        group: SmolStr,
    },
    /// Whether this client still has the seat.
    Seated {
        client: ClientId,
        seat: Seat,
    },
    Status {
        topic: SmolStr,
    },
    Holder {
        key: String,
    },
}

/// From a client to the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToBroker {
    Call(Call),
    Take(Take),
    Ask {
        id: u64,
        query: Query,
    },
    /// The answer to this ask is no longer wanted.
    Cancel {
        id: u64,
    },
    Ping,
    /// The client has ended: what it holds is for others.
    Bye,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaseState {
    pub(crate) owner: String,
    pub(crate) token: u64,
    /// Milliseconds.
    pub(crate) remaining: u64,
}

/// Offsets in order, as stretches of them: where one begins, and how many there are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offsets(Vec<(u64, u64)>);

impl Offsets {
    pub(crate) fn push(&mut self, offset: u64) {
        match self.0.last_mut() {
            Some((first, count)) if *first + *count == offset => *count += 1,
            _ => self.0.push((offset, 1)),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().flat_map(|(first, count)| (0..*count).map_while(|more| first.checked_add(more)))
    }

    pub(crate) fn len(&self) -> usize {
        let count = self.0.iter().fold(0u64, |sum, (_, count)| sum.saturating_add(*count));
        usize::try_from(count).unwrap_or(usize::MAX)
    }
}

impl FromIterator<u64> for Offsets {
    fn from_iter<I: IntoIterator<Item = u64>>(all: I) -> Self {
        let mut offsets = Self::default();
        all.into_iter().for_each(|offset| offsets.push(offset));
        offsets
    }
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    Published {
        bus: SmolStr,
        generation: u64,
        offsets: Offsets,
    },
    /// A group would have lost what it has not read, or a bound of the bus is reached.
    Full,
    /// It could not be written.
    Failed(String),
    Joined(Result<(), NoStart>),
    /// Which of them were no longer the member's to settle: their places among them.
    Settled(Vec<u32>),
    Done,
    Trimmed(u64),
    /// The lease as it is now, and whether it is the caller's.
    Lease(Option<LeaseState>, bool),
}

/// One delivery to a member; the event is among those of its frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Handed {
    pub(crate) offset: u64,
    pub(crate) attempt: u32,
    /// What the group lost to the bound on retention right before it.
    pub(crate) lagged: u64,
}

/// Events of a topic, in order, their offsets, and the place behind them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stretch {
    pub(crate) bus: SmolStr,
    pub(crate) offsets: Offsets,
    #[serde(skip)]
    pub(crate) events: Run,
    /// Lost to the bound on retention right before the first.
    pub(crate) lagged: u64,
    pub(crate) next: Place,
}

impl Stretch {
    /// Each event with its offset.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Stored)> + '_ {
        self.offsets.iter().zip(self.events.iter())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupState {
    pub(crate) group: SmolStr,
    pub(crate) waiting: u64,
    pub(crate) held: u64,
    /// Milliseconds since 1970.
    pub(crate) oldest: Option<i64>,
    pub(crate) members: u64,
}

/// What a client wanted to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    Start(Result<Place, NoStart>),
    Stretch(Stretch),
    Page { stretch: Result<Stretch, NoStart>, floor: Option<u64>, head: Option<u64> },
    Idle,
    Seated(bool),
    Status { retained: u64, groups: Vec<GroupState> },
    Lease(Option<LeaseState>),
}

/// From the broker to a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromBroker {
    Answer {
        number: u64,
        answer: Answer,
    },
    Reply {
        id: u64,
        reply: Reply,
    },
    /// None for `handed` tells that there is no such member (any more): the client was taken for dead meanwhile.
    Taken {
        member: u64,
        number: u64,
        bus: SmolStr,
        generation: u64,
        handed: Option<Vec<Handed>>,
        #[serde(skip)]
        events: Run,
    },
    Pong,
    Ping,
}

impl Frame for ToBroker {
    fn run(&self) -> Option<&Run> {
        match self {
            Self::Call(Call { request: Request::Publish { events, .. }, .. }) => Some(events),
            _ => None,
        }
    }

    fn run_mut(&mut self) -> Option<(&mut Run, usize)> {
        match self {
            Self::Call(Call { request: Request::Publish { events, count, .. }, .. }) => Some((events, *count)),
            _ => None,
        }
    }
}

impl Frame for FromBroker {
    fn run(&self) -> Option<&Run> {
        match self {
            Self::Taken { handed: Some(_), events, .. } => Some(events),
            Self::Reply { reply: Reply::Stretch(stretch) | Reply::Page { stretch: Ok(stretch), .. }, .. } => {
                Some(&stretch.events)
            }
            _ => None,
        }
    }

    fn run_mut(&mut self) -> Option<(&mut Run, usize)> {
        match self {
            Self::Taken { handed: Some(handed), events, .. } => Some((events, handed.len())),
            Self::Reply { reply: Reply::Stretch(stretch) | Reply::Page { stretch: Ok(stretch), .. }, .. } => {
                Some((&mut stretch.events, stretch.offsets.len()))
            }
            _ => None,
        }
    }
}
