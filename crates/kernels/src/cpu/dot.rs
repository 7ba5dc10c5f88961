//! Dot products of stored quants with 8-bit activations, on several instruction sets.
//!
//! One step covers a register of outputs times four inputs. All sums are exact integers, so the sets agree bit for
//! bit; they differ in how many outputs a register holds and in when 16-bit sums are widened.
//!
//! Safety rule of the module: as in [`super::isa`].

use super::isa::{Lanes, Portable};

/// Integer dot products of one instruction set.
pub(crate) trait Dot: Copy {
    /// Activation rows whose sums fit the registers together.
    const ROWS: usize;
    /// What [`Dot::dot8`] adds per unit of the activation sum, to be subtracted by the caller.
    const BIAS8: i32;
    /// Sums of [`Dot::dot4`] are 16 bits wide.
    const NARROW: bool;
    /// One f32 per output of a register, which divide 16.
    type V: Lanes;
    /// One i32 per output.
    type I: Copy;
    /// A sum of products under way.
    type Sum4: Copy;
    /// Four bytes per output.
    type W: Copy;
    /// Four signed weights per output.
    type W8: Copy;

    unsafe fn zero_i() -> Self::I;
    /// The number at `v` in every lane.
    unsafe fn splat_i(v: *const i32) -> Self::I;
    unsafe fn to_f(v: Self::I) -> Self::V;
    /// The bits of numbers as f32.
    unsafe fn bits_f(v: Self::I) -> Self::V;
    /// Subtracts `v` from every lane.
    unsafe fn sub(a: Self::I, v: i32) -> Self::I;
    unsafe fn and(a: Self::I, mask: i32) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn shr<const N: u32>(a: Self::I) -> Self::I;
    unsafe fn shl<const N: u32>(a: Self::I) -> Self::I;
    /// One unsigned byte per output.
    unsafe fn load_u8(p: *const u8) -> Self::I;
    /// One signed byte per output.
    unsafe fn load_i8(p: *const u8) -> Self::I;

    unsafe fn load_w(p: *const u8) -> Self::W;
    /// The bits `mask` of every byte after a shift to the right, or to the left if `shift` is negative. No bit that
    /// `mask` keeps may come from another byte.
    unsafe fn bits(w: Self::W, shift: i32, mask: u8) -> Self::W;
    unsafe fn or_w(a: Self::W, b: Self::W) -> Self::W;
    /// Flips the highest bit of every byte.
    unsafe fn flip(w: Self::W) -> Self::W;
    /// The entries of a table at indices below 16.
    unsafe fn table(w: Self::W, table: &[u8; 16]) -> Self::W;

    unsafe fn zero4() -> Self::Sum4;
    /// A sum under way that goes on from `acc`, and what is to be added to it at its end.
    unsafe fn open4(acc: Self::I) -> (Self::Sum4, Self::I);
    /// Adds each lane's four unsigned weights (at most 63) times the four activations at `a`. [`Dot::NARROW`] sums hold
    /// eight steps of weights up to 15, four of 31, two of 63.
    unsafe fn dot4(acc: Self::Sum4, w: Self::W, a: *const i8) -> Self::Sum4;
    /// `acc` and the sum.
    unsafe fn add4(acc: Self::I, sum: Self::Sum4) -> Self::I;

    /// Bytes as signed weights.
    unsafe fn signed(w: Self::W) -> Self::W8;
    /// Adds each lane's four weights times the four activations at `a` (-127..=127), plus [`Dot::BIAS8`] times the
    /// sum of these activations.
    unsafe fn dot8(acc: Self::I, w: Self::W8, a: *const i8) -> Self::I;

    /// Quantises 32 values: scale and the sums of the two halves [`crate::quant::quantize_block`].
    unsafe fn quantize(x: *const f32, q: *mut i8) -> (f32, [i32; 2]);
}

/// Adds four products to each of 16 sums.
#[inline(always)]
unsafe fn dot_fours<W: Copy + Into<i32>>(acc: [i32; 16], w: [W; 64], a: *const i8) -> [i32; 16] {
    // SAFETY: module rule: four activations.
    let a = unsafe { a.cast::<[i8; 4]>().read_unaligned() };
    std::array::from_fn(|i| acc[i] + (0..4).map(|j| w[4 * i + j].into() * i32::from(a[j])).sum::<i32>())
}

impl Dot for Portable {
    const ROWS: usize = 4;
    const BIAS8: i32 = 0;
    const NARROW: bool = false;
    type V = [f32; 16];
    type I = [i32; 16];
    type Sum4 = [i32; 16];
    type W = [u8; 64];
    type W8 = [i8; 64];

