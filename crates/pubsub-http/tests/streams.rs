//! Streams over a real connection: starting, resuming, gaps, ends, and what one client is to the others.

mod common;

use std::time::Duration;

use common::*;
use futures::StreamExt;
use pubsub_cache::InMemoryServerCache;
use pubsub_core::{Bus, Event, PublishOptions, SubscribeOptions};
use pubsub_http::ServeOptions;
use serde_json::json;

const PATH: &str = "/t/events";

#[tokio::test]
async fn a_stream_cut_again_and_again_is_whole() {
    let bus = kept();
    let server = Server::start(http(&bus).build().unwrap()).await;
    let mut seen = Vec::new();
    let mut last = server.follow(PATH, None).await.opened().await;
    for cut in 0..20 {
        publish(&bus, "t", cut * 10..cut * 10 + 10).await;
        let mut stream = server.follow("/t/events?start=latest", Some(&last)).await;
        seen.extend(stream.kinds(7).await);
        last = stream.last.clone().unwrap();
    }
    seen.extend(server.follow(PATH, Some(&last)).await.kinds(60).await);
    assert_eq!(seen, numbers(0..200));
    server.stop().await;
}

#[tokio::test]
async fn what_is_missed_before_the_first_event_is_resumed_too() {
    let bus = kept();
    let server = Server::start(http(&bus).build().unwrap()).await;
    let on_nothing = server.follow(PATH, None).await.opened().await;
    publish(&bus, "t", 0..2).await;
    let at_head = server.follow(PATH, None).await.opened().await;
    publish(&bus, "t", 2..4).await;
    assert_eq!(server.follow(PATH, Some(&on_nothing)).await.kinds(4).await, numbers(0..4));
    assert_eq!(server.follow(PATH, Some(&at_head)).await.kinds(2).await, numbers(2..4));
}

#[tokio::test]
async fn starts_where_it_is_asked() {
    let bus = kept();
    let server = Server::start(http(&bus).build().unwrap()).await;
    publish(&bus, "t", 0..5).await;
    assert_eq!(server.follow("/t/events?start=earliest", None).await.kinds(5).await, numbers(0..5));
    let mut from_third = server.follow("/t/events?start=2&token=secret", None).await;
    assert_eq!(from_third.kinds(1).await, ["2"]);
    let after = format!("/t/events?after={}", from_third.last.clone().unwrap());
    assert_eq!(server.follow(&after, None).await.kinds(2).await, ["3", "4"]);
    let mut latest = server.follow(PATH, None).await;
    latest.opened().await;
    publish(&bus, "t", 5..6).await;
    assert_eq!(latest.kinds(1).await, ["5"]);
    for bad in ["?start=soon", "?after=here", "?start=1&start=2"] {
        assert_eq!(server.get(&format!("{PATH}{bad}")).await.status, 400, "{bad}");
    }
    let keeps_nothing = Server::start(http(&bare()).build().unwrap()).await;
    let refused = keeps_nothing.get("/t/events?start=earliest").await;
    assert_eq!((refused.status, refused.header("content-type")), (501, Some("application/problem+json")));
}

#[tokio::test]
async fn an_event_is_written_as_it_was_published() {
    let bus = kept();
    let server = Server::start(http(&bus).build().unwrap()).await;
    let topic = "a/b c\u{1f980}";
    let path = "/a%2Fb%20c%F0%9F%A6%80/events?start=earliest";
    let data = json!({"text": "two\nlines, \u{2028}, \r and \"quotes\""});
    let event = Event::new("x").with_run_id("r").with_data(data.clone()).with_metadata("k", "v");
    let id = event.id().to_string();
    bus.publish(topic, event).await.unwrap();
    let pretty = pubsub_core::Payload::json("{\r\n  \"a\":\n 1\r}").unwrap();
    bus.publish(topic, Event::new("pretty").with_payload(pretty)).await.unwrap();
    // Two streams share what is written, one writes by itself: both ways, the same.
    let mut streams = [server.follow(path, None).await, server.follow(path, None).await];
    for stream in &mut streams {
        let told = stream.next().await.unwrap().json();
        assert_eq!((&told["id"], &told["data"], &told["runId"]), (&json!(id), &data, &json!("r")));
        assert_eq!((&told["metadata"]["k"], &told["index"]), (&json!("v"), &json!(0)));
        assert_eq!(stream.next().await.unwrap().json()["data"], json!({"a": 1}));
    }
}

