//! What goes to one stream: what waits, in its order, and the calls that are made of it. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use pubsub_core::Fate;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::entry::EntryId;
use crate::errors::Fault;

/// The most events and bytes of one call; beyond that they go in the next.
const EVENTS_TOGETHER: usize = 250;
const BYTES_TOGETHER: usize = 4 << 20;

/// A second call for a stream goes out before the first is answered if it has so many events.
const WORTH_SENDING: usize = 32;

/// A publish that failed, and what became of each event.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) fault: Fault,
    pub(crate) fates: Vec<Fate>,
}

impl Failed {
    pub(crate) fn all(fault: Fault, fate: Fate, count: usize) -> Self {
        Self { fault, fates: vec![fate; count] }
    }
}

type Published = Result<Vec<EntryId>, Failed>;

/// Where the outcome of a publish goes.
pub(crate) type Reply = oneshot::Sender<Published>;

/// An outcome on its way. Telling it wakes somebody else's task: that is done without a lock.
#[must_use]
pub(crate) struct Answer(Reply, Published);

impl Answer {
    pub(crate) fn new(to: Reply, outcome: Published) -> Self {
        Self(to, outcome)
    }

    pub(crate) fn tell(self) {
        let _ = self.0.send(self.1); // nobody may be waiting
    }
}

/// Events that go to one stream together.
pub(crate) struct Call {
    pub(crate) stream: Arc<str>,
    /// The number of the first.
    pub(crate) number: u64,
    pub(crate) events: Vec<Bytes>,
    pub(crate) parts: Vec<Part>,
    pub(crate) sent: Instant,
}

/// Which of a job's events are among those of a call.
pub(crate) struct Part {
    pub(crate) job: u64,
    pub(crate) offset: usize,
    pub(crate) count: usize,
}

/// A job that was begun.
pub(crate) struct Open {
    pub(crate) reply: Reply,
    pub(crate) claimed: Arc<AtomicBool>,
    pub(crate) ids: Vec<EntryId>,
    pub(crate) fates: Vec<Fate>,
    /// How many of its events have gone out, and how many have their fate.
    pub(crate) sent: usize,
    pub(crate) settled: usize,
    pub(crate) fault: Option<Fault>,
}

impl Open {
    pub(crate) fn answer(self) -> Answer {
        let outcome = match self.fault {
            None => Ok(self.ids),
            Some(fault) => Err(Failed { fault, fates: self.fates }),
        };
        Answer::new(self.reply, outcome)
    }
}

/// What goes to one stream.
#[derive(Default)]
pub(crate) struct Lane {
    /// Jobs, and what of them has not gone out; and how much that is.
    pub(crate) waiting: VecDeque<(u64, VecDeque<Bytes>)>,
    pub(crate) events: usize,
    /// Calls that have no outcome yet, and whether no other may join them.
    pub(crate) on_their_way: usize,
    pub(crate) alone: bool,
    /// The greatest number that was certainly added.
    pub(crate) added: u64,
}

impl Lane {
    pub(crate) fn may_send(&self, on_their_way: usize) -> bool {
        self.events > 0
            && !self.alone
            && self.on_their_way < on_their_way
            && (self.on_their_way == 0 || self.events >= WORTH_SENDING)
    }

    /// The next events that go together; none if whoever handed them in has given up.
    pub(crate) fn next_call(&mut self, stream: &Arc<str>, open: &mut BTreeMap<u64, Open>, next: &mut u64) -> Option<Call> {
        let mut call =
            Call { stream: stream.clone(), number: *next, events: Vec::new(), parts: Vec::new(), sent: Instant::now() };
        let mut bytes = 0;
        while let Some((job, events)) = self.waiting.front_mut() {
            // Nothing is claimed that this call has no room for.
            let first = events.front().map_or(0, Bytes::len);
            if call.events.len() == EVENTS_TOGETHER || (bytes > 0 && bytes + first > BYTES_TOGETHER) {
                break;
            }
            let Some(of_job) = open.get_mut(job).filter(|job| job.sent > 0 || !job.claimed.swap(true, Ordering::AcqRel)) else {
                self.events -= events.len();
                open.remove(job);
                self.waiting.pop_front();
                continue;
            };
            let offset = of_job.sent;
            while let Some(event) = events.front()
                && call.events.len() < EVENTS_TOGETHER
                && (bytes == 0 || bytes + event.len() <= BYTES_TOGETHER)
            {
                bytes += event.len();
                call.events.extend(events.pop_front());
                of_job.sent += 1;
            }
            if of_job.sent > offset {
                call.parts.push(Part { job: *job, offset, count: of_job.sent - offset });
            }
            if !events.is_empty() {
                break;
            }
            self.waiting.pop_front();
        }
        self.events -= call.events.len();
        *next += call.events.len() as u64;
        (!call.events.is_empty()).then_some(call)
    }

