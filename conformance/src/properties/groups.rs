//! Consumer groups.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join;
use pubsub_core::{Capability, Group, Topic};

use crate::oracle::{Recorder, at_least_once, exactly_once, ids, in_order};
use crate::{Consumer, Ctx, Job, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

const GROUPS: Need = Need::Capability(Capability::Groups);
const DURABLE: Need = Need::Capability(Capability::DurableGroups);

pub(crate) fn properties() -> Vec<Property> {
    vec![
        property("GR-01", "Each event goes to exactly one member of a group", &["P1", "B2"], one_member).needs([GROUPS]),
        property(
            "GR-02",
            "Every ready member gets some, and one that does not poll holds nothing back",
            &["B2", "S2"],
            all_ready,
        )
        .needs([GROUPS]),
        property("GR-03", "A lone member gets everything", &["P1", "P2"], lone_member).needs([GROUPS]),
        property("GR-04", "Independent groups each get every event once", &["B2"], independent_groups).needs([GROUPS]),
        property("GR-05", "Groups and fan-out subscriptions share a topic without interference", &["B2"], beside_fan_out)
            .needs([GROUPS]),
        property("GR-06", "A group spans instances: each event goes to one of them", &["P1", "B2"], spans_instances)
            .needs([GROUPS, Need::CrossInstance]),
        property("GR-08", "An instance stays in a group until its last member there leaves", &["B2"], last_of_instance)
            .needs([GROUPS, Need::CrossInstance]),
        property(
            "GR-09",
            "After a member leaves, the others get everything, what it held included",
            &["S2", "S5"],
            member_leaves,
        )
        .needs([GROUPS]),
        property("GR-10", "After the last member leaves, its handler is not called again", &["B2", "C1"], last_member_leaves)
            .needs([GROUPS]),
        property("GR-11", "A durable group gets what was published while it had no member", &["B3", "S2"], while_away)
            .needs([DURABLE]),
        property("GR-12", "Leaving a durable group keeps what its member had not settled", &["S2"], keeps_unsettled)
            .needs([DURABLE]),
        property("GR-13", "What a killed member had not settled goes to the others", &["S5"], killed_member)
            .needs([GROUPS, Need::SecondProcess]),
        property(
            "GR-14",
            "The same group on two topics is two groups, however the names are spelled",
            &["B2"],
            names_are_apart,
        )
        .needs([GROUPS]),
        property("GR-15", "Each group counts attempts by itself", &["S3", "S4"], attempts_are_apart).needs([GROUPS]),
        property("GR-16", "A retry in one group is seen by no other group and no fan-out subscription", &["S3"], private_retry)
            .needs([GROUPS]),
        property("GR-18", "A group may be joined for the first time by several at once", &["B1", "B2"], joined_at_once)
            .needs([GROUPS]),
        property("GR-19", "Members that come and go under load lose nothing", &["S2", "B2"], churn).needs([GROUPS]),
        property("GR-21", "A member that stopped asking after it was woken holds nothing back", &["B2", "S2"], stops_asking)
            .needs([GROUPS]),
        omitted(
            "GR-20",
            "Leaving a fan-out subscription frees what the server kept for it",
            &["C2"],
            "only the server can tell: the tests of each backend with a server hold it",
        ),
    ]
}

/// Members that record and settle, named by their number.
async fn members(ctx: &Ctx, topic: &Topic, group: &Group, recorder: &Recorder, count: usize) -> Verdict<Vec<Consumer>> {
    let bus = ctx.bus().await?;
    let mut members = Vec::new();
    for number in 0..count {
        let member = ctx.subscribe(&bus, topic, ctx.member(group)).await?;
        members.push(ctx.consume(member, recorder, &number.to_string()));
    }
    Ok(members)
}

/// Waits until so many different events have arrived and nothing is left to do.
async fn settled(ctx: &Ctx, recorder: &Recorder, count: usize, members: &[Consumer]) -> Verdict {
    let arrived = ctx.eventually("everything has arrived", || recorder.distinct() >= count).await;
    arrived.map_err(|why| why.at(format!("{} of {count}", recorder.distinct())))?;
    ctx.drained(&members.iter().collect::<Vec<_>>()).await
}

async fn one_member(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("shared"), ctx.group("workers"));
    let recorder = Recorder::new();
    let members = members(&ctx, &topic, &group, &recorder, 4).await?;
    let mut sent = ids(&ctx.publish(&bus, &topic, 100).await?);
    let more = ctx.events(200);
    for events in more.chunks(20) {
        ctx.publish_all(&bus, &topic, events).await?;
    }
    sent.extend(ids(&more));
    settled(&ctx, &recorder, sent.len(), &members).await?;
    exactly_once(&sent, &recorder.ids())
}

