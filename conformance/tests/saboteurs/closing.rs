//! Buses that drain, close, heal and lease wrongly, and inline subscriptions that are not.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use pubsub_conformance::{Inline, InlineHandler};
use pubsub_core::{
    Acquired, Closed, Delivery, Event, Group, Lease, LeaseProvider, Positions, PublishError, PublishOptions, Reach, Receipt,
    Result, Settlement, Status, StatusWatch, SubscribeOptions, Subscription, SubscriptionHandle, Topic,
};
use tokio::sync::watch;

use crate::publishing::{FOREVER, discard};
use crate::wrapper::{Honest, Parcel, Sabotage, View};
use crate::{Base, Saboteur, saboteur};

pub(crate) fn saboteurs() -> Vec<Saboteur> {
    vec![
        saboteur::<SettlesLate>("flushes although settlements are on their way", &["C1"], &["CL-07"]),
        saboteur::<AlwaysDrained>("is drained while something is in hand", &["C1"], &["CL-08", "BA-07"]),
        saboteur::<FlushWaits>("waits at a flush for what is in consumers' hands", &["C1", "B6"], &["CL-08", "PS-24"]),
        saboteur::<CloseHangs>("never ends to close while a handler hangs", &["C2"], &["CL-06"]),
        saboteur::<CloseHangs>("never ends to close while its server is away", &["C2"], &["CL-15"]).over(Base::SlowRemote),
        saboteur::<FlushFails>("does not let itself be flushed once it is closed", &["C1", "C2"], &["CL-10"]),
        saboteur::<CloseDrops>("closes without handing over what it accepted", &["C2"], &["CL-17"]),
        saboteur::<StaysOpen>("works on after it was closed", &["C2"], &["CL-02", "CL-03"]),
        saboteur::<ClosesOnce>("fails to close twice", &["C2"], &["CL-01"]),
        saboteur::<LeavesTask>("leaves a task behind when it is closed", &["C2"], &["CL-12"]),
        saboteur::<CountsWrong>("says that a close left nothing", &["C2"], &["CL-19"]),
        saboteur::<ObjectEach>("makes an object on the server for each fan-out subscription", &["B2"], &["CC-11"])
            .over(Base::SlowRemote),
        saboteur::<EndsWithHandle>("ends its subscriptions with its handle", &["C3"], &["AD-12"]),
        saboteur::<TaskPerSubscription>("leaves a task behind for each subscription", &["C3"], &["CL-14", "AD-12"]),
        saboteur::<HalfPublished>("publishes half of a call that is dropped", &["C4"], &["CC-17"]),
        saboteur::<LeavesAttached>("leaves attached what was subscribed in a dropped call", &["C4"], &["CC-17"]),
        saboteur::<LeavesAttached>("leaves on the server what was subscribed in a dropped call", &["C4"], &["CC-03"])
            .over(Base::SlowRemote),
        saboteur::<AlwaysConnected>("says that it is connected, whatever happens", &["N1"], &["AD-10"]).over(Base::SlowRemote),
        saboteur::<GivesUp>("stays away after the first call that went wrong", &["N1"], &["CC-12"]).over(Base::SlowRemote),
        saboteur::<EndsWhenCut>("ends subscriptions when the connection is cut", &["N1"], &["FR-01", "FR-02"])
            .over(Base::SlowRemote),
        saboteur::<Steals>("gives a lease to whoever asks", &["L1"], &["LE-02", "LE-08"]),
        saboteur::<AnyoneReleases>("lets anyone release a lease", &["L1"], &["LE-05"]),
        saboteur::<AnyoneRenews>("renews leases that have ended or are another's", &["L1", "L3"], &["LE-06", "LE-21"]),
        saboteur::<TransferGap>("frees a lease while it is transferred", &["L1"], &["LE-09"]),
        saboteur::<NoFence>("gives every owner the same token", &["L2"], &["AD-08"]),
        saboteur::<HidesLeases>("hides the leases it has", &["K1"], &["META-1", "LE-01"]),
        saboteur::<LendsLeases>("makes up leases it does not have", &["L4"], &["LE-18"]).over(Base::SlowRemote),
        saboteur::<LaterInline>("calls inline handlers in a task of their own", &["I1"], &["IL-01"]),
        saboteur::<FragileInline>("stops at an inline handler that panics", &["I1"], &["IL-02"]),
        saboteur::<ForEverInline>("calls inline handlers after they were dropped", &["I1"], &["IL-04"]),
    ]
}

