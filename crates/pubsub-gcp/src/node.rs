//! What an instance, its subscriptions and their deliveries share; the last of them takes the connections with it.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use pubsub_core::machinery::{Closing, DeadLetterSink, DeliveryQueue, InstanceId, Pause, SettleQueue, Timer};
use pubsub_core::{Closed, Error, Event, Group, Result, Status, Topic};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use crate::GcpBuilder;
use crate::channel::Channel;
use crate::desk::{Burial, Desk, bury_all};
use crate::errors::Fault;
use crate::hub::Hub;
use crate::link::{Address, Link};
use crate::listener::Attachment;
use crate::member::Membership;
use crate::message;
use crate::names::Names;
use crate::provision::{Provision, Spec};
use crate::publish::Publisher;
use crate::settle::{self, Notice, What};

/// Queues tell instances apart; those here have one.
pub(crate) const INSTANCE: InstanceId = 0;

/// How long closing takes beyond its time to say its last words.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long they may take when nobody waits for them.
pub(crate) const UNHEARD_WORDS: Duration = Duration::from_secs(5);

/// What an instance's parts work with. It refers to none of them.
pub(crate) struct Services {
    pub(crate) options: GcpBuilder,
    pub(crate) names: Names,
    pub(crate) link: Arc<Link>,
    pub(crate) provision: Arc<Provision>,
    pub(crate) publisher: Publisher,
    pub(crate) notices: SettleQueue<Notice>,
    pub(crate) burials: SettleQueue<Burial>,
    pub(crate) timer: Arc<Timer>,
    pub(crate) instance: String,
    status: watch::Sender<Status>,
    numbers: AtomicU64,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Services {
    pub(crate) fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn deadline(&self) -> i32 {
        i32::try_from(self.options.ack_deadline.as_secs()).unwrap_or(600)
    }

    /// Something was answered.
    pub(crate) fn well(&self) {
        self.tell(|status| matches!(status, Status::Reconnecting { .. } | Status::Failed(_)), || Status::Connected);
    }

    /// Something was not.
    pub(crate) fn ill(&self, fault: &Fault) {
        if fault.is_temporary() {
            self.tell(|status| matches!(status, Status::Connected), || Status::Reconnecting { since: SystemTime::now() });
        } else if !fault.is_not_found() {
            let failed = || Status::Failed(Arc::new(fault.clone().into()));
            self.tell(|status| !matches!(status, Status::Closed | Status::Failed(_)), failed);
        }
    }

    /// After a stream ended with a fault: finds out whether its subscription can be reached. Where its server has forgotten it, it is made
    /// anew, once what is known of it was forgotten here, too.
    pub(crate) async fn mend(&self, spec: &Spec, fault: Fault, lost: bool, forget: impl FnOnce()) -> Result<(), Fault> {
        match self.probe(spec.name(), fault).await {
            Err(fault) if fault.is_not_found() && lost && self.options.restores() => {
                tracing::warn!(subscription = spec.name(), "a subscription was gone and is made anew");
                forget();
                self.provision.ensure(spec).await
            }
            outcome => outcome,
        }
    }

    /// Whether a subscription can be reached, and is there. An idle stream would not tell before its next message.
    async fn probe(&self, subscription: &str, fault: Fault) -> Result<(), Fault> {
        self.ill(&fault);
        if !fault.is_temporary() {
            return Err(fault);
        }
        match self.link.get_subscription(subscription).await {
            Ok(_) => {
                self.well();
                Ok(())
            }
            Err(fault) => {
                self.ill(&fault);
                Err(fault)
            }
        }
    }

    fn tell(&self, if_it_is: impl Fn(&Status) -> bool, now: impl FnOnce() -> Status) {
        // Looked at first: nearly always there is nothing to tell.
        if if_it_is(&self.status.borrow()) {
            self.status.send_if_modified(|status| {
                let tell = if_it_is(status);
                if tell {
                    *status = now();
                }
                tell
            });
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        matches!(*self.status.borrow(), Status::Closed)
    }

    /// Waits for the close.
    pub(crate) async fn closed(&self) {
        // The sender is this very instance's.
        let _ = self.status.subscribe().wait_for(|status| matches!(status, Status::Closed)).await;
    }

    /// Records what is to become of messages, for nobody in particular.
    pub(crate) fn settle(&self, subscription: &Arc<str>, ack_ids: Vec<String>, what: What) {
        if !ack_ids.is_empty() {
            let until = Instant::now() + self.options.ack_deadline;
            let subscription = subscription.clone();
            drop(self.notices.record(Notice { subscription, ack_ids, what, until, renews: None }));
        }
    }

    /// Publishes a dead letter, however often that takes, until the instance is closed. Returns whether it is there.
    pub(crate) async fn bury(&self, to: &Topic, letter: &Event) -> bool {
        let route = self.names.route(to);
        let topic: Arc<str> = self.link.topic(&route.google).into();
        let message = match message::encode(letter, &route, self.options.ordering) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(topic = %to, %error, "a dead letter cannot be written");
                return true; // it never can
            }
        };
        let mut pause = Pause::new();
        loop {
            match self.publisher.publish(&topic, vec![message.clone()], self.options.publish_timeout, false).await {
                Ok(_) => return true,
                Err(failed) if failed.is_temporary() && !self.is_closed() => {}
                Err(failed) => {
                    tracing::warn!(topic = %to, fault = ?failed.fault, "a dead letter was not published; its event comes again");
                    return false;
                }
            }
            tokio::time::sleep(pause.step()).await;
        }
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.tasks.get_mut().iter().for_each(AbortHandle::abort);
    }
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").field("instance", &self.instance).field("options", &self.options).finish_non_exhaustive()
    }
}

