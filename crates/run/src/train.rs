//! Stage `train`: rows with hidden states to a draft, the best one chosen by measured accept length.
//!
//! ```text
//! train/checkpoints/step-N   everything the next step depends on
//! train/best, train/last     draft folders
//! train/log.jsonl, train/tensorboard
//! ```

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use draftsmith_bench::stats;
use draftsmith_core::VocabMap;
use draftsmith_core::report::{Report, Stop, Unit};
use draftsmith_data::{Row as DataRow, TokenCounts};
use draftsmith_decode::{DraftPlan, Engine, GenerateOptions, drafter};
use draftsmith_formats::run::RunFile;
use draftsmith_formats::run::Stage;
use draftsmith_formats::tokens::TokenFile;
use draftsmith_kernels::train::Products;
use draftsmith_kernels::{PackMode, TrainKernels};
use draftsmith_model::{Draft, DraftConfig, DraftTensors, TargetTensors};
use draftsmith_text::{MaskOptions, Message, RenderOptions};
use draftsmith_train::{
    Collective, DraftWeights, Event, Flow, Hooks, Method, OwnHead, ReplayReport, StepReport, TrainError,
    TrainOptions, ValidationResult, Validator, begin_with, method, train,
};
use serde_json::{Value, json};

use super::Run;
use super::data::VALIDATION;
use crate::Error;
use crate::begun::Begun;
use crate::cards::linked;
use crate::device::{Around, Compute};
use crate::elsewhere::train_error;
use crate::engine::LoadedTarget;
use crate::measure::prompt_ids_with;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Turns up to a question, and what the template gets besides.
type AskedTurns = (Vec<Message>, RenderOptions);

/// Prompts that drafts are measured on.
struct ValidationPrompt {
    ids: Vec<u32>,
}

/// How the CPU computes the products of a run's training.
pub(crate) fn products(file: &RunFile) -> Products {
    match file.train.products {
        draftsmith_formats::run::Products::F32 => Products::F32,
        draftsmith_formats::run::Products::Bf16 => Products::Bf16,
        draftsmith_formats::run::Products::Bf16x3 => Products::Bf16x3,
    }
}

