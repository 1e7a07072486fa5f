//! What an instance, its subscriptions and their deliveries share; the last of them takes the connection with it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use pubsub_core::machinery::{Aftermath, Closing, DeadLetterSink, DeliveryQueue, Entry, Timer};
use pubsub_core::{AckMode, Closed, Error, Event, Result, Status, SubscribeOptions, Subscription, Topic};
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use crate::convert::decode;
use crate::link::{Carrier, Link};
use crate::protocol::{Place, Request};
use crate::record::Stored;
use crate::subscription::Attachment;

/// How long closing takes beyond its time to say its last words.
const LAST_WORDS: Duration = Duration::from_millis(250);

pub(crate) struct Remote {
    pub(crate) link: Arc<Link>,
    pub(crate) timer: Arc<Timer>,
    /// Tells its members in queues from others; there are no others.
    pub(crate) instance: u64,
    /// Whether data is read and written with the envelopes of TypeScript peers.
    tagged: bool,
    numbers: AtomicU64,
    attached: Mutex<Attached>,
    /// Begun while nothing can be attached.
    closing: Closing,
    carrier: Mutex<Option<Carrier>>,
}

#[derive(Default)]
pub(crate) struct Attached {
    /// What `local_only` events go to. Each fan-out subscription has its own; the members of a group share one.
    queues: Vec<(Topic, Arc<DeliveryQueue>)>,
    attachments: Vec<Weak<Attachment>>,
}

impl Remote {
    pub(crate) fn new(link: Arc<Link>, timer: Arc<Timer>, carrier: Carrier, tagged: bool) -> Arc<Self> {
        let (attached, closing, carrier) = (Mutex::default(), Closing::default(), Mutex::new(Some(carrier)));
        Arc::new(Self { link, timer, instance: 0, tagged, numbers: AtomicU64::new(1), attached, closing, carrier })
    }

    /// An event as it travels.
    ///
    /// # Errors
    /// As [`Stored::of`].
    pub(crate) fn store(&self, event: &Event, limit: usize) -> Result<Stored> {
        Stored::of(event, limit, self.tagged)
    }

    /// The event that is kept at this place.
    ///
    /// # Errors
    /// If it is none.
    pub(crate) fn read(&self, stored: &Stored, place: Place) -> Result<Event> {
        decode(stored, place, self.tagged)
    }

