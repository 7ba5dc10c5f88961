//! What a run costs where several processes share it: which part of the work a rank has, and what goes between them.
//!
//! Pure functions of counts; whoever makes a bill brings the rates.

use draftsmith_train::SumTree;
use serde::Serialize;

/// 10 Gbit/s: what machines that were not bought for training have between them.
pub const LINK_GBIT: f64 = 10.0;

/// The processes that a bill is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Among {
    /// How many there are.
    pub ranks: u64,
    /// What a rank can send in a second, while it receives as much.
    pub link_bytes_per_s: f64,
}

impl Among {
    /// One process.
    pub const ALONE: Among = Among { ranks: 1, link_bytes_per_s: f64::INFINITY };

    /// So many with that between them.
    pub fn new(ranks: u32, link_gbit: f64) -> Among {
        Among { ranks: u64::from(ranks.max(1)), link_bytes_per_s: link_gbit * 1e9 / 8.0 }
    }

    /// The most of `count` equal things that a rank has, as a share of all.
    pub fn share(&self, count: u64) -> f64 {
        count.div_ceil(self.ranks) as f64 / count.max(1) as f64
    }

    /// Bytes that the busiest rank sends in an optimiser step.
    pub fn sent_bytes_a_step(&self, micro_batches: u64, parameters: u64) -> u64 {
        if self.ranks == 1 {
            return 0;
        }
        // Its sums go to the owners of their slices, and its slice of the whole sum to all.
        let tree = SumTree::new(micro_batches as usize, self.ranks as usize);
        let sums = (0..self.ranks as usize).map(|rank| tree.pieces_of(rank).count()).max().unwrap_or(0);
        let share = (self.ranks - 1) as f64 / self.ranks as f64;
        (4.0 * (sums + 1) as f64 * share * parameters as f64) as u64
    }

    /// Bytes of AdamW's moments that a rank has less of where ranks share them.
    pub fn moments_elsewhere(&self, parameters: u64) -> u64 {
        8 * parameters - 8 * parameters / self.ranks
    }

    /// Sums of gradients that a rank puts aside while it adds up its own.
    pub fn sums_aside(&self, micro_batches: u64) -> u64 {
        u64::from(micro_batches.div_ceil(self.ranks).next_power_of_two().ilog2())
    }

    /// What keeps a step from being as many times faster as there are ranks; `None` if its micro-batches go round.
    fn uneven(&self, micro_batches: u64, pack_length: u32) -> Option<String> {
        let (ranks, left) = (self.ranks, micro_batches % self.ranks);
        if left == 0 {
            return None;
        }
        let tokens = micro_batches.next_multiple_of(ranks) * u64::from(pack_length);
        let what = match micro_batches < ranks {
            true => format!("{} ranks have nothing to do in it", ranks - micro_batches),
            false => format!("in its last round {} ranks wait for {left}", ranks - left),
        };
        Some(format!(
            "a step has {micro_batches} micro-batches: {what}; with `train.tokens_per_step = {tokens}` all have as many"
        ))
    }
}

/// What a plan says about its ranks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RanksPlan {
    /// How many there are.
    pub ranks: u64,
    /// What each can send in a second.
    pub link_bytes_per_s: f64,
    /// Micro-batches of an optimiser step.
    pub micro_batches: u64,
    /// Bytes that the busiest rank sends in one.
    pub sent_bytes_a_step: u64,
    /// Seconds of the same work by one process.
    pub alone_seconds: f64,
    /// Seconds that more ranks would not shorten: what rank 0 does alone, and what every rank does in full.
    pub fixed_seconds: f64,
    /// Most memory where all ranks are on one machine.
    pub one_machine_memory_bytes: Option<u64>,
    /// What is assumed, and what does not grow with the ranks.
    pub notes: Vec<String>,
}

