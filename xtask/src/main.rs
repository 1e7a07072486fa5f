//! `cargo xtask`: the workspace's own commands.

mod ci;
mod interop;
mod step;
mod tidy;

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use step::{Outcome, cargo};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  test                                            set up what tests need, then run every test
  conformance [--backend NAME] [--only ID] [--json FILE]
                                                  run the delivery-semantics suite and print its matrix
  systems [--backend NAME]                        run the five systems as processes on each backend, and print how long each took
  guarantees                                      write the README's table of what each backend guarantees
  bench [--mimalloc] [--peers] [--backend NAME] [--json FILE]
                                                  measure ours, the limit and the peers in one run
  interop                                         install @mastra/core from npm into the target directory, and run
                                                  it on one bus with ours
  ci                                              everything that must hold: format, lints, documentation, tests,
                                                  examples, conformance, tidy
  tidy                                            the style rules that a program can check

Further arguments of conformance and bench go to their programs; --help after either lists them.";

fn main() -> ExitCode {
    // Run from anywhere in the workspace: every path below is relative to its root.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace");
    if let Err(error) = std::env::set_current_dir(root) {
        eprintln!("xtask: {}: {error}", root.display());
        return ExitCode::FAILURE;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = arguments.split_first().map_or(("", &[][..]), |(command, rest)| (command.as_str(), rest));
    let outcome = match (command, rest) {
        ("test", []) => test(),
        ("conformance", rest) => conformance(rest),
        ("guarantees", []) => guarantees(),
        ("systems", []) => systems(None),
        ("systems", [option, backend]) if option == "--backend" => systems(Some(backend)),
        ("bench", rest) => bench(rest),
        ("interop", []) => interop::run(),
        ("ci", []) => ci::run_all(),
        ("tidy", []) => tidy::run(),
        ("help" | "--help" | "-h", _) => {
            println!("{USAGE}");
            Ok(())
        }
        ("", _) => Err(USAGE.into()),
        _ => Err(format!("`{}` is not understood\n\n{USAGE}", arguments.join(" "))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Every test of the workspace. Tests start the servers they need themselves, on free ports; whatever has to be installed or
/// built once for all of them is set up here first.
fn test() -> Outcome {
    install("redis", "redis-server", &["redis-server"])?;
    install("chromium", "chromedriver", &["chromium", "chromium-driver"])?;
    interop::prepare()?;
    // The examples' tests run the built programs, which `cargo test --all-targets` builds only as tests.
    step::run("build examples", &mut cargo(["build", "--workspace", "--examples"]))?;
    step::run_tests("tests", &mut cargo(["test", "--workspace", "--all-features", "--all-targets", "--no-fail-fast"]))?;
    step::run_tests("documentation tests", &mut cargo(["test", "--workspace", "--all-features", "--doc"]))
}

/// Whether `PUBSUB_REQUIRE` names this.
fn is_required(name: &str) -> bool {
    let required = std::env::var("PUBSUB_REQUIRE").unwrap_or_default();
    required.split(',').any(|one| one.trim() == name)
}

fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Installs the packages of what `PUBSUB_REQUIRE` names if its program is not there, where that is possible: as root, on a Debian
/// system.
fn install(name: &str, program: &str, packages: &[&str]) -> Outcome {
    if !is_required(name) || is_there(program) {
        return Ok(());
    }
    let root = step::read(Command::new("id").arg("-u"))?.trim() == "0";
    let apt = || if root { Command::new("apt-get") } else { sudo("apt-get") };
    step::run("package lists", apt().arg("update"))?;
    let install = ["install", "--yes", "--no-install-recommends"];
    // Tests start servers of their own; one that a package starts is not needed.
    step::run(name, apt().env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1").args(install).args(packages))
}

fn sudo(program: &str) -> Command {
    let mut command = Command::new("sudo");
    command.args(["--preserve-env=DEBIAN_FRONTEND,RUNLEVEL", program]);
    command
}

fn conformance(arguments: &[String]) -> Outcome {
    let program = ["run", "--package", "pubsub-conformance", "--all-features", "--bin", "pubsub-conformance", "--"];
    step::run("conformance", cargo(program).args(arguments))
}

/// What each backend guarantees, from the suite's reports, between two marks of the README.
fn guarantees() -> Outcome {
    const MARKS: (&str, &str) = ("<!-- written by `cargo xtask guarantees` -->\n", "<!-- until here -->");
    let program = ["run", "--quiet", "--package", "pubsub-conformance", "--all-features", "--bin", "pubsub-conformance", "--"];
    let table = step::read(cargo(program).arg("--guarantees"))?;
    let readme = std::fs::read_to_string("README.md").map_err(|error| format!("README.md: {error}"))?;
    let parts = readme.split_once(MARKS.0).and_then(|(head, rest)| Some((head, rest.split_once(MARKS.1)?.1)));
    let (head, tail) = parts.ok_or("README.md: its marks for the table are gone")?;
    std::fs::write("README.md", [head, MARKS.0, &table, MARKS.1, tail].concat()).map_err(|error| format!("README.md: {error}"))
}

fn systems(backend: Option<&str>) -> Outcome {
    step::run("build examples", &mut cargo(["build", "--package", "pubsub-examples", "--examples"]))?;
    let mut program = cargo(["test", "--package", "pubsub-examples", "--test", "systems", "--"]);
    step::run("systems", program.args(backend.map(|name| format!("{name}/"))))
}

fn bench(arguments: &[String]) -> Outcome {
    let (mimalloc, arguments): (Vec<_>, Vec<_>) = arguments.iter().partition(|argument| *argument == "--mimalloc");
    let mut program = cargo(["run", "--profile", "bench", "--package", "pubsub-bench"]);
    if !mimalloc.is_empty() {
        program.args(["--features", "mimalloc"]);
    }
    if arguments.iter().any(|argument| *argument == "--peers") {
        program.args(["--features", "sea-streamer"]);
    }
    step::run("benchmark", program.arg("--").args(arguments))
}
