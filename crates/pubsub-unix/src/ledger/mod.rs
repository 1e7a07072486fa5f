//! The ledger: everything a broker must not forget, changed by nothing but entries of its log.
//!
//! It is a pure function of those entries. The broker writes an entry to the log and then applies it here; its successor reads the
//! log and applies the same entries, and so comes to the same topics, groups, leases and answers. It has no clock: each entry bears
//! its time.

mod clients;
mod group;
mod leases;
mod topic;

use std::collections::{BTreeMap, HashSet};

use foldhash::HashMap;
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use self::clients::Clients;
pub(crate) use self::group::HandedOver;
use self::group::Seated;
use self::leases::Leases;
use self::topic::Topic;
use crate::protocol::{
    Answer, Begin, Call, ClientId, FOREIGN, GroupState, NoStart, Offsets, Place, Query, Reply, Request, Seat, Settling,
    Stretch, Take, ToBroker, What,
};
use crate::record::Run;

/// How many topics there are at most, and groups in one of them.
pub(crate) const MAX_TOPICS: usize = 1 << 16;
pub(crate) const MAX_GROUPS: usize = 1024;

/// The most bytes of events in one stretch or take, unless these few are more: what its reader has at hand while the next one travels.
pub(crate) const STRETCH_BYTES: u64 = 64 << 10;
pub(crate) const STRETCH_LEAST: usize = 4;

/// What topics keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Limits {
    /// Events per topic.
    pub(crate) max_events: u64,
    /// Bytes of all topics.
    pub(crate) max_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ledger {
    /// Names the bus in cursors: another ledger at the same path is another bus.
    bus: u64,
    pub(crate) limits: Limits,
    /// The time of the last entry, in milliseconds. It never goes back.
    pub(crate) now: u64,
    topics: HashMap<SmolStr, Topic>,
    /// Topics by the time they were last published to, for what has to go first.
    by_use: BTreeMap<u64, SmolStr>,
    uses: u64,
    bytes: u64,
    generations: u64,
    leases: Leases,
    clients: Clients,
    /// Where each topic ended when the broker began.
    #[serde(skip)]
    term: HashMap<SmolStr, Place>,
    /// Topics that changed since the broker last asked.
    #[serde(skip)]
    dirty: HashSet<SmolStr, foldhash::fast::RandomState>,
}

/// What came of an entry, for its client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Answer(u64, Answer),
    Taken { member: u64, number: u64, bus: SmolStr, generation: u64, over: Option<HandedOver> },
    Nothing,
}

impl Ledger {
    pub(crate) fn new(bus: u64, limits: Limits) -> Self {
        Self {
            bus,
            limits,
            now: 0,
            topics: HashMap::default(),
            by_use: BTreeMap::new(),
            uses: 0,
            bytes: 0,
            generations: 0,
            leases: Leases::default(),
            clients: Clients::default(),
            term: HashMap::default(),
            dirty: HashSet::default(),
        }
    }

    /// What an instance keeps for itself while a TypeScript peer is the broker: of generations that no other ledger has.
    pub(crate) fn foreign(limits: Limits) -> Self {
        let generations = FOREIGN | u64::from(fastrand::u32(..)) << 24;
        Self { generations, ..Self::new(fastrand::u64(..), limits) }
    }

    /// A broker begins: what is published from now on is of its term.
    pub(crate) fn begin_term(&mut self) {
        let begins =
            self.topics.keys().filter_map(|topic| Some((topic.clone(), self.start(topic, &Begin::Latest, true).ok()?)));
        self.term = begins.collect();
    }

    /// Takes in events that another broker has given out: they are here, whatever has to go for them.
    pub(crate) fn take_in(&mut self, topic: &SmolStr, events: &Run) {
        self.publish(topic, events);
    }

    /// Makes the indices that are not written down, for a ledger that was read.
    pub(crate) fn index(&mut self) {
        self.topics.values_mut().for_each(Topic::index);
    }

    /// Carries out an entry of the log.
    pub(crate) fn apply(&mut self, at: u64, client: ClientId, entry: &ToBroker) -> Effect {
        self.now = self.now.max(at);
        match entry {
            ToBroker::Call(Call { number, below, request }) => {
                if let Some(answer) = self.clients.answered(client, *number) {
                    return Effect::Answer(*number, answer);
                }
                let answer = self.carry_out(client, request);
                self.clients.remember(client, *number, *below, answer.clone(), self.now);
                Effect::Answer(*number, answer)
            }
            ToBroker::Take(take) => self.take(client, take),
            ToBroker::Bye => {
                self.forget(client);
                Effect::Nothing
            }
            // Never written.
            ToBroker::Ask { .. } | ToBroker::Cancel { .. } | ToBroker::Ping => Effect::Nothing,
        }
    }

