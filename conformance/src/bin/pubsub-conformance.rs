//! Runs the suite over the backends of this workspace and prints what came of it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use pubsub_conformance::{Harness, Outcome, Report, Suite, harnesses, stores};

/// Holds backends to the contract, property by property.
#[derive(Parser)]
struct Options {
    /// A backend to run; all of them if none is named
    #[arg(long = "backend", value_name = "NAME")]
    backends: Vec<String>,
    /// Only properties whose id starts with this
    #[arg(long, value_name = "ID")]
    only: Option<String>,
    /// Write the list of reports to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    if harnesses::redis::is_other_process() {
        return harnesses::redis::other_process();
    }
    if harnesses::gcp::is_other_process() {
        return harnesses::gcp::other_process();
    }
    if harnesses::is_other_unix_process() {
        return harnesses::other_unix_process();
    }
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<bool, String> {
    let only = options.only.as_deref().map(str::to_uppercase);
    let (known, mut chosen_stores) = (harnesses::all(), harnesses::stores());
    let chosen: Vec<Arc<dyn Harness>> = if options.backends.is_empty() {
        known
    } else {
        let is_store = |name: &&String| harnesses::stores().iter().any(|store| store.name() == name.as_str());
        chosen_stores.retain(|store| options.backends.iter().any(|name| name == store.name()));
        let find = |name: &String| {
            let stores = harnesses::stores();
            let names = known.iter().map(|harness| harness.name()).chain(stores.iter().map(|store| store.name()));
            let names = || names.collect::<Vec<_>>().join(", ");
            let found = known.iter().find(|harness| harness.name() == name);
            found.cloned().ok_or_else(|| format!("no backend is called {name:?}; there are: {}", names()))
        };
        options.backends.iter().filter(|name| !is_store(name)).map(find).collect::<Result<_, _>>()?
    };
    let mut as_expected = true;
    let mut reports = Vec::new();
    for harness in chosen {
        let wanted = |id: &str| only.as_ref().is_none_or(|only| id.starts_with(only.as_str()));
        let (unavailable, missing) = (harness.unavailable(), pubsub_conformance::missing(&*harness));
        let report = Suite::new(harness).filter(|property| wanted(property.id())).run_blocking();
        as_expected &= report.failures().next().is_none();
        if let Some(why) = missing {
            eprintln!("{why}");
            as_expected = false;
        }
        // Only a whole report can be compared with the expectation, and only of what can run.
        if options.only.is_none()
            && unavailable.is_none()
            && let Err(differences) = report.check_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("expectations"))
        {
            eprintln!("{}: {differences}", report.backend());
            as_expected = false;
        }
        reports.push(report);
    }
    print_matrix(&reports);
    // Stores have properties of their own.
    for store in chosen_stores {
        let report = stores::run(&store, only.as_deref().unwrap_or_default());
        as_expected &= report.failures().next().is_none();
        if !report.properties().is_empty() {
            println!();
            print_matrix(std::slice::from_ref(&report));
            reports.push(report);
        }
    }
    if reports.iter().all(|report| report.properties().is_empty()) {
        return Err(format!("no property's id begins with {:?}", options.only.as_deref().unwrap_or_default()));
    }
    if let Some(path) = &options.json {
        let list: Vec<_> = reports.iter().map(Report::to_json).collect();
        let text = serde_json::to_string_pretty(&list).expect("JSON values can be written");
        std::fs::write(path, text + "\n").map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(as_expected)
}

/// One line per property, one column per backend; then why things failed or did not run.
fn print_matrix(reports: &[Report]) {
    let Some(first) = reports.first() else { return };
    let width = |report: &Report| report.backend().len().max(7);
    let header: Vec<_> = reports.iter().map(|report| format!("{:<1$}", report.backend(), width(report))).collect();
    println!("{:<7} {}  property", "", header.join("  "));
    for property in first.properties() {
        let cells: Vec<_> = reports
            .iter()
            .map(|report| {
                let cell = match report.outcome(property.id) {
                    Some(Outcome::Pass) => "pass",
                    Some(Outcome::Fail(_)) => "FAIL",
                    Some(Outcome::Ignored(_)) => "ignored",
                    None => "",
                };
                format!("{cell:<0$}", width(report))
            })
            .collect();
        println!("{:<7} {}  {}", property.id, cells.join("  "), property.title);
    }
    for report in reports {
        let count = |wanted: fn(&Outcome) -> bool| report.properties().iter().filter(|one| wanted(&one.outcome)).count();
        let passed = count(|outcome| *outcome == Outcome::Pass);
        let failed = count(|outcome| matches!(outcome, Outcome::Fail(_)));
        let ignored = count(|outcome| matches!(outcome, Outcome::Ignored(_)));
        println!("\n{}: {passed} passed, {failed} failed, {ignored} ignored", report.backend());
        for property in report.properties() {
            match &property.outcome {
                Outcome::Pass => {}
                Outcome::Fail(why) => println!("  {:<7} FAIL: {why}", property.id),
                Outcome::Ignored(why) => println!("  {:<7} ignored: {why}", property.id),
            }
        }
    }
}
