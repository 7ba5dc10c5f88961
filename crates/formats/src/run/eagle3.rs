//! Keys of the kind `eagle3`, and where they stood before kinds had tables of their own.
//!
//! Invariant: a run file that has them at their older places means the same, and stages hash them there, so work that
//! was done under either spelling is recognised.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RunFile;
use super::kind::KindTable;

/// What `eagle3` alone has in `[draft]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Eagle3DraftTable {
    /// Normalise each captured layer before they are joined (EAGLE-3.1).
    pub fc_norm: bool,
    /// Feed back the normalised state (EAGLE-3.1).
    pub norm_output: bool,
}

/// What `eagle3` alone has in `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Eagle3TrainTable {
    /// Draft steps unrolled per position (training-time test).
    pub ttt_length: u32,
    /// Step `k` counts `step_decay^k` in the loss.
    pub step_decay: f64,
    /// `kl`: cross entropy with the target's distribution; `lk_alpha`, `lk_lambda`: expected acceptance.
    pub loss: Loss,
    /// Weight of cross entropy in `lk_lambda` at acceptance 0.
    pub kl_scale: f64,
    /// How fast that weight falls as acceptance grows.
    pub kl_decay: f64,
}

impl Default for Eagle3TrainTable {
    fn default() -> Self {
        Eagle3TrainTable { ttt_length: 7, step_decay: 0.8, loss: Loss::Kl, kl_scale: 1.0, kl_decay: 1.0 }
    }
}

impl KindTable for Eagle3DraftTable {
    fn captured_layers(&self) -> Option<usize> {
        Some(3)
    }

    fn has_target_width(&self) -> bool {
        false
    }

    fn layers_of_draft(&self, _: &str) -> Option<toml::Value> {
        None
    }
}

/// What training minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Soft cross entropy with the target's distribution on the draft vocabulary [eagle3 §4.3].
    Kl,
    /// Minus the logarithm of the expected acceptance [eagle3 §4.4].
    LkAlpha,
    /// A mix of both that moves to acceptance as it grows [eagle3 §4.4].
    LkLambda,
}

/// Tables and keys that moved into this kind's own table there.
const MOVED: [(&str, &[&str]); 2] = [
    ("draft", &["fc_norm", "norm_output"]),
    ("train", &["ttt_length", "step_decay", "loss", "kl_scale", "kl_decay"]),
];
/// Name of the kind's table.
const OWN: &str = "eagle3";

/// Where a key belongs that stands at its older place.
pub(super) fn newer_place(key: &str) -> Option<String> {
    let (table, key) = key.split_once('.')?;
    let (_, keys) = MOVED.iter().find(|(moved, _)| *moved == table)?;
    keys.contains(&key).then(|| format!("{table}.{OWN}.{key}"))
}

/// The other place of a dotted key, older or newer; `None` if it has one place.
pub(super) fn other_place(key: &str) -> Option<String> {
    newer_place(key).or_else(|| {
        let (table, rest) = key.split_once('.')?;
        let old = format!("{table}.{}", rest.strip_prefix(OWN)?.strip_prefix('.')?);
        newer_place(&old).is_some().then_some(old)
    })
}

/// The first key that stands at both places: the older one and the newer one.
pub(super) fn given_twice(file: &toml::Table) -> Option<(String, String)> {
    MOVED.iter().find_map(|(table, keys)| {
        let outer = file.get(*table)?.as_table()?;
        let own = outer.get(OWN)?.as_table()?;
        let key = keys.iter().find(|key| outer.contains_key(**key) && own.contains_key(**key))?;
        Some((format!("{table}.{key}"), format!("{table}.{OWN}.{key}")))
    })
}

/// Puts the keys back where they stood when the first stages were hashed.
pub(super) fn to_old_places(tables: &mut toml::Table) {
    for (table, _) in MOVED {
        let Some(outer) = tables.get_mut(table).and_then(toml::Value::as_table_mut) else { continue };
        if let Some(toml::Value::Table(own)) = outer.remove(OWN) {
            outer.extend(own);
        }
    }
}

impl RunFile {
    /// Draft steps that training unrolls per position, for a kind that does.
    pub fn unrolled_steps(&self) -> Option<u32> {
        (self.draft.method.name() == OWN).then_some(self.train.eagle3.ttt_length)
    }

    /// Moves what stands at older places to where it belongs.
    pub(super) fn take_old_places(&mut self) {
        fn take<T>(old: &mut Option<T>, new: &mut T) {
            if let Some(value) = old.take() {
                *new = value;
            }
        }
        let draft = &mut self.draft;
        take(&mut draft.old_fc_norm, &mut draft.eagle3.fc_norm);
        take(&mut draft.old_norm_output, &mut draft.eagle3.norm_output);
        let train = &mut self.train;
        take(&mut train.old_ttt_length, &mut train.eagle3.ttt_length);
        take(&mut train.old_step_decay, &mut train.eagle3.step_decay);
        take(&mut train.old_loss, &mut train.eagle3.loss);
        take(&mut train.old_kl_scale, &mut train.eagle3.kl_scale);
        take(&mut train.old_kl_decay, &mut train.eagle3.kl_decay);
    }
}
