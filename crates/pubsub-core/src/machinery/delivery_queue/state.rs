//! What a queue knows, and how it changes: under the queue's lock, without side effects. What is to happen outside the lock is
//! noted in [`Chores`].

use std::collections::{HashSet, VecDeque};
use std::mem;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use super::{Aftermath, Entry, InstanceId};
use crate::machinery::{InFlight, RetryQueue};
use crate::{Event, Overflow, SubscribeOptions, Topic};

/// How long a member that was woken may take to ask before others are woken too: the bound on how long a consumer that
/// stopped polling can delay what it was woken for.
const WAKE_PATIENCE: Duration = Duration::from_millis(2);

/// How many deliveries may wait for their back-off, or `max_in_flight` if that is more, before members get nothing new: what fails
/// faster than it is retried holds publishers back, rather than pile up here.
const DELAYED: usize = 1000;

#[derive(Default)]
pub(super) struct State {
    /// Whether it serves a group; otherwise it has one member.
    pub(super) group: bool,
    /// Whether it outlives its members.
    pub(super) durable: bool,
    pub(super) ended: bool,
    /// What was pushed, bounded.
    pub(super) ready: VecDeque<Entry>,
    /// What was pushed for one instance of a group only; counts towards the same bound.
    pub(super) local: Vec<Local>,
    /// What came back: retries that are due and releases. Goes before what is ready.
    pub(super) returned: VecDeque<Entry>,
    pub(super) delayed: RetryQueue<Entry>,
    pub(super) held: InFlight<Held>,
    members: InFlight<Member>,
    /// Members that have not left; those that have stay known while they hold something.
    present: usize,
    /// Members that asked and found nothing, longest first.
    parked: VecDeque<u64>,
    /// The member that was woken and has not asked yet.
    woken: Option<u64>,
    /// Whether the timer will look after the one that was woken.
    patient: bool,
    /// Whether a member was woken for what is local to its instance and may not have asked yet.
    woken_locally: bool,
    /// Dead letters on their way.
    pub(super) dying: usize,
    /// Lost right before the next entry that is ready.
    lagged: u64,
    pub(super) counts: Counts,
    /// When the timer will call, the earliest last.
    armed: SmallVec<[Instant; 4]>,
    /// When the delivery held longest reaches its limit, or earlier.
    hold_due: Option<Instant>,
}

/// What is for one instance of a group only.
pub(super) struct Local {
    instance: InstanceId,
    ready: VecDeque<Entry>,
    /// What came back, which does not count towards the bound.
    returned: VecDeque<Entry>,
}

impl Local {
    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.returned.iter().chain(&self.ready)
    }

    fn into_entries(self) -> impl Iterator<Item = Entry> {
        self.returned.into_iter().chain(self.ready)
    }
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) lagged: u64,
    pub(super) dead_lettered: u64,
    pub(super) dropped: u64,
}

pub(super) struct Member {
    pub(super) instance: InstanceId,
    pub(super) options: Arc<SubscribeOptions>,
    waker: Option<Waker>,
    parked: bool,
    pub(super) held: usize,
    left: bool,
}

pub(super) struct Held {
    pub(super) entry: Entry,
    pub(super) member: u64,
    since: Instant,
    waker: Option<Waker>,
}

/// What is to be done once the lock is released. Mostly nothing, and then it costs nothing.
#[derive(Default)]
pub(super) struct Chores {
    /// A consumer to wake; `rare` has more.
    pub(super) waker: Option<Waker>,
    pub(super) arm: Option<Instant>,
    /// Ring for publishers that wait for room.
    pub(super) room: bool,
    /// Ring for those who wait for the queue to drain.
    pub(super) drained: bool,
    pub(super) rare: Option<Box<Rare>>,
}

#[derive(Default)]
pub(super) struct Rare {
    pub(super) wakers: Vec<Waker>,
    pub(super) letters: Vec<Letter>,
    /// Entries that are gone. Their payloads' destructors are user code.
    pub(super) dropped: Vec<Entry>,
    /// Members that are gone. What their filters close over is user code, too.
    pub(super) gone: Vec<Member>,
}

impl Chores {
    pub(super) fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    #[inline]
    fn wake(&mut self, waker: Option<Waker>) {
        if self.waker.is_none() {
            self.waker = waker;
        } else if let Some(waker) = waker {
            self.rare().wakers.push(waker);
        }
    }

    #[inline]
    pub(super) fn is_more_than_ringing(&self) -> bool {
        self.waker.is_some() || self.arm.is_some() || self.rare.is_some()
    }

