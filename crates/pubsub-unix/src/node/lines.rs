//! The tongue of TypeScript peers: one JSON object a line, of at most 64 MiB.

use bytes::{Bytes, BytesMut};
use pubsub_core::{EventId, Timestamp, Topic};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use smol_str::SmolStr;

use super::envelope::{Envelope, TAG, escaped};
use super::text::Json;
use crate::frame::{MAX_FRAME, Malformed};
use crate::record::{Stored, event_id};

/// The longest event that a TypeScript peer may publish: one that travels in frames as well, with others.
pub(crate) const MAX_EVENT: usize = 32 << 20;

/// How much of a line is not its event.
const WRAPPING: usize = 4096;

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    pub(crate) buffer: BytesMut,
    /// How much of the buffer has no end of a line.
    searched: usize,
}

impl Lines {
    /// Goes on with what was read already.
    pub(crate) fn over(buffer: BytesMut) -> Self {
        Self { buffer, searched: 0 }
    }

    /// The next line with something in it, once it is whole.
    ///
    /// # Errors
    /// If it is too long, whole or not: the connection is to be closed.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, Malformed> {
        loop {
            let Some(found) = memchr::memchr(b'\n', &self.buffer[self.searched..]) else {
                self.searched = self.buffer.len();
                return if self.searched > MAX_FRAME { Err(Malformed::TooLong(self.searched)) } else { Ok(None) };
            };
            let length = std::mem::take(&mut self.searched) + found;
            if length > MAX_FRAME {
                return Err(Malformed::TooLong(length));
            }
            let line = self.buffer.split_to(length + 1).freeze().slice(..length);
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(line));
            }
        }
    }
}

/// What is said in a line, in either direction. What is not understood is not there: their side ignores it too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Subscribe(SmolStr, Option<SmolStr>),
    Unsubscribe(SmolStr, Option<SmolStr>),
    /// An event as the publisher wrote it, and whether it is for its own subscriptions only.
    Publish(SmolStr, Bytes, bool),
    Subscribed(SmolStr, Option<SmolStr>),
    Unsubscribed,
    Event(SmolStr, Option<SmolStr>, Bytes),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    topic: Option<&'a RawValue>,
    #[serde(borrow)]
    group: Option<&'a RawValue>,
    #[serde(borrow)]
    event: Option<&'a RawValue>,
    #[serde(borrow)]
    local_only: Option<&'a RawValue>,
}

/// What a line says, if it says anything. Names that cannot be a topic's or a group's are none.
pub(crate) fn understand(line: &Bytes) -> Option<Said> {
    let said: Line<'_> = serde_json::from_slice(line).ok()?;
    let topic = SmolStr::new(name(said.topic?)?);
    let group = match said.group {
        Some(group) if !is_undefined(group) => Some(SmolStr::new(name(group)?)),
        _ => None,
    };
    let event = || {
        let event = said.event.filter(|event| event.get().starts_with('{'))?;
        Some(line.slice_ref(event.get().as_bytes()))
    };
    let kind: String = serde_json::from_str(said.kind?.get()).ok()?;
    Some(match kind.as_str() {
        "subscribe" => Said::Subscribe(topic, group),
        "unsubscribe" => Said::Unsubscribe(topic, group),
        "publish" => Said::Publish(topic, event()?, said.local_only.is_some_and(|only| only.get() == "true")),
        "subscribed" => Said::Subscribed(topic, group),
        "unsubscribed" => Said::Unsubscribed,
        "event" => Said::Event(topic, group, event()?),
        _ => return None,
    })
}

fn name(raw: &RawValue) -> Option<String> {
    let name: String = serde_json::from_str(raw.get()).ok()?;
    Topic::new(&name).is_ok().then_some(name) // groups have the same rules
}

fn is_undefined(raw: &RawValue) -> bool {
    let value = Json::parse(raw.get());
    value.is_some_and(|value| value == Json::Literal("null") || Envelope::of(&value) == Some(Envelope::Undefined))
}

/// A line about a membership: `subscribe` and the like.
pub(crate) fn membership(kind: &str, topic: &str, group: Option<&str>, out: &mut Vec<u8>) {
    open(kind, topic, group, out);
    out.extend_from_slice(b"}\n");
}

