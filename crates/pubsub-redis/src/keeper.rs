//! The task that keeps what is held, takes over what nobody holds any more, and looks after consumers that are gone.

use std::collections::VecDeque;
use std::sync::{Arc, LazyLock, Weak};

use futures::StreamExt;
use parking_lot::Mutex;
use pubsub_core::machinery::Pause;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::desk::{Arrival, Claimed, Desk};
use crate::errors::Fault;
use crate::keys::NOBODY;
use crate::link::{Link, Script};
use crate::publish::millis;
use crate::reply;
use crate::settle::{Place, Settler};

/// How many groups are looked after at a time.
const TOGETHER: usize = 16;

static CLAIM: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/claim.lua")));
static LEAVE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/leave.lua")));

/// Which desks have something to be done.
#[derive(Default)]
pub(crate) struct Keeper {
    waiting: Mutex<VecDeque<Weak<Desk>>>,
    bell: Notify,
}

impl Keeper {
    /// Something is to be done at a desk.
    pub(crate) fn tend(&self, desk: Weak<Desk>) {
        {
            let mut waiting = self.waiting.lock();
            if waiting.iter().any(|other| other.ptr_eq(&desk)) {
                return;
            }
            waiting.push_back(desk);
        }
        self.bell.notify_one();
    }

    fn next(&self) -> Vec<Arc<Desk>> {
        self.waiting.lock().drain(..).filter_map(|desk| desk.upgrade()).collect()
    }

    pub(crate) async fn run(self: Arc<Self>, settler: Settler) {
        loop {
            let desks = self.next();
            if desks.is_empty() {
                self.bell.notified().await;
                continue;
            }
            let settler = &settler;
            futures::stream::iter(desks).for_each_concurrent(TOGETHER, |desk| async move { tend(&desk, settler).await }).await;
        }
    }
}

async fn tend(desk: &Arc<Desk>, settler: &Settler) {
    let renewals = desk.to_renew();
    if !renewals.is_empty() {
        let asked = Instant::now();
        // What cannot be renewed now is tried again soon; until then it stays as it is.
        if let Ok(answers) = settler.keep(&desk.place, &renewals).await {
            desk.renewed(asked, &renewals, &answers);
        }
        desk.arm();
    }
    let Some((free, silent, alone)) = desk.to_claim() else { return };
    // What was given back here has to be there first.
    desk.node.notices().flush().await;
    match claim(desk, settler, free, silent, alone).await {
        Ok(claimed) => {
            let more = claimed.arrivals.len() >= free.min(silent.max(1));
            desk.claimed(Some(claimed), more);
        }
        Err(fault) => {
            // A group that is gone is made anew by its reader. Whatever it is, the next sweep tries again.
            desk.claimed(None, !fault.is("NOGROUP") && fault.is_unknown());
            tokio::time::sleep(Pause::new().step()).await;
        }
    }
    if desk.time_to_look_after() {
        let silent = 2 * settler.reclaim;
        let call = LEAVE.call(&[&desk.place.stream]).arg(desk.place.group.as_str()).number(millis(silent));
        let _ = settler.link.eval(&LEAVE, call).await; // a matter of tidiness
    }
}

async fn claim(desk: &Desk, settler: &Settler, free: usize, silent: usize, alone: bool) -> Result<Claimed, Fault> {
    let Place { stream, group } = &*desk.place;
    let call = CLAIM.call(&[stream]).arg(group.as_str()).arg(&*settler.consumer).arg(NOBODY).number(millis(settler.reclaim));
    let call = call.number(free as u64).number(silent as u64).number(u64::from(alone));
    let [taken, lost, mine, left, of_silent] = reply::tuple(settler.link.eval(&CLAIM, call).await?)?;
    let mut claimed = Claimed { lost: reply::number(&lost)?, left_alone: reply::number(&left)? == 1, ..Claimed::default() };
    claimed.of_silent = reply::number(&of_silent)?;
    for one in reply::array(taken)? {
        let [id, count, alone, fields] = reply::tuple(one)?;
        let (id, count) = (reply::id(&id)?, reply::number(&count)?);
        if reply::number(&alone)? == 1 {
            claimed.alone = Some(id);
        }
        claimed.arrivals.push(Arrival { entry: reply::fields(id, fields)?, count });
    }
    for one in reply::array(mine)? {
        let [id, count] = reply::tuple(one)?;
        claimed.mine.push((reply::id(&id)?, reply::number(&count)?));
    }
    Ok(claimed)
}

/// Removes consumers that hold nothing, and returns how many were removed.
pub(crate) async fn leave(link: &Link, place: &Place, consumers: &[&str]) -> Result<u64, Fault> {
    let call = LEAVE.call(&[&place.stream]).arg(place.group.as_str()).number(0);
    let call = consumers.iter().fold(call, |call, consumer| call.arg(*consumer));
    reply::number(&link.eval(&LEAVE, call).await?)
}
