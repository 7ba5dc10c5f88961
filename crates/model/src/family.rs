//! The families: what each of them is, and by which names its parts go in both containers. One row of [`FAMILIES`] and
//! the class defaults in [`crate::classes`] are a family; the network asks [`crate::TargetConfig`] alone.

use crate::TargetConfig;
use crate::classes::{self, ClassDefaults};
use crate::load::Part;
use crate::moe::{self, ExpertsSpec};

/// Families whose forward is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2/3, SmolLM.
    Llama,
    /// Mistral: Llama with a sliding window on every layer, or on none. In GGUF files it is a Llama.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k, v.
    Qwen2,
    /// Qwen3 dense: norms on q and k heads.
    Qwen3,
    /// Gemma 3 text: four norms a layer, two RoPE bases, sliding windows.
    Gemma3,
    /// Gemma 2: four norms a layer, every second layer with a window, capped logits in attention and head.
    Gemma2,
    /// Phi-3, Phi-3.5 and Phi-4-mini: fused projections, LongRoPE, part of a head turned.
    Phi3,
    /// OLMo 2: norms on outputs only, and on whole queries and keys.
    Olmo2,
    /// SmolLM3: no RoPE in every fourth layer.
    SmolLm3,
    /// Granite 3, dense: multipliers on embeddings, residuals, attention and logits.
    Granite,
    /// GLM-4 of 0414, dense: half of a head turned, in interleaved pairs; norms on outputs, too.
    Glm4,
    /// Qwen3 with experts in all layers or some.
    Qwen3Moe,
    /// gpt-oss: experts, biases everywhere, attention sinks, a sliding window on every other layer.
    GptOss,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 13] = [
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma3,
        Family::Gemma2,
        Family::Phi3,
        Family::Olmo2,
        Family::SmolLm3,
        Family::Granite,
        Family::Glm4,
        Family::Qwen3Moe,
        Family::GptOss,
    ];

    /// `general.architecture` of its GGUF files: Mistral's are Llamas.
    pub fn gguf_architecture(self) -> &'static str {
        self.spec().gguf.unwrap_or(Family::Llama.name())
    }

    /// The word used in configurations.
    pub fn name(self) -> &'static str {
        self.spec().name
    }

    /// The class name in a Hugging Face `config.json`.
    pub fn architecture(self) -> &'static str {
        self.spec().architecture
    }

    pub(crate) fn spec(self) -> &'static Spec {
        // One row each, in the order of the variants: checked by a test.
        &FAMILIES[self as usize]
    }
}

/// Where a layer normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// The inputs of attention and MLP: Llama and most others.
    Pre,
    /// The outputs only: OLMo 2.
    Post,
    /// Inputs and outputs: Gemma, GLM-4.
    Sandwich,
}

impl Norms {
    /// The inputs of attention and MLP have norms.
    pub fn pre(self) -> bool {
        matches!(self, Norms::Pre | Norms::Sandwich)
    }

    /// The outputs of attention and MLP have norms, before they are added to the residual stream.
    pub fn post(self) -> bool {
        matches!(self, Norms::Post | Norms::Sandwich)
    }
}

/// What a stored norm weight means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// RMS norm, the weight as stored.
    Rms,
    /// RMS norm, stored as `w - 1` in safetensors; GGUF files hold `w` (Gemma).
    RmsPlusOne,
}

/// Norms on queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head, one weight of `head_dim` for all heads.
    Head,
    /// Over all heads at once (OLMo 2).
    Full,
}

/// Which layers see a window only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowRule {
    /// The class knows no windows, whatever the file says.
    Never,
    /// Every layer if a window is given.
    EveryLayer,
    /// If `use_sliding_window` says so, `layer_types`, or else the layers from `max_window_layers` on.
    Switched,
    /// `layer_types`, or else all layers but the last of every so many (`sliding_window_pattern`, or this number).
    AllButOneOf(usize),
    /// `layer_types`, or else the first of two.
    Alternate,
    /// `layer_types`, or else, if `use_sliding_window` says so, the layers without RoPE.
    WithoutRope,
}

