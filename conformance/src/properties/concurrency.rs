//! Concurrency, races of unsubscribing, and futures dropped half-way.

use std::collections::HashSet;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use futures::{FutureExt, StreamExt, poll};
use pubsub_core::{Bus, Capability, Handler, Message, SubscribeOptions, Topic};

use crate::oracle::{Recorder, at_most_once, exactly_once, ids};
use crate::{Ctx, Fault, Mismatch, Need, Property, Verdict, ensure, ensure_eq, omitted, property};

pub(crate) fn properties() -> Vec<Property> {
    const GROUPS: Need = Need::Capability(Capability::Groups);
    vec![
        property("CC-01", "Once unsubscribing has returned, no call of that handler begins", &["B2"], no_call_after_stop),
        property("CC-02", "Stopping twice, or after the stream has ended, is fine", &["B2"], stop_twice),
        property("CC-03", "What subscribing acquired is freed when it is dropped half-way", &["C4"], abandoned_resources)
            .needs([Need::Probe]),
        property("CC-04", "A member stopped while it reads strands nothing it had taken", &["S2", "C4"], stop_while_reading)
            .needs([GROUPS]),
        property("CC-05", "A handler may stop its own subscription: nobody waits for itself", &["B2", "B6"], stop_inside),
        property("CC-06", "Overlapping stops share one end, and all return", &["B2"], overlapping_stops),
        omitted("CC-07", "A stop during a claim delivers that claim and schedules no other", &["S5"], CLAIMS),
        omitted("CC-08", "A stop between listing and claiming claims nothing", &["S5"], CLAIMS),
        omitted(
            "CC-09",
            "At teardown the last delivery comes before the group's end, and that before the disconnect",
            &["C2"],
            "concerns the steps of a backend that destroys server-side groups; its own tests hold their order",
        ),
        property("CC-10", "Many first subscriptions at once are all attached", &["B1", "B2"], many_at_once),
        property(
            "CC-11",
            "Fan-out subscriptions of an instance share what a topic costs below, and the last frees it",
            &["B2"],
            shared,
        )
        .needs([Need::Probe]),
        property("CC-12", "What could not connect connects when it is called again", &["N1"], cold_callers)
            .needs([Need::Fault(Fault::Outage)]),
        property(
            "CC-13",
            "A member that joins while its group's last one leaves is a member",
            &["B1", "B2"],
            join_while_leaving,
        )
        .needs([GROUPS]),
        property("CC-14", "Each of several members that join at once counts from its own return on", &["B1"], own_return)
            .needs([GROUPS]),
        property(
            "CC-15",
            "Subscriptions that come and go under load cost the stable ones nothing and leave nothing",
            &["B2", "C4"],
            churn,
        )
        .needs([GROUPS])
        .limit(Duration::from_secs(60)),
        property(
            "CC-16",
            "Instances that open and close at once do not disturb those that stay and come",
            &["B2", "C2"],
            instances,
        )
        .needs([Need::CrossInstance]),
        property(
            "CC-17",
            "Dropping a future half-way leaves nothing attached and no event half published",
            &["C4"],
            dropped_futures,
        ),
        property(
            "CC-18",
            "Members reading at once, with publishers at once, together get every event",
            &["P1", "B2"],
            receivers,
        )
        .needs([GROUPS]),
    ]
}

const CLAIMS: &str = "concerns the steps of a backend that claims what dead members held; its own tests hold it";

/// A handler that records, up to four at a time.
async fn recording(ctx: &Ctx, bus: &Bus, topic: &Topic, recorder: &Recorder, name: &'static str) -> Verdict<Handler> {
    let recorder = recorder.clone();
    let handler = move |message: Message| {
        recorder.event(name, message.event(), message.attempt());
        std::future::ready(Ok(()))
    };
    Ok(ctx.within("subscribe", bus.on(topic, ctx.fan_out(), 4, handler)).await??)
}

