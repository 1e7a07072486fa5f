//! What holds a [`ServerCache`] to its contract: run it over a store of your own.
//!
//! ```
//! use std::sync::Arc;
//!
//! use async_trait::async_trait;
//! use pubsub_cache::{InMemoryServerCache, ServerCache};
//! use pubsub_conformance::stores::{StoreHarness, run};
//! use pubsub_core::Result;
//!
//! #[derive(Default)]
//! struct Mine(Arc<InMemoryServerCache>);
//!
//! #[async_trait]
//! impl StoreHarness for Mine {
//!     fn name(&self) -> &str {
//!         "store-mine"
//!     }
//!
//!     async fn fresh(&self) -> Result<Arc<dyn StoreHarness>> {
//!         Ok(Arc::new(Self::default()))
//!     }
//!
//!     async fn connect(&self) -> Result<Arc<dyn ServerCache>> {
//!         Ok(self.0.clone())
//!     }
//! }
//!
//! let report = run(&(Arc::new(Mine::default()) as Arc<dyn StoreHarness>), "ST-1");
//! assert_eq!(report.failures().count(), 0, "{report}");
//! ```
//!
//! [`main`] shows each property to `cargo test`, as the one for backends does.

mod properties;

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use libtest_mimic::{Arguments, Failed, Trial};
use pubsub_cache::ServerCache;
use pubsub_core::Result;

use crate::harness::missing_server;
use crate::suite::{AT_A_TIME, Settings, within};
use crate::{Outcome, PropertyReport, Report, Verdict};

/// A store under test.
#[async_trait]
pub trait StoreHarness: Send + Sync + 'static {
    /// The name in reports.
    fn name(&self) -> &str;

    /// Why it cannot be tested here, if it cannot: a server that is not installed.
    fn unavailable(&self) -> Option<String> {
        None
    }

    /// The same kind of harness over another store: nothing kept in one is in the other.
    ///
    /// # Errors
    /// What the store reports.
    async fn fresh(&self) -> Result<Arc<dyn StoreHarness>>;

    /// A handle on this harness's store: another connection to it, where there are connections.
    ///
    /// # Errors
    /// What the store reports.
    async fn connect(&self) -> Result<Arc<dyn ServerCache>>;

    /// Whether the store can be ended and started again over what it keeps.
    fn restarts(&self) -> bool {
        false
    }

    /// Ends the store and starts it again; asked only of one that [restarts](Self::restarts).
    ///
    /// # Errors
    /// What the store reports.
    async fn restart(&self) -> Result<()> {
        Ok(())
    }

    /// How long one property may take (20 s).
    fn limit(&self) -> Duration {
        Duration::from_secs(20)
    }
}

type Run = fn(Arc<dyn StoreHarness>) -> Pin<Box<dyn Future<Output = Verdict> + Send>>;

/// One property of stores: an id, a sentence, and what holds a store to it.
struct Property {
    id: &'static str,
    title: &'static str,
    /// Whether it is about stores that restart.
    restarts: bool,
    run: Run,
}

impl Property {
    /// Why it does not run over this store, or none if it does.
    fn ignored(&self, harness: &dyn StoreHarness) -> Option<String> {
        let outlives = !self.restarts || harness.restarts();
        harness.unavailable().or_else(|| (!outlives).then(|| "is about stores that outlive their process".to_owned()))
    }
}

/// What came of one property, as often as the environment asks for it.
fn outcome(harness: &Arc<dyn StoreHarness>, property: &Property) -> (Outcome, Duration) {
    let start = Instant::now();
    if let Some(reason) = property.ignored(&**harness) {
        return (Outcome::Ignored(reason), start.elapsed());
    }
    for round in 0..Settings::from_env().rounds {
        let (harness, run) = (harness.clone(), property.run);
        let verdict = within(property.id, harness.limit(), async move {
            let fresh = harness.fresh().await.map_err(|error| format!("no fresh store: {error}"))?;
            run(fresh).await.map_err(|why| why.to_string())
        });
        if let Err(why) = verdict {
            return (Outcome::Fail(format!("{why} [round {}]", round + 1)), start.elapsed());
        }
    }
    (Outcome::Pass, start.elapsed())
}

/// Runs the properties whose id starts with this over a store. Blocks the thread.
pub fn run(harness: &Arc<dyn StoreHarness>, only: &str) -> Report {
    let chosen = properties::all().into_iter().filter(|property| property.id.starts_with(only));
    let report = |property: Property| {
        let (outcome, took) = outcome(harness, &property);
        PropertyReport { id: property.id, title: property.title, outcome, took }
    };
    Report { backend: harness.name().to_owned(), properties: chosen.map(report).collect() }
}

/// Runs all properties over these stores as tests named `store::ID title`, with the options of `cargo test`.
pub fn main(harnesses: impl IntoIterator<Item = Arc<dyn StoreHarness>>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    let mut trials = Vec::new();
    for harness in harnesses {
        let missing = missing_server(harness.name(), harness.unavailable());
        for property in properties::all() {
            let (ignored, missing) = (property.ignored(&*harness).filter(|_| missing.is_none()), missing.clone());
            let reason = ignored.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
            let title = format!("{}::{} {}{reason}", harness.name(), property.id, property.title);
            let harness = harness.clone();
            let trial =
                Trial::test(title, move || match missing.map_or_else(|| outcome(&harness, &property).0, Outcome::Fail) {
                    Outcome::Pass => Ok(()),
                    Outcome::Fail(why) | Outcome::Ignored(why) => Err(Failed::from(why)),
                });
            trials.push(trial.with_ignored_flag(ignored.is_some()));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
