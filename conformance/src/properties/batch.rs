//! Batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::{StreamExt, poll};
use parking_lot::Mutex;
use pubsub_core::{
    Batch, BatchOverflow, BatchPolicy, Bus, Capability, Delivery, Event, EventId, Failure, KeepSet, Message, Subscription,
    SubscriptionHandle, Topic,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::oracle::{Recorder, at_most_once, delivered, exactly_once, ids, in_order};
use crate::{Ctx, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, panic_on_purpose, property};

pub(crate) fn properties() -> Vec<Property> {
    const ORDERED: Need = Need::Capability(Capability::PublisherOrder);
    const GROUPS: Need = Need::Capability(Capability::Groups);
    vec![
        property("BA-01", "Without a policy, and with batches of one, events come one by one and at once", &["T1"], one_by_one),
        property("BA-02", "A batch by size goes out when it is full and not before, in order", &["T1"], by_size)
            .needs([ORDERED]),
        property("BA-03", "The longest wait counts from a batch's first event, whatever comes later", &["T1"], from_the_first),
        property("BA-04", "The least interval holds every trigger back, but not the first batch", &["T1"], least_interval),
        property("BA-05", "A flush of nothing does not delay the batch that follows", &["T1"], flush_of_nothing),
        property("BA-06", "An immediate event sends out what waits, itself last", &["T1"], immediate).needs([ORDERED]),
        property("BA-07", "Draining hands partial batches over and waits until they are settled", &["C1", "T1"], draining),
        property("BA-08", "Draining also waits for what a failed batch brings back", &["C1", "S3"], draining_retries),
        property("BA-09", "What coalescing drops is settled and never delivered", &["T1", "T2"], dropped_is_settled)
            .needs([ORDERED, GROUPS]),
        property("BA-10", "A coalescing function can drop events and change nothing else", &["T2"], only_drops)
            .needs([ORDERED]),
        property("BA-11", "A full buffer drops what it was told to drop, and nothing immediate", &["T1"], overflows)
            .needs([ORDERED]),
        property("BA-12", "Dropped events count towards no later batch", &["T1"], no_drift).needs([ORDERED]),
        property(
            "BA-13",
            "A batch handler that fails or panics gets its batch again and stops no other",
            &["S1", "T1"],
            failing,
        ),
        property(
            "BA-14",
            "A coalescing function that panics drops nothing, and a flush still goes through",
            &["T1", "T2"],
            panicking,
        ),
        property(
            "BA-15",
            "What waited in a batch goes out last at a stop, and back uncounted when dropped",
            &["S2", "T1"],
            disposed,
        )
        .needs([GROUPS]),
        property(
            "BA-16",
            "Each subscription and each member of a group batches by its own policy",
            &["B2", "T1"],
            own_policies,
        )
        .needs([GROUPS]),
        property(
            "BA-17",
            "The deliveries of a batch are settled one by one like any others",
            &["S3", "S6", "T1"],
            one_at_a_time,
        )
        .needs([GROUPS]),
        property(
            "BA-19",
            "A publish call and settlements beyond any limit of the backend are split unseen",
            &["P3", "S6"],
            split,
        )
        .needs([GROUPS]),
        property("BA-20", "A flush hands partial batches over, and does not wait for them", &["C1", "T1"], flushed),
    ]
}

/// The type of events that nothing here treats in any special way.
const PLAIN: &str = "conformance.event";

/// The type of events that batch policies here take as immediate.
const URGENT: &str = "conformance.urgent";

/// The type of events that coalescing functions here drop.
const STALE: &str = "conformance.stale";

/// A policy with no other trigger than its size.
fn sized(size: usize) -> BatchPolicy {
    BatchPolicy::new().max_size(size).max_wait(None)
}

/// Longer than any property waits.
fn endless(ctx: &Ctx) -> Duration {
    100 * ctx.timing().limit
}

/// Takes [`URGENT`] events as immediate, and counts those it has seen: they are in the buffer before a later flush is noticed.
fn with_urgent(policy: BatchPolicy, seen: &Arc<AtomicUsize>) -> BatchPolicy {
    let seen = seen.clone();
    policy.is_immediate(move |event| {
        let urgent = event.event_type() == URGENT;
        seen.fetch_add(usize::from(urgent), Ordering::Relaxed);
        urgent
    })
}

/// Drops what is [`STALE`].
fn without_stale(policy: BatchPolicy) -> BatchPolicy {
    policy.coalesce(drop_stale)
}

fn drop_stale(events: &[&Event], keep: &mut KeepSet) {
    for (place, _) in events.iter().enumerate().filter(|(_, event)| event.event_type() == STALE) {
        keep.drop_at(place);
    }
}

/// Publishes events of these types in one call.
async fn publish_types(ctx: &Ctx, bus: &Bus, topic: &Topic, types: &[&str]) -> Verdict<Vec<EventId>> {
    let events: Vec<_> = types.iter().map(|wanted| Arc::new(Event::new(wanted).with_run_id("run").with_data(0))).collect();
    ctx.publish_all(bus, topic, &events).await?;
    Ok(ids(&events))
}

/// Reads batches in a task of its own and passes them on unsettled. Dropping it drops the stream of batches.
struct Reader {
    handle: SubscriptionHandle,
    batches: mpsc::UnboundedReceiver<Batch>,
    task: JoinHandle<Option<()>>,
}

impl Reader {
    fn new(ctx: &Ctx, subscription: Subscription, policy: BatchPolicy) -> Verdict<Self> {
        let handle = subscription.handle();
        let mut stream = subscription.batches(policy)?;
        let (pass_on, batches) = mpsc::unbounded_channel();
        let task = ctx.spawn(async move {
            while let Some(batch) = stream.next().await {
                if pass_on.send(batch.expect("a stream of batches fails only with its subscription")).is_err() {
                    return;
                }
            }
        });
        Ok(Self { handle, batches, task })
    }

    /// The next batch, unsettled.
    async fn next(&mut self, ctx: &Ctx) -> Verdict<Batch> {
        let next = ctx.within("a batch", self.batches.recv()).await?;
        next.ok_or_else(|| Mismatch::new("the batches ended where one was due"))
    }

    /// Settles the next batch as done and returns its ids.
    async fn next_done(&mut self, ctx: &Ctx) -> Verdict<Vec<EventId>> {
        let batch = self.next(ctx).await?;
        let ids = delivered(batch.deliveries());
        drop(batch.done());
        Ok(ids)
    }

    /// Waits until so many deliveries are in a partial batch, or in the property's hands.
    async fn holds(&self, ctx: &Ctx, count: u64) -> Verdict {
        ctx.eventually(format!("{count} held"), || self.handle.status().held == count).await
    }

    /// Fails if there is a batch.
    fn nothing(&mut self) -> Verdict {
        match self.batches.try_recv() {
            Ok(batch) => Err(Mismatch::new(format!("a batch too early: {batch:?}"))),
            Err(_) => Ok(()),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn one_by_one(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("single"));
    let mut plain = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let single = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut single = Reader::new(&ctx, single, sized(1))?;
    let sent = ctx.events(3);
    ctx.publish_all(&bus, &topic, &sent).await?;
    let mut seen = Vec::new();
    for _ in &sent {
        let one = single.next_done(&ctx).await?;
        ensure_eq!(one.len(), 1, "size");
        seen.extend(one);
    }
    exactly_once(&ids(&sent), &seen)?;
    exactly(&sent, &ctx.collect(&mut plain, 3).await?)
}

async fn by_size(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("full"));
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, sized(4))?;
    for _ in 0..3 {
        let mut sent = ids(&ctx.publish(&bus, &topic, 3).await?);
        reader.holds(&ctx, 3).await?;
        reader.nothing()?;
        sent.extend(ids(&ctx.publish(&bus, &topic, 1).await?));
        ensure_eq!(reader.next_done(&ctx).await?, sent, "the full batch");
        reader.holds(&ctx, 0).await?;
    }
    // Two batches' worth in one call is two batches.
    let sent = ctx.events(8);
    ctx.publish_all(&bus, &topic, &sent).await?;
    ensure_eq!(reader.next_done(&ctx).await?, ids(&sent[..4]), "the first of two");
    ensure_eq!(reader.next_done(&ctx).await?, ids(&sent[4..]), "the second of two");
    Ok(())
}

async fn from_the_first(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("wait"));
    let wait = 10 * ctx.timing().backoff;
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, BatchPolicy::new().max_size(1000).max_buffer_size(1000).max_wait(wait))?;
    let start = Instant::now();
    let mut sent = ctx.publish(&bus, &topic, 1).await?;
    // Each later event would put the batch off for as long as they come, if the wait began anew with it.
    let first = loop {
        if let Ok(batch) = tokio::time::timeout(wait / 8, reader.batches.recv()).await {
            break batch.ok_or_else(|| Mismatch::new("the batches ended where one was due"))?;
        }
        ensure!(start.elapsed() < ctx.timing().patience, "{} later events put the first batch off", sent.len() - 1);
        sent.extend(ctx.publish(&bus, &topic, 1).await?);
    };
    let took = start.elapsed();
    ensure!(took >= wait, "a batch that may wait {wait:?} went out after {took:?}");
    let mut seen = delivered(first.deliveries());
    ensure!(seen.contains(sent[0].id()), "the first batch lacks the first event: {seen:?}");
    drop(first.done());
    while seen.len() < sent.len() {
        let more = reader.next_done(&ctx).await?;
        ensure!(!more.is_empty(), "a batch of nothing");
        seen.extend(more);
    }
    exactly_once(&ids(&sent), &seen)
}

