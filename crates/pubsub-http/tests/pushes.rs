//! Pushing out and taking in, over real connections: what is sent, what is settled, and where nothing is sent at all.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use pubsub_core::{BatchPolicy, Bus, Event, Failure, Group, Origin, RetryPolicy, Start, SubscribeOptions, Subscription, Topic};
use pubsub_http::{Form, Intake, Push, PushBuilder, Pushed, Secret};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

fn secret() -> Secret {
    Secret::new("a secret that both ends know").unwrap()
}

/// A group that retries at once, three times, and buries what fails.
async fn group(bus: &Bus) -> Subscription {
    let retry = RetryPolicy::new().max_attempts(3).jitter(0.0).backoff(Duration::from_millis(1), Duration::from_millis(1));
    let options = SubscribeOptions::group(Group::new("push").unwrap()).retry(retry);
    bus.subscribe_with("t", options.dead_letter(Topic::new("dead").unwrap())).await.unwrap()
}

fn run(push: PushBuilder, mut subscription: Subscription) -> JoinHandle<pubsub_core::RunReport> {
    let push = push.allow_private(true).build().unwrap();
    tokio::spawn(async move { push.run(&mut subscription).await.unwrap() })
}

/// The first dead letter.
async fn letter(bus: &Bus) -> Origin {
    let mut found = None;
    eventually("a dead letter", async || {
        let letters = bus.history("dead", Start::Earliest, 1).await.unwrap();
        found = letters.entries.first().and_then(|(_, event)| Origin::of(event));
        found.is_some()
    })
    .await;
    found.unwrap()
}

/// What a receiver that speaks HTTP by hand got.
struct Receiver {
    url: String,
    requests: Arc<Mutex<Vec<(Instant, String)>>>,
}

/// Answers the requests one after another with these answers, the last again and again; an empty one never comes.
async fn receiver(answers: &'static [&'static str]) -> Receiver {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = requests.clone();
    tokio::spawn(async move {
        let mut silent = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            let mut byte = [0; 1024];
            while !request.ends_with(b"}") && !request.ends_with(b"]") {
                match stream.read(&mut byte).await.unwrap() {
                    0 => break,
                    read => request.extend_from_slice(&byte[..read]),
                }
            }
            let number = {
                let mut seen = seen.lock().unwrap();
                seen.push((Instant::now(), String::from_utf8_lossy(&request).into_owned()));
                seen.len() - 1
            };
            match answers[number.min(answers.len() - 1)] {
                "" => silent.push(stream),
                answer => stream.write_all(answer.as_bytes()).await.unwrap(),
            }
        }
    });
    Receiver { url, requests }
}

const OK: &str = "HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n";

async fn intake(handler: impl Fn(&Pushed) -> Result<(), Failure> + Send + Sync + 'static) -> (Server, String) {
    let intake = Intake::new(Form::Events).secret(secret());
    let handler = Arc::new(handler);
    let router = intake.handle(move |pushed| futures::future::ready(handler(&pushed))).unwrap();
    let server = Server::start(axum::Router::new().nest("/hooks/orders", router)).await;
    let url = format!("http://{}/hooks/orders", server.address);
    (server, url)
}

#[tokio::test]
async fn what_the_handler_decides_is_what_is_settled() {
    let bus = bare();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = seen.clone();
    let released = AtomicUsize::new(0);
    let (_server, url) = intake(move |pushed| {
        let event = pushed.event();
        told.lock().unwrap().push((event.event_type().to_owned(), pushed.attempt()));
        match event.event_type() {
            "good" => Ok(()),
            "second" if pushed.attempt() == 2 => Ok(()),
            "released" if released.fetch_add(1, Ordering::SeqCst) > 0 => Ok(()),
            "released" => Err(Failure::release()),
            "dead" => Err(Failure::dead_letter("no such order")),
            "panics" => panic!("on purpose"),
            _ => Err(Failure::retry("not yet")),
        }
    })
    .await;
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    let running = run(Push::to(url).secret(secret()).in_flight(1), subscription);
    for kind in ["good", "second", "released", "dead"] {
        bus.publish("t", Event::new(kind)).await.unwrap();
        handle.drained().await;
    }
    let of = |kind: &str| seen.lock().unwrap().iter().filter(|(of, _)| of == kind).map(|(_, n)| *n).collect::<Vec<_>>();
    assert_eq!((of("good"), of("second"), of("released"), of("dead")), (vec![1], vec![1, 2], vec![1, 1], vec![1]));
    let origin = letter(&bus).await;
    assert_eq!((origin.attempts, origin.reason.as_str()), (1, "no such order"));
    bus.publish("t", Event::new("panics")).await.unwrap();
    handle.drained().await;
    let panicked = handle.status();
    assert_eq!((of("panics"), panicked.dead_lettered), (vec![1, 2, 3], 2));
    handle.stop();
    let report = soon("the run ends", running).await.unwrap();
    assert_eq!((report.done, report.dead_lettered, report.released, report.retried), (3, 1, 1, 4));
}

