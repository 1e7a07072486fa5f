//! Limits and bad input.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use pubsub_core::{
    BatchOverflow, BatchPolicy, Bus, Capability, Cursor, Error, ErrorKind, Event, Fate, Filter, Group, Message, Payload,
    PublishOptions, RetryPolicy, Scope, Start, SubscribeOptions, Topic, TrimFilter,
};
use serde_json::{Value, json};

use crate::oracle::{exactly_once, ids};
use crate::{Ctx, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const BROKER: &str = "concerns the frames of a broker and its peers; held by the tests of the backend that has them";
    vec![
        property(
            "LI-01",
            "Options that make no sense are refused by name, and leave nothing attached",
            &["B5", "S4", "T1"],
            bad_options,
        ),
        property(
            "LI-02",
            "An event over the bound is refused with its whole call, saying both sizes, and one at the bound arrives",
            &["P6"],
            bound,
        )
        .needs([Need::MaxPayload])
        .limit(Duration::from_secs(120)),
        omitted("LI-03", "A frame that is too large costs only its sender the connection", &["B2"], BROKER),
        omitted("LI-04", "A client leaves a broker that sends frames that are too large", &["N1"], BROKER),
        omitted("LI-05", "A frame may come in any pieces", &["P1"], BROKER),
        omitted("LI-06", "Frames that nobody understands are passed over", &["S7"], BROKER),
        property("LI-07", "What is no event is settled out of the way, counted, and stalls nobody", &["S7"], foreign)
            .needs([Need::RawInjection]),
        property(
            "LI-08",
            "Names that are no names are refused everywhere, odd ones work and are never mixed up",
            &["B2"],
            names,
        )
        .needs([Capability::Groups.into()]),
        omitted(
            "LI-09",
            "A remote topic that does not exist is found missing when it is used",
            &["N1"],
            "concerns topics that are made by others; the tests of the backends that have such topics hold it",
        ),
        omitted(
            "LI-10",
            "The path of a socket that is too long is refused by name",
            &["N1"],
            "concerns sockets in a file system; the tests of the backend that uses them hold it",
        ),
        property("LI-11", "Data that looks like an envelope is data", &["P7", "S7"], envelopes),
        property(
            "LI-12",
            "What a bus declares of the size of payloads is so: up to its bound, or any if there is none",
            &["P6", "K1"],
            declared_bound,
        ),
        property("LI-13", "What a bus can do is data, and `require` reads it", &["K1"], requires),
        property(
            "LI-14",
            "What a bus cannot do is refused by name at once, and leaves nothing attached",
            &["K1", "R6", "B3"],
            unsupported,
        ),
        property(
            "LI-15",
            "A filter that rejects everything holds up nobody, its own subscription included",
            &["B7", "B2"],
            filters,
        ),
        property("LI-16", "An event without type, run or data is an event", &["P7"], bare),
    ]
}

fn kind<T, E: Into<Error>>(result: Result<T, E>) -> Option<ErrorKind> {
    result.err().map(|error| error.into().kind().clone())
}

/// Holds an answer to naming a refused option.
fn names_option<T, E: Into<Error>>(answer: Result<T, E>, named: &str) -> Verdict {
    let kind = kind(answer);
    let fits = matches!(&kind, Some(ErrorKind::InvalidOption { option, .. }) if option == named);
    ensure!(fits, "{named} was to be refused, not {kind:?}");
    Ok(())
}

/// Holds a topic to having nobody attached: with a bound of one, anybody left would be full.
async fn nobody_attached(ctx: &Ctx, bus: &Bus, topic: &Topic) -> Verdict {
    let status = ctx.within("inspect", bus.inspect(topic)).await??;
    ensure!(matches!(status.fan_out, None | Some(0)), "{:?} subscriptions are attached", status.fan_out);
    let members = status.groups.iter().filter_map(|group| group.members).sum::<u64>();
    ensure_eq!(members, 0, "members attached");
    Ok(())
}

