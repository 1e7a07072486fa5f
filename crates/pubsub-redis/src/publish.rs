//! Where publishers hand in their events, and get what came of them.
//!
//! A publisher that finds nothing else to be done sends its events itself; else they wait for the writer's task (`writer.rs`), which is also
//! whom the answers wake. Either way those of one publisher keep their order: nobody sends anything while something waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use pubsub_core::Fate;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::RedisBuilder;
use crate::add::{Retention, Shared};
use crate::entry::EntryId;
use crate::errors::Fault;
use crate::lane::{Answer, Failed, Reply};
use crate::link::Link;
use crate::writer::{Desk, Task};

/// How many publish calls wait for the writer before the next one waits to be taken; and how many it works on.
pub(crate) const WAITING_CALLS: usize = 1024;

pub(crate) struct Job {
    pub(crate) stream: Arc<str>,
    pub(crate) events: Vec<Bytes>,
    /// Set by whoever comes first: the writer that starts on it, or the caller who gives up.
    pub(crate) claimed: Arc<AtomicBool>,
    pub(crate) reply: Reply,
}

/// Where publishers hand in their events. The writer's task ends with the last clone.
#[derive(Clone)]
pub(crate) struct Writer {
    jobs: mpsc::Sender<Job>,
    desk: Arc<Desk>,
}

impl Writer {
    pub(crate) fn start(link: Arc<Link>, id: i64, options: &RedisBuilder) -> Self {
        let (jobs, handed_in) = mpsc::channel(WAITING_CALLS);
        let shared = Shared {
            link,
            publisher: format!("{:016x}", fastrand::u64(..)).into(),
            retention: Retention::new(options),
            patience: options.publish_timeout,
        };
        let desk = Arc::new(Mutex::new(None));
        tokio::spawn(Task::new(shared, id).run(desk.clone(), handed_in));
        Self { jobs, desk }
    }

    /// Writes events to a stream and returns their ids; waits to be taken for this long at most, and for all of it until then. Once it
    /// waits for the answer they are written whether or not anybody waits.
    pub(crate) async fn publish(
        &self,
        stream: Arc<str>,
        events: Vec<Bytes>,
        wait: Duration,
        until: Instant,
    ) -> Result<Vec<EntryId>, Failed> {
        let (count, claimed) = (events.len(), Arc::new(AtomicBool::new(false)));
        let not_sent = |fault| Failed::all(fault, Fate::NotSent, count);
        let (reply, answer) = oneshot::channel();
        let job = Job { stream, events, claimed: claimed.clone(), reply };
        let closed = || Fault::Unknown("the connection was closed".into());
        match self.send(job).or_else(|job| self.jobs.try_send(job)) {
            Ok(()) => {}
            Err(TrySendError::Closed(_)) => return Err(not_sent(closed())),
            Err(TrySendError::Full(job)) => match timeout_at(until.min(Instant::now() + wait), self.jobs.send(job)).await {
                Err(_) => return Err(not_sent(Fault::Full)),
                Ok(Err(_)) => return Err(not_sent(closed())),
                Ok(Ok(())) => {}
            },
        }
        match timeout_at(until, answer).await {
            Ok(Ok(outcome)) => outcome,
            Err(_) if !claimed.swap(true, Ordering::AcqRel) => {
                Err(not_sent(Fault::Unknown("it was not written within publish_timeout".into())))
            }
            Ok(Err(_)) | Err(_) => {
                let fault = Fault::Unknown("it was not confirmed within publish_timeout".into());
                Err(Failed::all(fault, Fate::Unknown, count))
            }
        }
    }

    /// Sends a job at once; gives it back if something is before it, or the writer is gone.
    fn send(&self, job: Job) -> Result<(), Job> {
        let answers = {
            let mut desk = self.desk.try_lock();
            // What waits is taken under the same lock.
            match desk.as_deref_mut().and_then(Option::as_mut).filter(|_| self.jobs.capacity() == WAITING_CALLS) {
                Some(task) => task.take(job)?,
                None => return Err(job),
            }
        };
        answers.into_iter().for_each(Answer::tell);
        Ok(())
    }

    /// Waits until what was handed in before has its answer.
    pub(crate) async fn flush(&self) {
        let (reply, answer) = oneshot::channel();
        let job = Job { stream: "".into(), events: Vec::new(), claimed: Arc::default(), reply };
        if self.jobs.send(job).await.is_ok() {
            let _ = answer.await; // a writer that is gone has nothing left
        }
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