async fn all_ready(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("ready"), ctx.group("workers"));
    // Its bound is the group's; the others take little ahead, for backends that prefetch.
    let _never_polled = ctx.subscribe(&bus, &topic, ctx.member(&group).prefetch(64)).await?;
    let mut busy = Vec::new();
    for _ in 0..4 {
        busy.push(ctx.subscribe(&bus, &topic, ctx.member(&group).max_in_flight(1).prefetch(1)).await?);
    }
    let sent = ctx.publish(&bus, &topic, 40).await?;
    // Each takes one and holds it, so the next must go to the next.
    let mut seen = Vec::new();
    let mut held = Vec::new();
    for member in &mut busy {
        held.push(ctx.next(member).await?);
    }
    for delivery in held {
        seen.push(delivery.event().id().clone());
        drop(delivery.done());
    }
    // The rest goes to those that ask; the one that never does strands nothing.
    let recorder = Recorder::new();
    let members: Vec<_> =
        busy.into_iter().enumerate().map(|(number, member)| ctx.consume(member, &recorder, &number.to_string())).collect();
    settled(&ctx, &recorder, sent.len() - seen.len(), &members).await?;
    seen.extend(recorder.ids());
    exactly_once(&ids(&sent), &seen)
}

async fn stops_asking(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("stops"), ctx.group("g"));
    // It asks once, waits, is told that there is work, and never comes back for it.
    let mut stops = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.quiet(&mut stops).await?;
    let mut works = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ids(&ctx.publish(&bus, &topic, 1).await?);
    exactly_once(&sent, &ctx.collect_done(&mut works, 1).await?)?;
    for _ in 0..5 {
        // Now the one that works waits, which is polled first, and the next event must wake it, whoever else was woken before.
        let (seen, sent) = join(ctx.collect_done(&mut works, 1), ctx.publish(&bus, &topic, 1)).await;
        exactly_once(&ids(&sent?), &seen?)?;
    }
    Ok(())
}

async fn lone_member(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("lone"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ids(&ctx.publish(&bus, &topic, 50).await?);
    let seen = ctx.collect_done(&mut member, sent.len()).await?;
    exactly_once(&sent, &seen)?;
    if ctx.capabilities().supports(Capability::PublisherOrder) {
        in_order(&sent, &seen)?;
    }
    ctx.nothing_before_fence(&mut member, &bus, &topic).await
}

async fn independent_groups(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("groups"));
    let mut groups = Vec::new();
    for _ in 0..3 {
        let (group, recorder) = (ctx.group("g"), Recorder::new());
        groups.push((members(&ctx, &topic, &group, &recorder, 2).await?, recorder));
    }
    let sent = ids(&ctx.publish(&bus, &topic, 60).await?);
    for (members, recorder) in &groups {
        settled(&ctx, recorder, sent.len(), members).await?;
        exactly_once(&sent, &recorder.ids())?;
    }
    Ok(())
}

async fn beside_fan_out(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("mixed"), ctx.group("g"));
    let (grouped, alone) = (Recorder::new(), Recorder::new());
    let early = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &alone, "early");
    let members = members(&ctx, &topic, &group, &grouped, 3).await?;
    let late = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &alone, "late");
    let sent = ids(&ctx.publish(&bus, &topic, 60).await?);
    settled(&ctx, &grouped, sent.len(), &members).await?;
    exactly_once(&sent, &grouped.ids())?;
    ctx.fence_consumers(&bus, &topic, &alone, &[&early, &late]).await?;
    for consumer in ["early", "late"] {
        exactly_once(&sent, &alone.ids_of(consumer)).map_err(|why| why.at(consumer))?;
    }
    Ok(())
}

