//! Matrix products of training: f32 through the `gemm` crate, or of bf16 numbers where that is asked for.
//!
//! Shape legend: `R` rows, `O`/`I` output and input features; everything row-major.

use gemm::Parallelism;

use super::par::in_pool;

/// How the large products of training are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// In f32.
    #[default]
    F32,
    /// Where the CPU multiplies bf16 numbers (Intel AMX, AVX-512 BF16), of numbers rounded to them, with f32 sums, as GPUs train: each
    /// product off by at most `2^-8` of itself. Elsewhere, and for small ones, [`Products::F32`].
    Bf16,
    /// Where the CPU has tile registers (Intel AMX), every number as the sum of two bf16 numbers: three products of bf16 numbers
    /// in place of one, each off by at most `2^-15` of itself. Elsewhere, and for small ones, [`Products::F32`].
    Bf16x3,
}

impl Products {
    /// Whether this CPU has what they are computed with; without it they are [`Products::F32`].
    pub fn is_offered(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            self == Products::F32 || super::split::Way::of(self).is_some()
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Products::F32
        }
    }
}

/// Who computes products, and how: a number of threads alone stands for [`Products::F32`].
#[derive(Clone, Copy, Debug)]
pub struct Team {
    /// Threads.
    pub threads: usize,
    /// Of the large products.
    pub products: Products,
}

impl From<usize> for Team {
    fn from(threads: usize) -> Team {
        Team { threads, products: Products::F32 }
    }
}

/// One matrix product `dst[m, n] (+)= lhs[m, k] · rhs[k, n]` with strides (row, column) in elements.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) dst: (isize, isize),
    pub(crate) lhs: (isize, isize),
    pub(crate) rhs: (isize, isize),
    pub(crate) accumulate: bool,
}

impl Product {
    /// # Safety
    /// Each pointer must be valid for the whole matrix that sizes and strides describe, `dst` exclusively.
    pub(crate) unsafe fn run(
        &self,
        dst: *mut f32,
        lhs: *const f32,
        rhs: *const f32,
        parallelism: Parallelism,
    ) {
        // SAFETY: the caller's promise. The beta factor scales the product, alpha what is read from `dst`.
        unsafe {
            gemm::gemm(
                self.m,
                self.n,
                self.k,
                dst,
                self.dst.1,
                self.dst.0,
                self.accumulate,
                lhs,
                self.lhs.1,
                self.lhs.0,
                rhs,
                self.rhs.1,
                self.rhs.0,
                1.0f32,
                1.0f32,
                false,
                false,
                false,
                parallelism,
            );
        }
    }

    fn run_parallel(&self, Team { threads, products }: Team, dst: &mut [f32], lhs: &[f32], rhs: &[f32]) {
        let last = |m: usize, n: usize, s: (isize, isize)| (m - 1) * s.0 as usize + (n - 1) * s.1 as usize;
        if self.m == 0 || self.n == 0 {
            return;
        }
        if self.k == 0 {
            if !self.accumulate {
                dst.fill(0.0);
            }
            return;
        }
        assert!(last(self.m, self.n, self.dst) < dst.len(), "destination holds the product");
        assert!(last(self.m, self.k, self.lhs) < lhs.len(), "left operand is complete");
        assert!(last(self.k, self.n, self.rhs) < rhs.len(), "right operand is complete");
        #[cfg(target_arch = "x86_64")]
        if let Some(way) = super::split::Way::of(products)
            && super::split::fits(self)
        {
            let operands = (lhs.as_ptr(), rhs.as_ptr());
            // SAFETY: bounds checked above, `dst` is borrowed exclusively.
            unsafe { super::split::run(self, way, threads, dst.as_mut_ptr(), operands) };
            return;
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = products;
        struct Send3(*mut f32, *const f32, *const f32);
        // SAFETY: the pointers come from borrows that outlive the call.
        unsafe impl Send for Send3 {}
        let pointers = Send3(dst.as_mut_ptr(), lhs.as_ptr(), rhs.as_ptr());
        let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
        in_pool(threads, move || {
            let pointers = pointers;
            // SAFETY: bounds checked above, `dst` is borrowed exclusively.
            unsafe { self.run(pointers.0, pointers.1, pointers.2, parallelism) }
        });
    }
}

/// Sizes of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// `R`
    pub rows: usize,
    /// `O`
    pub out: usize,
    /// `I`
    pub inp: usize,
}

/// `y[R, O] = x[R, I] · w[O, I]ᵀ`
pub fn matmul(team: impl Into<Team>, x: &[f32], w: &[f32], s: LinearShape, y: &mut [f32]) {
    let (o, i) = (s.out as isize, s.inp as isize);
    let p =
        Product { m: s.rows, n: s.out, k: s.inp, dst: (o, 1), lhs: (i, 1), rhs: (1, i), accumulate: false };
    p.run_parallel(team.into(), y, x, w);
}

/// `y[R, O] += x[R, I] · w[O, I]ᵀ`
pub fn matmul_acc(team: impl Into<Team>, x: &[f32], w: &[f32], s: LinearShape, y: &mut [f32]) {
    let (o, i) = (s.out as isize, s.inp as isize);
    let p =
        Product { m: s.rows, n: s.out, k: s.inp, dst: (o, 1), lhs: (i, 1), rhs: (1, i), accumulate: true };
    p.run_parallel(team.into(), y, x, w);
}

