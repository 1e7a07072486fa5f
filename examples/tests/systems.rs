//! The five systems on every backend in turn, as real processes. Each kills and stops workers of its own and proves its point in what it
//! prints; this runs them, checks what they claim, and prints how long each took.
//!
//! `cargo xtask systems [--backend NAME]`

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use parking_lot::Mutex;
use port::free_port;
use tempfile::TempDir;

#[path = "../../conformance/src/harnesses/port.rs"]
mod port;

/// How long a system may take: longer than it gives itself.
const AT_MOST: Duration = Duration::from_secs(120);

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(20);

/// The systems run side by side: they mostly wait.
const AT_A_TIME: usize = 4;

/// Each system, and what it has to say for itself beside its exit status.
const SYSTEMS: [(&str, &[&str]); 5] = [
    ("workflow", &["ended exactly once: 12", "workers killed in the middle of a step: 2", "proof: holds"]),
    ("scheduler", &["fires made twice: 0", "proof: holds"]),
    ("background_tasks", &["cancelled by the worker that ran it: 1", "proof: holds"]),
    ("signals", &["signals answered, each once: 14", "runs beside another: 0", "proof: holds"]),
    ("resumable_stream", &["text of the resumed: exact, 87 tokens, 0 repeated", "text of the late:    exact, 87 tokens"]),
];

const BACKENDS: [&str; 4] = ["memory", "unix", "redis", "gcp"];

/// Why a backend cannot run here.
fn unavailable(backend: &str) -> Option<&'static str> {
    let redis = || Command::new("redis-server").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match backend {
        "redis" if !redis().is_ok_and(|status| status.success()) => Some("redis-server is not installed"),
        "unix" if !cfg!(target_os = "linux") => Some("it is for Linux"),
        "gcp" if emulator().is_none() => Some("Google's Pub/Sub emulator, or Java, is not installed"),
        _ => None,
    }
}

/// Why a system cannot prove anything on what stands for a backend here.
fn left_out(backend: &str, system: &str) -> Option<&'static str> {
    // By hand, with gcloud-sdk alone, neither do events go on to others: see "When the peer dies" of pubsub-gcp.
    let kills_members = ["workflow", "background_tasks"].contains(&system);
    (backend == "gcp" && kills_members).then_some("the emulator keeps back what it gives to a killed worker's stream")
}

