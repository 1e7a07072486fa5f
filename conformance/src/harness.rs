//! What a backend brings to be tested: a way to make instances, and optional handles on what lies below them.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pubsub_core::{Capabilities, Event, Group, PubSub, Result, Topic};

/// A bus under test.
///
/// [`name`](Self::name), [`declared`](Self::declared), [`timing`](Self::timing) and the presence of handles are asked before
/// any runtime exists, and decide which properties run. Each property then works on a [`fresh`](Self::fresh) harness made
/// in a runtime of its own.
#[async_trait]
pub trait Harness: Send + Sync + 'static {
    /// The name in reports and of the expectation file.
    fn name(&self) -> &str;

    /// What the backend is expected to be able to do, written down independently of what its instances say.
    fn declared(&self) -> Capabilities;

    /// The same kind of harness over another bus: nothing published on one reaches the other.
    ///
    /// # Errors
    /// What the backend reports.
    async fn fresh(&self) -> Result<Arc<dyn Harness>>;

    /// Why nothing of it can run here, such as a server that is not installed. All properties are then ignored with this reason,
    /// unless `PUBSUB_REQUIRE` (names, separated by commas) names the harness: then that is a failure.
    fn unavailable(&self) -> Option<String> {
        None
    }

    /// A new instance on this harness's bus.
    ///
    /// # Errors
    /// What the backend reports.
    async fn connect(&self) -> Result<Arc<dyn PubSub>>;

    /// The durations that suit this backend.
    fn timing(&self) -> Timing {
        Timing::in_process()
    }

    /// Whether instances share the bus. False where there can be but one.
    fn spans_instances(&self) -> bool {
        true
    }

    /// Whether every settlement that reaches the backend is confirmed. False for a backend that answers some with
    /// [`Settled::Unconfirmed`](pubsub_core::Settled::Unconfirmed) although nothing is wrong.
    fn confirms(&self) -> bool {
        true
    }

    /// Why a property does not hold of it although nothing it declares says so. For buses whose other end is not ours to change.
    fn lacks(&self, _property: &str) -> Option<&str> {
        None
    }

    /// What lies below, to be counted.
    fn probe(&self) -> Option<&dyn Probe> {
        None
    }

    /// What can be made to go wrong below.
    fn faults(&self) -> Option<&dyn Faults> {
        None
    }

    /// Other processes on the same bus.
    fn processes(&self) -> Option<&dyn Processes> {
        None
    }

    /// A way past the backend's own encoding.
    fn raw(&self) -> Option<&dyn Raw> {
        None
    }

    /// Inline subscriptions, which the trait every backend implements does not know (clause I1).
    fn inline(&self) -> Option<&dyn Inline> {
        None
    }
}

/// The harness of a bus that has but one instance and nothing below: each bus is a new one by `make`.
pub fn single_instance<B: PubSub>(
    name: impl Into<String>,
    declared: Capabilities,
    make: impl Fn() -> Result<B> + Send + Sync + 'static,
) -> Arc<dyn Harness> {
    let make = move || make().map(|bus| Arc::new(bus) as Arc<dyn PubSub>);
    Arc::new(SingleInstance { name: name.into(), declared, make: Arc::new(make) })
}

#[derive(Clone)]
struct SingleInstance {
    name: String,
    declared: Capabilities,
    make: Arc<dyn Fn() -> Result<Arc<dyn PubSub>> + Send + Sync>,
}

#[async_trait]
impl Harness for SingleInstance {
    fn name(&self) -> &str {
        &self.name
    }

    fn declared(&self) -> Capabilities {
        self.declared.clone()
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(self.clone()))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        (self.make)()
    }

    fn spans_instances(&self) -> bool {
        false
    }
}

/// Durations that suit a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timing {
    /// The first back-off properties ask for.
    pub backoff: Duration,
    /// The shortest `max_hold` that is worth asking for.
    pub hold: Duration,
    /// Within how long a dead member's deliveries go to the rest of its group.
    pub reclaim: Duration,
    /// How long to watch, after a fence, that nothing more happens. Only a second line of defence.
    pub quiet: Duration,
    /// The longest wait for something that must happen.
    pub patience: Duration,
    /// How long one property may take.
    pub limit: Duration,
}

