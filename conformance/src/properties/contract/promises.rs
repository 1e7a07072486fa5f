//! Promises of the contract that other suites do not know.

use std::sync::Arc;
use std::time::Duration;

use pubsub_core::{
    AckMode, Bus, Capability, Delivery, ErrorKind, Event, Failure, Fate, Handler, Message, Metadata, Origin, Overflow, Payload,
    PublishOptions, SubscribeOptions, Subscription, Topic,
};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::oracle::{Recorder, counted_attempts, delivered, exactly_once, ids};
use crate::properties::settle::{Overdue, overdue, short_hold};
use crate::{Ctx, Fault, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, property};

const GROUPS: Need = Need::Capability(Capability::Groups);

pub(super) fn properties() -> Vec<Property> {
    vec![
        property(
            "AD-01",
            "A release is at once and uncounted: ten rolling restarts of all members give up nothing",
            &["S2", "C2"],
            released,
        )
        .needs([GROUPS, Need::CrossInstance]),
        property(
            "AD-02",
            "A publish at a full queue fails with `Full` after its time, is not sent, and harms nobody else",
            &["B5", "B2"],
            full,
        )
        .needs([GROUPS, Need::PublishWaits, Need::NoRetention]),
        property(
            "AD-03",
            "Two groups that give up one event make two dead letters, each with its own id and origin",
            &["S4"],
            two_letters,
        )
        .needs([GROUPS]),
        property(
            "AD-04",
            "A failed publish tells each event's fate, and repeating it stores each event once",
            &["P1", "P5"],
            repeated,
        )
        .needs([Need::Fault(Fault::FailWrites(1)), Capability::Deduplication.into()]),
        property("AD-05", "A payload that does not survive JSON is refused, and its whole call with it", &["P7"], strict)
            .needs([Need::StrictPayloads]),
        property(
            "AD-07",
            "At `max_hold` another member may run, the first is told, and its late settlement is refused",
            &["S5", "S6"],
            told,
        )
        .needs([GROUPS]),
        property("AD-11", "Metadata arrives unchanged, on a retry and in a dead letter too", &["S3", "S4"], metadata),
        property(
            "AD-13",
            "A publish cut off by a full queue tells which events were taken, and the rest can be published again",
            &["B5", "C4"],
            cut_off,
        )
        .needs([Need::PublishWaits, Need::NoRetention]),
        property(
            "AD-22",
            "Where that was asked for, a full queue loses its oldest and tells how many they were",
            &["B5"],
            loses_oldest,
        )
        .needs([Need::NoRetention]),
        property("AD-14", "Metadata arrives unchanged through a redrive", &["S4"], metadata_redriven)
            .needs([Capability::DeadLetterHistory.into()]),
    ]
}

async fn released(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("released"));
    // A back-off would keep it away for longer than anybody waits.
    let never = 2 * ctx.timing().patience;
    let options = ctx.member(&ctx.group("g")).retry(ctx.retry().max_attempts(1).backoff(never, never));
    let mut member = ctx.subscribe(&bus, &topic, options).await?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    for _ in 0..20 {
        let delivery = ctx.next(&mut member).await?;
        exactly(&sent, [&delivery])?;
        ensure_eq!(delivery.attempt(), 1, "attempt after releases");
        ctx.confirmed(delivery.release()).await?;
    }
    drop(ctx.next(&mut member).await?.done());
    ctx.nothing_more(&bus, &topic, [&mut member]).await?;
    rolling_restarts(&ctx).await
}

/// A worker on an instance of its own, which gives back what it has in hands when it is told to shut down.
struct Worker {
    bus: Bus,
    shutdown: watch::Sender<bool>,
    handler: Handler,
}

impl Worker {
    async fn start(ctx: &Ctx, topic: &Topic, options: &SubscribeOptions, seen: &Recorder, done: &Recorder) -> Verdict<Self> {
        let (bus, shutdown) = (ctx.connect().await?, watch::Sender::new(false));
        let (seen, done, watched, work) = (seen.clone(), done.clone(), shutdown.clone(), ctx.timing().backoff / 4);
        let handler = move |message: Message| {
            seen.event("worker", message.event(), message.attempt());
            let (done, mut told) = (done.clone(), watched.subscribe());
            async move {
                if tokio::time::timeout(work, told.wait_for(|told| *told)).await.is_ok() {
                    return Err(Failure::release());
                }
                done.event("worker", message.event(), message.attempt());
                Ok(())
            }
        };
        let handler = ctx.within("subscribe", bus.on(topic, options.clone(), 4, handler)).await??;
        Ok(Self { bus, shutdown, handler })
    }

