//! Batches: a pure policy that decides when events go out together, and the stream that applies it.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::time::{Instant, Sleep};

use crate::contain::contain;
use crate::options::MOST_QUEUED;
use crate::retry::MAX_DURATION;
use crate::runner::{Ended, supervise};
use crate::subscription::Nudge;
use crate::{AckMode, Delivery, Error, Event, Failure, Message, Receipt, Result, Settlement, Subscription};

/// What a full buffer does to a batch policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BatchOverflow {
    /// The oldest event is dropped.
    #[default]
    DropOldest,
    /// The event that just came is dropped.
    DropNewest,
    /// The buffer is coalesced; if that made no room, the oldest is dropped.
    CoalesceThenDropOldest,
}

/// When the events of a subscription go out together (clauses T1 and T2). The default is up to 100 events, at the latest
/// one second after the first.
#[derive(Clone)]
#[non_exhaustive]
pub struct BatchPolicy {
    /// A batch goes out when it has this many events that are not immediate (100).
    pub max_size: usize,
    /// A batch goes out this long after its first event (1 s), none waits for the other triggers.
    pub max_wait: Option<Duration>,
    /// The least time between two batches; the first is not delayed. A flush does not wait for it.
    pub min_interval: Duration,
    /// The most events that wait while `min_interval` holds a batch back; immediate ones do not count (256).
    pub max_buffer_size: usize,
    /// What happens beyond that.
    pub overflow: BatchOverflow,
    is_immediate: Option<Arc<Judge>>,
    coalesce: Option<Arc<Coalesce>>,
}

type Judge = dyn Fn(&Event) -> bool + Send + Sync;
type Coalesce = dyn Fn(&[&Event], &mut KeepSet) + Send + Sync;

/// Which events of a batch a coalescing function keeps; at first all. It can drop, not invent or reorder.
#[derive(Debug, Clone)]
pub struct KeepSet(Vec<bool>);

impl KeepSet {
    /// Drops the event at this place. Immediate events stay all the same.
    ///
    /// # Panics
    /// If there is no event at this place.
    pub fn drop_at(&mut self, place: usize) {
        self.0[place] = false;
    }

    /// Whether the event at this place is kept so far.
    pub fn keeps(&self, place: usize) -> bool {
        self.0.get(place).copied().unwrap_or(false)
    }
}

impl Default for BatchPolicy {
    fn default() -> Self {
        Self {
            max_size: 100,
            max_wait: Some(Duration::from_secs(1)),
            min_interval: Duration::ZERO,
            max_buffer_size: 256,
            overflow: BatchOverflow::default(),
            is_immediate: None,
            coalesce: None,
        }
    }
}

impl BatchPolicy {
    /// The default policy.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many events make a batch.
    #[must_use]
    pub fn max_size(mut self, size: usize) -> Self {
        self.max_size = size;
        self
    }

    /// Sets how long the first event of a batch waits.
    #[must_use]
    pub fn max_wait(mut self, wait: impl Into<Option<Duration>>) -> Self {
        self.max_wait = wait.into();
        self
    }

    /// Sets the least time between two batches.
    #[must_use]
    pub fn min_interval(mut self, interval: Duration) -> Self {
        self.min_interval = interval;
        self
    }

    /// Sets how many events wait while `min_interval` holds a batch back.
    #[must_use]
    pub fn max_buffer_size(mut self, size: usize) -> Self {
        self.max_buffer_size = size;
        self
    }

    /// Sets what happens when the buffer is full.
    #[must_use]
    pub fn overflow(mut self, overflow: BatchOverflow) -> Self {
        self.overflow = overflow;
        self
    }

    /// Events for which this is true send the buffer out at once, themselves last, as soon as `min_interval` allows. A panic is
    /// logged and counts as false.
    #[must_use]
    pub fn is_immediate(mut self, is_immediate: impl Fn(&Event) -> bool + Send + Sync + 'static) -> Self {
        self.is_immediate = Some(Arc::new(is_immediate));
        self
    }

    /// Called with all that waits before a batch of it goes out, to drop what later events made pointless. A panic is logged and keeps all.
    #[must_use]
    pub fn coalesce(mut self, coalesce: impl Fn(&[&Event], &mut KeepSet) + Send + Sync + 'static) -> Self {
        self.coalesce = Some(Arc::new(coalesce));
        self
    }

