//! Order of first deliveries.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pubsub_core::{Bus, Capability, Event, Start, Topic};

use crate::oracle::{Recorder, at_least_once, counted_attempts, delivered, exactly_once, ids, in_order, same_order};
use crate::{Consumer, Ctx, Fault, Need, Property, Verdict, ensure, ensure_eq, exactly, in_sequence, property};

const GROUPS: Need = Need::Capability(Capability::Groups);

/// What one subscription takes without being read, well under half of the default prefetch.
const UNREAD: usize = 100;

pub(crate) fn properties() -> Vec<Property> {
    vec![
        property("OR-01", "Every fan-out subscription sees one publisher's order", &["P2", "P3"], one_publisher)
            .needs([Need::Ordered]),
        property("OR-02", "Each of several publishers is seen in its own order", &["P2"], several_publishers)
            .needs([Need::Ordered]),
        property("OR-03", "All fan-out subscriptions see the events of several publishers in one order", &["P2"], total_order)
            .needs([Need::Capability(Capability::TotalOrder)]),
        property("OR-04", "Live order and the order of history are one", &["P2", "R2"], history_order)
            .needs([Capability::TotalOrder.into(), Capability::History.into()]),
        property("OR-05", "Retries disturb the order of first deliveries in no way", &["P2", "S3"], retries_come_late)
            .needs([Need::Ordered, GROUPS]),
        property("OR-06", "A large event is not overtaken by a small one behind it", &["P2", "P3"], large_first)
            .needs([Need::Ordered]),
        property("OR-07", "Concurrent handlers start in the order of the events", &["P2", "P3"], handlers_start_in_order)
            .needs([Need::Ordered]),
        property("OR-08", "Publishes that are not awaited one by one lose and repeat nothing", &["P1"], not_awaited),
        property(
            "OR-09",
            "After a restart of what lies below, order holds for what is published then",
            &["P2", "N1"],
            restarted,
        )
        .needs([Need::Ordered, Need::Fault(Fault::Restart)])
        .limit(Duration::from_secs(60)),
        property("OR-10", "The only member of a group sees one publisher's order", &["P2"], lone_member)
            .needs([Need::Ordered, GROUPS]),
        property("OR-11", "The events of one call keep their order, and calls keep theirs", &["P3", "P2"], calls_and_events)
            .needs([Need::Ordered]),
    ]
}

async fn one_publisher(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("one"));
    let mut subscriptions = Vec::new();
    for _ in 0..3 {
        subscriptions.push(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?);
    }
    let mut sent = ctx.publish(&bus, &topic, UNREAD / 2).await?;
    let together = ctx.events(UNREAD / 2);
    ctx.publish_all(&bus, &topic, &together).await?;
    sent.extend(together);
    let fence = ctx.fence(&bus, &topic).await?;
    for subscription in &mut subscriptions {
        in_sequence(&sent, &ctx.until(subscription, &fence).await?)?;
    }
    Ok(())
}

/// Four publishers of 50 events each, on two instances where there can be two, and three readers likewise. Ends when all has
/// arrived at each reader, once and with nothing else.
async fn crowd(ctx: &Ctx, hint: &str) -> Verdict<(Recorder, Vec<Consumer>)> {
    let (here, topic, recorder) = (ctx.bus().await?, ctx.topic(hint), Recorder::new());
    let there = if ctx.harness().spans_instances() { ctx.connect().await? } else { here.clone() };
    let side = |number: usize| if number.is_multiple_of(2) { &here } else { &there };
    let mut readers = Vec::new();
    for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
        let subscription = ctx.subscribe(side(number), &topic, ctx.fan_out()).await?;
        readers.push(ctx.consume(subscription, &recorder, name));
    }
    let publishers = PUBLISHERS.iter().enumerate();
    let publishers: Vec<_> = publishers.map(|(number, run)| ctx.publisher(side(number), &topic, &recorder, run, 50)).collect();
    for publisher in publishers {
        ctx.join("a publisher", publisher).await??;
    }
    for reader in &readers {
        let all = || recorder.count_of(reader.name()) >= recorder.sent().len();
        ctx.eventually(format!("all arrived at {}", reader.name()), all).await?;
    }
    ctx.fence_consumers(&here, &topic, &recorder, &readers.iter().collect::<Vec<_>>()).await?;
    for reader in &readers {
        exactly_once(&recorder.sent(), &recorder.ids_of(reader.name()))?;
    }
    Ok((recorder, readers))
}

