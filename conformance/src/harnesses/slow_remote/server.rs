//! The imitated server: topics with a bounded log, durable groups with what they have pending, sessions that expire.
//!
//! It is plain data under one lock. It knows no task, no socket and nothing of subscriptions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pubsub_core::{
    ErrorKind, EventId, Gap, Group, GroupStatus, OnGap, Result, Scope, Settled, Start, Timestamp, Topic, TopicStatus,
    TrimFilter, wire,
};
use tokio::time::Instant;

/// How many events a topic keeps.
pub(super) const RETENTION: usize = 4096;

/// How long a session that is not heard of keeps what it holds.
const SESSION: Duration = Duration::from_secs(2);

/// The share of settlements, one in so many, that are carried out and never confirmed.
const UNCONFIRMED: u32 = 8;

/// A place in a topic: what a cursor says, and the index its events bear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Place {
    pub(super) generation: u64,
    pub(super) offset: u64,
}

/// An event as the server keeps it: bytes, and what it has to know of them.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) id: EventId,
    pub(super) created_at: Timestamp,
    pub(super) json: Bytes,
}

/// An event on its way to a reader.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) scope: Arc<Scope>,
    pub(super) place: Place,
    pub(super) attempt: u32,
    /// Lost to the bound on retention right before it.
    pub(super) lagged: u64,
    pub(super) stored: Stored,
}

/// A stretch of a topic's history, the oldest and the newest offset there are, and whether there are more events behind it.
#[derive(Debug)]
pub(super) struct Stretch {
    pub(super) scope: Arc<Scope>,
    pub(super) sent: Vec<Sent>,
    pub(super) floor: Option<u64>,
    pub(super) head: Option<u64>,
    pub(super) more: bool,
}

/// What a member of a group says about one delivery; the attempt makes sure that it is not about an earlier one.
#[derive(Debug, Clone)]
pub(super) struct Notice {
    pub(super) topic: Topic,
    pub(super) group: Group,
    pub(super) member: u64,
    pub(super) what: What,
}

#[derive(Debug, Clone)]
pub(super) enum What {
    /// It was handed over: from now on a crash counts.
    Started(Place, u32),
    Done(Place, u32),
    Retry(Place, u32, Duration),
    Release(Place, u32),
    /// Gives it up, and stores its dead letter if there is one.
    Bury(Place, u32, Option<(Topic, Stored)>),
    /// The member is gone; what it took and did not start is for others.
    Leave,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Is(Settled),
    /// It was carried out, and nobody will say so.
    Lost,
    /// It could not be written.
    Failed,
}

#[derive(Default)]
pub(super) struct State {
    name: String,
    topics: HashMap<Topic, Log>,
    /// When each session was last heard of.
    sessions: BTreeMap<u64, Instant>,
    chance: fastrand::Rng,
    pub(super) failing: u32,
    pub(super) losing: u32,
    /// Whether something changed that readers may wait for.
    pub(super) changed: bool,
}

struct Log {
    number: usize,
    generation: u64,
    scope: Arc<Scope>,
    /// What lies below was lost to the bound on retention.
    floor: u64,
    next: u64,
    entries: BTreeMap<u64, Stored>,
    places: HashMap<EventId, u64>,
    groups: BTreeMap<Group, Members>,
}

#[derive(Default)]
struct Members {
    /// Members, and the session each belongs to.
    members: BTreeMap<u64, u64>,
    next: u64,
    lost: u64,
    pending: BTreeMap<Place, Pending>,
}

struct Pending {
    stored: Stored,
    attempt: u32,
    lagged: u64,
    /// Member and session.
    holder: Option<(u64, u64)>,
    started: bool,
    due: Instant,
}

impl State {
    pub(super) fn new(seed: u64) -> Self {
        Self { name: EventId::random().to_string(), chance: fastrand::Rng::with_seed(seed), ..Self::default() }
    }

    fn log(&mut self, topic: &Topic) -> &mut Log {
        let number = self.topics.len();
        self.topics.entry(topic.clone()).or_insert_with(|| Log::new(&self.name, number))
    }

