//! One subscription: what the broker sends, and what stays within the instance, as one stream.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use pubsub_core::machinery::DeliveryQueue;
use pubsub_core::{
    AckMode, Control, Delivery, Result, Source, SubscribeOptions, Subscription, SubscriptionHandle, SubscriptionStatus, Topic,
};

use crate::member::Member;
use crate::protocol::{Begin, Place, Query, Reply};
use crate::reader::Reader;
use crate::remote::Remote;

/// What is attached. A fan-out subscription follows the log into its queue, and all its settlement is local; a member of a group has
/// its queue for `local_only` events alone.
pub(crate) struct Attachment {
    remote: Arc<Remote>,
    topic: Topic,
    options: SubscribeOptions,
    queue: Arc<DeliveryQueue>,
    inner: SubscriptionHandle,
    side: Side,
    ended: AtomicBool,
}

/// What a subscription is to the broker.
enum Side {
    /// Fan-out reads the log.
    Reader(Arc<Reader>),
    Member(Arc<Member>),
}

impl Attachment {
    pub(crate) fn new(
        remote: &Arc<Remote>,
        topic: &Topic,
        options: SubscribeOptions,
        queue: Arc<DeliveryQueue>,
        inner: SubscriptionHandle,
    ) -> Arc<Self> {
        let side = match options.group.clone() {
            Some(group) => Side::Member(Member::new(remote, topic.clone(), group, options.clone())),
            None => Side::Reader(Reader::new(remote, topic, options.clone(), queue.clone())),
        };
        Arc::new(Self {
            remote: remote.clone(),
            topic: topic.clone(),
            options,
            queue,
            inner,
            side,
            ended: AtomicBool::new(false),
        })
    }

    pub(crate) fn member(&self) -> Option<&Arc<Member>> {
        match &self.side {
            Side::Member(member) => Some(member),
            Side::Reader(_) => None,
        }
    }

    /// Fan-out starts to read there.
    pub(crate) fn follow(&self, from: Place) {
        if let Side::Reader(reader) = &self.side {
            reader.follow(from);
        }
    }

    pub(crate) fn source(self: &Arc<Self>, inner: Subscription) -> UnixSource {
        UnixSource { inner: inner.into_source(), attachment: self.clone() }
    }

    /// Ends it: nothing more is handed over, and what was taken is given back.
    fn end(&self) {
        if self.ended.swap(true, Ordering::SeqCst) {
            return;
        }
        self.inner.stop();
        match &self.side {
            Side::Member(member) => drop(member.leave()),
            Side::Reader(reader) => reader.end(),
        }
    }

    /// Waits until nothing is left that only this instance could hand over, and nothing in its consumer's hands.
    pub(crate) async fn relieved(&self) {
        match &self.side {
            Side::Member(member) => {
                member.idle().await;
                self.queue.relieved(self.remote.instance).await;
            }
            Side::Reader(_) => self.drained().await,
        }
    }

    /// Ends it and takes back what is held. Returns how much was still queued, and how much was held.
    pub(crate) fn cut_off(&self) -> (u64, u64) {
        let released = self.queue.burden(self.remote.instance).1;
        self.end();
        let held = self.member().map_or(0, |member| member.revoke());
        (released, held + self.queue.revoke(self.remote.instance))
    }
}

#[async_trait]
impl Control for Attachment {
    fn stop(&self) {
        self.end();
    }

    async fn stopped(&self) {
        // Ending is immediate: once `end` has returned, nothing can arrive.
    }

    async fn drained(&self) {
        match &self.side {
            Side::Member(member) => member.drained().await,
            Side::Reader(_) if self.ended.load(Ordering::SeqCst) => {}
            Side::Reader(reader) => {
                let query = Query::Start { topic: self.topic.as_str().into(), begin: Begin::Latest, or_earliest: true };
                if let Ok(Reply::Start(Ok(head))) = self.remote.link.ask(query).await {
                    reader.reached(head).await;
                }
            }
        }
        self.queue.drained().await;
    }

    fn status(&self) -> SubscriptionStatus {
        let mut status = self.inner.status();
        match &self.side {
            Side::Member(member) => member.add_to(&mut status),
            Side::Reader(reader) => {
                status.lagged += reader.lagged();
                status.dropped += reader.malformed();
            }
        }
        status
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("topic", &self.topic).field("group", &self.options.group).finish_non_exhaustive()
    }
}

/// The consumer's end.
pub(crate) struct UnixSource {
    inner: Box<dyn Source>,
    attachment: Arc<Attachment>,
}

impl Source for UnixSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let reader = match &self.attachment.side {
            Side::Member(member) => {
                if member.is_full(cx, mode) {
                    return Poll::Pending;
                }
                return match self.inner.poll_next(cx, AckMode::Manual) {
                    Poll::Ready(Some(Ok(local))) => Poll::Ready(Some(Ok(member.hand_over_local(local, mode)))),
                    Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
                    Poll::Ready(None) | Poll::Pending => member.poll_next(cx, mode),
                };
            }
            Side::Reader(reader) => reader,
        };
        let next = self.inner.poll_next(cx, mode);
        reader.read_on(); // there may be room now
        let Some(delivery) = ready!(next).transpose()? else { return Poll::Ready(None) };
        let at = delivery.cursor().filter(|_| delivery.attempt() == 1);
        let lost = at.map_or(0, |at| reader.lost_before(at.position().major));
        let lagged = delivery.lagged() + lost;
        Poll::Ready(Some(Ok(delivery.after_losing(lagged))))
    }
}

impl Drop for UnixSource {
    fn drop(&mut self) {
        self.attachment.end();
    }
}

/// The delivery, done by being handed over if the mode says so.
pub(crate) fn settled_if(mode: AckMode, delivery: Delivery) -> Delivery {
    if mode == AckMode::Manual {
        return delivery;
    }
    let settled = Delivery::settled(delivery.event().clone(), delivery.attempt()).after_losing(delivery.lagged());
    let settled = match delivery.cursor() {
        Some(cursor) => settled.at(cursor.scope().clone(), cursor.position()),
        None => settled,
    };
    drop(delivery.done());
    settled
}

/// Polls whether a delivery was taken from its holder.
pub(crate) fn poll_revoked(delivery: &Delivery, cx: &mut Context<'_>) -> Poll<()> {
    pin!(delivery.revoked()).poll(cx)
}
