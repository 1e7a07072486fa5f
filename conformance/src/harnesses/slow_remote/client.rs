//! A client of the imitated server: one instance of the bus.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use pubsub_core::machinery::{Aftermath, Closing, DeadLetterSink, DeliveryQueue, Entry, SettleQueue, Timer};
use pubsub_core::{
    Capabilities, Closed, Cursor, Deduplication, Durability, Error, ErrorKind, Event, Fate, Groups, LeaseProvider, Page,
    Positions, PubSub, PublishError, PublishOptions, ReplayIndex, Result, Retention, Start, Status, StatusWatch,
    SubscribeOptions, Subscription, Topic, TopicStatus, TrimFilter, wire,
};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::{Link, Server};
use super::server::{Answer, Notice, RETENTION, Sent, State, Stored, Stretch};
use super::subscription::Attachment;

/// The most bytes of data and metadata per event.
const MAX_PAYLOAD: usize = 4 << 20;

/// How long a call waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long closing takes beyond its time to say its last words, and how long they may take when nobody waits for them.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// How many settlements are sent together.
const SETTLED_TOGETHER: usize = 32;

/// One instance.
pub(super) struct SlowRemote(Arc<Remote>);

/// What the instance, its subscriptions and their deliveries share; the last of them takes the connection with it.
pub(super) struct Remote {
    pub(super) server: Arc<Server>,
    pub(super) session: u64,
    pub(super) link: Link,
    pub(super) notices: SettleQueue<Notice>,
    pub(super) timer: Arc<Timer>,
    status: watch::Sender<Status>,
    attached: Mutex<Attached>,
    /// Begun while nothing can be attached.
    closing: Closing,
    tasks: [AbortHandle; 2],
    /// Dropped, it lets the tasks end once they have sent what was recorded.
    _alive: oneshot::Sender<()>,
}

#[derive(Default)]
struct Attached {
    /// What `local_only` events go to. Each fan-out subscription has its own; the members of a group share one.
    queues: Vec<(Topic, Arc<DeliveryQueue>)>,
    attachments: Vec<Weak<Attachment>>,
}

pub(super) fn capabilities() -> Capabilities {
    let mut capabilities = Capabilities::in_process();
    capabilities.durability = Durability::Server;
    capabilities.retention = Retention::History;
    capabilities.dead_letter_history = true;
    capabilities.groups = Groups::Durable;
    capabilities.group_history = true;
    capabilities.deduplication = Deduplication::Window { events: Some(RETENTION as u64), age: None };
    capabilities.indexed = true;
    capabilities.publish_waits = false;
    capabilities.max_payload = Some(MAX_PAYLOAD);
    capabilities
}

impl SlowRemote {
    pub(super) fn connect(server: &Arc<Server>) -> Result<Self> {
        let session = server.number();
        let status = watch::Sender::new(Status::Connected);
        let timer = Arc::new(Timer::new()?);
        let (link, connection) = server.connect(session, status.clone());
        let notices = SettleQueue::new();
        let (alive, gone) = oneshot::channel();
        let sending = tokio::spawn(send(notices.clone(), link.clone(), gone)).abort_handle();
        Ok(Self(Arc::new(Remote {
            server: server.clone(),
            session,
            link,
            notices,
            timer,
            status,
            attached: Mutex::default(),
            closing: Closing::default(),
            tasks: [connection, sending],
            _alive: alive,
        })))
    }

    /// Falls silent, as a process that was killed does.
    pub(super) fn kill(&self) {
        self.0.tasks.iter().for_each(AbortHandle::abort);
    }

    fn check_open(&self, operation: &'static str, topic: &Topic) -> Result<()> {
        let closed = self.0.closing.has_begun();
        if closed { Err(Error::closed().during(operation).on(topic)) } else { Ok(()) }
    }

