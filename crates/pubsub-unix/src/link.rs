//! An instance's end of the bus: a session, the connection that carries it now, and the task that makes a new one when it breaks.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use pubsub_core::{Error, ErrorKind, Receipt, Result, Settled, Status, Topic};
use smol_str::SmolStr;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::broker::Patience;
use crate::entry::Entry;
use crate::files::Paths;
use crate::frame;
use crate::ledger::Limits;
use crate::member::Member;
use crate::pipe::Outgoing;
use crate::protocol::{Answer, FromBroker, Place, Query, Reply, Request, Seat, Settling, ToBroker, What};
use crate::reader::Reader;
use crate::session::{Heard, Session};

mod carry;

pub(crate) use self::carry::kind;
use self::carry::{Line, carry};

/// How long the first connection may take before an instance is handed out without one.
const FIRST: Duration = Duration::from_secs(1);

/// How long to wait before a settlement that could not be written is said again.
const INSISTENCE: Duration = Duration::from_millis(20);

/// How many settlements are said together at most.
const SETTLED_TOGETHER: usize = 500;

/// How many bytes of dead letters are said together at most, but for one that is larger: a frame has its bound.
const LETTERS_TOGETHER: u64 = 1 << 20;

/// How many calls may be unanswered before publishers wait.
const MAX_UNANSWERED: usize = 4096;

/// How many bytes may be on their way to the broker before publishers wait.
pub(crate) const MAX_OUT: usize = 16 << 20;

/// What the link needs to know of how its instance is configured.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) paths: Paths,
    pub(crate) entry: Entry,
    pub(crate) limits: Limits,
    pub(crate) patience: Patience,
    pub(crate) max_peer_bytes: usize,
    pub(crate) sync: bool,
    pub(crate) tongue: Tongue,
}

/// What an instance speaks with brokers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tongue {
    /// What the broker speaks.
    Any,
    /// Ours, and with no other.
    Native,
    /// That of TypeScript peers, with brokers of ours too: for tests.
    Lines,
}

/// What is kept with a call until it is answered.
enum Kept {
    Answer(oneshot::Sender<Answer>),
    /// A dead letter, or that a member leaves: said again until it could be written.
    Insist(oneshot::Sender<Settled>),
    /// Settlements, each with who waits for it: said again as well.
    Settle(Vec<oneshot::Sender<Settled>>),
}

/// Settlements that were recorded and not said yet: they are said together.
struct Batch {
    seat: Seat,
    generation: u64,
    settled: Vec<Settling>,
    tell: Vec<oneshot::Sender<Settled>>,
    /// Of the dead letters in it.
    bytes: u64,
}

/// Who waits for a reply.
enum Asker {
    Caller(oneshot::Sender<Reply>),
    Reader(Weak<Reader>),
    /// Wants to know whether it still has its seat.
    Member(Weak<Member>),
}

pub(crate) struct Link {
    state: Mutex<State>,
    /// There is something to write.
    more: Notify,
    /// Something was written or answered.
    less: Notify,
    status: watch::Sender<Status>,
    /// Whether the broker is a TypeScript peer, or was when there last was one.
    foreign: AtomicBool,
}

struct State {
    session: Session<Kept, Asker>,
    /// Frames to be written, while there is a broker.
    out: Vec<u8>,
    /// The connection, for what is written at once.
    stream: Option<Arc<Outgoing>>,
    /// Whether the task is still writing what it took from there.
    writing: bool,
    connected: bool,
    closed: bool,
    members: HashMap<u64, Weak<Member>>,
    /// How many fan-out subscriptions follow each topic.
    followed: HashMap<SmolStr, u64>,
    batch: Option<Batch>,
}

impl State {
    /// Makes a change. What was settled before is said before.
    fn call(&mut self, request: Request, kept: Kept) {
        self.say_batch();
        let frame = self.session.call(request, kept);
        self.say(&frame);
    }

    /// Writes now what is to be written, as far as the connection takes it: a question that waits for its asker to let the task run
    /// is answered while the asker could have gone on. Returns whether the task has nothing left to do.
    fn write_now(&mut self) -> bool {
        let Some(stream) = self.stream.as_ref().filter(|_| !self.writing) else { return false };
        match stream.try_write(&self.out) {
            Ok(written) => drop(self.out.drain(..written)),
            Err(_) => return false, // full, or broken: the task finds out
        }
        self.out.is_empty()
    }

    fn say_batch(&mut self) {
        if let Some(Batch { seat, generation, settled, tell, bytes: _ }) = self.batch.take() {
            let frame = self.session.call(Request::Settle { seat, generation, settled }, Kept::Settle(tell));
            self.say(&frame);
        }
    }

