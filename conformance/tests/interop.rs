//! With real processes of Mastra on the bus, in both roles: `cargo xtask interop`.

use std::collections::BTreeSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use libtest_mimic::{Arguments, Failed, Trial};
use pubsub_conformance::harnesses::mastra::{Peer, package};
use pubsub_core::{Bus, Capability, Event, Payload, PublishOptions, RetryPolicy, Start, SubscribeOptions, Subscription};
use pubsub_unix::UnixSocketPubSub;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);

/// Names a socket, and by what name to answer there: this process then does only that.
const ANSWERS: &str = "PUBSUB_INTEROP_ANSWERS";

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    if let Ok(job) = std::env::var(ANSWERS) {
        return answer(&job);
    }
    let arguments = Arguments::from_args();
    let package = package();
    let required = std::env::var("PUBSUB_REQUIRE").unwrap_or_default();
    if let Err(why) = &package
        && required.split(',').any(|name| name.trim() == "node")
    {
        eprintln!("node is required, and this {why}");
        return ExitCode::FAILURE;
    }
    let why = package.as_ref().err().map(|why| format!(" ({why})")).unwrap_or_default();
    let mut trials = Vec::new();
    macro_rules! trials {
        ($($test:ident)*) => {$(
            let place = package.clone().unwrap_or_default();
            let name = format!("mastra::{}{why}", stringify!($test));
            trials.push(Trial::test(name, move || run($test, place)).with_ignored_flag(package.is_err()));
        )*};
    }
    trials! {
        every_envelope_from_mastra_to_our_broker
        every_envelope_from_us_to_mastra
        a_group_on_our_broker_shares_its_work_among_both
        what_a_member_gives_back_goes_to_the_other_tongue_as_its_next_attempt
        a_group_on_our_broker_outlives_its_mastra_members
        mastra_leaves_when_it_unsubscribes
        every_envelope_under_a_mastra_broker
        a_worker_of_ours_on_a_mastra_bus
        what_only_a_broker_of_ours_can_is_refused_and_comes_with_one
        a_broker_that_closes_is_followed_by_the_other_kind
        elections_while_brokers_of_both_kinds_are_killed
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn run<F: Future<Output = Outcome>>(test: fn(Bench) -> F, package: PathBuf) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let directory = Directory::new()?;
    let bench = Bench { package, socket: directory.0.join("bus") };
    let outcome = runtime.block_on(async { timeout(8 * PATIENCE, test(bench)).await });
    runtime.shutdown_timeout(SECOND);
    outcome.map_err(Failed::from)?.map_err(|error| Failed::from(error.to_string()))
}

/// Removed with what is in it.
struct Directory(PathBuf);

impl Directory {
    fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("pubsub-interop-{:x}", fastrand::u32(..)));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Bench {
    package: PathBuf,
    socket: PathBuf,
}

impl Bench {
    async fn mastra(&self) -> std::io::Result<Peer> {
        Peer::start(&self.package, &self.socket).await
    }

    async fn ours(&self) -> pubsub_core::Result<Bus> {
        UnixSocketPubSub::connect(&self.socket).await.map(Bus::from)
    }

    async fn with_envelopes(&self) -> pubsub_core::Result<Bus> {
        UnixSocketPubSub::builder(&self.socket).envelopes(true).connect().await.map(Bus::from)
    }
}

async fn next(subscription: &mut Subscription) -> Result<pubsub_core::Delivery, Box<dyn std::error::Error>> {
    Ok(timeout(PATIENCE, subscription.next()).await?.ok_or("the subscription ended")??)
}

/// The next event, done with.
async fn read(subscription: &mut Subscription) -> Result<Arc<Event>, Box<dyn std::error::Error>> {
    let delivery = next(subscription).await?;
    let event = delivery.event().clone();
    delivery.done();
    Ok(event)
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(what().into()) }
}

fn same(found: &Value, expected: &Value) -> Outcome {
    ensure(found == expected, || format!("found    {found}\nexpected {expected}"))
}

