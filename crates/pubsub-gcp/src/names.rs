//! What topics, groups and private subscriptions are called on the service. Pure.
//!
//! A topic's Google id is its own name wherever Google's rules and this encoding allow that. Everything else is escaped, byte by byte,
//! as `%41`; a `%` that is followed by something else than two hexadecimal digits marks what kind of id it is, so that no two names
//! meet:
//!
//! | mark | means |
//! | --- | --- |
//! | `t%_NAME` | a name that Google would refuse for its beginning or for being too short |
//! | `h%_HASH` | a name that is too long even for that: what is behind the hash travels in an attribute or in labels |
//! | `TOPIC%-GROUP` | a group, where `TOPIC-GROUP` could be read in another way |
//! | `TOPIC%.INSTANCE-N` | a private subscription |

use pubsub_core::{Group, Topic};

/// Google's limits on ids.
const LONGEST: usize = 255;
const SHORTEST: usize = 3;

/// Google's limit on a filter.
const LONGEST_FILTER: usize = 256;

/// The attribute that names the topic of a message, where several share one Google topic.
pub(crate) const TOPIC: &str = "topic";

/// How much of a name fits in a label, in bytes of the name.
const LABELLED: usize = 31;

/// Which topics share a Google topic, and which groups are named plainly.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    /// Topics `FAMILY.REST` travel on the Google topic `FAMILY`.
    families: Vec<String>,
    /// Topics with a `-` whose groups are nevertheless named `TOPIC-GROUP`.
    plain: Vec<String>,
}

/// Where a topic's messages travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    /// The id of the Google topic.
    pub(crate) google: String,
    /// What the attribute `topic` says, where the Google topic is shared.
    pub(crate) shared: Option<Shared>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shared {
    topic: String,
    /// The family, whose TypeScript members tell topics apart by the run id alone.
    family: Option<String>,
}

impl Route {
    /// Whether a message that came this way is of this topic.
    pub(crate) fn admits(&self, attribute: Option<&str>, run_id: &str) -> bool {
        let Some(Shared { topic, family }) = &self.shared else { return true };
        match (attribute, family) {
            (Some(attribute), _) => attribute == topic,
            (None, Some(family)) => {
                topic.strip_prefix(family.as_str()).and_then(|rest| rest.strip_prefix('.')).is_some_and(|run| run == run_id)
            }
            (None, None) => false,
        }
    }

    /// What the attribute `topic` of a message is to say.
    pub(crate) fn attribute(&self) -> Option<&str> {
        self.shared.as_ref().map(|shared| shared.topic.as_str())
    }

    /// What the service is to let through; nothing where it need not, or cannot, sift.
    pub(crate) fn filter(&self) -> String {
        let Some(Shared { topic, family }) = &self.shared else { return String::new() };
        let quoted = topic.replace('\\', "\\\\").replace('"', "\\\"");
        let unnamed = if family.is_some() { " OR NOT attributes:topic" } else { "" };
        let filter = format!("attributes.topic = \"{quoted}\"{unnamed}");
        if filter.len() > LONGEST_FILTER { String::new() } else { filter }
    }
}

impl Names {
    pub(crate) fn new(families: Vec<String>, plain: Vec<String>) -> Self {
        Self { families, plain }
    }

    /// Where a topic travels.
    pub(crate) fn route(&self, topic: &Topic) -> Route {
        let name = topic.as_str();
        let is_of = |family: &&String| {
            name.strip_prefix(family.as_str()).is_some_and(|rest| rest.is_empty() || (rest.starts_with('.') && rest.len() > 1))
        };
        if let Some(family) = self.families.iter().filter(is_of).max_by_key(|family| family.len()) {
            let shared = Some(Shared { topic: name.into(), family: Some(family.clone()) });
            return Route { google: encode(family), shared };
        }
        let id = encode(name);
        if id.len() <= LONGEST {
            return Route { google: id, shared: None };
        }
        Route { google: hashed(&[name]), shared: Some(Shared { topic: name.into(), family: None }) }
    }

    /// The topic of a Google topic that is not shared.
    #[cfg(test)]
    pub(crate) fn topic_of(&self, id: &str) -> Option<Topic> {
        let topic = Topic::new(decode(id)?).ok()?;
        (self.route(&topic) == Route { google: id.into(), shared: None }).then_some(topic)
    }

