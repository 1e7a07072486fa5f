//! Buses from URLs: what they are, what is refused, and what is kept quiet.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use pubsub_connect::{BusUrl, MAX_NESTING, Registry, connect};
use pubsub_core::{Acquired, Bus, Capability, Error, ErrorKind, Event, EventId, Reach};
use pubsub_emitter::EventEmitterPubSub;

const SECOND: Duration = Duration::from_secs(1);

fn fresh(prefix: &str) -> String {
    format!("{prefix}-{}", EventId::random())
}

async fn refused(url: &str) -> Error {
    match connect(url).await {
        Ok(_) => panic!("{url} connects"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_name_is_shared_and_no_name_is_not() {
    let url = format!("memory:{}", fresh("jobs"));
    let (one, two, own) = (connect(&url).await.unwrap(), connect(&url).await.unwrap(), connect("memory:").await.unwrap());
    let mut shared = two.subscribe("t").await.unwrap();
    let mut apart = own.subscribe("t").await.unwrap();
    one.publish_data("t", "x", 1).await.unwrap();
    own.publish_data("t", "fence", 2).await.unwrap();
    assert_eq!(shared.next().await.unwrap().unwrap().event().event_type(), "x");
    assert_eq!(apart.next().await.unwrap().unwrap().event().event_type(), "fence");
}

#[tokio::test]
async fn options_reach_the_builder() {
    let bus = connect("memory:?strict_payloads=true&max_payload=1KiB").await.unwrap();
    let capabilities = bus.capabilities();
    assert_eq!((capabilities.strict_payloads, capabilities.max_payload), (true, Some(1024)));

    let bus = connect("memory:?publish_timeout=0s").await.unwrap();
    let full = bus.subscribe_with("t", pubsub_core::SubscribeOptions::fan_out().prefetch(1)).await.unwrap();
    let events: Vec<_> = (0..3).map(|n| Arc::new(Event::new("x").with_data(n))).collect();
    let publish = bus.publish_with("t", &events, pubsub_core::PublishOptions::new());
    let error = tokio::time::timeout(SECOND, publish).await.expect("it does not wait").unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Full);
    drop(full);

    let name = fresh("letters");
    let _first = connect(&format!("memory:{name}?dead_letter_retention=2")).await.unwrap();
    let error = refused(&format!("memory:{name}?dead_letter_retention=3")).await;
    assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == "dead_letter_retention"), "{error}");
}

