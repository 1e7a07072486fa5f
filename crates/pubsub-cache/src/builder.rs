//! How the decorator is configured.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pubsub_core::{Error, PubSub, Result, Topic};

use crate::{CachingPubSub, ServerCache};

/// What becomes of a publish whose event the store does not take, because it fails or does not answer in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OnStoreFailure {
    /// Live delivery goes on: the event is published without an index and is not in the history. The publisher gets no position for
    /// it, a warning is logged, and [`CachingPubSub::uncached`] counts it. A subscription that cannot read goes on with what comes
    /// live, and the next delivery says how many events were lost.
    #[default]
    Continue,
    /// The publish fails and nothing goes out. A subscription that cannot read waits until it can.
    Fail,
}

pub(crate) type TopicFilter = Arc<dyn Fn(&Topic) -> bool + Send + Sync>;

/// Configures a [`CachingPubSub`].
#[derive(Clone)]
pub struct CachingBuilder {
    inner: Arc<dyn PubSub>,
    store: Arc<dyn ServerCache>,
    pub(crate) on_store_failure: OnStoreFailure,
    pub(crate) store_timeout: Duration,
    pub(crate) should_cache: Option<TopicFilter>,
}

impl CachingBuilder {
    pub(crate) fn new(inner: Arc<dyn PubSub>, store: Arc<dyn ServerCache>) -> Self {
        let (on_store_failure, store_timeout) = (OnStoreFailure::default(), Duration::from_secs(5));
        Self { inner, store, on_store_failure, store_timeout, should_cache: None }
    }

    /// What becomes of a publish when the store fails ([`OnStoreFailure::Continue`]).
    #[must_use]
    pub fn on_store_failure(mut self, then: OnStoreFailure) -> Self {
        self.on_store_failure = then;
        self
    }

    /// How long the store may take for one operation before it counts as failed (5 s).
    #[must_use]
    pub fn store_timeout(mut self, timeout: Duration) -> Self {
        self.store_timeout = timeout;
        self
    }

    /// Which topics are kept (all). It is asked at each call and must always answer alike; the topics of dead letters that are
    /// redriven are best left out. A panic in it is the caller's.
    #[must_use]
    pub fn should_cache(mut self, wanted: impl Fn(&Topic) -> bool + Send + Sync + 'static) -> Self {
        self.should_cache = Some(Arc::new(wanted));
        self
    }

    /// Makes the decorator.
    ///
    /// # Errors
    /// `InvalidOption` for a `store_timeout` of zero or over an hour.
    pub fn build(self) -> Result<CachingPubSub> {
        if self.store_timeout.is_zero() || self.store_timeout > Duration::from_secs(3600) {
            return Err(Error::invalid_option("store_timeout", "must be over zero and at most an hour").during("build"));
        }
        let (inner, store) = (self.inner.clone(), self.store.clone());
        Ok(CachingPubSub::over(inner, store, self))
    }
}

impl fmt::Debug for CachingBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachingBuilder")
            .field("on_store_failure", &self.on_store_failure)
            .field("store_timeout", &self.store_timeout)
            .field("should_cache", &self.should_cache.is_some())
            .finish_non_exhaustive()
    }
}
