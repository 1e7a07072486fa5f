//! Leases in memory, shared by the instances of a bus.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::{Acquired, Error, Lease, LeaseProvider, Reach, Result, check_lease};
use tokio::sync::watch;
use tokio::time::Instant;

/// The store. Tokens are numbered across all keys, so that a key's tokens grow although nothing of it is remembered once it is
/// free.
#[derive(Default)]
pub(crate) struct MemoryLeases(Mutex<Store>);

#[derive(Default)]
struct Store {
    held: HashMap<String, Held>,
    last_token: u64,
    /// How many keys are held before those that have expired are looked for.
    sweep_at: usize,
}

struct Held {
    owner: String,
    token: u64,
    expires: Instant,
}

impl Held {
    fn lease(&self, now: Instant) -> Lease {
        Lease::new(self.owner.clone(), self.token, self.expires - now)
    }
}

impl Store {
    fn live(&mut self, key: &str, now: Instant) -> Option<&mut Held> {
        self.held.get_mut(key).filter(|held| held.expires > now)
    }

    fn give(&mut self, key: &str, owner: &str, now: Instant, ttl: Duration) -> Lease {
        self.last_token += 1;
        let held = Held { owner: owner.to_owned(), token: self.last_token, expires: now + ttl };
        let lease = held.lease(now);
        self.held.insert(key.to_owned(), held);
        if self.held.len() > self.sweep_at {
            self.held.retain(|_, held| held.expires > now);
            self.sweep_at = (self.held.len() * 2).max(64);
            self.held.shrink_to(self.sweep_at);
        }
        lease
    }
}

/// The leases of a bus as one instance sees them: they end when it is closed.
pub(crate) struct InstanceLeases {
    store: Arc<MemoryLeases>,
    closed: watch::Receiver<bool>,
}

impl InstanceLeases {
    pub(crate) fn new(store: Arc<MemoryLeases>, closed: watch::Receiver<bool>) -> Self {
        Self { store, closed }
    }

    fn check(&self, operation: &'static str, names: &[&str], ttl: Option<Duration>) -> Result<()> {
        // A sender that is gone was dropped without close: leases go on.
        if *self.closed.borrow() {
            return Err(Error::closed().during(operation).on(names[0].escape_debug()));
        }
        check_lease(names, ttl).map_err(|error| error.during(operation))
    }
}

#[async_trait]
impl LeaseProvider for InstanceLeases {
    fn reach(&self) -> Reach {
        Reach::Process
    }

    async fn acquire(&self, key: &str, owner: &str, ttl: Duration) -> Result<Acquired> {
        self.check("acquire", &[key, owner], Some(ttl))?;
        let now = Instant::now();
        let mut store = self.store.0.lock();
        Ok(match store.live(key, now) {
            Some(held) if held.owner == owner => {
                held.expires = now + ttl;
                Acquired::Yes(held.lease(now))
            }
            Some(held) => Acquired::HeldBy(held.lease(now)),
            None => Acquired::Yes(store.give(key, owner, now, ttl)),
        })
    }

    async fn renew(&self, key: &str, owner: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.check("renew", &[key, owner], Some(ttl))?;
        let now = Instant::now();
        let mut store = self.store.0.lock();
        Ok(store.live(key, now).filter(|held| held.owner == owner).map(|held| {
            held.expires = now + ttl;
            held.lease(now)
        }))
    }

    async fn release(&self, key: &str, owner: &str) -> Result<bool> {
        self.check("release", &[key, owner], None)?;
        let now = Instant::now();
        let mut store = self.store.0.lock();
        let owned = store.live(key, now).is_some_and(|held| held.owner == owner);
        if owned {
            store.held.remove(key);
        }
        Ok(owned)
    }

    async fn transfer(&self, key: &str, from: &str, to: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.check("transfer", &[key, from, to], Some(ttl))?;
        let now = Instant::now();
        let mut store = self.store.0.lock();
        let owned = store.live(key, now).is_some_and(|held| held.owner == from);
        Ok(owned.then(|| store.give(key, to, now, ttl)))
    }

    async fn holder(&self, key: &str) -> Result<Option<Lease>> {
        self.check("holder", &[key], None)?;
        let now = Instant::now();
        Ok(self.store.0.lock().live(key, now).map(|held| held.lease(now)))
    }
}

impl fmt::Debug for InstanceLeases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InstanceLeases").field("held", &self.store.0.lock().held.len()).finish_non_exhaustive()
    }
}
