//! A topic as one instance sees it: who follows it here, and up to where each has what.
//!
//! One reader follows the ends of all topics. A subscription that cannot take what comes, or starts earlier, follows by itself with
//! plain range reads until it has reached the reader's position, and then goes on with it. Positions are kept here and nowhere else.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::machinery::{self, Aftermath, DeliveryQueue};
use pubsub_core::{
    AckMode, Control, Delivery, Error, Event, Result, Scope, Source, SubscribeOptions, SubscriptionHandle, SubscriptionStatus,
    Topic, dead_letter,
};
use tokio::sync::Notify;

use crate::entry::{Content, Entry, EntryId};
use crate::errors::Fault;
use crate::link::{Cmd, Link};
use crate::look::{Look, look};
use crate::node::{INSTANCE, Node};
use crate::pause::Pause;
use crate::reply;

/// How many entries are read at a time.
pub(crate) const PAGE: usize = 250;

/// How often a drain looks whether more was published meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

pub(crate) struct Channel {
    pub(crate) topic: Topic,
    pub(crate) stream: Arc<str>,
    pub(crate) scope: Arc<Scope>,
    state: Mutex<State>,
    /// Rung when a position has moved.
    moved: Notify,
    /// Whether what is malformed was logged.
    warned: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Up to where the reader has read.
    at: EntryId,
    followers: Vec<Following>,
    /// The local queues of groups.
    locals: Vec<Arc<DeliveryQueue>>,
}

struct Following {
    follower: Arc<Follower>,
    /// Up to where it has everything.
    at: EntryId,
    /// How many entries had been added up to there, where that is known.
    index: Option<u64>,
    /// Whether it goes with the reader.
    live: bool,
}

impl Channel {
    pub(crate) fn new(topic: Topic, stream: Arc<str>, scope: Arc<Scope>) -> Arc<Self> {
        let (state, moved, warned) = (Mutex::default(), Notify::new(), AtomicBool::new(false));
        Arc::new(Self { topic, stream, scope, state, moved, warned })
    }

    /// From where the reader is to read on, if anybody goes with it.
    pub(crate) fn wanted(&self) -> Option<EntryId> {
        let state = self.state.lock();
        state.followers.iter().any(|following| following.live).then_some(state.at)
    }

    /// How many follow.
    pub(crate) fn followers(&self) -> usize {
        self.state.lock().followers.len()
    }

