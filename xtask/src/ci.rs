//! Everything that must hold before a change is taken.

use std::time::{Duration, Instant};

use crate::step::{Outcome, cargo, feed, run, timed};
use crate::{conformance, test, tidy};

/// How long an example that is built already may run.
const EXAMPLE_TIME: Duration = Duration::from_secs(60);

const LINES: &str = r#"{"type": "order.placed", "runId": "run-1", "data": {"order": 1}}
{"type": "order.placed", "runId": "run-2", "data": {"text": "line\nbreak, quote \" and \ud83d\udc08"}}
{"type": "order.shipped", "data": null}
"#;

const BAD_LINES: &str = r#"{"type": "order.placed", "data": 1}
{"type": "order.placed",
{"type": "order.shipped", "data": 2}
"#;

pub(crate) fn run_all() -> Outcome {
    let started = Instant::now();
    run("format", &mut cargo(["fmt", "--all", "--check"]))?;
    tidy::run()?;
    let everything = ["clippy", "--workspace", "--all-features", "--all-targets", "--", "-D", "warnings"];
    run("lints", &mut cargo(everything))?;
    for package in ["pubsub-connect", "pubsub-conformance"] {
        let bare = ["clippy", "--package", package, "--no-default-features", "--", "-D", "warnings"];
        run("lints without features", &mut cargo(bare))?;
    }
    let mut documentation = cargo(["doc", "--workspace", "--all-features", "--no-deps"]);
    run("documentation", documentation.env("RUSTDOCFLAGS", "-D warnings"))?;
    test()?;
    examples()?;
    // The tests have run the suite over every backend; this is about the command.
    conformance(&["--backend", "memory", "--backend", "store-memory"].map(str::to_owned))?;
    println!("\n=== all passed in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Every example runs by itself, and the quick start on piped lines as well, as its readers would call it.
fn examples() -> Outcome {
    run("build examples", &mut cargo(["build", "--examples"]))?;
    // Those work until they are stopped; the tests of the examples run them, and stop them.
    for name in names()?.iter().filter(|name| !["two_processes", "notes", "live_page"].contains(&name.as_str())) {
        example(name, None, 0)?;
    }
    example("quickstart", Some(LINES), 0)?;
    example("quickstart", Some(BAD_LINES), 2)
}

/// The examples that the package declares.
fn names() -> Outcome<Vec<String>> {
    let manifest = std::fs::read_to_string("examples/Cargo.toml").map_err(|error| format!("examples/Cargo.toml: {error}"))?;
    let sections = manifest.split("[[example]]").skip(1);
    let name = |section: &str| Some(section.split_once("name = \"")?.1.split_once('"')?.0.to_owned());
    let names: Option<Vec<_>> = sections.map(name).collect();
    names.filter(|names| !names.is_empty()).ok_or_else(|| "examples/Cargo.toml: an example without a name, or none".into())
}

fn example(name: &str, input: Option<&'static str>, expected: i32) -> Outcome {
    let about = match input {
        None => "nothing piped".into(),
        Some(input) => format!("{} lines piped", input.lines().count()),
    };
    timed("example", &format!("cargo run --example {name} ({about}, exit status {expected})"), || {
        let output = feed(&mut cargo(["run", "--quiet", "--example", name]), input, EXAMPLE_TIME)?;
        let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        print!("{said}");
        eprint!("{complained}");
        if output.status.code() != Some(expected) {
            return Err(format!("example {name}: {}", output.status));
        }
        let none_lost = |line: &str| line.trim().strip_prefix("lost:").is_some_and(|count| count.trim() == "0");
        if name == "quickstart" && !said.lines().any(none_lost) {
            return Err(format!("example {name}: its report does not say `lost: 0`"));
        }
        Ok(())
    })
}
