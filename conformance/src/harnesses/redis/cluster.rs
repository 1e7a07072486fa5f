//! The bus over a cluster of three masters as a harness: `redis-cluster`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use pubsub_core::{Capabilities, PubSub, Result};

use super::server::Server;
use super::{RedisHarness, builder, failed};
use crate::{Harness, Timing};

const MASTERS: usize = 3;

/// The bus over a cluster, which all that are made of the first share. Topics lie on any of its nodes.
#[derive(Default)]
pub struct RedisClusterHarness {
    nodes: Arc<OnceLock<Vec<Server>>>,
    number: u64,
}

impl RedisClusterHarness {
    fn url(&self) -> Result<String> {
        if self.nodes.get().is_none() {
            let nodes = Server::start_cluster(MASTERS).map_err(failed)?;
            let _ = self.nodes.set(nodes); // another property may have been faster
        }
        Ok(format!("redis-cluster://{}", self.nodes.get().expect("they are set")[0].address))
    }
}

#[async_trait]
impl Harness for RedisClusterHarness {
    fn name(&self) -> &str {
        "redis-cluster"
    }

    fn unavailable(&self) -> Option<String> {
        RedisHarness::default().unavailable()
    }

    fn declared(&self) -> Capabilities {
        RedisHarness::default().declared()
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Ok(Arc::new(Self { nodes: self.nodes.clone(), number: NEXT.fetch_add(1, Ordering::Relaxed) }))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(builder(&self.url()?, &format!("bus{}", self.number))?.connect().await?))
    }

    fn timing(&self) -> Timing {
        RedisHarness::default().timing()
    }

    fn confirms(&self) -> bool {
        true
    }
}
