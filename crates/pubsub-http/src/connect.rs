//! Connections to where pushes go: the address that is connected to is the one that was checked.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, lookup_host};

use crate::address::is_public;

/// Resolves names and connects. Redirects, proxies and the environment have no say in it.
#[derive(Debug, Clone)]
pub(crate) struct Connector {
    pub(crate) allow_private: bool,
    pub(crate) timeout: Duration,
}

impl Connector {
    async fn connect(self, uri: Uri) -> io::Result<TokioIo<TcpStream>> {
        let connect = async {
            let host = uri.host().unwrap_or_default();
            let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
            let mut refused = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in resolve(host, port).await? {
                if !self.may_reach(address.ip()) {
                    refused = io::Error::new(io::ErrorKind::PermissionDenied, "the address is not public");
                    continue;
                }
                match TcpStream::connect(address).await {
                    Ok(stream) => {
                        let _ = stream.set_nodelay(true); // slower without, and no less right
                        return Ok(TokioIo::new(stream));
                    }
                    Err(error) => refused = error,
                }
            }
            Err(refused)
        };
        let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "connecting took too long"));
        tokio::time::timeout(self.timeout, connect).await.unwrap_or_else(late)
    }

    pub(crate) fn may_reach(&self, address: IpAddr) -> bool {
        self.allow_private || is_public(address)
    }
}

/// The host of a URI as an address, if it is written as one.
pub(crate) fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    match literal(host) {
        Some(address) => Ok(vec![SocketAddr::new(address, port)]),
        None => Ok(lookup_host((host, port)).await?.collect()),
    }
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}
