//! A bus's address, taken apart: `scheme:rest?option=value&option=value`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use pubsub_core::{Error, Result};

use crate::nearest::nearest;

/// The longest URL in bytes.
pub const MAX_URL: usize = 8192;

const MAX_SCHEME: usize = 32;
const MAX_OPTION: usize = 40;

/// The URL of a bus, and what was asked of it.
///
/// `scheme:path?option=value&option=value`, or `scheme://user:password@host:port/path?...`. Schemes are lower case. Any part but
/// the scheme may be percent-encoded; a `+` is a plus, and there are no fragments. In the second form, and behind the `?`, a
/// literal `@` must be `%40`, which keeps half a password from passing for something else.
///
/// Values are asked for by option and kind: a duration is `250ms`, `5s`, `2m` or `1h`; a size is a number of bytes, or of `KiB`,
/// `MiB` or `GiB`; a flag is `true` or `false`. What was never asked for is unknown, and refused by the
/// [`Registry`](crate::Registry).
///
/// `Display` and `Debug` show neither credentials nor options.
#[derive(Clone)]
pub struct BusUrl {
    scheme: String,
    authority: Option<Authority>,
    path: String,
    options: Vec<(String, String)>,
    asked: Vec<&'static str>,
    shown: String,
}

/// The `user:password@host:port` of a [`BusUrl`]. Its `Debug` shows no credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct Authority {
    username: Option<String>,
    password: Option<String>,
    host: String,
    port: Option<u16>,
}

impl Authority {
    /// The user's name, if there is one.
    pub fn username(&self) -> Option<&str> {
        self.username.as_deref()
    }

    /// The password, if there is one.
    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    /// The host, an IPv6 address without its brackets; may be empty.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, if there is one.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    fn parse(text: &str) -> Result<Self> {
        let (user, place) = match text.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, text),
        };
        let (username, password) = match user.map(|user| user.split_once(':').unwrap_or((user, ""))) {
            Some((name, password)) => (Some(decode(name)?), Some(decode(password)?)),
            None => (None, None),
        };
        let bad = || {
            bad("the host is written `name`, `name:port`, `[IPv6 address]` or `[IPv6 address]:port`, with a port up to 65535")
        };
        let (host, rest) = match place.strip_prefix('[') {
            Some(bracketed) => bracketed.split_once(']').ok_or_else(bad)?,
            None => place.split_at(place.find(':').unwrap_or(place.len())),
        };
        let port = match rest.strip_prefix(':') {
            Some(port) => Some(digits(port).ok_or_else(bad)?),
            None if rest.is_empty() => None,
            None => return Err(bad()),
        };
        let given = |text: &String| !text.is_empty();
        Ok(Self { username: username.filter(given), password: password.filter(given), host: decode(host)?, port })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

impl FromStr for BusUrl {
    type Err = Error;

    /// # Errors
    /// `InvalidOption`, naming `url` or the option that is at fault.
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text).map_err(|error| error.during("connect"))
    }
}

