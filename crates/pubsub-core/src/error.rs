//! What can go wrong: one error type for every backend, and the fate of events whose publish failed.

use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt;

use crate::{Capability, Gap};

/// The result of most operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The source of an error that came from below this crate.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// An error of a bus: what kind it is, during which operation, on what, and its cause.
///
/// Displayed, it says what failed; with `{:#}` also why, cause by cause.
///
/// Match on [`kind`](Error::kind); ask [`is_retryable`](Error::is_retryable) whether the same call can succeed later.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: Option<&'static str>,
    subject: Option<String>,
    source: Option<BoxError>,
}

/// What kind of error it is, grouped by whose fault it is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    // The caller's.
    /// A topic, group or event type that the rules for names refuse; the text says why.
    InvalidName(Cow<'static, str>),
    /// An option that makes no sense, by itself or beside another.
    InvalidOption {
        /// The option, as it is spelled in code and in URLs.
        option: Cow<'static, str>,
        /// Why it is refused.
        reason: Cow<'static, str>,
    },
    /// A payload that cannot be written as JSON and read back equal.
    NotSerializable(Cow<'static, str>),
    /// Data that is not JSON, or not JSON of the type asked for.
    Decode(Cow<'static, str>),
    /// Encoded data plus metadata are over the backend's limit. Nothing was sent.
    TooLarge {
        /// Size of the offending event in bytes.
        size: usize,
        /// The backend's limit in bytes.
        limit: usize,
    },
    /// The backend cannot do this at all; see [`Capabilities`](crate::Capabilities).
    Unsupported(Capability),
    /// The bus or the subscription has been closed.
    Closed,
    /// Inline handlers published to each other too deeply.
    Recursion {
        /// The deepest nesting that is allowed.
        limit: usize,
    },

    // The state of the world.
    /// A queue stayed full for the whole publish time-out. [`PublishError::fates`] tells which events were not sent.
    Full,
    /// The position asked for cannot be resumed from; the gap says why.
    Gap(Gap),
    /// What was named does not exist.
    NotFound,
    /// The credentials or permissions do not allow it.
    Denied,
    /// The operation did not end in time; its outcome may be unknown.
    Timeout,
    /// The server or broker cannot be reached just now.
    Unavailable,
    /// Anything else that a backend reports.
    Backend(Cow<'static, str>),
}

impl ErrorKind {
    /// Whether the same call can succeed later without anything being changed by the caller.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Full | Self::Timeout | Self::Unavailable)
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidName(why) => write!(f, "invalid name: {why}"),
            Self::InvalidOption { option, reason } => write!(f, "invalid option `{option}`: {reason}"),
            Self::NotSerializable(why) => write!(f, "payload does not survive JSON: {why}"),
            Self::Decode(why) => write!(f, "cannot decode: {why}"),
            Self::TooLarge { size, limit } => write!(f, "event of {size} bytes is over the limit of {limit}"),
            Self::Unsupported(capability) => write!(f, "this bus does not support {capability}"),
            Self::Closed => f.write_str("closed"),
            Self::Recursion { limit } => write!(f, "inline handlers published to each other more than {limit} deep"),
            Self::Full => f.write_str("a subscriber's queue stayed full"),
            Self::Gap(gap) => write!(f, "{gap}"),
            Self::NotFound => f.write_str("not found"),
            Self::Denied => f.write_str("not allowed"),
            Self::Timeout => f.write_str("timed out"),
            Self::Unavailable => f.write_str("unavailable"),
            Self::Backend(why) => f.write_str(why),
        }
    }
}

impl Error {
    /// An error of this kind, with nothing else known yet.
    pub fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Inner { kind, operation: None, subject: None, source: None }))
    }

    /// Shorthand for [`ErrorKind::InvalidOption`].
    pub fn invalid_option(option: impl Into<Cow<'static, str>>, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::InvalidOption { option: option.into(), reason: reason.into() })
    }

    /// Shorthand for [`ErrorKind::Unsupported`].
    pub fn unsupported(capability: Capability) -> Self {
        Self::new(ErrorKind::Unsupported(capability))
    }

    /// Shorthand for [`ErrorKind::Closed`].
    pub fn closed() -> Self {
        Self::new(ErrorKind::Closed)
    }

    /// Adds the operation, unless one is already named: the innermost knows best.
    #[must_use]
    pub fn during(mut self, operation: &'static str) -> Self {
        self.0.operation.get_or_insert(operation);
        self
    }

    /// Adds what the operation was about (a topic, a group, a key), unless already named.
    #[must_use]
    pub fn on(mut self, subject: impl fmt::Display) -> Self {
        if self.0.subject.is_none() {
            self.0.subject = Some(subject.to_string());
        }
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What kind of error it is.
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The operation that failed, if known.
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// What the operation was about, if known.
    pub fn subject(&self) -> Option<&str> {
        self.0.subject.as_deref()
    }

    /// Whether the same call can succeed later.
    pub fn is_retryable(&self) -> bool {
        self.0.kind.is_retryable()
    }

    /// Whether the bus or subscription was closed.
    pub fn is_closed(&self) -> bool {
        self.0.kind == ErrorKind::Closed
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(operation) = self.0.operation {
            write!(f, "{operation}")?;
            if let Some(subject) = &self.0.subject {
                write!(f, " on {subject:?}")?;
            }
            f.write_str(": ")?;
        } else if let Some(subject) = &self.0.subject {
            write!(f, "{subject:?}: ")?;
        }
        write!(f, "{}", self.0.kind)?;
        let mut cause = std::error::Error::source(self).filter(|_| f.alternate());
        while let Some(because) = cause {
            write!(f, ": {because}")?;
            cause = because.source();
        }
        Ok(())
    }
}