/// Polls a future so many times, letting others run in between; its output if it was ready by then.
async fn poll_times<T>(times: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    for _ in 0..times {
        if let std::task::Poll::Ready(done) = poll!(future.as_mut()) {
            return Some(done);
        }
        tokio::task::yield_now().await;
    }
    None
}

/// Lets other tasks run for a while, differently each time.
async fn meanwhile(rng: &mut fastrand::Rng) {
    for _ in 0..rng.usize(..20) {
        tokio::task::yield_now().await;
    }
}

/// Fails if fan-out subscriptions are left on a topic, where the backend can tell.
async fn nobody_left(ctx: &Ctx, bus: &Bus, topic: &Topic) -> Verdict {
    ctx.eventually_async("no fan-out subscription is left", || async {
        Ok(matches!(bus.inspect(topic).await?.fan_out, None | Some(0)))
    })
    .await
}

async fn no_call_after_stop(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("stopped"), Recorder::new());
    let control = recording(&ctx, &bus, &topic, &recorder, "control").await?;
    let publishing = ctx.spawn({
        let (ctx, bus, topic) = (ctx.clone(), bus.clone(), topic.clone());
        async move { ctx.publish(&bus, &topic, 300).await }
    });
    let mut stopped = Vec::new();
    for name in ["first", "second", "third"] {
        let handler = recording(&ctx, &bus, &topic, &recorder, name).await?;
        let first = ctx.publish(&bus, &topic, 1).await?.remove(0);
        recorder.published("extra", &first);
        ctx.eventually("the handler was called", || recorder.saw_by(name, first.id())).await?;
        let report = ctx.within("stop", handler.stop()).await??;
        stopped.push((name, recorder.count_of(name)));
        // What had begun has also ended.
        ensure_eq!(report.done, recorder.count_of(name) as u64, "calls of {name} that ended before it had stopped");
    }
    let mut sent = ctx.join("publishing", publishing).await??;
    sent.extend(ctx.publish(&bus, &topic, 20).await?);
    let sent = [ids(&sent), recorder.sent()].concat();
    let fence = ctx.fence(&bus, &topic).await?;
    ctx.eventually("the fence at the other handler", || recorder.saw_by("control", &fence)).await?;
    ctx.eventually("all at the other handler", || recorder.count_of("control") >= sent.len()).await?;
    for (name, before) in stopped {
        ensure_eq!(recorder.count_of(name), before, "calls of {name} after it had stopped");
        at_most_once(&sent, &recorder.ids_of(name))?;
    }
    ctx.within("stop", control.stop()).await??;
    exactly_once(&sent, &recorder.ids_of("control"))
}

async fn stop_twice(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("twice"));
    let mut subscription = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut other = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let handle = subscription.handle();
    ctx.publish(&bus, &topic, 3).await?;
    drop(ctx.next(&mut subscription).await?);
    handle.stop();
    handle.stop();
    // What was queued is released, which is nothing to wait for.
    ctx.within("drained", handle.drained()).await?;
    ctx.ended(&mut subscription).await?;
    handle.stop();
    ensure!(handle.status().ended, "a stopped subscription has not ended");
    ctx.ended(&mut subscription).await?;
    ctx.within("unsubscribe", subscription.unsubscribe()).await?;
    handle.stop();
    ctx.within("drained", handle.drained()).await?;
    ctx.collect(&mut other, 3).await?;
    ctx.nothing_before_fence(&mut other, &bus, &topic).await
}

