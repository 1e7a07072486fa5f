//! The imitation of a slow remote server, held to every property.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::SlowRemoteHarness;

fn main() -> ExitCode {
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(Some(&expectations), [Arc::new(SlowRemoteHarness::new(0x510)) as _])
}
