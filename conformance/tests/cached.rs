//! The replay decorator over the other backends, held to every property.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::Harness;
use pubsub_conformance::harnesses::{
    CachedHarness, EmitterHarness, RedisHarness, SlowRemoteHarness, UnixHarness, cached_on_redis, is_other_process,
    other_process,
};

fn main() -> ExitCode {
    if is_other_process() {
        return other_process();
    }
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    let over = |inner: Arc<dyn Harness>| Arc::new(CachedHarness::over(inner)) as Arc<dyn Harness>;
    let backends = [
        over(Arc::new(EmitterHarness::plain())),
        over(Arc::new(EmitterHarness::strict())),
        over(Arc::new(SlowRemoteHarness::new(0xcac))),
        over(Arc::new(UnixHarness::new())),
        over(Arc::new(RedisHarness::default())),
    ];
    pubsub_conformance::main(Some(&expectations), backends.into_iter().chain(cached_on_redis()))
}
