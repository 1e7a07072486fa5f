//! The sequence, against logs and live events made up.

use proptest::prelude::*;
use pubsub_core::ReplayIndex;

use super::*;

const FIRST: Generation = Generation::new(7, 0);

fn generation(number: u32) -> Generation {
    Generation::new(7, number)
}

fn event(generation: Generation, index: u64) -> Arc<Event> {
    let place = ReplayIndex { generation: generation.get(), index };
    Arc::new(Event::new(index.to_string()).with_index(Some(place)))
}

/// A log of one event per index, of which those below the floor and those trimmed are gone.
#[derive(Debug, Clone)]
struct Log {
    generation: Generation,
    events: Vec<Arc<Event>>,
    floor: u64,
    trimmed: BTreeSet<u64>,
}

impl Log {
    fn new(generation: Generation, count: u64) -> Self {
        let events = (0..count).map(|index| event(generation, index)).collect();
        Self { generation, events, floor: 0, trimmed: BTreeSet::new() }
    }

    fn page(&self, from: u64, limit: usize) -> LogPage {
        let kept = |index: &u64| *index >= self.floor && !self.trimmed.contains(index);
        let events = (from..self.events.len() as u64).filter(kept).take(limit).map(|index| self.events[index as usize].clone());
        LogPage::new(self.generation, self.floor, self.events.len() as u64, 0, events.collect())
    }

    fn feed(&self, sequence: &mut Sequence, limit: usize) {
        while let Some(wanted) = sequence.wants() {
            sequence.page(wanted, self.page(wanted.from, limit), limit);
        }
    }
}

/// What there is, by index, and how many were told to be lost.
fn drain(sequence: &mut Sequence) -> (Vec<u64>, u64) {
    let (mut seen, mut lost) = (Vec::new(), 0);
    while let Some(ready) = sequence.pop() {
        lost += ready.lagged;
        seen.push(ready.generation.and(ready.event.index()).map_or(u64::MAX, |place| place.index));
    }
    (seen, lost)
}

#[test]
fn what_comes_early_waits_for_what_is_read() {
    let log = Log::new(FIRST, 6);
    let mut sequence = Sequence::starting(Some(FIRST), 1, 3);
    sequence.live(log.events[4].clone(), 1, 0);
    assert_eq!(drain(&mut sequence), (vec![], 0));
    log.feed(&mut sequence, 2);
    assert_eq!(drain(&mut sequence).0[..4], [1, 2, 3, 4]);
    sequence.live(log.events[2].clone(), 1, 0);
    assert_eq!(drain(&mut sequence), (vec![], 0), "a repeat");
    sequence.live(log.events[2].clone(), 2, 0);
    assert_eq!(drain(&mut sequence), (vec![2], 0), "a retry is none");
}

#[test]
fn a_new_generation_begins_at_0_and_stragglers_are_dropped() {
    let (old, new) = (Log::new(generation(3), 9), Log::new(generation(4), 3));
    let mut sequence = Sequence::starting(Some(old.generation), 5, 5);
    sequence.live(old.events[5].clone(), 1, 0);
    sequence.live(new.events[1].clone(), 1, 0);
    sequence.live(old.events[6].clone(), 1, 0);
    new.feed(&mut sequence, 9);
    assert_eq!(drain(&mut sequence), (vec![5, 0, 1, 2], 0));
    assert_eq!(sequence.next, 3);
}

#[test]
fn a_page_asked_for_before_a_generation_began_skips_nothing_of_it() {
    let (old, new) = (Log::new(generation(3), 9), Log::new(generation(4), 3));
    let mut sequence = Sequence::starting(Some(old.generation), 5, 9);
    let wanted = sequence.wants().unwrap();
    sequence.live(new.events[0].clone(), 1, 0);
    sequence.page(wanted, new.page(wanted.from, 9), 9);
    new.feed(&mut sequence, 9);
    sequence.live(new.events[1].clone(), 1, 0);
    sequence.live(new.events[2].clone(), 1, 0);
    assert_eq!(drain(&mut sequence).0, [0, 1, 2]);
}

