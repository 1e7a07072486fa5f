//! What an instance, its subscriptions and their deliveries share; the last of them takes the connections with it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fred::interfaces::{ClientLike, EventInterface};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use pubsub_core::machinery::{Closing, DeadLetterSink, DeliveryQueue, InstanceId, Pause, SettleQueue, Timer};
use pubsub_core::{Closed, Error, Event, Group, Result, Scope, Status, Topic, wire};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, timeout, timeout_at};

use crate::RedisBuilder;
use crate::channel::Channel;
use crate::cluster::{Cluster, Place};
use crate::desk::{Burial, Desk, bury_all};
use crate::entry::EntryId;
use crate::errors::Fault;
use crate::follower::Attachment;
use crate::groups::{GroupReader, Membership};
use crate::keeper::{self, Keeper};
use crate::keys::{Keys, NOBODY};
use crate::link::{Cmd, Link, Script};
use crate::publish::Writer;
use crate::readers::Readers;
use crate::reply;
use crate::settle::{Notice, Settler};
use crate::told::Told;

/// Queues tell instances apart; those here have one.
pub(crate) const INSTANCE: InstanceId = 0;

/// How long closing takes beyond its time to say its last words, and how long they may take when nobody waits for them.
const LAST_WORDS: Duration = Duration::from_millis(200);
const UNHEARD_WORDS: Duration = Duration::from_secs(2);

/// How often the connections to the nodes of a cluster are looked at.
const LOOK_AT_NODES: Duration = Duration::from_millis(100);

/// How long an error is taken for a lost connection, if the client library has one all the same.
const STILL_THERE: Duration = Duration::from_millis(100);

/// How often, and with which pauses, a consumer is tried to be removed whose last settlements are on their way.
const GOODBYES: u32 = 10;

static INSPECT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/inspect.lua")));

pub(crate) struct Node {
    options: RedisBuilder,
    keys: Keys,
    link: Arc<Link>,
    writer: Writer,
    notices: SettleQueue<Notice>,
    burials: SettleQueue<Burial>,
    timer: Arc<Timer>,
    consumer: Arc<str>,
    keeper: Arc<Keeper>,
    fan_out: Readers,
    status: watch::Sender<Status>,
    pub(crate) told: ToldOf,
    pub(crate) attached: Mutex<Attached>,
    /// Begun while nothing can be attached.
    closing: Closing,
    tasks: Mutex<Vec<AbortHandle>>,
}

/// What operators are told of, beside the connection.
#[derive(Default)]
pub(crate) struct ToldOf {
    pub(crate) taken_over: Told,
    pub(crate) trimmed: Told,
}

/// What is attached, so that closing can end it.
#[derive(Default)]
pub(crate) struct Attached {
    channels: HashMap<Topic, Arc<Channel>>,
    /// By name and, in a cluster, by slot.
    readers: HashMap<(Group, Option<u16>), Arc<GroupReader>>,
    desks: HashMap<(Topic, Group), Weak<Desk>>,
    followers: Vec<Weak<Attachment>>,
    members: Vec<Weak<Membership>>,
}

impl Node {
    pub(crate) async fn connect(options: RedisBuilder) -> Result<Arc<Self>> {
        let timer = Arc::new(Timer::new()?);
        let link = Arc::new(Link::open(&options, Duration::ZERO).await?);
        link.check_version()?;
        let id = link.id().await?;
        let writer = Writer::start(link.clone(), id, &options);
        let (notices, burials) = (SettleQueue::new(), SettleQueue::new());
        let status = watch::Sender::new(Status::Connected);
        let keys = Keys::new(&options.prefix);
        let letters =
            Letters { writer: writer.clone(), keys: keys.clone(), within: options.publish_timeout, status: status.subscribe() };
        let consumer: Arc<str> = format!("rust-{:032x}", fastrand::u128(..)).into();
        let settler = Settler { link: link.clone(), consumer: consumer.clone(), reclaim: options.reclaim_after };
        let keeper = Arc::new(Keeper::default());
        let tasks = vec![
            tokio::spawn(settler.clone().run(notices.clone())).abort_handle(),
            tokio::spawn(keeper.clone().run(settler)).abort_handle(),
            tokio::spawn(bury_all(burials.clone(), letters)).abort_handle(),
            tokio::spawn(watch_status(link.clone(), status.clone(), options.command_timeout)).abort_handle(),
        ];
        Ok(Arc::new(Self {
            keys,
            options,
            link,
            writer,
            notices,
            burials,
            timer,
            consumer,
            keeper,
            fan_out: Readers::default(),
            status,
            told: ToldOf::default(),
            attached: Mutex::default(),
            closing: Closing::default(),
            tasks: Mutex::new(tasks),
        }))
    }

