//! Where subscriptions start.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pubsub_core::{Bus, Capability, Cursor, ErrorKind, Scope, Start, SubscribeOptions, Topic};

use crate::oracle::{Recorder, delivered, exactly_once, ids};
use crate::{Ctx, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const ORDERED: Need = Need::Capability(Capability::PublisherOrder);
    const HISTORY: Need = Need::Capability(Capability::History);
    const GROUPS: Need = Need::Capability(Capability::Groups);
    const GROUP_HISTORY: Need = Need::Capability(Capability::GroupHistory);
    const DURABLE: Need = Need::Capability(Capability::DurableGroups);
    vec![
        property("SP-01", "A new group starts with what is retained, fan-out with what is published next", &["B3"], defaults)
            .needs([DURABLE, GROUP_HISTORY]),
        property(
            "SP-02",
            "Where there is no history nothing old arrives, and asking for it is unsupported",
            &["B3", "R6"],
            no_past,
        )
        .needs([Need::Without(Capability::History)]),
        property(
            "SP-03",
            "From the latest on nothing old arrives, and nothing after subscribe is missed",
            &["B1", "B3"],
            latest,
        )
        .needs([ORDERED]),
        property("SP-04", "No start moves the place of a group that exists", &["B3"], keeps_place)
            .needs([DURABLE, GROUP_HISTORY]),
        property("SP-05", "A group that comes back does not get again what it has settled", &["B3", "S2"], no_settled_again)
            .needs([DURABLE]),
        property(
            "SP-06",
            "Beside a live subscription a late one gets each old event once, then live ones",
            &["B3", "R1"],
            late_earliest,
        )
        .needs([HISTORY, ORDERED]),
        property("SP-07", "Beside a lagging subscription a late one gets nothing old", &["B3", "B2"], late_latest),
        property("SP-08", "What waits for one member when another joins is neither lost nor doubled", &["S2"], joins_late)
            .needs([GROUPS]),
        omitted("SP-09", "A replayed event can be retried, and settling it harms nobody", &["R3"], "said and held by RP-28"),
        omitted(
            "SP-10",
            "Decorators pass on an unset start unset, and a set one as it is",
            &["B3"],
            "held by the decorators' own tests: from outside, an unset start looks like the default",
        ),
        property("SP-11", "Who subscribes while the last subscription ends misses nothing", &["B1"], as_the_last_leaves),
        property(
            "SP-12",
            "A member that does not read keeps no more than it may prefetch from the others",
            &["B5"],
            idle_member,
        )
        .needs([GROUPS]),
    ]
}

async fn defaults(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("defaults"));
    let old = ctx.publish(&bus, &topic, 8).await?;
    let mut live = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&ctx.group("new"))).await?;
    let new = ctx.publish(&bus, &topic, 4).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    exactly(&new, &ctx.until(&mut live, &fence).await?).map_err(|why| why.at("fan-out"))?;
    let all = [old, new].concat();
    exactly_once(&ids(&all), &ctx.collect_done(&mut member, all.len()).await?).map_err(|why| why.at("the group"))
}

async fn no_past(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("no-past"));
    let mut before = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 5).await?;
    exactly(&sent, &ctx.collect(&mut before, 5).await?)?;
    let mut kinds = vec![ctx.fan_out()];
    if ctx.capabilities().supports(Capability::Groups) {
        kinds.push(ctx.member(&ctx.group("late")));
    }
    for options in kinds {
        let mut late = ctx.subscribe(&bus, &topic, options.clone()).await?;
        ctx.nothing_before_fence(&mut late, &bus, &topic).await?;
        drop(late);
        let cursor = Cursor::new(Arc::new(Scope::new("some", "where")?), 0);
        for start in [Start::Earliest, Start::Index(0), Start::After(cursor)] {
            unsupported(&ctx, &bus, &topic, options.clone().start(start)).await?;
        }
    }
    // Whatever was refused left nothing behind.
    let fence = ctx.fence(&bus, &topic).await?;
    drop(ctx.until(&mut before, &fence).await?);
    let left = ctx.within("inspect", bus.inspect(&topic)).await??.fan_out;
    ensure!(matches!(left, None | Some(1)), "{left:?} fan-out subscriptions, of one");
    Ok(())
}

async fn unsupported(ctx: &Ctx, bus: &Bus, topic: &Topic, options: SubscribeOptions) -> Verdict {
    let asked = format!("{:?}, group {:?}", options.start, options.group);
    match ctx.within("subscribe", bus.subscribe_with(topic, options)).await? {
        Ok(_) => Err(crate::Mismatch::new(format!("{asked}: accepted where there is no history"))),
        Err(error) => {
            ensure!(matches!(error.kind(), ErrorKind::Unsupported(_)), "{asked}: refused with {error}");
            Ok(())
        }
    }
}

async fn latest(ctx: Ctx) -> Verdict {
    let (bus, topic, started) = (ctx.bus().await?, ctx.topic("latest"), Arc::new(AtomicUsize::new(0)));
    ctx.publish(&bus, &topic, 5).await?;
    let publishing = ctx.spawn({
        let (own, bus, topic, started) = (ctx.clone(), bus.clone(), topic.clone(), started.clone());
        async move {
            let events = own.events(60);
            for event in &events {
                started.fetch_add(1, Ordering::SeqCst);
                own.publish_all(&bus, &topic, std::slice::from_ref(event)).await?;
                tokio::task::yield_now().await;
            }
            Verdict::Ok(ids(&events))
        }
    });
    ctx.eventually("some were published", || started.load(Ordering::SeqCst) >= 10).await?;
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Latest)).await?;
    let due = 60 - started.load(Ordering::SeqCst);
    let sent = ctx.join("the publisher", publishing).await??;
    let fence = ctx.fence(&bus, &topic).await?;
    let seen = delivered(&ctx.until(&mut subscription, &fence).await?);
    ensure!((due..=51).contains(&seen.len()), "{} arrived of 60, {due} of them due", seen.len());
    ensure_eq!(seen, sent[60 - seen.len()..], "what arrived and the newest events");
    Ok(())
}

