//! Events that stay within their instance.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pubsub_core::{AckMode, Bus, Capability, ErrorKind, Event, Fate, Payload, PublishOptions, Start, Topic};

use crate::oracle::{Recorder, delivered, exactly_once, ids};
use crate::{Ctx, Fault, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const GROUPS: Need = Need::Capability(Capability::Groups);
    const LIVE: Need = Need::Capability(Capability::LiveValues);
    vec![
        property(
            "LO-01",
            "A local event reaches every fan-out subscription of its instance on its topic, once",
            &["P4"],
            all_of_the_instance,
        ),
        property("LO-02", "A local event reaches no other instance, and what is published normally does", &["P4"], no_other)
            .needs([Need::CrossInstance]),
        property("LO-03", "A live value arrives as the very object that was published", &["P4"], same_object).needs([LIVE]),
        property("LO-04", "A local event goes to one local member of each group that has one", &["P4"], one_local_member)
            .needs([GROUPS, Need::CrossInstance]),
        property(
            "LO-05",
            "Local events come as soon as subscribe has returned, and no more after a stop",
            &["P4", "B1"],
            from_start_to_stop,
        ),
        property("LO-06", "A local event is neither stored nor indexed, and bears no cursor", &["P4"], unstored),
        omitted(
            "LO-07",
            "A large local event costs no traffic",
            &["P4"],
            "concerns bytes on a wire; the tests of the backends that have one hold it",
        ),
        property(
            "LO-08",
            "A local event has its id and time, is settled like any other, and retried with its live value",
            &["P4", "S3"],
            settled_like_any,
        )
        .needs([LIVE]),
        property("LO-09", "A live value is refused where it would have to leave", &["P4", "P3"], live_stays),
        property("LO-10", "A local event whose holder leaves goes to no other instance", &["P4"], holder_leaves)
            .needs([GROUPS, Need::CrossInstance]),
        property("LO-11", "A local event is never encoded", &["P4", "P7"], never_encoded),
        property("LO-12", "The bound on payloads is not about local events", &["P4", "P6"], unbounded)
            .needs([Need::MaxPayload]),
        property("LO-13", "Full queues of other instances do not hold up local events", &["P4", "B2"], unhindered)
            .needs([Need::CrossInstance]),
        property("LO-14", "A local event waits at a full queue of its own instance, and fails as full", &["P4", "B5"], full),
        property("LO-15", "Local events need no server", &["P4", "N1"], in_an_outage).needs([Need::Fault(Fault::Outage)]),
        property("LO-16", "A group without a local member does not keep local events for one", &["P4"], not_kept_for_groups)
            .needs([Capability::DurableGroups.into()]),
        property("LO-17", "A retry of a local event in a group comes back within the instance", &["P4", "S3"], retried_here)
            .needs([GROUPS, Need::CrossInstance]),
    ]
}

/// Publishes these events locally; nothing that is stored has a position.
async fn publish(ctx: &Ctx, bus: &Bus, topic: &Topic, events: &[Arc<Event>]) -> Verdict {
    let published = ctx.within("publish locally", bus.publish_with(topic, events, PublishOptions::local_only())).await??;
    ensure!(published.as_slice().is_empty(), "local events have the positions {published:?}");
    Ok(())
}

/// Publishes so many new events locally.
async fn local(ctx: &Ctx, bus: &Bus, topic: &Topic, count: usize) -> Verdict<Vec<Arc<Event>>> {
    let events = ctx.events(count);
    publish(ctx, bus, topic, &events).await?;
    Ok(events)
}

async fn all_of_the_instance(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("local"));
    let clone = bus.clone();
    let mut one = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut two = ctx.subscribe(&clone, &topic, ctx.fan_out()).await?;
    let mut elsewhere = ctx.subscribe(&bus, &ctx.topic("other"), ctx.fan_out()).await?;
    let mut sent = local(&ctx, &bus, &topic, 20).await?;
    sent.extend(local(&ctx, &clone, &topic, 1).await?);
    for subscription in [&mut one, &mut two] {
        exactly(&sent, &ctx.collect(subscription, sent.len()).await?)?;
    }
    let fence = ctx.fence(&bus, &topic).await?;
    for subscription in [&mut one, &mut two] {
        exactly(&[], &ctx.until(subscription, &fence).await?)?;
        // Nothing orders the two kinds among each other.
        ctx.quiet(subscription).await?;
    }
    let other = elsewhere.topic().clone();
    ctx.nothing_before_fence(&mut elsewhere, &bus, &other).await
}

