//! Small wrong buses, each of which its properties must catch: what proves the suite.
//!
//! A saboteur wraps a bus that is right and does one thing wrong. The properties named for it have to fail, and have to pass when
//! the wrapper does no harm. That every clause has a property and a saboteur is checked here, too.

mod closing;
mod pairing;
mod publishing;
mod retaining;
mod settling;
mod subscribing;
mod wrapper;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use pubsub_conformance::harnesses::{EmitterHarness, SlowRemoteHarness};
use pubsub_conformance::{Harness, Outcome, Property, Suite, registry};

use crate::retaining::Forgetful;
use crate::wrapper::{Harmless, Sabotage, SabotagedHarness};

/// How many run at a time: they mostly wait in vain.
const AT_A_TIME: usize = 8;

/// How often a property is run until it catches its saboteur: a race has to be met.
const TRIES: u64 = 5;

/// One way for a bus to be wrong.
pub(crate) struct Saboteur {
    /// What it does.
    what: &'static str,
    /// The clauses it breaks.
    clauses: &'static [&'static str],
    /// The properties that must catch it, each of them.
    caught_by: &'static [&'static str],
    base: Base,
    make: fn() -> Arc<dyn Sabotage>,
}

/// The bus that a saboteur wraps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Base {
    Memory,
    MemoryStrict,
    SlowRemote,
    /// The in-process bus, keeping no dead letters.
    Forgetful,
}

impl Base {
    fn harness(self) -> Arc<dyn Harness> {
        match self {
            Self::Memory => Arc::new(EmitterHarness::plain()),
            Self::MemoryStrict => Arc::new(EmitterHarness::strict()),
            Self::SlowRemote => Arc::new(SlowRemoteHarness::new(0x5ab)),
            Self::Forgetful => {
                let forgetful: fn() -> Arc<dyn Sabotage> = || Arc::new(Forgetful);
                Arc::new(SabotagedHarness::new(Self::Memory.harness(), forgetful))
            }
        }
    }
}

/// All of them.
fn saboteurs() -> Vec<Saboteur> {
    [publishing::saboteurs, subscribing::saboteurs, settling::saboteurs, retaining::saboteurs, closing::saboteurs]
        .into_iter()
        .flat_map(|section| section())
        .collect()
}

/// Declares a saboteur over the in-process bus.
fn saboteur<S: Sabotage + Default>(
    what: &'static str,
    clauses: &'static [&'static str],
    caught_by: &'static [&'static str],
) -> Saboteur {
    Saboteur { what, clauses, caught_by, base: Base::Memory, make: || Arc::new(S::default()) }
}

impl Saboteur {
    /// Over another bus.
    fn over(mut self, base: Base) -> Self {
        self.base = base;
        self
    }
}

/// What came of one property over a wrapped bus: the first failure in so many rounds.
fn outcome(base: Base, make: fn() -> Arc<dyn Sabotage>, id: &'static str, rounds: u64) -> Result<Outcome, Failed> {
    let harness = Arc::new(SabotagedHarness::new(base.harness(), make));
    let report = Suite::new(harness).filter(|property| property.id() == id).stress(rounds).run_blocking();
    report.outcome(id).cloned().ok_or_else(|| Failed::from(format!("there is no property {id}")))
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    let mut trials = pairing::trials();
    let mut controls = BTreeSet::new();
    for Saboteur { what, caught_by, base, make, .. } in saboteurs() {
        for id in caught_by {
            controls.insert((base, *id));
            trials.push(Trial::test(format!("{id} catches a bus that {what}"), move || {
                match outcome(base, make, id, TRIES)? {
                    Outcome::Fail(_) => Ok(()),
                    Outcome::Pass => Err(Failed::from(format!("{id} passes"))),
                    Outcome::Ignored(why) => Err(Failed::from(format!("{id} does not run: {why}"))),
                }
            }));
        }
    }
    for (base, id) in controls {
        let name = base.harness().name().to_owned();
        trials.push(Trial::test(format!("{id} passes over {name}, wrapped and unharmed"), move || {
            match outcome(base, || Arc::new(Harmless), id, 1)? {
                Outcome::Pass => Ok(()),
                other => Err(Failed::from(format!("{other:?}"))),
            }
        }));
    }
    let everything = "every property is failed by some saboteur (takes ten minutes: run it with --ignored)";
    trials.push(Trial::test(everything, everybody_against_everything).with_ignored_flag(true));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Every saboteur against every property that was not caught failing yet: one that nobody fails proves nothing.
fn everybody_against_everything() -> Result<(), Failed> {
    let proven: BTreeSet<_> = saboteurs().iter().flat_map(|saboteur| saboteur.caught_by).copied().collect();
    let unproven = |property: &Property| property.omitted().is_none() && !proven.contains(property.id());
    let mut unproven: BTreeSet<_> = registry().iter().filter(|property| unproven(property)).map(Property::id).collect();
    for Saboteur { what, base, make, .. } in saboteurs() {
        let harness = Arc::new(SabotagedHarness::new(base.harness(), make));
        let report = Suite::new(harness).filter(|property| unproven.contains(property.id())).run_blocking();
        let failed: Vec<_> = report.failures().map(|property| property.id).collect();
        println!("{what}: {}", failed.join(" "));
        unproven.retain(|id| !failed.contains(id));
    }
    if unproven.is_empty() { Ok(()) } else { Err(Failed::from(format!("nobody fails {unproven:?}"))) }
}
