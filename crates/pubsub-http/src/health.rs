//! `GET /health`: what the bus says of itself.

use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, StatusCode};
use parking_lot::Mutex;
use pubsub_core::{GroupStatus, Status, StatusWatch, Timestamp};
use serde_json::{Map, Value, json};
use tokio::task::AbortHandle;

use crate::access::Action;
use crate::builder::Shared;
use crate::refusal::Refusal;

/// The bus's status and since when it is that. Its task ends with it, or with the bus.
pub(crate) struct Connection {
    now: Arc<Mutex<(Status, SystemTime)>>,
    task: AbortHandle,
}

impl Connection {
    pub(crate) fn follow(mut watch: StatusWatch) -> Self {
        let now = Arc::new(Mutex::new((watch.get(), SystemTime::now())));
        let told = now.clone();
        let follow = async move {
            while let Some(status) = watch.changed().await {
                let before = std::mem::replace(&mut *told.lock(), (status, SystemTime::now()));
                drop(before);
            }
        };
        Self { now, task: tokio::spawn(follow).abort_handle() }
    }

    fn now(&self) -> (Status, SystemTime) {
        let (status, since) = self.now.lock().clone();
        match status {
            Status::Reconnecting { since } => (status, since),
            _ => (status, since),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) async fn health(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    match try_health(&shared, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    }
}

async fn try_health(shared: &Shared, request: Request) -> Result<Response, Refusal> {
    let (parts, _) = request.into_parts();
    shared.admit(None, Action::Health, &parts).await?;
    let (status, since) = shared.connection.now();
    let (name, code) = match status {
        Status::Connected => ("connected", StatusCode::OK),
        Status::Reconnecting { .. } => ("reconnecting", StatusCode::SERVICE_UNAVAILABLE),
        Status::Closed => ("closed", StatusCode::SERVICE_UNAVAILABLE),
        // And whatever there may be one day that is not known to work.
        _ => ("failed", StatusCode::SERVICE_UNAVAILABLE),
    };
    let mut told = Map::new();
    told.insert("status".into(), name.into());
    told.insert("since".into(), Timestamp::from(since).to_string().into());
    told.insert("streams".into(), shared.rooms.seats().into());
    // A bus that is not there cannot be asked.
    if code == StatusCode::OK && !shared.backlog.is_empty() {
        let mut backlog = Map::new();
        for topic in &shared.backlog {
            let known = shared.in_time("looking at the backlog", shared.bus.inspect(topic)).await??;
            let groups = known.groups.iter().map(|group| (group.group.to_string(), waiting(group)));
            backlog.insert(topic.to_string(), Value::Object(groups.collect()));
        }
        told.insert("backlog".into(), Value::Object(backlog));
    }
    let mut response = (code, Value::Object(told).to_string()).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

fn waiting(group: &GroupStatus) -> Value {
    let oldest = group.oldest.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
    json!({"waiting": group.waiting, "held": group.held, "oldestMillis": oldest, "members": group.members})
}
