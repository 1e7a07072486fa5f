//! The contract of the event bus, made executable.
//!
//! Each [`Property`] is one sentence that holds for every backend that can do what the property needs. A backend takes part
//! by a [`Harness`]: how to make instances of it, and what it is declared to do.
#![cfg_attr(
    feature = "backends",
    doc = r#"
```
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use pubsub_conformance::{Harness, Suite};
use pubsub_core::{Capabilities, PubSub, Reach, Result};
use pubsub_emitter::EventEmitterPubSub;

#[derive(Default)]
struct Mine(OnceLock<EventEmitterPubSub>);

#[async_trait]
impl Harness for Mine {
    fn name(&self) -> &str {
        "mine"
    }

    fn declared(&self) -> Capabilities {
        let mut declared = Capabilities::in_process();
        declared.dead_letter_history = true;
        declared.leases = Some(Reach::Process);
        declared
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(Self::default()))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(self.0.get_or_init(EventEmitterPubSub::new).connect()))
    }
}

let suite = Suite::new(Arc::new(Mine::default())).filter(|property| property.id().starts_with("PS-0"));
let report = suite.run_blocking();
assert_eq!(report.failures().count(), 0, "{report}");
```
"#
)]
//!
//! Stores of the replay decorator have properties of their own, in the module `stores`, with the feature of that name.
//!
//! A test with `harness = false` shows each property to `cargo test`: see [`main`].
//!
//! What makes a verdict worth something: a property that cannot run is reported with its reason and never as a pass; a
//! panic, and a property that does not end in time, fail; what must not arrive is proven by a [fence](Ctx::fence) behind it
//! that must; what was sent and received is judged by the pure functions of [`oracle`].
//!
//! | environment | meaning |
//! | --- | --- |
//! | `CONFORMANCE_STRESS=n` | each property runs `n` times, each time with another seed |
//! | `CONFORMANCE_SEED=n` | the seed of the first round, as a failure tells it |
//! | `PUBSUB_REQUIRE=a,b` | harnesses, by name or part of it, whose server has to be there: without it they fail, where they would be ignored |
//! | `CONFORMANCE_BLESS=1` | expectation files are written instead of compared |

mod ctx;
mod expectation;
mod harness;
#[cfg(feature = "backends")]
pub mod harnesses;
mod mimic;
pub mod oracle;
mod properties;
mod property;
#[cfg(feature = "stores")]
pub mod stores;
mod suite;

pub use ctx::{Consumer, Ctx, exactly, in_sequence, panic_on_purpose};
pub use expectation::Differences;
pub use harness::{
    Fault, Faults, Harness, Inline, InlineHandler, Job, Probe, Process, Processes, Raw, Timing, missing, single_instance,
};
pub use mimic::main;
pub use properties::registry;
pub use property::{Mismatch, Need, Outcome, Property, Verdict, omitted, property};
pub use suite::{PropertyReport, Report, Suite};

/// The type of fences: events that properties publish behind others, to know when those must have arrived.
pub const FENCE: &str = "conformance.fence";
