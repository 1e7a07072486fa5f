//! Adding the events of one call to a stream, and finding out what became of them.
//!
//! A script does it, which also looks after what the stream keeps: all is added or nothing. An event that goes alone needs none, if the
//! stream is there and was looked after a short time ago.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fred::types::Value;
use pubsub_core::machinery::Pause;
use tokio::time::Instant;

use crate::RedisBuilder;
use crate::entry::EntryId;
use crate::errors::Fault;
use crate::lane::Call;
use crate::link::{Cmd, Link, Script};
use crate::publish::millis;
use crate::reply;

/// How many calls for one stream are on their way.
pub(crate) const ON_THEIR_WAY: usize = 4;

/// How long it is enough that the script has renewed a stream's time to live (a 64th of that, at most), and of how many streams that is
/// known.
const RENEWED_AFTER: Duration = Duration::from_secs(60);
const RENEWED_MOST: usize = 4096;

/// How far the server's clock may jump within a publish whose outcome is unknown.
const CLOCK_SLACK: Duration = Duration::from_secs(10);

static ADD: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/add.lua")));
static FIND_OR_ADD: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("scripts/find.lua"), include_str!("scripts/add.lua"))));

pub(crate) type Outcome = Result<Vec<EntryId>, Fault>;

/// What is kept, as the script takes it; 0 for no bound.
pub(crate) struct Retention {
    max_len: u64,
    max_age: Option<u64>,
    idle_ttl: u64,
}

impl Retention {
    pub(crate) fn new(options: &RedisBuilder) -> Self {
        let idle_ttl = options.idle_ttl.map_or(0, millis);
        Self { max_len: options.max_len.unwrap_or(0), max_age: options.max_age.map(millis), idle_ttl }
    }

    /// The least time that is kept, by this machine's clock: off by as much as the clocks disagree.
    fn least(&self) -> u64 {
        let now = || millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
        self.max_age.map_or(0, |age| now().saturating_sub(age))
    }
}

/// What calls need.
pub(crate) struct Shared {
    pub(crate) link: Arc<Link>,
    pub(crate) publisher: Arc<str>,
    pub(crate) retention: Retention,
    pub(crate) patience: Duration,
}

impl Shared {
    /// How many calls for one stream go out before the first is answered. In a cluster its key may move, and calls that follow it
    /// could overtake each other.
    pub(crate) fn on_their_way(&self) -> usize {
        if self.link.cluster().is_some() { 1 } else { ON_THEIR_WAY }
    }

    /// Who adds the first event of a call.
    fn by(&self, call: &Call) -> String {
        format!("{}:{}", self.publisher, call.number)
    }

    fn words(&self, script: &Script, call: &Call) -> Cmd {
        let Retention { max_len, idle_ttl, .. } = self.retention;
        let words = script.call(&[&*call.stream]).arg(self.by(call));
        let words = words.number(max_len).number(self.retention.least()).number(idle_ttl);
        call.events.iter().fold(words, |words, event| words.arg(event.clone()))
    }

    /// Adds the events of a call, by the script's hash or, if the server may not know it, in full.
    pub(crate) async fn add(&self, call: &Call, in_full: bool) -> Outcome {
        let words = self.words(&ADD, call);
        let words = if in_full { ADD.in_full(words) } else { words };
        ids(self.link.call(words).await?, call.events.len())
    }

    /// Adds the one event of a call to a stream that is there, which costs the server a third of what the script does; where there is none,
    /// by the script. Nothing else may be on its way to the stream.
    pub(crate) async fn add_alone(&self, call: &Call) -> Outcome {
        let max_len = self.retention.max_len;
        let mut adding = Cmd::new("XADD").key(&call.stream).arg("NOMKSTREAM");
        if max_len > 0 {
            adding = adding.arg("MAXLEN").arg("~").number(max_len);
        }
        let adding = call.events.iter().fold(adding.arg("*"), |adding, event| adding.arg("event").arg(event.clone()));
        let adding = adding.arg("p").arg(self.by(call));
        match self.link.call(adding).await? {
            Value::Null => ids(self.link.eval(&ADD, self.words(&ADD, call)).await?, 1),
            id => Ok(vec![reply::id(&id)?]),
        }
    }

    /// Adds the events of a call in a cluster, by a script that its node may not know. It waits for its own node alone: nothing else is on
    /// its way to the stream.
    pub(crate) async fn add_in_cluster(&self, call: &Call) -> Outcome {
        match self.link.eval(&ADD, self.words(&ADD, call)).await.and_then(|answer| ids(answer, call.events.len())) {
            // A key that has no node just now is going to have one.
            Err(fault) if fault.is_unknown() || fault.is_elsewhere() => self.add_missing(call, None).await,
            outcome => outcome,
        }
    }

    /// Finds out what became of a call, and adds what it did not, for as long as there is patience. What the server called the connection
    /// that it was sent on is given; the connections to the nodes of a cluster see to the end of those before them by themselves.
    pub(crate) async fn add_missing(&self, call: &Call, mut sent_on: Option<&mut i64>) -> Outcome {
        let (until, mut pause) = (call.sent + self.patience, Pause::new());
        loop {
            let fault = match self.try_add_missing(call, sent_on.as_deref_mut()).await {
                Ok(ids) => return Ok(ids),
                // Said of this attempt: what became of the first is as unknown as before.
                Err(fault) if fault.is_temporary() => Fault::Unknown(fault.to_string()),
                Err(fault) => return Err(Fault::Unknown(fault.to_string())), // and stays so: the others need not wait for it
            };
            let next = Instant::now() + pause.step();
            if next >= until {
                return Err(fault);
            }
            tokio::time::sleep_until(next).await;
        }
    }

