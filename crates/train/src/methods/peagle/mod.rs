//! Training a P-EAGLE draft: real slots, and rollouts of mask tokens behind some of them [dflash §4].
//!
//! Every slot is an entry of depth 0, as in EAGLE-3. An entry of depth `d` behind slot `a` knows the features up to `a`
//! alone and is compared with the target where slot `a + d` would be. All entries go through the layers in one pass; an
//! entry sees the real slots of its document up to its anchor, and its own rollout up to itself.
//!
//! Shape legend: `S` slots of the pack, `E` entries (the slots, then rollouts by anchor and depth), `H`/`Ht` draft/target
//! width, `V`/`Vd` vocabularies.

mod init;
mod replay;
mod sampling;

use draftsmith_core::VocabMap;
use draftsmith_formats::run::{DraftInit, PEagleTrainTable};
use draftsmith_kernels::TrainKernels;
use draftsmith_kernels::train::{Sight, SoftLoss, SoftScale, Span};
use draftsmith_model::peagle::{PEagleConfig, PEagleNet, PEagleWeights};
use draftsmith_model::tape::{HeadLayout, ParamId, RolloutAttend, Tape, Var};
use draftsmith_model::{DraftSpec, Ops, TargetTensors};

pub use init::{random_weights, warm_weights};
pub use sampling::{Element, Thinning};

use crate::methods::eagle3::TargetStart;
use crate::methods::{BoxedMethod, Start};
use crate::teacher::TargetHeads;
use crate::to_tape::{ToTape, check_tensors, expect_len, head_rows, trained_tensors};
use crate::{BatchStats, DepthStats, DraftTensor, DraftWeights, Method, Mode, Pack, Replays, TrainError};

/// Settings of the training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PEagleOptions {
    /// Which entries are trained.
    pub thinning: Thinning,
    /// Seed of their draw.
    pub seed: u64,
}

impl PEagleOptions {
    /// The published settings.
    pub const PUBLISHED: PEagleOptions =
        PEagleOptions { thinning: Thinning { num_depths: 5, ratio: 0.8, least: 0.2 }, seed: 0 };

    /// The settings of a run file.
    pub fn from_table(table: &PEagleTrainTable, num_depths: usize, seed: u64) -> PEagleOptions {
        let (ratio, least) = (table.down_sample_ratio, table.down_sample_ratio_min);
        PEagleOptions { thinning: Thinning { num_depths, ratio, least }, seed }
    }
}

/// Intermediate results, for tests that compare them.
#[derive(Clone, Debug, Default)]
pub struct PEagleTrace {
    /// `[E]`
    pub elements: Vec<Element>,
    /// `[E, H]` output of the last layer before the final norm.
    pub hidden: Vec<f32>,
    /// `[E, Vd]`
    pub logits: Vec<f32>,
    /// `[S]` teacher row of each trained slot, else `u32::MAX`.
    pub teacher_rows: Vec<u32>,
    /// `[M, Vd]` teacher probabilities.
    pub p: Vec<f32>,
}

/// P-EAGLE on the tape.
pub struct PEagleTrain<K: TrainKernels> {
    net: PEagleNet,
    options: PEagleOptions,
    vocab_map: VocabMap,
    tape: Tape<K>,
    weights: PEagleWeights<ParamId, ParamId>,
    heads: TargetHeads,
}

impl<K: TrainKernels> PEagleTrain<K> {
    /// A draft for a loaded target, started from it or at random.
    ///
    /// # Errors
    /// As [`PEagleTrain::new`]; a start from the target also needs a draft of its shapes.
    pub fn for_target(
        kernels: K,
        config: PEagleConfig,
        options: PEagleOptions,
        vocab_map: VocabMap,
        target: &TargetTensors,
        init: DraftInit,
    ) -> Result<PEagleTrain<K>, TrainError> {
        let weights = match init {
            DraftInit::Target => {
                warm_weights(&config, &vocab_map, &TargetStart::of(target), &target.embed, options.seed)?
            }
            DraftInit::Random => random_weights(&config, &target.embed, options.seed),
        };
        let head = target.head.as_ref().unwrap_or(&target.embed);
        PEagleTrain::new(kernels, config, options, vocab_map, head, &weights)
    }

