//! The queue that backends share: handing over, bounds, assignment, settlement, hold limits, and all of it under load.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use pubsub_core::machinery::DeliveryQueue;
use pubsub_core::{Delivery, Filter, Overflow, RetryPolicy, Settled, SubscribeOptions, Subscription};
use tokio::time::Instant;

// Handing over.

#[tokio::test(start_paused = true)]
async fn hands_over_in_order_at_the_first_attempt() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(SubscribeOptions::fan_out());
    for chunk in [0..3, 3..4, 4..90] {
        push(&queue, chunk);
    }
    for expected in 0..90 {
        let delivery = ready(&mut subscription).expect("all are there");
        assert_eq!((number(&delivery), delivery.attempt(), delivery.is_settled()), (expected, 1, true));
    }
    assert!(ready(&mut subscription).is_none());
    push(&queue, [90]);
    assert_eq!(number(&next(&mut subscription).await), 90);
}

#[tokio::test(start_paused = true)]
async fn a_waiting_member_is_woken() {
    let bench = Bench::new();
    for options in [SubscribeOptions::fan_out(), by_hand()] {
        let (queue, mut subscription) = bench.fan_out(options);
        let waiting = tokio::spawn(async move { number(&next(&mut subscription).await) });
        tokio::time::sleep(millis(1)).await;
        push(&queue, [7]);
        assert_eq!(soon(waiting).await.unwrap(), 7);
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_gives_each_event_to_one_member_and_all_get_some() {
    let bench = Bench::new();
    let queue = bench.group();
    let taken = Arc::new(Mutex::new(Vec::new()));
    let members = (0..4).map(|member_number| {
        let mut member = join(&queue, HERE, member());
        let taken = taken.clone();
        tokio::spawn(async move {
            while let Some(delivery) = member.next().await {
                let delivery = delivery.unwrap();
                taken.lock().push((number(&delivery), member_number));
                tokio::time::sleep(millis(1)).await;
                drop(delivery.done());
            }
        })
    });
    let members: Vec<_> = members.collect();
    for chunk in 0..10 {
        push(&queue, chunk * 20..(chunk + 1) * 20);
        soon(queue.drained()).await;
    }
    queue.end();
    for member in members {
        soon(member).await.unwrap();
    }
    let mut taken = taken.lock().clone();
    for member_number in 0..4 {
        assert!(taken.iter().any(|(_, of)| *of == member_number), "member {member_number} got nothing");
    }
    taken.sort_unstable();
    let numbers: Vec<u32> = taken.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (0..200).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn what_a_server_counted_and_where_it_stands_arrive_with_the_event() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand());
    let scope = Arc::new(pubsub_core::Scope::new("bus", "1").unwrap());
    push_entries(&queue, entries([1]).map(|entry| entry.attempt(3).at(scope.clone(), 9)));
    let delivery = ready(&mut subscription).unwrap();
    assert_eq!((delivery.attempt(), delivery.cursor().unwrap().to_string()), (3, "bus.1.9.0".into()));
}

// Bounds.

#[tokio::test(start_paused = true)]
async fn a_group_has_room_for_prefetch_and_never_more() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut a = join(&queue, HERE, member().prefetch(4));
    assert_eq!(queue.room(), 4);
    push(&queue, 0..3);
    assert_eq!(queue.room(), 1);
    push(&queue, [3]);
    assert_eq!(queue.room(), 0);
    let first = ready(&mut a).unwrap();
    assert_eq!((number(&first), queue.room()), (0, 1), "what is handed over waits no longer");
    drop(first.done());
}

