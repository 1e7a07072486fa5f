//! How a store is configured.

use std::fmt;
use std::time::Duration;

use pubsub_core::{Error, Result};

use super::RedisServerCache;
use crate::RedisBuilder;

/// The most that any count in the bounds may be.
const MOST: u64 = 1 << 32;

const TEN_YEARS: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Configures a [`RedisServerCache`]. Its `Debug` shows no credentials.
#[derive(Clone)]
pub struct RedisCacheBuilder {
    pub(super) server: RedisBuilder,
    pub(super) max_events: u64,
    pub(super) max_age: Duration,
    pub(super) window: u64,
    pub(super) max_list: u64,
    pub(super) idle_ttl: Duration,
}

impl RedisCacheBuilder {
    pub(super) fn new(server: RedisBuilder) -> Self {
        Self {
            server: server.prefix("mastra:cache"),
            max_events: 10_000,
            max_age: Duration::from_secs(3600),
            window: 1000,
            max_list: 100_000,
            idle_ttl: Duration::from_secs(7 * 24 * 3600),
        }
    }

    /// What all keys begin with (`mastra:cache`). Stores with different prefixes do not know each other.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.server = self.server.prefix(prefix);
        self
    }

    /// How many events each topic's log keeps (10,000): of its newest indices that many, but for what was trimmed out, and up to a
    /// hundred more, at most a tenth.
    #[must_use]
    pub fn max_events(mut self, events: u64) -> Self {
        self.max_events = events;
        self
    }

    /// How long an event is kept, by the server's clock (one hour).
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = age;
        self
    }

    /// Among how many of a topic's newest events one that is appended again is recognised (1,000).
    #[must_use]
    pub fn window(mut self, events: u64) -> Self {
        self.window = events;
        self
    }

    /// How many values a list may have (100,000). A push to a full one is refused as `Full`.
    #[must_use]
    pub fn max_list(mut self, values: u64) -> Self {
        self.max_list = values;
        self
    }

    /// How long the place of a topic in its numbering, and what was put in without a time to live, is kept after it was last
    /// written (7 days).
    #[must_use]
    pub fn idle_ttl(mut self, ttl: Duration) -> Self {
        self.idle_ttl = ttl;
        self
    }

    /// The most bytes of encoded data plus metadata per event, and of a value (4 MiB).
    #[must_use]
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.server = self.server.max_payload(bytes);
        self
    }

    /// How long one operation may take, reconnecting included, before it fails and a silent connection is given up (5 s).
    #[must_use]
    pub fn command_timeout(mut self, timeout: Duration) -> Self {
        self.server = self.server.command_timeout(timeout);
        self
    }

    /// Connects.
    ///
    /// Dropping the future leaves nothing connected.
    ///
    /// # Errors
    /// `InvalidOption` naming the option, `Denied` if the credentials are refused, `Unavailable` if the server cannot be reached
    /// within `command_timeout`.
    pub async fn connect(self) -> Result<RedisServerCache> {
        self.validate().map_err(|error| error.during("connect"))?;
        RedisServerCache::on(self).await.map_err(|error| error.during("connect"))
    }

    fn validate(&self) -> Result<()> {
        for (option, count) in [("max_events", self.max_events), ("window", self.window), ("max_list", self.max_list)] {
            if !(1..=MOST).contains(&count) {
                return Err(Error::invalid_option(option, format!("must be from 1 to {MOST}")));
            }
        }
        for (option, duration) in [("max_age", self.max_age), ("idle_ttl", self.idle_ttl)] {
            if duration < Duration::from_millis(1) || duration > TEN_YEARS {
                return Err(Error::invalid_option(option, "must be from 1ms to ten years"));
            }
        }
        if self.idle_ttl < self.max_age {
            return Err(Error::invalid_option("idle_ttl", "is shorter than max_age: events would outlive their numbering"));
        }
        self.server.validate()
    }
}

impl fmt::Debug for RedisCacheBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCacheBuilder")
            .field("server", &self.server.server)
            .field("prefix", &self.server.prefix)
            .field("max_events", &self.max_events)
            .field("max_age", &self.max_age)
            .field("window", &self.window)
            .field("max_list", &self.max_list)
            .field("idle_ttl", &self.idle_ttl)
            .field("max_payload", &self.server.max_payload)
            .field("command_timeout", &self.server.command_timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use pubsub_core::ErrorKind;

    use super::*;

    #[tokio::test]
    async fn each_refusal_names_its_option_before_anything_is_connected() {
        let builder = || RedisServerCache::builder("127.0.0.1", 1);
        for (refused, option) in [
            (builder().max_events(0), "max_events"),
            (builder().window(MOST + 1), "window"),
            (builder().max_list(0), "max_list"),
            (builder().max_age(Duration::ZERO), "max_age"),
            (builder().idle_ttl(Duration::from_secs(60)), "idle_ttl"),
            (builder().prefix(""), "prefix"),
            (builder().max_payload(0), "max_payload"),
            (builder().command_timeout(Duration::ZERO), "command_timeout"),
        ] {
            let error = refused.connect().await.unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::InvalidOption { option: named, .. } if named == option), "{error}");
        }
    }
}