pub(crate) struct Node {
    pub(crate) services: Arc<Services>,
    pub(crate) attached: Mutex<Attached>,
    /// Begun while nothing can be attached.
    closing: Closing,
}

/// What is attached, so that closing can end it.
#[derive(Default)]
pub(crate) struct Attached {
    channels: HashMap<Topic, Arc<Channel>>,
    desks: HashMap<(Topic, Group), Weak<Desk>>,
    hubs: Vec<Weak<Hub>>,
    listeners: Vec<Weak<Attachment>>,
    members: Vec<Weak<Membership>>,
}

impl Node {
    pub(crate) async fn connect(address: Address, options: GcpBuilder) -> Result<Arc<Self>> {
        let timer = Arc::new(Timer::new()?);
        let link = Arc::new(Link::open(address, options.command_timeout).await?);
        let provision = Provision::new(link.clone(), options.create_topics, options.topic_retention, options.restore_grace);
        let provision = Arc::new(provision);
        let status = watch::Sender::new(Status::Connected);
        let publisher = Publisher::new(link.clone(), provision.clone(), timer.runtime(), &options);
        let services = Arc::new(Services {
            names: Names::new(options.shared_topics.clone(), options.plain_groups.clone()),
            options,
            link: link.clone(),
            provision,
            publisher,
            notices: SettleQueue::new(),
            burials: SettleQueue::new(),
            timer,
            instance: format!("{:032x}", fastrand::u128(..)),
            status,
            numbers: AtomicU64::new(0),
            tasks: Mutex::default(),
        });
        let tasks = [
            tokio::spawn(settle::run(link, services.notices.clone())).abort_handle(),
            tokio::spawn(bury_all(services.burials.clone(), Arc::downgrade(&services))).abort_handle(),
        ];
        services.tasks.lock().extend(tasks);
        Ok(Arc::new(Self { services, attached: Mutex::default(), closing: Closing::default() }))
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.services.status.subscribe()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closing.has_begun()
    }

    /// A topic, if anything of this instance is attached to it.
    pub(crate) fn channel(&self, topic: &Topic) -> Option<Arc<Channel>> {
        self.attached.lock().channels.get(topic).cloned()
    }

    /// Attaches something to a topic, which `attach` does under the lock that keeps the topic from being forgotten.
    ///
    /// # Errors
    /// `Closed`.
    pub(crate) fn attach<R>(&self, topic: &Topic, attach: impl FnOnce(&mut Attached, &Arc<Channel>) -> R) -> Result<R> {
        let mut attached = self.attached.lock();
        if self.is_closed() {
            return Err(Error::closed());
        }
        let services = &self.services;
        let channel = attached.channels.entry(topic.clone()).or_insert_with(|| {
            let route = services.names.route(topic);
            let google = services.link.topic(&route.google).into();
            Channel::new(topic.clone(), route, google)
        });
        let channel = channel.clone();
        Ok(attach(&mut attached, &channel))
    }

    /// Forgets a topic that nothing is attached to any more.
    pub(crate) fn tidy(&self, channel: &Arc<Channel>) {
        let mut attached = self.attached.lock();
        if channel.is_idle() {
            attached.channels.remove(&channel.topic);
        }
        attached.desks.retain(|_, desk| desk.strong_count() > 0);
    }

    /// The queue of one fan-out subscription, or of a group's members here.
    pub(crate) fn queue(&self, topic: &Topic, group: Option<&Group>) -> Arc<DeliveryQueue> {
        let (timer, sink) = (self.services.timer.clone(), Arc::new(Sink(Arc::downgrade(&self.services))));
        match group {
            Some(group) => DeliveryQueue::group(topic.clone(), group.clone(), timer, sink),
            None => DeliveryQueue::fan_out(topic.clone(), timer, sink),
        }
    }

