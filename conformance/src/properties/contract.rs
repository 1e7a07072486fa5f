//! What backends say about themselves, and clauses no other section covers.

mod promises;

use std::sync::Arc;

use pubsub_core::{Capability, Deduplication, ErrorKind, Event, Start};

use crate::oracle::{exactly_once, ids};
use crate::{Ctx, Property, Verdict, ensure, ensure_eq, property};

pub(crate) fn properties() -> Vec<Property> {
    let mut properties = vec![
        property("META-1", "A bus advertises what it is declared to do, and nothing else", &["K1"], advertised),
        property("META-2", "What is declared works, and what is not is refused or visibly absent", &["K1"], truthful),
    ];
    properties.extend(promises::properties());
    properties
}

async fn advertised(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    ensure_eq!(bus.capabilities(), *ctx.capabilities(), "advertised against declared");
    ensure_eq!(bus.leases().is_some(), ctx.capabilities().leases.is_some(), "leases are there");
    if let Some(leases) = bus.leases() {
        ensure_eq!(Some(leases.reach()), ctx.capabilities().leases, "how far leases reach");
    }
    Ok(())
}

async fn truthful(ctx: Ctx) -> Verdict {
    let (bus, declared) = (ctx.bus().await?, ctx.capabilities());
    // History.
    let topic = ctx.topic("history");
    ctx.publish(&bus, &topic, 1).await?;
    match ctx.within("history", bus.history(&topic, Start::Earliest, 10)).await? {
        Ok(page) => {
            ensure!(declared.supports(Capability::History), "history works and is not declared");
            ensure_eq!(page.entries.len(), 1, "events in the history");
        }
        Err(error) => {
            ensure_eq!(error.kind(), &ErrorKind::Unsupported(Capability::History), "history");
            ensure!(!declared.supports(Capability::History), "history is declared and unsupported");
        }
    }
    // A repeated publish of the same event.
    let topic = ctx.topic("repeat");
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let event = ctx.event();
    for _ in 0..2 {
        ctx.publish_all(&bus, &topic, std::slice::from_ref(&event)).await?;
    }
    let fence = ctx.fence(&bus, &topic).await?;
    let copies = ctx.until(&mut subscription, &fence).await?.len();
    let expected = if declared.deduplication == Deduplication::None { 2 } else { 1 };
    ensure_eq!(copies, expected, "copies of an event that was published twice, given {:?}", declared.deduplication);
    // Groups that outlive their members.
    if declared.supports(Capability::Groups) {
        let (topic, group) = (ctx.topic("durable"), ctx.group("g"));
        let member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
        ctx.within("unsubscribe", member.unsubscribe()).await?;
        let missed = ids(&ctx.publish(&bus, &topic, 1).await?);
        let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
        let fence = ctx.fence(&bus, &topic).await?;
        let found = crate::oracle::delivered(&ctx.until(&mut member, &fence).await?);
        let expected = if declared.supports(Capability::DurableGroups) { missed } else { Vec::new() };
        exactly_once(&expected, &found).map_err(|why| why.at("what a returning member finds"))?;
    }
    // Values that travel as they are, to the instance's own subscriptions.
    let topic = ctx.topic("live");
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let live = Event::new("live").with_payload(pubsub_core::Payload::live(Arc::new(7_u8)));
    let options = pubsub_core::PublishOptions::local_only();
    let published = ctx.within("publish", bus.publish_with(&topic, &[Arc::new(live)], options)).await?;
    ensure_eq!(published.is_ok(), declared.live_values, "a live value can be published");
    if published.is_ok() {
        let delivery = ctx.next(&mut subscription).await?;
        ensure_eq!(*delivery.event().payload().get_live::<u8>()?, 7, "live value");
    }
    Ok(())
}
