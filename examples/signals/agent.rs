//! A process in which a conversation's agent can run, one among several.
//!
//! A signal that reaches any of them is told on the conversation's topic, so that all know what is pending. Whoever gets the lease tells
//! so, and waits to hear it: then it has heard all that owners before it were able to tell, such as that a signal is answered. It runs the
//! first that is not, telling what it does under the lease's token. When it is done and the next came from another process, it transfers
//! the lease there; the key is never free in between. If the owner is gone, its lease runs out, and the others have the signal still.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use pubsub_core::{Bus, Capability, Error, Event, LeaseGuard, LeaseProvider, Result, Subscription};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};

use crate::memory::Fence;

/// How long a lease lasts; it is renewed every third of it. The TypeScript system has 15 s; this is short, since the proof waits for it.
const TTL: Duration = Duration::from_secs(2);

/// How long an agent waits for a bus that is away.
const PAUSE: Duration = Duration::from_millis(100);

/// How long it waits to hear of its own lease before it begins anew.
const HEARD: Duration = Duration::from_secs(10);

/// How many signals that were answered are kept in mind.
const DONE_KEPT: usize = 1000;

/// Where everybody hears what becomes of a conversation. Its key is encoded as `encodeURIComponent` does.
pub(crate) fn topic(key: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.!~*'()".contains(&byte);
    let encode = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    format!("agent.thread-stream.{}", key.bytes().map(encode).collect::<String>())
}

/// Where a process is given signals.
pub(crate) fn inbox(agent: &str) -> String {
    format!("agent.inbox.{agent}")
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Signal {
    pub(crate) id: String,
    text: String,
}

/// Whom a lease was transferred to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Next {
    pub(crate) owner: String,
    pub(crate) token: u64,
}

/// What is told on the conversation's topic.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Told {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) source_id: String,
    /// The fencing token of the run's lease.
    pub(crate) token: u64,
    pub(crate) signal: Option<Signal>,
    pub(crate) part: String,
    pub(crate) next: Option<Next>,
}

pub(crate) struct Agent {
    bus: Bus,
    leases: Arc<dyn LeaseProvider>,
    name: String,
    key: String,
}

/// What an agent knows of the conversation.
#[derive(Default)]
struct Known {
    fence: Fence,
    /// The signals to be answered, each with the process that it reached.
    pending: VecDeque<(Signal, String)>,
    done: VecDeque<String>,
}

impl Known {
    /// Takes what was told; whether there may be something to do now.
    fn take(&mut self, told: &Told) -> bool {
        match (told.kind.as_str(), &told.signal) {
            ("signal-enqueued", Some(signal)) => {
                if !self.done.contains(&signal.id) {
                    self.pending.push_back((signal.clone(), told.source_id.clone()));
                }
                true
            }
            (_, signal) if self.fence.admits(told.token) => {
                let completed = signal.as_ref().filter(|_| told.kind == "run-completed");
                completed.inspect(|signal| self.complete(signal)).is_some()
            }
            _ => false, // of an owner that was overtaken
        }
    }

    fn complete(&mut self, signal: &Signal) {
        self.pending.retain(|(pending, _)| pending.id != signal.id);
        self.done.truncate(DONE_KEPT - 1);
        self.done.push_front(signal.id.clone());
    }
}

impl Agent {
    pub(crate) fn new(bus: Bus, name: String, key: &str) -> Result<Self> {
        let leases = bus.leases().ok_or(Error::unsupported(Capability::Leases))?;
        Ok(Self { bus, leases, name, key: key.to_owned() })
    }

