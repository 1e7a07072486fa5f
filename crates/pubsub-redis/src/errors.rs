//! What goes wrong between here and the server, and what it is called outside.

use std::fmt;

use pubsub_core::{Error, ErrorKind};

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The server refused it: it was not carried out. The text begins with the server's code.
    Refused(String),
    /// The connection broke, or the answer did not come in time: it may have been carried out.
    Unknown(String),
    /// The credentials were refused.
    Auth(String),
    /// Whoever answers cannot be trusted.
    Untrusted(String),
    /// It was not sent: too much waits already.
    Full,
    /// An answer that makes no sense.
    Nonsense(&'static str),
}

impl Fault {
    /// Whether the server's code is this.
    pub(crate) fn is(&self, code: &str) -> bool {
        matches!(self, Self::Refused(text) if text.split([' ', ':']).next() == Some(code))
    }

    /// Whether the server says that there is no such key.
    pub(crate) fn is_missing_key(&self) -> bool {
        matches!(self, Self::Refused(text) if text.starts_with("ERR no such key"))
    }

    /// Whether the key is at another node of a cluster, or at none just now; nothing was done.
    pub(crate) fn is_elsewhere(&self) -> bool {
        ["MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"].iter().any(|code| self.is(code))
    }

    /// Where a key that has moved is said to be.
    pub(crate) fn named_place(&self) -> Option<crate::cluster::Place> {
        let Self::Refused(text) = self else { return None };
        let (host, port) = text.split(' ').nth(2)?.rsplit_once(':')?;
        Some((host.to_owned(), port.parse().ok()?))
    }

    /// Whether the same command can succeed later without anything being changed.
    pub(crate) fn is_temporary(&self) -> bool {
        kind(self).is_retryable()
    }

    /// Whether the command may have been carried out.
    pub(crate) fn is_unknown(&self) -> bool {
        !matches!(self, Self::Refused(_) | Self::Auth(_) | Self::Untrusted(_) | Self::Full)
    }
}

impl From<fred::error::Error> for Fault {
    fn from(error: fred::error::Error) -> Self {
        use fred::error::ErrorKind as Kind;
        let details = error.details();
        match error.kind() {
            Kind::Auth => Self::Auth(details.into()),
            // fred has no kinds for most of what a server says: the code comes first, in capitals.
            Kind::Unknown | Kind::InvalidCommand | Kind::InvalidArgument | Kind::Cluster | Kind::NotFound
                if has_code(details) =>
            {
                if matches!(details.split(' ').next(), Some("NOAUTH" | "WRONGPASS")) {
                    Self::Auth(details.into())
                } else {
                    Self::Refused(details.into())
                }
            }
            // fred's own refusals, which may quote the server's.
            Kind::Config | Kind::Url | Kind::InvalidArgument | Kind::InvalidCommand if details.starts_with("ERR ") => {
                Self::Refused(details.into())
            }
            Kind::Config | Kind::Url | Kind::InvalidArgument | Kind::InvalidCommand => Self::Refused(format!("ERR {details}")),
            // The handshake's own errors come as those of the socket.
            #[cfg(feature = "tls")]
            Kind::Tls => Self::Untrusted(details.into()),
            Kind::IO if details.contains("InvalidCertificate") => Self::Untrusted(details.into()),
            Kind::Parse | Kind::Protocol => Self::Nonsense("the answer could not be read"),
            _ => Self::Unknown(error.to_string()),
        }
    }
}

fn has_code(details: &str) -> bool {
    let code = details.split([' ', ':']).next().unwrap_or_default();
    code.len() >= 3 && code.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
}

