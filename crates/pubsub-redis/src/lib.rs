//! The event bus over Redis Streams.
mod builder;
mod channel;
mod desk;
mod entry;
mod errors;
mod fan_out;
mod groups;
mod keeper;
mod keys;
mod leases;
mod link;
mod look;
mod node;
mod pause;
mod publish;
mod reader;
mod redis;
mod reply;
mod settle;

pub use builder::RedisBuilder;
pub use redis::RedisStreamsPubSub;
