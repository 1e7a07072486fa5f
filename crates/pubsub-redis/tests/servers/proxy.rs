//! What lies between the bus and its server: it carries, and when there is a storm it delays, cuts in the middle of what it carries, and
//! resets.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// How much is carried at a time.
const PIECE: usize = 16 << 10;

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    chance: Mutex<fastrand::Rng>,
    storm: AtomicBool,
    /// Nothing is carried back to the clients: what they asked for is done, and they do not hear of it.
    deaf: AtomicBool,
    cuts: AtomicU64,
}

/// What becomes of a piece.
enum Fate {
    Carried {
        after: Duration,
    },
    /// So much of it is carried, then the connection ends, and without a word if it is reset.
    Cut {
        carried: usize,
        reset: bool,
    },
}

impl Proxy {
    pub(crate) async fn start(server: SocketAddr, seed: u64) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let chance = Mutex::new(fastrand::Rng::with_seed(seed));
        let shared = Arc::new(Shared { chance, storm: false.into(), deaf: false.into(), cuts: 0.into() });
        let of_accepting = shared.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let shared = of_accepting.clone();
                tokio::spawn(async move { carry(client, server, shared).await });
            }
        });
        Ok(Self { address, shared, accepting })
    }

    pub(crate) fn storm(&self, on: bool) {
        self.shared.storm.store(on, Ordering::SeqCst);
    }

    pub(crate) fn deafen(&self, on: bool) {
        self.shared.deaf.store(on, Ordering::SeqCst);
    }

    /// How many connections it has ended.
    pub(crate) fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    fn fate(&self, size: usize) -> Fate {
        let mut chance = self.chance.lock();
        if !self.storm.load(Ordering::SeqCst) {
            return Fate::Carried { after: Duration::ZERO };
        }
        match chance.u32(0..1000) {
            0..8 => Fate::Cut { carried: chance.usize(0..=size), reset: chance.bool() },
            8..60 => Fate::Carried { after: Duration::from_millis(chance.u64(1..40)) },
            _ => Fate::Carried { after: Duration::ZERO },
        }
    }
}

async fn carry(client: TcpStream, server: SocketAddr, shared: Arc<Shared>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // Either end closing closes both.
    tokio::select! {
        () = pass(from_client, to_server, &shared, false) => {}
        () = pass(from_server, to_client, &shared, true) => {}
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared, back: bool) {
    let mut piece = vec![0; PIECE];
    while let Ok(size @ 1..) = from.read(&mut piece).await {
        if back && shared.deaf.load(Ordering::SeqCst) {
            shared.cuts.fetch_add(1, Ordering::SeqCst);
            return;
        }
        match shared.fate(size) {
            Fate::Carried { after } => {
                if !after.is_zero() {
                    tokio::time::sleep(after).await;
                }
                if to.write_all(&piece[..size]).await.is_err() {
                    return;
                }
            }
            Fate::Cut { carried, reset } => {
                shared.cuts.fetch_add(1, Ordering::SeqCst);
                let _ = to.write_all(&piece[..carried]).await;
                if reset {
                    let _ = to.as_ref().set_zero_linger();
                    let _ = from.as_ref().set_zero_linger();
                }
                return;
            }
        }
    }
}