async fn abandoned_resources(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("abandoned"));
    let probe = ctx.harness().probe().ok_or_else(|| Mismatch::new("no probe"))?;
    let mut kinds = vec![ctx.fan_out()];
    if ctx.capabilities().supports(Capability::Groups) {
        kinds.push(ctx.member(&ctx.group("g")));
    }
    // What lasts, as a durable group does, is there before.
    for options in &kinds {
        ctx.within("unsubscribe", ctx.subscribe(&bus, &topic, options.clone()).await?.unsubscribe()).await?;
    }
    ctx.within("flush", bus.flush()).await??;
    let before = ctx.within("resources", probe.resources()).await??;
    for (polls, options) in (0..10).cycle().zip(kinds.iter().cycle()).take(60) {
        drop(poll_times(polls, bus.subscribe_with(&topic, options.clone())).await);
    }
    // Calls that come later are answered later: what was abandoned has had its effect by now.
    for options in &kinds {
        ctx.within("unsubscribe", ctx.subscribe(&bus, &topic, options.clone()).await?.unsubscribe()).await?;
    }
    ctx.within("flush", bus.flush()).await??;
    ctx.eventually_async("what was abandoned is freed", || async { Ok(probe.resources().await? == before) }).await
}

async fn stop_while_reading(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("handover"), ctx.group("g"));
    let (recorder, mut rng) = (Recorder::new(), ctx.rng());
    let staying = ctx.subscribe(&bus, &topic, ctx.member(&group).prefetch(4)).await?;
    let staying = ctx.consume(staying, &recorder, "staying");
    let mut sent = Vec::new();
    for _ in 0..20 {
        let leaving = ctx.subscribe(&bus, &topic, ctx.member(&group).prefetch(4)).await?;
        let leaving = ctx.consume(leaving, &recorder, "leaving");
        let events = ctx.events(10);
        let stop = async {
            meanwhile(&mut rng).await;
            leaving.leave(&ctx).await
        };
        futures::try_join!(ctx.publish_all(&bus, &topic, &events), stop)?;
        sent.extend(ids(&events));
    }
    ctx.eventually("all arrived", || recorder.distinct() == sent.len()).await?;
    ctx.drained(&[&staying]).await?;
    exactly_once(&sent, &recorder.ids())?;
    // Released, not retried: nobody had it in hand.
    ensure!(recorder.attempts().iter().all(|(_, attempt)| *attempt == 1), "a stop counted as an attempt");
    Ok(())
}

async fn stop_inside(ctx: Ctx) -> Verdict {
    let bus = ctx.bus().await?;
    let mut kinds = vec![ctx.fan_out()];
    if ctx.capabilities().supports(Capability::Groups) {
        kinds.push(ctx.member(&ctx.group("g")));
    }
    for options in kinds {
        let topic = ctx.topic("inside");
        let mut subscription = ctx.subscribe(&bus, &topic, options).await?;
        let (handle, calls) = (subscription.handle(), AtomicU64::new(0));
        ctx.publish(&bus, &topic, 3).await?;
        let handler = |_: Message| {
            calls.fetch_add(1, Ordering::Relaxed);
            handle.stop();
            handle.stop();
            // The rest of the handler runs, and its outcome counts.
            async {
                tokio::task::yield_now().await;
                Ok(())
            }
        };
        let report = ctx.within("run", subscription.run(1, handler)).await??;
        ensure_eq!((calls.load(Ordering::Relaxed), report.done), (1, 1), "calls and how many of them are done");
    }
    Ok(())
}

async fn overlapping_stops(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("overlap"));
    for _ in 0..10 {
        let subscription = ctx.subscribe(&bus, &topic, ctx.fan_out().prefetch(1)).await?;
        ctx.publish(&bus, &topic, 1).await?;
        let stops = (0..8).map(|_| {
            let handle = subscription.handle();
            ctx.spawn(async move { handle.stop() })
        });
        let stops: Vec<_> = stops.collect();
        ctx.within("unsubscribe", subscription.unsubscribe()).await?;
        for stop in stops {
            ctx.join("a stop", stop).await?;
        }
    }
    // What is not gone would be full by now.
    ctx.publish(&bus, &topic, 5).await?;
    nobody_left(&ctx, &bus, &topic).await
}

