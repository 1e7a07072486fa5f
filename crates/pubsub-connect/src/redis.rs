//! `redis://[user:password@]host[:port][/database]`, and `rediss:` for TLS.

use std::future::Future;

use pubsub_core::{Bus, Error, Result};
use pubsub_redis::{RedisBuilder, RedisStreamsPubSub};

use crate::BusUrl;

const PORT: u16 = 6379;

pub(crate) fn redis(url: &mut BusUrl) -> Result<impl Future<Output = Result<Bus>> + use<>> {
    let mut builder = server(url)?;
    if let Some(prefix) = url.text("prefix") {
        builder = builder.prefix(prefix);
    }
    if let Some(events) =
        url.read("max_len", "a whole number such as `10000`, or `none`", |text| or_none(text, |text| text.parse().ok()))?
    {
        builder = builder.max_len(events);
    }
    for (option, set) in [("max_age", RedisBuilder::max_age as fn(RedisBuilder, _) -> _), ("idle_ttl", RedisBuilder::idle_ttl)]
    {
        if url.text(option) == Some("none") {
            builder = set(builder, None);
        } else if let Some(duration) = url.duration(option)? {
            builder = set(builder, Some(duration));
        }
    }
    if let Some(bytes) = url.size("max_payload")? {
        builder = builder.max_payload(bytes);
    }
    for (option, set) in [
        ("publish_timeout", RedisBuilder::publish_timeout as fn(RedisBuilder, _) -> _),
        ("command_timeout", RedisBuilder::command_timeout),
        ("reclaim_after", RedisBuilder::reclaim_after),
        ("linger", RedisBuilder::linger),
    ] {
        if let Some(duration) = url.duration(option)? {
            builder = set(builder, duration);
        }
    }
    Ok(async move { builder.connect().await.map(Bus::from) })
}

/// A value, or its absence.
fn or_none<T>(text: &str, read: impl FnOnce(&str) -> Option<T>) -> Option<Option<T>> {
    if text == "none" { Some(None) } else { read(text).map(Some) }
}

/// The server itself, and who to be there.
fn server(url: &BusUrl) -> Result<RedisBuilder> {
    let bad = || Error::invalid_option("url", "is written `redis://[user:password@]host[:port][/database]`");
    let authority = url.authority().filter(|authority| !authority.host().is_empty()).ok_or_else(bad)?;
    let mut builder = RedisStreamsPubSub::builder(authority.host(), authority.port().unwrap_or(PORT));
    if let Some(username) = authority.username() {
        builder = builder.username(username);
    }
    if let Some(password) = authority.password() {
        builder = builder.password(password);
    }
    if let Some(database) = url.path().strip_prefix('/').filter(|path| !path.is_empty()) {
        builder = builder.database(database.parse().map_err(|_| bad())?);
    }
    #[cfg(feature = "rediss")]
    if url.scheme() == "rediss" {
        builder = builder.tls()?;
    }
    Ok(builder)
}
