//! The one reader that follows the ends of all topics an instance has fan-out subscriptions on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::channel::{Channel, PAGE};
use crate::entry::EntryId;
use crate::errors::Fault;
use crate::link::Cmd;
use crate::look::look;
use crate::node::Node;
use crate::pause::Pause;
use crate::reader::{BLOCK, Blocking, Door, FAREWELL};
use crate::reply;

/// What the reader's task shares with those who want something read.
#[derive(Default)]
pub(crate) struct FanOut {
    channels: Mutex<HashMap<Arc<str>, Arc<Channel>>>,
    /// How many subscriptions there are, whether or not they go with the reader just now.
    followers: AtomicUsize,
    bell: Notify,
    stop: AtomicBool,
    task: Mutex<Option<JoinHandle<()>>>,
    pub(crate) door: Door,
}

impl FanOut {
    /// There is one more subscription: the reader keeps its connection, and is started unless it runs.
    pub(crate) fn enter(self: &Arc<Self>, node: &Arc<Node>) {
        self.followers.fetch_add(1, Ordering::SeqCst);
        self.bell.notify_one();
        let mut task = self.task.lock();
        if task.is_none() && !self.stop.load(Ordering::Acquire) {
            *task = Some(tokio::spawn(self.clone().run(Arc::downgrade(node))));
        }
    }

    /// There is one less.
    pub(crate) fn leave(&self) {
        if self.followers.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.bell.notify_one();
        }
    }

    /// Waits until the reader has nothing left of a subscription that has ended.
    pub(crate) async fn left(&self) {
        let closed = self.door.closed(|| self.followers.load(Ordering::SeqCst) > 0);
        let _ = tokio::time::timeout(FAREWELL, closed).await;
    }

    /// Somebody goes with the reader on this topic from now on.
    pub(crate) fn want(&self, channel: &Arc<Channel>) {
        if self.channels.lock().insert(channel.stream.clone(), channel.clone()).is_none() {
            self.bell.notify_one();
        }
    }

    /// Asks the reader to end, and returns its task, to be waited for.
    pub(crate) fn stop(&self) -> Option<JoinHandle<()>> {
        self.stop.store(true, Ordering::Release);
        self.bell.notify_one();
        self.channels.lock().clear();
        self.task.lock().take()
    }

    /// What is to be read, and behind which entry.
    fn wanted(&self) -> Vec<(Arc<Channel>, EntryId)> {
        let mut wanted = Vec::new();
        self.channels.lock().retain(|_, channel| match channel.wanted() {
            Some(at) => {
                wanted.push((channel.clone(), at));
                true
            }
            None => false,
        });
        wanted
    }

    async fn run(self: Arc<Self>, node: Weak<Node>) {
        let (mut connection, mut pause) = (None::<Blocking>, Pause::new());
        while !self.stop.load(Ordering::Acquire) {
            let (wanted, idle) = (self.wanted(), self.followers.load(Ordering::SeqCst) == 0);
            let outcome = match &mut connection {
                None if idle => {
                    self.bell.notified().await;
                    continue;
                }
                None => match open(&node).await {
                    Some(Ok(opened)) => {
                        connection = Some(opened);
                        self.door.open();
                        continue;
                    }
                    Some(Err(fault)) => {
                        self.door.failed(&fault);
                        Err(fault)
                    }
                    None => break,
                },
                Some(_) if idle => {
                    if let Some(blocking) = connection.take() {
                        blocking.close().await;
                    }
                    self.door.close();
                    continue;
                }
                Some(_) if wanted.is_empty() => {
                    self.bell.notified().await;
                    continue;
                }
                Some(blocking) => self.read(blocking, &wanted, &node).await,
            };
            match outcome {
                Ok(()) => pause = Pause::new(),
                Err(fault) => {
                    if !fault.is_temporary() {
                        fail(&wanted, &node, &fault).await;
                    }
                    tokio::time::sleep(pause.next()).await;
                }
            }
        }
        if let Some(blocking) = connection {
            blocking.close().await;
        }
    }

    async fn read(&self, blocking: &mut Blocking, wanted: &[(Arc<Channel>, EntryId)], node: &Weak<Node>) -> Result<(), Fault> {
        let command = Cmd::new("XREAD").arg("COUNT").number(PAGE as u64).arg("BLOCK").number(crate::publish::millis(BLOCK));
        let command = wanted.iter().fold(command.arg("STREAMS"), |command, (channel, _)| command.key(&channel.stream));
        let command = wanted.iter().fold(command, |command, (_, at)| command.arg(at.to_string()));
        let streams = reply::streams(blocking.read(command, &self.bell).await?)?;
        let Some(node) = node.upgrade() else { return Ok(()) };
        for (stream, entries) in streams {
            let channel = self.channels.lock().get(stream.as_str()).cloned();
            if let Some(channel) = channel {
                channel.dispatch(&entries, &node);
            }
        }
        Ok(())
    }
}

async fn open(node: &Weak<Node>) -> Option<Result<Blocking, Fault>> {
    let (options, main) = {
        let node = node.upgrade()?;
        (node.options().clone(), node.link().clone())
    };
    Some(Blocking::open(&options, main).await)
}

/// Ends the subscriptions on whose account reading fails for good; all of them, if it is no single topic's fault.
async fn fail(wanted: &[(Arc<Channel>, EntryId)], node: &Weak<Node>, fault: &Fault) {
    let Some(link) = node.upgrade().map(|node| node.link().clone()) else { return };
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
