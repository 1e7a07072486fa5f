//! Clearing and trimming topics.

use std::sync::Arc;
use std::time::Duration;

use pubsub_core::{Bus, Capability, Event, EventId, LossNotice, Message, Start, Topic, TrimFilter};
use serde_json::{Value, json};

use crate::oracle::{Recorder, exactly_once, ids};
use crate::{Ctx, Fault, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const GROUPS: Need = Need::Capability(Capability::Groups);
    const HISTORY: Need = Need::Capability(Capability::History);
    const LETTERS: Need = Need::Capability(Capability::DeadLetterHistory);
    vec![
        property(
            "CT-01",
            "A clear forgets what the topic retains and starts anew, and leaves other topics alone",
            &["R4"],
            clears,
        )
        .needs([HISTORY]),
        property("CT-02", "Clearing and trimming what is unknown, empty or not retained does nothing", &["R4", "R6"], nothing),
        property("CT-03", "Subscriptions live through a clear and get what comes after it", &["R4"], lives_on),
        property("CT-04", "A clear or a trim that fails tells who waits for it, and can be repeated", &["R4", "N1"], told)
            .needs([Need::Fault(Fault::Outage)]),
        omitted(
            "CT-05",
            "A decorator clears what it keeps and what it wraps",
            &["R4"],
            "concerns decorators; the tests of each hold it",
        ),
        property(
            "CT-06",
            "Indices begin anew with a clear, and who reads from the earliest misses nothing",
            &["R4", "R2"],
            anew,
        )
        .needs([HISTORY, Capability::Index.into()]),
        omitted(
            "CT-07",
            "A topic that is idle for its time is forgotten",
            &["R5"],
            "concerns an option of the backends that have it; their tests hold it",
        ),
        property("CT-08", "What a topic retains is bounded, and the bound breaks no live subscription", &["R5"], bounded)
            .needs([HISTORY])
            .limit(Duration::from_secs(120)),
        property("CT-09", "A trim removes one run's events, and of those what is old and not pinned", &["R4"], trims)
            .needs([HISTORY]),
        property("CT-10", "What is trimmed while a member holds it does not come round and round", &["R4"], trimmed_while_held)
            .needs([HISTORY, Capability::DurableGroups.into()]),
        property(
            "CT-11",
            "The dead letters that are kept are bounded in number, and the newest stay",
            &["R5"],
            bounded_letters,
        )
        .needs([LETTERS, GROUPS, Need::Without(Capability::History)]),
        property("CT-12", "A clear forgets dead letters, and those that follow are kept", &["R4"], clears_letters)
            .needs([LETTERS, GROUPS]),
        property("CT-13", "A trim removes one run's dead letters", &["R4"], trims_letters).needs([LETTERS, GROUPS]),
        property("CT-14", "What was published is not kept where nothing is declared to be", &["R5", "R6"], keeps_nothing)
            .needs([Need::NoRetention]),
    ]
}

/// How many events a topic retains, if the backend knows.
async fn retained(ctx: &Ctx, bus: &Bus, topic: &Topic) -> Verdict<Option<u64>> {
    Ok(ctx.within("inspect", bus.inspect(topic)).await??.retained)
}

/// Holds a topic to retaining exactly these events.
async fn retains(ctx: &Ctx, bus: &Bus, topic: &Topic, events: &[Arc<Event>]) -> Verdict {
    let page = ctx.within("history", bus.history(topic, Start::Earliest, 1000)).await??;
    let listed: Vec<_> = page.entries.iter().map(|(_, event)| event.id().clone()).collect();
    ensure_eq!(listed, ids(events), "the history");
    let told = retained(ctx, bus, topic).await?;
    ensure!(told.is_none_or(|told| told == events.len() as u64), "{told:?} retained, and {} listed", events.len());
    Ok(())
}

async fn clear(ctx: &Ctx, bus: &Bus, topic: &Topic) -> Verdict {
    Ok(ctx.within("clear", bus.clear_topic(topic)).await??)
}

async fn trim(ctx: &Ctx, bus: &Bus, topic: &Topic, filter: TrimFilter) -> Verdict<u64> {
    Ok(ctx.within("trim", bus.trim_topic(topic, filter)).await??)
}

