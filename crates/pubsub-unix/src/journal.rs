//! What a log says: a snapshot of the ledger, then the changes since. Bytes only; where they are kept is another matter.

use bytes::Bytes;

use crate::frame;
use crate::ledger::Ledger;
use crate::protocol::{ClientId, ToBroker};

/// A log that begins with this ledger: `u64 length`, which counts itself, and the ledger.
pub(crate) fn begin(ledger: &Ledger) -> postcard::Result<Vec<u8>> {
    let mut bytes = postcard::to_extend(ledger, vec![0; 8])?;
    let length = bytes.len() as u64;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// The ledger that a log leads to; none if its snapshot cannot be read.
pub(crate) fn read(log: &[u8]) -> Option<Ledger> {
    let (snapshot, _) = log.split_first_chunk::<8>()?;
    let snapshot = usize::try_from(u64::from_le_bytes(*snapshot)).ok()?;
    let mut ledger: Ledger = postcard::from_bytes(log.get(8..snapshot)?).ok()?;
    ledger.index();
    replay(&mut ledger, &log[snapshot..]);
    Some(ledger)
}

/// An entry of the log: `u32 length, u64 time, u64 client`, and the frame's body as it came.
pub(crate) fn entry(at: u64, client: ClientId, body: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(16 + body.len()).expect("a frame is shorter");
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&at.to_le_bytes());
    out.extend_from_slice(&client.to_le_bytes());
    out.extend_from_slice(body);
}

/// Applies the entries of a log. One that is cut off at the end was never confirmed, and is not there. Returns how much was read.
fn replay(ledger: &mut Ledger, log: &[u8]) -> usize {
    let mut rest = log;
    while let Some((length, tail)) = rest.split_first_chunk::<4>()
        && let length = u32::from_le_bytes(*length) as usize
        && length >= 16
        && tail.len() >= length
        && let Some((at, body)) = tail[..length].split_first_chunk::<8>()
        && let Some((client, body)) = body.split_first_chunk::<8>()
        // A copy, for events to be parts of: the log is to be forgotten.
        && let Ok(change) = frame::body::<ToBroker>(&Bytes::copy_from_slice(body))
    {
        ledger.apply(u64::from_le_bytes(*at), u64::from_le_bytes(*client), &change);
        rest = &tail[length..];
    }
    log.len() - rest.len()
}