    /// The subscription of a group, and the labels that tell the group where its name does not.
    pub(crate) fn group(&self, topic: &Topic, group: &Group) -> (String, Vec<(String, String)>) {
        let (topic, group) = (topic.as_str(), group.as_str());
        let (of, name) = (encode(topic), escape(group));
        let plain = format!("{of}-{name}");
        let id = if self.split(&plain) == Some((&of, &name)) { plain } else { format!("{of}%-{name}") };
        if id.len() <= LONGEST { (id, Vec::new()) } else { (hashed(&[topic, group]), labels(group)) }
    }

    /// The group whose subscription on a topic this is; none if it is something else.
    pub(crate) fn group_of(
        &self,
        topic: &Topic,
        id: &str,
        labels: &std::collections::HashMap<String, String>,
    ) -> Option<Group> {
        let name = match id.split_once("%-").or_else(|| self.split(id)) {
            Some((_, name)) if !id.contains("%.") => unescape(name)?,
            _ => unlabelled(labels)?,
        };
        let group = Group::new(name).ok()?;
        (self.group(topic, &group).0 == id).then_some(group)
    }

    /// Topic and group of a plain name.
    fn split<'a>(&self, id: &'a str) -> Option<(&'a str, &'a str)> {
        let listed = |topic: &String| {
            let topic = encode(topic);
            id.strip_prefix(topic.as_str()).is_some_and(|rest| rest.starts_with('-')).then_some(topic.len())
        };
        match self.plain.iter().filter_map(listed).max() {
            Some(length) => Some((&id[..length], &id[length + 1..])),
            None => id.split_once('-'),
        }
    }
}

/// The private subscription of an instance, its n-th.
pub(crate) fn private(google: &str, instance: &str, number: u64) -> String {
    let id = format!("{google}%.{instance}-{number}");
    if id.len() <= LONGEST { id } else { format!("{}%.{instance}-{number}", hashed(&[google])) }
}

fn encode(name: &str) -> String {
    let escaped = escape(name);
    let begins = escaped.starts_with(|first: char| first.is_ascii_alphabetic());
    let reserved = escaped.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("goog"));
    if begins && !reserved && escaped.len() >= SHORTEST { escaped } else { format!("t%_{escaped}") }
}

#[cfg(test)]
fn decode(id: &str) -> Option<String> {
    unescape(id.strip_prefix("t%_").unwrap_or(id))
}

