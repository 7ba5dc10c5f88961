//! Ratios of sums with their uncertainty, medians and percentiles.
//!
//! Rows are the unit of sampling: the steps of one answer resemble each other, so an interval that counted steps
//! as independent would be far too narrow. Every ratio is a ratio of sums over rows, its standard error the
//! delta-method one over rows [cochran1977, §6.3], its 95 % interval that with Student's t. A seeded bootstrap
//! gives the same thing the slow way and is what the tests compare with.
//!
//! Shape legend: `R` rows.

use serde::Serialize;

/// A 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// A value with its uncertainty and how many rows stand behind it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// `None` with fewer than two rows: nothing is known about the spread.
    pub interval: Option<Interval>,
    /// Rows that the value was summed over.
    pub rows: usize,
}

/// `Σ numerator / Σ denominator` with a symmetric interval; `None` if the denominator sums to nothing.
///
/// # Shapes
/// - `rows`: `[R]` pairs of numerator and denominator.
pub fn ratio(rows: &[(f64, f64)]) -> Option<Estimate> {
    let (num, den) = rows.iter().fold((0.0, 0.0), |(n, d), row| (n + row.0, d + row.1));
    if den.is_nan() || den <= 0.0 {
        return None;
    }
    let value = num / den;
    let interval = (rows.len() >= 2).then(|| {
        let n = rows.len() as f64;
        let squares: f64 = rows.iter().map(|(a, b)| (a - value * b).powi(2)).sum();
        let error = (n / (n - 1.0) * squares).sqrt() / den;
        let half = student_t_975(rows.len() - 1) * error;
        Interval { low: value - half, high: value + half }
    });
    Some(Estimate { value, interval, rows: rows.len() })
}

/// `Π_k (Σ_rows x_k)^e_k` with an interval that is symmetric on the log scale: products and ratios of positive
/// sums, as a speedup is. `None` if a sum is not positive.
///
/// # Shapes
/// - `rows`: `[R]` of `K` terms; `exponents`: `[K]`.
pub fn product<const K: usize>(rows: &[[f64; K]], exponents: [f64; K]) -> Option<Estimate> {
    let mut sums = [0.0; K];
    for row in rows {
        for (sum, term) in sums.iter_mut().zip(row) {
            *sum += term;
        }
    }
    if sums.iter().any(|s| s.is_nan() || *s <= 0.0) {
        return None;
    }
    let value: f64 = sums.iter().zip(exponents).map(|(s, e)| s.powf(e)).product();
    let interval = (rows.len() >= 2).then(|| {
        let n = rows.len() as f64;
        // d log(value) of one row: its share of each sum, signed by the exponent.
        let mean: f64 = exponents.iter().sum::<f64>() / n;
        let squares: f64 = rows
            .iter()
            .map(|row| {
                let pull: f64 = (0..K).map(|k| exponents[k] * row[k] / sums[k]).sum();
                (pull - mean).powi(2)
            })
            .sum();
        let factor = (student_t_975(rows.len() - 1) * (n / (n - 1.0) * squares).sqrt()).exp();
        Interval { low: value / factor, high: value * factor }
    });
    Some(Estimate { value, interval, rows: rows.len() })
}

/// Percentile interval of a statistic by resampling rows with replacement, `draws` times, keyed by `seed`.
pub fn bootstrap<T>(
    rows: &[T],
    draws: usize,
    seed: u64,
    mut statistic: impl FnMut(&[&T]) -> Option<f64>,
) -> Option<Interval> {
    if rows.len() < 2 || draws == 0 {
        return None;
    }
    let mut state = seed;
    let mut next = || {
        // SplitMix64: small, well mixed, the same everywhere.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    let mut values = Vec::with_capacity(draws);
    let mut sample: Vec<&T> = Vec::with_capacity(rows.len());
    for _ in 0..draws {
        sample.clear();
        sample.extend(
            (0..rows.len()).map(|_| &rows[((u128::from(next()) * rows.len() as u128) >> 64) as usize]),
        );
        values.extend(statistic(&sample));
    }
    Some(Interval { low: percentile(&values, 2.5)?, high: percentile(&values, 97.5)? })
}

/// The middle value, the mean of the middle two for an even count; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    percentile(values, 50.0)
}

/// Percentile `p` in 0..=100, linear between the neighbouring values; `None` of nothing.
pub fn percentile(values: &[f64], p: f64) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| !v.is_nan()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let at = (p.clamp(0.0, 100.0) / 100.0) * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    Some(sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64))
}