#[tokio::test]
async fn a_gap_is_told_and_the_stream_goes_on() {
    let bus = kept_in(InMemoryServerCache::builder().max_events(10).build().unwrap());
    let server = Server::start(http(&bus).build().unwrap()).await;
    let gap = |reason: &str, missed: u64| json!({"reason": reason, "missed": missed});
    publish(&bus, "t", 0..5).await;
    let mut stream = server.follow("/t/events?start=earliest", None).await;
    stream.kinds(2).await;
    publish(&bus, "t", 5..20).await;
    let mut resumed = server.follow(PATH, stream.last.as_deref()).await;
    let told = resumed.next().await.unwrap();
    assert_eq!((told.name.as_str(), told.json()), ("gap", gap("trimmed", 8)));
    assert_eq!(resumed.kinds(10).await, numbers(10..20));
    for lost in ["elsewhere.0.7.0", "no cursor at all"] {
        let mut lost = server.follow(PATH, Some(lost)).await;
        assert_eq!(lost.next().await.unwrap().json(), json!({"reason": "otherBus"}));
        assert_eq!(lost.kinds(10).await, numbers(10..20));
    }
}

#[tokio::test]
async fn where_nothing_is_retained_whoever_was_away_is_told() {
    let bus = bare();
    let server = Server::start(http(&bus).build().unwrap()).await;
    let mut stream = server.follow(PATH, None).await;
    let id = stream.opened().await;
    publish(&bus, "t", 0..2).await;
    assert_eq!(stream.kinds(2).await, numbers(0..2));
    assert_eq!(stream.last.as_deref(), Some(&*id));
    let mut resumed = server.follow(PATH, Some(&id)).await;
    assert_eq!(resumed.next().await.unwrap().json(), json!({"reason": "notRetained"}));
    publish(&bus, "t", 2..3).await;
    assert_eq!(resumed.kinds(1).await, ["2"]);
    let mut of_another = server.follow(PATH, Some("b.g.1.0")).await;
    assert_eq!(of_another.next().await.unwrap().name, "gap");
}

#[tokio::test]
async fn a_cleared_topic_ends_its_streams() {
    let bus = kept();
    let server = Server::start(http(&bus).heartbeat(Duration::from_millis(50)).build().unwrap()).await;
    publish(&bus, "t", 0..3).await;
    let mut idle = server.follow("/t/events?start=earliest", None).await;
    idle.kinds(3).await;
    bus.clear_topic("t").await.unwrap();
    // Nothing more happens on the topic, and still it is noticed.
    let told = idle.next().await.unwrap();
    assert_eq!((told.name.as_str(), told.json()), ("end", json!({"reason": "cleared"})));
    assert_eq!(idle.next().await, None);

    let patient = Server::start(http(&bus).build().unwrap()).await;
    publish(&bus, "t", 3..5).await;
    let mut busy = patient.follow("/t/events?start=earliest", None).await;
    assert_eq!(busy.kinds(2).await, ["3", "4"]);
    bus.clear_topic("t").await.unwrap();
    publish(&bus, "t", 5..6).await;
    assert_eq!(busy.next().await.unwrap().name, "end");
    assert_eq!(busy.next().await, None);
    let mut resumed = patient.follow(PATH, busy.last.as_deref()).await;
    assert_eq!(resumed.next().await.unwrap().json(), json!({"reason": "otherGeneration"}));
    assert_eq!(resumed.kinds(1).await, ["5"]);
}

#[tokio::test]
async fn silence_is_told_from_absence() {
    let bus = kept();
    let server = Server::start(http(&bus).heartbeat(Duration::from_millis(20)).build().unwrap()).await;
    publish(&bus, "t", 0..1).await;
    let mut stream = server.follow("/t/events?start=earliest", None).await;
    stream.kinds(1).await;
    // A heartbeat is no event: an event comes behind a few of them.
    stream.heartbeats(3).await;
    publish(&bus, "t", 1..2).await;
    assert_eq!(stream.kinds(1).await, ["1"]);
}

#[tokio::test]
async fn a_stream_ends_with_its_time_and_with_its_bus_and_can_be_resumed() {
    let bus = kept();
    let server = Server::start(http(&bus).stream_lifetime(Duration::from_millis(100)).build().unwrap()).await;
    publish(&bus, "t", 0..2).await;
    let mut stream = server.follow("/t/events?start=earliest", None).await;
    stream.kinds(2).await;
    assert_eq!(stream.next().await, None, "without an event that says it is over for good");
    let mut resumed = server.follow(PATH, stream.last.as_deref()).await;
    publish(&bus, "t", 2..3).await;
    assert_eq!(resumed.kinds(1).await, ["2"]);
    bus.close(Duration::from_secs(1)).await.unwrap();
    assert_eq!(resumed.next().await, None);
    assert_eq!(server.get(PATH).await.status, 503);
}

