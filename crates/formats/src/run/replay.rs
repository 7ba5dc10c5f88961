//! `[train.replay]`: learning from rejections.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RunFile;
use super::check::{Broken, broken_with, number, positive};

/// Positions where the draft's own proposal is rejected are trained on again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReplayTable {
    /// Share of a step's loss that rejected positions make up; 0: off.
    pub share: f64,
    /// Tokens of the rows that a step replays at most, beside its own; one row is always taken.
    pub tokens: u32,
    /// Steps between looks at what the draft proposes over the rows of a step.
    pub every: u64,
    /// Rows whose rejected positions are kept; the oldest go first.
    pub buffer: u32,
}

impl Default for ReplayTable {
    fn default() -> Self {
        ReplayTable { share: 0.0, tokens: 512, every: 4, buffer: 128 }
    }
}

impl RunFile {
    pub(super) fn check_replay(&self) -> Result<(), Broken> {
        let r = &self.train.replay;
        number("train.replay.share", r.share, (0.0..1.0).contains(&r.share), "a number from 0 to below 1")?;
        positive("train.replay.tokens", u64::from(r.tokens))?;
        positive("train.replay.every", r.every)?;
        positive("train.replay.buffer", u64::from(r.buffer))?;
        let pack = self.train.pack_length;
        if r.share > 0.0 && r.tokens > pack {
            let problem = format!("is {}, more than `train.pack_length` = {pack}", r.tokens);
            let advice = format!("set `train.replay.tokens` to {pack} at most");
            return broken_with("train.replay.tokens", problem, advice);
        }
        Ok(())
    }
}
