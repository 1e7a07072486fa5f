//! Closing, flushing and draining.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::pending;
use futures::{FutureExt, poll};
use pubsub_core::{
    AckMode, Attempts, Bus, Capability, Closed, Failure, Fate, Message, PublishError, PublishOptions, Start, Status, TrimFilter,
};

use crate::oracle::{Recorder, at_least_once, counted_attempts, exactly_once, ids};
use crate::{Ctx, Fault, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const GROUPS: Need = Need::Capability(Capability::Groups);
    vec![
        property("CL-01", "Closing twice, and from several places at once, is one close", &["C2"], close_is_one),
        property(
            "CL-02",
            "After a close everything new is refused as closed, and settling is a reported no-op",
            &["C2"],
            refuses,
        )
        .needs([GROUPS]),
        property("CL-03", "After a close no handler is called", &["C2"], no_call_after_close).needs([Need::CrossInstance]),
        property(
            "CL-04",
            "A publish that a close finds under way arrives, or tells that it was not sent",
            &["C2", "P1"],
            under_way,
        )
        .needs([Need::CrossInstance]),
        property("CL-05", "A subscribe that a close finds under way is refused, or ends", &["C2"], subscribing)
            .needs([Need::CrossInstance]),
        property(
            "CL-06",
            "A close ends in time with a handler that hangs, a full queue and a publisher waiting",
            &["C2"],
            in_time,
        ),
        property("CL-07", "After a flush every settlement recorded before is answered", &["C1", "S6"], flush_confirms)
            .needs([GROUPS]),
        property("CL-08", "Draining waits for what is in hand or due to come back, and a flush does not", &["C1"], draining)
            .needs([GROUPS]),
        property("CL-09", "Draining reaches its end when handlers fail meanwhile", &["C1", "S3"], draining_failures),
        property("CL-10", "A flush of an idle or closed bus is fine", &["C1", "C2"], idle_flush),
        property("CL-11", "What was unsettled at a close goes to a member that comes later", &["C2", "S2"], |ctx| {
            unsettled_at_close(ctx, false)
        })
        .needs([Capability::DurableGroups.into(), Need::CrossInstance]),
        property("CL-12", "A close leaves no task and no retry waiting", &["C2"], leaves_no_task),
        omitted(
            "CL-13",
            "A decorator passes flush and close on exactly once",
            &["C2"],
            "concerns decorators; the tests of each hold it",
        ),
        property("CL-14", "Dropping everything without a close leaves no task", &["C3"], dropping_everything),
        property("CL-15", "A close ends in time when the server cannot be reached", &["C2"], close_in_an_outage)
            .needs([Need::Fault(Fault::Outage)]),
        property(
            "CL-16",
            "What was unsettled at a close goes to the group's other members, retried or released",
            &["C2", "S2"],
            |ctx| unsettled_at_close(ctx, true),
        )
        .needs([GROUPS, Need::CrossInstance]),
        property("CL-17", "A close hands over what it had accepted if its consumers are quick enough", &["C2"], drains),
        property("CL-19", "A close counts each delivery it released or cut off once", &["C2"], counts_once).needs([GROUPS]),
        property("CL-18", "A dropped close has closed all the same", &["C2", "C4"], dropped_close),
    ]
}

/// Closes an instance, giving its consumers no time.
async fn close_at_once(ctx: &Ctx, bus: &Bus) -> Verdict<Closed> {
    Ok(ctx.within("close", bus.close(Duration::ZERO)).await??)
}

/// Holds a call on a closed bus to being refused as closed.
async fn closed<T>(ctx: &Ctx, what: &str, call: impl Future<Output = pubsub_core::Result<T>>) -> Verdict {
    match ctx.within(what, call).await? {
        Err(error) => ensure!(error.is_closed(), "{what} on a closed bus fails otherwise: {error}"),
        Ok(_) => return Err(Mismatch::new(format!("{what} on a closed bus succeeds"))),
    }
    Ok(())
}

