//! The guard of a lease: it renews, it tells at once when the lease is lost, and it never believes in one that has ended.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use common::*;
use futures::FutureExt;
use parking_lot::Mutex;
use pubsub_core::{
    Acquired, Bus, Capabilities, Capability, Closed, Error, ErrorKind, Event, Lease, LeaseGuard, LeaseProvider, Page,
    Positions, PubSub, PublishError, PublishOptions, Reach, Result, Start, StatusWatch, SubscribeOptions, Subscription, Topic,
    TopicStatus, TrimFilter, check_lease,
};
use tokio::time::Instant;

const TTL: Duration = Duration::from_secs(9);

/// What a call of the fake store does.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Mood {
    #[default]
    Works,
    Fails,
    Hangs,
    /// It does what it is asked, and answers this much later.
    Late(Duration),
}

/// Leases in memory, with a clock that tests can watch and moods they can set.
#[derive(Debug, Default)]
struct Store {
    held: Mutex<HashMap<String, (String, u64, Instant)>>,
    token: AtomicU64,
    mood: Mutex<Mood>,
    renewals: AtomicU64,
}

impl Store {
    fn set(&self, mood: Mood) {
        *self.mood.lock() = mood;
    }

    /// Who holds the key now, by the store's own clock.
    fn owner(&self, key: &str) -> Option<String> {
        let held = self.held.lock();
        held.get(key).filter(|(_, _, until)| *until > Instant::now()).map(|(owner, ..)| owner.clone())
    }

    async fn ask<T>(&self, act: impl FnOnce() -> T) -> Result<T> {
        let mood = *self.mood.lock();
        match mood {
            Mood::Works => Ok(act()),
            Mood::Fails => Err(Error::new(ErrorKind::Unavailable)),
            Mood::Hangs => std::future::pending().await,
            Mood::Late(by) => {
                let answer = act();
                tokio::time::sleep(by).await;
                Ok(answer)
            }
        }
    }

    fn take(&self, key: &str, owner: &str, ttl: Duration) -> Lease {
        let token = self.token.fetch_add(1, Ordering::SeqCst) + 1;
        self.held.lock().insert(key.into(), (owner.into(), token, Instant::now() + ttl));
        Lease::new(owner, token, ttl)
    }

    fn holder_now(&self, key: &str) -> Option<Lease> {
        let held = self.held.lock();
        let (owner, token, until) = held.get(key).filter(|(_, _, until)| *until > Instant::now())?;
        Some(Lease::new(owner.clone(), *token, *until - Instant::now()))
    }
}

#[async_trait]
impl LeaseProvider for Store {
    fn reach(&self) -> Reach {
        Reach::Network
    }

    async fn acquire(&self, key: &str, owner: &str, ttl: Duration) -> Result<Acquired> {
        check_lease(&[key, owner], Some(ttl))?;
        self.ask(|| match self.holder_now(key) {
            Some(lease) if lease.owner != owner => Acquired::HeldBy(lease),
            _ => Acquired::Yes(self.take(key, owner, ttl)),
        })
        .await
    }

    async fn renew(&self, key: &str, owner: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.renewals.fetch_add(1, Ordering::SeqCst);
        self.ask(|| {
            let lease = self.holder_now(key).filter(|lease| lease.owner == owner)?;
            self.held.lock().get_mut(key).expect("held").2 = Instant::now() + ttl;
            Some(lease)
        })
        .await
    }

    async fn release(&self, key: &str, owner: &str) -> Result<bool> {
        self.ask(|| self.holder_now(key).is_some_and(|lease| lease.owner == owner) && self.held.lock().remove(key).is_some())
            .await
    }

    async fn transfer(&self, key: &str, from: &str, to: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.ask(|| self.holder_now(key).filter(|lease| lease.owner == from).map(|_| self.take(key, to, ttl))).await
    }

    async fn holder(&self, key: &str) -> Result<Option<Lease>> {
        self.ask(|| self.holder_now(key)).await
    }
}

async fn guard(store: &Arc<Store>) -> LeaseGuard {
    LeaseGuard::acquire(store.clone(), "k", "me", TTL).await.expect("the store answers").expect("it is free")
}

