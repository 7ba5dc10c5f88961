//! Hidden states of token rows.
//!
//! Shape legend: `S` tokens of a row, `K` captured layers, `Ht` target width.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use draftsmith_core::{LayerId, TokenTree};
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::Kernels;
use draftsmith_model::{StepItem, StepOutput, Target};

use crate::{Asker, ServerError};

/// Tokens per step of a backend that takes no more by itself.
const CHUNK: usize = 512;

/// A row whose states are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRow {
    /// Its place in the token file, for messages.
    pub number: u64,
    /// `[S]` token ids.
    pub ids: Vec<u32>,
    /// `[S]` true where the token is trained.
    pub loss_mask: Vec<bool>,
}

impl TokenRow {
    /// Checks what every source needs: tokens, as many mask entries, ids inside the vocabulary.
    pub(crate) fn check(&self, vocab: usize) -> Result<(), CaptureError> {
        let (number, ids) = (self.number, &self.ids);
        if ids.is_empty() {
            return Err(CaptureError::Empty { number });
        }
        if ids.len() != self.loss_mask.len() {
            return Err(CaptureError::Lengths { number, ids: ids.len(), mask: self.loss_mask.len() });
        }
        match ids.iter().position(|id| *id as usize >= vocab) {
            Some(position) => {
                Err(CaptureError::TokenOutOfRange { number, id: ids[position], position, vocab })
            }
            None => Ok(()),
        }
    }
}

/// Gives the hidden states that training needs.
pub trait CaptureSource {
    /// Captures rows until `next` is empty, `on_row` breaks or the user wants to stop. Rows are handed on in the order
    /// of `next`, each once; a source may ask for later ones before it hands on the first.
    ///
    /// # Errors
    /// [`CaptureError`], after all rows before the one that failed were handed on.
    fn capture_rows(
        &mut self,
        next: &mut dyn FnMut() -> Option<TokenRow>,
        on_row: &mut dyn FnMut(CaptureRow) -> ControlFlow<()>,
    ) -> Result<(), CaptureError>;
}

/// A row that cannot be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Nothing to capture.
    #[error("row {number} has no tokens")]
    Empty {
        /// The row.
        number: u64,
    },
    /// Ids and mask differ in length.
    #[error("row {number} has {ids} tokens but {mask} mask entries")]
    Lengths {
        /// The row.
        number: u64,
        /// Tokens.
        ids: usize,
        /// Mask entries.
        mask: usize,
    },
    /// A token that the target does not have.
    #[error("row {number}: token {id} at position {position} is outside the target's vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The row.
        number: u64,
        /// The token.
        id: u32,
        /// Its place.
        position: usize,
        /// Vocabulary size.
        vocab: usize,
    },
    /// The server cannot do it.
    #[error(transparent)]
    Server(#[from] ServerError),
}

impl CaptureError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            CaptureError::Server(error) => error.hint(Asker::Capture),
            CaptureError::Empty { .. }
            | CaptureError::Lengths { .. }
            | CaptureError::TokenOutOfRange { .. } => None,
        }
    }
}

/// Which row of several, and which of its tokens a step has.
pub type StepPart = (usize, Range<usize>);

/// Takes what a step gives, and what tokens it has: its parts one after the other.
pub type OnStep<'a, B> = dyn FnMut(&StepOutput<B>, &[StepPart]) + 'a;

/// The target in this process.
pub struct InProcess<K: Kernels> {
    target: Arc<Target<K>>,
    layers: Vec<LayerId>,
}

impl<K: Kernels> InProcess<K> {
    /// Captures the outputs of `layers`.
    pub fn new(target: Arc<Target<K>>, layers: Vec<LayerId>) -> InProcess<K> {
        InProcess { target, layers }
    }

    /// Hidden states of one row of tokens.
    ///
    /// # Errors
    /// A row without tokens, with another number of mask entries, or with tokens that the target does not have.
    pub fn capture(&self, row: TokenRow) -> Result<CaptureRow, CaptureError> {
        row.check(self.target.config().vocab_size)?;
        Ok(self.together(vec![row]).remove(0))
    }

    /// Tokens per step; bounds memory and does not change any bit.
    const CHUNK: usize = if K::STEP_ROWS > CHUNK { K::STEP_ROWS } else { CHUNK };
    /// Tokens from which on rows fill a step. Where a step takes no more than a chunk, rows go one by one.
    const FULL: usize = if K::STEP_ROWS > CHUNK { K::STEP_ROWS } else { 1 };

