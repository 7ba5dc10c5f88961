//! The target in this process as a [`Generator`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::ControlFlow;

use draftsmith_decode::{BatchOptions, Engine, FinishReason, GenerateOptions};
use draftsmith_kernels::Kernels;

use crate::{Generator, IdsFrom, Outcome, Prompter, RegenerateError, Request};

/// The target in this process as a [`Generator`]; decodes without a draft.
pub struct EngineGenerator<'a, K: Kernels> {
    /// The engine.
    pub engine: &'a Engine<K>,
    /// Renders prompts and judges answers.
    pub prompter: Prompter<'a>,
    /// Prompts answered side by side.
    pub batch_size: usize,
}

impl<K: Kernels> Generator for EngineGenerator<'_, K> {
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        // What was asked, until it is answered.
        let asked: RefCell<HashMap<usize, Vec<u32>>> = RefCell::default();
        let stopped = Cell::new(false);
        // Both closures of the engine report.
        let on_done = RefCell::new(|key: usize, outcome: Outcome| {
            let flow = on_done(key, outcome);
            stopped.set(stopped.get() || flow.is_break());
            flow
        });
        loop {
            let mut handed_out = false;
            self.engine.generate_batch(
                BatchOptions { batch_size: self.batch_size },
                &mut || loop {
                    if stopped.get() {
                        return None;
                    }
                    let request = next()?;
                    handed_out = true;
                    match self.prompter.prompt(&request) {
                        Err(outcome) => {
                            let _ = on_done.borrow_mut()(request.key, outcome);
                        }
                        Ok(prompt) => {
                            let options = GenerateOptions {
                                max_new_tokens: prompt.max_new_tokens,
                                sampling: request.sampling,
                                stop_ids: self.prompter.tokenizer.eos_ids().to_vec(),
                                ..GenerateOptions::default()
                            };
                            asked.borrow_mut().insert(request.key, prompt.ids.clone());
                            return Some((request.key, prompt.ids, options));
                        }
                    }
                },
                &mut |key, generation| {
                    let prompt_ids = asked.borrow_mut().remove(&key).unwrap_or_default();
                    let cut = generation.finish_reason == FinishReason::Length;
                    let ids = generation.token_ids.clone();
                    let answer = self.prompter.judge(prompt_ids, ids, IdsFrom::Model, cut);
                    on_done.borrow_mut()(key, Outcome::Answered(answer))
                },
            )?;
            // Follow-up turns may have been queued by the last answers.
            if !handed_out || stopped.get() {
                return Ok(());
            }
        }
    }
}
