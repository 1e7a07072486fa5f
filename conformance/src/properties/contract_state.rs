//! State that can be asked for and outlives what made it: cursors, leases, inspection, status, handles.

use std::time::Duration;

use pubsub_core::{
    AckMode, Acquired, Bus, Capability, Group, GroupStatus, Retention, Start, Status, SubscribeOptions, Subscription, Topic,
};

use crate::oracle::{delivered, ids};
use crate::{Ctx, Fault, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const GROUPS: Need = Need::Capability(Capability::Groups);
    vec![
        property("AD-06", "Every entry of a page of history is a place to resume from", &["B3", "R1"], resumes_from_pages)
            .needs([Capability::History.into()]),
        property(
            "AD-08",
            "An owner who slept through the end of a lease has a smaller token than the next",
            &["L1", "L2"],
            paused_owner,
        )
        .needs([Capability::Leases.into()]),
        property(
            "AD-09",
            "Inspection counts what waits, what is held and who is there, and says so when it cannot know",
            &["B2"],
            inspection,
        )
        .needs([GROUPS]),
        property("AD-10", "The status tells an outage while it lasts", &["N1"], outage).needs([Need::Fault(Fault::Outage)]),
        property(
            "AD-12",
            "Subscriptions outlive the handle they were made with, and nothing outlives both",
            &["B2", "C3"],
            without_handle,
        )
        .needs([Need::CrossInstance]),
        property("AD-20", "A bus that works says so, and a closed one that it is closed", &["N1", "C2"], status),
        property("AD-21", "Dead letters come in pages, and a group resumes from any of them", &["S4", "B3"], letters_in_pages)
            .needs([Capability::DeadLetterHistory.into(), GROUPS]),
        omitted(
            "META-3",
            "Every property fails a bus that is wrong in the way it is about",
            &[],
            "concerns the suite, not a bus; its saboteur tests hold it",
        ),
        omitted(
            "META-4",
            "What must not arrive is proven by a fence that must",
            &[],
            "concerns how properties are written, not a bus",
        ),
        omitted(
            "META-5",
            "A decorator over a bus has every property that bus has",
            &[],
            "a decorator over a bus is a harness of its own, held to all properties",
        ),
    ]
}

/// Reads all pages of a topic from the earliest on, a few entries each.
async fn pages(ctx: &Ctx, bus: &Bus, topic: &Topic) -> Verdict<Vec<(pubsub_core::Cursor, pubsub_core::EventId)>> {
    let (mut entries, mut from) = (Vec::new(), Start::Earliest);
    loop {
        let page = ctx.within("a page", bus.history(topic, from, 3)).await??;
        ensure!(page.entries.len() <= 3, "{} entries in a page of three", page.entries.len());
        entries.extend(page.entries.into_iter().map(|(cursor, event)| (cursor, event.id().clone())));
        match page.next {
            Some(next) => from = Start::After(next),
            None => {
                ensure_eq!(page.head.as_ref(), entries.last().map(|(cursor, _)| cursor), "the newest position");
                ensure_eq!(page.floor.as_ref(), entries.first().map(|(cursor, _)| cursor), "the oldest position");
                return Ok(entries);
            }
        }
        ensure!(entries.len() < 1000, "pages without end");
    }
}

async fn resumes_from_pages(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("history"));
    let sent = ids(&ctx.publish(&bus, &topic, 7).await?);
    let entries = pages(&ctx, &bus, &topic).await?;
    ensure_eq!(entries.iter().map(|(_, id)| id.clone()).collect::<Vec<_>>(), sent, "the history");
    for (place, (cursor, _)) in entries.iter().enumerate() {
        // As text, which is how applications keep them.
        let cursor = cursor.to_string().parse()?;
        let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::After(cursor))).await?;
        let rest = delivered(&ctx.collect(&mut subscription, sent.len() - place - 1).await?);
        ensure_eq!(rest, sent[place + 1..], "behind entry {place}");
    }
    Ok(())
}

async fn letters_in_pages(ctx: Ctx) -> Verdict {
    let (bus, topic, dead) = (ctx.bus().await?, ctx.topic("work"), ctx.topic("dead"));
    let options = ctx.member(&ctx.group("g")).dead_letter(dead.clone());
    let mut member = ctx.subscribe(&bus, &topic, options).await?;
    ctx.publish(&bus, &topic, 7).await?;
    for delivery in ctx.collect(&mut member, 7).await? {
        ctx.confirmed(delivery.dead_letter("as it should be")).await?;
    }
    let entries = pages(&ctx, &bus, &dead).await?;
    ensure_eq!(entries.len(), 7, "letters");
    for (place, (cursor, _)) in entries.iter().enumerate().step_by(2) {
        let cursor = cursor.to_string().parse()?;
        let options = ctx.member(&ctx.group("reader")).start(Start::After(cursor));
        let mut reader = ctx.subscribe(&bus, &dead, options).await?;
        let rest = ctx.collect_done(&mut reader, entries.len() - place - 1).await?;
        let wanted: Vec<_> = entries[place + 1..].iter().map(|(_, id)| id.clone()).collect();
        ensure_eq!(rest, wanted, "behind letter {place}");
    }
    Ok(())
}

