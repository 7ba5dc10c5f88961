//! The real draft network, run on a probe: the same functions of `model` that training and decoding call, with
//! f32 weights.
//!
//! Shape legend: `H` draft width, `Vd` draft vocabulary.

use std::path::Path;

use draftsmith_formats::run::BundleWeights;
use draftsmith_kernels::{Kernels, PackMode};
use draftsmith_model::{Draft, DraftAnswer, DraftQuestion, Infer, Ops, Target, read_draft};

use crate::BundleError;
use crate::check::{CheckOptions, CheckReport, check};
use crate::error::BoxError;
use crate::make::{Made, MakeInput, make};
use crate::manifest::TargetInfo;
use crate::probe::{Probe, ProbeInput, fits};
use crate::stored;

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
    Ok(run(kernels, draft, input, Embedding::Stored)?.logits)
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
    let config = draft.config().shape();
    for (what, draft, target) in [
        ("width", config.hidden_size, target.config().hidden_size),
        ("target width", config.target_hidden_size, target.config().hidden_size),
        ("vocabulary", config.vocab_size, target.config().vocab_size),
    ] {
        if draft != target {
            return Err(format!("the draft has {what} {draft}, the target {target}").into());
        }
    }
    let answer = run(target.kernels().as_ref(), draft, input, Embedding::Target(target))?;
    let (features, depth) = (input.features.clone(), input.depth);
    let input = ProbeInput { token_ids: answer.token_ids, features, depth, embeddings: answer.embeddings };
    Ok(Probe { input, logits: answer.logits })
}

/// Output `[H]` of the layer at the last slot, before the final norm, for a probe with stored embeddings.
pub(crate) fn hidden_state<K: Kernels>(
    kernels: &K,
    draft: &Draft<K>,
    input: &ProbeInput,
) -> Result<Vec<f32>, BoxError> {
    Ok(run(kernels, draft, input, Embedding::Stored)?.hidden)
}

fn run<K: Kernels>(
    kernels: &K,
    draft: &Draft<K>,
    input: &ProbeInput,
    embedding: Embedding<'_, K>,
) -> Result<DraftAnswer, BoxError> {
    let config = draft.config();
    fits(input, &*config)?;
    let width = config.shape().hidden_size;
    let mut embed = |first: usize, tokens: &[u32]| match embedding {
        Embedding::Target(target) => {
            let mut ops = Infer::new(kernels);
            let rows = ops.embed(target.embedding(), tokens, target.config().embed_scale);
            ops.values(&rows)
        }
        Embedding::Stored => input.embeddings[first * width..(first + tokens.len()) * width].to_vec(),
    };
    let (token_ids, features, depth) = (&input.token_ids, &input.features, input.depth as usize);
    Ok(draft.answer(kernels, DraftQuestion { token_ids, features, depth, embed: &mut embed }))
}

/// [`make`] with the real draft network beside this target.
///
/// The probe is answered with the weights as bundled, rounded to bf16 or 8 bits, so that a check sees the same numbers.
///
/// # Errors
/// As [`make`]; a checkpoint that cannot be loaded as a draft.
pub fn make_with_target<K: Kernels>(input: &MakeInput, target: &Target<K>) -> Result<Made, BundleError> {
    // Loaded only when the first probe is asked: by then the weights were checked, and told by name if wrong.
    let mut draft: Option<Draft<K>> = None;
    make(input, &mut |question| {
        if draft.is_none() {
            draft = Some(rounded_draft(target.kernels().as_ref(), &input.checkpoint, input.weights)?);
        }
        answer_beside(target, draft.as_ref().expect("loaded above"), &question)
    })
}

/// A checkpoint's draft with its weights as a bundle stores them.
fn rounded_draft<K: Kernels>(
    kernels: &K,
    checkpoint: &Path,
    form: BundleWeights,
) -> Result<Draft<K>, BoxError> {
    let (config, mut tensors, vocab_map) = read_draft(checkpoint)?;
    stored::round(&mut tensors, form)?;
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
