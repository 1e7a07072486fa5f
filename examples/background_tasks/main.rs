//! Long tasks in other processes: their progress is seen live, a cancel reaches the worker that runs the task, a worker that is killed
//! loses none, and no worker takes more of a queue than it may.
//!
//! `cargo run --example background_tasks [URL]`. With Redis, a killed worker's tasks go to others after `reclaim_after`: say
//! `redis://127.0.0.1?reclaim_after=1s`, unless you want to wait for the minute that is its default.

mod board;
mod worker;

use std::process::ExitCode;

use board::Board;
use fleet::{Fleet, Proof, Role};
use futures::TryStreamExt;
use pubsub_core::{Capability, Event, Result, SubscribeOptions};
use serde_json::{Value, json};
use worker::{CONTROL, QUEUES, RESULT, Task, Worker};

#[tokio::main]
async fn main() -> ExitCode {
    fleet::run(&["worker"], &[Capability::Groups], direct, work).await
}

/// A worker: any number of them share the queues.
async fn work(role: Role) -> Result<()> {
    let worker = Worker::new(role.bus.clone(), role.name.clone());
    let control = role.bus.subscribe(CONTROL).await?;
    let mut queues = Vec::new();
    for queue in &QUEUES {
        queues.push((queue, role.bus.subscribe_with(queue.topic, worker.options()?).await?));
    }
    role.ready().await?;
    let work = queues.iter_mut().map(|(queue, tasks)| worker.work(queue, tasks));
    futures::try_join!(futures::future::try_join_all(work), worker.heed(control))?;
    Ok(())
}

/// What is to be done, under names of this stage: eight tasks with progress, three that a worker may only do one at a time, and some with a history.
fn tasks(stage: &str) -> Vec<(&'static str, Task)> {
    let new = |id: &str, tool: &str, args: Value| Task::new(&format!("{id}.{stage}"), tool, args, 20_000, 3);
    let counts = (0..8).map(|n| ("background-tasks", new(&format!("count-{n}"), "count", json!({ "steps": 10 }))));
    let renders = (0..3).map(|n| ("background-tasks.render", new(&format!("render-{n}"), "count", json!({ "steps": 5 }))));
    let others = [
        ("background-tasks", new("endless", "count", json!({ "steps": 1_000_000 }))),
        ("background-tasks", new("stumbles", "stumble", json!({}))),
        ("background-tasks", new("asks", "ask", json!({ "question": "Go on?" }))),
        ("background-tasks", Task::new(&format!("stuck.{stage}"), "hang", json!({}), 200, 1)),
    ];
    others.into_iter().chain(counts).chain(renders).collect()
}

async fn direct<W, F>(fleet: Fleet<W>) -> Result<Proof>
where
    W: Fn(Role) -> F + Copy + Send + 'static,
    F: Future<Output = Result<()>>,
{
    let bus = &fleet.bus;
    let mut updates = bus.subscribe(RESULT).await?;
    // Another listener, who reads nothing until all is over: it must have room for all of it, or publishers would wait for it.
    let mut second = bus.subscribe_with(RESULT, SubscribeOptions::fan_out().prefetch(10_000)).await?;
    let mut workers = Vec::new();
    for name in ["w1", "w2", "w3"] {
        workers.push(fleet.start("worker", name).await?);
    }
    let tasks = tasks(&fleet.stage);
    let endless = format!("endless.{}", fleet.stage);
    let mut board = Board::new(tasks.iter().map(|(_, task)| task.task_id.clone()));
    for (queue, task) in &tasks {
        let dispatch = Event::new("task.dispatch").with_run_id(&task.task_id).with_data(task.clone());
        bus.publish(*queue, dispatch).await?;
    }

    let mut killed = None;
    while !board.is_complete() {
        let delivery = fleet::next(&mut updates).await?;
        let event = delivery.event();
        let Some(update) = board.take(event)? else { continue }; // of others on the same bus
        match event.event_type() {
            // In the middle of a task that can be counted on, its worker is killed.
            "task.output" if killed.is_none() && update.task_id.starts_with("count-") && update.progress >= 0.5 => {
                if let Some(at) = workers.iter().position(|worker| worker.name() == update.worker) {
                    workers.remove(at).kill().await?;
                    board.bury(&update.worker);
                    killed = Some((update.task_id, update.worker));
                }
            }
            // Later, one that would never end is cancelled: nobody here knows by name which worker has it.
            "task.output" if update.task_id == endless && killed.as_ref().is_some_and(|(_, dead)| *dead != update.worker) => {
                bus.publish(CONTROL, Event::new("task.cancel").with_data(json!({ "taskId": endless }))).await?;
            }
            "task.suspended" => {
                let mut task =
                    tasks.iter().find(|(_, task)| task.task_id == update.task_id).expect("it is on the board").1.clone();
                task.resume_data = Some(json!({ "answer": "yes" }));
                bus.publish(QUEUES[0].topic, Event::new("task.resume").with_run_id(&task.task_id).with_data(task)).await?;
            }
            _ => {}
        }
    }

    // Another listener has heard the same, in the same order.
    let mut heard = Vec::new();
    while heard.len() < board.heard.len() {
        let Some(update) = second.try_next().await? else { break };
        if board.lists(update.event()) {
            heard.push(update.event().id().clone());
        }
    }
    let mut proof = Proof::new();
    proof.exactly("tasks dispatched", tasks.len(), 15).exactly("completed", board.ended("task.completed"), 13);
    proof.exactly("failed, out of time and retries", board.ended("task.failed"), 1);
    proof.exactly("cancelled by the worker that ran it", board.cancelled_at_work, 1);
    proof.exactly("completed after an answer", board.resumed, 1);
    let (task, worker) = killed.unwrap_or_default();
    proof.exactly("tasks of a killed worker completed by another", usize::from(board.completed_by_another(&task, &worker)), 1);
    for queue in QUEUES {
        proof.at_most(&format!("most at once of {} in one worker", queue.topic), board.most(queue.topic), queue.at_once);
    }
    proof.at_least("steps of progress seen from here", board.progress, 90);
    proof.exactly("updates another listener did not hear", usize::from(heard != board.heard), 0);
    Ok(proof)
}
