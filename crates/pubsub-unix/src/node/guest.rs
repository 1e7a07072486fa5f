//! A TypeScript peer at a broker of ours: what it says in lines becomes what a client of ours would say, and the answers become
//! lines.
//!
//! It is served in the order it speaks, one thing at a time; publishes to one topic that stand next to each other go together. Since
//! it can be told nothing but events, a publish that has no room yet, or cannot be written, waits here, and nothing more is read
//! from the peer meanwhile, so that its own writes wait. What was written to the connection counts as done, as with a
//! broker of its kind; what was not goes to other members.

use std::collections::VecDeque;

use bytes::Bytes;
use foldhash::{HashMap, HashMapExt};
use smol_str::SmolStr;

use super::lines::{MAX_EVENT, Said, Stamp, carry, membership, stamped, told, understand};
use crate::frame::Malformed;
use crate::protocol::{
    Answer, Begin, ClientId, FromBroker, Handed, Place, Query, Reply, Request, Seat, Settling, ToBroker, What,
};
use crate::record::{Run, Stored};
use crate::session::{Heard, Session};

/// How many events, and how many bytes of them, are published together at most.
const TOGETHER: usize = 256;
const BYTES_TOGETHER: usize = 1 << 20;

/// How much a peer may have said that was not dealt with before nothing more is read from it.
const MAX_UNHEARD: usize = 1 << 20;

/// How many events of a topic are read at once, and how many deliveries of a group are taken.
const READ: u32 = 256;
const TAKE: u32 = 16;

/// What is kept with a call.
enum Kept {
    Publish(SmolStr, Vec<Stored>),
    Join(SmolStr, SmolStr),
    /// Nobody waits for it.
    Other,
}

/// What is kept with a question.
enum Wanted {
    /// Where to start with a topic.
    Start(SmolStr),
    /// What is new there.
    Read(SmolStr),
}

/// A topic that the peer follows.
#[derive(Default)]
struct Followed {
    next: Place,
    /// The question on its way; none while there is no room for an answer.
    asked: Option<u64>,
}

fn done(offset: u64, attempt: u32) -> Settling {
    Settling { offset, attempt, what: What::Done }
}

pub(crate) struct Guest {
    session: Session<Kept, Wanted>,
    unheard: VecDeque<Said>,
    unheard_bytes: usize,
    /// Whether something has to be answered before the next thing is dealt with.
    waits: bool,
    /// What could not be published; to be tried again.
    again: Option<(SmolStr, Vec<Stored>)>,
    /// Other changes that could not be written.
    failed: Vec<Request>,
    topics: HashMap<SmolStr, Followed>,
    groups: HashMap<(SmolStr, SmolStr), Seat>,
    seats: u64,
    /// Handed over, and not written to the connection yet.
    unwritten: Vec<(Seat, u64, Settling)>,
    frames: Vec<ToBroker>,
    lines: Vec<u8>,
}

impl Guest {
    pub(crate) fn new(client: ClientId) -> Self {
        let mut session = Session::new(client);
        session.connect();
        Self {
            session,
            unheard: VecDeque::new(),
            unheard_bytes: 0,
            waits: false,
            again: None,
            failed: Vec::new(),
            topics: HashMap::new(),
            groups: HashMap::new(),
            seats: 0,
            unwritten: Vec::new(),
            frames: Vec::new(),
            lines: Vec::new(),
        }
    }

    /// The peer said something.
    ///
    /// # Errors
    /// If it is an event of more than [`MAX_EVENT`]: the connection is to be closed, since the peer can be told in no other way.
    pub(crate) fn hear(&mut self, line: &Bytes, stamp: impl FnMut() -> Stamp) -> Result<(), Malformed> {
        if let Some(said) = understand(line) {
            if let Said::Publish(_, event, _) = &said
                && event.len() > MAX_EVENT
            {
                return Err(Malformed::TooLong(event.len()));
            }
            self.unheard_bytes += line.len();
            self.unheard.push_back(said);
        }
        self.go_on(stamp);
        Ok(())
    }

    /// Whether so much was said that nothing more is to be read for now.
    pub(crate) fn is_behind(&self) -> bool {
        self.unheard_bytes >= MAX_UNHEARD || self.again.is_some()
    }

    /// Whether there is something to be tried again in a moment.
    pub(crate) fn has_to_retry(&self) -> bool {
        self.again.is_some() || !self.failed.is_empty()
    }

    /// Whether deliveries of groups wait to be written to the peer.
    pub(crate) fn holds(&self) -> bool {
        !self.unwritten.is_empty()
    }

    /// Asks again for what had no room, or could not be written.
    pub(crate) fn retry(&mut self) {
        for request in std::mem::take(&mut self.failed) {
            self.frames.push(self.session.call(request, Kept::Other));
        }
        if let Some((topic, events)) = self.again.take() {
            self.publish(topic, events);
        }
    }

