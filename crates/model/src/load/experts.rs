//! Experts of a layer, from whatever a container holds them in.
//!
//! * GGUF: one tensor for all experts, `[E, I, H]` for gate and up, `[E, H, I]` for down.
//! * Qwen3-MoE folders: a tensor for every expert and projection, as in a dense layer.
//! * gpt-oss folders: `gate_up_proj [E, H, 2I]`, gate and up in turn, and `down_proj [E, I, H]`, inputs first; or both
//!   with outputs first in 4-bit floats: codes `[E, O, I / 32, 16]`, two neighbours in a byte, and scales beside them.
//!
//! Shape legend: `E` experts, `H` hidden size, `I` width of an expert, `O` outputs.

use std::borrow::Cow;

use draftsmith_formats::gguf::GgufFile;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, Tensor};
use draftsmith_kernels::experts::{Expert, Experts};
use draftsmith_kernels::{Kernels, WeightDtype, WeightView, quant};

use super::{Container, Packing, Source, float_dtype, weight_dtype};
use crate::moe::{ExpertFiles, ExpertsConfig};
use crate::{ModelError, Precision};

/// Gate, up or down.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Projection {
    Gate,
    Up,
    Down,
}

const PROJECTIONS: [Projection; 3] = [Projection::Gate, Projection::Up, Projection::Down];

impl Projection {
    fn gguf(self) -> &'static str {
        match self {
            Projection::Gate => "ffn_gate_exps",
            Projection::Up => "ffn_up_exps",
            Projection::Down => "ffn_down_exps",
        }
    }

    fn single(self) -> &'static str {
        match self {
            Projection::Gate => "gate_proj",
            Projection::Up => "up_proj",
            Projection::Down => "down_proj",
        }
    }

    /// The tensor that holds it for all experts, and which of its outputs: how far apart, from which on.
    fn fused(self) -> (&'static str, usize, usize) {
        match self {
            Projection::Gate => ("gate_up_proj", 2, 0),
            Projection::Up => ("gate_up_proj", 2, 1),
            Projection::Down => ("down_proj", 1, 0),
        }
    }
}

/// A weight `[O, I]` in stored form.
type Stored<'a> = (WeightDtype, Cow<'a, [u8]>);

/// Where the experts of a layer are looked for.
struct Layer<'a> {
    source: &'a Source,
    layer: usize,
    config: &'a ExpertsConfig,
    hidden: usize,
}

impl Source {
    /// All experts of a layer, packed.
    pub(crate) fn experts<K: Kernels>(
        &mut self,
        (kernels, packing): (&K, &dyn Packing<K::Packed>),
        precision: Precision,
        layer: usize,
        config: &ExpertsConfig,
    ) -> Result<Experts<K::Packed, K::Buf>, ModelError> {
        let of = Layer { source: self, layer, config, hidden: self.config.hidden_size };
        let mut used = Vec::new();
        let mut each = Vec::with_capacity(config.routing.experts);
        let biases = match config.biases {
            true => Some(of.biases(&mut used)?),
            false => None,
        };
        for expert in 0..config.routing.experts {
            let mut packed = Vec::with_capacity(3);
            for projection in PROJECTIONS {
                let [out_features, in_features] = of.shape(projection);
                let (dtype, data) = of.weight(projection, expert, &mut used)?;
                let view = WeightView { dtype, out_features, in_features, data: &data };
                let name = format!("{} of expert {expert} of layer {layer}", projection.single());
                packed.push(
                    packing
                        .pack(&name, &view, precision.pack_mode())
                        .map_err(|source| ModelError::Kernel { place: self.place.clone(), source })?,
                );
            }
            let [gate, up, down] = packed.try_into().map_err(|_| ()).expect("three projections");
            let bias =
                biases.as_ref().map(|all| all.each_ref().map(|b| kernels.upload(of.bias_of(b, expert))));
            each.push(Expert { gate, up, down, bias });
        }
        of.no_more(config.routing.experts)?;
        used.sort_unstable();
        used.dedup();
        // The packed copies are what decoding reads.
        used.iter().for_each(|name| self.release_named(name));
        self.used.extend(used);
        let activation = self.config.activation;
        Ok(Experts { each, hidden: self.config.hidden_size, width: config.width, activation })
    }

    fn release_named(&self, name: &str) {
        match &self.container {
            Container::Gguf(file) => {
                if let Some(info) = file.find_tensor(name) {
                    file.release(info);
                }
            }
            Container::Safetensors { dir, .. } => dir.release(name),
        }
    }
}

