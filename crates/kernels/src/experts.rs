//! Mixtures of experts: which experts compute a row, and the sum of what they give.
//!
//! Everything is fixed per row, as the contract wants it:
//! * A row's experts are those with the largest router logits; of equal ones the lower id, and NaN comes last.
//! * Its weights are a softmax over the logits of all experts or of the chosen ones, sums in ascending expert id.
//! * The weighted outputs are added in ascending expert id, one fused multiply-add each.
//!
//! Rows that chose one expert are computed in one product; which rows those are changes no bit.
//!
//! Shape legend: `R` rows, `E` experts, `U` experts that compute a row, `H` hidden size, `I` width of an expert.

use crate::cpu::exp;
use crate::{Activation, Buffer, Kernels};

/// How router logits become experts and weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// `E`
    pub experts: usize,
    /// `U`
    pub used: usize,
    /// Whether the weights of the chosen experts sum to one: a softmax over their logits alone (gpt-oss), which is what
    /// a softmax over all, divided by the sum of the chosen, comes to (Qwen3-MoE with `norm_topk_prob`). Otherwise
    /// they are the chosen ones' share of a softmax over all.
    pub normalised: bool,
}

/// The experts of some rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes {
    /// `U`
    pub used: usize,
    /// `[R, U]` ids, ascending in each row.
    pub experts: Vec<u32>,
    /// `[R, U]`
    pub weights: Vec<f32>,
}

/// Rows of one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Expert.
    pub expert: usize,
    /// Places in [`Routes::experts`], ascending: row times `U`, plus the rank by id in that row.
    pub places: Vec<u32>,
}

