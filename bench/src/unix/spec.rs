//! What the processes of a round are told, and how they answer: the same for ours, the limit and every peer.
//!
//! A process gets its [`Spec`] as its last argument and says `ready` when it is connected. A publisher begins at `go` and answers with
//! how many it has published. A receiver answers `count` with how many it has read so far, `latencies` with the median and the 99th
//! percentile in microseconds, and `after N` with when it read the first event published after that time. It ends with its standard
//! input. Times are nanoseconds on the monotonic clock, which all processes of a host share.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) party: String,
    pub(crate) role: Role,
    /// The socket's path.
    pub(crate) address: PathBuf,
    pub(crate) receivers: usize,
    /// Whether they share the work.
    pub(crate) group: bool,
    /// The payload in each event, in bytes.
    pub(crate) size: usize,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Stands between the others and does nothing of its own.
    Relay,
    Receive,
    /// Publishes as fast as it can for so long: so many events a call.
    Publish {
        seconds: f64,
        batch: usize,
    },
    /// Publishes so many events, one at a time, at a steady pace; each bears the time it was published at as its number.
    Pace {
        events: u64,
    },
}

/// The time between two events of a steady pace.
pub(crate) const TICK: Duration = Duration::from_millis(1);
