//! A fan-out subscription on a topic that is kept: live events and the log, as one sequence.

use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use parking_lot::Mutex;
use pubsub_core::machinery::{Aftermath, DeadLetterSink, DeliveryQueue, Entry, Indexed, InstanceId, Timer, poll_yield};
use pubsub_core::{
    AckMode, Control, Delivery, ErrorKind, Event, Result, Source, SubscribeOptions, SubscriptionHandle, SubscriptionStatus,
    Topic,
};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::place::scope;
use crate::sequence::{Ready, Sequence, Wanted};
use crate::{Generation, LogPage, OnStoreFailure, ServerCache};

/// How many events are read from the store at a time.
pub(crate) const PAGE: usize = 256;

/// How often a read that failed is tried before live delivery goes on without it.
const TRIES: u32 = 4;

/// The back-off between two tries, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The one member of a watch's own queue.
pub(crate) const MEMBER: InstanceId = 0;

/// How a watch reads its topic's log.
#[derive(Clone)]
pub(crate) struct Log {
    pub(crate) store: Arc<dyn ServerCache>,
    pub(crate) topic: Topic,
    pub(crate) timeout: Duration,
    pub(crate) on_failure: OnStoreFailure,
}

impl Log {
    /// One read, within the store's time.
    pub(crate) async fn read_once(&self, from: u64, limit: usize) -> Result<LogPage> {
        let read = tokio::time::timeout(self.timeout, self.store.read(&self.topic, from, limit)).await;
        read.unwrap_or_else(|_| Err(ErrorKind::Timeout.into()))
    }

    /// Reads a page, again and again where trying again can help: a few times if live delivery is to go on without it, else until
    /// it succeeds.
    async fn read(self, from: u64) -> Result<LogPage> {
        let give_up = Instant::now() + self.timeout;
        let mut pause = BACKOFF.0;
        for tries in 1.. {
            let error = match self.read_once(from, PAGE).await {
                Ok(page) => return Ok(page),
                Err(error) => error,
            };
            let goes_on = self.on_failure == OnStoreFailure::Continue;
            if !error.is_retryable() || (goes_on && (tries >= TRIES || Instant::now() >= give_up)) {
                return Err(error);
            }
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
        unreachable!("the tries are not counted out")
    }
}

/// What a watch and those who hold on to it share.
pub(crate) struct Watched {
    inner: SubscriptionHandle,
    /// How many were taken and not handed over, doubled; odd while more is on its way here, or known to be in the log.
    ahead: AtomicUsize,
    /// What closing left unread, though it had been taken or queued.
    left: AtomicU64,
    ended: AtomicBool,
    /// Its bus is closing: what was taken is handed over, and nothing more is read.
    closing: AtomicBool,
    /// Something of this has changed.
    news: AtomicBool,
    /// What the log is known to have, though it may not come live.
    known: Mutex<Option<(Generation, u64)>>,
    waker: AtomicWaker,
    /// Deliveries that their consumer settles; made by the first of them.
    held: OnceLock<(Arc<DeliveryQueue>, SubscriptionHandle)>,
    lagged: AtomicUsize,
    idle: Notify,
    /// How many wait for that.
    waiting: AtomicUsize,
    on_end: Box<dyn Fn() + Send + Sync>,
}

impl Watched {
    pub(crate) fn new(inner: SubscriptionHandle, on_end: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            inner,
            ahead: AtomicUsize::new(0),
            left: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            news: AtomicBool::new(false),
            known: Mutex::default(),
            waker: AtomicWaker::new(),
            held: OnceLock::new(),
            lagged: AtomicUsize::new(0),
            idle: Notify::new(),
            waiting: AtomicUsize::new(0),
            on_end: Box::new(on_end),
        }
    }