/// When there are biases on q, k, v.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bias {
    /// Never; `attention_bias` is refused.
    Never,
    /// Always, whatever `attention_bias` says.
    Always,
    /// If `attention_bias` says so.
    Asked {
        /// Where it says nothing.
        default: bool,
        /// On the output projection, too.
        output: bool,
    },
}

/// In which order a container has the rows of queries and keys that RoPE turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopeRows {
    /// First halves, then second halves.
    Halves,
    /// Neighbours.
    Pairs,
}

/// Factor on embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EmbedScale {
    /// None.
    One,
    /// The root of the hidden size.
    RootHidden,
    /// `embedding_multiplier`; so are the other multipliers of Granite.
    Multiplier,
}

/// A family.
pub(crate) struct Spec {
    pub(crate) family: Family,
    /// The word used in configurations.
    pub(crate) name: &'static str,
    /// `model_type` of its configuration class.
    pub(crate) model_type: &'static str,
    /// Class of the model.
    pub(crate) architecture: &'static str,
    /// `general.architecture`; `None` if GGUF files call it something else.
    pub(crate) gguf: Option<&'static str>,
    /// What keys mean that a `config.json` leaves out.
    pub(crate) class: &'static ClassDefaults,
    pub(crate) norms: Norms,
    pub(crate) norm: Norm,
    pub(crate) qk_norm: QkNorm,
    pub(crate) bias: Bias,
    /// `mlp_bias` is read.
    pub(crate) mlp_bias: bool,
    pub(crate) windows: WindowRule,
    /// The same in GGUF files, which have fewer keys; a window where there is no rule is refused.
    pub(crate) gguf_windows: WindowRule,
    pub(crate) embed_scale: EmbedScale,
    /// Two RoPE tables: layers with a window have their own base (`rope_local_base_freq`, `rope.freq_base_swa`).
    pub(crate) local_rope: bool,
    /// `query_pre_attn_scalar` is read.
    pub(crate) query_scalar: bool,
    /// A learnt logit per head that takes its share of the softmax.
    pub(crate) sinks: bool,
    /// Layers may have experts.
    pub(crate) experts: Option<ExpertsSpec>,
    /// `attn_logit_softcapping` and `final_logit_softcapping` are read, with these defaults.
    pub(crate) softcaps: Option<[Option<f64>; 2]>,
    /// Share of a head that is turned where the file says nothing; `None` if the class turns whole heads.
    pub(crate) partial_rotary: Option<f64>,
    /// LongRoPE's original length has a default of the class, and its kind other names.
    pub(crate) own_original: bool,
    /// The last of so many layers has no RoPE (`no_rope_layers`, `no_rope_layer_interval`).
    pub(crate) nope_every: Option<usize>,
    /// Order of q and k rows in safetensors.
    pub(crate) hf_rows: RopeRows,
    /// Order of q and k rows in GGUF files: llama.cpp's converter reorders those of Llama and its kin.
    pub(crate) gguf_rows: RopeRows,
    /// q, k and v are one tensor.
    pub(crate) fused_qkv: bool,
    /// gate and up are one tensor.
    pub(crate) fused_gate_up: bool,
    /// Names that differ from [`common_names`]: part, name in safetensors, name in GGUF.
    pub(crate) names: &'static [(Part, &'static str, &'static str)],
}

const LLAMA: Spec = Spec {
    family: Family::Llama,
    name: "llama",
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    gguf: Some("llama"),
    class: &classes::LLAMA,
    norms: Norms::Pre,
    norm: Norm::Rms,
    qk_norm: QkNorm::None,
    bias: Bias::Asked { default: false, output: true },
    mlp_bias: true,
    windows: WindowRule::Never,
    gguf_windows: WindowRule::EveryLayer,
    embed_scale: EmbedScale::One,
    local_rope: false,
    query_scalar: false,
    sinks: false,
    experts: None,
    softcaps: None,
    partial_rotary: None,
    own_original: false,
    nope_every: None,
    hf_rows: RopeRows::Halves,
    gguf_rows: RopeRows::Pairs,
    fused_qkv: false,
    fused_gate_up: false,
    names: &[],
};

