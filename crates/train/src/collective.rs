//! Processes that train together: what the trainer asks of them.
//!
//! The micro-batches of a step are shared out, their gradients are summed between backward and optimiser, and from there on
//! every process does the same: weights, moments and state are equal everywhere, so only what is written or printed has to
//! be left to one of them, rank 0.
//!
//! These operations know no errors. A process that is lost, or that gives up, ends all of them; whoever made the collective
//! decides how that is told.

use std::ops::Range;

use crate::SumTree;

/// Processes that train together. All of them call the same operations in the same order.
pub trait Collective {
    /// Which of them this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn ranks(&self) -> usize;

    /// True of the one that prints, writes and decides when to stop.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Sums values over the micro-batches of a step, in the order of the tree. `mine` are the sums of this process's own
    /// pieces, in the order of [`SumTree::pieces_of`], `[len]` each; every process gets the whole sum.
    fn sum(&self, tree: &SumTree, mine: Vec<Vec<f32>>, len: usize) -> Vec<f32>;

    /// [`Collective::sum`] of which this process gets its slice alone. `slices` are by rank and cut all values up, each into a run of
    /// neighbours.
    fn sum_slice(&self, tree: &SumTree, mine: Vec<Vec<f32>>, slices: &[Range<usize>]) -> Vec<f32> {
        self.sum(tree, mine, whole(slices))[slices[self.rank()].clone()].to_vec()
    }

    /// Puts together what each process has of some values, its own of the slices; every process gets all.
    fn join_slices(&self, mine: &[f32], slices: &[Range<usize>]) -> Vec<f32> {
        let said = self.gather(mine.iter().flat_map(|x| x.to_le_bytes()).collect());
        let mut all = vec![0.0; whole(slices)];
        for (said, slice) in said.iter().zip(slices) {
            let values = said.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x));
            all[slice.clone()].iter_mut().zip(values).for_each(|(to, x)| *to = x);
        }
        all
    }

    /// [`Collective::join_slices`] for rank 0 alone; the others get nothing.
    fn hand_in_slices(&self, mine: &[f32], slices: &[Range<usize>]) -> Option<Vec<f32>> {
        let all = self.join_slices(mine, slices);
        self.is_first().then_some(all)
    }

    /// What every process has to say, by rank.
    fn gather(&self, mine: Vec<u8>) -> Vec<Vec<u8>>;

    /// What rank 0 has to say; what the others hand in is dropped.
    fn broadcast(&self, from_first: Vec<u8>) -> Vec<u8>;

    /// Returns when all have come here.
    fn barrier(&self) {
        self.gather(Vec::new());
    }

    /// Tells another process something small without waiting until it listens: how far work is, or that it is over. Unlike
    /// the operations above this is called by whoever likes to.
    fn post(&self, to: usize, words: &[u8]);

    /// What was posted to this process since it last asked, each with who said it. What one of them says arrives in its order.
    fn posted(&self) -> Vec<(usize, Vec<u8>)>;

    /// Bytes of gradients, parameters and moments that this process has sent so far.
    fn sent_bytes(&self) -> u64;

    /// Counts bytes of gradients or parameters that went from device to device.
    fn count_sent(&self, bytes: u64);

    /// Tells rank 0 why this process ends before its work does, and waits a while to be ended with the others. Without words
    /// it only waits: rank 0 knows.
    fn give_up(&self, words: &[u8]);

    /// Ends all processes at once with an exit code. Does nothing where there is only this one.
    fn abort(&self, code: u8);
}

/// How many values slices cut up.
fn whole(slices: &[Range<usize>]) -> usize {
    slices.iter().map(|slice| slice.end).max().unwrap_or(0)
}

/// One process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn sum(&self, _: &SumTree, mut mine: Vec<Vec<f32>>, len: usize) -> Vec<f32> {
        mine.pop().unwrap_or_else(|| vec![0.0; len])
    }

    fn gather(&self, mine: Vec<u8>) -> Vec<Vec<u8>> {
        vec![mine]
    }

    fn broadcast(&self, from_first: Vec<u8>) -> Vec<u8> {
        from_first
    }

    fn post(&self, _: usize, _: &[u8]) {}

    fn posted(&self) -> Vec<(usize, Vec<u8>)> {
        Vec::new()
    }

    fn sent_bytes(&self) -> u64 {
        0
    }

    fn count_sent(&self, _: u64) {}

    fn give_up(&self, _: &[u8]) {}

    fn abort(&self, _: u8) {}
}
