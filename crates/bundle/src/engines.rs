//! How other engines are started with a draft: the one place that model cards and exports take it from.
//!
//! Flags are those of the engines' own documentation [ecosystem §5]. Numbers are the bundle's recommended setting.

use serde::Serialize;

use crate::foreign::{GGUF_FILE, Layout};
use crate::manifest::{Manifest, TargetInfo};

/// A command of another engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Launch {
    /// Which engine.
    pub engine: &'static str,
    /// Shell lines.
    pub command: String,
}

/// What the target is called by other engines.
pub(crate) fn engine_name(target: &TargetInfo) -> &str {
    target.hub_name.as_deref().unwrap_or("TARGET")
}

/// Commands for the engines that read a layout; `dir` is the folder of the draft.
pub fn launch(manifest: &Manifest, layout: Layout, dir: &str) -> Vec<Launch> {
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