    async fn stop(self, ctx: &Ctx) -> Verdict {
        self.shutdown.send_replace(true);
        self.handler.handle().stop();
        let report = ctx.within("a worker's end", self.handler.ended()).await??;
        ensure_eq!(report.retried, 0, "retried by a worker that was restarted");
        ctx.all_confirmed(&report)?;
        let closed = ctx.within("close", self.bus.close(ctx.timing().patience)).await??;
        ensure_eq!(closed.cut_off, 0, "deliveries cut off at close");
        Ok(())
    }
}

async fn rolling_restarts(ctx: &Ctx) -> Verdict {
    let (bus, topic, dead) = (ctx.bus().await?, ctx.topic("rolling"), ctx.topic("dead"));
    let mut letters = ctx.subscribe(&bus, &dead, ctx.fan_out()).await?;
    let options = ctx.member(&ctx.group("g")).retry(ctx.retry().max_attempts(2)).dead_letter(dead.clone());
    let (seen, done, mut sent) = (Recorder::new(), Recorder::new(), Vec::new());
    let mut workers = Vec::new();
    for _ in 0..3 {
        workers.push(Worker::start(ctx, &topic, &options, &seen, &done).await?);
    }
    for _ in 0..10 {
        for worker in &mut workers {
            sent.extend(ctx.publish(&bus, &topic, 8).await?);
            let successor = Worker::start(ctx, &topic, &options, &seen, &done).await?;
            std::mem::replace(worker, successor).stop(ctx).await?;
        }
    }
    ctx.eventually("everything is handled", || done.distinct() == sent.len()).await?;
    for worker in &workers {
        ctx.within("drained", worker.handler.handle().drained()).await?;
    }
    exactly_once(&ids(&sent), &done.ids())?;
    let counted: Vec<_> = seen.attempts().into_iter().filter(|(_, attempt)| *attempt != 1).collect();
    ensure!(counted.is_empty(), "counted although only released: {counted:?}");
    ctx.nothing_more(&bus, &dead, [&mut letters]).await
}

/// How long a publish at a full queue waits here.
fn hasty(ctx: &Ctx) -> PublishOptions {
    PublishOptions::new().timeout(ctx.timing().hold)
}

async fn full(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for options in [ctx.fan_out(), ctx.member(&ctx.group("g"))] {
        let topic = ctx.topic("full");
        let mut stuck = ctx.subscribe(&bus, &topic, options.prefetch(8)).await?;
        let mut other = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
        let mut taken = Vec::new();
        loop {
            let (event, before) = (ctx.event(), Instant::now());
            let published = ctx.within("publish", bus.publish_with(&topic, std::slice::from_ref(&event), hasty(&ctx))).await?;
            let Err(refused) = published else {
                taken.push(event);
                ensure!(taken.len() <= 8, "{} events taken into a queue of 8", taken.len());
                continue;
            };
            ensure_eq!(refused.kind(), &ErrorKind::Full, "kind");
            ensure_eq!(refused.fates(), [Fate::NotSent], "fate");
            ensure!(before.elapsed() >= ctx.timing().hold, "refused after {:?}", before.elapsed());
            break;
        }
        // Other topics take no notice, and nobody misses what was taken or gets what was not.
        let beside = ctx.topic("beside");
        let mut elsewhere = ctx.subscribe(&bus, &beside, ctx.fan_out()).await?;
        exactly(&ctx.publish(&bus, &beside, 20).await?, &ctx.collect(&mut elsewhere, 20).await?)?;
        for subscription in [&mut other, &mut stuck] {
            exactly_once(&ids(&taken), &ctx.collect_done(subscription, taken.len()).await?)?;
        }
        ctx.nothing_more(&bus, &topic, [&mut stuck, &mut other]).await?;
    }
    Ok(())
}