    /// Asks about a topic, within the time a caller has patience.
    async fn ask<R: Send + 'static>(
        &self,
        operation: &'static str,
        topic: &Topic,
        act: impl FnOnce(&mut State, &Topic) -> R + Send + 'static,
    ) -> Result<R> {
        self.check_open(operation, topic)?;
        let of = topic.clone();
        let asked = timeout(PATIENCE, self.0.link.ask(move |state| act(state, &of))).await;
        let answer = asked.unwrap_or_else(|_| Err(ErrorKind::Timeout.into()));
        answer.map_err(|error| error.during(operation).on(topic))
    }

    /// Events that stay within this instance: never encoded, and with nowhere to wait but their subscribers' queues.
    async fn publish_locally(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Result<(), PublishError> {
        let deadline = Instant::now() + options.timeout.unwrap_or(PATIENCE);
        for (at, event) in events.iter().enumerate() {
            while let Some(full) = self.0.offer_locally(topic, event) {
                if timeout_at(deadline, full.room_freed()).await.is_err() {
                    return Err(PublishError::prefix_sent(Error::new(ErrorKind::Full).on(topic), at, events.len()));
                }
            }
        }
        Ok(())
    }
}

impl Remote {
    /// Gives an event to all local queues of its topic, or to none and returns one that is full.
    fn offer_locally(&self, topic: &Topic, event: &Arc<Event>) -> Option<Arc<DeliveryQueue>> {
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
    pub(super) fn fill(&self, queue: &DeliveryQueue, entries: &mut std::collections::VecDeque<Entry>) {
        let mut aftermath = Aftermath::new();
        {
            let _attached = self.attached.lock();
            let room = queue.room().min(entries.len());
            queue.push(entries.drain(..room), &mut aftermath);
        }
        aftermath.finish();
    }

    /// Attaches a subscription, before the server knows of it.
    fn attach(self: &Arc<Self>, topic: &Topic, options: SubscribeOptions) -> Result<(Arc<Attachment>, Subscription)> {
        let mut attached = self.attached.lock();
        if self.closing.has_begun() {
            return Err(Error::closed());
        }
        attached.queues.retain(|(_, queue)| !queue.is_ended());
        attached.attachments.retain(|attachment| attachment.strong_count() > 0);
        // What the queue hands over passes the subscription that is made of it: that one filters, and says who settles.
        let mut inner = options.clone().ack_mode(pubsub_core::AckMode::Manual);
        inner.filter = None;
        let sink = Arc::new(Letters(self.link.clone()));
        let (queue, inner) = match &options.group {
            None => {
                let queue = DeliveryQueue::fan_out(topic.clone(), self.timer.clone(), sink);
                let inner = queue.join(self.session, inner, || {}).expect("a new queue has not ended");
                attached.queues.push((topic.clone(), queue.clone()));
                (queue, inner)
            }
            Some(group) => {
                // What is in a member's hands is counted by the member, whether it came from here or from the server.
                inner = inner.max_in_flight(1 << 20);
                let mut shared = attached.queues.iter().filter(|(of, queue)| of == topic && queue.group_name() == Some(group));
                let joined =
                    shared.find_map(|(_, queue)| Some((queue.clone(), queue.join(self.session, inner.clone(), || {})?)));
                joined.unwrap_or_else(|| {
                    let queue = DeliveryQueue::group(topic.clone(), group.clone(), self.timer.clone(), sink);
                    let joined = queue.join(self.session, inner, || {}).expect("a new queue has not ended");
                    attached.queues.push((topic.clone(), queue.clone()));
                    (queue, joined)
                })
            }
        };
        let attachment = Attachment::new(self, topic, options, queue, inner.handle());
        attached.attachments.push(Arc::downgrade(&attachment));
        Ok((attachment, inner))
    }

    /// Drains what was accepted within the time, then ends everything.
    async fn end(&self, within: Duration) -> Closed {
        let until = Instant::now() + within;
        let attachments: Vec<_> = self.attached.lock().attachments.iter().filter_map(Weak::upgrade).collect();
        let released: u64 = attachments.iter().filter_map(|one| one.member()).map(|member| member.leave()).sum();
        let mut closed = Closed::default();
        closed.released = released;
        let drained = async {
            // Calls are carried out in order: with the answer to this one, everything accepted before has its own.
            let _ = self.link.ask(|_| ()).await;
            futures::future::join_all(attachments.iter().map(|attachment| attachment.relieved())).await;
        };
        let _ = timeout_at(until, drained).await;
        for attachment in &attachments {
            let (released, cut_off) = attachment.cut_off();
            closed.released += released;
            closed.cut_off += cut_off;
        }
        let session = self.session;
        let last_words = async {
            self.notices.flush().await;
            let _ = self.link.ask(move |state| state.end_session(session)).await;
        };
        let _ = timeout_at(until.max(Instant::now() + LAST_WORDS), last_words).await;
        self.tasks.iter().for_each(AbortHandle::abort);
        closed
    }
}

#[async_trait]
impl PubSub for SlowRemote {
    fn capabilities(&self) -> Capabilities {
        capabilities()
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        let refuse = |error: Error| PublishError::none_sent(error.during("publish").on(topic), events.len());
        self.check_open("publish", topic).and_then(|()| options.validate()).map_err(refuse)?;
        if options.local_only {
            self.publish_locally(topic, events, &options).await?;
            return Ok(Positions::none());
        }
        let stored = events.iter().map(|event| store(event)).collect::<Result<Vec<_>>>().map_err(refuse)?;
        match self.ask("publish", topic, move |state, topic| state.append(topic, &stored)).await {
            Ok(Ok(places)) => {
                let cursors = places.into_iter().map(|(scope, offset)| Cursor::new(scope, offset));
                Ok(cursors.collect::<Vec<_>>().into())
            }
            Ok(Err(taken)) => Err(PublishError::prefix_sent(Error::new(ErrorKind::Unavailable).on(topic), taken, events.len())),
            Err(error) => Err(PublishError::new(error, vec![Fate::Unknown; events.len()])),
        }
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.check_open("subscribe", topic)?;
        options.validate(topic, &capabilities())?;
        let (attachment, inner) = self.0.attach(topic, options.clone()).map_err(|error| error.during("subscribe").on(topic))?;
        // Dropped at any await point, it detaches itself.
        let source = attachment.source(inner);
        let SubscribeOptions { start, on_gap, group, .. } = options.clone();
        let session = self.0.session;
        match attachment.member().map(|member| member.number()).zip(group) {
            None => {
                let start = start.unwrap_or(Start::Latest);
                let place = self.ask("subscribe", topic, move |state, topic| state.start(topic, &start, on_gap)).await??;
                attachment.follow(place);
            }
            Some((member, group)) => {
                let join =
                    move |state: &mut State, topic: &Topic| state.join(topic, &group, start.as_ref(), on_gap, member, session);
                self.ask("subscribe", topic, join).await?.map_err(|error| error.during("subscribe").on(topic))?;
                attachment.feed();
            }
        }
        self.check_open("subscribe", topic)?;
        Ok(Subscription::new(topic.clone(), options, Box::new(source), attachment))
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        Page::check_limit(limit).map_err(|error| error.during("history").on(topic))?;
        let page = self.ask("history", topic, move |state, topic| state.page(topic, &from, limit)).await?;
        let Stretch { scope, sent, floor, head, more } = page.map_err(|error| error.during("history").on(topic))?;
        let cursor = |offset: u64| Cursor::new(scope.clone(), offset);
        // What cannot be read is passed over, as subscriptions do.
        let entries = sent.iter().filter_map(|sent| Some((cursor(sent.place.offset), Arc::new(decode(sent).ok()?)))).collect();
        let next = sent.last().filter(|_| more).map(|last| cursor(last.place.offset));
        Ok(Page { entries, next, floor: floor.map(cursor), head: head.map(cursor) })
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.ask("clear_topic", topic, State::clear).await
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.ask("trim_topic", topic, move |state, topic| state.trim(topic, &filter)).await
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.check_open("inspect", topic)?;
        // What was handed over here has to be known there.
        let _ = timeout(PATIENCE, self.0.notices.flush()).await;
        let mut status = self.ask("inspect", topic, State::status).await?;
        let attached = self.0.attached.lock();
        let of_topic = attached.queues.iter().filter(|(of, queue)| of == topic && !queue.is_ended());
        status.fan_out = Some(of_topic.filter(|(_, queue)| queue.group_name().is_none()).count() as u64);
        Ok(status)
    }

