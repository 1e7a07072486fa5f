//! Dead letters that are larger together than a frame may be.

use std::time::Duration;

use futures::StreamExt;
use pubsub_core::{Bus, Event, Group, Settled, SubscribeOptions, Topic};
use pubsub_unix::UnixSocketPubSub;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);

/// Ten of 8 MiB, where a frame has 64 MiB.
const LETTERS: usize = 10;
const SIZE: usize = 8 << 20;

#[tokio::test]
async fn large_letters_that_are_settled_together_all_arrive() {
    let directory = tempfile::tempdir().unwrap();
    let bus = Bus::from(UnixSocketPubSub::connect(directory.path().join("bus")).await.unwrap());
    let options = SubscribeOptions::group(Group::new("g").unwrap()).dead_letter(Topic::new("letters").unwrap());
    let mut member = bus.subscribe_with("t", options).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..LETTERS {
        bus.publish("t", Event::new("x").with_data("x".repeat(SIZE))).await.unwrap();
        held.push(timeout(PATIENCE, member.next()).await.expect("in time").unwrap().unwrap());
    }
    // All of them are said before the link's task has its turn: the runtime has one thread, and this does not wait.
    let receipts: Vec<_> = held.into_iter().map(|delivery| delivery.dead_letter("told to")).collect();
    for receipt in receipts {
        assert_eq!(timeout(PATIENCE, receipt).await.expect("in time"), Settled::Done);
    }
    assert_eq!(bus.inspect("letters").await.unwrap().retained, Some(LETTERS as u64));
    bus.publish("t", Event::new("afterwards")).await.unwrap();
}
