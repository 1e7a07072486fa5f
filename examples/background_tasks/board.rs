//! What a listener knows of the tasks by what is told about them, and their progress bars.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write, stdout};

use pubsub_core::{Event, EventId, Result};
use serde::Deserialize;

/// What is told about a task, as far as it matters here.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Update {
    pub(crate) task_id: String,
    pub(crate) worker: String,
    #[serde(default)]
    pub(crate) progress: f64,
    #[serde(default)]
    queue: String,
    #[serde(default)]
    retries: Option<String>,
}

#[derive(Default)]
struct Row {
    progress: f64,
    /// Who has it at work, off which queue.
    at_work: Option<(String, String)>,
    suspended: bool,
    /// How it ended, and at whose hands.
    ended: Option<(String, String)>,
}

#[derive(Default)]
pub(crate) struct Board {
    rows: BTreeMap<String, Row>,
    dead: BTreeSet<String>,
    most: BTreeMap<String, usize>,
    pub(crate) heard: Vec<EventId>,
    pub(crate) progress: usize,
    pub(crate) resumed: usize,
    pub(crate) cancelled_at_work: usize,
}

impl Board {
    pub(crate) fn new(tasks: impl Iterator<Item = String>) -> Self {
        Self { rows: tasks.map(|task| (task, Row::default())).collect(), ..Self::default() }
    }

    /// Takes what was told; none if it is about no task of this board.
    pub(crate) fn take(&mut self, event: &Event) -> Result<Option<Update>> {
        let update = event.data::<Update>()?.into_owned();
        let Some(row) = self.rows.get_mut(&update.task_id) else { return Ok(None) };
        self.heard.push(event.id().clone());
        match event.event_type() {
            "task.running" if !self.dead.contains(&update.worker) => {
                row.at_work = Some((update.worker.clone(), update.queue.clone()));
                let of_worker = Some((update.worker.clone(), update.queue.clone()));
                let at_once = self.rows.values().filter(|row| row.at_work == of_worker).count();
                let most = self.most.entry(update.queue.clone()).or_default();
                *most = at_once.max(*most);
            }
            "task.output" if update.retries.is_some() => row.at_work = None,
            "task.output" => {
                self.progress += 1;
                row.progress = update.progress;
            }
            "task.suspended" => (row.at_work, row.suspended) = (None, true),
            ended @ ("task.completed" | "task.failed" | "task.cancelled") => {
                let at_work = row.at_work.take().is_some_and(|(worker, _)| worker == update.worker);
                self.cancelled_at_work += usize::from(ended == "task.cancelled" && at_work);
                self.resumed += usize::from(ended == "task.completed" && row.suspended);
                row.ended = Some((ended.to_owned(), update.worker.clone()));
            }
            _ => {}
        }
        self.draw();
        Ok(Some(update))
    }

    /// A worker is dead: nothing is at work there any more.
    pub(crate) fn bury(&mut self, worker: &str) {
        self.dead.insert(worker.to_owned());
        for row in self.rows.values_mut() {
            row.at_work.take_if(|(at, _)| at == worker);
        }
    }

    /// Whether an event is about a task of this board.
    pub(crate) fn lists(&self, event: &Event) -> bool {
        self.rows.contains_key(event.run_id())
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.rows.values().all(|row| row.ended.is_some())
    }

    pub(crate) fn ended(&self, how: &str) -> usize {
        self.rows.values().filter(|row| row.ended.as_ref().is_some_and(|(ended, _)| ended == how)).count()
    }

    pub(crate) fn completed_by_another(&self, task: &str, worker: &str) -> bool {
        let ended = self.rows.get(task).and_then(|row| row.ended.as_ref());
        ended.is_some_and(|(ended, by)| ended == "task.completed" && by != worker)
    }

    /// The most that one worker had at work off this queue.
    pub(crate) fn most(&self, queue: &str) -> usize {
        self.most.get(queue).copied().unwrap_or_default()
    }

    /// A bar for each task, on one line that is drawn anew, where somebody looks on.
    fn draw(&self) {
        if !stdout().is_terminal() {
            return;
        }
        let bar = |row: &Row| match &row.ended {
            Some((ended, _)) if ended == "task.completed" => '█',
            Some(_) => '×',
            None => ['·', '▁', '▂', '▃', '▄', '▅', '▆', '▇'][(row.progress * 7.0) as usize],
        };
        print!("\r{}\r", self.rows.values().map(bar).collect::<String>());
        let _ = stdout().flush(); // the terminal may be gone; the proof is not
    }
}
