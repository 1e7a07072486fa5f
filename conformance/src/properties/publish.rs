//! Publishing and subscribing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pubsub_core::{
    Capability, ErrorKind, Event, EventId, Failure, Payload, PublishOptions, ReplayIndex, SubscribeOptions, Timestamp, Topic,
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::oracle::{Recorder, delivered, exactly_once, ids};
use crate::{Ctx, FENCE, Job, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, panic_on_purpose, property};

const IDENTITY: Need = Need::Capability(Capability::KeepsIdentity);

pub(crate) fn properties() -> Vec<Property> {
    vec![
        property("PS-01", "A subscriber gets the published event with its type, run and data", &["P5", "P7"], arrives),
        property("PS-02", "Every fan-out subscription of an instance gets each event once", &["P1", "B2"], one_copy_each),
        property("PS-03", "Fan-out subscriptions of other instances get each event once", &["P1", "B2"], other_instances)
            .needs([Need::CrossInstance]),
        property("PS-04", "The publishing instance's own subscriptions get each event once", &["P1"], echo_once),
        property("PS-05", "No event reaches another topic or another bus", &["P1", "B2"], no_leak),
        property("PS-06", "Every event has an id of its own and the time it was made", &["P5"], stamped),
        property("PS-07", "The time of an event arrives to the millisecond", &["P5"], time_survives).needs([IDENTITY]),
        property("PS-08", "All subscriptions, groups and instances see the same id for one publish", &["P5"], same_id)
            .needs([Need::Capability(Capability::Groups)]),
        property("PS-09", "The first delivery is attempt 1", &["S3"], first_attempt),
        property("PS-10", "With 20 publishers everything sent arrives once, and nothing else", &["P1", "P3"], many_publishers),
        property("PS-11", "JSON data arrives as it was sent, whatever is in it", &["P7"], json_round_trips),
        property("PS-12", "Ids and times set by the caller are kept, an index set by the caller is not", &["P5"], caller_set)
            .needs([IDENTITY]),
        property("PS-13", "Odd topic names work without aliasing, or are refused", &["P1", "B2"], odd_topics),
        property("PS-14", "Publishing to a topic without subscriptions succeeds", &["P1"], nobody_listens),
        property("PS-15", "What was published outlives the process that published it", &["P1"], publisher_dies)
            .needs([Need::Capability(Capability::SurvivesProcessDeath), Need::SecondProcess]),
        property("PS-16", "Whatever is published after subscribe has returned is seen", &["B1"], no_window),
        property("PS-17", "Two equal subscribe calls are two independent subscriptions", &["B2"], never_merged),
        property("PS-18", "One handler on two topics is two subscriptions", &["B2"], handler_on_two_topics),
        property("PS-20", "A handler that fails or panics disturbs nobody, itself included", &["S1", "B2"], failing_handler),
        omitted(
            "PS-21",
            "A failing handler is logged with its topic",
            &["S4"],
            "logs are not observable through the bus; that failures are counted is",
        ),
        property("PS-22", "A stuck consumer holds up neither publishers nor others", &["B2", "B5"], stuck_consumer),
        property("PS-23", "A handler may wait for a later event of its own subscription", &["B6"], waits_for_later),
        property("PS-24", "A handler may publish, subscribe, unsubscribe, flush and stop itself", &["B6"], reentrant_handler),
        omitted(
            "PS-25",
            "A consumer that changes its copy of an event changes nobody else's",
            &["P5"],
            "cannot be written: events are handed out behind shared references",
        ),
        property("PS-26", "Twenty topics in use at once do not mix", &["P1", "B2"], many_topics),
    ]
}

