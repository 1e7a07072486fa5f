//! Oracles: a journal of what was published and received, and pure judgements over it.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use pubsub_core::{Delivery, Event, EventId};

use crate::{FENCE, Mismatch, Verdict};

/// How many ids a failure names before it only counts.
const NAMED: usize = 10;

fn named<T: Display>(ids: &[T]) -> String {
    let shown: Vec<_> = ids.iter().take(NAMED).map(ToString::to_string).collect();
    let more = ids.len().saturating_sub(NAMED);
    if more > 0 { format!("[{}, and {more} more]", shown.join(", ")) } else { format!("[{}]", shown.join(", ")) }
}

/// Everything sent arrived exactly once and nothing else did, in whatever order.
///
/// # Errors
/// Names what is missing, what is extra, and what came more than once.
pub fn exactly_once<T: Eq + Hash + Display>(sent: &[T], received: &[T]) -> Verdict {
    let (missing, extra, repeated) = compare(sent, received);
    verdict(sent.len(), received.len(), &missing, &extra, &repeated)
}

/// Everything sent arrived at least once and nothing else did.
///
/// # Errors
/// Names what is missing and what is extra.
pub fn at_least_once<T: Eq + Hash + Display>(sent: &[T], received: &[T]) -> Verdict {
    let (missing, extra, _) = compare(sent, received);
    verdict(sent.len(), received.len(), &missing, &extra, &[])
}

/// Nothing arrived that was not sent, and nothing more than once.
///
/// # Errors
/// Names what is extra and what came more than once.
pub fn at_most_once<T: Eq + Hash + Display>(sent: &[T], received: &[T]) -> Verdict {
    let (_, extra, repeated) = compare(sent, received);
    verdict::<T, _>(sent.len(), received.len(), &[], &extra, &repeated)
}

type Differences<'a, T> = (Vec<Numbered<'a, T>>, Vec<&'a T>, Vec<&'a T>);

fn compare<'a, T: Eq + Hash + Display>(sent: &'a [T], received: &'a [T]) -> Differences<'a, T> {
    let expected: HashSet<&T> = sent.iter().collect();
    let mut seen: HashSet<&T> = HashSet::new();
    let (mut extra, mut repeated) = (Vec::new(), Vec::new());
    for id in received {
        if !expected.contains(id) {
            extra.push(id);
        } else if !seen.insert(id) {
            repeated.push(id);
        }
    }
    let missing = sent.iter().enumerate().filter(|(_, id)| !seen.contains(id)).map(|(i, id)| Numbered(i, id)).collect();
    (missing, extra, repeated)
}

/// An id with its place among those sent.
struct Numbered<'a, T>(usize, &'a T);

impl<T: Display> Display for Numbered<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{} {}", self.0, self.1)
    }
}

fn verdict<M: Display, E: Display>(sent: usize, received: usize, missing: &[M], extra: &[E], repeated: &[E]) -> Verdict {
    if missing.is_empty() && extra.is_empty() && repeated.is_empty() {
        return Ok(());
    }
    Err(Mismatch::new(format!(
        "{sent} sent, {received} received; missing {} {}, extra {} {}, repeated {} {}",
        missing.len(),
        named(missing),
        extra.len(),
        named(extra),
        repeated.len(),
        named(repeated),
    )))
}

/// What arrived is in the order it was sent in. Says nothing about what did not arrive; repeats count from their first.
///
/// # Errors
/// Names the first pair that is the wrong way round.
pub fn in_order<T: Eq + Hash + Display>(sent: &[T], received: &[T]) -> Verdict {
    let place: HashMap<&T, usize> = sent.iter().enumerate().map(|(i, id)| (id, i)).collect();
    let mut seen = HashSet::new();
    let mut last: Option<(usize, &T)> = None;
    for id in received.iter().filter(|id| seen.insert(*id)) {
        let Some(&at) = place.get(id) else { continue };
        if let Some((before, earlier)) = last
            && at < before
        {
            return Err(Mismatch::new(format!("out of order: #{at} {id} came after #{before} {earlier}")));
        }
        last = Some((at, id));
    }
    Ok(())
}

