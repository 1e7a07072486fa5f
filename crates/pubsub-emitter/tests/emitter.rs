//! What is particular to the in-process bus; what all backends share is the conformance suite's.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use pubsub_core::{
    Bus, Cursor, ErrorKind, Event, Failure, Fate, Filter, Group, Origin, Overflow, Payload, PubSub, PublishOptions,
    RetryPolicy, Scope, Settled, Start, SubscribeOptions, Topic, TrimFilter,
};
use pubsub_emitter::{EventEmitterPubSub, MAX_INLINE_DEPTH};

fn topic(name: &str) -> Topic {
    Topic::new(name).unwrap()
}

fn group(name: &str) -> SubscribeOptions {
    SubscribeOptions::group(Group::new(name).unwrap())
}

fn fast(attempts: u32) -> RetryPolicy {
    RetryPolicy::new().max_attempts(attempts).backoff(Duration::from_millis(5), Duration::from_millis(5))
}

#[tokio::test]
async fn fan_out_and_groups_each_get_their_own() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let (mut a, mut b) = (bus.subscribe("t").await.unwrap(), bus.subscribe("t").await.unwrap());
    let (mut m, mut n) = (bus.subscribe_group("t", "g").await.unwrap(), bus.subscribe_group("t", "g").await.unwrap());
    for i in 0..2_u32 {
        bus.publish_data("t", "x", i).await.unwrap();
    }
    for i in 0..2 {
        assert_eq!(*a.next().await.unwrap().unwrap().data::<u32>().unwrap(), i);
        assert_eq!(*b.next().await.unwrap().unwrap().data::<u32>().unwrap(), i);
    }
    let (first, second) = (m.next().await.unwrap().unwrap(), n.next().await.unwrap().unwrap());
    assert_eq!((*first.data::<u32>().unwrap(), *second.data::<u32>().unwrap()), (0, 1));
    assert_eq!((first.done().await, second.done().await), (Settled::Done, Settled::Done));
    assert!(m.next().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_makes_publish_wait_and_then_fail_with_its_events_unsent() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let mut other = bus.subscribe("t").await.unwrap();
    let mut stuck = bus.subscribe_with("t", SubscribeOptions::fan_out().prefetch(2)).await.unwrap();
    let events: Vec<_> = (0..5).map(|i| Arc::new(Event::new("x").with_data(i))).collect();
    let error = bus.publish_with("t", &events, PublishOptions::new()).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Full);
    let taken = error.fates().iter().filter(|fate| **fate == Fate::Published).count();
    assert!(taken > 0 && taken <= 2, "{taken}");
    // What was not sent reached nobody.
    for i in 0..taken {
        assert_eq!(*other.next().await.unwrap().unwrap().data::<i32>().unwrap(), i as i32);
    }
    assert!(other.next().now_or_never().is_none());
    // Room frees a waiting publisher, and what it could not send before goes out in order.
    let again: Vec<_> = error.unpublished().map(|i| events[i].clone()).collect();
    let publish = bus.publish_with("t", &again, PublishOptions::new());
    let read = async {
        let mut seen = Vec::new();
        while seen.len() < 5 {
            seen.push(*stuck.next().await.unwrap().unwrap().data::<i32>().unwrap());
        }
        seen
    };
    let (published, seen) = futures::join!(publish, read);
    published.unwrap();
    assert_eq!(seen, [0, 1, 2, 3, 4]);
}