async fn least_interval(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let short = 10 * ctx.timing().backoff;
    let soon = ctx.timing().backoff / 10;
    let urgent = Arc::new(AtomicUsize::new(0));
    for (trigger, policy, types) in [
        ("size", sized(2), [PLAIN; 2]),
        ("wait", BatchPolicy::new().max_wait(soon), [PLAIN; 2]),
        ("an immediate event", with_urgent(sized(100), &urgent), [PLAIN, URGENT]),
    ] {
        let at = |why: Mismatch| why.at(trigger);
        // The first batch waits for no interval, however long.
        let topic = ctx.topic("endless");
        let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
        let mut reader = Reader::new(&ctx, subscription, policy.clone().min_interval(endless(&ctx)))?;
        publish_types(&ctx, &bus, &topic, &types).await?;
        let first = reader.next_done(&ctx).await.map_err(at)?;
        // The second does.
        publish_types(&ctx, &bus, &topic, &types).await?;
        reader.holds(&ctx, 4 - first.len() as u64).await.map_err(at)?;
        tokio::time::sleep(2 * soon).await; // so that the trigger has had its time
        reader.nothing().map_err(at)?;

        let topic = ctx.topic("short");
        let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
        let mut reader = Reader::new(&ctx, subscription, policy.min_interval(short))?;
        let start = Instant::now();
        publish_types(&ctx, &bus, &topic, &types).await?;
        let first = reader.next_done(&ctx).await.map_err(at)?;
        publish_types(&ctx, &bus, &topic, &types).await?;
        let second = reader.next_done(&ctx).await.map_err(at)?;
        let between = start.elapsed();
        ensure!(between >= short, "{trigger}: {first:?} and {second:?} within {between:?}, less than {short:?} apart");
    }
    Ok(())
}

