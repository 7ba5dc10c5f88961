//! Training as a whole: gradients by finite differences, learning, packing, and resume bit for bit.

use std::path::Path;

use draftsmith_formats::cache::CaptureRow;
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_kernels::Cpu;
use draftsmith_kernels::train::SoftLoss;
use draftsmith_model::eagle3::Feedback;
use draftsmith_model::{DraftConfig, read_draft};
use draftsmith_train::eagle3::{TargetStart, random_weights, warm_weights};
use draftsmith_train::ranks::threads;
use draftsmith_train::{
    AdamWOptions, Alone, Collective, DraftWeights, Eagle3Options, Event, Flow, Hooks, LossDivisor,
    LrSchedule, Method, Mode, Outcome, Pack, Ranks, ReplayOptions, RowStore, Slices, SumTree, TrainError,
    TrainOptions, TrainState, ValidationResult, train,
};

use crate::infer::Random;

pub(crate) struct Memory(pub(crate) Vec<CaptureRow>);

impl RowStore for Memory {
    fn num_rows(&self) -> usize {
        self.0.len()
    }
    fn row_slots(&self, row: usize) -> usize {
        self.0[row].ids.len()
    }
    fn read(&mut self, rows: &[usize]) -> Result<Vec<CaptureRow>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(rows.iter().map(|r| self.0[*r].clone()).collect())
    }
}

#[test]
fn gradients_equal_difference_quotients_of_the_whole_loss() {
    let losses = [SoftLoss::Kl, SoftLoss::LkAlpha, SoftLoss::LkLambda { kl_scale: 1.0, kl_decay: 0.0 }];
    for (i, loss) in losses.into_iter().enumerate() {
        let mut random = Random::new(7 + i as u64, &[17, 9]);
        random.config.feedback = if i == 1 { Feedback::PostNorm } else { Feedback::PreNorm };
        let options = Eagle3Options { ttt_length: 4, step_decay: 0.8, loss, divisor: LossDivisor::AllSlots };
        let mut method = random.method(2, options);
        let pack = random.pack();
        method.micro_batch(&pack, Mode::Train).unwrap();
        for id in method.tape().trained() {
            let name = method.tape().param(id).name.clone();
            let (at, grad) = (method.tape().param_values(id), method.tape().grad_values(id).unwrap());
            // Along the gradient itself the quotient is its norm; single precision leaves about four digits.
            let norm = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let h = 3e-3;
            let mut loss_at = |sign: f64| {
                let moved: Vec<f32> =
                    at.iter().zip(&grad).map(|(w, g)| w + (sign * h * f64::from(*g) / norm) as f32).collect();
                method.tape_mut().set_param(id, &moved);
                method.micro_batch(&pack, Mode::Evaluate).unwrap().loss
            };
            let quotient = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * h);
            method.tape_mut().set_param(id, &at);
            assert!(norm > 1e-6, "{name} has a gradient");
            // `α` is a sum of minima: a few of them switch sides within the difference.
            let tolerance = if loss == SoftLoss::Kl { 3e-3 } else { 2e-2 };
            assert!(
                (quotient - norm).abs() <= tolerance * norm,
                "{name}: gradient {norm}, quotient {quotient}"
            );
        }
    }
}

fn stats_and_grads(random: &Random, packs: &[Pack], threads: usize) -> (f64, f64, Vec<Vec<f32>>) {
    let options = Eagle3Options { ttt_length: 3, ..Eagle3Options::default() };
    let mut method = random.method(threads, options);
    let (mut loss, mut weight) = (0.0, 0.0);
    for pack in packs {
        let stats = method.micro_batch(pack, Mode::Train).unwrap();
        loss += stats.loss;
        weight += stats.weight;
    }
    let tape = method.tape();
    (loss, weight, tape.trained().into_iter().map(|id| tape.grad_values(id).unwrap()).collect())
}