async fn clears(ctx: Ctx) -> Verdict {
    let (bus, topic, other) = (ctx.bus().await?, ctx.topic("cleared"), ctx.topic("other"));
    let before = ctx.publish(&bus, &topic, 5).await?;
    let elsewhere = ctx.publish(&bus, &other, 5).await?;
    retains(&ctx, &bus, &topic, &before).await?;
    clear(&ctx, &bus, &topic).await?;
    retains(&ctx, &bus, &topic, &[]).await?;
    retains(&ctx, &bus, &other, &elsewhere).await?;
    let after = ctx.publish(&bus, &topic, 3).await?;
    retains(&ctx, &bus, &topic, &after).await?;
    let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Earliest)).await?;
    exactly(&after, &ctx.collect(&mut late, 3).await?)?;
    ctx.nothing_before_fence(&mut late, &bus, &topic).await
}

async fn nothing(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("nothing"));
    for _ in 0..2 {
        clear(&ctx, &bus, &topic).await?;
        ensure_eq!(trim(&ctx, &bus, &topic, TrimFilter::run("run")).await?, 0, "trimmed from an unknown topic");
    }
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 3).await?;
    exactly(&sent, &ctx.collect(&mut subscription, 3).await?)?;
    let keeps = ctx.capabilities().supports(Capability::History);
    let trimmed = trim(&ctx, &bus, &topic, TrimFilter::run("run")).await?;
    ensure_eq!(trimmed, if keeps { 3 } else { 0 }, "trimmed");
    ensure_eq!(trim(&ctx, &bus, &topic, TrimFilter::run("run")).await?, 0, "trimmed again");
    for _ in 0..2 {
        clear(&ctx, &bus, &topic).await?;
    }
    ensure!(matches!(retained(&ctx, &bus, &topic).await?, None | Some(0)), "retained after a clear");
    ctx.nothing_before_fence(&mut subscription, &bus, &topic).await
}

async fn lives_on(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("cleared"));
    let other = if ctx.harness().spans_instances() { ctx.connect().await? } else { bus.clone() };
    let mut subscriptions = Vec::new();
    for instance in [&bus, &other, &bus] {
        subscriptions.push(ctx.subscribe(instance, &topic, ctx.fan_out()).await?);
    }
    if ctx.capabilities().supports(Capability::Groups) {
        for instance in [&bus, &other] {
            subscriptions.push(ctx.subscribe(instance, &topic, ctx.member(&ctx.group("g"))).await?);
        }
    }
    for round in 0..4 {
        let sent = ids(&ctx.publish(&bus, &topic, 4).await?);
        for subscription in &mut subscriptions {
            let seen = ctx.collect_done(subscription, 4).await.map_err(|why| why.at(format!("round {round}")))?;
            exactly_once(&sent, &seen).map_err(|why| why.at(format!("round {round}")))?;
        }
        // All was handed over and is settled: a clear has nothing of theirs to forget.
        for instance in [&bus, &other] {
            ctx.within("flush", instance.flush()).await??;
        }
        clear(&ctx, if round % 2 == 0 { &bus } else { &other }, &topic).await?;
    }
    let fence = ctx.fence(&bus, &topic).await?;
    for subscription in &mut subscriptions {
        exactly(&[], &ctx.until(subscription, &fence).await?)?;
        ensure!(!subscription.status().ended, "ended by a clear");
    }
    Ok(())
}

async fn told(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("outage"));
    let faults = ctx.harness().faults().ok_or_else(|| Mismatch::new("no faults"))?;
    ctx.publish(&bus, &topic, 3).await?;
    ctx.within("an outage", faults.inject(Fault::Outage)).await??;
    // Either may fail; it may not say that it is done and leave it undone.
    let cleared = ctx.within("clear", bus.clear_topic(&topic)).await?;
    let trimmed = ctx.within("trim", bus.trim_topic(&topic, TrimFilter::run("run"))).await?;
    ctx.within("healing", faults.inject(Fault::Heal)).await??;
    let has_history = ctx.capabilities().supports(Capability::History);
    let done = cleared.is_ok() || trimmed.is_ok();
    let said = [("clear", cleared.map(|()| has_history)), ("trim", trimmed.map(|count| has_history || count == 0))];
    for (what, said) in said {
        match said {
            Err(error) => ensure!(error.is_retryable(), "a {what} fails for good: {error}"),
            Ok(possible) => ensure!(possible, "a {what} was carried out without a server"),
        }
    }
    if has_history && done {
        retains(&ctx, &bus, &topic, &[]).await.map_err(|why| why.at("after a clear or a trim that was said to be done"))?;
    }
    clear(&ctx, &bus, &topic).await?;
    ensure!(matches!(retained(&ctx, &bus, &topic).await?, None | Some(0)), "retained after a clear that was repeated");
    Ok(())
}