async fn flush_of_nothing(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("flush"));
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, sized(1).min_interval(endless(&ctx)))?;
    for _ in 0..3 {
        ctx.within("flush", bus.flush()).await??;
        tokio::task::yield_now().await;
    }
    reader.nothing()?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    ensure_eq!(reader.next_done(&ctx).await?, ids(&sent), "the first batch");
    Ok(())
}

async fn immediate(ctx: Ctx) -> Verdict {
    let (bus, topic, seen) = (ctx.bus().await?, ctx.topic("urgent"), Arc::default());
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, with_urgent(sized(100), &seen))?;
    for types in [&[PLAIN, PLAIN, PLAIN, URGENT][..], &[URGENT], &[PLAIN, URGENT]] {
        let sent = publish_types(&ctx, &bus, &topic, types).await?;
        ensure_eq!(reader.next_done(&ctx).await?, sent, "the batch of an immediate event");
    }
    // What comes behind an immediate event waits for its own batch.
    let sent = publish_types(&ctx, &bus, &topic, &[PLAIN, URGENT, PLAIN]).await?;
    ensure_eq!(reader.next_done(&ctx).await?, sent[..2], "up to the immediate event");
    reader.holds(&ctx, 1).await?;
    reader.nothing()
}

async fn draining(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("drain"));
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, sized(100))?;
    let sent = ctx.publish(&bus, &topic, 3).await?;
    reader.holds(&ctx, 3).await?;
    let handle = reader.handle.clone();
    let mut drained = Box::pin(handle.drained());
    ensure!(poll!(drained.as_mut()).is_pending(), "drained with three deliveries in a partial batch");
    let mut batch = reader.next(&ctx).await?.into_deliveries();
    exactly(&sent, &batch)?;
    drop(batch.pop().map(Delivery::done));
    ensure!(poll!(drained.as_mut()).is_pending(), "drained with two deliveries in hand");
    batch.into_iter().for_each(|delivery| drop(delivery.done()));
    ctx.within("drained", drained).await
}

