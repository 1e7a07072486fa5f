//! What stands between an instance and a broker that is a TypeScript peer.
//!
//! Such a broker gives each event out once, and forgets it: it keeps no log, counts no attempts, and confirms nothing. So an instance
//! under it keeps for itself what it was given, in a ledger of its own in memory, and the broker over that ledger does for its
//! subscriptions what a broker of ours does for everybody's: it queues, counts attempts, waits for back-offs, and answers. What is
//! published goes out as lines.
//!
//! A publish counts as taken when the broker has answered something that was said after it. What a topic's group is given is kept apart
//! from what its fan-out subscriptions are given, as a topic with both names.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use foldhash::{HashMap, HashMapExt};
use smol_str::{SmolStr, format_smolstr};

use super::lines::{Said, carry, delivered, membership, offered, understand};
use crate::broker::{Broker, ConnId, Patience};
use crate::frame::{self, Malformed};
use crate::ledger::{Ledger, Limits};
use crate::protocol::{Answer, Call, ClientId, FromBroker, GroupState, Offsets, Query, Reply, Request, Seat, ToBroker, What};
use crate::record::Run;

/// The topic that is subscribed to again and again, because a broker answers that, and nothing else.
pub(crate) const PROBE: &str = "pubsub.probe";

/// What the broker answers has come of something.
enum Awaited {
    /// A publish.
    Publish(u64),
    /// This can be said to the broker within.
    Say(ToBroker),
}

/// A membership at the broker: a topic, and a group unless it is fan-out.
#[derive(Default)]
struct Membership {
    /// What is to be said to the broker within once the membership is confirmed; none when it is.
    waiting: Option<Vec<ToBroker>>,
    /// The members here that it is for.
    members: Vec<u64>,
}

pub(crate) struct Host {
    within: Broker,
    client: ClientId,
    conn: ConnId,
    memberships: BTreeMap<(SmolStr, Option<SmolStr>), Membership>,
    /// What was said since the last probe, and what was said before each probe that was not answered.
    said: Vec<Awaited>,
    probes: VecDeque<Vec<Awaited>>,
    /// Questions about a topic whose groups have to be put together.
    inspected: HashMap<u64, SmolStr>,
    frames: Vec<FromBroker>,
    lines: Vec<u8>,
}

/// Where what a group is given is kept.
fn of_group(topic: &str, group: &str) -> SmolStr {
    format_smolstr!("{topic}\0{group}") // no name has such a character
}

fn within(mut seat: Seat) -> Seat {
    seat.topic = of_group(&seat.topic, &seat.group);
    seat
}

impl Host {
    pub(crate) fn new(client: ClientId, limits: Limits, patience: Patience, clock: u64) -> Self {
        Self {
            within: Broker::new(Ledger::foreign(limits), patience, clock),
            client,
            conn: 0,
            memberships: BTreeMap::new(),
            said: Vec::new(),
            probes: VecDeque::new(),
            inspected: HashMap::new(),
            frames: Vec::new(),
            lines: Vec::new(),
        }
    }

    /// A connection to a broker was made, in this session of the client's. What was said and not answered the client says again.
    pub(crate) fn connected(&mut self, session: u64, clock: u64) {
        self.conn = session;
        // Sessions only grow, so it is not refused.
        let _ = self.within.connected(session, self.client, session, clock);
        (self.said, self.probes, self.frames, self.lines) = Default::default();
        self.memberships.retain(|_, membership| {
            membership.waiting = Some(Vec::new());
            !membership.members.is_empty()
        });
        for (topic, group) in self.memberships.keys() {
            membership("subscribe", topic, group.as_deref(), &mut self.lines);
        }
    }

    /// The client said something.
    ///
    /// # Errors
    /// If it is no frame.
    pub(crate) fn hear(&mut self, body: &Bytes, clock: u64) -> Result<(), Malformed> {
        match frame::body(body)? {
            ToBroker::Call(call) => self.call(call, clock),
            ToBroker::Take(mut take) => {
                take.seat = within(take.seat);
                self.say(&ToBroker::Take(take), clock);
            }
            ToBroker::Ask { id, query } => self.ask(id, query, clock),
            // It ends with its connection.
            ToBroker::Bye => {}
            ToBroker::Cancel { id } => {
                self.inspected.remove(&id);
                self.say(&ToBroker::Cancel { id }, clock);
            }
            ToBroker::Ping => self.say(&ToBroker::Ping, clock),
        }
        Ok(())
    }

