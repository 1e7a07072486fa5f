//! The backend: one instance on the bus that a socket's path names.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pubsub_core::machinery::Timer;
use pubsub_core::{
    Attempts, Capabilities, Capability, Closed, Cursor, Deduplication, Durability, Error, ErrorKind, Event, Fate, Gap,
    GroupStatus, Groups, LeaseProvider, LossNotice, OnGap, Page, Positions, PubSub, PublishError, PublishOptions, Reach,
    Result, Retention, Start, StatusWatch, SubscribeOptions, Subscription, Timestamp, Topic, TopicStatus, TrimFilter,
};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::builder::{Settings, UnixBuilder};
use crate::convert::{begin, scope};
use crate::leases::UnixLeases;
use crate::link::{Config, Link};
use crate::protocol::{Answer, GroupState, NoStart, Place, Query, Reply, Request};
use crate::record::{self, Run};
use crate::remote::Remote;

/// How long a call waits for an answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// How long a publish waits before it tries again at a group that is far behind.
const FULL_PAUSE: Duration = Duration::from_millis(5);

/// How often a publish tries again that could not be written, and how long it waits in between.
const FAILED_TRIES: u32 = 3;
const FAILED_PAUSE: Duration = Duration::from_millis(10);

/// How much of a publish travels in one frame.
const PIECE_EVENTS: usize = 1000;
const PIECE_BYTES: usize = 1 << 20;

/// An event bus for the processes of a host: those that name the same socket path share it.
///
/// Cheap to clone; clones are the same instance. See the [crate's documentation](crate).
#[derive(Clone)]
pub struct UnixSocketPubSub {
    remote: Arc<Remote>,
    settings: Settings,
    path: Arc<std::path::Path>,
}

impl UnixSocketPubSub {
    /// An instance on the bus at this path, with all defaults.
    ///
    /// # Errors
    /// As [`UnixBuilder::connect`].
    pub async fn connect(path: impl Into<PathBuf>) -> Result<Self> {
        Self::builder(path).connect().await
    }

    /// Configures an instance on the bus at this path. The directory is made, for its owner alone, if it is not there.
    pub fn builder(path: impl Into<PathBuf>) -> UnixBuilder {
        UnixBuilder::new(path.into())
    }

    pub(crate) async fn on(config: Config, settings: Settings) -> Result<Self> {
        let timer = Arc::new(Timer::new()?);
        let path = Arc::from(config.paths.socket.as_path());
        let (link, carrier) = Link::connect(config).await?;
        Ok(Self { remote: Remote::new(link, timer, carrier, settings.envelopes), settings, path })
    }

    fn check_open(&self, operation: &'static str, topic: &Topic) -> Result<()> {
        if self.remote.is_closing() { Err(Error::closed().during(operation).on(topic)) } else { Ok(()) }
    }

    /// Asks about a topic, within the time a caller has patience.
    async fn ask(&self, operation: &'static str, topic: &Topic, query: Query) -> Result<Reply> {
        self.check_open(operation, topic)?;
        let answer = timeout(PATIENCE, self.remote.link.ask(query)).await.unwrap_or_else(|_| Err(ErrorKind::Timeout.into()));
        answer.map_err(|error| error.during(operation).on(topic))
    }

    /// Changes something about a topic, within that time.
    async fn call(&self, operation: &'static str, topic: &Topic, request: Request) -> Result<Answer> {
        self.check_open(operation, topic)?;
        let failed = |kind: ErrorKind| Error::new(kind).during(operation).on(topic);
        match timeout(PATIENCE, self.remote.link.call(request)).await {
            Ok(Ok(Answer::Failed(why))) => Err(failed(ErrorKind::Backend(why.into()))),
            Ok(Ok(Answer::Full)) => Err(failed(ErrorKind::Full)),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(failed(ErrorKind::Closed)),
            Err(_) => Err(failed(ErrorKind::Timeout)),
        }
    }

