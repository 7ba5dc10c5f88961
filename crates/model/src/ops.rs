//! The vocabulary in which networks are written, once.
//!
//! A network is a function over [`Ops`]: [`crate::Infer`] runs it on packed weights for capture and decoding, the
//! tape records it for training. Attention is handed in by the caller ([`Attend`]), because what a row may see is
//! the one thing that differs: a KV cache when decoding, the training-time-test pattern when training.

use std::sync::Arc;

use draftsmith_kernels::experts::Routing;
use draftsmith_kernels::{Activation, Cell, RopeTable};

/// Operations on activations of `[rows, width]`.
pub trait Ops {
    /// Activations `[rows, width]`; cheap to clone.
    type T: Clone;
    /// A linear weight `[O, I]` or an embedding table `[V, H]`.
    type W;
    /// A norm weight or bias.
    type N;
    /// All experts of a layer.
    type E;

    /// `x · Wᵀ (+ bias)`.
    fn linear(&mut self, x: &Self::T, w: &Self::W, bias: Option<&Self::N>) -> Self::T;
    /// Several linear layers of one input.
    fn linears<const N: usize>(
        &mut self,
        x: &Self::T,
        layers: [(&Self::W, Option<&Self::N>); N],
    ) -> [Self::T; N] {
        layers.map(|(w, bias)| self.linear(x, w, bias))
    }
    /// RMS norm over whole rows.
    fn rms_norm(&mut self, x: &Self::T, w: &Self::N, eps: f32) -> Self::T;
    /// RMS norm over each head of `head_dim` values (Qwen3, Gemma 3).
    fn head_norm(&mut self, x: &Self::T, w: &Self::N, head_dim: usize, eps: f32) -> Self::T;
    /// RoPE on all heads of each row; `positions: [rows]`.
    fn rope(&mut self, x: Self::T, table: &Arc<RopeTable>, positions: &[u32]) -> Self::T;
    /// `act(gate) * up`.
    fn gated(&mut self, activation: Activation, gate: Self::T, up: &Self::T) -> Self::T;
    /// What the experts that `logits: [rows, E]` choose make of each row.
    fn experts(&mut self, x: &Self::T, logits: &Self::T, routing: Routing, experts: &Self::E) -> Self::T;
    /// `a + b`.
    fn add(&mut self, a: Self::T, b: &Self::T) -> Self::T;
    /// `x * factor`.
    fn scale(&mut self, x: Self::T, factor: f32) -> Self::T;
    /// Columns side by side.
    fn concat(&mut self, parts: &[&Self::T]) -> Self::T;
    /// Columns `from..from + width` of each row.
    fn slice_cols(&mut self, x: &Self::T, from: usize, width: usize) -> Self::T;
    /// Rows of all parts, which have one width, below each other.
    fn stack(&mut self, parts: &[&Self::T]) -> Self::T;
    /// Chosen rows, in any order and with repeats.
    fn select(&mut self, x: &Self::T, rows: &[u32]) -> Self::T;
    /// Zeros of the same shape, without a gradient.
    fn zeros_like(&mut self, x: &Self::T) -> Self::T;
    /// The gate of a Markov head with a state of `width`; see [`Cell`].
    fn cell(&mut self, cell: Cell, a: &Self::T, b: &Self::T, width: usize) -> Self::T;
    /// Rows of an embedding table, times `scale`.
    fn embed(&mut self, table: &Self::W, ids: &[u32], scale: f32) -> Self::T;
}

/// What attention sees: given the rotated queries and keys and the values of a step, all `[rows, heads * head_dim]`,
/// returns the mixed values `[rows, heads * head_dim]`.
pub trait Attend<O: Ops> {
    /// Attends.
    fn attend(&mut self, ops: &mut O, q: O::T, k: O::T, v: O::T) -> O::T;
}
