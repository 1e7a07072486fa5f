//! How long to wait before trying again.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(1);

/// Pauses between tries of what a server has to answer: from 10 ms to 1 s, doubling, with half of each left to chance.
#[derive(Debug)]
pub struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self::new()
    }
}

impl Pause {
    /// The first is still to come.
    pub fn new() -> Self {
        Self(FIRST)
    }

    /// How long to wait this time.
    pub fn step(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (2 * pause).min(LONGEST);
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grow_to_a_bound() {
        let mut pause = Pause::new();
        let pauses: Vec<_> = (0..20).map(|_| pause.step()).collect();
        assert!(pauses[0] <= FIRST && pauses[0] >= FIRST / 2);
        assert!(pauses[19] <= LONGEST && pauses[19] >= LONGEST / 2);
    }
}
