//! The configuration of the HTTP side of a bus, and its checks.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::{get, post};
use pubsub_core::{Bus, Error, Result, Topic};
use tokio::sync::Semaphore;

use crate::access::{Authorize, nobody};
use crate::health::{self, Connection};
use crate::room::Rooms;
use crate::{publish, stream};

/// The longest duration an option takes: a day.
pub(crate) const MAX_DURATION: Duration = Duration::from_secs(24 * 3600);

/// The largest body an option takes: 1 GiB.
pub(crate) const MAX_BODY: usize = 1 << 30;

/// Makes the router of a bus; see the [crate's documentation](crate) for its routes.
#[must_use]
pub struct HttpBuilder {
    bus: Bus,
    authorize: Arc<dyn Authorize>,
    limits: Limits,
    backlog: Vec<Topic>,
}

#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) max_streams: usize,
    pub(crate) prefetch: usize,
    pub(crate) heartbeat: Duration,
    pub(crate) reconnect_after: Duration,
    pub(crate) stream_lifetime: Duration,
    pub(crate) request_timeout: Duration,
    pub(crate) max_body: usize,
    pub(crate) max_batch: usize,
    pub(crate) max_header_bytes: usize,
    pub(crate) max_topic_bytes: usize,
}

/// What the handlers share.
pub(crate) struct Shared {
    pub(crate) bus: Bus,
    pub(crate) authorize: Arc<dyn Authorize>,
    pub(crate) limits: Limits,
    pub(crate) backlog: Vec<Topic>,
    pub(crate) streams: Arc<Semaphore>,
    pub(crate) rooms: Arc<Rooms>,
    pub(crate) connection: Connection,
}

impl HttpBuilder {
    /// The defaults, over a bus. Nobody is let in until [`authorize`](Self::authorize) says who is.
    pub fn new(bus: impl Into<Bus>) -> Self {
        let limits = Limits {
            max_streams: 1000,
            prefetch: 256,
            heartbeat: Duration::from_secs(15),
            reconnect_after: Duration::from_secs(1),
            stream_lifetime: Duration::from_secs(3600),
            request_timeout: Duration::from_secs(30),
            max_body: 1 << 20,
            max_batch: 1000,
            max_header_bytes: 16 << 10,
            max_topic_bytes: Topic::MAX_BYTES,
        };
        Self { bus: bus.into(), authorize: Arc::new(nobody), limits, backlog: Vec::new() }
    }

    /// Sets who may do what.
    pub fn authorize(mut self, hook: impl Authorize) -> Self {
        self.authorize = Arc::new(hook);
        self
    }

    /// Sets how many streams are open at a time (1,000). One more is answered 503, with `Retry-After`.
    pub fn max_streams(mut self, max: usize) -> Self {
        self.limits.max_streams = max;
        self
    }

    /// Sets how many events wait for one stream's client (256). Where the topic keeps a history, a client that is slower reads from
    /// there; elsewhere the oldest are lost and the stream says how many.
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        self.limits.prefetch = prefetch;
        self
    }

    /// Sets after how much silence a stream says that it is there (15 s; at most twice that passes).
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.limits.heartbeat = every;
        self
    }

    /// Sets how long browsers are told to wait before they connect again (1 s).
    pub fn reconnect_after(mut self, pause: Duration) -> Self {
        self.limits.reconnect_after = pause;
        self
    }

    /// Sets how long a stream lasts (1 h). Then it ends, the client connects again where it was, and is authorised anew.
    pub fn stream_lifetime(mut self, lifetime: Duration) -> Self {
        self.limits.stream_lifetime = lifetime;
        self
    }

    /// Sets how long authorising, reading a body, and subscribing may take, each (30 s).
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.limits.request_timeout = timeout;
        self
    }

    /// Sets the largest body in bytes (1 MiB). More is answered 413.
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.limits.max_body = bytes;
        self
    }

    /// Sets the most events published by one request (1,000). More is answered 413.
    pub fn max_batch(mut self, events: usize) -> Self {
        self.limits.max_batch = events;
        self
    }

    /// Sets the most bytes that names and values of a request's headers have together (16 KiB). More is answered 431.
    pub fn max_header_bytes(mut self, bytes: usize) -> Self {
        self.limits.max_header_bytes = bytes;
        self
    }

    /// Sets the longest topic in bytes (255, the longest there is). A longer one is answered 400.
    pub fn max_topic_bytes(mut self, bytes: usize) -> Self {
        self.limits.max_topic_bytes = bytes;
        self
    }

    /// Adds a topic whose groups' backlog the health endpoint tells. Without any it tells none: topics are not listed.
    pub fn backlog_of(mut self, topic: Topic) -> Self {
        self.backlog.push(topic);
        self
    }

    /// The router: `GET` and `POST /{topic}/events`, `GET /health`. To be nested in any other, and best served by
    /// [`serve`](crate::serve()).
    ///
    /// # Errors
    /// `InvalidOption` naming the option.
    ///
    /// # Panics
    /// Outside a tokio runtime: one task follows the bus's status until the router and its requests are gone.
    pub fn build(self) -> Result<Router> {
        let Self { bus, authorize, limits, backlog } = self;
        limits.validate()?;
        let shared = Arc::new(Shared {
            streams: Arc::new(Semaphore::new(limits.max_streams)),
            rooms: Arc::default(),
            connection: Connection::follow(bus.status()),
            bus,
            authorize,
            limits,
            backlog,
        });
        Ok(Router::new()
            .route("/{topic}/events", get(stream::follow).merge(post(publish::publish)))
            .route("/health", get(health::health))
            .with_state(shared))
    }
}

impl Limits {
    fn validate(&self) -> Result<()> {
        check_size("max_streams", self.max_streams, Semaphore::MAX_PERMITS)?;
        check_size("prefetch", self.prefetch, 1 << 20)?;
        check_size("max_body", self.max_body, MAX_BODY)?;
        check_size("max_batch", self.max_batch, 1 << 20)?;
        check_size("max_header_bytes", self.max_header_bytes, 1 << 20)?;
        check_size("max_topic_bytes", self.max_topic_bytes, Topic::MAX_BYTES)?;
        check_duration("heartbeat", self.heartbeat)?;
        check_duration("reconnect_after", self.reconnect_after)?;
        check_duration("stream_lifetime", self.stream_lifetime)?;
        check_duration("request_timeout", self.request_timeout)
    }
}

pub(crate) fn check_size(option: &'static str, value: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid_option(option, format!("is {value}; it must be from 1 to {most}")))
}

pub(crate) fn check_duration(option: &'static str, value: Duration) -> Result<()> {
    if !value.is_zero() && value <= MAX_DURATION {
        return Ok(());
    }
    Err(Error::invalid_option(option, format!("is {value:?}; it must be longer than zero and at most a day")))
}

impl std::fmt::Debug for HttpBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpBuilder").field("bus", &self.bus).field("limits", &self.limits).finish_non_exhaustive()
    }
}
