//! The backend: one instance of a bus on a Redis server.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pubsub_core::{
    Capabilities, Closed, Cursor, Durability, Error, ErrorKind, Event, GroupStatus, Groups, LateSettlement, LeaseProvider,
    LossNotice, Page, Positions, PubSub, PublishError, PublishOptions, Reach, Result, Retention, Start, StatusWatch,
    SubscribeOptions, Subscription, Topic, TopicStatus, TrimFilter, wire,
};
use tokio::time::{Instant, timeout_at};

use crate::desk::Desk;
use crate::entry::{Content, Entry, EntryId};
use crate::errors::Fault;
use crate::follower::{Attachment, Follower, FollowerSource};
use crate::groups::{self, MemberSource, Membership};
use crate::keys::{Keys, NOBODY};
use crate::lane::Failed;
use crate::leases::RedisLeases;
use crate::link::{Cmd, Script, slot_of};
use crate::look::look;
use crate::node::{INSTANCE, Node, queue};
use crate::publish::millis;
use crate::reply;
use crate::settle::Place;
use crate::{RedisBuilder, RedisServer};

/// How many entries are read at a time where many are.
const PAGE: usize = 500;

/// How long the mark of a clear is kept if topics are kept for ever: cursors from before it are as old by then.
const CLEARED_FOR: Duration = Duration::from_secs(30 * 24 * 3600);

static CLEAR: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/clear.lua")));
static REMOVE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/remove.lua")));

/// An event bus over Redis Streams. Clones are the same instance; see the [crate](crate) for what it promises.
#[derive(Clone)]
pub struct RedisStreamsPubSub(Arc<Node>);

impl RedisStreamsPubSub {
    /// Configures an instance on the server at this host and port.
    pub fn builder(host: impl Into<String>, port: u16) -> RedisBuilder {
        Self::builder_on(RedisServer::new(host, port))
    }

    /// Configures an instance on this server.
    pub fn builder_on(server: RedisServer) -> RedisBuilder {
        RedisBuilder::new(server)
    }

    /// Configures an instance on the server that a [URL](RedisServer::from_url) names.
    ///
    /// # Errors
    /// `InvalidOption`, which does not quote the URL: it may hold a password.
    pub fn from_url(url: &str) -> Result<RedisBuilder> {
        RedisServer::from_url(url).map(Self::builder_on)
    }

    pub(crate) fn on(node: Arc<Node>) -> Self {
        Self(node)
    }

    fn check_open(&self, operation: &'static str, topic: &Topic) -> Result<()> {
        if self.0.is_closed() { Err(Error::closed().during(operation).on(topic)) } else { Ok(()) }
    }

