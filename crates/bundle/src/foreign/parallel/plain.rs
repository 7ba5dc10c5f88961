//! A second reader and a second network for exports of drafts that propose several tokens at once: published names spelt
//! out per container, sums in f64, one row after the other.
//!
//! Nothing of the exporter, of the importer or of `model` is used, so that a mistake made on the way out is not made
//! again on the way back. Only the containers (GGUF, safetensors) are shared.
//!
//! Shape legend: `N` slots of a probe, `D` slots of a block behind the last token, `H` draft width, `M` Markov rank, `hd`
//! head width.

use std::collections::BTreeMap;
use std::path::Path;

use draftsmith_formats::atomic;
use draftsmith_formats::gguf::{GgufArray, GgufFile, GgufValue};
use serde_json::Value;

use crate::BundleError;
use crate::foreign::plain::{File, Matrix, Rope, Stored, attended, normed};
use crate::foreign::{GGUF_FILE, Layout};
use crate::probe::ProbeInput;

/// A layer's names in folders and in llama.cpp's files; the first two norms on heads are the block drafts' alone.
const IN_LAYERS: [(&str, &str); 12] = [
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("hidden_norm.weight", "-"),
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];
/// Names outside of layers: for llama.cpp `-` where it has none.
const OUTSIDE: [(&str, &str); 14] = [
    ("fc.weight", "fc.weight"),
    ("hidden_norm.weight", "enc.output_norm.weight"),
    ("norm.weight", "output_norm.weight"),
    ("markov_head.markov_w1.weight", "markov_w1.weight"),
    ("markov_head.markov_w2.weight", "markov_w2.weight"),
    ("markov_head.gate_proj.weight", "-"),
    ("markov_head.gate_proj.bias", "-"),
    ("markov_head.joint_proj.weight", "-"),
    ("markov_head.joint_proj.bias", "-"),
    ("confidence_head.proj.weight", "conf_proj.weight"),
    ("confidence_head.proj.bias", "conf_proj.bias"),
    ("embed_tokens.weight", "-"),
    ("mask_hidden", "-"),
    ("lm_head.weight", "-"),
];
/// Integer tensors of folders.
const MAPS: [&str; 2] = ["d2t", "t2d"];

/// The published name of a bundle's tensor in a layout.
pub(crate) fn published(layout: Layout, bundle: &str) -> Option<String> {
    let gguf = layout == Layout::Gguf;
    if MAPS.contains(&bundle) {
        return Some(bundle.to_owned()).filter(|_| !gguf);
    }
    let pick = |(folder, file): &(&str, &str)| match gguf {
        false => Some((*folder).to_owned()),
        true => Some((*file).to_owned()).filter(|name| name != "-"),
    };
    if let Some(found) = OUTSIDE.iter().find(|(folder, _)| *folder == bundle) {
        return pick(found);
    }
    let (number, rest) = bundle.strip_prefix("layers.")?.split_once('.')?;
    let inside = pick(IN_LAYERS.iter().find(|(folder, _)| *folder == rest)?)?;
    Some(format!("{}.{number}.{inside}", if gguf { "blk" } else { "layers" }))
}

/// The layout that an exported folder says it has.
pub(crate) fn layout_of(dir: &Path) -> Result<Option<Layout>, BundleError> {
    if dir.join(GGUF_FILE).is_file() {
        return Ok(Some(Layout::Gguf));
    }
    if !dir.join("config.json").is_file() {
        return Ok(None);
    }
    let json = json_of(dir)?;
    // The last is P-EAGLE's name in vLLM.
    let known = [
        "DFlashDraftModel",
        "Qwen3DSparkModel",
        "DSparkDraftModel",
        "PEagleDraftModel",
        "Eagle3LlamaForCausalLM",
    ];
    let named = json["architectures"][0].as_str().unwrap_or_default();
    let top_layers = &json["eagle_aux_hidden_state_layer_ids"];
    Ok(match named {
        "DFlashSpeculator" | "DSparkSpeculator" | "PEagleSpeculator" => Some(Layout::Speculators),
        _ if !known.contains(&named) => None,
        _ if json["sample_from_anchor"].is_boolean() || top_layers.is_array() => Some(Layout::Vllm),
        _ => Some(Layout::Sglang),
    })
}