/// The one mapping to the public kinds.
fn kind(fault: &Fault) -> ErrorKind {
    match fault {
        Fault::Auth(_) => ErrorKind::Denied,
        Fault::Untrusted(_) => ErrorKind::Backend("the server's certificate is not to be trusted".into()),
        Fault::Full => ErrorKind::Full,
        Fault::Unknown(_) => ErrorKind::Unavailable,
        Fault::Nonsense(why) => ErrorKind::Backend((*why).into()),
        Fault::Refused(text) => match text.split([' ', ':']).next().unwrap_or_default() {
            "NOPERM" => ErrorKind::Denied,
            "LOADING" | "BUSY" | "TRYAGAIN" | "CLUSTERDOWN" | "MASTERDOWN" | "READONLY" | "NOREPLICAS" | "MISCONF" | "OOM"
            | "MOVED" | "ASK" | "UNBLOCKED" | "NOGROUP" | "NOSCRIPT" => ErrorKind::Unavailable,
            // What a script may not do has no code of its own.
            "ERR" if text.starts_with("ERR The user executing the script") => ErrorKind::Denied,
            "WRONGTYPE" => ErrorKind::Backend("the key of the topic holds something else than a stream".into()),
            _ => ErrorKind::Backend(text.clone().into()),
        },
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::new(kind(&fault)).caused_by(Cause(fault))
    }
}

/// The fault as the source of a public error.
#[derive(Debug)]
struct Cause(Fault);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Fault::Refused(text) | Fault::Unknown(text) | Fault::Auth(text) | Fault::Untrusted(text) => f.write_str(text),
            Fault::Nonsense(why) => f.write_str(why),
            Fault::Full => f.write_str("too many publish calls wait"),
        }
    }
}

impl std::error::Error for Cause {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Cause(self.clone()).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fred::error::{Error as FredError, ErrorKind as Kind};

    #[test]
    fn every_row_of_the_table() {
        let backend = |text: &'static str| ErrorKind::Backend(text.into());
        for (from, text, expected, unknown) in [
            (Kind::Auth, "WRONGPASS invalid username-password pair", ErrorKind::Denied, false),
            (Kind::Unknown, "NOAUTH Authentication required.", ErrorKind::Denied, false),
            (Kind::Unknown, "NOPERM this user has no permissions", ErrorKind::Denied, false),
            (Kind::Unknown, "ERR The user executing the script can't run this command", ErrorKind::Denied, false),
            (Kind::Unknown, "LOADING Redis is loading", ErrorKind::Unavailable, false),
            (Kind::Unknown, "OOM command not allowed", ErrorKind::Unavailable, false),
            (Kind::Unknown, "UNBLOCKED the stream key no longer exists", ErrorKind::Unavailable, false),
            (Kind::Unknown, "NOGROUP No such key", ErrorKind::Unavailable, false),
            (Kind::Cluster, "CLUSTERDOWN", ErrorKind::Unavailable, false),
            (Kind::Unknown, "ERR syntax error", backend("ERR syntax error"), false),
            (Kind::Config, "bad port", backend("ERR bad port"), false),
            (
                Kind::Config,
                "ERR This instance has cluster support disabled",
                backend("ERR This instance has cluster support disabled"),
                false,
            ),
            (Kind::IO, "Connection reset", ErrorKind::Unavailable, true),
            (Kind::IO, "InvalidCertificate(UnknownIssuer)", backend("the server's certificate is not to be trusted"), false),
            #[cfg(feature = "tls")]
            (Kind::Tls, "no name to check", backend("the server's certificate is not to be trusted"), false),
            (Kind::Cluster, "MOVED 1 h:2", ErrorKind::Unavailable, false),
            (Kind::Canceled, "Canceled.", ErrorKind::Unavailable, true),
            (Kind::Timeout, "Request timed out.", ErrorKind::Unavailable, true),
            (Kind::Unknown, "Too many failed write attempts.", ErrorKind::Unavailable, true),
            (Kind::Parse, "Cannot convert", backend("the answer could not be read"), true),
        ] {
            let fault = Fault::from(FredError::new(from, text));
            assert_eq!((kind(&fault), fault.is_unknown()), (expected, unknown), "{text}");
        }
        let wrong = Fault::from(FredError::new(Kind::InvalidArgument, "WRONGTYPE Operation against a key"));
        assert!(wrong.is("WRONGTYPE") && !wrong.is_temporary());
    }
}