#[tokio::test]
async fn each_refusal_names_what_is_at_fault() {
    let deep = (0..=MAX_NESTING).fold("memory:".to_owned(), |url, _| format!("memory:?leases={}", url.replace('%', "%25")));
    for (url, option, why) in [
        ("memory:?publish_timout=5s", "publish_timout", "the nearest known option is `publish_timeout`"),
        ("memory:?lease=memory:", "lease", "the nearest known option is `leases`"),
        ("memory:?publish_timeout=5", "publish_timeout", r#""5" is not a duration such as `250ms`, `5s`, `2m` or `1h`"#),
        ("memory:?publish_timeout=99999999h", "publish_timeout", "ten years"),
        ("memory:?max_payload=0", "max_payload", "at least 1"),
        ("memory:?strict_payloads=on", "strict_payloads", r#""on" is not `true` or `false`"#),
        ("memory:?dead_letter_retention=-1", "dead_letter_retention", "is not a whole number"),
        ("memory:?max_payload=1&max_payload=1", "max_payload", "is given twice"),
        #[cfg(not(feature = "replay"))]
        ("memory:?replay=memory", "replay", "needs the cargo feature `replay`"),
        #[cfg(feature = "replay")]
        ("memory:?replay=memroy", "replay", "names the unknown store `memroy`; the nearest known one is `memory`"),
        #[cfg(feature = "replay")]
        ("memory:?replay=memory%3A%3Fmax_evens=3", "max_evens", "the nearest known option is `max_events`"),
        #[cfg(feature = "replay")]
        ("memory:?replay=memory&max_events=3", "max_events", "as in `replay=memory%3Fmax_events=VALUE`"),
        #[cfg(feature = "replay")]
        ("memory:?replay=memory%3Fmax_events=0", "max_events", "at least 1"),
        #[cfg(feature = "replay")]
        ("memory:?replay=memory://host", "replay", "has no host"),
        #[cfg(feature = "replay")]
        ("memory:?replay=memory&on_store_failure=stop", "on_store_failure", "is not `continue` or `fail`"),
        #[cfg(feature = "replay")]
        ("memory:?replay=memory&store_timeout=0s", "store_timeout", "over zero"),
        ("memory:?store_timeout=1s", "store_timeout", "is unknown"),
        ("memory://jobs", "url", "write `memory:NAME`"),
        ("memroy:", "url", "has the unknown scheme `memroy`; the nearest known one is `memory`"),
        ("reddis:", "url", "the nearest known one is `redis`"),
        #[cfg(not(feature = "unix"))]
        ("unix:a/b.sock", "url", "needs the cargo feature `unix`"),
        #[cfg(feature = "unix")]
        ("unix:", "url", "`unix:` needs the path of a socket"),
        #[cfg(feature = "unix")]
        ("unix:run/bus.sock?gracee=1s", "gracee", "the nearest known option is `grace`"),
        #[cfg(feature = "unix")]
        ("unix:run/bus.sock?allow_users=0,no%20such%20user", "allow_users", "no user is called no such user"),
        #[cfg(feature = "unix")]
        ("unix:run/bus.sock?allow_groups=no%20such%20group", "allow_groups", "no group is called no such group"),
        #[cfg(feature = "unix")]
        ("unix:run/bus.sock?native_only=maybe", "native_only", "maybe"),
        #[cfg(not(feature = "gcp"))]
        ("gcp://project", "url", "needs the cargo feature `gcp`"),
        #[cfg(feature = "gcp")]
        ("gcp:project", "url", "is written `gcp://PROJECT`"),
        #[cfg(feature = "gcp")]
        ("gcp://project/topic", "url", "is written `gcp://PROJECT`"),
        #[cfg(feature = "gcp")]
        ("gcp://project?strams=2", "strams", "the nearest known option is `streams`"),
        ("memory:?leases=nowhere", "url", "begins with no scheme"),
        ("memory:?leases=memory:%3Fmax_paylod=1", "max_paylod", "`max_payload`"),
        (&deep, "leases", "is nested more than 4 deep"),
    ] {
        let error = refused(url).await;
        match error.kind() {
            ErrorKind::InvalidOption { option: named, reason } => {
                assert!(named == option && reason.contains(why), "{url}: {error}");
            }
            other => panic!("{url}: {other:?}"),
        }
        assert!(matches!(error.operation(), Some("connect" | "build")) && !error.is_retryable(), "{url}: {error}");
    }
    #[cfg(not(feature = "redis"))]
    for scheme in ["redis", "rediss"] {
        let error = refused(&format!("{scheme}://h")).await;
        assert!(error.to_string().contains(&format!("needs the cargo feature `{scheme}` of pubsub-connect")), "{error}");
    }
    assert_eq!(refused("memory:?leases=nowhere").await.subject(), Some("leases"));
    assert_eq!(refused("memory:jobs?x=1").await.subject(), Some("memory:jobs"));
    #[cfg(feature = "replay")]
    for (replay, subject) in
        [("memory:log%3Fmax_evens=3", "memory:log"), ("memory:log%3Fmax_events=0", "memory:log"), ("%3A", "replay")]
    {
        assert_eq!(refused(&format!("memory:?replay={replay}")).await.subject(), Some(subject), "{replay}");
    }
    let error = Registry::new().connect("memory:").await.unwrap_err();
    assert!(error.to_string().contains("needs the cargo feature `memory` of pubsub-connect"), "{error}");
}

#[tokio::test]
async fn leases_come_from_elsewhere_and_are_closed_alike() {
    let name = fresh("locks");
    let url = format!("memory:?leases=memory:{name}%3Fstrict_payloads=true");
    let (one, two) = (connect(&url).await.unwrap(), connect(&url).await.unwrap());
    one.require([Capability::Leases]).unwrap();
    assert_eq!(one.capabilities().leases, Some(Reach::Process));
    assert!(!one.capabilities().strict_payloads, "the lender's options are the lender's");
    assert!(matches!(one.leases().unwrap().acquire("k", "a", SECOND).await.unwrap(), Acquired::Yes(_)));
    assert!(
        matches!(two.leases().unwrap().acquire("k", "b", SECOND).await.unwrap(), Acquired::HeldBy(held) if held.owner == "a")
    );

    let leases = one.leases().unwrap();
    one.close(SECOND).await.unwrap();
    assert!(leases.holder("k").await.unwrap_err().is_closed());
    assert!(two.leases().unwrap().holder("k").await.unwrap().is_some(), "another's lender is not closed");
}

/// A registry whose only backend counts how often it connected.
fn counting(connected: &Arc<Mutex<u32>>) -> Registry {
    let connected = connected.clone();
    let factory = move |url: &mut BusUrl| {
        let fails = url.flag("fails")?.unwrap_or(false);
        let connected = connected.clone();
        Ok(async move {
            *connected.lock().unwrap() += 1;
            if fails { Err(ErrorKind::Unavailable.into()) } else { Ok(Bus::from(EventEmitterPubSub::new())) }
        })
    };
    Registry::with_defaults().register("count", factory).unwrap()
}

#[tokio::test]
async fn a_registry_takes_backends_of_ones_own() {
    let connected = Arc::default();
    let registry = counting(&connected);
    registry.connect("COUNT:").await.unwrap();
    assert_eq!(*connected.lock().unwrap(), 1);

    // Options are checked before anything is connected.
    let error = registry.connect("count:?fail=true").await.unwrap_err();
    assert!(error.to_string().contains("`fails`"), "{error}");
    assert_eq!(*connected.lock().unwrap(), 1);

    let error = registry.connect("count:place?fails=true").await.unwrap_err();
    assert_eq!((error.kind(), error.subject()), (&ErrorKind::Unavailable, Some("count:place")));
    let error = registry.connect("memory:?leases=count:%3Ffails=true").await.unwrap_err();
    assert_eq!((error.kind(), error.subject()), (&ErrorKind::Unavailable, Some("count:")));

    let error = registry.connect("cuont:").await.unwrap_err();
    assert!(error.to_string().contains("the nearest known one is `count`"), "{error}");
    for scheme in ["", "1a", "Count", "a_b", "ä"] {
        let factory = |_: &mut BusUrl| Ok(async { Ok(Bus::from(EventEmitterPubSub::new())) });
        assert!(Registry::new().register(scheme, factory).is_err(), "{scheme}");
    }
    let shown =
        format!("{:?}", Registry::new().register("count", |_: &mut BusUrl| Ok(async { connect("memory:").await })).unwrap());
    assert_eq!(shown, r#"Registry { schemes: ["count"] }"#);
}

#[test]
fn a_dropped_connect_leaves_nothing() {
    let name = fresh("dropped");
    let registry = Registry::with_defaults()
        .register("never", |_: &mut BusUrl| Ok(std::future::pending::<pubsub_core::Result<Bus>>()))
        .unwrap();
    let url = format!("never:?leases=memory:{name}%3Fdead_letter_retention=7");
    assert!(registry.connect(&url).now_or_never().is_none(), "it waits, its lender connected, and is dropped");
    // A bus of that name is made anew, since nobody holds the lender.
    let again = format!("memory:{name}?dead_letter_retention=8");
    assert!(connect(&again).now_or_never().expect("memory connects at once").is_ok());
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn secrets_stay_secret() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    let connected = Arc::default();
    let registry = counting(&connected);
    let mut told = String::new();
    tracing::subscriber::with_default(subscriber, || {
        for url in [
            "count://user:s3cr3t@host/path",
            "count://s3cr3t@host/path",
            "count://user:s3cr3t@host/path?token=s3cr3t",
            "count://user:s3cr3t@host/path?fails=true",
            "count:user:s3cr3t@host?fails=true",
            "redis://user:s3cr3t@host",
            "rdis://user:s3cr3t@host",
            "memory:?password=s3cr3t",
            "memory:?leases=count%3A%2F%2Fuser%3As3cr3t%40host%3Fkey=s3cr3t",
            "memory:?leases=count%3A%2F%2Fuser%3As3cr3t%40host",
            "memory:?leases=user:s3cr3t@host",
            "memory:?replay=nowhere%3A%2F%2Fuser%3As3cr3t%40host",
        ] {
            // Another test may have met a place that logs just before somebody listened, and it would stay silent.
            tracing::callsite::rebuild_interest_cache();
            match registry.connect(url).now_or_never().expect("these connect at once") {
                Ok(bus) => told += &format!("{bus:?}\n"),
                Err(error) => told += &format!("{error} {error:?}\n"),
            }
        }
    });
    let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(logged.contains("connected") && logged.contains("count://***@host/path"), "the log is on: {logged}");
    assert!(told.contains("***@host"), "{told}");
    assert!(!logged.contains("3cr3t") && !told.contains("3cr3t"), "{logged}{told}");
}

#[cfg(all(feature = "replay", feature = "unix"))]
#[tokio::test]
async fn a_history_that_processes_share_is_not_hidden() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}/run/bus.sock", directory.path().display());
    let error = refused(&format!("{url}?replay=memory")).await;
    assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == "replay"), "{error}");
    assert!(error.to_string().contains("leave it out"), "{error}");
}

