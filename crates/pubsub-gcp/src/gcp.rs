//! The backend: one instance of a bus on Google Cloud Pub/Sub.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use gcloud_sdk::google::pubsub::v1::Subscription as OnService;
use pubsub_core::machinery::{self, Pause};
use pubsub_core::{
    Attempts, Capabilities, Capability, Closed, Durability, Error, ErrorKind, Event, Group, GroupStatus, Groups,
    LateSettlement, LeaseProvider, LossNotice, Order, Page, Positions, PubSub, PublishError, PublishOptions, Reach, Result,
    Retention, Start, StatusWatch, SubscribeOptions, Subscription, Topic, TopicStatus, TrimFilter,
};
use tokio::time::{Instant, timeout_at};

use crate::GcpBuilder;
use crate::desk::Desk;
use crate::errors::Fault;
use crate::hub::{Hub, timestamp};
use crate::listener::{Attachment, Listener, ListenerSource};
use crate::member::{MemberSource, Membership, inner_options};
use crate::message;
use crate::node::{INSTANCE, Node};
use crate::provision::{Spec, dead_letters, expires};
use crate::publish::Failed;

/// An event bus over Google Cloud Pub/Sub. Clones are the same instance; see the [crate](crate) for what it promises.
#[derive(Clone)]
pub struct GoogleCloudPubSub(Arc<Node>);

impl GoogleCloudPubSub {
    /// Configures an instance on the topics and subscriptions of a project.
    pub fn builder(project: impl Into<String>) -> GcpBuilder {
        GcpBuilder::new(project.into())
    }

    pub(crate) fn on(node: Arc<Node>) -> Self {
        Self(node)
    }

    /// Deletes a group, with what it has not read; one that is not there is deleted. Its members' streams end with `NotFound`.
    /// Once the future is dropped it may be done or not; it may be called again.
    ///
    /// # Errors
    /// `Closed`, and what the service refuses.
    pub async fn delete_group(&self, topic: &Topic, group: &Group) -> Result<()> {
        self.check_open("delete_group", topic)?;
        let services = &self.0.services;
        let name = services.link.subscription(&services.names.group(topic, group).0);
        self.ask("delete_group", topic, || services.link.delete_subscription(&name)).await
    }

    /// Deletes a topic, where no other shares its Google topic; one that is not there is deleted. Its groups stay, and get nothing any
    /// more: delete them, too. Once the future is dropped it may be done or not; it may be called again.
    ///
    /// # Errors
    /// `Closed`, `InvalidName` for one that shares its Google topic, and what the service refuses.
    pub async fn delete_topic(&self, topic: &Topic) -> Result<()> {
        self.check_open("delete_topic", topic)?;
        let services = &self.0.services;
        let route = services.names.route(topic);
        if route.shared.is_some() {
            let why = Error::new(ErrorKind::InvalidName("shares its Google topic with others".into()));
            return Err(why.during("delete_topic").on(topic));
        }
        let name = services.link.topic(&route.google);
        let delete = || async {
            match services.link.delete_topic(&name).await {
                Err(fault) if !fault.is_not_found() => Err(fault),
                _ => Ok(()),
            }
        };
        self.ask("delete_topic", topic, delete).await
    }

    fn check_open(&self, operation: &'static str, topic: &Topic) -> Result<()> {
        if self.0.is_closed() { Err(Error::closed().during(operation).on(topic)) } else { Ok(()) }
    }

