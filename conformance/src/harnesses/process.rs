//! Another process on a bus: the program that runs the suite, started once more with a job in its environment.

use std::io::{self, BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use pubsub_core::{Error, ErrorKind, Event, Group, PubSub, PublishOptions, Result, SubscribeOptions, Topic};

use super::{gcp, redis, unix};
use crate::{Job, Process};

const JOB: &str = "PUBSUB_CONFORMANCE_JOB";
const READY: &str = "ready";

/// Whether this process was started to do a job. Every program that runs the suite over the harnesses here asks that first, and then
/// leaves its `main` to [`other_process`].
pub fn is_other_process() -> bool {
    std::env::var_os(JOB).is_some()
}

/// Does the job this process was started for, reports ready, and waits to be killed.
pub fn other_process() -> ExitCode {
    let job = std::env::var(JOB).unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    match runtime.block_on(work(&job)) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("{job}: {error} ({error:?})");
            ExitCode::FAILURE
        }
    }
}

fn failed(error: io::Error) -> Error {
    Error::new(ErrorKind::Backend("another process of the harness".into())).caused_by(error)
}

enum Never {}

async fn connect(backend: &str, place: &str) -> Result<Arc<dyn PubSub>> {
    match backend {
        "gcp" => gcp::connect(place).await,
        "redis" => redis::connect(place).await,
        "unix" => unix::connect(place).await,
        _ => Err(failed(io::Error::other("a backend that is not understood"))),
    }
}

async fn work(job: &str) -> Result<Never> {
    let words: Vec<&str> = job.split('|').collect();
    let [backend, place, what, topic, group, count] = words[..] else {
        return Err(failed(io::Error::other("a job that is not understood")));
    };
    let (bus, topic) = (connect(backend, place).await?, Topic::new(topic)?);
    let count: usize = count.parse().map_err(|error| failed(io::Error::other(error)))?;
    let (mut held, mut member) = (Vec::new(), None);
    if what == "publish" {
        for number in 0..count {
            let event = Arc::new(Event::new(number.to_string()).with_run_id("another process"));
            bus.publish(&topic, &[event], PublishOptions::new()).await?;
        }
    } else {
        let member = member.insert(bus.subscribe(&topic, SubscribeOptions::group(Group::new(group)?)).await?);
        while held.len() < count
            && let Some(next) = member.next().await
        {
            held.push(next?);
        }
    }
    println!("{READY}");
    std::future::pending().await
}

struct Other(Child);

/// Starts one that does this on the bus of a backend at a place, which is a word to that backend.
pub(super) async fn start(backend: &str, place: &str, job: &Job) -> Result<Box<dyn Process>> {
    let job = match job {
        Job::Publish { topic, count } => format!("{backend}|{place}|publish|{topic}||{count}"),
        Job::Hold { topic, group, count } => format!("{backend}|{place}|hold|{topic}|{group}|{count}"),
    };
    let starting = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(std::env::current_exe()?);
        command.env(JOB, job).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut other = Other(command.spawn()?);
        let mut said = String::new();
        let stdout = other.0.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut said)?;
        if said.trim() == READY { Ok(other) } else { Err(io::Error::other("another process failed")) }
    });
    let other = starting.await.map_err(io::Error::other).flatten().map_err(failed)?;
    Ok(Box::new(other))
}

#[async_trait]
impl Process for Other {
    async fn kill(mut self: Box<Self>) -> Result<()> {
        self.0.kill().and_then(|()| self.0.wait()).map(drop).map_err(failed)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
