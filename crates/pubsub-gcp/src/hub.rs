//! The private subscription through which an instance gets a topic's events, shared by all who listen to it here.
//!
//! It is made for its first listener, and deleted with its last. What came is acknowledged at once: its retries are local, so that no
//! one else could do anything with it. What is sent twice, because an acknowledgement did not arrive, is told by its message id.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use gcloud_sdk::google::pubsub::v1::{ReceivedMessage, Subscription};
use gcloud_sdk::prost_types;
use parking_lot::Mutex;
use pubsub_core::machinery::Pause;
use pubsub_core::{Error, Result, dead_letter};
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, timeout_at};

use crate::channel::{Appetite, Channel};
use crate::errors::Fault;
use crate::message::{Arrival, Content};
use crate::names;
use crate::node::{Services, UNHEARD_WORDS};
use crate::provision::{Spec, expires, seconds};
use crate::settle::What;
use crate::stream::{self, Bell, Feed, Opening, Want};

/// How many message ids are remembered to tell what comes twice.
pub(crate) const REMEMBERED: usize = 20_000;

/// How many ack ids go in one record.
const ACKED_TOGETHER: usize = 500;

/// How far ahead of its listeners the service may be, where it keeps to that.
const AHEAD: (usize, usize) = (1000, 16 << 20);

pub(crate) struct Hub {
    channel: Arc<Channel>,
    services: Arc<Services>,
    spec: Arc<Spec>,
    name: Arc<str>,
    bell: Bell,
    seen: Mutex<Remembered>,
    /// What this instance has published and not got yet: a drain waits for it.
    expected: Mutex<HashSet<String>>,
    caught_up: Notify,
    /// Whether it is on the service, or why not.
    door: watch::Sender<Option<std::result::Result<(), Fault>>>,
    ended: AtomicBool,
    /// Whether nothing of it is left on the service, as far as that can be had.
    gone: watch::Sender<bool>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    deleting: Mutex<Option<AbortHandle>>,
}

/// What was seen last.
#[derive(Default)]
pub(crate) struct Remembered {
    order: VecDeque<Arc<str>>,
    all: HashSet<Arc<str>>,
}

impl Remembered {
    /// Remembers an id; false if it was known.
    pub(crate) fn insert(&mut self, id: &str) -> bool {
        if self.all.contains(id) {
            return false;
        }
        let id: Arc<str> = id.into();
        self.all.insert(id.clone());
        self.order.push_back(id);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.all.remove(&oldest);
        }
        true
    }

    pub(crate) fn knows(&self, id: &str) -> bool {
        self.all.contains(id)
    }
}

impl Hub {
    /// A hub, and its subscription on its way: what awaits [`opened`](Self::opened) is told how that ended.
    pub(crate) fn new(channel: Arc<Channel>, services: Arc<Services>, since: Option<prost_types::Timestamp>) -> Arc<Self> {
        let options = &services.options;
        let id = names::private(&channel.route.google, &services.instance, services.next_number());
        let name: Arc<str> = services.link.subscription(&id).into();
        let labels = [("pubsub-kind", "fan-out"), ("pubsub-instance", services.instance.as_str())];
        let subscription = Subscription {
            name: name.to_string(),
            topic: channel.google.to_string(),
            ack_deadline_seconds: services.deadline(),
            enable_message_ordering: options.ordering,
            message_retention_duration: Some(seconds(options.private_retention)),
            expiration_policy: expires(Some(options.private_ttl)),
            labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            filter: channel.route.filter(),
            ..Subscription::default()
        };
        let spec = Arc::new(Spec { subscription, since });
        let hub = Arc::new(Self {
            channel,
            services,
            spec,
            name,
            bell: Bell::new(),
            seen: Mutex::default(),
            expected: Mutex::default(),
            caught_up: Notify::new(),
            door: watch::Sender::new(None),
            ended: AtomicBool::new(false),
            gone: watch::Sender::new(false),
            tasks: Mutex::default(),
            deleting: Mutex::default(),
        });
        // A task of its own: others wait for it, too, whatever becomes of the first.
        let making = hub.clone();
        hub.services.timer.runtime().spawn(async move { making.make().await });
        hub
    }