    /// Waits for something, but not beyond a close.
    async fn unless_closed<T>(&self, wait: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.0.services.closed() => Err(Error::closed()),
            done = wait => Ok(done),
        }
    }

    /// Asks until there is an answer that is none of a connection being made again, but not for longer than a command may take.
    async fn ask<T, F: Future<Output = Result<T, Fault>>>(
        &self,
        operation: &'static str,
        topic: &Topic,
        ask: impl Fn() -> F,
    ) -> Result<T> {
        let services = &self.0.services;
        let (until, mut pause) = (Instant::now() + services.options.command_timeout, Pause::new());
        loop {
            let asked = self.unless_closed(timeout_at(until, ask())).await;
            let fault = match asked.map_err(|error| error.during(operation).on(topic))? {
                Ok(Ok(answer)) => {
                    services.well();
                    return Ok(answer);
                }
                Ok(Err(fault)) => fault,
                Err(_) => Fault::timed_out(),
            };
            services.ill(&fault);
            let again = Instant::now() + pause.step();
            if !fault.is_temporary() || again >= until {
                return Err(Error::from(fault).during(operation).on(topic));
            }
            tokio::time::sleep_until(again).await;
        }
    }

    /// Events that stay within this instance: never encoded, and with nowhere to wait but their subscribers' queues.
    async fn publish_locally(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Result<Positions, PublishError> {
        let until = Instant::now() + options.timeout.unwrap_or(self.0.services.options.publish_timeout);
        for (at, event) in events.iter().enumerate() {
            let Some(channel) = self.0.channel(topic) else { break }; // nobody is here
            while let Some(full) = channel.offer_locally(event) {
                if timeout_at(until, full.room_freed()).await.is_err() {
                    return Err(PublishError::prefix_sent(Error::new(ErrorKind::Full).on(topic), at, events.len()));
                }
            }
        }
        Ok(Positions::none())
    }

    /// From when on a new subscription is to get what its topic retains; none for from now on.
    fn since(&self, start: Option<&Start>) -> Option<SystemTime> {
        let options = &self.0.services.options;
        match start {
            Some(Start::Latest) => None,
            // All there is: as far back as topics retain here.
            Some(Start::Earliest) => SystemTime::now().checked_sub(options.topic_retention?),
            _ => options.start_time,
        }
    }

    async fn follow(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let node = &self.0;
        let uncertainty = node.services.options.clock_uncertainty;
        let since = self.since(options.start.as_ref()).map(timestamp);
        let now = (SystemTime::now(), Instant::now());
        let from = (now.0 + uncertainty).duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let from = i64::try_from(from).unwrap_or(i64::MAX).saturating_add(1);
        let (attachment, source, joins) = node.attach(topic, |attached, channel| {
            let queue = node.queue(topic, None);
            let inner = queue.join(INSTANCE, options.clone(), || {}).expect("a new queue has not ended");
            let joins = since.is_none() && channel.has_hub();
            let from = if joins { from } else { i64::MIN };
            let listener = Listener::new(queue, options.clone(), inner.handle(), from);
            let make = || Hub::new(channel.clone(), node.services.clone(), since);
            let hub = channel.listen(&listener, since.is_none(), make);
            attached.add_hub(&hub);
            let attachment = Attachment::new(listener, channel.clone(), hub, node.clone());
            attached.add_listener(&attachment);
            (attachment, inner.into_source(), joins)
        })?;
        // Dropped at any await point from here on, or failing, it is detached with its source.
        let source = ListenerSource { inner: source, attachment: attachment.clone() };
        self.unless_closed(attachment.hub.opened()).await??;
        if joins {
            // What is published from now on is certainly published after `from`, by the service's clock as by this one.
            let certain = now.1 + 2 * uncertainty + Duration::from_millis(2);
            self.unless_closed(tokio::time::sleep_until(certain)).await?;
        }
        Ok(Subscription::new(topic.clone(), options, Box::new(source), attachment))
    }

    fn spec(&self, topic: &Topic, group: &Group, options: &SubscribeOptions) -> Spec {
        let services = &self.0.services;
        let route = services.names.route(topic);
        let (id, labels) = services.names.group(topic, group);
        let kind = ("pubsub-kind".to_owned(), "group".to_owned());
        let letters = services.options.service_dead_letters.zip(options.dead_letter.as_ref());
        let letters =
            letters.map(|(attempts, to)| dead_letters(services.link.topic(&services.names.route(to).google), attempts));
        let subscription = OnService {
            name: services.link.subscription(&id),
            topic: services.link.topic(&route.google),
            ack_deadline_seconds: services.deadline(),
            enable_message_ordering: services.options.ordering,
            enable_exactly_once_delivery: services.options.exactly_once,
            expiration_policy: expires(None),
            labels: labels.into_iter().chain([kind]).collect(),
            filter: route.filter(),
            dead_letter_policy: letters,
            ..OnService::default()
        };
        Spec { subscription, since: self.since(options.start.as_ref()).map(timestamp) }
    }

    async fn join(&self, topic: &Topic, group: &Group, options: SubscribeOptions) -> Result<Subscription> {
        let node = &self.0;
        let spec = self.spec(topic, group, &options);
        if let Some(letters) = spec.subscription.dead_letter_policy.as_ref().map(|policy| policy.dead_letter_topic.clone()) {
            self.ask("subscribe", topic, || node.services.provision.make_topic(&letters)).await?;
        }
        self.ask("subscribe", topic, || node.services.provision.ensure(&spec)).await?;
        let (membership, source) = node.attach(topic, |attached, channel| {
            let desk = attached.desk(topic, group).unwrap_or_else(|| {
                let local = node.queue(topic, Some(group));
                let desk = Desk::new(node.services.clone(), channel.clone(), group.clone(), spec, local);
                channel.add_local(desk.local());
                attached.add_desk(&desk);
                desk
            });
            let inner = inner_options(&options);
            let joined = desk.local().join(INSTANCE, inner.clone(), || {}).unwrap_or_else(|| {
                // It ended with its last member.
                let local = node.queue(topic, Some(group));
                let joined = local.join(INSTANCE, inner, || {}).expect("a new queue has not ended");
                channel.add_local(local.clone());
                desk.set_local(local);
                joined
            });
            let number = desk.join(options.clone());
            desk.start();
            let membership = Membership::new(desk, number, joined.handle(), node.clone());
            attached.add_member(&membership);
            (membership, joined.into_source())
        })?;
        let source = MemberSource { inner: source, membership: membership.clone() };
        Ok(Subscription::new(topic.clone(), options, Box::new(source), membership))
    }
}

