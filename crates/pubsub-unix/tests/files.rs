//! What lies at the path, and around it: what is taken over, and what is refused and left alone.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use futures::StreamExt;
use pubsub_core::{Bus, ErrorKind, Start, Status};
use pubsub_unix::UnixSocketPubSub;

const SECOND: Duration = Duration::from_secs(1);

async fn connect(path: &Path) -> Bus {
    Bus::from(UnixSocketPubSub::connect(path).await.unwrap())
}

async fn refused(path: &Path) -> ErrorKind {
    UnixSocketPubSub::connect(path).await.unwrap_err().kind().clone()
}

fn names_the_path(kind: &ErrorKind, why: &str) {
    assert!(
        matches!(kind, ErrorKind::InvalidOption { option, reason } if option == "path" && reason.contains(why)),
        "{kind:?}"
    );
}

#[tokio::test]
async fn a_path_that_cannot_be_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    names_the_path(&refused(&directory.path().join("x".repeat(120))).await, "98");
    names_the_path(&refused(Path::new("/")).await, "no file name");
    let open = directory.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    names_the_path(&refused(&open.join("bus")).await, "sticky bit");
    assert_eq!(fs::read_dir(&open).unwrap().count(), 0, "nothing was made there");
}

#[tokio::test]
async fn what_was_left_behind_is_taken_over_and_what_is_somebodys_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    drop(UnixListener::bind(path("stale")).unwrap());
    fs::write(path("empty"), "").unwrap();
    fs::write(path("locked"), "").unwrap();
    fs::write(path("locked.lock"), "left behind").unwrap();
    for name in ["stale", "empty", "locked"] {
        let bus = connect(&path(name)).await;
        bus.publish_data("t", "x", 1).await.unwrap();
        bus.close(SECOND).await.unwrap();
    }
    fs::write(path("book"), "chapter one").unwrap();
    let kind = refused(&path("book")).await;
    assert!(matches!(&kind, ErrorKind::Backend(why) if why.contains("something else")), "{kind:?}");
    assert_eq!(fs::read_to_string(path("book")).unwrap(), "chapter one");
}

#[tokio::test]
async fn files_are_for_their_owner_and_a_close_leaves_none_that_listens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made/bus");
    let bus = connect(&path).await;
    bus.publish_data("t", "x", 1).await.unwrap();
    let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    for entry in fs::read_dir(path.parent().unwrap()).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
    bus.close(SECOND).await.unwrap();
    assert!(!path.exists() && UnixStream::connect(&path).is_err());
    let left = fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut left: Vec<_> = left.collect();
    left.sort();
    assert_eq!(left, ["bus.epoch", "bus.lock", "bus.log.1"], "what the next broker goes on from");
}

#[tokio::test]
async fn the_history_outlives_all_processes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bus");
    let bus = connect(&path).await;
    let position = bus.publish_data("t", "x", 1).await.unwrap().get(0).unwrap().clone();
    bus.publish_data("t", "x", 2).await.unwrap();
    bus.close(SECOND).await.unwrap();
    let bus = connect(&path).await;
    let mut rest = bus.subscribe_after("t", position).await.unwrap();
    assert_eq!(*rest.next().await.unwrap().unwrap().data::<u32>().unwrap(), 2);
    assert_eq!(bus.history("t", Start::Earliest, 10).await.unwrap().entries.len(), 2);
    bus.close(SECOND).await.unwrap();
}

#[tokio::test]
async fn a_socket_that_a_stranger_removes_is_there_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bus");
    let bus = connect(&path).await;
    fs::remove_file(&path).unwrap();
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let other = connect(&path).await;
    let mut listener = other.subscribe("t").await.unwrap();
    bus.publish_data("t", "x", 1).await.unwrap();
    assert!(listener.next().await.unwrap().is_ok());
    bus.close(SECOND).await.unwrap();
    other.close(SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_of_another_kind_keeps_its_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bus");
    let listener = UnixListener::bind(&path).unwrap();
    let serving = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut said = [0; 512];
        let mut seen = String::new();
        while !seen.contains("subscribe") {
            let count = peer.read(&mut said).unwrap();
            seen.push_str(std::str::from_utf8(&said[..count]).unwrap());
        }
        peer.write_all(b"{\"type\":\"subscribed\",\"topic\":\"pubsub.probe\"}\n").unwrap();
        listener // it goes on listening
    });
    let inode = fs::metadata(&path).unwrap().ino();
    let bus = Bus::from(UnixSocketPubSub::builder(&path).native_only(true).connect().await.unwrap());
    assert!(bus.status().wait_for(|status| matches!(status, Status::Failed(_))).await);
    let listener = serving.join().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    drop(listener);
    // It has gone: now the name is taken over.
    bus.publish_data("t", "x", 1).await.unwrap();
    assert_ne!(fs::metadata(&path).unwrap().ino(), inode);
    bus.close(SECOND).await.unwrap();
}
