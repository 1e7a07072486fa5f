//! What each client was answered, so that a call said again is not carried out again.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::protocol::{Answer, ClientId};

/// How many answers are kept for one client: more calls than an honest one leaves unanswered.
const MAX_ANSWERS: usize = 1 << 20;

/// How long a client that is gone is remembered, in milliseconds: it may merely have been stopped, and say again what it said.
const REMEMBERED: u64 = 3_600_000;

/// How many clients that are gone are remembered.
const MAX_GONE: usize = 10_000;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Clients {
    clients: BTreeMap<ClientId, Answers>,
    /// Those that are gone, and since when.
    gone: VecDeque<(u64, ClientId)>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Answers {
    /// Its client has had the answers to all numbers below.
    below: u64,
    /// The answers it may still want. A number that is not here was not carried out.
    answers: BTreeMap<u64, Answer>,
    gone_since: Option<u64>,
}

impl Clients {
    pub(super) fn answered(&self, client: ClientId, number: u64) -> Option<Answer> {
        let answers = self.clients.get(&client)?;
        // Nobody asks again what was answered; should somebody, nothing happens twice.
        if number < answers.below { Some(Answer::Done) } else { answers.answers.get(&number).cloned() }
    }

    pub(super) fn remember(&mut self, client: ClientId, number: u64, below: u64, answer: Answer, now: u64) {
        let answers = self.clients.entry(client).or_default();
        answers.gone_since = None;
        answers.answers.insert(number, answer);
        answers.below = answers.below.max(below);
        while let Some(first) = answers.answers.first_entry()
            && (*first.key() < answers.below || answers.answers.len() > MAX_ANSWERS)
        {
            answers.answers.pop_first();
        }
        self.forget_old(now);
    }

    pub(super) fn present(&self) -> impl Iterator<Item = ClientId> {
        self.clients.iter().filter(|(_, answers)| answers.gone_since.is_none()).map(|(client, _)| *client)
    }

    pub(super) fn gone(&mut self, client: ClientId, now: u64) {
        if let Some(answers) = self.clients.get_mut(&client) {
            answers.gone_since = Some(now);
            self.gone.push_back((now, client));
        }
        self.forget_old(now);
    }

    fn forget_old(&mut self, now: u64) {
        while let Some((since, client)) = self.gone.front().copied()
            && (since + REMEMBERED <= now || self.gone.len() > MAX_GONE)
        {
            self.gone.pop_front();
            if self.clients.get(&client).is_some_and(|answers| answers.gone_since == Some(since)) {
                self.clients.remove(&client);
            }
        }
    }
}
