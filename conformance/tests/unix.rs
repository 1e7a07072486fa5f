//! The bus on a Unix socket, held to every property.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::{UnixHarness, is_other_process, other_process};

fn main() -> ExitCode {
    if is_other_process() {
        return other_process();
    }
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(Some(&expectations), [Arc::new(UnixHarness::new()) as _])
}
