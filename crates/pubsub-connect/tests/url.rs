//! What a URL says, what is wrong with one, and what it never tells.

use std::time::Duration;

use pubsub_connect::{BusUrl, MAX_URL};
use pubsub_core::{Error, ErrorKind};

fn url(text: &str) -> BusUrl {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The option and the reason of an `InvalidOption`.
fn refusal(error: &Error) -> (&str, &str) {
    match error.kind() {
        ErrorKind::InvalidOption { option, reason } => (option, reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn takes_paths_as_they_are() {
    for (text, scheme, path) in [
        ("memory:", "memory", ""),
        ("MEMORY:jobs", "memory", "jobs"),
        ("unix:run/bus.sock", "unix", "run/bus.sock"),
        ("unix:/run/../bus.sock", "unix", "/run/../bus.sock"),
        ("unix:a%3Fb%20c+d#e", "unix", "a?b c+d#e"),
        ("unix:ä%C3%A4", "unix", "ää"),
        ("x-1.a+b:y:z", "x-1.a+b", "y:z"),
    ] {
        let url = url(text);
        assert_eq!((url.scheme(), url.path(), url.authority()), (scheme, path, None), "{text}");
    }
}

#[test]
fn takes_authorities_apart() {
    for (text, username, password, host, port, path) in [
        ("redis://h", None, None, "h", None, ""),
        ("redis://h:6379/0", None, None, "h", Some(6379), "/0"),
        ("redis://u:p%40%3A%2F@h/a/b", Some("u"), Some("p@:/"), "h", None, "/a/b"),
        ("redis://u:p@ss@h", Some("u"), Some("p@ss"), "h", None, ""),
        ("redis://:p@[::1]:1", None, Some("p"), "::1", Some(1), ""),
        ("redis://u@[::1]", Some("u"), None, "::1", None, ""),
        ("unix:///run/bus", None, None, "", None, "/run/bus"),
    ] {
        let url = url(text);
        let authority = url.authority().unwrap();
        assert_eq!((authority.username(), authority.password()), (username, password), "{text}");
        assert_eq!((authority.host(), authority.port(), url.path()), (host, port, path), "{text}");
    }
}

#[test]
fn reads_options_by_kind() {
    let mut url = url("memory:?d=250ms&e=5s&f=2m&g=1h&n=7&s=64KiB&t=1MiB&u=1GiB&v=9&yes=true&no=false&text=a%26b=c&&");
    for (option, millis) in [("d", 250), ("e", 5000), ("f", 120_000), ("g", 3_600_000)] {
        assert_eq!(url.duration(option).unwrap(), Some(Duration::from_millis(millis)));
    }
    for (option, bytes) in [("s", 65536), ("t", 1 << 20), ("u", 1 << 30), ("v", 9)] {
        assert_eq!(url.size(option).unwrap(), Some(bytes));
    }
    assert_eq!((url.flag("yes").unwrap(), url.flag("no").unwrap(), url.flag("none").unwrap()), (Some(true), Some(false), None));
    assert_eq!((url.number::<u8>("n").unwrap(), url.text("text")), (Some(7), Some("a&b=c")));
    assert_eq!(url.read("n", "seven", |n| (n == "7").then_some("seven")).unwrap(), Some("seven"));
}

#[test]
fn refuses_bad_values_by_option_and_value() {
    let long = "9".repeat(100);
    for value in ["", "5", "s", "-5s", "+5s", "5 s", "5S", "1.5s", "5d", "5ss", "18446744073709551615h", &long] {
        let error = url(&format!("memory:?wait={value}")).duration("wait").unwrap_err();
        let (option, reason) = refusal(&error);
        assert_eq!(option, "wait");
        assert!(reason.contains("is not a duration such as `250ms`"), "{reason}");
        assert!(reason.contains(&value[..value.len().min(40)]) && reason.len() < 150, "{reason}");
    }
    for value in ["", "64kb", "-1", "1.5MiB", "KiB", "18446744073709551615GiB"] {
        assert!(refusal(&url(&format!("x:?size={value}")).size("size").unwrap_err()).1.contains("is not a size"), "{value}");
    }
    for value in ["", "TRUE", "1", "yes"] {
        assert!(
            refusal(&url(&format!("x:?flag={value}")).flag("flag").unwrap_err()).1.contains("`true` or `false`"),
            "{value}"
        );
    }
    for value in ["", "256", "-1", "+1", "1e3"] {
        assert!(refusal(&url(&format!("x:?n={value}")).number::<u8>("n").unwrap_err()).1.contains("whole number"), "{value}");
    }
}

#[test]
fn refuses_what_is_no_url() {
    let long = format!("memory:{}", "x".repeat(MAX_URL));
    for (text, option, why) in [
        ("", "url", "begins with no scheme"),
        ("memory", "url", "begins with no scheme"),
        (":x", "url", "begins with no scheme"),
        ("1memory:", "url", "begins with no scheme"),
        ("run/bus.sock:x", "url", "begins with no scheme"),
        ("s23456789012345678901234567890123:", "url", "begins with no scheme"),
        ("memory:a\nb", "url", "control character at position 8"),
        (&long, "url", "has 8199 bytes; 8192 is the most"),
        ("memory:%", "url", "`%25`"),
        ("memory:%4", "url", "`%25`"),
        ("memory:%+4", "url", "`%25`"),
        ("memory:%é1", "url", "`%25`"),
        ("memory:%FF", "url", "`%25`"),
        ("memory:?a=%zz", "a", "`%25`"),
        ("memory:?a", "a", "has no value"),
        ("memory:?a=1&b=2&a=1", "a", "is given twice"),
        ("memory:?a=1&=2", "url", "the name of option number 2"),
        ("memory:?a=1&b%20c=2", "url", "the name of option number 2"),
        ("redis://h:", "url", "the host is written"),
        ("redis://h:65536", "url", "the host is written"),
        ("redis://h:+1", "url", "the host is written"),
        ("redis://::1", "url", "the host is written"),
        ("redis://[::1", "url", "the host is written"),
        ("redis://[::1]x", "url", "the host is written"),
    ] {
        let error = text.parse::<BusUrl>().unwrap_err();
        let (named, reason) = refusal(&error);
        assert!(named == option && reason.contains(why), "{text:?}: {error}");
        assert_eq!(error.operation(), Some("connect"));
    }
}

#[test]
fn half_a_password_is_never_quoted() {
    // Each has its secret where somebody who forgot to percent-encode would put it.
    for text in [
        "redis://user:s3cr/3t@host",
        "redis://user:s3cr?3t@host",
        "redis://user:s3cr?a=3t@host",
        "redis://user:s3cr3t%@host",
        "redis://user:s3cr3t",
        "redis:user:s3cr?3t@host",
        "s3cr3t",
        "s3cr3t@host",
    ] {
        let error = text.parse::<BusUrl>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("3cr"), "{text}: {error:?}");
    }
    for text in ["redis://user:s3cr3t@host:1/0?password=s3cr3t", "redis:user:s3cr3t@host", "redis://s3cr3t@host"] {
        let url = url(text);
        let told = format!("{url} {url:?} {:?}", url.authority());
        assert!(!told.contains("s3cr3t") && !told.contains("user") && told.contains("***@host"), "{text}: {told}");
    }
}
