//! The task that finds the broker, or becomes it, and carries what a link has to say.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use nix::sys::socket::{getsockopt, sockopt};
use pubsub_core::{Error, ErrorKind, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::{Config, Link, Tongue};
use crate::abroad::{self, CLOSING};
use crate::broker::PING;
use crate::election::{Found, find, inode};
use crate::files::{Register, clock};
use crate::frame::{self, Decoder, Greeting};
use crate::node::host::Host;
use crate::pipe::{self, Outgoing};
use crate::protocol::{ToBroker, VERSION};
use crate::serve::Serving;

/// How long a broker may take to welcome a client before another takes its place.
const HUNG: Duration = Duration::from_secs(3);

/// How many pings, a second apart, it may leave unanswered.
const UNANSWERED: u32 = 2;

/// How long to wait at most before trying again to find a broker.
const MAX_PAUSE: Duration = Duration::from_millis(20);

/// How long to wait before looking again whether a broker of another kind is still there.
const FOREIGN_PAUSE: Duration = Duration::from_millis(500);

/// How long the last words of an instance that was dropped may take.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// How much of a buffer is kept for what is written next.
const KEPT_BUFFER: usize = 1 << 20;

/// What the task keeps: the broker, if this process is it.
pub(super) struct Line {
    pub(super) link: Weak<Link>,
    pub(super) config: Config,
    pub(super) serving: Option<Serving>,
    /// Whether the broker there is does not answer.
    pub(super) supersede: bool,
    /// What this process was given by a broker that is a TypeScript peer, while there is one.
    pub(super) host: Option<Host>,
}

impl Line {
    /// Finds the broker or becomes it. None: somebody else is becoming it.
    pub(super) async fn find(&mut self) -> io::Result<Option<UnixStream>> {
        let Config { paths, entry, limits, patience, max_peer_bytes, sync, .. } = self.config.clone();
        let supersede = std::mem::take(&mut self.supersede);
        let found = tokio::task::spawn_blocking(move || find(&paths, &entry, limits, sync, supersede))
            .await
            .map_err(io::Error::other)??;
        match found {
            Found::Broker(stream) => {
                // In a directory that others may write to, somebody else may have taken the name.
                if !self.config.entry.trusts(getsockopt(&stream, sockopt::PeerCredentials)?.uid()) {
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the broker is another user's process"));
                }
                Ok(Some(stream))
            }
            Found::Elected(office) => {
                self.serving = Some(Serving::start(*office, self.config.entry.clone(), patience, max_peer_bytes)?);
                UnixStream::connect(&self.config.paths.socket).map(Some) // it listens already
            }
            Found::Busy => Ok(None),
        }
    }
}

/// Keeps the link connected until its instance ends.
pub(super) async fn carry(mut line: Line, first: Option<UnixStream>, mut ended: oneshot::Receiver<()>) {
    let mut found = Ok(first);
    let mut pause = Duration::ZERO;
    loop {
        let mut foreign = None;
        let connected = match found {
            Ok(Some(stream)) => {
                let link = line.link.upgrade();
                let mut talking = std::pin::pin!(talk(&mut line, stream));
                tokio::select! {
                    talked = &mut talking => match talked {
                        Ok(true) => pause = Duration::ZERO,
                        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::PermissionDenied) => {
                            foreign = Some(error);
                        }
                        Ok(false) | Err(_) => {}
                    },
                    _ = &mut ended => {
                        let Some(link) = link else { break };
                        tokio::select! {
                            _ = &mut talking => {}
                            () = last_words(&link) => {}
                        }
                        break;
                    }
                }
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::debug!(%error, "no broker, and none could be made");
                if let Some(link) = line.link.upgrade()
                    && kind(&error) == ErrorKind::Denied
                {
                    link.tell(Status::Failed(Arc::new(Error::new(ErrorKind::Denied).caused_by(error))));
                }
                false
            }
        };
        let is_foreign = foreign.is_some();
        if line.host.is_some() {
            pause = CLOSING;
        }
        if connected && let Some(link) = line.link.upgrade() {
            link.state.lock().connected = false;
            link.tell(match foreign {
                // It is not ours to take the socket from; once it is gone, this goes on.
                Some(error) => Status::Failed(Arc::new(Error::new(kind(&error)).during("connect").caused_by(error))),
                None => Status::Reconnecting { since: SystemTime::now() },
            });
        }
        tokio::select! {
            () = sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)) => {}
            _ = &mut ended => break,
        }
        pause = if is_foreign { FOREIGN_PAUSE } else { (2 * pause).clamp(Duration::from_millis(1), MAX_PAUSE) };
        found = line.find().await;
    }
    if let Some(serving) = line.serving.take() {
        serving.ended().await;
    }
}