async fn anew(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("anew"));
    let mut watcher = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Earliest)).await?;
    let mut generations = Vec::new();
    // Each time more than after the clear: indices that restart lower must not be taken for old ones.
    for count in [8, 5, 2] {
        let sent = ctx.publish(&bus, &topic, count).await?;
        let came = ctx.collect(&mut watcher, count).await?;
        exactly(&sent, &came)?;
        let places: Vec<_> = came.iter().filter_map(|delivery| delivery.event().index()).collect();
        ensure_eq!(
            places.iter().map(|place| place.index).collect::<Vec<_>>(),
            (0..count as u64).collect::<Vec<_>>(),
            "indices"
        );
        ensure!(places.iter().all(|place| place.generation == places[0].generation), "generations are mixed: {places:?}");
        generations.push(places[0].generation);
        clear(&ctx, &bus, &topic).await?;
    }
    ensure!(generations.is_sorted_by(|before, after| before < after), "the generations were {generations:?}");
    Ok(())
}

async fn bounded(ctx: Ctx) -> Verdict {
    const TOGETHER: usize = 500;
    const MOST: usize = 40_000;
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("bounded"), Recorder::new());
    let live = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "live");
    let lagging = match ctx.capabilities().supports(Capability::DurableGroups) {
        true => Some(ctx.group("lagging")),
        false => None,
    };
    if let Some(group) = &lagging {
        ctx.within("unsubscribe", ctx.subscribe(&bus, &topic, ctx.member(group)).await?.unsubscribe()).await?;
    }
    let mut sent = Vec::new();
    let kept = loop {
        let events = ctx.events(TOGETHER);
        ctx.publish_all(&bus, &topic, &events).await?;
        sent.extend(events);
        let what = format!("the live one has {}", sent.len());
        ctx.eventually(what, || recorder.count_of("live") >= sent.len()).await?;
        let kept = retained(&ctx, &bus, &topic).await?.ok_or_else(|| Mismatch::new("what is retained is not known"))?;
        if kept < sent.len() as u64 {
            break usize::try_from(kept).unwrap_or(usize::MAX);
        }
        ensure!(sent.len() < MOST, "all of {MOST} events are retained by default");
    };
    exactly_once(&ids(&sent), &recorder.ids_of("live"))?;
    drop(live);
    // It is the newest that are kept.
    let mut early = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Earliest)).await?;
    exactly_once(&ids(&sent[sent.len() - kept..]), &ctx.collect_done(&mut early, kept).await?)?;
    if let Some(group) = lagging {
        let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
        if ctx.capabilities().supports(Capability::GroupHistory) {
            let fence = ctx.fence(&bus, &topic).await?;
            is_told(&ctx, &mut member, &sent, &fence).await?;
        } else {
            // It does not live on the history: what it keeps is its own.
            exactly_once(&ids(&sent), &ctx.collect_done(&mut member, sent.len()).await?)?;
        }
    }
    Ok(())
}

/// Holds a member that reads what is left to having lost only the oldest, and to being told of them, as its backend declares. Over a
/// decorator the history may have more than is left for the group.
async fn is_told(ctx: &Ctx, member: &mut pubsub_core::Subscription, sent: &[Arc<Event>], fence: &EventId) -> Verdict {
    let (mut seen, mut lagged) = (Vec::new(), 0);
    loop {
        let delivery = ctx.next(member).await.map_err(|why| why.at(format!("after {}", seen.len())))?;
        lagged += delivery.lagged();
        let id = delivery.event().id().clone();
        drop(delivery.done());
        if id == *fence {
            break;
        }
        seen.push(id);
    }
    ensure!(seen.len() < sent.len(), "nothing was lost");
    let lost = (sent.len() - seen.len()) as u64;
    exactly_once(&ids(&sent[sent.len() - seen.len()..]), &seen).map_err(|why| why.at("what a group that lost some reads"))?;
    match ctx.capabilities().loss_notice {
        LossNotice::Counted => ensure_eq!(lagged, lost, "how many the group is told it lost"),
        LossNotice::Noticed => ensure!(lagged > 0, "the group is not told that it lost {lost}"),
        _ => {}
    }
    Ok(())
}

