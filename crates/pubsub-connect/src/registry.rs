//! Which backends there are: a value, not a global.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use pubsub_core::{Bus, Error, Result};

use crate::nearest::nearest;
#[cfg(feature = "replay")]
use crate::replay::StoreFactory;
use crate::url::is_scheme;
use crate::{BusUrl, leases};

/// How deep buses may take their leases from one another.
pub const MAX_NESTING: usize = 4;

/// The schemes this crate knows of, and the cargo feature that brings each.
const BACKENDS: &[(&str, &str)] = &[
    ("memory", "memory"),
    ("unix", "unix"),
    ("redis", "redis"),
    ("redis+unix", "redis"),
    ("redis-sentinel", "redis"),
    ("redis-cluster", "redis"),
    ("rediss", "rediss"),
    ("rediss-sentinel", "rediss"),
    ("rediss-cluster", "rediss"),
    ("gcp", "gcp"),
];

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
    /// The stores that `replay` can name.
    #[cfg(feature = "replay")]
    stores: BTreeMap<String, StoreFactory>,
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
        #[cfg(all(feature = "unix", target_os = "linux"))]
        let registry = registry.with("unix", crate::unix::unix);
        #[cfg(feature = "replay")]
        let registry = registry.with_store("memory", crate::replay::memory);
        #[cfg(feature = "redis")]
        let registry = registry.with_redis(crate::redis::PLAIN);
        #[cfg(feature = "rediss")]
        let registry = registry.with_redis(crate::redis::ENCRYPTED);
        #[cfg(feature = "gcp")]
        let registry = registry.with("gcp", crate::gcp::gcp);
        registry
    }

    /// Adds Redis under these schemes, as a bus and as a store.
    #[cfg(feature = "redis")]
    fn with_redis(self, schemes: &[&str]) -> Self {
        let registry = schemes.iter().fold(self, |registry, scheme| registry.with(scheme, crate::redis::redis));
        #[cfg(feature = "replay")]
        let registry = schemes.iter().fold(registry, |registry, scheme| registry.with_store(scheme, crate::redis::store));
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
        check_scheme(scheme, "register")?;
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

    /// Adds a kind of store that `replay` can name, under a scheme, in place of any that was registered under it before. The factory
    /// does as one of a backend: it takes what it needs out of the store's own URL first.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    #[cfg(feature = "replay")]
    pub fn register_store<F, Fut>(self, scheme: &str, factory: F) -> Result<Self>
    where
        F: Fn(&mut BusUrl) -> Result<Fut> + Send + Sync + 'static,
        Fut: Future<Output = Result<Arc<dyn pubsub_cache::ServerCache>>> + Send + 'static,
    {
        check_scheme(scheme, "register_store")?;
        Ok(self.with_store(scheme, factory))
    }

    #[cfg(feature = "replay")]
    fn with_store<F, Fut>(mut self, scheme: &str, factory: F) -> Self
    where
        F: Fn(&mut BusUrl) -> Result<Fut> + Send + Sync + 'static,
        Fut: Future<Output = Result<Arc<dyn pubsub_cache::ServerCache>>> + Send + 'static,
    {
        self.stores.insert(scheme.to_owned(), Arc::new(move |url| Ok(factory(url)?.boxed())));
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
        let replaying = self.replaying(url)?;
        let lender = url.text("leases").map(str::to_owned);
        let connecting = factory(url)?;
        if let Some((store, _)) = &replaying
            && let Some(option) = url.leftover_of(store)
        {
            let why = format!("is an option of the store: it goes into `replay`, as in `replay=memory%3F{option}=VALUE`");
            return Err(Error::invalid_option(option.to_owned(), why));
        }
        url.refuse_leftovers()?;
        let lender = match lender {
            Some(_) if depth == MAX_NESTING => {
                return Err(Error::invalid_option("leases", format!("is nested more than {MAX_NESTING} deep")));
            }
            // The subject is the lender's URL, or, where that is none, the option it stands in.
            Some(lender) => Some(self.connect_nested(&lender, depth + 1).await.map_err(|error| error.on("leases"))?),
            None => None,
        };
        let mut bus = connecting.await?;
        if let Some((_, decorate)) = replaying {
            bus = decorate(bus).await?;
        }
        let Some(lender) = lender else { return Ok(bus) };
        let Some(leases) = lender.leases() else {
            return Err(Error::invalid_option("leases", "names a bus that has no leases"));
        };
        Ok(leases::lend(bus, lender, leases))
    }

    /// What `replay` and the decorator's own options ask for: once everything of the URL has been checked, it decorates. With it come
    /// the options that the store takes.
    #[cfg(feature = "replay")]
    fn replaying(&self, url: &mut BusUrl) -> Result<Option<(Vec<&'static str>, Decorate)>> {
        use crate::replay::{Options, store_url};

        let Some(store) = url.text("replay").map(str::to_owned) else { return Ok(None) };
        let options = Options::take(url)?;
        // The subject is the store's URL, or, where that is none, the option it stands in.
        let mut store = store_url(&store, url).map_err(|error| error.on("replay"))?;
        let shown = store.to_string();
        let in_store = move |error: Error| error.on(&shown);
        let factory = self.stores.get(store.scheme()).ok_or_else(|| {
            let near = nearest(store.scheme(), self.stores.keys().map(String::as_str));
            let near = near.map(|near| format!("; the nearest known one is `{near}`")).unwrap_or_default();
            Error::invalid_option("replay", format!("names the unknown store `{}`{near}", store.scheme()))
        })?;
        let connecting = factory(&mut store).map_err(&in_store)?;
        store.refuse_leftovers().map_err(&in_store)?;
        let takes = store.asked().to_vec();
        let private = store.scheme() == "memory";
        let decorate = async move |bus: Bus| {
            if private {
                refuse_to_hide_history(&bus)?;
            }
            options.decorate(&bus, connecting.await.map_err(in_store)?)
        };
        let decorate: Decorate = Box::new(move |bus| decorate(bus).boxed());
        Ok(Some((takes, decorate)))
    }

    #[cfg(not(feature = "replay"))]
    fn replaying(&self, url: &mut BusUrl) -> Result<Option<(Vec<&'static str>, Decorate)>> {
        match url.text("replay") {
            Some(_) => Err(Error::invalid_option("replay", "needs the cargo feature `replay` of pubsub-connect")),
            None => Ok(None),
        }
    }

    fn no_backend(&self, scheme: &str) -> Error {
        let known = BACKENDS.iter().map(|(known, _)| *known);
        let why = match BACKENDS.iter().find(|(known, _)| *known == scheme) {
            Some((_, feature)) => format!(
                "`{scheme}:` needs the cargo feature `{feature}` of pubsub-connect, and in a registry `Registry::with_defaults`"
            ),
            None => match nearest(scheme, known.chain(self.factories.keys().map(String::as_str))) {
                Some(near) => format!("has the unknown scheme `{scheme}`; the nearest known one is `{near}`"),
                None => format!("has the unknown scheme `{scheme}`"),
            },
        };
        Error::invalid_option("url", why)
    }
}

/// Puts a decorator over a bus that has been connected.
type Decorate = Box<dyn FnOnce(Bus) -> BoxFuture<'static, Result<Bus>> + Send>;

/// A store within the process would hide the history that processes share, and each would have another one.
#[cfg(feature = "replay")]
fn refuse_to_hide_history(bus: &Bus) -> Result<()> {
    use pubsub_core::{Reach, Retention};

    let capabilities = bus.capabilities();
    if capabilities.reach == Reach::Process || capabilities.retention != Retention::History {
        return Ok(());
    }
    let why = "would hide the history that this bus keeps for all its processes behind one of this process alone: leave it out, or name a \
               store that they share, as in `replay=redis%3A%2F%2F127.0.0.1`";
    Err(Error::invalid_option("replay", why))
}

fn check_scheme(scheme: &str, operation: &'static str) -> Result<()> {
    if is_scheme(scheme) && scheme == scheme.to_ascii_lowercase() {
        return Ok(());
    }
    let why = "takes a lower-case letter, then lower-case letters, digits, `+`, `-` and `.`, 32 in all at most";
    Err(Error::invalid_option("scheme", why).during(operation).on(scheme))
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("schemes", &self.factories.keys()).finish()
    }
}
