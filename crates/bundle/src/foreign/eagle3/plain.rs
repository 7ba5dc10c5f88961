//! A second reader and a second network for exports: published names spelt out per layout, sums in f64, one row after
//! the other.
//!
//! Nothing of the exporter, of the importer or of `model` is used, so that a mistake made on the way out is not made
//! again on the way back. Only the containers (GGUF, safetensors) are shared.
//!
//! Shape legend: `N` slots of a probe, `D` draft steps after the first, `H` draft width, `Ht` target width, `Vd` draft
//! vocabulary, `hd` head width.

use std::path::Path;

use draftsmith_formats::atomic;
use draftsmith_formats::gguf::GgufFile;
use serde_json::Value;

use crate::BundleError;
use crate::foreign::plain::{File, Matrix, Rope, Stored, attended, normed};
use crate::foreign::{GGUF_FILE, Layout};
use crate::probe::ProbeInput;

/// Which two numbers of a head turn together.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rotation {
    /// `i` and `i + hd / 2`.
    Halves,
    /// `2 i` and `2 i + 1`.
    Pairs,
}

/// An export as its engine would see it.
pub(crate) struct Plain {
    /// 0-based layers whose output is captured.
    pub(crate) layers: Vec<i64>,
    /// `[Vd]` target id of each draft id.
    pub(crate) targets: Vec<i64>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f64,
    /// `[hd / 2]`
    frequencies: Vec<f64>,
    rotation: Rotation,
    norm_before_residual: bool,
    post_norm_feedback: bool,
    /// Norms before `fc`: none, one over all, or one per captured layer.
    feature_norms: Vec<Vec<f64>>,
    fc: Matrix,
    embed_norm: Vec<f64>,
    hidden_norm: Vec<f64>,
    qkvo: [Matrix; 4],
    mlp_norm: Vec<f64>,
    gate_up_down: [Matrix; 3],
    last_norm: Vec<f64>,
    head: Matrix,
}

/// Published names, in the order of [`Plain`]'s fields: norms before `fc` apart.
const SPECFORGE: [&str; 14] = [
    "fc.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.post_attention_layernorm.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
    "norm.weight",
    "lm_head.weight",
    "d2t",
];
const VLLM: [&str; 14] = [
    "fc.weight",
    "layers.0.input_layernorm.weight",
    "layers.0.hidden_norm.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.k_proj.weight",
    "layers.0.self_attn.v_proj.weight",
    "layers.0.self_attn.o_proj.weight",
    "layers.0.post_attention_layernorm.weight",
    "layers.0.mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight",
    "norm.weight",
    "lm_head.weight",
    "d2t",
];
const LLAMA_CPP: [&str; 14] = [
    "fc.weight",
    "blk.0.attn_norm.weight",
    "blk.0.attn_norm_2.weight",
    "blk.0.attn_q.weight",
    "blk.0.attn_k.weight",
    "blk.0.attn_v.weight",
    "blk.0.attn_output.weight",
    "blk.0.ffn_norm.weight",
    "blk.0.ffn_gate.weight",
    "blk.0.ffn_up.weight",
    "blk.0.ffn_down.weight",
    "output_norm.weight",
    "output.weight",
    "d2t",
];
const FC_NORMS: [&str; 3] = ["fc_norm.0.weight", "fc_norm.1.weight", "fc_norm.2.weight"];

/// A tensor that an export has or should have.
pub(crate) struct Entry {
    /// The layout's name.
    pub(crate) name: &'static str,
    /// The bundle's name; `None` if it has no such tensor.
    pub(crate) bundle: Option<&'static str>,
    /// What lies in the file, if it is there.
    pub(crate) stored: Option<Stored>,
}

/// Takes stock of an export by the layout's published key set: entries, and names that no engine would take.
pub(crate) fn inventory(dir: &Path, layout: Layout) -> Result<(Vec<Entry>, Vec<String>), BundleError> {
    let file = File::open(dir, layout)?;
    let mut names: Vec<(&'static str, Option<&'static str>)> =
        published(layout).into_iter().zip(SPECFORGE.map(Some)).collect();
    let same = |name| (name, Some(name));
    let optional = match layout {
        Layout::Gguf => {
            vec![("enc.output_norm.weight", Some("input_norm.weight")), ("rope_freqs.weight", None)]
        }
        Layout::Sglang | Layout::Vllm | Layout::Speculators => {
            names.push(same("t2d"));
            [["input_norm.weight"].as_slice(), &FC_NORMS].concat().into_iter().map(same).collect()
        }
    };
    let present = file.names();
    names.extend(optional.into_iter().filter(|(name, _)| present.iter().any(|p| p == name)));
    let left = present.into_iter().filter(|p| names.iter().all(|(name, _)| p != name)).collect();
    let entry = |(name, bundle)| Entry { name, bundle, stored: file.find(name) };
    Ok((names.into_iter().map(entry).collect(), left))
}

