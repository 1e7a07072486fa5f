//! How an instance is configured.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use gcloud_sdk::GCP_DEFAULT_SCOPES;
use gcloud_sdk::google_cloud_auth::credentials::service_account::AccessSpecifier;
use gcloud_sdk::google_cloud_auth::credentials::{self, Credentials};
use pubsub_core::{Error, ErrorKind, Result};

use crate::GoogleCloudPubSub;
use crate::link::Address;
use crate::message::LARGEST;
use crate::node::Node;

/// Where the service is.
const SERVICE: &str = "https://pubsub.googleapis.com";

/// Where an emulator is, if there is one: Google's own variable.
const EMULATOR: &str = "PUBSUB_EMULATOR_HOST";

/// Google's limits.
const DEADLINES: std::ops::RangeInclusive<u64> = 10..=600;
const LARGEST_BATCH: usize = 1000;
const SHORTEST_RETENTION: Duration = Duration::from_secs(600);
const LONGEST_RETENTION: Duration = Duration::from_secs(31 * 24 * 3600);
const SHORTEST_TTL: Duration = Duration::from_secs(24 * 3600);
const DELIVERIES: std::ops::RangeInclusive<u32> = 5..=100;

const TEN_YEARS: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Who to be.
#[derive(Clone)]
enum Identity {
    /// Whoever the environment says.
    Default,
    /// Nobody: for emulators.
    Anonymous,
    /// A service account, by its key in a file.
    KeyFile(PathBuf),
    /// What the application made.
    Given(Credentials),
}

/// Configures a [`GoogleCloudPubSub`]. Its `Debug` shows no credentials.
#[derive(Clone)]
pub struct GcpBuilder {
    pub(crate) project: String,
    endpoint: Option<String>,
    identity: Identity,
    pub(crate) create_topics: bool,
    pub(crate) shared_topics: Vec<String>,
    pub(crate) plain_groups: Vec<String>,
    pub(crate) ordering: bool,
    pub(crate) exactly_once: bool,
    pub(crate) ack_deadline: Duration,
    pub(crate) streams: usize,
    pub(crate) linger: Duration,
    pub(crate) max_payload: usize,
    pub(crate) publish_timeout: Duration,
    pub(crate) command_timeout: Duration,
    pub(crate) keep_alive: Duration,
    pub(crate) batch_events: usize,
    pub(crate) batch_bytes: usize,
    pub(crate) batch_delay: Duration,
    pub(crate) max_outstanding_events: usize,
    pub(crate) max_outstanding_bytes: usize,
    pub(crate) private_ttl: Duration,
    pub(crate) private_retention: Duration,
    pub(crate) topic_retention: Option<Duration>,
    pub(crate) start_time: Option<SystemTime>,
    pub(crate) service_dead_letters: Option<u32>,
    pub(crate) clock_uncertainty: Duration,
    restore: Option<bool>,
    pub(crate) restore_grace: Duration,
}

impl GcpBuilder {
    pub(crate) fn new(project: String) -> Self {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Self {
            project,
            endpoint: None,
            identity: Identity::Default,
            create_topics: true,
            shared_topics: list(&["workflow.events.v2", "workflow.events.v1"]),
            plain_groups: list(&["background-tasks", "background-tasks-result", "workflows-finish"]),
            ordering: true,
            exactly_once: false,
            ack_deadline: Duration::from_secs(60),
            streams: 1,
            linger: Duration::from_secs(1),
            max_payload: 9_000_000,
            publish_timeout: Duration::from_secs(10),
            command_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(30),
            batch_events: LARGEST_BATCH,
            batch_bytes: 1 << 20,
            batch_delay: Duration::ZERO,
            max_outstanding_events: 10_000,
            max_outstanding_bytes: 64 << 20,
            private_ttl: SHORTEST_TTL,
            private_retention: Duration::from_secs(3600),
            topic_retention: None,
            start_time: None,
            service_dead_letters: None,
            clock_uncertainty: Duration::from_millis(10),
            restore: None,
            restore_grace: Duration::from_secs(2),
        }
    }

    /// Where the service is: an `https://` URL, or an `http://` one for an emulator, to which nobody logs in (what
    /// `PUBSUB_EMULATOR_HOST` says, else Google's).
    #[must_use]
    pub fn endpoint(mut self, url: impl Into<String>) -> Self {
        self.endpoint = Some(url.into());
        self
    }