/// `dx[R, I] (+)= dy[R, O] · w[O, I]`
pub fn matmul_dx(
    team: impl Into<Team>,
    dy: &[f32],
    w: &[f32],
    s: LinearShape,
    accumulate: bool,
    dx: &mut [f32],
) {
    let (o, i) = (s.out as isize, s.inp as isize);
    let p = Product { m: s.rows, n: s.inp, k: s.out, dst: (i, 1), lhs: (o, 1), rhs: (i, 1), accumulate };
    p.run_parallel(team.into(), dx, dy, w);
}

/// `dw[O, I] += dy[R, O]ᵀ · x[R, I]`
pub fn matmul_dw_acc(team: impl Into<Team>, dy: &[f32], x: &[f32], s: LinearShape, dw: &mut [f32]) {
    let (o, i) = (s.out as isize, s.inp as isize);
    let p =
        Product { m: s.out, n: s.inp, k: s.rows, dst: (i, 1), lhs: (1, o), rhs: (i, 1), accumulate: true };
    p.run_parallel(team.into(), dw, dy, x);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn products_do_not_depend_on_the_thread_count() {
        let s = LinearShape { rows: 300, out: 192, inp: 160 };
        let (x, w, dy) = (noise(1, s.rows * s.inp), noise(2, s.out * s.inp), noise(3, s.rows * s.out));
        let run = |threads| {
            let (mut y, mut dx, mut dw) =
                (vec![0.0; s.rows * s.out], vec![0.0; s.rows * s.inp], vec![0.0; s.out * s.inp]);
            matmul(threads, &x, &w, s, &mut y);
            matmul_dx(threads, &dy, &w, s, false, &mut dx);
            matmul_dw_acc(threads, &dy, &x, s, &mut dw);
            (y, dx, dw)
        };
        let one = run(1);
        for threads in [2, 3] {
            assert!(run(threads) == one, "{threads} threads");
        }
    }

    #[test]
    fn products_in_two_parts_are_those_of_the_numbers_for_any_shape() {
        check_products(Products::Bf16x3, f64::from, 1.0 / 32768.0);
    }

    /// What they are is said by rounding both numbers; what is left are the sums in f32.
    #[test]
    fn products_in_one_part_are_those_of_rounded_numbers_for_any_shape() {
        let rounded = |x: f32| half::bf16::from_f32(x).to_f64();
        match Products::Bf16.is_offered() {
            true => check_products(Products::Bf16, rounded, 1.0 / 65536.0),
            false => check_products(Products::Bf16, f64::from, 1.0 / 65536.0),
        }
    }

    /// `off`: what a sum may be off by, of the size of its products of numbers as they are `taken`.
    fn check_products(products: Products, taken: impl Fn(f32) -> f64, off_by: f64) {
        // Whole tiles and not, one and several stretches of the sum, both directions of both operands.
        for (m, n, k) in [(64, 64, 256), (100, 515, 90), (33, 1000, 577), (257, 40, 1100), (1000, 33, 65)] {
            for (lhs, rhs) in [((k, 1), (1, k)), ((k, 1), (n, 1)), ((1, m), (n, 1)), ((1, m), (1, k))] {
                for accumulate in [false, true] {
                    let strides = |s: (usize, usize)| (s.0 as isize, s.1 as isize);
                    // Rows of `dst` with a gap behind each.
                    let stride = n + 3;
                    let p = Product {
                        m,
                        n,
                        k,
                        dst: (stride as isize, 1),
                        lhs: strides(lhs),
                        rhs: strides(rhs),
                        accumulate,
                    };
                    let (a, b, start) = (noise(1, m * k), noise(2, k * n), noise(3, m * stride));
                    let run = |threads| {
                        let mut dst = start.clone();
                        p.run_parallel(Team { threads, products }, &mut dst, &a, &b);
                        dst
                    };
                    let found = run(1);
                    for threads in [2, 3] {
                        assert!(run(threads) == found, "{threads} threads");
                    }
                    for i in 0..m {
                        for j in 0..n {
                            let terms = (0..k)
                                .map(|t| taken(a[i * lhs.0 + t * lhs.1]) * taken(b[t * rhs.0 + j * rhs.1]));
                            let (sum, size) =
                                terms.fold((0.0, 0.0), |(sum, size), x: f64| (sum + x, size + x.abs()));
                            let at = i * stride + j;
                            let before = if accumulate { f64::from(start[at]) } else { 0.0 };
                            let off = (f64::from(found[at]) - before - sum).abs();
                            assert!(
                                off <= off_by * size + 1e-6,
                                "{m} x {n} x {k} at {i}, {j}: {off} of {size}"
                            );
                        }
                        assert_eq!(
                            found[i * stride + n..(i + 1) * stride],
                            start[i * stride + n..(i + 1) * stride]
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_that_are_none_stay_none() {
        let s = LinearShape { rows: 64, out: 128, inp: 256 };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7fff_ffff)] {
            let (mut x, w) = (noise(1, s.rows * s.inp), noise(2, s.out * s.inp));
            x[5 * s.inp + 7] = bad;
            for products in [Products::Bf16, Products::Bf16x3] {
                let mut y = vec![0.0; s.rows * s.out];
                matmul(Team { threads: 2, products }, &x, &w, s, &mut y);
                for (row, y) in y.chunks_exact(s.out).enumerate() {
                    assert!(y.iter().all(|y| y.is_finite() == (row != 5)), "{bad}: row {row}");
                }
            }
        }
    }

    #[test]
    fn empty_products_are_zero() {
        let mut dx = [1.0, 2.0];
        matmul_dx(1, &[], &[], LinearShape { rows: 1, out: 0, inp: 2 }, false, &mut dx);
        assert_eq!(dx, [0.0, 0.0]);
    }
}
