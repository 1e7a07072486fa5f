//! The connections to the service, and the calls over them. Each has a time limit; none is repeated here.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::Stream;
use gcloud_sdk::google::pubsub::v1::publisher_client::PublisherClient;
use gcloud_sdk::google::pubsub::v1::subscriber_client::SubscriberClient;
use gcloud_sdk::google::pubsub::v1::{
    AcknowledgeRequest, DeleteSubscriptionRequest, DeleteTopicRequest, GetSubscriptionRequest, ListTopicSubscriptionsRequest,
    ModifyAckDeadlineRequest, PublishRequest, PubsubMessage, PullRequest, ReceivedMessage, SeekRequest, StreamingPullRequest,
    StreamingPullResponse, Subscription, Topic, seek_request,
};
use gcloud_sdk::google_cloud_auth::credentials::Credentials;
use gcloud_sdk::tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use gcloud_sdk::tonic::{Code, Response, Status, Streaming};
use gcloud_sdk::{GoogleAuthHeaders, GoogleAuthMiddleware, GoogleAuthMiddlewareLayer, prost_types};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use tower_layer::Layer;

use crate::errors::Fault;

/// How many streams share a connection: the service allows 100.
const STREAMS_TOGETHER: usize = 80;

/// The largest answer: what a stream brings at once may be several messages of the largest size.
const LARGEST_ANSWER: usize = 32 << 20;

/// How much of a stream, and of all streams of a connection, may be on its way and not read. It bounds what lies unread where the
/// service does not.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// How long a connection has to answer when it is asked whether it is alive.
const ALIVE_WITHIN: Duration = Duration::from_secs(10);

/// How many subscriptions are listed at a time.
const PAGE: i32 = 1000;

/// Where the service is, and who to be there.
pub(crate) struct Address {
    pub(crate) url: String,
    pub(crate) credentials: Credentials,
    pub(crate) project: String,
    /// How often a connection is asked whether it is alive.
    pub(crate) keep_alive: Duration,
}

/// One instance's connections.
pub(crate) struct Link {
    address: Address,
    clients: Mutex<Clients>,
    /// Connections for streams, with what holds them open.
    lines: Mutex<Vec<(SubscriberClient<GoogleAuthMiddleware>, Weak<()>)>>,
    patience: Duration,
}

/// The connection that calls go over.
struct Clients {
    publisher: PublisherClient<GoogleAuthMiddleware>,
    subscriber: SubscriberClient<GoogleAuthMiddleware>,
    since: Instant,
}

/// A place on a connection for a stream, held while it is open.
pub(crate) struct Line {
    client: SubscriberClient<GoogleAuthMiddleware>,
    _place: Arc<()>,
}

fn endpoint(Address { url, keep_alive, .. }: &Address, patience: Duration) -> Result<Endpoint, Fault> {
    let bad = |error: gcloud_sdk::tonic::transport::Error| Fault::new(Code::InvalidArgument, error.to_string());
    let endpoint = Endpoint::from_shared(url.clone())
        .map_err(bad)?
        .connect_timeout(patience)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(*keep_alive)
        .keep_alive_timeout(ALIVE_WITHIN)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    if url.starts_with("https:") {
        return endpoint.tls_config(ClientTlsConfig::new().with_native_roots()).map_err(bad);
    }
    Ok(endpoint)
}

impl Link {
    /// Connects once, to see that it can be done; later connections are made as they are needed.
    pub(crate) async fn open(address: Address, patience: Duration) -> Result<Self, Fault> {
        let unreachable = |error| Fault::new(Code::Unavailable, format!("{}: {error}", address.url));
        let channel = endpoint(&address, patience)?.connect().await.map_err(unreachable)?;
        let clients = Mutex::new(Self::clients(&address, channel)?);
        Ok(Self { address, clients, lines: Mutex::default(), patience })
    }

    fn clients(address: &Address, channel: Channel) -> Result<Clients, Fault> {
        let service = Self::service(address, channel)?;
        let publisher = PublisherClient::new(service.clone()).max_decoding_message_size(LARGEST_ANSWER);
        let subscriber = SubscriberClient::new(service).max_decoding_message_size(LARGEST_ANSWER);
        Ok(Clients { publisher, subscriber, since: Instant::now() })
    }

    fn publisher(&self) -> PublisherClient<GoogleAuthMiddleware> {
        self.clients.lock().publisher.clone()
    }

    fn subscriber(&self) -> SubscriberClient<GoogleAuthMiddleware> {
        self.clients.lock().subscriber.clone()
    }

    /// Makes another connection for calls, unless that was done since: a server that accepted the one while it was starting may never
    /// answer on it.
    fn give_up_connection(&self, of: Instant) {
        let _old; // dropped after the lock
        let mut clients = self.clients.lock();
        if clients.since <= of
            && let Ok(channel) = endpoint(&self.address, self.patience).map(|endpoint| endpoint.connect_lazy())
            && let Ok(new) = Self::clients(&self.address, channel)
        {
            _old = std::mem::replace(&mut *clients, new);
        }
    }

    fn service(address: &Address, channel: Channel) -> Result<GoogleAuthMiddleware, Fault> {
        let headers = GoogleAuthHeaders::from(address.credentials.clone());
        let layer = GoogleAuthMiddlewareLayer::new(headers, None);
        Ok(layer.map_err(|error| Fault::new(Code::InvalidArgument, error.to_string()))?.layer(channel))
    }

