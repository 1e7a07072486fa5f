//! What the systems under `examples/` share: one program that is director and workers at once, and the proof it prints.
//!
//! ```text
//! cargo run --example workflow [URL [ROLE [NAME]]]
//! ```
//!
//! Without a role it is the director, which starts workers, kills and pauses some of them, and ends with a proof. A worker is a process
//! of its own wherever the bus reaches other processes. On a bus that does not, it is a thread with a runtime of its own, which can be
//! killed and paused in the same way. With a role it is such a worker and nothing else: start as many by hand as you like.

use std::fmt::Display;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pubsub_core::{Bus, Capability, Error, ErrorKind, Event, EventId, Filter, Reach, Result, SubscribeOptions};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// How long a proof may take.
const AT_MOST: Duration = Duration::from_secs(100);

/// How long a worker may take to say that it is ready.
const READY: Duration = Duration::from_secs(20);

/// Where workers say that they are ready.
const TOPIC: &str = "fleet";

/// Runs the program: as the director, or as the worker that the command line names, in one of these roles.
pub async fn run<D, W, F>(roles: &[&str], needed: &[Capability], direct: D, work: W) -> ExitCode
where
    D: AsyncFnOnce(Fleet<W>) -> Result<Proof>,
    W: Fn(Role) -> F + Copy + Send + 'static,
    F: Future<Output = Result<()>>,
{
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().unwrap_or("memory:".into());
    let outcome = match (arguments.next(), arguments.next()) {
        _ if ["--help", "-h"].contains(&url.as_str()) => {
            println!("{}", usage(roles));
            return ExitCode::SUCCESS;
        }
        (None, _) => lead(url, needed, direct, work).await,
        (Some(role), _) if !roles.contains(&role.as_str()) || arguments.next().is_some() => {
            eprintln!("{}", usage(roles));
            return ExitCode::from(2);
        }
        (Some(role), name) => {
            if name.is_some() {
                end_with_the_director();
            }
            let name = name.unwrap_or_else(|| format!("{role}-{}", std::process::id()));
            match connect(&url, needed).await {
                Ok(bus) => work(Role { bus, role, name }).await.map(|()| true),
                Err(error) => Err(error),
            }
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage(roles: &[&str]) -> String {
    let program = std::env::current_exe().ok().and_then(|path| Some(path.file_stem()?.to_string_lossy().into_owned()));
    format!("usage: {} [URL [ROLE [NAME]]]; roles: {}", program.unwrap_or_default(), roles.join(", "))
}

/// Connects to a bus that can do what is needed, or says at once what would help.
async fn connect(url: &str, needed: &[Capability]) -> Result<Bus> {
    let bus = pubsub_connect::connect(url).await?;
    bus.require(needed.iter().copied()).map_err(with_remedy)?;
    Ok(bus)
}

fn with_remedy(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Unsupported(Capability::Leases) => error.caused_by("take them from another bus, by ?leases=URL"),
        _ => error,
    }
}

async fn lead<D, W, F>(url: String, needed: &[Capability], direct: D, work: W) -> Result<bool>
where
    D: AsyncFnOnce(Fleet<W>) -> Result<Proof>,
    W: Fn(Role) -> F + Copy + Send + 'static,
    F: Future<Output = Result<()>>,
{
    let bus = connect(&url, needed).await?;
    let stage = EventId::random().to_string().chars().take(8).collect();
    let fleet = Fleet { bus: bus.clone(), stage, url, work };
    let proof = timeout(AT_MOST, direct(fleet)).await.map_err(|_| Error::new(ErrorKind::Timeout).during("prove"))??;
    bus.close(Duration::from_secs(5)).await?;
    Ok(proof.print())
}

/// A worker that a director started ends with it: then nobody holds the other end of its standard input. One that is stopped just then
/// does not notice that; Linux ends it.
fn end_with_the_director() {
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).expect("a signal that there is");
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
}

/// What a worker is given.
#[derive(Debug)]
pub struct Role {
    /// The bus.
    pub bus: Bus,
    /// What it is to do.
    pub role: String,
    /// Who it is: no two workers have one name.
    pub name: String,
}

impl Role {
    /// The stage that its director plays on, which is in its name; none for one that was started by hand.
    pub fn stage(&self) -> &str {
        self.name.split_once('.').map_or("", |(_, stage)| stage)
    }

    /// Tells the director that this worker has subscribed to all it listens to.
    pub async fn ready(&self) -> Result<()> {
        self.bus.publish(TOPIC, Event::new("ready").with_run_id(&self.name)).await?;
        Ok(())
    }
}

/// What a director is given: the bus, and a way to start workers on it.
#[derive(Debug)]
pub struct Fleet<W> {
    /// The bus.
    pub bus: Bus,
    /// Tells this director's workers and work from those of others on the same bus, now or before.
    pub stage: String,
    url: String,
    work: W,
}

impl<W, F> Fleet<W>
where
    W: Fn(Role) -> F + Copy + Send + 'static,
    F: Future<Output = Result<()>>,
{
    /// Starts a worker, whose name is this one and the stage's, and waits until it says that it is ready.
    pub async fn start(&self, role: &str, name: &str) -> Result<Worker> {
        let name = &format!("{name}.{}", self.stage);
        let wanted = name.clone();
        let filter = Filter::types(["ready"]).and(move |event| event.run_id() == wanted);
        let mut ready = self.bus.subscribe_with(TOPIC, SubscribeOptions::fan_out().filter(filter)).await?;
        let life =
            if self.bus.capabilities().reach == Reach::Process { self.thread(role, name) } else { self.process(role, name) };
        let worker = Worker { name: name.clone(), life: life.map_err(|error| failed("start", name, error))? };
        match timeout(READY, ready.try_next()).await {
            Ok(Ok(Some(_))) => Ok(worker),
            Ok(Err(error)) => Err(error),
            Ok(Ok(None)) => Err(Error::closed().during("start").on(name)),
            Err(_) => Err(Error::new(ErrorKind::Timeout).during("start").on(name)),
        }
    }

    fn process(&self, role: &str, name: &str) -> std::io::Result<Life> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([&self.url, role, name]).stdin(Stdio::piped()).kill_on_drop(true);
        Ok(Life::Process(command.spawn()?))
    }

    fn thread(&self, role: &str, name: &str) -> std::io::Result<Life> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (kill, killed) = oneshot::channel();
        let (work, role) = (self.work, Role { bus: self.bus.clone(), role: role.to_owned(), name: name.to_owned() });
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let name = role.name.clone();
            runtime.block_on(async move {
                tokio::select! {
                    _ = killed => {}
                    Err(error) = work(role) => eprintln!("{name}: {error}"),
                }
            });
        })?;
        Ok(Life::Thread { handle, kill: Some(kill), gate: None })
    }
}

