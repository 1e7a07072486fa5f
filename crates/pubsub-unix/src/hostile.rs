//! Peers that mean harm, or are broken, on real sockets: only they are harmed.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt;
use pubsub_core::{Bus, Event, Group, RetryPolicy, SubscribeOptions, Subscription};
use tokio::time::timeout;

use crate::frame::{Greeting, MAX_FRAME, encode};
use crate::protocol::{Begin, Query, ToBroker};
use crate::{UnixBuilder, UnixSocketPubSub};

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(10);

/// A bus, and a subscription by which it is seen to work.
struct Victim {
    _directory: tempfile::TempDir,
    path: PathBuf,
    bus: Bus,
    listener: Subscription,
}

impl Victim {
    async fn with(configure: impl FnOnce(UnixBuilder) -> UnixBuilder) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bus");
        let bus = Bus::from(configure(UnixSocketPubSub::builder(&path)).connect().await.unwrap());
        let listener = bus.subscribe("works").await.unwrap();
        Self { _directory: directory, path, bus, listener }
    }

    /// Holds it to carrying an event within a second.
    async fn works(&mut self) {
        let since = Instant::now();
        self.bus.publish("works", Event::new("x")).await.unwrap();
        timeout(PATIENCE, self.listener.next()).await.expect("it is delivered").unwrap().unwrap().done();
        assert!(since.elapsed() < SECOND, "{:?}", since.elapsed());
    }

    async fn end(mut self) {
        self.works().await;
        self.bus.close(SECOND).await.unwrap();
    }
}

fn connect(path: &Path) -> UnixStream {
    let peer = UnixStream::connect(path).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    peer.set_write_timeout(Some(PATIENCE)).unwrap();
    peer
}

/// A peer of ours whose greeting is over.
fn greeted(path: &Path) -> UnixStream {
    let mut peer = connect(path);
    peer.write_all(&Greeting::hello(fastrand::u64(..), 1)).unwrap();
    line(&mut peer);
    peer
}

