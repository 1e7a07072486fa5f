//! Retries: to whom they come back, when, and as what.

use std::time::Duration;

use pubsub_core::{Event, Settlement};
use tokio::time::Instant;

use super::{GROUPS, both, by_hand};
use crate::oracle::{Recorder, counted_attempts, delivered, exactly_once, ids};
use crate::{Ctx, Need, Property, Verdict, ensure, ensure_eq, exactly, panic_on_purpose, property};

pub(super) fn properties() -> Vec<Property> {
    vec![
        property(
            "AK-01",
            "A retry brings the event back to its group or subscription, one attempt higher",
            &["S3"],
            comes_back,
        )
        .needs([GROUPS]),
        property("AK-02", "Attempts are 1, 2, 3 and so on, and everything else stays equal", &["S3"], counted).needs([GROUPS]),
        property("AK-14", "What is retried and then left goes to the rest of its group, and else nowhere", &["S2", "S3"], left)
            .needs([GROUPS]),
        property("AK-16", "An event that waits for its retry does not hold back the others", &["S3"], no_blocking)
            .needs([GROUPS]),
        property("AK-17", "What one member retried and left behind the next one gets, with its attempts", &["S2"], handed_on)
            .needs([GROUPS]),
        property("AK-19", "A fan-out retry reaches only the subscription that asked for it, once", &["S3"], only_that_one),
        property(
            "AK-20",
            "A delivery dropped by its consumer, a panic, a cancelled task or a closed subscription is a retry",
            &["S2"],
            dropped,
        )
        .needs([GROUPS]),
        property("AK-34", "Hundreds of retries store nothing more", &["S3"], stored_once).needs([GROUPS, Need::Probe]),
        property(
            "AK-39",
            "A retry comes after its back-off, growing up to its limit, or after the time asked for",
            &["S4"],
            delayed,
        )
        .needs([GROUPS]),
    ]
}

async fn comes_back(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for options in both(&ctx) {
        let topic = ctx.topic("back");
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        let sent = ctx.publish(&bus, &topic, 1).await?;
        let first = ctx.next(&mut subscription).await?;
        ensure_eq!(first.attempt(), 1, "first attempt");
        ctx.confirmed(first.retry()).await?;
        let again = ctx.next(&mut subscription).await?;
        exactly(&sent, [&again])?;
        ensure_eq!(again.attempt(), 2, "second attempt");
        ctx.confirmed(again.done()).await?;
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    }
    Ok(())
}

async fn counted(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for options in both(&ctx) {
        let (topic, recorder) = (ctx.topic("counted"), Recorder::new());
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        let event =
            Event::new("sort").with_run_id("a run").with_data(vec![1.5, -2.0]).with_metadata("traceparent", "00-1-2-03");
        ctx.publish_all(&bus, &topic, &[event.into()]).await?;
        let first = ctx.next(&mut subscription).await?;
        let event = first.event().clone();
        let mut delivery = first;
        for _ in 1..5 {
            recorder.received("it", &delivery);
            drop(delivery.retry());
            delivery = ctx.next(&mut subscription).await?;
            equal(&event, delivery.event())?;
        }
        recorder.received("it", &delivery);
        drop(delivery.done());
        counted_attempts(&recorder.attempts())?;
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    }
    Ok(())
}

fn equal(first: &Event, again: &Event) -> Verdict {
    ensure_eq!(again.id(), first.id(), "id");
    ensure_eq!(again.event_type(), first.event_type(), "type");
    ensure_eq!(again.run_id(), first.run_id(), "run");
    ensure_eq!(again.created_at(), first.created_at(), "time");
    ensure_eq!(again.payload().to_json()?, first.payload().to_json()?, "data");
    ensure_eq!(again.metadata(), first.metadata(), "metadata");
    Ok(())
}

async fn left(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("left"));
    let mut leaver = ctx.subscribe(&bus, &topic, by_hand(&ctx)).await?;
    let mut watcher = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    let receipt = ctx.next(&mut leaver).await?.retry();
    ctx.within("unsubscribe", leaver.unsubscribe()).await?;
    ctx.answer(receipt).await?;
    exactly(&sent, &[ctx.next(&mut watcher).await?])?;
    ctx.nothing_more(&bus, &topic, [&mut watcher]).await?;

    let (topic, group) = (ctx.topic("left"), ctx.group("g"));
    let mut leaver = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    let held = ctx.next(&mut leaver).await?;
    let mut other = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    drop(held.retry());
    ctx.within("unsubscribe", leaver.unsubscribe()).await?;
    let again = ctx.next(&mut other).await?;
    exactly(&sent, [&again])?;
    ensure_eq!(again.attempt(), 2, "attempt");
    ctx.confirmed(again.done()).await?;
    ctx.nothing_more(&bus, &topic, [&mut other]).await
}

async fn no_blocking(ctx: Ctx) -> Verdict {
    let (bus, long) = (ctx.bus().await?, 2 * ctx.timing().patience);
    for options in both(&ctx) {
        let topic = ctx.topic("beside");
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        let sent = ctx.publish(&bus, &topic, 10).await?;
        let first = ctx.next(&mut subscription).await?;
        let waits = first.event().id().clone();
        drop(first.retry_after(long));
        let others: Vec<_> = ids(&sent).into_iter().filter(|id| *id != waits).collect();
        let fence = ctx.fence(&bus, &topic).await?;
        let arrived = ctx.until(&mut subscription, &fence).await?;
        exactly_once(&others, &delivered(&arrived))?;
    }
    Ok(())
}