#[test]
fn a_log_that_is_gone_is_told_once_and_live_goes_on() {
    let old = Log::new(FIRST, 9);
    let mut sequence = Sequence::starting(Some(FIRST), 2, 6);
    sequence.page(sequence.wants().unwrap(), LogPage::default(), 9);
    sequence.live(old.events[6].clone(), 1, 0);
    assert_eq!(drain(&mut sequence), (vec![6], 4));
    sequence.live(old.events[3].clone(), 1, 0);
    assert_eq!(drain(&mut sequence), (vec![3], 0), "what could not be read comes late");
}

#[test]
fn what_was_forgotten_for_a_bound_is_counted_and_what_was_trimmed_is_not() {
    let mut log = Log::new(FIRST, 10);
    (log.floor, log.trimmed) = (4, [6, 9].into());
    let mut sequence = Sequence::starting(Some(FIRST), 1, 10);
    log.feed(&mut sequence, 2);
    assert_eq!(drain(&mut sequence), (vec![4, 5, 7, 8], 3));
    assert_eq!(sequence.next, 10);
}

#[test]
fn what_the_bus_drops_is_no_loss_if_the_log_has_it() {
    let log = Log::new(FIRST, 20);
    let mut sequence = Sequence::starting(Some(FIRST), 0, 0);
    sequence.live(log.events[0].clone(), 1, 0);
    // 14 of them are in the log, and of three it is sure that they had no index.
    sequence.live(log.events[15].clone(), 1, 14 + EARLY as u64 + 3);
    log.feed(&mut sequence, 100);
    assert_eq!(drain(&mut sequence), ((0..20).collect(), 3));
    sequence.live(Arc::new(Event::new("stranger")), 1, 5);
    assert_eq!(drain(&mut sequence).1, 5);
}

#[test]
fn what_was_overtaken_and_dropped_is_no_loss_either() {
    let log = Log::new(FIRST, 1000);
    let mut sequence = Sequence::starting(Some(FIRST), 10, 10);
    // What was numbered before it began, and what overtook the rest, were dropped.
    sequence.allow_for_dropped(9);
    sequence.live(log.events[9].clone(), 1, 9);
    for round in (10..1000).step_by(3) {
        sequence.live(log.events[round].clone(), 1, 1);
        sequence.live(log.events[round + 1].clone(), 1, 0);
        log.feed(&mut sequence, 100);
    }
    assert_eq!(drain(&mut sequence), ((10..1000).collect(), 0));
}

#[test]
fn events_without_an_index_pass_and_are_not_repeated_from_the_log() {
    let log = Log::new(FIRST, 3);
    let mut sequence = Sequence::starting(Some(FIRST), 0, 0);
    let unnumbered = Arc::new(Event::clone(&log.events[1]).with_index(None));
    sequence.live(log.events[0].clone(), 1, 0);
    sequence.live(unnumbered, 1, 0);
    sequence.live(log.events[2].clone(), 1, 0);
    log.feed(&mut sequence, 10);
    assert_eq!(drain(&mut sequence), (vec![0, u64::MAX, 2], 0));
}

#[test]
fn numbers_of_another_store_pass_as_none() {
    let (log, other) = (Log::new(FIRST, 3), Generation::new(8, 0));
    let mut sequence = Sequence::starting(Some(FIRST), 3, 3);
    sequence.live(event(other, 77), 1, 0);
    log.feed(&mut sequence, 9);
    sequence.live(event(other, 78), 1, 0);
    assert!(sequence.has_seen_another_store() && sequence.wants().is_none(), "the log was asked once");
    assert_eq!(drain(&mut sequence), (vec![u64::MAX; 2], 0));
}

#[test]
fn a_store_that_was_lost_and_made_anew_is_followed() {
    let (old, new) = (Log::new(generation(3), 9), Log::new(Generation::new(8, 0), 3));
    let mut sequence = Sequence::starting(Some(old.generation), 9, 9);
    sequence.live(new.events[1].clone(), 1, 0);
    new.feed(&mut sequence, 9);
    let rest: Vec<_> = std::iter::from_fn(|| sequence.pop()).map(|ready| ready.event.event_type().to_owned()).collect();
    assert_eq!(rest, ["1", "0", "2"], "the one that told came first, and once");
    assert!(!sequence.has_seen_another_store());
}

