//! The bus on a Unix socket as a harness: instances in this process and in others, and a broker that is made to go.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_core::{
    Capabilities, Deduplication, Durability, Error, ErrorKind, EventId, Groups, PubSub, Reach, Result, Retention,
};
use pubsub_unix::{UnixBuilder, UnixSocketPubSub};

use super::process;
use crate::{Fault, Faults, Harness, Job, Process, Processes, Timing};

/// How long to wait before trying again to end the rule of brokers.
const TRY: Duration = Duration::from_millis(50);

/// The bound on payloads: properties about it are about any bound, and an unoptimised build takes its time for the usual one.
pub(super) const MAX_PAYLOAD: usize = 1 << 20;

/// How instances are configured.
pub(super) fn builder(socket: &Path) -> UnixBuilder {
    UnixSocketPubSub::builder(socket).max_payload(MAX_PAYLOAD)
}

/// The bus at a socket in a directory of its own: `unix`.
pub struct UnixHarness {
    all: Arc<Directories>,
    directory: PathBuf,
    outage: Mutex<Option<File>>,
}

/// What harnesses have made: instances outlive the harness they came from, so the directories go with the last of all.
#[derive(Default)]
struct Directories {
    parent: PathBuf,
    next: AtomicU64,
}

impl Drop for Directories {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.parent);
    }
}

impl UnixHarness {
    /// A bus of its own.
    pub fn new() -> Self {
        let unique = EventId::random().to_string();
        let parent = std::env::temp_dir().join(format!("pubsub-unix-{}", &unique[..8]));
        Self::among(Arc::new(Directories { parent, next: AtomicU64::new(0) }))
    }

    fn among(all: Arc<Directories>) -> Self {
        let directory = all.parent.join(all.next.fetch_add(1, Ordering::Relaxed).to_string());
        Self { all, directory, outage: Mutex::new(None) }
    }

    /// A bus of its own beside this one.
    pub(super) fn another(&self) -> Self {
        Self::among(self.all.clone())
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.join("bus")
    }

    /// Takes the lock of brokers from the one that has it. None if it was the lock of one that was superseded.
    async fn lock(&self) -> io::Result<Option<File>> {
        let path = self.directory.join("bus.lock");
        let mut options = OpenOptions::new();
        let lock = options.read(true).write(true).create(true).truncate(false).open(&path)?;
        // Who waits for a lock gets it before whoever merely tries; but who comes too late to wait has to depose the next one.
        let mut waiting = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock));
        let lock = loop {
            self.depose().map_err(io::Error::other)?;
            if let Ok(locked) = tokio::time::timeout(TRY, &mut waiting).await {
                break locked.map_err(io::Error::other)??;
            }
        };
        let is_current = lock.metadata()?.ino() == fs::metadata(&path)?.ino();
        Ok(is_current.then_some(lock))
    }

    /// Claims an epoch in the broker's place: it stops, and everybody looks for another.
    fn depose(&self) -> Result<()> {
        let register = OpenOptions::new().create(true).append(true).open(self.directory.join("bus.epoch"));
        register.and_then(|mut register| register.write_all(&[b'-'; 32])).map_err(failed)
    }
}

impl Default for UnixHarness {
    fn default() -> Self {
        Self::new()
    }
}

pub(super) fn failed(error: io::Error) -> Error {
    Error::new(ErrorKind::Unavailable).caused_by(error)
}

#[async_trait]
impl Harness for UnixHarness {
    fn name(&self) -> &str {
        "unix"
    }

    fn declared(&self) -> Capabilities {
        let mut declared = Capabilities::in_process();
        declared.reach = Reach::Host;
        declared.durability = Durability::ProcessDeath;
        declared.retention = Retention::History;
        declared.dead_letter_history = true;
        declared.groups = Groups::Durable;
        declared.group_history = true;
        declared.deduplication = Deduplication::Window { events: Some(10_000), age: None };
        declared.indexed = true;
        declared.publish_waits = false;
        declared.max_payload = Some(MAX_PAYLOAD);
        declared.leases = Some(Reach::Host);
        declared
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(self.another()))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(builder(&self.socket()).connect().await?))
    }

    fn timing(&self) -> Timing {
        let mut timing = Timing::in_process().scaled(2.0);
        timing.reclaim = Duration::from_secs(2);
        timing.patience = Duration::from_secs(15);
        timing.limit = Duration::from_secs(30);
        timing
    }

    fn faults(&self) -> Option<&dyn Faults> {
        Some(self)
    }

    fn processes(&self) -> Option<&dyn Processes> {
        Some(self)
    }
}

#[async_trait]
impl Faults for UnixHarness {
    fn can(&self, fault: Fault) -> bool {
        matches!(fault, Fault::Sever | Fault::Restart | Fault::Outage | Fault::Heal)
    }

    async fn inject(&self, fault: Fault) -> Result<()> {
        match fault {
            Fault::Sever | Fault::Restart => self.depose()?,
            Fault::Outage => {
                fs::create_dir_all(&self.directory).map_err(failed)?;
                // Nobody can be elected while somebody else has the lock.
                let lock = loop {
                    if let Some(lock) = self.lock().await.map_err(failed)? {
                        break lock;
                    }
                };
                self.outage.lock().replace(lock);
                while self.socket().exists() {
                    self.depose()?; // should one that has no lock any more still be there
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            Fault::Heal => drop(self.outage.lock().take()),
            _ => return Err(failed(io::Error::other("this cannot be made to happen"))),
        }
        Ok(())
    }
}

#[async_trait]
impl Processes for UnixHarness {
    async fn start(&self, job: Job) -> Result<Box<dyn Process>> {
        process::start("unix", &self.socket().display().to_string(), &job).await
    }
}

/// An instance in another process, by its socket.
pub(super) async fn connect(place: &str) -> Result<Arc<dyn PubSub>> {
    Ok(Arc::new(builder(Path::new(place)).connect().await?))
}
