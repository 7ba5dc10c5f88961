//! The best of many outputs, and what the others come to.

/// The best of a row of numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopK {
    /// Index and value, largest first; the lowest index first among equals. NaN is never among them.
    pub best: Vec<(u32, f32)>,
    /// Logarithm of the sum of `exp(value - largest value)` over all values: the largest has probability
    /// `exp(-log_sum)`.
    pub log_sum: f32,
}

impl TopK {
    /// The `k` best of these values. The sum runs over them in order.
    pub fn of(values: &[f32], k: usize) -> TopK {
        let best = TopK::best(values, k);
        let most = best.first().map_or(0.0, |b| b.1);
        TopK { log_sum: values.iter().map(|v| (v - most).exp()).sum::<f32>().ln(), best }
    }

    /// The `k` best of these values alone.
    pub fn best(values: &[f32], k: usize) -> Vec<(u32, f32)> {
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
        // Below it nothing gets in.
        let mut least = f32::NEG_INFINITY;
        for (i, value) in values.iter().enumerate() {
            if *value > least || best.len() < k && !value.is_nan() {
                let at = best.partition_point(|(_, other)| *other >= *value);
                best.insert(at, (i as u32, *value));
                best.truncate(k);
                if best.len() == k {
                    least = best.last().map_or(f32::INFINITY, |b| b.1);
                }
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_in_order_and_the_lowest_index_first() {
        let values = [1.0, f32::NAN, 3.0, 3.0, -2.0, 2.0];
        assert_eq!(TopK::best(&values, 4), [(2, 3.0), (3, 3.0), (5, 2.0), (0, 1.0)]);
        assert_eq!(TopK::best(&values, 1), [(2, 3.0)]);
        assert_eq!(TopK::best(&values, 9).len(), 5);
        assert!(TopK::best(&values, 0).is_empty() && TopK::best(&[], 3).is_empty());
        let even = TopK::of(&[0.5; 8], 2);
        assert_eq!(even.best, [(0, 0.5), (1, 0.5)]);
        assert!((even.log_sum - 8f32.ln()).abs() < 1e-6);
    }
}
