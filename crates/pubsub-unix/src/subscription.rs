//! One subscription: what the broker sends, and what stays within the instance, as one stream.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};

use async_trait::async_trait;
use futures::StreamExt;
use pubsub_core::machinery::{DeliveryQueue, Entry};
use pubsub_core::{
    AckMode, Control, Delivery, Position, Result, Source, SubscribeOptions, Subscription, SubscriptionHandle,
    SubscriptionStatus, Topic,
};
use tokio::sync::watch;

use crate::convert::{decode, letter_of_malformed, scope};
use crate::link::Asked;
use crate::member::Member;
use crate::protocol::{Begin, Place, Query, Reply, Request, Stretch};
use crate::remote::Remote;

/// What is attached. A fan-out subscription follows the log into its queue, and all its settlement is local; a member of a group has
/// its queue for `local_only` events alone.
pub(crate) struct Attachment {
    remote: Arc<Remote>,
    topic: Topic,
    options: SubscribeOptions,
    queue: Arc<DeliveryQueue>,
    inner: SubscriptionHandle,
    member: Option<Arc<Member>>,
    ended: AtomicBool,
    /// Up to where the log has been queued.
    queued: watch::Sender<Place>,
    lagged: AtomicU64,
    malformed: AtomicU64,
}

impl Attachment {
    pub(crate) fn new(
        remote: &Arc<Remote>,
        topic: &Topic,
        options: SubscribeOptions,
        queue: Arc<DeliveryQueue>,
        inner: SubscriptionHandle,
    ) -> Arc<Self> {
        let member = options.group.clone().map(|group| Member::new(remote, topic.clone(), group, options.clone()));
        Arc::new(Self {
            remote: remote.clone(),
            topic: topic.clone(),
            options,
            queue,
            inner,
            member,
            ended: AtomicBool::new(false),
            queued: watch::Sender::new(Place::default()),
            lagged: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
        })
    }

    pub(crate) fn member(&self) -> Option<&Arc<Member>> {
        self.member.as_ref()
    }

    pub(crate) fn source(self: &Arc<Self>, inner: Subscription) -> UnixSource {
        UnixSource {
            inner,
            attachment: self.clone(),
            place: Place::default(),
            asked: None,
            entries: VecDeque::new(),
            lost: BTreeMap::new(),
        }
    }

    /// Ends it: nothing more is handed over, and what was taken is given back.
    fn end(&self) {
        if self.ended.swap(true, Ordering::SeqCst) {
            return;
        }
        self.inner.stop();
        if let Some(member) = &self.member {
            member.leave();
        }
        self.queued.send_replace(Place { generation: u64::MAX, offset: u64::MAX });
    }

    /// Waits until nothing is left that only this instance could hand over, and nothing in its consumer's hands.
    pub(crate) async fn relieved(&self) {
        match &self.member {
            Some(member) => {
                member.idle().await;
                self.queue.relieved(self.remote.instance).await;
            }
            None => self.drained().await,
        }
    }

    /// Ends it and takes back what is held. Returns how much was still queued, and how much was held.
    pub(crate) fn cut_off(&self) -> (u64, u64) {
        let released = self.queue.burden(self.remote.instance).1;
        self.end();
        let held = self.member.as_ref().map_or(0, |member| member.revoke());
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
        match &self.member {
            Some(member) => member.drained().await,
            None if self.ended.load(Ordering::SeqCst) => {}
            None => {
                let query = Query::Start { topic: self.topic.as_str().into(), begin: Begin::Latest, or_earliest: true };
                if let Ok(Reply::Start(Ok(head))) = self.remote.link.ask(query).await {
                    // The sender is this very subscription's.
                    let _ = self.queued.subscribe().wait_for(|queued| *queued >= head).await;
                }
            }
        }
        self.queue.drained().await;
    }

    fn status(&self) -> SubscriptionStatus {
        let mut status = self.inner.status();
        status.lagged += self.lagged.load(Ordering::Relaxed);
        status.dropped += self.malformed.load(Ordering::Relaxed);
        if let Some(member) = &self.member {
            member.add_to(&mut status);
        }
        status
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("topic", &self.topic).field("group", &self.options.group).finish_non_exhaustive()
    }
}

