//! The backends of this workspace as harnesses.

mod cached;
mod emitter;
pub mod gcp;
mod memory_store;
mod proxy;
pub mod redis;
mod slow_remote;
mod unix;

use std::sync::Arc;

pub use cached::CachedHarness;
pub use emitter::EmitterHarness;
pub use gcp::GcpHarness;
pub use memory_store::MemoryStoreHarness;
pub use redis::RedisHarness;
pub use slow_remote::SlowRemoteHarness;
pub use unix::{UnixHarness, is_other_unix_process, other_unix_process};

use crate::Harness;
use crate::stores::StoreHarness;

/// What chance decides on the slow remote follows from this.
const SEED: u64 = 0x510;

/// All of them.
pub fn all() -> Vec<Arc<dyn Harness>> {
    let backends: [Arc<dyn Harness>; 6] = [
        Arc::new(EmitterHarness::plain()),
        Arc::new(EmitterHarness::strict()),
        Arc::new(SlowRemoteHarness::new(SEED)),
        Arc::new(UnixHarness::new()),
        Arc::new(RedisHarness::default()),
        Arc::new(GcpHarness::default()),
    ];
    // Over Google Cloud the decorator has a history that groups do not start from: what the suite asks of both is not told apart yet.
    let cached = backends.iter().filter(|harness| harness.name() != "gcp");
    let cached: Vec<_> = cached.map(|harness| Arc::new(CachedHarness::over(harness.clone())) as _).collect();
    backends.into_iter().chain(cached).collect()
}

/// All stores.
pub fn stores() -> Vec<Arc<dyn StoreHarness>> {
    vec![Arc::new(MemoryStoreHarness::default())]
}