#[derive(Default)]
struct SettlesLate;

impl Sabotage for SettlesLate {
    fn settle(&self, _: &View, delivery: Delivery, settlement: Settlement) -> Receipt {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return delivery.settle(settlement) };
        let (answer, receipt) = Receipt::pending();
        runtime.spawn(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let _ = answer.send(delivery.settle(settlement).await);
        });
        receipt
    }
}

#[derive(Default)]
struct AlwaysDrained;

#[async_trait]
impl Sabotage for AlwaysDrained {
    async fn drained(&self, _: &SubscriptionHandle) {}
}

#[derive(Default)]
struct FlushWaits(Mutex<Vec<SubscriptionHandle>>);

#[async_trait]
impl Sabotage for FlushWaits {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let subscription = honest.subscribe(topic, options).await?;
        self.0.lock().push(subscription.handle());
        Ok(subscription)
    }

    async fn flush(&self, honest: &Honest) -> Result<()> {
        let handles = self.0.lock().clone();
        futures::future::join_all(handles.iter().map(SubscriptionHandle::drained)).await;
        honest.flush().await
    }
}

#[derive(Default)]
struct CloseHangs;

#[async_trait]
impl Sabotage for CloseHangs {
    async fn close(&self, honest: &Honest, _: Duration) -> Result<Closed> {
        honest.close(FOREVER).await
    }
}

#[derive(Default)]
struct FlushFails(Mutex<bool>);

#[async_trait]
impl Sabotage for FlushFails {
    async fn flush(&self, honest: &Honest) -> Result<()> {
        if *self.0.lock() { Err(pubsub_core::Error::closed()) } else { honest.flush().await }
    }

    async fn close(&self, honest: &Honest, within: Duration) -> Result<Closed> {
        *self.0.lock() = true;
        honest.close(within).await
    }
}

#[derive(Default)]
struct GivesUp(AtomicBool);

/// Notices a call that fails, or is given up by its caller.
struct Watched<'a>(&'a AtomicBool, bool);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.fetch_or(!self.1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Sabotage for GivesUp {
    async fn publish(
        &self,
        honest: &Honest,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        if self.0.load(Ordering::SeqCst) {
            return Err(PublishError::none_sent(pubsub_core::ErrorKind::Unavailable, events.len()));
        }
        let mut watched = Watched(&self.0, false);
        let published = honest.publish(topic, events, options).await;
        watched.1 = published.is_ok();
        published
    }
}

/// Joins a group of its own beside each fan-out subscription.
#[derive(Default)]
struct ObjectEach(Mutex<Vec<Subscription>>);

#[async_trait]
impl Sabotage for ObjectEach {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        if options.group.is_none() {
            let own = Group::new(pubsub_core::EventId::random().to_string())?;
            let beside = honest.subscribe(topic, SubscribeOptions::group(own)).await?;
            self.0.lock().push(beside);
        }
        honest.subscribe(topic, options).await
    }
}

#[derive(Default)]
struct CloseDrops;

#[async_trait]
impl Sabotage for CloseDrops {
    async fn close(&self, honest: &Honest, _: Duration) -> Result<Closed> {
        honest.close(Duration::ZERO).await
    }
}

#[derive(Default)]
struct StaysOpen;

#[async_trait]
impl Sabotage for StaysOpen {
    async fn close(&self, _: &Honest, _: Duration) -> Result<Closed> {
        Ok(Closed::default())
    }
}

#[derive(Default)]
struct ClosesOnce(Mutex<bool>);

#[async_trait]
impl Sabotage for ClosesOnce {
    async fn close(&self, honest: &Honest, within: Duration) -> Result<Closed> {
        if std::mem::replace(&mut *self.0.lock(), true) {
            return Err(pubsub_core::Error::closed());
        }
        honest.close(within).await
    }
}

fn leave_task() {
    tokio::spawn(std::future::pending::<()>());
}

#[derive(Default)]
struct LeavesTask;

#[async_trait]
impl Sabotage for LeavesTask {
    async fn close(&self, honest: &Honest, within: Duration) -> Result<Closed> {
        leave_task();
        honest.close(within).await
    }
}

#[derive(Default)]
struct CountsWrong;

#[async_trait]
impl Sabotage for CountsWrong {
    async fn close(&self, honest: &Honest, within: Duration) -> Result<Closed> {
        honest.close(within).await.map(|_| Closed::default())
    }
}

#[derive(Default)]
struct EndsWithHandle(Mutex<Vec<SubscriptionHandle>>);

