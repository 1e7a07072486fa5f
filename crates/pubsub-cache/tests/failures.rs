//! The declared mode holds whichever operation of the store fails, hangs or answers late.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Fault, FaultyStore, PATIENCE, Schedule, Spy, event, events, ids, topic};
use futures::StreamExt;
use futures::future::join_all;
use parking_lot::Mutex;
use pubsub_cache::{CachingPubSub, OnStoreFailure};
use pubsub_core::{AckMode, Cursor, Event, EventId, Fate, PubSub, PublishOptions, Start, SubscribeOptions, Topic};
use pubsub_emitter::EventEmitterPubSub;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const STORE_TIMEOUT: Duration = Duration::from_secs(1);

const FAULTS: [Fault; 5] =
    [Fault::Retryable, Fault::Permanent, Fault::Hang, Fault::Late(Duration::from_secs(3)), Fault::DoneUnavailable];

/// How often anything is tried; more than any schedule here has faults.
const TRIES: usize = 20;

#[derive(Debug, Clone, Copy)]
struct Case {
    mode: OnStoreFailure,
    appends_now: bool,
    fault: Fault,
    first: usize,
    count: usize,
    /// Whether a publish that failed is repeated until it succeeds.
    repeats: bool,
    ack: AckMode,
    /// Whether several publish at once.
    at_once: bool,
}

/// What one client saw, over all of its subscriptions.
#[derive(Default)]
struct Seen {
    events: Vec<Arc<Event>>,
    lagged: u64,
    errors: usize,
    cursor: Option<Cursor>,
}

type Shared = Arc<(Mutex<Seen>, watch::Sender<usize>)>;

struct Client {
    seen: Shared,
    task: JoinHandle<()>,
}

/// Everything by which one run is judged.
struct Run {
    case: Case,
    bus: CachingPubSub,
    store: Arc<FaultyStore>,
    spy: Arc<Spy>,
    topic: Topic,
    /// What was published, with its fate, none if it was `Ok`; markers too.
    sent: Vec<(Arc<Event>, Option<Fate>)>,
    /// How many positions publishers got.
    placed: AtomicU64,
}

/// Follows the topic, and comes again where it was when its stream breaks.
fn follow(bus: CachingPubSub, topic: Topic, mut subscription: pubsub_core::Subscription, ack: AckMode) -> Client {
    let seen: Shared = Arc::new((Mutex::default(), watch::Sender::new(0)));
    let shared = seen.clone();
    let task = tokio::spawn(async move {
        loop {
            match subscription.next().await {
                None => return,
                Some(Ok(delivery)) => {
                    let (seen, count) = &*shared;
                    {
                        let mut seen = seen.lock();
                        seen.lagged += delivery.lagged();
                        seen.cursor = delivery.cursor().or(seen.cursor.take());
                        seen.events.push(delivery.event().clone());
                    }
                    drop(delivery.done());
                    count.send_modify(|count| *count += 1);
                }
                Some(Err(_)) => {
                    let start = {
                        let mut seen = shared.0.lock();
                        seen.errors += 1;
                        seen.cursor.clone().map_or(Start::Earliest, Start::After)
                    };
                    subscription = subscribe(&bus, &topic, start, ack).await;
                }
            }
        }
    });
    Client { seen, task }
}

async fn subscribe(bus: &CachingPubSub, topic: &Topic, start: Start, ack: AckMode) -> pubsub_core::Subscription {
    for _ in 0..TRIES {
        let options = SubscribeOptions::fan_out().start(start.clone()).ack_mode(ack);
        if let Ok(subscription) = bus.subscribe(topic, options).await {
            return subscription;
        }
    }
    panic!("no subscription in {TRIES} tries");
}

impl Client {
    async fn has_seen(&self, id: &EventId) {
        let mut count = self.seen.1.subscribe();
        let seen = count.wait_for(|_| self.seen.0.lock().events.iter().any(|event| event.id() == id));
        if tokio::time::timeout(PATIENCE, seen).await.is_err() {
            panic!("a marker was not seen behind {:?}", types(&self.seen.0.lock().events));
        }
    }
}

fn types(events: &[Arc<Event>]) -> Vec<(&str, Option<u64>)> {
    events.iter().map(|event| (event.event_type(), event.index().map(|place| place.index))).collect()
}

impl Run {
    fn new(case: Case) -> Self {
        let (store, spy) = (FaultyStore::new(case.appends_now), Spy::over(EventEmitterPubSub::new()));
        let builder = CachingPubSub::builder(spy.clone(), store.clone());
        let bus = builder.on_store_failure(case.mode).store_timeout(STORE_TIMEOUT).build().unwrap();
        store.schedule.at(case.first..case.first + case.count, case.fault);
        Self { case, bus, store, spy, topic: topic("t"), sent: Vec::new(), placed: AtomicU64::new(0) }
    }

