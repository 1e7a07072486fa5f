//! A group of a topic as one instance takes part in it: what was read ahead, what consumers hold, and what comes back when.
//!
//! The server assigns entries to instances, as they ask; the local queue assigns them to members, as those ask. How much is read ahead
//! follows how fast it is taken: what waits for longer than `linger` goes back for others, uncounted.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_core::machinery::{self, DeliveryQueue, Due, InFlight, RetryQueue, SettleQueue};
use pubsub_core::{
    AckMode, Delivery, Error, Event, Receipt, Settled, Settlement, SubscribeOptions, SubscriptionStatus, Topic, dead_letter,
};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::channel::Channel;
use crate::entry::{Content, Entry, EntryId};
use crate::groups::GroupReader;
use crate::node::{Letters, Node};
use crate::settle::{Answer, Notice, Place, What};

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
    /// When it was read last.
    last_read: Option<Instant>,
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
        let stale = state.last_read.is_none_or(|last| last.elapsed() > self.node.options().linger);
        count.map(|count| (count, state.behind || stale))
    }

    /// Whether a read that includes this group is under way.
    pub(crate) fn is_read(&self) -> bool {
        self.state.lock().in_read
    }

    /// The read that included this group is over.
    pub(crate) fn read_ended(&self) {
        self.state.lock().in_read = false;
    }

    /// Something was read: perhaps nothing, and perhaps there is more.
    pub(crate) fn read(&self, entries: Vec<Entry>, lost: u64, asked: usize) {
        {
            let mut state = self.state.lock();
            state.behind = entries.len() >= asked;
            state.last_read = Some(Instant::now());
            state.lost += lost;
            state.counts.lagged += lost;
            if let Some(last) = entries.last() {
                state.seen = state.seen.max(last.id);
            }
        }
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
            for Arrival { entry: Entry { id, content }, count } in arrivals {
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

    // Settling.

    fn record(&self, id: EntryId, count: u64, what: What) -> Receipt {
        self.node.notices().record(Notice { place: self.place.clone(), id, count, what })
    }

    fn done(&self, id: EntryId, count: u64, touched: Instant) -> Receipt {
        self.record(id, count, What::Done { held_until: touched + self.reclaim().mul_f64(2.0 / 3.0) })
    }

    /// Gives an entry to anybody from then on, counted as delivered so often.
    fn free(&self, id: EntryId, count: u64, counts: u64, due: Instant) -> Receipt {
        let reclaim = self.reclaim();
        {
            let mut state = self.state.lock();
            if due > Instant::now() + reclaim {
                state.postponed.push(due - reclaim, (id, count, due));
                drop(state);
                self.arm();
                return self.record(id, count, What::Keep);
            }
            state.due.push(due, ());
        }
        self.arm();
        self.record(id, count, What::Free { due, count: counts })
    }

    /// Gives back what was read ahead.
    pub(crate) fn release_ahead(&self) {
        self.release(|_| true);
    }

    fn release(&self, which: impl Fn(EntryId) -> bool) {
        let now = Instant::now();
        let released: Vec<_> = {
            let mut state = self.state.lock();
            let ids: Vec<_> = state.ahead.keys().copied().filter(|id| which(*id)).collect();
            if ids.is_empty() {
                return;
            }
            (state.cold, state.claim, state.most_ahead) = (true, true, (state.most_ahead / 2).max(1));
            if state.alone.is_some_and(|alone| ids.contains(&alone)) {
                state.alone = None;
            }
            ids.into_iter().filter_map(|id| Some((id, state.ahead.remove(&id)?))).collect()
        };
        let events: HashSet<_> = released.iter().map(|(_, ahead)| Arc::as_ptr(&ahead.event)).collect();
        self.local().retain(|event| !events.contains(&std::ptr::from_ref(event)));
        for (id, ahead) in &released {
            let what = What::Free { due: now, count: ahead.count.saturating_sub(1) };
            drop(self.record(*id, ahead.count, what));
        }
    }

    #[expect(clippy::too_many_arguments)] // all that makes a dead letter
    fn give_up(
        &self,
        event: &Event,
        id: EntryId,
        count: u64,
        attempts: u32,
        reason: &str,
        options: &SubscribeOptions,
        inner: Option<Delivery>,
    ) -> Receipt {
        let group = &self.place.group;
        let letter =
            options.dead_letter.clone().map(|to| (to, dead_letter(event, self.topic(), Some(group), attempts, reason)));
        {
            let mut state = self.state.lock();
            match letter {
                Some(_) => state.counts.dead_lettered += 1,
                None => state.counts.dropped += 1,
            }
            state.dying.insert(id, count);
        }
        if letter.is_none() {
            let topic = self.topic();
            tracing::warn!(%topic, %group, event = %event.id(), attempts, reason, "a delivery was given up: no attempt left and no dead-letter topic");
        }
        self.bury(id, count, letter, inner)
    }

    /// Acknowledges what was given up, once its letter, if there is one, is confirmed.
    fn bury(&self, id: EntryId, count: u64, letter: Option<(Topic, Event)>, inner: Option<Delivery>) -> Receipt {
        match self.me.upgrade() {
            Some(desk) => self.node.burials().record(Burial { desk, id, count, letter, inner }),
            None => Receipt::ready(Settled::Unconfirmed), // it is being dropped: nobody holds anything of it
        }
    }

    /// A delivery comes back after a back-off, or is given up if it was tried often enough.
    fn retry(&self, remote: Remote, after: Option<Duration>, reason: &str, options: &SubscribeOptions) -> Receipt {
        let Remote { inner, id, count, attempt, .. } = remote;
        let policy = &options.retry;
        if policy.is_exhausted_after(attempt) {
            let event = inner.event().clone();
            return self.give_up(&event, id, count, attempt, reason, options, Some(inner));
        }
        let backoff = after.unwrap_or_else(|| policy.backoff_after(attempt, fastrand::f64())).min(FAR);
        drop(inner.done());
        self.free(id, count, count, Instant::now() + backoff)
    }

    fn options_of(&self, token: u64) -> Option<Arc<SubscribeOptions>> {
        let state = self.state.lock();
        let member = state.held.get(token)?.member();
        Some(state.members.get(&member)?.options.clone())
    }

    /// Takes a delivery back as a retry, at once, and tells its holder.
    fn take_back(&self, token: u64, reason: &str) {
        let options = self.options_of(token);
        match self.let_go(token) {
            Some(Held::Remote(mut remote)) => {
                let revoked = remote.revoked.take();
                if let Some(options) = options {
                    drop(self.retry(*remote, Some(Duration::ZERO), reason, &options));
                }
                revoked.into_iter().for_each(Waker::wake);
            }
            Some(Held::Local { delivery, .. }) => drop(delivery.retry()),
            None => {}
        }
    }

    /// Takes back all that is held from the server, and returns how much that is.
    pub(crate) fn revoke(&self) -> u64 {
        let is_remote = |held: &Held| held.remote().is_some();
        let tokens: Vec<_> =
            self.state.lock().held.iter().filter(|(_, held)| is_remote(held)).map(|(token, _)| token).collect();
        tokens.iter().for_each(|token| self.take_back(*token, "its holder was closed"));
        tokens.len() as u64
    }

    /// Waits until nothing is in consumers' hands.
    pub(crate) async fn idle(&self) {
        // The sender is this very desk's.
        let _ = self.in_hands.subscribe().wait_for(|held| *held == 0).await;
    }

    /// Whether a member has left.
    pub(crate) fn has_left(&self, number: u64) -> bool {
        self.state.lock().members.get(&number).is_none_or(|member| member.left)
    }

    pub(crate) fn add_to(&self, number: u64, status: &mut SubscriptionStatus) {
        let state = self.state.lock();
        status.held = state.members.get(&number).map_or(0, |member| member.held as u64);
        status.delayed += (state.due.len() + state.postponed.len()) as u64;
        status.lagged += state.counts.lagged;
        status.dead_lettered += state.counts.dead_lettered;
        status.dropped += state.counts.dropped;
        status.ended = state.members.get(&number).is_none_or(|member| member.left);
    }

    // What the keeper does.

    /// What is to be said to be held still; nothing if it is not time yet.
    pub(crate) fn to_renew(&self) -> Vec<(EntryId, u64)> {
        let mut state = self.state.lock();
        if !std::mem::take(&mut state.renew) {
            return Vec::new();
        }
        let held = state.held.iter().filter_map(|(_, held)| held.remote()).map(|remote| (remote.id, remote.count));
        let ahead = state.ahead.iter().map(|(id, ahead)| (*id, ahead.count));
        let postponed = state.postponed.iter().map(|(id, count, _)| (*id, *count));
        let dying = state.dying.iter().map(|(id, count)| (*id, *count));
        held.chain(ahead).chain(postponed).chain(dying).collect()
    }

    /// What came of saying so, `asked` being when it was said.
    pub(crate) fn renewed(&self, asked: Instant, renewals: &[(EntryId, u64)], answers: &[Answer]) {
        let mut lost = Vec::new();
        {
            let mut state = self.state.lock();
            let answers: HashMap<_, _> = renewals.iter().map(|(id, _)| *id).zip(answers.iter().copied()).collect();
            let tokens: Vec<_> = state.held.iter().map(|(token, _)| token).collect();
            for token in tokens {
                let Some(Held::Remote(remote)) = state.held.get_mut(token) else { continue };
                match answers.get(&remote.id) {
                    Some(Answer::Done) => remote.touched = asked,
                    Some(_) => lost.push(token),
                    None => {}
                }
            }
            state.ahead.retain(|id, ahead| match answers.get(id) {
                Some(Answer::Done) => {
                    ahead.touched = asked;
                    true
                }
                Some(_) => false, // its copy in the local queue is passed over
                None => true,
            });
        }
        for token in lost {
            if let Some(Held::Remote(mut remote)) = self.let_go(token) {
                remote.revoked.take().into_iter().for_each(Waker::wake);
                drop(remote.inner.done());
            }
        }
    }

    /// How much to take over now: of nobody's, of silent holders', and whether one that has to run alone; none if nothing is wanted.
    /// With an answer, [`claimed`](Self::claimed) has to be called.
    pub(crate) fn to_claim(&self) -> Option<(usize, usize, bool)> {
        let mut state = self.state.lock();
        let wanted = !state.asking.is_empty() || !state.cold;
        if !state.claim
            || state.busy
            || !wanted
            || state.alone.is_some()
            || state.failed.is_some()
            || state.present().next().is_none()
        {
            return None;
        }
        let room = self.local().room();
        let free = state.most_ahead.saturating_sub(state.ahead.len()).max(state.asking.len()).min(room);
        let silent = state.asking.len().saturating_sub(state.ahead.len()).min(room);
        if free == 0 {
            return None;
        }
        let waited = state.isolating.is_some_and(|since| since.elapsed() > self.reclaim());
        let alone = silent > 0 && ((state.held.is_empty() && state.ahead.is_empty()) || waited);
        (state.busy, state.claim) = (true, false);
        Some((free, silent, alone))
    }

    /// What came of it: what was taken over, and whether there may be more.
    pub(crate) fn claimed(&self, claimed: Option<Claimed>, more: bool) {
        let Claimed { arrivals, lost, mine, left_alone, alone } = claimed.unwrap_or_default();
        let (forgotten, again) = {
            let mut state = self.state.lock();
            state.busy = false;
            state.claim |= more;
            state.lost += lost;
            state.counts.lagged += lost;
            state.alone = state.alone.or(alone);
            state.isolating = if left_alone { state.isolating.or(Some(Instant::now())) } else { None };
            // What is not known here was read, and the answer got lost.
            let forgotten: Vec<_> = mine.into_iter().filter(|(id, _)| !state.knows(*id)).collect();
            state.claim |= !forgotten.is_empty();
            (forgotten, state.claim && !state.asking.is_empty())
        };
        for (id, count) in forgotten {
            drop(self.record(id, count, What::Free { due: Instant::now(), count: count.saturating_sub(1) }));
        }
        self.arrive(arrivals);
        if again {
            self.node.keeper().tend(self.me.clone());
        }
        self.reader.ring();
    }

    /// Whether it is time to look after consumers that are gone.
    pub(crate) fn time_to_look_after(&self) -> bool {
        let mut state = self.state.lock();
        let due = state.looked_after.is_none_or(|at| at.elapsed() > self.reclaim());
        if due {
            state.looked_after = Some(Instant::now());
        }
        due
    }

    /// Ends its members' streams with an error.
    pub(crate) fn fail(&self, error: Error) {
        self.state.lock().failed.get_or_insert_with(|| Arc::new(error));
        self.local().end();
    }

    /// The error its members' streams end with.
    pub(crate) fn failure(&self) -> Option<Error> {
        let failed = self.state.lock().failed.clone()?;
        Some(Error::new(failed.kind().clone()).during("read").on(&self.place.group).caused_by(failed.to_string()))
    }

    /// Begins to find out what an answer that got lost had said; false if somebody takes something over just now. With true,
    /// [`claimed`](Self::claimed) has to be called.
    pub(crate) fn begin_recovery(&self) -> bool {
        let mut state = self.state.lock();
        state.behind = true;
        !std::mem::replace(&mut state.busy, true)
    }

    /// Makes sure that the timer calls for whatever is due next.
    pub(crate) fn arm(&self) {
        let when = {
            let mut state = self.state.lock();
            let Some(next) = state.next_deadline(self.node.options().linger, self.reclaim()) else { return };
            if state.armed.is_some_and(|armed| armed <= next) {
                return;
            }
            state.armed = Some(next);
            next
        };
        let me: Weak<dyn Due> = self.me.clone();
        self.node.timer().call_at(when, me);
    }
}

/// Something that was given up, on its way to where dead letters are kept and then out of its group.
pub(crate) struct Burial {
    desk: Arc<Desk>,
    id: EntryId,
    count: u64,
    letter: Option<(Topic, Event)>,
    /// Its delivery in the local queue, which counts as held until it is buried.
    inner: Option<Delivery>,
}

/// Buries what is given up, until the future is dropped.
pub(crate) async fn bury_all(burials: SettleQueue<Burial>, letters: Letters) {
    loop {
        let batch = burials.next_batch(BURIED_TOGETHER).await;
        let burying = batch.into_iter().map(|mut open| async {
            let letter = open.what_mut().letter.take();
            let buried = match letter {
                Some((to, letter)) => letters.clone().bury(to, letter).await,
                None => true,
            };
            let Burial { desk, id, count, .. } = open.what();
            // Without its letter it stays pending: others will give it up again.
            let settled = match buried {
                true => desk.record(*id, *count, What::Done { held_until: Instant::now() }).await,
                false => Settled::Unconfirmed,
            };
            desk.state.lock().dying.remove(id);
            let desk = desk.clone();
            drop(open.what_mut().inner.take().map(Delivery::done));
            open.answer(settled);
            desk.farewell();
        });
        futures::future::join_all(burying).await;
    }
}

/// How many dead letters are on their way at a time.
const BURIED_TOGETHER: usize = 100;

/// Beyond any deadline that matters.
const FAR: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// What was taken over.
#[derive(Default)]
pub(crate) struct Claimed {
    pub(crate) arrivals: Vec<Arrival>,
    /// How many were trimmed away while they were pending.
    pub(crate) lost: u64,
    /// What this instance is said to hold and has not renewed.
    pub(crate) mine: Vec<(EntryId, u64)>,
    /// Whether one was left that has to run alone.
    pub(crate) left_alone: bool,
    /// The one that runs alone.
    pub(crate) alone: Option<EntryId>,
}

impl State {
    fn present(&self) -> impl Iterator<Item = &Member> {
        self.members.values().filter(|member| !member.left)
    }

    /// How much is to be read.
    fn wants(&self, room: usize) -> Option<usize> {
        let isolated = self.alone.is_some() || self.isolating.is_some();
        let serves = self.failed.is_none() && self.present().next().is_some();
        if self.claim || self.busy || isolated || self.cold || self.ahead.len() > self.most_ahead / 2 || !serves {
            return None;
        }
        let count = self.most_ahead.saturating_sub(self.ahead.len()).min(room);
        (count > 0).then_some(count)
    }

    /// Reads more ahead if all was taken at once, and less if it had to wait.
    fn adapt(&mut self, now: Instant, since: Instant, linger: Duration) {
        self.progress = Some(now);
        let capacity = self.present().map(|member| member.options.prefetch).max().unwrap_or(1);
        if now - since > linger {
            self.most_ahead = (self.most_ahead / 2).max(1);
        } else if self.ahead.is_empty() {
            self.most_ahead = (2 * self.most_ahead).min(capacity);
        }
    }

    fn knows(&self, id: EntryId) -> bool {
        let is_held = || self.held.iter().any(|(_, held)| held.remote().is_some_and(|remote| remote.id == id));
        let is_postponed = || self.postponed.iter().any(|(postponed, _, _)| *postponed == id);
        self.ahead.contains_key(&id) || self.dying.contains_key(&id) || is_held() || is_postponed()
    }

    fn next_deadline(&mut self, linger: Duration, reclaim: Duration) -> Option<Instant> {
        let holds_any = !self.ahead.is_empty() || !self.held.is_empty() || !self.dying.is_empty() || !self.postponed.is_empty();
        if holds_any && self.renew_at.is_none() {
            self.renew_at = Some(Instant::now() + reclaim / 3);
        }
        let lingering = self.progress.filter(|_| !self.ahead.is_empty()).map(|progress| progress + linger);
        [lingering, self.due.next_due(), self.postponed.next_due(), self.hold_due, self.sweep_at, self.renew_at]
            .into_iter()
            .flatten()
            .min()
    }
}

impl Due for Desk {
    fn due(self: Arc<Self>, now: Instant) -> Option<Instant> {
        let linger = self.node.options().linger;
        let (mut overdue, mut postponed, mut lingering) = (Vec::new(), Vec::new(), false);
        let tend = {
            let mut state = self.state.lock();
            let state = &mut *state;
            state.armed = None;
            if state.hold_due.is_some_and(|due| due <= now) {
                let holder = |held: &Held| state.members.get(&held.member()).map_or(FAR, |member| member.options.max_hold);
                let until = |held: &Held| held.remote().map(|remote| remote.since + holder(held));
                overdue.extend(
                    state.held.iter().filter(|(_, held)| until(held).is_some_and(|until| until <= now)).map(|(t, _)| t),
                );
                state.hold_due = state.held.iter().filter_map(|(_, held)| until(held)).filter(|until| *until > now).min();
            }
            while state.due.pop_due(now).is_some() {
                state.claim = true;
            }
            while let Some(one) = state.postponed.pop_due(now) {
                postponed.push(one);
            }
            lingering =
                lingering || (!state.ahead.is_empty() && state.progress.is_none_or(|progress| progress + linger <= now));
            if state.sweep_at.is_some_and(|at| at <= now) {
                // One that has left everything need not look after anything.
                let attends = state.members.values().any(|member| !member.left);
                state.claim |= attends;
                state.sweep_at = attends.then(|| now + self.sweep_interval());
            }
            if state.renew_at.is_some_and(|at| at <= now) {
                (state.renew, state.renew_at) = (true, None);
            }
            state.renew || state.claim
        };
        overdue.iter().for_each(|token| self.take_back(*token, "held for too long"));
        for (id, count, due) in postponed {
            drop(self.free(id, count, count, due));
        }
        if lingering {
            self.release_ahead();
        }
        if tend {
            self.node.keeper().tend(self.me.clone());
        }
        let mut state = self.state.lock();
        let next = state.next_deadline(linger, self.reclaim());
        state.armed = next;
        next
    }
}

impl pubsub_core::Settler for Desk {
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        let options = self.options_of(token);
        let remote = match self.let_go(token) {
            None => return Receipt::ready(Settled::TooLate),
            Some(Held::Local { delivery, .. }) => return delivery.settle(settlement),
            Some(Held::Remote(remote)) => *remote,
        };
        let Some(options) = options else { return Receipt::ready(Settled::TooLate) };
        match settlement {
            Settlement::Done => {
                let receipt = self.done(remote.id, remote.count, remote.touched);
                drop(remote.inner.done());
                receipt
            }
            Settlement::DeadLetter { reason } => {
                let Remote { inner, id, count, attempt, .. } = remote;
                let event = inner.event().clone();
                self.give_up(&event, id, count, attempt, &reason, &options, Some(inner))
            }
            Settlement::Retry { after, reason } => {
                self.retry(remote, after, reason.as_deref().unwrap_or("retried too often"), &options)
            }
            // What is not known is given back.
            _ => {
                drop(remote.inner.done());
                self.free(remote.id, remote.count, remote.count.saturating_sub(1), Instant::now())
            }
        }
    }

    fn extend(&self, token: u64) -> Receipt {
        let (id, count) = match self.state.lock().held.get_mut(token) {
            None => return Receipt::ready(Settled::TooLate),
            Some(Held::Local { delivery, .. }) => return delivery.extend(),
            Some(Held::Remote(remote)) => {
                remote.since = Instant::now();
                (remote.id, remote.count)
            }
        };
        self.record(id, count, What::Keep)
    }

    fn poll_revoked(&self, token: u64, cx: &mut Context<'_>) -> Poll<()> {
        match self.state.lock().held.get_mut(token) {
            Some(Held::Local { delivery, .. }) => pin!(delivery.revoked()).poll(cx),
            Some(Held::Remote(remote)) => {
                remote.revoked = Some(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

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