fn published(layout: Layout) -> [&'static str; 14] {
    match layout {
        Layout::Sglang => SPECFORGE,
        Layout::Vllm | Layout::Speculators => VLLM,
        Layout::Gguf => LLAMA_CPP,
    }
}

/// The layout that an exported folder says it has.
pub(crate) fn layout_of(dir: &Path) -> Result<Option<Layout>, BundleError> {
    if dir.join(GGUF_FILE).is_file() {
        return Ok(Some(Layout::Gguf));
    }
    let path = dir.join("config.json");
    if !path.is_file() {
        return Ok(None);
    }
    let json: Value = serde_json::from_slice(&atomic::read(&path)?)
        .map_err(|e| BundleError::Manifest { path, problem: e.to_string() })?;
    Ok(match json["architectures"][0].as_str() {
        Some("LlamaForCausalLMEagle3") => Some(Layout::Sglang),
        Some("Eagle3LlamaForCausalLM") => Some(Layout::Vllm),
        Some("Eagle3Speculator") => Some(Layout::Speculators),
        _ => None,
    })
}

/// Numbers of the configuration.
struct Numbers {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f64,
    rope: Rope,
    layers: Vec<i64>,
    norm_before_residual: bool,
    post_norm_feedback: bool,
}

fn bad(dir: &Path, what: &str) -> BundleError {
    BundleError::Manifest { path: dir.to_owned(), problem: format!("{what} is missing or no number") }
}

/// From `config.json`: of the draft itself, or nested as `speculators` writes it.
fn json_numbers(dir: &Path, layout: Layout) -> Result<Numbers, BundleError> {
    let path = dir.join("config.json");
    let json: Value = serde_json::from_slice(&atomic::read(&path)?)
        .map_err(|e| BundleError::Manifest { path: path.clone(), problem: e.to_string() })?;
    let layer = if layout == Layout::Speculators { &json["transformer_layer_config"] } else { &json };
    let number = |key: &str| layer[key].as_f64().ok_or_else(|| bad(&path, key));
    // SGLang counts from the layer that wrote the state, the others from the one that reads it.
    let (ids, from) = match layout {
        Layout::Sglang => (&json["eagle_config"]["eagle_aux_hidden_state_layer_ids"], 0),
        Layout::Vllm | Layout::Speculators | Layout::Gguf => (&json["eagle_aux_hidden_state_layer_ids"], 1),
    };
    Ok(Numbers {
        heads: number("num_attention_heads")? as usize,
        kv_heads: number("num_key_value_heads")? as usize,
        head_dim: number("head_dim")? as usize,
        eps: number("rms_norm_eps")?,
        rope: Rope::of_json(layer, &|value, key| value[key].as_f64().ok_or_else(|| bad(&path, key)))?,
        layers: ids.as_array().into_iter().flatten().filter_map(Value::as_i64).map(|id| id - from).collect(),
        norm_before_residual: json["norm_before_residual"] == true,
        post_norm_feedback: json["norm_output"] == true,
    })
}

fn gguf_numbers(dir: &Path) -> Result<Numbers, BundleError> {
    let file = GgufFile::open(dir.join(GGUF_FILE))?;
    let size = |key: &str| file.get_u32(&format!("eagle3.{key}")).map(|n| n as usize);
    Ok(Numbers {
        heads: size("attention.head_count")?,
        kv_heads: size("attention.head_count_kv")?,
        head_dim: size("attention.key_length")?,
        eps: f64::from(file.get_f32("eagle3.attention.layer_norm_rms_epsilon")?),
        rope: Rope::of_gguf(&file, "eagle3")?,
        layers: file.get_i64_array("eagle3.target_layers")?.into_iter().map(|id| id - 1).collect(),
        norm_before_residual: file.find_bool("eagle3.norm_before_residual")?.unwrap_or(false),
        post_norm_feedback: false,
    })
}