    /// The consumers to wake, for somebody who does it later.
    pub(super) fn take_wakers(&mut self) -> impl Iterator<Item = Waker> + use<> {
        let more = self.rare.as_mut().map(|rare| mem::take(&mut rare.wakers));
        self.waker.take().into_iter().chain(more.into_iter().flatten())
    }
}

/// A delivery that was given up; with a topic, it is to become a dead letter.
pub(super) struct Letter {
    pub(super) event: Arc<Event>,
    pub(super) attempts: u32,
    pub(super) reason: Box<str>,
    pub(super) topic: Option<Topic>,
}

impl State {
    pub(super) fn new(group: bool, durable: bool) -> Self {
        Self { group, durable, ..Self::default() }
    }

    // Members.

    pub(super) fn join(&mut self, instance: InstanceId, options: Arc<SubscribeOptions>) -> u64 {
        self.present += 1;
        self.members.insert(Member { instance, options, waker: None, parked: false, held: 0, left: false })
    }

    /// A member that has not left.
    pub(super) fn member(&self, token: u64) -> Option<&Member> {
        self.members.get(token).filter(|member| !member.left)
    }

    pub(super) fn members(&self) -> usize {
        self.present
    }

    fn present(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().map(|(_, member)| member).filter(|member| !member.left)
    }

    pub(super) fn has_member_of(&self, instance: InstanceId) -> bool {
        self.present().any(|member| member.instance == instance)
    }

    pub(super) fn has_member_beyond(&self, instance: InstanceId) -> bool {
        self.present().any(|member| member.instance != instance)
    }

    /// Whether the oldest are lost rather than publishers made to wait: always where the queue outlives its members, else if all
    /// of them chose to; one that wants to lose nothing decides for all.
    pub(super) fn is_lossy(&self) -> bool {
        let chose = |member: &Member| member.options.overflow == Overflow::DropOldest;
        self.durable || (self.present > 0 && self.present().all(chose))
    }

    /// A member leaves. What it holds it may still settle.
    pub(super) fn leave(&mut self, token: u64, chores: &mut Chores) {
        let Some(member) = self.members.get_mut(token).filter(|member| !member.left) else { return };
        member.left = true;
        self.present -= 1;
        chores.wake(member.waker.take());
        let (instance, holds) = (member.instance, member.held > 0);
        if !holds {
            chores.rare().gone.extend(self.members.remove(token));
        }
        self.parked.retain(|parked| *parked != token);
        if self.woken == Some(token) {
            self.woken = None;
        }
        if !self.has_member_of(instance)
            && let Some(place) = self.local.iter().position(|local| local.instance == instance)
        {
            chores.rare().dropped.extend(self.local.swap_remove(place).into_entries());
        }
        if self.present == 0 && !self.durable {
            self.end(chores);
        } else {
            self.wake(chores);
        }
    }

    /// Takes and gives nothing more. Returns how many entries that drops.
    pub(super) fn end(&mut self, chores: &mut Chores) -> u64 {
        self.ended = true;
        (chores.room, chores.drained) = (true, true);
        let mut empty = Vec::new();
        let tokens: Vec<u64> = self.members.iter().map(|(token, _)| token).collect();
        for token in tokens {
            let Some(member) = self.members.get_mut(token) else { continue };
            (member.left, member.parked) = (true, false);
            chores.wake(member.waker.take());
            if member.held == 0 {
                empty.push(token);
            }
        }
        for token in empty {
            chores.rare().gone.extend(self.members.remove(token));
        }
        self.present = 0;
        self.parked = VecDeque::new();
        let before = chores.rare().dropped.len();
        chores.rare().dropped.extend(mem::take(&mut self.ready));
        chores.rare().dropped.extend(mem::take(&mut self.returned));
        chores.rare().dropped.extend(mem::take(&mut self.local).into_iter().flat_map(Local::into_entries));
        chores.rare().dropped.extend(mem::take(&mut self.delayed).into_items());
        (chores.rare().dropped.len() - before) as u64
    }

    // Contents.