#[tokio::test(start_paused = true)]
async fn what_keeps_failing_is_dead_lettered_listed_and_redriven_once() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let options = group("g").retry(fast(3)).dead_letter(topic("dead"));
    let worker = bus.on("t", options, 1, async |_| Err(Failure::retry("boom"))).await.unwrap();
    let event = Arc::new(Event::new("x").with_run_id("r").with_data(7_u32));
    bus.publish("t", event.clone()).await.unwrap();
    worker.handle().drained().await;
    let page = bus.history("dead", Start::Earliest, 10).await.unwrap();
    let origin = Origin::of(&page.entries[0].1).unwrap();
    assert_eq!((page.entries.len(), origin.attempts, origin.reason.as_str()), (1, 3, "boom"));
    assert_eq!((origin.event, origin.topic), (event.id().to_string(), topic("t")));

    let mut back = bus.subscribe("again").await.unwrap();
    assert_eq!(bus.redrive_to("dead", "again").await.unwrap().done, 1);
    assert_eq!(bus.redrive_to("dead", "again").await.unwrap().done, 0);
    let redriven = back.next().await.unwrap().unwrap();
    assert_eq!((*redriven.data::<u32>().unwrap(), redriven.event().run_id()), (7, "r"));
    assert!(back.next().now_or_never().is_none());

    bus.clear_topic("dead").await.unwrap();
    assert!(bus.history("dead", Start::Earliest, 10).await.unwrap().entries.is_empty());
    let gone = bus.history("dead", Start::After(page.entries[0].0.clone()), 1).await.unwrap_err();
    // A subscription that is refused leaves nothing behind.
    let start = Start::After(page.entries[0].0.clone());
    let refused = bus.subscribe_with("dead", group("g").start(start).dead_letter(topic("deader"))).await.unwrap_err();
    assert!(matches!(refused.kind(), ErrorKind::Gap(pubsub_core::Gap::OtherGeneration)));
    assert!(bus.history("deader", Start::Earliest, 1).await.is_err());
    // Neither does a cursor of one topic pass for one of another.
    let _names_it = bus.subscribe_with("u", group("g").dead_letter(topic("other"))).await.unwrap();
    let other = bus.history("other", Start::After(page.entries[0].0.clone()), 1).await.unwrap_err();
    assert!(matches!(other.kind(), ErrorKind::Gap(pubsub_core::Gap::OtherBus)), "{other:?}");
    assert!(matches!(gone.kind(), ErrorKind::Gap(pubsub_core::Gap::OtherGeneration)));
}

#[tokio::test]
async fn local_only_events_stay_with_their_instance_and_may_be_live() {
    let here = EventEmitterPubSub::new();
    let there = here.connect();
    let (here, there) = (Bus::from(here), Bus::from(there));
    let (mut a, mut b) = (here.subscribe("t").await.unwrap(), there.subscribe("t").await.unwrap());
    let mut remote_member = there.subscribe_group("t", "g").await.unwrap();
    let value = Arc::new(AtomicUsize::new(3));
    let event = Arc::new(Event::new("x").with_payload(Payload::live(value.clone())));
    let refused = here.publish("t", event.clone()).await.unwrap_err();
    assert!(matches!(refused.kind(), ErrorKind::NotSerializable(_)));
    here.publish_with("t", &[event], PublishOptions::local_only()).await.unwrap();
    here.publish_data("t", "fence", ()).await.unwrap();
    let live = a.next().await.unwrap().unwrap();
    assert_eq!(live.event().payload().get_live::<AtomicUsize>().unwrap().load(Ordering::Relaxed), 3);
    assert_eq!(b.next().await.unwrap().unwrap().event().event_type(), "fence");
    assert_eq!(remote_member.next().await.unwrap().unwrap().event().event_type(), "fence");
}

#[tokio::test]
async fn inline_handlers_run_in_the_publishers_task_and_recursion_ends() {
    let emitter = EventEmitterPubSub::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let (again, counted, at) = (emitter.clone(), calls.clone(), topic("t"));
    let inline = emitter.subscribe_inline(&topic("t"), move |event| {
        counted.fetch_add(1, Ordering::Relaxed);
        let nested = again.publish(&at, std::slice::from_ref(event), PublishOptions::new()).now_or_never().unwrap();
        if let Err(error) = nested {
            assert!(matches!(error.kind(), ErrorKind::Recursion { limit: pubsub_emitter::MAX_INLINE_DEPTH }));
            panic!("a panic concerns nobody else");
        }
    });
    let event = [Arc::new(Event::new("x"))];
    emitter.publish(&topic("t"), &event, PublishOptions::new()).await.unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), pubsub_emitter::MAX_INLINE_DEPTH);
    drop(inline);
    emitter.publish(&topic("t"), &event, PublishOptions::new()).await.unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), pubsub_emitter::MAX_INLINE_DEPTH);
}

