//! The target's distribution at the trained slots of a pack, over a part of its vocabulary.

use std::collections::HashMap;
use std::sync::Arc;

use draftsmith_core::{TargetTokenId, VocabMap};
use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::Teacher;
use draftsmith_model::tape::{ParamId, Tape};

use crate::Pack;
use crate::states::SlotStates;

/// The target's own head, as decoding computes it: final hidden states `[N, Ht]` to arg-max and log-sum-exp of the full logits of
/// each. Where it is given it is asked in place of the head in f32 on the tape, which reads four times as much of a quantised one.
pub type OwnHead = Arc<dyn Fn(&[f32]) -> (Vec<u32>, Vec<f32>) + Send + Sync>;

/// The target's heads on the tape, and what they said.
pub(crate) struct TargetHeads {
    /// `[V, Ht]`
    whole: ParamId,
    /// `[Vd, Ht]` rows of the draft vocabulary.
    pub(crate) part: ParamId,
    /// `Ht`
    width: usize,
    /// Asked in place of `whole`.
    pub(crate) own: Option<OwnHead>,
    /// Arg-max and log-sum-exp at the trained slots of each row seen: the target is frozen, so later passes need not ask
    /// again.
    memo: HashMap<u64, Vec<(u32, f32)>>,
}

/// The teacher of a pack.
pub(crate) struct PackTeacher<B> {
    pub(crate) rows: Teacher<B>,
    /// `[S]` teacher row of each slot that is trained, else `u32::MAX`.
    pub(crate) of_slot: Vec<u32>,
    /// `[S]` arg-max of the target where the loss mask is set.
    pub(crate) token_ids: Vec<Option<u32>>,
}

impl TargetHeads {
    pub(crate) fn new(whole: ParamId, part: ParamId, width: usize) -> TargetHeads {
        TargetHeads { whole, part, width, own: None, memo: HashMap::new() }
    }

    /// Arg-max and log-sum-exp of the full logits of final hidden states `[N, Ht]`.
    pub(crate) fn tops<K: TrainKernels>(
        &self,
        tape: &mut Tape<K>,
        states: &SlotStates<'_>,
    ) -> (Vec<u32>, Vec<f32>) {
        match (&self.own, states) {
            (Some(own), SlotStates::Host(states)) => own(states),
            _ => tape.stream_head(states.rows::<K>(), self.whole),
        }
    }

    /// Final hidden states of the positions behind `slots`.
    fn states<'p>(&self, pack: &'p Pack, slots: &[u32]) -> SlotStates<'p> {
        pack.last_at(slots.iter().map(|s| *s as usize + 1), self.width)
    }

    /// The slots with a set loss mask of each document, whose arg-max and log-sum-exp are known from then on.
    fn ask<K: TrainKernels>(&mut self, tape: &mut Tape<K>, pack: &Pack) -> Vec<Vec<u32>> {
        let masked: Vec<Vec<u32>> = pack
            .docs
            .iter()
            .map(|d| {
                let slots = d.start..(d.start + d.len).saturating_sub(1);
                slots.filter(|s| pack.loss_mask[*s as usize]).collect()
            })
            .collect();
        let unknown =
            |d: &usize| self.memo.get(&pack.rows[*d]).is_none_or(|known| known.len() != masked[*d].len());
        let new: Vec<usize> = (0..pack.docs.len()).filter(unknown).collect();
        let slots: Vec<u32> = new.iter().flat_map(|d| masked[*d].iter().copied()).collect();
        if !slots.is_empty() {
            let (argmax, lse) = self.tops(tape, &self.states(pack, &slots));
            let mut found = argmax.into_iter().zip(lse);
            for d in &new {
                self.memo.insert(pack.rows[*d], found.by_ref().take(masked[*d].len()).collect());
            }
        }
        masked
    }

    /// `[S]` the target's most likely token in the place of each slot's own, where a loss compares with it.
    pub(crate) fn choices<K: TrainKernels>(&mut self, tape: &mut Tape<K>, pack: &Pack) -> Vec<Option<u32>> {
        let masked = self.ask(tape, pack);
        let mut choices = vec![None; pack.len()];
        for ((doc, slots), row) in pack.docs.iter().zip(&masked).zip(&pack.rows) {
            let known = self.memo.get(row).map_or(&[][..], Vec::as_slice);
            for (slot, (id, _)) in slots.iter().zip(known) {
                let at = *slot as usize + 2;
                if at < doc.end() && pack.loss_mask[at] {
                    choices[at] = Some(*id);
                }
            }
        }
        choices
    }

    /// The teacher of every slot with a set loss mask, or of those that are `wanted` `[S]`: slot `t` holds the target's distribution
    /// at position `t + 1`. Slots whose most likely token cannot be proposed are not trained.
    pub(crate) fn teacher<K: TrainKernels>(
        &mut self,
        tape: &mut Tape<K>,
        pack: &Pack,
        vocab_map: &VocabMap,
        wanted: Option<&[bool]>,
    ) -> PackTeacher<K::Buf> {
        let masked = self.ask(tape, pack);
        let mut token_ids = vec![None; pack.len()];
        let mut of_slot = vec![u32::MAX; pack.len()];
        let (mut trained, mut lse, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for (slots, row) in masked.iter().zip(&pack.rows).filter(|(slots, _)| !slots.is_empty()) {
            for (slot, (id, full_lse)) in slots.iter().zip(&self.memo[row]) {
                token_ids[*slot as usize] = Some(*id);
                if wanted.is_some_and(|wanted| !wanted[*slot as usize]) {
                    continue;
                }
                if let Some(draft) = vocab_map.to_draft(TargetTokenId(*id)) {
                    of_slot[*slot as usize] = trained.len() as u32;
                    trained.push(*slot);
                    lse.push(*full_lse);
                    labels.push(draft.0);
                }
            }
        }
        let states = self.states(pack, &trained);
        let rows = tape.teacher(states.rows::<K>(), self.part, &lse, labels);
        PackTeacher { rows, of_slot, token_ids }
    }
}