fn json_of(dir: &Path) -> Result<Value, BundleError> {
    let path = dir.join("config.json");
    serde_json::from_slice(&atomic::read(&path)?)
        .map_err(|e| BundleError::Manifest { path, problem: e.to_string() })
}

/// What the configuration of an export says, as its engine reads it.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// 0-based layers whose output is captured.
    pub(crate) layers: Vec<i64>,
    /// The mask token.
    pub(crate) mask: i64,
    /// Slots of a block; 0 for P-EAGLE.
    pub(crate) block: i64,
    /// Whether the first slot proposes.
    pub(crate) from_anchor: bool,
    /// Ids that the head has rows for.
    pub(crate) proposes: i64,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f64,
    rope: Rope,
    norm_before_residual: bool,
    /// Window of the sliding layers, and which slide.
    window: usize,
    sliding: Vec<bool>,
}

fn bad(dir: &Path, what: &str) -> BundleError {
    BundleError::Manifest { path: dir.to_owned(), problem: format!("`{what}` is missing or of a wrong type") }
}

impl Facts {
    pub(crate) fn read(dir: &Path, layout: Layout) -> Result<Facts, BundleError> {
        if layout == Layout::Gguf { Facts::of_gguf(dir) } else { Facts::of_json(dir, layout) }
    }

    fn of_json(dir: &Path, layout: Layout) -> Result<Facts, BundleError> {
        let json = json_of(dir)?;
        let path = dir.join("config.json");
        let speculators = layout == Layout::Speculators;
        let layer = if speculators { &json["transformer_layer_config"] } else { &json };
        let number = |value: &Value, key: &str| value[key].as_f64().ok_or_else(|| bad(&path, key));
        let named = json["architectures"][0].as_str().unwrap_or_default();
        let (spark, peagle) =
            (named.contains("DSpark"), named.contains("PEagle") || named.contains("Eagle3"));
        let (ids, from, mask) = match (layout, peagle) {
            (Layout::Speculators, false) => (&json["aux_hidden_state_layer_ids"], 1, &json["mask_token_id"]),
            (Layout::Speculators, true) => {
                (&json["eagle_aux_hidden_state_layer_ids"], 1, &json["mask_token_id"])
            }
            (Layout::Vllm, true) => (&json["eagle_aux_hidden_state_layer_ids"], 1, &json["pard_token"]),
            // vLLM's DSpark looks at the top, its DFlash and SGLang into the table.
            (Layout::Vllm, false) if spark => (&json["target_layer_ids"], 0, &json["mask_token_id"]),
            (_, true) => (&json["eagle_config"]["eagle_aux_hidden_state_layer_ids"], 0, &json["pard_token"]),
            _ => {
                let table = &json["dflash_config"];
                (&table["target_layer_ids"], 0, &table["mask_token_id"])
            }
        };
        let vocab = number(layer, "vocab_size")? as i64;
        let kinds = layer["layer_types"].as_array().into_iter().flatten();
        Ok(Facts {
            layers: ids
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_i64)
                .map(|id| id - from)
                .collect(),
            mask: mask.as_i64().ok_or_else(|| bad(&path, "mask_token_id"))?,
            block: if peagle { 0 } else { number(&json, "block_size")? as i64 },
            from_anchor: match layout {
                Layout::Vllm | Layout::Speculators if !peagle => json["sample_from_anchor"] == true,
                _ => spark,
            },
            proposes: json["draft_vocab_size"].as_i64().unwrap_or(vocab),
            heads: number(layer, "num_attention_heads")? as usize,
            kv_heads: number(layer, "num_key_value_heads")? as usize,
            head_dim: number(layer, "head_dim")? as usize,
            eps: number(layer, "rms_norm_eps")?,
            rope: Rope::of_json(layer, &number)?,
            norm_before_residual: json["norm_before_residual"] == true,
            window: layer["sliding_window"].as_u64().unwrap_or(0) as usize,
            sliding: kinds.map(|kind| kind == "sliding_attention").collect(),
        })
    }

    fn of_gguf(dir: &Path) -> Result<Facts, BundleError> {
        let file = GgufFile::open(dir.join(GGUF_FILE))?;
        let size = |key: &str| file.get_u32(&format!("dflash.{key}")).map(|n| n as usize);
        let vocab = size("vocab_size")?;
        Ok(Facts {
            layers: file.get_i64_array("dflash.target_layers")?.into_iter().map(|id| id - 1).collect(),
            mask: i64::from(file.get_u32("tokenizer.ggml.mask_token_id")?),
            block: size("block_size")? as i64,
            from_anchor: file
                .find_bool("dflash.sample_from_anchor")?
                .ok_or_else(|| bad(dir, "dflash.sample_from_anchor"))?,
            proposes: vocab as i64,
            heads: size("attention.head_count")?,
            kv_heads: size("attention.head_count_kv")?,
            head_dim: size("attention.key_length")?,
            eps: f64::from(file.get_f32("dflash.attention.layer_norm_rms_epsilon")?),
            rope: Rope::of_gguf(&file, "dflash")?,
            norm_before_residual: false,
            window: file.find_u32("dflash.attention.sliding_window")?.unwrap_or(0) as usize,
            sliding: match file.metadata().iter().find(|(key, _)| key.ends_with("sliding_window_pattern")) {
                Some((_, GgufValue::Array(GgufArray::Bool(pattern)))) => pattern.clone(),
                _ => Vec::new(),
            },
        })
    }
}

