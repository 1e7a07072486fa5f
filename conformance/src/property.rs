//! A property: one sentence about a bus, what it needs, and the code that holds a bus to it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use pubsub_core::{Capability, Groups, Order, Retention};

use crate::{Ctx, Fault, Harness};

/// One property of the contract.
#[derive(Clone)]
pub struct Property {
    id: &'static str,
    title: &'static str,
    clauses: &'static [&'static str],
    needs: Vec<Need>,
    limit: Option<Duration>,
    body: Body,
}

type Run = Arc<dyn Fn(Ctx) -> Pin<Box<dyn Future<Output = Verdict> + Send>> + Send + Sync>;

#[derive(Clone)]
enum Body {
    Run(Run),
    Omitted(&'static str),
}

/// Declares a property: id, one sentence, the clauses it holds a bus to, and how.
pub fn property<F, Fut>(id: &'static str, title: &'static str, clauses: &'static [&'static str], run: F) -> Property
where
    F: Fn(Ctx) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Verdict> + Send + 'static,
{
    let run: Run = Arc::new(move |ctx| Box::pin(run(ctx)));
    Property { id, title, clauses, needs: Vec::new(), limit: None, body: Body::Run(run) }
}

/// Declares a property that is not tested here, and why. It is always reported as ignored.
pub fn omitted(id: &'static str, title: &'static str, clauses: &'static [&'static str], reason: &'static str) -> Property {
    Property { id, title, clauses, needs: Vec::new(), limit: None, body: Body::Omitted(reason) }
}

impl Property {
    /// Adds what it needs; without any of it the property is ignored, with the reason.
    #[must_use]
    pub fn needs(mut self, needs: impl IntoIterator<Item = Need>) -> Self {
        self.needs.extend(needs);
        self
    }

    /// Sets its time limit instead of the harness's.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// The id.
    pub fn id(&self) -> &'static str {
        self.id
    }

    /// What it says.
    pub fn title(&self) -> &'static str {
        self.title
    }

    /// The clauses of the contract it holds a bus to.
    pub fn clauses(&self) -> &'static [&'static str] {
        self.clauses
    }

    /// Why it stays out of this suite altogether, if it does.
    pub fn omitted(&self) -> Option<&'static str> {
        match self.body {
            Body::Run(_) => None,
            Body::Omitted(reason) => Some(reason),
        }
    }

    /// Why it does not run over this harness, or none if it does.
    pub fn ignored(&self, harness: &dyn Harness) -> Option<String> {
        if let Body::Omitted(reason) = self.body {
            return Some(reason.to_owned());
        }
        if let Some(reason) = harness.unavailable() {
            return Some(reason);
        }
        if let Some(reason) = harness.lacks(self.id) {
            return Some(reason.to_owned());
        }
        let missing: Vec<_> = self.needs.iter().filter_map(|need| need.missing(harness)).collect();
        (!missing.is_empty()).then(|| missing.join("; "))
    }

    pub(crate) fn time_limit(&self, harness: &dyn Harness) -> Duration {
        self.limit.unwrap_or(harness.timing().limit)
    }

    pub(crate) fn start(&self, ctx: Ctx) -> Pin<Box<dyn Future<Output = Verdict> + Send>> {
        match &self.body {
            Body::Run(run) => run(ctx),
            &Body::Omitted(reason) => Box::pin(async move { Err(Mismatch::new(format!("cannot run: {reason}"))) }),
        }
    }
}

impl fmt::Debug for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Property").field("id", &self.id).field("title", &self.title).finish_non_exhaustive()
    }
}

