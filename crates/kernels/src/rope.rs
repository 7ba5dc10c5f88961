//! Rotary position tables: half-rotation ("NeoX") layout on `head_dim` values [eagle3 §2.2].

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

/// Inverse frequencies of one RoPE configuration; angles are computed on the fly from the position.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    head_dim: usize,
    /// `[head_dim / 2]`
    inv_freq: Vec<f32>,
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
        RopeTable { head_dim, inv_freq }
    }

    /// Values per head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Writes `cos[head_dim / 2]` and `sin[head_dim / 2]` of one position.
    pub fn angles(&self, position: u32, cos: &mut [f32], sin: &mut [f32]) {
        for (i, f) in self.inv_freq.iter().enumerate() {
            // f32 product as the reference implementations take it, sine and cosine of that in f64.
            let angle = f64::from(position as f32 * f);
            cos[i] = angle.cos() as f32;
            sin[i] = angle.sin() as f32;
        }
    }
}
