//! Living with events that other programs write and read.

use std::sync::Arc;

use pubsub_core::{Capability, Event, Payload, wire};
use serde_json::Value;

use crate::{Ctx, Mismatch, Need, Property, Verdict, ensure, ensure_eq, omitted, property};

const GROUPS: Need = Need::Capability(Capability::Groups);

pub(crate) fn properties() -> Vec<Property> {
    const CODEC: &str = "concerns the tagged values of one socket protocol; the tests of the backend that speaks it hold it";
    vec![
        omitted("IN-01", "Dates, maps, sets, errors, big integers and the like are tagged as others tag them", &["P7"], CODEC),
        omitted("IN-02", "Data that only looks tagged is left alone, and unknown tags are data", &["P7", "S7"], CODEC),
        omitted(
            "IN-03",
            "What others wrote is read, and they read what is written here",
            &["P7"],
            "concerns the very bytes of one backend; each holds it against recorded ones, and the JSON form has its own tests",
        ),
        omitted(
            "IN-04",
            "Programs of another make share a bus and its groups",
            &["P1", "B2"],
            "needs the other program; the tests of the backends that meet one hold it",
        ),
        omitted("IN-05", "Tagged values survive the way between processes", &["P7"], CODEC),
        property("IN-06", "Fields that nobody here knows survive delivery and retry", &["P5", "S3"], unknown_fields)
            .needs([GROUPS, Need::Capability(Capability::KeepsIdentity)]),
        property(
            "IN-07",
            "An event that somebody else encoded arrives whole, and comes back whole",
            &["P5", "P7", "S3"],
            others,
        )
        .needs([GROUPS, Need::RawInjection]),
        property("IN-08", "Unknown fields go with an event into its dead letter", &["S4"], into_dead_letter).needs([GROUPS]),
    ]
}

/// An event as another program may write it: other spacing and order, escapes, and fields of its own.
const FOREIGN: &str = r#" { "tenant" : {"id": [1, null, "ü"], "deep": {"a": {"b": [[]]}}}, "priority" : -0.5,
    "createdAt":"2026-01-02T03:04:05.006Z", "data": {"text":"é\u0000\/", "when": {"__m_codec__":"Date","v":"2026-01-01T00:00:00.000Z"}},
    "id":"NOT-a-uuid", "metadata": {"traceparent": "00-ab"}, "runId":"run","type":"made.elsewhere", "spanId": "0f" } "#;

fn read(json: &str) -> Verdict<Event> {
    Ok(wire::decode(&Payload::json(json.trim().to_owned())?.to_json()?, None)?.event)
}

/// All that is in an event but its place in a history, which is the backend's to give.
fn whole(event: &Event) -> Verdict<Value> {
    Ok(serde_json::from_slice(&wire::encode(&event.clone().with_index(None))?)?)
}

/// Holds a fan-out subscription and a group to delivering this event whole, at its first attempt and at a retry.
async fn arrives_whole(ctx: &Ctx, event: &Event, publish: impl AsyncFnOnce(pubsub_core::Topic) -> Verdict) -> Verdict {
    let (bus, topic, group) = (ctx.bus().await?, ctx.topic("whole"), ctx.group("g"));
    let mut fan_out = ctx.subscribe(&bus, &topic, ctx.fan_out()).await?;
    let mut member = ctx.subscribe(&bus, &topic, ctx.member(&group)).await?;
    publish(topic).await?;
    let expected = whole(event)?;
    ensure_eq!(whole(ctx.next(&mut fan_out).await?.event())?, expected, "the event at a fan-out subscription");
    for attempt in [1, 2] {
        let delivery = ctx.next(&mut member).await?;
        ensure_eq!(delivery.attempt(), attempt, "attempt");
        ensure_eq!(whole(delivery.event())?, expected, "the event at attempt {attempt}");
        drop(if attempt == 1 { delivery.retry() } else { delivery.done() });
    }
    Ok(())
}

async fn unknown_fields(ctx: Ctx) -> Verdict {
    let (bus, event) = (ctx.bus().await?, Arc::new(read(FOREIGN)?));
    ensure_eq!(whole(&event)?["tenant"]["id"][2], Value::from("ü"), "a field nobody knows, before it was published");
    let sent = event.clone();
    arrives_whole(&ctx, &event, async |topic| ctx.publish_all(&bus, &topic, &[sent]).await).await
}

async fn others(ctx: Ctx) -> Verdict {
    let raw = ctx.harness().raw().ok_or_else(|| Mismatch::new("no way past the encoding"))?;
    let inject = async |topic| Ok(ctx.within("inject", raw.inject(&topic, FOREIGN.trim().as_bytes())).await??);
    arrives_whole(&ctx, &read(FOREIGN)?, inject).await
}

async fn into_dead_letter(ctx: Ctx) -> Verdict {
    let (bus, topic, dead) = (ctx.bus().await?, ctx.topic("whole"), ctx.topic("dead"));
    let mut letters = ctx.subscribe(&bus, &dead, ctx.fan_out()).await?;
    let options = ctx.member(&ctx.group("g")).dead_letter(dead);
    let mut member = ctx.subscribe(&bus, &topic, options).await?;
    let event = Arc::new(read(FOREIGN)?);
    ctx.publish_all(&bus, &topic, std::slice::from_ref(&event)).await?;
    drop(ctx.next(&mut member).await?.dead_letter("enough"));
    let letter = ctx.next(&mut letters).await?;
    let (given_up, letter) = (whole(&event)?, whole(letter.event())?);
    for field in ["tenant", "priority", "spanId", "data", "type", "runId"] {
        ensure_eq!(letter[field], given_up[field], "{field} of the dead letter");
    }
    ensure!(letter["id"] != given_up["id"], "a dead letter has an id of its own");
    ensure_eq!(letter["metadata"]["traceparent"], given_up["metadata"]["traceparent"], "metadata of the dead letter");
    Ok(())
}
