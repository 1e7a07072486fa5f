//! Closing once, however many ask for it.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::timeout;

use super::{DeliveryQueue, InstanceId};
use crate::{Closed, Error, Result};

/// The one close of an instance (clause C2): all who ask for it learn what it left, and it comes to its end though nobody waits any more.
#[derive(Debug)]
pub struct Closing<T = Closed>(OnceLock<watch::Receiver<Option<T>>>);

impl<T> Default for Closing<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<T: Clone + Send + Sync + 'static> Closing<T> {
    /// Whether it has begun.
    pub fn has_begun(&self) -> bool {
        self.0.get().is_some()
    }

    /// Closes by `end`, in a task of its own, unless it has begun already; returns whether it begins here. `end` itself is called before
    /// this returns.
    pub fn begin<F: Future<Output = T> + Send + 'static>(&self, runtime: &Handle, end: impl FnOnce() -> F) -> bool {
        let (tell, ended) = watch::channel(None);
        let begins = self.0.set(ended).is_ok();
        if begins {
            let ending = end();
            runtime.spawn(async move { tell.send_replace(Some(ending.await)) });
        }
        begins
    }

    /// The same where nothing has to be waited for. It needs no runtime.
    pub fn at_once(&self, closed: T) -> bool {
        self.0.set(watch::Sender::new(Some(closed)).subscribe()).is_ok()
    }

    /// Waits until it has ended, and says what it left. Dropping the future stops nothing.
    ///
    /// # Errors
    /// `Closed` if it has not begun, or its runtime has ended first.
    pub async fn ended(&self) -> Result<T> {
        let ended = self.0.get().cloned();
        let closed = async { ended?.wait_for(Option::is_some).await.ok()?.clone() };
        closed.await.ok_or_else(|| Error::closed().during("close"))
    }
}

/// The end of an instance whose deliveries are all in queues: waits until nothing is queued for it or held by it, but not for longer than
/// `within`, takes back the rest, and ends the queues.
pub async fn end_queues(queues: Vec<Arc<DeliveryQueue>>, instance: InstanceId, within: Duration) -> Closed {
    drop(timeout(within, join_all(queues.iter().map(|queue| queue.relieved(instance)))).await);
    let mut closed = Closed::default();
    for queue in queues {
        closed.released += queue.burden(instance).1;
        closed.cut_off += queue.revoke(instance);
        queue.end();
    }
    closed
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::ErrorKind;

    #[tokio::test]
    async fn it_happens_once_also_if_nobody_waits() {
        let closing = Closing::default();
        assert!(!closing.has_begun() && closing.ended().await.is_err());
        let (go, gate) = tokio::sync::oneshot::channel::<()>();
        assert!(closing.begin(&Handle::current(), || async { gate.await.map_or(0, |()| 1) }));
        assert!(!closing.begin(&Handle::current(), || async { 2 }) && !closing.at_once(3));
        assert!(closing.has_begun() && closing.ended().now_or_never().is_none());
        go.send(()).unwrap();
        assert_eq!(closing.ended().await.unwrap(), 1);
        assert_eq!(closing.ended().await.unwrap(), 1);
    }

    #[test]
    fn without_a_runtime_and_beyond_it() {
        let closing = Closing::default();
        closing.at_once(1);
        assert_eq!(closing.ended().now_or_never().unwrap().unwrap(), 1);
        let closing = Closing::default();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        closing.begin(runtime.handle(), std::future::pending::<u8>);
        drop(runtime);
        assert_eq!(closing.ended().now_or_never().unwrap().unwrap_err().kind(), &ErrorKind::Closed);
    }
}
