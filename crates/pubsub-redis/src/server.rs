//! Which server, and who to be there.

use std::fmt;
use std::path::PathBuf;

use fred::types::config::{Config, Server, ServerConfig};
use pubsub_core::{Error, Result};

use crate::cluster::Place;

/// Where to connect to and who to be there: one server by host and port or by its socket, or one that sentinels watch, or a
/// cluster. Its `Debug`
/// shows no credentials.
#[derive(Clone)]
pub struct RedisServer(Config);

impl RedisServer {
    /// The server at this host and port.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self::of(ServerConfig::new_centralized(host.into(), port))
    }

    /// The server that listens on the Unix socket at this path.
    #[cfg(unix)]
    pub fn unix_socket(path: impl Into<PathBuf>) -> Self {
        Self::of(ServerConfig::new_unix_socket(path))
    }

    /// The master of a service, as the sentinels at these hosts and ports name it. When they make another server the master, the
    /// connections move there. What the old one had confirmed and not passed on is lost with it, unless it is told to wait
    /// for its replicas (`min-replicas-to-write`).
    pub fn sentinel(service: impl Into<String>, sentinels: impl IntoIterator<Item = (String, u16)>) -> Self {
        let hosts = sentinels.into_iter().map(|(host, port)| Server::new(host, port)).collect();
        Self::of(ServerConfig::Sentinel { hosts, service_name: service.into(), username: None, password: None })
    }

    /// The cluster of which the nodes at these hosts and ports are some: the others are found by asking. It has no numbered databases.
    pub fn cluster(nodes: impl IntoIterator<Item = (String, u16)>) -> Self {
        Self::of(ServerConfig::new_clustered(nodes.into_iter().collect()))
    }

    fn of(server: ServerConfig) -> Self {
        Self(Config { server, ..Config::default() })
    }

    /// What a URL names: `redis://[user:password@]host[:port][/database]`,
    /// `redis-sentinel://[user:password@]host[:port][/database]?sentinelServiceName=SERVICE[&node=host:port...]`,
    /// `redis-cluster://[user:password@]host[:port][?node=host:port...]` or `redis+unix:///path/to/socket`; with `rediss` for TLS, with the cargo feature `tls`. These are fred's forms.
    ///
    /// # Errors
    /// `InvalidOption`, which does not quote the URL: it may hold a password.
    pub fn from_url(url: &str) -> Result<Self> {
        if url.starts_with("rediss") && !cfg!(feature = "tls") {
            return Err(Error::invalid_option("url", "`rediss:` needs the cargo feature `tls` of pubsub-redis"));
        }
        if url.split_once("://").is_none_or(|(_, rest)| rest.is_empty()) {
            return Err(Error::invalid_option("url", "names no server"));
        }
        let refuse = |_| Error::invalid_option("url", "is no `redis://[user:password@]host[:port][/database]`");
        Ok(Self(Config::from_url(url).map_err(refuse)?))
    }

    /// What a configuration of fred names: TLS of one's own, anything that it connects to. Its protocol version and what it does at
    /// the first connection are set here.
    pub fn from_config(config: Config) -> Self {
        Self(config)
    }

    /// Who to log in as (nobody; with a password alone, the server's default user).
    #[must_use]
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.0.username = Some(username.into());
        self
    }

    /// The password (none). It appears in no error, no `Debug` output and no log.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.0.password = Some(password.into());
        self
    }

    /// Who to be at the sentinels, and their password, where they ask for them (nobody, none).
    #[must_use]
    pub fn sentinel_credentials(mut self, name: Option<String>, secret: Option<String>) -> Self {
        if let ServerConfig::Sentinel { username, password, .. } = &mut self.0.server {
            (*username, *password) = (name, secret);
        }
        self
    }

    /// The number of the database (0).
    #[must_use]
    pub fn database(mut self, number: u8) -> Self {
        self.0.database = Some(number);
        self
    }

    /// Encrypts connections, and trusts whom the system trusts (off).
    ///
    /// # Errors
    /// `InvalidOption` if the system's certificates cannot be read.
    #[cfg(feature = "tls")]
    pub fn tls(self) -> Result<Self> {
        let mut found = fred::rustls_native_certs::load_native_certs();
        // Of what cannot be read, others say no more than that: a system without a single certificate is what cannot work.
        let failed = found.errors.pop();
        self.trusting("tls", found.certs).map_err(|error| match failed {
            Some(cause) => error.caused_by(cause),
            None => error,
        })
    }

    /// Encrypts connections, and trusts these certificates, in PEM, and no other (off).
    ///
    /// # Errors
    /// `InvalidOption` if there is none among them, or one that cannot be read.
    #[cfg(feature = "tls")]
    pub fn tls_trusting(self, pem: &[u8]) -> Result<Self> {
        use fred::rustls::pki_types::pem::PemObject;

        let read: std::result::Result<Vec<_>, _> = fred::rustls::pki_types::CertificateDer::pem_slice_iter(pem).collect();
        self.trusting("ca", read.map_err(|error| Error::invalid_option("ca", "is not PEM").caused_by(error))?)
    }

    #[cfg(feature = "tls")]
    fn trusting(
        mut self,
        option: &'static str,
        certificates: Vec<fred::rustls::pki_types::CertificateDer<'static>>,
    ) -> Result<Self> {
        use fred::rustls::crypto::ring;
        use fred::rustls::{ClientConfig, RootCertStore};

        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certificates);
        if roots.is_empty() {
            return Err(Error::invalid_option(option, "has no certificate that can be trusted"));
        }
        // Named, since a program with other users of rustls may have several.
        let config = ClientConfig::builder_with_provider(std::sync::Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions();
        let config = config.map_err(|error| Error::invalid_option(option, "cannot be used").caused_by(error))?;
        let config = config.with_root_certificates(roots).with_no_client_auth();
        self.0.tls = Some(fred::types::config::TlsConnector::from(config).into());
        Ok(self)
    }

    /// The nodes that were named, if it is a cluster.
    pub(crate) fn nodes(&self) -> Option<Vec<Place>> {
        let nodes = || self.0.server.hosts().into_iter().map(|node| (node.host.to_string(), node.port)).collect();
        self.0.server.is_clustered().then(nodes)
    }

    /// One of the nodes, as a server of its own.
    pub(crate) fn at(&self, (host, port): &Place) -> Self {
        Self(Config { server: ServerConfig::new_centralized(host.as_str(), *port), ..self.0.clone() })
    }

    pub(crate) fn config(&self) -> &Config {
        &self.0
    }
}

impl fmt::Debug for RedisServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The hosts alone: fred's own `Debug` has the credentials in it.
        f.debug_struct("RedisServer").field("hosts", &self.0.server.hosts()).finish_non_exhaustive()
    }
}
