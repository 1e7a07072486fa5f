//! Frames: `u32 length, u8 flags, body`, little-endian, where the body's first byte is the frame's type. The records of events, where
//! there are any, are the end of the body: the rest of it says how many.
//!
//! The decoder knows no socket: it is given bytes as they come and yields whole frames. The length counts flags and body. Before
//! the first frame each side sends one line of JSON, so that a peer of another kind, or of another version, is told from ours.

use bytes::{Buf, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::node::host::PROBE;
use crate::record::Run;

/// The longest frame: what is longer disconnects its sender. Leaves room for a `max_payload` of 32 MiB and its wrapping.
pub(crate) const MAX_FRAME: usize = 64 << 20;

/// What comes before a body: its length and the flags.
pub(crate) const HEADER: usize = 5;

/// How much is read at once at least.
const CHUNK: usize = 64 << 10;

/// The longest greeting.
const MAX_LINE: usize = 4096;

/// A frame of an unknown type with this flag ends the connection; without it, it is skipped.
const CRITICAL: u8 = 1;

/// Why a peer's bytes cannot be understood. The connection is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Malformed {
    TooLong(usize),
    Empty,
    Body,
}

/// What is said: fields, and behind them the records of events, if it bears any.
pub(crate) trait Frame: Serialize + DeserializeOwned {
    fn run(&self) -> Option<&Run>;

    /// Where the records that came with it belong, and how many there have to be.
    fn run_mut(&mut self) -> Option<(&mut Run, usize)>;
}

/// Appends a frame.
///
/// # Errors
/// If it would be longer than [`MAX_FRAME`]; nothing has been appended then.
pub(crate) fn encode<T: Frame>(frame: &T, out: &mut Vec<u8>) -> Result<(), Malformed> {
    let start = out.len();
    out.extend_from_slice(&[0, 0, 0, 0, CRITICAL]);
    postcard::to_extend(frame, Tail(out)).map_err(|_| Malformed::Body)?;
    let parts = frame.run().map_or(&[][..], Run::parts);
    let length = out.len() - start - 4 + parts.iter().map(Bytes::len).sum::<usize>();
    if length > MAX_FRAME {
        out.truncate(start);
        return Err(Malformed::TooLong(length));
    }
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out[start..start + 4].copy_from_slice(&u32::try_from(length).expect("checked above").to_le_bytes());
    Ok(())
}

/// Postcard wants to own what it extends.
struct Tail<'a>(&'a mut Vec<u8>);

impl Extend<u8> for Tail<'_> {
    fn extend<I: IntoIterator<Item = u8>>(&mut self, bytes: I) {
        self.0.extend(bytes);
    }
}

/// Reads a body. The records in it are parts of these bytes, and keep them.
///
/// # Errors
/// If it is not a `T` from its first byte to its last.
pub(crate) fn body<T: Frame>(bytes: &Bytes) -> Result<T, Malformed> {
    let (mut frame, rest) = postcard::take_from_bytes::<T>(bytes).map_err(|_| Malformed::Body)?;
    match frame.run_mut() {
        Some((run, count)) => *run = Run::read(bytes.slice_ref(rest), count)?,
        None if rest.is_empty() => {}
        None => return Err(Malformed::Body),
    }
    Ok(frame)
}

/// Cuts a stream of bytes into frames.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    pub(crate) buffer: BytesMut,
}

impl Decoder {
    /// Whether the first line is the hello of a peer of ours; none until that can be told.
    pub(crate) fn is_hello(&self) -> Option<bool> {
        let end = self.buffer.iter().take(MAX_LINE).position(|byte| *byte == b'\n');
        match end {
            Some(end) => Some(matches!(serde_json::from_slice(&self.buffer[..end]), Ok(Greeting::Hello { .. }))),
            None => (self.buffer.len() >= MAX_LINE).then_some(false),
        }
    }

    /// The greeting, once its line is whole.
    pub(crate) fn greeting(&mut self) -> Result<Option<Greeting>, Malformed> {
        let Some(end) = self.buffer.iter().take(MAX_LINE).position(|byte| *byte == b'\n') else {
            return if self.buffer.len() >= MAX_LINE { Err(Malformed::Body) } else { Ok(None) };
        };
        let line = self.buffer.split_to(end + 1);
        serde_json::from_slice(&line).map(Some).map_err(|_| Malformed::Body)
    }

    /// How much more to make room for before reading: what is lacking of the next frame, or a chunk.
    pub(crate) fn reserve(&mut self) {
        let lacking = self.buffer.first_chunk::<4>().map_or(0, |header| u32::from_le_bytes(*header) as usize);
        self.buffer.reserve(lacking.min(MAX_FRAME).saturating_sub(self.buffer.len()).max(CHUNK));
    }

