//! Holds the backend to the contract: under `cargo test`, each property is a test of its own.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use own_backend::TinyBus;
use pubsub_conformance::single_instance;
use pubsub_core::Capabilities;

fn main() -> ExitCode {
    let tiny = single_instance("tiny", Capabilities::in_process(), || TinyBus::new(Duration::from_secs(5)));
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")); // what came of each property is kept in `tiny.txt`
    pubsub_conformance::main(Some(expectations), [tiny])
}