#[test]
fn without_a_log_to_be_seen_the_first_number_is_the_beginning() {
    let mut sequence = Sequence::adrift();
    sequence.live(event(FIRST, 40), 1, 0);
    sequence.live(event(FIRST, 41), 1, 0);
    assert_eq!((drain(&mut sequence), sequence.wants()), ((vec![40, 41], 0), None));
}

#[test]
fn more_early_events_than_are_kept_in_hand_are_read() {
    let log = Log::new(FIRST, 1000);
    let mut sequence = Sequence::starting(Some(FIRST), 0, 0);
    log.events[1..].iter().for_each(|event| sequence.live(event.clone(), 1, 0));
    assert!(sequence.early.len() <= EARLY);
    log.feed(&mut sequence, 100);
    assert_eq!(drain(&mut sequence), ((0..1000).collect(), 0));
}

#[test]
fn a_page_from_before_a_clear_takes_nobody_back_to_it() {
    let (old, new) = (Log::new(generation(3), 9), Log::new(generation(4), 3));
    let mut sequence = Sequence::starting(Some(old.generation), 0, 9);
    let wanted = sequence.wants().unwrap();
    sequence.live(new.events[0].clone(), 1, 0);
    let (seen, lost) = drain(&mut sequence);
    assert_eq!((seen, lost), (vec![0], 9), "what was left of the old one is told");
    for page in [old.page(wanted.from, 4), LogPage::default()] {
        sequence.page(wanted, page, 4); // it was read before the clear, or before the new one began, and is late
        sequence.live(new.events[1].clone(), 1, 0);
        new.feed(&mut sequence, 4);
    }
    assert_eq!(drain(&mut sequence), (vec![1], 0), "neither again nor lost");
}

#[test]
fn what_is_in_hand_when_a_generation_begins_is_handed_over() {
    let (old, new) = (Log::new(generation(3), 9), Log::new(generation(4), 3));
    let mut sequence = Sequence::starting(Some(old.generation), 5, 5);
    sequence.live(old.events[6].clone(), 1, 0);
    sequence.live(new.events[0].clone(), 1, 0);
    assert_eq!(drain(&mut sequence), (vec![6, 0], 1));
}

#[test]
fn a_generation_of_which_only_the_log_has_anything_is_read() {
    let new = Log::new(generation(4), 3);
    let mut sequence = Sequence::starting(Some(generation(3)), 5, 5);
    sequence.known(generation(4), 3);
    sequence.known(generation(3), 9); // late
    new.feed(&mut sequence, 2);
    assert_eq!(drain(&mut sequence), (vec![0, 1, 2], 0));
}

#[test]
fn an_event_read_from_the_log_is_not_repeated_without_its_index() {
    let log = Log::new(FIRST, 3);
    let mut sequence = Sequence::starting(Some(FIRST), 0, 2);
    log.feed(&mut sequence, 9);
    let unnumbered = Arc::new(Event::clone(&log.events[1]).with_index(None));
    sequence.live(unnumbered.clone(), 1, 0);
    assert_eq!(drain(&mut sequence), (vec![0, 1, 2], 0));
    sequence.live(unnumbered, 2, 0);
    assert_eq!(drain(&mut sequence), (vec![u64::MAX], 0), "a retry passes");
}

#[test]
fn an_event_that_came_without_an_index_is_not_repeated_live_with_one() {
    let log = Log::new(FIRST, 3);
    let mut sequence = Sequence::starting(Some(FIRST), 0, 0);
    sequence.live(Arc::new(Event::clone(&log.events[0]).with_index(None)), 1, 0);
    log.events.iter().for_each(|event| sequence.live(event.clone(), 1, 0));
    assert_eq!(drain(&mut sequence), (vec![u64::MAX, 1, 2], 0));
}

#[test]
fn without_a_log_to_be_seen_a_number_that_was_overtaken_still_passes_once() {
    let mut sequence = Sequence::adrift();
    for index in [40, 38, 39, 38, 41] {
        sequence.live(event(FIRST, index), 1, 0);
    }
    assert_eq!((drain(&mut sequence), sequence.wants()), ((vec![40, 38, 39, 41], 0), None));
}