    pub(crate) fn options(&self) -> &RedisBuilder {
        &self.options
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// How a reader connects to a node of a cluster, or to the one server, and the connection by which it can be interrupted.
    pub(crate) async fn way_to(&self, place: Option<&Place>) -> Result<(RedisBuilder, Arc<Link>), Fault> {
        match (self.link.cluster(), place) {
            (Some(cluster), Some(place)) => Ok((self.options.at(place), cluster.at(place).await?)),
            _ => Ok((self.options.clone(), self.link.clone())),
        }
    }

    pub(crate) fn writer(&self) -> &Writer {
        &self.writer
    }

    pub(crate) fn notices(&self) -> &SettleQueue<Notice> {
        &self.notices
    }

    pub(crate) fn burials(&self) -> &SettleQueue<Burial> {
        &self.burials
    }

    pub(crate) fn timer(&self) -> &Arc<Timer> {
        &self.timer
    }

    pub(crate) fn consumer(&self) -> &Arc<str> {
        &self.consumer
    }

    pub(crate) fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    pub(crate) fn readers(&self) -> &Readers {
        &self.fan_out
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closing.has_begun()
    }

    /// Waits for the close.
    pub(crate) async fn closed(&self) {
        // The sender is this very node's.
        let _ = self.status.subscribe().wait_for(|status| matches!(status, Status::Closed)).await;
    }

    /// Where dead letters are sent.
    pub(crate) fn letters(&self) -> Letters {
        let status = self.status.subscribe();
        Letters { writer: self.writer.clone(), keys: self.keys.clone(), within: self.options.publish_timeout, status }
    }

    /// A topic, if anything of this instance is attached to it.
    pub(crate) fn channel(&self, topic: &Topic) -> Option<Arc<Channel>> {
        self.attached.lock().channels.get(topic).cloned()
    }

    pub(crate) fn scope(&self, topic: &Topic) -> Arc<Scope> {
        Arc::new(Scope::new(self.keys.scope(topic), "0").expect("a hash makes a scope"))
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
        let channel = attached.channels.entry(topic.clone()).or_insert_with(|| {
            let stream = self.keys.stream(topic).into();
            Channel::new(topic.clone(), stream, self.scope(topic))
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

    /// What the server knows of a stream's groups, or of one.
    pub(crate) async fn group_status(&self, stream: &str, group: Option<&Group>) -> Result<Vec<OnServer>, Fault> {
        Ok(self.inspect(stream, group).await?.1)
    }

    /// How many entries a stream has, and what is known of its groups.
    pub(crate) async fn inspect(&self, stream: &str, group: Option<&Group>) -> Result<(u64, Vec<OnServer>), Fault> {
        let call = INSPECT.call(&[stream]).arg(NOBODY);
        let call = group.iter().fold(call, |call, group| call.arg(group.as_str()));
        let [now, retained, groups] = reply::tuple(self.link.eval(&INSPECT, call).await?)?;
        let now = reply::number(&now)?;
        let mut known = Vec::new();
        for group in reply::array(groups)? {
            let [name, pending, free, unread, oldest, consumers] = reply::tuple(group)?;
            let oldest = reply::id(&oldest).ok().map(|id: EntryId| Duration::from_millis(now.saturating_sub(id.millis())));
            let consumers = reply::array(consumers)?.into_iter().map(reply::text).collect::<Result<_, _>>()?;
            // Another program's group may have any name; one that is none here cannot be told.
            let Ok(name) = Group::new(reply::text(name)?) else { continue };
            let (pending, free) = (reply::number(&pending)?, reply::number(&free)?);
            known.push(OnServer { name, pending, free, unread: unread.as_u64(), oldest, consumers });
        }
        Ok((reply::number(&retained)?, known))
    }

    /// The queues and letters of a fan-out subscription or a group.
    pub(crate) fn sink(self: &Arc<Self>) -> Arc<dyn DeadLetterSink> {
        Arc::new(Sink(self.letters()))
    }

    /// Takes this instance's consumer out of a group it has no part in any more.
    pub(crate) fn say_goodbye(&self, desk: Arc<Desk>) {
        self.timer.runtime().spawn(async move {
            desk.node.leave(&desk).await;
            desk.goodbye_said();
        });
    }

    async fn leave(&self, desk: &Desk) {
        let mut pause = Pause::new();
        for _ in 0..GOODBYES {
            let _ = timeout(UNHEARD_WORDS, self.notices.flush()).await;
            if desk.members() > 0 || self.is_closed() {
                return;
            }
            // A read that is under way would make the consumer anew.
            if !desk.is_read() {
                match keeper::leave(&self.link, &desk.place, &[&self.consumer, NOBODY]).await {
                    Ok(0) => {}
                    Ok(_) => return,
                    Err(fault) if !fault.is_temporary() => return,
                    Err(_) => {}
                }
            }
            tokio::time::sleep(pause.step()).await;
        }
    }

    /// Closes, or waits for a close that has begun.
    pub(crate) async fn close(self: &Arc<Self>, within: Duration) -> Result<Closed> {
        let begins = {
            let _nothing_attaches = self.attached.lock();
            let node = self.clone();
            self.closing.begin(&self.timer().runtime(), || async move { node.end(within).await })
        };
        if begins {
            self.status.send_replace(Status::Closed);
        }
        self.closing.ended().await
    }

    /// Drains what was accepted within the time, then ends everything.
    async fn end(self: &Arc<Self>, within: Duration) -> Closed {
        let until = Instant::now() + within;
        let (followers, members) = {
            let attached = self.attached.lock();
            let followers: Vec<_> = attached.followers.iter().filter_map(Weak::upgrade).collect();
            let members: Vec<_> = attached.members.iter().filter_map(Weak::upgrade).collect();
            (followers, members)
        };
        let mut closed = Closed::default();
        closed.released = members.iter().map(|member| member.leave()).sum();
        let desks: Vec<_> = self.attached.lock().desks.values().filter_map(Weak::upgrade).collect();
        let drained = async {
            self.writer.flush().await;
            let followers = followers.iter().map(|follower| follower.relieved().boxed());
            let desks = desks.iter().map(|desk| desk.idle().boxed());
            futures::future::join_all(followers.chain(desks)).await;
        };
        let _ = timeout_at(until, drained).await;
        for follower in &followers {
            let (released, cut_off) = follower.cut_off();
            closed.released += released;
            closed.cut_off += cut_off;
        }
        for desk in &desks {
            closed.cut_off += desk.revoke();
        }
        let places: Vec<_> = desks.iter().map(|desk| desk.place.clone()).collect();
        let last_words = async {
            self.burials.flush().await;
            self.notices.flush().await;
            let leaving =
                places.iter().map(|place| async { drop(keeper::leave(&self.link, place, &[&self.consumer, NOBODY]).await) });
            futures::future::join_all(leaving).await;
        };
        let until = until.max(Instant::now() + LAST_WORDS);
        let _ = timeout_at(until, last_words).await;
        let readers = self.stop_readers();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        wind_up(self.link.clone(), readers, tasks, until).await;
        // What was not buried refers to this instance, and stays pending.
        drop(self.burials.next_batch(usize::MAX).now_or_never());
        closed
    }

    fn stop_readers(&self) -> Vec<JoinHandle<()>> {
        let groups: Vec<_> = self.attached.lock().readers.drain().map(|(_, reader)| reader).collect();
        let fan_out = self.fan_out.stop();
        fan_out.into_iter().chain(groups.iter().filter_map(|reader| reader.stop())).collect()
    }
}

/// Ends the tasks and the connections of an instance, within its time.
async fn wind_up(link: Arc<Link>, readers: Vec<JoinHandle<()>>, tasks: Vec<AbortHandle>, until: Instant) {
    for mut reader in readers {
        if timeout_at(until, &mut reader).await.is_err() {
            reader.abort();
        }
    }
    tasks.iter().for_each(AbortHandle::abort);
    link.close(until.saturating_duration_since(Instant::now()).max(LAST_WORDS)).await;
}

impl Attached {
    pub(crate) fn reader(&mut self, group: &Group, slot: Option<u16>) -> Arc<GroupReader> {
        self.readers.entry((group.clone(), slot)).or_insert_with(|| GroupReader::new(group.clone())).clone()
    }

    pub(crate) fn desk(&self, topic: &Topic, group: &Group) -> Option<Arc<Desk>> {
        self.desks.get(&(topic.clone(), group.clone()))?.upgrade()
    }

    pub(crate) fn add_desk(&mut self, desk: &Arc<Desk>) {
        self.desks.insert((desk.channel.topic.clone(), desk.place.group.clone()), Arc::downgrade(desk));
    }

    pub(crate) fn add_follower(&mut self, attachment: &Arc<Attachment>) {
        prune(&mut self.followers);
        self.followers.push(Arc::downgrade(attachment));
    }

    pub(crate) fn add_member(&mut self, membership: &Arc<Membership>) {
        prune(&mut self.members);
        self.members.push(Arc::downgrade(membership));
    }

    /// The desks of a topic.
    pub(crate) fn desks_of(&self, topic: &Topic) -> Vec<Arc<Desk>> {
        self.desks.iter().filter(|((of, _), _)| of == topic).filter_map(|(_, desk)| desk.upgrade()).collect()
    }
}

/// Forgets what is gone, when it is time to.
fn prune<T>(all: &mut Vec<Weak<T>>) {
    if all.len() == all.capacity() {
        all.retain(|one| one.strong_count() > 0);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let readers = self.stop_readers();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        if tasks.is_empty() {
            return; // it was closed
        }
        let (link, notices) = (self.link.clone(), self.notices.clone());
        let runtime = self.timer.runtime();
        runtime.spawn(async move {
            let until = Instant::now() + UNHEARD_WORDS;
            let _ = timeout_at(until, notices.flush()).await;
            wind_up(link, readers, tasks, until).await;
        });
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("consumer", &self.consumer).field("options", &self.options).finish_non_exhaustive()
    }
}

/// A group as the server knows it.
#[derive(Debug)]
pub(crate) struct OnServer {
    pub(crate) name: Group,
    pub(crate) pending: u64,
    /// How many of what is pending nobody holds.
    pub(crate) free: u64,
    /// None if there are some and it is not known how many.
    pub(crate) unread: Option<u64>,
    pub(crate) oldest: Option<Duration>,
    pub(crate) consumers: Vec<String>,
}

impl OnServer {
    pub(crate) fn is_drained(&self) -> bool {
        self.pending == 0 && self.unread == Some(0)
    }
}

/// Publishes dead letters.
#[derive(Clone)]
pub(crate) struct Letters {
    writer: Writer,
    keys: Keys,
    within: Duration,
    status: watch::Receiver<Status>,
}

impl Letters {
    /// Publishes a letter, however often that takes, until the instance is closed. Returns whether it is there.
    pub(crate) async fn bury(self, to: Topic, letter: Event) -> bool {
        let stream: Arc<str> = self.keys.stream(&to).into();
        let json = match wire::encode(&letter) {
            Ok(json) => Bytes::from(json),
            Err(error) => {
                tracing::warn!(topic = %to, %error, "a dead letter cannot be written");
                return true; // it never can
            }
        };
        let mut pause = Pause::new();
        loop {
            match self.writer.publish(stream.clone(), vec![json.clone()], self.within, Instant::now() + self.within).await {
                Ok(_) => return true,
                Err(failed) if failed.fault.is_temporary() && !self.is_closed() => {}
                Err(failed) => {
                    tracing::warn!(topic = %to, fault = %failed.fault, "a dead letter was not published; its event stays pending");
                    return false;
                }
            }
            tokio::time::sleep(pause.step()).await;
        }
    }

    fn is_closed(&self) -> bool {
        matches!(*self.status.borrow(), Status::Closed)
    }
}

/// What queues hand their dead letters to.
struct Sink(Letters);

impl DeadLetterSink for Sink {
    fn take(&self, topic: &Topic, letter: Event) -> Option<BoxFuture<'static, ()>> {
        let burying = self.0.clone().bury(topic.clone(), letter);
        Some(burying.map(|_| ()).boxed())
    }
}

/// Tells what fred notices of its connection, and makes it notice one that is silent.
async fn watch_status(link: Arc<Link>, status: watch::Sender<Status>, patience: Duration) {
    if let Some(cluster) = link.cluster() {
        return watch_cluster(cluster, status, patience).await;
    }
    let client = link.client();
    // The end of what was not told is not told either.
    let (losses, mut is_told) = (Told::default(), false);
    let (mut errors, mut reconnects) = (client.error_rx(), client.reconnect_rx());
    let tell = |now: Status| {
        status.send_if_modified(|status| {
            let open = !matches!(status, Status::Closed);
            if open {
                *status = now;
            }
            open
        })
    };
    loop {
        let reconnecting = !matches!(*status.borrow(), Status::Connected);
        tokio::select! {
            error = errors.recv() => match error.map(|(error, _)| Fault::from(error)) {
                Ok(fault) if !fault.is_temporary() => {
                    tracing::error!(%fault, "the connection cannot be made again");
                    tell(Status::Failed(Arc::new(fault.into())));
                }
                Ok(fault) if !reconnecting => {
                    let times = losses.count(1);
                    is_told = times.is_some();
                    if let Some(times) = times {
                        tracing::warn!(%fault, times, "the connection is lost and is being made again");
                    }
                    tell(Status::Reconnecting { since: SystemTime::now() });
                }
                Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
            },
            _ = reconnects.recv() => {
                if std::mem::take(&mut is_told) {
                    tracing::info!("the connection is there again");
                }
                tell(Status::Connected);
            }
            () = tokio::time::sleep(patience), if !reconnecting => {
                // One that is not answered in time makes fred give the connection up.
                if let Err(fault) = link.call(Cmd::new("PING")).await
                    && fault.is_unknown()
                {
                    tell(Status::Reconnecting { since: SystemTime::now() });
                }
            }
            // An error that broke nothing has no reconnect behind it.
            () = tokio::time::sleep(STILL_THERE), if reconnecting && client.is_connected() => {
                tell(Status::Connected);
            }
        }
    }
}

/// The same for all nodes of a cluster.
async fn watch_cluster(cluster: &Cluster, status: watch::Sender<Status>, patience: Duration) {
    let mut pinged = Instant::now();
    loop {
        tokio::time::sleep(LOOK_AT_NODES).await;
        let links = cluster.links();
        let is_whole = links.iter().all(|link| link.client().is_connected());
        status.send_if_modified(|status| match (&status, is_whole) {
            (Status::Connected, false) => {
                tracing::warn!("a node of the cluster is lost");
                *status = Status::Reconnecting { since: SystemTime::now() };
                true
            }
            (Status::Reconnecting { .. }, true) => {
                tracing::info!("the cluster is whole again");
                *status = Status::Connected;
                true
            }
            _ => false,
        });
        if !is_whole {
            cluster.doubt();
            let _ = cluster.refresh().await; // and again, until they agree on somebody else
        }
        if pinged.elapsed() > patience {
            // One that is not answered in time makes fred give the connection up.
            futures::future::join_all(links.iter().map(|link| link.call(Cmd::new("PING")))).await;
            pinged = Instant::now();
        }
    }
}

/// The queue of one fan-out subscription, or of a group's members here.
pub(crate) fn queue(node: &Arc<Node>, topic: &Topic, group: Option<&Group>) -> Arc<DeliveryQueue> {
    match group {
        Some(group) => DeliveryQueue::group(topic.clone(), group.clone(), node.timer.clone(), node.sink()),
        None => DeliveryQueue::fan_out(topic.clone(), node.timer.clone(), node.sink()),
    }
}
