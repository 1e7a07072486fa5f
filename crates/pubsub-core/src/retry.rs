//! When a delivery comes back: a pure policy, without a clock.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::{Error, Result};

/// How often and how fast a subscription retries. The default is 5 attempts, 100 ms doubling up to 10 s, 20 % jitter.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RetryPolicy {
    /// Attempts in all, the first included; none means without end.
    pub max_attempts: Option<NonZeroU32>,
    /// Back-off before the second attempt.
    pub initial_backoff: Duration,
    /// The longest back-off.
    pub max_backoff: Duration,
    /// What each further back-off is multiplied by.
    pub multiplier: f64,
    /// The share of a back-off, 0 to 1, that is taken off at random so that retries do not march in step.
    pub jitter: f64,
    /// How long `run` lets a handler work before it counts as failed; none means as long as it likes.
    pub handler_timeout: Option<Duration>,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: NonZeroU32::new(5),
            initial_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(10),
            multiplier: 2.0,
            jitter: 0.2,
            handler_timeout: None,
        }
    }
}

/// The longest back-off, delay or hold an option takes: ten years, so that adding it to a clock cannot overflow.
pub(crate) const MAX_DURATION: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl RetryPolicy {
    /// The default policy.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the attempts in all; 0 means without end.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = NonZeroU32::new(attempts);
        self
    }

    /// Sets the first and the longest back-off.
    #[must_use]
    pub fn backoff(mut self, initial: Duration, max: Duration) -> Self {
        (self.initial_backoff, self.max_backoff) = (initial, max);
        self
    }

    /// Sets the jitter, 0 to 1.
    #[must_use]
    pub fn jitter(mut self, share: f64) -> Self {
        self.jitter = share;
        self
    }

    /// Sets the time a handler has.
    #[must_use]
    pub fn handler_timeout(mut self, timeout: Duration) -> Self {
        self.handler_timeout = Some(timeout);
        self
    }

    /// Checks the options, by themselves and against each other.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidOption`](crate::ErrorKind::InvalidOption) naming the option.
    pub fn validate(&self) -> Result<()> {
        if self.initial_backoff > self.max_backoff {
            return Err(Error::invalid_option("initial_backoff", "is longer than max_backoff"));
        }
        if self.max_backoff > MAX_DURATION {
            return Err(Error::invalid_option("max_backoff", "is longer than ten years"));
        }
        if !self.multiplier.is_finite() || self.multiplier < 1.0 {
            return Err(Error::invalid_option("multiplier", "must be a finite number of at least 1"));
        }
        if !(0.0..=1.0).contains(&self.jitter) {
            return Err(Error::invalid_option("jitter", "must be between 0 and 1"));
        }
        if self.handler_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(Error::invalid_option("handler_timeout", "must be longer than zero"));
        }
        Ok(())
    }

    /// Whether a delivery that failed at this attempt has no attempt left.
    pub fn is_exhausted_after(&self, attempt: u32) -> bool {
        self.max_attempts.is_some_and(|max| attempt >= max.get())
    }

    /// Whether a delivery with this attempt is one more than the policy allows.
    pub fn is_over(&self, attempt: u32) -> bool {
        self.max_attempts.is_some_and(|max| attempt > max.get())
    }

    /// The back-off after a failed attempt (1 is the first). `random` is a number from 0 to 1 that spreads the jitter:
    /// `min(max, initial * multiplier^(attempt - 1)) * (1 - jitter * random)`.
    pub fn backoff_after(&self, attempt: u32, random: f64) -> Duration {
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let full = self.initial_backoff.as_secs_f64() * self.multiplier.powi(exponent);
        // `min` also takes care of an infinite power.
        let bounded = full.min(self.max_backoff.as_secs_f64());
        Duration::try_from_secs_f64(bounded * (1.0 - self.jitter * random.clamp(0.0, 1.0))).unwrap_or(self.max_backoff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_limit() {
        let policy = RetryPolicy::default();
        let millis = |attempt| policy.backoff_after(attempt, 0.0).as_millis();
        assert_eq!(
            [millis(1), millis(2), millis(3), millis(7), millis(8), millis(u32::MAX)],
            [100, 200, 400, 6400, 10_000, 10_000]
        );
        assert_eq!(policy.backoff_after(1, 1.0).as_millis(), 80);
    }

    #[test]
    fn counts_the_first_attempt() {
        let policy = RetryPolicy::default().max_attempts(2);
        assert!(!policy.is_exhausted_after(1) && policy.is_exhausted_after(2) && policy.is_over(3) && !policy.is_over(2));
        assert!(!RetryPolicy::default().max_attempts(0).is_exhausted_after(u32::MAX));
    }

    #[test]
    fn refuses_nonsense_by_name() {
        let long = Duration::from_secs(11);
        for (policy, option) in [
            (RetryPolicy::default().backoff(long, Duration::from_secs(1)), "initial_backoff"),
            (RetryPolicy::default().backoff(long, Duration::MAX), "max_backoff"),
            (RetryPolicy::default().jitter(f64::NAN), "jitter"),
            (RetryPolicy::default().jitter(1.1), "jitter"),
            (RetryPolicy { multiplier: f64::INFINITY, ..RetryPolicy::default() }, "multiplier"),
            (RetryPolicy::default().handler_timeout(Duration::ZERO), "handler_timeout"),
        ] {
            match policy.validate().unwrap_err().kind() {
                crate::ErrorKind::InvalidOption { option: named, .. } => assert_eq!(named, option),
                other => panic!("{other:?}"),
            }
        }
    }
}
