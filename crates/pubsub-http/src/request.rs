//! What every request goes through before it is served: limits, names, permission, and the reading of its body.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequestParts, Path};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use pubsub_core::{BoxError, Topic};
use tokio::sync::Semaphore;

use crate::access::{Access, Action, Authorize, Verdict};
use crate::builder::Shared;
use crate::refusal::Refusal;

/// The topic that a path names; other parameters of the path are those of whoever nests the router.
pub(crate) struct Named(Result<String, Refusal>);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Infallible> {
        let topic = Path::<BTreeMap<String, String>>::from_request_parts(parts, state).await.ok();
        let topic = topic.and_then(|Path(mut all)| all.remove("topic"));
        Ok(Self(topic.ok_or_else(|| Refusal::bad("the path is not UTF-8"))))
    }
}

impl Shared {
    /// Lets a request in, or says why not.
    pub(crate) async fn admit(&self, topic: Option<&str>, action: Action, request: &Parts) -> Result<Option<Topic>, Refusal> {
        check_headers(&request.headers, self.limits.max_header_bytes)?;
        let topic = match topic {
            Some(name) if name.len() > self.limits.max_topic_bytes => {
                return Err(Refusal::bad(format!("the topic is over {} bytes long", self.limits.max_topic_bytes)));
            }
            Some(name) => Some(Topic::new(name)?),
            None => None,
        };
        let access = Access { topic: topic.as_ref(), action, request };
        authorize(&self.authorize, access, self.limits.request_timeout).await?;
        Ok(topic)
    }

    /// As [`admit`](Self::admit), for a request that names a topic.
    pub(crate) async fn admit_to(&self, topic: Named, action: Action, request: &Parts) -> Result<Topic, Refusal> {
        let topic = self.admit(Some(&topic.0?), action, request).await?;
        topic.ok_or_else(|| Refusal::bad("no topic"))
    }

    /// A step of serving a request, within its time.
    pub(crate) async fn in_time<T>(&self, what: &str, step: impl Future<Output = T>) -> Result<T, Refusal> {
        let late = |_| Refusal::new(StatusCode::GATEWAY_TIMEOUT, format!("{what} took too long"));
        tokio::time::timeout(self.limits.request_timeout, step).await.map_err(late)
    }
}

pub(crate) async fn authorize(hook: &Arc<dyn Authorize>, access: Access<'_>, within: Duration) -> Result<(), Refusal> {
    match tokio::time::timeout(within, hook.authorize(access)).await {
        Ok(Verdict::Allow) => Ok(()),
        Ok(Verdict::Unauthenticated) => Err(Refusal::new(StatusCode::UNAUTHORIZED, "credentials are needed")),
        Ok(Verdict::Deny) => Err(Refusal::new(StatusCode::FORBIDDEN, "not allowed")),
        Err(_) => Err(Refusal::busy("permission took too long to find out")),
    }
}

pub(crate) fn check_headers(headers: &HeaderMap, most: usize) -> Result<(), Refusal> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes <= most {
        return Ok(());
    }
    Err(Refusal::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, format!("the headers are over {most} bytes long")))
}

/// A body that says it is JSON. Forms that a foreign page can send without being asked are refused thereby.
pub(crate) fn check_json(headers: &HeaderMap) -> Result<(), Refusal> {
    let said = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = said.split(';').next().unwrap_or_default().trim();
    let is_json = essence.eq_ignore_ascii_case("application/json") || essence.to_ascii_lowercase().ends_with("+json");
    if is_json {
        return Ok(());
    }
    Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the content type must be application/json"))
}

/// Reads a whole body, up to a size and within a time; and where there is room for so many bytes of all those that are being read.
pub(crate) async fn read_body(body: Body, most: usize, within: Duration, room: Option<&Semaphore>) -> Result<Bytes, Refusal> {
    let too_large = || Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is over {most} bytes long"));
    // One that says how long it is need not be sent.
    if body.size_hint().lower() > most as u64 {
        return Err(too_large());
    }
    let mut body = Limited::new(body, most);
    let reading = async {
        let (mut read, mut places) = (Vec::new(), Vec::new());
        while let Some(frame) = body.frame().await {
            let Some(data) = frame.map_err(Some)?.into_data().ok() else { continue };
            let bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
            places.extend(room.map(|room| room.try_acquire_many(bytes)).transpose().map_err(|_| None)?);
            read.push(data);
        }
        // Most come in one piece.
        Ok::<_, Option<BoxError>>(if read.len() == 1 { read.remove(0) } else { read.concat().into() })
    };
    match tokio::time::timeout(within, reading).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(None)) => Err(Refusal::busy("too much is being read")),
        Ok(Err(Some(error))) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(Some(_))) => Err(Refusal::bad("the body broke off")),
        Err(_) => Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive")),
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    async fn read(pieces: &[&'static str], room: &Semaphore) -> Result<Bytes, u16> {
        let pieces = pieces.iter().map(|piece| Ok::<_, Infallible>(*piece)).collect::<Vec<_>>();
        let body = Body::from_stream(stream::iter(pieces));
        read_body(body, 100, Duration::from_secs(10), Some(room)).await.map_err(|refusal| refusal.status().as_u16())
    }

    #[tokio::test]
    async fn bodies_share_the_room_that_there_is() {
        let room = Semaphore::new(10);
        assert_eq!(read(&["01234", "56789"], &room).await, Ok("0123456789".into()));
        assert_eq!((read(&["0123456789"], &room).await, read(&[], &room).await), (Ok("0123456789".into()), Ok(Bytes::new())));
        assert_eq!(read(&["01234", "567890"], &room).await, Err(503));
        let taken = room.acquire_many(6).await.unwrap();
        assert_eq!(read(&["01234"], &room).await, Err(503), "another has not yet arrived");
        drop(taken);
        assert_eq!((read(&["0123456789"], &room).await.is_ok(), room.available_permits()), (true, 10));
    }
}