async fn cut_off(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("cut"));
    let mut stuck = ctx.subscribe(&bus, &topic, ctx.fan_out().prefetch(8)).await?;
    let events = ctx.events(20);
    let Err(failed) = ctx.within("publish", bus.publish_with(&topic, &events, hasty(&ctx))).await? else {
        return Err(Mismatch::new("20 events were taken into a queue of 8"));
    };
    ensure_eq!(failed.kind(), &ErrorKind::Full, "kind");
    let taken = failed.fates().iter().take_while(|fate| **fate == Fate::Published).count();
    let expected: Vec<_> = (0..20).map(|place| if place < taken { Fate::Published } else { Fate::NotSent }).collect();
    ensure_eq!(failed.fates(), expected, "fates, of which some are published, and then none");
    ensure!((1..=8).contains(&taken), "{taken} events taken into a queue of 8");
    exactly_once(&ids(&events[..taken]), &ctx.collect_done(&mut stuck, taken).await?)?;
    let again: Vec<_> = failed.unpublished().map(|place| events[place].clone()).collect();
    let publisher = (ctx.clone(), bus.clone(), topic.clone());
    let publishing = ctx.spawn(async move {
        let (ctx, bus, topic) = publisher;
        ctx.publish_all(&bus, &topic, &again).await
    });
    exactly_once(&ids(&events[taken..]), &ctx.collect_done(&mut stuck, events.len() - taken).await?)?;
    ctx.join("publishing the rest", publishing).await??;
    ctx.nothing_more(&bus, &topic, [&mut stuck]).await
}

async fn two_letters(ctx: Ctx) -> Verdict {
    let (bus, topic, dead) = (ctx.bus().await?, ctx.topic("shared"), ctx.topic("dead"));
    let mut letters = ctx.subscribe(&bus, &dead, ctx.fan_out()).await?;
    let join = async |group, attempts| {
        let options = ctx.member(&group).retry(ctx.retry().max_attempts(attempts)).dead_letter(dead.clone());
        Ok::<_, Mismatch>((ctx.subscribe(&bus, &topic, options).await?, group, attempts))
    };
    let mut members = [join(ctx.group("a"), 1).await?, join(ctx.group("b"), 3).await?];
    let event = ctx.publish(&bus, &topic, 1).await?.remove(0);
    let (mut expected, mut found, mut letter_ids) = (Vec::new(), Vec::new(), Vec::new());
    for (member, group, attempts) in &mut members {
        for _ in 0..*attempts {
            drop(ctx.next(member).await?.settle(pubsub_core::Settlement::Retry { after: None, reason: Some("why".into()) }));
        }
        expected.push(format!("{} {topic} {group} {attempts} why", event.id()));
    }
    // Read on: whoever is about to hand over again judges that no attempt is left.
    let subscriptions = members.each_mut().map(|(member, ..)| member);
    ctx.nothing_more(&bus, &topic, subscriptions).await?;
    for letter in ctx.collect(&mut letters, 2).await? {
        let letter = letter.event();
        let Some(Origin { event: id, topic, group: Some(group), attempts, reason, .. }) = Origin::of(letter) else {
            return Err(Mismatch::new(format!("a dead letter without its origin: {:?}", letter.metadata())));
        };
        found.push(format!("{id} {topic} {group} {attempts} {reason}"));
        letter_ids.push(letter.id().clone());
        ensure_eq!((letter.event_type(), letter.run_id()), (event.event_type(), event.run_id()), "type and run");
        ensure_eq!(*letter.data::<u64>()?, *event.data::<u64>()?, "data");
    }
    exactly_once(&expected, &found)?;
    ensure!(letter_ids[0] != letter_ids[1] && !letter_ids.contains(event.id()), "the ids of {event:?} and its letters agree");
    ctx.nothing_more(&bus, &dead, [&mut letters]).await
}