    /// Events that stay within this instance: never encoded, and with nowhere to wait but their subscribers' queues.
    async fn publish_locally(&self, topic: &Topic, events: &[Arc<Event>], until: Instant) -> Result<Positions, PublishError> {
        for (at, event) in events.iter().enumerate() {
            while let Some(full) = self.remote.offer_locally(topic, event) {
                if timeout_at(until, full.room_freed()).await.is_err() {
                    return Err(PublishError::prefix_sent(Error::new(ErrorKind::Full).on(topic), at, events.len()));
                }
            }
        }
        Ok(Positions::none())
    }

    /// Publishes what fits into one frame. It waits until then for a group that is far behind.
    ///
    /// # Errors
    /// Why not, and what is known of the events.
    async fn publish_piece(&self, topic: &Topic, piece: &Piece, until: Instant) -> Result<Vec<Cursor>, (Error, Fate)> {
        let (answered, mut failures) = (Instant::now() + PATIENCE, 0);
        loop {
            if timeout_at(answered, self.remote.link.room()).await.is_err() {
                return Err((ErrorKind::Unavailable.into(), Fate::NotSent));
            }
            let request = Request::publish(topic.as_str().into(), piece.events.clone(), piece.count);
            let pause = match timeout_at(answered.max(until), self.remote.link.call(request)).await {
                Ok(Ok(Answer::Published { bus, generation, offsets })) => {
                    let scope = scope(&bus, generation);
                    return Ok(offsets.iter().map(|offset| Cursor::new(scope.clone(), offset)).collect());
                }
                Ok(Ok(Answer::Full)) if Instant::now() + FULL_PAUSE < until => FULL_PAUSE,
                Ok(Ok(Answer::Full)) => return Err((ErrorKind::Full.into(), Fate::NotSent)),
                Ok(Ok(Answer::Failed(_))) if failures < FAILED_TRIES => {
                    failures += 1;
                    FAILED_PAUSE
                }
                Ok(Ok(Answer::Failed(why))) => {
                    return Err((Error::new(ErrorKind::Unavailable).caused_by(why), Fate::NotSent));
                }
                // Taken, though where it stands is no longer known.
                Ok(Ok(_)) => return Ok(Vec::new()),
                Ok(Err(_)) => return Err((Error::closed(), Fate::Unknown)),
                Err(_) => return Err((ErrorKind::Timeout.into(), Fate::Unknown)),
            };
            sleep(pause).await;
        }
    }
}

fn capabilities(settings: &Settings, foreign: bool) -> Capabilities {
    let mut capabilities = Capabilities::in_process();
    capabilities.reach = Reach::Host;
    capabilities.publish_waits = false;
    capabilities.max_payload = Some(settings.max_payload);
    if foreign {
        // A broker that is a process of Mastra gives each event out once and keeps nothing.
        capabilities.attempts = Attempts::Instance;
        capabilities.loss_notice = LossNotice::Silent;
        capabilities.deduplication = Deduplication::Retained { events: Some(settings.max_events), age: None };
        capabilities.keeps_identity = false;
        return capabilities;
    }
    capabilities.durability = Durability::ProcessDeath;
    capabilities.retention = Retention::History;
    capabilities.dead_letter_history = true;
    capabilities.groups = Groups::Durable;
    capabilities.group_history = true;
    capabilities.deduplication = Deduplication::Window { events: Some(settings.max_events), age: None };
    capabilities.indexed = true;
    capabilities.leases = Some(Reach::Host);
    capabilities
}

#[async_trait]
impl PubSub for UnixSocketPubSub {
    fn capabilities(&self) -> Capabilities {
        capabilities(&self.settings, self.remote.link.is_foreign())
    }

