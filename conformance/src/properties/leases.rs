//! Leases.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pubsub_core::{Acquired, Bus, Capability, ErrorKind, Lease, LeaseGuard, LeaseProvider, PublishOptions, Reach, Result};
use tokio::time::Instant;

use crate::{Ctx, Mismatch, Need, Property, Verdict, ensure, ensure_eq, exactly, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const LEASES: Need = Need::Capability(Capability::Leases);
    const SOCKET: &str = "concerns leases that end with a process of the host; the tests of the backend that has them hold it";
    vec![
        property("LE-01", "A free key is acquired and its owner can be read; an unknown key has none", &["L1"], acquires)
            .needs([LEASES]),
        property("LE-02", "A held key is refused, naming its holder, who keeps it unchanged", &["L1"], refuses).needs([LEASES]),
        property("LE-03", "Acquiring again is a renewal for the owner: a full new time, the same token", &["L1"], reacquires)
            .needs([LEASES]),
        property("LE-04", "A lease whose time is over is free, and not before", &["L1", "L2"], expires).needs([LEASES]),
        property("LE-05", "Only the owner releases", &["L1", "L2"], releases).needs([LEASES]),
        property("LE-06", "Only the owner renews, counting from now, and only while the lease lasts", &["L1"], renews)
            .needs([LEASES]),
        property("LE-07", "Keys are opaque and independent, of topics too", &["L1"], keys).needs([LEASES]),
        property("LE-08", "Of many that race for a key one wins, and the others are told who", &["L1", "L2"], races)
            .needs([LEASES, Need::CrossInstance]),
        property("LE-09", "A transfer is the owner's to make, and leaves no moment to a thief", &["L1", "L2"], transfers)
            .needs([LEASES]),
        property("LE-10", "Owners are opaque text", &["L1"], owners).needs([LEASES]),
        property("LE-11", "A renewal that is late by a moment does not touch the next owner's lease", &["L1", "L2"], late)
            .needs([LEASES]),
        omitted("LE-12", "The lease of a dead process is free at once", &["L1"], SOCKET),
        omitted("LE-13", "A lock that a crash left behind is recovered by one contender", &["L1"], SOCKET),
        omitted("LE-14", "A close while a lock is recovered leaves it free", &["L1", "C2"], SOCKET),
        property("LE-15", "Times, keys and owners that make no sense are refused", &["L1"], nonsense).needs([LEASES]),
        property("LE-16", "A closed bus grants no lease", &["L1", "C2"], closed).needs([LEASES]),
        property(
            "LE-17",
            "A provider put beside a bus is the one it exposes then, and all else stays the bus's own",
            &["L4"],
            beside,
        ),
        property("LE-18", "A bus without leases exposes none and says so", &["L4", "K1"], none)
            .needs([Need::Without(Capability::Leases)]),
        property("LE-19", "The token grows with every change of owner, however it comes about", &["L2"], tokens)
            .needs([LEASES]),
        property("LE-20", "A guard keeps its lease beyond its time to live", &["L3"], guards).needs([LEASES]),
        property("LE-21", "A guard whose lease is taken away tells its holder", &["L3"], robbed).needs([LEASES]),
        property(
            "LE-22",
            "A guard that cannot reach the store tells its holder before another can acquire",
            &["L3"],
            unreachable,
        )
        .needs([LEASES]),
        property("LE-23", "A guard that is released or dropped frees its lease", &["L3"], lets_go).needs([LEASES]),
        property("LE-24", "A guard hands its lease over to another guard", &["L3", "L1"], hands_over).needs([LEASES]),
        property("LE-25", "A guard whose bus is closed tells its holder", &["L3", "C2"], closed_guard).needs([LEASES]),
    ]
}

type Leases = Arc<dyn LeaseProvider>;

fn of(bus: &Bus) -> Verdict<Leases> {
    bus.leases().ok_or_else(|| Mismatch::new("no leases"))
}

