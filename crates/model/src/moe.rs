//! What a configuration says about experts: how many, who computes a token, which layers have them.

use draftsmith_formats::gguf::GgufFile;
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_kernels::Activation;
use draftsmith_kernels::experts::Routing;

use crate::ModelError;

/// How a folder holds its experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpertFiles {
    /// A tensor for each.
    Single,
    /// One tensor for all, gate and up in turn.
    Fused,
}

/// The experts of a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExpertsSpec {
    /// How a folder holds them.
    pub(crate) files: ExpertFiles,
    /// The router and all experts have biases.
    pub(crate) biases: bool,
    /// Whether the weights of the chosen experts sum to one: `None` if `norm_topk_prob` says so.
    pub(crate) normalised: Option<bool>,
    /// Key of an expert's width.
    pub(crate) width_key: &'static str,
    /// The non-linearity is clamped (`swiglu_alpha`, `swiglu_limit`).
    pub(crate) clamped: bool,
    /// Sizes that a `config.json` leaves out: experts, experts of a token, width.
    pub(crate) class: [usize; 3],
}

/// Qwen3-MoE.
pub(crate) const QWEN3_MOE: ExpertsSpec = ExpertsSpec {
    files: ExpertFiles::Single,
    biases: false,
    normalised: None,
    width_key: "moe_intermediate_size",
    clamped: false,
    class: [128, 8, 768],
};

/// gpt-oss.
pub(crate) const GPT_OSS: ExpertsSpec = ExpertsSpec {
    files: ExpertFiles::Fused,
    biases: true,
    normalised: Some(true),
    width_key: "intermediate_size",
    clamped: true,
    class: [128, 4, 2880],
};

/// `swiglu_alpha` and `swiglu_limit` of gpt-oss.
const SWIGLU: (f64, f64) = (1.702, 7.0);

/// The experts of a target's layers.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// How a token finds its experts.
    pub routing: Routing,
    /// Width of an expert.
    pub width: usize,
    /// The router and all experts have biases.
    pub biases: bool,
    /// How a folder holds them.
    pub(crate) files: ExpertFiles,
    /// `[layers]`: which layers have experts; the others have one MLP.
    pub layers: Vec<bool>,
}

impl ExpertsConfig {
    fn check(self, place: String) -> Result<ExpertsConfig, ModelError> {
        let Routing { experts, used, .. } = self.routing;
        let what = match (experts, used) {
            (0, _) => "0 experts".to_owned(),
            (_, 0) => format!("0 of {experts} experts compute a token"),
            _ if used > experts => format!("{used} of {experts} experts compute a token"),
            _ if experts > 1 << 16 => format!("{experts} experts"),
            _ if self.width == 0 || self.width > 1 << 24 => format!("experts of width {}", self.width),
            _ => return Ok(self),
        };
        Err(ModelError::Shapes { place, what })
    }
}

/// Reads a `config.json`.
pub(crate) fn from_hf(
    config: &HfConfig,
    spec: &ExpertsSpec,
    num_layers: usize,
) -> Result<ExpertsConfig, ModelError> {
    let place = config.path().display().to_string();
    refuse_unbuilt_hf(config, &place)?;
    let [experts, used, width] = spec.class;
    // transformers 5 writes the second name for both families, older versions the first for Qwen.
    let experts = match config.find_usize("num_experts")? {
        Some(n) => n,
        None => config.find_usize("num_local_experts")?.unwrap_or(experts),
    };
    let normalised = match spec.normalised {
        Some(normalised) => normalised,
        None => config.find_bool("norm_topk_prob")?.unwrap_or(false),
    };
    let step = config.find_usize("decoder_sparse_step")?.unwrap_or(1);
    let dense = config.find_usize_list("mlp_only_layers")?.unwrap_or_default();
    if step == 0 {
        return Err(ModelError::Shapes { place, what: "`decoder_sparse_step` is 0".into() });
    }
    if let Some(layer) = dense.iter().find(|layer| **layer >= num_layers) {
        let what = format!("`mlp_only_layers` names layer {layer} of {num_layers}");
        return Err(ModelError::Shapes { place, what });
    }
    let layers = (0..num_layers).map(|l| !dense.contains(&l) && (l + 1).is_multiple_of(step)).collect();
    let used = config.find_usize("num_experts_per_tok")?.unwrap_or(used);
    ExpertsConfig {
        routing: Routing { experts, used, normalised },
        width: config.find_usize(spec.width_key)?.unwrap_or(width),
        biases: spec.biases,
        files: spec.files,
        layers,
    }
    .check(place)
}