async fn no_other(ctx: Ctx) -> Verdict {
    let (bus, other, topic) = (ctx.bus().await?, ctx.connect().await?, ctx.topic("local"));
    for (from, to) in [(&bus, &other), (&other, &bus)] {
        let mut own = ctx.subscribe(from, &topic, ctx.fan_out()).await?;
        let mut there = ctx.subscribe(to, &topic, ctx.fan_out()).await?;
        let sent = local(&ctx, from, &topic, 10).await?;
        exactly(&sent, &ctx.collect(&mut own, 10).await?)?;
        // The control: the way there is open.
        let normal = ctx.publish(from, &topic, 3).await?;
        let fence = ctx.fence(from, &topic).await?;
        exactly(&normal, &ctx.until(&mut there, &fence).await?)?;
        exactly(&normal, &ctx.until(&mut own, &fence).await?)?;
        // Two ways are not ordered among each other.
        ctx.quiet(&mut there).await?;
    }
    Ok(())
}

/// What only this process can hold: not even `Clone`.
struct Live(u64);

fn live(value: &Arc<Live>) -> Arc<Event> {
    Arc::new(Event::new("live").with_payload(Payload::live(value.clone())))
}

async fn same_object(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("live"));
    let mut subscriptions = vec![ctx.subscribe(&bus, &topic, ctx.fan_out()).await?];
    subscriptions.push(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?);
    if ctx.capabilities().supports(Capability::Groups) {
        subscriptions.push(ctx.subscribe(&bus, &topic, ctx.member(&ctx.group("g"))).await?);
    }
    for number in 0..3 {
        let value = Arc::new(Live(number));
        publish(&ctx, &bus, &topic, &[live(&value)]).await?;
        for subscription in &mut subscriptions {
            let delivery = ctx.next(subscription).await?;
            let arrived = delivery.event().payload().get_live::<Live>()?;
            ensure!(std::ptr::eq(arrived, &*value), "a copy arrived: {}", arrived.0);
            drop(delivery.done());
        }
    }
    Ok(())
}

async fn one_local_member(ctx: Ctx) -> Verdict {
    let (bus, other, topic) = (ctx.bus().await?, ctx.connect().await?, ctx.topic("local"));
    let (shared, foreign) = (ctx.group("shared"), ctx.group("foreign"));
    let recorder = Recorder::new();
    let mut there = ctx.subscribe(&other, &topic, ctx.member(&shared)).await?;
    let mut stranger = ctx.subscribe(&other, &topic, ctx.member(&foreign)).await?;
    let a = ctx.consume(ctx.subscribe(&bus, &topic, ctx.member(&shared)).await?, &recorder, "a");
    let b = ctx.consume(ctx.subscribe(&bus, &topic, ctx.member(&shared)).await?, &recorder, "b");
    let mut single = ctx.subscribe(&bus, &topic, ctx.member(&ctx.group("single"))).await?;
    let sent = local(&ctx, &bus, &topic, 30).await?;
    ctx.eventually("all arrived", || recorder.distinct() >= sent.len()).await?;
    ctx.drained(&[&a, &b]).await?;
    exactly_once(&ids(&sent), &recorder.ids())?;
    exactly_once(&ids(&sent), &ctx.collect_done(&mut single, sent.len()).await?)?;
    // The only members that are left get what comes next, and nothing was there before it.
    a.leave(&ctx).await?;
    b.leave(&ctx).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    for member in [&mut there, &mut stranger] {
        exactly(&[], &ctx.until(member, &fence).await?)?;
        ctx.quiet(member).await?;
    }
    Ok(())
}

