//! `GET /{topic}/events`: a topic as server-sent events that resume where their connection was lost.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderName, HeaderValue};
use http_body::Frame;
use pubsub_core::{
    Bus, Capability, Cursor, Delivery, Error, ErrorKind, Gap, Overflow, Result, Start, SubscribeOptions, Subscription, Topic,
};
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};

use crate::access::Action;
use crate::builder::Shared;
use crate::refusal::Refusal;
use crate::request::Named;
use crate::room::Seat;
use crate::serve::Stopping;
use crate::sse;

/// What a reconnecting `EventSource` sends.
const LAST_EVENT_ID: &str = "last-event-id";

/// The id of a stream that began on a topic without events: whoever gives it back starts with the very first.
const BEGINNING: &str = "earliest";

/// Behind a cursor: the stream begins with that event, and not behind it.
const WITH: char = '@';

/// The id of a stream on a bus that retains nothing: whoever gives it back has missed what there was meanwhile.
const LIVE: &str = "live";

/// Behind an id: what came after it has no place that one could come back to, so that what came while nobody listened is missed.
const PLACELESS: char = '+';

/// How many bytes of events are written together at most, but for the last of them.
const FRAME: usize = 16 << 10;

/// How often the head of a busy topic may be trimmed away before a stream could begin behind it.
const TRIES: usize = 4;

pub(crate) async fn follow(State(shared): State<Arc<Shared>>, topic: Named, request: Request) -> Response {
    match try_follow(&shared, topic, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    }
}

async fn try_follow(shared: &Arc<Shared>, topic: Named, request: Request) -> Result<Response, Refusal> {
    let (parts, _) = request.into_parts();
    let topic = shared.admit_to(topic, Action::Follow, &parts).await?;
    let from = From::asked(&parts)?;
    let permit = shared.streams.clone().try_acquire_owned();
    let permit = permit.map_err(|_| Refusal::busy("too many streams are open"))?;
    let opening = Opening { bus: &shared.bus, topic: &topic, prefetch: shared.limits.prefetch };
    let opened = shared.in_time("subscribing", opening.open(from)).await??;
    let stopping = parts.extensions.get().cloned();
    let body = Body::new(Events::new(shared, topic, opened, permit, stopping));
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        // What stands between, such as nginx, would collect events before it passes them on.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, body).into_response())
}

/// Where a stream is asked to begin.
#[derive(Debug, PartialEq, Eq)]
enum From {
    Start(Start),
    /// The client was here. If it then got events that have no place, those of them that it missed are gone.
    Remembered {
        place: Place,
        placeless: bool,
    },
    /// The client was here before, and where it was cannot be found.
    Lost(&'static str),
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    After(Cursor),
    With(Cursor),
    Beginning,
}

impl From {
    /// What a reconnecting client remembers comes before what its address says: an `EventSource` keeps its address for ever.
    fn asked(request: &Parts) -> Result<Self, Refusal> {
        let last = request.headers.get(LAST_EVENT_ID).map(HeaderValue::as_bytes).filter(|id| !id.is_empty());
        if let Some(last) = last {
            return Ok(Self::remembered(std::str::from_utf8(last).unwrap_or_default()));
        }
        let mut from = None;
        for (key, value) in form_urlencoded::parse(request.uri.query().unwrap_or_default().as_bytes()) {
            let asked = match (&*key, &*value) {
                ("start", "latest") => Start::Latest,
                ("start", "earliest") => Start::Earliest,
                ("start", index) => match index.parse() {
                    Ok(index) => Start::Index(index),
                    Err(_) => return Err(Refusal::bad("`start` must be latest, earliest or an index")),
                },
                ("after", cursor) => Start::After(cursor.parse().map_err(|_| Refusal::bad("`after` must be a cursor"))?),
                // Others are for those in between and for the authorisation: an `EventSource` cannot send headers.
                _ => continue,
            };
            if from.replace(asked).is_some() {
                return Err(Refusal::bad("one start is enough"));
            }
        }
        Ok(Self::Start(from.unwrap_or(Start::Latest)))
    }