    /// Waits for something, but not beyond a close.
    async fn unless_closed<T>(&self, wait: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.0.closed() => Err(Error::closed()),
            done = wait => Ok(done),
        }
    }

    /// Asks for as long as a command may take.
    async fn ask<T, F: Future<Output = Result<T, Fault>>>(
        &self,
        operation: &'static str,
        topic: &Topic,
        ask: impl Fn() -> F,
    ) -> Result<T> {
        let until = Instant::now() + self.0.options().command_timeout;
        let answer = self.unless_closed(crate::ask::ask(until, true, ask)).await;
        let answer = answer.and_then(|answer| answer.map_err(Error::from));
        answer.map_err(|error| error.during(operation).on(topic))
    }

    /// Events that stay within this instance: never encoded, and with nowhere to wait but their subscribers' queues.
    async fn publish_locally(
        &self,
        topic: &Topic,
        events: &[Arc<Event>],
        options: &PublishOptions,
    ) -> Result<Positions, PublishError> {
        let until = Instant::now() + options.timeout.unwrap_or(self.0.options().publish_timeout);
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

    fn encode(&self, event: &Event) -> Result<Bytes> {
        let encoded = event.check_size(self.0.options().max_payload).and_then(|()| wire::encode(event));
        encoded.map(Bytes::from).map_err(|error| error.on(event.id()))
    }

    async fn follow(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        let node = &self.0;
        let stream = node.keys().stream(topic);
        let looked = self.ask("subscribe", topic, || look(node.link(), &stream, None)).await?;
        let start = options.start.as_ref().unwrap_or(&Start::Latest);
        let at = looked.start(start, options.on_gap, &node.scope(topic))?;
        let (attachment, source, channel, follower, live) = node.attach(topic, |attached, channel| {
            let queue = queue(node, topic, None);
            let inner = queue.join(INSTANCE, options.clone(), || {}).expect("a new queue has not ended");
            let follower = Follower::new(queue, options.clone(), inner.handle());
            let attachment = Attachment::new(follower.clone(), channel.clone(), node.clone());
            attached.add_follower(&attachment);
            let live = channel.follow(&follower, at, &looked);
            node.readers().enter(channel, node);
            (attachment, inner.into_source(), channel.clone(), follower, live)
        })?;
        let source = FollowerSource { inner: source, attachment: attachment.clone() };
        if live {
            node.readers().want(&channel, node);
        } else {
            channel.catch_up(follower, node);
        }
        // Dropped here, or failing, it is detached with its source.
        let until = Instant::now() + node.options().command_timeout;
        self.unless_closed(node.readers().opened(&channel, node, until)).await??;
        Ok(Subscription::new(topic.clone(), options, Box::new(source), attachment))
    }

    async fn join(&self, topic: &Topic, group: &pubsub_core::Group, options: SubscribeOptions) -> Result<Subscription> {
        let node = &self.0;
        let stream: Arc<str> = node.keys().stream(topic).into();
        let looked = self.ask("subscribe", topic, || look(node.link(), &stream, Some(group.as_str()))).await?;
        if !looked.grouped {
            let start = options.start.as_ref().unwrap_or(&Start::Earliest);
            let from = looked.start(start, options.on_gap, &node.scope(topic))?;
            let (read, ttl) = (looked.read_at(from), node.options().idle_ttl);
            self.ask("subscribe", topic, || groups::create(node.link(), &stream, group, from, read, ttl)).await?;
        }
        let (membership, source) = node.attach(topic, |attached, channel| {
            let desk = attached.desk(topic, group).unwrap_or_else(|| {
                let place = Arc::new(Place { stream: channel.stream.clone(), group: group.clone() });
                let slot = node.link().cluster().map(|_| slot_of(&channel.stream));
                let reader = attached.reader(group, slot);
                let desk = Desk::new(node.clone(), channel.clone(), place, queue(node, topic, Some(group)), reader);
                channel.add_local(desk.local());
                attached.add_desk(&desk);
                desk
            });
            let inner = groups::inner_options(&options);
            let joined = desk.local().join(INSTANCE, inner.clone(), || {}).unwrap_or_else(|| {
                // It ended with its last member.
                let local = queue(node, topic, Some(group));
                let joined = local.join(INSTANCE, inner, || {}).expect("a new queue has not ended");
                channel.add_local(local.clone());
                desk.set_local(local);
                joined
            });
            let number = desk.join(options.clone());
            let membership = Membership::new(desk, number, joined.handle());
            attached.add_member(&membership);
            (membership, joined.into_source())
        })?;
        // Dropped at any await point from here on, it leaves again.
        let source = MemberSource { inner: source, membership: membership.clone() };
        let desk = &membership.desk;
        desk.reader().add(desk);
        let known = || async {
            let command = Cmd::new("XGROUP").arg("CREATECONSUMER").key(&stream).arg(group.as_str()).arg(&**node.consumer());
            match node.link().call(command).await {
                Err(fault) if fault.is("NOGROUP") => Ok(()), // gone meanwhile: its reader makes it anew
                answer => answer.map(drop),
            }
        };
        self.ask("subscribe", topic, known).await?;
        self.unless_closed(desk.reader().door.opened(Instant::now() + node.options().command_timeout)).await??;
        Ok(Subscription::new(topic.clone(), options, Box::new(source), membership))
    }

    /// Entries behind one, oldest first.
    async fn range(&self, stream: &str, from: EntryId, count: usize) -> Result<Vec<Entry>, Fault> {
        let command = Cmd::new("XRANGE").key(stream).arg(format!("({from}")).arg("+").arg("COUNT").number(count as u64);
        reply::entries(self.0.link().call(command).await?)
    }
}

