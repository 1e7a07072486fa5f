//! The bus over Google Cloud Pub/Sub, held to every property on Google's own emulator.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::{GcpHarness, is_other_process, other_process};

fn main() -> ExitCode {
    if is_other_process() {
        return other_process();
    }
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(Some(&expectations), [Arc::new(GcpHarness::default()) as _])
}
