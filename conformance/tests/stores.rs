//! The stores of this workspace, held to every property of stores.

use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::MemoryStoreHarness;

fn main() -> ExitCode {
    pubsub_conformance::stores::main([Arc::new(MemoryStoreHarness::default()) as _])
}
