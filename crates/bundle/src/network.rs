//! The real draft network, run on a probe: the same functions of `model` that training and decoding call, with
//! f32 weights.
//!
//! Shape legend: `N` slots of a probe, `H` draft width, `Ht` target width, `Vd` draft vocabulary.

use std::path::Path;

use draftsmith_core::DraftTokenId;
use draftsmith_formats::safetensors_dir::TensorData;
use draftsmith_kernels::{Kernels, PackMode, StepMask};
use draftsmith_model::{CacheAttend, Draft, Infer, Ops, Target, read_draft};

use crate::check::{CheckOptions, CheckReport, check};
use crate::error::BoxError;
use crate::make::{Made, MakeInput, make};
use crate::manifest::TargetInfo;
use crate::{BundleError, ProbeInput};

/// Logits `[Vd]` that the draft gives for a probe, with the target's own embedding.
///
/// # Errors
/// Shapes of probe, draft and target that do not fit each other.
pub fn run_draft<K: Kernels>(
    target: &Target<K>,
    draft: &Draft<K>,
    input: &ProbeInput,
) -> Result<Vec<f32>, BoxError> {
    let config = &draft.network.config;
    let (slots, width) = (input.token_ids.len(), config.features_width());
    if slots == 0 || input.features.len() != slots * width {
        return Err(format!("{} features do not fit {slots} slots of {width}", input.features.len()).into());
    }
    for (what, draft, target) in [
        ("width", config.hidden_size, target.config().hidden_size),
        ("target width", config.target_hidden_size, target.config().hidden_size),
        ("vocabulary", config.vocab_size, target.config().vocab_size),
    ] {
        if draft != target {
            return Err(format!("the draft has {what} {draft}, the target {target}").into());
        }
    }
    if let Some(outside) = input.token_ids.iter().find(|t| **t as usize >= config.vocab_size) {
        return Err(format!("token {outside} is outside the vocabulary of {}", config.vocab_size).into());
    }
    let kernels = target.kernels().as_ref();
    let (network, weights) = (&draft.network, &draft.weights);
    let scale = 1.0 / (config.head_dim as f32).sqrt();
    let mut kv = kernels.kv_new(config.num_key_value_heads, config.head_dim);
    let mut ops = Infer::new(kernels);

    let features = ops.input(&input.features, width); // [N, 3 Ht]
    let mut hidden = network.project(&mut ops, weights, &features); // [N, H]
    let mut tokens = input.token_ids.clone();
    // All rows stay uncommitted: one chain, as a proposal behind an empty cache.
    let mut parents: Vec<Option<u32>> = Vec::new();
    let mut depth = 0;
    loop {
        let first = parents.len() as u32;
        parents.extend((first..first + tokens.len() as u32).map(|row| row.checked_sub(1)));
        // The feature of a drafted token stands one position behind the token itself, so rows and positions agree.
        let positions: Vec<u32> = (first..parents.len() as u32).collect();
        let mask = StepMask { new_rows: tokens.len(), ..StepMask::step(0, &parents, None, scale) };
        let embedded = ops.embed(target.embedding(), &tokens, target.config().embed_scale); // [R, H]
        let mut attend = CacheAttend::one(&mut kv, mask, config.head_dim);
        let output = network.step(&mut ops, weights, &embedded, &hidden, &positions, &mut attend); // [R, H]
        let head_input = network.head_input(&mut ops, weights, &output); // [R, H]
        let last = [tokens.len() as u32 - 1];
        let head_row = ops.gather(&head_input, &last); // [1, H]
        let logits_row = network.logits(&mut ops, weights, &head_row); // [1, Vd]
        let logits = ops.values(&logits_row);
        if depth == input.depth {
            return Ok(logits);
        }
        depth += 1;
        let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        tokens = vec![draft.vocab_map.to_target(DraftTokenId(best as u32)).0];
        let feedback = network.feedback(&output, &head_input);
        hidden = ops.gather(&feedback, &last); // [1, H]
    }
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
        run_draft(target, draft.as_ref().expect("loaded above"), question)
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

/// [`check`] with the real draft network beside this target.
///
/// # Errors
/// As [`check`].
pub fn check_with_target<K: Kernels>(
    dir: impl AsRef<Path>,
    facts: &TargetInfo,
    target: &Target<K>,
) -> Result<CheckReport, BundleError> {
    let dir = dir.as_ref();
    let mut draft: Option<Draft<K>> = None;
    let mut network = |question: &ProbeInput| {
        if draft.is_none() {
            draft = Some(Draft::load(target.kernels().as_ref(), dir, PackMode::F32)?);
        }
        run_draft(target, draft.as_ref().expect("loaded above"), question)
    };
    check(dir, CheckOptions { target: Some(facts), network: Some(&mut network) })
}
