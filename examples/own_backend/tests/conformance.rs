//! Holds the backend to the contract: under `cargo test`, each property is a test of its own.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use own_backend::TinyBus;
use pubsub_conformance::Harness;
use pubsub_core::{Capabilities, PubSub, Result};

struct Tiny;

#[async_trait]
impl Harness for Tiny {
    fn name(&self) -> &str {
        "tiny" // what came of each property is kept in `tiny.txt`
    }

    fn declared(&self) -> Capabilities {
        Capabilities::in_process()
    }

    fn spans_instances(&self) -> bool {
        false
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(Self))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(TinyBus::new(Duration::from_secs(5))?))
    }
}

fn main() -> ExitCode {
    let expectations = Path::new(env!("CARGO_MANIFEST_DIR"));
    pubsub_conformance::main(Some(expectations), [Arc::new(Tiny) as _])
}
