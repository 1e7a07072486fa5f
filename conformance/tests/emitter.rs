//! The in-process bus, held to every property.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(Some(&expectations), pubsub_conformance::harnesses::all())
}