async fn draining_retries(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("again"));
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let (handle, recorder) = (subscription.handle(), Recorder::new());
    let seen = recorder.clone();
    let running = ctx.spawn(async move {
        let handler = |messages: Vec<Message>| {
            messages.iter().for_each(|message| seen.event("batches", message.event(), message.attempt()));
            let first = messages.iter().any(|message| message.attempt() == 1);
            std::future::ready(if first { Err(Failure::retry("the first time")) } else { Ok(()) })
        };
        subscription.run_batches(sized(100), handler).await
    });
    let sent = ctx.publish(&bus, &topic, 3).await?;
    ctx.eventually("three held", || handle.status().held == 3).await?;
    ctx.within("drained", handle.drained()).await?;
    let twice: Vec<_> = ids(&sent).iter().flat_map(|id| [format!("{id} at 1"), format!("{id} at 2")]).collect();
    let seen: Vec<_> = recorder.attempts().iter().map(|(id, attempt)| format!("{id} at {attempt}")).collect();
    exactly_once(&twice, &seen)?;
    handle.stop();
    ctx.join("the batches", running).await??;
    Ok(())
}

async fn dropped_is_settled(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("latest"), ctx.group("g"));
    let member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let looked_at = Arc::new(Mutex::new(Vec::new()));
    let looking = looked_at.clone();
    let policy = sized(5).coalesce(move |events, keep| {
        looking.lock().extend(events.iter().map(|event| event.id().clone()));
        drop_stale(events, keep);
    });
    let mut reader = Reader::new(&ctx, member, policy)?;
    let mut all = Vec::new();
    for _ in 0..2 {
        let sent = publish_types(&ctx, &bus, &topic, &[STALE, STALE, PLAIN, STALE, PLAIN]).await?;
        let batch = reader.next(&ctx).await?;
        ensure_eq!(delivered(batch.deliveries()), [sent[2].clone(), sent[4].clone()], "what coalescing kept");
        ensure!(batch.deliveries().iter().all(|delivery| delivery.attempt() == 1), "something came back: {batch:?}");
        reader.holds(&ctx, 2).await?;
        drop(batch.done());
        ctx.within("drained", reader.handle.drained()).await?;
        all.extend(sent);
    }
    reader.nothing()?;
    // What was dropped unsettled would have come again, to be dropped again.
    exactly_once(&all, &looked_at.lock())
}

