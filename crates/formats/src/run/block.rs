//! Keys of the kinds that propose several tokens in one pass: `dflash`, `dspark` and `p-eagle`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RunFile;
use super::check::{Broken, at_most, broken, number, positive};
use super::kind::KindTable;

/// What `dflash` alone has in `[draft]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DflashDraftTable {
    /// Layers; as many layers of the target are read unless `capture.layers` names them.
    pub layers: u32,
    /// Slots of a block: the last token, and one for each that is proposed.
    pub block_size: u32,
    /// Id of the token that stands for one to be proposed. Default: the tokenizer's mask or padding token, else the first
    /// id that it does not use.
    pub mask_token_id: Option<u32>,
    /// Positions that the layers see before the block. Default: all.
    pub window: Option<u32>,
}

impl Default for DflashDraftTable {
    fn default() -> Self {
        DflashDraftTable { layers: 1, block_size: 16, mask_token_id: None, window: None }
    }
}

/// What `dspark` alone has in `[draft]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DsparkDraftTable {
    /// Layers; as many layers of the target are read unless `capture.layers` names them.
    pub layers: u32,
    /// Slots of a block, each of which proposes a token.
    pub block_size: u32,
    /// Id of the token that stands for one to be proposed. Default: the tokenizer's mask or padding token, else the first
    /// id that it does not use.
    pub mask_token_id: Option<u32>,
    /// Positions that the layers see before the block. Default: all.
    pub window: Option<u32>,
    /// Width of the head that corrects a token by the one before it; 0: none.
    pub markov_rank: u32,
    /// What that head sees.
    pub markov_head: MarkovHead,
    /// A head that says how likely each token is accepted.
    pub confidence: bool,
    /// That head sees the token before, too.
    pub confidence_with_markov: bool,
}

impl Default for DsparkDraftTable {
    fn default() -> Self {
        DsparkDraftTable {
            layers: 1,
            block_size: 7,
            mask_token_id: None,
            window: None,
            markov_rank: 256,
            markov_head: MarkovHead::Vanilla,
            confidence: true,
            confidence_with_markov: true,
        }
    }
}

/// Published settings of `[train]` for blocks.
const BLOCK_DEFAULTS: [(&str, f64); 3] = [("lr", 6e-4), ("warmup_ratio", 0.04), ("max_grad_norm", 1.0)];

impl KindTable for DflashDraftTable {
    fn train_defaults(&self) -> &'static [(&'static str, f64)] {
        &BLOCK_DEFAULTS
    }

    fn mask_token_id(&self) -> Option<u32> {
        self.mask_token_id
    }

    fn layers_of_draft(&self, _: &str) -> Option<toml::Value> {
        Some(i64::from(self.layers).into())
    }
}

impl KindTable for DsparkDraftTable {
    fn train_defaults(&self) -> &'static [(&'static str, f64)] {
        &BLOCK_DEFAULTS
    }

    fn mask_token_id(&self) -> Option<u32> {
        self.mask_token_id
    }

    fn layers_of_draft(&self, _: &str) -> Option<toml::Value> {
        Some(i64::from(self.layers).into())
    }
}

impl KindTable for PEagleDraftTable {
    fn captured_layers(&self) -> Option<usize> {
        Some(3)
    }

    fn train_defaults(&self) -> &'static [(&'static str, f64)] {
        &[("warmup_ratio", 0.0025), ("max_grad_norm", 1.0)]
    }

    fn mask_token_id(&self) -> Option<u32> {
        self.mask_token_id
    }

    fn layers_of_draft(&self, _: &str) -> Option<toml::Value> {
        None
    }
}

/// What a Markov head sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MarkovHead {
    /// The token before.
    Vanilla,
    /// The token before, gated by the slot's own state.
    Gated,
    /// A state that runs along the block.
    Rnn,
}

/// What `p-eagle` alone has in `[draft]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PEagleDraftTable {
    /// Layers.
    pub layers: u32,
    /// Tokens of a proposal.
    pub depths: u32,
    /// Id of the token that stands for what is not known. Default: the tokenizer's mask or padding token, else the first
    /// id that it does not use.
    pub mask_token_id: Option<u32>,
}

impl Default for PEagleDraftTable {
    fn default() -> Self {
        PEagleDraftTable { layers: 4, depths: 5, mask_token_id: None }
    }
}

/// What `dflash` alone has in `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DflashTrainTable {
    /// Blocks of a row at most.
    pub num_anchors: u32,
    /// `tokens`: cross entropy; `dpace`, `dpace_confidence`, `dpace_continuation`: weighed by what a token is worth.
    pub loss: BlockLossKind,
    /// With `tokens`, a token that stands `j` behind the first counts `exp(-j / gamma)`; 0: all count alike.
    pub gamma: f64,
    /// With `dpace`, the share of confidence that a token never takes away.
    pub dpace_alpha: f64,
}

