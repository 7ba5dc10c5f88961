//! Training an EAGLE-3 draft: the training-time-test unroll [eagle3 §4].
//!
//! Step `k` feeds slot `t` the ground-truth token `x_{t+1+k}`, its own output of step `k - 1` and position `t + k`,
//! and compares with the target's distribution at position `t + 1 + k`, where the loss mask of slot `t + k` is set.
//! Shifts stay inside each row of the pack.
//!
//! Only what reaches a loss is computed: steps after the first run on the slots from which a trained slot can still
//! be reached, and the head only on rows with a loss.
//!
//! Shape legend: `S` slots of the pack, `R` slots of the later steps, `N` loss rows of a step, `M` teacher rows,
//! `H`/`Ht` draft/target width, `V`/`Vd` vocabularies.

mod init;
mod made_up;
mod replay;

use std::sync::Arc;

use draftsmith_core::VocabMap;
use draftsmith_formats::run::{DraftInit, Eagle3TrainTable, Loss};
use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::{SoftLoss, SoftScale, SoftSums};
use draftsmith_model::eagle3::{Eagle3, Eagle3Config, Eagle3Weights, Feedback};
use draftsmith_model::tape::{ParamId, Tape, TttAttend, TttLayout};
use draftsmith_model::{Ops, TargetTensors};

pub use init::{TargetStart, random_weights, warm_weights};
pub(crate) use made_up::made_up;

use crate::methods::{BoxedMethod, Start};
use crate::teacher::{PackTeacher, TargetHeads};
use crate::to_tape::{ToTape, check_tensors, expect_len, head_rows, trained_tensors};
use crate::{BatchStats, DepthStats, DraftTensor, DraftWeights, Method, Mode, Pack, Replays, TrainError};

/// What the loss of an optimiser step is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossDivisor {
    /// All slots of a micro-batch, trained or not, as the reference does; micro-batches count equally. Terms in `α`
    /// are means over the trained slots of their step.
    AllSlots,
    /// The slots trained at depth 0, over all micro-batches of the optimiser step.
    ValidTokens,
}

/// Settings of the unroll.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Eagle3Options {
    /// Steps unrolled.
    pub ttt_length: usize,
    /// Step `k` counts `step_decay^k`.
    pub step_decay: f64,
    /// What is minimised.
    pub loss: SoftLoss,
    /// Normalisation.
    pub divisor: LossDivisor,
}

impl Default for Eagle3Options {
    fn default() -> Eagle3Options {
        Eagle3Options {
            ttt_length: 7,
            step_decay: 0.8,
            loss: SoftLoss::Kl,
            divisor: LossDivisor::ValidTokens,
        }
    }
}

/// What the target contributes, frozen.
pub struct TargetSide<'a> {
    /// `[V, H]` token embedding; `H` is the draft's width.
    pub embed: &'a [f32],
    /// `[V, Ht]` head; `None` if it is the embedding.
    pub head: Option<&'a [f32]>,
}

/// Intermediate results, for tests that compare them.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// `[S, H]` projected features.
    pub projected: Vec<f32>,
    /// Per step: the slots computed and their layer output `[R, H]` before the final norm.
    pub hidden: Vec<(Vec<u32>, Vec<f32>)>,
    /// Per step: logits of the same slots `[R, Vd]`.
    pub logits: Vec<Vec<f32>>,
    /// Slots with a teacher.
    pub teacher_slots: Vec<u32>,
    /// `[M, Vd]` teacher probabilities of those slots.
    pub p: Vec<f32>,
    /// `[M]` share of the full distribution on the draft vocabulary.
    pub mass: Vec<f32>,
    /// `[S]` the target's most likely token, where the loss mask is set.
    pub token_ids: Vec<Option<u32>>,
}

/// Position of a slot inside its row of the pack.
#[derive(Clone, Copy)]
struct Place {
    /// Index of the row.
    row: u32,
    /// Slots after this one in the row.
    after: u32,
}

/// EAGLE-3 on the tape.
pub struct Eagle3Train<K: TrainKernels> {
    net: Eagle3,
    options: Eagle3Options,
    vocab_map: VocabMap,
    tape: Tape<K>,
    weights: Eagle3Weights<ParamId, ParamId>,
    embed: ParamId,
    heads: TargetHeads,
}

impl Eagle3Options {
    /// The settings of a run file, normalised by trained tokens.
    pub fn from_table(table: &Eagle3TrainTable) -> Eagle3Options {
        let loss = match table.loss {
            Loss::Kl => SoftLoss::Kl,
            Loss::LkAlpha => SoftLoss::LkAlpha,
            Loss::LkLambda => {
                SoftLoss::LkLambda { kl_scale: table.kl_scale as f32, kl_decay: table.kl_decay as f32 }
            }
        };
        Eagle3Options {
            ttt_length: table.ttt_length as usize,
            step_decay: table.step_decay,
            loss,
            divisor: LossDivisor::ValidTokens,
        }
    }
}

