//! Load through a proxy that cuts, resets and delays connections, on a server that forgets its scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use parking_lot::Mutex;
use pubsub_core::{Bus, Event, Fate, PublishOptions, Subscription};
use tokio::time::{sleep, timeout};

use crate::proxy::Proxy;
use crate::support::{PATIENCE, at, clients, connect, consumers, group, seed, start, until, written};

const PUBLISHERS: usize = 4;
/// So many calls each, and as many more as it takes until so many connections were cut.
const CALLS: usize = 150;
const CUTS: u64 = 11;
const TOGETHER: usize = 3;

/// What was handled: which event, at which attempts.
pub(crate) type Handled = Arc<Mutex<BTreeMap<String, Vec<u32>>>>;

/// What became of what was published.
#[derive(Default)]
pub(crate) struct Sent {
    pub(crate) confirmed: BTreeSet<String>,
    pub(crate) unknown: BTreeSet<String>,
    pub(crate) not_sent: BTreeSet<String>,
}

impl Sent {
    /// Publishes events of these types in one call.
    pub(crate) async fn publish(&mut self, bus: &Bus, names: Vec<String>) {
        let events: Vec<_> = names.iter().map(|name| Arc::new(Event::new(name))).collect();
        match bus.publish_with("t", &events, PublishOptions::new()).await {
            Ok(_) => self.confirmed.extend(names),
            Err(error) => {
                assert!(error.kind().is_retryable(), "nothing here is for ever: {error:?}");
                for (name, fate) in names.into_iter().zip(error.fates()) {
                    let told = match fate {
                        Fate::Published => &mut self.confirmed,
                        Fate::NotSent => &mut self.not_sent,
                        _ => &mut self.unknown,
                    };
                    told.insert(name);
                }
            }
        }
    }

    pub(crate) fn merge(&mut self, other: Self) {
        self.confirmed.extend(other.confirmed);
        self.unknown.extend(other.unknown);
        self.not_sent.extend(other.not_sent);
    }

    /// Nothing confirmed is missing, nothing is there twice, and what was not sent is not there.
    pub(crate) fn judge(&self, written: &[String]) {
        let distinct: BTreeSet<_> = written.iter().cloned().collect();
        assert_eq!(distinct.len(), written.len(), "written twice");
        assert_eq!(
            self.confirmed.difference(&distinct).collect::<Vec<_>>(),
            Vec::<&String>::new(),
            "confirmed and not written"
        );
        assert_eq!(self.not_sent.intersection(&distinct).collect::<Vec<_>>(), Vec::<&String>::new(), "written, yet not sent");
    }
}

/// Handles what comes; every seventh event is retried once.
fn handle(mut member: Subscription, handled: Handled) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        while let Some(Ok(delivery)) = member.next().await {
            let (kind, attempt) = (delivery.event().event_type().to_owned(), delivery.attempt());
            let again = kind.ends_with('7') && attempt == 1;
            handled.lock().entry(kind).or_default().push(attempt);
            if again {
                drop(delivery.retry());
            } else {
                drop(delivery.done());
            };
        }
    })
}

/// Every event that is there was handled, and none twice at one attempt.
pub(crate) fn judge_handled(handled: &BTreeMap<String, Vec<u32>>, written: &[String]) {
    for event in written {
        let attempts = handled.get(event).unwrap_or_else(|| panic!("{event} was not handled"));
        let distinct: BTreeSet<_> = attempts.iter().collect();
        assert_eq!(distinct.len(), attempts.len(), "{event} was handled twice at one attempt: {attempts:?}");
    }
}

