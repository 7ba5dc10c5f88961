//! NEON with the dot-product instructions of ARMv8.2: four registers per 16 lanes.
//!
//! Conversions from f16 and the dot product are written as assembly, their intrinsics being unstable. Without such a
//! machine the tests run under `qemu-aarch64 -L /usr/aarch64-linux-gnu` as cargo's runner for
//! `aarch64-unknown-linux-gnu`, linked by `aarch64-linux-gnu-gcc`.
#![allow(
    unused_unsafe,
    clippy::undocumented_unsafe_blocks,
    reason = "intrinsics of the base set are safe in newer compilers; the module rule of `isa` covers all blocks"
)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::dot::Dot;
use super::isa::{Isa, Lanes, Portable};

/// NEON and dot products.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

impl Isa for Neon {
    type F = ((float32x4_t, float32x4_t), (float32x4_t, float32x4_t));
    const SCORE_BLOCKS: usize = 1;
    const MIX_COLUMNS: usize = 1;
}

impl Lanes for float32x4_t {
    const COUNT: usize = 4;

    #[inline(always)]
    unsafe fn splat(v: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(v) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> float32x4_t {
        unsafe { p.cast::<float32x4_t>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> float32x4_t {
        unsafe {
            let bits = p.cast::<uint16x4_t>().read_unaligned();
            let out: float32x4_t;
            asm!("fcvtl {o:v}.4s, {i:v}.4h", o = out(vreg) out, i = in(vreg) bits, options(pure, nomem, nostack));
            out
        }
    }
    #[inline(always)]
    unsafe fn load_f8(p: *const u8) -> float32x4_t {
        unsafe {
            // The sign is drawn out over the new bit of the exponent, which is then cleared.
            let bytes = vcreate_s8(u64::from(p.cast::<u32>().read_unaligned()));
            let wide = vshlq_n_s16::<7>(vmovl_s8(bytes));
            let bits = vand_u16(vget_low_u16(vreinterpretq_u16_s16(wide)), vdup_n_u16(0xbfff));
            let out: float32x4_t;
            asm!("fcvtl {o:v}.4s, {i:v}.4h", o = out(vreg) out, i = in(vreg) bits, options(pure, nomem, nostack));
            out
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> float32x4_t {
        unsafe {
            let bits = vmovl_u16(p.cast::<uint16x4_t>().read_unaligned());
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: float32x4_t) {
        unsafe { p.cast::<float32x4_t>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
}

/// Adds four signed products to each of four sums.
#[inline(always)]
unsafe fn dot_fours(acc: int32x4_t, w: int8x16_t, a: *const i8) -> int32x4_t {
    unsafe {
        let a = vdupq_n_s32(a.cast::<i32>().read_unaligned());
        let mut acc = acc;
        asm!(
            ".arch_extension dotprod",
            "sdot {acc:v}.4s, {w:v}.16b, {a:v}.16b",
            acc = inout(vreg) acc,
            w = in(vreg) w,
            a = in(vreg) a,
            options(pure, nomem, nostack)
        );
        acc
    }
}

impl Dot for Neon {
    const ROWS: usize = 8;
    const BIAS8: i32 = 0;
    const NARROW: bool = false;
    type V = float32x4_t;
    type I = int32x4_t;
    type Sum4 = int32x4_t;
    type W = uint8x16_t;
    type W8 = int8x16_t;

    #[inline(always)]
    unsafe fn zero_i() -> int32x4_t {
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn splat_i(v: *const i32) -> int32x4_t {
        unsafe { vld1q_dup_s32(v) }
    }
    #[inline(always)]
    unsafe fn to_f(v: int32x4_t) -> float32x4_t {
        unsafe { vcvtq_f32_s32(v) }
    }
    #[inline(always)]
    unsafe fn bits_f(v: int32x4_t) -> float32x4_t {
        unsafe { vreinterpretq_f32_s32(v) }
    }
    #[inline(always)]
    unsafe fn sub(a: int32x4_t, v: i32) -> int32x4_t {
        unsafe { vsubq_s32(a, vdupq_n_s32(v)) }
    }
    #[inline(always)]
    unsafe fn and(a: int32x4_t, mask: i32) -> int32x4_t {
        unsafe { vandq_s32(a, vdupq_n_s32(mask)) }
    }
    #[inline(always)]
    unsafe fn or(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        unsafe { vorrq_s32(a, b) }
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(a: int32x4_t) -> int32x4_t {
        unsafe {
            // A shift to the left by a negative number goes to the right.
            let shift = vdupq_n_s32(-(N as i32));
            vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), shift))
        }
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(a: int32x4_t) -> int32x4_t {
        unsafe { vshlq_s32(a, vdupq_n_s32(N as i32)) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> int32x4_t {
        unsafe {
            let four = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
            vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four))))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> int32x4_t {
        unsafe {
            let four = vcreate_s8(u64::from(p.cast::<u32>().read_unaligned()));
            vmovl_s16(vget_low_s16(vmovl_s8(four)))
        }
    }
    #[inline(always)]
    unsafe fn load_w(p: *const u8) -> uint8x16_t {
        unsafe { p.cast::<uint8x16_t>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn bits(w: uint8x16_t, shift: i32, mask: u8) -> uint8x16_t {
        unsafe { vandq_u8(vshlq_u8(w, vdupq_n_s8(-shift as i8)), vdupq_n_u8(mask)) }
    }
    #[inline(always)]
    unsafe fn or_w(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
        unsafe { vorrq_u8(a, b) }
    }
    #[inline(always)]
    unsafe fn flip(w: uint8x16_t) -> uint8x16_t {
        unsafe { veorq_u8(w, vdupq_n_u8(0x80)) }
    }
    #[inline(always)]
    unsafe fn table(w: uint8x16_t, table: &[u8; 16]) -> uint8x16_t {
        unsafe { vqtbl1q_u8(Self::load_w(table.as_ptr()), w) }
    }
    #[inline(always)]
    unsafe fn zero4() -> int32x4_t {
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn open4(acc: int32x4_t) -> (int32x4_t, int32x4_t) {
        unsafe { (acc, Self::zero_i()) }
    }
    #[inline(always)]
    unsafe fn dot4(acc: int32x4_t, w: uint8x16_t, a: *const i8) -> int32x4_t {
        // Weights are at most 63.
        unsafe { dot_fours(acc, vreinterpretq_s8_u8(w), a) }
    }
    #[inline(always)]
    unsafe fn add4(acc: int32x4_t, sum: int32x4_t) -> int32x4_t {
        unsafe { vaddq_s32(acc, sum) }
    }
    #[inline(always)]
    unsafe fn signed(w: uint8x16_t) -> int8x16_t {
        unsafe { vreinterpretq_s8_u8(w) }
    }
    #[inline(always)]
    unsafe fn dot8(acc: int32x4_t, w: int8x16_t, a: *const i8) -> int32x4_t {
        unsafe { dot_fours(acc, w, a) }
    }
    #[inline(always)]
    unsafe fn quantize(x: *const f32, q: *mut i8) -> (f32, [i32; 2]) {
        unsafe { Portable::quantize(x, q) }
    }
}
