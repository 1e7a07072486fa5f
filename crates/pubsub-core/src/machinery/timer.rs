//! Deadlines that come due although nobody polls.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::RetryQueue;
use crate::{Error, ErrorKind, Result};

/// Something with deadlines.
pub trait Due: Send + Sync {
    /// A deadline has come. Returns the next one, if there is any. Called without any lock held.
    fn due(self: Arc<Self>, now: Instant) -> Option<Instant>;
}

/// Wakes things at their deadlines, with one task for all of them, started by the first deadline and ended with the timer.
pub struct Timer {
    shared: Arc<Shared>,
    /// Where its task runs, or is to run.
    home: Mutex<Handle>,
    task: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    deadlines: Mutex<Deadlines>,
    earlier: Notify,
    /// Whether there is a task.
    running: AtomicBool,
    /// Whether the last task ended with its runtime, and its deadlines wait for another.
    cut_off: AtomicBool,
}

#[derive(Default)]
struct Deadlines {
    queue: RetryQueue<Weak<dyn Due>>,
    /// How many there were when those of targets that are gone were last thrown out.
    kept: usize,
    /// How many targets have said that they are gone since.
    gone: usize,
}

impl Deadlines {
    /// A weak reference keeps its target's memory, and a deadline may be hours away: those of targets that are gone must not
    /// gather until then.
    fn push(&mut self, when: Instant, target: Weak<dyn Due>) {
        self.queue.push(when, target);
        if self.queue.len() > 2 * self.kept.max(32) {
            self.sweep();
        }
    }

    fn one_gone(&mut self) {
        self.gone += 1;
        if self.gone > self.queue.len() / 2 {
            self.sweep();
        }
    }

    fn sweep(&mut self) {
        self.queue.retain(|target| target.strong_count() > 0);
        (self.kept, self.gone) = (self.queue.len(), 0);
    }
}

impl Timer {
    /// A timer on the runtime of the caller. It needs tokio's time driver.
    ///
    /// # Errors
    /// Outside a tokio runtime.
    pub fn new() -> Result<Self> {
        let runtime = Handle::try_current()
            .map_err(|error| Error::new(ErrorKind::Backend("needs a tokio runtime".into())).caused_by(error))?;
        let (running, cut_off) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { deadlines: Mutex::default(), earlier: Notify::new(), running, cut_off });
        Ok(Self { shared, home: Mutex::new(runtime), task: Mutex::default() })
    }

    /// The runtime it lives on. While it has no task, its own may have been shut down: then that of the caller, if there is one.
    pub fn runtime(&self) -> Handle {
        let home = || self.home.lock().clone();
        if self.is_running() { home() } else { Handle::try_current().unwrap_or_else(|_| home()) }
    }

    /// Goes on, on the runtime of the caller, if its own was shut down under it. To be called now and then by those who share it
    /// among runtimes; costs nothing otherwise.
    pub fn go_on(&self) {
        if self.shared.cut_off.load(Ordering::Acquire) {
            self.ensure_running();
        }
    }

    /// A target is gone, and with it the need for its deadlines. To be called by its destructor.
    pub fn target_gone(&self) {
        self.shared.deadlines.lock().one_gone();
    }

    fn is_running(&self) -> bool {
        self.shared.running.load(Ordering::Acquire)
    }

    /// Calls `target` at `when`, unless it is gone by then. Any thread, with or without a runtime.
    pub fn call_at(&self, when: Instant, target: Weak<dyn Due>) {
        let earliest = {
            let mut deadlines = self.shared.deadlines.lock();
            let earliest = deadlines.queue.next_due().is_none_or(|next| when < next);
            deadlines.push(when, target);
            earliest
        };
        if earliest || !self.is_running() {
            self.ensure_running();
            self.shared.earlier.notify_one();
        }
    }

    fn ensure_running(&self) {
        let mut task = self.task.lock();
        // On a runtime that was shut down, the task ends before `spawn` returns: go on with the caller's.
        let home = self.home.lock().clone();
        for runtime in [Some(home), Handle::try_current().ok()].into_iter().flatten() {
            if self.is_running() {
                return;
            }
            self.shared.cut_off.store(false, Ordering::Release);
            self.shared.running.store(true, Ordering::Release);
            *task = Some(runtime.spawn(keep_time(Running(self.shared.clone()))));
            *self.home.lock() = runtime;
        }
    }
}

/// The timer's task exists.
struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Release);
        self.0.cut_off.store(true, Ordering::Release);
    }
}

async fn keep_time(running: Running) {
    let shared = &running.0;
    loop {
        let now = Instant::now();
        loop {
            // Its own statement: the lock must not live through the call.
            let next = shared.deadlines.lock().queue.pop_due(now);
            let Some(target) = next else { break };
            let Some(target) = target.upgrade() else { continue };
            let weak = Arc::downgrade(&target);
            if let Some(again) = target.due(now) {
                shared.deadlines.lock().push(again, weak);
            }
        }
        let next = shared.deadlines.lock().queue.next_due();
        let earlier = shared.earlier.notified();
        match next {
            Some(next) => drop(tokio::time::timeout_at(next, earlier).await),
            None => earlier.await,
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some(task) = self.task.get_mut().take() {
            task.abort();
        }
    }
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("deadlines", &self.shared.deadlines.lock().queue.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[derive(Default)]
    struct Counter(AtomicU32);

    impl Due for Counter {
        fn due(self: Arc<Self>, now: Instant) -> Option<Instant> {
            (self.0.fetch_add(1, Ordering::Relaxed) < 2).then(|| now + Duration::from_secs(1))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn calls_at_each_deadline_and_ends_with_its_owner() {
        let timer = Timer::new().unwrap();
        let counter = Arc::new(Counter::default());
        let weak: Weak<dyn Due> = Arc::downgrade(&counter) as _;
        timer.call_at(Instant::now() + Duration::from_secs(60), weak.clone());
        timer.call_at(Instant::now() + Duration::from_secs(1), weak);
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(counter.0.load(Ordering::Relaxed), 1);
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert_eq!(counter.0.load(Ordering::Relaxed), 4);
        drop(timer);
        tokio::task::yield_now().await;
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    }
}