impl Run<'_> {
    pub(super) fn train(&self, dir: &Path, key: &str, report: &dyn Report) -> Result<Value, Error> {
        match &self.compute {
            Compute::Cpu => {
                let products = products(&self.file);
                if !products.is_offered() {
                    report.note("train.products: this CPU has no such products, so they are computed in f32");
                }
                let kernels = self.target()?.target.kernels().as_ref().clone();
                self.train_on(kernels.with_products(products), dir, key, report)
            }
            #[cfg(feature = "gpu-flex")]
            Compute::Gpu(gpu) => self.train_on(gpu.clone(), dir, key, report),
            Compute::Cuda(cuda) => {
                let around = Around { variable: self.env.variable, python: &self.env.places.python, report };
                let linked = linked(cuda, self.env.ranks.collective(), around)?;
                let trained = self.train_on(linked.clone(), dir, key, report)?;
                if let Err(error) = linked.end_peers() {
                    report.note(&format!("train: all is done, but {error}"));
                }
                Ok(trained)
            }
            #[cfg(feature = "cuda-shim")]
            Compute::Shim(shim) => self.train_on(shim.clone(), dir, key, report),
        }
    }

    fn train_on<K: TrainKernels>(
        &self,
        kernels: K,
        dir: &Path,
        key: &str,
        report: &dyn Report,
    ) -> Result<Value, Error> {
        let target = self.target()?;
        let tokens = self.tokens()?;
        let begun = self.begun.as_ref().map(Begun::load).transpose()?;
        let (vocab_map, coverage) = match &begun {
            Some((_, vocab_map)) => (vocab_map.clone(), self.counts(&tokens)?.coverage(vocab_map)),
            None => self.vocab_map(&tokens)?,
        };
        if let Some(coverage) = coverage {
            report.note(&format!(
                "draft vocabulary: {} of {} tokens cover {:.2} % of the trained tokens",
                vocab_map.draft_vocab(),
                vocab_map.target_vocab(),
                100.0 * coverage
            ));
        }
        drop(tokens);
        let prompts = self.validation_prompts()?;
        let mut method = self.method(kernels, vocab_map)?;
        if let (Some((weights, _)), Some(begun)) = (&begun, &self.begun) {
            begin_with(method.as_mut(), weights)?;
            report.note(&format!("train: begins with the weights of `{}`", begun.name));
        }
        drop(begun);
        let mut store = self.row_store()?;
        let options = TrainOptions::from_run(&self.file, dir.to_path_buf(), key.to_string());
        let stop = self.env.stop;
        let mut best: Option<ValidationResult> = None;
        let mut replay: Option<ReplayReport> = None;
        let mut on_event = |event: &Event| {
            match event {
                Event::Started { total_steps, done_steps, .. } => {
                    report.begin("train", Some(*total_steps), Unit::Steps);
                    report.at(*done_steps);
                }
                Event::Step(step) => {
                    report.at(step.step);
                    report.detail(&step_line(step, best.as_ref()));
                    replay.clone_from(&step.replay);
                }
                Event::Checkpoint { .. } => {}
                Event::Validated { step, mean_of, result, is_best } => {
                    let what = match mean_of {
                        0 => format!("step {step}"),
                        count => format!("mean of the best {count}"),
                    };
                    report.note(&format!(
                        "{what}: accept length {:.3} [{:.3}, {:.3}] on held-out prompts{}",
                        result.accept_len,
                        result.low,
                        result.high,
                        if *is_best { ", best so far" } else { "" }
                    ));
                    if *is_best {
                        best = Some(result.clone());
                    }
                }
            }
            if stop.requested() { Flow::Stop } else { Flow::Continue }
        };
        let collective = self.env.ranks.collective();
        let depth = self.file.validate.depth as usize;
        let max_new_tokens = self.file.validate.max_new_tokens as usize;
        let mut measure = |draft: &DraftWeights, _step: u64| {
            measure_draft(target, draft, &prompts, depth, max_new_tokens, (stop, collective))
        };
        let validates = self.file.validate.every > 0;
        let validate: Option<&mut Validator<'_>> = if validates { Some(&mut measure) } else { None };
        let hooks = Hooks { on_event: &mut on_event, validate, collective };
        let outcome = train(method.as_mut(), store.as_mut(), &options, hooks).map_err(train_error)?;
        report.end();
        if let Some(replay) = &replay {
            report.note(&replay_line(replay));
        }
        let Some(draft) = outcome.draft.filter(|_| outcome.finished) else {
            return Err(self.interrupted(Stage::Train));
        };
        let state = outcome.state;
        let folder = draft.strip_prefix(dir).unwrap_or(&draft).display().to_string();
        let mut summary = json!({
            "steps": state.step,
            "slots": state.slots,
            "draft": folder,
            "draft_step": state.best.as_ref().map_or(state.step, |b| b.step),
            "draft_mean_of": state.best.as_ref().map(|b| &b.mean_of),
            "accept_len": state.best.as_ref().map(|b| b.result.accept_len),
            "accept_len_ci95": state.best.as_ref().map(|b| [b.result.low, b.result.high]),
            "vocab_coverage": coverage,
        });
        if let Some(replay) = replay {
            summary["replay_s"] = json!(replay.seconds);
        }
        Ok(summary)
    }

    /// The draft vocabulary: the most frequent trained tokens, and the share of them that it covers.
    fn vocab_map(&self, tokens: &TokenFile) -> Result<(VocabMap, Option<f64>), Error> {
        self.vocab_map_of(&self.counts(tokens)?)
    }

    /// How often tokens are trained.
    fn counts(&self, tokens: &TokenFile) -> Result<TokenCounts, Error> {
        let mut counts = TokenCounts::new(self.target()?.target.config().vocab_size);
        for row in tokens.rows() {
            counts.add(&row.ids, &row.loss_mask);
        }
        Ok(counts)
    }

    /// The same from counts of trained tokens.
    pub(super) fn vocab_map_of(&self, counts: &TokenCounts) -> Result<(VocabMap, Option<f64>), Error> {
        let target = self.target()?;
        let vocab = target.target.config().vocab_size;
        let size = (self.file.draft.vocab_size as usize).min(vocab);
        let always = target.text.tokenizer.always_in_draft_vocab();
        let map = counts.vocab_map(size, &always).map_err(|e| {
            Error::input(
                format!("`draft.vocab_size` = {size}: {e}"),
                "choose a size between 1 and the target's vocabulary",
            )
        })?;
        let coverage = counts.coverage(&map);
        Ok((map, coverage))
    }

    pub(super) fn method<K: TrainKernels>(
        &self,
        kernels: K,
        vocab_map: VocabMap,
    ) -> Result<Box<dyn Method<Kernels = K>>, Error> {
        let target = self.target()?;
        let t = target.target.config();
        let mut config = DraftConfig::from_table(&self.file.draft, t, vocab_map.draft_vocab())
            .map_err(TrainError::from)?;
        let layers: Vec<u32> = self.layers()?.iter().map(|l| l.0).collect();
        config.set_target_layers(&layers).map_err(TrainError::from)?;
        let special = target.text.tokenizer.special();
        config.set_token_ids(special.bos, &special.eos, special.pad);
        if self.file.draft.mask_token_id().is_none() {
            // An id that no text has, or else one that few texts have.
            let unused = target.text.tokenizer.vocab_size();
            let unused = (unused < t.vocab_size).then_some(unused as u32);
            let known = special.pad.or(special.eos.first().copied()).or(special.unk);
            config.set_mask_token(unused.or(known).unwrap_or(t.vocab_size as u32 - 1));
        }
        let mut tensors = TargetTensors::load(&target.path)?;
        // The network sees scaled embeddings (Gemma); the head is the table as it is.
        if t.embed_scale != 1.0 {
            tensors.head.get_or_insert_with(|| tensors.embed.clone());
            tensors.embed.iter_mut().for_each(|x| *x *= t.embed_scale);
        }
        // Decoding's head is here, and reads a fourth of what one in f32 does.
        let own_head: Option<OwnHead> = matches!(self.compute, Compute::Cpu).then(|| {
            let target = Arc::clone(&target.target);
            Arc::new(move |states: &[f32]| target.tops(states)) as OwnHead
        });
        Ok(method(kernels, config, &self.file, vocab_map, &tensors, own_head)?)
    }

    /// First turns of the held-out rows with what their template gets, by domain; beside each domain how many of it are
    /// wanted.
    ///
    /// # Errors
    /// No turn is left.
    fn validation_turns(&self) -> Result<Vec<(usize, Vec<AskedTurns>)>, Error> {
        let table = &self.file.validate;
        let rows = self.rows_of(&self.folder.stage_dir(Stage::Data).join(VALIDATION))?;
        let mut by_domain: Vec<(String, Vec<AskedTurns>)> = Vec::new();
        for row in rows {
            let domain = row.domain().to_string();
            let DataRow::Conversation(conversation) = row.row else { continue };
            let end = conversation.messages.iter().position(|m| m.role == "user");
            let Some(end) = end else { continue };
            // As regeneration asks it: with the row's own tools and template variables.
            let render = conversation.mask_options(&MaskOptions::default()).render;
            let asked = (conversation.messages[..=end].to_vec(), render);
            let name = if table.domains.is_empty() { String::new() } else { domain };
            match by_domain.iter_mut().find(|(d, _)| *d == name) {
                Some((_, list)) => list.push(asked),
                None => by_domain.push((name, vec![asked])),
            }
        }
        let total: f64 = table.domains.values().sum();
        let wanted = |domain: &str| {
            let share = match table.domains.is_empty() {
                true => 1.0,
                false if total > 0.0 => table.domains.get(domain).copied().unwrap_or(0.0) / total,
                false => 0.0,
            };
            (share * f64::from(table.prompts)).round() as usize
        };
        let turns: Vec<_> = by_domain.into_iter().map(|(domain, list)| (wanted(&domain), list)).collect();
        match turns.iter().any(|(wanted, _)| *wanted > 0) {
            true => Ok(turns),
            false => Err(no_validation_prompt()),
        }
    }

    /// Training will find prompts to validate on. Asked as soon as the held-out rows are there.
    pub(super) fn check_validation(&self) -> Result<(), Error> {
        match self.file.validate.every {
            0 => Ok(()),
            _ => self.validation_turns().map(drop),
        }
    }

    /// The prompts that drafts are measured on.
    fn validation_prompts(&self) -> Result<Vec<ValidationPrompt>, Error> {
        let table = &self.file.validate;
        if table.every == 0 {
            return Ok(Vec::new());
        }
        let target = self.target()?;
        let mut prompts = Vec::new();
        let mut refused = 0;
        for (wanted, list) in self.validation_turns()? {
            let mut taken = 0;
            for (messages, render) in &list {
                if taken == wanted {
                    break;
                }
                let ids = match prompt_ids_with(&target.text, messages, render) {
                    Err(_) if !self.file.data.strict => {
                        refused += 1;
                        continue;
                    }
                    ids => ids?,
                };
                taken += 1;
                if ids.len() + (table.max_new_tokens as usize) < target.target.config().max_position {
                    prompts.push(ValidationPrompt { ids });
                }
            }
        }
        if refused > 0 {
            self.env.report.note(&format!("validation prompts that the template refuses: {refused}"));
        }
        match prompts.is_empty() {
            true => Err(no_validation_prompt()),
            false => Ok(prompts),
        }
    }
}

