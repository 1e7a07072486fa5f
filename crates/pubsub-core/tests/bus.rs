//! The handle that applications hold: what it adds to a backend.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use common::*;
use parking_lot::Mutex;
use pubsub_core::machinery::{DeliveryQueue, Entry};
use pubsub_core::{
    Bus, Capabilities, Capability, Closed, ErrorKind, Event, Failure, Fate, Groups, LeaseProvider, Page, Positions, PubSub,
    PublishError, PublishOptions, REDRIVE_GROUP, ReplayIndex, Result, Start, Status, StatusWatch, SubscribeOptions,
    Subscription, Topic, TopicStatus, TrimFilter, dead_letter,
};

/// A bus of one durable queue, which keeps dead letters.
#[derive(Debug)]
struct Letterbox {
    queue: Arc<DeliveryQueue>,
    published: Mutex<Vec<(Topic, Arc<Event>)>>,
    subscribed: Mutex<Vec<SubscribeOptions>>,
}

impl Letterbox {
    fn new(bench: &Bench) -> Arc<Self> {
        let queue =
            DeliveryQueue::durable_group(name("dead"), name(REDRIVE_GROUP), 100, bench.timer.clone(), bench.letters.clone());
        Arc::new(Self { queue, published: Mutex::default(), subscribed: Mutex::default() })
    }
}

#[async_trait]
impl PubSub for Letterbox {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::in_process();
        (capabilities.dead_letter_history, capabilities.groups) = (true, Groups::Durable);
        capabilities
    }
    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], _: PublishOptions) -> Result<Positions, PublishError> {
        self.published.lock().extend(events.iter().map(|event| (topic.clone(), event.clone())));
        Ok(Positions::none())
    }
    async fn subscribe(&self, _: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.subscribed.lock().push(options.clone());
        Ok(join(&self.queue, HERE, options))
    }
    async fn history(&self, _: &Topic, _: Start, _: usize) -> Result<Page> {
        Ok(Page::default())
    }
    async fn clear_topic(&self, _: &Topic) -> Result<()> {
        Ok(())
    }
    async fn trim_topic(&self, _: &Topic, _: TrimFilter) -> Result<u64> {
        Ok(0)
    }
    async fn inspect(&self, _: &Topic) -> Result<TopicStatus> {
        Ok(TopicStatus::default())
    }
    fn status(&self) -> StatusWatch {
        StatusWatch::new(tokio::sync::watch::channel(Status::Connected).1)
    }
    async fn flush(&self) -> Result<()> {
        Ok(())
    }
    async fn close(&self, _: Duration) -> Result<Closed> {
        Ok(Closed::default())
    }
    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        None
    }
}

fn letters(numbers: std::ops::Range<u32>) -> impl Iterator<Item = Entry> {
    let letter = |number| dead_letter(&Event::new("x").with_run_id("r").with_data(number), &name("t"), None, 5, "no");
    numbers.map(move |number| Entry::new(Arc::new(letter(number))))
}

#[tokio::test(start_paused = true)]
async fn a_letter_is_redriven_until_it_is_handled_and_then_never_again() {
    let bench = Bench::new();
    let backend = Letterbox::new(&bench);
    let bus = Bus::new(backend.clone());
    push_entries(&backend.queue, letters(0..3));
    let calls = AtomicU32::new(0);
    let handler = async |letter: pubsub_core::Message| {
        calls.fetch_add(1, Ordering::Relaxed);
        match (*letter.data::<u32>()?, letter.attempt()) {
            (1, 1..20) => Err(Failure::retry("not yet")),
            (2, _) => Err(Failure::dead_letter("never")),
            _ => Ok(()),
        }
    };
    let report = soon(bus.redrive("dead", handler)).await.unwrap();
    assert_eq!((report.done, report.retried, report.dead_lettered, calls.load(Ordering::Relaxed)), (2, 19, 1, 22));
    let again = soon(bus.redrive("dead", async |_| Ok(()))).await.unwrap();
    assert_eq!(again.done, 0);
}

#[tokio::test(start_paused = true)]
async fn what_was_not_redriven_comes_next_time() {
    let bench = Bench::new();
    let backend = Letterbox::new(&bench);
    let bus = Bus::new(backend.clone());
    push_entries(&backend.queue, letters(0..3));
    let stuck = bus.redrive("dead", async |_| std::future::pending().await);
    assert!(tokio::time::timeout(millis(10), stuck).await.is_err());
    assert_eq!(soon(bus.redrive_to("dead", "again")).await.unwrap().done, 3);
    let published = backend.published.lock();
    assert!(published.iter().all(|(topic, event)| topic.as_str() == "again" && event.run_id() == "r"));
}