    /// Takes part until the bus is closed. If it is away for a while, the run at hand is given up, and its signal answered anew.
    pub(crate) async fn live(&self, mut said: Subscription, mut told: Subscription) -> Result<()> {
        let mut known = Known::default();
        let mut runs = FuturesUnordered::new(); // one at most
        let mut acquired: Option<LeaseGuard> = None; // and not heard of yet
        let mut again = Instant::now();
        loop {
            let (mut look, mut held) = (false, None);
            tokio::select! {
                Some(message) = said.next() => {
                    let message = message?;
                    let signal = message.data::<Signal>()?.into_owned();
                    let enqueued = Told { kind: "signal-enqueued".into(), signal: Some(signal), ..Told::default() };
                    match present(self.tell(enqueued).await)? {
                        Some(()) => message.done(),
                        None => message.retry(),
                    };
                }
                Some(message) = told.next() => {
                    let message = message?;
                    let told = message.data::<Told>()?;
                    look = known.take(&told);
                    let is_own = |guard: &LeaseGuard| told.source_id == self.name && told.token == guard.token();
                    if told.kind == "lease-acquired" && acquired.as_ref().is_some_and(is_own) {
                        held = acquired.take();
                        look = true;
                    }
                }
                Some(ended) = runs.next() => {
                    // None: the lease was lost. Whoever has it now answers the signal anew.
                    if let Some((guard, signal)) = present(ended)?.flatten() {
                        held = present(self.go_on(&mut known, guard, signal).await)?.flatten();
                    }
                    look = true;
                }
                () = sleep_until(again), if !known.pending.is_empty() && runs.is_empty() => {
                    acquired = None;
                    look = true;
                }
                else => return Ok(()),
            }
            if !look || !runs.is_empty() || acquired.is_some() {
                continue;
            }
            let Some((signal, _)) = known.pending.front() else { continue };
            if let Some(guard) = held {
                runs.push(self.run(guard, signal.clone()));
                continue;
            }
            again = Instant::now() + PAUSE;
            match present(LeaseGuard::acquire(self.leases.clone(), &self.key, &self.name, TTL).await)? {
                Some(Ok(guard)) => {
                    let told = Told { kind: "lease-acquired".into(), token: guard.token(), ..Told::default() };
                    if present(self.tell(told).await)?.is_some() {
                        (acquired, again) = (Some(guard), Instant::now() + HEARD);
                    }
                }
                Some(Err(other)) => again = Instant::now() + other.remaining,
                None => {}
            }
        }
    }

    /// Answers a signal; none if the lease was lost meanwhile.
    async fn run(&self, guard: LeaseGuard, signal: Signal) -> Result<Option<(LeaseGuard, Signal)>> {
        let token = guard.token();
        self.tell(Told { kind: "run-registered".into(), token, signal: Some(signal.clone()), ..Told::default() }).await?;
        let part = async |part: &str| {
            self.tell(Told { kind: "stream-part".into(), token, part: part.into(), ..Told::default() }).await
        };
        for word in ["Let", "me", "see"] {
            if !guard.is_held() {
                return Ok(None);
            }
            if signal.text == "think hard" {
                part("thinking").await?;
                sleep(Duration::from_millis(300)).await;
            }
            sleep(Duration::from_millis(20)).await;
            // It may be stopped right here, for as long as it likes. What it writes then bears the old token.
            part(word).await?;
        }
        Ok(guard.is_held().then_some((guard, signal)))
    }

    /// Tells that a signal is answered. The lease goes to whom the next one reached; if that is here, it is kept.
    async fn go_on(&self, known: &mut Known, guard: LeaseGuard, signal: Signal) -> Result<Option<LeaseGuard>> {
        let next = known.pending.iter().find(|(pending, _)| pending.id != signal.id).cloned();
        let completed =
            Told { kind: "run-completed".into(), token: guard.token(), signal: Some(signal.clone()), ..Told::default() };
        let kept = match next {
            Some((_, source)) if source == self.name => {
                self.tell(completed).await?;
                Some(guard)
            }
            Some((_, source)) => {
                // First the lease, then the word: who hears it finds the lease to be its own.
                let next = guard.transfer(&source, TTL).await?.map(|lease| Next { owner: lease.owner, token: lease.token });
                self.tell(Told { next, ..completed }).await?;
                None
            }
            None => {
                self.tell(completed).await?;
                guard.release().await?;
                None
            }
        };
        known.complete(&signal); // now that all have been told
        Ok(kept)
    }

    async fn tell(&self, told: Told) -> Result<()> {
        let told = Told { source_id: self.name.clone(), ..told };
        // Of a conversation the order counts; some buses keep it of runs alone.
        let event = Event::new(told.kind.clone()).with_run_id(&self.key).with_data(told);
        self.bus.publish(topic(&self.key), event).await?;
        Ok(())
    }
}

/// What came of it; none if the bus is away just now.
fn present<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Err(error) if error.is_retryable() => Ok(None),
        outcome => outcome.map(Some),
    }
}