fn capabilities(options: &GcpBuilder) -> Capabilities {
    let mut capabilities = Capabilities::in_process();
    capabilities.reach = Reach::Network;
    capabilities.order = if options.ordering { Order::PerKey } else { Order::Unordered };
    capabilities.durability = Durability::Server;
    capabilities.retention = Retention::Backlog;
    capabilities.groups = Groups::Durable;
    capabilities.group_history = options.topic_retention.is_some();
    capabilities.attempts = Attempts::Instance;
    capabilities.late_settlement = LateSettlement::Unconfirmed;
    capabilities.loss_notice = LossNotice::Silent;
    capabilities.publish_waits = false;
    capabilities.max_payload = Some(options.max_payload);
    capabilities
}

#[async_trait]
impl PubSub for GoogleCloudPubSub {
    fn capabilities(&self) -> Capabilities {
        capabilities(&self.0.services.options)
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        let refuse = |error: Error| PublishError::none_sent(error.during("publish").on(topic), events.len());
        self.check_open("publish", topic).map_err(refuse)?;
        machinery::prepare(events, &options, &self.capabilities()).map_err(refuse)?;
        if options.local_only {
            return self.publish_locally(topic, events, &options).await;
        }
        let services = &self.0.services;
        let channel = self.0.channel(topic);
        let (route, google) = match &channel {
            Some(channel) => (channel.route.clone(), channel.google.clone()),
            None => {
                let route = services.names.route(topic);
                let google = services.link.topic(&route.google).into();
                (route, google)
            }
        };
        // Those that are there before certainly get it.
        let hubs = channel.map(|channel| channel.open_hubs()).unwrap_or_default();
        let encode = |event: &Arc<Event>| message::encode(event, &route, services.options.ordering);
        let messages = events.iter().map(encode).collect::<Result<Vec<_>>>().map_err(refuse)?;
        if messages.is_empty() {
            return Ok(Positions::none());
        }
        let wait = options.timeout.unwrap_or(services.options.publish_timeout);
        match services.publisher.publish(&google, messages, wait, !hubs.is_empty()).await {
            Ok(ids) => {
                services.well();
                hubs.iter().for_each(|hub| hub.expect(&ids));
                Ok(Positions::none())
            }
            Err(Failed { fault, fates }) => {
                let error = if self.0.is_closed() { Error::closed() } else { Error::from(fault) };
                Err(PublishError::new(error.on(topic), fates))
            }
        }
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.check_open("subscribe", topic)?;
        let mut checked = options.clone();
        if self.0.services.options.topic_retention.is_some() {
            checked.start.take_if(|start| *start == Start::Earliest);
        }
        checked.validate(topic, &self.capabilities())?;
        let subscribed = match options.group.clone() {
            Some(group) => self.join(topic, &group, options).await,
            None => self.follow(topic, options).await,
        };
        subscribed.map_err(|error| error.during("subscribe").on(topic))
    }

