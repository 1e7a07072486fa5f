//! The style rules that a program can check.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::step::{Outcome, cargo, read, timed};

/// How long a source file may get before it is two files.
const MAX_LINES: usize = 700;

/// Features of tokio that do I/O, which the contract's crate has no business with.
const IO_FEATURES: &[&str] = &["fs", "io-std", "io-util", "net", "process", "signal", "full"];

/// The one published crate that may know more than the contract: it brings the backends together.
const BRINGS_TOGETHER: &str = "pubsub-connect";

/// Documents that show examples, and what their blocks begin with.
const SHOWN: [(&str, &[&str]); 2] =
    [("README.md", &["```rust"]), ("crates/pubsub-core/src/guide/backends.md", &["```\n", "```ignore"])];

pub(crate) fn run() -> Outcome {
    timed("tidy", "file length, openings, leftovers, manifests, dependencies, shown examples", || {
        let mut wrong = Vec::new();
        let sources = sources()?;
        for (path, text) in &sources {
            check_source(path, text, &mut wrong);
        }
        check_manifests(&mut wrong)?;
        check_dependencies(&mut wrong)?;
        check_features(&mut wrong)?;
        for (path, fences) in SHOWN {
            let text = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
            check_shown(path, &text, fences, &sources, &mut wrong);
        }
        wrong.iter().for_each(|wrong| eprintln!("{wrong}"));
        if wrong.is_empty() { Ok(()) } else { Err(format!("tidy: {} found", wrong.len())) }
    })
}

fn check_source(path: &str, text: &str, wrong: &mut Vec<String>) {
    let lines = text.lines().count();
    if lines > MAX_LINES {
        wrong.push(format!("{path}: {lines} lines, more than {MAX_LINES}: split it"));
    }
    if !text.starts_with("//!") {
        wrong.push(format!("{path}: open it with a `//!` line that says what it is"));
    }
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for leftover in ["todo", "unimplemented", "dbg"] {
            if code.contains(&format!("{leftover}!")) {
                wrong.push(format!("{path}:{}: {leftover}! was left in", number + 1));
            }
        }
    }
}