/// What a property needs of a harness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// A declared capability.
    Capability(Capability),
    /// The absence of a capability: for properties about what then happens.
    Without(Capability),
    /// Some order of first deliveries, if only among the events of one key.
    Ordered,
    /// Groups that end with their last member.
    EphemeralGroups,
    /// Topics that keep nothing, not even what was not settled.
    NoRetention,
    /// Publishers that wait at a full queue.
    PublishWaits,
    /// A bound on payloads.
    MaxPayload,
    /// Payloads encoded and decoded, and checked to survive it.
    StrictPayloads,
    /// Several instances on one bus.
    CrossInstance,
    /// Counts of what lies below.
    Probe,
    /// A fault that can be injected. Numbers and durations in it do not matter.
    Fault(Fault),
    /// Other processes on the bus.
    SecondProcess,
    /// A way past the encoding.
    RawInjection,
    /// Inline subscriptions.
    Inline,
    /// A harness whose name is this, or starts with this and a `-`: for properties of one backend.
    Backend(&'static str),
}

impl Need {
    /// Why a harness does not have it, or none if it does.
    pub fn missing(self, harness: &dyn Harness) -> Option<String> {
        let capabilities = harness.declared();
        let (met, reason) = match self {
            Self::Capability(capability) => (capabilities.supports(capability), format!("needs {capability}")),
            Self::Without(capability) => (!capabilities.supports(capability), format!("is about buses without {capability}")),
            Self::Ordered => (capabilities.order != Order::Unordered, "needs an order of deliveries".into()),
            Self::EphemeralGroups => {
                (capabilities.groups == Groups::Ephemeral, "is about groups that end with their last member".into())
            }
            Self::NoRetention => (capabilities.retention == Retention::Nothing, "is about buses that retain nothing".into()),
            Self::PublishWaits => (capabilities.publish_waits, "needs publishers that wait at a full queue".into()),
            Self::MaxPayload => (capabilities.max_payload.is_some(), "needs a bound on payloads".into()),
            Self::StrictPayloads => (capabilities.strict_payloads, "needs strict payloads".into()),
            Self::CrossInstance => (harness.spans_instances(), "needs several instances on one bus".into()),
            Self::Probe => (harness.probe().is_some(), "needs a probe of what lies below".into()),
            Self::Fault(fault) => {
                let can = harness.faults().is_some_and(|faults| faults.can(fault));
                (can, format!("needs a fault to inject: {}", fault_name(fault)))
            }
            Self::SecondProcess => (harness.processes().is_some(), "needs a second process on the bus".into()),
            Self::RawInjection => (harness.raw().is_some(), "needs a way past the encoding".into()),
            Self::Inline => (harness.inline().is_some(), "needs inline subscriptions".into()),
            Self::Backend(name) => {
                let rest = harness.name().strip_prefix(name);
                (rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-')), format!("is about the backend {name}"))
            }
        };
        (!met).then_some(reason)
    }
}

fn fault_name(fault: Fault) -> &'static str {
    match fault {
        Fault::Sever => "cut connections",
        Fault::Restart => "a restart",
        Fault::Outage | Fault::Heal => "an outage",
        Fault::Delay(_) => "delay",
        Fault::FailWrites(_) => "failing writes",
        Fault::LoseConfirmations(_) => "lost confirmations",
    }
}

impl From<Capability> for Need {
    fn from(capability: Capability) -> Self {
        Self::Capability(capability)
    }
}

/// What the body of a property returns.
pub type Verdict<T = ()> = Result<T, Mismatch>;

/// How a bus differs from what a property says. Any error becomes one by `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch(String);

impl Mismatch {
    /// A difference, in words.
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    /// The same, saying where it was seen.
    #[must_use]
    pub fn at(self, place: impl fmt::Display) -> Self {
        Self(format!("{place}: {}", self.0))
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Mismatch {
    fn from(error: E) -> Self {
        Self(format!("unexpected error: {error}"))
    }
}

/// What came of a property over one harness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The bus is as the property says.
    Pass,
    /// It is not; the text says how, with the seed.
    Fail(String),
    /// The property did not run; the text says why.
    Ignored(String),
}

/// Fails the property with a text unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::Mismatch::new(format!($($text)+)));
        }
    };
}

/// Fails the property unless two values are equal.
#[macro_export]
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($text:tt)+) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            let what = format!($($text)+);
            return Err($crate::Mismatch::new(format!("{what}: {left:?} is not {right:?}")));
        }
    }};
}
