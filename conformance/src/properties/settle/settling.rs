//! Settlements: that they count, from anywhere, and what they answer.

use std::time::Duration;

use pubsub_core::{AckMode, Delivery, Filter, Group, Settled, Topic};

use super::{GROUPS, both, by_hand};
use crate::oracle::{Recorder, delivered, exactly_once, ids};
use crate::{Ctx, FENCE, Fault, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(super) fn properties() -> Vec<Property> {
    vec![
        property("AK-10", "A settlement counts when it is recorded, before its receipt is polled", &["S6"], recorded_at_once)
            .needs([GROUPS]),
        property("AK-11", "A receipt dropped unpolled settles all the same", &["S6"], unpolled).needs([GROUPS]),
        property("AK-13", "A delivery can be settled later, from another task or from a thread of its own", &["S6"], elsewhere)
            .needs([GROUPS]),
        property("AK-15", "Settling after close is a no-op that says so", &["C2"], after_close).needs([GROUPS]),
        omitted(
            "AK-18",
            "Fan-out needs no object on the server: nothing of it is pending or listed there",
            &["C2"],
            "only the server can tell: the tests of the Redis backend hold it",
        ),
        property("AK-31", "What a filter rejects is settled at once and counted nowhere", &["B7"], filtered).needs([GROUPS]),
        property("AK-32", "If a retry cannot be written, the event is not lost", &["S2", "S6"], unwritten)
            .needs([GROUPS, Need::Fault(Fault::FailWrites(1))]),
        property(
            "AK-33",
            "An entry that cannot be decoded is settled out of the way, and later events flow",
            &["S7"],
            malformed,
        )
        .needs([GROUPS, Need::RawInjection]),
        omitted(
            "AK-36",
            "An entry that reaches the wrong process is given back and not acknowledged",
            &["S7"],
            "only a service that routes on its own does this: the tests of the Google backend hold it",
        ),
        omitted(
            "AK-37",
            "Where a service delivers exactly once, nothing comes again in the window after an acknowledgement",
            &["S6"],
            "no backend declares it; it is an option of a subscription on Google, whose own tests hold it",
        ),
        property(
            "AK-38",
            "With one delivery in flight, the second comes only after the first is settled",
            &["B5"],
            one_in_flight,
        )
        .needs([GROUPS]),
        property("AK-41", "Each settlement takes exactly one from what is held", &["S6"], counted_down).needs([GROUPS]),
        property("AK-42", "Read as a stream, fan-out is settled by being handed over", &["S1"], settled_by_hand_over),
        property(
            "AK-43",
            "`ack_mode` overrides who settles: a group's stream too can be settled by hand-over",
            &["S1"],
            automatic,
        )
        .needs([GROUPS]),
    ]
}

async fn recorded_at_once(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for options in both(&ctx) {
        let topic = ctx.topic("recorded");
        let mut subscription = ctx.subscribe(&bus, &topic, options.max_in_flight(1)).await?;
        let sent = ctx.publish(&bus, &topic, 2).await?;
        let (mut receipts, mut seen) = (Vec::new(), Vec::new());
        while seen.len() < 4 {
            let delivery = ctx.next(&mut subscription).await?;
            seen.push((delivery.event().id().clone(), delivery.attempt()));
            receipts.push(if delivery.attempt() == 1 { delivery.retry() } else { delivery.done() });
        }
        let (first, second): (Vec<_>, Vec<_>) = seen.into_iter().partition(|(_, attempt)| *attempt == 1);
        for (attempt, seen) in [(1, first), (2, second)] {
            let seen: Vec<_> = seen.into_iter().map(|(id, _)| id).collect();
            exactly_once(&ids(&sent), &seen).map_err(|why| why.at(format!("attempt {attempt}")))?;
        }
        for receipt in receipts {
            ctx.confirmed(receipt).await?;
        }
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    }
    Ok(())
}

async fn unpolled(ctx: Ctx) -> Verdict {
    let (bus, dead) = (ctx.bus().await?, ctx.topic("dead"));
    let mut letters = ctx.subscribe(&bus, &dead, ctx.fan_out()).await?;
    for options in both(&ctx) {
        let topic = ctx.topic("unpolled");
        // With one in flight, the next is handed over only because the one before was settled.
        let mut subscription = ctx.subscribe(&bus, &topic, options.max_in_flight(1).dead_letter(dead.clone())).await?;
        ctx.publish(&bus, &topic, 1).await?;
        drop(ctx.next(&mut subscription).await?.retry());
        let retried = ctx.next(&mut subscription).await?;
        ensure_eq!(retried.attempt(), 2, "attempt after a retry");
        drop(retried.release());
        let released = ctx.next(&mut subscription).await?;
        ensure_eq!(released.attempt(), 2, "attempt after a release");
        drop(released.dead_letter("no use"));
        drop(ctx.next(&mut letters).await?);
        ctx.publish(&bus, &topic, 1).await?;
        drop(ctx.next(&mut subscription).await?.done());
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    }
    ctx.nothing_more(&bus, &dead, [&mut letters]).await
}

async fn elsewhere(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for options in both(&ctx) {
        let topic = ctx.topic("elsewhere");
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        let sent = ctx.publish(&bus, &topic, 4).await?;
        let deliveries = ctx.collect(&mut subscription, 4).await?;
        exactly(&sent, &deliveries)?;
        let retried = delivered(&deliveries[..2]);
        for (place, delivery) in deliveries.into_iter().enumerate() {
            let settle = move || drop(if place < 2 { delivery.retry() } else { delivery.done() });
            if place % 2 == 0 {
                ctx.join("a task that settles", ctx.spawn(async move { settle() })).await?;
            } else {
                std::thread::spawn(settle); // which knows no runtime
            }
        }
        let again = ctx.collect(&mut subscription, 2).await?;
        exactly_once(&retried, &delivered(&again))?;
        for delivery in again {
            let answer = ctx.spawn(delivery.done());
            let answer = ctx.join("a task that settles", answer).await?;
            ensure!(ctx.is_done(answer), "answer in another task: {answer:?}");
        }
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    }
    Ok(())
}

async fn after_close(ctx: Ctx) -> Verdict {
    for options in both(&ctx) {
        let (bus, topic) = (ctx.connect().await?, ctx.topic("closed"));
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        ctx.publish(&bus, &topic, 6).await?;
        let mut held = ctx.collect(&mut subscription, 6).await?.into_iter();
        ctx.within("close", bus.close(Duration::ZERO)).await??;
        let mut next = || held.next().ok_or_else(|| Mismatch::new("six were held"));
        let extended = next()?;
        let receipts = [
            ("done", next()?.done()),
            ("retry", next()?.retry()),
            ("release", next()?.release()),
            ("dead letter", next()?.dead_letter("late")),
            ("extension", extended.extend()),
        ];
        drop((next()?, extended));
        for (what, receipt) in receipts {
            let answer = ctx.answer(receipt).await?;
            ensure!(answer != Settled::Done, "{what} after close was answered {answer:?}");
        }
        ctx.ended(&mut subscription).await?;
    }
    Ok(())
}

async fn filtered(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("filtered"), ctx.group("g"));
    let filter = Filter::types([FENCE, "conformance.event"])
        .and(|event| event.event_type() == FENCE || event.data::<u64>().is_ok_and(|number| *number % 10 == 0));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group).max_in_flight(2).filter(filter)).await?;
    let sent = ctx.publish(&bus, &topic, 50).await?;
    let wanted: Vec<_> =
        sent.iter().filter(|event| event.data::<u64>().is_ok_and(|number| *number % 10 == 0)).cloned().collect();
    let arrived = ctx.collect_done(&mut member, wanted.len()).await?;
    exactly_once(&ids(&wanted), &arrived)?;
    ctx.nothing_more(&bus, &topic, [&mut member]).await?;
    let status = member.status();
    ensure_eq!((status.held, status.dropped, status.dead_lettered), (0, 0, 0), "held, dropped and dead-lettered");
    held_is(&ctx, &topic, &group, 0).await
}