/// One of everything, as the peer program describes it.
fn everything() -> Value {
    json!({"Object": {
        "date": {"Date": "2026-01-02T03:04:05.006Z"},
        "undefined": {"Undefined": null},
        "list": [{"Undefined": null}, {"Date": "1970-01-01T00:00:00.000Z"}, null],
        "big": {"BigInt": "-123456789012345678901234567890"},
        "url": {"URL": "https://example.org/a?b=c"},
        "pattern": {"RegExp": ["a+\"\\s", "gi"]},
        "map": {"Map": [["a", 1], ["b", {"Set": [1, {"Map": []}]}]]},
        "keyed": {"Map": [[{"Object": {"k": 1}}, "object"], [null, "null"]]},
        "set": {"Set": ["x", {"Date": "2026-01-02T03:04:05.006Z"}]},
        "error": {"Error": {"name": "TypeError", "message": "no", "fields": {"code": 7},
            "cause": {"Error": {"name": "Error", "message": "why", "fields": {}, "cause": {"Undefined": null}, "stack": true}},
            "stack": true}},
        "alike": {"Object": {"__m_codec__": "Unknown", "v": 1}},
        "text": "ü🦀\u{2028}", "number": 1.5, "true": true, "null": null,
    }})
}

/// The same, but for stacks, as it is read in plain JSON.
fn plainly(data: &Value) -> Outcome {
    let mut data = data.clone();
    for pointer in ["/error", "/error/cause"] {
        let error = data.pointer_mut(pointer).and_then(Value::as_object_mut).ok_or("no error")?;
        ensure(error.remove("stack").is_some_and(|stack| stack.is_string()), || format!("no stack in {pointer}"))?;
    }
    let mut expected = json!({
        "date": "2026-01-02T03:04:05.006Z", "list": [null, "1970-01-01T00:00:00.000Z", null],
        "url": "https://example.org/a?b=c", "pattern": {"source": "a+\"\\s", "flags": "gi"},
        "map": {"a": 1, "b": [1, {}]}, "keyed": [[{"k": 1}, "object"], [null, "null"]],
        "set": ["x", "2026-01-02T03:04:05.006Z"],
        "error": {"name": "TypeError", "message": "no", "code": 7, "cause": {"name": "Error", "message": "why"}},
        "alike": {"__m_codec__": "Unknown", "v": 1}, "text": "ü🦀\u{2028}", "number": 1.5, "true": true, "null": null,
    });
    expected["big"] = serde_json::from_str("-123456789012345678901234567890")?;
    same(&data, &expected)
}

/// A description without what depends on where an error was built.
async fn described(peer: &mut Peer) -> Result<Value, Box<dyn std::error::Error>> {
    let event = timeout(PATIENCE, peer.event()).await??;
    ensure(event["dated"] == true, || format!("createdAt is no Date in {event}"))?;
    Ok(event)
}

async fn every_envelope_from_mastra_to_our_broker(bench: Bench) -> Outcome {
    let (plain, tagged) = (bench.ours().await?, bench.with_envelopes().await?);
    let mut plainly_read = plain.subscribe("t").await?;
    let mut as_written = tagged.subscribe("t").await?;
    let (mut publisher, mut listener) = (bench.mastra().await?, bench.mastra().await?);
    listener.act("subscribe", json!({"topic": "t"})).await?;
    let extra = json!({"Object": {"traced": {"Date": "2026-01-02T03:04:05.006Z"}}});
    let publish = json!({"topic": "t", "type": "all", "runId": "run", "data": everything(), "extra": extra});
    publisher.act("publish", publish).await?;
    let heard = described(&mut listener).await?;
    same(&heard["data"], &everything())?;
    same(&heard["rest"]["Object"]["traced"], &json!({"Date": "2026-01-02T03:04:05.006Z"}))?;
    let event = read(&mut plainly_read).await?;
    ensure((event.event_type(), event.run_id()) == ("all", "run"), || format!("{event:?}"))?;
    same(&json!(event.id().to_string()), &heard["id"])?;
    plainly(&*event.data::<Value>()?)?;
    let written = read(&mut as_written).await?;
    let written = written.data::<Value>()?;
    same(&written["date"], &json!({"__m_codec__": "Date", "v": "2026-01-02T03:04:05.006Z"}))?;
    // What was read with its envelopes is published with them: it comes back to Mastra as it was.
    tagged.publish("t", Event::new("back").with_payload(Payload::json_of(&*written)?)).await?;
    same(&described(&mut listener).await?["data"], &everything())?;
    plainly(&*read(&mut plainly_read).await?.data::<Value>()?)
}

