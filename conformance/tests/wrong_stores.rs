//! Wrong stores, each caught by the properties named for it.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use libtest_mimic::{Arguments, Failed, Trial};
use pubsub_cache::{Generation, InMemoryServerCache, LogPage, ServerCache};
use pubsub_conformance::Outcome;
use pubsub_conformance::stores::{StoreHarness, run};
use pubsub_core::{Deduplication, Event, Payload, ReplayIndex, Result, Topic, TrimFilter};

/// How a store is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    /// Not at all: what the others are measured against.
    Not,
    KeepsDeleted,
    NeverExpires,
    CountsUnderRace,
    WrapsAround,
    ListsBackwards,
    MixesKinds,
    FoldsKeys,
    NumbersFromOne,
    ForgetsMetadata,
    NumbersUnderRace,
    KeepsRepeats,
    KeepsPart,
    IgnoresLimit,
    GoesOnAfterClear,
    ClearsAll,
    NamesNoStore,
    RenumbersTrimmed,
    HidesFloor,
    KeepsHalf,
    LeavesOut,
    ForgetsOnRestart,
}

use Wrong::*;

/// What each is caught by.
const SABOTEURS: &[(Wrong, &[&str])] = &[
    (KeepsDeleted, &["ST-01"]),
    (NeverExpires, &["ST-02"]),
    (CountsUnderRace, &["ST-03"]),
    (WrapsAround, &["ST-04"]),
    (ListsBackwards, &["ST-05"]),
    (MixesKinds, &["ST-06"]),
    (FoldsKeys, &["ST-07"]),
    (NumbersFromOne, &["ST-11"]),
    (ForgetsMetadata, &["ST-11"]),
    (NumbersUnderRace, &["ST-12"]),
    (KeepsRepeats, &["ST-13"]),
    (KeepsPart, &["ST-14"]),
    (IgnoresLimit, &["ST-15"]),
    (GoesOnAfterClear, &["ST-16", "ST-17"]),
    (ClearsAll, &["ST-16"]),
    (NamesNoStore, &["ST-17"]),
    (RenumbersTrimmed, &["ST-18"]),
    (HidesFloor, &["ST-19"]),
    (KeepsHalf, &["ST-20"]),
    (LeavesOut, &["ST-21"]),
    (ForgetsOnRestart, &["ST-22"]),
];

#[derive(Debug)]
struct Store {
    inner: Arc<InMemoryServerCache>,
    how: Wrong,
}

fn numbered(event: &Arc<Event>, number: impl FnOnce(ReplayIndex) -> ReplayIndex) -> Arc<Event> {
    Arc::new(Event::clone(event).with_index(event.index().map(number)))
}

impl Store {
    fn is(&self, how: Wrong) -> bool {
        self.how == how
    }

    fn key<'a>(&self, key: &'a str) -> &'a str {
        if self.is(FoldsKeys) { key.split(':').next().filter(|key| !key.is_empty()).unwrap_or(key) } else { key }
    }

    /// How the events of an answer are disfigured.
    fn disfigure(&self, events: Vec<Arc<Event>>) -> Vec<Arc<Event>> {
        let disfigured = events.iter().map(|event| match self.how {
            NumbersFromOne => numbered(event, |place| ReplayIndex { index: place.index + 1, ..place }),
            NamesNoStore => numbered(event, |place| ReplayIndex { generation: place.generation & 0xffff_ffff, ..place }),
            ForgetsMetadata => {
                let copy = Event::stamped(event.id().clone(), event.event_type(), event.created_at());
                Arc::new(copy.with_run_id(event.run_id()).with_payload(event.payload().clone()).with_index(event.index()))
            }
            _ => event.clone(),
        });
        disfigured.collect()
    }
}

#[async_trait]
impl ServerCache for Store {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.inner.get(self.key(key)).await
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<()> {
        self.inner.set(self.key(key), value, ttl.filter(|ttl| !self.is(NeverExpires) || ttl.is_zero())).await
    }

    async fn delete(&self, key: &str) -> Result<bool> {
        if self.is(KeepsDeleted) { Ok(self.get(key).await?.is_some()) } else { self.inner.delete(self.key(key)).await }
    }

    async fn increment(&self, key: &str, by: i64, ttl: Option<Duration>) -> Result<i64> {
        match self.how {
            CountsUnderRace => {
                let text = self.inner.get(key).await?.unwrap_or(Bytes::from_static(b"0"));
                tokio::task::yield_now().await;
                let sum = std::str::from_utf8(&text).unwrap_or("0").parse().unwrap_or(0_i64) + by;
                self.inner.set(key, Bytes::from(sum.to_string()), ttl).await?;
                Ok(sum)
            }
            WrapsAround => {
                let text = self.inner.get(key).await?.unwrap_or(Bytes::from_static(b"0"));
                let sum = std::str::from_utf8(&text).unwrap_or("0").parse().unwrap_or(0_i64).wrapping_add(by);
                self.inner.set(key, Bytes::from(sum.to_string()), ttl).await?;
                Ok(sum)
            }
            _ => self.inner.increment(self.key(key), by, ttl).await,
        }
    }