#[tokio::test]
async fn an_event_arrives_as_it_was_published() {
    let bus = bare();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = seen.clone();
    let (_server, url) = intake(move |pushed| {
        told.lock().unwrap().push(pushed.event().clone());
        Ok(())
    })
    .await;
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    run(Push::to(url).secret(secret()), subscription);
    let event = Event::new("x").with_run_id("r").with_data(vec![1.5, 1e300]).with_metadata("k", "v\u{1f980}");
    let event = Arc::new(event);
    bus.publish("t", event.clone()).await.unwrap();
    handle.drained().await;
    let seen = seen.lock().unwrap();
    let got = &seen[0];
    assert_eq!((got.id(), got.event_type(), got.run_id()), (event.id(), "x", "r"));
    assert_eq!((got.created_at(), got.metadata()), (event.created_at(), event.metadata()));
    assert_eq!(got.payload().to_json().unwrap(), event.payload().to_json().unwrap());
}

#[tokio::test]
async fn batches_are_pushed_and_settled_whole() {
    let bus = bare();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = seen.clone();
    let (_server, url) = intake(move |pushed| {
        let kind = pushed.event().event_type().to_owned();
        let fails = kind == "2" && pushed.attempt() == 1;
        told.lock().unwrap().push((kind, pushed.attempt()));
        if fails { Err(Failure::retry("once")) } else { Ok(()) }
    })
    .await;
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    let push = Push::to(url).secret(secret()).allow_private(true).build().unwrap();
    publish(&bus, "t", 0..4).await;
    let policy = BatchPolicy::new().max_size(4).max_wait(Duration::from_millis(50));
    let running = tokio::spawn(async move { push.run_batches(subscription, policy).await.unwrap() });
    handle.drained().await;
    let expected = [("0", 1), ("1", 1), ("2", 1), ("0", 2), ("1", 2), ("2", 2), ("3", 2)];
    assert_eq!(*seen.lock().unwrap(), expected.map(|(kind, attempt)| (kind.to_owned(), attempt)));
    handle.stop();
    assert_eq!(soon("the run ends", running).await.unwrap(), 1);
}

#[tokio::test]
async fn a_wait_that_the_receiver_asks_for_is_kept_to() {
    let bus = bare();
    let receiver =
        receiver(&["HTTP/1.1 429 Slow Down\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", OK]).await;
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    run(Push::to(&receiver.url), subscription);
    publish(&bus, "t", 0..1).await;
    handle.drained().await;
    let requests = receiver.requests.lock().unwrap();
    assert_eq!(requests.len(), 2);
    let waited = requests[1].0 - requests[0].0;
    assert!(waited >= Duration::from_millis(990), "{waited:?}"); // timers count in whole milliseconds
    assert!(requests[1].1.ends_with(",\"deliveryAttempt\":2}"), "{}", requests[1].1);
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let bus = bare();
    // To itself: were it followed, the receiver would see a request that is not one of the attempts.
    let receiver =
        receiver(&["HTTP/1.1 307 Elsewhere\r\nlocation: /other\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"]).await;
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    run(Push::to(&receiver.url), subscription);
    publish(&bus, "t", 0..1).await;
    handle.drained().await;
    let origin = letter(&bus).await;
    assert_eq!((origin.attempts, origin.reason.as_str()), (3, "the receiver answered 307 Temporary Redirect"));
    let requests = receiver.requests.lock().unwrap();
    assert!(requests.len() == 3 && requests.iter().all(|(_, request)| request.starts_with("POST /hook ")));
}

