//! The in-process bus, held to every property.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::EmitterHarness;

fn main() -> ExitCode {
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations");
    pubsub_conformance::main(
        Some(&expectations),
        [Arc::new(EmitterHarness::plain()) as _, Arc::new(EmitterHarness::strict()) as _],
    )
}