#[tokio::test(start_paused = true)]
async fn a_fan_out_queue_never_has_more_than_prefetch_waiting() {
    for prefetch in [1, 2, 3, 4, 7, 256] {
        let bench = Bench::new();
        let (queue, mut subscription) = bench.fan_out(SubscribeOptions::fan_out().prefetch(prefetch));
        assert!(queue.room() >= 1, "prefetch {prefetch}");
        let (mut sent, mut seen) = (0, 0);
        for _ in 0..3 * prefetch {
            let room = queue.room() as u32;
            push(&queue, sent..sent + room);
            sent += room;
            let queued = subscription.status().queued;
            assert!(queued <= prefetch as u64, "prefetch {prefetch}: {queued} wait");
            assert_eq!(number(&ready(&mut subscription).unwrap()), seen);
            seen += 1;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_publisher_waiting_for_room_is_told_when_there_is_some_and_when_there_will_be_none() {
    let bench = Bench::new();
    let full = || {
        let queue = bench.group();
        let member = join(&queue, HERE, member().prefetch(2));
        push(&queue, 0..2);
        (queue, member)
    };
    let waiting = |queue: &Arc<DeliveryQueue>| {
        let queue = queue.clone();
        tokio::spawn(async move { queue.room_freed().await })
    };

    let (queue, mut member) = full();
    let publisher = waiting(&queue);
    tokio::time::sleep(millis(10)).await;
    assert!(!publisher.is_finished());
    drop(ready(&mut member).unwrap().done());
    soon(publisher).await.expect("handing over frees room");

    let (queue, member) = full();
    let publisher = waiting(&queue);
    tokio::time::sleep(millis(10)).await;
    drop(member);
    soon(publisher).await.expect("the last member left");

    let (queue, _member) = full();
    let publisher = waiting(&queue);
    tokio::time::sleep(millis(10)).await;
    queue.end();
    soon(publisher).await.expect("the queue ended");

    let (queue, _member) = full();
    let publisher = waiting(&queue);
    tokio::time::sleep(millis(10)).await;
    queue.retain(|_| false);
    soon(publisher).await.expect("what waited was forgotten");
}

#[tokio::test(start_paused = true)]
async fn drop_oldest_loses_the_oldest_and_the_next_delivery_says_how_many() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(SubscribeOptions::fan_out().prefetch(8).overflow(Overflow::DropOldest));
    let (mut last, mut seen, mut lost) = (None, 0, 0);
    for round in 0..20_u32 {
        assert_eq!(queue.room(), usize::MAX);
        push(&queue, round * 10..(round + 1) * 10);
        for _ in 0..3 {
            let Some(delivery) = ready(&mut subscription) else { break };
            let (this, gap) = (number(&delivery), delivery.lagged());
            assert_eq!(
                u64::from(this - last.map_or(0, |last| last + 1)),
                gap,
                "what is missing before {this} is what was told"
            );
            (last, seen, lost) = (Some(this), seen + 1, lost + gap);
        }
    }
    while let Some(delivery) = ready(&mut subscription) {
        (last, seen, lost) = (Some(number(&delivery)), seen + 1, lost + delivery.lagged());
    }
    assert_eq!((last, seen + lost), (Some(199), 200));
    assert!(lost > 0);
    assert_eq!(subscription.status().lagged, lost);
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_told_although_the_filter_rejects_what_comes_next() {
    let bench = Bench::new();
    let even = Filter::predicate(|event| *event.data::<u32>().unwrap() % 2 == 0);
    let options = SubscribeOptions::fan_out().prefetch(4).overflow(Overflow::DropOldest).filter(even);
    let (queue, mut subscription) = bench.fan_out(options);
    push(&queue, 0..5);
    let lost = subscription.status().lagged;
    assert_eq!(lost % 2, 1, "so that the next one is odd");
    let delivery = ready(&mut subscription).unwrap();
    assert_eq!((u64::from(number(&delivery)), delivery.lagged()), (lost + 1, lost));
    assert_eq!(ready(&mut subscription).map_or(0, |delivery| delivery.lagged()), 0, "once");
}

#[tokio::test(start_paused = true)]
async fn one_member_that_wants_to_lose_nothing_decides_for_its_group() {
    let bench = Bench::new();
    let queue = bench.group();
    let _lossy = join(&queue, HERE, member().overflow(Overflow::DropOldest));
    assert_eq!(queue.room(), usize::MAX);
    let careful = join(&queue, HERE, member());
    assert_eq!(queue.room(), 256);
    drop(careful);
    assert_eq!(queue.room(), usize::MAX);
}

#[tokio::test(start_paused = true)]
async fn max_in_flight_bounds_what_is_in_a_consumers_hands() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand().max_in_flight(2));
    push(&queue, 0..5);
    let (first, _second) = (ready(&mut subscription).unwrap(), ready(&mut subscription).unwrap());
    assert!(ready(&mut subscription).is_none());
    let waiting = tokio::spawn(async move { number(&next(&mut subscription).await) });
    tokio::time::sleep(millis(10)).await;
    assert!(!waiting.is_finished());
    drop(first.done());
    assert_eq!(soon(waiting).await.unwrap(), 2, "a settlement wakes the member that waits for it");
}

#[tokio::test(start_paused = true)]
async fn a_member_at_its_limit_leaves_the_work_to_the_others() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut a = join(&queue, HERE, member().max_in_flight(1));
    let mut b = join(&queue, HERE, member().max_in_flight(1));
    push(&queue, 0..3);
    let held = ready(&mut a).unwrap();
    assert!(ready(&mut a).is_none());
    let other = next(&mut b).await;
    assert_eq!((number(&held), number(&other)), (0, 1));
    // Both wait now; whoever settles gets the third.
    let both = tokio::spawn(async move {
        futures::future::select(Box::pin(a.next()), Box::pin(b.next())).await.factor_first().0.unwrap().unwrap()
    });
    tokio::time::sleep(millis(1)).await;
    drop(other.done());
    assert_eq!(number(&soon(both).await.unwrap()), 2);
}