    /// The body of the next frame, once it is whole.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, Malformed> {
        loop {
            let Some(header) = self.buffer.first_chunk::<4>() else { return Ok(None) };
            let length = u32::from_le_bytes(*header) as usize;
            // Judged before anything of it is awaited: a lie costs no memory.
            if length > MAX_FRAME {
                return Err(Malformed::TooLong(length));
            }
            if length < 2 {
                return Err(Malformed::Empty);
            }
            if self.buffer.len() < 4 + length {
                return Ok(None);
            }
            self.buffer.advance(4);
            let flags = self.buffer.get_u8();
            let body = self.buffer.split_to(length - 1).freeze();
            let known = body[0] < TYPES;
            if known || flags & CRITICAL != 0 {
                return Ok(Some(body));
            }
        }
    }
}

/// How many types there are, in either direction.
const TYPES: u8 = 6;

/// The line each side sends first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(crate) enum Greeting {
    /// A client introduces itself. Its newest session is the one that counts.
    Hello {
        v: u32,
        client: u64,
        session: u64,
    },
    /// Then it asks what a broker of Mastra answers, and ours ignores: so the one is told from the other, and from none.
    Subscribe {
        topic: String,
    },
    Subscribed,
    /// A broker does not serve this user.
    Denied,
    /// A broker answers, with the epoch it claimed.
    Welcome {
        v: u32,
        epoch: u64,
    },
}

impl Greeting {
    /// What a client says first.
    pub(crate) fn hello(client: u64, session: u64) -> Vec<u8> {
        let hello = Self::Hello { v: crate::protocol::VERSION, client, session };
        [hello.line(), Self::probe()].concat()
    }

    /// What is said to a broker to see whether it answers like a TypeScript peer.
    pub(crate) fn probe() -> Vec<u8> {
        Self::Subscribe { topic: PROBE.into() }.line()
    }

    pub(crate) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("plain data is JSON");
        line.push(b'\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::{Query, ToBroker};

    fn frames() -> Vec<ToBroker> {
        vec![
            ToBroker::Ping,
            ToBroker::Ask { id: 7, query: Query::Status { topic: "a topic with more than twenty-three bytes".into() } },
            ToBroker::Cancel { id: u64::MAX },
            ToBroker::Bye,
        ]
    }

    proptest! {
        #[test]
        fn frames_come_whole_however_they_are_cut(cuts in proptest::collection::vec(1usize..9, 0..200)) {
            let greeting = Greeting::Hello { v: 1, client: 9, session: 2 };
            let mut bytes = greeting.line();
            frames().iter().for_each(|frame| encode(frame, &mut bytes).unwrap());
            let (mut decoder, mut found, mut greeted) = (Decoder::default(), Vec::new(), None);
            let mut cuts = cuts.into_iter();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                decoder.buffer.extend_from_slice(now);
                rest = later;
                if greeted.is_none() {
                    greeted = decoder.greeting().unwrap();
                }
                while greeted.is_some() && let Some(frame) = decoder.next().unwrap() {
                    found.push(body::<ToBroker>(&frame).unwrap());
                }
            }
            prop_assert_eq!(greeted, Some(greeting));
            prop_assert_eq!(found, frames());
        }

        #[test]
        fn garbage_is_refused_or_awaited_and_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            decoder.buffer.extend_from_slice(&bytes);
            drop(decoder.greeting());
            while let Ok(Some(frame)) = decoder.next() {
                drop(body::<ToBroker>(&frame));
                drop(body::<crate::protocol::FromBroker>(&frame));
            }
        }
    }

    #[test]
    fn frames_come_whole_wherever_they_are_cut_in_two() {
        let mut bytes = Vec::new();
        frames().iter().for_each(|frame| encode(frame, &mut bytes).unwrap());
        for cut in 0..=bytes.len() {
            let (mut decoder, mut found) = (Decoder::default(), Vec::new());
            for part in [&bytes[..cut], &bytes[cut..]] {
                decoder.buffer.extend_from_slice(part);
                while let Some(frame) = decoder.next().unwrap() {
                    found.push(body::<ToBroker>(&frame).unwrap());
                }
            }
            assert_eq!(found, frames(), "cut at {cut}");
        }
    }

    #[test]
    fn a_lie_about_the_length_is_told_at_once() {
        let mut decoder = Decoder::default();
        decoder.buffer.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decoder.next(), Err(Malformed::TooLong(u32::MAX as usize)));
    }

    #[test]
    fn what_is_unknown_is_skipped_unless_it_is_critical() {
        let mut decoder = Decoder::default();
        decoder.buffer.extend_from_slice(&[3, 0, 0, 0, 0, 99, 1]);
        encode(&ToBroker::Ping, &mut { Vec::new() }).unwrap();
        let mut ping = Vec::new();
        encode(&ToBroker::Ping, &mut ping).unwrap();
        decoder.buffer.extend_from_slice(&ping);
        assert_eq!(body(&decoder.next().unwrap().unwrap()), Ok(ToBroker::Ping));
        decoder.buffer.extend_from_slice(&[3, 0, 0, 0, CRITICAL, 99, 1]);
        let critical = decoder.next().unwrap().unwrap();
        assert_eq!(body::<ToBroker>(&critical), Err(Malformed::Body));
    }
}
