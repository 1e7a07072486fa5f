//! Leases: the keys of the TypeScript system, and beside each a counter of fencing tokens. Each step is one script.

use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use fred::types::Value;
use pubsub_core::{Acquired, Error, Lease, LeaseProvider, Reach, Result, check_lease};
use tokio::time::Instant;

use crate::ask::ask;
use crate::errors::Fault;
use crate::link::{Cmd, Script};
use crate::node::Node;
use crate::publish::millis;
use crate::reply;

static ACQUIRE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/acquire.lua")));
static LEASE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/lease.lua")));

pub(crate) struct RedisLeases(Arc<Node>);

impl RedisLeases {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }

    fn check(&self, operation: &'static str, names: &[&str], ttl: Option<Duration>) -> Result<()> {
        if self.0.is_closed() {
            return Err(Error::closed().during(operation).on(names[0].escape_debug()));
        }
        check_lease(names, ttl).map_err(|error| error.during(operation))
    }

    /// Runs a script, again while the connection is being made again. To release and to transfer cannot be repeated blindly: the second
    /// time the lease is not the caller's any more.
    async fn run(&self, operation: &'static str, key: &str, script: &Script, call: Cmd) -> Result<Value> {
        let until = Instant::now() + self.0.options().command_timeout;
        let repeatable = !matches!(operation, "release" | "transfer");
        let answer = ask(until, repeatable, || self.0.link().eval(script, call.clone())).await;
        answer.map_err(|fault| Error::from(fault).during(operation).on(key.escape_debug()))
    }

    /// Does something to a lease that has this owner; none if it has not.
    async fn act(&self, what: &'static str, key: &str, owner: &str, ttl: Duration, next: &str) -> Result<Option<Lease>> {
        let (lease, token) = self.0.keys().lease(key);
        let call = LEASE.call(&[&lease, &token]).arg(owner).arg(what).number(millis(ttl)).arg(next);
        let answer = self.run(what, key, &LEASE, call).await?;
        if matches!(answer, Value::Null | Value::Boolean(false)) {
            return Ok(None);
        }
        let found = reply::tuple(answer).and_then(|[owner, token, remaining]| lease_of(owner, &token, &remaining));
        found.map(Some).map_err(|fault| Error::from(fault).during(what).on(key.escape_debug()))
    }
}

fn lease_of(owner: Value, token: &Value, remaining: &Value) -> Result<Lease, Fault> {
    Ok(Lease::new(reply::text(owner)?, reply::number(token)?, Duration::from_millis(reply::number(remaining)?)))
}

#[async_trait]
impl LeaseProvider for RedisLeases {
    fn reach(&self) -> Reach {
        Reach::Network
    }

    async fn acquire(&self, key: &str, owner: &str, ttl: Duration) -> Result<Acquired> {
        self.check("acquire", &[key, owner], Some(ttl))?;
        let (lease, token) = self.0.keys().lease(key);
        let call = ACQUIRE.call(&[&lease, &token]).arg(owner).number(millis(ttl));
        let answer = self.run("acquire", key, &ACQUIRE, call).await?;
        let acquired = reply::tuple(answer).and_then(|[mine, owner, token, remaining]| {
            let lease = lease_of(owner, &token, &remaining)?;
            Ok(if reply::number(&mine)? == 1 { Acquired::Yes(lease) } else { Acquired::HeldBy(lease) })
        });
        acquired.map_err(|fault| Error::from(fault).during("acquire").on(key.escape_debug()))
    }

    async fn renew(&self, key: &str, owner: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.check("renew", &[key, owner], Some(ttl))?;
        self.act("renew", key, owner, ttl, "").await
    }

    async fn release(&self, key: &str, owner: &str) -> Result<bool> {
        self.check("release", &[key, owner], None)?;
        Ok(self.act("release", key, owner, Duration::ZERO, "").await?.is_some())
    }

    async fn transfer(&self, key: &str, from: &str, to: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.check("transfer", &[key, from, to], Some(ttl))?;
        self.act("transfer", key, from, ttl, to).await
    }

    async fn holder(&self, key: &str) -> Result<Option<Lease>> {
        self.check("holder", &[key], None)?;
        self.act("holder", key, "", Duration::ZERO, "").await
    }
}

impl fmt::Debug for RedisLeases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLeases").finish_non_exhaustive()
    }
}
