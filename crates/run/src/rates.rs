//! What the work of the stages costs on this machine: measured in about half a minute with a few prompts of the run, and
//! kept in the cache folder like the costs of passes ([`crate::costs`]), by the same rules: not longer than those, and
//! not where others were using the machine.
//!
//! Nothing of a run is written: answers and states that are made here are thrown away.

use std::collections::BinaryHeap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use draftsmith_bench::BusyTimes;
use draftsmith_capture::{CaptureSource, TokenRow, ends_in_loop};
use draftsmith_core::Sampling;
use draftsmith_core::report::{Report, Silent, Unit};
use draftsmith_data::TokenCounts;
use draftsmith_decode::{BatchOptions, FinishReason, GenerateOptions};
use draftsmith_formats::atomic;
use draftsmith_formats::cache::{CacheWriter, CaptureRow};
use draftsmith_formats::hash::{self, sha256_file};
use draftsmith_formats::run::Stage;
use draftsmith_kernels::{Cpu, TrainKernels};
use draftsmith_model::{StepItem, Target, TargetKv};
use draftsmith_train::{AdamW, Mode, Pack, TrainOptions};
use serde::{Deserialize, Serialize};

use super::Run;
use crate::Error;
use crate::costs::{BUSY_SHARE, OLD, unix_s, with_costs};
use crate::device::Compute;
use crate::engine::engine;
use crate::measure::{busy_times, cpu_name, peak_memory_bytes};

/// Version of the file; another one is measured anew.
const VERSION: u32 = 2;
/// Seconds for reading prompts, answering, and capturing at most.
const PREFILL_S: f64 = 8.0;
const ANSWERS_S: f64 = 12.0;
const CAPTURE_S: f64 = 5.0;
const TRAIN_S: f64 = 8.0;
/// Tokens of a trial capture at most.
const CAPTURE_TOKENS: usize = 16_384;
/// Seconds for which rates of a busy machine are kept.
const NEW_S: u64 = 900;
/// Bytes that are written to see how fast the disk is.
const DISK_BYTES: usize = 32 << 20;

/// An answer of the trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TrialAnswer {
    /// Tokens of its prompt.
    pub(crate) prompt: u32,
    /// Its tokens.
    pub(crate) tokens: u32,
    /// The trial ended it.
    pub(crate) cut: bool,
    /// It ends in a loop: a dialogue ends there, and the answer is not trained on.
    pub(crate) looping: bool,
}

/// `rates/KEY.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rates {
    pub(crate) version: u32,
    pub(crate) draftsmith_version: String,
    /// When they were measured, in seconds since 1970.
    pub(crate) measured_unix_s: u64,
    /// Share of the processors that others used meanwhile; `None` where the system does not say.
    pub(crate) others_busy_share: Option<f64>,
    /// How long the measurement took.
    pub(crate) took_s: f64,
    /// From references to a target that can decode.
    pub(crate) load_s: f64,
    /// Reading a token of a prompt.
    pub(crate) prefill_s: f64,
    /// A decoding step of so many sequences, ascending.
    pub(crate) step_s: Vec<(usize, f64)>,
    /// Tokens behind each of them.
    pub(crate) step_context: f64,
    /// What each further token behind a sequence adds to a step.
    pub(crate) context_s: f64,
    /// What answers really took over what these numbers say.
    pub(crate) answers_factor: f64,
    /// Answers that were written for the measurement.
    pub(crate) answers: Vec<TrialAnswer>,
    /// A pass of so many rows of one sequence, ascending, in milliseconds.
    pub(crate) verify_ms: Vec<(usize, f32)>,
    /// Bytes that a pass reads.
    pub(crate) pass_bytes: u64,
    /// Capturing and storing a token.
    pub(crate) capture_s: f64,
    /// Bytes that it takes on disk.
    pub(crate) capture_bytes: f64,
    /// Making the method ready.
    pub(crate) train_setup_s: f64,
    /// A slot in the first pass over the rows, and in later ones.
    pub(crate) slot_s: [f64; 2],
    /// The optimiser's part of a step.
    pub(crate) update_s: f64,
    /// Trained numbers of the draft.
    pub(crate) parameters: u64,
    /// Bytes that a proposal of the draft reads, by its depth in validation.
    pub(crate) proposal_bytes: u64,
    /// How many tokens that proposal has.
    pub(crate) proposal_depth: u32,
    /// Bytes that a token behind a sequence keeps.
    pub(crate) kv_bytes: u64,
    /// Share of the sampled answers' tokens that the draft's vocabulary has.
    pub(crate) coverage: Option<f64>,
    /// Writing and hashing a byte.
    pub(crate) disk_s: f64,
    /// Most memory while answers were written, states captured, a draft trained.
    pub(crate) memory: [u64; 3],
}

