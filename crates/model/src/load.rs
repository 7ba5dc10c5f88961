//! Weights of a target by logical name, from GGUF or safetensors, every tensor accounted for.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use draftsmith_formats::gguf::{GgmlType, GgufFile};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_formats::safetensors_dir::{SafetensorsDir, SafetensorsError};
use draftsmith_kernels::{KernelError, Kernels, PackMode, WeightDtype, WeightView, quant};

use crate::config::{Family, TargetConfig};
use crate::infer::Linear;
use crate::quantised;
use crate::{ModelError, Precision};

/// One tensor of a decoder layer, or of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Embed,
    FinalNorm,
    Head,
    InputNorm,
    Q,
    K,
    V,
    O,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    AttentionPostNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
    MlpPostNorm,
}

impl Part {
    fn gguf(self, layer: usize) -> String {
        let name = match self {
            Part::Embed => return "token_embd.weight".into(),
            Part::FinalNorm => return "output_norm.weight".into(),
            Part::Head => return "output.weight".into(),
            Part::InputNorm => "attn_norm.weight",
            Part::Q => "attn_q.weight",
            Part::K => "attn_k.weight",
            Part::V => "attn_v.weight",
            Part::O => "attn_output.weight",
            Part::QBias => "attn_q.bias",
            Part::KBias => "attn_k.bias",
            Part::VBias => "attn_v.bias",
            Part::QNorm => "attn_q_norm.weight",
            Part::KNorm => "attn_k_norm.weight",
            Part::AttentionPostNorm => "post_attention_norm.weight",
            Part::MlpNorm => "ffn_norm.weight",
            Part::Gate => "ffn_gate.weight",
            Part::Up => "ffn_up.weight",
            Part::Down => "ffn_down.weight",
            Part::MlpPostNorm => "post_ffw_norm.weight",
        };
        format!("blk.{layer}.{name}")
    }

    fn hf(self, layer: usize, family: Family, prefix: &str) -> String {
        let name = match self {
            Part::Embed => return format!("{prefix}embed_tokens.weight"),
            Part::FinalNorm => return format!("{prefix}norm.weight"),
            Part::Head => return "lm_head.weight".into(),
            Part::InputNorm => "input_layernorm.weight",
            Part::Q => "self_attn.q_proj.weight",
            Part::K => "self_attn.k_proj.weight",
            Part::V => "self_attn.v_proj.weight",
            Part::O => "self_attn.o_proj.weight",
            Part::QBias => "self_attn.q_proj.bias",
            Part::KBias => "self_attn.k_proj.bias",
            Part::VBias => "self_attn.v_proj.bias",
            Part::QNorm => "self_attn.q_norm.weight",
            Part::KNorm => "self_attn.k_norm.weight",
            Part::AttentionPostNorm => "post_attention_layernorm.weight",
            Part::MlpNorm if family == Family::Gemma3 => "pre_feedforward_layernorm.weight",
            Part::MlpNorm => "post_attention_layernorm.weight",
            Part::Gate => "mlp.gate_proj.weight",
            Part::Up => "mlp.up_proj.weight",
            Part::Down => "mlp.down_proj.weight",
            Part::MlpPostNorm => "post_feedforward_layernorm.weight",
        };
        format!("{prefix}layers.{layer}.{name}")
    }
}

/// Where packed weights come from while a target is loaded: from packing, or from what was kept of it.
pub trait Packing<P> {
    /// Packs a weight; `name` says which one it is inside the model.
    ///
    /// # Errors
    /// As [`Kernels::pack`].
    fn pack(&self, name: &str, weight: &WeightView<'_>, mode: PackMode) -> Result<P, KernelError>;
}

/// Packs every weight.
pub(crate) struct PackEach<'a, K>(pub(crate) &'a K);

impl<K: Kernels> Packing<K::Packed> for PackEach<'_, K> {
    fn pack(&self, name: &str, weight: &WeightView<'_>, mode: PackMode) -> Result<K::Packed, KernelError> {
        self.0.pack(name, weight, mode)
    }
}