    async fn make(self: Arc<Self>) {
        let (until, mut pause) = (Instant::now() + self.services.options.command_timeout, Pause::new());
        let outcome = loop {
            let fault = match timeout_at(until, self.services.provision.ensure(&self.spec)).await {
                Ok(Ok(())) => break Ok(()),
                Ok(Err(fault)) => fault,
                Err(_) => Fault::timed_out(),
            };
            let again = Instant::now() + pause.step();
            if !fault.is_temporary() || again >= until || self.services.is_closed() || self.has_ended() {
                break Err(fault);
            }
            self.services.ill(&fault);
            tokio::time::sleep_until(again).await;
        };
        if outcome.is_ok() {
            self.services.well();
            self.services.provision.remember(&self.spec);
            let opening = Opening {
                subscription: self.name.clone(),
                deadline: self.services.deadline(),
                client_id: self.services.instance.clone(),
            };
            let streams = (0..self.services.options.streams)
                .map(|_| stream::start(&self, &self.bell, self.services.link.clone(), opening.clone()));
            self.tasks.lock().extend(streams);
        }
        self.door.send_replace(Some(outcome));
    }

    /// Waits until it is on the service.
    pub(crate) async fn opened(&self) -> Result<()> {
        let mut door = self.door.subscribe();
        // The sender is this very hub's.
        let outcome = door.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or(Ok(())).map_err(Error::from)
    }

    /// Whether what is published from now on is certain to come.
    pub(crate) fn is_open(&self) -> bool {
        !self.has_ended() && matches!(*self.door.borrow(), Some(Ok(())))
    }

    /// This instance has published something that is to come.
    pub(crate) fn expect(&self, ids: &[String]) {
        let seen = self.seen.lock();
        let mut expected = self.expected.lock();
        // Beyond the bound a drain does not wait for it.
        let room = REMEMBERED.saturating_sub(expected.len());
        expected.extend(ids.iter().filter(|id| !seen.knows(id)).take(room).cloned());
    }

    fn forget_expected(&self) {
        self.expected.lock().clear();
        self.caught_up.notify_waiters();
    }

    /// What a server had that has forgotten all is lost, and it gives its message ids anew.
    fn forget_server(&self) {
        self.forget_expected();
        *self.seen.lock() = Remembered::default();
    }

    /// Waits until what this instance had published before has come.
    pub(crate) async fn caught_up(&self) {
        loop {
            let changed = self.caught_up.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            if self.has_ended() || self.expected.lock().is_empty() {
                return;
            }
            changed.await;
        }
    }

    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends it: its streams, and what it is on the service.
    pub(crate) fn end(self: &Arc<Self>) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        self.forget_expected();
        self.bell.ring();
        let hub = self.clone();
        let deleting = self.services.timer.runtime().spawn(async move {
            let until = Instant::now() + UNHEARD_WORDS;
            let mut door = hub.door.subscribe();
            let made = timeout_at(until, door.wait_for(Option::is_some)).await;
            drop(made);
            let tasks = std::mem::take(&mut *hub.tasks.lock());
            stream::wind_up(tasks, until).await;
            let mut pause = Pause::new();
            loop {
                match timeout_at(until, hub.services.link.delete_subscription(&hub.name)).await {
                    Ok(Ok(())) => break,
                    Ok(Err(fault)) if fault.is_temporary() => tokio::time::sleep(pause.step()).await,
                    Ok(Err(fault)) => {
                        tracing::warn!(subscription = %hub.name, %fault, "a private subscription is left behind, until it expires");
                        break;
                    }
                    Err(_) => break, // it expires
                }
            }
            hub.gone.send_replace(true);
        });
        *self.deleting.lock() = Some(deleting.abort_handle());
    }

    /// Waits until nothing is left of it on the service, if it has ended.
    pub(crate) async fn gone(&self) {
        // The sender is this very hub's.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Gives up what it is still doing.
    pub(crate) fn abort(&self) {
        self.tasks.lock().drain(..).for_each(|task| task.abort());
        if let Some(deleting) = self.deleting.lock().take() {
            deleting.abort();
        }
        self.gone.send_replace(true);
    }

    /// Settles out of the way what is no event: counted, logged once, and dead-lettered where there is a topic for that.
    fn pass_over(&self, message: &str, published: Option<i64>, bytes: &[u8], why: &str) {
        self.channel.warn(message, why);
        for listener in self.channel.listeners_of(self) {
            listener.count_malformed();
            if let Some(to) = listener.options.dead_letter.clone() {
                let stand_in = Arrival::stand_in(message, published, bytes);
                let letter = dead_letter(&stand_in, &self.channel.topic, None, 1, "not an event");
                let services = self.services.clone();
                self.services.timer.runtime().spawn(async move { services.bury(&to, &letter).await });
            }
        }
    }
}