async fn arrives(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("arrives"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let event = ctx.publish(&bus, &topic, 1).await?.remove(0);
    let delivery = ctx.next(&mut subscription).await?;
    ensure_eq!(delivery.event().id(), event.id(), "id");
    ensure_eq!(delivery.event().event_type(), event.event_type(), "type");
    ensure_eq!(delivery.event().run_id(), event.run_id(), "run");
    ensure_eq!(*delivery.data::<u64>()?, *event.data::<u64>()?, "data");
    ctx.nothing_before_fence(&mut subscription, &bus, &topic).await
}

async fn one_copy_each(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("copies"));
    let mut subscriptions = Vec::new();
    for _ in 0..5 {
        subscriptions.push(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?);
    }
    let sent = ctx.publish(&bus, &topic, 20).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    for subscription in &mut subscriptions {
        exactly(&sent, &ctx.until(subscription, &fence).await?)?;
    }
    Ok(())
}

async fn other_instances(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("others"));
    let (one, two) = (ctx.connect().await?, ctx.connect().await?);
    let mut there = ctx.subscribe(&one, &topic, ctx.fan_out()).await?;
    let mut also_there = ctx.subscribe(&one, &topic, ctx.fan_out()).await?;
    let mut elsewhere = ctx.subscribe(&two, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 20).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    for subscription in [&mut there, &mut also_there, &mut elsewhere] {
        exactly(&sent, &ctx.until(subscription, &fence).await?)?;
    }
    Ok(())
}

async fn echo_once(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("echo"));
    let mut own = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    // Another instance that listens makes the events take the long way too.
    let mut other = match ctx.harness().spans_instances() {
        true => Some(ctx.subscribe(&ctx.connect().await?, &topic, ctx.fan_out()).await?),
        false => None,
    };
    let sent = ctx.publish(&bus, &topic, 20).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    if let Some(other) = &mut other {
        exactly(&sent, &ctx.until(other, &fence).await?)?;
    }
    exactly(&sent, &ctx.until(&mut own, &fence).await?)?;
    ctx.nothing_before_fence(&mut own, &bus, &topic).await
}

async fn no_leak(ctx: Ctx) -> Verdict {
    let (bus, other_bus) = (ctx.bus().await?, ctx.elsewhere().await?);
    let (here, near) = (ctx.topic("leak"), ctx.topic("leak"));
    let mut on_topic = ctx.subscribe(&bus, &here, ctx.fan_out()).await?;
    let mut other_topic = ctx.subscribe(&bus, &near, ctx.fan_out()).await?;
    let mut same_name = ctx.subscribe(&other_bus, &here, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &here, 20).await?;
    // The control: what was published does arrive where it should.
    let fence = ctx.fence(&bus, &here).await?;
    exactly(&sent, &ctx.until(&mut on_topic, &fence).await?)?;
    ctx.nothing_before_fence(&mut other_topic, &bus, &near).await.map_err(|why| why.at("another topic"))?;
    ctx.nothing_before_fence(&mut same_name, &other_bus, &here).await.map_err(|why| why.at("another bus"))
}

