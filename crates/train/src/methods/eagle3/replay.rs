//! Rejections of an EAGLE-3 draft: a chain of its own tokens behind every token of the rows, and losses where one ends.
//!
//! The chain behind the token of slot `a` is the unroll of slot `a - 1`: step `k` proposes the token of slot `a + 1 + k`.

use std::sync::Arc;

use draftsmith_kernels::TrainKernels;
use draftsmith_model::Ops;
use draftsmith_model::eagle3::Feedback;
use draftsmith_model::tape::TttAttend;

use super::Eagle3Train;
use crate::replay::Chains;
use crate::{BatchStats, Mode, Pack, Proposed, Rejected, Replays, TrainError};

/// Slots that steps after the first need, ascending: those with a loss in one of them.
pub(super) fn later(some: &[Vec<u32>]) -> Arc<[u32]> {
    let mut slots: Vec<u32> = some.iter().skip(1).flatten().copied().collect();
    slots.sort_unstable();
    slots.dedup();
    slots.into()
}

impl<K: TrainKernels> Replays for Eagle3Train<K> {
    fn propose(&mut self, pack: &Pack) -> Result<Vec<Proposed>, TrainError> {
        self.check_ids(pack)?;
        let choices = self.heads.choices(&mut self.tape, pack);
        let steps = self.options.ttt_length;
        let mut ends = Vec::with_capacity(pack.len());
        for doc in &pack.docs {
            ends.extend(std::iter::repeat_n(doc.end(), doc.len as usize));
        }
        let all: Arc<[u32]> = (0..pack.len() as u32).collect();
        let mut here = Arc::clone(&all);
        let mut attend = TttAttend::new(self.layout(pack), all, Arc::from([]));
        let mut chains = Chains::new(pack, &self.vocab_map, &choices, steps);
        let (tape, net, w) = (&mut self.tape, &self.net, &self.weights);
        let features = pack.features_on(tape, net.config.features_width());
        let mut hidden = net.project(tape, w, &features); // [S, H]
        for k in 0..steps {
            let live: Vec<u32> = chains.live().iter().map(|anchor| anchor - 1).collect();
            if live.is_empty() {
                break;
            }
            if k == 1 {
                here = live.as_slice().into();
                attend.set_later(Arc::clone(&here));
                hidden = tape.gather_rows(hidden, &here);
            }
            let token = |t: &u32| {
                let at = *t as usize + 1 + k;
                if at < ends[*t as usize] { pack.ids[at] } else { 0 }
            };
            let tokens: Vec<u32> = here.iter().map(token).collect();
            let positions: Vec<u32> = here.iter().map(|t| pack.positions[*t as usize] + k as u32).collect();
            let embedded = tape.embed(&self.embed, &tokens, 1.0); // [R, H]
            let output = net.step(tape, w, &embedded, &hidden, &positions, &mut attend); // [R, H]
            let row = |slot: &u32| {
                here.binary_search(slot).expect("slots of later steps are those of the second") as u32
            };
            let rows: Vec<u32> = live.iter().map(row).collect();
            let chosen = tape.gather_rows(output, &rows);
            let chosen = net.head_input(tape, w, &chosen); // [N, H]
            let (tops, _) = tape.stream_head(&tape.values(chosen), w.lm_head);
            chains.judge(&tops);
            hidden = match net.config.feedback {
                Feedback::PreNorm => output,
                Feedback::PostNorm => net.head_input(tape, w, &output),
            };
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
        let steps = rejected.iter().map(|r| r.depth as usize + 1).max().unwrap_or(0);
        if steps == 0 {
            return Ok(BatchStats::default());
        }
        let mut some = vec![Vec::new(); steps];
        let mut sum = 0.0;
        for r in rejected {
            some[r.depth as usize].push(r.anchor - 1);
            sum += self.options.step_decay.powi(r.depth as i32);
        }
        some.iter_mut().for_each(|slots| slots.sort_unstable());
        self.unroll(pack, Mode::Train, None, Some((&some, coefficients / sum)))
    }
}
