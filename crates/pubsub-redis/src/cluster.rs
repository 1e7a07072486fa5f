//! A cluster: which node has which slot, a connection to each, and commands that go where their key is.
//!
//! The client library could do that as well, but follows a key that has moved by itself, also out of the middle of a transaction, and
//! then nobody could tell what was written. Here every node is a server of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fred::interfaces::ClientLike;
use fred::types::Value;
use futures::FutureExt;
use futures::future::{BoxFuture, join_all, select_ok};
use parking_lot::Mutex;
use pubsub_core::machinery::Pause;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout};

use crate::RedisBuilder;
use crate::errors::Fault;
use crate::link::{Cmd, Link};
use crate::reply;

/// How often a key that moves is followed before the command is given up.
const FOLLOWED: u32 = 16;

/// How long what was learnt about the nodes is taken for new.
const FRESH: Duration = Duration::from_millis(50);

/// Where a node listens.
pub(crate) type Place = (String, u16);

/// First and last slot of each range, and who has it.
type Owners = Vec<(u16, u16, Place)>;

pub(crate) struct Cluster {
    options: RedisBuilder,
    /// Those that were named at first, to ask when no other is left.
    seeds: Vec<Place>,
    nodes: Mutex<Nodes>,
    /// The nodes may be others than is known.
    suspect: AtomicBool,
    asked: tokio::sync::Mutex<Option<Instant>>,
}

#[derive(Default)]
struct Nodes {
    owners: Owners,
    links: HashMap<Place, Arc<OnceCell<Arc<Link>>>>,
}

impl Nodes {
    fn owner(&self, slot: u16) -> Option<&Place> {
        self.owners.iter().find(|(first, last, _)| (*first..=*last).contains(&slot)).map(|(_, _, place)| place)
    }

    fn opened(&self) -> Vec<(Place, Arc<Link>)> {
        self.links.iter().filter_map(|(place, link)| Some((place.clone(), link.get()?.clone()))).collect()
    }
}

impl Cluster {
    /// Finds out who is there.
    pub(crate) async fn find(options: &RedisBuilder, seeds: Vec<Place>) -> Result<Self, Fault> {
        let (nodes, suspect) = (Mutex::default(), AtomicBool::new(true));
        let cluster = Self { options: options.clone(), seeds, nodes, suspect, asked: tokio::sync::Mutex::default() };
        cluster.refresh().await?;
        Ok(cluster)
    }

    /// The masters.
    pub(crate) fn masters(&self) -> Vec<Place> {
        let mut masters: Vec<_> = self.nodes.lock().owners.iter().map(|(_, _, place)| place.clone()).collect();
        masters.sort_unstable();
        masters.dedup();
        masters
    }

    /// Who has a slot, as far as is known.
    pub(crate) fn owner(&self, slot: u16) -> Option<Place> {
        self.nodes.lock().owner(slot).cloned()
    }

    /// The connections there are.
    pub(crate) fn links(&self) -> Vec<Arc<Link>> {
        self.nodes.lock().opened().into_iter().map(|(_, link)| link).collect()
    }

    pub(crate) fn doubt(&self) {
        self.suspect.store(true, Ordering::Release);
    }

    /// The connection to a node, which is opened if there is none.
    pub(crate) async fn at(&self, place: &Place) -> Result<Arc<Link>, Fault> {
        let cell = self.nodes.lock().links.entry(place.clone()).or_default().clone();
        let open = || async { Link::open(&self.options.at(place), Duration::ZERO).await.map(Arc::new) };
        let link = cell.get_or_try_init(open).await.inspect_err(|_| self.doubt())?;
        if link.client().is_connected() {
            Box::pin(link.end_previous()).await?;
            return Ok(link.clone());
        }
        self.doubt();
        Err(Fault::Refused(format!("CLUSTERDOWN no connection to {}:{}", place.0, place.1)))
    }

    /// The connection to who has a slot.
    pub(crate) async fn beside(&self, slot: u16) -> Result<Arc<Link>, Fault> {
        self.refresh().await?;
        let place = self.owner(slot).ok_or_else(|| {
            self.doubt();
            Fault::Refused("CLUSTERDOWN nobody has the slot".into())
        })?;
        self.at(&place).await
    }

    /// Asks who has which slot, unless that is known, or somebody asks already: who has nothing to do with what is doubted does not wait
    /// for the answer, and who has is told again where to go.
    pub(crate) async fn refresh(&self) -> Result<(), Fault> {
        if !self.suspect.load(Ordering::Acquire) {
            return Ok(());
        }
        let Ok(mut asked) = self.asked.try_lock() else { return Ok(()) };
        let is_fresh = asked.is_some_and(|asked| asked.elapsed() < FRESH);
        if is_fresh || !self.suspect.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let mut places: Vec<_> = self.nodes.lock().opened().into_iter().map(|(place, _)| place).collect();
        places.extend(self.seeds.iter().cloned());
        places.sort_unstable();
        places.dedup();
        // Whoever answers first: one that hangs holds nobody up.
        let asking = select_ok(places.iter().map(|place| self.ask(place)));
        let owners = match timeout(self.options.command_timeout, asking).await {
            Ok(Ok((owners, _))) => owners,
            failed => {
                self.doubt();
                return Err(match failed {
                    Ok(Err(fault)) => fault,
                    _ => Fault::Unknown("none of the nodes answers".into()),
                });
            }
        };
        *asked = Some(Instant::now());
        let mut nodes = self.nodes.lock();
        nodes.links.retain(|place, _| owners.iter().any(|(_, _, owner)| owner == place));
        nodes.owners = owners;
        Ok(())
    }

