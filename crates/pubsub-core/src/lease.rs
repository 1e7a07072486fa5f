//! Leases: named locks with an owner, a time to live and a fencing token.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::retry::MAX_DURATION;
use crate::{
    Capabilities, Closed, Error, ErrorKind, Event, Page, Positions, PubSub, PublishError, PublishOptions, Reach, Result, Start,
    StatusWatch, SubscribeOptions, Subscription, Topic, TopicStatus, TrimFilter,
};

/// A lease that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lease {
    /// Whose it is: opaque text chosen by the owner.
    pub owner: String,
    /// Grows with every change of owner of its key: a store that remembers the highest token it has seen can refuse writes of
    /// an owner that was paused and overtaken.
    pub token: u64,
    /// How long it lasts from now unless it is renewed.
    pub remaining: Duration,
}

impl Lease {
    /// A lease; for providers.
    pub fn new(owner: impl Into<String>, token: u64, remaining: Duration) -> Self {
        Self { owner: owner.into(), token, remaining }
    }
}

/// What came of trying to acquire a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// It is the caller's now.
    Yes(Lease),
    /// Somebody else holds it.
    HeldBy(Lease),
}

/// A store of leases.
///
/// Each call is atomic in the store. Keys and owners are opaque text of 1 to 255 bytes without control characters; keys are
/// independent of topics. Once a future is dropped, the store may have done what was asked or not: whoever asks again finds out.
#[async_trait]
pub trait LeaseProvider: Send + Sync + fmt::Debug + 'static {
    /// How far these leases are known.
    fn reach(&self) -> Reach;

    /// Takes the lease if it is free; its owner renews it instead, keeping the token.
    ///
    /// # Errors
    /// `InvalidName`, `InvalidOption` for a time to live of zero or over ten years, `Closed`, and what the store refuses.
    async fn acquire(&self, key: &str, owner: &str, ttl: Duration) -> Result<Acquired>;

    /// Makes the lease last `ttl` from now; none if it is not this owner's (any more).
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    async fn renew(&self, key: &str, owner: &str, ttl: Duration) -> Result<Option<Lease>>;

    /// Frees the lease; false if it was not this owner's.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    async fn release(&self, key: &str, owner: &str) -> Result<bool>;

    /// Hands the lease from one owner to another for a full new time to live, with a new token, without the key being free in
    /// between; none if it was not `from`'s.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    async fn transfer(&self, key: &str, from: &str, to: &str, ttl: Duration) -> Result<Option<Lease>>;

    /// Who holds the lease; none if it is free.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    async fn holder(&self, key: &str) -> Result<Option<Lease>>;
}

/// Checks keys, owners and times to live, so that every provider refuses alike.
///
/// # Errors
/// `InvalidName` or `InvalidOption`.
pub fn check_lease(names: &[&str], ttl: Option<Duration>) -> Result<()> {
    for name in names {
        // The rules are those of topics.
        if Topic::new(name).is_err() {
            let why = "a lease's key and owner have 1 to 255 bytes without control characters";
            return Err(Error::new(ErrorKind::InvalidName(why.into())).on(name.escape_debug()));
        }
    }
    match ttl {
        Some(ttl) if ttl < Duration::from_millis(1) => Err(Error::invalid_option("ttl", "must be at least a millisecond")),
        Some(ttl) if ttl > MAX_DURATION => Err(Error::invalid_option("ttl", "is longer than ten years")),
        _ => Ok(()),
    }
}

/// A lease that renews itself every third of its time to live, and tells its holder when it is lost.
///
/// By the holder's own monotonic clock it is lost at the latest when nine tenths of its time to live have passed since the last
/// renewal that succeeded was *asked for*: a holder that cannot reach the store knows before anybody else can acquire it. A
/// process that was stopped knows only when it runs again, which is what the fencing token is for.
///
/// Dropping it stops renewing and releases it in the background; [`release`](Self::release) waits for that.
#[derive(Debug)]
pub struct LeaseGuard {
    key: String,
    owner: String,
    token: u64,
    provider: Arc<dyn LeaseProvider>,
    /// Until when it is certainly held; none once it is lost.
    held: watch::Receiver<Option<Instant>>,
    renewal: AbortHandle,
    runtime: Handle,
    released: bool,
}