async fn only_drops(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("subset"));
    let kept = Arc::new(Mutex::new(Vec::new()));
    let (rng, keeping) = (Mutex::new(ctx.rng()), kept.clone());
    let policy = sized(8).coalesce(move |events, keep| {
        let mut rng = rng.lock();
        let stays = rng.usize(..events.len()); // a batch of nothing would not go out
        for place in (0..events.len()).filter(|place| *place != stays && rng.bool()) {
            keep.drop_at(place);
        }
        *keeping.lock() =
            (0..events.len()).filter(|place| keep.keeps(*place)).map(|place| events[place].id().clone()).collect();
    });
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, policy)?;
    for _ in 0..10 {
        let sent = ctx.events(8);
        ctx.publish_all(&bus, &topic, &sent).await?;
        let batch = reader.next_done(&ctx).await?;
        ensure_eq!(batch, *kept.lock(), "what was kept");
        in_order(&ids(&sent), &batch)?;
        at_most_once(&ids(&sent), &batch)?;
    }
    ctx.within("drained", reader.handle.drained()).await
}

async fn overflows(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for (overflow, kept) in [
        (BatchOverflow::DropOldest, [1, 2, 3, 4, 5]),
        (BatchOverflow::DropNewest, [0, 1, 2, 4, 5]),
        (BatchOverflow::CoalesceThenDropOldest, [0, 2, 3, 4, 5]),
    ] {
        let (topic, seen) = (ctx.topic("overflow"), Arc::default());
        let policy = sized(2).max_buffer_size(3).min_interval(endless(&ctx)).overflow(overflow);
        let policy = with_urgent(policy, &seen);
        let policy = if overflow == BatchOverflow::CoalesceThenDropOldest { without_stale(policy) } else { policy };
        let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
        let mut reader = Reader::new(&ctx, subscription, policy)?;
        let first = publish_types(&ctx, &bus, &topic, &[PLAIN; 2]).await?;
        ensure_eq!(reader.next_done(&ctx).await?, first, "the first batch");
        // Now the interval holds everything back, and three events that are not immediate fill the buffer.
        let sent = publish_types(&ctx, &bus, &topic, &[PLAIN, STALE, PLAIN, PLAIN, URGENT, URGENT]).await?;
        ctx.eventually("all came", || seen.load(Ordering::Relaxed) == 2).await?;
        ctx.within("flush", bus.flush()).await??;
        let wanted: Vec<_> = kept.iter().map(|place: &usize| sent[*place].clone()).collect();
        ensure_eq!(reader.next_done(&ctx).await?, wanted, "{overflow:?} left");
        // Settled, what was dropped included: nothing is held, and nothing comes back.
        ctx.within("drained", reader.handle.drained()).await?;
        reader.nothing()?;
    }
    Ok(())
}

async fn no_drift(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let topic = ctx.topic("coalesced");
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, without_stale(sized(4)))?;
    for _ in 0..5 {
        let sent = publish_types(&ctx, &bus, &topic, &[PLAIN, STALE, STALE, PLAIN]).await?;
        ensure_eq!(reader.next_done(&ctx).await?, [sent[0].clone(), sent[3].clone()], "of every four events");
    }

    let (topic, seen) = (ctx.topic("overflowed"), Arc::new(AtomicUsize::new(0)));
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let policy = with_urgent(sized(2).max_buffer_size(3).min_interval(endless(&ctx)), &seen);
    let mut reader = Reader::new(&ctx, subscription, policy)?;
    let first = publish_types(&ctx, &bus, &topic, &[PLAIN; 2]).await?;
    ensure_eq!(reader.next_done(&ctx).await?, first, "the first batch");
    for (round, plain) in [5, 3, 6, 3, 4, 3].into_iter().enumerate() {
        let types: Vec<_> = std::iter::repeat_n(PLAIN, plain).chain([URGENT]).collect();
        let sent = publish_types(&ctx, &bus, &topic, &types).await?;
        ctx.eventually("all came", || seen.load(Ordering::Relaxed) == round + 1).await?;
        ctx.within("flush", bus.flush()).await??;
        ensure_eq!(reader.next_done(&ctx).await?, sent[plain - 3..], "the last three of {plain} and the immediate one");
    }
    Ok(())
}

