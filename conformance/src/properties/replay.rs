//! History, indices and replay.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use pubsub_core::{
    AckMode, Bus, Capability, Cursor, Error, ErrorKind, Event, Gap, OnGap, PublishOptions, ReplayIndex, Start,
    SubscribeOptions, Topic, TrimFilter,
};

use crate::oracle::{delivered, exactly_once, ids};
use crate::{Ctx, Fault, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

/// What only a decorator over a cache can do or get wrong.
const DECORATOR: &str = "held by the replay decorator's own tests";

pub(crate) fn properties() -> Vec<Property> {
    const HISTORY: Need = Need::Capability(Capability::History);
    const INDEX: Need = Need::Capability(Capability::Index);
    const TOTAL: Need = Need::Capability(Capability::TotalOrder);
    vec![
        property("RP-01", "Without retention there is no history, and forgetting it does nothing", &["R6"], nothing_kept)
            .needs([Need::NoRetention]),
        property("RP-02", "History is all events in order, from any index on; an unknown topic's is empty", &["R2"], history)
            .needs([HISTORY, INDEX]),
        property("RP-03", "Concurrent publishes get different indices without gaps", &["R2"], dense).needs([HISTORY, INDEX]),
        property("RP-04", "Indices go on after a restart, and start anew after a clear", &["R2", "R4"], restarted).needs([
            HISTORY,
            INDEX,
            Capability::SurvivesProcessDeath.into(),
            Need::Fault(Fault::Restart),
        ]),
        property("RP-05", "Live events carry the index and id that the history reports", &["R2", "P5"], same_index)
            .needs([HISTORY, INDEX]),
        property("RP-06", "A replay is the history and then what is live, each once, in order", &["R1"], replay)
            .needs([HISTORY, TOTAL]),
        property("RP-07", "What is published while a replay begins arrives once", &["R1"], while_beginning)
            .needs([HISTORY, TOTAL]),
        property("RP-08", "From an index on nothing older arrives, neither replayed nor live", &["R1", "B3"], offsets)
            .needs([HISTORY, INDEX]),
        omitted("RP-09", "A transport that sends its backlog again is still replayed once and in order", &["R1"], DECORATOR),
        property("RP-10", "What cannot be resumed from is refused as the gap it is, or replays what is left", &["B4"], gaps)
            .needs([HISTORY]),
        property("RP-11", "Without indices a start from one is refused", &["R6", "B3"], no_index)
            .needs([Need::Without(Capability::Index)]),
        omitted("RP-12", "Suppressed duplicates are acknowledged", &["R3"], DECORATOR),
        property("RP-13", "Retries of replayed and of live events are no duplicates", &["R3", "S3"], retries)
            .needs([HISTORY, TOTAL]),
        omitted("RP-14", "Live events buffered during a replay keep working handles", &["R1", "R3"], DECORATOR),
        omitted("RP-15", "A replay that cannot begin leaves nothing attached", &["R1"], DECORATOR),
        property("RP-16", "A replay of an empty topic is only what is live", &["R1"], empty).needs([HISTORY]),
        property("RP-17", "Concurrent replays each get everything", &["R1", "B2"], concurrent).needs([HISTORY, TOTAL]),
        omitted("RP-18", "The memory of what was delivered stays bounded", &["R5"], DECORATOR),
        omitted("RP-19", "An event that could not be cached is live without an index", &["R2"], DECORATOR),
        omitted("RP-20", "An index is given and its event kept in one operation of the cache", &["R2"], DECORATOR),
        property("RP-21", "A plain subscription never replays", &["R1", "B3"], plain),
        property("RP-22", "Events that stay local take no index and are not in the history", &["R2", "P4"], local_only)
            .needs([HISTORY, INDEX]),
        omitted("RP-23", "Where replay is exact, what cannot be appended is not published", &["R1"], DECORATOR),
        property("RP-24", "History tells the oldest and the newest position it has", &["R2"], range).needs([HISTORY]),
        property("RP-25", "A clear starts a new generation, in which who watches goes on at 0", &["R2", "R4"], cleared)
            .needs([HISTORY, INDEX]),
        omitted("RP-26", "Where replay is exact, a read ends at the head it found", &["R1"], DECORATOR),
        omitted("RP-27", "Where replay is exact, what live events leave out is read from the log", &["R1"], DECORATOR),
        property(
            "RP-28",
            "A replayed delivery can be retried, which only its subscription notices",
            &["R3", "S3"],
            retry_is_local,
        )
        .needs([HISTORY]),
        omitted("RP-29", "Exact replay refuses or retains what stays local, as configured", &["P4"], DECORATOR),
        omitted("RP-31", "A damaged entry of the cache is an error of its kind", &["S7"], DECORATOR),
    ]
}

/// The events of the whole history, oldest first.
async fn kept(ctx: &Ctx, bus: &Bus, topic: &Topic, from: Start) -> Verdict<Vec<Arc<Event>>> {
    let page = ctx.within("history", bus.history(topic, from, 1000)).await??;
    ensure!(page.next.is_none(), "more than a thousand events are kept");
    Ok(page.entries.into_iter().map(|(_, event)| event).collect())
}

fn places<'a>(events: impl IntoIterator<Item = &'a Arc<Event>>) -> Vec<ReplayIndex> {
    events.into_iter().filter_map(|event| event.index()).collect()
}

