//! Ports for servers that are started, killed and started anew.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;

use parking_lot::Mutex;

/// Ports that the system gives to nobody who connects: or a client that tries to come back to a server that is down might be given its
/// port, and be connected to itself.
const PORTS: Range<u16> = 16_384..32_768;

/// A port that nobody listens on just now, and that nobody in this process was told before.
pub(crate) fn free_port() -> io::Result<u16> {
    static TOLD: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut told = TOLD.lock();
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    let mut ports = std::iter::repeat_with(|| fastrand::u16(PORTS)).take(1000);
    let port = ports.find(|port| !told.contains(port) && is_free(port)).ok_or(io::ErrorKind::AddrInUse)?;
    told.insert(port);
    Ok(port)
}