/// What most families that are no Llamas in GGUF files have.
const OTHER: Spec = Spec {
    bias: Bias::Never,
    mlp_bias: false,
    gguf_windows: WindowRule::Never,
    gguf_rows: RopeRows::Halves,
    ..LLAMA
};

const GEMMA3: Spec = Spec {
    family: Family::Gemma3,
    name: "gemma3",
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    gguf: Some("gemma3"),
    class: &classes::GEMMA3,
    norms: Norms::Sandwich,
    norm: Norm::RmsPlusOne,
    qk_norm: QkNorm::Head,
    bias: Bias::Asked { default: false, output: true },
    windows: WindowRule::AllButOneOf(classes::GEMMA3_PATTERN),
    gguf_windows: WindowRule::AllButOneOf(classes::GEMMA3_PATTERN),
    embed_scale: EmbedScale::RootHidden,
    local_rope: true,
    query_scalar: true,
    softcaps: Some([None, None]),
    names: &[
        (Part::MlpNorm, "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
        (Part::AttentionPostNorm, "post_attention_layernorm.weight", "post_attention_norm.weight"),
    ],
    ..OTHER
};

/// All families, in the order of [`Family`].
pub(crate) static FAMILIES: [Spec; 13] = [
    LLAMA,
    Spec {
        family: Family::Mistral,
        name: "mistral",
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        gguf: None,
        class: &classes::MISTRAL,
        bias: Bias::Never,
        mlp_bias: false,
        windows: WindowRule::EveryLayer,
        ..LLAMA
    },
    Spec {
        family: Family::Qwen2,
        name: "qwen2",
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        gguf: Some("qwen2"),
        class: &classes::QWEN2,
        bias: Bias::Always,
        windows: WindowRule::Switched,
        ..OTHER
    },
    Spec {
        family: Family::Qwen3,
        name: "qwen3",
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        gguf: Some("qwen3"),
        class: &classes::QWEN3,
        qk_norm: QkNorm::Head,
        bias: Bias::Asked { default: false, output: true },
        windows: WindowRule::Switched,
        ..OTHER
    },
    GEMMA3,
    Spec {
        family: Family::Gemma2,
        name: "gemma2",
        model_type: "gemma2",
        architecture: "Gemma2ForCausalLM",
        gguf: Some("gemma2"),
        class: &classes::GEMMA2,
        qk_norm: QkNorm::None,
        windows: WindowRule::Alternate,
        gguf_windows: WindowRule::Alternate,
        local_rope: false,
        softcaps: Some([Some(classes::GEMMA2_SOFTCAPS[0]), Some(classes::GEMMA2_SOFTCAPS[1])]),
        ..GEMMA3
    },
    Spec {
        family: Family::Phi3,
        name: "phi3",
        model_type: "phi3",
        architecture: "Phi3ForCausalLM",
        gguf: Some("phi3"),
        class: &classes::PHI3,
        windows: WindowRule::EveryLayer,
        gguf_windows: WindowRule::EveryLayer,
        partial_rotary: Some(1.0),
        own_original: true,
        fused_qkv: true,
        fused_gate_up: true,
        ..OTHER
    },
    Spec {
        family: Family::Olmo2,
        name: "olmo2",
        model_type: "olmo2",
        architecture: "Olmo2ForCausalLM",
        gguf: Some("olmo2"),
        class: &classes::OLMO2,
        norms: Norms::Post,
        qk_norm: QkNorm::Full,
        bias: Bias::Asked { default: false, output: true },
        ..OTHER
    },
    Spec {
        family: Family::SmolLm3,
        name: "smollm3",
        model_type: "smollm3",
        architecture: "SmolLM3ForCausalLM",
        gguf: Some("smollm3"),
        class: &classes::SMOLLM3,
        windows: WindowRule::WithoutRope,
        gguf_windows: WindowRule::Never,
        nope_every: Some(classes::SMOLLM3_NOPE),
        ..LLAMA
    },
    Spec {
        family: Family::Granite,
        name: "granite",
        model_type: "granite",
        architecture: "GraniteForCausalLM",
        gguf: Some("granite"),
        class: &classes::LLAMA,
        gguf_windows: WindowRule::Never,
        embed_scale: EmbedScale::Multiplier,
        ..LLAMA
    },
    Spec {
        family: Family::Glm4,
        name: "glm4",
        model_type: "glm4",
        architecture: "Glm4ForCausalLM",
        gguf: Some("glm4"),
        class: &classes::GLM4,
        norms: Norms::Sandwich,
        bias: Bias::Asked { default: true, output: false },
        partial_rotary: Some(0.5),
        hf_rows: RopeRows::Pairs,
        gguf_rows: RopeRows::Pairs,
        fused_gate_up: true,
        names: &[
            (Part::AttentionPostNorm, "post_self_attn_layernorm.weight", "post_attention_norm.weight"),
            (Part::MlpPostNorm, "post_mlp_layernorm.weight", "post_ffw_norm.weight"),
        ],
        ..OTHER
    },
    Spec {
        family: Family::Qwen3Moe,
        name: "qwen3moe",
        model_type: "qwen3_moe",
        architecture: "Qwen3MoeForCausalLM",
        gguf: Some("qwen3moe"),
        class: &classes::QWEN3_MOE,
        qk_norm: QkNorm::Head,
        windows: WindowRule::Switched,
        experts: Some(moe::QWEN3_MOE),
        ..OTHER
    },
    Spec {
        family: Family::GptOss,
        name: "gpt-oss",
        model_type: "gpt_oss",
        architecture: "GptOssForCausalLM",
        gguf: Some("gpt-oss"),
        class: &classes::GPT_OSS,
        bias: Bias::Asked { default: true, output: true },
        windows: WindowRule::AllButOneOf(2),
        gguf_windows: WindowRule::AllButOneOf(2),
        sinks: true,
        experts: Some(moe::GPT_OSS),
        names: &[
            (Part::MlpNorm, "post_attention_layernorm.weight", "post_attention_norm.weight"),
            (Part::Router, "mlp.router.weight", "ffn_gate_inp.weight"),
            (Part::RouterBias, "mlp.router.bias", "ffn_gate_inp.bias"),
        ],
        ..OTHER
    },
];

impl Spec {
    /// The family that a `model_type` names.
    pub(crate) fn of_model_type(model_type: &str) -> Option<&'static Spec> {
        FAMILIES.iter().find(|spec| spec.model_type == model_type)
    }

    /// The family that a GGUF file's `general.architecture` names.
    pub(crate) fn of_gguf(architecture: &str) -> Option<&'static Spec> {
        FAMILIES.iter().find(|spec| spec.gguf == Some(architecture))
    }

    /// Ids that end an answer where the file names none.
    pub(crate) fn eos_ids(&self) -> Vec<u32> {
        match self.family {
            Family::Glm4 => classes::GLM4_EOS.to_vec(),
            _ => self.class.eos_token_id.into_iter().collect(),
        }
    }

    /// RoPE base of GGUF files that name none.
    pub(crate) fn gguf_theta(&self) -> f64 {
        if self.local_rope { self.class.rope_theta } else { 1e4 }
    }

    /// Names of a part in safetensors and in GGUF files, without what stands before the layer's own part.
    fn names_of(&self, part: Part) -> (&'static str, &'static str) {
        if let Some((_, hf, gguf)) = self.names.iter().find(|(p, ..)| *p == part) {
            return (hf, gguf);
        }
        match part {
            Part::Q | Part::K | Part::V if self.fused_qkv => ("self_attn.qkv_proj.weight", "attn_qkv.weight"),
            Part::Gate | Part::Up if self.fused_gate_up => ("mlp.gate_up_proj.weight", "ffn_up.weight"),
            part => common_names(part),
        }
    }

    /// Where the rows of a part stand in its tensor: the first of them, and how many the tensor has; `None` if it has
    /// the part's rows alone.
    pub(crate) fn rows_of(&self, part: Part, config: &TargetConfig) -> Option<(usize, usize)> {
        let (q, kv, mlp) = (config.q_width(), config.kv_width(), config.intermediate_size);
        let qkv = |from: usize| Some((from, q + 2 * kv));
        match part {
            Part::Q if self.fused_qkv => qkv(0),
            Part::K if self.fused_qkv => qkv(q),
            Part::V if self.fused_qkv => qkv(q + kv),
            Part::Gate if self.fused_gate_up => Some((0, 2 * mlp)),
            Part::Up if self.fused_gate_up => Some((mlp, 2 * mlp)),
            _ => None,
        }
    }

    /// Full name in safetensors; `prefix` stands before everything but the head.
    pub(crate) fn hf_name(&self, part: Part, layer: usize, prefix: &str) -> String {
        let name = self.names_of(part).0;
        match part {
            Part::Head => name.to_owned(),
            Part::Embed | Part::FinalNorm => format!("{prefix}{name}"),
            _ => format!("{prefix}layers.{layer}.{name}"),
        }
    }

    /// Full name in GGUF files.
    pub(crate) fn gguf_name(&self, part: Part, layer: usize) -> String {
        let name = self.names_of(part).1;
        match part {
            Part::Head | Part::Embed | Part::FinalNorm => name.to_owned(),
            _ => format!("blk.{layer}.{name}"),
        }
    }
}

