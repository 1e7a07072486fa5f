//! Giving up: exhausted attempts and dead letters.

use pubsub_core::{Capability, ErrorKind, Failure, Origin, Start, SubscribeOptions};

use super::{GROUPS, both};
use crate::oracle::{Recorder, counted_attempts, exactly_once, ids};
use crate::{Ctx, Need, Property, Verdict, ensure, ensure_eq, property};

const LETTERS: Capability = Capability::DeadLetterHistory;

pub(super) fn properties() -> Vec<Property> {
    vec![
        property(
            "AK-06",
            "What keeps failing is handed over as often as the policy says, then dropped and counted",
            &["S4"],
            exhausted,
        )
        .needs([GROUPS]),
        property("AK-07", "Without a limit of attempts an event keeps coming back", &["S4"], endless).needs([GROUPS]),
        property("AK-08", "A policy more patient than the default gets all its attempts", &["S4"], patient).needs([GROUPS]),
        property("AK-09", "Success at the last attempt is success: no dead letter, no further delivery", &["S4"], last_chance)
            .needs([GROUPS]),
        property(
            "AK-44",
            "Dead letters are listed in order, and each is redriven until it is handled, once",
            &["S4"],
            redriven,
        )
        .needs([LETTERS.into()]),
        property("AK-45", "Where dead letters are not kept, redriving is unsupported", &["S4", "K1"], not_kept)
            .needs([Need::Without(LETTERS)]),
        property("AK-46", "What cannot be handled is dead-lettered at once, or dropped and counted", &["S4"], at_once)
            .needs([GROUPS]),
        property("AK-47", "The member about to hand over judges exhaustion, by its own policy", &["S4"], its_own_policy)
            .needs([GROUPS]),
    ]
}

/// Retries one event as often as it may come, and holds it to being dropped after so many attempts.
async fn attempts(ctx: &Ctx, options: SubscribeOptions, expected: u32) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("fails"));
    let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
    ctx.publish(&bus, &topic, 1).await?;
    for attempt in 1..=expected {
        let delivery = ctx.next(&mut subscription).await?;
        ensure_eq!(delivery.attempt(), attempt, "attempt");
        drop(delivery.retry());
    }
    ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    let status = subscription.status();
    ensure_eq!((status.dropped, status.dead_lettered, status.delayed), (1, 0, 0), "dropped, dead-lettered and delayed");
    Ok(())
}

async fn exhausted(ctx: Ctx) -> Verdict {
    for options in both(&ctx) {
        attempts(&ctx, options.clone(), 5).await?;
        attempts(&ctx, options.clone().retry(ctx.retry().max_attempts(2)), 2).await?;
        attempts(&ctx, options.retry(ctx.retry().max_attempts(1)), 1).await?;
    }
    Ok(())
}

async fn endless(ctx: Ctx) -> Verdict {
    let (bus, base) = (ctx.bus().await?, ctx.timing().backoff);
    for options in both(&ctx) {
        let (topic, recorder) = (ctx.topic("endless"), Recorder::new());
        let options = options.retry(ctx.retry().max_attempts(0).backoff(base, base));
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        ctx.publish(&bus, &topic, 1).await?;
        for _ in 0..12 {
            let delivery = ctx.next(&mut subscription).await?;
            recorder.received("it", &delivery);
            drop(delivery.retry());
        }
        drop(ctx.next(&mut subscription).await?.done());
        counted_attempts(&recorder.attempts())?;
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    }
    Ok(())
}

async fn patient(ctx: Ctx) -> Verdict {
    let base = ctx.timing().backoff;
    for options in both(&ctx) {
        attempts(&ctx, options.retry(ctx.retry().max_attempts(12).backoff(base, base)), 12).await?;
    }
    Ok(())
}

async fn last_chance(ctx: Ctx) -> Verdict {
    let (bus, dead) = (ctx.bus().await?, ctx.topic("dead"));
    let mut letters = ctx.subscribe(&bus, &dead, ctx.fan_out()).await?;
    for options in both(&ctx) {
        let topic = ctx.topic("last");
        let options = options.retry(ctx.retry().max_attempts(3)).dead_letter(dead.clone());
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        ctx.publish(&bus, &topic, 1).await?;
        drop(ctx.next(&mut subscription).await?.retry());
        drop(ctx.next(&mut subscription).await?.retry());
        let last = ctx.next(&mut subscription).await?;
        ensure_eq!(last.attempt(), 3, "last attempt");
        ctx.confirmed(last.done()).await?;
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
        let status = subscription.status();
        ensure_eq!((status.dropped, status.dead_lettered), (0, 0), "dropped and dead-lettered");
    }
    ctx.nothing_more(&bus, &dead, [&mut letters]).await
}