async fn spans_instances(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("spanning"), ctx.group("g"));
    let recorder = Recorder::new();
    let mut members = Vec::new();
    for name in ["a", "b", "c"] {
        let instance = ctx.connect().await?;
        for _ in 0..2 {
            members.push(ctx.consume(ctx.subscribe(&instance, &topic, ctx.member(&group)).await?, &recorder, name));
        }
    }
    let mut sent = ids(&ctx.publish(&bus, &topic, 60).await?);
    sent.extend(ids(&ctx.publish(&ctx.connect().await?, &topic, 60).await?));
    settled(&ctx, &recorder, sent.len(), &members).await?;
    exactly_once(&sent, &recorder.ids())
}

async fn last_of_instance(ctx: Ctx) -> Verdict {
    let (topic, group) = (ctx.topic("several"), ctx.group("g"));
    let (here, there) = (ctx.bus().await?, ctx.connect().await?);
    let mut stays = ctx.subscribe(&here, &topic, ctx.member(&group)).await?;
    let leaves = ctx.subscribe(&here, &topic, ctx.member(&group)).await?;
    ctx.within("unsubscribe", leaves.unsubscribe()).await?;
    // Published from afar: the instance must still be known as a member.
    let sent = ids(&ctx.publish(&there, &topic, 20).await?);
    exactly_once(&sent, &ctx.collect_done(&mut stays, sent.len()).await?)?;
    // Only when its last member has gone does the work go elsewhere, all of it.
    let recorder = Recorder::new();
    let member = ctx.consume(ctx.subscribe(&there, &topic, ctx.member(&group)).await?, &recorder, "there");
    ctx.within("unsubscribe", stays.unsubscribe()).await?;
    let sent = ids(&ctx.publish(&here, &topic, 20).await?);
    settled(&ctx, &recorder, sent.len(), &[member]).await?;
    exactly_once(&sent, &recorder.ids())
}

async fn member_leaves(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("leaving"), ctx.group("g"));
    let mut leaving = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let mut sent = ctx.publish(&bus, &topic, 30).await?;
    let recorder = Recorder::new();
    // It goes with some settled, some in its hands, and some taken but not handed over.
    let done = ctx.collect_done(&mut leaving, 5).await?;
    let held = ctx.collect(&mut leaving, 5).await?;
    let rest = ctx.consume(ctx.subscribe(&bus, &topic, ctx.member(&group)).await?, &recorder, "rest");
    ctx.within("unsubscribe", leaving.unsubscribe()).await?;
    drop(held);
    sent.extend(ctx.publish(&bus, &topic, 30).await?);
    settled(&ctx, &recorder, sent.len() - done.len(), &[rest]).await?;
    let mut seen = recorder.ids();
    seen.extend(done);
    exactly_once(&ids(&sent), &seen)
}

async fn last_member_leaves(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("gone"), ctx.group("g"));
    let recorder = Recorder::new();
    let mut witness = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let members = members(&ctx, &topic, &group, &recorder, 2).await?;
    let sent = ctx.publish(&bus, &topic, 20).await?;
    settled(&ctx, &recorder, sent.len(), &members).await?;
    for member in members {
        member.leave(&ctx).await?;
    }
    let later = ctx.publish(&bus, &topic, 20).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    let all: Vec<_> = sent.iter().chain(&later).cloned().collect();
    exactly(&all, &ctx.until(&mut witness, &fence).await?)?;
    exactly_once(&ids(&sent), &recorder.ids())
}

