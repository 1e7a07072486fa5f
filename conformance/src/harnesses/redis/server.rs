//! A real `redis-server`, started on a free port with a directory of its own, and ended with this.

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::port::free_port;

/// How long a server may take to start, or to answer.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) directory: PathBuf,
    arguments: Vec<String>,
    child: Mutex<Option<Child>>,
}

/// Whether there is a server to start.
pub(super) fn is_installed() -> bool {
    let version = Command::new("redis-server").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

impl Server {
    pub(super) fn start() -> io::Result<Self> {
        Self::start_with(|_, _| Ok(Vec::new()))
    }

    /// One with further arguments, which are told its directory and its port.
    pub(super) fn start_with(arguments: impl FnOnce(&Path, u16) -> io::Result<Vec<String>>) -> io::Result<Self> {
        Self::start_as(|directory, port| {
            let own = ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"];
            let mut all: Vec<_> = own.map(str::to_owned).into();
            all.extend(arguments(directory, port)?);
            Ok(all)
        })
    }

    /// One with no arguments but these, and where it is.
    pub(super) fn start_as(arguments: impl FnOnce(&Path, u16) -> io::Result<Vec<String>>) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("pubsub-redis-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let port = free_port()?;
        let arguments = arguments(&directory, port)?;
        let server = Self { address: (Ipv4Addr::LOCALHOST, port).into(), directory, arguments, child: Mutex::new(None) };
        server.spawn()?;
        Ok(server)
    }

    /// A node for a cluster, which belongs to none yet, with further arguments, which are told its directory. There it is written which
    /// port it talks to other nodes on.
    pub(super) fn start_node_with(arguments: impl FnOnce(&Path) -> io::Result<Vec<String>>) -> io::Result<Self> {
        Self::start_with(|directory, _| {
            let bus = free_port()?.to_string();
            std::fs::write(directory.join("bus-port"), &bus)?;
            let words = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port", &bus];
            let own = words.into_iter().chain(["--repl-diskless-sync-delay", "0"]).map(str::to_owned);
            Ok(own.chain(arguments(directory)?).collect())
        })
    }

    /// A cluster of so many masters, which share the slots evenly.
    pub(super) fn start_cluster(masters: usize) -> io::Result<Vec<Self>> {
        Self::start_cluster_with(masters, |_| Ok(Vec::new()))
    }

    /// One whose nodes have further arguments, which are told the node's directory.
    pub(super) fn start_cluster_with(
        masters: usize,
        arguments: impl Fn(&Path) -> io::Result<Vec<String>>,
    ) -> io::Result<Vec<Self>> {
        let nodes = (0..masters).map(|_| Self::start_node_with(&arguments)).collect::<io::Result<Vec<_>>>()?;
        for (number, node) in nodes.iter().enumerate() {
            let (from, to) = (16384 * number / masters, 16384 * (number + 1) / masters - 1);
            node.ask(&["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()])?;
            node.ask(&["CLUSTER", "ADDSLOTSRANGE", &from.to_string(), &to.to_string()])?;
            node.meet(&nodes[0])?;
        }
        let until = Instant::now() + PATIENCE;
        let is_whole = |node: &Self| -> io::Result<bool> {
            let (info, known) = (node.ask(&["CLUSTER", "INFO"])?, node.ask(&["CLUSTER", "SLOTS"])?);
            Ok(info.text().contains("cluster_state:ok") && known.list().len() == masters)
        };
        while !nodes.iter().map(is_whole).collect::<io::Result<Vec<_>>>()?.into_iter().all(|is_whole| is_whole) {
            if Instant::now() > until {
                return Err(io::Error::other("the nodes do not make a cluster"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(nodes)
    }

    /// Makes it known to another node.
    pub(super) fn meet(&self, other: &Self) -> io::Result<()> {
        let (port, bus) = (other.address.port().to_string(), std::fs::read_to_string(other.directory.join("bus-port"))?);
        self.ask(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]).map(drop)
    }

    /// Starts it over what its directory holds. Between two of its lives somebody else may have its port, who is waited for.
    pub(super) fn spawn(&self) -> io::Result<()> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(child) = self.try_spawn(until)? {
                *self.child.lock() = Some(child);
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(io::Error::other("redis-server does not start"))
    }

    /// None if it has ended.
    fn try_spawn(&self, until: Instant) -> io::Result<Option<Child>> {
        // A shell ends the server when this process is gone, however that comes: then nobody holds the other end of its input. And it
        // ends with the server.
        let script =
            "exec 3<&0; redis-server \"$@\" </dev/null & server=$!; { read _ <&3; kill -KILL $server; } & wait $server";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).args(&self.arguments);
        command.args(["--bind", "127.0.0.1", "--port", &self.address.port().to_string()]);
        command.arg("--dir").arg(&self.directory).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        while Instant::now() < until {
            if self.is_up() {
                return Ok(Some(child));
            }
            if child.try_wait()?.is_some() {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(child.stdin.take());
        child.wait().map(|_| None)
    }

    /// Whether it answers, and not somebody else at its address, as far as can be told: a sentinel does not say where it is.
    fn is_up(&self) -> bool {
        let directory = self.directory.to_string_lossy();
        matches!(self.ask(&["PING"]), Ok(Answer::Text(text)) if text == "PONG")
            && self
                .ask(&["CONFIG", "GET", "dir"])
                .map_or(true, |dir| dir.list().get(1).is_none_or(|dir| dir.text() == directory))
    }

    /// Kills it, and starts it again over its append-only file.
    pub(super) fn restart(&self) -> io::Result<()> {
        self.kill();
        self.spawn()
    }

    /// Kills it; gone when this returns.
    pub(super) fn kill(&self) {
        if let Some(mut child) = self.child.lock().take() {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }

    /// Sends a command over a connection of its own.
    pub(super) fn ask(&self, words: &[impl AsRef<[u8]>]) -> io::Result<Answer> {
        let mut stream = TcpStream::connect_timeout(&self.address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut command = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            let word = word.as_ref();
            command.extend(format!("${}\r\n", word.len()).into_bytes());
            command.extend(word);
            command.extend(b"\r\n");
        }
        stream.write_all(&command)?;
        Answer::read(&mut io::BufReader::new(stream))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Text(String),
    Number(i64),
    Nothing,
    List(Vec<Answer>),
}

impl Answer {
    fn read(from: &mut impl io::BufRead) -> io::Result<Self> {
        let mut line = String::new();
        from.read_line(&mut line)?;
        let (kind, rest) = line.trim_end().split_at_checked(1).ok_or(io::ErrorKind::UnexpectedEof)?;
        let number = || rest.parse::<i64>().map_err(io::Error::other);
        Ok(match kind {
            "+" => Self::Text(rest.to_owned()),
            "-" => return Err(io::Error::other(rest.to_owned())),
            ":" => Self::Number(number()?),
            "$" | "*" if rest == "-1" => Self::Nothing,
            "$" => {
                let mut bytes = vec![0; usize::try_from(number()?).map_err(io::Error::other)? + 2];
                from.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Self::Text(String::from_utf8_lossy(&bytes).into_owned())
            }
            "*" => Self::List((0..number()?).map(|_| Self::read(from)).collect::<io::Result<_>>()?),
            _ => return Err(io::Error::other("an answer of an unknown kind")),
        })
    }

    pub(super) fn number(&self) -> u64 {
        match self {
            Self::Number(number) => (*number).try_into().unwrap_or(0),
            _ => 0,
        }
    }

    pub(super) fn list(&self) -> &[Self] {
        match self {
            Self::List(list) => list,
            _ => &[],
        }
    }

    pub(super) fn text(&self) -> &str {
        match self {
            Self::Text(text) => text,
            _ => "",
        }
    }
}