async fn from_start_to_stop(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("local"));
    let mut kinds = vec![ctx.fan_out(), ctx.fan_out().ack_mode(AckMode::Manual)];
    if ctx.capabilities().supports(Capability::Groups) {
        kinds.push(ctx.member(&ctx.group("g")));
    }
    for round in 0..10 {
        for options in &kinds {
            let mut subscription = ctx.subscribe(&bus, &topic, options.clone()).await?;
            let sent = ids(&local(&ctx, &bus, &topic, 2).await?);
            let seen = ctx.collect_done(&mut subscription, 2).await?;
            exactly_once(&sent, &seen).map_err(|why| why.at(format!("round {round}")))?;
            subscription.handle().stop();
            local(&ctx, &bus, &topic, 2).await?;
            ctx.ended(&mut subscription).await?;
        }
    }
    Ok(())
}

async fn unstored(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("local"));
    let keeps = ctx.capabilities().supports(Capability::History);
    let mut here = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut normal = ctx.publish(&bus, &topic, 2).await?;
    let hidden = local(&ctx, &bus, &topic, 5).await?;
    normal.extend(ctx.publish(&bus, &topic, 2).await?);
    let all: Vec<_> = normal.iter().chain(&hidden).cloned().collect();
    let deliveries = ctx.collect(&mut here, all.len()).await?;
    exactly(&all, &deliveries)?;
    let mut indices = Vec::new();
    for delivery in &deliveries {
        let is_local = hidden.iter().any(|event| event.id() == delivery.event().id());
        match is_local {
            true => {
                ensure_eq!(delivery.cursor(), None, "the cursor of a local event");
                ensure_eq!(delivery.event().index(), None, "the index of a local event");
            }
            false => indices.extend(delivery.event().index().map(|place| place.index)),
        }
    }
    if ctx.capabilities().indexed {
        indices.sort_unstable();
        ensure_eq!(indices, [0, 1, 2, 3], "the indices of the others");
    }
    let status = ctx.within("inspect", bus.inspect(&topic)).await??;
    let kept = if keeps { 4 } else { 0 };
    ensure!(status.retained.is_none_or(|retained| retained == kept), "{:?} retained of 4 and 5 local", status.retained);
    if let Some(probe) = ctx.harness().probe() {
        ensure_eq!(ctx.within("stored", probe.stored(&topic)).await??, kept, "stored");
    }
    if keeps {
        let page = ctx.within("history", bus.history(&topic, Start::Earliest, 100)).await??;
        let listed: Vec<_> = page.entries.iter().map(|(_, event)| event.id().clone()).collect();
        exactly_once(&ids(&normal), &listed).map_err(|why| why.at("the history"))?;
        let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Earliest)).await?;
        exactly(&normal, &ctx.collect(&mut late, 4).await?)?;
        return ctx.nothing_before_fence(&mut late, &bus, &topic).await;
    }
    let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    ctx.nothing_before_fence(&mut late, &bus, &topic).await
}

async fn settled_like_any(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let mut kinds = vec![ctx.fan_out().ack_mode(AckMode::Manual)];
    if ctx.capabilities().supports(Capability::Groups) {
        kinds.push(ctx.member(&ctx.group("g")));
    }
    for options in kinds {
        let topic = ctx.topic("local");
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        let value = Arc::new(Live(7));
        let event = live(&value);
        publish(&ctx, &bus, &topic, std::slice::from_ref(&event)).await?;
        for attempt in 1..=3 {
            let delivery = ctx.next(&mut subscription).await?;
            ensure_eq!(delivery.attempt(), attempt, "attempt");
            ensure_eq!(delivery.event().id(), event.id(), "id");
            ensure_eq!(delivery.event().created_at(), event.created_at(), "time");
            ensure_eq!(delivery.event().event_type(), "live", "type");
            let arrived = delivery.event().payload().get_live::<Live>()?;
            ensure!(std::ptr::eq(arrived, &*value), "a copy arrived at attempt {attempt}");
            match attempt {
                1 => ctx.confirmed(delivery.retry()).await?,
                2 => drop(delivery), // a retry as well
                _ => ctx.confirmed(delivery.done()).await?,
            }
        }
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    }
    Ok(())
}