    /// Runs rows side by side through the target, as many tokens a step as it takes, and hands on what each step gives where it is,
    /// with the tokens of the step: parts of rows (numbered from 0), one after the other in the order of the rows.
    ///
    /// # Errors
    /// As [`InProcess::capture`], before the first step.
    pub fn steps(&self, rows: &[TokenRow], on_step: &mut OnStep<'_, K::Buf>) -> Result<(), CaptureError> {
        rows.iter().try_for_each(|row| row.check(self.target.config().vocab_size))?;
        let ids: Vec<&[u32]> = rows.iter().map(|row| row.ids.as_slice()).collect();
        self.run(&ids, on_step);
        Ok(())
    }

    /// Hidden states of several rows side by side.
    fn together(&self, rows: Vec<TokenRow>) -> Vec<CaptureRow> {
        let width = self.target.config().hidden_size;
        let joined = self.layers.len() * width;
        let empty = |row: &TokenRow| {
            let tokens = row.ids.len();
            (Vec::with_capacity(tokens * joined), Vec::with_capacity(tokens * width))
        };
        let mut states: Vec<(Vec<f32>, Vec<f32>)> = rows.iter().map(empty).collect();
        let ids: Vec<&[u32]> = rows.iter().map(|row| row.ids.as_slice()).collect();
        self.run(&ids, &mut |output, parts| {
            let (features, last) = self.target.states(output);
            let mut first = 0;
            for (i, part) in parts {
                let end = first + part.len();
                states[*i].0.extend_from_slice(&features[first * joined..end * joined]);
                states[*i].1.extend_from_slice(&last[first * width..end * width]);
                first = end;
            }
        });
        let whole = |(row, (features, last)): (TokenRow, _)| CaptureRow {
            ids: row.ids,
            loss_mask: row.loss_mask,
            features,
            last,
        };
        rows.into_iter().zip(states).map(whole).collect()
    }

    /// All steps of rows that were checked.
    fn run(&self, rows: &[&[u32]], on_step: &mut OnStep<'_, K::Buf>) {
        let mut kvs: Vec<_> = rows.iter().map(|_| self.target.new_kv()).collect();
        loop {
            // Which tokens of which row: as many as a step takes, from the first rows that are not done.
            let mut left = Self::CHUNK;
            let mut parts: Vec<StepPart> = Vec::new();
            for (i, (ids, kv)) in rows.iter().zip(&kvs).enumerate() {
                let (from, to) = (kv.len(), ids.len().min(kv.len() + left));
                if from < to {
                    left -= to - from;
                    parts.push((i, from..to));
                }
            }
            if parts.is_empty() {
                return;
            }
            let parents: Vec<_> =
                parts.iter().map(|(_, part)| TokenTree::chain_parents(part.len())).collect();
            let output = {
                let mut kvs: Vec<Option<_>> = kvs.iter_mut().map(Some).collect();
                let mut items: Vec<StepItem<'_, K>> = parts
                    .iter()
                    .zip(&parents)
                    .filter_map(|((i, part), parents)| {
                        Some(StepItem { kv: kvs[*i].take()?, tokens: &rows[*i][part.clone()], parents })
                    })
                    .collect();
                self.target.forward(&mut items, &self.layers)
            };
            on_step(&output, &parts);
        }
    }
}

impl<K: Kernels> CaptureSource for InProcess<K> {
    fn capture_rows(
        &mut self,
        next: &mut dyn FnMut() -> Option<TokenRow>,
        on_row: &mut dyn FnMut(CaptureRow) -> ControlFlow<()>,
    ) -> Result<(), CaptureError> {
        let vocab = self.target.config().vocab_size;
        loop {
            let (mut rows, mut tokens, mut failed) = (Vec::new(), 0, None);
            while tokens < Self::FULL && failed.is_none() {
                let Some(row) = next() else { break };
                match row.check(vocab) {
                    Ok(()) => {
                        tokens += row.ids.len();
                        rows.push(row);
                    }
                    Err(error) => failed = Some(error),
                }
            }
            let ended = rows.is_empty();
            for row in self.together(rows) {
                if on_row(row).is_break() {
                    return Ok(());
                }
            }
            match failed {
                Some(error) => return Err(error),
                None if ended => return Ok(()),
                None => {}
            }
        }
    }
}
