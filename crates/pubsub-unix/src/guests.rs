//! TypeScript peers at a broker: their connections. What is said on them is `node::guest`'s to understand.

use std::cell::RefCell;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pubsub_core::{EventId, Timestamp};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::broker::ConnId;
use crate::files::clock;
use crate::frame;
use crate::node::guest::Guest;
use crate::node::lines::{Lines, Stamp};
use crate::pipe::{Incoming, Outgoing};
use crate::protocol::FromBroker;
use crate::serve::{FULL, Hub, Out};

/// How long to wait before a guest's publish that had no room is tried again.
const RETRY: Duration = Duration::from_millis(5);

fn stamp() -> Stamp {
    Stamp { id: EventId::random(), created_at: Timestamp::now() }
}

/// Talks with a TypeScript peer until its connection ends.
pub(crate) async fn talk(hub: Rc<Hub>, conn: ConnId, mut from: Incoming, to: Outgoing, said: BytesMut) -> io::Result<()> {
    let client = fastrand::u64(..);
    let guest = Rc::new(RefCell::new(Guest::new(client)));
    let refused = || io::Error::other("its number is another client's");
    hub.broker.borrow_mut().connected(conn, client, 1, clock()).map_err(|()| refused())?;
    let Some(out) = hub.host(conn, guest.clone()) else { return Ok(()) };
    let writing = write(&hub, conn, &guest, &out, to);
    let reading = read(&hub, conn, &guest, &out, &mut from, said);
    tokio::select! {
        ended = reading => ended,
        ended = writing => ended,
    }
}

async fn read(
    hub: &Hub,
    conn: ConnId,
    guest: &RefCell<Guest>,
    out: &Out,
    from: &mut Incoming,
    said: BytesMut,
) -> io::Result<()> {
    let mut lines = Lines::over(said);
    loop {
        let has_to_retry = guest.borrow().has_to_retry();
        let is_behind = guest.borrow().is_behind() || out.len() > FULL;
        if !is_behind {
            let malformed = |why| io::Error::new(io::ErrorKind::InvalidData, format!("{why:?}"));
            if let Some(line) = lines.next().map_err(malformed)? {
                guest.borrow_mut().hear(&line, stamp).map_err(malformed)?;
                hub.pass_on(conn, guest);
                continue;
            }
        }
        lines.buffer.reserve(64 << 10);
        tokio::select! {
            read = from.read_buf(&mut lines.buffer), if !is_behind => {
                if read? == 0 {
                    return Ok(());
                }
            }
            // Something was written, or answered.
            () = out.less.notified() => {}
            () = sleep(RETRY), if has_to_retry => {
                guest.borrow_mut().retry();
                hub.pass_on(conn, guest);
            }
        }
    }
}

async fn write(hub: &Hub, conn: ConnId, guest: &RefCell<Guest>, out: &Out, mut to: Outgoing) -> io::Result<()> {
    loop {
        let bytes = std::mem::take(&mut *out.bytes.borrow_mut());
        if bytes.is_empty() {
            guest.borrow_mut().written();
            hub.pass_on(conn, guest);
            out.more.notified().await;
            continue;
        }
        out.writing.set(bytes.len());
        let mut writing = pin!(to.write_all(&bytes));
        loop {
            match timeout(hub.silent, &mut writing).await {
                Ok(written) => break written?,
                // It has stopped reading: what it was to get goes to other members.
                Err(_) if guest.borrow().holds() => return Err(io::ErrorKind::TimedOut.into()),
                Err(_) => {}
            }
        }
        out.writing.set(0);
        out.less.notify_one();
    }
}

impl Hub {
    /// Passes on what a guest has to say, to the broker and to its peer.
    pub(crate) fn pass_on(&self, conn: ConnId, guest: &RefCell<Guest>) {
        let (frames, lines) = {
            let mut guest = guest.borrow_mut();
            (guest.frames(), guest.lines())
        };
        for frame in &frames {
            let mut bytes = Vec::new();
            if frame::encode(frame, &mut bytes).is_err() {
                debug_assert!(false, "a guest says nothing that long");
                continue;
            }
            let body = Bytes::from(bytes).slice(frame::HEADER..);
            let answered = self.broker.borrow_mut().received(conn, body, clock());
            debug_assert!(answered.is_ok(), "it was encoded above");
        }
        if !frames.is_empty() {
            self.busy.notify_one();
        }
        if !lines.is_empty() {
            self.put(conn, |out| out.extend_from_slice(&lines));
        }
    }

    /// A guest was answered: it may be ready for more.
    fn heard(&self, conn: ConnId) {
        self.put(conn, |_| {});
    }

    /// The broker has something to say to a guest.
    pub(crate) fn tell(&self, conn: ConnId, guest: &RefCell<Guest>, frame: FromBroker) {
        guest.borrow_mut().told(frame, stamp);
        self.pass_on(conn, guest);
        self.heard(conn);
    }
}
