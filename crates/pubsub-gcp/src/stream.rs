//! Streams that pull: opened while somebody wants messages, read while there is room, opened again when they end.
//!
//! A stream that is not wanted any more is ended gently: the service is told that nothing more is coming, what was on its way is read to
//! the end, and goes back. Cut off instead, it would keep that until its deadline.

use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use gcloud_sdk::google::pubsub::v1::{ReceivedMessage, StreamingPullRequest, StreamingPullResponse};
use gcloud_sdk::tonic::Streaming;
use pubsub_core::machinery::Pause;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::errors::Fault;
use crate::link::Link;

/// How long the end of a stream is waited for.
const FAREWELL: Duration = Duration::from_secs(1);

/// A stream that lasted so long ended as streams do: that is no sign of trouble.
const LASTING: Duration = Duration::from_secs(10);

/// What is wanted of a subscription's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// More messages.
    More,
    /// Nothing just now; the streams stay.
    Wait,
    /// No streams.
    Nothing,
    /// No streams, and no gentle end: the subscription goes as well.
    End,
}

/// Who pulls.
pub(crate) trait Feed: Send + Sync + 'static {
    /// What is wanted now. When that may have changed, the bell has to be rung.
    fn want(&self) -> Want;

    /// How many messages, and bytes, the service may send ahead, where it keeps to that.
    fn ahead(&self) -> (usize, usize);

    /// Takes what came.
    fn take(&self, received: Vec<ReceivedMessage>);

    /// Gives back what came behind the end.
    fn give_back(&self, received: Vec<ReceivedMessage>);

    /// A stream ended with a fault. With an answer it is opened again after that has been done; with an error it is over.
    fn mend(self: Arc<Self>, fault: Fault, lost: bool) -> futures::future::BoxFuture<'static, Result<(), Fault>>;

    /// A stream brought something: the connection is there.
    fn flows(&self);

    /// It is over.
    fn fail(&self, fault: Fault);
}

/// Rings when what is wanted may have changed. The streams end when it is dropped.
pub(crate) struct Bell(watch::Sender<()>);

impl Bell {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(()))
    }

    pub(crate) fn ring(&self) {
        self.0.send_replace(());
    }
}

/// What all streams of a subscription are opened with.
#[derive(Debug, Clone)]
pub(crate) struct Opening {
    pub(crate) subscription: Arc<str>,
    pub(crate) deadline: i32,
    pub(crate) client_id: String,
}

/// Starts a stream's task, on the runtime of the caller.
pub(crate) fn start<F: Feed>(feed: &Arc<F>, bell: &Bell, link: Arc<Link>, opening: Opening) -> JoinHandle<()> {
    tokio::spawn(run(Arc::downgrade(feed), bell.0.subscribe(), link, opening))
}

async fn run<F: Feed>(feed: Weak<F>, mut bell: watch::Receiver<()>, link: Arc<Link>, opening: Opening) {
    let mut pause = Pause::new();
    // Whether the connection broke since a stream last brought something.
    let mut lost = false;
    loop {
        let ahead = loop {
            if bell.has_changed().is_err() {
                return;
            }
            bell.borrow_and_update();
            let Some(there) = feed.upgrade() else { return };
            match there.want() {
                Want::More => break there.ahead(),
                Want::End => return,
                Want::Wait | Want::Nothing => {}
            }
            drop(there);
            if bell.changed().await.is_err() {
                return;
            }
        };
        let opened = Instant::now();
        let (outcome, flowed) = pull(&feed, &mut bell, &link, &opening, ahead).await;
        if flowed {
            (pause, lost) = (Pause::new(), false);
        }
        let fault = match outcome {
            Ok(()) => continue,
            Err(fault) => fault,
        };
        lost |= fault.is_temporary();
        // The service ends streams every now and then.
        if !fault.is_temporary() || opened.elapsed() < LASTING {
            tracing::debug!(subscription = %opening.subscription, %fault, "a stream ended");
        }
        // A server that is starting may take a stream and never serve it: the next is opened once it has answered.
        let mut trouble = Some(fault);
        while let Some(fault) = trouble.take() {
            let Some(there) = feed.upgrade() else { return };
            if let Err(fault) = there.clone().mend(fault, lost).await {
                if !fault.is_temporary() {
                    return there.fail(fault);
                }
                (lost, trouble) = (true, Some(fault));
            }
            drop(there);
            if !is_wanted_after(pause.step(), &feed, &mut bell).await {
                return;
            }
        }
    }
}

