//! The queue that backends share: exhaustion, draining, its several ends, and what must not happen under its lock.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::*;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use pubsub_core::machinery::{Aftermath, DeadLetterSink, DeliveryQueue, Entry, Timer};
use pubsub_core::{Event, Filter, Origin, Overflow, Payload, RetryPolicy, Settled, SubscribeOptions, Subscription, Topic};

// Exhaustion.

#[tokio::test(start_paused = true)]
async fn what_is_exhausted_goes_to_the_dead_letter_topic_once() {
    let bench = Bench::new();
    let queue = bench.group();
    let options = member().retry(patient(millis(1)).max_attempts(3)).dead_letter(name("dead"));
    let mut a = join(&queue, HERE, options);
    let original = Arc::new(Event::new("x").with_run_id("r").with_data(9_u32).with_metadata("k", "v"));
    push_entries(&queue, [Entry::new(original.clone())]);
    for attempt in 1..=3 {
        let delivery = next(&mut a).await;
        assert_eq!(delivery.attempt(), attempt);
        drop(delivery.settle(pubsub_core::Settlement::Retry { after: None, reason: Some(format!("no {attempt}").into()) }));
    }
    soon(queue.drained()).await;
    let letters = bench.letters.0.lock();
    let [(topic, letter)] = &letters[..] else { panic!("{letters:?}") };
    let origin = Origin::of(letter).unwrap();
    assert_eq!((topic.as_str(), origin.event, origin.attempts), ("dead", original.id().to_string(), 3));
    assert_eq!((origin.topic.as_str(), origin.group, origin.reason.as_str()), ("t", Some(name("g")), "no 3"));
    assert_eq!((letter.event_type(), letter.run_id(), letter.metadata()["k"].as_str()), ("x", "r", "v"));
    assert_ne!(letter.id(), original.id());
    let status = a.status();
    assert_eq!((status.dead_lettered, status.dropped), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn without_a_dead_letter_topic_what_is_exhausted_is_dropped_and_counted() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand().retry(RetryPolicy::new().max_attempts(1)));
    push(&queue, 0..2);
    drop(ready(&mut subscription).unwrap().retry());
    drop(ready(&mut subscription).unwrap().dead_letter("hopeless"));
    assert!(queue.is_drained());
    let status = subscription.status();
    assert_eq!((status.dead_lettered, status.dropped), (0, 2));
}

#[tokio::test(start_paused = true)]
async fn a_delivery_that_was_counted_elsewhere_is_given_up_by_the_member_about_to_get_it() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut strict = join(&queue, HERE, member().retry(RetryPolicy::new().max_attempts(2)).dead_letter(name("dead")));
    push_entries(&queue, entries([1]).map(|entry| entry.attempt(3)));
    push(&queue, [2]);
    assert_eq!(drain(&mut strict), [2]);
    assert_eq!(Origin::of(&bench.letters.0.lock()[0].1).unwrap().attempts, 2);
}

/// A sink that takes its time, or does not survive.
struct SlowSink {
    takes: Duration,
    panics: bool,
    taken: Arc<AtomicU32>,
}

