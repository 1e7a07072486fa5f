//! Who is the broker: whoever claimed the newest epoch. The lock gives order, the register gives safety.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};

use crate::entry::Entry;
use crate::files::{Log, Paths, Register, open};
use crate::ledger::{Ledger, Limits};

/// After how long the election lock of a TypeScript peer is taken for one that was left behind.
const STALE: Duration = Duration::from_secs(2);

/// What an attempt to find or be the broker came to.
pub(crate) enum Found {
    Broker(UnixStream),
    Elected(Box<Office>),
    /// Somebody else is being elected: try again in a moment.
    Busy,
}

/// What an elected broker has: the lock, the epoch, the socket and the log.
pub(crate) struct Office {
    pub(crate) epoch: u64,
    pub(crate) register: Register,
    pub(crate) ledger: Ledger,
    pub(crate) log: Log,
    pub(crate) seat: Seat,
}

/// The socket under its two names, and the lock. Dropping it gives both up.
pub(crate) struct Seat {
    pub(crate) listener: UnixListener,
    paths: Paths,
    private: PathBuf,
    inode: u64,
    _lock: Flock<fs::File>,
}

/// Looks for the broker, and stands for election if there is none. With `supersede` there is one, and it does not answer.
pub(crate) fn find(paths: &Paths, entry: &Entry, limits: Limits, sync: bool, supersede: bool) -> io::Result<Found> {
    if entry.host().is_some() {
        return Ok(dial(paths)?.map_or(Found::Busy, Found::Broker)); // a guest is never the broker
    }
    // A broker of ours has the lock for as long as it lives. What is silent without it is somebody else's, and stays.
    let supersede = supersede && lock(paths, false)?.is_none();
    if !supersede && let Some(stream) = dial(paths)? {
        return Ok(Found::Broker(stream));
    }
    let Some(lock) = lock(paths, supersede)? else { return Ok(Found::Busy) };
    // Since the look above somebody may have been elected, and may have left the lock again.
    if !supersede && let Some(stream) = dial(paths)? {
        return Ok(Found::Broker(stream));
    }
    let Some(_elect) = Elect::acquire(paths)? else { return Ok(Found::Busy) };
    if !supersede && let Some(stream) = dial(paths)? {
        return Ok(Found::Broker(stream));
    }
    let stale = stale(paths)?;
    let mut register = Register::open(paths)?;
    if entry.is_open() {
        register.show()?;
    }
    let epoch = register.claim()?;
    // From here on nobody believes an older broker: what it wrote and had confirmed until now is in its log.
    let ledger = Log::load(paths, epoch, limits)?;
    if register.epoch()? != epoch {
        return Ok(Found::Busy);
    }
    let log = Log::create(paths, epoch, &ledger, sync)?;
    let private = paths.private();
    let listener = UnixListener::bind(&private)?;
    // Whoever can connect is looked at when he does.
    let mode = if entry.is_open() { 0o666 } else { 0o600 };
    fs::set_permissions(&private, fs::Permissions::from_mode(mode))?;
    let own = fs::symlink_metadata(&private)?.ino();
    let seat = Seat { listener, paths: paths.clone(), private, inode: own, _lock: lock };
    if stale.is_some() && inode(paths) == stale {
        fs::remove_file(&paths.socket)?;
    }
    if !seat.publish()? {
        return Ok(Found::Busy); // a peer that takes no lock was faster: be its client
    }
    paths.sweep(epoch, &seat.private);
    Ok(Found::Elected(Box::new(Office { epoch, register, ledger, log, seat })))
}

/// The inode of what was left behind under the public name. A file with something in it is somebody's, and stays.
fn stale(paths: &Paths) -> io::Result<Option<u64>> {
    match fs::symlink_metadata(&paths.socket) {
        Ok(found) if found.file_type().is_socket() || (found.is_file() && found.len() == 0) => Ok(Some(found.ino())),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something else under the socket's name")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Connects; none if nobody listens.
fn dial(paths: &Paths) -> io::Result<Option<UnixStream>> {
    match UnixStream::connect(&paths.socket) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
            // Its queue of connections is full: it is there.
            io::ErrorKind::WouldBlock => Err(error),
            _ if error.raw_os_error() == Some(nix::libc::ENOTSOCK) => Ok(None),
            _ => Err(error),
        },
    }
}