    /// Deals with what was said, as far as nothing has to be waited for.
    fn go_on(&mut self, mut stamp: impl FnMut() -> Stamp) {
        while !self.waits
            && let Some(said) = self.unheard.pop_front()
        {
            match said {
                Said::Publish(topic, event, local_only) => {
                    self.heard_bytes(event.len());
                    let Some(stored) = stamped(&topic, &event, stamp()) else { continue };
                    if local_only {
                        self.echo(&topic, &stored);
                        continue;
                    }
                    let (mut bytes, mut events) = (stored.json().len(), vec![stored]);
                    while events.len() < TOGETHER
                        && bytes < BYTES_TOGETHER
                        && let Some(Said::Publish(next, event, false)) = self.unheard.front()
                        && *next == topic
                    {
                        let stored = stamped(&topic, event, stamp());
                        let length = event.len();
                        self.unheard.pop_front();
                        self.heard_bytes(length);
                        bytes += length;
                        events.extend(stored);
                    }
                    self.publish(topic, events);
                }
                Said::Subscribe(topic, None) => {
                    if self.topics.contains_key(&topic) {
                        membership("subscribed", &topic, None, &mut self.lines);
                        continue;
                    }
                    let query = Query::Start { topic: topic.clone(), begin: Begin::Latest, or_earliest: true };
                    let (_, frame) = self.session.ask(query, Wanted::Start(topic));
                    self.frames.push(frame);
                    self.waits = true;
                }
                Said::Subscribe(topic, Some(group)) => {
                    if self.groups.contains_key(&(topic.clone(), group.clone())) {
                        membership("subscribed", &topic, Some(&group), &mut self.lines);
                        continue;
                    }
                    self.seats += 1;
                    let seat = Seat { topic: topic.clone(), group: group.clone(), member: self.seats };
                    self.groups.insert((topic.clone(), group.clone()), seat.clone());
                    let request = Request::Join { seat, begin: Some(Begin::Latest), or_earliest: true };
                    self.frames.push(self.session.call(request, Kept::Join(topic, group)));
                    self.waits = true;
                }
                Said::Unsubscribe(topic, None) => {
                    let followed = self.topics.remove(&topic);
                    let asked = followed.and_then(|followed| followed.asked);
                    self.frames.extend(asked.and_then(|id| self.session.cancel(id)));
                    membership("unsubscribed", &topic, None, &mut self.lines);
                }
                Said::Unsubscribe(topic, Some(group)) => {
                    if let Some(seat) = self.groups.remove(&(topic.clone(), group.clone())) {
                        let heard = self.session.leave(seat.member);
                        self.frames.push(self.session.call(Request::Leave { seat, heard }, Kept::Other));
                    }
                    membership("unsubscribed", &topic, Some(&group), &mut self.lines);
                }
                Said::Subscribed(..) | Said::Unsubscribed | Said::Event(..) => {} // what only brokers say
            }
        }
        if self.unheard.is_empty() {
            self.unheard_bytes = 0;
        }
    }

    fn heard_bytes(&mut self, length: usize) {
        self.unheard_bytes = self.unheard_bytes.saturating_sub(length);
    }

    fn publish(&mut self, topic: SmolStr, events: Vec<Stored>) {
        let request = Request::publish(topic.clone(), events.iter().cloned().collect(), events.len());
        self.frames.push(self.session.call(request, Kept::Publish(topic, events)));
        self.waits = true;
    }

    /// An event that is for nobody but the peer itself.
    fn echo(&mut self, topic: &SmolStr, stored: &Stored) {
        if self.topics.contains_key(topic)
            && let Some(event) = told(stored, 1)
        {
            carry("event", topic, None, &event, &mut self.lines);
        }
    }

