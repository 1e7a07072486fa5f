//! The broker: who is connected, who waits for what, and in which order things happen. It knows no socket, no file and no clock.
//!
//! What comes in during a turn is gathered. [`turn`](Broker::turn) then writes the changes to the log, all in one piece, and only when
//! they are written carries them out and says what is to be sent. So nothing is confirmed or handed over that a successor could not
//! read; and if the log cannot be written nothing has happened, and the callers are told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;

use bytes::Bytes;
use foldhash::{HashMap, HashMapExt};
use smol_str::SmolStr;

use crate::frame::{self, Malformed};
use crate::journal::entry;
use crate::ledger::{Effect, Ledger};
use crate::protocol::{Answer, Call, ClientId, FromBroker, Query, Take, ToBroker};
use crate::record::Run;

/// A connection, numbered by whoever keeps it.
pub(crate) type ConnId = u64;

/// How long a connection may be silent before it is asked whether it lives, in milliseconds.
pub(crate) const PING: u64 = 1000;

/// How many reads one connection may have waiting: a subscription has one at a time.
const MAX_READS: usize = 1 << 17;

/// Bodies that are shorter are copied out of what they were read in, which their events would keep whole.
const COPIED: usize = 32 << 10;

/// The patience of a broker, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// With a client whose connection ended, before what it holds goes to others.
    pub(crate) absent: u64,
    /// With a client that answers nothing.
    pub(crate) silent: u64,
}

pub(crate) struct Broker {
    ledger: Ledger,
    patience: Patience,
    /// What is added to the clock: the ledger's time goes on where the last broker's ended, also after the host was started anew.
    skew: u64,
    peers: HashMap<ConnId, Peer>,
    clients: HashMap<ClientId, Client>,
    /// Clients without a connection, by when they count as gone.
    absent: BTreeSet<(u64, ClientId)>,
    /// Changes to be written in this turn, as they came.
    changes: Vec<(ClientId, ToBroker, Bytes)>,
    asked: Vec<(ConnId, u64, Query)>,
    reads: HashMap<SmolStr, Vec<Waiting>>,
    takes: HashMap<SmolStr, BTreeMap<SmolStr, Takes>>,
    /// Takes to be looked at in this turn, besides those of topics that changed.
    look: BTreeSet<SmolStr>,
    /// When to look at a topic's takes although nothing happened.
    dues: BTreeSet<(u64, SmolStr)>,
    ping_at: u64,
}

/// The takes of a group's members, in the order they came, each with its frame's body.
type Takes = VecDeque<(ClientId, Take, Bytes)>;

struct Peer {
    client: ClientId,
    heard: u64,
    reads: usize,
}

struct Client {
    /// Its newest session: what comes from an older one is not heard.
    session: u64,
    conn: Option<ConnId>,
    /// When it counts as gone.
    until: u64,
}

struct Waiting {
    conn: ConnId,
    id: u64,
    query: Query,
}

/// What a turn came to.
#[derive(Default)]
pub(crate) struct Turn {
    pub(crate) frames: Vec<(ConnId, FromBroker)>,
    /// Connections to be closed.
    pub(crate) close: Vec<ConnId>,
    /// When there is to be another turn although nothing comes in, on the caller's clock.
    pub(crate) next: u64,
}