    fn tell(&self) {
        self.news.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// The log has what lies below this index, but for what was trimmed: it need not wait for it to come live.
    pub(crate) fn known(&self, generation: Generation, next: u64) {
        {
            let mut known = self.known.lock();
            // Several may be told before they are looked at, in any order.
            let earlier = known.filter(|(of, _)| of.store() == generation.store());
            let told = (generation.number(), next);
            if earlier.is_none_or(|(of, next)| (of.number(), next) < told) {
                *known = Some((generation, next));
            }
        }
        self.tell();
    }

    /// Hands over what was taken, and reads nothing more.
    pub(crate) fn begin_to_close(&self) {
        self.closing.store(true, Ordering::Release);
        self.idle.notify_waiters();
        self.tell();
    }

    /// How many were taken and not handed over.
    fn ahead(&self) -> u64 {
        self.ahead.load(Ordering::Acquire) as u64 / 2
    }

    /// How many were taken, or left where they were because the bus was closing, and not handed over.
    pub(crate) fn unread(&self) -> u64 {
        let waiting = self.held.get().map_or(0, |(queue, _)| queue.burden(MEMBER).1);
        self.ahead() + waiting + self.left.load(Ordering::Acquire)
    }

    /// The queue of what the consumer holds, if it holds anything.
    pub(crate) fn held_on(&self) -> Option<Weak<DeliveryQueue>> {
        self.held.get().filter(|(queue, _)| queue.burden(MEMBER).0 > 0).map(|(queue, _)| Arc::downgrade(queue))
    }

    /// Takes back what the consumer holds, and returns how many deliveries those were.
    pub(crate) fn revoke(&self) -> u64 {
        self.held.get().map_or(0, |(queue, _)| queue.revoke(MEMBER))
    }

    fn set_ahead(&self, count: usize, more: bool) {
        let ahead = 2 * count + usize::from(more);
        if ahead > 0 && !self.closing.load(Ordering::Acquire) {
            return self.ahead.store(ahead, Ordering::Release); // nothing to wait for
        }
        // Ordered against a waiter that counts itself in and then looks.
        self.ahead.store(ahead, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.idle.notify_waiters();
        }
    }

    fn is_idle(&self) -> bool {
        let read = if self.closing.load(Ordering::Acquire) {
            self.ahead.load(Ordering::SeqCst) / 2 == 0 // nothing more is read
        } else {
            self.known.lock().is_none() && self.ahead.load(Ordering::SeqCst) == 0
        };
        (read || self.ended.load(Ordering::Acquire)) && self.held.get().is_none_or(|(queue, _)| queue.is_drained())
    }

    /// Waits until nothing that was taken here is left to hand over or to settle. Cancel safe.
    pub(crate) async fn relieved(&self) {
        let _waiting = Waiting::new(&self.waiting);
        loop {
            let mut changed = pin!(self.idle.notified());
            changed.as_mut().enable();
            if self.is_idle() {
                return;
            }
            match self.held.get() {
                Some((queue, _)) if !queue.is_drained() => queue.drained().await,
                _ => changed.await,
            }
        }
    }
}

/// Counts somebody as waiting.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Control for Watched {
    fn stop(&self) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            self.inner.stop();
            if let Some((_, member)) = self.held.get() {
                member.stop();
            }
            self.idle.notify_waiters();
            self.tell();
            (self.on_end)();
        }
    }

    async fn stopped(&self) {
        self.inner.stopped().await;
    }

    async fn drained(&self) {
        loop {
            self.inner.drained().await;
            self.relieved().await;
            // What left the one may have come to the other meanwhile.
            if self.inner.status().queued == 0 && self.is_idle() {
                return;
            }
        }
    }

    fn status(&self) -> SubscriptionStatus {
        let mut status = self.held.get().map(|(_, member)| member.status()).unwrap_or_default();
        let below = self.inner.status();
        status.queued += below.queued + self.ahead();
        status.dropped += below.dropped;
        status.dead_lettered += below.dead_lettered;
        status.lagged += self.lagged.load(Ordering::Relaxed) as u64;
        status.ended = self.ended.load(Ordering::Acquire);
        status
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("inner", &self.inner).field("ended", &self.ended).finish_non_exhaustive()
    }
}