    /// A delay of up to so much, drawn anew each time.
    pub(super) fn chance_of(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.chance.f64())
    }

    pub(super) fn heard_of(&mut self, session: u64) {
        self.sessions.insert(session, Instant::now());
    }

    /// After it was down the server cannot know who is alive: everybody is given time.
    pub(super) fn hear_of_all(&mut self) {
        let now = Instant::now();
        self.sessions.values_mut().for_each(|heard| *heard = now);
    }

    /// What clients have made here and should have cleaned up.
    pub(super) fn resources(&self) -> BTreeMap<String, u64> {
        let members = self.topics.values().flat_map(|log| log.groups.values()).map(|group| group.members.len() as u64);
        [("sessions".to_owned(), self.sessions.len() as u64), ("members".to_owned(), members.sum())].into()
    }

    /// How many deliveries of a group are with a member, or came back.
    pub(super) fn pending(&self, topic: &Topic, group: &Group) -> u64 {
        let group = self.topics.get(topic).and_then(|log| log.groups.get(group));
        group.map_or(0, |group| group.pending.len() as u64)
    }

    /// Forgets a session. What it had started is one attempt higher for others; what it had merely taken is not.
    pub(super) fn end_session(&mut self, session: u64) {
        self.sessions.remove(&session);
        for group in self.topics.values_mut().flat_map(|log| log.groups.values_mut()) {
            group.members.retain(|_, of| *of != session);
            group.give_back(|(_, of)| of == session, true);
        }
        self.changed = true;
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let expired: Vec<_> = self.sessions.iter().filter(|(_, heard)| **heard + SESSION <= now).map(|(id, _)| *id).collect();
        expired.into_iter().for_each(|session| self.end_session(session));
    }

    fn write_fails(&mut self) -> bool {
        let fails = self.failing > 0;
        self.failing -= u32::from(fails);
        fails
    }

    /// Stores events, those again that are stored already. A write that fails breaks off half way: the error says how many were
    /// stored.
    pub(super) fn append(&mut self, topic: &Topic, events: &[Stored]) -> Result<Vec<(Arc<Scope>, u64)>, usize> {
        let fails = self.write_fails();
        let count = if fails { events.len() / 2 } else { events.len() };
        let log = self.log(topic);
        let places = events[..count].iter().map(|event| (log.scope.clone(), log.append(event))).collect();
        self.changed = true;
        if fails { Err(count) } else { Ok(places) }
    }

    /// Where a reader starts.
    pub(super) fn start(&mut self, topic: &Topic, start: &Start, on_gap: OnGap) -> Result<Place> {
        let log = self.log(topic);
        Ok(Place { generation: log.generation, offset: log.start(start, on_gap)? })
    }

    /// Up to so many events from a place on, and the place behind them. A reader of an earlier generation starts anew.
    pub(super) fn read(&mut self, topic: &Topic, from: Place, most: usize) -> (Vec<Sent>, Place) {
        let log = self.log(topic);
        let mut from = if from.generation == log.generation { from.offset } else { 0 };
        let mut lagged = log.floor.saturating_sub(from);
        from = from.max(log.floor);
        let sent = log.entries.range(from..).take(most).map(|(offset, stored)| Sent {
            scope: log.scope.clone(),
            place: Place { generation: log.generation, offset: *offset },
            attempt: 1,
            lagged: std::mem::take(&mut lagged),
            stored: stored.clone(),
        });
        let sent: Vec<_> = sent.collect();
        let offset = sent.last().map_or(log.next, |last| last.place.offset + 1);
        (sent, Place { generation: log.generation, offset })
    }

    /// Makes a member. A new group starts where it is asked to, and else with what is retained; an existing one keeps its place.
    pub(super) fn join(
        &mut self,
        topic: &Topic,
        group: &Group,
        start: Option<&Start>,
        on_gap: OnGap,
        member: u64,
        session: u64,
    ) -> Result<()> {
        let log = self.log(topic);
        if !log.groups.contains_key(group) {
            let next = log.start(start.unwrap_or(&Start::Earliest), on_gap)?;
            log.groups.insert(group.clone(), Members { next, ..Members::default() });
        }
        log.groups.get_mut(group).expect("made above").members.insert(member, session);
        Ok(())
    }

    /// Hands up to so many deliveries to a member: what came back and is due, then what is new. If there is nothing, says when
    /// there may be without anything having changed.
    pub(super) fn take(&mut self, topic: &Topic, group: &Group, member: u64, most: usize) -> (Vec<Sent>, Option<Instant>) {
        self.expire();
        let Self { topics, sessions, .. } = self;
        let Some(log) = topics.get_mut(topic) else { return (Vec::new(), None) };
        let Some(members) = log.groups.get_mut(group) else { return (Vec::new(), None) };
        let Some(session) = members.members.get(&member).copied() else { return (Vec::new(), None) };
        let now = Instant::now();
        let free = members.pending.iter().filter(|(_, pending)| pending.holder.is_none() && pending.due <= now);
        let mut places: Vec<_> = free.map(|(place, _)| *place).take(most).collect();
        for (offset, stored) in log.entries.range(members.next..).take(most - places.len()) {
            let place = Place { generation: log.generation, offset: *offset };
            let lagged = std::mem::take(&mut members.lost);
            let pending = Pending { stored: stored.clone(), attempt: 1, lagged, holder: None, started: false, due: now };
            members.pending.insert(place, pending);
            members.next = offset + 1;
            places.push(place);
        }
        let scope = &log.scope;
        let sent = places.into_iter().map(|place| {
            let pending = members.pending.get_mut(&place).expect("found above");
            pending.holder = Some((member, session));
            let lagged = std::mem::take(&mut pending.lagged);
            Sent { scope: scope.clone(), place, attempt: pending.attempt, lagged, stored: pending.stored.clone() }
        });
        let sent = sent.collect();
        let again = members.pending.values().filter_map(|pending| match pending.holder {
            None => Some(pending.due),
            Some((_, holder)) if holder == session => None,
            Some((_, holder)) => sessions.get(&holder).map(|heard| *heard + SESSION),
        });
        let again = again.min();
        (sent, again)
    }

    /// Carries out what a member says.
    pub(super) fn notice(&mut self, notice: &Notice) -> Answer {
        let Notice { topic, group, member, what } = notice;
        let counts = !matches!(what, What::Started(..) | What::Leave);
        if counts && self.write_fails() {
            return Answer::Failed;
        }
        if let What::Bury(_, _, Some((topic, letter))) = what {
            self.log(topic).append(letter);
        }
        let settled = match self.topics.get_mut(topic).and_then(|log| log.groups.get_mut(group)) {
            Some(members) => members.notice(*member, what),
            None => Settled::TooLate,
        };
        self.changed = true;
        let lost = counts && (self.losing > 0 || self.chance.u32(..UNCONFIRMED) == 0);
        self.losing -= u32::from(lost && self.losing > 0);
        if lost { Answer::Lost } else { Answer::Is(settled) }
    }

    /// Up to so many events from a start on.
    pub(super) fn page(&mut self, topic: &Topic, from: &Start, most: usize) -> Result<Stretch> {
        let from = self.start(topic, from, OnGap::Fail)?;
        let (sent, next) = self.read(topic, from, most);
        let Log { scope, entries, .. } = self.log(topic);
        Ok(Stretch {
            scope: scope.clone(),
            sent,
            floor: entries.keys().next().copied(),
            head: entries.keys().next_back().copied(),
            more: entries.range(next.offset..).next().is_some(),
        })
    }

    /// Forgets what is kept, and what groups have pending, and starts a new generation.
    pub(super) fn clear(&mut self, topic: &Topic) {
        let name = self.name.clone();
        let log = self.log(topic);
        let groups = std::mem::take(&mut log.groups);
        let members =
            groups.into_iter().map(|(name, Members { members, .. })| (name, Members { members, ..Members::default() }));
        *log = Log { groups: members.collect(), ..Log::of_generation(&name, log.number, log.generation + 1) };
        self.changed = true;
    }

    /// Removes what matches, unless it is in somebody's hands.
    pub(super) fn trim(&mut self, topic: &Topic, filter: &TrimFilter) -> u64 {
        let log = self.log(topic);
        let goes = |stored: &Stored| wire::decode(&stored.json, None).is_ok_and(|decoded| filter.matches(&decoded.event));
        let before = log.entries.len();
        log.entries.retain(|_, stored| !goes(stored));
        log.places.retain(|_, offset| log.entries.contains_key(offset));
        for group in log.groups.values_mut() {
            group.pending.retain(|_, pending| pending.holder.is_some() || !goes(&pending.stored));
        }
        let trimmed = before - log.entries.len();
        self.changed = true;
        trimmed as u64
    }

    pub(super) fn status(&mut self, topic: &Topic) -> TopicStatus {
        self.expire();
        let log = self.log(topic);
        let mut status = TopicStatus::default();
        status.retained = Some(log.entries.len() as u64);
        for (name, group) in &log.groups {
            let unread = log.entries.range(group.next..).map(|(_, stored)| stored);
            let held = group.pending.values().filter(|pending| pending.started).count() as u64;
            let oldest = group.pending.values().map(|pending| &pending.stored).chain(unread.clone());
            let oldest = oldest.map(|stored| stored.created_at.as_millis()).min();
            let age = |millis: i64| u64::try_from(Timestamp::now().as_millis() - millis).unwrap_or(0);
            let mut of_group = GroupStatus::new(name.clone());
            of_group.held = Some(held);
            of_group.waiting = Some(unread.count() as u64 + group.pending.len() as u64 - held);
            of_group.oldest = oldest.map(|millis| Duration::from_millis(age(millis)));
            of_group.members = Some(group.members.len() as u64);
            status.groups.push(of_group);
        }
        status
    }
}