    /// A draft with the given initial weights (all of its configuration's tensors, by name). `head` is the target's
    /// `[V, Ht]`.
    ///
    /// # Errors
    /// If a weight is missing, or the target's head or the vocabulary map does not fit the configuration.
    pub fn new(
        kernels: K,
        config: PEagleConfig,
        options: PEagleOptions,
        vocab_map: VocabMap,
        head: &[f32],
        weights: &[DraftTensor],
    ) -> Result<PEagleTrain<K>, TrainError> {
        config.check()?;
        let (v, vd, ht) = (config.vocab_size, config.draft_vocab_size, config.target_hidden_size);
        expect_len("target lm_head.weight", head.len(), v * ht)?;
        expect_len("t2d", vocab_map.target_vocab(), v)?;
        expect_len("d2t", vocab_map.draft_vocab(), vd)?;
        check_tensors(config.tensors(), weights)?;
        let mut tape = Tape::new(kernels);
        let Ok(ids) = PEagleWeights::build(&config, &mut ToTape::new(&mut tape, weights));
        // Where the tokenizer has no token to spare, the mask token is the one of padding, and then it is learnt.
        if let Some(pad) = config.pad_token_id.filter(|pad| *pad != config.mask_token_id) {
            tape.fix_row(ids.embed, pad);
        }
        let whole = tape.add_param("target lm_head.weight", &[v, ht], head, false);
        let part = match vocab_map.is_identity() {
            true => whole,
            false => {
                let rows = head_rows(head, ht, &vocab_map);
                tape.add_param("target lm_head.weight of the draft vocabulary", &[vd, ht], &rows, false)
            }
        };
        let heads = TargetHeads::new(whole, part, ht);
        Ok(PEagleTrain { net: PEagleNet::new(config), options, vocab_map, tape, weights: ids, heads })
    }

    /// The configuration.
    pub fn config(&self) -> &PEagleConfig {
        &self.net.config
    }

    /// The entries of depth 1 and deeper that a pack gets.
    pub fn rollouts(&self, pack: &Pack) -> Vec<Element> {
        sampling::draw(pack, self.options.thinning, self.options.seed)
    }

    /// As [`Method::micro_batch`] with given entries of depth 1 and deeper.
    ///
    /// # Errors
    /// Token ids outside the vocabulary.
    pub fn micro_batch_at(
        &mut self,
        pack: &Pack,
        rollouts: &[Element],
        mode: Mode,
    ) -> Result<BatchStats, TrainError> {
        self.run(pack, rollouts, mode, None, None)
    }

    /// Loss and all intermediate results of given entries, without gradients.
    ///
    /// # Errors
    /// Token ids outside the vocabulary.
    pub fn trace(
        &mut self,
        pack: &Pack,
        rollouts: &[Element],
    ) -> Result<(BatchStats, PEagleTrace), TrainError> {
        let mut trace = PEagleTrace::default();
        let stats = self.run(pack, rollouts, Mode::Evaluate, Some(&mut trace), None)?;
        Ok((stats, trace))
    }

    /// What the last layer gives for entries `[E, H]`: all slots, then rollouts by anchor and depth.
    fn forward(&mut self, pack: &Pack, elements: &[Element]) -> Var {
        let slots = pack.len();
        let starts: Vec<u32> =
            pack.docs.iter().flat_map(|d| std::iter::repeat_n(d.start, d.len as usize)).collect();
        let ends: Vec<usize> =
            pack.docs.iter().flat_map(|d| std::iter::repeat_n(d.end(), d.len as usize)).collect();
        let mut first = 0;
        let sights: Vec<Sight> = elements
            .iter()
            .enumerate()
            .map(|(i, e)| {
                let context = Span::new(starts[e.anchor as usize], e.anchor + 1);
                if e.depth == 0 {
                    return Sight { context, own: Span::default() };
                }
                let own = (i - slots) as u32;
                if i > slots && elements[i - 1].anchor != e.anchor {
                    first = own;
                }
                Sight { context, own: Span::new(first, own + 1) }
            })
            .collect();
        let mask_token = self.net.config.mask_token_id;
        let token = |e: &Element| match e.depth {
            0 if e.slot() + 1 < ends[e.slot()] => pack.ids[e.slot() + 1],
            0 => 0,
            _ => mask_token,
        };
        let tokens: Vec<u32> = elements.iter().map(token).collect();
        let positions: Vec<u32> =
            elements.iter().map(|e| pack.positions[e.anchor as usize] + e.depth).collect();

        let config = &self.net.config;
        let shape = config.layer;
        let heads = HeadLayout {
            heads: shape.num_attention_heads,
            kv_heads: shape.num_key_value_heads,
            head_dim: shape.head_dim,
            scale: shape.scale(),
        };
        let (tape, net, w) = (&mut self.tape, &self.net, &self.weights);
        let features = pack.features_on(tape, config.features_width());
        let mut hidden = net.project(tape, w, &features); // [S, H]
        if elements.len() > slots {
            let unknown = net.unknown(tape, w); // [1, H]
            let unknown = tape.select(&unknown, &vec![0; elements.len() - slots]);
            hidden = tape.stack(&[&hidden, &unknown]); // [E, H]
        }
        let mut attend = RolloutAttend::new(heads, sights.into(), slots);
        net.layers(tape, w, &tokens, &hidden, &positions, &mut attend)
    }