impl DeadLetterSink for SlowSink {
    fn take(&self, _topic: &Topic, _letter: Event) -> Option<BoxFuture<'static, ()>> {
        let (takes, panics, taken) = (self.takes, self.panics, self.taken.clone());
        Some(Box::pin(async move {
            tokio::time::sleep(takes).await;
            assert!(!panics, "this sink was told to panic");
            taken.fetch_add(1, Ordering::SeqCst);
        }))
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_on_its_way_is_waited_for() {
    for panics in [false, true] {
        let taken = Arc::new(AtomicU32::new(0));
        let sink = Arc::new(SlowSink { takes: millis(100), panics, taken: taken.clone() });
        let queue = DeliveryQueue::fan_out(name("t"), Arc::new(Timer::new().unwrap()), sink);
        let mut subscription = join(&queue, HERE, by_hand().dead_letter(name("dead")));
        push(&queue, [1]);
        let receipt = ready(&mut subscription).unwrap().dead_letter("hopeless");
        assert_eq!(receipt.now(), None);
        assert!(!queue.is_drained());
        soon(queue.drained()).await;
        assert_eq!(taken.load(Ordering::SeqCst), u32::from(!panics));
        assert_eq!(receipt.await, if panics { Settled::Unconfirmed } else { Settled::Done });
    }
}

// Draining.

#[tokio::test(start_paused = true)]
async fn drained_waits_for_what_is_queued_held_and_due() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand().retry(patient(millis(100))));
    assert!(queue.drained().now_or_never().is_some(), "an empty queue is drained");
    push(&queue, [1]);
    let drained = tokio::spawn(async move { queue.drained().await });
    tokio::time::sleep(millis(5)).await;
    assert!(!drained.is_finished(), "queued");
    let delivery = ready(&mut subscription).unwrap();
    tokio::time::sleep(millis(5)).await;
    assert!(!drained.is_finished(), "held");
    drop(delivery.retry());
    tokio::time::sleep(millis(50)).await;
    assert!(!drained.is_finished(), "due");
    tokio::time::sleep(millis(60)).await;
    assert!(!drained.is_finished(), "back");
    drop(ready(&mut subscription).unwrap().done());
    soon(drained).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn drained_counts_what_the_source_took_ahead() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(SubscribeOptions::fan_out());
    push(&queue, 0..20);
    let drained = tokio::spawn({
        let queue = queue.clone();
        async move { queue.drained().await }
    });
    for left in (0..20).rev() {
        tokio::time::sleep(millis(1)).await;
        assert!(!drained.is_finished() && !queue.is_drained());
        drop(ready(&mut subscription).unwrap());
        assert_eq!((subscription.status().queued, queue.status().waiting), (left, left));
    }
    soon(drained).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stopped_subscription_is_drained_once_nothing_is_held() {
    let bench = Bench::new();
    for take_ahead in [0, 1] {
        let (queue, mut subscription) = bench.fan_out(SubscribeOptions::fan_out());
        push(&queue, 0..20);
        for _ in 0..take_ahead {
            assert!(ready(&mut subscription).is_some()); // leaves the rest with the source
        }
        let waiting = tokio::spawn({
            let handle = subscription.handle();
            async move { handle.drained().await }
        });
        tokio::time::sleep(millis(1)).await;
        subscription.handle().stop();
        soon(waiting).await.unwrap();
        assert!(queue.is_drained());
        assert_eq!(subscription.status().queued, 0);
        assert!(has_ended(&mut subscription), "and nothing more is handed over");
    }
}

// Ends.

#[tokio::test(start_paused = true)]
async fn ending_ends_every_stream_and_says_what_it_dropped() {
    let bench = Bench::new();
    let queue = bench.group();
    let (mut a, mut b) = (join(&queue, HERE, member()), join(&queue, THERE, member()));
    push(&queue, 0..5);
    let (held, late) = (ready(&mut a).unwrap(), ready(&mut a).unwrap());
    drop(ready(&mut b).unwrap().retry());
    let waiting = tokio::spawn({
        let queue = queue.clone();
        async move { queue.drained().await }
    });
    tokio::time::sleep(millis(1)).await;
    assert_eq!(queue.end(), 3, "two queued, one due");
    assert!(has_ended(&mut a) && has_ended(&mut b) && queue.is_ended());
    assert_eq!(held.done().await, Settled::Done, "a late done counts");
    assert_eq!(late.retry().await, Settled::TooLate, "nobody is left for it");
    soon(waiting).await.unwrap();
    push(&queue, [9]);
    assert_eq!(queue.status().waiting, 0);
    assert!(queue.join(HERE, member(), || ()).is_none());
    assert_eq!(queue.end(), 0);
}

#[tokio::test(start_paused = true)]
async fn ending_takes_back_what_a_source_took_ahead() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(SubscribeOptions::fan_out());
    push(&queue, 0..20);
    assert_eq!(number(&ready(&mut subscription).unwrap()), 0);
    let waiting = tokio::spawn({
        let queue = queue.clone();
        async move { queue.drained().await }
    });
    tokio::time::sleep(millis(1)).await;
    assert_eq!(queue.end(), 19);
    assert!(has_ended(&mut subscription));
    soon(waiting).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn dropping_a_member_leaves_its_work_to_the_rest() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut leaving = join(&queue, HERE, member().retry(patient(millis(10))));
    let mut staying = join(&queue, HERE, member().retry(patient(millis(10))));
    push(&queue, 0..3);
    let held = ready(&mut leaving).unwrap();
    drop(leaving);
    drop(held); // dropped unsettled
    assert_eq!(drain(&mut staying), [1, 2]);
    let back = next(&mut staying).await;
    assert_eq!((number(&back), back.attempt()), (0, 2));
    drop(back.done());
    let handle = staying.handle();
    drop(staying);
    assert!(queue.is_ended() && handle.status().ended, "with its last member");
}

