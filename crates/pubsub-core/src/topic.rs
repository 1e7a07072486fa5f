//! Names: topics and groups.

use std::fmt;
use std::str::FromStr;

use smol_str::SmolStr;

use crate::{Error, ErrorKind};

/// The longest name in bytes.
const MAX_BYTES: usize = 255;

fn check(what: &'static str, name: &str) -> Result<(), Error> {
    let why = if name.is_empty() {
        "is empty".to_owned()
    } else if name.len() > MAX_BYTES {
        format!("has {} bytes; {MAX_BYTES} is the most", name.len())
    } else if let Some(at) = name.chars().position(char::is_control) {
        format!("has a control character at position {at}")
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::InvalidName(format!("{what} {why}").into())))
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        ///
        /// Text of 1 to 255 bytes without control characters. Cheap to clone. Names are compared byte for byte;
        /// there are no wildcards and no normalisation.
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type(SmolStr);

        impl $type {
            /// The longest name in bytes.
            pub const MAX_BYTES: usize = MAX_BYTES;

            /// Checks the name.
            ///
            /// # Errors
            /// [`ErrorKind::InvalidName`] if it is empty, too long, or holds a control character.
            pub fn new(name: impl AsRef<str>) -> Result<Self, Error> {
                let name = name.as_ref();
                check($what, name)?;
                Ok(Self(SmolStr::new(name)))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }

        impl FromStr for $type {
            type Err = Error;
            fn from_str(name: &str) -> Result<Self, Error> {
                Self::new(name)
            }
        }

        impl TryFrom<&str> for $type {
            type Error = Error;
            fn try_from(name: &str) -> Result<Self, Error> {
                Self::new(name)
            }
        }

        impl TryFrom<String> for $type {
            type Error = Error;
            fn try_from(name: String) -> Result<Self, Error> {
                Self::new(name)
            }
        }

        impl TryFrom<&String> for $type {
            type Error = Error;
            fn try_from(name: &String) -> Result<Self, Error> {
                Self::new(name)
            }
        }

        impl From<&$type> for $type {
            fn from(name: &$type) -> Self {
                name.clone()
            }
        }
    };
}

name! {
    /// The name that events are published to and subscribed by.
    Topic, "topic"
}

name! {
    /// The name of a consumer group within a topic: the same name on two topics is two groups.
    Group, "group"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_the_rules_allow() {
        for name in ["a", "workflow.events.v2.7f", "a/b:c d", "%00", "ünïcødé 🦀", &"x".repeat(255)] {
            assert_eq!(Topic::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn refuses_the_rest_and_says_why() {
        for (name, why) in [
            (String::new(), "topic is empty"),
            ("x".repeat(256), "topic has 256 bytes; 255 is the most"),
            ("a\nb".into(), "topic has a control character at position 1"),
            ("a\u{85}".into(), "topic has a control character at position 1"),
        ] {
            match Topic::new(&name).unwrap_err().kind() {
                ErrorKind::InvalidName(told) => assert_eq!(told, why),
                other => panic!("{other:?}"),
            }
        }
    }
}