    async fn publish(&self, topic: &Topic, events: &[Arc<Event>], options: PublishOptions) -> Result<Positions, PublishError> {
        let refuse = |error: Error| PublishError::none_sent(error.during("publish").on(topic), events.len());
        self.check_open("publish", topic).and_then(|()| options.validate()).map_err(refuse)?;
        let until = Instant::now() + options.timeout.unwrap_or(self.settings.publish_timeout);
        if options.local_only {
            return self.publish_locally(topic, events, until).await;
        }
        let pieces = pieces(events, self.settings.max_payload, self.settings.envelopes).map_err(refuse)?;
        let mut positions = Vec::with_capacity(events.len());
        let mut sent = 0;
        for piece in &pieces {
            match self.publish_piece(topic, piece, until).await {
                Ok(cursors) => positions.extend(cursors),
                Err((error, fate)) => {
                    let fates = (0..events.len()).map(|at| match at {
                        _ if at < sent => Fate::Published,
                        _ if at < sent + piece.count => fate,
                        _ => Fate::NotSent,
                    });
                    return Err(PublishError::new(error.on(topic), fates.collect()));
                }
            }
            sent += piece.count;
        }
        // Positions are for all or none.
        Ok(if positions.len() == events.len() { positions.into() } else { Positions::none() })
    }

    async fn subscribe(&self, topic: &Topic, options: SubscribeOptions) -> Result<Subscription> {
        self.check_open("subscribe", topic)?;
        options.validate(topic, &self.capabilities())?;
        let in_call = |error: Error| error.during("subscribe").on(topic);
        let (attachment, inner) = self.remote.attach(topic, options.clone()).map_err(in_call)?;
        // Dropped at any await point, it detaches itself.
        let source = attachment.source(inner);
        let or_earliest = options.on_gap == OnGap::Earliest;
        let start = options.start.as_ref().map(begin);
        let name = topic.as_str().into();
        match attachment.member() {
            None => {
                let begin = start.unwrap_or(crate::protocol::Begin::Latest);
                match self.ask("subscribe", topic, Query::Start { topic: name, begin, or_earliest }).await? {
                    Reply::Start(Ok(place)) => attachment.follow(place),
                    Reply::Start(Err(gap)) => return Err(in_call(no_start(gap))),
                    _ => return Err(in_call(ErrorKind::Unavailable.into())),
                }
            }
            Some(member) => {
                let request = Request::Join { seat: member.seat.clone(), begin: start, or_earliest };
                if let Answer::Joined(Err(gap)) = self.call("subscribe", topic, request).await? {
                    return Err(in_call(no_start(gap)));
                }
            }
        }
        self.check_open("subscribe", topic)?;
        Ok(Subscription::new(topic.clone(), options, Box::new(source), attachment))
    }

    async fn history(&self, topic: &Topic, from: Start, limit: usize) -> Result<Page> {
        Page::check_limit(limit).map_err(|error| error.during("history").on(topic))?;
        self.check_open("history", topic)?;
        if self.remote.link.is_foreign() {
            return Err(Error::unsupported(Capability::History).during("history").on(topic));
        }
        let most = u32::try_from(limit.min(PIECE_EVENTS)).unwrap_or(u32::MAX);
        let query = Query::Page { topic: topic.as_str().into(), begin: begin(&from), most };
        let Reply::Page { stretch, floor, head } = self.ask("history", topic, query).await? else {
            return Err(Error::new(ErrorKind::Unavailable).during("history").on(topic));
        };
        let stretch = stretch.map_err(|gap| no_start(gap).during("history").on(topic))?;
        let scope = scope(&stretch.bus, stretch.next.generation);
        let cursor = |offset: u64| Cursor::new(scope.clone(), offset);
        // What cannot be read is passed over, as subscriptions do.
        let generation = stretch.next.generation;
        let entries = stretch.iter().take(limit).filter_map(|(offset, stored)| {
            let place = Place { generation, offset };
            Some((cursor(offset), Arc::new(self.remote.read(&stored, place).ok()?)))
        });
        let last = stretch.offsets.iter().take(limit).last();
        let next = last.filter(|last| head.is_some_and(|head| *last < head)).map(cursor);
        Ok(Page { entries: entries.collect(), next, floor: floor.map(cursor), head: head.map(cursor) })
    }

