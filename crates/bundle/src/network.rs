//! The real draft network, run on a probe: the same functions of `model` that training and decoding call, with
//! f32 weights.
//!
//! Shape legend: `N` slots of a probe, `H` draft width, `Ht` target width, `Vd` draft vocabulary.

use std::path::Path;

use draftsmith_core::DraftTokenId;
use draftsmith_formats::safetensors_dir::TensorData;
use draftsmith_kernels::{Kernels, PackMode, StepMask};
use draftsmith_model::{CacheAttend, Draft, Infer, Ops, Target, read_draft};

use crate::BundleError;
use crate::check::{CheckOptions, CheckReport, check};
use crate::error::BoxError;
use crate::make::{Made, MakeInput, make};
use crate::manifest::TargetInfo;
use crate::probe::{Probe, ProbeInput, fits};

/// Where a token's embedding comes from.
#[derive(Clone, Copy)]
enum Embedding<'a, K: Kernels> {
    /// The target's own table.
    Target(&'a Target<K>),
    /// The rows stored in the question.
    Stored,
}

/// Logits `[Vd]` that the draft gives for a probe with stored embeddings.
///
/// # Errors
/// A question that does not fit the draft, or has no embeddings.
pub fn run_draft<K: Kernels>(
    kernels: &K,
    draft: &Draft<K>,
    input: &ProbeInput,
) -> Result<Vec<f32>, BoxError> {
    if input.embeddings.is_empty() {
        return Err("the question has no embeddings: the target must be asked".into());
    }
    Ok(run(kernels, draft, input, Embedding::Stored)?.probe.logits)
}

/// Logits that the draft gives for a probe with the target's own embedding, and the question with the tokens that
/// were fed and their embeddings filled in.
///
/// # Errors
/// Shapes of question, draft and target that do not fit each other.
pub fn answer_beside<K: Kernels>(
    target: &Target<K>,
    draft: &Draft<K>,
    input: &ProbeInput,
) -> Result<Probe, BoxError> {
    let config = &draft.network.config;
    for (what, draft, target) in [
        ("width", config.hidden_size, target.config().hidden_size),
        ("target width", config.target_hidden_size, target.config().hidden_size),
        ("vocabulary", config.vocab_size, target.config().vocab_size),
    ] {
        if draft != target {
            return Err(format!("the draft has {what} {draft}, the target {target}").into());
        }
    }
    Ok(run(target.kernels().as_ref(), draft, input, Embedding::Target(target))?.probe)
}

/// Output `[H]` of the layer at the last slot, before the final norm, for a probe with stored embeddings.
pub(crate) fn hidden_state<K: Kernels>(
    kernels: &K,
    draft: &Draft<K>,
    input: &ProbeInput,
) -> Result<Vec<f32>, BoxError> {
    Ok(run(kernels, draft, input, Embedding::Stored)?.hidden)
}

/// What one run of the network gives.
struct Answer {
    probe: Probe,
    /// `[H]` layer output of the last slot.
    hidden: Vec<f32>,
}

fn run<K: Kernels>(
    kernels: &K,
    draft: &Draft<K>,
    input: &ProbeInput,
    embedding: Embedding<'_, K>,
) -> Result<Answer, BoxError> {
    let config = &draft.network.config;
    fits(input, config)?;
    let (network, weights) = (&draft.network, &draft.weights);
    let slots = input.features.len() / config.features_width();
    let scale = 1.0 / (config.head_dim as f32).sqrt();
    let mut kv = draft.new_kv(kernels);
    let mut ops = Infer::new(kernels);

    let features = ops.input(&input.features, config.features_width()); // [N, 3 Ht]
    let mut hidden = network.project(&mut ops, weights, &features); // [N, H]
    let mut tokens = input.token_ids[..slots].to_vec();
    let (mut fed, mut embeddings) = (Vec::new(), Vec::new());
    // All rows stay uncommitted: one chain, as a proposal behind an empty cache.
    let mut parents: Vec<Option<u32>> = Vec::new();
    for depth in 0.. {
        let first = parents.len();
        parents.extend((first as u32..(first + tokens.len()) as u32).map(|row| row.checked_sub(1)));
        // The feature of a drafted token stands one position behind the token itself, so rows and positions agree.
        let positions: Vec<u32> = (first as u32..parents.len() as u32).collect();
        let mask = StepMask { new_rows: tokens.len(), ..StepMask::step(0, &parents, None, scale) };
        let embedded = match embedding {
            Embedding::Target(target) => ops.embed(target.embedding(), &tokens, target.config().embed_scale),
            Embedding::Stored => {
                let rows = first * config.hidden_size..parents.len() * config.hidden_size;
                ops.input(&input.embeddings[rows], config.hidden_size)
            }
        }; // [R, H]
        embeddings.extend(ops.values(&embedded));
        fed.extend_from_slice(&tokens);
        let mut attend = CacheAttend::one(&mut kv, mask, config.head_dim);
        let output = network.step(&mut ops, weights, &embedded, &hidden, &positions, &mut attend); // [R, H]
        let head_input = network.head_input(&mut ops, weights, &output); // [R, H]
        let last = [tokens.len() as u32 - 1];
        let head_row = ops.gather(&head_input, &last); // [1, H]
        let logits_row = network.logits(&mut ops, weights, &head_row); // [1, Vd]
        let logits = ops.values(&logits_row);
        if depth == input.depth {
            let (features, depth) = (input.features.clone(), input.depth);
            let last_output = ops.gather(&output, &last); // [1, H]
            let hidden = ops.values(&last_output);
            let input = ProbeInput { token_ids: fed, features, depth, embeddings };
            return Ok(Answer { probe: Probe { input, logits }, hidden });
        }
        tokens = vec![input.token_ids.get(slots + depth as usize).copied().unwrap_or_else(|| {
            let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            draft.vocab_map.to_target(DraftTokenId(best as u32)).0
        })];
        let feedback = network.feedback(&output, &head_input);
        hidden = ops.gather(&feedback, &last); // [1, H]
    }
    unreachable!("the loop ends at the question's depth")
}

