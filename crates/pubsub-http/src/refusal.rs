//! What is answered when a request cannot be served: one mapping from errors to statuses, and a body that says why.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use pubsub_core::{Error, ErrorKind, Fate, PublishError};
use serde_json::{Map, Value, json};

/// How soon whoever was refused for want of room may come again.
const COME_AGAIN: Duration = Duration::from_secs(1);

/// An answer that is no success, as `application/problem+json` (RFC 9457).
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    more: Map<String, Value>,
    retry_after: Option<Duration>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, why: impl Into<String>) -> Self {
        let why = Value::String(why.into());
        Self { status, more: Map::from_iter([("detail".to_owned(), why)]), retry_after: None }
    }

    pub(crate) fn bad(why: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, why)
    }

    /// No room now; there may be some soon.
    pub(crate) fn busy(why: impl Into<String>) -> Self {
        Self { retry_after: Some(COME_AGAIN), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, why) }
    }

    /// Adds a field.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        self.more.insert(key.to_owned(), value);
        self
    }

    #[cfg(test)]
    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }
}

/// Which status an error of the bus becomes. What is the caller's fault is told in the error's own words; what is not, the caller
/// need not know in detail.
fn status(kind: &ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::InvalidName(_) | ErrorKind::InvalidOption { .. } | ErrorKind::NotSerializable(_) | ErrorKind::Decode(_) => {
            StatusCode::BAD_REQUEST
        }
        ErrorKind::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Unsupported(_) => StatusCode::NOT_IMPLEMENTED,
        ErrorKind::Gap(_) => StatusCode::GONE,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Full | ErrorKind::Unavailable | ErrorKind::Closed => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorKind::Recursion { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        // The bus's own credentials, and whatever else its server says.
        _ => StatusCode::BAD_GATEWAY,
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = status(error.kind());
        if status.is_server_error() {
            tracing::warn!(%error, "a request over HTTP failed");
        }
        let why = match error.kind() {
            ErrorKind::Backend(_) | ErrorKind::Denied => "the event bus refused".to_owned(),
            kind => kind.to_string(),
        };
        let retry_after = error.is_retryable().then_some(COME_AGAIN);
        Self { retry_after, ..Self::new(status, why) }
    }
}

impl From<PublishError> for Refusal {
    fn from(error: PublishError) -> Self {
        let fate = |fate: &Fate| match fate {
            Fate::Published => "published",
            Fate::NotSent => "notSent",
            Fate::Unknown => "unknown",
        };
        let fates: Vec<_> = error.fates().iter().map(fate).collect();
        Self::from(Error::from(error)).with("fates", json!(fates))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self { status, mut more, retry_after } = self;
        more.insert("status".to_owned(), status.as_u16().into());
        more.insert("title".to_owned(), status.canonical_reason().unwrap_or_default().into());
        let mut response = Response::new(Body::from(Value::Object(more).to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(after) = retry_after {
            headers.insert(RETRY_AFTER, whole_seconds(after).into());
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A duration as `Retry-After` tells it, rounded up: whoever waits that long has waited long enough.
pub(crate) fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0))
}

#[cfg(test)]
mod tests {
    use pubsub_core::Gap;

    use super::*;

    #[test]
    fn each_error_has_its_status() {
        for (kind, expected, again) in [
            (ErrorKind::InvalidName("x".into()), 400, false),
            (ErrorKind::Decode("x".into()), 400, false),
            (ErrorKind::TooLarge { size: 2, limit: 1 }, 413, false),
            (ErrorKind::Gap(Gap::Ahead), 410, false),
            (ErrorKind::Full, 503, true),
            (ErrorKind::Unavailable, 503, true),
            (ErrorKind::Timeout, 504, true),
            (ErrorKind::Closed, 503, false),
            (ErrorKind::Denied, 502, false),
            (ErrorKind::Backend("secret of the server".into()), 502, false),
        ] {
            let refusal = Refusal::from(Error::new(kind.clone()));
            assert!(!refusal.more["detail"].as_str().unwrap().contains("secret"));
            let response = refusal.into_response();
            assert_eq!(response.status().as_u16(), expected, "{kind:?}");
            assert_eq!(response.headers().contains_key(RETRY_AFTER), again, "{kind:?}");
        }
    }

    #[test]
    fn waits_are_rounded_up() {
        assert_eq!([0, 1, 1000, 1001].map(|ms| whole_seconds(Duration::from_millis(ms))), [0, 1, 1, 2]);
    }
}
