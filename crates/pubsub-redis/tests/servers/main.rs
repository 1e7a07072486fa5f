//! The bus and the store on real servers that come and go: behind a proxy that cuts and delays, with members that are killed and paused,
//! with sentinels that fail over, encrypted. Without a server installed every test is shown as ignored, and fails where
//! `PUBSUB_REQUIRE` names redis. `PUBSUB_SEED=n` repeats what chance decides, as a failure tells it.

mod cluster;
mod encrypted;
mod processes;
mod proxy;
mod quiet;
mod sentinel;
#[path = "../../../../conformance/src/harnesses/redis/server.rs"]
mod server;
mod store;
mod storm;
mod support;

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;

use futures::FutureExt;
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::time::timeout;

use self::support::PATIENCE;

type Test = fn() -> Pin<Box<dyn Future<Output = ()> + Send>>;

fn main() -> ExitCode {
    if let Ok(job) = std::env::var(processes::JOB) {
        return processes::work(&job);
    }
    let tests: &[(&str, Test)] = &[
        ("store: an append of unknown outcome keeps one copy", || store::cut_appends().boxed()),
        ("store: FLUSHALL begins a generation of another store", || store::flushed().boxed()),
        ("store: scripts that the server has forgotten are sent again", || store::scripts_forgotten().boxed()),
        ("store: a server that is gone is told by every operation, and found again", || store::gone().boxed()),
        ("store: events run out by themselves, and the numbering goes on", || store::runs_out().boxed()),
        ("store: keys that the server evicts are told as lost", || store::evicted().boxed()),
        ("store: a live one on another connection is replayed from", || store::across_instances().boxed()),
        ("storm: connections are cut, reset and delayed, and nothing is lost or doubled", || storm::weathered().boxed()),
        ("processes: members are killed and paused, the server is restarted, and nothing is lost", || {
            processes::killed_and_paused().boxed()
        }),
        ("sentinel: a fail-over under load loses nothing that a replica has", || sentinel::failed_over().boxed()),
        ("sentinel: a master that stood still comes back as a replica, and nothing is lost but what it had alone", || {
            sentinel::woken_up().boxed()
        }),
        ("cluster: everything, on topics of all nodes", || cluster::everything().boxed()),
        ("cluster: slots move under load, and nothing is lost or doubled", || cluster::slots_move().boxed()),
        ("cluster: a master dies, and its replica goes on", || cluster::master_dies().boxed()),
        ("tls: encrypted, with the right certificates only", || encrypted::trusted().boxed()),
        ("unix: by the server's socket", || encrypted::by_socket().boxed()),
        ("logs: what operators need is told, in measure, and without credentials", || quiet::told().boxed()),
        ("inspection: retained, waiting, held, oldest and members", || quiet::inspected().boxed()),
    ];
    let arguments = Arguments::from_args();
    let required = std::env::var("PUBSUB_REQUIRE").is_ok_and(|names| names.split(',').any(|name| name.trim() == "redis"));
    let installed = server::is_installed();
    let trials = tests.iter().map(|&(name, test)| {
        let trial = Trial::test(name, move || {
            if !installed {
                return Err(Failed::from("redis is required, and `redis-server` is not installed"));
            }
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(async { timeout(3 * PATIENCE, test()).await.map_err(|_| Failed::from("takes too long")) })
        });
        trial.with_ignored_flag(!installed && !required)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
