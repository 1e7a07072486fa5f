//! `unix:PATH`.

use std::future::Future;

use pubsub_core::{Bus, Error, Result};
use pubsub_unix::UnixSocketPubSub;

use crate::BusUrl;

pub(crate) fn unix(url: &mut BusUrl) -> Result<impl Future<Output = Result<Bus>> + use<>> {
    if url.authority().is_some_and(|authority| !authority.host().is_empty()) {
        return Err(Error::invalid_option("url", "`unix:` has no host: write `unix:PATH`"));
    }
    if url.path().is_empty() {
        return Err(Error::invalid_option("url", "`unix:` needs the path of a socket: write `unix:PATH`"));
    }
    let mut builder = UnixSocketPubSub::builder(url.path());
    if let Some(timeout) = url.duration("publish_timeout")? {
        builder = builder.publish_timeout(timeout);
    }
    if let Some(bytes) = url.size("max_payload")? {
        builder = builder.max_payload(bytes);
    }
    if let Some(events) = url.number("max_events")? {
        builder = builder.max_events(events);
    }
    if let Some(bytes) = url.size("max_bytes")? {
        builder = builder.max_bytes(bytes as u64);
    }
    if let Some(grace) = url.duration("grace")? {
        builder = builder.grace(grace);
    }
    if let Some(timeout) = url.duration("hang_timeout")? {
        builder = builder.hang_timeout(timeout);
    }
    if let Some(bytes) = url.size("max_peer_bytes")? {
        builder = builder.max_peer_bytes(bytes);
    }
    if let Some(sync) = url.flag("sync")? {
        builder = builder.sync(sync);
    }
    if let Some(native_only) = url.flag("native_only")? {
        builder = builder.native_only(native_only);
    }
    if let Some(envelopes) = url.flag("envelopes")? {
        builder = builder.envelopes(envelopes);
    }
    if let Some(users) = url.text("allow_users") {
        builder = builder.allow_users(users.split(','));
    }
    if let Some(groups) = url.text("allow_groups") {
        builder = builder.allow_groups(groups.split(','));
    }
    if let Some(owner) = url.text("owner") {
        builder = builder.owner(owner);
    }
    Ok(async move { builder.connect().await.map(Bus::from) })
}