async fn bad_options(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("bad"));
    const LONG: Duration = Duration::from_secs(11 * 365 * 24 * 3600);
    let retry = |policy: RetryPolicy| ctx.fan_out().retry(policy);
    let mut multiplied = [RetryPolicy::new(), RetryPolicy::new()];
    (multiplied[0].multiplier, multiplied[1].multiplier) = (f64::NAN, 0.5);
    let [nan, half] = multiplied;
    let cases: Vec<(&str, SubscribeOptions)> = vec![
        ("prefetch", ctx.fan_out().prefetch(0)),
        ("prefetch", ctx.fan_out().prefetch(usize::MAX)),
        ("max_in_flight", ctx.fan_out().max_in_flight(0)),
        ("max_in_flight", ctx.fan_out().max_in_flight(usize::MAX)),
        ("max_hold", ctx.fan_out().max_hold(Duration::ZERO)),
        ("max_hold", ctx.fan_out().max_hold(LONG)),
        ("dead_letter", ctx.fan_out().dead_letter(topic.clone())),
        ("jitter", retry(RetryPolicy::new().jitter(-0.1))),
        ("jitter", retry(RetryPolicy::new().jitter(1.1))),
        ("jitter", retry(RetryPolicy::new().jitter(f64::NAN))),
        ("multiplier", retry(nan)),
        ("multiplier", retry(half)),
        ("initial_backoff", retry(RetryPolicy::new().backoff(Duration::from_secs(2), Duration::from_secs(1)))),
        ("max_backoff", retry(RetryPolicy::new().backoff(Duration::ZERO, LONG))),
        ("handler_timeout", retry(RetryPolicy::new().handler_timeout(Duration::ZERO))),
    ];
    for (named, options) in cases {
        names_option(ctx.within("subscribe", bus.subscribe_with(&topic, options)).await?, named)?;
    }
    nobody_attached(&ctx, &bus, &topic).await?;
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    for options in [PublishOptions::new(), PublishOptions::local_only()] {
        let refused = ctx.within("publish", bus.publish_with(&topic, &ctx.events(2), options.timeout(LONG))).await?;
        ensure!(refused.as_ref().is_err_and(|error| error.fates() == [Fate::NotSent; 2]), "{refused:?}");
        names_option(refused, "timeout")?;
    }
    let none = |_: Message| std::future::ready(Ok(()));
    names_option(ctx.within("run", subscription.run(0, none)).await?, "concurrency")?;
    let (mut empty, mut small, mut coalescing) = (BatchPolicy::default(), BatchPolicy::default(), BatchPolicy::default());
    (empty.max_size, small.max_buffer_size) = (0, 1);
    coalescing.overflow = BatchOverflow::CoalesceThenDropOldest;
    for (named, policy) in [("max_size", empty), ("max_buffer_size", small), ("overflow", coalescing)] {
        names_option(policy.validate(), named)?;
    }
    // The subscription is none the worse for it.
    ctx.nothing_before_fence(&mut subscription, &bus, &topic).await
}

/// An event whose encoded data and metadata are so many bytes: text, its quotes, and some metadata.
fn sized(bytes: usize) -> Arc<Event> {
    const METADATA: (&str, &str) = ("key", "value");
    let text = bytes - METADATA.0.len() - METADATA.1.len() - 2;
    Arc::new(Event::new("sized").with_data("x".repeat(text)).with_metadata(METADATA.0, METADATA.1))
}

async fn bound(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("bound"));
    let limit = ctx.capabilities().max_payload.ok_or_else(|| Mismatch::new("no bound"))?;
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let largest = sized(limit);
    ctx.publish_all(&bus, &topic, std::slice::from_ref(&largest)).await?;
    let delivery = ctx.next(&mut subscription).await?;
    ensure_eq!(delivery.event().id(), largest.id(), "id");
    ensure_eq!(delivery.data::<String>()?.len(), largest.data::<String>()?.len(), "bytes of data");
    // Wherever it is in the call.
    for place in 0..3 {
        let mut events = ctx.events(3);
        events[place] = sized(limit + 1);
        let refused = ctx.within("publish", bus.publish_with(&topic, &events, PublishOptions::new())).await?;
        let error = refused.err().ok_or_else(|| Mismatch::new("a byte over the bound was taken"))?;
        ensure_eq!(*error.kind(), ErrorKind::TooLarge { size: limit + 1, limit }, "how it is refused");
        ensure_eq!(error.fates(), [Fate::NotSent; 3], "the fates");
    }
    ctx.nothing_before_fence(&mut subscription, &bus, &topic).await?;
    let status = ctx.within("inspect", bus.inspect(&topic)).await??;
    let kept = if ctx.capabilities().supports(Capability::History) { 2 } else { 0 };
    ensure!(status.retained.is_none_or(|retained| retained == kept), "{:?} retained instead of {kept}", status.retained);
    Ok(())
}

