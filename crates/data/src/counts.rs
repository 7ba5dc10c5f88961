//! How often each token is trained, and the draft vocabulary that follows from it.

use draftsmith_core::{TargetTokenId, VocabMap, VocabMapError};

/// Occurrences of each target id at trained positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenCounts {
    /// `[V]` occurrences.
    counts: Vec<u64>,
    total: u64,
}

impl TokenCounts {
    /// Starts at zero for a target vocabulary of `vocab` ids (rows of its head, which may be more than the tokenizer's).
    pub fn new(vocab: usize) -> TokenCounts {
        TokenCounts { counts: vec![0; vocab], total: 0 }
    }

    /// Adds the trained tokens of a row. Ids outside the vocabulary are not counted.
    ///
    /// # Panics
    /// If the lists differ in length.
    pub fn add(&mut self, ids: &[u32], loss_mask: &[bool]) {
        assert_eq!(ids.len(), loss_mask.len(), "one mask entry per id");
        for (id, trained) in ids.iter().zip(loss_mask) {
            if let (true, Some(count)) = (*trained, self.counts.get_mut(*id as usize)) {
                *count += 1;
                self.total += 1;
            }
        }
    }

    /// `[V]` occurrences.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// All trained tokens.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Different tokens seen.
    pub fn distinct(&self) -> usize {
        self.counts.iter().filter(|c| **c > 0).count()
    }

    /// The draft vocabulary: what is in `always` (see `Tokenizer::always_in_draft_vocab`), then by count.
    ///
    /// # Errors
    /// If `draft_vocab` is zero or larger than the target's vocabulary.
    pub fn vocab_map(&self, draft_vocab: usize, always: &[TargetTokenId]) -> Result<VocabMap, VocabMapError> {
        VocabMap::from_counts(&self.counts, draft_vocab, always)
    }

    /// Share of trained tokens that the draft can propose; `None` before the first token.
    pub fn coverage(&self, map: &VocabMap) -> Option<f64> {
        let covered: u64 = map.target_ids().iter().filter_map(|id| self.counts.get(*id as usize)).sum();
        (self.total > 0).then(|| covered as f64 / self.total as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trained_tokens_count_and_forced_ones_come_first() {
        let mut counts = TokenCounts::new(8);
        counts.add(&[5, 5, 6, 7, 7, 7, 99], &[true, true, true, false, false, false, true]);
        assert_eq!((counts.total(), counts.distinct()), (3, 2));
        let map = counts.vocab_map(2, &[TargetTokenId(0)]).expect("a map");
        assert_eq!(map.target_ids(), [0, 5]);
        assert_eq!(counts.coverage(&map), Some(2.0 / 3.0));
        assert_eq!(TokenCounts::new(4).coverage(&VocabMap::identity(4)), None);
    }
}
