//! Where blocks begin: candidates of each row, drawn without replacement [dflash §1.2].

use draftsmith_kernels::train::DocSpan;

use crate::{Pack, Rng};

/// Names the random stream.
const STREAM: u64 = 0x616e_6368_6f72;

/// Slots of a document where a block may begin: the slot and the one behind it are trained.
pub(super) fn candidates(pack: &Pack, doc: DocSpan) -> Vec<u32> {
    let trained = |slot: &u32| pack.loss_mask[*slot as usize] && pack.loss_mask[*slot as usize + 1];
    (doc.start..(doc.start + doc.len).saturating_sub(1)).filter(trained).collect()
}

/// At most `most` anchors of each document, ascending. The draw is a function of the seed, the row and the pass over the
/// data, so a resumed run draws the same.
pub(super) fn draw(pack: &Pack, most: usize, seed: u64) -> Vec<Vec<u32>> {
    pack.docs
        .iter()
        .zip(&pack.rows)
        .map(|(doc, row)| {
            let mut all = candidates(pack, *doc);
            if all.len() > most {
                Rng::new(seed, &[STREAM, pack.pass, *row]).shuffle(&mut all);
                all.truncate(most);
                all.sort_unstable();
            }
            all
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(mask: &[bool]) -> Pack {
        Pack {
            docs: vec![DocSpan { start: 0, len: 4 }, DocSpan { start: 4, len: mask.len() as u32 - 4 }],
            rows: vec![3, 9],
            loss_mask: mask.to_vec(),
            ids: vec![0; mask.len()],
            ..Pack::default()
        }
    }

    #[test]
    fn a_block_begins_where_it_and_its_first_proposal_are_trained_in_one_document() {
        // Slot 3 is followed by another document.
        let pack = pack(&[true, false, true, true, true, true, false, true]);
        assert_eq!(draw(&pack, 10, 1), [vec![2], vec![4]]);
    }

    #[test]
    fn draws_differ_by_pass_and_are_ascending_and_repeatable() {
        let mut pack = pack(&[true; 60]);
        let first = draw(&pack, 5, 1);
        assert_eq!(first, draw(&pack, 5, 1));
        assert!(first.iter().all(|a| a.windows(2).all(|w| w[0] < w[1])));
        assert_eq!((first[0].len(), first[1].len()), (3, 5));
        pack.pass = 1;
        assert_ne!(first, draw(&pack, 5, 1));
        assert_ne!(draw(&pack, 5, 2), draw(&pack, 5, 1));
    }
}