const PUBLISHERS: [&str; 4] = ["p", "q", "r", "s"];

async fn several_publishers(ctx: Ctx) -> Verdict {
    let (recorder, readers) = crowd(&ctx, "several").await?;
    for reader in &readers {
        let seen = recorder.ids_of(reader.name());
        for publisher in PUBLISHERS {
            let place = format!("{publisher} as {} saw it", reader.name());
            in_order(&recorder.sent_by(publisher), &seen).map_err(|why| why.at(place))?;
        }
    }
    Ok(())
}

async fn total_order(ctx: Ctx) -> Verdict {
    let (recorder, readers) = crowd(&ctx, "total").await?;
    same_order(&readers.iter().map(|reader| recorder.ids_of(reader.name())).collect::<Vec<_>>())
}

async fn history_order(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("history"), Recorder::new());
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let publishers = PUBLISHERS.map(|run| ctx.publisher(&bus, &topic, &recorder, run, 25));
    let live = ctx.collect(&mut subscription, 100).await?;
    for publisher in publishers {
        ctx.join("a publisher", publisher).await??;
    }
    let page = ctx.within("history", bus.history(&topic, Start::Earliest, 1000)).await??;
    let kept: Vec<_> = page.entries.into_iter().map(|(_, event)| event).collect();
    in_sequence(&kept, &live)?;
    exactly_once(&recorder.sent(), &ids(&kept))?;
    if ctx.capabilities().supports(Capability::Index) {
        let indices: Vec<_> = live.iter().map(|delivery| delivery.event().index().map(|at| at.index)).collect();
        ensure_eq!(indices, (0..100).map(Some).collect::<Vec<_>>(), "indices of live events");
    }
    Ok(())
}

async fn retries_come_late(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("retries"), ctx.group("g"));
    let recorder = Recorder::new();
    let member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let member = ctx.consume_with(member, &recorder, "member", |delivery| {
        let odd = delivery.data::<u64>().is_ok_and(|number| *number % 2 == 1);
        drop(if odd && delivery.attempt() == 1 { delivery.retry() } else { delivery.done() });
        std::future::ready(())
    });
    let sent = ids(&ctx.publish(&bus, &topic, 40).await?);
    let settled = || recorder.attempts().iter().filter(|(_, attempt)| *attempt == 2).count() >= 20;
    ctx.eventually("every second event came again", settled).await?;
    ctx.drained(&[&member]).await?;
    let first: Vec<_> = recorder.attempts().into_iter().filter(|(_, attempt)| *attempt == 1).map(|(id, _)| id).collect();
    exactly_once(&sent, &first)?;
    in_order(&sent, &first)?;
    counted_attempts(&recorder.attempts())
}