impl Layer<'_> {
    fn place(&self) -> String {
        self.source.place.clone()
    }

    fn shape(&self, projection: Projection) -> [usize; 2] {
        match projection {
            Projection::Gate | Projection::Up => [self.config.width, self.hidden],
            Projection::Down => [self.hidden, self.config.width],
        }
    }

    fn prefix(&self, prefix: &str) -> String {
        format!("{prefix}layers.{}.mlp.experts.", self.layer)
    }

    /// A tensor of a folder, of this shape.
    fn tensor<'a>(
        &self,
        dir: &'a SafetensorsDir,
        name: &str,
        wanted: &[usize],
        used: &mut Vec<String>,
    ) -> Result<Tensor<'a>, ModelError> {
        let tensor = dir
            .find(name)
            .ok_or_else(|| ModelError::MissingTensor { place: self.place(), name: name.to_owned() })?;
        self.check_shape(name, tensor.shape.to_vec(), wanted)?;
        used.push(name.to_owned());
        Ok(tensor)
    }

    fn check_shape(&self, name: &str, found: Vec<usize>, wanted: &[usize]) -> Result<(), ModelError> {
        if found != wanted {
            let (place, wanted) = (self.place(), wanted.to_vec());
            return Err(ModelError::TensorShape { place, name: name.to_owned(), found, wanted });
        }
        Ok(())
    }

    fn float(&self, name: &str, dtype: Dtype) -> Result<WeightDtype, ModelError> {
        float_dtype(dtype).ok_or_else(|| ModelError::TensorType {
            place: self.place(),
            name: name.to_owned(),
            found: format!("{dtype:?}"),
        })
    }

    /// The tensor of all experts in a GGUF file: stored type and bytes.
    fn gguf<'a>(
        &self,
        file: &'a GgufFile<'_>,
        name: &str,
        wanted: &[usize],
        used: &mut Vec<String>,
    ) -> Result<(WeightDtype, &'a [u8]), ModelError> {
        let name = format!("blk.{}.{name}", self.layer);
        let info = file
            .find_tensor(&name)
            .ok_or_else(|| ModelError::MissingTensor { place: self.place(), name: name.clone() })?;
        let Some(dtype) = weight_dtype(info.ggml_type) else {
            let found = info.ggml_type.to_string();
            return Err(ModelError::TensorType { place: self.place(), name, found });
        };
        let mut found: Vec<usize> = info.dims.iter().rev().copied().collect();
        // Dimensions of one at the end are not written.
        while found.len() < wanted.len() {
            found.insert(0, 1);
        }
        self.check_shape(&name, found, wanted)?;
        used.push(name);
        Ok((dtype, file.data(info)))
    }

    fn weight(
        &self,
        projection: Projection,
        expert: usize,
        used: &mut Vec<String>,
    ) -> Result<Stored<'_>, ModelError> {
        let [outputs, inputs] = self.shape(projection);
        let experts = self.config.routing.experts;
        let (dir, prefix) = match &self.source.container {
            Container::Gguf(file) => {
                let name = format!("{}.weight", projection.gguf());
                let (dtype, data) = self.gguf(file, &name, &[experts, outputs, inputs], used)?;
                return Ok((dtype, Cow::Borrowed(part_of(data, expert, experts))));
            }
            Container::Safetensors { dir, prefix, .. } => (dir, self.prefix(prefix)),
        };
        if self.config.files == ExpertFiles::Single {
            let name = format!("{prefix}{expert}.{}.weight", projection.single());
            let tensor = self.tensor(dir, &name, &[outputs, inputs], used)?;
            return Ok((self.float(&name, tensor.dtype)?, Cow::Borrowed(tensor.bytes)));
        }
        let (name, step, from) = projection.fused();
        let name = format!("{prefix}{name}");
        let blocks = format!("{name}_blocks");
        if dir.find(&blocks).is_none() {
            let tensor = self.tensor(dir, &name, &[experts, inputs, outputs * step], used)?;
            let dtype = self.float(&name, tensor.dtype)?;
            let data = part_of(tensor.bytes, expert, experts);
            return Ok((
                dtype,
                Cow::Owned(outputs_first(data, dtype.block().1, [outputs, inputs], step, from)),
            ));
        }
        if !inputs.is_multiple_of(32) {
            let what = format!("`{blocks}` holds blocks of 32, its rows {inputs} values");
            return Err(ModelError::Shapes { place: self.place(), what });
        }
        let groups = inputs / 32;
        let codes = self.tensor(dir, &blocks, &[experts, outputs * step, groups, 16], used)?;
        let scales_name = format!("{name}_scales");
        let scales = self.tensor(dir, &scales_name, &[experts, outputs * step, groups], used)?;
        for (name, dtype) in [(&blocks, codes.dtype), (&scales_name, scales.dtype)] {
            if dtype != Dtype::U8 {
                let (name, found) = (name.clone(), format!("{dtype:?}"));
                return Err(ModelError::TensorType { place: self.place(), name, found });
            }
        }
        let (codes, scales) = (part_of(codes.bytes, expert, experts), part_of(scales.bytes, expert, experts));
        Ok((WeightDtype::Mxfp4, Cow::Owned(mxfp4_blocks(codes, scales, groups, step, from))))
    }

    /// Biases of gate, up and down, `[E, O]` each.
    fn biases(&self, used: &mut Vec<String>) -> Result<[Vec<f32>; 3], ModelError> {
        let mut biases: [Vec<f32>; 3] = Default::default();
        let experts = self.config.routing.experts;
        for (bias, projection) in biases.iter_mut().zip(PROJECTIONS) {
            let [outputs, _] = self.shape(projection);
            let (name, step, from) = projection.fused();
            let (dtype, data, width, step, from) = match &self.source.container {
                Container::Gguf(file) => {
                    let name = format!("{}.bias", projection.gguf());
                    let (dtype, data) = self.gguf(file, &name, &[experts, outputs], used)?;
                    (dtype, data, outputs, 1, 0)
                }
                Container::Safetensors { dir, prefix, .. } => {
                    let name = format!("{}{name}_bias", self.prefix(prefix));
                    let tensor = self.tensor(dir, &name, &[experts, outputs * step], used)?;
                    (self.float(&name, tensor.dtype)?, tensor.bytes, outputs * step, step, from)
                }
            };
            let view = WeightView { dtype, out_features: experts, in_features: width, data };
            view.check("bias of experts")
                .map_err(|source| ModelError::Kernel { place: self.place(), source })?;
            *bias = quant::dequantize(&view).into_iter().skip(from).step_by(step).collect();
        }
        Ok(biases)
    }

    fn bias_of<'a>(&self, bias: &'a [f32], expert: usize) -> &'a [f32] {
        let width = bias.len() / self.config.routing.experts;
        &bias[expert * width..(expert + 1) * width]
    }

    /// Fails on the tensor of an expert that the configuration does not count.
    fn no_more(&self, experts: usize) -> Result<(), ModelError> {
        let Container::Safetensors { dir, prefix, .. } = &self.source.container else { return Ok(()) };
        let prefix = self.prefix(prefix);
        let beyond = |name: &&str| {
            let number = name.strip_prefix(&prefix).and_then(|rest| rest.split('.').next());
            number.and_then(|n| n.parse::<usize>().ok()).is_some_and(|n| n >= experts)
        };
        match dir.names().find(beyond) {
            Some(name) => {
                let what = format!("{experts} experts in `config.json`, but a tensor `{name}`");
                Err(ModelError::Shapes { place: self.place(), what })
            }
            None => Ok(()),
        }
    }
}

