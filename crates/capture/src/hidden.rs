//! Hidden states of token rows.
//!
//! Shape legend: `S` tokens of a row, `K` captured layers, `Ht` target width.

use std::ops::ControlFlow;
use std::sync::Arc;

use draftsmith_core::{LayerId, TokenTree};
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::Kernels;
use draftsmith_model::{Infer, StepItem, Target};

use crate::{Asker, ServerError};

/// Tokens per step; bounds memory and does not change any bit.
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
        let width = self.target.config().hidden_size;
        row.check(self.target.config().vocab_size)?;
        let ids = &row.ids;
        let kernels = self.target.kernels();
        let ops = Infer::new(kernels.as_ref());
        let mut kv = self.target.new_kv();
        let joined = self.layers.len() * width;
        let mut features = Vec::with_capacity(ids.len() * joined);
        let mut last = Vec::with_capacity(ids.len() * width);
        for chunk in ids.chunks(CHUNK) {
            let parents = TokenTree::chain_parents(chunk.len());
            let item = StepItem { kv: &mut kv, tokens: chunk, parents: &parents };
            let output = self.target.forward(&mut [item], &self.layers);
            let mut buf = kernels.scratch(chunk.len() * joined);
            let parts: Vec<_> = output.hidden.iter().map(|h| (&h.buf, h.width)).collect();
            kernels.concat_cols(&parts, chunk.len(), &mut buf); // [chunk, K * Ht]
            let from = features.len();
            features.resize(from + chunk.len() * joined, 0.0);
            kernels.download(&buf, 0, &mut features[from..]);
            last.extend(ops.values(&output.last));
        }
        Ok(CaptureRow { ids: row.ids, loss_mask: row.loss_mask, features, last })
    }
}

impl<K: Kernels> CaptureSource for InProcess<K> {
    fn capture_rows(
        &mut self,
        next: &mut dyn FnMut() -> Option<TokenRow>,
        on_row: &mut dyn FnMut(CaptureRow) -> ControlFlow<()>,
    ) -> Result<(), CaptureError> {
        while let Some(row) = next() {
            if on_row(self.capture(row)?).is_break() {
                break;
            }
        }
        Ok(())
    }
}
