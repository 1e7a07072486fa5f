//! Inline subscriptions: handlers called in the publisher's task.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use futures::FutureExt;
use parking_lot::Mutex;
use pubsub_core::{ErrorKind, Event, Topic};

use crate::oracle::{Recorder, exactly_once, ids};
use crate::{Ctx, Inline, Mismatch, Need, Property, Verdict, ensure, ensure_eq, panic_on_purpose, property};

pub(crate) fn properties() -> Vec<Property> {
    vec![
        property(
            "IL-01",
            "An inline handler has run, in the publisher's task and in order, when publish returns",
            &["I1"],
            has_run,
        )
        .needs([Need::Inline]),
        property("IL-02", "An inline handler that panics disturbs neither the publisher nor anybody else", &["I1"], panics)
            .needs([Need::Inline]),
        property(
            "IL-03",
            "Inline handlers that publish to each other are stopped at a depth, and only there",
            &["I1"],
            recursion,
        )
        .needs([Need::Inline]),
        property(
            "IL-04",
            "An inline handler is not called once its subscription is dropped, by itself either",
            &["I1"],
            dropped,
        )
        .needs([Need::Inline]),
    ]
}

fn inline(ctx: &Ctx) -> Verdict<&dyn Inline> {
    ctx.harness().inline().ok_or_else(|| Mismatch::new("no inline subscriptions"))
}

/// Subscribes a handler that records under a name.
fn recording(ctx: &Ctx, topic: &Topic, recorder: &Recorder, name: &'static str) -> Verdict<Box<dyn Any + Send>> {
    let recorder = recorder.clone();
    Ok(inline(ctx)?.subscribe(topic, Box::new(move |event: &Arc<Event>| recorder.event(name, event, 1)))?)
}

async fn has_run(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("inline"), Recorder::new());
    let threads = Arc::new(Mutex::new(Vec::new()));
    let seen = threads.clone();
    let _first = recording(&ctx, &topic, &recorder, "first")?;
    let _second = recording(&ctx, &topic, &recorder, "second")?;
    let _third = inline(&ctx)?.subscribe(&topic, Box::new(move |_| seen.lock().push(thread::current().id())))?;
    let mut sent = Vec::new();
    for count in [1, 3, 1] {
        let events = ctx.events(count);
        sent.extend(ids(&events));
        // Ready at its first poll, so that all of it happened on this thread.
        let published = bus.publish_with(&topic, &events, Default::default()).now_or_never();
        published.ok_or_else(|| Mismatch::new("a publish that nothing holds up waits"))??;
        ensure!(threads.lock().drain(..).eq(std::iter::repeat_n(thread::current().id(), count)), "called on another thread");
        for name in ["first", "second"] {
            ensure_eq!(recorder.ids_of(name), sent, "what {name} saw when publish returned");
        }
    }
    Ok(())
}

async fn panics(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("panics"), Recorder::new());
    let mut queued = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let _before = recording(&ctx, &topic, &recorder, "before")?;
    let _bad = inline(&ctx)?.subscribe(&topic, Box::new(|_| panic_on_purpose("an inline handler that panics")))?;
    let _after = recording(&ctx, &topic, &recorder, "after")?;
    let sent = ids(&ctx.publish(&bus, &topic, 5).await?);
    for name in ["before", "after"] {
        ensure_eq!(recorder.ids_of(name), sent, "what {name} saw");
    }
    exactly_once(&sent, &ctx.collect_done(&mut queued, 5).await?)
}

async fn recursion(ctx: Ctx) -> Verdict {
    let (bus, topic, limit) = (ctx.bus().await?, ctx.topic("recursion"), inline(&ctx)?.max_depth());
    let (calls, refusals) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
    let handler = {
        let (bus, topic, calls, refusals) = (bus.clone(), topic.clone(), calls.clone(), refusals.clone());
        move |event: &Arc<Event>| {
            calls.fetch_add(1, Ordering::Relaxed);
            match bus.publish(&topic, event.clone()).now_or_never() {
                Some(Ok(_)) => {}
                Some(Err(error)) => refusals.lock().push(error.kind().clone()),
                None => refusals.lock().push(ErrorKind::Timeout),
            }
        }
    };
    let _subscription = inline(&ctx)?.subscribe(&topic, Box::new(handler))?;
    // Twice, for the second to find the depth where the first did.
    for _ in 0..2 {
        ctx.publish(&bus, &topic, 1).await?;
        ensure_eq!(calls.swap(0, Ordering::Relaxed), limit, "calls within each other");
        ensure_eq!(*refusals.lock(), [ErrorKind::Recursion { limit }], "what the innermost publish is told");
        refusals.lock().clear();
    }
    Ok(())
}

async fn dropped(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("dropped"), Recorder::new());
    let _staying = recording(&ctx, &topic, &recorder, "staying")?;
    let leaving = recording(&ctx, &topic, &recorder, "leaving")?;
    // Dropped from within its own call: that call ends, and no other begins.
    let own: Arc<Mutex<Option<Box<dyn Any + Send>>>> = Arc::default();
    let (slot, seen) = (own.clone(), recorder.clone());
    let handler = move |event: &Arc<Event>| {
        seen.event("own", event, 1);
        let subscription = slot.lock().take();
        drop(subscription);
    };
    *own.lock() = Some(inline(&ctx)?.subscribe(&topic, Box::new(handler))?);
    let mut sent = ids(&ctx.publish(&bus, &topic, 1).await?);
    drop(leaving);
    sent.extend(ids(&ctx.publish(&bus, &topic, 3).await?));
    ensure_eq!(recorder.ids_of("staying"), sent, "what the staying one saw");
    ensure_eq!(recorder.ids_of("leaving"), sent[..1], "what the dropped one saw");
    ensure_eq!(recorder.ids_of("own"), sent[..1], "what the one that dropped itself saw");
    Ok(())
}
