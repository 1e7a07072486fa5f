//! Failures below: cut connections, restarts, outages, dead peers.

use std::time::Duration;

use pubsub_core::{Bus, Capability, PublishOptions, Status, Topic};

use crate::oracle::{Recorder, at_least_once, exactly_once, ids};
use crate::{Ctx, Fault, Job, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const GROUPS: Need = Need::Capability(Capability::Groups);
    vec![
        property("FR-01", "A cut connection heals: publishes resolve and subscriptions carry on", &["N1", "B2"], severed)
            .needs([Need::Fault(Fault::Sever)]),
        property("FR-02", "A restart under load loses nothing whose publish was confirmed", &["P1", "N1"], restarted)
            .needs([Need::Fault(Fault::Restart), Capability::DurableGroups.into(), Capability::SurvivesProcessDeath.into()])
            .limit(Duration::from_secs(60)),
        omitted(
            "FR-03",
            "An outage is logged at a bounded rate",
            &["N1"],
            "concerns what a backend logs; the tests of each backend that reconnects hold it",
        ),
        property(
            "FR-04",
            "A subscribe in an outage waits or fails, and leaves nothing attached that was not returned",
            &["N1", "C4"],
            lost_peer,
        )
        .needs([Need::Fault(Fault::Outage)]),
        omitted("FR-05", "A subscription recovers when its server-side objects are deleted", &["N1"], STORE),
        omitted("FR-06", "Members that recover deleted objects at once all succeed", &["N1"], STORE),
        omitted("FR-07", "What is published during such a recovery is not lost", &["N1", "P1"], STORE),
        omitted(
            "FR-08",
            "When the broker dies one follower takes its place, and all subscriptions carry on",
            &["N1"],
            ELECTION,
        ),
        omitted("FR-09", "Followers that recover at once end on one broker", &["N1"], ELECTION),
        omitted("FR-10", "A newcomer that is refused for a moment does not replace a live broker", &["N1"], ELECTION),
        omitted("FR-11", "After a wrong election all instances converge on one broker", &["N1"], ELECTION),
        omitted("FR-12", "A broker that closes leaves its successor's socket alone", &["C2"], ELECTION),
        omitted("FR-13", "After many restarts there is one broker, and everybody is connected", &["N1"], ELECTION),
        omitted("FR-14", "A stale socket, a foreign file or a stale lock is reclaimed", &["N1"], ELECTION),
        property(
            "FR-15",
            "A publish in an outage ends in time, tells each event's fate, and can be repeated",
            &["N1", "P1", "C4"],
            cut_off,
        )
        .needs([Need::Fault(Fault::Outage)]),
        property("FR-16", "A killed member stops counting, and what it held goes to the others", &["S5", "N1"], dead_peer)
            .needs([Need::SecondProcess, GROUPS]),
        omitted("FR-17", "A peer that reads too slowly is dropped at a bound, and holds up nobody else", &["B2", "B5"], BROKER),
        omitted("FR-18", "A broker without peers sends nothing through its socket", &["P1"], BROKER),
        property("FR-19", "What an earlier instance left behind is attached to, not an error", &["B1", "C2"], left_behind)
            .needs([Need::CrossInstance]),
        omitted("FR-20", "A peer of an older protocol delays, and deadlocks nothing", &["N1"], BROKER),
    ]
}

const STORE: &str = "concerns streams and groups deleted on a server; the tests of the backends that keep them there hold it";
const ELECTION: &str = "concerns the election of a broker among processes; held by the tests of the backend that elects one";
const BROKER: &str = "concerns the frames of a broker and its peers; held by the tests of the backend that has them";

async fn inject(ctx: &Ctx, fault: Fault) -> Verdict {
    let faults = ctx.harness().faults().ok_or_else(|| Mismatch::new("no faults"))?;
    ctx.within(format!("{fault:?}"), faults.inject(fault)).await??;
    Ok(())
}

/// Publishes new events one by one, each until it is confirmed, and returns their ids.
async fn publish_until_confirmed(ctx: &Ctx, bus: &Bus, topic: &Topic, count: usize) -> Verdict<Vec<pubsub_core::EventId>> {
    let events = ctx.events(count);
    for event in &events {
        let mut tries = 0;
        while let Err(error) = ctx.within("publish", bus.publish(topic, event.clone())).await? {
            ensure!(error.kind().is_retryable(), "a publish fails for good: {error}");
            tries += 1;
            ensure!(tries < 1000, "a publish still fails after {tries} attempts: {error}");
            tokio::time::sleep(ctx.timing().backoff).await;
        }
    }
    Ok(ids(&events))
}

async fn severed(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("severed"), Recorder::new());
    let consumer = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "a");
    let mut sent = Vec::new();
    for _ in 0..3 {
        sent.extend(publish_until_confirmed(&ctx, &bus, &topic, 5).await?);
        ctx.eventually("all arrived", || recorder.distinct() == sent.len()).await?;
        inject(&ctx, Fault::Sever).await?;
        // A subscription made by somebody who has just been cut off is one like any other.
        let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
        let more = publish_until_confirmed(&ctx, &bus, &topic, 5).await?;
        let seen = ctx.collect_done(&mut late, 5).await?;
        at_least_once(&more, &seen)?;
        sent.extend(more);
        ctx.eventually("subscriptions carry on", || sent.iter().all(|id| recorder.saw(id))).await?;
    }
    ensure!(!consumer.handle().status().ended, "the subscription has ended");
    at_least_once(&sent, &recorder.ids())
}

