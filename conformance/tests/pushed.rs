//! Pushes out and in, joined: held to the properties of groups and of settlement.

use std::process::ExitCode;
use std::sync::Arc;

use pubsub_conformance::harnesses::{EmitterHarness, PushedHarness, SlowRemoteHarness};
use pubsub_conformance::main_of;

fn main() -> ExitCode {
    let emitter = PushedHarness::over(Arc::new(EmitterHarness::plain()));
    let slow_remote = PushedHarness::over(Arc::new(SlowRemoteHarness::new(0x8)));
    let of_push = |id: &str| ["GR-", "AK-"].iter().any(|group| id.starts_with(group));
    main_of(|property| of_push(property.id()), [Arc::new(emitter) as _, Arc::new(slow_remote) as _])
}