/// Holds everything that can tell how many deliveries of a group are held to this number.
async fn held_is(ctx: &Ctx, topic: &Topic, group: &Group, expected: u64) -> Verdict {
    let status = ctx.within("inspect", ctx.bus().await?.inspect(topic)).await??;
    if let Some(held) = status.groups.iter().find(|status| status.group == *group).and_then(|status| status.held) {
        ensure_eq!(held, expected, "held, as the bus tells");
    }
    if let Some(probe) = ctx.harness().probe() {
        let pending = ctx.within("a probe", probe.pending(topic, group)).await??;
        ensure_eq!(pending, expected, "pending, as the probe tells");
    }
    Ok(())
}

async fn unwritten(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("unwritten"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&ctx.group("g"))).await?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    let held = ctx.next(&mut member).await?;
    if let Some(faults) = ctx.harness().faults() {
        ctx.within("a fault", faults.inject(Fault::FailWrites(1))).await??;
    }
    let receipt = held.retry();
    let again = ctx.next(&mut member).await?;
    exactly(&sent, [&again])?;
    ensure!(again.attempt() >= 2, "attempt {} after a retry", again.attempt());
    ctx.answer(receipt).await?;
    ctx.confirmed(again.done()).await?;
    ctx.nothing_more(&bus, &topic, [&mut member]).await
}