async fn paused_owner(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let leases = bus.leases().ok_or_else(|| Mismatch::new("no leases"))?;
    let (key, ttl) = (ctx.topic("lease").to_string(), ctx.timing().hold);
    let Acquired::Yes(first) = ctx.within("acquire", leases.acquire(&key, "paused", ttl)).await?? else {
        return Err(Mismatch::new("a key nobody knew is held"));
    };
    // Its owner sleeps; the next one gets it once its time is over.
    let long = 10 * ctx.timing().patience;
    let next = parking_lot::Mutex::new(None);
    ctx.eventually_async("the lease runs out", || async {
        Ok(match leases.acquire(&key, "next", long).await? {
            Acquired::Yes(lease) => next.lock().replace(lease).is_none(),
            Acquired::HeldBy(holder) => {
                ensure_eq!(holder.owner, "paused", "the holder meanwhile");
                false
            }
        })
    })
    .await?;
    let next = next.into_inner().ok_or_else(|| Mismatch::new("no lease"))?;
    ensure!(next.token > first.token, "the next owner's token {} is not above {}", next.token, first.token);
    // It wakes up: nothing it does concerns the next owner.
    let renewed = ctx.within("renew", leases.renew(&key, "paused", ttl)).await??;
    ensure_eq!(renewed, None, "renewed by an owner who lost it");
    let again = ctx.within("acquire", leases.acquire(&key, "paused", ttl)).await??;
    let Acquired::HeldBy(holder) = again else { return Err(Mismatch::new("two owners of one lease")) };
    ensure_eq!((holder.owner.as_str(), holder.token), ("next", next.token), "the holder");
    ensure!(!ctx.within("release", leases.release(&key, "paused")).await??, "released by an owner who lost it");
    ensure!(ctx.within("release", leases.release(&key, "next")).await??, "not released by its owner");
    Ok(())
}

/// What a bus says about a group.
async fn group_status(ctx: &Ctx, bus: &Bus, topic: &Topic, group: &Group) -> Verdict<Option<GroupStatus>> {
    let status = ctx.within("inspect", bus.inspect(topic)).await??;
    Ok(status.groups.into_iter().find(|status| status.group == *group))
}

/// Holds a group to these numbers, as far as the bus knows them.
async fn counts(ctx: &Ctx, bus: &Bus, topic: &Topic, group: &Group, waiting: u64, held: u64, members: u64) -> Verdict {
    let wanted = (waiting, held, members, waiting + held > 0);
    ctx.eventually_async(format!("(waiting, held, members, whether any is oldest) {wanted:?}"), || async {
        let Some(status) = group_status(ctx, bus, topic, group).await? else { return Ok(false) };
        let fits = |known: Option<u64>, wanted: u64| known.is_none_or(|known| known == wanted);
        // An age is of something; where nothing is left there is none.
        let oldest = status.oldest.is_none() || waiting + held > 0;
        Ok(fits(status.waiting, waiting) && fits(status.held, held) && fits(status.members, members) && oldest)
    })
    .await
}

async fn inspection(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("inspect"), ctx.group("g"));
    let nothing = ctx.within("inspect", bus.inspect(&topic)).await??;
    ensure!(nothing.groups.is_empty(), "an unknown topic has groups: {nothing:?}");
    ensure!(matches!((nothing.retained, nothing.fan_out), (None | Some(0), None | Some(0))), "an unknown topic: {nothing:?}");

    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let idle = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let listener = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    counts(&ctx, &bus, &topic, &group, 0, 0, 2).await?;
    ctx.publish(&bus, &topic, 3).await?;
    counts(&ctx, &bus, &topic, &group, 3, 0, 2).await?;
    let mut held = ctx.collect(&mut member, 2).await?;
    counts(&ctx, &bus, &topic, &group, 1, 2, 2).await?;
    let status = ctx.within("inspect", bus.inspect(&topic)).await??;
    ensure!(matches!(status.fan_out, None | Some(1)), "fan-out subscriptions: {:?}", status.fan_out);
    match ctx.capabilities().retention {
        Retention::Nothing => ensure!(matches!(status.retained, None | Some(0)), "retained: {:?}", status.retained),
        Retention::History => ensure!(matches!(status.retained, None | Some(3)), "retained: {:?}", status.retained),
        _ => {}
    }
    // The oldest is no younger than the time since it was seen.
    let before = group_status(&ctx, &bus, &topic, &group).await?.and_then(|status| status.oldest);
    let wait = ctx.timing().backoff;
    tokio::time::sleep(wait).await;
    let after = group_status(&ctx, &bus, &topic, &group).await?.and_then(|status| status.oldest);
    if let (Some(before), Some(after)) = (before, after) {
        // Clocks that stamp count milliseconds.
        ensure!(after + Duration::from_millis(2) >= before + wait, "{before:?} old, and {wait:?} later {after:?}");
    }
    // A retry waits, a settled one is gone, and so is a member that left.
    ctx.confirmed(held.remove(0).retry_after(10 * ctx.timing().patience)).await?;
    counts(&ctx, &bus, &topic, &group, 2, 1, 2).await?;
    ctx.confirmed(held.remove(0).done()).await?;
    ctx.within("unsubscribe", idle.unsubscribe()).await?;
    counts(&ctx, &bus, &topic, &group, 2, 0, 1).await?;
    drop(listener);
    ctx.eventually_async("the listener is gone", || async { Ok(matches!(bus.inspect(&topic).await?.fan_out, None | Some(0))) })
        .await
}

