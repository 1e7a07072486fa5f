//! An event bus over HTTP: topics as server-sent events that survive their connection, publishing, and webhooks both ways.
//!
//! # Example
//!
//! ```
//! use pubsub_core::Bus;
//! use pubsub_emitter::EventEmitterPubSub;
//! use pubsub_http::{Access, Action, HttpBuilder, ServeOptions, Verdict, serve};
//! use tokio::net::TcpListener;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bus = Bus::from(EventEmitterPubSub::new());
//! let may = |access: Access<'_>| match access.action {
//!     Action::Follow if access.topic.is_some_and(|topic| topic.as_str().starts_with("public.")) => Verdict::Allow,
//!     _ => Verdict::Deny,
//! };
//! let router = HttpBuilder::new(bus).authorize(may).build()?;
//! let app = axum::Router::new().nest("/bus", router);
//! let listener = TcpListener::bind("127.0.0.1:0").await?;
//! let stop = std::future::ready(()); // here: at once; else a signal
//! serve(listener, app, ServeOptions::new(), stop).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Routes
//!
//! | | |
//! | --- | --- |
//! | `GET /{topic}/events` | the topic as server-sent events. `?start=latest` (as without), `earliest` or an index; `?after=` a cursor |
//! | `POST /{topic}/events` | publishes one event or an array of events, in the [JSON form](pubsub_core::wire) of which only `type` is needed |
//! | `GET /health` | status, since when, streams, and the backlog of [chosen topics](HttpBuilder::backlog_of); 200 if connected, else 503 |
//!
//! A topic with a `/` in its name is written with `%2F`. Topics are not listed anywhere. Other parameters of a stream are left to the
//! authorisation and to what stands in between: an `EventSource` cannot send headers. The answer of `/health` is `{"status", "since",
//! "streams", "backlog"?}`, the last of them `{TOPIC: {GROUP: {"waiting", "held", "oldestMillis", "members"}}}`, where null is not known.
//!
//! # Streams
//!
//! - **An event** is an unnamed message, whose data is the event's JSON form and whose id is its [cursor](pubsub_core::Cursor). Other ids
//!   say that the stream began with an event (`@` behind its cursor) or on a topic without any (`earliest`), that nothing is retained
//!   (`live`), or (`+` behind one of those) that the event itself is not, as one published `local_only`. An id is given back as it came.
//! - **A client that lost its connection** gives the last id back (`Last-Event-ID`; a browser's `EventSource` does so by itself) and goes
//!   on right behind it. A stream tells where it begins before its first event, so that nothing is missed even then; only one that
//!   starts at an index leaves that to its address, and tells it with its first event.
//! - **`gap`** is an event of that name: `{"reason", "missed"?}`. Events are missing, because they were `trimmed` away, the position is
//!   `ahead`, of an `otherGeneration` or `otherBus` (as is an id that cannot be read); because the client was slow and nothing is
//!   retained (`lagged`); or because it was away and nothing is (`notRetained`). The stream goes on with the earliest that is retained.
//!   What is trimmed while this is found out may be counted twice, and is never left out. Whoever began on a topic without events is told
//!   of those trimmed since if the bus numbers them, and of none that were cleared.
//! - **`end`** is an event of that name, `{"reason":"cleared"}`: the topic was cleared, and what follows is another history. It comes with
//!   the first event after, or within two heartbeats. A page should close its `EventSource` then. A stream that ends without it is to
//!   be resumed: the server was stopped, or the stream's [lifetime](HttpBuilder::stream_lifetime) was over.
//! - **Back-pressure** is per client. One that is slow is not written to, and holds nobody up: it reads what it missed from the history,
//!   or is told how much it missed.
//! - Events published `local_only` that cannot be encoded are passed over.
//!
//! # Publishing
//!
//! An event that bears an `id` is published as that; one without takes the header `Idempotency-Key`, with `.0`, `.1` and so on behind it
//! for those of an array. Publishing the same again is the same event wherever the bus recognises it
//! ([`Deduplication`](pubsub_core::Deduplication)); so is another event under the same id, which is then not kept. The answer is `{"events":[{"id","cursor"?}]}`, or a problem (RFC 9457) with the
//! `fates` of the events: `published`, `notSent` or `unknown`.
//!
//! # Pushing and taking in
//!
//! A [`Push`] delivers a subscription to a URL; an [`Intake`] is what stands behind one. They fit each other, and each fits others: a push
//! can go to any URL, the `POST /{topic}/events` of another bus among them, and an intake takes what Google Cloud Pub/Sub pushes, or
//! [any JSON](Form::Json).
//!
//! ```
//! use pubsub_core::{Bus, Event};
//! use pubsub_emitter::EventEmitterPubSub;
//! use pubsub_http::{Form, Intake, Push, Pushed, Secret, ServeOptions, serve};
//! use tokio::net::TcpListener;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let secret = Secret::new("32 random bytes, kept by both ends")?;
//! let (told, mut orders) = tokio::sync::mpsc::channel(1);
//! let intake = Intake::new(Form::Events).secret(secret.clone()).handle(move |order: Pushed| {
//!     let told = told.clone();
//!     async move { Ok(told.send(order).await?) } // an error is a retry
//! })?;
//! let listener = TcpListener::bind("127.0.0.1:0").await?;
//! let url = format!("http://{}/", listener.local_addr()?);
//! tokio::spawn(serve(listener, intake, ServeOptions::new(), std::future::pending()));
//!
//! let bus = Bus::from(EventEmitterPubSub::new());
//! let mut subscription = bus.subscribe_group("orders", "billing").await?;
//! let push = Push::to(url).secret(secret).allow_private(true).build()?; // private: it is this host
//! tokio::spawn(async move { push.run(&mut subscription).await });
//! bus.publish("orders", Event::new("order.placed")).await?;
//! let order = orders.recv().await.expect("it was pushed");
//! assert_eq!((order.event().event_type(), order.attempt()), ("order.placed", 1));
//! # Ok(())
//! # }
//! ```
//!
//! - **Settlement.** What the handler returns is what becomes of the delivery: 204 is done, 503 a retry after `Retry-After` if it asks for
//!   one, 422 a dead letter. The header `pubsub-settle` says which, so that a plain 503 of a proxy stays a plain retry. A handler is cancelled
//!   when its delivery is lost to another member or its sender gone. What is lost on the way is pushed again: handle by event id.
//! - **Signatures** ([`SIGNATURE`]) are HMAC-SHA-256 over time, nonce and body. An intake refuses what is forged, older than its window or
//!   used before, compares in constant time, and takes several secrets, so that one can be replaced. What was used an intake remembers for
//!   itself: another with the same secret, or its own next life, takes the same once more within the window. URLs are not signed.
//! - **Where pushes go.** A name is resolved and its addresses checked by the code that connects, so that what was checked is what is
//!   connected to. Addresses that are not public are refused unless [allowed](PushBuilder::allow_private). Redirects are not followed;
//!   proxies of the environment are not used. `https:` needs the feature `tls` (rustls with this host's root certificates).
//! - **Google's OIDC tokens** stand in the header `Authorization`: the intake's [hook](Intake::authorize) checks them, with a library for
//!   tokens.
//!
//! # Authorisation
//!
//! Every request passes a [hook](Authorize) that sees its topic, action and head, before its body is read. Without one, nothing is
//! allowed.
//!
//! # Limits
//!
//! Those of [`HttpBuilder`] and [`Intake`] hold under any server; those of [`ServeOptions`] under [`serve()`]. A push has those of
//! [`PushBuilder`], and reads at most 64 KiB of an answer's head and as much of its body.
//!
//! # When the peer dies
//!
//! A client's connection that ends takes its stream and subscription with it, and what an intake runs for it, at once or (if it has sent
//! more than was read) within half a second. One that takes nothing is closed after [`stall_timeout`](ServeOptions::stall_timeout), once
//! the connection's buffers are full; one whose host answers nothing, after about twice that. When this server dies, clients connect to the next and resume; what that needs is in
//! the bus. A receiver of pushes that is gone is tried again as the subscription's policy says; a pusher that dies leaves its group's
//! deliveries to the other members, or to its next life where groups are durable.

mod access;
mod address;
mod builder;
mod connect;
mod envelope;
mod health;
mod intake;
mod publish;
mod push;
mod refusal;
mod request;
mod room;
mod serve;
mod settle;
mod signature;
mod sse;
mod stream;

pub use access::{Access, Action, Authorize, Verdict};
pub use builder::HttpBuilder;
pub use intake::{Form, Intake, Pushed};
pub use push::{Push, PushBuilder};
pub use serve::{ServeOptions, serve};
pub use signature::{SIGNATURE, Secret};
