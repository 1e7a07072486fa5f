//! The conversation as everybody sees it who listens: what was answered, and whether the rules were kept.

use std::collections::BTreeMap;

use pubsub_core::{Event, Result};

use crate::agent::{Next, Told};

/// Remembers the greatest token it has seen, and admits nothing below: whoever was overtaken cannot write any more.
#[derive(Debug, Default)]
pub(crate) struct Fence(u64);

impl Fence {
    pub(crate) fn admits(&mut self, token: u64) -> bool {
        self.0 = self.0.max(token);
        token == self.0
    }
}

#[derive(Default)]
pub(crate) struct Memory {
    fence: Fence,
    /// The token of the run that is going on.
    open: Option<u64>,
    promised: Option<Next>,
    answers: BTreeMap<String, usize>,
    /// Who was seen thinking last.
    pub(crate) thinking: Option<String>,
    pub(crate) overlaps: usize,
    pub(crate) handed_over: usize,
    pub(crate) gaps: usize,
    pub(crate) refused: usize,
}

impl Memory {
    pub(crate) fn take(&mut self, event: &Event) -> Result<()> {
        let told = event.data::<Told>()?;
        if told.kind != "signal-enqueued" && !self.fence.admits(told.token) {
            self.refused += 1;
            return Ok(());
        }
        match told.kind.as_str() {
            "run-registered" => {
                // A run of a greater token takes the place of one whose owner was lost.
                self.overlaps += usize::from(self.open.is_some_and(|open| open >= told.token));
                self.open = Some(told.token);
                if let Some(next) = self.promised.take() {
                    let as_promised = next.owner == told.source_id && next.token == told.token;
                    *(if as_promised { &mut self.handed_over } else { &mut self.gaps }) += 1;
                }
            }
            "stream-part" if told.part == "thinking" => self.thinking = Some(told.source_id.clone()),
            "run-completed" => {
                (self.open, self.promised) = (None, told.next.clone());
                if let Some(signal) = &told.signal {
                    *self.answers.entry(signal.id.clone()).or_default() += 1;
                }
            }
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn answered(&self) -> usize {
        self.answers.len()
    }

    pub(crate) fn answered_once(&self) -> usize {
        self.answers.values().filter(|times| **times == 1).count()
    }
}
