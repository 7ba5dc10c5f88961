//! How a bundle stores trained weights: in BF16, or its matrices in 8 bits ([`mxint8`]).
//!
//! Whatever reads a bundle's weights reads them widened, in BF16, which holds the values of the 8 bits exactly: check, probe,
//! exports and decoding see one draft.

use draftsmith_formats::mxint8;
use draftsmith_formats::run::BundleWeights;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData};
use serde_json::{Map, Value, json};

use crate::Problem;

/// Under which key `config.json` says it. Engines know the key and refuse a method that they do not know, where they would
/// take codes for weights without it.
const DECLARED: &str = "quantization_config";
/// The method there, and the type in `bundle.json`.
const MXINT8: &str = "mxint8";

/// The type of the weights as `bundle.json` has it.
pub(crate) fn name(form: BundleWeights) -> &'static str {
    match form {
        BundleWeights::Bf16 => "bfloat16",
        BundleWeights::Mxint8 => MXINT8,
    }
}

/// The form of that name; what is not known is told by the check.
pub(crate) fn named(name: &str) -> BundleWeights {
    if name == MXINT8 { BundleWeights::Mxint8 } else { BundleWeights::Bf16 }
}

/// Says in `config.json` what engines must not take for weights.
pub(crate) fn declare(config: &mut Value, form: BundleWeights) {
    if let (BundleWeights::Mxint8, Some(object)) = (form, config.as_object_mut()) {
        object.insert(DECLARED.into(), json!({ "quant_method": MXINT8, "group_size": mxint8::BLOCK }));
    }
}

/// A trained tensor as the file has it.
pub(crate) fn tensors(name: &str, shape: &[usize], values: &[f32], form: BundleWeights) -> Vec<TensorData> {
    match form {
        BundleWeights::Mxint8 if mxint8::fits(shape) => mxint8::narrow(name, shape, values).into(),
        _ => vec![TensorData::bf16(name, shape, values)],
    }
}

/// The values that are left of a trained tensor in the file.
pub(crate) fn rounded(shape: &[usize], values: &[f32], form: BundleWeights) -> Vec<f32> {
    match form {
        BundleWeights::Mxint8 if mxint8::fits(shape) => mxint8::rounded(shape, values),
        _ => {
            let stored = TensorData::bf16("", shape, values);
            let upper = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            stored.bytes.chunks_exact(2).map(upper).collect()
        }
    }
}

/// Who loads the folder as it is.
pub(crate) fn readers(form: BundleWeights) -> &'static str {
    match form {
        BundleWeights::Bf16 => "SGLang and vLLM",
        BundleWeights::Mxint8 => "draftsmith; engines load an export",
    }
}

/// The type of the weights as `config.json` declares it, in the words of `bundle.json`.
pub(crate) fn declared(config: &Map<String, Value>) -> String {
    match config.get(DECLARED) {
        None => name(BundleWeights::Bf16).to_owned(),
        Some(table) => table["quant_method"].as_str().map_or_else(|| table.to_string(), str::to_owned),
    }
}

/// Matrices that lie in the file in another form than the bundle says.
pub(crate) fn problems(weights: &SafetensorsDir, form: BundleWeights) -> Vec<Problem> {
    let (wanted, other) = match form {
        BundleWeights::Bf16 => ("BF16", Dtype::I8),
        BundleWeights::Mxint8 => ("I8", Dtype::BF16),
    };
    let matrices = weights.names().filter_map(|name| weights.find(name)).filter(|t| mxint8::fits(t.shape));
    matrices
        .filter(|tensor| tensor.dtype == other)
        .map(|tensor| Problem::TensorDtype {
            name: tensor.name.to_owned(),
            wanted,
            found: format!("{:?}", tensor.dtype),
        })
        .collect()
}
