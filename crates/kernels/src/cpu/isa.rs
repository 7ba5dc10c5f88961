//! Sixteen f32 lanes and sixteen 4-byte integer dot products, on three instruction sets.
//!
//! Every operation is lane-wise IEEE arithmetic with fused multiply-add, or exact integer arithmetic, so the
//! three give the same bits. Kernels are written once over [`Isa`] and compiled per set by [`dispatch!`].
//!
//! Safety rule of the module: an `Isa` method may be called only inside a function compiled with that set's
//! target features on a CPU that has them; pointers must be valid for the 16 lanes (or 64 bytes) read or written.

/// An instruction set.
pub(crate) trait Isa: Copy {
    /// 16 x f32.
    type F: Copy;
    /// 16 x i32.
    type I: Copy;
    /// 64 weight bytes: 16 outputs x 4 inputs.
    type W: Copy;
    /// 64 signed weight bytes, prepared for [`Isa::dot_i8`].
    type S: Copy;
    /// What `dot_i8` adds per unit of the activation sum, to be subtracted by the caller.
    const I8_BIAS: i32;

    unsafe fn splat(v: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    /// `a * b + c` with one rounding.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn zero_i() -> Self::I;
    unsafe fn to_f(v: Self::I) -> Self::F;
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    /// Subtracts `v` from every lane.
    unsafe fn sub_i(a: Self::I, v: i32) -> Self::I;
    unsafe fn load_w(p: *const u8) -> Self::W;
    unsafe fn low_nibbles(w: Self::W) -> Self::W;
    unsafe fn high_nibbles(w: Self::W) -> Self::W;
    /// Adds the dot product of each lane's four weights in 0..=15 with the four activations in `a`.
    unsafe fn dot_u4(acc: Self::I, w: Self::W, a: i32) -> Self::I;
    unsafe fn prepare_i8(w: Self::W) -> Self::S;
    /// Adds the dot product of each lane's four signed weights with the four activations in `a` (-127..=127),
    /// plus [`Isa::I8_BIAS`] times their sum.
    unsafe fn dot_i8(acc: Self::I, w: Self::S, a: i32) -> Self::I;
}

/// Plain Rust, any CPU.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Isa for Portable {
    type F = [f32; 16];
    type I = [i32; 16];
    type W = [u8; 64];
    type S = [u8; 64];
    const I8_BIAS: i32 = 0;