impl Log {
    fn new(server: &str, number: usize) -> Self {
        Self::of_generation(server, number, 0)
    }

    fn of_generation(server: &str, number: usize, generation: u64) -> Self {
        let scope = Scope::new(format!("{server}-{number}"), generation.to_string()).expect("a uuid and numbers make a scope");
        Self {
            number,
            generation,
            scope: Arc::new(scope),
            floor: 0,
            next: 0,
            entries: BTreeMap::new(),
            places: HashMap::new(),
            groups: BTreeMap::new(),
        }
    }

    fn append(&mut self, event: &Stored) -> u64 {
        if let Some(place) = self.places.get(&event.id) {
            return *place;
        }
        let offset = self.next;
        self.next += 1;
        self.entries.insert(offset, event.clone());
        self.places.insert(event.id.clone(), offset);
        if self.entries.len() > RETENTION
            && let Some((oldest, lost)) = self.entries.pop_first()
        {
            self.places.remove(&lost.id);
            self.floor = oldest + 1;
            for group in self.groups.values_mut().filter(|group| group.next <= oldest) {
                group.next = oldest + 1;
                group.lost += 1;
            }
        }
        offset
    }

    fn start(&self, start: &Start, on_gap: OnGap) -> Result<u64> {
        let behind = |offset: u64| match offset {
            _ if offset > self.next => Err(Gap::Ahead),
            _ if offset < self.floor => Err(Gap::Trimmed { missed: Some(self.floor - offset) }),
            _ => Ok(offset),
        };
        let found = match start {
            Start::Latest => Ok(self.next),
            Start::Earliest => Ok(self.floor),
            Start::Index(index) => behind(*index),
            Start::After(cursor) => self.scope.admits(cursor).and_then(|position| behind(position.major + 1)),
        };
        match (found, on_gap) {
            (Ok(offset), _) => Ok(offset),
            (Err(_), OnGap::Earliest) => Ok(self.floor),
            (Err(gap), OnGap::Fail) => Err(ErrorKind::Gap(gap).into()),
        }
    }
}