#[cfg(feature = "replay")]
#[tokio::test]
async fn a_bus_with_a_store_replays_and_a_name_shares_it() {
    let url = format!("memory:{}?replay=memory&on_store_failure=fail", fresh("jobs"));
    let (one, two) = (connect(&url).await.unwrap(), connect(&url).await.unwrap());
    let apart = connect("memory:?replay=memory").await.unwrap();
    one.require([Capability::History, Capability::Index]).unwrap();
    for number in 0..3 {
        one.publish_data("t", "x", number).await.unwrap();
    }
    let mut late = two.subscribe_from_offset("t", 1).await.unwrap();
    for due in [1, 2] {
        assert_eq!(*late.next().await.unwrap().unwrap().data::<i32>().unwrap(), due);
    }
    assert!(apart.history("t", pubsub_core::Start::Earliest, 9).await.unwrap().entries.is_empty());

    // A store by a name of its own, with its own options, lent leases beside it.
    let store = format!("memory%3A{}%3Fmax_events=2", fresh("store"));
    let url = format!("memory:?replay={store}&store_timeout=2s&leases=memory:");
    let (one, two) = (connect(&url).await.unwrap(), connect(&url).await.unwrap());
    for number in 0..3 {
        one.publish_data("t", "x", number).await.unwrap();
    }
    let page = two.history("t", pubsub_core::Start::Earliest, 9).await.unwrap();
    assert_eq!(page.entries.iter().map(|(_, event)| event.index().unwrap().index).collect::<Vec<_>>(), [1, 2]);
    assert!(one.leases().is_some());
}