async fn stamped(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("stamped"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let before = Timestamp::now();
    for _ in 0..20 {
        ctx.within("publish", bus.publish_data(&topic, "same", "same".to_owned())).await??;
    }
    let after = Timestamp::now();
    let deliveries = ctx.collect(&mut subscription, 20).await?;
    let mut seen = delivered(&deliveries);
    seen.sort();
    seen.dedup();
    ensure_eq!(seen.len(), 20, "different ids");
    for delivery in &deliveries {
        let event = delivery.event();
        ensure!(!event.id().to_string().is_empty(), "an id is empty");
        let time = event.created_at();
        ensure!(before <= time && time <= after, "{time} is not between {before} and {after}");
    }
    Ok(())
}

async fn time_survives(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("time"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    // The epoch, before it, the ends of a second, a leap day, and the far future.
    for millis in [0, -1, 999, 1_700_000_000_001, 1_700_000_000_999, 951_782_400_123, 4_102_444_799_999] {
        let time = Timestamp::from_millis(millis)?;
        ctx.publish_all(&bus, &topic, &[Arc::new(Event::stamped(EventId::random(), "timed", time))]).await?;
        ensure_eq!(ctx.next(&mut subscription).await?.event().created_at(), time, "time");
    }
    Ok(())
}

async fn same_id(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("same-id"));
    let second = if ctx.harness().spans_instances() { ctx.connect().await? } else { bus.clone() };
    let (one, two) = (ctx.group("one"), ctx.group("two"));
    let mut views = Vec::new();
    for instance in [&bus, &second] {
        views.push(ctx.subscribe(instance, &topic, ctx.fan_out()).await?);
    }
    views.push(ctx.subscribe(&bus, &topic, ctx.member(&one)).await?);
    views.push(ctx.subscribe(&second, &topic, ctx.member(&two)).await?);
    let sent = ids(&ctx.publish(&bus, &topic, 10).await?);
    for view in &mut views {
        let seen = ctx.collect_done(view, sent.len()).await?;
        // Where ids may be overwritten they still are the same for all; nobody but the sender knows the original.
        if ctx.capabilities().keeps_identity {
            exactly_once(&sent, &seen)?;
        }
    }
    let one = ctx.event();
    ctx.publish_all(&bus, &topic, &[one]).await?;
    let mut seen = Vec::new();
    for view in &mut views {
        seen.extend(ctx.collect_done(view, 1).await?);
    }
    seen.dedup();
    ensure_eq!(seen.len(), 1, "ids seen for one publish ({seen:?})");
    Ok(())
}

async fn first_attempt(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("first"), ctx.group("g"));
    let mut subscriptions = vec![ctx.subscribe(&bus, &topic, ctx.fan_out()).await?];
    if ctx.capabilities().supports(Capability::Groups) {
        subscriptions.push(ctx.subscribe(&bus, &topic, ctx.member(&group)).await?);
    }
    ctx.publish(&bus, &topic, 10).await?;
    for subscription in &mut subscriptions {
        for delivery in ctx.collect(subscription, 10).await? {
            ensure_eq!(delivery.attempt(), 1, "attempt");
            drop(delivery.done());
        }
    }
    Ok(())
}

async fn many_publishers(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("many"));
    let recorder = Recorder::new();
    let second = if ctx.harness().spans_instances() { ctx.connect().await? } else { bus.clone() };
    let a = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "a");
    let b = ctx.consume(ctx.subscribe(&second, &topic, ctx.fan_out()).await?, &recorder, "b");
    let publishers: Vec<_> = (0..20)
        .map(|publisher| {
            let bus = if publisher % 2 == 0 { bus.clone() } else { second.clone() };
            let (ctx, topic, recorder) = (ctx.clone(), topic.clone(), recorder.clone());
            let mut rng = ctx.rng();
            ctx.clone().spawn(async move {
                let mut left = 100;
                while left > 0 {
                    let events = ctx.events(rng.usize(1..=8).min(left));
                    left -= events.len();
                    events.iter().for_each(|event| recorder.published(publisher.to_string(), event));
                    ctx.publish_all(&bus, &topic, &events).await?;
                }
                Verdict::Ok(())
            })
        })
        .collect();
    for publisher in publishers {
        ctx.join("a publisher", publisher).await??;
    }
    for consumer in ["a", "b"] {
        ctx.eventually(format!("{consumer} got as many"), || recorder.count_of(consumer) >= 2000).await?;
    }
    // Behind everything from both instances, by way of each.
    ctx.fence_consumers(&bus, &topic, &recorder, &[&a, &b]).await?;
    ctx.fence_consumers(&second, &topic, &recorder, &[&a, &b]).await?;
    ctx.drained(&[&a, &b]).await?;
    for consumer in ["a", "b"] {
        exactly_once(&recorder.sent(), &recorder.ids_of(consumer)).map_err(|why| why.at(consumer))?;
    }
    Ok(())
}

