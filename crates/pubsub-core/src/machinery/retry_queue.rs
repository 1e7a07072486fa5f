//! What waits for its back-off to end.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::mem;

use tokio::time::Instant;

/// A queue by due time, first in first out among equals. It has no clock: it is told the time.
#[derive(Debug)]
pub struct RetryQueue<T> {
    heap: BinaryHeap<Waiting<T>>,
    next: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    due: Instant,
    number: u64,
    item: T,
}

impl<T> Default for RetryQueue<T> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), next: 0 }
    }
}

impl<T> RetryQueue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an item that is due then.
    pub fn push(&mut self, due: Instant, item: T) {
        self.heap.push(Waiting { due, number: self.next, item });
        self.next += 1;
    }

    /// When the next item is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.heap.peek().map(|waiting| waiting.due)
    }

    /// Takes the next item that is due by now.
    pub fn pop_due(&mut self, now: Instant) -> Option<T> {
        if self.next_due()? > now {
            return None;
        }
        self.heap.pop().map(|waiting| waiting.item)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }

    /// Forgets those that do not pass.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.heap.retain(|waiting| keep(&waiting.item));
        self.heap.shrink_to(2 * self.heap.len());
    }

    /// Takes out those for which this is true, in no order.
    pub fn extract(&mut self, mut take: impl FnMut(&T) -> bool) -> Vec<T> {
        let (taken, left): (Vec<_>, Vec<_>) = mem::take(&mut self.heap).into_iter().partition(|waiting| take(&waiting.item));
        self.heap = left.into();
        taken.into_iter().map(|waiting| waiting.item).collect()
    }

    /// All that wait, in no order.
    pub fn into_items(self) -> impl Iterator<Item = T> {
        self.heap.into_iter().map(|waiting| waiting.item)
    }

    /// All that wait, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.heap.iter().map(|waiting| &waiting.item)
    }
}

impl<T> PartialEq for Waiting<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<T> Eq for Waiting<T> {}

impl<T> PartialOrd for Waiting<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Waiting<T> {
    /// Reversed: `BinaryHeap` gives the greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.due, other.number).cmp(&(self.due, self.number))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn gives_the_earliest_first_and_equals_in_order() {
        let now = Instant::now();
        let at = |millis| now + Duration::from_millis(millis);
        let mut queue = RetryQueue::new();
        for (millis, item) in [(20, 'c'), (10, 'a'), (10, 'b')] {
            queue.push(at(millis), item);
        }
        assert_eq!((queue.next_due(), queue.pop_due(at(9))), (Some(at(10)), None));
        assert_eq!([queue.pop_due(at(30)), queue.pop_due(at(30)), queue.pop_due(at(30))], [Some('a'), Some('b'), Some('c')]);
    }
}
