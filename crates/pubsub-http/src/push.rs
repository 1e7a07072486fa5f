//! Pushing a subscription to a URL.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pubsub_core::{BatchPolicy, Error, Failure, Message, Result, RunReport, Subscription, Timestamp, wire};
use tokio::time::Instant;

use crate::builder::{check_duration, check_size};
use crate::connect::{Connector, literal};
use crate::settle::outcome;
use crate::signature::{SIGNATURE, Secret};

/// How much of an answer is read; a receiver that says more loses its connection.
const MAX_ANSWER: usize = 64 << 10;

/// How long a connection is kept that nothing is sent over: less than receivers keep it, or they close it while something is sent. (Of
/// those in use, node closes first, after 5 s.)
const IDLE: Duration = Duration::from_secs(4);

/// How long the rest of an answer is read that says all by its status: so that the connection can be used again.
const REST: Duration = Duration::from_secs(1);

#[cfg(feature = "tls")]
type Connect = hyper_rustls::HttpsConnector<Connector>;
#[cfg(not(feature = "tls"))]
type Connect = Connector;

/// Makes a [`Push`].
#[must_use]
pub struct PushBuilder {
    url: String,
    secret: Option<Secret>,
    headers: Vec<(String, String)>,
    in_flight: usize,
    timeout: Duration,
    connect_timeout: Duration,
    max_retry_after: Duration,
    allow_private: bool,
}

impl PushBuilder {
    /// Signs what is sent, for the [`Intake`](crate::Intake) to check; see [`SIGNATURE`].
    pub fn secret(mut self, secret: Secret) -> Self {
        self.secret = Some(secret);
        self
    }

    /// Adds a header to each request, such as a token. Its value is shown nowhere.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets how many requests are on their way at a time (16). With one, first attempts arrive in the order of their deliveries.
    pub fn in_flight(mut self, requests: usize) -> Self {
        self.in_flight = requests;
        self
    }

    /// Sets how long one request may take, connecting and its answer included (30 s). Then it failed.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets how long connecting may take (10 s).
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Sets the longest `Retry-After` that is honoured (1 h); longer ones are cut to it.
    pub fn max_retry_after(mut self, longest: Duration) -> Self {
        self.max_retry_after = longest;
        self
    }

    /// Allows addresses that are not on the public internet: this host, its network, the metadata service of its cloud. Only for a URL
    /// that no stranger has a say in.
    pub fn allow_private(mut self, allow: bool) -> Self {
        self.allow_private = allow;
        self
    }

    /// The push.
    ///
    /// # Errors
    /// `InvalidOption` naming the option.
    pub fn build(self) -> Result<Push> {
        check_size("in_flight", self.in_flight, 1 << 16)?;
        check_duration("timeout", self.timeout)?;
        check_duration("connect_timeout", self.connect_timeout)?;
        check_duration("max_retry_after", self.max_retry_after)?;
        let connector = Connector { allow_private: self.allow_private, timeout: self.connect_timeout };
        let url = check_url(&self.url, &connector)?;
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            let bad = || Error::invalid_option("header", format!("{name:?} or its value is no header"));
            let name: HeaderName = name.parse().map_err(|_| bad())?;
            let mut value: HeaderValue = value.parse().map_err(|_| bad())?;
            value.set_sensitive(true);
            headers.append(name, value);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(self.in_flight)
            .http1_max_buf_size(MAX_ANSWER / 2) // beyond which it goes by one read, of as much again at most
            .build(over_tls(connector)?);
        let Self { secret, in_flight, timeout, max_retry_after, .. } = self;
        Ok(Push(Arc::new(Inner { url, secret, headers, in_flight, timeout, max_retry_after, client })))
    }
}

impl fmt::Debug for PushBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PushBuilder")
            .field("in_flight", &self.in_flight)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

