//! Settlements on their way to the server: what was recorded goes out in batches, over the connection that writes.
//!
//! Acknowledgements of what is surely still held are plain XACKs, many in one. Everything else goes through a script that looks who
//! holds an entry first: a member that was paused for too long takes nothing away from whoever has it now.

use std::sync::{Arc, LazyLock};

use fred::types::Value;
use pubsub_core::machinery::{OpenSettlement, Pause, SettleQueue};
use pubsub_core::{Group, Settled};
use tokio::time::Instant;

use crate::entry::EntryId;
use crate::errors::Fault;
use crate::keys::NOBODY;
use crate::link::{Cmd, Link, Script};
use crate::publish::millis;
use crate::reply;

/// How many settlements go out together.
const TOGETHER: usize = 500;

static SETTLE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/settle.lua")));

/// A group of a topic.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) stream: Arc<str>,
    pub(crate) group: Group,
}

/// What is to become of an entry.
#[derive(Debug, Clone)]
pub(crate) struct Notice {
    pub(crate) place: Arc<Place>,
    pub(crate) id: EntryId,
    /// How often the server had delivered it when it was taken.
    pub(crate) count: u64,
    pub(crate) what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// It is done. Until then it is certainly held.
    Done { held_until: Instant },
    /// It is anybody's, from then on, and counts as delivered so often.
    Free { due: Instant, count: u64 },
    /// It is kept for longer than the server's idle clock can say.
    Keep,
}

/// What a script answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    Anothers,
    Gone,
}

/// The words that the script takes for one entry.
fn words(call: Cmd, what: &'static str, id: EntryId, [count, counts, idle]: [u64; 3]) -> Cmd {
    call.arg(what).arg(id.to_string()).number(count).number(counts).number(idle)
}

/// How long an entry is to count as idle, for whoever takes over what has been idle for `reclaim` to find it at its time.
fn idle_for(due: Instant, now: Instant, reclaim: std::time::Duration) -> u64 {
    millis(reclaim.saturating_sub(due.saturating_duration_since(now)))
}

/// Who settles, and for how long silent members are waited for.
#[derive(Debug, Clone)]
pub(crate) struct Settler {
    pub(crate) link: Arc<Link>,
    pub(crate) consumer: Arc<str>,
    pub(crate) reclaim: std::time::Duration,
}

impl Settler {
    fn call(&self, place: &Place) -> Cmd {
        SETTLE.call(&[&place.stream]).arg(place.group.as_str()).arg(&*self.consumer).arg(NOBODY)
    }

    async fn answers(&self, call: Cmd) -> Result<Vec<Answer>, Fault> {
        let answers = reply::array(self.link.eval(&SETTLE, call).await?)?;
        let answer = |value: &Value| match reply::number(value)? {
            1 => Ok(Answer::Done),
            0 => Ok(Answer::Anothers),
            _ => Ok(Answer::Gone),
        };
        answers.iter().map(answer).collect()
    }

    /// Says that these are held still. Entries come with how often they were delivered.
    pub(crate) async fn keep(&self, place: &Place, held: &[(EntryId, u64)]) -> Result<Vec<Answer>, Fault> {
        let mut answers = Vec::with_capacity(held.len());
        for some in held.chunks(TOGETHER) {
            let call = some.iter().fold(self.call(place), |call, (id, count)| words(call, "keep", *id, [*count, 0, 0]));
            answers.extend(self.answers(call).await?);
        }
        Ok(answers)
    }

    /// Sends what is recorded until the future is dropped.
    pub(crate) async fn run(self, notices: SettleQueue<Notice>) {
        loop {
            let batch = notices.next_batch(TOGETHER).await;
            let mut places: Vec<(Arc<Place>, Vec<OpenSettlement<Notice>>)> = Vec::new();
            for open in batch {
                let place = &open.what().place;
                match places.iter_mut().find(|(known, _)| Arc::ptr_eq(known, place)) {
                    Some((_, of_place)) => of_place.push(open),
                    None => places.push((place.clone(), vec![open])),
                }
            }
            let sending = places.iter_mut().map(|(place, batch)| self.send(place, std::mem::take(batch)));
            futures::future::join_all(sending).await;
        }
    }

    async fn send(&self, place: &Place, batch: Vec<OpenSettlement<Notice>>) {
        let now = Instant::now();
        let is_held = |open: &OpenSettlement<Notice>| matches!(open.what().what, What::Done { held_until } if now < held_until);
        let (plain, careful): (Vec<_>, Vec<_>) = batch.into_iter().partition(is_held);
        futures::join!(self.acknowledge(place, plain), self.settle(place, careful, false));
    }

    async fn acknowledge(&self, place: &Place, batch: Vec<OpenSettlement<Notice>>) {
        if batch.is_empty() {
            return;
        }
        let command = Cmd::new("XACK").key(&place.stream).arg(place.group.as_str());
        let command = batch.iter().fold(command, |command, open| command.arg(open.what().id.to_string()));
        match self.link.call(command).await {
            Ok(count) if count.as_u64() == Some(batch.len() as u64) => {
                batch.into_iter().for_each(|open| open.answer(Settled::Done));
            }
            // Some were not pending any more: which, nobody says.
            Ok(_) => drop(batch),
            Err(fault) if fault.is("NOGROUP") || !fault.is_temporary() => drop(batch),
            Err(_) => self.settle(place, batch, true).await,
        }
    }

    /// Settles entry by entry. If some of it may have been done before, what is not pending any more is what became of that.
    async fn settle(&self, place: &Place, batch: Vec<OpenSettlement<Notice>>, mut again: bool) {
        if batch.is_empty() {
            return;
        }
        let mut pause = Pause::new();
        let answers = loop {
            let now = Instant::now();
            let call = batch.iter().fold(self.call(place), |call, open| {
                let Notice { id, count, what, .. } = open.what();
                match what {
                    What::Done { .. } => words(call, "done", *id, [*count, 0, 0]),
                    What::Free { due, count: counts } => {
                        words(call, "free", *id, [*count, *counts, idle_for(*due, now, self.reclaim)])
                    }
                    What::Keep => words(call, "keep", *id, [*count, 0, 0]),
                }
            });
            match self.answers(call).await {
                Ok(answers) => break answers,
                Err(fault) if fault.is_temporary() => again |= fault.is_unknown(),
                Err(fault) => {
                    tracing::warn!(stream = %place.stream, group = %place.group, %fault, "settlements were refused");
                    return;
                }
            }
            tokio::time::sleep(pause.step()).await;
        };
        for (open, answer) in batch.into_iter().zip(answers) {
            let done = matches!(open.what().what, What::Done { .. });
            open.answer(match answer {
                Answer::Done => Settled::Done,
                Answer::Gone if done && again => Settled::Done,
                Answer::Gone | Answer::Anothers => Settled::TooLate,
            });
        }
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_back_off_is_kept_in_the_idle_clock() {
        let (now, reclaim) = (Instant::now(), Duration::from_secs(60));
        let idle = |due: u64| idle_for(now + Duration::from_secs(due), now, reclaim);
        assert_eq!((idle(0), idle(10), idle(60), idle(3600)), (60_000, 50_000, 0, 0));
    }
}
