//! The bus over Google Cloud Pub/Sub as a harness, on Google's emulator: `gcp`.
//!
//! All harnesses of a program share one emulator, with a project each. What the emulator cannot tell (what is stored, what is pending)
//! no probe can; and it keeps nothing, so that a restart is no fault to recover from in the suite's sense.

mod emulator;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use pubsub_core::{
    Attempts, Capabilities, Durability, Error, ErrorKind, Groups, LateSettlement, LossNotice, Order, PubSub, Reach, Result,
    Retention, Topic,
};
use pubsub_gcp::{GcpBuilder, GoogleCloudPubSub};

pub use self::emulator::{Emulator, INSTALL, program};
use super::process;
use super::proxy::Proxy;
use crate::{Fault, Faults, Harness, Job, Process, Processes, Raw, Timing};

/// The least that Google allows: after how long what a silent member held goes to others.
const DEADLINE: Duration = Duration::from_secs(10);

/// The most bytes of an event. Google's own limit makes properties about sizes slow and no sharper.
const LARGEST: usize = 1 << 20;

static INSTALLED: LazyLock<bool> = LazyLock::new(|| program().is_some());

/// The emulator of this program, started when it is first asked for.
pub fn shared() -> io::Result<Arc<Emulator>> {
    static EMULATOR: Mutex<Option<Arc<Emulator>>> = Mutex::new(None);
    let mut shared = EMULATOR.lock();
    if let Some(running) = &*shared {
        return Ok(running.clone());
    }
    Ok(shared.insert(Arc::new(Emulator::start()?)).clone())
}

/// The bus over Google Cloud Pub/Sub, in a project of its own on the program's emulator. Those made of the first have a proxy each
/// before it; those made of them share that.
#[derive(Default)]
pub struct GcpHarness {
    running: Arc<OnceLock<Running>>,
    /// Which project it is; none for the first.
    number: Option<u64>,
}

struct Running {
    emulator: Arc<Emulator>,
    proxy: Proxy,
}

fn failed(error: io::Error) -> Error {
    Error::new(ErrorKind::Backend("the emulator of the harness".into())).caused_by(error)
}

/// How instances are configured.
fn builder(url: &str, project: &str) -> GcpBuilder {
    GoogleCloudPubSub::builder(project)
        .endpoint(url)
        .ack_deadline(DEADLINE)
        .linger(Duration::from_millis(300))
        .max_payload(LARGEST)
        .command_timeout(Duration::from_secs(8))
        .keep_alive(Duration::from_secs(3))
        .publish_timeout(Duration::from_secs(8))
        // It is on this machine.
        .clock_uncertainty(Duration::from_millis(1))
}

/// An instance in another process, by the URL and the project of its bus.
pub(super) async fn connect(place: &str) -> Result<Arc<dyn PubSub>> {
    let (url, project) = place.split_once(' ').unwrap_or_default();
    Ok(Arc::new(builder(url, project).connect().await?))
}

impl GcpHarness {
    fn running(&self) -> Result<&Running> {
        if let Some(running) = self.running.get() {
            return Ok(running);
        }
        let emulator = shared().map_err(failed)?;
        let proxy = Proxy::start(emulator.address).map_err(failed)?;
        Ok(self.running.get_or_init(|| Running { emulator, proxy }))
    }

    fn project(&self) -> String {
        format!("bus-{}-{}", std::process::id(), self.number.unwrap_or(0))
    }

    fn url(&self) -> Result<String> {
        Ok(format!("http://{}", self.running()?.proxy.address))
    }
}

#[async_trait]
impl Harness for GcpHarness {
    fn name(&self) -> &str {
        "gcp"
    }

    fn unavailable(&self) -> Option<String> {
        (!*INSTALLED).then(|| format!("needs Google's Pub/Sub emulator, which is not installed: `{INSTALL}`"))
    }

    fn declared(&self) -> Capabilities {
        let mut declared = Capabilities::in_process();
        declared.reach = Reach::Network;
        declared.order = Order::PerKey;
        declared.durability = Durability::Server;
        declared.retention = Retention::Backlog;
        declared.groups = Groups::Durable;
        declared.attempts = Attempts::Instance;
        declared.late_settlement = LateSettlement::Unconfirmed;
        declared.loss_notice = LossNotice::Silent;
        declared.publish_waits = false;
        declared.max_payload = Some(LARGEST);
        declared
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let running = if self.number.is_some() { self.running.clone() } else { Arc::default() };
        Ok(Arc::new(Self { running, number: Some(NEXT.fetch_add(1, Ordering::Relaxed)) }))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(builder(&self.url()?, &self.project()).connect().await?))
    }

    fn timing(&self) -> Timing {
        let mut timing = Timing::in_process().scaled(4.0);
        timing.hold = Duration::from_millis(500);
        timing.reclaim = DEADLINE + Duration::from_secs(2);
        timing.quiet = Duration::from_millis(250);
        // After a connection broke, the emulator keeps what it had sent for forty seconds.
        timing.patience = Duration::from_secs(60);
        timing.limit = Duration::from_secs(90);
        timing
    }

    fn faults(&self) -> Option<&dyn Faults> {
        Some(self)
    }

    fn processes(&self) -> Option<&dyn Processes> {
        Some(self)
    }

    fn raw(&self) -> Option<&dyn Raw> {
        Some(self)
    }
}

#[async_trait]
impl Faults for GcpHarness {
    fn can(&self, fault: Fault) -> bool {
        // Not to cut connections: what the emulator then gave to a stream that is no more, it keeps back. By hand, with gcloud-sdk alone
        // and a deadline of 10 s, nobody got that within 90 s on a subscription with ordering, and after 10 to 70 s on one without.
        matches!(fault, Fault::Outage | Fault::Heal | Fault::Delay(_))
    }

    async fn inject(&self, fault: Fault) -> Result<()> {
        let Running { proxy, .. } = self.running()?;
        match fault {
            Fault::Outage => proxy.weather.send_modify(|weather| weather.out = true),
            Fault::Heal => proxy.weather.send_modify(|weather| (weather.out, weather.delay) = (false, Duration::ZERO)),
            Fault::Delay(delay) => proxy.weather.send_modify(|weather| weather.delay = delay),
            _ => return Err(Error::new(ErrorKind::Backend("a fault that cannot be injected".into()))),
        }
        Ok(())
    }
}

#[async_trait]
impl Raw for GcpHarness {
    async fn inject(&self, topic: &Topic, bytes: &[u8]) -> Result<()> {
        // The suite's topics are called on the service what they are called here.
        let path = format!("v1/projects/{}/topics/{topic}:publish", self.project());
        // Without data it needs an attribute.
        let message = serde_json::json!({"data": STANDARD.encode(bytes), "orderingKey": "run", "attributes": {"raw": "yes"}});
        let body = serde_json::json!({"messages": [message]}).to_string();
        let emulator = self.running()?.emulator.clone();
        let telling = tokio::task::spawn_blocking(move || emulator.ask("POST", &path, &body));
        telling.await.map_err(io::Error::other).flatten().map(drop).map_err(failed)
    }
}

#[async_trait]
impl Processes for GcpHarness {
    async fn start(&self, job: Job) -> Result<Box<dyn Process>> {
        process::start("gcp", &format!("{} {}", self.url()?, self.project()), &job).await
    }
}