    fn say(&mut self, frame: &ToBroker) {
        // What cannot be said now is said when there is a broker again.
        if self.connected {
            frame::encode(frame, &mut self.out).expect("what is longer is refused before");
        }
    }
}

/// The task behind a link.
pub(crate) struct Carrier {
    pub(crate) task: JoinHandle<()>,
    /// Dropped, or told, it says its last words and ends.
    pub(crate) end: oneshot::Sender<()>,
}

impl Link {
    /// A link, and its task. It has tried once to find or be the broker when this returns.
    pub(crate) async fn connect(config: Config) -> Result<(Arc<Self>, Carrier)> {
        let link = Self::new();
        let (end, ended) = oneshot::channel();
        let mut line = Line { link: Arc::downgrade(&link), config, serving: None, supersede: false, host: None };
        let first = line.find().await.map_err(|error| Error::new(kind(&error)).during("connect").caused_by(error))?;
        let task = tokio::spawn(carry(line, first, ended));
        // What the instance can do depends on who the broker is.
        let known = |status: &Status| !matches!(status, Status::Reconnecting { .. });
        let _ = timeout(FIRST, link.status.subscribe().wait_for(known)).await; // without a broker it goes on looking
        if let Status::Failed(error) = &*link.status.borrow()
            && matches!(error.kind(), ErrorKind::Denied)
        {
            return Err(Error::new(ErrorKind::Denied).during("connect").caused_by(error.to_string()));
        }
        Ok((link, Carrier { task, end }))
    }

    /// A link that nothing carries yet.
    fn new() -> Arc<Self> {
        let status = watch::Sender::new(Status::Reconnecting { since: SystemTime::now() });
        let state = State {
            session: Session::new(fastrand::u64(..)),
            out: Vec::new(),
            stream: None,
            writing: false,
            connected: false,
            closed: false,
            members: HashMap::new(),
            followed: HashMap::new(),
            batch: None,
        };
        let foreign = AtomicBool::new(false);
        Arc::new(Self { state: Mutex::new(state), more: Notify::new(), less: Notify::new(), status, foreign })
    }