async fn many_at_once(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("first"));
    let subscribing = (0..32).map(|_| {
        let (ctx, bus, topic) = (ctx.clone(), bus.clone(), topic.clone());
        let name = ctx.clone();
        name.spawn(async move { ctx.subscribe(&bus, &topic, ctx.fan_out()).await })
    });
    let subscribing: Vec<_> = subscribing.collect();
    let mut subscriptions = Vec::new();
    for one in subscribing {
        subscriptions.push(ctx.join("subscribe", one).await??);
    }
    let sent = ids(&ctx.publish(&bus, &topic, 10).await?);
    let fence = ctx.fence(&bus, &topic).await?;
    for (number, subscription) in subscriptions.iter_mut().enumerate() {
        let seen = crate::oracle::delivered(&ctx.until(subscription, &fence).await?);
        exactly_once(&sent, &seen).map_err(|why| why.at(format!("subscription {number}")))?;
    }
    Ok(())
}

async fn shared(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("shared"));
    let probe = ctx.harness().probe().ok_or_else(|| Mismatch::new("no probe"))?;
    let none = ctx.within("resources", probe.resources()).await??;
    let mut subscriptions = vec![ctx.subscribe(&bus, &topic, ctx.fan_out()).await?];
    let one = ctx.within("resources", probe.resources()).await??;
    for _ in 1..50 {
        subscriptions.push(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?);
    }
    ensure_eq!(ctx.within("resources", probe.resources()).await??, one, "resources of fifty, against those of one");
    drop(subscriptions);
    ctx.eventually_async("the last one frees them", || async { Ok(probe.resources().await? == none) }).await
}

async fn cold_callers(ctx: Ctx) -> Verdict {
    let topic = ctx.topic("cold");
    let faults = ctx.harness().faults().ok_or_else(|| Mismatch::new("no faults"))?;
    ctx.within("an outage", faults.inject(Fault::Outage)).await??;
    // Connecting may be lazy; then it is the first call that fails, or waits.
    let early = match ctx.within("connect", ctx.harness().connect()).await? {
        Ok(pubsub) => {
            let bus = Bus::new(pubsub);
            let failing =
                ctx.within("publish", tokio::time::timeout(ctx.timing().quiet, bus.publish(&topic, ctx.event()))).await?;
            ensure!(!matches!(failing, Ok(Ok(_))), "a publish succeeded during an outage");
            Some(bus)
        }
        Err(error) => {
            ensure!(error.is_retryable(), "connecting during an outage fails for good: {error}");
            None
        }
    };
    ctx.within("healing", faults.inject(Fault::Heal)).await??;
    let bus = match early {
        Some(bus) => bus,
        None => ctx.connect().await?,
    };
    let recorder = Recorder::new();
    let consumer = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "a");
    let sent = ctx.events(16);
    let publishing = sent.iter().map(|event| ctx.within("publish", bus.publish(&topic, event.clone())));
    for published in join_all(publishing).await {
        published??;
    }
    ctx.fence_consumers(&bus, &topic, &recorder, &[&consumer]).await?;
    ctx.eventually("all arrived", || sent.iter().all(|event| recorder.saw(event.id()))).await
}

async fn join_while_leaving(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("relay"), ctx.group("g"));
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    for round in 0..50 {
        // On different threads, as far as there are two.
        let start = Arc::new(tokio::sync::Barrier::new(4));
        let leaving = ctx.spawn({
            let start = start.clone();
            async move {
                start.wait().await;
                member.unsubscribe().await;
            }
        });
        let joining = [(); 3].map(|()| {
            let (own, bus, topic, group) = (ctx.clone(), bus.clone(), topic.clone(), group.clone());
            let start = start.clone();
            ctx.spawn(async move {
                start.wait().await;
                own.subscribe(&bus, &topic, own.member(&group)).await
            })
        });
        let mut joined = Vec::new();
        for one in joining {
            joined.push(ctx.join("subscribe", one).await??);
        }
        member = joined.remove(0);
        for other in joined {
            ctx.within("unsubscribe", other.unsubscribe()).await?;
        }
        let sent = ctx.publish(&bus, &topic, 3).await?;
        ctx.join("unsubscribe", leaving).await?;
        let seen = ctx.collect_done(&mut member, 3).await.map_err(|why| why.at(format!("round {round}")))?;
        exactly_once(&ids(&sent), &seen)?;
    }
    ctx.nothing_before_fence(&mut member, &bus, &topic).await
}