/// A line with an event in it.
pub(crate) fn carry(kind: &str, topic: &str, group: Option<&str>, event: &[u8], out: &mut Vec<u8>) {
    open(kind, topic, group, out);
    out.extend_from_slice(b",\"event\":");
    out.extend_from_slice(event);
    out.extend_from_slice(b"}\n");
}

fn open(kind: &str, topic: &str, group: Option<&str>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"type\":");
    string(kind, out);
    out.extend_from_slice(b",\"topic\":");
    string(topic, out);
    if let Some(group) = group {
        out.extend_from_slice(b",\"group\":");
        string(group, out);
    }
}

fn string(text: &str, out: &mut Vec<u8>) {
    serde_json::to_writer(out, text).expect("text is JSON");
}

/// Who an event is, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) id: EventId,
    pub(crate) created_at: Timestamp,
}

/// The field in which an event of ours says who it was when it was published, since a TypeScript broker stamps it anew; with its topic,
/// so that nobody's copy of it is taken for the event itself.
const STAMP: &str = "stamp";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OwnStamp {
    id: String,
    created_at: String,
    topic: String,
}

/// The members of an event in the order they came; none if it is no object, or its keys are not text.
fn members(event: &[u8]) -> Option<Vec<(String, &RawValue)>> {
    struct Members<'a>(Vec<(String, &'a RawValue)>);
    impl<'de> Deserialize<'de> for Members<'de> {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = Members<'de>;

                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an event")
                }

                fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                    let mut members = Vec::new();
                    while let Some(member) = map.next_entry()? {
                        members.push(member);
                    }
                    Ok(Members(members))
                }
            }
            deserializer.deserialize_map(Visitor)
        }
    }
    serde_json::from_slice::<Members<'_>>(event).ok().map(|members| members.0)
}

fn member(key: &str, value: &str, out: &mut Vec<u8>) {
    if out.len() > 1 {
        out.push(b',');
    }
    string(key, out);
    out.push(b':');
    out.extend_from_slice(value.as_bytes());
}

/// An event that was published in lines, as it is kept: with its own stamp if it has one, or this one.
pub(crate) fn stamped(topic: &str, event: &[u8], stamp: Stamp) -> Option<Stored> {
    kept(topic, event, |_| Some(stamp))
}

/// An event that a TypeScript broker delivered, as it is kept. None if it lacks what a broker stamps.
pub(crate) fn delivered(topic: &str, event: &[u8]) -> Option<Stored> {
    kept(topic, event, |members| {
        let id = serde_json::from_str::<String>(find(members, "id")?).ok()?;
        let created_at = match Envelope::of(&Json::parse(find(members, "createdAt")?)?)? {
            Envelope::Date(date) => Timestamp::parse(&date.as_text()?).ok()?,
            _ => return None,
        };
        Some(Stamp { id: EventId::new(id).ok()?, created_at })
    })
}

fn find<'a>(members: &[(String, &'a RawValue)], name: &str) -> Option<&'a str> {
    members.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.get())
}

/// The stamp that an event brought along, if it is that of an event of this topic.
fn own_stamp(topic: &str, members: &[(String, &RawValue)]) -> Option<Stamp> {
    let own: OwnStamp = serde_json::from_str(find(members, STAMP)?).ok()?;
    let stamp = Stamp { id: EventId::new(own.id).ok()?, created_at: Timestamp::parse(&own.created_at).ok()? };
    (own.topic == topic).then_some(stamp)
}

fn kept(topic: &str, event: &[u8], stamp: impl FnOnce(&[(String, &RawValue)]) -> Option<Stamp>) -> Option<Stored> {
    let members = members(event)?;
    let own = own_stamp(topic, &members);
    let has_own = own.is_some();
    let Stamp { id, created_at } = own.or_else(|| stamp(&members))?;
    let mut json = Vec::with_capacity(event.len() + 96);
    json.push(b'{');
    // What comes twice counts as it came last, like in JavaScript, and would not be read at all here.
    let is_last = |at: usize, key: &str| members[at + 1..].iter().all(|(later, _)| later != key);
    for (at, (key, value)) in members.iter().enumerate() {
        // An event as a whole is no envelope, whatever it has in it.
        let is_ours = matches!(key.as_str(), "id" | "createdAt" | "deliveryAttempt" | TAG) || (has_own && key == STAMP);
        if !is_ours && !is_undefined_envelope(value) && is_last(at, key) {
            member(key, value.get(), &mut json);
        }
    }
    member("id", &quoted(&id.to_string()), &mut json);
    member("createdAt", &quoted(&created_at.to_string()), &mut json);
    json.push(b'}');
    Some(Stored::of_json(&id, created_at, &json))
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("text is JSON")
}