#[tokio::test]
async fn a_receiver_that_never_answers_is_given_up() {
    let bus = bare();
    let receiver = receiver(&["", OK]).await;
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    run(Push::to(&receiver.url).timeout(Duration::from_millis(50)), subscription);
    publish(&bus, "t", 0..1).await;
    soon("it is pushed again", handle.drained()).await;
    assert_eq!(receiver.requests.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn an_address_that_is_not_public_is_not_connected_to_whatever_its_name() {
    let bus = bare();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut subscription = group(&bus).await;
    let handle = subscription.handle();
    let push = Push::to(format!("http://localhost:{port}/hook")).build().unwrap();
    let running = tokio::spawn(async move { push.run(&mut subscription).await });
    publish(&bus, "t", 0..1).await;
    handle.drained().await;
    let origin = letter(&bus).await;
    assert!(origin.attempts == 3 && origin.reason.contains("the address is not public"), "{origin:?}");
    handle.stop();
    soon("the run ends", running).await.unwrap().unwrap();
    // Whatever had connected would be before this one.
    let ours = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let (_, from) = listener.accept().await.unwrap();
    assert_eq!(from, ours.local_addr().unwrap());
}

#[tokio::test]
async fn no_more_are_on_their_way_than_allowed() {
    let bus = bare();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let handler = move |_| {
        let (now, most) = (now.clone(), most.clone());
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(5)).await;
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        }
    };
    let router = Intake::new(Form::Events).secret(secret()).handle(handler).unwrap();
    let server = Server::start(router).await;
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    publish(&bus, "t", 0..50).await;
    run(Push::to(format!("http://{}/", server.address)).secret(secret()).in_flight(4), subscription);
    handle.drained().await;
    assert_eq!(seen.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_push_that_is_dropped_cancels_the_handler_and_leaves_nothing() {
    struct Gone(Arc<AtomicUsize>);
    impl Drop for Gone {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let bus = bare();
    let (started, gone) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (begun, dropped) = (started.clone(), gone.clone());
    let handler = move |_| {
        let gone = Gone(dropped.clone());
        begun.fetch_add(1, Ordering::SeqCst);
        async move {
            std::future::pending::<()>().await;
            drop(gone);
            Ok(())
        }
    };
    let server = Server::start(Intake::new(Form::Events).secret(secret()).handle(handler).unwrap()).await;
    let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let running = run(Push::to(format!("http://{}/", server.address)).secret(secret()), group(&bus).await);
    publish(&bus, "t", 0..3).await;
    eventually("three are handled", async || started.load(Ordering::SeqCst) == 3).await;
    running.abort();
    eventually("none is handled any more", async || gone.load(Ordering::SeqCst) == 3).await;
    assert_eq!(bus.inspect("t").await.unwrap().groups.len(), 0, "a member is left");
    // The bus has a task for the deadlines of what is to be retried; it goes with the bus.
    bus.close(Duration::from_secs(1)).await.unwrap();
    drop(bus);
    let left = async || tokio::runtime::Handle::current().metrics().num_alive_tasks() <= before;
    eventually("no task is left", left).await;
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn https_is_spoken_over_tls() {
    let bus = bare();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/hook", listener.local_addr().unwrap());
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    run(Push::to(url), subscription);
    publish(&bus, "t", 0..1).await;
    let serving = tokio::spawn(async move {
        let mut first = [0; 2];
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut first).await.unwrap();
            assert_eq!(first, [0x16, 0x03], "a handshake of TLS");
        }
    });
    soon("three handshakes", serving).await.unwrap();
    handle.drained().await;
    assert_eq!(letter(&bus).await.attempts, 3);
}

/// The status says all: how long its body takes to end, or whether it does, is no matter.
#[tokio::test]
async fn a_success_whose_body_does_not_end_is_one() {
    let bus = kept();
    let receiver = receiver(&["HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf a body"]).await;
    let subscription = group(&bus).await;
    let handle = subscription.handle();
    publish(&bus, "t", 0..1).await;
    let running = run(Push::to(&receiver.url).timeout(Duration::from_millis(500)), subscription);
    eventually("it is settled", async || bus.inspect("t").await.unwrap().groups[0].waiting == Some(0)).await;
    handle.stop();
    soon("the end", handle.drained()).await;
    assert_eq!(soon("the report", running).await.unwrap().done, 1);
    assert_eq!(receiver.requests.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_head_that_is_too_long_is_no_answer() {
    let bus = kept();
    let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 0\r\n\r\n", "y".repeat(100 << 10));
    let receiver = receiver(Box::leak(Box::new([&*Box::leak(long.into_boxed_str())]))).await;
    let running = run(Push::to(&receiver.url), group(&bus).await);
    publish(&bus, "t", 0..1).await;
    assert_eq!(letter(&bus).await.attempts, 3);
    running.abort();
}
