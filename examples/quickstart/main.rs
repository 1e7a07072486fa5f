//! The whole of it in one go: publishes events, shares them among three workers, lets an audit listen in, retries what fails,
//! dead-letters what keeps failing, and proves by the ids that nothing was lost.
//!
//! ```text
//! cargo run --example quickstart                                 # a small built-in feed
//! cargo run --example quickstart < events.jsonl                  # {"type": ..., "runId"?: ..., "data"?: ...} a line
//! cargo run --example quickstart 'memory:?max_payload=64KiB'     # another bus
//! ```
//!
//! Every fourth event fails at its first attempt, and those of the type `poison` at every attempt. A line that is no event is
//! reported with its number and skipped. The exit status is 0; 2 if lines were skipped; 1 if an event was lost or handled twice,
//! or the run itself failed.

mod input;
mod ledger;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use ledger::Ledger;
use pubsub_connect::BusUrl;
use pubsub_core::{
    Bus, Capability, Event, EventId, Failure, Group, Handler, Message, Origin, PublishError, PublishOptions, Result,
    RetryPolicy, Start, SubscribeOptions, Subscription, Topic,
};
use tokio::time::{Instant, sleep, timeout};

const WORKERS: usize = 3;

/// How many events each worker handles at a time.
const CONCURRENCY: usize = 16;

/// How many dead letters are listed.
const LISTED: usize = 5;

/// How long a publish is repeated at a full or unreachable bus, and how long the last events may take to be settled.
const PATIENCE: Duration = Duration::from_secs(30);

const PAUSE: Duration = Duration::from_millis(10);

#[tokio::main]
async fn main() -> ExitCode {
    run().await.unwrap_or_else(|error| {
        complain(&format!("quickstart: {error:#}"));
        ExitCode::FAILURE
    })
}

async fn run() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().unwrap_or("memory:".to_owned());
    if arguments.next().is_some() {
        return Err("takes one argument, the URL of a bus".into());
    }
    let bus = pubsub_connect::connect(&url).await?;
    bus.require([Capability::Groups])?;

    // Topics of this run's own: others may be using the bus.
    let topic = Topic::new(format!("quickstart-{}", EventId::random()))?;
    let dead = Topic::new(format!("{topic}-dead"))?;
    let ledger = Arc::new(Ledger::default());

    // Everybody subscribes before anything is published: a bus that keeps nothing delivers only what comes after.
    let morgue = listen(bus.subscribe(&dead).await?, {
        let ledger = ledger.clone();
        move |letter| {
            let origin = Origin::of(letter).and_then(|origin| EventId::new(origin.event).ok());
            ledger.dead(&origin.unwrap_or_else(|| letter.id().clone()));
        }
    });
    let audit = listen(bus.subscribe(&topic).await?, {
        let ledger = ledger.clone();
        move |event| ledger.heard(event.id())
    });
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        let options = SubscribeOptions::group(Group::new("workers")?)
            .retry(RetryPolicy::new().max_attempts(3).backoff(Duration::from_millis(20), Duration::from_millis(100)))
            .dead_letter(dead.clone());
        let ledger = ledger.clone();
        workers.push(bus.on(&topic, options, CONCURRENCY, move |message| work(ledger.clone(), message)).await?);
    }

    let mut bad_lines = 0;
    let mut batches = input::read(input::open()?, bus.capabilities().max_payload);
    while let Some(batch) = batches.recv().await {
        let mut events = Vec::new();
        for (number, event) in batch? {
            match event {
                Ok(event) if ledger.enter(event.id()) => events.push(Arc::new(event)),
                Ok(event) => skip(number, &format!("the id {:?} came before", event.id().to_string()), &mut bad_lines),
                Err(why) => skip(number, &why, &mut bad_lines),
            }
        }
        publish(&bus, &topic, events).await?;
    }

    // The ids say when the work is done; draining says that nothing is about to come back.
    let handles = workers.iter().map(Handler::handle).chain([&audit.handle, &morgue.handle]);
    let settled = timeout(PATIENCE, async {
        ledger.settled().await;
        for handle in handles {
            handle.drained().await;
        }
    });
    if settled.await.is_err() {
        let status = bus.inspect(&topic).await?;
        complain(&format!("quickstart: not everything was settled within {PATIENCE:?}: {status:?}"));
    }

    let mut shares = Vec::new();
    for worker in workers {
        shares.push(worker.stop().await?.done.to_string());
    }
    audit.stop().await?;
    morgue.stop().await?;
    let report = ledger.report();
    let letters = list(&bus, &dead, report.dead_lettered).await?;
    bus.clear_topic(&dead).await?;
    bus.clear_topic(&topic).await?;
    let closed = bus.close(PATIENCE).await?;

    let left = if closed.is_clean() { "nothing left behind".to_owned() } else { format!("{closed:?}") };
    let told = format!(
        "{letters}      backend: {}\n    bad lines: {bad_lines}\n{report}      workers: {}\n       closed: {left}\n",
        url.parse::<BusUrl>()?,
        shares.join(" + "),
    );
    io::stdout().write_all(told.as_bytes())?;
    Ok(match (report.is_sound(), bad_lines) {
        (false, _) => ExitCode::FAILURE,
        (true, 0) => ExitCode::SUCCESS,
        (true, _) => ExitCode::from(2),
    })
}

