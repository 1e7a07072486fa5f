//! A bus from a URL, so that which backend carries the events is a matter of configuration.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> pubsub_core::Result<()> {
//! let bus = pubsub_connect::connect("memory:jobs?publish_timeout=2s&max_payload=64KiB").await?;
//! bus.publish_data("orders", "order.placed", 42).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Schemes
//!
//! | URL | bus | cargo feature |
//! | --- | --- | --- |
//! | `memory:` | within the process, of its own | `memory` (default) |
//! | `memory:NAME` | within the process, shared by all who connect to that name | `memory` (default) |
//! | `unix:PATH`, relative or absolute | among the processes of the host that name the socket at that path | `unix` |
//! | `redis://[user:password@]host[:port][/database]` | over a Redis server, 7.0 or later | `redis` |
//! | `redis+unix:PATH` | the same, by the server's socket | `redis` |
//! | `redis-sentinel://[user:password@]host[:port][/database]?service=NAME` | over the master that sentinels name, through fail-overs | `redis` |
//! | `redis-cluster://[user:password@]host[:port]` | over a cluster that this node is one of | `redis` |
//! | `rediss://...`, `rediss-sentinel://...`, `rediss-cluster://...` | the same, encrypted | `rediss` |
//! | `gcp://PROJECT` | over Google Cloud Pub/Sub, or the emulator that `PUBSUB_EMULATOR_HOST` names | `gcp` |
//!
//! Backends of your own join by a [`Registry`].
//!
//! # Options
//!
//! They follow a `?`, under the names and with the defaults of the backend's builder; see [`BusUrl`] for how values are written.
//! `memory:` takes `publish_timeout`, `strict_payloads`, `max_payload` and `dead_letter_retention`; `unix:` takes
//! `publish_timeout`, `max_payload`, `max_events`, `max_bytes`, `grace`, `hang_timeout`, `max_peer_bytes` and `sync`; those of Redis
//! take `prefix`, `max_len`, `max_age`, `idle_ttl` (these three also as `none`), `max_payload`, `publish_timeout`,
//! `command_timeout`, `reclaim_after` and `linger`; `redis+unix:` also `database`; those of sentinels and clusters also `nodes`
//! (further ones, as `host:port`, separated by commas), those of sentinels `sentinel_username` and `sentinel_password`; encrypted ones `ca`, a file of the certificates to
//! trust instead of the system's. `gcp:` takes `endpoint`, `credentials_file`, `create_topics`, `ordering`,
//! `exactly_once`, `ack_deadline`, `streams`, `linger`, `max_payload`, `publish_timeout`, `command_timeout`, `keep_alive`,
//! `batch_events`, `batch_bytes`, `batch_delay`, `max_outstanding_events`, `max_outstanding_bytes`, `private_ttl`,
//! `private_retention`, `topic_retention`, `service_dead_letters`, `clock_uncertainty`, `restore` and `restore_grace`. Every URL takes
//!
//! - `replay=memory` or `replay=URL`, with the cargo feature `replay`: the bus keeps its events in a store, numbers them, and replays
//!   them (clauses R1 to R6). `memory` is a store within the process, of the bus's own; if the bus is `memory:NAME`, all who connect to
//!   that name with the same bounds share it. A URL names a store: `memory:NAME` is one that anybody in the process can share, with the
//!   options `max_events`, `max_bytes`, `max_age`, `max_topics`, `max_values` and `window`, percent-encoded like the URL. Publishers
//!   and listeners in different processes need a store that both reach: the URL of a Redis server, with the options `prefix`,
//!   `max_events`, `max_age`, `window`, `max_list`, `idle_ttl`, `max_payload` and `command_timeout`. With `replay` come `on_store_failure` (`continue` or `fail`)
//!   and `store_timeout`.
//! - `leases=URL`: leases come from another bus (clause L4), which is connected too and closed with this one. The URL is
//!   percent-encoded, so that its own options stay its own; buses lend to each other at most [`MAX_NESTING`] deep.
//!
//! An option that nobody knows is refused, with the nearest that is known.
//!
//! # Secrets
//!
//! User names, passwords and the values of unknown options appear in no error, no `Debug` output and no log.

#[cfg(feature = "gcp")]
mod gcp;
mod leases;
#[cfg(feature = "memory")]
mod memory;
mod nearest;
#[cfg(feature = "redis")]
mod redis;
mod registry;
#[cfg(feature = "replay")]
mod replay;
#[cfg(all(feature = "unix", target_os = "linux"))]
mod unix;
mod url;

use pubsub_core::{Bus, Result};

pub use registry::{MAX_NESTING, Registry};
pub use url::{Authority, BusUrl, MAX_URL};

/// Connects to the bus a URL names, with the backends this crate was built with.
///
/// Dropping the future leaves nothing connected.
///
/// # Errors
/// `InvalidOption` names the option that is at fault, or `url`; else what the backend's own connecting fails with.
pub async fn connect(url: &str) -> Result<Bus> {
    Registry::with_defaults().connect(url).await
}
