//! The code as it runs on GPUs, on a graphics driver that computes on the processor (Mesa's llvmpipe, Debian's package
//! `mesa-vulkan-drivers`).
#![cfg(feature = "wgpu")]

use draftsmith_gpu::{Accelerator, Gpu, GpuOptions, Storage};
use draftsmith_kernels::testing;

fn software() -> Gpu {
    Gpu::new(Accelerator::software(), GpuOptions::default())
}

#[test]
fn decoding_operations_in_shaders_equal_the_reference() {
    testing::infer::all(&software(), 1e-5, 1e-5);
}

#[test]
fn training_operations_in_shaders_equal_the_formulas() {
    testing::train::all(&software(), 0.0);
}

#[test]
fn shaders_know_no_bf16() {
    assert!(Accelerator::software().stores(Storage::F32));
    assert!(!Accelerator::software().stores(Storage::Bf16));
}