/// Router options of other families, which change what a token is computed by.
fn refuse_unbuilt_hf(config: &HfConfig, place: &str) -> Result<(), ModelError> {
    let refuse = |what: String| Err(ModelError::Unsupported { place: place.to_owned(), what });
    for key in [
        "n_shared_experts",
        "num_shared_experts",
        "num_fused_shared_experts",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
    ] {
        if config.find_usize(key)?.unwrap_or(0) > 0 {
            return refuse(format!("shared experts (`{key}`)"));
        }
    }
    for key in ["n_group", "topk_group", "num_expert_group"] {
        if config.find_usize(key)?.unwrap_or(0) > 1 {
            return refuse(format!("experts chosen by groups (`{key}`)"));
        }
    }
    for key in ["scoring_func", "score_function", "score_func", "moe_router_score_function"] {
        if let Some(found) = config.find_str(key)?.filter(|found| *found != "softmax") {
            return refuse(format!("a router that scores by `{found}` (`{key}`)"));
        }
    }
    if let Some(found) = config.find_str("topk_method")?.filter(|found| *found != "greedy") {
        return refuse(format!("a router that chooses by `{found}` (`topk_method`)"));
    }
    for key in ["routed_scaling_factor", "router_scaling_factor"] {
        if let Some(factor) = config.find_f64(key)?.filter(|factor| *factor != 1.0) {
            return refuse(format!("experts' outputs times {factor} (`{key}`)"));
        }
    }
    if config.find_bool("use_routing_bias")?.unwrap_or(false) {
        return refuse("a router whose choice has a bias of its own (`use_routing_bias`)".into());
    }
    if config.find_usize("first_k_dense_replace")?.unwrap_or(0) > 0 {
        return refuse("a number of first layers without experts (`first_k_dense_replace`)".into());
    }
    Ok(())
}

/// Reads GGUF metadata.
pub(crate) fn from_gguf(
    file: &GgufFile<'_>,
    arch: &str,
    spec: &ExpertsSpec,
    num_layers: usize,
) -> Result<ExpertsConfig, ModelError> {
    let place = file.path().map_or_else(|| "GGUF".to_owned(), |p| p.display().to_string());
    let key = |name: &str| format!("{arch}.{name}");
    let refuse = |what: String| Err(ModelError::Unsupported { place: place.clone(), what });
    for name in ["expert_shared_count", "expert_shared_feed_forward_length"] {
        if file.find_u64(&key(name))?.unwrap_or(0) > 0 {
            return refuse(format!("shared experts (`{}`)", key(name)));
        }
    }
    for name in ["expert_group_count", "expert_group_used_count"] {
        if file.find_u64(&key(name))?.unwrap_or(0) > 1 {
            return refuse(format!("experts chosen by groups (`{}`)", key(name)));
        }
    }
    // Softmax over all experts, or over the chosen ones: the same where weights are normalised.
    match file.find_u32(&key("expert_gating_func"))?.unwrap_or(0) {
        0 | 1 => {}
        3 if spec.normalised == Some(true) => {}
        2 => return refuse(format!("a router that scores by sigmoid (`{}`)", key("expert_gating_func"))),
        other => return refuse(format!("router function {other} (`{}`)", key("expert_gating_func"))),
    }
    if let Some(scale) = file.find_f32(&key("expert_weights_scale"))?.filter(|s| *s != 0.0 && *s != 1.0) {
        return refuse(format!("experts' outputs times {scale} (`{}`)", key("expert_weights_scale")));
    }
    // Files of Qwen3-MoE need not say it: llama.cpp normalises there.
    let normalised = match spec.normalised {
        Some(normalised) => normalised,
        None => file.find_bool(&key("expert_weights_norm"))?.unwrap_or(true),
    };
    let width = match file.find_u64(&key("expert_feed_forward_length"))? {
        Some(width) => width,
        None => file.get_u64(&key("feed_forward_length"))?,
    };
    ExpertsConfig {
        routing: Routing {
            experts: file.get_u64(&key("expert_count"))? as usize,
            used: file.get_u64(&key("expert_used_count"))? as usize,
            normalised,
        },
        width: width as usize,
        biases: spec.biases,
        files: spec.files,
        // No key says which layers have one MLP only.
        layers: (0..num_layers)
            .map(|l| file.find_tensor(&format!("blk.{l}.ffn_gate.weight")).is_none())
            .collect(),
    }
    .check(place)
}

/// gpt-oss' non-linearity; `config` is absent for GGUF files, which do not name its numbers.
pub(crate) fn clamped(config: Option<&HfConfig>) -> Result<Activation, ModelError> {
    let number = |key: &str, default: f64| -> Result<f64, ModelError> {
        let found = config.map(|c| c.find_f64(key)).transpose()?.flatten();
        Ok(found.unwrap_or(default))
    };
    let (alpha, limit) = (number("swiglu_alpha", SWIGLU.0)?, number("swiglu_limit", SWIGLU.1)?);
    Ok(Activation::ClampedSwiglu { alpha: alpha as f32, limit: limit as f32 })
}
