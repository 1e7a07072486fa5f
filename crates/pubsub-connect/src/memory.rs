//! `memory:` and `memory:NAME`.

use std::future::Future;

use pubsub_core::{Bus, Error, Result};
use pubsub_emitter::EventEmitterPubSub;

use crate::BusUrl;

pub(crate) fn memory(url: &mut BusUrl) -> Result<impl Future<Output = Result<Bus>> + use<>> {
    if url.authority().is_some() {
        return Err(Error::invalid_option("url", "`memory:` has no host: write `memory:NAME`"));
    }
    let mut builder = EventEmitterPubSub::builder();
    if !url.path().is_empty() {
        builder = builder.name(url.path());
    }
    if let Some(timeout) = url.duration("publish_timeout")? {
        builder = builder.publish_timeout(timeout);
    }
    if let Some(strict) = url.flag("strict_payloads")? {
        builder = builder.strict_payloads(strict);
    }
    if let Some(bytes) = url.size("max_payload")? {
        builder = builder.max_payload(bytes);
    }
    if let Some(letters) = url.number("dead_letter_retention")? {
        builder = builder.dead_letter_retention(letters);
    }
    Ok(async move { builder.build().map(Bus::from) })
}
