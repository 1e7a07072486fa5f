//! Telling operators in measure: what happens again and again is counted, and told every now and then.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How long it is between two events of a kind in the log.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// How often something has happened, and how much of that was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    state: Mutex<(Option<Instant>, u64)>,
}

impl Told {
    /// It has happened so many more times. Returns how often since it was last told, if it is to be told now.
    pub(crate) fn count(&self, more: u64) -> Option<u64> {
        let mut state = self.state.lock();
        let (told, untold) = &mut *state;
        *untold += more;
        if *untold == 0 || told.is_some_and(|told| told.elapsed() < TOLD_EVERY) {
            return None;
        }
        *told = Some(Instant::now());
        Some(std::mem::take(untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_is_told_at_once_and_the_others_together() {
        let told = Told::default();
        assert_eq!((told.count(0), told.count(1), told.count(2), told.count(3)), (None, Some(1), None, None));
        tokio::time::advance(TOLD_EVERY).await;
        assert_eq!((told.count(1), told.count(1)), (Some(6), None));
    }
}