fn capabilities(options: &RedisBuilder) -> Capabilities {
    let mut capabilities = Capabilities::in_process();
    capabilities.reach = Reach::Network;
    capabilities.durability = Durability::Server;
    capabilities.retention = Retention::History;
    capabilities.dead_letter_history = true;
    capabilities.groups = Groups::Durable;
    capabilities.group_history = true;
    capabilities.late_settlement = LateSettlement::Refused;
    capabilities.loss_notice = LossNotice::Counted;
    capabilities.publish_waits = false;
    capabilities.max_payload = Some(options.max_payload);
    capabilities.leases = Some(Reach::Network);
    capabilities
}

#[async_trait]
impl PubSub for RedisStreamsPubSub {
    fn capabilities(&self) -> Capabilities {
        capabilities(self.0.options())
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        let refuse = |error: Error| PublishError::none_sent(error.during("publish").on(topic), events.len());
        self.check_open("publish", topic).and_then(|()| options.validate()).map_err(refuse)?;
        if options.local_only {
            return self.publish_locally(topic, events, &options).await;
        }
        let encoded = events.iter().map(|event| self.encode(event)).collect::<Result<Vec<_>>>().map_err(refuse)?;
        if encoded.is_empty() {
            return Ok(Positions::none());
        }
        let node = &self.0;
        let stream = node.channel(topic).map_or_else(|| node.keys().stream(topic).into(), |channel| channel.stream.clone());
        let scope = node.channel(topic).map_or_else(|| node.scope(topic), |channel| channel.scope.clone());
        let patience = node.options().publish_timeout;
        let wait = options.timeout.unwrap_or(patience);
        match node.writer().publish(stream, encoded, wait, Instant::now() + patience).await {
            Ok(ids) => {
                let cursors = ids.into_iter().map(|id| Cursor::new(scope.clone(), id.position()));
                Ok(cursors.collect::<Vec<_>>().into())
            }
            Err(Failed { fault, fates }) => Err(PublishError::new(Error::from(fault).on(topic), fates)),
        }
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.check_open("subscribe", topic)?;
        options.validate(topic, &self.capabilities())?;
        let subscribed = match options.group.clone() {
            Some(group) => self.join(topic, &group, options).await,
            None => self.follow(topic, options).await,
        };
        subscribed.map_err(|error| error.during("subscribe").on(topic))
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        self.check_open("history", topic)?;
        Page::check_limit(limit).map_err(|error| error.during("history").on(topic))?;
        if let Start::Index(_) = from {
            return Err(Error::unsupported(pubsub_core::Capability::Index).during("history").on(topic));
        }
        let (stream, scope) = (self.0.keys().stream(topic), self.0.scope(topic));
        let looked = self.ask("history", topic, || look(self.0.link(), &stream, None)).await?;
        let start = looked.start(&from, pubsub_core::OnGap::Fail, &scope).map_err(|error| error.during("history").on(topic))?;
        let newest = || async {
            let command = Cmd::new("XREVRANGE").key(&stream).arg("+").arg("-").arg("COUNT").arg(1);
            reply::entries(self.0.link().call(command).await?)
        };
        let head = self.ask("history", topic, newest).await?.first().map(|entry| entry.id);
        let cursor = |id: EntryId| Cursor::new(scope.clone(), id.position());
        let mut page = Page { floor: looked.first.map(cursor), head: head.map(cursor), ..Page::default() };
        let (mut at, mut left) = (start, if from == Start::Latest { 0 } else { limit });
        while left > 0 {
            let count = left.min(PAGE);
            let entries = self.ask("history", topic, || self.range(&stream, at, count)).await?;
            (at, left) = (entries.last().map_or(at, |last| last.id), left - entries.len());
            let ended = entries.len() < count;
            // What cannot be read is passed over, as subscriptions do.
            page.entries.extend(entries.into_iter().filter_map(|entry| match entry.content {
                Content::Event { event, .. } => Some((cursor(entry.id), event)),
                Content::Malformed { .. } => None,
            }));
            if ended {
                break;
            }
        }
        page.next = (left == 0 && from != Start::Latest && head.is_some_and(|head| at < head)).then(|| cursor(at));
        Ok(page)
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.check_open("clear_topic", topic)?;
        let stream = self.0.keys().stream(topic);
        let clear = || async {
            let last = reply::id(&self.0.link().eval(&CLEAR, CLEAR.call(&[&stream]).arg(NOBODY)).await?)?;
            let kept = self.0.options().idle_ttl.unwrap_or(CLEARED_FOR);
            let mark = Cmd::new("SET").key(&Keys::cleared(&stream)).arg(last.to_string()).arg("PX").number(millis(kept));
            self.0.link().call(mark).await.map(drop)
        };
        self.ask("clear_topic", topic, clear).await?;
        let desks = self.0.attached.lock().desks_of(topic);
        desks.iter().for_each(|desk| desk.release_ahead());
        Ok(())
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.check_open("trim_topic", topic)?;
        let stream = self.0.keys().stream(topic);
        let (mut at, mut removed) = (EntryId::ZERO, 0);
        loop {
            let entries = self.ask("trim_topic", topic, || self.range(&stream, at, PAGE)).await?;
            let Some(last) = entries.last() else { return Ok(removed) };
            at = last.id;
            let matches = |entry: &&Entry| matches!(&entry.content, Content::Event { event, .. } if filter.matches(event));
            let ids: Vec<_> = entries.iter().filter(matches).map(|entry| entry.id.to_string()).collect();
            if !ids.is_empty() {
                let remove = || async {
                    let call = ids.iter().fold(REMOVE.call(&[&stream]).arg(NOBODY), |call, id| call.arg(id.as_str()));
                    reply::number(&self.0.link().eval(&REMOVE, call).await?)
                };
                removed += self.ask("trim_topic", topic, remove).await?;
            }
            if entries.len() < PAGE {
                return Ok(removed);
            }
        }
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.check_open("inspect", topic)?;
        let node = &self.0;
        let stream = node.keys().stream(topic);
        // What was settled here has to be known there.
        let _ = tokio::time::timeout(node.options().command_timeout, node.notices().flush()).await;
        let (retained, groups) = self.ask("inspect", topic, || node.inspect(&stream, None)).await?;
        let mut status = TopicStatus::default();
        status.retained = Some(retained);
        status.fan_out = Some(node.channel(topic).map_or(0, |channel| channel.followers() as u64));
        for group in groups {
            let desk = node.attached.lock().desk(topic, &group.name);
            let (ahead, members) = desk.map_or((0, 0), |desk| (desk.unheld(), desk.members()));
            let others = group.consumers.iter().filter(|consumer| ***consumer != **node.consumer()).count() as u64;
            let mut of_group = GroupStatus::new(group.name);
            of_group.waiting = group.unread.map(|unread| unread + group.free + ahead);
            of_group.held = Some(group.pending.saturating_sub(group.free + ahead));
            of_group.oldest = group.oldest;
            of_group.members = Some(others + members);
            status.groups.push(of_group);
        }
        Ok(status)
    }

    fn status(&self) -> StatusWatch {
        StatusWatch::new(self.0.status())
    }

    async fn flush(&self) -> Result<()> {
        if !self.0.is_closed() {
            self.0.writer().flush().await;
            self.0.burials().flush().await;
            self.0.notices().flush().await;
        }
        Ok(())
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.0.close(within).await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        Some(Arc::new(RedisLeases::new(self.0.clone())))
    }
}

impl fmt::Debug for RedisStreamsPubSub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RedisStreamsPubSub").field(&self.0).finish()
    }
}