async fn restarted(ctx: Ctx) -> Verdict {
    let (bus, topic, group, recorder) = (ctx.bus().await?, ctx.topic("restart"), ctx.group("g"), Recorder::new());
    let member = ctx.consume(ctx.subscribe(&bus, &topic, ctx.member(&group)).await?, &recorder, "a");
    let publishing = ctx.spawn({
        let (ctx, bus, topic) = (ctx.clone(), bus.clone(), topic.clone());
        async move { publish_until_confirmed(&ctx, &bus, &topic, 200).await }
    });
    ctx.eventually("load", || recorder.distinct() > 20).await?;
    inject(&ctx, Fault::Restart).await?;
    let sent = ctx.join("publishing", publishing).await??;
    ctx.eventually("all arrived", || recorder.distinct() >= sent.len()).await?;
    ctx.drained(&[&member]).await?;
    at_least_once(&sent, &recorder.ids())
}

async fn lost_peer(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("lost"));
    ctx.publish(&bus, &topic, 1).await?; // connected
    inject(&ctx, Fault::Outage).await?;
    let attempt = tokio::time::timeout(ctx.timing().quiet, bus.subscribe_with(&topic, ctx.fan_out().prefetch(1))).await;
    match attempt {
        Err(_) => {} // it waits; now it is dropped
        Ok(Err(error)) => ensure!(error.is_retryable(), "a subscribe in an outage fails for good: {error}"),
        Ok(Ok(subscription)) => drop(subscription),
    }
    inject(&ctx, Fault::Heal).await?;
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    // What was left attached without a consumer would be full by now.
    let sent = publish_until_confirmed(&ctx, &bus, &topic, 5).await?;
    exactly_once(&sent, &ctx.collect_done(&mut subscription, 5).await?)?;
    drop(subscription);
    ctx.eventually_async("no subscription is left", || async {
        Ok(matches!(bus.inspect(&topic).await?.fan_out, None | Some(0)))
    })
    .await
}

async fn cut_off(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("cut-off"), Recorder::new());
    let _consumer = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "a");
    inject(&ctx, Fault::Outage).await?;
    let events = ctx.events(3);
    let published = ctx.within("publish", bus.publish_with(&topic, &events, PublishOptions::new())).await?;
    inject(&ctx, Fault::Heal).await?;
    if let Err(error) = published {
        ensure!(error.kind().is_retryable(), "a publish in an outage fails for good: {error}");
        ensure_eq!(error.fates().len(), events.len(), "fates");
        let again: Vec<_> = error.unpublished().map(|place| events[place].clone()).collect();
        let mut tries = 0;
        while let Err(error) = ctx.within("publish", bus.publish_with(&topic, &again, PublishOptions::new())).await? {
            ensure!(tries < 1000 && error.kind().is_retryable(), "a repeated publish fails: {error}");
            tries += 1;
            tokio::time::sleep(ctx.timing().backoff).await;
        }
    }
    ctx.eventually("all arrived", || events.iter().all(|event| recorder.saw(event.id()))).await?;
    at_least_once(&ids(&events), &recorder.ids())
}

async fn dead_peer(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("killed"), ctx.group("g"));
    let processes = ctx.harness().processes().ok_or_else(|| Mismatch::new("no processes"))?;
    // The group exists, with everything in it, before the other process takes its part.
    let mut staying = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ctx.publish(&bus, &topic, 3).await?;
    let job = Job::Hold { topic: topic.clone(), group: group.clone(), count: 3 };
    let killed = ctx.within("another process", processes.start(job)).await??;
    ctx.within("the kill", killed.kill()).await??;
    let back = ctx.collect(&mut staying, 3).await?;
    exactly(&sent, &back)?;
    back.into_iter().for_each(|delivery| drop(delivery.done()));
    ctx.eventually_async("only one member is left", || async {
        let status = bus.inspect(&topic).await?;
        let left = status.groups.iter().find(|status| status.group == group).and_then(|status| status.members);
        Ok(matches!(left, None | Some(1)))
    })
    .await
}

async fn left_behind(ctx: Ctx) -> Verdict {
    let (topic, group) = (ctx.topic("again"), ctx.group("g"));
    for round in 0..3 {
        let bus = ctx.connect().await?;
        let mut status = bus.status();
        ensure!(
            ctx.within("connected", status.wait_for(|status| matches!(status, Status::Connected))).await?,
            "the bus is gone"
        );
        let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
        let member = match ctx.capabilities().supports(Capability::Groups) {
            true => Some(ctx.subscribe(&bus, &topic, ctx.member(&group)).await?),
            false => None,
        };
        let sent = ids(&ctx.publish(&bus, &topic, 3).await?);
        exactly_once(&sent, &ctx.collect_done(&mut subscription, 3).await?).map_err(|why| why.at(format!("round {round}")))?;
        if let Some(mut member) = member {
            exactly_once(&sent, &ctx.collect_done(&mut member, 3).await?).map_err(|why| why.at(format!("round {round}")))?;
        }
        ctx.within("close", bus.close(ctx.timing().patience)).await??;
    }
    Ok(())
}
