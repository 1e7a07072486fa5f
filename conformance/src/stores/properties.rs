//! The properties of stores.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{join_all, try_join_all};
use pubsub_cache::{Generation, LogPage, ServerCache};
use pubsub_core::{Deduplication, Error, ErrorKind, Event, EventId, Payload, ReplayIndex, Timestamp, Topic, TrimFilter};

use super::{Property, StoreHarness};
use crate::oracle::{exactly_once, ids};
use crate::{Mismatch, Verdict, ensure, ensure_eq};

/// The longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(10);

macro_rules! properties {
    ($($id:literal $title:literal $run:ident $(($restarts:literal))?),+ $(,)?) => {
        pub(super) fn all() -> Vec<Property> {
            vec![$(Property {
                id: $id,
                title: $title,
                restarts: false $(|| $restarts)?,
                run: |harness| Box::pin($run(harness)),
            }),+]
        }
    };
}

properties! {
    "ST-01" "A value is what was put last, for every handle, until it is deleted" values,
    "ST-02" "A value is there for its time to live, counted from when it was put, and no longer" expires,
    "ST-03" "Concurrent increments add up, and each returns a sum of its own" counts,
    "ST-04" "A sum beyond 64 bits is refused and changes nothing" overflows,
    "ST-05" "Concurrent pushes are all kept, each pusher's in order, and each returns a length of its own" lists,
    "ST-06" "What is of another kind is refused, and stays" kinds,
    "ST-07" "Bad keys and times to live are refused, odd keys are keys of their own, and topics are none" keys,
    "ST-11" "Events are numbered from 0 on, and come back as they were but for the index" numbers,
    "ST-12" "Concurrent appends get different indices without gaps, those of one call in a row" dense,
    "ST-13" "An event that is appended again is kept once, and its kept copy is returned" repeats,
    "ST-14" "Of a call with an event that cannot be kept, nothing is kept" all_or_none,
    "ST-15" "A read gives what lies from its index on, up to its limit, and where the log begins and ends" reads,
    "ST-16" "A clear ends the generation: the next is later and begins at 0, and other topics are untouched" clears,
    "ST-17" "Generations tell stores apart and never come again" generations,
    "ST-18" "A trim takes one run's events, and the others keep their indices" trims,
    "ST-19" "A log is bounded, forgets its oldest events, and says up to where" bounded,
    "ST-20" "A dropped append has kept all of its events or none" dropped,
    "ST-21" "Who reads while others append sees no index twice and none left out" steady,
    "ST-22" "A restarted store goes on where it was" restarted (true),
}

fn topic(name: &str) -> Verdict<Topic> {
    Ok(Topic::new(name)?)
}

fn event(event_type: &str) -> Arc<Event> {
    Arc::new(Event::new(event_type).with_run_id("run").with_data(event_type.to_owned()))
}

fn events(count: usize) -> Vec<Arc<Event>> {
    (0..count).map(|number| event(&number.to_string())).collect()
}

fn places(events: &[Arc<Event>]) -> Vec<u64> {
    events.iter().filter_map(|event| event.index()).map(|place| place.index).collect()
}

fn up_to(end: u64) -> Vec<u64> {
    (0..end).collect()
}