    /// Ends all that follow with an error.
    pub(crate) fn fail(&self, fault: &Fault) {
        let followers = std::mem::take(&mut self.state.lock().followers);
        for Following { follower, .. } in followers {
            follower.fail(Error::from(fault.clone()).during("read").on(&self.topic));
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        let mut state = self.state.lock();
        state.locals.retain(|queue| !queue.is_ended());
        state.followers.is_empty() && state.locals.is_empty()
    }

    /// Starts to follow behind an entry. Returns whether it goes with the reader at once.
    pub(crate) fn follow(&self, follower: &Arc<Follower>, at: EntryId, look: &Look) -> bool {
        let mut state = self.state.lock();
        let live = at == look.last && at >= state.at;
        if live && !state.followers.iter().any(|following| following.live) {
            state.at = at;
        }
        let index = look.read_at(at);
        state.followers.push(Following { follower: follower.clone(), at, index, live });
        live
    }

    fn unfollow(&self, follower: &Arc<Follower>) {
        self.state.lock().followers.retain(|following| !Arc::ptr_eq(&following.follower, follower));
        self.moved.notify_waiters();
    }

    pub(crate) fn add_local(&self, queue: Arc<DeliveryQueue>) {
        self.state.lock().locals.push(queue);
    }

    /// Gives an event that stays within the instance to all queues, or to none and returns one that is full.
    pub(crate) fn offer_locally(&self, event: &Arc<Event>) -> Option<Arc<DeliveryQueue>> {
        let mut aftermath = Aftermath::new();
        {
            let mut state = self.state.lock();
            state.locals.retain(|queue| !queue.is_ended());
            let queues = || state.followers.iter().map(|following| &following.follower.queue).chain(&state.locals);
            if let Some(full) = queues().find(|queue| queue.room() == 0) {
                return Some(full.clone());
            }
            queues().for_each(|queue| queue.push([machinery::Entry::new(event.clone())], &mut aftermath));
        }
        aftermath.finish();
        None
    }

    /// Adds to a queue of this topic what it has room for, while nobody else can. Returns how many that were.
    pub(crate) fn fill(&self, queue: &DeliveryQueue, entries: impl ExactSizeIterator<Item = machinery::Entry>) -> usize {
        let mut aftermath = Aftermath::new();
        let count = {
            let _state = self.state.lock();
            let count = queue.room().min(entries.len());
            queue.push(entries.take(count), &mut aftermath);
            count
        };
        aftermath.finish();
        count
    }

    /// Hands what the reader has read to all who go with it.
    pub(crate) fn dispatch(self: &Arc<Self>, entries: &[Entry], node: &Arc<Node>) {
        let Some(last) = entries.last() else { return };
        let (mut aftermath, mut behind, mut malformed) = (Aftermath::new(), Vec::new(), Vec::new());
        {
            let mut state = self.state.lock();
            state.at = state.at.max(last.id);
            for following in state.followers.iter_mut().filter(|following| following.live) {
                let new = entries.partition_point(|entry| entry.id <= following.at);
                if self.hand(following, &entries[new..], &mut aftermath, &mut malformed) < entries.len() - new {
                    following.live = false;
                    behind.push(following.follower.clone());
                }
            }
        }
        aftermath.finish();
        self.moved.notify_waiters();
        self.pass_over(malformed, node);
        for follower in behind {
            self.catch_up(follower, node);
        }
    }

    /// Hands as much as there is room for to one follower, and returns how many that were.
    fn hand(
        &self,
        following: &mut Following,
        entries: &[Entry],
        aftermath: &mut Aftermath,
        malformed: &mut Vec<(Arc<Follower>, Entry)>,
    ) -> usize {
        let Following { follower, at, index, .. } = following;
        let (mut room, mut count) = (follower.queue.room(), 0);
        let mut pushed = Vec::with_capacity(entries.len().min(room));
        for entry @ Entry { id, content } in entries {
            match content {
                Content::Event { .. } if room == 0 => break,
                Content::Event { event, earlier } => {
                    let entry = machinery::Entry::new(event.clone()).attempt(1 + earlier);
                    pushed.push(entry.at(self.scope.clone(), id.position()));
                    room -= 1;
                }
                Content::Malformed { .. } => malformed.push((follower.clone(), entry.clone())),
            }
            (*at, count) = (*id, count + 1);
        }
        *index = index.map(|index| index + count as u64);
        follower.queue.push(pushed, aftermath);
        count
    }

    /// Settles out of the way what is no event: counted, logged once, and dead-lettered where there is a topic for that.
    fn pass_over(&self, malformed: Vec<(Arc<Follower>, Entry)>, node: &Arc<Node>) {
        for (follower, entry) in malformed {
            let Content::Malformed { bytes, why } = &entry.content else { continue };
            self.warn(entry.id, why);
            follower.malformed.fetch_add(1, Ordering::Relaxed);
            if let Some(to) = &follower.options.dead_letter {
                let stand_in = Entry::stand_in(entry.id, bytes);
                let letter = dead_letter(&stand_in, &self.topic, None, 1, "not an event");
                tokio::spawn(node.letters().bury(to.clone(), letter));
            }
        }
    }

    pub(crate) fn warn(&self, id: EntryId, why: &str) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(topic = %self.topic, entry = %id, why, "an entry that is no event is passed over; further ones are only counted");
        }
    }

    /// Lets a follower read by itself until it has reached the reader.
    pub(crate) fn catch_up(self: &Arc<Self>, follower: Arc<Follower>, node: &Arc<Node>) {
        let (channel, link, weak) = (self.clone(), node.link().clone(), Arc::downgrade(node));
        tokio::spawn(async move {
            let mut pause = Pause::new();
            while let Some(progress) = channel.next_page(&follower, &link, &weak).await {
                match progress {
                    Ok(()) => pause = Pause::new(),
                    Err(fault) if fault.is_temporary() => tokio::time::sleep(pause.next()).await,
                    Err(fault) => {
                        channel.unfollow(&follower);
                        return follower.fail(Error::from(fault).during("read").on(&channel.topic));
                    }
                }
            }
        });
    }

    /// One page of catching up; none once that is over.
    async fn next_page(
        self: &Arc<Self>,
        follower: &Arc<Follower>,
        link: &Link,
        node: &Weak<Node>,
    ) -> Option<Result<(), Fault>> {
        if follower.queue.room() == 0 {
            follower.queue.room_freed().await;
        }
        let (from, reader) = {
            let state = self.state.lock();
            (state.following(follower)?.at, state.at)
        };
        let count = follower.queue.room().min(PAGE);
        let read = Cmd::new("XRANGE").key(&self.stream).arg(format!("({from}")).arg("+").arg("COUNT").number(count as u64);
        let looked = match look(link, &self.stream, None).await {
            Ok(looked) => looked,
            Err(fault) => return Some(Err(fault)),
        };
        let entries = match link.call(read).await.and_then(reply::entries) {
            Ok(entries) => entries,
            Err(fault) => return Some(Err(fault)),
        };
        let node = node.upgrade()?;
        let (mut aftermath, mut malformed, mut live) = (Aftermath::new(), Vec::new(), false);
        {
            let mut state = self.state.lock();
            let at = state.at;
            let anybody_live = state.followers.iter().any(|following| following.live);
            let following = state.followers.iter_mut().find(|following| Arc::ptr_eq(&following.follower, follower))?;
            if looked.exists && looked.last < following.at {
                // Another stream has taken its place, and the server's clock had been set back.
                (following.at, following.index) = (EntryId::ZERO, None);
                state.at = EntryId::ZERO;
                return Some(Ok(()));
            }
            if let (Some(index), Some(trimmed)) = (following.index, looked.trimmed())
                && trimmed > index
                && let Some(next) = entries.first()
            {
                follower.lose(trimmed - index, next.id);
                following.index = Some(trimmed);
            }
            let handed = self.hand(following, &entries, &mut aftermath, &mut malformed);
            if handed == entries.len() && entries.len() < count {
                // It has all there was when it was read; the reader's entries up to then that are not among them are gone.
                following.at = following.at.max(reader);
                live = following.at >= at;
                following.live = live;
                if live && !anybody_live {
                    state.at = state.following(follower)?.at;
                }
            }
        }
        aftermath.finish();
        self.moved.notify_waiters();
        self.pass_over(malformed, &node);
        if live {
            node.reader().want(self);
            return None;
        }
        Some(Ok(()))
    }

    /// Waits until a follower has everything that was published before.
    async fn reached(&self, follower: &Arc<Follower>, link: &Link) {
        loop {
            let newest = Cmd::new("XREVRANGE").key(&self.stream).arg("+").arg("-").arg("COUNT").arg(1);
            let Ok(newest) = link.call(newest).await.and_then(reply::entries) else {
                tokio::time::sleep(LOOK_AGAIN).await;
                if follower.is_ended() {
                    return;
                }
                continue;
            };
            let Some(newest) = newest.first().map(|entry| entry.id) else { return };
            let until = tokio::time::Instant::now() + LOOK_AGAIN;
            loop {
                let moved = self.moved.notified();
                match self.state.lock().following(follower) {
                    Some(following) if following.at < newest => {}
                    _ => return,
                }
                if tokio::time::timeout_at(until, moved).await.is_err() {
                    break; // what it waits for may have been deleted
                }
            }
        }
    }
}