async fn every_envelope_from_us_to_mastra(bench: Bench) -> Outcome {
    let (plain, tagged) = (bench.ours().await?, bench.with_envelopes().await?);
    let mut listener = bench.mastra().await?;
    listener.act("subscribe", json!({"topic": "t"})).await?;
    let of = |tag: &str, v: Value| json!({"__m_codec__": tag, "v": v});
    let class = json!({"__m_codec__": "Class", "n": "DefaultGeneratedFile", "v": {"data": "aGk=", "mediaType": "text/plain"}});
    let data = json!([of("Date", json!("2026-01-02T03:04:05.006Z")), of("BigInt", json!("7")), of("Set", json!([])), class]);
    tagged.publish_data("t", "tagged", data.clone()).await?;
    let heard = described(&mut listener).await?;
    let list = heard["data"].as_array().ok_or("no list")?;
    same(&json!(list[..3]), &json!([{"Date": "2026-01-02T03:04:05.006Z"}, {"BigInt": "7"}, {"Set": []}]))?;
    same(&list[3]["Class"][0], &json!("DefaultGeneratedFile"))?;
    // The same data is plain to whoever says so.
    let mut readers = [tagged.subscribe("t").await?, plain.subscribe("t").await?];
    plain.publish_data("t", "plain", data.clone()).await?;
    let heard = described(&mut listener).await?;
    same(&heard["data"][0], &json!({"Object": {"__m_codec__": "Date", "v": "2026-01-02T03:04:05.006Z"}}))?;
    same(&heard["data"][3]["Object"]["__m_codec__"], &json!("Class"))?;
    let [as_written, plainly_read] = &mut readers;
    same(&*read(plainly_read).await?.data::<Value>()?, &data)?;
    // With envelopes it is told from one.
    let written = read(as_written).await?;
    same(&written.data::<Value>()?[0]["__m_codec__"]["v"], &json!("Date"))
}

async fn a_group_on_our_broker_shares_its_work_among_both(bench: Bench) -> Outcome {
    let bus = bench.ours().await?;
    let mut member = bus.subscribe_group("t", "g").await?;
    let (mut first, mut second) = (bench.mastra().await?, bench.mastra().await?);
    for peer in [&mut first, &mut second] {
        peer.act("subscribe", json!({"topic": "t", "group": "g"})).await?;
    }
    // Not at once: then whoever is fastest would have it all.
    let publisher = bench.ours().await?;
    let mut seen = BTreeSet::new();
    let mut shares = [0, 0, 0];
    for number in 0..60 {
        publisher.publish("t", Event::new(number.to_string())).await?;
        let kind = tokio::select! {
            ours = member.next() => {
                let ours = ours.ok_or("ended")??;
                shares[0] += 1;
                let kind = ours.event().event_type().to_owned();
                ours.done();
                kind
            }
            event = first.event() => { shares[1] += 1; event?["event"].as_str().unwrap_or_default().to_owned() }
            event = second.event() => { shares[2] += 1; event?["event"].as_str().unwrap_or_default().to_owned() }
            () = sleep(PATIENCE) => return Err("nobody got it".into()),
        };
        ensure(seen.insert(kind.clone()), || format!("{kind} came twice"))?;
    }
    ensure(shares.iter().all(|share| *share > 5), || format!("unfair: {shares:?}"))
}

async fn what_a_member_gives_back_goes_to_the_other_tongue_as_its_next_attempt(bench: Bench) -> Outcome {
    let bus = bench.ours().await?;
    let retry = RetryPolicy::new().backoff(Duration::ZERO, Duration::ZERO);
    let mut member = bus.subscribe_with("t", SubscribeOptions::group("g".try_into()?).retry(retry)).await?;
    bus.publish_data("t", "x", 1).await?;
    let held = next(&mut member).await?;
    let mut peer = bench.mastra().await?;
    peer.act("subscribe", json!({"topic": "t", "group": "g", "nacks": 3})).await?;
    held.retry();
    drop(member); // so that it is Mastra's turn
    let heard = described(&mut peer).await?;
    ensure(heard["attempt"] == 2, || format!("{heard}"))?;
    // Nacks are the process's own affair: it has the same event again, counted on.
    let again = described(&mut peer).await?;
    ensure(again["attempt"] == 3 && again["id"] == heard["id"], || format!("{again}"))?;
    let last = described(&mut peer).await?;
    ensure(last["attempt"] == 4, || format!("{last}"))
}

