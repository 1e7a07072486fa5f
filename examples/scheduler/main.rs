//! Schedulers that share their schedules. One of three dies between claiming a fire and publishing it, and another makes it; then all of
//! them are gone for a while, and what was missed is handled as each schedule's policy says.
//!
//! `cargo run --example scheduler [URL]`. A bus without leases takes them from another, by `?leases=URL`.

mod claim;
mod schedule;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use claim::{Claims, RUNS, persist};
use fleet::{Fleet, Proof, Role};
use futures::future::try_join_all;
use futures::stream::select_all;
use pubsub_core::{Capability, Error, Event, Result, Timestamp};
use schedule::{Missed, Schedule, When};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Where schedulers tell what they do.
const SCHEDULES: &str = "schedules";

/// A time that passed so long ago was missed.
const TOLERANCE: i64 = 500;

/// How far a scheduler looks back when it begins, in milliseconds.
const LOOK_BACK: i64 = 30_000;

/// How long there is no scheduler at all.
const OUTAGE: Duration = Duration::from_millis(2200);

/// How long a fire may take that is late.
const LATE: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    fleet::run(&["scheduler", "hesitant"], &[Capability::Leases], direct, work).await
}

/// What is fired, under names of a stage.
fn schedules(stage: &str) -> Result<[Schedule; 3]> {
    let every_second = When::cron("* * * * * *").map_err(|error| Error::invalid_option("cron", error.to_string()))?;
    let every = |millis| When::Every(Duration::from_millis(millis));
    Ok([
        Schedule { id: id("tick", stage), when: every(200), missed: Missed::FireAll },
        Schedule { id: id("report", stage), when: every_second, missed: Missed::FireLatest },
        Schedule { id: id("digest", stage), when: every(500), missed: Missed::Skip },
    ])
}

fn id(schedule: &str, stage: &str) -> String {
    format!("{schedule}.{stage}")
}

fn now() -> i64 {
    Timestamp::now().as_millis()
}

/// A scheduler: any number of them keep the same schedules.
async fn work(role: Role) -> Result<()> {
    let leases = role.bus.leases().ok_or(Error::unsupported(Capability::Leases))?;
    let hesitates = role.role == "hesitant";
    let claims = Claims { bus: role.bus.clone(), leases, owner: role.name.clone(), hesitates };
    role.ready().await?;
    try_join_all(schedules(role.stage())?.map(|schedule| keep(claims.clone(), schedule))).await?;
    Ok(())
}

/// What a scheduler tells about times that passed without one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Late {
    schedule_id: String,
    missed: Vec<i64>,
}

async fn keep(claims: Claims, schedule: Schedule) -> Result<()> {
    let mut fires = JoinSet::new();
    let mut after = begin(&claims, &schedule).await?;
    loop {
        let now = now();
        let due: Vec<i64> = schedule.when.after(after).take_while(|due| *due <= now).collect();
        after = due.last().copied().unwrap_or(after);
        let (missed, on_time): (Vec<i64>, Vec<i64>) = due.into_iter().partition(|due| *due < now - TOLERANCE);
        for due in schedule.missed.choose(&missed).iter().chain(&on_time) {
            fires.spawn(claims.clone().fire(schedule.id.clone(), *due));
        }
        if !missed.is_empty() {
            let late = Late { schedule_id: schedule.id.clone(), missed };
            let told = Arc::new(Event::new("schedule.missed").with_run_id(&schedule.id).with_data(late));
            persist(|| async { Ok(claims.bus.publish(SCHEDULES, told.clone()).await?) }).await?;
        }
        while let Some(Ok(fired)) = fires.try_join_next() {
            fired?;
        }
        let Some(next) = schedule.when.after(after).next() else { return Ok(()) };
        sleep(Duration::from_millis((next - self::now()).max(0).unsigned_abs())).await;
    }
}

/// Where a schedule is taken up: behind what was fired, or with the present if nothing ever was.
async fn begin(claims: &Claims, schedule: &Schedule) -> Result<i64> {
    let now = now();
    let mut from = None;
    for due in schedule.when.after(now - LOOK_BACK).take_while(|due| *due <= now) {
        // Where all are fired, one that was claimed and left behind may lie between others.
        if (from.is_none() || schedule.missed != Missed::FireAll) && claims.is_fired(schedule, due).await? {
            from = Some(due);
        }
    }
    Ok(from.unwrap_or(now))
}