impl Feed for Hub {
    fn want(&self) -> Want {
        if self.has_ended() {
            return Want::End;
        }
        match self.channel.appetite(self) {
            Appetite::Hungry => Want::More,
            Appetite::Full | Appetite::Nobody => Want::Wait,
        }
    }

    fn ahead(&self) -> (usize, usize) {
        AHEAD
    }

    fn take(&self, received: Vec<ReceivedMessage>) {
        let (mut acked, mut events) = (Vec::with_capacity(received.len()), Vec::with_capacity(received.len()));
        let mut arrivals: Vec<_> = received.into_iter().map(Arrival::read).collect();
        let mut came = false;
        {
            let (mut seen, mut expected) = (self.seen.lock(), self.expected.lock());
            arrivals.retain_mut(|arrival| {
                acked.push(std::mem::take(&mut arrival.ack_id));
                came |= expected.remove(&arrival.message_id);
                seen.insert(&arrival.message_id)
            });
        }
        for Arrival { message_id, published, topic, content, .. } in arrivals {
            match content {
                Content::Event { event, attempt } => {
                    if self.channel.route.admits(topic.as_deref(), event.run_id()) {
                        events.push((event, attempt, published));
                    }
                }
                Content::Malformed { bytes, why } => self.pass_over(&message_id, published, &bytes, &why),
            }
        }
        while !acked.is_empty() {
            let rest = acked.split_off(acked.len().min(ACKED_TOGETHER));
            self.services.settle(&self.name, std::mem::replace(&mut acked, rest), What::Ack);
        }
        self.channel.dispatch(self, &events);
        if came && self.expected.lock().is_empty() {
            self.caught_up.notify_waiters();
        }
    }

    fn give_back(&self, received: Vec<ReceivedMessage>) {
        self.take(received); // it is for nobody else
    }

    fn mend(self: Arc<Self>, fault: Fault, lost: bool) -> BoxFuture<'static, std::result::Result<(), Fault>> {
        async move { self.services.mend(&self.spec, fault, lost, || self.forget_server()).await }.boxed()
    }

    fn flows(&self) {
        self.services.well();
    }

    fn fail(&self, fault: Fault) {
        tracing::warn!(subscription = %self.name, %fault, "a subscription cannot be read any more");
        for listener in self.channel.listeners_of(self) {
            listener.fail(Error::from(fault.clone()).during("read").on(&self.channel.topic));
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("subscription", &self.name).finish_non_exhaustive()
    }
}

/// The time of a clock, as the service wants it.
pub(crate) fn timestamp(time: std::time::SystemTime) -> prost_types::Timestamp {
    let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_twice_is_told_within_a_bound() {
        let mut seen = Remembered::default();
        assert!(seen.insert("a") && !seen.insert("a"));
        for number in 0..REMEMBERED {
            assert!(seen.insert(&number.to_string()));
        }
        assert!(!seen.knows("a") && seen.knows("0") && seen.order.len() == REMEMBERED);
    }
}
