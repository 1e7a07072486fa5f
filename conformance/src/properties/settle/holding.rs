//! Holding: how long a delivery stays its consumer's, and what happens when it no longer is.

use std::time::Duration;

use pubsub_core::{Message, Settled};
use tokio::time::Instant;

use super::{GROUPS, Overdue, overdue, short_hold};
use crate::oracle::{Recorder, exactly_once, ids};
use crate::{Ctx, Fault, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(super) fn properties() -> Vec<Property> {
    vec![
        property(
            "AK-03",
            "What was done never comes back, not even when what was taken beside it does",
            &["S5", "S6"],
            done_for_good,
        )
        .needs([GROUPS]),
        property("AK-04", "What is never settled goes to another member when it was held for too long", &["S5"], never_settled)
            .needs([GROUPS]),
        property("AK-21", "A consumer that is alive and slow keeps its delivery", &["S5"], slow)
            .needs([GROUPS, Need::CrossInstance]),
        property("AK-22", "Nothing comes again between a settlement and its late confirmation", &["S5", "S6"], unconfirmed)
            .needs([GROUPS, Need::CrossInstance, Need::Fault(Fault::Delay(Duration::ZERO))]),
        property(
            "AK-23",
            "What a hung handler holds stays pending, and its own instance does not take it again",
            &["S5"],
            hung,
        )
        .needs([GROUPS, Need::Probe]),
        omitted(
            "AK-28",
            "A delivery lost between the decision to settle it and the write is not settled",
            &["S6"],
            "needs a hook inside the backend: the tests of the Redis backend, where both are one script, hold it",
        ),
        property("AK-29", "A late retry, dead letter or release by one that lost the delivery is refused", &["S6"], late)
            .needs([GROUPS]),
        property(
            "AK-30",
            "An extension starts the time anew, and one by a member that lost the delivery does nothing",
            &["S5", "S6"],
            extended,
        )
        .needs([GROUPS]),
        property(
            "AK-35",
            "What was held for too long is found behind hundreds of deliveries that others hold",
            &["S5"],
            behind_many,
        )
        .needs([GROUPS]),
    ]
}

async fn done_for_good(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("done"), ctx.group("g"));
    let mut first = ctx.subscribe(&bus, &topic, ctx.member(&group).max_hold(short_hold(&ctx))).await?;
    ctx.publish(&bus, &topic, 10).await?;
    let mut taken = ctx.collect(&mut first, 10).await?;
    let held = taken.split_off(9);
    for delivery in taken {
        ctx.confirmed(delivery.done()).await?;
    }
    let mut second = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    first.handle().stop();
    // What was taken last is overdue last: by then the others would have come.
    let found = ctx.next(&mut second).await?;
    ensure_eq!(found.event().id(), held[0].event().id(), "what comes back");
    ctx.confirmed(found.done()).await?;
    ctx.nothing_more(&bus, &topic, [&mut second]).await
}

async fn never_settled(ctx: Ctx) -> Verdict {
    let Overdue { bus, topic, lost, mut finder, found } = overdue(&ctx, ctx.member(&ctx.group("g")), 3).await?;
    exactly_once(&crate::oracle::delivered(&lost), &crate::oracle::delivered(&found))?;
    for delivery in found {
        ensure_eq!(delivery.attempt(), 2, "attempt");
        ctx.confirmed(delivery.done()).await?;
    }
    lost.into_iter().for_each(std::mem::forget);
    ctx.nothing_more(&bus, &topic, [&mut finder]).await
}

async fn slow(ctx: Ctx) -> Verdict {
    let (topic, group, recorder) = (ctx.topic("slow"), ctx.group("g"), Recorder::new());
    let work = ctx.timing().reclaim.mul_f64(1.5);
    let mut members = Vec::new();
    for name in ["one", "other"] {
        let (bus, journal) = (ctx.connect().await?, recorder.clone());
        // Each goes on asking while it works.
        let handler = move |message: Message| {
            journal.event(name, message.event(), message.attempt());
            async move {
                tokio::time::sleep(work).await;
                Ok(())
            }
        };
        members.push(ctx.within("subscribe", bus.on(&topic, ctx.member(&group), 4, handler)).await??);
    }
    let sent = ctx.publish(&ctx.bus().await?, &topic, 3).await?;
    ctx.eventually("all arrived", || recorder.distinct() == sent.len()).await?;
    for member in members {
        ctx.within("drained", member.handle().drained()).await?;
        let report = ctx.within("stop", member.stop()).await??;
        ensure_eq!((report.retried, report.revoked), (0, 0), "retried and revoked");
        ctx.all_confirmed(&report)?;
    }
    exactly_once(&ids(&sent), &recorder.ids())
}

