//! What the target says: prompts with its greedy answers, and its states at every position of them.
//!
//! They are computed once. All settings of a draft are asked about the same positions of the same texts.

use std::collections::BTreeMap;
use std::sync::Arc;

use draftsmith_core::report::{Report, Stop, Unit};
use draftsmith_core::{LayerId, TokenTree};
use draftsmith_decode::{Engine, GenerateOptions};
use draftsmith_kernels::Kernels;
use draftsmith_model::{Infer, Ops, StepItem, Target};
use draftsmith_text::Message;

use crate::Error;
use crate::backend::Backend;
use crate::engine::LoadedTarget;
use crate::measure::prompt_ids;

/// Prompts where nobody names a workload: everyday requests, of a few sentences of answer each.
const PROMPTS: [&str; 8] = [
    "Name three colours and say what they remind you of.",
    "Write a short note to a neighbour about a parcel.",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
    "What is 12 plus 30? Show the steps.",
    "List four animals that live in the sea.",
    "Tell a very short story about a lost key.",
    "Give the capital of France as JSON.",
];

/// Rows of a pass over a text.
const PASS_ROWS: usize = 256;

/// A state of the target that a draft may have been trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tap {
    /// The scaled embedding: what the first layer reads.
    Embedding,
    /// What a layer (0-based) writes, before any norm.
    Layer(u32),
    /// What the head reads: the last layer's output after the final norm.
    Final,
}

/// A prompt with its answer.
#[derive(Clone, Debug)]
pub struct Text {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// `[T]` prompt and answer.
    pub tokens: Vec<u32>,
    /// `[T, Ht]` of each state.
    pub states: BTreeMap<Tap, Vec<f32>>,
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Texts {
    /// `Ht`
    pub width: usize,
    /// Prompts with their answers.
    pub texts: Vec<Arc<Text>>,
}

/// Prompts of the target's template; without one, the requests themselves.
///
/// # Errors
/// A template that refuses a plain request.
pub fn built_in_prompts<K: Kernels>(target: &LoadedTarget<K>) -> Result<Vec<Vec<u32>>, Error> {
    let text = &target.text;
    let ids = |prompt: &&str| match text.template {
        Some(_) => prompt_ids(text, &[Message::new("user", *prompt)]),
        None => Ok(text.tokenizer.encode(prompt, true)?),
    };
    PROMPTS.iter().map(ids).collect()
}

impl Texts {
    /// Lets the target answer and keeps what its layers write.
    ///
    /// # Errors
    /// A prompt longer than the context, named by the engine; the wish to stop.
    pub fn read<K: Backend>(
        target: &LoadedTarget<K>,
        prompts: &[Vec<u32>],
        max_new_tokens: usize,
        report: &dyn Report,
        stop: &Stop,
    ) -> Result<Texts, Error> {
        let engine = Engine::new(Arc::clone(&target.target), None);
        let width = target.target.config().hidden_size;
        report.begin("answers of the target", Some(prompts.len() as u64), Unit::Rows);
        let mut texts = Vec::new();
        for (done, prompt) in prompts.iter().enumerate() {
            let options =
                GenerateOptions { max_new_tokens, stop_ids: target.stop_ids(), ..GenerateOptions::default() };
            let answer = engine.generate(prompt, &options, &mut |_| stop.flow())?;
            if stop.requested() {
                return Err(interrupted());
            }
            let tokens = [prompt.as_slice(), &answer.token_ids].concat();
            let states = states(&target.target, &tokens);
            texts.push(Arc::new(Text { prompt: prompt.len(), tokens, states }));
            report.at(done as u64 + 1);
        }
        report.end();
        Ok(Texts { width, texts })
    }

    /// The first of them.
    pub fn first(&self, texts: usize) -> Texts {
        Texts { width: self.width, texts: self.texts.iter().take(texts).cloned().collect() }
    }

    /// Positions at which a draft is asked.
    pub fn positions(&self) -> usize {
        self.texts.iter().map(|text| text.positions()).sum()
    }
}

/// The error of a wish to stop.
pub(crate) fn interrupted() -> Error {
    Error::Interrupted { what: "doctor --draft".to_owned(), resume: None }
}

impl Text {
    /// Positions at which a draft is asked: the first token of an answer comes from the prompt's own pass, and behind
    /// the last there is nothing to guess.
    pub fn positions(&self) -> usize {
        self.tokens.len().saturating_sub(self.prompt + 1)
    }
}

/// All states of a text.
fn states<K: Kernels>(target: &Target<K>, tokens: &[u32]) -> BTreeMap<Tap, Vec<f32>> {
    let kernels = target.kernels().as_ref();
    let layers: Vec<LayerId> = (0..target.config().num_layers as u32).map(LayerId).collect();
    let mut states: BTreeMap<Tap, Vec<f32>> = BTreeMap::new();
    let mut kv = target.new_kv();
    for part in tokens.chunks(PASS_ROWS) {
        let parents = TokenTree::chain_parents(part.len());
        let output =
            target.forward(&mut [StepItem { kv: &mut kv, tokens: part, parents: &parents }], &layers);
        let mut ops = Infer::new(kernels);
        let embedded = ops.embed(target.embedding(), part, target.config().embed_scale);
        let mut keep = |tap: Tap, values: Vec<f32>| states.entry(tap).or_default().extend(values);
        keep(Tap::Embedding, ops.values(&embedded));
        for (layer, hidden) in layers.iter().zip(&output.hidden) {
            keep(Tap::Layer(layer.0), ops.values(hidden));
        }
        keep(Tap::Final, ops.values(&output.last));
    }
    states
}