pub(crate) async fn weathered() {
    let seed = seed();
    let server = Arc::new(start());
    let proxy = Arc::new(Proxy::start(server.address, seed).await.unwrap());
    let mut buses = Vec::new();
    for _ in 0..4 {
        buses.push(connect(at(proxy.address)).await);
    }
    let mut groups = BTreeMap::<&str, Handled>::new();
    let mut tasks = Vec::new();
    for (name, of) in [("g", &buses[1]), ("g", &buses[2]), ("h", &buses[2]), ("h", &buses[3])] {
        let handled = groups.entry(name).or_default().clone();
        tasks.push(handle(of.subscribe_with("t", group(name)).await.unwrap(), handled));
    }
    let mut listener = buses[3].subscribe("t").await.unwrap();
    let heard = Handled::default();
    let hearing = heard.clone();
    tasks.push(tokio::spawn(async move {
        while let Some(Ok(delivery)) = listener.next().await {
            hearing.lock().entry(delivery.event().event_type().to_owned()).or_default().push(delivery.attempt());
        }
    }));

    proxy.storm(true);
    let over = Arc::new(AtomicBool::new(false));
    let forgetting = {
        let (server, over) = (server.clone(), over.clone());
        tokio::task::spawn_blocking(move || {
            while !over.load(Ordering::Acquire) {
                server.ask(&["SCRIPT", "FLUSH"]).unwrap();
                std::thread::sleep(Duration::from_millis(5)); // long enough for somebody to make a script known again
            }
        })
    };
    let publishing = (0..PUBLISHERS).map(|publisher| {
        let (bus, proxy) = (buses[publisher % 2].clone(), proxy.clone());
        tokio::spawn(async move {
            let mut sent = Sent::default();
            for call in (0..).take_while(|call| *call < CALLS || proxy.cuts() < CUTS) {
                let names = (0..TOGETHER).map(|part| format!("{publisher}.{}", TOGETHER * call + part)).collect();
                sent.publish(&bus, names).await;
                sleep(Duration::from_millis(2)).await;
            }
            sent
        })
    });
    let mut sent = Sent::default();
    for of_one in timeout(3 * PATIENCE, futures::future::try_join_all(publishing)).await.expect("a storm").unwrap() {
        sent.merge(of_one);
    }
    proxy.storm(false);
    over.store(true, Ordering::Release);
    forgetting.await.unwrap();

    let written = written(&server);
    sent.judge(&written);
    for publisher in 0..PUBLISHERS {
        let own = written.iter().filter_map(|event| event.strip_prefix(&format!("{publisher}."))?.parse::<usize>().ok());
        assert!(own.is_sorted(), "the order of publisher {publisher}");
    }
    assert!(sent.confirmed.len() > PUBLISHERS * CALLS, "{} confirmed, {} unknown", sent.confirmed.len(), sent.unknown.len());
    for handled in groups.values() {
        let all = || async { written.iter().all(|event| handled.lock().contains_key(event)) };
        until("a group handles everything", all).await;
    }
    until("the listener hears everything", || async { written.iter().all(|event| heard.lock().contains_key(event)) }).await;
    // What was retried has come again, and nothing else is on its way: drained is drained.
    for name in ["g", "h"] {
        until("nothing is pending", || async {
            server.ask(&["XPENDING", crate::support::STREAM, name]).unwrap().list()[0].number() == 0
        })
        .await;
    }
    for (name, handled) in &groups {
        let handled = handled.lock();
        judge_handled(&handled, &written);
        let lost = |event: &&String| event.ends_with('7') && handled[*event] == [1];
        let lost: Vec<_> = written.iter().filter(lost).collect();
        assert!(lost.is_empty(), "{name}: retries got lost: {lost:?}");
    }
    assert!(heard.lock().values().all(|attempts| attempts == &[1]), "fan-out heard something twice");
    for bus in &buses {
        bus.close(PATIENCE).await.unwrap();
    }
    for name in ["g", "h"] {
        assert_eq!(consumers(&server, name), Vec::<String>::new(), "consumers left behind");
    }
    assert_eq!(server.ask(&["XINFO", "GROUPS", crate::support::STREAM]).unwrap().list().len(), 2, "groups");
    until("connections end", || async { clients(&server) == 0 }).await;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
}
