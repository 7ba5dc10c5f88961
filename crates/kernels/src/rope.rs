//! Rotary position tables: half-rotation ("NeoX") layout on `head_dim` values [eagle3 §2.2].

use std::sync::{Arc, OnceLock};

/// Frequency scaling of long-context models.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain frequencies.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are scaled in full.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length before scaling.
        original_max_position: u32,
    },
    /// Explicit divisors per frequency, as GGUF's `rope_freqs.weight` has them.
    Factors(Vec<f32>),
}

/// Positions whose angles are computed at once.
const CHUNK: usize = 256;
/// Chunks of a table; a million positions.
const CHUNKS: usize = 1 << 12;

/// One RoPE configuration: inverse frequencies, and the angles of the positions asked for so far.
#[derive(Clone)]
pub struct RopeTable {
    head_dim: usize,
    /// Pairs that are turned; the rest of a head passes unchanged.
    turned: usize,
    /// Factor on cosine and sine of the turned pairs.
    magnitude: f32,
    /// `[head_dim / 2]`, zero where nothing is turned.
    inv_freq: Vec<f32>,
    /// Per chunk `[CHUNK][cos[head_dim / 2], sin[head_dim / 2]]`.
    angles: Arc<[OnceLock<Box<[f32]>>]>,
}

impl std::fmt::Debug for RopeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RopeTable")
            .field("inv_freq", &self.inv_freq)
            .field("magnitude", &self.magnitude)
            .finish_non_exhaustive()
    }
}

impl PartialEq for RopeTable {
    fn eq(&self, other: &RopeTable) -> bool {
        self.head_dim == other.head_dim
            && self.turned == other.turned
            && self.magnitude == other.magnitude
            && self.inv_freq == other.inv_freq
    }
}

impl RopeTable {
    /// Builds the table.
    ///
    /// # Panics
    /// If `head_dim` is odd or explicit factors are not `head_dim / 2` long (checked at load).
    pub fn new(head_dim: usize, theta: f32, scaling: &RopeScaling) -> RopeTable {
        RopeTable::partial(head_dim, head_dim, theta, scaling)
    }

    /// Turns `rotary_dim` values of a head: pairs `i` and `head_dim / 2 + i` for `i < rotary_dim / 2`, which is where the
    /// loader puts the rows of such models. The other values pass bit for bit.
    ///
    /// # Panics
    /// If a size is odd, `rotary_dim` above `head_dim`, or explicit factors are not `rotary_dim / 2` long.
    pub fn partial(head_dim: usize, rotary_dim: usize, theta: f32, scaling: &RopeScaling) -> RopeTable {
        assert!(
            head_dim.is_multiple_of(2) && rotary_dim.is_multiple_of(2) && rotary_dim <= head_dim,
            "RoPE needs an even head dimension"
        );
        let half = rotary_dim / 2;
        let base = |i: usize| 1.0 / (f64::from(theta)).powf(2.0 * i as f64 / rotary_dim as f64);
        let mut inv_freq: Vec<f32> = (0..half)
            .map(|i| {
                let freq = base(i);
                let scaled = match scaling {
                    RopeScaling::None => freq,
                    RopeScaling::Linear { factor } => freq / f64::from(*factor),
                    RopeScaling::Factors(f) => {
                        assert!(f.len() == half, "one factor per frequency");
                        freq / f64::from(f[i])
                    }
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_max_position,
                    } => {
                        let original = f64::from(*original_max_position);
                        let wavelength = 2.0 * std::f64::consts::PI / freq;
                        let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                        if wavelength < original / high {
                            freq
                        } else if wavelength > original / low {
                            freq / f64::from(*factor)
                        } else {
                            let smooth = (original / wavelength - low) / (high - low);
                            (1.0 - smooth) * freq / f64::from(*factor) + smooth * freq
                        }
                    }
                };
                scaled as f32
            })
            .collect();
        inv_freq.resize(head_dim / 2, 0.0);
        let angles = (0..CHUNKS).map(|_| OnceLock::new()).collect();
        RopeTable { head_dim, turned: half, magnitude: 1.0, inv_freq, angles }
    }

    /// The same with this factor on what is turned (YaRN, LongRoPE).
    pub fn with_magnitude(mut self, magnitude: f32) -> RopeTable {
        self.magnitude = magnitude;
        self.angles = (0..CHUNKS).map(|_| OnceLock::new()).collect();
        self
    }

    /// Values per head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// `cos[head_dim / 2]` and `sin[head_dim / 2]` of one position.
    ///
    /// # Panics
    /// From position 2^20 on.
    pub fn angles(&self, position: u32) -> (&[f32], &[f32]) {
        let (half, position) = (self.head_dim / 2, position as usize);
        let chunk = self.angles[position / CHUNK].get_or_init(|| {
            let first = position / CHUNK * CHUNK;
            let mut values = Vec::with_capacity(CHUNK * self.head_dim);
            for p in first..first + CHUNK {
                // f32 product as the reference implementations take it, sine and cosine of that in f64.
                let angle = |f: &f32| f64::from(p as f32 * f);
                values.extend(self.inv_freq.iter().map(|f| angle(f).cos() as f32));
                values.extend(self.inv_freq.iter().map(|f| angle(f).sin() as f32));
                if self.magnitude != 1.0 {
                    let at = values.len() - self.head_dim;
                    let (cos, sin) = values[at..].split_at_mut(half);
                    for v in cos[..self.turned].iter_mut().chain(&mut sin[..self.turned]) {
                        *v *= self.magnitude;
                    }
                }
            }
            values.into_boxed_slice()
        });
        let at = position % CHUNK * self.head_dim;
        chunk[at..at + self.head_dim].split_at(half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_table_leaves_the_rest_of_a_head_alone() {
        let table = RopeTable::partial(8, 4, 100.0, &RopeScaling::None).with_magnitude(0.5);
        let whole = RopeTable::new(4, 100.0, &RopeScaling::None);
        let ((cos, sin), (c, s)) = (table.angles(7), whole.angles(7));
        assert_eq!(cos, [c[0] * 0.5, c[1] * 0.5, 1.0, 1.0]);
        assert_eq!(sin, [s[0] * 0.5, s[1] * 0.5, 0.0, 0.0]);
    }
}