async fn while_away(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("away"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let before = ids(&ctx.publish(&bus, &topic, 10).await?);
    exactly_once(&before, &ctx.collect_done(&mut member, 10).await?)?;
    ctx.within("flush", bus.flush()).await??;
    ctx.within("unsubscribe", member.unsubscribe()).await?;
    let missed = ids(&ctx.publish(&bus, &topic, 10).await?);
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    exactly_once(&missed, &ctx.collect_done(&mut member, 10).await?)?;
    ctx.nothing_before_fence(&mut member, &bus, &topic).await
}

async fn keeps_unsettled(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("kept"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ids(&ctx.publish(&bus, &topic, 10).await?);
    let mut held = ctx.collect(&mut member, 5).await?;
    held.truncate(3);
    ctx.within("unsubscribe", member.unsubscribe()).await?;
    drop(held); // two were let go of before, these after
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    exactly_once(&sent, &ctx.collect_done(&mut member, 10).await?)?;
    ctx.nothing_before_fence(&mut member, &bus, &topic).await
}

async fn killed_member(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("killed"), ctx.group("g"));
    // A member of ours creates the group; it takes nothing until the other has taken all.
    let mut survivor = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ids(&ctx.publish(&bus, &topic, 10).await?);
    let processes = ctx.harness().processes().expect("needed");
    let job = Job::Hold { topic: topic.clone(), group: group.clone(), count: 10 };
    let holder = ctx.within("another process", processes.start(job)).await??;
    ctx.within("its death", holder.kill()).await??;
    exactly_once(&sent, &ctx.collect_done(&mut survivor, sent.len()).await?)
}

async fn names_are_apart(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    // Each separator that a backend may build its own names with, in such a way that topic and group read the same together.
    let mut names = BTreeSet::new();
    for separator in ["-", ":", ".", "/", "|", "_", "%", " ", "::"] {
        for (topic, group) in [("a~b", "c"), ("a", "b~c"), ("a", "c"), ("a~b", "b~c"), ("a~b~c", "c")] {
            names.insert((topic.replace('~', separator), group.replace('~', separator)));
        }
    }
    let mut members = Vec::new();
    for (topic, group) in &names {
        members.push(ctx.subscribe(&bus, &Topic::new(topic)?, ctx.member(&Group::new(group)?)).await?);
    }
    let mut sent = BTreeMap::new();
    for (topic, _) in &names {
        if !sent.contains_key(topic) {
            let events = ctx.publish(&bus, &Topic::new(topic)?, 1).await?;
            sent.insert(topic, (events, ctx.fence(&bus, &Topic::new(topic)?).await?));
        }
    }
    for ((topic, group), member) in names.iter().zip(&mut members) {
        let (events, fence) = &sent[topic];
        let seen = ctx.until(member, fence).await.and_then(|seen| exactly(events, &seen).map(|()| seen));
        let seen = seen.map_err(|why| why.at(format!("group {group:?} of topic {topic:?}")))?;
        seen.into_iter().for_each(|delivery| drop(delivery.done()));
    }
    Ok(())
}

async fn attempts_are_apart(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("counts"));
    let (failing, working) = (ctx.group("failing"), ctx.group("working"));
    let mut fails = ctx.subscribe(&bus, &topic, ctx.member(&failing)).await?;
    let mut works = ctx.subscribe(&bus, &topic, ctx.member(&working)).await?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    for attempt in 1..=3 {
        let delivery = ctx.next(&mut fails).await?;
        ensure_eq!(delivery.attempt(), attempt, "attempt in the failing group");
        drop(delivery.retry());
    }
    let delivery = ctx.next(&mut works).await?;
    ensure_eq!((delivery.event().id(), delivery.attempt()), (sent[0].id(), 1), "first delivery in the other group");
    drop(delivery.retry());
    let delivery = ctx.next(&mut works).await?;
    ensure_eq!(delivery.attempt(), 2, "attempt in the other group");
    drop(delivery.done());
    let delivery = ctx.next(&mut fails).await?;
    ensure_eq!(delivery.attempt(), 4, "attempt in the failing group");
    drop(delivery.done());
    Ok(())
}

