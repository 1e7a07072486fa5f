//! The readers of an instance's fan-out: one, or in a cluster one for each master that has topics.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::channel::Channel;
use crate::cluster::Place;
use crate::errors::Fault;
use crate::fan_out::FanOut;
use crate::node::Node;

#[derive(Default)]
pub(crate) struct Readers {
    /// By the node that they read from; by none where there is one server.
    all: Mutex<HashMap<Option<Place>, Arc<FanOut>>>,
    /// How many subscriptions there are, whether or not they go with a reader just now.
    followers: Arc<AtomicUsize>,
}

impl Readers {
    fn each(&self) -> Vec<Arc<FanOut>> {
        self.all.lock().values().cloned().collect()
    }

    /// Who reads a topic.
    fn of(&self, channel: &Channel, node: &Node) -> Arc<FanOut> {
        let place = node.link().owner_of(&channel.stream);
        let new = |place: &Option<Place>| Arc::new(FanOut::new(place.clone(), self.followers.clone()));
        let mut all = self.all.lock();
        all.entry(place).or_insert_with_key(new).clone()
    }

    /// There is one more subscription: its reader keeps its connection, and is started unless it runs.
    pub(crate) fn enter(&self, channel: &Channel, node: &Arc<Node>) {
        self.followers.fetch_add(1, Ordering::SeqCst);
        self.of(channel, node).start(node);
    }

    /// There is one less.
    pub(crate) fn leave(&self) {
        if self.followers.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.each().iter().for_each(|reader| reader.ring());
        }
    }

    /// Waits until the readers have nothing left of a subscription that has ended.
    pub(crate) async fn left(&self) {
        futures::future::join_all(self.each().iter().map(|reader| reader.left())).await;
    }

    /// Somebody goes with the reader on this topic from now on.
    pub(crate) fn want(&self, channel: &Arc<Channel>, node: &Arc<Node>) {
        let reader = self.of(channel, node);
        reader.start(node);
        reader.want(channel);
    }

    /// Somebody has taken something of a topic that had enough.
    pub(crate) fn resume(&self, channel: &Arc<Channel>, node: &Arc<Node>) {
        let reader = self.of(channel, node);
        reader.start(node);
        reader.resume(channel);
    }

    /// A topic is to be read anew.
    pub(crate) fn look_again(&self, channel: &Arc<Channel>) {
        self.each().iter().for_each(|reader| reader.look_again(channel));
    }

    /// Waits until the reader of a topic has its connection.
    pub(crate) async fn opened(&self, channel: &Channel, node: &Node, until: Instant) -> Result<(), Fault> {
        self.of(channel, node).opened(until).await
    }

    /// Asks the readers to end, and returns their tasks, to be waited for.
    pub(crate) fn stop(&self) -> Vec<JoinHandle<()>> {
        self.each().iter().filter_map(|reader| reader.stop()).collect()
    }
}