    async fn call<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Fault> {
        let begun = Instant::now();
        match timeout(self.patience, call).await {
            Ok(answer) => Ok(answer.map_err(Fault::from)?.into_inner()),
            Err(_) => {
                self.give_up_connection(begun);
                Err(Fault::timed_out())
            }
        }
    }

    pub(crate) fn topic(&self, id: &str) -> String {
        format!("projects/{}/topics/{id}", self.address.project)
    }

    pub(crate) fn subscription(&self, id: &str) -> String {
        format!("projects/{}/subscriptions/{id}", self.address.project)
    }

    pub(crate) async fn create_topic(&self, topic: Topic) -> Result<(), Fault> {
        let mut client = self.publisher();
        self.call(client.create_topic(topic)).await.map(drop)
    }

    pub(crate) async fn delete_topic(&self, name: &str) -> Result<(), Fault> {
        let mut client = self.publisher();
        self.call(client.delete_topic(DeleteTopicRequest { topic: name.to_owned() })).await
    }

    /// The names of a topic's subscriptions.
    pub(crate) async fn subscriptions_of(&self, topic: &str) -> Result<Vec<String>, Fault> {
        let (mut names, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListTopicSubscriptionsRequest { topic: topic.to_owned(), page_size: PAGE, page_token };
            let mut client = self.publisher();
            let page = self.call(client.list_topic_subscriptions(request)).await?;
            names.extend(page.subscriptions);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(names);
            }
        }
    }

    pub(crate) async fn publish(&self, topic: String, messages: Vec<PubsubMessage>) -> Result<Vec<String>, Fault> {
        let mut client = self.publisher();
        Ok(self.call(client.publish(PublishRequest { topic, messages })).await?.message_ids)
    }

    pub(crate) async fn create_subscription(&self, subscription: Subscription) -> Result<(), Fault> {
        let mut client = self.subscriber();
        self.call(client.create_subscription(subscription)).await.map(drop)
    }

    pub(crate) async fn get_subscription(&self, name: &str) -> Result<Subscription, Fault> {
        let mut client = self.subscriber();
        self.call(client.get_subscription(GetSubscriptionRequest { subscription: name.to_owned() })).await
    }

    /// Deletes a subscription; one that is not there is deleted.
    pub(crate) async fn delete_subscription(&self, name: &str) -> Result<(), Fault> {
        let mut client = self.subscriber();
        match self.call(client.delete_subscription(DeleteSubscriptionRequest { subscription: name.to_owned() })).await {
            Err(fault) if !fault.is_not_found() => Err(fault),
            _ => Ok(()),
        }
    }

    /// Moves a subscription to what was published from a time on.
    pub(crate) async fn seek(&self, name: &str, time: prost_types::Timestamp) -> Result<(), Fault> {
        let target = Some(seek_request::Target::Time(time));
        let mut client = self.subscriber();
        self.call(client.seek(SeekRequest { subscription: name.to_owned(), target })).await.map(drop)
    }

    /// Takes some of what is there at once.
    pub(crate) async fn pull_now(&self, name: &str) -> Result<Vec<ReceivedMessage>, Fault> {
        #[expect(deprecated)] // said of waiting for messages; here nothing is waited for
        let request = PullRequest { subscription: name.to_owned(), return_immediately: true, max_messages: PAGE };
        let mut client = self.subscriber();
        Ok(self.call(client.pull(request)).await?.received_messages)
    }

    pub(crate) async fn acknowledge(&self, subscription: &str, ack_ids: Vec<String>) -> Result<(), Fault> {
        let mut client = self.subscriber();
        self.call(client.acknowledge(AcknowledgeRequest { subscription: subscription.to_owned(), ack_ids })).await
    }

    /// Sets the deadline of messages; 0 gives them back.
    pub(crate) async fn set_deadline(&self, subscription: &str, ack_ids: Vec<String>, seconds: i32) -> Result<(), Fault> {
        let subscription = subscription.to_owned();
        let mut client = self.subscriber();
        let request = ModifyAckDeadlineRequest { subscription, ack_ids, ack_deadline_seconds: seconds };
        self.call(client.modify_ack_deadline(request)).await
    }

    /// A place for a stream: on a connection with room, or on a new one, which is made when it is first used.
    pub(crate) fn line(&self) -> Result<Line, Fault> {
        let mut lines = self.lines.lock();
        lines.retain(|(_, place)| place.strong_count() > 0);
        for (client, place) in lines.iter() {
            if place.strong_count() < STREAMS_TOGETHER
                && let Some(place) = place.upgrade()
            {
                return Ok(Line { client: client.clone(), _place: place });
            }
        }
        let channel = endpoint(&self.address, self.patience)?.connect_lazy();
        let service = Self::service(&self.address, channel)?;
        let client = SubscriberClient::new(service).max_decoding_message_size(LARGEST_ANSWER);
        let place = Arc::new(());
        lines.push((client.clone(), Arc::downgrade(&place)));
        Ok(Line { client, _place: place })
    }
}

impl Line {
    /// Opens a stream, which on an idle subscription succeeds only with the first message.
    pub(crate) async fn pull(
        &mut self,
        requests: impl Stream<Item = StreamingPullRequest> + Send + 'static,
    ) -> Result<Streaming<StreamingPullResponse>, Fault> {
        Ok(self.client.streaming_pull(requests).await?.into_inner())
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("url", &self.address.url).field("project", &self.address.project).finish_non_exhaustive()
    }
}
