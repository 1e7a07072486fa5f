//! One hand-over of one event, and the means to settle it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use crate::machinery::InstanceId;
use crate::{Cursor, Data, Event, Position, Result, Scope};

/// What a consumer decides about a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settlement {
    /// Handled: it does not come back.
    Done,
    /// It failed: it comes back after the back-off its subscription's policy says, one attempt higher.
    Retry {
        /// Back-off instead of the policy's.
        after: Option<Duration>,
        /// Why; carried into the dead letter if no attempt is left.
        reason: Option<Box<str>>,
    },
    /// It cannot be handled: it goes to the dead-letter topic now, or is dropped if there is none.
    DeadLetter {
        /// Why.
        reason: Box<str>,
    },
    /// Given back unhandled: at once, uncounted, without back-off.
    Release,
}

/// What a settlement came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Settled {
    /// The backend has it.
    Done,
    /// The delivery was no longer this consumer's: it had been lost to another, or its subscription had been closed.
    TooLate,
    /// The backend could not be asked, or cannot tell. The event may come again.
    Unconfirmed,
}

/// A backend's side of deliveries. All methods record at once and never block; they may be called from any thread, with
/// or without a runtime, also long after the subscription has ended.
pub trait Settler: Send + Sync {
    /// Records the settlement of a delivery. Each token is settled at most once.
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt;

    /// Asks for more time: `max_hold` counts anew from now.
    fn extend(&self, token: u64) -> Receipt;

    /// Ready once the delivery is no longer its holder's. Keeps the last waker it was given.
    fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()>;
}

/// One hand-over of one event to one subscription.
///
/// Settling consumes it and records the decision at once; the returned [`Receipt`] only tells what came of it and may be
/// dropped. A delivery dropped unsettled is a retry. Settling twice cannot be written:
///
/// ```compile_fail,E0382
/// fn settle(delivery: pubsub_core::Delivery) {
///     delivery.done();
///     delivery.retry();
/// }
/// ```
#[must_use = "a delivery dropped unsettled is retried"]
pub struct Delivery {
    event: Arc<Event>,
    attempt: u32,
    extras: Option<Arc<Extras>>,
    settler: Option<(Arc<dyn Settler>, u64)>,
}

/// What most deliveries in process do without, kept out of the way: a delivery is moved many times on its way to its consumer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Extras {
    /// Lost right before it.
    pub(crate) lagged: u64,
    /// Where it stands in its topic, where that is retained.
    pub(crate) place: Option<Place>,
    /// The one instance it is for, while it is queued.
    pub(crate) only: Option<InstanceId>,
}

#[derive(Debug, Clone)]
pub(crate) enum Place {
    At(Arc<Scope>, Position),
    /// At the index that the event bears.
    Indexed(Arc<Scope>),
}

impl Place {
    /// The position there of this event.
    pub(crate) fn of(&self, event: &Event) -> Option<(&Arc<Scope>, Position)> {
        match self {
            Self::At(scope, position) => Some((scope, *position)),
            Self::Indexed(scope) => event.index().map(|place| (scope, place.index.into())),
        }
    }
}

/// A history whose events bear their own index: what is said once for all their deliveries, which then cost no allocation. For
/// backends.
#[derive(Debug, Clone)]
pub struct Indexed(Arc<Extras>);

impl Indexed {
    /// In this scope, an event stands at its own [index](Event::index); one without an index stands nowhere.
    pub fn new(scope: Arc<Scope>) -> Self {
        Self(Arc::new(Extras { place: Some(Place::Indexed(scope)), ..Extras::default() }))
    }

    #[inline]
    pub(crate) fn extras(&self) -> Arc<Extras> {
        self.0.clone()
    }
}

impl Delivery {
    /// A delivery that is settled by being handed over; for backends.
    #[inline]
    pub fn settled(event: Arc<Event>, attempt: u32) -> Self {
        Self { event, attempt, extras: None, settler: None }
    }

    /// A delivery that its consumer settles; for backends.
    pub fn held(event: Arc<Event>, attempt: u32, settler: Arc<dyn Settler>, token: u64) -> Self {
        Self { event, attempt, extras: None, settler: Some((settler, token)) }
    }

    /// Adds where the event stands in its topic; for backends that retain.
    pub fn at(mut self, scope: Arc<Scope>, position: impl Into<Position>) -> Self {
        self.extras_mut().place = Some(Place::At(scope, position.into()));
        self
    }

    /// Says that the event stands at its own index; for backends that number events. To be said before anything else about it.
    #[inline]
    pub fn indexed(self, history: &Indexed) -> Self {
        debug_assert!(self.extras.is_none(), "what was said about it would be lost");
        self.with_extras(Some(history.extras()))
    }

    /// Says how many events were lost right before this one; for backends.
    #[inline]
    pub fn after_losing(mut self, lagged: u64) -> Self {
        if lagged != self.lagged() {
            self.extras_mut().lagged = lagged;
        }
        self
    }

    #[inline]
    pub(crate) fn with_extras(mut self, extras: Option<Arc<Extras>>) -> Self {
        self.extras = extras;
        self
    }

    /// It was dropped unsettled.
    #[cold]
    fn give_up(&mut self) {
        if let Some((settler, token)) = self.settler.take() {
            let reason = Some("dropped unsettled".into());
            drop(settler.settle(token, Settlement::Retry { after: None, reason }));
        }
    }