/// The leases of the property's bus, a key nobody else uses, and a time that is not over before the property is.
async fn start(ctx: &Ctx) -> Verdict<(Leases, String, Duration)> {
    Ok((of(&ctx.bus().await?)?, ctx.topic("lease").to_string(), 10 * ctx.timing().patience))
}

/// The time to live of a lease that a guard has to keep: a busy machine must not exceed a tenth of it unawares.
fn short(ctx: &Ctx) -> Duration {
    20 * ctx.timing().hold
}

/// Takes a lease that is free, or this owner's already.
async fn take(ctx: &Ctx, leases: &Leases, key: &str, owner: &str, ttl: Duration) -> Verdict<Lease> {
    match ctx.within("acquire", leases.acquire(key, owner, ttl)).await?? {
        Acquired::Yes(lease) => {
            ensure_eq!(lease.owner, owner, "the owner of a lease that was acquired");
            ensure!(lease.remaining <= ttl, "{:?} remain of {ttl:?}", lease.remaining);
            Ok(lease)
        }
        Acquired::HeldBy(holder) => Err(Mismatch::new(format!("{key:?} was due to {owner:?}, but {holder:?} has it"))),
    }
}

/// Holds a key to being this lease's: same owner, same token, and no more time than before.
async fn is_of(ctx: &Ctx, leases: &Leases, key: &str, lease: &Lease) -> Verdict {
    let holder = ctx.within("holder", leases.holder(key)).await??;
    let holder = holder.ok_or_else(|| Mismatch::new(format!("{key:?} is free and should be of {lease:?}")))?;
    ensure_eq!((&holder.owner, holder.token), (&lease.owner, lease.token), "the holder of {key:?}");
    ensure!(holder.remaining <= lease.remaining, "{:?} remain of {:?}", holder.remaining, lease.remaining);
    Ok(())
}

async fn is_free(ctx: &Ctx, leases: &Leases, key: &str) -> Verdict {
    ensure_eq!(ctx.within("holder", leases.holder(key)).await??, None, "the holder of {key:?}");
    Ok(())
}

/// Waits until a lease that somebody has is over.
async fn becomes_free(ctx: &Ctx, leases: &Leases, key: &str) -> Verdict {
    ctx.eventually_async("the lease is over", || async { Ok(leases.holder(key).await?.is_none()) }).await
}

async fn acquires(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    is_free(&ctx, &leases, &key).await?;
    let lease = take(&ctx, &leases, &key, "a", long).await?;
    ensure!(lease.remaining > long / 2, "{:?} remain of {long:?}", lease.remaining);
    is_of(&ctx, &leases, &key, &lease).await
}

async fn refuses(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let lease = take(&ctx, &leases, &key, "a", long).await?;
    for _ in 0..3 {
        match ctx.within("acquire", leases.acquire(&key, "b", 2 * long)).await?? {
            Acquired::HeldBy(holder) => ensure_eq!((&*holder.owner, holder.token), ("a", lease.token), "the holder named"),
            Acquired::Yes(second) => return Err(Mismatch::new(format!("acquired while held: {second:?}"))),
        }
        is_of(&ctx, &leases, &key, &lease).await?;
    }
    Ok(())
}

async fn reacquires(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let first = take(&ctx, &leases, &key, "a", long).await?;
    for ttl in [10 * long, long] {
        let again = take(&ctx, &leases, &key, "a", ttl).await?;
        ensure_eq!(again.token, first.token, "the token");
        ensure!(again.remaining > ttl / 2, "{:?} remain of {ttl:?}", again.remaining);
        is_of(&ctx, &leases, &key, &again).await?;
    }
    Ok(())
}

async fn expires(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let (asked, ttl) = (Instant::now(), ctx.timing().hold);
    let first = take(&ctx, &leases, &key, "a", ttl).await?;
    becomes_free(&ctx, &leases, &key).await?;
    // Stores count milliseconds.
    let lasted = asked.elapsed() + Duration::from_millis(2);
    ensure!(lasted >= ttl, "free after {lasted:?} of {ttl:?}");
    let second = take(&ctx, &leases, &key, "b", long).await?;
    ensure!(second.token > first.token, "token {} follows {}", second.token, first.token);
    is_of(&ctx, &leases, &key, &second).await
}

