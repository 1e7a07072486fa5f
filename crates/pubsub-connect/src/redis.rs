//! Redis: `redis://host`, `redis+unix:PATH`, `redis-sentinel://host?service=NAME`, `redis-cluster://host`, and with TLS; as a bus and as
//! a store.

use std::future::Future;
#[cfg(feature = "replay")]
use std::sync::Arc;

#[cfg(feature = "replay")]
use pubsub_cache::ServerCache;
use pubsub_core::{Bus, Error, Result};
#[cfg(feature = "replay")]
use pubsub_redis::RedisServerCache;
use pubsub_redis::{RedisBuilder, RedisServer, RedisStreamsPubSub};

use crate::BusUrl;

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// The schemes, and whether each is encrypted.
pub(crate) const PLAIN: &[&str] = &["redis", "redis+unix", "redis-sentinel", "redis-cluster"];
#[cfg(feature = "rediss")]
pub(crate) const ENCRYPTED: &[&str] = &["rediss", "rediss-sentinel", "rediss-cluster"];

pub(crate) fn redis(url: &mut BusUrl) -> Result<impl Future<Output = Result<Bus>> + use<>> {
    let mut builder = RedisStreamsPubSub::builder_on(server(url)?);
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

/// The store that `replay` names.
#[cfg(feature = "replay")]
pub(crate) fn store(url: &mut BusUrl) -> Result<impl Future<Output = Result<Arc<dyn ServerCache>>> + use<>> {
    use pubsub_redis::RedisCacheBuilder;

    let mut builder = RedisServerCache::builder_on(server(url)?);
    if let Some(prefix) = url.text("prefix") {
        builder = builder.prefix(prefix);
    }
    for (option, set) in [
        ("max_events", RedisCacheBuilder::max_events as fn(RedisCacheBuilder, _) -> _),
        ("window", RedisCacheBuilder::window),
        ("max_list", RedisCacheBuilder::max_list),
    ] {
        if let Some(count) = url.number(option)? {
            builder = set(builder, count);
        }
    }
    if let Some(bytes) = url.size("max_payload")? {
        builder = builder.max_payload(bytes);
    }
    for (option, set) in [
        ("max_age", RedisCacheBuilder::max_age as fn(RedisCacheBuilder, _) -> _),
        ("idle_ttl", RedisCacheBuilder::idle_ttl),
        ("command_timeout", RedisCacheBuilder::command_timeout),
    ] {
        if let Some(duration) = url.duration(option)? {
            builder = set(builder, duration);
        }
    }
    Ok(async move { builder.connect().await.map(|store| Arc::new(store) as _) })
}

/// The server itself, and who to be there.
fn server(url: &mut BusUrl) -> Result<RedisServer> {
    let scheme = url.scheme().to_owned();
    let mut server = match scheme.as_str() {
        "redis+unix" => by_socket(url)?,
        "redis-sentinel" | "rediss-sentinel" => by_sentinels(url)?,
        "redis-cluster" | "rediss-cluster" => by_nodes(url)?,
        _ => by_host(url)?,
    };
    if let Some(authority) = url.authority() {
        if let Some(username) = authority.username() {
            server = server.username(username);
        }
        if let Some(password) = authority.password() {
            server = server.password(password);
        }
    }
    #[cfg(feature = "rediss")]
    if ENCRYPTED.contains(&scheme.as_str()) {
        server = match url.text("ca") {
            Some(path) => {
                let refuse = |error| Error::invalid_option("ca", "names a file that cannot be read").caused_by(error);
                server.tls_trusting(&std::fs::read(path).map_err(refuse)?)?
            }
            None => server.tls()?,
        };
    }
    Ok(server)
}

fn bad(form: &str) -> Error {
    Error::invalid_option("url", format!("is written `{form}`"))
}

fn by_host(url: &BusUrl) -> Result<RedisServer> {
    const FORM: &str = "redis://[user:password@]host[:port][/database]";
    let authority = url.authority().filter(|authority| !authority.host().is_empty()).ok_or_else(|| bad(FORM))?;
    in_database(url, RedisServer::new(authority.host(), authority.port().unwrap_or(PORT)), FORM)
}

/// The database that the path names.
fn in_database(url: &BusUrl, server: RedisServer, form: &str) -> Result<RedisServer> {
    match url.path().strip_prefix('/').filter(|path| !path.is_empty()) {
        Some(database) => Ok(server.database(database.parse().map_err(|_| bad(form))?)),
        None => Ok(server),
    }
}

fn by_socket(url: &mut BusUrl) -> Result<RedisServer> {
    const FORM: &str = "redis+unix:PATH` or `redis+unix://user:password@/PATH";
    let is_local = url.authority().is_none_or(|authority| authority.host().is_empty() && authority.port().is_none());
    if !is_local || url.path().is_empty() {
        return Err(bad(FORM));
    }
    let server = RedisServer::unix_socket(url.path());
    Ok(match url.read("database", "a number from 0 to 255", |text| text.parse().ok())? {
        Some(database) => server.database(database),
        None => server,
    })
}

fn by_sentinels(url: &mut BusUrl) -> Result<RedisServer> {
    const FORM: &str = "redis-sentinel://[user:password@]host[:port][/database]?service=NAME";
    let nodes = nodes(url, SENTINEL_PORT, FORM)?;
    let service = url.text("service").filter(|service| !service.is_empty()).map(str::to_owned);
    let service = service.ok_or_else(|| Error::invalid_option("service", "names the service that the sentinels watch"))?;
    let (username, password) =
        (url.text("sentinel_username").map(str::to_owned), url.text("sentinel_password").map(str::to_owned));
    in_database(url, RedisServer::sentinel(service, nodes).sentinel_credentials(username, password), FORM)
}

fn by_nodes(url: &mut BusUrl) -> Result<RedisServer> {
    const FORM: &str = "redis-cluster://[user:password@]host[:port]";
    if !url.path().trim_start_matches('/').is_empty() {
        return Err(bad(FORM)); // there are no databases
    }
    Ok(RedisServer::cluster(nodes(url, PORT, FORM)?))
}

/// The host of the URL, and what `nodes` adds: `host:port`, separated by commas.
fn nodes(url: &mut BusUrl, port: u16, form: &str) -> Result<Vec<(String, u16)>> {
    let authority = url.authority().filter(|authority| !authority.host().is_empty()).ok_or_else(|| bad(form))?;
    let first = (authority.host().to_owned(), authority.port().unwrap_or(port));
    let read = |text: &str| {
        let node = |node: &str| match node.rsplit_once(':') {
            Some((host, port)) => Some((host.trim_matches(['[', ']']).to_owned(), port.parse().ok()?)),
            None => Some((node.to_owned(), port)),
        };
        text.split(',').map(node).collect::<Option<Vec<_>>>()
    };
    let more = url.read("nodes", "`host:port`, separated by commas", read)?.unwrap_or_default();
    Ok([first].into_iter().chain(more).collect())
}
