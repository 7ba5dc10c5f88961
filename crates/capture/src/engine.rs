//! The target in this process as a [`Generator`].

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;

use draftsmith_decode::{BatchOptions, Engine, FinishReason, GenerateOptions};
use draftsmith_kernels::Kernels;

use crate::{Answer, Generator, Prompter, RegenerateError, Request};

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
        on_done: &mut dyn FnMut(usize, Option<Answer>) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        let failed: RefCell<Option<RegenerateError>> = RefCell::new(None);
        let stopped = Cell::new(false);
        // Both closures of the engine report.
        let on_done = RefCell::new(|key: usize, answer: Option<Answer>| {
            let flow = on_done(key, answer);
            stopped.set(stopped.get() || flow.is_break());
            flow
        });
        loop {
            let mut handed_out = false;
            self.engine.generate_batch(
                BatchOptions { batch_size: self.batch_size },
                &mut || loop {
                    if stopped.get() || failed.borrow().is_some() {
                        return None;
                    }
                    let request = next()?;
                    handed_out = true;
                    match self.prompter.prompt(&request) {
                        Err(error) => *failed.borrow_mut() = Some(error),
                        Ok(None) => {
                            let _ = on_done.borrow_mut()(request.key, None);
                        }
                        Ok(Some(prompt)) => {
                            let options = GenerateOptions {
                                max_new_tokens: prompt.max_new_tokens,
                                sampling: request.sampling,
                                stop_ids: self.prompter.tokenizer.eos_ids().to_vec(),
                                ..GenerateOptions::default()
                            };
                            return Some((request.key, prompt.ids, options));
                        }
                    }
                },
                &mut |key, generation| {
                    let answer = self.judge(&generation.token_ids, generation.finish_reason);
                    on_done.borrow_mut()(key, Some(answer))
                },
            )?;
            // Follow-up turns may have been queued by the last answers.
            if !handed_out || stopped.get() || failed.borrow().is_some() {
                return failed.take().map_or(Ok(()), Err);
            }
        }
    }
}

impl<K: Kernels> EngineGenerator<'_, K> {
    fn judge(&self, ids: &[u32], finish: FinishReason) -> Answer {
        let tokenizer = self.prompter.tokenizer;
        let body = match ids.split_last() {
            Some((last, body)) if tokenizer.eos_ids().contains(last) => body,
            _ => ids,
        };
        self.prompter.judge(tokenizer.decode(body, true), body, finish == FinishReason::Length)
    }
}
