//! Handlers: running them over a subscription and settling by their outcome.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::OptionFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;

use crate::contain::contain_async;
use crate::{Cursor, Data, Delivery, Error, Event, Receipt, Result, Settled, Settlement, Subscription};

/// The most settlements whose receipts a runner leaves open before it takes more work.
const MAX_UNCONFIRMED: usize = 1000;

/// What a handler gets to see of a delivery. Its outcome settles it.
#[derive(Debug, Clone)]
pub struct Message {
    event: Arc<Event>,
    attempt: u32,
    lagged: u64,
    cursor: Option<Cursor>,
}

impl Message {
    pub(crate) fn of(delivery: &Delivery) -> Self {
        Self {
            event: delivery.event().clone(),
            attempt: delivery.attempt(),
            lagged: delivery.lagged(),
            cursor: delivery.cursor(),
        }
    }

    /// The event.
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

    /// Which hand-over of this event it is; 1 at first.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// How many events were lost right before this one.
    pub fn lagged(&self) -> u64 {
        self.lagged
    }

    /// Where the event stands in its topic; none where the backend retains nothing.
    pub fn cursor(&self) -> Option<&Cursor> {
        self.cursor.as_ref()
    }
}

/// Why a handler failed, and what is to become of its delivery. Any error becomes a retry by `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure(Settlement);

impl Failure {
    /// Retry as the subscription's policy says.
    pub fn retry(reason: impl Into<Box<str>>) -> Self {
        Self(Settlement::Retry { after: None, reason: Some(reason.into()) })
    }

    /// Retry after this back-off.
    pub fn retry_after(after: Duration, reason: impl Into<Box<str>>) -> Self {
        Self(Settlement::Retry { after: Some(after), reason: Some(reason.into()) })
    }

    /// Dead-letter it now: no retry can help.
    pub fn dead_letter(reason: impl Into<Box<str>>) -> Self {
        Self(Settlement::DeadLetter { reason: reason.into() })
    }

    /// Give it back at once, uncounted: this consumer is not the one for it just now.
    pub fn release() -> Self {
        Self(Settlement::Release)
    }

    /// What is to become of the delivery; for those who run handlers of their own.
    pub fn into_settlement(self) -> Settlement {
        self.0
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::retry(error.to_string())
    }
}

/// What a runner did, in deliveries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunReport {
    /// Handled.
    pub done: u64,
    /// Failed, panicked or timed out, and retried where an attempt was left.
    pub retried: u64,
    /// Dead-lettered by the handler's own decision.
    pub dead_lettered: u64,
    /// Given back by the handler.
    pub released: u64,
    /// Lost to another member while the handler ran; the handler was cancelled.
    pub revoked: u64,
    /// Settlements that came too late or were not confirmed.
    pub unconfirmed: u64,
}

impl Subscription {
    /// Runs a handler over every delivery, at most `concurrency` at a time, and settles by outcome: `Ok` is done, an
    /// error, a panic or the policy's time-out is a retry, and a [`Failure`] can say otherwise. Handlers run in the
    /// caller's task, so they may borrow; they start in the order of the deliveries.
    ///
    /// Returns when the subscription has ended (by its handle, or with its bus) and the handlers that were running have too.
    ///
    /// Dropping the future cancels the running handlers; their deliveries are retried. The subscription can be used again.
    ///
    /// # Errors
    /// `InvalidOption` if `concurrency` is 0, and the error the subscription ended with.
    pub async fn run<F, Fut>(&mut self, concurrency: usize, handler: F) -> Result<RunReport>
    where
        F: Fn(Message) -> Fut,
        Fut: Future<Output = Result<(), Failure>>,
    {
        self.run_each(concurrency, |delivery, timeout| attend(Message::of(&delivery), &handler, delivery, timeout)).await
    }

    /// Like [`run`](Self::run), with each handler in a task of its own, for handlers that compute rather than wait.
    ///
    /// Dropping the future aborts the tasks; their deliveries are retried.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn run_spawned<F, Fut>(&mut self, concurrency: usize, handler: F) -> Result<RunReport>
    where
        F: Fn(Message) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        self.run_each(concurrency, |delivery, timeout| {
            let handler = handler.clone();
            Spawned(tokio::spawn(async move { attend(Message::of(&delivery), &handler, delivery, timeout).await }))
        })
        .await
    }

    async fn run_each<L, Run>(&mut self, concurrency: usize, launch: L) -> Result<RunReport>
    where
        L: Fn(Delivery, Option<Duration>) -> Run,
        Run: Future<Output = Outcome>,
    {
        if concurrency == 0 {
            return Err(Error::invalid_option("concurrency", "must be at least 1").during("run").on(self.topic()));
        }
        let timeout = self.options().retry.handler_timeout;
        let mode = self.outcome_mode();
        let mut running = pin!(FuturesUnordered::new());
        let mut open = FuturesUnordered::<Receipt>::new();
        let mut report = RunReport::default();
        let mut end = None;
        std::future::poll_fn(|cx| {
            loop {
                let mut idle = true;
                while let Poll::Ready(Some(outcome)) = running.as_mut().poll_next(cx) {
                    idle = false;
                    report.count(outcome, &mut open);
                }
                while let Poll::Ready(Some(settled)) = open.poll_next_unpin(cx) {
                    idle = false;
                    report.answer(settled);
                }
                if end.is_none() && running.len() < concurrency && open.len() < MAX_UNCONFIRMED {
                    match self.poll_delivery(cx, mode) {
                        Poll::Pending => {}
                        Poll::Ready(Some(Ok(delivery))) => {
                            idle = false;
                            running.push(launch(delivery, timeout));
                        }
                        Poll::Ready(Some(Err(error))) => end = Some(Err(error)),
                        Poll::Ready(None) => end = Some(Ok(())),
                    }
                }
                if end.is_some() && running.is_empty() && open.is_empty() {
                    return Poll::Ready(());
                }
                if idle {
                    return Poll::Pending;
                }
            }
        })
        .await;
        end.unwrap_or(Ok(())).map(|()| report)
    }
}

