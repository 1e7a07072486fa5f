//! `gcp://PROJECT`.

use std::future::Future;

use pubsub_core::{Bus, Error, Result};
use pubsub_gcp::{GcpBuilder, GoogleCloudPubSub};

use crate::BusUrl;

pub(crate) fn gcp(url: &mut BusUrl) -> Result<impl Future<Output = Result<Bus>> + use<>> {
    let bad = || Error::invalid_option("url", "is written `gcp://PROJECT`, the project's id and nothing else");
    let authority = url.authority().filter(|authority| !authority.host().is_empty()).ok_or_else(bad)?;
    if authority.username().is_some() || authority.port().is_some() || !matches!(url.path(), "" | "/") {
        return Err(bad());
    }
    let mut builder = GoogleCloudPubSub::builder(authority.host());
    if let Some(endpoint) = url.text("endpoint") {
        builder = builder.endpoint(endpoint);
    }
    if let Some(path) = url.text("credentials_file") {
        builder = builder.credentials_file(path);
    }
    for (option, set) in [
        ("create_topics", GcpBuilder::create_topics as fn(GcpBuilder, _) -> _),
        ("ordering", GcpBuilder::ordering),
        ("exactly_once", GcpBuilder::exactly_once),
        ("restore", GcpBuilder::restore),
    ] {
        if let Some(flag) = url.flag(option)? {
            builder = set(builder, flag);
        }
    }
    for (option, set) in [
        ("streams", GcpBuilder::streams as fn(GcpBuilder, _) -> _),
        ("batch_events", GcpBuilder::batch_events),
        ("max_outstanding_events", GcpBuilder::max_outstanding_events),
    ] {
        if let Some(number) = url.number(option)? {
            builder = set(builder, number);
        }
    }
    for (option, set) in [
        ("max_payload", GcpBuilder::max_payload as fn(GcpBuilder, _) -> _),
        ("batch_bytes", GcpBuilder::batch_bytes),
        ("max_outstanding_bytes", GcpBuilder::max_outstanding_bytes),
    ] {
        if let Some(bytes) = url.size(option)? {
            builder = set(builder, bytes);
        }
    }
    for (option, set) in [
        ("ack_deadline", GcpBuilder::ack_deadline as fn(GcpBuilder, _) -> _),
        ("linger", GcpBuilder::linger),
        ("publish_timeout", GcpBuilder::publish_timeout),
        ("command_timeout", GcpBuilder::command_timeout),
        ("keep_alive", GcpBuilder::keep_alive),
        ("batch_delay", GcpBuilder::batch_delay),
        ("private_ttl", GcpBuilder::private_ttl),
        ("private_retention", GcpBuilder::private_retention),
        ("clock_uncertainty", GcpBuilder::clock_uncertainty),
        ("restore_grace", GcpBuilder::restore_grace),
    ] {
        if let Some(duration) = url.duration(option)? {
            builder = set(builder, duration);
        }
    }
    if let Some(retention) = url.duration("topic_retention")? {
        builder = builder.topic_retention(Some(retention));
    }
    if let Some(deliveries) = url.number("service_dead_letters")? {
        builder = builder.service_dead_letters(Some(deliveries));
    }
    Ok(async move { builder.connect().await.map(Bus::from) })
}