    async fn push(&self, key: &str, value: Bytes, ttl: Option<Duration>) -> Result<u64> {
        if self.is(MixesKinds) && self.inner.get(key).await.is_ok_and(|value| value.is_some()) {
            self.inner.delete(key).await?;
        }
        self.inner.push(self.key(key), value, ttl).await
    }

    async fn range(&self, key: &str, from: u64, limit: usize) -> Result<Vec<Bytes>> {
        let mut values = self.inner.range(self.key(key), from, limit).await?;
        if self.is(ListsBackwards) {
            values.reverse();
        }
        Ok(values)
    }

    async fn append(&self, topic: &Topic, events: &[Arc<Event>]) -> Result<Vec<Arc<Event>>> {
        let kept = match self.how {
            NumbersUnderRace | KeepsHalf | KeepsPart => {
                // One by one, so that others, a drop or an event that is refused may come between.
                let mut kept = Vec::new();
                for event in events {
                    kept.extend(self.inner.append(topic, std::slice::from_ref(event)).await?);
                    tokio::task::yield_now().await;
                }
                kept
            }
            KeepsRepeats => {
                let again = |event: &Arc<Event>| {
                    let copy = Event::new(event.event_type()).with_run_id(event.run_id());
                    Arc::new(copy.with_payload(
                        Payload::json_of(&event.payload().to_json().map(|json| json.len()).unwrap_or(0)).expect("a number"),
                    ))
                };
                self.inner.append(topic, &events.iter().map(again).collect::<Vec<_>>()).await?
            }
            _ => self.inner.append(topic, events).await?,
        };
        Ok(self.disfigure(kept))
    }

    async fn read(&self, topic: &Topic, from: u64, limit: usize) -> Result<LogPage> {
        let limit = if self.is(IgnoresLimit) && limit > 0 { usize::MAX } else { limit };
        let mut page = self.inner.read(topic, from, limit).await?;
        page.events = self.disfigure(page.events);
        match self.how {
            HidesFloor => page.floor = 0,
            NamesNoStore => page.generation = page.generation.map(|generation| Generation::new(0, generation.number())),
            RenumbersTrimmed => {
                let renumber = |(place, event): (usize, &Arc<Event>)| {
                    numbered(event, |index| ReplayIndex { index: place as u64, ..index })
                };
                page.events = page.events.iter().enumerate().map(renumber).collect();
            }
            // As one does that reads beside a write.
            LeavesOut if page.events.len() > 40 => drop(page.events.remove(20)),
            _ => {}
        }
        Ok(page)
    }

    async fn clear(&self, topic: &Topic) -> Result<()> {
        match self.how {
            GoesOnAfterClear => self.inner.trim(topic, &TrimFilter::run("run")).await.map(drop),
            ClearsAll => {
                for name in ["t", "untouched", "a", "b"] {
                    self.inner.clear(&Topic::new(name)?).await?;
                }
                Ok(())
            }
            _ => self.inner.clear(topic).await,
        }
    }

    async fn trim(&self, topic: &Topic, filter: &TrimFilter) -> Result<u64> {
        self.inner.trim(topic, filter).await
    }

    fn deduplication(&self) -> Deduplication {
        self.inner.deduplication()
    }
}

struct Harness {
    how: Wrong,
    inner: parking_lot::Mutex<Arc<InMemoryServerCache>>,
}

impl Harness {
    fn of(how: Wrong) -> Arc<dyn StoreHarness> {
        Arc::new(Self { how, inner: parking_lot::Mutex::default() })
    }
}

#[async_trait]
impl StoreHarness for Harness {
    fn name(&self) -> &str {
        "store-wrong"
    }

    async fn fresh(&self) -> Result<Arc<dyn StoreHarness>> {
        Ok(Self::of(self.how))
    }

    async fn connect(&self) -> Result<Arc<dyn ServerCache>> {
        let inner = self.inner.lock().clone();
        Ok(Arc::new(Store { inner, how: self.how }))
    }

    /// As a process that imitates a server: what it keeps is still there.
    fn restarts(&self) -> bool {
        true
    }

    async fn restart(&self) -> Result<()> {
        if self.how == ForgetsOnRestart {
            *self.inner.lock() = Arc::default();
        }
        Ok(())
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(15)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for (how, caught_by) in SABOTEURS {
        for id in *caught_by {
            trials.push(Trial::test(format!("{id} catches a store that is wrong: {how:?}"), move || {
                match run(&Harness::of(*how), id).outcome(id) {
                    Some(Outcome::Fail(_)) => Ok(()),
                    other => Err(Failed::from(format!("{other:?}"))),
                }
            }));
        }
    }
    trials.push(Trial::test("every property catches one, and none a store that is right", || {
        let report = run(&Harness::of(Not), "ST-");
        let uncaught: Vec<_> = report
            .properties()
            .iter()
            .filter(|property| !SABOTEURS.iter().any(|(_, caught_by)| caught_by.contains(&property.id)))
            .map(|property| property.id)
            .collect();
        let wrong = report.properties().iter().any(|property| property.outcome != Outcome::Pass);
        if uncaught.is_empty() && !wrong { Ok(()) } else { Err(Failed::from(format!("{uncaught:?} {report}"))) }
    }));
    libtest_mimic::run(&arguments, trials).exit_code()
}
