//! In what form weights are held: the names of stored types, and the arithmetic that is asked for.

use draftsmith_formats::gguf::GgmlType;
use draftsmith_kernels::{PackMode, WeightDtype};

/// The kernels' name of a GGUF element type; `None` for integers and doubles, which no kernel reads.
pub fn weight_dtype(ggml_type: GgmlType) -> Option<WeightDtype> {
    match ggml_type {
        GgmlType::F32 => Some(WeightDtype::F32),
        GgmlType::F16 => Some(WeightDtype::F16),
        GgmlType::BF16 => Some(WeightDtype::Bf16),
        GgmlType::Q4_0 => Some(WeightDtype::Q4_0),
        GgmlType::Q4_1 => Some(WeightDtype::Q4_1),
        GgmlType::Q5_0 => Some(WeightDtype::Q5_0),
        GgmlType::Q5_1 => Some(WeightDtype::Q5_1),
        GgmlType::Q8_0 => Some(WeightDtype::Q8_0),
        GgmlType::Q2K => Some(WeightDtype::Q2K),
        GgmlType::Q3K => Some(WeightDtype::Q3K),
        GgmlType::Q4K => Some(WeightDtype::Q4K),
        GgmlType::Q5K => Some(WeightDtype::Q5K),
        GgmlType::Q6K => Some(WeightDtype::Q6K),
        GgmlType::IQ2XXS => Some(WeightDtype::Iq2Xxs),
        GgmlType::IQ2XS => Some(WeightDtype::Iq2Xs),
        GgmlType::IQ2S => Some(WeightDtype::Iq2S),
        GgmlType::IQ3XXS => Some(WeightDtype::Iq3Xxs),
        GgmlType::IQ3S => Some(WeightDtype::Iq3S),
        GgmlType::IQ1S => Some(WeightDtype::Iq1S),
        GgmlType::IQ1M => Some(WeightDtype::Iq1M),
        GgmlType::IQ4NL => Some(WeightDtype::Iq4Nl),
        GgmlType::IQ4XS => Some(WeightDtype::Iq4Xs),
        GgmlType::TQ1_0 => Some(WeightDtype::Tq1_0),
        GgmlType::TQ2_0 => Some(WeightDtype::Tq2_0),
        GgmlType::MXFP4 => Some(WeightDtype::Mxfp4),
        GgmlType::NVFP4 => Some(WeightDtype::Nvfp4),
        GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 | GgmlType::F64 => None,
    }
}

/// In which arithmetic a target runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Weights as f32: the specification.
    F32,
    /// Weights as stored: block types by exact integer dot products, floats as floats.
    Stored,
}

impl Precision {
    /// What the kernels make of the weights.
    pub(crate) fn pack_mode(self) -> PackMode {
        match self {
            Precision::F32 => PackMode::F32,
            Precision::Stored => PackMode::Stored,
        }
    }
}