async fn json_round_trips(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("json"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let nested = (0..100).fold(json!("deep"), |inner, i| if i % 2 == 0 { json!([inner]) } else { json!({ "in": inner }) });
    let mut values = vec![
        Value::Null,
        json!({}),
        json!([]),
        json!(""),
        json!(true),
        json!([i64::MIN, i64::MAX, u64::MAX, 0, -1]),
        json!([f64::MIN, f64::MAX, f64::MIN_POSITIVE, 5e-324, -0.0, 0.1, 1e300, 9_007_199_254_740_993_u64]),
        json!((0..0x20u8).map(char::from).chain(['\u{7f}', '\u{85}', '\u{2028}', '\u{feff}']).collect::<String>()),
        json!({ "quotes": "\"'`", "slashes": "\\/\\\\", "": "no key", "a\nb": "line break", "\u{0}": "\u{0}" }),
        json!("ünï 🦀 e\u{301} \u{10ffff} \u{200f}"),
        json!({ "id": "not the event's", "type": 1, "runId": [], "createdAt": null, "data": {}, "$date": 0 }),
        nested,
    ];
    // As large as the backend takes, up to two megabytes.
    let limit = ctx.capabilities().max_payload.unwrap_or(usize::MAX);
    values.push(json!("x".repeat(limit.saturating_sub(64).min(2 << 20))));
    for value in values {
        let text = serde_json::to_vec(&value)?;
        // What the text says, read by the same reader: a bus may not change it, a number's spelling is not the bus's matter.
        let expected: Value = serde_json::from_slice(&text)?;
        for payload in [Payload::typed(value.clone()), Payload::json(text)?] {
            let event = Arc::new(Event::new("json").with_payload(payload));
            ctx.publish_all(&bus, &topic, &[event]).await?;
            let delivery = ctx.next(&mut subscription).await?;
            let json: Value = serde_json::from_slice(&delivery.event().payload().to_json()?)?;
            ensure!(json == expected, "{:.200} became {:.200}", expected.to_string(), json.to_string());
            let data = delivery.data::<Value>()?;
            ensure!(*data == expected, "{:.200} reads as {:.200}", expected.to_string(), data.to_string());
        }
    }
    Ok(())
}

async fn caller_set(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("caller"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let long = "i".repeat(255);
    for text in ["7b5a8a2e-94b1-4d5b-9c3e-0a6a4f9f6c11", "7B5A8A2E-94B1-4D5B-9C3E-0A6A4F9F6C11", "42", "é\n\"", long.as_str()]
    {
        let (id, time) = (EventId::new(text)?, Timestamp::from_millis(1_234_567_890_123)?);
        let place = Some(ReplayIndex { generation: 7, index: 7_000_000 });
        let event = Event::stamped(id.clone(), "mine", time).with_index(place);
        ctx.publish_all(&bus, &topic, &[Arc::new(event)]).await?;
        let delivery = ctx.next(&mut subscription).await?;
        ensure_eq!(*delivery.event().id(), id, "id");
        ensure_eq!(delivery.event().created_at(), time, "time");
        ensure!(delivery.event().index() != place, "the caller's index was believed");
        if !ctx.capabilities().supports(Capability::Index) {
            ensure_eq!(delivery.event().index(), None, "an index where there are none");
        }
    }
    Ok(())
}

async fn odd_topics(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let long = "l".repeat(254);
    let names = [
        "a",
        "A",
        " a",
        "a ",
        "a.b",
        "a:b",
        "a/b",
        "a-b",
        "a_b",
        "a%2Fb",
        "a%3Ab",
        "%00",
        "%",
        "a*",
        "a>",
        "*",
        ">",
        "#",
        ".",
        "..",
        "../a",
        "/a",
        "a/",
        "a//b",
        "{a}",
        "$a",
        "__proto__",
        "\"a\"",
        "a\\b",
        "\u{e9}",
        "e\u{301}",
        "🦀",
        "a,b",
        "a=b",
        "a?b",
    ];
    let names: Vec<String> =
        names.iter().map(|&name| name.to_owned()).chain([format!("{long}x"), format!("{long}y")]).collect();
    let topics = names.iter().map(Topic::new).collect::<Result<Vec<_>, _>>()?;
    let mut subscriptions = Vec::new();
    for topic in &topics {
        subscriptions.push(ctx.subscribe(&bus, topic, ctx.fan_out()).await?);
    }
    let mut sent = Vec::new();
    for topic in &topics {
        sent.push(ctx.publish(&bus, topic, 1).await?);
    }
    for ((topic, subscription), sent) in topics.iter().zip(&mut subscriptions).zip(sent) {
        let fence = ctx.fence(&bus, topic).await?;
        exactly(&sent, &ctx.until(subscription, &fence).await?).map_err(|why| why.at(format!("{topic:?}")))?;
    }
    for name in
        [String::new(), "x".repeat(256), "x".repeat(1024), "a\0b".into(), "a\nb".into(), "\u{7f}".into(), "\u{85}".into()]
    {
        let refused = ctx.within("publish", bus.publish(&name, ctx.event())).await?;
        let published = refused.err().map(|error| error.kind().clone());
        ensure!(matches!(published, Some(ErrorKind::InvalidName(_))), "publish to {name:?}: {published:?}");
        let refused = ctx.within("subscribe", bus.subscribe(&name)).await?;
        let subscribed = refused.err().map(|error| error.kind().clone());
        ensure!(matches!(subscribed, Some(ErrorKind::InvalidName(_))), "subscribe to {name:?}: {subscribed:?}");
    }
    Ok(())
}

async fn nobody_listens(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("silent"));
    ctx.publish(&bus, &topic, 10).await?;
    ctx.publish_all(&bus, &topic, &ctx.events(500)).await?;
    ctx.publish_all(&bus, &topic, &[]).await?;
    // The topic works afterwards, and fan-out starts with what comes.
    let mut late = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    ctx.nothing_before_fence(&mut late, &bus, &topic).await
}

async fn publisher_dies(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("orphans"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    let processes = ctx.harness().processes().expect("needed");
    let publisher = ctx.within("another process", processes.start(Job::Publish { topic, count: 50 })).await??;
    ctx.within("its death", publisher.kill()).await??;
    let mut types = Vec::new();
    while types.len() < 50 {
        let delivery = ctx.next(&mut member).await.map_err(|why| why.at(format!("after {} of 50", types.len())))?;
        types.push(delivery.event().event_type().to_owned());
        drop(delivery.done());
    }
    exactly_once(&(0..50).map(|number| number.to_string()).collect::<Vec<_>>(), &types)
}

async fn no_window(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("window"));
    let second = if ctx.harness().spans_instances() { ctx.connect().await? } else { bus.clone() };
    // A publisher that never pauses, so that every moment of a subscribe call is tried.
    let started = Arc::new(AtomicU64::new(0));
    let publisher = {
        let (ctx, bus, topic, started) = (ctx.clone(), bus.clone(), topic.clone(), started.clone());
        ctx.clone().spawn(async move {
            loop {
                let number = started.fetch_add(1, Ordering::SeqCst);
                let event = Event::new("numbered").with_data(number);
                bus.publish(&topic, event).await?;
                tokio::task::yield_now().await;
            }
            #[allow(unreachable_code)]
            Verdict::Ok(())
        })
    };
    for round in 0..20 {
        let instance = if round % 2 == 0 { &bus } else { &second };
        let mut subscription = ctx.subscribe(instance, &topic, ctx.fan_out()).await?;
        // The event with this number had not been given to publish when subscribe returned.
        let first_due = started.load(Ordering::SeqCst);
        let mut due = Vec::new();
        while due.len() < 5 {
            let number = *ctx.next(&mut subscription).await?.data::<u64>()?;
            if number >= first_due {
                due.push(number);
            }
        }
        if ctx.capabilities().supports(Capability::PublisherOrder) {
            ensure_eq!(due, (first_due..first_due + 5).collect::<Vec<_>>(), "first events due in round {round}");
        } else {
            due.sort_unstable();
            ensure!(due[0] < first_due + 5, "round {round}: {due:?} where {first_due} was the first due");
        }
    }
    publisher.abort();
    // And one by one: each subscription sees the very next event, published by the other instance.
    for round in 0..20 {
        let topic = ctx.topic("next");
        let mut subscription = ctx.subscribe(if round % 2 == 0 { &bus } else { &second }, &topic, ctx.fan_out()).await?;
        let sent = ctx.publish(if round % 2 == 0 { &second } else { &bus }, &topic, 1).await?;
        exactly(&sent, &[ctx.next(&mut subscription).await?])?;
    }
    Ok(())
}

async fn never_merged(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("twice"));
    let mut one = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut two = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&bus, &topic, 5).await?;
    for subscription in [&mut one, &mut two] {
        exactly(&sent, &ctx.collect(subscription, 5).await?)?;
    }
    ctx.within("unsubscribe", one.unsubscribe()).await?;
    let sent = ctx.publish(&bus, &topic, 5).await?;
    let fence = ctx.fence(&bus, &topic).await?;
    exactly(&sent, &ctx.until(&mut two, &fence).await?)?;
    // Neither does it hang on the handle it was made with.
    let third = bus.clone();
    let mut three = ctx.subscribe(&third, &topic, ctx.fan_out()).await?;
    drop((third, two));
    let sent = ctx.publish(&bus, &topic, 5).await?;
    exactly(&sent, &ctx.collect(&mut three, 5).await?)
}

