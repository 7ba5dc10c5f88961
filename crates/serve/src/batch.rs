//! Stand-in for the engine's step-by-step batch: one sequence after the other, same texts.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

use draftsmith_decode::{DecodeError, DraftPlan, Engine, FinishReason, TokenOrigin};
use draftsmith_kernels::Kernels;

pub(crate) use draftsmith_decode::Generation;

#[derive(Clone, Debug)]
pub(crate) struct Sampling {
    pub(crate) temperature: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    pub(crate) seed: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Shaping {
    pub(crate) repetition_penalty: f32,
    pub(crate) presence_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) logit_bias: Vec<(u32, f32)>,
}

impl Default for Shaping {
    fn default() -> Shaping {
        Shaping {
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
        }
    }
}

pub(crate) trait Grammar: Send + Sync {}

#[derive(Clone)]
pub(crate) struct GenerateOptions {
    pub(crate) max_new_tokens: usize,
    pub(crate) sampling: Sampling,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) draft: DraftPlan,
    pub(crate) shaping: Shaping,
    pub(crate) logprobs: Option<usize>,
    pub(crate) grammar: Option<Arc<dyn Grammar>>,
}

#[derive(Clone, Debug)]
pub(crate) struct TokenLogprobs {
    pub(crate) chosen: f32,
    pub(crate) top: Vec<(u32, f32)>,
}

#[derive(Clone, Debug)]
pub(crate) struct TokenEvent {
    pub(crate) id: u32,
    pub(crate) origin: TokenOrigin,
    pub(crate) logprobs: Option<TokenLogprobs>,
}

pub(crate) struct Batch<K: Kernels> {
    engine: Arc<Engine<K>>,
    waiting: VecDeque<(u64, Vec<u32>, GenerateOptions)>,
}

impl<K: Kernels> Batch<K> {
    pub(crate) fn new(engine: Arc<Engine<K>>) -> Batch<K> {
        Batch { engine, waiting: VecDeque::new() }
    }

    pub(crate) fn admit(
        &mut self,
        id: u64,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<(), DecodeError> {
        self.waiting.push_back((id, prompt.to_vec(), options.clone()));
        Ok(())
    }

    pub(crate) fn step(
        &mut self,
        on_token: &mut dyn FnMut(u64, &TokenEvent) -> ControlFlow<()>,
    ) -> Vec<(u64, Generation)> {
        let Some((id, prompt, options)) = self.waiting.pop_front() else { return Vec::new() };
        let options = draftsmith_decode::GenerateOptions {
            max_new_tokens: options.max_new_tokens,
            sampling: draftsmith_core::Sampling {
                temperature: options.sampling.temperature,
                top_k: options.sampling.top_k,
                top_p: options.sampling.top_p,
                seed: options.sampling.seed,
            },
            stop_ids: options.stop_ids,
            draft: options.draft,
        };
        let done = self.engine.generate(&prompt, &options, &mut |event| {
            on_token(id, &TokenEvent { id: event.id, origin: event.origin, logprobs: None })
        });
        vec![(id, done.expect("the prompt was checked"))]
    }

    pub(crate) fn cancel(&mut self, id: u64) -> Option<Generation> {
        let at = self.waiting.iter().position(|(other, ..)| *other == id)?;
        self.waiting.remove(at);
        Some(Generation {
            token_ids: Vec::new(),
            finish_reason: FinishReason::Cancelled,
            stats: Default::default(),
            prefill: Default::default(),
            decode: Default::default(),
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(crate) fn replace_engine(&mut self, engine: Arc<Engine<K>>) {
        self.engine = engine;
    }
}
