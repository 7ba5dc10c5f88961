//! Sixteen f32 lanes on several instruction sets.
//!
//! Every operation is lane-wise IEEE arithmetic with fused multiply-add, so all give the same bits. Kernels are written once over [`Isa`] and compiled per set by [`dispatch!`].
//!
//! Safety rule of the module: a `Lanes` method may be called only inside a function compiled with that set's
//! target features on a CPU that has them; pointers must be valid for the lanes (or bytes) read or written.

/// f32 numbers side by side in registers.
pub(crate) trait Lanes: Copy {
    /// How many.
    const COUNT: usize;

    unsafe fn splat(v: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn load_f16(p: *const u16) -> Self;
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// 8-bit floats (E4M3), none of them NaN, divided by 256: their bits shifted into those of an f16.
    unsafe fn load_f8(p: *const u8) -> Self;
    unsafe fn store(p: *mut f32, v: Self);
    /// `a * b + c` with one rounding.
    unsafe fn fma(a: Self, b: Self, c: Self) -> Self;
    unsafe fn mul(a: Self, b: Self) -> Self;

    /// Writes the lanes that exist: the first `count` of them, or all.
    #[inline(always)]
    unsafe fn store_first(p: *mut f32, count: usize, v: Self) {
        if count >= Self::COUNT {
            // SAFETY: all lanes exist.
            unsafe { Self::store(p, v) };
        } else {
            let mut buffer = [0.0f32; 16];
            // SAFETY: no set has more than 16 lanes; `p` has `count` values.
            unsafe {
                Self::store(buffer.as_mut_ptr(), v);
                std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, count);
            }
        }
    }
}

/// Two registers as one of twice the lanes.
impl<T: Lanes> Lanes for (T, T) {
    const COUNT: usize = 2 * T::COUNT;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: module rule, here and below.
        unsafe { (T::splat(v), T::splat(v)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        unsafe { (T::load(p), T::load(p.add(T::COUNT))) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: as above.
        unsafe { (T::load_f16(p), T::load_f16(p.add(T::COUNT))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: as above.
        unsafe { (T::load_bf16(p), T::load_bf16(p.add(T::COUNT))) }
    }
    #[inline(always)]
    unsafe fn load_f8(p: *const u8) -> Self {
        // SAFETY: as above.
        unsafe { (T::load_f8(p), T::load_f8(p.add(T::COUNT))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self) {
        // SAFETY: as above.
        unsafe {
            T::store(p, v.0);
            T::store(p.add(T::COUNT), v.1);
        }
    }
    #[inline(always)]
    unsafe fn fma(a: Self, b: Self, c: Self) -> Self {
        // SAFETY: as above.
        unsafe { (T::fma(a.0, b.0, c.0), T::fma(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self, b: Self) -> Self {
        // SAFETY: as above.
        unsafe { (T::mul(a.0, b.0), T::mul(a.1, b.1)) }
    }
}

/// An instruction set.
pub(crate) trait Isa: Copy {
    /// 16 x f32.
    type F: Lanes;
    /// Blocks of 16 keys whose scores are in registers together.
    const SCORE_BLOCKS: usize;
    /// Groups of 16 values that are mixed together.
    const MIX_COLUMNS: usize;
}

/// Plain Rust, any CPU.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Isa for Portable {
    type F = [f32; 16];
    const SCORE_BLOCKS: usize = 1;
    const MIX_COLUMNS: usize = 1;
}

impl Lanes for [f32; 16] {
    const COUNT: usize = 16;

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
    unsafe fn load_f8(p: *const u8) -> [f32; 16] {
        // SAFETY: module rule.
        let bits = unsafe { p.cast::<[u8; 16]>().read_unaligned() };
        bits.map(crate::quant::f8_part)
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
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Isa, Lanes};

    /// AVX2 + FMA + F16C: two registers per 16 lanes.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    impl Isa for Avx2 {
        type F = (__m256, __m256);
        const SCORE_BLOCKS: usize = 2;
        const MIX_COLUMNS: usize = 2;
    }

    // SAFETY of all blocks below: the module rule (features present, pointers valid).
    #[expect(clippy::undocumented_unsafe_blocks, reason = "module rule")]
    impl Lanes for __m256 {
        const COUNT: usize = 8;

        #[inline(always)]
        unsafe fn splat(v: f32) -> __m256 {
            unsafe { _mm256_set1_ps(v) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> __m256 {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn load_f8(p: *const u8) -> __m256 {
            unsafe {
                // The sign is drawn out over the new bit of the exponent, which is then cleared.
                let wide = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(_mm_loadl_epi64(p.cast())));
                _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(0xbfffu16 as i16)))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
    }

    /// AVX-512 F/BW/VL/DQ + VNNI.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Isa for Avx512 {
        type F = __m512;
        const SCORE_BLOCKS: usize = 4;
        const MIX_COLUMNS: usize = 4;
    }

    #[expect(clippy::undocumented_unsafe_blocks, reason = "module rule")]
    impl Lanes for __m512 {
        const COUNT: usize = 16;

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
        unsafe fn load_f8(p: *const u8) -> __m512 {
            unsafe {
                // As with AVX2.
                let wide = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
                _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(0xbfffu16 as i16)))
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
    }
}

#[cfg(target_arch = "aarch64")]
pub(crate) use super::neon::Neon;
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
    #[cfg(target_arch = "aarch64")]
    Neon,
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
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            return Level::Neon;
        }
        Level::Portable
    }

    /// All sets that this CPU can run, worst first.
    pub(crate) fn available() -> Vec<Level> {
        match Level::detect() {
            Level::Portable => vec![Level::Portable],
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => vec![Level::Portable, Level::Avx2],
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => vec![Level::Portable, Level::Avx2, Level::Avx512],
            #[cfg(target_arch = "aarch64")]
            Level::Neon => vec![Level::Portable, Level::Neon],
        }
    }
}

/// Bytes ahead of a reader that are asked for: what arrives in the time that memory takes to answer, a few times over.
/// Measured on 4-bit weights: 1024 costs a third of the time of a one-row pass, 4096 to 16384 are alike.
pub(crate) const AHEAD: usize = 8192;

/// Asks for the line `AHEAD` bytes after `p`, which need not exist.
#[inline(always)]
pub(crate) fn prefetch_ahead<T>(p: *const T) {
    prefetch(p.cast::<u8>().wrapping_add(AHEAD));
}

/// Asks for the line at `line`, which need not exist.
#[inline(always)]
pub(crate) fn prefetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is allowed, and every x86-64 CPU has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above, on every aarch64 CPU.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) line, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = line;
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
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon,dotprod")]
            unsafe fn neon($($arg: $ty),*) {
                // SAFETY: as above for `Neon`.
                unsafe { $body::<$crate::cpu::isa::Neon>($($arg),*) }
            }
            match level {
                #[cfg(target_arch = "aarch64")]
                // SAFETY: as below.
                $crate::cpu::isa::Level::Neon => unsafe { neon($($arg),*) },
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