async fn handler_on_two_topics(ctx: Ctx) -> Verdict {
    let (bus, a, b) = (ctx.bus().await?, ctx.topic("a"), ctx.topic("b"));
    let recorder = Recorder::new();
    let handler = {
        let recorder = recorder.clone();
        move |message: pubsub_core::Message| {
            recorder.event("handler", message.event(), message.attempt());
            std::future::ready(Ok::<_, Failure>(()))
        }
    };
    let on_a = ctx.within("on", bus.on(&a, ctx.fan_out(), 1, handler.clone())).await??;
    let on_b = ctx.within("on", bus.on(&b, ctx.fan_out(), 1, handler)).await??;
    let mut sent = ids(&ctx.publish(&bus, &a, 5).await?);
    sent.extend(ids(&ctx.publish(&bus, &b, 5).await?));
    ctx.eventually("both topics were handled", || recorder.count() >= sent.len()).await?;
    let report = ctx.within("stop", on_a.stop()).await??;
    ensure_eq!(report.done, 5, "handled on the stopped topic");
    ctx.publish(&bus, &a, 5).await?;
    sent.extend(ids(&ctx.publish(&bus, &b, 5).await?));
    let fence = ctx.fence(&bus, &b).await?;
    ctx.eventually("the fence was handled", || recorder.saw(&fence)).await?;
    exactly_once(&sent, &recorder.ids())?;
    ctx.within("stop", on_b.stop()).await??;
    Ok(())
}