/// Publishes events of these runs; their data says when they were produced, and whether they are pinned.
async fn runs(ctx: &Ctx, bus: &Bus, topic: &Topic, of: &[(&str, Value)]) -> Verdict<Vec<Arc<Event>>> {
    let events: Vec<_> =
        of.iter().map(|(run, data)| Arc::new(Event::new("produced").with_run_id(run).with_data(data.clone()))).collect();
    ctx.publish_all(bus, topic, &events).await?;
    Ok(events)
}

async fn trims(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("trimmed"));
    let sent = runs(
        &ctx,
        &bus,
        &topic,
        &[
            ("a", json!({ "producedAt": 1000 })),
            ("b", json!({ "producedAt": 1000 })),
            ("a", json!({ "producedAt": 1000, "pinned": true })),
            ("a", json!({ "producedAt": 1001 })),
            ("a", json!({ "producedAt": 999, "pinned": false })),
            ("a", json!({ "produced": 1 })),
            ("a", json!("text")),
            ("A", json!({ "producedAt": 1 })),
            ("", json!({ "producedAt": 1 })),
        ],
    )
    .await?;
    let left = |gone: &[usize]| -> Vec<_> {
        sent.iter().enumerate().filter(|(place, _)| !gone.contains(place)).map(|(_, event)| event.clone()).collect()
    };
    ensure_eq!(trim(&ctx, &bus, &topic, TrimFilter::run("nobody's")).await?, 0, "trimmed of an unknown run");
    let old = TrimFilter::run("a").produced_up_to(1000);
    ensure_eq!(trim(&ctx, &bus, &topic, old.clone()).await?, 2, "trimmed up to a time");
    retains(&ctx, &bus, &topic, &left(&[0, 4])).await?;
    ensure_eq!(trim(&ctx, &bus, &topic, old).await?, 0, "trimmed again");
    ensure_eq!(trim(&ctx, &bus, &topic, TrimFilter::run("a")).await?, 4, "trimmed of a whole run");
    let rest = left(&[0, 2, 3, 4, 5, 6]);
    retains(&ctx, &bus, &topic, &rest).await?;
    // Who comes later reads what is left, then what comes.
    let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out().start(Start::Earliest)).await?;
    exactly(&rest, &ctx.collect(&mut late, rest.len()).await?)?;
    ctx.nothing_before_fence(&mut late, &bus, &topic).await
}