async fn outage(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("outage"));
    let faults = ctx.harness().faults().ok_or_else(|| Mismatch::new("no faults"))?;
    let _subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut status = bus.status();
    for _ in 0..2 {
        let connected = status.wait_for(|status| matches!(status, Status::Connected));
        ensure!(ctx.within("connected", connected).await?, "the bus is gone");
        ctx.within("an outage", faults.inject(Fault::Outage)).await??;
        let reconnecting = status.wait_for(|status| matches!(status, Status::Reconnecting { .. }));
        ensure!(ctx.within("reconnecting", reconnecting).await?, "the bus is gone");
        ctx.within("healing", faults.inject(Fault::Heal)).await??;
    }
    let connected = status.wait_for(|status| matches!(status, Status::Connected));
    ensure!(ctx.within("connected again", connected).await?, "the bus is gone");
    Ok(())
}

async fn status(ctx: Ctx) -> Verdict {
    let bus = ctx.connect().await?;
    let (mut early, mut late) = (bus.status(), bus.status());
    let connected = early.wait_for(|status| matches!(status, Status::Connected));
    ensure!(ctx.within("connected", connected).await?, "the bus is gone");
    ctx.within("close", bus.close(Duration::ZERO)).await??;
    ensure!(matches!(bus.status().get(), Status::Closed), "a closed bus is {:?}", bus.status().get());
    let closed = early.wait_for(|status| matches!(status, Status::Closed));
    ensure!(ctx.within("closed", closed).await?, "the bus is gone");
    // Whoever only waits for changes hears of it as well, and once, however often it is closed.
    loop {
        match ctx.within("a change", late.changed()).await? {
            Some(Status::Closed) => break,
            change => ensure!(change.is_some(), "the bus is gone without a word"),
        }
    }
    ctx.within("close", bus.close(Duration::ZERO)).await??;
    drop(bus);
    let more = ctx.within("the end of the status", late.changed()).await?;
    ensure!(more.is_none(), "{more:?} after it was closed");
    Ok(())
}

async fn without_handle(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    // One round first: what a bus keeps for its other instances is not this one's.
    let mut before = None;
    for _ in 0..3 {
        let (own, topic) = (ctx.connect().await?, ctx.topic("orphans"));
        let options: SubscribeOptions = ctx.fan_out().ack_mode(AckMode::Manual);
        let mut subscriptions: Vec<Subscription> = vec![ctx.subscribe(&own, &topic, options).await?];
        if ctx.capabilities().supports(Capability::Groups) {
            subscriptions.push(ctx.subscribe(&own, &topic, ctx.member(&ctx.group("g"))).await?);
        }
        drop(own);
        let sent = ctx.publish(&bus, &topic, 3).await?;
        for subscription in &mut subscriptions {
            let mut first = ctx.collect(subscription, 3).await?;
            exactly(&sent, &first)?;
            // Settling works as ever, retries included.
            let again = first.remove(0);
            let id = again.event().id().clone();
            ctx.confirmed(again.retry()).await?;
            for delivery in first {
                ctx.confirmed(delivery.done()).await?;
            }
            let again = ctx.next(subscription).await?;
            ensure_eq!((again.event().id(), again.attempt()), (&id, 2), "what came back");
            ctx.confirmed(again.done()).await?;
        }
        drop(subscriptions);
        ctx.eventually_async("no subscription is left", || async {
            Ok(matches!(bus.inspect(&topic).await?.fan_out, None | Some(0)))
        })
        .await?;
        let limit = *before.get_or_insert_with(|| ctx.alive_tasks());
        ctx.eventually("no task is left", || ctx.alive_tasks() <= limit).await?;
    }
    Ok(())
}
