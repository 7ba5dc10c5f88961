//! Training drafts that propose blocks: DFlash with D-PACE, and DSpark [dflash §1-3].
//!
//! Blocks begin at anchors drawn from the trained slots of each row. Slot 0 of a block is the true token of the anchor, the
//! others are mask tokens; a block sees the features strictly before its anchor, as it will when decoding. A slot of
//! DFlash predicts the token of its own place, a slot of DSpark the one behind it. Embedding and head are the target's and
//! stay frozen. Losses exist for chunks of rows, so there are never logits of all of them.
//!
//! Shape legend: `S` slots of the pack, `N` blocks, `Bk` slots of a block, `L` rows with a loss, slot by slot of the
//! blocks (all blocks' first, then all second ones), `H` width, `V`/`Vd` vocabularies.

mod anchors;
mod init;
mod replay;
mod weights;

use std::collections::HashMap;
use std::sync::Arc;

use draftsmith_core::{TargetTokenId, VocabMap};
use draftsmith_formats::run::{BlockLossKind, DflashTrainTable, DraftInit, DsparkTrainTable};
use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::{NO_LABEL, Sight, Span, TokenRow};
use draftsmith_model::block::{BlockConfig, BlockNet, BlockWeights, MarkovKind};
use draftsmith_model::tape::{BlockAttend, HeadLayout, MaskLayout, ParamId, Tape, Var};
use draftsmith_model::{DraftSpec, Ops, TargetTensors};

pub use init::{random_weights, warm_weights};
pub use weights::DpaceKind;

use crate::methods::eagle3::{TargetSide, TargetStart};
use crate::methods::{BoxedMethod, Start};
use crate::teacher::TargetHeads;
use crate::to_tape::{ToTape, check_tensors, expect_len, head_rows, trained_tensors};
use crate::{
    BatchStats, DepthStats, DraftTensor, DraftWeights, Method, Mode, Pack, Rejected, Replays, TrainError,
};

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BlockLoss {
    /// Cross-entropy with the tokens, slots weighed by `exp(-j / gamma)`, divided by the weights of the optimiser step.
    Tokens {
        /// `None`: all slots count alike.
        gamma: Option<f64>,
    },
    /// Cross-entropy weighed by what a slot is worth, divided by the number of rows.
    Dpace {
        /// Form.
        kind: DpaceKind,
        /// Share of confidence that a slot never loses.
        alpha: f64,
    },
    /// DSpark's sum of cross-entropy, distance from the target's distribution, and the confidence's own error.
    Spark {
        /// As in [`BlockLoss::Tokens`].
        gamma: Option<f64>,
        /// Factor of the cross-entropy.
        ce: f64,
        /// Factor of the L1 distance.
        l1: f64,
        /// Factor of the confidence's cross-entropy.
        confidence: f64,
    },
}

/// Settings of the training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockOptions {
    /// Blocks of each row at most.
    pub num_anchors: usize,
    /// What is minimised.
    pub loss: BlockLoss,
    /// Seed of the anchors.
    pub seed: u64,
}

impl BlockOptions {
    /// The published settings of DFlash.
    pub const DFLASH: BlockOptions =
        BlockOptions { num_anchors: 512, loss: BlockLoss::Tokens { gamma: Some(7.0) }, seed: 0 };
    /// The published settings of DSpark.
    pub const DSPARK: BlockOptions = BlockOptions {
        num_anchors: 512,
        loss: BlockLoss::Spark { gamma: Some(4.0), ce: 0.1, l1: 0.9, confidence: 1.0 },
        seed: 0,
    };
}

impl BlockOptions {
    /// The settings of a run file for DFlash.
    pub fn from_dflash(table: &DflashTrainTable, seed: u64) -> BlockOptions {
        let dpace = |kind| BlockLoss::Dpace { kind, alpha: table.dpace_alpha };
        let loss = match table.loss {
            BlockLossKind::Tokens => BlockLoss::Tokens { gamma: (table.gamma > 0.0).then_some(table.gamma) },
            BlockLossKind::Dpace => dpace(DpaceKind::Full),
            BlockLossKind::DpaceConfidence => dpace(DpaceKind::Confidence),
            BlockLossKind::DpaceContinuation => dpace(DpaceKind::Continuation),
        };
        BlockOptions { num_anchors: table.num_anchors as usize, loss, seed }
    }

