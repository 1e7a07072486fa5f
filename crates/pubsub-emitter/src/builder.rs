//! How an instance is configured.

use std::time::Duration;

use pubsub_core::{Error, Result};
use smol_str::SmolStr;

use crate::EventEmitterPubSub;
use crate::hub::{DEFAULT_RETENTION, Hub};

/// Configures an [`EventEmitterPubSub`].
#[derive(Debug, Clone)]
pub struct EmitterBuilder {
    name: Option<SmolStr>,
    pub(crate) publish_timeout: Duration,
    pub(crate) strict_payloads: bool,
    pub(crate) max_payload: Option<usize>,
    dead_letter_retention: Option<usize>,
}

impl Default for EmitterBuilder {
    fn default() -> Self {
        Self {
            name: None,
            publish_timeout: Duration::from_secs(5),
            strict_payloads: false,
            max_payload: None,
            dead_letter_retention: None,
        }
    }
}

impl EmitterBuilder {
    /// Shares the bus with all instances of this name in the process. Without a name the bus is the instance's own.
    #[must_use]
    pub fn name(mut self, name: impl AsRef<str>) -> Self {
        self.name = Some(SmolStr::new(name));
        self
    }

    /// How long a publish waits at a full queue before it fails with `Full` (5 s). Zero means not at all.
    #[must_use]
    pub fn publish_timeout(mut self, timeout: Duration) -> Self {
        self.publish_timeout = timeout;
        self
    }

    /// Encodes and decodes every payload although it need not be, and refuses those that do not survive it: for tests of what
    /// is to run on another backend (off).
    #[must_use]
    pub fn strict_payloads(mut self, strict: bool) -> Self {
        self.strict_payloads = strict;
        self
    }

    /// The most bytes of encoded data plus metadata per event (unlimited). With a limit, typed payloads are encoded to be
    /// measured.
    #[must_use]
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.max_payload = Some(bytes);
        self
    }

    /// How many dead letters each dead-letter topic keeps (1,000). The instances of one bus share one value.
    #[must_use]
    pub fn dead_letter_retention(mut self, letters: usize) -> Self {
        self.dead_letter_retention = Some(letters);
        self
    }

    /// Makes the instance.
    ///
    /// # Errors
    /// `InvalidOption` naming the option: an empty name, a limit of zero, a time-out over ten years, or a retention other than
    /// that of the bus which exists under this name.
    pub fn build(self) -> Result<EventEmitterPubSub> {
        let refuse = |option: &'static str, why: &'static str| Err(Error::invalid_option(option, why).during("build"));
        if self.publish_timeout > Duration::from_secs(10 * 365 * 24 * 3600) {
            return refuse("publish_timeout", "is longer than ten years");
        }
        if self.max_payload == Some(0) {
            return refuse("max_payload", "must be at least 1");
        }
        if self.dead_letter_retention.is_some_and(|letters| letters == 0 || letters > 1 << 20) {
            return refuse("dead_letter_retention", "must be from 1 to 1048576");
        }
        let hub = match &self.name {
            None => Hub::new(None, self.dead_letter_retention.unwrap_or(DEFAULT_RETENTION)),
            Some(name) if name.is_empty() => return refuse("name", "is empty"),
            Some(name) => Hub::named(name, self.dead_letter_retention)?,
        };
        Ok(EventEmitterPubSub::on(hub, self))
    }
}
