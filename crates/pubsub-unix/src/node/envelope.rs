//! The tagged envelopes in which TypeScript peers write what JSON lacks, and the way between them and plain JSON.
//!
//! Their decoder takes an object for an envelope if its key `__m_codec__` holds a known tag as text and the rest has the right
//! shape. We are stricter where theirs would throw an error at the content: what it could not build is plain data here. In plain
//! JSON a `Date`, `URL` and `BigInt` are what they print as (the last a number), a `Map` is an object if its keys are text, numbers
//! or booleans and a list of pairs otherwise, a `Set` is a list, an `Error` and a `RegExp` are their fields, a `Class` its data,
//! and what is `Undefined` is left out of objects and `null` elsewhere.
//!
//! Plain data that looks like an envelope can be told to their decoder as what it is: the tag's text is itself put into the
//! envelope of a class that nobody has registered, which stands for its data. Then the key holds an object, which makes no envelope
//! of what is around it, and decodes to the text.

use bytes::Bytes;

use super::text::{Json, is, list};

pub(crate) const TAG: &str = "__m_codec__";

/// The longest source of a regular expression that their decoder takes.
const MAX_SOURCE: usize = 1024;

/// Whether there may be an envelope, or what looks like one, in a text: quickly, and never wrongly `false`.
pub(crate) fn may_be_tagged(json: &[u8]) -> bool {
    // A key may be written with escapes.
    memchr::memmem::find(json, TAG.as_bytes()).is_some() || memchr::memmem::find(json, b"\\u").is_some()
}

/// The plain JSON of a text with envelopes. None if it is nested too deeply to be looked into.
pub(crate) fn plain(json: &Bytes) -> Option<Bytes> {
    rewritten(json, write_plain)
}

/// Plain JSON so that nothing in it is taken for an envelope. None as for [`plain`].
pub(crate) fn escaped(json: &Bytes) -> Option<Bytes> {
    rewritten(json, write_escaped)
}

fn rewritten(json: &Bytes, write: fn(&Json<'_>, &mut Vec<u8>)) -> Option<Bytes> {
    if !may_be_tagged(json) {
        return Some(json.clone());
    }
    let value = Json::parse(std::str::from_utf8(json).ok()?)?;
    let mut out = Vec::with_capacity(json.len());
    write(&value, &mut out);
    Some(out.into())
}

/// What an envelope holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Envelope<'a, 'j> {
    Undefined,
    Date(&'a Json<'j>),
    /// Digits, with a sign if it is negative.
    BigInt(String),
    Url(&'a Json<'j>),
    RegExp(&'a Json<'j>),
    Map(Vec<(&'a Json<'j>, &'a Json<'j>)>),
    Set(&'a [Json<'j>]),
    Error(&'a Json<'j>),
    /// An instance of a class; its data, unless that is undefined.
    Class(Option<&'a Json<'j>>),
}

impl<'a, 'j> Envelope<'a, 'j> {
    /// The envelope that an object is, if it is one.
    pub(crate) fn of(value: &'a Json<'j>) -> Option<Self> {
        let (tag, held) = (value.get(TAG)?.as_text()?, value.get("v"));
        let text = || held.filter(|held| matches!(held, Json::Text(_)));
        match tag.as_str() {
            "Undefined" => Some(Self::Undefined),
            "Date" => text().map(Self::Date),
            "URL" => text().map(Self::Url),
            "BigInt" => integer(&text()?.as_text()?).map(Self::BigInt),
            "RegExp" => held.filter(|held| is_reg_exp(held)).map(Self::RegExp),
            "Map" => match held? {
                Json::Array(pairs) => pairs.iter().map(pair).collect::<Option<_>>().map(Self::Map),
                _ => None,
            },
            "Set" => match held? {
                Json::Array(values) => Some(Self::Set(values)),
                _ => None,
            },
            "Error" => held.filter(|held| matches!(held, Json::Object(_))).map(Self::Error),
            "Class" => value.get("n")?.as_text().map(|_| Self::Class(held)),
            _ => None,
        }
    }
}