/// Google's emulator, where Google's package puts it, if there is a Java for it.
fn emulator() -> Option<PathBuf> {
    let library = Path::new("/usr/lib/google-cloud-sdk/platform/pubsub-emulator/lib");
    let mut files = library.read_dir().ok()?.flatten().map(|file| file.path());
    let program = files.find(|file| file.extension().is_some_and(|kind| kind == "jar"))?;
    let java = Command::new("java").arg("-version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    java.is_ok_and(|status| status.success()).then_some(program)
}

/// A fresh bus: its URL, and what keeps it alive.
struct Fresh {
    url: String,
    _directory: Option<TempDir>,
    _server: Option<Server>,
}

fn fresh(backend: &str, system: &str) -> std::io::Result<Fresh> {
    Ok(match backend {
        "memory" if system == "resumable_stream" => {
            Fresh { url: "memory:?replay=memory".into(), _directory: None, _server: None }
        }
        "memory" => Fresh { url: "memory:".into(), _directory: None, _server: None },
        "unix" => {
            let directory = tempfile::tempdir()?;
            let url = format!("unix:{}/bus.sock", directory.path().display());
            Fresh { url, _directory: Some(directory), _server: None }
        }
        "redis" => {
            let directory = tempfile::tempdir()?;
            let (server, port) = Server::redis(directory.path())?;
            let url = format!("redis://127.0.0.1:{port}?reclaim_after=1s");
            Fresh { url, _directory: Some(directory), _server: Some(server) }
        }
        "gcp" => {
            let (server, port) = Server::emulator()?;
            let directory = tempfile::tempdir()?;
            // What it has not comes from others.
            let beside = match system {
                "resumable_stream" => "&replay=memory".into(),
                "signals" | "scheduler" => format!("&leases=unix:{}/leases.sock", directory.path().display()),
                _ => String::new(),
            };
            // The shortest deadline: after that what a killed worker held goes to others.
            let url = format!("gcp://examples?endpoint=http://127.0.0.1:{port}&ack_deadline=10s&linger=300ms{beside}");
            Fresh { url, _directory: Some(directory), _server: Some(server) }
        }
        other => return Err(std::io::Error::other(format!("nobody knows how to start {other}"))),
    })
}

/// A server of a test's own, ended with it.
struct Server(Child);

impl Server {
    fn redis(directory: &Path) -> std::io::Result<(Self, u16)> {
        let port = free_port()?;
        let port_as_text = port.to_string();
        let mut command = Self::tied("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port_as_text, "--save", "", "--dir"]).arg(directory);
        let answers = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map(drop);
        Ok((Self::start(command, answers)?, port))
    }

    fn emulator() -> std::io::Result<(Self, u16)> {
        let port = free_port()?;
        let mut command = Self::tied("java");
        command.args(["-Xms64m", "-XX:TieredStopAtLevel=1", "-jar"]).args(emulator());
        command.args(["--host=127.0.0.1", &format!("--port={port}")]);
        // While it starts it accepts connections and does not answer.
        let answers = || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: emulator\r\nConnection: close\r\n\r\n")?;
            stream.read_exact(&mut [0])
        };
        Ok((Self::start(command, answers)?, port))
    }

    /// A command whose end is tied to this process: then nobody holds the other end of its input, and the shell ends it.
    fn tied(program: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "\"$@\" & read _; kill -KILL $!; wait", "sh", program]);
        command
    }

    fn start(mut command: Command, answers: impl Fn() -> std::io::Result<()>) -> std::io::Result<Self> {
        let server = Self(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        let until = Instant::now() + PATIENCE;
        while let Err(error) = answers() {
            if Instant::now() > until {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The built example, which cargo puts beside the directory of this test.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let profile = test.ancestors().nth(2).expect("tests are built into target/PROFILE/deps");
    let path = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is not built: run `cargo build --examples` first", path.display());
    path
}

/// Runs a system to its end, over a bus of its own.
fn prove(backend: &str, system: &str, claims: &[&str]) -> Result<(), Failed> {
    let fresh = fresh(backend, system)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let output = runtime.block_on(async {
        let mut command = tokio::process::Command::new(example(system));
        command.arg(&fresh.url).stdin(Stdio::null()).kill_on_drop(true);
        tokio::time::timeout(AT_MOST, command.output()).await.map_err(|_| format!("did not end within {AT_MOST:?}"))
    })??;
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let missing = claims.iter().find(|claim| !said.lines().any(|line| line == **claim));
    match missing {
        None if output.status.success() => Ok(()),
        None => Err(format!("{}\n{said}{complained}", output.status).into()),
        Some(claim) => Err(format!("it does not say `{claim}`\n{said}{complained}").into()),
    }
}

/// What came of each system on each backend.
type Table = Arc<Mutex<BTreeMap<(&'static str, &'static str), String>>>;

fn trial(backend: &'static str, (system, claims): (&'static str, &'static [&'static str]), table: &Table) -> Trial {
    let table = table.clone();
    let left_out = left_out(backend, system);
    let why_not = unavailable(backend).or(left_out);
    let is_required = std::env::var("PUBSUB_REQUIRE").is_ok_and(|names| names.split(',').any(|name| name.trim() == backend));
    let run = move || {
        if let Some(why) = why_not {
            return Err(format!("{backend} is required, and {why}").into());
        }
        let started = Instant::now();
        let outcome = prove(backend, system, claims);
        let seconds = started.elapsed().as_secs_f64();
        let found = if outcome.is_ok() { format!("{seconds:.1} s") } else { format!("FAILED {seconds:.1} s") };
        table.lock().insert((system, backend), found);
        outcome
    };
    let reason = left_out.map(|why| format!(" ({why})")).unwrap_or_default();
    let is_ignored = left_out.is_some() || why_not.is_some() && !is_required;
    Trial::test(format!("{backend}/{system}{reason}"), run).with_ignored_flag(is_ignored)
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    let table = Table::default();
    let trials = BACKENDS.iter().flat_map(|backend| SYSTEMS.map(|system| trial(backend, system, &table))).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let table = table.lock();
    if !table.is_empty() {
        println!("{:<18}{}", "system", BACKENDS.map(|backend| format!("{backend:<14}")).concat());
        for (system, _) in SYSTEMS {
            let cell = |backend| table.get(&(system, backend)).map_or("-", String::as_str);
            println!("{system:<18}{}", BACKENDS.map(|backend| format!("{:<14}", cell(backend))).concat());
        }
        for (backend, why) in BACKENDS.iter().filter_map(|backend| Some((backend, unavailable(backend)?))) {
            println!("{backend}: {why}");
        }
    }
    conclusion.exit_code()
}
