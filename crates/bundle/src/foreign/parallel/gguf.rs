//! llama.cpp's `dflash` architecture: DFlash, and DSpark by the tensors of its Markov head.
//!
//! Rows of q and k stay as they are (its rotation turns halves here), norms and biases are F32, layer numbers count
//! from 1. `block_size`, `attention.causal` and `sample_from_anchor` are always written: tools disagree on what their
//! absence means.

use draftsmith_core::LayerId;
use draftsmith_formats::gguf::{GgufArray, GgufError, GgufFile, GgufValue};
use draftsmith_kernels::RopeScaling;
use draftsmith_model::block::{BlockConfig, MarkovConfig, MarkovKind, SparkConfig};
use draftsmith_model::draft_layer::LayerShape;
use draftsmith_model::{DraftConfigError, DraftSpec};

use crate::Problem;
use crate::foreign::gguf_keys;

/// `general.architecture`
pub(crate) const ARCHITECTURE: &str = "dflash";
/// Key of the mask token.
pub(crate) const MASK_TOKEN: &str = "tokenizer.ggml.mask_token_id";
/// What the architecture covers, as advice.
const SUPPORTED: &str = "use a DFlash or DSpark draft of Qwen3 layers with a vanilla Markov head";
const LAYERS_HINT: &str = "name the target's layers that read the states, counted from 1";

/// Names outside the layers.
const NAMES: [(&str, &str); 7] = [
    ("fc.weight", "fc.weight"),
    ("hidden_norm.weight", "enc.output_norm.weight"),
    ("norm.weight", "output_norm.weight"),
    ("markov_head.markov_w1.weight", "markov_w1.weight"),
    ("markov_head.markov_w2.weight", "markov_w2.weight"),
    ("confidence_head.proj.weight", "conf_proj.weight"),
    ("confidence_head.proj.bias", "conf_proj.bias"),
];
/// Names inside a layer.
const LAYER_NAMES: [(&str, &str); 11] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];

/// GGUF's name of an internal tensor; `None` if it has no place there.
pub(crate) fn tensor_name(internal: &str) -> Option<String> {
    renamed(internal, "layers.", "blk.", |(internal, gguf)| (internal, gguf))
}

/// The internal name of a GGUF tensor.
pub(crate) fn internal_name(gguf: &str) -> Option<String> {
    renamed(gguf, "blk.", "layers.", |(internal, gguf)| (gguf, internal))
}

type Names = (&'static str, &'static str);

fn renamed(name: &str, from: &str, to: &str, turn: impl Fn(Names) -> Names) -> Option<String> {
    let find = |names: &[Names], name: &str| {
        names.iter().map(|pair| turn(*pair)).find(|(from, _)| *from == name).map(|(_, to)| to)
    };
    if let Some(found) = find(&NAMES, name) {
        return Some(found.to_owned());
    }
    let (layer, rest) = name.strip_prefix(from)?.split_once('.')?;
    // `01` is another name than `1`.
    let number: usize = layer.parse().ok().filter(|n: &usize| n.to_string() == layer)?;
    Some(format!("{to}{number}.{}", find(&LAYER_NAMES, rest)?))
}

/// All keys but the tokenizer's; the mask token is one of its keys, too.
pub(crate) fn metadata(
    config: &BlockConfig,
    name: &str,
    license: &str,
    layers: &[u32],
) -> Vec<(String, GgufValue)> {
    let mut keys = gguf_keys::general(ARCHITECTURE, name, license);
    keys.push((MASK_TOKEN.to_owned(), GgufValue::U32(config.mask_token_id)));
    let l = &config.layer;
    let mut own = |key: &str, value: GgufValue| keys.push((format!("{ARCHITECTURE}.{key}"), value));
    gguf_keys::layers(&mut own, config.sliding.len(), config.max_position_embeddings, l);
    own("attention.causal", GgufValue::Bool(false));
    if let Some(window) = config.sliding_window {
        own("attention.sliding_window", gguf_keys::size(window));
        let pattern = GgufArray::Bool(config.sliding.clone());
        own("attention.sliding_window_pattern", GgufValue::Array(pattern));
    }
    gguf_keys::rope(&mut own, l.head_dim, config.rope_theta, &config.rope_scaling);
    own("vocab_size", gguf_keys::size(config.vocab_size));
    own("block_size", gguf_keys::size(config.block_size));
    own("sample_from_anchor", GgufValue::Bool(config.spark.is_some()));
    let numbers = layers.iter().map(|id| LayerId(*id).as_next_input() as i32).collect();
    own("target_layers", GgufValue::Array(GgufArray::I32(numbers)));
    own("target_hidden_size", gguf_keys::size(l.hidden_size));
    keys
}

