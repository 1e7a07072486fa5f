//! Whatever is given as a URL, nothing panics, and what was encoded is read back.

use std::time::Duration;

use futures::FutureExt;
use proptest::prelude::*;
use pubsub_connect::{BusUrl, connect};

fn url(text: &str) -> BusUrl {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Text that is near enough to a URL to get past the first checks.
fn nearly_a_url() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "[ -~]{0,8}",
        "\\PC{0,4}",
        prop::sample::select(vec![
            "//",
            "@",
            ":",
            "?",
            "&",
            "=",
            "%",
            "%41",
            "%C3",
            "[",
            "]",
            "/",
            "a=1",
            "5s",
            "memory:",
            "leases=",
            "replay=",
            "max_payload=",
            "\0"
        ])
        .prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

fn percent(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

proptest! {
    #[test]
    fn no_text_panics(rest in nearly_a_url(), scheme in "(memory:|x:|)") {
        let text = format!("{scheme}{rest}");
        // It connects or is refused, and does neither later.
        prop_assert!(connect(&text).now_or_never().is_some());
        if let Ok(mut url) = text.parse::<BusUrl>() {
            let _ = (url.duration("a"), url.size("a"), url.flag("a"), url.number::<u16>("a"));
            let _ = format!("{url} {url:?}");
        }
    }

    #[test]
    fn encoding_hides_nothing_from_the_reader(user in "\\PC{1,8}", password in "\\PC{1,8}", path in "\\PC{0,8}", value in "\\PC{0,8}") {
        let text = format!("x://{}:{}@h/{}?v={}", percent(&user), percent(&password), percent(&path), percent(&value));
        let mut url = url(&text);
        let authority = url.authority().unwrap();
        prop_assert_eq!((authority.username(), authority.password()), (Some(&*user), Some(&*password)));
        prop_assert_eq!(url.path(), format!("/{path}"));
        prop_assert_eq!(url.text("v"), Some(&*value));
    }

    #[test]
    fn numbers_with_units_read_as_written(number in 0..1_000_000_u64) {
        let mut url = url(&format!("x:?d={number}m&s={number}KiB"));
        prop_assert_eq!(url.duration("d").unwrap(), Some(Duration::from_secs(number * 60)));
        prop_assert_eq!(url.size("s").unwrap(), Some(number as usize * 1024));
    }
}