#[test]
fn what_is_remembered_is_bounded() {
    let log = Log::new(FIRST, 20_000);
    let mut sequence = Sequence::starting(Some(FIRST), 0, 0);
    for (number, event) in log.events.iter().enumerate() {
        sequence.live(Arc::new(Event::new("stranger")), 1, 0);
        if number % 3 > 0 {
            sequence.live(event.clone(), 1, 0); // each third is left out
        }
        match number % 1000 {
            0 => sequence.skip(),
            500 => log.feed(&mut sequence, 100),
            _ => {}
        }
        drain(&mut sequence);
    }
    assert!(sequence.early.len() <= EARLY && sequence.missing.len() <= REMEMBERED && sequence.read.len() <= REMEMBERED);
    assert!(sequence.strangers.ids.len() <= REMEMBERED && sequence.strangers.order.len() <= REMEMBERED);
}

proptest! {
    /// Whatever comes live, in whatever order, twice or not at all, and however it is read: each event once, in order.
    #[test]
    fn each_once_and_in_order(
        start in 0_u64..20,
        head in 0_u64..20,
        live in prop::collection::vec(0_u64..40, 0..120),
        reads in prop::collection::vec(any::<bool>(), 120),
        limit in 1_usize..8,
    ) {
        let head = head.max(start);
        let log = Log::new(FIRST, 40);
        let mut sequence = Sequence::starting(Some(FIRST), start, head);
        let mut seen = Vec::new();
        for (index, read) in live.iter().zip(reads) {
            sequence.live(log.events[*index as usize].clone(), 1, 0);
            if read && let Some(wanted) = sequence.wants() {
                sequence.page(wanted, log.page(wanted.from, limit), limit);
            }
            seen.extend(drain(&mut sequence).0);
        }
        log.feed(&mut sequence, limit);
        let (rest, lost) = drain(&mut sequence);
        seen.extend(rest);
        let end = live.iter().map(|index| index + 1).max().unwrap_or(0).max(head).max(start);
        prop_assert!(seen.len() as u64 >= end - start && lost == 0, "{seen:?}");
        prop_assert_eq!(seen.clone(), (start..start + seen.len() as u64).collect::<Vec<_>>());
    }

    /// With a log that loses its oldest events, is cleared, or fails: never twice, never out of order but for what came late, and
    /// every gap is told.
    #[test]
    fn whatever_is_lost_is_told(
        floors in prop::collection::vec((0_u64..40, 0_u8..6), 1..60),
        live in prop::collection::vec(0_u64..60, 60),
        limit in 1_usize..8,
    ) {
        let mut log = Log::new(FIRST, 60);
        let mut sequence = Sequence::starting(Some(FIRST), 0, 10);
        let (mut seen, mut told) = (Vec::new(), 0);
        for ((floor, what), index) in floors.into_iter().zip(live) {
            sequence.live(log.events[index as usize].clone(), 1, 0);
            match (what, sequence.wants()) {
                (0, Some(_)) => sequence.skip(),
                (1, Some(wanted)) => sequence.page(wanted, LogPage::default(), limit),
                (2, _) => log.floor = log.floor.max(floor),
                (_, Some(wanted)) => sequence.page(wanted, log.page(wanted.from, limit), limit),
                _ => {}
            }
            let (more, lost) = drain(&mut sequence);
            seen.extend(more);
            told += lost;
        }
        log.feed(&mut sequence, limit);
        sequence.live(log.events[59].clone(), 1, 0);
        log.feed(&mut sequence, limit);
        sequence.live(Arc::new(Event::new("last")), 1, 0);
        let (more, lost) = drain(&mut sequence);
        seen.extend(more);
        told += lost;
        seen.retain(|index| *index != u64::MAX);
        let distinct: BTreeSet<_> = seen.iter().copied().collect();
        prop_assert_eq!(distinct.len(), seen.len(), "a repeat in {:?}", seen);
        // Told at least once each; what came late all the same was told before it came.
        let missing = (0..60).filter(|index| !distinct.contains(index)).count() as u64;
        prop_assert!(told >= missing, "{missing} missing, {told} told: {seen:?}");
        let late = seen.windows(2).filter(|pair| pair[0] > pair[1]).count() as u64;
        prop_assert!(late <= told, "{seen:?}");
    }
}