/// Holds events to indices from 0 on, in one generation, which is returned.
fn dense_from_zero(events: &[Arc<Event>]) -> Verdict<Option<u64>> {
    let indices: Vec<_> = places(events).iter().map(|place| place.index).collect();
    ensure_eq!(indices, (0..events.len() as u64).collect::<Vec<_>>(), "indices");
    let generation = events.first().and_then(|event| event.index()).map(|place| place.generation);
    let same = places(events).iter().all(|place| Some(place.generation) == generation);
    ensure!(same, "several generations: {:?}", places(events));
    Ok(generation)
}

fn replaying(ctx: &Ctx) -> SubscribeOptions {
    ctx.fan_out().start(Start::Earliest)
}

async fn nothing_kept(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("nothing"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 5).await?;
    for from in [Start::Earliest, Start::Latest, Start::Index(0)] {
        let refused = ctx.within("history", bus.history(&topic, from, 10)).await?.err();
        let fits = matches!(refused.as_ref().map(Error::kind), Some(ErrorKind::Unsupported(_)));
        ensure!(fits, "history where nothing is retained: {refused:?}");
    }
    ensure_eq!(ctx.within("trim", bus.trim_topic(&topic, TrimFilter::run("run"))).await??, 0, "events trimmed");
    ctx.within("clear", bus.clear_topic(&topic)).await??;
    // Neither took anything from those who listen.
    let fence = ctx.fence(&bus, &topic).await?;
    exactly(&sent, &ctx.until(&mut subscription, &fence).await?)
}

async fn history(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("history"));
    ensure!(kept(&ctx, &bus, &topic, Start::Earliest).await?.is_empty(), "an unknown topic has a history");
    let sent = ids(&ctx.publish(&bus, &topic, 9).await?);
    let all = kept(&ctx, &bus, &topic, Start::Earliest).await?;
    ensure_eq!(ids(&all), sent, "the history");
    dense_from_zero(&all)?;
    for from in 0..sent.len() {
        let rest = kept(&ctx, &bus, &topic, Start::Index(from as u64)).await?;
        ensure_eq!(ids(&rest), sent[from..], "the history from {from} on");
    }
    ensure!(kept(&ctx, &bus, &topic, Start::Latest).await?.is_empty(), "history from the latest on");
    Ok(())
}

async fn dense(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("dense"));
    let other = if ctx.harness().spans_instances() { ctx.connect().await? } else { bus.clone() };
    let events = ctx.events(80);
    let publishing = events.iter().enumerate().map(|(n, event)| [&bus, &other][n % 2].publish(&topic, event.clone()));
    ctx.within("all publishes", try_join_all(publishing)).await??;
    let all = kept(&ctx, &other, &topic, Start::Earliest).await?;
    exactly_once(&ids(&events), &ids(&all))?;
    dense_from_zero(&all).map(drop)
}

