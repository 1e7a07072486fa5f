//! One fire per due time, whoever makes it.
//!
//! A scheduler claims a due time by a lease, publishes, and hands the lease to nobody ([`FIRED`]). The one that comes second finds it
//! held and waits: either it becomes [`FIRED`], or it runs out because its holder died before it could publish. The leases are all
//! that schedulers need to remember, and what they share.

use std::sync::Arc;
use std::time::Duration;

use pubsub_core::{Acquired, Bus, Event, EventId, LeaseProvider, Result, Timestamp};
use serde_json::json;
use tokio::time::sleep;

use crate::schedule::Schedule;

/// What carries runs; a worker of the workflow engine begins them.
pub(crate) const RUNS: &str = "workflows";

/// How long a scheduler has to publish what it claimed.
const CLAIM: Duration = Duration::from_secs(1);

/// Who holds the claims of what has been fired.
const FIRED: &str = "fired";

/// How long it is remembered what was fired: longer than any scheduler looks back.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// Fires schedules in the name of one scheduler.
#[derive(Clone)]
pub(crate) struct Claims {
    pub(crate) bus: Bus,
    pub(crate) leases: Arc<dyn LeaseProvider>,
    pub(crate) owner: String,
    /// Whether it says what it claimed, and then takes its time: for those who want to see it die in between.
    pub(crate) hesitates: bool,
}

fn run_id(schedule: &str, due: i64) -> String {
    format!("sched_{schedule}_{due}")
}

impl Claims {
    /// Whether this due time has been fired.
    pub(crate) async fn is_fired(&self, schedule: &Schedule, due: i64) -> Result<bool> {
        let holder = self.leases.holder(&run_id(&schedule.id, due)).await?;
        Ok(holder.is_some_and(|lease| lease.owner == FIRED))
    }

    /// Sees to it that a due time is fired, by this scheduler or another. A bus that is away for a while does not lose it.
    pub(crate) async fn fire(self, schedule: String, due: i64) -> Result<()> {
        let run = run_id(&schedule, due);
        // Named by schedule and time: should it be published twice after all, it is the same event.
        let data = json!({ "workflowId": schedule, "runId": run, "prevResult": { "status": "success", "output": {} }, "initialState": {} });
        let start = Event::stamped(EventId::new(&run)?, "workflow.start", Timestamp::now()).with_run_id(&run).with_data(data);
        let start = Arc::new(start);
        persist(|| self.publish(&run, &start)).await?;
        persist(|| self.leases.transfer(&run, &self.owner, FIRED, REMEMBERED)).await?;
        Ok(())
    }

    /// Publishes what is due as soon as it is claimed, unless it is fired by another.
    async fn publish(&self, run: &str, start: &Arc<Event>) -> Result<()> {
        loop {
            match self.leases.acquire(run, &self.owner, CLAIM).await? {
                Acquired::HeldBy(lease) if lease.owner == FIRED => return Ok(()),
                Acquired::HeldBy(lease) => sleep(lease.remaining).await,
                Acquired::Yes(_) => break,
            }
        }
        if self.hesitates {
            self.bus.publish(super::SCHEDULES, Event::new("schedule.claimed").with_run_id(run)).await?;
            sleep(10 * CLAIM).await;
        }
        self.bus.publish(RUNS, start.clone()).await?;
        Ok(())
    }
}

/// Does it again until the bus can.
pub(crate) async fn persist<T, F: Future<Output = Result<T>>>(what: impl Fn() -> F) -> Result<T> {
    loop {
        match what().await {
            Err(error) if error.is_retryable() => sleep(PAUSE).await,
            outcome => return outcome,
        }
    }
}
