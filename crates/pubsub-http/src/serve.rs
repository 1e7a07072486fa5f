//! Serving a router so that no client can hold up the others, nor hold on to anything for ever.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::{Extension, Router};
use futures::FutureExt;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use pubsub_core::{Error, Result};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Sleep;

use crate::builder::{check_duration, check_size};

/// The pause after the system refused to accept a connection, for want of file descriptors for one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How often it is looked whether a peer is gone that has sent what nobody reads yet.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// What a connection beyond the bound is told.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// Bounds on connections; see [`serve`].
#[derive(Debug, Clone)]
#[must_use]
pub struct ServeOptions {
    max_connections: usize,
    max_headers: usize,
    max_header_bytes: usize,
    header_timeout: Duration,
    stall_timeout: Duration,
    grace: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_headers: 64,
            max_header_bytes: 32 << 10,
            header_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            grace: Duration::from_secs(5),
        }
    }
}

impl ServeOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many connections there are at a time (4,096). One more is answered 503 and closed.
    pub fn max_connections(mut self, max: usize) -> Self {
        self.max_connections = max;
        self
    }

    /// Sets the most headers of a request (64). More is answered 431.
    pub fn max_headers(mut self, max: usize) -> Self {
        self.max_headers = max;
        self
    }

    /// Sets the most bytes of a request's line and headers (32 KiB; at least 8 KiB), give or take what one read brings. More is answered 431.
    pub fn max_header_bytes(mut self, bytes: usize) -> Self {
        self.max_header_bytes = bytes;
        self
    }

    /// Sets how long a request's headers may take to arrive, and how long a connection may be idle between two requests (10 s).
    pub fn header_timeout(mut self, timeout: Duration) -> Self {
        self.header_timeout = timeout;
        self
    }

    /// Sets how long a client may take nothing of what waits for it (30 s). Then its connection is closed. On Linux, so is that of a
    /// client whose host answers nothing for so long.
    pub fn stall_timeout(mut self, timeout: Duration) -> Self {
        self.stall_timeout = timeout;
        self
    }

    /// Sets how long requests may go on once serving is to stop (5 s). Then they are cut off. Streams end at once.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    fn validate(&self) -> Result<()> {
        check_size("max_connections", self.max_connections, Semaphore::MAX_PERMITS)?;
        check_size("max_headers", self.max_headers, 1 << 16)?;
        check_duration("header_timeout", self.header_timeout)?;
        check_duration("stall_timeout", self.stall_timeout)?;
        if !(8 << 10..=1 << 24).contains(&self.max_header_bytes) {
            return Err(Error::invalid_option("max_header_bytes", "must be from 8 KiB to 16 MiB"));
        }
        if self.grace.is_zero() { Ok(()) } else { check_duration("grace", self.grace) }
    }
}

/// In a request: when serving is to stop, streams end, since their clients come again.
#[derive(Clone)]
pub(crate) struct Stopping(watch::Receiver<()>);

impl Stopping {
    pub(crate) async fn wait(mut self) {
        let _ = self.0.changed().await; // nothing is ever sent: it ends with its sender
    }
}

/// Serves a router over HTTP/1.1 until `stop` resolves and the grace has passed. Streams end at once when it resolves, and their clients
/// resume at the next server; other requests have the grace.
///
/// Any server can serve the router; this one bounds what a client can take: connections, headers and their time, and above all the time
/// in which it takes nothing of a stream. A server without that last bound keeps the subscription of a client that has stalled until TCP
/// gives it up.
///
/// Dropping the future ends every connection at once.
///
/// # Errors
/// `InvalidOption` naming the option.
pub async fn serve(listener: TcpListener, router: Router, options: ServeOptions, stop: impl Future<Output = ()>) -> Result<()> {
    options.validate().map_err(|error| error.during("serve"))?;
    let room = Arc::new(Semaphore::new(options.max_connections));
    let (stopping, stopped) = watch::channel(());
    let router = router.layer(Extension(Stopping(stopped.clone())));
    let mut connections = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            // A new connection's buffer takes that much at once; if it does not, closing says as much.
            let _ = stream.try_write(FULL);
            continue;
        };
        set_up(&stream, options.stall_timeout);
        let (router, options, stopped) = (router.clone(), options.clone(), stopped.clone());
        connections.spawn(async move {
            converse(stream, router, &options, stopped).await;
            drop(permit);
        });
    }
    drop(listener);
    drop(stopping);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(options.grace, ended).await.is_err() {
        connections.shutdown().await;
    }
    Ok(())
}

/// An event is to go out when it is there; and a peer whose host is gone is to be noticed although nothing is sent to it.
fn set_up(stream: &TcpStream, stall_timeout: Duration) {
    let _ = stream.set_nodelay(true); // slower without, and no less right
    let socket = SockRef::from(stream);
    let seconds = stall_timeout.max(Duration::from_secs(1)); // whole ones, as it takes them
    let keepalive = TcpKeepalive::new().with_time(seconds).with_interval(seconds);
    let _ = socket.set_tcp_keepalive(&keepalive);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(stall_timeout));
}

async fn converse(stream: TcpStream, router: Router, options: &ServeOptions, mut stopped: watch::Receiver<()>) {
    let stream = Arc::new(stream);
    let io = TokioIo::new(Patient { stream: stream.clone(), patience: options.stall_timeout, clock: None });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout)
        .max_headers(options.max_headers)
        .max_buf_size(options.max_header_bytes)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let mut stopping = pin!(stopped.changed().fuse());
    let mut hung_up = pin!(hung_up(&stream));
    let ended = loop {
        tokio::select! {
            ended = &mut connection => break ended,
            () = &mut hung_up => return,
            _ = &mut stopping => connection.as_mut().graceful_shutdown(),
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke off");
    }
}

/// Waits until the peer has hung up. Hyper does not see that behind bytes which it has no use for yet.
async fn hung_up(stream: &TcpStream) {
    while let Ok(ready) = stream.ready(Interest::READABLE).await
        && !ready.is_read_closed()
    {
        tokio::time::sleep(LOOK_AGAIN).await; // it stays ready until hyper reads
    }
}

/// A connection whose writes fail if the peer takes nothing for too long.
struct Patient {
    stream: Arc<TcpStream>,
    patience: Duration,
    clock: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    /// Writes as soon as there is room.
    fn poll(&mut self, cx: &mut Context<'_>, write: impl Fn(&TcpStream) -> io::Result<usize>) -> Poll<io::Result<usize>> {
        let written = loop {
            match self.stream.poll_write_ready(cx) {
                Poll::Ready(Ok(())) => match write(&self.stream) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    written => break Poll::Ready(written),
                },
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        self.wait(cx, written)
    }

    fn wait(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.clock = None;
            return written;
        }
        let patience = self.patience;
        let clock = self.clock.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(clock.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl AsyncRead for Patient {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read_buf(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream| stream.try_write(buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream| stream.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match SockRef::from(&*self.stream).shutdown(std::net::Shutdown::Write) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }
}
