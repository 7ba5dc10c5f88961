//! The device-neutral code on burn's CPU backend, against the checks that every implementation must pass.

use draftsmith_gpu::{Accelerator, Gpu, GpuOptions, Storage};
use draftsmith_kernels::train::{LinearShape, TrainKernels};
use draftsmith_kernels::{Kernels, Memory, PackMode, WeightView, testing};

/// What a bf16 of 8 significant bits loses in operands and stored results.
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

#[test]
fn in_bf16_the_terms_of_a_product_are_summed_in_f32() {
    let gpu = flex(Storage::Bf16);
    // Both operands are numbers of bf16, and their sum, 1 + 2^-9, is none: rounded, it would be 1.
    let small = 2f32.powi(-9);
    let shape = LinearShape { rows: 2, out: 1, inp: 1 };
    let (dy, x) = (gpu.upload(&[1.0, small]), gpu.upload(&[1.0, 1.0]));
    let mut dw = gpu.zeros(1);
    for batches in 1..=4u8 {
        gpu.linear_dw(&dy, &x, shape, &mut dw);
        let mut found = [0.0];
        gpu.download(&dw, 0, &mut found);
        assert_eq!(
            found[0],
            f32::from(batches) * (1.0 + small),
            "the gradient after {batches} micro-batches"
        );
    }
    // Two logits that differ by as little: the larger one is the arg-max, wherever it stands.
    for (rows, best) in [([[1.0, 0.0], [1.0, small]], 1), ([[1.0, small], [1.0, 0.0]], 0)] {
        let head = gpu.pack("head", &WeightView::f32(rows.as_flattened(), 2, 2), PackMode::F32).unwrap();
        assert_eq!(gpu.argmax(&gpu.upload(&[1.0, 1.0]), 1, &head), [best]);
    }
    // What is stored in bf16 is rounded when it is stored, once.
    let (x, w) = (gpu.upload(&[1.0, 1.0]), gpu.upload(&[1.0, small]));
    let mut y = gpu.zeros(1);
    gpu.linear(&x, &w, LinearShape { rows: 1, out: 1, inp: 2 }, &mut y);
    let mut found = [0.0];
    gpu.download(&y, 0, &mut found);
    assert_eq!(found[0], 1.0);
}
