//! The decorator: any bus, with indices, a history and replay from a store.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::{join, join_all};
use parking_lot::Mutex;
use pubsub_core::machinery::{self, Closing, DeliveryQueue, Timer, yield_now_and_then};
use pubsub_core::{
    Capabilities, Closed, Control, Deduplication, Error, ErrorKind, Event, Fate, LeaseProvider, OnGap, Overflow, Page,
    Positions, PubSub, PublishError, PublishOptions, Result, Retention, Start, StatusWatch, SubscribeOptions, Subscription,
    Topic, TopicStatus, TrimFilter,
};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::carried::Carried;
use crate::place::{Scopes, first_of, history, is_of};
use crate::sequence::Sequence;
use crate::watch::{Held, Log, MEMBER, PAGE, Watch, Watched};
use crate::{CachingBuilder, Generation, LogPage, OnStoreFailure, ServerCache};

/// Any bus, with a dense index for each event, a history, and replay. Clones are the same instance; see the [crate](crate) for what
/// it promises.
#[derive(Clone)]
pub struct CachingPubSub(Arc<Instance>);

struct Instance {
    inner: Arc<dyn PubSub>,
    store: Arc<dyn ServerCache>,
    config: CachingBuilder,
    capabilities: Capabilities,
    scopes: Scopes,
    timer: Mutex<Option<Arc<Timer>>>,
    next: AtomicU64,
    watches: Mutex<Watches>,
    /// Begun while nothing can be attached.
    closing: Closing<Result<Closed, ErrorKind>>,
    uncached: AtomicU64,
    me: Weak<Self>,
}

#[derive(Default)]
struct Watches {
    open: HashMap<u64, (Topic, Arc<Watched>)>,
    /// Queues of watches that have ended while their consumers held something.
    held_on: Vec<Weak<DeliveryQueue>>,
}

/// What became of appending.
enum Kept {
    Yes(Vec<Arc<Event>>),
    /// The store failed, and live delivery goes on.
    No,
}

impl CachingPubSub {
    /// A bus over another and a store, with the default configuration.
    pub fn new(inner: Arc<dyn PubSub>, store: Arc<dyn ServerCache>) -> Self {
        Self::builder(inner, store).build().expect("the default configuration is valid")
    }

    /// Configures a bus over another and a store.
    pub fn builder(inner: Arc<dyn PubSub>, store: Arc<dyn ServerCache>) -> CachingBuilder {
        CachingBuilder::new(inner, store)
    }

    pub(crate) fn over(inner: Arc<dyn PubSub>, store: Arc<dyn ServerCache>, config: CachingBuilder) -> Self {
        let mut capabilities = inner.capabilities();
        capabilities.retention = Retention::History;
        capabilities.indexed = true;
        capabilities.deduplication = deduplication(capabilities.deduplication, store.deduplication());
        Self(Arc::new_cyclic(|me| Instance {
            inner,
            store,
            config,
            capabilities,
            scopes: Scopes::default(),
            timer: Mutex::default(),
            next: AtomicU64::new(0),
            watches: Mutex::default(),
            closing: Closing::default(),
            uncached: AtomicU64::new(0),
            me: me.clone(),
        }))
    }

    /// The bus below.
    pub fn inner(&self) -> &Arc<dyn PubSub> {
        &self.0.inner
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn ServerCache> {
        &self.0.store
    }

    /// How many events this instance has published that should have been kept and were not, because the store failed
    /// ([`OnStoreFailure::Continue`]).
    pub fn uncached(&self) -> u64 {
        self.0.uncached.load(Ordering::Relaxed)
    }
}

/// What a repeat comes to over both: the bus below spares groups as far as it recognises repeats, the store spares everybody else.
fn deduplication(below: Deduplication, store: Deduplication) -> Deduplication {
    let window = |kind| match kind {
        Deduplication::Window { events, age } | Deduplication::Retained { events, age } => (events, age),
        _ => (Some(0), None),
    };
    let least = |a: Option<_>, b: Option<_>| a.into_iter().chain(b).min();
    let (events, age) = window(store);
    match below {
        Deduplication::Window { events: below, age: since } => {
            Deduplication::Window { events: least(events, below), age: age.into_iter().chain(since).min() }
        }
        _ => Deduplication::Retained { events, age },
    }
}

impl Instance {
    fn caches(&self, topic: &Topic) -> bool {
        self.config.should_cache.as_ref().is_none_or(|wanted| wanted(topic))
    }