    fn remembered(id: &str) -> Self {
        let (id, placeless) = id.strip_suffix(PLACELESS).map_or((id, false), |id| (id, true));
        let cursor = |text: &str| text.parse::<Cursor>().ok();
        let place = match id.strip_suffix(WITH) {
            Some(first) => cursor(first).map(Place::With),
            None if id == BEGINNING => Some(Place::Beginning),
            None => cursor(id).map(Place::After),
        };
        match place {
            Some(place) => Self::Remembered { place, placeless },
            None if id == LIVE => Self::Lost("notRetained"),
            // Of another bus, as far as anybody can tell: a client that keeps coming back with it must be able to go on.
            None => Self::Lost("otherBus"),
        }
    }
}

/// A subscription, and what its stream says first.
struct Opened {
    subscription: Subscription,
    id: Option<String>,
    /// A position of the generation that is followed, if one is known.
    known: Option<Cursor>,
    gap: Option<Value>,
}

/// What is opened, and for whom.
struct Opening<'a> {
    bus: &'a Bus,
    topic: &'a Topic,
    prefetch: usize,
}

impl Opening<'_> {
    async fn open(&self, from: From) -> Result<Opened> {
        let capabilities = self.bus.capabilities();
        let retains = capabilities.supports(Capability::History);
        match from {
            From::Start(Start::Latest) if !retains => self.live().await,
            From::Start(Start::Latest) => self.latest().await,
            From::Start(Start::Earliest) => self.earliest().await,
            From::Start(Start::After(_)) | From::Remembered { .. } if !retains => self.live_after(not_retained()).await,
            From::Start(start) => self.at(start).await,
            From::Remembered { place, placeless } => {
                let mut opened = match place {
                    Place::After(cursor) => self.at(Start::After(cursor)).await?,
                    Place::With(first) => {
                        let opened = self.earliest().await?;
                        Opened { gap: self.missed(&first, opened.known.as_ref()).await?, ..opened }
                    }
                    Place::Beginning if capabilities.supports(Capability::Index) => {
                        let opened = self.at(Start::Index(0)).await?;
                        Opened { id: opened.id.or(Some(BEGINNING.to_owned())), ..opened }
                    }
                    Place::Beginning => self.earliest().await?,
                };
                if placeless {
                    opened.gap.get_or_insert_with(not_retained);
                }
                Ok(opened)
            }
            From::Lost(why) if retains => Ok(Opened { gap: Some(json!({"reason": why})), ..self.earliest().await? }),
            From::Lost(why) => self.live_after(json!({"reason": why})).await,
        }
    }

    async fn subscribe(&self, start: Start) -> Result<Subscription> {
        // A client that is too slow misses events, or reads them from what is retained; it makes no publisher wait.
        let options = SubscribeOptions::fan_out().start(start).overflow(Overflow::DropOldest).prefetch(self.prefetch);
        self.bus.subscribe_with(self.topic, options).await
    }

    /// From now on, on a bus that retains nothing.
    async fn live(&self) -> Result<Opened> {
        let subscription = self.subscribe(Start::Latest).await?;
        Ok(Opened { subscription, id: Some(LIVE.to_owned()), known: None, gap: None })
    }

    async fn live_after(&self, gap: Value) -> Result<Opened> {
        Ok(Opened { gap: Some(gap), ..self.live().await? })
    }

    /// Begun behind the head, and not just anywhere, a stream can be resumed before its first event.
    async fn latest(&self) -> Result<Opened> {
        let mut id = None;
        for _ in 0..TRIES {
            let Some(head) = self.bus.history(self.topic, Start::Latest, 1).await?.head else { return self.earliest().await };
            id = Some(head.to_string());
            match self.subscribe(Start::After(head.clone())).await {
                Ok(subscription) => {
                    return Ok(Opened { subscription, id: Some(head.to_string()), known: Some(head), gap: None });
                }
                Err(error) if matches!(error.kind(), ErrorKind::Gap(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // So busy that its head is trimmed at once: who comes back with what was the head is told so.
        Ok(Opened { subscription: self.subscribe(Start::Latest).await?, id, known: None, gap: None })
    }

    /// With what is retained.
    async fn earliest(&self) -> Result<Opened> {
        // In this order: what is trimmed in between is told to who comes back, and was in the subscription.
        let subscription = self.subscribe(Start::Earliest).await?;
        let known = self.bus.history(self.topic, Start::Earliest, 1).await?.floor;
        let id = known.as_ref().map_or(BEGINNING.to_owned(), |first| format!("{first}{WITH}"));
        Ok(Opened { subscription, id: Some(id), known, gap: None })
    }

    /// At a place; with what is retained, and told so, if that is gone.
    async fn at(&self, start: Start) -> Result<Opened> {
        let subscription = match self.subscribe(start.clone()).await {
            Ok(subscription) => subscription,
            Err(error) => match error.kind() {
                ErrorKind::Gap(gap) => {
                    let opened = self.earliest().await?;
                    // What was trimmed since is missing, too.
                    let since = self.bus.history(self.topic, start, 1).await;
                    let gap = match since.as_ref().map_err(Error::kind) {
                        Err(ErrorKind::Gap(since)) => told(since),
                        _ => told(gap),
                    };
                    return Ok(Opened { gap: Some(gap), ..opened });
                }
                _ => return Err(error),
            },
        };
        match start {
            Start::After(cursor) => Ok(Opened { subscription, id: Some(cursor.to_string()), known: Some(cursor), gap: None }),
            _ => {
                let known = self.bus.history(self.topic, Start::Latest, 1).await?.head;
                Ok(Opened { subscription, id: None, known, gap: None })
            }
        }
    }

    /// What is missing since this was the earliest event.
    async fn missed(&self, first: &Cursor, floor: Option<&Cursor>) -> Result<Option<Value>> {
        if floor == Some(first) {
            return Ok(None);
        }
        let behind = self.bus.history(self.topic, Start::After(first.clone()), 1).await;
        Ok(Some(match behind.as_ref().map_err(Error::kind) {
            Err(ErrorKind::Gap(Gap::Trimmed { missed })) => told(&Gap::Trimmed { missed: missed.map(|others| others + 1) }),
            Err(ErrorKind::Gap(gap)) => told(gap),
            Err(_) => return behind.map(|_| None),
            Ok(_) => told(&Gap::Trimmed { missed: Some(1) }),
        }))
    }
}

fn not_retained() -> Value {
    json!({"reason": "notRetained"})
}

fn told(gap: &Gap) -> Value {
    match gap {
        Gap::Trimmed { missed: Some(missed) } => json!({"reason": "trimmed", "missed": missed}),
        Gap::Trimmed { missed: None } => json!({"reason": "trimmed"}),
        Gap::Ahead => json!({"reason": "ahead"}),
        Gap::OtherGeneration => json!({"reason": "otherGeneration"}),
        _ => json!({"reason": "otherBus"}),
    }
}

/// The body of a stream. It is polled when its client can take more, and holds nothing back that others wait for: dropping it, as the
/// server does when the connection ends, unsubscribes.
struct Events {
    subscription: Subscription,
    seat: Seat,
    bus: Bus,
    /// What waits to be written. Its memory comes back when what was taken of it has been sent.
    out: BytesMut,
    /// The newest position of the generation that is followed.
    known: Option<Cursor>,
    /// What the client comes back with until an event that has a place is written; and whether one was: then it is that place.
    began: Option<String>,
    moved: bool,
    heartbeat: Duration,
    ends_at: Instant,
    clock: Pin<Box<Sleep>>,
    /// Something was written since the clock was set; an event that has a place was.
    spoke: bool,
    placed: bool,
    /// Whether the topic was cleared while nothing happened on it.
    check: Option<BoxFuture<'static, bool>>,
    ended: bool,
    stopping: Option<BoxFuture<'static, ()>>,
    _permit: OwnedSemaphorePermit,
}

impl Events {
    fn new(
        shared: &Arc<Shared>,
        topic: Topic,
        opened: Opened,
        permit: OwnedSemaphorePermit,
        stopping: Option<Stopping>,
    ) -> Self {
        let Opened { subscription, id, known, gap } = opened;
        let limits = &shared.limits;
        let mut out = BytesMut::new();
        // A client that is told of a gap does not have the place behind it before.
        sse::opening(&mut out, limits.reconnect_after.as_millis(), id.as_ref().filter(|_| gap.is_none()));
        if let Some(gap) = gap {
            id.iter().for_each(|id| sse::id(&mut out, id));
            sse::notice(&mut out, "gap", gap.to_string().as_bytes());
        }
        let now = Instant::now();
        let ends_at = now + limits.stream_lifetime;
        Self {
            subscription,
            seat: shared.rooms.enter(&topic),
            bus: shared.bus.clone(),
            out,
            known,
            began: id.filter(|id| id != LIVE),
            moved: false,
            heartbeat: limits.heartbeat,
            ends_at,
            clock: Box::pin(tokio::time::sleep_until(ends_at.min(now + limits.heartbeat))),
            spoke: true,
            placed: false,
            check: None,
            ended: false,
            stopping: stopping.map(|stopping| stopping.wait().boxed()),
            _permit: permit,
        }
    }

    fn take(&mut self, delivery: &Delivery) -> ControlFlow<()> {
        let cursor = delivery.cursor();
        if let (Some(now), Some(before)) = (&cursor, &self.known)
            && now.scope() != before.scope()
        {
            self.end_cleared();
            return ControlFlow::Break(());
        }
        if delivery.lagged() > 0 {
            let gap = json!({"reason": "lagged", "missed": delivery.lagged()});
            sse::notice(&mut self.out, "gap", gap.to_string().as_bytes());
        }
        let before = self.out.len();
        if cursor.is_none()
            && let Some(place) = self.place()
        {
            sse::id(&mut self.out, format_args!("{place}{PLACELESS}"));
        }
        match self.seat.room().write(delivery, cursor.as_ref(), &mut self.out) {
            Ok(()) if cursor.is_some() => {
                (self.known, self.moved, self.placed) = (cursor, true, true);
            }
            Ok(()) => {}
            // A live value was published to the instance's own subscribers, of which its client is none.
            Err(error) => {
                self.out.truncate(before);
                tracing::debug!(%error, event = %delivery.event().id(), "an event cannot leave the process");
            }
        }
        ControlFlow::Continue(())
    }

    /// What the client comes back with, if it is told nothing else.
    fn place(&self) -> Option<String> {
        if self.moved { self.known.as_ref().map(Cursor::to_string) } else { self.began.clone() }
    }

    fn end_cleared(&mut self) {
        sse::notice(&mut self.out, "end", br#"{"reason":"cleared"}"#);
        self.ended = true;
    }

    /// Takes what there is, up to a frame.
    fn fill(&mut self, cx: &mut Context<'_>) {
        while !self.ended && self.out.len() < FRAME {
            match self.subscription.poll_next_unpin(cx) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(delivery))) => {
                    if self.take(&delivery).is_break() {
                        return;
                    }
                }
                // The client comes again, and is told then if that cannot help.
                Poll::Ready(Some(Err(error))) => {
                    tracing::warn!(%error, "a stream ends");
                    self.ended = true;
                }
                Poll::Ready(None) => self.ended = true,
            }
        }
    }

    /// Has the clock set anew and asks about the topic, when it is time. True if there is something to be written.
    fn tick(&mut self, cx: &mut Context<'_>) -> bool {
        let mut due = false;
        while self.clock.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if now >= self.ends_at {
                self.ended = true;
                return true;
            }
            self.clock.as_mut().reset(self.ends_at.min(now + self.heartbeat));
            if !std::mem::take(&mut self.placed) {
                self.check = self.known.clone().map(|known| was_cleared(self.bus.clone(), &self.subscription, known));
            }
            if !std::mem::take(&mut self.spoke) {
                self.out.extend_from_slice(sse::HEARTBEAT);
                due = true;
            }
        }
        if let Some(check) = &mut self.check
            && let Poll::Ready(cleared) = check.poll_unpin(cx)
        {
            self.check = None;
            if cleared {
                self.end_cleared();
                return true;
            }
        }
        due
    }
}