    #[inline(always)]
    unsafe fn zero_i() -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn splat_i(v: *const i32) -> [i32; 16] {
        // SAFETY: module rule.
        unsafe { [*v; 16] }
    }
    #[inline(always)]
    unsafe fn to_f(v: [i32; 16]) -> [f32; 16] {
        v.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn bits_f(v: [i32; 16]) -> [f32; 16] {
        v.map(|x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    unsafe fn sub(a: [i32; 16], v: i32) -> [i32; 16] {
        a.map(|x| x - v)
    }
    #[inline(always)]
    unsafe fn and(a: [i32; 16], mask: i32) -> [i32; 16] {
        a.map(|x| x & mask)
    }
    #[inline(always)]
    unsafe fn or(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(a: [i32; 16]) -> [i32; 16] {
        a.map(|x| (x as u32 >> N) as i32)
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(a: [i32; 16]) -> [i32; 16] {
        a.map(|x| x << N)
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> [i32; 16] {
        // SAFETY: module rule.
        unsafe { p.cast::<[u8; 16]>().read_unaligned().map(i32::from) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> [i32; 16] {
        // SAFETY: module rule.
        unsafe { p.cast::<[i8; 16]>().read_unaligned().map(i32::from) }
    }
    #[inline(always)]
    unsafe fn load_w(p: *const u8) -> [u8; 64] {
        // SAFETY: module rule.
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn bits(w: [u8; 64], shift: i32, mask: u8) -> [u8; 64] {
        w.map(|x| if shift < 0 { x << -shift } else { x >> shift } & mask)
    }
    #[inline(always)]
    unsafe fn or_w(a: [u8; 64], b: [u8; 64]) -> [u8; 64] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn flip(w: [u8; 64]) -> [u8; 64] {
        w.map(|x| x ^ 0x80)
    }
    #[inline(always)]
    unsafe fn table(w: [u8; 64], table: &[u8; 16]) -> [u8; 64] {
        w.map(|x| table[usize::from(x & 15)])
    }
    #[inline(always)]
    unsafe fn zero4() -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn open4(acc: [i32; 16]) -> ([i32; 16], [i32; 16]) {
        (acc, [0; 16])
    }
    #[inline(always)]
    unsafe fn dot4(acc: [i32; 16], w: [u8; 64], a: *const i8) -> [i32; 16] {
        // SAFETY: module rule.
        unsafe { dot_fours(acc, w, a) }
    }
    #[inline(always)]
    unsafe fn add4(acc: [i32; 16], sum: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|i| acc[i] + sum[i])
    }
    #[inline(always)]
    unsafe fn signed(w: [u8; 64]) -> [i8; 64] {
        w.map(|x| x as i8)
    }
    #[inline(always)]
    unsafe fn dot8(acc: [i32; 16], w: [i8; 64], a: *const i8) -> [i32; 16] {
        // SAFETY: module rule.
        unsafe { dot_fours(acc, w, a) }
    }
    #[inline(always)]
    unsafe fn quantize(x: *const f32, q: *mut i8) -> (f32, [i32; 2]) {
        // SAFETY: module rule: 32 values each.
        let (x, q) = unsafe { (&*x.cast::<[f32; 32]>(), &mut *q.cast::<[i8; 32]>()) };
        let scale = crate::quant::quantize_block(x, q);
        let sum = |half: &[i8]| half.iter().map(|q| i32::from(*q)).sum();
        (scale, [sum(&q[..16]), sum(&q[16..])])
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::isa::{Avx2, Avx512};
    use super::Dot;

    // SAFETY of all blocks below: the module rule (features present, pointers valid).
    #[expect(clippy::undocumented_unsafe_blocks, reason = "module rule")]
    impl Dot for Avx2 {
        const ROWS: usize = 4;
        const BIAS8: i32 = 0;
        const NARROW: bool = true;
        type V = __m256;
        type I = __m256i;
        /// Pairs summed in 16 bits: eight steps reach `8 * 2 * 15 * 127 = 30,480` at most, two of 63 reach 32,004.
        type Sum4 = __m256i;
        type W = __m256i;
        /// Absolute values and the signed originals.
        type W8 = (__m256i, __m256i);

        #[inline(always)]
        unsafe fn zero_i() -> __m256i {
            unsafe { _mm256_setzero_si256() }
        }
        #[inline(always)]
        unsafe fn splat_i(v: *const i32) -> __m256i {
            unsafe { _mm256_set1_epi32(*v) }
        }
        #[inline(always)]
        unsafe fn to_f(v: __m256i) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(v) }
        }
        #[inline(always)]
        unsafe fn bits_f(v: __m256i) -> __m256 {
            unsafe { _mm256_castsi256_ps(v) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256i, v: i32) -> __m256i {
            unsafe { _mm256_sub_epi32(a, _mm256_set1_epi32(v)) }
        }
        #[inline(always)]
        unsafe fn and(a: __m256i, mask: i32) -> __m256i {
            unsafe { _mm256_and_si256(a, _mm256_set1_epi32(mask)) }
        }
        #[inline(always)]
        unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
            unsafe { _mm256_or_si256(a, b) }
        }
        #[inline(always)]
        unsafe fn shr<const N: u32>(a: __m256i) -> __m256i {
            unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(N as i32)) }
        }
        #[inline(always)]
        unsafe fn shl<const N: u32>(a: __m256i) -> __m256i {
            unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(N as i32)) }
        }
        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> __m256i {
            unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const u8) -> __m256i {
            unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_w(p: *const u8) -> __m256i {
            unsafe { _mm256_loadu_si256(p.cast()) }
        }
        #[inline(always)]
        unsafe fn bits(w: __m256i, shift: i32, mask: u8) -> __m256i {
            unsafe {
                // Shifts of pairs of bytes: `mask` drops what crosses.
                let w = if shift < 0 {
                    _mm256_sll_epi16(w, _mm_cvtsi32_si128(-shift))
                } else {
                    _mm256_srl_epi16(w, _mm_cvtsi32_si128(shift))
                };
                _mm256_and_si256(w, _mm256_set1_epi8(mask as i8))
            }
        }
        #[inline(always)]
        unsafe fn or_w(a: __m256i, b: __m256i) -> __m256i {
            unsafe { _mm256_or_si256(a, b) }
        }
        #[inline(always)]
        unsafe fn flip(w: __m256i) -> __m256i {
            unsafe { _mm256_xor_si256(w, _mm256_set1_epi8(-128)) }
        }
        #[inline(always)]
        unsafe fn table(w: __m256i, table: &[u8; 16]) -> __m256i {
            unsafe {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
                _mm256_shuffle_epi8(table, w)
            }
        }
        #[inline(always)]
        unsafe fn zero4() -> __m256i {
            unsafe { _mm256_setzero_si256() }
        }
        #[inline(always)]
        unsafe fn open4(acc: __m256i) -> (__m256i, __m256i) {
            // Too narrow for what was summed before.
            unsafe { (Self::zero4(), acc) }
        }
        #[inline(always)]
        unsafe fn dot4(acc: __m256i, w: __m256i, a: *const i8) -> __m256i {
            unsafe {
                let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
                _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, a))
            }
        }
        #[inline(always)]
        unsafe fn add4(acc: __m256i, sum: __m256i) -> __m256i {
            unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1))) }
        }
        #[inline(always)]
        unsafe fn signed(w: __m256i) -> (__m256i, __m256i) {
            unsafe { (_mm256_abs_epi8(w), w) }
        }
        #[inline(always)]
        unsafe fn dot8(acc: __m256i, w: (__m256i, __m256i), a: *const i8) -> __m256i {
            unsafe {
                // |w| <= 128 and |a| <= 127: pairs reach 32,512 at most and fit an i16.
                let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
                let products = _mm256_maddubs_epi16(w.0, _mm256_sign_epi8(a, w.1));
                _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
            }
        }
        #[inline(always)]
        unsafe fn quantize(x: *const f32, q: *mut i8) -> (f32, [i32; 2]) {
            unsafe {
                let sign = _mm256_set1_ps(-0.0);
                let x = [0, 1, 2, 3].map(|i| _mm256_loadu_ps(x.add(i * 8)));
                // `max` with the old value second ignores NaN.
                let max =
                    x.iter().fold(_mm256_setzero_ps(), |m, v| _mm256_max_ps(_mm256_andnot_ps(sign, *v), m));
                let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
                let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
                let max = _mm_cvtss_f32(_mm_max_ss(max, _mm_shuffle_ps::<1>(max, max)));
                let scale = max / 127.0;
                let inv = _mm256_set1_ps(if scale > 0.0 { 1.0 / scale } else { 0.0 });
                let (low, high) = (_mm256_set1_ps(-127.0), _mm256_set1_ps(127.0));
                // The default rounding mode is to nearest, ties to even; NaN becomes the second operand of `max`.
                let [a, b, c, d] = x.map(|v| {
                    let v = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(v, inv), low), high);
                    _mm256_cvtps_epi32(v)
                });
                let sum = |a: __m256i, b: __m256i| {
                    let s = _mm256_add_epi32(a, b);
                    let s = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256::<1>(s));
                    let s = _mm_add_epi32(s, _mm_shuffle_epi32::<0b01_00_11_10>(s));
                    _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32::<1>(s)))
                };
                let sums = [sum(a, b), sum(c, d)];
                // Packing works on 128-bit halves; the permutation puts the groups of four bytes in order.
                let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
                let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                _mm256_storeu_si256(q.cast(), _mm256_permutevar8x32_epi32(bytes, order));
                (scale, sums)
            }
        }
    }

    #[expect(clippy::undocumented_unsafe_blocks, reason = "module rule")]
    impl Dot for Avx512 {
        const ROWS: usize = 8;
        /// Weights are shifted to 0..=255 by flipping the sign bit.
        const BIAS8: i32 = 128;
        const NARROW: bool = false;
        type V = __m512;
        type I = __m512i;
        type Sum4 = __m512i;
        type W = __m512i;
        type W8 = __m512i;

        #[inline(always)]
        unsafe fn zero_i() -> __m512i {
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn splat_i(v: *const i32) -> __m512i {
            unsafe { _mm512_set1_epi32(*v) }
        }
        #[inline(always)]
        unsafe fn to_f(v: __m512i) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(v) }
        }
        #[inline(always)]
        unsafe fn bits_f(v: __m512i) -> __m512 {
            unsafe { _mm512_castsi512_ps(v) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512i, v: i32) -> __m512i {
            unsafe { _mm512_sub_epi32(a, _mm512_set1_epi32(v)) }
        }
        #[inline(always)]
        unsafe fn and(a: __m512i, mask: i32) -> __m512i {
            unsafe { _mm512_and_si512(a, _mm512_set1_epi32(mask)) }
        }
        #[inline(always)]
        unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_or_si512(a, b) }
        }
        #[inline(always)]
        unsafe fn shr<const N: u32>(a: __m512i) -> __m512i {
            unsafe { _mm512_srli_epi32::<N>(a) }
        }
        #[inline(always)]
        unsafe fn shl<const N: u32>(a: __m512i) -> __m512i {
            unsafe { _mm512_slli_epi32::<N>(a) }
        }
        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> __m512i {
            unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const u8) -> __m512i {
            unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_w(p: *const u8) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn bits(w: __m512i, shift: i32, mask: u8) -> __m512i {
            unsafe {
                // Shifts of pairs of bytes: `mask` drops what crosses.
                let w = if shift < 0 {
                    _mm512_sll_epi16(w, _mm_cvtsi32_si128(-shift))
                } else {
                    _mm512_srl_epi16(w, _mm_cvtsi32_si128(shift))
                };
                _mm512_and_si512(w, _mm512_set1_epi8(mask as i8))
            }
        }
        #[inline(always)]
        unsafe fn or_w(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_or_si512(a, b) }
        }
        #[inline(always)]
        unsafe fn flip(w: __m512i) -> __m512i {
            unsafe { _mm512_xor_si512(w, _mm512_set1_epi8(-128)) }
        }
        #[inline(always)]
        unsafe fn table(w: __m512i, table: &[u8; 16]) -> __m512i {
            unsafe {
                let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
                _mm512_shuffle_epi8(table, w)
            }
        }
        #[inline(always)]
        unsafe fn zero4() -> __m512i {
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn open4(acc: __m512i) -> (__m512i, __m512i) {
            unsafe { (acc, Self::zero_i()) }
        }
        #[inline(always)]
        unsafe fn dot4(acc: __m512i, w: __m512i, a: *const i8) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a.cast::<i32>().read_unaligned())) }
        }
        #[inline(always)]
        unsafe fn add4(acc: __m512i, sum: __m512i) -> __m512i {
            unsafe { _mm512_add_epi32(acc, sum) }
        }
        #[inline(always)]
        unsafe fn signed(w: __m512i) -> __m512i {
            unsafe { _mm512_xor_si512(w, _mm512_set1_epi8(-128)) }
        }
        #[inline(always)]
        unsafe fn dot8(acc: __m512i, w: __m512i, a: *const i8) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a.cast::<i32>().read_unaligned())) }
        }
        #[inline(always)]
        unsafe fn quantize(x: *const f32, q: *mut i8) -> (f32, [i32; 2]) {
            unsafe {
                let (a, b) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)));
                // `max` with the old value second ignores NaN.
                let max = _mm512_max_ps(_mm512_abs_ps(a), _mm512_setzero_ps());
                let scale = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(b), max)) / 127.0;
                let inv = _mm512_set1_ps(if scale > 0.0 { 1.0 / scale } else { 0.0 });
                let (low, high) = (_mm512_set1_ps(-127.0), _mm512_set1_ps(127.0));
                // The default rounding mode is to nearest, ties to even; NaN becomes the second operand of `max`.
                let [a, b] = [a, b].map(|v| {
                    let v = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(v, inv), low), high);
                    _mm512_cvtps_epi32(v)
                });
                _mm_storeu_si128(q.cast(), _mm512_cvtepi32_epi8(a));
                _mm_storeu_si128(q.add(16).cast(), _mm512_cvtepi32_epi8(b));
                (scale, [_mm512_reduce_add_epi32(a), _mm512_reduce_add_epi32(b)])
            }
        }
    }
}