async fn close_is_one(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.connect().await?, ctx.topic("close"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().ack_mode(AckMode::Manual)).await?;
    ctx.publish(&bus, &topic, 2).await?;
    let held = ctx.next(&mut subscription).await?;
    let closing: Vec<_> = (0..8)
        .map(|_| {
            let (bus, within) = (bus.clone(), ctx.timing().quiet);
            ctx.spawn(async move { bus.close(within).await })
        })
        .collect();
    let mut answers = Vec::new();
    for one in closing {
        answers.push(ctx.join("close", one).await??);
    }
    answers.push(close_at_once(&ctx, &bus).await?);
    answers.push(ctx.within("close", bus.close(ctx.timing().patience)).await??);
    for answer in &answers {
        ensure_eq!(*answer, answers[0], "what the closes say");
    }
    ensure_eq!(answers[0].cut_off, 1, "deliveries cut off");
    drop(held);
    ctx.ended(&mut subscription).await
}

async fn refuses(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.connect().await?, ctx.topic("closed"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.publish(&bus, &topic, 4).await?;
    let [done, retried, dead, dropped] = <[_; 4]>::try_from(ctx.collect(&mut member, 4).await?).expect("four were asked for");
    let mut status = bus.status();
    close_at_once(&ctx, &bus).await?;

    let failed = ctx.within("publish", bus.publish_with(&topic, &ctx.events(2), PublishOptions::new())).await?;
    let failed: PublishError = failed.err().ok_or_else(|| Mismatch::new("a closed bus publishes"))?;
    ensure!(failed.error().is_closed(), "a publish on a closed bus fails otherwise: {failed}");
    ensure_eq!(failed.fates(), [Fate::NotSent; 2], "the fates of its events");
    closed(&ctx, "subscribe", bus.subscribe_with(&topic, ctx.fan_out())).await?;
    closed(&ctx, "joining", bus.subscribe_with(&topic, ctx.member(&group))).await?;
    closed(&ctx, "history", bus.history(&topic, Start::Latest, 1)).await?;
    closed(&ctx, "clear_topic", bus.clear_topic(&topic)).await?;
    closed(&ctx, "trim_topic", bus.trim_topic(&topic, TrimFilter::run("run"))).await?;
    closed(&ctx, "inspect", bus.inspect(&topic)).await?;
    if let Some(leases) = bus.leases() {
        closed(&ctx, "acquire", leases.acquire("key", "owner", ctx.timing().patience)).await?;
    }
    ensure!(ctx.within("the status", status.wait_for(|status| matches!(status, Status::Closed))).await?, "the status is gone");

    ctx.refused(done.done()).await?;
    ctx.refused(retried.retry()).await?;
    ctx.refused(dead.dead_letter("why not")).await?;
    drop(dropped);
    ctx.ended(&mut member).await
}

async fn no_call_after_close(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("closed"), Recorder::new());
    let staying = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "staying");
    let enough = Arc::new(AtomicBool::new(false));
    let publishing = ctx.spawn({
        let (ctx, bus, topic, enough) = (ctx.clone(), bus.clone(), topic.clone(), enough.clone());
        async move {
            let mut sent = Vec::new();
            while !enough.load(Ordering::Relaxed) {
                sent.extend(ctx.publish(&bus, &topic, 1).await?);
                tokio::task::yield_now().await;
            }
            Verdict::Ok(sent)
        }
    });
    let mut closed = Vec::new();
    for name in ["first", "second", "third", "fourth", "fifth"] {
        let (other, seen) = (ctx.connect().await?, recorder.clone());
        let handler = move |message: Message| {
            seen.event(name, message.event(), message.attempt());
            async {
                tokio::task::yield_now().await;
                Ok(())
            }
        };
        let handler = ctx.within("subscribe", other.on(&topic, ctx.fan_out(), 4, handler)).await??;
        ctx.eventually("the handler was called", || recorder.count_of(name) > 0).await?;
        // With enough time for what is being handed over just now.
        let answer = ctx.within("close", other.close(ctx.timing().patience / 2)).await??;
        closed.push((name, recorder.count_of(name)));
        ensure_eq!(answer.cut_off, 0, "deliveries that {name} had time for and was not left");
        let report = ctx.within("the handler's end", handler.ended()).await??;
        ensure_eq!(report.done, recorder.count_of(name) as u64, "calls of {name} that ended");
    }
    enough.store(true, Ordering::Relaxed);
    let mut sent = ctx.join("publishing", publishing).await??;
    sent.extend(ctx.publish(&bus, &topic, 20).await?);
    ctx.fence_consumers(&bus, &topic, &recorder, &[&staying]).await?;
    for (name, before) in closed {
        ensure_eq!(recorder.count_of(name), before, "calls of {name} after it was closed");
    }
    exactly_once(&ids(&sent), &recorder.ids_of("staying"))
}

