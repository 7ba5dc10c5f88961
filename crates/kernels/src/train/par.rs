//! Threads, vector dispatch and the small numeric pieces that all training kernels share.
//!
//! Invariant: every reduction runs in an order fixed by the shape alone (16 lanes, fixed row chunks), so results do
//! not depend on the thread count or on the vector width of the machine.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use pulp::Arch;

/// Independent accumulators of a float reduction; a multiple of every vector width in use.
pub(crate) const LANES: usize = 16;

/// Runs `f` in a rayon pool of `threads` workers (kept for the life of the process), or right here for one.
pub(crate) fn in_pool<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    if threads <= 1 {
        return f();
    }
    static POOLS: OnceLock<Mutex<HashMap<usize, Option<Arc<rayon::ThreadPool>>>>> = OnceLock::new();
    let pool = {
        let mut pools = POOLS.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
        let build = || rayon::ThreadPoolBuilder::new().num_threads(threads).build().ok().map(Arc::new);
        pools.entry(threads).or_insert_with(build).clone()
    };
    match pool {
        Some(pool) => pool.install(f),
        // The system refuses more threads: the result is the same on this one.
        None => f(),
    }
}

/// Runs `f` over `0..len` cut into ranges of `chunk`, in parallel.
pub(crate) fn par_ranges(threads: usize, len: usize, chunk: usize, f: impl Fn(Range<usize>) + Send + Sync) {
    let chunk = chunk.max(1);
    let tasks = len.div_ceil(chunk);
    let run = |i: usize| f(i * chunk..((i + 1) * chunk).min(len));
    if threads <= 1 || tasks <= 1 {
        (0..tasks).for_each(run);
    } else {
        use rayon::prelude::*;
        in_pool(threads, || (0..tasks).into_par_iter().with_max_len(1).for_each(run));
    }
}

/// A slice that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    ptr: *mut T,
    len: usize,
}

// SAFETY: only `range` gives access, and its callers promise disjoint ranges between threads.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Shared<T> {
        Shared { ptr: slice.as_mut_ptr(), len: slice.len() }
    }

    /// # Safety
    /// No two live results may overlap, and the slice given to `new` must outlive them.
    #[allow(clippy::mut_from_ref, reason = "the disjointness is the caller's promise")]
    pub(crate) unsafe fn range(&self, r: Range<usize>) -> &mut [T] {
        assert!(r.start <= r.end && r.end <= self.len, "range inside the slice");
        // SAFETY: bounds checked; exclusivity is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(r.start), r.len()) }
    }

    /// Raw pointer to element `i`, for strided writes of a matrix product.
    pub(crate) fn at(&self, i: usize) -> *mut T {
        assert!(i < self.len, "element inside the slice");
        // SAFETY: bounds checked.
        unsafe { self.ptr.add(i) }
    }
}

/// Runs `f` compiled for the widest vectors of this machine. `f` must inline.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(f)
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Runs `f` with a scratch buffer of `len` values of unspecified content, kept by this thread for the next call.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buf = SCRATCH.with_borrow_mut(|free| {
        // The largest buffer: nested calls ask for different sizes.
        let best = (0..free.len()).max_by_key(|i| free[*i].len());
        best.map(|i| free.swap_remove(i)).unwrap_or_default()
    });
    if buf.len() < len {
        buf.resize(len, 0.0);
    }
    let result = f(&mut buf[..len]);
    SCRATCH.with_borrow_mut(|free| free.push(buf));
    result
}

/// `e^x` to about 1 ulp; 0 below -87.3, no infinities. Written without branches so that loops over it vectorise.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits. (A cast to integer saturates,
    // and that check keeps the loop from being vectorised: six times slower.)
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.3 { -87.3 } else { x };
    let clamped = if clamped > 88.3 { 88.3 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HI - n * LN2_LO;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 0.166_666_66;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { y * scale }
}

/// Adds the lanes in a fixed tree.
#[inline(always)]
pub(crate) fn fold_lanes(mut acc: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            acc[i] += acc[i + half];
        }
        half /= 2;
    }
    acc[0]
}

/// `Σ a·b`
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum2(a, b, |x, y| x * y)
}

/// `Σ f(a, b)` over two slices of equal length.
#[inline(always)]
pub(crate) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    assert_eq!(a.len(), b.len(), "equal lengths");
    let mut acc = [0.0f32; LANES];
    let (ca, ra) = a.as_chunks::<LANES>();
    let (cb, rb) = b.as_chunks::<LANES>();
    for (x, y) in ca.iter().zip(cb) {
        for i in 0..LANES {
            acc[i] += f(x[i], y[i]);
        }
    }
    for (i, (x, y)) in ra.iter().zip(rb).enumerate() {
        acc[i] += f(*x, *y);
    }
    fold_lanes(acc)
}

/// Largest value, `-inf` for none.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            acc[i] = if x[i] > acc[i] { x[i] } else { acc[i] };
        }
    }
    let mut best = f32::NEG_INFINITY;
    for x in acc.iter().chain(rest) {
        best = if *x > best { *x } else { best };
    }
    best
}

/// `x = e^(x - shift)` in place; returns the sum.
#[inline(always)]
pub(crate) fn exp_shifted(x: &mut [f32], shift: f32) -> f32 {
    let mut acc = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for x in chunks {
        for i in 0..LANES {
            x[i] = exp(x[i] - shift);
            acc[i] += x[i];
        }
    }
    for (i, x) in rest.iter_mut().enumerate() {
        *x = exp(*x - shift);
        acc[i] += *x;
    }
    fold_lanes(acc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_within_two_ulp_of_the_libm_one() {
        let mut worst = 0.0f64;
        for i in -870_000..870_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst}");
        assert_eq!((exp(0.0), exp(-1e30), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn dispatched_loops_give_the_same_bits_as_plain_ones() {
        let a: Vec<f32> = (0..1003).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.1).collect();
        let b: Vec<f32> = (0..1003).map(|i| ((i * 53 % 97) as f32 - 48.0) * 0.1).collect();
        assert_eq!(dot(&a, &b).to_bits(), simd(|| dot(&a, &b)).to_bits());
        let (mut x, mut y) = (a.clone(), a.clone());
        let sums = (exp_shifted(&mut x, 1.0), simd(|| exp_shifted(&mut y, 1.0)));
        assert_eq!(sums.0.to_bits(), sums.1.to_bits());
        assert_eq!(x, y);
        assert_eq!(simd(|| max(&a)), 5.0);
    }
}
