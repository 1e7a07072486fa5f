//! A `main` for tests with `harness = false`: each property a test, each ignore shown.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};

use crate::harness::missing;
use crate::suite::{AT_A_TIME, Settings, execute};
use crate::{Harness, Outcome, Property, expectation, registry};

/// Runs all properties over these harnesses as tests named `backend::ID title`, with the options of `cargo test`.
///
/// With a directory of expectation files (`<backend>.txt`), `backend::expectation` fails when a property is ignored that was
/// not expected to be, or the reverse, or for another reason. Whether the others pass is theirs to say.
/// `CONFORMANCE_BLESS=1` writes the files.
pub fn main(expectations: Option<&Path>, harnesses: impl IntoIterator<Item = Arc<dyn Harness>>) -> ExitCode {
    run(expectations, harnesses, &|_| true)
}

/// Runs the properties that `keep` wants over these harnesses, as [`main`](fn@main) does; for what is no whole bus.
pub fn main_of(keep: impl Fn(&Property) -> bool, harnesses: impl IntoIterator<Item = Arc<dyn Harness>>) -> ExitCode {
    run(None, harnesses, &keep)
}

fn run(
    expectations: Option<&Path>,
    harnesses: impl IntoIterator<Item = Arc<dyn Harness>>,
    keep: &dyn Fn(&Property) -> bool,
) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    let settings = Settings::from_env();
    let mut trials = Vec::new();
    for harness in harnesses {
        let name = harness.name().to_owned();
        if let Some(directory) = expectations {
            let (directory, harness) = (PathBuf::from(directory), harness.clone());
            let missing = missing(&*harness);
            let pointless = missing.is_none() && harness.unavailable().is_some();
            let expectation = Trial::test(format!("{name}::expectation"), move || {
                if let Some(why) = missing {
                    return Err(Failed::from(why));
                }
                let skips: Vec<_> = registry()
                    .iter()
                    .map(|property| (property.id(), property.ignored(&*harness).map_or(Outcome::Pass, Outcome::Ignored)))
                    .collect();
                expectation::check_file(&directory, harness.name(), &skips).map_err(|why| Failed::from(why.to_string()))
            });
            // What is ignored for want of a server says nothing about what is expected with one.
            trials.push(expectation.with_ignored_flag(pointless));
        }
        for property in registry().into_iter().filter(|property| keep(property)) {
            let ignored = property.ignored(&*harness);
            let reason = ignored.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
            let title = format!("{name}::{} {}{reason}", property.id(), property.title());
            let harness = harness.clone();
            let trial = Trial::test(title, move || match execute(&harness, &property, settings).0 {
                Outcome::Pass => Ok(()),
                Outcome::Fail(why) => Err(Failed::from(why)),
                // Reached only when asked to run what is ignored; that is no pass.
                Outcome::Ignored(reason) => Err(Failed::from(format!("cannot run: {reason}"))),
            });
            trials.push(trial.with_ignored_flag(ignored.is_some()));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
