//! Running properties over a harness, and what came of it.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use futures::FutureExt;
use parking_lot::Mutex;
use serde::Serialize;

use crate::expectation::{self, Differences};
use crate::{Ctx, Harness, Outcome, Property, registry};

/// How many properties run at a time, unless a command line says otherwise: they mostly wait.
pub(crate) const AT_A_TIME: usize = 8;

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
    let limit = property.time_limit(&**harness);
    let (harness, property) = (harness.clone(), property.clone());
    within(property.id(), limit, async move {
        let fresh = harness.fresh().await.map_err(|error| format!("no fresh bus: {error}"))?;
        let ctx = Ctx::new(fresh, property.id(), seed);
        let verdict = property.start(ctx.clone()).await.map_err(|why| why.to_string());
        let mut broken = ctx.take_broken();
        if let Err(why) = verdict {
            broken.insert(0, why);
        }
        if broken.is_empty() { Ok(()) } else { Err(broken.join("; ")) }
    })
}

/// Runs a property's future on a runtime of its own. A panic and running out of time are failures.
pub(crate) fn within(
    id: &'static str,
    limit: Duration,
    run: impl Future<Output = Result<(), String>> + Send + 'static,
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(id)
        .enable_all()
        .build()
        .map_err(|error| format!("cannot make a runtime: {error}"))?;
    let (done, verdict) = mpsc::channel();
    // One task, there before the property starts: some count tasks.
    runtime.spawn(async move {
        let verdict = AssertUnwindSafe(run).catch_unwind().await;
        drop(done.send(verdict.unwrap_or_else(|panic| Err(format!("panicked: {}", panic_text(&*panic))))));
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
    pub(crate) backend: String,
    pub(crate) properties: Vec<PropertyReport>,
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

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use pubsub_core::{Capabilities, Capability, Error, ErrorKind, PubSub, Result};

    use super::*;
    use crate::{Fault, Mismatch, Need, Verdict, ensure, ensure_eq, omitted, panic_on_purpose, property};

    /// A harness without a bus, for properties that do not use one.
    struct Nothing;

    #[async_trait]
    impl Harness for Nothing {
        fn name(&self) -> &str {
            "nothing"
        }

        fn declared(&self) -> Capabilities {
            Capabilities::in_process()
        }

        async fn fresh(&self) -> Result<Arc<dyn Harness>> {
            Ok(Arc::new(Self))
        }

        async fn connect(&self) -> Result<Arc<dyn PubSub>> {
            Err(Error::new(ErrorKind::Unavailable))
        }

        fn spans_instances(&self) -> bool {
            false
        }
    }

    fn report(properties: impl IntoIterator<Item = Property>) -> Report {
        Suite::new(Arc::new(Nothing)).filter(|_| false).with(properties).seed(7).run_blocking()
    }

    /// The outcome of a property with this body, under a short limit.
    fn outcome<Fut>(body: impl Fn(Ctx) -> Fut + Send + Sync + 'static) -> Outcome
    where
        Fut: Future<Output = Verdict> + Send + 'static,
    {
        let limited = property("T-1", "A test", &[], body).limit(Duration::from_millis(200));
        report([limited]).outcome("T-1").cloned().expect("it was run")
    }

    #[track_caller]
    fn fails_with(outcome: &Outcome, text: &str) {
        assert!(matches!(outcome, Outcome::Fail(why) if why.contains(text)), "{outcome:?}");
    }

    #[test]
    fn a_property_passes_only_by_returning_ok() {
        assert_eq!(outcome(async |_| Ok(())), Outcome::Pass);
        fails_with(&outcome(async |_| Err(Mismatch::new("is wrong"))), "is wrong [CONFORMANCE_SEED=7, round 1]");
        fails_with(&outcome(async |ctx: Ctx| ctx.bus().await.map(drop)), "unavailable");
        fails_with(&outcome(async |_| panic_on_purpose("has panicked")), "panicked: has panicked");
    }

    #[test]
    fn a_property_that_does_not_end_fails_and_is_named() {
        fails_with(&outcome(async |_| std::future::pending().await), "T-1 did not end within 200ms");
        // Not even a property that blocks all threads of its runtime gets away.
        let blocks = |ctx: Ctx| async move {
            for _ in 0..4 {
                drop(ctx.spawn(async { std::thread::sleep(Duration::from_secs(1)) }));
            }
            std::thread::sleep(Duration::from_secs(1));
            Ok(())
        };
        fails_with(&outcome(blocks), "T-1 did not end within 200ms");
    }

    #[test]
    fn a_panic_beside_the_property_fails_it() {
        let beside = async |ctx: Ctx| {
            drop(ctx.spawn(async { panic_on_purpose("in a task") }).await);
            Ok(())
        };
        fails_with(&outcome(beside), "a task of the property panicked: in a task");
    }

    #[test]
    fn the_macros_say_what_differs() {
        let ensures = async |_| {
            ensure!(1 > 0, "cannot fail");
            ensure_eq!(1 + 1, 3, "the sum of {}", "ones");
            Ok(())
        };
        fails_with(&outcome(ensures), "the sum of ones: 2 is not 3");
    }

    #[test]
    fn every_round_has_its_own_seed_and_a_failure_names_it() {
        let seeds = Arc::new(Mutex::new(Vec::new()));
        let seen = seeds.clone();
        let third_fails = property("T-1", "A test", &[], move |ctx: Ctx| {
            seen.lock().push((ctx.seed(), ctx.rng().u64(..)));
            let third = seen.lock().len() == 3;
            async move { if third { Err(Mismatch::new("third")) } else { Ok(()) } }
        });
        let suite = Suite::new(Arc::new(Nothing)).filter(|_| false).with([third_fails]).seed(40).stress(5);
        fails_with(suite.run_blocking().outcome("T-1").expect("it was run"), "third [CONFORMANCE_SEED=42, round 3]");
        let seeds = seeds.lock();
        assert_eq!(seeds.iter().map(|(seed, _)| *seed).collect::<Vec<_>>(), [40, 41, 42]);
        assert!(seeds[0].1 != seeds[1].1);
    }

    #[test]
    fn what_is_missing_is_told_and_never_passes() {
        let ignored = |needs: &[Need]| {
            let needy = property("T-1", "A test", &[], async |_| Ok(())).needs(needs.iter().copied());
            match report([needy]).outcome("T-1") {
                Some(Outcome::Ignored(reason)) => reason.clone(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(ignored(&[Capability::History.into()]), "needs history");
        assert_eq!(ignored(&[Need::Without(Capability::Groups)]), "is about buses without consumer groups");
        assert_eq!(ignored(&[Need::Probe, Need::Fault(Fault::Sever)]), {
            "needs a probe of what lies below; needs a fault to inject: cut connections"
        });
        assert_eq!(ignored(&[Need::CrossInstance]), "needs several instances on one bus");
        assert_eq!(ignored(&[Need::Backend("noth")]), "is about the backend noth");
        let met = [Capability::Groups.into(), Need::NoRetention, Need::EphemeralGroups, Need::Backend("nothing")];
        assert!(met.iter().all(|need| need.missing(&Nothing).is_none()));
    }

    #[test]
    fn the_json_report_has_the_shape_others_read() {
        let properties = || {
            [
                property("T-1", "Passes", &[], async |_| Ok(())),
                property("T-2", "Fails", &[], async |_| Err(Mismatch::new("no"))),
                omitted("T-3", "Is out", &[], "because"),
            ]
        };
        assert_eq!(
            report(properties()).to_json(),
            serde_json::json!({ "backend": "nothing", "properties": [
                { "id": "T-1", "title": "Passes", "outcome": "pass" },
                { "id": "T-2", "title": "Fails", "outcome": "fail", "reason": "no [CONFORMANCE_SEED=7, round 1]" },
                { "id": "T-3", "title": "Is out", "outcome": "ignored", "reason": "because" },
            ]})
        );
        let text = report(properties()).to_string();
        assert!(text.ends_with("1 passed, 1 failed, 1 ignored") && text.contains("T-2    FAIL"), "{text}");
        assert_eq!(report(properties()).check("T-1 pass\nT-2 fail\nT-3 ignored: because"), Ok(()));
        assert!(report(properties()).check("T-1 pass\nT-2 pass\nT-3 pass").is_err());
    }

    #[tokio::test]
    async fn the_suite_runs_inside_a_runtime_too() {
        let suite = Suite::new(Arc::new(Nothing)).filter(|_| false).with([property("T-1", "Passes", &[], async |_| Ok(()))]);
        assert_eq!(suite.run().await.outcome("T-1"), Some(&Outcome::Pass));
    }
}