#[cfg(feature = "tls")]
fn over_tls(connector: Connector) -> Result<Connect> {
    let provider = rustls::crypto::ring::default_provider();
    let builder = hyper_rustls::HttpsConnectorBuilder::new().with_provider_and_native_roots(provider).map_err(|error| {
        Error::invalid_option("url", "cannot be reached over TLS: this host's root certificates cannot be read")
            .caused_by(error)
    })?;
    Ok(builder.https_or_http().enable_http1().wrap_connector(connector))
}

#[cfg(not(feature = "tls"))]
fn over_tls(connector: Connector) -> Result<Connect> {
    Ok(connector)
}

/// URLs may hold secrets: no error repeats them.
fn check_url(url: &str, connector: &Connector) -> Result<Uri> {
    let refuse = |why: &'static str| Error::invalid_option("url", why);
    let url: Uri = url.parse().map_err(|_| refuse("is no absolute http: or https: URL"))?;
    match url.scheme_str() {
        Some("http") => {}
        Some("https") if cfg!(feature = "tls") => {}
        Some("https") => return Err(refuse("is https:, which needs the feature `tls`")),
        _ => return Err(refuse("is no absolute http: or https: URL")),
    }
    let host = url.host().filter(|host| !host.is_empty()).ok_or_else(|| refuse("names no host"))?;
    if url.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(refuse("holds a user or password: send a header instead"));
    }
    if literal(host).is_some_and(|address| !connector.may_reach(address)) {
        return Err(refuse("is of an address that is not public; `allow_private` allows it"));
    }
    Ok(url)
}

/// Delivers subscriptions to a URL: one POST per event or batch. Cheap to clone; clones share connections.
///
/// The body is the [JSON form](wire) of the event with its `deliveryAttempt`, or an array of such. An answer of 2xx is done. Everything
/// else, and none in time, is a retry as the subscription's [policy](pubsub_core::RetryPolicy) says, or after the `Retry-After` of the
/// answer. An [`Intake`](crate::Intake) can also say that a delivery is to be dead-lettered or released. Redirects are not followed.
#[derive(Clone)]
pub struct Push(Arc<Inner>);

struct Inner {
    url: Uri,
    secret: Option<Secret>,
    headers: HeaderMap,
    in_flight: usize,
    timeout: Duration,
    max_retry_after: Duration,
    client: Client<Connect, Full<Bytes>>,
}

impl Push {
    /// To a URL, with the defaults.
    pub fn to(url: impl Into<String>) -> PushBuilder {
        PushBuilder {
            url: url.into(),
            secret: None,
            headers: Vec::new(),
            in_flight: 16,
            timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            max_retry_after: Duration::from_secs(3600),
            allow_private: false,
        }
    }

    /// Pushes every delivery, `in_flight` of them at a time, until the subscription ends; see [`Subscription::run`].
    ///
    /// Dropping the future breaks off the requests on their way; their deliveries are retried.
    ///
    /// # Errors
    /// The error the subscription ended with.
    pub async fn run(&self, subscription: &mut Subscription) -> Result<RunReport> {
        subscription.run(self.0.in_flight, |message| self.send(one(&message))).await
    }

    /// Pushes batches, one at a time; see [`Subscription::run_batches`]. A batch is settled as a whole.
    ///
    /// Returns how many batches were taken by the receiver. Dropping the future breaks off the request on its way; its deliveries are
    /// retried.
    ///
    /// # Errors
    /// Those of [`Subscription::run_batches`].
    pub async fn run_batches(&self, subscription: Subscription, policy: BatchPolicy) -> Result<u64> {
        subscription.run_batches(policy, |messages| self.send(many(&messages))).await
    }

