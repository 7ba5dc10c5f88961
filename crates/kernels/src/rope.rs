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
    /// `[head_dim / 2]`
    inv_freq: Vec<f32>,
    /// Per chunk `[CHUNK][cos[head_dim / 2], sin[head_dim / 2]]`.
    angles: Arc<[OnceLock<Box<[f32]>>]>,
}

impl std::fmt::Debug for RopeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RopeTable").field("inv_freq", &self.inv_freq).finish_non_exhaustive()
    }
}

impl PartialEq for RopeTable {
    fn eq(&self, other: &RopeTable) -> bool {
        self.head_dim == other.head_dim && self.inv_freq == other.inv_freq
    }
}

impl RopeTable {
    /// Builds the table.
    ///
    /// # Panics
    /// If `head_dim` is odd or explicit factors are not `head_dim / 2` long (checked at load).
    pub fn new(head_dim: usize, theta: f32, scaling: &RopeScaling) -> RopeTable {
        assert!(head_dim.is_multiple_of(2), "RoPE needs an even head dimension");
        let half = head_dim / 2;
        let base = |i: usize| 1.0 / (f64::from(theta)).powf(2.0 * i as f64 / head_dim as f64);
        let inv_freq = (0..half)
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
        RopeTable { head_dim, inv_freq, angles: (0..CHUNKS).map(|_| OnceLock::new()).collect() }
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
            }
            values.into_boxed_slice()
        });
        let at = position % CHUNK * self.head_dim;
        chunk[at..at + self.head_dim].split_at(half)
    }
}
