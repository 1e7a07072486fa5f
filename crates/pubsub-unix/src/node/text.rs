//! JSON as text that is taken apart no further than needed: what is not touched is written again byte for byte, numbers of any size,
//! the order of keys and all.

/// How deep values may be nested where they have to be looked into. What is deeper cannot be read by serde_json either.
pub(crate) const MAX_DEPTH: usize = 128;

/// A JSON value; strings, numbers and literals are slices of the text they came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Json<'a> {
    Text(&'a str),
    Number(&'a str),
    Literal(&'a str),
    Array(Vec<Json<'a>>),
    /// Keys as they came, in quotes.
    Object(Vec<(&'a str, Json<'a>)>),
}

impl<'a> Json<'a> {
    /// Takes a text apart that is known to be one JSON value. None if it is not, or is nested too deeply.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let mut parser = Parser { text, at: 0 };
        let value = parser.value(0)?;
        parser.space();
        (parser.at == text.len()).then_some(value)
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Text(raw) | Self::Number(raw) | Self::Literal(raw) => out.extend_from_slice(raw.as_bytes()),
            Self::Array(values) => list(out, b"[]", values, Json::write),
            Self::Object(members) => list(out, b"{}", members, |(key, value), out| {
                out.extend_from_slice(key.as_bytes());
                out.push(b':');
                value.write(out);
            }),
        }
    }

    /// The value of a key; the last if there are several, as JavaScript has it.
    pub(crate) fn get(&self, name: &str) -> Option<&Self> {
        let Self::Object(members) = self else { return None };
        members.iter().rev().find(|(key, _)| is(key, name)).map(|(_, value)| value)
    }

    /// The text, if it is one.
    pub(crate) fn as_text(&self) -> Option<String> {
        match self {
            Self::Text(raw) => serde_json::from_str(raw).ok(),
            _ => None,
        }
    }
}

/// Writes what stands between brackets.
pub(crate) fn list<T>(out: &mut Vec<u8>, brackets: &[u8; 2], items: &[T], mut write: impl FnMut(&T, &mut Vec<u8>)) {
    out.push(brackets[0]);
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        write(item, out);
    }
    out.push(brackets[1]);
}

/// Whether a key in quotes is this name, which has nothing in it that must be escaped.
pub(crate) fn is(key: &str, name: &str) -> bool {
    let bare = &key[1..key.len() - 1];
    bare == name || (bare.contains('\\') && serde_json::from_str::<String>(key).is_ok_and(|key| key == name))
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn space(&mut self) {
        let rest = &self.text.as_bytes()[self.at..];
        self.at += rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
    }

    fn peek(&mut self) -> Option<u8> {
        self.space();
        self.text.as_bytes().get(self.at).copied()
    }

    fn next_is(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn value(&mut self, depth: usize) -> Option<Json<'a>> {
        if depth > MAX_DEPTH {
            return None;
        }
        match self.peek()? {
            b'"' => self.string().map(Json::Text),
            b'[' => self.array(depth),
            b'{' => self.object(depth),
            b'-' | b'0'..=b'9' => self.word().map(Json::Number),
            _ => self.word().map(Json::Literal),
        }
    }

    fn array(&mut self, depth: usize) -> Option<Json<'a>> {
        self.at += 1;
        let mut values = Vec::new();
        if self.next_is(b']') {
            return Some(Json::Array(values));
        }
        loop {
            values.push(self.value(depth + 1)?);
            if self.next_is(b']') {
                return Some(Json::Array(values));
            }
            if !self.next_is(b',') {
                return None;
            }
        }
    }

    fn object(&mut self, depth: usize) -> Option<Json<'a>> {
        self.at += 1;
        let mut members = Vec::new();
        if self.next_is(b'}') {
            return Some(Json::Object(members));
        }
        loop {
            if self.peek()? != b'"' {
                return None;
            }
            let key = self.string()?;
            if !self.next_is(b':') {
                return None;
            }
            members.push((key, self.value(depth + 1)?));
            if self.next_is(b'}') {
                return Some(Json::Object(members));
            }
            if !self.next_is(b',') {
                return None;
            }
        }
    }

    fn string(&mut self) -> Option<&'a str> {
        let (bytes, start) = (self.text.as_bytes(), self.at);
        let mut at = start + 1;
        loop {
            match bytes.get(at)? {
                b'"' => {
                    self.at = at + 1;
                    return Some(&self.text[start..=at]);
                }
                b'\\' => at += 2,
                _ => at += 1,
            }
        }
    }

    fn word(&mut self) -> Option<&'a str> {
        let rest = &self.text.as_bytes()[self.at..];
        let length = rest.iter().take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.')).count();
        let word = (length > 0).then(|| &self.text[self.at..self.at + length])?;
        self.at += length;
        Some(word)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_touched_is_written_as_it_came() {
        for text in [
            r#"{"a":[1,-2.50e+400,123456789012345678901234567890],"a":null,"":{},"b":[],"\u0062\ud800":"\"\\ü🦀"}"#,
            "true",
            r#""""#,
        ] {
            let mut written = Vec::new();
            Json::parse(text).unwrap().write(&mut written);
            assert_eq!(String::from_utf8(written).unwrap(), text);
        }
        let spaced = Json::parse(" { \"a\" :\t[ 1 , \"x y\" ] }\r\n").unwrap();
        let mut written = Vec::new();
        spaced.write(&mut written);
        assert_eq!(written, br#"{"a":[1,"x y"]}"#);
    }

    #[test]
    fn a_key_is_found_however_it_is_written_and_the_last_one_counts() {
        let value = Json::parse(r#"{"tag":1,"\u0074ag":2}"#).unwrap();
        assert_eq!(value.get("tag"), Some(&Json::Number("2")));
    }

    #[test]
    fn what_is_nested_too_deeply_is_not_looked_into() {
        let nested = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        assert!(Json::parse(&nested(MAX_DEPTH)).is_some());
        assert!(Json::parse(&nested(MAX_DEPTH + 1)).is_none());
        assert!(Json::parse(&nested(1 << 20)).is_none(), "and takes no stack");
    }

    proptest! {
        #[test]
        fn garbage_is_refused_and_never_panics(text in "[\\[\\]{}\",:\\\\a1ü ]{0,40}") {
            if let Some(value) = Json::parse(&text) {
                value.write(&mut Vec::new());
            }
        }
    }
}
