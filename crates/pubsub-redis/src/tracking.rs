//! Being told by the server which of many streams have changed (`CLIENT TRACKING`).
//!
//! Reading a stream makes the server remember it for the connection, until it says once that the stream has changed; reading it again
//! does so again. So nothing is missed between a read and the next change. What the server remembers goes with the connection, and
//! with `FLUSHALL`, of which the client library passes nothing on. Therefore everything is read after a reconnect, and a part of
//! everything all the time, so that whatever became of tracking, no topic goes unread for longer than [`SWEEP`].

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fred::interfaces::{EventInterface, TrackingInterface};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use crate::errors::Fault;
use crate::link::{Cmd, Link};

/// Within which time every topic is read, though nothing was said of it.
pub(crate) const SWEEP: Duration = Duration::from_secs(5);

/// In how many parts.
const PARTS: u32 = 20;

/// The streams that have changed, and the bell for who reads them.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    changed: Mutex<HashSet<Arc<str>>>,
    /// More may have changed than is known.
    unsure: AtomicBool,
    bell: Notify,
}

impl Changes {
    pub(crate) fn bell(&self) -> &Notify {
        &self.bell
    }

    pub(crate) fn add(&self, streams: impl IntoIterator<Item = Arc<str>>) {
        self.changed.lock().extend(streams);
        self.bell.notify_one();
    }

    /// So many of them at most.
    pub(crate) fn take(&self, most: usize) -> HashSet<Arc<str>> {
        let mut changed = self.changed.lock();
        if changed.len() <= most {
            return std::mem::take(&mut changed);
        }
        let some: HashSet<_> = changed.iter().take(most).cloned().collect();
        changed.retain(|stream| !some.contains(stream));
        some
    }

    fn doubt(&self) {
        self.unsure.store(true, Ordering::Release);
        self.bell.notify_one();
    }
}

/// The tracking of one connection; it is listened to until this is dropped.
pub(crate) struct Tracking {
    changes: Arc<Changes>,
    listener: AbortHandle,
    /// What of everything is still to be read in this round, and when its next part is.
    round: Vec<Arc<str>>,
    part: usize,
    next_part: Instant,
}

impl Tracking {
    /// Listens; [`prepare`](Self::prepare) switches it on.
    pub(crate) fn begin(link: &Link, changes: Arc<Changes>) -> Self {
        let client = link.client();
        let (mut invalidations, mut reconnects) = (client.invalidation_rx(), client.reconnect_rx());
        changes.doubt();
        let told = changes.clone();
        let listening = async move {
            loop {
                tokio::select! {
                    told_of = invalidations.recv() => match told_of {
                        Ok(one) => {
                            let keys = |keys: Vec<fred::types::Key>| keys.into_iter().filter_map(|key| key.as_str().map(Arc::from));
                            let mut streams: Vec<Arc<str>> = keys(one.keys).collect();
                            while let Ok(one) = invalidations.try_recv() {
                                streams.extend(keys(one.keys));
                            }
                            told.add(streams);
                        }
                        Err(RecvError::Lagged(_)) => told.doubt(),
                        Err(RecvError::Closed) => return,
                    },
                    again = reconnects.recv() => match again {
                        Ok(_) | Err(RecvError::Lagged(_)) => told.doubt(),
                        Err(RecvError::Closed) => return,
                    },
                }
            }
        };
        let listener = tokio::spawn(listening).abort_handle();
        Self { changes, listener, round: Vec::new(), part: 0, next_part: Instant::now() + SWEEP / PARTS }
    }

    /// Makes sure that the server tells. Returns whether everything has to be read, as it may not have told so far.
    pub(crate) async fn prepare(&self, link: &Link) -> Result<bool, Fault> {
        if !self.changes.unsure.swap(false, Ordering::AcqRel) {
            return Ok(false);
        }
        match link.call(Cmd::new("CLIENT").arg("TRACKING").arg("ON")).await {
            Ok(_) => Ok(true),
            Err(fault) => {
                self.changes.doubt();
                Err(fault)
            }
        }
    }

    /// Waits until something has changed, or a part of everything is due.
    pub(crate) async fn wait(&mut self, changes: &Changes, everything: impl Fn() -> Vec<Arc<str>>) {
        if timeout_at(self.next_part, changes.bell.notified()).await.is_ok() {
            return;
        }
        self.next_part = Instant::now() + SWEEP / PARTS;
        if self.round.is_empty() {
            self.round = everything();
            self.part = self.round.len().div_ceil(PARTS as usize);
        }
        let rest = self.round.len().saturating_sub(self.part);
        changes.add(self.round.drain(rest..));
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        self.listener.abort();
    }
}