    /// The answer to a call that was carried out already.
    pub(crate) fn answered(&self, client: ClientId, number: u64) -> Option<Answer> {
        self.clients.answered(client, number)
    }

    /// Whether a call would be refused and change nothing, as things are now.
    pub(crate) fn refuses(&self, request: &Request) -> bool {
        match request {
            Request::Publish { topic, events, count } => self.is_full(topic, events, *count as u64),
            _ => false,
        }
    }

    /// The clients that are not gone.
    pub(crate) fn clients(&self) -> HashSet<ClientId> {
        let seated = self.topics.values().flat_map(|topic| topic.groups.values()).flat_map(Seated::clients);
        seated.chain(self.clients.present()).collect()
    }

    pub(crate) fn take_dirty(&mut self) -> Vec<SmolStr> {
        self.dirty.drain().collect()
    }

    fn carry_out(&mut self, client: ClientId, request: &Request) -> Answer {
        let now = self.now;
        match request {
            Request::Publish { topic, events, count } if self.is_full(topic, events, *count as u64) => Answer::Full,
            Request::Publish { topic, events, .. } => self.publish(topic, events),
            Request::Join { seat, begin, or_earliest } => self.join(client, seat, begin.as_ref(), *or_earliest),
            Request::Leave { seat, heard } => {
                if let Some(group) = self.group(seat) {
                    group.leave(client, seat.member, *heard);
                }
                Answer::Done
            }
            Request::Settle { seat, generation, settled } => self.settle(client, seat, *generation, settled),
            Request::Clear { topic } => {
                self.clear(topic);
                Answer::Done
            }
            Request::Trim { topic, run, up_to } => {
                let (count, bytes) = self.topics.get_mut(topic).map_or((0, 0), |topic| topic.trim(run, *up_to));
                self.bytes -= bytes;
                self.dirty.insert(topic.clone());
                Answer::Trimmed(count)
            }
            Request::Lease { key, what } => self.leases.carry_out(key, what, now),
        }
    }

    // Events.

    /// Whether these events have no place: what would have to go for them is not read yet by all groups that have members. A group
    /// without any holds nobody back; it loses what it has not read, and is told.
    fn is_full(&self, topic: &SmolStr, events: &Run, count: u64) -> bool {
        let Some(topic) = self.topics.get(topic) else {
            return self.topics.len() >= MAX_TOPICS && !self.topics.values().any(Topic::is_expendable);
        };
        let Some(unread) = topic.oldest_unread() else { return false };
        let crowded = self.bytes + events.bytes() > self.limits.max_bytes && topic.retained() > 0;
        let would_lose = |new: u64| {
            let over = (topic.retained() + new).saturating_sub(self.limits.max_events);
            let loses = |count: u64| topic.oldest_after(count) > unread;
            (over > 0 && loses(over)) || (crowded && loses(new))
        };
        // What of it is new need not be counted while there would be room for all of it.
        if !would_lose(count) {
            return false;
        }
        let new = topic.count_new(events);
        new > 0 && would_lose(new)
    }

    fn publish(&mut self, name: &SmolStr, events: &Run) -> Answer {
        let topic = self.open(name);
        let before = topic.bytes;
        let offsets: Offsets = events.iter().map(|event| topic.append(event)).collect();
        let (after, generation) = (topic.bytes, topic.generation);
        self.bytes += after - before;
        self.make_room(name);
        self.dirty.insert(name.clone());
        Answer::Published { bus: self.scope(name), generation, offsets }
    }

    /// The topic, made if there is none, and now the one used last.
    fn open(&mut self, name: &SmolStr) -> &mut Topic {
        if !self.topics.contains_key(name) {
            if self.topics.len() >= MAX_TOPICS {
                self.forget_a_topic();
            }
            self.generations += 1;
            self.topics.insert(name.clone(), Topic::new(self.generations));
        }
        self.uses += 1;
        let topic = self.topics.get_mut(name).expect("made above");
        self.by_use.remove(&topic.used);
        topic.used = self.uses;
        self.by_use.insert(self.uses, name.clone());
        topic
    }

