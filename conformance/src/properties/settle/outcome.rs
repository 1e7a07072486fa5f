//! Handlers: how what they do settles their deliveries.

use pubsub_core::{Failure, Message, RetryPolicy, SubscribeOptions};

use super::{GROUPS, both, short_hold};
use crate::oracle::{Recorder, counted_attempts, exactly_once, ids};
use crate::{Ctx, Property, Verdict, ensure_eq, panic_on_purpose, property};

pub(super) fn properties() -> Vec<Property> {
    vec![
        property("AK-05", "A handler's error or panic is a retry, however it is run", &["S1", "S2"], failures_are_retries)
            .needs([GROUPS]),
        property("AK-24", "A group's handler that runs out of time is retried, as often as any other", &["S4"], out_of_time)
            .needs([GROUPS]),
        property("AK-25", "A fan-out handler that runs out of time is retried, and nobody else notices", &["S3", "S4"], alone),
        property("AK-26", "A slow handler within its time is left alone", &["S4"], within_time).needs([GROUPS]),
        property(
            "AK-27",
            "Of a time-out and a lost delivery the first decides, and the other changes nothing",
            &["S4", "S5"],
            lost_first,
        )
        .needs([GROUPS]),
        property(
            "AK-40",
            "A failure of one event of a batch neither loses nor blocks its neighbours",
            &["S1", "S3"],
            neighbours,
        )
        .needs([GROUPS]),
    ]
}

async fn failures_are_retries(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for (options, spawned) in both(&ctx).into_iter().flat_map(|options| [(options.clone(), false), (options, true)]) {
        let (topic, recorder) = (ctx.topic("fails"), Recorder::new());
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        let (handle, journal) = (subscription.handle(), recorder.clone());
        let handler = move |message: Message| {
            journal.event("handler", message.event(), message.attempt());
            async move {
                match message.attempt() {
                    1 => Err(Failure::retry("not yet")),
                    2 => panic_on_purpose("in a handler"),
                    _ => Ok(()),
                }
            }
        };
        let running = ctx.spawn(async move {
            if spawned { subscription.run_spawned(1, handler).await } else { subscription.run(1, handler).await }
        });
        ctx.publish(&bus, &topic, 2).await?;
        ctx.eventually("three attempts of two events", || recorder.count() >= 6).await?;
        ctx.within("drained", handle.drained()).await?;
        handle.stop();
        let report = ctx.join("the handlers", running).await??;
        counted_attempts(&recorder.attempts())?;
        ensure_eq!((recorder.count(), recorder.distinct()), (6, 2), "attempts and events");
        ensure_eq!((report.done, report.retried), (2, 4), "done and retried");
    }
    Ok(())
}

/// A handler that records and never returns.
fn hangs(recorder: &Recorder) -> impl Fn(Message) -> std::future::Pending<Result<(), Failure>> + Send + Sync + 'static {
    let recorder = recorder.clone();
    move |message| {
        recorder.event("hung", message.event(), message.attempt());
        std::future::pending()
    }
}

fn hurried(ctx: &Ctx) -> RetryPolicy {
    ctx.retry().max_attempts(3).handler_timeout(ctx.timing().hold)
}

/// Publishes two events to a handler that hangs, and holds them to three attempts each, after which they are dropped.
async fn three_attempts(ctx: &Ctx, topic: &pubsub_core::Topic, options: SubscribeOptions) -> Verdict {
    let (bus, recorder) = (ctx.bus().await?, Recorder::new());
    let handler = ctx.within("subscribe", bus.on(topic, options, 2, hangs(&recorder))).await??;
    let sent = ctx.publish(&bus, topic, 2).await?;
    ctx.eventually("three attempts of two events", || recorder.count() >= 6).await?;
    ctx.within("drained", handler.handle().drained()).await?;
    ensure_eq!(handler.handle().status().dropped, 2, "dropped");
    let report = ctx.within("stop", handler.stop()).await??;
    ensure_eq!((report.done, report.retried), (0, 6), "done and retried");
    counted_attempts(&recorder.attempts())?;
    ensure_eq!(recorder.count(), 6, "attempts");
    let firsts: Vec<_> = recorder.attempts().into_iter().filter(|(_, attempt)| *attempt == 1).map(|(id, _)| id).collect();
    exactly_once(&ids(&sent), &firsts)
}

