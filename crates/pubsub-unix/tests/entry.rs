//! Who may enter, tried as another user: with processes that are nobody's. Only root can start those; where that is not the case, it shows
//! as ignored.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use libtest_mimic::{Arguments, Failed, Trial};
use pubsub_core::{Bus, Error, ErrorKind};
use pubsub_unix::{UnixBuilder, UnixSocketPubSub};
use tokio::time::timeout;

const CHILD: &str = "PUBSUB_UNIX_ENTRY";

type Body = fn() -> Result<(), Failed>;

/// A user that no file belongs to.
const NOBODY: u32 = 65534;

fn main() -> ExitCode {
    if let Ok(job) = std::env::var(CHILD) {
        return match job.strip_prefix("listen ") {
            Some(path) => listen(path),
            None => guest(&job),
        };
    }
    let root = nix::unistd::geteuid().is_root();
    let why = if root { "" } else { " (needs root, to start processes of another user)" };
    let trials: [(&str, Body); 4] = [
        ("a stranger is not served, and told so", stranger),
        ("a directory that is for its owner alone keeps others out", closed),
        ("users and groups that are admitted are guests", guests),
        ("a stranger who takes the name first is no broker", impostor),
    ];
    let trials = trials.map(|(name, trial)| Trial::test(format!("{name}{why}"), trial).with_ignored_flag(!root));
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime can be made");
    runtime.block_on(async { timeout(Duration::from_secs(30), work).await.expect("within its time") })
}

/// Says what came of entering as a guest, by exit status.
fn guest(path: &str) -> ExitCode {
    let entered: Result<(), Error> = run(async {
        let bus = Bus::from(UnixSocketPubSub::builder(path).owner("root").connect().await?);
        let mut worker = bus.subscribe_group("work", "g").await?;
        worker.next().await.ok_or_else(Error::closed)??.done().await;
        bus.publish_data("done", "x", 1).await?;
        bus.close(Duration::from_secs(1)).await.map(drop)
    });
    match entered {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if matches!(error.kind(), ErrorKind::Denied) => ExitCode::from(77),
        Err(error) => {
            eprintln!("{error} ({error:?})");
            ExitCode::from(78)
        }
    }
}

/// Takes a name, and answers nothing.
fn listen(path: &str) -> ExitCode {
    let Ok(listener) = std::os::unix::net::UnixListener::bind(path) else { return ExitCode::FAILURE };
    let mut open = Vec::new();
    for stream in listener.incoming() {
        open.push(stream);
    }
    ExitCode::SUCCESS
}

/// A process of nobody's. Its program is copied to where nobody may run it from.
fn start(directory: &Path, path: &Path) -> Result<std::process::Child, Failed> {
    start_to(directory, &path.display().to_string())
}

fn start_to(directory: &Path, job: &str) -> Result<std::process::Child, Failed> {
    let program = directory.join("program");
    if !program.exists() {
        fs::copy(std::env::current_exe()?, &program)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    }
    let mut command = Command::new(program);
    command.env(CHILD, job).current_dir("/").uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match command.spawn() {
            // A process that another thread starts just now has the copy open for writing, until it runs its own program.
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy && Instant::now() < until => {
                std::thread::yield_now();
            }
            started => return Ok(started?),
        }
    }
}

async fn status(child: std::process::Child) -> Result<i32, Failed> {
    let mut child = child;
    let status = tokio::task::spawn_blocking(move || child.wait()).await??;
    Ok(status.code().unwrap_or(-1))
}

/// A directory that others may pass through.
fn passage() -> Result<tempfile::TempDir, Failed> {
    let directory = tempfile::tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711))?;
    Ok(directory)
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(what().into()) }
}

async fn connect(builder: UnixBuilder) -> Result<Bus, Failed> {
    Ok(Bus::from(builder.connect().await.map_err(|error| error.to_string())?))
}

fn stranger() -> Result<(), Failed> {
    run(async {
        let directory = passage()?;
        let path = directory.path().join("bus");
        let bus = connect(UnixSocketPubSub::builder(&path).allow_users(["4711"])).await?;
        let left = status(start(directory.path(), &path)?).await?;
        ensure(left == 77, || format!("exit status {left}"))?;
        bus.publish_data("t", "x", 1).await.map_err(|error| error.to_string())?;
        Ok(())
    })
}

fn closed() -> Result<(), Failed> {
    run(async {
        let directory = passage()?;
        let path = directory.path().join("made/bus");
        let _bus = connect(UnixSocketPubSub::builder(&path)).await?;
        let mode = fs::metadata(directory.path().join("made"))?.permissions().mode() & 0o777;
        ensure(mode == 0o700, || format!("{mode:o}"))?;
        let left = status(start(directory.path(), &path)?).await?;
        ensure(left != 0, || "it came in".into())
    })
}

fn guests() -> Result<(), Failed> {
    run(async {
        for admit in
            [|builder: UnixBuilder| builder.allow_users(["65534"]), |builder: UnixBuilder| builder.allow_groups(["65534"])]
        {
            let directory = passage()?;
            let path = directory.path().join("made/bus");
            let bus = connect(admit(UnixSocketPubSub::builder(&path))).await?;
            let mode =
                |name: &str| fs::symlink_metadata(directory.path().join(name)).map(|file| file.permissions().mode() & 0o777);
            ensure(mode("made")? == 0o711, || "the directory".into())?;
            ensure(mode("made/bus.lock")? == 0o600 && mode("made/bus.log.1")? == 0o600, || "lock and log".into())?;
            let mut done = bus.subscribe("done").await.map_err(|error| error.to_string())?;
            bus.publish_data("work", "x", 1).await.map_err(|error| error.to_string())?;
            let guest = start(directory.path(), &path)?;
            done.next().await.ok_or("closed")?.map_err(|error| error.to_string())?.done();
            let left = status(guest).await?;
            ensure(left == 0, || format!("exit status {left}"))?;
            bus.close(Duration::from_secs(1)).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    })
}

fn impostor() -> Result<(), Failed> {
    run(async {
        let directory = tempfile::tempdir()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o1777))?;
        let path = directory.path().join("bus");
        let mut impostor = start_to(directory.path(), &format!("listen {}", path.display()))?;
        let listens = async {
            while !path.exists() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        listens.await;
        let connected = UnixSocketPubSub::connect(&path).await;
        impostor.kill()?;
        impostor.wait()?;
        match connected {
            Err(error) if matches!(error.kind(), ErrorKind::Denied) => Ok(()),
            other => Err(format!("{other:?}").into()),
        }
    })
}
