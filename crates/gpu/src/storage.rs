//! How values are stored.

use burn_tensor::FloatDType;

/// How activations, their gradients and packed weights are stored, and what the operands of products are rounded to.
/// Trained weights, their gradients, optimiser moments and all sums are f32 either way.
///
/// burn gives a product the type of its operands, so a product of bf16 would be rounded to it before anything is added
/// to it, or compared: 8 bits of a weight's gradient, of a logit. So rounded operands are widened again and multiplied
/// in f32, where the product of two bf16 is exact. That leaves the tensor cores' bf16 unused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// Full precision.
    #[default]
    F32,
    /// Half the memory of what is stored.
    Bf16,
}

impl Storage {
    pub(crate) fn dtype(self) -> FloatDType {
        match self {
            Storage::F32 => FloatDType::F32,
            Storage::Bf16 => FloatDType::BF16,
        }
    }
}
