//! The workflow itself: what becomes of an order. Its steps may be carried out more than once, and come to the same each time.

use std::time::Duration;

use pubsub_core::Failure;
use serde_json::{Value, json};

use crate::engine::{Run, Step, Workflow};

pub(crate) const WORKFLOW: Workflow = Workflow {
    id: "order",
    steps: &[
        Step::Task("check"),
        Step::Parallel(&["reserve", "charge"]),
        Step::Branch { when: is_dear, then: &Step::Suspend("approve"), otherwise: &Step::Task("express") },
        Step::Sleep("cool-off", Duration::from_millis(300)),
        Step::Task("ship"),
    ],
    task: |step, run, attempt| Box::pin(task(step, run, attempt)),
};

fn price(run: &Run) -> i64 {
    run.initial_state["price"].as_i64().unwrap_or_default()
}

fn is_dear(run: &Run) -> bool {
    price(run) > 100
}

/// What the tasks do, each for a while.
async fn task(step: &str, run: &Run, attempt: u32) -> Result<Value, Failure> {
    tokio::time::sleep(Duration::from_millis(200)).await;
    match step {
        "check" if price(run) < 0 => Err(Failure::retry("has no price")),
        "charge" if attempt == 1 && price(run) % 60 == 0 => Err(Failure::retry("the bank does not answer")),
        "charge" => Ok(json!({ "charged": price(run) })),
        _ => Ok(json!({ step: "done" })),
    }
}
