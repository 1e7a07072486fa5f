//! Pushes out and in, joined: held to the properties of groups and of settlement.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(Some(&expectations), pubsub_conformance::harnesses::pushed())
}
