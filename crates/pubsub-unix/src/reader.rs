//! How a fan-out subscription follows its topic's log: it reads ahead into its queue while there is room, without a task of its own.
//! What reads on is what makes it possible: an answer that arrives, or a consumer that takes something.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pubsub_core::machinery::{Aftermath, DeliveryQueue, Entry};
use pubsub_core::{SubscribeOptions, Topic};
use tokio::sync::watch;

use crate::convert::{letter_of_malformed, scope};
use crate::protocol::{Begin, Place, Query, Request, Stretch};
use crate::remote::Remote;

/// More is asked for when this part of what may be read ahead has room.
const WORTH: usize = 8;

pub(crate) struct Reader {
    remote: Arc<Remote>,
    topic: Topic,
    options: SubscribeOptions,
    queue: Arc<DeliveryQueue>,
    me: Weak<Self>,
    state: Mutex<State>,
    /// Up to where the log has been queued.
    queued: watch::Sender<Place>,
    lagged: AtomicU64,
    malformed: AtomicU64,
    /// Whether something was lost that has not been told.
    untold: AtomicBool,
}

#[derive(Default)]
struct State {
    /// What is to be read next; none until it has started, and after it has ended.
    place: Option<Place>,
    /// What was to be read next in a broker's log, while the broker is a TypeScript peer.
    home: Option<Place>,
    /// The question on its way.
    asked: Option<u64>,
    /// Read, and not queued yet.
    entries: VecDeque<Entry>,
    /// How many are being looked at, to be among them.
    coming: usize,
    /// How many were lost before the event at an offset, until it is handed over.
    lost: BTreeMap<u64, u64>,
}

impl Reader {
    pub(crate) fn new(remote: &Arc<Remote>, topic: &Topic, options: SubscribeOptions, queue: Arc<DeliveryQueue>) -> Arc<Self> {
        remote.link.follow(topic);
        Arc::new_cyclic(|me| Self {
            remote: remote.clone(),
            topic: topic.clone(),
            options,
            queue,
            me: me.clone(),
            state: Mutex::default(),
            queued: watch::Sender::new(Place::default()),
            lagged: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            untold: AtomicBool::new(false),
        })
    }

    /// What was asked will not be answered: another kind of broker has come.
    pub(crate) fn ask_again(&self) {
        self.state.lock().asked = None;
        self.read_on();
    }

    /// Goes on at a place under another kind of broker.
    pub(crate) fn moved(&self, id: u64, place: Place) {
        {
            let mut state = self.state.lock();
            if state.asked != Some(id) || state.place.is_none() {
                return; // ended meanwhile
            }
            (state.asked, state.place) = (None, Some(place));
        }
        self.queued.send_replace(place);
        self.read_on();
    }

    /// What to ask for next: what is new, or where that begins under a broker of another kind than the last.
    fn question(&self, state: &mut State, mut place: Place, most: usize) -> Query {
        let topic = self.topic.as_str().into();
        let foreign = self.remote.link.is_foreign();
        if place.is_foreign() != foreign {
            if foreign {
                state.home = Some(place);
                return Query::Start { topic, begin: Begin::Latest, or_earliest: true };
            }
            let Some(home) = state.home.take() else {
                return Query::Start { topic, begin: Begin::Term, or_earliest: true };
            };
            place = home;
            state.place = Some(home);
        }
        Query::Read { topic, from: place, most: u32::try_from(most).unwrap_or(u32::MAX) }
    }

    /// Starts to read there.
    pub(crate) fn follow(&self, from: Place) {
        self.state.lock().place = Some(from);
        self.queued.send_replace(from);
        self.read_on();
    }

    /// Reads nothing more.
    pub(crate) fn end(&self) {
        let asked = {
            let mut state = self.state.lock();
            state.place = None;
            state.asked.take()
        };
        asked.into_iter().for_each(|id| self.remote.link.cancel(id));
        self.remote.link.unfollow(&self.topic);
        self.queued.send_replace(Place { generation: u64::MAX, offset: u64::MAX });
    }

