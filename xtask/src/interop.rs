//! Processes of Mastra as peers on the Unix socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::step::{self, Outcome, cargo};
use crate::{install, is_required, is_there};

/// What is installed from npm: the version whose tongue is spoken.
const PACKAGE: &str = "@mastra/core@1.71.0";

/// The oldest Node that runs what is used of it.
const OLDEST_NODE: u32 = 18;

/// Installs the package where tests look for it, unless it is there. Without Node that is skipped, unless `PUBSUB_REQUIRE` names
/// `node`; returns whether there is one.
pub(crate) fn prepare() -> Outcome<bool> {
    install("node", "node", &["nodejs", "npm"])?;
    install("node", "npm", &["npm"])?;
    let missing = ["node", "npm"].into_iter().find(|program| !is_there(program));
    if let Some(program) = missing {
        let why = format!("{program} is not installed");
        if is_required("node") {
            return Err(format!("interop: {why}"));
        }
        println!("\n=== interop: SKIPPED, {why}");
        return Ok(false);
    }
    let version = step::read(Command::new("node").arg("--version"))?;
    let major = version.trim().trim_start_matches('v').split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_none_or(|major| major < OLDEST_NODE) {
        let why = format!("node is {}, and the package needs {OLDEST_NODE}", version.trim());
        if is_required("node") {
            return Err(format!("interop: {why}"));
        }
        println!("\n=== interop: SKIPPED, {why}");
        return Ok(false);
    }
    let directory = directory()?;
    let manifest = directory.join("node_modules/@mastra/core/package.json");
    let version = PACKAGE.rsplit('@').next().unwrap_or_default();
    let is_installed = |manifest: &Path| {
        let text = fs::read_to_string(manifest).unwrap_or_default();
        text.contains(&format!("\"version\": \"{version}\""))
    };
    if !is_installed(&manifest) {
        fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-save", "--prefix"]);
        step::run("npm", npm.arg(&directory).arg(PACKAGE))?;
        if !is_installed(&manifest) {
            return Err(format!("interop: npm did not install {PACKAGE} in {}", directory.display()));
        }
    }
    Ok(true)
}

/// In the target directory, above the programs of tests.
fn directory() -> Outcome<PathBuf> {
    let metadata = step::read(&mut cargo(["metadata", "--format-version", "1", "--no-deps"]))?;
    let (_, rest) = metadata.split_once("\"target_directory\":\"").ok_or("cargo does not say where it builds")?;
    Ok(PathBuf::from(rest.split('"').next().unwrap_or_default()).join("interop"))
}

/// Runs the tests with real processes of Mastra, and the suite over buses on which both tongues are spoken.
pub(crate) fn run() -> Outcome {
    if !prepare()? {
        return Ok(());
    }
    let test = ["test", "--package", "pubsub-conformance", "--all-features", "--test"];
    step::run("interop", cargo(test).arg("interop"))?;
    step::run("two tongues", cargo(test).args(["unix", "--", "unix-"]))
}
