//! Hidden states of token rows.
//!
//! Shape legend: `S` tokens of a row, `K` captured layers, `Ht` target width.

use std::sync::Arc;

use draftsmith_core::{LayerId, TokenTree};
use draftsmith_formats::cache::CaptureRow;
use draftsmith_kernels::Kernels;
use draftsmith_model::{Infer, StepItem, Target};

/// Tokens per step; bounds memory and does not change any bit.
const CHUNK: usize = 512;

/// Gives the hidden states that training needs.
pub trait CaptureSource {
    /// What can go wrong.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Hidden states of one row of tokens.
    ///
    /// # Shapes
    /// - `ids`, `loss_mask`: `[S]`
    ///
    /// # Errors
    /// As the source has them; tokens outside the vocabulary or an empty row are errors everywhere.
    fn capture(&mut self, ids: &[u32], loss_mask: &[bool]) -> Result<CaptureRow, Self::Error>;
}

/// A row that cannot be captured.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CaptureError {
    /// Nothing to capture.
    #[error("the row has no tokens")]
    Empty,
    /// Ids and mask differ in length.
    #[error("the row has {ids} tokens but {mask} mask entries")]
    Lengths {
        /// Tokens.
        ids: usize,
        /// Mask entries.
        mask: usize,
    },
    /// A token that the target does not have.
    #[error("token {id} at position {position} is outside the target's vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The token.
        id: u32,
        /// Its place.
        position: usize,
        /// Vocabulary size.
        vocab: usize,
    },
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

    /// Captured layers.
    pub fn layers(&self) -> &[LayerId] {
        &self.layers
    }
}

impl<K: Kernels> CaptureSource for InProcess<K> {
    type Error = CaptureError;

    fn capture(&mut self, ids: &[u32], loss_mask: &[bool]) -> Result<CaptureRow, CaptureError> {
        if ids.is_empty() {
            return Err(CaptureError::Empty);
        }
        if ids.len() != loss_mask.len() {
            return Err(CaptureError::Lengths { ids: ids.len(), mask: loss_mask.len() });
        }
        let (vocab, width) = (self.target.config().vocab_size, self.target.config().hidden_size);
        if let Some(position) = ids.iter().position(|id| *id as usize >= vocab) {
            return Err(CaptureError::TokenOutOfRange { id: ids[position], position, vocab });
        }
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
        Ok(CaptureRow { ids: ids.to_vec(), loss_mask: loss_mask.to_vec(), features, last })
    }
}
