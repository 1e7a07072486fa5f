//! A disk that is full: the broker is a process whose files may not grow beyond a bound, which the kernel tells it in the middle of a
//! write. Publishers get an error, nothing is confirmed that is not in the file, and it goes on once there is room.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures::StreamExt;
use pubsub_core::{Bus, ErrorKind, Event, Fate, PublishOptions, Settled, Start};
use pubsub_unix::UnixSocketPubSub;
use tokio::time::timeout;

const CHILD: &str = "PUBSUB_UNIX_FULL_DISK";
const PATIENCE: Duration = Duration::from_secs(20);

/// Is the broker until it is killed.
#[test]
#[ignore = "is a process that the other test starts"]
fn child() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let _bus = UnixSocketPubSub::connect(path).await.unwrap();
        std::future::pending::<()>().await;
    });
}

struct Broker(Child);

impl Broker {
    /// Starts it; none of its files may have more than 512 times so many bytes.
    fn start(path: &Path, blocks: u32) -> Self {
        let mut command = Command::new("sh");
        // The signal that would end it is ignored, as the error is to be seen.
        command.args(["-c", r#"trap "" XFSZ; ulimit -S -f "$0"; exec "$@""#, &blocks.to_string()]);
        command.arg(std::env::current_exe().unwrap()).args(["--exact", "child", "--ignored", "--nocapture"]);
        command.env(CHILD, path).stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }

    /// Makes room.
    fn relieve(&self) {
        let pid = self.0.id().to_string();
        let status = Command::new("prlimit").args(["--pid", &pid, "--fsize=unlimited:"]).status().expect("util-linux has it");
        assert!(status.success());
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn publishers_are_told_and_nothing_is_confirmed_that_is_not_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bus");
    let mut broker = Broker::start(&path, 512);
    let is_there = async {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, is_there).await.unwrap();
    let bus = Bus::from(UnixSocketPubSub::connect(&path).await.unwrap());
    let mut member = bus.subscribe_group("t", "g").await.unwrap();
    let publish = async |number: usize| {
        let event = Event::new(number.to_string()).with_data("x".repeat(10 << 10));
        bus.publish_with("t", &[event.into()], PublishOptions::new()).await
    };
    let (mut confirmed, mut number) = (Vec::new(), 0);
    let refused = loop {
        match publish(number).await {
            Ok(_) => confirmed.push(number.to_string()),
            Err(refused) => break refused,
        }
        number += 1;
        assert!(number < 1000, "it is never full");
    };
    assert!(matches!(refused.error().kind(), ErrorKind::Unavailable), "{refused:?}");
    assert_eq!(refused.fates(), [Fate::NotSent]);
    assert!(confirmed.len() > 10, "{}", confirmed.len());
    // What is full stays full, and tells so each time.
    number += 1;
    assert!(publish(number).await.is_err());
    // A settlement cannot fail: it is said again until it can be written. A delivery that could not be written is not handed over.
    let room = Broker::relieve;
    let held = timeout(Duration::from_millis(500), member.next()).await;
    room(&broker);
    let held = match held {
        Ok(held) => held,
        Err(_) => timeout(PATIENCE, member.next()).await.expect("it is handed over once there is room"),
    };
    let receipt = held.unwrap().unwrap().done();
    assert_eq!(timeout(PATIENCE, receipt).await.expect("it is written once there is room"), Settled::Done);
    for _ in 0..10 {
        number += 1;
        publish(number).await.unwrap();
        confirmed.push(number.to_string());
    }
    broker.kill();
    // Another reads what was kept: all that was confirmed, and nothing else.
    let page = timeout(PATIENCE, bus.history("t", Start::Earliest, 1000)).await.unwrap().unwrap();
    let kept: Vec<_> = page.entries.iter().map(|(_, event)| event.event_type().to_owned()).collect();
    assert_eq!(kept, confirmed);
    assert!(fs::read_dir(directory.path()).unwrap().count() > 0);
    bus.close(Duration::from_secs(1)).await.unwrap();
}