impl BusUrl {
    // Nothing in here quotes what it refuses: a secret that is not where it should be is still a secret.
    fn parse(text: &str) -> Result<Self> {
        if text.len() > MAX_URL {
            return Err(bad(format!("has {} bytes; {MAX_URL} is the most", text.len())));
        }
        if let Some(at) = text.chars().position(char::is_control) {
            return Err(bad(format!("has a control character at position {at}: write it percent-encoded")));
        }
        let Some((scheme, rest)) = text.split_once(':').filter(|(scheme, _)| is_scheme(scheme)) else {
            return Err(bad("begins with no scheme such as `memory:`"));
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        if query.contains('@') {
            return Err(bad("has an `@` behind the first `?`: write `%40`, or `%3F` for a `?` that is part of a password"));
        }
        let (authority, path) = match rest.strip_prefix("//") {
            Some(rest) => {
                let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                (Some(authority), path)
            }
            None => (None, rest),
        };
        if authority.is_some() && path.contains('@') {
            return Err(bad("has an `@` in its path: write `%40`, or `%2F` for a `/` that is part of a password"));
        }
        let scheme = scheme.to_ascii_lowercase();
        let shown = match rest.rsplit_once('@') {
            Some((_, behind)) => format!("{scheme}:{}***@{behind}", if authority.is_some() { "//" } else { "" }),
            None => format!("{scheme}:{rest}"),
        };
        Ok(Self {
            scheme,
            authority: authority.map(Authority::parse).transpose()?,
            path: decode(path)?,
            options: options(query)?,
            asked: Vec::new(),
            shown,
        })
    }

    /// The scheme, in lower case.
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// What stands behind `//`, if anything does.
    pub fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    /// The path, decoded: all of the rest where there is no authority, else what begins with the next `/`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The same with another path.
    #[cfg(feature = "replay")]
    pub(crate) fn with_path(mut self, path: &str) -> Self {
        self.path = path.to_owned();
        self
    }

    /// An option as text.
    pub fn text(&mut self, option: &'static str) -> Option<&str> {
        if !self.asked.contains(&option) {
            self.asked.push(option);
        }
        self.options.iter().find(|(name, _)| name == option).map(|(_, value)| value.as_str())
    }

    /// An option of a kind of the caller's own: `read` gives none where the value is not `expected`.
    ///
    /// # Errors
    /// `InvalidOption` with the option, its value and what was expected.
    pub fn read<T>(&mut self, option: &'static str, expected: &str, read: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.text(option) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => {
                let start: String = value.chars().take(MAX_OPTION).collect();
                let more = if start.len() < value.len() { " and more" } else { "" };
                Err(Error::invalid_option(option, format!("{start:?}{more} is not {expected}")))
            }
        }
    }

    /// An option that is `true` or `false`.
    ///
    /// # Errors
    /// `InvalidOption` if it is neither.
    pub fn flag(&mut self, option: &'static str) -> Result<Option<bool>> {
        self.read(option, "`true` or `false`", |value| value.parse().ok())
    }

    /// An option that is a whole number.
    ///
    /// # Errors
    /// `InvalidOption` if it is none, or too large for the type.
    pub fn number<T: FromStr>(&mut self, option: &'static str) -> Result<Option<T>> {
        self.read(option, "a whole number in range, such as `1000`", digits)
    }

    /// An option that is a size, in bytes.
    ///
    /// # Errors
    /// `InvalidOption` if it is none, or too large for the machine.
    pub fn size(&mut self, option: &'static str) -> Result<Option<usize>> {
        self.read(option, "a size such as `65536`, `64KiB`, `1MiB` or `1GiB`", |value| {
            let (number, unit) = number_and_unit(value)?;
            let factor = match unit {
                "" => 1,
                "KiB" => 1 << 10,
                "MiB" => 1 << 20,
                "GiB" => 1 << 30,
                _ => return None,
            };
            usize::try_from(number.checked_mul(factor)?).ok()
        })
    }

    /// An option that is a duration.
    ///
    /// # Errors
    /// `InvalidOption` if it is none, or over 584 million years.
    pub fn duration(&mut self, option: &'static str) -> Result<Option<Duration>> {
        self.read(option, "a duration such as `250ms`, `5s`, `2m` or `1h`", |value| {
            let (number, unit) = number_and_unit(value)?;
            let millis = match unit {
                "ms" => 1,
                "s" => 1000,
                "m" => 60_000,
                "h" => 3_600_000,
                _ => return None,
            };
            number.checked_mul(millis).map(Duration::from_millis)
        })
    }

    /// The options that were asked for.
    #[cfg(feature = "replay")]
    pub(crate) fn asked(&self) -> &[&'static str] {
        &self.asked
    }

    /// Whether the first option that nobody asked for is one of these; it, if so.
    pub(crate) fn leftover_of(&self, others: &[&str]) -> Option<&str> {
        let (unknown, _) = self.options.iter().find(|(name, _)| !self.asked.contains(&name.as_str()))?;
        others.contains(&unknown.as_str()).then_some(unknown)
    }

    /// Refuses the first option that nobody asked for.
    pub(crate) fn refuse_leftovers(&self) -> Result<()> {
        let Some((unknown, _)) = self.options.iter().find(|(name, _)| !self.asked.contains(&name.as_str())) else {
            return Ok(());
        };
        let why = match nearest(unknown, self.asked.iter().copied()) {
            Some(near) => format!("is unknown; the nearest known option is `{near}`"),
            None => format!(
                "is unknown; the options are {}",
                self.asked.iter().map(|one| format!("`{one}`")).collect::<Vec<_>>().join(", ")
            ),
        };
        Err(Error::invalid_option(unknown.clone(), why))
    }
}

impl fmt::Display for BusUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for BusUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BusUrl").field(&self.shown).finish()
    }
}

pub(crate) fn is_scheme(text: &str) -> bool {
    text.len() <= MAX_SCHEME
        && text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
}

fn bad(why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::invalid_option("url", why)
}

fn options(query: &str) -> Result<Vec<(String, String)>> {
    let mut options: Vec<(String, String)> = Vec::new();
    for (at, pair) in query.split('&').filter(|pair| !pair.is_empty()).enumerate() {
        let (name, value) = pair.split_once('=').map_or((pair, None), |(name, value)| (name, Some(value)));
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
        if name.is_empty() || name.len() > MAX_OPTION || !name.bytes().all(plain) {
            let rule = format!("letters, digits, `_`, `-` and `.`, {MAX_OPTION} at most");
            return Err(bad(format!("the name of option number {} is not made of {rule}", at + 1)));
        }
        let Some(value) = value else {
            return Err(Error::invalid_option(name.to_owned(), "has no value: write `option=value`"));
        };
        if options.iter().any(|(earlier, _)| earlier == name) {
            return Err(Error::invalid_option(name.to_owned(), "is given twice"));
        }
        let value = decode(value).map_err(|_| Error::invalid_option(name.to_owned(), BAD_ESCAPE))?;
        options.push((name.to_owned(), value));
    }
    Ok(options)
}

const BAD_ESCAPE: &str = "has a `%` that begins no percent-encoded UTF-8: write `%25` for a literal one";

/// Undoes percent-encoding.
fn decode(text: &str) -> Result<String> {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let code = piece.get(..2).filter(|code| code.bytes().all(|b| b.is_ascii_hexdigit()));
        let byte = code.and_then(|code| u8::from_str_radix(code, 16).ok()).ok_or_else(|| bad(BAD_ESCAPE))?;
        bytes.push(byte);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).map_err(|_| bad(BAD_ESCAPE))
}

/// A number of nothing but digits: no sign, no blanks.
fn digits<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()))
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    Some((digits(number)?, unit))
}