    /// The settings of a run file for DSpark.
    pub fn from_dspark(table: &DsparkTrainTable, seed: u64) -> BlockOptions {
        let loss = BlockLoss::Spark {
            gamma: (table.gamma > 0.0).then_some(table.gamma),
            ce: table.ce,
            l1: table.l1,
            confidence: table.confidence,
        };
        BlockOptions { num_anchors: table.num_anchors as usize, loss, seed }
    }
}

/// One row with a loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossRow {
    /// Block, counted over the pack.
    pub block: usize,
    /// Slot of the block.
    pub slot: usize,
    /// Slot of the pack whose token is predicted.
    pub label_slot: u32,
}

/// Intermediate results, for tests that compare them.
#[derive(Clone, Debug, Default)]
pub struct BlockTrace {
    /// `[N, Bk, H]` output of the network.
    pub hidden: Vec<f32>,
    /// `[N, Bk, Vd]` logits before a correction.
    pub base_logits: Vec<f32>,
    /// Rows with a loss.
    pub rows: Vec<LossRow>,
    /// `[L]` what was found in them.
    pub found: Vec<TokenRow>,
    /// `[L]` weights of the cross-entropy, or of all terms of DSpark.
    pub weights: Vec<f32>,
    /// `[L, M]` what a Markov head adds to, before its last layer.
    pub correction: Vec<f32>,
    /// `[L]` logits of the confidence.
    pub confidence: Vec<f32>,
}

/// A block's place.
#[derive(Clone, Copy)]
struct Block {
    doc: usize,
    /// Slot of the pack.
    anchor: u32,
}

/// A block draft on the tape.
pub struct BlockTrain<K: TrainKernels> {
    net: BlockNet,
    options: BlockOptions,
    vocab_map: VocabMap,
    tape: Tape<K>,
    weights: BlockWeights<ParamId, ParamId>,
    embed: ParamId,
    heads: TargetHeads,
    /// Arg-max and log-sum-exp of the target's full logits at the slots of each row seen; only where they are needed.
    memo: HashMap<u64, Vec<(u32, f32)>>,
}

impl<K: TrainKernels> BlockTrain<K> {
    /// A draft for a loaded target, started from it or at random.
    ///
    /// # Errors
    /// As [`BlockTrain::new`]; a start from the target also needs a draft of its shapes.
    pub fn for_target(
        kernels: K,
        config: BlockConfig,
        options: BlockOptions,
        vocab_map: VocabMap,
        target: &TargetTensors,
        init: DraftInit,
    ) -> Result<BlockTrain<K>, TrainError> {
        let weights = match init {
            DraftInit::Target => warm_weights(&config, &TargetStart::of(target), options.seed)?,
            DraftInit::Random => random_weights(&config, options.seed),
        };
        let side = TargetSide { embed: &target.embed, head: target.head.as_deref() };
        BlockTrain::new(kernels, config, options, vocab_map, &side, &weights)
    }

