//! A worker: takes tasks off queues, no more of each at once than the queue allows, and tells what becomes of them.

use std::collections::VecDeque;
use std::future::pending;
use std::time::Duration;

use futures::TryStreamExt;
use pubsub_core::{Bus, Event, Failure, Group, Message, Result, RetryPolicy, SubscribeOptions, Subscription};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;

/// Where everybody hears what becomes of tasks.
pub(crate) const RESULT: &str = "background-tasks-result";
/// What every worker hears: which tasks are cancelled.
pub(crate) const CONTROL: &str = "background-tasks-control";
const GROUP: &str = "background-task-workers";

/// How many cancelled tasks a worker keeps in mind, for those that it has not been given yet.
const CANCELS_KEPT: usize = 1000;

/// A queue, and how much of it one worker takes on.
pub(crate) struct Queue {
    pub(crate) topic: &'static str,
    pub(crate) at_once: usize,
}

pub(crate) const QUEUES: [Queue; 2] =
    [Queue { topic: "background-tasks", at_once: 4 }, Queue { topic: "background-tasks.render", at_once: 1 }];

/// What is dispatched, and what is resumed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Task {
    pub(crate) task_id: String,
    tool_name: String,
    args: Value,
    timeout_ms: u64,
    max_retries: u32,
    #[serde(default)]
    pub(crate) resume_data: Option<Value>,
}

impl Task {
    pub(crate) fn new(id: &str, tool: &str, args: Value, timeout_ms: u64, max_retries: u32) -> Self {
        let (task_id, tool_name) = (id.to_owned(), tool.to_owned());
        Self { task_id, tool_name, args, timeout_ms, max_retries, resume_data: None }
    }
}

/// How a tool ends, unless it fails.
enum Outcome {
    Completed(Value),
    Suspended(Value),
}

pub(crate) struct Worker {
    bus: Bus,
    name: String,
    cancelled: watch::Sender<VecDeque<String>>,
}

impl Worker {
    pub(crate) fn new(bus: Bus, name: String) -> Self {
        Self { bus, name, cancelled: watch::Sender::default() }
    }

    pub(crate) fn options(&self) -> Result<SubscribeOptions> {
        // The worker counts attempts, as each task says. A task that the bus gave up nobody would hear of again.
        let retry = RetryPolicy::new().max_attempts(0).backoff(Duration::from_millis(50), Duration::from_millis(500));
        Ok(SubscribeOptions::group(Group::new(GROUP)?).retry(retry))
    }

    /// Works a queue until the bus is closed.
    pub(crate) async fn work(&self, queue: &Queue, tasks: &mut Subscription) -> Result<()> {
        tasks.run(queue.at_once, async |message| self.handle(queue, &message).await).await?;
        Ok(())
    }

    /// Takes note of what is cancelled.
    pub(crate) async fn heed(&self, mut control: Subscription) -> Result<()> {
        while let Some(delivery) = control.try_next().await? {
            if let Some(task) = delivery.data::<Value>()?["taskId"].as_str() {
                self.cancelled.send_modify(|cancelled| {
                    cancelled.truncate(CANCELS_KEPT - 1);
                    cancelled.push_front(task.to_owned());
                });
            }
        }
        Ok(())
    }

    async fn handle(&self, queue: &Queue, message: &Message) -> Result<(), Failure> {
        let Ok(task) = message.data::<Task>() else { return Err(Failure::dead_letter("no task")) };
        if message.attempt() - 1 > task.max_retries {
            self.tell(&task, "task.failed", json!({ "error": "the workers that tried are gone" })).await?;
            return Ok(());
        }
        self.tell(&task, "task.running", json!({ "queue": queue.topic, "attempt": message.attempt() })).await?;
        let mut cancelled = self.cancelled.subscribe();
        let outcome = tokio::select! {
            biased;
            _ = cancelled.wait_for(|cancelled| cancelled.contains(&task.task_id)) => {
                self.tell(&task, "task.cancelled", json!({})).await?;
                return Ok(());
            }
            outcome = self.call(&task, message.attempt()) => outcome,
            () = sleep(Duration::from_millis(task.timeout_ms)) => Err(Failure::retry("out of time")),
        };
        match outcome {
            Ok(Outcome::Completed(result)) => self.tell(&task, "task.completed", json!({ "result": result })).await?,
            Ok(Outcome::Suspended(payload)) => self.tell(&task, "task.suspended", json!({ "suspendPayload": payload })).await?,
            Err(failure) if message.attempt() > task.max_retries => {
                self.tell(&task, "task.failed", json!({ "error": format!("{failure:?}") })).await?;
            }
            Err(failure) => {
                self.tell(&task, "task.output", json!({ "retries": format!("{failure:?}") })).await?;
                return Err(failure);
            }
        }
        Ok(())
    }

    /// The tools that tasks name.
    async fn call(&self, task: &Task, attempt: u32) -> Result<Outcome, Failure> {
        match task.tool_name.as_str() {
            "count" => {
                let steps = task.args["steps"].as_u64().unwrap_or(1);
                for step in 1..=steps {
                    sleep(Duration::from_millis(50)).await;
                    self.tell(task, "task.output", json!({ "progress": step as f64 / steps as f64 })).await?;
                }
                Ok(Outcome::Completed(json!(steps)))
            }
            "stumble" if attempt == 1 => Err(Failure::retry("stumbled")),
            "stumble" => Ok(Outcome::Completed(json!("got up"))),
            "ask" => Ok(match &task.resume_data {
                Some(answer) => Outcome::Completed(answer.clone()),
                None => Outcome::Suspended(task.args.clone()),
            }),
            "hang" => pending().await,
            tool => Err(Failure::retry(format!("no tool is called {tool}"))),
        }
    }

    /// Tells everybody what becomes of a task.
    async fn tell(&self, task: &Task, what: &str, mut data: Value) -> Result<()> {
        (data["taskId"], data["toolName"], data["worker"]) = (json!(task.task_id), json!(task.tool_name), json!(self.name));
        self.bus.publish(RESULT, Event::new(what).with_run_id(&task.task_id).with_data(data)).await?;
        Ok(())
    }
}
