//! The first row against the target in this process: an answer does not say which layers it holds, nor of which model.
//!
//! The server computes in another arithmetic, perhaps from other weights (quantised here, 16 bits there), so values are
//! not compared with values. Of all layers the one asked for must be the nearest, and near enough to be the same model.

use std::sync::Arc;

use draftsmith_core::LayerId;
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::Kernels;
use draftsmith_model::Target;

use crate::http::ServerError;
use crate::{CaptureError, InProcess, TokenRow};

/// Tokens that are compared: enough for a mean, cheap even for a large target.
const COMPARED_TOKENS: usize = 32;
/// Largest relative difference of states of one model: four-bit weights are off by 0.1 to 0.2, other models by about 1.
const SAME_MODEL: f64 = 0.5;

/// Compares the beginning of a row; states do not depend on what comes after them.
pub(super) fn compare<K: Kernels>(
    row: &CaptureRow,
    number: u64,
    target: &Arc<Target<K>>,
    layers: &[LayerId],
    url: &str,
    launch: impl Fn() -> String,
) -> Result<(), CaptureError> {
    let (tokens, width) = (row.len().min(COMPARED_TOKENS), target.config().hidden_size);
    let all: Vec<LayerId> = (0..target.config().num_layers as u32).map(LayerId).collect();
    let prefix =
        TokenRow { number, ids: row.ids[..tokens].to_vec(), loss_mask: row.loss_mask[..tokens].to_vec() };
    let ours = InProcess::new(Arc::clone(target), all.clone()).capture(prefix)?;
    let (url, name) = (url.to_string(), format!("row {number}"));
    let differs = |what: String, difference: f64| match difference > SAME_MODEL {
        true => Err(ServerError::OtherStates {
            url: url.clone(),
            row: name.clone(),
            what,
            percent: 100.0 * difference,
        }),
        false => Ok(()),
    };
    for (slot, asked) in layers.iter().enumerate() {
        let theirs = State { values: &row.features, states: layers.len(), slot };
        let distance = |layer: &LayerId| {
            let ours = State { values: &ours.features, states: all.len(), slot: layer.0 as usize };
            difference(ours, theirs, tokens, width)
        };
        let nearest = all.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(asked);
        differs(format!("states of layer {}", asked.0), distance(nearest))?;
        if nearest != asked {
            let (asked, found, launch) = (asked.0, nearest.0, launch());
            return Err(ServerError::OtherLayer { url, row: name, asked, found, launch }.into());
        }
    }
    let end = |values| State { values, states: 1, slot: 0 };
    differs("final states".to_string(), difference(end(&ours.last), end(&row.last), tokens, width))?;
    Ok(())
}

/// One state of each token among others, `[S, states, Ht]`.
#[derive(Clone, Copy)]
struct State<'a> {
    values: &'a [f32],
    states: usize,
    slot: usize,
}

impl State<'_> {
    fn of(&self, token: usize, width: usize) -> &[f32] {
        &self.values[(token * self.states + self.slot) * width..][..width]
    }
}

/// Mean over the tokens of `|a - b| / |a|`: the first tokens' states are many times longer than the others.
fn difference(ours: State<'_>, theirs: State<'_>, tokens: usize, width: usize) -> f64 {
    let of_token = |token: usize| {
        let (a, b) = (ours.of(token, width), theirs.of(token, width));
        let off: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let norm: f64 = a.iter().map(|a| f64::from(*a).powi(2)).sum();
        (off / norm.max(f64::MIN_POSITIVE)).sqrt()
    };
    (0..tokens).map(of_token).sum::<f64>() / tokens as f64
}
