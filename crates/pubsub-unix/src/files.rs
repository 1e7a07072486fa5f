//! The files beside the socket: the register of epochs, the log, and who may come near them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::statfs::{self, FsType};

use crate::entry::Entry;
use crate::journal;
use crate::ledger::{Ledger, Limits};

/// How long a socket's path may be: the kernel's limit, less what private names add.
pub(crate) const MAX_PATH: usize = 107 - PRIVATE;
const PRIVATE: usize = 9;

/// One claim in the register.
const CLAIM: u64 = 32;

/// How much a log grows before it is written anew as a snapshot: so much, and by so many times what the last snapshot had. What is
/// written twice stays less than what is written once, however much is retained.
pub(crate) const ROTATE_AT: u64 = 64 << 20;
const ROTATE_AFTER: u64 = 2;

/// The socket's path, and those of its companions.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) socket: PathBuf,
    directory: PathBuf,
    name: String,
}

impl Paths {
    /// Checks the path, and makes its directory if there is none.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(crate) fn new(path: &Path, entry: &Entry) -> Result<Self, String> {
        let absolute = std::path::absolute(path).map_err(|error| error.to_string())?;
        let name = absolute.file_name().and_then(|name| name.to_str()).ok_or("has no file name, or none in UTF-8")?;
        let directory = absolute.parent().ok_or("has no directory")?.to_owned();
        let length = absolute.as_os_str().len();
        if length > MAX_PATH {
            return Err(format!("has {length} bytes as an absolute path; a socket's may have {MAX_PATH}"));
        }
        let name = name.to_owned();
        let paths = Self { socket: absolute, directory, name };
        paths.check_directory(entry).map_err(|error| format!("{}: {error}", paths.directory.display()))?;
        Ok(paths)
    }

    fn check_directory(&self, entry: &Entry) -> io::Result<()> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        if entry.host().is_none() {
            // Others may at most pass through it, to files whose names they know.
            let mode = if entry.is_open() { 0o711 } else { 0o700 };
            DirBuilder::new().recursive(true).mode(mode).create(&self.directory)?;
        }
        let directory = fs::metadata(&self.directory)?;
        let (mode, sticky) = (directory.mode(), directory.mode() & libc::S_ISVTX != 0);
        if mode & 0o002 != 0 && !sticky {
            return refuse("anybody may write to the directory, and remove what is not theirs: it lacks the sticky bit");
        }
        if !entry.trusts(directory.uid()) {
            return refuse("the directory belongs to another user");
        }
        match statfs::statfs(&self.directory).map(|found| found.filesystem_type()) {
            Ok(kind) if NETWORK.contains(&kind) => refuse("the directory is on a network file system"),
            _ => Ok(()),
        }
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        self.directory.join(format!("{}.{suffix}", self.name))
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.beside("lock")
    }

    pub(crate) fn elect(&self) -> PathBuf {
        self.beside("elect")
    }

    /// A name that nobody else has, of as many bytes as the limit allows for.
    pub(crate) fn private(&self) -> PathBuf {
        self.beside(&format!("{:08x}", fastrand::u32(..)))
    }

    fn log(&self, epoch: u64) -> PathBuf {
        self.beside(&format!("log.{epoch}"))
    }

    /// The logs there are, by epoch.
    fn logs(&self) -> io::Result<Vec<u64>> {
        let prefix = format!("{}.log.", self.name);
        let names = fs::read_dir(&self.directory)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut epochs: Vec<u64> = names.filter_map(|name| name.strip_prefix(&prefix)?.parse().ok()).collect();
        epochs.sort_unstable();
        Ok(epochs)
    }

    /// Removes what brokers that were killed left behind: private sockets and older or half-written logs.
    pub(crate) fn sweep(&self, epoch: u64, own: &Path) {
        let (log, dotted) = (format!("{}.log.", self.name), format!("{}.", self.name));
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let stale = match (name.strip_prefix(&log), name.strip_prefix(&dotted)) {
                (Some(rest), _) => rest.split('.').next().and_then(|of| of.parse::<u64>().ok()).is_some_and(|of| of < epoch),
                (None, Some(rest)) => {
                    let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
                    rest.len() == 8 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()) && is_socket && entry.path() != own
                }
                _ => false,
            };
            if stale {
                let _ = fs::remove_file(entry.path()); // another sweep may have been faster
            }
        }
    }
}

const NETWORK: &[FsType] = &[
    statfs::NFS_SUPER_MAGIC,
    statfs::SMB_SUPER_MAGIC,
    statfs::CODA_SUPER_MAGIC,
    statfs::AFS_SUPER_MAGIC,
    FsType(0xff53_4d42), // CIFS
    FsType(0xfe53_4d42), // SMB2
];

/// Opens a file of ours: made if there is none, never through a link, and refused if it is somebody else's.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    options().open(path).and_then(owned)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    options
}

fn owned(file: File) -> io::Result<File> {
    if file.metadata()?.uid() == nix::unistd::geteuid().as_raw() {
        return Ok(file);
    }
    Err(somebody_elses())
}

