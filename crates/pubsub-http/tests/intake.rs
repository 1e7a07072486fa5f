//! What an intake refuses: forged, replayed, stale, unsigned, malformed, too large, and too much at once.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::*;
use pubsub_core::{ErrorKind, Failure, Timestamp};
use pubsub_http::{Access, Action, Form, Intake, Pushed, Secret, Verdict};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const BODY: &str = r#"{"type":"a","deliveryAttempt":2}"#;

fn secret() -> Secret {
    Secret::new("a secret that both ends know").unwrap()
}

/// Counts what reaches the handler.
fn counted(intake: Intake) -> (axum::Router, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let seen = count.clone();
    let handler = move |_: Pushed| {
        seen.fetch_add(1, Ordering::SeqCst);
        futures::future::ready(Ok::<_, Failure>(()))
    };
    (intake.handle(handler).unwrap(), count)
}

fn signed(by: &Secret, ago: i64, nonce: u128, body: &str) -> String {
    let time = u64::try_from(Timestamp::now().as_millis() - ago).unwrap();
    format!("content-type: application/json\r\npubsub-signature: {}\r\n", by.sign(time, nonce, body.as_bytes()))
}

#[tokio::test]
async fn a_signature_is_needed_and_counts_once() {
    let (router, count) = counted(Intake::new(Form::Events).secret(secret()));
    let server = Server::start(router).await;
    let other = Secret::new("a secret of somebody else").unwrap();
    let good = signed(&secret(), 0, 1, BODY);
    for (headers, body, why) in [
        ("content-type: application/json\r\n", BODY, "a signature is needed"),
        (&*signed(&other, 0, 2, BODY), BODY, "the signature is not of this body by anybody known"),
        (&good, r#"{"type":"b","deliveryAttempt":2}"#, "the signature is not of this body by anybody known"),
        (&signed(&secret(), 301_000, 3, BODY), BODY, "the signature is outside its window of time"),
        (&signed(&secret(), -301_000, 4, BODY), BODY, "the signature is outside its window of time"),
    ] {
        let answer = server.post("/", headers, body).await;
        assert_eq!((answer.status, answer.json()["detail"].as_str()), (401, Some(why)));
    }
    assert_eq!(server.post("/", &good, BODY).await.status, 204);
    for _ in 0..3 {
        let replayed = server.post("/", &good, BODY).await;
        assert_eq!((replayed.status, replayed.json()["detail"].as_str()), (401, Some("the signature was used before")));
    }
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn nobody_may_push_unless_somebody_says_so() {
    let (router, count) = counted(Intake::new(Form::GooglePubSub));
    let server = Server::start(router).await;
    assert_eq!(server.post_json("/", BODY).await.status, 403);
    let hook = |access: Access<'_>| {
        assert_eq!((access.action, access.topic), (Action::Deliver, None));
        let token = access.request.headers.get("authorization").map(axum::http::HeaderValue::as_bytes);
        if token == Some(b"Bearer of-google") { Verdict::Allow } else { Verdict::Unauthenticated }
    };
    let (router, allowed) = counted(Intake::new(Form::GooglePubSub).authorize(hook));
    let server = Server::start(router).await;
    let message = r#"{"message":{"data":"eyJ0eXBlIjoiYSJ9","messageId":"1"},"subscription":"s"}"#;
    assert_eq!(server.post_json("/", message).await.status, 401);
    let headers = "content-type: application/json\r\nauthorization: Bearer of-google\r\n";
    assert_eq!(server.post("/", headers, message).await.status, 204);
    assert_eq!((count.load(Ordering::SeqCst), allowed.load(Ordering::SeqCst)), (0, 1));
    // With a secret as well, both are needed.
    let (router, both) = counted(Intake::new(Form::Events).secret(secret()).authorize(hook));
    let server = Server::start(router).await;
    assert_eq!(server.post("/", &signed(&secret(), 0, 1, BODY), BODY).await.status, 401);
    assert_eq!(server.post("/", headers, BODY).await.status, 401);
    let complete = signed(&secret(), 0, 2, BODY) + "authorization: Bearer of-google\r\n";
    assert_eq!(server.post("/", &complete, BODY).await.status, 204);
    assert_eq!(both.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn what_is_malformed_or_too_large_reaches_no_handler() {
    let allow = |_: Access<'_>| Verdict::Allow;
    let (router, count) = counted(Intake::new(Form::Events).authorize(allow).max_body(1000).max_batch(2));
    let server = Server::start(router).await;
    let (google, messages) = counted(Intake::new(Form::GooglePubSub).authorize(allow));
    let google = Server::start(google).await;
    let long = format!(r#"{{"type":"a","data":"{}"}}"#, "x".repeat(1000));
    for (body, status) in [("", 400), ("{", 400), ("[1]", 400), ("{}", 400), (&*long, 413), ("[{},{},{}]", 413)] {
        assert_eq!(server.post_json("/", body).await.status, status, "{body}");
    }
    for body in ["", "{}", BODY, r#"{"message":{"messageId":"1","data":"*"}}"#] {
        assert_eq!(google.post_json("/", body).await.status, 400, "{body}");
    }
    let deep = format!(r#"{{"type":"a","data":{}{}}}"#, "[".repeat(400), "]".repeat(400));
    let answer = server.post_json("/", &deep).await.status;
    assert!(answer == 204 || answer == 400, "{answer}"); // and the server is still there
    assert_eq!(server.post("/", "content-type: text/plain\r\n", BODY).await.status, 415);
    let large = format!("content-type: application/json\r\nx: {}\r\n", "x".repeat(17 << 10));
    assert_eq!(server.post("/", &large, BODY).await.status, 431);
    let before = count.load(Ordering::SeqCst);
    assert!(before <= 1 && messages.load(Ordering::SeqCst) == 0);
    assert_eq!(server.post_json("/", "[]").await.status, 204);
    assert_eq!(server.post_json("/", BODY).await.status, 204);
    assert_eq!(count.load(Ordering::SeqCst), before + 1);
}

#[tokio::test]
async fn a_handler_that_hangs_or_panics_is_a_retry_and_too_many_are_told_to_come_again() {
    let allow = |_: Access<'_>| Verdict::Allow;
    let hanging = Arc::new(AtomicUsize::new(0));
    let begun = hanging.clone();
    let handler = move |pushed: Pushed| {
        let begun = begun.clone();
        assert_ne!(pushed.event().event_type(), "panics at once", "on purpose");
        async move {
            match pushed.event().event_type() {
                "hangs" => {
                    begun.fetch_add(1, Ordering::SeqCst);
                    std::future::pending().await
                }
                "panics" => panic!("on purpose"),
                _ => Ok(()),
            }
        }
    };
    let intake = Intake::new(Form::Events).authorize(allow).handler_timeout(Duration::from_secs(1)).max_in_flight(1);
    let server = Server::start(intake.handle(handler).unwrap()).await;
    let (hung, busy) = futures::join!(server.post_json("/", r#"{"type":"hangs"}"#), async {
        eventually("one hangs", async || hanging.load(Ordering::SeqCst) == 1).await;
        server.post_json("/", r#"{"type":"fine"}"#).await
    });
    assert_eq!((hung.status, hung.header("pubsub-settle")), (503, Some("retry")));
    assert_eq!((busy.status, busy.header("retry-after")), (503, Some("1")));
    for body in [r#"{"type":"panics"}"#, r#"{"type":"panics at once"}"#] {
        let panicked = server.post_json("/", body).await;
        assert_eq!((panicked.status, &panicked.json()["detail"]), (503, &json!("the handler panicked")));
    }
    assert_eq!(server.post_json("/", r#"{"type":"fine"}"#).await.status, 204);
}

#[tokio::test]
async fn options_are_refused_by_name() {
    let intake = || Intake::new(Form::Events);
    for (intake, named) in [
        (intake().replay_window(Duration::ZERO), "replay_window"),
        (intake().remembered(0), "remembered"),
        (intake().max_body(0), "max_body"),
        (intake().max_batch(0), "max_batch"),
        (intake().max_header_bytes(0), "max_header_bytes"),
        (intake().max_in_flight(0), "max_in_flight"),
        (intake().handler_timeout(Duration::ZERO), "handler_timeout"),
        (intake().request_timeout(Duration::MAX), "request_timeout"),
    ] {
        let error = intake.handle(|_| futures::future::ready(Ok(()))).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == named), "{named}: {error}");
    }
    assert!(Secret::new("short").is_err());
}

#[tokio::test]
async fn any_json_becomes_an_event() {
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let handler = move |pushed: Pushed| futures::future::ready(told.send(pushed).map_err(|_| Failure::retry("nobody listens")));
    let router = Intake::new(Form::Json).authorize(anybody).handle(handler).unwrap();
    let server = Server::start(router).await;
    for (header, body, id) in [
        ("webhook-id: msg_1\r\n", r#"{"order": 7}"#, Some("msg_1")),
        ("idempotency-key: k\r\n", "[1, 2]", Some("k")),
        ("", r#"{"type": "a", "id": "own"}"#, None),
    ] {
        let answer = server.post("/", &format!("content-type: application/json\r\n{header}"), body).await;
        assert_eq!(answer.status, 204, "{answer:?}");
        let pushed = heard.recv().await.unwrap();
        let data = pushed.event().data::<serde_json::Value>().unwrap().into_owned();
        assert_eq!((pushed.event().event_type(), data), ("webhook", serde_json::from_str(body).unwrap()));
        let named = pushed.event().id().to_string();
        assert!(id.map_or(named.len() == 36, |id| id == named), "{named}");
    }
    for (header, body) in [("", "{"), ("", ""), ("webhook-id: \r\n", "{}")] {
        assert_eq!(server.post("/", &format!("content-type: application/json\r\n{header}"), body).await.status, 400);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_slowly_and_unsigned_keeps_no_place() {
    let (router, count) = counted(Intake::new(Form::Events).secret(secret()).max_in_flight(1));
    let server = Server::start(router).await;
    let mut slow = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let head = "POST / HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{";
        stream.write_all(head.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    for nonce in 0..5 {
        assert_eq!(server.post("/", &signed(&secret(), 0, nonce, BODY), BODY).await.status, 204);
    }
    assert_eq!(count.load(Ordering::SeqCst), 5);
}
