//! Signatures over time and body, and the refusal of what is forged, stale or said before. It knows no clock: it is told the time.

use std::collections::BTreeSet;
use std::fmt;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use parking_lot::Mutex;
use pubsub_core::{Error, Result};
use sha2::Sha256;

/// The header of a signature: `t=<milliseconds since 1970>,n=<32 hexadecimal digits>,v1=<64 hexadecimal digits>`.
///
/// `v1` is the HMAC-SHA-256 of `t`, a full stop, `n`, a full stop and the body. The nonce `n` tells apart what is sent twice from what is
/// caught and played again.
pub const SIGNATURE: &str = "pubsub-signature";

/// The shortest secret in bytes.
const SHORTEST: usize = 16;

/// What sender and receiver share. It is shown nowhere.
#[derive(Clone)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// A secret of at least 16 bytes; 32 random ones are best.
    ///
    /// # Errors
    /// `InvalidOption` for a shorter one.
    pub fn new(secret: impl AsRef<[u8]>) -> Result<Self> {
        let secret = secret.as_ref();
        if secret.len() < SHORTEST {
            return Err(Error::invalid_option("secret", format!("is shorter than {SHORTEST} bytes")));
        }
        Ok(Self(secret.into()))
    }

    fn mac(&self, time: u64, nonce: u128, body: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(format!("{time}.{nonce:032x}.").as_bytes());
        mac.update(body);
        mac
    }

    /// The value of the [header](SIGNATURE), for a body sent at this time (milliseconds since 1970). The nonce must be fresh.
    pub fn sign(&self, time: u64, nonce: u128, body: &[u8]) -> String {
        let mut header = format!("t={time},n={nonce:032x},v1=");
        for byte in self.mac(time, nonce, body).finalize().into_bytes() {
            let _ = write!(header, "{byte:02x}"); // text that grows refuses nothing
        }
        header
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Why a signature is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Missing,
    Forged,
    /// Rightly signed, and too long ago or too far ahead; or so late that nobody can tell any more whether it was seen.
    Stale,
    Replayed,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "a signature is needed",
            Self::Forged => "the signature is not of this body by anybody known",
            Self::Stale => "the signature is outside its window of time",
            Self::Replayed => "the signature was used before",
        })
    }
}

/// Checks signatures.
#[derive(Debug)]
pub(crate) struct Guard {
    secrets: Vec<Secret>,
    window: u64,
    most: usize,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Times and nonces, the earliest first.
    used: BTreeSet<(u64, u128)>,
    /// What was signed then or before may have been forgotten, and is refused. It only ever rises, to times that were signed: clocks that
    /// jump open nothing.
    floor: u64,
}

impl Guard {
    pub(crate) fn new(secrets: Vec<Secret>, window: Duration, most: usize) -> Self {
        let window = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        Self { secrets, window, most, seen: Mutex::default() }
    }

    /// Admits a signature once, at this time (milliseconds since 1970).
    pub(crate) fn admit(&self, header: Option<&str>, body: &[u8], now: u64) -> Result<(), Refused> {
        let (time, nonce, mac) = parse(header.ok_or(Refused::Missing)?).ok_or(Refused::Forged)?;
        // Compared in constant time; which secret it is does not matter.
        if !self.secrets.iter().any(|secret| secret.mac(time, nonce, body).verify_slice(&mac).is_ok()) {
            return Err(Refused::Forged);
        }
        if time.abs_diff(now) > self.window {
            return Err(Refused::Stale);
        }
        let mut seen = self.seen.lock();
        if seen.used.contains(&(time, nonce)) {
            return Err(Refused::Replayed);
        }
        if time <= seen.floor {
            return Err(Refused::Stale);
        }
        seen.used.insert((time, nonce));
        while let Some(&(oldest, _)) = seen.used.first()
            && (seen.used.len() > self.most || oldest.saturating_add(self.window) < now)
        {
            seen.used.pop_first();
            seen.floor = seen.floor.max(oldest);
        }
        Ok(())
    }
}

