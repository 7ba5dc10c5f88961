//! What this machine can do at best, for judging what the kernels reach.

use std::time::Instant;

use super::isa::{Isa, Lanes, dispatch, prefetch_ahead};
use super::pages::Pages;
use super::{Cpu, matmul, pack};
use crate::pool::SendPtr;
use crate::{PackMode, WeightDtype, WeightView};

/// Passes of which the best counts.
const PASSES: usize = 8;

#[derive(Clone, Copy)]
struct SumArgs {
    x: *const f32,
    /// A multiple of 128.
    len: usize,
    sum: *mut f32,
}

#[inline(always)]
unsafe fn sum_body<I: Isa>(a: SumArgs) {
    // SAFETY: module rule of `isa`; `x` has `len` values, `sum` 16.
    unsafe {
        let one = I::F::splat(1.0);
        let mut acc = [I::F::splat(0.0); 8];
        for at in (0..a.len).step_by(128) {
            for (i, acc) in acc.iter_mut().enumerate() {
                prefetch_ahead(a.x.add(at + i * 16));
                *acc = I::F::fma(I::F::load(a.x.add(at + i * 16)), one, *acc);
            }
        }
        let mut all = acc[0];
        for acc in &acc[1..] {
            all = I::F::fma(*acc, one, all);
        }
        I::F::store(a.sum, all);
    }
}
dispatch! { unsafe fn sum(a: SumArgs) = sum_body }

impl Cpu {
    /// Bytes per second that all threads together read from `bytes` bytes of memory, the best of several passes.
    pub fn read_rate(&self, bytes: usize) -> f64 {
        const PART: usize = 1 << 16;
        let parts = (bytes / 4 / PART).max(1);
        // In pages of the size that weights have, with the same prefetches.
        let mut values = Pages::new(parts * PART * 4);
        values.fill(0x3f);
        let mut sums = vec![0.0f32; parts * 16];
        let out = SendPtr(sums.as_mut_ptr());
        let mut best = f64::INFINITY;
        for _ in 0..PASSES {
            let start = Instant::now();
            self.pool.run(parts, &|part| {
                let args = SumArgs {
                    x: values[part * PART * 4..].as_ptr().cast(),
                    len: PART,
                    // SAFETY: each part has its own 16 sums.
                    sum: unsafe { out.get().add(part * 16) },
                };
                // SAFETY: as described in `args`.
                unsafe { sum(self.level, args) };
            });
            best = best.min(start.elapsed().as_secs_f64());
        }
        std::hint::black_box(&sums);
        (parts * PART * 4) as f64 / best
    }

    /// Multiply-adds per second of our own kernel on 4-bit weights that stay in the nearest caches, many rows at once.
    pub fn dot_rate(&self) -> f64 {
        let (out, inputs, rows) = (256, 512, 64);
        let data = vec![0x11u8; out * inputs / 32 * 20];
        let view =
            WeightView { dtype: WeightDtype::Q4_1, out_features: out, in_features: inputs, data: &data };
        let weight = pack::PackedWeight::pack(&self.pool, "", &view, PackMode::Stored)
            .expect("the view has the bytes of its shape");
        let threads = self.threads();
        let x = vec![0.5f32; rows * inputs];
        // Several products in one call, as many as threads share.
        let weights: Vec<_> =
            (0..threads * 4).map(|_| matmul::Layer { weight: &weight, bias: None }).collect();
        let mut outputs = vec![vec![0.0f32; rows * out]; weights.len()];
        let mut best = f64::INFINITY;
        for _ in 0..4 * PASSES {
            let mut views: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
            let start = Instant::now();
            matmul::matmuls(self.level, &self.pool, &x, rows, &weights, &mut views);
            best = best.min(start.elapsed().as_secs_f64());
        }
        (rows * out * inputs * weights.len()) as f64 / best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_positive_on_every_path() {
        for cpu in Cpu::all_paths(2) {
            assert!(cpu.read_rate(1 << 20) > 0.0);
            assert!(cpu.dot_rate() > 0.0);
        }
    }
}
