//! How a receiver of pushes says what becomes of them, over and above its status.

use std::time::{Duration, SystemTime};

use axum::response::{IntoResponse, Response};
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue, StatusCode};
use pubsub_core::{Failure, Settlement};

use crate::refusal::{Refusal, whole_seconds};

/// What the receiver decided, in its own words: `retry`, `dead-letter` or `release`. Without it a status that is no success is a retry.
pub(crate) const SETTLE: &str = "pubsub-settle";

/// The back-off it asks for, to the millisecond; `Retry-After` says the same in whole seconds.
pub(crate) const RETRY_AFTER_MILLIS: &str = "pubsub-retry-after-ms";

/// The longest text of a reason that is passed on, in characters.
const MAX_REASON: usize = 500;

/// The answer that a handler's outcome becomes.
pub(crate) fn answer(outcome: Result<(), Failure>) -> Response {
    let Err(failure) = outcome else { return StatusCode::NO_CONTENT.into_response() };
    let (status, word, reason, after) = match failure.into_settlement() {
        Settlement::DeadLetter { reason } => (StatusCode::UNPROCESSABLE_ENTITY, "dead-letter", Some(reason), None),
        Settlement::Release => (StatusCode::SERVICE_UNAVAILABLE, "release", None, None),
        Settlement::Retry { after, reason } => (StatusCode::SERVICE_UNAVAILABLE, "retry", reason, after),
        // A failure is none of the others.
        _ => (StatusCode::SERVICE_UNAVAILABLE, "retry", None, None),
    };
    let reason = reason.map(|reason| reason.chars().take(MAX_REASON).collect::<String>());
    let mut response = Refusal::new(status, reason.unwrap_or_default()).into_response();
    let headers = response.headers_mut();
    headers.insert(SETTLE, HeaderValue::from_static(word));
    if let Some(after) = after {
        headers.insert(RETRY_AFTER, whole_seconds(after).into());
        headers.insert(RETRY_AFTER_MILLIS, u64::try_from(after.as_millis()).unwrap_or(u64::MAX).into());
    }
    response
}

/// What an answer means for what was pushed. A back-off that is asked for is kept to, up to the longest.
pub(crate) fn outcome(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    now: SystemTime,
    longest: Duration,
) -> Result<(), Failure> {
    if status.is_success() {
        return Ok(());
    }
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let reason = reason(status, body);
    Err(match text(SETTLE) {
        Some("dead-letter") => Failure::dead_letter(reason),
        Some("release") => Failure::release(),
        _ => {
            let precise = text(RETRY_AFTER_MILLIS).and_then(|millis| millis.parse().ok()).map(Duration::from_millis);
            // A wait of nothing is none that is asked for: clocks differ, and attempts are soon used up.
            let rough = || retry_after(text(RETRY_AFTER.as_str())?, now).filter(|wait| !wait.is_zero());
            match precise.or_else(rough) {
                Some(after) => Failure::retry_after(after.min(longest), reason),
                None => Failure::retry(reason),
            }
        }
    })
}

/// Seconds, or a date.
fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More seconds than fit are as many as there are.
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::from(u32::MAX))));
    }
    let until = httpdate::parse_http_date(text).ok()?;
    Some(until.duration_since(now).unwrap_or_default())
}

fn reason(status: StatusCode, body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Problem {
        detail: String,
    }
    match serde_json::from_slice::<Problem>(body) {
        Ok(Problem { detail }) if !detail.is_empty() => detail.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect(),
        _ => format!("the receiver answered {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(3600);

    fn understood(status: u16, headers: &[(&'static str, &str)], body: &str) -> Option<Settlement> {
        let headers = headers.iter().map(|(name, value)| ((*name).try_into().unwrap(), value.parse().unwrap())).collect();
        let now = httpdate::parse_http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
        let status = StatusCode::from_u16(status).unwrap();
        outcome(status, &headers, body.as_bytes(), now, LONGEST).err().map(Failure::into_settlement)
    }

    fn after(status: u16, headers: &[(&'static str, &str)]) -> Option<u64> {
        match understood(status, headers, "") {
            Some(Settlement::Retry { after, .. }) => after.map(|after| u64::try_from(after.as_millis()).unwrap()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn success_is_done_and_nothing_else() {
        for status in [200, 201, 204, 299] {
            assert_eq!(understood(status, &[(SETTLE, "retry")], ""), None);
        }
        for status in [100, 301, 302, 307, 400, 410, 429, 500, 503] {
            assert_eq!(after(status, &[]), None, "{status}: as the policy says");
        }
    }

    #[test]
    fn a_wait_that_is_asked_for_is_kept_to() {
        assert_eq!(after(429, &[("retry-after", "7")]), Some(7000));
        assert_eq!(after(503, &[("retry-after", "Wed, 21 Oct 2015 07:28:30 GMT")]), Some(30_000));
        assert_eq!(after(503, &[("retry-after", "Wed, 21 Oct 2015 07:00:00 GMT")]), None);
        assert_eq!(after(503, &[("retry-after", "0")]), None);
        assert_eq!(after(503, &[("retry-after", "0"), (RETRY_AFTER_MILLIS, "0")]), Some(0));
        assert_eq!(after(503, &[("retry-after", "99999999999999999999999")]), Some(3_600_000));
        assert_eq!(after(503, &[("retry-after", "1"), (RETRY_AFTER_MILLIS, "20")]), Some(20));
        for nonsense in ["soon", "-1", "", "1.5"] {
            assert_eq!(after(503, &[("retry-after", nonsense)]), None, "{nonsense}");
        }
    }

    #[test]
    fn a_decision_comes_through_as_it_was_made() {
        let dead = understood(422, &[(SETTLE, "dead-letter")], r#"{"detail":"no such order"}"#);
        assert_eq!(dead, Some(Settlement::DeadLetter { reason: "no such order".into() }));
        assert_eq!(understood(503, &[(SETTLE, "release")], ""), Some(Settlement::Release));
        let Some(Settlement::Retry { reason, .. }) = understood(500, &[], &format!(r#"{{"detail":"{}"}}"#, "x".repeat(9999)))
        else {
            panic!("a retry");
        };
        assert_eq!(reason.unwrap().len(), MAX_REASON);
    }
}
