//! Accept counts. Ratios are derived at the edge, never stored.

/// Counts of one run.
///
/// Sum them over requests with [`AcceptStats::add`]; averages over requests would weigh short answers like long
/// ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AcceptStats {
    /// Target forward passes that verified a proposal (an empty proposal counts too).
    pub verify_steps: u64,
    /// Tokens committed by those steps, the target's own included, cut at end-of-sequence and at the limit.
    pub committed_tokens: u64,
    /// Draft tokens offered.
    pub proposed_drafts: u64,
    /// Draft tokens committed.
    pub accepted_drafts: u64,
    /// `proposals_at[i]`: steps whose proposal reached depth `i + 1`.
    pub proposals_at: Vec<u64>,
    /// `accepted_at[i]`: steps that committed a draft token at depth `i + 1`.
    pub accepted_at: Vec<u64>,
}

impl AcceptStats {
    /// Records one verify step: a proposal of `depth` levels with `proposed` draft tokens in total, of which a
    /// path of `accepted` was kept, and `committed` tokens that entered the output.
    pub fn record(&mut self, depth: usize, proposed: usize, accepted: usize, committed: usize) {
        self.verify_steps += 1;
        self.committed_tokens += committed as u64;
        self.proposed_drafts += proposed as u64;
        self.accepted_drafts += accepted as u64;
        if self.proposals_at.len() < depth {
            self.proposals_at.resize(depth, 0);
            self.accepted_at.resize(depth, 0);
        }
        for i in 0..depth {
            self.proposals_at[i] += 1;
            self.accepted_at[i] += u64::from(i < accepted);
        }
    }

    /// Adds the counts of another run.
    pub fn add(&mut self, other: &AcceptStats) {
        self.verify_steps += other.verify_steps;
        self.committed_tokens += other.committed_tokens;
        self.proposed_drafts += other.proposed_drafts;
        self.accepted_drafts += other.accepted_drafts;
        if self.proposals_at.len() < other.proposals_at.len() {
            self.proposals_at.resize(other.proposals_at.len(), 0);
            self.accepted_at.resize(other.proposals_at.len(), 0);
        }
        for (i, (p, a)) in other.proposals_at.iter().zip(&other.accepted_at).enumerate() {
            self.proposals_at[i] += p;
            self.accepted_at[i] += a;
        }
    }

    /// Committed tokens per verify step, or `None` before the first step.
    pub fn accept_len(&self) -> Option<f64> {
        (self.verify_steps > 0).then(|| self.committed_tokens as f64 / self.verify_steps as f64)
    }

    /// Committed draft tokens per proposed draft token, or `None` if nothing was proposed.
    pub fn draft_accept_rate(&self) -> Option<f64> {
        (self.proposed_drafts > 0).then(|| self.accepted_drafts as f64 / self.proposed_drafts as f64)
    }

    /// Per depth: accepted / proposals that reached that depth (unconditional).
    pub fn accept_rate_at(&self) -> Vec<f64> {
        self.proposals_at.iter().zip(&self.accepted_at).map(|(p, a)| *a as f64 / (*p).max(1) as f64).collect()
    }

    /// Per depth: accepted at this depth given that the depth before was accepted; `None` where that never
    /// happened.
    pub fn cond_accept_rate_at(&self) -> Vec<Option<f64>> {
        (0..self.accepted_at.len())
            .map(|i| {
                let reached = if i == 0 { self.proposals_at[0] } else { self.accepted_at[i - 1] };
                (reached > 0).then(|| self.accepted_at[i] as f64 / reached as f64)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_steps_means_no_accept_length() {
        assert_eq!(AcceptStats::default().accept_len(), None);
        assert_eq!(AcceptStats::default().draft_accept_rate(), None);
    }

    #[test]
    fn counts_are_divided_once_at_the_edge() {
        let mut stats = AcceptStats::default();
        stats.record(3, 3, 3, 4);
        stats.record(3, 3, 0, 1);
        stats.record(3, 3, 1, 1); // end of sequence inside the accepted prefix: two tokens cut to one
        assert_eq!(stats.accept_len(), Some(2.0));
        assert_eq!(stats.accept_rate_at(), vec![2.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]);
        assert_eq!(stats.cond_accept_rate_at(), vec![Some(2.0 / 3.0), Some(0.5), Some(1.0)]);
        let mut twice = stats.clone();
        twice.add(&stats);
        assert_eq!(twice.accept_len(), stats.accept_len());
        assert_eq!(twice.verify_steps, 6);
    }
}
