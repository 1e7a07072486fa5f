//! A master, its replica, and three sentinels that make the replica the master.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use parking_lot::Mutex;
use pubsub_core::Bus;
use pubsub_redis::RedisServer;
use tokio::time::sleep;

use crate::server::Server;
use crate::storm::{Handled, Sent};
use crate::support::{PATIENCE, configured, group, until, written};

const SERVICE: &str = "events";

struct Watched {
    master: Server,
    replica: Server,
    sentinels: Vec<Server>,
}

impl Watched {
    /// With these arguments beside for both servers.
    async fn start(more: &str) -> Self {
        let more = format!("--repl-diskless-sync-delay 0 --enable-debug-command local {more}");
        let master = Server::start_with(|_, _| Ok(words(more.trim()))).unwrap();
        let port = master.address.port();
        let replica = Server::start_with(|_, _| Ok(words(&format!("--replicaof 127.0.0.1 {port} {}", more.trim())))).unwrap();
        let sentinel = |_| {
            Server::start_as(|directory, _| {
                let path = directory.join("sentinel.conf");
                let about = format!(
                    "sentinel monitor {SERVICE} 127.0.0.1 {port} 2\nsentinel down-after-milliseconds {SERVICE} 500\n\
                     sentinel failover-timeout {SERVICE} 4000\n"
                );
                std::fs::write(&path, about)?;
                Ok(vec![path.display().to_string(), "--sentinel".into()])
            })
            .unwrap()
        };
        let watched = Self { master, replica, sentinels: (0..3).map(sentinel).collect() };
        until("the replica follows", || async { info(&watched.replica, "master_link_status") == Some("up".into()) }).await;
        until("sentinels know each other and the replica", || async {
            watched.sentinels.iter().all(|sentinel| {
                let known = sentinel.ask(&["SENTINEL", "MASTER", SERVICE]).unwrap();
                let of = |name: &str| {
                    let at = known.list().iter().position(|word| word.text() == name).unwrap();
                    known.list()[at + 1].text().to_owned()
                };
                of("num-slaves") == "1" && of("num-other-sentinels") == "2" && of("flags") == "master"
            })
        })
        .await;
        watched
    }

    async fn connect(&self) -> Bus {
        let nodes = self.sentinels.iter().map(|sentinel| ("127.0.0.1".to_owned(), sentinel.address.port()));
        configured(RedisServer::sentinel(SERVICE, nodes)).connect().await.unwrap().into()
    }
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn info(server: &Server, name: &str) -> Option<String> {
    let info = server.ask(&["INFO", "replication"]).ok()?;
    let line = info.text().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned));
    line.map(|value| value.trim().to_owned())
}

fn offset(server: &Server, name: &str) -> Option<u64> {
    info(server, name)?.parse().ok()
}

pub(crate) async fn failed_over() {
    let watched = Watched::start("").await;
    let master = || watched.master.kill();
    fail_over(&watched, master).await;
}

/// The master stands still until another is the master, and comes back believing that it is one. That it needs a replica to take
/// anything is what keeps it from confirming what is going to be lost.
pub(crate) async fn woken_up() {
    let watched = Watched::start("--min-replicas-to-write 1 --min-replicas-max-lag 1").await;
    let address = watched.master.address;
    let sleep = || {
        std::thread::spawn(move || {
            // Over a connection that is not waited for: there is no answer for so long.
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            std::io::Write::write_all(&mut stream, b"DEBUG SLEEP 5\r\n").unwrap();
            let _ = std::io::Read::read(&mut stream, &mut [0; 16]);
        });
    };
    fail_over(&watched, sleep).await;
    until("the old master follows", || async { info(&watched.master, "role") == Some("slave".into()) }).await;
}

async fn fail_over(watched: &Watched, break_master: impl FnOnce()) {
    let (publisher, worker) = (watched.connect().await, watched.connect().await);
    let handled = Handled::default();
    let mut member = worker.subscribe_with("t", group("g")).await.unwrap();
    let handling = handled.clone();
    tokio::spawn(async move {
        while let Some(Ok(delivery)) = member.next().await {
            handling.lock().entry(delivery.event().event_type().to_owned()).or_default().push(delivery.attempt());
            drop(delivery.done());
        }
    });
    let mut listener = worker.subscribe("t").await.unwrap();
    let heard = Handled::default();
    let hearing = heard.clone();
    tokio::spawn(async move {
        while let Some(Ok(delivery)) = listener.next().await {
            hearing.lock().entry(delivery.event().event_type().to_owned()).or_default().push(delivery.attempt());
        }
    });

    let (sent, ended) = (Arc::new(Mutex::new(Sent::default())), Arc::new(AtomicBool::new(false)));
    let publishing = {
        let (sent, ended) = (sent.clone(), ended.clone());
        tokio::spawn(async move {
            for number in 0.. {
                if ended.load(Ordering::SeqCst) {
                    break;
                }
                let mut of_one = Sent::default();
                of_one.publish(&publisher, vec![number.to_string()]).await;
                sent.lock().merge(of_one);
                sleep(Duration::from_millis(5)).await;
            }
            publisher
        })
    };
    // What was confirmed before the master was where the replica is now cannot get lost.
    let mut safe = BTreeSet::new();
    while safe.len() < 150 {
        let confirmed = sent.lock().confirmed.clone();
        let there = offset(&watched.master, "master_repl_offset").unwrap();
        until("the replica catches up", || async { offset(&watched.replica, "slave_repl_offset") >= Some(there) }).await;
        safe = confirmed;
    }
    break_master();
    let before = sent.lock().confirmed.clone();
    until("the replica is the master", || async { info(&watched.replica, "role") == Some("master".into()) }).await;
    until("it goes on", || async { sent.lock().confirmed.len() > before.len() + 100 }).await;
    ended.store(true, Ordering::SeqCst);
    let publisher = publishing.await.unwrap();
    let sent = std::mem::take(&mut *sent.lock());

    let written = written(&watched.replica);
    let there: BTreeSet<_> = written.iter().cloned().collect();
    assert_eq!(there.len(), written.len(), "written twice");
    assert_eq!(safe.difference(&there).collect::<Vec<_>>(), Vec::<&String>::new(), "lost, though the replica had it");
    let lost: BTreeSet<_> = sent.confirmed.difference(&there).cloned().collect();
    assert!(lost.is_subset(&before), "confirmed by the new master, and lost: {lost:?}");
    until("the group handles everything", || async { there.iter().all(|event| handled.lock().contains_key(event)) }).await;
    until("the listener hears everything", || async { there.iter().all(|event| heard.lock().contains_key(event)) }).await;
    for bus in [publisher, worker] {
        bus.close(PATIENCE).await.unwrap();
    }
}