    fn forget_a_topic(&mut self) {
        let oldest = self.by_use.iter().find(|(_, name)| self.topics.get(*name).is_some_and(Topic::is_expendable));
        let Some((used, name)) = oldest.map(|(used, name)| (*used, name.clone())) else { return };
        self.by_use.remove(&used);
        if let Some(topic) = self.topics.remove(&name) {
            self.bytes -= topic.bytes;
        }
    }

    /// Lets go of what is beyond the bounds: of this topic by number, then of those used longest ago by bytes. What a group with
    /// members has not read stays, but for a topic's own bound, which a publish that would break it is refused by.
    fn make_room(&mut self, name: &SmolStr) {
        let limits = self.limits;
        if let Some(topic) = self.topics.get_mut(name) {
            while topic.retained() > limits.max_events {
                self.bytes -= topic.lose_oldest();
            }
        }
        if self.bytes <= limits.max_bytes {
            return;
        }
        let by_use: Vec<SmolStr> = self.by_use.values().cloned().collect();
        for name in by_use {
            let Some(topic) = self.topics.get_mut(&name) else { continue };
            while self.bytes > limits.max_bytes && topic.may_lose_oldest() {
                self.bytes -= topic.lose_oldest();
            }
        }
    }

    fn clear(&mut self, name: &SmolStr) {
        let Some(topic) = self.topics.get_mut(name) else { return };
        self.generations += 1;
        self.bytes -= topic.clear(self.generations);
        self.dirty.insert(name.clone());
    }

    // Groups.

    fn group(&mut self, seat: &Seat) -> Option<&mut Seated> {
        self.dirty.insert(seat.topic.clone());
        self.topics.get_mut(&seat.topic)?.groups.get_mut(&seat.group)
    }

    fn join(&mut self, client: ClientId, seat: &Seat, begin: Option<&Begin>, or_earliest: bool) -> Answer {
        let scope = self.scope(&seat.topic);
        let known = self.topics.get(&seat.topic).is_some_and(|topic| topic.groups.contains_key(&seat.group));
        if !known && self.topics.get(&seat.topic).is_some_and(|topic| topic.groups.len() >= MAX_GROUPS) {
            return Answer::Full;
        }
        let next = match self.topics.get(&seat.topic) {
            _ if known => Ok(0), // an existing group keeps its place
            Some(topic) => topic.start(&scope, begin.unwrap_or(&Begin::Earliest), or_earliest),
            None => Topic::new(0).start(&scope, begin.unwrap_or(&Begin::Earliest), or_earliest),
        };
        match next {
            Ok(next) => {
                let topic = self.open(&seat.topic);
                topic.groups.entry(seat.group.clone()).or_insert_with(|| Seated::new(next)).join(client, seat.member);
                self.dirty.insert(seat.topic.clone());
                Answer::Joined(Ok(()))
            }
            Err(gap) => Answer::Joined(Err(gap)),
        }
    }

    /// Settles deliveries to a member one by one, and says which were no longer its own.
    fn settle(&mut self, client: ClientId, seat: &Seat, generation: u64, settled: &[Settling]) -> Answer {
        let (now, mut late, mut letters) = (self.now, Vec::new(), Vec::new());
        let topic = self.topics.get_mut(&seat.topic).filter(|topic| topic.generation == generation);
        let mut group = topic.and_then(|topic| topic.groups.get_mut(&seat.group));
        for (place, Settling { offset, attempt, what }) in (0..).zip(settled) {
            let group = group.as_mut();
            if !group.is_some_and(|group| group.settle(client, seat.member, *offset, *attempt, what, now)) {
                late.push(place);
            } else if let What::Bury(Some((topic, letter))) = what {
                letters.push((topic, letter));
            }
        }
        self.dirty.insert(seat.topic.clone());
        for (topic, letter) in letters {
            // Beyond the bounds, if need be: it takes the place of what was given up.
            self.publish(topic, &Run::from_iter([letter.clone()]));
        }
        Answer::Settled(late)
    }

    /// How many deliveries of a group could be handed over now; not counted beyond so many.
    pub(crate) fn work(&self, topic: &SmolStr, group: &SmolStr, now: u64, enough: usize) -> usize {
        let Some(topic) = self.topics.get(topic) else { return 0 };
        topic.groups.get(group).map_or(0, |group| group.work(topic, now, enough))
    }