#[async_trait]
impl Sabotage for EndsWithHandle {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let subscription = honest.subscribe(topic, options).await?;
        self.0.lock().push(subscription.handle());
        Ok(subscription)
    }

    fn handle_dropped(&self) {
        self.0.lock().drain(..).for_each(|handle| handle.stop());
    }
}

#[derive(Default)]
struct TaskPerSubscription;

#[async_trait]
impl Sabotage for TaskPerSubscription {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        leave_task();
        honest.subscribe(topic, options).await
    }
}

/// Publishes to every other subscription first, and to the rest after some time to be dropped in.
#[derive(Default)]
struct HalfPublished(Mutex<HashSet<String>>);

#[async_trait]
impl Sabotage for HalfPublished {
    async fn publish(
        &self,
        honest: &Honest,
        topic: &Topic,
        events: &[Arc<Event>],
        options: PublishOptions,
    ) -> Result<Positions, PublishError> {
        let ids: Vec<_> = events.iter().map(|event| event.id().to_string()).collect();
        self.0.lock().extend(ids.iter().cloned());
        let published = honest.publish(topic, events, options).await;
        tokio::task::yield_now().await;
        self.0.lock().retain(|id| !ids.contains(id));
        published
    }

    fn deliver(&self, view: &View, parcel: Parcel) -> Vec<Parcel> {
        let half = self.0.lock().contains(&parcel.event.id().to_string());
        if half && view.number.is_multiple_of(2) { discard(parcel) } else { vec![parcel] }
    }
}

/// Subscribes in a task that nobody stops.
#[derive(Default)]
struct LeavesAttached(Arc<Mutex<Vec<Subscription>>>);

#[async_trait]
impl Sabotage for LeavesAttached {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let kept = self.0.clone();
        let copy = (honest.clone(), topic.clone(), options.clone());
        let subscribing = tokio::spawn(async move {
            let (honest, topic, options) = copy;
            let subscription = honest.subscribe(&topic, options).await?;
            kept.lock().push(subscription);
            Ok::<_, pubsub_core::Error>(())
        });
        tokio::task::yield_now().await;
        subscribing.await.expect("subscribing does not panic")?;
        // The call was not dropped: what was made for it is taken back.
        Ok(self.0.lock().pop().expect("put there above"))
    }
}

#[derive(Default)]
struct AlwaysConnected(Mutex<Option<watch::Sender<Status>>>);

impl Sabotage for AlwaysConnected {
    fn status(&self, _: &Honest) -> StatusWatch {
        let mut status = self.0.lock();
        StatusWatch::new(status.get_or_insert_with(|| watch::Sender::new(Status::Connected)).subscribe())
    }
}

#[derive(Default)]
struct EndsWhenCut;

#[async_trait]
impl Sabotage for EndsWhenCut {
    async fn subscribe(&self, honest: &Honest, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let subscription = honest.subscribe(topic, options).await?;
        let (handle, mut status) = (subscription.handle(), honest.status());
        tokio::spawn(async move {
            while let Some(now) = status.changed().await {
                if matches!(now, Status::Reconnecting { .. }) {
                    handle.stop();
                }
            }
        });
        Ok(subscription)
    }
}

/// Wraps the leases of the bus below.
macro_rules! wrong_leases {
    ($saboteur:ident, $leases:ident) => {
        #[derive(Default)]
        struct $saboteur;

        impl Sabotage for $saboteur {
            fn leases(&self, honest: &Honest) -> Option<Arc<dyn LeaseProvider>> {
                let wrong = |leases| Wrong { leases, how: How::$leases, granted: Mutex::default() };
                honest.leases().map(|leases| Arc::new(wrong(leases)) as Arc<dyn LeaseProvider>)
            }
        }
    };
}

wrong_leases!(Steals, Steals);
wrong_leases!(AnyoneReleases, AnyoneReleases);
wrong_leases!(AnyoneRenews, AnyoneRenews);
wrong_leases!(TransferGap, TransferGap);
wrong_leases!(NoFence, NoFence);

#[derive(Debug, PartialEq, Eq)]
enum How {
    Steals,
    AnyoneReleases,
    AnyoneRenews,
    TransferGap,
    NoFence,
}

#[derive(Debug)]
struct Wrong {
    leases: Arc<dyn LeaseProvider>,
    how: How,
    /// The last token of each key and owner.
    granted: Mutex<HashMap<(String, String), u64>>,
}

impl Wrong {
    fn token(&self, mut lease: Lease) -> Lease {
        if self.how == How::NoFence {
            lease.token = 1;
        }
        lease
    }