async fn failing(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("failing"));
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let (handle, recorder) = (subscription.handle(), Recorder::new());
    let (done, sent) = (recorder.clone(), ctx.events(6));
    let (fails, panics) = (sent[0].id().clone(), sent[3].id().clone());
    let running = ctx.spawn(async move {
        let handler = |messages: Vec<Message>| {
            let first = |id: &EventId| messages.iter().any(|message| message.event().id() == id && message.attempt() == 1);
            let (fails, panics) = (first(&fails), first(&panics));
            let done = done.clone();
            async move {
                if panics {
                    panic_on_purpose("a batch handler that panics once");
                }
                if fails {
                    return Err(Failure::retry("as it should"));
                }
                messages.iter().for_each(|message| done.event("done", message.event(), message.attempt()));
                Ok(())
            }
        };
        let policy = sized(2).max_wait(Duration::from_millis(1));
        subscription.run_batches(policy, handler).await
    });
    ctx.publish_all(&bus, &topic, &sent).await?;
    ctx.eventually("all six were handled", || recorder.distinct() == 6).await?;
    ctx.within("drained", handle.drained()).await?;
    exactly_once(&ids(&sent), &recorder.ids())?;
    for bad in [&sent[0], &sent[3]] {
        ensure!(recorder.attempts().contains(&(bad.id().clone(), 2)), "{} was not handled at its second attempt", bad.id());
    }
    handle.stop();
    ctx.join("the batches", running).await??;
    Ok(())
}

async fn panicking(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("panicking"));
    let policy = sized(100).coalesce(|_, keep| {
        keep.drop_at(0);
        panic_on_purpose("a coalescing function that panics");
    });
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, policy)?;
    for _ in 0..2 {
        let sent = ctx.publish(&bus, &topic, 3).await?;
        reader.holds(&ctx, 3).await?;
        ctx.within("flush", bus.flush()).await??;
        exactly_once(&ids(&sent), &reader.next_done(&ctx).await?)?;
        reader.holds(&ctx, 0).await?;
    }
    Ok(())
}

async fn disposed(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("stopped"), ctx.group("g"));
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, sized(100))?;
    let sent = ctx.publish(&bus, &topic, 2).await?;
    reader.holds(&ctx, 2).await?;
    reader.handle.stop();
    ctx.publish(&bus, &topic, 1).await?;
    exactly_once(&ids(&sent), &reader.next_done(&ctx).await?)?;
    ensure!(ctx.within("the end", reader.batches.recv()).await?.is_none(), "a batch behind the last one");

    // Never handed over, it goes back to the group as if this member had not had it.
    let topic = ctx.topic("dropped");
    let leaving = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let leaving = Reader::new(&ctx, leaving, sized(100))?;
    let sent = ctx.publish(&bus, &topic, 3).await?;
    leaving.holds(&ctx, 3).await?;
    let mut staying = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    drop(leaving);
    let back = ctx.collect(&mut staying, 3).await?;
    exactly(&sent, &back)?;
    for delivery in back {
        ensure_eq!(delivery.attempt(), 1, "attempt of {}", delivery.event().id());
        drop(delivery.done());
    }
    Ok(())
}