async fn whole(store: &dyn ServerCache, topic: &Topic) -> Verdict<LogPage> {
    Ok(store.read(topic, 0, 1_000_000).await?)
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> Verdict<T> {
    tokio::time::timeout(PATIENCE, future).await.map_err(|_| Mismatch::new(format!("{what}: not within {PATIENCE:?}")))
}

fn refused<T>(answer: Result<T, Error>, what: &str, fits: impl Fn(&ErrorKind) -> bool) -> Verdict {
    match answer {
        Ok(_) => Err(Mismatch::new(format!("{what} is not refused"))),
        Err(error) if fits(error.kind()) => Ok(()),
        Err(error) => Err(Mismatch::new(format!("{what} is refused with {error}"))),
    }
}

fn bad_option(kind: &ErrorKind) -> bool {
    matches!(kind, ErrorKind::InvalidOption { .. })
}

async fn values(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (one, two) = (harness.connect().await?, harness.connect().await?);
    ensure_eq!(one.get("k").await?, None, "a key that was never set");
    one.set("k", Bytes::from_static(b"first"), None).await?;
    two.set("k", Bytes::from_static(b"\0\xff second"), None).await?;
    ensure_eq!(one.get("k").await?, Some(Bytes::from_static(b"\0\xff second")), "what another handle has put");
    two.set("empty", Bytes::new(), None).await?;
    ensure_eq!(one.get("empty").await?, Some(Bytes::new()), "an empty value");
    ensure!(one.delete("k").await?, "there was nothing to delete");
    ensure!(!two.delete("k").await?, "deleted twice");
    ensure_eq!(two.get("k").await?, None, "what was deleted");
    Ok(())
}

async fn expires(harness: Arc<dyn StoreHarness>) -> Verdict {
    let store = harness.connect().await?;
    let (short, long) = (Some(Duration::from_millis(80)), Some(Duration::from_secs(600)));
    for key in ["goes", "stays", "renewed"] {
        store.set(key, Bytes::from_static(b"v"), short).await?;
    }
    store.increment("count", 5, short).await?;
    store.push("list", Bytes::from_static(b"v"), short).await?;
    // Put anew, counted anew: these two must outlive those put before them.
    store.set("stays", Bytes::from_static(b"v"), None).await?;
    store.set("renewed", Bytes::from_static(b"v"), long).await?;
    ensure_eq!(store.increment("kept", 1, long).await?, 1, "a counter");
    ensure_eq!(store.increment("kept", 1, None).await?, 2, "a counter that goes on");
    within("expiry", async {
        while store.get("goes").await?.is_some()
            || store.get("count").await?.is_some()
            || !store.range("list", 0, 9).await?.is_empty()
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Verdict::Ok(())
    })
    .await??;
    for key in ["stays", "renewed", "kept"] {
        ensure!(store.get(key).await?.is_some(), "{key} is gone");
    }
    ensure_eq!(store.increment("count", 2, None).await?, 2, "a counter that begins anew");
    ensure_eq!(store.push("list", Bytes::new(), None).await?, 1, "a list that begins anew");
    Ok(())
}

async fn counts(harness: Arc<dyn StoreHarness>) -> Verdict {
    let stores = try_join_all((0..4).map(|_| harness.connect())).await?;
    let adding = (0..200_usize).map(|n| {
        let store = stores[n % 4].clone();
        tokio::spawn(async move { store.increment("k", 3, None).await })
    });
    let mut sums = Vec::new();
    for sum in join_all(adding).await {
        sums.push(sum??);
    }
    sums.sort_unstable();
    ensure_eq!(sums, (1..=200).map(|n| 3 * n).collect::<Vec<_>>(), "the sums");
    ensure_eq!(stores[0].get("k").await?, Some(Bytes::from_static(b"600")), "a counter read as a value");
    ensure_eq!(stores[1].increment("k", -700, None).await?, -100, "a sum below zero");
    stores[2].set("k", Bytes::from_static(b"41"), None).await?;
    ensure_eq!(stores[3].increment("k", 1, None).await?, 42, "a value that reads as a number");
    Ok(())
}

async fn overflows(harness: Arc<dyn StoreHarness>) -> Verdict {
    let store = harness.connect().await?;
    store.increment("k", i64::MAX, None).await?;
    refused(store.increment("k", 1, None).await, "a sum beyond 64 bits", bad_option)?;
    ensure_eq!(store.increment("k", 0, None).await?, i64::MAX, "the counter after a refusal");
    Ok(())
}

async fn lists(harness: Arc<dyn StoreHarness>) -> Verdict {
    let stores = try_join_all((0..4).map(|_| harness.connect())).await?;
    let pushing = (0..4_usize).map(|pusher| {
        let store = stores[pusher].clone();
        tokio::spawn(async move {
            let mut lengths = Vec::new();
            for number in 0..50 {
                lengths.push(store.push("k", Bytes::from(format!("{pusher} {number:02}")), None).await?);
            }
            Ok::<_, Error>(lengths)
        })
    });
    let mut lengths = Vec::new();
    for pushed in join_all(pushing).await {
        lengths.extend(pushed??);
    }
    lengths.sort_unstable();
    ensure_eq!(lengths, (1..=200).collect::<Vec<_>>(), "the lengths");
    let all = stores[0].range("k", 0, 1000).await?;
    for pusher in 0..4 {
        let own: Vec<_> = all.iter().filter(|value| value.starts_with(format!("{pusher} ").as_bytes())).cloned().collect();
        let sent: Vec<_> = (0..50).map(|number| Bytes::from(format!("{pusher} {number:02}"))).collect();
        ensure_eq!(own, sent, "what pusher {pusher} has pushed");
    }
    ensure_eq!(stores[1].range("k", 190, 4).await?, all[190..194], "a piece");
    ensure_eq!(stores[1].range("k", 198, 9).await?, all[198..], "the end");
    ensure!(stores[2].range("k", 200, 9).await?.is_empty(), "beyond the end");
    ensure!(stores[2].range("unknown", 0, 9).await?.is_empty(), "an unknown list");
    ensure!(stores[3].delete("k").await? && stores[0].range("k", 0, 9).await?.is_empty(), "a deleted list");
    Ok(())
}

async fn kinds(harness: Arc<dyn StoreHarness>) -> Verdict {
    let store = harness.connect().await?;
    store.set("value", Bytes::from_static(b"no number"), None).await?;
    store.push("list", Bytes::from_static(b"v"), None).await?;
    refused(store.push("value", Bytes::new(), None).await, "a push to a value", bad_option)?;
    refused(store.range("value", 0, 1).await, "a range of a value", bad_option)?;
    refused(store.increment("value", 1, None).await, "an increment of what is no number", bad_option)?;
    refused(store.get("list").await, "a get of a list", bad_option)?;
    refused(store.increment("list", 1, None).await, "an increment of a list", bad_option)?;
    ensure_eq!(store.get("value").await?, Some(Bytes::from_static(b"no number")), "the value");
    ensure_eq!(store.range("list", 0, 9).await?, [Bytes::from_static(b"v")], "the list");
    store.set("list", Bytes::from_static(b"a value now"), None).await?;
    ensure_eq!(store.get("list").await?, Some(Bytes::from_static(b"a value now")), "what was put in place of a list");
    Ok(())
}

async fn keys(harness: Arc<dyn StoreHarness>) -> Verdict {
    let store = harness.connect().await?;
    let long = "k".repeat(pubsub_cache::MAX_KEY + 1);
    for bad in ["", long.as_str()] {
        let bad_name = |kind: &ErrorKind| matches!(kind, ErrorKind::InvalidName(_));
        refused(store.get(bad).await, "a get of a bad key", bad_name)?;
        refused(store.set(bad, Bytes::new(), None).await, "a set of a bad key", bad_name)?;
        refused(store.delete(bad).await, "a delete of a bad key", bad_name)?;
        refused(store.increment(bad, 1, None).await, "an increment of a bad key", bad_name)?;
        refused(store.push(bad, Bytes::new(), None).await, "a push to a bad key", bad_name)?;
        refused(store.range(bad, 0, 1).await, "a range of a bad key", bad_name)?;
    }
    for ttl in [Some(Duration::ZERO), Some(Duration::MAX)] {
        refused(store.set("k", Bytes::new(), ttl).await, "a bad time to live", bad_option)?;
        refused(store.increment("k", 1, ttl).await, "a bad time to live", bad_option)?;
        refused(store.push("k", Bytes::new(), ttl).await, "a bad time to live", bad_option)?;
    }
    ensure_eq!(store.get("k").await?, None, "what was refused");
    let odd = ["a", "a:b", "a b", "{a}", "}", "*", "é", "\u{0}", "\n", "topic", &long[1..]];
    for (number, key) in odd.iter().enumerate() {
        store.set(key, Bytes::from(number.to_string()), None).await?;
    }
    // A topic of the same name is something else.
    store.append(&topic("topic")?, &events(2)).await?;
    store.clear(&topic("a")?).await?;
    for (number, key) in odd.iter().enumerate() {
        ensure_eq!(store.get(key).await?, Some(Bytes::from(number.to_string())), "{key:?}");
    }
    ensure_eq!(whole(&*store, &topic("topic")?).await?.events.len(), 2, "events of a topic that is also a key");
    Ok(())
}

async fn numbers(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (store, other) = (harness.connect().await?, harness.connect().await?);
    let topic = topic("t")?;
    let plain = event("plain");
    let full = Event::stamped(EventId::new("text id")?, "ü \u{1F980}", Timestamp::from_millis(1_700_000_000_123)?)
        .with_payload(Payload::json(r#"{"a": [1, null, "\u0000 \" \n"], "b": 1e300}"#)?)
        .with_metadata("traceparent", "00-1")
        .with_index(Some(ReplayIndex { generation: 99, index: 77 }));
    let sent = [plain, Arc::new(full), Arc::new(Event::new("no data"))];
    let kept = store.append(&topic, &sent).await?;
    ensure_eq!(places(&kept), up_to(3), "indices");
    let read = whole(&*other, &topic).await?;
    ensure_eq!(places(&read.events), up_to(3), "indices read");
    for (number, sent) in sent.iter().enumerate() {
        for copy in [&kept[number], &read.events[number]] {
            ensure_eq!(
                (copy.id(), copy.event_type(), copy.run_id()),
                (sent.id(), sent.event_type(), sent.run_id()),
                "an event"
            );
            ensure_eq!((copy.created_at(), copy.metadata()), (sent.created_at(), sent.metadata()), "time and metadata");
            let json = |event: &Event| Verdict::Ok(serde_json::from_slice::<serde_json::Value>(&event.payload().to_json()?)?);
            ensure_eq!(json(copy)?, json(sent)?, "data");
            let generation = copy.index().map(|place| Generation::from_index(place.generation));
            ensure_eq!(generation, read.generation, "generation");
        }
    }
    ensure_eq!(places(&other.append(&topic, &events(2)).await?), [3, 4], "indices of another handle");
    ensure!(store.append(&topic, &[]).await?.is_empty(), "nothing was appended, and something kept");
    Ok(())
}

async fn dense(harness: Arc<dyn StoreHarness>) -> Verdict {
    let stores = try_join_all((0..4).map(|_| harness.connect())).await?;
    let topic = topic("t")?;
    let appending = (0..80_usize).map(|n| {
        let (store, topic) = (stores[n % 4].clone(), topic.clone());
        tokio::spawn(async move { store.append(&topic, &events(1 + n % 5)).await })
    });
    let mut all = Vec::new();
    for kept in join_all(appending).await {
        let kept = kept??;
        let first = places(&kept).first().copied().unwrap_or(0);
        ensure_eq!(places(&kept), (first..first + kept.len() as u64).collect::<Vec<_>>(), "the indices of one call");
        all.extend(kept);
    }
    let read = whole(&*stores[0], &topic).await?;
    ensure_eq!(places(&read.events), up_to(all.len() as u64), "all indices");
    ensure_eq!((read.next, read.kept), (all.len() as u64, all.len() as u64), "the end and the count");
    all.sort_by_key(|event| event.index().map(|place| place.index));
    ensure_eq!(ids(&read.events), ids(&all), "what is kept, and what the calls returned");
    Ok(())
}

async fn repeats(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (store, other) = (harness.connect().await?, harness.connect().await?);
    ensure!(store.deduplication() != Deduplication::None, "a store that recognises no repeats");
    let (topic, elsewhere) = (topic("t")?, topic("elsewhere")?);
    let sent = events(4);
    store.append(&topic, &sent).await?;
    let again = other.append(&topic, &[sent[2].clone(), event("new"), sent[0].clone()]).await?;
    ensure_eq!(places(&again), [2, 4, 0], "indices of repeats and of a new one between them");
    let twice = event("twice");
    let again = store.append(&topic, &[twice.clone(), twice.clone()]).await?;
    ensure_eq!(places(&again), [5, 5], "indices of one event given twice");
    ensure_eq!(places(&whole(&*store, &topic).await?.events), up_to(6), "the log");
    ensure_eq!(places(&store.append(&elsewhere, &sent).await?), up_to(4), "the same events in another topic");
    // Many at once, as after an outcome that nobody knows.
    let racing = (0..16).map(|n| {
        let (store, topic, sent) = ([&store, &other][n % 2].clone(), topic.clone(), sent.clone());
        tokio::spawn(async move { store.append(&topic, &[sent[1].clone(), event("racer")]).await })
    });
    for raced in join_all(racing).await {
        ensure_eq!(places(&raced??)[0], 1, "the index of a repeat");
    }
    ensure_eq!(whole(&*store, &topic).await?.kept, 22, "events kept");
    Ok(())
}

async fn all_or_none(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (store, topic) = (harness.connect().await?, topic("t")?);
    store.append(&topic, &events(1)).await?;
    let live = Arc::new(Event::new("live").with_payload(Payload::live(Arc::new(1_u8))));
    let answer = store.append(&topic, &[event("a"), live, event("b")]).await;
    refused(answer, "a live value", |kind| matches!(kind, ErrorKind::NotSerializable(_)))?;
    let log = whole(&*store, &topic).await?;
    ensure_eq!((places(&log.events), log.next), (vec![0], 1), "the log after a refusal");
    ensure_eq!(places(&store.append(&topic, &events(1)).await?), [1], "the next index");
    Ok(())
}

async fn reads(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (store, topic) = (harness.connect().await?, topic("t")?);
    let none = store.read(&topic, 0, 10).await?;
    ensure!(none.generation.is_none() && none.events.is_empty() && none.next == 0, "a log where there is none: {none:?}");
    let sent = store.append(&topic, &events(10)).await?;
    for (from, limit) in [(0, 10), (0, 3), (4, 3), (9, 5), (10, 5), (50, 5), (0, 0), (u64::MAX, 1)] {
        let page = store.read(&topic, from, limit).await?;
        let start = usize::try_from(from).unwrap_or(usize::MAX).min(10);
        let due = &sent[start..start.saturating_add(limit).min(10)];
        ensure_eq!(ids(&page.events), ids(due), "{limit} from {from} on");
        ensure_eq!((page.floor, page.next, page.kept), (0, 10, 10), "begin, end and count, with {limit} from {from} on");
    }
    ensure!(store.read(&topic, 0, 0).await?.generation.is_some(), "a log without a generation");
    Ok(())
}

async fn clears(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (store, other) = (harness.connect().await?, harness.connect().await?);
    let (topic, untouched) = (topic("t")?, topic("untouched")?);
    let sent = events(3);
    for topic in [&topic, &untouched] {
        store.append(topic, &sent).await?;
    }
    let before = whole(&*store, &topic).await?.generation;
    other.clear(&topic).await?;
    let cleared = whole(&*store, &topic).await?;
    ensure!(cleared.events.is_empty() && cleared.kept == 0, "events after a clear");
    let again = store.append(&topic, &sent[..2]).await?;
    ensure_eq!(places(&again), [0, 1], "indices after a clear, of events that were kept before it");
    let after = whole(&*store, &topic).await?.generation;
    let number = |generation: Option<Generation>| generation.map(Generation::number);
    ensure!(number(after) > number(before), "generation {after:?} after {before:?}");
    ensure_eq!(after.map(Generation::store), before.map(Generation::store), "the store in the generation");
    ensure_eq!(places(&whole(&*other, &untouched).await?.events), up_to(3), "another topic");
    other.clear(&topic).await?;
    other.clear(&topic).await?;
    store.clear(&self::topic("unknown")?).await?;
    Ok(())
}

async fn generations(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (store, elsewhere) = (harness.connect().await?, harness.fresh().await?.connect().await?);
    let mut seen = BTreeSet::new();
    let mut last = None;
    for round in 0..5 {
        for name in ["a", "b"] {
            let topic = topic(name)?;
            store.append(&topic, &events(1)).await?;
            let generation = whole(&*store, &topic).await?.generation.ok_or_else(|| Mismatch::new("no generation"))?;
            ensure!(generation.get() < 1 << 53, "{generation:?} has more than 53 bits");
            ensure!(seen.insert((name, generation.get())), "{generation:?} came before, round {round}");
            store.clear(&topic).await?;
            last = Some(generation);
        }
    }
    let topic = topic("a")?;
    elsewhere.append(&topic, &events(1)).await?;
    let other = whole(&*elsewhere, &topic).await?.generation;
    // One in two million is the same by chance.
    ensure!(
        other.map(Generation::store) != last.map(Generation::store),
        "two stores have the generations {other:?} and {last:?}"
    );
    Ok(())
}

async fn trims(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (store, topic) = (harness.connect().await?, topic("t")?);
    let of = |run: &str, at: i64, pinned: bool| {
        let data = serde_json::json!({ "producedAt": at, "pinned": pinned });
        Arc::new(Event::new("x").with_run_id(run).with_data(data))
    };
    let sent =
        [of("a", 1, false), of("b", 1, false), of("a", 2, true), of("a", 3, false), of("b", 9, false), of("a", 9, false)];
    store.append(&topic, &sent).await?;
    ensure_eq!(store.trim(&topic, &TrimFilter::run("a").produced_up_to(3)).await?, 2, "trimmed up to a time");
    let log = whole(&*store, &topic).await?;
    ensure_eq!((places(&log.events), log.next, log.kept), (vec![1, 2, 4, 5], 6, 4), "what is left");
    ensure_eq!(log.floor, 0, "the floor: nothing was forgotten for a bound");
    ensure_eq!(store.trim(&topic, &TrimFilter::run("a")).await?, 2, "trimmed of a run");
    ensure_eq!(store.trim(&topic, &TrimFilter::run("nobody's")).await?, 0, "trimmed of no run");
    ensure_eq!(store.trim(&self::topic("unknown")?, &TrimFilter::run("a")).await?, 0, "trimmed where there is no log");
    ensure_eq!(places(&store.append(&topic, &events(1)).await?), [6], "the next index");
    ensure_eq!(places(&whole(&*store, &topic).await?.events), [1, 4, 6], "what is left");
    Ok(())
}

async fn bounded(harness: Arc<dyn StoreHarness>) -> Verdict {
    const TOGETHER: usize = 500;
    let (store, topic) = (harness.connect().await?, topic("t")?);
    let mut sent = Vec::new();
    while store.read(&topic, 0, 0).await?.floor == 0 {
        ensure!(sent.len() < 40_000, "all of {} events are kept by default", sent.len());
        let together = events(TOGETHER);
        store.append(&topic, &together).await?;
        sent.extend(together);
    }
    let log = whole(&*store, &topic).await?;
    ensure_eq!(log.next, sent.len() as u64, "the end");
    ensure_eq!(places(&log.events), (log.floor..log.next).collect::<Vec<_>>(), "what is kept: all from the floor on");
    exactly_once(&ids(&sent[usize::try_from(log.floor)?..]), &ids(&log.events))
}

async fn dropped(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (store, topic) = (harness.connect().await?, topic("t")?);
    let mut calls = Vec::new();
    for polls in 0..40 {
        let together = events(3);
        let mut append = store.append(&topic, &together);
        for _ in 0..polls {
            if append.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(append);
        calls.push(together);
    }
    // Behind whatever may still be on its way.
    let fence = event("fence");
    store.append(&topic, std::slice::from_ref(&fence)).await?;
    let kept: BTreeSet<_> = ids(&whole(&*store, &topic).await?.events).into_iter().collect();
    for (polls, call) in calls.iter().enumerate() {
        let there = call.iter().filter(|event| kept.contains(event.id())).count();
        ensure!(there == 0 || there == call.len(), "{there} of 3 events were kept of a call dropped after {polls} polls");
    }
    let log = whole(&*store, &topic).await?;
    ensure_eq!(places(&log.events), up_to(log.next), "the log");
    Ok(())
}

async fn steady(harness: Arc<dyn StoreHarness>) -> Verdict {
    let (writer, reader) = (harness.connect().await?, harness.connect().await?);
    let topic = topic("t")?;
    let writing = {
        let topic = topic.clone();
        tokio::spawn(async move {
            for _ in 0..200 {
                writer.append(&topic, &events(5)).await?;
            }
            Ok::<_, Error>(())
        })
    };
    let mut next = 0;
    while next < 1000 {
        let page = within("a read", reader.read(&topic, next, 64)).await??;
        ensure_eq!(places(&page.events), (next..next + page.events.len() as u64).collect::<Vec<_>>(), "a page");
        ensure!(page.next >= next + page.events.len() as u64, "a page that ends behind the log: {}", page.next);
        next += page.events.len() as u64;
        tokio::task::yield_now().await;
    }
    writing.await??;
    Ok(())
}

async fn restarted(harness: Arc<dyn StoreHarness>) -> Verdict {
    let topic = topic("t")?;
    let store = harness.connect().await?;
    let sent = events(3);
    store.append(&topic, &sent).await?;
    store.set("k", Bytes::from_static(b"v"), None).await?;
    let before = whole(&*store, &topic).await?.generation;
    drop(store);
    harness.restart().await?;
    let store = harness.connect().await?;
    ensure_eq!(places(&store.append(&topic, &[sent[1].clone(), event("new")]).await?), [1, 3], "indices after a restart");
    ensure_eq!(whole(&*store, &topic).await?.generation, before, "the generation after a restart");
    ensure_eq!(store.get("k").await?, Some(Bytes::from_static(b"v")), "a value after a restart");
    store.clear(&topic).await?;
    store.append(&topic, &events(1)).await?;
    let after = whole(&*store, &topic).await?.generation;
    ensure!(after.map(Generation::number) > before.map(Generation::number), "generation {after:?} after {before:?}");
    Ok(())
}
