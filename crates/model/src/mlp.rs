//! What stands between the second norm of a layer and its residual stream: one variant of [`Mlp`] and one function each.

use draftsmith_kernels::Activation;

use crate::ops::Ops;

/// Which MLP a layer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(act(gate(x)) * up(x))`.
    Gated,
}

/// Weights of a layer's MLP.
pub enum Mlp<W> {
    /// See [`MlpKind::Gated`]. Files that hold gate and up as one tensor are taken apart when they are loaded: products
    /// of one input share its quantisation anyway.
    Gated(GatedMlp<W>),
}

/// Weights of a gated MLP.
pub struct GatedMlp<W> {
    /// `[I, Ht]`
    pub gate: W,
    /// `[I, Ht]`
    pub up: W,
    /// `[Ht, I]`
    pub down: W,
}

impl<W> Mlp<W> {
    /// Weights that a pass reads, whatever its rows.
    pub fn weights(&self) -> Vec<&W> {
        match self {
            Mlp::Gated(mlp) => vec![&mlp.gate, &mlp.up, &mlp.down],
        }
    }
}

/// The MLP of a layer: normed input `[R, Ht]` to what is added to the residual stream, `[R, Ht]`.
pub fn feed_forward<O: Ops>(ops: &mut O, activation: Activation, mlp: &Mlp<O::W>, x: &O::T) -> O::T {
    match mlp {
        Mlp::Gated(mlp) => gated(ops, activation, mlp, x),
    }
}

fn gated<O: Ops>(ops: &mut O, activation: Activation, mlp: &GatedMlp<O::W>, x: &O::T) -> O::T {
    let [gate, up] = ops.linears(x, [(&mlp.gate, None), (&mlp.up, None)]); // [R, I] twice
    let act = ops.gated(activation, gate, &up);
    ops.linear(&act, &mlp.down, None) // [R, Ht]
}