    /// Checks the options, by themselves and against each other.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidOption`](crate::ErrorKind::InvalidOption) naming the option.
    pub fn validate(&self) -> Result<()> {
        for (option, size) in [("max_size", self.max_size), ("max_buffer_size", self.max_buffer_size)] {
            if size == 0 || size > MOST_QUEUED {
                return Err(Error::invalid_option(option, format!("is {size}; it must be from 1 to {MOST_QUEUED}")));
            }
        }
        if self.max_buffer_size < self.max_size {
            return Err(Error::invalid_option("max_buffer_size", "is smaller than max_size: no batch could fill"));
        }
        if self.max_wait.is_some_and(|wait| wait > MAX_DURATION) {
            return Err(Error::invalid_option("max_wait", "is longer than ten years"));
        }
        if self.min_interval > MAX_DURATION {
            return Err(Error::invalid_option("min_interval", "is longer than ten years"));
        }
        if self.overflow == BatchOverflow::CoalesceThenDropOldest && self.coalesce.is_none() {
            return Err(Error::invalid_option("overflow", "coalesces, but there is no coalesce function"));
        }
        Ok(())
    }
}

impl fmt::Debug for BatchPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchPolicy")
            .field("max_size", &self.max_size)
            .field("max_wait", &self.max_wait)
            .field("min_interval", &self.min_interval)
            .field("max_buffer_size", &self.max_buffer_size)
            .field("overflow", &self.overflow)
            .finish_non_exhaustive()
    }
}

/// The policy's state machine: it is told the time, and says when it wants to be asked again.
pub struct Batcher<T> {
    policy: BatchPolicy,
    buffer: VecDeque<Entry<T>>,
    /// Entries that are not immediate.
    counted: usize,
    last_out: Option<Instant>,
    flush: bool,
}

struct Entry<T> {
    item: T,
    immediate: bool,
    came: Instant,
}

/// What to do with a batch policy's buffer now.
#[derive(Debug, PartialEq, Eq)]
pub enum Due {
    /// Take the batch.
    Now,
    /// Ask again then, or when something was pushed.
    At(Instant),
    /// Ask again when something was pushed.
    Idle,
}

impl<T: AsRef<Event>> Batcher<T> {
    /// An empty buffer under a policy.
    ///
    /// # Errors
    /// Those of [`BatchPolicy::validate`].
    pub fn new(policy: BatchPolicy) -> Result<Self> {
        policy.validate()?;
        Ok(Self { policy, buffer: VecDeque::new(), counted: 0, last_out: None, flush: false })
    }

    /// How many events wait.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether no event waits.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Adds an event and returns those that had to go for it, possibly itself.
    pub fn push(&mut self, now: Instant, item: T) -> Vec<T> {
        let immediate = self.policy.is_immediate.as_ref().is_some_and(|is_immediate| {
            contain(|| is_immediate(item.as_ref())).unwrap_or_else(|panic| {
                tracing::error!(%panic, "an is_immediate function panicked; its event waits like others");
                false
            })
        });
        let mut dropped = Vec::new();
        if !immediate && self.counted >= self.policy.max_buffer_size {
            match self.policy.overflow {
                BatchOverflow::DropNewest => return vec![item],
                BatchOverflow::DropOldest => {}
                BatchOverflow::CoalesceThenDropOldest => dropped = self.coalesce(),
            }
            if self.counted >= self.policy.max_buffer_size {
                dropped.extend(self.drop_oldest());
            }
        }
        self.counted += usize::from(!immediate);
        self.buffer.push_back(Entry { item, immediate, came: now });
        dropped
    }

    /// Makes what waits due at once, whatever the policy says. Nothing if nothing waits.
    pub fn flush(&mut self) {
        self.flush = !self.buffer.is_empty();
    }

    /// Whether a batch is due.
    pub fn due(&self, now: Instant) -> Due {
        let Some(first) = self.buffer.front() else { return Due::Idle };
        if self.flush {
            return Due::Now;
        }
        let full = self.counted >= self.policy.max_size || self.has_immediate();
        let wanted = if full { Some(first.came) } else { self.policy.max_wait.map(|wait| first.came + wait) };
        let Some(wanted) = wanted else { return Due::Idle };
        let at = self.last_out.map_or(wanted, |last| wanted.max(last + self.policy.min_interval));
        if at <= now { Due::Now } else { Due::At(at) }
    }

