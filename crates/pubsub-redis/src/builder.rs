//! How an instance is configured.

use std::fmt;
use std::time::Duration;

use pubsub_core::{Error, Result};

use crate::keys::tag_of;
use crate::node::Node;
use crate::{RedisServer, RedisStreamsPubSub};

/// The longest `reclaim_after`: TypeScript members take over what has been idle for a minute.
const LONGEST_RECLAIM: Duration = Duration::from_secs(60);

const TEN_YEARS: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Configures a [`RedisStreamsPubSub`]. Its `Debug` shows no credentials.
#[derive(Clone)]
pub struct RedisBuilder {
    pub(crate) server: RedisServer,
    pub(crate) prefix: String,
    pub(crate) max_len: Option<u64>,
    pub(crate) max_age: Option<Duration>,
    pub(crate) idle_ttl: Option<Duration>,
    pub(crate) max_payload: usize,
    pub(crate) publish_timeout: Duration,
    pub(crate) command_timeout: Duration,
    pub(crate) reclaim_after: Duration,
    pub(crate) linger: Duration,
}

impl RedisBuilder {
    pub(crate) fn new(server: RedisServer) -> Self {
        Self {
            server,
            prefix: "mastra:topic".into(),
            max_len: Some(10_000),
            max_age: None,
            idle_ttl: Some(Duration::from_secs(7 * 24 * 3600)),
            max_payload: 4 << 20,
            publish_timeout: Duration::from_secs(5),
            command_timeout: Duration::from_secs(5),
            reclaim_after: LONGEST_RECLAIM,
            linger: Duration::from_millis(100),
        }
    }

    /// What all keys begin with (`mastra:topic`). Buses with different prefixes do not know each other.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// About how many events each topic keeps (10,000); none for any number. The server trims whole blocks, so it keeps up to a
    /// hundred more.
    #[must_use]
    pub fn max_len(mut self, events: Option<u64>) -> Self {
        self.max_len = events;
        self
    }

    /// About how long events are kept, by the server's clock (for ever). Older ones go when something is published.
    #[must_use]
    pub fn max_age(mut self, age: Option<Duration>) -> Self {
        self.max_age = age;
        self
    }

    /// How long a topic is kept, with its groups, once nothing is published to it any more (7 days); none for ever.
    #[must_use]
    pub fn idle_ttl(mut self, ttl: Option<Duration>) -> Self {
        self.idle_ttl = ttl;
        self
    }