impl RanksPlan {
    /// The words of it; whoever makes the bill fills in the sums.
    pub(crate) fn new(
        among: &Among,
        (micro_batches, pack_length): (u64, u32),
        parameters: u64,
        shares_moments: bool,
    ) -> RanksPlan {
        let Among { ranks, link_bytes_per_s } = *among;
        let gbit = link_bytes_per_s * 8.0 / 1e9;
        let mut notes = vec![
            format!(
                "each rank is taken to have a machine like this one, {gbit:.0} Gbit/s to the others and one disk with \
                 them; none of that was measured"
            ),
            format!(
                "on one machine {ranks} ranks share its cores and its way to memory: expect the time of one process \
                 there, in {ranks} times the memory"
            ),
            format!(
                "rank 0 alone reads the data, makes the bundle and measures it; every rank does {}",
                match shares_moments {
                    true => "its part of the optimiser and keeps the moments of that",
                    false => "the whole optimiser",
                }
            ),
        ];
        notes.extend(among.uneven(micro_batches, pack_length));
        RanksPlan {
            ranks,
            link_bytes_per_s,
            micro_batches,
            sent_bytes_a_step: among.sent_bytes_a_step(micro_batches, parameters),
            alone_seconds: 0.0,
            fixed_seconds: 0.0,
            one_machine_memory_bytes: None,
            notes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use draftsmith_train::{Collective, Ranks, ranks::threads};

    #[test]
    fn traffic_is_what_the_collective_sends() {
        let len = 1200;
        for (ranks, micro_batches) in [(1, 4), (2, 2), (2, 3), (3, 3), (3, 7), (4, 2), (4, 8), (5, 11)] {
            let sent = std::thread::scope(|scope| {
                let work = |link| {
                    let collective = Ranks::new(link);
                    let tree = SumTree::new(micro_batches, ranks);
                    let mine = tree.pieces_of(collective.rank()).map(|_| vec![1.0; len]).collect();
                    collective.sum(&tree, mine, len);
                    let sent = collective.sent_bytes();
                    // Where ranks share the optimiser, parameters go out in place of sums.
                    let slices: Vec<_> =
                        (0..ranks).map(|rank| rank * len / ranks..(rank + 1) * len / ranks).collect();
                    let mine = tree.pieces_of(collective.rank()).map(|_| vec![1.0; len]).collect();
                    let mine = collective.sum_slice(&tree, mine, &slices);
                    collective.join_slices(&mine, &slices);
                    assert_eq!(collective.sent_bytes(), 2 * sent);
                    sent
                };
                let threads: Vec<_> =
                    threads::links(ranks).into_iter().map(|link| scope.spawn(move || work(link))).collect();
                threads.into_iter().map(|t| t.join().unwrap()).max().unwrap()
            });
            let said = Among::new(ranks as u32, 10.0).sent_bytes_a_step(micro_batches as u64, len as u64);
            assert_eq!(said, sent, "{micro_batches} over {ranks}");
        }
    }

    #[test]
    fn a_rank_has_its_share_and_what_is_left_over() {
        let four = Among::new(4, 10.0);
        assert_eq!((four.share(8), four.share(2), four.share(6)), (0.25, 0.5, 2.0 / 6.0));
        assert_eq!((Among::ALONE.share(7), Among::ALONE.sent_bytes_a_step(4, 9)), (1.0, 0));
        assert_eq!((Among::ALONE.sums_aside(8), four.sums_aside(8), four.sums_aside(4)), (3, 1, 0));
        assert_eq!((four.moments_elsewhere(1000), Among::ALONE.moments_elsewhere(1000)), (6000, 0));
        assert_eq!(four.uneven(8, 512), None);
        assert!(
            four.uneven(2, 512)
                .unwrap()
                .contains("2 ranks have nothing to do in it; with `train.tokens_per_step = 2048`")
        );
        assert!(
            four.uneven(6, 512).unwrap().contains("2 ranks wait for 2; with `train.tokens_per_step = 4096`")
        );
    }
}