enum Container {
    Gguf(GgufFile<'static>),
    Safetensors { dir: SafetensorsDir, prefix: &'static str },
}

/// An opened model whose tensors are handed out once each.
pub(crate) struct Source {
    container: Container,
    place: String,
    pub(crate) config: TargetConfig,
    used: BTreeSet<String>,
}

/// A weight in stored form, possibly with rows put in another order.
struct Stored<'a> {
    dtype: WeightDtype,
    shape: [usize; 2],
    data: std::borrow::Cow<'a, [u8]>,
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Source, ModelError> {
        let place = path.display().to_string();
        if path.is_dir() {
            let config_path = path.join("config.json");
            if !config_path.is_file() {
                let adapter = path.join("adapter_config.json").is_file();
                return Err(if adapter {
                    ModelError::Adapter { place }
                } else {
                    ModelError::NotAModel { place }
                });
            }
            let hf = HfConfig::open(&config_path)?;
            // An architecture that is not read comes first: its unquantised form would not be read either.
            let config = TargetConfig::from_hf(&hf)?;
            let method = quantised::configured(&hf, path)?;
            let named =
                |method: &str| ModelError::Quantised { place: place.clone(), method: method.to_owned() };
            let dir = SafetensorsDir::open(path).map_err(|error| match (&error, &method) {
                // Older quantised folders hold pickled weights.
                (SafetensorsError::NoWeights { .. }, Some(method)) => named(method),
                _ => error.into(),
            })?;
            if let Some(shown) = quantised::shown(&dir) {
                return Err(named(method.as_deref().unwrap_or(shown)));
            }
            let prefix = ["model.", "language_model.model.", "model.language_model.", ""]
                .into_iter()
                .find(|p| dir.find(&format!("{p}embed_tokens.weight")).is_some())
                .unwrap_or("model.");
            return Ok(Source {
                container: Container::Safetensors { dir, prefix },
                place,
                config,
                used: BTreeSet::new(),
            });
        }
        if path.is_file() && path.extension().is_some_and(|e| e == "safetensors") {
            return Err(ModelError::NotAModel { place });
        }
        let file = GgufFile::open(path)?;
        let config = TargetConfig::from_gguf(&file)?;
        Ok(Source { container: Container::Gguf(file), place, config, used: BTreeSet::new() })
    }

    fn stored(&mut self, part: Part, layer: usize, shape: [usize; 2]) -> Result<Stored<'_>, ModelError> {
        let place = self.place.clone();
        let family = self.config.family;
        match &self.container {
            Container::Gguf(file) => {
                let name = part.gguf(layer);
                let info = file
                    .find_tensor(&name)
                    .ok_or_else(|| ModelError::MissingTensor { place: place.clone(), name: name.clone() })?;
                let Some(dtype) = weight_dtype(info.ggml_type) else {
                    return Err(ModelError::TensorType { place, name, found: info.ggml_type.to_string() });
                };
                let mut found: Vec<usize> = info.dims.iter().rev().copied().collect();
                if found.len() == 1 {
                    found.insert(0, 1);
                }
                if found != shape {
                    return Err(ModelError::TensorShape { place, name, found, wanted: shape.to_vec() });
                }
                self.used.insert(name);
                let mut data = std::borrow::Cow::Borrowed(file.data(info));
                // llama.cpp stores the q and k rows of Llama models in interleaved RoPE order.
                if family == Family::Llama && matches!(part, Part::Q | Part::K) {
                    data = rope_halves_from_pairs(&data, shape[0], self.config.head_dim).into();
                }
                Ok(Stored { dtype, shape, data })
            }
            Container::Safetensors { dir, prefix } => {
                use draftsmith_formats::safetensors_dir::Dtype;
                let name = part.hf(layer, family, prefix);
                let tensor = dir
                    .find(&name)
                    .ok_or_else(|| ModelError::MissingTensor { place: place.clone(), name: name.clone() })?;
                let dtype = match tensor.dtype {
                    Dtype::F32 => WeightDtype::F32,
                    Dtype::F16 => WeightDtype::F16,
                    Dtype::BF16 => WeightDtype::Bf16,
                    other => return Err(ModelError::TensorType { place, name, found: format!("{other:?}") }),
                };
                let mut found = tensor.shape.to_vec();
                if found.len() == 1 {
                    found.insert(0, 1);
                }
                if found != shape {
                    return Err(ModelError::TensorShape { place, name, found, wanted: shape.to_vec() });
                }
                let data = std::borrow::Cow::Borrowed(tensor.bytes);
                self.used.insert(name);
                Ok(Stored { dtype, shape, data })
            }
        }
    }

