//! Streams and pushes over HTTP on the loopback, beside a bare axum stream of the same bytes and a bare loop of a client.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use axum::routing::{get, post};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use pubsub_core::{BoxError, Bus, wire};
use pubsub_emitter::EventEmitterPubSub;
use pubsub_http::{Access, Form, HttpBuilder, Intake, Push, Pushed, Secret, ServeOptions, Verdict, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinSet;

use crate::event::build;
use crate::memory::on_runtime;
use crate::report::{Role, Unit};
use crate::rounds::{Contest, Party};

pub(crate) const BACKEND: &str = "http";

/// The party that writes the same bytes without a bus.
pub(crate) const BARE: &str = "bare axum";

/// The party that posts without a bus.
pub(crate) const LOOP: &str = "bare client";

/// How many events are published before it is asked whether all clients have those of the time before: twice as many are on their way.
const STEP: u64 = 128;

/// What waits for one client at most; never reached, since the publisher is paced.
const QUEUE: usize = 1024;

/// How many closing braces an event has in its JSON form: its own and its data's. Nothing else on the wire has any.
const BRACES: u64 = 2;

/// How many pushes are on their way at a time.
const IN_FLIGHT: usize = 16;

pub(crate) fn contests() -> Vec<Contest> {
    let streams = [("to 1 stream", 1), ("to 100 streams", 100), ("to 1000 streams", 1000)].map(|(setting, clients)| {
        let ours = move |time| on_runtime(time, stream_ours(clients, time));
        let bare = move |time| on_runtime(time, stream_bare(clients, time));
        let parties = vec![Party::new("ours", Role::Ours, ours), Party::new(BARE, Role::Limit, bare)];
        Contest { backend: BACKEND, settings: vec![(setting, Unit::Deliveries)], rounds: None, parties }
    });
    let pushes = Contest {
        backend: BACKEND,
        settings: vec![("push", Unit::Events)],
        rounds: None,
        parties: vec![
            Party::new("ours", Role::Ours, |time| on_runtime(time, push_ours(time))),
            Party::new(LOOP, Role::Limit, |time| on_runtime(time, push_bare(time))),
        ],
    };
    streams.into_iter().chain([pushes]).collect()
}

async fn served(router: Router, tasks: &mut JoinSet<Result<(), BoxError>>) -> Result<SocketAddr, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tasks.spawn(async move { Ok(serve(listener, router, ServeOptions::new(), std::future::pending()).await?) });
    Ok(address)
}

/// How far all clients together are.
#[derive(Default)]
struct Progress {
    steps: AtomicU64,
    news: Notify,
}

/// Reads a stream and counts its events.
async fn read(address: SocketAddr, progress: Arc<Progress>) -> Result<(), BoxError> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"GET /t/events HTTP/1.1\r\nhost: x\r\n\r\n").await?;
    let mut buffer = vec![0; 64 << 10];
    let (mut braces, mut steps) = (0_u64, 0);
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Err("a stream ended".into());
        }
        braces += buffer[..read].iter().filter(|byte| **byte == b'}').count() as u64;
        let reached = braces / BRACES / STEP;
        if reached > steps {
            progress.steps.fetch_add(reached - steps, Ordering::AcqRel);
            progress.news.notify_one();
            steps = reached;
        }
    }
}

/// Publishes, no faster than the slowest client, and says how many events all clients have read per second.
async fn paced<F: Future<Output = Result<(), BoxError>>>(
    clients: u64,
    progress: &Progress,
    time: Duration,
    mut publish: impl FnMut(u64) -> F,
) -> Result<Vec<f64>, BoxError> {
    let started = Instant::now();
    let mut steps = 0;
    let reached = async |steps: u64| {
        while progress.steps.load(Ordering::Acquire) < steps * clients {
            progress.news.notified().await;
        }
    };
    while started.elapsed() < time {
        for number in 0..STEP {
            publish(steps * STEP + number).await?;
        }
        steps += 1;
        reached(steps - 1).await;
    }
    reached(steps).await;
    Ok(vec![(steps * STEP * clients) as f64 / started.elapsed().as_secs_f64()])
}