async fn declared_bound(ctx: Ctx) -> Verdict {
    const LARGE: usize = 256 << 10;
    let (bus, topic) = (ctx.bus().await?, ctx.topic("large"));
    let declared = bus.capabilities().max_payload;
    ensure_eq!(declared, ctx.capabilities().max_payload, "the bound the bus tells");
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let largest = declared.unwrap_or(LARGE).min(LARGE);
    for size in [16, largest / 2, largest] {
        let event = sized(size);
        ensure_eq!(event.encoded_size()?, size, "the size that counts");
        ctx.publish_all(&bus, &topic, std::slice::from_ref(&event)).await?;
        let delivery = ctx.next(&mut subscription).await?;
        ensure!(*delivery.data::<String>()? == *event.data::<String>()?, "{size} bytes arrived otherwise");
    }
    let over = sized(declared.map_or(2 * LARGE, |limit| limit + 1));
    let answer = kind(ctx.within("publish", bus.publish(&topic, over)).await?);
    let fits = match declared {
        Some(limit) => answer == Some(ErrorKind::TooLarge { size: limit + 1, limit }),
        None => answer.is_none(),
    };
    ensure!(fits, "with a bound of {declared:?}, more was answered {answer:?}");
    Ok(())
}

async fn foreign(ctx: Ctx) -> Verdict {
    let (bus, topic, dead) = (ctx.bus().await?, ctx.topic("foreign"), ctx.topic("dead"));
    let raw = ctx.harness().raw().ok_or_else(|| Mismatch::new("no way past the encoding"))?;
    let mut subscriptions = vec![ctx.subscribe(&bus, &topic, ctx.fan_out()).await?];
    if ctx.capabilities().supports(Capability::Groups) {
        subscriptions.push(ctx.subscribe(&bus, &topic, ctx.member(&ctx.group("g"))).await?);
        let buries = ctx.member(&ctx.group("buries")).dead_letter(dead.clone());
        subscriptions.push(ctx.subscribe(&bus, &topic, buries).await?);
    }
    let garbage: [&[u8]; 8] =
        [b"", b"{", b"null", b"[1,2]", b"\xff\xfe\0", b"{\"type\":1}", b"{\"id\":\"\",\"type\":null}", &[b'['; 2000]];
    let mut sent = Vec::new();
    for bytes in garbage {
        ctx.within("inject", raw.inject(&topic, bytes)).await??;
        sent.extend(ctx.publish(&bus, &topic, 1).await?);
    }
    let fence = ctx.fence(&bus, &topic).await?;
    for subscription in &mut subscriptions {
        let came = ctx.until(subscription, &fence).await?;
        exactly(&sent, &came)?;
        came.into_iter().for_each(|delivery| drop(delivery.done()));
        ctx.within("drained", subscription.handle().drained()).await?;
        let status = subscription.status();
        let counted = status.dropped + status.dead_lettered;
        ensure!(counted >= garbage.len() as u64, "{counted} of {} were counted", garbage.len());
    }
    Ok(())
}

async fn names(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let good = ctx.topic("good");
    for name in ["".to_owned(), "x".repeat(256), "a\nb".into(), "\0".into(), "\u{7f}".into(), "\u{9f}".into()] {
        let refused = [
            kind(ctx.within("publish", bus.publish(&name, ctx.event())).await?),
            kind(ctx.within("publish", bus.publish_with(&name, &ctx.events(2), PublishOptions::local_only())).await?),
            kind(ctx.within("subscribe", bus.subscribe(&name)).await?),
            kind(ctx.within("subscribe", bus.subscribe_group(&good, &name)).await?),
            kind(ctx.within("history", bus.history(&name, Start::Earliest, 1)).await?),
            kind(ctx.within("clear", bus.clear_topic(&name)).await?),
            kind(ctx.within("trim", bus.trim_topic(&name, TrimFilter::run("r"))).await?),
            kind(ctx.within("inspect", bus.inspect(&name)).await?),
        ];
        for refused in refused {
            ensure!(matches!(refused, Some(ErrorKind::InvalidName(_))), "{name:?}: {refused:?}");
        }
    }
    nobody_attached(&ctx, &bus, &good).await?;
    // Topics and groups whose names run into each other, whatever is put between them.
    let mut members = Vec::new();
    for between in [":", "/", ".", "-", "_", " ", "|", "%", "{", "*", "🦀", "\\", "\""] {
        for (topic, group) in [(format!("a{between}b"), "c".to_owned()), ("a".to_owned(), format!("b{between}c"))] {
            let topic = Topic::new(format!("{good}{topic}"))?;
            let member = ctx.subscribe(&bus, &topic, ctx.member(&Group::new(&group)?)).await?;
            members.push((topic, member));
        }
    }
    let mut sent: Vec<(Topic, Vec<Arc<Event>>)> = Vec::new();
    let topics: Vec<_> = members.iter().map(|(topic, _)| topic.clone()).collect();
    for topic in topics {
        if !sent.iter().any(|(to, _)| *to == topic) {
            let events = ctx.publish(&bus, &topic, 2).await?;
            sent.push((topic, events));
        }
    }
    for (topic, member) in &mut members {
        let events = sent.iter().find(|(to, _)| to == topic).map(|(_, events)| events).ok_or_else(|| Mismatch::new("none"))?;
        let seen = ctx.collect_done(member, 2).await.map_err(|why| why.at(format!("{topic:?}")))?;
        exactly_once(&ids(events), &seen).map_err(|why| why.at(format!("{topic:?}")))?;
    }
    Ok(())
}