fn no_validation_prompt() -> Error {
    Error::input(
        "no validation prompt is left: the held-out rows have no user turn, `validate.domains` names none of their \
         domains, or they leave no room for `validate.max_new_tokens`",
        "check `validate.domains` and `data.validation`, or turn validation off with `validate.every = 0`",
    )
}

/// `loss 2.310  acc .61 .52 .45  163 tokens/s  best 2.31`.
fn step_line(step: &StepReport, best: Option<&ValidationResult>) -> String {
    let acc: Vec<String> = step.acc.iter().flatten().map(|a| format!("{a:.2}")).collect();
    let best = best.map(|b| format!("  best accept length {:.2}", b.accept_len)).unwrap_or_default();
    let loss = step.loss.map_or_else(|| "no trained slot".to_string(), |loss| format!("loss {loss:.3}"));
    format!("{loss}  acc {}  {:.0} tokens/s{best}", acc.join(" "), step.tokens_per_s)
}

/// `replay: 21 s; rejected per slot 0.52 0.49 0.51; 128 rows kept`.
fn replay_line(replay: &ReplayReport) -> String {
    let shares = replay.rejected.iter().flatten().map(|share| format!(" {share:.2}"));
    format!(
        "replay: {:.0} s; rejected per slot{}; {} rows kept",
        replay.seconds,
        shares.collect::<String>(),
        replay.buffered_rows
    )
}

