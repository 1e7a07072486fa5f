//! `POST /{topic}/events`: one event, or a batch.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, StatusCode};
use pubsub_core::wire::{self, Decoded, Stamp};
use pubsub_core::{Event, EventId, PublishOptions, Timestamp};
use serde_json::json;
use serde_json::value::RawValue;

use crate::access::Action;
use crate::builder::Shared;
use crate::refusal::Refusal;
use crate::request::{Named, check_json, read_body};

/// By which a caller names what it publishes, so that saying it again is the same event.
pub(crate) const IDEMPOTENCY_KEY: &str = "idempotency-key";

pub(crate) async fn publish(State(shared): State<Arc<Shared>>, topic: Named, request: Request) -> Response {
    match try_publish(&shared, topic, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    }
}

async fn try_publish(shared: &Shared, topic: Named, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let topic = shared.admit_to(topic, Action::Publish, &parts).await?;
    check_json(&parts.headers)?;
    let body = read_body(body, shared.limits.max_body, shared.limits.request_timeout, None).await?;
    let key = idempotency_key(&parts.headers)?;
    let events = read(&body, key, shared.limits.max_batch)?;
    let events: Vec<_> = events.into_iter().map(|decoded| Arc::new(decoded.event)).collect();
    // The bus bounds its own waiting, and knows what became of each event when it gives up.
    let positions = shared.bus.publish_with(&topic, &events, PublishOptions::new()).await?;
    let told = |(at, event): (usize, &Arc<Event>)| {
        let id = event.id().to_string();
        match positions.get(at) {
            Some(cursor) => json!({"id": id, "cursor": cursor.to_string()}),
            None => json!({"id": id}),
        }
    };
    let answer = json!({"events": events.iter().enumerate().map(told).collect::<Vec<_>>()});
    Ok(([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], answer.to_string()).into_response())
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Refusal> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let key = key.to_str().map_err(|_| Refusal::bad("the idempotency key is not plain text"))?;
    Ok(Some(key))
}

/// Reads one event or an array of events, with the attempts that came with them. What bears no id takes the caller's key, or one of its
/// own.
pub(crate) fn read(body: &Bytes, key: Option<&str>, most: usize) -> Result<Vec<Decoded>, Refusal> {
    let is_batch = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    if !is_batch {
        let stamp = stamp(key, None)?;
        return Ok(vec![wire::decode(body, Some(stamp))?]);
    }
    let batch: Vec<&RawValue> =
        serde_json::from_slice(body).map_err(|error| Refusal::bad(format!("cannot decode: {error}")))?;
    if batch.len() > most {
        let why = format!("{} events in one request; {most} is the most", batch.len());
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, why));
    }
    let read = |(at, json): (usize, &&RawValue)| {
        let decoded = stamp(key, Some(at)).and_then(|stamp| {
            // A slice of the body: no copy.
            Ok(wire::decode(&body.slice_ref(json.get().as_bytes()), Some(stamp))?)
        });
        decoded.map_err(|refusal| refusal.with("event", at.into()))
    };
    batch.iter().enumerate().map(read).collect()
}

fn stamp(key: Option<&str>, place: Option<usize>) -> Result<Stamp, Refusal> {
    let id = match (key, place) {
        (None, _) => EventId::random(),
        (Some(key), None) => EventId::new(key)?,
        (Some(key), Some(at)) => EventId::new(format!("{key}.{at}"))?,
    };
    Ok(Stamp { id, created_at: Timestamp::now() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(body: &'static str, key: Option<&str>) -> Result<Vec<String>, u16> {
        let read = read(&Bytes::from_static(body.as_bytes()), key, 2).map_err(|refusal| refusal.status().as_u16())?;
        Ok(read.into_iter().map(|decoded| decoded.event.id().to_string()).collect())
    }

    #[test]
    fn one_or_a_batch_with_ids_of_the_callers_choice() {
        assert_eq!(ids(r#"{"type":"a","id":"1"}"#, Some("k")), Ok(vec!["1".into()]));
        assert_eq!(ids(r#"{"type":"a"}"#, Some("k")), Ok(vec!["k".into()]));
        assert_eq!(ids(r#" [{"type":"a"},{"type":"b","id":"2"}]"#, Some("k")), Ok(vec!["k.0".into(), "2".into()]));
        assert_eq!(ids(r#"{"type":"a"}"#, None).unwrap()[0].len(), 36);
        assert_eq!(ids("[]", None), Ok(vec![]));
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for body in ["", "{", "1", r#"{"id":"1"}"#, r#"[{"type":"a"},1]"#, "[", r#"{"type":"a","id":""}"#, "[[]]"] {
            assert_eq!(ids(body, None), Err(400), "{body}");
        }
        assert_eq!(ids(r#"[{"type":"a"},{"type":"a"},{"type":"a"}]"#, None), Err(413));
    }
}
