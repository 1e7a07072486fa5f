//! Resumable streams.
mod builder;
mod cache;
mod caching;
mod carried;
mod letters;
mod memory;
mod place;
mod sequence;
mod watch;

pub use builder::{CachingBuilder, OnStoreFailure};
pub use cache::{Generation, LogPage, MAX_KEY, ServerCache, check_key, check_ttl};
pub use caching::CachingPubSub;
pub use memory::{InMemoryBuilder, InMemoryServerCache};