fn pair<'a, 'j>(value: &'a Json<'j>) -> Option<(&'a Json<'j>, &'a Json<'j>)> {
    const NOTHING: &Json<'static> = &Json::Literal("null");
    match value {
        Json::Array(pair) => Some((pair.first().unwrap_or(NOTHING), pair.get(1).unwrap_or(NOTHING))),
        _ => None,
    }
}

/// A whole number as JSON writes it.
fn integer(text: &str) -> Option<String> {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(match digits.trim_start_matches('0') {
        "" => "0".into(),
        digits => format!("{sign}{digits}"),
    })
}

fn is_reg_exp(value: &Json<'_>) -> bool {
    let field = |name| value.get(name).and_then(Json::as_text);
    let (Some(source), Some(flags)) = (field("source"), field("flags")) else { return false };
    let known =
        flags.bytes().enumerate().all(|(at, flag)| b"dgimsuvy".contains(&flag) && !flags.as_bytes()[..at].contains(&flag));
    known && source.encode_utf16().count() <= MAX_SOURCE
}

fn write_plain(value: &Json<'_>, out: &mut Vec<u8>) {
    match Envelope::of(value) {
        Some(Envelope::Undefined | Envelope::Class(None)) => out.extend_from_slice(b"null"),
        Some(Envelope::Date(held) | Envelope::Url(held) | Envelope::Class(Some(held))) => write_plain(held, out),
        Some(Envelope::RegExp(fields) | Envelope::Error(fields)) => write_fields(fields, out),
        Some(Envelope::BigInt(digits)) => out.extend_from_slice(digits.as_bytes()),
        Some(Envelope::Set(values)) => list(out, b"[]", values, write_plain),
        Some(Envelope::Map(pairs)) => write_map(&pairs, out),
        None => match value {
            Json::Array(values) => list(out, b"[]", values, write_plain),
            _ => write_fields(value, out),
        },
    }
}

/// An object member by member, without those that are undefined.
fn write_fields(value: &Json<'_>, out: &mut Vec<u8>) {
    let Json::Object(members) = value else { return value.write(out) };
    let is_there = |value: &Json<'_>| !matches!(Envelope::of(value), Some(Envelope::Undefined));
    let members: Vec<_> = members.iter().filter(|(_, value)| is_there(value)).collect();
    list(out, b"{}", &members, |(key, value), out| {
        out.extend_from_slice(key.as_bytes());
        out.push(b':');
        write_plain(value, out);
    });
}

fn write_map(pairs: &[(&Json<'_>, &Json<'_>)], out: &mut Vec<u8>) {
    let key = |key: &Json<'_>| match key {
        Json::Text(raw) => Some((*raw).to_owned()),
        Json::Number(raw) => Some(format!("\"{raw}\"")),
        Json::Literal(raw) if *raw != "null" => Some(format!("\"{raw}\"")),
        _ => None,
    };
    let keys: Option<Vec<String>> = pairs.iter().map(|(of, _)| key(of)).collect();
    let distinct = |keys: &Vec<String>| keys.iter().collect::<std::collections::HashSet<_>>().len() == keys.len();
    match keys.filter(distinct) {
        Some(keys) => {
            let members: Vec<_> = keys.iter().zip(pairs).collect();
            list(out, b"{}", &members, |(key, (_, value)), out| {
                out.extend_from_slice(key.as_bytes());
                out.push(b':');
                write_plain(value, out);
            });
        }
        None => list(out, b"[]", pairs, |(key, value), out| {
            out.push(b'[');
            write_plain(key, out);
            out.push(b',');
            write_plain(value, out);
            out.push(b']');
        }),
    }
}

