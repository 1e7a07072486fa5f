//! The readers of groups, one for each name of a group, and the streams of their members.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use fred::types::Value;
use parking_lot::Mutex;
use pubsub_core::machinery::Pause;
use pubsub_core::{
    AckMode, Control, Delivery, Error, Group, Result, Source, SubscribeOptions, SubscriptionHandle, SubscriptionStatus,
};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::desk::{Claimed, Desk};
use crate::entry::EntryId;
use crate::errors::Fault;
use crate::link::{Cmd, Link, Script};
use crate::look::look;
use crate::node::{Node, OnServer};
use crate::publish::millis;
use crate::reader::{BLOCK, Blocking, Door, FAREWELL};
use crate::reply;
use crate::settle::Place;

/// How often a drain asks the server whether its group has anything left.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How many of its own pending entries an instance looks through at a time, after an answer got lost.
const RECOVERED_TOGETHER: u64 = 10_000;

static LOST: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/lost.lua")));

/// The reader of all groups of one name.
pub(crate) struct GroupReader {
    group: Group,
    desks: Mutex<Vec<Weak<Desk>>>,
    bell: Notify,
    stop: AtomicBool,
    task: Mutex<Option<JoinHandle<()>>>,
    pub(crate) door: Door,
}

impl GroupReader {
    pub(crate) fn new(group: Group) -> Arc<Self> {
        let (desks, bell, stop, task) = (Mutex::default(), Notify::new(), AtomicBool::new(false), Mutex::default());
        Arc::new(Self { group, desks, bell, stop, task, door: Door::default() })
    }

    /// A group has one more member.
    pub(crate) fn add(self: &Arc<Self>, desk: &Arc<Desk>) {
        {
            let mut desks = self.desks.lock();
            if !desks.iter().any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(desk))) {
                desks.push(Arc::downgrade(desk));
            }
        }
        let mut task = self.task.lock();
        if task.is_none() && !self.stop.load(Ordering::Acquire) {
            *task = Some(tokio::spawn(self.clone().run(Arc::downgrade(&desk.node))));
        }
        self.bell.notify_one();
    }

    /// A group wants to read that is not part of the read under way.
    pub(crate) fn ring(&self) {
        self.bell.notify_one();
    }

    /// Asks the reader to end, and returns its task, to be waited for.
    pub(crate) fn stop(&self) -> Option<JoinHandle<()>> {
        self.stop.store(true, Ordering::Release);
        self.bell.notify_one();
        self.task.lock().take()
    }

    /// Waits until the reader has nothing left of a member that has left.
    async fn left(&self) {
        self.door.closed(|| self.desks().iter().any(|desk| desk.members() > 0)).await;
    }

    fn desks(&self) -> Vec<Arc<Desk>> {
        let mut desks = self.desks.lock();
        desks.retain(|desk| desk.strong_count() > 0);
        desks.iter().filter_map(Weak::upgrade).collect()
    }

    async fn run(self: Arc<Self>, node: Weak<Node>) {
        let (mut connection, mut pause) = (None::<Blocking>, Pause::new());
        while !self.stop.load(Ordering::Acquire) {
            let desks = self.desks();
            let idle = !desks.iter().any(|desk| desk.members() > 0);
            let wanted: Vec<_> = desks.into_iter().filter_map(|desk| Some((desk.wants()?, desk))).collect();
            let outcome = match &mut connection {
                None if idle => {
                    drop(wanted);
                    self.bell.notified().await;
                    continue;
                }
                Some(_) if idle => {
                    drop(wanted);
                    if let Some(blocking) = connection.take() {
                        blocking.close().await;
                    }
                    self.door.close();
                    continue;
                }
                Some(_) if wanted.is_empty() => {
                    drop(wanted);
                    self.bell.notified().await;
                    continue;
                }
                Some(blocking) => self.read(blocking, &wanted).await,
                None => {
                    let Some(node) = node.upgrade() else { break };
                    match self.open(&node).await {
                        Ok(opened) => {
                            connection = Some(opened);
                            self.door.open();
                            continue;
                        }
                        Err(fault) => {
                            self.door.failed(&fault);
                            Err(fault)
                        }
                    }
                }
            };
            wanted.iter().for_each(|(_, desk)| desk.read_ended());
            match outcome {
                Ok(()) => pause = Pause::new(),
                Err(fault) => {
                    wanted.iter().for_each(|(_, desk)| desk.read_failed());
                    tokio::time::sleep(pause.step()).await;
                    if connection.is_some() {
                        recover(&wanted, &fault).await;
                    }
                    // Another node may have the key now.
                    let may_move = fault.is_unknown() || fault.is_elsewhere();
                    if may_move
                        && wanted.iter().any(|(_, desk)| desk.node.link().cluster().is_some())
                        && let Some(blocking) = connection.take()
                    {
                        blocking.close().await;
                    }
                }
            }
        }
        if let Some(blocking) = connection {
            blocking.close().await;
        }
    }

    /// Connects to the one server, or in a cluster to the one that has the slot of all desks here.
    async fn open(&self, node: &Node) -> std::result::Result<Blocking, Fault> {
        if let Some(cluster) = node.link().cluster() {
            cluster.refresh().await?;
        }
        let place = self.desks().first().and_then(|desk| node.link().owner_of(&desk.place.stream));
        let (options, main) = node.way_to(place.as_ref()).await?;
        Blocking::open(&options, main).await
    }

    async fn read(&self, blocking: &mut Blocking, wanted: &[((usize, bool), Arc<Desk>)]) -> std::result::Result<(), Fault> {
        let Some(consumer) = wanted.first().map(|(_, desk)| desk.node.consumer().clone()) else { return Ok(()) };
        let careful: Vec<_> = wanted.iter().filter(|((_, careful), _)| *careful).collect();
        if !careful.is_empty() {
            let commands = careful.iter().flat_map(|((count, _), desk)| {
                let stream = &*desk.place.stream;
                // In full: that the script is not known would be found out too late, with the read done and its answer lost.
                let lost = LOST.in_full(LOST.call(&[stream]).arg(self.group.as_str()));
                let read = Cmd::new("XREADGROUP").arg("GROUP").arg(self.group.as_str()).arg(&*consumer);
                let read = read.arg("COUNT").number(*count as u64).arg("STREAMS").key(stream).arg(">");
                [Cmd::new("MULTI").beside(stream), lost, read, Cmd::new("EXEC").beside(stream)]
            });
            let mut answers = blocking.link().pipeline(commands.collect()).await.into_iter();
            let mut outcome = Ok(());
            for ((count, _), desk) in careful {
                let answer = reply::executed(answers.by_ref().take(4)).and_then(|executed| {
                    let [lost, streams] = reply::tuple(Value::Array(executed))?;
                    let entries = reply::streams(streams)?.pop().map_or_else(Vec::new, |(_, entries)| entries);
                    Ok((reply::number(&lost)?, entries))
                });
                // What was read of the others is theirs, whatever became of one.
                match answer {
                    Ok((lost, entries)) => desk.read(entries, lost, *count),
                    Err(fault) => outcome = Err(fault),
                }
            }
            return outcome;
        }
        // One number for all: what one of them wants more comes with the next read.
        let count = wanted.iter().map(|((count, _), _)| *count).min().unwrap_or(1);
        let command = Cmd::new("XREADGROUP").arg("GROUP").arg(self.group.as_str()).arg(&*consumer);
        let command = command.arg("COUNT").number(count as u64).arg("BLOCK").number(millis(BLOCK)).arg("STREAMS");
        let command = wanted.iter().fold(command, |command, (_, desk)| command.key(&desk.place.stream));
        let command = wanted.iter().fold(command, |command, _| command.arg(">"));
        let streams = reply::streams(blocking.read(command, &self.bell).await?)?;
        for (stream, entries) in streams {
            if let Some((_, desk)) = wanted.iter().find(|(_, desk)| *desk.place.stream == *stream) {
                desk.read(entries, 0, count);
            }
        }
        Ok(())
    }
}