    fn status(&self) -> StatusWatch {
        StatusWatch::new(self.0.status.subscribe())
    }

    async fn flush(&self) -> Result<()> {
        if !self.0.closing.has_begun() {
            self.0.notices.flush().await;
            let _ = self.0.link.ask(|_| ()).await; // closed meanwhile is flushed, too
        }
        Ok(())
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        let begins = {
            let _nothing_attaches = self.0.attached.lock();
            let remote = self.0.clone();
            self.0.closing.begin(&Handle::current(), || async move { remote.end(within).await })
        };
        if begins {
            self.0.status.send_replace(Status::Closed);
        }
        self.0.closing.ended().await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        None
    }
}

impl fmt::Debug for SlowRemote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlowRemote").field("session", &self.0.session).finish_non_exhaustive()
    }
}

/// An event as it travels. An index it has is a decorator's, and stays.
pub(super) fn store(event: &Event) -> Result<Stored> {
    let encoded = event.check_size(MAX_PAYLOAD).and_then(|()| wire::encode(event));
    let json = Bytes::from(encoded.map_err(|error| error.on(event.id()))?);
    Ok(Stored { id: event.id().clone(), created_at: event.created_at(), json })
}

pub(super) fn decode(sent: &Sent) -> Result<Event> {
    let event = wire::decode(&sent.stored.json, None)?.event;
    let own = ReplayIndex { generation: sent.place.generation, index: sent.place.offset };
    let index = event.index().unwrap_or(own);
    Ok(event.with_index(Some(index)))
}

