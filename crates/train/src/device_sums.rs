//! Sums between the devices of processes, as [`crate::Ranks`] makes them on the host: pieces go slice by slice to owners, and an
//! owner adds them in the order of the tree. The additions are the same, so the bits are.

use std::ops::Range;

use draftsmith_kernels::{Part, Peers, TrainKernels};

use crate::SumTree;

fn bytes(parts: &[Part]) -> u64 {
    parts.iter().map(|part| (part.values.len() * size_of::<f32>()) as u64).sum()
}

/// Leaves in the last of `bufs`, in this rank's slice, the sum over the micro-batches of a step. The first ones are the sums of this
/// rank's own pieces, in their order, the last buffer too if it has any. What they hold then is of no use elsewhere. Returns
/// the bytes that were sent.
pub(crate) fn sum_slice<K: TrainKernels>(
    (kernels, peers): (&K, &dyn Peers<K::Buf>),
    tree: &SumTree,
    bufs: &mut [&mut K::Buf],
    slices: &[Range<usize>],
    rank: usize,
) -> u64 {
    let (mine, own) = (&slices[rank], tree.pieces_of(rank).count());
    assert_eq!(bufs.len(), own.max(1), "one sum for each piece of this rank");
    let others = tree.pieces().len() - own;
    let mut came: Vec<K::Buf> = (0..others).map(|_| kernels.scratch(mine.len())).collect();
    let (last, first_came) = (bufs.len() - 1, bufs.len());
    let mut bufs: Vec<&mut K::Buf> = bufs.iter_mut().map(|buf| &mut **buf).chain(&mut came).collect();
    let to_others = (0..slices.len()).filter(|to| *to != rank);
    let outgoing: Vec<Part> = to_others
        .flat_map(|to| (0..own).map(move |buf| Part { rank: to, buf, values: slices[to].clone() }))
        .collect();
    // Where each piece of the tree stands, cut to the slice that is ours to add: buffer and first value.
    let (mut next_own, mut next_came) = (0.., first_came..);
    let mut incoming = Vec::new();
    let places = tree.pieces().iter().map(|piece| {
        let next = if piece.rank == rank { &mut next_own } else { &mut next_came };
        let buf = next.next().expect("counts on");
        if piece.rank == rank {
            return (buf, mine.start);
        }
        incoming.push(Part { rank: piece.rank, buf, values: 0..mine.len() });
        (buf, 0)
    });
    let places: Vec<(usize, usize)> = places.collect();
    peers.exchange(&mut bufs, &outgoing, &incoming);
    let mut copy = |(from, from_at): (usize, usize), (to, to_at): (usize, usize), accumulate| {
        let [from, to] = bufs.get_disjoint_mut([from, to]).expect("pieces lie in buffers of their own");
        peers.copy((from, from_at), (to, to_at), mine.len(), accumulate);
    };
    let sum = tree.fold(places, |even, odd| {
        copy(odd, even, true);
        even
    });
    // Without a piece the buffer holds zeros, which are the sum.
    if let Some(sum) = sum.filter(|(buf, _)| *buf != last) {
        copy(sum, (last, mine.start), false);
    }
    bytes(&outgoing)
}