/// Whether a position is of an earlier generation than what its topic retains now.
fn was_cleared(bus: Bus, subscription: &Subscription, behind: Cursor) -> BoxFuture<'static, bool> {
    let topic = subscription.topic().clone();
    async move {
        let page = bus.history(topic, Start::After(behind), 1).await;
        matches!(page.as_ref().map_err(Error::kind), Err(ErrorKind::Gap(Gap::OtherGeneration)))
    }
    .boxed()
}

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        this.fill(cx);
        this.ended = this.ended || this.stopping.as_mut().is_some_and(|stopping| stopping.poll_unpin(cx).is_ready());
        // However busy it is, it ends in time.
        if !this.out.is_empty() {
            this.ended |= Instant::now() >= this.ends_at;
            this.spoke = true;
            return Poll::Ready(Some(Ok(Frame::data(this.out.split().freeze()))));
        }
        if !this.ended && !this.tick(cx) {
            return Poll::Pending;
        }
        // What silence makes the stream say is no speech. A check begun just now is polled when the frame has been taken.
        if this.out.is_empty() { Poll::Ready(None) } else { Poll::Ready(Some(Ok(Frame::data(this.out.split().freeze())))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &str, last: Option<&str>) -> Result<From, u16> {
        let mut request = http::Request::get(format!("/t/events?{query}"));
        if let Some(last) = last {
            request = request.header(LAST_EVENT_ID, last);
        }
        From::asked(&request.body(()).unwrap().into_parts().0).map_err(|refusal| refusal.status().as_u16())
    }

    #[test]
    fn what_is_remembered_comes_before_what_is_asked() {
        let cursor = |text: &str| Start::After(text.parse().unwrap());
        assert_eq!(asked("", None), Ok(From::Start(Start::Latest)));
        assert_eq!(asked("start=earliest&token=x", None), Ok(From::Start(Start::Earliest)));
        assert_eq!(asked("start=7", Some("")), Ok(From::Start(Start::Index(7))));
        assert_eq!(asked("after=b.g.1.0", None), Ok(From::Start(cursor("b.g.1.0"))));
        let remembered = |place, placeless| Ok(From::Remembered { place, placeless });
        let cursor_of = |text: &str| text.parse::<Cursor>().unwrap();
        assert_eq!(asked("start=earliest", Some("b.g.2.0")), remembered(Place::After(cursor_of("b.g.2.0")), false));
        assert_eq!(asked("", Some("b.g.2.0@")), remembered(Place::With(cursor_of("b.g.2.0")), false));
        assert_eq!(asked("", Some("earliest")), remembered(Place::Beginning, false));
        assert_eq!(asked("", Some("live")), Ok(From::Lost("notRetained")));
        assert_eq!(asked("", Some("b.g.2.0+")), remembered(Place::After(cursor_of("b.g.2.0")), true));
        assert_eq!(asked("", Some("b.g.2.0@+")), remembered(Place::With(cursor_of("b.g.2.0")), true));
        assert_eq!(asked("", Some("earliest+")), remembered(Place::Beginning, true));
        assert_eq!(asked("", Some("+")), Ok(From::Lost("otherBus")));
        assert_eq!(asked("", Some("what?")), Ok(From::Lost("otherBus")));
        for bad in ["start=x", "after=x", "start=1&after=b.g.1.0", "start=-1", "start="] {
            assert_eq!(asked(bad, None), Err(400), "{bad}");
        }
    }
}
