//! Clients that mean harm, or are merely broken: nothing else is slowed, and nothing of them is left.

mod common;

use std::time::{Duration, Instant};

use common::*;
use futures::FutureExt;
use pubsub_core::{Bus, Event, Failure};
use pubsub_http::{Form, Intake, Pushed, ServeOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

const PATH: &str = "/t/events";
const FOLLOW: &str = "GET /t/events HTTP/1.1\r\nhost: x\r\n\r\n";

fn tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// Nothing of those who are gone is left: no subscription, no task.
async fn nothing_left(bus: &Bus, before: usize) {
    eventually("no subscription is left", async || followers(bus, "t").await == 0).await;
    eventually("no task is left", async || tasks() <= before).await;
}

/// Publishes and reads, again and again: what abuse must not slow.
async fn a_good_client_is_served(server: &Server, bus: &Bus) {
    let mut stream = server.follow(PATH, None).await;
    stream.opened().await;
    for number in 0..20 {
        let begun = Instant::now();
        publish(bus, "t", number..number + 1).await;
        assert_eq!(stream.kinds(1).await, [number.to_string()]);
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?} for one event", begun.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_too_many_are_refused_politely() {
    let bus = bare();
    let before = tasks();
    let server = Server::start(http(&bus).max_streams(20).build().unwrap()).await;
    let mut streams = Vec::new();
    for _ in 0..19 {
        let mut stream = server.follow(PATH, None).await;
        stream.opened().await;
        streams.push(stream);
    }
    let mut last = server.follow(PATH, None).await;
    last.opened().await;
    for _ in 0..10 {
        let hundred = (0..100).map(|_| server.get(PATH));
        for answer in futures::future::join_all(hundred).await {
            assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
        }
        publish(&bus, "t", 0..1).await;
        assert_eq!(last.kinds(1).await, ["0"], "those who are in are served");
    }
    assert_eq!(followers(&bus, "t").await, 20);
    drop((streams, last));
    server.stop().await;
    nothing_left(&bus, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_read_nothing_are_cut_off_and_slow_nobody() {
    let bus = bare();
    let before = tasks();
    let options = ServeOptions::new().stall_timeout(Duration::from_millis(500));
    let server = Server::start_with(http(&bus).prefetch(64).build().unwrap(), options).await;
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(FOLLOW.as_bytes()).await.unwrap();
        stalled.push(stream);
    }
    eventually("they are in", async || followers(&bus, "t").await == 20).await;
    let text = "x".repeat(64 << 10);
    let begun = Instant::now();
    while followers(&bus, "t").await > 0 {
        soon("publishing past them", bus.publish("t", Event::new("flood").with_data(text.clone()))).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await; // a flood, and not a busy loop
        assert!(begun.elapsed() < PATIENCE, "{} are still there", followers(&bus, "t").await);
    }
    a_good_client_is_served(&server, &bus).await;
    // Their connections are closed, though they have not read what was sent before.
    for mut stream in stalled {
        let mut rest = Vec::new();
        let _ = soon("the end of a connection", stream.read_to_end(&mut rest)).await; // an end, or a reset
    }
    server.stop().await;
    nothing_left(&bus, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_request_is_not_waited_for_for_ever() {
    let bus = bare();
    let before = tasks();
    let options = ServeOptions::new().header_timeout(Duration::from_millis(300)).max_connections(60);
    let router = http(&bus).request_timeout(Duration::from_millis(300)).build().unwrap();
    let server = Server::start_with(router, options).await;
    let mut halves = Vec::new();
    for begun in [&b""[..], b"GET", b"GET /t/events HTTP/1.1\r\nhost:", b"\x16\x03\x01\x02\x00"] {
        for _ in 0..10 {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            stream.write_all(begun).await.unwrap();
            halves.push(stream);
        }
    }
    a_good_client_is_served(&server, &bus).await;
    // A body that never comes, and one that comes drop by drop.
    let head = "POST /t/events HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
    assert_eq!(server.raw(head).await.status, 408);
    let mut drops = TcpStream::connect(server.address).await.unwrap();
    drops.write_all(head.as_bytes()).await.unwrap();
    let dripping = async {
        while drops.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("the drops are cut off", dripping).await;
    for mut half in halves {
        let mut rest = Vec::new();
        let _ = soon("the end of a connection", half.read_to_end(&mut rest)).await; // an end, or a reset
    }
    server.stop().await;
    nothing_left(&bus, before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_connections_than_allowed_are_told_so() {
    let bus = bare();
    let server = Server::start_with(http(&bus).build().unwrap(), ServeOptions::new().max_connections(10)).await;
    let mut held = Vec::new();
    for _ in 0..10 {
        let mut stream = server.follow(PATH, None).await;
        stream.opened().await;
        held.push(stream);
    }
    for _ in 0..50 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let mut answer = String::new();
        soon("an answer", stream.read_to_string(&mut answer)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("retry-after: 1"), "{answer}");
    }
    drop(held.pop());
    eventually("a place is free", async || followers(&bus, "t").await == 9).await;
    eventually("the next is served", async || {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let _ = stream.write_all(FOLLOW.as_bytes()).await; // refused, it may be closed already
        let mut first = [0; 12];
        stream.read_exact(&mut first).await.is_ok() && &first == b"HTTP/1.1 200"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_http_or_too_much_of_it_is_refused() {
    let bus = bare();
    let server = Server::start(http(&bus).build().unwrap()).await;
    let many = (0..100).map(|n| format!("x-{n}: y\r\n")).collect::<String>();
    let long = "x".repeat(64 << 10);
    for (request, expected) in [
        (format!("GET {PATH} HTTP/1.1\r\nhost: x\r\n{many}\r\n"), 431),
        (format!("GET {PATH} HTTP/1.1\r\nhost: x\r\nlong: {long}\r\n\r\n"), 431),
        (format!("GET {PATH} HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n"), 400),
        ("nonsense\r\n\r\n".to_owned(), 400),
        (format!("POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: -1\r\n\r\n"), 400),
    ] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let _ = stream.write_all(request.as_bytes()).await; // it may be refused before it is read whole
        let mut answer = vec![0; 12];
        soon("an answer", stream.read_exact(&mut answer)).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), format!("HTTP/1.1 {expected}"), "{}", &request[..20.min(request.len())]);
    }
    // A body that is announced too large is refused before it is sent, and one in chunks when it is.
    let large = "POST /t/events HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9999999999\r\n\r\n";
    assert_eq!(server.raw(large).await.status, 413);
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(1 << 16));
    let head = "POST /t/events HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..100 {
        if stream.write_all(chunk.as_bytes()).await.is_err() {
            break; // refused, and closed
        }
    }
    a_good_client_is_served(&server, &bus).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_vanish_leave_nothing() {
    let bus = kept();
    let before = tasks();
    let server = Server::start(http(&bus).build().unwrap()).await;
    publish(&bus, "t", 0..100).await;
    for round in 0..20 {
        let mut streams = Vec::new();
        for number in 0..10 {
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            let request = b"GET /t/events?start=earliest HTTP/1.1\r\nhost: x\r\n\r\n";
            // Some go before they have asked.
            let asked = if number % 3 == 0 { &request[..round] } else { &request[..] };
            stream.write_all(asked).await.unwrap();
            if number % 2 == 0 {
                let _ = stream.read(&mut [0; 100]).now_or_never();
                stream.set_zero_linger().unwrap(); // a reset, as when a process is killed
            }
            streams.push(stream);
        }
        drop(streams);
    }
    a_good_client_is_served(&server, &bus).await;
    server.stop().await;
    nothing_left(&bus, before).await;
}

/// A host that is gone says nothing, not even that: whatever is sent to its socket is dropped before TCP sees it.
#[cfg(target_os = "linux")]
fn cut_the_cable(stream: &TcpStream) {
    const RETURN: u16 = 6; // BPF_RET | BPF_K: so many bytes are kept
    socket2::SockRef::from(stream).attach_filter(&[socket2::SockFilter::new(RETURN, 0, 0, 0)]).unwrap();
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_whose_hosts_are_gone_are_given_up() {
    let bus = bare();
    let before = tasks();
    let options = ServeOptions::new().stall_timeout(Duration::from_millis(500));
    let server = Server::start_with(http(&bus).build().unwrap(), options).await;
    // Those of one topic are sent what is published; to the others nothing is said.
    let mut gone = Vec::new();
    for topic in ["t", "silent"].into_iter().cycle().take(10) {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(FOLLOW.replacen("/t/", &format!("/{topic}/"), 1).as_bytes()).await.unwrap();
        soon("the head", stream.read_exact(&mut [0; 100])).await.unwrap();
        gone.push(stream);
    }
    assert_eq!((followers(&bus, "t").await, followers(&bus, "silent").await), (5, 5));
    gone.iter().for_each(cut_the_cable);
    a_good_client_is_served(&server, &bus).await;
    let left = async || followers(&bus, "t").await + followers(&bus, "silent").await;
    eventually("they are given up", async || left().await == 0).await;
    drop(gone);
    server.stop().await;
    nothing_left(&bus, before).await;
}

#[tokio::test]
async fn ids_of_any_kind_are_answered() {
    let bus = kept();
    let server = Server::start(http(&bus).build().unwrap()).await;
    publish(&bus, "t", 0..1).await;
    for id in ["+".repeat(15_000), "@".repeat(15_000), "@+".into(), "earliest@".into(), "live+".into(), "a.b.1.0@@".into()] {
        let told = server.follow(PATH, Some(&id)).await.next().await.unwrap();
        assert_eq!(told.name, "gap", "{told:?}");
    }
}

/// What nobody reads any more hides neither that a client has gone nor that a sender has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_behind_a_request_hide_no_end() {
    let bus = bare();
    let before = tasks();
    let server = Server::start(http(&bus).build().unwrap()).await;
    for _ in 0..20 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(format!("{FOLLOW}\r\n").as_bytes()).await.unwrap();
        soon("the head", stream.read_exact(&mut [0; 100])).await.unwrap();
    }
    nothing_left(&bus, before + 2).await; // the server's own two
    server.stop().await;

    /// Tells when its handler is cancelled.
    struct Running(mpsc::UnboundedSender<&'static str>);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.send("cancelled");
        }
    }

    let (tell, mut told) = mpsc::unbounded_channel();
    let handler = move |_: Pushed| {
        let running = Running(tell.clone());
        async move {
            running.0.send("begun").unwrap();
            std::future::pending::<Result<(), Failure>>().await
        }
    };
    let server = Server::start(Intake::new(Form::Json).authorize(anybody).handle(handler).unwrap()).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream
        .write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1\r\n\r\n1\r\n")
        .await
        .unwrap();
    assert_eq!(soon("the handler begins", told.recv()).await, Some("begun"));
    drop(stream);
    assert_eq!(soon("the handler is cancelled", told.recv()).await, Some("cancelled"));
    server.stop().await;
}