async fn failing_handler(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("failing"));
    let recorder = Recorder::new();
    let once = |options: SubscribeOptions| options.retry(ctx.retry().max_attempts(1));
    let mut handlers = Vec::new();
    for (name, kind) in [("panics", 0), ("panics at once", 1), ("fails", 2), ("works", 3)] {
        let recorder = recorder.clone();
        let handler = move |message: pubsub_core::Message| {
            recorder.event(name, message.event(), message.attempt());
            let is_fence = message.event().event_type() == FENCE;
            if kind == 1 && !is_fence {
                panic_on_purpose("before there is a future");
            }
            async move {
                match kind {
                    _ if is_fence => Ok(()),
                    0 => panic_on_purpose("in the handler's future"),
                    2 => Err(Failure::retry("a handler that fails")),
                    _ => Ok(()),
                }
            }
        };
        handlers.push((name, ctx.within("on", bus.on(&topic, once(ctx.fan_out()), 2, handler)).await??));
    }
    let sent = ids(&ctx.publish(&bus, &topic, 10).await?);
    let fence = ctx.fence(&bus, &topic).await?;
    for (name, handler) in handlers {
        ctx.eventually(format!("{name}: the fence was handled"), || recorder.saw_by(name, &fence)).await?;
        ctx.within("drained", handler.handle().drained()).await?;
        exactly_once(&sent, &recorder.ids_of(name)).map_err(|why| why.at(name))?;
        let report = ctx.within("stop", handler.stop()).await??;
        let expected = if name == "works" { (11, 0) } else { (1, 10) };
        ensure_eq!((report.done, report.retried), expected, "{name}: done and failed");
    }
    Ok(())
}