impl State {
    fn following(&self, follower: &Arc<Follower>) -> Option<&Following> {
        self.followers.iter().find(|following| Arc::ptr_eq(&following.follower, follower))
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("topic", &self.topic).finish_non_exhaustive()
    }
}

/// One fan-out subscription. All its settlement is local.
pub(crate) struct Follower {
    pub(crate) queue: Arc<DeliveryQueue>,
    options: SubscribeOptions,
    inner: SubscriptionHandle,
    /// How many were lost before an entry, until it is handed over.
    lost: Mutex<BTreeMap<EntryId, u64>>,
    /// Whether `lost` holds anything.
    lossy: AtomicBool,
    lagged: AtomicU64,
    malformed: AtomicU64,
    ended: AtomicBool,
    failed: Mutex<Option<Error>>,
}

impl Follower {
    pub(crate) fn new(queue: Arc<DeliveryQueue>, options: SubscribeOptions, inner: SubscriptionHandle) -> Arc<Self> {
        Arc::new(Self {
            queue,
            options,
            inner,
            lost: Mutex::default(),
            lossy: AtomicBool::new(false),
            lagged: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            failed: Mutex::default(),
        })
    }

    fn lose(&self, count: u64, before: EntryId) {
        *self.lost.lock().entry(before).or_default() += count;
        self.lossy.store(true, Ordering::Release);
        self.lagged.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends its stream with an error.
    fn fail(&self, error: Error) {
        self.failed.lock().get_or_insert(error);
        self.inner.stop();
    }
}

/// A follower and what it lives on: ends the following when it is dropped.
pub(crate) struct Attachment {
    follower: Arc<Follower>,
    channel: Arc<Channel>,
    node: Arc<Node>,
}

impl Attachment {
    pub(crate) fn new(follower: Arc<Follower>, channel: Arc<Channel>, node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self { follower, channel, node })
    }

