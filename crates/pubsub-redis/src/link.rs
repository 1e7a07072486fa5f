//! A connection to the server: commands and pipelines over one fred client, and what is known of its reconnects.
//!
//! fred sends a command that was in flight again when its connection breaks, unless it has but one attempt. Here it has one, so that
//! an error means "unknown" and whoever sent the command decides.

use std::fmt;
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::{ClientLike, EventInterface};
use fred::types::config::{ConnectionConfig, PerformanceConfig, ReconnectPolicy, TcpConfig, UnresponsiveConfig};
use fred::types::{Builder, ClusterHash, ConnectHandle, CustomCommand, RespVersion, Value};
use parking_lot::Mutex;
use pubsub_core::{Error, ErrorKind};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::TryRecvError;

use crate::RedisBuilder;
use crate::cluster::{Cluster, Place};
use crate::errors::Fault;

/// Back-off between attempts to connect again: it doubles from the first to the second.
const RECONNECT: (u32, u32) = (20, 2000);

/// How many notices of a kind (reconnects, streams that have changed) wait to be listened to. Beyond that it is only known that there
/// were more.
const NOTICES: usize = 256;

/// Which slot of a cluster a key is in.
pub(crate) fn slot_of(key: &str) -> u16 {
    fred::util::redis_keyslot(key.as_bytes())
}

/// A command.
#[derive(Clone)]
pub(crate) struct Cmd {
    name: &'static str,
    args: Vec<Value>,
    slot: Option<u16>,
    blocking: bool,
}

impl Cmd {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, args: Vec::with_capacity(12), slot: None, blocking: false }
    }

    /// Blocks its connection until something comes.
    pub(crate) fn blocking(mut self) -> Self {
        self.blocking = true;
        self
    }

    pub(crate) fn arg(mut self, value: impl Into<Value>) -> Self {
        self.args.push(value.into());
        self
    }

    pub(crate) fn number(self, value: u64) -> Self {
        self.arg(i64::try_from(value).unwrap_or(i64::MAX))
    }

    /// A key, whose slot decides where the command goes in a cluster.
    pub(crate) fn key(mut self, key: &str) -> Self {
        self.slot.get_or_insert_with(|| slot_of(key));
        self.arg(key)
    }

    /// A word about the slot for a command that names no key.
    pub(crate) fn beside(mut self, key: &str) -> Self {
        self.slot = Some(slot_of(key));
        self
    }

    fn into_parts(self) -> (CustomCommand, Vec<Value>) {
        let hash = self.slot.map_or(ClusterHash::Random, ClusterHash::Custom);
        (CustomCommand::new_static(self.name, hash, self.blocking), self.args)
    }
}

impl fmt::Debug for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} arguments)", self.name, self.args.len())
    }
}

/// A script, known to the server by its hash once it was sent.
pub(crate) struct Script {
    text: &'static str,
    hash: String,
}

impl Script {
    pub(crate) fn new(text: &'static str) -> Self {
        Self { text, hash: fred::util::sha1_hash(text) }
    }

    /// A call over these keys, to which arguments are added.
    pub(crate) fn call(&self, keys: &[&str]) -> Cmd {
        Self::over(Cmd::new("EVALSHA").arg(self.hash.as_str()), keys)
    }

    /// The same call where the server does not know the script.
    pub(crate) fn in_full(&self, mut call: Cmd) -> Cmd {
        (call.name, call.args[0]) = ("EVAL", self.text.into());
        call
    }

    fn over(call: Cmd, keys: &[&str]) -> Cmd {
        keys.iter().fold(call.number(keys.len() as u64), |call, key| call.key(key))
    }
}

/// A connection. It heals by itself. One to a cluster sends commands to who has their keys, over connections of their own.
pub(crate) struct Link {
    cluster: Option<Cluster>,
    client: Client,
    task: ConnectHandle,
    reconnects: Mutex<broadcast::Receiver<fred::types::config::Server>>,
    known_id: tokio::sync::Mutex<Option<i64>>,
}

impl Link {
    /// Connects. A command may take `command_timeout`, and as long as it may block beyond that.
    pub(crate) async fn open(options: &RedisBuilder, may_block: Duration) -> Result<Self, Fault> {
        let Some(seeds) = options.server.nodes() else { return Self::direct(options, may_block, None).await };
        let cluster = Box::pin(Cluster::find(options, seeds)).await?;
        // This one is for what has no key.
        let any = cluster.masters().into_iter().next().ok_or(Fault::Nonsense("a cluster without masters"))?;
        Box::pin(Self::direct(&options.at(&any), may_block, Some(cluster))).await
    }

    async fn direct(options: &RedisBuilder, may_block: Duration, cluster: Option<Cluster>) -> Result<Self, Fault> {
        let patience = options.command_timeout;
        let mut config = options.server.config().clone();
        (config.version, config.fail_fast) = (RespVersion::RESP3, true);
        let mut connection = ConnectionConfig::default();
        (connection.connection_timeout, connection.internal_command_timeout) = (patience, patience);
        (connection.max_command_attempts, connection.auto_client_setname) = (1, true);
        connection.tcp = TcpConfig { nodelay: Some(true), ..TcpConfig::default() };
        let answer = patience + may_block;
        connection.unresponsive = UnresponsiveConfig { max_timeout: Some(answer), interval: patience / 4 };
        let mut performance = PerformanceConfig::default();
        (performance.default_command_timeout, performance.max_feed_count) = (answer, 10_000);
        performance.broadcast_channel_capacity = NOTICES;
        let (least, most) = RECONNECT;
        let policy = ReconnectPolicy::Exponential {
            attempts: 0,
            max_attempts: 0,
            min_delay: least,
            max_delay: most,
            base: 2,
            jitter: least,
        };
        let client = Builder::from_config(config)
            .set_connection_config(connection)
            .set_performance_config(performance)
            .set_policy(policy)
            .build()?;
        let reconnects = Mutex::new(client.reconnect_rx());
        let opening = Opening(Some(client));
        let connected = tokio::time::timeout(patience, opening.client().init()).await;
        let task = connected.map_err(|_| Fault::Unknown("no connection within command_timeout".into()))??;
        let link = Self { cluster, client: opening.done(), task, reconnects, known_id: tokio::sync::Mutex::default() };
        link.reconnected(); // the first time does not count
        Ok(link)
    }