/// How one handler ended, with the receipt of its settlement.
struct Outcome {
    kind: OutcomeKind,
    receipt: Receipt,
}

#[derive(Clone, Copy)]
enum OutcomeKind {
    Done,
    Retried,
    DeadLettered,
    Released,
    Revoked,
}

impl RunReport {
    fn count(&mut self, outcome: Outcome, open: &mut FuturesUnordered<Receipt>) {
        *match outcome.kind {
            OutcomeKind::Done => &mut self.done,
            OutcomeKind::Retried => &mut self.retried,
            OutcomeKind::DeadLettered => &mut self.dead_lettered,
            OutcomeKind::Released => &mut self.released,
            OutcomeKind::Revoked => &mut self.revoked,
        } += 1;
        match outcome.receipt.now() {
            Some(settled) => self.answer(settled),
            None => open.push(outcome.receipt),
        }
    }

    fn answer(&mut self, settled: Settled) {
        if settled != Settled::Done {
            self.unconfirmed += 1;
        }
    }
}

/// Runs one handler to its end, its time-out, or the loss of its delivery, whichever comes first, and settles.
async fn attend<F, Fut>(message: Message, handler: &F, delivery: Delivery, timeout: Option<Duration>) -> Outcome
where
    F: Fn(Message) -> Fut,
    Fut: Future<Output = Result<(), Failure>>,
{
    let (kind, settlement) = match supervise(|| handler(message), std::slice::from_ref(&delivery), timeout).await {
        Ended::Returned(Ok(())) => (OutcomeKind::Done, Settlement::Done),
        Ended::Returned(Err(Failure(settlement))) => match settlement {
            Settlement::DeadLetter { .. } => (OutcomeKind::DeadLettered, settlement),
            Settlement::Release => (OutcomeKind::Released, settlement),
            _ => (OutcomeKind::Retried, settlement),
        },
        Ended::Failed(Failure(settlement)) => (OutcomeKind::Retried, settlement),
        // No longer ours: settling is a no-op, and its answer is known.
        Ended::Revoked => {
            drop(delivery.release());
            return Outcome { kind: OutcomeKind::Revoked, receipt: Receipt::ready(Settled::Done) };
        }
    };
    if let Settlement::Retry { reason: Some(reason), .. } | Settlement::DeadLetter { reason } = &settlement {
        let event = delivery.event();
        tracing::debug!(event = %event.id(), r#type = event.event_type(), attempt = delivery.attempt(), %reason, "handler failed");
    }
    // Under automatic acknowledgement there is nothing left to settle: the outcome is counted and that is all.
    let receipt = if delivery.is_settled() { Receipt::ready(Settled::Done) } else { delivery.settle(settlement) };
    Outcome { kind, receipt }
}

/// How a supervised handler ended.
pub(crate) enum Ended {
    Returned(Result<(), Failure>),
    /// It panicked or ran out of time.
    Failed(Failure),
    /// The delivery was lost to another member.
    Revoked,
}

/// Polls a handler first and asks about time and the loss of any of its deliveries only while it waits.
pub(crate) async fn supervise<Fut>(start: impl FnOnce() -> Fut, deliveries: &[Delivery], timeout: Option<Duration>) -> Ended
where
    Fut: Future<Output = Result<(), Failure>>,
{
    let mut handler = pin!(contain_async(start));
    let mut clock = pin!(OptionFuture::from(timeout.map(tokio::time::sleep)));
    std::future::poll_fn(|cx| {
        if let Poll::Ready(result) = handler.as_mut().poll(cx) {
            return Poll::Ready(match result {
                Ok(returned) => Ended::Returned(returned),
                Err(panic) => Ended::Failed(panicked(&panic)),
            });
        }
        if deliveries.iter().any(|delivery| delivery.poll_revoked(cx).is_ready()) {
            return Poll::Ready(Ended::Revoked);
        }
        match clock.as_mut().poll(cx) {
            Poll::Ready(Some(())) => {
                Poll::Ready(Ended::Failed(Failure::retry(format!("handler ran longer than {:?}", timeout.unwrap_or_default()))))
            }
            _ => Poll::Pending, // still time, or no time-out
        }
    })
    .await
}

fn panicked(text: &str) -> Failure {
    tracing::error!("a handler panicked: {text}");
    Failure::retry(format!("handler panicked: {text}"))
}

/// A handler in a task of its own, aborted when the runner goes.
struct Spawned(JoinHandle<Outcome>);

impl Future for Spawned {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        // A task that ends without an outcome was cancelled with its runtime; its delivery was dropped, hence retried.
        let gone = |_| Outcome { kind: OutcomeKind::Retried, receipt: Receipt::ready(Settled::Unconfirmed) };
        self.0.poll_unpin(cx).map(|outcome| outcome.unwrap_or_else(gone))
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        self.0.abort();
    }
}