    /// Whether a take was answered already, or asks for a seat that is not there: then it need not be written.
    pub(crate) fn is_answered(&self, client: ClientId, take: &Take) -> bool {
        let group = self.topics.get(&take.seat.topic).and_then(|topic| topic.groups.get(&take.seat.group));
        group.is_none_or(|group| group.knows(client, take) || !group.has_seat(client, take.seat.member))
    }

    /// When something of a group comes back, if nothing else happens.
    pub(crate) fn next_due(&self, topic: &SmolStr, group: &SmolStr) -> Option<u64> {
        self.topics.get(topic)?.groups.get(group)?.next_due()
    }

    fn take(&mut self, client: ClientId, take: &Take) -> Effect {
        let (now, bus) = (self.now, self.scope(&take.seat.topic));
        let (member, number) = (take.seat.member, take.number);
        let Some(topic) = self.topics.get_mut(&take.seat.topic) else {
            return Effect::Taken { member, number, bus, generation: 0, over: None };
        };
        let generation = topic.generation;
        let over = topic.take(client, take, now);
        self.dirty.insert(take.seat.topic.clone());
        Effect::Taken { member, number, bus, generation, over }
    }

    /// A client is gone: its seats are free, and what it held comes back one attempt higher.
    fn forget(&mut self, client: ClientId) {
        let now = self.now;
        for (name, topic) in &mut self.topics {
            for group in topic.groups.values_mut() {
                if group.forget(client, now) {
                    self.dirty.insert(name.clone());
                }
            }
        }
        self.clients.gone(client, now);
    }

    // Questions.

    /// The name of a topic in cursors.
    pub(crate) fn scope(&self, topic: &str) -> SmolStr {
        // FNV-1a: it has to be the same in every version.
        let hash = topic
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        smol_str::format_smolstr!("{:x}-{hash:x}", self.bus)
    }

    /// Answers what can be answered now: a read of nothing new cannot, nor whether a group is idle that is not.
    pub(crate) fn ask(&self, query: &Query, now: u64) -> Option<Reply> {
        Some(match query {
            Query::Start { topic, begin, or_earliest } => Reply::Start(self.start(topic, begin, *or_earliest)),
            Query::Read { topic, from, most } => Reply::Stretch(self.read(topic, *from, *most)?),
            Query::Page { topic, begin, most } => {
                let kept = self.topics.get(topic);
                let stretch = self.start(topic, begin, false).map(|from| {
                    let (offsets, events) = (Offsets::default(), Run::default());
                    let nothing = || Stretch { bus: self.scope(topic), offsets, events, lagged: 0, next: from };
                    kept.and_then(|kept| kept.read(self.scope(topic), from, *most)).unwrap_or_else(nothing)
                });
                let (floor, head) = kept.map_or((None, None), Topic::ends);
                Reply::Page { stretch, floor, head }
            }
            Query::Idle { topic, group } => {
                let kept = self.topics.get(topic);
                let busy = kept.is_some_and(|kept| kept.groups.get(group).is_some_and(|group| !group.is_drained(kept)));
                return (!busy).then_some(Reply::Idle);
            }
            Query::Seated { client, seat } => {
                let group = self.topics.get(&seat.topic).and_then(|topic| topic.groups.get(&seat.group));
                Reply::Seated(group.is_some_and(|group| group.has_seat(*client, seat.member)))
            }
            Query::Status { topic } => {
                let (retained, groups): (_, Vec<GroupState>) =
                    self.topics.get(topic).map_or((0, Vec::new()), |topic| (topic.retained(), topic.states()));
                Reply::Status { retained, groups }
            }
            Query::Holder { key } => Reply::Lease(self.leases.holder(key, now)),
        })
    }

    fn start(&self, name: &SmolStr, begin: &Begin, or_earliest: bool) -> Result<Place, NoStart> {
        let scope = self.scope(name);
        let empty = Topic::new(0);
        let topic = self.topics.get(name).unwrap_or(&empty);
        if *begin == Begin::Term {
            // A topic that was made or cleared meanwhile is all of it new.
            let known = self.term.get(name).filter(|place| place.generation == topic.generation);
            return Ok(known.copied().unwrap_or(Place { generation: topic.generation, offset: 0 }));
        }
        Ok(Place { generation: topic.generation, offset: topic.start(&scope, begin, or_earliest)? })
    }

    fn read(&self, name: &SmolStr, from: Place, most: u32) -> Option<Stretch> {
        self.topics.get(name)?.read(self.scope(name), from, most)
    }
}

#[cfg(test)]
mod tests;
