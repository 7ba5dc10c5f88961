//! Rejections of a block draft: what the slots of a block behind every token propose, and losses where a proposal ends.
//!
//! The token that a Markov head sees is the row's, which is the draft's own as long as nothing was rejected.

use std::collections::HashMap;

use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::NO_LABEL;
use draftsmith_model::Ops;
use draftsmith_model::block::MarkovKind;
use draftsmith_model::tape::Var;

use super::{Block, BlockLoss, BlockTrain, LossRow, anchors, weights};
use crate::replay::Chains;
use crate::{BatchStats, Mode, Pack, Proposed, Rejected, Replays, TrainError};

impl<K: TrainKernels> BlockTrain<K> {
    /// `[S]` the target's most likely token in the place of each slot's own, where that is trained.
    fn choices(&mut self, pack: &Pack) -> Vec<Option<u32>> {
        self.ask_target(pack, 0..pack.docs.len());
        let mut choices = vec![None; pack.len()];
        for (doc, row) in pack.docs.iter().zip(&pack.rows) {
            let Some(known) = self.memo.get(row) else { continue };
            for at in (doc.start as usize + 1..doc.end()).filter(|at| pack.loss_mask[*at]) {
                choices[at] = Some(known[at - 1 - doc.start as usize].0);
            }
        }
        choices
    }

    /// Of the rows with a loss those of rejected tokens, and with them those that a running state passes through.
    pub(super) fn replayed_rows(
        &self,
        blocks: &[Block],
        mut rows: Vec<LossRow>,
        rejected: &[Rejected],
    ) -> Vec<LossRow> {
        let first = self.net.config.first_proposal();
        let runs = self.net.config.markov().is_some_and(|m| m.kind == MarkovKind::Rnn);
        let ends: HashMap<u32, usize> =
            rejected.iter().map(|r| (r.anchor, r.depth as usize + first)).collect();
        rows.retain(|row| {
            let end = ends.get(&blocks[row.block].anchor);
            end.is_some_and(|end| row.slot == *end || (runs && row.slot < *end))
        });
        rows
    }

    /// Factors of rows: those of rejected tokens weigh as the loss weighs their slots, and all losses of all rows add up as
    /// asked.
    pub(super) fn replay_factors(
        &self,
        blocks: &[Block],
        rows: &[LossRow],
        labels: &[u32],
        (rejected, coefficients): (&[Rejected], f64),
    ) -> Vec<f32> {
        let first = self.net.config.first_proposal();
        let (gamma, terms) = match self.options.loss {
            BlockLoss::Tokens { gamma } => (gamma, 1.0),
            BlockLoss::Dpace { .. } => (None, 1.0),
            BlockLoss::Spark { gamma, ce, l1, .. } => (gamma, ce + l1),
        };
        let weigh = |(row, label): (&LossRow, &u32)| {
            let depth = (row.slot - first) as u32;
            let here = Rejected { anchor: blocks[row.block].anchor, depth };
            let has_loss = *label != NO_LABEL || matches!(self.options.loss, BlockLoss::Spark { .. });
            match rejected.binary_search(&here).is_ok() && has_loss {
                true => f64::from(weights::decay(gamma, row.slot - first)),
                false => 0.0,
            }
        };
        let all: Vec<f64> = rows.iter().zip(labels).map(weigh).collect();
        let sum = all.iter().sum::<f64>() * terms;
        let scale = if sum > 0.0 { coefficients / sum } else { 0.0 };
        all.iter().map(|w| (w * scale) as f32).collect()
    }
}

impl<K: TrainKernels> Replays for BlockTrain<K> {
    fn propose(&mut self, pack: &Pack) -> Result<Vec<Proposed>, TrainError> {
        pack.check_ids(self.net.config.vocab_size)?;
        let choices = self.choices(pack);
        let candidates = pack.docs.iter().enumerate().flat_map(|(number, doc)| {
            let anchors = anchors::candidates(pack, *doc);
            anchors.into_iter().map(move |anchor| Block { doc: number, anchor })
        });
        let blocks: Vec<Block> = candidates.collect();
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        let output = self.forward(pack, &blocks); // [N Bk, H]
        let (first, size) = (self.net.config.first_proposal(), self.net.config.block_size);
        let mut chains = Chains::new(pack, &self.vocab_map, &choices, self.net.config.proposals());
        let (tape, net) = (&mut self.tape, &self.net);
        let runs = net.config.markov().is_some_and(|m| m.kind == MarkovKind::Rnn);
        let mut state: Option<(Var, Vec<u32>)> = None;
        for slot in first..size {
            let live = chains.live().to_vec();
            if live.is_empty() {
                break;
            }
            let row = |anchor: &u32| {
                let block = blocks.binary_search_by_key(anchor, |b| b.anchor);
                (block.expect("proposals begin at candidates") * size + slot) as u32
            };
            let chosen = tape.select(&output, &live.iter().map(row).collect::<Vec<_>>()); // [L, H]
            let mut parts = vec![(chosen, self.heads.part)];
            if let Some(w) = &self.weights.markov {
                let before: Vec<u32> = live.iter().map(|a| pack.ids[*a as usize + slot - first]).collect();
                let before = net.before(tape, w, &before); // [L, M]
                let earlier = state.take().filter(|_| runs).map(|(state, old)| {
                    let place = |a: &u32| old.binary_search(a).expect("proposals end once") as u32;
                    tape.select(&state, &live.iter().map(place).collect::<Vec<_>>())
                });
                let (correction, next) = net.correction(tape, w, &chosen, &before, earlier);
                parts.push((correction, w.w2));
                state = next.map(|next| (next, live.clone()));
            }
            let none = vec![0.0; live.len()];
            let found = tape.token_loss(&parts, &vec![NO_LABEL; live.len()], (&none, &none), None, false);
            chains.judge(&found.iter().map(|f| f.top).collect::<Vec<_>>());
        }
        let proposed = chains.finish();
        self.tape.reset();
        Ok(proposed)
    }

    fn replay(
        &mut self,
        pack: &Pack,
        rejected: &[Rejected],
        coefficients: f64,
    ) -> Result<BatchStats, TrainError> {
        let mut anchors = vec![Vec::new(); pack.docs.len()];
        let mut doc = 0;
        for r in rejected {
            while pack.docs[doc].end() <= r.anchor as usize {
                doc += 1;
            }
            anchors[doc].push(r.anchor);
        }
        self.run(pack, &anchors, Mode::Train, None, Some((rejected, coefficients)))
    }
}
