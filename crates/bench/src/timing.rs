//! Timing helpers: one monotonic clock, medians of raw samples.

use std::time::{Duration, Instant};

/// Calls `f` and returns its value with the time it took on the monotonic clock.
pub fn timed<T>(f: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let value = f();
    (value, start.elapsed())
}

/// Calls `f` `k` times and returns the median duration; `None` for `k == 0`.
pub fn median_of(k: usize, mut f: impl FnMut()) -> Option<Duration> {
    let times: Vec<f64> = (0..k).map(|_| timed(&mut f).1.as_nanos() as f64).collect();
    crate::stats::median(&times).map(|ns| Duration::from_nanos(ns as u64))
}
