//! Which entries are trained at which depth: fewer the deeper, each behind one that was chosen a depth before
//! [dflash §4.2].

use crate::{Pack, Rng};

/// Names the random stream.
const STREAM: u64 = 0x636f_6420;

/// An entry: `depth` mask tokens behind the real slot `anchor` of the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    /// Slot of the pack.
    pub anchor: u32,
    /// 0 for the real slot itself.
    pub depth: u32,
}

impl Element {
    /// The slot that the entry stands for.
    pub fn slot(self) -> usize {
        (self.anchor + self.depth) as usize
    }
}

/// How many entries a depth keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thinning {
    /// Depths, the real slots included.
    pub num_depths: usize,
    /// Share that is kept from each depth to the next.
    pub ratio: f64,
    /// Share that is kept at least.
    pub least: f64,
}

/// The entries of depth 1 and deeper, by anchor and depth. The draw is a function of the seed, the row and the pass over
/// the data.
pub(super) fn draw(pack: &Pack, thinning: Thinning, seed: u64) -> Vec<Element> {
    let mut all = Vec::new();
    for (doc, row) in pack.docs.iter().zip(&pack.rows) {
        let valid = |slot: &u32| (*slot as usize) < doc.end() && pack.loss_mask[*slot as usize];
        let mut candidates: Vec<u32> = (doc.start..doc.end() as u32).filter(valid).collect();
        let count = candidates.len();
        for depth in 1..thinning.num_depths as u32 {
            candidates.retain(|slot| *slot >= doc.start + depth);
            let share = thinning.ratio.powi(depth as i32).max(thinning.least);
            let wanted = (count.saturating_sub(depth as usize) as f64 * share) as usize;
            if wanted == 0 || candidates.is_empty() {
                break;
            }
            if candidates.len() > wanted {
                Rng::new(seed, &[STREAM, pack.pass, *row, u64::from(depth)]).shuffle(&mut candidates);
                candidates.truncate(wanted);
                candidates.sort_unstable();
            }
            all.extend(candidates.iter().map(|slot| Element { anchor: slot - depth, depth }));
            candidates = candidates.iter().map(|slot| slot + 1).filter(valid).collect();
        }
    }
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use draftsmith_kernels::train::DocSpan;

    fn pack(lengths: &[u32]) -> Pack {
        let mut docs = Vec::new();
        let mut start = 0;
        for len in lengths {
            docs.push(DocSpan { start, len: *len });
            start += len;
        }
        let rows = (0..lengths.len() as u64).collect();
        Pack {
            docs,
            rows,
            loss_mask: vec![true; start as usize],
            ids: vec![0; start as usize],
            ..Pack::default()
        }
    }

    #[test]
    fn everything_kept_gives_every_rollout_that_stays_in_its_document() {
        let thinning = Thinning { num_depths: 3, ratio: 1.0, least: 0.2 };
        let found = draw(&pack(&[4, 3]), thinning, 1);
        let element = |anchor, depth| Element { anchor, depth };
        let wanted = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (4, 1), (4, 2), (5, 1)];
        assert_eq!(found, wanted.map(|(a, d)| element(a, d)));
    }

    #[test]
    fn depths_thin_out_and_an_entry_stands_behind_one_of_its_own_rollout() {
        let thinning = Thinning { num_depths: 5, ratio: 0.8, least: 0.2 };
        let found = draw(&pack(&[100]), thinning, 7);
        let at = |depth: u32| found.iter().filter(|e| e.depth == depth).count();
        assert_eq!(at(1), (99.0 * 0.8) as usize);
        for depth in 2..5 {
            assert!(
                at(depth) <= ((100 - depth) as f64 * 0.8f64.powi(depth as i32)) as usize && at(depth) > 20
            );
        }
        for e in found.iter().filter(|e| e.depth > 1) {
            assert!(found.contains(&Element { depth: e.depth - 1, ..*e }), "{e:?}");
        }
        assert_eq!(found, draw(&pack(&[100]), thinning, 7));
        assert_ne!(found, draw(&pack(&[100]), thinning, 8));
    }
}
