//! A topic as one instance sees it: who follows it here, and up to where each has what.
//!
//! One reader follows the ends of all topics, and reads no further than somebody takes: a stream retains. What it has read is decoded
//! once and kept in a window, from which subscriptions take as they have room. Who falls out of the window, or starts earlier, follows
//! by itself until it has reached the window again. Positions are kept here and nowhere else.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_core::machinery::{self, Aftermath, DeliveryQueue, Pause};
use pubsub_core::{Error, Event, Result, Scope, Topic, dead_letter};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::entry::{Content, Entry, EntryId};
use crate::errors::Fault;
use crate::follower::Follower;
use crate::link::{Cmd, Link};
use crate::look::Look;
use crate::node::Node;
use crate::page::{Page, Request, read_pages};
use crate::reply;
use crate::window::{Item, Read, Window};

/// The most entries that are read at a time.
pub(crate) const PAGE: usize = 250;

/// How long the reader waits for who would fall out of the window, once, before it reads on without them.
pub(crate) const GRACE: Duration = Duration::from_millis(5);

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
    /// What the reader has read.
    window: Window,
    /// There may be more behind it than what comes next tells, or something may have been lost: to be read with care.
    behind: bool,
    /// The reader was told that there is enough for now.
    paused: bool,
    /// Until when it waits for who would fall out of the window.
    waits_until: Option<Instant>,
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
    /// The place in the window of what it takes next; none while it follows by itself.
    next: Option<u64>,
}

/// What a topic wants of the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Read(Want),
    /// To be asked again in [`GRACE`], or when somebody has taken something; and whether this is the first to say so.
    Later {
        first: bool,
    },
    /// Nothing, until somebody takes something.
    Nothing,
}

/// What is to be read of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Want {
    pub(crate) from: EntryId,
    /// Whether by a read that tells what was lost, and does not block.
    pub(crate) careful: bool,
}

impl Channel {
    pub(crate) fn new(topic: Topic, stream: Arc<str>, scope: Arc<Scope>) -> Arc<Self> {
        let (state, moved, warned) = (Mutex::default(), Notify::new(), AtomicBool::new(false));
        Arc::new(Self { topic, stream, scope, state, moved, warned })
    }

    /// What the reader is to read.
    pub(crate) fn wanted(&self) -> Wish {
        let mut state = self.state.lock();
        let wish = state.wish();
        if !matches!(wish, Wish::Read(_)) {
            (state.paused, state.behind) = (true, true);
        }
        wish
    }

    /// Something may have been missed: it is to be read with care.
    pub(crate) fn suspect(&self) {
        self.state.lock().behind = true;
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
        let index = look.read_at(at);
        let mut following = Following { follower: follower.clone(), at, index, next: None };
        if at == look.last && (at >= state.window.at() || !state.is_followed()) {
            state.admit(&mut following);
        }
        let live = following.next.is_some();
        state.followers.push(following);
        live
    }

