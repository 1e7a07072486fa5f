//! Taking in what others push: a handler behind a URL.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, StatusCode};
use pubsub_core::machinery::contain_async;
use pubsub_core::{Event, EventId, Failure, Payload, Result, Timestamp};
use tokio::sync::Semaphore;

use crate::access::{Access, Action, Authorize, nobody};
use crate::builder::{MAX_BODY, check_duration, check_size};
use crate::envelope;
use crate::publish;
use crate::refusal::Refusal;
use crate::request::{authorize, check_headers, check_json, read_body};
use crate::settle::answer;
use crate::signature::{Guard, SIGNATURE, Secret};

/// How many bytes there may be of all bodies that have not yet arrived as a whole; or those of the longest one, if that is longer.
const READING: usize = 256 << 20;

/// In which form events are pushed to an [`Intake`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// The [JSON form](pubsub_core::wire) of an event, or an array of such: what a [`Push`](crate::Push) sends.
    Events,
    /// What a push subscription of Google Cloud Pub/Sub sends. Data that is not an event in its JSON form, with type, id and time,
    /// becomes one, of the type `google.pubsub.message`.
    GooglePubSub,
    /// Any JSON, as other services post it: it becomes the data of an event of the type `webhook`, whose id is that of the header
    /// `webhook-id` (of the [Standard Webhooks](https://www.standardwebhooks.com)) or `idempotency-key`, or else a random one.
    Json,
}

/// The type of an event made of any JSON.
const WEBHOOK: &str = "webhook";

/// Who names what it posts does so in one of these.
const WEBHOOK_IDS: [&str; 2] = ["webhook-id", publish::IDEMPOTENCY_KEY];

/// One event that was pushed.
#[derive(Debug, Clone)]
pub struct Pushed {
    event: Arc<Event>,
    attempt: u32,
    subscription: Option<String>,
}

impl Pushed {
    /// The event.
    pub fn event(&self) -> &Arc<Event> {
        &self.event
    }

    /// Which hand-over of it this is, as its sender counts; 1 at first, or if the sender does not say.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The subscription it comes from, if the sender names it.
    pub fn subscription(&self) -> Option<&str> {
        self.subscription.as_deref()
    }
}

/// Makes a route that runs a handler for what is pushed to it, and answers so that the sender settles as the handler decided.
///
/// Nobody may push unless there is a [`secret`](Self::secret), whose signature then suffices, or a hook that
/// [allows](Self::authorize) it; where there are both, both must agree.
#[must_use]
pub struct Intake {
    form: Form,
    secrets: Vec<Secret>,
    authorize: Option<Arc<dyn Authorize>>,
    limits: Limits,
}

#[derive(Debug, Clone)]
struct Limits {
    window: Duration,
    remembered: usize,
    max_body: usize,
    max_batch: usize,
    max_header_bytes: usize,
    max_in_flight: usize,
    handler_timeout: Duration,
    request_timeout: Duration,
}

type Handler = Box<dyn Fn(Pushed) -> BoxFuture<'static, Result<(), Failure>> + Send + Sync>;

struct Shared {
    form: Form,
    guard: Option<Guard>,
    authorize: Option<Arc<dyn Authorize>>,
    limits: Limits,
    /// How many deliveries there is room for, and how many bytes of bodies.
    room: Semaphore,
    reading: Semaphore,
    handler: Handler,
}

impl Intake {
    /// The defaults, for one form.
    pub fn new(form: Form) -> Self {
        let limits = Limits {
            window: Duration::from_secs(300),
            remembered: 100_000,
            max_body: 10 << 20,
            max_batch: 1000,
            max_header_bytes: 16 << 10,
            max_in_flight: 256,
            handler_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(30),
        };
        Self { form, secrets: Vec::new(), authorize: None, limits }
    }

    /// Adds a secret: what is not [signed](SIGNATURE) with one of them is refused. With two, one can be replaced without a pause.
    pub fn secret(mut self, secret: Secret) -> Self {
        self.secrets.push(secret);
        self
    }

    /// Sets who may push: here the OIDC token of Google's pushes is checked, which stands in the header `Authorization`.
    pub fn authorize(mut self, hook: impl Authorize) -> Self {
        self.authorize = Some(Arc::new(hook));
        self
    }

    /// Sets how far a signature's time may be from this host's (5 min).
    pub fn replay_window(mut self, window: Duration) -> Self {
        self.limits.window = window;
        self
    }

    /// Sets how many signatures are remembered, so as to be admitted once (100,000). When it is reached, the oldest is forgotten, and
    /// nothing signed before it is admitted any more.
    pub fn remembered(mut self, signatures: usize) -> Self {
        self.limits.remembered = signatures;
        self
    }

