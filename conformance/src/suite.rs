//! Running properties over a harness, and what came of it.

use std::any::Any;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

use crate::expectation::{self, Differences};
use crate::{Ctx, Harness, Outcome, Property, registry};

/// How many properties run at a time: they mostly wait.
const AT_A_TIME: usize = 8;

/// The properties, to be run over one harness.
pub struct Suite {
    harness: Arc<dyn Harness>,
    properties: Vec<Property>,
    settings: Settings,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) rounds: u64,
    pub(crate) seed: u64,
}

impl Settings {
    /// From `CONFORMANCE_STRESS` and `CONFORMANCE_SEED`.
    pub(crate) fn from_env() -> Self {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        Self {
            rounds: number("CONFORMANCE_STRESS").unwrap_or(1).max(1),
            seed: number("CONFORMANCE_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32)),
        }
    }
}

impl Suite {
    /// All properties, over a harness. The environment may say `CONFORMANCE_STRESS` (rounds of each property) and
    /// `CONFORMANCE_SEED`.
    pub fn new(harness: Arc<dyn Harness>) -> Self {
        Self { harness, properties: registry(), settings: Settings::from_env() }
    }

    /// Adds properties, for a backend's own.
    #[must_use]
    pub fn with(mut self, properties: impl IntoIterator<Item = Property>) -> Self {
        self.properties.extend(properties);
        self
    }

    /// Keeps only the properties that pass.
    #[must_use]
    pub fn filter(mut self, keep: impl Fn(&Property) -> bool) -> Self {
        self.properties.retain(keep);
        self
    }

    /// Sets how often each property runs, each time with another seed; the first failure counts.
    #[must_use]
    pub fn stress(mut self, rounds: u64) -> Self {
        self.settings.rounds = rounds.max(1);
        self
    }

    /// Sets the seed of the first round.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.settings.seed = seed;
        self
    }

    /// Runs the properties, several at a time, each on a runtime of its own.
    ///
    /// Dropping the future lets the properties that are running end, and starts no other.
    pub async fn run(self) -> Report {
        let (done, report) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || drop(done.send(self.run_blocking())));
        report.await.expect("the thread that runs the properties does not panic")
    }

    /// Like [`run`](Self::run), for callers without a runtime. Blocks the thread.
    pub fn run_blocking(self) -> Report {
        let Self { harness, properties, settings } = self;
        let next = AtomicUsize::new(0);
        let results = Mutex::new(vec![None; properties.len()]);
        std::thread::scope(|scope| {
            for _ in 0..AT_A_TIME.min(properties.len()) {
                scope.spawn(|| {
                    while let Some((at, property)) = {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        properties.get(at).map(|property| (at, property))
                    } {
                        results.lock()[at] = Some(execute(&harness, property, settings));
                    }
                });
            }
        });
        let results = properties.iter().zip(results.into_inner()).map(|(property, result)| {
            let (outcome, took) = result.expect("every property was run");
            PropertyReport { id: property.id(), title: property.title(), outcome, took }
        });
        Report { backend: harness.name().to_owned(), properties: results.collect() }
    }
}

/// Runs one property as often as asked, up to its first failure.
pub(crate) fn execute(harness: &Arc<dyn Harness>, property: &Property, settings: Settings) -> (Outcome, Duration) {
    let start = Instant::now();
    if let Some(reason) = property.ignored(&**harness) {
        return (Outcome::Ignored(reason), start.elapsed());
    }
    for round in 0..settings.rounds {
        let seed = settings.seed.wrapping_add(round);
        if let Err(why) = run_once(harness, property, seed) {
            return (Outcome::Fail(format!("{why} [CONFORMANCE_SEED={seed}, round {}]", round + 1)), start.elapsed());
        }
    }
    (Outcome::Pass, start.elapsed())
}

fn run_once(harness: &Arc<dyn Harness>, property: &Property, seed: u64) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(property.id())
        .enable_all()
        .build()
        .map_err(|error| format!("cannot make a runtime: {error}"))?;
    let limit = property.time_limit(&**harness);
    let (done, verdict) = mpsc::channel();
    let (harness, property) = (harness.clone(), property.clone());
    let id = property.id();
    let task = runtime.spawn(async move {
        let fresh = harness.fresh().await.map_err(|error| format!("no fresh bus: {error}"))?;
        let ctx = Ctx::new(fresh, property.id(), seed);
        let verdict = property.start(ctx.clone()).await.map_err(|why| why.to_string());
        let mut broken = ctx.take_broken();
        if let Err(why) = verdict {
            broken.insert(0, why);
        }
        if broken.is_empty() { Ok(()) } else { Err(broken.join("; ")) }
    });
    runtime.spawn(async move {
        let verdict = task.await.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => Err(format!("panicked: {}", panic_text(&*panic))),
            Err(error) => Err(error.to_string()),
        });
        drop(done.send(verdict));
    });
    // Waiting outside the runtime notices a property that blocks its threads, too.
    let verdict = verdict.recv_timeout(limit).unwrap_or_else(|_| Err(format!("{id} did not end within {limit:?}")));
    runtime.shutdown_background();
    verdict
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

