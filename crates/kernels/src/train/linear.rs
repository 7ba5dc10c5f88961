//! f32 matrix products of training, through the `gemm` crate.
//!
//! Shape legend: `R` rows, `O`/`I` output and input features; everything row-major.

use gemm::Parallelism;

use super::par::in_pool;

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

    fn run_parallel(&self, threads: usize, dst: &mut [f32], lhs: &[f32], rhs: &[f32]) {
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
pub fn matmul(threads: usize, x: &[f32], w: &[f32], s: LinearShape, y: &mut [f32]) {
    let (o, i) = (s.out as isize, s.inp as isize);
    let p =
        Product { m: s.rows, n: s.out, k: s.inp, dst: (o, 1), lhs: (i, 1), rhs: (1, i), accumulate: false };
    p.run_parallel(threads, y, x, w);
}

/// `y[R, O] += x[R, I] · w[O, I]ᵀ`
pub fn matmul_acc(threads: usize, x: &[f32], w: &[f32], s: LinearShape, y: &mut [f32]) {
    let (o, i) = (s.out as isize, s.inp as isize);
    let p =
        Product { m: s.rows, n: s.out, k: s.inp, dst: (o, 1), lhs: (i, 1), rhs: (1, i), accumulate: true };
    p.run_parallel(threads, y, x, w);
}

/// `dx[R, I] (+)= dy[R, O] · w[O, I]`
pub fn matmul_dx(threads: usize, dy: &[f32], w: &[f32], s: LinearShape, accumulate: bool, dx: &mut [f32]) {
    let (o, i) = (s.out as isize, s.inp as isize);
    let p = Product { m: s.rows, n: s.inp, k: s.out, dst: (i, 1), lhs: (o, 1), rhs: (i, 1), accumulate };
    p.run_parallel(threads, dx, dy, w);
}

/// `dw[O, I] += dy[R, O]ᵀ · x[R, I]`
pub fn matmul_dw_acc(threads: usize, dy: &[f32], x: &[f32], s: LinearShape, dw: &mut [f32]) {
    let (o, i) = (s.out as isize, s.inp as isize);
    let p =
        Product { m: s.out, n: s.inp, k: s.rows, dst: (i, 1), lhs: (1, o), rhs: (i, 1), accumulate: true };
    p.run_parallel(threads, dw, dy, x);
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
    fn empty_products_are_zero() {
        let mut dx = [1.0, 2.0];
        matmul_dx(1, &[], &[], LinearShape { rows: 1, out: 0, inp: 2 }, false, &mut dx);
        assert_eq!(dx, [0.0, 0.0]);
    }
}
