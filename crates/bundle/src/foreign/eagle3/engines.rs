//! What engines need of such a draft, and how they are started with it: the one place that model cards and exports take
//! it from.
//!
//! Flags are those of the engines' own documentation [ecosystem §5]. Numbers are the bundle's recommended setting.

use draftsmith_core::{LayerId, default_target_layers};
use draftsmith_model::eagle3::{Eagle3Config, Feedback};
use serde_json::{Map, Value};

use crate::Problem;
use crate::engines::{Launch, engine_name};
use crate::foreign::{GGUF_FILE, Layout};
use crate::manifest::Manifest;

/// What SGLang and vLLM need of `config.json` beyond what the network needs [formats, draft folder; eagle3 §1.1].
pub(crate) fn config_problems(
    object: &Map<String, Value>,
    config: &Eagle3Config,
    num_layers: Option<u64>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let text = |v: Option<&Value>| {
        v.map_or_else(|| "absent".to_owned(), |v| v.to_string().chars().take(60).collect())
    };
    let mut need = |key: &str, holds: bool, engine: &'static str, wanted: String| {
        if !holds {
            let found = key.split('.').try_fold(None, |at: Option<&Value>, part| match at {
                None => Ok(object.get(part)),
                Some(value) => value.get(part).map(Some).ok_or(()),
            });
            problems.push(Problem::ConfigKey {
                key: key.to_owned(),
                found: text(found.unwrap_or(None)),
                engine,
                wanted,
            });
        }
    };
    const BOTH: &str = "every engine";
    let architectures: Vec<&str> = object
        .get("architectures")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    need(
        "architectures",
        architectures == ["LlamaForCausalLMEagle3"],
        BOTH,
        "[\"LlamaForCausalLMEagle3\"]".into(),
    );
    need(
        "model_type",
        object.get("model_type").and_then(Value::as_str) == Some("llama"),
        BOTH,
        "\"llama\"".into(),
    );
    // `null` in a typed field breaks loaders that do not expect it, so these keys must be numbers.
    for key in [
        "vocab_size",
        "draft_vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_hidden_layers",
        "max_position_embeddings",
    ] {
        need(
            key,
            object.get(key).is_some_and(|v| v.as_u64().is_some_and(|n| n > 0)),
            BOTH,
            "a positive integer".into(),
        );
    }
    for key in ["rms_norm_eps", "rope_theta"] {
        need(
            key,
            object.get(key).is_some_and(|v| v.as_f64().is_some_and(|n| n > 0.0)),
            BOTH,
            "a positive number".into(),
        );
    }
    need(
        "tie_word_embeddings",
        object.get("tie_word_embeddings") == Some(&Value::Bool(false)),
        BOTH,
        "false: the head is the draft's own".into(),
    );
    let dtype = object.get("torch_dtype").or_else(|| object.get("dtype")).and_then(Value::as_str);
    need("torch_dtype", dtype == Some("bfloat16"), BOTH, "\"bfloat16\"".into());

    // Defaults differ from engine to engine, so the layers are always written, in each engine's numbering.
    let list = |v: Option<&Value>| -> Option<Vec<u64>> { v?.as_array()?.iter().map(Value::as_u64).collect() };
    let ids: Option<[u32; 3]> = config
        .target_layer_ids
        .or_else(|| num_layers.map(|l| default_target_layers(l as u32).map(|LayerId(id)| id)));
    if let Some(ids) = ids {
        let wanted = |offset: u32| ids.map(|id| u64::from(id + offset)).to_vec();
        let nested = object.get("eagle_config").and_then(|e| e.get("eagle_aux_hidden_state_layer_ids"));
        need(
            "eagle_config.eagle_aux_hidden_state_layer_ids",
            list(nested) == Some(wanted(0)),
            "SGLang",
            format!("{:?} (output of layer, from 0)", wanted(0)),
        );
        need(
            "eagle_aux_hidden_state_layer_ids",
            list(object.get("eagle_aux_hidden_state_layer_ids")) == Some(wanted(1)),
            "vLLM",
            format!("{:?} (input of layer)", wanted(1)),
        );
    }
    problems
}

/// Commands for the engines that read a layout; `dir` is the folder of the draft.
pub(crate) fn launch(manifest: &Manifest, layout: Layout, dir: &str) -> Vec<Launch> {
    let target = engine_name(&manifest.target);
    let r = &manifest.recommended;
    let command = |engine, command| Launch { engine, command };
    let vllm = || {
        let config = format!(
            "{{\"method\": \"eagle3\", \"model\": \"{dir}\", \"num_speculative_tokens\": {}, \
             \"draft_tensor_parallel_size\": 1}}",
            r.depth
        );
        command("vLLM", format!("vllm serve {target} --speculative-config '{config}'"))
    };
    match layout {
        Layout::Sglang => vec![
            command(
                "SGLang",
                format!(
                    "python3 -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 \\\n  \
                     --speculative-draft-model-path {dir} --speculative-num-steps {} \
                     --speculative-eagle-topk {} --speculative-num-draft-tokens {}",
                    r.depth,
                    r.top_k.max(1),
                    // The target's own token counts as the root of the proposal.
                    if r.top_k <= 1 { r.depth + 1 } else { r.num_draft_tokens },
                ),
            ),
            command(
                "TensorRT-LLM",
                format!(
                    "printf 'speculative_config:\\n  decoding_type: Eagle3\\n  max_draft_len: {}\\n  \
                     speculative_model: {dir}\\n' > eagle3.yaml\n\
                     trtllm-serve {target} --extra_llm_api_options eagle3.yaml",
                    r.depth
                ),
            ),
        ],
        Layout::Vllm => vec![vllm()],
        // The configuration names target and setting itself.
        Layout::Speculators if manifest.target.hub_name.is_some() => {
            vec![command("vLLM", format!("vllm serve {dir}"))]
        }
        Layout::Speculators => vec![vllm()],
        Layout::Gguf => vec![command(
            "llama.cpp",
            format!(
                "llama-server -m TARGET.gguf -md {dir}/{GGUF_FILE} --spec-type draft-eagle3 --spec-draft-n-max {}",
                r.depth
            ),
        )],
    }
}

/// Why no engine of a layout serves a draft, as a sentence behind a card's commands; `None` if one does.
pub(crate) fn unserved(config: &Eagle3Config, layout: Layout) -> Option<&'static str> {
    let of_31 = config.fc_norm || config.feedback == Feedback::PostNorm;
    (layout == Layout::Gguf && of_31).then_some(
        "llama.cpp has no network for this variant of EAGLE-3 (norms before the fusion, or fed-back normed states).",
    )
}
