//! What backends say about themselves, and clauses no other section covers.

use crate::{Ctx, Property, Verdict, ensure_eq, property};

pub(crate) fn properties() -> Vec<Property> {
    vec![property("META-1", "A bus advertises what it is declared to do, and nothing else", &["K1"], advertised)]
}

async fn advertised(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    ensure_eq!(bus.capabilities(), *ctx.capabilities(), "advertised against declared");
    ensure_eq!(bus.leases().is_some(), ctx.capabilities().leases.is_some(), "leases are there");
    Ok(())
}
