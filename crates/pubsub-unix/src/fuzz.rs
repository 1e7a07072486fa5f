//! What is fuzzed: both tongues, from the bytes of a stranger to the broker that has to bear them. The targets in `fuzz/` call these, and
//! so does a bounded test on made-up input.
//!
//! In each the first byte says how long the pieces are in which the rest arrives.

use bytes::Bytes;
use pubsub_core::{EventId, Timestamp};

use crate::broker::{Broker, Patience};
use crate::frame::{self, Decoder, Frame};
use crate::ledger::{Ledger, Limits};
use crate::node::envelope::{escaped, plain};
use crate::node::guest::Guest;
use crate::node::host::Host;
use crate::node::lines::{Lines, Stamp, understand};
use crate::protocol::{FromBroker, ToBroker};

const LIMITS: Limits = Limits { max_events: 8, max_bytes: 4096 };
const PATIENCE: Patience = Patience { absent: 250, silent: 10_000 };

/// How many turns a broker may need before it is idle: what is asked in one is answered in the next.
const TURNS: u64 = 4;

fn pieces(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (length, rest) = data.split_first().map_or((1, data), |(length, rest)| (usize::from(*length).max(1), rest));
    rest.chunks(length)
}

/// Frames, as a broker and as a client reads them.
///
/// # Panics
/// If they are not what they should be.
pub fn frames(data: &[u8]) {
    let mut decoder = Decoder::default();
    let mut broker = Broker::new(Ledger::new(7, LIMITS), PATIENCE, 0);
    assert_eq!(broker.connected(1, 1, 1, 0), Ok(None));
    for piece in pieces(data) {
        decoder.buffer.extend_from_slice(piece);
        loop {
            match decoder.next() {
                Ok(Some(body)) => {
                    stays_itself::<ToBroker>(&body);
                    stays_itself::<FromBroker>(&body);
                    if broker.received(1, body, 1).is_err() {
                        return; // it would be cut off
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        settle(&mut broker);
    }
    settle(&mut broker);
}

/// What can be read can be written, and reads back as itself.
fn stays_itself<T: Frame + PartialEq + std::fmt::Debug>(body: &Bytes) {
    let Ok(read) = frame::body::<T>(body) else { return };
    let mut written = Vec::new();
    frame::encode(&read, &mut written).expect("it came in a frame");
    assert_eq!(frame::body::<T>(&Bytes::from(written).slice(frame::HEADER..)).as_ref(), Ok(&read));
}

fn settle(broker: &mut Broker) {
    for turn in 0..TURNS {
        broker.turn(2 + turn, |_| Ok(()));
    }
}

/// Lines, as a broker and as a client of a TypeScript broker reads them.
///
/// # Panics
/// If they are not what they should be.
pub fn lines(data: &[u8]) {
    let stamp = || Stamp { id: EventId::random(), created_at: Timestamp::now() };
    let mut lines = Lines::default();
    let mut broker = Broker::new(Ledger::new(7, LIMITS), PATIENCE, 0);
    assert_eq!(broker.connected(1, 1, 1, 0), Ok(None));
    let mut guest = Guest::new(1);
    let mut host = Host::new(1, LIMITS, PATIENCE, 0);
    host.connected(1, 0);
    for piece in pieces(data) {
        lines.buffer.extend_from_slice(piece);
        loop {
            match lines.next() {
                Ok(Some(line)) => {
                    comes_back(&line);
                    if guest.hear(&line, stamp).is_err() {
                        return; // it would be cut off
                    }
                    host.told(&line, 1);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        for turn in 0..TURNS {
            for frame in guest.frames() {
                let mut bytes = Vec::new();
                frame::encode(&frame, &mut bytes).expect("no longer than the line it came from");
                let body = Bytes::from(bytes).slice(frame::HEADER..);
                assert!(broker.received(1, body, 2).is_ok(), "what a guest says is understood");
            }
            for (_, frame) in broker.turn(3 + turn, |_| Ok(())).frames {
                guest.told(frame, stamp);
            }
            are_lines(&guest.lines());
            guest.written();
            host.turn(3 + turn);
            are_lines(&host.lines());
        }
    }
}

/// Plain data that is told to TypeScript peers comes back as it is.
fn comes_back(line: &Bytes) {
    // `serde_json` reads no numbers beyond a double, which are passed on all the same: then there is nothing to compare.
    let value = |json: &Bytes| serde_json::from_slice::<serde_json::Value>(json).ok();
    let Some(before) = value(line) else { return };
    let Some(told) = escaped(line) else { return };
    let back = plain(&told).expect("it was not too deep before");
    assert_eq!(value(&back).as_ref(), Some(&before));
}

/// What is said to a TypeScript peer it understands.
fn are_lines(said: &[u8]) {
    assert!(said.is_empty() || said.ends_with(b"\n"));
    for line in said.split_inclusive(|byte| *byte == b'\n') {
        assert!(understand(&Bytes::copy_from_slice(line)).is_some(), "{}", String::from_utf8_lossy(line));
    }
}
