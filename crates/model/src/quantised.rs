//! Folders whose weights are quantised: AWQ, GPTQ, FP8 and compressed-tensors are read, the others named for what they
//! are.
//!
//! Configuration and tensors each say it in their own way, and either may be silent: `config.json` names a method for
//! weights that are plain (read as they are), older folders have the tensors of a method and no word about it.

use std::path::Path;

use draftsmith_formats::hf_config::{HfConfig, HfConfigError};
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, SafetensorsError};

use draftsmith_kernels::{WeightView, quant};

use crate::ModelError;

mod pattern;
mod scheme;
mod weights;

pub(crate) use scheme::Scheme;
pub(crate) use weights::Found;

/// Makers who publish quantised repositories beside their own originals, under the same name and a suffix.
const MAKERS: [&str; 13] = [
    "Qwen",
    "google",
    "meta-llama",
    "mistralai",
    "HuggingFaceTB",
    "microsoft",
    "allenai",
    "ibm-granite",
    "deepseek-ai",
    "zai-org",
    "nvidia",
    "LiquidAI",
    "openai",
];
/// Endings that name a quantisation, in lower case and without the dash.
const SUFFIXES: [&str; 14] = [
    "awq",
    "gptq",
    "gptq-int4",
    "gptq-int8",
    "fp8",
    "fp8-dynamic",
    "fp8-kv",
    "bnb-4bit",
    "bnb-8bit",
    "int4",
    "int8",
    "w4a16",
    "w8a8",
    "hqq",
];

/// The method that a configuration names, in people's spelling; `None` if it names no quantisation.
pub(crate) fn configured(root: &HfConfig, folder: &Path) -> Result<Option<String>, HfConfigError> {
    let mut tables = vec![root.find_table("quantization_config")?, root.find_table("compression_config")?];
    if let Some(nested) = root.find_table("text_config")? {
        tables.push(nested.find_table("quantization_config")?);
    }
    if let Some(table) = tables.into_iter().flatten().next() {
        return Ok(Some(method_of(&table)?));
    }
    // Files of older tools, which leave `config.json` alone.
    let beside = [
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
        ("hf_quant_config.json", "ModelOpt"),
    ];
    Ok(beside.iter().find(|(file, _)| folder.join(file).is_file()).map(|(_, name)| (*name).to_owned()))
}

fn method_of(table: &HfConfig) -> Result<String, HfConfigError> {
    let has = |key: &str| table.get(key).is_some();
    let method = match table.find_str("quant_method")? {
        Some(method) => method.to_owned(),
        // Some tools leave the name out; their other keys tell them apart.
        None if has("load_in_4bit") || has("load_in_8bit") => "bitsandbytes".into(),
        None if has("config_groups") => "compressed-tensors".into(),
        None if has("quant_algo") => "modelopt".into(),
        None if has("desc_act") => "gptq".into(),
        None if has("w_bit") || has("zero_point") => "awq".into(),
        None => String::new(),
    };
    Ok(match method.as_str() {
        "awq" => "AWQ".into(),
        "gptq" => "GPTQ".into(),
        "fp8" => "FP8".into(),
        "fbgemm_fp8" => "FP8 (fbgemm)".into(),
        "mxfp4" => "MXFP4".into(),
        "hqq" => "HQQ".into(),
        "aqlm" => "AQLM".into(),
        "eetq" => "EETQ".into(),
        "exl2" => "EXL2".into(),
        "exl3" => "EXL3".into(),
        "vptq" => "VPTQ".into(),
        "spqr" => "SpQR".into(),
        "higgs" => "HIGGS".into(),
        "quanto" => "Quanto".into(),
        "modelopt" => "ModelOpt".into(),
        "" => "a method that `quantization_config` does not name".into(),
        // `compressed-tensors`, `bitsandbytes`, `torchao`, and those to come, as they spell themselves.
        other => other.into(),
    })
}