#[cfg(feature = "replay")]
#[tokio::test]
async fn a_registry_takes_stores_of_ones_own() {
    let registry = Registry::with_defaults()
        .register_store("shelf", |url: &mut BusUrl| {
            let store = pubsub_cache::InMemoryServerCache::builder().max_events(url.number("boards")?.unwrap_or(9));
            Ok(async move { Ok(store.build()? as Arc<dyn pubsub_cache::ServerCache>) })
        })
        .unwrap();
    let bus = registry.connect("memory:?replay=shelf:%3Fboards=1").await.unwrap();
    for _ in 0..2 {
        bus.publish_data("t", "x", 1).await.unwrap();
    }
    assert_eq!(bus.inspect("t").await.unwrap().retained, Some(1));
    assert!(registry.connect("memory:?replay=shelf%3Fbords=1").await.is_err());
}

#[cfg(feature = "redis")]
#[tokio::test]
async fn what_is_wrong_with_a_redis_url_is_named() {
    for (url, option) in [
        ("redis:", "url"),
        ("redis://", "url"),
        ("redis://h/x", "url"),
        ("redis://h/256", "url"),
        ("redis://h?prefix=", "prefix"),
        ("redis://h?prefx=a", "prefx"),
        ("redis://h?max_len=few", "max_len"),
        ("redis://h?max_len=0", "max_len"),
        ("redis://h?idle_ttl=5", "idle_ttl"),
        ("redis://h?idle_ttl=1s", "idle_ttl"),
        ("redis://h?reclaim_after=2m", "reclaim_after"),
        ("redis://h?linger=1h", "linger"),
        ("redis+unix:", "url"),
        ("redis+unix://h/a", "url"),
        ("redis+unix:/a?database=x", "database"),
        ("redis-sentinel:", "url"),
        ("redis-sentinel://h", "service"),
        ("redis-sentinel://h/x?service=s", "url"),
        ("redis-sentinel://h?service=s&nodes=a,b:c", "nodes"),
        ("redis-sentinel://h?service=s&sentinel_user=a", "sentinel_user"),
        ("redis-cluster:", "url"),
        ("redis-cluster://h/1", "url"),
        ("redis-cluster://h?nodes=:x", "nodes"),
        #[cfg(feature = "rediss")]
        ("rediss://h?ca=/nowhere", "ca"),
        #[cfg(feature = "rediss")]
        ("rediss://h?ca=Cargo.toml", "ca"),
        #[cfg(feature = "replay")]
        ("memory:?replay=redis%3A%2F%2Fh%3Fmax_events=0", "max_events"),
        #[cfg(feature = "replay")]
        ("memory:?replay=redis%3A%2F%2Fh%3Fmax_events=few", "max_events"),
        #[cfg(feature = "replay")]
        ("memory:?replay=redis%3A%2F%2Fh%3Fmax_topics=3", "max_topics"),
        #[cfg(feature = "replay")]
        ("memory:?replay=redis%3A%2F%2Fh%3Fidle_ttl=1s", "idle_ttl"),
    ] {
        let error = refused(url).await;
        assert!(matches!(error.kind(), ErrorKind::InvalidOption { option: named, .. } if named == option), "{url}: {error}");
    }
    // A port that nobody listens on.
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let error = refused(&format!("redis://user:s3cr3t@127.0.0.1:{port}/1?max_len=none&max_age=1h&command_timeout=1s")).await;
    assert_eq!(error.kind(), &ErrorKind::Unavailable);
    assert!(!format!("{error} {error:?}").contains("s3cr3t"));
    #[cfg(feature = "replay")]
    {
        let store =
            format!("redis%3A%2F%2Fuser%3As3cr3t%40127.0.0.1%3A{port}%3Fmax_age=1h%26window=10%26max_list=9%26prefix=p");
        let error = refused(&format!("memory:?replay={store}")).await;
        let shown = format!("redis://***@127.0.0.1:{port}");
        assert_eq!((error.kind(), error.subject()), (&ErrorKind::Unavailable, Some(&*shown)), "{error:?}");
        assert!(!format!("{error} {error:?}").contains("s3cr3t"));
    }
}

#[cfg(feature = "unix")]
#[tokio::test]
async fn a_socket_is_shared_by_all_who_name_it() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}/bus.sock?max_events=100&sync=false", directory.path().display());
    let (one, other) = (connect(&url).await.unwrap(), connect(&url).await.unwrap());
    let mut listener = one.subscribe("t").await.unwrap();
    other.publish_data("t", "x", 1).await.unwrap();
    assert_eq!(*listener.next().await.unwrap().unwrap().data::<u32>().unwrap(), 1);
    assert!(one.close(Duration::from_secs(1)).await.unwrap().is_clean());
    assert!(other.close(Duration::from_secs(1)).await.unwrap().is_clean());
}
