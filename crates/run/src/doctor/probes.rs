//! The settings that a draft may have been trained with although its folder says otherwise: each one is a known way in
//! which drafts are stored or read wrongly.
//!
//! They stand from what one key corrects to what no key says: where two do equally well, the earlier one is meant.

use draftsmith_bundle::Layout;
use draftsmith_core::VocabMap;
use draftsmith_kernels::RopeScaling;
use draftsmith_model::block::SparkConfig;
use draftsmith_model::eagle3::Feedback;
use draftsmith_model::{DraftConfig, Published, TargetConfig};

use super::keys::Words;
use super::setting::{Copies, Feed, Setting, Source, WeightChange};
use super::texts::Tap;

/// A setting to try.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    /// Stable name.
    pub(crate) id: &'static str,
    /// What would be wrong, as a sentence.
    pub(crate) what: String,
    /// The key or tensor in the folder that it is about.
    pub(crate) key: String,
    /// What to write in its place, or to do where no key says it.
    pub(crate) write: String,
    /// The setting.
    pub(crate) setting: Setting,
    /// One of many of its kind, looked at on few texts first.
    pub(crate) is_one_of_many: bool,
}

/// What probes know beside the setting.
pub(crate) struct Facts<'a> {
    /// Its folder's words.
    pub(crate) words: &'a Words,
    /// The target.
    pub(crate) target: &'a TargetConfig,
    /// Tokens that may be the mask.
    pub(crate) mask_tokens: &'a [u32],
    /// Matrices that came along.
    pub(crate) copies: &'a Copies,
    /// The copy of the embedding is not the target's.
    pub(crate) is_other_embedding: bool,
    /// The copy of the head is not the target's.
    pub(crate) is_other_head: bool,
    /// Layers (0-based) that another key of the folder names.
    pub(crate) other_layers: Option<Vec<u32>>,
}

/// Everything that applies to a setting, itself and what has no effect left out.
pub(crate) fn probes(setting: &Setting, facts: &Facts<'_>) -> Vec<Probe> {
    let mut list = List { setting, facts, probes: Vec::new() };
    list.layers();
    list.vocabulary();
    list.switches();
    list.numbers();
    list.block();
    list.feeds();
    list.weights();
    list.probes
}

struct List<'a> {
    setting: &'a Setting,
    facts: &'a Facts<'a>,
    probes: Vec<Probe>,
}

fn json<T: std::fmt::Display>(list: impl IntoIterator<Item = T>) -> String {
    let words: Vec<String> = list.into_iter().map(|n| n.to_string()).collect();
    format!("[{}]", words.join(", "))
}

