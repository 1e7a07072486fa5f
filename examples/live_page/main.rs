//! A page follows a text word by word, and keeps it whole although its server cuts every connection again and again.
//!
//! `cargo run --example live_page [URL] [ADDRESS]`: then open the address it prints, in as many tabs as you like. The URL's bus must keep
//! a history, as `memory:?replay=memory` does (the default) and `unix:` and `redis:` do. The words come from another process, which the
//! example starts when the page is first opened: it publishes over HTTP, and says again what it has no answer to.

use std::error::Error;
use std::future::ready;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::response::Html;
use axum::routing::get;
use pubsub_core::{Bus, Capability, EventId, Topic};
use pubsub_http::{Access, Action, HttpBuilder, ServeOptions, Verdict, serve};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

const PAGE: &str = include_str!("page.html");
const TEXT: &str = include_str!("text.txt");

/// How long connections last, in milliseconds: from and up to.
const LASTS: (u64, u64) = (100, 600);

/// How often a word is said before nobody seems to be there.
const TRIES: usize = 100;

/// How long a word takes, as a model thinks.
const WORD: Duration = Duration::from_millis(80);

/// How long a browser waits before it connects again, and the producer before it says its word again.
const PAUSE: Duration = Duration::from_millis(50);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["produce", address, topic] => produce(address.parse()?, topic).await,
        [] => run("memory:?replay=memory", "127.0.0.1:8080").await,
        [url] => run(url, "127.0.0.1:8080").await,
        [url, address, ..] => run(url, address).await,
    }
}

async fn run(url: &str, address: &str) -> Result<(), Box<dyn Error>> {
    let bus = pubsub_connect::connect(url).await?;
    bus.require([Capability::History])?;
    let topic = Topic::new(format!("live.{}", EventId::random()))?;
    let opened = Arc::new(Notify::new());
    let app = app(bus, topic.clone(), opened.clone())?;

    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    println!("open http://{address}/");
    let mut producer = Command::new(std::env::current_exe()?);
    producer.args(["produce", &address.to_string(), topic.as_str()]).kill_on_drop(true);
    tokio::spawn(async move {
        opened.notified().await;
        producer.status().await
    });
    loop {
        // Those who connect meanwhile wait in the listener's queue, which is the same all the time.
        let serving =
            serve(TcpListener::from_std(listener.try_clone()?)?, app.clone(), ServeOptions::new(), std::future::pending());
        if let Ok(ended) = timeout(Duration::from_millis(fastrand::u64(LASTS.0..LASTS.1)), serving).await {
            ended?;
        }
    }
}

/// The page, and the bus behind it: whoever is here may follow this topic and publish to it, and nothing else.
fn app(bus: Bus, topic: Topic, opened: Arc<Notify>) -> pubsub_core::Result<Router> {
    let page = Html(PAGE.replace("TOPIC", topic.as_str()));
    let show = move || {
        opened.notify_one();
        ready(page)
    };
    let may = move |access: Access<'_>| match access.action {
        Action::Follow | Action::Publish if access.topic == Some(&topic) => Verdict::Allow,
        _ => Verdict::Deny,
    };
    let http = HttpBuilder::new(bus).authorize(may).reconnect_after(PAUSE).build()?;
    Ok(Router::new().route("/", get(show)).nest("/bus", http))
}

/// Publishes word by word, and then how many there were.
async fn produce(address: SocketAddr, topic: &str) -> Result<(), Box<dyn Error>> {
    let mut words = 0;
    for word in TEXT.trim_end().split_inclusive(' ') {
        publish(address, topic, &json!({"type": "token", "data": word}).to_string()).await?;
        words += 1;
        sleep(WORD).await;
    }
    publish(address, topic, &json!({"type": "finish", "data": words}).to_string()).await
}

/// Publishes one event, as often as it takes: by its key it is the same event every time.
async fn publish(address: SocketAddr, topic: &str, event: &str) -> Result<(), Box<dyn Error>> {
    let key = EventId::random();
    let request = format!(
        "POST /bus/{topic}/events HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\nidempotency-key: {key}\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{event}",
        event.len()
    );
    for _ in 0..TRIES {
        if let Ok(Ok(true)) = timeout(Duration::from_secs(5), post(address, &request)).await {
            return Ok(());
        }
        sleep(PAUSE).await;
    }
    Err("nobody takes the words".into())
}

/// Whether the answer is 200.
async fn post(address: SocketAddr, request: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.starts_with("HTTP/1.1 200 "))
}
