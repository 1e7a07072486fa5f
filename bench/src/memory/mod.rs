//! The in-process bus, beside channels and a direct call.

pub(crate) mod idle;
mod latency;
pub(crate) mod parties;
pub(crate) mod throughput;

use std::time::Duration;

use pubsub_core::BoxError;
use tokio::runtime::Runtime;

use crate::node;
use crate::report::{Role, Unit};
use crate::rounds::{Contest, Party};

const BACKEND: &str = "memory";

/// Every contest of this backend.
pub(crate) fn contests(peers: bool) -> Vec<Contest> {
    let mut contests = throughput::contests();
    contests.push(latency::contest());
    contests.push(idle::contest());
    if peers {
        node::join(&mut contests);
    }
    contests
}

/// Plays one round on a runtime of its own, so that no round sees what another left behind.
pub(crate) fn on_runtime<T>(within: Duration, round: impl Future<Output = Result<T, BoxError>>) -> Result<T, BoxError> {
    let runtime: Runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(async { tokio::time::timeout(within * 10 + Duration::from_secs(20), round).await });
    runtime.shutdown_timeout(Duration::from_secs(5));
    outcome.map_err(|_| BoxError::from("the round did not end"))?
}