async fn releases(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    ensure!(!ctx.within("release", leases.release(&key, "a")).await??, "released what nobody had");
    let first = take(&ctx, &leases, &key, "a", long).await?;
    ensure!(!ctx.within("release", leases.release(&key, "b")).await??, "released by somebody else");
    is_of(&ctx, &leases, &key, &first).await?;
    ensure!(ctx.within("release", leases.release(&key, "a")).await??, "not released by its owner");
    is_free(&ctx, &leases, &key).await?;
    ensure!(!ctx.within("release", leases.release(&key, "a")).await??, "released twice");
    let second = take(&ctx, &leases, &key, "b", long).await?;
    ensure!(second.token > first.token, "token {} follows {}", second.token, first.token);
    Ok(())
}

async fn renews(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    ensure_eq!(ctx.within("renew", leases.renew(&key, "a", long)).await??, None, "a renewal of what nobody had");
    let first = take(&ctx, &leases, &key, "a", long).await?;
    ensure_eq!(ctx.within("renew", leases.renew(&key, "b", 10 * long)).await??, None, "a renewal by somebody else");
    is_of(&ctx, &leases, &key, &first).await?;
    // From now: more than there was, and less than there was.
    for ttl in [10 * long, ctx.timing().hold] {
        let renewed = ctx.within("renew", leases.renew(&key, "a", ttl)).await??;
        let renewed = renewed.ok_or_else(|| Mismatch::new("not renewed for its owner"))?;
        ensure_eq!((&*renewed.owner, renewed.token), ("a", first.token), "what was renewed");
        ensure!(renewed.remaining <= ttl, "{:?} remain of {ttl:?}", renewed.remaining);
        ensure!(ttl < long || renewed.remaining > long, "{:?} remain of {ttl:?}", renewed.remaining);
    }
    becomes_free(&ctx, &leases, &key).await?;
    ensure_eq!(ctx.within("renew", leases.renew(&key, "a", long)).await??, None, "a renewal of what is over");
    is_free(&ctx, &leases, &key).await
}

async fn keys(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("same"));
    let (leases, key, long) = start(&ctx).await?;
    let mut keys = vec![topic.to_string()];
    for odd in ["", "a", "A", " ", ":", "/", "//", "*", "%2F", "é", "e\u{301}", "{a}", "../x", "\"", "🦀"] {
        keys.push(format!("{key}{odd}"));
    }
    keys.extend(["x", "y"].map(|end| format!("{key:-<254}{end}")));
    let mut held = Vec::new();
    for (number, key) in keys.iter().enumerate() {
        held.push(take(&ctx, &leases, key, &number.to_string(), long).await.map_err(|why| why.at(key))?);
    }
    for (key, lease) in keys.iter().zip(&held) {
        is_of(&ctx, &leases, key, lease).await?;
    }
    // The topic of that name knows nothing of it.
    let status = ctx.within("inspect", bus.inspect(&topic)).await??;
    ensure!(matches!(status.retained, None | Some(0)) && status.groups.is_empty(), "a lease made {status:?} of a topic");
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    exactly(&ctx.publish(&bus, &topic, 1).await?, &[ctx.next(&mut subscription).await?])?;
    ctx.within("clear", bus.clear_topic(&topic)).await??;
    for (key, lease) in keys.iter().zip(&held) {
        is_of(&ctx, &leases, key, lease).await?;
        ensure!(ctx.within("release", leases.release(key, &lease.owner)).await??, "{key:?} is not released");
        is_free(&ctx, &leases, key).await?;
    }
    Ok(())
}