#[tokio::test(start_paused = true)]
async fn deliveries_waiting_for_their_back_off_are_bounded_and_hold_new_ones_back() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand().retry(patient(Duration::from_secs(10))));
    let mut failed = 0_u32;
    for round in 0..200 {
        let room = queue.room() as u32;
        push(&queue, round * 1000..round * 1000 + room);
        while let Some(delivery) = ready(&mut subscription) {
            drop(delivery.retry());
            failed += 1;
        }
    }
    let status = subscription.status();
    assert_eq!(status.delayed, u64::from(failed));
    assert!((1000..1500).contains(&failed), "{failed} wait for their back-off");
    assert_eq!(queue.room(), 0, "publishers are held back");
    // They all come back, and then there is room again.
    for _ in 0..failed {
        let delivery = next(&mut subscription).await;
        assert_eq!(delivery.attempt(), 2);
        drop(delivery.done());
    }
    assert_eq!(next(&mut subscription).await.attempt(), 1);
    assert!(queue.room() > 0);
}

// Members that do not ask.

#[tokio::test(start_paused = true)]
async fn a_member_that_was_woken_and_does_not_ask_strands_nothing() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut idle = join(&queue, HERE, member());
    assert!(ready(&mut idle).is_none()); // it parks first, with a waker that nobody hears
    let mut busy = join(&queue, HERE, member());
    let waiting = tokio::spawn(async move { (number(&next(&mut busy).await), number(&next(&mut busy).await)) });
    tokio::time::sleep(millis(1)).await;
    let pushed = Instant::now();
    push(&queue, 0..2);
    assert_eq!(soon(waiting).await.unwrap(), (0, 1));
    assert!(pushed.elapsed() <= millis(10), "after {:?}", pushed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_member_that_was_woken_and_does_not_ask_strands_no_local_event() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut idle = join(&queue, HERE, member());
    assert!(ready(&mut idle).is_none());
    let mut busy = join(&queue, HERE, member());
    let waiting = tokio::spawn(async move { (number(&next(&mut busy).await), number(&next(&mut busy).await)) });
    tokio::time::sleep(millis(1)).await;
    let pushed = Instant::now();
    push_entries(&queue, local(0..2, HERE));
    assert_eq!(soon(waiting).await.unwrap(), (0, 1));
    assert!(pushed.elapsed() <= millis(10), "after {:?}", pushed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_member_that_leaves_while_it_was_woken_strands_nothing() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut leaving = join(&queue, HERE, member());
    assert!(ready(&mut leaving).is_none());
    let mut staying = join(&queue, HERE, member());
    let waiting = tokio::spawn(async move { number(&next(&mut staying).await) });
    tokio::time::sleep(millis(1)).await;
    let pushed = Instant::now();
    push(&queue, [5]);
    drop(leaving);
    assert_eq!(soon(waiting).await.unwrap(), 5);
    assert_eq!(pushed.elapsed(), Duration::ZERO, "without waiting for it to ask");
}

#[tokio::test(start_paused = true)]
async fn a_retry_comes_due_although_only_a_sibling_waits() {
    let bench = Bench::new();
    let queue = bench.group();
    let options = || member().retry(patient(millis(500)));
    let mut failing = join(&queue, HERE, options());
    push(&queue, [1]);
    drop(ready(&mut failing).unwrap().retry());
    let retried = Instant::now();
    let mut sibling = join(&queue, HERE, options());
    let delivery = next(&mut sibling).await;
    assert_eq!((number(&delivery), delivery.attempt()), (1, 2));
    assert!((millis(500)..millis(510)).contains(&retried.elapsed()), "after {:?}", retried.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_retry_comes_due_although_nobody_asks() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand().retry(patient(millis(100))));
    push(&queue, [1]);
    drop(ready(&mut subscription).unwrap()); // dropped unsettled
    assert_eq!((subscription.status().delayed, subscription.status().queued), (1, 0));
    tokio::time::sleep(millis(99)).await;
    assert_eq!((subscription.status().delayed, subscription.status().queued), (1, 0));
    tokio::time::sleep(millis(3)).await;
    assert_eq!((subscription.status().delayed, subscription.status().queued), (0, 1));
    assert_eq!(ready(&mut subscription).unwrap().attempt(), 2);
}

/// A wake that is not answered asks for a deadline of its own; it must not displace those of retries.
#[tokio::test(start_paused = true)]
async fn deadlines_all_come_due_in_whatever_order_they_were_asked_for() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let bench = Bench::new();
        let queue = bench.group();
        let forgets = random.bool(); // else nothing but the retries asks to be called within the hour
        let max_hold = if forgets { millis(random.u64(1..2000)) } else { Duration::from_secs(3600) };
        let mut failing = join(&queue, HERE, member().max_hold(max_hold));
        let mut sibling = join(&queue, HERE, member());
        let count = random.u32(3..12);
        push(&queue, 0..count);
        for _ in 0..count {
            let delivery = ready(&mut failing).unwrap();
            match random.u8(0..8) {
                0 if forgets => std::mem::forget(delivery), // held until `max_hold`
                0..4 => drop(delivery.retry_after(millis(random.u64(10..13)))),
                _ => drop(delivery.retry_after(millis(random.u64(1..1500)))),
            }
        }
        let mut unheard: Vec<Subscription> = (0..random.u32(0..3)).map(|_| join(&queue, HERE, member())).collect();
        assert!(unheard.iter_mut().all(|member| ready(member).is_none()));
        let mut back = Vec::new();
        for _ in 0..count {
            let delivery = tokio::time::timeout(Duration::from_secs(10), sibling.next()).await;
            let delivery = delivery.unwrap_or_else(|_| panic!("seed {seed}: only {back:?} of {count} came back"));
            let delivery = delivery.unwrap().unwrap();
            back.push(number(&delivery));
            drop(delivery.done());
        }
        back.sort_unstable();
        assert_eq!(back, (0..count).collect::<Vec<_>>(), "seed {seed}");
    }
}