    /// The broker said something.
    pub(crate) fn told(&mut self, frame: FromBroker, stamp: impl FnMut() -> Stamp) {
        match self.session.hear(frame) {
            Heard::Answer(answer, _, Kept::Publish(topic, events)) => match answer {
                Answer::Full | Answer::Failed(_) => {
                    self.again = Some((topic, events));
                    return;
                }
                _ => self.waits = false,
            },
            Heard::Answer(answer, _, Kept::Join(topic, group)) => {
                self.waits = false;
                // One that was refused is told the same, and hears nothing: it would wait for long to be told nothing else.
                match answer {
                    Answer::Joined(Ok(())) => self.ask_for_deliveries(&topic, &group),
                    answer => tracing::warn!(%topic, %group, ?answer, "a TypeScript peer cannot join"),
                }
                membership("subscribed", &topic, Some(&group), &mut self.lines);
            }
            Heard::Reply(_, Reply::Start(start), Wanted::Start(topic)) => {
                self.waits = false;
                membership("subscribed", &topic, None, &mut self.lines);
                self.topics.insert(topic, Followed { next: start.unwrap_or_default(), asked: None });
            }
            Heard::Reply(id, Reply::Stretch(stretch), Wanted::Read(topic)) => {
                let Some(followed) = self.topics.get_mut(&topic).filter(|followed| followed.asked == Some(id)) else { return };
                (followed.asked, followed.next) = (None, stretch.next);
                for (_, stored) in stretch.iter() {
                    match told(&stored, 1) {
                        Some(event) => carry("event", &topic, None, &event, &mut self.lines),
                        None => tracing::warn!(%topic, "an event that TypeScript peers could not read is kept from them"),
                    }
                }
            }
            Heard::Taken { member, generation, handed, events, .. } => self.taken(member, generation, handed, &events),
            Heard::Answer(Answer::Failed(_), request, Kept::Other) => self.failed.push(request),
            Heard::Ping => self.frames.push(ToBroker::Ping),
            Heard::Answer(..) | Heard::Reply(..) | Heard::Nothing => {}
        }
        self.go_on(stamp);
    }

    fn taken(&mut self, member: u64, generation: u64, handed: Option<Vec<Handed>>, events: &Run) {
        let Some(seat) = self.groups.values().find(|seat| seat.member == member).cloned() else { return };
        let Some(handed) = handed else {
            // It was taken for dead although it is connected: the host was suspended, most likely.
            let request = Request::Join { seat: seat.clone(), begin: None, or_earliest: true };
            self.frames.push(self.session.call(request, Kept::Other));
            return;
        };
        for (Handed { offset, attempt, .. }, stored) in handed.into_iter().zip(events.iter()) {
            match told(&stored, attempt) {
                Some(event) => {
                    carry("event", &seat.topic, Some(&seat.group), &event, &mut self.lines);
                    self.unwritten.push((seat.clone(), generation, done(offset, attempt)));
                }
                None => self.settle(seat.clone(), generation, vec![done(offset, attempt)]),
            }
        }
    }

    fn settle(&mut self, seat: Seat, generation: u64, settled: Vec<Settling>) {
        let request = Request::Settle { seat, generation, settled };
        self.frames.push(self.session.call(request, Kept::Other));
    }

    fn ask_for_deliveries(&mut self, topic: &SmolStr, group: &SmolStr) {
        if let Some(seat) = self.groups.get(&(topic.clone(), group.clone())) {
            self.frames.extend(self.session.take(seat.clone(), TAKE));
        }
    }

    /// All that the peer was told has been written: what was handed over is done, and there is room for more.
    pub(crate) fn written(&mut self) {
        let mut unwritten = std::mem::take(&mut self.unwritten).into_iter().peekable();
        while let Some((seat, generation, first)) = unwritten.next() {
            let mut settled = vec![first];
            // What one member took stands together.
            while let Some((.., next)) = unwritten.next_if(|(of, in_generation, _)| *of == seat && *in_generation == generation)
            {
                settled.push(next);
            }
            self.settle(seat, generation, settled);
        }
        for seat in self.groups.values() {
            self.frames.extend(self.session.take(seat.clone(), TAKE));
        }
        for (topic, followed) in &mut self.topics {
            if followed.asked.is_none() {
                let query = Query::Read { topic: topic.clone(), from: followed.next, most: READ };
                let (id, frame) = self.session.ask(query, Wanted::Read(topic.clone()));
                followed.asked = Some(id);
                self.frames.push(frame);
            }
        }
    }

    /// What is to be said to the broker.
    pub(crate) fn frames(&mut self) -> Vec<ToBroker> {
        std::mem::take(&mut self.frames)
    }

    /// What is to be written to the peer.
    pub(crate) fn lines(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.lines)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use pubsub_core::{EventId, Timestamp};
    use serde_json::Value;

    use super::*;
    use crate::broker::{Broker, ConnId, Patience};
    use crate::frame;
    use crate::ledger::{Ledger, Limits};

    fn stamp() -> Stamp {
        Stamp { id: EventId::random(), created_at: Timestamp::from_millis(0).unwrap() }
    }

    /// A broker, and guests that are its peers by their places.
    struct Inn {
        broker: Broker,
        guests: Vec<Guest>,
        is_full: bool,
    }

    impl Inn {
        fn new(count: u64) -> Self {
            let limits = Limits { max_events: 100, max_bytes: 1 << 20 };
            let patience = Patience { absent: 250, silent: 10_000 };
            let mut broker = Broker::new(Ledger::new(7, limits), patience, 0);
            let guests = (0..count).map(|client| {
                assert_eq!(broker.connected(client, client, 1, 0), Ok(None));
                Guest::new(client)
            });
            let guests = guests.collect();
            Self { broker, guests, is_full: false }
        }

