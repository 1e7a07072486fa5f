//! Tests that need a server of their own: shown as ignored where it is not installed, and failed where it is required.

use std::process::ExitCode;
use std::time::Duration;

use futures::future::BoxFuture;
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::time::timeout;

use crate::server;

/// Runs tests, by what they show, each on a runtime of its own and within this time.
pub(crate) fn run<T>(tests: impl IntoIterator<Item = (&'static str, T)>, within: Duration) -> ExitCode
where
    T: FnOnce() -> BoxFuture<'static, ()> + Send + 'static,
{
    let required = std::env::var("PUBSUB_REQUIRE").is_ok_and(|names| names.split(',').any(|name| name.trim() == "redis"));
    let installed = server::is_installed();
    let trials = tests.into_iter().map(|(name, test)| {
        let trial = Trial::test(name, move || {
            if !installed {
                return Err(Failed::from("redis is required, and `redis-server` is not installed"));
            }
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(async { timeout(within, test()).await.map_err(|_| Failed::from("takes too long")) })
        });
        trial.with_ignored_flag(!installed && !required)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