    /// Takes the next batch, and what coalescing dropped from it. A flush, or the end of the stream, takes all that waits;
    /// otherwise a batch ends with its `max_size`th counted event.
    pub fn take(&mut self, now: Instant) -> (Vec<T>, Vec<T>) {
        let dropped = self.coalesce();
        let mut counted = 0;
        let end = if self.flush || self.has_immediate() {
            self.buffer.len()
        } else {
            let over = |entry: &Entry<T>| {
                counted += usize::from(!entry.immediate);
                counted > self.policy.max_size
            };
            self.buffer.iter().position(over).unwrap_or(self.buffer.len())
        };
        let batch: Vec<T> = self.buffer.drain(..end).map(|entry| entry.item).collect();
        self.counted = self.buffer.iter().filter(|entry| !entry.immediate).count();
        self.flush = false;
        if !batch.is_empty() {
            self.last_out = Some(now);
        }
        (batch, dropped)
    }

    fn has_immediate(&self) -> bool {
        self.buffer.len() > self.counted
    }

    fn drop_oldest(&mut self) -> Option<T> {
        let place = self.buffer.iter().position(|entry| !entry.immediate)?;
        self.counted -= 1;
        self.buffer.remove(place).map(|entry| entry.item)
    }

    fn coalesce(&mut self) -> Vec<T> {
        let Some(coalesce) = self.policy.coalesce.clone().filter(|_| !self.buffer.is_empty()) else { return Vec::new() };
        let mut keep = KeepSet(vec![true; self.buffer.len()]);
        {
            let events: Vec<&Event> = self.buffer.iter().map(|entry| entry.item.as_ref()).collect();
            let mut told = keep.clone();
            match contain(|| coalesce(&events, &mut told)) {
                Ok(()) => keep = told,
                Err(panic) => tracing::error!(%panic, "a coalesce function panicked; its batch is kept whole"),
            }
        }
        let mut dropped = Vec::new();
        let mut kept = VecDeque::with_capacity(self.buffer.len());
        for (place, entry) in self.buffer.drain(..).enumerate() {
            if entry.immediate || keep.keeps(place) {
                kept.push_back(entry);
            } else {
                self.counted -= 1;
                dropped.push(entry.item);
            }
        }
        self.buffer = kept;
        dropped
    }
}

impl<T> fmt::Debug for Batcher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batcher").field("policy", &self.policy).field("len", &self.buffer.len()).finish_non_exhaustive()
    }
}

/// Deliveries that go out together, in order. Dropped unsettled, each is retried.
#[derive(Debug)]
#[must_use = "the deliveries of a batch dropped unsettled are retried"]
pub struct Batch(Vec<Delivery>);

impl Batch {
    /// The deliveries; never empty.
    pub fn deliveries(&self) -> &[Delivery] {
        &self.0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Always false: a batch has at least one delivery.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All are handled.
    pub fn done(self) -> Vec<Receipt> {
        self.settle(&Settlement::Done)
    }

    /// All failed and are retried.
    pub fn retry(self) -> Vec<Receipt> {
        self.settle(&Settlement::Retry { after: None, reason: None })
    }

    /// The deliveries themselves, to be settled one by one.
    pub fn into_deliveries(self) -> Vec<Delivery> {
        self.0
    }

    pub(crate) fn settle(self, settlement: &Settlement) -> Vec<Receipt> {
        self.0.into_iter().map(|delivery| delivery.settle(settlement.clone())).collect()
    }
}

/// A stream of [`Batch`]es over a subscription; made by [`Subscription::batches`].
///
/// A delivery waiting in a partial batch is held, and counts towards `max_in_flight`. Dropping the stream gives what waits
/// back to the subscription's group, uncounted.
pub struct Batches {
    subscription: Subscription,
    batcher: Batcher<Delivery>,
    nudge: Arc<Nudge>,
    clock: Option<Pin<Box<Sleep>>>,
    end: Option<Result<(), Error>>,
}

impl Subscription {
    /// Reads in batches. What the policy drops is settled as done. When the subscription ends, what waits goes out as a last
    /// batch.
    ///
    /// # Errors
    /// `InvalidOption` naming the policy's option, or `max_in_flight` if it is smaller than a batch.
    pub fn batches(self, policy: BatchPolicy) -> Result<Batches> {
        let limit = self.options().max_in_flight;
        if policy.max_size > limit && self.outcome_mode() == AckMode::Manual {
            let reason = format!("is {limit}, less than the batch policy's max_size of {}", policy.max_size);
            return Err(Error::invalid_option("max_in_flight", reason).during("batches").on(self.topic()));
        }
        let nudge = self.nudge();
        let batcher = Batcher::new(policy).map_err(|error| error.during("batches").on(self.topic()))?;
        Ok(Batches { subscription: self, batcher, nudge, clock: None, end: None })
    }