async fn large_first(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("large"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let size = ctx.capabilities().max_payload.map_or(2 << 20, |limit| limit.min(2 << 20));
    // Two bytes go to the quotes.
    let mut sent = vec![Arc::new(Event::new("large").with_run_id("run").with_data("x".repeat(size - 2)))];
    sent.extend(ctx.events(5));
    ctx.publish_all(&bus, &topic, &sent).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    let seen = ctx.until(&mut subscription, &fence).await?;
    in_sequence(&sent, &seen)?;
    ensure_eq!(seen[0].data::<String>()?.len(), size - 2, "length of the large text");
    Ok(())
}

async fn handlers_start_in_order(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("handlers"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let handle = subscription.handle();
    let sent = ctx.events(UNREAD);
    ctx.publish_all(&bus, &topic, &sent).await?;
    let (started, rng) = (Mutex::new(Vec::new()), Mutex::new(ctx.rng()));
    let run = subscription.run(8, |message| {
        let (pause, started) = (Duration::from_micros(rng.lock().u64(0..2000)), &started);
        async move {
            started.lock().push(message.event().id().clone());
            tokio::time::sleep(pause).await;
            Ok(())
        }
    });
    let stop = async {
        let all = ctx.eventually("all handlers started", || started.lock().len() >= UNREAD).await;
        handle.stop();
        all
    };
    let (report, all) = ctx.within("the run to end", futures::future::join(run, stop)).await?;
    all?;
    ensure_eq!(report?.done, UNREAD as u64, "handled");
    exactly_once(&ids(&sent), &started.lock())?;
    in_order(&ids(&sent), &started.lock())
}

async fn not_awaited(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("at-once"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.events(UNREAD);
    let publishes = sent.iter().map(|event| {
        let (bus, topic, event) = (bus.clone(), topic.clone(), event.clone());
        ctx.spawn(async move { bus.publish(&topic, event).await })
    });
    for publish in publishes.collect::<Vec<_>>() {
        ctx.join("publish", publish).await??;
    }
    exactly(&sent, &ctx.collect(&mut subscription, UNREAD).await?)?;
    ctx.nothing_before_fence(&mut subscription, &bus, &topic).await
}

/// Publishes one event, again while the bus is not reachable.
async fn publish_persistently(ctx: &Ctx, bus: &Bus, topic: &Topic, event: &Arc<Event>) -> Verdict {
    ctx.eventually_async("published", || async {
        match bus.publish(topic, event.clone()).await {
            Ok(_) => Ok(true),
            Err(error) if error.error().is_retryable() => Ok(false),
            Err(error) => Err(error.into()),
        }
    })
    .await
}

async fn restarted(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("restart"), Recorder::new());
    let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let _reader = ctx.consume(subscription, &recorder, "reader");
    let before = ids(&ctx.publish(&bus, &topic, 20).await?);
    ctx.eventually("all arrived before", || recorder.distinct() == before.len()).await?;
    let Some(faults) = ctx.harness().faults() else { return Err(crate::Mismatch::new("the harness has no faults")) };
    ctx.within("the restart", faults.inject(Fault::Restart)).await??;
    let after = ctx.events(50);
    for event in &after {
        publish_persistently(&ctx, &bus, &topic, event).await?;
    }
    let sent: Vec<_> = before.into_iter().chain(ids(&after)).collect();
    ctx.eventually("all arrived after", || recorder.distinct() == sent.len()).await?;
    at_least_once(&sent, &recorder.ids())?;
    in_order(&sent, &recorder.ids())
}

async fn lone_member(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("lone"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let sent = ctx.publish(&bus, &topic, UNREAD).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    let seen = ctx.until(&mut member, &fence).await?;
    in_sequence(&sent, &seen)?;
    seen.into_iter().for_each(|delivery| drop(delivery.done()));
    Ok(())
}

async fn calls_and_events(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("calls"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.events(UNREAD);
    let mut rest = &sent[..];
    for size in (1..).take_while(|size| size * (size - 1) / 2 < UNREAD) {
        let (call, later) = rest.split_at(size.min(rest.len()));
        ctx.publish_all(&bus, &topic, call).await?;
        rest = later;
    }
    ensure!(rest.is_empty(), "{} events were not published", rest.len());
    let fence = ctx.fence(&bus, &topic).await?;
    let seen = ctx.until(&mut subscription, &fence).await?;
    in_sequence(&sent, &seen)?;
    in_order(&ids(&sent), &delivered(&seen))
}
