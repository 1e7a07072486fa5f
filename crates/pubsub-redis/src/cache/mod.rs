//! The store of the replay decorator, on a Redis server.

mod builder;

use std::fmt;
use std::future::Future;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fred::types::Value;
use pubsub_cache::{Generation, LogPage, ServerCache, check_key, check_ttl};
use pubsub_core::{Deduplication, Error, ErrorKind, Event, ReplayIndex, Result, Topic, TrimFilter, wire};
use tokio::time::Instant;

pub use self::builder::RedisCacheBuilder;
use crate::ask::ask;
use crate::errors::Fault;
use crate::keys::Keys;
use crate::link::{Cmd, Link, Script};
use crate::publish::millis;
use crate::{RedisServer, RedisStreamsPubSub, reply};

/// How many events, and bytes of them, are read at a time where many are.
const PAGE: usize = 1000;
const PAGE_BYTES: u64 = 4 << 20;

/// A script over the keys of a log.
macro_rules! log_script {
    ($name:literal) => {
        LazyLock::new(|| Script::new(concat!(include_str!("../scripts/cache/log.lua"), include_str!($name))))
    };
}

static APPEND: LazyLock<Script> = log_script!("../scripts/cache/append.lua");
static READ: LazyLock<Script> = log_script!("../scripts/cache/read.lua");
static CLEAR: LazyLock<Script> = log_script!("../scripts/cache/clear.lua");
static REMOVE: LazyLock<Script> = log_script!("../scripts/cache/remove.lua");
static VALUE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("../scripts/cache/value.lua")));

/// A [`ServerCache`] on a Redis server, for publishers and listeners in different processes and on different hosts.
///
/// Instances share a store by sharing server, database and prefix. Each has one connection, made again when it breaks; meanwhile
/// operations are tried again for [`command_timeout`](RedisCacheBuilder::command_timeout). An append whose outcome is unknown is
/// repeated, since the store knows what it has; counters and lists are not: there the error leaves it open whether it was done.
///
/// A topic's log is a stream, a hash of the ids it recognises, and a hash that says where in its numbering it is; one script numbers
/// and keeps. Events go after [`max_age`](RedisCacheBuilder::max_age), whether or not anybody asks; the numbering goes on until
/// nothing was appended for [`idle_ttl`](RedisCacheBuilder::idle_ttl). After that, a [`clear`](ServerCache::clear) or a `FLUSHALL` it
/// begins again in a generation that never was: its number is at least the server's clock in seconds, and a store that was flushed has
/// another name. All keys run out, but for the one of that name; a server with `maxmemory` may evict any of them, and who reads
/// is told what is missing.
///
/// Redis 7.0 or later is needed, and of permissions the keys `PREFIX:*` and `{PREFIX:*`, and the commands of streams, strings, lists,
/// hashes and expiry, `EVAL` and `EVALSHA`.
pub struct RedisServerCache {
    options: RedisCacheBuilder,
    keys: Keys,
    link: Link,
}

impl RedisServerCache {
    /// Configures a store on the server at this host and port.
    pub fn builder(host: impl Into<String>, port: u16) -> RedisCacheBuilder {
        Self::builder_on(RedisServer::new(host, port))
    }

    /// Configures a store on this server.
    pub fn builder_on(server: RedisServer) -> RedisCacheBuilder {
        RedisCacheBuilder::new(RedisStreamsPubSub::builder_on(server))
    }

    /// Configures a store on the server that a [URL](RedisServer::from_url) names.
    ///
    /// # Errors
    /// `InvalidOption`, which does not quote the URL: it may hold a password.
    pub fn from_url(url: &str) -> Result<RedisCacheBuilder> {
        RedisServer::from_url(url).map(Self::builder_on)
    }

    async fn on(options: RedisCacheBuilder) -> Result<Self> {
        let link = Link::open(&options.server, Duration::ZERO).await?;
        link.check_version()?;
        Ok(Self { keys: Keys::new(&options.server.prefix), options, link })
    }

    async fn ask<T, F>(&self, repeatable: bool, again: impl Fn() -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        ask(Instant::now() + self.options.server.command_timeout, repeatable, again).await
    }