    /// Whether the broker is a TypeScript peer.
    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign.load(Ordering::Acquire)
    }

    /// Who the broker is has changed: questions of readers are about what the other one kept, and they ask anew.
    fn moved(&self, foreign: bool) {
        if self.foreign.swap(foreign, Ordering::AcqRel) == foreign {
            return;
        }
        let askers = self.state.lock().session.withdraw(|asker| matches!(asker, Asker::Reader(_)));
        for asker in askers {
            if let Asker::Reader(reader) = asker
                && let Some(reader) = reader.upgrade()
            {
                reader.ask_again();
            }
        }
    }

    /// A fan-out subscription follows a topic from now on.
    pub(crate) fn follow(&self, topic: &Topic) {
        *self.state.lock().followed.entry(topic.as_str().into()).or_default() += 1;
    }

    /// It no longer does. A broker that is a TypeScript peer has to be told when nobody does: it sends without being asked.
    pub(crate) fn unfollow(&self, topic: &Topic) {
        {
            let mut state = self.state.lock();
            let Some(followers) = state.followed.get_mut(topic.as_str()) else { return };
            *followers -= 1;
            if *followers > 0 {
                return;
            }
            state.followed.remove(topic.as_str());
        }
        if self.is_foreign() {
            let seat = Seat { topic: topic.as_str().into(), group: SmolStr::default(), member: 0 };
            drop(self.call(Request::Leave { seat, heard: 0 }));
        }
    }

    /// Takes what is to be said.
    pub(crate) fn said(&self) -> Vec<u8> {
        let mut state = self.state.lock();
        state.say_batch();
        std::mem::take(&mut state.out)
    }

    /// Waits until there is something to be said.
    pub(crate) async fn spoken(&self) {
        self.more.notified().await;
    }

    /// Something was said or answered. Whether some of what was taken is still to be written.
    pub(crate) fn eased(&self, writing: bool) {
        self.state.lock().writing = writing;
        self.less.notify_waiters();
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    pub(crate) fn tell(&self, now: Status) {
        self.status.send_if_modified(|status| {
            let open = !matches!(status, Status::Closed);
            if open {
                *status = now;
            }
            open
        });
    }

    /// Whether so many calls are unanswered that the next one is to wait.
    fn is_full(&self) -> bool {
        let state = self.state.lock();
        state.session.unanswered() >= MAX_UNANSWERED || state.out.len() >= MAX_OUT
    }

    /// Waits until a call may be made. Cancel safe.
    pub(crate) async fn room(&self) {
        loop {
            let less = self.less.notified();
            let mut less = std::pin::pin!(less);
            less.as_mut().enable();
            if !self.is_full() {
                return;
            }
            less.await;
        }
    }

    /// Makes a change. It will be said to the broker whether or not anybody waits for the answer.
    pub(crate) fn call(&self, request: Request) -> oneshot::Receiver<Answer> {
        let (tell, told) = oneshot::channel();
        self.make(request, Kept::Answer(tell));
        told
    }

    /// Makes a change that nobody can be told the failure of: a settlement, or a dead letter.
    pub(crate) fn insist(&self, request: Request) -> Receipt {
        let (tell, receipt) = Receipt::pending();
        self.make(request, Kept::Insist(tell));
        receipt
    }

    fn make(&self, request: Request, kept: Kept) {
        {
            let mut state = self.state.lock();
            if state.closed {
                return; // what was kept is dropped: closed, or unconfirmed
            }
            state.call(request, kept);
            // One by itself is on its way at once; one of many goes with those that follow it.
            if state.session.unanswered() == 1 && state.write_now() {
                return;
            }
        }
        self.more.notify_one();
    }

    /// Settles a delivery to a member: said together with others, and again until it could be written.
    pub(crate) fn settle(&self, seat: &Seat, place: Place, attempt: u32, what: What) -> Receipt {
        let (tell, receipt) = Receipt::pending();
        let Place { generation, offset } = place;
        let letter = if let What::Bury(Some((_, letter))) = &what { letter.len() } else { 0 };
        let is_first = {
            let mut state = self.state.lock();
            if state.closed {
                return receipt; // unconfirmed
            }
            let others = |batch: &Batch| {
                batch.seat.member != seat.member
                    || batch.generation != generation
                    || batch.settled.len() >= SETTLED_TOGETHER
                    || (letter > 0 && batch.bytes + letter > LETTERS_TOGETHER)
            };
            if state.batch.as_ref().is_some_and(others) {
                state.say_batch();
            }
            let empty = || Batch { seat: seat.clone(), generation, settled: Vec::new(), tell: Vec::new(), bytes: 0 };
            let batch = state.batch.get_or_insert_with(empty);
            batch.bytes += letter;
            batch.settled.push(Settling { offset, attempt, what });
            batch.tell.push(tell);
            batch.tell.len() == 1
        };
        if is_first {
            self.more.notify_one();
        }
        receipt
    }

    /// Asks; dropped, it no longer wants to know.
    pub(crate) fn ask(self: &Arc<Self>, query: Query) -> Asked {
        let (tell, told) = oneshot::channel();
        let id = {
            let mut state = self.state.lock();
            if state.closed {
                None
            } else {
                let (id, frame) = state.session.ask(query, Asker::Caller(tell));
                state.say(&frame);
                Some(id)
            }
        };
        self.more.notify_one();
        Asked { link: self.clone(), id, told }
    }

    /// Asks on behalf of a reader, and returns the question's id; none once the link is closed.
    pub(crate) fn read(&self, query: Query, reader: Weak<Reader>) -> Option<u64> {
        let id = {
            let mut state = self.state.lock();
            if state.closed {
                return None;
            }
            let (id, frame) = state.session.ask(query, Asker::Reader(reader));
            state.say(&frame);
            if state.write_now() {
                return Some(id);
            }
            id
        };
        self.more.notify_one();
        Some(id)
    }

    /// The answer to this question is no longer wanted.
    pub(crate) fn cancel(&self, id: u64) {
        {
            let mut state = self.state.lock();
            let Some(frame) = state.session.cancel(id) else { return };
            state.say(&frame);
        }
        self.more.notify_one();
    }

    /// Asks for deliveries to a member, unless it has asked already.
    pub(crate) fn take(&self, seat: &Seat, most: u32, member: &Weak<Member>) {
        {
            let mut state = self.state.lock();
            if state.closed {
                return;
            }
            state.members.insert(seat.member, member.clone());
            state.say_batch();
            let Some(frame) = state.session.take(seat.clone(), most) else { return };
            state.say(&frame);
            if state.write_now() {
                return;
            }
        }
        self.more.notify_one();
    }

    /// A member has left. Returns the number of the last of its takes that was answered.
    pub(crate) fn forget(&self, member: u64) -> u64 {
        let mut state = self.state.lock();
        state.members.remove(&member);
        state.session.leave(member)
    }

    /// Waits until all calls made before are answered. Cancel safe.
    pub(crate) async fn flush(&self) {
        let before = {
            let mut state = self.state.lock();
            state.say_batch();
            state.session.next_call()
        };
        self.more.notify_one();
        loop {
            let less = self.less.notified();
            let mut less = std::pin::pin!(less);
            less.as_mut().enable();
            {
                let state = self.state.lock();
                if state.closed || state.session.first_unanswered() >= before {
                    return;
                }
            }
            less.await;
        }
    }

    /// Says nothing more. What was not answered never will be.
    pub(crate) fn close(&self) {
        let unanswered = {
            let mut state = self.state.lock();
            state.closed = true;
            (state.session.give_up(), state.batch.take())
        };
        drop(unanswered);
        self.less.notify_waiters();
    }

    /// There is a broker: says again what was not answered. A TypeScript peer is asked first, so that what is published then is
    /// heard by those who asked.
    fn resume(&self) {
        let foreign = self.is_foreign();
        {
            let mut state = self.state.lock();
            state.out.clear();
            (state.connected, state.writing) = (true, false);
            let mut frames: Vec<_> = state.session.resume().collect();
            if foreign {
                frames.sort_by_key(|frame| !matches!(frame, ToBroker::Ask { .. }));
            }
            frames.iter().for_each(|frame| state.say(frame));
        }
        self.ask_for_seats();
        self.tell(Status::Connected);
    }

    /// Members that hold something may have lost it meanwhile, if this process was stopped for so long that it was taken for dead.
    /// Those that wait for a take are told by its answer.
    fn ask_for_seats(&self) {
        let members: Vec<Arc<Member>> = self.state.lock().members.values().filter_map(Weak::upgrade).collect();
        let mut state = self.state.lock();
        let client = state.session.client;
        for member in members.iter().filter(|member| !state.session.is_taking(member.seat.member)).collect::<Vec<_>>() {
            let query = Query::Seated { client, seat: member.seat.clone() };
            let (_, frame) = state.session.ask(query, Asker::Member(Arc::downgrade(member)));
            state.say(&frame);
        }
        drop(state); // before the members, whose end takes the lock
        self.more.notify_one();
    }

    /// A frame came.
    pub(crate) fn heard(self: &Arc<Self>, frame: FromBroker) {
        let (heard, member) = {
            let mut state = self.state.lock();
            let heard = state.session.hear(frame);
            let member = match &heard {
                Heard::Taken { member, .. } => state.members.get(member).cloned(),
                Heard::Ping => {
                    state.say(&ToBroker::Ping);
                    None
                }
                _ => None,
            };
            (heard, member)
        };
        match heard {
            Heard::Answer(answer, _, Kept::Answer(tell)) => drop(tell.send(answer)),
            Heard::Answer(Answer::Failed(_) | Answer::Full, request, kept) => {
                let link = self.clone();
                tokio::spawn(async move {
                    sleep(INSISTENCE).await;
                    link.make(request, kept);
                });
            }
            // Nobody may be waiting for these.
            Heard::Answer(_, _, Kept::Insist(tell)) => drop(tell.send(Settled::Done)),
            Heard::Answer(answer, _, Kept::Settle(tell)) => {
                let late = if let Answer::Settled(late) = answer { late } else { Vec::new() };
                let mut late = late.into_iter().peekable();
                for (place, tell) in (0..).zip(tell) {
                    let is_late = late.next_if_eq(&place).is_some();
                    let _ = tell.send(if is_late { Settled::TooLate } else { Settled::Done });
                }
            }
            Heard::Reply(_, reply, Asker::Caller(tell)) => drop(tell.send(reply)),
            Heard::Reply(id, reply, Asker::Reader(reader)) => match (reader.upgrade(), reply) {
                (Some(reader), Reply::Stretch(stretch)) => reader.arrived(id, stretch),
                (Some(reader), Reply::Start(Ok(place))) => reader.moved(id, place),
                _ => {}
            },
            Heard::Reply(_, reply, Asker::Member(member)) => {
                if let (Some(member), Reply::Seated(false)) = (member.upgrade(), reply) {
                    member.rejoin();
                }
            }
            Heard::Taken { bus, generation, handed, events, .. } => {
                if let Some(member) = member.and_then(|member| member.upgrade()) {
                    member.taken(&bus, generation, handed, &events);
                }
            }
            Heard::Ping => self.more.notify_one(),
            Heard::Nothing => {}
        }
    }
}

/// A question to the broker.
pub(crate) struct Asked {
    link: Arc<Link>,
    id: Option<u64>,
    told: oneshot::Receiver<Reply>,
}

impl Future for Asked {
    type Output = Result<Reply>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Reply>> {
        let told = std::task::ready!(Pin::new(&mut self.told).poll(cx));
        self.id = None;
        Poll::Ready(told.map_err(|_| Error::closed()))
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.id.into_iter().for_each(|id| self.link.cancel(id));
    }
}