    /// A draft with the given initial weights (all of its configuration's tensors, by name).
    ///
    /// # Errors
    /// If a weight is missing, or one of the target's tensors or the vocabulary map does not fit the configuration.
    pub fn new(
        kernels: K,
        config: BlockConfig,
        options: BlockOptions,
        vocab_map: VocabMap,
        target: &TargetSide<'_>,
        weights: &[DraftTensor],
    ) -> Result<BlockTrain<K>, TrainError> {
        config.check()?;
        let (v, vd, h) = (config.vocab_size, config.draft_vocab_size, config.layer.hidden_size);
        expect_len("embed_tokens.weight", target.embed.len(), v * h)?;
        let head = target.head.unwrap_or(target.embed);
        expect_len("target lm_head.weight", head.len(), v * h)?;
        expect_len("t2d", vocab_map.target_vocab(), v)?;
        expect_len("d2t", vocab_map.draft_vocab(), vd)?;
        check_tensors(config.tensors(), weights)?;
        let mut tape = Tape::new(kernels);
        let Ok(ids) = BlockWeights::build(&config, &mut ToTape::new(&mut tape, weights));
        let embed = tape.add_param("embed_tokens.weight", &[v, h], target.embed, false);
        let target_head = match target.head {
            None => embed,
            Some(head) => tape.add_param("target lm_head.weight", &[v, h], head, false),
        };
        let part = match vocab_map.is_identity() {
            true => target_head,
            false => {
                let rows = head_rows(head, h, &vocab_map);
                tape.add_param("target lm_head.weight of the draft vocabulary", &[vd, h], &rows, false)
            }
        };
        Ok(BlockTrain {
            net: BlockNet::new(config),
            options,
            vocab_map,
            tape,
            weights: ids,
            embed,
            heads: TargetHeads::new(target_head, part, h),
            memo: HashMap::new(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &BlockConfig {
        &self.net.config
    }

    /// The anchors that a pack gets: slots of the pack, for each document.
    pub fn anchors(&self, pack: &Pack) -> Vec<Vec<u32>> {
        anchors::draw(pack, self.options.num_anchors, self.options.seed)
    }

    /// As [`Method::micro_batch`] with given anchors.
    ///
    /// # Errors
    /// Token ids outside the vocabulary.
    pub fn micro_batch_at(
        &mut self,
        pack: &Pack,
        anchors: &[Vec<u32>],
        mode: Mode,
    ) -> Result<BatchStats, TrainError> {
        self.run(pack, anchors, mode, None, None)
    }

    /// Loss and all intermediate results of given anchors, without gradients.
    ///
    /// # Errors
    /// Token ids outside the vocabulary.
    pub fn trace(
        &mut self,
        pack: &Pack,
        anchors: &[Vec<u32>],
    ) -> Result<(BatchStats, BlockTrace), TrainError> {
        let mut trace = BlockTrace::default();
        let stats = self.run(pack, anchors, Mode::Evaluate, Some(&mut trace), None)?;
        Ok((stats, trace))
    }

    /// What every slot of every block sees in a layer: full ones are alike.
    fn sights(&self, pack: &Pack, blocks: &[Block], layer: usize) -> Arc<[Sight]> {
        let config = &self.net.config;
        let size = config.block_size as u32;
        let sliding = config.sliding[layer];
        let mut sights = Vec::with_capacity(blocks.len() * config.block_size);
        for (number, block) in blocks.iter().enumerate() {
            let (start, own) = (pack.docs[block.doc].start, number as u32 * size);
            for slot in 0..size {
                let from = start + config.context_from(layer, block.anchor - start, slot);
                let to = if sliding { own + slot + 1 } else { own + size };
                sights.push(Sight { context: Span::new(from, block.anchor), own: Span::new(own, to) });
            }
        }
        sights.into()
    }

    /// Rows with a loss, slot by slot. DSpark's blocks end at the first slot without one.
    fn loss_rows(&self, pack: &Pack, blocks: &[Block]) -> Vec<LossRow> {
        let config = &self.net.config;
        let spark = config.spark.is_some();
        let mut alive = vec![true; blocks.len()];
        let mut rows = Vec::new();
        for slot in config.first_proposal()..config.block_size {
            for (number, block) in blocks.iter().enumerate() {
                let doc = pack.docs[block.doc];
                let label_slot = block.anchor + slot as u32 + u32::from(spark);
                let trained = (label_slot as usize) < doc.end() && pack.loss_mask[label_slot as usize];
                if spark {
                    alive[number] &= trained;
                }
                if trained && alive[number] {
                    rows.push(LossRow { block: number, slot, label_slot });
                }
            }
        }
        rows
    }

    /// Asks the target's whole head about documents, each named once or side by side: it is known from then on.
    fn ask_target(&mut self, pack: &Pack, docs: impl Iterator<Item = usize>) {
        let h = self.net.config.layer.hidden_size;
        let wanted = |doc: usize| -> Vec<u32> {
            let span = pack.docs[doc];
            let last = (span.start + span.len).saturating_sub(1);
            (span.start..last).filter(|s| pack.loss_mask[*s as usize + 1]).collect()
        };
        let mut new: Vec<usize> = docs.filter(|d| !self.memo.contains_key(&pack.rows[*d])).collect();
        new.dedup();
        let slots: Vec<Vec<u32>> = new.iter().map(|d| wanted(*d)).collect();
        if slots.iter().any(|slots| !slots.is_empty()) {
            let states = pack.last_at(slots.iter().flatten().map(|s| *s as usize), h);
            let (argmax, lse) = self.heads.tops(&mut self.tape, &states);
            let mut found = argmax.into_iter().zip(lse);
            for (doc, slots) in new.iter().zip(&slots) {
                let span = pack.docs[*doc];
                let mut all = vec![(u32::MAX, 0.0); span.len as usize];
                for slot in slots {
                    all[(slot - span.start) as usize] = found.next().expect("one for each state");
                }
                self.memo.insert(pack.rows[*doc], all);
            }
        }
    }

    /// Log-sum-exp of the target's full logits at the slots before the labels; `None` if the head is the whole one.
    fn full_lse(&mut self, pack: &Pack, blocks: &[Block], rows: &[LossRow]) -> Option<Vec<f32>> {
        if self.vocab_map.is_identity() {
            return None;
        }
        self.ask_target(pack, blocks.iter().map(|b| b.doc));
        let of = |row: &LossRow| {
            let doc = blocks[row.block].doc;
            self.memo[&pack.rows[doc]][(row.label_slot - 1 - pack.docs[doc].start) as usize].1
        };
        Some(rows.iter().map(of).collect())
    }

    /// The Markov head over the loss rows: rows of the tokens before, and what corrects the logits.
    fn markov(&mut self, output: Var, rows: &[LossRow], before_ids: &[u32]) -> Option<(Var, Var)> {
        let (tape, net) = (&mut self.tape, &self.net);
        let w = self.weights.markov.as_ref()?;
        let before = net.before(tape, w, before_ids); // [L, M]
        if net.config.markov().map(|m| m.kind) != Some(MarkovKind::Rnn) {
            return Some((before, net.correction(tape, w, &output, &before, None).0));
        }
        // The state runs along the blocks that still have a loss.
        let mut parts: Vec<Var> = Vec::new();
        let mut state: Option<(Var, Vec<usize>)> = None;
        let mut from = 0;
        for slot in rows.chunk_by(|a, b| a.slot == b.slot) {
            let here: Vec<u32> = (from as u32..(from + slot.len()) as u32).collect();
            let (z, before) = (tape.gather_rows(output, &here), tape.gather_rows(before, &here));
            let blocks: Vec<usize> = slot.iter().map(|r| r.block).collect();
            let earlier = state.map(|(state, old)| {
                let place = |b: &usize| old.iter().position(|o| o == b).expect("blocks end once") as u32;
                tape.select(&state, &blocks.iter().map(place).collect::<Vec<_>>())
            });
            let (correction, next) = net.correction(tape, w, &z, &before, earlier);
            parts.push(correction);
            state = next.map(|next| (next, blocks));
            from += slot.len();
        }
        let parts: Vec<&Var> = parts.iter().collect();
        Some((before, tape.stack(&parts)))
    }

    /// What the network gives for blocks: `[N Bk, H]`.
    fn forward(&mut self, pack: &Pack, blocks: &[Block]) -> Var {
        let size = self.net.config.block_size;
        let config = &self.net.config;
        let shape = config.layer;
        let heads = HeadLayout {
            heads: shape.num_attention_heads,
            kv_heads: shape.num_key_value_heads,
            head_dim: shape.head_dim,
            scale: shape.scale(),
        };
        let full = config.sliding.iter().position(|s| !s).map(|layer| self.sights(pack, blocks, layer));
        let sliding = config.sliding.iter().position(|s| *s).map(|layer| self.sights(pack, blocks, layer));
        let masks = config.sliding.iter().map(|s| {
            let sights = if *s { &sliding } else { &full };
            MaskLayout::Spans(Arc::clone(sights.as_ref().expect("made for the layers there are")))
        });
        let masks: Vec<MaskLayout> = masks.collect();
        let features = pack.features_on(&mut self.tape, config.features_width());
        let context = self.net.context(&mut self.tape, &self.weights, &features, &pack.positions);
        let mut attend = BlockAttend::new(heads, masks.into_iter().zip(context).collect());
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for block in blocks {
            let anchor = block.anchor as usize;
            tokens.push(pack.ids[anchor]);
            tokens.extend(std::iter::repeat_n(config.mask_token_id, size - 1));
            positions.extend((0..size as u32).map(|j| pack.positions[anchor] + j));
        }
        let embedded = self.tape.embed(&self.embed, &tokens, 1.0); // [N Bk, H]
        self.net.block(&mut self.tape, &self.weights, embedded, &positions, &mut attend)
    }

    /// `some` are the only rows with a loss, and what their factors add up to.
    fn run(
        &mut self,
        pack: &Pack,
        anchors: &[Vec<u32>],
        mode: Mode,
        mut trace: Option<&mut BlockTrace>,
        some: Option<(&[Rejected], f64)>,
    ) -> Result<BatchStats, TrainError> {
        let (vocab, size) = (self.net.config.vocab_size, self.net.config.block_size);
        pack.check_ids(vocab)?;
        let mut stats = BatchStats { slots: pack.len() as u64, ..BatchStats::default() };
        let proposals = self.net.config.proposals();
        stats.depths = vec![DepthStats::default(); proposals];
        let blocks: Vec<Block> = anchors
            .iter()
            .enumerate()
            .flat_map(|(doc, anchors)| anchors.iter().map(move |anchor| Block { doc, anchor: *anchor }))
            .collect();
        let mut rows = self.loss_rows(pack, &blocks);
        if let Some((rejected, _)) = some {
            rows = self.replayed_rows(&blocks, rows, rejected);
        }
        if let BlockLoss::Dpace { .. } = self.options.loss {
            stats.weight = anchors.iter().filter(|a| !a.is_empty()).count() as f64;
        }
        if rows.is_empty() {
            return Ok(stats);
        }
        let full_lse = match self.options.loss {
            BlockLoss::Spark { .. } => self.full_lse(pack, &blocks, &rows),
            _ => None,
        };

        let output = self.forward(pack, &blocks); // [N Bk, H]
        if let Some(trace) = trace.as_deref_mut() {
            trace.hidden = self.tape.values(output);
            let logits = self.tape.linear(&output, &self.heads.part, None);
            trace.base_logits = self.tape.values(logits);
        }

        // Heads
        let chosen: Vec<u32> = rows.iter().map(|r| (r.block * size + r.slot) as u32).collect();
        let chosen = self.tape.select(&output, &chosen); // [L, H]
        let before_ids: Vec<u32> = rows.iter().map(|r| pack.ids[r.label_slot as usize - 1]).collect();
        let markov = self.markov(chosen, &rows, &before_ids);
        // Rejected positions alone would teach it that everything is rejected.
        let confidence = self.weights.confidence.as_ref().filter(|_| some.is_none()).map(|head| {
            self.net.confidence(&mut self.tape, head, &chosen, markov.as_ref().map(|(before, _)| before))
        });
        let mut parts = vec![(chosen, self.heads.part)];
        if let (Some((_, correction)), Some(w)) = (&markov, &self.weights.markov) {
            parts.push((*correction, w.w2));
        }

        // Losses
        let labels: Vec<u32> = rows
            .iter()
            .map(|r| {
                let draft = self.vocab_map.to_draft(TargetTokenId(pack.ids[r.label_slot as usize]));
                draft.map_or(NO_LABEL, |d| d.0)
            })
            .collect();
        let grads = mode == Mode::Train;
        let none = vec![0.0; rows.len()];
        let first = self.net.config.first_proposal();
        let own = some.map(|some| self.replay_factors(&blocks, &rows, &labels, some));
        let loss = match self.options.loss {
            BlockLoss::Dpace { .. } if own.is_some() => BlockLoss::Tokens { gamma: None },
            loss => loss,
        };
        let sum = |weights: &[f32]| -> f64 { weights.iter().map(|w| f64::from(*w)).sum() };
        let (found, weights) = match loss {
            BlockLoss::Tokens { gamma } => {
                let weigh = |(r, label): (&LossRow, &u32)| match *label {
                    NO_LABEL => 0.0,
                    _ => weights::decay(gamma, r.slot - first),
                };
                let all = || rows.iter().zip(&labels).map(weigh).collect();
                let ce: Vec<f32> = own.unwrap_or_else(all);
                let found = self.tape.token_loss(&parts, &labels, (&ce, &none), None, grads);
                stats.weight = sum(&ce);
                stats.coefficients = stats.weight;
                stats.loss = found.iter().zip(&ce).map(|(f, w)| f64::from(f.ce) * f64::from(*w)).sum();
                (found, ce)
            }
            BlockLoss::Dpace { kind, alpha } => {
                let mut found = self.tape.token_loss(&parts, &labels, (&none, &none), None, false);
                let ce = dpace_weights(kind, alpha, &rows, &labels, &found, (blocks.len(), proposals, first));
                if grads {
                    found = self.tape.token_loss(&parts, &labels, (&ce, &none), None, true);
                }
                stats.coefficients = sum(&ce);
                stats.loss = found.iter().zip(&ce).map(|(f, w)| f64::from(f.ce) * f64::from(*w)).sum();
                (found, ce)
            }
            BlockLoss::Spark { gamma, ce, l1, confidence: factor } => {
                let all = || rows.iter().map(|r| weights::decay(gamma, r.slot)).collect();
                let weights: Vec<f32> = own.unwrap_or_else(all);
                let times = |factor: f64| -> Vec<f32> { weights.iter().map(|w| w * factor as f32).collect() };
                let h = self.net.config.layer.hidden_size;
                let states = pack.last_at(rows.iter().map(|r| r.label_slot as usize - 1), h);
                let teacher = Some((states.rows::<K>(), self.heads.part, full_lse.as_deref()));
                let factors = (times(ce), times(l1));
                let found = self.tape.token_loss(&parts, &labels, (&factors.0, &factors.1), teacher, grads);
                stats.weight = sum(&weights);
                stats.coefficients = stats.weight * (ce + l1);
                for (f, w) in found.iter().zip(&weights) {
                    stats.loss += f64::from(*w) * (ce * f64::from(f.ce) + l1 * f64::from(f.l1));
                }
                if let Some(logits) = confidence {
                    let accepted: Vec<f64> = found.iter().map(acceptance).collect();
                    let values = self.tape.values(logits);
                    let mut slopes = Vec::with_capacity(values.len());
                    for ((x, a), w) in values.iter().zip(&accepted).zip(&weights) {
                        let (x, w) = (f64::from(*x), f64::from(*w));
                        // log(1 + e^x) without overflow.
                        let softplus = x.max(0.0) + (-x.abs()).exp().ln_1p();
                        stats.loss += factor * w * (softplus - a * x);
                        slopes.push((factor * w * (1.0 / (1.0 + (-x).exp()) - a)) as f32);
                    }
                    if grads {
                        self.tape.add_activation_grad(logits, &slopes);
                    }
                    if let Some(trace) = trace.as_deref_mut() {
                        trace.confidence = values;
                    }
                }
                (found, weights)
            }
        };
        count(&mut stats, &rows, &labels, &found, (blocks.len(), first), self.net.config.spark.is_some());
        if let Some(trace) = trace {
            trace.correction = markov.map_or(Vec::new(), |(_, correction)| self.tape.values(correction));
            (trace.rows, trace.found, trace.weights) = (rows, found, weights);
        }
        match mode {
            Mode::Train => self.tape.backward(),
            Mode::Evaluate => self.tape.reset(),
        }
        Ok(stats)
    }
}

/// The probability that one sampling step accepts the draft's token.
fn acceptance(row: &TokenRow) -> f64 {
    (1.0 - f64::from(row.l1) / 2.0).clamp(0.0, 1.0)
}

/// D-PACE's weights of all rows.
fn dpace_weights(
    kind: DpaceKind,
    alpha: f64,
    rows: &[LossRow],
    labels: &[u32],
    found: &[TokenRow],
    (blocks, proposals, first): (usize, usize, usize),
) -> Vec<f32> {
    let mut mask = vec![false; blocks * proposals];
    let mut probs = vec![0.0f32; blocks * proposals];
    for ((r, label), f) in rows.iter().zip(labels).zip(found) {
        let at = r.block * proposals + r.slot - first;
        mask[at] = true;
        // A token that cannot be proposed is never accepted.
        probs[at] = if *label == NO_LABEL { 0.0 } else { (-f.ce).exp() };
    }
    let all: Vec<f32> = mask
        .chunks(proposals)
        .zip(probs.chunks(proposals))
        .flat_map(|(mask, probs)| weights::dpace(kind, alpha, mask, probs))
        .collect();
    rows.iter().map(|r| all[r.block * proposals + r.slot - first]).collect()
}

/// Metrics: per slot, and the accept length that they come to.
fn count(
    stats: &mut BatchStats,
    rows: &[LossRow],
    labels: &[u32],
    found: &[TokenRow],
    (blocks, first): (usize, usize),
    spark: bool,
) {
    // What is left of each block: 1 while every slot was right, or the product of the acceptances.
    let mut left = vec![1.0f64; blocks];
    let mut next = vec![first; blocks];
    for ((r, label), f) in rows.iter().zip(labels).zip(found) {
        let depth = &mut stats.depths[r.slot - first];
        let correct = *label != NO_LABEL && f.top == *label;
        let accepted = match spark {
            true => acceptance(f),
            false if *label == NO_LABEL => 0.0,
            false => f64::from((-f.ce).exp()),
        };
        depth.slots += 1;
        depth.correct += u64::from(correct);
        depth.trained += u64::from(spark || *label != NO_LABEL);
        depth.alpha += accepted;
        depth.loss += f64::from(f.ce);
        // Slots behind one without a label are not reached.
        let through = if next[r.block] == r.slot { left[r.block] } else { 0.0 };
        left[r.block] = through * if spark { accepted } else { f64::from(u8::from(correct)) };
        next[r.block] = r.slot + 1;
        stats.sim_accepted += left[r.block];
    }
    stats.blocks = blocks as u64;
    stats.sim_accepted += blocks as f64;
}

/// As a run file has it.
pub(super) fn method<K: TrainKernels>(
    config: BlockConfig,
    start: Start<'_, K>,
) -> Result<BoxedMethod<K>, TrainError> {
    let Start { kernels, vocab_map, target, file, seed, own_head } = start;
    let options = match config.spark {
        None => BlockOptions::from_dflash(&file.train.dflash, seed),
        Some(_) => BlockOptions::from_dspark(&file.train.dspark, seed),
    };
    let init = file.draft.init;
    let mut method = BlockTrain::for_target(kernels, config, options, vocab_map, target, init)?;
    method.heads.own = own_head;
    Ok(Box::new(method))
}

impl<K: TrainKernels> Method for BlockTrain<K> {
    type Kernels = K;

    fn name(&self) -> &'static str {
        self.net.config.name()
    }
    fn feature_width(&self) -> usize {
        self.net.config.features_width()
    }
    fn last_width(&self) -> usize {
        self.net.config.layer.hidden_size
    }
    fn tape(&self) -> &Tape<K> {
        &self.tape
    }
    fn tape_mut(&mut self) -> &mut Tape<K> {
        &mut self.tape
    }
    fn micro_batch(&mut self, pack: &Pack, mode: Mode) -> Result<BatchStats, TrainError> {
        let anchors = self.anchors(pack);
        self.run(pack, &anchors, mode, None, None)
    }
    fn replays(&mut self) -> Option<&mut dyn Replays> {
        Some(self)
    }
    fn draft(&self) -> Result<DraftWeights, TrainError> {
        Ok(DraftWeights {
            method: self.name(),
            config: self.net.config.to_value()?,
            tensors: trained_tensors(&self.tape, self.net.config.tensors()),
            vocab_map: (!self.vocab_map.is_identity()).then(|| self.vocab_map.clone()),
        })
    }
}