#[test]
fn packed_rows_train_as_rows_alone_do() {
    let random = Random::new(3, &[12, 5, 20]);
    let together = stats_and_grads(&random, &[random.pack()], 2);
    let widths = (random.config.features_width(), random.config.target_hidden_size);
    let alone: Vec<Pack> = random
        .rows
        .iter()
        .enumerate()
        .map(|(i, row)| {
            let mut pack = Pack::default();
            pack.push(i as u64, row, 100, widths.0, widths.1).unwrap();
            pack
        })
        .collect();
    let apart = stats_and_grads(&random, &alone, 2);
    assert!((together.0 - apart.0).abs() < 1e-5 * together.0, "{} {}", together.0, apart.0);
    assert_eq!(together.1, apart.1);
    for (a, b) in together.2.iter().flatten().zip(apart.2.iter().flatten()) {
        assert!((a - b).abs() < 1e-3, "{a} {b}");
    }
}

#[test]
fn gradients_do_not_depend_on_the_thread_count() {
    let random = Random::new(4, &[70, 33]);
    let one = stats_and_grads(&random, &[random.pack()], 1);
    assert!(one == stats_and_grads(&random, &[random.pack()], 2));
    assert!(one == stats_and_grads(&random, &[random.pack()], 3));
}

pub(crate) fn options(dir: &Path) -> TrainOptions {
    TrainOptions {
        dir: dir.to_owned(),
        run_hash: "abc".into(),
        lr: 3e-3,
        warmup_ratio: 0.1,
        schedule: LrSchedule::Cosine,
        adamw: AdamWOptions::default(),
        epochs: 4,
        max_steps: None,
        tokens_per_step: 64,
        pack_slots: 32,
        log_every: 1,
        checkpoint_every: 3,
        keep_checkpoints: 2,
        validate_every: Some(5),
        average_best: 3,
        seed: 11,
        replay: None,
        shard_optimizer: false,
    }
}

/// Trains until the end, or stops after `stop` steps of this process.
fn run(random: &Random, options: &TrainOptions, stop: Option<u64>) -> (Outcome, Vec<Event>) {
    run_as(&Alone, random, options, stop)
}

fn run_as(
    collective: &dyn Collective,
    random: &Random,
    options: &TrainOptions,
    stop: Option<u64>,
) -> (Outcome, Vec<Event>) {
    let unroll = Eagle3Options { ttt_length: 3, ..Eagle3Options::default() };
    let mut method = random.method(2, unroll);
    let mut events = Vec::new();
    let mut on_event = |event: &Event| {
        events.push(event.clone());
        let steps = events.iter().filter(|e| matches!(e, Event::Step(_))).count() as u64;
        if stop == Some(steps) { Flow::Stop } else { Flow::Continue }
    };
    // A stand-in for decoding: best in the middle of the run.
    let mut measure = |_: &DraftWeights, step: u64| {
        let accept_len = 3.0 - (step as f64 - 10.0).abs() / 10.0;
        Ok(ValidationResult { accept_len, low: 1.0, high: 3.0, verify_steps: 10, committed_tokens: 20 })
    };
    let hooks = Hooks { on_event: &mut on_event, validate: Some(&mut measure), collective };
    let outcome = train(&mut method, &mut Memory(random.rows.clone()), options, hooks).unwrap();
    (outcome, events)
}

/// The same run by several processes, here threads: what each has at the end.
fn run_on(ranks: usize, random: &Random, options: &TrainOptions, stop: Option<u64>) -> Vec<Outcome> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = threads::links(ranks)
            .into_iter()
            .map(|link| scope.spawn(move || run_as(&Ranks::new(link), random, options, stop).0))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn data() -> Random {
    Random::new(8, &(0..24).map(|i| 6 + i * 5 % 23).collect::<Vec<_>>())
}

fn steps(events: &[Event]) -> Vec<(u64, f64, f64)> {
    let of = |e: &Event| match e {
        Event::Step(r) => Some((r.step, r.loss.expect("every step trains"), r.grad_norm)),
        Event::Started { .. } | Event::Checkpoint { .. } | Event::Validated { .. } => None,
    };
    events.iter().filter_map(of).collect()
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    let plain = check_resume(None);
    let replay = ReplayOptions { share: 0.3, tokens: 40, every: 2, buffer: 7 };
    let replayed = check_resume(Some(replay));
    assert_ne!(plain, replayed, "what is replayed changes the draft");
    // Looks alone change nothing: before the first of them there is nothing to replay.
    let never = ReplayOptions { every: 1000, ..replay };
    assert!(plain == check_resume(Some(never)));
}