    /// Adds entries and returns what then counts towards the bound.
    #[inline]
    pub(super) fn push(&mut self, entries: impl Iterator<Item = Entry>, capacity: usize, aftermath: &mut Aftermath) -> usize {
        let mut len = self.bounded_len();
        for entry in entries {
            match entry.is_only_for() {
                // A backend pushes to a fan-out queue only what is for its one member.
                Some(instance) if self.group => {
                    if !self.has_member_of(instance) {
                        aftermath.lose(entry);
                        continue;
                    }
                    self.local_of(instance).ready.push_back(entry);
                }
                _ => self.ready.push_back(entry),
            }
            len += 1;
            // As it goes: a burst must not leave a buffer of its size behind.
            while len > capacity {
                self.lose_oldest(aftermath);
                len -= 1;
            }
        }
        len
    }

    /// What waits, in no order.
    pub(super) fn waiting_events(&self) -> impl Iterator<Item = &Arc<Event>> {
        let items = self.ready.iter().chain(&self.returned).chain(self.delayed.iter());
        items.chain(self.local.iter().flat_map(Local::entries)).map(|entry| &entry.event)
    }

    /// Removes what waits of these events.
    pub(super) fn remove(&mut self, gone: &HashSet<*const Event>, chores: &mut Chores) {
        let is_gone = |entry: &Entry| gone.contains(&Arc::as_ptr(&entry.event));
        let mut sift = |items: &mut VecDeque<Entry>| {
            let (lost, kept): (VecDeque<_>, VecDeque<_>) = mem::take(items).into_iter().partition(is_gone);
            *items = kept;
            chores.rare().dropped.extend(lost);
        };
        sift(&mut self.ready);
        sift(&mut self.returned);
        for local in &mut self.local {
            sift(&mut local.ready);
            sift(&mut local.returned);
        }
        chores.rare().dropped.extend(self.delayed.extract(is_gone));
    }

    fn local_of(&mut self, instance: InstanceId) -> &mut Local {
        let place = self.local.iter().position(|local| local.instance == instance).unwrap_or_else(|| {
            self.local.push(Local { instance, ready: VecDeque::new(), returned: VecDeque::new() });
            self.local.len() - 1
        });
        &mut self.local[place]
    }

    #[cold]
    fn lose_oldest(&mut self, aftermath: &mut Aftermath) {
        let lost = self.ready.pop_front().or_else(|| self.local.iter_mut().find_map(|local| local.ready.pop_front()));
        let Some(lost) = lost else { return };
        // What it had lost before it is lost still.
        self.lagged += 1 + lost.lagged();
        self.counts.lagged += 1;
        aftermath.lose(lost);
    }

    /// What counts towards the bound.
    pub(super) fn bounded_len(&self) -> usize {
        self.ready.len() + self.local.iter().map(|local| local.ready.len()).sum::<usize>()
    }

    /// What members could take, if it is for them.
    pub(super) fn queued(&self) -> usize {
        self.bounded_len() + self.returned.len() + self.local.iter().map(|local| local.returned.len()).sum::<usize>()
    }

    pub(super) fn waiting(&self) -> u64 {
        (self.queued() + self.delayed.len()) as u64
    }

    pub(super) fn is_drained(&self) -> bool {
        self.waiting() == 0 && self.held.is_empty() && self.dying == 0
    }

    /// What a member takes next, if there is anything for it: what came back, then what it had taken ahead, then what is new;
    /// nothing new while too many deliveries wait for their back-off.
    pub(super) fn next_for(&mut self, token: u64, ahead: &mut VecDeque<Entry>) -> Option<Entry> {
        if let Some(entry) = self.returned.pop_front() {
            return Some(entry);
        }
        // The options of a member are looked at where that is seldom: they are far away.
        if self.delayed.len() >= DELAYED && self.delayed.len() >= self.member(token)?.options.max_in_flight {
            return None;
        }
        if let Some(entry) = ahead.pop_front() {
            return Some(entry);
        }
        if !self.local.is_empty() {
            let instance = self.member(token)?.instance;
            let local = self.local.iter_mut().find(|local| local.instance == instance);
            if let Some(entry) = local.and_then(|local| local.returned.pop_front().or_else(|| local.ready.pop_front())) {
                return Some(entry);
            }
        }
        let entry = self.ready.pop_front()?;
        Some(if self.lagged > 0 { entry.after_losing(mem::take(&mut self.lagged)) } else { entry })
    }

    /// What came back goes to the front, uncounted towards the bound: it was counted when it was pushed.
    pub(super) fn give_back(&mut self, entry: Entry, chores: &mut Chores) {
        let entry = entry.after_losing(0);
        match entry.is_only_for() {
            Some(instance) if self.group => {
                if self.has_member_of(instance) {
                    self.local_of(instance).returned.push_back(entry);
                } else {
                    chores.rare().dropped.push(entry);
                }
            }
            _ => self.returned.push_back(entry),
        }
    }