#[tokio::test(start_paused = true)]
async fn close_drains_then_cuts_off_and_late_settlements_are_told() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let mut worker = bus.subscribe_group("t", "g").await.unwrap();
    for i in 0..3 {
        bus.publish_data("t", "x", i).await.unwrap();
    }
    let held = worker.next().await.unwrap().unwrap();
    let (closed, also) = futures::join!(bus.close(Duration::from_secs(1)), bus.close(Duration::from_secs(60)));
    let closed = closed.unwrap();
    assert_eq!((closed.released, closed.cut_off, closed), (2, 1, also.unwrap()));
    assert_eq!(held.done().await, Settled::TooLate);
    assert!(worker.next().await.is_none());
    assert_eq!(*bus.publish_data("t", "x", 1).await.unwrap_err().kind(), ErrorKind::Closed);
    assert!(bus.subscribe("t").await.unwrap_err().is_closed());
}

#[tokio::test]
async fn names_are_shared_within_the_process_while_somebody_holds_them() {
    let bus = Bus::from(EventEmitterPubSub::named("names-are-shared").unwrap());
    let mut subscription = bus.subscribe("t").await.unwrap();
    let other = Bus::from(EventEmitterPubSub::named("names-are-shared").unwrap());
    other.publish_data("t", "x", 1).await.unwrap();
    assert!(subscription.next().await.unwrap().is_ok());
    let differs = EventEmitterPubSub::builder().name("names-are-shared").dead_letter_retention(7).build();
    assert!(
        matches!(differs.unwrap_err().kind(), ErrorKind::InvalidOption { option, .. } if option == "dead_letter_retention")
    );
    drop((bus, other, subscription));
    EventEmitterPubSub::builder().name("names-are-shared").dead_letter_retention(7).build().unwrap();
}

#[tokio::test]
async fn dropping_everything_leaves_no_task_and_subscriptions_outlive_the_handle() {
    let metrics = tokio::runtime::Handle::current().metrics();
    let bus = Bus::from(EventEmitterPubSub::new());
    let publisher = bus.clone();
    let mut subscription = bus.subscribe_with("t", group("g").retry(fast(5))).await.unwrap();
    publisher.publish_data("t", "x", 1).await.unwrap();
    drop((bus, publisher));
    subscription.next().await.unwrap().unwrap().retry();
    assert_eq!(subscription.next().await.unwrap().unwrap().attempt(), 2);
    drop(subscription);
    tokio::task::yield_now().await;
    assert_eq!(metrics.num_alive_tasks(), 0);
}

#[test]
fn publishers_may_be_on_any_executor() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
    let bus = Bus::from(EventEmitterPubSub::new());
    futures::executor::block_on(bus.publish_data("t", "x", 0)).unwrap();
    let subscription = runtime.block_on(bus.subscribe_with("t", SubscribeOptions::fan_out().prefetch(1))).unwrap();
    futures::executor::block_on(bus.publish_data("t", "x", 1)).unwrap();
    let patience = PublishOptions::new().timeout(Duration::from_millis(20));
    let full = futures::executor::block_on(bus.publish_with("t", &[Arc::new(Event::new("x"))], patience)).unwrap_err();
    assert_eq!(*full.kind(), ErrorKind::Full);
    let no_runtime = futures::executor::block_on(Bus::from(EventEmitterPubSub::new()).subscribe("t")).unwrap_err();
    assert!(matches!(no_runtime.kind(), ErrorKind::Backend(_)), "{no_runtime}");
    drop(subscription);
    assert!(futures::executor::block_on(bus.close(Duration::from_secs(1))).unwrap().is_clean());
}

#[tokio::test]
async fn a_filter_that_panics_loses_nothing() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let filter = Filter::predicate(|event| if event.event_type() == "bad" { panic!("told to") } else { true });
    let mut subscription = bus.subscribe_with("t", group("g").filter(filter)).await.unwrap();
    for event_type in ["good", "bad", "good"] {
        bus.publish("t", Event::new(event_type)).await.unwrap();
    }
    for event_type in ["good", "bad", "good"] {
        let delivery = subscription.next().await.unwrap().unwrap();
        assert_eq!(delivery.event().event_type(), event_type);
        delivery.done();
    }
}

