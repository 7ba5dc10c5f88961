//! Proposals of fixed shape, grown level by level for all sequences together, over what any drafter answers.

use draftsmith_core::{TargetTokenId, TokenTree};
use draftsmith_kernels::Kernels;

use crate::drafter::{Ask, Children, Drafter, Node, Shape};

/// A node considered for the tree.
struct Candidate {
    token: u32,
    parent: Option<u32>,
    /// Cumulative log-probability.
    score: f32,
    /// The drafter's name of it, once it was expanded.
    handle: Option<u32>,
}

/// A proposal under way.
struct Growing {
    shape: Shape,
    candidates: Vec<Candidate>,
    /// Candidates of the newest level.
    frontier: Vec<u32>,
}

impl Growing {
    fn add(&mut self, parent: Option<u32>, children: Children) {
        let base = parent.map(|p| self.candidates[p as usize].score);
        for (token, score) in children.into_iter().take(self.shape.top_k) {
            self.frontier.push(self.candidates.len() as u32);
            let score = base.map_or(score, |base| base + score);
            self.candidates.push(Candidate { token, parent, score, handle: None });
        }
    }

    /// The best candidates of the newest level, which are expanded next.
    fn best_of_level(&mut self) -> Vec<u32> {
        let mut level = std::mem::take(&mut self.frontier);
        let score = |at: &u32| self.candidates[*at as usize].score;
        level.sort_by(|a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
        level.truncate(self.shape.top_k);
        level
    }
}

/// A tree of the best nodes for each sequence, by cumulative draft probability.
pub(crate) fn propose<K: Kernels, D: Drafter<K> + ?Sized>(
    drafter: &D,
    asks: &mut [Ask<'_, K>],
    shapes: &[Shape],
) -> Vec<TokenTree> {
    let mut growing: Vec<Growing> = drafter
        .roots(asks)
        .into_iter()
        .zip(shapes)
        .map(|(children, shape)| {
            let mut one = Growing { shape: *shape, candidates: Vec::new(), frontier: Vec::new() };
            one.add(None, children);
            one
        })
        .collect();
    for level in 1..shapes.iter().map(|shape| shape.depth).max().unwrap_or(0) {
        let mut nodes: Vec<Node> = Vec::new();
        let mut expanded: Vec<u32> = Vec::new();
        for (of, one) in growing.iter_mut().enumerate().filter(|(_, one)| level < one.shape.depth) {
            for at in one.best_of_level() {
                let Candidate { token, parent, .. } = one.candidates[at as usize];
                let parent = parent.and_then(|p| one.candidates[p as usize].handle);
                nodes.push(Node { of, parent, token, depth: level - 1 });
                expanded.push(at);
            }
        }
        if nodes.is_empty() {
            break;
        }
        for ((node, at), (handle, children)) in nodes.iter().zip(expanded).zip(drafter.expand(asks, &nodes)) {
            let one = &mut growing[node.of];
            one.candidates[at as usize].handle = Some(handle);
            one.add(Some(at), children);
        }
    }
    growing.iter().map(|one| best_nodes(&one.candidates, one.shape)).collect()
}

/// The best candidates by cumulative score as a tree. A child never scores above its parent and stands after it, so the
/// choice is closed under parents.
fn best_nodes(candidates: &[Candidate], shape: Shape) -> TokenTree {
    let count = if shape.depth == 0 { 0 } else { shape.nodes };
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|a, b| candidates[*b].score.total_cmp(&candidates[*a].score).then(a.cmp(b)));
    order.truncate(count);
    order.sort_unstable();
    let mut place = vec![None; candidates.len()];
    let mut tree = TokenTree::default();
    for index in order {
        let candidate = &candidates[index];
        let parent = match candidate.parent {
            None => None,
            Some(p) => match place[p as usize] {
                Some(at) => Some(at),
                // Not reached by the argument above; kept so that a NaN score cannot make a broken tree.
                None => continue,
            },
        };
        place[index] = Some(tree.push(TargetTokenId(candidate.token), parent));
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_nodes_are_closed_under_parents() {
        let node = |token, parent, score| Candidate { token, parent, score, handle: None };
        let candidates = [
            node(10, None, -0.1),
            node(11, None, -2.0),
            node(12, Some(0), -0.3),
            node(13, Some(0), -1.5),
            node(14, Some(2), -0.4),
        ];
        let best = |nodes| best_nodes(&candidates, Shape { depth: 3, top_k: 2, nodes });
        let tree = best(3);
        assert_eq!(tree.tokens.iter().map(|t| t.0).collect::<Vec<_>>(), [10, 12, 14]);
        assert_eq!(tree.parents, [None, Some(0), Some(1)]);
        assert!(best(0).is_empty());
        assert!(best(9).validate().is_ok());
    }
}