#[tokio::test(start_paused = true)]
async fn a_durable_group_keeps_its_place_without_members() {
    let bench = Bench::new();
    let queue = bench.durable_group(5);
    push(&queue, 0..3);
    let mut first = join(&queue, HERE, member().retry(patient(millis(10))));
    drop(ready(&mut first).unwrap().done());
    let held = ready(&mut first).unwrap();
    drop(first);
    assert!(!queue.is_ended());
    drop(held);
    tokio::time::sleep(millis(20)).await;
    push(&queue, 3..5);
    let mut second = join(&queue, THERE, member());
    assert_eq!(drain(&mut second), [1, 2, 3, 4]);
    drop(second);
    assert_eq!(queue.room(), usize::MAX, "it makes nobody wait");
    push(&queue, 5..12);
    let mut third = join(&queue, HERE, member());
    let delivery = ready(&mut third).unwrap();
    assert_eq!((number(&delivery), delivery.lagged()), (7, 2), "and holds five");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_membership_is_told_once_however_it_came() {
    let bench = Bench::new();
    let ways: [fn(&DeliveryQueue, Subscription); 4] = [
        |_, subscription| drop(subscription),
        |_, subscription| {
            subscription.handle().stop();
            subscription.handle().stop();
        },
        |queue, subscription| {
            queue.end();
            drop(subscription);
        },
        |_, subscription| assert!(subscription.unsubscribe().now_or_never().is_some()),
    ];
    for end in ways {
        let ended = Arc::new(AtomicU32::new(0));
        let queue = bench.group();
        let count = ended.clone();
        let on_end = move || _ = count.fetch_add(1, Ordering::SeqCst);
        let subscription = queue.join(HERE, member(), on_end).unwrap();
        end(&queue, subscription);
        assert_eq!(ended.load(Ordering::SeqCst), 1);
        assert_eq!(queue.status().members, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn forgetting_spares_what_is_held() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand().prefetch(1).retry(patient(millis(100))));
    push(&queue, [0]);
    drop(ready(&mut subscription).unwrap().retry());
    push(&queue, [1]);
    let held = ready(&mut subscription).unwrap();
    push(&queue, [2]);
    assert_eq!(queue.retain(|event| *event.data::<u32>().unwrap() == 9), 2, "one queued, one due");
    assert_eq!(held.release().await, Settled::Done);
    assert_eq!(drain(&mut subscription), [1]);
    assert!(queue.is_drained());
}

// Local events.

#[tokio::test(start_paused = true)]
async fn local_events_stay_with_the_members_of_their_instance() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut there = join(&queue, THERE, member().retry(patient(millis(1))));
    push_entries(&queue, local(0..2, HERE));
    assert_eq!(queue.status().waiting, 0, "nobody is here");
    let mut here = join(&queue, HERE, member().retry(patient(millis(1))));
    push_entries(&queue, local(2..5, HERE));
    push(&queue, [5]);
    assert_eq!(drain(&mut there), [5]);
    drop(ready(&mut here).unwrap().retry());
    drop(ready(&mut here).unwrap().release());
    tokio::time::sleep(millis(10)).await;
    assert!(ready(&mut there).is_none(), "neither a retry nor a release crosses over");
    let mut rest = drain(&mut here);
    rest.sort_unstable();
    assert_eq!(rest, [2, 3, 4]);
    push_entries(&queue, local([6], HERE));
    drop(here);
    assert_eq!(queue.status().waiting, 0, "gone with the last member here");
    assert!(ready(&mut there).is_none());
}

#[tokio::test(start_paused = true)]
async fn local_events_count_towards_the_bound() {
    let bench = Bench::new();
    let queue = bench.group();
    let _here = join(&queue, HERE, member().prefetch(3));
    push_entries(&queue, local(0..2, HERE));
    assert_eq!(queue.room(), 1);
}

// What is not the queue's own code.

/// Says something to the queue whenever a copy of the event goes for good.
struct Chatty(Arc<Mutex<Option<Arc<DeliveryQueue>>>>, Arc<AtomicU32>);

impl Drop for Chatty {
    fn drop(&mut self) {
        if let Some(queue) = &*self.0.lock() {
            assert!(queue.status().members <= 1);
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// An event's data may run any code when it is dropped, so the last reference must not go under the queue's lock.
#[tokio::test(start_paused = true)]
async fn payloads_are_dropped_without_the_queues_lock() {
    type Way = fn(&DeliveryQueue, Subscription);
    let ways: [(&str, Way); 8] = [
        ("done", |_, mut subscription| drop(ready(&mut subscription).unwrap().done())),
        ("given up", |_, mut subscription| drop(ready(&mut subscription).unwrap().dead_letter("x"))),
        ("overflow", |queue, _subscription| push(queue, 0..1000)),
        ("ended", |queue, _subscription| _ = queue.end()),
        ("left", |_, subscription| drop(subscription)),
        ("forgotten", |queue, _subscription| _ = queue.retain(|_| false)),
        ("retried after the end", |queue, mut subscription| {
            let delivery = ready(&mut subscription).unwrap();
            queue.end();
            drop(delivery.retry());
        }),
        ("local", |queue, subscription| {
            let event = queue_event_of(queue, &subscription);
            push_entries(queue, [Entry::new(event).only(HERE)]);
            drop(subscription);
        }),
    ];
    /// Takes the chatty event out of the queue, so that it can be pushed again as a local one.
    fn queue_event_of(queue: &DeliveryQueue, _subscription: &Subscription) -> Arc<Event> {
        let found = Mutex::new(None);
        queue.retain(|event| {
            found.lock().get_or_insert_with(|| Arc::new(event.clone()));
            false
        });
        found.into_inner().expect("one event waits")
    }
    for (way, act) in ways {
        let runtime = tokio::runtime::Handle::current();
        let (done, is_done) = std::sync::mpsc::channel();
        // A thread of its own: what this test looks for is a deadlock.
        std::thread::spawn(move || {
            let _entered = runtime.enter();
            let bench = Bench::new();
            let queue = bench.group();
            let subscription = join(&queue, HERE, member().overflow(Overflow::DropOldest));
            let (told, count) = (Arc::new(Mutex::new(Some(queue.clone()))), Arc::new(AtomicU32::new(0)));
            let event = Event::new("live").with_payload(Payload::live(Arc::new(Chatty(told, count.clone()))));
            push_entries(&queue, [Entry::new(Arc::new(event))]);
            act(&queue, subscription);
            let _ = done.send(count.load(Ordering::SeqCst));
        });
        let dropped = is_done.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("{way}: it locked up"));
        assert_eq!(dropped, 1, "{way}");
    }
}

/// Judging an event may run its publisher's code: writing its data as JSON is.
#[tokio::test(start_paused = true)]
async fn forgetting_judges_without_the_queues_lock() {
    let (done, is_done) = std::sync::mpsc::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::spawn(move || {
        let _entered = runtime.enter();
        let bench = Bench::new();
        let (queue, _subscription) = bench.fan_out(by_hand());
        push(&queue, 0..4);
        let forgotten = queue.retain(|event| queue.status().waiting == 4 && *event.data::<u32>().unwrap() != 2);
        let _ = done.send((forgotten, queue.status().waiting));
    });
    assert_eq!(is_done.recv_timeout(Duration::from_secs(20)).expect("it locked up"), (1, 3));
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_is_gone_leaves_nothing_with_the_timer() {
    let bench = Bench::new();
    for number in 0..10_000 {
        let (queue, mut subscription) = bench.fan_out(by_hand());
        push(&queue, [number]);
        drop(ready(&mut subscription).unwrap().done());
    }
    // Each of them asked to be called in an hour, and the reference it is called by keeps its memory.
    let told = format!("{:?}", bench.timer);
    let digits: String = told.chars().filter(char::is_ascii_digit).collect();
    assert!(digits.parse::<u32>().unwrap() < 1000, "{told}");
}

/// An executor whose tasks cannot be woken without a panic.
struct Faulty;

impl std::task::Wake for Faulty {
    fn wake(self: Arc<Self>) {
        panic!("told to");
    }
}

#[tokio::test(start_paused = true)]
async fn a_waker_that_panics_harms_only_its_own_task() {
    let bench = Bench::new();
    let faulty = std::task::Waker::from(Arc::new(Faulty));
    let mut faulty = std::task::Context::from_waker(&faulty);
    let asks = |subscription: &mut Subscription, cx: &mut std::task::Context<'_>| {
        assert!(subscription.poll_next_unpin(cx).is_pending());
    };

    // Woken by a publisher, which has others to wake as well.
    let (bad, mut bad_member) = bench.fan_out(SubscribeOptions::fan_out());
    let (good, mut good_member) = bench.fan_out(SubscribeOptions::fan_out());
    asks(&mut bad_member, &mut faulty);
    let waiting = tokio::spawn(async move { number(&next(&mut good_member).await) });
    tokio::time::sleep(millis(1)).await;
    let mut aftermath = Aftermath::new();
    bad.push(entries([1]), &mut aftermath);
    good.push(entries([1]), &mut aftermath);
    aftermath.finish();
    assert_eq!(soon(waiting).await.unwrap(), 1);
    assert_eq!(number(&ready(&mut bad_member).unwrap()), 1);

    // Woken by the timer, which has others to call.
    let (_bad, mut bad_member) = bench.fan_out(by_hand().retry(patient(millis(10))));
    let (good, mut good_member) = bench.fan_out(by_hand().retry(patient(millis(10))));
    for (queue, member) in [(&_bad, &mut bad_member), (&good, &mut good_member)] {
        push(queue, [2]);
        drop(ready(member).unwrap().retry());
    }
    asks(&mut bad_member, &mut faulty);
    assert_eq!(next(&mut good_member).await.attempt(), 2);
    drop(ready(&mut bad_member).unwrap().retry());
    tokio::time::sleep(millis(100)).await;
    assert_eq!(ready(&mut bad_member).expect("the timer goes on").attempt(), 3);
}

/// A sink that does not survive.
struct Broken;

impl DeadLetterSink for Broken {
    fn take(&self, _topic: &Topic, _letter: Event) -> Option<BoxFuture<'static, ()>> {
        panic!("told to");
    }
}

#[tokio::test(start_paused = true)]
async fn a_sink_that_panics_leaves_nothing_to_wait_for() {
    let bench = Bench::new();
    let queue = DeliveryQueue::group(name("t"), name("g"), bench.timer.clone(), Arc::new(Broken));
    let mut worker = join(&queue, HERE, member().dead_letter(name("dead")));
    push(&queue, 0..2);
    for _ in 0..2 {
        drop(ready(&mut worker).unwrap().dead_letter("hopeless"));
    }
    soon(queue.drained()).await;
}

#[tokio::test(start_paused = true)]
async fn what_the_next_member_gives_up_is_not_waited_for() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut lenient = join(&queue, HERE, member().retry(patient(millis(1))));
    let mut strict = join(&queue, HERE, member().retry(RetryPolicy::new().max_attempts(1)));
    push(&queue, [1]);
    drop(ready(&mut lenient).unwrap().retry_after(Duration::ZERO));
    let drained = tokio::spawn({
        let queue = queue.clone();
        async move { queue.drained().await }
    });
    tokio::time::sleep(millis(1)).await;
    assert!(!drained.is_finished());
    // The attempt is one too many for this member, and there is no dead-letter topic.
    assert!(ready(&mut strict).is_none() && queue.is_drained());
    tokio::time::timeout(millis(10), drained).await.expect("told at once, not when some deadline comes").unwrap();
}

/// What an application's own types may be within a closure or a task: something that looks at the queue when it goes.
struct Looks(Arc<DeliveryQueue>, Arc<AtomicU32>);

impl Drop for Looks {
    fn drop(&mut self) {
        self.0.status();
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

impl std::task::Wake for Looks {
    fn wake(self: Arc<Self>) {}
}

/// What a filter closes over goes with the last that refers to the subscription's options; what a task owns goes with its last waker.
#[tokio::test(start_paused = true)]
async fn filters_and_wakers_are_dropped_without_the_queues_lock() {
    type Way = fn(&Arc<DeliveryQueue>, Subscription, std::task::Waker);
    let ways: [(&str, Way); 5] = [
        ("settled after it left", |queue, mut subscription, _| {
            push(queue, [1]);
            let delivery = ready(&mut subscription).unwrap();
            drop(subscription);
            drop(delivery.done());
        }),
        ("taken back after it left", |queue, mut subscription, _| {
            push(queue, [1]);
            let delivery = ready(&mut subscription).unwrap();
            drop(subscription);
            queue.revoke(HERE);
            drop(delivery.done());
        }),
        ("asked anew by another task", |_, mut subscription, waker| {
            assert!(subscription.poll_next_unpin(&mut std::task::Context::from_waker(&waker)).is_pending());
            drop(waker);
            assert!(ready(&mut subscription).is_none());
        }),
        ("found by another task", |queue, mut subscription, waker| {
            let mut first = join(queue, HERE, member());
            assert!(ready(&mut first).is_none());
            assert!(subscription.poll_next_unpin(&mut std::task::Context::from_waker(&waker)).is_pending());
            drop(waker);
            push(queue, [1]); // wakes the one that waits longest
            drop(ready(&mut subscription).unwrap().done());
        }),
        ("settled under a watch", |queue, mut subscription, waker| {
            push(queue, [1]);
            let delivery = ready(&mut subscription).unwrap();
            {
                let mut revoked = Box::pin(delivery.revoked());
                assert!(revoked.poll_unpin(&mut std::task::Context::from_waker(&waker)).is_pending());
                drop(waker);
            }
            drop(delivery.done());
        }),
    ];
    for (way, act) in ways {
        let runtime = tokio::runtime::Handle::current();
        let (done, is_done) = std::sync::mpsc::channel();
        // A thread of its own: what this test looks for is a deadlock.
        std::thread::spawn(move || {
            let _entered = runtime.enter();
            let queue = Bench::new().group();
            let count = Arc::new(AtomicU32::new(0));
            let looks = || Looks(queue.clone(), count.clone());
            let closed_over = looks();
            let filter = Filter::predicate(move |_| closed_over.0.group_name().is_some());
            let subscription = join(&queue, HERE, member().filter(filter));
            act(&queue, subscription, Arc::new(looks()).into());
            let _ = done.send(count.load(Ordering::SeqCst));
        });
        let dropped = is_done.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("{way}: it locked up"));
        assert_eq!(dropped, 2, "{way}");
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_stops_a_subscription_second_goes_on_no_sooner_than_it_has_ended() {
    let bench = Bench::new();
    let (queue, subscription) = bench.fan_out(SubscribeOptions::fan_out());
    let (told, stopped) = std::sync::mpsc::channel();
    let stop = || {
        let (handle, told) = (subscription.handle(), told.clone());
        std::thread::spawn(move || {
            handle.stop();
            let _ = told.send(());
        })
    };
    let mut stopping = Vec::new();
    // Pushing keeps the queue busy: neither can have ended anything meanwhile.
    let slow = std::iter::once_with(|| {
        for _ in 0..2 {
            stopping.push(stop());
            assert!(
                stopped.recv_timeout(millis(50)).is_err(),
                "number {} was told that nothing comes any more",
                stopping.len()
            );
        }
        Entry::new(event(1))
    });
    push_entries(&queue, slow);
    stopping.into_iter().for_each(|stop| stop.join().unwrap());
    assert!(queue.is_ended());
}

#[tokio::test(start_paused = true)]
async fn an_instance_is_relieved_of_what_waits_by_a_member_of_another() {
    let bench = Bench::new();
    let queue = bench.group();
    let _here = join(&queue, HERE, member());
    push(&queue, [1]);
    let mut relieved = Box::pin(queue.relieved(HERE));
    assert!(relieved.as_mut().now_or_never().is_none());
    let _there = join(&queue, THERE, member());
    tokio::time::timeout(millis(10), relieved).await.expect("told at once");
}
