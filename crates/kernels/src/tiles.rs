//! Tile registers of Intel's CPUs (AMX): whether they may be used, and how they are set up.
//!
//! The instructions are written out where they are used, as the compiler knows neither the registers nor their
//! configuration as values. Nothing that it generates touches them.

use std::arch::asm;
use std::sync::OnceLock;

/// Whether this process may use tile registers, for products of bf16 numbers. Linux hands them out on request only, for all
/// threads at once.
pub(crate) fn is_usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| has_tiles() && is_permitted())
}

/// What the CPU says: tiles, products of bf16 numbers, what AVX-512 adds to that, and a system that saves the registers.
fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const OSXSAVE: u32 = 1 << 27;
    const TILE: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    /// Configuration and data of the tiles.
    const STATES: u64 = 3 << 17;
    #[target_feature(enable = "xsave")]
    fn states() -> u64 {
        // SAFETY: `OSXSAVE` was seen, so the instruction may be used.
        unsafe { _xgetbv(0) }
    }
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let wanted = TILE | BF16;
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    // SAFETY: with `OSXSAVE` there is `xsave`.
    avx512 && __cpuid_count(7, 0).edx & wanted == wanted && unsafe { states() } & STATES == STATES
}

#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the call changes what this process may use and no memory of it; the system clobbers `rcx` and `r11`.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
pub(crate) struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// All eight registers whole: 16 rows of 64 bytes.
    pub(crate) const WHOLE: Config = {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut i = 0;
        while i < 8 {
            (row_bytes[i], rows[i]) = (64, 16);
            i += 1;
        }
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    };

    /// Sets the registers up, and all of them to zero.
    ///
    /// # Safety
    /// Tiles may be used ([`is_usable`]).
    pub(crate) unsafe fn load(&self) {
        // SAFETY: the caller's promise; the configuration is one that the CPU takes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, preserves_flags)) }
    }
}

/// Gives the registers back, so that nobody has to save them.
///
/// # Safety
/// Tiles may be used ([`is_usable`]).
pub(crate) unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
}
