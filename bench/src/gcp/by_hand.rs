//! What an application writes that uses gcloud-sdk as it is.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::StreamExt;
use gcloud_sdk::google::pubsub::v1::publisher_client::PublisherClient;
use gcloud_sdk::google::pubsub::v1::subscriber_client::SubscriberClient;
use gcloud_sdk::google::pubsub::v1::{
    AcknowledgeRequest, PublishRequest, PubsubMessage, StreamingPullRequest, Subscription, Topic,
};
use gcloud_sdk::google_cloud_auth::credentials::anonymous;
use gcloud_sdk::{GoogleApi, GoogleAuthMiddleware};
use pubsub_core::{BoxError, Event, wire};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{CALLS, Place, Publish};
use crate::event::read;
use crate::redis::Calls;

pub(super) const GROUP: &str = "g";

const DEADLINE: i32 = 60;

/// The largest answer that is taken: what a stream brings at once is more than the 4 MiB of tonic's default.
const LARGEST_ANSWER: usize = 32 << 20;

impl Place {
    fn topic(&self) -> String {
        format!("projects/{}/topics/orders", self.project)
    }

    fn subscription(&self) -> String {
        format!("projects/{}/subscriptions/orders-{GROUP}", self.project)
    }

    async fn publisher(&self) -> Result<PublisherClient<GoogleAuthMiddleware>, BoxError> {
        let credentials = anonymous::Builder::new().build();
        Ok(GoogleApi::from_function_with_credentials(PublisherClient::new, &self.url, None, credentials).await?.get())
    }

    async fn subscriber(&self) -> Result<SubscriberClient<GoogleAuthMiddleware>, BoxError> {
        let credentials = anonymous::Builder::new().build();
        let client =
            GoogleApi::from_function_with_credentials(SubscriberClient::new, &self.url, None, credentials).await?.get();
        Ok(client.max_decoding_message_size(LARGEST_ANSWER))
    }
}

async fn make_topic(place: &Place) -> Result<PublisherClient<GoogleAuthMiddleware>, BoxError> {
    let mut client = place.publisher().await?;
    match client.create_topic(Topic { name: place.topic(), ..Topic::default() }).await {
        Err(status) if status.code() != gcloud_sdk::tonic::Code::AlreadyExists => Err(status.into()),
        _ => Ok(client),
    }
}

/// Makes what is to be pulled from, by anybody.
pub(super) async fn prepare(place: &Place) -> Result<(), BoxError> {
    make_topic(place).await?;
    let subscription = Subscription {
        name: place.subscription(),
        topic: place.topic(),
        ack_deadline_seconds: DEADLINE,
        ..Subscription::default()
    };
    place.subscriber().await?.create_subscription(subscription).await?;
    Ok(())
}

pub(super) struct Publisher {
    client: PublisherClient<GoogleAuthMiddleware>,
    topic: String,
    calls: Calls,
}

impl Publisher {
    pub(super) async fn open(place: &Place) -> Result<Self, BoxError> {
        Ok(Self { client: make_topic(place).await?, topic: place.topic(), calls: Calls::new() })
    }
}

impl Publish for Publisher {
    async fn publish(&mut self, events: Vec<Arc<Event>>) -> Result<(), BoxError> {
        let message = |event: &Arc<Event>| Ok(PubsubMessage { data: wire::encode(event)?, ..PubsubMessage::default() });
        let messages = events.iter().map(message).collect::<Result<Vec<_>, BoxError>>()?;
        let (mut client, topic) = (self.client.clone(), self.topic.clone());
        let call = async move {
            client.publish(PublishRequest { topic, messages }).await?;
            Ok(())
        };
        self.calls.begin(CALLS, call).await
    }

    async fn finish(&mut self) -> Result<(), BoxError> {
        self.calls.end().await
    }
}

/// Pulls so many over so many streams, and acknowledges what each answer brings with one request.
pub(super) async fn pull(place: Place, streams: usize, all: u64) -> Result<(), BoxError> {
    let client = place.subscriber().await?;
    let (over, is_over) = watch::channel(false);
    let (over, handled) = (Arc::new(over), Arc::new(AtomicU64::new(0)));
    let mut pulling = JoinSet::new();
    for _ in 0..streams {
        let (client, name) = (client.clone(), place.subscription());
        let (over, is_over, handled) = (over.clone(), is_over.clone(), handled.clone());
        pulling.spawn(async move { one_stream(client, name, all, &handled, &over, is_over).await });
    }
    while let Some(pulled) = pulling.join_next().await {
        pulled??;
    }
    Ok(())
}

async fn one_stream(
    client: SubscriberClient<GoogleAuthMiddleware>,
    subscription: String,
    all: u64,
    handled: &AtomicU64,
    over: &watch::Sender<bool>,
    mut is_over: watch::Receiver<bool>,
) -> Result<(), BoxError> {
    let first = StreamingPullRequest {
        subscription: subscription.clone(),
        stream_ack_deadline_seconds: DEADLINE,
        ..StreamingPullRequest::default()
    };
    let requests = futures::stream::iter([first]).chain(futures::stream::pending());
    let mut acknowledging = JoinSet::new();
    let pulling = async {
        let mut stream = client.clone().streaming_pull(requests).await?.into_inner();
        while let Some(answer) = stream.message().await? {
            let mut ack_ids = Vec::with_capacity(answer.received_messages.len());
            for received in answer.received_messages {
                let data = received.message.ok_or("no message")?.data;
                let event: Event = wire::decode(&data.into(), None)?.event;
                black_box(read(&event)?);
                ack_ids.push(received.ack_id);
            }
            let count = ack_ids.len() as u64;
            let (mut client, subscription) = (client.clone(), subscription.clone());
            acknowledging.spawn(async move { client.acknowledge(AcknowledgeRequest { subscription, ack_ids }).await });
            if handled.fetch_add(count, Ordering::AcqRel) + count >= all {
                over.send_replace(true);
            }
        }
        Ok::<_, BoxError>(())
    };
    // On an idle subscription a stream opens only with the first message.
    tokio::select! {
        pulled = pulling => pulled?,
        _ = is_over.wait_for(|over| *over) => {}
    }
    while let Some(acknowledged) = acknowledging.join_next().await {
        acknowledged??;
    }
    Ok(())
}