impl Default for DflashTrainTable {
    fn default() -> Self {
        DflashTrainTable { num_anchors: 512, loss: BlockLossKind::Tokens, gamma: 7.0, dpace_alpha: 0.5 }
    }
}

/// What the training of blocks minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BlockLossKind {
    /// Cross entropy with the tokens.
    Tokens,
    /// D-PACE: weighed by the value of a token and of all behind it.
    Dpace,
    /// D-PACE by the confidence that a block survives through a token alone.
    DpaceConfidence,
    /// D-PACE by the value behind a token alone.
    DpaceContinuation,
}

/// What `dspark` alone has in `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DsparkTrainTable {
    /// Blocks of a row at most.
    pub num_anchors: u32,
    /// Slot `j` counts `exp(-j / gamma)`; 0: all count alike.
    pub gamma: f64,
    /// Factor of the cross entropy with the tokens.
    pub ce: f64,
    /// Factor of the distance from the target's distribution.
    pub l1: f64,
    /// Factor of the confidence's own error.
    pub confidence: f64,
}

impl Default for DsparkTrainTable {
    fn default() -> Self {
        DsparkTrainTable { num_anchors: 512, gamma: 4.0, ce: 0.1, l1: 0.9, confidence: 1.0 }
    }
}

/// What `p-eagle` alone has in `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PEagleTrainTable {
    /// Share of the entries that is kept from each depth to the next.
    pub down_sample_ratio: f64,
    /// Share that is kept at least.
    pub down_sample_ratio_min: f64,
}

impl Default for PEagleTrainTable {
    fn default() -> Self {
        PEagleTrainTable { down_sample_ratio: 0.8, down_sample_ratio_min: 0.2 }
    }
}

/// Slots of a block, and tokens of a proposal, that make sense.
const MAX_SLOTS: u64 = 64;

impl RunFile {
    pub(super) fn check_block_drafts(&self) -> Result<(), Broken> {
        let draft = &self.draft;
        let (f, s, p) = (&draft.dflash, &draft.dspark, &draft.p_eagle);
        if draft.own().has_target_width() && draft.hidden.is_some() {
            let problem =
                format!("is set, but a draft of the kind `{}` has the target's width", draft.method.name());
            return broken("draft.hidden", problem);
        }
        for (key, layers) in [
            ("draft.dflash.layers", f.layers),
            ("draft.dspark.layers", s.layers),
            ("draft.p-eagle.layers", p.layers),
        ] {
            positive(key, u64::from(layers))?;
            at_most(key, u64::from(layers), MAX_SLOTS)?;
        }
        for (key, size, least) in [
            ("draft.dflash.block_size", f.block_size, 2),
            ("draft.dspark.block_size", s.block_size, 2),
            ("draft.p-eagle.depths", p.depths, 1),
        ] {
            if size < least {
                return broken(key, format!("is {size}, expected at least {least}"));
            }
            at_most(key, u64::from(size), MAX_SLOTS)?;
        }
        for (key, window, block) in
            [("draft.dflash.window", f.window, f.block_size), ("draft.dspark.window", s.window, s.block_size)]
        {
            if let Some(window) = window.filter(|window| *window < block) {
                return broken(key, format!("is {window}, shorter than a block of {block}"));
            }
        }
        at_most("draft.dspark.markov_rank", u64::from(s.markov_rank), 1 << 16)
    }

    pub(super) fn check_block_training(&self) -> Result<(), Broken> {
        let (f, s, p) = (&self.train.dflash, &self.train.dspark, &self.train.p_eagle);
        positive("train.dflash.num_anchors", u64::from(f.num_anchors))?;
        positive("train.dspark.num_anchors", u64::from(s.num_anchors))?;
        for (key, value) in [
            ("train.dflash.gamma", f.gamma),
            ("train.dspark.gamma", s.gamma),
            ("train.dspark.ce", s.ce),
            ("train.dspark.l1", s.l1),
            ("train.dspark.confidence", s.confidence),
        ] {
            number(key, value, value >= 0.0, "a number of at least 0")?;
        }
        for (key, value) in [
            ("train.dflash.dpace_alpha", f.dpace_alpha),
            ("train.p-eagle.down_sample_ratio", p.down_sample_ratio),
            ("train.p-eagle.down_sample_ratio_min", p.down_sample_ratio_min),
        ] {
            number(key, value, (0.0..=1.0).contains(&value), "a number from 0 to 1")?;
        }
        Ok(())
    }
}
