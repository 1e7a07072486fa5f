//! The bus on a Unix socket, held to every property.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::{Tongues, TonguesHarness, UnixHarness, is_other_process, other_process};

fn main() -> ExitCode {
    if is_other_process() {
        return other_process();
    }
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    let tongues = [Tongues::Lines, Tongues::Mixed, Tongues::Mastra].map(|tongues| Arc::new(TonguesHarness::new(tongues)) as _);
    pubsub_conformance::main(Some(&expectations), [Arc::new(UnixHarness::new()) as _].into_iter().chain(tongues))
}