#[tokio::test]
async fn a_payload_may_use_the_bus_when_it_is_dropped() {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Last {
        #[serde(skip)]
        bus: Option<Bus>,
    }
    impl Drop for Last {
        fn drop(&mut self) {
            if let Some(bus) = self.bus.take() {
                let _ = bus.publish("dead", Event::new("gone")).now_or_never();
            }
        }
    }
    let bus = Bus::from(EventEmitterPubSub::builder().dead_letter_retention(1).build().unwrap());
    let options = group("g").retry(fast(1)).dead_letter(topic("dead"));
    let mut worker = bus.subscribe_with("t", options).await.unwrap();
    let mut lossy =
        bus.subscribe_with("t", SubscribeOptions::fan_out().prefetch(1).overflow(Overflow::DropOldest)).await.unwrap();
    for _ in 0..4 {
        bus.publish("t", Event::new("x").with_data(Last { bus: Some(bus.clone()) })).await.unwrap();
        worker.next().await.unwrap().unwrap().dead_letter("told to");
    }
    assert_eq!(bus.history("dead", Start::Earliest, 9).await.unwrap().entries.len(), 1);
    assert_eq!(lossy.next().await.unwrap().unwrap().lagged(), 3);
}

#[test]
fn a_bus_outlives_the_runtime_it_began_on() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
    let (first, second) = (runtime(), runtime());
    let bus = Bus::from(EventEmitterPubSub::new());
    first.block_on(async { drop(bus.subscribe_with("x", group("g")).await.unwrap()) });
    drop(first);
    second.block_on(async {
        let mut subscription = bus.subscribe_with("t", group("g").retry(fast(5)).prefetch(1)).await.unwrap();
        bus.publish_data("t", "x", 1).await.unwrap();
        let patience = PublishOptions::new().timeout(Duration::from_millis(20));
        let full = bus.publish_with("t", &[Arc::new(Event::new("x"))], patience).await.unwrap_err();
        assert_eq!(*full.kind(), ErrorKind::Full);
        subscription.next().await.unwrap().unwrap().retry();
        let again = tokio::time::timeout(Duration::from_secs(10), subscription.next()).await.expect("the retry comes due");
        assert_eq!(again.unwrap().unwrap().attempt(), 2);
        let closed = tokio::time::timeout(Duration::from_secs(10), bus.close(Duration::from_millis(50))).await;
        closed.expect("it ends").unwrap();
        assert!(subscription.next().await.is_none());
    });
}

#[tokio::test(start_paused = true)]
async fn a_group_is_durable_from_when_its_topic_becomes_a_dead_letter_topic() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let early = bus.subscribe_with("dead", group("early").prefetch(1)).await.unwrap();
    bus.publish_data("dead", "before", 0).await.unwrap();
    // A publisher that waits for room there need not any more.
    let mut waits = Box::pin(bus.publish_data("dead", "before", 1));
    assert!(waits.as_mut().now_or_never().is_none());
    let mut worker = bus.subscribe_with("t", group("g").retry(fast(1)).dead_letter(topic("dead"))).await.unwrap();
    let waited = tokio::time::Instant::now();
    waits.await.unwrap();
    assert!(waited.elapsed() < Duration::from_secs(1), "it was told at once");
    drop(early);
    bus.publish_data("t", "x", 2).await.unwrap();
    worker.next().await.unwrap().unwrap().dead_letter("told to");
    let mut late = bus.subscribe_group("dead", "early").await.unwrap();
    for expected in 0..3 {
        assert_eq!(*late.next().await.unwrap().unwrap().data::<i32>().unwrap(), expected);
    }
}

#[tokio::test]
async fn whatever_is_published_to_a_dead_letter_topic_is_a_letter() {
    let bus = Bus::from(EventEmitterPubSub::builder().dead_letter_retention(2).build().unwrap());
    bus.publish_data("dead", "before", 0).await.unwrap();
    let names_it = bus.subscribe_with("t", group("g").dead_letter(topic("dead"))).await.unwrap();
    let mut live = bus.subscribe("dead").await.unwrap();
    for number in 1..4 {
        bus.publish_data("dead", "by hand", number).await.unwrap();
    }
    let local = Arc::new(Event::new("local").with_data(9));
    bus.publish_with("dead", &[local], PublishOptions::local_only()).await.unwrap();
    for number in [1, 2, 3, 9] {
        assert_eq!(*live.next().await.unwrap().unwrap().data::<i32>().unwrap(), number);
    }
    let kept = bus.history("dead", Start::Earliest, 9).await.unwrap().entries;
    assert_eq!(kept.iter().map(|(_, letter)| *letter.data::<i32>().unwrap()).collect::<Vec<_>>(), [2, 3]);
    let redriven = bus.redrive("dead", |_| std::future::ready(Ok(()))).await.unwrap();
    assert_eq!(redriven.done, 2);
    drop(names_it);
}

