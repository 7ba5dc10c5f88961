//! The numeric probe: stored inputs of the draft network and the logits it gave when the bundle was made.
//!
//! A draft whose bytes are intact can still be served by a network that is not the one it was trained with (a
//! different norm, a RoPE off by one, captured layers in another order); then it accepts nothing. The probe is run
//! through the real network by a closure of the caller, so that such a difference shows as a number.
//!
//! Shape legend: `P` probes, `N` slots of a probe, `Ht` target width, `Vd` draft vocabulary.

use std::collections::BTreeMap;
use std::path::Path;

use draftsmith_formats::safetensors_dir::{SafetensorsDir, TensorData, to_bytes};

use crate::error::BoxError;
use crate::{BundleError, Problem};

/// Largest difference from the stored logits, as a share of the largest stored magnitude. Other CPUs and backends
/// sum in other orders and round bf16 weights alike, which changes f32 logits by 1e-5 or so; a wrong network by
/// tenths.
pub const PROBE_TOLERANCE: f32 = 2e-3;
/// Probes in one file at most.
const PROBES_MAX: usize = 16;
/// Slots of one probe at most.
const SLOTS_MAX: usize = 256;

/// What the draft network is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeInput {
    /// `[N]` the token that follows each feature's position.
    pub token_ids: Vec<u32>,
    /// `[N, 3 Ht]` captured hidden states, low, mid, high side by side.
    pub features: Vec<f32>,
    /// Draft steps after the first: 0 asks for the logits of the last slot; `k` feeds back the arg-max (mapped to
    /// the target vocabulary) and the network's own hidden state `k` times, and asks for the logits then.
    pub depth: u32,
}

/// Runs the draft network: `[Vd]` logits of the last slot.
pub type ProbeFn<'a> = dyn FnMut(&ProbeInput) -> Result<Vec<f32>, BoxError> + 'a;

/// An input with the logits it gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// The question.
    pub input: ProbeInput,
    /// `[Vd]`
    pub logits: Vec<f32>,
}

impl ProbeInput {
    /// Made-up inputs, the same on every machine: two probes of eight slots, one at depth 0 and one two steps on.
    pub fn made_up(features_width: usize, vocab: usize) -> Vec<ProbeInput> {
        let mut state = 0x6472_6166_7470_726f_u64;
        let mut next = || {
            // SplitMix64.
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut x = state;
            x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            x ^ (x >> 31)
        };
        let slots = 8;
        [0, 2]
            .map(|depth| ProbeInput {
                token_ids: (0..slots).map(|_| (next() % vocab.max(1) as u64) as u32).collect(),
                // Uniform in -2..2: the scale of a residual stream's ordinary channels.
                features: (0..slots * features_width)
                    .map(|_| (next() >> 40) as f32 / (1u32 << 22) as f32 - 2.0)
                    .collect(),
                depth,
            })
            .into()
    }
}

/// The probe file's bytes.
pub(crate) fn to_file(probes: &[Probe]) -> Vec<u8> {
    let mut tensors = Vec::new();
    for (i, probe) in probes.iter().enumerate() {
        let slots = probe.input.token_ids.len();
        let ids: Vec<i64> = probe.input.token_ids.iter().map(|t| i64::from(*t)).collect();
        let width = probe.input.features.len() / slots.max(1);
        tensors.push(TensorData::i64(&format!("{i}.token_ids"), &[slots], &ids));
        tensors.push(TensorData::f32(&format!("{i}.features"), &[slots, width], &probe.input.features));
        tensors.push(TensorData::f32(&format!("{i}.logits"), &[probe.logits.len()], &probe.logits));
        tensors.push(TensorData::i64(&format!("{i}.depth"), &[1], &[i64::from(probe.input.depth)]));
    }
    to_bytes(&tensors, &BTreeMap::new())
}

/// Reads a probe file; every shape is checked against the draft's.
pub(crate) fn from_file(
    path: &Path,
    features_width: usize,
    vocab: usize,
    draft_vocab: usize,
) -> Result<Vec<Probe>, BundleError> {
    let bad = |problem: String| BundleError::Manifest { path: path.to_owned(), problem };
    let dir = SafetensorsDir::open(path)?;
    let count = dir.len() / 4;
    if !dir.len().is_multiple_of(4) || count == 0 || count > PROBES_MAX {
        return Err(bad(format!("{} tensors make no probes", dir.len())));
    }
    (0..count)
        .map(|i| {
            let ids = dir.get(&format!("{i}.token_ids"))?;
            let slots = ids.elements();
            if slots == 0 || slots > SLOTS_MAX {
                return Err(bad(format!("probe {i} has {slots} slots, wanted 1 to {SLOTS_MAX}")));
            }
            let features = dir.get(&format!("{i}.features"))?;
            features.expect_shape(&[slots, features_width])?;
            let logits = dir.get(&format!("{i}.logits"))?;
            logits.expect_shape(&[draft_vocab])?;
            let depth = dir.get(&format!("{i}.depth"))?;
            depth.expect_shape(&[1])?;
            let depth = depth.to_i64()?;
            let depth = u32::try_from(depth[0]).ok().filter(|d| *d <= 16);
            let depth = depth.ok_or_else(|| bad(format!("probe {i} has no depth of 0 to 16")))?;
            let token_ids = ids
                .to_i64()?
                .into_iter()
                .map(|t| u32::try_from(t).ok().filter(|t| (*t as usize) < vocab))
                .collect::<Option<Vec<u32>>>()
                .ok_or_else(|| bad(format!("probe {i} has a token id outside the vocabulary of {vocab}")))?;
            Ok(Probe {
                input: ProbeInput { token_ids, features: features.to_f32()?, depth },
                logits: logits.to_f32()?,
            })
        })
        .collect()
}

/// Largest difference as a share of the largest stored magnitude, and the id where it is.
fn difference(stored: &[f32], found: &[f32]) -> (f32, usize) {
    let scale = stored.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    stored.iter().zip(found).enumerate().fold((0.0, 0), |worst, (i, (a, b))| {
        // A NaN is the largest difference of all.
        let d = if b.is_finite() { (a - b).abs() / scale } else { f32::INFINITY };
        if d > worst.0 { (d, i) } else { worst }
    })
}

/// Runs the stored probes; the largest relative difference, and what does not hold.
pub(crate) fn run(probes: &[Probe], network: &mut ProbeFn<'_>) -> Result<(f32, Vec<Problem>), BundleError> {
    let mut worst = 0.0f32;
    let mut problems = Vec::new();
    for (index, probe) in probes.iter().enumerate() {
        let found = network(&probe.input).map_err(|source| BundleError::Probe { index, source })?;
        if found.len() != probe.logits.len() {
            problems.push(Problem::ProbeSize {
                probe: index,
                wanted: probe.logits.len(),
                found: found.len(),
            });
            continue;
        }
        let (share, draft_id) = difference(&probe.logits, &found);
        worst = worst.max(share);
        if share > PROBE_TOLERANCE {
            problems.push(Problem::ProbeDiffers {
                probe: index,
                depth: probe.input.depth,
                draft_id,
                stored: probe.logits[draft_id],
                found: found[draft_id],
            });
        }
    }
    Ok((worst, problems))
}
