//! A topic as one instance sees it: who listens to it here, and the local queues of its groups.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pubsub_core::machinery::{self, Aftermath, DeliveryQueue};
use pubsub_core::{Event, Topic};

use crate::hub::Hub;
use crate::listener::Listener;
use crate::names::Route;

pub(crate) struct Channel {
    pub(crate) topic: Topic,
    pub(crate) route: Route,
    /// The full name of the Google topic.
    pub(crate) google: Arc<str>,
    state: Mutex<State>,
    /// Whether what is malformed was logged.
    warned: AtomicBool,
}

#[derive(Default)]
struct State {
    listeners: Vec<(Arc<Listener>, Arc<Hub>)>,
    /// The hub that further listeners join.
    hub: Option<Arc<Hub>>,
    /// The local queues of groups.
    locals: Vec<Arc<DeliveryQueue>>,
}

/// What of a hub's messages its listeners can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Appetite {
    Hungry,
    Full,
    Nobody,
}

impl Channel {
    pub(crate) fn new(topic: Topic, route: Route, google: Arc<str>) -> Arc<Self> {
        Arc::new(Self { topic, route, google, state: Mutex::default(), warned: AtomicBool::new(false) })
    }

    pub(crate) fn is_idle(&self) -> bool {
        let mut state = self.state.lock();
        state.locals.retain(|queue| !queue.is_ended());
        state.listeners.is_empty() && state.locals.is_empty()
    }

    /// Whether there is a hub that further listeners join.
    pub(crate) fn has_hub(&self) -> bool {
        self.state.lock().hub.is_some()
    }

    /// How many listen.
    pub(crate) fn listeners(&self) -> usize {
        self.state.lock().listeners.len()
    }

    /// Starts to listen: at the hub that all share, which is made if there is none, or at one of its own.
    pub(crate) fn listen(&self, listener: &Arc<Listener>, shared: bool, make: impl FnOnce() -> Arc<Hub>) -> Arc<Hub> {
        let mut state = self.state.lock();
        let hub = state.hub.clone().filter(|_| shared).unwrap_or_else(make);
        if shared {
            state.hub = Some(hub.clone());
        }
        state.listeners.push((listener.clone(), hub.clone()));
        hub
    }

    /// Ends a listening. Returns whether it was the last at its hub, which nobody joins any more.
    pub(crate) fn leave(&self, listener: &Arc<Listener>, hub: &Arc<Hub>) -> bool {
        let mut gone = Vec::new(); // dropped after the lock
        let mut state = self.state.lock();
        gone.extend(state.listeners.extract_if(.., |(known, _)| Arc::ptr_eq(known, listener)));
        if gone.is_empty() || state.listeners.iter().any(|(_, of)| Arc::ptr_eq(of, hub)) {
            return false;
        }
        state.hub.take_if(|shared| Arc::ptr_eq(shared, hub));
        drop(state);
        true
    }

    pub(crate) fn appetite(&self, hub: &Hub) -> Appetite {
        let state = self.state.lock();
        let mut appetite = Appetite::Nobody;
        for (listener, _) in state.listeners.iter().filter(|(_, of)| std::ptr::eq(&**of, hub)) {
            if listener.is_hungry() {
                return Appetite::Hungry;
            }
            appetite = Appetite::Full;
        }
        appetite
    }

    /// Hands what a hub got to all who listen at it.
    pub(crate) fn dispatch(&self, hub: &Hub, events: &[(Arc<Event>, u32, Option<i64>)]) {
        let mut aftermath = Aftermath::new();
        {
            let state = self.state.lock();
            for (listener, _) in state.listeners.iter().filter(|(_, of)| std::ptr::eq(&**of, hub)) {
                listener.push(events, &mut aftermath);
            }
        }
        aftermath.finish();
    }

    /// The hubs that get what is published from now on.
    pub(crate) fn open_hubs(&self) -> Vec<Arc<Hub>> {
        let state = self.state.lock();
        let mut hubs: Vec<Arc<Hub>> = Vec::new();
        for (_, hub) in &state.listeners {
            if hub.is_open() && !hubs.iter().any(|known| Arc::ptr_eq(known, hub)) {
                hubs.push(hub.clone());
            }
        }
        hubs
    }

    /// Who listens at a hub.
    pub(crate) fn listeners_of(&self, hub: &Hub) -> Vec<Arc<Listener>> {
        let state = self.state.lock();
        let of = state.listeners.iter().filter(|(_, of)| std::ptr::eq(&**of, hub));
        of.map(|(listener, _)| listener.clone()).collect()
    }

    /// Does something that nobody else may push meanwhile.
    pub(crate) fn exclusively<R>(&self, push: impl FnOnce(&mut Aftermath) -> R) -> R {
        let mut aftermath = Aftermath::new();
        let done = {
            let _state = self.state.lock();
            push(&mut aftermath)
        };
        aftermath.finish();
        done
    }

    pub(crate) fn add_local(&self, queue: Arc<DeliveryQueue>) {
        self.state.lock().locals.push(queue);
    }

    /// Gives an event that stays within the instance to all queues, or to none and returns one that is full.
    pub(crate) fn offer_locally(&self, event: &Arc<Event>) -> Option<Arc<DeliveryQueue>> {
        let mut aftermath = Aftermath::new();
        {
            let mut state = self.state.lock();
            state.locals.retain(|queue| !queue.is_ended());
            let queues = || state.listeners.iter().map(|(listener, _)| &listener.queue).chain(&state.locals);
            if let Some(full) = queues().find(|queue| queue.room() == 0) {
                return Some(full.clone());
            }
            queues().for_each(|queue| queue.push([machinery::Entry::new(event.clone())], &mut aftermath));
        }
        aftermath.finish();
        None
    }

    pub(crate) fn warn(&self, message: &str, why: &str) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(topic = %self.topic, message, why, "a message that is no event is passed over; further ones are only counted");
        }
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("topic", &self.topic).finish_non_exhaustive()
    }
}
