//! The GGUF layout: names, keys and the ways between them and a draft's configuration [formats §3].
//!
//! Differences from the internal form: rows of q and k in interleaved RoPE order, norms as F32, `d2t` as absolute
//! target ids, no `t2d`, layer numbers from 1, Llama 3's RoPE scaling as one divisor per frequency.

use draftsmith_core::LayerId;
use draftsmith_formats::gguf::{GgufArray, GgufError, GgufFile, GgufValue};
use draftsmith_kernels::{RopeScaling, RopeTable};
use draftsmith_model::DraftConfigError;
use draftsmith_model::draft_layer::LayerShape;
use draftsmith_model::eagle3::{Eagle3Config, Feedback, LAYERS_HINT, SUPPORTED};

use crate::Problem;
use crate::foreign::gguf_keys;

/// `general.architecture`
pub(crate) const ARCHITECTURE: &str = "eagle3";
/// Divisors of the RoPE frequencies.
pub(crate) const ROPE_FREQS: &str = "rope_freqs.weight";
/// Published Llama 3 drafts differ in the factor alone.
const LLAMA3_LOW: f32 = 1.0;
const LLAMA3_HIGH: f32 = 4.0;
const LLAMA3_ORIGINAL: u32 = 8192;

/// Internal name and GGUF name of every tensor that has a place there.
const NAMES: [(&str, &str); 15] = [
    ("fc.weight", "fc.weight"),
    ("input_norm.weight", "enc.output_norm.weight"),
    ("midlayer.input_layernorm.weight", "blk.0.attn_norm.weight"),
    ("midlayer.hidden_norm.weight", "blk.0.attn_norm_2.weight"),
    ("midlayer.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
    ("midlayer.self_attn.k_proj.weight", "blk.0.attn_k.weight"),
    ("midlayer.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ("midlayer.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
    ("midlayer.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ("midlayer.mlp.gate_proj.weight", "blk.0.ffn_gate.weight"),
    ("midlayer.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
    ("midlayer.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
    ("norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
    ("d2t", "d2t"),
];

/// GGUF's name of an internal tensor. `t2d` follows from `d2t`, and norms per captured layer have no place.
pub(crate) fn tensor_name(name: &str) -> Option<&'static str> {
    NAMES.iter().find(|(internal, _)| *internal == name).map(|(_, gguf)| *gguf)
}

/// The internal name of a GGUF tensor.
pub(crate) fn internal_name(name: &str) -> Option<&'static str> {
    NAMES.iter().find(|(_, gguf)| *gguf == name).map(|(internal, _)| *internal)
}

/// True for the projections whose rows are stored in interleaved RoPE order.
pub(crate) fn is_rotated(internal: &str) -> bool {
    internal.ends_with("q_proj.weight") || internal.ends_with("k_proj.weight")
}

/// All keys but the tokenizer's.
pub(crate) fn metadata(
    config: &Eagle3Config,
    name: &str,
    license: &str,
    layers: [u32; 3],
) -> Vec<(String, GgufValue)> {
    let mut keys = gguf_keys::general(ARCHITECTURE, name, license);
    let mut own = |key: &str, value: GgufValue| keys.push((format!("{ARCHITECTURE}.{key}"), value));
    let layer = LayerShape {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        rms_norm_eps: config.rms_norm_eps,
    };
    gguf_keys::layers(&mut own, 1, config.max_position_embeddings, &layer);
    gguf_keys::rope(&mut own, config.head_dim, config.rope_theta, &config.rope_scaling);
    own("vocab_size", gguf_keys::size(config.vocab_size));
    let numbers = layers.map(|id| LayerId(id).as_next_input() as i32);
    own("target_layers", GgufValue::Array(GgufArray::I32(numbers.to_vec())));
    own("target_hidden_size", gguf_keys::size(config.target_hidden_size));
    own("norm_before_residual", GgufValue::Bool(config.norm_before_residual));
    own("norm_before_fc", GgufValue::Bool(config.norm_before_fc));
    keys
}

/// `[hd / 2]` divisors of the RoPE frequencies, for the scalings that are stored as a tensor.
pub(crate) fn rope_divisors(config: &Eagle3Config) -> Option<Vec<f32>> {
    match &config.rope_scaling {
        RopeScaling::None | RopeScaling::Linear { .. } => None,
        RopeScaling::Factors(factors) => Some(factors.clone()),
        scaled @ RopeScaling::Llama3 { .. } => {
            // A frequency is the angle of position 1.
            let frequencies = |scaling: &RopeScaling| -> Vec<f32> {
                let table = RopeTable::new(config.head_dim, config.rope_theta, scaling);
                let (cos, sin) = table.angles(1);
                cos.iter().zip(sin).map(|(c, s)| s.atan2(*c)).collect()
            };
            let (plain, scaled) = (frequencies(&RopeScaling::None), frequencies(scaled));
            Some(plain.iter().zip(&scaled).map(|(p, s)| p / s).collect())
        }
    }
}

/// The configuration that a file's keys and tensors imply.
///
/// `layers` decides in place of the file's own.
///
/// # Errors
/// Broken or missing keys; a variant that has no network here, as a problem.
pub(crate) fn config(
    file: &GgufFile<'_>,
    layers: Option<[u32; 3]>,
) -> Result<Result<Eagle3Config, Problem>, GgufError> {
    let key = |name: &str| format!("{ARCHITECTURE}.{name}");
    let size = |name: &str| file.get_u32(&key(name)).map(|n| n as usize);
    let problem =
        |source: DraftConfigError| Problem::Config { message: source.to_string(), hint: source.hint() };
    let unsupported = |name: &str, found: String| {
        Ok(Err(problem(DraftConfigError::Unsupported { key: key(name), found, supported: SUPPORTED })))
    };
    let (hidden_size, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let head_dim = match file.find_u32(&key("attention.key_length"))? {
        Some(n) => n as usize,
        None => hidden_size / heads.max(1),
    };
    let blocks = size("block_count")?;
    if blocks != 1 {
        return unsupported("block_count", blocks.to_string());
    }
    let target_layer_ids = match layers {
        Some(layers) => Some(layers),
        None => match file.find_i64_array(&key("target_layers"))?.filter(|numbers| !numbers.is_empty()) {
            // Left open: the default.
            None => None,
            Some(numbers) => {
                // Numbers name the layer that reads the state; ours the layer that wrote it.
                let ids: Option<Vec<u32>> =
                    numbers.iter().map(|n| u32::try_from(n.checked_sub(1)?).ok()).collect();
                match ids.and_then(|ids| <[u32; 3]>::try_from(ids).ok()) {
                    Some(ids) => Some(ids),
                    None => {
                        return Ok(Err(problem(DraftConfigError::Layers {
                            key: key("target_layers"),
                            wanted: "three layer numbers, counted from 1",
                            found: format!("{numbers:?}"),
                            hint: LAYERS_HINT,
                        })));
                    }
                }
            }
        },
    };
    let vocab_size = match file.find_u32(&key("vocab_size"))? {
        Some(n) => n as usize,
        None => file.get_str_array("tokenizer.ggml.tokens")?.len(),
    };
    // The head has a row, the map an entry for each id; without either the draft speaks the whole vocabulary.
    let rows = file.find_tensor("output.weight").and_then(|t| t.dims.get(1));
    let entries = file.find_tensor("d2t").and_then(|t| t.dims.first());
    let draft_vocab_size = rows.or(entries).copied().unwrap_or(vocab_size);
    let rope_theta = file.find_f32(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    let rope_scaling = match file.find_str(&key("rope.scaling.type"))? {
        None | Some("none") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: file.get_f32(&key("rope.scaling.factor"))? },
        Some(other) => return unsupported("rope.scaling.type", other.to_owned()),
    };
    let token = |name: &str| file.find_u32(&format!("tokenizer.ggml.{name}"));
    let flag = |name: &str| file.find_bool(&key(name)).map(|f| f.unwrap_or(false));
    let config = Eagle3Config {
        vocab_size,
        draft_vocab_size,
        hidden_size,
        target_hidden_size: size("target_hidden_size")?,
        intermediate_size: size("feed_forward_length")?,
        num_attention_heads: heads,
        num_key_value_heads: file.find_u32(&key("attention.head_count_kv"))?.map_or(heads, |n| n as usize),
        head_dim,
        rms_norm_eps: file.get_f32(&key("attention.layer_norm_rms_epsilon"))?,
        rope_theta,
        rope_scaling,
        max_position_embeddings: size("context_length")?,
        fc_norm: false,
        norm_before_fc: flag("norm_before_fc")?,
        norm_before_residual: flag("norm_before_residual")?,
        feedback: Feedback::PreNorm,
        initializer_range: 0.02,
        target_layer_ids,
        bos_token_id: token("bos_token_id")?,
        eos_token_ids: token("eos_token_id")?.into_iter().collect(),
        pad_token_id: token("padding_token_id")?,
    };
    // Written out and read back, the bounds of every size are those of a `config.json`.
    let checked = config.to_value().and_then(|value| Eagle3Config::from_value(&value));
    Ok(checked.map_err(problem))
}

/// The scaling whose divisors these are, if it is one that a `config.json` can say.
pub(crate) fn scaling_of(divisors: &[f32], config: &Eagle3Config) -> Option<RopeScaling> {
    let factor = divisors.iter().copied().fold(1.0f32, f32::max);
    let candidates = [
        RopeScaling::None,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: LLAMA3_LOW,
            high_freq_factor: LLAMA3_HIGH,
            original_max_position: LLAMA3_ORIGINAL,
        },
    ];
    candidates.into_iter().find(|scaling| {
        let of = Eagle3Config { rope_scaling: scaling.clone(), ..config.clone() };
        let wanted = rope_divisors(&of).unwrap_or_else(|| vec![1.0; config.head_dim / 2]);
        let close = |(w, d): (&f32, &f32)| (w - d).abs() <= 1e-3 * w.abs();
        wanted.len() == divisors.len() && wanted.iter().zip(divisors).all(close)
    })
}