async fn own_return(ctx: Ctx) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("joining"), ctx.group("g"));
    let recorder = Recorder::new();
    let joining = (0..8).map(|number| {
        let (ctx, bus, topic, group, recorder) = (ctx.clone(), bus.clone(), topic.clone(), group.clone(), recorder.clone());
        let spawner = ctx.clone();
        spawner.spawn(async move {
            let member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
            let event = ctx.publish(&bus, &topic, 1).await?.remove(0);
            recorder.published("all", &event);
            Verdict::Ok(ctx.consume(member, &recorder, &format!("member {number}")))
        })
    });
    let joining: Vec<_> = joining.collect();
    let mut members = Vec::new();
    for one in joining {
        members.push(ctx.join("joining", one).await??);
    }
    ctx.eventually("all arrived", || recorder.distinct() == 8).await?;
    ctx.drained(&members.iter().collect::<Vec<_>>()).await?;
    exactly_once(&recorder.sent(), &recorder.ids())
}

async fn churn(ctx: Ctx) -> Verdict {
    const CHURNERS: usize = 4;
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("churn"), ctx.group("g"));
    let recorder = Recorder::new();
    let stable = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "stable");
    let members = Recorder::new();
    let member = ctx.consume(ctx.subscribe(&bus, &topic, ctx.member(&group)).await?, &members, "member");
    ctx.fence_consumers(&bus, &topic, &recorder, &[&stable]).await?;
    let before = ctx.alive_tasks();
    let churning: Vec<_> = (0..CHURNERS)
        .map(|_| {
            let (own, bus, topic, group, members) = (ctx.clone(), bus.clone(), topic.clone(), group.clone(), members.clone());
            ctx.spawn(async move {
                let mut rng = own.rng();
                for _ in 0..1000 / CHURNERS {
                    let options = if rng.bool() { own.fan_out() } else { own.member(&group) };
                    let mut subscription = own.subscribe(&bus, &topic, options.prefetch(4)).await?;
                    // What a passing member takes is handled, like any other member's.
                    if let Some(Some(next)) = subscription.next().now_or_never()
                        && let delivery = next?
                        && !delivery.is_settled()
                    {
                        members.received("passing", &delivery);
                        drop(delivery.done());
                    }
                    if rng.bool() {
                        own.within("unsubscribe", subscription.unsubscribe()).await?;
                    }
                }
                Verdict::Ok(())
            })
        })
        .collect();
    let sent = ids(&ctx.publish(&bus, &topic, 300).await?);
    for one in churning {
        ctx.join("coming and going", one).await??;
    }
    ctx.fence_consumers(&bus, &topic, &recorder, &[&stable]).await?;
    exactly_once(&sent, &recorder.ids())?;
    ctx.eventually("the group has all", || members.distinct() == sent.len()).await?;
    ctx.drained(&[&member]).await?;
    exactly_once(&sent, &members.ids())?;
    ctx.eventually_async("only the stable ones are left", || async {
        let status = bus.inspect(&topic).await?;
        let left = status.groups.iter().find(|status| status.group == group).and_then(|status| status.members);
        Ok(matches!(status.fan_out, None | Some(1)) && matches!(left, None | Some(1)))
    })
    .await?;
    // A few may have been started for all that is to come; a thousand subscriptions would leave more.
    ctx.eventually("tasks are about as few as before", || ctx.alive_tasks() <= before + 8).await
}