async fn private_retry(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("private"));
    let (failing, other) = (ctx.group("failing"), ctx.group("other"));
    let mut fails = ctx.subscribe(&bus, &topic, ctx.member(&failing)).await?;
    let mut works = ctx.subscribe(&bus, &topic, ctx.member(&other)).await?;
    let mut fan_out = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 5).await?;
    let stored = ctx.within("inspect", bus.inspect(&topic)).await??.retained;
    exactly_once(&ids(&sent), &ctx.collect_done(&mut works, 5).await?)?;
    exactly(&sent, &ctx.collect(&mut fan_out, 5).await?)?;
    for delivery in ctx.collect(&mut fails, 5).await? {
        drop(delivery.retry());
    }
    let again = ctx.collect(&mut fails, 5).await?;
    exactly(&sent, &again)?;
    // All retries have come back to where they belong; a fence behind them proves that nobody else got one.
    let fence = ctx.fence(&bus, &topic).await?;
    for (name, subscription) in [("another group", &mut works), ("fan-out", &mut fan_out)] {
        let extra = ctx.until(subscription, &fence).await?;
        ensure!(extra.is_empty(), "{name} saw {extra:?}");
    }
    again.into_iter().for_each(|delivery| drop(delivery.done()));
    if let Some(stored) = stored.filter(|_| ctx.capabilities().supports(Capability::History)) {
        let now = ctx.within("inspect", bus.inspect(&topic)).await??.retained;
        ensure_eq!(now, Some(stored + 1), "retained after the retries, with the fence");
    }
    Ok(())
}

async fn joined_at_once(ctx: Ctx) -> Verdict {
    for _ in 0..10 {
        let (topic, group) = (ctx.topic("joined"), ctx.group("g"));
        let recorder = Recorder::new();
        let mut joining = Vec::new();
        for _ in 0..4 {
            let bus = if ctx.harness().spans_instances() { ctx.connect().await? } else { ctx.bus().await? };
            let (ctx, topic, options) = (ctx.clone(), topic.clone(), ctx.member(&group));
            joining.push(ctx.clone().spawn(async move { ctx.subscribe(&bus, &topic, options).await }));
        }
        let mut members = Vec::new();
        for (number, joining) in joining.into_iter().enumerate() {
            let member = ctx.join("a first member", joining).await??;
            members.push(ctx.consume(member, &recorder, &number.to_string()));
        }
        let sent = ids(&ctx.publish(&ctx.bus().await?, &topic, 20).await?);
        settled(&ctx, &recorder, sent.len(), &members).await?;
        exactly_once(&sent, &recorder.ids())?;
    }
    Ok(())
}

async fn churn(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("churn"), ctx.group("g"));
    let recorder = Recorder::new();
    // Coming and going costs attempts only to what was in a leaving member's hands.
    let options = || ctx.member(&group).retry(ctx.retry().max_attempts(0));
    let stable = ctx.consume(ctx.subscribe(&bus, &topic, options()).await?, &recorder, "stable");
    let publisher = {
        let (ctx, bus, topic) = (ctx.clone(), bus.clone(), topic.clone());
        ctx.clone().spawn(async move { ctx.publish(&bus, &topic, 1000).await })
    };
    let mut rng = ctx.rng();
    let mut round = 0;
    while !publisher.is_finished() || round < 20 {
        round += 1;
        let mut member = ctx.subscribe(&bus, &topic, options()).await?;
        match rng.u8(..4) {
            // Leaves politely, having settled what it took.
            0 => ctx.consume(member, &recorder, "guest").leave(&ctx).await?,
            // Goes with deliveries in its hands, unsettled: they are for others.
            1 => {
                let mut held = Vec::new();
                while held.len() < 3
                    && let Ok(next) = tokio::time::timeout(ctx.timing().backoff, ctx.next(&mut member)).await
                {
                    held.push(next?);
                }
            }
            // Never asks for anything.
            2 => drop(member),
            // Is cut off in the middle.
            _ => {
                let guest = ctx.consume(member, &recorder, "guest");
                tokio::task::yield_now().await;
                drop(guest);
            }
        }
    }
    let sent = ids(&ctx.join("the publisher", publisher).await??);
    settled(&ctx, &recorder, sent.len(), &[stable]).await?;
    at_least_once(&sent, &recorder.ids())
}