    fn schedule(&self) -> &Schedule {
        &self.store.schedule
    }

    /// Publishes each of these calls' events, one after the other or at once.
    async fn publish(&mut self, calls: &[&[Arc<Event>]]) {
        if self.case.at_once {
            let sent = join_all(calls.iter().map(|events| self.call(events, self.case.repeats))).await;
            self.sent.extend(sent.into_iter().flatten());
            return;
        }
        for events in calls {
            let sent = self.call(events, self.case.repeats).await;
            self.sent.extend(sent);
        }
    }

    async fn call(&self, events: &[Arc<Event>], repeats: bool) -> Vec<(Arc<Event>, Option<Fate>)> {
        let sent = |fate: Option<Fate>| events.iter().map(|event| (event.clone(), fate)).collect();
        for _ in 0..TRIES {
            match self.bus.publish(&self.topic, events, PublishOptions::new()).await {
                Ok(positions) => {
                    let positions = positions.as_slice().len();
                    assert!(positions == events.len() || positions == 0, "{positions} positions of {}", events.len());
                    self.placed.fetch_add(positions as u64, Ordering::SeqCst);
                    return sent(None);
                }
                Err(error) => {
                    assert_eq!(self.case.mode, OnStoreFailure::Fail, "{error}");
                    let due = if self.case.fault == Fault::Permanent { Fate::NotSent } else { Fate::Unknown };
                    assert_eq!(error.fates(), vec![due; events.len()]);
                    if !repeats {
                        return sent(Some(due));
                    }
                }
            }
        }
        panic!("not published in {TRIES} tries");
    }

    /// Publishes a marker, until it goes out, and waits until all clients have seen it.
    async fn marker(&mut self, clients: &[&Client]) {
        let marker = event("marker");
        let sent = self.call(std::slice::from_ref(&marker), true).await;
        self.sent.extend(sent);
        for client in clients {
            client.has_seen(marker.id()).await;
        }
    }

    /// The whole history, and that it is what is kept.
    async fn history(&self) -> Vec<Cursor> {
        for _ in 0..TRIES {
            if let Ok(page) = self.bus.history(&self.topic, Start::Earliest, 1000).await {
                let kept = self.store.kept(&self.topic).await;
                let listed: Vec<_> = page.entries.iter().map(|(_, event)| event.clone()).collect();
                assert_eq!(ids(&listed), ids(&kept), "the history");
                return page.entries.into_iter().map(|(cursor, _)| cursor).collect();
            }
        }
        panic!("no history in {TRIES} tries");
    }

    async fn follow(&self, start: Start) -> Client {
        let subscription = subscribe(&self.bus, &self.topic, start, self.case.ack).await;
        follow(self.bus.clone(), self.topic.clone(), subscription, self.case.ack)
    }

