//! Running handlers and reading batches: outcomes settle, and whatever becomes of the handler, its delivery has one.

mod common;

use std::cell::Cell;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use common::*;
use futures::FutureExt;
use parking_lot::Mutex;
use pubsub_core::machinery::SettleQueue;
use pubsub_core::{
    AckMode, BatchPolicy, Control, Delivery, ErrorKind, Event, Failure, Message, Receipt, Result, RetryPolicy, RunReport,
    Settled, Settlement, Settler, Source, SubscribeOptions, Subscription, SubscriptionHandle, SubscriptionStatus,
};
use tokio::sync::Notify;
use tokio::time::Instant;

fn of(message: &Message) -> u32 {
    *message.data::<u32>().expect("a numbered event")
}

fn quick() -> SubscribeOptions {
    SubscribeOptions::fan_out().retry(patient(millis(10)))
}

/// Stops the subscription once nothing is left of it.
async fn stop_when_drained(handle: SubscriptionHandle) {
    handle.drained().await;
    handle.stop();
}

/// Runs until drained.
async fn run_all<F, Fut>(subscription: &mut Subscription, concurrency: usize, handler: F) -> RunReport
where
    F: Fn(Message) -> Fut,
    Fut: Future<Output = Result<(), Failure>>,
{
    let handle = subscription.handle();
    let (report, ()) = soon(futures::future::join(subscription.run(concurrency, handler), stop_when_drained(handle))).await;
    report.expect("no error")
}

fn report(done: u64, retried: u64, dead_lettered: u64, released: u64) -> RunReport {
    let mut report = RunReport::default();
    (report.done, report.retried, report.dead_lettered, report.released) = (done, retried, dead_lettered, released);
    report
}

// `run`.

#[tokio::test(start_paused = true)]
async fn handlers_start_in_order_and_no_more_than_allowed_at_once() {
    for concurrency in [1, 3, 500] {
        let bench = Bench::new();
        let (queue, mut subscription) = bench.fan_out(quick());
        push(&queue, 0..100);
        let (started, running, most) = (Mutex::new(Vec::new()), Cell::new(0), Cell::new(0));
        let done = run_all(&mut subscription, concurrency, async |message| {
            started.lock().push(of(&message));
            running.set(running.get() + 1);
            most.set(most.get().max(running.get()));
            tokio::time::sleep(millis(u64::from(1 + of(&message) % 7))).await;
            running.set(running.get() - 1);
            Ok(())
        })
        .await;
        assert_eq!(done, report(100, 0, 0, 0));
        assert_eq!(started.into_inner(), (0..100).collect::<Vec<_>>());
        assert_eq!(most.get(), concurrency.min(100));
    }
}

#[tokio::test(start_paused = true)]
async fn outcomes_settle() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick().dead_letter(name("dead")));
    push(&queue, 0..6);
    let seen = Mutex::new(Vec::new());
    let done = run_all(&mut subscription, 1, async |message| {
        seen.lock().push((of(&message), message.attempt()));
        match (of(&message), message.attempt()) {
            (0, 1) => Err(Failure::retry("not yet")),
            (1, 1) => Err("nan".parse::<u32>().unwrap_err())?,
            (2, 1) => panic!("no {}", 2),
            (3, _) => Err(Failure::dead_letter("never")),
            (4, 1) => Err(Failure::retry_after(millis(500), "later")),
            _ => Ok(()),
        }
    })
    .await;
    assert_eq!(done, report(5, 4, 1, 0));
    let seen = seen.into_inner();
    assert_eq!(seen[..6], [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]);
    assert_eq!(seen[6..], [(0, 2), (1, 2), (2, 2), (4, 2)], "each came back once, the fourth last");
    assert_eq!(bench.letters.0.lock().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_release_is_uncounted() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick());
    push(&queue, [1]);
    let calls = AtomicU32::new(0);
    let done = run_all(&mut subscription, 1, async |message| {
        assert_eq!(message.attempt(), 1);
        if calls.fetch_add(1, Ordering::Relaxed) < 3 { Err(Failure::release()) } else { Ok(()) }
    })
    .await;
    assert_eq!(done, report(1, 0, 0, 3));
}