impl Timing {
    /// For a bus within one process: 20 ms back-off, 150 ms hold, 500 ms reclaim, 60 ms quiet, 10 s patience, 20 s limit.
    pub fn in_process() -> Self {
        Self {
            backoff: Duration::from_millis(20),
            hold: Duration::from_millis(150),
            reclaim: Duration::from_millis(500),
            quiet: Duration::from_millis(60),
            patience: Duration::from_secs(10),
            limit: Duration::from_secs(20),
        }
    }

    /// All of them, multiplied: for slower backends and machines.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        Self {
            backoff: self.backoff.mul_f64(factor),
            hold: self.hold.mul_f64(factor),
            reclaim: self.reclaim.mul_f64(factor),
            quiet: self.quiet.mul_f64(factor),
            patience: self.patience.mul_f64(factor),
            limit: self.limit.mul_f64(factor),
        }
    }
}

/// Counts what lies below the instances, by other means than theirs.
#[async_trait]
pub trait Probe: Send + Sync {
    /// How many events are stored for a topic, copies included.
    async fn stored(&self, topic: &Topic) -> Result<u64>;

    /// How many deliveries of a group are unsettled.
    async fn pending(&self, topic: &Topic, group: &Group) -> Result<u64>;

    /// What the bus uses just now, by name: connections, files, server-side objects. Equal again after everything was closed.
    async fn resources(&self) -> Result<BTreeMap<String, u64>>;
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// All connections are cut, once.
    Sever,
    /// The server or broker is killed and started again over what it keeps.
    Restart,
    /// Nothing gets through until [`Fault::Heal`].
    Outage,
    /// Ends an outage or a delay.
    Heal,
    /// Every operation takes longer.
    Delay(Duration),
    /// So many of the next writes fail.
    FailWrites(u32),
    /// So many of the next settlements are carried out and never confirmed.
    LoseConfirmations(u32),
}

/// Makes things go wrong.
#[async_trait]
pub trait Faults: Send + Sync {
    /// Whether it can do this. Numbers and durations in it do not matter.
    fn can(&self, fault: Fault) -> bool;

    /// Does it; in effect when it returns.
    async fn inject(&self, fault: Fault) -> Result<()>;
}

/// What another process does on the bus. In this order it connects, does its job, and reports ready; then it waits to be killed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Job {
    /// Publishes events of the types `0`, `1`, ... one by one.
    Publish {
        /// Where.
        topic: Topic,
        /// How many.
        count: usize,
    },
    /// Joins a group and takes deliveries without settling them.
    Hold {
        /// Where.
        topic: Topic,
        /// As a member of which group.
        group: Group,
        /// How many deliveries to take.
        count: usize,
    },
}

/// Starts other processes on the same bus.
#[async_trait]
pub trait Processes: Send + Sync {
    /// Starts one; it is ready when this returns.
    async fn start(&self, job: Job) -> Result<Box<dyn Process>>;
}

/// Another process. Killed when dropped.
#[async_trait]
pub trait Process: Send {
    /// Kills it, as `kill -9` does; gone when this returns.
    async fn kill(self: Box<Self>) -> Result<()>;
}

/// A handler that is called in the publisher's task.
pub type InlineHandler = Box<dyn Fn(&Arc<Event>) + Send + Sync>;

/// Makes inline subscriptions.
pub trait Inline: Send + Sync {
    /// Subscribes a handler on an instance of this harness's bus. Dropping what is returned unsubscribes.
    fn subscribe(&self, topic: &Topic, handler: InlineHandler) -> Result<Box<dyn Any + Send>>;

    /// How deep handlers may publish to further handlers.
    fn max_depth(&self) -> usize;
}

/// A way past the backend's own encoding.
#[async_trait]
pub trait Raw: Send + Sync {
    /// Puts bytes into a topic as if they were an event.
    async fn inject(&self, topic: &Topic, bytes: &[u8]) -> Result<()>;
}

/// Why nothing of a harness can run although the environment requires it, by `PUBSUB_REQUIRE`.
pub fn missing(harness: &dyn Harness) -> Option<String> {
    missing_server(harness.name(), harness.unavailable())
}

/// `PUBSUB_REQUIRE` names harnesses, or what several of them need and have in their names: `redis` is also about `cache-redis`.
pub(crate) fn missing_server(name: &str, unavailable: Option<String>) -> Option<String> {
    let required = std::env::var("PUBSUB_REQUIRE").unwrap_or_default();
    let is_named = |required: &str| required == name || name.split('-').any(|part| part == required);
    let is_required = required.split(',').any(|required| is_named(required.trim()));
    unavailable.filter(|_| is_required).map(|why| format!("{name} is required, and {why}"))
}