async fn a_group_on_our_broker_outlives_its_mastra_members(bench: Bench) -> Outcome {
    let bus = bench.ours().await?;
    let mut peer = bench.mastra().await?;
    peer.act("subscribe", json!({"topic": "t", "group": "g"})).await?;
    peer.kill().await?;
    for number in 0..10 {
        bus.publish("t", Event::new(number.to_string())).await?;
    }
    let mut peer = bench.mastra().await?;
    peer.act("subscribe", json!({"topic": "t", "group": "g"})).await?;
    for number in 0..10 {
        let heard = described(&mut peer).await?;
        same(&heard["event"], &json!(number.to_string()))?;
    }
    Ok(())
}

async fn mastra_leaves_when_it_unsubscribes(bench: Bench) -> Outcome {
    let bus = bench.ours().await?;
    let mut peer = bench.mastra().await?;
    for group in [None, Some("g")] {
        let mut membership = json!({"topic": "t"});
        if let Some(group) = group {
            membership["group"] = group.into();
        }
        peer.act("subscribe", membership.clone()).await?;
        bus.publish("t", Event::new("heard")).await?;
        same(&described(&mut peer).await?["event"], &json!("heard"))?;
        let since = Instant::now();
        peer.act("unsubscribe", membership).await?;
        ensure(since.elapsed() < 3 * SECOND, || "it was left to wait for an answer".into())?;
        bus.publish("t", Event::new("unheard")).await?;
    }
    peer.act("subscribe", json!({"topic": "fence"})).await?;
    bus.publish("fence", Event::new("fence")).await?;
    same(&described(&mut peer).await?["event"], &json!("fence"))
}

/// A broker of Mastra.
async fn mastra_broker(bench: &Bench) -> Result<Peer, Box<dyn std::error::Error>> {
    let mut broker = bench.mastra().await?;
    broker.act("subscribe", json!({"topic": "own"})).await?;
    ensure(broker.is_broker(), || "it is no broker".into())?;
    Ok(broker)
}

async fn every_envelope_under_a_mastra_broker(bench: Bench) -> Outcome {
    let mut broker = mastra_broker(&bench).await?;
    broker.act("subscribe", json!({"topic": "t"})).await?;
    let (plain, tagged) = (bench.ours().await?, bench.with_envelopes().await?);
    let mut plainly_read = plain.subscribe("t").await?;
    let mut as_written = tagged.subscribe("t").await?;
    broker.act("publish", json!({"topic": "t", "type": "all", "data": everything()})).await?;
    same(&described(&mut broker).await?["data"], &everything())?;
    plainly(&*read(&mut plainly_read).await?.data::<Value>()?)?;
    let written = read(&mut as_written).await?;
    let written = Payload::json_of(&*written.data::<Value>()?)?;
    tagged.publish("t", Event::new("back").with_payload(written)).await?;
    same(&described(&mut broker).await?["data"], &everything())?;
    plainly(&*read(&mut plainly_read).await?.data::<Value>()?)?;
    let alike = json!({"__m_codec__": "Date", "v": "2026-01-02T03:04:05.006Z"});
    plain.publish_data("t", "plain", alike.clone()).await?;
    same(&described(&mut broker).await?["data"], &json!({"Object": alike}))
}

