//! Rejections of a P-EAGLE draft: the real slot before every token and a whole rollout behind it, and losses where a
//! proposal ends.
//!
//! The proposal behind the token of slot `a` is the rollout behind slot `a - 1`: its entry of depth `d` proposes the token of
//! slot `a + 1 + d`.

use draftsmith_kernels::TrainKernels;

use super::{Element, PEagleTrain};
use crate::replay::Chains;
use crate::{BatchStats, Mode, Pack, Proposed, Rejected, Replays, TrainError};

/// Entries of depth 1 to `deepest` behind a slot.
fn rollout(anchor: u32, deepest: u32) -> impl Iterator<Item = Element> {
    (1..=deepest).map(move |depth| Element { anchor, depth })
}

impl<K: TrainKernels> Replays for PEagleTrain<K> {
    fn propose(&mut self, pack: &Pack) -> Result<Vec<Proposed>, TrainError> {
        pack.check_ids(self.net.config.vocab_size)?;
        let choices = self.heads.choices(&mut self.tape, pack);
        let depths = self.net.config.num_depths;
        let real = (0..pack.len() as u32).map(|anchor| Element { anchor, depth: 0 });
        // An entry sees those before it in its rollout alone, so none is needed behind the answer.
        let deepest = |anchor: u32| {
            let ahead = choices[anchor as usize + 1..].iter().take(depths).take_while(|c| c.is_some());
            ahead.count() as u32 - 1
        };
        let anchors = Chains::new(pack, &self.vocab_map, &choices, depths).live().to_vec();
        let rollouts = anchors.iter().flat_map(|a| rollout(a - 1, deepest(*a)));
        let elements: Vec<Element> = real.chain(rollouts).collect();
        let output = self.forward(pack, &elements); // [E, H]
        let mut chains = Chains::new(pack, &self.vocab_map, &choices, depths);
        let (tape, net, w) = (&mut self.tape, &self.net, &self.weights);
        for depth in 0..depths as u32 {
            if chains.live().is_empty() {
                break;
            }
            let row = |anchor: &u32| {
                let wanted = Element { anchor: anchor - 1, depth };
                let found = match depth {
                    0 => wanted.slot(),
                    _ => {
                        let rollouts = &elements[pack.len()..];
                        pack.len() + rollouts.binary_search(&wanted).expect("proposals end before")
                    }
                };
                found as u32
            };
            let rows: Vec<u32> = chains.live().iter().map(row).collect();
            let chosen = tape.gather_rows(output, &rows);
            let chosen = net.head_input(tape, w, &chosen); // [N, H]
            let (tops, _) = tape.stream_head(&tape.values(chosen), w.lm_head);
            chains.judge(&tops);
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
        let some: Vec<Element> =
            rejected.iter().map(|r| Element { anchor: r.anchor - 1, depth: r.depth }).collect();
        let rollouts: Vec<Element> = some.iter().flat_map(|e| rollout(e.anchor, e.depth)).collect();
        let factor = coefficients / rejected.len().max(1) as f64;
        self.run(pack, &rollouts, Mode::Train, None, Some((&some, factor)))
    }
}