async fn live_stays(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("live"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let events = [ctx.event(), live(&Arc::new(Live(1))), ctx.event()];
    let refused = ctx.within("publish", bus.publish_with(&topic, &events, PublishOptions::new())).await?;
    let refused = refused.err().ok_or_else(|| Mismatch::new("a live value was published beyond its instance"))?;
    ensure!(matches!(refused.kind(), ErrorKind::NotSerializable(_)), "refused as {refused}");
    ensure_eq!(refused.fates(), [Fate::NotSent; 3], "the fates");
    ctx.nothing_before_fence(&mut subscription, &bus, &topic).await
}

async fn holder_leaves(ctx: Ctx) -> Verdict {
    let (bus, other, topic, group) = (ctx.bus().await?, ctx.connect().await?, ctx.topic("local"), ctx.group("g"));
    let mut there = ctx.subscribe(&other, &topic, ctx.member(&group)).await?;
    let mut here = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    local(&ctx, &bus, &topic, 4).await?;
    // One for each way an event is given back, and one that was never handed over.
    let mut held = ctx.collect(&mut here, 3).await?;
    drop(held.remove(0).retry());
    drop(held.remove(0).release());
    ctx.within("unsubscribe", here.unsubscribe()).await?;
    drop(held);
    ctx.nothing_before_fence(&mut there, &bus, &topic).await?;
    ctx.quiet(&mut there).await
}

/// Counts how often it is written, and cannot be read.
struct Counted(Arc<AtomicU64>);

impl serde::Serialize for Counted {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.fetch_add(1, Ordering::SeqCst);
        serializer.serialize_unit()
    }
}

impl<'de> serde::Deserialize<'de> for Counted {
    fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom("cannot be read"))
    }
}

async fn never_encoded(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("local"));
    let mut subscriptions = vec![ctx.subscribe(&bus, &topic, ctx.fan_out().ack_mode(AckMode::Manual)).await?];
    if ctx.capabilities().supports(Capability::Groups) {
        subscriptions.push(ctx.subscribe(&bus, &topic, ctx.member(&ctx.group("g"))).await?);
    }
    let written = Arc::new(AtomicU64::new(0));
    let event = Arc::new(Event::new("counted").with_data(Counted(written.clone())));
    publish(&ctx, &bus, &topic, &[event]).await?;
    for subscription in &mut subscriptions {
        ctx.confirmed(ctx.next(subscription).await?.retry()).await?;
        let again = ctx.next(subscription).await?;
        ensure_eq!(again.attempt(), 2, "attempt");
        ensure!(Arc::ptr_eq(&again.data::<Counted>()?.0, &written), "another value arrived");
        ctx.confirmed(again.done()).await?;
    }
    ctx.within("flush", bus.flush()).await??;
    ensure_eq!(written.load(Ordering::SeqCst), 0, "times it was encoded");
    Ok(())
}

async fn unbounded(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("large"));
    let limit = ctx.capabilities().max_payload.ok_or_else(|| Mismatch::new("no bound"))?;
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let event = Arc::new(Event::new("large").with_data("x".repeat(limit + 1)));
    publish(&ctx, &bus, &topic, &[event]).await?;
    ensure_eq!(ctx.next(&mut subscription).await?.data::<String>()?.len(), limit + 1, "bytes");
    Ok(())
}

async fn unhindered(ctx: Ctx) -> Verdict {
    let (bus, other, topic) = (ctx.bus().await?, ctx.connect().await?, ctx.topic("local"));
    let _full = ctx.subscribe(&other, &topic, ctx.fan_out().prefetch(1)).await?;
    ctx.publish(&other, &topic, 1).await?;
    let mut own = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let hasty = PublishOptions::local_only().timeout(Duration::ZERO);
    let events = ctx.events(50);
    ctx.within("publish", bus.publish_with(&topic, &events, hasty)).await??;
    exactly(&events, &ctx.collect(&mut own, 50).await?)
}

