//! One consumer's view of a topic: a stream of deliveries, and handles to stop and watch it.

use std::fmt;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use async_trait::async_trait;
use futures::Stream;
use futures::task::AtomicWaker;

use crate::{AckMode, Delivery, Result, Settlement, SubscribeOptions, SubscriptionStatus, Topic};

/// Where a subscription's deliveries come from: what a backend implements.
///
/// Dropping the source ends the subscription: nothing it had taken and not handed over may be lost to its group.
pub trait Source: Send {
    /// The next delivery, `None` once the subscription has ended, or an error, after which it has ended as well. A
    /// connection that comes back by itself is no error.
    ///
    /// `mode` says who settles: with [`AckMode::Auto`] the delivery is done by being handed over and comes as
    /// [`Delivery::settled`]. It may change between calls. A source that is ready again and again must yield to its
    /// runtime now and then ([`poll_yield`](crate::machinery::poll_yield)).
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>>;
}

/// The side of a subscription that others than its consumer may hold.
#[async_trait]
pub trait Control: Send + Sync + fmt::Debug {
    /// Ends the subscription: the stream yields nothing more, and what was queued is released. Idempotent; any thread.
    fn stop(&self);

    /// Waits until nothing more can arrive after [`stop`](Self::stop). Cancel safe.
    async fn stopped(&self);

    /// Waits until nothing is queued, held, or due to come back. Cancel safe.
    async fn drained(&self);

    /// What the subscription has seen and holds.
    fn status(&self) -> SubscriptionStatus;
}

/// One consumer's view of a topic: a stream of [`Delivery`].
///
/// Read as a stream, a fan-out subscription is settled at hand-over and a group's by hand, unless
/// [`SubscribeOptions::ack_mode`] says otherwise. [`run`](Self::run) and [`batches`](Self::batches) are the other two ways
/// to read it. An `Err` is final. Dropping it unsubscribes.
///
/// Reading is cancel safe: a delivery is either returned or still to come.
pub struct Subscription {
    source: Box<dyn Source>,
    handle: SubscriptionHandle,
    options: Arc<SubscribeOptions>,
    /// Who settles what is read as a stream, and whether there is a filter: of the options, what is asked for every delivery.
    mode: AckMode,
    is_filtered: bool,
    /// Lost before deliveries that the filter rejected, and not told yet.
    lagged: u64,
    ended: bool,
}

impl Subscription {
    /// A subscription over a backend's source; for backends.
    pub fn new(
        topic: Topic,
        options: impl Into<Arc<SubscribeOptions>>,
        source: Box<dyn Source>,
        control: Arc<dyn Control>,
    ) -> Self {
        let handle = SubscriptionHandle(Arc::new(Shared { topic, control, nudge: Arc::default() }));
        let options: Arc<SubscribeOptions> = options.into();
        let usual = if options.group.is_some() { AckMode::Manual } else { AckMode::Auto };
        let (mode, is_filtered) = (options.ack_mode.unwrap_or(usual), options.filter.is_some());
        Self { source, handle, options, mode, is_filtered, lagged: 0, ended: false }
    }

    /// The topic it is on.
    pub fn topic(&self) -> &Topic {
        &self.handle.0.topic
    }

    /// The options it was made with.
    pub fn options(&self) -> &SubscribeOptions {
        &self.options
    }

    /// A handle that stops and watches it from elsewhere.
    pub fn handle(&self) -> SubscriptionHandle {
        self.handle.clone()
    }

    /// What it has seen and holds.
    pub fn status(&self) -> SubscriptionStatus {
        self.handle.status()
    }

    /// Its source alone, for a backend that makes a subscription of its own around it: the new one filters, and says who settles.
    pub fn into_source(self) -> Box<dyn Source> {
        self.source
    }

    /// Ends it and waits until nothing more can arrive. Dropping the future does not undo the end.
    pub async fn unsubscribe(self) {
        let Self { source, handle, .. } = self;
        handle.stop();
        drop(source);
        handle.stopped().await;
    }

    pub(crate) fn nudge(&self) -> Arc<Nudge> {
        self.handle.0.nudge.clone()
    }