impl Members {
    fn notice(&mut self, member: u64, what: &What) -> Settled {
        let (place, attempt) = match what {
            What::Leave => {
                self.members.remove(&member);
                self.give_back(|(of, _)| of == member, false);
                return Settled::Done;
            }
            What::Started(place, attempt) | What::Done(place, attempt) | What::Release(place, attempt) => (place, attempt),
            What::Retry(place, attempt, _) | What::Bury(place, attempt, _) => (place, attempt),
        };
        let Some(pending) = self.pending.get_mut(place) else { return Settled::TooLate };
        let held = pending.attempt == *attempt && pending.holder.is_some_and(|(of, _)| of == member);
        // A late acknowledgement still counts unless somebody else has started.
        let still_free = pending.holder.is_none() && matches!(what, What::Done(..));
        if !held && !still_free {
            return Settled::TooLate;
        }
        match what {
            What::Started(..) => pending.started = true,
            What::Retry(_, _, backoff) => pending.free(1, Instant::now() + *backoff),
            What::Release(..) => pending.free(0, Instant::now()),
            _ => drop(self.pending.remove(place)),
        }
        Settled::Done
    }

    /// Frees what these holders have: what they started one attempt higher, if that is to be freed at all.
    fn give_back(&mut self, of: impl Fn((u64, u64)) -> bool, started: bool) {
        let now = Instant::now();
        for pending in self.pending.values_mut() {
            if pending.holder.is_some_and(&of) && (started || !pending.started) {
                pending.free(u32::from(pending.started), now);
            }
        }
    }
}

impl Pending {
    fn free(&mut self, counted: u32, due: Instant) {
        (self.holder, self.started, self.due) = (None, false, due);
        self.attempt += counted;
    }
}
