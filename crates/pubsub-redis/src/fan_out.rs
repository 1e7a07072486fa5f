//! The one reader that follows the ends of all topics an instance has fan-out subscriptions on.
//!
//! Few topics are read by one read that blocks. Of many, the server would look at each for every wake: beyond [`BLOCKING_MOST`] it
//! tells instead which of them have changed (`CLIENT TRACKING`, see `tracking.rs`), and those alone are read.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_core::machinery::Pause;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::channel::{Channel, GRACE, PAGE, Want, Wish};
use crate::cluster::Place;
use crate::errors::Fault;
use crate::link::{Cmd, Link};
use crate::look::look;
use crate::node::Node;
use crate::page::{Page, Request, read_pages};
use crate::publish::millis;
use crate::reader::{BLOCK, Blocking, Door, FAREWELL};
use crate::reply;
use crate::tracking::{Changes, Tracking};

/// The most topics that are read by one read that blocks. A quarter less, and tracking ends again.
const BLOCKING_MOST: usize = 64;

/// The most topics of one read, and of all reads that are sent together, where the server tells what has changed.
const READ_TOGETHER: usize = 64;
const SENT_TOGETHER: usize = 1024;

/// About how many bytes one read of a topic is to bring; at least one entry comes whatever its size.
const PAGE_BYTES: usize = 1 << 20;

/// So few entries are handed over before anything else is read; of more, reading on is worth as much as handing over.
const FEW: usize = 8;

/// How often everything is read in a cluster that does not tell what has changed.
const POLL: Duration = Duration::from_millis(50);

/// What the reader's task shares with those who want something read.
pub(crate) struct FanOut {
    /// The node of a cluster that it reads from. There one read cannot be of several topics.
    place: Option<Place>,
    channels: Mutex<HashMap<Arc<str>, Arc<Channel>>>,
    /// How many subscriptions there are, whether or not they go with the reader just now.
    followers: Arc<AtomicUsize>,
    changes: Arc<Changes>,
    stop: AtomicBool,
    task: Mutex<Option<JoinHandle<()>>>,
    pub(crate) door: Door,
}

/// A topic, and what is to be read of it.
type Wanted = (Arc<Channel>, Want);

/// What came of reading: what failed, and of which topics.
type Outcome = Result<(), (Fault, Vec<Wanted>)>;

impl FanOut {
    /// One that reads from this node, for as long as there are subscriptions.
    pub(crate) fn new(place: Option<Place>, followers: Arc<AtomicUsize>) -> Self {
        let (channels, changes, stop, task, door) = Default::default();
        Self { place, channels, followers, changes, stop, task, door }
    }

    /// There is one more subscription: the reader is started unless it runs.
    pub(crate) fn start(self: &Arc<Self>, node: &Arc<Node>) {
        self.ring();
        let mut task = self.task.lock();
        if task.is_none() && !self.stop.load(Ordering::Acquire) {
            *task = Some(tokio::spawn(self.clone().run(Arc::downgrade(node))));
        }
    }

    /// There may be no subscription any more.
    pub(crate) fn ring(&self) {
        self.bell().notify_one();
    }

    /// Whether it has something to read. One of a cluster has to have topics, since nodes come and go.
    fn is_needed(&self) -> bool {
        self.followers.load(Ordering::SeqCst) > 0 && (self.place.is_none() || !self.channels.lock().is_empty())
    }

    /// Waits until it has its connection, if it needs one.
    pub(crate) async fn opened(&self, until: Instant) -> Result<(), Fault> {
        if self.place.is_some() && !self.is_needed() { Ok(()) } else { self.door.opened(until).await }
    }

    /// Waits until the reader has nothing left of a subscription that has ended.
    pub(crate) async fn left(&self) {
        let closed = self.door.closed(|| self.is_needed());
        let _ = tokio::time::timeout(FAREWELL, closed).await;
    }

    /// Somebody goes with the reader on this topic from now on.
    pub(crate) fn want(&self, channel: &Arc<Channel>) {
        let known = self.channels.lock().insert(channel.stream.clone(), channel.clone());
        if known.is_none_or(|known| !Arc::ptr_eq(&known, channel)) {
            self.look_again(channel);
        }
    }