async fn out_of_time(ctx: Ctx) -> Verdict {
    let options = ctx.member(&ctx.group("g")).retry(hurried(&ctx));
    three_attempts(&ctx, &ctx.topic("hangs"), options).await
}

async fn alone(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("hangs"));
    let mut neighbour = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    three_attempts(&ctx, &topic, ctx.fan_out().retry(hurried(&ctx))).await?;
    ctx.collect(&mut neighbour, 2).await?;
    ctx.nothing_more(&bus, &topic, [&mut neighbour]).await
}

async fn within_time(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for options in both(&ctx) {
        let (topic, recorder, slow) = (ctx.topic("slow"), Recorder::new(), 2 * ctx.timing().hold);
        let options = options.retry(ctx.retry().handler_timeout(ctx.timing().patience));
        let journal = recorder.clone();
        let handler = move |message: Message| {
            journal.event("slow", message.event(), message.attempt());
            async move {
                tokio::time::sleep(slow).await;
                Ok(())
            }
        };
        let handler = ctx.within("subscribe", bus.on(&topic, options, 4, handler)).await??;
        let sent = ctx.publish(&bus, &topic, 4).await?;
        ctx.eventually("all arrived", || recorder.distinct() == sent.len()).await?;
        ctx.within("drained", handler.handle().drained()).await?;
        let report = ctx.within("stop", handler.stop()).await??;
        ensure_eq!((report.done, report.retried), (4, 0), "done and retried");
        exactly_once(&ids(&sent), &recorder.ids())?;
    }
    Ok(())
}

async fn lost_first(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("lost"), Recorder::new());
    let (options, hold) = (ctx.member(&ctx.group("g")), short_hold(&ctx));
    let loses = options.clone().max_hold(hold).retry(ctx.retry().handler_timeout(2 * hold));
    let handler = ctx.within("subscribe", bus.on(&topic, loses, 1, hangs(&recorder))).await??;
    ctx.publish(&bus, &topic, 1).await?;
    ctx.eventually("the handler hangs", || recorder.count() == 1).await?;
    let mut finder = ctx.subscribe(&bus, &topic, options).await?;
    handler.handle().stop();
    let found = ctx.next(&mut finder).await?;
    ensure_eq!(found.attempt(), 2, "attempt");
    let report = ctx.within("the handler's end", handler.ended()).await??;
    ensure_eq!((report.revoked, report.retried, report.done), (1, 0, 0), "revoked, retried and done");
    // Past the time-out, which had it counted would have brought another attempt.
    tokio::time::sleep(hold + ctx.timing().hold).await;
    ctx.confirmed(found.done()).await?;
    ctx.nothing_more(&bus, &topic, [&mut finder]).await
}

async fn neighbours(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    for concurrency in [1, 4] {
        for options in both(&ctx) {
            let (topic, recorder, events) = (ctx.topic("batch"), Recorder::new(), ctx.events(20));
            let (journal, bad) = (recorder.clone(), events[3].id().clone());
            let handler = move |message: Message| {
                journal.event("handler", message.event(), message.attempt());
                let fails = *message.event().id() == bad;
                async move { if fails { Err(Failure::retry("this one")) } else { Ok(()) } }
            };
            let options = options.retry(ctx.retry().max_attempts(3));
            let handler = ctx.within("subscribe", bus.on(&topic, options, concurrency, handler)).await??;
            ctx.publish_all(&bus, &topic, &events).await?;
            ctx.eventually("all are handled", || recorder.count() >= events.len() + 2).await?;
            ctx.within("drained", handler.handle().drained()).await?;
            ctx.within("stop", handler.stop()).await??;
            counted_attempts(&recorder.attempts())?;
            let (first, again): (Vec<_>, Vec<_>) = recorder.attempts().into_iter().partition(|(_, attempt)| *attempt == 1);
            exactly_once(&ids(&events), &first.into_iter().map(|(id, _)| id).collect::<Vec<_>>())?;
            let bad = events[3].id();
            ensure_eq!(again, vec![(bad.clone(), 2), (bad.clone(), 3)], "retries");
        }
    }
    Ok(())
}
