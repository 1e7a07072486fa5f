//! A future that goes on when it is dropped.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::runtime::Handle;

/// Polled in place; dropped unfinished, it ends in a task of its own. For what must not be left half done.
pub(crate) struct Carried<T: Send + 'static>(Option<BoxFuture<'static, T>>);

impl<T: Send + 'static> Carried<T> {
    pub(crate) fn new(future: impl Future<Output = T> + Send + 'static) -> Self {
        Self(Some(future.boxed()))
    }
}

impl<T: Send + 'static> Future for Carried<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // Out of its place meanwhile: one that panics has ended.
        let mut future = self.0.take().expect("not polled after it has ended");
        let done = future.poll_unpin(cx);
        if done.is_pending() {
            self.0 = Some(future);
        }
        done
    }
}

impl<T: Send + 'static> Drop for Carried<T> {
    fn drop(&mut self) {
        // Without a runtime there is nobody to go on, and nothing below could either.
        if let (Some(future), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn(future);
        }
    }
}
