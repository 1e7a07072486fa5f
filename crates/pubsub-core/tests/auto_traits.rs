//! What may cross threads. A private field can change it without anybody noticing, so it is pinned here: this file either
//! compiles or it does not.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use pubsub_core::machinery::{
    DeadLetterSink, DeliveryQueue, Due, Entry, InFlight, OpenSettlement, RetryQueue, SettleQueue, Timer,
};
use pubsub_core::*;

const fn shared<T: Send + Sync + Unpin + 'static>() {}
const fn owned<T: Send + Unpin + 'static>() {}

const _: () = {
    shared::<Bus>();
    shared::<Topic>();
    shared::<Group>();
    shared::<Event>();
    shared::<Payload>();
    shared::<Error>();
    shared::<PublishError>();
    shared::<Delivery>();
    shared::<Receipt>();
    shared::<Message>();
    shared::<Failure>();
    shared::<Batch>();
    shared::<BatchPolicy>();
    shared::<Cursor>();
    shared::<Page>();
    shared::<Capabilities>();
    shared::<PublishOptions>();
    shared::<SubscribeOptions>();
    shared::<Filter>();
    shared::<RetryPolicy>();
    shared::<StatusWatch>();
    shared::<SubscriptionHandle>();
    shared::<Handler>();
    shared::<LeaseGuard>();
    shared::<DeliveryQueue>();
    shared::<Timer>();
    shared::<Entry>();
    shared::<InFlight<String>>();
    shared::<RetryQueue<String>>();
    shared::<SettleQueue<String>>();
    shared::<OpenSettlement<String>>();
    // One consumer at a time: sent, not shared.
    owned::<Subscription>();
    owned::<Batches>();
    // Object safe, and shared as objects.
    shared::<Arc<dyn PubSub>>();
    shared::<Arc<dyn Control>>();
    shared::<Arc<dyn Settler>>();
    shared::<Arc<dyn LeaseProvider>>();
    shared::<Arc<dyn DeadLetterSink>>();
    shared::<Arc<dyn Due>>();
    owned::<Box<dyn Source>>();
};

const fn assert_send<T: Send>(_: &T) {}

async fn handle(_: Message) -> Result<(), Failure> {
    Ok(())
}

async fn handle_batch(_: Vec<Message>) -> Result<(), Failure> {
    Ok(())
}

/// Never called: that it compiles is the point.
#[allow(dead_code)]
fn futures_can_be_spawned(bus: &'static Bus, mut subscription: Subscription, guard: LeaseGuard, lease: Arc<dyn LeaseProvider>) {
    let second = Duration::from_secs(1);
    let cursor: Cursor = "a.b.1.2".parse().expect("a cursor");
    assert_send(&bus.publish("t", Event::new("x")));
    assert_send(&bus.publish_with("t", &[], PublishOptions::new()));
    assert_send(&bus.publish_data("t", "x", 1));
    assert_send(&bus.subscribe("t"));
    assert_send(&bus.subscribe_group("t", "g"));
    assert_send(&bus.subscribe_with_replay("t"));
    assert_send(&bus.subscribe_from_offset("t", 1));
    assert_send(&bus.subscribe_after("t", cursor));
    assert_send(&bus.subscribe_with("t", SubscribeOptions::fan_out()));
    assert_send(&bus.on("t", SubscribeOptions::fan_out(), 1, handle));
    assert_send(&bus.history("t", Start::Earliest, 1));
    assert_send(&bus.redrive("t", handle));
    assert_send(&bus.redrive_to("t", "u"));
    assert_send(&bus.clear_topic("t"));
    assert_send(&bus.trim_topic("t", TrimFilter::run("r")));
    assert_send(&bus.inspect("t"));
    assert_send(&bus.flush());
    assert_send(&bus.close(second));
    assert_send(&subscription.handle().drained());
    assert_send(&subscription.run(1, handle));
    assert_send(&subscription.run_spawned(1, handle));
    assert_send(&guard.lost());
    assert_send(&guard.release());
    assert_send(&LeaseGuard::acquire(lease, "k", "o", second));
}

/// Never called. `run` keeps the handler in the caller's task: it may borrow, and it may hold what cannot be sent.
#[allow(dead_code)]
async fn handlers_may_borrow(mut subscription: Subscription) -> Result<()> {
    let handled = Rc::new(Cell::new(0));
    let name = String::from("worker");
    subscription
        .run(4, async |message| {
            handled.set(handled.get() + name.len() + message.event().event_type().len());
            Ok(())
        })
        .await?;
    assert_send(&subscription.run_batches(BatchPolicy::new(), handle_batch));
    Ok(())
}