async fn races(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let instances = [leases.clone(), of(&ctx.connect().await?)?, of(&ctx.connect().await?)?];
    let mut last = 0;
    for round in 0..20 {
        let racers: Vec<_> = (0..12)
            .map(|racer| {
                let (leases, key) = (instances[racer % instances.len()].clone(), key.clone());
                ctx.spawn(async move {
                    tokio::task::yield_now().await;
                    leases.acquire(&key, &format!("racer-{racer}"), long).await
                })
            })
            .collect();
        let (mut winners, mut named) = (Vec::new(), Vec::new());
        for racer in racers {
            match ctx.join("a racer", racer).await?? {
                Acquired::Yes(lease) => winners.push((lease.owner, lease.token)),
                Acquired::HeldBy(lease) => named.push((lease.owner, lease.token)),
            }
        }
        ensure_eq!(winners.len(), 1, "winners in round {round} ({winners:?})");
        ensure!(named.iter().all(|named| *named == winners[0]), "{winners:?} won, and the others were told {named:?}");
        let (owner, token) = winners.remove(0);
        ensure!(token > last || round == 0, "token {token} follows {last}");
        last = token;
        // Whoever asks, by whatever instance, is answered alike; and the owner may be anywhere.
        let elsewhere = &instances[round % instances.len()];
        let holder = ctx.within("holder", elsewhere.holder(&key)).await??.map(|lease| (lease.owner, lease.token));
        ensure_eq!(holder, Some((owner.clone(), token)), "the holder");
        ensure!(ctx.within("release", elsewhere.release(&key, &owner)).await??, "not released");
        // Else the same owner could win twice, and keep its token.
        let between = take(&ctx, &leases, &key, "between", long).await?;
        ensure!(between.token > last, "token {} follows {last}", between.token);
        last = between.token;
        ensure!(ctx.within("release", leases.release(&key, "between")).await??, "not released");
    }
    Ok(())
}