/// Publishes 400 events, which is more than a connection's buffers and a queue hold.
async fn flood(bus: &Bus) {
    let text = "x".repeat(64 << 10);
    for number in 0..400_u32 {
        let event = Event::new(number.to_string()).with_data(text.clone());
        soon("publishing past a slow client", bus.publish("t", event)).await.unwrap();
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_client_that_is_too_slow_is_told_what_it_lost_and_holds_nobody_up() {
    let bus = bare();
    let server = Server::start(http(&bus).prefetch(64).build().unwrap()).await;
    let mut slow = server.follow(PATH, None).await;
    slow.opened().await;
    flood(&bus).await;
    let (mut got, mut lost) = (0_u64, 0);
    while got + lost < 400 {
        let message = slow.next().await.unwrap();
        match message.name.as_str() {
            "gap" => lost += message.json()["missed"].as_u64().unwrap(),
            _ => got += 1,
        }
    }
    assert!(lost > 0 && got + lost == 400, "{got} and {lost}");
}

#[tokio::test]
async fn with_a_history_a_slow_client_loses_nothing() {
    let bus = kept();
    let server = Server::start(http(&bus).prefetch(8).build().unwrap()).await;
    let mut slow = server.follow(PATH, None).await;
    slow.opened().await;
    flood(&bus).await;
    assert_eq!(slow.kinds(400).await, numbers(0..400));
}

#[tokio::test]
async fn one_more_than_the_limit_is_refused_until_one_leaves() {
    let bus = bare();
    let server = Server::start(http(&bus).max_streams(2).build().unwrap()).await;
    let (mut first, mut second) = (server.follow(PATH, None).await, server.follow(PATH, None).await);
    first.opened().await;
    second.opened().await;
    let refused = server.get(PATH).await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert_eq!(refused.json()["detail"], "too many streams are open");
    drop(first);
    eventually("the place is free", async || followers(&bus, "t").await == 1).await;
    server.follow(PATH, None).await.opened().await;
    publish(&bus, "t", 0..1).await;
    assert_eq!(second.kinds(1).await, ["0"]);
}

#[tokio::test]
async fn stopping_the_server_ends_streams_and_leaves_nothing() {
    let bus = bare();
    let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let options = ServeOptions::new().grace(Duration::from_millis(50));
    let server = Server::start_with(http(&bus).build().unwrap(), options).await;
    let mut streams = Vec::new();
    for _ in 0..10 {
        let mut stream = server.follow(PATH, None).await;
        stream.opened().await;
        streams.push(stream);
    }
    assert_eq!(followers(&bus, "t").await, 10);
    server.stop().await;
    assert_eq!(followers(&bus, "t").await, 0);
    let left = async || tokio::runtime::Handle::current().metrics().num_alive_tasks() <= before;
    eventually("no task is left", left).await;
}

#[tokio::test]
async fn what_has_no_place_is_told_as_missed_to_who_was_away() {
    let bus = kept();
    let server = Server::start(http(&bus).build().unwrap()).await;
    let placeless = async |kind: &str| {
        let here = PublishOptions::local_only();
        bus.publish_with("t", &[Event::new(kind).into()], here).await.unwrap();
    };
    let mut stream = server.follow("/t/events?start=earliest", None).await;
    stream.opened().await;
    placeless("a").await;
    assert_eq!(stream.kinds(1).await, ["a"]);
    placeless("b").await; // and it is away
    let mut resumed = server.follow(PATH, stream.last.as_deref()).await;
    assert_eq!(resumed.next().await.unwrap().json(), json!({"reason": "notRetained"}));
    publish(&bus, "t", 0..2).await;
    placeless("c").await;
    assert_eq!(resumed.kinds(3).await, ["0", "1", "c"]);
    publish(&bus, "t", 2..3).await;
    let mut again = server.follow(PATH, resumed.last.as_deref()).await;
    assert_eq!(again.next().await.unwrap().json(), json!({"reason": "notRetained"}));
    assert_eq!(again.kinds(1).await, ["2"], "what has a place comes once");
    // Behind an event that has a place nothing is missed.
    assert_eq!(resumed.kinds(1).await, ["2"]);
    publish(&bus, "t", 3..4).await;
    assert_eq!(server.follow(PATH, resumed.last.as_deref()).await.kinds(1).await, ["3"]);
}

#[tokio::test]
async fn dead_letters_that_are_not_retained_are_told_as_missed() {
    let bus = kept();
    let server = Server::start(http(&bus).build().unwrap()).await;
    let keeper = bus.subscribe_group("dead", "keeps them").await.unwrap();
    let mut worker = bus
        .subscribe_with("t", SubscribeOptions::group("g".parse().unwrap()).dead_letter("dead".parse().unwrap()))
        .await
        .unwrap();
    let mut die = async |kind: &str| {
        bus.publish("t", Event::new(kind)).await.unwrap();
        worker.next().await.unwrap().unwrap().dead_letter("no").await;
    };
    let mut stream = server.follow("/dead/events?start=earliest", None).await;
    stream.opened().await;
    die("a").await;
    assert_eq!(stream.kinds(1).await, ["a"]);
    die("b").await;
    let mut resumed = server.follow("/dead/events", stream.last.as_deref()).await;
    assert_eq!(resumed.next().await.unwrap().name, "gap");
    drop(keeper);
}

#[tokio::test]
async fn streams_end_at_once_and_whole_when_their_server_stops() {
    let bus = kept();
    let options = ServeOptions::new().grace(Duration::from_secs(3600));
    let server = Server::start_with(http(&bus).build().unwrap(), options).await;
    publish(&bus, "t", 0..3).await;
    let mut streams = [server.follow("/t/events?start=earliest", None).await, server.follow("/other/events", None).await];
    for stream in &mut streams {
        stream.opened().await;
    }
    server.stop().await;
    assert_eq!(streams[0].kinds(3).await, numbers(0..3));
    assert_eq!((streams[0].next().await, streams[1].next().await), (None, None));
}

/// A client that is cut off behind any block, and comes back with what it has then, is told of the same gap.
#[tokio::test]
async fn a_gap_is_told_however_the_stream_that_tells_it_is_cut() {
    let bus = kept_in(InMemoryServerCache::builder().max_events(10).build().unwrap());
    let server = Server::start(http(&bus).build().unwrap()).await;
    // On a topic without events, on one that has some, and behind one of them.
    let on_nothing = server.follow(PATH, None).await.opened().await;
    publish(&bus, "t", 0..1).await;
    let with_first = server.follow("/t/events?start=earliest", None).await.opened().await;
    let mut first = server.follow("/t/events?start=earliest", None).await;
    first.kinds(1).await;
    publish(&bus, "t", 1..30).await;
    for (id, missed) in [(on_nothing, 20), (with_first, 20), (first.last.unwrap(), 19)] {
        let mut told = server.follow(PATH, Some(&id)).await;
        assert_eq!(told.last, None, "the place behind a gap comes with the gap");
        let gap = told.next().await.unwrap();
        assert_eq!((gap.name.as_str(), gap.json()), ("gap", json!({"reason": "trimmed", "missed": missed})), "{id}");
        let behind = told.last.unwrap();
        assert_eq!(server.follow(PATH, Some(&behind)).await.kinds(10).await, numbers(20..30), "what is told is told once");
    }
    // One that was told has not had its first event yet, and misses that.
    let mut begun = server.follow(PATH, Some("no place")).await;
    begun.next().await.unwrap();
    publish(&bus, "t", 30..33).await;
    let again = server.follow(PATH, begun.last.as_deref()).await.next().await.unwrap();
    assert_eq!(again.json(), json!({"reason": "trimmed", "missed": 3}));
}

#[tokio::test]
async fn clearing_is_told_to_whoever_waits() {
    let bus = kept();
    let server = Server::start(http(&bus).heartbeat(Duration::from_millis(50)).build().unwrap()).await;
    publish(&bus, "t", 0..3).await;
    let mut for_index = server.follow("/t/events?start=3", None).await;
    for_index.heartbeats(1).await;
    let mut busy = server.follow(PATH, None).await;
    busy.opened().await;
    bus.clear_topic("t").await.unwrap();
    assert_eq!(for_index.next().await.unwrap().name, "end");
    // What has no place does not hide it.
    let talking = bus.clone();
    let talk = tokio::spawn(async move {
        loop {
            talking.publish_with("t", &[Event::new("x").into()], PublishOptions::local_only()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let end = async { while busy.next().await.expect("it says how it ends").name != "end" {} };
    soon("an end", end).await;
    talk.abort();
}