    async fn clear_topic(&self, topic: &Topic) -> Result<()> {
        self.check_open("clear_topic", topic)?;
        if self.remote.link.is_foreign() {
            return Ok(()); // there is nothing
        }
        self.call("clear_topic", topic, Request::Clear { topic: topic.as_str().into() }).await.map(drop)
    }

    async fn trim_topic(&self, topic: &Topic, filter: TrimFilter) -> Result<u64> {
        self.check_open("trim_topic", topic)?;
        if self.remote.link.is_foreign() {
            return Ok(0); // there is nothing
        }
        let request = Request::Trim { topic: topic.as_str().into(), run: filter.run_id, up_to: filter.produced_up_to };
        match self.call("trim_topic", topic, request).await? {
            Answer::Trimmed(count) => Ok(count),
            _ => Ok(0),
        }
    }

    async fn inspect(&self, topic: &Topic) -> Result<TopicStatus> {
        self.check_open("inspect", topic)?;
        let Reply::Status { retained, groups } =
            self.ask("inspect", topic, Query::Status { topic: topic.as_str().into() }).await?
        else {
            return Err(Error::new(ErrorKind::Unavailable).during("inspect").on(topic));
        };
        let mut status = TopicStatus::default();
        status.retained = Some(retained);
        status.fan_out = Some(self.remote.fan_out(topic));
        status.groups = groups.into_iter().filter_map(group_status).collect();
        Ok(status)
    }

    fn status(&self) -> StatusWatch {
        StatusWatch::new(self.remote.link.status())
    }

    async fn flush(&self) -> Result<()> {
        if !self.remote.is_closing() {
            self.remote.link.flush().await; // closed meanwhile is flushed, too
        }
        Ok(())
    }

    async fn close(&self, within: Duration) -> Result<Closed> {
        self.remote.close(within).await
    }

    fn leases(&self) -> Option<Arc<dyn LeaseProvider>> {
        // Those that were had before are refused, as long as the broker is a process of Mastra.
        let native = !self.remote.link.is_foreign();
        native.then(|| Arc::new(UnixLeases(self.remote.clone())) as _)
    }
}

/// Events that travel together.
struct Piece {
    events: Run,
    count: usize,
}

/// Writes events, in pieces that travel well: all of them, or none is sent.
fn pieces(events: &[Arc<Event>], limit: usize, tagged: bool) -> Result<Vec<Piece>> {
    let (mut pieces, mut records, mut count) = (Vec::new(), Vec::new(), 0);
    for event in events {
        if count == PIECE_EVENTS || records.len() >= PIECE_BYTES {
            pieces.push(Piece { events: Run::written(std::mem::take(&mut records)), count: std::mem::take(&mut count) });
        }
        record::write(event, limit, tagged, &mut records).map_err(|error| error.on(event.id()))?;
        count += 1;
        // As much for each of the others, which are alike more often than not.
        if count == 1 {
            records.reserve_exact((records.len() * (events.len() - 1).min(PIECE_EVENTS)).min(PIECE_BYTES));
        }
    }
    if count > 0 {
        pieces.push(Piece { events: Run::written(records), count });
    }
    Ok(pieces)
}

fn no_start(gap: NoStart) -> Error {
    ErrorKind::Gap(Gap::from(gap)).into()
}

fn group_status(state: GroupState) -> Option<GroupStatus> {
    let mut status = GroupStatus::new(pubsub_core::Group::new(&state.group).ok()?);
    let age = |millis: i64| u64::try_from(Timestamp::now().as_millis() - millis).unwrap_or(0);
    (status.waiting, status.held, status.members) = (Some(state.waiting), Some(state.held), Some(state.members));
    status.oldest = state.oldest.map(|millis| Duration::from_millis(age(millis)));
    Some(status)
}

impl fmt::Debug for UnixSocketPubSub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnixSocketPubSub").field("path", &self.path).finish_non_exhaustive()
    }
}