/// Returns the weights.
#[track_caller]
fn check_resume(replay: Option<ReplayOptions>) -> Vec<u8> {
    let random = data();
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let options = |dir: &Path| TrainOptions { replay, ..options(dir) };
    let (outcome, events) = run(&random, &options(whole.path()), None);
    assert!(outcome.finished);
    let all = steps(&events);
    assert!(all.len() > 12, "{} steps", all.len());
    let mut seen = Vec::new();
    for stop in [Some(4), Some(1), Some(3), None] {
        let (part, events) = run(&random, &options(broken.path()), stop);
        assert_eq!(part.finished, stop.is_none());
        seen.extend(steps(&events));
        if stop == Some(1) {
            // A kill leaves the newest checkpoint behind: steps after it are done again.
            let folder = broken.path().join("checkpoints/step-00000005");
            std::fs::remove_dir_all(folder).unwrap();
            seen.pop();
        }
    }
    assert_eq!(seen, all);
    for file in ["last/model.safetensors", "best/model.safetensors", "last/config.json"] {
        let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
        assert!(read(whole.path()) == read(broken.path()), "{file}");
    }
    let state = |dir: &Path| {
        let newest = format!("checkpoints/step-{:08}", outcome.state.step);
        (
            std::fs::read(dir.join(&newest).join("tensors.safetensors")).unwrap(),
            std::fs::read_to_string(dir.join(&newest).join("state.json")).unwrap(),
        )
    };
    assert!(state(whole.path()) == state(broken.path()), "checkpoint after the last step");
    let lines = |dir: &Path| {
        let text = std::fs::read_to_string(dir.join("log.jsonl")).unwrap();
        text.lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(lines(whole.path()), lines(broken.path()));
    let replayed = events.iter().filter_map(|e| match e {
        Event::Step(step) => step.replay.as_ref(),
        Event::Started { .. } | Event::Checkpoint { .. } | Event::Validated { .. } => None,
    });
    let positions: u64 = replayed.map(|r| r.positions).sum();
    assert_eq!(positions > 20, replay.is_some_and(|r| r.every == 2), "{positions} positions");
    std::fs::read(whole.path().join("last/model.safetensors")).unwrap()
}

#[test]
fn training_learns_and_keeps_the_best_measured_draft() {
    let random = data();
    let dir = tempfile::tempdir().unwrap();
    let (outcome, events) = run(&random, &TrainOptions { epochs: 12, ..options(dir.path()) }, None);
    let losses = steps(&events);
    let mean = |part: &[(u64, f64, f64)]| part.iter().map(|s| s.1).sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..4]), mean(&losses[losses.len() - 4..]));
    assert!(last < 0.8 * first, "loss {first} to {last}");
    let best = outcome.state.best.unwrap();
    assert_eq!(best.step, 10);
    assert_eq!(outcome.draft.as_deref(), Some(dir.path().join("best").as_path()));
    let kept: Vec<_> = std::fs::read_dir(dir.path().join("checkpoints")).unwrap().collect();
    assert_eq!(kept.len(), 2);

    // What was saved is a draft that decoding reads.
    let (config, tensors, vocab_map) = read_draft(&dir.path().join("best")).unwrap();
    assert_eq!(config, DraftConfig::Eagle3(random.config.clone()));
    assert_eq!(vocab_map, Some(random.vocab_map.clone()));
    assert_eq!(tensors.len(), 13);
    let file = SafetensorsDir::open(dir.path().join("best")).unwrap();
    assert!(file.find("embed_tokens.weight").is_none());
}

