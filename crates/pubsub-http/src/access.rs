//! Who may do what: a hook that denies unless it allows.

use async_trait::async_trait;
use http::request::Parts;
use pubsub_core::Topic;

/// What a request wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// Follow a topic as a stream.
    Follow,
    /// Publish to a topic.
    Publish,
    /// Ask how the bus is.
    Health,
    /// Deliver pushed events to an [`Intake`](crate::Intake).
    Deliver,
}

/// A request that asks to be let in.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Access<'a> {
    /// The topic it names; none for health and for deliveries.
    pub topic: Option<&'a Topic>,
    /// What it wants to do.
    pub action: Action,
    /// Its method, URI and headers. The body has not been read.
    pub request: &'a Parts,
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It is let in.
    Allow,
    /// It did not say who it is, or not credibly: 401.
    Unauthenticated,
    /// Whoever it is may not do this: 403.
    Deny,
}

/// Decides about requests. A plain function of an [`Access`] is one.
///
/// A panic ends the request's connection, and an answer that takes longer than
/// [`request_timeout`](crate::HttpBuilder::request_timeout) is a refusal.
#[async_trait]
pub trait Authorize: Send + Sync + 'static {
    /// Decides about one request. Dropping the future refuses it.
    async fn authorize(&self, access: Access<'_>) -> Verdict;
}

#[async_trait]
impl<F: Fn(Access<'_>) -> Verdict + Send + Sync + 'static> Authorize for F {
    async fn authorize(&self, access: Access<'_>) -> Verdict {
        self(access)
    }
}

/// Lets nobody in: what there is unless the user says otherwise.
pub(crate) fn nobody(_: Access<'_>) -> Verdict {
    Verdict::Deny
}