// Settlement.

#[tokio::test(start_paused = true)]
async fn attempts_count_up_and_back_off_grows() {
    let bench = Bench::new();
    let policy = RetryPolicy::new().backoff(millis(100), millis(300)).jitter(0.0).max_attempts(0);
    let (queue, mut subscription) = bench.fan_out(by_hand().retry(policy));
    push(&queue, [1]);
    let mut waited = Vec::new();
    for attempt in 1..=4 {
        let asked = Instant::now();
        let delivery = next(&mut subscription).await;
        waited.push(asked.elapsed().as_millis() / 10 * 10);
        assert_eq!(delivery.attempt(), attempt);
        assert_eq!(delivery.retry().await, Settled::Done);
    }
    assert_eq!(waited, [0, 100, 200, 300]);
    let delivery = next(&mut subscription).await;
    drop(delivery.retry_after(millis(1000)));
    let asked = Instant::now();
    assert_eq!(next(&mut subscription).await.attempt(), 6);
    assert!(asked.elapsed() >= millis(1000), "the consumer's own back-off");
}

#[tokio::test(start_paused = true)]
async fn a_release_comes_back_at_once_and_uncounted() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut a = join(&queue, HERE, member().retry(RetryPolicy::new().max_attempts(1)));
    push(&queue, 0..2);
    for _ in 0..20 {
        let delivery = ready(&mut a).unwrap();
        assert_eq!((number(&delivery), delivery.attempt()), (0, 1));
        assert_eq!(delivery.release().now(), Some(Settled::Done));
    }
    assert_eq!(drain(&mut a), [0, 1]);
    assert_eq!(a.status().dropped, 0);
}

