//! A collective over messages between pairs of processes.
//!
//! A sum goes through owners of slices: each process sends its partial sums slice by slice to the ranks that own them, an owner
//! adds what it got in the order of the tree, and sends the result to all. With one partial sum a rank that is the least
//! that an exact sum over `N` ranks can cost: `2 · (N − 1) / N` times the gradient, per rank and step.

use std::cell::Cell;
use std::ops::Range;

use crate::{Collective, SumTree};

/// A part of a message to a rank, and a place for one from a rank.
pub type Outgoing<'a> = (usize, &'a [u8]);
/// See [`Outgoing`].
pub type Incoming<'a> = (usize, &'a mut [u8]);

/// Messages between processes.
pub trait Link {
    /// Which this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn ranks(&self) -> usize;

    /// Sends and receives until all is done. Messages of a pair arrive in the order in which they were sent, and both sides
    /// know their lengths; nobody sends to itself.
    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>]);

    /// As [`Collective::post`].
    fn post(&self, to: usize, words: &[u8]);

    /// As [`Collective::posted`].
    fn posted(&self) -> Vec<(usize, Vec<u8>)>;

    /// As [`Collective::give_up`].
    fn give_up(&self, words: &[u8]);

    /// Ends all processes with an exit code.
    fn abort(&self, code: u8);
}

impl<L: Link + ?Sized> Link for std::rc::Rc<L> {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn ranks(&self) -> usize {
        (**self).ranks()
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>]) {
        (**self).exchange(outgoing, incoming);
    }

    fn post(&self, to: usize, words: &[u8]) {
        (**self).post(to, words);
    }

    fn posted(&self) -> Vec<(usize, Vec<u8>)> {
        (**self).posted()
    }

    fn give_up(&self, words: &[u8]) {
        (**self).give_up(words);
    }

    fn abort(&self, code: u8) {
        (**self).abort(code);
    }
}

/// A [`Collective`] over a [`Link`].
#[derive(Debug)]
pub struct Ranks<L> {
    link: L,
    sent: Cell<u64>,
}

impl<L: Link> Ranks<L> {
    /// Over a link.
    pub fn new(link: L) -> Ranks<L> {
        Ranks { link, sent: Cell::new(0) }
    }

    /// The link.
    pub fn link(&self) -> &L {
        &self.link
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<L> {
        let me = self.link.rank();
        (0..self.link.ranks()).filter(move |rank| *rank != me)
    }

    /// The slice that a rank owns of so many values.
    fn slice(&self, rank: usize, len: usize) -> Range<usize> {
        let ranks = self.link.ranks();
        rank * len / ranks..(rank + 1) * len / ranks
    }

    fn exchange_counted(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>]) {
        self.link.exchange(outgoing, incoming);
        let sent: usize = outgoing.iter().map(|(_, bytes)| bytes.len()).sum();
        self.count_sent(sent as u64);
    }

    /// All values, of which the others send their slices while this process sends what it has to.
    fn receive_slices(&self, mine: &[f32], slices: &[Range<usize>], outgoing: &[Outgoing<'_>]) -> Vec<f32> {
        let me = self.link.rank();
        let mut in_order: Vec<(usize, Range<usize>)> = slices.iter().cloned().enumerate().collect();
        in_order.sort_by_key(|(_, slice)| (slice.start, slice.end));
        let mut all = vec![0.0; in_order.last().map_or(0, |(_, slice)| slice.end)];
        all[slices[me].clone()].copy_from_slice(mine);
        let cuts = cut_mut(&mut all, in_order.iter().map(|(_, slice)| slice.clone()));
        let mut incoming: Vec<Incoming<'_>> = in_order
            .iter()
            .zip(cuts)
            .filter(|((rank, _), _)| *rank != me)
            .map(|((rank, _), cut)| (*rank, bytemuck::cast_slice_mut(cut)))
            .collect();
        self.exchange_counted(outgoing, &mut incoming);
        all
    }
}

/// Longest thing that a rank says to others, beside numbers of training.
const LONGEST: u64 = 4 << 30;

/// A place for what a rank is about to say, by the length that it says first.
///
/// # Panics
/// That length is not one that a rank says: this is no other rank.
fn room(length: [u8; 8]) -> Vec<u8> {
    let length = u64::from_le_bytes(length);
    assert!(length <= LONGEST, "a rank is about to say {length} bytes");
    vec![0; length as usize]
}

/// Cuts consecutive slices of known lengths out of values.
fn cut_mut(mut values: &mut [f32], ranges: impl Iterator<Item = Range<usize>>) -> Vec<&mut [f32]> {
    let mut cuts = Vec::new();
    for range in ranges {
        let (cut, rest) = values.split_at_mut(range.len());
        cuts.push(cut);
        values = rest;
    }
    cuts
}

impl<L: Link> Collective for Ranks<L> {
    fn rank(&self) -> usize {
        self.link.rank()
    }

