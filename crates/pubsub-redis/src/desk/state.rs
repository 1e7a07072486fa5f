//! How much is wanted, and when something is due: decisions without side effects.

use std::time::Duration;

use tokio::time::Instant;

use super::{Member, State};
use crate::entry::EntryId;

impl State {
    pub(super) fn present(&self) -> impl Iterator<Item = &Member> {
        self.members.values().filter(|member| !member.left)
    }

    /// How much is to be read.
    pub(super) fn wants(&self, room: usize) -> Option<usize> {
        let isolated = self.alone.is_some() || self.isolating.is_some();
        let serves = self.failed.is_none() && self.present().next().is_some();
        if self.claim || self.busy || isolated || self.cold || self.ahead.len() > self.most_ahead / 2 || !serves {
            return None;
        }
        let count = self.most_ahead.saturating_sub(self.ahead.len()).min(room);
        (count > 0).then_some(count)
    }

    /// Reads more ahead if all was taken at once, and less if it had to wait.
    pub(super) fn adapt(&mut self, now: Instant, since: Instant, linger: Duration) {
        self.progress = Some(now);
        let capacity = self.present().map(|member| member.options.prefetch).max().unwrap_or(1);
        if now - since > linger {
            self.most_ahead = (self.most_ahead / 2).max(1);
        } else if self.ahead.is_empty() {
            self.most_ahead = (2 * self.most_ahead).min(capacity);
        }
    }

    pub(super) fn knows(&self, id: EntryId) -> bool {
        let is_held = || self.held.iter().any(|(_, held)| held.remote().is_some_and(|remote| remote.id == id));
        let is_postponed = || self.postponed.iter().any(|(postponed, _, _)| *postponed == id);
        self.ahead.contains_key(&id) || self.dying.contains_key(&id) || is_held() || is_postponed()
    }

    pub(super) fn next_deadline(&mut self, linger: Duration, reclaim: Duration) -> Option<Instant> {
        let holds_any = !self.ahead.is_empty() || !self.held.is_empty() || !self.dying.is_empty() || !self.postponed.is_empty();
        if holds_any && self.renew_at.is_none() {
            self.renew_at = Some(Instant::now() + reclaim / 3);
        }
        let lingering = self.progress.filter(|_| !self.ahead.is_empty()).map(|progress| progress + linger);
        [lingering, self.due.next_due(), self.postponed.next_due(), self.hold_due, self.sweep_at, self.renew_at]
            .into_iter()
            .flatten()
            .min()
    }
}
