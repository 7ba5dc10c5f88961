//! What stands between the second norm of a layer and its residual stream: one variant of [`Mlp`] and one function each.

use draftsmith_kernels::Activation;
use draftsmith_kernels::experts::Routing;

use crate::ops::Ops;

/// Which MLP a layer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(act(gate(x)) * up(x))`.
    Gated,
    /// The weighted sum of a few of many such MLPs, which a router chooses for each row.
    Experts,
}

/// Weights of a layer's MLP.
pub enum Mlp<W, N, E> {
    /// See [`MlpKind::Gated`]. Files that hold gate and up as one tensor are taken apart when they are loaded: products
    /// of one input share its quantisation anyway.
    Gated(GatedMlp<W, N>),
    /// See [`MlpKind::Experts`].
    Experts(ExpertsMlp<W, N, E>),
}

/// Weights of a gated MLP.
pub struct GatedMlp<W, N> {
    /// `[I, Ht]`
    pub gate: W,
    /// `[I, Ht]`
    pub up: W,
    /// `[Ht, I]`
    pub down: W,
    /// Biases of gate, up and down.
    pub bias: Option<[N; 3]>,
}

/// Weights of a router and its experts.
pub struct ExpertsMlp<W, N, E> {
    /// `[E, Ht]`
    pub router: W,
    /// `[E]`
    pub router_bias: Option<N>,
    /// What becomes of the router's outputs.
    pub routing: Routing,
    /// All experts.
    pub experts: E,
}

impl<W, N, E> Mlp<W, N, E> {
    /// Weights that a pass reads, whatever its rows: all but the experts.
    pub fn weights(&self) -> Vec<&W> {
        match self {
            Mlp::Gated(mlp) => vec![&mlp.gate, &mlp.up, &mlp.down],
            Mlp::Experts(mlp) => vec![&mlp.router],
        }
    }

    /// Its experts.
    pub fn experts(&self) -> Option<&ExpertsMlp<W, N, E>> {
        match self {
            Mlp::Gated(_) => None,
            Mlp::Experts(mlp) => Some(mlp),
        }
    }
}

/// The MLP of a layer: normed input `[R, Ht]` to what is added to the residual stream, `[R, Ht]`.
pub fn feed_forward<O: Ops>(
    ops: &mut O,
    activation: Activation,
    mlp: &Mlp<O::W, O::N, O::E>,
    x: &O::T,
) -> O::T {
    match mlp {
        Mlp::Gated(mlp) => gated(ops, activation, mlp, x),
        Mlp::Experts(mlp) => {
            let logits = ops.linear(x, &mlp.router, mlp.router_bias.as_ref()); // [R, E]
            ops.experts(x, &logits, mlp.routing, &mlp.experts) // [R, Ht]
        }
    }
}

fn gated<O: Ops>(ops: &mut O, activation: Activation, mlp: &GatedMlp<O::W, O::N>, x: &O::T) -> O::T {
    let bias = |i: usize| mlp.bias.as_ref().map(|b| &b[i]);
    let [gate, up] = ops.linears(x, [(&mlp.gate, bias(0)), (&mlp.up, bias(1))]); // [R, I] twice
    let act = ops.gated(activation, gate, &up);
    ops.linear(&act, &mlp.down, bias(2)) // [R, Ht]
}
