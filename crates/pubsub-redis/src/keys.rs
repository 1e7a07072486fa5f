//! What things are called on the server. Pure.
//!
//! The names of streams and leases are those of the TypeScript system, so that both share one bus.

use pubsub_core::Topic;

/// The consumer that owns what nobody holds: retries that wait for their back-off, and what was given back. Entries of others that
/// have not been touched for long enough were held by somebody who is gone.
pub(crate) const NOBODY: &str = "~nobody";

/// The names under one prefix.
#[derive(Debug, Clone)]
pub(crate) struct Keys(String);

impl Keys {
    pub(crate) fn new(prefix: &str) -> Self {
        Self(prefix.to_owned())
    }

    /// The stream of a topic.
    pub(crate) fn stream(&self, topic: &Topic) -> String {
        format!("{}:{topic}", self.0)
    }

    /// Says up to where a stream was cleared. It has a command of its own, so its slot does not matter.
    pub(crate) fn cleared(stream: &str) -> String {
        format!("{{{stream}}}:cleared")
    }

    /// The lease of a key, and the counter of its fencing tokens, which one script uses together.
    pub(crate) fn lease(&self, key: &str) -> (String, String) {
        let lease = format!("{}:lease:{}", self.0, one_tag(key));
        let token = beside(&lease, "token");
        (lease, token)
    }

    /// What a topic's log has: its place in its numbering, its events, the indices of their ids. One script uses them together.
    #[cfg(feature = "cache")]
    pub(crate) fn log(&self, topic: &Topic) -> [String; 3] {
        let log = format!("{}:log:{}", self.0, one_tag(topic.as_str()));
        [beside(&log, "place"), log.clone(), beside(&log, "ids")]
    }

    /// A value, counter or list of a store.
    #[cfg(feature = "cache")]
    pub(crate) fn value(&self, key: &str) -> String {
        format!("{}:value:{key}", self.0)
    }

    /// What tells a store from others.
    #[cfg(feature = "cache")]
    pub(crate) fn store(&self) -> String {
        format!("{}:store", self.0)
    }

    /// A name for the bus and topic of a stream, for cursors: a hash, as a prefix may hold anything.
    pub(crate) fn scope(&self, topic: &Topic) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64; // FNV-1a: stable across versions and machines
        for byte in self.0.bytes().chain([0]).chain(topic.as_str().bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        format!("redis-{hash:016x}")
    }
}

/// A `}` of the user's could end a hash tag early, and keys that are used together would lie in different slots of a cluster.
fn one_tag(name: &str) -> String {
    name.replace('%', "%25").replace('}', "%7D")
}

/// A key in the slot of another.
fn beside(key: &str, what: &str) -> String {
    match tag_of(key) {
        Some(tag) => format!("{{{tag}}}:{key}:{what}"),
        None => format!("{{{key}}}:{what}"),
    }
}

/// The part of a key that decides its slot, if the key has such a part.
pub(crate) fn tag_of(key: &str) -> Option<&str> {
    let (_, rest) = key.split_once('{')?;
    let (tag, _) = rest.split_once('}')?;
    (!tag.is_empty()).then_some(tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_those_of_the_typescript_system() {
        let keys = Keys::new("mastra:topic");
        assert_eq!(keys.stream(&Topic::new("orders").unwrap()), "mastra:topic:orders");
        assert_eq!(keys.lease("run-1").0, "mastra:topic:lease:run-1");
    }

    /// What a cluster hashes.
    fn hashed(key: &str) -> &str {
        tag_of(key).unwrap_or(key)
    }

    #[test]
    fn a_lease_and_its_token_share_a_slot() {
        for prefix in ["mastra:topic", "{app}:x", "a{b"] {
            for key in ["run-1", "a}b", "{tag}", "a{b}c}", "}{", "%7D"] {
                let (lease, token) = Keys::new(prefix).lease(key);
                assert_eq!(hashed(&lease), hashed(&token), "{prefix} {key}");
                assert_ne!(lease, token);
            }
        }
        assert_ne!(Keys::new("p").lease("}").0, Keys::new("p").lease("%7D").0);
    }

    #[test]
    fn scopes_tell_buses_and_topics_apart() {
        let of = |prefix: &str, topic: &str| Keys::new(prefix).scope(&Topic::new(topic).unwrap());
        assert_ne!(of("a", "b"), of("a", "c"));
        assert_ne!(of("a:b", "c"), of("a", "b:c"));
        assert_eq!(of("a", "b"), of("a", "b"));
        assert!(pubsub_core::Scope::new(of("ü:{}", "b c"), "0").is_ok());
    }
}