    /// The file with the key of the service account to be (else whoever the environment says: application default credentials).
    #[must_use]
    pub fn credentials_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.identity = Identity::KeyFile(path.into());
        self
    }

    /// Credentials of the application's own making, for whatever else there is: impersonation, workload identity federation.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.identity = Identity::Given(credentials);
        self
    }

    /// Whether topics that do not exist are made when they are first used (true); else that is `NotFound`.
    #[must_use]
    pub fn create_topics(mut self, create: bool) -> Self {
        self.create_topics = create;
        self
    }

    /// Families of topics that share one Google topic: `FAMILY` and all `FAMILY.REST` travel on `FAMILY`, each message with an
    /// attribute `topic` (`workflow.events.v2` and `workflow.events.v1`, as on the TypeScript side). All instances have to agree.
    #[must_use]
    pub fn shared_topics(mut self, families: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.shared_topics = families.into_iter().map(Into::into).collect();
        self
    }

    /// Topics with a `-` in their names whose groups have the subscription `TOPIC-GROUP` nevertheless, as on the TypeScript side; those
    /// of other such topics have `TOPIC%-GROUP`, lest two groups meet (`background-tasks`, `background-tasks-result` and
    /// `workflows-finish`). All instances have to agree.
    #[must_use]
    pub fn plain_groups(mut self, topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.plain_groups = topics.into_iter().map(Into::into).collect();
        self
    }

    /// Whether events of a run keep their order (true): the run id is the ordering key. Off, there is no order, and one run may have
    /// more than the 1 MB/s that Google allows a key.
    #[must_use]
    pub fn ordering(mut self, ordering: bool) -> Self {
        self.ordering = ordering;
        self
    }

    /// Whether groups are made with exactly-once delivery, as on the TypeScript side (false): what was acknowledged does not come again,
    /// and who has lost a delivery is told. It takes the service longer, and with [`ordering`](Self::ordering) it takes
    /// acknowledgements of a run in their order only: what is done before an earlier event of its run is confirmed after that.
    #[must_use]
    pub fn exactly_once(mut self, exactly_once: bool) -> Self {
        self.exactly_once = exactly_once;
        self
    }

    /// How long a silent instance keeps what it has taken for a group, 10 to 600 s in whole seconds (60 s). What is held is renewed
    /// every third of it.
    #[must_use]
    pub fn ack_deadline(mut self, deadline: Duration) -> Self {
        self.ack_deadline = deadline;
        self
    }

    /// How many streams pull for each subscription, 1 to 64 (1). With more, the order of a run holds where the service keeps a key to
    /// one stream; the emulator does not.
    #[must_use]
    pub fn streams(mut self, streams: usize) -> Self {
        self.streams = streams;
        self
    }

    /// How long what was sent ahead for a group waits to be asked for before it goes back for others (1 s).
    #[must_use]
    pub fn linger(mut self, time: Duration) -> Self {
        self.linger = time;
        self
    }

    /// The most bytes of encoded data plus metadata per event (9 MB). With everything around it a message takes 10 MB at most.
    #[must_use]
    pub fn max_payload(mut self, bytes: usize) -> Self {
        self.max_payload = bytes;
        self
    }

    /// How long a publish may take, retries included, before it fails (10 s).
    #[must_use]
    pub fn publish_timeout(mut self, timeout: Duration) -> Self {
        self.publish_timeout = timeout;
        self
    }

    /// How long one call of the service may take, and connecting (10 s).
    #[must_use]
    pub fn command_timeout(mut self, timeout: Duration) -> Self {
        self.command_timeout = timeout;
        self
    }

    /// How often a connection is asked whether it is alive (30 s). One that does not answer within 10 s is made again.
    #[must_use]
    pub fn keep_alive(mut self, interval: Duration) -> Self {
        self.keep_alive = interval;
        self
    }

    /// The most events of one request, 1 to 1,000 (1,000).
    #[must_use]
    pub fn batch_events(mut self, events: usize) -> Self {
        self.batch_events = events;
        self
    }

    /// The most bytes of one request, beyond its first event (1 MiB).
    #[must_use]
    pub fn batch_bytes(mut self, bytes: usize) -> Self {
        self.batch_bytes = bytes;
        self
    }

    /// How long a request waits for more events (not at all: what comes while one is under way goes together in the next).
    #[must_use]
    pub fn batch_delay(mut self, delay: Duration) -> Self {
        self.batch_delay = delay;
        self
    }

    /// How many events may be on their way at a time (10,000). Beyond, publishers wait, and fail with `Full` after their time-out.
    #[must_use]
    pub fn max_outstanding_events(mut self, events: usize) -> Self {
        self.max_outstanding_events = events;
        self
    }

    /// How many bytes may be on their way at a time (64 MiB), likewise.
    #[must_use]
    pub fn max_outstanding_bytes(mut self, bytes: usize) -> Self {
        self.max_outstanding_bytes = bytes;
        self
    }

    /// After how long the service forgets a private subscription that nobody has used, of an instance that died (1 day, the least).
    #[must_use]
    pub fn private_ttl(mut self, ttl: Duration) -> Self {
        self.private_ttl = ttl;
        self
    }

    /// How long the service keeps for a fan-out subscription what its instance does not take (1 hour; 10 minutes to 31 days).
    #[must_use]
    pub fn private_retention(mut self, time: Duration) -> Self {
        self.private_retention = time;
        self
    }

    /// How long topics that are made here keep messages for subscriptions to come (not at all; 10 minutes to 31 days). With it,
    /// [`Start::Earliest`](pubsub_core::Start::Earliest) is allowed.
    #[must_use]
    pub fn topic_retention(mut self, time: Option<Duration>) -> Self {
        self.topic_retention = time;
        self
    }

    /// From which time on subscriptions that are made here get what their topic retains (from when they are made on).
    #[must_use]
    pub fn start_time(mut self, time: Option<SystemTime>) -> Self {
        self.start_time = time;
        self
    }

    /// After how many deliveries the service itself sends a group's message to the dead-letter topic of whoever made the group, 5 to
    /// 100 (never). Then it counts deliveries, so that crashes count as attempts.
    #[must_use]
    pub fn service_dead_letters(mut self, deliveries: Option<u32>) -> Self {
        self.service_dead_letters = deliveries;
        self
    }

    /// By how much this machine's clock and the service's may differ (10 ms). A further local listener of a topic waits twice as long,
    /// and then gets exactly what was published after that.
    #[must_use]
    pub fn clock_uncertainty(mut self, uncertainty: Duration) -> Self {
        self.clock_uncertainty = uncertainty;
        self
    }

    /// Whether subscriptions that are gone after the connection broke are made anew: a restarted emulator has forgotten them (true for
    /// an `http://` endpoint, else false). Else, and if the connection did not break, they were deleted, which ends what reads them.
    #[must_use]
    pub fn restore(mut self, restore: bool) -> Self {
        self.restore = Some(restore);
        self
    }

    /// How long publishing to a topic that was gone, and was made anew, waits for the subscriptions of others to come back (2 s). Those come
    /// back within a second, and `command_timeout` where the server that starts again accepts connections before it answers.
    #[must_use]
    pub fn restore_grace(mut self, grace: Duration) -> Self {
        self.restore_grace = grace;
        self
    }

    /// Connects.
    ///
    /// Dropping the future leaves nothing connected.
    ///
    /// # Errors
    /// `InvalidOption` naming the option, `Denied` if there are no credentials, `Unavailable` if the service cannot be reached within
    /// `command_timeout`.
    pub async fn connect(self) -> Result<GoogleCloudPubSub> {
        self.connect_to(std::env::var(EMULATOR).ok()).await.map_err(|error| error.during("connect"))
    }

    async fn connect_to(mut self, emulator: Option<String>) -> Result<GoogleCloudPubSub> {
        let url = self.url(emulator);
        self.validate(&url)?;
        let is_plain = url.starts_with("http:");
        self.restore.get_or_insert(is_plain);
        if is_plain {
            self.identity = Identity::Anonymous;
        }
        let credentials = self.identity.credentials()?;
        let address = Address { url, credentials, project: self.project.clone(), keep_alive: self.keep_alive };
        Node::connect(address, self).await.map(GoogleCloudPubSub::on)
    }

    fn url(&self, emulator: Option<String>) -> String {
        match (&self.endpoint, emulator.filter(|host| !host.is_empty())) {
            (Some(url), _) => url.clone(),
            (None, Some(host)) if host.contains("://") => host,
            (None, Some(host)) => format!("http://{host}"),
            (None, None) => SERVICE.into(),
        }
    }

    pub(crate) fn restores(&self) -> bool {
        self.restore.unwrap_or(false)
    }

    fn validate(&self, url: &str) -> Result<()> {
        let bad = |option: &'static str, why: String| Err(Error::invalid_option(option, why));
        let is_id = |c: char| c.is_ascii_alphanumeric() || "-.:_".contains(c);
        if !(1..=64).contains(&self.project.len()) || !self.project.chars().all(is_id) {
            return bad("project", "is no project id".into());
        }
        let authority = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        if authority.is_none_or(|authority| authority.is_empty() || authority.contains(['@', '?', '#'])) {
            return bad("endpoint", "is written `https://host[:port]`, or `http://host:port` for an emulator".into());
        }
        let is_name = |name: &String| pubsub_core::Topic::new(name).is_ok();
        for (option, names) in [("shared_topics", &self.shared_topics), ("plain_groups", &self.plain_groups)] {
            if !names.iter().all(is_name) {
                return bad(option, "has a name that is no topic".into());
            }
        }
        if self.shared_topics.iter().any(|family| family.len() > 80) {
            return bad("shared_topics", "has a name longer than 80 bytes".into());
        }
        for (option, value, most) in [
            ("streams", self.streams, 64),
            ("max_payload", self.max_payload, LARGEST),
            ("batch_events", self.batch_events, LARGEST_BATCH),
            ("batch_bytes", self.batch_bytes, LARGEST),
            ("max_outstanding_events", self.max_outstanding_events, 1 << 20),
            ("max_outstanding_bytes", self.max_outstanding_bytes, 4 << 30),
        ] {
            if !(1..=most).contains(&value) {
                return bad(option, format!("is {value}; it must be from 1 to {most}"));
            }
        }
        if self.ack_deadline.subsec_nanos() != 0 || !DEADLINES.contains(&self.ack_deadline.as_secs()) {
            return bad("ack_deadline", "must be from 10 to 600 whole seconds".into());
        }
        let (zero, millisecond) = (Duration::ZERO, Duration::from_millis(1));
        for (option, value, least, most) in [
            ("linger", Some(self.linger), millisecond, self.ack_deadline / 3),
            ("publish_timeout", Some(self.publish_timeout), millisecond, TEN_YEARS),
            ("command_timeout", Some(self.command_timeout), 10 * millisecond, TEN_YEARS),
            ("keep_alive", Some(self.keep_alive), 1000 * millisecond, Duration::from_secs(3600)),
            ("batch_delay", Some(self.batch_delay), zero, Duration::from_secs(60)),
            ("private_ttl", Some(self.private_ttl), SHORTEST_TTL, TEN_YEARS),
            ("private_retention", Some(self.private_retention), SHORTEST_RETENTION, LONGEST_RETENTION),
            ("topic_retention", self.topic_retention, SHORTEST_RETENTION, LONGEST_RETENTION),
            ("clock_uncertainty", Some(self.clock_uncertainty), zero, Duration::from_secs(60)),
            ("restore_grace", Some(self.restore_grace), zero, Duration::from_secs(60)),
        ] {
            if value.is_some_and(|value| value < least || value > most) {
                return bad(option, format!("must be from {least:?} to {most:?}"));
            }
        }
        if self.start_time.is_some_and(|time| time < SystemTime::UNIX_EPOCH) {
            return bad("start_time", "is before 1970".into());
        }
        if self.service_dead_letters.is_some_and(|deliveries| !DELIVERIES.contains(&deliveries)) {
            return bad("service_dead_letters", "must be from 5 to 100 deliveries".into());
        }
        Ok(())
    }
}