async fn restarted(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("restarted"));
    let faults = ctx.harness().faults().ok_or_else(|| Mismatch::new("no faults"))?;
    let mut sent = ctx.publish(&bus, &topic, 5).await?;
    ctx.within("a restart", faults.inject(Fault::Restart)).await??;
    let bus = ctx.connect().await?;
    sent.extend(ctx.publish(&bus, &topic, 5).await?);
    let all = kept(&ctx, &bus, &topic, Start::Earliest).await?;
    ensure_eq!(ids(&all), ids(&sent), "the history");
    let before = dense_from_zero(&all)?;
    ctx.within("clear", bus.clear_topic(&topic)).await??;
    ensure!(kept(&ctx, &bus, &topic, Start::Earliest).await?.is_empty(), "a cleared topic has a history");
    let sent = ctx.publish(&bus, &topic, 3).await?;
    let all = kept(&ctx, &bus, &topic, Start::Earliest).await?;
    ensure_eq!(ids(&all), ids(&sent), "the history after a clear");
    let after = dense_from_zero(&all)?;
    ensure!(after > before, "generation {after:?} after {before:?}");
    Ok(())
}

async fn same_index(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("same"));
    let mut live = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    ctx.publish(&bus, &topic, 10).await?;
    let seen = ctx.collect(&mut live, 10).await?;
    let all = kept(&ctx, &bus, &topic, Start::Earliest).await?;
    let of = |event: &Event| (event.id().clone(), event.index());
    let seen: Vec<_> = seen.iter().map(|delivery| of(delivery.event())).collect();
    ensure!(seen.iter().all(|(_, index)| index.is_some()), "live events without index: {seen:?}");
    ensure_eq!(seen, all.iter().map(|event| of(event)).collect::<Vec<_>>(), "live and in the history");
    Ok(())
}

async fn replay(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("replay"));
    let mut sent = ctx.publish(&bus, &topic, 30).await?;
    let mut subscription = ctx.subscribe(&bus, &topic, replaying(&ctx)).await?;
    let mut seen = delivered(&ctx.collect(&mut subscription, 10).await?);
    sent.extend(ctx.publish(&bus, &topic, 10).await?);
    let fence = ctx.fence(&bus, &topic).await?;
    seen.extend(delivered(&ctx.until(&mut subscription, &fence).await?));
    ensure_eq!(seen, ids(&sent), "what was replayed and live");
    ctx.nothing_before_fence(&mut subscription, &bus, &topic).await
}

async fn while_beginning(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("begins"));
    let publishing = ctx.spawn({
        let (own, bus, topic) = (ctx.clone(), bus.clone(), topic.clone());
        async move { own.publish(&bus, &topic, 80).await }
    });
    // They begin here and there in what is being published.
    let mut replays = Vec::new();
    for _ in 0..10 {
        replays.push(ctx.subscribe(&bus, &topic, replaying(&ctx)).await?);
    }
    let sent = ids(&ctx.join("the publisher", publishing).await??);
    let fence = ctx.fence(&bus, &topic).await?;
    for (number, replay) in replays.iter_mut().enumerate() {
        let seen = delivered(&ctx.until(replay, &fence).await?);
        exactly_once(&sent, &seen).map_err(|why| why.at(format!("replay {number}")))?;
        ensure_eq!(seen, sent, "order of replay {number}");
    }
    Ok(())
}

async fn offsets(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("offsets"));
    let mut sent = ctx.publish(&bus, &topic, 10).await?;
    let mut subscriptions = Vec::new();
    for from in [0, 4, 9, 10] {
        subscriptions.push((from, ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Index(from))).await?));
    }
    sent.extend(ctx.publish(&bus, &topic, 5).await?);
    let fence = ctx.fence(&bus, &topic).await?;
    for (from, subscription) in &mut subscriptions {
        let seen = ctx.until(subscription, &fence).await?;
        exactly(&sent[usize::try_from(*from)?..], &seen).map_err(|why| why.at(format!("from {from} on")))?;
        let older: Vec<_> =
            places(seen.iter().map(pubsub_core::Delivery::event)).into_iter().filter(|at| at.index < *from).collect();
        ensure!(older.is_empty(), "from {from} on there came {older:?}");
    }
    Ok(())
}