/// Where a watch's deliveries come from.
pub(crate) struct Watch {
    shared: Arc<Watched>,
    inner: Box<dyn Source>,
    /// Whether the inner subscription has ended.
    silent: bool,
    log: Log,
    sequence: Sequence,
    /// What is being read.
    reading: Option<(Wanted, BoxFuture<'static, Result<LogPage>>)>,
    history: Option<(Generation, Indexed)>,
    /// Whether a complaint was made about numbers of another store.
    complained: bool,
    held: Held,
}

/// Deliveries that their consumer settles: in a queue of this instance, where they are retried without anybody noticing.
pub(crate) struct Held {
    options: SubscribeOptions,
    timer: Arc<Timer>,
    sink: Arc<dyn DeadLetterSink>,
    member: Option<Box<dyn Source>>,
    /// What was put into the queue last and has not come out, and how many were lost right before it.
    put: Option<(Arc<Event>, u64)>,
}

impl Watch {
    pub(crate) fn new(shared: Arc<Watched>, inner: Box<dyn Source>, log: Log, sequence: Sequence, held: Held) -> Self {
        shared.set_ahead(sequence.len(), sequence.wants().is_some());
        Self { shared, inner, silent: false, log, sequence, reading: None, history: None, complained: false, held }
    }

    fn poll(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        loop {
            if self.shared.ended.load(Ordering::Acquire) {
                return Poll::Ready(None);
            }
            if let Poll::Ready(held) = self.held.poll(cx, mode) {
                return Poll::Ready(held);
            }
            let next = match ready!(self.poll_sequence(cx)) {
                Some(Ok(next)) => next,
                Some(Err(error)) => return Poll::Ready(Some(Err(error.during("read").on(&self.log.topic)))),
                None => return Poll::Ready(None),
            };
            if next.lagged > 0 {
                self.shared.lagged.fetch_add(usize::try_from(next.lagged).unwrap_or(usize::MAX), Ordering::Relaxed);
            }
            match mode {
                AckMode::Auto => {
                    self.count_ahead();
                    let mut delivery = Delivery::settled(next.event, next.attempt);
                    if let Some(generation) = next.generation {
                        delivery = delivery.indexed(self.history(generation));
                    }
                    return Poll::Ready(Some(Ok(delivery.after_losing(next.lagged))));
                }
                AckMode::Manual => {
                    let mut entry = Entry::new(next.event);
                    if let Some(generation) = next.generation {
                        entry = entry.indexed(self.history(generation));
                    }
                    self.held.put(&self.log.topic, &self.shared, entry.attempt(next.attempt), next.lagged);
                    self.count_ahead();
                }
            }
        }
    }

    fn count_ahead(&self) {
        self.shared.set_ahead(self.sequence.len(), self.sequence.wants().is_some());
    }