async fn trimmed_while_held(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("held"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    ctx.publish(&bus, &topic, 3).await?;
    let mut held = ctx.collect(&mut member, 3).await?;
    ensure_eq!(trim(&ctx, &bus, &topic, TrimFilter::run("run")).await?, 3, "trimmed");
    // Whatever the answers are: what was trimmed may be refused.
    ctx.answer(held.remove(0).done()).await?;
    ctx.answer(held.remove(0).release()).await?;
    ctx.answer(held.remove(0).retry()).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    let mut again = Vec::new();
    for delivery in ctx.until(&mut member, &fence).await? {
        again.push(delivery.event().id().clone());
        drop(delivery.done());
    }
    ensure!(again.len() <= 2, "two were given back, and {} came", again.len());
    // It ends: nothing is left that nobody could read.
    let handle = member.handle();
    let rest = ctx.consume(member, &Recorder::new(), "rest");
    ctx.within("drained", handle.drained()).await?;
    rest.leave(&ctx).await
}

/// Gives up so many new events of a run, one after the other, to a dead-letter topic, and returns their ids.
async fn bury(ctx: &Ctx, bus: &Bus, dead: &Topic, run: &str, count: usize) -> Verdict<Vec<String>> {
    let (topic, group) = (ctx.topic("work"), ctx.group("g"));
    let mut member = ctx.subscribe(bus, &topic, ctx.member(&group).dead_letter(dead.clone())).await?;
    let mut buried = Vec::new();
    while buried.len() < count {
        let together = (count - buried.len()).min(100);
        let events: Vec<_> = (0..together).map(|_| Arc::new(Event::new("work").with_run_id(run))).collect();
        ctx.publish_all(bus, &topic, &events).await?;
        for delivery in ctx.collect(&mut member, together).await? {
            buried.push(delivery.event().id().to_string());
            ctx.confirmed(delivery.dead_letter("as it should be")).await?;
        }
    }
    ctx.within("flush", bus.flush()).await??;
    Ok(buried)
}

/// The ids of the events whose dead letters are kept, in order.
async fn letters(ctx: &Ctx, bus: &Bus, dead: &Topic) -> Verdict<Vec<String>> {
    let page = ctx.within("history", bus.history(dead, Start::Earliest, 10_000)).await??;
    let origins = page.entries.iter().filter_map(|(_, letter)| pubsub_core::Origin::of(letter));
    Ok(origins.map(|origin| origin.event).collect())
}

/// Redrives what there is to nowhere, and returns the ids of the events that had been given up.
async fn redrive(ctx: &Ctx, bus: &Bus, dead: &Topic) -> Verdict<Vec<String>> {
    let seen = parking_lot::Mutex::new(Vec::new());
    let handler = |letter: Message| {
        seen.lock().extend(pubsub_core::Origin::of(letter.event()).map(|origin| origin.event));
        std::future::ready(Ok(()))
    };
    ctx.within("redrive", bus.redrive(dead, handler)).await??;
    Ok(seen.into_inner())
}

async fn bounded_letters(ctx: Ctx) -> Verdict {
    let (bus, dead) = (ctx.bus().await?, ctx.topic("dead"));
    let mut buried = Vec::new();
    let kept = loop {
        buried.extend(bury(&ctx, &bus, &dead, "run", 200).await?);
        let kept = letters(&ctx, &bus, &dead).await?;
        if kept.len() < buried.len() {
            break kept;
        }
        ensure!(buried.len() < 20_000, "all of {} dead letters are kept by default", buried.len());
    };
    ensure_eq!(kept, buried[buried.len() - kept.len()..], "the newest letters");
    let told = retained(&ctx, &bus, &dead).await?;
    ensure!(told.is_none_or(|told| told == kept.len() as u64), "{told:?} retained, and {} listed", kept.len());
    let more = bury(&ctx, &bus, &dead, "run", 10).await?;
    let after = letters(&ctx, &bus, &dead).await?;
    ensure_eq!(after.len(), kept.len(), "letters kept after ten more");
    ensure_eq!(after[after.len() - 10..], more, "the newest letters");
    exactly_once(&after, &redrive(&ctx, &bus, &dead).await?).map_err(|why| why.at("what is redriven"))
}

async fn clears_letters(ctx: Ctx) -> Verdict {
    let (bus, dead) = (ctx.bus().await?, ctx.topic("dead"));
    for round in 0..2 {
        let buried = bury(&ctx, &bus, &dead, "run", 5).await?;
        exactly_once(&buried, &letters(&ctx, &bus, &dead).await?).map_err(|why| why.at(format!("round {round}")))?;
        clear(&ctx, &bus, &dead).await?;
        ensure!(matches!(retained(&ctx, &bus, &dead).await?, None | Some(0)), "letters are retained after a clear");
        ensure_eq!(redrive(&ctx, &bus, &dead).await?, Vec::<String>::new(), "redriven after a clear");
    }
    let buried = bury(&ctx, &bus, &dead, "run", 3).await?;
    exactly_once(&buried, &redrive(&ctx, &bus, &dead).await?)
}

async fn trims_letters(ctx: Ctx) -> Verdict {
    let (bus, dead) = (ctx.bus().await?, ctx.topic("dead"));
    bury(&ctx, &bus, &dead, "goes", 4).await?;
    let stays = bury(&ctx, &bus, &dead, "stays", 3).await?;
    ensure_eq!(trim(&ctx, &bus, &dead, TrimFilter::run("nobody's")).await?, 0, "trimmed of an unknown run");
    ensure_eq!(trim(&ctx, &bus, &dead, TrimFilter::run("goes")).await?, 4, "trimmed");
    exactly_once(&stays, &letters(&ctx, &bus, &dead).await?)?;
    ensure_eq!(trim(&ctx, &bus, &dead, TrimFilter::run("goes")).await?, 0, "trimmed again");
    exactly_once(&stays, &redrive(&ctx, &bus, &dead).await?)
}

async fn keeps_nothing(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("nothing"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 20).await?;
    exactly(&sent, &ctx.collect(&mut subscription, 20).await?)?;
    drop(subscription);
    ctx.publish(&bus, &topic, 20).await?;
    ensure!(matches!(retained(&ctx, &bus, &topic).await?, None | Some(0)), "events are retained");
    let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    ctx.nothing_before_fence(&mut late, &bus, &topic).await
}