    fn ranks(&self) -> usize {
        self.link.ranks()
    }

    fn sum(&self, tree: &SumTree, mine: Vec<Vec<f32>>, len: usize) -> Vec<f32> {
        let slices: Vec<Range<usize>> = (0..self.link.ranks()).map(|rank| self.slice(rank, len)).collect();
        let summed = self.sum_slice(tree, mine, &slices);
        self.join_slices(&summed, &slices)
    }

    fn sum_slice(&self, tree: &SumTree, mine: Vec<Vec<f32>>, slices: &[Range<usize>]) -> Vec<f32> {
        let me = self.link.rank();
        assert_eq!(mine.len(), tree.pieces_of(me).count(), "one sum for each piece of this rank");
        let my_slice = slices[me].clone();
        // Every piece of the tree, in its order, cut to the slice that is ours to add.
        let mut pieces: Vec<Vec<f32>> = Vec::new();
        let mut own = mine.iter();
        for piece in tree.pieces() {
            pieces.push(match piece.rank == me {
                true => own.next().expect("counted above")[my_slice.clone()].to_vec(),
                false => vec![0.0; my_slice.len()],
            });
        }
        let mut outgoing: Vec<Outgoing<'_>> = Vec::new();
        for to in self.others() {
            for piece in &mine {
                outgoing.push((to, bytemuck::cast_slice(&piece[slices[to].clone()])));
            }
        }
        let mut incoming: Vec<Incoming<'_>> = pieces
            .iter_mut()
            .zip(tree.pieces())
            .filter(|(_, piece)| piece.rank != me)
            .map(|(slice, piece)| (piece.rank, bytemuck::cast_slice_mut(slice)))
            .collect();
        self.exchange_counted(&outgoing, &mut incoming);
        drop(mine);
        tree.add(pieces, my_slice.len())
    }

    fn join_slices(&self, mine: &[f32], slices: &[Range<usize>]) -> Vec<f32> {
        let outgoing: Vec<Outgoing<'_>> = self.others().map(|to| (to, bytemuck::cast_slice(mine))).collect();
        self.receive_slices(mine, slices, &outgoing)
    }

    fn hand_in_slices(&self, mine: &[f32], slices: &[Range<usize>]) -> Option<Vec<f32>> {
        if self.is_first() {
            return Some(self.receive_slices(mine, slices, &[]));
        }
        self.exchange_counted(&[(0, bytemuck::cast_slice(mine))], &mut []);
        None
    }