    /// Runs a handler over batches, one at a time, and settles each batch by the handler's outcome: `Ok` is done, an error, a
    /// panic or the policy's time-out is a retry of every delivery in it.
    ///
    /// Returns how many batches were handled when the subscription has ended. Dropping the future cancels the running handler;
    /// its deliveries are retried.
    ///
    /// # Errors
    /// As [`batches`](Self::batches), and the error the subscription ended with.
    pub async fn run_batches<F, Fut>(self, policy: BatchPolicy, handler: F) -> Result<u64>
    where
        F: Fn(Vec<Message>) -> Fut,
        Fut: Future<Output = Result<(), Failure>>,
    {
        let timeout = self.options().retry.handler_timeout;
        let mut batches = self.batches(policy)?;
        let mut handled = 0;
        while let Some(batch) = std::future::poll_fn(|cx| Pin::new(&mut batches).poll_next(cx)).await {
            let batch = batch?;
            let messages = batch.0.iter().map(Message::of).collect();
            let settlement = match supervise(|| handler(messages), batch.deliveries(), timeout).await {
                Ended::Returned(Ok(())) => {
                    handled += 1;
                    Settlement::Done
                }
                Ended::Returned(Err(failure)) | Ended::Failed(failure) => failure.into_settlement(),
                Ended::Revoked => Settlement::Release,
            };
            // Recorded at once; a subscription that settles at hand-over has nothing left to record.
            drop(batch.settle(&settlement));
        }
        Ok(handled)
    }
}

impl Batches {
    /// The subscription below.
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    fn take(&mut self) -> Option<Batch> {
        let (batch, dropped) = self.batcher.take(Instant::now());
        settle_dropped(dropped);
        (!batch.is_empty()).then_some(Batch(batch))
    }

    fn poll_clock(&mut self, cx: &mut Context<'_>, at: Instant) -> Poll<()> {
        let clock = self.clock.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if clock.deadline() != at {
            clock.as_mut().reset(at);
        }
        clock.as_mut().poll(cx)
    }
}

fn settle_dropped(dropped: Vec<Delivery>) {
    for delivery in dropped {
        drop(delivery.done());
    }
}

impl Stream for Batches {
    type Item = Result<Batch>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Batch>>> {
        let this = &mut *self;
        let mode = this.subscription.outcome_mode();
        loop {
            if this.nudge.take(cx) {
                this.batcher.flush();
            }
            if this.end.is_some() {
                this.batcher.flush();
                return Poll::Ready(match this.take() {
                    Some(batch) => Some(Ok(batch)),
                    None => this.end.replace(Ok(())).and_then(Result::err).map(Err),
                });
            }
            let due = this.batcher.due(Instant::now());
            if due == Due::Now {
                // Coalescing may leave nothing of it.
                if let Some(batch) = this.take() {
                    return Poll::Ready(Some(Ok(batch)));
                }
                continue;
            }
            // Immediate events are not dropped, and where hand-over settles nothing else would hold the source back.
            let most = this.batcher.policy.max_buffer_size.max(this.subscription.options().max_in_flight);
            let full = this.batcher.len() >= most;
            let next = if full { Poll::Pending } else { this.subscription.poll_delivery(cx, mode) };
            match next {
                Poll::Ready(Some(Ok(delivery))) => settle_dropped(this.batcher.push(Instant::now(), delivery)),
                Poll::Ready(Some(Err(error))) => this.end = Some(Err(error)),
                Poll::Ready(None) => this.end = Some(Ok(())),
                // Whoever waits for the subscription to drain waits for retries too, and for the batches they come back in.
                Poll::Pending if this.nudge.is_draining() && !this.batcher.is_empty() => this.batcher.flush(),
                Poll::Pending => match due {
                    Due::At(at) if this.poll_clock(cx, at).is_ready() => {}
                    _ => return Poll::Pending,
                },
            }
        }
    }
}

/// What waits was not handed over yet: it is given back, uncounted (clause S2).
impl Drop for Batches {
    fn drop(&mut self) {
        for Entry { item, .. } in self.batcher.buffer.drain(..) {
            drop(item.release());
        }
    }
}

impl fmt::Debug for Batches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batches").field("subscription", &self.subscription).field("batcher", &self.batcher).finish()
    }
}