/// Talks with a broker until the connection breaks or the epoch changes. Returns whether it was welcome. When the instance ends
/// this is dropped; what it had to say was said before, by `last_words`.
async fn talk(line: &mut Line, stream: UnixStream) -> io::Result<bool> {
    let (mut from, mut to) = pipe::split(stream)?;
    let Some(link) = line.link.upgrade() else { return Ok(false) };
    let tongue = line.config.tongue;
    let (client, session) = {
        let mut state = link.state.lock();
        let session = state.session.connect();
        (state.session.client, session)
    };
    to.write_all(&if tongue == Tongue::Lines { Greeting::probe() } else { Greeting::hello(client, session) }).await?;
    let mut decoder = Decoder::default();
    let epoch = match timeout(HUNG, welcome(&mut from, &mut decoder)).await {
        Ok(Ok(Welcome::Native(epoch))) => epoch,
        Ok(Ok(Welcome::Foreign)) if tongue != Tongue::Native => {
            link.moved(true);
            let Config { limits, patience, .. } = line.config;
            let host = line.host.get_or_insert_with(|| Host::new(client, limits, patience, clock()));
            host.connected(session, clock());
            link.resume();
            let name = || inode(&line.config.paths);
            let named = name();
            let is_named = || named.is_some() && name() == named;
            abroad::talk(&link, host, &mut from, &mut to, decoder.buffer, is_named).await?;
            return Ok(true);
        }
        Ok(Ok(Welcome::Foreign)) => return Err(foreign()),
        Ok(Err(error)) => return Err(error),
        Err(_) => {
            line.supersede = true;
            return Ok(false);
        }
    };
    let register = Register::look_at(&line.config.paths, &line.config.entry)?;
    if register.epoch()? != epoch {
        return Ok(false);
    }
    link.moved(false);
    line.host = None;
    let to = Arc::new(to);
    link.resume();
    let _lent = Lent::new(&link, to.clone());
    let hung = tokio::select! {
        read = read(&link, &mut from, &mut decoder, &register, epoch) => read?,
        written = write(&link, &to) => written.map(|()| false)?,
    };
    line.supersede = hung;
    Ok(true)
}

/// The connection is there for everybody to write to at once, until it ends.
struct Lent<'a>(&'a Link);

impl<'a> Lent<'a> {
    fn new(link: &'a Link, stream: Arc<Outgoing>) -> Self {
        link.state.lock().stream = Some(stream);
        Self(link)
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let stream = self.0.state.lock().stream.take();
        drop(stream); // the last of it closes the connection
    }
}

/// Who answers.
enum Welcome {
    /// A broker of ours, of this epoch.
    Native(u64),
    /// A TypeScript peer.
    Foreign,
}

fn foreign() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what listens on the socket is no broker of this version")
}

