//! One bus within the process: what its instances share.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use pubsub_core::machinery::{Aftermath, DeadLetterSink, InstanceId, Timer};
use pubsub_core::{Error, Event, EventId, Result, Topic};
use smol_str::SmolStr;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::inline::call;
use crate::leases::MemoryLeases;
use crate::topic::TopicState;

/// How many letters a dead-letter topic keeps by default.
pub(crate) const DEFAULT_RETENTION: usize = 1000;

/// How long a dead letter waits for room at live subscribers of its topic; it is kept in the topic's history all the same.
const LETTER_PATIENCE: Duration = Duration::from_secs(5);

/// Named buses of this process. Independent callers that know only a name must meet, so this table cannot be theirs.
static NAMED: LazyLock<Mutex<HashMap<SmolStr, Weak<Hub>>>> = LazyLock::new(Mutex::default);

pub(crate) struct Hub {
    name: Option<SmolStr>,
    /// Names this bus in cursors.
    id: SmolStr,
    retention: usize,
    /// Every publish looks its topic up here.
    topics: RwLock<HashMap<Topic, Arc<TopicState>, foldhash::fast::RandomState>>,
    leases: Arc<MemoryLeases>,
    timer: Mutex<Option<Arc<Timer>>>,
    next: AtomicU64,
    me: Weak<Self>,
}

impl Hub {
    pub(crate) fn new(name: Option<SmolStr>, retention: usize) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            name,
            id: SmolStr::new(EventId::random().to_string()),
            retention,
            topics: RwLock::default(),
            leases: Arc::default(),
            timer: Mutex::default(),
            next: AtomicU64::new(1),
            me: me.clone(),
        })
    }

    /// The bus of this name, made if there is none.
    pub(crate) fn named(name: &SmolStr, retention: Option<usize>) -> Result<Arc<Self>> {
        let mut named = NAMED.lock();
        if let Some(hub) = named.get(name).and_then(Weak::upgrade) {
            drop(named); // this may by now be the last of the bus, whose end locks it
            return match retention {
                Some(other) if other != hub.retention => {
                    let reason = format!("is {other}, but the bus {name:?} exists with {}", hub.retention);
                    Err(Error::invalid_option("dead_letter_retention", reason).during("build"))
                }
                _ => Ok(hub),
            };
        }
        let hub = Self::new(Some(name.clone()), retention.unwrap_or(DEFAULT_RETENTION));
        named.insert(name.clone(), Arc::downgrade(&hub));
        Ok(hub)
    }

    /// A number that nothing else on this bus has.
    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn retention(&self) -> usize {
        self.retention
    }

    pub(crate) fn leases(&self) -> &Arc<MemoryLeases> {
        &self.leases
    }

    /// The timer, on the runtime of whoever needs it first.
    pub(crate) fn timer(&self) -> Result<Arc<Timer>> {
        let mut timer = self.timer.lock();
        match &*timer {
            Some(timer) => {
                timer.go_on(); // a bus may outlive the runtime it was first used on
                Ok(timer.clone())
            }
            None => Ok(timer.insert(Arc::new(Timer::new()?)).clone()),
        }
    }

    /// Where this bus's queues send their dead letters. It does not keep the bus alive.
    pub(crate) fn sink(&self) -> Arc<dyn DeadLetterSink> {
        Arc::new(Letterbox(self.me.clone()))
    }

    /// A topic, if anything is attached to it or kept in it.
    pub(crate) fn topic(&self, topic: &Topic) -> Option<Arc<TopicState>> {
        self.topics.read().get(topic).cloned()
    }

    /// Offers events to a topic; false, with nothing done, if a queue has no room for all of them or publishers wait already.
    #[inline]
    pub(crate) fn offer_all(&self, topic: &Topic, events: &[Arc<Event>], only: Option<InstanceId>) -> bool {
        let mut aftermath = Aftermath::new();
        let inline = {
            let topics = self.topics.read();
            let Some(state) = topics.get(topic.as_str()) else { return true };
            match state.push_all(events, only, &mut aftermath) {
                Some(inline) => inline,
                None => return false,
            }
        };
        aftermath.finish();
        if let Some(inline) = inline {
            call(&inline, topic, events, only);
        }
        true
    }

    /// Attaches something to a topic, made if need be. No topic is forgotten meanwhile.
    pub(crate) fn with_topic<R>(&self, topic: &Topic, attach: impl FnOnce(&Arc<TopicState>) -> R) -> R {
        let mut topics = self.topics.write();
        attach(topics.entry(topic.clone()).or_insert_with(|| Arc::new(TopicState::new(topic.clone()))))
    }

    /// Makes a topic a dead-letter topic, for as long as what is returned lives or a letter is kept.
    pub(crate) fn name_dead_letter(self: &Arc<Self>, topic: &Topic) -> Naming {
        let (naming, aftermath) = self.with_topic(topic, |state| {
            let aftermath = state.keep_letters(self);
            state.named.fetch_add(1, Ordering::AcqRel);
            (Naming { hub: self.clone(), state: state.clone() }, aftermath)
        });
        aftermath.finish();
        naming
    }

    /// Forgets what has ended on a topic, and the topic itself if that leaves nothing.
    pub(crate) fn tidy(&self, topic: &Topic) {
        let mut topics = self.topics.write();
        if topics.get(topic).is_some_and(|state| state.tidy()) {
            topics.remove(topic);
            // A burst of topics gives its memory back.
            if topics.capacity() > 64 && topics.len() < topics.capacity() / 4 {
                topics.shrink_to_fit();
            }
        }
    }
}

/// A subscription's naming of its dead-letter topic.
pub(crate) struct Naming {
    hub: Arc<Hub>,
    state: Arc<TopicState>,
}

impl Drop for Naming {
    fn drop(&mut self) {
        self.state.named.fetch_sub(1, Ordering::AcqRel);
        self.hub.tidy(self.state.topic());
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let mut named = NAMED.lock();
            // Another bus may have taken the name since this one could no longer be reached.
            if named.get(name).is_some_and(|hub| hub.strong_count() == 0) {
                named.remove(name);
            }
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let topics = self.topics.read().len();
        f.debug_struct("Hub").field("name", &self.name).field("topics", &topics).finish_non_exhaustive()
    }
}

/// Takes dead letters: keeps them first, then hands them to whoever listens.
struct Letterbox(Weak<Hub>);

impl DeadLetterSink for Letterbox {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        let hub = self.0.upgrade()?;
        let letter = Arc::new(letter);
        let (state, kept) = hub.with_topic(topic, |state| (state.clone(), state.keep(&hub, &letter)));
        kept.finish();
        if state.offer_letter(&letter) {
            return None;
        }
        let topic = topic.clone();
        let deliver = async move {
            let runtime = Handle::current(); // the queue runs this on its own
            let taken =
                state.wait_for_room(&runtime, Instant::now() + LETTER_PATIENCE, None, || state.offer_letter(&letter)).await;
            if !taken {
                tracing::warn!(%topic, letter = %letter.id(), "a live subscriber's queue is full: it misses a dead letter, which is kept");
            }
        };
        Some(deliver.boxed())
    }
}
