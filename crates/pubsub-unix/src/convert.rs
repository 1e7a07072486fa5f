//! Events to and from what travels.

use std::sync::Arc;

use bytes::Bytes;
use pubsub_core::{
    Cursor, Error, ErrorKind, Event, EventId, ReplayIndex, Result, Scope, Start, SubscribeOptions, Timestamp, Topic, dead_letter, wire,
};
use smol_str::SmolStr;

use crate::node::envelope;
use crate::protocol::{Begin, Id, Place, Stored};

/// An event as it travels. An index it has is a decorator's, and stays. `tagged`: its data may have envelopes in it.
///
/// # Errors
/// `TooLarge`, and `NotSerializable`.
pub(crate) fn store(event: &Event, limit: usize, tagged: bool) -> Result<Stored> {
    let encoded = event.check_size(limit).and_then(|()| wire::encode(event));
    let json = Bytes::from(encoded.map_err(|error| error.on(event.id()))?);
    let tagged = tagged && envelope::may_be_tagged(&json);
    Ok(Stored { id: event.id().into(), created_at: event.created_at().as_millis(), tagged, json })
}

/// The event that is kept at this place, with envelopes in its data or without. An index of its own it has from there; a
/// decorator's stays.
pub(crate) fn decode(stored: &Stored, place: Place, tagged: bool) -> Result<Event> {
    let json = match (stored.tagged, tagged) {
        (true, false) => envelope::plain(&stored.json),
        (false, true) => envelope::escaped(&stored.json),
        _ => Some(stored.json.clone()),
    };
    let json = json.ok_or_else(|| Error::new(ErrorKind::Decode("nested too deeply".into())))?;
    let event = wire::decode(&json, None)?.event;
    if place.is_foreign() {
        return Ok(event);
    }
    let own = ReplayIndex { generation: place.generation, index: place.offset };
    let index = event.index().unwrap_or(own);
    Ok(event.with_index(Some(index)))
}

/// What cannot be read goes to the dead-letter topic as text, if there is one.
pub(crate) fn letter_of_malformed(
    topic: &Topic,
    options: &SubscribeOptions,
    stored: &Stored,
    attempt: u32,
) -> Option<(SmolStr, Stored)> {
    let to = options.dead_letter.as_ref()?;
    let text = String::from_utf8_lossy(&stored.json).into_owned();
    let id = match &stored.id {
        Id::Uuid(bytes) => EventId::from(uuid::Uuid::from_bytes(*bytes)),
        Id::Text(text) => EventId::new(text).unwrap_or_else(|_| EventId::random()),
    };
    let created_at = Timestamp::from_millis(stored.created_at).unwrap_or_else(|_| Timestamp::now());
    let event = Event::stamped(id, "malformed", created_at).with_data(text);
    let letter = dead_letter(&event, topic, options.group.as_ref(), attempt, "not an event");
    Some((to.as_str().into(), store(&letter, usize::MAX, false).ok()?))
}

/// The scope that a broker's names make.
pub(crate) fn scope(bus: &str, generation: u64) -> Arc<Scope> {
    let named = Scope::new(bus, generation.to_string());
    // Only a broker that is none of ours names a bus otherwise.
    Arc::new(named.unwrap_or_else(|_| Scope::new("unknown", "0").expect("plain text")))
}

/// A start as it travels.
pub(crate) fn begin(start: &Start) -> Begin {
    match start {
        Start::Earliest => Begin::Earliest,
        Start::After(cursor) => Begin::After(Cursor::to_string(cursor)),
        Start::Index(index) => Begin::Index(*index),
        Start::Latest => Begin::Latest,
    }
}