async fn gaps(ctx: Ctx) -> Verdict {
    let (bus, topic, elsewhere) = (ctx.bus().await?, ctx.topic("gaps"), ctx.elsewhere().await?);
    let cursors = async |bus: &Bus| {
        let page = ctx.within("history", bus.history(&topic, Start::Earliest, 10)).await??;
        Verdict::Ok(page.entries.into_iter().map(|(cursor, _)| cursor).collect::<Vec<_>>())
    };
    ctx.publish(&elsewhere, &topic, 3).await?;
    let foreign = cursors(&elsewhere).await?.remove(1);
    ctx.publish(&bus, &topic, 3).await?;
    let old = cursors(&bus).await?.remove(1);
    ctx.within("clear", bus.clear_topic(&topic)).await??;
    let left = ctx.publish(&bus, &topic, 4).await?;
    let newest = cursors(&bus).await?.remove(3);
    let mut beyond = newest.position();
    beyond.major += 1_000_000;
    let ahead = Cursor::new(newest.scope().clone(), beyond);
    for (cursor, gap) in [(foreign, Gap::OtherBus), (old, Gap::OtherGeneration), (ahead, Gap::Ahead)] {
        let (start, due) = (Start::After(cursor), Some(ErrorKind::Gap(gap)));
        let refused = ctx.within("subscribe", bus.subscribe_with(&topic, ctx.fan_out().start(start.clone()))).await?.err();
        ensure_eq!(refused.map(|error| error.kind().clone()), due, "a subscription from {start:?}");
        let refused = ctx.within("history", bus.history(&topic, start.clone(), 10)).await?.err();
        ensure_eq!(refused.map(|error| error.kind().clone()), due, "history from {start:?}");
        let mut replay = ctx.subscribe(&bus, &topic, ctx.fan_out().start(start).on_gap(OnGap::Earliest)).await?;
        ensure_eq!(delivered(&ctx.collect(&mut replay, 4).await?), ids(&left), "what is left");
    }
    Ok(())
}

async fn no_index(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("no-index"));
    let refused = ctx.within("subscribe", bus.subscribe_from_offset(&topic, 0)).await?.err();
    let due = Some(ErrorKind::Unsupported(Capability::Index));
    ensure_eq!(refused.map(|error| error.kind().clone()), due, "a subscription from index 0");
    let mut plain = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    ctx.publish(&bus, &topic, 1).await?;
    ensure_eq!(ctx.next(&mut plain).await?.event().index(), None, "index");
    Ok(())
}

async fn retries(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("retries"));
    let mut sent = ctx.publish(&bus, &topic, 5).await?;
    let mut replay = ctx.subscribe(&bus, &topic, replaying(&ctx).ack_mode(AckMode::Manual)).await?;
    sent.extend(ctx.publish(&bus, &topic, 5).await?);
    let (mut first, mut again) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let delivery = ctx.next(&mut replay).await?;
        let id = delivery.event().id().clone();
        match delivery.attempt() {
            1 => {
                first.push(id);
                ctx.confirmed(delivery.retry()).await?;
            }
            attempt => {
                ensure_eq!(attempt, 2, "attempt");
                again.push(id);
                ctx.confirmed(delivery.done()).await?;
            }
        }
    }
    ensure_eq!(first, ids(&sent), "first deliveries");
    exactly_once(&ids(&sent), &again).map_err(|why| why.at("retries"))?;
    ctx.nothing_more(&bus, &topic, [&mut replay]).await
}

async fn empty(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("empty"));
    let mut replay = ctx.subscribe(&bus, &topic, replaying(&ctx)).await?;
    ctx.nothing_before_fence(&mut replay, &bus, &topic).await?;
    let sent = ctx.publish(&bus, &topic, 5).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    exactly(&sent, &ctx.until(&mut replay, &fence).await?)
}

async fn concurrent(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("concurrent"));
    let mut sent = ctx.publish(&bus, &topic, 20).await?;
    let replays = join_all((0..8).map(|_| ctx.subscribe(&bus, &topic, replaying(&ctx)))).await;
    sent.extend(ctx.publish(&bus, &topic, 10).await?);
    let fence = ctx.fence(&bus, &topic).await?;
    for replay in replays {
        ensure_eq!(delivered(&ctx.until(&mut replay?, &fence).await?), ids(&sent), "what a replay got");
    }
    Ok(())
}