    pub(super) fn retry_at(&mut self, due: Instant, entry: Entry, chores: &mut Chores) {
        self.delayed.push(due, entry);
        self.want(due, chores);
    }

    /// Gives a delivery up: to the dead-letter topic once the lock is released, or dropped with a warning.
    pub(super) fn give_up(
        &mut self,
        entry: Entry,
        attempts: u32,
        reason: Box<str>,
        options: &SubscribeOptions,
        chores: &mut Chores,
    ) {
        match &options.dead_letter {
            Some(_) => {
                self.counts.dead_lettered += 1;
                self.dying += 1;
            }
            None => self.counts.dropped += 1,
        }
        let topic = options.dead_letter.clone();
        chores.rare().letters.push(Letter { event: entry.event, attempts, reason, topic });
    }

    // Hands.

    /// A delivery goes into a member's hands.
    pub(super) fn hold(&mut self, entry: Entry, token: u64, now: Instant, chores: &mut Chores) -> u64 {
        let member = self.members.get_mut(token).expect("only present members take");
        member.held += 1;
        let until = now + member.options.max_hold;
        if self.hold_due.is_none_or(|due| until < due) {
            self.hold_due = Some(until);
            self.want(until, chores);
        }
        self.held.insert(Held { entry, member: token, since: now, waker: None })
    }

    /// A delivery leaves its holder's hands.
    pub(super) fn let_go(&mut self, token: u64, chores: &mut Chores) -> Option<Held> {
        let held = self.held.remove(token)?;
        let holder = self.members.get_mut(held.member).expect("a holder is known");
        holder.held -= 1;
        // It may have been waiting for its hands to be less full.
        if !holder.parked {
            chores.wake(holder.waker.take());
        }
        if holder.left && holder.held == 0 {
            chores.rare().gone.extend(self.members.remove(held.member));
        }
        Some(held)
    }

    /// The options of whoever holds a delivery.
    pub(super) fn holder_options(&self, token: u64) -> Option<Arc<SubscribeOptions>> {
        let held = self.held.get(token)?;
        Some(self.members.get(held.member).expect("a holder is known").options.clone())
    }

    /// Takes a delivery out of its holder's hands, tells the holder, and puts it back one attempt higher, or gives it up.
    pub(super) fn take_back(&mut self, token: u64, reason: &str, chores: &mut Chores) {
        let Some(options) = self.holder_options(token) else { return };
        let Some(Held { entry, waker, .. }) = self.let_go(token, chores) else { return };
        chores.wake(waker);
        if self.ended {
            chores.rare().dropped.push(entry);
            return;
        }
        if options.retry.is_exhausted_after(entry.attempt) {
            let attempts = entry.attempt;
            self.give_up(entry, attempts, reason.into(), &options, chores);
        } else {
            self.give_back(Entry { attempt: entry.attempt + 1, ..entry }, chores);
        }
    }

    /// The tokens of what this instance's members hold, or have held since they left.
    pub(super) fn held_by(&self, instance: InstanceId) -> impl Iterator<Item = u64> {
        let of = move |held: &Held| self.members.get(held.member).is_some_and(|member| member.instance == instance);
        self.held.iter().filter(move |(_, held)| of(held)).map(|(token, _)| token)
    }

    pub(super) fn extend(&mut self, token: u64, now: Instant) -> bool {
        self.held.get_mut(token).map(|held| held.since = now).is_some()
    }

    /// Registers a holder to be told that it lost a delivery; none if it has.
    pub(super) fn watch(&mut self, token: u64, cx: &Context<'_>) -> Option<Replaced> {
        self.held.get_mut(token).map(|held| set_waker(&mut held.waker, cx))
    }

    // Waking.

    /// A member asks: whoever was woken for it has come.
    pub(super) fn asks(&mut self, token: u64) {
        if self.woken == Some(token) {
            self.woken = None;
        }
    }

    /// A member found work, though it may have been waiting still.
    #[inline]
    pub(super) fn found(&mut self, token: u64) -> Replaced {
        if self.parked.is_empty() {
            return None;
        }
        let member = self.members.get_mut(token)?;
        if !mem::replace(&mut member.parked, false) {
            return None;
        }
        self.parked.retain(|parked| *parked != token);
        member.waker.take()
    }