/// All views agree on the relative order of what they have in common.
///
/// # Errors
/// Names two views and a pair they disagree on.
pub fn same_order<T: Eq + Hash + Display>(views: &[Vec<T>]) -> Verdict {
    for (a, one) in views.iter().enumerate() {
        for (b, other) in views.iter().enumerate().skip(a + 1) {
            in_order(one, other).map_err(|why| why.at(format!("view {b} against view {a}")))?;
        }
    }
    Ok(())
}

/// Each event's attempts, in the order they were seen, are 1, 2, 3 and so on.
///
/// # Errors
/// Names the event and what was seen.
pub fn counted_attempts<T: Eq + Hash + Display>(received: &[(T, u32)]) -> Verdict {
    let mut attempts: HashMap<&T, Vec<u32>> = HashMap::new();
    for (id, attempt) in received {
        attempts.entry(id).or_default().push(*attempt);
    }
    for (id, seen) in attempts {
        if !seen.iter().copied().eq(1..=u32::try_from(seen.len()).unwrap_or(u32::MAX)) {
            return Err(Mismatch::new(format!("attempts of {id} were {seen:?}")));
        }
    }
    Ok(())
}

/// One hand-over, as its consumer saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Who received it: a name the property chose.
    pub by: String,
    /// The event.
    pub id: EventId,
    /// Its type.
    pub event_type: String,
    /// The attempt.
    pub attempt: u32,
}

/// A journal of who published and received what, in the order it happened. Cheap to clone; all clones are one journal.
///
/// Fences are kept apart: only [`saw`](Self::saw) and [`saw_by`](Self::saw_by) know them.
#[derive(Debug, Clone, Default)]
pub struct Recorder(Arc<Mutex<Journal>>);

#[derive(Debug, Default)]
struct Journal {
    published: Vec<(String, EventId)>,
    received: Vec<Received>,
    fences: Vec<(String, EventId)>,
}

impl Recorder {
    /// An empty journal.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes a publish.
    pub fn published(&self, by: impl Into<String>, event: &Event) {
        self.0.lock().published.push((by.into(), event.id().clone()));
    }

    /// Notes a hand-over.
    pub fn received(&self, by: impl Into<String>, delivery: &Delivery) {
        self.event(by, delivery.event(), delivery.attempt());
    }

    /// Notes a hand-over by its event and attempt, for handlers that see no delivery.
    pub fn event(&self, by: impl Into<String>, event: &Event, attempt: u32) {
        if event.event_type() == FENCE {
            self.0.lock().fences.push((by.into(), event.id().clone()));
            return;
        }
        let received = Received { by: by.into(), id: event.id().clone(), event_type: event.event_type().to_owned(), attempt };
        self.0.lock().received.push(received);
    }

    /// The ids published, in the order they were noted.
    pub fn sent(&self) -> Vec<EventId> {
        self.0.lock().published.iter().map(|(_, id)| id.clone()).collect()
    }

    /// The ids one publisher published.
    pub fn sent_by(&self, publisher: &str) -> Vec<EventId> {
        self.0.lock().published.iter().filter(|(by, _)| by == publisher).map(|(_, id)| id.clone()).collect()
    }

    /// The ids one consumer received, in order, every attempt.
    pub fn ids_of(&self, consumer: &str) -> Vec<EventId> {
        self.0.lock().received.iter().filter(|seen| seen.by == consumer).map(|seen| seen.id.clone()).collect()
    }

    /// The ids all consumers received, in order, every attempt.
    pub fn ids(&self) -> Vec<EventId> {
        self.0.lock().received.iter().map(|seen| seen.id.clone()).collect()
    }

    /// The ids and attempts all consumers saw, in order.
    pub fn attempts(&self) -> Vec<(EventId, u32)> {
        self.0.lock().received.iter().map(|seen| (seen.id.clone(), seen.attempt)).collect()
    }

    /// Every hand-over, in order.
    pub fn log(&self) -> Vec<Received> {
        self.0.lock().received.clone()
    }

    /// How many hand-overs there were.
    pub fn count(&self) -> usize {
        self.0.lock().received.len()
    }

    /// How many different events were handed over.
    pub fn distinct(&self) -> usize {
        self.0.lock().received.iter().map(|seen| &seen.id).collect::<HashSet<_>>().len()
    }