async fn transfers(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let transfer = async |from: &str, to: &str| ctx.within("transfer", leases.transfer(&key, from, to, 10 * long)).await;
    ensure_eq!(transfer("a", "b").await??, None, "a transfer of what nobody had");
    is_free(&ctx, &leases, &key).await?;
    let mut lease = take(&ctx, &leases, &key, "a", long).await?;
    ensure_eq!(transfer("b", "c").await??, None, "a transfer by somebody else");
    is_of(&ctx, &leases, &key, &lease).await?;
    // A thief who never pauses tries every moment of a transfer.
    let (over, tries) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let thief = ctx.spawn({
        let (leases, key, over, tries) = (leases.clone(), key.clone(), over.clone(), tries.clone());
        async move {
            while !over.load(Ordering::Relaxed) {
                if let Acquired::Yes(stolen) = leases.acquire(&key, "thief", long).await? {
                    return Err(Mismatch::new(format!("stolen in between: {stolen:?}")));
                }
                tries.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
            Verdict::Ok(())
        }
    });
    ctx.eventually("the thief is at work", || tries.load(Ordering::Relaxed) > 0 || thief.is_finished()).await?;
    for round in 0..100 {
        let (from, to) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let next = transfer(from, to).await??.ok_or_else(|| Mismatch::new(format!("not transferred in round {round}")))?;
        ensure_eq!(next.owner, to, "the new owner");
        ensure!(next.token > lease.token, "token {} follows {}", next.token, lease.token);
        ensure!(next.remaining > 5 * long, "{:?} remain of {:?}", next.remaining, 10 * long);
        lease = next;
    }
    over.store(true, Ordering::Relaxed);
    ctx.join("the thief", thief).await??;
    is_of(&ctx, &leases, &key, &lease).await?;
    ensure!(!ctx.within("release", leases.release(&key, "b")).await??, "released by the one who gave it away");
    // What is over cannot be given away.
    take(&ctx, &leases, &key, "a", ctx.timing().hold).await?;
    becomes_free(&ctx, &leases, &key).await?;
    ensure_eq!(transfer("a", "b").await??, None, "a transfer of what is over");
    is_free(&ctx, &leases, &key).await
}

async fn owners(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let odd = [
        "a",
        "A",
        " a",
        "a ",
        "null",
        "{\"owner\":\"a\",\"token\":7}",
        "[]",
        "1",
        "1.0",
        "a:1",
        "a|b",
        "é",
        "e\u{301}",
        "%20",
        "🦀",
    ];
    let long_one = "o".repeat(255);
    for owner in odd.iter().copied().chain([long_one.as_str()]) {
        let lease = take(&ctx, &leases, &key, owner, long).await?;
        is_of(&ctx, &leases, &key, &lease).await?;
        for other in odd.iter().filter(|other| **other != owner) {
            let told = ctx.within("acquire", leases.acquire(&key, other, long)).await??;
            ensure!(
                matches!(&told, Acquired::HeldBy(by) if by.owner == owner),
                "{other:?} and {owner:?} are taken for one: {told:?}"
            );
            ensure_eq!(ctx.within("renew", leases.renew(&key, other, long)).await??, None, "{other:?} renews for {owner:?}");
            ensure!(!ctx.within("release", leases.release(&key, other)).await??, "{other:?} releases for {owner:?}");
        }
        let next = ctx.within("transfer", leases.transfer(&key, owner, "next", long)).await??;
        ensure!(next.is_some_and(|lease| lease.owner == "next"), "not transferred from {owner:?}");
        let back = ctx.within("transfer", leases.transfer(&key, "next", owner, long)).await??;
        ensure!(back.is_some_and(|lease| lease.owner == owner), "not transferred to {owner:?}");
        ensure!(ctx.within("release", leases.release(&key, owner)).await??, "not released by {owner:?}");
    }
    Ok(())
}

async fn late(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    for round in 0..50 {
        take(&ctx, &leases, &key, "old", long).await?;
        // The old owner's renewals meet the change of owner at every moment of it.
        let renewing = ctx.spawn({
            let (leases, key) = (leases.clone(), key.clone());
            async move {
                while leases.renew(&key, "old", 100 * long).await?.is_some() {
                    tokio::task::yield_now().await;
                }
                let again = leases.acquire(&key, "old", 100 * long).await?;
                Result::<Acquired>::Ok(again)
            }
        });
        tokio::task::yield_now().await;
        let next = ctx.within("transfer", leases.transfer(&key, "old", "new", long)).await??;
        let next = next.ok_or_else(|| Mismatch::new("not transferred"))?;
        let again = ctx.join("the old owner", renewing).await??;
        ensure!(matches!(&again, Acquired::HeldBy(by) if by.token == next.token), "round {round}: {again:?} after {next:?}");
        is_of(&ctx, &leases, &key, &next).await.map_err(|why| why.at(format!("round {round}")))?;
        ensure!(ctx.within("release", leases.release(&key, "new")).await??, "not released");
    }
    Ok(())
}

async fn nonsense(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let lease = take(&ctx, &leases, &key, "a", long).await?;
    for ttl in [Duration::ZERO, Duration::from_secs(11 * 365 * 24 * 3600), Duration::MAX] {
        let refused = [
            ctx.within("acquire", leases.acquire(&key, "a", ttl)).await?.err(),
            ctx.within("renew", leases.renew(&key, "a", ttl)).await?.err(),
            ctx.within("transfer", leases.transfer(&key, "a", "b", ttl)).await?.err(),
        ];
        for error in refused {
            let kind = error.map(|error| error.kind().clone());
            ensure!(matches!(&kind, Some(ErrorKind::InvalidOption { option, .. }) if option == "ttl"), "{ttl:?}: {kind:?}");
        }
    }
    for name in ["".to_owned(), "x".repeat(256), "a\nb".into(), "\0".into(), "\u{85}".into()] {
        let refused = [
            ctx.within("acquire", leases.acquire(&name, "a", long)).await?.err(),
            ctx.within("acquire", leases.acquire(&key, &name, long)).await?.err(),
            ctx.within("renew", leases.renew(&name, "a", long)).await?.err(),
            ctx.within("release", leases.release(&key, &name)).await?.err(),
            ctx.within("transfer", leases.transfer(&key, "a", &name, long)).await?.err(),
            ctx.within("holder", leases.holder(&name)).await?.err(),
        ];
        for error in refused {
            let kind = error.map(|error| error.kind().clone());
            ensure!(matches!(kind, Some(ErrorKind::InvalidName(_))), "{name:?}: {kind:?}");
        }
    }
    is_of(&ctx, &leases, &key, &lease).await
}

async fn closed(ctx: Ctx) -> Verdict {
    let (bus, key, long) = (ctx.connect().await?, ctx.topic("lease").to_string(), 10 * ctx.timing().patience);
    let leases = of(&bus)?;
    take(&ctx, &leases, &key, "a", long).await?;
    ctx.within("close", bus.close(ctx.timing().quiet)).await??;
    // By what was asked for before, and by what is asked for now.
    for leases in bus.leases().into_iter().chain([leases]) {
        let refused = [
            ctx.within("acquire", leases.acquire(&key, "a", long)).await?.err(),
            ctx.within("renew", leases.renew(&key, "a", long)).await?.err(),
            ctx.within("transfer", leases.transfer(&key, "a", "b", long)).await?.err(),
        ];
        for error in refused {
            ensure!(error.as_ref().is_some_and(pubsub_core::Error::is_closed), "on a closed bus: {error:?}");
        }
    }
    Ok(())
}

/// Leases from elsewhere: everything is held by one owner there.
#[derive(Debug)]
struct Elsewhere;

impl Elsewhere {
    const TOKEN: u64 = 4711;

    fn lease() -> Lease {
        Lease::new("elsewhere", Self::TOKEN, Duration::from_secs(60))
    }
}

#[async_trait]
impl LeaseProvider for Elsewhere {
    fn reach(&self) -> Reach {
        Reach::Network
    }

    async fn acquire(&self, _: &str, _: &str, _: Duration) -> Result<Acquired> {
        Ok(Acquired::HeldBy(Self::lease()))
    }

    async fn renew(&self, _: &str, _: &str, _: Duration) -> Result<Option<Lease>> {
        Ok(None)
    }

    async fn release(&self, _: &str, _: &str) -> Result<bool> {
        Ok(false)
    }

    async fn transfer(&self, _: &str, _: &str, _: &str, _: Duration) -> Result<Option<Lease>> {
        Ok(None)
    }

    async fn holder(&self, _: &str) -> Result<Option<Lease>> {
        Ok(Some(Self::lease()))
    }
}

async fn beside(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("beside"));
    let with = bus.clone().with_leases(Arc::new(Elsewhere));
    let mut expected = bus.capabilities();
    expected.leases = Some(Reach::Network);
    ensure_eq!(with.capabilities(), expected, "what a bus with leases beside it can do");
    with.require([Capability::Leases])?;
    let answer = ctx.within("acquire", of(&with)?.acquire("key", "a", Duration::from_secs(1))).await??;
    ensure!(matches!(&answer, Acquired::HeldBy(by) if by.token == Elsewhere::TOKEN), "asked somebody else: {answer:?}");
    // The bus itself keeps its own, or none.
    ensure_eq!(bus.leases().map(|leases| leases.reach()), ctx.capabilities().leases, "the bus's own leases");
    if let Some(own) = bus.leases() {
        is_free(&ctx, &own, topic.as_str()).await?;
    }
    // It is one instance with it: also for what stays within an instance.
    let mut one = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut two = ctx.subscribe(&with, &topic, ctx.fan_out()).await?;
    let sent = ctx.publish(&with, &topic, 3).await?;
    for subscription in [&mut one, &mut two] {
        exactly(&sent, &ctx.collect(subscription, 3).await?)?;
    }
    let local = ctx.events(1);
    ctx.within("publish", with.publish_with(&topic, &local, PublishOptions::local_only())).await??;
    for subscription in [&mut one, &mut two] {
        exactly(&local, &ctx.collect(subscription, 1).await?)?;
    }
    Ok(())
}

