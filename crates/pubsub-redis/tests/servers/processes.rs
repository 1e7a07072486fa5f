//! Members in processes of their own, which are killed and paused while they handle, on a server that is killed and started again.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use pubsub_core::Bus;
use tokio::time::sleep;

use crate::server::Server;
use crate::storm::{Handled, Sent, judge_handled};
use crate::support::{PATIENCE, RECLAIM, STREAM, at, configured, connect, group, next, seed, until, written};

pub(crate) const JOB: &str = "PUBSUB_REDIS_MEMBER";

const MEMBERS: usize = 3;
const EVENTS: usize = 900;

/// What another process does: it is a member of the group `g`, says what it handles, and is ended from outside.
pub(crate) fn work(address: &str) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let bus = Bus::from(configured(at(address.parse().unwrap())).connect().await.unwrap());
        let mut member = bus.subscribe_with("t", group("g")).await.unwrap();
        loop {
            let delivery = next(&mut member).await;
            // In the middle of this it may be killed, or stand still.
            sleep(Duration::from_millis(fastrand::u64(0..8))).await;
            println!("{} {}", delivery.event().event_type(), delivery.attempt());
            std::io::stdout().flush().unwrap();
            drop(delivery.done());
        }
    })
}

struct Member(Child);

impl Member {
    fn start(server: &Server, handled: Handled) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(JOB, server.address.to_string()).stdin(Stdio::null()).stdout(Stdio::piped());
        // A member that loses its server for too long may say so; that is told by what it does not handle.
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some((event, attempt)) = line.split_once(' ')
                    && let Ok(attempt) = attempt.parse()
                {
                    handled.lock().entry(event.to_owned()).or_default().push(attempt);
                }
            }
        });
        Self(child)
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap().success());
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) async fn killed_and_paused() {
    let mut chance = fastrand::Rng::with_seed(seed());
    // What is confirmed is on disk: the server is killed as well.
    let always = ["--appendfsync".to_owned(), "always".to_owned()];
    let server = Arc::new(Server::start_with(|_, _| Ok(always.into())).unwrap());
    let bus = connect(at(server.address)).await;
    let handled = Handled::default();
    let start = || Member::start(&server, handled.clone());
    let mut members: Vec<_> = (0..MEMBERS).map(|_| start()).collect();
    let publishing = {
        let bus = bus.clone();
        tokio::spawn(async move {
            let mut sent = Sent::default();
            for number in 0..EVENTS / 3 {
                sent.publish(&bus, (0..3).map(|part| (3 * number + part).to_string()).collect()).await;
                sleep(Duration::from_millis(10)).await;
            }
            sent
        })
    };
    let mut paused: Vec<(tokio::time::Instant, usize)> = Vec::new();
    for round in 0..24 {
        sleep(Duration::from_millis(150)).await;
        let one = chance.usize(0..MEMBERS);
        let is_paused = paused.iter().any(|(_, of)| *of == one);
        match chance.u32(0..3) {
            0 => {
                paused.retain(|(_, of)| *of != one);
                members[one] = start(); // which kills who was in its place
            }
            1 if !is_paused => {
                members[one].signal("-STOP");
                // For shorter, and for longer, than others wait for it.
                let long = RECLAIM.mul_f64(0.3 + 2.0 * chance.f64());
                paused.push((tokio::time::Instant::now() + long, one));
            }
            _ => {}
        }
        paused.retain(|(due, one)| {
            let goes_on = *due <= tokio::time::Instant::now();
            if goes_on {
                members[*one].signal("-CONT");
            }
            !goes_on
        });
        if round == 8 || round == 16 {
            let server = server.clone();
            tokio::task::spawn_blocking(move || server.restart().unwrap()).await.unwrap();
        }
    }
    paused.iter().for_each(|(_, one)| members[*one].signal("-CONT"));
    let sent = publishing.await.unwrap();
    let written = written(&server);
    sent.judge(&written);
    assert!(sent.confirmed.len() > EVENTS / 2, "{} of {EVENTS} were confirmed", sent.confirmed.len());
    until("all of it is handled", || async { written.iter().all(|event| handled.lock().contains_key(event)) }).await;
    until("nothing is pending", || async { server.ask(&["XPENDING", STREAM, "g"]).unwrap().list()[0].number() == 0 }).await;
    judge_handled(&handled.lock(), &written);
    drop(members);
    bus.close(PATIENCE).await.unwrap();
}
