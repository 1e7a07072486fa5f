//! wip
mod broker;
mod builder;
mod convert;
mod election;
mod files;
mod frame;
mod journal;
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

#[cfg(test)]
mod model;

pub use builder::UnixBuilder;
pub use unix::UnixSocketPubSub;
