//! How a bundle stores trained weights: in BF16, or its matrices in 8 bits ([`mxint8`]).
//!
//! Whatever reads a bundle's weights reads them widened, in BF16, which holds the values of the 8 bits exactly: check, probe,
//! exports and decoding see one draft.

use std::collections::BTreeMap;

use draftsmith_formats::mxint8;
use draftsmith_formats::run::BundleWeights;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, SafetensorsError, TensorData, to_bytes};
use draftsmith_model::DraftTensors;
use serde_json::{Map, Value, json};

use crate::Problem;

/// Under which key `config.json` says it, where engines look before they take codes for weights.
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

/// The values that a reader of the file finds.
///
/// # Errors
/// None for tensors of a draft: what is written here can be read.
pub(crate) fn round(draft: &mut DraftTensors, form: BundleWeights) -> Result<(), SafetensorsError> {
    let stored: Vec<TensorData> =
        draft.iter().flat_map(|(name, (shape, values))| tensors(name, shape, values, form)).collect();
    let file = mxint8::widened(SafetensorsDir::from_bytes("", to_bytes(&stored, &BTreeMap::new()))?)?;
    for (name, (_, values)) in draft {
        *values = file.get(name)?.to_f32()?;
    }
    Ok(())
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
