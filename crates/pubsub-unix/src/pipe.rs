//! The two ends of a connection. Tokio's own are woken whenever the peer has read something, since they always watch for room to write;
//! here that costs more than the reading. These watch for what can be read, and for room only while there is none.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// The most that is read at once.
const MOST: usize = 64 << 10;

/// Splits a connection.
pub(crate) fn split(stream: UnixStream) -> io::Result<(Incoming, Outgoing)> {
    stream.set_nonblocking(true)?;
    let stream = Arc::new(stream);
    let incoming = Incoming(watch(stream.clone(), Interest::READABLE)?);
    Ok((incoming, Outgoing { stream, room: None }))
}

/// Registers one of these with tokio. What replaces the deprecated constructor is `unsafe`, since anything may lie about its
/// descriptor; a stream of the standard library, which owns what it names, does not.
#[allow(deprecated)]
fn watch<T: AsRawFd>(stream: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(stream, interest)
}

/// What comes in.
#[derive(Debug)]
pub(crate) struct Incoming(AsyncFd<Arc<UnixStream>>);

impl AsyncRead for Incoming {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let room = buf.remaining().min(MOST);
            if let Ok(read) = ready.try_io(|stream| (&**stream.get_ref()).read(buf.initialize_unfilled_to(room))) {
                return Poll::Ready(read.map(|count| buf.advance(count)));
            }
        }
    }
}

/// What goes out. Dropped, it ends the connection for whoever reads on the other side.
#[derive(Debug)]
pub(crate) struct Outgoing {
    stream: Arc<UnixStream>,
    /// Watches for room: another descriptor of the same connection.
    room: Option<AsyncFd<UnixStream>>,
}

impl Outgoing {
    /// Writes what there is room for.
    ///
    /// # Errors
    /// `WouldBlock` if there is none, and those of the connection.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.stream).write(bytes)
    }

    /// Waits until there may be room. Cancel safe.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        let room = watch(self.stream.try_clone()?, Interest::WRITABLE)?;
        room.writable().await.map(|mut ready| ready.retain_ready())
    }

    /// Writes all of it.
    pub(crate) async fn write_whole(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.try_write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsyncWrite for Outgoing {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => {
                    self.room = None;
                    return Poll::Ready(written);
                }
            }
            if let Some(room) = &self.room {
                ready!(room.poll_write_ready(cx))?.clear_ready();
            } else {
                self.room = Some(watch(self.stream.try_clone()?, Interest::WRITABLE)?);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.shutdown(Shutdown::Write))
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write); // the peer may have gone
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn what_is_more_than_there_is_room_for_arrives_whole() {
        let (near, far) = UnixStream::pair().unwrap();
        let ((_keep, mut to), (mut from, _)) = (split(near).unwrap(), split(far).unwrap());
        let sent: Vec<u8> = (0..4_000_000u32).map(|byte| (byte % 251) as u8).collect();
        let all = sent.clone();
        let writer = tokio::spawn(async move {
            to.write_all(&all[..2_000_000]).await.unwrap();
            to.write_whole(&all[2_000_000..]).await.unwrap();
        });
        let mut read = Vec::new();
        while from.read_buf(&mut read).await.unwrap() > 0 {}
        writer.await.unwrap();
        assert!(read == sent, "{} bytes of {}", read.len(), sent.len());
    }
}