/// What came of a suite over one harness.
#[derive(Debug, Clone)]
pub struct Report {
    backend: String,
    properties: Vec<PropertyReport>,
}

/// What came of one property.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PropertyReport {
    /// The property's id.
    pub id: &'static str,
    /// What it says.
    pub title: &'static str,
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took, all rounds.
    pub took: Duration,
}

#[derive(Serialize)]
struct JsonReport<'a> {
    backend: &'a str,
    properties: Vec<JsonProperty<'a>>,
}

#[derive(Serialize)]
struct JsonProperty<'a> {
    id: &'a str,
    title: &'a str,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

impl Report {
    /// The harness's name.
    pub fn backend(&self) -> &str {
        &self.backend
    }

    /// Each property, in the order of the registry.
    pub fn properties(&self) -> &[PropertyReport] {
        &self.properties
    }

    /// What came of one property.
    pub fn outcome(&self, id: &str) -> Option<&Outcome> {
        self.properties.iter().find(|property| property.id == id).map(|property| &property.outcome)
    }

    /// Those that failed.
    pub fn failures(&self) -> impl Iterator<Item = &PropertyReport> {
        self.properties.iter().filter(|property| matches!(property.outcome, Outcome::Fail(_)))
    }

    /// As JSON: `{"backend", "properties": [{"id", "title", "outcome": "pass" | "fail" | "ignored", "reason"?}]}`.
    pub fn to_json(&self) -> serde_json::Value {
        let properties = self.properties.iter().map(|PropertyReport { id, title, outcome, .. }| {
            let (outcome, reason) = match outcome {
                Outcome::Pass => ("pass", None),
                Outcome::Fail(reason) => ("fail", Some(reason.as_str())),
                Outcome::Ignored(reason) => ("ignored", Some(reason.as_str())),
            };
            JsonProperty { id, title, outcome, reason }
        });
        let report = JsonReport { backend: &self.backend, properties: properties.collect() };
        serde_json::to_value(report).expect("plain text and lists are JSON")
    }

    /// The report as the text of an expectation file.
    pub fn expectation(&self) -> String {
        expectation::write(self.properties.iter().map(|property| (property.id, &property.outcome)))
    }

    /// Compares with the text of an expectation file: a new skip is a difference, and so is a pass that was not expected.
    ///
    /// # Errors
    /// All differences.
    pub fn check(&self, expected: &str) -> Result<(), Differences> {
        expectation::check(expected, self.properties.iter().map(|property| (property.id, &property.outcome)))
    }

    /// Compares with the expectation file `<backend>.txt` of a directory, or writes it if `CONFORMANCE_BLESS` is set.
    ///
    /// # Errors
    /// All differences; that the file cannot be read or written is one.
    pub fn check_file(&self, directory: &Path) -> Result<(), Differences> {
        let outcomes: Vec<_> = self.properties.iter().map(|property| (property.id, property.outcome.clone())).collect();
        expectation::check_file(directory, &self.backend, &outcomes)
    }
}

/// One line per property.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.backend)?;
        let mut count = [0; 3];
        for PropertyReport { id, title, outcome, took } in &self.properties {
            let millis = took.as_millis();
            match outcome {
                Outcome::Pass => {
                    count[0] += 1;
                    writeln!(f, "  {id:<6} pass    {millis:>6} ms  {title}")?;
                }
                Outcome::Fail(why) => {
                    count[1] += 1;
                    writeln!(f, "  {id:<6} FAIL    {millis:>6} ms  {title}\n         {why}")?;
                }
                Outcome::Ignored(why) => {
                    count[2] += 1;
                    writeln!(f, "  {id:<6} ignored            {title} ({why})")?;
                }
            }
        }
        write!(f, "  {} passed, {} failed, {} ignored", count[0], count[1], count[2])
    }
}