async fn under_way(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("busy"), Recorder::new());
    let staying = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "staying");
    let (mut sure, mut possible) = (Vec::new(), Vec::new());
    for round in 0..20 {
        let closing = ctx.connect().await?;
        let publishing: Vec<_> = (0..4)
            .map(|_| {
                let (bus, topic, events) = (closing.clone(), topic.clone(), ctx.events(3));
                ctx.spawn(async move {
                    let published = bus.publish_with(&topic, &events, PublishOptions::new()).await;
                    (events, published.map_err(|error| error.fates().to_vec()))
                })
            })
            .collect();
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        ctx.within("close", closing.close(ctx.timing().patience)).await??;
        for one in publishing {
            let (events, published) = ctx.join("a publish", one).await?;
            let fates = published.err().unwrap_or_else(|| vec![Fate::Published; events.len()]);
            for (event, fate) in events.iter().zip(fates) {
                match fate {
                    Fate::Published => sure.push(event.id().clone()),
                    Fate::Unknown => possible.push(event.id().clone()),
                    Fate::NotSent => {}
                }
            }
        }
    }
    ctx.fence_consumers(&bus, &topic, &recorder, &[&staying]).await?;
    let seen: Vec<_> = recorder.ids().into_iter().filter(|id| !possible.contains(id)).collect();
    exactly_once(&sure, &seen)
}

async fn subscribing(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("late"));
    for round in 0..20 {
        let closing = ctx.connect().await?;
        let subscribing: Vec<_> = (0..4)
            .map(|_| {
                let (own, bus, topic) = (ctx.clone(), closing.clone(), topic.clone());
                ctx.spawn(async move { bus.subscribe_with(&topic, own.fan_out().prefetch(1)).await })
            })
            .collect();
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        close_at_once(&ctx, &closing).await?;
        for one in subscribing {
            match ctx.join("a subscribe", one).await? {
                Ok(mut subscription) => ctx.ended(&mut subscription).await?,
                Err(error) => ensure!(error.is_closed(), "a subscribe that met a close fails otherwise: {error}"),
            }
        }
    }
    // What is left attached would be full by now.
    ctx.publish(&bus, &topic, 5).await?;
    let left = ctx.within("inspect", bus.inspect(&topic)).await??.fan_out;
    ensure!(matches!(left, None | Some(0)), "{left:?} subscriptions are left of closed instances");
    Ok(())
}