async fn own_policies(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("policies"), ctx.group("g"));
    let mut by_two = Reader::new(&ctx, ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, sized(2))?;
    let mut by_three = Reader::new(&ctx, ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, sized(3))?;
    let recorder = Recorder::new();
    let plain = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let plain = ctx.consume(plain, &recorder, "plain");
    let batching = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let (seen, handle) = (recorder.clone(), batching.handle());
    let policy = BatchPolicy::new().max_size(2).max_wait(ctx.timing().backoff);
    let mut batches = batching.batches(policy)?;
    let _batching = ctx.spawn(async move {
        while let Some(batch) = batches.next().await {
            let batch = batch.expect("a stream of batches fails only with its subscription");
            assert!(batch.len() <= 2, "a batch of at most two: {batch:?}");
            batch.deliveries().iter().for_each(|delivery| seen.received("batching", delivery));
            drop(batch.done());
        }
    });
    let sent = ids(&ctx.publish(&bus, &topic, 12).await?);
    for (reader, size) in [(&mut by_two, 2), (&mut by_three, 3)] {
        let mut all = Vec::new();
        while all.len() < sent.len() {
            let batch = reader.next_done(&ctx).await?;
            ensure_eq!(batch.len(), size, "size of a batch");
            all.extend(batch);
        }
        exactly_once(&sent, &all)?;
    }
    ctx.eventually("the group has all", || recorder.distinct() == sent.len()).await?;
    ctx.drained(&[&plain]).await?;
    handle.stop();
    exactly_once(&sent, &recorder.ids())
}

async fn one_at_a_time(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("each"), ctx.group("g"));
    let member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let mut reader = Reader::new(&ctx, member, sized(3))?;
    let sent = ctx.publish(&bus, &topic, 3).await?;
    let deliveries = reader.next(&ctx).await?.into_deliveries();
    exactly(&sent, &deliveries)?;
    let mut receipts = Vec::new();
    for delivery in deliveries {
        let second = delivery.event().id() == sent[1].id();
        receipts.push(if second { delivery.retry() } else { delivery.done() });
    }
    for receipt in receipts {
        ctx.confirmed(receipt).await?;
    }
    let more = ctx.publish(&bus, &topic, 2).await?;
    let batch = reader.next(&ctx).await?;
    exactly(&[sent[1].clone(), more[0].clone(), more[1].clone()], batch.deliveries())?;
    for delivery in batch.into_deliveries() {
        let wanted = if delivery.event().id() == sent[1].id() { 2 } else { 1 };
        ensure_eq!(delivery.attempt(), wanted, "attempt of {}", delivery.event().id());
        drop(delivery.done());
    }
    ctx.within("drained", reader.handle.drained()).await
}

async fn split(ctx: Ctx) -> Verdict {
    const MANY: usize = 2500; // more than any backend takes in one request
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("many"), ctx.group("g"));
    let options = ctx.member(&group).max_in_flight(MANY);
    let mut member = ctx.subscribe(&bus, &topic, options).await?;
    let handle = member.handle();
    let sent = ctx.events(MANY);
    let (publisher, events) = ((ctx.clone(), bus.clone(), topic.clone()), sent.clone());
    let publishing = ctx.spawn(async move {
        let (ctx, bus, topic) = publisher;
        ctx.publish_all(&bus, &topic, &events).await
    });
    let deliveries = ctx.collect(&mut member, MANY).await?;
    ctx.join("the publish call", publishing).await??;
    exactly(&sent, &deliveries)?;
    let receipts: Vec<_> = deliveries.into_iter().map(Delivery::done).collect();
    for settled in ctx.within("all receipts", futures::future::join_all(receipts)).await? {
        ensure!(ctx.is_done(settled), "settled: {settled:?}");
    }
    ctx.within("drained", handle.drained()).await
}

async fn flushed(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("flushed"));
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut reader = Reader::new(&ctx, subscription, sized(100).min_interval(endless(&ctx)))?;
    let mut in_hand = Vec::new();
    // The least interval does not hold a flush back, nor do batches in the consumer's hands.
    for round in 1..=3 {
        let sent = ctx.publish(&bus, &topic, 2).await?;
        reader.holds(&ctx, 2 * round).await?;
        reader.nothing()?;
        ctx.within("flush", bus.flush()).await??;
        let batch = reader.next(&ctx).await?;
        exactly(&sent, batch.deliveries())?;
        in_hand.push(batch);
    }
    in_hand.into_iter().for_each(|batch| drop(batch.done()));
    Ok(())
}
