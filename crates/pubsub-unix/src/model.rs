//! Random schedules: the real sessions, brokers and journals over simulated links, files and time. Processes are killed and paused,
//! links are cut, and anybody may stand for election at any moment, without the lock that gives order. What must hold all the same
//! is that nothing confirmed is lost, doubled or out of order, and that each repeat to a group has a higher attempt.
//!
//! `PUBSUB_UNIX_SCHEDULES=n` runs so many, `PUBSUB_UNIX_SEED=n` begins with that one; a failure prints its seed.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use bytes::Bytes;

use crate::broker::{Broker, Patience};
use crate::frame;
use crate::journal;
use crate::ledger::{Ledger, Limits};
use crate::protocol::{Answer, FromBroker, Place, Query, Reply, Request, Seat, Settling, ToBroker, What};
use crate::record::{Id, Stored};
use crate::session::{Heard, Session};

const TOPIC: &str = "topic";
const GROUP: &str = "group";
const LIMITS: Limits = Limits { max_events: 1 << 20, max_bytes: 1 << 30 };
const PATIENCE: Patience = Patience { absent: 250, silent: 3000 };

/// What a client keeps with a call.
enum Kept {
    Publish(u64),
    Other,
    /// What is done, by place among the settlements.
    Settled(Vec<Option<u64>>),
}

/// What a client keeps with a question.
enum Wanted {
    Start,
    Read,
}

struct Process {
    session: Session<Kept, Wanted>,
    link: Option<Link>,
    paused_until: u64,
    broker: Option<Office>,
    candidate: Option<Candidate>,
    published: u64,
    to_publish: u64,
    /// Fan-out: where it began, and the offsets it got.
    began: Option<Place>,
    next: Place,
    got: Vec<u64>,
    /// Membership: what it holds, and whether it has a seat.
    is_member: bool,
    joined: bool,
    held: Vec<(Place, u32)>,
    last_epoch: u64,
}

/// A connection as its client sees it.
struct Link {
    broker: u64,
    conn: u64,
    epoch: u64,
}

/// What travels between a client and a broker.
#[derive(Default)]
struct Wire {
    up: VecDeque<Bytes>,
    down: VecDeque<FromBroker>,
}

struct Office {
    number: u64,
    epoch: u64,
    broker: Broker,
    conns: BTreeSet<u64>,
}

/// How far a candidate is: it may be stopped between any two steps.
enum Candidate {
    Claimed(u64),
    Loaded(u64, Box<Ledger>),
    Written(u64, Box<Ledger>),
}

struct World {
    rng: fastrand::Rng,
    now: u64,
    register: u64,
    logs: BTreeMap<u64, Vec<u8>>,
    /// Who has the public name.
    public: Option<u64>,
    processes: Vec<Process>,
    wires: HashMap<u64, Wire>,
    numbers: u64,
    /// Events whose publish was confirmed, by publisher.
    confirmed: BTreeMap<u64, BTreeSet<u64>>,
    /// The attempts at which a member had each event, and those whose settlement was confirmed.
    attempts: HashMap<u64, u32>,
    done: BTreeSet<u64>,
    calm: bool,
    /// Whether writes fail now and then, and publishers therefore wait for each answer, as order is promised to those who do.
    fails: bool,
}

fn event(client: u64, number: u64) -> Stored {
    Stored::text(&format!("{client}:{number}"), b"{}")
}

