//! Settlements on their way to the service: acknowledgements, renewals and what is given back go out in batches.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use pubsub_core::Settled;
use pubsub_core::machinery::{OpenSettlement, Pause, SettleQueue};
use tokio::time::Instant;

use crate::desk::Desk;
use crate::errors::{Fault, Refusal};
use crate::link::Link;

/// How many records are looked at together, and how many ack ids go in one request: with what the service makes them of, more would
/// be over its limit of 512 KiB.
const TOGETHER: usize = 1000;

/// What is to become of messages of a subscription.
#[derive(Debug)]
pub(crate) struct Notice {
    pub(crate) subscription: Arc<str>,
    pub(crate) ack_ids: Vec<String>,
    pub(crate) what: What,
    /// After this it is no use any more.
    pub(crate) until: Instant,
    /// Whom to tell that these are renewed, of those that renewed them.
    pub(crate) renews: Option<Renewal>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum What {
    /// They are done.
    Ack,
    /// They are held for so many seconds from now on; 0 gives them back.
    Deadline(i32),
}

/// Leases that are renewed.
#[derive(Debug)]
pub(crate) struct Renewal {
    pub(crate) desk: Weak<Desk>,
    pub(crate) leases: Vec<u64>,
    /// When that was asked for.
    pub(crate) at: Instant,
}

/// Sends what is recorded until the future is dropped.
pub(crate) async fn run(link: Arc<Link>, notices: SettleQueue<Notice>) {
    loop {
        let mut groups: HashMap<(Arc<str>, What), Vec<OpenSettlement<Notice>>> = HashMap::new();
        for open in notices.next_batch(TOGETHER).await {
            let Notice { subscription, what, .. } = open.what();
            groups.entry((subscription.clone(), *what)).or_default().push(open);
        }
        let sending = groups.into_iter().map(|((subscription, what), open)| send(&link, subscription, what, open));
        futures::future::join_all(sending).await;
    }
}

async fn send(link: &Link, subscription: Arc<str>, what: What, mut waiting: Vec<OpenSettlement<Notice>>) {
    let mut pause = Pause::new();
    while !waiting.is_empty() {
        let batch = take(&mut waiting);
        let ids = batch.iter().flat_map(|open| open.what().ack_ids.iter().cloned()).collect();
        let outcome = match what {
            What::Ack => link.acknowledge(&subscription, ids).await,
            What::Deadline(seconds) => link.set_deadline(&subscription, ids, seconds).await,
        };
        match outcome {
            Ok(()) => batch.into_iter().for_each(done),
            Err(fault) => {
                let again = sort_out(batch, &fault);
                if !again.is_empty() {
                    waiting.splice(0..0, again);
                    tokio::time::sleep(pause.step()).await;
                } else if !fault.is_temporary() && fault.ids.is_empty() && !fault.is_not_found() {
                    tracing::warn!(%subscription, ?what, %fault, "settlements were refused");
                }
            }
        }
    }
}

/// As many as go in one request, at least one.
fn take(waiting: &mut Vec<OpenSettlement<Notice>>) -> Vec<OpenSettlement<Notice>> {
    let mut ids = 0;
    let fits = |open: &&OpenSettlement<Notice>| {
        ids += open.what().ack_ids.len();
        ids <= TOGETHER
    };
    let count = waiting.iter().take_while(fits).count().max(1);
    waiting.drain(..count).collect()
}

fn done(open: OpenSettlement<Notice>) {
    if let Some(Renewal { desk, leases, at }) = &open.what().renews
        && let Some(desk) = desk.upgrade()
    {
        desk.renewed(leases, *at);
    }
    open.answer(Settled::Done);
}

/// Answers what can be answered after a request failed, and returns what is worth sending again.
fn sort_out(batch: Vec<OpenSettlement<Notice>>, fault: &Fault) -> Vec<OpenSettlement<Notice>> {
    let now = Instant::now();
    let mut again = Vec::new();
    for mut open in batch {
        let useful = open.what().until > now;
        if fault.ids.is_empty() {
            // What is dropped is unconfirmed.
            if fault.is_temporary() && useful {
                again.push(open);
            }
            continue;
        }
        let refusal = |id: &String| fault.ids.get(id).copied();
        let lost = open.what().ack_ids.iter().any(|id| refusal(id) == Some(Refusal::Lost));
        open.what_mut().ack_ids.retain(|id| refusal(id) == Some(Refusal::ForNow));
        match open.what().ack_ids.is_empty() {
            true if lost => open.answer(Settled::TooLate),
            true => done(open),
            false if useful => again.push(open),
            false => drop(open),
        }
    }
    again
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use gcloud_sdk::tonic::Code;

    use super::*;

    fn notice(ids: &[&str], left: Duration) -> Notice {
        let ack_ids = ids.iter().map(|id| (*id).to_owned()).collect();
        Notice { subscription: "s".into(), ack_ids, what: What::Ack, until: Instant::now() + left, renews: None }
    }

    async fn sorted(fault: &Fault) -> (Vec<Option<Settled>>, usize) {
        let queue = SettleQueue::new();
        let hour = Duration::from_secs(3600);
        let receipts = [
            queue.record(notice(&["lost"], hour)),
            queue.record(notice(&["done"], hour)),
            queue.record(notice(&["done", "for now"], hour)),
            queue.record(notice(&["for now"], Duration::ZERO)),
        ];
        let again = sort_out(queue.next_batch(9).await, fault);
        let answers = receipts.map(futures::FutureExt::now_or_never);
        (answers.into(), again.iter().map(|open| open.what().ack_ids.len()).sum())
    }

    #[tokio::test]
    async fn single_refusals_concern_single_messages() {
        let mut fault = Fault::new(Code::FailedPrecondition, "");
        fault.ids = [("lost".to_owned(), Refusal::Lost), ("for now".to_owned(), Refusal::ForNow)].into();
        let expected = [Some(Settled::TooLate), Some(Settled::Done), None, Some(Settled::Unconfirmed)];
        assert_eq!(sorted(&fault).await, (expected.into(), 1));
    }

    #[tokio::test]
    async fn what_failed_for_now_is_sent_again_as_long_as_it_is_of_use() {
        let unconfirmed = Some(Settled::Unconfirmed);
        let (answers, again) = sorted(&Fault::new(Code::Unavailable, "")).await;
        assert_eq!((answers, again), (vec![None, None, None, unconfirmed], 4));
        let (answers, again) = sorted(&Fault::new(Code::PermissionDenied, "")).await;
        assert_eq!((answers, again), (vec![unconfirmed; 4], 0));
    }
}