    /// A number that nobody else in this instance has.
    pub(crate) fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.has_begun()
    }

    /// How many fan-out subscriptions of a topic this instance has.
    pub(crate) fn fan_out(&self, topic: &Topic) -> u64 {
        let attached = self.attached.lock();
        let of_topic = attached.queues.iter().filter(|(of, queue)| of == topic && !queue.is_ended());
        of_topic.filter(|(_, queue)| queue.group_name().is_none()).count() as u64
    }

    /// Gives an event to all local queues of its topic, or to none and returns one that is full.
    pub(crate) fn offer_locally(&self, topic: &Topic, event: &Arc<Event>) -> Option<Arc<DeliveryQueue>> {
        let mut aftermath = Aftermath::new();
        {
            let attached = self.attached.lock();
            let queues = || attached.queues.iter().filter(|(of, _)| of == topic).map(|(_, queue)| queue);
            if let Some(full) = queues().find(|queue| queue.room() == 0) {
                return Some(full.clone());
            }
            queues().for_each(|queue| queue.push([Entry::new(event.clone())], &mut aftermath));
        }
        aftermath.finish();
        None
    }

    /// Adds to a queue as much as it has room for; publishers of `local_only` events are kept out meanwhile.
    pub(crate) fn fill(&self, queue: &DeliveryQueue, entries: &mut VecDeque<Entry>, aftermath: &mut Aftermath) {
        let _attached = self.attached.lock();
        let room = queue.room().min(entries.len());
        queue.push(entries.drain(..room), aftermath);
    }

    /// Attaches a subscription, before the broker knows of it.
    pub(crate) fn attach(
        self: &Arc<Self>,
        topic: &Topic,
        options: SubscribeOptions,
    ) -> Result<(Arc<Attachment>, Subscription)> {
        let mut attached = self.attached.lock();
        if self.is_closing() {
            return Err(Error::closed());
        }
        attached.queues.retain(|(_, queue)| !queue.is_ended());
        attached.attachments.retain(|attachment| attachment.strong_count() > 0);
        // What the queue hands over passes the subscription that is made of it: that one filters, and says who settles.
        let mut inner = options.clone().ack_mode(AckMode::Manual);
        inner.filter = None;
        let sink = Arc::new(Letters(Arc::downgrade(&self.link), self.tagged));
        let (queue, inner) = match &options.group {
            None => {
                let queue = DeliveryQueue::fan_out(topic.clone(), self.timer.clone(), sink);
                let inner = queue.join(self.instance, inner, || {}).expect("a new queue has not ended");
                attached.queues.push((topic.clone(), queue.clone()));
                (queue, inner)
            }
            Some(group) => {
                // What is in a member's hands is counted by the member, whether it came from here or from the broker.
                inner = inner.max_in_flight(1 << 20);
                let mut shared = attached.queues.iter().filter(|(of, queue)| of == topic && queue.group_name() == Some(group));
                let joined =
                    shared.find_map(|(_, queue)| Some((queue.clone(), queue.join(self.instance, inner.clone(), || {})?)));
                joined.unwrap_or_else(|| {
                    let queue = DeliveryQueue::group(topic.clone(), group.clone(), self.timer.clone(), sink);
                    let joined = queue.join(self.instance, inner, || {}).expect("a new queue has not ended");
                    attached.queues.push((topic.clone(), queue.clone()));
                    (queue, joined)
                })
            }
        };
        let attachment = Attachment::new(self, topic, options, queue, inner.handle());
        attached.attachments.push(Arc::downgrade(&attachment));
        Ok((attachment, inner))
    }

    /// Closes, or waits for a close that has begun.
    pub(crate) async fn close(self: &Arc<Self>, within: Duration) -> Result<Closed> {
        {
            let _nothing_attaches = self.attached.lock();
            let remote = self.clone();
            self.closing.begin(&Handle::current(), || async move { remote.end(within).await });
        }
        self.link.tell(Status::Closed);
        self.closing.ended().await
    }

    /// Drains what was accepted within the time, then ends everything.
    async fn end(&self, within: Duration) -> Closed {
        let until = Instant::now() + within;
        let attachments: Vec<_> = self.attached.lock().attachments.iter().filter_map(Weak::upgrade).collect();
        let mut closed = Closed::default();
        closed.released = attachments.iter().filter_map(|one| one.member()).map(|member| member.leave()).sum();
        let drained = async {
            self.link.flush().await;
            futures::future::join_all(attachments.iter().map(|attachment| attachment.relieved())).await;
        };
        let _ = timeout_at(until, drained).await;
        for attachment in &attachments {
            let (released, cut_off) = attachment.cut_off();
            closed.released += released;
            closed.cut_off += cut_off;
        }
        let carrier = self.carrier.lock().take();
        if let Some(Carrier { task, end }) = carrier {
            let _ = end.send(()); // an error: the task has ended with its runtime
            let _ = timeout_at(until.max(Instant::now()) + 2 * LAST_WORDS, task).await;
        }
        self.link.close();
        closed
    }
}

/// Publishes dead letters of fan-out subscriptions and of `local_only` events; the broker does the others'.
struct Letters(Weak<Link>, bool);

impl DeadLetterSink for Letters {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        match Stored::of(&letter, usize::MAX, self.1) {
            Ok(stored) => {
                let request = Request::publish_one(topic.as_str().into(), stored);
                let receipt = self.0.upgrade()?.insist(request);
                Some(Box::pin(async move { _ = receipt.await }))
            }
            Err(error) => {
                tracing::warn!(%topic, %error, "a dead letter cannot be written");
                None
            }
        }
    }
}
