//! A small engine. Where a run stands and what it knows is in the event that carries it on; a worker that handled one may forget it.
//!
//! - An event is acknowledged when what follows from it has been published: a worker that dies before has its events handled anew.
//! - What follows bears an id that is made of the run and the place, so that done twice is said twice, in the same words. The end of a
//!   run bears the run's alone: should a step come to one end here and to another there, whoever goes by ids takes the first.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::TryStreamExt;
use futures::future::BoxFuture;
use pubsub_core::{Bus, Event, EventId, Failure, Group, Message, Result, RetryPolicy, SubscribeOptions, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What carries runs on; read as the group [`GROUP`].
pub(crate) const RUNS: &str = "workflows";
pub(crate) const GROUP: &str = "mastra-orchestration";
/// Where everybody hears that a run has ended, or needs somebody.
pub(crate) const FINISHED: &str = "workflows-finish";

const MAX_ATTEMPTS: u32 = 5;

/// Where a run tells what it does.
pub(crate) fn watch_topic(run_id: &str) -> String {
    format!("workflow.events.v2.{run_id}")
}

/// A workflow: its steps, and what its tasks do.
pub(crate) struct Workflow {
    pub(crate) id: &'static str,
    pub(crate) steps: &'static [Step],
    /// Carries out a task, by its name, at this attempt.
    pub(crate) task: for<'a> fn(&'a str, &'a Run, u32) -> BoxFuture<'a, Result<Value, Failure>>,
}

pub(crate) enum Step {
    Task(&'static str),
    /// Tasks at once, wherever there are workers.
    Parallel(&'static [&'static str]),
    Branch {
        when: fn(&Run) -> bool,
        then: &'static Step,
        otherwise: &'static Step,
    },
    Sleep(&'static str, Duration),
    /// Waits for somebody's answer, holding nothing meanwhile.
    Suspend(&'static str),
}

/// All there is to know about a run: it travels with each of its events.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Run {
    pub(crate) workflow_id: String,
    pub(crate) run_id: String,
    #[serde(default)]
    pub(crate) initial_state: Value,
    /// Which step, and which of its parallel tasks.
    #[serde(default)]
    execution_path: Vec<usize>,
    #[serde(default)]
    step_results: BTreeMap<String, Value>,
    #[serde(default)]
    prev_result: Value,
    #[serde(default)]
    pub(crate) resume_data: Option<Value>,
}

impl Run {
    pub(crate) fn new(workflow_id: &str, run_id: &str, initial_state: Value) -> Self {
        let (workflow_id, run_id, execution_path) = (workflow_id.to_owned(), run_id.to_owned(), Vec::new());
        let (step_results, prev_result, resume_data) = (BTreeMap::new(), Value::Null, None);
        Self { workflow_id, run_id, initial_state, execution_path, step_results, prev_result, resume_data }
    }

    /// The id of an event about the place where the run is: the same, whoever makes it and however often.
    pub(crate) fn event_id(&self, what: &str) -> Result<EventId> {
        EventId::new(format!("{}:{:?}:{what}", self.run_id, self.execution_path))
    }

    fn keep(&mut self, step: &str, output: Value) {
        self.prev_result = json!({ "status": "success", "output": output });
        self.step_results.insert(step.to_owned(), self.prev_result.clone());
        self.resume_data = None;
    }
}

pub(crate) struct Engine {
    bus: Bus,
    worker: String,
    workflow: &'static Workflow,
}

impl Engine {
    pub(crate) fn new(bus: Bus, worker: String, workflow: &'static Workflow) -> Self {
        Self { bus, worker, workflow }
    }

    /// As which group, and with which patience, the runs are read. The bus gives nothing up: a run that it dropped would never end.
    pub(crate) fn options(&self) -> Result<SubscribeOptions> {
        let retry = RetryPolicy::new().max_attempts(0).backoff(Duration::from_millis(20), Duration::from_millis(200));
        Ok(SubscribeOptions::group(Group::new(GROUP)?).retry(retry))
    }

    /// Does what an event asks for, and publishes what follows.
    pub(crate) async fn handle(&self, message: &Message) -> Result<(), Failure> {
        let event = message.event();
        let mut run = match event.data::<Run>() {
            Ok(run) if run.workflow_id == self.workflow.id => run.into_owned(),
            _ => return Err(Failure::dead_letter("no run of a workflow that is known here")),
        };
        match event.event_type() {
            "workflow.start" => {
                self.tell(&run, "workflow-start", json!({})).await?;
                self.go_to(run, 0).await
            }
            // Whoever made the last attempt did not live to tell.
            "workflow.step.run" | "workflow.resume" if message.attempt() > MAX_ATTEMPTS => {
                self.fail(&run, &Failure::retry("the workers that tried are gone")).await
            }
            "workflow.step.run" | "workflow.resume" => self.step(&mut run, message).await,
            "workflow.step.end" => {
                let next = run.execution_path.first().map_or(0, |at| at + 1);
                self.go_to(run, next).await
            }
            ended @ ("workflow.end" | "workflow.fail") => {
                self.tell(&run, "workflow-finish", json!({ "workflowStatus": run.prev_result["status"] })).await?;
                self.publish(FINISHED, ended, "over", run).await
            }
            _ => Err(Failure::dead_letter("nothing that this engine does")),
        }
    }

    async fn go_to(&self, mut run: Run, step: usize) -> Result<(), Failure> {
        run.execution_path = vec![step];
        if step < self.workflow.steps.len() {
            return self.publish(RUNS, "workflow.step.run", "run", run).await;
        }
        run.execution_path.clear();
        self.publish(RUNS, "workflow.end", "over", run).await
    }

    async fn fail(&self, run: &Run, failure: &Failure) -> Result<(), Failure> {
        let prev_result = json!({ "status": "failed", "error": format!("{failure:?}") });
        let run = Run { execution_path: Vec::new(), prev_result, ..run.clone() };
        self.publish(RUNS, "workflow.fail", "over", run).await
    }

    async fn step(&self, run: &mut Run, message: &Message) -> Result<(), Failure> {
        let mut step = &self.workflow.steps[run.execution_path[0]];
        while let Step::Branch { when, then, otherwise } = step {
            step = if when(run) { then } else { otherwise };
        }
        let (name, output) = match (step, run.execution_path.get(1)) {
            (Step::Parallel(tasks), None) => {
                let Some(outputs) = self.gather(run, tasks, message.attempt()).await? else { return Ok(()) };
                ("parallel", outputs)
            }
            (Step::Parallel(tasks), Some(&branch)) => {
                let Some(output) = self.task(run, tasks[branch], message).await? else { return Ok(()) };
                (tasks[branch], output)
            }
            (Step::Task(task), _) => {
                let Some(output) = self.task(run, task, message).await? else { return Ok(()) };
                (*task, output)
            }
            (Step::Sleep(name, length), _) => {
                self.tell(run, "workflow-step-start", self.about(name)).await?;
                // From when the event was made: whoever takes over sleeps what is left.
                let until =
                    std::time::UNIX_EPOCH + Duration::from_millis(message.event().created_at().as_millis().unsigned_abs());
                let left = (until + *length).duration_since(std::time::SystemTime::now()).unwrap_or_default();
                tokio::time::sleep(left.min(*length)).await;
                (*name, json!({}))
            }
            (Step::Suspend(name), _) => match run.resume_data.take() {
                Some(answer) => (*name, answer),
                None => {
                    self.tell(run, "workflow-step-suspended", self.about(name)).await?;
                    return self.publish(FINISHED, "workflow.suspend", "suspended", run.clone()).await;
                }
            },
            (Step::Branch { .. }, _) => unreachable!("it was followed to one of its sides"),
        };
        let about = json!({ "id": name, "worker": self.worker, "status": "success", "output": output });
        self.tell(run, "workflow-step-result", about).await?;
        if run.execution_path.len() > 1 {
            return Ok(()); // who gathers has seen it
        }
        run.keep(name, output);
        self.publish(RUNS, "workflow.step.end", "end", run.clone()).await
    }

    /// Carries out a task; none if the run failed in it. A bus that fails is no failure of the task.
    async fn task(&self, run: &Run, task: &str, message: &Message) -> Result<Option<Value>, Failure> {
        self.tell(run, "workflow-step-start", self.about(task)).await?;
        match (self.workflow.task)(task, run, message.attempt()).await {
            Err(failure) if message.attempt() >= MAX_ATTEMPTS => self.fail(run, &failure).await.map(|()| None),
            outcome => outcome.map(Some),
        }
    }

    /// Sends out the tasks of a parallel step and waits for all their results; none if the run failed in one of them.
    async fn gather(&self, run: &Run, tasks: &[&str], attempt: u32) -> Result<Option<Value>, Failure> {
        let mut watched = self.bus.subscribe(watch_topic(&run.run_id)).await?;
        for branch in 0..tasks.len() {
            let mut part = run.clone();
            part.execution_path.push(branch);
            // An attempt has tasks of its own: results that were told before it began, it has not heard.
            self.publish(RUNS, "workflow.step.run", &format!("run-{attempt}"), part).await?;
        }
        let mut outputs = BTreeMap::new();
        while outputs.len() < tasks.len() {
            let Some(told) = watched.try_next().await? else { return Err(Failure::release()) };
            let told = told.data::<Value>()?;
            match (told["type"].as_str(), told["payload"]["id"].as_str()) {
                (Some("workflow-step-result"), Some(task)) if tasks.contains(&task) => {
                    outputs.insert(task.to_owned(), told["payload"]["output"].clone());
                }
                (Some("workflow-finish"), _) => return Ok(None),
                _ => {}
            }
        }
        Ok(Some(json!(outputs)))
    }

    fn about(&self, step: &str) -> Value {
        json!({ "id": step, "worker": self.worker })
    }

    /// Tells whoever watches the run.
    async fn tell(&self, run: &Run, what: &str, payload: Value) -> Result<()> {
        let event = Event::new("watch").with_run_id(&run.run_id).with_data(json!({ "type": what, "payload": payload }));
        self.bus.publish(watch_topic(&run.run_id), event).await?;
        Ok(())
    }

    async fn publish(&self, topic: &str, kind: &str, what: &str, run: Run) -> Result<(), Failure> {
        let event = Event::stamped(run.event_id(what)?, kind, Timestamp::now()).with_run_id(&run.run_id);
        self.bus.publish(topic, event.with_data(run)).await?;
        Ok(())
    }
}
