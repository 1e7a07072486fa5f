//! The replay decorator over another harness's bus, with a store that all instances share.

use std::sync::Arc;

use async_trait::async_trait;
use pubsub_cache::{CachingPubSub, InMemoryServerCache};
use pubsub_core::{Capabilities, Deduplication, PubSub, Result, Retention};

use crate::{Faults, Harness, Inline, Probe, Processes, Raw, Timing};

/// How far back the store of this harness recognises a repeat.
const WINDOW: usize = 1000;

/// Another harness's bus, with the replay decorator over each instance: `cache-` and the other's name.
pub struct CachedHarness {
    name: String,
    inner: Arc<dyn Harness>,
    store: Arc<InMemoryServerCache>,
}

impl CachedHarness {
    /// The decorator over each instance of a harness.
    pub fn over(inner: Arc<dyn Harness>) -> Self {
        Self { name: format!("cache-{}", inner.name()), inner, store: Arc::default() }
    }
}

#[async_trait]
impl Harness for CachedHarness {
    fn name(&self) -> &str {
        &self.name
    }

    fn unavailable(&self) -> Option<String> {
        self.inner.unavailable()
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
        Ok(Arc::new(Self::over(self.inner.fresh().await?)))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(CachingPubSub::new(self.inner.connect().await?, self.store.clone())))
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
        self.inner.inline()
    }
}