impl Rates {
    /// Seconds of a token's states, where answering kept this share of all: those are copied.
    pub(crate) fn states_s(&self, kept: f64) -> f64 {
        kept * self.capture_bytes * self.disk_s + (1.0 - kept) * self.capture_s
    }

    /// Why they are to be measured anew.
    fn reason(&self, now: u64) -> Option<String> {
        if self.version != VERSION || self.draftsmith_version != env!("CARGO_PKG_VERSION") {
            return Some("another version measured them".to_string());
        }
        if now.saturating_sub(self.measured_unix_s) > OLD || self.measured_unix_s > now + 86_400 {
            return Some("they are old".to_string());
        }
        // Whoever measured a moment ago would find the machine as busy now.
        let is_new = now.saturating_sub(self.measured_unix_s) < NEW_S;
        let busy = self.others_busy_share.filter(|share| *share > BUSY_SHARE && !is_new)?;
        Some(format!("others used {:.0} % of the processors when they were measured", busy * 100.0))
    }

    /// A doubt about them.
    pub(crate) fn doubt(&self) -> Option<String> {
        let share = self.others_busy_share.filter(|share| *share > BUSY_SHARE)?;
        Some(format!(
            "others used {:.0} % of the processors while this was measured: on an idle machine it takes less",
            share * 100.0
        ))
    }

    /// Tokens of the proposal that [`Rates::proposal_bytes`] speaks of.
    pub(crate) fn validate_depth(&self) -> u32 {
        self.proposal_depth
    }

    /// A decoding step of `sequences` that have `context` tokens behind each.
    pub(crate) fn step(&self, sequences: usize, context: f64) -> f64 {
        let points: Vec<(f64, f64)> = self.step_s.iter().map(|(n, s)| (*n as f64, *s)).collect();
        let more = (context - self.step_context) * self.context_s * sequences as f64;
        let flat = line(&points, sequences as f64);
        (flat + more).max(0.3 * flat)
    }

    /// A pass of one sequence, in seconds.
    pub(crate) fn pass(&self, rows: u32) -> f64 {
        let points: Vec<(f64, f64)> =
            self.verify_ms.iter().map(|(n, ms)| (*n as f64, f64::from(*ms) / 1e3)).collect();
        line(&points, f64::from(rows))
    }
}

impl Rates {
    /// Seconds of a queue of answers (tokens of prompt and answer) that are decoded `batch` at a time, each place taken by the
    /// next; ends when the first ones in order have `max_tokens`. Beside it the tokens that were written by then, and how many
    /// answers in order those are.
    pub(crate) fn batch_seconds(
        &self,
        requests: &[(u32, u32)],
        batch: usize,
        max_tokens: Option<u64>,
    ) -> (f64, u64, usize) {
        // Ends at a step of the batch, soonest first.
        let mut running: BinaryHeap<std::cmp::Reverse<(u64, usize)>> = BinaryHeap::new();
        let mut done = vec![false; requests.len()];
        let (mut next, mut in_order, mut written) = (0, 0, 0u64);
        let (mut seconds, mut step, mut context) = (0.0, 0u64, 0.0);
        loop {
            while running.len() < batch.max(1) && next < requests.len() {
                let (prompt, answer) = requests[next];
                seconds += f64::from(prompt) * self.prefill_s;
                context += f64::from(prompt);
                // The first token comes from the prompt's pass.
                running.push(std::cmp::Reverse((step + u64::from(answer.max(1)) - 1, next)));
                next += 1;
            }
            let Some(std::cmp::Reverse((end, number))) = running.pop() else { break };
            let (steps, sequences) = ((end - step) as f64, running.len() + 1);
            let behind = (context + sequences as f64 * steps / 2.0) / sequences as f64;
            seconds += steps * self.step(sequences, behind);
            context += sequences as f64 * steps;
            step = end;
            let (prompt, answer) = requests[number];
            context = (context - f64::from(prompt) - f64::from(answer.max(1)) + 1.0).max(0.0);
            done[number] = true;
            while done.get(in_order) == Some(&true) {
                written += u64::from(requests[in_order].1);
                in_order += 1;
            }
            if max_tokens.is_some_and(|max| written >= max) {
                break;
            }
        }
        (seconds * self.answers_factor.max(0.1), written, in_order)
    }
}

