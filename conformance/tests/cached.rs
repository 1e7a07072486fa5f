//! The replay decorator over the other backends, held to every property.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::{
    CachedHarness, EmitterHarness, RedisHarness, SlowRemoteHarness, UnixHarness, is_other_unix_process, other_unix_process,
    redis,
};

fn main() -> ExitCode {
    if redis::is_other_process() {
        return redis::other_process();
    }
    if is_other_unix_process() {
        return other_unix_process();
    }
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(
        Some(&expectations),
        [
            Arc::new(CachedHarness::over(Arc::new(EmitterHarness::plain()))) as _,
            Arc::new(CachedHarness::over(Arc::new(EmitterHarness::strict()))) as _,
            Arc::new(CachedHarness::over(Arc::new(SlowRemoteHarness::new(0xcac)))) as _,
            Arc::new(CachedHarness::over(Arc::new(UnixHarness::new()))) as _,
            Arc::new(CachedHarness::over(Arc::new(RedisHarness::default()))) as _,
        ],
    )
}
