//! A member of a group: its stream and its handles.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};

use async_trait::async_trait;
use pubsub_core::{AckMode, Control, Delivery, Result, Source, SubscribeOptions, SubscriptionHandle, SubscriptionStatus};

use crate::desk::Desk;
use crate::node::Node;

/// A member and what it lives on: leaves its group when it is dropped.
pub(crate) struct Membership {
    pub(crate) desk: Arc<Desk>,
    number: u64,
    inner: SubscriptionHandle,
    node: Arc<Node>,
    ended: AtomicBool,
    released: AtomicU64,
}

impl Membership {
    pub(crate) fn new(desk: Arc<Desk>, number: u64, inner: SubscriptionHandle, node: Arc<Node>) -> Arc<Self> {
        let (ended, released) = (AtomicBool::new(false), AtomicU64::new(0));
        Arc::new(Self { desk, number, inner, node, ended, released })
    }

    fn end(&self) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            let unheld = self.desk.unheld();
            self.inner.stop();
            if self.desk.leave(self.number) {
                self.released.store(unheld, Ordering::Release);
            }
            self.node.tidy(&self.desk.channel);
        }
    }

    /// Leaves the group, and returns how much was released that had been taken.
    pub(crate) fn leave(&self) -> u64 {
        self.end();
        self.released.swap(0, Ordering::AcqRel)
    }
}

#[async_trait]
impl Control for Membership {
    fn stop(&self) {
        self.end();
    }

    async fn stopped(&self) {
        // Ending is immediate: once `end` has returned, nothing can arrive. The last one takes the streams with it.
        self.desk.stopped().await;
    }

    async fn drained(&self) {
        if self.desk.has_left(self.number) || self.node.is_closed() {
            self.desk.idle().await;
        }
        self.desk.local().drained().await;
    }

    fn status(&self) -> SubscriptionStatus {
        let mut status = self.inner.status();
        self.desk.add_to(self.number, &mut status);
        status
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Membership").field("desk", &self.desk).field("number", &self.number).finish_non_exhaustive()
    }
}

/// A member's stream.
pub(crate) struct MemberSource {
    pub(crate) inner: Box<dyn Source>,
    pub(crate) membership: Arc<Membership>,
}

impl Source for MemberSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let Membership { desk, number, .. } = &*self.membership;
        loop {
            match self.inner.poll_next(cx, AckMode::Manual) {
                Poll::Ready(Some(Ok(inner))) => {
                    if let Some(delivery) = desk.hand_over(*number, inner, mode) {
                        return Poll::Ready(Some(Ok(delivery)));
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(desk.failure().map(Err)),
                Poll::Pending => {
                    desk.ask(*number);
                    return Poll::Pending;
                }
            }
        }
    }
}

impl Drop for MemberSource {
    fn drop(&mut self) {
        self.membership.end();
    }
}

/// The options of a member in its local queue. What is exhausted is judged by the desk, which has to acknowledge it.
pub(crate) fn inner_options(options: &SubscribeOptions) -> SubscribeOptions {
    let mut inner = options.clone().ack_mode(AckMode::Manual).retry(options.retry.clone().max_attempts(0));
    inner.filter = None;
    inner
}