async fn in_time(ctx: Ctx) -> Verdict {
    let (bus, topic, started) = (ctx.connect().await?, ctx.topic("hanging"), Arc::new(AtomicUsize::new(0)));
    let hanging = started.clone();
    let handler = move |_: Message| {
        hanging.fetch_add(1, Ordering::Relaxed);
        pending::<Result<(), Failure>>()
    };
    let handler = ctx.within("subscribe", bus.on(&topic, ctx.fan_out(), 1, handler)).await??;
    let full = ctx.subscribe(&bus, &topic, ctx.fan_out().prefetch(1)).await?;
    let publishing = ctx.spawn({
        let (own, bus, topic, patience) = (ctx.clone(), bus.clone(), topic.clone(), ctx.timing().limit);
        async move { bus.publish_with(&topic, &own.events(10), PublishOptions::new().timeout(patience)).await }
    });
    ctx.eventually("the handler hangs", || started.load(Ordering::Relaxed) == 1).await?;
    let closed = ctx.within("close", bus.close(ctx.timing().quiet)).await??;
    ensure_eq!(closed.cut_off, 1, "deliveries cut off");
    // The publisher is told, one way or the other, and the handler is cancelled.
    if let Err(error) = ctx.join("the publisher", publishing).await? {
        ensure!(error.error().is_closed(), "a publisher that met a close fails otherwise: {error}");
        ensure_eq!(error.fates().len(), 10, "fates");
    }
    ctx.within("the handler's end", handler.ended()).await??;
    drop(full);
    Ok(())
}

async fn flush_confirms(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("flush"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.publish(&bus, &topic, 12).await?;
    let mut receipts = Vec::new();
    let mut in_hand = Vec::new();
    for (number, delivery) in ctx.collect(&mut member, 12).await?.into_iter().enumerate() {
        match number % 4 {
            0 => receipts.push(delivery.done()),
            1 => receipts.push(delivery.retry_after(ctx.timing().patience)),
            2 => receipts.push(delivery.dead_letter("as it should be")),
            _ => in_hand.push(delivery),
        }
    }
    ctx.within("flush", bus.flush()).await??;
    for receipt in receipts {
        let answer = receipt.now_or_never();
        ensure!(answer.is_some_and(|answer| ctx.is_done(answer)), "the answer after a flush: {answer:?}");
    }
    drop(in_hand);
    Ok(())
}

async fn draining(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("drain"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let handle = member.handle();
    ctx.within("drained while idle", handle.drained()).await?;
    ctx.publish(&bus, &topic, 2).await?;
    let first = ctx.next(&mut member).await?;
    let mut drained = pin!(handle.drained());
    ensure!(poll!(drained.as_mut()).is_pending(), "drained with one in hand and one queued");
    drop(ctx.next(&mut member).await?.done());
    ctx.within("flush with one in hand", bus.flush()).await??;
    ensure!(poll!(drained.as_mut()).is_pending(), "drained with one in hand");
    ctx.confirmed(first.retry()).await?;
    ctx.within("flush with one due to come back", bus.flush()).await??;
    ensure!(poll!(drained.as_mut()).is_pending(), "drained with one due to come back");
    let again = ctx.next(&mut member).await?;
    ensure_eq!(again.attempt(), 2, "attempt");
    ensure!(poll!(drained.as_mut()).is_pending(), "drained with a retry in hand");
    drop(again.done());
    ctx.within("drained", drained).await
}

async fn draining_failures(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("failing"), Recorder::new());
    let seen = recorder.clone();
    let handler = move |message: Message| {
        seen.event("handler", message.event(), message.attempt());
        let failed = message.attempt() < 3;
        std::future::ready(if failed { Err(Failure::retry("twice")) } else { Ok(()) })
    };
    let handler = ctx.within("subscribe", bus.on(&topic, ctx.fan_out(), 4, handler)).await??;
    let sent = ctx.publish(&bus, &topic, 20).await?;
    ctx.eventually("all came once", || recorder.distinct() == sent.len()).await?;
    ctx.within("drained", handler.handle().drained()).await?;
    ensure_eq!(recorder.count(), 3 * sent.len(), "hand-overs when drained");
    counted_attempts(&recorder.attempts())?;
    at_least_once(&ids(&sent), &recorder.ids())?;
    let report = ctx.within("stop", handler.stop()).await??;
    ensure_eq!((report.done, report.retried), (20, 40), "done and retried");
    Ok(())
}

async fn idle_flush(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.connect().await?, ctx.topic("idle"));
    ctx.within("flush before anything", bus.flush()).await??;
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    ctx.within("flush with a subscription", bus.flush()).await??;
    drop(subscription);
    close_at_once(&ctx, &bus).await?;
    ctx.within("flush after a close", bus.flush()).await??;
    Ok(())
}

