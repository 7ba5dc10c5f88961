//! What is known to break an engine with a draft that proposes several tokens at once, and how engines are started
//! with one [dflash §3 and §4, formats §1.2, §3].

use draftsmith_model::block::{BlockConfig, MarkovKind};

use super::Parallel;
use crate::engines::{LLAMA_CPP, Launch, Rules, SGLANG, VLLM, engine_name};
use crate::foreign::{GGUF_FILE, Layout};
use crate::manifest::Manifest;

const NO_P_EAGLE: &str = "it has no loader for P-EAGLE; the folder is the one that SpecForge reads";

/// What the engines of a layout have against P-EAGLE.
pub(crate) fn p_eagle_rules(layout: Layout, rules: &mut Rules) {
    rules.rule(layout == Layout::Sglang, false, NO_P_EAGLE);
}

/// What the engines of a layout have against blocks.
pub(crate) fn block_rules(layout: Layout, block: &BlockConfig, rules: &mut Rules) {
    let kind = block.markov().map(|markov| markov.kind);
    let spark = block.spark.is_some();
    rules.rule(
        spark && kind.is_none(),
        true,
        "it knows a DSpark draft by its Markov head, and this one has none (`markov_rank` 0)",
    );
    let vanilla_only = matches!(layout, Layout::Vllm | Layout::Speculators | Layout::Gguf);
    if let Some(kind) = kind {
        rules.rule(
            vanilla_only && kind != MarkovKind::Vanilla,
            true,
            format!("`markov_head_type` `{}` is unknown to it, only `vanilla` is built", kind.name()),
        );
    }
    rules.rule(
        layout == Layout::Gguf && block.spark.is_some_and(|spark| spark.confidence == Some(false)),
        true,
        "its confidence head reads the token before, too (`confidence_head_with_markov`)",
    );
    let slides = block.sliding.contains(&true);
    rules.rule(
        layout == Layout::Gguf && slides,
        false,
        "whether its sliding layers see a block causally, as this draft does, is not known",
    );
    rules.rule(
        layout == Layout::Speculators && slides && block.sliding.contains(&false),
        true,
        "one switch says for all layers whether a block is seen causally, and this draft has both",
    );
    let (part, whole) = (block.draft_vocab_size, block.vocab_size);
    rules.rule(
        part < whole,
        false,
        format!("it proposes from all {whole} ids; here the draft proposes from {part} of them"),
    );
}

/// Commands for the engines that read a layout; `dir` is the folder of the draft.
pub(crate) fn launch(draft: &Parallel<'_>, manifest: &Manifest, layout: Layout, dir: &str) -> Vec<Launch> {
    let target = engine_name(&manifest.target);
    let (block, spark, tokens) = match draft {
        Parallel::Block(block) => (Some(block), block.spark.is_some(), block.proposals()),
        Parallel::PEagle(config) => (None, false, config.num_depths),
    };
    let command = |engine, command| vec![Launch { engine, command }];
    match layout {
        Layout::Sglang => match block {
            None => Vec::new(),
            Some(block) => {
                let (algorithm, size) = if spark { ("DSPARK", "dspark") } else { ("DFLASH", "dflash") };
                command(
                    SGLANG,
                    format!(
                        "python3 -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} \
                         \\\n  --speculative-draft-model-path {dir} --speculative-{size}-block-size {}",
                        block.block_size
                    ),
                )
            }
        },
        // The configuration names target and setting itself.
        Layout::Speculators if manifest.target.hub_name.is_some() => {
            command(VLLM, format!("vllm serve {dir}"))
        }
        Layout::Vllm | Layout::Speculators => {
            let method = match (block.is_some(), spark) {
                (true, true) => "\"dspark\"",
                (true, false) => "\"dflash\"",
                (false, _) => "\"eagle3\", \"parallel_drafting\": true",
            };
            let config = format!(
                "{{\"method\": {method}, \"model\": \"{dir}\", \"num_speculative_tokens\": {tokens}, \
                 \"draft_tensor_parallel_size\": 1}}"
            );
            command(VLLM, format!("vllm serve {target} --speculative-config '{config}'"))
        }
        Layout::Gguf => match block {
            None => Vec::new(),
            Some(_) => {
                let kind = if spark { "draft-dspark" } else { "draft-dflash" };
                command(
                    LLAMA_CPP,
                    format!(
                        "llama-server -m TARGET.gguf -md {dir}/{GGUF_FILE} --spec-type {kind} --spec-draft-n-max \
                         {tokens}"
                    ),
                )
            }
        },
    }
}

/// Why no engine of a layout serves a draft, as a sentence behind a card's commands; `None` if one does.
pub(crate) fn unserved(draft: &Parallel<'_>, layout: Layout) -> Option<&'static str> {
    match draft {
        Parallel::PEagle(_) if layout == Layout::Gguf => Some("llama.cpp has no network for P-EAGLE."),
        Parallel::Block(block) => {
            let vanilla = block.markov().is_some_and(|markov| markov.kind == MarkovKind::Vanilla);
            let missing = block.spark.is_some() && !vanilla;
            match layout {
                Layout::Gguf if missing => Some("llama.cpp has no network for this Markov head."),
                Layout::Vllm if missing => Some("vLLM has no network for this Markov head."),
                _ => None,
            }
        }
        _ => None,
    }
}
