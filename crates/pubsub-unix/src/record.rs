//! An event as it travels and is kept: the very bytes that its publisher wrote, which brokers pass on and nobody writes again.
//!
//! A record is `u32 length, i64 time, u8 flags, u8 n, id, json`, little-endian: the length counts what follows it, the time is in
//! milliseconds since 1970, and the id is n bytes of text, or for n = 0 the 16 bytes of a uuid. One flag is known: 1, that there may
//! be the envelopes of TypeScript peers in the JSON, which otherwise is plain. Records that travel together are a [`Run`]: one behind
//! the other, at the end of their frame.

use bytes::{BufMut, Bytes};
use pubsub_core::{Event, EventId, Result, Timestamp, wire};
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;
use uuid::Uuid;

use crate::frame::Malformed;
use crate::node::envelope::may_be_tagged;

/// Length, time, flags, and the length of the id.
const HEAD: usize = 4 + 8 + 1 + 1;
const FLAGS: usize = 4 + 8;
const UUID: usize = 16;

/// There may be envelopes in the JSON.
const TAGGED: u8 = 1;

/// An event's id; bytes where it is a uuid.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Id {
    Uuid([u8; UUID]),
    Text(SmolStr),
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stored(Bytes);

impl Stored {
    /// Writes an event.
    ///
    /// # Errors
    /// `TooLarge` if its data and metadata are over the limit, and `NotSerializable`.
    pub(crate) fn of(event: &Event, limit: usize, tagged: bool) -> Result<Self> {
        let mut bytes = Vec::new();
        write(event, limit, tagged, &mut bytes)?;
        Ok(Self(bytes.into()))
    }

    /// A record of JSON that was written elsewhere.
    pub(crate) fn of_json(id: &EventId, created_at: Timestamp, json: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(HEAD + UUID + json.len());
        bytes.extend_from_slice(&[0; 4]);
        bytes.put_i64_le(created_at.as_millis());
        bytes.put_u8(if may_be_tagged(json) { TAGGED } else { 0 });
        write_id(id, &mut bytes);
        bytes.extend_from_slice(json);
        let length = u32::try_from(bytes.len() - 4).expect("it came in a frame");
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        Self(bytes.into())
    }

    /// Whether there may be envelopes in the JSON.
    pub(crate) fn is_tagged(&self) -> bool {
        self.0[FLAGS] & TAGGED != 0
    }

    /// A record of parts: for the model and for tests.
    #[cfg(test)]
    pub(crate) fn text(id: &str, json: &[u8]) -> Self {
        let mut bytes = Vec::new();
        bytes.put_u32_le((HEAD - 4 + id.len() + json.len()).try_into().expect("it is short"));
        bytes.put_i64_le(0);
        bytes.put_u8(0);
        bytes.put_u8(id.len().try_into().expect("it is short"));
        bytes.extend_from_slice(id.as_bytes());
        bytes.extend_from_slice(json);
        Self(bytes.into())
    }

    /// All of it, as it travels.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// Its id as it is written, with what tells a uuid from text.
    pub(crate) fn id_bytes(&self) -> &[u8] {
        &self.0[HEAD - 1..HEAD + self.id_len()]
    }

    pub(crate) fn id(&self) -> Id {
        let id = &self.0[HEAD..HEAD + self.id_len()];
        match (self.0[HEAD - 1], <[u8; UUID]>::try_from(id)) {
            (0, Ok(uuid)) => Id::Uuid(uuid),
            // Looked at when it came: it is text, unless a file was tampered with.
            _ => Id::Text(String::from_utf8_lossy(id).into()),
        }
    }

    fn id_len(&self) -> usize {
        match self.0[HEAD - 1] {
            0 => UUID,
            length => length.into(),
        }
    }

    /// Milliseconds since 1970.
    pub(crate) fn created_at(&self) -> i64 {
        i64::from_le_bytes(self.0[4..FLAGS].try_into().expect("eight bytes"))
    }

    pub(crate) fn json(&self) -> &[u8] {
        &self.0[HEAD + self.id_len()..]
    }

    /// The same, as a part of what it came in.
    pub(crate) fn shared_json(&self) -> Bytes {
        self.0.slice(HEAD + self.id_len()..)
    }