    #[inline(always)]
    unsafe fn splat(v: f32) -> [f32; 16] {
        [v; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 16] {
        // SAFETY: module rule.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> [f32; 16] {
        // SAFETY: module rule.
        let bits = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        bits.map(|b| half::f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> [f32; 16] {
        // SAFETY: module rule.
        let bits = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 16]) {
        // SAFETY: module rule.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn zero_i() -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn to_f(v: [i32; 16]) -> [f32; 16] {
        v.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn add_i(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub_i(a: [i32; 16], v: i32) -> [i32; 16] {
        a.map(|x| x - v)
    }
    #[inline(always)]
    unsafe fn load_w(p: *const u8) -> [u8; 64] {
        // SAFETY: module rule.
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn low_nibbles(w: [u8; 64]) -> [u8; 64] {
        w.map(|x| x & 15)
    }
    #[inline(always)]
    unsafe fn high_nibbles(w: [u8; 64]) -> [u8; 64] {
        w.map(|x| x >> 4)
    }
    #[inline(always)]
    unsafe fn dot_u4(acc: [i32; 16], w: [u8; 64], a: i32) -> [i32; 16] {
        let a = a.to_le_bytes().map(|b| i32::from(b as i8));
        std::array::from_fn(|i| acc[i] + (0..4).map(|j| i32::from(w[4 * i + j]) * a[j]).sum::<i32>())
    }
    #[inline(always)]
    unsafe fn prepare_i8(w: [u8; 64]) -> [u8; 64] {
        w
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: [i32; 16], w: [u8; 64], a: i32) -> [i32; 16] {
        let a = a.to_le_bytes().map(|b| i32::from(b as i8));
        std::array::from_fn(|i| acc[i] + (0..4).map(|j| i32::from(w[4 * i + j] as i8) * a[j]).sum::<i32>())
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Isa;

    /// AVX2 + FMA + F16C: two registers per 16 lanes.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    type P<T> = (T, T);

    // SAFETY of all blocks below: the module rule (features present, pointers valid).
    #[expect(clippy::undocumented_unsafe_blocks, reason = "module rule")]
    impl Isa for Avx2 {
        type F = P<__m256>;
        type I = P<__m256i>;
        type W = P<__m256i>;
        /// Absolute values and the signed originals.
        type S = (P<__m256i>, P<__m256i>);
        const I8_BIAS: i32 = 0;

        #[inline(always)]
        unsafe fn splat(v: f32) -> Self::F {
            unsafe { (_mm256_set1_ps(v), _mm256_set1_ps(v)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::F {
            unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self::F {
            unsafe {
                (
                    _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
                )
            }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self::F {
            unsafe {
                let widen =
                    |x: __m128i| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)));
                (widen(_mm_loadu_si128(p.cast())), widen(_mm_loadu_si128(p.add(8).cast())))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::F) {
            unsafe {
                _mm256_storeu_ps(p, v.0);
                _mm256_storeu_ps(p.add(8), v.1);
            }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
            unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn zero_i() -> Self::I {
            unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
        }
        #[inline(always)]
        unsafe fn to_f(v: Self::I) -> Self::F {
            unsafe { (_mm256_cvtepi32_ps(v.0), _mm256_cvtepi32_ps(v.1)) }
        }
        #[inline(always)]
        unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
            unsafe { (_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn sub_i(a: Self::I, v: i32) -> Self::I {
            unsafe {
                let v = _mm256_set1_epi32(v);
                (_mm256_sub_epi32(a.0, v), _mm256_sub_epi32(a.1, v))
            }
        }
        #[inline(always)]
        unsafe fn load_w(p: *const u8) -> Self::W {
            unsafe { (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())) }
        }
        #[inline(always)]
        unsafe fn low_nibbles(w: Self::W) -> Self::W {
            unsafe {
                let mask = _mm256_set1_epi8(15);
                (_mm256_and_si256(w.0, mask), _mm256_and_si256(w.1, mask))
            }
        }
        #[inline(always)]
        unsafe fn high_nibbles(w: Self::W) -> Self::W {
            unsafe {
                let mask = _mm256_set1_epi8(15);
                (
                    _mm256_and_si256(_mm256_srli_epi16::<4>(w.0), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(w.1), mask),
                )
            }
        }
        #[inline(always)]
        unsafe fn dot_u4(acc: Self::I, w: Self::W, a: i32) -> Self::I {
            unsafe {
                // 15 * 127 * 2 fits an i16: no saturation.
                let (a, ones) = (_mm256_set1_epi32(a), _mm256_set1_epi16(1));
                let dot = |acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), ones));
                (dot(acc.0, w.0), dot(acc.1, w.1))
            }
        }
        #[inline(always)]
        unsafe fn prepare_i8(w: Self::W) -> Self::S {
            unsafe { ((_mm256_abs_epi8(w.0), _mm256_abs_epi8(w.1)), w) }
        }
        #[inline(always)]
        unsafe fn dot_i8(acc: Self::I, w: Self::S, a: i32) -> Self::I {
            unsafe {
                // |w| <= 128 and |a| <= 127: pairs reach 32,512 at most and fit an i16.
                let (a, ones) = (_mm256_set1_epi32(a), _mm256_set1_epi16(1));
                let dot = |acc, abs, signed| {
                    let products = _mm256_maddubs_epi16(abs, _mm256_sign_epi8(a, signed));
                    _mm256_add_epi32(acc, _mm256_madd_epi16(products, ones))
                };
                (dot(acc.0, w.0.0, w.1.0), dot(acc.1, w.0.1, w.1.1))
            }
        }
    }

    /// AVX-512 F/BW/VL/DQ + VNNI.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    #[expect(clippy::undocumented_unsafe_blocks, reason = "module rule")]
    impl Isa for Avx512 {
        type F = __m512;
        type I = __m512i;
        type W = __m512i;
        type S = __m512i;
        /// Weights are shifted to 0..=255 by flipping the sign bit.
        const I8_BIAS: i32 = 128;

        #[inline(always)]
        unsafe fn splat(v: f32) -> __m512 {
            unsafe { _mm512_set1_ps(v) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> __m512 {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn zero_i() -> __m512i {
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn to_f(v: __m512i) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(v) }
        }
        #[inline(always)]
        unsafe fn add_i(a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn sub_i(a: __m512i, v: i32) -> __m512i {
            unsafe { _mm512_sub_epi32(a, _mm512_set1_epi32(v)) }
        }
        #[inline(always)]
        unsafe fn load_w(p: *const u8) -> __m512i {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn low_nibbles(w: __m512i) -> __m512i {
            unsafe { _mm512_and_si512(w, _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        unsafe fn high_nibbles(w: __m512i) -> __m512i {
            unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(w), _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        unsafe fn dot_u4(acc: __m512i, w: __m512i, a: i32) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a)) }
        }
        #[inline(always)]
        unsafe fn prepare_i8(w: __m512i) -> __m512i {
            unsafe { _mm512_xor_si512(w, _mm512_set1_epi8(-128)) }
        }
        #[inline(always)]
        unsafe fn dot_i8(acc: __m512i, w: __m512i, a: i32) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a)) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// The instruction set that kernels run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The best set of this CPU.
    pub(crate) fn detect() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni");
            if avx512 {
                return Level::Avx512;
            }
            if avx2 {
                return Level::Avx2;
            }
        }
        Level::Portable
    }

    /// All sets that this CPU can run, worst first.
    pub(crate) fn available() -> Vec<Level> {
        #[cfg(target_arch = "x86_64")]
        {
            match Level::detect() {
                Level::Avx512 => vec![Level::Portable, Level::Avx2, Level::Avx512],
                Level::Avx2 => vec![Level::Portable, Level::Avx2],
                Level::Portable => vec![Level::Portable],
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![Level::Portable]
    }
}

/// Defines `$name(level, args…)`, which runs `$body::<I>(args…)` compiled for the level's instruction set.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $vis unsafe fn $name(level: $crate::cpu::isa::Level, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: compiled with the features of `Avx2`; the caller keeps the rest of the rule.
                unsafe { $body::<$crate::cpu::isa::Avx2>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: as above for `Avx512`.
                unsafe { $body::<$crate::cpu::isa::Avx512>($($arg),*) }
            }
            match level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Level` is made by detection, so the features are there.
                $crate::cpu::isa::Level::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::cpu::isa::Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: needs no features.
                $crate::cpu::isa::Level::Portable => unsafe { $body::<$crate::cpu::isa::Portable>($($arg),*) },
            }
        }
    };
}
pub(crate) use dispatch;
