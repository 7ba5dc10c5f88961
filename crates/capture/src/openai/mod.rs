//! Any server that speaks the OpenAI protocol as a [`Generator`].
//!
//! Requests run side by side, one thread each, up to a bound. What the run asks for and gets stays on the calling
//! thread, so a run sees the same calls as from the target in this process, only in another order.
//!
//! Invariants: an answer is reported once, and only when it is whole; after an error nothing new is asked, and the
//! answers that are still coming are reported before the error is.

mod client;
mod wire;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use draftsmith_formats::run::ServerTable;

use self::client::Client;
use crate::http::{Asked, Flow};
use crate::{Answer, Generator, IdsFrom, Outcome, Prompt, Prompter, RegenerateError, Request};

pub use client::metrics_page;

/// A server as a [`Generator`].
pub struct OpenAiGenerator<'a> {
    /// Where it is and how it is asked.
    pub server: &'a ServerTable,
    /// The key that it wants.
    pub key: Option<String>,
    /// Renders prompts and judges answers.
    pub prompter: Prompter<'a>,
    /// Requests under way at once.
    pub batch_size: usize,
    /// Set when the answers are not wanted any more.
    pub stop: &'a AtomicBool,
    /// Takes what a user should know: requests that keep failing.
    pub note: &'a (dyn Fn(&str) + Sync),
    /// How often it was asked so far.
    pub asked: Asked,
}

impl Generator for OpenAiGenerator<'_> {
    fn answer(
        &mut self,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        let tokenizer = self.prompter.tokenizer;
        let stops = tokenizer.eos_ids().iter().map(|id| tokenizer.token_to_piece(*id));
        let stops = stops.map(|piece| String::from_utf8_lossy(piece).into_owned()).filter(|s| !s.is_empty());
        let (key, stops, flow) = (self.key.clone(), stops.collect(), Flow::new(self.stop));
        let client = Client::connect(self.server, key, self.batch_size, stops, self.note, &flow)?;
        let Some(client) = client else { return Ok(()) };
        let ended = self.ask_all(&client, &flow, next, on_done);
        self.asked = client.asked();
        ended
    }
}

impl OpenAiGenerator<'_> {
    fn ask_all(
        &self,
        client: &Client<'_>,
        flow: &Flow<'_>,
        next: &mut dyn FnMut() -> Option<Request>,
        on_done: &mut dyn FnMut(usize, Outcome) -> ControlFlow<()>,
    ) -> Result<(), RegenerateError> {
        let (sender, receiver) = mpsc::channel();
        let mut failed = None;
        let mut greeted = false;
        let mut under_way = 0;
        std::thread::scope(|scope| {
            let mut ended = false;
            let mut report = |key: usize, outcome: Outcome| {
                if !ended && on_done(key, outcome).is_break() {
                    ended = true;
                    flow.cancelled.store(true, Ordering::Relaxed);
                }
            };
            loop {
                while failed.is_none() && !flow.is_cancelled() && under_way < self.batch_size {
                    let Some(request) = next() else { break };
                    let prompt = match self.prompter.prompt(&request) {
                        Ok(prompt) => prompt,
                        Err(outcome) => {
                            report(request.key, outcome);
                            continue;
                        }
                    };
                    if !greeted {
                        if let Err(error) = client.greet(&request, &prompt, flow) {
                            failed = Some(error.into());
                            break;
                        }
                        greeted = true;
                    }
                    under_way += 1;
                    let sender = sender.clone();
                    scope.spawn(move || {
                        let answer = self.ask(client, &request, &prompt, flow);
                        // The receiver outlives all requests.
                        let _ = sender.send((request.key, answer));
                    });
                }
                if failed.is_some() {
                    flow.draining.store(true, Ordering::Relaxed);
                }
                if under_way == 0 {
                    break;
                }
                // A sender is kept here, so this waits until an answer comes.
                let Ok((key, answer)) = receiver.recv() else { break };
                under_way -= 1;
                match answer {
                    Ok(Some(answer)) => report(key, Outcome::Answered(answer)),
                    Ok(None) => {}
                    Err(error) => {
                        failed.get_or_insert(error);
                    }
                }
            }
        });
        failed.map_or(Ok(()), Err)
    }

    fn ask(
        &self,
        client: &Client<'_>,
        request: &Request,
        prompt: &Prompt,
        flow: &Flow<'_>,
    ) -> Result<Option<Answer>, RegenerateError> {
        let Some((reply, cut)) = client.answer(request, prompt, flow)? else { return Ok(None) };
        let tokenizer = self.prompter.tokenizer;
        let prompt_ids = reply.prompt_ids.clone().unwrap_or_else(|| prompt.ids.clone());
        let ends = |ids: &[u32]| ids.last().is_some_and(|id| tokenizer.eos_ids().contains(id));
        // Ids are used if they are whole: some servers lose a part of them in streams.
        let whole = reply.ids.clone().filter(|ids| reply.counted.is_none_or(|n| n == ids.len() as u64));
        if let Some(mut ids) = whole {
            if !cut && !ends(&ids) {
                ids.extend(self.prompter.stop_id());
            }
            return Ok(Some(self.prompter.judge(prompt_ids, ids, IdsFrom::Model, cut)));
        }
        // The answer by itself, as the model wrote it behind the prompt; the stop token is not part of the text.
        let mut ids = tokenizer
            .encode(&reply.text, false)
            .map_err(|source| RegenerateError::Text { id: request.id.clone(), source })?;
        if !cut {
            ids.extend(self.prompter.stop_id());
        }
        let ids_from = IdsFrom::Text { counted: reply.counted };
        let answer = self.prompter.judge(prompt_ids, ids, ids_from, cut);
        Ok(Some(Answer { text: reply.text, ..answer }))
    }
}