fn parse(header: &str) -> Option<(u64, u128, [u8; 32])> {
    let mut fields = header.split(',');
    let mut field = |name: &str| fields.next()?.trim().strip_prefix(name)?.strip_prefix('=');
    let (time, nonce, mac) = (field("t")?, field("n")?, field("v1")?);
    let digits = |text: &str, count| text.len() == count && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !digits(nonce, 32) || !digits(mac, 64) || !time.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&mac[2 * at..2 * at + 2], 16).ok()?;
    }
    Some((time.parse().ok()?, u128::from_str_radix(nonce, 16).ok()?, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000_000;

    fn secret(text: &str) -> Secret {
        Secret::new(text).unwrap()
    }

    fn guard(most: usize) -> Guard {
        Guard::new(vec![secret("an old secret, rotated"), secret("a secret of ours")], Duration::from_secs(300), most)
    }

    #[test]
    fn is_the_hmac_that_others_compute() {
        // echo -n '1700000000000.0000000000000000000000000000002a.{"type":"a"}' | openssl dgst -sha256 -hmac 'a secret of ours'
        let signed = secret("a secret of ours").sign(NOW, 42, br#"{"type":"a"}"#);
        let expected = "07f13bfcb81cd1e649bb73f885f78adaeaca5914d33246582a5c060963ea37ef";
        assert_eq!(signed, format!("t={NOW},n=0000000000000000000000000000002a,v1={expected}"));
    }

    #[test]
    fn admits_once_what_was_signed_by_any_known_secret() {
        let guard = guard(10);
        for (nonce, by) in [(1, "a secret of ours"), (2, "an old secret, rotated")] {
            let signed = secret(by).sign(NOW, nonce, b"body");
            assert_eq!(guard.admit(Some(&signed), b"body", NOW + 1000), Ok(()));
            assert_eq!(guard.admit(Some(&signed), b"body", NOW + 2000), Err(Refused::Replayed));
        }
    }

    #[test]
    fn refuses_what_is_forged() {
        let guard = guard(10);
        let signed = secret("a secret of ours").sign(NOW, 1, b"body");
        let foreign = secret("a secret of theirs").sign(NOW, 1, b"body");
        assert_eq!(guard.admit(None, b"body", NOW), Err(Refused::Missing));
        assert_eq!(guard.admit(Some(&foreign), b"body", NOW), Err(Refused::Forged));
        assert_eq!(guard.admit(Some(&signed), b"other", NOW), Err(Refused::Forged));
        let later = signed.replacen("t=17", "t=18", 1);
        let again = signed.replacen("n=0", "n=1", 1);
        let cut = &signed[..signed.len() - 2];
        for forged in [&*later, &*again, cut, "", "t=1", "t=1,n=2,v1=3", "v1=,n=,t=", "t=\u{e9},n=\u{e9},v1=\u{e9}"] {
            assert_eq!(guard.admit(Some(forged), b"body", NOW), Err(Refused::Forged), "{forged}");
        }
        assert_eq!(guard.admit(Some(&signed), b"body", NOW), Ok(()), "none of them used it up");
    }

    #[test]
    fn refuses_what_is_stale_whichever_way_clocks_jump() {
        let guard = guard(10);
        let signed = |time, nonce| secret("a secret of ours").sign(time, nonce, b"");
        for time in [NOW - 300_001, NOW + 300_001] {
            assert_eq!(guard.admit(Some(&signed(time, 1)), b"", NOW), Err(Refused::Stale));
        }
        assert_eq!(guard.admit(Some(&signed(NOW, 1)), b"", NOW), Ok(()));
        // The clock jumps ahead, what was seen is forgotten, and the clock comes back.
        assert_eq!(guard.admit(Some(&signed(NOW + 900_000, 2)), b"", NOW + 900_000), Ok(()));
        assert_eq!(guard.admit(Some(&signed(NOW, 1)), b"", NOW), Err(Refused::Stale));
        assert_eq!(guard.admit(Some(&signed(NOW + 1, 3)), b"", NOW), Ok(()));
    }

    #[test]
    fn what_had_to_be_forgotten_is_refused() {
        let guard = guard(3);
        let signed = |nonce: u64| secret("a secret of ours").sign(NOW + nonce, nonce.into(), b"");
        for nonce in 1..=5 {
            assert_eq!(guard.admit(Some(&signed(nonce)), b"", NOW), Ok(()));
        }
        for (nonce, refused) in [(1, Refused::Stale), (2, Refused::Stale), (3, Refused::Replayed), (5, Refused::Replayed)] {
            assert_eq!(guard.admit(Some(&signed(nonce)), b"", NOW), Err(refused), "{nonce}");
        }
        assert_eq!(guard.seen.lock().used.len(), 3);
    }
}
