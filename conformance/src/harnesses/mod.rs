//! The backends of this workspace as harnesses.

mod cached;
mod emitter;
pub mod gcp;
mod guarantees;
pub mod mastra;
mod memory_store;
mod port;
mod process;
mod proxy;
mod pushed;
mod redis;
mod slow_remote;
mod unix;
mod unix_tongues;

use std::sync::Arc;

pub use cached::CachedHarness;
pub use emitter::EmitterHarness;
pub use gcp::GcpHarness;
pub use guarantees::guarantees;
pub use memory_store::MemoryStoreHarness;
pub use process::{is_other_process, other_process};
pub use pushed::PushedHarness;
pub use redis::{RedisClusterHarness, RedisHarness, RedisStoreHarness};
pub use slow_remote::SlowRemoteHarness;
pub use unix::UnixHarness;
pub use unix_tongues::{Tongues, TonguesHarness};

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
    let cached: Vec<_> = backends.iter().map(|harness| Arc::new(CachedHarness::over(harness.clone())) as _).collect();
    let cluster = Arc::new(RedisClusterHarness::default()) as Arc<dyn Harness>;
    let tongues = [Tongues::Lines, Tongues::Mixed, Tongues::Mastra].map(|tongues| Arc::new(TonguesHarness::new(tongues)) as _);
    backends.into_iter().chain([cluster]).chain(tongues).chain(cached).chain(cached_on_redis()).chain(pushed()).collect()
}

/// Pushes over HTTP from the bus within the process, and from the slow remote.
pub fn pushed() -> [Arc<dyn Harness>; 2] {
    let buses: [Arc<dyn Harness>; 2] = [Arc::new(EmitterHarness::plain()), Arc::new(SlowRemoteHarness::new(SEED))];
    buses.map(|bus| Arc::new(PushedHarness::over(bus)) as _)
}

/// The replay decorator with the store on Redis, over the bus within the process and over that on Redis.
pub fn cached_on_redis() -> [Arc<dyn Harness>; 2] {
    let buses: [Arc<dyn Harness>; 2] = [Arc::new(EmitterHarness::plain()), Arc::new(RedisHarness::default())];
    buses.map(|bus| Arc::new(CachedHarness::with(bus, Arc::new(RedisStoreHarness::default()))) as _)
}

/// All stores.
pub fn stores() -> Vec<Arc<dyn StoreHarness>> {
    vec![Arc::new(MemoryStoreHarness::default()), Arc::new(RedisStoreHarness::default())]
}