async fn welcome(from: &mut (impl AsyncReadExt + Unpin), decoder: &mut Decoder) -> io::Result<Welcome> {
    loop {
        match decoder.greeting() {
            Ok(Some(Greeting::Welcome { v: VERSION, epoch })) => return Ok(Welcome::Native(epoch)),
            Ok(Some(Greeting::Subscribed)) => return Ok(Welcome::Foreign),
            Ok(Some(Greeting::Denied)) => {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the broker does not serve this user"));
            }
            Ok(Some(_)) | Err(_) => return Err(foreign()),
            Ok(None) => {}
        }
        if from.read_buf(&mut decoder.buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Reads until the connection ends. True if the broker fell silent.
async fn read(
    link: &Arc<Link>,
    from: &mut (impl AsyncReadExt + Unpin),
    decoder: &mut Decoder,
    register: &Register,
    epoch: u64,
) -> io::Result<bool> {
    let malformed = |why| io::Error::new(io::ErrorKind::InvalidData, format!("{why:?}"));
    // Counted, not timed: after this process was stopped, the broker gets its time to answer.
    let mut silent = 0;
    loop {
        // Whatever was read counts only if the broker was one when it was read: a successor would not know of it.
        if register.epoch()? != epoch {
            return Ok(false);
        }
        let mut any = false;
        while let Some(body) = decoder.next().map_err(malformed)? {
            any = true;
            link.heard(frame::body(&body).map_err(malformed)?);
        }
        if any {
            link.less.notify_waiters();
            // Whom it is for has it at hand now, and not only once all that is on its way has been read.
            tokio::task::yield_now().await;
        }
        decoder.reserve();
        match timeout(Duration::from_millis(PING), from.read_buf(&mut decoder.buffer)).await {
            Ok(read) => {
                if read? == 0 {
                    return Ok(false);
                }
                silent = 0;
            }
            Err(_) if silent == UNANSWERED => return Ok(true),
            Err(_) => {
                silent += 1;
                link.state.lock().say(&ToBroker::Ping);
                link.more.notify_one();
            }
        }
    }
}

async fn write(link: &Link, to: &Outgoing) -> io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        bytes.shrink_to(KEPT_BUFFER);
        {
            let mut state = link.state.lock();
            state.say_batch();
            std::mem::swap(&mut bytes, &mut state.out);
            state.writing = !bytes.is_empty();
        }
        if bytes.is_empty() {
            link.more.notified().await;
            continue;
        }
        to.write_whole(&bytes).await?;
        link.eased(false);
    }
}

/// What an instance that ends has still to say: what was recorded, within a short time, and that it goes.
async fn last_words(link: &Link) {
    let _ = timeout(LAST_WORDS, link.flush()).await;
    link.state.lock().say(&ToBroker::Bye);
    link.more.notify_one();
    let written = async {
        loop {
            let less = link.less.notified();
            let mut less = std::pin::pin!(less);
            less.as_mut().enable();
            let is_written = {
                let state = link.state.lock();
                state.out.is_empty() && !state.writing
            };
            if is_written {
                return;
            }
            less.await;
        }
    };
    let _ = timeout(LAST_WORDS, written).await;
}

/// The public kind of an error of the system.
pub(crate) fn kind(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::PermissionDenied => ErrorKind::Denied,
        io::ErrorKind::InvalidData | io::ErrorKind::AlreadyExists => ErrorKind::Backend(error.to_string().into()),
        _ => ErrorKind::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn last_words_are_written_to_the_end() {
        /// More than a connection takes at once.
        const MUCH: usize = 1 << 19;
        let (near, far) = UnixStream::pair().unwrap();
        let ((_keep, to), (mut from, _open)) = (pipe::split(near).unwrap(), pipe::split(far).unwrap());
        let link = Link::new();
        let fill = || link.state.lock().out.extend_from_slice(&[0; MUCH]);
        link.state.lock().connected = true;
        fill();
        let ending = async {
            let mut writing = Box::pin(write(&link, &to));
            assert!(futures::poll!(&mut writing).is_pending());
            fill();
            tokio::select! {
                written = &mut writing => written.unwrap(),
                () = last_words(&link) => {}
            }
            drop(writing);
            drop(to);
        };
        let mut read = Vec::new();
        let reading = async { while from.read_buf(&mut read).await.unwrap() > 0 {} };
        tokio::join!(ending, reading);
        let mut bye = Vec::new();
        frame::encode(&ToBroker::Bye, &mut bye).unwrap();
        assert_eq!(read.len(), 2 * MUCH + bye.len());
        assert!(read.ends_with(&bye));
    }
}
