//! Leases. Tokens are numbered across all keys, so that a key's tokens grow although nothing is remembered of one that is free.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::protocol::{Answer, LeaseState, OnLease};

/// How many leases are held at most; beyond it, acquiring one is refused as a full queue is.
const MAX_LEASES: usize = 1 << 20;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Leases {
    held: BTreeMap<String, Held>,
    last_token: u64,
    /// How many may be held before those that have expired are looked for.
    sweep_at: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct Held {
    owner: String,
    token: u64,
    expires: u64,
}

impl Held {
    fn state(&self, now: u64) -> LeaseState {
        LeaseState { owner: self.owner.clone(), token: self.token, remaining: self.expires.saturating_sub(now) }
    }
}

impl Leases {
    pub(super) fn holder(&self, key: &str, now: u64) -> Option<LeaseState> {
        self.held.get(key).filter(|held| held.expires > now).map(|held| held.state(now))
    }

    pub(super) fn carry_out(&mut self, key: &str, what: &OnLease, now: u64) -> Answer {
        let live = self.held.get_mut(key).filter(|held| held.expires > now);
        match (what, live) {
            (OnLease::Acquire { owner, ttl } | OnLease::Renew { owner, ttl }, Some(held)) if held.owner == *owner => {
                held.expires = now + ttl;
                Answer::Lease(Some(held.state(now)), true)
            }
            (OnLease::Acquire { .. }, Some(held)) => Answer::Lease(Some(held.state(now)), false),
            (OnLease::Acquire { owner, ttl }, None) => self.give(key, owner, *ttl, now),
            (OnLease::Release { owner }, Some(held)) if held.owner == *owner => {
                self.held.remove(key);
                Answer::Lease(None, true)
            }
            (OnLease::Transfer { from, to, ttl }, Some(held)) if held.owner == *from => self.give(key, to, *ttl, now),
            _ => Answer::Lease(None, false),
        }
    }

    fn give(&mut self, key: &str, owner: &str, ttl: u64, now: u64) -> Answer {
        if self.held.len() >= self.sweep_at {
            self.held.retain(|_, held| held.expires > now);
            self.sweep_at = (2 * self.held.len()).max(64);
        }
        if self.held.len() >= MAX_LEASES {
            return Answer::Full;
        }
        self.last_token += 1;
        let held = Held { owner: owner.to_owned(), token: self.last_token, expires: now + ttl };
        let state = held.state(now);
        self.held.insert(key.to_owned(), held);
        Answer::Lease(Some(state), true)
    }
}