/// A member on an instance of its own takes two of five events, and its instance is closed: another member gets all five.
async fn unsettled_at_close(ctx: Ctx, other_first: bool) -> Verdict {
    let (bus, leaving, topic, group) = (ctx.bus().await?, ctx.connect().await?, ctx.topic("cut-off"), ctx.group("g"));
    let mut member = ctx.subscribe(&leaving, &topic, ctx.member(&group)).await?;
    let sent = ctx.publish(&bus, &topic, 5).await?;
    let held = ctx.collect(&mut member, 2).await?;
    let other = if other_first { Some(ctx.subscribe(&bus, &topic, ctx.member(&group)).await?) } else { None };
    let closed = close_at_once(&ctx, &leaving).await?;
    ensure_eq!(closed.cut_off, 2, "deliveries cut off");
    let mut other = match other {
        Some(other) => other,
        None => ctx.subscribe(&bus, &topic, ctx.member(&group)).await?,
    };
    let came = ctx.collect(&mut other, 5).await?;
    exactly(&sent, &came)?;
    for delivery in came {
        let (id, attempt) = (delivery.event().id(), delivery.attempt());
        let was_held = held.iter().any(|held| held.event().id() == id);
        // What was cut off counts as a retry, where crashes are counted at all; what was only queued was never attempted.
        let fits = if was_held { attempt == 2 || ctx.capabilities().attempts != Attempts::Bus } else { attempt == 1 };
        ensure!(fits, "{id} came at attempt {attempt}, held before: {was_held}");
        drop(delivery.done());
    }
    ctx.ended(&mut member).await?;
    drop(held);
    ctx.nothing_before_fence(&mut other, &bus, &topic).await
}

async fn leaves_no_task(ctx: Ctx) -> Verdict {
    let mut before = 0;
    for round in 0..20 {
        let (bus, topic) = (ctx.connect().await?, ctx.topic("tasks"));
        let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().ack_mode(AckMode::Manual)).await?;
        let handle = subscription.handle();
        let handler = |_: Message| std::future::ready(Err(Failure::retry_after(Duration::from_secs(3600), "later")));
        let handler = ctx.within("subscribe", bus.on(&topic, ctx.fan_out(), 4, handler)).await??;
        ctx.publish(&bus, &topic, 3).await?;
        for delivery in ctx.collect(&mut subscription, 2).await? {
            drop(delivery.retry_after(Duration::from_secs(3600)));
        }
        ctx.eventually("all are due to come back", || handle.status().delayed == 2 && handler.handle().status().delayed == 3)
            .await?;
        close_at_once(&ctx, &bus).await?;
        ensure_eq!((handle.status().delayed, handler.handle().status().delayed), (0, 0), "retries that wait after a close");
        ctx.ended(&mut subscription).await?;
        ctx.within("the handler's end", handler.ended()).await??;
        // What the first round leaves may be shared by all instances of the bus, this property's own among them.
        if round == 0 {
            before = ctx.alive_tasks();
        }
    }
    ctx.eventually("tasks are as few as after the first close", || ctx.alive_tasks() <= before).await
}

async fn dropping_everything(ctx: Ctx) -> Verdict {
    let before = ctx.alive_tasks();
    for _ in 0..5 {
        let (bus, topic) = (ctx.elsewhere().await?, ctx.topic("dropped"));
        let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().ack_mode(AckMode::Manual)).await?;
        ctx.publish(&bus, &topic, 3).await?;
        drop(ctx.next(&mut subscription).await?.retry_after(Duration::from_secs(3600)));
        let held = ctx.next(&mut subscription).await?;
        drop((bus, subscription));
        drop(held);
    }
    ctx.eventually("tasks are as few as before", || ctx.alive_tasks() <= before).await
}