    fn check_open(&self, operation: &'static str, topic: &Topic) -> Result<()> {
        if self.closing.has_begun() { Err(Error::closed().during(operation).on(topic)) } else { Ok(()) }
    }

    fn log(&self, topic: &Topic) -> Log {
        let (timeout, on_failure) = (self.config.store_timeout, self.config.on_store_failure);
        Log { store: self.store.clone(), topic: topic.clone(), timeout, on_failure }
    }

    fn timer(&self) -> Result<Arc<Timer>> {
        let mut timer = self.timer.lock();
        match &*timer {
            Some(timer) => {
                timer.go_on(); // a bus may outlive the runtime it was first used on
                Ok(timer.clone())
            }
            None => Ok(timer.insert(Arc::new(Timer::new()?)).clone()),
        }
    }

    /// What an append came to, or the error that the publish is to fail with.
    fn judge(&self, topic: &Topic, count: usize, appended: Result<Vec<Arc<Event>>>) -> Result<Kept, PublishError> {
        let error = match appended {
            Ok(kept) => return Ok(Kept::Yes(kept)),
            Err(error) => error.during("append").on(topic),
        };
        // The event's fault: no store would take it.
        let refused = matches!(error.kind(), ErrorKind::NotSerializable(_) | ErrorKind::TooLarge { .. });
        if refused {
            return Err(PublishError::none_sent(error, count));
        }
        match self.config.on_store_failure {
            OnStoreFailure::Fail => {
                // Where no answer came, the events may be in the log after all.
                let fate = if error.is_retryable() { Fate::Unknown } else { Fate::NotSent };
                Err(PublishError::new(error, vec![fate; count]))
            }
            OnStoreFailure::Continue => {
                let before = self.uncached.fetch_add(count as u64, Ordering::Relaxed);
                // The first of each thousand: an outage must not flood the log.
                if before / 1000 != (before + count as u64) / 1000 || before == 0 {
                    tracing::warn!(%topic, %error, uncached = before + count as u64, "the store fails: events go out without an index");
                }
                Ok(Kept::No)
            }
        }
    }

    /// What publishing came to for events that are kept.
    fn conclude(
        &self,
        topic: &Topic,
        kept: &[Arc<Event>],
        published: Result<Positions, PublishError>,
    ) -> Result<Positions, PublishError> {
        let Err(error) = published else { return Ok(self.scopes.positions(topic, kept)) };
        // What did not go out is in the log, where those who watch find it: nobody can say that nobody will see it.
        self.tell_watches(topic, kept);
        let fate = |fate: &Fate| if *fate == Fate::NotSent { Fate::Unknown } else { *fate };
        let fates = error.fates().iter().map(fate).collect();
        Err(PublishError::new(Error::from(error), fates))
    }

    /// Makes this instance's watches look for these events in the log.
    fn tell_watches(&self, topic: &Topic, kept: &[Arc<Event>]) {
        let Some(last) = kept.iter().filter_map(|event| event.index()).max_by_key(|place| place.index) else { return };
        let watching = |(of, watched): &(Topic, Arc<Watched>)| (of == topic).then(|| watched.clone());
        let watches: Vec<_> = self.watches.lock().open.values().filter_map(watching).collect();
        for watched in watches {
            watched.known(Generation::from_index(last.generation), last.index + 1);
        }
    }

    /// Keeps events, and publishes them as kept.
    async fn keep_and_publish(
        self: Arc<Self>,
        topic: Topic,
        events: Vec<Arc<Event>>,
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        let appended = tokio::time::timeout(self.config.store_timeout, self.store.append(&topic, &events)).await;
        let appended = appended.unwrap_or_else(|_| Err(ErrorKind::Timeout.into()));
        match self.judge(&topic, events.len(), appended)? {
            Kept::Yes(kept) => self.publish_kept(topic, kept, options).await,
            Kept::No => self.inner.publish(&topic, &events, options).await.map(|_| Positions::none()),
        }
    }

