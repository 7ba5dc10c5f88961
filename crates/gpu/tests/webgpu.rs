//! On a GPU or a driver that computes on the CPU.
#![cfg(feature = "webgpu")]

use draftsmith_gpu::{Accelerator, Gpu, GpuOptions, Storage};
use draftsmith_kernels::testing;

fn gpu() -> Gpu {
    for g in Accelerator::gpus() {
        println!("{}", g.name());
    }
    Gpu::new(Accelerator::software(), GpuOptions { storage: Storage::F32 })
}

#[test]
fn webgpu_decoding_operations_equal_the_reference() {
    testing::infer::all(&gpu(), 1e-5, 1e-5);
}

#[test]
fn webgpu_training_operations_equal_the_formulas() {
    testing::train::all(&gpu(), 1e-5);
}
