//! An event in a queue, or on its way into one.

use std::sync::Arc;

use super::InstanceId;
use crate::delivery::{Extras, Indexed, Place};
use crate::{Delivery, Event, Position, Scope};

/// An event on its way into a queue. Clones share what is said about it.
#[derive(Debug, Clone)]
pub struct Entry {
    pub(super) event: Arc<Event>,
    pub(super) attempt: u32,
    pub(super) extras: Option<Arc<Extras>>,
}

impl Entry {
    /// An event at its first attempt, for any instance, retained nowhere.
    #[inline]
    pub fn new(event: Arc<Event>) -> Self {
        Self { event, attempt: 1, extras: None }
    }

    /// Sets its attempt: a server has counted.
    #[must_use]
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.attempt = attempt;
        self
    }

    /// Adds where it stands in its topic, where that is retained.
    #[must_use]
    pub fn at(mut self, scope: Arc<Scope>, position: impl Into<Position>) -> Self {
        self.extras().place = Some(Place::At(scope, position.into()));
        self
    }

    /// Says that it stands at its own index, where that is retained. To be said before anything else about it.
    #[must_use]
    pub fn indexed(self, history: &Indexed) -> Self {
        debug_assert!(self.extras.is_none(), "what was said about it would be lost");
        Self { extras: Some(history.extras()), ..self }
    }

    /// The event.
    pub fn event(&self) -> &Arc<Event> {
        &self.event
    }

    /// Where it stands in its topic.
    pub fn position(&self) -> Option<Position> {
        self.extras.as_ref()?.place.as_ref()?.of(&self.event).map(|(_, position)| position)
    }

    /// Makes it local to one instance.
    #[must_use]
    pub fn only(mut self, instance: InstanceId) -> Self {
        self.extras().only = Some(instance);
        self
    }

    pub(super) fn is_only_for(&self) -> Option<InstanceId> {
        self.extras.as_ref()?.only
    }

    /// How many were lost right before it.
    pub(super) fn lagged(&self) -> u64 {
        self.extras.as_ref().map_or(0, |extras| extras.lagged)
    }

    pub(super) fn after_losing(mut self, lagged: u64) -> Self {
        if lagged != self.lagged() {
            self.extras().lagged = lagged;
        }
        self
    }

    fn extras(&mut self) -> &mut Extras {
        Arc::make_mut(self.extras.get_or_insert_default())
    }

    /// The delivery of this entry that is settled by being handed over.
    pub(super) fn settled(self) -> Delivery {
        Delivery::settled(self.event, self.attempt).with_extras(self.extras)
    }
}
