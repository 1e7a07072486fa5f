//! The backends of this workspace as harnesses.

mod cached;
mod emitter;
mod memory_store;
mod pushed;
pub mod redis;
mod slow_remote;
mod unix;

use std::sync::Arc;

pub use cached::CachedHarness;
pub use emitter::EmitterHarness;
pub use memory_store::MemoryStoreHarness;
pub use pushed::PushedHarness;
pub use redis::RedisHarness;
pub use slow_remote::SlowRemoteHarness;
pub use unix::{UnixHarness, is_other_unix_process, other_unix_process};

use crate::Harness;
use crate::stores::StoreHarness;

/// What chance decides on the slow remote follows from this.
const SEED: u64 = 0x510;

/// All of them.
pub fn all() -> Vec<Arc<dyn Harness>> {
    let backends: [Arc<dyn Harness>; 5] = [
        Arc::new(EmitterHarness::plain()),
        Arc::new(EmitterHarness::strict()),
        Arc::new(SlowRemoteHarness::new(SEED)),
        Arc::new(UnixHarness::new()),
        Arc::new(RedisHarness::default()),
    ];
    let cached: Vec<_> = backends.iter().map(|harness| Arc::new(CachedHarness::over(harness.clone())) as _).collect();
    backends.into_iter().chain(cached).collect()
}

/// All stores.
pub fn stores() -> Vec<Arc<dyn StoreHarness>> {
    vec![Arc::new(MemoryStoreHarness::default())]
}