    /// Says so if the server is older than what is needed.
    pub(crate) fn check_version(&self) -> Result<(), Error> {
        match self.client.server_version() {
            Some(version) if version.major < 7 => {
                let why = format!("the server is Redis {version}; 7.0 or later is needed");
                Err(Error::new(ErrorKind::Backend(why.into())))
            }
            _ => Ok(()),
        }
    }

    /// Sends a command and waits for its answer.
    pub(crate) async fn call(&self, command: Cmd) -> Result<Value, Fault> {
        match (&self.cluster, command.slot) {
            (Some(cluster), Some(slot)) => Box::pin(cluster.call(slot, command)).await,
            _ => {
                let (command, args) = command.into_parts();
                Ok(self.client.custom::<Value, Value>(command, args).await?)
            }
        }
    }

    /// Calls a script, whether or not the server knows it.
    pub(crate) async fn eval(&self, script: &Script, call: Cmd) -> Result<Value, Fault> {
        match self.call(call.clone()).await {
            Err(fault) if fault.is("NOSCRIPT") => self.call(script.in_full(call)).await,
            answer => answer,
        }
    }

    /// Sends commands together and returns their answers, in order.
    pub(crate) async fn pipeline(&self, commands: Vec<Cmd>) -> Vec<Result<Value, Fault>> {
        if let Some(cluster) = &self.cluster {
            let with_slots = commands.into_iter().map(|command| (command.slot.unwrap_or_default(), command));
            return Box::pin(cluster.pipeline(with_slots.collect())).await;
        }
        let count = commands.len();
        let pipeline = self.client.pipeline();
        for command in commands {
            let (command, args) = command.into_parts();
            // In a pipeline this only queues.
            let queued = pipeline.custom::<(), Value>(command, args).await;
            debug_assert!(queued.is_ok(), "{queued:?}");
        }
        let mut answers: Vec<_> =
            pipeline.try_all::<Value>().await.into_iter().map(|answer| answer.map_err(Fault::from)).collect();
        if answers.len() != count {
            // fred answers once for a pipeline that failed as a whole.
            let fault = answers.pop().and_then(Result::err).unwrap_or(Fault::Nonsense("a pipeline was not answered whole"));
            return vec![Err(fault); count];
        }
        answers
    }

    /// Whether the connection was made again since this was last asked.
    pub(crate) fn reconnected(&self) -> bool {
        let mut reconnects = self.reconnects.lock();
        let mut any = false;
        loop {
            match reconnects.try_recv() {
                Ok(_) | Err(TryRecvError::Lagged(_)) => any = true,
                Err(_) => return any,
            }
        }
    }

    /// Sees to it that nothing can come any more from the connection that this one has taken the place of, and learns what the server calls
    /// this one, for the next time.
    pub(crate) async fn end_previous(&self) -> Result<(), Fault> {
        let mut known = self.known_id.lock().await;
        if !self.reconnected() && known.is_some() {
            return Ok(());
        }
        let id = self.id().await?;
        if let Some(previous) = known.replace(id).filter(|previous| *previous != id) {
            // Refused, if it is not allowed or long gone: then what is still on its way may come late.
            let _ = self.call(Cmd::new("CLIENT").arg("KILL").arg("ID").arg(previous)).await;
        }
        Ok(())
    }

    /// What the server calls this connection. fred's own idea of it is old right after a reconnect.
    pub(crate) async fn id(&self) -> Result<i64, Fault> {
        self.call(Cmd::new("CLIENT").arg("ID")).await?.as_i64().ok_or(Fault::Nonsense("a connection without an id"))
    }

    /// The node of a cluster that has a key, as far as is known.
    pub(crate) fn owner_of(&self, key: &str) -> Option<Place> {
        self.cluster.as_ref()?.owner(slot_of(key))
    }

    pub(crate) fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Says goodbye, within this time.
    pub(crate) async fn close(&self, within: Duration) {
        let of_nodes = self.cluster.as_ref().map(Cluster::links).unwrap_or_default();
        let all = of_nodes.iter().map(|link| &link.client).chain([&self.client]).map(ClientLike::quit);
        let _ = tokio::time::timeout(within, futures::future::join_all(all)).await;
        self.task.abort();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A client that is connecting: dropped, it leaves nothing behind.
struct Opening(Option<Client>);

impl Opening {
    fn client(&self) -> &Client {
        self.0.as_ref().expect("taken by `done` alone")
    }

    fn done(mut self) -> Client {
        self.0.take().expect("taken once")
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let (Some(client), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            // Replacing its router task ends the one that is connecting.
            runtime.spawn(async move { drop(client.quit().await) });
        }
    }
}