#[tokio::test(start_paused = true)]
async fn settling_is_per_delivery_and_a_neighbour_is_not_held_up() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand());
    push(&queue, 0..4);
    let held: Vec<Delivery> = (0..4).map(|_| ready(&mut subscription).unwrap()).collect();
    assert_eq!(subscription.status().held, 4);
    for (place, delivery) in held.into_iter().enumerate() {
        drop(if place == 1 { delivery.retry() } else { delivery.done() });
    }
    let status = subscription.status();
    assert_eq!((status.held, status.delayed, status.queued), (0, 1, 0));
    assert_eq!(number(&next(&mut subscription).await), 1);
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_its_back_off_is_in_nobodys_hands_and_holds_nothing_up() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand().max_in_flight(1).retry(patient(Duration::from_secs(10))));
    push(&queue, 0..4);
    for expected in 0..3 {
        let delivery = ready(&mut subscription).unwrap();
        assert_eq!(number(&delivery), expected);
        drop(delivery.retry());
    }
    assert_eq!(number(&ready(&mut subscription).unwrap()), 3);
}

#[tokio::test(start_paused = true)]
async fn a_delivery_may_be_settled_from_a_thread_without_a_runtime() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(by_hand().retry(patient(millis(50))));
    push(&queue, [1]);
    let delivery = ready(&mut subscription).unwrap();
    let settled = std::thread::spawn(move || delivery.retry().now()).join().unwrap();
    assert_eq!(settled, Some(Settled::Done));
    assert_eq!(next(&mut subscription).await.attempt(), 2);
}

// Hold limits.

#[tokio::test(start_paused = true)]
async fn at_max_hold_another_member_may_have_it_and_the_holder_is_told() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut holder = join(&queue, HERE, member().max_hold(millis(1000)));
    let mut sibling = join(&queue, HERE, member());
    push(&queue, [1]);
    let held = ready(&mut holder).unwrap();
    let start = Instant::now();
    assert!(held.revoked().now_or_never().is_none());
    let (second, ()) = soon(futures::future::join(next(&mut sibling), held.revoked())).await;
    assert!((millis(1000)..millis(1010)).contains(&start.elapsed()));
    assert_eq!((number(&second), second.attempt()), (1, 2));
    assert_eq!(held.extend().await, Settled::TooLate);
    assert_eq!(held.retry().await, Settled::TooLate);
    assert_eq!(second.done().await, Settled::Done);
    assert!(queue.is_drained(), "the late retry changed nothing");
}

#[tokio::test(start_paused = true)]
async fn extending_starts_the_hold_anew() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut holder = join(&queue, HERE, member().max_hold(millis(1000)));
    push(&queue, [1]);
    let held = ready(&mut holder).unwrap();
    for _ in 0..5 {
        tokio::time::sleep(millis(900)).await;
        assert_eq!(held.extend().await, Settled::Done);
    }
    assert!(held.revoked().now_or_never().is_none());
    tokio::time::sleep(millis(1002)).await;
    soon(held.revoked()).await;
    assert_eq!(held.done().await, Settled::TooLate);
}