/// Between points as they say, beyond the last as the last two do.
pub(crate) fn line(points: &[(f64, f64)], x: f64) -> f64 {
    let at = points.partition_point(|(p, _)| *p < x);
    match (at.checked_sub(1).and_then(|i| points.get(i)), points.get(at)) {
        (_, Some((p, y))) if *p == x => *y,
        (None, Some((p, y))) => y * x / p.max(1e-12),
        (Some((a, y)), Some((b, z))) => y + (z - y) * (x - a) / (b - a),
        (Some((b, z)), None) => match at.checked_sub(2).map(|i| points[i]) {
            Some((a, y)) => z + ((z - y) / (b - a)).max(0.0) * (x - b),
            None => z * x / b.max(1e-12),
        },
        (None, None) => 0.0,
    }
}

/// A prompt of the run, as it is asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Prompted {
    /// The first question, or the whole row where answers stay.
    pub(crate) ids: Vec<u32>,
    /// Where answers stay: which of them are trained.
    pub(crate) loss_mask: Vec<bool>,
    /// Tokens of all questions, or of the row.
    pub(crate) tokens: u32,
    /// Questions.
    pub(crate) turns: u32,
}

/// Progress of the measurement.
struct Steps<'a> {
    report: &'a dyn Report,
    done: u64,
}

impl Steps<'_> {
    fn next(&mut self, what: &str) {
        self.report.at(self.done);
        self.report.detail(what);
        self.done += 1;
    }
}

