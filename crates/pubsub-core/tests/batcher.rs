//! The batch policy as a state machine, with made-up time: one test per rule of clause T1.

use std::sync::Arc;
use std::time::Duration;

use pubsub_core::{BatchOverflow, BatchPolicy, Batcher, Due, ErrorKind, Event};
use tokio::time::Instant;

/// A clock that stands still until told, and a batcher that is told its time.
struct Bench {
    start: Instant,
    batcher: Batcher<Arc<Event>>,
}

impl Bench {
    fn new(policy: BatchPolicy) -> Self {
        Self { start: Instant::now(), batcher: Batcher::new(policy).expect("a valid policy") }
    }

    fn at(&self, millis: u64) -> Instant {
        self.start + Duration::from_millis(millis)
    }

    /// Pushes an event and returns those that had to go.
    fn push(&mut self, millis: u64, event_type: &str) -> Vec<String> {
        let now = self.at(millis);
        names(&self.batcher.push(now, Arc::new(Event::new(event_type))))
    }

    fn push_all(&mut self, millis: u64, types: &[&str]) {
        for event_type in types {
            assert!(self.push(millis, event_type).is_empty(), "{event_type} was dropped");
        }
    }

    fn due(&self, millis: u64) -> Due {
        self.batcher.due(self.at(millis))
    }

    /// The batch, and what coalescing dropped.
    fn take(&mut self, millis: u64) -> (Vec<String>, Vec<String>) {
        let (batch, dropped) = self.batcher.take(self.at(millis));
        (names(&batch), names(&dropped))
    }

    /// The batch, which must be due and lose nothing.
    fn take_due(&mut self, millis: u64) -> Vec<String> {
        assert_eq!(self.due(millis), Due::Now, "at {millis} ms");
        let (batch, dropped) = self.take(millis);
        assert!(dropped.is_empty());
        batch
    }
}