#[tokio::test(start_paused = true)]
async fn a_hold_that_ends_at_the_last_attempt_exhausts() {
    let bench = Bench::new();
    let options = by_hand().max_hold(millis(100)).retry(RetryPolicy::new().max_attempts(1)).dead_letter(name("dead"));
    let (queue, mut subscription) = bench.fan_out(options);
    push(&queue, [1]);
    let held = ready(&mut subscription).unwrap();
    soon(held.revoked()).await;
    assert_eq!(bench.letters.0.lock().len(), 1);
    assert_eq!(held.done().await, Settled::TooLate);
}

#[tokio::test(start_paused = true)]
async fn revoking_an_instance_gives_what_it_held_to_the_others() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut here = join(&queue, HERE, member());
    let mut there = join(&queue, THERE, member());
    push(&queue, 0..3);
    let held: Vec<Delivery> = (0..2).map(|_| ready(&mut here).unwrap()).collect();
    let kept = ready(&mut there).unwrap();
    assert_eq!((queue.burden(HERE), queue.burden(THERE)), ((2, 0), (1, 0)));
    assert_eq!(queue.revoke(HERE), 2);
    for delivery in held {
        soon(delivery.revoked()).await;
        assert_eq!(delivery.done().await, Settled::TooLate);
    }
    assert!(kept.revoked().now_or_never().is_none());
    drop(here);
    for expected in 0..2 {
        let delivery = ready(&mut there).unwrap();
        assert_eq!((number(&delivery), delivery.attempt()), (expected, 2));
        drop(delivery.done());
    }
}

// All of it at once.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_everything_is_handled_once() {
    const EVENTS: u32 = 5_000;
    let seed = fastrand::u64(..);
    let bench = Bench::new();
    let queue = bench.group();
    let options = || member().prefetch(32).max_in_flight(8).retry(patient(millis(1)));
    let done: Arc<Mutex<Vec<u32>>> = Arc::default();
    let member_task = |index: u64| {
        let (mut member, done) = (join(&queue, index % 2, options()), done.clone());
        tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(seed ^ index);
            let mut kept: Vec<Delivery> = Vec::new();
            loop {
                // Asks and goes away again now and then, and sits on what it holds.
                let asked = tokio::time::timeout(Duration::from_micros(random.u64(1..2000)), member.next()).await;
                match asked {
                    Ok(None) => break,
                    Ok(Some(delivery)) => kept.push(delivery.unwrap()),
                    Err(_) => {}
                }
                while kept.len() > 6 || (!kept.is_empty() && random.u8(..) < 200) {
                    let delivery = kept.swap_remove(random.usize(..kept.len()));
                    match random.u8(0..20) {
                        0 => drop(delivery.retry()),
                        1 => drop(delivery.release()),
                        2 => drop(delivery),
                        3 => drop(delivery.retry_after(Duration::ZERO)),
                        _ => {
                            done.lock().push(number(&delivery));
                            drop(delivery.done());
                        }
                    }
                }
            }
        })
    };
    let members: Vec<_> = (0..4).map(member_task).collect();
    let publish = async {
        let mut sent = 0;
        while sent < EVENTS {
            let room = (queue.room() as u32).min(EVENTS - sent);
            push(&queue, sent..sent + room);
            sent += room;
            if room == 0 {
                queue.room_freed().await;
            }
        }
        queue.drained().await;
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), publish).await;
    assert!(in_time.is_ok(), "seed {seed}: stuck with {:?}", queue.status());
    queue.end();
    for member in members {
        member.await.unwrap();
    }
    let mut done = done.lock().clone();
    done.sort_unstable();
    assert!(done.iter().copied().eq(0..EVENTS), "seed {seed}: {} done of {EVENTS}", done.len());
}

#[tokio::test(start_paused = true)]
async fn what_came_back_to_one_instance_takes_no_room() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut member = join(&queue, HERE, member().prefetch(1));
    push_entries(&queue, local([0], HERE));
    drop(ready(&mut member).expect("it is there").release());
    assert_eq!((queue.room(), queue.status().waiting), (1, 1));
    push(&queue, [1]);
    assert_eq!(drain(&mut member), [0, 1], "none was lost to the bound");
    assert_eq!(member.status().lagged, 0);
}