fn somebody_elses() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "a file beside the socket belongs to another user")
}

/// The register of epochs. Whoever appends to it is the broker from then on, whatever others believe; one append is one claim, and
/// the kernel orders them.
#[derive(Debug)]
pub(crate) struct Register(File);

impl Register {
    pub(crate) fn open(paths: &Paths) -> io::Result<Self> {
        let mut options = options();
        options.append(true);
        options.open(paths.beside("epoch")).and_then(owned).map(Self)
    }

    /// The register as a client reads it, who may be a guest and then can do no more.
    pub(crate) fn look_at(paths: &Paths, entry: &Entry) -> io::Result<Self> {
        let Some(host) = entry.host() else { return Self::open(paths) };
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC).open(paths.beside("epoch"))?;
        let owner = file.metadata()?.uid();
        if owner == host || owner == 0 { Ok(Self(file)) } else { Err(somebody_elses()) }
    }

    /// Lets guests read it.
    pub(crate) fn show(&self) -> io::Result<()> {
        self.0.set_permissions(fs::Permissions::from_mode(0o644))
    }

    /// The newest epoch; 0 before the first.
    pub(crate) fn epoch(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len() / CLAIM)
    }

    /// Claims the next epoch.
    pub(crate) fn claim(&mut self) -> io::Result<u64> {
        let mut claim = [b' '; CLAIM as usize];
        let text = format!("pid {}", std::process::id()); // for whoever reads it; nothing is decided by it
        claim[..text.len()].copy_from_slice(text.as_bytes());
        claim[CLAIM as usize - 1] = b'\n';
        let written = self.0.write(&claim)?;
        // Where an append ended is where this claim is, however many are made at once.
        let end = self.0.stream_position()?;
        if written < claim.len() || end % CLAIM != 0 {
            self.0.set_len(end - end % CLAIM)?;
            return Err(io::Error::new(io::ErrorKind::StorageFull, "a claim could not be written whole"));
        }
        Ok(end / CLAIM)
    }
}

/// A broker's log: a snapshot of the ledger, then the entries since. It exists under its name only once the snapshot is whole.
#[derive(Debug)]
pub(crate) struct Log {
    file: File,
    paths: Paths,
    epoch: u64,
    length: u64,
    snapshot: u64,
    /// Whether entries are forced to the disk before they count.
    sync: bool,
}

impl Log {
    /// What the newest log below this epoch holds, or a new ledger.
    pub(crate) fn load(paths: &Paths, epoch: u64, limits: Limits) -> io::Result<Ledger> {
        let mut ledger = match paths.logs()?.into_iter().rev().find(|of| *of < epoch) {
            Some(newest) => {
                let mut bytes = Vec::new();
                open(&paths.log(newest))?.read_to_end(&mut bytes)?;
                journal::read(&bytes)
                    .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the log's snapshot cannot be read"))?
            }
            None => Ledger::new(fastrand::u64(..), limits),
        };
        ledger.limits = limits;
        Ok(ledger)
    }

    /// Writes a ledger as the log of an epoch.
    pub(crate) fn create(paths: &Paths, epoch: u64, ledger: &Ledger, sync: bool) -> io::Result<Self> {
        let unfinished = paths.beside(&format!("log.{epoch}.tmp"));
        let _ = fs::remove_file(&unfinished);
        let file = open(&unfinished)?;
        let bytes = journal::begin(ledger).map_err(io::Error::other)?;
        let snapshot = bytes.len() as u64;
        file.write_all_at(&bytes, 0).and_then(|()| if sync { file.sync_data() } else { Ok(()) }).inspect_err(|_| {
            let _ = fs::remove_file(&unfinished); // it takes the room that is lacking
        })?;
        fs::rename(&unfinished, paths.log(epoch))?;
        Ok(Self { file, paths: paths.clone(), epoch, length: snapshot, snapshot, sync })
    }

    /// Appends entries: all of them, or none and an error.
    pub(crate) fn append(&mut self, entries: &[u8]) -> io::Result<()> {
        let written = self.file.write_all_at(entries, self.length);
        let kept = written.and_then(|()| if self.sync { self.file.sync_data() } else { Ok(()) });
        match kept {
            Ok(()) => self.length += entries.len() as u64,
            // What was written of them must not be read: it was refused.
            Err(_) => self.file.set_len(self.length)?,
        }
        kept
    }

    pub(crate) fn is_long(&self) -> bool {
        self.length - self.snapshot > ROTATE_AT.max(ROTATE_AFTER * self.snapshot)
    }

    /// Starts anew with a snapshot.
    pub(crate) fn rotate(&mut self, ledger: &Ledger) -> io::Result<()> {
        *self = Self::create(&self.paths, self.epoch, ledger, self.sync)?;
        Ok(())
    }
}

/// Milliseconds on a clock that all processes of the host share, and that nobody sets.
pub(crate) fn clock() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("Linux has it");
    let millis = now.tv_sec() * 1000 + now.tv_nsec() / 1_000_000;
    u64::try_from(millis).unwrap_or(0)
}
