//! Events to and from what travels.

use std::sync::Arc;

use bytes::Bytes;
use pubsub_core::{
    Cursor, Error, ErrorKind, Event, ReplayIndex, Result, Scope, Start, SubscribeOptions, Timestamp, Topic, dead_letter, wire,
};
use smol_str::SmolStr;

use crate::node::envelope;
use crate::protocol::{Begin, Place};
use crate::record::{Stored, event_id};

/// Events with less JSON than this are copied out of what they came in.
const COPIED: usize = 16 << 10;

/// The event that is kept at this place, with envelopes in its data or without. An index of its own it has from there; a
/// decorator's stays.
pub(crate) fn decode(stored: &Stored, place: Place, tagged: bool) -> Result<Event> {
    let json = stored.json();
    let json = match (stored.is_tagged(), tagged) {
        (true, false) => envelope::plain(&stored.shared_json()),
        (false, true) => envelope::escaped(&stored.shared_json()),
        // A small event is copied out: whoever keeps it would keep all that it came with.
        _ if json.len() < COPIED => Some(Bytes::copy_from_slice(json)),
        _ => Some(stored.shared_json()),
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
    let text = String::from_utf8_lossy(stored.json()).into_owned();
    let created_at = Timestamp::from_millis(stored.created_at()).unwrap_or_else(|_| Timestamp::now());
    let event = Event::stamped(event_id(&stored.id()), "malformed", created_at).with_data(text);
    let letter = dead_letter(&event, topic, options.group.as_ref(), attempt, "not an event");
    Some((to.as_str().into(), Stored::of(&letter, usize::MAX, false).ok()?))
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