async fn handed_on(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("handed"), ctx.group("g"));
    let mut bad = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ctx.publish(&bus, &topic, 20).await?;
    for _ in 1..3 {
        for delivery in ctx.collect(&mut bad, sent.len()).await? {
            drop(delivery.retry());
        }
    }
    let mut good = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.within("unsubscribe", bad.unsubscribe()).await?;
    let deliveries = ctx.collect(&mut good, sent.len()).await?;
    exactly(&sent, &deliveries)?;
    for delivery in deliveries {
        ensure_eq!(delivery.attempt(), 3, "attempt of {}", delivery.event().id());
        drop(delivery.done());
    }
    ctx.nothing_more(&bus, &topic, [&mut good]).await
}

async fn only_that_one(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("one"));
    let mut asks = ctx.subscribe(&bus, &topic, by_hand(&ctx)).await?;
    let mut settles = ctx.subscribe(&bus, &topic, by_hand(&ctx)).await?;
    let mut reads = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 1).await?;
    drop(ctx.next(&mut asks).await?.retry());
    drop(ctx.next(&mut settles).await?.done());
    exactly(&sent, &[ctx.next(&mut reads).await?])?;
    let again = ctx.next(&mut asks).await?;
    exactly(&sent, [&again])?;
    ensure_eq!(again.attempt(), 2, "attempt");
    drop(again.done());
    ctx.nothing_more(&bus, &topic, [&mut asks, &mut settles, &mut reads]).await
}

async fn dropped(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for options in both(&ctx) {
        let topic = ctx.topic("dropped");
        let mut subscription = ctx.subscribe(&bus, &topic, options.clone()).await?;
        let sent = ctx.publish(&bus, &topic, 1).await?;
        drop(ctx.next(&mut subscription).await?);
        let second = ctx.next(&mut subscription).await?;
        ensure_eq!(second.attempt(), 2, "attempt after a drop");
        drop(tokio::spawn(async move {
            let _held = second;
            panic_on_purpose("while holding a delivery")
        }));
        let third = ctx.next(&mut subscription).await?;
        ensure_eq!(third.attempt(), 3, "attempt after a panic");
        tokio::spawn(async move {
            let _held = third;
            std::future::pending::<()>().await;
        })
        .abort();
        let fourth = ctx.next(&mut subscription).await?;
        ensure_eq!(fourth.attempt(), 4, "attempt after a cancelled task");
        exactly(&sent, [&fourth])?;
        if options.group.is_some() {
            let closed = std::mem::replace(&mut subscription, ctx.subscribe(&bus, &topic, options).await?);
            drop(closed);
            drop(fourth);
            let fifth = ctx.next(&mut subscription).await?;
            ensure_eq!(fifth.attempt(), 5, "attempt after a closed subscription");
            drop(fifth.done());
        } else {
            drop(fourth.done());
        }
        ctx.nothing_more(&bus, &topic, [&mut subscription]).await?;
    }
    Ok(())
}

async fn stored_once(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("stored"));
    let options = ctx.member(&ctx.group("g")).retry(ctx.retry().max_attempts(0));
    let mut member = ctx.subscribe(&bus, &topic, options).await?;
    ctx.publish(&bus, &topic, 3).await?;
    let stored = async || match ctx.harness().probe() {
        Some(probe) => Ok(ctx.within("a probe", probe.stored(&topic)).await??),
        None => Err(crate::Mismatch::new("the probe is gone")),
    };
    let before = stored().await?;
    for _ in 0..200 {
        drop(ctx.next(&mut member).await?.retry_after(Duration::ZERO));
    }
    let rest = ctx.collect(&mut member, 3).await?;
    let after = stored().await?;
    ensure!(after <= before, "{before} stored before 200 retries, {after} after");
    for delivery in rest {
        drop(delivery.done());
    }
    ctx.nothing_more(&bus, &topic, [&mut member]).await
}

async fn delayed(ctx: Ctx) -> Verdict {
    let (bus, base) = (ctx.bus().await?, ctx.timing().backoff);
    for options in both(&ctx) {
        let topic = ctx.topic("delayed");
        let options = options.retry(ctx.retry().backoff(base, 3 * base));
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        ctx.publish(&bus, &topic, 1).await?;
        let mut delivery = ctx.next(&mut subscription).await?;
        let asked = Settlement::Retry { after: Some(5 * base), reason: None };
        let as_told = Settlement::Retry { after: None, reason: None };
        for (settlement, least) in [(&as_told, base), (&as_told, 2 * base), (&as_told, 3 * base), (&asked, 5 * base)] {
            let before = Instant::now();
            drop(delivery.settle(settlement.clone()));
            delivery = ctx.next(&mut subscription).await?;
            let waited = before.elapsed();
            ensure!(waited >= least, "attempt {} came after {waited:?}, not {least:?}", delivery.attempt());
        }
        drop(delivery.done());
    }
    Ok(())
}
