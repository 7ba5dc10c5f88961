//! The target in this process as a [`Generator`], and on the way as a source of hidden states.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::ControlFlow;

use draftsmith_core::LayerId;
use draftsmith_decode::{BatchOptions, Engine, FinishReason, GenerateOptions, Watch};
use draftsmith_formats::cache::{CacheSpec, RowEncoder};
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
    /// Keeps the states of prompts and answers for a cache like this: a capture of the finished rows would compute the same again,
    /// bit for bit where [`Kernels::ROW_EXACT`] holds.
    pub keep: Option<CacheSpec>,
}

/// A prompt that was handed to the engine.
struct Asked {
    ids: Vec<u32>,
    /// Of what was read so far.
    states: Option<RowEncoder>,
}

impl<K: Kernels> Generator for EngineGenerator<'_, K> {
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        // What was asked, until it is answered.
        let asked: RefCell<HashMap<usize, Asked>> = RefCell::default();
        let layers: Vec<LayerId> =
            self.keep.iter().flat_map(|s| &s.target_layer_ids).map(|l| LayerId(*l)).collect();
        let stopped = Cell::new(false);
        // Both closures of the engine report.
        let on_done = RefCell::new(|key: usize, outcome: Outcome| {
            let flow = on_done(key, outcome);
            stopped.set(stopped.get() || flow.is_break());
            flow
        });
        loop {
            let mut handed_out = false;
            let mut watch = Watch {
                layers: &layers,
                on_states: &mut |key, states| {
                    let mut asked = asked.borrow_mut();
                    let of = asked.get_mut(&(key as usize)).and_then(|asked| asked.states.as_mut());
                    if let Some(encoder) = of {
                        // What a kept cache had is known; nothing is missing in between.
                        encoder.truncate(states.position);
                        encoder.push(states.features, states.last);
                    }
                },
            };
            self.engine.generate_watched(
                BatchOptions { batch_size: self.batch_size },
                self.keep.is_some().then_some(&mut watch),
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
                            let states = self.keep.as_ref().map(|spec| match request.before {
                                Some((ids, mut known)) => {
                                    let same =
                                        ids.iter().zip(&prompt.ids).take_while(|(a, b)| a == b).count();
                                    known.truncate(same);
                                    known
                                }
                                None => RowEncoder::new(spec),
                            });
                            let options = GenerateOptions {
                                max_new_tokens: prompt.max_new_tokens,
                                sampling: request.sampling,
                                stop_ids: self.prompter.tokenizer.eos_ids().to_vec(),
                                known_states: states.as_ref().map(RowEncoder::len),
                                ..GenerateOptions::default()
                            };
                            let one = Asked { ids: prompt.ids.clone(), states };
                            asked.borrow_mut().insert(request.key, one);
                            return Some((request.key, prompt.ids, options));
                        }
                    }
                },
                &mut |key, generation| {
                    let Some(Asked { ids: prompt_ids, states }) = asked.borrow_mut().remove(&key) else {
                        return ControlFlow::Continue(());
                    };
                    let cut = generation.finish_reason == FinishReason::Length;
                    let ids = generation.token_ids.clone();
                    let mut answer = self.prompter.judge(prompt_ids, ids, IdsFrom::Model, cut);
                    answer.states = states.map(Box::new);
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
