//! What goes wrong between here and the service, and what it is called outside.

use std::collections::HashMap;
use std::fmt;

use gcloud_sdk::google::rpc;
use gcloud_sdk::prost::Message;
use gcloud_sdk::tonic::{Code, Status};
use pubsub_core::{Error, ErrorKind};

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    code: Code,
    /// No token could be had, and none will be.
    credentials: bool,
    text: String,
    /// What became of single ack ids, where the service says so (exactly-once delivery).
    pub(crate) ids: HashMap<String, Refusal>,
}

/// Why the service did not settle one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It is no longer this holder's.
    Lost,
    /// It can be tried again.
    ForNow,
}

/// What the service writes about single ack ids.
const PERMANENT: &str = "PERMANENT_FAILURE";
const TRANSIENT: &str = "TRANSIENT_FAILURE";

impl Fault {
    pub(crate) fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, credentials: false, text: text.into(), ids: HashMap::new() }
    }

    /// There was no answer in time.
    pub(crate) fn timed_out() -> Self {
        Self::new(Code::DeadlineExceeded, "there was no answer within command_timeout")
    }

    pub(crate) fn is_not_found(&self) -> bool {
        self.code == Code::NotFound
    }

    /// Whether the server has no such call, as the emulator in places.
    pub(crate) fn is_unimplemented(&self) -> bool {
        self.code == Code::Unimplemented
    }

    pub(crate) fn is_taken(&self) -> bool {
        self.code == Code::AlreadyExists
    }

    /// Whether the same call can succeed later without anything being changed.
    pub(crate) fn is_temporary(&self) -> bool {
        kind(self).is_retryable()
    }

    /// Whether the call may have been carried out.
    pub(crate) fn is_unknown(&self) -> bool {
        self.is_temporary() && self.code != Code::ResourceExhausted
    }
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self {
            code: status.code(),
            credentials: lacks_credentials(&status),
            text: status.message().to_owned(),
            ids: refusals(status.details()),
        }
    }
}

/// Whether somewhere below no token could be had for good: tonic calls that unknown, or unavailable.
fn lacks_credentials(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<gcloud_sdk::google_cloud_auth::errors::CredentialsError>() {
            return !error.is_transient();
        }
        cause = error.source();
    }
    false
}

fn refusals(details: &[u8]) -> HashMap<String, Refusal> {
    let details = rpc::Status::decode(details).map(|status| status.details).unwrap_or_default();
    let infos = details.iter().filter(|detail| detail.type_url.ends_with("google.rpc.ErrorInfo"));
    let infos = infos.filter_map(|detail| rpc::ErrorInfo::decode(detail.value.as_slice()).ok());
    let said = infos.flat_map(|info| info.metadata);
    said.filter_map(|(id, what)| {
        let refusal = match what {
            what if what.starts_with(PERMANENT) => Refusal::Lost,
            what if what.starts_with(TRANSIENT) => Refusal::ForNow,
            _ => return None,
        };
        Some((id, refusal))
    })
    .collect()
}

/// The one mapping to the public kinds.
fn kind(fault: &Fault) -> ErrorKind {
    if fault.credentials {
        return ErrorKind::Denied;
    }
    match fault.code {
        Code::Unauthenticated | Code::PermissionDenied => ErrorKind::Denied,
        Code::NotFound => ErrorKind::NotFound,
        Code::DeadlineExceeded => ErrorKind::Timeout,
        // A quota is used up for now; the rest is what breaking connections and restarting servers look like.
        Code::ResourceExhausted | Code::Unavailable | Code::Aborted | Code::Internal | Code::Cancelled | Code::Unknown => {
            ErrorKind::Unavailable
        }
        _ => ErrorKind::Backend(fault.text.clone().into()),
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
        self.0.fmt(f)
    }
}

impl std::error::Error for Cause {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.description(), self.text)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gcloud_sdk::google_cloud_auth::errors::CredentialsError;
    use gcloud_sdk::prost_types;

    use super::*;

    #[test]
    fn every_row_of_the_table() {
        let backend = || ErrorKind::Backend("said".into());
        for (code, expected, unknown) in [
            (Code::Unauthenticated, ErrorKind::Denied, false),
            (Code::PermissionDenied, ErrorKind::Denied, false),
            (Code::NotFound, ErrorKind::NotFound, false),
            (Code::DeadlineExceeded, ErrorKind::Timeout, true),
            (Code::ResourceExhausted, ErrorKind::Unavailable, false),
            (Code::Unavailable, ErrorKind::Unavailable, true),
            (Code::Aborted, ErrorKind::Unavailable, true),
            (Code::Internal, ErrorKind::Unavailable, true),
            (Code::Cancelled, ErrorKind::Unavailable, true),
            (Code::Unknown, ErrorKind::Unavailable, true),
            (Code::InvalidArgument, backend(), false),
            (Code::AlreadyExists, backend(), false),
            (Code::FailedPrecondition, backend(), false),
            (Code::OutOfRange, backend(), false),
            (Code::Unimplemented, backend(), false),
            (Code::DataLoss, backend(), false),
        ] {
            let fault = Fault::from(Status::new(code, "said"));
            assert_eq!((kind(&fault), fault.is_unknown()), (expected, unknown), "{code:?}");
            assert_eq!(fault.is_temporary(), Error::from(fault.clone()).is_retryable(), "{code:?}");
        }
    }

    /// An error with another below it, as those of a transport are.
    #[derive(Debug)]
    struct Below(CredentialsError);

    impl fmt::Display for Below {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("transport error")
        }
    }

    impl std::error::Error for Below {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn no_token_is_denied_only_if_it_stays_so() {
        let fault = |transient| {
            let mut status = Status::unavailable("transport error");
            status.set_source(Arc::new(Below(CredentialsError::from_msg(transient, "no key"))));
            Fault::from(status)
        };
        assert_eq!((kind(&fault(false)), kind(&fault(true))), (ErrorKind::Denied, ErrorKind::Unavailable));
    }

    #[test]
    fn what_became_of_single_messages_is_read() {
        let said = [("a", "PERMANENT_FAILURE_INVALID_ACK_ID"), ("b", "TRANSIENT_FAILURE_UNORDERED_ACK_ID"), ("c", "else")];
        let metadata = said.map(|(id, what)| (id.to_owned(), what.to_owned())).into();
        let info = rpc::ErrorInfo { metadata, ..rpc::ErrorInfo::default() };
        let detail =
            prost_types::Any { type_url: "type.googleapis.com/google.rpc.ErrorInfo".into(), value: info.encode_to_vec() };
        let status = rpc::Status { details: vec![detail], ..rpc::Status::default() };
        let fault = Fault::from(Status::with_details(Code::FailedPrecondition, "", status.encode_to_vec().into()));
        assert_eq!(fault.ids, [("a".to_owned(), Refusal::Lost), ("b".to_owned(), Refusal::ForNow)].into());
        assert!(Fault::from(Status::with_details(Code::Internal, "", b"junk".as_slice().into())).ids.is_empty());
    }
}
