//! The bus over Redis Streams, held to every property on a real server.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::{RedisHarness, redis};

fn main() -> ExitCode {
    if redis::is_other_process() {
        return redis::other_process();
    }
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(Some(&expectations), [Arc::new(RedisHarness::default()) as _])
}
