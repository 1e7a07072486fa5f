//! The bus over Redis Streams, held to every property on a real server, and on a cluster.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::{RedisClusterHarness, RedisHarness, is_other_process, other_process};

fn main() -> ExitCode {
    if is_other_process() {
        return other_process();
    }
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    let (server, cluster) = (Arc::new(RedisHarness::default()), Arc::new(RedisClusterHarness::default()));
    pubsub_conformance::main(Some(&expectations), [server as _, cluster as _])
}