/// Each rank's slice of a buffer to all. Returns the bytes that were sent.
pub(crate) fn join_slices<B>(peers: &dyn Peers<B>, buf: &mut B, slices: &[Range<usize>], rank: usize) -> u64 {
    let others = (0..slices.len()).filter(|other| *other != rank);
    let part = |rank, values: &Range<usize>| Part { rank, buf: 0, values: values.clone() };
    let outgoing: Vec<Part> = others.clone().map(|to| part(to, &slices[rank])).collect();
    let incoming: Vec<Part> = others.map(|from| part(from, &slices[from])).collect();
    peers.exchange(&mut [buf], &outgoing, &incoming);
    bytes(&outgoing)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use draftsmith_cuda::shim::{Shim, ShimLink, links};
    use draftsmith_cuda::{Cuda, CudaOptions};
    use draftsmith_kernels::{Memory, catch_failure};

    use super::*;
    use crate::ranks::threads::on_ranks;
    use crate::{Collective, Rng, Slices};

    fn device(link: Option<ShimLink>) -> Cuda<Shim> {
        let folder = std::env::current_exe().unwrap().with_file_name("cuda-shim");
        std::fs::create_dir_all(&folder).unwrap();
        let device = Cuda::new(Shim::new(&folder).unwrap(), CudaOptions::default());
        match link {
            Some(link) => device.with_peers(link),
            None => device,
        }
    }

    /// Sums whose own sum depends on its order.
    fn pieces(tree: &SumTree, rank: usize, len: usize) -> Vec<Vec<f32>> {
        let mut rng = Rng::new(9, &[rank as u64, tree.pieces().len() as u64]);
        let mut value = |x: f32| x * 10f32.powi(rng.below(7) as i32);
        let normal = |i: usize| Rng::new(8, &[rank as u64, i as u64]).normal(len, 1.0);
        tree.pieces_of(rank)
            .enumerate()
            .map(|(i, _)| normal(i).into_iter().map(&mut value).collect())
            .collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    /// A rank's sum of pieces that it has, over devices or over hosts; with the bytes that it sent.
    fn sum(
        collective: &dyn Collective,
        link: Option<ShimLink>,
        tree: &SumTree,
        (slices, to_all): (&[Range<usize>], bool),
    ) -> (Vec<u32>, u64) {
        let (rank, len) = (collective.rank(), slices.iter().map(|slice| slice.end).max().unwrap());
        let pieces = pieces(tree, rank, len);
        let Some(link) = link else {
            let mine = collective.sum_slice(tree, pieces, slices);
            let mine = if to_all { collective.join_slices(&mine, slices) } else { mine };
            return (bits(&mine), collective.sent_bytes());
        };
        let k = device(Some(link));
        let mut bufs: Vec<_> = pieces.iter().map(|piece| k.upload(piece)).collect();
        if bufs.is_empty() {
            bufs.push(k.zeros(len));
        }
        let (peers, copied) = (k.peers().unwrap(), k.launcher().copied());
        let mut all: Vec<_> = bufs.iter_mut().collect();
        let mut sent = sum_slice((&k, peers), tree, &mut all, slices, rank);
        if to_all {
            sent += join_slices(peers, all.pop().unwrap(), slices, rank);
        }
        assert_eq!(k.launcher().copied(), copied, "nothing goes over the host");
        let own = if to_all { 0..len } else { slices[rank].clone() };
        let mut found = vec![0.0; own.len()];
        k.download(bufs.last().unwrap(), own.start, &mut found);
        (bits(&found), sent)
    }

    #[test]
    fn sums_over_devices_have_the_bits_of_sums_over_hosts() {
        device(None);
        let orders = Mutex::new(0);
        for (count, len) in [(1, 70), (2, 1), (3, 200), (4, 33), (5, 130), (8, 64)] {
            for ranks in 2..=4 {
                let ends = || Mutex::new(links(ranks).into_iter().map(Some).collect::<Vec<_>>());
                for to_all in [true, false] {
                    let (ends, tree) = (ends(), SumTree::new(count, ranks));
                    let wanted = on_ranks(ranks, |collective| {
                        let slices = Slices::of_lines(collective).of(count, len);
                        sum(collective, None, &tree, (&slices, to_all))
                    });
                    let found = on_ranks(ranks, |collective| {
                        let slices = Slices::of_lines(collective).of(count, len);
                        let link = ends.lock().unwrap()[collective.rank()].take();
                        sum(collective, link, &tree, (&slices, to_all))
                    });
                    assert_eq!(found, wanted, "{count} micro-batches over {ranks}, {len} values");
                }
                // Whether the order can be told from the bits.
                let tree = SumTree::new(count, ranks);
                let all: Vec<Vec<f32>> = (0..ranks).flat_map(|rank| pieces(&tree, rank, len)).collect();
                let of = |all: &[Vec<f32>]| {
                    let add = |sum: Vec<f32>, x: &Vec<f32>| sum.iter().zip(x).map(|(a, b)| a + b).collect();
                    all.iter().fold(vec![0.0; len], add)
                };
                let turned: Vec<Vec<f32>> = all.iter().rev().cloned().collect();
                *orders.lock().unwrap() += usize::from(bits(&of(&all)) != bits(&of(&turned)));
            }
        }
        assert!(*orders.lock().unwrap() > 5, "the values tell orders apart");
    }

    #[test]
    fn mistakes_in_an_exchange_are_found() {
        let mut ends = links(2);
        let k = device(Some(ends.remove(0)));
        let mut buf = k.zeros(8);
        let part = |rank, values| Part { rank, buf: 0, values };
        let peers = k.peers().unwrap();
        let mut failed = |outgoing: &[Part], incoming: &[Part]| {
            catch_failure(|| peers.exchange(&mut [&mut buf], outgoing, incoming)).unwrap_err().message
        };
        let overlap = failed(&[part(1, 0..4)], &[part(1, 3..5)]);
        assert_eq!(overlap, "an exchange failed: what comes in overlaps another message");
        assert!(failed(&[], &[part(1, 0..2), part(1, 1..2)]).contains("overlaps"));
        assert!(failed(&[part(0, 0..1)], &[]).contains("a message to nobody else"));
        assert!(failed(&[part(2, 0..1)], &[]).contains("a message to nobody else"));
        drop(ends);
        assert!(failed(&[part(1, 0..1)], &[]).contains("another thread is gone"));
    }
}