/// Sends what was recorded, in batches, until nobody is left to record anything.
async fn send(notices: SettleQueue<Notice>, link: Link, mut gone: oneshot::Receiver<()>) {
    let mut last = false;
    loop {
        let next = notices.next_batch(SETTLED_TOGETHER);
        let mut batch = if last {
            next.now_or_never().unwrap_or_default()
        } else {
            tokio::select! {
                batch = next => batch,
                _ = &mut gone => Vec::new(),
            }
        };
        if batch.is_empty() && std::mem::replace(&mut last, true) {
            return;
        }
        while !batch.is_empty() {
            let notices: Vec<_> = batch.iter().map(|open| open.what().clone()).collect();
            let ask = link.ask(move |state| notices.iter().map(|notice| state.notice(notice)).collect::<Vec<_>>());
            let Ok(answers) = ask.await else { return };
            let mut again = Vec::new();
            for (open, answer) in batch.into_iter().zip(answers) {
                match answer {
                    Answer::Is(settled) => open.answer(settled),
                    Answer::Lost => drop(open),
                    Answer::Failed => again.push(open),
                }
            }
            batch = again;
        }
    }
}

/// Stores dead letters of fan-out subscriptions and of `local_only` events; the server does the others'.
struct Letters(Link);

impl DeadLetterSink for Letters {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        let (link, topic) = (self.0.clone(), topic.clone());
        Some(Box::pin(async move {
            match store(&letter) {
                Ok(stored) => bury(&link, &topic, stored).await,
                Err(error) => tracing::warn!(%topic, %error, "a dead letter cannot be stored"),
            }
        }))
    }
}

/// Stores a dead letter, however often that takes.
pub(super) async fn bury(link: &Link, topic: &Topic, letter: Stored) {
    loop {
        let (topic, letter) = (topic.clone(), letter.clone());
        match link.ask(move |state| state.append(&topic, &[letter])).await {
            Ok(Err(_)) => {}
            Ok(Ok(_)) | Err(_) => return, // an error is the end of this instance
        }
    }
}