fn names(events: &[Arc<Event>]) -> Vec<String> {
    events.iter().map(|event| event.event_type().to_owned()).collect()
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn urgent(policy: BatchPolicy) -> BatchPolicy {
    policy.is_immediate(|event| event.event_type().starts_with('!'))
}

#[test]
fn nothing_until_full_then_all_in_order() {
    let mut bench = Bench::new(BatchPolicy::new().max_size(3).max_wait(None));
    bench.push_all(0, &["a", "b"]);
    assert_eq!(bench.due(3_600_000), Due::Idle);
    bench.push_all(5, &["c"]);
    assert_eq!(bench.take_due(5), ["a", "b", "c"]);
    assert_eq!(bench.due(5), Due::Idle);
}

#[test]
fn a_batch_has_at_most_max_size_and_the_rest_stays_in_order() {
    let mut bench = Bench::new(BatchPolicy::new().max_size(2).max_wait(None).max_buffer_size(10));
    bench.push_all(0, &["a", "b", "c", "d", "e"]);
    assert_eq!(bench.take_due(0), ["a", "b"]);
    assert_eq!(bench.take_due(0), ["c", "d"]);
    assert_eq!(bench.due(9_999), Due::Idle);
    assert_eq!(bench.batcher.len(), 1);
}

#[test]
fn max_wait_counts_from_the_first_event_and_later_ones_do_not_move_it() {
    let mut bench = Bench::new(BatchPolicy::new().max_size(10).max_wait(millis(100)));
    bench.push_all(0, &["a"]);
    bench.push_all(60, &["b"]);
    bench.push_all(99, &["c"]);
    assert_eq!(bench.due(99), Due::At(bench.at(100)));
    assert_eq!(bench.take_due(100), ["a", "b", "c"]);
    bench.push_all(150, &["d"]);
    assert_eq!(bench.due(150), Due::At(bench.at(250)), "the next batch counts from its own first event");
}

#[test]
fn max_wait_of_what_a_batch_left_behind_counts_from_its_arrival() {
    let mut bench = Bench::new(BatchPolicy::new().max_size(2).max_wait(millis(100)).min_interval(millis(50)));
    bench.push_all(0, &["a", "b"]);
    assert_eq!(bench.take_due(0), ["a", "b"]);
    bench.push_all(10, &["c", "d", "e"]);
    assert_eq!(bench.take_due(50), ["c", "d"]);
    assert_eq!(bench.due(60), Due::At(bench.at(110)), "`e` came at 10");
}

#[test]
fn an_empty_buffer_is_never_due() {
    let mut bench = Bench::new(BatchPolicy::new().max_wait(millis(1)));
    assert_eq!(bench.due(1_000), Due::Idle);
    bench.push_all(0, &["a"]);
    assert_eq!(bench.take_due(1), ["a"]);
    assert_eq!(bench.due(1_000), Due::Idle);
}

#[test]
fn what_coalescing_emptied_is_not_due() {
    let policy = BatchPolicy::new()
        .max_size(2)
        .max_buffer_size(2)
        .max_wait(millis(100))
        .min_interval(millis(50))
        .overflow(BatchOverflow::CoalesceThenDropOldest)
        .coalesce(|events, keep| (0..events.len()).for_each(|place| keep.drop_at(place)));
    let mut bench = Bench::new(policy);
    bench.push_all(0, &["a", "b"]);
    let (batch, dropped) = bench.take(0);
    assert!(batch.is_empty());
    assert_eq!(dropped, ["a", "b"]);
    assert_eq!(bench.due(10_000), Due::Idle);
    bench.push_all(10, &["c", "d"]);
    assert_eq!(bench.push(20, "e"), ["c", "d"], "made room by coalescing alone");
    assert_eq!(bench.due(20), Due::At(bench.at(120)), "what waits is `e`, which came at 20");
}

#[test]
fn min_interval_delays_size_wait_and_immediate_but_not_the_first_batch() {
    let policy = || urgent(BatchPolicy::new().max_size(2).max_wait(millis(10)).min_interval(millis(100)));
    for (events, trigger) in [(&["a", "b"][..], "size"), (&["a"], "wait"), (&["!a"], "immediate")] {
        let mut bench = Bench::new(policy());
        bench.push_all(0, &["x", "y"]);
        assert_eq!(bench.take_due(0), ["x", "y"], "the first batch is not delayed");
        bench.push_all(5, events);
        assert_eq!(bench.due(99), Due::At(bench.at(100)), "{trigger}");
        assert_eq!(bench.take_due(100), events, "{trigger}");
    }
}

#[test]
fn a_flush_of_nothing_moves_nothing() {
    let mut bench = Bench::new(BatchPolicy::new().max_size(2).max_wait(None).min_interval(millis(100)));
    bench.push_all(0, &["a", "b"]);
    assert_eq!(bench.take_due(0), ["a", "b"]);
    bench.batcher.flush();
    assert_eq!(bench.due(50), Due::Idle);
    assert!(bench.take(50).0.is_empty());
    bench.push_all(60, &["c"]);
    assert_eq!(bench.due(60), Due::Idle, "the flush of nothing is forgotten");
    bench.push_all(61, &["d"]);
    assert_eq!(bench.due(61), Due::At(bench.at(100)), "counted from the batch at 0");
}

#[test]
fn a_flush_takes_all_at_once_whatever_the_interval() {
    let mut bench = Bench::new(BatchPolicy::new().max_size(2).max_wait(None).min_interval(millis(100)));
    bench.push_all(0, &["a", "b"]);
    assert_eq!(bench.take_due(0), ["a", "b"]);
    bench.push_all(1, &["c", "d", "e"]);
    bench.batcher.flush();
    assert_eq!(bench.take_due(1), ["c", "d", "e"]);
}

#[test]
fn an_immediate_event_sends_the_buffer_out_itself_last() {
    let mut bench = Bench::new(urgent(BatchPolicy::new().max_size(10).max_wait(None)));
    bench.push_all(0, &["a", "b", "!c"]);
    assert_eq!(bench.take_due(0), ["a", "b", "!c"]);
    assert_eq!(bench.due(0), Due::Idle);
}

#[test]
fn overflow_drops_the_oldest() {
    let policy = BatchPolicy::new().max_size(2).max_buffer_size(3).min_interval(millis(100)).max_wait(None);
    let mut bench = Bench::new(policy);
    bench.push_all(0, &["x", "y"]);
    bench.take_due(0);
    bench.push_all(1, &["a", "b", "c"]);
    assert_eq!(bench.push(2, "d"), ["a"]);
    assert_eq!(bench.push(3, "e"), ["b"]);
    assert_eq!(bench.take_due(100), ["c", "d"]);
}

#[test]
fn overflow_drops_the_newest() {
    let policy = BatchPolicy::new().max_size(2).max_buffer_size(2).min_interval(millis(100)).max_wait(None);
    let mut bench = Bench::new(policy.overflow(BatchOverflow::DropNewest));
    bench.push_all(0, &["x", "y"]);
    bench.take_due(0);
    bench.push_all(1, &["a", "b"]);
    assert_eq!(bench.push(2, "c"), ["c"]);
    assert_eq!(bench.take_due(100), ["a", "b"]);
}

#[test]
fn overflow_coalesces_first_and_drops_the_oldest_if_that_made_no_room() {
    let policy = |even_only: bool| {
        BatchPolicy::new()
            .max_size(2)
            .max_buffer_size(2)
            .min_interval(millis(100))
            .max_wait(None)
            .overflow(BatchOverflow::CoalesceThenDropOldest)
            .coalesce(move |events, keep| {
                for place in (0..events.len()).filter(|_| even_only) {
                    if events[place].event_type().len() % 2 == 1 {
                        keep.drop_at(place);
                    }
                }
            })
    };
    for (coalesces, gone) in [(true, ["b"]), (false, ["aa"])] {
        let mut bench = Bench::new(policy(coalesces));
        bench.push_all(0, &["xx", "yy"]);
        bench.take_due(0);
        bench.push_all(1, &["aa", "b"]);
        assert_eq!(bench.push(2, "cc"), gone);
    }
}

#[test]
fn immediate_events_are_never_dropped_and_do_not_count() {
    for overflow in [BatchOverflow::DropOldest, BatchOverflow::DropNewest, BatchOverflow::CoalesceThenDropOldest] {
        let policy = BatchPolicy::new().max_size(2).max_buffer_size(2).min_interval(millis(100)).max_wait(None);
        let drop_all = policy.overflow(overflow).coalesce(|events, keep| (0..events.len()).for_each(|at| keep.drop_at(at)));
        let mut bench = Bench::new(urgent(drop_all));
        bench.push_all(0, &["!x"]);
        assert_eq!(bench.take_due(0), ["!x"]);
        bench.push_all(1, &["!a", "!b", "!c", "d", "e"]);
        let gone = bench.push(2, "f");
        assert!(!gone.is_empty() && gone.iter().all(|name| !name.starts_with('!')), "{overflow:?} dropped {gone:?}");
        let (batch, dropped) = bench.take(100);
        assert_eq!(batch.iter().filter(|name| name.starts_with('!')).count(), 3, "{overflow:?}: {batch:?}");
        assert_eq!(gone.len() + batch.len() + dropped.len(), 6, "{overflow:?}: nothing vanishes untold");
    }
}

#[test]
fn counting_does_not_drift_after_drops() {
    let policy = urgent(BatchPolicy::new().max_size(3).max_buffer_size(3).min_interval(millis(100)).max_wait(None));
    let mut bench = Bench::new(policy);
    bench.push_all(0, &["x", "y", "z"]);
    bench.take_due(0);
    for round in 1..=50 {
        let start = round * 100;
        bench.push_all(start - 60, &["a", "!b", "c", "d"]);
        assert_eq!(bench.push(start - 50, "e"), ["a"]);
        assert_eq!(bench.push(start - 40, "f"), ["c"]);
        assert_eq!(bench.take_due(start), ["!b", "d", "e", "f"], "round {round}");
        assert!(bench.batcher.is_empty());
    }
    bench.push_all(9_000, &["a", "b"]);
    assert_eq!(bench.due(9_500), Due::Idle, "two of three");
    bench.push_all(9_500, &["c"]);
    assert_eq!(bench.due(9_500), Due::Now, "three of three");
}

#[test]
fn coalescing_sees_the_events_in_order_and_can_only_drop() {
    let policy = BatchPolicy::new().max_size(3).max_wait(None).coalesce(|events, keep| {
        let last = events.len() - 1;
        assert_eq!(events.iter().map(|event| event.event_type()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert!((0..events.len()).all(|place| keep.keeps(place)) && !keep.keeps(events.len()));
        (0..last).for_each(|place| keep.drop_at(place));
    });
    let mut bench = Bench::new(policy);
    bench.push_all(0, &["a", "b", "c"]);
    let (batch, dropped) = bench.take(0);
    assert_eq!((batch, dropped), (vec!["c".into()], vec!["a".into(), "b".into()]));
}

#[test]
fn a_panicking_coalesce_keeps_the_batch_whole() {
    let policy = BatchPolicy::new().max_size(2).max_wait(None).coalesce(|_, keep| {
        keep.drop_at(0);
        keep.drop_at(99);
    });
    let mut bench = Bench::new(policy);
    bench.push_all(0, &["a", "b"]);
    assert_eq!(bench.take_due(0), ["a", "b"]);
    bench.push_all(1, &["c"]);
    bench.batcher.flush();
    assert_eq!(bench.take_due(1), ["c"], "and a flush goes on working");
}

#[test]
fn each_refusal_names_its_option() {
    let long = Duration::from_secs(1 << 40);
    for (policy, named) in [
        (BatchPolicy::new().max_size(0), "max_size"),
        (BatchPolicy::new().max_size(usize::MAX), "max_size"),
        (BatchPolicy::new().max_buffer_size(0), "max_buffer_size"),
        (BatchPolicy::new().max_size(10).max_buffer_size(9), "max_buffer_size"),
        (BatchPolicy::new().max_wait(long), "max_wait"),
        (BatchPolicy::new().min_interval(long), "min_interval"),
        (BatchPolicy::new().overflow(BatchOverflow::CoalesceThenDropOldest), "overflow"),
    ] {
        let error = Batcher::<Arc<Event>>::new(policy).expect_err(named);
        assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == named), "{named}: {error}");
    }
}

#[test]
fn a_large_buffer_costs_no_search_with_every_event() {
    // A hundred thousand times a hundred thousand would take minutes.
    let started = std::time::Instant::now();
    let mut batcher = Batcher::new(BatchPolicy::new().max_size(100_000).max_buffer_size(100_000)).unwrap();
    let (now, event) = (Instant::now(), Arc::new(Event::new("x")));
    for _ in 0..100_000 {
        assert!(batcher.push(now, event.clone()).is_empty());
        assert_ne!(batcher.due(now), Due::Idle);
    }
    assert_eq!(batcher.take(now).0.len(), 100_000);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}
