//! The size of a draft by rule (`draft.size = "auto"`).
//!
//! A draft pays when a proposal is cheap beside a pass of the target. With one row both wait for memory, so the bytes of
//! their weights stand for time; they are known before any work, and the same on every machine, so that a run resumes
//! with the draft it began. What a proposal reads is counted as decoding packs it: eight bits a weight.

use std::fmt;
use std::path::Path;

use draftsmith_formats::run::{DraftInit, DraftSize, DraftTable};
use draftsmith_kernels::PackMode;
use draftsmith_model::{DraftConfig, MlpKind, TargetConfig};

use crate::disk::human;

/// Share of a pass that a proposal reads at most.
const SHARE: f64 = 0.04;
/// Vocabularies, smallest first.
const VOCABULARIES: [u32; 4] = [4096, 8192, 16_384, 32_768];
/// Layers of a block draft at most: more have paid with a hundred times the data alone [dflash §1.3].
const MOST_LAYERS: u32 = 3;

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decided {
    vocab_size: u32,
    intermediate: u32,
    layers: u32,
    /// Bytes that a proposal reads, and a pass of the target.
    bytes: [u64; 2],
}

impl fmt::Display for Decided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decided { vocab_size, intermediate, layers, bytes: [draft, pass] } = *self;
        let share = 100.0 * draft as f64 / pass.max(1) as f64;
        let layers = match layers {
            1 => "1 layer".to_owned(),
            n => format!("{n} layers"),
        };
        write!(
            f,
            "draft.size = \"auto\": {layers}, draft.intermediate = {intermediate}, draft.vocab_size = {vocab_size}; a \
             proposal reads {}, {share:.1} % of a pass",
            human(draft)
        )?;
        match draft as f64 > SHARE * pass as f64 {
            true => write!(f, " (the smallest draft of this width: expect little gain on so small a target)"),
            false => Ok(()),
        }
    }
}

/// Bytes of weights that a token of the target reads: those of its files, without an embedding that is not the head, and
/// of experts the share that computes a token.
pub(crate) fn pass_bytes(target: &Path, config: &TargetConfig) -> u64 {
    let weights = |path: &Path| {
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        matches!(ending, "safetensors" | "gguf")
            .then(|| std::fs::metadata(path).map_or(0, |meta| meta.len()))
            .unwrap_or(0)
    };
    let bytes: u64 = match std::fs::read_dir(target) {
        Ok(entries) => entries.flatten().map(|entry| weights(&entry.path())).sum(),
        Err(_) => std::fs::metadata(target).map_or(0, |meta| meta.len()),
    };
    let (all, read) = parameters(config);
    (bytes as f64 * read as f64 / all.max(1) as f64) as u64
}

/// Weights of all matrices, and those that a token reads.
fn parameters(c: &TargetConfig) -> (u64, u64) {
    let h = c.hidden_size as u64;
    let attention = 2 * h * (c.head_dim * (c.num_heads + c.num_kv_heads)) as u64;
    let mut layers = [c.num_layers as u64 * attention; 2];
    for kind in &c.mlps {
        let (all, used) = match (kind, &c.experts) {
            (MlpKind::Experts, Some(experts)) => {
                let expert = 3 * h * experts.width as u64;
                (experts.routing.experts as u64 * expert, experts.routing.used as u64 * expert)
            }
            _ => {
                let mlp = 3 * h * c.intermediate_size as u64;
                (mlp, mlp)
            }
        };
        layers[0] += all;
        layers[1] += used;
    }
    let head = h * c.vocab_size as u64;
    (layers[0] + if c.tied { head } else { 2 * head }, layers[1] + head)
}

