//! The shape of a proposal: a forest of draft tokens under the last committed token. A chain is a tree.

use crate::TargetTokenId;

/// Draft tokens in topological order: a parent stands before its children.
///
/// Node `i` has token `tokens[i]` and parent `parents[i]`; `None` means that it follows the last committed token
/// directly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenTree {
    /// `[N]` draft tokens in target ids.
    pub tokens: Vec<TargetTokenId>,
    /// `[N]` parent of each node.
    pub parents: Vec<Option<u32>>,
}

/// What makes a list of tokens and parents no tree.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TreeError {
    /// A node names a parent that does not stand before it.
    #[error("node {node} has parent {parent}, which does not stand before it")]
    ParentAfterChild {
        /// The node.
        node: usize,
        /// Its parent.
        parent: u32,
    },
    /// Token and parent lists differ in length.
    #[error("{tokens} tokens but {parents} parents")]
    Lengths {
        /// Number of tokens.
        tokens: usize,
        /// Number of parents.
        parents: usize,
    },
}

impl TokenTree {
    /// A chain: each token follows the one before.
    pub fn chain(tokens: impl IntoIterator<Item = TargetTokenId>) -> TokenTree {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let parents = TokenTree::chain_parents(tokens.len());
        TokenTree { tokens, parents }
    }

    /// Parents of `count` rows that follow each other: `None, 0, 1, 2, …`.
    pub fn chain_parents(count: usize) -> Vec<Option<u32>> {
        (0..count).map(|i| i.checked_sub(1).map(|p| p as u32)).collect()
    }

    /// Number of draft tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// True if nothing is proposed.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Adds a node and returns its index.
    pub fn push(&mut self, token: TargetTokenId, parent: Option<u32>) -> u32 {
        self.tokens.push(token);
        self.parents.push(parent);
        (self.tokens.len() - 1) as u32
    }

    /// Checks the order invariant.
    pub fn validate(&self) -> Result<(), TreeError> {
        if self.tokens.len() != self.parents.len() {
            return Err(TreeError::Lengths { tokens: self.tokens.len(), parents: self.parents.len() });
        }
        for (node, parent) in self.parents.iter().enumerate() {
            if let Some(p) = parent
                && *p as usize >= node
            {
                return Err(TreeError::ParentAfterChild { node, parent: *p });
            }
        }
        Ok(())
    }

    /// `[N]` depth of each node; direct followers of the committed text have depth 0.
    pub fn depths(&self) -> Vec<u32> {
        let mut depths: Vec<u32> = Vec::with_capacity(self.len());
        for parent in &self.parents {
            depths.push(parent.map_or(0, |p| depths[p as usize] + 1));
        }
        depths
    }

    /// Number of levels.
    pub fn depth(&self) -> usize {
        self.depths().iter().max().map_or(0, |d| *d as usize + 1)
    }

    /// Nodes on the way from the root to `node`, both ends included.
    pub fn path_to(&self, node: u32) -> Vec<u32> {
        let mut path = vec![node];
        let mut at = node;
        while let Some(p) = self.parents[at as usize] {
            path.push(p);
            at = p;
        }
        path.reverse();
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_is_the_tree_with_one_child_each() {
        let chain = TokenTree::chain([5, 6, 7].map(TargetTokenId));
        assert_eq!(chain.parents, vec![None, Some(0), Some(1)]);
        assert_eq!(chain.depths(), vec![0, 1, 2]);
        assert_eq!(chain.depth(), 3);
        assert_eq!(chain.path_to(2), vec![0, 1, 2]);
        assert!(chain.validate().is_ok());
    }

    #[test]
    fn a_parent_after_its_child_is_refused() {
        let bad = TokenTree { tokens: vec![TargetTokenId(1)], parents: vec![Some(0)] };
        assert_eq!(bad.validate(), Err(TreeError::ParentAfterChild { node: 0, parent: 0 }));
    }
}