impl Plain {
    /// Reads an export whose inventory was found complete and in shape.
    pub(crate) fn read(dir: &Path, layout: Layout) -> Result<Plain, BundleError> {
        let numbers = match layout {
            Layout::Gguf => gguf_numbers(dir)?,
            Layout::Sglang | Layout::Vllm | Layout::Speculators => json_numbers(dir, layout)?,
        };
        let (mut stock, _) = inventory(dir, layout)?;
        let mut find = |name: &str| stock.iter_mut().find(|entry| entry.name == name)?.stored.take();
        let mut frequencies = numbers.rope.frequencies(numbers.head_dim);
        if let Some(divisors) = find("rope_freqs.weight") {
            frequencies.iter_mut().zip(&divisors.values).for_each(|(f, divisor)| *f /= divisor);
        }
        let one_norm = find("input_norm.weight").or_else(|| find("enc.output_norm.weight"));
        let feature_norms: Vec<Vec<f64>> = match one_norm {
            Some(norm) => vec![norm.values],
            None => FC_NORMS.iter().filter_map(|name| find(name)).map(|norm| norm.values).collect(),
        };
        let mut needed = published(layout).into_iter();
        let mut next = || {
            let name = needed.next().expect("as many names as fields");
            find(name).ok_or_else(|| bad(dir, name))
        };
        let matrix = |stored: Stored| Matrix { columns: stored.shape[1], values: stored.values };
        let (fc, embed_norm, hidden_norm) = (matrix(next()?), next()?.values, next()?.values);
        let qkvo = [matrix(next()?), matrix(next()?), matrix(next()?), matrix(next()?)];
        let mlp_norm = next()?.values;
        let gate_up_down = [matrix(next()?), matrix(next()?), matrix(next()?)];
        let (last_norm, head, d2t) = (next()?.values, matrix(next()?), next()?.values);
        let absolute = layout == Layout::Gguf;
        let target = |(draft, stored): (usize, f64)| {
            if absolute { stored as i64 } else { stored as i64 + draft as i64 }
        };
        Ok(Plain {
            layers: numbers.layers,
            targets: d2t.into_iter().enumerate().map(target).collect(),
            heads: numbers.heads,
            kv_heads: numbers.kv_heads,
            head_dim: numbers.head_dim,
            eps: numbers.eps,
            frequencies,
            rotation: if layout == Layout::Gguf { Rotation::Pairs } else { Rotation::Halves },
            norm_before_residual: numbers.norm_before_residual,
            post_norm_feedback: numbers.post_norm_feedback,
            feature_norms,
            fc,
            embed_norm,
            hidden_norm,
            qkvo,
            mlp_norm,
            gate_up_down,
            last_norm,
            head,
        })
    }

    /// Answers a probe with stored embeddings: layer output `[H]` of the last slot, and its logits `[Vd]`.
    pub(crate) fn answer(&self, input: &ProbeInput) -> (Vec<f32>, Vec<f32>) {
        let width = self.embed_norm.len();
        let features: Vec<f64> = input.features.iter().map(|x| f64::from(*x)).collect();
        let mut hiddens: Vec<Vec<f64>> =
            features.chunks_exact(self.fc.columns).map(|slot| self.fc.apply(&self.fused(slot))).collect();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut output = Vec::new();
        for position in 0..hiddens.len() + input.depth as usize {
            let embedding: Vec<f64> = input.embeddings[position * width..(position + 1) * width]
                .iter()
                .map(|x| f64::from(*x))
                .collect();
            if position == hiddens.len() {
                hiddens.push(match self.post_norm_feedback {
                    true => normed(&output, &self.last_norm, self.eps),
                    false => output.clone(),
                });
            }
            output = self.layer(&embedding, &hiddens[position], position, &mut keys, &mut values);
        }
        let logits = self.head.apply(&normed(&output, &self.last_norm, self.eps));
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        (narrow(output), narrow(logits))
    }

    /// The captured states of one slot as `fc` reads them.
    fn fused(&self, slot: &[f64]) -> Vec<f64> {
        if self.feature_norms.is_empty() {
            return slot.to_vec();
        }
        let part = slot.len() / self.feature_norms.len();
        let parts = slot.chunks_exact(part).zip(&self.feature_norms);
        parts.flat_map(|(x, weight)| normed(x, weight, self.eps)).collect()
    }

    /// One slot through the layer; its key and value are added to those before it.
    fn layer(
        &self,
        embedding: &[f64],
        hidden: &[f64],
        position: usize,
        keys: &mut Vec<Vec<f64>>,
        values: &mut Vec<Vec<f64>>,
    ) -> Vec<f64> {
        let normed_hidden = normed(hidden, &self.hidden_norm, self.eps);
        let both = [normed(embedding, &self.embed_norm, self.eps), normed_hidden.clone()].concat();
        let [q, k, v, o] = &self.qkvo;
        let query = self.rotated(q.apply(&both), position);
        keys.push(self.rotated(k.apply(&both), position));
        values.push(v.apply(&both));
        let seen: Vec<usize> = (0..keys.len()).collect();
        let mixed = attended(&query, keys, values, &seen, [self.heads, self.kv_heads, self.head_dim]);
        let residual = if self.norm_before_residual { &normed_hidden } else { hidden };
        let middle: Vec<f64> = o.apply(&mixed).iter().zip(residual).map(|(a, b)| a + b).collect();
        let [gate, up, down] = &self.gate_up_down;
        let x = normed(&middle, &self.mlp_norm, self.eps);
        let act: Vec<f64> =
            gate.apply(&x).iter().zip(up.apply(&x)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        down.apply(&act).iter().zip(&middle).map(|(a, b)| a + b).collect()
    }

    /// Turns each head by its position.
    fn rotated(&self, mut x: Vec<f64>, position: usize) -> Vec<f64> {
        let half = self.head_dim / 2;
        for head in x.chunks_exact_mut(self.head_dim) {
            for (i, frequency) in self.frequencies.iter().enumerate() {
                let (a, b) = match self.rotation {
                    Rotation::Halves => (i, i + half),
                    Rotation::Pairs => (2 * i, 2 * i + 1),
                };
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
            }
        }
        x
    }
}