    async fn publish_kept(
        self: Arc<Self>,
        topic: Topic,
        kept: Vec<Arc<Event>>,
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        let published = self.inner.publish(&topic, &kept, options).await;
        self.conclude(&topic, &kept, published)
    }

    /// Where a group's start by index, or behind a cursor of ours, lies on the bus below: behind the last event there that has a lower
    /// index. Other starts are the same there.
    async fn start_below(&self, topic: &Topic, options: &SubscribeOptions) -> Result<Option<Start>> {
        let own = match &options.start {
            Some(start @ Start::Index(_)) => start,
            Some(start @ Start::After(cursor)) if is_of(topic, cursor) => start,
            start => return Ok(start.clone()),
        };
        let log = self.log(topic).read_once(0, 0).await?;
        let first = match (first_of(topic, own, &log), options.on_gap) {
            (Ok(first), _) => first,
            (Err(_), OnGap::Earliest) => return Ok(Some(Start::Earliest)),
            (Err(gap), OnGap::Fail) => return Err(ErrorKind::Gap(gap).into()),
        };
        let lower = |event: &Event| {
            let place = event.index().filter(|place| Some(Generation::from_index(place.generation)) == log.generation)?;
            Some(place.index < first)
        };
        let (mut start, mut from) = (Start::Earliest, Start::Earliest);
        loop {
            let page = self.inner.history(topic, from, PAGE).await?;
            for (cursor, event) in page.entries {
                match lower(&event) {
                    Some(true) => start = Start::After(cursor),
                    Some(false) => return Ok(Some(start)),
                    None => {}
                }
            }
            match page.next {
                Some(next) => from = Start::After(next),
                None => return Ok(Some(start)),
            }
        }
    }

    /// A fan-out subscription on a topic that is kept.
    async fn watch(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let timer = self.timer()?;
        let mut below = options.clone();
        (below.filter, below.ack_mode, below.on_gap) = (None, None, OnGap::Fail);
        below.start = options.start.clone().filter(|start| *start == Start::Latest);
        let log = self.log(topic);
        // What comes live between the two looks at the log's end may be dropped, and is no loss.
        let before = if below.overflow == Overflow::DropOldest { log.read_once(0, 0).await.ok() } else { None };
        let inner = self.inner.subscribe(topic, below).await?;

        // From here on whatever is published is in the log or comes live, or both.
        let start = options.start.clone().unwrap_or(Start::Latest);
        let begun = self.begin(&log, &start, options.on_gap, before).await;
        let sequence = begun.map_err(|error| error.during("subscribe").on(topic))?;

        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let me = self.me.clone();
        let forget = move || {
            if let Some(instance) = me.upgrade() {
                instance.forget(number);
            }
        };
        let watched = Arc::new(Watched::new(inner.handle(), forget));
        {
            let mut watches = self.watches.lock();
            if self.closing.has_begun() {
                return Err(Error::closed().during("subscribe").on(topic));
            }
            watches.open.insert(number, (topic.clone(), watched.clone()));
        }
        let mut held = options.clone();
        held.filter = None; // the subscription made below filters
        let bus = self.inner.clone();
        let letters = machinery::publish_letters(PublishOptions::new(), move || Some(bus.clone()));
        let held = Held::new(held, timer, letters);
        let source = Watch::new(watched.clone(), inner.into_source(), log, sequence, held);
        Ok(Subscription::new(topic.clone(), options, Box::new(source), watched))
    }

    /// A watch has ended.
    fn forget(&self, number: u64) {
        let mut watches = self.watches.lock();
        let Some((_, watched)) = watches.open.remove(&number) else { return };
        if let Some(queue) = watched.held_on() {
            watches.held_on.retain(|queue| queue.strong_count() > 0);
            watches.held_on.push(queue);
        }
        let capacity = watches.open.capacity();
        if capacity > 64 && watches.open.len() < capacity / 4 {
            watches.open.shrink_to_fit(); // a burst of watches gives its memory back
        }
        drop(watches);
        drop(watched); // it may be the last
    }