impl LeaseGuard {
    /// Takes the lease and starts to renew it; the present holder if there is one.
    ///
    /// Dropping the future may leave the lease taken until its time to live ends.
    ///
    /// # Errors
    /// As [`LeaseProvider::acquire`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn acquire(
        provider: Arc<dyn LeaseProvider>,
        key: &str,
        owner: &str,
        ttl: Duration,
    ) -> Result<Result<Self, Lease>> {
        let asked = Instant::now();
        match provider.acquire(key, owner, ttl).await? {
            Acquired::HeldBy(other) => Ok(Err(other)),
            Acquired::Yes(lease) => Ok(Ok(Self::adopt(provider, key, &lease, ttl, asked))),
        }
    }

    /// Guards a lease that was acquired or transferred at `asked`.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn adopt(provider: Arc<dyn LeaseProvider>, key: &str, lease: &Lease, ttl: Duration, asked: Instant) -> Self {
        let (told, held) = watch::channel(Some(certain(asked, ttl)));
        let (key, owner, runtime) = (key.to_owned(), lease.owner.clone(), Handle::current());
        let renewal = runtime.spawn(keep(provider.clone(), key.clone(), owner.clone(), lease.token, ttl, told)).abort_handle();
        Self { key, owner, token: lease.token, provider, held, renewal, runtime, released: false }
    }

    /// The key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The fencing token.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Whether it is still held, as far as this process knows.
    pub fn is_held(&self) -> bool {
        self.held.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Waits until the lease is lost. Cancel safe.
    pub async fn lost(&self) {
        let mut held = self.held.clone();
        // An error means that the renewal has ended, which it does only after telling.
        let _ = held.wait_for(Option::is_none).await;
    }

    /// Stops renewing and frees the lease; false if it had been lost. Dropping the future leaves that to the background.
    ///
    /// # Errors
    /// What the store refuses; the lease then ends with its time to live.
    pub async fn release(mut self) -> Result<bool> {
        self.renewal.abort();
        if !self.is_held() {
            return Ok(false); // the store knows it by its owner, who may have acquired it anew
        }
        let released = self.provider.release(&self.key, &self.owner).await?;
        self.released = true;
        Ok(released)
    }

    /// Hands the lease to another owner, who [adopts](Self::adopt) it; none if it had been lost. Dropping the future frees the
    /// lease in the background, unless it had been handed over already.
    ///
    /// # Errors
    /// What the store refuses; the lease then ends with its time to live.
    pub async fn transfer(mut self, to: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.renewal.abort();
        if !self.is_held() {
            return Ok(None);
        }
        let transferred = self.provider.transfer(&self.key, &self.owner, to, ttl).await?;
        self.released = true;
        Ok(transferred)
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        self.renewal.abort();
        if !self.released && self.is_held() {
            let (provider, key, owner) = (self.provider.clone(), self.key.clone(), self.owner.clone());
            self.runtime.spawn(async move { provider.release(&key, &owner).await });
        }
    }
}

/// Until when a lease that was asked for then is certainly held. A tenth is kept back for a clock and a scheduler that lag.
fn certain(asked: Instant, ttl: Duration) -> Instant {
    let ttl = ttl.min(MAX_DURATION); // what no provider takes must not overflow the clock
    asked + ttl - ttl / 10
}

/// Renews until the lease is lost.
async fn keep(
    provider: Arc<dyn LeaseProvider>,
    key: String,
    owner: String,
    token: u64,
    ttl: Duration,
    told: watch::Sender<Option<Instant>>,
) {
    let mut pause = ttl / 3;
    loop {
        let Some(until) = *told.borrow() else { return };
        // Sooner after a slow answer: what is left is to be enough for another, and for telling.
        let left = until.saturating_duration_since(Instant::now());
        tokio::time::sleep(pause.min(left / 2)).await;
        let asked = Instant::now();
        let still = match tokio::time::timeout_at(until, provider.renew(&key, &owner, ttl)).await {
            Ok(Ok(Some(lease))) if lease.token == token => {
                pause = ttl / 3;
                Some(certain(asked, ttl))
            }
            Ok(Ok(_)) | Err(_) => None,
            Ok(Err(error)) => {
                tracing::warn!(%key, %error, "cannot renew a lease");
                pause = ttl / 10; // try again soon: the time to live runs on
                (Instant::now() + pause < until).then_some(until)
            }
        };
        if still.is_none() {
            tracing::warn!(%key, "lost a lease");
        }
        told.send_replace(still);
    }
}

/// Puts a provider of leases beside a bus: everything is the bus's own but [`PubSub::leases`].
pub fn with_leases(inner: Arc<dyn PubSub>, leases: Arc<dyn LeaseProvider>) -> Arc<dyn PubSub> {
    Arc::new(WithLeases { inner, leases })
}

#[derive(Debug)]
struct WithLeases {
    inner: Arc<dyn PubSub>,
    leases: Arc<dyn LeaseProvider>,
}

#[async_trait]
impl PubSub for WithLeases {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.inner.capabilities();
        capabilities.leases = Some(self.leases.reach());
        capabilities
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        self.inner.publish(topic, events, options).await
    }

    fn publish_now(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Option<Result<Positions, PublishError>> {
        self.inner.publish_now(topic, events, options)
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.inner.subscribe(topic, options).await
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.inner.history(topic, from, limit).await
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.inner.clear_topic(topic).await
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.inner.trim_topic(topic, filter).await
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.inner.inspect(topic).await
    }

    fn status(&self) -> StatusWatch {
        self.inner.status()
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.inner.close(within).await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        Some(self.leases.clone())
    }
}