    /// The next of the sequence.
    fn poll_sequence(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Ready>>> {
        if self.held.is_full(&self.shared) {
            return Poll::Pending;
        }
        loop {
            if let Some(ready) = self.sequence.pop() {
                return Poll::Ready(Some(Ok(ready)));
            }
            if self.shared.closing.load(Ordering::Acquire) && self.sequence.wants().is_some() {
                // Behind a gap there is nothing to hand over any more: whoever resumes finds all of it in the log.
                self.reading = None;
                self.silent = true;
                let left = self.sequence.settle_for_less() as u64 + self.shared.inner.status().queued;
                self.shared.left.fetch_add(left, Ordering::AcqRel);
                self.shared.inner.stop();
            }
            // Said before it is taken: whoever waits for this to drain must not find it nowhere.
            self.shared.set_ahead(0, true);
            let taken = if self.sequence.wants().is_some() { self.poll_log(cx).map(Some) } else { self.poll_live(cx) };
            match taken {
                Poll::Ready(Some(Ok(()))) => {}
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => {
                    self.count_ahead();
                    return Poll::Pending;
                }
            }
        }
    }

    fn poll_log(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        // Live events are taken meanwhile: a long replay of a consumer that keeps up makes no publisher wait.
        while self.sequence.len() < PAGE {
            match self.poll_live(cx) {
                Poll::Ready(Some(Ok(()))) => {}
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        let Some(wanted) = self.sequence.wants() else {
            self.reading = None; // it has come live
            return Poll::Ready(Ok(()));
        };
        self.reading.take_if(|(asked, _)| asked.generation != wanted.generation);
        let (wanted, reading) = self.reading.get_or_insert_with(|| (wanted, self.log.clone().read(wanted.from).boxed()));
        let (wanted, read) = (*wanted, ready!(reading.poll_unpin(cx)));
        self.reading = None;
        match read {
            Ok(page) => self.sequence.page(wanted, page, PAGE),
            Err(error) if self.log.on_failure == OnStoreFailure::Continue => {
                tracing::warn!(topic = %self.log.topic, from = wanted.from, %error, "the store does not answer: live delivery goes on without it");
                self.sequence.skip();
            }
            Err(error) => return Poll::Ready(Err(error)),
        }
        Poll::Ready(Ok(()))
    }

    fn poll_live(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<()>>> {
        let closing = self.shared.closing.load(Ordering::Acquire);
        if self.silent {
            // Whoever closes the bus ends this one too, once it was relieved.
            return if closing { Poll::Pending } else { Poll::Ready(None) };
        }
        match ready!(self.inner.poll_next(cx, AckMode::Auto)) {
            Some(Ok(delivery)) => {
                self.sequence.live(delivery.event().clone(), delivery.attempt(), delivery.lagged());
                if self.sequence.has_seen_another_store() && !std::mem::replace(&mut self.complained, true) {
                    tracing::warn!(
                        topic = %self.log.topic,
                        "events come numbered by another store: to be resumed from, publishers and listeners must share one"
                    );
                }
                Poll::Ready(Some(Ok(())))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(error))),
            None => {
                self.silent = true;
                if closing { Poll::Pending } else { Poll::Ready(None) }
            }
        }
    }

    /// The history of this generation.
    fn history(&mut self, generation: Generation) -> &Indexed {
        let known = self.history.take_if(|(known, _)| *known == generation);
        let made = || (generation, Indexed::new(Arc::new(scope(&self.log.topic, generation))));
        &self.history.insert(known.unwrap_or_else(made)).1
    }
}

impl Source for Watch {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        ready!(poll_yield(cx));
        loop {
            if self.shared.news.load(Ordering::Acquire) && self.shared.news.swap(false, Ordering::AcqRel) {
                self.shared.set_ahead(self.sequence.len(), true); // before it is known here alone
                let known = self.shared.known.lock().take();
                if let Some((generation, next)) = known {
                    self.sequence.known(generation, next);
                }
            }
            let polled = self.poll(cx, mode);
            if let Poll::Ready(None | Some(Err(_))) = &polled {
                self.shared.stop(); // nobody reads what would still come
            }
            if polled.is_ready() {
                return polled;
            }
            self.shared.waker.register(cx.waker());
            if !self.shared.news.load(Ordering::Acquire) {
                return Poll::Pending;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.stop();
        self.shared.set_ahead(0, false);
    }
}

impl Held {
    pub(crate) fn new(options: SubscribeOptions, timer: Arc<Timer>, sink: Arc<dyn DeadLetterSink>) -> Self {
        Self { options, timer, sink, member: None, put: None }
    }

    /// What came back, or was put in last.
    fn poll(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let Some(member) = &mut self.member else { return Poll::Pending };
        let next = ready!(member.poll_next(cx, mode));
        Poll::Ready(next.map(|delivery| {
            delivery.map(|delivery| match self.put.take_if(|(event, _)| Arc::ptr_eq(event, delivery.event())) {
                Some((_, lagged)) => delivery.after_losing(lagged),
                None => delivery, // it came back
            })
        }))
    }

    /// Whether what was put in last waits for the consumer to settle something.
    fn is_full(&self, shared: &Watched) -> bool {
        // The queue may also have given it up, if a server had counted too many attempts.
        self.put.is_some() && shared.held.get().is_some_and(|(_, member)| member.status().queued > 0)
    }

    fn put(&mut self, topic: &Topic, shared: &Watched, entry: Entry, lagged: u64) {
        let untold = self.put.take().map_or(0, |(_, lagged)| lagged);
        self.put = Some((entry.event().clone(), untold + lagged));
        let (queue, _) = shared.held.get_or_init(|| {
            let queue = DeliveryQueue::fan_out(topic.clone(), self.timer.clone(), self.sink.clone());
            let member = queue.join(MEMBER, self.options.clone(), || {}).expect("a new queue has not ended");
            let handle = member.handle();
            self.member = Some(member.into_source());
            (queue, handle)
        });
        queue.push([entry], &mut Aftermath::new());
    }
}