impl List<'_> {
    fn add(
        &mut self,
        id: &'static str,
        what: impl Into<String>,
        (key, write): (String, String),
        change: impl FnOnce(&mut Setting),
    ) {
        let mut setting = self.setting.clone();
        change(&mut setting);
        let again = self.probes.iter().any(|probe| probe.setting.is_as(&setting));
        if !self.setting.is_as(&setting) && !again && setting.config.check().is_ok() {
            let (what, is_one_of_many) = (what.into(), matches!(id, "mask_token" | "block_size"));
            self.probes.push(Probe { id, what, key, write, setting, is_one_of_many });
        }
    }

    // --- captured layers ---

    fn taps(&mut self, id: &'static str, what: &str, taps: Vec<Tap>) {
        let (key, from) = self.facts.words.layers();
        // A state before the first layer has number -1 where layers are counted from 0.
        let number = |tap: &Tap| match tap {
            Tap::Embedding => i64::from(from) - 1,
            Tap::Layer(id) => i64::from(id + from),
            Tap::Final => self.facts.target.num_layers as i64 - 1 + i64::from(from),
        };
        let numbers = json(taps.iter().map(number));
        let says_so = !taps.contains(&Tap::Final) && !taps.contains(&Tap::Embedding);
        let zero_based = json(taps.iter().filter_map(|tap| match tap {
            Tap::Layer(id) => Some(id),
            Tap::Embedding | Tap::Final => None,
        }));
        let write = match says_so {
            true => format!(
                "{numbers}, or import it with `--layers {}`",
                zero_based.trim_matches(['[', ']']).replace(", ", ",")
            ),
            false => format!("{numbers}, in an engine that can capture {}", named(&taps)),
        };
        self.add(id, what, (key, write), |s| s.taps = taps);
    }

    fn layers(&mut self) {
        let layers = self.facts.target.num_layers as u32;
        let own = self.setting.taps.clone();
        let moved = |by: i64| -> Option<Vec<Tap>> {
            own.iter()
                .map(|tap| match tap {
                    Tap::Layer(id) => match i64::from(*id) + by {
                        -1 => Some(Tap::Embedding),
                        n if n >= 0 && n < i64::from(layers) => Some(Tap::Layer(n as u32)),
                        _ => None,
                    },
                    Tap::Embedding if by == 1 => Some(Tap::Layer(0)),
                    Tap::Embedding | Tap::Final => None,
                })
                .collect()
        };
        if let Some(other) = &self.facts.other_layers {
            let taps = other.iter().map(|id| Tap::Layer(*id)).collect();
            self.taps(
                "layers_of_the_other_key",
                "two keys name different layers, and the other one is right",
                taps,
            );
        }
        if let Some(taps) = moved(-1) {
            let what = "the captured layers are counted one too high: what is read as a layer's output is meant as its \
                        input";
            self.taps("layers_one_too_high", what, taps);
        }
        if let Some(taps) = moved(1) {
            let what = "the captured layers are counted one too low: what is read as a layer's input is meant as its \
                        output";
            self.taps("layers_one_too_low", what, taps);
        }
        if own.len() > 1 {
            let mut sorted = own.clone();
            sorted.sort_unstable();
            self.taps("layers_out_of_order", "the captured layers are not in ascending order", sorted);
            let reversed = own.iter().rev().copied().collect();
            self.taps("layers_reversed", "the captured layers are joined in the other order", reversed);
        }
        let defaults: Vec<(&str, Vec<i64>)> = {
            let l = i64::from(layers);
            let usual = self.setting.config.default_layers(layers).iter().map(|id| i64::from(*id)).collect();
            let mut list = vec![("the usual ones of its kind", usual)];
            if own.len() == 3 {
                // SpecForge's are those of SGLang and vLLM, [2, L/2, L-3], counted from 0 by output.
                list.push(("SpecForge's, SGLang's and vLLM's", vec![1, l / 2 - 1, l - 4]));
                list.push(("[2, L/2, L-3] counted from 0", vec![2, l / 2, l - 3]));
                list.push(("the first, middle and last", vec![0, l / 2, l - 1]));
            }
            list
        };
        for (name, ids) in defaults {
            if ids.len() == own.len() && ids.iter().all(|id| (0..i64::from(layers)).contains(id)) {
                let taps = ids.iter().map(|id| Tap::Layer(*id as u32)).collect();
                let what = format!("the captured layers are others: {name}");
                self.taps("other_layers", &what, taps);
            }
        }
        let last = Tap::Layer(layers.saturating_sub(1));
        if own.contains(&last) {
            let taps = own.iter().map(|tap| if *tap == last { Tap::Final } else { *tap }).collect();
            let what = "the last layer's state is meant after the target's final norm";
            self.taps("final_norm", what, taps);
        }
    }

    // --- vocabulary ---

    fn vocabulary(&mut self) {
        let own_scale = self.facts.target.embed_scale;
        if let (Some(map), true) = (&self.setting.vocab_map, self.facts.words.layout != Layout::Gguf) {
            let ids: Option<Vec<u32>> =
                map.target_ids().iter().enumerate().map(|(draft, id)| id.checked_sub(draft as u32)).collect();
            let ascending = |ids: &[u32]| ids.windows(2).all(|pair| pair[0] < pair[1]);
            if let Some(ids) = ids.filter(|ids| ascending(ids) && !map.is_identity())
                && let Ok(map) = VocabMap::from_target_ids(&ids, map.target_vocab())
            {
                let write = "offsets: each entry less its own index".to_owned();
                let what = "`d2t` holds target ids where offsets belong";
                self.add("absolute_d2t", what, ("d2t".into(), write), |s| s.vocab_map = Some(map));
            }
        }
        if self.facts.copies.embedding.is_some() && self.facts.is_other_embedding {
            let write = "an engine that loads it (the target's embedding is used here)".to_owned();
            let what = "the draft was trained with an embedding of its own";
            self.add("own_embedding", what, ("embed_tokens.weight".into(), write), |s| {
                s.embedding = Source::Own;
                s.embed_scale = Some(1.0);
            });
        }
        if self.setting.config.shape().has_embedding {
            let write = "the target's embedding".to_owned();
            let what =
                "the draft's embedding is not the one that it was trained with: the target's does better";
            let key = "embed_tokens.weight".to_owned();
            self.add("target_embedding", what, (key, write), |s| {
                s.weights.push(WeightChange::TargetEmbedding)
            });
        } else if own_scale != 1.0 {
            let write = format!("rows without the target's factor of {own_scale}");
            let what = "the draft was trained with the target's embedding unscaled";
            let key = "embed_tokens.weight".to_owned();
            self.add("unscaled_embedding", what, (key, write), |s| s.embed_scale = Some(1.0));
        }
        if matches!(self.setting.config, DraftConfig::Block(_)) {
            let key = "lm_head.weight".to_owned();
            if self.facts.copies.head.is_some() && self.facts.is_other_head {
                let write = "an engine that loads it (the target's head is used here)".to_owned();
                let what = "the draft was trained with a head of its own";
                self.add("own_head", what, (key.clone(), write), |s| s.head = Source::Own);
            }
            if !self.facts.target.tied {
                let write = "the target's embedding as its head".to_owned();
                let what = "the draft was trained with the target's embedding as its head";
                self.add("embedding_as_head", what, (key, write), |s| s.head = Source::Embedding);
            }
        }
    }

    // --- switches of the network ---

    fn switches(&mut self) {
        let words = self.facts.words;
        let flag = |name: &str, to: bool| (words.key(&[name], name), to.to_string());
        match self.setting.config.clone().published() {
            Published::Eagle3(config) => {
                let to = !config.norm_before_residual;
                let what = match to {
                    true => "the residual is meant to be the normalised hidden state",
                    false => "the residual is meant to be the hidden state before its norm",
                };
                self.add("norm_before_residual", what, flag("norm_before_residual", to), |s| {
                    if let DraftConfig::Eagle3(config) = &mut s.config {
                        config.norm_before_residual = to;
                    }
                });
                let to = config.feedback == Feedback::PreNorm;
                let what = match to {
                    true => "the next step is meant to be fed the output after the last norm",
                    false => "the next step is meant to be fed the output before the last norm",
                };
                self.add("norm_output", what, flag("norm_output", to), |s| {
                    if let DraftConfig::Eagle3(config) = &mut s.config {
                        config.feedback = if to { Feedback::PostNorm } else { Feedback::PreNorm };
                    }
                });
            }
            Published::PEagle(config) => {
                let to = !config.norm_before_residual;
                let what = "the first layer's residual is meant the other way around its norm";
                self.add("norm_before_residual", what, flag("norm_before_residual", to), |s| {
                    if let DraftConfig::PEagle(config) = &mut s.config {
                        config.norm_before_residual = to;
                    }
                });
            }
            Published::Block(_) | Published::Nowhere => {}
        }
    }

    // --- numbers ---

    fn numbers(&mut self) {
        let words = self.facts.words;
        let target = self.facts.target;
        for (name, theta) in [("the target's", target.rope_theta), ("1e4", 1e4), ("1e6", 1e6)] {
            let key = words.key(&["rope_theta"], "rope.freq_base");
            let what = format!("the base of RoPE is another one: {name}");
            self.add("rope_theta", what, (key, theta.to_string()), |s| {
                if let Some(numbers) = s.config.numbers() {
                    *numbers.rope_theta = theta;
                }
            });
        }
        let has_scaling =
            self.setting.config.clone().numbers().is_some_and(|numbers| numbers.rope_scaling.is_some());
        if has_scaling {
            let mut scalings = vec![(RopeScaling::None, "RoPE is meant without scaling", "null".to_owned())];
            if !matches!(target.rope_scaling, RopeScaling::None) {
                let write = format!("the target's: {:?}", target.rope_scaling);
                scalings.push((
                    target.rope_scaling.clone(),
                    "RoPE is meant with the target's scaling",
                    write,
                ));
            }
            for (scaling, what, write) in scalings {
                let key = words.key(&["rope_scaling", "rope_parameters"], "rope.scaling.type");
                self.add("rope_scaling", what, (key, write), |s| {
                    if let Some(own) = s.config.numbers().and_then(|numbers| numbers.rope_scaling) {
                        *own = scaling;
                    }
                });
            }
        }
        for (name, eps) in [("the target's", target.rms_norm_eps), ("1e-5", 1e-5), ("1e-6", 1e-6)] {
            let key = words.key(&["rms_norm_eps"], "attention.layer_norm_rms_epsilon");
            let what = format!("the small number inside the norms is another one: {name}");
            self.add("rms_norm_eps", what, (key, eps.to_string()), |s| {
                if let Some(numbers) = s.config.numbers() {
                    *numbers.rms_norm_eps = eps;
                }
            });
        }
    }

    // --- what blocks have ---

    fn block(&mut self) {
        let words = self.facts.words;
        if matches!(self.setting.config, DraftConfig::Block(_) | DraftConfig::PEagle(_)) {
            for id in self.facts.mask_tokens {
                let names = ["pard_token", "mask_token_id", "dspark_mask_token_id"];
                let key = words.key(&names, "tokenizer.ggml.mask_token_id");
                let what = "another token stands for those to be proposed";
                self.add("mask_token", what, (key, id.to_string()), |s| s.config.set_mask_token(*id));
            }
        }
        let DraftConfig::Block(config) = self.setting.config.clone() else { return };
        let block = |s: &mut Setting, change: &dyn Fn(&mut draftsmith_model::block::BlockConfig)| {
            if let DraftConfig::Block(config) = &mut s.config {
                change(config);
            }
        };
        if config.markov().is_none() && config.spark.is_none_or(|spark| spark.confidence.is_none()) {
            let key = words.key(&["sample_from_anchor", "projector_type"], "sample_from_anchor");
            let (what, write, spark) = match config.spark {
                Some(_) => (
                    "the block proposes from the slot behind the last token on",
                    "false, of an architecture of DFlash",
                    None,
                ),
                None => (
                    "the block proposes from the slot of the last token on",
                    "true, of an architecture of DSpark",
                    Some(SparkConfig { markov: None, confidence: None }),
                ),
            };
            self.add("sample_from_anchor", what, (key, write.to_owned()), |s| block(s, &|c| c.spark = spark));
        }
        let own = config.block_size;
        for size in [own.saturating_sub(1), own + 1, 4, 5, 7, 8, 10, 16] {
            if size != own {
                let key = words.key(&["block_size", "dspark_block_size"], "block_size");
                let what = "the draft was trained with blocks of another size";
                self.add("block_size", what, (key, size.to_string()), |s| block(s, &|c| c.block_size = size));
            }
        }
        let (key, causal) = (words.key(&["layer_types"], "attention.causal"), config.sliding.contains(&true));
        let (what, write) = match causal {
            true => ("slots of a block are meant to see each other", "full attention in every layer"),
            false => (
                "slots of a block are meant to see those before them alone",
                "sliding attention in every layer, with a window as long as the context",
            ),
        };
        self.add("causal_block", what, (key, write.to_owned()), |s| {
            block(s, &|c| {
                c.sliding = vec![!causal; c.sliding.len()];
                c.sliding_window = (!causal).then_some(c.max_position_embeddings.max(c.block_size));
            });
        });
    }

    // --- how states meet tokens ---

    fn feeds(&mut self) {
        let retrain = "no key says it: train or convert the draft so that the state of a position stands beside the \
                       token that follows it";
        let key = || "the order of states and tokens".to_owned();
        if self.setting.feed == Feed::Next {
            let what = "the draft was trained on states one position earlier than its tokens want";
            self.add("state_before", what, (key(), retrain.to_owned()), |s| s.feed = Feed::StateBefore);
            if !matches!(self.setting.config, DraftConfig::Block(_)) {
                let what =
                    "the draft was trained with each state beside its own token instead of the next one";
                self.add("own_token", what, (key(), retrain.to_owned()), |s| s.feed = Feed::OwnToken);
            }
        }
        if matches!(self.setting.config, DraftConfig::Block(_)) && self.setting.rope_gap == 0 {
            for (gap, side) in [(1, "later"), (-1, "earlier")] {
                let what = format!("positions of a block begin one {side} than they are counted");
                let write =
                    "no key says it: count positions of context and block from the same token".to_owned();
                self.add("block_position", what, ("the positions of RoPE".into(), write), |s| {
                    s.rope_gap = gap
                });
            }
        }
    }

    // --- how weights are stored ---

    fn weights(&mut self) {
        let has = |change: WeightChange| self.setting.weights.contains(&change);
        if !has(WeightChange::HalvesFromPairs) && !has(WeightChange::PairsFromHalves) {
            let key = "rows of q_proj and k_proj".to_owned();
            let what = "q and k are stored for RoPE over interleaved pairs";
            let write = "rows in halves: of each head the even ones first, then the odd ones".to_owned();
            self.add("rope_pairs", what, (key.clone(), write), |s| {
                s.weights.push(WeightChange::HalvesFromPairs)
            });
            let what = "q and k were put in the order of halves, and stood in it before";
            let write = "rows as they were before the conversion".to_owned();
            self.add("rope_halves_twice", what, (key, write), |s| {
                s.weights.push(WeightChange::PairsFromHalves);
            });
        }
        if !self.setting.weights.iter().any(|change| matches!(change, WeightChange::Norms(_))) {
            for (add, what, write) in [
                (
                    1.0,
                    "norms are stored as their difference from 1, as Gemma's are",
                    "every weight of a norm plus 1",
                ),
                (-1.0, "norms had 1 added that was in them before", "every weight of a norm less 1"),
            ] {
                self.add("norm_offset", what, ("norm weights".into(), write.to_owned()), |s| {
                    s.weights.push(WeightChange::Norms(add));
                });
            }
        }
    }
}

fn named(taps: &[Tap]) -> &'static str {
    match taps.contains(&Tap::Final) {
        true => "the state behind the final norm",
        false => "what the first layer reads",
    }
}
