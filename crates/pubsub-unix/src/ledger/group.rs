//! A group: its members' seats, how far it has read, and what is handed over or due to come back.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::STRETCH_BYTES;
use super::topic::Topic;
use crate::protocol::{ClientId, GroupState, Handed, Take, What};
use crate::record::{Run, Stored};

/// How many deliveries of a group may be handed over or waiting for their back-off; beyond it nothing new is handed over.
pub(crate) const MAX_PENDING: usize = 100_000;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Seated {
    /// The offset of the next event that is new to it.
    pub(super) next: u64,
    /// Lost to the bound on retention before it was read, and not told yet.
    lost: u64,
    seats: BTreeMap<(ClientId, u64), Taken>,
    pending: BTreeMap<u64, Pending>,
    /// What nobody holds, by when it is due.
    free: BTreeSet<(u64, u64)>,
}

/// A seat's last take, so that it can be answered again.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Taken {
    number: u64,
    handed: Vec<(u64, u32)>,
}

/// What a take comes to: deliveries, and the events of each.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct HandedOver {
    pub(crate) handed: Vec<Handed>,
    pub(crate) events: Run,
}

impl HandedOver {
    fn push(&mut self, handed: Handed, stored: Stored) {
        self.handed.push(handed);
        self.events.push(stored);
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Pending {
    stored: Stored,
    attempt: u32,
    lagged: u64,
    holder: Option<(ClientId, u64)>,
    due: u64,
}

impl Seated {
    pub(super) fn new(next: u64) -> Self {
        Self { next, ..Self::default() }
    }

    pub(super) fn clients(&self) -> impl Iterator<Item = ClientId> {
        let holders = self.pending.values().filter_map(|pending| pending.holder);
        self.seats.keys().copied().chain(holders).map(|(client, _)| client)
    }

    pub(super) fn join(&mut self, client: ClientId, member: u64) {
        self.seats.entry((client, member)).or_default();
    }

    /// What it holds stays its own, but for what it never saw.
    pub(super) fn leave(&mut self, client: ClientId, member: u64, heard: u64) {
        let holder = (client, member);
        let Some(Taken { number, handed }) = self.seats.remove(&holder) else { return };
        for (offset, attempt) in handed.into_iter().filter(|_| number > heard) {
            let is_its = |pending: &Pending| pending.holder == Some(holder) && pending.attempt == attempt;
            if self.pending.get(&offset).is_some_and(is_its) {
                self.set_free(offset, 0, 0);
            }
        }
    }

    /// Whether publishers wait for it rather than have it lose what it has not read: while it has members, unless it lost something
    /// while it had none and was not told yet.
    pub(super) fn holds_back(&self) -> bool {
        !self.seats.is_empty() && self.lost == 0
    }

    /// An event was lost to the bound on retention.
    pub(super) fn loses(&mut self, offset: u64) {
        if self.next <= offset {
            (self.next, self.lost) = (offset + 1, self.lost + 1);
        }
    }

    pub(super) fn has_seat(&self, client: ClientId, member: u64) -> bool {
        self.seats.contains_key(&(client, member))
    }

    pub(super) fn knows(&self, client: ClientId, take: &Take) -> bool {
        self.seats.get(&(client, take.seat.member)).is_some_and(|taken| take.number <= taken.number)
    }

    /// How many deliveries could be handed over now; not counted beyond so many.
    pub(super) fn work(&self, topic: &Topic, now: u64, enough: usize) -> usize {
        let due = self.free.range(..=(now, u64::MAX)).take(enough).count();
        // What was in hand before is in hand, or pending, still.
        due + topic.count_from(self.next, (enough - due).min(MAX_PENDING.saturating_sub(self.pending.len())))
    }

    pub(super) fn next_due(&self) -> Option<u64> {
        self.free.first().map(|(due, _)| *due)
    }

    /// Up to so many deliveries for a seat: what came back and is due, then what is new, as `fresh` hands it out.
    pub(super) fn take(
        &mut self,
        client: ClientId,
        take: &Take,
        now: u64,
        mut fresh: impl FnMut(u64) -> Option<(u64, Stored)>,
    ) -> Option<HandedOver> {
        let holder = (client, take.seat.member);
        let last = self.seats.get(&holder)?;
        if take.number <= last.number {
            // Said again: what of it is still the member's.
            let mut again = HandedOver::default();
            for (offset, attempt) in &last.handed {
                let its = |pending: &&Pending| pending.holder == Some(holder) && pending.attempt == *attempt;
                if let Some(Pending { lagged, stored, .. }) = self.pending.get(offset).filter(its) {
                    again.push(Handed { offset: *offset, attempt: *attempt, lagged: *lagged }, stored.clone());
                }
            }
            return Some(again);
        }
        let (mut over, mut bytes) = (HandedOver::default(), 0);
        while over.handed.len() < take.most.max(1) as usize && bytes < STRETCH_BYTES {
            let due = self.free.first().copied().filter(|(due, _)| *due <= now);
            let offset = if let Some((due, offset)) = due {
                self.free.remove(&(due, offset));
                offset
            } else if self.pending.len() < MAX_PENDING
                && let Some((offset, stored)) = fresh(self.next)
            {
                self.next = offset + 1;
                self.pending.insert(
                    offset,
                    Pending { stored, attempt: 1, lagged: std::mem::take(&mut self.lost), holder: None, due: now },
                );
                offset
            } else {
                break;
            };
            let pending = self.pending.get_mut(&offset).expect("what is free is pending");
            pending.holder = Some(holder);
            bytes += pending.stored.len();
            // Told with the first attempt alone.
            let lagged = if pending.attempt == 1 { pending.lagged } else { 0 };
            over.push(Handed { offset, attempt: pending.attempt, lagged }, pending.stored.clone());
        }
        let seat = self.seats.get_mut(&holder).expect("looked up above");
        let handed = over.handed.iter().map(|handed| (handed.offset, handed.attempt)).collect();
        *seat = Taken { number: take.number, handed };
        Some(over)
    }

    pub(super) fn settle(&mut self, client: ClientId, member: u64, offset: u64, attempt: u32, what: &What, now: u64) -> bool {
        let Some(pending) = self.pending.get_mut(&offset).filter(|pending| pending.attempt == attempt) else { return false };
        if pending.holder != Some((client, member)) {
            return false;
        }
        match what {
            What::Retry(after) => self.set_free(offset, 1, now.saturating_add(*after)),
            What::Release => self.set_free(offset, 0, 0), // before what is due, in its order
            What::Done | What::Bury(_) => drop(self.pending.remove(&offset)),
        }
        true
    }

    fn set_free(&mut self, offset: u64, counted: u32, due: u64) {
        if let Some(pending) = self.pending.get_mut(&offset) {
            (pending.holder, pending.due) = (None, due);
            pending.attempt = pending.attempt.saturating_add(counted);
            self.free.insert((due, offset));
        }
    }

    /// Frees a client's seats and what it holds, that one attempt higher. Returns whether there was anything.
    pub(super) fn forget(&mut self, client: ClientId, now: u64) -> bool {
        let seats = self.seats.len();
        self.seats.retain(|(of, _), _| *of != client);
        let held = self.pending.iter().filter(|(_, pending)| pending.holder.is_some_and(|(of, _)| of == client));
        let held: Vec<u64> = held.map(|(offset, _)| *offset).collect();
        held.iter().for_each(|offset| self.set_free(*offset, 1, now));
        !held.is_empty() || self.seats.len() < seats
    }

    /// The topic was cleared: nothing is handed over or due any more, and the seats stay.
    pub(super) fn clear(&mut self) {
        (self.next, self.lost, self.pending, self.free) = (0, 0, BTreeMap::new(), BTreeSet::new());
        self.seats.values_mut().for_each(|taken| taken.handed.clear());
    }

    /// Forgets what nobody holds and goes.
    pub(super) fn trim(&mut self, goes: impl Fn(&Stored) -> bool) {
        self.pending.retain(|_, pending| pending.holder.is_some() || !goes(&pending.stored));
        self.free.retain(|(_, offset)| self.pending.contains_key(offset));
    }

    pub(super) fn is_drained(&self, topic: &Topic) -> bool {
        self.pending.is_empty() && !topic.has_from(self.next)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.seats.is_empty() && self.pending.is_empty()
    }

    pub(super) fn state<'a>(&'a self, name: &SmolStr, unread: impl Iterator<Item = &'a Stored> + Clone) -> GroupState {
        let held = self.pending.len() - self.free.len();
        let all = self.pending.values().map(|pending| &pending.stored).chain(unread.clone());
        GroupState {
            group: name.clone(),
            waiting: (unread.count() + self.free.len()) as u64,
            held: held as u64,
            oldest: all.map(Stored::created_at).min(),
            members: self.seats.len() as u64,
        }
    }
}
