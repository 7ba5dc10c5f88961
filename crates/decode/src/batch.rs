//! Continuous batching, step by step: sequences come and go between steps.

use std::ops::{ControlFlow, Deref};
use std::sync::Arc;

use draftsmith_kernels::Kernels;

use crate::DecodeError;
use crate::engine::Engine;
use crate::options::{BatchOptions, GenerateOptions, Watch};
use crate::session::{FinishReason, Generation, Session, TokenEvent};

impl<K: Kernels> Engine<K> {
    /// Generates many answers with continuous batching: a finished sequence's place is taken by the next request.
    ///
    /// `next` hands out requests (an id and a prompt) until it returns `None`; `on_done` receives each answer as it
    /// finishes and may stop the batch (answers under way are dropped).
    ///
    /// # Errors
    /// As [`Engine::generate`], for the first bad request.
    pub fn generate_batch(
        &self,
        batch: BatchOptions,
        next: &mut dyn FnMut() -> Option<(usize, Vec<u32>, GenerateOptions)>,
        on_done: &mut dyn FnMut(usize, Generation) -> ControlFlow<()>,
    ) -> Result<(), DecodeError> {
        self.generate_watched(batch, None, next, on_done)
    }

    /// The same, and `watch` hears the states of all tokens of the requests that want them ([`GenerateOptions::known_states`]): what a
    /// capture of the finished sequences would give, bit for bit where [`Kernels::ROW_EXACT`] holds.
    ///
    /// # Errors
    /// As [`Engine::generate`], for the first bad request.
    ///
    /// # Panics
    /// If there is a drafter, too: it captures layers of its own.
    pub fn generate_watched(
        &self,
        batch: BatchOptions,
        mut watch: Option<&mut Watch<'_>>,
        next: &mut dyn FnMut() -> Option<(usize, Vec<u32>, GenerateOptions)>,
        on_done: &mut dyn FnMut(usize, Generation) -> ControlFlow<()>,
    ) -> Result<(), DecodeError> {
        assert!(watch.is_none() || self.drafter.is_none(), "a watched batch decodes without a draft");
        let mut running = Batch::new(self);
        let mut drained = false;
        loop {
            while !drained && running.len() < batch.batch_size.max(1) {
                match next() {
                    None => drained = true,
                    Some((id, prompt, options)) => running.admit(id as u64, &prompt, &options)?,
                }
            }
            if running.is_empty() {
                return Ok(());
            }
            for (id, generation) in running.step_watched(watch.as_deref_mut()) {
                if on_done(id as usize, generation).is_break() {
                    return Ok(());
                }
            }
        }
    }
}

/// Sequences decoded side by side on one engine (`&Engine` or `Arc<Engine>`).
///
/// What a request gets does not depend on what else is in the batch, nor on when it came.
pub struct Batch<E, K: Kernels> {
    pub(crate) engine: E,
    /// Oldest first; `ids[i]` is the caller's name of `running[i]`.
    pub(crate) running: Vec<Session<K>>,
    pub(crate) ids: Vec<u64>,
}

impl<K: Kernels, E: Deref<Target = Engine<K>>> Batch<E, K> {
    /// An empty batch.
    pub fn new(engine: E) -> Batch<E, K> {
        Batch { engine, running: Vec::new(), ids: Vec::new() }
    }

    /// The engine.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// Sequences under way.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// True if nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Bytes that the drafts of the sequences under way hold: keys and values, and features that wait.
    pub fn draft_bytes(&self) -> usize {
        self.running.iter().map(Session::drafter_bytes).sum()
    }

    /// Takes a request in; its prompt is read in the next steps. `id` is the caller's name for it.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn admit(
        &mut self,
        id: u64,
        prompt_ids: &[u32],
        options: &GenerateOptions,
    ) -> Result<(), DecodeError> {
        self.running.push(self.engine.begin(prompt_ids, options)?);
        self.ids.push(id);
        Ok(())
    }

    /// Runs one target pass for all sequences. `on_token` sees each committed token with the id of its request and may
    /// end that request. Returns the requests that ended, oldest first.
    pub fn step(
        &mut self,
        on_token: &mut dyn FnMut(u64, &TokenEvent) -> ControlFlow<()>,
    ) -> Vec<(u64, Generation)> {
        let ids = &self.ids;
        self.engine.step(&mut self.running, None, &mut |index, event| on_token(ids[index], event));
        self.take_finished()
    }

    fn step_watched(&mut self, watch: Option<&mut Watch<'_>>) -> Vec<(u64, Generation)> {
        let watch = watch.map(|watch| (watch, self.ids.as_slice()));
        self.engine.step(&mut self.running, watch, &mut |_, _| ControlFlow::Continue(()));
        self.take_finished()
    }

    /// Takes out the requests that ended, oldest first.
    pub(crate) fn take_finished(&mut self) -> Vec<(u64, Generation)> {
        let mut done = Vec::new();
        let mut i = 0;
        while i < self.running.len() {
            if self.running[i].is_over() {
                done.push((self.ids.remove(i), self.engine.end(self.running.remove(i))));
            } else {
                i += 1;
            }
        }
        done
    }

    /// Ends a request early; `None` if it is not under way.
    pub fn cancel(&mut self, id: u64) -> Option<Generation> {
        let at = self.ids.iter().position(|i| *i == id)?;
        self.ids.remove(at);
        let mut session = self.running.remove(at);
        session.finish = Some(FinishReason::Cancelled);
        Some(self.engine.end(session))
    }

    /// Goes on with another engine on the same target, with another draft or none. Sequences under way finish without a
    /// draft: their text is the same.
    ///
    /// # Errors
    /// [`DecodeError::AnotherTarget`]; the batch goes on as it was.
    pub fn replace_engine(&mut self, engine: E) -> Result<(), DecodeError> {
        if !Arc::ptr_eq(self.engine.target(), engine.target()) {
            return Err(DecodeError::AnotherTarget);
        }
        self.running.iter_mut().for_each(Session::drop_drafter);
        self.engine = engine;
        Ok(())
    }
}