/// After a read that failed: makes groups anew that are gone, ends those that cannot be read, and finds what an answer that got lost
/// had brought.
async fn recover(wanted: &[((usize, bool), Arc<Desk>)], fault: &Fault) {
    for (_, desk) in wanted {
        let (link, group) = (desk.node.link(), &desk.place.group);
        if fault.is_elsewhere()
            && let Some(cluster) = link.cluster()
        {
            cluster.doubt();
            continue;
        }
        let outcome = if fault.is_unknown() {
            forgotten(link, desk).await
        } else if fault.is("NOGROUP") || fault.is("UNBLOCKED") || fault.is("WRONGTYPE") || !fault.is_temporary() {
            make_anew(link, desk).await
        } else {
            Ok(())
        };
        if let Err(fault) = outcome
            && !fault.is_temporary()
        {
            desk.fail(Error::from(fault).during("read").on(group));
        }
    }
}

/// Makes a group that is gone, where this instance had read to.
async fn make_anew(link: &Link, desk: &Desk) -> std::result::Result<(), Fault> {
    let Place { stream, group } = &*desk.place;
    let looked = look(link, stream, Some(group.as_str())).await?;
    if looked.grouped {
        return Ok(());
    }
    let seen = desk.seen();
    // Another stream has taken its place, with ids that begin lower: all of it is new.
    let from = if looked.exists && looked.last >= seen { seen } else { EntryId::ZERO };
    tracing::warn!(topic = %desk.channel.topic, %group, %from, "a group was gone and is made anew");
    create(link, stream, group, from, looked.read_at(from), desk.node.options().idle_ttl).await
}

