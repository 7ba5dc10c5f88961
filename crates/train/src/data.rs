//! Rows, packs of rows, and the order in which they come.
//!
//! A pack holds whole rows side by side; rows never see each other (attention, token shifts and targets stay inside
//! a row). The order of an epoch is a function of seed and epoch alone.
//!
//! Shape legend: `S` slots of a row or pack, `F` width of the captured features, `Ht` target width.

use draftsmith_formats::cache::{CacheReader, CaptureRow};
use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::DocSpan;
use draftsmith_model::tape::{Tape, Var};

use crate::states::{DeviceStates, SlotStates};
use crate::{Rng, TrainError};

/// What the rows of a pack are cut to, and how wide their states are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackShape {
    /// Slots of a row at most.
    pub row_slots: usize,
    /// `F`
    pub feature_width: usize,
    /// `Ht`
    pub last_width: usize,
}

/// Rows by number: from a target cache on disk, or computed by a live target when asked for (online training).
pub trait RowStore {
    /// Number of rows.
    fn num_rows(&self) -> usize;
    /// Slots of a row, known without reading it.
    fn row_slots(&self, row: usize) -> usize;
    /// Reads rows, in the order asked for.
    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>>;
    /// Reads rows into a pack, behind those that it has.
    ///
    /// # Errors
    /// Rows that cannot be read, or do not have the widths.
    fn fill(&mut self, rows: &[usize], shape: PackShape, pack: &mut Pack) -> Result<(), TrainError> {
        let read = self.read(rows).map_err(|source| TrainError::Rows { source })?;
        let PackShape { row_slots, feature_width, last_width } = shape;
        let mut pairs = rows.iter().zip(&read);
        pairs.try_for_each(|(number, row)| {
            pack.push(*number as u64, row, row_slots, feature_width, last_width)
        })
    }
    /// True if it is worth telling what comes.
    fn looks_ahead(&self) -> bool {
        false
    }
    /// The packs that will be read next, in their order, in place of what was said before; others may be read between them.
    fn expect(&mut self, packs: &[Vec<usize>]) {
        let _ = packs;
    }
    /// The store for a thread that reads while the device computes; `None` if it computes there itself, or is not to leave its thread.
    fn beside(&mut self) -> Option<&mut (dyn RowStore + Send)> {
        None
    }
}

impl RowStore for CacheReader {
    fn num_rows(&self) -> usize {
        self.len()
    }
    fn row_slots(&self, row: usize) -> usize {
        self.row_tokens(row)
    }
    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(rows.iter().map(|row| self.row(*row)).collect::<Result<_, _>>()?)
    }
    fn beside(&mut self) -> Option<&mut (dyn RowStore + Send)> {
        Some(self)
    }
}

/// Rows of one micro-batch, packed.
#[derive(Clone, Debug, Default)]
pub struct Pack {
    /// Where each row lies.
    pub docs: Vec<DocSpan>,
    /// Number of each row in its store: the same number always means the same content.
    pub rows: Vec<u64>,
    /// `[S]`
    pub ids: Vec<u32>,
    /// `[S]`; the last slot of each row is never trained, because its target is unknown [eagle3 §1.3].
    pub loss_mask: Vec<bool>,
    /// `[S]` RoPE positions, from 0 in each row.
    pub positions: Vec<u32>,
    /// `[S, F]`
    pub features: Vec<f32>,
    /// `[S, Ht]`
    pub last: Vec<f32>,
    /// Both in the memory of the device that trains; those on the host are empty then.
    pub on_device: Option<DeviceStates>,
    /// Which pass over the data this is: what is drawn from a row differs between passes.
    pub pass: u64,
    /// Slots that the loss divisor "all slots" counts; more than `S` if the batch was padded elsewhere.
    pub counted_slots: usize,
}

impl Pack {
    /// Slots.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// No slots.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Checks that every token is one of the target's.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check_ids(&self, vocab: usize) -> Result<(), TrainError> {
        for (doc, row) in self.docs.iter().zip(&self.rows) {
            let ids = &self.ids[doc.start as usize..(doc.start + doc.len) as usize];
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                return Err(TrainError::TokenId { row: *row, id: *id, vocab });
            }
        }
        Ok(())
    }

    /// Appends a row, cut to `max_slots`.
    ///
    /// # Errors
    /// If the lengths of its parts disagree.
    pub fn push(
        &mut self,
        number: u64,
        row: &CaptureRow,
        max_slots: usize,
        feature_width: usize,
        last_width: usize,
    ) -> Result<(), TrainError> {
        let all = row.ids.len();
        for (what, found, wanted) in [
            ("loss mask entries", row.loss_mask.len(), all),
            ("feature values", row.features.len(), all * feature_width),
            ("final hidden values", row.last.len(), all * last_width),
        ] {
            if found != wanted {
                return Err(TrainError::RowShape { row: number, what, found, wanted });
            }
        }
        let n = all.min(max_slots);
        self.push_tokens(number, &row.ids[..n], &row.loss_mask[..n]);
        self.features.extend_from_slice(&row.features[..n * feature_width]);
        self.last.extend_from_slice(&row.last[..n * last_width]);
        Ok(())
    }

    /// Appends a row without its states, which are on the device. `ids` and `loss_mask` are `[n]` each.
    ///
    /// # Panics
    /// If they are not.
    pub fn push_tokens(&mut self, number: u64, ids: &[u32], loss_mask: &[bool]) {
        let (start, n) = (self.ids.len(), ids.len());
        assert_eq!(loss_mask.len(), n, "one mask entry per token");
        self.docs.push(DocSpan { start: start as u32, len: n as u32 });
        self.rows.push(number);
        self.ids.extend_from_slice(ids);
        self.loss_mask.extend_from_slice(loss_mask);
        if let Some(last) = self.loss_mask[start..].last_mut() {
            *last = false;
        }
        self.positions.extend(0..n as u32);
        self.counted_slots += n;
    }
}

