//! Which backends there are: a value, not a global.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use pubsub_core::{Bus, Error, Result};

use crate::nearest::nearest;
use crate::url::is_scheme;
use crate::{BusUrl, leases};

/// How deep buses may take their leases from one another.
pub const MAX_NESTING: usize = 4;

/// The schemes this crate knows of, and the cargo feature that brings each; none where this version has no such backend.
const BACKENDS: &[(&str, Option<&str>)] =
    &[("memory", Some("memory")), ("unix", None), ("redis", Some("redis")), ("rediss", Some("rediss")), ("gcp", None)];

/// The cargo feature that brings the replay decorator; none where this version has none.
const REPLAY: Option<&str> = None;

type Factory = Arc<dyn Fn(&mut BusUrl) -> Result<BoxFuture<'static, Result<Bus>>> + Send + Sync>;

/// The backends a URL can name. Cheap to clone; a clone is independent.
///
/// ```
/// use pubsub_connect::{BusUrl, Registry};
/// use pubsub_core::Bus;
/// use pubsub_emitter::EventEmitterPubSub;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> pubsub_core::Result<()> {
/// let registry = Registry::with_defaults().register("lab", |url: &mut BusUrl| {
///     let builder = EventEmitterPubSub::builder().max_payload(url.size("frame")?.unwrap_or(1024));
///     Ok(async move { Ok(Bus::from(builder.build()?)) })
/// })?;
/// let bus = registry.connect("lab:?frame=2KiB").await?;
/// assert_eq!(bus.capabilities().max_payload, Some(2048));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct Registry {
    factories: BTreeMap<String, Factory>,
}

impl Registry {
    /// A registry without any backend.
    pub fn new() -> Self {
        Self::default()
    }

    /// A registry of the backends this crate was built with.
    pub fn with_defaults() -> Self {
        let registry = Self::new();
        #[cfg(feature = "memory")]
        let registry = registry.with("memory", crate::memory::memory);
        #[cfg(feature = "redis")]
        let registry = registry.with("redis", crate::redis::redis);
        #[cfg(feature = "rediss")]
        let registry = registry.with("rediss", crate::redis::redis);
        registry
    }

    /// Adds a backend under a scheme, in place of any that was registered under it before.
    ///
    /// The factory first takes what it needs out of the URL, without waiting for anything; the future it returns connects. In
    /// between, options that the factory did not ask for are refused, so that a misspelt one is told before anything is
    /// connected. The options `leases` and `replay` are the registry's own.
    ///
    /// # Errors
    /// `InvalidOption` if `scheme` is not a lower-case letter followed by lower-case letters, digits, `+`, `-` and `.`, 32 in
    /// all at most.
    pub fn register<F, Fut>(self, scheme: &str, factory: F) -> Result<Self>
    where
        F: Fn(&mut BusUrl) -> Result<Fut> + Send + Sync + 'static,
        Fut: Future<Output = Result<Bus>> + Send + 'static,
    {
        if !is_scheme(scheme) || scheme != scheme.to_ascii_lowercase() {
            let why = "takes a lower-case letter, then lower-case letters, digits, `+`, `-` and `.`, 32 in all at most";
            return Err(Error::invalid_option("scheme", why).during("register").on(scheme));
        }
        Ok(self.with(scheme, factory))
    }

    fn with<F, Fut>(mut self, scheme: &str, factory: F) -> Self
    where
        F: Fn(&mut BusUrl) -> Result<Fut> + Send + Sync + 'static,
        Fut: Future<Output = Result<Bus>> + Send + 'static,
    {
        self.factories.insert(scheme.to_owned(), Arc::new(move |url| Ok(factory(url)?.boxed())));
        self
    }

    /// Connects to the bus a URL names.
    ///
    /// Dropping the future leaves nothing connected.
    ///
    /// # Errors
    /// `InvalidOption` names the option that is at fault, or `url`; else what the backend's own connecting fails with.
    pub async fn connect(&self, url: &str) -> Result<Bus> {
        self.connect_nested(url, 0).await
    }

    fn connect_nested<'a>(&'a self, url: &'a str, depth: usize) -> BoxFuture<'a, Result<Bus>> {
        async move {
            let mut url: BusUrl = url.parse()?;
            let shown = url.to_string();
            match self.open(&mut url, depth).await {
                Ok(bus) => {
                    tracing::debug!(url = shown, "connected");
                    Ok(bus)
                }
                Err(error) => Err(error.during("connect").on(shown)),
            }
        }
        .boxed()
    }

    async fn open(&self, url: &mut BusUrl, depth: usize) -> Result<Bus> {
        let factory = self.factories.get(url.scheme()).ok_or_else(|| self.no_backend(url.scheme()))?;
        if url.text("replay").is_some() {
            return Err(Error::invalid_option(
                "replay",
                match REPLAY {
                    Some(feature) => format!("needs the cargo feature `{feature}` of pubsub-connect"),
                    None => "this version of pubsub-connect has no replay".to_owned(),
                },
            ));
        }
        let lender = url.text("leases").map(str::to_owned);
        let connecting = factory(url)?;
        url.refuse_leftovers()?;
        let Some(lender) = lender else { return connecting.await };
        if depth == MAX_NESTING {
            return Err(Error::invalid_option("leases", format!("is nested more than {MAX_NESTING} deep")));
        }
        // The subject is the lender's URL, or, where that is none, the option it stands in.
        let lender = self.connect_nested(&lender, depth + 1).await.map_err(|error| error.on("leases"))?;
        let Some(leases) = lender.leases() else {
            return Err(Error::invalid_option("leases", "names a bus that has no leases"));
        };
        Ok(leases::lend(connecting.await?, lender, leases))
    }

    fn no_backend(&self, scheme: &str) -> Error {
        let known = BACKENDS.iter().map(|(known, _)| *known);
        let why = match BACKENDS.iter().find(|(known, _)| *known == scheme) {
            Some((_, Some(feature))) => format!(
                "`{scheme}:` needs the cargo feature `{feature}` of pubsub-connect, and in a registry `Registry::with_defaults`"
            ),
            Some((_, None)) => format!("this version of pubsub-connect has no backend for `{scheme}:`"),
            None => match nearest(scheme, known.chain(self.factories.keys().map(String::as_str))) {
                Some(near) => format!("has the unknown scheme `{scheme}`; the nearest known one is `{near}`"),
                None => format!("has the unknown scheme `{scheme}`"),
            },
        };
        Error::invalid_option("url", why)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("schemes", &self.factories.keys()).finish()
    }
}