    fn gather(&self, mine: Vec<u8>) -> Vec<Vec<u8>> {
        let me = self.link.rank();
        let length = (mine.len() as u64).to_le_bytes();
        let mut lengths = vec![[0; 8]; self.link.ranks()];
        let outgoing: Vec<Outgoing<'_>> = self.others().map(|to| (to, length.as_slice())).collect();
        let mut incoming: Vec<Incoming<'_>> = lengths
            .iter_mut()
            .enumerate()
            .filter(|(rank, _)| *rank != me)
            .map(|(rank, length)| (rank, length.as_mut_slice()))
            .collect();
        self.link.exchange(&outgoing, &mut incoming);
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|length| room(*length)).collect();
        let outgoing: Vec<Outgoing<'_>> = self.others().map(|to| (to, mine.as_slice())).collect();
        let mut incoming: Vec<Incoming<'_>> = all
            .iter_mut()
            .enumerate()
            .filter(|(rank, _)| *rank != me)
            .map(|(rank, bytes)| (rank, bytes.as_mut_slice()))
            .collect();
        self.link.exchange(&outgoing, &mut incoming);
        all[me] = mine;
        all
    }

    fn broadcast(&self, from_first: Vec<u8>) -> Vec<u8> {
        if self.is_first() {
            let length = (from_first.len() as u64).to_le_bytes();
            let outgoing: Vec<Outgoing<'_>> =
                self.others().flat_map(|to| [(to, length.as_slice()), (to, from_first.as_slice())]).collect();
            self.link.exchange(&outgoing, &mut []);
            return from_first;
        }
        let mut length = [0; 8];
        self.link.exchange(&[], &mut [(0, &mut length)]);
        let mut bytes = room(length);
        self.link.exchange(&[], &mut [(0, &mut bytes)]);
        bytes
    }

    fn post(&self, to: usize, words: &[u8]) {
        self.link.post(to, words);
    }

    fn posted(&self) -> Vec<(usize, Vec<u8>)> {
        self.link.posted()
    }

    fn sent_bytes(&self) -> u64 {
        self.sent.get()
    }

    fn count_sent(&self, bytes: u64) {
        self.sent.set(self.sent.get() + bytes);
    }

    fn give_up(&self, words: &[u8]) {
        self.link.give_up(words);
    }

    fn abort(&self, code: u8) {
        self.link.abort(code);
    }
}

