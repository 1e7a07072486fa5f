//! The replay decorator over another harness's bus, each instance with a handle of its own on one store.

use std::sync::Arc;

use async_trait::async_trait;
use pubsub_cache::CachingPubSub;
use pubsub_core::{Capabilities, Deduplication, PubSub, Result, Retention};

use super::MemoryStoreHarness;
use crate::stores::StoreHarness;
use crate::{Faults, Harness, Inline, Probe, Processes, Raw, Timing};

/// How far back the stores here recognise a repeat.
const WINDOW: usize = 1000;

/// Another harness's bus, with the replay decorator over each instance: `cache-` and the other's name, and, if it is not the store within
/// the process, `-with-` and the store's.
pub struct CachedHarness {
    name: String,
    inner: Arc<dyn Harness>,
    store: Arc<dyn StoreHarness>,
    /// Whether appending waits for nothing, so that a publish can call handlers within itself.
    at_once: bool,
}

impl CachedHarness {
    /// The decorator over each instance of a harness, with the store within the process.
    pub fn over(inner: Arc<dyn Harness>) -> Self {
        Self { name: format!("cache-{}", inner.name()), inner, store: Arc::new(MemoryStoreHarness::default()), at_once: true }
    }

    /// The decorator over each instance of a harness, each with a connection of its own to this store, which is elsewhere.
    pub fn with(inner: Arc<dyn Harness>, store: Arc<dyn StoreHarness>) -> Self {
        Self { name: format!("cache-{}-with-{}", inner.name(), store.name()), inner, store, at_once: false }
    }
}

#[async_trait]
impl Harness for CachedHarness {
    fn name(&self) -> &str {
        &self.name
    }

    fn unavailable(&self) -> Option<String> {
        self.inner.unavailable().or_else(|| self.store.unavailable())
    }

    fn declared(&self) -> Capabilities {
        let mut declared = self.inner.declared();
        declared.retention = Retention::History;
        declared.indexed = true;
        let hour = std::time::Duration::from_secs(3600);
        declared.deduplication = match declared.deduplication {
            Deduplication::Window { events, age } => Deduplication::Window {
                events: events.map(|events| events.min(WINDOW as u64)).or(Some(WINDOW as u64)),
                age: age.map(|age| age.min(hour)).or(Some(hour)),
            },
            _ => Deduplication::Retained { events: Some(WINDOW as u64), age: Some(hour) },
        };
        declared
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        let (inner, store) = (self.inner.fresh().await?, self.store.fresh().await?);
        Ok(Arc::new(Self { name: self.name.clone(), inner, store, at_once: self.at_once }))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(CachingPubSub::new(self.inner.connect().await?, self.store.connect().await?)))
    }

    fn timing(&self) -> Timing {
        self.inner.timing()
    }

    fn spans_instances(&self) -> bool {
        self.inner.spans_instances()
    }

    fn confirms(&self) -> bool {
        self.inner.confirms()
    }

    fn probe(&self) -> Option<&dyn Probe> {
        self.inner.probe()
    }

    fn faults(&self) -> Option<&dyn Faults> {
        self.inner.faults()
    }

    fn processes(&self) -> Option<&dyn Processes> {
        self.inner.processes()
    }

    fn raw(&self) -> Option<&dyn Raw> {
        self.inner.raw()
    }

    fn inline(&self) -> Option<&dyn Inline> {
        self.inner.inline().filter(|_| self.at_once)
    }
}