    /// Forgets what of a job has not gone out, and returns how much that was.
    pub(crate) fn forget(&mut self, job: u64) -> usize {
        let forgotten = self.waiting.iter().filter(|(of, _)| *of == job).map(|(_, events)| events.len()).sum();
        self.waiting.retain(|(of, _)| *of != job);
        self.events -= forgotten;
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::add::ON_THEIR_WAY;

    /// Jobs of so many events of these sizes, all for one stream.
    fn lane(jobs: &[&[usize]]) -> (Lane, BTreeMap<u64, Open>) {
        let (mut lane, mut open) = (Lane::default(), BTreeMap::new());
        for (number, sizes) in jobs.iter().enumerate() {
            let events: VecDeque<_> = sizes.iter().map(|size| Bytes::from(vec![0; *size])).collect();
            let (ids, fates) = (vec![EntryId::ZERO; events.len()], vec![Fate::NotSent; events.len()]);
            let (reply, claimed) = (oneshot::channel().0, Arc::default());
            open.insert(number as u64, Open { reply, claimed, ids, fates, sent: 0, settled: 0, fault: None });
            lane.events += events.len();
            lane.waiting.push_back((number as u64, events));
        }
        (lane, open)
    }

    /// Its number, how many events it has, and of which jobs: the job, from where, how many.
    type Shape = (u64, usize, Vec<(u64, usize, usize)>);

    fn calls(lane: &mut Lane, open: &mut BTreeMap<u64, Open>) -> Vec<Shape> {
        let (stream, mut next) = ("s".into(), 100);
        std::iter::from_fn(|| lane.next_call(&stream, open, &mut next))
            .map(|call| {
                let parts = call.parts.iter().map(|part| (part.job, part.offset, part.count)).collect();
                (call.number, call.events.len(), parts)
            })
            .collect()
    }

    #[test]
    fn what_waits_goes_together_in_order_and_bounded() {
        let (mut one, mut open) = lane(&[&[1, 1], &[1], &[1; EVENTS_TOGETHER]]);
        let rest = EVENTS_TOGETHER - 3;
        let expected = [
            (100, EVENTS_TOGETHER, vec![(0, 0, 2), (1, 0, 1), (2, 0, rest)]),
            (100 + EVENTS_TOGETHER as u64, 3, vec![(2, rest, 3)]),
        ];
        assert_eq!((calls(&mut one, &mut open), one.events), (expected.to_vec(), 0));
        let (mut large, mut open) = lane(&[&[BYTES_TOGETHER + 1, 1]]);
        assert_eq!(calls(&mut large, &mut open), [(100, 1, vec![(0, 0, 1)]), (101, 1, vec![(0, 1, 1)])], "one is always taken");
        // What does not fit any more is neither claimed nor forgotten.
        let (mut full, mut open) = lane(&[&[1; EVENTS_TOGETHER], &[1]]);
        let second = 100 + EVENTS_TOGETHER as u64;
        let expected = [(100, EVENTS_TOGETHER, vec![(0, 0, EVENTS_TOGETHER)]), (second, 1, vec![(1, 0, 1)])];
        assert_eq!(calls(&mut full, &mut open), expected);
        let (mut heavy, mut open) = lane(&[&[BYTES_TOGETHER - 1], &[BYTES_TOGETHER - 1]]);
        assert_eq!(calls(&mut heavy, &mut open), [(100, 1, vec![(0, 0, 1)]), (101, 1, vec![(1, 0, 1)])]);
    }

    #[test]
    fn what_was_given_up_is_not_sent() {
        let (mut lane, mut open) = lane(&[&[1], &[1, 1], &[1]]);
        open[&1].claimed.store(true, Ordering::Release);
        assert_eq!(calls(&mut lane, &mut open), [(100, 2, vec![(0, 0, 1), (2, 0, 1)])]);
        assert_eq!((open.contains_key(&1), lane.events), (false, 0));
    }

    #[test]
    fn a_few_more_wait_for_what_is_on_its_way() {
        let (mut lane, _) = lane(&[&[1; WORTH_SENDING - 1]]);
        assert!(lane.may_send(ON_THEIR_WAY));
        lane.on_their_way = 1;
        assert!(!lane.may_send(ON_THEIR_WAY));
        lane.events = WORTH_SENDING;
        assert!(lane.may_send(ON_THEIR_WAY));
        lane.on_their_way = ON_THEIR_WAY;
        assert!(!lane.may_send(ON_THEIR_WAY));
    }
}
