//! wip
mod broker;
mod builder;
mod convert;
mod election;
mod files;
mod frame;
mod leases;
mod ledger;
mod link;
mod member;
mod protocol;
mod reader;
mod remote;
mod serve;
mod session;
mod subscription;
mod unix;

pub use builder::UnixBuilder;
pub use unix::UnixSocketPubSub;