fn write_escaped(value: &Json<'_>, out: &mut Vec<u8>) {
    match value {
        Json::Array(values) => list(out, b"[]", values, write_escaped),
        Json::Object(members) => list(out, b"{}", members, |(key, value), out| {
            out.extend_from_slice(key.as_bytes());
            out.push(b':');
            match value {
                Json::Text(tag) if is(key, TAG) => {
                    out.extend_from_slice(format!(r#"{{"{TAG}":"Class","n":"plain","v":{tag}}}"#).as_bytes());
                }
                _ => write_escaped(value, out),
            }
        }),
        _ => value.write(out),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn tag(tag: &str, v: Value) -> Value {
        json!({TAG: tag, "v": v})
    }

    fn plain_of(value: &Value) -> Value {
        let json = plain(&Bytes::from(value.to_string())).unwrap();
        serde_json::from_slice(&json).unwrap()
    }

    #[test]
    fn every_envelope_has_a_plain_form() {
        let undefined = json!({TAG: "Undefined"});
        for (tagged, expected) in [
            (tag("Date", json!("2026-01-02T03:04:05.006Z")), json!("2026-01-02T03:04:05.006Z")),
            (tag("URL", json!("https://example.org/?a=b")), json!("https://example.org/?a=b")),
            (tag("BigInt", json!("-007")), json!(-7)),
            (tag("RegExp", json!({"source": "a+", "flags": "gi"})), json!({"source": "a+", "flags": "gi"})),
            (tag("Set", json!([1, tag("Set", json!([]))])), json!([1, []])),
            (tag("Map", json!([["a", tag("BigInt", json!("1"))], [2, undefined]])), json!({"a": 1, "2": null})),
            (tag("Map", json!([[{"k": 1}, 1]])), json!([[{"k": 1}, 1]])),
            (tag("Map", json!([["1", "a"], [1, "b"]])), json!([["1", "a"], [1, "b"]])),
            (
                tag("Error", json!({"name": "TypeError", "message": "no", "cause": tag("Set", json!([1])), "gone": undefined})),
                json!({"name": "TypeError", "message": "no", "cause": [1]}),
            ),
            (json!({TAG: "Class", "n": "Step", "v": {"at": tag("Date", json!("x"))}}), json!({"at": "x"})),
            (json!({TAG: "Class", "n": "Step"}), json!(null)),
            (json!({"a": undefined, "b": [undefined]}), json!({"b": [null]})),
            (undefined.clone(), json!(null)),
        ] {
            assert_eq!(plain_of(&tagged), expected, "{tagged}");
        }
        let big = Bytes::from(tag("BigInt", json!("123456789012345678901234567890")).to_string());
        assert_eq!(plain(&big).unwrap(), "123456789012345678901234567890");
    }

    #[test]
    fn what_only_looks_like_an_envelope_is_plain_data() {
        for alike in [
            tag("Date", json!(1)),
            tag("BigInt", json!("1e3")),
            tag("BigInt", json!("")),
            tag("BigInt", json!(1)),
            tag("URL", json!(null)),
            tag("RegExp", json!({"source": "a", "flags": "gg"})),
            tag("RegExp", json!({"source": "a", "flags": "x"})),
            tag("RegExp", json!({"source": "a".repeat(1025), "flags": ""})),
            tag("Map", json!({"a": 1})),
            tag("Map", json!([1])),
            tag("Set", json!("ab")),
            tag("Error", json!(null)),
            json!({TAG: "Class", "n": 1, "v": 2}),
            tag("Unknown", json!(1)),
            json!({TAG: 1}),
            json!({TAG: {"a": 1}, "v": 1}),
        ] {
            assert_eq!(plain_of(&alike), alike);
        }
    }

    #[test]
    fn a_hidden_key_is_found() {
        let hidden = Bytes::from_static(br#"{"\u005f_m_codec__":"Date","v":"x"}"#);
        assert_eq!(plain(&hidden).unwrap(), r#""x""#);
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(json!(null)),
            any::<i32>().prop_map(|number| json!(number)),
            prop_oneof![Just("Date"), Just("Class"), Just("Undefined"), Just("x"), Just("12"), Just(TAG)]
                .prop_map(|s| json!(s)),
        ];
        leaf.prop_recursive(4, 40, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(prop_oneof![Just(TAG), Just("v"), Just("n"), Just("a")], inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_was_escaped_is_plain_again(value in values()) {
            let there = escaped(&Bytes::from(value.to_string())).unwrap();
            let back: Value = serde_json::from_slice(&plain(&there).unwrap()).unwrap();
            prop_assert_eq!(back, value);
        }
    }
}