#[tokio::test(start_paused = true)]
async fn what_always_fails_is_given_up_with_its_last_error() {
    let bench = Bench::new();
    let options = quick().retry(patient(millis(1)).max_attempts(3)).dead_letter(name("dead"));
    let (queue, mut subscription) = bench.fan_out(options);
    push(&queue, 0..2);
    let done = run_all(&mut subscription, 2, async |message| {
        if of(&message) == 0 { Err(Failure::retry(format!("no {}", message.attempt()))) } else { Ok(()) }
    })
    .await;
    assert_eq!(done, report(1, 3, 0, 0));
    let letters = bench.letters.0.lock();
    assert_eq!(letters.len(), 1);
    assert_eq!(pubsub_core::Origin::of(&letters[0].1).unwrap().reason, "no 3");
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_runs_too_long_is_cancelled_and_retried() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick().retry(patient(millis(10)).handler_timeout(millis(200))));
    push(&queue, 0..2);
    let (dropped, start) = (Arc::new(AtomicU32::new(0)), Instant::now());
    let done = run_all(&mut subscription, 2, async |message| {
        let dropped = dropped.clone();
        let _guard = CountDrop(dropped);
        if (of(&message), message.attempt()) == (0, 1) {
            pending::<()>().await;
        }
        tokio::time::sleep(millis(190)).await;
        Ok(())
    })
    .await;
    assert_eq!(done, report(2, 1, 0, 0));
    assert_eq!(dropped.load(Ordering::Relaxed), 3);
    assert!((millis(400)..millis(450)).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_lost_its_delivery_is_cancelled() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick().max_hold(millis(300)));
    push(&queue, [7]);
    let (dropped, start) = (Arc::new(AtomicU32::new(0)), Instant::now());
    let done = run_all(&mut subscription, 1, |message| {
        let (guard, gone) = (CountDrop(dropped.clone()), dropped.load(Ordering::Relaxed));
        async move {
            let _guard = guard;
            if message.attempt() == 1 {
                pending::<()>().await;
            }
            assert_eq!((message.attempt(), gone), (2, 1), "the first was cancelled before the second began");
            Ok(())
        }
    })
    .await;
    assert_eq!((done.revoked, done.done, done.retried, done.unconfirmed), (1, 1, 0, 0));
    assert!((millis(300)..millis(310)).contains(&start.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_handler_may_stop_its_own_subscription() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick());
    push(&queue, 0..10);
    let handle = subscription.handle();
    let run = subscription.run(1, async |message| {
        if of(&message) == 3 {
            handle.stop();
        }
        tokio::task::yield_now().await;
        Ok(())
    });
    assert_eq!(soon(run).await.unwrap(), report(4, 0, 0, 0));
    assert!(queue.is_ended());
}

#[tokio::test(start_paused = true)]
async fn stopping_lets_running_handlers_end() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut subscription = join(&queue, HERE, member());
    let _sibling = join(&queue, HERE, member());
    push(&queue, 0..2);
    let handle = subscription.handle();
    let stop = async {
        tokio::time::sleep(millis(10)).await;
        handle.stop();
    };
    let run = subscription.run(2, async |_| {
        tokio::time::sleep(millis(500)).await;
        Ok(())
    });
    let (done, ()) = soon(futures::future::join(run, stop)).await;
    assert_eq!(done.unwrap(), report(2, 0, 0, 0));
    assert!(queue.is_drained());
}

#[tokio::test(start_paused = true)]
async fn dropping_run_cancels_the_handlers_and_retries_their_deliveries() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick());
    push(&queue, 0..5);
    let dropped = Arc::new(AtomicU32::new(0));
    {
        let run = subscription.run(3, |_| {
            let guard = CountDrop(dropped.clone());
            async move {
                let _guard = guard;
                pending::<()>().await;
                Ok(())
            }
        });
        assert!(tokio::time::timeout(millis(5), run).await.is_err());
    }
    assert_eq!(dropped.load(Ordering::Relaxed), 3);
    let again = Mutex::new(Vec::new());
    run_all(&mut subscription, 1, async |message| {
        again.lock().push((of(&message), message.attempt()));
        Ok(())
    })
    .await;
    let mut again = again.into_inner();
    again.sort_unstable();
    assert_eq!(again, [(0, 2), (1, 2), (2, 2), (3, 1), (4, 1)]);
}