/// The bytes of one expert out of those of all.
fn part_of(data: &[u8], expert: usize, experts: usize) -> &[u8] {
    let len = data.len() / experts;
    &data[expert * len..(expert + 1) * len]
}

/// `[O, I]` from `[I, O * step]`: outputs `from`, `from + step`, and so on, of values of `size` bytes.
fn outputs_first(
    data: &[u8],
    size: usize,
    [outputs, inputs]: [usize; 2],
    step: usize,
    from: usize,
) -> Vec<u8> {
    let mut out = vec![0; outputs * inputs * size];
    for (i, row) in data.chunks_exact(outputs * step * size).enumerate() {
        for o in 0..outputs {
            let (at, to) = ((o * step + from) * size, (o * inputs + i) * size);
            out[to..to + size].copy_from_slice(&row[at..at + size]);
        }
    }
    out
}

/// Rows `from`, `from + step`, and so on, of 4-bit floats as GGUF has them: a scale and its codes in one block, a byte
/// for values 16 apart.
fn mxfp4_blocks(codes: &[u8], scales: &[u8], groups: usize, step: usize, from: usize) -> Vec<u8> {
    let rows = codes.chunks_exact(16 * groups).zip(scales.chunks_exact(groups)).skip(from).step_by(step);
    let mut out = Vec::with_capacity(codes.len() / step / 16 * 17);
    for (codes, scales) in rows {
        for (codes, scale) in codes.chunks_exact(16).zip(scales) {
            let code = |i: usize| codes[i / 2] >> (i % 2 * 4) & 15;
            out.push(*scale);
            out.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_first_becomes_outputs_first() {
        // Two inputs, gate and up of three outputs in turn.
        let data: Vec<u8> = (0..12).collect();
        assert_eq!(outputs_first(&data, 1, [3, 2], 2, 0), [0, 6, 2, 8, 4, 10]);
        assert_eq!(outputs_first(&data, 1, [3, 2], 2, 1), [1, 7, 3, 9, 5, 11]);
        assert_eq!(outputs_first(&data, 2, [3, 2], 1, 0), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
    }

    #[test]
    fn codes_of_neighbours_become_codes_of_halves() {
        let codes: Vec<u8> = (0..32).map(|i| (i % 16) as u8).collect();
        let packed: Vec<u8> = codes.chunks_exact(2).map(|c| c[0] | c[1] << 4).collect();
        let rows = [packed.clone(), vec![0; 16], packed].concat();
        let block = mxfp4_blocks(&rows, &[120, 121, 122], 1, 2, 0);
        assert_eq!(block.len(), 34);
        assert_eq!((block[0], block[17]), (120, 122));
        let view = WeightView { dtype: WeightDtype::Mxfp4, out_features: 2, in_features: 32, data: &block };
        let values = quant::dequantize(&view);
        let floats = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
        for (value, code) in values.iter().zip(&codes) {
            assert_eq!(*value, floats[usize::from(*code)] * 2f32.powi(120 - 127));
        }
    }
}
