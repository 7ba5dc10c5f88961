//! The coarse operations of [`draftsmith_kernels`] on burn tensors: one implementation for every device that burn
//! knows.
//!
//! The code never asks which device it runs on, so its tests run on burn's CPU backend (flex). There is no autograd:
//! every gradient is written out, as in the CPU implementation, and compared with the same formulas
//! ([`draftsmith_kernels::testing`]).
//!
//! # What is promised, and what is not
//! Values agree with the CPU implementation within rounding. The bit-for-bit half of the kernel contract is *not*
//! promised: a device may choose another product kernel, with another order of its sums, for another number of rows.
//! So what is decoded here is right, but two runs with different batches may differ where two tokens are nearly
//! equal. Decoding that must be provably lossless stays on the CPU implementation.
//!
//! Quantised weights are unpacked to [`Storage`] when they are packed, whatever the mode asks for, and activations
//! are not rounded to 8 bits: results are nearer to the full-precision model than those of the CPU, not equal to them.
//!
//! # Devices
//! Whatever wgpu reaches, with the feature `wgpu`: Vulkan, Metal, Direct3D 12, by shaders in WGSL. (burn's own way to Vulkan, by
//! SPIR-V, ends in a crash inside Mesa's software driver; WGSL runs there.) That is where the tests of that feature run: no
//! part of this crate has run on a GPU so far. WGSL knows no bf16. For NVIDIA's cards there is the crate `cuda`: burn 0.22.1 fetches an LLVM from the
//! network while it builds for CUDA.
//!
//! Shape legend: `R` rows, `I`/`O` input and output features, `S` slots.

mod attention;
mod buf;
mod device;
mod infer;
mod spans;
mod storage;
mod token_loss;
mod train;

pub use buf::{Buf, Packed};
pub use device::{Accelerator, DeviceError};
pub use infer::KvLayer;
pub use storage::Storage;

use burn_tensor::{Bool, DType, Device, FloatDType, Int, Tensor, TensorData};

/// Settings of a [`Gpu`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuOptions {
    /// How values are stored.
    pub storage: Storage,
}

/// The operations on one device.
#[derive(Clone, Debug)]
pub struct Gpu {
    device: Device,
    storage: FloatDType,
}

impl Gpu {
    /// The operations on a device that stores values so ([`Accelerator::stores`]).
    pub fn new(accelerator: Accelerator, options: GpuOptions) -> Gpu {
        Gpu { device: accelerator.0, storage: options.storage.dtype() }
    }

    /// Host values on the device, as f32.
    fn floats(&self, values: &[f32]) -> Tensor<1> {
        Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (&self.device, DType::F32))
    }

    /// Row numbers on the device.
    fn indices(&self, rows: &[u32]) -> Tensor<1, Int> {
        let values: Vec<i32> = rows.iter().map(|r| *r as i32).collect();
        Tensor::from_data(TensorData::new(values, [rows.len()]), &self.device)
    }

    fn zeros(&self, len: usize) -> Tensor<1> {
        Tensor::zeros([len], (&self.device, DType::F32))
    }

    /// Per row of `[R, C]` the largest value `[R, 1]` and its column `[R, 1]`, the first among equals; NaN never wins.
    fn first_largest(&self, z: Tensor<2>) -> (Tensor<2>, Tensor<2, Int>) {
        let [rows, cols] = z.dims();
        let nan = z.clone().is_nan();
        let z = z.mask_fill(nan, f32::NEG_INFINITY);
        let top = z.clone().max_dim(1);
        let smaller: Tensor<2, Bool> = z.lower(top.clone().expand([rows, cols]));
        let ids = Tensor::<1, Int>::arange(0..cols as i64, &self.device).reshape([1, cols]);
        let first = ids.expand([rows, cols]).mask_fill(smaller, cols as i32).min_dim(1);
        (top, first)
    }

    /// A product of operands rounded to the storage type; its terms are summed in f32, and so is the result.
    fn product<const D: usize>(&self, a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
        let rounded = |t: Tensor<D>| t.cast(self.storage).cast(FloatDType::F32);
        rounded(a).matmul(rounded(b))
    }
}