impl Run<'_> {
    /// Where the rates for this run are kept: by whatever they depend on.
    fn rates_path(&self) -> Result<PathBuf, Error> {
        let (file, target) = (&self.file, self.target()?);
        let mut hasher = hash::Hasher::default();
        let r = &file.regenerate;
        let settings = format!(
            "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {} {} {} {} {} {} {}",
            file.draft,
            file.train.eagle3,
            file.train.dflash,
            file.train.dspark,
            file.train.p_eagle,
            file.train.products,
            file.capture.layers,
            file.capture.dtype,
            file.validate.depth,
            r.enabled,
            r.batch_size,
            r.max_new_tokens,
            r.temperature,
            r.top_p,
            r.greedy_share,
        );
        let features = target.target.kernels().features();
        for part in [
            &target.sha256,
            &settings,
            &cpu_name(),
            &format!("{} {} {:?}", features.path, target.threads, target.precision),
            &format!("{:?}", self.inputs.files),
        ] {
            hasher.field(part.as_bytes());
        }
        Ok(self.env.places.cache.join("rates").join(format!("{}.json", &hasher.finish()[..32])))
    }

    /// The rates that are kept for this run, however old.
    pub(crate) fn kept_rates(&self) -> Option<Rates> {
        let text = std::fs::read_to_string(self.rates_path().ok()?).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// The rates of this run on this machine, and whether they are kept ones.
    pub(crate) fn rates(&self, prompts: &[Prompted]) -> Result<(Rates, bool), Error> {
        let path = self.rates_path()?;
        let kept = self.kept_rates();
        let mut why = String::new();
        if let Some(kept) = kept {
            match kept.reason(unix_s()) {
                None => return Ok((kept, true)),
                Some(reason) => why = format!(" anew, {reason}"),
            }
        }
        self.env.report.begin(&format!("measuring what stages cost{why}"), Some(5), Unit::Steps);
        let measured = self.measure_rates(prompts);
        self.env.report.end();
        let rates = measured?;
        let text = serde_json::to_string_pretty(&rates).expect("numbers are JSON") + "\n";
        let written =
            atomic::create_dir_all(path.parent().unwrap_or(&path)).and_then(|()| atomic::write(&path, text));
        if let Err(error) = written {
            self.env
                .report
                .note(&format!("measured rates are not kept, the next plan measures again: {error}"));
        }
        Ok((rates, false))
    }

    fn measure_rates(&self, prompts: &[Prompted]) -> Result<Rates, Error> {
        let target = self.target()?;
        let (began, before) = (Instant::now(), busy_times());
        let mut steps = Steps { report: self.env.report, done: 0 };
        let mut rates = Rates {
            version: VERSION,
            draftsmith_version: env!("CARGO_PKG_VERSION").to_string(),
            measured_unix_s: unix_s(),
            load_s: target.load_time.as_secs_f64(),
            pass_bytes: target.target.pass_bytes() as u64,
            proposal_depth: self.file.validate.depth,
            kv_bytes: target.target.kv_bytes_per_token() as u64,
            answers_factor: 1.0,
            ..Rates::default()
        };
        steps.next("passes");
        let alone = with_costs(engine(target, None), self.env.places, target, None, &Silent);
        rates.verify_ms.clone_from(&alone.costs().verify_ms);
        let here = matches!(self.compute, Compute::Cpu);
        let answers_here = self.file.regenerate.enabled && self.file.regenerate.server.is_none() && here;
        let mut rows: Vec<TokenRow> = Vec::new();
        if answers_here {
            let mean = mean(prompts.iter().map(|p| p.ids.len()));
            self.measure_passes(&target.target, mean, &mut rates);
            self.check_stop(Stage::Regenerate)?;
            steps.next("answers");
            rows = self.measure_answers(prompts, &mut rates)?;
        } else {
            rates.prefill_s = rates.pass(32) / 32.0;
            rates.step_s = vec![(1, rates.pass(1))];
        }
        rates.memory[0] = peak_memory_bytes().unwrap_or(0);
        if rows.is_empty() {
            rows = prompts.iter().map(asked_row).filter(|row| row.ids.len() > 1).collect();
        }
        steps.next("hidden states");
        let room = ((CAPTURE_S / rates.prefill_s.max(1e-9)) as usize).clamp(256, CAPTURE_TOKENS);
        let mut taken = 0;
        rows.retain(|row| {
            taken += row.ids.len();
            taken <= room || taken == row.ids.len()
        });
        for (number, row) in rows.iter_mut().enumerate() {
            row.number = number as u64;
        }
        let captured = self.measure_capture(&rows, &mut rates)?;
        rates.memory[1] = peak_memory_bytes().unwrap_or(0);
        self.check_stop(Stage::Capture)?;
        steps.next("training");
        if !captured.is_empty() && here {
            let kernels = target.target.kernels().as_ref().clone();
            let kernels = kernels.with_products(crate::train::products(&self.file));
            self.measure_training(kernels, &captured, &mut rates)?;
        }
        rates.memory[2] = peak_memory_bytes().unwrap_or(0);
        self.check_stop(Stage::Train)?;
        steps.next("");
        rates.others_busy_share = before.zip(busy_times()).and_then(|(a, b)| BusyTimes::others_share(a, b));
        rates.took_s = began.elapsed().as_secs_f64();
        Ok(rates)
    }

    /// Reading prompts, and steps of several sequences, over made-up tokens.
    fn measure_passes(&self, target: &Target<Cpu>, prompt: f64, rates: &mut Rates) {
        let table = &self.file.regenerate;
        let longest = target.config().max_position / 2;
        let context = (prompt + 0.4 * f64::from(table.max_new_tokens)) as usize;
        let context = context.clamp(16, 512).min(longest.max(2));
        let vocab = target.config().vocab_size;
        let tokens = |from: usize, count: usize| -> Vec<u32> {
            (from..from + count).map(|i| ((i * 7919 + 13) % vocab) as u32).collect()
        };
        let began = Instant::now();
        let mut sequences: Vec<TargetKv<Cpu>> = Vec::new();
        while sequences.len() < table.batch_size as usize {
            let mut kv = target.new_kv();
            let ids = tokens(sequences.len(), context);
            let parents = draftsmith_core::TokenTree::chain_parents(context);
            let output =
                target.forward(&mut [StepItem { kv: &mut kv, tokens: &ids, parents: &parents }], &[]);
            target.argmax(&output, &[context as u32 - 1]);
            sequences.push(kv);
            if began.elapsed().as_secs_f64() > PREFILL_S || self.env.stop.requested() {
                break;
            }
        }
        rates.prefill_s = began.elapsed().as_secs_f64() / (sequences.len() * context) as f64;
        rates.step_context = context as f64;
        let all = sequences.len();
        let mut time = |count: usize, behind: usize| -> f64 {
            let (rounds, settle) = (5, 2);
            let mut times = Vec::new();
            for round in 0..rounds + settle {
                let ids: Vec<[u32; 1]> = tokens(round, count).into_iter().map(|id| [id]).collect();
                let mut items: Vec<StepItem<'_, Cpu>> = sequences[..count]
                    .iter_mut()
                    .zip(&ids)
                    .map(|(kv, ids)| {
                        kv.rollback_to(behind);
                        StepItem { kv, tokens: ids, parents: &[None] }
                    })
                    .collect();
                let began = Instant::now();
                let output = target.forward(&mut items, &[]);
                target.argmax(&output, &(0..count as u32).collect::<Vec<_>>());
                if round >= settle {
                    times.push(began.elapsed().as_secs_f64());
                }
            }
            draftsmith_bench::stats::median(&times).unwrap_or(0.0)
        };
        let mut sizes = vec![1, all.div_ceil(4), all.div_ceil(2), all];
        sizes.dedup();
        // Sequences only grow shorter: the far context comes first.
        rates.step_s = sizes.iter().map(|count| (*count, time(*count, context))).collect();
        let near = context / 4;
        let far_s = rates.step_s.last().map_or(0.0, |(_, s)| *s);
        let near_s = time(all, near);
        rates.context_s = ((far_s - near_s) / ((context - near).max(1) * all) as f64).max(0.0);
    }

    /// Answers a few prompts as the run would; gives them as rows.
    fn measure_answers(&self, prompts: &[Prompted], rates: &mut Rates) -> Result<Vec<TokenRow>, Error> {
        let (target, table) = (self.target()?, &self.file.regenerate);
        let count = (table.batch_size as usize).min(prompts.len());
        let step = rates.step(count.max(1), rates.step_context).max(1e-9);
        let limit = ((ANSWERS_S / step) as u32).max(16).min(table.max_new_tokens);
        let room = target.target.config().max_position;
        let engine = engine(target, None);
        let stop_ids = target.stop_ids();
        let mut asked = prompts.iter().take(count).enumerate().filter(|(_, p)| p.ids.len() + 8 < room);
        let mut next = || {
            let (number, prompt) = asked.next()?;
            let greedy = (number as f64 * 0.618_033_988_75).fract() < table.greedy_share;
            let sampling = match greedy || table.temperature <= 0.0 {
                true => Sampling::GREEDY,
                false => Sampling {
                    temperature: table.temperature as f32,
                    top_p: table.top_p as f32,
                    seed: number as u64,
                    ..Sampling::GREEDY
                },
            };
            let options = GenerateOptions {
                max_new_tokens: (limit as usize).min(room - prompt.ids.len() - 1),
                sampling,
                stop_ids: stop_ids.clone(),
                ..GenerateOptions::default()
            };
            Some((number, prompt.ids.clone(), options))
        };
        let (mut rows, mut answers) = (Vec::new(), Vec::new());
        let began = Instant::now();
        let batch = BatchOptions { batch_size: count.max(1) };
        engine.generate_batch(batch, &mut next, &mut |number, done| {
            let prompt = &prompts[number].ids;
            let cut = done.finish_reason == FinishReason::Length && limit < table.max_new_tokens;
            answers.push(TrialAnswer {
                prompt: prompt.len() as u32,
                tokens: done.token_ids.len() as u32,
                cut,
                looping: ends_in_loop(&done.token_ids),
            });
            let mut ids = prompt.clone();
            ids.extend(&done.token_ids);
            ids.truncate(self.file.data.max_length as usize);
            let loss_mask = (0..ids.len()).map(|at| at >= prompt.len()).collect();
            rows.push(TokenRow { number: 0, ids, loss_mask });
            self.env.stop.flow()
        })?;
        let took = began.elapsed().as_secs_f64();
        self.check_stop(Stage::Regenerate)?;
        let requests: Vec<(u32, u32)> = answers.iter().map(|a| (a.prompt, a.tokens)).collect();
        let said = rates.batch_seconds(&requests, count.max(1), None).0;
        rates.answers_factor = (took / said.max(1e-9)).clamp(0.5, 2.0);
        rates.answers = answers;
        rows.retain(|row| row.loss_mask.iter().any(|trained| *trained) && row.ids.len() > 1);
        Ok(rows)
    }

    /// Captures rows and stores them in a folder that is removed again; gives them as training reads them.
    fn measure_capture(&self, rows: &[TokenRow], rates: &mut Rates) -> Result<Vec<CaptureRow>, Error> {
        if rows.is_empty() || self.file.capture.server.is_some() {
            return Ok(Vec::new());
        }
        let cache = &self.env.places.cache;
        atomic::create_dir_all(cache)?;
        let folder = tempfile::tempdir_in(cache).map_err(|e| Error::unreadable(cache, e))?;
        let spec = self.cache_spec_of(String::new(), rows.len() as u64)?;
        let mut source = self.capture_source(&Silent)?;
        // The first pass over the weights is slower.
        let mut first = rows.first().cloned();
        source.capture_rows(&mut || first.take(), &mut |_| ControlFlow::Continue(()))?;
        let began = Instant::now();
        let mut writer = CacheWriter::open(folder.path().join("states"), &spec)?;
        let (mut waiting, mut captured, mut failed) = (rows.iter().cloned(), Vec::new(), None);
        source.capture_rows(&mut || waiting.next(), &mut |row| {
            if let Err(error) = writer.push(&row) {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            captured.push(row);
            self.env.stop.flow()
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        self.check_stop(Stage::Capture)?;
        let tokens: usize = captured.iter().map(CaptureRow::len).sum();
        let bytes = writer.bytes_written();
        writer.finish()?;
        rates.capture_s = began.elapsed().as_secs_f64() / tokens.max(1) as f64;
        // Counted when a shard is closed, and the last one is closed at the end.
        let stored = super::aside::bytes_below(&folder.path().join("states")).max(bytes);
        rates.capture_bytes = stored as f64 / tokens.max(1) as f64;
        let began = Instant::now();
        let file = folder.path().join("written");
        let noise: Vec<u8> = (0..DISK_BYTES / 8)
            .flat_map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        atomic::write(&file, &noise)?;
        sha256_file(&file)?;
        rates.disk_s = began.elapsed().as_secs_f64() / DISK_BYTES as f64;
        Ok(captured)
    }

    /// A few steps of the run's own method over captured rows.
    fn measure_training<K: TrainKernels>(
        &self,
        kernels: K,
        rows: &[CaptureRow],
        rates: &mut Rates,
    ) -> Result<(), Error> {
        let target = self.target()?;
        let mut counts = TokenCounts::new(target.target.config().vocab_size);
        rows.iter().for_each(|row| counts.add(&row.ids, &row.loss_mask));
        let began = Instant::now();
        let (vocab_map, coverage) = self.vocab_map_of(&counts)?;
        // A sample of a few thousand tokens is in any vocabulary that is larger: then it says nothing.
        rates.coverage = coverage.filter(|_| counts.distinct() > vocab_map.draft_vocab());
        let mut method = self.method(kernels, vocab_map)?;
        rates.train_setup_s = began.elapsed().as_secs_f64();
        let options = TrainOptions::from_run(&self.file, PathBuf::new(), String::new());
        let mut optimizer = AdamW::new(options.adamw, method.tape());
        rates.parameters =
            method.tape().trained().into_iter().map(|id| method.tape().param(id).numel() as u64).sum();
        let (features, last) = (method.feature_width(), method.last_width());
        let pack = |from: u64| -> Result<Pack, Error> {
            let mut pack = Pack::default();
            for (number, row) in (from..).zip(rows.iter().cycle().take(4 * options.pack_slots)) {
                let left = options.pack_slots.saturating_sub(pack.len());
                if left < 2 || (!pack.is_empty() && row.len() > left) {
                    break;
                }
                pack.push(number, row, options.pack_slots, features, last)?;
            }
            Ok(pack)
        };
        let (mut spent, mut times) = (0.0, [Vec::new(), Vec::new(), Vec::new()]);
        let mut round = 0;
        // The first round makes room and is not counted.
        while round < 2 || (round < 5 && spent < TRAIN_S) {
            let pack = pack(1 + round * 1_000_000)?;
            let slots = pack.len().max(1) as f64;
            let mut weight = 1.0;
            for times in &mut times[..2] {
                let began = Instant::now();
                weight = method.micro_batch(&pack, Mode::Train)?.weight;
                let took = began.elapsed().as_secs_f64();
                spent += took;
                if round > 0 {
                    times.push(took / slots);
                }
            }
            let began = Instant::now();
            optimizer.step(method.tape_mut(), 1e-6, if weight > 0.0 { weight } else { 1.0 })?;
            let took = began.elapsed().as_secs_f64();
            spent += took;
            if round > 0 {
                times[2].push(took);
            }
            self.check_stop(Stage::Train)?;
            round += 1;
        }
        let median = |times: &[f64]| draftsmith_bench::stats::median(times).unwrap_or(0.0);
        rates.slot_s = [median(&times[0]), median(&times[1])];
        rates.update_s = median(&times[2]);
        rates.proposal_bytes = self.proposal_bytes()?;
        Ok(())
    }
}

/// A row of the run's own prompts where no answers are written here.
fn asked_row(prompt: &Prompted) -> TokenRow {
    let loss_mask = match prompt.loss_mask.len() == prompt.ids.len() {
        true => prompt.loss_mask.clone(),
        false => vec![true; prompt.ids.len()],
    };
    TokenRow { number: 0, ids: prompt.ids.clone(), loss_mask }
}

pub(crate) fn mean(values: impl Iterator<Item = usize>) -> f64 {
    let (sum, count) = values.fold((0, 0usize), |(sum, count), v| (sum + v, count + 1));
    if count == 0 { 0.0 } else { sum as f64 / count as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_through_their_points_and_on() {
        let points = [(1.0, 3.0), (8.0, 10.0), (32.0, 22.0)];
        for (x, y) in [(1.0, 3.0), (4.5, 6.5), (8.0, 10.0), (20.0, 16.0), (64.0, 38.0)] {
            assert!((line(&points, x) - y).abs() < 1e-9, "{x}");
        }
        assert_eq!(line(&[(4.0, 2.0)], 8.0), 4.0);
        assert_eq!(line(&[], 8.0), 0.0);
    }

    #[test]
    fn places_of_a_batch_are_taken_by_the_next_answer() {
        // A step of a sequence takes 10 ms, each further one 1 ms; a prompt token 1 ms.
        let rates = Rates {
            prefill_s: 1e-3,
            step_s: vec![(1, 0.010), (32, 0.041)],
            answers_factor: 1.0,
            ..Rates::default()
        };
        // One after the other: 100 ms of prompt, nine steps of 10 ms each.
        let (seconds, written, answers) = rates.batch_seconds(&[(100, 10), (100, 10)], 1, None);
        assert!((seconds - 2.0 * (0.1 + 0.09)).abs() < 1e-9 && written == 20 && answers == 2, "{seconds}");
        // Side by side: steps of 11 ms.
        let (seconds, ..) = rates.batch_seconds(&[(100, 10), (100, 10)], 2, None);
        assert!((seconds - (0.2 + 0.099)).abs() < 1e-9, "{seconds}");
        // The short one's place is taken: two at a time for 5, 5 and 5 steps, none alone but the last.
        let (seconds, ..) = rates.batch_seconds(&[(0, 11), (0, 6), (0, 6)], 2, None);
        assert!((seconds - 10.0 * 0.011).abs() < 1e-9, "{seconds}");
        // Enough is enough, counted in order.
        let (_, written, answers) = rates.batch_seconds(&[(0, 10); 8], 2, Some(35));
        assert!(written >= 35 && answers < 8, "{written} {answers}");
        assert_eq!(rates.batch_seconds(&[], 4, None), (0.0, 0, 0));
    }

    #[test]
    fn rates_of_a_busy_machine_another_version_or_long_ago_are_measured_anew() {
        let good = Rates {
            version: VERSION,
            draftsmith_version: env!("CARGO_PKG_VERSION").to_string(),
            measured_unix_s: 1_800_000_000,
            others_busy_share: Some(0.02),
            ..Rates::default()
        };
        let now = 1_800_000_000 + NEW_S;
        assert_eq!(good.reason(now), None);
        assert_eq!(good.doubt(), None);
        let busy = Rates { others_busy_share: Some(0.4), ..good.clone() };
        assert!(busy.reason(now).is_some_and(|why| why.contains("40 %")));
        assert!(busy.doubt().is_some_and(|doubt| doubt.contains("40 %")));
        assert!(Rates { version: 0, ..good.clone() }.reason(now).is_some());
        assert!(good.reason(now + OLD).is_some());
    }
}
