//! The numeric probe: stored inputs of the draft network and the logits it gave when the bundle was made.
//!
//! A draft whose bytes are intact can still be served by a network that is not the one it was trained with (a
//! different norm, a RoPE off by one, captured layers in another order); then it accepts nothing. The probe is run
//! through the real network by a closure of the caller, so that such a difference shows as a number.
//!
//! The embedding is the target's. Its rows for the probe's tokens are stored too, so that the draft can be probed
//! without loading a target.
//!
//! Shape legend: `N` slots of a probe, `D` draft steps after the first, `H` draft width, `Ht` target width, `Vd`
//! draft vocabulary.

use std::collections::BTreeMap;
use std::path::Path;

use draftsmith_formats::safetensors_dir::{SafetensorsDir, TensorData, to_bytes};
use draftsmith_model::DraftSpec;

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
/// Draft steps after the first at most.
const DEPTH_MAX: usize = 16;

/// Rows of the target's embedding, one below the other, as the draft receives them.
pub type EmbedFn<'a> = dyn FnMut(&[u32]) -> Result<Vec<f32>, BoxError> + 'a;

/// What the draft network is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeInput {
    /// `[N]` the token that follows each feature's position; then `[D]` the tokens fed at the later depths. Without
    /// these the network feeds its own arg-max.
    pub token_ids: Vec<u32>,
    /// `[N, captured layers * Ht]` captured hidden states, side by side from low to high.
    pub features: Vec<f32>,
    /// `D`: the network's own hidden state is fed back so often; the logits are those of the last row then.
    pub depth: u32,
    /// `[N + D, H]` embedding of each token, as the draft receives it; empty if the target must be asked.
    pub embeddings: Vec<f32>,
}

/// Runs the draft network: `[Vd]` logits of the last slot.
pub type ProbeFn<'a> = dyn FnMut(&ProbeInput) -> Result<Vec<f32>, BoxError> + 'a;

/// Answers a question when a bundle is made; it may complete the question (tokens fed, embeddings).
pub type AnswerFn<'a> = dyn FnMut(ProbeInput) -> Result<Probe, BoxError> + 'a;

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
                embeddings: Vec::new(),
            })
            .into()
    }
}

/// The probe file's bytes.
pub(crate) fn to_file(probes: &[Probe], features_width: usize) -> Vec<u8> {
    let mut tensors = Vec::new();
    for (i, probe) in probes.iter().enumerate() {
        let input = &probe.input;
        let ids: Vec<i64> = input.token_ids.iter().map(|t| i64::from(*t)).collect();
        let slots = input.features.len() / features_width.max(1);
        tensors.push(TensorData::i64(&format!("{i}.token_ids"), &[ids.len()], &ids));
        tensors.push(TensorData::f32(&format!("{i}.features"), &[slots, features_width], &input.features));
        if !input.embeddings.is_empty() {
            let shape = [ids.len(), input.embeddings.len() / ids.len().max(1)];
            tensors.push(TensorData::f32(&format!("{i}.embeddings"), &shape, &input.embeddings));
        }
        tensors.push(TensorData::f32(&format!("{i}.logits"), &[probe.logits.len()], &probe.logits));
        tensors.push(TensorData::i64(&format!("{i}.depth"), &[1], &[i64::from(probe.input.depth)]));
    }
    to_bytes(&tensors, &BTreeMap::new())
}

