//! A group of a topic as one instance takes part in it: what was read ahead, what consumers hold, and what comes back when.
//!
//! The server assigns entries to instances, as they ask; the local queue assigns them to members, as those ask. How much is read ahead
//! follows how fast it is taken: what waits for longer than `linger` goes back for others, uncounted.

mod keep;
mod settle;
mod state;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Weak};
use std::task::{Context, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_core::machinery::{self, DeliveryQueue, InFlight, RetryQueue};
use pubsub_core::{AckMode, Delivery, Error, Event, SubscribeOptions, Topic, dead_letter};
use tokio::sync::watch;
use tokio::time::Instant;

pub(crate) use self::keep::Claimed;
pub(crate) use self::settle::{Burial, bury_all};
use crate::channel::Channel;
use crate::entry::{Content, Entry, EntryId};
use crate::groups::GroupReader;
use crate::node::Node;
use crate::settle::Place;

/// See the [module](self).
pub(crate) struct Desk {
    pub(crate) node: Arc<Node>,
    pub(crate) channel: Arc<Channel>,
    pub(crate) place: Arc<Place>,
    /// Assigns what has come to members. It also has what was published locally, and all the settlement of that. It ends with the
    /// last member; the next one begins another.
    local: Mutex<Arc<DeliveryQueue>>,
    reader: Arc<GroupReader>,
    me: Weak<Self>,
    state: Mutex<State>,
    /// How much is in consumers' hands.
    in_hands: watch::Sender<usize>,
    /// How many goodbyes are on their way to the server.
    goodbyes: watch::Sender<usize>,
}

#[derive(Default)]
struct State {
    members: HashMap<u64, Member>,
    next_member: u64,
    /// In the local queue and not handed over.
    ahead: BTreeMap<EntryId, Ahead>,
    held: InFlight<Held>,
    /// Members whose last poll found nothing.
    asking: HashSet<u64>,
    /// How much is read ahead.
    most_ahead: usize,
    /// Nothing is read ahead until somebody asks.
    cold: bool,
    /// When something came or was taken last.
    progress: Option<Instant>,
    /// Whether the read that is under way includes this group.
    in_read: bool,
    /// Whether there may be more to read than came last, or something may have been lost before it.
    behind: bool,
    /// When the last read of it ended.
    read_ended: Option<Instant>,
    /// There may be something that nobody holds. Nothing new is read before that was looked for.
    claim: bool,
    /// Somebody is taking something over, or finding out what an answer that got lost had said.
    busy: bool,
    /// Something has to run alone, and waits since then for everything else to be done.
    isolating: Option<Instant>,
    /// The one that runs alone.
    alone: Option<EntryId>,
    /// The greatest id that was seen.
    seen: EntryId,
    /// Retries of this instance, when they are due.
    due: RetryQueue<()>,
    /// Retries that are due too late for the server's idle clock.
    postponed: RetryQueue<(EntryId, u64, Instant)>,
    /// What is on its way to the dead-letter topic.
    dying: BTreeMap<EntryId, u64>,
    hold_due: Option<Instant>,
    sweep_at: Option<Instant>,
    renew_at: Option<Instant>,
    renew: bool,
    armed: Option<Instant>,
    looked_after: Option<Instant>,
    failed: Option<Arc<Error>>,
    /// Lost right before what comes next.
    lost: u64,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    lagged: u64,
    dead_lettered: u64,
    dropped: u64,
}

struct Member {
    options: Arc<SubscribeOptions>,
    held: usize,
    waker: Option<Waker>,
    left: bool,
}

struct Ahead {
    event: Arc<Event>,
    /// How often the server delivered it, this time included.
    count: u64,
    attempt: u32,
    lagged: u64,
    since: Instant,
    /// When the server's idle clock for it began anew.
    touched: Instant,
}

enum Held {
    Remote(Box<Remote>),
    /// It never left the instance: its own queue settles it.
    Local {
        delivery: Delivery,
        member: u64,
    },
}

struct Remote {
    /// Its delivery in the local queue.
    inner: Delivery,
    id: EntryId,
    count: u64,
    attempt: u32,
    member: u64,
    since: Instant,
    touched: Instant,
    revoked: Option<Waker>,
}

impl Held {
    fn member(&self) -> u64 {
        match self {
            Self::Remote(remote) => remote.member,
            Self::Local { member, .. } => *member,
        }
    }

    fn remote(&self) -> Option<&Remote> {
        match self {
            Self::Remote(remote) => Some(remote),
            Self::Local { .. } => None,
        }
    }
}

/// An entry that was read or taken over, and how often the server has delivered it.
pub(crate) struct Arrival {
    pub(crate) entry: Entry,
    pub(crate) count: u64,
}

impl Desk {
    pub(crate) fn new(
        node: Arc<Node>,
        channel: Arc<Channel>,
        place: Arc<Place>,
        local: Arc<DeliveryQueue>,
        reader: Arc<GroupReader>,
    ) -> Arc<Self> {
        let state = State { most_ahead: 1, behind: true, claim: true, ..State::default() };
        Arc::new_cyclic(|me| Self {
            node,
            channel,
            place,
            local: Mutex::new(local),
            reader,
            me: me.clone(),
            state: Mutex::new(state),
            in_hands: watch::Sender::new(0),
            goodbyes: watch::Sender::new(0),
        })
    }

    pub(crate) fn reader(&self) -> &Arc<GroupReader> {
        &self.reader
    }

    pub(crate) fn local(&self) -> Arc<DeliveryQueue> {
        self.local.lock().clone()
    }

    pub(crate) fn set_local(&self, local: Arc<DeliveryQueue>) {
        *self.local.lock() = local;
    }

    fn topic(&self) -> &Topic {
        &self.channel.topic
    }

    fn reclaim(&self) -> Duration {
        self.node.options().reclaim_after
    }

    // Members.

    /// Adds a member.
    pub(crate) fn join(&self, options: SubscribeOptions) -> u64 {
        let number = {
            let mut state = self.state.lock();
            let number = state.next_member;
            state.next_member += 1;
            state.members.insert(number, Member { options: Arc::new(options), held: 0, waker: None, left: false });
            let sweep = Instant::now() + self.sweep_interval();
            state.sweep_at.get_or_insert(sweep);
            state.cold = false;
            number
        };
        self.arm();
        number
    }

    fn sweep_interval(&self) -> Duration {
        self.reclaim().mul_f64(0.125 + fastrand::f64() / 8.0)
    }

    /// A member leaves; what it holds it may still settle. Returns whether it was the last.
    pub(crate) fn leave(&self, number: u64) -> bool {
        let (waker, last) = {
            let mut state = self.state.lock();
            let Some(member) = state.members.get_mut(&number).filter(|member| !member.left) else { return false };
            member.left = true;
            let waker = member.waker.take();
            if member.held == 0 {
                state.members.remove(&number);
            }
            state.asking.remove(&number);
            (waker, state.present().next().is_none())
        };
        waker.into_iter().for_each(Waker::wake);
        if last {
            self.release_ahead();
            self.farewell();
        }
        last
    }

    /// Takes this instance's consumer out of the group once nothing is left to say.
    fn farewell(&self) {
        let gone = {
            let state = self.state.lock();
            state.present().next().is_none() && state.held.is_empty() && state.dying.is_empty()
        };
        if gone && let Some(me) = self.me.upgrade() {
            self.goodbyes.send_modify(|count| *count += 1);
            self.node.say_goodbye(me);
        }
    }

    /// A goodbye was said, or is not needed any more.
    pub(crate) fn goodbye_said(&self) {
        self.goodbyes.send_modify(|count| *count -= 1);
    }

    /// Waits until no goodbye is on its way.
    pub(crate) async fn said_goodbye(&self) {
        // The sender is this very desk's.
        let _ = self.goodbyes.subscribe().wait_for(|count| *count == 0).await;
    }

    pub(crate) fn members(&self) -> u64 {
        self.state.lock().present().count() as u64
    }

    /// What was read ahead.
    pub(crate) fn ahead(&self) -> u64 {
        self.state.lock().ahead.len() as u64
    }

    /// What this instance has taken and nobody holds.
    pub(crate) fn unheld(&self) -> u64 {
        let state = self.state.lock();
        (state.ahead.len() + state.postponed.len()) as u64
    }

    // Reading.

    /// How much to read now, and whether by a read that does not block and tells what was lost; none if nothing is wanted.
    pub(crate) fn wants(&self) -> Option<(usize, bool)> {
        let mut state = self.state.lock();
        let count = state.wants(self.local().room());
        state.in_read = count.is_some();
        // Between two reads that follow each other nothing is trimmed unseen. It may be while nothing is wanted, however short that is,
        // and while this process stands still.
        let stood_still = state.read_ended.is_none_or(|ended| ended.elapsed() > self.node.options().linger);
        state.behind |= count.is_none() || stood_still;
        count.map(|count| (count, state.behind))
    }

    /// Whether a read that includes this group is under way.
    pub(crate) fn is_read(&self) -> bool {
        self.state.lock().in_read
    }

    /// The read that included this group is over.
    pub(crate) fn read_ended(&self) {
        let mut state = self.state.lock();
        state.in_read = false;
        state.read_ended = Some(Instant::now());
    }

    /// A read of it has failed: the next one is to tell what was lost.
    pub(crate) fn read_failed(&self) {
        self.state.lock().behind = true;
    }

    /// So much was trimmed away before this group had read or settled it.
    fn tell_lost(&self, lost: u64) {
        if lost > 0
            && let Some(count) = self.node.told.trimmed.count(lost)
        {
            let (topic, group) = (self.topic(), &self.place.group);
            tracing::warn!(%topic, %group, count, "events were trimmed away before a group had read them");
        }
    }

    /// Something was read: perhaps nothing, and perhaps there is more.
    pub(crate) fn read(&self, entries: Vec<Entry>, lost: u64, asked: usize) {
        {
            let mut state = self.state.lock();
            state.behind = entries.len() >= asked;
            state.lost += lost;
            state.counts.lagged += lost;
            if let Some(last) = entries.last() {
                state.seen = state.seen.max(last.id);
            }
        }
        self.tell_lost(lost);
        self.arrive(entries.into_iter().map(|entry| Arrival { entry, count: 1 }).collect());
    }

    /// Puts what has come where members find it.
    pub(crate) fn arrive(&self, arrivals: Vec<Arrival>) {
        if arrivals.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut malformed = Vec::new();
        let mut events = Vec::with_capacity(arrivals.len());
        {
            let mut state = self.state.lock();
            state.progress = Some(now);
            for Arrival { entry: Entry { id, content, .. }, count } in arrivals {
                match content {
                    Content::Event { event, earlier } => {
                        let attempt = u32::try_from(count).unwrap_or(u32::MAX).saturating_add(earlier);
                        let lagged = std::mem::take(&mut state.lost);
                        let ahead = Ahead { event: event.clone(), count, attempt, lagged, since: now, touched: now };
                        state.ahead.insert(id, ahead);
                        events.push(machinery::Entry::new(event).at(self.channel.scope.clone(), id.position()));
                    }
                    Content::Malformed { bytes, why } => {
                        state.counts.dropped += 1;
                        state.dying.insert(id, count);
                        malformed.push((id, count, bytes, why));
                    }
                }
            }
            if state.present().next().is_none() {
                drop(state);
                self.release_ahead();
                events.clear();
            }
        }
        let mut events = events.into_iter();
        // There was room when it was asked for; what was published locally meanwhile may have taken it, and then it goes back.
        self.channel.fill(&self.local(), events.by_ref());
        if events.len() > 0 {
            let left: Vec<_> = events.filter_map(|entry| entry.position()).map(EntryId::from).collect();
            self.release(|id| left.contains(&id));
        }
        for (id, count, bytes, why) in malformed {
            self.channel.warn(id, &why);
            let letter = self.dead_letter_topic().map(|to| {
                let stand_in = Entry::stand_in(id, &bytes);
                let attempts = u32::try_from(count).unwrap_or(u32::MAX);
                (to, dead_letter(&stand_in, self.topic(), Some(&self.place.group), attempts, "not an event"))
            });
            drop(self.bury(id, count, letter, None));
        }
        self.arm();
    }

    /// Where some member wants its dead letters.
    fn dead_letter_topic(&self) -> Option<Topic> {
        self.state.lock().members.values().find_map(|member| member.options.dead_letter.clone())
    }

    pub(crate) fn seen(&self) -> EntryId {
        self.state.lock().seen
    }

    // Asking and handing over.

    /// A member's poll found nothing.
    pub(crate) fn ask(&self, number: u64) {
        let (ring, tend) = {
            let mut state = self.state.lock();
            if state.members.get(&number).is_none_or(|member| member.left) {
                return;
            }
            state.asking.insert(number);
            state.cold = false;
            let ring = !state.in_read && state.wants(self.local().room()).is_some();
            (ring, state.claim && !state.busy)
        };
        if tend {
            self.node.keeper().tend(self.me.clone());
        } else if ring {
            self.reader.ring();
        }
    }

    /// Whether a member holds all it may; it is woken when it no longer does.
    pub(crate) fn is_full(&self, number: u64, cx: &Context<'_>, mode: AckMode) -> bool {
        let mut state = self.state.lock();
        let Some(member) = state.members.get_mut(&number) else { return false };
        let full = mode == AckMode::Manual && !member.left && member.held >= member.options.max_in_flight;
        if full {
            member.waker = Some(cx.waker().clone());
            state.asking.remove(&number);
        }
        full
    }

    /// Hands over what the local queue gave a member; none if it is not this instance's any more, or was given up.
    pub(crate) fn hand_over(self: &Arc<Self>, number: u64, inner: Delivery, mode: AckMode) -> Option<Delivery> {
        let Some(cursor) = inner.cursor() else { return Some(self.hand_over_local(number, inner, mode)) };
        let id = EntryId::from(cursor.position());
        let now = Instant::now();
        let (ahead, options, ring) = {
            let mut state = self.state.lock();
            let known = state.ahead.get(&id).is_some_and(|ahead| Arc::ptr_eq(&ahead.event, inner.event()));
            let taken = if known { state.ahead.remove(&id) } else { None };
            let Some(ahead) = taken else {
                drop(state);
                drop(inner.done()); // it went back meanwhile
                return None;
            };
            let options = state.members.get(&number).map(|member| member.options.clone());
            state.asking.remove(&number);
            state.adapt(now, ahead.since, self.node.options().linger);
            (ahead, options, !state.in_read && state.wants(self.local().room()).is_some())
        };
        if ring {
            self.reader.ring();
        }
        let Some(options) = options else {
            self.free(id, ahead.count, ahead.count.saturating_sub(1), now);
            drop(inner.done());
            return None;
        };
        let Ahead { event, count, attempt, lagged, touched, .. } = ahead;
        if options.retry.is_over(attempt) {
            drop(self.give_up(&event, id, count, attempt - 1, "attempts exhausted", &options, Some(inner)));
            return None;
        }
        let delivery = match mode {
            AckMode::Auto => {
                drop(self.done(id, count, touched));
                drop(inner.done());
                Delivery::settled(event, attempt)
            }
            AckMode::Manual => {
                let remote = Remote { inner, id, count, attempt, member: number, since: now, touched, revoked: None };
                let token = self.hold(Held::Remote(Box::new(remote)), now + options.max_hold);
                Delivery::held(event, attempt, self.clone(), token)
            }
        };
        Some(delivery.at(self.channel.scope.clone(), id.position()).after_losing(lagged))
    }

    fn hand_over_local(self: &Arc<Self>, number: u64, delivery: Delivery, mode: AckMode) -> Delivery {
        let (event, attempt, lagged) = (delivery.event().clone(), delivery.attempt(), delivery.lagged());
        self.state.lock().asking.remove(&number);
        if mode == AckMode::Auto {
            drop(delivery.done());
            return Delivery::settled(event, attempt).after_losing(lagged);
        }
        // Its own queue looks after how long it is held.
        let token = self.hold(Held::Local { delivery, member: number }, Instant::now() + FAR);
        Delivery::held(event, attempt, self.clone(), token).after_losing(lagged)
    }

    fn hold(&self, held: Held, until: Instant) -> u64 {
        let token = {
            let mut state = self.state.lock();
            if let Some(member) = state.members.get_mut(&held.member()) {
                member.held += 1;
            }
            let token = state.held.insert(held);
            state.hold_due = Some(state.hold_due.map_or(until, |due| due.min(until)));
            self.in_hands.send_replace(state.held.len());
            token
        };
        self.arm();
        token
    }

    /// Takes a delivery out of a consumer's hands.
    fn let_go(&self, token: u64) -> Option<Held> {
        let (held, waker, last) = {
            let mut state = self.state.lock();
            let held = state.held.remove(token)?;
            let mut waker = None;
            if let Some(member) = state.members.get_mut(&held.member()) {
                member.held -= 1;
                waker = member.waker.take();
                if member.left && member.held == 0 {
                    state.members.remove(&held.member());
                }
            }
            if let Some(remote) = held.remote()
                && state.alone == Some(remote.id)
            {
                state.alone = None;
            }
            self.in_hands.send_replace(state.held.len());
            (held, waker, state.present().next().is_none() && state.held.is_empty())
        };
        waker.into_iter().for_each(Waker::wake);
        if last {
            self.farewell();
        }
        Some(held)
    }
}

/// Beyond any deadline that matters.
const FAR: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl Drop for Desk {
    fn drop(&mut self) {
        self.node.timer().target_gone();
    }
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").field("topic", self.topic()).field("group", &self.place.group).finish_non_exhaustive()
    }
}