/// Fills in the sizes of a draft that leaves them to the target; `None` if it says them itself.
/// `pass_bytes` looks at the target's files, and is asked only then.
pub(crate) fn decide(
    table: &mut DraftTable,
    target: &TargetConfig,
    pass_bytes: impl FnOnce() -> u64,
) -> Option<Decided> {
    if table.size != DraftSize::Auto {
        return None;
    }
    let pass_bytes = pass_bytes();
    let has_layers = table.layers_mut().is_some();
    let h = target.hidden_size as u32;
    let vocabularies: Vec<u32> = match VOCABULARIES.map(|v| v.min(target.vocab_size as u32)) {
        all if all[0] < VOCABULARIES[0] => vec![all[0]],
        all => all.to_vec(),
    };
    let width = |times_half: u32| (h * times_half / 2).next_multiple_of(64);
    let sized = |(vocab_size, intermediate, layers): (u32, u32, u32)| {
        let mut table = table.clone();
        table.vocab_size = vocab_size;
        table.intermediate = Some(intermediate);
        table.init = DraftInit::Random;
        if let Some(own) = table.layers_mut() {
            *own = layers;
        }
        let draft = DraftConfig::from_table(&table, target, vocab_size as usize).ok()?;
        Some((table, draft.work(draft.tokens_per_pass(), PackMode::Q8).bytes))
    };
    let limit = SHARE * pass_bytes as f64;
    let mut best = (vocabularies[0], width(1), 1);
    // What a draft gains most from first; each where there is room for it.
    let steps: [(usize, u32, u32); 9] = [
        (0, 2, 1),
        (1, 2, 1),
        (1, 3, 1),
        (1, 4, 1),
        (1, 4, 2),
        (2, 4, 2),
        (2, 6, 2),
        (2, 6, MOST_LAYERS),
        (3, 6, MOST_LAYERS),
    ];
    for (vocabulary, halves, layers) in steps {
        let layers = if has_layers { layers } else { 1 };
        let next = (vocabularies[vocabulary.min(vocabularies.len() - 1)], width(halves), layers);
        match sized(next) {
            Some((_, bytes)) if bytes as f64 <= limit => best = next,
            _ => break,
        }
    }
    // Shapes that do not fit together are told by whoever checks them, with these sizes.
    let (decided, bytes) = sized(best).unwrap_or_else(|| (table.clone(), 0));
    *table = decided;
    table.size = DraftSize::Written;
    Some(Decided { vocab_size: best.0, intermediate: best.1, layers: best.2, bytes: [bytes, pass_bytes] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use draftsmith_formats::hf_config::HfConfig;
    use draftsmith_formats::run::Method;
    use draftsmith_model::methods;

    /// Qwen2.5-Coder-0.5B's shapes.
    fn target() -> TargetConfig {
        let json = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936,
            "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "intermediate_size": 4864, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
            "tie_word_embeddings": true}"#;
        TargetConfig::from_hf(&HfConfig::parse(Path::new("config.json"), json.as_bytes()).unwrap()).unwrap()
    }

    fn table(method: &'static str) -> DraftTable {
        let mut table = DraftTable::of(Method::of(method));
        table.size = DraftSize::Auto;
        table
    }

    #[test]
    fn a_proposal_reads_a_small_share_of_a_pass() {
        for method in methods().iter().map(|word| word.name) {
            let mut last = 0;
            for pass in [50_000_000, 400_000_000, 1_000_000_000, 8_000_000_000] {
                let mut table = table(method);
                let decided = decide(&mut table, &target(), || pass).unwrap();
                assert_eq!(table.size, DraftSize::Written);
                assert_eq!(
                    (table.vocab_size, table.intermediate),
                    (decided.vocab_size, Some(decided.intermediate))
                );
                let smallest = decided.vocab_size == 4096 && decided.intermediate == 448;
                assert!(smallest || decided.bytes[0] as f64 <= 0.04 * pass as f64, "{method} {decided}");
                assert!(decided.bytes[0] >= last, "{method}: a larger target has no smaller draft");
                last = decided.bytes[0];
            }
        }
    }

    #[test]
    fn a_half_billion_parameters_carry_a_layer_and_eight_thousand_tokens() {
        let mut table = table("dspark");
        let decided = decide(&mut table, &target(), || 397_000_000).unwrap();
        assert_eq!((decided.vocab_size, decided.layers), (8192, 1), "{decided}");
        assert_eq!(table.dspark.layers, 1);
        assert_eq!(table.init, DraftInit::Random);
    }

    #[test]
    fn sizes_that_are_written_stay() {
        let mut table = DraftTable::default();
        let before = table.clone();
        assert_eq!(decide(&mut table, &target(), || unreachable!("sizes are written")), None);
        assert_eq!(table, before);
    }

    #[test]
    fn parameters_are_those_of_the_model() {
        // 494 million, of which the embedding, which is the head, is read in every pass.
        let (all, read) = parameters(&target());
        assert_eq!(all, read);
        assert!((493_000_000..495_000_000).contains(&all), "{all}");
    }
}