    /// A member found nothing: it is woken when there is work for it.
    pub(super) fn park(&mut self, token: u64, cx: &Context<'_>) -> Replaced {
        let member = self.members.get_mut(token).expect("only present members ask");
        if !mem::replace(&mut member.parked, true) {
            self.parked.push_back(token);
        }
        set_waker(&mut member.waker, cx)
    }

    /// A member's hands are full: it is woken when it has settled something.
    pub(super) fn wait_for_hands(&mut self, token: u64, cx: &Context<'_>) -> Replaced {
        let member = self.members.get_mut(token).expect("only present members ask");
        if mem::replace(&mut member.parked, false) {
            self.parked.retain(|parked| *parked != token);
        }
        set_waker(&mut member.waker, cx)
    }

    pub(super) fn is_anyone_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Wakes one member if there is work that nobody was woken for.
    #[inline]
    pub(super) fn wake(&mut self, chores: &mut Chores) {
        if self.is_anyone_parked() {
            self.wake_parked(chores);
        }
    }

    fn wake_parked(&mut self, chores: &mut Chores) {
        let local = mem::take(&mut self.local);
        for Local { instance, .. } in local.iter().filter(|local| local.entries().next().is_some()) {
            let of = |token: &u64| self.member(*token).is_some_and(|member| member.instance == *instance);
            if let Some(token) = self.parked.iter().position(of).and_then(|place| self.parked.remove(place)) {
                chores.wake(self.unpark(token));
                self.woken_locally = true;
                self.want(Instant::now() + WAKE_PATIENCE, chores);
            }
        }
        self.local = local;
        if self.ready.is_empty() && self.returned.is_empty() {
            return;
        }
        if self.woken.is_none() {
            let Some(token) = self.parked.pop_front() else { return };
            chores.wake(self.unpark(token));
            self.woken = self.group.then_some(token);
        }
        if self.woken.is_some() && !self.parked.is_empty() && !self.patient {
            // Should the one that was woken not ask in time, the others are woken too: also those that parked after it was.
            self.patient = true;
            self.want(Instant::now() + WAKE_PATIENCE, chores);
        }
    }

    fn unpark(&mut self, token: u64) -> Option<Waker> {
        let member = self.members.get_mut(token)?;
        member.parked = false;
        member.waker.take()
    }

    // Time.

    /// Asks for a call by the timer, unless an earlier one is on its way, which will ask anew.
    fn want(&mut self, when: Instant, chores: &mut Chores) {
        if self.armed.last().is_none_or(|earliest| when < *earliest) {
            if chores.arm.replace(when).is_some() {
                // Asked for in this same step, and now never passed on to the timer: the earlier call asks anew.
                self.armed.pop();
            }
            self.armed.push(when);
        }
    }

    /// The timer called: gives back what is due, takes back what was held for too long, and wakes others in place of a member
    /// that was woken and did not ask.
    pub(super) fn due(&mut self, now: Instant, chores: &mut Chores) {
        while self.armed.last().is_some_and(|armed| *armed <= now) {
            self.armed.pop();
        }
        self.patient = false;
        while let Some(entry) = self.delayed.pop_due(now) {
            self.give_back(entry, chores);
        }
        if self.hold_due.is_some_and(|due| due <= now) {
            let overdue: Vec<u64> = self.holds().filter(|(until, _)| *until <= now).map(|(_, token)| token).collect();
            for token in overdue {
                self.take_back(token, "held for too long", chores);
            }
            self.hold_due = self.holds().map(|(until, _)| until).min();
        }
        let woken = self.woken.take().is_some() | mem::take(&mut self.woken_locally);
        if woken && self.queued() > 0 {
            for token in mem::take(&mut self.parked) {
                chores.wake(self.unpark(token));
            }
        }
        self.wake(chores);
        if let Some(next) = self.delayed.next_due().into_iter().chain(self.hold_due).min() {
            self.want(next, chores);
        }
        chores.drained = true;
    }

    /// What is held, and until when it may be.
    fn holds(&self) -> impl Iterator<Item = (Instant, u64)> {
        self.held.iter().map(|(token, held)| {
            let holder = self.members.get(held.member).expect("a holder is known");
            (held.since + holder.options.max_hold, token)
        })
    }
}

/// A waker that has been replaced, to be dropped without the lock: with it may go its task, and whatever that owns.
pub(super) type Replaced = Option<Waker>;

#[must_use]
fn set_waker(slot: &mut Option<Waker>, cx: &Context<'_>) -> Replaced {
    match slot {
        Some(waker) if waker.will_wake(cx.waker()) => None,
        _ => slot.replace(cx.waker().clone()),
    }
}