async fn stuck_consumer(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("stuck"));
    let recorder = Recorder::new();
    // One that is never polled, and one whose handler never returns.
    let _unpolled = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let stuck = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let _stuck = ctx.consume_with(stuck, &recorder, "stuck", async |_delivery| std::future::pending().await);
    let mut works = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    // Well below the bound of 256, half of which may be reserved for hand-over.
    let events = ctx.events(100);
    let options = PublishOptions::new().timeout(Duration::ZERO);
    for event in &events {
        ctx.within("publish", bus.publish_with(&topic, std::slice::from_ref(event), options.clone())).await??;
    }
    exactly(&events, &ctx.collect(&mut works, events.len()).await?)?;
    ctx.eventually("the stuck handler was called", || recorder.count_of("stuck") > 0).await?;
    ensure_eq!(recorder.count_of("stuck"), 1, "calls of the stuck handler");
    Ok(())
}

async fn waits_for_later(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("later"));
    let later = Arc::new(Notify::new());
    let handler = {
        let first = Arc::new(AtomicU64::new(0));
        move |_message: pubsub_core::Message| {
            let (later, is_first) = (later.clone(), first.fetch_add(1, Ordering::SeqCst) == 0);
            async move {
                if is_first {
                    later.notified().await;
                } else {
                    later.notify_one();
                }
                Ok::<_, Failure>(())
            }
        }
    };
    let handler = ctx.within("on", bus.on(&topic, ctx.fan_out(), 2, handler)).await??;
    ctx.publish(&bus, &topic, 2).await?;
    ctx.within("drained", handler.handle().drained()).await?;
    let report = ctx.within("stop", handler.stop()).await??;
    ensure_eq!(report.done, 2, "handled");
    Ok(())
}

async fn reentrant_handler(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let mut kinds = vec![ctx.fan_out()];
    if ctx.capabilities().supports(Capability::Groups) {
        kinds.push(ctx.member(&ctx.group("g")));
    }
    for options in kinds {
        let topic = ctx.topic("reentrant");
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        let (handle, inner_bus, own) = (subscription.handle(), bus.clone(), topic.clone());
        let running = ctx.spawn(async move {
            let (handle, bus, topic) = (&handle, &inner_bus, &own);
            subscription
                .run(1, async |message| {
                    if message.event().event_type() == "conformance.event" {
                        let inner = bus.subscribe(topic).await?;
                        bus.flush().await?;
                        inner.unsubscribe().await;
                        bus.publish(topic, Event::new("echo")).await?;
                    } else {
                        handle.stop();
                    }
                    Ok(())
                })
                .await
        });
        ctx.publish(&bus, &topic, 1).await?;
        let report = ctx.join("a handler that uses its own bus", running).await??;
        ensure_eq!(report.done, 2, "handled");
    }
    Ok(())
}

async fn many_topics(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let (ctx, bus) = (ctx.clone(), bus.clone());
            ctx.clone().spawn(async move {
                let topic = ctx.topic("many");
                let recorder = Recorder::new();
                let consumer = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "only");
                let sent = ctx.publish(&bus, &topic, 100).await?;
                ctx.fence_consumers(&bus, &topic, &recorder, &[&consumer]).await?;
                exactly_once(&ids(&sent), &recorder.ids())
            })
        })
        .collect();
    for task in tasks {
        ctx.join("one of the topics", task).await??;
    }
    Ok(())
}
