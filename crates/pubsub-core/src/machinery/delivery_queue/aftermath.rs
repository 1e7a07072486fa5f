//! What runs code that is not the queue's, and therefore under no lock.

use std::fmt;
use std::sync::Arc;
use std::task::Waker;

use super::{DeliveryQueue, Entry};
use crate::Event;
use crate::contain::contain;

/// What pushing leaves to be done once the caller holds no lock of its own: consumers to wake, and entries that were lost to be
/// dropped. Both run code that is not the queue's. Dropping it does it.
#[derive(Default)]
pub struct Aftermath {
    waker: Option<Waker>,
    more: Option<Box<More>>,
}

/// What most pushes leave nothing of.
#[derive(Default)]
struct More {
    wakers: Vec<Waker>,
    /// Queues for whose room publishers may wait in vain.
    roomy: Vec<Arc<DeliveryQueue>>,
    lost: Vec<Entry>,
}

impl Aftermath {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Does what is to be done; to be called where no lock is held.
    #[inline]
    pub fn finish(self) {}

    /// Tells publishers who wait for this queue's room that there may be some.
    pub(super) fn make_room(&mut self, queue: Arc<DeliveryQueue>) {
        self.more().roomy.push(queue);
    }

    fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    pub(super) fn wake(&mut self, waker: Waker) {
        match self.waker {
            None => self.waker = Some(waker),
            Some(_) => self.more().wakers.push(waker),
        }
    }

    pub(super) fn lose(&mut self, entry: Entry) {
        self.more().lost.push(entry);
    }

    /// Drops an event where no lock is held, too: its payload's destructor is its publisher's code.
    pub fn drop_later(&mut self, event: Arc<Event>) {
        self.lose(Entry::new(event));
    }
}

impl Drop for Aftermath {
    #[inline]
    fn drop(&mut self) {
        if let Some(waker) = self.waker.take() {
            wake(waker);
        }
        if let Some(more) = self.more.take() {
            more.wakers.into_iter().for_each(wake);
            more.roomy.into_iter().for_each(|queue| queue.room.notify_waiters());
            discard(more.lost);
        }
    }
}

impl fmt::Debug for Aftermath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (wakers, lost) = self.more.as_ref().map_or((0, 0), |more| (more.wakers.len(), more.lost.len()));
        let wakers = wakers + usize::from(self.waker.is_some());
        f.debug_struct("Aftermath").field("wakers", &wakers).field("lost", &lost).finish()
    }
}

/// Wakes a consumer, which runs its executor's code: a panic there concerns neither the others nor whoever has to wake them.
pub(super) fn wake(waker: Waker) {
    if let Err(panic) = contain(|| waker.wake()) {
        tracing::error!(%panic, "a consumer's waker panicked");
    }
}

/// Drops entries, of which a payload's destructor may make anything: a panic of one concerns neither the others nor whoever has
/// to let go of them.
pub(super) fn discard(entries: impl IntoIterator<Item = Entry>) {
    for entry in entries {
        let id = entry.event.id().clone();
        if let Err(panic) = contain(|| drop(entry)) {
            tracing::error!(event = %id, %panic, "the destructor of a payload panicked");
        }
    }
}