/// Takes the lock; none if somebody else has it. A broker that is superseded keeps the lock it has, on a file that is no longer
/// where it was.
fn lock(paths: &Paths, supersede: bool) -> io::Result<Option<Flock<fs::File>>> {
    let path = paths.lock();
    if supersede {
        let fresh = paths.private();
        let file = open(&fresh)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
        fs::rename(&fresh, &path)?;
        return Ok(Some(lock));
    }
    match Flock::lock(open(&path)?, FlockArg::LockExclusiveNonblock) {
        // The path may have got another file since it was opened.
        Ok(lock) if fs::symlink_metadata(&path).is_ok_and(|now| lock.metadata().is_ok_and(|own| own.ino() == now.ino())) => {
            Ok(Some(lock))
        }
        Ok(_) | Err((_, nix::errno::Errno::EAGAIN)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

/// The election lock of TypeScript peers: a file that is made exclusively.
struct Elect(PathBuf, u64);

impl Elect {
    fn acquire(paths: &Paths) -> io::Result<Option<Self>> {
        let path = paths.elect();
        match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => Ok(Some(Self(path, file.metadata()?.ino()))),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let since = fs::metadata(&path).and_then(|found| found.modified()).ok();
                let age = since.and_then(|since| SystemTime::now().duration_since(since).ok());
                if age.is_some_and(|age| age > STALE) {
                    let _ = fs::remove_file(&path); // another candidate may have been faster
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Elect {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.0).is_ok_and(|found| found.ino() == self.1) {
            let _ = fs::remove_file(&self.0);
        }
    }
}

pub(crate) fn inode(paths: &Paths) -> Option<u64> {
    fs::symlink_metadata(&paths.socket).ok().map(|found| found.ino())
}

/// Whether the public name is still this broker's.
pub(crate) enum Standing {
    Ours,
    Missing,
    Lost,
}

impl Seat {
    /// Gives the socket its public name; false if that is taken.
    pub(crate) fn publish(&self) -> io::Result<bool> {
        match fs::hard_link(&self.private, &self.paths.socket) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn standing(&self) -> Standing {
        match inode(&self.paths) {
            Some(found) if found == self.inode => Standing::Ours,
            Some(_) => Standing::Lost,
            None => Standing::Missing,
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // The name first: a successor waits for the lock.
        if matches!(self.standing(), Standing::Ours) {
            let _ = fs::remove_file(&self.paths.socket);
        }
        let _ = fs::remove_file(&self.private);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::process::{Command, Stdio};

    use pubsub_core::{Bus, Event};
    use tokio::time::timeout;

    use super::*;
    use crate::UnixSocketPubSub;

    /// As when the broker's process forked before it was killed: a child has all that it had open, and uses none of it.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_lock_and_a_listener_that_outlive_their_broker_in_another_process_stop_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bus");
        let entry = Entry::default();
        let paths = Paths::new(&path, &entry).unwrap();
        let limits = Limits { max_events: 10, max_bytes: 1 << 20 };
        let Found::Elected(office) = find(&paths, &entry, limits, false, false).unwrap() else {
            panic!("there is nobody else")
        };
        let Office { epoch, register, seat, .. } = *office;
        let lock = OwnedFd::from(seat._lock.try_clone().unwrap());
        let listener = OwnedFd::from(seat.listener.try_clone().unwrap());
        let mut keeper = Command::new("sleep").arg("60").stdin(lock).stdout(listener).stderr(Stdio::null()).spawn().unwrap();
        std::mem::forget(seat); // who is killed cleans nothing up
        let served = async {
            let bus = Bus::from(UnixSocketPubSub::connect(&path).await.unwrap());
            let mut listener = bus.subscribe("t").await.unwrap();
            bus.publish("t", Event::new("x")).await.unwrap();
            futures::StreamExt::next(&mut listener).await.unwrap().unwrap().done();
            bus.close(Duration::from_secs(1)).await.unwrap();
        };
        timeout(Duration::from_secs(15), served).await.expect("another takes over");
        assert_eq!(register.epoch().unwrap(), epoch + 1);
        keeper.kill().unwrap();
        keeper.wait().unwrap();
    }
}
