//! A broker's thread: it accepts, reads, takes turns and writes, apart from the runtime of its process, whose being busy is no
//! stall of the bus.

use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::broker::{Broker, ConnId, Patience};
use crate::election::{Office, Seat, Standing};
use crate::entry::Entry;
use crate::files::{Log, Register, clock};
use crate::frame::{self, Decoder, Greeting};
use crate::guests;
use crate::node::guest::Guest;
use crate::pipe::{self, Incoming, Outgoing};
use crate::protocol::{FromBroker, VERSION};

/// How often a broker looks whether it still is one.
const LOOK: Duration = Duration::from_millis(20);

/// How long a peer may take to introduce itself.
const GREETING: Duration = Duration::from_secs(5);

/// How many peers there are at most.
const MAX_PEERS: usize = 10_000;

/// How much may wait to be written to a peer before nothing more is read from it.
pub(crate) const FULL: usize = 8 << 20;

/// How much of a buffer is kept for what is written next.
const KEPT_BUFFER: usize = 1 << 20;

/// A broker that runs. Dropping it stops it; [`ended`](Self::ended) tells when it is gone.
pub(crate) struct Serving {
    stop: Arc<Notify>,
    ended: watch::Receiver<bool>,
}

impl Serving {
    pub(crate) fn start(office: Office, entry: Entry, patience: Patience, max_peer_bytes: usize) -> io::Result<Self> {
        let (stop, (tell, ended)) = (Arc::new(Notify::new()), watch::channel(false));
        let stopped = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("pubsub-broker".into()).spawn(move || {
            let epoch = office.epoch;
            tracing::debug!(epoch, "this process is the broker now");
            let tasks = tokio::task::LocalSet::new();
            if let Err(error) = tasks.block_on(&runtime, serve(office, entry, patience, max_peer_bytes, &stopped)) {
                tracing::warn!(epoch, %error, "the broker has to stop");
            }
            drop(tasks); // with all connections
            drop(runtime);
            tell.send_replace(true);
        })?;
        Ok(Self { stop, ended })
    }