    async fn try_add_missing(&self, call: &Call, sent_on: Option<&mut i64>) -> Outcome {
        if let Some(known) = sent_on {
            let id = self.link.id().await?;
            if id != *known {
                // Refused, if it is not allowed or long gone: then what is still on its way may come behind the script.
                let _ = self.link.call(Cmd::new("CLIENT").arg("KILL").arg("ID").arg(*known)).await;
                *known = id;
            }
        }
        self.find_or_add(call).await
    }

    async fn find_or_add(&self, call: &Call) -> Result<Vec<EntryId>, Fault> {
        let words = self.words(&FIND_OR_ADD, call).number(millis(call.sent.elapsed() + CLOCK_SLACK));
        ids(self.link.eval(&FIND_OR_ADD, words).await?, call.events.len())
    }
}

/// All ids, where the first and the last may stand for those between them.
fn ids(answer: Value, count: usize) -> Result<Vec<EntryId>, Fault> {
    let ids = reply::array(answer)?.iter().map(reply::id).collect::<Result<Vec<_>, _>>()?;
    let ids = match ids[..] {
        [first, last] if count != 2 => first.to(last, count).unwrap_or(ids),
        _ => ids,
    };
    if ids.len() == count { Ok(ids) } else { Err(Fault::Nonsense("another number of entries was added")) }
}

/// When the script last looked after which stream: it need not for every event that goes alone.
pub(crate) struct Renewed {
    last: HashMap<Arc<str>, Instant>,
    /// How long that is enough; none if the script has to see to every event.
    within: Option<Duration>,
}

impl Renewed {
    pub(crate) fn new(&Retention { max_age, idle_ttl, .. }: &Retention, in_cluster: bool) -> Self {
        // In a cluster a key may move.
        let is_needed = max_age.is_some() || in_cluster;
        let within = if idle_ttl == 0 { RENEWED_AFTER } else { RENEWED_AFTER.min(Duration::from_millis(idle_ttl) / 64) };
        Self { last: HashMap::new(), within: (!is_needed).then_some(within) }
    }

    pub(crate) fn is_fresh(&self, stream: &str) -> bool {
        self.within.is_some_and(|within| self.last.get(stream).is_some_and(|last| last.elapsed() < within))
    }

    pub(crate) fn note(&mut self, stream: &Arc<str>, at: Instant) {
        let Some(within) = self.within else { return };
        if self.last.len() >= RENEWED_MOST && !self.last.contains_key(stream) {
            self.last.retain(|_, last| last.elapsed() < within);
            if self.last.len() >= RENEWED_MOST {
                self.last.clear();
            }
        }
        self.last.insert(stream.clone(), at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_script_looks_after_a_stream_now_and_then() {
        let renewed = |max_age, idle_ttl, in_cluster| Renewed::new(&Retention { max_len: 0, max_age, idle_ttl }, in_cluster);
        let (s, mut week) = (Arc::from("s"), renewed(None, 7 * 24 * 3_600_000, false));
        assert!(!week.is_fresh(&s));
        week.note(&s, Instant::now());
        assert!(week.is_fresh(&s) && !week.is_fresh("t"));
        tokio::time::advance(RENEWED_AFTER).await;
        assert!(!week.is_fresh(&s));
        let mut second = renewed(None, 1000, false);
        second.note(&s, Instant::now());
        tokio::time::advance(Duration::from_millis(16)).await;
        assert!(!second.is_fresh(&s), "a time to live that is short is renewed more often");
        for mut never in [renewed(Some(1), 0, false), renewed(None, 0, true)] {
            never.note(&s, Instant::now());
            assert!(!never.is_fresh(&s));
        }
        for number in 0..2 * RENEWED_MOST {
            week.note(&number.to_string().into(), Instant::now());
            assert!(week.last.len() <= RENEWED_MOST);
        }
    }

    #[test]
    fn answers_to_an_addition() {
        let answer = |ids: &[&'static str]| Value::Array(ids.iter().map(|id| Value::from(*id)).collect());
        let all = |texts: &[&str]| texts.iter().map(|text| text.parse::<EntryId>().unwrap()).collect::<Vec<_>>();
        assert_eq!(ids(answer(&["5-1", "5-1"]), 1), Ok(all(&["5-1"])));
        assert_eq!(ids(answer(&["5-1", "6-0"]), 2), Ok(all(&["5-1", "6-0"])));
        assert_eq!(ids(answer(&["5-1", "5-3"]), 3), Ok(all(&["5-1", "5-2", "5-3"])));
        assert_eq!(ids(answer(&["5-1", "5-2", "6-0"]), 3), Ok(all(&["5-1", "5-2", "6-0"])));
        for nonsense in [ids(answer(&["5-1", "5-3"]), 4), ids(answer(&[]), 1), ids(Value::Null, 1), ids("x".into(), 1)] {
            assert!(nonsense.unwrap_err().is_unknown());
        }
    }
}
