//! The backends of this workspace as harnesses.

mod emitter;
pub mod redis;
mod slow_remote;

use std::sync::Arc;

pub use emitter::EmitterHarness;
pub use redis::RedisHarness;
pub use slow_remote::SlowRemoteHarness;

use crate::Harness;

/// What chance decides on the slow remote follows from this.
const SEED: u64 = 0x510;

/// All of them.
pub fn all() -> Vec<Arc<dyn Harness>> {
    vec![
        Arc::new(EmitterHarness::plain()),
        Arc::new(EmitterHarness::strict()),
        Arc::new(SlowRemoteHarness::new(SEED)),
        Arc::new(RedisHarness::default()),
    ]
}
