//! What is known to break an engine, told before the file is there [eagle3 §1.1, §7; formats §3; ecosystem §1].

use draftsmith_model::eagle3::{Eagle3Config, Feedback};

use crate::engines::Rules;
use crate::foreign::{Layout, TargetFacts};
use crate::manifest::Manifest;

/// What the engines of a layout have against an EAGLE-3 draft alone.
pub(crate) fn lint(
    layout: Layout,
    config: &Eagle3Config,
    manifest: &Manifest,
    target: Option<&TargetFacts<'_>>,
    rules: &mut Rules,
) {
    let mut rule = |breaks: bool, fatal: bool, what: &str| rules.rule(breaks, fatal, what);
    let post_norm = config.feedback == Feedback::PostNorm;
    match layout {
        Layout::Sglang => {
            rule(config.norm_before_residual, true, "`norm_before_residual` is unknown to it");
            rule(config.norm_before_fc, true, "`norm_before_fc` is unknown to it");
            let last = manifest.target.num_layers.saturating_sub(1);
            let captures_last =
                config.target_layer_ids.is_some_and(|ids| ids.iter().any(|id| u64::from(*id) >= last));
            rule(captures_last, true, "it captures before a layer runs, so never what the last layer writes");
        }
        Layout::Vllm | Layout::Speculators => {
            if let Some(target) = target {
                rule(
                    config.head_dim != target.config.head_dim,
                    false,
                    "heads of another width than the target's need pages of another size in its cache",
                );
            }
        }
        Layout::Gguf => {
            rule(config.fc_norm, true, "`fc_norm` has no place in its `eagle3` architecture");
            rule(
                post_norm,
                true,
                "it feeds the state before the last norm back, `norm_output` wants it after",
            );
        }
    }
    if layout != Layout::Gguf {
        rule(config.fc_norm || post_norm, false, "`fc_norm` and `norm_output` need a version from 2026 on");
    }
}