/// The method that the tensors of a folder show; `None` if all of them are plain.
pub(crate) fn shown(dir: &SafetensorsDir) -> Option<&'static str> {
    let any = |end: &str| dir.names().any(|name| name.ends_with(end));
    if any(".qweight") {
        // Both pack to 32-bit integers; only GPTQ says in which order the inputs were taken.
        return Some(if any(".g_idx") { "GPTQ" } else { "AWQ or GPTQ" });
    }
    let signs = [
        (".weight_scale_inv", "FP8 with scales per block"),
        (".weight_packed", "compressed-tensors"),
        (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes (NF4)"),
        (".weight.quant_state.bitsandbytes__fp4", "bitsandbytes (FP4)"),
        (".weight.absmax", "bitsandbytes"),
        (".SCB", "bitsandbytes (8 bits)"),
        (".W_q", "HQQ"),
        (".codebooks", "AQLM"),
        (".q_weight", "EXL2"),
        (".trellis", "EXL3"),
        (".weight_scales", "EETQ"),
        (".weight_scale_2", "ModelOpt (FP4)"),
        ("_proj_blocks", "MXFP4"),
        (".weight._data", "Quanto"),
    ];
    if let Some((_, name)) = signs.into_iter().find(|(end, _)| any(end)) {
        return Some(name);
    }
    let weights = |wanted: &[Dtype]| {
        dir.names()
            .filter(|name| name.ends_with(".weight"))
            .filter_map(|name| dir.find(name))
            .any(|tensor| wanted.contains(&tensor.dtype))
    };
    if weights(&[Dtype::F8_E4M3, Dtype::F8_E5M2]) || any(".weight_scale") && !weights(&[Dtype::I8]) {
        return Some("FP8");
    }
    if weights(&[Dtype::I8, Dtype::U8]) {
        return Some("8-bit integers");
    }
    if any(".k_scale") || any(".v_scale") || any(".kv_scale") {
        return Some("scales for FP8 keys and values");
    }
    None
}

/// A quantised layer of a folder, as it will run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantisedLayer {
    /// Its largest tensor: the numbers.
    pub tensor: String,
    /// `[outputs, inputs]`
    pub shape: [usize; 2],
    /// In what form it runs.
    pub form: &'static str,
}

/// The quantised layers of a folder in safetensors form; none for any other path, or for a method that is not read.
///
/// # Errors
/// What loading the folder would refuse about them.
pub fn quantised_layers(path: &Path) -> Result<Vec<QuantisedLayer>, ModelError> {
    if !path.join("config.json").is_file() {
        return Ok(Vec::new());
    }
    let Some(scheme) = Scheme::read(&HfConfig::open(path)?, Some(path))? else { return Ok(Vec::new()) };
    let dir = match SafetensorsDir::open(path) {
        Ok(dir) => dir,
        Err(SafetensorsError::NoWeights { .. }) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let layer =
        |found: Found<'_>| QuantisedLayer { form: found.form(), shape: found.shape, tensor: found.main };
    found_in(&scheme, &dir).map(|found| found.map(layer)).collect()
}

/// The quantised weights of an opened folder as f32, row-major, by the names of their largest tensors; none where
/// `config.json` names no method that is read.
///
/// # Errors
/// What loading the folder would refuse about them.
pub fn quantised_values(
    root: &HfConfig,
    dir: &SafetensorsDir,
) -> Result<Vec<(String, Vec<f32>)>, ModelError> {
    let Some(scheme) = Scheme::read(root, None)? else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for found in found_in(&scheme, dir) {
        let found = found?;
        let [out_features, in_features] = found.shape;
        let data = found.rows();
        let view = WeightView { dtype: found.dtype, out_features, in_features, data: &data };
        let checked = view.check(&found.main);
        checked.map_err(|source| ModelError::Kernel { place: scheme.place.clone(), source })?;
        let values = in_input_order(quant::dequantize(&view), in_features, found.order.as_deref());
        all.push((found.main, values));
    }
    Ok(all)
}

/// All quantised layers of a folder.
fn found_in<'a>(
    scheme: &'a Scheme,
    dir: &'a SafetensorsDir,
) -> impl Iterator<Item = Result<Found<'a>, ModelError>> {
    dir.names().filter_map(move |name| {
        let layer =
            [".qweight", ".weight_packed", ".weight"].iter().find_map(|end| name.strip_suffix(end))?;
        let found = Found::new(scheme, dir, layer).transpose()?;
        match found {
            Ok(found) if found.main != name => None,
            found => Some(found),
        }
    })
}

