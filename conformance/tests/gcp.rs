//! The bus over Google Cloud Pub/Sub, held to every property on Google's own emulator, and the replay decorator over it.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::{CachedHarness, GcpHarness, is_other_process, other_process};

fn main() -> ExitCode {
    if is_other_process() {
        return other_process();
    }
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(
        Some(&expectations),
        [Arc::new(GcpHarness::default()) as _, Arc::new(CachedHarness::over(Arc::new(GcpHarness::default()))) as _],
    )
}