async fn direct<W, F>(fleet: Fleet<W>) -> Result<Proof>
where
    W: Fn(Role) -> F + Copy + Send + 'static,
    F: Future<Output = Result<()>>,
{
    let bus = &fleet.bus;
    let mut heard = select_all([bus.subscribe(RUNS).await?, bus.subscribe(SCHEDULES).await?]);
    let id = |schedule: &str| id(schedule, &fleet.stage);
    let mut log = Log { stage: fleet.stage.clone(), ..Log::default() };
    let schedulers = [fleet.start("scheduler", "s1").await?, fleet.start("scheduler", "s2").await?];
    let hesitant = fleet.start("hesitant", "s3").await?;

    while log.claimed.is_empty() {
        log.take(fleet::next(&mut heard).await?.event())?;
    }
    hesitant.kill().await?;
    while !(log.claimed.is_subset(&log.runs) && log.of(&id("tick")).len() >= 10) {
        log.take(fleet::next(&mut heard).await?.event())?;
    }

    sleep(Duration::from_millis(100)).await; // between two ticks
    let gone = now();
    for scheduler in schedulers {
        scheduler.kill().await?;
    }
    sleep(OUTAGE).await;
    let successor = fleet.start("scheduler", "s4").await?;
    let end = now() + 1500; // longer than a claim: what the dead had claimed has been fired by then
    while log.of(&id("tick")).last().is_none_or(|due| *due < end) {
        log.take(fleet::next(&mut heard).await?.event())?;
    }
    // Who was held up fires all that is due at once: the last may be heard before others.
    let all = async {
        while due(&log.of(&id("tick"))) > log.of(&id("tick")).len() {
            log.take(fleet::next(&mut heard).await?.event())?;
        }
        Ok(())
    };
    timeout(LATE, all).await.unwrap_or(Ok::<(), Error>(()))?; // what is not there by then is lost, as the proof says
    drop(successor);

    let ticks = log.of(&id("tick"));
    let due = due(&ticks);
    let mut proof = Proof::new();
    proof.tell("schedulers killed between claim and publish", 1);
    proof.at_least("fires it had claimed", log.claimed.len(), 1);
    proof.exactly("of these, made by others", log.claimed.intersection(&log.runs).count(), log.claimed.len());
    proof.exactly("ticks fired", ticks.len(), due);
    proof.exactly("fires made twice", log.twice, 0);
    for (schedule, policy) in [("tick", "all"), ("report", "the latest"), ("digest", "none")] {
        // On a busy machine the successor may miss times, too.
        let mut times = log.missed.remove(&id(schedule)).unwrap_or_default();
        times.retain(|missed| missed.last().is_some_and(|last| *last >= gone));
        let missed: BTreeSet<i64> = times.iter().flatten().copied().filter(|due| *due >= gone).collect();
        let fired = missed.intersection(&log.of(&id(schedule))).count();
        let expected = match policy {
            "all" => missed.len(),
            "the latest" => times.len(),
            _ => 0,
        };
        proof.at_least(&format!("{schedule}: missed"), missed.len(), 1);
        proof.exactly(&format!("{schedule}: fired all the same ({policy})"), fired, expected);
    }
    Ok(proof)
}

/// How many ticks there are from the first to the last of these.
fn due(ticks: &BTreeSet<i64>) -> usize {
    let between = |(first, last): (&i64, &i64)| usize::try_from((last - first) / 200 + 1).unwrap_or_default();
    ticks.first().zip(ticks.last()).map_or(0, between)
}

/// What the director has heard.
#[derive(Default)]
struct Log {
    stage: String,
    runs: BTreeSet<String>,
    claimed: BTreeSet<String>,
    /// By schedule, what was missed each time that somebody was late.
    missed: BTreeMap<String, Vec<Vec<i64>>>,
    twice: usize,
}

impl Log {
    fn take(&mut self, event: &Event) -> Result<()> {
        if !event.run_id().contains(&self.stage) {
            return Ok(()); // of others on the same bus
        }
        match event.event_type() {
            "workflow.start" => {
                self.twice += usize::from(!self.runs.insert(event.run_id().to_owned()));
            }
            "schedule.claimed" => drop(self.claimed.insert(event.run_id().to_owned())),
            "schedule.missed" => {
                let Late { schedule_id, missed } = event.data::<Late>()?.into_owned();
                self.missed.entry(schedule_id).or_default().push(missed);
            }
            _ => {}
        }
        Ok(())
    }

    /// The due times of a schedule that were fired.
    fn of(&self, schedule: &str) -> BTreeSet<i64> {
        let prefix = format!("sched_{schedule}_");
        self.runs.iter().filter_map(|run| run.strip_prefix(&prefix)?.parse().ok()).collect()
    }
}
