//! One subscription of a client: what the server sends, and what stays within the instance, as one stream.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use futures::StreamExt;
use parking_lot::Mutex;
use pubsub_core::machinery::{DeliveryQueue, Entry};
use pubsub_core::{
    AckMode, Control, Delivery, Event, OnGap, Result, Source, Start, SubscribeOptions, Subscription, SubscriptionHandle,
    SubscriptionStatus, Topic, dead_letter,
};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::client::{Remote, bury, decode, store};
use super::member::Member;
use super::server::{Place, Sent, Stored};

/// What is attached. A fan-out subscription follows the log into its queue, and all its settlement is local; a member of a group
/// has its queue for `local_only` events alone.
pub(super) struct Attachment {
    remote: Arc<Remote>,
    topic: Topic,
    options: SubscribeOptions,
    queue: Arc<DeliveryQueue>,
    inner: SubscriptionHandle,
    member: Option<Arc<Member>>,
    /// What brings events here.
    pump: Mutex<Option<AbortHandle>>,
    ended: AtomicBool,
    /// Up to where the log has been queued.
    queued: watch::Sender<Place>,
    /// How many were lost before the event at an offset, until it is handed over.
    lost: Mutex<BTreeMap<u64, u64>>,
    lagged: AtomicU64,
    malformed: AtomicU64,
}

impl Attachment {
    pub(super) fn new(
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
            pump: Mutex::default(),
            ended: AtomicBool::new(false),
            queued: watch::Sender::new(Place::default()),
            lost: Mutex::default(),
            lagged: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
        })
    }

    pub(super) fn member(&self) -> Option<&Arc<Member>> {
        self.member.as_ref()
    }

    pub(super) fn source(self: &Arc<Self>, inner: Subscription) -> RemoteSource {
        RemoteSource { inner, attachment: self.clone() }
    }

    /// Starts to queue what the log holds from a place on.
    pub(super) fn follow(self: &Arc<Self>, from: Place) {
        self.run(Self::follow_log(self.clone(), from));
    }

    /// Starts to take deliveries when the member asks for them.
    pub(super) fn feed(&self) {
        if let Some(member) = &self.member {
            self.run(member.clone().feed());
        }
    }

    fn run(&self, pump: impl Future<Output = ()> + Send + 'static) {
        let pump = tokio::spawn(pump).abort_handle();
        self.pump.lock().replace(pump.clone());
        if self.ended.load(Ordering::SeqCst) {
            pump.abort(); // ended meanwhile
        }
    }

    async fn follow_log(self: Arc<Self>, mut place: Place) {
        let mut changes = self.remote.server.changes();
        let mut entries = VecDeque::new();
        loop {
            self.remote.fill(&self.queue, &mut entries);
            if self.queue.room() == 0 || !entries.is_empty() {
                self.queue.room_freed().await;
                continue;
            }
            self.queued.send_replace(place);
            changes.borrow_and_update();
            let (topic, most) = (self.topic.clone(), self.queue.room().min(self.options.prefetch));
            let Ok((sent, next)) = self.remote.link.ask(move |state| state.read(&topic, place, most)).await else { return };
            if next.generation != place.generation {
                // Stragglers from before the topic was cleared.
                self.queue.retain(|event| event.index().is_none_or(|index| index.generation >= next.generation));
            }
            if sent.is_empty() && next == place && changes.changed().await.is_err() {
                return;
            }
            place = next;
            for sent in sent {
                self.lagged.fetch_add(sent.lagged, Ordering::Relaxed);
                match decode(&sent) {
                    Ok(event) => {
                        if sent.lagged > 0 {
                            self.lost.lock().insert(sent.place.offset, sent.lagged);
                        }
                        entries.push_back(Entry::new(Arc::new(event)).at(sent.scope, sent.place.offset));
                    }
                    Err(_) => {
                        self.malformed.fetch_add(1, Ordering::Relaxed);
                        if let Some((to, letter)) = letter_of_malformed(&self.topic, &self.options, &sent) {
                            bury(&self.remote.link, &to, letter).await;
                        }
                    }
                }
            }
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
        if let Some(pump) = self.pump.lock().take() {
            pump.abort();
        }
        self.queued.send_replace(Place { generation: u64::MAX, offset: u64::MAX });
    }

    /// Waits until nothing is left that only this instance could hand over, and nothing in its consumer's hands.
    pub(super) async fn relieved(&self) {
        match &self.member {
            Some(member) => {
                member.idle().await;
                self.queue.relieved(self.remote.session).await;
            }
            None => self.drained().await,
        }
    }

    /// Ends it and takes back what is held. Returns how much was still queued, and how much was held.
    pub(super) fn cut_off(&self) -> (u64, u64) {
        let released = self.queue.burden(self.remote.session).1;
        self.end();
        let held = self.member.as_ref().map_or(0, |member| member.revoke());
        (released, held + self.queue.revoke(self.remote.session))
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
            None => {
                let topic = self.topic.clone();
                let head = self.remote.link.ask(move |state| state.start(&topic, &Start::Latest, OnGap::Fail)).await;
                if let Ok(Ok(head)) = head {
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

pub(super) struct RemoteSource {
    inner: Subscription,
    attachment: Arc<Attachment>,
}

impl Source for RemoteSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let Attachment { member, lost, .. } = &*self.attachment;
        if let Some(member) = member {
            if member.is_full(cx, mode) {
                return Poll::Pending;
            }
            return match self.inner.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(local))) => Poll::Ready(Some(Ok(member.hand_over_local(local, mode)))),
                Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
                Poll::Ready(None) | Poll::Pending => member.poll_next(cx, mode),
            };
        }
        let Some(delivery) = ready!(self.inner.poll_next_unpin(cx)).transpose()? else { return Poll::Ready(None) };
        let at = delivery.cursor().filter(|_| delivery.attempt() == 1);
        let lagged = delivery.lagged() + at.and_then(|at| lost.lock().remove(&at.position().major)).unwrap_or(0);
        Poll::Ready(Some(Ok(settled_if(mode, delivery).after_losing(lagged))))
    }
}

impl Drop for RemoteSource {
    fn drop(&mut self) {
        self.attachment.end();
    }
}

/// The delivery, done by being handed over if the mode says so.
pub(super) fn settled_if(mode: AckMode, delivery: Delivery) -> Delivery {
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
pub(super) fn poll_revoked(delivery: &Delivery, cx: &mut Context<'_>) -> Poll<()> {
    pin!(delivery.revoked()).poll(cx)
}

/// What cannot be read goes to the dead-letter topic as text, if there is one.
pub(super) fn letter_of_malformed(topic: &Topic, options: &SubscribeOptions, sent: &Sent) -> Option<(Topic, Stored)> {
    let to = options.dead_letter.clone()?;
    let text = String::from_utf8_lossy(&sent.stored.json).into_owned();
    let event = Event::stamped(sent.stored.id.clone(), "malformed", sent.stored.created_at).with_data(text);
    let letter = dead_letter(&event, topic, options.group.as_ref(), sent.attempt, "not an event");
    Some((to, store(&letter).ok()?))
}
