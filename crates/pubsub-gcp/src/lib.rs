//! The event bus over Google Cloud Pub/Sub: the managed bus, for deployments on Google Cloud.
//!
//! # Example
//!
//! ```no_run
//! use futures::StreamExt;
//! use pubsub_core::{Bus, Event};
//! use pubsub_gcp::GoogleCloudPubSub;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> pubsub_core::Result<()> {
//! let bus = Bus::from(GoogleCloudPubSub::builder("my-project").connect().await?);
//! let mut worker = bus.subscribe_group("orders", "billing").await?;
//! bus.publish("orders", Event::new("order.placed").with_run_id("run-1").with_data(42)).await?;
//! let delivery = worker.next().await.expect("the bus is open")?;
//! assert_eq!(*delivery.data::<u32>()?, 42);
//! delivery.done().await;
//! # Ok(())
//! # }
//! ```
//!
//! # Delivery semantics
//!
//! The clauses of [`pubsub_core::guide`] hold, with these particulars.
//!
//! - `Ok` of a publish means: the service has confirmed it. A publish whose outcome is unknown is sent again, so that its events may be
//!   there twice, with the same event id; nothing recognises that.
//! - Order is per run: the run id is the ordering key. Of a run one request is under way at a time, and a retry overtakes nothing. Events
//!   without a run id have no order.
//! - Fan-out is a private subscription per instance and topic, shared by its listeners here, and deleted with the last of them. Its
//!   retries are local. A listener that is slower than others of its topic is 10,000 events behind at most; then it loses the oldest,
//!   and is told.
//! - A group is a named subscription, and keeps what it has not settled without members. A retry stays leased and comes again here, so
//!   that nobody else notices, and no later event of its run. Attempts are the instance's count: a crash counts only where
//!   [`service_dead_letters`](GcpBuilder::service_dead_letters) makes the service count.
//! - Dead letters are published by the instance, before what they came from is acknowledged. They are kept by whatever group reads their
//!   topic: make one before.
//! - Nothing is retained for those who come later, unless [`topic_retention`](GcpBuilder::topic_retention) is set: then a subscription may
//!   start from the earliest, or at [`start_time`](GcpBuilder::start_time). History and indices come from the replay decorator.
//! - [`clear_topic`](pubsub_core::PubSub::clear_topic) makes the topic's groups forget what they have not delivered.
//!   [`delete_topic`](GoogleCloudPubSub::delete_topic) and [`delete_group`](GoogleCloudPubSub::delete_group) go further.
//! - Topics, groups and messages are those of the TypeScript system: both may be on one bus, and members of one group.
//!
//! | | the service guarantees | the emulator | held here |
//! | --- | --- | --- | --- |
//! | at least once | yes | until it is restarted: it forgets all | what it forgot is made anew |
//! | order of a run | where ordering is on | of one stream | one request of a run at a time |
//! | filters | yes | delivers everything | routed by attribute, always |
//! | flow control | yes | sends all it has | by not reading, with bounded windows |
//! | a retry after a back-off of one's own | no | no | kept leased, and its attempts counted |
//! | a retry is alone | no: all behind it in its run comes again | yes | yes |
//! | counting deliveries | with a dead-letter policy | likewise | within the instance |
//! | repeats of a message | may happen | may happen | told by the message id, within bounds |
//! | moving to a time | yes | not where messages are ordered | there, clearing takes what is there |
//! | exactly-once delivery | as an option, confirmed in order of a run | refuses what is out of order | its answers are told: `TooLate` |
//! | what was sent over a connection that broke | comes again after its deadline | gives the dead stream more; see below | streams are opened again |
//! | deleting private subscriptions | after a day unused | no | with their last listener, and on close |
//!
//! # Configuration
//!
//! [`GoogleCloudPubSub::builder`]. Instances share a bus by sharing a project. Without
//! [`credentials_file`](GcpBuilder::credentials_file) or [`credentials`](GcpBuilder::credentials) they are application default
//! credentials. With `PUBSUB_EMULATOR_HOST` set, or an `http://` [`endpoint`](GcpBuilder::endpoint), nobody logs in.
//!
//! | to | an instance needs the role |
//! | --- | --- |
//! | publish to topics that exist | `roles/pubsub.publisher` |
//! | take part in groups that exist | `roles/pubsub.subscriber`, and `roles/pubsub.viewer` to see that they do |
//! | make topics and groups, and listen (which makes private subscriptions) | `roles/pubsub.editor` |
//! | let the service dead-letter | for the service's own agent, publisher on the dead-letter topic and subscriber on the subscription |
//!
//! # Limits
//!
//! 9 MB of data and metadata per event, 10 MB with everything around them; 1 MB/s of one run. No leases; put others beside it. Names of
//! topics and groups that Google does not allow are escaped, reversibly; what is then too long is hashed, and its messages say their topic.
//! `workflow.events.v2.RUN` travels on `workflow.events.v2`, with all its like ([`shared_topics`](GcpBuilder::shared_topics)).
//! [`inspect`](pubsub_core::PubSub::inspect) tells which groups there are, not how much waits: the service does not say.
//! Google allows 10,000 subscriptions of a project; each topic an instance listens to is one.
//!
//! # When the peer dies
//!
//! A connection that breaks is made again, with a jittered back-off up to a second; a silent one is given up after
//! [`keep_alive`](GcpBuilder::keep_alive) and ten seconds. Subscriptions carry on. What an instance held that died goes to others after
//! [`ack_deadline`](GcpBuilder::ack_deadline); its private subscriptions expire. Permission denied, and a subscription that was deleted,
//! are errors that end the streams they concern. After an emulator was restarted its topics and subscriptions are made anew: what it had
//! confirmed and not delivered is lost. Publishing waits for [`restore_grace`](GcpBuilder::restore_grace) meanwhile; an instance that is not
//! back by then loses what comes before it is, and on a busy machine one was seen that got nothing more.
//!
//! The emulator does worse than the service where a stream's connection breaks or its process is killed: it gives further messages to
//! the stream that is no more. With gcloud-sdk alone and a deadline of 10 s they came again after 10 to 70 s, and on a subscription
//! with ordering, from the second broken connection on, not within 90 s: not to streams opened since, and a unary pull failed. Nothing a
//! client does mends that.

mod builder;
mod channel;
mod desk;
mod errors;
mod gcp;
mod hub;
mod link;
mod listener;
mod member;
mod message;
mod names;
mod node;
mod provision;
mod publish;
mod settle;
mod stream;

pub use builder::GcpBuilder;
pub use gcp::GoogleCloudPubSub;