    /// `some` are the only entries with a loss, ascending, and a factor of it.
    fn run(
        &mut self,
        pack: &Pack,
        rollouts: &[Element],
        mode: Mode,
        trace: Option<&mut PEagleTrace>,
        some: Option<(&[Element], f64)>,
    ) -> Result<BatchStats, TrainError> {
        pack.check_ids(self.net.config.vocab_size)?;
        let slots = pack.len();
        let mut stats = BatchStats { slots: slots as u64, ..BatchStats::default() };
        let teacher = self.heads.teacher(&mut self.tape, pack, &self.vocab_map, None);

        let mut rollouts = rollouts.to_vec();
        rollouts.sort_unstable();
        let real = (0..slots as u32).map(|anchor| Element { anchor, depth: 0 });
        let elements: Vec<Element> = real.chain(rollouts.iter().copied()).collect();
        let output = self.forward(pack, &elements); // [E, H]
        let (tape, net, w) = (&mut self.tape, &self.net, &self.weights);
        let config = &net.config;
        if let Some(trace) = trace {
            trace.hidden = tape.values(output);
            let normed = net.head_input(tape, w, &output);
            let logits = net.logits(tape, w, &normed);
            trace.logits = tape.values(logits);
            trace.teacher_rows.clone_from(&teacher.of_slot);
            trace.p = vec![0.0; teacher.rows.mass.len() * config.draft_vocab_size];
            tape.kernels().download(&teacher.rows.p, 0, &mut trace.p);
            trace.elements.clone_from(&elements);
        }
        let factor = some.map_or(1.0, |(_, factor)| factor);
        // A device is asked for the sums when everything has been started.
        let mut pending = Vec::new();
        let deepest = elements.iter().map(|e| e.depth).max().unwrap_or(0);
        for depth in 0..=deepest {
            let row_of = |(i, e): (usize, &Element)| {
                let row = *teacher.of_slot.get(e.slot())?;
                let chosen = some.is_none_or(|(some, _)| some.binary_search(e).is_ok());
                (e.depth == depth && chosen && row != u32::MAX).then_some((i as u32, row))
            };
            let (rows, teacher_rows): (Vec<u32>, Vec<u32>) =
                elements.iter().enumerate().filter_map(row_of).unzip();
            let found = DepthStats { slots: rows.len() as u64, ..DepthStats::default() };
            if !rows.is_empty() {
                let chosen = tape.gather_rows(output, &rows);
                let normed = net.head_input(tape, w, &chosen);
                let scale = SoftScale { kl: factor as f32, alpha: 0.0 };
                let grads = mode == Mode::Train;
                let sums =
                    tape.soft_ce(normed, w.lm_head, &teacher.rows, &teacher_rows, SoftLoss::Kl, scale, grads);
                pending.push((stats.depths.len(), sums));
            }
            stats.depths.push(found);
        }
        match mode {
            Mode::Train => tape.backward(),
            Mode::Evaluate => tape.reset(),
        }
        tape.recycle(teacher.rows);
        for (depth, sums) in pending {
            let (found, sums) = (&mut stats.depths[depth], sums.get());
            (found.loss, found.correct, found.alpha, found.trained) =
                (sums.kl, sums.correct, sums.alpha, sums.rows);
        }
        for depth in &stats.depths {
            stats.loss += factor * depth.loss;
            stats.weight += depth.trained as f64;
            stats.coefficients += factor * depth.trained as f64;
        }
        Ok(stats)
    }
}

/// As a run file has it.
pub(super) fn method<K: TrainKernels>(
    config: PEagleConfig,
    start: Start<'_, K>,
) -> Result<BoxedMethod<K>, TrainError> {
    let Start { kernels, vocab_map, target, file, seed, own_head } = start;
    let options = PEagleOptions::from_table(&file.train.p_eagle, config.num_depths, seed);
    let init = file.draft.init;
    let mut method = PEagleTrain::for_target(kernels, config, options, vocab_map, target, init)?;
    method.heads.own = own_head;
    Ok(Box::new(method))
}

impl<K: TrainKernels> Method for PEagleTrain<K> {
    type Kernels = K;

    fn name(&self) -> &'static str {
        self.net.config.name()
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
        let rollouts = self.rollouts(pack);
        self.run(pack, &rollouts, mode, None, None)
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