async fn unconfirmed(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("unconfirmed"), ctx.group("g"));
    let (recorder, reclaim) = (Recorder::new(), ctx.timing().reclaim);
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.publish(&bus, &topic, 1).await?;
    let held = ctx.next(&mut member).await?;
    let other = ctx.connect().await?;
    let other = ctx.subscribe(&other, &topic, ctx.member(&group)).await?;
    let other = ctx.consume(other, &recorder, "other");
    let same = ctx.consume(member, &recorder, "same");
    // Held for longer than a dead member could, so that whoever lets go too early is found out in the gap.
    tokio::time::sleep(reclaim.mul_f64(1.2)).await;
    if let Some(faults) = ctx.harness().faults() {
        ctx.within("a fault", faults.inject(Fault::Delay(reclaim / 3))).await??;
    }
    let answer = ctx.answer(held.done()).await?;
    if let Some(faults) = ctx.harness().faults() {
        ctx.within("healing", faults.inject(Fault::Heal)).await??;
    }
    ensure!(answer != Settled::TooLate, "the settlement of what was held all the time was answered {answer:?}");
    ctx.drained(&[&same, &other]).await?;
    ensure_eq!(recorder.log(), Vec::new(), "deliveries after the first");
    Ok(())
}

async fn hung(ctx: Ctx) -> Verdict {
    let (bus, topic, group, recorder) = (ctx.bus().await?, ctx.topic("hung"), ctx.group("g"), Recorder::new());
    let member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let hands = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let keep = hands.clone();
    let member = ctx.consume_with(member, &recorder, "hung", move |delivery| {
        keep.lock().push(delivery);
        std::future::ready(())
    });
    let sent = ctx.publish(&bus, &topic, 1).await?;
    ctx.eventually("it is taken", || recorder.count() == 1).await?;
    let until = Instant::now() + ctx.timing().reclaim.mul_f64(1.5);
    while Instant::now() < until {
        if let Some(probe) = ctx.harness().probe() {
            ensure_eq!(ctx.within("a probe", probe.pending(&topic, &group)).await??, 1, "pending");
        }
        tokio::time::sleep(ctx.timing().quiet).await;
    }
    exactly_once(&ids(&sent), &recorder.ids())?;
    let held = std::mem::take(&mut *hands.lock());
    for delivery in held {
        ctx.confirmed(delivery.done()).await?;
    }
    ctx.drained(&[&member]).await?;
    exactly_once(&ids(&sent), &recorder.ids())
}

async fn late(ctx: Ctx) -> Verdict {
    let dead = ctx.topic("dead");
    let mut letters = ctx.subscribe(&ctx.bus().await?, &dead, ctx.fan_out()).await?;
    let options = ctx.member(&ctx.group("g")).dead_letter(dead.clone());
    let Overdue { bus, topic, lost, mut finder, found } = overdue(&ctx, options, 4).await?;
    for (place, delivery) in lost.into_iter().enumerate() {
        let receipt = match place {
            0 => delivery.retry(),
            1 => delivery.dead_letter("late"),
            2 => delivery.release(),
            _ => delivery.retry_after(Duration::ZERO),
        };
        ctx.refused(receipt).await.map_err(|why| why.at(format!("settlement {place}")))?;
    }
    ensure_eq!(finder.status().held, 4, "held by the one that got them");
    for delivery in found {
        ensure_eq!(delivery.attempt(), 2, "attempt");
        ctx.confirmed(delivery.done()).await?;
    }
    ctx.nothing_more(&bus, &topic, [&mut finder]).await?;
    ctx.nothing_more(&bus, &dead, [&mut letters]).await
}

async fn extended(ctx: Ctx) -> Verdict {
    let (bus, topic, group, recorder) = (ctx.bus().await?, ctx.topic("extended"), ctx.group("g"), Recorder::new());
    let hold = short_hold(&ctx);
    let mut holder = ctx.subscribe(&bus, &topic, ctx.member(&group).max_hold(hold)).await?;
    ctx.publish(&bus, &topic, 1).await?;
    let held = ctx.next(&mut holder).await?;
    let until = Instant::now() + hold.mul_f64(1.5);
    let other = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let other = ctx.consume(other, &recorder, "other");
    holder.handle().stop();
    while Instant::now() < until {
        ctx.confirmed(held.extend()).await?;
        tokio::time::sleep(hold / 20).await;
    }
    ensure_eq!(recorder.log(), Vec::new(), "deliveries to the other member");
    ctx.confirmed(held.done()).await?;
    ctx.drained(&[&other]).await?;
    ensure_eq!(recorder.log(), Vec::new(), "deliveries to the other member");

    let Overdue { bus, topic, lost, mut finder, found } = overdue(&ctx, ctx.member(&group), 1).await?;
    ctx.refused(lost[0].extend()).await?;
    for delivery in found {
        ctx.confirmed(delivery.done()).await?;
    }
    ctx.nothing_more(&bus, &topic, [&mut finder]).await
}

async fn behind_many(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("many"), ctx.group("g"));
    let mut holds = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.publish_all(&bus, &topic, &ctx.events(250)).await?;
    let many = ctx.collect(&mut holds, 250).await?;
    let mut forgets = ctx.subscribe(&bus, &topic, ctx.member(&group).max_hold(short_hold(&ctx))).await?;
    holds.handle().stop();
    let sent = ctx.publish(&bus, &topic, 1).await?;
    let forgotten = ctx.next(&mut forgets).await?;
    exactly(&sent, [&forgotten])?;
    let mut finds = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    forgets.handle().stop();
    let found = ctx.next(&mut finds).await?;
    exactly(&sent, [&found])?;
    ctx.confirmed(found.done()).await?;
    for delivery in many {
        ctx.confirmed(delivery.done()).await?;
    }
    ctx.nothing_more(&bus, &topic, [&mut finds]).await
}
