//! The tongue of TypeScript peers, and what translates between it and ours. Nothing here knows a socket or a clock.

pub(crate) mod envelope;
pub(crate) mod guest;
pub(crate) mod host;
pub(crate) mod lines;
mod text;