    /// Somebody has taken something of a topic that had enough.
    pub(crate) fn resume(&self, channel: &Arc<Channel>) {
        self.channels.lock().insert(channel.stream.clone(), channel.clone());
        self.look_again(channel);
    }

    /// A topic is to be read anew.
    pub(crate) fn look_again(&self, channel: &Arc<Channel>) {
        self.changes.add([channel.stream.clone()]);
    }

    fn look_later(&self, channel: &Arc<Channel>, first: bool) {
        if !first {
            return; // somebody does already
        }
        let (changes, stream) = (self.changes.clone(), channel.stream.clone());
        tokio::spawn(async move {
            tokio::time::sleep(GRACE).await;
            changes.add([stream]);
        });
    }

    fn bell(&self) -> &Notify {
        self.changes.bell()
    }

    /// Asks the reader to end, and returns its task, to be waited for.
    pub(crate) fn stop(&self) -> Option<JoinHandle<()>> {
        self.stop.store(true, Ordering::Release);
        self.bell().notify_one();
        self.channels.lock().clear();
        self.task.lock().take()
    }

    /// What is to be read, of all topics.
    fn wanted(&self) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        self.channels.lock().retain(|_, channel| match channel.wanted() {
            Wish::Read(want) => {
                wanted.push((channel.clone(), want));
                true
            }
            Wish::Later { first } => {
                self.look_later(channel, first);
                true
            }
            Wish::Nothing => false,
        });
        wanted
    }

    /// What is to be read, of those topics that have changed.
    fn wanted_of(&self, changed: HashSet<Arc<str>>) -> Vec<Wanted> {
        let mut channels = self.channels.lock();
        let mut wanted = Vec::with_capacity(changed.len());
        for stream in changed {
            let Some(channel) = channels.get(&stream) else { continue };
            match channel.wanted() {
                Wish::Read(want) => wanted.push((channel.clone(), want)),
                Wish::Later { first } => self.look_later(channel, first),
                Wish::Nothing => drop(channels.remove(&stream)),
            }
        }
        wanted
    }

    async fn run(self: Arc<Self>, node: Weak<Node>) {
        let (mut connection, mut pause) = (None::<Connection>, Pause::new());
        while !self.stop.load(Ordering::Acquire) {
            let idle = !self.is_needed();
            let outcome = match &mut connection {
                None if idle => {
                    self.bell().notified().await;
                    continue;
                }
                None => match self.open(&node).await {
                    Some(Ok(blocking)) => {
                        connection = Some(Connection { blocking, tracking: None, refused: false, count: PAGE });
                        self.door.open();
                        continue;
                    }
                    Some(Err(fault)) => {
                        self.door.failed(&fault);
                        Err((fault, self.wanted()))
                    }
                    None => break,
                },
                Some(_) if idle => {
                    if let Some(connection) = connection.take() {
                        connection.close().await;
                    }
                    self.door.close();
                    continue;
                }
                Some(connection) => self.read(connection, &node).await,
            };
            match outcome {
                Ok(()) => pause = Pause::new(),
                Err((fault, wanted)) => {
                    wanted.iter().for_each(|(channel, _)| channel.suspect());
                    if !fault.is_temporary() {
                        fail(&wanted, &node, &fault).await;
                    }
                    tokio::time::sleep(pause.step()).await;
                    self.hand_on(&wanted, &fault, &node).await;
                    self.changes.add(wanted.iter().map(|(channel, _)| channel.stream.clone()));
                }
            }
        }
        if let Some(connection) = connection {
            connection.close().await;
        }
    }

    async fn open(&self, node: &Weak<Node>) -> Option<Result<Blocking, Fault>> {
        let way = node.upgrade()?.way_to(self.place.as_ref()).await;
        Some(match way {
            Ok((options, main)) => Blocking::open(&options, main).await,
            Err(fault) => Err(fault),
        })
    }

    /// Leaves topics that failed to whoever reads from the node that has them now.
    async fn hand_on(&self, wanted: &[Wanted], fault: &Fault, node: &Weak<Node>) {
        let Some(node) = node.upgrade().filter(|_| self.place.is_some()) else { return };
        if let Some(cluster) = node.link().cluster().filter(|_| fault.is_unknown() || fault.is_elsewhere()) {
            cluster.doubt();
            let _ = cluster.refresh().await; // or the next time
        }
        for (channel, _) in wanted {
            let place = node.link().owner_of(&channel.stream);
            if place.is_some() && place != self.place {
                self.channels.lock().remove(&channel.stream);
                node.readers().want(channel, &node);
            }
        }
    }

    /// Reads something, or waits for something to read.
    async fn read(&self, connection: &mut Connection, node: &Weak<Node>) -> Outcome {
        let topics = self.channels.lock().len();
        let blocking_most = if self.place.is_some() { 0 } else { BLOCKING_MOST };
        match &mut connection.tracking {
            None if topics > blocking_most && !connection.refused => {
                connection.tracking = Some(Tracking::begin(connection.blocking.link(), self.changes.clone()));
                Ok(())
            }
            None => {
                let wanted = self.wanted();
                if wanted.is_empty() {
                    self.bell().notified().await;
                    return Ok(());
                }
                if self.place.is_some() {
                    tokio::time::sleep(POLL).await;
                    return self.read_at_once(connection, &wanted, node).await;
                }
                self.read_blocking(connection, &wanted, node).await
            }
            Some(_) if topics <= blocking_most * 3 / 4 => {
                connection.tracking = None;
                let off = Cmd::new("CLIENT").arg("TRACKING").arg("OFF");
                connection.blocking.link().call(off).await.map(drop).map_err(|fault| (fault, Vec::new()))
            }
            Some(tracking) => match tracking.prepare(connection.blocking.link()).await {
                Ok(is_new) => {
                    let all = || self.channels.lock().values().cloned().collect::<Vec<_>>();
                    if is_new {
                        let all = all();
                        all.iter().for_each(|channel| channel.suspect());
                        self.changes.add(all.iter().map(|channel| channel.stream.clone()));
                    }
                    let changed = self.changes.take(SENT_TOGETHER);
                    if changed.is_empty() {
                        let sweep = || all().iter().map(|channel| channel.stream.clone()).collect();
                        tracking.wait(&self.changes, sweep).await;
                        return Ok(());
                    }
                    let wanted = self.wanted_of(changed);
                    self.read_at_once(connection, &wanted, node).await
                }
                Err(fault) if !fault.is_temporary() => {
                    tracing::warn!(%fault, topics, "reading without `CLIENT TRACKING`: each wake costs the server time for every topic");
                    (connection.tracking, connection.refused) = (None, true);
                    Ok(())
                }
                Err(fault) => Err((fault, Vec::new())),
            },
        }
    }

    async fn read_blocking(&self, connection: &mut Connection, wanted: &[Wanted], node: &Weak<Node>) -> Outcome {
        if wanted.iter().any(|(_, want)| want.careful) {
            let careful: Vec<_> = wanted.iter().filter(|(_, want)| want.careful).cloned().collect();
            return self.read_carefully(connection, &careful, node).await;
        }
        let count = connection.count;
        let command = Cmd::new("XREAD").arg("COUNT").number(count as u64).arg("BLOCK").number(millis(BLOCK));
        let answer = connection.blocking.read(streams(command, wanted), self.bell()).await;
        let taken = answer.and_then(|answer| self.take(connection, wanted, answer, count, node));
        if taken.as_ref().is_ok_and(|taken| (1..=FEW).contains(taken)) {
            tokio::task::yield_now().await; // whoever they are for runs before the next read is sent
        }
        taken.map(drop).map_err(|fault| (fault, wanted.to_vec()))
    }

    /// Reads what there is, without blocking.
    async fn read_at_once(&self, connection: &mut Connection, wanted: &[Wanted], node: &Weak<Node>) -> Outcome {
        let (careful, plain): (Vec<_>, Vec<_>) = wanted.iter().cloned().partition(|(_, want)| want.careful);
        self.read_carefully(connection, &careful, node).await?;
        if plain.is_empty() {
            return Ok(());
        }
        let count = connection.count;
        let command = |wanted| streams(Cmd::new("XREAD").arg("COUNT").number(count as u64), wanted);
        let together = if self.place.is_some() { 1 } else { READ_TOGETHER };
        let commands = plain.chunks(together).map(command).collect();
        let answers = connection.blocking.link().pipeline(commands).await;
        let mut failed = None;
        for (wanted, answer) in plain.chunks(together).zip(answers) {
            if let Err(fault) = answer.and_then(|answer| self.take(connection, wanted, answer, count, node)) {
                failed.get_or_insert_with(|| (fault, Vec::new())).1.extend_from_slice(wanted);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Reads topics of which something may be missing, one by one.
    async fn read_carefully(&self, connection: &mut Connection, wanted: &[Wanted], node: &Weak<Node>) -> Outcome {
        let (count, mut failed) = (connection.count, None);
        for wanted in wanted.chunks(READ_TOGETHER) {
            let requests = wanted.iter().map(|(channel, want)| Request { stream: &channel.stream, from: want.from, count });
            let requests: Vec<_> = requests.collect();
            let pages = read_pages(connection.blocking.link(), &requests).await;
            for ((channel, want), page) in wanted.iter().zip(pages) {
                match page {
                    Ok(page) => self.arrived(connection, channel, *want, page, count, node),
                    Err(fault) => failed.get_or_insert_with(|| (fault, Vec::new())).1.push((channel.clone(), *want)),
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Hands over what one read has brought, and says how many entries that was.
    fn take(
        &self,
        connection: &mut Connection,
        wanted: &[Wanted],
        answer: fred::types::Value,
        count: usize,
        node: &Weak<Node>,
    ) -> Result<usize, Fault> {
        let mut taken = 0;
        for (stream, entries) in reply::streams(answer)? {
            taken += entries.len();
            if let Some((channel, want)) = wanted.iter().find(|(channel, _)| *channel.stream == *stream) {
                self.arrived(connection, channel, *want, Page { entries, known: None }, count, node);
            }
        }
        Ok(taken)
    }

    fn arrived(
        &self,
        connection: &mut Connection,
        channel: &Arc<Channel>,
        want: Want,
        page: Page,
        asked: usize,
        node: &Weak<Node>,
    ) {
        let Some(node) = node.upgrade() else { return };
        if !page.entries.is_empty() {
            let size = page.entries.iter().map(|entry| entry.size).sum::<usize>() / page.entries.len();
            connection.count = (PAGE_BYTES / size.max(1)).clamp(1, PAGE);
        }
        if channel.dispatch(want, page, asked, &node) && connection.tracking.is_some() {
            self.look_again(channel);
        }
    }
}

/// The connection that reads.
struct Connection {
    blocking: Blocking,
    /// How it is told what has changed, where there are many topics.
    tracking: Option<Tracking>,
    /// The server does not want to tell.
    refused: bool,
    /// How many entries to ask for: fewer where they are large.
    count: usize,
}

impl Connection {
    async fn close(self) {
        self.blocking.close().await;
    }
}

fn streams(command: Cmd, wanted: &[Wanted]) -> Cmd {
    let command = wanted.iter().fold(command.arg("STREAMS"), |command, (channel, _)| command.key(&channel.stream));
    wanted.iter().fold(command, |command, (_, want)| command.arg(want.from.to_string()))
}

/// Ends the subscriptions on whose account reading fails for good; all of them, if it is no single topic's fault.
async fn fail(wanted: &[Wanted], node: &Weak<Node>, fault: &Fault) {
    let Some(link): Option<Arc<Link>> = node.upgrade().map(|node| node.link().clone()) else { return };
    let mut culprits = Vec::new();
    for (channel, _) in wanted {
        match look(&link, &channel.stream, None).await {
            Err(fault) if !fault.is_temporary() => culprits.push((channel, fault)),
            _ => {}
        }
    }
    if culprits.is_empty() {
        culprits.extend(wanted.iter().map(|(channel, _)| (channel, fault.clone())));
    }
    for (channel, fault) in culprits {
        channel.fail(&fault);
    }
}