/// The consumer's end. Its polls are what reads: a subscription that nobody polls costs no task and no connection.
pub(crate) struct UnixSource {
    inner: Subscription,
    attachment: Arc<Attachment>,
    /// Fan-out: what is to be read next.
    place: Place,
    asked: Option<Asked>,
    /// Read, and not queued yet.
    entries: VecDeque<Entry>,
    /// How many were lost before the event at an offset, until it is handed over.
    lost: BTreeMap<u64, u64>,
}

impl UnixSource {
    /// Starts to read there.
    pub(crate) fn follow(&mut self, from: Place) {
        self.place = from;
        self.attachment.queued.send_replace(from);
    }

    /// Queues what was read, and asks for more while there is room. Ready once there is nothing more to come, ever.
    fn read_on(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let attachment = self.attachment.clone();
        let Attachment { remote, queue, options, topic, .. } = &*attachment;
        loop {
            if !self.entries.is_empty() {
                remote.fill(queue, &mut self.entries);
            }
            if !self.entries.is_empty() {
                return Poll::Pending; // full: its consumer is polled again when it has taken something
            }
            if !attachment.ended.load(Ordering::SeqCst) {
                attachment.queued.send_if_modified(|queued| std::mem::replace(queued, self.place) != self.place);
            }
            let asked = match &mut self.asked {
                Some(asked) => asked,
                None => {
                    let room = queue.room().min(options.prefetch);
                    if room == 0 {
                        return Poll::Pending;
                    }
                    let most = u32::try_from(room).unwrap_or(u32::MAX);
                    let query = Query::Read { topic: topic.as_str().into(), from: self.place, most };
                    self.asked.insert(remote.link.ask(query))
                }
            };
            match std::task::ready!(Pin::new(asked).poll(cx)) {
                Ok(Reply::Stretch(stretch)) => {
                    self.asked = None;
                    self.arrived(stretch);
                }
                Ok(_) => self.asked = None, // no answer to what was asked: ask again
                Err(_) => return Poll::Ready(()),
            }
        }
    }

    fn arrived(&mut self, stretch: Stretch) {
        let Stretch { bus, events, mut lagged, next } = stretch;
        let attachment = &self.attachment;
        attachment.lagged.fetch_add(lagged, Ordering::Relaxed);
        let scope = scope(&bus, next.generation);
        for (offset, stored) in events {
            match decode(&stored) {
                Ok(event) => {
                    if lagged > 0 {
                        self.lost.insert(offset, std::mem::take(&mut lagged));
                    }
                    let place = Some((scope.clone(), Position::from(offset)));
                    self.entries.push_back(Entry { place, ..Entry::new(Arc::new(event)) });
                }
                Err(error) => {
                    if attachment.malformed.fetch_add(1, Ordering::Relaxed) == 0 {
                        tracing::warn!(topic = %attachment.topic, %error, "what is no event is passed over");
                    }
                    if let Some((topic, letter)) = letter_of_malformed(&attachment.topic, &attachment.options, &stored, 1) {
                        drop(attachment.remote.link.insist(Request::Publish { topic, events: vec![letter] }));
                    }
                }
            }
        }
        self.place = next;
    }
}

impl Source for UnixSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        if let Some(member) = self.attachment.member.clone() {
            if member.is_full(cx, mode) {
                return Poll::Pending;
            }
            return match self.inner.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(local))) => Poll::Ready(Some(Ok(member.hand_over_local(local, mode)))),
                Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
                Poll::Ready(None) | Poll::Pending => member.poll_next(cx, mode),
            };
        }
        loop {
            let read = self.read_on(cx);
            let next = match self.inner.poll_delivery(cx, mode) {
                // Taking ahead made room: what came meanwhile has to be asked for now, there may be no other poll.
                Poll::Pending if read.is_pending() && self.asked.is_none() && self.has_room() => continue,
                Poll::Pending => return Poll::Pending,
                Poll::Ready(next) => next,
            };
            let Some(delivery) = next.transpose()? else { return Poll::Ready(None) };
            if self.lost.is_empty() || delivery.attempt() > 1 {
                return Poll::Ready(Some(Ok(delivery)));
            }
            let lost = delivery.cursor().and_then(|at| self.lost.remove(&at.position().major)).unwrap_or(0);
            let lagged = delivery.lagged() + lost;
            return Poll::Ready(Some(Ok(delivery.after_losing(lagged))));
        }
    }
}

impl UnixSource {
    fn has_room(&self) -> bool {
        self.attachment.queue.room() > 0
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
