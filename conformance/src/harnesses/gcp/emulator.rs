//! Google's own emulator, started on a free port and ended with this process.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::harnesses::port::free_port;

/// How long it may take to start, or to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where Google's package puts it. It is on no path.
const LIBRARY: &str = "/usr/lib/google-cloud-sdk/platform/pubsub-emulator/lib";

/// How it is installed.
pub const INSTALL: &str = "apt-get install google-cloud-cli-pubsub-emulator default-jre-headless";

/// A running emulator.
#[derive(Debug)]
pub struct Emulator {
    /// Where it listens.
    pub address: SocketAddr,
    child: Mutex<Option<Child>>,
}

/// The program, if it is installed.
pub fn program() -> Option<PathBuf> {
    let files = Path::new(LIBRARY).read_dir().ok()?.flatten().map(|file| file.path());
    let is_it =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cloud-pubsub-emulator"));
    let program = files.filter(|path| path.extension().is_some_and(|kind| kind == "jar")).find(is_it)?;
    let java = Command::new("java").arg("-version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    java.is_ok_and(|status| status.success()).then_some(program)
}

impl Emulator {
    /// Starts one.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start() -> io::Result<Self> {
        let port = free_port()?;
        let emulator = Self { address: (Ipv4Addr::LOCALHOST, port).into(), child: Mutex::new(None) };
        emulator.spawn()?;
        Ok(emulator)
    }

    fn spawn(&self) -> io::Result<()> {
        let program = program().ok_or_else(|| io::Error::other("the emulator is not installed"))?;
        // The shell ends it when this process is gone, however that comes: then nobody holds the other end of its input.
        let mut command = Command::new("sh");
        command.args(["-c", "\"$@\" & read _; kill -KILL $!; wait", "sh"]);
        command.args(["java", "-Xms64m", "-Xmx1g", "-XX:TieredStopAtLevel=1", "-jar"]).arg(program);
        command.args(["--host=127.0.0.1".to_owned(), format!("--port={}", self.address.port())]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let until = Instant::now() + PATIENCE;
        loop {
            // While it starts it accepts connections and never answers them.
            match self.exchange("GET", "v1/projects/none/topics", "", Duration::from_secs(1)) {
                Ok(_) => break,
                _ if Instant::now() < until && child.try_wait()?.is_none() => std::thread::sleep(Duration::from_millis(20)),
                _ => {
                    drop(child.stdin.take());
                    let _ = child.wait();
                    return Err(io::Error::other("the emulator does not start"));
                }
            }
        }
        *self.child.lock() = Some(child);
        Ok(())
    }

    /// Kills it; gone when this returns.
    pub fn kill(&self) {
        if let Some(mut child) = self.child.lock().take() {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }

    /// Starts it again, on the same port, after it was killed: its memory is gone.
    ///
    /// # Errors
    /// If it does not start.
    pub fn revive(&self) -> io::Result<()> {
        self.spawn()
    }

    /// Asks it, past every client of it.
    ///
    /// # Errors
    /// What the connection says, and an answer that is none of success.
    pub fn get(&self, path: &str) -> io::Result<serde_json::Value> {
        self.ask("GET", path, "")
    }

    /// Tells it something, past every client of it.
    ///
    /// # Errors
    /// What the connection says, and an answer that is none of success.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> io::Result<serde_json::Value> {
        self.exchange(method, path, body, PATIENCE)
    }

    fn exchange(&self, method: &str, path: &str, body: &str, patience: Duration) -> io::Result<serde_json::Value> {
        let mut stream = TcpStream::connect_timeout(&self.address, PATIENCE)?;
        stream.set_read_timeout(Some(patience))?;
        let length = body.len();
        let head = format!(
            "{method} /{path} HTTP/1.1\r\nHost: emulator\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        // It keeps the connection, whatever it is asked: the answer ends where its head says.
        let mut answer = BufReader::new(stream);
        let (mut status, mut length) = (String::new(), 0);
        answer.read_line(&mut status)?;
        loop {
            let mut line = String::new();
            answer.read_line(&mut line)?;
            match line.trim_end().to_ascii_lowercase().split_once(": ") {
                Some(("content-length", value)) => length = value.parse().map_err(io::Error::other)?,
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        answer.read_exact(&mut body)?;
        if status.split(' ').nth(1) != Some("200") {
            return Err(io::Error::other(format!("{method} {path}: {status} {}", String::from_utf8_lossy(&body))));
        }
        serde_json::from_slice(&body).map_err(io::Error::other)
    }

    /// How many topics and subscriptions a project has.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn count(&self, project: &str, what: &str) -> io::Result<usize> {
        let listed = self.get(&format!("v1/projects/{project}/{what}?pageSize=1000"))?;
        Ok(listed.get(what).and_then(|all| all.as_array()).map_or(0, Vec::len))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.kill();
    }
}