async fn a_worker_of_ours_on_a_mastra_bus(bench: Bench) -> Outcome {
    let mut broker = mastra_broker(&bench).await?;
    let bus = bench.ours().await?;
    let options = SubscribeOptions::group("g".try_into()?).dead_letter("dead".try_into()?);
    let retry = RetryPolicy::new().max_attempts(3).backoff(Duration::from_millis(1), Duration::from_millis(1));
    let mut member = bus.subscribe_with("work", options.retry(retry)).await?;
    let mut listener = bus.subscribe("work").await?;
    broker.act("subscribe", json!({"topic": "dead"})).await?;
    broker.act("subscribe", json!({"topic": "results"})).await?;
    broker.act("publish", json!({"topic": "work", "type": "job", "data": {"Object": {"n": 1}}})).await?;
    for attempt in 1..=3 {
        let delivery = next(&mut member).await?;
        ensure(delivery.attempt() == attempt, || format!("attempt {}", delivery.attempt()))?;
        delivery.retry();
    }
    let letter = described(&mut broker).await?;
    ensure(letter["topic"] == "dead" && letter["data"] == json!({"Object": {"n": 1}}), || format!("{letter}"))?;
    ensure(read(&mut listener).await?.event_type() == "job", || "fan-out has another".into())?;
    // Five hundred jobs, and a result for each.
    broker.act("publish", json!({"topic": "work", "type": "job", "data": null, "count": 500})).await?;
    for _ in 0..500 {
        let delivery = next(&mut member).await?;
        bus.publish("results", Event::new(delivery.event().event_type())).await?;
        delivery.done();
    }
    let mut results = BTreeSet::new();
    for _ in 0..500 {
        let result = described(&mut broker).await?;
        results.insert(result["event"].to_string());
    }
    ensure(results.len() == 500, || format!("{} results", results.len()))
}

async fn what_only_a_broker_of_ours_can_is_refused_and_comes_with_one(bench: Bench) -> Outcome {
    let broker = mastra_broker(&bench).await?;
    let bus = bench.ours().await?;
    let only_ours = [Capability::History, Capability::DurableGroups, Capability::SurvivesProcessDeath, Capability::Leases];
    for capability in only_ours {
        ensure(!bus.capabilities().supports(capability), || format!("it claims {capability}"))?;
    }
    ensure(bus.history("t", Start::Earliest, 1).await.is_err(), || "history".into())?;
    let mut listener = bus.subscribe("t").await?;
    bus.publish_data("t", "x", 1).await?;
    read(&mut listener).await?;
    broker.kill().await?;
    let native = async {
        while !only_ours.iter().all(|capability| bus.capabilities().supports(*capability)) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, native).await?;
    bus.publish_data("t", "x", 2).await?;
    let found = *read(&mut listener).await?.data::<u32>()?;
    ensure(found == 2, || format!("{found}"))?;
    ensure(bus.history("t", Start::Earliest, 9).await?.entries.len() == 1, || "only what it kept".into())
}

