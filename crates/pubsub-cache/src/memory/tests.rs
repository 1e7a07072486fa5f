//! What the store within the process forgets, and when.

use pubsub_core::Payload;

use super::*;

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

fn event(data: &str) -> Arc<Event> {
    Arc::new(Event::new("x").with_payload(Payload::json_of(data).unwrap()))
}

async fn fill(store: &InMemoryServerCache, name: &str, count: usize, data: &str) {
    for _ in 0..count {
        store.append(&topic(name), &[event(data)]).await.unwrap();
    }
}

fn indices(page: &LogPage) -> Vec<u64> {
    page.events.iter().map(|event| event.index().unwrap().index).collect()
}

#[tokio::test(start_paused = true)]
async fn what_is_too_old_goes_and_is_told() {
    let store = InMemoryServerCache::builder().max_age(Duration::from_secs(60)).build().unwrap();
    fill(&store, "t", 2, "").await;
    tokio::time::advance(Duration::from_secs(40)).await;
    fill(&store, "t", 1, "").await;
    tokio::time::advance(Duration::from_secs(40)).await;
    let page = store.read(&topic("t"), 0, 10).await.unwrap();
    assert_eq!((page.floor, page.next, indices(&page)), (2, 3, vec![2]));
    tokio::time::advance(Duration::from_secs(40)).await;
    let page = store.read(&topic("t"), 0, 10).await.unwrap();
    assert_eq!((page.floor, page.next, page.events.len(), store.bytes()), (3, 3, 0, 0));
}

#[tokio::test]
async fn the_least_recently_used_gives_way_at_the_bound_on_bytes() {
    let store = InMemoryServerCache::builder().max_bytes(100_000).build().unwrap();
    let data = "x".repeat(1000);
    fill(&store, "old", 30, &data).await;
    store.set("value", Bytes::from(data.clone()), None).await.unwrap();
    fill(&store, "new", 60, &data).await;
    assert!(store.bytes() <= 100_000, "{}", store.bytes());
    let (old, new) = (store.read(&topic("old"), 0, 99).await.unwrap(), store.read(&topic("new"), 0, 99).await.unwrap());
    assert!(old.floor > 0 && new.floor == 0, "{} {}", old.floor, new.floor);
    assert_eq!(indices(&old), (old.floor..30).collect::<Vec<_>>());
    fill(&store, "new", 100, &data).await;
    assert_eq!(store.get("value").await.unwrap(), None);
    assert!(store.bytes() <= 100_000, "{}", store.bytes());
    let refused = store.append(&topic("new"), &[event(&"x".repeat(200_000))]).await.unwrap_err();
    assert!(matches!(refused.kind(), ErrorKind::TooLarge { limit: 100_000, .. }), "{refused}");
}

#[tokio::test]
async fn topics_and_keys_are_bounded_and_the_newest_stay() {
    let store = InMemoryServerCache::builder().max_topics(100).max_values(100).build().unwrap();
    for number in 0..1000 {
        fill(&store, &format!("t{number}"), 1, "").await;
        store.set(&format!("k{number}"), Bytes::new(), None).await.unwrap();
        assert_eq!(store.read(&topic(&format!("t{number}")), 0, 1).await.unwrap().events.len(), 1);
        assert!(store.get(&format!("k{number}")).await.unwrap().is_some());
    }
    assert!(store.logs.read().len() <= 100);
    for (number, is_kept) in [(0, false), (500, false), (899, false), (950, true), (999, true)] {
        let page = store.read(&topic(&format!("t{number}")), 0, 1).await.unwrap();
        assert_eq!(page.events.len() == 1, is_kept, "t{number}");
        assert_eq!(store.get(&format!("k{number}")).await.unwrap().is_some(), is_kept, "k{number}");
    }
    // A log that was forgotten whole begins another life.
    fill(&store, "t0", 1, "").await;
    let again = store.read(&topic("t0"), 0, 1).await.unwrap();
    assert!(again.generation.unwrap().number() >= 1000 && again.next == 1);
}

#[tokio::test]
async fn topics_come_and_go_without_a_trace() {
    let store = InMemoryServerCache::new();
    for number in 0..5000 {
        fill(&store, &format!("t{number}"), 2, "data").await;
    }
    for number in 0..5000 {
        store.clear(&topic(&format!("t{number}"))).await.unwrap();
    }
    assert_eq!((store.bytes(), store.logs.read().len()), (0, 0));
    assert!(store.logs.read().capacity() < 128);
}

#[tokio::test]
async fn a_name_is_one_store_while_somebody_has_it() {
    let named = |window| InMemoryServerCache::builder().name("one store").window(window).build();
    let one = named(5).unwrap();
    assert!(Arc::ptr_eq(&one, &named(5).unwrap()));
    assert!(named(6).is_err());
    drop(one);
    assert!(named(6).is_ok());
}

#[test]
fn each_refusal_names_its_option() {
    let builder = InMemoryServerCache::builder;
    for (refused, option) in [
        (builder().max_events(0), "max_events"),
        (builder().max_bytes(0), "max_bytes"),
        (builder().max_age(Duration::ZERO), "max_age"),
        (builder().max_age(Duration::MAX), "max_age"),
        (builder().max_topics(0), "max_topics"),
        (builder().max_values(usize::MAX), "max_values"),
        (builder().window(0), "window"),
        (builder().name(""), "name"),
    ] {
        let error = refused.build().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidOption { option: named, .. } if named == option), "{error}");
    }
}

/// A payload whose writing and dropping use the store.
#[tokio::test]
async fn user_code_of_payloads_may_use_the_store() {
    use std::sync::OnceLock;
    static STORE: OnceLock<InMemoryServerCache> = OnceLock::new();
    #[derive(serde::Deserialize)]
    struct Nosy;
    fn poke() {
        let store = STORE.get().expect("set below");
        store.append_now(&Topic::new("other").unwrap(), &[event("")]).unwrap().unwrap();
    }
    impl serde::Serialize for Nosy {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
            poke();
            serializer.serialize_unit()
        }
    }
    impl Drop for Nosy {
        fn drop(&mut self) {
            poke();
        }
    }
    let store = STORE.get_or_init(|| InMemoryServerCache::with(InMemoryServerCache::builder().max_events(1)));
    let nosy = || Arc::new(Event::new("x").with_run_id("r").with_data(Nosy));
    for _ in 0..3 {
        store.append(&topic("t"), &[nosy()]).await.unwrap();
    }
    assert_eq!(store.trim(&topic("t"), &TrimFilter::run("r").produced_up_to(1)).await.unwrap(), 0);
    store.clear(&topic("t")).await.unwrap();
    assert_eq!(store.read(&topic("t"), 0, 1).await.unwrap().generation, None);
}
