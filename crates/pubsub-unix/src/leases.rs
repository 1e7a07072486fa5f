//! Leases across the processes of a host, kept by the broker and its log.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pubsub_core::{Acquired, Capability, Error, ErrorKind, Lease, LeaseProvider, Reach, Result, check_lease};
use tokio::time::timeout;

use crate::protocol::{Answer, LeaseState, OnLease, Query, Reply, Request};
use crate::remote::Remote;
use crate::unix::PATIENCE;

/// The leases of a bus as one instance sees them: they end when it is closed.
pub(crate) struct UnixLeases(pub(crate) Arc<Remote>);

impl UnixLeases {
    fn check(&self, operation: &'static str, names: &[&str], ttl: Option<Duration>) -> Result<()> {
        if self.0.is_closing() {
            return Err(Error::closed().during(operation).on(names[0].escape_debug()));
        }
        if self.0.link.is_foreign() {
            return Err(Error::unsupported(Capability::Leases).during(operation).on(names[0].escape_debug()));
        }
        check_lease(names, ttl).map_err(|error| error.during(operation))
    }

    async fn change(&self, operation: &'static str, key: &str, what: OnLease) -> Result<(Option<Lease>, bool)> {
        let failed = |kind: ErrorKind| Error::new(kind).during(operation).on(key);
        let answer = self.0.link.call(Request::Lease { key: key.to_owned(), what });
        match timeout(PATIENCE, answer).await {
            Ok(Ok(Answer::Lease(lease, own))) => Ok((lease.map(lease_of), own)),
            Ok(Ok(Answer::Failed(why))) => Err(failed(ErrorKind::Backend(why.into()))),
            Ok(Ok(_)) => Err(failed(ErrorKind::Full)),
            Ok(Err(_)) => Err(failed(ErrorKind::Closed)),
            Err(_) => Err(failed(ErrorKind::Timeout)),
        }
    }
}

fn lease_of(state: LeaseState) -> Lease {
    Lease::new(state.owner, state.token, Duration::from_millis(state.remaining))
}

/// In milliseconds, and no less than was asked for.
fn millis(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[async_trait]
impl LeaseProvider for UnixLeases {
    fn reach(&self) -> Reach {
        Reach::Host
    }

    async fn acquire(&self, key: &str, owner: &str, ttl: Duration) -> Result<Acquired> {
        self.check("acquire", &[key, owner], Some(ttl))?;
        match self.change("acquire", key, OnLease::Acquire { owner: owner.to_owned(), ttl: millis(ttl) }).await? {
            (Some(lease), true) => Ok(Acquired::Yes(lease)),
            (Some(lease), false) => Ok(Acquired::HeldBy(lease)),
            (None, _) => Err(Error::new(ErrorKind::Unavailable).during("acquire").on(key)),
        }
    }

    async fn renew(&self, key: &str, owner: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.check("renew", &[key, owner], Some(ttl))?;
        Ok(self.change("renew", key, OnLease::Renew { owner: owner.to_owned(), ttl: millis(ttl) }).await?.0)
    }

    async fn release(&self, key: &str, owner: &str) -> Result<bool> {
        self.check("release", &[key, owner], None)?;
        Ok(self.change("release", key, OnLease::Release { owner: owner.to_owned() }).await?.1)
    }

    async fn transfer(&self, key: &str, from: &str, to: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.check("transfer", &[key, from, to], Some(ttl))?;
        let what = OnLease::Transfer { from: from.to_owned(), to: to.to_owned(), ttl: millis(ttl) };
        Ok(self.change("transfer", key, what).await?.0)
    }

    async fn holder(&self, key: &str) -> Result<Option<Lease>> {
        self.check("holder", &[key], None)?;
        let failed = |error: Error| error.during("holder").on(key);
        match timeout(PATIENCE, self.0.link.ask(Query::Holder { key: key.to_owned() })).await {
            Ok(Ok(Reply::Lease(lease))) => Ok(lease.map(lease_of)),
            Ok(Ok(_)) => Err(failed(ErrorKind::Unavailable.into())),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(failed(ErrorKind::Timeout.into())),
        }
    }
}

impl fmt::Debug for UnixLeases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UnixLeases")
    }
}
