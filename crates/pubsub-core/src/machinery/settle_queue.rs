//! Settlements on their way to a server: recorded at once, sent in batches, answered later.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::{Receipt, Settled};

/// Records settlements without blocking and hands them to whoever sends them.
///
/// It has no bound of its own: what is recorded was in flight, and that is bounded by `max_in_flight`. What still waits to be
/// sent when the last of the queue's handles and open settlements is dropped is [`Settled::Unconfirmed`].
pub struct SettleQueue<T>(Arc<Shared<T>>);

struct Shared<T> {
    state: Mutex<State<T>>,
    recorded: Notify,
    answered: Notify,
}

struct State<T> {
    /// Not open settlements yet: those refer to this queue, which would then keep itself alive.
    waiting: VecDeque<(T, u64, oneshot::Sender<Settled>)>,
    /// Numbers of all that were recorded and not answered.
    open: BTreeSet<u64>,
    next: u64,
}

/// A settlement that was recorded and waits for its answer. Dropped, it is [`Settled::Unconfirmed`].
pub struct OpenSettlement<T> {
    what: T,
    answer: Option<oneshot::Sender<Settled>>,
    number: u64,
    queue: Arc<dyn Answered>,
}

trait Answered: Send + Sync {
    fn answered(&self, number: u64);
}

impl<T: Send> Answered for Shared<T> {
    fn answered(&self, number: u64) {
        self.state.lock().open.remove(&number);
        self.answered.notify_waiters();
    }
}

impl<T: Send + 'static> SettleQueue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        let state = State { waiting: VecDeque::new(), open: BTreeSet::new(), next: 0 };
        Self(Arc::new(Shared { state: Mutex::new(state), recorded: Notify::new(), answered: Notify::new() }))
    }

    /// Records a settlement. It will be sent whether or not the receipt is polled.
    pub fn record(&self, what: T) -> Receipt {
        let (answer, receipt) = Receipt::pending();
        {
            let mut state = self.0.state.lock();
            let number = state.next;
            state.next += 1;
            state.open.insert(number);
            state.waiting.push_back((what, number, answer));
        }
        self.0.recorded.notify_one();
        receipt
    }

    /// Waits for settlements and takes up to `most`, in the order they were recorded. For one caller at a time. Cancel safe.
    pub async fn next_batch(&self, most: usize) -> Vec<OpenSettlement<T>> {
        loop {
            {
                let mut state = self.0.state.lock();
                if !state.waiting.is_empty() {
                    let count = state.waiting.len().min(most);
                    let open =
                        |(what, number, answer)| OpenSettlement { what, answer: Some(answer), number, queue: self.0.clone() };
                    return state.waiting.drain(..count).map(open).collect();
                }
            }
            self.0.recorded.notified().await;
        }
    }

    /// Waits until everything recorded before this call has been answered. Cancel safe.
    pub async fn flush(&self) {
        let before = self.0.state.lock().next;
        loop {
            let answered = self.0.answered.notified();
            if self.0.state.lock().open.first().is_none_or(|first| *first >= before) {
                return;
            }
            answered.await;
        }
    }

    /// How many were recorded and not answered yet.
    pub fn open(&self) -> usize {
        self.0.state.lock().open.len()
    }
}

impl<T: Send + 'static> Default for SettleQueue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Clone for SettleQueue<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> fmt::Debug for SettleQueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SettleQueue").field("open", &self.0.state.lock().open.len()).finish()
    }
}

impl<T> OpenSettlement<T> {
    /// What is to be settled.
    pub fn what(&self) -> &T {
        &self.what
    }

    /// What is to be settled, for whoever settles it to take from.
    pub fn what_mut(&mut self) -> &mut T {
        &mut self.what
    }

    /// Gives the answer to whoever holds the receipt.
    pub fn answer(mut self, settled: Settled) {
        if let Some(answer) = self.answer.take() {
            let _ = answer.send(settled); // nobody may be waiting
        }
    }
}

impl<T> Drop for OpenSettlement<T> {
    fn drop(&mut self) {
        self.answer.take(); // unanswered means unconfirmed
        self.queue.answered(self.number);
    }
}

impl<T: fmt::Debug> fmt::Debug for OpenSettlement<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenSettlement").field("what", &self.what).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn sends_in_order_and_answers_each() {
        let queue = SettleQueue::new();
        let (a, b) = (queue.record('a'), queue.record('b'));
        drop(queue.record('c'));
        assert!(queue.flush().now_or_never().is_none());
        let mut batch = queue.next_batch(2).await.into_iter();
        batch.next().unwrap().answer(Settled::TooLate);
        drop(batch);
        assert_eq!((a.await, b.await), (Settled::TooLate, Settled::Unconfirmed));
        for open in queue.next_batch(9).await {
            assert_eq!(*open.what(), 'c');
            open.answer(Settled::Done);
        }
        queue.flush().now_or_never().expect("all answered");
        assert!(queue.next_batch(1).now_or_never().is_none());
    }

    #[tokio::test]
    async fn what_nobody_will_send_is_unconfirmed() {
        let queue = SettleQueue::new();
        let (sent, unsent) = (queue.record(1), queue.record(2));
        let batch = queue.next_batch(1).await;
        drop(queue);
        batch.into_iter().for_each(|open| open.answer(Settled::Done));
        assert_eq!(sent.now_or_never(), Some(Settled::Done));
        assert_eq!(unsent.now_or_never(), Some(Settled::Unconfirmed), "it went with its queue");
    }
}