    fn say(&mut self, frame: &ToBroker, clock: u64) {
        let mut bytes = Vec::new();
        frame::encode(frame, &mut bytes).expect("it came in a frame, or is short");
        let body = Bytes::from(bytes).slice(frame::HEADER..);
        let reply = self.within.received(self.conn, body, clock).expect("it was written above");
        self.frames.extend(reply);
    }

    fn call(&mut self, call: Call, clock: u64) {
        let Call { number, below, request } = call;
        let answer = |answer| FromBroker::Answer { number, answer };
        let request = match request {
            Request::Publish { topic, events, .. } => {
                let offered: Option<Vec<_>> = events.iter().map(|event| offered(&topic, &event)).collect();
                match offered {
                    Some(events) => {
                        events.iter().for_each(|event| carry("publish", &topic, None, event, &mut self.lines));
                        self.said.push(Awaited::Publish(number));
                    }
                    None => self
                        .frames
                        .push(answer(Answer::Failed("it is too long, or nested too deeply, to be told in lines".into()))),
                }
                return;
            }
            // Fan-out: what a topic is followed for.
            Request::Leave { seat, .. } if seat.group.is_empty() => {
                self.leave(&seat.topic, None, seat.member);
                self.frames.push(answer(Answer::Done));
                return;
            }
            Request::Join { seat, begin, or_earliest } => {
                let call = |seat| ToBroker::Call(Call { number, below, request: Request::Join { seat, begin, or_earliest } });
                let (topic, group, member) = (seat.topic.clone(), seat.group.clone(), seat.member);
                return self.join(topic, Some(group), member, call(within(seat)), clock);
            }
            Request::Leave { seat, heard } => {
                self.leave(&seat.topic, Some(&seat.group), seat.member);
                Request::Leave { seat: within(seat), heard }
            }
            Request::Settle { seat, generation, mut settled } => {
                let mut letters = false;
                for settling in &mut settled {
                    if let What::Bury(letter) = &mut settling.what
                        && let Some((topic, letter)) = letter.take()
                        && let Some(event) = offered(&topic, &letter)
                    {
                        carry("publish", &topic, None, &event, &mut self.lines);
                        letters = true;
                    }
                }
                let request = Request::Settle { seat: within(seat), generation, settled };
                if letters {
                    self.said.push(Awaited::Say(ToBroker::Call(Call { number, below, request })));
                    return;
                }
                request
            }
            Request::Clear { .. } | Request::Trim { .. } | Request::Lease { .. } => {
                self.frames.push(answer(Answer::Failed("the broker is a TypeScript peer, which keeps nothing".into())));
                return;
            }
        };
        self.say(&ToBroker::Call(Call { number, below, request }), clock);
    }

    fn ask(&mut self, id: u64, query: Query, clock: u64) {
        let query = match query {
            Query::Start { topic, begin, or_earliest } => {
                // There from now on, so that its place is of a generation of this ledger.
                self.within.take_in(&topic, &Run::default());
                let start = ToBroker::Ask { id, query: Query::Start { topic: topic.clone(), begin, or_earliest } };
                return self.join(topic, None, 0, start, clock);
            }
            Query::Idle { topic, group } => Query::Idle { topic: of_group(&topic, &group), group },
            Query::Seated { client, seat } => Query::Seated { client, seat: within(seat) },
            Query::Status { topic } => {
                self.inspected.insert(id, topic.clone());
                Query::Status { topic }
            }
            Query::Page { .. } | Query::Holder { .. } | Query::Read { .. } => query,
        };
        self.say(&ToBroker::Ask { id, query }, clock);
    }