async fn envelopes(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("envelope"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let inner = pubsub_core::wire::encode(&ctx.event())?;
    let hostile = [
        serde_json::from_slice::<Value>(&inner)?,
        Value::String(String::from_utf8_lossy(&inner).into_owned()),
        json!({ "id": "another", "type": "another", "runId": "another", "createdAt": "1970-01-01T00:00:00.000Z", "data": 1 }),
        json!({ "__proto__": { "type": "x" }, "constructor": 1, "deliveryAttempt": 99, "index": 7, "metadata": { "a": "b" } }),
        json!({ "dead-letter.event": "x", "redriven.event": "y", "$type": "z", "$ref": "#" }),
    ];
    for data in hostile {
        let event = Event::new("hostile").with_run_id("run").with_payload(Payload::json(data.to_string())?);
        let event = Arc::new(event.with_metadata("id", "another").with_metadata("data", "{}").with_metadata("é\n", "\0"));
        ctx.publish_all(&bus, &topic, std::slice::from_ref(&event)).await?;
        let delivery = ctx.next(&mut subscription).await?;
        let came = delivery.event();
        ensure_eq!((came.id(), came.event_type(), came.run_id()), (event.id(), "hostile", "run"), "id, type and run");
        ensure_eq!((came.created_at(), delivery.attempt()), (event.created_at(), 1), "time and attempt");
        ensure_eq!(came.metadata(), event.metadata(), "metadata");
        ensure_eq!(*delivery.data::<Value>()?, data, "data");
    }
    Ok(())
}

const ALL: [Capability; 15] = [
    Capability::History,
    Capability::Index,
    Capability::Groups,
    Capability::DurableGroups,
    Capability::DeadLetterHistory,
    Capability::Leases,
    Capability::LiveValues,
    Capability::PublisherOrder,
    Capability::TotalOrder,
    Capability::HostReach,
    Capability::NetworkReach,
    Capability::SurvivesProcessDeath,
    Capability::SurvivesHostDeath,
    Capability::Deduplication,
    Capability::KeepsIdentity,
];

async fn requires(ctx: Ctx) -> Verdict {
    let (bus, declared) = (ctx.bus().await?, ctx.capabilities());
    bus.require([])?;
    for one in ALL {
        let expected = (!declared.supports(one)).then_some(ErrorKind::Unsupported(one));
        ensure_eq!(kind(bus.require([one])), expected, "what `require` says of {one}");
    }
    // Of several the first that is missing is named.
    let first = ALL.into_iter().find(|one| !declared.supports(*one));
    ensure_eq!(kind(bus.require(ALL)), first.map(ErrorKind::Unsupported), "what `require` says of everything");
    bus.require(ALL.into_iter().filter(|one| declared.supports(*one)))?;
    // It stays so, and is so for every instance.
    let topic = ctx.topic("used");
    ctx.publish(&bus, &topic, 1).await?;
    ensure_eq!(bus.capabilities(), *declared, "what it can do, after it was used");
    if ctx.harness().spans_instances() {
        ensure_eq!(ctx.connect().await?.capabilities(), *declared, "what another instance can do");
    }
    Ok(())
}

async fn unsupported(ctx: Ctx) -> Verdict {
    let (bus, topic, declared) = (ctx.bus().await?, ctx.topic("cannot"), ctx.capabilities().clone());
    let after = Start::After(Cursor::new(Arc::new(Scope::new("nowhere", "0")?), 0));
    let member = || ctx.member(&ctx.group("g"));
    // Each call, and whatever it needs; the first that is missing is to be named.
    let calls: Vec<(SubscribeOptions, &[Capability])> = vec![
        (ctx.fan_out().start(Start::Earliest), &[Capability::History]),
        (ctx.fan_out().start(after.clone()), &[Capability::History]),
        (ctx.fan_out().start(Start::Index(0)), &[Capability::Index]),
        (member(), &[Capability::Groups]),
        (member().start(Start::Earliest), &[Capability::Groups, Capability::DurableGroups, Capability::GroupHistory]),
        (member().start(after), &[Capability::Groups, Capability::DurableGroups, Capability::GroupHistory]),
        (
            member().start(Start::Index(0)),
            &[Capability::Groups, Capability::Index, Capability::DurableGroups, Capability::GroupHistory],
        ),
    ];
    for (options, needed) in calls {
        let what = format!("{:?} from {:?}", options.group, options.start);
        let answer = kind(ctx.within("subscribe", bus.subscribe_with(&topic, options)).await?);
        match needed.iter().find(|one| !declared.supports(**one)) {
            Some(missing) => ensure_eq!(answer, Some(ErrorKind::Unsupported(*missing)), "{what}"),
            None => ensure!(!matches!(answer, Some(ErrorKind::Unsupported(_))), "{what}: declared, and {answer:?}"),
        }
    }
    nobody_attached(&ctx, &bus, &topic).await?;
    let without = |one: Capability| (!declared.supports(one)).then_some(ErrorKind::Unsupported(one));
    let read = kind(ctx.within("history", bus.history(&topic, Start::Earliest, 1)).await?);
    ensure_eq!(read, without(Capability::History), "history");
    let none = |_: Message| std::future::ready(Ok(()));
    let redriven = kind(ctx.within("redrive", bus.redrive(ctx.topic("dead"), none)).await?);
    ensure_eq!(redriven, without(Capability::DeadLetterHistory), "redriving");
    let redriven = kind(ctx.within("redrive", bus.redrive_to(ctx.topic("dead"), &topic)).await?);
    ensure_eq!(redriven, without(Capability::DeadLetterHistory), "redriving to a topic");
    ensure_eq!(bus.leases().is_some(), declared.supports(Capability::Leases), "leases are there");
    // The topic works as ever.
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    exactly(&ctx.publish(&bus, &topic, 1).await?, &[ctx.next(&mut subscription).await?])
}

async fn filters(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("filters"));
    let mut works = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let nothing = ctx.fan_out().prefetch(4).filter(Filter::predicate(|_| false));
    let mut rejects = ctx.subscribe(&bus, &topic, nothing).await?;
    let types = ctx.fan_out().prefetch(4).filter(Filter::types(["of no event", crate::FENCE]));
    let mut picks = ctx.subscribe(&bus, &topic, types).await?;
    // Far more than the queues of those that reject take: they have to be asked to make room.
    let rejecting = ctx.spawn(async move { rejects.next().await.is_none() });
    let publishing = ctx.spawn({
        let (ctx, bus, topic) = (ctx.clone(), bus.clone(), topic.clone());
        async move {
            let sent = ctx.publish(&bus, &topic, 50).await?;
            Verdict::Ok((sent, ctx.fence(&bus, &topic).await?))
        }
    });
    let delivery = ctx.next(&mut picks).await?;
    let (sent, fence) = ctx.join("the publisher", publishing).await??;
    ensure_eq!(*delivery.event().id(), fence, "the only event of a type that is wanted");
    exactly(&sent, &ctx.until(&mut works, &fence).await?)?;
    ensure!(!rejecting.is_finished(), "a subscription that wants nothing got something, or ended");
    rejecting.abort();
    Ok(())
}

async fn bare(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("bare"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let long = "t".repeat(10_000);
    for event_type in ["", " ", "\0", "\n", "\"", "🦀", "null", long.as_str()] {
        let event = Arc::new(Event::new(event_type));
        match ctx.within("publish", bus.publish(&topic, event.clone())).await? {
            Ok(_) => {
                let delivery = ctx.next(&mut subscription).await?;
                let came = delivery.event();
                ensure_eq!((came.id(), came.event_type(), came.run_id()), (event.id(), event_type, ""), "id, type and run");
                ensure_eq!(*delivery.data::<Value>()?, Value::Null, "data");
            }
            Err(error) => ensure!(matches!(error.kind(), ErrorKind::InvalidName(_)), "{event_type:.20?}: {error}"),
        }
    }
    ctx.nothing_before_fence(&mut subscription, &bus, &topic).await
}