    /// The most bytes of encoded data plus metadata per event (4 MiB).
    #[must_use]
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.max_payload = bytes;
        self
    }

    /// How long a publish may take, reconnecting included, before it fails (5 s).
    #[must_use]
    pub fn publish_timeout(mut self, timeout: Duration) -> Self {
        self.publish_timeout = timeout;
        self
    }

    /// How long one command may take before its connection is given up (5 s).
    #[must_use]
    pub fn command_timeout(mut self, timeout: Duration) -> Self {
        self.command_timeout = timeout;
        self
    }

    /// How long a member may be silent before others take over what it held (60 s, which is the most). All members of a group should
    /// agree on it.
    #[must_use]
    pub fn reclaim_after(mut self, time: Duration) -> Self {
        self.reclaim_after = time;
        self
    }

    /// How long what was read ahead for a group waits to be asked for before it goes back for others (100 ms).
    #[must_use]
    pub fn linger(mut self, time: Duration) -> Self {
        self.linger = time;
        self
    }

    /// Connects.
    ///
    /// Dropping the future leaves nothing connected.
    ///
    /// # Errors
    /// `InvalidOption` naming the option, `Denied` if the credentials are refused, `Unavailable` if the server cannot be reached
    /// within `command_timeout`.
    pub async fn connect(self) -> Result<RedisStreamsPubSub> {
        self.validate().map_err(|error| error.during("connect"))?;
        Node::connect(self).await.map(RedisStreamsPubSub::on).map_err(|error| error.during("connect"))
    }

    /// The same at a node of a cluster.
    pub(crate) fn at(&self, place: &crate::cluster::Place) -> Self {
        Self { server: self.server.at(place), ..self.clone() }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        if self.prefix.is_empty() || self.prefix.len() > 255 || self.prefix.chars().any(char::is_control) {
            return Err(Error::invalid_option("prefix", "takes 1 to 255 bytes without control characters"));
        }
        if self.prefix.contains('}') && tag_of(&self.prefix).is_none() {
            return Err(Error::invalid_option(
                "prefix",
                "has a `}` that ends no hash tag, so that keys could not share a slot",
            ));
        }
        if self.max_len == Some(0) {
            return Err(Error::invalid_option("max_len", "must be at least 1"));
        }
        if !(1..=256 << 20).contains(&self.max_payload) {
            return Err(Error::invalid_option("max_payload", "must be from 1 byte to 256 MiB"));
        }
        let millisecond = Duration::from_millis(1);
        for (option, duration, least) in [
            ("max_age", self.max_age, millisecond),
            ("idle_ttl", self.idle_ttl, millisecond),
            ("publish_timeout", Some(self.publish_timeout), millisecond),
            ("command_timeout", Some(self.command_timeout), 10 * millisecond),
            ("reclaim_after", Some(self.reclaim_after), 100 * millisecond),
            ("linger", Some(self.linger), millisecond),
        ] {
            if duration.is_some_and(|duration| duration < least || duration > TEN_YEARS) {
                return Err(Error::invalid_option(option, format!("must be from {least:?} to ten years")));
            }
        }
        if self.reclaim_after > LONGEST_RECLAIM {
            return Err(Error::invalid_option(
                "reclaim_after",
                "is longer than 60 s, after which TypeScript members take over",
            ));
        }
        if self.linger > self.reclaim_after / 3 {
            return Err(Error::invalid_option("linger", "is longer than a third of reclaim_after"));
        }
        if self.idle_ttl.is_some_and(|ttl| ttl < self.reclaim_after) {
            return Err(Error::invalid_option("idle_ttl", "is shorter than reclaim_after"));
        }
        Ok(())
    }
}

impl fmt::Debug for RedisBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBuilder")
            .field("server", &self.server)
            .field("prefix", &self.prefix)
            .field("max_len", &self.max_len)
            .field("max_age", &self.max_age)
            .field("idle_ttl", &self.idle_ttl)
            .field("max_payload", &self.max_payload)
            .field("publish_timeout", &self.publish_timeout)
            .field("command_timeout", &self.command_timeout)
            .field("reclaim_after", &self.reclaim_after)
            .field("linger", &self.linger)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use pubsub_core::ErrorKind;

    use super::*;

    #[test]
    fn each_refusal_names_its_option() {
        let builder = || RedisBuilder::new(RedisServer::new("127.0.0.1", 1));
        let zero = Duration::ZERO;
        for (refused, named) in [
            (builder().prefix(""), "prefix"),
            (builder().prefix("a}b"), "prefix"),
            (builder().max_len(Some(0)), "max_len"),
            (builder().max_payload(0), "max_payload"),
            (builder().max_age(Some(zero)), "max_age"),
            (builder().idle_ttl(Some(zero)), "idle_ttl"),
            (builder().idle_ttl(Some(Duration::from_secs(1))), "idle_ttl"),
            (builder().publish_timeout(zero), "publish_timeout"),
            (builder().command_timeout(Duration::MAX), "command_timeout"),
            (builder().reclaim_after(zero), "reclaim_after"),
            (builder().reclaim_after(Duration::from_secs(61)), "reclaim_after"),
            (builder().linger(Duration::from_secs(30)), "linger"),
        ] {
            let error = refused.validate().unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == named), "{named}: {error}");
        }
        assert!(builder().max_len(None).idle_ttl(None).validate().is_ok());
    }
}