    async fn history(&self, topic: &Topic, _: Start, limit: usize) -> Result<Page> {
        self.check_open("history", topic)?;
        Page::check_limit(limit).map_err(|error| error.during("history").on(topic))?;
        Err(Error::unsupported(Capability::History).during("history").on(topic))
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.check_open("clear_topic", topic)?;
        for (_, name) in self.groups_of("clear_topic", topic).await? {
            self.ask("clear_topic", topic, || self.forget_backlog(&name)).await?;
        }
        Ok(())
    }

    async fn trim_topic(&self, topic: &Topic, _: TrimFilter) -> Result<u64> {
        self.check_open("trim_topic", topic).map(|()| 0)
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.check_open("inspect", topic)?;
        let mut status = TopicStatus::default();
        status.fan_out = Some(self.0.channel(topic).map_or(0, |channel| channel.listeners() as u64));
        let groups = self.groups_of("inspect", topic).await?;
        status.groups = groups.into_iter().map(|(group, _)| GroupStatus::new(group)).collect();
        Ok(status)
    }

    fn status(&self) -> StatusWatch {
        StatusWatch::new(self.0.status())
    }

    async fn flush(&self) -> Result<()> {
        let services = &self.0.services;
        if !self.0.is_closed() {
            services.publisher.flush().await;
            services.burials.flush().await;
            services.notices.flush().await;
        }
        Ok(())
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.0.close(within).await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        None
    }
}

impl GoogleCloudPubSub {
    /// Makes a subscription forget what it has not delivered.
    async fn forget_backlog(&self, name: &str) -> Result<(), Fault> {
        let link = &self.0.services.link;
        match link.seek(name, timestamp(SystemTime::now())).await {
            // The emulator cannot where messages are ordered: what is there is taken instead.
            Err(fault) if fault.is_unimplemented() => loop {
                let taken = match link.pull_now(name).await {
                    Err(fault) if fault.is_temporary() => Vec::new(), // its way to say that there is nothing
                    taken => taken?,
                };
                if taken.is_empty() {
                    return Ok(());
                }
                link.acknowledge(name, taken.into_iter().map(|message| message.ack_id).collect()).await?;
            },
            Err(fault) if !fault.is_not_found() => Err(fault),
            _ => Ok(()), // it was deleted meanwhile
        }
    }

    /// The groups of a topic on the service, and their subscriptions.
    async fn groups_of(&self, operation: &'static str, topic: &Topic) -> Result<Vec<(Group, String)>> {
        let services = &self.0.services;
        let google = services.link.topic(&services.names.route(topic).google);
        let list = || async {
            match services.link.subscriptions_of(&google).await {
                Err(fault) if fault.is_not_found() => Ok(Vec::new()),
                listed => listed,
            }
        };
        let mut groups = Vec::new();
        for name in self.ask(operation, topic, list).await? {
            let id = name.rsplit('/').next().unwrap_or_default();
            let known = services.names.group_of(topic, id, &Default::default());
            let group = match known {
                Some(group) => Some(group),
                // What its name does not tell its labels may.
                None if id.starts_with("h%_") => {
                    match self.ask(operation, topic, || services.link.get_subscription(&name)).await {
                        Ok(there) => services.names.group_of(topic, id, &there.labels),
                        Err(_) => None, // it is gone
                    }
                }
                None => None,
            };
            groups.extend(group.map(|group| (group, name)));
        }
        Ok(groups)
    }
}

impl fmt::Debug for GoogleCloudPubSub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GoogleCloudPubSub").field(&self.0).finish()
    }
}