async fn malformed(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("malformed"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&ctx.group("g"))).await?;
    let mut fan_out = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    if let Some(raw) = ctx.harness().raw() {
        for bytes in [&b"\xff{ not json"[..], b"[]", b""] {
            ctx.within("an injection", raw.inject(&topic, bytes)).await??;
        }
    }
    let sent = ctx.publish(&bus, &topic, 3).await?;
    exactly_once(&ids(&sent), &ctx.collect_done(&mut member, sent.len()).await?)?;
    exactly(&sent, &ctx.collect(&mut fan_out, sent.len()).await?)?;
    let handle = member.handle();
    ctx.eventually("the malformed entries are counted", || handle.status().dropped == 3).await?;
    ctx.nothing_more(&bus, &topic, [&mut member, &mut fan_out]).await
}

async fn one_in_flight(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for options in both(&ctx) {
        let topic = ctx.topic("single");
        let mut single = ctx.subscribe(&bus, &topic, options.max_in_flight(1)).await?;
        let mut observer = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
        let sent = ctx.publish(&bus, &topic, 3).await?;
        exactly(&sent, &ctx.collect(&mut observer, 3).await?)?;
        let mut seen = Vec::new();
        for _ in &sent {
            let held = ctx.next(&mut single).await?;
            ctx.quiet(&mut single).await.map_err(|why| why.at("with one in flight"))?;
            seen.push(held.event().id().clone());
            drop(held.done());
        }
        exactly_once(&ids(&sent), &seen)?;
        ctx.nothing_more(&bus, &topic, [&mut single]).await?;
    }
    Ok(())
}

async fn counted_down(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("counted"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.publish(&bus, &topic, 5).await?;
    let held = ctx.collect(&mut member, 5).await?;
    held_is(&ctx, &topic, &group, 5).await?;
    for (left, delivery) in (0..5).rev().zip(held) {
        ctx.confirmed(delivery.done()).await?;
        ensure_eq!(member.status().held, left, "held, as the subscription tells");
        held_is(&ctx, &topic, &group, left).await?;
    }
    ctx.nothing_more(&bus, &topic, [&mut member]).await
}

async fn settled_by_hand_over(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("stream"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().max_in_flight(1)).await?;
    let sent = ctx.publish(&bus, &topic, 4).await?;
    let deliveries = ctx.collect(&mut subscription, 4).await?;
    exactly(&sent, &deliveries)?;
    ensure!(deliveries.iter().all(Delivery::is_settled), "not settled: {deliveries:?}");
    ensure_eq!(subscription.status().held, 0, "held");
    let answers = deliveries.into_iter().enumerate().map(|(place, delivery)| match place {
        0 => (Settled::TooLate, delivery.retry()),
        1 => (Settled::TooLate, delivery.dead_letter("late")),
        _ => (Settled::Done, delivery.done()),
    });
    for (expected, receipt) in answers.collect::<Vec<_>>() {
        ensure_eq!(ctx.answer(receipt).await?, expected, "answer");
    }
    ctx.nothing_more(&bus, &topic, [&mut subscription]).await
}

async fn automatic(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("automatic"));
    let options = ctx.member(&ctx.group("g")).max_in_flight(1).ack_mode(AckMode::Auto);
    let mut member = ctx.subscribe(&bus, &topic, options).await?;
    let sent = ctx.publish(&bus, &topic, 4).await?;
    let deliveries = ctx.collect(&mut member, 4).await?;
    exactly(&sent, &deliveries)?;
    ensure!(deliveries.iter().all(Delivery::is_settled), "not settled: {deliveries:?}");
    drop(deliveries);
    ctx.nothing_more(&bus, &topic, [&mut member]).await?;

    // The other way round: fan-out by hand.
    let mut by_hand = ctx.subscribe(&bus, &topic, by_hand(&ctx)).await?;
    let recorder = Recorder::new();
    ctx.publish(&bus, &topic, 1).await?;
    for _ in 0..2 {
        let delivery = ctx.next(&mut by_hand).await?;
        ensure!(!delivery.is_settled(), "settled by hand-over: {delivery:?}");
        recorder.received("by hand", &delivery);
        if delivery.attempt() == 2 {
            drop(delivery.done());
        }
    }
    crate::oracle::counted_attempts(&recorder.attempts())?;
    ctx.nothing_more(&bus, &topic, [&mut by_hand]).await
}
