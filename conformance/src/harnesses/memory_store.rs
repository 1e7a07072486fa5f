//! The store within the process.

use std::sync::Arc;

use async_trait::async_trait;
use pubsub_cache::{InMemoryServerCache, ServerCache};
use pubsub_core::Result;

use crate::stores::StoreHarness;

/// The store within the process, with all defaults: `store-memory`.
#[derive(Debug, Default)]
pub struct MemoryStoreHarness(Arc<InMemoryServerCache>);

#[async_trait]
impl StoreHarness for MemoryStoreHarness {
    fn name(&self) -> &str {
        "store-memory"
    }

    async fn fresh(&self) -> Result<Arc<dyn StoreHarness>> {
        Ok(Arc::new(Self::default()))
    }

    async fn connect(&self) -> Result<Arc<dyn ServerCache>> {
        Ok(self.0.clone())
    }
}