impl Broker {
    /// A broker over what its predecessor left. Everybody is given time to come back.
    pub(crate) fn new(mut ledger: Ledger, patience: Patience, clock: u64) -> Self {
        ledger.begin_term();
        let skew = ledger.now.saturating_sub(clock);
        let until = clock + skew + patience.absent;
        let clients = ledger.clients();
        let absent = clients.iter().map(|client| (until, *client)).collect();
        let clients = clients.into_iter().map(|client| (client, Client { session: 0, conn: None, until })).collect();
        Self {
            ledger,
            patience,
            skew,
            peers: HashMap::new(),
            clients,
            absent,
            changes: Vec::new(),
            asked: Vec::new(),
            reads: HashMap::new(),
            takes: HashMap::new(),
            look: BTreeSet::new(),
            dues: BTreeSet::new(),
            ping_at: 0,
        }
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Takes in events that another broker has given out.
    pub(crate) fn take_in(&mut self, topic: &SmolStr, events: &Run) {
        self.ledger.take_in(topic, events);
    }

    /// Whether something came in that a turn is to be made for.
    pub(crate) fn is_busy(&self) -> bool {
        !self.changes.is_empty() || !self.asked.is_empty() || !self.look.is_empty()
    }

    /// A client has said hello. Returns its older connection, which is to be closed, or refuses the newcomer if it is the older.
    pub(crate) fn connected(&mut self, conn: ConnId, client: ClientId, session: u64, clock: u64) -> Result<Option<ConnId>, ()> {
        let known = self.clients.entry(client).or_insert(Client { session: 0, conn: None, until: 0 });
        if session <= known.session {
            return Err(());
        }
        known.session = session;
        let older = known.conn.replace(conn);
        self.absent.remove(&(known.until, client));
        self.peers.insert(conn, Peer { client, heard: clock, reads: 0 });
        if let Some(older) = older {
            self.forget_peer(older);
        }
        Ok(older)
    }

    /// A connection is gone.
    pub(crate) fn lost(&mut self, conn: ConnId, clock: u64) {
        let Some(client) = self.forget_peer(conn) else { return };
        let Some(known) = self.clients.get_mut(&client).filter(|known| known.conn == Some(conn)) else { return };
        known.conn = None;
        known.until = clock + self.skew + self.patience.absent;
        self.absent.insert((known.until, client));
    }

    fn forget_peer(&mut self, conn: ConnId) -> Option<ClientId> {
        let peer = self.peers.remove(&conn)?;
        self.asked.retain(|(of, ..)| *of != conn);
        if peer.reads > 0 {
            self.reads.retain(|_, waiting| {
                waiting.retain(|waiting| waiting.conn != conn);
                !waiting.is_empty()
            });
        }
        // Its client says again what it still wants; nothing is to be handed to somebody who is not there.
        self.takes.retain(|_, groups| {
            groups.retain(|_, takes| {
                takes.retain(|(client, ..)| *client != peer.client);
                !takes.is_empty()
            });
            !groups.is_empty()
        });
        Some(peer.client)
    }

    /// A frame came.
    ///
    /// # Errors
    /// If it is none: the connection is to be closed.
    pub(crate) fn received(&mut self, conn: ConnId, body: Bytes, clock: u64) -> Result<Option<FromBroker>, Malformed> {
        let body = if body.len() < COPIED { Bytes::copy_from_slice(&body) } else { body };
        let frame: ToBroker = frame::body(&body)?;
        let Some(peer) = self.peers.get_mut(&conn) else { return Ok(None) };
        peer.heard = clock;
        match frame {
            ToBroker::Ping => return Ok(Some(FromBroker::Pong)),
            ToBroker::Ask { id, query } => self.asked.push((conn, id, query)),
            ToBroker::Cancel { id } => self.cancel(conn, id),
            ToBroker::Take(take) => {
                self.look.insert(take.seat.topic.clone());
                let groups = self.takes.entry(take.seat.topic.clone()).or_default();
                let takes = groups.entry(take.seat.group.clone()).or_default();
                // One for each member: a newer one takes the place of what it had asked before.
                let client = peer.client;
                takes.retain(|(of, other, _)| (*of, other.seat.member) != (client, take.seat.member));
                takes.push_back((client, take, body));
            }
            change @ (ToBroker::Call(_) | ToBroker::Bye) => self.changes.push((peer.client, change, body)),
        }
        Ok(None)
    }

    fn cancel(&mut self, conn: ConnId, id: u64) {
        self.asked.retain(|(of, other, _)| (*of, *other) != (conn, id));
        let before = |waiting: &mut Vec<Waiting>| {
            waiting.retain(|waiting| (waiting.conn, waiting.id) != (conn, id));
            !waiting.is_empty()
        };
        self.reads.retain(|_, waiting| before(waiting));
    }

    /// Does all that is to be done now.
    pub(crate) fn turn(&mut self, clock: u64, mut write: impl FnMut(&[u8]) -> io::Result<()>) -> Turn {
        let (now, mut turn) = (clock + self.skew, Turn::default());
        self.give_up_on_the_absent(clock, &mut turn);
        self.make_changes(now, &mut turn, &mut write);
        self.answer_asks(now, &mut turn);
        self.hand_over(now, &mut turn, &mut write);
        let due = self.dues.first().map(|(due, _)| *due).into_iter().chain(self.absent.first().map(|(until, _)| *until));
        turn.next = due.map(|due| due.saturating_sub(self.skew)).chain([self.ping_at]).min().unwrap_or(self.ping_at);
        turn
    }

    /// Clients that stayed away leave their seats; those that are silent are asked, and in the end cut off.
    fn give_up_on_the_absent(&mut self, clock: u64, turn: &mut Turn) {
        if self.ping_at > 0 && clock >= self.ping_at + PING {
            self.was_stopped(clock);
        }
        if clock >= self.ping_at {
            let silent = |peer: &Peer| clock.saturating_sub(peer.heard);
            let hung: Vec<ConnId> =
                self.peers.iter().filter(|(_, peer)| silent(peer) >= self.patience.silent).map(|(conn, _)| *conn).collect();
            for conn in hung {
                turn.close.push(conn);
                self.lost(conn, clock.saturating_sub(self.patience.absent)); // it had its time
            }
            let asked = self.peers.iter().filter(|(_, peer)| silent(peer) >= PING);
            turn.frames.extend(asked.map(|(conn, _)| (*conn, FromBroker::Ping)));
            self.ping_at = clock + PING;
        }
        while let Some((until, client)) = self.absent.first().copied()
            && until <= clock + self.skew
        {
            self.absent.remove(&(until, client));
            self.clients.remove(&client);
            let mut bye = Vec::new();
            frame::encode(&ToBroker::Bye, &mut bye).expect("it is short");
            self.changes.push((client, ToBroker::Bye, Bytes::from(bye).slice(frame::HEADER..)));
        }
    }

    /// No turn was made for so long that nobody could be heard: it counts against nobody.
    fn was_stopped(&mut self, clock: u64) {
        self.peers.values_mut().for_each(|peer| peer.heard = clock);
        let until = clock + self.skew + self.patience.absent;
        for (_, client) in std::mem::take(&mut self.absent) {
            if let Some(known) = self.clients.get_mut(&client) {
                known.until = until;
                self.absent.insert((until, client));
            }
        }
    }

    fn make_changes(&mut self, now: u64, turn: &mut Turn, write: &mut impl FnMut(&[u8]) -> io::Result<()>) {
        let mut changes = std::mem::take(&mut self.changes);
        let mut entries = Vec::new();
        // What was carried out already, or cannot be, is not written.
        changes.retain(|(client, change, body)| {
            if let ToBroker::Call(Call { number, request, .. }) = change {
                let answered = self.ledger.answered(*client, *number);
                if answered.is_none() && self.ledger.refuses(request) {
                    self.reply(*client, FromBroker::Answer { number: *number, answer: Answer::Full }, turn);
                    return false;
                }
                if let Some(answer) = answered {
                    self.reply(*client, FromBroker::Answer { number: *number, answer }, turn);
                    return false;
                }
            }
            entry(now, *client, body, &mut entries);
            true
        });
        if changes.is_empty() {
            return;
        }
        if let Err(error) = write(&entries) {
            tracing::error!(%error, "the log cannot be written; what was asked for is refused");
            for (client, change, body) in changes {
                match change {
                    ToBroker::Call(Call { number, .. }) => {
                        let answer = Answer::Failed(error.to_string());
                        self.reply(client, FromBroker::Answer { number, answer }, turn);
                    }
                    bye => self.changes.push((client, bye, body)), // until it can be written
                }
            }
            return;
        }
        for (client, change, _) in changes {
            if let Effect::Answer(number, answer) = self.ledger.apply(now, client, &change) {
                self.reply(client, FromBroker::Answer { number, answer }, turn);
            }
        }
    }

    fn reply(&self, client: ClientId, frame: FromBroker, turn: &mut Turn) {
        if let Some(conn) = self.clients.get(&client).and_then(|client| client.conn) {
            turn.frames.push((conn, frame));
        }
    }

    fn answer_asks(&mut self, now: u64, turn: &mut Turn) {
        for (conn, id, query) in std::mem::take(&mut self.asked) {
            self.answer_or_wait(Waiting { conn, id, query }, now, turn);
        }
        for topic in self.ledger.take_dirty() {
            if self.takes.contains_key(&topic) {
                self.look.insert(topic.clone());
            }
            for waiting in self.reads.remove(&topic).unwrap_or_default() {
                if let Some(peer) = self.peers.get_mut(&waiting.conn) {
                    peer.reads -= 1;
                }
                self.answer_or_wait(waiting, now, turn);
            }
        }
    }

    fn answer_or_wait(&mut self, waiting: Waiting, now: u64, turn: &mut Turn) {
        let Some(peer) = self.peers.get_mut(&waiting.conn) else { return };
        match (self.ledger.ask(&waiting.query, now), &waiting.query) {
            (Some(reply), _) => turn.frames.push((waiting.conn, FromBroker::Reply { id: waiting.id, reply })),
            (None, Query::Read { topic, .. } | Query::Idle { topic, .. }) => {
                peer.reads += 1;
                if peer.reads > MAX_READS {
                    turn.close.push(waiting.conn);
                }
                self.reads.entry(topic.clone()).or_default().push(waiting);
            }
            (None, _) => {}
        }
    }

    /// Hands deliveries to members that asked: written first, like every change.
    fn hand_over(&mut self, now: u64, turn: &mut Turn, write: &mut impl FnMut(&[u8]) -> io::Result<()>) {
        while let Some((due, topic)) = self.dues.first().cloned()
            && due <= now
        {
            self.dues.remove(&(due, topic.clone()));
            self.look.insert(topic);
        }
        let looked = std::mem::take(&mut self.look);
        let mut chosen: Vec<(ClientId, Take, Bytes)> = Vec::new();
        for topic in &looked {
            for (group, takes) in self.takes.get_mut(topic).into_iter().flatten() {
                choose(&self.ledger, topic, group, takes, now, &mut chosen);
            }
        }
        let mut entries = Vec::new();
        for (client, take, body) in &chosen {
            if !self.ledger.is_answered(*client, take) {
                entry(now, *client, body, &mut entries);
            }
        }
        if entries.is_empty() || write(&entries).is_ok() {
            for (client, take, _) in chosen {
                let effect = self.ledger.apply(now, client, &ToBroker::Take(take));
                let Effect::Taken { member, number, bus, generation, over } = effect else { continue };
                let (handed, events) = over.map_or((None, Run::default()), |over| (Some(over.handed), over.events));
                self.reply(client, FromBroker::Taken { member, number, bus, generation, handed, events }, turn);
            }
        } else {
            for (client, take, body) in chosen.into_iter().rev() {
                self.dues.insert((now + PING, take.seat.topic.clone()));
                let groups = self.takes.entry(take.seat.topic.clone()).or_default();
                groups.entry(take.seat.group.clone()).or_default().push_front((client, take, body));
            }
        }
        for topic in looked {
            let Some(groups) = self.takes.get_mut(&topic) else { continue };
            groups.retain(|_, takes| !takes.is_empty());
            let due = groups.keys().filter_map(|group| self.ledger.next_due(&topic, group)).min();
            if groups.is_empty() {
                self.takes.remove(&topic);
            } else if let Some(due) = due {
                self.dues.insert((due.max(now + 1), topic));
            }
        }
        self.ledger.take_dirty(); // by handing over, which nobody waits for
    }
}

/// Chooses takes of a group that are to be answered now: those for which there is something, and those that are answered whatever
/// there is.
fn choose(
    ledger: &Ledger,
    topic: &SmolStr,
    group: &SmolStr,
    takes: &mut Takes,
    now: u64,
    chosen: &mut Vec<(ClientId, Take, Bytes)>,
) {
    let wanted = takes.iter().map(|(_, take, _)| take.most.max(1) as usize).sum();
    let mut work = ledger.work(topic, group, now, wanted);
    for _ in 0..takes.len() {
        let Some((client, take, body)) = takes.pop_front() else { break };
        let is_answered = ledger.is_answered(client, &take);
        if is_answered || work > 0 {
            if !is_answered {
                work = work.saturating_sub(take.most.max(1) as usize);
            }
            chosen.push((client, take, body));
        } else {
            takes.push_back((client, take, body));
        }
    }
}