/// Every package takes the workspace's lints and its version of the compiler.
fn check_manifests(wrong: &mut Vec<String>) -> Outcome {
    for path in files(Path::new("."), "toml")? {
        if path.file_name().is_none_or(|name| name != "Cargo.toml") {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if !text.contains("[package]") {
            continue;
        }
        for needed in ["[lints]\nworkspace = true", "rust-version.workspace = true", "license.workspace = true"] {
            if !text.contains(needed) {
                wrong.push(format!("{}: `{}` is missing", path.display(), needed.replace('\n', " ")));
            }
        }
    }
    Ok(())
}

/// Has the contract of stores, which a backend that has a store knows.
const STORES: &str = "pubsub-cache";

/// The contract does no I/O, and a backend knows the contract alone.
fn check_dependencies(wrong: &mut Vec<String>) -> Outcome {
    let crates: BTreeSet<String> = fs::read_dir("crates")
        .map_err(|error| format!("crates: {error}"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    for name in &crates {
        let tree =
            ["tree", "--package", name, "--all-features", "--edges", "normal", "--prefix", "none", "--format", "{p} {f}"];
        check_tree(name, &read(&mut cargo(tree))?, &crates, wrong);
    }
    Ok(())
}

/// A line of the tree is `tokio v1.48.0 default,rt`, or `pubsub-core v0.1.0 (path) ` for a crate of the workspace.
fn check_tree(name: &str, tree: &str, crates: &BTreeSet<String>, wrong: &mut Vec<String>) {
    for line in tree.lines() {
        let mut words = line.split(' ');
        let dependency = words.next().unwrap_or_default();
        if name == "pubsub-core" && dependency == "tokio" {
            let features = words.nth(1).unwrap_or_default();
            for feature in features.split(',').filter(|feature| IO_FEATURES.contains(feature)) {
                wrong.push(format!("{name}: switches on tokio's `{feature}`, and the contract does no I/O"));
            }
        }
        let is_contract = dependency == "pubsub-core" || (dependency == STORES && name != "pubsub-core");
        if crates.contains(dependency) && dependency != name && !is_contract && name != BRINGS_TOGETHER {
            wrong.push(format!(
                "{name}: depends on {dependency}; a backend knows pubsub-core alone, and the contract of stores"
            ));
        }
    }
}

/// Who depends on one backend by URL gets no other: each feature of the crate that brings them together brings one.
fn check_features(wrong: &mut Vec<String>) -> Outcome {
    let path = format!("crates/{BRINGS_TOGETHER}/Cargo.toml");
    let manifest = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let features = features(&manifest);
    if features.is_empty() {
        wrong.push(format!("{path}: no feature brings a backend"));
    }
    for (feature, backend) in features {
        let tree = ["tree", "--package", BRINGS_TOGETHER, "--no-default-features", "--features", feature];
        let shown = ["--edges", "normal", "--prefix", "none", "--format", "{p}"];
        check_feature(feature, backend, &read(cargo(tree).args(shown))?, wrong);
    }
    Ok(())
}

/// The features that bring a crate of ours, each with that crate.
fn features(manifest: &str) -> Vec<(&str, &str)> {
    let lines = manifest.split("[features]").nth(1).unwrap_or_default().lines().take_while(|line| !line.starts_with('['));
    lines.filter_map(|line| Some((line.split_once(" = ")?.0, line.split_once("\"dep:pubsub-")?.1.split_once('"')?.0))).collect()
}

fn check_feature(feature: &str, backend: &str, tree: &str, wrong: &mut Vec<String>) {
    let ours = tree.lines().filter_map(|line| line.split(' ').next()?.strip_prefix("pubsub-"));
    let found: BTreeSet<_> = ours.filter(|name| !["core", "connect"].contains(name)).collect();
    if found != BTreeSet::from([backend]) {
        wrong.push(format!("{BRINGS_TOGETHER}: the feature `{feature}` brings {found:?}, and is to bring `{backend}` alone"));
    }
}

/// Every such block of a document is, word for word, code that is compiled and run as an example.
fn check_shown(path: &str, text: &str, fences: &[&str], sources: &[(String, String)], wrong: &mut Vec<String>) {
    let examples: Vec<_> = sources.iter().filter(|(path, _)| path.starts_with("examples/")).collect();
    // Fences come in pairs: what is between blocks is every other piece.
    for block in text.split("```").skip(1).step_by(2).filter(|block| {
        let fenced = format!("```{block}");
        fences.iter().any(|fence| fenced.starts_with(fence))
    }) {
        let block = block.split_once('\n').map_or("", |(_, rest)| rest).trim();
        if !examples.iter().any(|(_, text)| text.contains(block)) {
            let first = block.lines().next().unwrap_or_default();
            wrong.push(format!("{path}: the block that begins `{first}` is in no file under examples/"));
        }
    }
}

/// Every Rust file of the workspace, with its text.
fn sources() -> Outcome<Vec<(String, String)>> {
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let shown = path.strip_prefix(".").unwrap_or(&path).display().to_string();
        Ok((shown, text))
    };
    files(Path::new("."), "rs")?.into_iter().map(read).collect()
}

/// The files with this extension, in order, leaving out what is built and what is hidden.
fn files(folder: &Path, extension: &str) -> Outcome<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))? {
        let entry = entry.map_err(|error| error.to_string())?;
        let (path, name) = (entry.path(), entry.file_name());
        if name == "target" || name == "node_modules" || name.to_string_lossy().starts_with('.') {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path, extension)?);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        check_source(path, text, &mut wrong);
        wrong
    }

    #[test]
    fn sources_are_short_open_with_what_they_are_and_hold_no_leftovers() {
        assert!(found("a.rs", "//! What it is.\nfn f() {} // todo!() in a comment\n").is_empty());
        assert_eq!(found("a.rs", "fn f() {}\n").len(), 1);
        assert_eq!(found("a.rs", &format!("//! What it is.\nfn f() {{ {}!(1) }}\n", "dbg")).len(), 1);
        assert_eq!(found("a.rs", &"//! Long.\n".repeat(MAX_LINES + 1)).len(), 1);
    }

    #[test]
    fn the_contract_does_no_io_and_backends_know_it_alone() {
        let crates =
            ["pubsub-core", "pubsub-cache", "pubsub-emitter", "pubsub-redis", "pubsub-connect"].map(String::from).into();
        let count = |name, tree| {
            let mut wrong = Vec::new();
            check_tree(name, tree, &crates, &mut wrong);
            wrong.len()
        };
        assert_eq!(count("pubsub-core", "pubsub-core v0.1.0 (/crates/pubsub-core) \ntokio v1.48.0 default,rt,time\n"), 0);
        assert_eq!(count("pubsub-core", "tokio v1.48.0 default,net,rt\n"), 1);
        assert_eq!(count("pubsub-redis", "pubsub-core v0.1.0 (/crates/pubsub-core) \ntokio v1.48.0 net\n"), 0);
        assert_eq!(count("pubsub-redis", "pubsub-emitter v0.1.0 (/crates/pubsub-emitter) \n"), 1);
        assert_eq!(count("pubsub-redis", "pubsub-cache v0.1.0 (/crates/pubsub-cache) \n"), 0);
        assert_eq!(count("pubsub-core", "pubsub-cache v0.1.0 (/crates/pubsub-cache) \n"), 1);
        assert_eq!(count("pubsub-connect", "pubsub-emitter v0.1.0 (/crates/pubsub-emitter) \n"), 0);
    }

    #[test]
    fn a_feature_brings_one_backend() {
        let manifest = "[features]\ndefault = [\"memory\"]\nmemory = [\"dep:pubsub-emitter\"] # one\n[dependencies]\n";
        assert_eq!(features(manifest), [("memory", "emitter")]);
        let count = |tree| {
            let mut wrong = Vec::new();
            check_feature("memory", "emitter", tree, &mut wrong);
            wrong.len()
        };
        assert_eq!(count("pubsub-connect v0.1.0\npubsub-core v0.1.0\npubsub-emitter v0.1.0\ntokio v1.48.0\n"), 0);
        assert_eq!(count("pubsub-connect v0.1.0\npubsub-core v0.1.0\n"), 1);
        assert_eq!(count("pubsub-emitter v0.1.0\npubsub-redis v0.1.0\n"), 1);
    }

    #[test]
    fn what_is_shown_is_an_example() {
        let sources = [("examples/examples/a.rs".to_owned(), "//! A.\nfn main() {}\n".to_owned())];
        let count = |text, fence| {
            let mut wrong = Vec::new();
            check_shown("README.md", text, &[fence], &sources, &mut wrong);
            wrong.len()
        };
        assert_eq!(count("```rust\nfn main() {}\n```\n```sh\nls\n```\n", "```rust"), 0);
        assert_eq!(count("```rust,no_run\nfn other() {}\n```\n", "```rust"), 1);
        assert_eq!(count("```toml\na = 1\n```\n\n```\nfn other() {}\n```\n", "```\n"), 1);
    }
}