    /// Waits until the log has been queued up to there. Cancel safe.
    pub(crate) async fn reached(&self, head: Place) {
        let _ = self.queued.subscribe().wait_for(|queued| *queued >= head).await; // the sender is this very reader's
    }

    /// Asks for more, if there is room worth asking for.
    fn ask(&self, state: &mut State, place: Place) {
        let room = self.queue.room().min(self.options.prefetch).saturating_sub(state.entries.len() + state.coming);
        if room >= (self.options.prefetch / WORTH).max(1) && state.asked.is_none() {
            let query = self.question(state, place, room);
            state.asked = self.remote.link.read(query, self.me.clone());
        }
    }

    /// Queues what was read, and asks for more while there is room.
    pub(crate) fn read_on(&self) {
        let mut aftermath = Aftermath::new();
        {
            let mut state = self.state.lock();
            let Some(place) = state.place else { return };
            if !state.entries.is_empty() {
                self.remote.fill(&self.queue, &mut state.entries, &mut aftermath);
            }
            if state.entries.is_empty() && state.coming == 0 {
                self.queued.send_if_modified(|queued| std::mem::replace(queued, place) != place);
            }
            self.ask(&mut state, place);
        }
        aftermath.finish();
    }

    /// An answer came.
    pub(crate) fn arrived(&self, id: u64, stretch: Stretch) {
        let Stretch { next, mut lagged, .. } = stretch;
        self.lagged.fetch_add(lagged, Ordering::Relaxed);
        let scope = scope(&stretch.bus, next.generation);
        let coming = stretch.offsets.len();
        let cleared = {
            let mut state = self.state.lock();
            let Some(place) = state.place.filter(|_| state.asked == Some(id)) else { return }; // ended meanwhile
            (state.asked, state.place, state.coming) = (None, Some(next), coming);
            // Before this is looked at: what comes next travels meanwhile.
            self.ask(&mut state, next);
            place.generation != next.generation
        };
        let (mut entries, mut lost) = (Vec::with_capacity(coming), None);
        for (offset, stored) in stretch.iter() {
            match self.remote.read(&stored, Place { offset, ..next }) {
                Ok(event) => {
                    if lagged > 0 {
                        lost = Some((offset, std::mem::take(&mut lagged)));
                    }
                    let entry = Entry::new(Arc::new(event));
                    entries.push(if next.is_foreign() { entry } else { entry.at(scope.clone(), offset) });
                }
                Err(error) => {
                    if self.malformed.fetch_add(1, Ordering::Relaxed) == 0 {
                        tracing::warn!(topic = %self.topic, %error, "what is no event is passed over");
                    }
                    if let Some((topic, letter)) = letter_of_malformed(&self.topic, &self.options, &stored, 1) {
                        drop(self.remote.link.insist(Request::publish_one(topic, letter)));
                    }
                }
            }
        }
        {
            let mut state = self.state.lock();
            state.coming = 0;
            if state.place.is_none() {
                return; // ended meanwhile
            }
            state.entries.extend(entries);
            if let Some((offset, lost)) = lost {
                state.lost.insert(offset, lost);
                self.untold.store(true, Ordering::Release);
            }
        }
        if cleared {
            // What is queued from before the topic was cleared.
            self.queue.retain(|event| event.index().is_none_or(|index| index.generation >= next.generation));
        }
        self.read_on();
    }

    /// How many were lost before the event at this offset, told once.
    pub(crate) fn lost_before(&self, offset: u64) -> u64 {
        if !self.untold.load(Ordering::Acquire) {
            return 0;
        }
        let mut state = self.state.lock();
        let lost = state.lost.remove(&offset).unwrap_or(0);
        self.untold.store(!state.lost.is_empty(), Ordering::Release);
        lost
    }

    pub(crate) fn lagged(&self) -> u64 {
        self.lagged.load(Ordering::Relaxed)
    }

    pub(crate) fn malformed(&self) -> u64 {
        self.malformed.load(Ordering::Relaxed)
    }
}
