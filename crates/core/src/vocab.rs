//! The map between draft ids and target ids.

use crate::{DraftTokenId, TargetTokenId};

/// Maps draft token ids into the target vocabulary.
///
/// On disk this is two tensors of EAGLE-3 checkpoints [eagle3 §3.1]: `d2t`, int64 *offsets*
/// (`target = draft + d2t[draft]`), and `t2d`, a boolean mask over target ids. Draft ids are in ascending order
/// of their target ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabMap {
    /// `[V_draft]` target id of each draft id, strictly ascending.
    targets: Vec<u32>,
    /// `[V]` draft id of each target id, `u32::MAX` where not covered.
    drafts: Vec<u32>,
}

/// What makes a pair of `d2t` and `t2d` no vocabulary map.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VocabMapError {
    /// A draft id points outside the target vocabulary.
    #[error(
        "`d2t[{draft}]` = {offset} points to target id {target}, but the target vocabulary has {vocab} ids"
    )]
    OutOfRange {
        /// Draft id.
        draft: usize,
        /// Its offset.
        offset: i64,
        /// Where it points.
        target: i64,
        /// Target vocabulary size.
        vocab: usize,
    },
    /// Target ids are not strictly ascending.
    #[error("`d2t[{draft}]` points to target id {target}, which is not above the one before it ({before})")]
    NotAscending {
        /// Draft id.
        draft: usize,
        /// Its target id.
        target: i64,
        /// Target id of the draft id before.
        before: i64,
    },
    /// `t2d` disagrees with `d2t`.
    #[error("`t2d[{target}]` is {found}, but `d2t` says {wanted}")]
    MaskDisagrees {
        /// Target id.
        target: usize,
        /// What `t2d` holds.
        found: bool,
        /// What `d2t` implies.
        wanted: bool,
    },
    /// The draft vocabulary is empty or larger than the target's.
    #[error("a draft vocabulary of {draft} ids does not fit a target vocabulary of {target}")]
    Size {
        /// Draft vocabulary size.
        draft: usize,
        /// Target vocabulary size.
        target: usize,
    },
}

impl VocabMap {
    /// The identity map: the draft speaks the whole target vocabulary.
    pub fn identity(vocab: usize) -> VocabMap {
        VocabMap { targets: (0..vocab as u32).collect(), drafts: (0..vocab as u32).collect() }
    }

    /// Builds the map from ascending target ids.
    pub fn from_target_ids(ids: &[u32], vocab: usize) -> Result<VocabMap, VocabMapError> {
        let offsets: Vec<i64> = ids.iter().enumerate().map(|(i, t)| i64::from(*t) - i as i64).collect();
        VocabMap::from_offsets(&offsets, vocab)
    }

    /// Reads the `d2t` tensor of a checkpoint.
    pub fn from_offsets(d2t: &[i64], vocab: usize) -> Result<VocabMap, VocabMapError> {
        if d2t.is_empty() || d2t.len() > vocab {
            return Err(VocabMapError::Size { draft: d2t.len(), target: vocab });
        }
        let mut targets = Vec::with_capacity(d2t.len());
        let mut drafts = vec![u32::MAX; vocab];
        let mut before = -1i64;
        for (draft, offset) in d2t.iter().enumerate() {
            let target = (draft as i64).saturating_add(*offset);
            if target < 0 || target >= vocab as i64 {
                return Err(VocabMapError::OutOfRange { draft, offset: *offset, target, vocab });
            }
            if target <= before {
                return Err(VocabMapError::NotAscending { draft, target, before });
            }
            before = target;
            drafts[target as usize] = draft as u32;
            targets.push(target as u32);
        }
        Ok(VocabMap { targets, drafts })
    }

    /// Reads `d2t` and checks it against `t2d`.
    pub fn from_tensors(d2t: &[i64], t2d: &[bool]) -> Result<VocabMap, VocabMapError> {
        let map = VocabMap::from_offsets(d2t, t2d.len())?;
        for (target, found) in t2d.iter().enumerate() {
            let wanted = map.drafts[target] != u32::MAX;
            if *found != wanted {
                return Err(VocabMapError::MaskDisagrees { target, found: *found, wanted });
            }
        }
        Ok(map)
    }

    /// Chooses the draft vocabulary: ids in `always`, then by count descending and id ascending.
    ///
    /// The published algorithm breaks ties by first appearance [eagle3 §3.2]; the id is portable.
    ///
    /// # Shapes
    /// - `counts`: `[V]` occurrences of each target id at trained positions.
    pub fn from_counts(
        counts: &[u64],
        draft_vocab: usize,
        always: &[TargetTokenId],
    ) -> Result<VocabMap, VocabMapError> {
        if draft_vocab == 0 || draft_vocab > counts.len() {
            return Err(VocabMapError::Size { draft: draft_vocab, target: counts.len() });
        }
        let mut forced = vec![false; counts.len()];
        for id in always {
            if let Some(slot) = forced.get_mut(id.0 as usize) {
                *slot = true;
            }
        }
        let mut ids: Vec<u32> = (0..counts.len() as u32).collect();
        ids.sort_by_key(|i| (!forced[*i as usize], std::cmp::Reverse(counts[*i as usize]), *i));
        ids.truncate(draft_vocab);
        ids.sort_unstable();
        VocabMap::from_target_ids(&ids, counts.len())
    }