fn escape(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~+".contains(&byte) {
            escaped.push(byte.into());
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

fn unescape(id: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::with_capacity(id.len()), id);
    while let Some(at) = rest.find('%') {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        bytes.push(u8::from_str_radix(rest.get(at + 1..at + 3)?, 16).ok()?);
        rest = &rest[at + 3..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8(bytes).ok()
}

/// FNV-1a over 128 bits: the same everywhere and for ever. It need not resist anybody: attribute and labels tell what it stands for.
fn hashed(names: &[&str]) -> String {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013B;
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let bytes = names.iter().flat_map(|name| name.bytes().chain([0]));
    let hash = bytes.fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    format!("h%_{hash:032x}")
}

/// A name in labels, which take lowercase letters and digits.
fn labels(name: &str) -> Vec<(String, String)> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    name.as_bytes().chunks(LABELLED).enumerate().map(|(n, bytes)| (format!("pubsub-group-{n}"), hex(bytes))).collect()
}

fn unlabelled(labels: &std::collections::HashMap<String, String>) -> Option<String> {
    let hex: String = (0..).map_while(|n| labels.get(&format!("pubsub-group-{n}"))).map(String::as_str).collect();
    let bytes: Option<Vec<u8>> =
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()).collect();
    String::from_utf8(bytes?).ok().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn names() -> Names {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Names::new(list(&["workflow.events.v2", "workflow.events.v1"]), list(&["background-tasks"]))
    }

    fn topic(name: &str) -> Topic {
        Topic::new(name).unwrap()
    }

    fn group(of: &str, name: &str) -> String {
        names().group(&topic(of), &Group::new(name).unwrap()).0
    }

    #[test]
    fn what_google_allows_is_called_as_it_is() {
        for (name, id) in [
            ("workflows", "workflows"),
            ("agent.thread-stream.a%3Ab", "agent.thread-stream.a%253Ab"),
            ("ab", "t%_ab"),
            ("9lives", "t%_9lives"),
            ("Google", "t%_Google"),
            ("a b", "a%20b"),
            ("ä", "t%_%C3%A4"),
        ] {
            assert_eq!(names().route(&topic(name)), Route { google: id.into(), shared: None }, "{name}");
        }
    }

    /// As the TypeScript side calls them.
    #[test]
    fn groups_that_the_typescript_side_shares_have_its_names() {
        assert_eq!(group("workflows", "mastra-orchestration"), "workflows-mastra-orchestration");
        assert_eq!(group("background-tasks", "background-task-workers"), "background-tasks-background-task-workers");
    }

    #[test]
    fn names_that_read_the_same_together_are_apart() {
        assert_eq!((group("a-b", "c"), group("a", "b-c")), ("a-b%-c".into(), "t%_a-b-c".into()));
        assert_eq!(group("abc-b", "c"), "abc-b%-c");
        assert_eq!(group("abc", "b-c"), "abc-b-c");
        assert_eq!(group("background", "tasks-x"), "background%-tasks-x");
    }

    #[test]
    fn families_share_a_topic_and_are_told_apart() {
        let route = names().route(&topic("workflow.events.v2.run-1"));
        assert_eq!((route.google.as_str(), route.attribute()), ("workflow.events.v2", Some("workflow.events.v2.run-1")));
        assert_eq!(route.filter(), r#"attributes.topic = "workflow.events.v2.run-1" OR NOT attributes:topic"#);
        assert!(route.admits(Some("workflow.events.v2.run-1"), "anything"));
        assert!(!route.admits(Some("workflow.events.v2.run-2"), "run-1"));
        // The TypeScript side names no topic; its readers go by the run.
        assert!(route.admits(None, "run-1") && !route.admits(None, "run-2"));
        let plain = names().route(&topic("workflow.events.v2"));
        assert!(plain.admits(Some("workflow.events.v2"), "") && !plain.admits(None, ""));
        assert_eq!(names().route(&topic("workflow.events.v20")).shared, None);
        assert_eq!(names().route(&topic("workflow.events.v2.")).shared, None);
    }

    #[test]
    fn a_filter_quotes_and_has_a_bound() {
        let route = |name: &str| Route { google: "h".into(), shared: Some(Shared { topic: name.into(), family: None }) };
        assert_eq!(route(r#"a"b\c"#).filter(), r#"attributes.topic = "a\"b\\c""#);
        assert_eq!(route(&"x".repeat(255)).filter(), "");
    }

    fn any_name() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-c%._-]{1,6}",
            "(workflow\\.events\\.v2|background-tasks|goog|t%_|h%_)[a-b.%-]{0,3}",
            "\\PC{1,60}",
            "[a-z ]{200,255}",
        ]
        .prop_filter("is a name", |name| Topic::new(name).is_ok())
    }

    fn is_valid(id: &str) -> bool {
        (SHORTEST..=LONGEST).contains(&id.len())
            && id.starts_with(|first: char| first.is_ascii_alphabetic())
            && !id.starts_with("goog")
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~+%".contains(&byte))
    }

    proptest! {
        #[test]
        fn any_topic_has_a_valid_id_and_can_be_told_from_it(name in any_name()) {
            let route = names().route(&topic(&name));
            prop_assert!(is_valid(&route.google), "{}", route.google);
            match route.attribute() {
                Some(attribute) => prop_assert_eq!(attribute, name),
                None => prop_assert_eq!(names().topic_of(&route.google), Some(topic(&name))),
            }
        }

        #[test]
        fn two_groups_have_two_names(a in any_name(), b in any_name(), c in any_name(), d in any_name()) {
            let id = group(&a, &b);
            prop_assert!(is_valid(&id), "{}", id);
            if (&a, &b) != (&c, &d) {
                prop_assert_ne!(&id, &group(&c, &d));
            }
            let private = private(&names().route(&topic(&a)).google, &"0".repeat(32), u64::MAX);
            prop_assert!(is_valid(&private), "{}", private);
            prop_assert_ne!(id, private);
        }

        #[test]
        fn a_group_can_be_told_from_its_subscription(of in any_name(), name in any_name()) {
            let (of, name) = (topic(&of), Group::new(&name).unwrap());
            let (id, labels) = names().group(&of, &name);
            let labels: HashMap<_, _> = labels.into_iter().collect();
            prop_assert!(labels.values().all(|label| label.len() <= 63));
            prop_assert_eq!(names().group_of(&of, &id, &labels), Some(name));
            prop_assert_eq!(names().group_of(&of, &private(&names().route(&of).google, "0a", 1), &HashMap::new()), None);
        }

        #[test]
        fn any_split_of_one_text_is_a_group_of_its_own(text in "[ab-]{3,9}") {
            let mut seen = HashMap::new();
            for at in 1..text.len() - 1 {
                if text.as_bytes()[at] == b'-' {
                    let pair = (&text[..at], &text[at + 1..]);
                    prop_assert_eq!(seen.insert(group(pair.0, pair.1), pair), None);
                }
            }
        }
    }
}
