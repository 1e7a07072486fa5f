//! The backends of this workspace as harnesses.

mod emitter;

use std::sync::Arc;

pub use emitter::EmitterHarness;

use crate::Harness;

/// All of them.
pub fn all() -> Vec<Arc<dyn Harness>> {
    vec![Arc::new(EmitterHarness::plain()), Arc::new(EmitterHarness::strict())]
}