/// Makes a group; another may have been faster.
pub(crate) async fn create(
    link: &Link,
    stream: &str,
    group: &Group,
    from: EntryId,
    read: Option<u64>,
    idle_ttl: Option<Duration>,
) -> std::result::Result<(), Fault> {
    let command = Cmd::new("XGROUP").arg("CREATE").key(stream).arg(group.as_str()).arg(from.to_string()).arg("MKSTREAM");
    let command = match read {
        Some(read) => command.arg("ENTRIESREAD").number(read),
        None => command,
    };
    match link.call(command).await {
        Ok(_) => {}
        Err(fault) if fault.is("BUSYGROUP") => return Ok(()),
        Err(fault) => return Err(fault),
    }
    if let Some(ttl) = idle_ttl {
        // A stream that was made for the group alone is to go some day, too.
        link.call(Cmd::new("PEXPIRE").key(stream).number(millis(ttl)).arg("NX")).await?;
    }
    Ok(())
}

/// Finds what the server has given to this instance and it does not know of.
async fn forgotten(link: &Link, desk: &Desk) -> std::result::Result<(), Fault> {
    if !desk.begin_recovery() {
        return Ok(()); // what is unknown then is found when it was idle for long enough
    }
    let Place { stream, group } = &*desk.place;
    let pending = Cmd::new("XPENDING").key(stream).arg(group.as_str()).arg("-").arg("+");
    let answer = link.call(pending.number(RECOVERED_TOGETHER).arg(&**desk.node.consumer())).await;
    let mine = answer.and_then(reply::array).and_then(|pending| {
        let one = |one| {
            let [id, _, _, count] = reply::tuple(one)?;
            Ok((reply::id(&id)?, reply::number(&count)?))
        };
        pending.into_iter().map(one).collect::<std::result::Result<Vec<_>, Fault>>()
    });
    let (mine, outcome) = match mine {
        Ok(mine) => (mine, Ok(())),
        Err(fault) => (Vec::new(), Err(fault)),
    };
    desk.claimed(Some(Claimed { mine, ..Claimed::default() }), true);
    outcome
}

/// A member and what it lives on: leaves its group when it is dropped.
pub(crate) struct Membership {
    pub(crate) desk: Arc<Desk>,
    pub(crate) number: u64,
    inner: SubscriptionHandle,
    ended: AtomicBool,
    released: AtomicU64,
}

impl Membership {
    pub(crate) fn new(desk: Arc<Desk>, number: u64, inner: SubscriptionHandle) -> Arc<Self> {
        Arc::new(Self { desk, number, inner, ended: AtomicBool::new(false), released: AtomicU64::new(0) })
    }

    pub(crate) fn end(&self) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            let ahead = self.desk.ahead();
            if self.desk.leave(self.number) {
                self.released.store(ahead, Ordering::Release);
            }
            self.inner.stop();
            self.desk.reader().ring();
            self.desk.node.tidy(&self.desk.channel);
        }
    }

    /// Leaves the group, and returns how much was released that had been read ahead.
    pub(crate) fn leave(&self) -> u64 {
        self.end();
        self.released.swap(0, Ordering::AcqRel)
    }
}

#[async_trait]
impl Control for Membership {
    fn stop(&self) {
        self.end();
    }

    async fn stopped(&self) {
        // Ending is immediate: once `end` has returned, nothing can arrive. What was needed for it on the server goes as well.
        let gone = futures::future::join(self.desk.reader().left(), self.desk.said_goodbye());
        let _ = tokio::time::timeout(FAREWELL, gone).await;
    }

    async fn drained(&self) {
        let Desk { node, place, .. } = &*self.desk;
        loop {
            if self.desk.has_left(self.number) || node.is_closed() {
                break self.desk.idle().await;
            }
            node.notices().flush().await;
            match node.group_status(&place.stream, Some(&place.group)).await {
                Ok(groups) if groups.iter().all(OnServer::is_drained) => break,
                _ => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
        self.desk.local().drained().await;
    }

    fn status(&self) -> SubscriptionStatus {
        let mut status = self.inner.status();
        self.desk.add_to(self.number, &mut status);
        status
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Membership").field("desk", &self.desk).field("number", &self.number).finish_non_exhaustive()
    }
}

/// A member's stream.
pub(crate) struct MemberSource {
    pub(crate) inner: Box<dyn Source>,
    pub(crate) membership: Arc<Membership>,
}

impl Source for MemberSource {
    fn poll_next(&mut self, cx: &mut Context<'_>, mode: AckMode) -> Poll<Option<Result<Delivery>>> {
        let Membership { desk, number, .. } = &*self.membership;
        loop {
            if desk.is_full(*number, cx, mode) {
                return Poll::Pending;
            }
            match self.inner.poll_next(cx, AckMode::Manual) {
                Poll::Ready(Some(Ok(inner))) => {
                    if let Some(delivery) = desk.hand_over(*number, inner, mode) {
                        return Poll::Ready(Some(Ok(delivery)));
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(desk.failure().map(Err)),
                Poll::Pending => {
                    desk.ask(*number);
                    return Poll::Pending;
                }
            }
        }
    }
}

impl Drop for MemberSource {
    fn drop(&mut self) {
        self.membership.end();
    }
}

/// The options of a member in its local queue: what is in consumers' hands is counted by the desk.
pub(crate) fn inner_options(options: &SubscribeOptions) -> SubscribeOptions {
    let mut inner = options.clone().ack_mode(AckMode::Manual).max_in_flight(1 << 20);
    inner.filter = None;
    inner
}
