//! The peer that runs under Node: `@mastra/core`'s emitter and its caching decorator, in a process of their own.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use pubsub_core::BoxError;

use crate::report::Role;
use crate::rounds::{Contest, Party};

/// The party's name.
pub(crate) const MASTRA: &str = "mastra";

const PACKAGE: &str = "@mastra/core@1.71";

/// What the peer is asked for: a contest goes by its first setting.
const SETTINGS: &[&str] =
    &["queued 1 to 1", "inline 1 to 1", "queued 1 to 10", "group of 4", "latency p50", "publish", "replay"];

/// Adds the peer where it can take part; says why if it is not here.
pub(crate) fn join(contests: &mut [Contest]) {
    let peer = match Peer::start() {
        Ok(peer) => Rc::new(RefCell::new(peer)),
        Err(why) => return eprintln!("bench: SKIPPED {MASTRA}: {why}"),
    };
    for contest in contests.iter_mut().filter(|contest| SETTINGS.contains(&contest.settings[0].0)) {
        let (peer, setting, figures) = (peer.clone(), contest.settings[0].0, contest.settings.len());
        let round = move |time| peer.borrow_mut().round(setting, time, figures);
        contest.parties.push(Party::new(MASTRA, Role::Peer, round));
    }
}

struct Peer {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Peer {
    fn start() -> Result<Self, BoxError> {
        let script = install()?;
        let mut child = Command::new("node").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take().ok_or("no standard input")?;
        let stdout = child.stdout.take().ok_or("no standard output")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Ok(Self { child, stdin, answers })
    }

    fn round(&mut self, setting: &str, time: Duration, figures: usize) -> Result<Vec<f64>, BoxError> {
        writeln!(self.stdin, "{}", serde_json::json!({ "setting": setting, "seconds": time.as_secs_f64() }))?;
        let answer = self.answers.recv_timeout(time * 10 + Duration::from_secs(20)).map_err(|_| "no answer from node")?;
        let measured: Vec<f64> = serde_json::from_str(&answer).map_err(|error| format!("{answer:?} from node: {error}"))?;
        if measured.len() == figures { Ok(measured) } else { Err(format!("{answer:?} from node").into()) }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}

/// Installs the package and gives the script's path beside it: modules are looked up from where the script lies.
fn install() -> Result<PathBuf, BoxError> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = here.join("../target/peers");
    std::fs::create_dir_all(&folder)?;
    if !folder.join("node_modules/@mastra/core/package.json").exists() {
        eprintln!("bench: npm install {PACKAGE} in {}", folder.display());
        let arguments = ["install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", ".", PACKAGE];
        let status = Command::new("npm").args(arguments).current_dir(&folder).stdout(Stdio::null()).status();
        let status = status.map_err(|error| format!("npm: {error}"))?;
        if !status.success() {
            return Err(format!("npm install: {status}").into());
        }
    }
    let script = folder.join("mastra.mjs");
    std::fs::copy(here.join("peers/mastra.mjs"), &script)?;
    match Command::new("node").arg("--version").stdout(Stdio::null()).status() {
        Ok(_) => Ok(script),
        Err(error) => Err(format!("node: {error}").into()),
    }
}
