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