async fn none(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    ensure!(bus.leases().is_none(), "leases are there and not declared");
    let refused = bus.require([Capability::Leases]).err().map(|error| error.kind().clone());
    ensure_eq!(refused, Some(ErrorKind::Unsupported(Capability::Leases)), "what `require` says");
    Ok(())
}

async fn tokens(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let mut seen = vec![take(&ctx, &leases, &key, "0", ctx.timing().hold).await?.token];
    becomes_free(&ctx, &leases, &key).await?;
    for round in 1..10 {
        let owner = round.to_string();
        seen.push(take(&ctx, &leases, &key, &owner, long).await?.token);
        // Keys that come and go beside it change nothing.
        let other = ctx.topic("other").to_string();
        take(&ctx, &leases, &other, "x", long).await?;
        ctx.within("release", leases.release(&other, "x")).await??;
        if round % 2 == 0 {
            let next = ctx.within("transfer", leases.transfer(&key, &owner, "t", long)).await??;
            seen.push(next.ok_or_else(|| Mismatch::new("not transferred"))?.token);
            ctx.within("release", leases.release(&key, "t")).await??;
        } else {
            ctx.within("release", leases.release(&key, &owner)).await??;
        }
    }
    ensure!(seen.is_sorted_by(|before, after| before < after), "the tokens were {seen:?}");
    Ok(())
}