    /// Says something within once the broker has confirmed a membership, which is asked for if there is none.
    fn join(&mut self, topic: SmolStr, group: Option<SmolStr>, member: u64, then: ToBroker, clock: u64) {
        let key = (topic, group);
        let known = self.memberships.contains_key(&key);
        if !known {
            membership("subscribe", &key.0, key.1.as_deref(), &mut self.lines);
        }
        let new = || Membership { waiting: Some(Vec::new()), members: Vec::new() };
        let membership = self.memberships.entry(key).or_insert_with(new);
        if !membership.members.contains(&member) {
            membership.members.push(member);
        }
        match &mut membership.waiting {
            Some(waiting) => waiting.push(then),
            None => self.say(&then, clock),
        }
    }

    fn leave(&mut self, topic: &SmolStr, group: Option<&SmolStr>, member: u64) {
        let key = (topic.clone(), group.cloned());
        let Some(membership) = self.memberships.get_mut(&key) else { return };
        membership.members.retain(|other| *other != member);
        if membership.members.is_empty() {
            self.memberships.remove(&key);
            super::lines::membership("unsubscribe", topic, group.map(SmolStr::as_str), &mut self.lines);
        }
    }

    /// The broker said something.
    pub(crate) fn told(&mut self, line: &Bytes, clock: u64) {
        match understand(line) {
            Some(Said::Subscribed(topic, None)) if topic == PROBE => {
                for awaited in self.probes.pop_front().unwrap_or_default() {
                    match awaited {
                        Awaited::Publish(number) => {
                            let answer =
                                Answer::Published { bus: SmolStr::default(), generation: 0, offsets: Offsets::default() };
                            self.frames.push(FromBroker::Answer { number, answer });
                        }
                        Awaited::Say(frame) => self.say(&frame, clock),
                    }
                }
            }
            Some(Said::Subscribed(topic, group)) => {
                let membership = self.memberships.get_mut(&(topic, group));
                let waiting = membership.and_then(|membership| membership.waiting.take()).unwrap_or_default();
                waiting.iter().for_each(|frame| self.say(frame, clock));
            }
            Some(Said::Event(topic, group, event)) => {
                let Some(stored) = delivered(&topic, &event) else {
                    tracing::warn!(%topic, "what is no event is passed over");
                    return;
                };
                let kept = group.map_or_else(|| topic.clone(), |group| of_group(&topic, &group));
                self.within.take_in(&kept, &Run::from_iter([stored]));
            }
            Some(Said::Unsubscribed | Said::Subscribe(..) | Said::Unsubscribe(..) | Said::Publish(..)) | None => {}
        }
    }

    /// What has come of it all, for the client, and when to ask again.
    pub(crate) fn turn(&mut self, clock: u64) -> (Vec<FromBroker>, u64) {
        let turn = self.within.turn(clock, |_| Ok(()));
        let mut frames = std::mem::take(&mut self.frames);
        frames.extend(turn.frames.into_iter().map(|(_, frame)| frame));
        for frame in &mut frames {
            if let FromBroker::Reply { id, reply: Reply::Status { retained, groups } } = frame
                && let Some(topic) = self.inspected.remove(id)
            {
                (*retained, *groups) = (0, self.groups_of(&topic, clock));
            }
        }
        (frames, turn.next)
    }

    /// The groups of a topic that have members here.
    fn groups_of(&self, topic: &SmolStr, clock: u64) -> Vec<GroupState> {
        let own = self.memberships.keys().filter(|(of, _)| of == topic).filter_map(|(_, group)| group.as_ref());
        let states = own.filter_map(|group| {
            let query = Query::Status { topic: of_group(topic, group) };
            match self.within.ledger().ask(&query, clock) {
                Some(Reply::Status { groups, .. }) => groups.into_iter().find(|state| state.group == *group),
                _ => None,
            }
        });
        states.collect()
    }