#[tokio::test]
async fn a_page_of_nothing_is_refused() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let _names_it = bus.subscribe_with("t", group("g").dead_letter(topic("dead"))).await.unwrap();
    let refused = bus.history("dead", Start::Earliest, 0).await.unwrap_err();
    assert!(matches!(refused.kind(), ErrorKind::InvalidOption { option, .. } if option == "limit"), "{refused:?}");
}

/// Data whose destructor panics, once each.
#[derive(serde::Serialize, serde::Deserialize)]
struct Explosive(u32);

impl Drop for Explosive {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("told to");
        }
    }
}

#[tokio::test]
async fn an_inline_handler_that_panics_with_something_that_panics_harms_nobody() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            std::panic::panic_any("dropped");
        }
    }
    let emitter = EventEmitterPubSub::new();
    let _inline = emitter.subscribe_inline(&topic("t"), |_| std::panic::panic_any(Bomb)).unwrap();
    let bus = Bus::from(emitter);
    let mut queued = bus.subscribe("t").await.unwrap();
    // More often than handlers may be nested: none of them counts as still running.
    for number in 0..2 * MAX_INLINE_DEPTH {
        bus.publish_data("t", "x", number).await.unwrap();
        assert_eq!(*queued.next().await.unwrap().unwrap().data::<usize>().unwrap(), number);
    }
}

#[tokio::test]
async fn a_payload_whose_destructor_panics_harms_only_who_drops_it() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let lossy = SubscribeOptions::fan_out().prefetch(1).overflow(Overflow::DropOldest);
    let mut lossy = bus.subscribe_with("t", lossy).await.unwrap();
    let queued = bus.subscribe("t").await.unwrap();
    let mut worker = bus.subscribe_with("t", group("g").retry(fast(1))).await.unwrap();
    for number in 0..4 {
        bus.publish_data("t", "x", Explosive(number)).await.unwrap();
        // Given up without a dead-letter topic, and the last to have it but for `queued`.
        worker.next().await.unwrap().unwrap().dead_letter("told to");
    }
    // All of them at once, by whoever ends a subscription; then one of the publisher's, lost to a bound.
    drop((queued, worker));
    bus.publish_data("t", "x", Explosive(4)).await.unwrap();
    let last = lossy.next().await.unwrap().unwrap();
    assert_eq!((last.data::<Explosive>().unwrap().0, last.lagged()), (4, 4));
    // The consumer's own is its own affair.
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(last))).is_err());
    let mut other = bus.subscribe("t").await.unwrap();
    bus.publish_data("t", "x", 5_u32).await.unwrap();
    assert_eq!(*lossy.next().await.unwrap().unwrap().data::<u32>().unwrap(), 5);
    assert_eq!(*other.next().await.unwrap().unwrap().data::<u32>().unwrap(), 5);
    assert!(bus.close(Duration::from_secs(10)).await.unwrap().is_clean());
}

#[test]
fn a_consumer_elsewhere_gets_its_retry_though_the_first_runtime_has_ended() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
    let (first, second) = (runtime(), runtime());
    let bus = Bus::from(EventEmitterPubSub::new());
    let slow = fast(5).backoff(Duration::from_millis(50), Duration::from_millis(50));
    let mut subscription = first.block_on(async {
        let mut subscription = bus.subscribe_with("t", group("g").retry(slow)).await.unwrap();
        bus.publish_data("t", "x", 1).await.unwrap();
        subscription.next().await.unwrap().unwrap().retry();
        subscription
    });
    drop(first);
    second.block_on(async {
        let again = tokio::time::timeout(Duration::from_secs(10), subscription.next()).await.expect("the retry comes due");
        assert_eq!(again.unwrap().unwrap().attempt(), 2);
    });
}

#[tokio::test]
async fn a_redrive_ends_with_its_bus() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let mut worker = bus.subscribe_with("t", group("g").retry(fast(1)).dead_letter(topic("dead"))).await.unwrap();
    bus.publish_data("t", "x", 1).await.unwrap();
    worker.next().await.unwrap().unwrap().dead_letter("told to");
    // A letter that is never handled keeps a redrive going, until its bus is closed.
    let redrive = bus.redrive("dead", async |_| Err(Failure::retry("not now")));
    let close = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        bus.close(Duration::from_millis(50)).await.unwrap();
    };
    let both = async { futures::join!(redrive, close) };
    let (report, ()) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("it ends with its bus");
    assert_eq!(report.unwrap().done, 0);
}