    fn ask<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<Owners, Fault>> {
        let asking = async move {
            let answer = reply::array(self.at(place).await?.call(Cmd::new("CLUSTER").arg("SLOTS")).await?)?;
            let owners = answer.into_iter().map(|range| owner_of(range, &place.0)).collect::<Result<Vec<_>, _>>()?;
            if owners.is_empty() { Err(Fault::Unknown("a node knows of no other".into())) } else { Ok(owners) }
        };
        asking.boxed()
    }

    /// Sends a command to who has its slot, and after it if that has changed.
    pub(crate) async fn call(&self, slot: u16, command: Cmd) -> Result<Value, Fault> {
        let mut pause = Pause::new();
        for _ in 0..FOLLOWED {
            let fault = match self.beside(slot).await?.call(command.clone()).await {
                Err(fault) if fault.is("MOVED") => {
                    self.doubt();
                    fault
                }
                Err(fault) if fault.is("ASK") => {
                    let place = fault.named_place().ok_or(Fault::Nonsense("a key that is asked for nowhere"))?;
                    let asking = vec![Cmd::new("ASKING"), command.clone()];
                    match self.at(&place).await?.pipeline(asking).await.pop() {
                        Some(Err(fault)) if fault.is("TRYAGAIN") => fault,
                        answer => return answer.unwrap_or(Err(Fault::Nonsense("a pipeline was not answered whole"))),
                    }
                }
                Err(fault) if fault.is("TRYAGAIN") => fault,
                answer => {
                    return answer.inspect_err(|fault| {
                        if fault.is_unknown() || fault.is_elsewhere() {
                            self.doubt();
                        }
                    });
                }
            };
            tracing::debug!(%fault, "a key has moved");
            tokio::time::sleep(pause.step()).await;
        }
        Err(Fault::Refused("TRYAGAIN the key moves all the time".into()))
    }

    /// Sends commands, those of each node together, and returns their answers in order.
    pub(crate) async fn pipeline(&self, commands: Vec<(u16, Cmd)>) -> Vec<Result<Value, Fault>> {
        let mut answers: Vec<Option<Result<Value, Fault>>> = commands.iter().map(|_| None).collect();
        let mut of_nodes: Vec<(Arc<Link>, Vec<usize>, Vec<Cmd>)> = Vec::new();
        for (at, (slot, command)) in commands.into_iter().enumerate() {
            match self.beside(slot).await {
                Err(fault) => answers[at] = Some(Err(fault)),
                Ok(link) => {
                    let of_node = of_nodes.iter().position(|(known, ..)| Arc::ptr_eq(known, &link)).unwrap_or_else(|| {
                        of_nodes.push((link, Vec::new(), Vec::new()));
                        of_nodes.len() - 1
                    });
                    of_nodes[of_node].1.push(at);
                    of_nodes[of_node].2.push(command);
                }
            }
        }
        let sent = of_nodes.into_iter().map(|(link, places, commands)| async move { (places, link.pipeline(commands).await) });
        for (places, of_node) in join_all(sent).await {
            for (at, answer) in places.into_iter().zip(of_node) {
                if matches!(&answer, Err(fault) if fault.is_unknown() || fault.is_elsewhere()) {
                    self.doubt();
                }
                answers[at] = Some(answer);
            }
        }
        let missing = || Err(Fault::Nonsense("a pipeline was not answered whole"));
        answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
    }
}

/// A range of slots and its master, as a node tells it. One that does not know how it is called leaves its name out.
fn owner_of(range: Value, asked: &str) -> Result<(u16, u16, Place), Fault> {
    let mut range = reply::array(range)?.into_iter();
    let mut slot = || {
        let slot = range.next().as_ref().map(reply::number).transpose()?;
        slot.and_then(|slot| u16::try_from(slot).ok()).ok_or(Fault::Nonsense("a range of slots was expected"))
    };
    let (first, last) = (slot()?, slot()?);
    let mut node = reply::array(range.next().unwrap_or(Value::Null))?.into_iter();
    let host = node.next().and_then(Value::into_string).filter(|host| !host.is_empty() && host != "?");
    let port = node.next().as_ref().and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
    let port = port.ok_or(Fault::Nonsense("a node without a port"))?;
    Ok((first, last, (host.unwrap_or_else(|| asked.to_owned()), port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_name_their_masters() {
        let list = |values: Vec<Value>| Value::Array(values);
        let node = |host: Value| list(vec![host, 7000.into(), "id".into(), list(vec![])]);
        let range = |host| list(vec![0.into(), 5460.into(), node(host), node("replica".into())]);
        assert_eq!(owner_of(range("h".into()), "asked"), Ok((0, 5460, ("h".into(), 7000))));
        for unnamed in [Value::Null, "".into(), "?".into()] {
            assert_eq!(owner_of(range(unnamed), "asked"), Ok((0, 5460, ("asked".into(), 7000))));
        }
        for nonsense in [list(vec![]), list(vec![0.into(), 99_999.into()]), list(vec![0.into(), 1.into(), list(vec![])])] {
            assert!(owner_of(nonsense, "asked").is_err());
        }
    }
}