#[tokio::test(start_paused = true)]
async fn a_guard_renews_long_before_the_lease_ends() {
    let store = Arc::new(Store::default());
    let guard = guard(&store).await;
    for _ in 0..100 {
        tokio::time::sleep(TTL / 2).await;
        assert!(guard.is_held() && store.owner("k").as_deref() == Some("me"));
    }
    assert!((140..160).contains(&store.renewals.load(Ordering::SeqCst)), "every third of the time to live");
    assert_eq!((guard.key(), guard.token()), ("k", 1));
    assert_eq!(LeaseGuard::acquire(store.clone(), "k", "you", TTL).await.unwrap().unwrap_err().owner, "me");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_another_took_is_lost_at_the_next_renewal() {
    let store = Arc::new(Store::default());
    let guard = guard(&store).await;
    store.take("k", "you", TTL);
    let start = Instant::now();
    soon(guard.lost()).await;
    assert!(!guard.is_held() && start.elapsed() <= TTL / 3 + millis(2));
    drop(guard);
    tokio::time::sleep(millis(1)).await;
    assert_eq!(store.owner("k").as_deref(), Some("you"), "it does not release what is not its own");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_its_owner_took_anew_is_another_lease() {
    let store = Arc::new(Store::default());
    let guard = guard(&store).await;
    store.take("k", "me", TTL); // same owner, new token: it had been free in between
    soon(guard.lost()).await;
    assert!(!guard.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_store_that_cannot_be_reached_loses_the_lease_before_anybody_else_can_have_it() {
    for mood in [Mood::Fails, Mood::Hangs] {
        let store = Arc::new(Store::default());
        let guard = guard(&store).await;
        tokio::time::sleep(TTL).await; // renewed three times
        store.set(mood);
        soon(guard.lost()).await;
        assert_eq!(store.owner("k").as_deref(), Some("me"), "{mood:?}: told while the store still keeps it");
        assert!(!guard.is_held());
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewal_counts_from_when_it_was_asked_for() {
    let store = Arc::new(Store::default());
    let start = Instant::now();
    let guard = guard(&store).await;
    // Asked after 3 s and answered after 7; from then on nothing is answered.
    store.set(Mood::Late(Duration::from_secs(4)));
    tokio::time::sleep_until(start + Duration::from_secs(8)).await;
    assert!(guard.is_held());
    store.set(Mood::Hangs);
    soon(guard.lost()).await;
    let told = start.elapsed().as_millis();
    assert!((11_000..11_110).contains(&told), "nine tenths of 9 s after the renewal was asked for, not {told} ms");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_granted_slowly_is_renewed_or_lost_in_time() {
    for mood in [Mood::Works, Mood::Hangs] {
        let store = Arc::new(Store::default());
        store.set(Mood::Late(TTL * 8 / 10));
        let guard = guard(&store).await;
        store.set(mood);
        if mood == Mood::Works {
            tokio::time::sleep(TTL).await;
            assert!(guard.is_held() && guard.lost().now_or_never().is_none());
        } else {
            soon(guard.lost()).await;
        }
        assert_eq!(store.owner("k").as_deref(), Some("me"), "{mood:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_guard_survives_a_short_outage() {
    let store = Arc::new(Store::default());
    let guard = guard(&store).await;
    store.set(Mood::Fails);
    tokio::time::sleep(TTL * 6 / 10).await;
    store.set(Mood::Works);
    tokio::time::sleep(TTL * 3).await;
    assert!(guard.is_held() && guard.lost().now_or_never().is_none());
    assert_eq!(store.owner("k").as_deref(), Some("me"));
}

#[tokio::test(start_paused = true)]
async fn releasing_frees_the_lease_and_stops_renewing() {
    let store = Arc::new(Store::default());
    assert!(guard(&store).await.release().await.unwrap());
    assert_eq!(store.owner("k"), None);
    let renewals = store.renewals.load(Ordering::SeqCst);
    tokio::time::sleep(TTL * 5).await;
    assert_eq!(store.renewals.load(Ordering::SeqCst), renewals);
    let lost = guard(&store).await;
    store.take("k", "you", TTL);
    assert!(!lost.release().await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn dropping_frees_the_lease_in_the_background_from_any_thread() {
    let store = Arc::new(Store::default());
    let here = guard(&store).await;
    drop(here);
    tokio::time::sleep(millis(1)).await;
    assert_eq!(store.owner("k"), None);
    let there = guard(&store).await;
    std::thread::spawn(move || drop(there)).join().unwrap();
    tokio::time::sleep(millis(1)).await;
    assert_eq!(store.owner("k"), None, "also from a thread without a runtime");
}

#[tokio::test(start_paused = true)]
async fn a_release_that_is_given_up_goes_on_in_the_background() {
    let store = Arc::new(Store::default());
    let guard = guard(&store).await;
    store.set(Mood::Hangs);
    assert!(tokio::time::timeout(millis(10), guard.release()).await.is_err());
    // Its own release was started while the store hung; one more is what this is about.
    tokio::time::sleep(millis(10)).await;
    assert_eq!(store.owner("k").as_deref(), Some("me"));

    let store = Arc::new(Store::default());
    let guard = self::guard(&store).await;
    let mut release = Box::pin(guard.release());
    store.set(Mood::Hangs);
    assert!(release.as_mut().now_or_never().is_none());
    store.set(Mood::Works);
    drop(release);
    tokio::time::sleep(millis(1)).await;
    assert_eq!(store.owner("k"), None);
}

#[tokio::test(start_paused = true)]
async fn a_transfer_hands_over_with_a_greater_token() {
    let store = Arc::new(Store::default());
    let first = guard(&store).await;
    let token = first.token();
    let asked = Instant::now();
    let lease = first.transfer("you", TTL).await.unwrap().expect("it was held");
    assert!(lease.token > token && store.owner("k").as_deref() == Some("you"));
    let second = LeaseGuard::adopt(store.clone(), "k", &lease, TTL, asked);
    tokio::time::sleep(TTL * 3).await;
    assert!(second.is_held() && second.token() == lease.token);
}

#[test]
fn bad_names_and_times_are_refused_by_name() {
    let long = "x".repeat(256);
    for name in ["", "a\nb", &long] {
        let error = check_lease(&[name], None).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidName(_)), "{error}");
    }
    for ttl in [Duration::ZERO, Duration::from_micros(999), Duration::MAX] {
        let error = check_lease(&["k"], Some(ttl)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidOption { option, .. } if option == "ttl"), "{error}");
    }
    assert!(check_lease(&["k:/ ü", &long[..255]], Some(TTL)).is_ok());
}

// Leases beside a bus.

/// A bus that says which method was called by the error it returns.
#[derive(Debug)]
struct Echo;

fn called<T, E: From<Error>>(method: &'static str) -> Result<T, E> {
    Err(Error::new(ErrorKind::NotFound).during(method).into())
}

#[async_trait]
impl PubSub for Echo {
    fn capabilities(&self) -> Capabilities {
        Capabilities::in_process()
    }
    async fn publish(&self, _: &Topic, events: &[Arc<Event>], _: PublishOptions) -> Result<Positions, PublishError> {
        Err(PublishError::none_sent(Error::new(ErrorKind::NotFound).during("publish"), events.len()))
    }
    async fn subscribe(&self, _: &Topic, _: SubscribeOptions) -> Result<Subscription> {
        called("subscribe")
    }
    async fn history(&self, _: &Topic, _: Start, _: usize) -> Result<Page> {
        called("history")
    }
    async fn clear_topic(&self, _: &Topic) -> Result<()> {
        called("clear_topic")
    }
    async fn trim_topic(&self, _: &Topic, _: TrimFilter) -> Result<u64> {
        called("trim_topic")
    }
    async fn inspect(&self, _: &Topic) -> Result<TopicStatus> {
        called("inspect")
    }
    fn status(&self) -> StatusWatch {
        StatusWatch::new(tokio::sync::watch::channel(pubsub_core::Status::Connected).1)
    }
    async fn flush(&self) -> Result<()> {
        called("flush")
    }
    async fn close(&self, _: Duration) -> Result<Closed> {
        called("close")
    }
    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        None
    }
}

#[tokio::test]
async fn leases_beside_a_bus_change_nothing_else() {
    let bare = Bus::from(Echo);
    assert!(bare.leases().is_none());
    assert_eq!(
        *bare.require([Capability::Leases]).unwrap_err().kind(),
        ErrorKind::Unsupported(Capability::Leases),
        "none are made up"
    );
    let bus = bare.clone().with_leases(Arc::new(Store::default()));
    bus.require([Capability::Leases]).unwrap();
    let guard = LeaseGuard::acquire(bus.leases().unwrap(), "k", "me", TTL).await.unwrap().unwrap();
    assert!(guard.release().await.unwrap());
    let mut expected = bare.capabilities();
    expected.leases = Some(Reach::Network);
    assert_eq!(bus.capabilities(), expected);
    let second = Duration::from_secs(1);
    for (method, error) in [
        ("publish", bus.publish("t", Event::new("x")).await.map(drop).map_err(Error::from)),
        ("subscribe", bus.subscribe("t").await.map(drop)),
        ("history", bus.history("t", Start::Latest, 1).await.map(drop)),
        ("clear_topic", bus.clear_topic("t").await),
        ("trim_topic", bus.trim_topic("t", TrimFilter::run("r")).await.map(drop)),
        ("inspect", bus.inspect("t").await.map(drop)),
        ("flush", bus.flush().await),
        ("close", bus.close(second).await.map(drop)),
    ] {
        assert_eq!(error.unwrap_err().operation(), Some(method));
    }
    assert!(matches!(bus.status().get(), pubsub_core::Status::Connected));
}
