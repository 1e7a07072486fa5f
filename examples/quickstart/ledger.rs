//! What became of each event, by id: the proof that none was lost.

use std::collections::HashMap;
use std::fmt;

use parking_lot::Mutex;
use pubsub_core::EventId;
use tokio::sync::Notify;

/// Every so manieth event fails at its first attempt.
const STUMBLES_EVERY: usize = 4;

#[derive(Default)]
pub(crate) struct Ledger {
    state: Mutex<State>,
    settled: Notify,
}

#[derive(Default)]
struct State {
    events: HashMap<EventId, Entry>,
    /// Neither handled nor dead-lettered yet.
    open: u64,
    /// Not heard by the audit yet.
    unheard: u64,
    redelivered: u64,
    unknown: u64,
}

/// How often each thing happened to an event. Small, because there is one for each.
#[derive(Default)]
struct Entry {
    stumbles: bool,
    handled: u8,
    dead: u8,
    heard: u8,
}

impl Ledger {
    /// Enters an event that is about to be published; false if its id is taken.
    pub(crate) fn enter(&self, id: &EventId) -> bool {
        let mut state = self.state.lock();
        if state.events.contains_key(id) {
            return false;
        }
        let stumbles = (state.events.len() + 1).is_multiple_of(STUMBLES_EVERY);
        state.events.insert(id.clone(), Entry { stumbles, ..Entry::default() });
        state.open += 1;
        state.unheard += 1;
        true
    }

    /// Whether the event is one of those whose first attempt fails.
    pub(crate) fn stumbles(&self, id: &EventId) -> bool {
        self.state.lock().events.get(id).is_some_and(|entry| entry.stumbles)
    }

    pub(crate) fn redelivered(&self) {
        self.state.lock().redelivered += 1;
    }

    pub(crate) fn handled(&self, id: &EventId) {
        self.note(id, |entry| &mut entry.handled);
    }

    pub(crate) fn dead(&self, id: &EventId) {
        self.note(id, |entry| &mut entry.dead);
    }

    pub(crate) fn heard(&self, id: &EventId) {
        self.note(id, |entry| &mut entry.heard);
    }

    fn note(&self, id: &EventId, count: impl FnOnce(&mut Entry) -> &mut u8) {
        let mut state = self.state.lock();
        let Some(entry) = state.events.get_mut(id) else {
            state.unknown += 1;
            return;
        };
        let (was_open, was_unheard) = (entry.is_open(), entry.heard == 0);
        let count = count(entry);
        *count = count.saturating_add(1);
        let (is_open, is_unheard) = (entry.is_open(), entry.heard == 0);
        state.open -= u64::from(was_open && !is_open);
        state.unheard -= u64::from(was_unheard && !is_unheard);
        if state.is_settled() {
            self.settled.notify_one();
        }
    }

    /// Waits until every event that was entered has been heard, and handled or dead-lettered. For one waiter. Cancel safe.
    pub(crate) async fn settled(&self) {
        while !self.state.lock().is_settled() {
            self.settled.notified().await;
        }
    }

    /// Goes through the ids and counts.
    pub(crate) fn report(&self) -> Report {
        let state = self.state.lock();
        let count = |what: fn(&Entry) -> bool| state.events.values().filter(|entry| what(entry)).count();
        Report {
            published: state.events.len(),
            heard: count(|entry| entry.heard > 0),
            handled: count(|entry| entry.handled > 0),
            redelivered: state.redelivered,
            dead_lettered: count(|entry| entry.dead > 0),
            lost: count(|entry| entry.is_open() || entry.heard == 0),
            duplicated: count(|entry| u16::from(entry.handled) + u16::from(entry.dead) > 1 || entry.heard > 1),
            unknown: state.unknown,
        }
    }
}

impl State {
    fn is_settled(&self) -> bool {
        self.open == 0 && self.unheard == 0
    }
}

impl Entry {
    fn is_open(&self) -> bool {
        self.handled == 0 && self.dead == 0
    }
}

/// Events, counted by id; `redelivered` counts deliveries.
pub(crate) struct Report {
    published: usize,
    heard: usize,
    handled: usize,
    redelivered: u64,
    pub(crate) dead_lettered: usize,
    /// Neither handled nor dead-lettered, or not heard by the audit.
    lost: usize,
    /// Handled twice, handled and dead-lettered, or heard twice.
    duplicated: usize,
    /// Arrivals with an id that was never published.
    unknown: u64,
}

impl Report {
    pub(crate) fn is_sound(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.unknown == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "    published: {}", self.published)?;
        writeln!(f, "      audited: {}", self.heard)?;
        writeln!(f, "      handled: {}", self.handled)?;
        writeln!(f, "  redelivered: {}", self.redelivered)?;
        writeln!(f, "dead-lettered: {}", self.dead_lettered)?;
        writeln!(f, "         lost: {}", self.lost)?;
        writeln!(f, "   duplicated: {}", self.duplicated)?;
        writeln!(f, "      unknown: {}", self.unknown)
    }
}