#[tokio::test(start_paused = true)]
async fn dropping_a_spawned_run_aborts_the_tasks_and_retries_their_deliveries() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick());
    push(&queue, 0..2);
    {
        let run = subscription.run_spawned(2, |_| pending());
        assert!(tokio::time::timeout(millis(5), run).await.is_err());
    }
    let again = Arc::new(AtomicU32::new(0));
    let handle = subscription.handle();
    let count = again.clone();
    let run = subscription.run_spawned(2, move |message| {
        count.fetch_add(message.attempt(), Ordering::Relaxed);
        async { Ok(()) }
    });
    let (done, ()) = soon(futures::future::join(run, stop_when_drained(handle))).await;
    assert_eq!((done.unwrap(), again.load(Ordering::Relaxed)), (report(2, 0, 0, 0), 4));
}

#[tokio::test(start_paused = true)]
async fn a_spawned_handler_settles_by_outcome_too() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick());
    push(&queue, 0..20);
    let handle = subscription.handle();
    let run = subscription.run_spawned(4, |message| async move {
        match (of(&message) % 4, message.attempt()) {
            (1, 1) => Err(Failure::retry("once")),
            (2, 1) => panic!("once"),
            _ => Ok(()),
        }
    });
    let (done, ()) = soon(futures::future::join(run, stop_when_drained(handle))).await;
    assert_eq!(done.unwrap(), report(20, 10, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn where_hand_over_settles_an_outcome_is_only_counted() {
    let bench = Bench::new();
    let (queue, mut subscription) = bench.fan_out(quick().ack_mode(AckMode::Auto));
    push(&queue, 0..3);
    let done = soon(futures::future::join(
        subscription.run(1, async |message| {
            if of(&message) == 2 {
                queue.end();
            }
            Err(Failure::retry("no"))
        }),
        async {},
    ))
    .await
    .0;
    assert_eq!(done.unwrap(), report(0, 3, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn no_handlers_at_all_is_refused() {
    let bench = Bench::new();
    let (_queue, mut subscription) = bench.fan_out(quick());
    let error = soon(subscription.run(0, async |_| Ok(()))).await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == "concurrency"), "{error}");
}

/// Counts how often it was dropped.
struct CountDrop(Arc<AtomicU32>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

// A backend whose settlements travel.

/// Hands over numbered events, more than any bound allows, and confirms nothing until told to.
struct Remote {
    settlements: SettleQueue<(u64, Settlement)>,
    handed_over: AtomicUsize,
    fails_at: usize,
    stopped: Notify,
}

impl Settler for Remote {
    fn settle(&self, token: u64, settlement: Settlement) -> Receipt {
        self.settlements.record((token, settlement))
    }

    fn extend(&self, _token: u64) -> Receipt {
        Receipt::ready(Settled::Done)
    }

    fn poll_revoked(&self, _token: u64, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

struct RemoteSource(Arc<Remote>);

impl Source for RemoteSource {
    fn poll_next(&mut self, _cx: &mut Context<'_>, _mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let number = self.0.handed_over.fetch_add(1, Ordering::SeqCst);
        if number >= 5000 {
            return Poll::Pending;
        }
        if number == self.0.fails_at {
            return Poll::Ready(Some(Err(ErrorKind::Denied.into())));
        }
        let event = Arc::new(Event::new("numbered").with_data(number));
        Poll::Ready(Some(Ok(Delivery::held(event, 1, self.0.clone(), number as u64))))
    }
}

#[derive(Debug)]
struct NoControl;

#[async_trait::async_trait]
impl Control for NoControl {
    fn stop(&self) {}
    async fn stopped(&self) {}
    async fn drained(&self) {}
    fn status(&self) -> SubscriptionStatus {
        SubscriptionStatus::default()
    }
}

fn remote(fails_at: usize) -> (Arc<Remote>, Subscription) {
    let settlements = SettleQueue::new();
    let remote = Arc::new(Remote { settlements, handed_over: AtomicUsize::new(0), fails_at, stopped: Notify::new() });
    let source = Box::new(RemoteSource(remote.clone()));
    (remote, Subscription::new(name("t"), SubscribeOptions::fan_out(), source, Arc::new(NoControl)))
}

#[tokio::test(start_paused = true)]
async fn a_runner_keeps_a_bounded_number_of_open_settlements() {
    let (remote, mut subscription) = remote(usize::MAX);
    let confirm = async {
        tokio::time::sleep(millis(10)).await;
        let most = remote.settlements.open();
        assert!((900..1100).contains(&most), "{most} settlements are open");
        assert_eq!(remote.handed_over.load(Ordering::SeqCst), most);
        tokio::time::sleep(millis(10)).await;
        assert_eq!(remote.settlements.open(), most, "and it waits");
        for open in remote.settlements.next_batch(10).await {
            open.answer(Settled::Done);
        }
        tokio::time::sleep(millis(10)).await;
        assert_eq!(remote.handed_over.load(Ordering::SeqCst), most + 10);
        remote.stopped.notify_one();
    };
    let run = subscription.run(4, async |_| Ok(()));
    futures::pin_mut!(run);
    let stopped = remote.stopped.notified();
    let (winner, ()) = soon(futures::future::join(futures::future::select(run, Box::pin(stopped)), confirm)).await;
    assert!(matches!(winner, futures::future::Either::Right(_)), "the runner goes on");
}

#[tokio::test(start_paused = true)]
async fn an_error_is_final_and_comes_after_the_settlements_before_it() {
    let (remote, mut subscription) = remote(3);
    let confirm = async {
        tokio::time::sleep(millis(10)).await;
        for (place, open) in remote.settlements.next_batch(10).await.into_iter().enumerate() {
            assert_eq!(open.what().1, Settlement::Done);
            open.answer(if place == 0 { Settled::TooLate } else { Settled::Done });
        }
    };
    let (error, ()) = soon(futures::future::join(subscription.run(2, async |_| Ok(())), confirm)).await;
    assert_eq!(*error.unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(soon(subscription.run(2, async |_| Ok(()))).await.unwrap(), RunReport::default(), "it has ended");
}

// Batches.

fn in_threes() -> BatchPolicy {
    BatchPolicy::new().max_size(3).max_wait(None)
}

async fn next_batch(batches: &mut pubsub_core::Batches) -> Vec<(u32, u32)> {
    let batch = soon(futures::StreamExt::next(batches)).await.expect("the stream goes on").expect("no error");
    let numbers = batch.deliveries().iter().map(|delivery| (number(delivery), delivery.attempt())).collect();
    batch.done().into_iter().for_each(drop);
    numbers
}

fn nothing_yet(batches: &mut pubsub_core::Batches) -> bool {
    now(|| tokio::task::coop::unconstrained(futures::StreamExt::next(batches)).now_or_never()).is_none()
}

#[tokio::test(start_paused = true)]
async fn a_batch_comes_when_it_is_full_or_time_is_up() {
    let bench = Bench::new();
    let (queue, subscription) = bench.fan_out(quick());
    let mut batches = subscription.batches(in_threes().max_wait(millis(100))).unwrap();
    push(&queue, 0..7);
    assert_eq!(next_batch(&mut batches).await, [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(next_batch(&mut batches).await, [(3, 1), (4, 1), (5, 1)]);
    let start = Instant::now();
    assert_eq!(next_batch(&mut batches).await, [(6, 1)]);
    assert!((millis(95)..millis(110)).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert!(queue.is_drained());
}

#[tokio::test(start_paused = true)]
async fn what_the_policy_drops_is_settled() {
    let bench = Bench::new();
    let (queue, subscription) = bench.fan_out(quick());
    let last_only = in_threes().coalesce(|events, keep| (0..events.len() - 1).for_each(|place| keep.drop_at(place)));
    let mut batches = subscription.batches(last_only).unwrap();
    push(&queue, 0..3);
    assert_eq!(next_batch(&mut batches).await, [(2, 1)]);
    assert!(queue.is_drained());
}

#[tokio::test(start_paused = true)]
async fn a_batch_dropped_unsettled_is_retried_and_a_partial_one_is_released() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut sibling = join(&queue, HERE, member());
    let mut batches = join(&queue, HERE, member().retry(patient(millis(10)))).batches(in_threes()).unwrap();
    push(&queue, 0..4);
    drop(soon(futures::StreamExt::next(&mut batches)).await.unwrap().unwrap());
    assert!(nothing_yet(&mut batches), "one waits in a partial batch");
    assert_eq!(queue.status().held, 1);
    drop(batches);
    let mut back = Vec::new();
    for _ in 0..4 {
        let delivery = next(&mut sibling).await;
        back.push((number(&delivery), delivery.attempt()));
        drop(delivery.done());
    }
    back.sort_unstable();
    assert_eq!(back, [(0, 2), (1, 2), (2, 2), (3, 1)], "the last was never handed over");
}

#[tokio::test(start_paused = true)]
async fn draining_waits_for_partial_batches_and_for_what_they_retried() {
    let bench = Bench::new();
    let (queue, subscription) = bench.fan_out(quick());
    push(&queue, 0..4);
    let handle = subscription.handle();
    let seen = Mutex::new(Vec::new());
    // Without a time limit, nothing but the wait for the drain sends a partial batch out.
    let run = subscription.run_batches(in_threes(), async |batch| {
        seen.lock().push(batch.iter().map(|message| (of(message), message.attempt())).collect::<Vec<_>>());
        if batch.iter().any(|message| message.attempt() < 3) { Err(Failure::retry("not yet")) } else { Ok(()) }
    });
    let (handled, ()) = soon(futures::future::join(run, stop_when_drained(handle))).await;
    let seen = seen.into_inner();
    assert_eq!(seen[..2], [vec![(0, 1), (1, 1), (2, 1)], vec![(3, 1)]]);
    let mut last: Vec<_> = seen.iter().flatten().filter(|(_, attempt)| *attempt == 3).collect();
    last.sort_unstable();
    assert_eq!(last, [&(0, 3), &(1, 3), &(2, 3), &(3, 3)]);
    assert!(handled.unwrap() >= 2);
    assert!(queue.is_drained());
}

#[tokio::test(start_paused = true)]
async fn batches_settle_by_outcome() {
    let bench = Bench::new();
    let (queue, subscription) = bench.fan_out(quick().retry(patient(millis(10)).handler_timeout(millis(100))));
    push(&queue, 0..3);
    let (handle, calls) = (subscription.handle(), AtomicU32::new(0));
    let run = subscription.run_batches(in_threes(), async |batch| {
        let call = calls.fetch_add(1, Ordering::Relaxed);
        assert!(batch.len() == 3 && batch.iter().all(|message| message.attempt() == call + 1), "{batch:?}");
        match call {
            0 => Err(Failure::retry("not yet")),
            1 => panic!("not yet"),
            2 => pending().await,
            _ => {
                handle.stop();
                Ok(())
            }
        }
    });
    assert_eq!(soon(run).await.unwrap(), 1);
    assert_eq!(calls.load(Ordering::Relaxed), 4);
    assert!(queue.is_drained());
}

#[tokio::test(start_paused = true)]
async fn the_last_batch_goes_out_when_the_stream_ends() {
    let bench = Bench::new();
    let queue = bench.group();
    let mut batches = join(&queue, HERE, member()).batches(in_threes()).unwrap();
    let handle = batches.subscription().handle();
    let _sibling = join(&queue, HERE, member());
    push(&queue, 0..2);
    assert!(nothing_yet(&mut batches));
    handle.stop();
    assert_eq!(next_batch(&mut batches).await, [(0, 1), (1, 1)]);
    assert!(soon(futures::StreamExt::next(&mut batches)).await.is_none());
    assert!(queue.is_drained());
}

#[tokio::test(start_paused = true)]
async fn after_unsubscribing_no_batch_comes_even_from_inside_one() {
    let bench = Bench::new();
    let (queue, subscription) = bench.fan_out(quick());
    push(&queue, 0..9);
    let (handle, calls) = (subscription.handle(), AtomicU32::new(0));
    let run = subscription.run_batches(in_threes(), async |_| {
        calls.fetch_add(1, Ordering::Relaxed);
        handle.stop();
        Ok(())
    });
    assert_eq!(soon(run).await.unwrap(), 1);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    assert!(queue.is_ended());
}

#[tokio::test(start_paused = true)]
async fn immediate_events_that_may_not_be_dropped_hold_the_source_back() {
    let bench = Bench::new();
    let options = quick().ack_mode(AckMode::Auto).max_in_flight(10);
    let (queue, subscription) = bench.fan_out(options);
    let policy = in_threes().max_buffer_size(5).min_interval(Duration::from_secs(5)).is_immediate(|_| true);
    let mut batches = subscription.batches(policy).unwrap();
    push(&queue, [0]);
    assert_eq!(next_batch(&mut batches).await, [(0, 1)]);
    push(&queue, 1..51);
    assert!(nothing_yet(&mut batches), "the interval is not over");
    assert_eq!(batches.subscription().status().queued, 40, "ten wait in the batch, and no more are taken");
    for expected in [10, 10, 10, 10, 10] {
        assert_eq!(next_batch(&mut batches).await.len(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_could_not_be_held_is_refused() {
    let bench = Bench::new();
    let (_queue, subscription) = bench.fan_out(quick().max_in_flight(2));
    let error = subscription.batches(in_threes()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == "max_in_flight"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn members_of_a_group_may_read_differently() {
    let bench = Bench::new();
    let queue = bench.group();
    let one_by_one = join(&queue, HERE, member());
    let in_batches = join(&queue, HERE, member());
    let (a, b) = (one_by_one.handle(), in_batches.handle());
    push(&queue, 0..50);
    let seen = Mutex::new(Vec::new());
    let mut one_by_one = one_by_one;
    let singles = one_by_one.run(1, async |message| {
        seen.lock().push(of(&message));
        tokio::time::sleep(millis(1)).await;
        Ok(())
    });
    let batches = in_batches.run_batches(in_threes(), async |batch| {
        seen.lock().extend(batch.iter().map(of));
        tokio::time::sleep(millis(1)).await;
        Ok(())
    });
    let stop = async {
        futures::future::join(a.drained(), b.drained()).await;
        a.stop();
        b.stop();
    };
    let (singles, batches, ()) = soon(futures::future::join3(singles, batches, stop)).await;
    assert!(singles.unwrap().done > 0 && batches.unwrap() > 0);
    let mut seen = seen.into_inner();
    seen.sort_unstable();
    assert_eq!(seen, (0..50).collect::<Vec<_>>());
}

#[test]
fn the_default_policy_is_the_documented_one() {
    let policy = RetryPolicy::new();
    assert_eq!((policy.max_attempts.unwrap().get(), policy.handler_timeout), (5, None));
    assert_eq!((policy.initial_backoff, policy.max_backoff), (millis(100), millis(10_000)));
    let options = SubscribeOptions::fan_out();
    assert_eq!((options.prefetch, options.max_in_flight, options.max_hold), (256, 1000, Duration::from_secs(3600)));
    let batches = BatchPolicy::new();
    assert_eq!((batches.max_size, batches.max_buffer_size, batches.max_wait), (100, 256, Some(millis(1000))));
}

proptest::proptest! {
    /// For any valid policy, back-off stays within its limits, and jitter only shortens.
    #[test]
    fn back_off_is_bounded(initial in 0_u64..100_000, more in 0_u64..1_000_000, multiplier in 1.0..1e9_f64, jitter in 0.0..=1.0_f64,
                           attempt in 1_u32.., random in 0.0..=1.0_f64) {
        let mut policy = RetryPolicy::new().backoff(millis(initial), millis(initial + more)).jitter(jitter);
        policy.multiplier = multiplier;
        policy.validate().unwrap();
        let full = policy.backoff_after(attempt, 0.0);
        let jittered = policy.backoff_after(attempt, random);
        let rounding = Duration::from_nanos(2);
        proptest::prop_assert!(millis(initial) <= full + rounding && full <= millis(initial + more) + rounding, "{:?}", full);
        proptest::prop_assert!(jittered <= full + rounding);
        proptest::prop_assert!(jittered + rounding >= full.mul_f64(1.0 - jitter), "{:?} of {:?}", jittered, full);
        proptest::prop_assert!(policy.backoff_after(attempt.saturating_add(1), 0.0) + rounding >= full);
    }
}