    fn send(&self, body: Result<Bytes>) -> impl Future<Output = Result<(), Failure>> + use<> {
        let inner = self.0.clone();
        async move {
            // No attempt makes it serialisable.
            let body = body.map_err(|error| Failure::dead_letter(error.to_string()))?;
            let late = |_| Failure::retry(format!("the receiver took longer than {:?}", inner.timeout));
            let until = Instant::now() + inner.timeout;
            let response = tokio::time::timeout_at(until, inner.post(body)).await.map_err(late)??;
            let (parts, body) = response.into_parts();
            // Read to its end, so that the connection can be used again; what is too long or breaks off is not worth that.
            let answer = Limited::new(body, MAX_ANSWER).collect();
            if parts.status.is_success() {
                let _ = tokio::time::timeout(REST, answer).await;
                return Ok(());
            }
            let answer = tokio::time::timeout_at(until, answer).await.map_err(late)?;
            let answer = answer.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            outcome(parts.status, &parts.headers, &answer, SystemTime::now(), inner.max_retry_after)
        }
    }
}

impl Inner {
    async fn post(&self, body: Bytes) -> Result<Response<Incoming>, Failure> {
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.url.clone();
        *request.headers_mut() = self.headers.clone();
        if let Some(secret) = &self.secret {
            let now = u64::try_from(Timestamp::now().as_millis()).unwrap_or(0);
            let signature = HeaderValue::try_from(secret.sign(now, fastrand::u128(..), &body)).expect("digits and commas");
            request.headers_mut().insert(SIGNATURE, signature);
        }
        self.client.request(request).await.map_err(|error| Failure::retry(told(&error)))
    }
}

/// An error with what caused it, since the outermost says little.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn one(message: &Message) -> Result<Bytes> {
    let mut json = BytesMut::from(&*wire::encode(message.event())?);
    // An object with a type at least: the attempt becomes its last field.
    json.truncate(json.len() - 1);
    json.put_slice(format!(",\"deliveryAttempt\":{}}}", message.attempt()).as_bytes());
    Ok(json.freeze())
}

fn many(messages: &[Message]) -> Result<Bytes> {
    let mut json = BytesMut::from(&b"["[..]);
    for (at, message) in messages.iter().enumerate() {
        if at > 0 {
            json.put_u8(b',');
        }
        json.put_slice(&one(message)?);
    }
    json.put_u8(b']');
    Ok(json.freeze())
}

impl fmt::Debug for Push {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The rest of a URL may be a secret.
        f.debug_struct("Push").field("to", &self.0.url.host()).field("in_flight", &self.0.in_flight).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use pubsub_core::ErrorKind;

    use super::*;

    #[test]
    fn options_are_refused_by_name_and_urls_are_not_repeated() {
        let refused = |builder: PushBuilder| {
            let error = builder.build().unwrap_err();
            assert!(!error.to_string().contains("hush"), "{error}");
            match error.kind() {
                ErrorKind::InvalidOption { option, .. } => option.to_string(),
                other => panic!("{other:?}"),
            }
        };
        for url in [
            "",
            "hush",
            "/hush",
            "ftp://example.com/hush",
            "http://u:hush@example.com/",
            "http://127.0.0.1/hush",
            "http:///hush",
            "http://[::1]:80/hush",
            "http://[::ffff:10.0.0.1]/hush",
            "http://169.254.169.254/hush",
        ] {
            assert_eq!(refused(Push::to(url)), "url", "{url}");
        }
        let public = || Push::to("http://example.com/hook");
        assert_eq!(refused(public().in_flight(0)), "in_flight");
        assert_eq!(refused(public().timeout(Duration::ZERO)), "timeout");
        assert_eq!(refused(public().connect_timeout(Duration::MAX)), "connect_timeout");
        assert_eq!(refused(public().max_retry_after(Duration::ZERO)), "max_retry_after");
        assert_eq!(refused(public().header("x", "hush\n")), "header");
        assert_eq!(Push::to("https://example.com/hook").build().is_ok(), cfg!(feature = "tls"));
        let shown = format!("{:?}", Push::to("http://example.com/hush?key=hush").header("k", "hush").build().unwrap());
        assert!(!shown.contains("hush"), "{shown}");
    }
}
