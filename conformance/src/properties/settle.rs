//! Settlement: acknowledgement, retries, attempts, holding, giving up.

mod giving_up;
mod holding;
mod outcome;
mod retry;
mod settling;

use std::time::Duration;

use pubsub_core::{AckMode, Bus, Capability, Delivery, SubscribeOptions, Subscription, Topic};
use tokio::time::Instant;

use crate::{Ctx, Need, Property, Verdict};

pub(crate) fn properties() -> Vec<Property> {
    let parts = [retry::properties, settling::properties, outcome::properties, giving_up::properties, holding::properties];
    let mut properties: Vec<_> = parts.into_iter().flat_map(|part| part()).collect();
    properties.sort_by_key(Property::id);
    properties
}

const GROUPS: Need = Need::Capability(Capability::Groups);

/// Fan-out whose deliveries are settled by hand.
fn by_hand(ctx: &Ctx) -> SubscribeOptions {
    ctx.fan_out().ack_mode(AckMode::Manual)
}

/// The two kinds of subscription that settle by hand: what holds for both is tried on both.
fn both(ctx: &Ctx) -> [SubscribeOptions; 2] {
    [ctx.member(&ctx.group("g")), by_hand(ctx)]
}

/// A `max_hold` that is soon over, and not so soon that a busy machine exceeds it where it should not.
pub(super) fn short_hold(ctx: &Ctx) -> Duration {
    4 * ctx.timing().hold
}

/// Deliveries that were held for too long: `lost` are in the hands of a member that lost them, `found` are the same events in
/// the hands of the one that got them.
pub(super) struct Overdue {
    pub(super) bus: Bus,
    pub(super) topic: Topic,
    pub(super) lost: Vec<Delivery>,
    pub(super) finder: Subscription,
    pub(super) found: Vec<Delivery>,
}

/// A member holds so many new events until they go to another, which has the same options but for `max_hold`. The first takes
/// no others.
pub(super) async fn overdue(ctx: &Ctx, options: SubscribeOptions, count: usize) -> Verdict<Overdue> {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("overdue"));
    let mut loser = ctx.subscribe(&bus, &topic, options.clone().max_hold(short_hold(ctx))).await?;
    ctx.publish(&bus, &topic, count).await?;
    let before = Instant::now();
    let lost = ctx.collect(&mut loser, count).await?;
    let mut finder = ctx.subscribe(&bus, &topic, options).await?;
    loser.handle().stop();
    let found = ctx.collect(&mut finder, count).await?;
    crate::ensure!(before.elapsed() >= short_hold(ctx), "taken away after {:?}", before.elapsed());
    Ok(Overdue { bus, topic, lost, finder, found })
}