/// What `{:#}` displays, so that an error that `main` returns can be read; `{:#?}` shows its parts.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !f.alternate() {
            return write!(f, "{self:#}");
        }
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("operation", &self.0.operation)
            .field("subject", &self.0.subject)
            .field("source", &self.0.source)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self::new(kind)
    }
}

impl From<Infallible> for Error {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// What became of one event of a publish call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It was taken, as `Ok` would have meant.
    Published,
    /// It was not sent and nobody will see it.
    NotSent,
    /// It may or may not have been taken. Publishing the same stamped event again is the safe way to find out.
    Unknown,
}

/// A publish call that failed, and what became of each of its events, in the order they were given.
///
/// It is shown, and has the causes, as its [`error`](Self::error).
#[derive(Debug)]
pub struct PublishError {
    error: Error,
    fates: Box<[Fate]>,
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for PublishError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl PublishError {
    /// A failure with the fate of each event.
    pub fn new(error: Error, fates: Vec<Fate>) -> Self {
        Self { error: error.during("publish"), fates: fates.into() }
    }

    /// A failure before anything was sent: all `count` events are [`Fate::NotSent`].
    pub fn none_sent(error: impl Into<Error>, count: usize) -> Self {
        Self::new(error.into(), vec![Fate::NotSent; count])
    }

    /// A failure after the first `published` of `count` events had been taken; the others were not sent.
    pub fn prefix_sent(error: impl Into<Error>, published: usize, count: usize) -> Self {
        let fate = |i| if i < published { Fate::Published } else { Fate::NotSent };
        Self::new(error.into(), (0..count).map(fate).collect())
    }

    /// What went wrong.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The kind of [`error`](Self::error).
    pub fn kind(&self) -> &ErrorKind {
        self.error.kind()
    }

    /// What became of each event.
    pub fn fates(&self) -> &[Fate] {
        &self.fates
    }

    /// The positions of the events that are worth publishing again: not sent, or unknown.
    pub fn unpublished(&self) -> impl Iterator<Item = usize> + '_ {
        self.fates.iter().enumerate().filter(|(_, fate)| **fate != Fate::Published).map(|(i, _)| i)
    }
}

impl From<PublishError> for Error {
    fn from(error: PublishError) -> Self {
        error.error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_operation_subject_and_kind() {
        let error = Error::new(ErrorKind::Full).during("publish").on("orders").during("ignored");
        assert_eq!(error.to_string(), r#"publish on "orders": a subscriber's queue stayed full"#);
        assert!(error.is_retryable());
        let because = error.caused_by(Error::new(ErrorKind::Unavailable).caused_by(std::io::Error::other("no route")));
        assert_eq!(because.to_string(), r#"publish on "orders": a subscriber's queue stayed full"#);
        assert_eq!(format!("{because:#}"), format!("{because}: unavailable: no route"));
        assert_eq!(format!("{because:?}"), format!("{because:#}"));
        assert!(format!("{because:#?}").starts_with("Error {"));
        let failed = PublishError::none_sent(because, 1);
        assert_eq!(format!("{failed:#}"), format!("{failed}: unavailable: no route"));
        assert_eq!(std::error::Error::source(&failed).map(ToString::to_string), Some("unavailable".to_owned()));
    }

    #[test]
    fn a_prefix_knows_what_to_send_again() {
        let error = PublishError::prefix_sent(ErrorKind::Full, 1, 3);
        assert_eq!(error.fates(), [Fate::Published, Fate::NotSent, Fate::NotSent]);
        assert_eq!(error.unpublished().collect::<Vec<_>>(), [1, 2]);
    }
}
