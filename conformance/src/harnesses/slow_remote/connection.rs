//! The way to the imitated server: calls travel in order, are answered late, and survive cuts and restarts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use pubsub_core::{Error, Result, Status};
use tokio::sync::{mpsc, oneshot, watch};

use super::server::State;

/// How long a call is on its way, and its answer, at most.
const TRAVEL: Duration = Duration::from_millis(2);

/// How many calls travel together.
const TOGETHER: usize = 64;

/// How many calls wait to travel before the next caller waits.
const WAITING: usize = 1024;

/// How often a silent client says that it is alive.
const HEARTBEAT: Duration = Duration::from_millis(200);

/// How long a client waits at most before it connects again.
const BACKOFF: Duration = Duration::from_millis(20);

/// Does something at the server, and hands back what delivers the answer.
type Call = Box<dyn FnOnce(&mut State) -> Answer + Send>;
type Answer = Box<dyn FnOnce() + Send>;

pub(super) struct Server {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    pub(super) weather: watch::Sender<Weather>,
    numbers: AtomicU64,
}

/// What lies between the clients and the server.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weather {
    pub(super) up: bool,
    /// How often all connections were cut.
    pub(super) cuts: u64,
    /// How long everything takes, if that was said.
    pub(super) delay: Option<Duration>,
}

impl Server {
    pub(super) fn new(seed: u64) -> Arc<Self> {
        let weather = watch::Sender::new(Weather { up: true, cuts: 0, delay: None });
        let changed = watch::Sender::new(());
        Arc::new(Self { state: Mutex::new(State::new(seed)), changed, weather, numbers: AtomicU64::new(1) })
    }

    /// A number nobody else has.
    pub(super) fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Changes that readers may wait for.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(super) fn with<R>(&self, act: impl FnOnce(&mut State) -> R) -> R {
        let (done, changed) = {
            let mut state = self.state.lock();
            (act(&mut state), std::mem::take(&mut state.changed))
        };
        if changed {
            self.changed.send_replace(());
        }
        done
    }

    async fn travel(&self) {
        let delay = self.weather.borrow().delay;
        tokio::time::sleep(delay.unwrap_or_else(|| self.with(|state| state.chance_of(TRAVEL)))).await;
    }

    /// A connection, whose task ends when the last clone of its end is gone.
    pub(super) fn connect(self: &Arc<Self>, session: u64, status: watch::Sender<Status>) -> (Link, tokio::task::AbortHandle) {
        let (link, calls) = mpsc::channel(WAITING);
        let mut weather = self.weather.subscribe();
        let cuts = weather.borrow_and_update().cuts;
        self.with(|state| state.heard_of(session));
        let connection = Connection { server: self.clone(), session, weather, cuts, status };
        (Link(link), tokio::spawn(connection.carry(calls)).abort_handle())
    }
}

/// A client's end of its connection. Cheap to clone.
#[derive(Clone)]
pub(super) struct Link(mpsc::Sender<Call>);

impl Link {
    /// Asks the server. Once this waits for the answer the call will be carried out, whether or not anybody waits.
    pub(super) async fn ask<R: Send + 'static>(&self, act: impl FnOnce(&mut State) -> R + Send + 'static) -> Result<R> {
        let (tell, told) = oneshot::channel();
        let call: Call = Box::new(move |state| {
            let done = act(state);
            Box::new(move || drop(tell.send(done)))
        });
        self.0.send(call).await.map_err(|_| Error::closed())?;
        told.await.map_err(|_| Error::closed())
    }
}

struct Connection {
    server: Arc<Server>,
    session: u64,
    weather: watch::Receiver<Weather>,
    cuts: u64,
    status: watch::Sender<Status>,
}

impl Connection {
    async fn carry(mut self, mut calls: mpsc::Receiver<Call>) {
        let mut batch = Vec::new();
        loop {
            let ended = tokio::select! {
                count = calls.recv_many(&mut batch, TOGETHER) => count == 0,
                _ = self.weather.changed() => false,
                () = tokio::time::sleep(HEARTBEAT) => false,
            };
            self.server.travel().await;
            self.heal().await;
            let session = self.session;
            let answers: Vec<Answer> = self.server.with(|state| {
                state.heard_of(session);
                if ended {
                    state.end_session(session);
                }
                batch.drain(..).map(|call| call(state)).collect()
            });
            self.server.travel().await;
            // Cut off before the answers came: calls are numbered, and the server answers one that is repeated as it did at first.
            self.heal().await;
            if ended {
                return;
            }
            self.server.with(|state| state.heard_of(session)); // it acknowledges them
            answers.into_iter().for_each(|answer| answer());
        }
    }

    /// Connects again if the connection is gone.
    async fn heal(&mut self) {
        let connected = |weather: Weather, cuts| weather.up && weather.cuts == cuts;
        let mut now = *self.weather.borrow_and_update();
        if connected(now, self.cuts) {
            return;
        }
        self.tell(Status::Reconnecting { since: SystemTime::now() });
        while !connected(now, self.cuts) {
            // The sender lives as long as the server, which lives as long as this.
            let _ = self.weather.wait_for(|weather| weather.up).await;
            tokio::time::sleep(self.server.with(|state| state.chance_of(BACKOFF))).await;
            now = *self.weather.borrow_and_update();
            self.cuts = now.cuts;
        }
        self.tell(Status::Connected);
    }

    fn tell(&self, now: Status) {
        self.status.send_if_modified(|status| {
            let open = !matches!(status, Status::Closed);
            if open {
                *status = now;
            }
            open
        });
    }
}