impl<K: TrainKernels> Eagle3Train<K> {
    /// A draft for a loaded target, started from it or at random.
    ///
    /// # Errors
    /// As [`Eagle3Train::new`]; a start from the target also needs a draft of its shapes.
    pub fn for_target(
        kernels: K,
        config: Eagle3Config,
        options: Eagle3Options,
        vocab_map: VocabMap,
        target: &TargetTensors,
        init: DraftInit,
        seed: u64,
    ) -> Result<Eagle3Train<K>, TrainError> {
        let weights = match init {
            DraftInit::Target => warm_weights(&config, &vocab_map, &TargetStart::of(target), seed)?,
            DraftInit::Random => random_weights(&config, seed),
        };
        let side = TargetSide { embed: &target.embed, head: target.head.as_deref() };
        Eagle3Train::new(kernels, config, options, vocab_map, &side, &weights)
    }

    /// A draft with the given initial weights (all of [`Eagle3Config::tensors`], by name).
    ///
    /// # Errors
    /// If a weight is missing, or one of the target's tensors or the vocabulary map does not fit the configuration.
    pub fn new(
        kernels: K,
        config: Eagle3Config,
        options: Eagle3Options,
        vocab_map: VocabMap,
        target: &TargetSide<'_>,
        weights: &[DraftTensor],
    ) -> Result<Eagle3Train<K>, TrainError> {
        config.check()?;
        let (v, vd, h, ht) =
            (config.vocab_size, config.draft_vocab_size, config.hidden_size, config.target_hidden_size);
        expect_len("embed_tokens.weight", target.embed.len(), v * h)?;
        let head = target.head.unwrap_or(target.embed);
        expect_len("target lm_head.weight", head.len(), v * ht)?;
        expect_len("t2d", vocab_map.target_vocab(), v)?;
        expect_len("d2t", vocab_map.draft_vocab(), vd)?;
        check_tensors(config.tensors(), weights)?;
        let mut tape = Tape::new(kernels);
        let Ok(ids) = Eagle3Weights::build(&config, &mut ToTape::new(&mut tape, weights));
        let embed = tape.add_param("embed_tokens.weight", &[v, h], target.embed, false);
        let target_head = match target.head {
            None => embed,
            Some(head) => tape.add_param("target lm_head.weight", &[v, ht], head, false),
        };
        let draft_target_head = if vocab_map.is_identity() {
            target_head
        } else {
            let rows = head_rows(head, ht, &vocab_map);
            tape.add_param("target lm_head.weight of the draft vocabulary", &[vd, ht], &rows, false)
        };
        let net = Eagle3::new(config);
        Ok(Eagle3Train {
            net,
            options,
            vocab_map,
            tape,
            weights: ids,
            embed,
            heads: TargetHeads::new(target_head, draft_target_head, ht),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &Eagle3Config {
        &self.net.config
    }

    /// The vocabulary map.
    pub fn vocab_map(&self) -> &VocabMap {
        &self.vocab_map
    }

    fn layout(&self, pack: &Pack) -> TttLayout {
        let config = &self.net.config;
        TttLayout {
            docs: pack.docs.as_slice().into(),
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        }
    }

    fn check_ids(&self, pack: &Pack) -> Result<(), TrainError> {
        let vocab = self.net.config.vocab_size;
        for (doc, row) in pack.docs.iter().zip(&pack.rows) {
            let ids = &pack.ids[doc.start as usize..(doc.start + doc.len) as usize];
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                return Err(TrainError::TokenId { row: *row, id: *id, vocab });
            }
        }
        Ok(())
    }

    /// The teacher of every slot with a set loss mask, or of some of them.
    fn teacher(&mut self, pack: &Pack, some: Option<&[Vec<u32>]>) -> PackTeacher<K::Buf> {
        let wanted = some.map(|some| {
            let mut wanted = vec![false; pack.len()];
            for (k, slots) in some.iter().enumerate() {
                slots.iter().for_each(|slot| wanted[*slot as usize + k] = true);
            }
            wanted
        });
        self.heads.teacher(&mut self.tape, pack, &self.vocab_map, wanted.as_deref())
    }

    /// One unroll. `trace` asks for all intermediate results (and then computes every slot at every step); `some` are the
    /// slots with a loss at each step, and a factor of it, where they are not all.
    fn unroll(
        &mut self,
        pack: &Pack,
        mode: Mode,
        mut trace: Option<&mut Trace>,
        some: Option<(&[Vec<u32>], f64)>,
    ) -> Result<BatchStats, TrainError> {
        self.check_ids(pack)?;
        let (some, factor) = some.unzip();
        let steps = some.map_or(self.options.ttt_length, <[_]>::len);
        let slots = pack.len();
        let teacher = self.teacher(pack, some);
        let mut places = Vec::with_capacity(slots);
        for (row, doc) in pack.docs.iter().enumerate() {
            places.extend((0..doc.len).rev().map(|after| Place { row: row as u32, after }));
        }
        // Slot `t` is worth step 1 and later if a trained slot lies at most `steps - 1` after it.
        let reaches = |t: &u32| {
            let t = *t as usize;
            let far = (places[t].after as usize).min(steps - 1);
            (1..=far).any(|j| teacher.of_slot[t + j] != u32::MAX)
        };
        let all: Arc<[u32]> = (0..slots as u32).collect();
        let later: Arc<[u32]> = match (&trace, some) {
            (Some(_), _) => Arc::clone(&all),
            (None, None) => all.iter().copied().filter(reaches).collect(),
            (None, Some(some)) => replay::later(some),
        };
        let trained_slots = teacher.of_slot.iter().filter(|row| **row != u32::MAX).count();
        let mut stats = BatchStats { slots: slots as u64, ..BatchStats::default() };
        let kl_base = match self.options.divisor {
            LossDivisor::AllSlots => 1.0 / pack.counted_slots.max(1) as f64,
            LossDivisor::ValidTokens => 1.0,
        };
        stats.weight = match self.options.divisor {
            LossDivisor::AllSlots => 1.0,
            LossDivisor::ValidTokens => trained_slots as f64,
        };

        let mut attend = TttAttend::new(self.layout(pack), Arc::clone(&all), Arc::clone(&later));
        let config = &self.net.config;
        let (tape, net, w) = (&mut self.tape, &self.net, &self.weights);
        let features = pack.features_on(tape, config.features_width());
        let mut hidden = net.project(tape, w, &features); // [S, H]
        if let Some(trace) = trace.as_deref_mut() {
            trace.projected = tape.values(hidden);
            trace.token_ids = teacher.token_ids.clone();
            trace.teacher_slots =
                (0..slots as u32).filter(|s| teacher.of_slot[*s as usize] != u32::MAX).collect();
            trace.mass = teacher.rows.mass.clone();
            trace.p = vec![0.0; teacher.rows.mass.len() * config.draft_vocab_size];
            tape.kernels().download(&teacher.rows.p, 0, &mut trace.p);
        }
        // The sums of each step: a device is asked for them when everything has been started.
        let mut pending = Vec::with_capacity(steps);
        for k in 0..steps {
            let here = if k == 0 { &all } else { &later };
            let tokens: Vec<u32> =
                here.iter()
                    .map(|t| {
                        if places[*t as usize].after as usize > k { pack.ids[*t as usize + 1 + k] } else { 0 }
                    })
                    .collect();
            let positions: Vec<u32> = here.iter().map(|t| pack.positions[*t as usize] + k as u32).collect();
            let embedded = tape.embed(&self.embed, &tokens, 1.0); // [S or R, H]
            let output = net.step(tape, w, &embedded, &hidden, &positions, &mut attend); // [S or R, H]

            // Rows with a loss: the slot `k` further on is trained.
            let (mut loss_rows, mut teacher_rows) = (Vec::new(), Vec::new());
            let mut depth = DepthStats::default();
            for (row, t) in here.iter().enumerate() {
                let t = *t as usize;
                let chosen = some.is_none_or(|some| some[k].binary_search(&(t as u32)).is_ok());
                if chosen && places[t].after as usize >= k && teacher.of_slot[t + k] != u32::MAX {
                    loss_rows.push(row as u32);
                    teacher_rows.push(teacher.of_slot[t + k]);
                }
            }
            depth.slots = masked_slots(pack, &places, k);
            let (fed, head_input) = match config.feedback {
                // The final norm is needed on loss rows only.
                Feedback::PreNorm => {
                    let chosen = tape.gather_rows(output, &loss_rows);
                    (output, net.head_input(tape, w, &chosen))
                }
                Feedback::PostNorm => {
                    let normed = net.head_input(tape, w, &output);
                    (normed, tape.gather_rows(normed, &loss_rows))
                }
            };
            if let Some(trace) = trace.as_deref_mut() {
                trace.hidden.push((here.to_vec(), tape.values(output)));
                let normed = net.head_input(tape, w, &output);
                let logits = net.logits(tape, w, &normed);
                trace.logits.push(tape.values(logits));
            }
            let decay = self.options.step_decay.powi(k as i32) * factor.unwrap_or(1.0);
            let count = loss_rows.len() as f64;
            let alpha_base = match self.options.divisor {
                LossDivisor::AllSlots => 1.0 / (count + 1e-8),
                LossDivisor::ValidTokens => 1.0,
            };
            let scale = SoftScale { kl: (decay * kl_base) as f32, alpha: (decay * alpha_base) as f32 };
            let loss = self.options.loss;
            let grads = mode == Mode::Train;
            let sums = tape.soft_ce(head_input, w.lm_head, &teacher.rows, &teacher_rows, loss, scale, grads);
            pending.push((sums, decay, alpha_base));
            stats.depths.push(depth);
            // From the first step on, only slots that can still reach a loss.
            hidden = if k == 0 && steps > 1 { tape.gather_rows(fed, &later) } else { fed };
        }
        match mode {
            Mode::Train => tape.backward(),
            Mode::Evaluate => tape.reset(),
        }
        tape.recycle(teacher.rows);
        for (depth, (sums, decay, alpha_base)) in stats.depths.iter_mut().zip(pending) {
            let sums = sums.get();
            depth.loss = step_loss(self.options.loss, &sums, kl_base, alpha_base);
            depth.correct = sums.correct;
            depth.alpha = sums.alpha;
            depth.trained = sums.rows;
            stats.loss += decay * depth.loss;
            stats.coefficients += decay * depth.trained as f64;
        }
        Ok(stats)
    }

    /// Loss and all intermediate results of a pack, without gradients.
    pub fn trace(&mut self, pack: &Pack) -> Result<(BatchStats, Trace), TrainError> {
        let mut trace = Trace::default();
        let stats = self.unroll(pack, Mode::Evaluate, Some(&mut trace), None)?;
        Ok((stats, trace))
    }
}

/// Slots whose shifted loss mask is set at step `k`.
fn masked_slots(pack: &Pack, places: &[Place], k: usize) -> u64 {
    let set = |t: usize| {
        places[t].after as usize >= k && pack.loss_mask[t + k] && {
            // The last slot of a row has no target.
            debug_assert_eq!(places[t].row, places[t + k].row);
            places[t + k].after > 0
        }
    };
    (0..pack.len()).filter(|t| set(*t)).count() as u64
}

fn step_loss(loss: SoftLoss, sums: &SoftSums, kl_base: f64, alpha_base: f64) -> f64 {
    match loss {
        SoftLoss::Kl => sums.kl * kl_base,
        SoftLoss::LkAlpha => sums.neg_log_alpha * alpha_base,
        SoftLoss::LkLambda { .. } => {
            let w = sums.kl_weight;
            w * sums.kl * kl_base + (1.0 - w) * (sums.rows as f64 - sums.alpha) * alpha_base
        }
    }
}

/// As a run file has it.
pub(super) fn method<K: TrainKernels>(
    config: Eagle3Config,
    start: Start<'_, K>,
) -> Result<BoxedMethod<K>, TrainError> {
    let Start { kernels, vocab_map, target, file, seed, own_head } = start;
    let options = Eagle3Options::from_table(&file.train.eagle3);
    let init = file.draft.init;
    let mut method = Eagle3Train::for_target(kernels, config, options, vocab_map, target, init, seed)?;
    method.heads.own = own_head;
    Ok(Box::new(method))
}

impl<K: TrainKernels> Method for Eagle3Train<K> {
    type Kernels = K;

    fn name(&self) -> &'static str {
        "eagle3"
    }
    fn feature_width(&self) -> usize {
        self.net.config.features_width()
    }
    fn last_width(&self) -> usize {
        self.net.config.target_hidden_size
    }
    fn tape(&self) -> &Tape<K> {
        &self.tape
    }
    fn tape_mut(&mut self) -> &mut Tape<K> {
        &mut self.tape
    }
    fn micro_batch(&mut self, pack: &Pack, mode: Mode) -> Result<BatchStats, TrainError> {
        self.unroll(pack, mode, None, None)
    }
    fn replays(&mut self) -> Option<&mut dyn Replays> {
        Some(self)
    }
    fn draft(&self) -> Result<DraftWeights, TrainError> {
        Ok(DraftWeights {
            method: self.name(),
            config: self.net.config.to_value()?,
            tensors: trained_tensors(&self.tape, self.net.config.tensors()),
            vocab_map: Some(self.vocab_map.clone()),
        })
    }
}