async fn redriven(ctx: Ctx) -> Verdict {
    let (bus, topic, dead) = (ctx.bus().await?, ctx.topic("source"), ctx.topic("dead"));
    let options = ctx.fan_out().ack_mode(pubsub_core::AckMode::Manual).dead_letter(dead.clone());
    let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
    let sent = ctx.publish(&bus, &topic, 5).await?;
    let origins: Vec<_> = sent.iter().map(|event| event.id().to_string()).collect();
    for delivery in ctx.collect(&mut subscription, sent.len()).await? {
        ctx.confirmed(delivery.dead_letter("no use")).await?;
    }
    let page = ctx.within("history", bus.history(&dead, Start::Earliest, 10)).await??;
    let listed: Vec<_> = page.entries.iter().filter_map(|(_, letter)| Origin::of(letter)).map(|origin| origin.event).collect();
    exactly_once(&origins, &listed)?;
    ensure_eq!(listed, origins, "the order of what was given up one after the other");

    let recorder = Recorder::new();
    let redrive = bus.redrive(&dead, async |letter| {
        recorder.event("redrive", letter.event(), letter.attempt());
        // One of them needs a second try.
        let fails = letter.attempt() == 1 && Origin::of(letter.event()).is_some_and(|origin| origin.event == origins[2]);
        if fails { Err(Failure::retry("not yet")) } else { Ok(()) }
    });
    let report = ctx.within("redrive", redrive).await??;
    ensure_eq!((report.done, report.retried), (5, 1), "done and retried");
    counted_attempts(&recorder.attempts())?;
    let letters: Vec<_> = page.entries.iter().map(|(_, letter)| letter.id().clone()).collect();
    let (first, again): (Vec<_>, Vec<_>) = recorder.attempts().into_iter().partition(|(_, attempt)| *attempt == 1);
    exactly_once(&letters, &first.into_iter().map(|(id, _)| id).collect::<Vec<_>>())?;
    ensure_eq!(again, vec![(letters[2].clone(), 2)], "second attempts");
    let report = ctx.within("redrive", bus.redrive(&dead, async |_| Ok(()))).await??;
    ensure_eq!(report.done, 0, "redriven a second time");
    Ok(())
}

async fn not_kept(ctx: Ctx) -> Verdict {
    let (bus, dead) = (ctx.bus().await?, ctx.topic("dead"));
    let refused = ctx.within("redrive", bus.redrive(&dead, async |_| Ok(()))).await?;
    let kind = refused.map_err(|error| error.kind().clone());
    ensure_eq!(kind, Err(ErrorKind::Unsupported(LETTERS)), "redriving");
    Ok(())
}

async fn at_once(ctx: Ctx) -> Verdict {
    let (bus, dead) = (ctx.bus().await?, ctx.topic("dead"));
    let mut letters = ctx.subscribe(&bus, &dead, ctx.fan_out()).await?;
    for options in both(&ctx) {
        let topic = ctx.topic("given-up");
        let mut keeps = ctx.subscribe(&bus, &topic, options.clone().dead_letter(dead.clone())).await?;
        let sent = ctx.publish(&bus, &topic, 1).await?;
        drop(ctx.next(&mut keeps).await?.dead_letter("broken beyond repair"));
        let letter = ctx.next(&mut letters).await?;
        let origin = Origin::of(letter.event());
        let (id, reason) = (sent[0].id().to_string(), "broken beyond repair");
        ensure!(
            origin.as_ref().is_some_and(|origin| origin.event == id && origin.attempts == 1 && origin.reason == reason),
            "the letter's origin is {origin:?}"
        );
        ctx.nothing_more(&bus, &topic, [&mut keeps]).await?;
        ensure_eq!((keeps.status().dropped, keeps.status().dead_lettered), (0, 1), "dropped and dead-lettered");
        ctx.within("unsubscribe", keeps.unsubscribe()).await?;

        let topic = ctx.topic("given-up");
        let mut drops = ctx.subscribe(&bus, &topic, options).await?;
        ctx.publish(&bus, &topic, 1).await?;
        drop(ctx.next(&mut drops).await?.dead_letter("broken beyond repair"));
        ctx.nothing_more(&bus, &topic, [&mut drops]).await?;
        ensure_eq!((drops.status().dropped, drops.status().dead_lettered), (1, 0), "dropped and dead-lettered");
    }
    ctx.nothing_more(&bus, &dead, [&mut letters]).await
}

async fn its_own_policy(ctx: Ctx) -> Verdict {
    let (bus, topic, dead, group) = (ctx.bus().await?, ctx.topic("policies"), ctx.topic("dead"), ctx.group("g"));
    let mut letters = ctx.subscribe(&bus, &dead, ctx.fan_out()).await?;
    let mut patient = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    for _ in 0..3 {
        drop(ctx.next(&mut patient).await?.retry());
    }
    let held = ctx.next(&mut patient).await?;
    ensure_eq!(held.attempt(), 4, "attempt");
    let hasty = ctx.member(&group).retry(ctx.retry().max_attempts(2)).dead_letter(dead.clone());
    let (hasty, recorder) = (ctx.subscribe(&bus, &topic, hasty).await?, Recorder::new());
    ctx.within("unsubscribe", patient.unsubscribe()).await?;
    drop(held.release());
    // Read all the time: whoever is about to hand over has to be asked.
    let hasty = ctx.consume(hasty, &recorder, "hasty");
    let later = ctx.publish(&bus, &topic, 1).await?;
    let letter = ctx.next(&mut letters).await?;
    let origin = Origin::of(letter.event());
    let id = sent[0].id().to_string();
    ensure!(
        origin.as_ref().is_some_and(|origin| origin.event == id && origin.attempts == 3),
        "the letter's origin is {origin:?}, but three attempts were made of {id}"
    );
    ctx.eventually("what was published later arrives", || recorder.count() >= 1).await?;
    ctx.drained(&[&hasty]).await?;
    exactly_once(&ids(&later), &recorder.ids())?;
    ensure_eq!(hasty.handle().status().dead_lettered, 1, "dead-lettered");
    ctx.nothing_more(&bus, &dead, [&mut letters]).await
}
