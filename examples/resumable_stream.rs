//! A text is streamed token by token. One client loses its connection ten times and picks up where it was; another joins when all is
//! over. Both end with the exact text.
//!
//! `cargo run --example resumable_stream [URL]`; the URL's bus must keep a history, as `memory:?replay=memory` does.

use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::Duration;

use futures::TryStreamExt;
use pubsub_core::{Bus, Capability, Cursor, ErrorKind, Event, EventId, Result, Subscription, Topic};

const TEXT: &str = "A stream that outlives its connections is one whose events have places. The producer numbers them as it goes, \
a store keeps them for a while, and whoever was cut off says where it was. What it missed comes first, then what is new, and the \
seam does not show: nothing twice, nothing left out, in order. So a browser may reload, a train may enter a tunnel, a phone may \
sleep, and the answer that was being written is still there, to the last full stop.";

/// How often the client's connection is dropped.
const CUTS: usize = 10;

#[tokio::main]
async fn main() -> ExitCode {
    let url = std::env::args().nth(1).unwrap_or("memory:?replay=memory".into());
    match stream(&url).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("resumable_stream: {error:#}");
            if matches!(error.kind(), ErrorKind::Unsupported(_)) {
                eprintln!("It needs a bus that keeps a history, such as memory:?replay=memory");
            }
            ExitCode::FAILURE
        }
    }
}

async fn stream(url: &str) -> Result<bool> {
    let bus = pubsub_connect::connect(url).await?;
    bus.require([Capability::History])?;
    let topic = Topic::new(format!("agent.stream.{}", EventId::random()))?;
    let producer = tokio::spawn(produce(bus.clone(), topic.clone()));
    let resumed = follow(&bus, &topic).await?;
    producer.await.expect("the producer does not panic")?;
    let late = read_all(&bus, &topic).await?;

    let exact = |text: &str| if text == TEXT { "exact" } else { "DIFFERS" };
    let tokens = tokens().count();
    println!("\n\nstreamed:            {tokens} tokens, {} characters", TEXT.chars().count());
    println!("connection dropped:  {CUTS} times, resumed {} times", resumed.resumed);
    println!("text of the resumed: {}, {} tokens, {} repeated", exact(&resumed.text), resumed.tokens, resumed.repeated);
    println!("text of the late:    {}, {} tokens", exact(&late.text), late.tokens);
    bus.clear_topic(&topic).await?;
    bus.close(Duration::from_secs(5)).await?;
    Ok([&resumed, &late].iter().all(|client| client.text == TEXT && client.tokens == tokens && client.repeated == 0))
}

/// The tokens of the text: words with the space behind them.
fn tokens() -> impl Iterator<Item = &'static str> {
    TEXT.split_inclusive(' ')
}

async fn produce(bus: Bus, topic: Topic) -> Result<()> {
    for token in tokens() {
        bus.publish(topic.clone(), Event::new("chunk").with_run_id(topic.as_str()).with_data(token.to_owned())).await?;
        tokio::time::sleep(Duration::from_millis(10)).await; // as a model thinks
    }
    let finish = Event::new("finish").with_run_id(topic.as_str());
    bus.publish(topic, finish).await?;
    Ok(())
}

#[derive(Default)]
struct Client {
    text: String,
    tokens: usize,
    repeated: usize,
    resumed: usize,
    /// The last event seen: what a client that was cut off remembers.
    last: Option<Cursor>,
}

impl Client {
    /// Takes one event; true if it was the last.
    fn take(&mut self, event: &Event, cursor: Option<Cursor>) -> Result<bool> {
        self.repeated += usize::from(cursor.is_some() && cursor == self.last);
        self.last = cursor.or(self.last.take());
        if event.event_type() != "chunk" {
            return Ok(true);
        }
        self.tokens += 1;
        self.text += event.data::<String>()?.as_str();
        Ok(false)
    }
}

/// Connects where the client was: behind the last event it saw, or at the beginning.
async fn connect(bus: &Bus, topic: &Topic, last_seen: Option<Cursor>) -> Result<Subscription> {
    match last_seen {
        Some(cursor) => bus.subscribe_after(topic, cursor).await,
        None => bus.subscribe_with_replay(topic).await,
    }
}

/// Reads the stream over connections that are dropped again and again, each after a few tokens and a pause in which more go by.
async fn follow(bus: &Bus, topic: &Topic) -> Result<Client> {
    let mut client = Client::default();
    loop {
        let mut connection = connect(bus, topic, client.last.clone()).await?;
        let mut left = if client.resumed < CUTS { fastrand::usize(1..6) } else { usize::MAX };
        while let Some(delivery) = connection.try_next().await? {
            if client.take(delivery.event(), delivery.cursor())? {
                return Ok(client);
            }
            print!("{}", delivery.data::<String>()?.as_str());
            let _ = stdout().flush(); // the terminal may be gone; the proof is not
            left -= 1;
            if left == 0 {
                break;
            }
        }
        drop(connection);
        client.resumed += 1;
        print!("|");
        tokio::time::sleep(Duration::from_millis(fastrand::u64(1..50))).await;
    }
}

/// Reads a stream that has ended.
async fn read_all(bus: &Bus, topic: &Topic) -> Result<Client> {
    let mut client = Client::default();
    let mut connection = connect(bus, topic, None).await?;
    while let Some(delivery) = connection.try_next().await? {
        if client.take(delivery.event(), delivery.cursor())? {
            break;
        }
    }
    Ok(client)
}
