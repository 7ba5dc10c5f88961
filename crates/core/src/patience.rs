//! How those who ask over a network wait, and what they repeat of an answer.

use std::time::Duration;

/// The longest pause between two attempts that nobody asked for.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The pause behind the n-th failed attempt (from 1): between half and all of `first` doubled with each attempt, so that
/// requests that failed together do not come back together. `random` is any number.
pub fn pause(first: Duration, attempts: u32, random: u64) -> Duration {
    let doubled = first.saturating_mul(1 << (attempts - 1).min(16)).min(LONGEST_PAUSE);
    doubled.mul_f64(0.5 + 0.5 * (random >> 11) as f64 / (1u64 << 53) as f64)
}

/// The first line that says something, at most 300 characters of it.
///
/// ```
/// assert_eq!(draftsmith_core::patience::shorten("\n  no such model\n<html>"), "no such model");
/// ```
pub fn shorten(text: &str) -> String {
    text.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or_default().chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_with_jitter_up_to_a_minute() {
        for first in [Duration::from_millis(300), Duration::from_millis(500)] {
            for attempts in 1..20 {
                let whole = first.as_secs_f64() * f64::from(1u32 << (attempts - 1));
                let whole = whole.min(LONGEST_PAUSE.as_secs_f64());
                for random in [0, u64::MAX / 3, u64::MAX] {
                    let pause = pause(first, attempts, random).as_secs_f64();
                    assert!(pause >= 0.499 * whole && pause <= whole, "{pause} at attempt {attempts}");
                }
            }
        }
        let first = Duration::from_millis(500);
        assert_ne!(pause(first, 3, 1 << 60), pause(first, 3, 1 << 63));
        assert!(pause(first, u32::MAX, 0) <= LONGEST_PAUSE);
    }
}