    async fn eval(&self, repeatable: bool, script: &Script, call: Cmd) -> Result<Value, Fault> {
        self.ask(repeatable, || self.link.eval(script, call.clone())).await
    }

    fn log_call(&self, script: &Script, topic: &Topic) -> Cmd {
        let [place, log, ids] = self.keys.log(topic);
        script.call(&[&place, &log, &ids])
    }

    /// What an event is kept as. Its index is that of its place, wherever it comes from.
    fn encode(&self, event: &Arc<Event>) -> Result<Bytes> {
        let encode = || {
            event.check_size(self.options.server.max_payload)?;
            match event.index() {
                Some(_) => wire::encode(&Event::clone(event).with_index(None)),
                None => wire::encode(event),
            }
        };
        encode().map(Bytes::from).map_err(|error| error.on(event.id()))
    }

    /// What tells this store from others, drawn by whoever needs it first.
    async fn store(&self) -> Result<i64, Fault> {
        let drawn = fastrand::i64(0..1 << Generation::STORE_BITS);
        let draw = || self.link.call(Cmd::new("SET").key(&self.keys.store()).arg(drawn).arg("NX").arg("GET"));
        match self.ask(true, draw).await? {
            Value::Null => Ok(drawn),
            known => known.as_i64().ok_or(Fault::Nonsense("the name of the store is no number")),
        }
    }

    /// Appends what is encoded; none if a log begins with it and the store is not named.
    async fn try_append(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        encoded: &[Bytes],
        store: &str,
    ) -> Result<Option<Value>, Fault> {
        let RedisCacheBuilder { max_events, max_age, window, idle_ttl, .. } = self.options;
        let call = self.log_call(&APPEND, topic).arg(store).number(max_events).number(millis(max_age));
        let call = call.number(window).number(millis(idle_ttl));
        let kept = events.iter().zip(encoded);
        let call = kept.fold(call, |call, (event, json)| call.arg(event.id().to_string()).arg(json.clone()));
        let answer = self.eval(true, &APPEND, call).await?;
        Ok((!is_nothing(&answer)).then_some(answer))
    }

    async fn read_page(&self, topic: &Topic, from: u64, limit: usize) -> Result<Option<LogPage>, Fault> {
        let call = self.log_call(&READ, topic).number(from).number(limit.min(PAGE) as u64).number(PAGE_BYTES);
        let answer = self.eval(true, &READ, call.number(millis(self.options.max_age))).await?;
        if is_nothing(&answer) {
            return Ok(None);
        }
        let [store, number, floor, next, kept, found] = reply::tuple(answer)?;
        let generation = generation(&store, &number)?;
        let mut found = reply::array(found)?.into_iter();
        let mut events = Vec::with_capacity(found.len() / 2);
        while let (Some(index), Some(json)) = (found.next(), found.next()) {
            events.push(decode(generation, reply::number(&index)?, reply::bytes(json)?)?);
        }
        Ok(Some(LogPage::new(generation, reply::number(&floor)?, reply::number(&next)?, reply::number(&kept)?, events)))
    }

    /// Reads on for as long as it is the same log; begin, end and count are those of the first page.
    async fn read_all(&self, topic: &Topic, from: u64, limit: usize) -> Result<LogPage, Fault> {
        let Some(mut log) = self.read_page(topic, from, limit).await? else { return Ok(LogPage::default()) };
        while let Some(last) = log.events.last().and_then(|event| event.index())
            && log.events.len() < limit
            && last.index + 1 < log.next
        {
            let more = self.read_page(topic, last.index + 1, limit - log.events.len()).await?;
            let more = more.filter(|more| more.generation == log.generation).unwrap_or_default();
            // What was forgotten in between is missing from here on, and to be told by a read of its own.
            let goes_on = more.floor <= last.index + 1 && !more.events.is_empty();
            if !goes_on {
                break;
            }
            log.events.extend(more.events);
        }
        Ok(log)
    }

    /// The call that takes out what matches; none if nothing does.
    fn removal(&self, topic: &Topic, of: Generation, events: &[Arc<Event>], filter: &TrimFilter) -> Option<Cmd> {
        let mut call = self.log_call(&REMOVE, topic).number(of.store().into()).number(of.number().into());
        let mut any = false;
        for event in events {
            if let Some(place) = event.index().filter(|_| filter.matches(event)) {
                call = call.number(place.index).arg(event.id().to_string());
                any = true;
            }
        }
        any.then_some(call)
    }