async fn repeated(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("repeated"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let (events, mut found) = (ctx.events(10), Vec::new());
    if let Some(faults) = ctx.harness().faults() {
        ctx.within("a fault", faults.inject(Fault::FailWrites(1))).await??;
    }
    let again = match ctx.within("publish", bus.publish_with(&topic, &events, PublishOptions::new())).await? {
        // The backend has tried again by itself.
        Ok(_) => events.clone(),
        Err(failed) => {
            ensure_eq!(failed.fates().len(), events.len(), "fates, one for each event");
            let fence = ctx.fence(&bus, &topic).await?;
            found.extend(ctx.until(&mut subscription, &fence).await?);
            let arrived = delivered(&found);
            for (event, fate) in events.iter().zip(failed.fates()) {
                let wrong = if arrived.contains(event.id()) { Fate::NotSent } else { Fate::Published };
                ensure!(*fate != wrong, "{} is said to be {fate:?}; arrived are {arrived:?}", event.id());
            }
            failed.unpublished().map(|place| events[place].clone()).collect()
        }
    };
    ctx.publish_all(&bus, &topic, &again).await?;
    ctx.publish_all(&bus, &topic, &events).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    found.extend(ctx.until(&mut subscription, &fence).await?);
    exactly(&events, &found)
}

async fn loses_oldest(ctx: Ctx) -> Verdict {
    const BOUND: usize = 8;
    let bus = ctx.bus().await?;
    let mut kinds = vec![ctx.fan_out()];
    if ctx.capabilities().supports(Capability::Groups) {
        kinds.push(ctx.member(&ctx.group("g")));
    }
    for options in kinds {
        let topic = ctx.topic("lossy");
        let options = options.prefetch(BOUND).overflow(Overflow::DropOldest);
        let mut slow = ctx.subscribe(&bus, &topic, options).await?;
        let sent = ctx.publish(&bus, &topic, 3 * BOUND).await?;
        let fence = ctx.fence(&bus, &topic).await?;
        let found = ctx.until(&mut slow, &fence).await?;
        let lost = sent.len() - found.len().min(sent.len());
        ensure!((1..=BOUND).contains(&found.len()), "{} of {} kept in a queue of {BOUND}", found.len(), sent.len());
        exactly(&sent[lost..], &found)?;
        let told: Vec<_> = found.iter().map(Delivery::lagged).collect();
        ensure_eq!(told[0], lost as u64, "lost before the first that is left");
        ensure_eq!(told.iter().sum::<u64>(), lost as u64, "lost in all, as told by {told:?}");
        ensure_eq!(slow.status().lagged, lost as u64, "lost in all, as the status says");
        found.into_iter().for_each(|delivery| drop(delivery.done()));
    }
    Ok(())
}

async fn strict(ctx: Ctx) -> Verdict {
    /// A value that reads back as another.
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Forgetful {
        #[serde(skip_deserializing)]
        lost: u32,
    }
    let (bus, topic) = (ctx.bus().await?, ctx.topic("strict"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let by_number = std::collections::HashMap::from([(vec![1_u8], 2_u8)]);
    for (what, payload) in [
        ("not a number", Payload::typed(f64::NAN)),
        ("a field that is not read", Payload::typed(Forgetful { lost: 7 })),
        ("keys that are no text", Payload::typed(by_number)),
        ("a live value", Payload::live(Arc::new(7))),
    ] {
        let events = [ctx.event(), Arc::new(Event::new("strict").with_payload(payload)), ctx.event()];
        let Err(refused) = ctx.within("publish", bus.publish_with(&topic, &events, PublishOptions::new())).await? else {
            return Err(Mismatch::new(format!("{what} was taken")));
        };
        ensure!(matches!(refused.kind(), ErrorKind::NotSerializable(_)), "{what} was refused with {refused}");
        ensure_eq!(refused.fates(), [Fate::NotSent; 3], "fates");
    }
    ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    exactly(&sent, &[ctx.next(&mut subscription).await?])
}

/// Tells when it is dropped.
struct Told(watch::Sender<bool>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

async fn told(ctx: Ctx) -> Verdict {
    let options = ctx.member(&ctx.group("g"));
    // Read as a stream: the holder can wait for it.
    let Overdue { bus, topic, lost, mut finder, found } = overdue(&ctx, options.clone(), 2).await?;
    for delivery in &lost {
        ctx.within("the loss of a delivery to be told", delivery.revoked()).await?;
    }
    for delivery in lost {
        ctx.refused(delivery.retry()).await?;
    }
    for delivery in found {
        ensure_eq!(delivery.attempt(), 2, "attempt");
        ctx.confirmed(delivery.done()).await?;
    }
    ctx.nothing_more(&bus, &topic, [&mut finder]).await?;

    // Run by a handler: it is cancelled.
    let (topic, recorder, cancelled) = (ctx.topic("cancelled"), Recorder::new(), watch::Sender::new(false));
    let (journal, tells) = (recorder.clone(), cancelled.clone());
    let handler = move |message: Message| {
        journal.event("first", message.event(), message.attempt());
        let told = Told(tells.clone());
        async move {
            let _told = told;
            std::future::pending().await
        }
    };
    let held = options.clone().max_hold(short_hold(&ctx));
    let handler = ctx.within("subscribe", bus.on(&topic, held, 1, handler)).await??;
    ctx.publish(&bus, &topic, 1).await?;
    ctx.eventually("the handler runs", || recorder.count() == 1).await?;
    let mut second = ctx.subscribe(&bus, &topic, options).await?;
    handler.handle().stop();
    let found = ctx.next(&mut second).await?;
    recorder.received("second", &found);
    ctx.within("the handler to be cancelled", cancelled.subscribe().wait_for(|cancelled| *cancelled)).await??;
    let report = ctx.within("the handler's end", handler.ended()).await??;
    ensure_eq!((report.revoked, report.done, report.retried), (1, 0, 0), "revoked, done and retried");
    ctx.confirmed(found.done()).await?;
    counted_attempts(&recorder.attempts())?;
    ctx.nothing_more(&bus, &topic, [&mut second]).await
}

fn with_metadata() -> Event {
    let long = "x".repeat(500);
    [("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("tracestate", "a=1,b=2"), ("empty", "")]
        .into_iter()
        .chain([("Schlüssel \u{1f511}", "\"quoted\"\n\t\\ and 日本"), ("long", &long)])
        .fold(Event::new("traced").with_data(1_u8), |event, (key, value)| event.with_metadata(key, value))
}

/// Publishes an event with metadata, retries it, and gives it up to the dead-letter topic.
async fn give_up(ctx: &Ctx, bus: &Bus, sent: &Event, dead: &Topic) -> Verdict {
    let topic = ctx.topic("traced");
    let options = ctx.fan_out().ack_mode(AckMode::Manual).dead_letter(dead.clone());
    let mut subscription: Subscription = ctx.subscribe(bus, &topic, options).await?;
    ctx.publish_all(bus, &topic, &[Arc::new(sent.clone())]).await?;
    let first = ctx.next(&mut subscription).await?;
    ensure_eq!(first.event().metadata(), sent.metadata(), "metadata at first");
    drop(first.retry_after(Duration::ZERO));
    let second = ctx.next(&mut subscription).await?;
    ensure_eq!(second.event().metadata(), sent.metadata(), "metadata of a retry");
    ctx.confirmed(second.dead_letter("no use")).await
}

/// The metadata but for what starts with this.
fn without(metadata: &Metadata, prefix: &str) -> Metadata {
    metadata.iter().filter(|(key, _)| !key.starts_with(prefix)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

async fn metadata(ctx: Ctx) -> Verdict {
    let (bus, dead, sent) = (ctx.bus().await?, ctx.topic("dead"), with_metadata());
    let mut letters = ctx.subscribe(&bus, &dead, ctx.fan_out()).await?;
    give_up(&ctx, &bus, &sent, &dead).await?;
    let letter = ctx.next(&mut letters).await?;
    ensure_eq!(without(letter.event().metadata(), "dead-letter."), *sent.metadata(), "metadata of the dead letter");
    ctx.nothing_more(&bus, &dead, [&mut letters]).await
}

async fn metadata_redriven(ctx: Ctx) -> Verdict {
    let (bus, dead, target, sent) = (ctx.bus().await?, ctx.topic("dead"), ctx.topic("target"), with_metadata());
    let mut subscription = ctx.subscribe(&bus, &target, ctx.fan_out()).await?;
    give_up(&ctx, &bus, &sent, &dead).await?;
    let report = ctx.within("redrive", bus.redrive_to(&dead, &target)).await??;
    ensure_eq!(report.done, 1, "redriven");
    let delivery = ctx.next(&mut subscription).await?;
    let back = delivery.event();
    ensure_eq!(without(back.metadata(), "redriven."), *sent.metadata(), "metadata of the redriven event");
    ensure_eq!(back.metadata().get("redriven.event"), Some(&sent.id().to_string()), "the event it comes from");
    ensure!(back.id() != sent.id(), "a redriven event is a new one, but has the id {}", back.id());
    ensure_eq!(*back.data::<u8>()?, 1, "data");
    ctx.nothing_more(&bus, &target, [&mut subscription]).await
}
