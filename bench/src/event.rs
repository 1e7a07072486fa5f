//! The event that everybody carries, and what publishers and subscribers do with it besides carrying it.

use std::hint::black_box;
use std::sync::Arc;

use pubsub_core::{Event, Result};
use serde::{Deserialize, Serialize};

/// The payload in each event: 256 bytes.
const PAYLOAD: &str = match std::str::from_utf8(&[b'x'; 256]) {
    Ok(text) => text,
    Err(_) => unreachable!(),
};

/// The bound of every queue, ours and the peers'.
pub(crate) const QUEUE: usize = 256;

/// The data of an event.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) number: u64,
    pub(crate) payload: String,
}

/// Builds and stamps one event, as a publisher does for each.
pub(crate) fn build(number: u64) -> Arc<Event> {
    of(number, PAYLOAD.into())
}

/// An event with a payload of this size.
pub(crate) fn build_of(number: u64, size: usize) -> Arc<Event> {
    of(number, if size == PAYLOAD.len() { PAYLOAD.into() } else { "x".repeat(size) })
}

fn of(number: u64, payload: String) -> Arc<Event> {
    Arc::new(Event::new("order.placed").with_run_id("run-1").with_data(Sample { number, payload }))
}

/// Reads an event's data, as a subscriber does with each, and gives its number.
pub(crate) fn read(event: &Event) -> Result<u64> {
    let sample = event.data::<Sample>()?;
    black_box(sample.payload.len());
    Ok(sample.number)
}
