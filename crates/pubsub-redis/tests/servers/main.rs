//! The bus and the store on real servers that come and go: behind a proxy that cuts and delays, with members that are killed and paused,
//! with sentinels that fail over, encrypted. Without a server installed every test is shown as ignored, and fails where
//! `PUBSUB_REQUIRE` names redis. `PUBSUB_SEED=n` repeats what chance decides, as a failure tells it.

mod cluster;
mod encrypted;
#[path = "../../../../conformance/src/harnesses/port.rs"]
mod port;
mod processes;
mod proxy;
mod quiet;
mod sentinel;
#[path = "../../../../conformance/src/harnesses/redis/server.rs"]
mod server;
mod store;
mod storm;
mod support;
#[path = "../common/trials.rs"]
mod trials;
mod writer;

use std::process::ExitCode;

use futures::FutureExt;
use futures::future::BoxFuture;

use self::support::PATIENCE;

type Test = fn() -> BoxFuture<'static, ()>;

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
        ("writer: what waits goes out, however it falls into calls", || writer::crowded().boxed()),
        ("writer: a topic that cannot be written to holds up no other", || writer::one_bad_topic().boxed()),
        ("writer: what was refused unheard is written once, in order", || writer::forgotten_and_unheard().boxed()),
        ("writer: publishers outlive restarts, and none waits until its time is over", || writer::restarts().boxed()),
        ("writer: ids that are ahead of the server's clock are followed as others", || writer::clock_set_back().boxed()),
        ("groups: a group that is deleted while entries of it are at hand loses none", || {
            quiet::destroyed_while_busy().boxed()
        }),
        ("groups: what is trimmed while a member is busy is told, however short that was", || {
            quiet::trimmed_while_busy().boxed()
        }),
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
        ("cluster: a node that hangs or is gone holds up no publisher to the others", || cluster::node_down().boxed()),
        ("tls: encrypted, with the right certificates only", || encrypted::trusted().boxed()),
        ("tls: a cluster whose nodes and clients are encrypted", || encrypted::cluster().boxed()),
        ("unix: by the server's socket", || encrypted::by_socket().boxed()),
        ("logs: what operators need is told, in measure, and without credentials", || quiet::told().boxed()),
        ("inspection: retained, waiting, held, oldest and members", || quiet::inspected().boxed()),
    ];
    trials::run(tests.iter().copied(), 3 * PATIENCE)
}
