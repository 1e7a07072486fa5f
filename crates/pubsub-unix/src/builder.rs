//! How an instance is configured.

use std::path::PathBuf;
use std::time::Duration;

use pubsub_core::{Error, Result};

use crate::UnixSocketPubSub;
use crate::broker::Patience;
use crate::entry::Entry;
use crate::files::Paths;
use crate::ledger::Limits;
use crate::link::{Config, Tongue};

/// Configures a [`UnixSocketPubSub`]. What concerns the broker is that of the process which is the broker.
#[derive(Debug, Clone)]
pub struct UnixBuilder {
    path: PathBuf,
    publish_timeout: Duration,
    max_payload: usize,
    max_events: u64,
    max_bytes: u64,
    grace: Duration,
    hang_timeout: Duration,
    max_peer_bytes: usize,
    sync: bool,
    tongue: Tongue,
    envelopes: bool,
    users: Vec<String>,
    groups: Vec<String>,
    owner: Option<String>,
}

/// What an instance itself keeps of its configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) publish_timeout: Duration,
    pub(crate) max_payload: usize,
    pub(crate) max_events: u64,
    /// Whether data is read and written with the envelopes of TypeScript peers.
    pub(crate) envelopes: bool,
}

impl UnixBuilder {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            publish_timeout: Duration::from_secs(5),
            max_payload: 16 << 20,
            max_events: 10_000,
            max_bytes: 256 << 20,
            grace: Duration::from_millis(250),
            hang_timeout: Duration::from_secs(10),
            max_peer_bytes: 64 << 20,
            sync: false,
            tongue: Tongue::Any,
            envelopes: false,
            users: Vec::new(),
            groups: Vec::new(),
            owner: None,
        }
    }

    /// How long a publish waits for a group that is far behind before it fails with `Full` (5 s). Zero means not at all.
    #[must_use]
    pub fn publish_timeout(mut self, timeout: Duration) -> Self {
        self.publish_timeout = timeout;
        self
    }

    /// The most bytes of encoded data plus metadata per event (16 MiB, at most 32 MiB).
    #[must_use]
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.max_payload = bytes;
        self
    }

    /// How many events each topic keeps (10,000). Beyond it the oldest go; what a group has not read stays, and `publish` waits.
    #[must_use]
    pub fn max_events(mut self, events: u64) -> Self {
        self.max_events = events;
        self
    }

    /// How many bytes of events all topics keep together (256 MiB). Beyond it the oldest of the topics used least recently go.
    #[must_use]
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// How long a process whose connection ended keeps what it holds: it may come back (250 ms).
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// How long a process may answer nothing before what it holds goes to others (10 s).
    #[must_use]
    pub fn hang_timeout(mut self, timeout: Duration) -> Self {
        self.hang_timeout = timeout;
        self
    }

    /// How many bytes may wait to be read by one process before it is cut off (64 MiB).
    #[must_use]
    pub fn max_peer_bytes(mut self, bytes: usize) -> Self {
        self.max_peer_bytes = bytes;
        self
    }

    /// Forces what was published to the disk before it is confirmed, so that it outlives a loss of power as well (off).
    #[must_use]
    pub fn sync(mut self, sync: bool) -> Self {
        self.sync = sync;
        self
    }

    /// Serves processes of these users too, by name or number, while this process is the broker (none but its own user and root). They
    /// connect with [`owner`](Self::owner).
    ///
    /// A directory that is made then lets others pass through, the socket lets everybody connect, and the kernel tells the broker who did.
    #[must_use]
    pub fn allow_users(mut self, users: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.users.extend(users.into_iter().map(Into::into));
        self
    }

    /// Serves processes of these groups as well, by name or number, as [`allow_users`](Self::allow_users) does those of users: those whose first
    /// group it is, and those of users who are in it when this instance connects.
    #[must_use]
    pub fn allow_groups(mut self, groups: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.groups.extend(groups.into_iter().map(Into::into));
        self
    }

    /// Whose bus it is, by name or number (one's own). On another's bus this process is a guest, who never becomes the broker; the broker
    /// has to [admit](Self::allow_users) it.
    #[must_use]
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.owner = Some(owner.into());
        self
    }

    /// Refuses to be the client of a broker that is a process of Mastra (off): while there is one the status is `Failed`, and it goes
    /// on once that has gone. What such a broker cannot do the [crate's documentation](crate#with-typescript) says, and
    /// [`capabilities`](pubsub_core::PubSub::capabilities) as long as there is one.
    #[must_use]
    pub fn native_only(mut self, native_only: bool) -> Self {
        self.tongue = if native_only { Tongue::Native } else { Tongue::Any };
        self
    }

    /// Reads and writes data with the tagged envelopes in which processes of Mastra say what JSON lacks (off). Without it a `Date` is
    /// text, a `Map` an object, a `BigInt` a number, and what is published cannot be mistaken for any of them.
    #[must_use]
    pub fn envelopes(mut self, envelopes: bool) -> Self {
        self.envelopes = envelopes;
        self
    }

    /// Speaks as processes of Mastra do, with brokers of this crate too. It has their limits then, and exists to be tested.
    #[doc(hidden)]
    #[must_use]
    pub fn lines_only(mut self) -> Self {
        self.tongue = Tongue::Lines;
        self
    }

    /// Connects, or becomes the broker.
    ///
    /// Dropping the future leaves nothing connected.
    ///
    /// # Errors
    /// `InvalidOption` naming the option; `Denied` where the directory, the files beside the socket or the broker are somebody else's, or
    /// the broker does not serve this user.
    pub async fn connect(self) -> Result<UnixSocketPubSub> {
        let subject = self.path.display().to_string();
        let (config, settings) = self.check().map_err(|error| error.during("connect").on(&subject))?;
        UnixSocketPubSub::on(config, settings).await.map_err(|error| error.during("connect").on(&subject))
    }

    fn check(self) -> Result<(Config, Settings)> {
        const YEARS: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
        for (option, duration, least) in [
            ("publish_timeout", self.publish_timeout, Duration::ZERO),
            ("grace", self.grace, Duration::from_millis(1)),
            ("hang_timeout", self.hang_timeout, Duration::from_secs(2)),
        ] {
            if duration > YEARS || duration < least {
                return Err(Error::invalid_option(option, format!("is {duration:?}; it must be from {least:?} to ten years")));
            }
        }
        let bytes = |option: &'static str, value: u64, least: u64, most: u64| {
            let fits = (least..=most).contains(&value);
            if fits {
                Ok(())
            } else {
                Err(Error::invalid_option(option, format!("is {value}; it must be from {least} to {most}")))
            }
        };
        bytes("max_payload", self.max_payload as u64, 1, 32 << 20)?;
        bytes("max_events", self.max_events, 1, 1 << 30)?;
        bytes("max_bytes", self.max_bytes, 1 << 20, 1 << 40)?;
        bytes("max_peer_bytes", self.max_peer_bytes as u64, 1 << 20, 1 << 40)?;
        let entry = Entry::new(&self.users, &self.groups, self.owner.as_deref());
        let entry = entry.map_err(|(option, why)| Error::invalid_option(option, why))?;
        let paths = Paths::new(&self.path, &entry).map_err(|why| Error::invalid_option("path", why))?;
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let config = Config {
            paths,
            entry,
            limits: Limits { max_events: self.max_events, max_bytes: self.max_bytes },
            patience: Patience { absent: millis(self.grace), silent: millis(self.hang_timeout) },
            max_peer_bytes: self.max_peer_bytes,
            sync: self.sync,
            tongue: self.tongue,
        };
        let Self { publish_timeout, max_payload, max_events, envelopes, .. } = self;
        Ok((config, Settings { publish_timeout, max_payload, max_events, envelopes }))
    }
}