/// A link between threads: for tests of everything that processes do together.
#[doc(hidden)]
pub mod threads {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Arc, Mutex};

    use super::{Incoming, Link, Outgoing, Ranks};
    use crate::Collective;

    /// What was posted and not asked for, by rank.
    type Board = Arc<Mutex<Vec<Vec<(usize, Vec<u8>)>>>>;

    /// One end.
    pub struct ThreadLink {
        rank: usize,
        board: Board,
        /// By rank.
        to: Vec<Sender<Vec<u8>>>,
        /// By rank.
        from: Vec<Receiver<Vec<u8>>>,
    }

    /// Ends for so many threads, by rank.
    pub fn links(ranks: usize) -> Vec<ThreadLink> {
        let board: Board = Arc::new(Mutex::new(vec![Vec::new(); ranks]));
        let link = |rank| ThreadLink { rank, board: Arc::clone(&board), to: Vec::new(), from: Vec::new() };
        let mut links: Vec<ThreadLink> = (0..ranks).map(link).collect();
        for from in 0..ranks {
            for link in &mut links {
                let (sender, receiver) = channel();
                link.from.push(receiver);
                // The sender of `from` to `link`, in the order of the receivers' ranks; moved to its owner below.
                link.to.push(sender);
                debug_assert_eq!(link.to.len(), from + 1);
            }
        }
        let mut senders: Vec<Vec<Option<Sender<Vec<u8>>>>> = links
            .iter_mut()
            .map(|link| std::mem::take(&mut link.to).into_iter().map(Some).collect())
            .collect();
        for link in &mut links {
            let rank = link.rank;
            link.to = senders.iter_mut().map(|to| to[rank].take().expect("one of each pair")).collect();
        }
        links
    }

    /// What every rank has after `work`, by rank.
    pub fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&dyn Collective) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                links(ranks).into_iter().map(|link| scope.spawn(move || work(&Ranks::new(link)))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a rank panics")).collect()
        })
    }

    impl Link for ThreadLink {
        fn rank(&self) -> usize {
            self.rank
        }

        fn ranks(&self) -> usize {
            self.to.len()
        }

        fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>]) {
            for (to, bytes) in outgoing {
                self.to[*to].send(bytes.to_vec()).expect("the other thread lives");
            }
            for (from, bytes) in incoming {
                let found = self.from[*from].recv().expect("the other thread lives");
                assert_eq!(found.len(), bytes.len(), "both sides know the length");
                bytes.copy_from_slice(&found);
            }
        }

        fn post(&self, to: usize, words: &[u8]) {
            self.board.lock().expect("no thread panics with it")[to].push((self.rank, words.to_vec()));
        }

        fn posted(&self) -> Vec<(usize, Vec<u8>)> {
            std::mem::take(&mut self.board.lock().expect("no thread panics with it")[self.rank])
        }

        fn give_up(&self, words: &[u8]) {
            assert!(words.is_empty(), "gave up: {}", String::from_utf8_lossy(words));
        }

        fn abort(&self, code: u8) {
            panic!("aborted with {code}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::threads::on_ranks;
    use super::*;
    use crate::{Rng, Visit};

    /// Values whose sum depends on its order.
    fn gradient(micro_batch: usize, len: usize) -> Vec<f32> {
        let mut rng = Rng::new(5, &[micro_batch as u64]);
        rng.normal(len, 1.0).into_iter().map(|x| x * 10f32.powi(rng.below(8) as i32)).collect()
    }

    fn pieces(tree: &SumTree, rank: usize, len: usize) -> Vec<Vec<f32>> {
        let of = |piece| {
            let (mut now, mut held) = (vec![0.0; len], Vec::new());
            let add = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
            for visit in tree.visits(piece) {
                match visit {
                    Visit::MicroBatch(i) => add(&mut now, &gradient(i, len)),
                    Visit::Hold => held.push(std::mem::replace(&mut now, vec![0.0; len])),
                    Visit::Add => add(&mut now, &held.pop().unwrap()),
                }
            }
            now
        };
        tree.pieces_of(rank).map(of).collect()
    }

    #[test]
    fn any_number_of_ranks_gives_the_same_bits() {
        for (count, len) in [(1, 7), (2, 1), (3, 64), (4, 33), (5, 2), (8, 100), (13, 65)] {
            let tree = SumTree::new(count, 1);
            let alone = crate::Alone.sum(&tree, pieces(&tree, 0, len), len);
            let sequential = (0..count).fold(vec![0.0; len], |mut sum, i| {
                sum.iter_mut().zip(gradient(i, len)).for_each(|(a, b)| *a += b);
                sum
            });
            assert!(count < 8 || alone != sequential, "the values tell orders apart");
            for ranks in 1..=5 {
                let found = on_ranks(ranks, |collective| {
                    let tree = SumTree::new(count, ranks);
                    let mine = pieces(&tree, collective.rank(), len);
                    collective.sum(&tree, mine, len)
                });
                for sum in found {
                    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&sum), bits(&alone), "{count} micro-batches over {ranks}");
                }
            }
        }
    }

    /// The operations that every collective has, by those that it must have.
    struct Plain<'a>(&'a dyn Collective);

    impl Collective for Plain<'_> {
        fn rank(&self) -> usize {
            self.0.rank()
        }

        fn ranks(&self) -> usize {
            self.0.ranks()
        }

        fn sum(&self, tree: &SumTree, mine: Vec<Vec<f32>>, len: usize) -> Vec<f32> {
            self.0.sum(tree, mine, len)
        }

        fn gather(&self, mine: Vec<u8>) -> Vec<Vec<u8>> {
            self.0.gather(mine)
        }

        fn broadcast(&self, from_first: Vec<u8>) -> Vec<u8> {
            self.0.broadcast(from_first)
        }

        fn post(&self, to: usize, words: &[u8]) {
            self.0.post(to, words);
        }

        fn posted(&self) -> Vec<(usize, Vec<u8>)> {
            self.0.posted()
        }

        fn sent_bytes(&self) -> u64 {
            self.0.sent_bytes()
        }

        fn count_sent(&self, bytes: u64) {
            self.0.count_sent(bytes);
        }

        fn give_up(&self, words: &[u8]) {
            self.0.give_up(words);
        }

        fn abort(&self, code: u8) {
            self.0.abort(code);
        }
    }

    #[test]
    fn slices_are_those_of_the_whole_and_come_together_again() {
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for ranks in 1..=4usize {
            for (count, len) in [(1, 7), (3, 2), (4, 41), (5, 64)] {
                // Cut unevenly, and not in the order of the ranks.
                let mut cuts: Vec<usize> =
                    (0..ranks).map(|i| (i * i * len / (ranks * ranks)).min(len)).collect();
                cuts.push(len);
                let slices: Vec<Range<usize>> =
                    (0..ranks).map(|rank| (rank + 1) % ranks).map(|i| cuts[i]..cuts[i + 1]).collect();
                let found = on_ranks(ranks, |collective| {
                    let (tree, rank) = (SumTree::new(count, ranks), collective.rank());
                    let whole = collective.sum(&tree, pieces(&tree, rank, len), len);
                    let before = collective.sent_bytes();
                    let mine = collective.sum_slice(&tree, pieces(&tree, rank, len), &slices);
                    assert_eq!(bits(&mine), bits(&whole[slices[rank].clone()]), "{count} over {ranks}");
                    let sums = tree.pieces_of(rank).count();
                    let sent = collective.sent_bytes() - before;
                    assert_eq!(sent, 4 * (sums * (len - mine.len())) as u64);
                    let joined = collective.join_slices(&mine, &slices);
                    assert_eq!(bits(&joined), bits(&whole));
                    assert_eq!(
                        collective.sent_bytes() - before - sent,
                        4 * ((ranks - 1) * mine.len()) as u64
                    );
                    let before = collective.sent_bytes();
                    let first = collective.hand_in_slices(&mine, &slices);
                    assert_eq!(first.as_deref().map(bits), (rank == 0).then(|| bits(&whole)));
                    let sent = if rank == 0 { 0 } else { 4 * mine.len() as u64 };
                    assert_eq!(collective.sent_bytes() - before, sent);
                    let plain = Plain(collective);
                    let again = plain.sum_slice(&tree, pieces(&tree, rank, len), &slices);
                    assert_eq!(bits(&again), bits(&mine));
                    assert_eq!(bits(&plain.join_slices(&mine, &slices)), bits(&whole));
                    assert_eq!(plain.hand_in_slices(&mine, &slices), first);
                    mine.len()
                });
                assert_eq!(found.iter().sum::<usize>(), len);
            }
        }
    }

    #[test]
    fn traffic_is_that_of_the_formula() {
        let len = 1200;
        for (ranks, count) in [(1, 4), (2, 2), (2, 8), (4, 4), (4, 8), (3, 3)] {
            let sent = on_ranks(ranks, |collective| {
                let tree = SumTree::new(count, ranks);
                collective.sum(&tree, pieces(&tree, collective.rank(), len), len);
                collective.sent_bytes()
            });
            let wanted = 4 * 2 * (ranks - 1) * len / ranks;
            assert!(sent.iter().all(|bytes| *bytes == wanted as u64), "{sent:?}, expected {wanted}");
        }
    }

    #[test]
    fn all_hear_what_each_says_and_what_the_first_says() {
        for ranks in 1..=4 {
            let heard = on_ranks(ranks, |collective| {
                let rank = collective.rank();
                let all = collective.gather(vec![rank as u8; rank]);
                let first = collective.broadcast(format!("from {rank}").into_bytes());
                collective.barrier();
                (all, first)
            });
            let wanted: Vec<Vec<u8>> = (0..ranks).map(|rank| vec![rank as u8; rank]).collect();
            for (all, first) in heard {
                assert_eq!((all, first), (wanted.clone(), b"from 0".to_vec()));
            }
        }
    }
}