    /// Waits until nothing is left that only this instance could hand over, and nothing in its consumer's hands.
    pub(crate) async fn relieved(&self) {
        self.drained().await;
    }

    /// Ends it and takes back what is held. Returns how much was still queued, and how much was held.
    pub(crate) fn cut_off(&self) -> (u64, u64) {
        let queue = &self.follower.queue;
        let released = queue.burden(INSTANCE).1;
        self.end();
        (released, queue.revoke(INSTANCE))
    }

    fn end(&self) {
        if !self.follower.ended.swap(true, Ordering::AcqRel) {
            self.follower.inner.stop();
            self.channel.unfollow(&self.follower);
            self.node.reader().leave();
            self.node.tidy(&self.channel);
        }
    }
}

#[async_trait]
impl Control for Attachment {
    fn stop(&self) {
        self.end();
    }

    async fn stopped(&self) {
        // Ending is immediate: once `end` has returned, nothing can arrive. The connection goes with the last one.
        self.node.reader().left().await;
    }

    async fn drained(&self) {
        if !self.follower.is_ended() {
            self.channel.reached(&self.follower, self.node.link()).await;
        }
        self.follower.queue.drained().await;
    }

    fn status(&self) -> SubscriptionStatus {
        let mut status = self.follower.inner.status();
        status.lagged += self.follower.lagged.load(Ordering::Relaxed);
        status.dropped += self.follower.malformed.load(Ordering::Relaxed);
        status
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("channel", &self.channel).finish_non_exhaustive()
    }
}

/// A follower's stream.
pub(crate) struct FollowerSource {
    pub(crate) inner: Box<dyn Source>,
    pub(crate) attachment: Arc<Attachment>,
}

impl Source for FollowerSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let follower = &self.attachment.follower;
        let Some(delivery) = ready!(self.inner.poll_next(cx, mode)).transpose()? else {
            return Poll::Ready(follower.failed.lock().take().map(Err));
        };
        if !follower.lossy.load(Ordering::Acquire) || delivery.attempt() > 1 {
            return Poll::Ready(Some(Ok(delivery)));
        }
        let mut lost = follower.lost.lock();
        let at = delivery.cursor().map(|cursor| EntryId::from(cursor.position()));
        let lagged = delivery.lagged() + at.and_then(|at| lost.remove(&at)).unwrap_or(0);
        follower.lossy.store(!lost.is_empty(), Ordering::Release);
        Poll::Ready(Some(Ok(delivery.after_losing(lagged))))
    }
}

impl Drop for FollowerSource {
    fn drop(&mut self) {
        self.attachment.end();
    }
}
