//! When something is due, and what becomes of the times that nobody was there for. Knows no clock and no bus.

use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// A schedule. Times are milliseconds since 1970.
pub(crate) struct Schedule {
    pub(crate) id: String,
    pub(crate) when: When,
    pub(crate) missed: Missed,
}

pub(crate) enum When {
    /// At the multiples of an interval, so that all schedulers mean the same times.
    Every(Duration),
    Cron(Box<Cron>),
}

/// What becomes of the times that passed while no scheduler was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missed {
    /// Each of them is fired, late.
    FireAll,
    /// The latest of them is fired, for all.
    FireLatest,
    /// None of them is.
    Skip,
}

impl When {
    /// Reads a cron expression, with seconds if it has six fields.
    pub(crate) fn cron(expression: &str) -> Result<Self, croner::errors::CronError> {
        Ok(Self::Cron(Box::new(CronParser::builder().seconds(Seconds::Optional).build().parse(expression)?)))
    }

    /// The first due time after this one; none if there is no further.
    fn next(&self, after: i64) -> Option<i64> {
        match self {
            Self::Every(interval) => {
                let interval = i64::try_from(interval.as_millis()).ok()?.max(1);
                Some((after / interval + 1) * interval)
            }
            Self::Cron(cron) => {
                let after = Timestamp::from_millisecond(after).ok()?.to_zoned(TimeZone::UTC);
                Some(cron.find_next_occurrence(&after, false).ok()?.timestamp().as_millisecond())
            }
        }
    }

    /// The due times after this one, for ever.
    pub(crate) fn after(&self, after: i64) -> impl Iterator<Item = i64> {
        std::iter::successors(self.next(after), |due| self.next(*due))
    }
}

impl Missed {
    /// Which of the missed times are fired all the same.
    pub(crate) fn choose(self, missed: &[i64]) -> &[i64] {
        match self {
            Self::FireAll => missed,
            Self::FireLatest => &missed[missed.len().saturating_sub(1)..],
            Self::Skip => &[],
        }
    }
}