#[tokio::test]
async fn a_payload_may_use_the_bus_when_it_is_encoded() {
    #[derive(serde::Deserialize)]
    struct Nosy {
        #[serde(skip)]
        bus: Option<Bus>,
    }
    impl serde::Serialize for Nosy {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            if let Some(bus) = &self.bus {
                let _ = bus.publish_data("dead", "nested", 0).now_or_never();
                let _ = bus.inspect("dead").now_or_never();
            }
            serde::Serialize::serialize(&serde_json::json!({ "producedAt": 1 }), serializer)
        }
    }
    // Encoded to be measured when it is published, or else to be trimmed: what is kept, and what waits in a queue.
    for builder in [EventEmitterPubSub::builder().max_payload(1 << 10), EventEmitterPubSub::builder()] {
        let bus = Bus::from(builder.build().unwrap());
        let mut worker = bus.subscribe_with("t", group("g").retry(fast(1)).dead_letter(topic("dead"))).await.unwrap();
        let mut durable = bus.subscribe_group("dead", "later").await.unwrap();
        let event = Event::new("x").with_run_id("r").with_data(Nosy { bus: Some(bus.clone()) });
        bus.publish("t", event).await.unwrap();
        worker.next().await.unwrap().unwrap().dead_letter("told to");
        assert_eq!(bus.trim_topic("dead", TrimFilter::run("r").produced_up_to(1)).await.unwrap(), 1);
        // What was published from within is there, and the letter is gone.
        assert_eq!(durable.next().await.unwrap().unwrap().event().event_type(), "nested");
        assert!(durable.next().now_or_never().is_none());
    }
}

/// Goes, and looks at a bus as it does.
struct Parting(Bus);

impl Drop for Parting {
    fn drop(&mut self) {
        let _ = self.0.subscribe("t").now_or_never();
    }
}

#[tokio::test]
async fn a_refused_subscription_lets_go_of_its_filter_without_the_bus_being_locked() {
    let bus = Bus::from(EventEmitterPubSub::new());
    let names_it = bus.subscribe_with("u", group("g").dead_letter(topic("dead"))).await.unwrap();
    let (done, is_done) = std::sync::mpsc::channel();
    let runtime = tokio::runtime::Handle::current();
    // A thread of its own: what this test looks for is a deadlock.
    std::thread::spawn(move || {
        let parting = Parting(bus.clone());
        let filter = Filter::predicate(move |_| parting.0.leases().is_some());
        let foreign = Cursor::new(Arc::new(Scope::new("elsewhere", "1").unwrap()), 7);
        let refused = bus.subscribe_with("dead", group("g").start(Start::After(foreign)).filter(filter));
        let _ = done.send(runtime.block_on(refused).unwrap_err());
        drop(names_it);
    });
    let error = is_done.recv_timeout(Duration::from_secs(20)).expect("it locked up");
    assert!(matches!(error.kind(), ErrorKind::Gap(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn local_events_wait_in_no_line_for_a_queue_they_do_not_go_to() {
    let here = EventEmitterPubSub::new();
    let (there, here) = (Bus::from(here.connect()), Bus::from(here));
    let _stuck = there.subscribe_with("t", SubscribeOptions::fan_out().prefetch(1)).await.unwrap();
    let mut local = here.subscribe("t").await.unwrap();
    there.publish("t", Event::new("x")).await.unwrap();
    let mut waits = Box::pin(there.publish("t", Event::new("x")));
    assert!(waits.as_mut().now_or_never().is_none());
    let event = [Arc::new(Event::new("local"))];
    let options = PublishOptions::local_only().timeout(Duration::from_millis(10));
    here.publish_with("t", &event, options.clone()).await.unwrap();
    assert_eq!(local.next().await.unwrap().unwrap().event().event_type(), "x");
    assert_eq!(local.next().await.unwrap().unwrap().event().event_type(), "local");
    // Where the line is for a queue of their own, they stand in it.
    let _full = here.subscribe_with("t", SubscribeOptions::fan_out().prefetch(1)).await.unwrap();
    here.publish_with("t", &event, options.clone()).await.unwrap();
    assert_eq!(*here.publish_with("t", &event, options).await.unwrap_err().kind(), ErrorKind::Full);
}
