//! How a store within the process is bounded.

use std::sync::Arc;
use std::time::Duration;

use pubsub_core::{Error, Result};
use smol_str::SmolStr;

use super::InMemoryServerCache;

/// The most that any count in the bounds may be.
const MOST: usize = 1 << 32;

/// Configures an [`InMemoryServerCache`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InMemoryBuilder {
    name: Option<SmolStr>,
    pub(super) max_events: usize,
    pub(super) max_bytes: usize,
    pub(super) max_age: Duration,
    pub(super) max_topics: usize,
    pub(super) max_values: usize,
    pub(super) window: usize,
}

impl Default for InMemoryBuilder {
    fn default() -> Self {
        Self {
            name: None,
            max_events: 10_000,
            max_bytes: 256 << 20,
            max_age: Duration::from_secs(3600),
            max_topics: 10_000,
            max_values: 10_000,
            window: 1000,
        }
    }
}

impl InMemoryBuilder {
    /// Shares the store with all who build one of this name in the process, for as long as one of them has it. Without a name it is
    /// the caller's own.
    #[must_use]
    pub fn name(mut self, name: impl AsRef<str>) -> Self {
        self.name = Some(SmolStr::new(name));
        self
    }

    /// How many events each topic's log keeps (10,000).
    #[must_use]
    pub fn max_events(mut self, events: usize) -> Self {
        self.max_events = events;
        self
    }

    /// How many bytes everything may have together (256 MiB).
    #[must_use]
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// How long an event is kept (one hour).
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = age;
        self
    }

    /// How many topics have a log (10,000).
    #[must_use]
    pub fn max_topics(mut self, topics: usize) -> Self {
        self.max_topics = topics;
        self
    }

    /// How many keys there are (10,000).
    #[must_use]
    pub fn max_values(mut self, values: usize) -> Self {
        self.max_values = values;
        self
    }

    /// Among how many of a topic's newest events one that is appended again is recognised (1,000).
    #[must_use]
    pub fn window(mut self, events: usize) -> Self {
        self.window = events;
        self
    }

    /// Makes the store, or finds the one of this name.
    ///
    /// # Errors
    /// `InvalidOption` naming the option: an empty name, a bound of zero, a count over 2^32, an age under a millisecond or over ten
    /// years, or a name under which a store exists with other bounds.
    pub fn build(self) -> Result<Arc<InMemoryServerCache>> {
        let refuse = |option: &'static str, why: &'static str| Err(Error::invalid_option(option, why).during("build"));
        for (option, count) in [
            ("max_events", self.max_events),
            ("max_bytes", self.max_bytes),
            ("max_topics", self.max_topics),
            ("max_values", self.max_values),
            ("window", self.window),
        ] {
            if count == 0 {
                return refuse(option, "must be at least 1");
            }
            if option != "max_bytes" && count > MOST {
                return refuse(option, "is over 4294967296");
            }
        }
        if self.max_age < Duration::from_millis(1) {
            return refuse("max_age", "must be at least a millisecond");
        }
        if self.max_age > Duration::from_secs(10 * 365 * 24 * 3600) {
            return refuse("max_age", "is longer than ten years");
        }
        match self.name.clone() {
            None => Ok(Arc::new(InMemoryServerCache::with(self))),
            Some(name) if name.is_empty() => refuse("name", "is empty"),
            Some(name) => InMemoryServerCache::named(&name, self),
        }
    }
}