async fn close_in_an_outage(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.connect().await?, ctx.topic("outage"));
    let faults = ctx.harness().faults().ok_or_else(|| Mismatch::new("no faults"))?;
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().ack_mode(AckMode::Manual)).await?;
    ctx.publish(&bus, &topic, 2).await?;
    let held = ctx.next(&mut subscription).await?;
    ctx.within("an outage", faults.inject(Fault::Outage)).await??;
    let publishing = ctx.spawn({
        let (bus, topic, event) = (bus.clone(), topic.clone(), ctx.event());
        async move { bus.publish(&topic, event).await }
    });
    // It may report what the server did not get; it is closed all the same.
    drop(ctx.within("close", bus.close(ctx.timing().quiet)).await?);
    drop(ctx.join("the publisher", publishing).await?);
    drop(held);
    ctx.ended(&mut subscription).await?;
    closed(&ctx, "subscribe", bus.subscribe_with(&topic, ctx.fan_out())).await?;
    ctx.within("healing", faults.inject(Fault::Heal)).await??;
    Ok(())
}

async fn drains(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.connect().await?, ctx.topic("drains"), Recorder::new());
    let (seen, gate) = (recorder.clone(), Arc::new(tokio::sync::Semaphore::new(0)));
    let (opens, pause) = (gate.clone(), ctx.timing().backoff / 10);
    let handler = move |message: Message| {
        let (seen, opens) = (seen.clone(), opens.clone());
        async move {
            drop(opens.acquire().await?);
            tokio::time::sleep(pause).await;
            seen.event("handler", message.event(), message.attempt());
            Ok(())
        }
    };
    let handler = ctx.within("subscribe", bus.on(&topic, ctx.fan_out(), 4, handler)).await??;
    let sent = ctx.publish(&bus, &topic, 50).await?;
    let here = || handler.handle().status().queued + handler.handle().status().held;
    ctx.eventually("all are there", || here() == 50).await?;
    let mut close = pin!(bus.close(ctx.timing().patience));
    ensure!(poll!(close.as_mut()).is_pending(), "closed in time that was not needed, with 50 events unhandled");
    gate.add_permits(1);
    let closed = ctx.within("close", close).await??;
    ensure!(closed.is_clean(), "{closed:?} although all was handled in time");
    exactly_once(&ids(&sent), &recorder.ids())?;
    ctx.within("the handler's end", handler.ended()).await??;
    Ok(())
}

async fn dropped_close(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.connect().await?, ctx.topic("dropped"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().ack_mode(AckMode::Manual)).await?;
    ctx.publish(&bus, &topic, 1).await?;
    let held = ctx.next(&mut subscription).await?;
    {
        let mut close = pin!(bus.close(ctx.timing().quiet));
        ensure!(poll!(close.as_mut()).is_pending(), "closed at once with a delivery in hand");
    }
    closed(&ctx, "subscribe", bus.subscribe_with(&topic, ctx.fan_out())).await?;
    ctx.ended(&mut subscription).await?;
    let answer = ctx.within("another close", bus.close(ctx.timing().patience)).await??;
    ensure_eq!(answer.cut_off, 1, "deliveries cut off");
    ctx.refused(held.done()).await
}

async fn counts_once(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.connect().await?, ctx.topic("counted"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let others =
        [ctx.subscribe(&bus, &topic, ctx.member(&group)).await?, ctx.subscribe(&bus, &topic, ctx.member(&group)).await?];
    ctx.publish(&bus, &topic, 5).await?;
    let held = ctx.collect(&mut member, 2).await?;
    let closed = close_at_once(&ctx, &bus).await?;
    ensure_eq!(closed.cut_off, 2, "deliveries cut off");
    ensure!(closed.released <= 3, "{} released of three that were queued", closed.released);
    drop((held, others));
    ctx.ended(&mut member).await
}
