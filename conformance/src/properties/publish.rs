//! Publishing and subscribing.

use crate::{Ctx, Property, Verdict, ensure_eq, exactly, property};

pub(crate) fn properties() -> Vec<Property> {
    vec![
        property("PS-01", "A subscriber gets the published event with its type, run and data", &["P5", "P7"], arrives),
        property("PS-02", "Every fan-out subscription of an instance gets each event once", &["P1", "B2"], one_copy_each),
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
