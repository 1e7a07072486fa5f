//! `cargo xtask`: the workspace's own commands.

mod ci;
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
  bench [--mimalloc] [--peers] [--backend NAME] [--json FILE]
                                                  measure ours, the limit and the peers in one run
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
        ("bench", rest) => bench(rest),
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
    install_servers()?;
    // The examples' tests run the built programs, which `cargo test --all-targets` builds only as tests.
    step::run("build examples", &mut cargo(["build", "--workspace", "--examples"]))?;
    step::run("tests", &mut cargo(["test", "--workspace", "--all-features", "--all-targets"]))?;
    step::run("documentation tests", &mut cargo(["test", "--workspace", "--all-features", "--doc"]))
}

/// What `PUBSUB_REQUIRE` may name, the program that shows it is there, and the Debian packages it comes in.
const SERVERS: &[(&str, &str, &[&str])] =
    &[("redis", "redis-server", &["redis-server"]), ("chromium", "chromedriver", &["chromium", "chromium-driver"])];

/// Installs what `PUBSUB_REQUIRE` names and is not there, where that is possible: as root, on a Debian system.
fn install_servers() -> Outcome {
    let required = std::env::var("PUBSUB_REQUIRE").unwrap_or_default();
    let is_there = |program| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success());
    let is_required = |server: &str| required.split(',').any(|name| name.trim() == server);
    let missing = SERVERS.iter().filter(|(name, program, _)| is_required(name) && !is_there(program));
    let packages: Vec<&str> = missing.flat_map(|(_, _, packages)| packages.iter().copied()).collect();
    if packages.is_empty() {
        return Ok(());
    }
    let root = step::read(Command::new("id").arg("-u"))?.trim() == "0";
    let apt = || if root { Command::new("apt-get") } else { sudo("apt-get") };
    step::run("package lists", apt().arg("update"))?;
    let mut install = apt();
    install.args(["install", "--yes", "--no-install-recommends"]).args(&packages);
    // Tests start servers of their own; the one that a package starts is not needed.
    step::run("packages", install.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1"))
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

fn bench(arguments: &[String]) -> Outcome {
    let (mimalloc, arguments): (Vec<_>, Vec<_>) = arguments.iter().partition(|argument| *argument == "--mimalloc");
    let mut program = cargo(["run", "--profile", "bench", "--package", "pubsub-bench"]);
    if !mimalloc.is_empty() {
        program.args(["--features", "mimalloc"]);
    }
    step::run("benchmark", program.arg("--").args(arguments))
}