        fn says(&mut self, guest: usize, line: &str) {
            self.guests[guest].hear(&Bytes::from(line.to_owned()), stamp).unwrap();
        }

        /// Lets all of them have their say, and returns what each was told.
        fn settle(&mut self) -> Vec<Vec<Value>> {
            let mut told = vec![Vec::new(); self.guests.len()];
            for _ in 0..8 {
                for (conn, guest) in self.guests.iter_mut().enumerate() {
                    for frame in guest.frames() {
                        let mut bytes = Vec::new();
                        frame::encode(&frame, &mut bytes).unwrap();
                        let body = Bytes::from(bytes).slice(frame::HEADER..);
                        self.broker.received(conn as ConnId, body, 1).unwrap();
                    }
                }
                let is_full = self.is_full;
                let turn = self.broker.turn(1, |_| if is_full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) });
                for (conn, frame) in turn.frames {
                    self.guests[usize::try_from(conn).unwrap()].told(frame, stamp);
                }
                for (guest, told) in self.guests.iter_mut().zip(&mut told) {
                    let lines = guest.lines();
                    let lines = lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
                    told.extend(lines.map(|line| serde_json::from_slice::<Value>(line).unwrap()));
                    guest.written();
                }
            }
            told
        }
    }

    fn types(told: &[Value]) -> Vec<&str> {
        told.iter().filter_map(|line| line["event"]["type"].as_str()).collect()
    }

    #[test]
    fn an_event_that_would_not_travel_ends_the_connection() {
        let long = |length: usize| {
            Bytes::from(format!(r#"{{"type":"publish","topic":"t","event":{{"data":"{}"}}}}"#, "x".repeat(length)))
        };
        assert!(Guest::new(1).hear(&long(MAX_EVENT - 100), stamp).is_ok());
        assert!(matches!(Guest::new(1).hear(&long(MAX_EVENT), stamp), Err(Malformed::TooLong(_))));
    }

    #[test]
    fn who_subscribes_and_then_publishes_hears_himself_and_in_that_order_only() {
        let mut inn = Inn::new(1);
        inn.says(0, r#"{"type":"publish","topic":"t","event":{"type":"before"}}"#);
        inn.says(0, r#"{"type":"subscribe","topic":"t"}"#);
        inn.says(0, r#"{"type":"publish","topic":"t","event":{"type":"after"}}"#);
        inn.says(0, r#"{"type":"publish","topic":"t","event":{"type":"own"},"localOnly":true}"#);
        let told = &inn.settle()[0];
        assert_eq!(told[0]["type"], "subscribed");
        assert_eq!(types(told), ["own", "after"], "what is local is not in the log");
    }

    #[test]
    fn what_cannot_be_written_waits_and_keeps_its_order() {
        let mut inn = Inn::new(2);
        inn.says(1, r#"{"type":"subscribe","topic":"t"}"#);
        inn.settle();
        inn.is_full = true;
        for number in 0..600 {
            inn.says(0, &format!(r#"{{"type":"publish","topic":"t","event":{{"type":"{number}"}}}}"#));
        }
        assert!(inn.settle()[1].is_empty());
        assert!(inn.guests[0].has_to_retry() && inn.guests[0].is_behind(), "nothing more is read from it");
        inn.is_full = false;
        let mut heard = Vec::new();
        for _ in 0..20 {
            inn.guests[0].retry();
            let told = inn.settle();
            heard.extend(types(&told[1]).into_iter().map(str::to_owned));
        }
        // The topic keeps a hundred, and a subscription that reads on sees the order whatever it misses.
        let numbers: Vec<u32> = heard.iter().map(|number| number.parse().unwrap()).collect();
        assert!(numbers.is_sorted() && numbers.last() == Some(&599), "{numbers:?}");
        assert!(!inn.guests[0].is_behind());
    }

    #[test]
    fn a_group_hands_each_event_to_one_and_goes_on_without_who_leaves() {
        let mut inn = Inn::new(3);
        for guest in [0, 1] {
            inn.says(guest, r#"{"type":"subscribe","topic":"t","group":"g"}"#);
        }
        inn.settle();
        let publish = |inn: &mut Inn| inn.says(2, r#"{"type":"publish","topic":"t","event":{"type":"x"}}"#);
        let mut counts = [0, 0];
        for _ in 0..10 {
            publish(&mut inn);
            let told = inn.settle();
            counts[0] += types(&told[0]).len();
            counts[1] += types(&told[1]).len();
        }
        assert_eq!(counts, [5, 5], "in turn");
        inn.says(0, r#"{"type":"unsubscribe","topic":"t","group":"g"}"#);
        publish(&mut inn);
        let told = inn.settle();
        assert_eq!((&told[0][0]["type"], types(&told[0]).len(), types(&told[1])), (&Value::from("unsubscribed"), 0, vec!["x"]));
    }
}
