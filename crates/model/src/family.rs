//! The families: what each of them is, and by which names its parts go in both containers. One row of [`FAMILIES`] and
//! the class defaults in [`crate::classes`] are a family; the network asks [`crate::TargetConfig`] alone.

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
    /// Qwen3 with experts in all layers or some.
    Qwen3Moe,
    /// gpt-oss: experts, biases everywhere, attention sinks, a sliding window on every other layer.
    GptOss,
}

impl Family {
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
    /// Inputs and outputs: Gemma.
    Sandwich,
}

impl Norms {
    /// The inputs of attention and MLP have norms.
    pub fn pre(self) -> bool {
        matches!(self, Norms::Pre | Norms::Sandwich)
    }

    /// The outputs of attention and MLP have norms, before they are added to the residual stream.
    pub fn post(self) -> bool {
        matches!(self, Norms::Sandwich)
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
}

/// When there are biases on q, k, v.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bias {
    /// Never; `attention_bias` is refused.
    Never,
    /// Always, whatever `attention_bias` says.
    Always,
    /// Always, and on the output too.
    WithOutput,
}

/// Factor on embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EmbedScale {
    /// None.
    One,
    /// The root of the hidden size.
    RootHidden,
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
    pub(crate) windows: WindowRule,
    pub(crate) embed_scale: EmbedScale,
    /// Two RoPE tables: layers with a window have their own base (`rope_local_base_freq`, `rope.freq_base_swa`).
    pub(crate) local_rope: bool,
    /// `query_pre_attn_scalar` is read.
    pub(crate) query_scalar: bool,
    /// A learnt logit per head that takes its share of the softmax.
    pub(crate) sinks: bool,
    /// Layers may have experts.
    pub(crate) experts: Option<ExpertsSpec>,
    /// GGUF files have the rows of q and k in the order of interleaved pairs (llama.cpp's conversion of Llamas).
    pub(crate) gguf_pairs: bool,
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
    bias: Bias::Never,
    windows: WindowRule::Never,
    embed_scale: EmbedScale::One,
    local_rope: false,
    query_scalar: false,
    sinks: false,
    experts: None,
    gguf_pairs: true,
    names: &[],
};

/// All families, in the order of [`Family`].
pub(crate) static FAMILIES: [Spec; 7] = [
    LLAMA,
    Spec {
        family: Family::Mistral,
        name: "mistral",
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        gguf: None,
        class: &classes::MISTRAL,
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
        gguf_pairs: false,
        ..LLAMA
    },
    Spec {
        family: Family::Qwen3,
        name: "qwen3",
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        gguf: Some("qwen3"),
        class: &classes::QWEN3,
        qk_norm: QkNorm::Head,
        windows: WindowRule::Switched,
        gguf_pairs: false,
        ..LLAMA
    },
    Spec {
        family: Family::Gemma3,
        name: "gemma3",
        model_type: "gemma3_text",
        architecture: "Gemma3ForCausalLM",
        gguf: Some("gemma3"),
        class: &classes::GEMMA3,
        norms: Norms::Sandwich,
        norm: Norm::RmsPlusOne,
        qk_norm: QkNorm::Head,
        windows: WindowRule::AllButOneOf(classes::GEMMA3_PATTERN),
        embed_scale: EmbedScale::RootHidden,
        local_rope: true,
        query_scalar: true,
        gguf_pairs: false,
        names: &[
            (Part::MlpNorm, "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
            (Part::AttentionPostNorm, "post_attention_layernorm.weight", "post_attention_norm.weight"),
        ],
        ..LLAMA
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
        gguf_pairs: false,
        ..LLAMA
    },
    Spec {
        family: Family::GptOss,
        name: "gpt-oss",
        model_type: "gpt_oss",
        architecture: "GptOssForCausalLM",
        gguf: Some("gpt-oss"),
        class: &classes::GPT_OSS,
        bias: Bias::WithOutput,
        windows: WindowRule::AllButOneOf(2),
        sinks: true,
        experts: Some(moe::GPT_OSS),
        gguf_pairs: false,
        names: &[
            (Part::MlpNorm, "post_attention_layernorm.weight", "post_attention_norm.weight"),
            (Part::Router, "mlp.router.weight", "ffn_gate_inp.weight"),
            (Part::RouterBias, "mlp.router.bias", "ffn_gate_inp.bias"),
        ],
        ..LLAMA
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

    /// RoPE base of GGUF files that name none.
    pub(crate) fn gguf_theta(&self) -> f64 {
        if self.local_rope { self.class.rope_theta } else { 1e4 }
    }

    /// Names of a part in safetensors and in GGUF files, without what stands before the layer's own part.
    fn names_of(&self, part: Part) -> (&'static str, &'static str) {
        match self.names.iter().find(|(p, ..)| *p == part) {
            Some((_, hf, gguf)) => (hf, gguf),
            None => common_names(part),
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
        Part::QNorm => ("self_attn.q_norm.weight", "attn_q_norm.weight"),
        Part::KNorm => ("self_attn.k_norm.weight", "attn_k_norm.weight"),
        Part::AttentionPostNorm => ("post_attention_layernorm.weight", "post_attention_norm.weight"),
        Part::MlpNorm => ("post_attention_layernorm.weight", "ffn_norm.weight"),
        Part::Gate => ("mlp.gate_proj.weight", "ffn_gate.weight"),
        Part::Up => ("mlp.up_proj.weight", "ffn_up.weight"),
        Part::Down => ("mlp.down_proj.weight", "ffn_down.weight"),
        Part::MlpPostNorm => ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
        Part::OBias => ("self_attn.o_proj.bias", "attn_output.bias"),
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
        for (i, spec) in FAMILIES.iter().enumerate() {
            assert_eq!(spec.family as usize, i, "{}", spec.name);
        }
    }
}
