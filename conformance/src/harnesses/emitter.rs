//! The in-process bus as a harness: as it is by default, and with strict payloads.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use pubsub_core::{Capabilities, PubSub, Reach, Result, Topic};
use pubsub_emitter::{EventEmitterPubSub, MAX_INLINE_DEPTH};

use crate::{Harness, Inline, InlineHandler};

/// The in-process bus.
#[derive(Debug)]
pub struct EmitterHarness {
    strict: bool,
    bus: OnceLock<EventEmitterPubSub>,
}

impl EmitterHarness {
    /// With all defaults: `memory`.
    pub fn plain() -> Self {
        Self { strict: false, bus: OnceLock::new() }
    }

    /// With payloads encoded and checked: `memory-strict`.
    pub fn strict() -> Self {
        Self { strict: true, bus: OnceLock::new() }
    }

    /// The bus itself, made when first asked for.
    ///
    /// # Errors
    /// What its builder refuses.
    pub fn bus(&self) -> Result<&EventEmitterPubSub> {
        if let Some(bus) = self.bus.get() {
            return Ok(bus);
        }
        let bus = EventEmitterPubSub::builder().strict_payloads(self.strict).build()?;
        Ok(self.bus.get_or_init(|| bus))
    }
}

#[async_trait]
impl Harness for EmitterHarness {
    fn name(&self) -> &str {
        if self.strict { "memory-strict" } else { "memory" }
    }

    fn declared(&self) -> Capabilities {
        let mut declared = Capabilities::in_process();
        declared.dead_letter_history = true;
        declared.leases = Some(Reach::Process);
        declared.strict_payloads = self.strict;
        declared
    }

    async fn fresh(&self) -> Result<Arc<dyn Harness>> {
        Ok(Arc::new(Self { strict: self.strict, bus: OnceLock::new() }))
    }

    async fn connect(&self) -> Result<Arc<dyn PubSub>> {
        Ok(Arc::new(self.bus()?.connect()))
    }

    fn inline(&self) -> Option<&dyn Inline> {
        Some(self)
    }
}

impl Inline for EmitterHarness {
    fn subscribe(&self, topic: &Topic, handler: InlineHandler) -> Result<Box<dyn Any + Send>> {
        Ok(Box::new(self.bus()?.subscribe_inline(topic, handler)?))
    }

    fn max_depth(&self) -> usize {
        MAX_INLINE_DEPTH
    }
}