    /// Writes under a key.
    async fn write(&self, what: &'static str, key: &str, with: impl Into<Value>, ttl: Option<Duration>) -> Result<Value> {
        let checked = check_key(key).and_then(|()| check_ttl(ttl));
        checked.map_err(|error| error.during(what).on(key.escape_debug()))?;
        let call = VALUE.call(&[&self.keys.value(key)]).arg(what).arg(with);
        let call = match ttl {
            Some(ttl) => call.number(millis(ttl).max(1)),
            None => call.arg(""),
        };
        let call = call.number(millis(self.options.idle_ttl)).number(self.options.max_list);
        let answer = self.eval(what == "set", &VALUE, call).await;
        answer.map_err(|fault| of_key(fault, "").during(what).on(key.escape_debug()))
    }

    /// Asks about a key; what it holds if that is not of the kind asked for is said in the error.
    async fn about(&self, what: &'static str, key: &str, otherwise: &'static str, command: Cmd) -> Result<Value> {
        check_key(key).map_err(|error| error.during(what).on(key.escape_debug()))?;
        let answer = self.ask(what != "delete", || self.link.call(command.clone())).await;
        answer.map_err(|fault| of_key(fault, otherwise).during(what).on(key.escape_debug()))
    }

    fn check_value(&self, value: &Bytes) -> Result<()> {
        let (size, limit) = (value.len(), self.options.server.max_payload);
        if size > limit { Err(ErrorKind::TooLarge { size, limit }.into()) } else { Ok(()) }
    }
}

fn is_nothing(answer: &Value) -> bool {
    matches!(answer, Value::Null | Value::Boolean(false))
}

fn generation(store: &Value, number: &Value) -> Result<Generation, Fault> {
    let part = |value| reply::number(value).map(|number| u32::try_from(number).ok());
    match (part(store)?, part(number)?) {
        (Some(store), Some(number)) => Ok(Generation::new(store, number)),
        _ => Err(Fault::Nonsense("a generation beyond its bits")),
    }
}

fn decode(generation: Generation, index: u64, json: Bytes) -> Result<Arc<Event>, Fault> {
    let decoded = wire::decode(&json, None).map_err(|_| Fault::Nonsense("what is kept in the log is no event"))?;
    Ok(Arc::new(decoded.event.with_index(Some(ReplayIndex { generation: generation.get(), index }))))
}

/// An error about a key, where it may be of another kind than was taken for granted.
fn of_key(fault: Fault, otherwise: &'static str) -> Error {
    match &fault {
        Fault::Refused(text) if fault.is("KIND") => {
            Error::invalid_option("key", text.strip_prefix("KIND ").unwrap_or_default().to_owned())
        }
        Fault::Refused(_) if fault.is("WRONGTYPE") => Error::invalid_option("key", otherwise),
        Fault::Refused(_) if fault.is("FULL") => ErrorKind::Full.into(),
        _ => fault.into(),
    }
}

/// The kept events that a script's answer tells of.
fn kept(events: &[Arc<Event>], answer: Value) -> Result<Vec<Arc<Event>>, Fault> {
    let [store, number, answers] = reply::tuple(answer)?;
    let (generation, answers) = (generation(&store, &number)?, reply::array(answers)?);
    if answers.len() != events.len() {
        return Err(Fault::Nonsense("another number of events was kept"));
    }
    let one = |(event, answer): (&Arc<Event>, Value)| match answer {
        Value::Array(_) => {
            let [index, json] = reply::tuple(answer)?;
            decode(generation, reply::number(&index)?, reply::bytes(json)?)
        }
        index => {
            let index = ReplayIndex { generation: generation.get(), index: reply::number(&index)? };
            Ok(Arc::new(Event::clone(event).with_index(Some(index))))
        }
    };
    events.iter().zip(answers).map(one).collect()
}