/// 97.5 % quantile of Student's t; tabulated up to 30 degrees of freedom, then the Cornish-Fisher expansion,
/// which is exact to three digits there.
fn student_t_975(degrees: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
        2.045, 2.042,
    ];
    match degrees {
        0 => f64::INFINITY,
        1..=30 => TABLE[degrees - 1],
        _ => {
            let (z, v) = (1.959_964_f64, degrees as f64);
            z + (z.powi(3) + z) / (4.0 * v) + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * v * v)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows with unequal sizes: (tokens, steps).
    fn rows(n: usize) -> Vec<(f64, f64)> {
        (0..n)
            .map(|i| {
                let steps = 10.0 + (i * 7 % 23) as f64;
                (steps * (1.6 + (i * 13 % 11) as f64 / 7.0), steps)
            })
            .collect()
    }

    #[test]
    fn a_ratio_is_of_sums_not_a_mean_of_ratios() {
        let estimate = ratio(&[(10.0, 10.0), (300.0, 100.0)]).unwrap();
        assert!((estimate.value - 310.0 / 110.0).abs() < 1e-12);
        assert_eq!(ratio(&[(1.0, 0.0)]), None);
        assert_eq!(ratio(&[]), None);
        assert_eq!(ratio(&[(2.0, 1.0)]).unwrap().interval, None);
    }

    #[test]
    fn equal_rows_have_no_uncertainty() {
        let interval = ratio(&[(4.0, 2.0), (6.0, 3.0), (2.0, 1.0)]).unwrap().interval.unwrap();
        assert!((interval.low - 2.0).abs() < 1e-12 && (interval.high - 2.0).abs() < 1e-12);
        let same = product(&[[4.0, 2.0], [6.0, 3.0]], [1.0, -1.0]).unwrap();
        assert!((same.value - 2.0).abs() < 1e-12 && (same.interval.unwrap().high - 2.0).abs() < 1e-9);
    }

    #[test]
    fn the_delta_interval_agrees_with_the_seeded_bootstrap() {
        let rows = rows(80);
        let delta = ratio(&rows).unwrap();
        let again = product(&rows.iter().map(|r| [r.0, r.1]).collect::<Vec<_>>(), [1.0, -1.0]).unwrap();
        let slow = bootstrap(&rows, 4000, 7, |sample| {
            let (n, d) = sample.iter().fold((0.0, 0.0), |(n, d), r| (n + r.0, d + r.1));
            Some(n / d)
        })
        .unwrap();
        let width = slow.high - slow.low;
        for interval in [delta.interval.unwrap(), again.interval.unwrap()] {
            assert!((interval.low - slow.low).abs() < 0.1 * width, "{interval:?} {slow:?}");
            assert!((interval.high - slow.high).abs() < 0.1 * width, "{interval:?} {slow:?}");
        }
        assert!((delta.value - again.value).abs() < 1e-12);
    }

    #[test]
    fn the_interval_covers_the_truth_in_about_95_of_100_experiments() {
        // Row i commits steps * (2 + noise): the truth is 2.
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut covered = 0;
        for _ in 0..1000 {
            let rows: Vec<(f64, f64)> = (0..12)
                .map(|_| {
                    let steps = 20.0 + 40.0 * uniform();
                    (steps * (1.5 + uniform()), steps)
                })
                .collect();
            let interval = ratio(&rows).unwrap().interval.unwrap();
            covered += usize::from(interval.low <= 2.0 && 2.0 <= interval.high);
        }
        assert!((925..=975).contains(&covered), "{covered} of 1000");
    }

    #[test]
    fn a_speedup_with_unequal_token_counts_compares_time_per_token() {
        let speedup = product(&[[200.0, 10.0, 50.0, 5.0]], [1.0, -1.0, -1.0, 1.0]).unwrap();
        assert!((speedup.value - 2.0).abs() < 1e-12);
        assert_eq!(product(&[[1.0, 0.0]], [1.0, -1.0]), None);
    }

    #[test]
    fn percentiles_interpolate_and_nothing_has_none() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(percentile(&[0.0, 10.0], 90.0), Some(9.0));
        assert_eq!(percentile(&[5.0], 10.0), Some(5.0));
    }

    #[test]
    fn the_t_quantile_continues_its_table() {
        assert!((student_t_975(31) - 2.0395).abs() < 1e-3);
        assert!((student_t_975(120) - 1.9799).abs() < 1e-3);
        assert!(student_t_975(0).is_infinite());
    }
}