fn is_undefined_envelope(raw: &RawValue) -> bool {
    // Looked at only where it can be one: it is short.
    raw.get().len() < 64 && raw.get().starts_with('{') && is_undefined(raw)
}

/// A kept event as a TypeScript subscriber is told it, at this attempt.
pub(crate) fn told(stored: &Stored, attempt: u32) -> Option<Vec<u8>> {
    written(stored, attempt, None)
}

/// An event of ours as it is published in lines. A TypeScript broker will stamp it anew; its own stamp it takes along.
pub(crate) fn offered(topic: &str, stored: &Stored) -> Option<Vec<u8>> {
    written(stored, 1, Some(topic))
}

fn written(stored: &Stored, attempt: u32, topic: Option<&str>) -> Option<Vec<u8>> {
    let json = if stored.is_tagged() { stored.shared_json() } else { escaped(&stored.shared_json())? };
    let mut event = Vec::with_capacity(json.len() + 96);
    event.push(b'{');
    for (key, value) in members(&json)? {
        match key.as_str() {
            "createdAt" => member(&key, &format!(r#"{{"__m_codec__":"Date","v":{}}}"#, value.get()), &mut event),
            "deliveryAttempt" => {}
            STAMP if topic.is_some() => {}
            _ => member(&key, value.get(), &mut event),
        }
    }
    member("deliveryAttempt", &attempt.to_string(), &mut event);
    if let Some(topic) = topic {
        let created_at = Timestamp::from_millis(stored.created_at()).ok()?;
        let id = event_id(&stored.id()).to_string();
        let own = OwnStamp { id, created_at: created_at.to_string(), topic: topic.to_owned() };
        member(STAMP, &serde_json::to_string(&own).expect("plain data is JSON"), &mut event);
    }
    event.push(b'}');
    // A longer line would end the connection of whoever is told it.
    (event.len() <= MAX_FRAME - WRAPPING).then_some(event)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn stamp() -> Stamp {
        let id = uuid::Uuid::from_u128(7).into();
        Stamp { id, created_at: Timestamp::from_millis(1_700_000_000_123).unwrap() }
    }

    #[test]
    fn lines_are_understood_as_their_side_understands_them() {
        let said = |text: &str| understand(&Bytes::from(text.to_owned()));
        let t = || SmolStr::new("t");
        assert_eq!(said(r#"{"type":"subscribe","topic":"t"}"#), Some(Said::Subscribe(t(), None)));
        let undefined = r#"{"type":"subscribe","topic":"t","group":{"__m_codec__":"Undefined"}}"#;
        assert_eq!(said(undefined), Some(Said::Subscribe(t(), None)));
        let grouped = " {\"x\":1,\"group\":\"g\",\"topic\":\"t\",\"type\":\"unsubscribe\"}\r";
        assert_eq!(said(grouped), Some(Said::Unsubscribe(t(), Some("g".into()))));
        let publish = r#"{"type":"publish","topic":"t","event":{"a":1},"localOnly":{"__m_codec__":"Undefined"}}"#;
        assert_eq!(said(publish), Some(Said::Publish(t(), Bytes::from_static(b"{\"a\":1}"), false)));
        let local = r#"{"type":"publish","topic":"t","event":{},"localOnly":true}"#;
        assert!(matches!(said(local), Some(Said::Publish(_, _, true))));
        for junk in [
            "",
            "{",
            "[]",
            "null",
            "{}",
            "\"publish\"",
            r#"{"type":"publish","topic":"t"}"#,
            r#"{"type":"publish","topic":"t","event":[]}"#,
            r#"{"type":"other","topic":"t"}"#,
            r#"{"type":"subscribe","topic":""}"#,
            r#"{"type":"subscribe","topic":1}"#,
            r#"{"type":"subscribe","topic":"t","group":{"a":1}}"#,
            r#"{"type":1,"topic":"t"}"#,
        ] {
            assert_eq!(said(junk), None, "{junk}");
        }
    }

    #[test]
    fn an_event_comes_and_goes_whole_but_for_its_stamp() {
        let date = json!({"__m_codec__": "Date", "v": "2026-01-02T03:04:05.006Z"});
        let undefined = json!({"__m_codec__": "Undefined"});
        let sent = json!({
            "type": "x", "id": "mine", "createdAt": 1, "deliveryAttempt": 9, "runId": "r", "data": {"d": date, "u": undefined},
            "spanId": date, "gone": undefined,
        });
        let stored = stamped("t", sent.to_string().as_bytes(), stamp()).unwrap();
        assert!(stored.is_tagged());
        let kept: Value = serde_json::from_slice(stored.json()).unwrap();
        let id = "00000000-0000-0000-0000-000000000007";
        assert_eq!(
            kept,
            json!({"type": "x", "id": id, "createdAt": "2023-11-14T22:13:20.123Z", "runId": "r",
                   "data": {"d": date, "u": undefined}, "spanId": date})
        );
        let told_as: Value = serde_json::from_slice(&told(&stored, 3).unwrap()).unwrap();
        let created = json!({"__m_codec__": "Date", "v": "2023-11-14T22:13:20.123Z"});
        assert_eq!((&told_as["createdAt"], &told_as["deliveryAttempt"], &told_as["data"]["d"]), (&created, &json!(3), &date));
        let again = delivered("t", told_as.to_string().as_bytes()).unwrap();
        assert_eq!((again.id(), again.created_at()), (stored.id(), stored.created_at()));
        assert_eq!(serde_json::from_slice::<Value>(again.json()).unwrap(), kept);
    }

    #[test]
    fn an_event_of_ours_stays_itself_under_a_broker_that_stamps_it_anew() {
        let json = br#"{"type":"x","data":1,"id":"mine","createdAt":"1970-01-01T00:00:00.000Z"}"#;
        let offered = offered("t", &Stored::text("mine", json)).unwrap();
        let mut stamped: Value = serde_json::from_slice(&offered).unwrap();
        stamped["id"] = "theirs".into();
        stamped["createdAt"] = json!({"__m_codec__": "Date", "v": "2026-01-02T03:04:05.006Z"});
        let kept = |topic: &str| delivered(topic, stamped.to_string().as_bytes()).unwrap();
        let same: Value = serde_json::from_slice(kept("t").json()).unwrap();
        assert_eq!(same, serde_json::from_slice::<Value>(json).unwrap());
        assert_eq!((event_id(&kept("t").id()).to_string(), kept("t").created_at()), ("mine".into(), 0));
        // Passed on to another topic it is another event.
        assert_eq!(event_id(&kept("other").id()).to_string(), "theirs");
    }

    #[test]
    fn plain_data_that_looks_like_an_envelope_is_told_as_what_it_is() {
        let stored = Stored::text("1", br#"{"type":"x","data":{"__m_codec__":"Date","v":"a"},"createdAt":"b"}"#);
        let told: Value = serde_json::from_slice(&told(&stored, 1).unwrap()).unwrap();
        assert_eq!(told["data"]["__m_codec__"], json!({"__m_codec__": "Class", "n": "plain", "v": "Date"}));
    }

    proptest! {
        #[test]
        fn lines_come_whole_wherever_they_are_cut(lines in proptest::collection::vec("[a-zü{}\"]{1,12}", 1..8), ends in 0usize..3) {
            let end = ["\n", "\n\n", "\n \t\r\n"][ends];
            let bytes = lines.iter().map(|line| format!("{line}{end}")).collect::<String>().into_bytes();
            for cut in 0..=bytes.len() {
                let (mut decoder, mut found) = (Lines::default(), Vec::new());
                for part in [&bytes[..cut], &bytes[cut..]] {
                    decoder.buffer.extend_from_slice(part);
                    while let Some(line) = decoder.next().unwrap() {
                        found.push(String::from_utf8(line.to_vec()).unwrap());
                    }
                }
                prop_assert_eq!(&found, &lines);
            }
        }
    }

    #[test]
    fn a_line_without_an_end_is_given_up_at_the_bound() {
        let mut lines = Lines { buffer: BytesMut::from(&vec![b'x'; MAX_FRAME][..]), searched: 0 };
        assert_eq!(lines.next(), Ok(None));
        lines.buffer.extend_from_slice(b"x");
        assert_eq!(lines.next(), Err(Malformed::TooLong(MAX_FRAME + 1)));
    }
}