    /// What is to be written to the broker.
    pub(crate) fn lines(&mut self) -> Vec<u8> {
        if !self.said.is_empty() {
            membership("subscribe", PROBE, None, &mut self.lines);
            self.probes.push_back(std::mem::take(&mut self.said));
        }
        std::mem::take(&mut self.lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Begin, Place};
    use crate::record::Stored;

    fn said(host: &mut Host, frame: &ToBroker) {
        let mut bytes = Vec::new();
        frame::encode(frame, &mut bytes).unwrap();
        host.hear(&Bytes::from(bytes).slice(frame::HEADER..), 1).unwrap();
    }

    fn lines(host: &mut Host) -> Vec<String> {
        let lines = String::from_utf8(host.lines()).unwrap();
        lines.lines().map(str::to_owned).collect()
    }

    fn host() -> Host {
        let limits = Limits { max_events: 10, max_bytes: 1 << 20 };
        let mut host = Host::new(5, limits, Patience { absent: 250, silent: 10_000 }, 0);
        host.connected(1, 0);
        host
    }

    fn publish(number: u64) -> ToBroker {
        let event = Stored::text("e", br#"{"type":"x","id":"e","createdAt":"1970-01-01T00:00:00.000Z"}"#);
        ToBroker::Call(Call { number, below: 1, request: Request::publish_one("t".into(), event) })
    }

    fn start(id: u64) -> ToBroker {
        ToBroker::Ask { id, query: Query::Start { topic: "t".into(), begin: Begin::Latest, or_earliest: true } }
    }

    #[test]
    fn a_publish_is_taken_when_the_broker_answers_what_was_said_after_it() {
        let mut host = host();
        said(&mut host, &publish(1));
        said(&mut host, &publish(2));
        let written = lines(&mut host);
        assert_eq!(written.len(), 3);
        assert_eq!(written[2], r#"{"type":"subscribe","topic":"pubsub.probe"}"#);
        assert!(host.turn(2).0.is_empty(), "nothing is known yet");
        host.told(&Bytes::from_static(br#"{"type":"subscribed","topic":"pubsub.probe"}"#), 2);
        let answered = host.turn(3).0;
        assert!(
            matches!(answered[..], [FromBroker::Answer { number: 1, .. }, FromBroker::Answer { number: 2, .. }]),
            "{answered:?}"
        );
        // What was not answered when the connection broke is not answered by the next one.
        said(&mut host, &publish(3));
        lines(&mut host);
        host.connected(2, 3);
        host.told(&Bytes::from_static(br#"{"type":"subscribed","topic":"pubsub.probe"}"#), 4);
        assert!(host.turn(5).0.is_empty());
    }

    #[test]
    fn a_subscription_begins_when_the_broker_says_so_and_is_made_again_on_each_connection() {
        let mut host = host();
        said(&mut host, &start(7));
        assert_eq!(lines(&mut host), [r#"{"type":"subscribe","topic":"t"}"#]);
        assert!(host.turn(2).0.is_empty());
        host.told(&Bytes::from_static(br#"{"type":"subscribed","topic":"t"}"#), 2);
        let answered = host.turn(3).0;
        let [FromBroker::Reply { id: 7, reply: Reply::Start(Ok(place)) }] = answered[..] else { panic!("{answered:?}") };
        assert!(place.is_foreign());
        host.connected(2, 3);
        assert_eq!(lines(&mut host), [r#"{"type":"subscribe","topic":"t"}"#]);
        let read = ToBroker::Ask { id: 8, query: Query::Read { topic: "t".into(), from: place, most: 9 } };
        said(&mut host, &read);
        let event = br#"{"type":"event","topic":"t","event":{"type":"x","id":"1","createdAt":{"__m_codec__":"Date","v":"2026-01-02T03:04:05.006Z"}}}"#;
        host.told(&Bytes::from_static(event), 4);
        let answered = host.turn(5).0;
        assert!(
            matches!(&answered[..], [FromBroker::Reply { id: 8, reply: Reply::Stretch(stretch) }] if stretch.offsets.len() == 1)
        );
        // The last who followed has gone.
        let seat = Seat { topic: "t".into(), group: SmolStr::default(), member: 0 };
        said(&mut host, &ToBroker::Call(Call { number: 9, below: 9, request: Request::Leave { seat, heard: 0 } }));
        assert_eq!(lines(&mut host), [r#"{"type":"unsubscribe","topic":"t"}"#]);
        assert_ne!(place, Place::default());
    }
}