#[tokio::test(start_paused = true)]
async fn only_a_decorator_gives_an_index() {
    let bench = Bench::new();
    let backend = Letterbox::new(&bench);
    let bus = Bus::new(backend.clone());
    let event = Arc::new(Event::new("x").with_index(Some(ReplayIndex { generation: 1, index: 2 })));
    bus.publish("t", event.clone()).await.unwrap();
    bus.publish_with("t", &[event.clone(), Arc::new(Event::new("y"))], PublishOptions::new()).await.unwrap();
    let published = backend.published.lock();
    assert_eq!(published.len(), 3);
    assert!(published.iter().all(|(_, event)| event.index().is_none()));
    assert_eq!((published[0].1.id(), published[1].1.id()), (event.id(), event.id()));
}

#[tokio::test(start_paused = true)]
async fn names_are_checked_before_the_backend_is_asked() {
    let bench = Bench::new();
    let backend = Letterbox::new(&bench);
    let bus = Bus::new(backend.clone());
    let long = "x".repeat(256);
    for bad in ["", "a\nb", long.as_str()] {
        let error = bus.publish(bad, Event::new("x")).await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidName(_)) && error.fates() == [Fate::NotSent], "{error}");
        assert!(matches!(bus.subscribe(bad).await.unwrap_err().kind(), ErrorKind::InvalidName(_)));
        assert!(matches!(bus.subscribe_group("t", bad).await.unwrap_err().kind(), ErrorKind::InvalidName(_)));
    }
    assert!(backend.published.lock().is_empty() && backend.subscribed.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn conveniences_ask_for_what_they_say() {
    let bench = Bench::new();
    let backend = Letterbox::new(&bench);
    let bus = Bus::new(backend.clone());
    let cursor: pubsub_core::Cursor = "a.b.1.2".parse().unwrap();
    drop(bus.subscribe("t").await.unwrap());
    drop(bus.subscribe_group("t", "g").await.unwrap());
    drop(bus.subscribe_with_replay("t").await.unwrap());
    drop(bus.subscribe_from_offset("t", 7).await.unwrap());
    drop(bus.subscribe_after("t", cursor.clone()).await.unwrap());
    let asked: Vec<_> =
        backend.subscribed.lock().iter().map(|options| (options.group.clone(), options.start.clone())).collect();
    let expected = [
        (None, None),
        (Some(name("g")), None),
        (None, Some(Start::Earliest)),
        (None, Some(Start::Index(7))),
        (None, Some(Start::After(cursor))),
    ];
    assert_eq!(asked, expected);
}

#[tokio::test(start_paused = true)]
async fn a_handler_in_a_task_of_its_own_stops_and_reports() {
    let bench = Bench::new();
    let backend = Letterbox::new(&bench);
    let bus = Bus::new(backend.clone());
    let handler = bus.on("t", member(), 2, async |_| Ok(())).await.unwrap();
    push(&backend.queue, 0..10);
    soon(handler.handle().drained()).await;
    assert_eq!(soon(handler.stop()).await.unwrap().done, 10);
}

#[tokio::test(start_paused = true)]
async fn a_flush_sends_partial_batches_out() {
    let bench = Bench::new();
    let backend = Letterbox::new(&bench);
    let bus = Bus::new(backend.clone());
    let policy = pubsub_core::BatchPolicy::new().max_wait(None);
    let mut batches = bus.subscribe_with("t", member()).await.unwrap().batches(policy).unwrap();
    push(&backend.queue, 0..3);
    let batch = tokio::spawn(async move { futures::StreamExt::next(&mut batches).await.unwrap().unwrap().len() });
    tokio::time::sleep(millis(10)).await;
    assert!(!batch.is_finished());
    bus.flush().await.unwrap();
    assert_eq!(soon(batch).await.unwrap(), 3);
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let bench = Bench::new();
    let bus = Bus::new(Letterbox::new(&bench));
    bus.require([Capability::DurableGroups, Capability::DeadLetterHistory]).unwrap();
    let error = bus.require([Capability::Groups, Capability::NetworkReach, Capability::Index]).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Unsupported(Capability::NetworkReach));
}
