//! An instance's connection to a broker that is a TypeScript peer. What is said on it is `node::host`'s to understand.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::sleep;

use crate::files::clock;
use crate::frame::{Decoder, Malformed};
use crate::link::{Link, MAX_OUT};
use crate::node::host::Host;
use crate::node::lines::Lines;

/// How long to wait after the end of a connection before dialling again: a broker that closes waits for those who come meanwhile.
pub(crate) const CLOSING: Duration = Duration::from_millis(20);

/// How often to look whether the broker still has the socket's name. One that closes waits for those who came meanwhile, and gives its
/// name away before.
const LOOK: Duration = Duration::from_millis(250);

/// Talks with the broker until the connection ends, or the broker's name is another's.
pub(crate) async fn talk(
    link: &Arc<Link>,
    host: &mut Host,
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    said: BytesMut,
    is_named: impl Fn() -> bool,
) -> io::Result<()> {
    let malformed = |why: Malformed| io::Error::new(io::ErrorKind::InvalidData, format!("{why:?}"));
    let (mut lines, mut frames, mut out) = (Lines::over(said), Decoder::default(), BytesMut::new());
    let mut look = tokio::time::interval(LOOK);
    loop {
        // What the broker does not take is left with the link, and its publishers wait.
        if out.len() < MAX_OUT {
            frames.buffer.extend_from_slice(&link.said());
        }
        while let Some(body) = frames.next().map_err(malformed)? {
            host.hear(&body, clock()).map_err(malformed)?;
        }
        while let Some(line) = lines.next().map_err(malformed)? {
            host.told(&line, clock());
        }
        let now = clock();
        let (answers, next) = host.turn(now);
        let answered = !answers.is_empty();
        answers.into_iter().for_each(|frame| link.heard(frame));
        out.extend_from_slice(&host.lines());
        link.eased(!out.is_empty());
        if answered {
            continue; // it may have had something to say to that
        }
        lines.buffer.reserve(64 << 10);
        tokio::select! {
            read = from.read_buf(&mut lines.buffer) => {
                if read? == 0 {
                    return Ok(());
                }
            }
            written = to.write(&out), if out.has_remaining() => out.advance(written?),
            () = link.spoken(), if out.len() < MAX_OUT => {}
            _ = look.tick() => {
                if !is_named() {
                    return Ok(());
                }
            }
            () = sleep(Duration::from_millis(next.saturating_sub(now).max(1))) => {}
        }
    }
}