    /// Who settles when the consumer reads by outcome (`run`, `batches`).
    pub(crate) fn outcome_mode(&self) -> AckMode {
        self.options.ack_mode.unwrap_or(AckMode::Manual)
    }

    /// The next delivery that passes the filter, settled as `mode` says whatever [`ack_mode`](SubscribeOptions::ack_mode) is.
    #[inline]
    pub(crate) fn poll_delivery(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.is_filtered {
            return self.poll_filtered(cx, mode);
        }
        let next = self.source.poll_next(cx, mode);
        self.ended = matches!(next, Poll::Ready(None | Some(Err(_))));
        next
    }

    fn poll_filtered(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        loop {
            let mut next = std::task::ready!(self.source.poll_next(cx, mode));
            let Some(Ok(delivery)) = &next else {
                self.ended = true;
                return Poll::Ready(next);
            };
            if !self.rejects(delivery) {
                if self.lagged > 0 {
                    let lagged = mem::take(&mut self.lagged) + delivery.lagged();
                    next = next.map(|delivery| delivery.map(|delivery| delivery.after_losing(lagged)));
                }
                return Poll::Ready(next);
            }
            self.lagged += delivery.lagged();
            if let Some(Ok(delivery)) = next {
                drop(delivery.settle(Settlement::Done));
            }
        }
    }

    fn rejects(&self, delivery: &Delivery) -> bool {
        self.options.filter.as_ref().is_some_and(|filter| !filter.admits(delivery.event()))
    }
}

impl Stream for Subscription {
    type Item = Result<Delivery>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Delivery>>> {
        let mode = self.mode;
        self.poll_delivery(cx, mode)
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("topic", self.topic()).field("options", &self.options).finish()
    }
}

/// A handle on a subscription: stops it and watches it from elsewhere. Cheap to clone; it does not keep it alive.
#[derive(Clone)]
pub struct SubscriptionHandle(Arc<Shared>);

struct Shared {
    topic: Topic,
    control: Arc<dyn Control>,
    nudge: Arc<Nudge>,
}

impl SubscriptionHandle {
    /// Ends the subscription: its stream yields nothing more. Idempotent; may be called from its own handler.
    pub fn stop(&self) {
        self.0.control.stop();
    }

    /// Waits until nothing more can arrive after [`stop`](Self::stop). Cancel safe.
    pub async fn stopped(&self) {
        self.0.control.stopped().await;
    }

    /// Waits until nothing is queued, held by the consumer, or due to come back; partial batches are made due at once.
    ///
    /// New events extend the wait. Not for use inside the subscription's own handler, which is what it waits for. Cancel
    /// safe.
    pub async fn drained(&self) {
        let _draining = self.0.nudge.drain();
        self.0.control.drained().await;
    }

    /// What the subscription has seen and holds.
    pub fn status(&self) -> SubscriptionStatus {
        self.0.control.status()
    }
}

impl fmt::Debug for SubscriptionHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubscriptionHandle").field("topic", &self.0.topic).field("status", &self.status()).finish()
    }
}

/// How a flush reaches a partial batch in the consumer's task.
#[derive(Debug, Default)]
pub(crate) struct Nudge {
    hurried: AtomicBool,
    /// How many wait for the subscription to drain.
    draining: AtomicUsize,
    waker: AtomicWaker,
}

/// Somebody waits for the subscription to drain.
pub(crate) struct Draining<'a>(&'a Nudge);

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        self.0.draining.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Nudge {
    pub(crate) fn hurry(&self) {
        self.hurried.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Hurries, and goes on doing so until the guard is dropped.
    pub(crate) fn drain(&self) -> Draining<'_> {
        self.draining.fetch_add(1, Ordering::AcqRel);
        self.hurry();
        Draining(self)
    }

    /// Whether somebody waits for the subscription to drain.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire) > 0
    }

    /// Whether somebody asked since the last call.
    pub(crate) fn take(&self, cx: &mut Context<'_>) -> bool {
        self.waker.register(cx.waker());
        self.hurried.load(Ordering::Relaxed) && self.hurried.swap(false, Ordering::Acquire)
    }
}