#[test]
fn the_mean_of_the_best_drafts_wins_if_it_is_measured_better() {
    let random = data();
    // What the mean of two, and of three, is found to be worth; a draft alone at most 3.
    for (means, winner) in [([3.5, 2.0], vec![10, 5]), ([3.5, 4.0], vec![10, 5, 15]), ([1.0, 1.0], vec![])] {
        let dir = tempfile::tempdir().unwrap();
        let mut method = random.method(2, Eagle3Options { ttt_length: 2, ..Eagle3Options::default() });
        let mut seen: Vec<(u64, f64, DraftWeights)> = Vec::new();
        let mut measure = |draft: &DraftWeights, step: u64| {
            let again = seen.iter().filter(|s| s.0 == step).count();
            let accept_len =
                if again == 0 { 3.0 - (step as f64 - 9.0).abs() / 10.0 } else { means[again - 1] };
            seen.push((step, accept_len, draft.clone()));
            Ok(ValidationResult { accept_len, low: 1.0, high: 3.0, verify_steps: 10, committed_tokens: 20 })
        };
        let hooks =
            Hooks { on_event: &mut |_| Flow::Continue, validate: Some(&mut measure), collective: &Alone };
        let options = TrainOptions { max_steps: Some(20), ..options(dir.path()) };
        let outcome = train(&mut method, &mut Memory(random.rows.clone()), &options, hooks).unwrap();
        let best = outcome.state.best.unwrap();
        assert_eq!(best.mean_of, winner);
        assert_eq!(best.step, if winner.is_empty() { 10 } else { 20 });
        assert_eq!(outcome.state.candidates.iter().map(|b| b.step).collect::<Vec<_>>(), [10, 5, 15]);
        let kept = std::fs::read_dir(dir.path().join("candidates")).unwrap().count();
        assert_eq!(kept, 3);
        let of = if winner.is_empty() { vec![10] } else { winner };
        let drafts: Vec<&DraftWeights> =
            of.iter().map(|step| &seen.iter().find(|s| s.0 == *step).unwrap().2).collect();
        let (_, saved, _) = read_draft(&dir.path().join("best")).unwrap();
        for tensor in &drafts[0].tensors {
            let values = &saved[&tensor.name].1;
            for (i, value) in values.iter().enumerate() {
                let mean = drafts.iter().map(|d| d.find(&tensor.name).unwrap().values[i]).sum::<f32>();
                let mean = mean / drafts.len() as f32;
                // Half a unit of bfloat16.
                assert!((value - mean).abs() <= mean.abs() / 200.0 + 1e-9, "{}: {value} {mean}", tensor.name);
            }
        }
    }
}

/// The last checkpoint, the last draft and the best.
fn tensors(dir: &Path, state: &TrainState) -> [Vec<u8>; 3] {
    let step = dir.join(format!("checkpoints/step-{:08}/tensors.safetensors", state.step));
    [step, dir.join("last/model.safetensors"), dir.join("best/model.safetensors")]
        .map(|path| std::fs::read(path).unwrap())
}

