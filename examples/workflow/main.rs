//! A workflow engine whose state is in its events. Twelve orders are placed; two of the workers that carry them out are killed in the
//! middle of a step. Every order ends exactly once, and a watcher sees the whole story.
//!
//! `cargo run --example workflow [URL]`. With Redis, a killed worker's steps go to others after `reclaim_after`: say
//! `redis://127.0.0.1?reclaim_after=1s`, unless you want to wait for the minute that is its default.

mod engine;
mod order;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use engine::{Engine, FINISHED, RUNS, Run, watch_topic};
use fleet::{Fleet, Proof, Role, Worker};
use futures::stream::select_all;
use pubsub_core::{Capability, Event, EventId, Result, Start};
use serde_json::{Value, json};

const ORDERS: usize = 12;

/// After so many steps have begun, the worker that begins the next is killed.
const FATAL: [usize; 2] = [8, 24];

#[tokio::main]
async fn main() -> ExitCode {
    fleet::run(&["worker"], &[Capability::Groups], direct, work).await
}

/// A worker: any number of them carry out steps.
async fn work(role: Role) -> Result<()> {
    let engine = Engine::new(role.bus.clone(), role.name.clone(), &order::WORKFLOW);
    let mut events = role.bus.subscribe_with(RUNS, engine.options()?).await?;
    role.ready().await?;
    // Whoever waits for a branch or sleeps costs no more than memory, so there may be many of them.
    events.run(200, async |message| engine.handle(&message).await).await?;
    Ok(())
}

async fn direct<W, F>(fleet: Fleet<W>) -> Result<Proof>
where
    W: Fn(Role) -> F + Copy + Send + 'static,
    F: Future<Output = Result<()>>,
{
    let bus = &fleet.bus;
    let mut workers = Vec::new();
    for name in ["w1", "w2", "w3", "w4"] {
        workers.push(fleet.start("worker", name).await?);
    }
    let runs: Vec<String> = (0..ORDERS).map(|number| format!("order-{number}-{}", EventId::random())).collect();
    let mut watched = vec![bus.subscribe(FINISHED).await?];
    for run in &runs {
        watched.push(bus.subscribe(watch_topic(run)).await?);
    }
    let mut watched = select_all(watched);
    for (number, run) in runs.iter().enumerate() {
        // One has no price, which no retry can repair. The dear ones need a person's approval.
        let price = if number == 7 { json!(-1) } else { json!(number * 20) };
        let start = Run::new(order::WORKFLOW.id, run, json!({ "price": price }));
        bus.publish(RUNS, Event::new("workflow.start").with_run_id(run).with_data(start)).await?;
    }

    let mut story = Story::default();
    while !runs.iter().all(|run| story.is_over(run)) {
        let delivery = fleet::next(&mut watched).await?;
        let event = delivery.event();
        if !runs.iter().any(|run| run == event.run_id()) {
            continue; // of others on the same bus
        }
        match event.event_type() {
            "watch" => {
                if let Some(worker) = story.tell(event)?
                    && FATAL.get(story.killed).is_some_and(|begun| story.begun > *begun)
                    && let Some(at) = workers.iter().position(|other| other.name() == worker)
                {
                    workers.remove(at).kill().await?;
                    story.killed += 1;
                }
            }
            "workflow.suspend" => {
                // All there is to know about the run has come with the event, and goes back with the answer.
                let mut run = event.data::<Run>()?.into_owned();
                run.resume_data = Some(json!({ "approvedBy": "the director" }));
                let resume = Event::stamped(run.event_id("resumed")?, "workflow.resume", event.created_at());
                bus.publish(RUNS, resume.with_run_id(&run.run_id).with_data(run)).await?;
                story.approved.insert(event.run_id().to_owned());
            }
            ended => {
                story.ends.entry(event.run_id().to_owned()).or_default().insert((event.id().clone(), ended.to_owned()));
            }
        }
    }
    drop::<Vec<Worker>>(workers);

    let mut proof = Proof::new();
    let ends = |kind: &str| story.ends.values().flatten().filter(|(_, ended)| ended == kind).count();
    proof.exactly("orders placed", runs.len(), ORDERS).exactly("ended exactly once", story.ended_once(), ORDERS);
    proof.exactly("shipped", ends("workflow.end"), ORDERS - 1).exactly("failed, as they must", ends("workflow.fail"), 1);
    proof.exactly("approved by a person", story.approved.len(), 5);
    proof.exactly("workers killed in the middle of a step", story.killed, FATAL.len());
    proof.at_least("steps begun again by another worker", story.taken_over(), 1);
    proof.exactly("stories seen whole", runs.iter().filter(|run| story.is_whole(run)).count(), ORDERS);
    if bus.require([Capability::History]).is_ok() {
        let mut same = 0;
        for run in &runs {
            let kept = bus.history(watch_topic(run), Start::Earliest, 1000).await?.entries;
            let kept: Vec<_> = kept.iter().map(|(_, event)| event.id().clone()).collect();
            same += usize::from(kept.starts_with(&story.seen[run]));
        }
        proof.exactly("stories kept as they were seen", same, ORDERS);
    } else {
        proof.tell("stories kept as they were seen", "this bus keeps no history");
    }
    for run in &runs {
        bus.clear_topic(watch_topic(run)).await?;
    }
    Ok(proof)
}

/// What the watcher has seen.
#[derive(Default)]
struct Story {
    seen: BTreeMap<String, Vec<EventId>>,
    /// Who began each step of each run.
    starts: BTreeMap<(String, String), BTreeSet<String>>,
    finished: BTreeSet<(String, String)>,
    begun: usize,
    ends: BTreeMap<String, BTreeSet<(EventId, String)>>,
    approved: BTreeSet<String>,
    killed: usize,
}

impl Story {
    /// Takes an event of a run's watch topic; if it says that a step has begun, who began it.
    fn tell(&mut self, event: &Event) -> Result<Option<String>> {
        let run = event.run_id().to_owned();
        self.seen.entry(run.clone()).or_default().push(event.id().clone());
        let data = event.data::<Value>()?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let step = text(&data["payload"]["id"]);
        match data["type"].as_str() {
            Some("workflow-step-start") => {
                let worker = text(&data["payload"]["worker"]);
                self.begun += 1;
                self.starts.entry((run, step)).or_default().insert(worker.clone());
                return Ok(Some(worker));
            }
            Some("workflow-step-result") => drop(self.finished.insert((run, step))),
            Some("workflow-finish") => drop(self.finished.insert((run, "the end".into()))),
            _ => {}
        }
        Ok(None)
    }

    /// A run is over when it has ended and its watch topic has said so.
    fn is_over(&self, run: &str) -> bool {
        self.ends.contains_key(run) && self.finished.contains(&(run.to_owned(), "the end".to_owned()))
    }

    /// Work that was done twice says the same twice: one end has one id, however often it is told.
    fn ended_once(&self) -> usize {
        self.ends.values().filter(|ends| ends.len() == 1).count()
    }

    fn taken_over(&self) -> usize {
        self.starts.values().filter(|workers| workers.len() > 1).count()
    }

    /// Every step that was begun has a result, or is the one that the run failed in.
    fn is_whole(&self, run: &str) -> bool {
        let open = self.starts.keys().filter(|(of, _)| of == run).filter(|step| !self.finished.contains(*step)).count();
        let failed = self.ends[run].iter().any(|(_, ended)| ended == "workflow.fail");
        open == usize::from(failed)
    }
}
