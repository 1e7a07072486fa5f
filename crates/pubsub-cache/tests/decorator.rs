//! What only a decorator over a store can do or get wrong. The names in brackets are the properties that the conformance suite
//! leaves to these tests.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::world::{SOON, World, events_of, from, indices, made, manual, rest, subscribe, world};
use common::{Fault, FaultyStore, Spy, events, ids, next, publish, take, topic, until, within};
use futures::{FutureExt, StreamExt};
use pubsub_cache::{CachingPubSub, InMemoryServerCache, OnStoreFailure, ServerCache};
use pubsub_core::{
    AckMode, Closed, ErrorKind, Event, Fate, Gap, Group, OnGap, Overflow, Payload, PubSub, PublishOptions, ReplayIndex, Result,
    Settled, Start, SubscribeOptions, TrimFilter,
};
use pubsub_emitter::EventEmitterPubSub;

// Replay.
#[tokio::test(start_paused = true)]
async fn a_transport_that_sends_its_backlog_again_is_replayed_once_and_in_order() {
    // RP-09, RP-12: the spy fails where what is suppressed would have to be settled by hand.
    let World { bus, spy, .. } = world();
    let sent = events(0..20);
    publish(&bus, &topic("t"), &sent).await;
    spy.sends_backlog.store(true, Ordering::SeqCst);
    for (start, first) in [(Start::Earliest, 0), (Start::Index(7), 7), (Start::Latest, 20)] {
        let mut auto = from(&bus, "t", start.clone()).await;
        let mut held = subscribe(&bus, "t", manual(start)).await.unwrap();
        assert_eq!(ids(&rest(&bus, "t", &mut auto).await), ids(&sent)[first..]);
        let fence = spy.published().pop().unwrap();
        assert_eq!(ids(&events_of(&until(&mut held, fence.id()).await)), ids(&sent)[first..]);
        // Fences belong to the topic from now on.
        bus.clear_topic(&topic("t")).await.unwrap();
        spy.published.lock().clear();
        publish(&bus, &topic("t"), &sent).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_published_while_a_subscription_begins_arrives_with_nothing_behind_it() {
    for (start, due) in [(Start::Latest, 2), (Start::Earliest, 1), (Start::Index(1), 2)] {
        for step in [0, 1] {
            let World { bus, store, .. } = world();
            let (on, sent) = (topic("t"), events(1..3));
            publish(&bus, &on, &sent[..1]).await;
            // The log is read, and the answer is under way when the event comes.
            store.schedule.at([store.schedule.count() + step], Fault::Late(Duration::from_millis(500)));
            let subscribing = bus.subscribe(&on, SubscribeOptions::fan_out().start(start.clone()));
            let publishing = async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                publish(&bus, &on, &sent[1..]).await;
            };
            let (subscribed, ()) = futures::join!(subscribing, publishing);
            let mut subscription = subscribed.unwrap();
            assert_eq!(ids(&take(&mut subscription, 3 - due).await), ids(&sent[due - 1..]));
            assert!(subscription.next().now_or_never().is_none());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn live_events_that_come_during_a_replay_keep_working_handles() {
    // RP-14
    let World { bus, store, .. } = world();
    let sent = events(0..3);
    publish(&bus, &topic("t"), &sent[..1]).await;
    let mut subscription = subscribe(&bus, "t", manual(Start::Earliest)).await.unwrap();
    // It has the first page; two live events come while the log is slow to give one that did not.
    store.schedule.all(Some(Fault::Late(Duration::from_millis(200))));
    store.inner.append(&topic("t"), &sent[1..2]).await.unwrap();
    let on = topic("t");
    let publishing = bus.publish(&on, &sent[2..], PublishOptions::new());
    let reading = async {
        let mut seen = Vec::new();
        for _ in 0..3 {
            seen.push(next(&mut subscription).await);
        }
        seen
    };
    let (published, mut seen) = futures::join!(publishing, reading);
    published.unwrap();
    assert_eq!(ids(&events_of(&seen)), ids(&sent));
    assert_eq!(seen.pop().unwrap().retry().await, Settled::Done);
    let again = next(&mut subscription).await;
    assert_eq!((again.event().id(), again.attempt()), (sent[2].id(), 2));
    assert_eq!(again.done().await, Settled::Done);
    seen.into_iter().for_each(|delivery| drop(delivery.done()));
    within("drained", subscription.handle().drained()).await;
}

#[tokio::test(start_paused = true)]
async fn a_replay_that_cannot_begin_leaves_nothing_attached() {
    // RP-15
    for fault in [Fault::Retryable, Fault::Permanent, Fault::Hang, Fault::Late(SOON), Fault::DoneUnavailable] {
        for (step, mode) in [(0, OnStoreFailure::Continue), (1, OnStoreFailure::Continue), (0, OnStoreFailure::Fail)] {
            let World { bus, spy, store } = made(|_| (), mode, true);
            publish(&bus, &topic("t"), &events(0..2)).await;
            store.schedule.at([store.schedule.count() + step], fault);
            let refused = subscribe(&bus, "t", SubscribeOptions::fan_out().start(Start::Earliest)).await;
            let error = refused.expect_err("what cannot be replayed is refused");
            assert_eq!((error.operation(), error.subject()), (Some("subscribe"), Some("t")));
            assert_eq!(spy.fan_out(&topic("t")).await, 0, "{fault:?} at {step}");
        }
    }
    let World { bus, spy, .. } = world();
    let refused = subscribe(&bus, "t", SubscribeOptions::fan_out().start(Start::Index(9))).await;
    assert_eq!(*refused.unwrap_err().kind(), ErrorKind::Gap(Gap::Ahead));
    assert_eq!(spy.fan_out(&topic("t")).await, 0);
}

#[tokio::test]
async fn what_is_remembered_of_what_was_delivered_stays_bounded() {
    // RP-18: a watch that has followed for long still takes a repeat for one, and holds nothing it has handed over.
    let World { bus, store, spy } = world();
    let mut watch = from(&bus, "t", Start::Earliest).await;
    let payload = Arc::new(());
    for _ in 0..100 {
        let live: Vec<_> = (0..100).map(|_| Arc::new(Event::new("x").with_data(0))).collect();
        publish(&bus, &topic("t"), &live).await;
        take(&mut watch, 100).await;
    }
    let probe = Arc::new(Event::new("probe").with_payload(Payload::live(payload.clone())));
    within("publish", bus.publish(&topic("t"), &[probe], PublishOptions::local_only())).await.unwrap();
    assert_eq!(next(&mut watch).await.event().event_type(), "probe");
    spy.published.lock().clear();
    assert_eq!(Arc::strong_count(&payload), 1, "what was handed over is still held");
    let last = store.kept(&topic("t")).await;
    assert_eq!(last.len(), 10_000);
}

#[tokio::test(start_paused = true)]
async fn an_event_that_could_not_be_kept_is_live_without_an_index_and_takes_none() {
    // RP-19
    let World { bus, store, .. } = world();
    let mut live = from(&bus, "t", Start::Latest).await;
    let sent = events(0..3);
    publish(&bus, &topic("t"), &sent[..1]).await;
    store.schedule.next(1, Fault::Retryable);
    assert!(publish(&bus, &topic("t"), &sent[1..2]).await.as_slice().is_empty());
    publish(&bus, &topic("t"), &sent[2..]).await;
    let seen = take(&mut live, 3).await;
    assert_eq!((ids(&seen), indices(&seen)), (ids(&sent), vec![Some(0), None, Some(1)]));
    assert_eq!((bus.uncached(), store.kept(&topic("t")).await.len()), (1, 2));
}

#[tokio::test]
async fn an_index_is_given_and_its_event_kept_in_one_operation() {
    // RP-20
    for (now, operation) in [(true, "append_now"), (false, "append")] {
        let World { bus, store, .. } = made(|_| (), OnStoreFailure::Continue, now);
        publish(&bus, &topic("t"), &events(0..1)).await;
        publish(&bus, &topic("t"), &events(1..9)).await;
        assert_eq!(store.schedule.names(), [operation; 2]);
    }
}

#[tokio::test]
async fn a_plain_subscription_never_replays() {
    // RP-21
    let World { bus, .. } = world();
    publish(&bus, &topic("t"), &events(0..9)).await;
    for options in [SubscribeOptions::fan_out(), SubscribeOptions::fan_out().start(Start::Latest)] {
        let mut plain = subscribe(&bus, "t", options).await.unwrap();
        assert!(rest(&bus, "t", &mut plain).await.is_empty());
    }
}

#[tokio::test]
async fn what_stays_local_and_what_is_not_wanted_passes_unkept() {
    // RP-22, RP-29
    let (spy, store) = (Spy::over(EventEmitterPubSub::new()), FaultyStore::new(true));
    let builder = CachingPubSub::builder(spy.clone(), store.clone());
    let bus = builder.should_cache(|topic| topic.as_str() != "unwanted").build().unwrap();
    let mut local = from(&bus, "t", Start::Latest).await;
    let value = Arc::new(Event::new("live").with_payload(Payload::live(Arc::new(7_u8))));
    bus.publish(&topic("t"), std::slice::from_ref(&value), PublishOptions::local_only()).await.unwrap();
    publish(&bus, &topic("t"), &events(0..1)).await;
    let seen = take(&mut local, 2).await;
    assert_eq!((indices(&seen), seen[0].id()), (vec![None, Some(0)], value.id()));
    assert!(spy.published.lock()[0].1.local_only);

    let operations = store.schedule.count();
    let mut unkept = subscribe(&bus, "unwanted", SubscribeOptions::fan_out()).await.unwrap();
    assert!(publish(&bus, &topic("unwanted"), &events(0..3)).await.as_slice().is_empty());
    assert_eq!(indices(&take(&mut unkept, 3).await), [None; 3]);
    let refused = subscribe(&bus, "unwanted", SubscribeOptions::fan_out().start(Start::Earliest)).await;
    assert!(matches!(refused.unwrap_err().kind(), ErrorKind::Unsupported(_)));
    assert!(matches!(bus.history(&topic("unwanted"), Start::Earliest, 9).await.unwrap_err().kind(), ErrorKind::Unsupported(_)));
    bus.clear_topic(&topic("unwanted")).await.unwrap();
    assert_eq!(bus.trim_topic(&topic("unwanted"), TrimFilter::run("run")).await.unwrap(), 0);
    bus.inspect(&topic("unwanted")).await.unwrap();
    assert_eq!(store.schedule.count(), operations, "the store was asked for a topic that is not kept");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_appended_is_not_published_where_replay_is_exact() {
    // RP-23
    let due = [
        (Fault::Retryable, Fate::Unknown, ErrorKind::Unavailable),
        (Fault::Permanent, Fate::NotSent, ErrorKind::Backend("out of order".into())),
        (Fault::Hang, Fate::Unknown, ErrorKind::Timeout),
        (Fault::Late(SOON), Fate::Unknown, ErrorKind::Timeout),
        (Fault::DoneUnavailable, Fate::Unknown, ErrorKind::Unavailable),
    ];
    for (fault, fate, kind) in due {
        let World { bus, spy, store } = made(|_| (), OnStoreFailure::Fail, true);
        let mut live = from(&bus, "t", Start::Latest).await;
        store.schedule.next(1, fault);
        let error = within("publish", bus.publish(&topic("t"), &events(0..2), PublishOptions::new())).await.unwrap_err();
        assert_eq!((error.kind(), error.fates()), (&kind, &[fate; 2][..]), "{fault:?}");
        assert!(spy.published().is_empty() && bus.uncached() == 0);
        assert!(live.next().now_or_never().is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_read_ends_at_the_head_it_found() {
    // RP-26: neither a history nor the begin of a replay runs after a head that moves at each of its reads.
    #[derive(Debug)]
    struct Racing(InMemoryServerCache);
    #[async_trait::async_trait]
    impl ServerCache for Racing {
        async fn get(&self, key: &str) -> Result<Option<bytes::Bytes>> {
            self.0.get(key).await
        }
        async fn set(&self, key: &str, value: bytes::Bytes, ttl: Option<Duration>) -> Result<()> {
            self.0.set(key, value, ttl).await
        }
        async fn delete(&self, key: &str) -> Result<bool> {
            self.0.delete(key).await
        }
        async fn increment(&self, key: &str, by: i64, ttl: Option<Duration>) -> Result<i64> {
            self.0.increment(key, by, ttl).await
        }
        async fn push(&self, key: &str, value: bytes::Bytes, ttl: Option<Duration>) -> Result<u64> {
            self.0.push(key, value, ttl).await
        }
        async fn range(&self, key: &str, from: u64, limit: usize) -> Result<Vec<bytes::Bytes>> {
            self.0.range(key, from, limit).await
        }
        async fn append(&self, topic: &pubsub_core::Topic, events: &[Arc<Event>]) -> Result<Vec<Arc<Event>>> {
            self.0.append(topic, events).await
        }
        async fn read(&self, topic: &pubsub_core::Topic, from: u64, limit: usize) -> Result<pubsub_cache::LogPage> {
            self.0.append(topic, &events(0..300)).await?;
            self.0.read(topic, from, limit).await
        }
        async fn clear(&self, topic: &pubsub_core::Topic) -> Result<()> {
            self.0.clear(topic).await
        }
        async fn trim(&self, topic: &pubsub_core::Topic, filter: &TrimFilter) -> Result<u64> {
            self.0.trim(topic, filter).await
        }
        fn deduplication(&self) -> pubsub_core::Deduplication {
            self.0.deduplication()
        }
    }
    let bus = CachingPubSub::new(Arc::new(EventEmitterPubSub::new()), Arc::new(Racing(InMemoryServerCache::new())));
    let page = within("history", bus.history(&topic("t"), Start::Earliest, 100)).await.unwrap();
    assert_eq!(page.entries.len(), 100);
    let mut replay = from(&bus, "t", Start::Earliest).await;
    let head = page.head.unwrap().position().major;
    let mut seen = 0;
    while let Ok(Some(delivery)) = tokio::time::timeout(Duration::from_secs(1), replay.next()).await {
        assert_eq!(delivery.unwrap().event().index().unwrap().index, seen);
        seen += 1;
        assert!(seen < 10_000, "a replay that runs after the head");
    }
    assert!(seen > head, "{seen} replayed of {head}");
}

#[tokio::test]
async fn what_live_events_leave_out_is_read_from_the_log_in_order() {
    // RP-27
    let World { bus, spy, store } = made(|_| (), OnStoreFailure::Fail, true);
    let mut auto = from(&bus, "t", Start::Latest).await;
    let mut held = subscribe(&bus, "t", manual(Start::Latest)).await.unwrap();
    let kept = store.inner.append(&topic("t"), &events(0..4)).await.unwrap();
    for place in [1, 0, 3] {
        publish(&*spy, &topic("t"), &kept[place..=place]).await;
    }
    assert_eq!(ids(&take(&mut auto, 4).await), ids(&kept));
    assert_eq!(ids(&take(&mut held, 4).await), ids(&kept));
    assert!(auto.next().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_damaged_entry_is_an_error_of_its_kind() {
    // RP-31
    for mode in [OnStoreFailure::Continue, OnStoreFailure::Fail] {
        let World { bus, spy, store } = made(|_| (), mode, true);
        let mut watch = from(&bus, "t", Start::Latest).await;
        publish(&bus, &topic("t"), &events(0..1)).await;
        take(&mut watch, 1).await;
        store.damaged.store(true, Ordering::SeqCst);
        let is_decode = |kind: &ErrorKind| matches!(kind, ErrorKind::Decode(_));
        assert!(is_decode(bus.history(&topic("t"), Start::Earliest, 9).await.unwrap_err().kind()));
        let refused = subscribe(&bus, "t", SubscribeOptions::fan_out().start(Start::Earliest)).await;
        assert!(is_decode(refused.unwrap_err().kind()));
        // A watch with a gap before it.
        let kept = store.inner.append(&topic("t"), &events(1..4)).await.unwrap();
        publish(&*spy, &topic("t"), &kept[2..]).await;
        match mode {
            OnStoreFailure::Continue => {
                let delivery = next(&mut watch).await;
                assert_eq!((delivery.event().id(), delivery.lagged()), (kept[2].id(), 2));
                assert_eq!(watch.status().lagged, 2);
            }
            OnStoreFailure::Fail => {
                let error = within("the error", watch.next()).await.unwrap().unwrap_err();
                assert!(is_decode(error.kind()) && watch.next().await.is_none());
                assert!(watch.status().ended);
                // It is no burden for publishers although it is still there.
                assert_eq!(spy.fan_out(&topic("t")).await, 0);
            }
        }
    }
}

// Options, forwarding.

#[tokio::test]
async fn an_unset_start_stays_unset_and_others_pass_as_they_are() {
    // SP-10
    let World { bus, spy, .. } = world();
    publish(&bus, &topic("t"), &events(0..3)).await;
    let group = || SubscribeOptions::group(Group::new("g").unwrap());
    let plain = SubscribeOptions::fan_out;
    let (earliest, latest) = (Some(Start::Earliest), Some(Start::Latest));
    let cases = [
        (plain(), None),
        (plain().start(Start::Latest), latest.clone()),
        (plain().start(Start::Earliest), None), // the log has it
        (plain().start(Start::Index(1)), None),
        (group(), None),
        (group().start(Start::Latest), latest),
        (group().start(Start::Earliest), earliest),
    ];
    for (options, below) in cases {
        drop(subscribe(&bus, "t", options).await);
        assert_eq!(spy.subscribed.lock().pop().unwrap().start, below);
    }
    let all = group().prefetch(7).max_in_flight(3).on_gap(OnGap::Earliest).overflow(Overflow::DropOldest);
    let all = all.dead_letter(topic("dead")).max_hold(SOON).ack_mode(AckMode::Manual);
    drop(subscribe(&bus, "t", all.clone()).await.unwrap());
    assert_eq!(format!("{:?}", spy.subscribed.lock().pop().unwrap()), format!("{all:?}"));
    bus.publish(&topic("t"), &events(0..1), PublishOptions::new().timeout(SOON)).await.unwrap();
    assert_eq!(spy.published.lock().last().unwrap().1.timeout, Some(SOON));
}

#[tokio::test]
async fn flush_close_clear_and_trim_reach_the_bus_below_once() {
    // CL-13, CT-05
    let World { bus, spy, store } = world();
    let mut watch = from(&bus, "t", Start::Earliest).await;
    publish(&bus, &topic("t"), &events(0..2)).await;
    bus.flush().await.unwrap();
    assert_eq!(bus.trim_topic(&topic("t"), TrimFilter::run("other")).await.unwrap(), 0);
    bus.clear_topic(&topic("t")).await.unwrap();
    assert!(store.kept(&topic("t")).await.is_empty());
    assert_eq!(rest(&bus, "t", &mut watch).await.len(), 2, "those who watch live on");
    let count = |of: &std::sync::atomic::AtomicUsize| of.load(Ordering::SeqCst);
    assert_eq!((count(&spy.flushed), count(&spy.trimmed), count(&spy.cleared)), (1, 1, 1));
    let (first, second) = futures::join!(bus.close(SOON), bus.close(SOON));
    assert_eq!((first.unwrap(), second.unwrap()), (Closed::default(), Closed::default()));
    assert_eq!(within("close", bus.close(SOON)).await.unwrap(), Closed::default());
    assert_eq!(count(&spy.closed), 1);
    assert!(within("the end", watch.next()).await.is_none());
    for refused in [
        bus.publish(&topic("t"), &events(0..1), PublishOptions::new()).await.unwrap_err().kind(),
        bus.publish(&topic("t"), &events(0..1), PublishOptions::local_only()).await.unwrap_err().kind(),
        bus.subscribe(&topic("t"), SubscribeOptions::fan_out()).await.unwrap_err().kind(),
        bus.history(&topic("t"), Start::Earliest, 1).await.unwrap_err().kind(),
        bus.clear_topic(&topic("t")).await.unwrap_err().kind(),
        bus.inspect(&topic("t")).await.unwrap_err().kind(),
    ] {
        assert_eq!(*refused, ErrorKind::Closed);
    }
    bus.flush().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn both_are_cleared_even_if_one_fails() {
    // CT-05
    let World { bus, spy, store } = world();
    publish(&bus, &topic("t"), &events(0..2)).await;
    store.schedule.next(1, Fault::Hang);
    let error = within("clear", bus.clear_topic(&topic("t"))).await.unwrap_err();
    assert_eq!((error.kind(), error.operation()), (&ErrorKind::Timeout, Some("clear_topic")));
    assert_eq!(spy.cleared.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn leases_are_those_of_the_bus_below_or_none() {
    // LE-17
    let World { bus, .. } = world();
    assert!(bus.leases().is_some());
    let spy = Spy::over(EventEmitterPubSub::new());
    spy.without_leases.store(true, Ordering::SeqCst);
    let bus = CachingPubSub::new(spy, Arc::new(InMemoryServerCache::new()));
    assert!(bus.leases().is_none() && bus.capabilities().leases.is_none());
}

#[test]
fn no_method_is_forgotten() {
    // `publish_now` is the one with a default: a decorator without the guard would lose it without a word.
    assert!(
        include_str!("../src/caching.rs").contains("#[deny(clippy::missing_trait_methods)]\nimpl PubSub for CachingPubSub")
    );
}

// Instances.

#[tokio::test]
async fn publishers_and_listeners_may_be_in_different_instances() {
    let (first, second) = {
        let emitter = EventEmitterPubSub::new();
        (Spy::over(emitter.connect()), Spy::over(emitter))
    };
    let store = Arc::new(InMemoryServerCache::new());
    let publisher = CachingPubSub::new(first, store.clone());
    let listener = CachingPubSub::new(second, store.clone());
    let mut live = from(&listener, "t", Start::Latest).await;
    let sent = events(0..6);
    let positions = publish(&publisher, &topic("t"), &sent[..3]).await;
    let mut replay = from(&listener, "t", Start::Earliest).await;
    let mut resumed = from(&listener, "t", Start::After(positions.get(1).unwrap().clone())).await;
    publish(&publisher, &topic("t"), &sent[3..]).await;
    assert_eq!(ids(&take(&mut live, 6).await), ids(&sent));
    assert_eq!(ids(&take(&mut replay, 6).await), ids(&sent));
    assert_eq!(ids(&take(&mut resumed, 4).await), ids(&sent[2..]));
    // Both count on in one log, and a clear by one is one for the other.
    assert_eq!(
        indices(&{
            publish(&listener, &topic("t"), &events(6..7)).await;
            take(&mut live, 1).await
        }),
        [Some(6)]
    );
    listener.clear_topic(&topic("t")).await.unwrap();
    publish(&publisher, &topic("t"), &events(7..8)).await;
    assert_eq!(indices(&take(&mut resumed, 2).await), [Some(6), Some(0)]);
    // Closing one leaves the other.
    within("close", publisher.close(SOON)).await.unwrap();
    publish(&listener, &topic("t"), &events(8..9)).await;
    assert_eq!(indices(&take(&mut resumed, 1).await), [Some(1)]);
}

#[tokio::test]
async fn numbers_of_another_store_pass_live() {
    let emitter = EventEmitterPubSub::new();
    let instance = || CachingPubSub::new(Arc::new(emitter.connect()), Arc::new(InMemoryServerCache::new()));
    let (ours, theirs) = (instance(), instance());
    publish(&theirs, &topic("t"), &events(0..5)).await;
    publish(&ours, &topic("t"), &events(5..7)).await;
    let mut watch = from(&ours, "t", Start::Earliest).await;
    take(&mut watch, 2).await;
    let sent = events(7..11);
    for (number, event) in sent.iter().enumerate() {
        publish([&ours, &theirs][number % 2], &topic("t"), std::slice::from_ref(event)).await;
    }
    let mut seen = Vec::new();
    for _ in 0..4 {
        seen.push(next(&mut watch).await);
    }
    assert_eq!(ids(&events_of(&seen)), ids(&sent));
    // Theirs have no place in our log.
    assert_eq!(seen.iter().map(|one| one.cursor().is_some()).collect::<Vec<_>>(), [true, false, true, false]);
    assert!(seen.iter().all(|one| one.lagged() == 0) && watch.next().now_or_never().is_none());
    // Where our log has nothing, each comes once all the same.
    let mut watch = from(&ours, "u", Start::Latest).await;
    let sent = events(0..6);
    for (number, event) in sent.iter().enumerate() {
        publish([&theirs, &ours][number % 2], &topic("u"), std::slice::from_ref(event)).await;
    }
    assert_eq!(ids(&take(&mut watch, 6).await), ids(&sent));
    assert!(watch.next().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_and_did_not_go_out_is_filled_in() {
    let World { bus, spy, .. } = world();
    let mut live = from(&bus, "t", Start::Latest).await;
    let sent = events(0..4);
    let fail = async |count, of: &[Arc<Event>]| {
        spy.schedule.next(count, Fault::Retryable);
        let error = bus.publish(&topic("t"), of, PublishOptions::new()).await.unwrap_err();
        assert_eq!(error.fates(), vec![Fate::Unknown; of.len()], "it is in the log");
    };
    fail(1, &sent[..2]).await;
    assert!(live.next().now_or_never().is_some(), "with nothing behind it");
    assert_eq!(ids(&take(&mut live, 1).await), ids(&sent[1..2]));
    // Also as the first of a generation.
    bus.clear_topic(&topic("t")).await.unwrap();
    fail(1, &sent[2..3]).await;
    within("drained", async {
        let handle = live.handle();
        let drained = tokio::spawn(async move { handle.drained().await });
        assert_eq!(ids(&take(&mut live, 1).await), ids(&sent[2..3]));
        drop(live.next().now_or_never());
        drained.await.unwrap();
    })
    .await;
    // The repeat is the same event, in the same place, and no second one for who has it.
    publish(&bus, &topic("t"), &sent[2..]).await;
    let seen = take(&mut live, 1).await;
    assert_eq!((ids(&seen), indices(&seen)), (ids(&sent[3..]), vec![Some(1)]));
}

#[tokio::test]
async fn stragglers_of_an_earlier_generation_are_dropped() {
    let World { bus, spy, .. } = world();
    let mut live = from(&bus, "t", Start::Latest).await;
    publish(&bus, &topic("t"), &events(0..2)).await;
    let old = take(&mut live, 2).await.pop().unwrap();
    bus.clear_topic(&topic("t")).await.unwrap();
    publish(&bus, &topic("t"), &events(2..3)).await;
    let place = ReplayIndex { index: 2, ..old.index().unwrap() };
    let straggler = Arc::new(Event::new("straggler").with_index(Some(place)));
    publish(&*spy, &topic("t"), &[straggler]).await;
    publish(&bus, &topic("t"), &events(3..4)).await;
    let seen = take(&mut live, 2).await;
    assert_eq!((indices(&seen), seen[1].event_type()), (vec![Some(0), Some(1)], "3"));
}