/// What a worker does with an event. An error brings it back, one attempt higher, to whichever worker is free.
async fn work(ledger: Arc<Ledger>, message: Message) -> Result<(), Failure> {
    let event = message.event();
    if message.attempt() > 1 {
        ledger.redelivered();
    }
    if event.event_type() == "poison" {
        return Err(Failure::retry("poison: no attempt can succeed"));
    }
    if message.attempt() == 1 && ledger.stumbles(event.id()) {
        return Err(Failure::retry("stumbled: the next attempt will succeed"));
    }
    ledger.handled(event.id());
    Ok(())
}

/// Publishes, and repeats what was not taken. An event is stamped once, so repeating it is safe: it stays the same event.
async fn publish(bus: &Bus, topic: &Topic, mut events: Vec<Arc<Event>>) -> Result<(), PublishError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match bus.publish_with(topic, &events, PublishOptions::new()).await {
            Ok(_) => return Ok(()),
            Err(error) if error.error().is_retryable() && Instant::now() < deadline => {
                events = error.unpublished().map(|place| events[place].clone()).collect();
                sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// A fan-out subscription read in a task of its own.
struct Listener {
    handle: pubsub_core::SubscriptionHandle,
    task: tokio::task::JoinHandle<Result<()>>,
}

fn listen(mut subscription: Subscription, note: impl Fn(&Event) + Send + 'static) -> Listener {
    let handle = subscription.handle();
    let task = tokio::spawn(async move {
        while let Some(delivery) = subscription.try_next().await? {
            note(delivery.event());
        }
        Ok(())
    });
    Listener { handle, task }
}

impl Listener {
    async fn stop(self) -> Result<(), Box<dyn Error>> {
        self.handle.stop();
        Ok(self.task.await??)
    }
}

/// The first dead letters, where the bus keeps them.
async fn list(bus: &Bus, dead: &Topic, count: usize) -> Result<String> {
    if count == 0 || !bus.capabilities().supports(Capability::DeadLetterHistory) {
        return Ok(String::new());
    }
    let page = bus.history(dead, Start::Earliest, LISTED).await?;
    let mut list = format!(" dead letters: {} of {count}\n", page.entries.len());
    for origin in page.entries.iter().filter_map(|(_, letter)| Origin::of(letter)) {
        list += &format!("  {} after {} attempts: {}\n", origin.event, origin.attempts, origin.reason);
    }
    Ok(list)
}

fn skip(line: u64, why: &str, bad_lines: &mut u64) {
    *bad_lines += 1;
    complain(&format!("line {line} skipped: {why}"));
}

fn complain(what: &str) {
    // Nobody may be listening, which is no reason to fail.
    let _ = writeln!(io::stderr(), "{what}");
}