fn failed(operation: &'static str, name: &str, error: impl Into<pubsub_core::BoxError>) -> Error {
    Error::new(ErrorKind::Backend("the operating system refuses".into())).during(operation).on(name).caused_by(error)
}

/// A worker that was started. It is killed when it is dropped.
#[derive(Debug)]
pub struct Worker {
    name: String,
    life: Life,
}

#[derive(Debug)]
enum Life {
    Process(Child),
    Thread {
        handle: tokio::runtime::Handle,
        kill: Option<oneshot::Sender<()>>,
        /// Held while it is paused: its thread waits for this to be dropped.
        gate: Option<std::sync::mpsc::Sender<()>>,
    },
}

impl Worker {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Kills it, as `kill -9` does.
    pub async fn kill(mut self) -> Result<()> {
        println!("{} is killed", self.name);
        match &mut self.life {
            Life::Process(child) => child.kill().await.map_err(|error| failed("kill", &self.name, error)),
            Life::Thread { .. } => Ok(()), // by being dropped
        }
    }

    /// Stops it in the middle of whatever it does, as `kill -STOP` does: its clocks run on, it does not.
    pub fn pause(&mut self) -> Result<()> {
        println!("{} is stopped", self.name);
        match &mut self.life {
            Life::Process(child) => signal(child, Signal::SIGSTOP).map_err(|error| failed("pause", &self.name, error)),
            Life::Thread { handle, gate, .. } => {
                let (closed, opened) = std::sync::mpsc::channel();
                *gate = Some(closed);
                // On purpose: a task that blocks the only thread there is.
                handle.spawn(async move { opened.recv() });
                Ok(())
            }
        }
    }

    /// Lets it go on.
    pub fn resume(&mut self) -> Result<()> {
        println!("{} goes on", self.name);
        match &mut self.life {
            Life::Process(child) => signal(child, Signal::SIGCONT).map_err(|error| failed("resume", &self.name, error)),
            Life::Thread { gate, .. } => {
                *gate = None;
                Ok(())
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Life::Thread { kill, gate, .. } = &mut self.life {
            // It may have ended by itself, and then nobody listens.
            let _ = kill.take().map(|kill| kill.send(()));
            *gate = None;
        }
    }
}

fn signal(child: &Child, signal: Signal) -> std::io::Result<()> {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).ok_or(std::io::ErrorKind::NotFound)?;
    Ok(kill(Pid::from_raw(pid), signal)?)
}

/// What a system claims about itself, each claim with what was found: `name: found`, one a line.
#[derive(Debug, Default)]
pub struct Proof {
    lines: Vec<String>,
    wrong: usize,
}

impl Proof {
    /// A proof without claims.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells something that proves nothing.
    pub fn tell(&mut self, name: &str, found: impl Display) -> &mut Self {
        self.lines.push(format!("{name}: {found}"));
        self
    }

    /// Claims that this is so many.
    pub fn exactly(&mut self, name: &str, found: usize, expected: usize) -> &mut Self {
        self.claim(name, found, found == expected, format!("exactly {expected}"))
    }

    /// Claims that this is at least so many.
    pub fn at_least(&mut self, name: &str, found: usize, least: usize) -> &mut Self {
        self.claim(name, found, found >= least, format!("at least {least}"))
    }

    /// Claims that this is at most so many.
    pub fn at_most(&mut self, name: &str, found: usize, most: usize) -> &mut Self {
        self.claim(name, found, found <= most, format!("at most {most}"))
    }

    fn claim(&mut self, name: &str, found: usize, holds: bool, expected: String) -> &mut Self {
        self.wrong += usize::from(!holds);
        self.tell(name, if holds { found.to_string() } else { format!("{found}, and not {expected}") })
    }

    /// Prints it, and says whether it holds.
    fn print(&self) -> bool {
        self.lines.iter().for_each(|line| println!("{line}"));
        println!("proof: {}", if self.wrong == 0 { "holds" } else { "FAILS" });
        self.wrong == 0
    }
}

/// The next event of several subscriptions at once: where a director looks on.
pub async fn next(
    of: &mut (impl futures::Stream<Item = Result<pubsub_core::Delivery>> + Unpin),
) -> Result<pubsub_core::Delivery> {
    of.next().await.unwrap_or_else(|| Err(Error::closed()))
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[tokio::test]
    async fn who_has_no_leases_is_told_where_to_get_them() {
        let bus = Bus::from(own_backend::TinyBus::new(READY).unwrap());
        let error = with_remedy(bus.require([Capability::Leases]).unwrap_err());
        assert!(error.source().is_some_and(|remedy| remedy.to_string().contains("?leases=URL")), "{error}");
    }
}
