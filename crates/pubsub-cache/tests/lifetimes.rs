//! What comes of futures, subscriptions and buses that end, and of deliveries that are settled by hand.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::world::{SOON, World, from, indices, made, manual, poll_times, rest, subscribe, world};
use common::{Fault, Spy, event, events, ids, next, publish, take, topic, within};
use futures::{FutureExt, StreamExt};
use pubsub_cache::{CachingPubSub, InMemoryServerCache, OnStoreFailure, ServerCache};
use pubsub_core::{Bus, Closed, ErrorKind, Group, Origin, Overflow, PubSub, PublishOptions, Settled, Start, SubscribeOptions};
use pubsub_emitter::EventEmitterPubSub;
use tokio::runtime::Handle;

// Dropped futures.
#[tokio::test(start_paused = true)]
async fn a_publish_that_is_dropped_goes_everywhere_or_nowhere() {
    for now in [true, false] {
        for (store_fault, bus_fault) in [(None, None), (Some(100), None), (None, Some(100)), (Some(100), Some(100))] {
            for times in 0..12 {
                let World { bus, spy, store } = made(|_| (), OnStoreFailure::Continue, now);
                let mut live = from(&bus, "t", Start::Latest).await;
                let mut group = subscribe(&bus, "t", SubscribeOptions::group(Group::new("g").unwrap())).await.unwrap();
                let late = |by: Option<u64>| by.map(|by| Fault::Late(Duration::from_millis(by)));
                let (store_late, bus_late) = (late(store_fault), late(bus_fault));
                store_late.into_iter().for_each(|fault| store.schedule.next(1, fault));
                bus_late.into_iter().for_each(|fault| spy.schedule.next(1, fault));
                let sent = events(0..3);
                {
                    let topic = topic("t");
                    let mut publishing = bus.publish(&topic, &sent, PublishOptions::new());
                    drop(poll_times(&mut publishing, times).await);
                }
                // Whatever goes on goes on by itself; then there is an order.
                tokio::time::sleep(SOON).await;
                let everywhere = spy.published().len();
                let seen = rest(&bus, "t", &mut live).await;
                assert_eq!(store.kept(&topic("t")).await.len(), everywhere + 1, "{now} {times}: kept, with the fence");
                assert!(everywhere == 0 || everywhere == 3);
                assert_eq!(ids(&seen), ids(&sent[..everywhere]));
                for event in &sent[..everywhere] {
                    let delivery = next(&mut group).await;
                    assert_eq!(delivery.event().id(), event.id());
                    delivery.done().await;
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscribe_that_is_dropped_leaves_nothing_attached() {
    for times in 0..12 {
        let World { bus, spy, store } = world();
        publish(&bus, &topic("t"), &events(0..3)).await;
        store.schedule.all(Some(Fault::Late(Duration::from_millis(5))));
        {
            let topic = topic("t");
            let mut subscribing = bus.subscribe(&topic, SubscribeOptions::fan_out().start(Start::Earliest));
            drop(poll_times(&mut subscribing, times).await);
        }
        tokio::time::sleep(SOON).await;
        assert_eq!(spy.fan_out(&topic("t")).await, 0, "dropped after {times} polls");
    }
}

// Close.

#[tokio::test(start_paused = true)]
async fn close_tells_what_it_left_and_ends_everything() {
    let World { bus, spy, .. } = world();
    publish(&bus, &topic("t"), &events(0..10)).await;
    let mut unread = from(&bus, "t", Start::Earliest).await;
    drop(next(&mut unread).await);
    let mut holder = subscribe(&bus, "t", manual(Start::Index(8))).await.unwrap();
    let held = next(&mut holder).await;
    let mut gone = subscribe(&bus, "t", manual(Start::Index(9))).await.unwrap();
    let held_on = next(&mut gone).await;
    drop(gone);
    let before = tokio::time::Instant::now();
    let (first, second) = futures::join!(bus.close(SOON), bus.close(SOON));
    assert!(before.elapsed() <= SOON + Duration::from_secs(1), "{:?}", before.elapsed());
    let mut due = Closed::default();
    (due.released, due.cut_off) = (9 + 1, 2);
    assert_eq!((first.unwrap(), second.unwrap()), (due, due));
    assert!(within("the end", unread.next()).await.is_none() && within("the end", holder.next()).await.is_none());
    within("revoked", held.revoked()).await;
    within("revoked", held_on.revoked()).await;
    assert_eq!((held.done().await, held_on.retry().await), (Settled::TooLate, Settled::TooLate));
    assert!(matches!(spy.inner.status().get(), pubsub_core::Status::Closed));
}

#[tokio::test(start_paused = true)]
async fn close_waits_for_what_is_read_and_settled_and_no_longer() {
    let World { bus, .. } = world();
    publish(&bus, &topic("t"), &events(0..10)).await;
    let mut reader = subscribe(&bus, "t", manual(Start::Earliest)).await.unwrap();
    let before = tokio::time::Instant::now();
    let reading = async {
        let mut count = 0;
        while let Some(delivery) = reader.next().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
            delivery.unwrap().done().await;
            count += 1;
        }
        count
    };
    let (closed, count) = futures::join!(bus.close(SOON), reading);
    assert_eq!((closed.unwrap(), count), (Closed::default(), 10));
    assert!(before.elapsed() < Duration::from_secs(2), "{:?}", before.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_waits_behind_a_gap_when_the_bus_closes_is_counted() {
    let World { bus, spy, store } = made(|_| (), OnStoreFailure::Fail, true);
    let mut watch = from(&bus, "t", Start::Latest).await;
    let kept = store.inner.append(&topic("t"), &events(0..4)).await.unwrap();
    store.schedule.all(Some(Fault::Hang));
    publish(&*spy, &topic("t"), &kept[1..2]).await;
    assert!(watch.next().now_or_never().is_none());
    publish(&*spy, &topic("t"), &kept[2..]).await;
    let (closed, end) = futures::join!(bus.close(SOON), watch.next());
    assert!(end.is_none());
    assert_eq!(closed.unwrap().released, 3);
}

#[tokio::test(start_paused = true)]
async fn a_subscribe_under_way_when_the_bus_closes_is_refused() {
    let World { bus, spy, store } = world();
    store.schedule.all(Some(Fault::Late(Duration::from_millis(100))));
    let closing = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        bus.close(SOON).await
    };
    let topic = topic("t");
    let (subscribed, closed) = futures::join!(bus.subscribe(&topic, SubscribeOptions::fan_out()), closing);
    assert_eq!(subscribed.err().map(|error| error.kind().clone()), Some(ErrorKind::Closed));
    closed.unwrap();
    assert!(spy.inner.inspect(&topic).await.is_err());
}

#[tokio::test]
async fn dropping_everything_leaves_nothing() {
    let spy = Spy::over(EventEmitterPubSub::new());
    let store = Arc::new(InMemoryServerCache::new());
    {
        let bus = CachingPubSub::new(spy.clone(), store.clone());
        let mut replay = subscribe(&bus, "t", manual(Start::Earliest)).await.unwrap();
        publish(&bus, &topic("t"), &events(0..100)).await;
        next(&mut replay).await.retry().await;
        // The subscription goes on without the bus, and ends with itself.
        drop(bus);
        publish(&*spy, &topic("t"), &events(0..1)).await;
        let seen = take(&mut replay, 2).await;
        assert_eq!(indices(&seen[..1]), [Some(1)]);
        assert_eq!(spy.fan_out(&topic("t")).await, 1);
    }
    assert_eq!(spy.fan_out(&topic("t")).await, 0);
    assert_eq!(Arc::strong_count(&store), 1);
    assert_eq!(Arc::strong_count(&spy), 1);
    drop(spy);
    within("the last task", async {
        while Handle::current().metrics().num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

// Settling.

#[tokio::test(start_paused = true)]
async fn replayed_deliveries_are_retried_here_and_given_up_as_elsewhere() {
    let World { bus, spy, store } = world();
    let mut letters = Bus::new(spy.clone()).subscribe("dead").await.unwrap();
    let mut other = from(&bus, "t", Start::Earliest).await;
    let sent = events(0..3);
    publish(&bus, &topic("t"), &sent).await;
    let options = manual(Start::Earliest).dead_letter(topic("dead")).max_in_flight(1);
    let mut replay = subscribe(&bus, "t", options).await.unwrap();
    for attempt in 1..=3 {
        let delivery = next(&mut replay).await;
        assert_eq!((delivery.event().id(), delivery.attempt()), (sent[0].id(), attempt));
        assert_eq!(delivery.event().index().map(|place| place.index), delivery.cursor().map(|at| at.position().major));
        assert!(replay.next().now_or_never().is_none(), "one in flight");
        assert_eq!((replay.status().held, replay.status().ended), (1, false));
        assert_eq!(
            delivery.settle(pubsub_core::Settlement::Retry { after: Some(Duration::ZERO), reason: None }).await,
            Settled::Done
        );
    }
    let letter = next(&mut letters).await;
    let origin = Origin::of(letter.event()).unwrap();
    assert_eq!((origin.event, origin.attempts), (sent[0].id().to_string(), 3));
    let handle = replay.handle();
    let drained = tokio::spawn(async move { handle.drained().await });
    for event in &sent[1..] {
        let delivery = next(&mut replay).await;
        assert_eq!(delivery.event().id(), event.id());
        tokio::time::sleep(SOON).await;
        assert!(!drained.is_finished(), "while one is held");
        delivery.done().await;
    }
    assert!(replay.next().now_or_never().is_none());
    within("drained", drained).await.unwrap();
    assert_eq!(replay.status().dead_lettered, 1);
    assert_eq!(ids(&take(&mut other, 3).await), ids(&sent));
    assert!(other.next().now_or_never().is_none(), "a retry is nobody else's");
    assert_eq!(store.kept(&topic("t")).await.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn draining_waits_for_the_rest_of_a_replay() {
    let World { bus, .. } = world();
    publish(&bus, &topic("t"), &events(0..1000)).await;
    for options in [SubscribeOptions::fan_out().start(Start::Earliest), manual(Start::Earliest)] {
        let mut replay = subscribe(&bus, "t", options).await.unwrap();
        let handle = replay.handle();
        let drained = tokio::spawn(async move { handle.drained().await });
        for _ in 0..1000 {
            tokio::task::yield_now().await;
            assert!(!drained.is_finished(), "with a part of the log unread");
            next(&mut replay).await.done().await;
        }
        assert!(replay.next().now_or_never().is_none());
        within("drained", drained).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_gap_that_closes_by_itself_leaves_no_read_behind() {
    let World { bus, spy, store } = world();
    let mut watch = from(&bus, "t", Start::Latest).await;
    let kept = store.inner.append(&topic("t"), &events(0..5)).await.unwrap();
    store.schedule.next(1, Fault::Hang);
    publish(&*spy, &topic("t"), &kept[1..2]).await;
    assert!(watch.next().now_or_never().is_none(), "the read hangs");
    publish(&*spy, &topic("t"), &kept[..1]).await;
    assert_eq!(ids(&take(&mut watch, 2).await), ids(&kept[..2]));
    assert!(watch.next().now_or_never().is_none());
    within("drained", watch.handle().drained()).await;
    tokio::time::sleep(SOON).await;
    // A gap much later has a read of its own.
    publish(&*spy, &topic("t"), &kept[4..]).await;
    let delivery = next(&mut watch).await;
    assert_eq!((delivery.event().id(), delivery.lagged()), (kept[2].id(), 0));
}

#[tokio::test(start_paused = true)]
async fn what_a_server_has_counted_out_does_not_stall_the_rest() {
    let World { bus, spy, .. } = world();
    *spy.script.lock() = vec![(event("tired"), 9), (event("fresh"), 1)];
    let mut watch = subscribe(&bus, "t", manual(Start::Latest)).await.unwrap();
    assert_eq!(next(&mut watch).await.event().event_type(), "fresh");
    assert_eq!(watch.status().dropped, 1);
}

// Slow consumers.

#[tokio::test]
async fn a_slow_watch_that_may_lose_the_oldest_loses_nothing_that_is_kept() {
    let World { bus, .. } = world();
    let options = SubscribeOptions::fan_out().overflow(Overflow::DropOldest).prefetch(8);
    let mut auto = subscribe(&bus, "t", options).await.unwrap();
    let mut held = subscribe(&bus, "t", manual(Start::Latest).overflow(Overflow::DropOldest).prefetch(8).max_in_flight(9999))
        .await
        .unwrap();
    let sent = events(0..3000);
    for event in &sent {
        publish(&bus, &topic("t"), std::slice::from_ref(event)).await;
    }
    for watch in [&mut auto, &mut held] {
        let seen = rest(&bus, "t", watch).await;
        let fences = seen.iter().filter(|event| event.event_type() == "fence").count();
        assert_eq!(seen.len() - fences, 3000);
        assert_eq!(ids(&seen[..3000]), ids(&sent));
    }
    assert_eq!((auto.status().lagged, held.status().lagged), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_long_replay_makes_no_publisher_fail() {
    const REPLAYED: usize = 50_000;
    let store = InMemoryServerCache::builder().max_events(2 * REPLAYED).build().unwrap();
    let bus = Bus::from(CachingPubSub::new(Arc::new(EventEmitterPubSub::new()), store));
    let old = events(0..REPLAYED);
    for batch in old.chunks(1000) {
        bus.publish_with("t", batch, PublishOptions::new()).await.unwrap();
    }
    let mut replay = bus.subscribe_with_replay("t").await.unwrap();
    let publisher = tokio::spawn({
        let bus = bus.clone();
        async move {
            for number in 0..2000 {
                bus.publish("t", event(&number.to_string())).await.unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    });
    for index in 0..REPLAYED as u64 + 2000 {
        if index % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let delivery = within("the next", replay.next()).await.unwrap().unwrap();
        assert_eq!((delivery.event().index().unwrap().index, delivery.lagged()), (index, 0));
    }
    publisher.await.unwrap();
}