    /// Sets the largest body in bytes (10 MiB). More is answered 413.
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.limits.max_body = bytes;
        self
    }

    /// Sets the most events in one request (1,000). More is answered 413.
    pub fn max_batch(mut self, events: usize) -> Self {
        self.limits.max_batch = events;
        self
    }

    /// Sets the most bytes of a request's headers (16 KiB). More is answered 431.
    pub fn max_header_bytes(mut self, bytes: usize) -> Self {
        self.limits.max_header_bytes = bytes;
        self
    }

    /// Sets how many requests are served at a time (256), and so is one when there are 256 MiB of bodies that have not yet arrived as a
    /// whole. One more is answered 503, with `Retry-After`.
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.limits.max_in_flight = requests;
        self
    }

    /// Sets how long the handler may take for one event (30 s). Then it is cancelled, and the sender retries.
    pub fn handler_timeout(mut self, timeout: Duration) -> Self {
        self.limits.handler_timeout = timeout;
        self
    }

    /// Sets how long authorising and reading a body may take, each (30 s).
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.limits.request_timeout = timeout;
        self
    }

    /// The route, to be nested at any path.
    ///
    /// The handler runs for each event, for those of an array one after another. `Ok` is answered 204. An error, a panic or a time-out is
    /// answered so that the sender retries, or does what the [`Failure`] says, which any error becomes by `?` and which
    /// [`Failure::retry`] and its like make of a text; of an array, the first failure is that of the whole, and those behind it are not
    /// handled. A handler is cancelled when its sender hangs up, and may see an event again: handle by id.
    ///
    /// # Errors
    /// `InvalidOption` naming the option.
    pub fn handle<F, Fut>(self, handler: F) -> Result<Router>
    where
        F: Fn(Pushed) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let Self { form, secrets, authorize, limits } = self;
        limits.validate()?;
        let handler = Arc::new(handler);
        // Called within the future, so that a panic of the call itself is caught with the others.
        let handler: Handler = Box::new(move |pushed| {
            let handler = handler.clone();
            Box::pin(async move { handler(pushed).await })
        });
        let is_signed = !secrets.is_empty();
        let shared = Shared {
            form,
            authorize: authorize.or_else(|| if is_signed { None } else { Some(Arc::new(nobody)) }),
            guard: is_signed.then(|| Guard::new(secrets, limits.window, limits.remembered)),
            room: Semaphore::new(limits.max_in_flight),
            reading: Semaphore::new(limits.max_body.max(READING)),
            limits,
            handler,
        };
        Ok(Router::new().route("/", post(take_in)).with_state(Arc::new(shared)))
    }
}

impl Limits {
    fn validate(&self) -> Result<()> {
        check_duration("replay_window", self.window)?;
        check_size("remembered", self.remembered, 1 << 24)?;
        check_size("max_body", self.max_body, MAX_BODY)?;
        check_size("max_batch", self.max_batch, 1 << 20)?;
        check_size("max_header_bytes", self.max_header_bytes, 1 << 20)?;
        check_size("max_in_flight", self.max_in_flight, 1 << 20)?;
        check_duration("handler_timeout", self.handler_timeout)?;
        check_duration("request_timeout", self.request_timeout)
    }
}

impl std::fmt::Debug for Intake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Intake").field("form", &self.form).field("limits", &self.limits).finish_non_exhaustive()
    }
}

async fn take_in(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    match shared.take_in(request).await {
        Ok(outcome) => answer(outcome),
        Err(refusal) => refusal.into_response(),
    }
}

impl Shared {
    async fn take_in(&self, request: Request) -> Result<Result<(), Failure>, Refusal> {
        let (parts, body) = request.into_parts();
        check_headers(&parts.headers, self.limits.max_header_bytes)?;
        if let Some(hook) = &self.authorize {
            let access = Access { topic: None, action: Action::Deliver, request: &parts };
            authorize(hook, access, self.limits.request_timeout).await?;
        }
        check_json(&parts.headers)?;
        let body = read_body(body, self.limits.max_body, self.limits.request_timeout, Some(&self.reading)).await?;
        if let Some(guard) = &self.guard {
            let signature = parts.headers.get(SIGNATURE).and_then(|value| value.to_str().ok());
            let now = u64::try_from(Timestamp::now().as_millis()).unwrap_or(0);
            let refuse = |why: crate::signature::Refused| Refusal::new(StatusCode::UNAUTHORIZED, why.to_string());
            guard.admit(signature, &body, now).map_err(refuse)?;
        }
        // Taken by what is known to be a delivery: who sends slowly, and nothing that is signed, keeps none.
        let _place = self.room.try_acquire().map_err(|_| Refusal::busy("too many deliveries at once"))?;
        for pushed in self.read(&parts.headers, &body)? {
            if let Err(failure) = self.run(pushed).await {
                return Ok(Err(failure));
            }
        }
        Ok(Ok(()))
    }

    fn read(&self, headers: &HeaderMap, body: &Bytes) -> Result<Vec<Pushed>, Refusal> {
        match self.form {
            Form::Events => {
                let pushed = |decoded: pubsub_core::wire::Decoded| Pushed {
                    event: Arc::new(decoded.event),
                    attempt: decoded.attempt.unwrap_or(1).max(1),
                    subscription: None,
                };
                Ok(publish::read(body, None, self.limits.max_batch)?.into_iter().map(pushed).collect())
            }
            Form::GooglePubSub => {
                let envelope::Opened { event, attempt, subscription } = envelope::open(body)?;
                Ok(vec![Pushed { event: Arc::new(event), attempt, subscription }])
            }
            Form::Json => {
                let named = WEBHOOK_IDS.iter().find_map(|name| headers.get(*name)?.to_str().ok());
                let id = named.map_or_else(|| Ok(EventId::random()), EventId::new)?;
                let event = Event::stamped(id, WEBHOOK, Timestamp::now()).with_payload(Payload::json(body.clone())?);
                Ok(vec![Pushed { event: Arc::new(event), attempt: 1, subscription: None }])
            }
        }
    }

    async fn run(&self, pushed: Pushed) -> Result<(), Failure> {
        let event = pushed.event.clone();
        let handled = contain_async(|| (self.handler)(pushed));
        match tokio::time::timeout(self.limits.handler_timeout, handled).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(panic)) => {
                tracing::error!(event = %event.id(), %panic, "a handler of pushed events panicked");
                Err(Failure::retry("the handler panicked")) // what it said is no business of the sender's
            }
            Err(_) => Err(Failure::retry(format!("the handler ran longer than {:?}", self.limits.handler_timeout))),
        }
    }
}
