//! Which values of every parameter a rank owns, where ranks share the optimiser's moments [rajbhandari2020].
//!
//! A rank has one run of neighbours of each parameter, cut at multiples of the values whose squares are summed into one number
//! ([`TrainKernels::SQUARES`]): so the global norm comes of the same numbers, in the same order, as in one process. A
//! parameter that is shorter belongs to one rank whole; each parameter begins with the next rank, so that these go round.

use std::ops::Range;

use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::sum_of_squares;

use crate::Collective;

/// Values that devices send without a loss where a message begins: 128 bytes.
const LINE: usize = 32;

/// How parameters are cut among ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slices {
    rank: usize,
    ranks: usize,
    /// Values that are never cut.
    block: usize,
}

impl Slices {
    /// Of the processes of a collective that compute with these kernels.
    pub fn among<K: TrainKernels>(collective: &dyn Collective) -> Slices {
        Slices { rank: collective.rank(), ranks: collective.ranks(), block: K::SQUARES }
    }

    /// Whole cache lines of a device, for sums that all processes get.
    pub(crate) fn of_lines(collective: &dyn Collective) -> Slices {
        Slices { rank: collective.rank(), ranks: collective.ranks(), block: LINE }
    }

    /// By rank the values of the trained parameter at a place, `len` long.
    pub fn of(&self, place: usize, len: usize) -> Vec<Range<usize>> {
        let Slices { ranks, block, .. } = *self;
        let blocks = len.div_ceil(block);
        let part = |rank: usize| {
            let part = (rank + place) % ranks;
            let at = |part: usize| (part * blocks / ranks * block).min(len);
            at(part)..at(part + 1)
        };
        (0..ranks).map(part).collect()
    }

    /// Those of this rank.
    pub fn mine(&self, place: usize, len: usize) -> Range<usize> {
        self.of(place, len).swap_remove(self.rank)
    }

    /// The global L2 norm of values of which each rank has its slices: `mine` are the sums of their squares, by parameter, and
    /// `lens` how long the whole parameters are.
    pub fn norm(&self, collective: &dyn Collective, mine: &[Vec<f64>], lens: &[usize]) -> f64 {
        let said = collective.gather(mine.iter().flatten().flat_map(|sum| sum.to_le_bytes()).collect());
        let mut sums: Vec<_> = said
            .iter()
            .map(|said| {
                said.chunks_exact(8).map(|sum| f64::from_le_bytes(sum.try_into().expect("eight bytes")))
            })
            .collect();
        let of = |(place, len): (usize, &usize)| {
            let mut parts: Vec<_> = self.of(place, *len).into_iter().enumerate().collect();
            // Each rank's are read in the order of parameters; within one they stand as in the whole.
            let mut by_rank: Vec<Vec<f64>> = parts
                .iter()
                .map(|(rank, part)| sums[*rank].by_ref().take(part.len().div_ceil(self.block)).collect())
                .collect();
            parts.sort_by_key(|(_, part)| (part.start, part.end));
            parts.iter().flat_map(|(rank, _)| std::mem::take(&mut by_rank[*rank])).collect()
        };
        let whole: Vec<Vec<f64>> = lens.iter().enumerate().map(of).collect();
        sum_of_squares(&whole).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_belongs_to_one_rank_and_blocks_stay_whole() {
        for ranks in 1..=5 {
            for (place, len) in [(0, 0), (0, 1), (1, 7), (2, 8), (3, 9), (4, 40), (5, 41), (6, 1000)] {
                let of = |rank| Slices { rank, ranks, block: 8 };
                let mut parts = of(0).of(place, len);
                let blocks = len.div_ceil(8);
                for (rank, part) in parts.iter().enumerate() {
                    assert_eq!(of(rank).mine(place, len), *part);
                    assert!(part.start % 8 == 0 || part.start == len, "{part:?}");
                    let own = part.len().div_ceil(8);
                    assert!(own == blocks / ranks || own == blocks.div_ceil(ranks), "{own} of {blocks}");
                }
                parts.sort_by_key(|part| (part.start, part.end));
                let end = parts.iter().fold(0, |end, part| {
                    assert_eq!(part.start, end);
                    part.end
                });
                assert_eq!(end, len, "{parts:?}");
            }
        }
    }

    #[test]
    fn short_parameters_go_round() {
        let slices = Slices { rank: 0, ranks: 3, block: 8 };
        let owner = |place| slices.of(place, 5).iter().position(|part| part.len() == 5).unwrap();
        assert_eq!((0..4).map(owner).collect::<Vec<_>>(), [2, 1, 0, 2]);
    }
}