async fn a_broker_that_closes_is_followed_by_the_other_kind(bench: Bench) -> Outcome {
    let ours = bench.ours().await?;
    let mut peer = bench.mastra().await?;
    peer.act("subscribe", json!({"topic": "t"})).await?;
    ensure(!peer.is_broker(), || "two brokers".into())?;
    ours.close(SECOND).await?;
    let becomes = async {
        loop {
            // Each waits for the connection, so that this shows who is the broker now.
            if peer.act("publish", json!({"topic": "other", "type": "x", "data": null})).await.is_ok() && peer.is_broker() {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, becomes).await?;
    let ours = bench.ours().await?;
    let mut listener = ours.subscribe("t").await?;
    peer.act("publish", json!({"topic": "t", "type": "x", "data": 1})).await?;
    ensure(*read(&mut listener).await?.data::<u32>()? == 1, || "another".into())?;
    peer.act("close", json!({})).await?;
    // It is followed by ours, which then serves another of them.
    let event = [Arc::new(Event::new("y"))];
    let served = async { while ours.publish_with("t", &event, PublishOptions::new()).await.is_err() {} };
    timeout(PATIENCE, served).await?;
    read(&mut listener).await?;
    let mut other = bench.mastra().await?;
    other.act("subscribe", json!({"topic": "t"})).await?;
    ensure(!other.is_broker(), || "two brokers".into())?;
    ours.publish_data("t", "z", 3).await?;
    same(&described(&mut other).await?["data"], &json!(3))
}

/// Answers whatever comes in `ping` with its name in `pong`, until it is killed.
fn answer(job: &str) -> ExitCode {
    let Some((socket, name)) = job.split_once('|') else { return ExitCode::FAILURE };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    let answering: Result<(), pubsub_core::Error> = runtime.block_on(async {
        let bus = Bus::from(UnixSocketPubSub::connect(socket).await?);
        let mut pings = bus.subscribe("ping").await?;
        while let Some(ping) = pings.next().await {
            ping?.done();
            let _ = bus.publish("pong", Event::new(name)).await; // there may be no broker: it will be asked again
        }
        Ok(())
    });
    eprintln!("{name}: {answering:?}");
    ExitCode::FAILURE
}

enum One {
    Ours(Ours),
    Mastra(Box<Peer>),
}

impl One {
    async fn start(bench: &Bench, name: &str) -> Result<Self, Box<dyn std::error::Error>> {
        if name.starts_with("ours") {
            let mut command = Command::new(std::env::current_exe()?);
            command.env(ANSWERS, format!("{}|{name}", bench.socket.display())).stdin(Stdio::null());
            return Ok(Self::Ours(Ours(command.spawn()?)));
        }
        let mut peer = bench.mastra().await?;
        peer.begin("answer", json!({"type": name})).await?; // it may have to wait for an election
        Ok(Self::Mastra(Box::new(peer)))
    }

    fn id(&self) -> Option<u32> {
        match self {
            Self::Ours(child) => Some(child.0.id()),
            Self::Mastra(peer) => peer.id(),
        }
    }

    async fn kill(self) -> Outcome {
        match self {
            Self::Ours(child) => drop(child),
            Self::Mastra(peer) => peer.kill().await?,
        }
        Ok(())
    }
}

/// Another process of this program. Killed when dropped.
struct Ours(std::process::Child);

impl Drop for Ours {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process that listens on a socket.
async fn listener(socket: &Path) -> Option<u32> {
    let stream = tokio::net::UnixStream::connect(socket).await.ok()?;
    u32::try_from(stream.peer_cred().ok()?.pid()?).ok()
}

async fn elections_while_brokers_of_both_kinds_are_killed(bench: Bench) -> Outcome {
    let names = ["ours-1", "mastra-1", "ours-2", "mastra-2"];
    let mut all = Vec::new();
    for name in names {
        all.push((name, One::start(&bench, name).await?));
    }
    let mut killed = [0, 0];
    for round in 0..12 {
        // All of them hear each other, through whoever is the broker now.
        let bus = bench.ours().await?;
        let mut pongs = bus.subscribe("pong").await?;
        let mut missing: BTreeSet<&str> = names.into();
        let since = Instant::now();
        while !missing.is_empty() {
            ensure(since.elapsed() < PATIENCE, || format!("round {round}: {missing:?} are not there"))?;
            for (name, one) in &mut all {
                // Once in some hundred elections one of Mastra's waits for itself for good, and gives up.
                if let One::Mastra(peer) = one
                    && peer.has_ended()?
                {
                    *one = One::start(&bench, name).await?;
                }
            }
            let _ = bus.publish("ping", Event::new("ping")).await; // the broker may be changing
            let until = Instant::now() + Duration::from_millis(100);
            while let Ok(Some(Ok(pong))) = timeout(until.saturating_duration_since(Instant::now()), pongs.next()).await {
                missing.remove(pong.event().event_type());
                pong.done();
            }
        }
        bus.close(SECOND).await?;
        // The broker dies, and in every third round somebody else with it.
        let broker = listener(&bench.socket).await;
        let mut victims: Vec<usize> =
            all.iter().position(|(_, one)| one.id().is_some() && one.id() == broker).into_iter().collect();
        if round % 3 == 2 || victims.is_empty() {
            victims.push(fastrand::usize(..all.len()));
        }
        victims.sort_unstable();
        victims.dedup();
        for victim in victims.into_iter().rev() {
            let (name, one) = all.swap_remove(victim);
            killed[usize::from(name.starts_with("mastra"))] += 1;
            one.kill().await?;
            all.push((name, One::start(&bench, name).await?));
        }
    }
    for (_, one) in all {
        one.kill().await?;
    }
    eprintln!("killed {} of ours and {} of Mastra's", killed[0], killed[1]);
    Ok(())
}
