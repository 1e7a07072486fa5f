//! Publishing, health, permission and limits over a real connection.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::*;
use futures::StreamExt;
use pubsub_core::{Capability, ErrorKind, Event, Topic};
use pubsub_http::{Access, Action, HttpBuilder, Verdict};
use serde_json::json;

const PATH: &str = "/t/events";

#[tokio::test]
async fn publishes_one_and_many() {
    let bus = kept();
    let server = Server::start(http(&bus).build().unwrap()).await;
    let mut seen = bus.subscribe("t").await.unwrap();
    let one = server.post_json(PATH, r#"{"type":"a","id":"one","data":{"n":1},"index":7,"custom":true}"#).await;
    assert_eq!((one.status, &one.json()["events"][0]["id"]), (200, &json!("one")));
    let many = server.post_json(PATH, r#"[{"type":"b","runId":"r"},{"type":"c","metadata":{"k":"v"}}]"#).await;
    assert_eq!(many.json()["events"].as_array().unwrap().len(), 2);
    let mut cursors = vec![one.json()["events"][0]["cursor"].clone()];
    cursors.extend(many.json()["events"].as_array().unwrap().iter().map(|event| event["cursor"].clone()));
    for (kind, cursor) in ["a", "b", "c"].into_iter().zip(cursors) {
        let delivery = seen.next().await.unwrap().unwrap();
        assert_eq!((delivery.event().event_type(), json!(delivery.cursor().unwrap().to_string())), (kind, cursor));
    }
    let page = bus.history("t", pubsub_core::Start::Earliest, 10).await.unwrap();
    assert_eq!(page.entries[0].1.index().unwrap().index, 0, "an index is not the caller's to choose");
    assert!(String::from_utf8(pubsub_core::wire::encode(&page.entries[0].1).unwrap()).unwrap().contains("\"custom\":true"));
}

#[tokio::test]
async fn repeating_a_request_is_the_same_event() {
    let bus = kept();
    assert!(bus.require([Capability::History]).is_ok());
    let server = Server::start(http(&bus).build().unwrap()).await;
    let key = "content-type: application/json\r\nidempotency-key: order-7\r\n";
    let mut answers = Vec::new();
    for _ in 0..3 {
        let one = server.post(PATH, key, r#"{"type":"a"}"#).await;
        let many = server.post(PATH, key, r#"[{"type":"b"},{"type":"c","id":"mine"}]"#).await;
        answers.push((one.json(), many.json()));
    }
    assert_eq!(answers[0].1["events"][0]["id"], "order-7.0");
    assert_eq!(answers[0].1["events"][1]["id"], "mine");
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(bus.history("t", pubsub_core::Start::Earliest, 10).await.unwrap().entries.len(), 3);
}

#[tokio::test]
async fn what_cannot_be_published_is_refused_whole() {
    let bus = kept();
    let server = Server::start(http(&bus).max_body(1000).max_batch(2).build().unwrap()).await;
    let text = format!(r#"{{"type":"a","data":"{}"}}"#, "x".repeat(1000));
    for (body, status) in [
        ("", 400),
        ("nonsense", 400),
        (r#"{"type":"a""#, 400),
        (r#"[{"type":"a"},{"data":1}]"#, 400),
        (r#"{"type":"a","id":""}"#, 400),
        (r#"[{"type":"a"},{"type":"a"},{"type":"a"}]"#, 413),
        (&text, 413),
    ] {
        let answer = server.post_json(PATH, body).await;
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        assert_eq!(answer.json()["status"], status);
    }
    for kind in ["", "content-type: text/plain\r\n", "content-type: application/x-www-form-urlencoded\r\n"] {
        assert_eq!(server.post(PATH, kind, r#"{"type":"a"}"#).await.status, 415, "{kind}");
    }
    let long = format!("content-type: application/json\r\nx-long: {}\r\n", "x".repeat(17 << 10));
    assert_eq!(server.post(PATH, &long, r#"{"type":"a"}"#).await.status, 431);
    for path in ["/%0A/events".to_owned(), format!("/{}/events", "x".repeat(256)), "/%FF/events".to_owned()] {
        assert_eq!(server.post_json(&path, r#"{"type":"a"}"#).await.status, 400, "{path}");
    }
    assert_eq!(server.raw("DELETE /t/events HTTP/1.1\r\nhost: x\r\n\r\n").await.status, 405);
    for unlisted in ["/", "/t", "/t/", "/events"] {
        assert_eq!(server.get(unlisted).await.status, 404, "{unlisted}");
    }
    assert!(bus.history("t", pubsub_core::Start::Earliest, 10).await.unwrap().entries.is_empty());
    bus.close(Duration::from_secs(1)).await.unwrap();
    let closed = server.post_json(PATH, r#"[{"type":"a"},{"type":"b"}]"#).await;
    assert_eq!((closed.status, &closed.json()["fates"]), (503, &json!(["notSent", "notSent"])));
}

#[tokio::test]
async fn nothing_is_allowed_unless_somebody_allows_it() {
    let bus = kept();
    let server = Server::start(HttpBuilder::new(bus.clone()).build().unwrap()).await;
    assert_eq!(server.get(PATH).await.status, 403);
    assert_eq!(server.get("/health").await.status, 403);
    // The body of a stranger is not even read: it never comes.
    let head = "POST /t/events HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n";
    assert_eq!(server.raw(head).await.status, 403);

    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    let hook = move |access: Access<'_>| {
        seen.lock().unwrap().push((access.topic.map(Topic::to_string), access.action));
        match access.request.headers.get("authorization").map(axum::http::HeaderValue::as_bytes) {
            None => Verdict::Unauthenticated,
            Some(b"Bearer good") => Verdict::Allow,
            Some(_) => Verdict::Deny,
        }
    };
    let server = Server::start(HttpBuilder::new(bus.clone()).authorize(hook).build().unwrap()).await;
    let anonymous = server.post_json(PATH, r#"{"type":"a"}"#).await;
    assert_eq!((anonymous.status, anonymous.header("www-authenticate")), (401, Some("Bearer")));
    let headers = |token: &str| format!("content-type: application/json\r\nauthorization: Bearer {token}\r\n");
    assert_eq!(server.post(PATH, &headers("bad"), r#"{"type":"a"}"#).await.status, 403);
    assert!(bus.history("t", pubsub_core::Start::Earliest, 10).await.unwrap().entries.is_empty());
    assert_eq!(server.post(PATH, &headers("good"), r#"{"type":"a"}"#).await.status, 200);
    assert_eq!(server.get(PATH).await.status, 401);
    assert_eq!(server.get("/health").await.status, 401);
    let asked = asked.lock().unwrap();
    assert_eq!(asked[0], (Some("t".into()), Action::Publish));
    assert_eq!(asked[3..], [(Some("t".into()), Action::Follow), (None, Action::Health)]);
}

#[tokio::test]
async fn tells_how_the_bus_is() {
    let bus = bare();
    let router = http(&bus).backlog_of(Topic::new("orders").unwrap()).build().unwrap();
    let server = Server::start(axum::Router::new().nest("/bus", router)).await;
    let mut member = bus.subscribe_group("orders", "billing").await.unwrap();
    for _ in 0..3 {
        bus.publish("orders", Event::new("x")).await.unwrap();
    }
    let held = member.next().await.unwrap().unwrap();
    let mut stream = server.follow("/bus/t/events", None).await;
    stream.opened().await;
    let health = server.get("/bus/health").await;
    let told = health.json();
    assert_eq!((health.status, &told["status"], &told["streams"]), (200, &json!("connected"), &json!(1)));
    let group = &told["backlog"]["orders"]["billing"];
    assert_eq!((&group["waiting"], &group["held"], &group["members"]), (&json!(2), &json!(1), &json!(1)));
    assert!(told["since"].as_str().unwrap().ends_with('Z'));
    drop(held.done());
    bus.close(Duration::from_secs(1)).await.unwrap();
    eventually("the end is told", async || {
        let health = server.get("/bus/health").await;
        health.status == 503 && health.json()["status"] == "closed"
    })
    .await;
}

#[tokio::test]
async fn options_are_refused_by_name() {
    let refused = |builder: HttpBuilder| match builder.build().unwrap_err().kind() {
        ErrorKind::InvalidOption { option, .. } => option.to_string(),
        other => panic!("{other:?}"),
    };
    let builder = || http(&bare());
    for (builder, option) in [
        (builder().max_streams(0), "max_streams"),
        (builder().prefetch(0), "prefetch"),
        (builder().max_body(0), "max_body"),
        (builder().max_batch(0), "max_batch"),
        (builder().max_header_bytes(0), "max_header_bytes"),
        (builder().max_topic_bytes(256), "max_topic_bytes"),
        (builder().heartbeat(Duration::ZERO), "heartbeat"),
        (builder().reconnect_after(Duration::MAX), "reconnect_after"),
        (builder().stream_lifetime(Duration::ZERO), "stream_lifetime"),
        (builder().request_timeout(Duration::ZERO), "request_timeout"),
    ] {
        assert_eq!(refused(builder), option);
    }
}

#[tokio::test]
async fn the_router_may_be_nested_under_parameters_of_others() {
    let bus = kept();
    let nested = axum::Router::new().nest("/{tenant}/bus", http(&bus).build().unwrap());
    let server = Server::start(nested).await;
    assert_eq!(server.post_json("/acme/bus/t/events", r#"{"type":"a"}"#).await.status, 200);
    assert_eq!(server.follow("/acme/bus/t/events?start=earliest", None).await.kinds(1).await, ["a"]);
    let bad = server.get("/acme/bus/%FF/events").await;
    assert_eq!((bad.status, bad.header("content-type")), (400, Some("application/problem+json")));
}