/// A log without times and ranks. What looks found since the line before is forgotten where a run stops: then without looks.
fn log_lines(dir: &Path, with_looks: bool) -> Vec<serde_json::Value> {
    let log = std::fs::read_to_string(dir.join("log.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["tokens_per_s"] = serde_json::Value::Null;
        line.as_object_mut().unwrap().remove("ranks");
        if line["replay"].is_object() {
            let looks = ["sim_accept_len", "rejected"];
            for key in ["seconds"].iter().chain(looks.iter().filter(|_| !with_looks)) {
                line["replay"][*key] = serde_json::Value::Null;
            }
        }
        line
    };
    log.lines().map(line).collect()
}

#[test]
fn any_number_of_ranks_gives_the_same_bits_and_resumes_what_another_number_began() {
    let random = data();
    let replay = ReplayOptions { share: 0.4, tokens: 48, every: 2, buffer: 6 };
    for (packs, replay) in [(1, None), (2, Some(replay)), (4, None), (5, Some(replay))] {
        let options =
            |dir: &Path| TrainOptions { tokens_per_step: 32 * packs, epochs: 3, replay, ..options(dir) };
        let whole = tempfile::tempdir().unwrap();
        let (alone, _) = run(&random, &options(whole.path()), None);
        assert!(alone.finished);
        let wanted = tensors(whole.path(), &alone.state);
        for ranks in 1..=4 {
            let dir = tempfile::tempdir().unwrap();
            let outcomes = run_on(ranks, &random, &options(dir.path()), None);
            for outcome in &outcomes {
                assert_eq!(outcome.state, alone.state, "{packs} micro-batches over {ranks}");
                assert_eq!(outcome.finished, alone.finished);
            }
            assert!(tensors(dir.path(), &alone.state) == wanted, "{packs} micro-batches over {ranks}");
            assert_eq!(log_lines(dir.path(), true), log_lines(whole.path(), true));
            // Begun by so many, and gone on with by others; never stopped where a validation is due, which a stop leaves out.
            let dir = tempfile::tempdir().unwrap();
            for (more, stop) in [(ranks, Some(3)), (5 - ranks, Some(1)), (1, Some(2)), (ranks, None)] {
                run_on(more, &random, &options(dir.path()), stop);
            }
            assert!(tensors(dir.path(), &alone.state) == wanted, "{packs} micro-batches, {ranks} in turns");
            assert_eq!(log_lines(dir.path(), false), log_lines(whole.path(), false));
        }
    }
}

/// Bytes of gradients and parameters that rank 0 sends in a step, by parameter.
fn sent_in_a_step(random: &Random, ranks: usize, micro_batches: usize) -> u64 {
    let first = Ranks::new(threads::links(ranks).remove(0));
    let (slices, sums) =
        (Slices::among::<Cpu>(&first), SumTree::new(micro_batches, ranks).pieces_of(0).count());
    let method = random.method(1, Eagle3Options::default());
    let lens = method.tape().trained().into_iter().map(|id| method.tape().param(id).numel());
    let of = |(place, len): (usize, usize)| {
        let own = slices.mine(place, len).len();
        4 * (sums * (len - own) + (ranks - 1) * own) as u64
    };
    lens.enumerate().map(of).sum()
}

#[test]
fn ranks_that_share_the_moments_give_the_same_bits_and_resume_each_other() {
    let mut random = data();
    // Wide enough that matrices are cut between ranks, within and across rows.
    random.config.intermediate_size = 900;
    random.weights = random_weights(&random.config, 8);
    let replay = ReplayOptions { share: 0.4, tokens: 48, every: 2, buffer: 6 };
    for (packs, replay) in [(4, None), (3, Some(replay))] {
        let options = |dir: &Path, shard_optimizer| TrainOptions {
            tokens_per_step: 32 * packs,
            epochs: 3,
            replay,
            shard_optimizer,
            ..options(dir)
        };
        let whole = tempfile::tempdir().unwrap();
        let (alone, _) = run(&random, &options(whole.path(), false), None);
        assert!(alone.finished && alone.state.step > 8, "{} steps", alone.state.step);
        let wanted = tensors(whole.path(), &alone.state);
        for ranks in 1..=4 {
            let dir = tempfile::tempdir().unwrap();
            for outcome in run_on(ranks, &random, &options(dir.path(), true), None) {
                assert_eq!(outcome.state, alone.state, "{packs} micro-batches over {ranks}");
            }
            assert!(tensors(dir.path(), &alone.state) == wanted, "{packs} micro-batches over {ranks}");
            assert_eq!(log_lines(dir.path(), true), log_lines(whole.path(), true));
            let log = std::fs::read_to_string(dir.path().join("log.jsonl")).unwrap();
            let first: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
            let sent = (ranks > 1).then(|| sent_in_a_step(&random, ranks, packs));
            assert_eq!(first["ranks"]["sent_bytes"].as_u64(), sent, "{packs} micro-batches over {ranks}");
        }
        let dir = tempfile::tempdir().unwrap();
        let turns = [(4, true, Some(3)), (1, false, Some(1)), (2, true, Some(2)), (3, false, Some(1))];
        for (ranks, shard, stop) in turns.into_iter().chain([(1, true, Some(1)), (3, true, None)]) {
            run_on(ranks, &random, &options(dir.path(), shard), stop);
        }
        assert!(tensors(dir.path(), &alone.state) == wanted, "{packs} micro-batches in turns");
        assert_eq!(log_lines(dir.path(), false), log_lines(whole.path(), false));
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let random = data();
    let dir = tempfile::tempdir().unwrap();
    run(&random, &options(dir.path()), Some(3));
    let mut method = random.method(1, Eagle3Options::default());
    let other = TrainOptions { run_hash: "other".into(), ..options(dir.path()) };
    let hooks = Hooks { on_event: &mut |_| Flow::Continue, validate: None, collective: &Alone };
    let error = train(&mut method, &mut Memory(random.rows.clone()), &other, hooks).unwrap_err();
    assert!(matches!(error, TrainError::OtherRun { .. }), "{error}");
    // Two numbers exchanged: a readable file of the right size, with other weights.
    let tensors = dir.path().join("checkpoints/step-00000003/tensors.safetensors");
    let mut bytes = std::fs::read(&tensors).unwrap();
    let end = bytes.len();
    let other = (1..).find(|i| bytes[end - 4 * i - 4..end - 4 * i] != bytes[end - 4..]).unwrap();
    for i in 0..4 {
        bytes.swap(end - 4 + i, end - 4 * other - 4 + i);
    }
    std::fs::write(&tensors, bytes).unwrap();
    let hooks = Hooks { on_event: &mut |_| Flow::Continue, validate: None, collective: &Alone };
    let error =
        train(&mut method, &mut Memory(random.rows.clone()), &options(dir.path()), hooks).unwrap_err();
    assert!(error.to_string().contains("`tensors.safetensors` has hash"), "{error}");
    assert!(error.hint().is_some());
    std::fs::write(dir.path().join("checkpoints/step-00000003/state.json"), "{").unwrap();
    let hooks = Hooks { on_event: &mut |_| Flow::Continue, validate: None, collective: &Alone };
    let error =
        train(&mut method, &mut Memory(random.rows.clone()), &options(dir.path()), hooks).unwrap_err();
    assert!(matches!(error, TrainError::BadCheckpoint { .. }), "{error}");
}

#[test]
fn rows_that_do_not_fit_the_draft_are_refused() {
    let mut random = data();
    random.rows[0].ids[2] = 90;
    let mut method = random.method(1, Eagle3Options::default());
    let error = method.micro_batch(&random.pack(), Mode::Train).unwrap_err();
    assert!(matches!(error, TrainError::TokenId { row: 0, id: 90, vocab: 90 }), "{error}");
}

#[test]
fn a_row_without_trained_slots_has_no_gradient() {
    let mut random = Random::new(2, &[6]);
    random.rows[0].loss_mask.fill(false);
    let mut method = random.method(1, Eagle3Options::default());
    let stats = method.micro_batch(&random.pack(), Mode::Train).unwrap();
    assert_eq!((stats.loss, stats.weight), (0.0, 0.0));
    assert_eq!(method.tape().grad_norm(), 0.0);
}

#[test]
fn a_warm_start_is_the_last_layer_of_the_target() {
    let mut random = Random::new(2, &[6]);
    random.config.target_hidden_size = random.config.hidden_size;
    let c = random.config.clone();
    let (h, i) = (c.hidden_size, c.intermediate_size);
    let mut rng = draftsmith_train::Rng::new(1, &[]);
    let mut part = |name, len| (name, rng.normal(len, 1.0));
    let layer = [
        part("self_attn.q_proj.weight", c.q_width() * h),
        part("self_attn.k_proj.weight", c.kv_width() * h),
        part("self_attn.v_proj.weight", c.kv_width() * h),
        part("self_attn.o_proj.weight", h * c.q_width()),
        part("mlp.gate_proj.weight", i * h),
        part("mlp.up_proj.weight", i * h),
        part("mlp.down_proj.weight", h * i),
        part("input_layernorm.weight", h),
        part("post_attention_layernorm.weight", h),
    ];
    let (_, head) = part("head", c.vocab_size * h);
    let (_, final_norm) = part("norm", h);
    let views = |from: usize| layer[from..].iter().map(|(n, v)| (*n, v.as_slice())).collect::<Vec<_>>();
    let start = TargetStart { layer: views(0), final_norm: &final_norm, head: &head };
    let weights = warm_weights(&c, &random.vocab_map, &start, 5).unwrap();
    let find = |name: &str| &weights.iter().find(|t| t.name == name).unwrap().values;
    assert_eq!(find("midlayer.mlp.down_proj.weight"), &layer[6].1);
    assert_eq!(find("midlayer.hidden_norm.weight"), &layer[7].1);
    assert_eq!(find("midlayer.self_attn.k_proj.weight")[h..2 * h], layer[1].1[..h]);
    assert!(find("midlayer.self_attn.k_proj.weight")[..h].iter().all(|x| x.abs() < 0.1));
    assert_eq!(find("norm.weight"), &final_norm);
    assert_eq!(find("lm_head.weight")[h..2 * h], head[5 * h..6 * h], "draft id 1 is target id 5");
    let fc = find("fc.weight");
    assert!((fc[2 * h] - 1.0).abs() < 0.1 && fc[0].abs() < 0.1 && fc[2 * h + 1].abs() < 0.1);
    let without = TargetStart { layer: views(1), ..start };
    let weights = warm_weights(&c, &random.vocab_map, &without, 5).unwrap();
    let q = &weights.iter().find(|t| t.name == "midlayer.self_attn.q_proj.weight").unwrap().values;
    assert_ne!(q[h..2 * h], layer[0].1[..h], "what the target does not offer starts at random");
    let short = TargetStart { final_norm: &final_norm[1..], ..without };
    let error = warm_weights(&c, &random.vocab_map, &short, 5).unwrap_err();
    assert!(matches!(error, TrainError::Start { .. }), "{error}");
}

#[test]
fn buffers_of_a_larger_pack_do_not_leak_into_a_smaller_one() {
    let random = Random::new(6, &[40, 9]);
    let widths = (random.config.features_width(), random.config.target_hidden_size);
    let mut small = Pack::default();
    small.push(1, &random.rows[1], 100, widths.0, widths.1).unwrap();
    let fresh = stats_and_grads(&random, &[small.clone()], 2);
    let mut method = random.method(2, Eagle3Options { ttt_length: 3, ..Eagle3Options::default() });
    for _ in 0..2 {
        method.micro_batch(&random.pack(), Mode::Train).unwrap();
        method.tape_mut().clear_grads();
        let stats = method.micro_batch(&small, Mode::Train).unwrap();
        let tape = method.tape();
        let grads: Vec<Vec<f32>> =
            tape.trained().into_iter().map(|id| tape.grad_values(id).unwrap()).collect();
        assert!((stats.loss, stats.weight, grads) == fresh);
        method.tape_mut().clear_grads();
    }
}

#[test]
fn a_first_step_without_a_trained_slot_is_counted_and_the_run_goes_on() {
    let mut random = Random::new(8, &[20; 8]);
    // Rows are packed one by one; those of the second half have nothing to train on.
    for row in &mut random.rows[4..] {
        row.loss_mask.fill(false);
    }
    let run = |seed: u64, rows: &[CaptureRow], dir: &Path| {
        let unroll =
            Eagle3Options { ttt_length: 3, divisor: LossDivisor::ValidTokens, ..Eagle3Options::default() };
        let mut method = random.method(2, unroll);
        let mut losses = Vec::new();
        let mut on_event = |event: &Event| {
            if let Event::Step(report) = event {
                losses.push((report.loss, report.grad_norm));
            }
            Flow::Continue
        };
        let options =
            TrainOptions { epochs: 1, tokens_per_step: 32, validate_every: None, seed, ..options(dir) };
        let hooks = Hooks { on_event: &mut on_event, validate: None, collective: &Alone };
        (train(&mut method, &mut Memory(rows.to_vec()), &options, hooks), losses)
    };
    let mut first_was_empty = 0;
    for seed in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let (outcome, losses) = run(seed, &random.rows, dir.path());
        assert!(outcome.unwrap().finished);
        assert_eq!(losses.len(), 8, "each step counts, so that the schedule is kept");
        assert_eq!(losses.iter().filter(|(loss, _)| loss.is_some()).count(), 4);
        for (loss, grad_norm) in &losses {
            assert!(loss.is_none_or(f64::is_finite));
            assert_eq!(loss.is_none(), *grad_norm == 0.0, "no slot, no gradient");
        }
        first_was_empty += usize::from(losses[0].0.is_none());
        let log = std::fs::read_to_string(dir.path().join("log.jsonl")).unwrap();
        assert!(!log.contains("NaN") && log.contains("\"loss\":null"), "{log}");
    }
    assert!((1..8).contains(&first_was_empty), "{first_was_empty} of 8 orders begin without a slot");
    // Nothing at all to train on is no result.
    let dir = tempfile::tempdir().unwrap();
    let (outcome, _) = run(0, &random.rows[4..], dir.path());
    assert!(matches!(outcome, Err(TrainError::NoData)), "{outcome:?}");
}
