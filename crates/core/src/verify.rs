//! The verify step: which draft tokens the target keeps.
//!
//! The same rule serves greedy decoding and seeded sampling: the caller hands in the token that the target itself
//! chooses after every node (arg-max, or the position-keyed draw of [`crate::choose_token`]), and a draft token
//! is kept iff it equals that choice. So the text cannot depend on the draft.
//!
//! Shape legend: `D` draft tokens in one proposal.

use crate::{TargetTokenId, TokenTree};

/// Outcome of verifying a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Draft tokens kept, a prefix of the proposal.
    pub accepted_drafts: usize,
    /// The target's own token after them: *bonus* if all drafts were kept, *recovered* otherwise.
    pub target_token: TargetTokenId,
}

/// Outcome of verifying a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeVerdict {
    /// Nodes kept, root first.
    pub accepted_path: Vec<u32>,
    /// The target's own token after them.
    pub target_token: TargetTokenId,
}

/// Keep draft tokens while each equals the target's own choice.
///
/// # Shapes
/// - `draft`: `[D]`
/// - `target_choice`: `[D + 1]`: the target's choice at each draft position, then after the last.
///
/// # Panics
/// If `target_choice` does not have one entry more than `draft`.
///
/// ```
/// use draftsmith_core::{verify_greedy, TargetTokenId as T, Verdict};
/// let verdict = verify_greedy(&[T(5), T(6), T(9)], &[T(5), T(6), T(7), T(8)]);
/// assert_eq!(verdict, Verdict { accepted_drafts: 2, target_token: T(7) });
/// ```
pub fn verify_greedy(draft: &[TargetTokenId], target_choice: &[TargetTokenId]) -> Verdict {
    assert!(target_choice.len() == draft.len() + 1, "target must score one position more than the draft");
    let accepted_drafts = draft.iter().zip(target_choice).take_while(|(d, t)| d == t).count();
    Verdict { accepted_drafts, target_token: target_choice[accepted_drafts] }
}

/// Walk the tree along the target's own choices.
///
/// `choice` says what the target chooses after the committed text (`None`) or after a node. It is asked once per
/// committed token, in the order of the text, and only for nodes that were accepted; so a choice may depend on
/// everything before it. Siblings with equal tokens are allowed; the first is followed.
pub fn verify_tree(tree: &TokenTree, mut choice: impl FnMut(Option<u32>) -> TargetTokenId) -> TreeVerdict {
    let mut accepted_path = Vec::new();
    let mut at: Option<u32> = None;
    let mut want = choice(None);
    while let Some(next) =
        (0..tree.len() as u32).find(|&n| tree.parents[n as usize] == at && tree.tokens[n as usize] == want)
    {
        accepted_path.push(next);
        at = Some(next);
        want = choice(at);
    }
    TreeVerdict { accepted_path, target_token: want }
}

#[cfg(test)]
mod tests {
    use super::*;
    use TargetTokenId as T;

    #[test]
    fn a_chain_verifies_the_same_as_list_and_as_tree() {
        // Every draft and every choice over a vocabulary of 2, three draft tokens.
        for bits in 0..1u32 << 7 {
            let bit = |i: u32| T((bits >> i) & 1);
            let draft = [bit(0), bit(1), bit(2)];
            let choice = [bit(3), bit(4), bit(5), bit(6)];
            let list = verify_greedy(&draft, &choice);
            let tree =
                verify_tree(&TokenTree::chain(draft), |node| choice[node.map_or(0, |n| n as usize + 1)]);
            assert_eq!(tree.accepted_path.len(), list.accepted_drafts);
            assert_eq!(tree.target_token, list.target_token);
        }
    }

    #[test]
    fn the_walk_takes_the_branch_the_target_chose() {
        let mut tree = TokenTree::default();
        let a = tree.push(T(1), None);
        let b = tree.push(T(2), None);
        let _ = tree.push(T(3), Some(a));
        let d = tree.push(T(4), Some(b));
        let mut asked = Vec::new();
        let verdict = verify_tree(&tree, |node| {
            asked.push(node);
            node.map_or(T(2), |n| [T(0), T(4), T(0), T(9)][n as usize])
        });
        assert_eq!(verdict, TreeVerdict { accepted_path: vec![b, d], target_token: T(9) });
        assert_eq!(asked, [None, Some(b), Some(d)], "the target is asked along the path only");
    }

    #[test]
    fn an_empty_proposal_commits_the_targets_own_token() {
        assert_eq!(verify_greedy(&[], &[T(3)]), Verdict { accepted_drafts: 0, target_token: T(3) });
        assert_eq!(verify_tree(&TokenTree::default(), |_| T(3)).target_token, T(3));
    }
}
