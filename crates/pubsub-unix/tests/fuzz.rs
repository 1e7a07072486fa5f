//! The fuzz targets on made-up input: bytes by chance, and messages that are nearly right.
//!
//! `PROPTEST_CASES=n` makes it longer.

use proptest::prelude::*;

/// A frame: what its length says, its flags, and its body.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    // Small numbers are types, lengths and counts alike in this encoding.
    let byte = prop_oneof![4 => 0u8..8, 1 => any::<u8>()];
    let lie = prop_oneof![8 => Just(0i64), 1 => -3i64..3, 1 => any::<i32>().prop_map(i64::from)];
    (proptest::collection::vec(byte, 1..60), 0u8..3, lie).prop_map(|(body, flags, lie)| {
        let length = (body.len() as i64 + 1 + lie).clamp(0, i64::from(u32::MAX));
        let mut frame = u32::try_from(length).unwrap_or(0).to_le_bytes().to_vec();
        frame.push(flags);
        frame.extend(body);
        frame
    })
}

/// JSON, with a taste for envelopes, and now and then cut short.
fn line() -> impl Strategy<Value = Vec<u8>> {
    let word = || {
        const WORDS: &[&str] =
            &["type", "topic", "group", "event", "data", "id", "__m_codec__", "v", "n", "localOnly", "createdAt"];
        const VALUES: &[&str] =
            &["publish", "subscribe", "unsubscribe", "t", "g", "Date", "Undefined", "Map", "Set", "Error", "Class", "BigInt"];
        prop_oneof![proptest::sample::select(WORDS), proptest::sample::select(VALUES)].prop_map(|word| format!("{word:?}"))
    };
    let leaf = prop_oneof![word(), Just("null".to_owned()), Just("true".to_owned()), Just("-1.5e3".to_owned())];
    let value = leaf.prop_recursive(4, 48, 6, move |inner| {
        let members = proptest::collection::vec((word(), inner.clone()), 0..6);
        let object = members.prop_map(|members| {
            let members: Vec<_> = members.into_iter().map(|(key, value)| format!("{key}:{value}")).collect();
            format!("{{{}}}", members.join(","))
        });
        let array = proptest::collection::vec(inner, 0..4).prop_map(|values| format!("[{}]", values.join(",")));
        prop_oneof![3 => object, 1 => array]
    });
    let said = prop_oneof![Just("publish"), Just("subscribe"), Just("unsubscribe"), Just("event"), Just("subscribed")];
    let group = prop_oneof![Just(String::new()), Just(r#","group":"g""#.to_owned())];
    let whole = (said, group, value.clone()).prop_map(|(said, group, value)| {
        format!(r#"{{"type":"{said}","topic":"t"{group},"event":{{"type":"x","data":{value},"id":"i"}}}}"#)
    });
    (prop_oneof![3 => whole, 1 => value], prop_oneof![9 => Just(usize::MAX), 1 => 0usize..60]).prop_map(|(text, cut)| {
        let mut line = text.into_bytes();
        line.truncate(cut);
        line.push(b'\n');
        line
    })
}

fn stream(message: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    (any::<u8>(), proptest::collection::vec(message, 0..12)).prop_map(|(pieces, messages)| {
        let mut stream = vec![pieces];
        stream.extend(messages.concat());
        stream
    })
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2000)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn frames(data in stream(frame())) {
        pubsub_unix::fuzz::frames(&data);
    }

    #[test]
    fn lines(data in stream(line())) {
        pubsub_unix::fuzz::lines(&data);
    }

    #[test]
    fn bytes_by_chance(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        pubsub_unix::fuzz::frames(&data);
        pubsub_unix::fuzz::lines(&data);
    }
}