async fn plain(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("plain"));
    let mut before = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let old = ctx.publish(&bus, &topic, 8).await?;
    exactly_once(&ids(&old), &ctx.collect_done(&mut before, 8).await?)?;
    let mut plain = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    ctx.nothing_before_fence(&mut plain, &bus, &topic).await
}

async fn local_only(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("local"));
    let mut live = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let (mut kept_events, mut local) = (Vec::new(), ctx.events(5));
    for event in &local {
        kept_events.extend(ctx.publish(&bus, &topic, 1).await?);
        let publish = bus.publish_with(&topic, std::slice::from_ref(event), PublishOptions::local_only());
        ctx.within("publish locally", publish).await??;
    }
    let all = kept(&ctx, &bus, &topic, Start::Earliest).await?;
    ensure_eq!(ids(&all), ids(&kept_events), "the history");
    dense_from_zero(&all)?;
    let seen = ctx.collect(&mut live, 10).await?;
    let indexed = seen.iter().filter(|delivery| delivery.event().index().is_some()).map(|one| one.event().id().clone());
    exactly_once(&ids(&kept_events), &indexed.collect::<Vec<_>>()).map_err(|why| why.at("events with an index"))?;
    local.extend(kept_events);
    exactly(&local, &seen)
}

async fn range(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("range"));
    let none = ctx.within("history", bus.history(&topic, Start::Earliest, 10)).await??;
    ensure_eq!((none.floor, none.head), (None, None), "floor and head of an empty topic");
    ctx.publish(&bus, &topic, 6).await?;
    let all = ctx.within("history", bus.history(&topic, Start::Earliest, 10)).await??;
    let cursors: Vec<_> = all.entries.iter().map(|(cursor, _)| cursor.clone()).collect();
    ensure_eq!(cursors.len(), 6, "entries");
    for (from, limit) in [(Start::Earliest, 2), (Start::Latest, 10), (Start::After(cursors[3].clone()), 10)] {
        let page = ctx.within("history", bus.history(&topic, from.clone(), limit)).await??;
        ensure_eq!(page.floor.as_ref(), cursors.first(), "floor, from {from:?}");
        ensure_eq!(page.head.as_ref(), cursors.last(), "head, from {from:?}");
        let refused = ctx.within("history", bus.history(&topic, from, 0)).await?.err().map(|error| error.kind().clone());
        ensure!(matches!(&refused, Some(ErrorKind::InvalidOption { option, .. }) if option == "limit"), "limit 0: {refused:?}");
    }
    Ok(())
}

async fn cleared(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("cleared"));
    let mut watcher = ctx.subscribe(&bus, &topic, replaying(&ctx)).await?;
    ctx.publish(&bus, &topic, 5).await?;
    let before = ctx.collect(&mut watcher, 5).await?;
    let before = dense_from_zero(&before.iter().map(|one| one.event().clone()).collect::<Vec<_>>())?;
    ctx.within("clear", bus.clear_topic(&topic)).await??;
    let sent = ctx.publish(&bus, &topic, 4).await?;
    let after: Vec<_> = ctx.collect(&mut watcher, 4).await?.iter().map(|one| one.event().clone()).collect();
    ensure_eq!(ids(&after), ids(&sent), "what the watcher got");
    let after = dense_from_zero(&after)?;
    ensure!(after > before, "generation {after:?} after {before:?}");
    Ok(())
}

async fn retry_is_local(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("local-retry"));
    let mut live = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 2).await?;
    exactly(&sent, &ctx.collect(&mut live, 2).await?)?;
    let mut replay = ctx.subscribe(&bus, &topic, replaying(&ctx).ack_mode(AckMode::Manual)).await?;
    let mut replayed = ctx.collect(&mut replay, 2).await?;
    ctx.confirmed(replayed.remove(0).done()).await?;
    ctx.confirmed(replayed.remove(0).retry_after(Duration::from_millis(1))).await?;
    let again = ctx.next(&mut replay).await?;
    ensure_eq!((again.event().id(), again.attempt()), (sent[1].id(), 2), "what came again");
    ctx.confirmed(again.done()).await?;
    ctx.nothing_more(&bus, &topic, [&mut replay, &mut live]).await?;
    let all = kept(&ctx, &bus, &topic, Start::Earliest).await?;
    ensure_eq!(all.len(), 3, "events kept, of two and a fence");
    Ok(())
}
