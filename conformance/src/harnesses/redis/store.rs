//! The store on a Redis server as a harness: `store-redis`.

use std::sync::Arc;

use async_trait::async_trait;
use pubsub_cache::ServerCache;
use pubsub_core::Result;
use pubsub_redis::RedisServerCache;

use super::{RedisHarness, failed};
use crate::Harness;
use crate::stores::StoreHarness;

/// The store on a Redis server, with all defaults. Servers are started as for [`RedisHarness`].
#[derive(Default)]
pub struct RedisStoreHarness(RedisHarness);

#[async_trait]
impl StoreHarness for RedisStoreHarness {
    fn name(&self) -> &str {
        "store-redis"
    }

    fn unavailable(&self) -> Option<String> {
        self.0.unavailable()
    }

    async fn fresh(&self) -> Result<Arc<dyn StoreHarness>> {
        Ok(Arc::new(Self(self.0.another())))
    }

    async fn connect(&self) -> Result<Arc<dyn ServerCache>> {
        let prefix = format!("cache{}", self.0.number.unwrap_or(0));
        Ok(Arc::new(RedisServerCache::from_url(&self.0.url()?)?.prefix(prefix).connect().await?))
    }

    fn restarts(&self) -> bool {
        true
    }

    async fn restart(&self) -> Result<()> {
        self.0.running()?.server.restart().map_err(failed)
    }
}