    /// Closes, or waits for a close that has begun.
    pub(crate) async fn close(self: &Arc<Self>, within: Duration) -> Result<Closed> {
        let begins = {
            let _nothing_attaches = self.attached.lock();
            let node = self.clone();
            self.closing.begin(&self.services.timer.runtime(), || async move { node.end(within).await })
        };
        if begins {
            self.services.status.send_replace(Status::Closed);
        }
        self.closing.ended().await
    }

    /// Drains what was accepted within the time, then ends everything.
    async fn end(self: Arc<Self>, within: Duration) -> Closed {
        let until = Instant::now() + within;
        let services = self.services.clone();
        let (listeners, members, desks) = {
            let attached = self.attached.lock();
            let listeners: Vec<_> = attached.listeners.iter().filter_map(Weak::upgrade).collect();
            let members: Vec<_> = attached.members.iter().filter_map(Weak::upgrade).collect();
            let desks: Vec<_> = attached.desks.values().filter_map(Weak::upgrade).collect();
            (listeners, members, desks)
        };
        let mut closed = Closed::default();
        closed.released = members.iter().map(|member| member.leave()).sum();
        let drained = async {
            services.publisher.flush().await;
            let listeners = listeners.iter().map(|listener| listener.relieved().boxed());
            let desks = desks.iter().map(|desk| desk.idle().boxed());
            futures::future::join_all(listeners.chain(desks)).await;
        };
        let _ = timeout_at(until, drained).await;
        for listener in &listeners {
            let (released, cut_off) = listener.cut_off();
            closed.released += released;
            closed.cut_off += cut_off;
        }
        closed.cut_off += desks.iter().map(|desk| desk.revoke()).sum::<u64>();
        let hubs: Vec<_> = self.attached.lock().hubs.iter().filter_map(Weak::upgrade).collect();
        let last_words = async {
            services.burials.flush().await;
            futures::future::join_all(desks.iter().map(|desk| desk.stopped())).await;
            services.notices.flush().await;
            futures::future::join_all(hubs.iter().map(|hub| hub.gone())).await;
        };
        let until = until.max(Instant::now() + LAST_WORDS);
        let _ = timeout_at(until, last_words).await;
        services.publisher.close();
        hubs.iter().for_each(|hub| hub.abort());
        desks.iter().for_each(|desk| desk.abort());
        let tasks = std::mem::take(&mut *services.tasks.lock());
        tasks.iter().for_each(AbortHandle::abort);
        // What was not buried refers to this instance, and comes again.
        drop(services.burials.next_batch(usize::MAX).now_or_never());
        closed
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.is_closed() {
            return;
        }
        // Nothing is attached any more; what was settled last is still to be said.
        let services = self.services.clone();
        self.services.timer.runtime().spawn(async move {
            let until = Instant::now() + UNHEARD_WORDS;
            let _ = timeout_at(until, services.publisher.flush()).await;
            let _ = timeout_at(until, services.notices.flush()).await;
        });
    }
}

impl Attached {
    pub(crate) fn desk(&self, topic: &Topic, group: &Group) -> Option<Arc<Desk>> {
        self.desks.get(&(topic.clone(), group.clone()))?.upgrade()
    }

    pub(crate) fn add_desk(&mut self, desk: &Arc<Desk>) {
        self.desks.insert((desk.channel.topic.clone(), desk.group.clone()), Arc::downgrade(desk));
    }

    pub(crate) fn add_hub(&mut self, hub: &Arc<Hub>) {
        prune(&mut self.hubs);
        self.hubs.push(Arc::downgrade(hub));
    }

    pub(crate) fn add_listener(&mut self, listener: &Arc<Attachment>) {
        prune(&mut self.listeners);
        self.listeners.push(Arc::downgrade(listener));
    }

    pub(crate) fn add_member(&mut self, member: &Arc<Membership>) {
        prune(&mut self.members);
        self.members.push(Arc::downgrade(member));
    }
}

/// Forgets what is gone, when it is time to.
fn prune<T>(all: &mut Vec<Weak<T>>) {
    if all.len() == all.capacity() {
        all.retain(|one| one.strong_count() > 0);
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.services.fmt(f)
    }
}

/// What queues hand their dead letters to.
struct Sink(Weak<Services>);

impl DeadLetterSink for Sink {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        let (services, topic) = (self.0.upgrade()?, topic.clone());
        Some(Box::pin(async move {
            services.bury(&topic, &letter).await;
        }))
    }
}
