//! What entries of the log come to, one by one.

use super::*;
use crate::journal;
use crate::protocol::OnLease;
use crate::record::Stored;

const LIMITS: Limits = Limits { max_events: 3, max_bytes: 1 << 20 };

struct Bench {
    ledger: Ledger,
    number: u64,
}

impl Bench {
    fn new() -> Self {
        Self { ledger: Ledger::new(1, LIMITS), number: 0 }
    }

    fn call(&mut self, client: ClientId, request: Request) -> Answer {
        self.number += 1;
        let call = ToBroker::Call(Call { number: self.number, below: self.number, request });
        match self.ledger.apply(self.ledger.now, client, &call) {
            Effect::Answer(_, answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    fn publish(&mut self, ids: impl IntoIterator<Item = u64>) -> Answer {
        let events: Vec<Stored> = ids.into_iter().map(event).collect();
        let count = events.len();
        self.call(1, Request::publish("t".into(), events.into_iter().collect(), count))
    }

    fn join(&mut self, client: ClientId) {
        let request = Request::Join { seat: seat(), begin: None, or_earliest: false };
        assert_eq!(self.call(client, request), Answer::Joined(Ok(())));
    }

    /// The offset, attempt and loss of each delivery.
    fn take(&mut self, client: ClientId, number: u64, most: u32) -> Vec<(u64, u32, u64)> {
        let take = ToBroker::Take(Take { seat: seat(), number, most });
        match self.ledger.apply(self.ledger.now, client, &take) {
            Effect::Taken { over: Some(over), .. } => {
                assert_eq!(over.handed.len(), over.events.iter().count());
                over.handed.iter().map(|handed| (handed.offset, handed.attempt, handed.lagged)).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    fn settle(&mut self, client: ClientId, offset: u64, attempt: u32, what: What) -> Answer {
        let settled = vec![Settling { offset, attempt, what }];
        self.call(client, Request::Settle { seat: seat(), generation: 1, settled })
    }

    fn lease(&mut self, what: OnLease) -> Answer {
        self.call(1, Request::Lease { key: "k".into(), what })
    }
}

fn event(id: u64) -> Stored {
    let json = format!(r#"{{"type":"x","id":"{id}","runId":"r{id}","createdAt":"2026-01-02T03:04:05.006Z","data":{id}}}"#);
    Stored::text(&id.to_string(), json.as_bytes())
}

fn seat() -> Seat {
    Seat { topic: "t".into(), group: "g".into(), member: 5 }
}

fn offsets(answer: &Answer) -> Vec<u64> {
    match answer {
        Answer::Published { offsets, .. } => offsets.iter().collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_repeated_event_is_one_while_it_is_kept() {
    let mut bench = Bench::new();
    assert_eq!(offsets(&bench.publish([7, 8, 7])), [0, 1, 0]);
    assert_eq!(offsets(&bench.publish([8, 9])), [1, 2]);
    bench.publish([10, 11, 12]);
    assert_eq!(offsets(&bench.publish([7])), [6], "it had gone");
}

#[test]
fn a_call_that_is_said_again_is_answered_and_not_carried_out() {
    let mut bench = Bench::new();
    let call = |number| {
        ToBroker::Call(Call { number, below: 1, request: Request::Trim { topic: "t".into(), run: "r7".into(), up_to: None } })
    };
    bench.publish([7]);
    let first = bench.ledger.apply(0, 9, &call(1));
    assert_eq!(first, Effect::Answer(1, Answer::Trimmed(1)));
    assert_eq!(bench.ledger.apply(0, 9, &call(1)), first, "the same answer");
    assert_eq!(bench.ledger.apply(0, 9, &call(2)), Effect::Answer(2, Answer::Trimmed(0)), "another call");
}

#[test]
fn a_group_with_members_holds_publishers_back_and_one_without_is_told_its_loss() {
    let mut bench = Bench::new();
    bench.join(2);
    bench.publish([1, 2, 3]);
    assert_eq!(bench.publish([4]), Answer::Full);
    assert_eq!(bench.take(2, 1, 1), [(0, 1, 0)]);
    assert_eq!(offsets(&bench.publish([4])), [3], "there is room behind what was read");
    bench.call(2, Request::Leave { seat: seat(), heard: 1 });
    assert_eq!(offsets(&bench.publish([5, 6])), [4, 5]);
    bench.join(3);
    assert_eq!(bench.take(3, 1, 2), [(3, 1, 2), (4, 1, 0)], "two were lost");
}

#[test]
fn what_a_client_held_comes_back_once_it_is_gone_one_attempt_higher() {
    let mut bench = Bench::new();
    bench.join(2);
    bench.join(3);
    bench.publish([1, 2]);
    assert_eq!(bench.take(2, 1, 2), [(0, 1, 0), (1, 1, 0)]);
    assert_eq!(bench.take(2, 1, 2), [(0, 1, 0), (1, 1, 0)], "a take said again");
    assert_eq!(bench.settle(2, 1, 1, What::Release), Answer::Settled(vec![]));
    bench.ledger.apply(9, 2, &ToBroker::Bye);
    assert_eq!(bench.take(3, 1, 2), [(1, 1, 0), (0, 2, 0)], "what was released is not counted, and comes first");
    assert_eq!(bench.settle(2, 0, 1, What::Done), Answer::Settled(vec![0]), "it is another's now");
    assert_eq!(bench.settle(3, 0, 2, What::Done), Answer::Settled(vec![]));
    assert_eq!(bench.settle(3, 0, 2, What::Done), Answer::Settled(vec![0]));
}

#[test]
fn a_member_that_leaves_takes_nothing_with_it_that_it_never_saw() {
    let mut bench = Bench::new();
    bench.join(2);
    bench.join(3);
    bench.publish([1]);
    assert_eq!(bench.take(2, 1, 1), [(0, 1, 0)]);
    bench.call(2, Request::Leave { seat: seat(), heard: 0 });
    assert_eq!(bench.take(3, 1, 1), [(0, 1, 0)]);
}

#[test]
fn a_retry_waits_for_its_time_on_the_ledgers_clock() {
    let mut bench = Bench::new();
    bench.join(2);
    bench.publish([1]);
    bench.take(2, 1, 1);
    bench.settle(2, 0, 1, What::Retry(30));
    assert_eq!((bench.ledger.next_due(&"t".into(), &"g".into()), bench.take(2, 2, 1)), (Some(30), Vec::new()));
    bench.ledger.now = 30;
    assert_eq!(bench.take(2, 3, 1), [(0, 2, 0)]);
}

#[test]
fn tokens_grow_with_every_owner_and_time_ends_a_lease() {
    let mut bench = Bench::new();
    let token = |answer: Answer| match answer {
        Answer::Lease(Some(lease), own) => (lease.token, own),
        other => panic!("{other:?}"),
    };
    let acquire = |owner: &str| OnLease::Acquire { owner: owner.into(), ttl: 10 };
    assert_eq!(token(bench.lease(acquire("a"))), (1, true));
    assert_eq!(token(bench.lease(acquire("a"))), (1, true), "a renewal");
    assert_eq!(token(bench.lease(acquire("b"))), (1, false));
    bench.ledger.now = 10;
    assert_eq!(token(bench.lease(acquire("b"))), (2, true));
    assert_eq!(token(bench.lease(OnLease::Transfer { from: "b".into(), to: "a".into(), ttl: 5 })), (3, true));
    assert_eq!(bench.lease(OnLease::Release { owner: "b".into() }), Answer::Lease(None, false));
}

#[test]
fn a_journal_leads_to_the_same_ledger_and_what_is_cut_off_is_not_there() {
    let mut bench = Bench::new();
    bench.join(2);
    bench.publish([1, 2]);
    bench.take(2, 1, 1);
    let mut log = journal::begin(&bench.ledger).unwrap();
    let mut body = Vec::new();
    let request = Request::publish_one("t".into(), event(3));
    let call = ToBroker::Call(Call { number: 50, below: 50, request });
    crate::frame::encode(&call, &mut body).unwrap();
    journal::entry(7, 1, &body[crate::frame::HEADER..], &mut log);
    let retained = |ledger: &Ledger| match ledger.ask(&Query::Status { topic: "t".into() }, 0) {
        Some(Reply::Status { retained, groups }) => (retained, groups),
        other => panic!("{other:?}"),
    };
    let read = journal::read(&log).unwrap();
    assert_eq!((read.now, retained(&read).0), (7, 3));
    assert_eq!(retained(&read).1[0].held, 1, "what was handed over");
    for cut in 1..body.len() {
        let read = journal::read(&log[..log.len() - cut]).unwrap();
        assert_eq!((read.now, retained(&read).0), (0, 2), "{cut} bytes are missing");
    }
}