    /// How many bytes it counts for.
    pub(crate) fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

/// Appends the record of an event, whose data has envelopes in it only if it is `tagged`.
///
/// # Errors
/// As [`Stored::of`]; nothing has been appended then.
pub(crate) fn write(event: &Event, limit: usize, tagged: bool, out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    event.check_size(limit)?;
    out.extend_from_slice(&[0; 4]);
    out.put_i64_le(event.created_at().as_millis());
    out.push(0);
    write_id(event.id(), out);
    let json = out.len();
    if let Err(error) = wire::encode_into(event, out) {
        out.truncate(start);
        return Err(error);
    }
    if tagged && may_be_tagged(&out[json..]) {
        out[start + FLAGS] |= TAGGED;
    }
    let length = u32::try_from(out.len() - start - 4).expect("payloads are limited to less");
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    Ok(())
}

fn write_id(id: &EventId, out: &mut Vec<u8>) {
    match id.as_uuid() {
        Some(uuid) => {
            out.push(0);
            out.extend_from_slice(uuid.as_bytes());
        }
        None => {
            let text = id.to_string();
            out.push(u8::try_from(text.len()).expect("an id has 255 bytes at most"));
            out.extend_from_slice(text.as_bytes());
        }
    }
}

/// What an id is to the rest of the system.
pub(crate) fn event_id(id: &Id) -> EventId {
    match id {
        Id::Uuid(bytes) => EventId::from(Uuid::from_bytes(*bytes)),
        Id::Text(text) => EventId::new(text).unwrap_or_else(|_| EventId::random()),
    }
}

/// Records in order, in as many pieces as they came in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Run(Vec<Bytes>);

impl Run {
    /// Records that were written one behind the other.
    pub(crate) fn written(records: Vec<u8>) -> Self {
        Self(vec![records.into()])
    }

    /// What came at the end of a frame.
    ///
    /// # Errors
    /// If these are not so many whole records, each with an id and within its own length.
    pub(crate) fn read(bytes: Bytes, count: usize) -> Result<Self, Malformed> {
        let (mut rest, mut found) = (&bytes[..], 0);
        while let Some((length, tail)) = rest.split_first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            let Some(record) = tail.get(..length) else { return Err(Malformed::Body) };
            let Some(id) = record.get(9).map(|id| usize::from(*id)) else { return Err(Malformed::Body) };
            let is_whole = match id {
                0 => record.len() >= 10 + UUID,
                _ => record.get(10..10 + id).is_some_and(|id| std::str::from_utf8(id).is_ok()),
            };
            if !is_whole {
                return Err(Malformed::Body);
            }
            found += 1;
            rest = &tail[length..];
        }
        if found == count && rest.is_empty() { Ok(Self(vec![bytes])) } else { Err(Malformed::Body) }
    }

    pub(crate) fn parts(&self) -> &[Bytes] {
        &self.0
    }

    pub(crate) fn push(&mut self, stored: Stored) {
        self.0.push(stored.0);
    }

    /// How many bytes all of them have.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|part| part.len() as u64).sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Stored> + '_ {
        self.0.iter().flat_map(|part| {
            let mut rest = part.clone();
            std::iter::from_fn(move || {
                let length = rest.first_chunk::<4>()?;
                let length = 4 + u32::from_le_bytes(*length) as usize;
                Some(Stored(if length == rest.len() { std::mem::take(&mut rest) } else { rest.split_to(length) }))
            })
        })
    }
}

impl FromIterator<Stored> for Run {
    fn from_iter<I: IntoIterator<Item = Stored>>(stored: I) -> Self {
        Self(stored.into_iter().map(|stored| stored.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_record_says_what_its_event_says() {
        for id in [EventId::random(), EventId::new("17").unwrap(), EventId::new("é".repeat(127)).unwrap()] {
            let created_at = pubsub_core::Timestamp::from_millis(-5).unwrap();
            let event = Event::stamped(id.clone(), "t", created_at).with_data(7);
            let stored = Stored::of(&event, 10, false).unwrap();
            assert_eq!((event_id(&stored.id()), stored.created_at()), (id, -5));
            assert_eq!(stored.json(), wire::encode(&event).unwrap());
            assert!(Stored::of(&event, 0, false).is_err());
        }
    }

    proptest! {
        #[test]
        fn a_run_is_read_as_it_was_written(lengths in proptest::collection::vec(0usize..40, 0..9), spoilt in any::<(u16, u8)>()) {
            let written: Vec<Stored> =
                lengths.iter().enumerate().map(|(id, length)| Stored::text(&id.to_string(), &vec![b' '; *length])).collect();
            let mut bytes: Vec<u8> = written.iter().flat_map(|stored| stored.bytes().to_vec()).collect();
            let run = Run::read(bytes.clone().into(), written.len()).unwrap();
            prop_assert_eq!(run.iter().collect::<Vec<_>>(), written.clone());
            prop_assert!(Run::read(bytes.clone().into(), written.len() + 1).is_err());
            // Whatever else it is, it is refused, or can be read without a panic.
            if !bytes.is_empty() {
                let at = usize::from(spoilt.0) % bytes.len();
                bytes[at] = spoilt.1;
                for run in (0..10).filter_map(|count| Run::read(bytes.clone().into(), count).ok()) {
                    run.iter().for_each(|stored| drop((stored.id(), stored.created_at(), stored.json().len())));
                }
            }
        }
    }
}