    fn release(&self, part: Part, layer: usize) {
        match &self.container {
            Container::Gguf(file) => {
                if let Some(info) = file.find_tensor(&part.gguf(layer)) {
                    file.release(info);
                }
            }
            Container::Safetensors { dir, prefix } => {
                dir.release(&part.hf(layer, self.config.family, prefix));
            }
        }
    }

    pub(crate) fn linear<P>(
        &mut self,
        packing: &dyn Packing<P>,
        precision: Precision,
        part: Part,
        layer: usize,
        shape: [usize; 2],
    ) -> Result<Arc<Linear<P>>, ModelError> {
        let place = self.place.clone();
        let stored = self.stored(part, layer, shape)?;
        let view = WeightView {
            dtype: stored.dtype,
            out_features: stored.shape[0],
            in_features: stored.shape[1],
            data: &stored.data,
        };
        let packed = packing
            .pack(&format!("{part:?} of layer {layer}"), &view, precision.pack_mode())
            .map_err(|source| ModelError::Kernel { place, source })?;
        drop(stored);
        // The packed copy is what decoding reads.
        self.release(part, layer);
        Ok(Arc::new(Linear { packed, out_features: shape[0], in_features: shape[1] }))
    }

    /// A weight as f32, row-major.
    pub(crate) fn floats(
        &mut self,
        part: Part,
        layer: usize,
        shape: [usize; 2],
    ) -> Result<Vec<f32>, ModelError> {
        let place = self.place.clone();
        let stored = self.stored(part, layer, shape)?;
        let view = WeightView {
            dtype: stored.dtype,
            out_features: shape[0],
            in_features: shape[1],
            data: &stored.data,
        };
        view.check(&format!("{part:?}")).map_err(|source| ModelError::Kernel { place, source })?;
        Ok(quant::dequantize(&view))
    }

    /// A norm weight, with Gemma's one added.
    pub(crate) fn norm(&mut self, part: Part, layer: usize, width: usize) -> Result<Vec<f32>, ModelError> {
        let mut values = self.floats(part, layer, [1, width])?;
        if self.config.norm_plus_one {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        Ok(values)
    }

    /// Fails on a tensor that nobody asked for.
    pub(crate) fn finish(self) -> Result<TargetConfig, ModelError> {
        let ignorable = |name: &str| {
            name == "rope_freqs.weight"
                || name.ends_with("rotary_emb.inv_freq")
                || (name == "lm_head.weight" && self.config.tied)
                // Towers of multimodal checkpoints.
                || ["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."]
                    .iter()
                    .any(|p| name.starts_with(p))
        };
        let names: Vec<String> = match &self.container {
            Container::Gguf(file) => file.tensors().iter().map(|t| t.name.clone()).collect(),
            Container::Safetensors { dir, .. } => dir.names().map(str::to_owned).collect(),
        };
        match names.into_iter().find(|n| !self.used.contains(n) && !ignorable(n)) {
            Some(name) => Err(ModelError::UnexpectedTensor { place: self.place, name }),
            None => Ok(self.config),
        }
    }
}

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

/// Rows of each head from llama.cpp's interleaved RoPE pairs to the halves of everybody else: row `2 i + j` of a head
/// becomes row `j * half + i`. `data` holds `rows` rows of any element type.
pub fn rope_halves_from_pairs(data: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let half = head_dim / 2;
    reordered(data, rows, head_dim, |r| r % half * 2 + r / half)
}

/// The way back of [`rope_halves_from_pairs`].
pub fn rope_pairs_from_halves(data: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let half = head_dim / 2;
    reordered(data, rows, head_dim, |r| r % 2 * half + r / 2)
}

/// Rows of each head in another order: row `r` is taken from row `from(r)` of the same head.
fn reordered(data: &[u8], rows: usize, head_dim: usize, from: impl Fn(usize) -> usize) -> Vec<u8> {
    let row_bytes = data.len() / rows.max(1);
    let mut out = Vec::with_capacity(data.len());
    for row in 0..rows {
        let source = row / head_dim * head_dim + from(row % head_dim);
        out.extend_from_slice(&data[source * row_bytes..(source + 1) * row_bytes]);
    }
    out
}
