//! Packing rows into sequences of one length, so that no compute is spent on padding.
//!
//! A packed sequence is a list of whole rows; attention and positions stay per row, so packing changes nothing in what
//! is learned. Best-fit decreasing: the longest row first, each into the sequence where it leaves the least room.

use std::collections::BTreeMap;

/// Rows of one sequence, in ascending order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedSequence {
    /// Indices into the lengths given to [`pack`].
    pub documents: Vec<usize>,
    /// Tokens used.
    pub tokens: usize,
}

/// A row that fits into no sequence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("row {row} has {length} tokens, more than the sequence length of {pack_length}")]
pub struct PackError {
    /// Index of the row.
    pub row: usize,
    /// Its length.
    pub length: usize,
    /// Tokens in a sequence.
    pub pack_length: usize,
}

impl PackError {
    /// Advice for the user.
    pub fn hint(&self) -> Option<String> {
        Some("raise `train.pack_length` or lower `data.max_length`".into())
    }
}

/// Packs rows of the given lengths. The same lengths give the same packing; sequences come in the order of their first
/// row.
///
/// # Errors
/// [`PackError`] if a row is longer than a sequence.
pub fn pack(lengths: &[usize], pack_length: usize) -> Result<Vec<PackedSequence>, PackError> {
    if let Some((row, length)) = lengths.iter().copied().enumerate().find(|(_, length)| *length > pack_length)
    {
        return Err(PackError { row, length, pack_length });
    }
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|row| (std::cmp::Reverse(lengths[*row]), *row));
    let mut sequences: Vec<PackedSequence> = Vec::new();
    // Room left to sequences with that much room; the newest is taken, which order does not matter but must be fixed.
    let mut room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for row in order {
        let length = lengths[row];
        let fit = room.range_mut(length..).next().map(|(left, open)| (*left, open.pop(), open.is_empty()));
        let (left, sequence) = match fit {
            Some((left, Some(sequence), empty)) => {
                if empty {
                    room.remove(&left);
                }
                (left, sequence)
            }
            _ => {
                sequences.push(PackedSequence { documents: Vec::new(), tokens: 0 });
                (pack_length, sequences.len() - 1)
            }
        };
        sequences[sequence].documents.push(row);
        sequences[sequence].tokens += length;
        room.entry(left - length).or_default().push(sequence);
    }
    for sequence in &mut sequences {
        sequence.documents.sort_unstable();
    }
    sequences.sort_by_key(|sequence| sequence.documents[0]);
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_fill_the_gaps_that_others_leave() {
        let packed = pack(&[6, 4, 7, 3, 10], 10).expect("packs");
        let documents: Vec<&[usize]> = packed.iter().map(|p| p.documents.as_slice()).collect();
        assert_eq!(documents, [&[0, 1][..], &[2, 3], &[4]]);
        assert_eq!(pack(&[3, 11], 10), Err(PackError { row: 1, length: 11, pack_length: 10 }));
        assert_eq!(pack(&[], 10), Ok(Vec::new()));
    }

    proptest! {
        #[test]
        fn every_row_is_packed_once_and_no_sequence_overflows(lengths in proptest::collection::vec(0usize..50, 0..80)) {
            let packed = pack(&lengths, 50).expect("packs");
            let mut seen = vec![0; lengths.len()];
            for sequence in &packed {
                let total: usize = sequence.documents.iter().map(|d| lengths[*d]).sum();
                prop_assert_eq!(total, sequence.tokens);
                prop_assert!(total <= 50);
                sequence.documents.iter().for_each(|d| seen[*d] += 1);
            }
            prop_assert!(seen.iter().all(|n| *n == 1));
            // Best-fit decreasing needs at most 11/9 of the optimum and one more [Johnson 1973].
            let least = lengths.iter().sum::<usize>().div_ceil(50).max(lengths.iter().filter(|l| **l > 25).count());
            prop_assert!(packed.len() * 9 <= least * 11 * 2 + 9 * 4);
        }
    }
}
