//! A bus with the replay decorator over it, and the store of `memory`.

use std::future::Future;
use std::sync::Arc;

use futures::future::BoxFuture;
use pubsub_cache::{CachingPubSub, InMemoryServerCache, OnStoreFailure, ServerCache};
use pubsub_core::{Bus, Error, Result};

use crate::BusUrl;

/// What makes a store of a URL, as what makes a bus does: first what it takes out of the URL, then what connects.
pub(crate) type StoreFactory =
    Arc<dyn Fn(&mut BusUrl) -> Result<BoxFuture<'static, Result<Arc<dyn ServerCache>>>> + Send + Sync>;

/// The decorator's own options, from the URL of the bus.
pub(crate) struct Options {
    on_store_failure: Option<OnStoreFailure>,
    store_timeout: Option<std::time::Duration>,
}

impl Options {
    pub(crate) fn take(url: &mut BusUrl) -> Result<Self> {
        let on_store_failure = url.read("on_store_failure", "`continue` or `fail`", |value| match value {
            "continue" => Some(OnStoreFailure::Continue),
            "fail" => Some(OnStoreFailure::Fail),
            _ => None,
        })?;
        Ok(Self { on_store_failure, store_timeout: url.duration("store_timeout")? })
    }

    pub(crate) fn decorate(self, bus: &Bus, store: Arc<dyn ServerCache>) -> Result<Bus> {
        let mut builder = CachingPubSub::builder(bus.backend().clone(), store);
        if let Some(then) = self.on_store_failure {
            builder = builder.on_store_failure(then);
        }
        if let Some(timeout) = self.store_timeout {
            builder = builder.store_timeout(timeout);
        }
        builder.build().map(Bus::from)
    }
}

/// The URL of a store, as `replay` gives it: `memory` is short for `memory:`, and for the store of the bus's own name, if that is a
/// named one within the process.
pub(crate) fn store_url(text: &str, bus: &BusUrl) -> Result<BusUrl> {
    let named = bus.scheme() == "memory" && !bus.path().is_empty();
    let (scheme, rest) = text.split_once(['?', ':']).map_or((text, ""), |(scheme, _)| (scheme, &text[scheme.len()..]));
    let url: BusUrl = match rest.strip_prefix(':') {
        Some(_) => text.parse()?,
        None => format!("{scheme}:{rest}").parse()?,
    };
    Ok(if named && url.scheme() == "memory" && url.path().is_empty() { url.with_path(bus.path()) } else { url })
}

pub(crate) fn memory(url: &mut BusUrl) -> Result<impl Future<Output = Result<Arc<dyn ServerCache>>> + use<>> {
    if url.authority().is_some() {
        return Err(Error::invalid_option("replay", "`memory:` has no host: write `memory` or `memory:NAME`"));
    }
    let mut builder = InMemoryServerCache::builder();
    if !url.path().is_empty() {
        builder = builder.name(url.path());
    }
    if let Some(events) = url.number("max_events")? {
        builder = builder.max_events(events);
    }
    if let Some(bytes) = url.size("max_bytes")? {
        builder = builder.max_bytes(bytes);
    }
    if let Some(age) = url.duration("max_age")? {
        builder = builder.max_age(age);
    }
    if let Some(topics) = url.number("max_topics")? {
        builder = builder.max_topics(topics);
    }
    if let Some(values) = url.number("max_values")? {
        builder = builder.max_values(values);
    }
    if let Some(events) = url.number("window")? {
        builder = builder.window(events);
    }
    Ok(async move { builder.build().map(|store| store as _) })
}
