//! Chains that the draft draws from its own distribution, for rules that are equal to plain sampling in distribution
//! ([`VerifyRule`]).

use draftsmith_core::{
    Distribution, DrawnChain, Draws, Sampling, TargetTokenId, VerifyRule, token_distribution,
};
use draftsmith_kernels::Kernels;

use crate::DecodeError;
use crate::drafter::{Ask, Children, DraftPlan, Drafter, Node};
use crate::options::GenerateOptions;

/// Draft tokens per step where the plan is automatic: what it weighs against each other are trees of the most probable
/// tokens, and the rules want a chain that was drawn.
pub(crate) const AUTOMATIC_DEPTH: usize = 5;

/// Tokens below this share of the draft's best one are never drawn by it. Any distribution of the draft's gives the
/// target's text; these are hardly ever accepted, and there are many of them.
const LEAST_SHARE: f32 = 1e-5;

/// True if a request's proposals are drawn. Where nothing is sampled, all rules are one.
pub(crate) fn is_drawn(options: &GenerateOptions) -> bool {
    options.verify != VerifyRule::Seeded && !options.sampling.is_greedy()
}

/// The plan that a request is begun with.
///
/// # Errors
/// [`DecodeError::NeedsChain`] for a tree whose tokens are to be drawn.
pub(crate) fn plan(options: &GenerateOptions, has_drafter: bool) -> Result<DraftPlan, DecodeError> {
    match options.draft {
        plan if !is_drawn(options) => Ok(plan),
        DraftPlan::Tree { .. } => Err(DecodeError::NeedsChain { rule: options.verify }),
        DraftPlan::Auto if has_drafter => Ok(DraftPlan::Chain { depth: AUTOMATIC_DEPTH }),
        DraftPlan::Auto => Ok(DraftPlan::None),
        plan => Ok(plan),
    }
}

/// How a draft's own tokens are drawn beside a request's.
pub(crate) fn draft_sampling(sampling: &Sampling) -> Sampling {
    Sampling { min_p: sampling.min_p.max(LEAST_SHARE), ..*sampling }
}

/// All that a draft may draw by a row of its logits; `target` is the target's id of a draft's.
///
/// # Shapes
/// - `logits`: `[Vd]`
pub(crate) fn children(logits: &[f32], sampling: &Sampling, target: impl Fn(u32) -> u32) -> Children {
    let all = token_distribution(logits, sampling).into_iter();
    all.map(|(draft, prob)| (target(draft.0), prob.ln() as f32)).collect()
}

/// What stands behind a node, all of it.
fn distribution(children: Children) -> Option<Distribution> {
    Distribution::new(
        children.into_iter().map(|(id, log)| (TargetTokenId(id), f64::from(log).exp())).collect(),
    )
}

/// Draws a chain of at most `depths` tokens for each sequence that asks ([`Ask::whole`]).
pub(crate) fn propose<K: Kernels, D: Drafter<K> + ?Sized>(
    drafter: &D,
    asks: &mut [Ask<'_, K>],
    depths: &[usize],
) -> Vec<DrawnChain> {
    let draws: Vec<Draws> = asks.iter().map(|ask| Draws::new(ask.sampling.seed, ask.position + 1)).collect();
    let mut chains: Vec<DrawnChain> = vec![DrawnChain::default(); asks.len()];
    // The drafter's names of the nodes before the last.
    let mut handles: Vec<Option<u32>> = vec![None; asks.len()];
    let mut level: Vec<(usize, Children)> = drafter.roots(asks).into_iter().enumerate().collect();
    loop {
        let mut nodes = Vec::new();
        for (of, children) in level {
            let chain = &mut chains[of];
            let depth = chain.tokens.len();
            let Some(draft_probs) = distribution(children).filter(|_| depth < depths[of]) else { continue };
            let token = draft_probs.draw(draws[of].draft(depth));
            chain.tokens.push(token);
            chain.draft_probs.push(draft_probs);
            if depth + 1 < depths[of] {
                nodes.push(Node { of, parent: handles[of], token: token.0, depth });
            }
        }
        if nodes.is_empty() {
            return chains;
        }
        let expanded = drafter.expand(asks, &nodes);
        level = nodes
            .iter()
            .zip(expanded)
            .map(|(node, (handle, children))| {
                handles[node.of] = Some(handle);
                (node.of, children)
            })
            .collect();
    }
}