/// A publish's number is also the event's: a session numbers them in order.
fn author(stored: &Stored) -> (u64, u64) {
    let Id::Text(text) = stored.id() else { panic!("ids here are text") };
    let (client, number) = text.split_once(':').expect("made above");
    (client.parse().expect("made above"), number.parse().expect("made above"))
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            rng: fastrand::Rng::with_seed(seed),
            now: 0,
            register: 0,
            logs: BTreeMap::new(),
            public: None,
            processes: Vec::new(),
            wires: HashMap::new(),
            numbers: 1,
            confirmed: BTreeMap::new(),
            attempts: HashMap::new(),
            done: BTreeSet::new(),
            calm: false,
            fails: seed.is_multiple_of(2),
        };
        for _ in 0..world.rng.usize(2..6) {
            world.spawn();
        }
        world
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn spawn(&mut self) {
        let client = self.number();
        let is_member = self.rng.bool();
        self.processes.push(Process {
            session: Session::new(client),
            link: None,
            paused_until: 0,
            broker: None,
            candidate: None,
            published: 0,
            to_publish: self.rng.u64(0..8),
            began: None,
            next: Place::default(),
            got: Vec::new(),
            is_member,
            joined: false,
            held: Vec::new(),
            last_epoch: 0,
        });
    }

    fn step(&mut self) {
        self.now += self.rng.u64(0..20);
        let at = self.rng.usize(0..self.processes.len());
        if !self.calm {
            match self.rng.u32(0..400) {
                0..4 => return self.kill(at),
                4..10 => self.processes[at].paused_until = self.now + self.rng.u64(1..6000),
                10..16 => return self.cut(at),
                16..20 => self.stand(at),
                _ => {}
            }
        }
        if self.processes[at].paused_until > self.now {
            return;
        }
        match self.rng.u32(0..3) {
            0 => self.serve(at),
            1 => self.elect(at),
            _ => self.client(at),
        }
    }

    fn kill(&mut self, at: usize) {
        let dead = self.processes.swap_remove(at);
        if let Some(link) = dead.link {
            self.wires.get_mut(&link.conn).into_iter().for_each(|wire| wire.down.clear());
        }
        if let Some(office) = dead.broker {
            self.end_of(office);
        }
        self.spawn();
    }

    fn end_of(&mut self, office: Office) {
        // The name stays behind; nobody answers there.
        office.conns.iter().for_each(|conn| drop(self.wires.remove(conn)));
    }

    fn cut(&mut self, at: usize) {
        if let Some(link) = self.processes[at].link.take() {
            self.wires.remove(&link.conn);
        }
    }

    // Elections.

    fn stand(&mut self, at: usize) {
        if self.processes[at].broker.is_none() && self.processes[at].candidate.is_none() {
            self.register += 1;
            self.processes[at].candidate = Some(Candidate::Claimed(self.register));
        }
    }

    fn elect(&mut self, at: usize) {
        let Some(candidate) = self.processes[at].candidate.take() else { return };
        self.processes[at].candidate = match candidate {
            Candidate::Claimed(epoch) => {
                let newest = self.logs.range(..epoch).next_back().map(|(_, log)| log);
                let ledger = newest.map_or_else(|| Ledger::new(7, LIMITS), |log| journal::read(log).expect("it is whole"));
                (self.register == epoch).then(|| Candidate::Loaded(epoch, Box::new(ledger)))
            }
            Candidate::Loaded(epoch, ledger) => {
                self.logs.insert(epoch, journal::begin(&ledger).expect("plain data"));
                Some(Candidate::Written(epoch, ledger))
            }
            Candidate::Written(epoch, ledger) => {
                let number = self.number();
                self.public = Some(number);
                self.logs.retain(|of, _| *of >= epoch);
                let broker = Broker::new(*ledger, PATIENCE, self.now);
                self.processes[at].broker = Some(Office { number, epoch, broker, conns: BTreeSet::new() });
                None
            }
        };
    }

    // Brokers.

    fn serve(&mut self, at: usize) {
        let Some(mut office) = self.processes[at].broker.take() else { return };
        // A broker looks at the register and at its name, and may be stopped between the look and the turn.
        let superseded = self.register != office.epoch || self.public != Some(office.number);
        if superseded && self.rng.bool() {
            return self.end_of(office);
        }
        for conn in office.conns.clone() {
            let Some(wire) = self.wires.get_mut(&conn) else {
                office.conns.remove(&conn);
                office.broker.lost(conn, self.now);
                continue;
            };
            for _ in 0..self.rng.usize(0..6) {
                let Some(body) = wire.up.pop_front() else { break };
                let reply = office.broker.received(conn, body, self.now).expect("it is a frame");
                wire.down.extend(reply);
            }
        }
        let fails = self.fails && !self.calm && self.rng.u32(0..50) == 0;
        let mut log = self.logs.get_mut(&office.epoch);
        let turn = office.broker.turn(self.now, |entries| {
            if fails {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            // A successor removed it: the file is written to all the same, and read by nobody.
            log.iter_mut().for_each(|log| log.extend_from_slice(entries));
            Ok(())
        });
        for (conn, frame) in turn.frames {
            self.wires.get_mut(&conn).into_iter().for_each(|wire| wire.down.push_back(frame.clone()));
        }
        for conn in turn.close {
            office.conns.remove(&conn);
            self.wires.remove(&conn);
        }
        self.processes[at].broker = Some(office);
    }

    // Clients.

    fn client(&mut self, at: usize) {
        if self.processes[at].link.as_ref().is_some_and(|link| !self.wires.contains_key(&link.conn)) {
            self.processes[at].link = None;
        }
        if self.processes[at].link.is_none() {
            return self.dial(at);
        }
        self.listen(at);
        self.act(at);
    }

    fn dial(&mut self, at: usize) {
        let found =
            self.processes.iter().position(|process| process.broker.as_ref().map(|office| office.number) == self.public);
        let Some(found) = found.filter(|_| self.public.is_some()) else { return self.stand(at) };
        let conn = self.number();
        let process = &mut self.processes[at];
        let (session, client) = (process.session.connect(), process.session.client);
        let office = self.processes[found].broker.as_mut().expect("found by it");
        let (number, epoch) = (office.number, office.epoch);
        let Ok(older) = office.broker.connected(conn, client, session, self.now) else { return };
        office.conns.insert(conn);
        older.into_iter().for_each(|older| drop(self.wires.remove(&older)));
        if self.register != epoch {
            self.wires.remove(&conn);
            // Of a broker that nobody else supersedes: a candidate that withdrew left the register ahead.
            if self.rng.u32(0..4) == 0 {
                self.stand(at);
            }
            return;
        }
        let process = &mut self.processes[at];
        assert!(epoch >= process.last_epoch, "an accepted epoch went back");
        process.last_epoch = epoch;
        process.link = Some(Link { broker: number, conn, epoch });
        let mut wire = Wire::default();
        wire.up.extend(process.session.resume().map(|frame| body(&frame)));
        self.wires.insert(conn, wire);
    }

    fn say(&mut self, at: usize, frame: &ToBroker) {
        if let Some(link) = &self.processes[at].link
            && let Some(wire) = self.wires.get_mut(&link.conn)
        {
            wire.up.push_back(body(frame));
        }
    }

    fn listen(&mut self, at: usize) {
        let Some(Link { conn, epoch, broker }) = &self.processes[at].link else { return };
        let (conn, epoch, _) = (*conn, *epoch, *broker);
        let Some(wire) = self.wires.get_mut(&conn) else { return };
        let count = self.rng.usize(0..8).min(wire.down.len());
        let batch: Vec<FromBroker> = wire.down.drain(..count).collect();
        if self.register != epoch {
            return self.cut(at);
        }
        for frame in batch {
            self.heard(at, frame);
        }
    }

    fn heard(&mut self, at: usize, frame: FromBroker) {
        let process = &mut self.processes[at];
        let client = process.session.client;
        match process.session.hear(frame) {
            Heard::Answer(Answer::Published { .. }, _, Kept::Publish(number)) => {
                self.confirmed.entry(client).or_default().insert(number);
            }
            Heard::Answer(Answer::Failed(_), request, kept) => {
                // Said again, under another number, but for publishes: those are given up.
                if !matches!(kept, Kept::Publish(_)) {
                    let frame = process.session.call(request, kept);
                    self.say(at, &frame);
                }
            }
            Heard::Answer(Answer::Settled(late), _, Kept::Settled(done)) => {
                let in_time = (0..).zip(done).filter(|(place, _)| !late.contains(place));
                self.done.extend(in_time.filter_map(|(_, offset)| offset));
            }
            Heard::Answer(Answer::Joined(_), ..) => process.joined = true,
            Heard::Reply(_, Reply::Start(place), Wanted::Start) => {
                process.next = place.expect("from the latest");
                process.began = Some(process.next);
            }
            Heard::Reply(_, Reply::Stretch(stretch), Wanted::Read) => {
                assert_eq!(stretch.lagged, 0, "nothing is lost to a bound here");
                process.got.extend(stretch.offsets.iter());
                process.next = stretch.next;
            }
            Heard::Taken { handed: None, .. } => {
                (process.joined, process.held) = (false, Vec::new());
            }
            Heard::Taken { generation, handed: Some(handed), .. } => {
                for handed in handed {
                    let before = self.attempts.insert(handed.offset, handed.attempt).unwrap_or(0);
                    assert!(handed.attempt > before, "{} again at attempt {}", handed.offset, handed.attempt);
                    assert!(!self.done.contains(&handed.offset), "{} again although it is done", handed.offset);
                    process.held.push((Place { generation, offset: handed.offset }, handed.attempt));
                }
            }
            Heard::Ping => self.say(at, &ToBroker::Ping),
            Heard::Answer(..) | Heard::Reply(..) | Heard::Nothing => {}
        }
    }

    /// What an application does: publishes, reads, takes, settles.
    fn act(&mut self, at: usize) {
        let choice = self.rng.u32(0..6);
        let retries = !self.calm && self.rng.u32(0..4) == 0;
        let one_by_one = self.fails;
        let process = &mut self.processes[at];
        let client = process.session.client;
        let seat = || Seat { topic: TOPIC.into(), group: GROUP.into(), member: client };
        let frame = match choice {
            0 | 1 if process.published < process.to_publish && (!one_by_one || process.session.unanswered() == 0) => {
                process.published += 1;
                let request = Request::publish_one(TOPIC.into(), event(client, process.published));
                Some(process.session.call(request, Kept::Publish(process.published)))
            }
            2 | 3 if process.is_member => {
                if process.joined {
                    process.session.take(seat(), 1 + u32::try_from(client % 3).unwrap_or(0))
                } else if process.session.unanswered() == 0 {
                    let join = Request::Join { seat: seat(), begin: None, or_earliest: true };
                    Some(process.session.call(join, Kept::Other))
                } else {
                    None
                }
            }
            4 if !process.held.is_empty() => {
                // One, or as many as there are.
                let count = if retries { process.held.len() } else { 1 };
                let generation = process.held[0].0.generation;
                let what = |at: usize| if retries && at.is_multiple_of(2) { What::Retry(30) } else { What::Done };
                let (mut settled, mut done) = (Vec::new(), Vec::new());
                for (at, (place, attempt)) in process.held.drain(..count).enumerate() {
                    let (offset, what) = (place.offset, what(at));
                    done.push((what == What::Done).then_some(offset));
                    settled.push(Settling { offset, attempt, what });
                }
                Some(process.session.call(Request::Settle { seat: seat(), generation, settled }, Kept::Settled(done)))
            }
            _ if !process.is_member && process.session.asking() == 0 => {
                let topic = TOPIC.into();
                let (query, wanted) = match process.began {
                    None => {
                        let begin = crate::protocol::Begin::Latest;
                        (Query::Start { topic, begin, or_earliest: true }, Wanted::Start)
                    }
                    Some(_) => (Query::Read { topic, from: process.next, most: 3 }, Wanted::Read),
                };
                Some(process.session.ask(query, wanted).1)
            }
            _ => None,
        };
        frame.into_iter().for_each(|frame| self.say(at, &frame));
    }

    // What must hold.

    /// Ends the disturbances, lets everything come to rest, and judges.
    fn judge(mut self) {
        self.calm = true;
        self.processes.iter_mut().for_each(|process| process.paused_until = 0);
        if !self.processes.iter().any(|process| process.is_member) {
            self.processes[0].is_member = true;
        }
        for _ in 0..60_000 {
            self.step();
            if self.is_at_rest() {
                break;
            }
        }
        assert!(self.is_at_rest(), "it never came to rest");
        let log = self.log();
        for (client, numbers) in &self.confirmed {
            let kept: Vec<u64> = log.iter().filter(|(of, _)| of == client).map(|(_, number)| *number).collect();
            assert!(kept.is_sorted_by(|a, b| a < b), "events of {client} are doubled or out of order: {kept:?}");
            numbers
                .iter()
                .for_each(|number| assert!(kept.contains(number), "event {client}:{number} was confirmed and is lost"));
        }
        for process in self.processes.iter().filter(|process| !process.is_member) {
            let from = process.began.map_or(log.len() as u64, |place| place.offset);
            let expected: Vec<u64> = (from..log.len() as u64).collect();
            assert_eq!(process.got, expected, "what {} got", process.session.client);
        }
        let handled = (0..log.len() as u64).filter(|offset| self.attempts.contains_key(offset)).count();
        assert_eq!(handled, log.len(), "the group had every event");
    }

    fn office(&self) -> Option<&Office> {
        self.processes.iter().filter_map(|process| process.broker.as_ref()).find(|office| office.epoch == self.register)
    }

    fn log(&self) -> Vec<(u64, u64)> {
        let all = Query::Read { topic: TOPIC.into(), from: Place::default(), most: u32::MAX };
        match self.office().and_then(|office| office.broker.ledger().ask(&all, 0)) {
            Some(Reply::Stretch(stretch)) => stretch.events.iter().map(|stored| author(&stored)).collect(),
            _ => Vec::new(),
        }
    }

    fn is_at_rest(&self) -> bool {
        let Some(office) = self.office() else { return false };
        let idle = Query::Idle { topic: TOPIC.into(), group: GROUP.into() };
        let log = self.log().len();
        office.broker.ledger().ask(&idle, 0).is_some()
            && self.processes.iter().all(|process| {
                let quiet = process.session.unanswered() == 0 && process.published == process.to_publish;
                let read =
                    process.is_member || process.began.is_some_and(|began| began.offset as usize + process.got.len() >= log);
                quiet && read && process.held.is_empty() && (process.joined || !process.is_member)
            })
    }
}

fn body(frame: &ToBroker) -> Bytes {
    let mut bytes = Vec::new();
    frame::encode(frame, &mut bytes).expect("it is short");
    Bytes::from(bytes).slice(frame::HEADER..)
}

#[test]
fn nothing_confirmed_is_lost_doubled_or_out_of_order() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("PUBSUB_UNIX_SEED").unwrap_or(1);
    for seed in first..first + number("PUBSUB_UNIX_SCHEDULES").unwrap_or(1000) {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..world.rng.usize(200..3000) {
                world.step();
            }
            world.judge();
        });
        assert!(run.is_ok(), "PUBSUB_UNIX_SEED={seed} PUBSUB_UNIX_SCHEDULES=1");
    }
}