impl Identity {
    fn credentials(&self) -> Result<Credentials> {
        let denied = |error: gcloud_sdk::google_cloud_auth::build_errors::Error| {
            Error::new(ErrorKind::Denied).on("credentials").caused_by(error)
        };
        match self {
            Self::Anonymous => Ok(credentials::anonymous::Builder::new().build()),
            Self::Given(given) => Ok(given.clone()),
            Self::Default => {
                credentials::Builder::default().with_scopes(GCP_DEFAULT_SCOPES.iter().cloned()).build().map_err(denied)
            }
            Self::KeyFile(path) => {
                // What the file says appears in no error.
                let refuse = |why: &'static str| Error::invalid_option("credentials_file", why);
                let text = std::fs::read(path).map_err(|error| refuse("cannot be read").caused_by(error))?;
                let key = serde_json::from_slice(&text).map_err(|_| refuse("is not JSON"))?;
                let scopes = AccessSpecifier::from_scopes(GCP_DEFAULT_SCOPES.iter().cloned());
                credentials::service_account::Builder::new(key)
                    .with_access_specifier(scopes)
                    .build()
                    .map_err(|_| refuse("holds no key of a service account"))
            }
        }
    }
}

impl fmt::Debug for GcpBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GcpBuilder")
            .field("project", &self.project)
            .field("endpoint", &self.endpoint)
            .field("ordering", &self.ordering)
            .field("exactly_once", &self.exactly_once)
            .field("ack_deadline", &self.ack_deadline)
            .field("streams", &self.streams)
            .field("max_payload", &self.max_payload)
            .field("publish_timeout", &self.publish_timeout)
            .field("command_timeout", &self.command_timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder() -> GcpBuilder {
        GcpBuilder::new("my-project".into())
    }

    #[test]
    fn each_refusal_names_its_option() {
        let (second, day) = (Duration::from_secs(1), Duration::from_secs(24 * 3600));
        for (refused, named) in [
            (GcpBuilder::new("a/b".into()), "project"),
            (builder().endpoint("pubsub.example"), "endpoint"),
            (builder().endpoint("http://user:secret@host"), "endpoint"),
            (builder().shared_topics([""]), "shared_topics"),
            (builder().shared_topics(["x".repeat(81)]), "shared_topics"),
            (builder().plain_groups(["\n"]), "plain_groups"),
            (builder().streams(0), "streams"),
            (builder().max_payload(10_000_000), "max_payload"),
            (builder().batch_events(1001), "batch_events"),
            (builder().batch_bytes(0), "batch_bytes"),
            (builder().max_outstanding_events(0), "max_outstanding_events"),
            (builder().max_outstanding_bytes(0), "max_outstanding_bytes"),
            (builder().ack_deadline(9 * second), "ack_deadline"),
            (builder().ack_deadline(Duration::from_millis(10_500)), "ack_deadline"),
            (builder().linger(21 * second), "linger"),
            (builder().publish_timeout(Duration::ZERO), "publish_timeout"),
            (builder().command_timeout(Duration::MAX), "command_timeout"),
            (builder().keep_alive(Duration::ZERO), "keep_alive"),
            (builder().batch_delay(61 * second), "batch_delay"),
            (builder().private_ttl(second), "private_ttl"),
            (builder().private_retention(second), "private_retention"),
            (builder().topic_retention(Some(32 * day)), "topic_retention"),
            (builder().clock_uncertainty(61 * second), "clock_uncertainty"),
            (builder().restore_grace(61 * second), "restore_grace"),
            (builder().start_time(Some(SystemTime::UNIX_EPOCH - second)), "start_time"),
            (builder().service_dead_letters(Some(4)), "service_dead_letters"),
        ] {
            let url = refused.url(None);
            let error = refused.validate(&url).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == named), "{named}: {error}");
            assert!(!format!("{error:?}").contains("secret"));
        }
        assert!(builder().validate(SERVICE).is_ok());
    }

    #[test]
    fn an_endpoint_of_ones_own_comes_before_the_emulator_and_that_before_the_service() {
        assert_eq!(builder().url(None), SERVICE);
        assert_eq!(builder().url(Some(String::new())), SERVICE);
        assert_eq!(builder().url(Some("localhost:8085".into())), "http://localhost:8085");
        assert_eq!(builder().url(Some("http://localhost:1".into())), "http://localhost:1");
        assert_eq!(builder().endpoint("http://other:1").url(Some("localhost:8085".into())), "http://other:1");
    }

    #[tokio::test]
    async fn a_bad_key_file_is_told_without_what_it_says() {
        let path = std::env::temp_dir().join(format!("pubsub-gcp-key-{}", std::process::id()));
        for (text, why) in [("secret", "is not JSON"), (r#"{"private_key":"secret"}"#, "holds no key")] {
            std::fs::write(&path, text).unwrap();
            let connecting = builder().endpoint(SERVICE).credentials_file(&path).connect_to(None);
            let error = connecting.await.expect_err("no key");
            let told = format!("{error} {error:?}");
            assert!(told.contains(why) && !told.contains("secret"), "{told}");
        }
        std::fs::remove_file(&path).unwrap();
        let error = builder().credentials_file(&path).connect_to(None).await.expect_err("no file");
        assert!(error.to_string().contains("cannot be read"), "{error}");
        let shown = format!("{:?}", builder().credentials_file("/secret"));
        assert!(!shown.contains("secret"));
    }
}