/// The leases of a bus, with renewals counted and, when cut off, nothing getting through.
#[derive(Debug)]
struct Watched {
    inner: Leases,
    renewals: AtomicU64,
    cut_off: AtomicBool,
}

impl Watched {
    fn new(inner: &Leases) -> Arc<Self> {
        Arc::new(Self { inner: inner.clone(), renewals: AtomicU64::new(0), cut_off: AtomicBool::new(false) })
    }

    fn through(&self) -> Result<&Leases> {
        if self.cut_off.load(Ordering::SeqCst) { Err(ErrorKind::Unavailable.into()) } else { Ok(&self.inner) }
    }
}

#[async_trait]
impl LeaseProvider for Watched {
    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    async fn acquire(&self, key: &str, owner: &str, ttl: Duration) -> Result<Acquired> {
        self.through()?.acquire(key, owner, ttl).await
    }

    async fn renew(&self, key: &str, owner: &str, ttl: Duration) -> Result<Option<Lease>> {
        let renewed = self.through()?.renew(key, owner, ttl).await;
        self.renewals.fetch_add(1, Ordering::SeqCst);
        renewed
    }

    async fn release(&self, key: &str, owner: &str) -> Result<bool> {
        self.through()?.release(key, owner).await
    }

    async fn transfer(&self, key: &str, from: &str, to: &str, ttl: Duration) -> Result<Option<Lease>> {
        self.through()?.transfer(key, from, to, ttl).await
    }

    async fn holder(&self, key: &str) -> Result<Option<Lease>> {
        self.through()?.holder(key).await
    }
}

async fn guard(ctx: &Ctx, leases: Leases, key: &str, ttl: Duration) -> Verdict<LeaseGuard> {
    let guard = ctx.within("acquire", LeaseGuard::acquire(leases, key, "guarded", ttl)).await??;
    let guard = guard.map_err(|holder| Mismatch::new(format!("held by {holder:?}")))?;
    ensure!(guard.is_held(), "a guard that was just made has lost its lease");
    Ok(guard)
}

async fn guards(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let (watched, ttl) = (Watched::new(&leases), short(&ctx));
    let asked = Instant::now();
    let guard = guard(&ctx, watched.clone(), &key, ttl).await?;
    // Somebody else tries all the while.
    while asked.elapsed() < ttl + ttl / 4 {
        match ctx.within("acquire", leases.acquire(&key, "other", long)).await?? {
            Acquired::HeldBy(by) => ensure_eq!((&*by.owner, by.token), ("guarded", guard.token()), "the holder"),
            Acquired::Yes(_) => return Err(Mismatch::new(format!("lost after {:?} of {ttl:?}", asked.elapsed()))),
        }
        tokio::time::sleep(ttl / 50).await;
    }
    ensure!(guard.is_held(), "the guard has lost what it held");
    ensure!(watched.renewals.load(Ordering::SeqCst) >= 2, "it was never renewed");
    let second = ctx.within("acquire", LeaseGuard::acquire(leases, &key, "other", long)).await??;
    ensure!(second.is_err_and(|holder| holder.token == guard.token()), "a second guard does not name the holder");
    Ok(())
}

