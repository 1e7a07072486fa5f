//! What lies between clients and their server: it can hold everything back, or make it take longer. It runs on a runtime of its own,
//! so that a property's count of tasks does not see it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::LazyLock;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.expect("a runtime can be made")
});

/// How much is carried at a time.
const PIECE: usize = 64 << 10;

/// How many pieces are on their way at a time.
const ON_THE_WAY: usize = 64;

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Weather {
    pub(super) out: bool,
    pub(super) delay: Duration,
}

pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    pub(super) weather: watch::Sender<Weather>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    pub(super) fn start(server: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let weather = watch::Sender::new(Weather::default());
        let seen = weather.subscribe();
        let _inside = RUNTIME.enter();
        let listener = TcpListener::from_std(listener)?;
        let accepting = RUNTIME.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, server, seen.clone()));
            }
        });
        Ok(Self { address, weather, accepting })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.weather.send_modify(|weather| weather.out = false);
    }
}

async fn carry(client: TcpStream, server: SocketAddr, weather: watch::Receiver<Weather>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // Either end closing closes both.
    tokio::select! {
        () = pass(from_client, to_server, weather.clone()) => {}
        () = pass(from_server, to_client, weather) => {}
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
) {
    let (send, mut on_the_way) = mpsc::channel::<(Instant, Bytes)>(ON_THE_WAY);
    let delays = weather.clone();
    let reading = async move {
        let mut buffer = BytesMut::with_capacity(PIECE);
        while from.read_buf(&mut buffer).await.is_ok_and(|count| count > 0) {
            let due = Instant::now() + delays.borrow().delay;
            if send.send((due, buffer.split().freeze())).await.is_err() {
                return;
            }
            buffer.reserve(PIECE);
        }
    };
    let writing = async move {
        while let Some((due, piece)) = on_the_way.recv().await {
            tokio::time::sleep_until(due).await;
            if weather.wait_for(|weather| !weather.out).await.is_err() || to.write_all(&piece).await.is_err() {
                return;
            }
        }
    };
    futures::future::join(reading, writing).await;
}