fn line(peer: &mut UnixStream) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while byte != *b"\n" {
        peer.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn frames(frames: &[ToBroker]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frames.iter().for_each(|frame| encode(frame, &mut bytes).unwrap());
    bytes
}

/// Reads until the connection ends, which it must; returns how much came.
fn ends(peer: &mut UnixStream) -> usize {
    let (mut all, mut some) = (0, vec![0; 1 << 16]);
    loop {
        match peer.read(&mut some) {
            Ok(0) => return all,
            Ok(count) => all += count,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("it was left open: {error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_garbage_and_other_versions_end_only_their_own_connection() {
    let mut victim = Victim::with(|builder| builder).await;
    let garbage = [9, 0, 0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    for said in [&u32::MAX.to_le_bytes()[..], &[0; 64], &[1, 0, 0, 0, 1], &garbage, &[2, 0, 0, 0, 1, 99]] {
        let mut peer = greeted(&victim.path);
        let _ = peer.write_all(said); // it may be cut off before the last of it
        assert_eq!(ends(&mut peer), 0);
        victim.works().await;
    }
    let mut old = connect(&victim.path);
    old.write_all(b"{\"type\":\"hello\",\"v\":77,\"client\":1,\"session\":1}\n{\"type\":\"subscribe\",\"topic\":\"x\"}\n")
        .unwrap();
    assert!(line(&mut old).contains("\"v\":1"), "it is told which version is spoken");
    assert_eq!(ends(&mut old), 0);
    victim.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_garbage_are_passed_over() {
    let mut victim = Victim::with(|builder| builder).await;
    let mut peer = connect(&victim.path);
    let deep =
        format!("{{\"type\":\"publish\",\"topic\":\"works\",\"event\":{}1{}}}\n", "[".repeat(1 << 20), "]".repeat(1 << 20));
    for junk in [b"\n\r\n  \n{}\n[]\nnull\n\"\n\xff\xfe\n{\"type\":\"event\"}\n", deep.as_bytes()] {
        peer.write_all(junk).unwrap();
    }
    let hidden = format!(
        "{{\"type\":\"publish\",\"topic\":\"x\",\"event\":{{\"data\":{}\"\\u0041\"{}}}}}\n",
        "[".repeat(5000),
        "]".repeat(5000)
    );
    peer.write_all(hidden.as_bytes()).unwrap();
    peer.write_all(b"{\"type\":\"subscribe\",\"topic\":\"x\"}\n").unwrap();
    assert_eq!(line(&mut peer), "{\"type\":\"subscribed\",\"topic\":\"x\"}\n");
    victim.works().await;
    victim.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_without_an_end_is_cut_off_at_the_bound() {
    let mut victim = Victim::with(|builder| builder).await;
    let mut peer = connect(&victim.path);
    let flood = std::thread::spawn(move || {
        let chunk = vec![b'x'; 1 << 20];
        let written = (0..2 * MAX_FRAME / chunk.len()).take_while(|_| peer.write_all(&chunk).is_ok()).count();
        written * chunk.len()
    });
    while !flood.is_finished() {
        victim.works().await;
    }
    let written = flood.join().unwrap();
    assert!((MAX_FRAME..MAX_FRAME + (8 << 20)).contains(&written), "{written}");
    victim.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_stalls_half_way_or_says_nothing_keeps_nobody_waiting() {
    let mut victim = Victim::with(|builder| builder).await;
    let mut open = Vec::new();
    for half in [&b"{\"type\":\"hel"[..], b"{\"type\":\"publish\",\"topic\":\"works\",\"eve", b""] {
        for _ in 0..100 {
            let mut peer = connect(&victim.path);
            peer.write_all(half).unwrap();
            open.push(peer);
        }
    }
    for half in [&[200, 0, 0][..], &[200, 0, 0, 0, 1, 0]] {
        let mut peer = greeted(&victim.path);
        peer.write_all(half).unwrap();
        open.push(peer);
    }
    victim.works().await;
    // Half closed in either direction.
    for how in [Shutdown::Read, Shutdown::Write, Shutdown::Both] {
        let peer = greeted(&victim.path);
        peer.shutdown(how).unwrap();
        open.push(peer);
    }
    victim.works().await;
    drop(open);
    victim.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_much_and_reads_nothing_is_cut_off() {
    let mut victim = Victim::with(|builder| builder.max_peer_bytes(1 << 20)).await;
    for _ in 0..64 {
        victim.bus.publish_data("much", "x", "x".repeat(16 << 10)).await.unwrap();
    }
    let page = |id| ToBroker::Ask { id, query: Query::Page { topic: "much".into(), begin: Begin::Earliest, most: 1000 } };
    let mut peer = greeted(&victim.path);
    peer.write_all(&frames(&(0..200).map(page).collect::<Vec<_>>())).unwrap();
    victim.works().await;
    let came = ends(&mut peer);
    assert!(came < 8 << 20, "{came} of 200 answers of a MiB");
    victim.end().await;
}

/// What this process has in memory.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_by_one_that_does_not_read_its_echo_is_held_back() {
    let mut victim = Victim::with(|builder| builder.max_bytes(8 << 20)).await;
    let before = resident();
    let mut peer = connect(&victim.path);
    peer.write_all(b"{\"type\":\"subscribe\",\"topic\":\"flood\"}\n").unwrap();
    let (until, mut writing) = (Instant::now() + 3 * SECOND, peer.try_clone().unwrap());
    let flood = std::thread::spawn(move || {
        writing.set_write_timeout(Some(SECOND)).unwrap();
        let line = format!(
            "{{\"type\":\"publish\",\"topic\":\"flood\",\"event\":{{\"type\":\"x\",\"data\":\"{}\"}}}}\n",
            "x".repeat(4 << 10)
        );
        let chunk = line.repeat(64);
        let mut written = 0u64;
        while Instant::now() < until && writing.write_all(chunk.as_bytes()).is_ok() {
            written += chunk.len() as u64;
        }
        written
    });
    while !flood.is_finished() {
        victim.works().await;
    }
    let (written, grown) = (flood.join().unwrap(), resident().saturating_sub(before));
    eprintln!("{} MiB written, {} MiB more in memory", written >> 20, grown >> 20);
    assert!(grown < 128 << 20, "{} MiB more in memory after {} MiB", grown >> 20, written >> 20);
    drop(peer);
    victim.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_typescript_member_does_not_take_goes_to_another() {
    let mut victim = Victim::with(|builder| builder.hang_timeout(2 * SECOND)).await;
    let mut peer = connect(&victim.path);
    peer.write_all(b"{\"type\":\"subscribe\",\"topic\":\"t\",\"group\":\"g\"}\n").unwrap();
    line(&mut peer);
    // More than its socket takes, so that some of it stays unwritten.
    for number in 0..64 {
        victim.bus.publish("t", Event::new(number.to_string()).with_data("x".repeat(64 << 10))).await.unwrap();
    }
    let retry = RetryPolicy::new().max_attempts(0);
    let options = SubscribeOptions::group(Group::new("g").unwrap()).retry(retry);
    let mut member = victim.bus.subscribe_with("t", options).await.unwrap();
    let again = async {
        loop {
            let next = member.next().await.unwrap().unwrap();
            let attempt = next.attempt();
            next.done();
            if attempt > 1 {
                return;
            }
        }
    };
    timeout(PATIENCE, again).await.expect("what it held comes back one attempt higher");
    drop(peer);
    victim.works().await;
    victim.end().await;
}
