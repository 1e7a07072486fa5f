//! The event bus over Google Cloud Pub/Sub: the managed bus, for deployments on Google Cloud.

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
mod pause;
mod provision;
mod publish;
mod settle;
mod stream;

pub use builder::GcpBuilder;
pub use gcp::GoogleCloudPubSub;