    /// Stops it and waits until it is gone.
    pub(crate) async fn ended(&self) {
        self.stop.notify_one();
        let _ = self.ended.clone().wait_for(|ended| *ended).await; // an error: its thread is gone
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

/// What the tasks of a broker share. They run on one thread.
pub(crate) struct Hub {
    pub(crate) broker: RefCell<Broker>,
    conns: RefCell<HashMap<ConnId, Conn>>,
    pub(crate) busy: Notify,
    /// Connections that are to be closed when nothing is being sent.
    doomed: RefCell<Vec<ConnId>>,
    epoch: u64,
    entry: Entry,
    max_peer_bytes: usize,
    /// How long a peer may take nothing that it is to handle before it is cut off.
    pub(crate) silent: Duration,
}

struct Conn {
    out: Rc<Out>,
    /// What speaks for a TypeScript peer.
    guest: Option<Rc<RefCell<Guest>>>,
    tasks: Vec<AbortHandle>,
}

/// What waits to be written to a peer.
#[derive(Default)]
pub(crate) struct Out {
    pub(crate) bytes: RefCell<Vec<u8>>,
    pub(crate) more: Notify,
    /// Whether the reader waits for it to become less.
    pub(crate) less: Notify,
    pub(crate) writing: Cell<usize>,
    /// Where to, once it is to be written by us.
    to: RefCell<Option<Rc<Outgoing>>>,
}

impl Out {
    /// Writes what the peer takes now; the rest is for the task.
    fn write_now(&self) {
        let to = self.to.borrow();
        let Some(to) = to.as_ref().filter(|_| self.writing.get() == 0) else { return };
        let mut bytes = self.bytes.borrow_mut();
        if let Ok(written) = to.try_write(&bytes) {
            bytes.drain(..written);
            bytes.shrink_to(KEPT_BUFFER);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.borrow().len() + self.writing.get()
    }
}

async fn serve(office: Office, entry: Entry, patience: Patience, max_peer_bytes: usize, stop: &Notify) -> io::Result<()> {
    let Office { epoch, register, ledger, mut log, seat } = office;
    seat.listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(seat.listener.try_clone()?)?;
    let hub = Rc::new(Hub {
        broker: RefCell::new(Broker::new(ledger, patience, clock())),
        conns: RefCell::default(),
        busy: Notify::new(),
        doomed: RefCell::default(),
        epoch,
        entry,
        max_peer_bytes,
        silent: Duration::from_millis(patience.silent),
    });
    let accepting = tokio::task::spawn_local(accept(hub.clone(), listener));
    let mut watching = std::pin::pin!(watch_over(&seat, &register, epoch));
    let served = async {
        loop {
            // Before anything is written: a broker that was superseded confirms nothing, and spares its clients the finding out.
            if register.epoch()? != epoch {
                return Ok(());
            }
            let wait = hub.turn(&mut log);
            if hub.broker.borrow().is_busy() {
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                () = hub.busy.notified() => {}
                () = sleep(wait) => {}
                stays = &mut watching => return stays,
            }
        }
    };
    let served = tokio::select! {
        served = served => served,
        () = stop.notified() => Ok(()),
    };
    accepting.abort();
    hub.conns.borrow().values().flat_map(|conn| &conn.tasks).for_each(AbortHandle::abort);
    served
}

/// Ends when this is no longer the broker.
async fn watch_over(seat: &Seat, register: &Register, epoch: u64) -> io::Result<()> {
    loop {
        sleep(LOOK).await;
        if register.epoch()? != epoch {
            return Ok(());
        }
        match seat.standing() {
            Standing::Ours => {}
            // A stranger removed it. If another takes the name at this very moment, the next look tells.
            Standing::Missing => drop(seat.publish()?),
            Standing::Lost => return Ok(()),
        }
    }
}

async fn accept(hub: Rc<Hub>, listener: UnixListener) {
    let mut next = 0;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if !stream.peer_cred().is_ok_and(|peer| hub.entry.admits(peer.uid(), peer.gid())) {
                    // There is room for it: nothing was written before.
                    let _ = stream.into_std().and_then(|mut stream| stream.write_all(&Greeting::Denied.line()));
                    continue;
                }
                if hub.conns.borrow().len() >= MAX_PEERS {
                    continue;
                }
                next += 1;
                let (hub, conn) = (hub.clone(), next);
                let task = tokio::task::spawn_local(peer(hub.clone(), conn, stream)).abort_handle();
                hub.conns.borrow_mut().insert(conn, Conn { out: Rc::default(), guest: None, tasks: vec![task] });
            }
            Err(error) => {
                tracing::warn!(%error, "a broker cannot accept"); // no descriptors left, most likely
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One connection, from its greeting to its end.
async fn peer(hub: Rc<Hub>, conn: ConnId, stream: UnixStream) {
    let Ok((mut from, mut to)) = stream.into_std().and_then(pipe::split) else { return hub.close(conn) };
    let mut decoder = Decoder::default();
    // One that says nothing may be a TypeScript peer, which introduces itself by the first thing it wants.
    loop {
        match decoder.is_hello() {
            Some(true) => break,
            Some(false) => {
                if let Err(error) = guests::talk(hub.clone(), conn, from, to, decoder.buffer).await {
                    tracing::debug!(%error, conn, "a TypeScript peer is gone");
                }
                return hub.close(conn);
            }
            None if from.read_buf(&mut decoder.buffer).await.is_ok_and(|count| count > 0) => {}
            None => return hub.close(conn),
        }
    }
    let greeted = timeout(GREETING, greet(&hub, conn, &mut from, &mut to, &mut decoder)).await;
    if let Ok(Ok(())) = greeted
        && let Some(out) = hub.start_writing(conn, to)
        && let Err(error) = read(&hub, conn, &mut from, &mut decoder, &out).await
    {
        tracing::debug!(%error, conn, "a peer is gone");
    }
    hub.close(conn);
}

async fn greet(hub: &Hub, conn: ConnId, from: &mut Incoming, to: &mut Outgoing, decoder: &mut Decoder) -> io::Result<()> {
    let refuse = || io::Error::new(io::ErrorKind::InvalidData, "no greeting of ours");
    let mut lines = Vec::new();
    while lines.len() < 2 {
        match decoder.greeting().map_err(|_| refuse())? {
            Some(line) => lines.push(line),
            None if from.read_buf(&mut decoder.buffer).await? == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            None => {}
        }
    }
    let [Greeting::Hello { v, client, session }, Greeting::Subscribe { .. }] = lines[..] else { return Err(refuse()) };
    to.write_all(&Greeting::Welcome { v: VERSION, epoch: hub.epoch }.line()).await?;
    if v != VERSION {
        return Err(refuse());
    }
    let older = hub.broker.borrow_mut().connected(conn, client, session, clock()).map_err(|()| refuse())?;
    older.into_iter().for_each(|older| hub.close(older));
    Ok(())
}

async fn read(hub: &Hub, conn: ConnId, from: &mut Incoming, decoder: &mut Decoder, out: &Out) -> io::Result<()> {
    let malformed = |why| io::Error::new(io::ErrorKind::InvalidData, format!("{why:?}"));
    loop {
        let mut any = false;
        while let Some(body) = decoder.next().map_err(malformed)? {
            any = true;
            let reply = hub.broker.borrow_mut().received(conn, body, clock()).map_err(malformed)?;
            reply.into_iter().for_each(|reply| hub.send(conn, reply));
        }
        if any {
            hub.busy.notify_one();
            // A turn for what came: who has more to say does not keep the others waiting until all of it is said.
            tokio::task::yield_now().await;
        }
        while out.len() > FULL {
            out.less.notified().await;
        }
        decoder.reserve();
        if from.read_buf(&mut decoder.buffer).await? == 0 {
            return Ok(());
        }
    }
}

/// Writes what a turn could not write at once.
async fn write(out: Rc<Out>, to: Rc<Outgoing>) {
    let mut bytes = Vec::new();
    loop {
        std::mem::swap(&mut bytes, &mut *out.bytes.borrow_mut());
        if bytes.is_empty() {
            out.more.notified().await;
            continue;
        }
        out.writing.set(bytes.len());
        if to.write_whole(&bytes).await.is_err() {
            return; // the reader finds out, too
        }
        bytes.clear();
        bytes.shrink_to(KEPT_BUFFER);
        out.writing.set(0);
        out.less.notify_one();
    }
}

impl Hub {
    /// Takes a turn, and returns how long there is nothing to do unless something comes in.
    fn turn(&self, log: &mut Log) -> Duration {
        let now = clock();
        let turn = self.broker.borrow_mut().turn(now, |entries| log.append(entries));
        if log.is_long()
            && let Err(error) = log.rotate(self.broker.borrow().ledger())
        {
            tracing::error!(%error, "the log cannot be written anew; it grows on");
        }
        let mut told: Vec<ConnId> = turn.frames.iter().map(|(conn, _)| *conn).collect();
        turn.frames.into_iter().for_each(|(conn, frame)| self.send(conn, frame));
        told.sort_unstable();
        told.dedup();
        let conns = self.conns.borrow();
        told.iter().filter_map(|conn| conns.get(conn)).for_each(|conn| conn.out.write_now());
        drop(conns);
        let doomed = self.doomed.take();
        turn.close.into_iter().chain(doomed).for_each(|conn| self.close(conn));
        Duration::from_millis(turn.next.saturating_sub(now).max(1))
    }

    fn send(&self, conn: ConnId, frame: FromBroker) {
        let guest = self.conns.borrow().get(&conn).and_then(|conn| conn.guest.clone());
        if let Some(guest) = guest {
            return self.tell(conn, &guest, frame);
        }
        self.put(conn, |out| {
            if frame::encode(&frame, out).is_err() {
                self.doomed.borrow_mut().push(conn); // so large an answer would have been refused as a call
            }
        });
    }

    /// Adds to what waits to be written to a peer.
    pub(crate) fn put(&self, conn: ConnId, add: impl FnOnce(&mut Vec<u8>)) {
        let conns = self.conns.borrow();
        let Some(Conn { out, .. }) = conns.get(&conn) else { return };
        add(&mut out.bytes.borrow_mut());
        if out.len() > self.max_peer_bytes {
            tracing::warn!(conn, "a peer reads too slowly and is cut off");
            self.doomed.borrow_mut().push(conn);
            self.busy.notify_one();
        }
        out.more.notify_one();
        out.less.notify_one(); // a guest may have been answered
    }

    /// From now on what is for a connection is told to its guest.
    pub(crate) fn host(&self, conn: ConnId, guest: Rc<RefCell<Guest>>) -> Option<Rc<Out>> {
        let mut conns = self.conns.borrow_mut();
        let conn = conns.get_mut(&conn)?;
        conn.guest = Some(guest);
        Some(conn.out.clone())
    }

    fn start_writing(&self, conn: ConnId, to: Outgoing) -> Option<Rc<Out>> {
        let mut conns = self.conns.borrow_mut();
        let conn = conns.get_mut(&conn)?;
        let to = Rc::new(to);
        *conn.out.to.borrow_mut() = Some(to.clone());
        conn.tasks.push(tokio::task::spawn_local(write(conn.out.clone(), to)).abort_handle());
        Some(conn.out.clone())
    }

    fn close(&self, conn: ConnId) {
        self.broker.borrow_mut().lost(conn, clock());
        let conn = self.conns.borrow_mut().remove(&conn);
        if let Some(conn) = conn {
            conn.out.to.take(); // the last of it closes the connection
            conn.tasks.iter().for_each(AbortHandle::abort);
        }
        self.busy.notify_one();
    }
}