    /// The scripted run. Returns how many operations of the store it took.
    async fn go(mut self) -> usize {
        let (case, topic) = (self.case, self.topic.clone());
        let all = events(0..15);
        let plain = self.follow(Start::Latest).await;
        self.publish(&[&all[..1], &all[1..4], &all[4..5]]).await;
        let before_replay = self.store.kept(&topic).await;
        let sent_before_replay = self.sent.len();
        let replay = self.follow(Start::Earliest).await;
        self.publish(&[&all[5..6], &all[6..7]]).await;
        self.marker(&[&plain]).await;
        let cursors = self.history().await;
        let (resume_at, sent_before_resume) = (cursors.len() / 2, self.sent.len());
        let before_resume = self.store.kept(&topic).await;
        let resume = match resume_at {
            0 => Start::Earliest,
            behind => Start::After(cursors[behind - 1].clone()),
        };
        let resumed = self.follow(resume).await;
        self.publish(&[&all[7..9], &all[9..10], &all[10..11]]).await;
        self.history().await;
        self.marker(&[&plain, &replay, &resumed]).await;

        let first_life = self.store.kept(&topic).await;
        let mut cleared = false;
        for _ in 0..TRIES {
            cleared = cleared || self.bus.clear_topic(&topic).await.is_ok();
        }
        assert!(cleared, "not cleared in {TRIES} tries");
        assert!(self.store.kept(&topic).await.is_empty(), "a cleared topic has a log");
        self.publish(&[&all[11..12], &all[12..14], &all[14..15]]).await;
        self.history().await;
        self.marker(&[&plain, &replay, &resumed]).await;
        let second_life = self.store.kept(&topic).await;

        let kept: Vec<_> = first_life.iter().chain(&second_life).cloned().collect();
        let sent = |from: usize| self.sent[from..].iter().map(|(event, _)| event.clone()).collect::<Vec<_>>();
        for (name, client, from_log, live_from, index) in [
            ("plain", &plain, &Vec::new(), 0, 0),
            ("replay", &replay, &before_replay, sent_before_replay, 0),
            ("resumed", &resumed, &before_resume, sent_before_resume, resume_at),
        ] {
            let seen = client.seen.0.lock();
            let told = || format!("{name} saw {:?}, of {:?} kept", types(&seen.events), types(&kept));
            match case.mode {
                OnStoreFailure::Continue => {
                    assert_eq!(seen.errors, 0, "{}", told());
                    let due = from_log.iter().skip(index).cloned().chain(sent(live_from));
                    let (mut due, mut got) = (ids(&due.collect::<Vec<_>>()), ids(&seen.events));
                    due.sort();
                    got.sort();
                    assert_eq!(got, due, "each exactly once: {}", told());
                    let places: Vec<_> = seen.events.iter().filter_map(|event| event.index()).collect();
                    assert!(places.is_sorted(), "in order: {}", told());
                }
                OnStoreFailure::Fail => {
                    assert!(seen.errors == 0 || case.fault == Fault::Permanent, "{}", told());
                    assert_eq!(ids(&seen.events), ids(&kept[index..]), "what is kept, in order: {}", told());
                    assert_eq!(seen.lagged, 0, "nothing is lost: {}", told());
                }
            }
        }
        // Of what was published, what is kept and what is not.
        let kept = ids(&kept);
        let unnumbered = self.spy.published().iter().filter(|event| event.index().is_none()).count();
        assert_eq!(unnumbered as u64, self.bus.uncached(), "events without an index");
        let went_out = self.sent.iter().filter(|(_, fate)| fate.is_none()).count() as u64;
        assert_eq!(self.placed.load(Ordering::SeqCst) + self.bus.uncached(), went_out, "positions of what is kept");
        if case.mode == OnStoreFailure::Fail {
            assert_eq!(self.bus.uncached(), 0);
            for (event, fate) in &self.sent {
                match fate {
                    None => assert!(kept.contains(event.id()), "published and not kept"),
                    Some(Fate::NotSent) => assert!(!kept.contains(event.id()), "not sent and kept"),
                    Some(_) => {}
                }
            }
        }
        drop(self.bus.close(Duration::from_secs(5)).await);
        for client in [plain, replay, resumed] {
            tokio::time::timeout(PATIENCE, client.task).await.expect("the stream ends with the bus").unwrap();
        }
        self.schedule().count()
    }
}

fn run(case: Case) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(Run::new(case).go())));
    ran.unwrap_or_else(|why| {
        eprintln!("failed: {case:?}");
        std::panic::resume_unwind(why)
    })
}

/// Each fault at each step, for one, two and six operations.
fn each(mode: OnStoreFailure, appends_now: bool, repeats: bool, ack: AckMode) {
    for at_once in [false, true] {
        let case = |fault, first, count| Case { mode, appends_now, fault, first, count, repeats, ack, at_once };
        let steps = run(case(Fault::Retryable, 0, 0));
        assert!(steps > 20, "a run without faults takes {steps} operations");
        for fault in FAULTS {
            for count in [1, 2, 6] {
                for first in 0..steps + 4 {
                    run(case(fault, first, count));
                }
            }
        }
    }
}

#[test]
fn live_delivery_goes_on_whatever_fails() {
    each(OnStoreFailure::Continue, true, false, AckMode::Auto);
}

#[test]
fn live_delivery_goes_on_whatever_fails_over_a_store_that_is_awaited() {
    each(OnStoreFailure::Continue, false, false, AckMode::Auto);
}

#[test]
fn live_delivery_goes_on_to_those_who_settle() {
    each(OnStoreFailure::Continue, false, false, AckMode::Manual);
}

#[test]
fn nothing_goes_out_that_is_not_kept() {
    each(OnStoreFailure::Fail, true, false, AckMode::Auto);
}

#[test]
fn nothing_goes_out_that_is_not_kept_over_a_store_that_is_awaited() {
    each(OnStoreFailure::Fail, false, false, AckMode::Auto);
}

#[test]
fn what_is_repeated_until_it_succeeds_is_there_once() {
    each(OnStoreFailure::Fail, true, true, AckMode::Auto);
    each(OnStoreFailure::Fail, false, true, AckMode::Manual);
}
