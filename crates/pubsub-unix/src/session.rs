//! A client's side of the protocol: what was said and not answered, so that it can be said again to another broker.
//!
//! It knows no socket and no clock. `S` is what the caller keeps with a question until its answer comes.

use std::collections::BTreeMap;

use foldhash::{HashMap, HashMapExt};

use crate::protocol::{Answer, Call, ClientId, FromBroker, Handed, Query, Reply, Request, Seat, Take, ToBroker};
use crate::record::Run;

pub(crate) struct Session<C, A> {
    pub(crate) client: ClientId,
    /// Grows with every connection: the broker hears only the newest.
    session: u64,
    next: u64,
    /// Calls that were not answered, in order.
    calls: BTreeMap<u64, (Request, C)>,
    asks: BTreeMap<u64, (Query, A)>,
    /// Each member's take that was not answered.
    takes: BTreeMap<u64, Take>,
    /// Each member's last number.
    taken: HashMap<u64, u64>,
}

/// What a frame from the broker means here.
pub(crate) enum Heard<C, A> {
    Answer(Answer, Request, C),
    Reply(u64, Reply, A),
    Taken {
        member: u64,
        bus: smol_str::SmolStr,
        generation: u64,
        handed: Option<Vec<Handed>>,
        events: Run,
    },
    /// To be answered with a ping.
    Ping,
    /// Heard before, or no longer wanted.
    Nothing,
}

impl<C, A> Session<C, A> {
    pub(crate) fn new(client: ClientId) -> Self {
        Self {
            client,
            session: 0,
            next: 1,
            calls: BTreeMap::new(),
            asks: BTreeMap::new(),
            takes: BTreeMap::new(),
            taken: HashMap::new(),
        }
    }

    /// A new connection: its session's number.
    pub(crate) fn connect(&mut self) -> u64 {
        self.session += 1;
        self.session
    }

    /// What is to be said once a broker has welcomed this session: all that was not answered, changes first and in their order.
    pub(crate) fn resume(&self) -> impl Iterator<Item = ToBroker> {
        let below = self.below();
        let calls = self.calls.iter();
        let calls =
            calls.map(move |(number, (request, _))| ToBroker::Call(Call { number: *number, below, request: request.clone() }));
        let takes = self.takes.values().map(|take| ToBroker::Take(take.clone()));
        let asks = self.asks.iter().map(|(id, (query, _))| ToBroker::Ask { id: *id, query: query.clone() });
        calls.chain(takes).chain(asks)
    }

    fn below(&self) -> u64 {
        self.calls.keys().next().copied().unwrap_or(self.next)
    }

    /// The number of the next call.
    pub(crate) fn next_call(&self) -> u64 {
        self.next
    }

    /// The number of the first call that was not answered.
    pub(crate) fn first_unanswered(&self) -> u64 {
        self.below()
    }

    pub(crate) fn unanswered(&self) -> usize {
        self.calls.len()
    }

    #[cfg(test)]
    pub(crate) fn asking(&self) -> usize {
        self.asks.len()
    }

    pub(crate) fn call(&mut self, request: Request, kept: C) -> ToBroker {
        let number = self.next;
        self.next += 1;
        let below = self.below().min(number);
        self.calls.insert(number, (request.clone(), kept));
        ToBroker::Call(Call { number, below, request })
    }

    /// Asks, and returns the ask's id.
    pub(crate) fn ask(&mut self, query: Query, kept: A) -> (u64, ToBroker) {
        let id = self.next;
        self.next += 1;
        self.asks.insert(id, (query.clone(), kept));
        (id, ToBroker::Ask { id, query })
    }

    pub(crate) fn cancel(&mut self, id: u64) -> Option<ToBroker> {
        self.asks.remove(&id).map(|_| ToBroker::Cancel { id })
    }

    /// Takes back questions.
    pub(crate) fn withdraw(&mut self, is_withdrawn: impl Fn(&A) -> bool) -> Vec<A> {
        let ids: Vec<u64> = self.asks.iter().filter(|(_, (_, kept))| is_withdrawn(kept)).map(|(id, _)| *id).collect();
        ids.iter().filter_map(|id| self.asks.remove(id)).map(|(_, kept)| kept).collect()
    }

    /// Asks for deliveries, unless that was asked already.
    pub(crate) fn take(&mut self, seat: Seat, most: u32) -> Option<ToBroker> {
        let member = seat.member;
        if self.takes.contains_key(&member) {
            return None;
        }
        let number = self.taken.entry(member).or_default();
        *number += 1;
        let take = Take { seat, number: *number, most };
        self.takes.insert(member, take.clone());
        Some(ToBroker::Take(take))
    }

    /// Whether a member has asked for deliveries and was not answered.
    pub(crate) fn is_taking(&self, member: u64) -> bool {
        self.takes.contains_key(&member)
    }

    /// A member has left: what it asked for is not wanted. Returns the number of the last take that was answered.
    pub(crate) fn leave(&mut self, member: u64) -> u64 {
        let open = u64::from(self.takes.remove(&member).is_some());
        self.taken.remove(&member).unwrap_or(0) - open
    }

    pub(crate) fn hear(&mut self, frame: FromBroker) -> Heard<C, A> {
        match frame {
            FromBroker::Answer { number, answer } => match self.calls.remove(&number) {
                Some((request, kept)) => Heard::Answer(answer, request, kept),
                None => Heard::Nothing,
            },
            FromBroker::Reply { id, reply } => match self.asks.remove(&id) {
                Some((_, kept)) => Heard::Reply(id, reply, kept),
                None => Heard::Nothing,
            },
            FromBroker::Taken { member, number, bus, generation, handed, events } => {
                if self.takes.get(&member).is_none_or(|take| take.number != number) {
                    return Heard::Nothing;
                }
                self.takes.remove(&member);
                Heard::Taken { member, bus, generation, handed, events }
            }
            FromBroker::Ping => Heard::Ping,
            FromBroker::Pong => Heard::Nothing,
        }
    }

    /// Everything that was not answered, for a client that ends.
    pub(crate) fn give_up(&mut self) -> (Vec<C>, Vec<A>) {
        self.takes.clear();
        let calls = std::mem::take(&mut self.calls).into_values().map(|(_, kept)| kept).collect();
        (calls, std::mem::take(&mut self.asks).into_values().map(|(_, kept)| kept).collect())
    }
}