#[async_trait]
impl ServerCache for RedisServerCache {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        let found = self.about("get", key, "holds a list", Cmd::new("GET").key(&self.keys.value(key))).await?;
        Ok(if is_nothing(&found) { None } else { Some(reply::bytes(found)?) })
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<()> {
        self.check_value(&value).map_err(|error| error.during("set").on(key.escape_debug()))?;
        self.write("set", key, value, ttl).await.map(drop)
    }

    async fn delete(&self, key: &str) -> Result<bool> {
        let deleted = self.about("delete", key, "", Cmd::new("UNLINK").key(&self.keys.value(key))).await?;
        Ok(reply::number(&deleted)? == 1)
    }

    async fn increment(&self, key: &str, by: i64, ttl: Option<Duration>) -> Result<i64> {
        let sum = reply::text(self.write("add", key, by, ttl).await?)?;
        Ok(sum.parse().map_err(|_| Fault::Nonsense("a sum that is no number"))?)
    }

    async fn push(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
        self.check_value(&value).map_err(|error| error.during("push").on(key.escape_debug()))?;
        Ok(reply::number(&self.write("push", key, value, ttl).await?)?)
    }

    async fn range(&self, key: &str, from: u64, limit: usize) -> Result<Vec<Bytes>> {
        // The last one is named, so that an empty range has to be one behind every list.
        let from = if limit == 0 { u64::MAX } else { from };
        let last = from.saturating_add((limit as u64).saturating_sub(1));
        let command = Cmd::new("LRANGE").key(&self.keys.value(key)).number(from).number(last);
        let values = self.about("range", key, "holds a value", command).await?;
        Ok(reply::array(values)?.into_iter().map(reply::bytes).collect::<Result<_, _>>()?)
    }

    async fn append(&self, topic: &Topic, events: &[Arc<Event>]) -> Result<Vec<Arc<Event>>> {
        if events.is_empty() {
            return Ok(Vec::new());
        }
        let refused = |error: Error| error.during("append").on(topic);
        let encoded = events.iter().map(|event| self.encode(event)).collect::<Result<Vec<_>>>().map_err(refused)?;
        let append = async {
            let mut store = String::new();
            loop {
                if let Some(answer) = self.try_append(topic, events, &encoded, &store).await? {
                    return kept(events, answer);
                }
                store = self.store().await?.to_string();
            }
        };
        append.await.map_err(|fault| refused(fault.into()))
    }

    async fn read(&self, topic: &Topic, from: u64, limit: usize) -> Result<LogPage> {
        self.read_all(topic, from, limit).await.map_err(|fault| {
            let error = match fault {
                Fault::Nonsense(why) => ErrorKind::Decode(why.into()).into(),
                fault => Error::from(fault),
            };
            error.during("read").on(topic)
        })
    }

    async fn clear(&self, topic: &Topic) -> Result<()> {
        let call = self.log_call(&CLEAR, topic).number(millis(self.options.idle_ttl));
        let cleared = self.eval(true, &CLEAR, call).await;
        cleared.map(drop).map_err(|fault| Error::from(fault).during("clear").on(topic))
    }

    /// After a connection that broke meanwhile, what was taken out by then is not counted.
    async fn trim(&self, topic: &Topic, filter: &TrimFilter) -> Result<u64> {
        let failed = |fault: Fault| Error::from(fault).during("trim").on(topic);
        let (mut from, mut trimmed, mut of) = (0, 0, None);
        while let Some(page) = self.read_page(topic, from, PAGE).await.map_err(failed)? {
            let Some(last) = page.events.last().and_then(|event| event.index()) else { break };
            let Some(generation) = page.generation.filter(|this| *of.get_or_insert(*this) == *this) else { break };
            from = last.index + 1;
            if let Some(call) = self.removal(topic, generation, &page.events, filter) {
                let removed = self.eval(true, &REMOVE, call).await.map_err(failed)?;
                trimmed += reply::number(&removed).map_err(failed)?;
            }
        }
        Ok(trimmed)
    }

    fn deduplication(&self) -> Deduplication {
        let events = self.options.window.min(self.options.max_events);
        Deduplication::Window { events: Some(events), age: Some(self.options.max_age) }
    }
}

impl fmt::Debug for RedisServerCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisServerCache").field("options", &self.options).finish_non_exhaustive()
    }
}