impl Pack {
    /// The captured features on a tape: `[S, F]`, of `width`.
    pub(crate) fn features_on<K: TrainKernels>(&self, tape: &mut Tape<K>, width: usize) -> Var {
        match &self.on_device {
            None => tape.input(&self.features, self.len(), width),
            Some(states) => tape.input_on_device(states.get::<K>().0, self.len(), width),
        }
    }

    /// The final states at some slots, of `width`.
    pub(crate) fn last_at(&self, slots: impl Iterator<Item = usize>, width: usize) -> SlotStates<'_> {
        match &self.on_device {
            None => {
                let mut states = Vec::with_capacity(slots.size_hint().0 * width);
                slots.for_each(|slot| states.extend_from_slice(&self.last[slot * width..(slot + 1) * width]));
                SlotStates::Host(states)
            }
            Some(states) => SlotStates::Device(states, slots.map(|slot| slot as u32).collect()),
        }
    }
}

/// Which rows make up which pack, for all epochs.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    pack_slots: usize,
    /// Slots of each row, cut to a pack.
    slots: Vec<usize>,
}

impl Order {
    /// The order over the rows of a store, in packs of at most `pack_slots` slots.
    pub fn new(store: &dyn RowStore, pack_slots: usize, seed: u64) -> Order {
        let slots = (0..store.num_rows()).map(|i| store.row_slots(i).min(pack_slots)).collect();
        Order { seed, pack_slots, slots }
    }

    /// The packs of an epoch: row numbers each. Empty rows are left out.
    pub fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.slots.len()).filter(|i| self.slots[*i] > 0).collect();
        Rng::new(self.seed, &[0x006f_7264_6572, epoch]).shuffle(&mut order);
        let mut packs: Vec<Vec<usize>> = Vec::new();
        let mut filled = usize::MAX;
        for row in order {
            if filled.saturating_add(self.slots[row]) > self.pack_slots {
                packs.push(Vec::new());
                filled = 0;
            }
            filled += self.slots[row];
            packs.last_mut().expect("pushed before the first row").push(row);
        }
        packs
    }

    /// Packs of all `epochs`.
    pub fn total_packs(&self, epochs: u64) -> u64 {
        (0..epochs).map(|e| self.epoch(e).len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Lengths(Vec<usize>);
    impl RowStore for Lengths {
        fn num_rows(&self) -> usize {
            self.0.len()
        }
        fn row_slots(&self, row: usize) -> usize {
            self.0[row]
        }
        fn read(&mut self, _: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn every_epoch_has_every_row_once_in_packs_that_fit() {
        let lengths: Vec<usize> = (0..200).map(|i| i * 37 % 150).collect();
        let order = Order::new(&Lengths(lengths.clone()), 100, 7);
        let packs = order.epoch(0);
        for pack in &packs {
            assert!(pack.iter().map(|r| lengths[*r].min(100)).sum::<usize>() <= 100 && !pack.is_empty());
        }
        let mut rows: Vec<usize> = packs.concat();
        rows.sort_unstable();
        assert_eq!(rows, (0..200).filter(|i| lengths[*i] > 0).collect::<Vec<_>>());
        assert_ne!(packs, order.epoch(1));
        assert_eq!(packs, order.epoch(0));
    }

    #[test]
    fn a_row_is_cut_to_the_pack_and_its_last_slot_is_not_trained() {
        let row = CaptureRow {
            ids: vec![1, 2, 3, 4],
            loss_mask: vec![false, true, true, true],
            features: vec![0.5; 8],
            last: vec![0.25; 4],
        };
        let mut pack = Pack::default();
        pack.push(3, &row, 3, 2, 1).unwrap();
        pack.push(4, &row, 8, 2, 1).unwrap();
        assert_eq!(pack.ids, [1, 2, 3, 1, 2, 3, 4]);
        assert_eq!(pack.loss_mask, [false, true, false, false, true, true, false]);
        assert_eq!(pack.positions, [0, 1, 2, 0, 1, 2, 3]);
        assert_eq!(pack.docs[1], DocSpan { start: 3, len: 4 });
        let bad = CaptureRow { features: vec![0.0; 7], ..row };
        assert!(matches!(
            pack.push(5, &bad, 8, 2, 1),
            Err(TrainError::RowShape { row: 5, found: 7, wanted: 8, .. })
        ));
    }
}
