//! Inline subscriptions: handlers called in the publisher's task.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pubsub_core::machinery::{InstanceId, contain};
use pubsub_core::{Event, Topic};

use crate::hub::Hub;

/// How deep inline handlers may publish to further inline handlers.
pub const MAX_INLINE_DEPTH: usize = 16;

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

type Handle = dyn Fn(&Arc<Event>) + Send + Sync;

pub(crate) struct Inline {
    instance: InstanceId,
    handler: Box<Handle>,
    ended: AtomicBool,
}

impl Inline {
    pub(crate) fn new(instance: InstanceId, handler: impl Fn(&Arc<Event>) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { instance, handler: Box::new(handler), ended: AtomicBool::new(false) })
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// Whether publishing from here would be too deep within inline handlers.
pub(crate) fn is_too_deep() -> bool {
    DEPTH.get() >= MAX_INLINE_DEPTH
}

/// Calls handlers with events. A panic is caught and logged; it concerns neither the publisher nor the other handlers.
pub(crate) fn call(handlers: &[Arc<Inline>], topic: &Topic, events: &[Arc<Event>], only: Option<InstanceId>) {
    DEPTH.set(DEPTH.get() + 1);
    for event in events {
        for inline in handlers {
            if inline.has_ended() || only.is_some_and(|only| only != inline.instance) {
                continue;
            }
            if let Err(panic) = contain(|| (inline.handler)(event)) {
                tracing::error!(%topic, event = %event.id(), %panic, "an inline handler panicked");
            }
        }
    }
    DEPTH.set(DEPTH.get() - 1);
}

/// An inline subscription. Dropping it unsubscribes: no call begins after that, though one that has begun on another thread may
/// still be running.
#[must_use = "dropping it unsubscribes"]
pub struct InlineSubscription {
    pub(crate) inline: Arc<Inline>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) topic: Topic,
}

impl InlineSubscription {
    /// The topic it is on.
    pub fn topic(&self) -> &Topic {
        &self.topic
    }

    /// Whether it has ended, because its bus was closed.
    pub fn has_ended(&self) -> bool {
        self.inline.has_ended()
    }
}

impl Drop for InlineSubscription {
    fn drop(&mut self) {
        self.inline.end();
        self.hub.tidy(&self.topic);
    }
}

impl fmt::Debug for InlineSubscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineSubscription")
            .field("topic", &self.topic)
            .field("ended", &self.has_ended())
            .finish_non_exhaustive()
    }
}
