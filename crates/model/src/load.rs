//! Weights of a target by logical name, from GGUF or safetensors, every tensor accounted for.

mod experts;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use draftsmith_formats::gguf::GgufFile;
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, SafetensorsError};
use draftsmith_kernels::{KernelError, Kernels, PackMode, WeightDtype, WeightView, quant};

use crate::config::TargetConfig;
use crate::dtype::weight_dtype;
use crate::family::{Family, Norm, RopeRows};
use crate::infer::Linear;
use crate::quantised::{self, Found, Scheme};
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
    OBias,
    Sinks,
    GateBias,
    UpBias,
    DownBias,
    QNorm,
    KNorm,
    AttentionPostNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
    MlpPostNorm,
    Router,
    RouterBias,
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
    Safetensors { dir: SafetensorsDir, prefix: &'static str, scheme: Option<Scheme> },
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
    data: Cow<'a, [u8]>,
    /// Input of each column where that is another one.
    order: Option<Vec<u32>>,
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
            // Checkpoints of gpt-oss have their experts in 4-bit floats, which the kernels read as they are.
            let native = config.experts.is_some() && config.family == Family::GptOss;
            let shown = quantised::shown(&dir).filter(|shown| !(native && *shown == "MXFP4"));
            let scheme = match shown {
                // Experts are read as floats and as gpt-oss has them.
                Some(_) if config.experts.is_none() => Scheme::read(&hf, Some(path))?,
                _ => None,
            };
            if let (Some(shown), None) = (shown, &scheme) {
                return Err(named(method.as_deref().unwrap_or(shown)));
            }
            let prefix = ["model.", "language_model.model.", "model.language_model.", ""]
                .into_iter()
                .find(|p| dir.find(&format!("{p}embed_tokens.weight")).is_some())
                .unwrap_or("model.");
            return Ok(Source {
                container: Container::Safetensors { dir, prefix, scheme },
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
        let (config, spec) = (&self.config, self.config.family.spec());
        // A part may be some rows of a larger tensor.
        let (first, rows) = spec.rows_of(part, config).unwrap_or((0, shape[0]));
        let whole = [rows, shape[1]];
        let cut = |data| rows_between(data, rows, first..first + shape[0]);
        let ordered = |data, order| rope_ordered(config, part, data, shape, order);
        match &self.container {
            Container::Gguf(file) => {
                let name = spec.gguf_name(part, layer);
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
                if found != whole {
                    return Err(ModelError::TensorShape { place, name, found, wanted: whole.to_vec() });
                }
                self.used.insert(name);
                let data = ordered(cut(file.data(info)), spec.gguf_rows);
                Ok(Stored { dtype, shape, data, order: None })
            }
            Container::Safetensors { dir, prefix, scheme } => {
                let name = spec.hf_name(part, layer, prefix);
                if let (Some(scheme), Some(layer)) = (scheme, name.strip_suffix(".weight"))
                    && let Some(found) = Found::new(scheme, dir, layer)?
                {
                    if found.shape != whole {
                        let found = found.shape.to_vec();
                        return Err(ModelError::TensorShape { place, name, found, wanted: whole.to_vec() });
                    }
                    let all = found.rows();
                    let data = rows_between(&all, rows, first..first + shape[0]);
                    let data = rope_ordered(config, part, data, shape, spec.hf_rows).into_owned().into();
                    let Found { dtype, order, tensors, .. } = found;
                    self.used.extend(tensors);
                    return Ok(Stored { dtype, shape, data, order });
                }
                let tensor = dir
                    .find(&name)
                    .ok_or_else(|| ModelError::MissingTensor { place: place.clone(), name: name.clone() })?;
                let Some(dtype) = float_dtype(tensor.dtype) else {
                    let found = format!("{:?}", tensor.dtype);
                    return Err(ModelError::TensorType { place, name, found });
                };
                let mut found = tensor.shape.to_vec();
                if found.len() == 1 {
                    found.insert(0, 1);
                }
                if found != whole {
                    return Err(ModelError::TensorShape { place, name, found, wanted: whole.to_vec() });
                }
                let data = ordered(cut(tensor.bytes), spec.hf_rows);
                self.used.insert(name);
                Ok(Stored { dtype, shape, data, order: None })
            }
        }
    }

    /// Whether its layers are those of a quantised folder, which become groups when they are read.
    pub(crate) fn is_quantised_folder(&self) -> bool {
        matches!(self.container, Container::Safetensors { scheme: Some(_), .. })
    }

    fn release(&self, part: Part, layer: usize) {
        match &self.container {
            Container::Gguf(file) => {
                if let Some(info) = file.find_tensor(&self.config.family.spec().gguf_name(part, layer)) {
                    file.release(info);
                }
            }
            Container::Safetensors { dir, prefix, scheme } => {
                let name = self.config.family.spec().hf_name(part, layer, prefix);
                dir.release(&name);
                if let (Some(_), Some(layer)) = (scheme, name.strip_suffix("weight")) {
                    ["qweight", "weight_packed"].iter().for_each(|end| dir.release(&format!("{layer}{end}")));
                }
            }
        }
    }

    pub(crate) fn linear<K: Kernels>(
        &mut self,
        (kernels, packing): (&K, &dyn Packing<K::Packed>),
        precision: Precision,
        part: Part,
        layer: usize,
        shape: [usize; 2],
    ) -> Result<Arc<Linear<K::Packed>>, ModelError> {
        let place = self.place.clone();
        let stored = self.stored(part, layer, shape)?;
        let view = WeightView {
            dtype: stored.dtype,
            out_features: stored.shape[0],
            in_features: stored.shape[1],
            data: &stored.data,
        };
        let name = format!("{part:?} of layer {layer}");
        let packed = match &stored.order {
            None => packing.pack(&name, &view, precision.pack_mode()),
            // Of a quantised folder, of which nothing is kept.
            Some(order) => kernels.pack_ordered(&name, &view, order, precision.pack_mode()),
        };
        let packed = packed.map_err(|source| ModelError::Kernel { place, source })?;
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
        Ok(quantised::in_input_order(quant::dequantize(&view), shape[1], stored.order.as_deref()))
    }

    /// A norm weight, with Gemma's one added.
    pub(crate) fn norm(&mut self, part: Part, layer: usize, width: usize) -> Result<Vec<f32>, ModelError> {
        let mut values = self.floats(part, layer, [1, width])?;
        if self.config.norm == Norm::RmsPlusOne {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        Ok(values)
    }

    /// Fails on a tensor that nobody asked for.
    pub(crate) fn finish(self) -> Result<TargetConfig, ModelError> {
        let ignorable = |name: &str| {
            name == "rope_freqs.weight"
                || (name.starts_with("rope_factors_") && self.config.rope_long.is_some())
                || name.ends_with("rotary_emb.inv_freq")
                || (name == "lm_head.weight" && self.config.tied)
                // Towers of multimodal checkpoints.
                || ["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."]
                    .iter()
                    .any(|p| name.starts_with(p))
        };
        // What quantised folders hold beside weights: scales for keys and values in 8 bits, which stay in more here, and
        // biases of layers without any, as older tools of GPTQ write them.
        let beside = |name: &str| match &self.container {
            Container::Safetensors { dir, scheme: Some(_), .. } => {
                let scale = [
                    "k_scale",
                    "v_scale",
                    "kv_scale",
                    "q_scale",
                    "prob_scale",
                    "k_zero_point",
                    "v_zero_point",
                ];
                let blank = |name| dir.find(name).is_some_and(|t| t.bytes.iter().all(|b| *b == 0));
                name.rsplit('.').next().is_some_and(|end| scale.contains(&end))
                    || name.ends_with("_proj.bias") && blank(name)
            }
            _ => false,
        };
        let names: Vec<String> = match &self.container {
            Container::Gguf(file) => file.tensors().iter().map(|t| t.name.clone()).collect(),
            Container::Safetensors { dir, .. } => dir.names().map(str::to_owned).collect(),
        };
        match names.into_iter().find(|n| !self.used.contains(n) && !ignorable(n) && !beside(n)) {
            Some(name) => Err(ModelError::UnexpectedTensor { place: self.place, name }),
            None => Ok(self.config),
        }
    }
}

/// The kernels' name of a float type of safetensors.
fn float_dtype(dtype: Dtype) -> Option<WeightDtype> {
    match dtype {
        Dtype::F32 => Some(WeightDtype::F32),
        Dtype::F16 => Some(WeightDtype::F16),
        Dtype::BF16 => Some(WeightDtype::Bf16),
        _ => None,
    }
}

/// Some rows of a stored matrix.
fn rows_between(data: &[u8], rows: usize, wanted: std::ops::Range<usize>) -> &[u8] {
    let row_bytes = data.len() / rows.max(1);
    &data[wanted.start * row_bytes..wanted.end * row_bytes]
}

/// The rows of a part that RoPE turns, with each pair where the kernels look for it: pair `i` of a head in rows `i` and
/// `head_dim / 2 + i`. Queries and keys change alike, so their products do not.
fn rope_ordered<'a>(
    config: &TargetConfig,
    part: Part,
    data: &'a [u8],
    shape: [usize; 2],
    stored: RopeRows,
) -> Cow<'a, [u8]> {
    let rows = match part {
        Part::Q | Part::K => shape[0],
        Part::QBias | Part::KBias | Part::QNorm | Part::KNorm => shape[1],
        _ => return data.into(),
    };
    let (half, turned) = (config.head_dim / 2, config.rotary_dim / 2);
    if stored == RopeRows::Halves && turned == half {
        return data.into();
    }
    reordered(data, rows, config.head_dim, |row| match (row % half, row / half) {
        (pair, second) if pair < turned => match stored {
            RopeRows::Pairs => 2 * pair + second,
            RopeRows::Halves => second * turned + pair,
        },
        // What is not turned stands behind what is.
        (other, second) => 2 * turned + second * (half - turned) + other - turned,
    })
    .into()
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