async fn robbed(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let guard = guard(&ctx, leases.clone(), &key, short(&ctx)).await?;
    let next = ctx.within("transfer", leases.transfer(&key, "guarded", "next", long)).await??;
    let next = next.ok_or_else(|| Mismatch::new("not transferred"))?;
    ctx.within("the guard tells", guard.lost()).await?;
    ensure!(!guard.is_held(), "lost and held");
    // Neither its late release nor its end touches the next owner's.
    ensure!(!ctx.within("release", guard.release()).await??, "released what it had lost");
    is_of(&ctx, &leases, &key, &next).await
}

async fn unreachable(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let watched = Watched::new(&leases);
    let guard = guard(&ctx, watched.clone(), &key, short(&ctx)).await?;
    ctx.eventually("it was renewed", || watched.renewals.load(Ordering::SeqCst) > 0).await?;
    watched.cut_off.store(true, Ordering::SeqCst);
    let rival = async {
        while let Acquired::HeldBy(by) = leases.acquire(&key, "rival", long).await? {
            ensure_eq!(by.owner, "guarded", "the holder meanwhile");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // By the holder's clock, at the very moment another has it.
        ensure!(!guard.is_held(), "two hold one lease");
        Verdict::Ok(())
    };
    ctx.within("another acquires", rival).await??;
    ctx.within("the guard tells", guard.lost()).await
}

async fn lets_go(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let watched = Watched::new(&leases);
    let released = guard(&ctx, watched.clone(), &key, long).await?;
    ensure!(ctx.within("release", released.release()).await??, "not released");
    is_free(&ctx, &leases, &key).await?;
    drop(guard(&ctx, watched.clone(), &key, long).await?);
    becomes_free(&ctx, &leases, &key).await?;
    // Whatever renews has the provider in its hands.
    ctx.eventually("no renewal goes on", || Arc::strong_count(&watched) == 1).await
}

async fn hands_over(ctx: Ctx) -> Verdict {
    let (leases, key, long) = start(&ctx).await?;
    let giver = guard(&ctx, leases.clone(), &key, long).await?;
    let (first, asked, ttl) = (giver.token(), Instant::now(), short(&ctx));
    let lease = ctx.within("transfer", giver.transfer("taker", ttl)).await??;
    let lease = lease.ok_or_else(|| Mismatch::new("not transferred"))?;
    ensure!(lease.token > first, "token {} follows {first}", lease.token);
    let watched = Watched::new(&leases);
    let taker = LeaseGuard::adopt(watched.clone(), &key, &lease, ttl, asked);
    // The giver's end takes nothing from the taker, whose renewals keep what it was given.
    ctx.eventually("it was renewed", || watched.renewals.load(Ordering::SeqCst) >= 2).await?;
    ensure!(taker.is_held(), "the taker has lost what it was given");
    let holder = ctx.within("holder", leases.holder(&key)).await??.map(|lease| (lease.owner, lease.token));
    ensure_eq!(holder, Some(("taker".to_owned(), lease.token)), "the holder");
    ensure!(ctx.within("release", taker.release()).await??, "not released by the taker");
    is_free(&ctx, &leases, &key).await
}

async fn closed_guard(ctx: Ctx) -> Verdict {
    let (bus, key) = (ctx.connect().await?, ctx.topic("lease").to_string());
    let guard = guard(&ctx, of(&bus)?, &key, short(&ctx)).await?;
    ctx.within("close", bus.close(ctx.timing().quiet)).await??;
    ctx.within("the guard tells", guard.lost()).await?;
    ensure!(!guard.is_held(), "lost and held");
    Ok(())
}