/// What is wrong with a question for a draft, in words; `Ok` if it fits.
pub(crate) fn fits(input: &ProbeInput, config: &dyn DraftSpec) -> Result<(), String> {
    let shape = config.shape();
    let width = shape.features_width();
    let slots = input.features.len() / width;
    let (ids, depth) = (input.token_ids.len(), input.depth as usize);
    if slots == 0 || slots > SLOTS_MAX || input.features.len() != slots * width {
        return Err(format!("{} features are not 1 to {SLOTS_MAX} rows of {width}", input.features.len()));
    }
    if depth > DEPTH_MAX {
        return Err(format!("a depth of {depth} is more than {DEPTH_MAX}"));
    }
    if ids != slots && ids != slots + depth {
        return Err(format!("{ids} tokens do not fit {slots} slots and a depth of {depth}"));
    }
    if let Some(outside) = input.token_ids.iter().find(|t| **t as usize >= shape.vocab_size) {
        return Err(format!("token {outside} is outside the vocabulary of {}", shape.vocab_size));
    }
    if !input.embeddings.is_empty()
        && (ids != slots + depth || input.embeddings.len() != ids * shape.hidden_size)
    {
        return Err(format!(
            "{} numbers are no embeddings of {} tokens of width {}",
            input.embeddings.len(),
            slots + depth,
            shape.hidden_size
        ));
    }
    Ok(())
}

/// Reads a probe file; every shape is checked against the draft's.
pub(crate) fn from_file(path: &Path, config: &dyn DraftSpec) -> Result<Vec<Probe>, BundleError> {
    let bad = |problem: String| BundleError::Manifest { path: path.to_owned(), problem };
    let dir = SafetensorsDir::open(path)?;
    let count = (0..PROBES_MAX).take_while(|i| dir.find(&format!("{i}.token_ids")).is_some()).count();
    if count == 0 {
        return Err(bad("it holds no probe: `0.token_ids` is missing".into()));
    }
    let known = |name: &str| {
        let (index, part) = name.split_once('.')?;
        let parts = ["token_ids", "features", "logits", "depth", "embeddings"];
        (index.parse::<usize>().ok()? < count && parts.contains(&part)).then_some(())
    };
    if let Some(extra) = dir.names().find(|name| known(name).is_none()) {
        return Err(bad(format!("tensor `{extra}` belongs to no probe")));
    }
    (0..count)
        .map(|i| {
            let logits = dir.get(&format!("{i}.logits"))?;
            logits.expect_shape(&[config.shape().answer_width])?;
            let depth = dir.get(&format!("{i}.depth"))?;
            depth.expect_shape(&[1])?;
            let depth = u32::try_from(depth.to_i64()?[0]).unwrap_or(u32::MAX);
            let ids = dir.get(&format!("{i}.token_ids"))?.to_i64()?;
            let token_ids = ids.iter().map(|t| u32::try_from(*t).unwrap_or(u32::MAX)).collect();
            let embeddings = dir.find(&format!("{i}.embeddings")).map(|t| t.to_f32()).transpose()?;
            let input = ProbeInput {
                token_ids,
                features: dir.get(&format!("{i}.features"))?.to_f32()?,
                depth,
                embeddings: embeddings.unwrap_or_default(),
            };
            fits(&input, config).map_err(|problem| bad(format!("probe {i}: {problem}")))?;
            Ok(Probe { input, logits: logits.to_f32()? })
        })
        .collect()
}

/// Compares the stored embeddings with the target's own.
pub(crate) fn embedding_problems(
    probes: &[Probe],
    embed: &mut EmbedFn<'_>,
) -> Result<Vec<Problem>, BundleError> {
    let mut problems = Vec::new();
    for (index, probe) in probes.iter().enumerate() {
        let (ids, stored) = (&probe.input.token_ids, &probe.input.embeddings);
        if stored.is_empty() {
            continue;
        }
        let found = embed(ids).map_err(|source| BundleError::Probe { index, source })?;
        let (share, at) = difference(stored, &found);
        if found.len() != stored.len() || share > PROBE_TOLERANCE {
            let token_id = ids[at * ids.len() / stored.len()];
            problems.push(Problem::EmbeddingDiffers { token_id });
        }
    }
    Ok(problems)
}

/// Largest difference as a share of the largest stored magnitude, and the id where it is.
pub(crate) fn difference(stored: &[f32], found: &[f32]) -> (f32, usize) {
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