/// The configuration that a file's keys and tensors imply. `layers` decides in place of the file's own.
///
/// # Errors
/// Broken or missing keys; a variant that has no network here, as a problem.
pub(crate) fn config(
    file: &GgufFile<'_>,
    layers: Option<&[u32]>,
) -> Result<Result<BlockConfig, Problem>, GgufError> {
    let key = |name: &str| format!("{ARCHITECTURE}.{name}");
    let size = |name: &str| file.get_u32(&key(name)).map(|n| n as usize);
    let problem =
        |source: DraftConfigError| Problem::Config { message: source.to_string(), hint: source.hint() };
    let unsupported = |key: String, found: String| {
        Ok(Err(problem(DraftConfigError::Unsupported { key, found, supported: SUPPORTED })))
    };
    let (hidden_size, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let head_dim = match file.find_u32(&key("attention.key_length"))? {
        Some(n) => n as usize,
        None => hidden_size / heads.max(1),
    };
    let blocks = size("block_count")?;
    if blocks == 0 || blocks > file.tensors().len() {
        return unsupported(key("block_count"), format!("{blocks}, of {} tensors", file.tensors().len()));
    }
    let target_layer_ids = match layers {
        Some(layers) => Some(layers.to_vec()),
        None => {
            let numbers = file.get_i64_array(&key("target_layers"))?;
            // Numbers name the layer that reads the state; ours the layer that wrote it.
            let ids: Option<Vec<u32>> =
                numbers.iter().map(|n| u32::try_from(n.checked_sub(1)?).ok()).collect();
            match ids.filter(|ids| !ids.is_empty()) {
                Some(ids) => Some(ids),
                None => {
                    return Ok(Err(problem(DraftConfigError::Layers {
                        key: key("target_layers"),
                        wanted: "a list of layer numbers, counted from 1",
                        found: format!("{numbers:?}").chars().take(80).collect(),
                        hint: LAYERS_HINT,
                    })));
                }
            }
        }
    };
    let vocab_size = match file.find_u32(&key("vocab_size"))? {
        Some(n) => n as usize,
        None => file.get_str_array("tokenizer.ggml.tokens")?.len(),
    };
    let rope_scaling = match file.find_str(&key("rope.scaling.type"))? {
        None | Some("none") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: file.get_f32(&key("rope.scaling.factor"))? },
        Some(other) => return unsupported(key("rope.scaling.type"), other.to_owned()),
    };
    if file.find_bool(&key("attention.causal"))? == Some(true) {
        return unsupported(key("attention.causal"), "true".into());
    }
    // DSpark is told by its tensors; what the key says must agree.
    let spark = spark(file, hidden_size);
    let from_anchor = file.find_bool(&key("sample_from_anchor"))?;
    if from_anchor.is_some_and(|from_anchor| from_anchor != spark.is_some()) {
        let found = format!(
            "{}, {} a Markov head",
            spark.is_none(),
            if spark.is_some() { "with" } else { "without" }
        );
        return unsupported(key("sample_from_anchor"), found);
    }
    // Told again by other keys; a file that says otherwise has no network here.
    for (name, wanted) in [
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("target_hidden_size", hidden_size),
    ] {
        if let Some(found) = file.find_u32(&key(name))?.filter(|found| *found as usize != wanted) {
            return unsupported(key(name), found.to_string());
        }
    }
    let window = file.find_u32(&key("attention.sliding_window"))?.map(|n| n as usize).filter(|n| *n > 0);
    let sliding = match window {
        None => vec![false; blocks],
        Some(_) => match value_of(file, &key("attention.sliding_window_pattern")) {
            Some(GgufValue::Array(GgufArray::Bool(pattern))) if pattern.len() == blocks => pattern.clone(),
            Some(_) => {
                let found = "no flag for each layer".into();
                return unsupported(key("attention.sliding_window_pattern"), found);
            }
            None => vec![true; blocks],
        },
    };
    let token = |name: &str| file.find_u32(&format!("tokenizer.ggml.{name}"));
    let config = BlockConfig {
        vocab_size,
        draft_vocab_size: vocab_size,
        layer: LayerShape {
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            num_attention_heads: heads,
            num_key_value_heads: file
                .find_u32(&key("attention.head_count_kv"))?
                .map_or(heads, |n| n as usize),
            head_dim,
            rms_norm_eps: file.get_f32(&key("attention.layer_norm_rms_epsilon"))?,
        },
        rope_theta: file.find_f32(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling,
        max_position_embeddings: size("context_length")?,
        sliding_window: window.filter(|_| sliding.contains(&true)),
        sliding,
        block_size: size("block_size")?,
        num_target_layers: None,
        mask_token_id: file.get_u32(MASK_TOKEN)?,
        target_layer_ids,
        spark,
        initializer_range: 0.02,
        bos_token_id: token("bos_token_id")?,
        eos_token_ids: token("eos_token_id")?.into_iter().collect(),
        pad_token_id: token("padding_token_id")?,
    };
    // Written out and read back, the bounds of every size are those of a `config.json`.
    let checked = config.to_value().and_then(|value| BlockConfig::from_value(&value));
    Ok(checked.map_err(problem))
}

/// DSpark's heads, by the tensors that are there.
fn spark(file: &GgufFile<'_>, hidden_size: usize) -> Option<SparkConfig> {
    let dims = |name: &str| file.find_tensor(name).and_then(|t| t.dims.first().copied());
    let rank = dims("markov_w1.weight").or(dims("markov_w2.weight"));
    // Either part of the confidence head tells of it, and so the other is missed by name.
    let bias = file.find_tensor("conf_proj.bias").map(|_| 0);
    let confidence = dims("conf_proj.weight").or(bias);
    if rank.is_none() && confidence.is_none() {
        return None;
    }
    Some(SparkConfig {
        markov: rank.filter(|rank| *rank > 0).map(|rank| MarkovConfig { rank, kind: MarkovKind::Vanilla }),
        // Of the output alone it is as wide as that.
        confidence: confidence.map(|width| width != hidden_size && rank.is_some()),
    })
}

/// Any value by its key.
fn value_of<'f>(file: &'f GgufFile<'_>, key: &str) -> Option<&'f GgufValue> {
    file.metadata().iter().find(|(name, _)| name.as_str() == key).map(|(_, value)| value)
}