/// Waits, and says whether the stream is wanted still.
async fn is_wanted_after<F: Feed>(pause: Duration, feed: &Weak<F>, bell: &mut watch::Receiver<()>) -> bool {
    let mut pausing = pin!(tokio::time::sleep(pause));
    loop {
        tokio::select! {
            () = &mut pausing => return true,
            rung = bell.changed() => match (rung, feed.upgrade()) {
                (Ok(()), Some(feed)) if feed.want() != Want::End => {}
                _ => return false,
            },
        }
    }
}

/// One stream, from its opening to its end. Returns whether it brought anything, too.
async fn pull<F: Feed>(
    feed: &Weak<F>,
    bell: &mut watch::Receiver<()>,
    link: &Link,
    opening: &Opening,
    ahead: (usize, usize),
) -> (Result<(), Fault>, bool) {
    let (hang_up, requests) = requests(opening, ahead);
    let mut line = match link.line() {
        Ok(line) => line,
        Err(fault) => return (Err(fault), false),
    };
    let mut opened = pin!(line.pull(requests));
    let mut stream = loop {
        tokio::select! {
            opened = &mut opened => match opened {
                Ok(stream) => break stream,
                Err(fault) => return (Err(fault), false),
            },
            want = changed(feed, bell) => match want {
                Want::More | Want::Wait => {}
                Want::Nothing => {
                    // It may have been given something that has not arrived.
                    drop(hang_up);
                    let rest = async {
                        if let Ok(mut stream) = opened.as_mut().await {
                            read_out(feed, &mut stream).await;
                        }
                    };
                    let _ = timeout(FAREWELL, rest).await;
                    return (Ok(()), false);
                }
                Want::End => return (Ok(()), false),
            },
        }
    };
    let mut flowed = false;
    loop {
        let Some(want) = feed.upgrade().map(|feed| feed.want()) else { return (Ok(()), flowed) };
        // Without its bell it is not wanted any more, whatever others are.
        match if bell.has_changed().is_err() { Want::Nothing } else { want } {
            Want::More => tokio::select! {
                biased;
                response = stream.message() => match response {
                    Ok(Some(response)) => {
                        flowed = true;
                        if let Some(feed) = feed.upgrade() {
                            feed.flows();
                            feed.take(response.received_messages);
                        }
                    }
                    Ok(None) => return (Err(ended()), flowed),
                    Err(status) => return (Err(status.into()), flowed),
                },
                _ = changed(feed, bell) => {}
            },
            Want::Wait => drop(changed(feed, bell).await),
            Want::Nothing => {
                drop(hang_up);
                let _ = timeout(FAREWELL, read_out(feed, &mut stream)).await;
                return (Ok(()), flowed);
            }
            Want::End => return (Ok(()), flowed),
        }
    }
}

/// The service ended a stream without saying why.
fn ended() -> Fault {
    Fault::new(gcloud_sdk::tonic::Code::Unavailable, "the stream ended")
}

async fn changed<F: Feed>(feed: &Weak<F>, bell: &mut watch::Receiver<()>) -> Want {
    match bell.changed().await {
        Ok(()) => feed.upgrade().map_or(Want::End, |feed| feed.want()),
        Err(_) => Want::Nothing, // the bell is gone: this one ends, gently, whatever others do
    }
}

/// Gives back all that still comes.
async fn read_out<F: Feed>(feed: &Weak<F>, stream: &mut Streaming<StreamingPullResponse>) {
    while let Ok(Some(response)) = stream.message().await {
        if let Some(feed) = feed.upgrade() {
            feed.give_back(response.received_messages);
        }
    }
}

/// The requests of a stream: the first, and nothing more until the sender is dropped, which ends it.
fn requests(
    opening: &Opening,
    ahead: (usize, usize),
) -> (oneshot::Sender<()>, impl Stream<Item = StreamingPullRequest> + use<>) {
    let bound = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let first = StreamingPullRequest {
        subscription: opening.subscription.to_string(),
        stream_ack_deadline_seconds: opening.deadline,
        client_id: opening.client_id.clone(),
        max_outstanding_messages: bound(ahead.0),
        max_outstanding_bytes: bound(ahead.1),
        ..StreamingPullRequest::default()
    };
    let (hang_up, hung_up) = oneshot::channel::<()>();
    let end = hung_up.map(|_| ()).into_stream().filter_map(|()| std::future::ready(None));
    (hang_up, futures::stream::iter([first]).chain(end))
}

/// Waits for tasks to end, and ends them at that time.
pub(crate) async fn wind_up(tasks: Vec<JoinHandle<()>>, until: Instant) {
    for mut task in tasks {
        if timeout_at(until, &mut task).await.is_err() {
            task.abort();
        }
    }
}