/// What rank 0 says instead of its results where the user asked for a stop.
const INTERRUPTED: u64 = u64::MAX;

/// Real speculative decoding of the prompts with a draft in memory. Ranks take turns with the prompts and all get the whole
/// result; rank 0 says when to stop.
fn measure_draft(
    target: &LoadedTarget,
    weights: &DraftWeights,
    prompts: &[ValidationPrompt],
    depth: usize,
    max_new_tokens: usize,
    (stop, collective): (&Stop, &dyn Collective),
) -> Result<ValidationResult, BoxError> {
    let config = DraftConfig::from_value(&weights.config)?;
    let tensors: DraftTensors =
        weights.tensors.iter().map(|t| (t.name.clone(), (t.shape.clone(), t.values.clone()))).collect();
    let kernels = target.target.kernels();
    let draft = Draft::from_tensors(
        kernels.as_ref(),
        config,
        &tensors,
        weights.vocab_map.clone(),
        PackMode::Q8,
        "in training",
    )?;
    let drafter = drafter(&target.target, draft)?;
    let engine = Engine::new(Arc::clone(&target.target), Some(drafter));
    let options = GenerateOptions {
        max_new_tokens,
        stop_ids: target.stop_ids(),
        draft: DraftPlan::Chain { depth },
        ..GenerateOptions::default()
    };
    // Committed tokens and verify steps of this rank's prompts.
    let mut mine = Vec::new();
    let mut interrupted = false;
    for prompt in prompts.iter().skip(collective.rank()).step_by(collective.ranks()) {
        interrupted = collective.is_first() && stop.requested();
        if interrupted {
            break;
        }
        let done = engine.generate(&prompt.ids, &options, &mut |_| ControlFlow::Continue(()))?;
        mine.extend([done.stats.committed_tokens, done.stats.verify_steps]);
    }
    if interrupted {
        mine = vec![INTERRUPTED];
    }
    let said = collective.gather(mine.into_iter().flat_map(u64::to_le_bytes).collect());
    let value = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("chunks of eight bytes"));
    let said: Vec<Vec<u64>> = said.iter().map(|said| said.chunks_exact(8).map(value).collect()).collect();
    if said[0] == [INTERRUPTED] {
        return Err("interrupted".into());
    }
    let mut rows = Vec::new();
    let (mut verify_steps, mut committed_tokens) = (0, 0);
    for i in 0..prompts.len() {
        let of_rank = &said[i % said.len()];
        let at = 2 * (i / said.len());
        let [committed, steps] = of_rank[at..at + 2] else { unreachable!("two numbers for each prompt") };
        committed_tokens += committed;
        verify_steps += steps;
        rows.push((committed as f64, steps as f64));
    }
    let estimate =
        stats::ratio(&rows).ok_or("the target ended every answer at once: nothing was verified")?;
    let (low, high) = estimate.interval.map_or((estimate.value, estimate.value), |i| (i.low, i.high));
    Ok(ValidationResult { accept_len: estimate.value, low, high, verify_steps, committed_tokens })
}