    fn extras_mut(&mut self) -> &mut Extras {
        Arc::make_mut(self.extras.get_or_insert_default())
    }

    /// The event.
    #[inline]
    pub fn event(&self) -> &Arc<Event> {
        &self.event
    }

    /// The data as a `T`; see [`Payload::get`](crate::Payload::get).
    ///
    /// # Errors
    /// [`ErrorKind::Decode`](crate::ErrorKind::Decode) if the data is not a `T`.
    pub fn data<T: DeserializeOwned + 'static>(&self) -> Result<Data<'_, T>> {
        self.event.data()
    }

    /// Which hand-over of this event to this group or fan-out subscription it is; 1 at first.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// How many events this subscription lost right before this one, at a full queue or by trimming.
    #[inline]
    pub fn lagged(&self) -> u64 {
        self.extras.as_ref().map_or(0, |extras| extras.lagged)
    }

    /// Where the event stands in its topic; none where the backend retains nothing.
    pub fn cursor(&self) -> Option<Cursor> {
        let (scope, position) = self.extras.as_ref()?.place.as_ref()?.of(&self.event)?;
        Some(Cursor::new(scope.clone(), position))
    }

    /// Whether it was settled by being handed over.
    pub fn is_settled(&self) -> bool {
        self.settler.is_none()
    }

    /// It is handled.
    #[inline]
    pub fn done(mut self) -> Receipt {
        match self.settler.take() {
            Some((settler, token)) => settler.settle(token, Settlement::Done),
            None => Receipt::ready(Settled::Done),
        }
    }

    /// It failed: retry it as the policy says.
    pub fn retry(self) -> Receipt {
        self.settle(Settlement::Retry { after: None, reason: None })
    }

    /// It failed: retry it after this back-off.
    pub fn retry_after(self, after: Duration) -> Receipt {
        self.settle(Settlement::Retry { after: Some(after), reason: None })
    }

    /// It cannot be handled: dead-letter it now.
    pub fn dead_letter(self, reason: impl Into<Box<str>>) -> Receipt {
        self.settle(Settlement::DeadLetter { reason: reason.into() })
    }

    /// Give it back at once, uncounted.
    pub fn release(self) -> Receipt {
        self.settle(Settlement::Release)
    }

    /// Settles it as decided elsewhere.
    ///
    /// A delivery that was settled by being handed over is [`Settled::Done`] already, and a retry of it is
    /// [`Settled::TooLate`].
    pub fn settle(mut self, settlement: Settlement) -> Receipt {
        match self.settler.take() {
            Some((settler, token)) => settler.settle(token, settlement),
            None if matches!(settlement, Settlement::Done) => Receipt::ready(Settled::Done),
            None => Receipt::ready(Settled::TooLate),
        }
    }

    /// Asks for more time: `max_hold` counts anew from now.
    pub fn extend(&self) -> Receipt {
        match &self.settler {
            Some((settler, token)) => settler.extend(*token),
            None => Receipt::ready(Settled::TooLate),
        }
    }

    /// Waits until this delivery is no longer the consumer's, because it was held past `max_hold` or its bus was closed.
    /// Never resolves for one that was settled by being handed over. Cancel safe.
    pub async fn revoked(&self) {
        std::future::poll_fn(|cx| self.poll_revoked(cx)).await;
    }

    pub(crate) fn poll_revoked(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.settler {
            Some((settler, token)) => settler.poll_revoked(*token, cx),
            None => Poll::Pending,
        }
    }
}

impl AsRef<Event> for Delivery {
    fn as_ref(&self) -> &Event {
        &self.event
    }
}

impl Drop for Delivery {
    #[inline]
    fn drop(&mut self) {
        if self.settler.is_some() {
            self.give_up();
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("event", &self.event)
            .field("attempt", &self.attempt)
            .field("lagged", &self.lagged())
            .field("settled", &self.is_settled())
            .finish()
    }
}

/// What came of a settlement: a future that resolves once the backend has it.
///
/// The settlement is recorded whether or not this is polled; dropping it loses only the answer.
#[derive(Debug)]
pub struct Receipt(ReceiptState);

#[derive(Debug)]
enum ReceiptState {
    Ready(Settled),
    Pending(oneshot::Receiver<Settled>),
}

impl Receipt {
    /// A receipt whose answer is known.
    pub fn ready(settled: Settled) -> Self {
        Self(ReceiptState::Ready(settled))
    }

    /// A receipt whose answer comes later. A sender dropped without an answer means [`Settled::Unconfirmed`].
    pub fn pending() -> (oneshot::Sender<Settled>, Self) {
        let (sender, receiver) = oneshot::channel();
        (sender, Self(ReceiptState::Pending(receiver)))
    }

    /// The answer, if it is known already.
    pub fn now(&self) -> Option<Settled> {
        match &self.0 {
            ReceiptState::Ready(settled) => Some(*settled),
            ReceiptState::Pending(_) => None,
        }
    }
}

impl Future for Receipt {
    type Output = Settled;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Settled> {
        let settled = match &mut self.0 {
            ReceiptState::Ready(settled) => return Poll::Ready(*settled),
            ReceiptState::Pending(receiver) => match Pin::new(receiver).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(answer) => answer.unwrap_or(Settled::Unconfirmed),
            },
        };
        self.0 = ReceiptState::Ready(settled);
        Poll::Ready(settled)
    }
}
