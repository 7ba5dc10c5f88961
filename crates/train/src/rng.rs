//! Reproducible random numbers: a counter-based generator, so that a stream is named by its seeds and needs no saved
//! state.

/// SplitMix64 over a key.
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// A stream named by a seed and the numbers of its purpose.
    pub fn new(seed: u64, purpose: &[u64]) -> Rng {
        let mut rng = Rng { state: seed };
        for p in purpose {
            rng.state = rng.next_u64() ^ p.wrapping_mul(0xd6e8_feb8_6659_fd93);
        }
        rng.next_u64();
        rng
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`, without bias that matters (`n` far below 2^64).
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// Uniform in `(0, 1]`.
    fn unit(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Normally distributed values with standard deviation `std` [Box and Muller].
    pub fn normal(&mut self, len: usize, std: f32) -> Vec<f32> {
        let mut out = Vec::with_capacity(len + 1);
        while out.len() < len {
            let radius = (-2.0 * self.unit().ln()).sqrt() * f64::from(std);
            let angle = 2.0 * std::f64::consts::PI * self.unit();
            out.push((radius * angle.cos()) as f32);
            out.push((radius * angle.sin()) as f32);
        }
        out.truncate(len);
        out
    }

    /// Shuffles in place [Fisher and Yates].
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_values_have_the_asked_moments_and_streams_differ() {
        let x = Rng::new(1, &[2]).normal(100_001, 0.5);
        let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.01 && (var - 0.25).abs() < 0.01, "{mean} {var}");
        assert_ne!(Rng::new(1, &[2]).next_u64(), Rng::new(1, &[3]).next_u64());
        assert_ne!(Rng::new(1, &[2, 0]).next_u64(), Rng::new(1, &[0, 2]).next_u64());
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut x: Vec<u32> = (0..1000).collect();
        Rng::new(3, &[]).shuffle(&mut x);
        assert_ne!(x, (0..1000).collect::<Vec<_>>());
        x.sort_unstable();
        assert_eq!(x, (0..1000).collect::<Vec<_>>());
    }
}
