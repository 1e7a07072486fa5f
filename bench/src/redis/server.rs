//! A `redis-server` of the benchmark's own, on a free port, without persistence; and what it says of itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pubsub_core::BoxError;

/// How long it may take to start, or to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the kernel counts processor time in, on every Linux there is.
const TICK: Duration = Duration::from_millis(10);

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    child: Child,
}

impl Server {
    pub(crate) fn start() -> Result<Self, BoxError> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--appendonly", "no"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.map_err(|error| format!("redis-server: {error}"))?;
        let server = Self { address: (Ipv4Addr::LOCALHOST, port).into(), child };
        let until = Instant::now() + PATIENCE;
        while server.ask(&["PING"]).is_err() {
            if Instant::now() > until {
                return Err("redis-server does not start".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Sends a command over a connection of its own and gives its answer, if that is a number or text.
    pub(crate) fn ask(&self, words: &[&str]) -> Result<String, BoxError> {
        let mut stream = TcpStream::connect_timeout(&self.address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut command = format!("*{}\r\n", words.len());
        for word in words {
            command += &format!("${}\r\n{word}\r\n", word.len());
        }
        stream.write_all(command.as_bytes())?;
        let (mut answer, mut line) = (BufReader::new(stream), String::new());
        answer.read_line(&mut line)?;
        match line.trim_end().split_at_checked(1).ok_or("no answer")? {
            ("+" | ":", text) => Ok(text.to_owned()),
            ("$", length) => {
                let mut text = vec![0; length.parse()?];
                answer.read_exact(&mut text)?;
                Ok(String::from_utf8(text)?)
            }
            _ => Err(format!("redis: {}", line.trim_end()).into()),
        }
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The processor time it has used.
    pub(crate) fn cpu(&self) -> Result<Duration, BoxError> {
        cpu_of(self.id())
    }
}

/// The processor time that a process has used.
pub(crate) fn cpu_of(process: u32) -> Result<Duration, BoxError> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // Behind the name, which may hold anything, user and system time are the 12th and 13th field.
    let (_, fields) = stat.rsplit_once(')').ok_or("no name in the process's status")?;
    let ticks: u32 = fields.split_whitespace().skip(11).take(2).map(str::parse::<u32>).sum::<Result<_, _>>()?;
    Ok(TICK * ticks)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}
