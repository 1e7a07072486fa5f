//! Consumer groups.

use pubsub_core::Capability;

use crate::oracle::{Recorder, exactly_once, ids};
use crate::{Ctx, Need, Property, Verdict, property};

pub(crate) fn properties() -> Vec<Property> {
    vec![
        property("GR-01", "Each event goes to exactly one member of a group", &["P1"], one_member)
            .needs([Need::Capability(Capability::Groups)]),
    ]
}

async fn one_member(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("shared"), ctx.group("workers"));
    let recorder = Recorder::new();
    let mut members = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
        members.push(ctx.consume(member, &recorder, name));
    }
    let sent = ctx.publish(&bus, &topic, 100).await?;
    ctx.eventually("all arrived", || recorder.distinct() == sent.len()).await?;
    ctx.drained(&members.iter().collect::<Vec<_>>()).await?;
    exactly_once(&ids(&sent), &recorder.ids())
}