/// Names that most families share: in safetensors, in GGUF.
fn common_names(part: Part) -> (&'static str, &'static str) {
    match part {
        Part::Embed => ("embed_tokens.weight", "token_embd.weight"),
        Part::FinalNorm => ("norm.weight", "output_norm.weight"),
        Part::Head => ("lm_head.weight", "output.weight"),
        Part::InputNorm => ("input_layernorm.weight", "attn_norm.weight"),
        Part::Q => ("self_attn.q_proj.weight", "attn_q.weight"),
        Part::K => ("self_attn.k_proj.weight", "attn_k.weight"),
        Part::V => ("self_attn.v_proj.weight", "attn_v.weight"),
        Part::O => ("self_attn.o_proj.weight", "attn_output.weight"),
        Part::QBias => ("self_attn.q_proj.bias", "attn_q.bias"),
        Part::KBias => ("self_attn.k_proj.bias", "attn_k.bias"),
        Part::VBias => ("self_attn.v_proj.bias", "attn_v.bias"),
        Part::OBias => ("self_attn.o_proj.bias", "attn_output.bias"),
        Part::GateBias => ("mlp.gate_proj.bias", "ffn_gate.bias"),
        Part::UpBias => ("mlp.up_proj.bias", "ffn_up.bias"),
        Part::DownBias => ("mlp.down_proj.bias", "ffn_down.bias"),
        Part::QNorm => ("self_attn.q_norm.weight", "attn_q_norm.weight"),
        Part::KNorm => ("self_attn.k_norm.weight", "attn_k_norm.weight"),
        Part::AttentionPostNorm => ("post_attention_layernorm.weight", "post_attention_norm.weight"),
        Part::MlpNorm => ("post_attention_layernorm.weight", "ffn_norm.weight"),
        Part::Gate => ("mlp.gate_proj.weight", "ffn_gate.weight"),
        Part::Up => ("mlp.up_proj.weight", "ffn_up.weight"),
        Part::Down => ("mlp.down_proj.weight", "ffn_down.weight"),
        Part::MlpPostNorm => ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
        Part::Sinks => ("self_attn.sinks", "attn_sinks.weight"),
        Part::Router => ("mlp.gate.weight", "ffn_gate_inp.weight"),
        Part::RouterBias => ("mlp.gate.bias", "ffn_gate_inp.bias"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_stand_in_the_order_of_their_variants() {
        for (i, (spec, family)) in FAMILIES.iter().zip(Family::ALL).enumerate() {
            assert_eq!((spec.family as usize, family as usize), (i, i), "{}", spec.name);
        }
    }
}