async fn keeps_place(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("place"), ctx.group("g"));
    let sent = ids(&ctx.publish(&bus, &topic, 9).await?);
    let index = ctx.capabilities().supports(Capability::Index).then_some(Start::Index(0));
    let mut seen = Vec::new();
    for start in [Some(Start::Earliest), Some(Start::Latest), index] {
        let mut options = ctx.member(&group);
        options.start = start;
        let mut member = ctx.subscribe(&bus, &topic, options).await?;
        for _ in 0..3 {
            let delivery = ctx.next(&mut member).await?;
            seen.push(delivery.event().id().clone());
            ctx.confirmed(delivery.done()).await?;
        }
    }
    exactly_once(&sent, &seen)?;
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group).start(Start::Earliest)).await?;
    ctx.nothing_before_fence(&mut member, &bus, &topic).await
}

async fn no_settled_again(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("again"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.publish(&bus, &topic, 6).await?;
    for delivery in ctx.collect(&mut member, 6).await? {
        ctx.confirmed(delivery.done()).await?;
    }
    drop(member);
    let missed = ctx.publish(&bus, &topic, 3).await?;
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    exactly_once(&ids(&missed), &ctx.collect_done(&mut member, 3).await?)?;
    ctx.nothing_before_fence(&mut member, &bus, &topic).await
}

async fn late_earliest(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("late"));
    let mut live = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut sent = ctx.publish(&bus, &topic, 15).await?;
    let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Earliest)).await?;
    sent.extend(ctx.publish(&bus, &topic, 15).await?);
    let fence = ctx.fence(&bus, &topic).await?;
    for subscription in [&mut late, &mut live] {
        ensure_eq!(delivered(&ctx.until(subscription, &fence).await?), ids(&sent), "what arrived");
    }
    Ok(())
}

async fn late_latest(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("lagging"));
    let mut lagging = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let old = ctx.publish(&bus, &topic, 20).await?;
    let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Latest)).await?;
    let new = ctx.publish(&bus, &topic, 5).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    exactly(&new, &ctx.until(&mut late, &fence).await?).map_err(|why| why.at("the late one"))?;
    let all = [old, new].concat();
    exactly(&all, &ctx.until(&mut lagging, &fence).await?).map_err(|why| why.at("the lagging one"))
}

async fn joins_late(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("joins"), ctx.group("g"));
    let recorder = Recorder::new();
    let first = ctx.subscribe(&bus, &topic, ctx.member(&group).prefetch(32)).await?;
    let mut sent = ctx.publish(&bus, &topic, 20).await?;
    // The first one has not read anything yet.
    let second = ctx.subscribe(&bus, &topic, ctx.member(&group).prefetch(32)).await?;
    let (a, b) = (ctx.consume(first, &recorder, "a"), ctx.consume(second, &recorder, "b"));
    sent.extend(ctx.publish(&bus, &topic, 20).await?);
    ctx.eventually("all came", || recorder.distinct() >= sent.len()).await?;
    ctx.drained(&[&a, &b]).await?;
    exactly_once(&ids(&sent), &recorder.ids())
}

async fn as_the_last_leaves(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("leaves"));
    let mut last = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    for round in 0..20 {
        let leaving = ctx.spawn(async move {
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
            drop(last);
        });
        let mut next = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
        let sent = ctx.publish(&bus, &topic, 3).await?;
        ctx.join("leaving", leaving).await?;
        let fence = ctx.fence(&bus, &topic).await?;
        exactly(&sent, &ctx.until(&mut next, &fence).await?).map_err(|why| why.at(format!("round {round}")))?;
        last = next;
    }
    Ok(())
}

async fn idle_member(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("idle"), ctx.group("g"));
    let recorder = Recorder::new();
    let mut idle = ctx.subscribe(&bus, &topic, ctx.member(&group).prefetch(2)).await?;
    let busy = ctx.consume(ctx.subscribe(&bus, &topic, ctx.member(&group)).await?, &recorder, "busy");
    let sent = ids(&ctx.publish(&bus, &topic, 20).await?);
    ctx.eventually("the busy one got all but two", || recorder.count() >= 18).await?;
    // What the idle one has it can still read, and what it leaves goes to the other.
    let at_hand = 20 - recorder.count();
    if at_hand > 0
        && let Ok(next) = tokio::time::timeout(ctx.timing().quiet, futures::StreamExt::next(&mut idle)).await
    {
        let delivery = next.ok_or_else(|| crate::Mismatch::new("the idle member's stream ended"))??;
        recorder.received("idle", &delivery);
        ctx.confirmed(delivery.done()).await?;
    }
    drop(idle);
    ctx.eventually("all came", || recorder.distinct() >= sent.len()).await?;
    ctx.drained(&[&busy]).await?;
    exactly_once(&sent, &recorder.ids())
}
