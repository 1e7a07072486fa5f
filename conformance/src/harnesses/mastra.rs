//! Processes of Mastra, which share Unix sockets with ours: where their package is, and how to run one.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// How long a process may take to do what it is told, or to say what is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// The program it runs.
const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/node/peer.mjs");

/// The installed package, which `cargo xtask interop` puts into the target directory.
///
/// # Errors
/// Why there is none, or nothing that could run it.
pub fn package() -> Result<PathBuf, String> {
    let node = std::process::Command::new("node").arg("--version").stdout(Stdio::null()).status();
    if !node.is_ok_and(|status| status.success()) {
        return Err("needs `node`, which is not installed".into());
    }
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let places = program.ancestors().map(|place| place.join("interop/node_modules/@mastra/core"));
    let mut found = places.filter(|place| place.join("package.json").is_file());
    found.next().ok_or_else(|| "needs `@mastra/core`: `cargo xtask interop` installs it".into())
}

/// A process of Mastra on the bus at a socket. It is killed when this is dropped.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
    /// What it had to say before it was asked for.
    heard: VecDeque<Value>,
    is_broker: bool,
}

impl Peer {
    /// Starts one.
    ///
    /// # Errors
    /// If it cannot be started.
    pub async fn start(package: &Path, socket: &Path) -> io::Result<Self> {
        let mut command = Command::new("node");
        command.arg(PEER).arg(package).arg(socket).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let stdin = child.stdin.take().expect("it is piped");
        let stdout = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut peer = Self { child, stdin, stdout, heard: VecDeque::new(), is_broker: false };
        peer.done().await?;
        Ok(peer)
    }

    /// The number of its process.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Whether its process has ended.
    ///
    /// # Errors
    /// If that cannot be found out.
    pub fn has_ended(&mut self) -> io::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Whether it was the broker when it last did something.
    pub fn is_broker(&self) -> bool {
        self.is_broker
    }

    /// Does something, and waits until it is done.
    ///
    /// # Errors
    /// What it says, or that it says nothing.
    pub async fn act(&mut self, what: &str, more: Value) -> io::Result<()> {
        self.begin(what, more).await?;
        self.done().await
    }

    /// Begins to do something; [`done`](Self::done) waits for it.
    ///
    /// # Errors
    /// If it is gone.
    pub async fn begin(&mut self, what: &str, more: Value) -> io::Result<()> {
        let mut line = json!({"what": what});
        for (key, value) in more.as_object().into_iter().flatten() {
            line[key] = value.clone();
        }
        self.stdin.write_all(format!("{line}\n").as_bytes()).await
    }

    /// Waits until it has done the first thing that it was told and was not waited for.
    ///
    /// # Errors
    /// What it says, or that it says nothing.
    pub async fn done(&mut self) -> io::Result<()> {
        loop {
            let line = self.line().await?;
            if let Some(failed) = line.get("failed") {
                return Err(io::Error::other(failed.to_string()));
            }
            if line.get("done").is_some() {
                self.is_broker = line["broker"] == true;
                return Ok(());
            }
            self.heard.push_back(line);
        }
    }

    /// Waits for the next event it gets.
    ///
    /// # Errors
    /// That it gets none.
    pub async fn event(&mut self) -> io::Result<Value> {
        match self.heard.pop_front() {
            Some(heard) => Ok(heard),
            None => self.line().await,
        }
    }

    async fn line(&mut self) -> io::Result<Value> {
        let line = timeout(PATIENCE, self.stdout.next_line()).await??.ok_or(io::ErrorKind::UnexpectedEof)?;
        serde_json::from_str(&line).map_err(io::Error::other)
    }

    /// Kills it, as `kill -9` does; gone when this returns.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub async fn kill(mut self) -> io::Result<()> {
        self.child.kill().await
    }
}