    pub(crate) fn unfollow(&self, follower: &Follower) {
        {
            let mut state = self.state.lock();
            if let Some(place) = state.place(follower) {
                state.followers.swap_remove(place);
            }
        }
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

    /// Takes what the reader has read, of which so many were asked for, and hands it to all who go with it. Returns whether there is
    /// certainly more to read.
    pub(crate) fn dispatch(self: &Arc<Self>, want: Want, page: Page, asked: usize, node: &Arc<Node>) -> bool {
        let (mut aftermath, mut behind, mut malformed) = (Aftermath::new(), Vec::new(), Vec::new());
        let more = page.entries.len() >= asked;
        {
            let mut state = self.state.lock();
            if state.window.at() != want.from {
                return true; // it has been begun anew meanwhile
            }
            let State { window, followers, .. } = &mut *state;
            if let Some(known) = page.known {
                let end = window.end();
                if window.correct(known.added, known.trimmed) {
                    // Whatever is lost now was lost of the stream that has taken its place.
                    followers.iter_mut().for_each(|following| following.index = (following.next == Some(end)).then_some(0));
                }
            }
            page.entries.into_iter().for_each(|entry| window.push(entry, &self.scope));
            let mut needed = window.end();
            for following in &mut *followers {
                following.take(window, &mut aftermath, &mut malformed);
                needed = needed.min(following.next.unwrap_or(needed));
            }
            window.trim(needed);
            for following in &mut *followers {
                if following.next.is_some_and(|next| !window.has(next)) {
                    following.next = None;
                    following.follower.set_waiting(0);
                    behind.push(following.follower.clone());
                }
            }
            state.behind = more;
        }
        aftermath.finish();
        self.moved.notify_waiters();
        self.pass_over(malformed, node);
        for follower in behind {
            self.catch_up(follower, node);
        }
        more
    }

    /// Gives a follower, whose consumer asks, what waits for it in the window. Returns whether there was something.
    pub(crate) fn give(self: &Arc<Self>, follower: &Follower, node: &Arc<Node>) -> bool {
        let (mut aftermath, mut malformed) = (Aftermath::new(), Vec::new());
        let (given, wanted) = {
            let mut state = self.state.lock();
            let Some(place) = state.place(follower) else { return false };
            let State { window, followers, .. } = &mut *state;
            let given = followers[place].take(window, &mut aftermath, &mut malformed);
            let wanted = given && state.paused && state.has_appetite();
            state.paused &= !wanted;
            (given, wanted)
        };
        aftermath.finish();
        if given {
            self.moved.notify_waiters();
            self.pass_over(malformed, node);
        }
        if wanted {
            node.readers().resume(self, node);
        }
        given
    }

    /// Settles out of the way what is no event: counted, logged once, and dead-lettered where there is a topic for that.
    fn pass_over(&self, malformed: Vec<(Arc<Follower>, Entry)>, node: &Arc<Node>) {
        for (follower, entry) in malformed {
            let Content::Malformed { bytes, why } = &entry.content else { continue };
            self.warn(entry.id, why);
            if let Some(to) = follower.passes_over() {
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

    /// Lets a follower read by itself until it has reached the window.
    pub(crate) fn catch_up(self: &Arc<Self>, follower: Arc<Follower>, node: &Arc<Node>) {
        let (channel, link, weak) = (self.clone(), node.link().clone(), Arc::downgrade(node));
        tokio::spawn(async move {
            let mut pause = Pause::new();
            while let Some(progress) = channel.next_page(&follower, &link, &weak).await {
                match progress {
                    Ok(()) => pause = Pause::new(),
                    Err(fault) if fault.is_temporary() => tokio::time::sleep(pause.step()).await,
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
            (state.followers[state.place(follower)?].at, state.window.at())
        };
        let count = follower.queue.room().min(PAGE);
        let read = read_pages(link, &[Request { stream: &self.stream, from, count }]).await;
        let page = match read.into_iter().next()? {
            Ok(page) => page,
            Err(fault) => return Some(Err(fault)),
        };
        let node = node.upgrade()?;
        let (mut aftermath, mut malformed) = (Aftermath::new(), Vec::new());
        let live = {
            let mut state = self.state.lock();
            let place = state.place(follower)?;
            if page.known.is_some_and(|known| known.last < state.followers[place].at) {
                // Another stream has taken its place, and the server's clock had been set back.
                state.start_over();
                drop(state);
                node.readers().look_again(self);
                return Some(Ok(()));
            }
            let mut following = state.followers.swap_remove(place);
            let complete = page.entries.len() < count;
            if following.take_page(page, &self.scope, &mut aftermath, &mut malformed) && complete {
                // It has all there was when it was read; the reader's entries up to then that are not among them are gone.
                following.at = following.at.max(reader);
                state.admit(&mut following);
            } else if state.is_followed() {
                state.admit(&mut following);
            }
            let live = following.next.is_some();
            if live {
                following.take(&state.window, &mut aftermath, &mut malformed);
            }
            state.followers.push(following);
            live
        };
        aftermath.finish();
        self.moved.notify_waiters();
        self.pass_over(malformed, &node);
        if live {
            node.readers().want(self, &node);
            return None;
        }
        Some(Ok(()))
    }

    /// Waits until a follower has everything that was published before.
    pub(crate) async fn reached(&self, follower: &Follower, link: &Link) {
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
            let until = Instant::now() + LOOK_AGAIN;
            loop {
                let moved = self.moved.notified();
                {
                    let state = self.state.lock();
                    match state.place(follower) {
                        Some(place) if state.followers[place].at < newest => {}
                        _ => return,
                    }
                }
                if tokio::time::timeout_at(until, moved).await.is_err() {
                    break; // what it waits for may have been deleted
                }
            }
        }
    }
}

impl State {
    /// Whether anybody goes with the reader.
    fn is_followed(&self) -> bool {
        self.followers.iter().any(|following| following.next.is_some())
    }

    /// Whether somebody who goes with the reader has little left.
    fn has_appetite(&self) -> bool {
        let furthest = self.followers.iter().filter_map(|following| following.next).max();
        furthest.is_some_and(|next| !self.window.is_enough(next))
    }

    /// Whether the reader is to read on: somebody who goes with it has little left, and nobody falls out of the window for it, or was
    /// waited for already.
    fn wish(&mut self) -> Wish {
        if !self.has_appetite() {
            return Wish::Nothing;
        }
        let want = Wish::Read(Want { from: self.window.at(), careful: self.behind });
        let last = self.followers.iter().filter_map(|following| following.next).min().unwrap_or(self.window.end());
        if !self.window.is_tight(last, PAGE) {
            self.waits_until = None;
            return want;
        }
        // Who is slow slows only itself: the others wait once, and not for long.
        let now = Instant::now();
        match self.waits_until {
            Some(until) if until <= now => want,
            Some(_) => Wish::Later { first: false },
            None => {
                self.waits_until = Some(now + GRACE);
                Wish::Later { first: true }
            }
        }
    }

    /// Lets a follower go with the reader, whose window it has reached.
    fn admit(&mut self, following: &mut Following) {
        if !self.is_followed() {
            self.window.restart(following.at, following.index);
            self.behind = true;
        }
        following.next = self.window.behind(following.at);
    }

    /// Where a follower is in the list.
    fn place(&self, follower: &Follower) -> Option<usize> {
        let is = |following: &Following| std::ptr::eq(&*following.follower, follower);
        let place = follower.place();
        if self.followers.get(place).is_some_and(is) {
            return Some(place);
        }
        let place = self.followers.iter().position(is)?;
        follower.set_place(place);
        Some(place)
    }

    /// Everybody begins at the start of another stream.
    fn start_over(&mut self) {
        self.window.restart(EntryId::ZERO, None);
        self.behind = true;
        for following in &mut self.followers {
            (following.at, following.index) = (EntryId::ZERO, None);
            following.next = following.next.map(|_| self.window.end());
            following.follower.set_waiting(0);
        }
    }
}

impl Following {
    /// Takes what the window has for it and its queue has room for. Returns whether it took anything.
    fn take(&mut self, window: &Window, aftermath: &mut Aftermath, malformed: &mut Vec<(Arc<Follower>, Entry)>) -> bool {
        let Some(first) = self.next else { return false };
        // It may have started further on than the reader had read.
        let mut next = first + window.from(first).take_while(|read| read.id <= self.at).count() as u64;
        loop {
            let (from, mut room) = (next, self.follower.queue.room());
            for read in window.from(from) {
                match &read.item {
                    Item::Event(_) if room == 0 => break,
                    Item::Event(_) => room -= 1,
                    Item::Malformed(entry) => malformed.push((self.follower.clone(), entry.clone())),
                }
                self.pass(read);
                next += 1;
            }
            let events = window.range(from, next).filter_map(|read| match &read.item {
                Item::Event(entry) => Some(entry.clone()),
                Item::Malformed(_) => None,
            });
            self.follower.queue.push(events, aftermath);
            self.follower.set_waiting(window.end() - next);
            // Ordered against a consumer that takes the last its queue has, and then looks whether something waits here.
            fence(Ordering::SeqCst);
            if next == window.end() || self.follower.queue.room() == 0 {
                break;
            }
        }
        self.next = Some(next);
        next > first
    }

    /// Goes past an entry. What is missing right before it is lost.
    fn pass(&mut self, read: &Read) {
        let index = match (self.index, read.number) {
            (Some(index), Some(number)) if number > index => {
                self.follower.lose(number - index, read.id);
                Some(number)
            }
            (index, number) => index.or(number),
        };
        (self.at, self.index) = (read.id, index.map(|index| index + 1));
    }

    /// Takes a page that was read on its own account. Returns whether it has all of it.
    fn take_page(
        &mut self,
        page: Page,
        scope: &Arc<Scope>,
        aftermath: &mut Aftermath,
        malformed: &mut Vec<(Arc<Follower>, Entry)>,
    ) -> bool {
        let mut window = Window::default();
        window.restart(self.at, self.index);
        if let Some(known) = page.known
            && window.correct(known.added, known.trimmed)
        {
            self.index = Some(0);
        }
        page.entries.into_iter().for_each(|entry| window.push(entry, scope));
        self.next = Some(0);
        self.take(&window, aftermath, malformed);
        self.follower.set_waiting(0);
        self.next.take() == Some(window.end())
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("topic", &self.topic).finish_non_exhaustive()
    }
}