    /// Where a watch begins.
    async fn begin(&self, log: &Log, start: &Start, on_gap: OnGap, before: Option<LogPage>) -> Result<Sequence> {
        let head = match (log.read_once(0, 0).await, start) {
            (Ok(head), _) => head,
            (Err(error), Start::Latest) if log.on_failure == OnStoreFailure::Continue => {
                tracing::warn!(topic = %log.topic, %error, "the store does not answer: a subscription begins with what comes live");
                return Ok(Sequence::adrift());
            }
            (Err(error), _) => return Err(error),
        };
        let from = match (first_of(&log.topic, start, &head), on_gap) {
            (Ok(from), _) => from,
            (Err(_), OnGap::Earliest) => head.floor,
            (Err(gap), OnGap::Fail) => return Err(ErrorKind::Gap(gap).into()),
        };
        let mut sequence = Sequence::starting(head.generation, from, head.next);
        if let Some(before) = before.filter(|before| before.generation == head.generation) {
            sequence.allow_for_dropped(head.next.saturating_sub(before.next));
        }
        if let Some(wanted) = sequence.wants() {
            // The first page in the call itself: what cannot be replayed refuses the subscription.
            sequence.page(wanted, log.read_once(wanted.from, PAGE).await?, PAGE);
        }
        Ok(sequence)
    }