async fn full(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("full"));
    let mut narrow = ctx.subscribe(&bus, &topic, ctx.fan_out().prefetch(2)).await?;
    let events = ctx.events(20);
    let hasty = PublishOptions::local_only().timeout(ctx.timing().quiet);
    let refused = ctx.within("publish", bus.publish_with(&topic, &events, hasty)).await?;
    let refused = refused.err().ok_or_else(|| Mismatch::new("twenty events fit into a queue of two"))?;
    ensure_eq!(*refused.kind(), ErrorKind::Full, "how it is refused");
    ensure_eq!(refused.fates().len(), 20, "fates");
    ensure!(!refused.fates().contains(&Fate::Unknown), "within the process nothing is unknown: {:?}", refused.fates());
    let rest: Vec<_> = refused.unpublished().map(|place| events[place].clone()).collect();
    // It waits while there is somebody to make room.
    let publishing = ctx.spawn({
        let (own, bus, topic) = (ctx.clone(), bus.clone(), topic.clone());
        let patient = PublishOptions::local_only().timeout(ctx.timing().patience);
        async move { own.within("publish", bus.publish_with(&topic, &rest, patient)).await }
    });
    exactly(&events, &ctx.collect(&mut narrow, 20).await?)?;
    ctx.join("the publisher", publishing).await???;
    Ok(())
}

async fn in_an_outage(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("outage"));
    let faults = ctx.harness().faults().ok_or_else(|| Mismatch::new("no faults"))?;
    let mut subscriptions = vec![ctx.subscribe(&bus, &topic, ctx.fan_out()).await?];
    if ctx.capabilities().supports(Capability::Groups) {
        subscriptions.push(ctx.subscribe(&bus, &topic, ctx.member(&ctx.group("g"))).await?);
    }
    ctx.within("an outage", faults.inject(Fault::Outage)).await??;
    let sent = ids(&local(&ctx, &bus, &topic, 10).await?);
    for subscription in &mut subscriptions {
        exactly_once(&sent, &ctx.collect_done(subscription, 10).await?)?;
    }
    ctx.within("healing", faults.inject(Fault::Heal)).await??;
    Ok(())
}

async fn not_kept_for_groups(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("local"), ctx.group("g"));
    let member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.within("unsubscribe", member.unsubscribe()).await?;
    local(&ctx, &bus, &topic, 5).await?;
    // The control: the group exists, and keeps what is published normally.
    let normal = ctx.publish(&bus, &topic, 2).await?;
    // So does one that comes later, where groups start in the past.
    let new = ctx.capabilities().supports(Capability::GroupHistory).then(|| ctx.group("new"));
    for name in [&group].into_iter().chain(&new) {
        let mut member = ctx.subscribe(&bus, &topic, ctx.member(name)).await?;
        let kept = ctx.collect(&mut member, 2).await?;
        ensure_eq!(delivered(&kept), ids(&normal), "what {name} kept");
        kept.into_iter().for_each(|delivery| drop(delivery.done()));
        ctx.quiet(&mut member).await?;
        ctx.within("unsubscribe", member.unsubscribe()).await?;
    }
    Ok(())
}

async fn retried_here(ctx: Ctx) -> Verdict {
    let (bus, other, topic, group) = (ctx.bus().await?, ctx.connect().await?, ctx.topic("local"), ctx.group("g"));
    let recorder = Recorder::new();
    let away = ctx.consume(ctx.subscribe(&other, &topic, ctx.member(&group)).await?, &recorder, "away");
    let mut here = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = local(&ctx, &bus, &topic, 5).await?;
    for attempt in 1..=3 {
        let came = ctx.collect(&mut here, 5).await?;
        exactly(&sent, &came)?;
        for delivery in came {
            ensure_eq!(delivery.attempt(), attempt, "attempt");
            ctx.confirmed(if attempt < 3 { delivery.retry() } else { delivery.done() }).await?;
        }
    }
    ctx.within("drained", here.handle().drained()).await?;
    ctx.drained(&[&away]).await?;
    ensure_eq!(recorder.ids(), [], "what the other instance's member got");
    Ok(())
}