    /// Draft vocabulary size.
    pub fn draft_vocab(&self) -> usize {
        self.targets.len()
    }

    /// Target vocabulary size.
    pub fn target_vocab(&self) -> usize {
        self.drafts.len()
    }

    /// True if every target id is covered.
    pub fn is_identity(&self) -> bool {
        self.targets.len() == self.drafts.len()
    }

    /// The target id of a draft id.
    ///
    /// # Panics
    /// If the id is outside the draft vocabulary.
    pub fn to_target(&self, id: DraftTokenId) -> TargetTokenId {
        TargetTokenId(self.targets[id.0 as usize])
    }

    /// The draft id of a target id, if it is covered.
    pub fn to_draft(&self, id: TargetTokenId) -> Option<DraftTokenId> {
        self.drafts.get(id.0 as usize).filter(|d| **d != u32::MAX).map(|d| DraftTokenId(*d))
    }

    /// True if the draft can propose this token.
    pub fn covers(&self, id: TargetTokenId) -> bool {
        self.to_draft(id).is_some()
    }

    /// `[V_draft]` target ids in draft order.
    pub fn target_ids(&self) -> &[u32] {
        &self.targets
    }

    /// `[V_draft]` the `d2t` tensor: offsets.
    pub fn d2t(&self) -> Vec<i64> {
        self.targets.iter().enumerate().map(|(i, t)| i64::from(*t) - i as i64).collect()
    }

    /// `[V]` the `t2d` tensor: mask.
    pub fn t2d(&self) -> Vec<bool> {
        self.drafts.iter().map(|d| *d != u32::MAX).collect()
    }

    /// Share of all counted tokens that the draft can propose, or `None` if nothing was counted.
    pub fn coverage(&self, counts: &[u64]) -> Option<f64> {
        let total: u64 = counts.iter().sum();
        let covered: u64 = self.targets.iter().map(|t| counts.get(*t as usize).copied().unwrap_or(0)).sum();
        (total > 0).then(|| covered as f64 / total as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_choose_frequent_ids_and_break_ties_by_id() {
        let map = VocabMap::from_counts(&[0, 5, 2, 2, 9, 2], 3, &[]).unwrap();
        assert_eq!(map.target_ids(), &[1, 2, 4]);
        assert_eq!(map.d2t(), vec![1, 1, 2]);
        assert_eq!(map.coverage(&[0, 5, 2, 2, 9, 2]), Some(16.0 / 20.0));
    }

    #[test]
    fn fewer_seen_ids_than_the_draft_vocabulary_fill_up_from_the_lowest() {
        let map = VocabMap::from_counts(&[0, 0, 0, 7, 0], 3, &[]).unwrap();
        assert_eq!(map.target_ids(), &[0, 1, 3]);
    }

    #[test]
    fn forced_ids_are_always_in() {
        let map = VocabMap::from_counts(&[9, 8, 7, 0], 2, &[TargetTokenId(3)]).unwrap();
        assert_eq!(map.target_ids(), &[0, 3]);
    }

    #[test]
    fn tensors_round_trip() {
        let map = VocabMap::from_counts(&[3, 0, 1, 4, 1, 5, 9, 2, 6], 4, &[]).unwrap();
        assert_eq!(VocabMap::from_tensors(&map.d2t(), &map.t2d()), Ok(map.clone()));
        for draft in 0..4 {
            let target = map.to_target(DraftTokenId(draft));
            assert_eq!(map.to_draft(target), Some(DraftTokenId(draft)));
        }
    }

    #[test]
    fn broken_tensors_are_refused_with_the_place() {
        let err = |d2t: &[i64], vocab| VocabMap::from_offsets(d2t, vocab).unwrap_err();
        assert!(matches!(err(&[0, 9], 4), VocabMapError::OutOfRange { draft: 1, .. }));
        assert!(matches!(err(&[-1], 4), VocabMapError::OutOfRange { draft: 0, .. }));
        assert!(matches!(err(&[2, 0], 4), VocabMapError::NotAscending { draft: 1, .. }));
        assert!(matches!(err(&[i64::MAX, 0], 4), VocabMapError::OutOfRange { .. }));
        assert!(matches!(err(&[], 4), VocabMapError::Size { .. }));
        let wrong_mask = VocabMap::from_tensors(&[0, 0], &[true, false, true]).unwrap_err();
        assert!(matches!(wrong_mask, VocabMapError::MaskDisagrees { target: 1, .. }));
    }
}