async fn stream_ours(clients: u64, time: Duration) -> Result<Vec<f64>, BoxError> {
    let bus = Bus::from(EventEmitterPubSub::new());
    let http = HttpBuilder::new(bus.clone()).authorize(|_: Access<'_>| Verdict::Allow).prefetch(QUEUE);
    let mut tasks = JoinSet::new();
    let address = served(http.build()?, &mut tasks).await?;
    let progress = Arc::new(Progress::default());
    (0..clients).for_each(|_| drop(tasks.spawn(read(address, progress.clone()))));
    while bus.inspect("t").await?.fan_out != Some(clients) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    paced(clients, &progress, time, |number| {
        let published = bus.publish("t", build(number));
        async move { Ok(published.await.map(drop)?) }
    })
    .await
}

/// The least that a stream does: an axum response whose body is a channel of what is to be written, written out once for all.
async fn stream_bare(clients: u64, time: Duration) -> Result<Vec<f64>, BoxError> {
    let (events, _) = broadcast::channel::<Bytes>(QUEUE);
    let source = events.clone();
    let follow = move || {
        let body = futures::stream::unfold(source.subscribe(), async |mut events| {
            let event = events.recv().await.ok()?;
            Some((Ok::<_, Infallible>(event), events))
        });
        let response = Response::builder().header("content-type", "text/event-stream").body(Body::from_stream(body));
        std::future::ready(response.expect("it is well formed"))
    };
    let mut tasks = JoinSet::new();
    let address = served(Router::new().route("/t/events", get(follow)), &mut tasks).await?;
    let progress = Arc::new(Progress::default());
    (0..clients).for_each(|_| drop(tasks.spawn(read(address, progress.clone()))));
    while events.receiver_count() as u64 != clients {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    paced(clients, &progress, time, |number| {
        let sent = wire::encode(&build(number)).map(|json| {
            let text = [b"data: ", &*json, b"\n\n"].concat();
            events.send(text.into())
        });
        async move {
            sent??;
            tokio::task::consume_budget().await;
            Ok(())
        }
    })
    .await
}

async fn push_ours(time: Duration) -> Result<Vec<f64>, BoxError> {
    let bus = Bus::from(EventEmitterPubSub::new());
    let secret = Secret::new("a secret of the benchmark")?;
    let count = Arc::new(AtomicU64::new(0));
    let taken = count.clone();
    let router = Intake::new(Form::Events).secret(secret.clone()).remembered(1 << 20).handle(move |_: Pushed| {
        taken.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok(()))
    })?;
    let mut tasks = JoinSet::new();
    let url = format!("http://{}/", served(router, &mut tasks).await?);
    let mut subscription = bus.subscribe_group("t", "push").await?;
    let push = Push::to(url).secret(secret).allow_private(true).in_flight(IN_FLIGHT).build()?;
    tasks.spawn(async move { Ok(push.run(&mut subscription).await.map(drop)?) });
    let started = Instant::now();
    let mut number = 0;
    while started.elapsed() < time {
        bus.publish("t", build(number)).await?; // waits when the group's queue is full
        number += 1;
    }
    Ok(vec![count.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64()])
}

async fn take(_: Bytes) -> ::http::StatusCode {
    ::http::StatusCode::NO_CONTENT
}

/// The least that pushing does: a client that posts the same bodies, and a handler that reads them.
async fn push_bare(time: Duration) -> Result<Vec<f64>, BoxError> {
    let mut tasks = JoinSet::new();
    let url: ::http::Uri = format!("http://{}/", served(Router::new().route("/", post(take)), &mut tasks).await?).parse()?;
    let client: Client<HttpConnector, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let count = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    for first in 0..IN_FLIGHT as u64 {
        let (client, url, count) = (client.clone(), url.clone(), count.clone());
        tasks.spawn(async move {
            for number in (first..).step_by(IN_FLIGHT) {
                let body = Full::new(Bytes::from(wire::encode(&build(number))?));
                let request = ::http::Request::post(url.clone()).header("content-type", "application/json").body(body)?;
                let response = client.request(request).await?;
                response.into_body().collect().await?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
    }
    tokio::time::sleep(time.saturating_sub(started.elapsed())).await;
    Ok(vec![count.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64()])
}