    /// Closes the bus below and ends every watch, within the time.
    async fn end(
        self: Arc<Self>,
        watches: Vec<Arc<Watched>>,
        held_on: Vec<Arc<DeliveryQueue>>,
        within: Duration,
    ) -> Result<Closed, ErrorKind> {
        let until = Instant::now() + within;
        let relieved = async || {
            let relieved = join_all(watches.iter().map(|watched| watched.relieved()));
            let settled = join_all(held_on.iter().map(|queue| queue.drained()));
            drop(tokio::time::timeout_at(until, join(relieved, settled)).await);
        };
        let (closed, ()) = join(self.inner.close(within), relieved()).await;
        // What the bus below has handed over last may just have come here.
        relieved().await;
        let released: u64 = watches.iter().map(|watched| watched.unread()).sum();
        watches.iter().for_each(|watched| watched.stop());
        let cut_off = watches.iter().map(|watched| watched.revoke()).sum::<u64>();
        let cut_off = cut_off + held_on.iter().map(|queue| queue.revoke(MEMBER)).sum::<u64>();
        let mut closed = closed.map_err(|error| error.kind().clone())?;
        (closed.released, closed.cut_off) = (closed.released + released, closed.cut_off + cut_off);
        Ok(closed)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl PubSub for CachingPubSub {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities.clone()
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        yield_now_and_then().await;
        let instance = &self.0;
        let refused = |error: Error| PublishError::none_sent(error.during("publish").on(topic), events.len());
        instance.check_open("publish", topic).map_err(refused)?;
        if options.local_only || events.is_empty() || !instance.caches(topic) {
            return instance.inner.publish(topic, events, options).await;
        }
        let prepared = machinery::prepare(events, &options, &instance.capabilities).map_err(refused)?;
        let events = prepared.as_deref().unwrap_or(events);
        let Some(appended) = instance.store.append_now(topic, events) else {
            return Carried::new(instance.clone().keep_and_publish(topic.clone(), events.to_vec(), options)).await;
        };
        match instance.judge(topic, events.len(), appended)? {
            Kept::No => instance.inner.publish(topic, events, options).await.map(|_| Positions::none()),
            Kept::Yes(kept) => match instance.inner.publish_now(topic, &kept, &options) {
                Some(published) => instance.conclude(topic, &kept, published),
                None => Carried::new(instance.clone().publish_kept(topic.clone(), kept, options)).await,
            },
        }
    }

    fn publish_now(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Option<Result<Positions, PublishError>> {
        // What is kept may have to wait for the bus below once it is in the log.
        let passes = self.0.check_open("publish", topic).is_ok() && (options.local_only || !self.0.caches(topic));
        passes.then(|| self.0.inner.publish_now(topic, events, options)).flatten()
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.0.check_open("subscribe", topic)?;
        if !self.0.caches(topic) {
            return self.0.inner.subscribe(topic, options).await;
        }
        if options.group.is_none() {
            options.validate(topic, &self.0.capabilities)?;
            return self.0.watch(topic, options).await;
        }
        if matches!(options.start, Some(Start::Index(_))) {
            options.validate(topic, &self.0.capabilities)?;
        }
        let mut options = options;
        options.start = self.0.start_below(topic, &options).await.map_err(|error| error.during("subscribe").on(topic))?;
        self.0.inner.subscribe(topic, options).await
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.0.check_open("history", topic)?;
        if !self.0.caches(topic) {
            return self.0.inner.history(topic, from, limit).await;
        }
        let log = self.0.log(topic);
        let read = async {
            Page::check_limit(limit)?;
            let mut head = log.read_once(0, 0).await?;
            if head.generation.is_none()
                && let Ok(page) = self.0.inner.history(topic, from.clone(), limit).await
                && page.head.is_some()
            {
                return Ok(page); // dead letters, which the bus below keeps by itself
            }
            loop {
                let first = first_of(topic, &from, &head).map_err(ErrorKind::Gap)?;
                if first >= head.next {
                    return Ok(history(topic, head, limit));
                }
                let page = log.read_once(first, limit).await?;
                if page.generation != head.generation {
                    head = LogPage { events: Vec::new(), ..page }; // cleared just now
                    continue;
                }
                if page.floor > first && from != Start::Earliest {
                    return Err(ErrorKind::Gap(pubsub_core::Gap::Trimmed { missed: Some(page.floor - first) }).into());
                }
                return Ok(history(topic, page, limit));
            }
        };
        read.await.map_err(|error: Error| error.during("history").on(topic))
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.0.check_open("clear_topic", topic)?;
        let cleared = if self.0.caches(topic) {
            let cleared = tokio::time::timeout(self.0.config.store_timeout, self.0.store.clear(topic)).await;
            cleared.unwrap_or_else(|_| Err(ErrorKind::Timeout.into())).map_err(|error| error.during("clear_topic").on(topic))
        } else {
            Ok(())
        };
        // Whatever became of the one, the other is cleared too.
        self.0.inner.clear_topic(topic).await.and(cleared)
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.0.check_open("trim_topic", topic)?;
        let trimmed = if self.0.caches(topic) {
            let trimmed = tokio::time::timeout(self.0.config.store_timeout, self.0.store.trim(topic, &filter)).await;
            trimmed.unwrap_or_else(|_| Err(ErrorKind::Timeout.into())).map_err(|error| error.during("trim_topic").on(topic))
        } else {
            Ok(0)
        };
        // Where both retain, both have the same events.
        let below = self.0.inner.trim_topic(topic, filter).await?;
        Ok(trimmed?.max(below))
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.0.check_open("inspect", topic)?;
        let mut status = self.0.inner.inspect(topic).await?;
        if self.0.caches(topic) {
            match self.0.log(topic).read_once(0, 0).await {
                Ok(log) if log.generation.is_some() => status.retained = Some(log.kept),
                Ok(_) => {}
                Err(_) => status.retained = None,
            }
        }
        Ok(status)
    }

    fn status(&self) -> StatusWatch {
        self.0.inner.status()
    }

    async fn flush(&self) -> Result<()> {
        self.0.inner.flush().await
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        let runtime = Handle::try_current().map_err(|_| Error::closed().during("close"))?;
        let open: Vec<_> = {
            let mut watches = self.0.watches.lock();
            let open: Vec<_> = watches.open.values().map(|(_, watched)| watched.clone()).collect();
            self.0.closing.begin(&runtime, || {
                let held_on: Vec<_> = watches.held_on.drain(..).filter_map(|queue| queue.upgrade()).collect();
                self.0.clone().end(open.clone(), held_on, within)
            });
            open
        };
        open.iter().for_each(|watched| watched.begin_to_close()); // at once, and not under the lock: it wakes
        self.0.closing.ended().await?.map_err(|kind| Error::new(kind).during("close"))
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        self.0.inner.leases()
    }
}

impl fmt::Debug for CachingPubSub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachingPubSub").field("inner", &self.0.inner).field("store", &self.0.store).finish_non_exhaustive()
    }
}
