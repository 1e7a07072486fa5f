//! Reading that blocks: a connection of its own, and the way to interrupt it.
//!
//! A read that is under way is never dropped: the server would go on with it, and what comes next would go nowhere. Who wants
//! something else to be read rings, and the read is ended on the server by way of the other connection.

use std::sync::Arc;
use std::time::Duration;

use fred::types::Value;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::RedisBuilder;
use crate::errors::Fault;
use crate::link::{Cmd, Link};

/// How long a read blocks before it is made anew: the bound on what goes unnoticed if it cannot be interrupted.
pub(crate) const BLOCK: Duration = Duration::from_secs(5);

/// How long an interruption is given to work before it is repeated: it may come when the read has not begun yet.
const INTERRUPT_AGAIN: Duration = Duration::from_millis(2);

/// How long saying goodbye may take.
const GOODBYE: Duration = Duration::from_millis(200);

/// How long a subscription that ends waits for what it needed to be gone, too.
pub(crate) const FAREWELL: Duration = Duration::from_secs(1);

/// Whether a reader has its connection, for those who wait for it.
#[derive(Debug)]
pub(crate) struct Door(watch::Sender<Connection>);

#[derive(Debug, Clone)]
enum Connection {
    None,
    Open,
    /// It cannot be opened, and will not be without something being changed.
    Refused(Fault),
}

impl Default for Door {
    fn default() -> Self {
        Self(watch::Sender::new(Connection::None))
    }
}

impl Door {
    pub(crate) fn open(&self) {
        self.0.send_replace(Connection::Open);
    }

    pub(crate) fn close(&self) {
        self.0.send_replace(Connection::None);
    }

    pub(crate) fn failed(&self, fault: &Fault) {
        if !fault.is_temporary() {
            self.0.send_replace(Connection::Refused(fault.clone()));
        }
    }

    /// Waits until the connection is closed, or somebody needs it.
    pub(crate) async fn closed(&self, needed: impl Fn() -> bool) {
        let mut connection = self.0.subscribe();
        while !needed() && matches!(*connection.borrow_and_update(), Connection::Open) {
            // Who needs it does not ring here.
            let _ = timeout(INTERRUPT_AGAIN, connection.changed()).await;
        }
    }

    /// Waits until the reader has its connection.
    pub(crate) async fn opened(&self, until: Instant) -> Result<(), Fault> {
        let mut connection = self.0.subscribe();
        let settled = connection.wait_for(|connection| !matches!(connection, Connection::None));
        match timeout_at(until, settled).await {
            Ok(Ok(connection)) => match &*connection {
                Connection::Refused(fault) => Err(fault.clone()),
                _ => Ok(()),
            },
            _ => Err(Fault::Unknown("no connection to read from within command_timeout".into())),
        }
    }
}

pub(crate) struct Blocking {
    link: Link,
    /// The connection that interrupts.
    main: Arc<Link>,
    /// What the server calls this one.
    id: Option<i64>,
}

impl Blocking {
    pub(crate) async fn open(options: &RedisBuilder, main: Arc<Link>) -> Result<Self, Fault> {
        Ok(Self { link: Link::open(options, BLOCK).await?, main, id: None })
    }

    /// The connection, for commands that do not block.
    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// Reads until something comes, the time is over, or somebody rings.
    pub(crate) async fn read(&mut self, command: Cmd, bell: &Notify) -> Result<Value, Fault> {
        let id = match self.id {
            Some(id) if !self.link.reconnected() => id,
            _ => *self.id.insert(self.link.id().await?),
        };
        let mut reading = std::pin::pin!(self.link.call(command.blocking()));
        tokio::select! {
            answer = &mut reading => return answer,
            () = bell.notified() => {}
        }
        loop {
            let interrupt = Cmd::new("CLIENT").arg("UNBLOCK").arg(id).arg("TIMEOUT");
            let interrupting = async {
                let _ = self.main.call(interrupt).await; // without the right to, the read ends by itself
                tokio::time::sleep(INTERRUPT_AGAIN).await;
            };
            tokio::select! {
                answer = &mut reading => return answer,
                () = interrupting => {}
            }
        }
    }

    pub(crate) async fn close(self) {
        self.link.close(GOODBYE).await;
    }
}