/// Rows whose columns stand in another order, in the order of the inputs.
pub(crate) fn in_input_order(mut values: Vec<f32>, inputs: usize, order: Option<&[u32]>) -> Vec<f32> {
    if let Some(order) = order {
        for row in values.chunks_exact_mut(inputs.max(1)) {
            let columns = row.to_vec();
            order.iter().zip(columns).for_each(|(input, v)| row[*input as usize] = v);
        }
    }
    values
}

/// What to use in place of a quantised model.
pub(crate) fn advice(place: &str) -> String {
    let gguf = "or a GGUF file of it";
    let Some((maker, name)) = name_of(place) else {
        return format!("use the model that it was made from, {gguf}");
    };
    let lower = name.to_ascii_lowercase();
    let plain = SUFFIXES
        .iter()
        .filter(|end| lower.ends_with(&format!("-{end}")))
        .map(|end| &name[..name.len() - end.len() - 1])
        .min_by_key(|plain| plain.len());
    match (maker, plain) {
        (Some(maker), Some(plain)) if MAKERS.contains(&maker) => {
            format!("use the original, `hf:{maker}/{plain}`, {gguf}")
        }
        (_, Some(plain)) => format!("use the original `{plain}` of its makers, {gguf}"),
        (_, None) => format!("use the model that it was made from, {gguf}"),
    }
}

/// Maker and name of the repository that a folder holds: from the hub cache's layout, or the folder's own name.
fn name_of(place: &str) -> Option<(Option<&str>, &str)> {
    let parts: Vec<&str> = place.split(['/', '\\']).filter(|part| !part.is_empty()).collect();
    if let Some(repository) = parts.iter().rev().find_map(|part| part.strip_prefix("models--")) {
        let (maker, name) = repository.split_once("--")?;
        return Some((Some(maker), name));
    }
    parts.last().map(|name| (None, *name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_original_is_only_named_where_its_name_is_certain() {
        for (place, wanted) in [
            ("/h/models--Qwen--Qwen2.5-7B-Instruct-AWQ/snapshots/0a", "`hf:Qwen/Qwen2.5-7B-Instruct`"),
            ("/h/models--Qwen--Qwen2.5-7B-Instruct-GPTQ-Int4/snapshots/0a", "`hf:Qwen/Qwen2.5-7B-Instruct`"),
            ("/h/models--TheBloke--Llama-2-7B-GPTQ/snapshots/0a", "the original `Llama-2-7B` of its makers"),
            ("models/Qwen3-8B-FP8", "the original `Qwen3-8B` of its makers"),
            ("models/m", "the model that it was made from, or a GGUF"),
            ("models/m/", "the model that it was made from, or a GGUF"),
        ] {
            assert!(advice(place).contains(wanted), "{place}: {}", advice(place));
        }
    }

    #[test]
    fn methods_are_named_as_people_spell_them() {
        for (text, wanted) in [
            (r#"{"quantization_config": {"quant_method": "awq", "bits": 4}}"#, "AWQ"),
            (r#"{"quantization_config": {"quant_method": "compressed-tensors"}}"#, "compressed-tensors"),
            (r#"{"quantization_config": {"quant_method": "new-one"}}"#, "new-one"),
            (r#"{"quantization_config": {"load_in_4bit": true}}"#, "bitsandbytes"),
            (r#"{"quantization_config": {"bits": 4, "desc_act": false}}"#, "GPTQ"),
            (r#"{"compression_config": {"config_groups": {}}}"#, "compressed-tensors"),
            (r#"{"text_config": {"quantization_config": {"quant_method": "fp8"}}}"#, "FP8"),
            (r#"{"quantization_config": {}}"#, "a method that `quantization_config` does not name"),
        ] {
            let config = HfConfig::parse(Path::new("config.json"), text.as_bytes()).unwrap();
            let found = configured(&config, Path::new("nowhere")).unwrap();
            assert_eq!(found.as_deref(), Some(wanted), "{text}");
        }
        let plain = HfConfig::parse(Path::new("c"), br#"{"quantization_config": null}"#).unwrap();
        assert_eq!(configured(&plain, Path::new("nowhere")).unwrap(), None);
    }
}