impl Routing {
    /// The experts of every row of `logits: [R, E]`.
    ///
    /// # Panics
    /// If no expert or more than all are used, or `logits` is not whole rows.
    pub fn choose(&self, logits: &[f32]) -> Routes {
        assert!(self.used > 0 && self.used <= self.experts, "{} of {} experts", self.used, self.experts);
        assert!(logits.len().is_multiple_of(self.experts), "whole rows of router logits");
        let rows = logits.len() / self.experts;
        let mut routes = Routes {
            used: self.used,
            experts: Vec::with_capacity(rows * self.used),
            weights: Vec::with_capacity(rows * self.used),
        };
        let mut order: Vec<u32> = Vec::with_capacity(self.experts);
        for row in logits.chunks_exact(self.experts) {
            let logit = |e: u32| row[e as usize];
            let rank = |e: u32| if logit(e).is_nan() { f32::NEG_INFINITY } else { logit(e) };
            order.clear();
            order.extend(0..self.experts as u32);
            // Ids are all different, so nothing depends on how the sort treats equals.
            let larger = |a: &u32, b: &u32| {
                rank(*b).partial_cmp(&rank(*a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
            };
            if self.used < self.experts {
                order.select_nth_unstable_by(self.used, larger);
                order.truncate(self.used);
            }
            order.sort_unstable();
            let max = order.iter().fold(f32::NEG_INFINITY, |m, e| m.max(rank(*e)));
            let share = |e: u32| if logit(e).is_nan() { f32::NAN } else { exp(logit(e) - max) };
            let sum: f32 = match self.normalised {
                true => order.iter().map(|e| share(*e)).sum(),
                false => (0..self.experts as u32).map(share).sum(),
            };
            routes.weights.extend(order.iter().map(|e| share(*e) / sum));
            routes.experts.extend_from_slice(&order);
        }
        routes
    }
}

impl Routes {
    /// `R`
    pub fn rows(&self) -> usize {
        self.experts.len() / self.used
    }

    /// The experts that have rows, in ascending order.
    pub fn groups(&self) -> Vec<Group> {
        let mut order: Vec<u32> = (0..self.experts.len() as u32).collect();
        order.sort_by_key(|place| self.experts[*place as usize]);
        order
            .chunk_by(|a, b| self.experts[*a as usize] == self.experts[*b as usize])
            .map(|places| Group {
                expert: self.experts[places[0] as usize] as usize,
                places: places.to_vec(),
            })
            .collect()
    }
}

/// One expert: a gated MLP.
pub struct Expert<P, B> {
    /// `[I, H]`
    pub gate: P,
    /// `[I, H]`
    pub up: P,
    /// `[H, I]`
    pub down: P,
    /// Of gate `[I]`, up `[I]` and down `[H]`.
    pub bias: Option<[B; 3]>,
}

/// All experts of a layer.
pub struct Experts<P, B> {
    /// `[E]`
    pub each: Vec<Expert<P, B>>,
    /// `H`
    pub hidden: usize,
    /// `I`
    pub width: usize,
    /// Non-linearity.
    pub activation: Activation,
}

/// `y[R, H]`: for each row the weighted sum of its experts' outputs, one expert after the other over the plain
/// operations. The specification of [`Kernels::experts`], and what a backend has that offers nothing faster.
pub fn grouped<K: Kernels + ?Sized>(
    kernels: &K,
    x: &K::Buf,
    routes: &Routes,
    experts: &Experts<K::Packed, K::Buf>,
    y: &mut K::Buf,
) {
    let (hidden, width, used) = (experts.hidden, experts.width, routes.used);
    let mut parts = vec![0.0; routes.experts.len() * hidden]; // [R, U, H]
    for group in routes.groups() {
        let expert = &experts.each[group.expert];
        let rows: Vec<u32> = group.places.iter().map(|place| place / used as u32).collect();
        let bias = |i: usize| expert.bias.as_ref().map(|b| &b[i]);
        let mut input = kernels.scratch(rows.len() * hidden);
        kernels.gather_rows(x, hidden, &rows, &mut input);
        let mut inner = [kernels.scratch(rows.len() * width), kernels.scratch(rows.len() * width)];
        kernels.matmuls(&input, rows.len(), &[(&expert.gate, bias(0)), (&expert.up, bias(1))], &mut inner);
        let [mut gate, mut up] = inner;
        kernels.gated(experts.activation, &mut gate, &up);
        let mut output = [kernels.scratch(rows.len() * hidden)];
        kernels.matmuls(&gate, rows.len(), &[(&expert.down, bias(2))], &mut output);
        for (i, place) in group.places.iter().enumerate() {
            let part = &mut parts[*place as usize * hidden..][..hidden];
            kernels.download(&output[0], i * hidden, part);
        }
        let [mut output] = output;
        [&mut input, &mut gate, &mut up, &mut output].into_iter().for_each(Buffer::give_back);
    }
    let mut sums = vec![0.0f32; routes.rows() * hidden];
    for (row, sum) in sums.chunks_exact_mut(hidden).enumerate() {
        for place in row * used..(row + 1) * used {
            let weight = routes.weights[place];
            for (s, part) in sum.iter_mut().zip(&parts[place * hidden..]) {
                *s = weight.mul_add(*part, *s);
            }
        }
    }
    y.give_back();
    *y = kernels.upload(&sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(routing: Routing, logits: &[f32], experts: &[u32], weights: &[f64]) {
        let routes = routing.choose(logits);
        assert_eq!(routes.experts, experts);
        for (found, wanted) in routes.weights.iter().zip(weights) {
            assert!((f64::from(*found) - wanted).abs() < 1e-6, "{:?}, not {weights:?}", routes.weights);
        }
    }

    #[test]
    fn the_largest_logits_win_and_of_equals_the_lower_id() {
        let routing = Routing { experts: 4, used: 2, normalised: true };
        check(routing, &[1.0, 3.0, 3.0, 3.0], &[1, 2], &[0.5, 0.5]);
        check(routing, &[0.0; 4], &[0, 1], &[0.5, 0.5]);
        check(routing, &[-0.0, 0.0, -1.0, -2.0], &[0, 1], &[0.5, 0.5]);
        check(routing, &[f32::NAN, 0.0, f32::NEG_INFINITY, 0.0], &[1, 3], &[0.5, 0.5]);
        check(routing, &[0.0, f32::NEG_INFINITY, f32::NAN, f32::NAN], &[0, 1], &[1.0, 0.0]);
        // Two rows.
        check(routing, &[0.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 0.0], &[2, 3, 0, 1], &[]);
    }

    #[test]
    fn weights_are_shares_of_all_or_of_the_chosen() {
        let logits = [0.5f64, -1.0, 2.0, 1.5];
        let share = |e: usize| logits[e].exp();
        let (chosen, all) = (share(2) + share(3), (0..4).map(share).sum::<f64>());
        let of = |sum: f64| [share(2) / sum, share(3) / sum];
        let row = logits.map(|l| l as f32);
        check(Routing { experts: 4, used: 2, normalised: true }, &row, &[2, 3], &of(chosen));
        check(Routing { experts: 4, used: 2, normalised: false }, &row, &[2, 3], &of(all));
        check(Routing { experts: 4, used: 4, normalised: false }, &row, &[0, 1, 2, 3], &[share(0) / all]);
    }

    #[test]
    fn a_row_without_numbers_is_routed_all_the_same() {
        let routes = Routing { experts: 3, used: 2, normalised: true }.choose(&[f32::NAN; 3]);
        assert_eq!(routes.experts, [0, 1]);
        assert!(routes.weights.iter().all(|w| w.is_nan()));
    }

    #[test]
    fn rows_stand_by_expert() {
        let routes = Routes { used: 2, experts: vec![1, 3, 0, 3, 0, 1], weights: vec![0.5; 6] };
        let groups: Vec<(usize, Vec<u32>)> =
            routes.groups().into_iter().map(|g| (g.expert, g.places)).collect();
        assert_eq!(groups, [(0, vec![2, 4]), (1, vec![0, 5]), (3, vec![1, 3])]);
    }
}
