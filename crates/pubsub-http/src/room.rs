//! What the streams of one topic share: the text of each event, which is written once for all of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::BytesMut;
use parking_lot::Mutex;
use pubsub_core::{Cursor, Delivery, Event, Result, Topic, wire};

use crate::sse;

/// How many texts a topic's streams share at a time.
const SHARED: usize = 512;

/// The longest text that is shared: longer ones cost more to keep than to write.
const MAX_SHARED_BYTES: usize = 8 << 10;

/// The topics that are followed just now.
#[derive(Debug, Default)]
pub(crate) struct Rooms(Mutex<HashMap<Topic, Arc<Room>>>);

impl Rooms {
    /// A place among the streams of a topic.
    pub(crate) fn enter(self: &Arc<Self>, topic: &Topic) -> Seat {
        let mut rooms = self.0.lock();
        let room = rooms.entry(topic.clone()).or_default().clone();
        room.seats.fetch_add(1, Ordering::Relaxed);
        Seat { rooms: self.clone(), topic: topic.clone(), room }
    }

    /// How many streams there are.
    pub(crate) fn seats(&self) -> usize {
        self.0.lock().values().map(|room| room.seats.load(Ordering::Relaxed)).sum()
    }
}

/// One stream's place. Dropping it leaves.
#[derive(Debug)]
pub(crate) struct Seat {
    rooms: Arc<Rooms>,
    topic: Topic,
    room: Arc<Room>,
}

impl Seat {
    pub(crate) fn room(&self) -> &Room {
        &self.room
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let left = {
            let mut rooms = self.rooms.0.lock();
            // Counted under the lock of the rooms, as entering is: nobody enters a room that is being taken away.
            if self.room.seats.fetch_sub(1, Ordering::Relaxed) == 1 { rooms.remove(&self.topic) } else { None }
        };
        drop(left); // its events may be the last of their kind: their destructors run without the lock
    }
}

#[derive(Debug, Default)]
pub(crate) struct Room {
    seats: AtomicUsize,
    /// None before there is somebody to share with.
    texts: OnceLock<Box<[Mutex<Option<Text>>]>>,
}

#[derive(Debug)]
struct Text {
    /// Held, so that no other event can come to lie at its address.
    event: Arc<Event>,
    cursor: Option<Cursor>,
    text: Box<[u8]>,
}

impl Room {
    /// Adds an event as its stream writes it.
    ///
    /// # Errors
    /// `NotSerializable` if its payload cannot leave the process.
    pub(crate) fn write(&self, delivery: &Delivery, cursor: Option<&Cursor>, out: &mut BytesMut) -> Result<()> {
        let event = delivery.event();
        if self.seats.load(Ordering::Relaxed) < 2 {
            sse::message(out, cursor, &wire::encode(event)?);
            return Ok(());
        }
        let shared = self.slot(event);
        if let Some(text) = shared.lock().as_ref().filter(|text| text.is_of(event, cursor)) {
            out.extend_from_slice(&text.text);
            return Ok(());
        }
        let begin = out.len();
        sse::message(out, cursor, &wire::encode(event)?);
        if out.len() - begin <= MAX_SHARED_BYTES {
            let text = Text { event: event.clone(), cursor: cursor.cloned(), text: out[begin..].into() };
            let before = shared.lock().replace(text);
            drop(before);
        }
        Ok(())
    }

    fn slot(&self, event: &Arc<Event>) -> &Mutex<Option<Text>> {
        // Fibonacci hashing: the low bits of an address are alike, the high bits of the product are not.
        let address = Arc::as_ptr(event).addr() as u64;
        let texts = self.texts.get_or_init(|| (0..SHARED).map(|_| Mutex::default()).collect());
        &texts[(address.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize % SHARED]
    }
}

impl Text {
    fn is_of(&self, event: &Arc<Event>, cursor: Option<&Cursor>) -> bool {
        Arc::ptr_eq(&self.event, event) && self.cursor.as_ref() == cursor
    }
}

#[cfg(test)]
mod tests {
    use pubsub_core::Scope;

    use super::*;

    fn written(room: &Room, event: &Arc<Event>, cursor: Option<&Cursor>) -> String {
        let mut out = BytesMut::new();
        room.write(&Delivery::settled(event.clone(), 1), cursor, &mut out).unwrap();
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn what_is_shared_is_the_same_event_at_the_same_place() {
        let rooms = Arc::new(Rooms::default());
        let topic = Topic::new("t").unwrap();
        let seats = [rooms.enter(&topic), rooms.enter(&topic)];
        let room = seats[0].room();
        let scope = Arc::new(Scope::new("b", "g").unwrap());
        let event = Arc::new(Event::new("x"));
        let at = |major: u64| Cursor::new(scope.clone(), major);
        assert!(written(room, &event, Some(&at(1))).starts_with("id: b.g.1.0\ndata: {"));
        assert_eq!(written(room, &event, Some(&at(1))), written(seats[1].room(), &event, Some(&at(1))));
        assert!(written(room, &event, Some(&at(2))).starts_with("id: b.g.2.0\n"));
        assert!(written(room, &event, None).starts_with("data: "));
        for _ in 0..4 * SHARED {
            let other = Arc::new(Event::new("y"));
            assert!(written(room, &other, None).contains(&other.id().to_string()));
        }
    }

    #[test]
    fn a_room_goes_with_its_last_stream() {
        let rooms = Arc::new(Rooms::default());
        let topic = Topic::new("t").unwrap();
        let (first, second) = (rooms.enter(&topic), rooms.enter(&topic));
        assert_eq!(rooms.seats(), 2);
        drop(first);
        assert_eq!(rooms.seats(), 1);
        drop(second);
        assert!(rooms.0.lock().is_empty());
    }
}