    /// How many hand-overs one consumer had.
    pub fn count_of(&self, consumer: &str) -> usize {
        self.0.lock().received.iter().filter(|seen| seen.by == consumer).count()
    }

    /// Whether anybody received this event.
    pub fn saw(&self, id: &EventId) -> bool {
        let journal = self.0.lock();
        journal.received.iter().any(|seen| seen.id == *id) || journal.fences.iter().any(|(_, fence)| fence == id)
    }

    /// Whether one consumer received this event.
    pub fn saw_by(&self, consumer: &str, id: &EventId) -> bool {
        let journal = self.0.lock();
        journal.received.iter().any(|seen| seen.by == consumer && seen.id == *id)
            || journal.fences.iter().any(|(by, fence)| by == consumer && fence == id)
    }
}

/// The ids of events.
pub fn ids<'a>(events: impl IntoIterator<Item = &'a Arc<Event>>) -> Vec<EventId> {
    events.into_iter().map(|event| event.id().clone()).collect()
}

/// The ids of deliveries.
pub fn delivered<'a>(deliveries: impl IntoIterator<Item = &'a Delivery>) -> Vec<EventId> {
    deliveries.into_iter().map(|delivery| delivery.event().id().clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_compared_both_ways() {
        assert_eq!(exactly_once(&[1, 2, 3], &[3, 1, 2]), Ok(()));
        let why = exactly_once(&[1, 2, 3], &[3, 4, 3]).unwrap_err().to_string();
        assert_eq!(why, "3 sent, 3 received; missing 2 [#0 1, #1 2], extra 1 [4], repeated 1 [3]");
        assert!(at_least_once(&[1, 2], &[1, 2, 2]).is_ok() && at_least_once(&[1, 2], &[1]).is_err());
        assert!(at_least_once(&[1], &[1, 9]).is_err());
        assert!(at_most_once(&[1, 2], &[1]).is_ok() && at_most_once(&[1], &[1, 1]).is_err());
        assert!(at_most_once(&[1], &[2]).is_err());
    }

    #[test]
    fn a_failure_names_a_bounded_number() {
        let why = exactly_once(&(0..100).collect::<Vec<_>>(), &[]).unwrap_err().to_string();
        assert!(why.contains("#9 9, and 90 more]") && !why.contains("#10"), "{why}");
    }

    #[test]
    fn order_ignores_what_is_missing_and_what_comes_again() {
        assert_eq!(in_order(&[1, 2, 3, 4], &[1, 3, 1, 4]), Ok(()));
        let why = in_order(&[1, 2, 3], &[1, 3, 2]).unwrap_err().to_string();
        assert_eq!(why, "out of order: #1 2 came after #2 3");
    }

    #[test]
    fn views_agree_or_not() {
        assert!(same_order(&[vec![1, 2, 3], vec![1, 3], vec![2, 3]]).is_ok());
        assert!(same_order(&[vec![1, 2, 3], vec![2], vec![3, 1]]).is_err());
        assert!(same_order(&[vec![1], vec![2, 3], vec![3, 2]]).is_err());
    }

    #[test]
    fn attempts_have_no_gaps() {
        assert!(counted_attempts(&[("a", 1), ("b", 1), ("a", 2)]).is_ok());
        for wrong in [&[("a", 2)][..], &[("a", 1), ("a", 3)], &[("a", 1), ("a", 1)], &[("a", 2), ("a", 1)]] {
            assert!(counted_attempts(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_journal_keeps_order_and_consumers_apart() {
        let recorder = Recorder::new();
        let (a, b) = (Event::new("a"), Event::new("b"));
        recorder.published("p", &a);
        recorder.event("one", &a, 1);
        recorder.event("two", &b, 1);
        recorder.event("one", &a, 2);
        assert_eq!(recorder.sent_by("p"), [a.id().clone()]);
        assert!(recorder.sent_by("q").is_empty());
        assert_eq!(recorder.ids_of("one"), [a.id().clone(), a.id().clone()]);
        assert_eq!((recorder.count(), recorder.distinct(), recorder.count_of("two")), (3, 2, 1));
        assert!(recorder.saw_by("two", b.id()) && !recorder.saw_by("two", a.id()));
        assert!(counted_attempts(&recorder.attempts()).is_ok());
    }
}