    async fn force_free(&self, key: &str) -> Result<()> {
        if let Some(lease) = self.leases.holder(key).await? {
            self.leases.release(key, &lease.owner).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl LeaseProvider for Wrong {
    fn reach(&self) -> Reach {
        self.leases.reach()
    }

    async fn acquire(&self, key: &str, owner: &str, ttl: Duration) -> Result<Acquired> {
        if self.how == How::Steals {
            self.force_free(key).await?;
        }
        Ok(match self.leases.acquire(key, owner, ttl).await? {
            Acquired::Yes(lease) => {
                self.granted.lock().insert((key.to_owned(), owner.to_owned()), lease.token);
                Acquired::Yes(self.token(lease))
            }
            Acquired::HeldBy(lease) => Acquired::HeldBy(self.token(lease)),
        })
    }

    async fn renew(&self, key: &str, owner: &str, ttl: Duration) -> Result<Option<Lease>> {
        let renewed = self.leases.renew(key, owner, ttl).await?;
        let mut granted = self.granted.lock();
        if let Some(lease) = &renewed {
            granted.insert((key.to_owned(), owner.to_owned()), lease.token);
        }
        let token = granted.get(&(key.to_owned(), owner.to_owned())).copied().unwrap_or(1);
        let claimed = (self.how == How::AnyoneRenews).then(|| Lease::new(owner, token, ttl));
        Ok(renewed.or(claimed).map(|lease| self.token(lease)))
    }

    async fn release(&self, key: &str, owner: &str) -> Result<bool> {
        if self.how == How::AnyoneReleases {
            self.force_free(key).await?;
            return Ok(true);
        }
        self.leases.release(key, owner).await
    }

    async fn transfer(&self, key: &str, from: &str, to: &str, ttl: Duration) -> Result<Option<Lease>> {
        if self.how == How::TransferGap && self.leases.release(key, from).await? {
            tokio::time::sleep(Duration::from_millis(1)).await;
            return Ok(match self.leases.acquire(key, to, ttl).await? {
                Acquired::Yes(lease) => Some(lease),
                Acquired::HeldBy(_) => None,
            });
        }
        Ok(self.leases.transfer(key, from, to, ttl).await?.map(|lease| self.token(lease)))
    }

    async fn holder(&self, key: &str) -> Result<Option<Lease>> {
        Ok(self.leases.holder(key).await?.map(|lease| self.token(lease)))
    }
}

#[derive(Default)]
struct HidesLeases;

impl Sabotage for HidesLeases {
    fn leases(&self, _: &Honest) -> Option<Arc<dyn LeaseProvider>> {
        None
    }
}

#[derive(Default)]
struct LendsLeases;

impl Sabotage for LendsLeases {
    fn leases(&self, _: &Honest) -> Option<Arc<dyn LeaseProvider>> {
        pubsub_core::PubSub::leases(&pubsub_emitter::EventEmitterPubSub::new())
    }
}

#[derive(Default)]
struct LaterInline;

impl Sabotage for LaterInline {
    fn subscribe_inline(&self, honest: &dyn Inline, topic: &Topic, handler: InlineHandler) -> Result<Box<dyn Any + Send>> {
        let handler: Arc<InlineHandler> = Arc::new(handler);
        let later = move |event: &Arc<Event>| {
            let (handler, event) = (handler.clone(), event.clone());
            tokio::spawn(async move { handler(&event) });
        };
        honest.subscribe(topic, Box::new(later))
    }
}

/// After a panic a handler is not called any more, and neither are the others.
#[derive(Default)]
struct FragileInline(Arc<Mutex<bool>>);

impl Sabotage for FragileInline {
    fn subscribe_inline(&self, honest: &dyn Inline, topic: &Topic, handler: InlineHandler) -> Result<Box<dyn Any + Send>> {
        let broken = self.0.clone();
        let fragile = move |event: &Arc<Event>| {
            if *broken.lock() {
                return;
            }
            let called = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| handler(event)));
            *broken.lock() |= called.is_err();
        };
        honest.subscribe(topic, Box::new(fragile))
    }
}

#[derive(Default)]
struct ForEverInline;

impl Sabotage for ForEverInline {
    fn subscribe_inline(&self, honest: &dyn Inline, topic: &Topic, handler: InlineHandler) -> Result<Box<dyn Any + Send>> {
        std::mem::forget(honest.subscribe(topic, handler)?);
        Ok(Box::new(()))
    }
}
