//! The device-neutral code on burn's CPU backend, against the checks that every implementation must pass.

use draftsmith_gpu::{Accelerator, Gpu, GpuOptions, Storage};
use draftsmith_kernels::testing;

/// What a bf16 of 8 significant bits loses in operands and results.
const BF16: f64 = 2e-2;

fn flex(storage: Storage) -> Gpu {
    Gpu::new(Accelerator::flex(), GpuOptions { storage })
}

#[test]
fn decoding_operations_equal_the_reference() {
    testing::infer::all(&flex(Storage::F32), 0.0, 1e-6);
}

#[test]
fn training_operations_equal_the_formulas_and_their_gradients_the_difference_quotients() {
    testing::train::all(&flex(Storage::F32), 0.0);
}

#[test]
fn decoding_operations_in_bf16_equal_the_reference_within_its_rounding() {
    testing::infer::all(&flex(Storage::Bf16), BF16, BF16);
}

#[test]
fn training_operations_in_bf16_equal_the_formulas_within_its_rounding() {
    testing::train::all(&flex(Storage::Bf16), BF16);
}