/// Tensors of an export by the bundle's names, and names that no engine would take.
pub(crate) fn inventory(
    dir: &Path,
    layout: Layout,
    bundle: &[String],
) -> Result<(BTreeMap<String, Stored>, Vec<String>), BundleError> {
    let file = File::open(dir, layout)?;
    let names: Vec<(String, &String)> =
        bundle.iter().filter_map(|name| Some((published(layout, name)?, name))).collect();
    let left = file.names().into_iter().filter(|p| names.iter().all(|(name, _)| name != p)).collect();
    let stored = names.iter().filter_map(|(name, own)| Some(((*own).clone(), file.find(name)?))).collect();
    Ok((stored, left))
}

/// An export as its engine would run it.
pub(crate) struct Plain {
    pub(crate) facts: Facts,
    frequencies: Vec<f64>,
    vectors: BTreeMap<String, Vec<f64>>,
    matrices: BTreeMap<String, Matrix>,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Plain {
    /// From the facts and the complete tensors of an export.
    pub(crate) fn new(facts: Facts, tensors: BTreeMap<String, Stored>) -> Plain {
        let (mut vectors, mut matrices) = (BTreeMap::new(), BTreeMap::new());
        for (name, stored) in tensors {
            match stored.shape[..] {
                [_] => drop(vectors.insert(name, stored.values)),
                [.., columns] => drop(matrices.insert(name, Matrix { columns, values: stored.values })),
                [] => {}
            }
        }
        Plain { frequencies: facts.rope.frequencies(facts.head_dim), facts, vectors, matrices }
    }

    fn matrix(&self, name: &str) -> &Matrix {
        &self.matrices[name]
    }

    fn row(&self, name: &str, row: u32) -> &[f64] {
        let matrix = self.matrix(name);
        &matrix.values[row as usize * matrix.columns..][..matrix.columns]
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        normed(x, &self.vectors[name], self.facts.eps)
    }

    /// Answers a probe with stored embeddings: hidden state `[H]` of the last slot, and what the network answers a question
    /// with.
    pub(crate) fn answer(&self, input: &ProbeInput) -> (Vec<f32>, Vec<f32>) {
        let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect();
        let features: Vec<f64> = input.features.iter().map(|x| f64::from(*x)).collect();
        let fc = self.matrix("fc.weight");
        let joined: Vec<Vec<f64>> = features.chunks_exact(fc.columns).map(|slot| fc.apply(slot)).collect();
        if self.facts.block == 0 {
            let hidden = self.rollout(joined, input);
            let logits = self.matrix("lm_head.weight").apply(&self.norm(&hidden, "norm.weight"));
            return (narrow(&hidden), narrow(&logits));
        }
        let outputs = self.block(&joined, input);
        let last = outputs.last().expect("a block has a slot");
        let mut answer = last.clone();
        if self.matrices.contains_key("markov_head.markov_w1.weight") {
            answer.extend(self.correction(&outputs, &input.token_ids[joined.len() - 1..]));
        }
        (narrow(last), narrow(&answer))
    }

    /// Outputs `[1 + D, H]` of a block's slots behind the context.
    fn block(&self, joined: &[Vec<f64>], input: &ProbeInput) -> Vec<Vec<f64>> {
        let context: Vec<Vec<f64>> = joined.iter().map(|x| self.norm(x, "hidden_norm.weight")).collect();
        let width = context[0].len();
        let embeddings: Vec<f64> = input.embeddings.iter().map(|x| f64::from(*x)).collect();
        let first = context.len();
        let mut rows: Vec<Vec<f64>> =
            embeddings.chunks_exact(width).skip(first - 1).map(<[f64]>::to_vec).collect();
        for layer in 0.. {
            let name = |rest: &str| format!("layers.{layer}.{rest}");
            if !self.matrices.contains_key(&name("self_attn.q_proj.weight")) {
                break;
            }
            let inputs: Vec<Vec<f64>> =
                rows.iter().map(|x| self.norm(x, &name("input_layernorm.weight"))).collect();
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (position, x) in context.iter().chain(&inputs).enumerate() {
                let (key, value) = self.key_and_value(layer, x, position);
                keys.push(key);
                values.push(value);
            }
            let slides = self.facts.sliding.get(layer).copied().unwrap_or(false);
            for (slot, x) in inputs.iter().enumerate() {
                let position = first + slot;
                let seen: Vec<usize> = (0..keys.len())
                    .filter(|at| match (slides, *at < first) {
                        (false, _) => true,
                        (true, true) => at + self.facts.window > position,
                        (true, false) => *at <= position,
                    })
                    .collect();
                let mixed = self.attention(layer, x, position, &keys, &values, &seen);
                rows[slot] = self.rest_of_layer(layer, &rows[slot], &mixed);
            }
        }
        rows.iter().map(|x| self.norm(x, "norm.weight")).collect()
    }

    /// The Markov head's `[M]` at the last slot, from the token before each.
    fn correction(&self, outputs: &[Vec<f64>], tokens: &[u32]) -> Vec<f64> {
        let mut state: Option<Vec<f64>> = None;
        let mut found = Vec::new();
        for (z, token) in outputs.iter().zip(tokens) {
            let before = self.row("markov_head.markov_w1.weight", *token).to_vec();
            let rank = before.len();
            found = before.clone();
            if let Some(gate) = self.matrices.get("markov_head.gate_proj.weight") {
                let bias = &self.vectors["markov_head.gate_proj.bias"];
                let gate = gate.apply(&[z.as_slice(), &before].concat());
                found = (0..rank).map(|i| sigmoid(gate[i] + bias[i]) * before[i]).collect();
            }
            if let Some(joint) = self.matrices.get("markov_head.joint_proj.weight") {
                let bias = &self.vectors["markov_head.joint_proj.bias"];
                let old = state.unwrap_or_else(|| vec![0.0; rank]);
                let x = joint.apply(&[old.as_slice(), &before, z].concat());
                let x: Vec<f64> = x.iter().zip(bias).map(|(x, b)| x + b).collect();
                let gate = |i: usize| sigmoid(x[i]);
                let new = (0..rank).map(|i| gate(i) * old[i] + (1.0 - gate(i)) * x[rank + i].tanh());
                state = Some(new.collect());
                found = (0..rank).map(|i| x[2 * rank + i].tanh()).collect();
            }
        }
        found
    }

    /// Output `[H]` of P-EAGLE's last layer at the last entry: real slots, then entries of the mask token.
    fn rollout(&self, joined: Vec<Vec<f64>>, input: &ProbeInput) -> Vec<f64> {
        let slots = joined.len();
        let unknown = self.matrix("fc.weight").apply(&self.matrix("mask_hidden").values);
        let count = slots + input.depth as usize;
        let mut rows: Vec<Vec<f64>> = joined;
        rows.resize(count, unknown);
        for layer in 0.. {
            let name = |rest: &str| format!("layers.{layer}.{rest}");
            if !self.matrices.contains_key(&name("self_attn.q_proj.weight")) {
                break;
            }
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (position, row) in rows.iter_mut().enumerate() {
                let mut residual = row.clone();
                let mut x = self.norm(&residual, &name("input_layernorm.weight"));
                if layer == 0 {
                    let token =
                        if position < slots { i64::from(input.token_ids[position]) } else { self.facts.mask };
                    let embedded = self.row("embed_tokens.weight", token as u32);
                    let hidden = self.norm(&residual, &name("hidden_norm.weight"));
                    x = [self.norm(embedded, &name("input_layernorm.weight")), hidden.clone()].concat();
                    if self.facts.norm_before_residual {
                        residual = hidden;
                    }
                }
                let (key, value) = self.key_and_value(layer, &x, position);
                keys.push(key);
                values.push(value);
                let seen: Vec<usize> = (0..=position).collect();
                let mixed = self.attention(layer, &x, position, &keys, &values, &seen);
                *row = self.rest_of_layer(layer, &residual, &mixed);
            }
        }
        rows.pop().expect("a question has a slot")
    }

    fn key_and_value(&self, layer: usize, x: &[f64], position: usize) -> (Vec<f64>, Vec<f64>) {
        let of = |part: &str| self.matrix(&format!("layers.{layer}.self_attn.{part}_proj.weight")).apply(x);
        (self.turned(layer, "k", of("k"), position), of("v"))
    }

    /// Values mixed `[nh hd]` for one query over the rows that it sees.
    fn attention(
        &self,
        layer: usize,
        x: &[f64],
        position: usize,
        keys: &[Vec<f64>],
        values: &[Vec<f64>],
        seen: &[usize],
    ) -> Vec<f64> {
        let Facts { heads, kv_heads, head_dim, .. } = self.facts;
        let query = self.matrix(&format!("layers.{layer}.self_attn.q_proj.weight")).apply(x);
        let query = self.turned(layer, "q", query, position);
        attended(&query, keys, values, seen, [heads, kv_heads, head_dim])
    }

    fn rest_of_layer(&self, layer: usize, residual: &[f64], mixed: &[f64]) -> Vec<f64> {
        let matrix = |rest: &str| self.matrix(&format!("layers.{layer}.{rest}.weight"));
        let output = matrix("self_attn.o_proj").apply(mixed);
        let middle: Vec<f64> = output.iter().zip(residual).map(|(a, b)| a + b).collect();
        let x = self.norm(&middle, &format!("layers.{layer}.post_attention_layernorm.weight"));
        let (gate, up) = (matrix("mlp.gate_proj").apply(&x), matrix("mlp.up_proj").apply(&x));
        let act: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g * sigmoid(*g) * u).collect();
        matrix("mlp.down_proj").apply(&act).iter().zip(&middle).map(|(a, b)| a + b).collect()
    }

    /// Each head normed, where the draft has such norms, and turned by its position, halves against each other.
    fn turned(&self, layer: usize, part: &str, x: Vec<f64>, position: usize) -> Vec<f64> {
        let half = self.facts.head_dim / 2;
        let norm = self.vectors.get(&format!("layers.{layer}.self_attn.{part}_norm.weight"));
        let mut turned = Vec::with_capacity(x.len());
        for head in x.chunks_exact(self.facts.head_dim) {
            let mut head = norm.map_or_else(|| head.to_vec(), |norm| normed(head, norm, self.facts.eps));
            for (i, frequency) in self.frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                (head[i], head[i + half]) =
                    (head[i] * cos - head[i + half] * sin, head[i] * sin + head[i + half] * cos);
            }
            turned.extend(head);
        }
        turned
    }
}
