//! The stores of this workspace, held to every property of stores.

use std::process::ExitCode;

fn main() -> ExitCode {
    pubsub_conformance::stores::main(pubsub_conformance::harnesses::stores())
}
