//! A panic costs the request that it comes from, not the others of the batch.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Deref};
use std::panic::{AssertUnwindSafe, catch_unwind};

use draftsmith_kernels::{DeviceFailure, Kernels};

use crate::batch::Batch;
use crate::engine::Engine;
use crate::session::{Generation, Session, TokenEvent};

/// What a step left.
#[derive(Debug, Default)]
pub struct Survived {
    /// Requests that ended, oldest first.
    pub finished: Vec<(u64, Generation)>,
    /// Requests that cannot go on, with what their panic said.
    pub failed: Vec<(u64, String)>,
    /// Panics that were caught; one in a drafter costs no request, only the drafts of those under way.
    pub panics: u64,
}

/// What a panic said.
fn message(payload: &(dyn Any + Send)) -> String {
    if let Some(failure) = payload.downcast_ref::<DeviceFailure>() {
        return failure.message.clone();
    }
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic").to_string()
}

impl<K: Kernels> Session<K> {
    /// Goes back to the cache of before a step that broke off, which held `base` tokens. What was committed since is
    /// read anew; there is no draft any more, and the text is the same without.
    fn restart(&mut self, base: usize) {
        self.drop_drafter();
        self.kv.rollback_to(base);
        self.fill_to = self.tokens.len();
        if let Some(scored) = &mut self.prompt_logprobs {
            scored.truncate(base);
        }
        // It may have gone on over tokens that were never committed.
        self.grammar = self.options.grammar.as_ref().map(|grammar| {
            let mut state = grammar.begin();
            self.tokens[self.prompt_len..].iter().for_each(|id| state.advance(*id));
            state
        });
    }
}

impl<K: Kernels, E: Deref<Target = Engine<K>>> Batch<E, K> {
    /// As [`Batch::step`], but goes on after a panic in the step: each sequence goes back to what it had committed and
    /// takes the step alone, without its draft. Those that panic again are taken out, the others go on with the same
    /// text. Where `on_token` panics, the request that it was called for is taken out.
    ///
    /// The panic hook has told of each panic before it is caught.
    pub fn step_isolated(
        &mut self,
        on_token: &mut dyn FnMut(u64, &TokenEvent) -> ControlFlow<()>,
    ) -> Survived {
        let mut failed: BTreeMap<u64, String> = BTreeMap::new();
        let mut panics = 0;
        let mut hear =
            |id: u64, event: &TokenEvent| match catch_unwind(AssertUnwindSafe(|| on_token(id, event))) {
                Ok(flow) => flow,
                Err(payload) => {
                    failed.insert(id, message(payload.as_ref()));
                    ControlFlow::Break(())
                }
            };
        let Batch { engine, running, ids } = self;
        let bases: Vec<usize> = running.iter().map(|session| session.kv.len()).collect();
        // What the closure leaves half done is put right below: caches, grammars and drafters by `restart`; the engine
        // itself has nothing but locks, which are taken however they were left.
        let whole = catch_unwind(AssertUnwindSafe(|| {
            engine.step(running, None, &mut |index, event| hear(ids[index], event));
        }));
        let mut broken: Vec<(u64, String)> = Vec::new();
        if whole.is_err() {
            panics += 1;
            for ((session, id), base) in running.iter_mut().zip(ids.iter()).zip(bases) {
                if session.finish.is_some() {
                    // Rows of a proposal may stand in its cache as they were offered, and the cache may be kept.
                    session.kv.rollback_to(base);
                    // What its draft was handed of the step is not known.
                    session.drop_drafter();
                    continue;
                }
                let alone = catch_unwind(AssertUnwindSafe(|| {
                    session.restart(base);
                    engine.step(std::slice::from_mut(session), None, &mut |_, event| hear(*id, event));
                }));
                if let Err(payload) = alone {
                    panics += 1;
                    broken.push((*id, message(payload.as_ref())));
                }
            }
        }
        panics += failed.len() as u64;
        failed.extend(broken);
        for id in failed.keys() {
            if let Some(at) = self.ids.iter().position(|i| i == id) {
                self.ids.remove(at);
                self.running.remove(at);
            }
        }
        Survived { finished: self.take_finished(), failed: failed.into_iter().collect(), panics }
    }
}