/// [`make`] with the real draft network beside this target.
///
/// The probe is answered with the weights as bundled, rounded to bf16, so that a check sees the same numbers.
///
/// # Errors
/// As [`make`]; a checkpoint that cannot be loaded as a draft.
pub fn make_with_target<K: Kernels>(input: &MakeInput, target: &Target<K>) -> Result<Made, BundleError> {
    // Loaded only when the first probe is asked: by then the weights were checked, and told by name if wrong.
    let mut draft: Option<Draft<K>> = None;
    make(input, &mut |question| {
        if draft.is_none() {
            draft = Some(rounded_draft(target.kernels().as_ref(), &input.checkpoint)?);
        }
        answer_beside(target, draft.as_ref().expect("loaded above"), &question)
    })
}

/// A checkpoint's draft with its weights as a bundle stores them.
fn rounded_draft<K: Kernels>(kernels: &K, checkpoint: &Path) -> Result<Draft<K>, BoxError> {
    let (config, mut tensors, vocab_map) = read_draft(checkpoint)?;
    for (name, (shape, values)) in &mut tensors {
        let stored = TensorData::bf16(name, shape, values);
        for (value, bytes) in values.iter_mut().zip(stored.bytes.chunks_exact(2)) {
            *value = f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16);
        }
    }
    let place = checkpoint.display().to_string();
    Ok(Draft::from_tensors(kernels, config, &tensors, vocab_map, PackMode::F32, &place)?)
}

/// [`check`] with the real draft network, without a target: the probe holds the embeddings it needs.
///
/// # Errors
/// As [`check`].
pub fn check_alone<K: Kernels>(dir: impl AsRef<Path>, kernels: &K) -> Result<CheckReport, BundleError> {
    let dir = dir.as_ref();
    let mut draft: Option<Draft<K>> = None;
    let mut network = |question: &ProbeInput| run_draft(kernels, loaded(&mut draft, kernels, dir)?, question);
    check(dir, CheckOptions { network: Some(&mut network), ..CheckOptions::default() })
}

/// [`check`] with the real draft network beside its target, whose facts and embedding are compared, too.
///
/// # Errors
/// As [`check`].
pub fn check_with_target<K: Kernels>(
    dir: impl AsRef<Path>,
    facts: &TargetInfo,
    target: &Target<K>,
) -> Result<CheckReport, BundleError> {
    let dir = dir.as_ref();
    let kernels = target.kernels().as_ref();
    let mut draft: Option<Draft<K>> = None;
    let mut network = |question: &ProbeInput| {
        let draft = loaded(&mut draft, kernels, dir)?;
        match question.embeddings.is_empty() {
            true => Ok(answer_beside(target, draft, question)?.logits),
            false => run_draft(kernels, draft, question),
        }
    };
    let mut embedding = |ids: &[u32]| {
        let mut ops = Infer::new(kernels);
        let rows = ops.embed(target.embedding(), ids, target.config().embed_scale);
        Ok(ops.values(&rows))
    };
    check(
        dir,
        CheckOptions { target: Some(facts), network: Some(&mut network), embedding: Some(&mut embedding) },
    )
}

/// The bundle's draft in f32, loaded when it is first asked: by then its tensors were checked.
fn loaded<'d, K: Kernels>(
    draft: &'d mut Option<Draft<K>>,
    kernels: &K,
    dir: &Path,
) -> Result<&'d Draft<K>, BoxError> {
    if draft.is_none() {
        *draft = Some(Draft::load(kernels, dir, PackMode::F32)?);
    }
    Ok(draft.as_ref().expect("loaded above"))
}