async fn instances(ctx: Ctx) -> Verdict {
    let (bus, topic, recorder) = (ctx.bus().await?, ctx.topic("instances"), Recorder::new());
    let staying = ctx.consume(ctx.subscribe(&bus, &topic, ctx.fan_out()).await?, &recorder, "staying");
    let passing: Vec<_> = (0..16)
        .map(|_| {
            let (own, topic, recorder) = (ctx.clone(), topic.clone(), recorder.clone());
            ctx.spawn(async move {
                let bus = own.connect().await?;
                let mut subscription = own.subscribe(&bus, &topic, own.fan_out()).await?;
                let event = own.publish(&bus, &topic, 1).await?.remove(0);
                recorder.published("passing", &event);
                while own.next(&mut subscription).await?.event().id() != event.id() {}
                own.within("close", bus.close(own.timing().quiet)).await??;
                Verdict::Ok(())
            })
        })
        .collect();
    for one in passing {
        ctx.join("an instance", one).await??;
    }
    let late_bus = ctx.connect().await?;
    let late = ctx.consume(ctx.subscribe(&late_bus, &topic, ctx.fan_out()).await?, &recorder, "late");
    let sent = ids(&ctx.publish(&late_bus, &topic, 5).await?);
    ctx.fence_consumers(&bus, &topic, &recorder, &[&staying, &late]).await?;
    exactly_once(&sent, &recorder.ids_of("late"))?;
    exactly_once(&[recorder.sent(), sent].concat(), &recorder.ids_of("staying"))
}

async fn dropped_futures(ctx: Ctx) -> Verdict {
    let (bus, topic) = (ctx.bus().await?, ctx.topic("subscribing"));
    for polls in 0..16 {
        let options = ctx.fan_out().prefetch(1);
        drop(poll_times(polls % 8, bus.subscribe_with(&topic, options)).await);
    }
    // What is left attached would be full by now.
    ctx.publish(&bus, &topic, 5).await?;
    nobody_left(&ctx, &bus, &topic).await?;

    let topic = ctx.topic("publishing");
    let narrow = ctx.subscribe(&bus, &topic, ctx.fan_out().prefetch(8)).await?;
    let wide = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut sent = Vec::new();
    for polls in 0..8 {
        let events = ctx.events(4);
        drop(poll_times(polls, bus.publish_with(&topic, &events, Default::default())).await);
        sent.extend(ids(&events));
    }
    let recorder = Recorder::new();
    let (narrow, wide) = (ctx.consume(narrow, &recorder, "narrow"), ctx.consume(wide, &recorder, "wide"));
    ctx.fence_consumers(&bus, &topic, &recorder, &[&narrow, &wide]).await?;
    // A publish that was dropped may still be on its way, behind the fence: in the end both have it, or neither.
    let of = |by: &str| recorder.ids_of(by).into_iter().collect::<HashSet<_>>();
    ctx.eventually("one has what the other has", || of("narrow") == of("wide")).await?;
    at_most_once(&sent, &recorder.ids_of("wide"))?;
    at_most_once(&sent, &recorder.ids_of("narrow"))
}

async fn receivers(ctx: Ctx) -> Verdict {
    const PUBLISHERS: usize = 8;
    let (bus, topic, group, recorder) = (ctx.bus().await?, ctx.topic("crowd"), ctx.group("g"), Recorder::new());
    let mut members = Vec::new();
    for number in 0..6 {
        let options: SubscribeOptions = ctx.member(&group).prefetch(8);
        members.push(ctx.consume(ctx.subscribe(&bus, &topic, options).await?, &recorder, &format!("member {number}")));
    }
    let publishing = (0..PUBLISHERS).map(|_| {
        let (own, bus, topic) = (ctx.clone(), bus.clone(), topic.clone());
        let task = ctx.spawn(async move { own.publish(&bus, &topic, 100).await });
        ctx.join("a publisher", task)
    });
    let mut sent = Vec::new();
    for events in try_join_all(publishing).await? {
        sent.extend(ids(&events?));
    }
    ctx.eventually("all arrived", || recorder.distinct() == sent.len()).await?;
    ctx.drained(&members.iter().collect::<Vec<_>>()).await?;
    exactly_once(&sent, &recorder.ids())
}
