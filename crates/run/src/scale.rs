//! What making a draft costs on 1 to 64 GPUs, for targets of 8B to 400B, on paper: the page docs/SCALING.md.
//!
//! Sums over the shapes that targets publish and the numbers of a GPU's data sheet. Where a formula says something that was
//! measured too, on CPUs, the page holds the one against the other; no GPU was measured for it.
//!
//! Letters: `H` width, `V` vocabulary, `Vd` draft vocabulary, `P` trained numbers of the draft, `A` numbers of the target that a
//! token goes through, `W` all of them, `N` GPUs, `g` GPUs that hold a copy of the target, `d` unrolled steps, `k`
//! micro-batches of a step, `a` share of tokens that are trained.

use std::fmt::Write;
use std::path::Path;

use draftsmith_formats::cache::{CaptureDtype, estimate_bytes};
use draftsmith_formats::hf_config::HfConfig;
use draftsmith_model::TargetConfig;
use draftsmith_model::eagle3::Eagle3Config;
use serde_json::Value;

use crate::among::Among;

/// A GPU by its data sheet: NVIDIA H100 SXM, 80 GB, in a machine of eight with a network card for each.
mod gpu {
    /// Dense bf16, multiply and add counted apart.
    pub(super) const FLOPS: f64 = 989e12;
    /// Bytes a second from its memory.
    pub(super) const MEMORY_S: f64 = 3.35e12;
    pub(super) const MEMORY: f64 = 80e9;
    /// Bytes a second to the others of its machine, each way.
    pub(super) const NEAR_S: f64 = 450e9;
    /// Bytes a second to other machines, each way: 400 Gbit/s.
    pub(super) const FAR_S: f64 = 50e9;
    pub(super) const PER_MACHINE: u64 = 8;
}

/// Of what the data sheet says, the share that is taken to be reached.
const REACHED_FLOPS: f64 = 0.4;
const REACHED_MEMORY: f64 = 0.7;
const REACHED_LINK: f64 = 0.8;
/// Of a GPU's memory, the share for weights and caches.
const USABLE: f64 = 0.9;
/// Sequences that a copy of the target answers side by side at most.
const BATCH: f64 = 1024.0;

/// What is to be done, the same for all targets.
mod work {
    pub(super) const ROWS: f64 = 100_000.0;
    pub(super) const PROMPT: f64 = 300.0;
    pub(super) const ANSWER: f64 = 600.0;
    pub(super) const EPOCHS: f64 = 2.0;
    pub(super) const UNROLLED: f64 = 7.0;
    pub(super) const PACK: f64 = 4096.0;
    pub(super) const MICRO_BATCHES: u64 = 64;
    pub(super) const DRAFT_VOCAB: usize = 32_000;
    pub(super) const LAYERS: u64 = 3;
}

/// Published shapes: what the `config.json` of each says that sizes depend on.
const TARGETS: [(&str, &str); 5] = [
    (
        "Llama-3.1-8B",
        r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}"#,
    ),
    (
        "Qwen3-32B",
        r#"{"model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}"#,
    ),
    (
        "Llama-3.1-70B",
        r#"{"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}"#,
    ),
    (
        "Qwen3-235B-A22B",
        r#"{"model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
            "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
            "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true,
            "decoder_sparse_step": 1, "mlp_only_layers": []}"#,
    ),
    (
        "Llama-3.1-405B",
        r#"{"model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
            "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}"#,
    ),
];

/// The target of the measured numbers.
const SMALL: &str = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": true}"#;

/// Numbers of a draft by what is done with them.
#[derive(Clone, Copy, Debug, PartialEq)]
struct DraftSize {
    /// The layer that joins captured states, once a slot.
    fc: f64,
    /// The decoder layer, once an unrolled step.
    layer: f64,
    /// The head.
    head: f64,
    /// All that are trained.
    trained: f64,
}

impl DraftSize {
    fn of(config: &Eagle3Config) -> DraftSize {
        let (mut size, mut all) = (DraftSize { fc: 0.0, layer: 0.0, head: 0.0, trained: 0.0 }, 0.0);
        for (name, shape) in config.tensors() {
            let numbers = shape.iter().product::<usize>() as f64;
            match name.as_str() {
                // It is the target's, and stays as it is.
                _ if name.contains("embed_tokens") => continue,
                _ if name.starts_with("fc.") => size.fc += numbers,
                _ if name.starts_with("lm_head") => size.head += numbers,
                _ if shape.len() > 1 => size.layer += numbers,
                _ => {}
            }
            all += numbers;
        }
        DraftSize { trained: all, ..size }
    }

    /// Multiplications and additions of a step over so many slots: forward, gradients of inputs and of weights; the states that
    /// come from the target want no gradient. `teacher` is the target's own head, which is computed in the first epoch alone.
    fn flops(&self, slots: f64, trained_share: f64, unrolled: f64, teacher: f64) -> f64 {
        let scored = trained_share * unrolled * 6.0 * self.head + trained_share * 2.0 * teacher;
        slots * (4.0 * self.fc + unrolled * 6.0 * self.layer + scored)
    }
}

/// A target by its sizes.
struct Shape {
    name: &'static str,
    hidden: f64,
    vocab: f64,
    /// `W`
    all: f64,
    /// `A`
    active: f64,
    /// Bytes of keys and values of a token, in bf16.
    kv: f64,
    draft: DraftSize,
}

fn config_of(name: &str, text: &str) -> TargetConfig {
    // What every model has and no size depends on.
    let text = text.replacen('{', "{\"rms_norm_eps\": 1e-5, \"max_position_embeddings\": 8192, ", 1);
    let config = HfConfig::parse(Path::new(name), text.as_bytes()).expect("a shape is JSON");
    TargetConfig::from_hf(&config).expect("a published shape is that of a target")
}

impl Shape {
    fn of(name: &'static str, text: &str) -> Shape {
        let t = config_of(name, text);
        let (hidden, vocab, layers) = (t.hidden_size as f64, t.vocab_size as f64, t.num_layers as f64);
        let attention = hidden * (2 * t.q_width() + 2 * t.kv_width()) as f64;
        let (mlp_all, mlp_active) = match &t.experts {
            None => (3.0 * hidden * t.intermediate_size as f64, 3.0 * hidden * t.intermediate_size as f64),
            Some(experts) => {
                let (one, count) = (3.0 * hidden * experts.width as f64, experts.routing.experts as f64);
                let router = hidden * count;
                (router + count * one, router + experts.routing.used as f64 * one)
            }
        };
        let ends = vocab * hidden * if t.tied { 1.0 } else { 2.0 };
        Shape {
            name,
            hidden,
            vocab,
            all: layers * (attention + mlp_all) + ends,
            active: layers * (attention + mlp_active) + vocab * hidden,
            kv: 2.0 * 2.0 * layers * t.kv_width() as f64,
            draft: DraftSize::of(&Eagle3Config::for_target(&t, work::DRAFT_VOCAB.min(t.vocab_size))),
        }
    }

    /// `g`: a power of two of GPUs whose memory has room for the weights in bf16, and a quarter as much for caches.
    fn gpus_of_a_copy(&self) -> u64 {
        let least = 1.25 * 2.0 * self.all / (USABLE * gpu::MEMORY);
        (least.ceil() as u64).next_power_of_two()
    }
}

/// The costs of one target on `N` GPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Costs {
    /// Hours; `None` where no copy of the target fits.
    regenerate: Option<f64>,
    capture: Option<f64>,
    train: f64,
    /// Bytes of all states.
    states: f64,
    /// Bytes a second that training reads of them, all GPUs together.
    read_s: f64,
    /// Share of training that goes to sums of gradients, and to the optimiser.
    sums: f64,
    optimiser: f64,
    /// Bytes of a GPU in training, without activations; the same with the optimiser's moments shared by rank.
    memory: f64,
    memory_shared: f64,
}

fn costs(shape: &Shape, gpus: u64) -> Costs {
    let (flops, memory_s) = (gpu::FLOPS * REACHED_FLOPS, gpu::MEMORY_S * REACHED_MEMORY);
    let group = shape.gpus_of_a_copy();
    let (copies, g) = ((gpus / group) as f64, group as f64);
    let tokens = work::ROWS * (work::PROMPT + work::ANSWER);
    let at_work = (copies > 0.0).then_some(copies * g);
    // Prompts are read in large products; answers are written a token at a time, for as many sequences as there is room for.
    let regenerate = at_work.map(|at_work| {
        let room = g * USABLE * gpu::MEMORY - 2.0 * shape.all;
        let batch = (room / (shape.kv * (work::PROMPT + work::ANSWER))).min(BATCH);
        let context = work::PROMPT + work::ANSWER / 2.0;
        let weights = 2.0 * shape.all / (g * memory_s);
        let products = 2.0 * shape.active * batch / (g * flops);
        let step = weights.max(products) + batch * context * shape.kv / (g * memory_s);
        let answers = work::ROWS * work::ANSWER / (copies * batch / step);
        let prompts = work::ROWS * work::PROMPT * 2.0 * shape.active / (at_work * flops);
        (answers + prompts) / 3600.0
    });
    let capture = at_work.map(|at_work| tokens * 2.0 * shape.active / (at_work * flops) / 3600.0);
    let states = estimate_bytes(tokens as u64, shape.hidden as u64, work::LAYERS, CaptureDtype::Int8) as f64;

    let (draft, among) = (&shape.draft, Among { ranks: gpus, link_bytes_per_s: link(gpus) });
    let slots = work::PACK * work::MICRO_BATCHES as f64;
    let steps = (work::EPOCHS * tokens / slots).ceil();
    let teacher = shape.vocab * shape.hidden / work::EPOCHS;
    let share = work::ANSWER / (work::PROMPT + work::ANSWER);
    let products =
        among.share(work::MICRO_BATCHES) * draft.flops(slots, share, work::UNROLLED, teacher) / flops;
    let sent = among.sent_bytes_a_step(work::MICRO_BATCHES, draft.trained as u64) as f64;
    let sums = sent / among.link_bytes_per_s;
    // Weight, gradient and two moments are read, weight, two moments and a bf16 copy are written.
    let optimiser = 30.0 * draft.trained / memory_s;
    let step = products + sums + optimiser;
    // Weights, gradients and what waits of them in the tree; bf16 copies of the draft and of the target's two ends.
    let aside = among.sums_aside(work::MICRO_BATCHES) as f64;
    let rest = (4.0 + 4.0 + 4.0 * aside + 2.0) * draft.trained + 4.0 * shape.vocab * shape.hidden;
    Costs {
        regenerate,
        capture,
        train: steps * step / 3600.0,
        states,
        read_s: slots * states / tokens / step,
        sums: sums / step,
        optimiser: optimiser / step,
        memory: rest + 8.0 * draft.trained,
        memory_shared: rest + 8.0 * draft.trained / gpus as f64,
    }
}

/// What a GPU of `N` sends in a second.
fn link(gpus: u64) -> f64 {
    REACHED_LINK * if gpus <= gpu::PER_MACHINE { gpu::NEAR_S } else { gpu::FAR_S }
}

/// Numbers of GPUs in the table.
const COUNTS: [u64; 5] = [1, 4, 8, 16, 64];

fn hours(hours: f64) -> String {
    match hours {
        h if h < 0.1 => format!("{:.1} min", 60.0 * h),
        h if h < 10.0 => format!("{h:.1} h"),
        h => format!("{h:.0} h"),
    }
}

fn percent(share: f64) -> String {
    format!("{:.*} %", usize::from(share < 0.1), 100.0 * share)
}

fn gb(bytes: f64) -> String {
    format!("{:.*} GB", usize::from(bytes < 10e9), bytes / 1e9)
}

/// docs/SCALING.md. `two_ranks` is the record `bench/results/2026-11-29-two-ranks.json`.
pub fn page(two_ranks: &Value) -> String {
    let mut page = String::from(HEAD);
    let _ = writeln!(
        page,
        "| a GPU (H100 SXM, data sheet) | | taken to be reached |\n|---|---|---|\n| bf16 products | {:.0} TFLOP/s | {} |\n| its \
         memory | {:.2} TB/s, {:.0} GB | {}; {} of the room |\n| to the others of its machine of {} | {:.0} GB/s each way | {} |\n| \
         to other machines | {:.0} GB/s each way | {} |\n",
        gpu::FLOPS / 1e12,
        percent(REACHED_FLOPS),
        gpu::MEMORY_S / 1e12,
        gpu::MEMORY / 1e9,
        percent(REACHED_MEMORY),
        percent(USABLE),
        gpu::PER_MACHINE,
        gpu::NEAR_S / 1e9,
        percent(REACHED_LINK),
        gpu::FAR_S / 1e9,
        percent(REACHED_LINK),
    );
    let _ = writeln!(
        page,
        "The work: {} conversations of {} tokens of prompt and {} of answer; states of {} layers and the final one as int8; {} \
         epochs, {} unrolled steps, {} draft ids, steps of {} micro-batches of {} slots; drafts with the shape of one of the target's layers.\n",
        work::ROWS,
        work::PROMPT,
        work::ANSWER,
        work::LAYERS,
        work::EPOCHS,
        work::UNROLLED,
        work::DRAFT_VOCAB,
        work::MICRO_BATCHES,
        work::PACK
    );
    page.push_str(FORMULAS);
    page.push_str(
        "| target | draft | GPUs | a copy on | regenerate | capture | states | train | of that sums | optimiser | states read | \
         memory | moments by rank |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (name, text) in TARGETS {
        let shape = Shape::of(name, text);
        for (row, gpus) in COUNTS.into_iter().enumerate() {
            let c = costs(&shape, gpus);
            let first = |text: String| if row == 0 { text } else { String::new() };
            let time = |h: Option<f64>| h.map_or_else(|| "–".to_string(), hours);
            let _ = writeln!(
                page,
                "| {} | {} | {gpus} | {} | {} | {} | {} | {} | {} | {} | {}/s | {}{} | {} |",
                first(shape.name.to_string()),
                first(format!("{:.2} B", shape.draft.trained / 1e9)),
                first(shape.gpus_of_a_copy().to_string()),
                time(c.regenerate),
                time(c.capture),
                first(format!("{:.1} TB", c.states / 1e12)),
                hours(c.train),
                percent(c.sums),
                percent(c.optimiser),
                gb(c.read_s),
                gb(c.memory),
                if c.memory > USABLE * gpu::MEMORY { ", too much" } else { "" },
                gb(c.memory_shared),
            );
        }
    }
    page.push_str(READING);
    page.push_str("| what | formula | measured | measured ÷ formula | where |\n|---|---|---|---|---|\n");
    for check in checks(two_ranks) {
        let _ = writeln!(
            page,
            "| {} | {} | {} | {:.2} | {} |",
            check.what,
            check.words(check.formula),
            check.words(check.measured),
            check.measured / check.formula,
            check.place
        );
    }
    page.push_str(FOOT);
    page
}

/// A formula beside a measurement.
struct Check {
    what: &'static str,
    unit: &'static str,
    formula: f64,
    measured: f64,
    place: &'static str,
}

impl Check {
    fn words(&self, value: f64) -> String {
        match value {
            v if v >= 1e5 => format!("{v:.0} {}", self.unit),
            v if v >= 100.0 => format!("{v:.0} {}", self.unit),
            v => format!("{v:.2} {}", self.unit),
        }
    }
}

fn checks(two_ranks: &Value) -> Vec<Check> {
    let small = config_of("SmolLM2-135M", SMALL);
    let draft = |vocab| DraftSize::of(&Eagle3Config::for_target(&small, vocab));
    let number = |pointer: &str| two_ranks.pointer(pointer).and_then(Value::as_f64).unwrap_or(f64::NAN);
    let record = "`bench/results/2026-11-29-two-ranks.json`";
    let trained = draft(8192).trained;
    // 2,048 slots, 1,221 of them trained; the median rate of the products in the same record is 344 GFLOP/s.
    let (slots, share, rate) = (2048.0, 1221.0 / 2048.0, 344e9);
    let teacher = (small.vocab_size * small.hidden_size) as f64;
    let steps = "`bench/results/2026-11-23-train-step.txt`, part 2";
    let two = Among { ranks: 2, link_bytes_per_s: 1.0 };
    let micro_batches = number("/micro_batches");
    vec![
        Check {
            what: "trained numbers of SmolLM2-135M's draft, 8,192 ids",
            unit: "",
            formula: trained,
            measured: number("/trained_parameters"),
            place: record,
        },
        Check {
            what: "bytes that a rank of two sends in a step",
            unit: "B",
            formula: two.sent_bytes_a_step(micro_batches as u64, trained as u64) as f64,
            measured: number("/traffic/sent_bytes_a_step/0"),
            place: record,
        },
        Check {
            what: "two processes of one thread over one of two, tokens/s",
            unit: "",
            formula: 1.0 / (1.0 + number("/sum_s_a_step") / number("/one_process_step_s")),
            measured: number("/ratio/median"),
            place: record,
        },
        Check {
            what: "bytes of states a token, SmolLM2-135M, before compression",
            unit: "B",
            formula: estimate_bytes(1_000_000, small.hidden_size as u64, 3, CaptureDtype::Int8) as f64 / 1e6,
            // 2.1 GiB of 1,001,616 tokens.
            measured: 2.1 * f64::from(1 << 30) / 1_001_616.0,
            place: "`bench/results/2026-11-24-shipped-draft-run.txt`",
        },
        Check {
            what: "a step on known rows, 7 unrolled, two threads, at 344 GFLOP/s",
            unit: "s",
            formula: draft(8192).flops(slots, share, 7.0, 0.0) / rate,
            measured: 1.93,
            place: steps,
        },
        Check {
            what: "the same on new rows: the teacher's head beside it",
            unit: "s",
            formula: draft(8192).flops(slots, share, 7.0, teacher) / rate,
            measured: 2.06,
            place: steps,
        },
    ]
}

const HEAD: &str = "# How it scales

Generated from `crates/run/src/scale.rs` by `cargo xtask tidy --write`; do not edit. This page is arithmetic: **nothing on it was
measured on a GPU.** It says what a run would cost on 1 to 64 GPUs if the formulas hold and the machine reaches the shares that are
assumed below; the last table holds the formulas against what was measured, on two cores of a CPU. What a run costs on *your*
machine is measured by `draftsmith run RUN.toml --plan`, for several of them by `--plan --ranks N` ([RANKS.md](RANKS.md)).

## What is assumed

";

const FORMULAS: &str = "## Formulas

* **Answers.** A copy of the target holds `2 W` bytes of weights in bf16 on `g` GPUs, and writes a token for `B` sequences in
  `max(2 W / (g · memory), 2 A B / (g · products)) + B · context · kv / (g · memory)` seconds: weights are read once for all of them, keys
  and values for each [pope2022]. `B` is what fits beside the weights, at most 1,024. Prompts take `2 A` operations a token. What
  goes between the `g` GPUs of a copy is left out.
* **States.** `2 A` operations a token, `(K + 1) · H · (1 + 2 / 32) + 4.1` bytes of states.
* **Draft.** Forward, gradients of inputs and of weights are 2 operations each for every number a slot goes through [kaplan2020]:
  `4 fc + 6 d · layer + a · (6 d · H Vd + 2 H V)` a slot; the last term is the teacher, and counts for the first epoch alone. Attention
  and norms are left out.
* **Sum of gradients.** `4 · 2 · (N − 1) / N · P` bytes a GPU and step, the least that a sum on all of `N` can cost
  [patarasuk2009]; beyond one machine at the speed between machines. Nothing of it is taken to be hidden behind the products.
* **Optimiser.** `30 P` bytes of memory, in full on every GPU. With moments by rank it is `30 P / N`, which is not counted.
* **Memory in training.** `(4 + 4 + 4 ⌈log2(k / N)⌉ + 2 + 8) · P + 4 H V` bytes: weights, gradients, what waits of them in the tree, a bf16
  copy, two moments; both ends of the target. With moments by rank (`train.shard_optimizer`, [RANKS.md](RANKS.md)) the 8 become `8 / N`, and as
  many bytes are sent [rajbhandari2020]. Activations are left out.

A target that needs more than one GPU is served by vLLM or SGLang for `regenerate` and `capture` ([SERVERS.md](SERVERS.md)): draftsmith itself
keeps a target on one device. Its draft trains without it.

## 1 to 64 GPUs

";

const READING: &str = "
What the table says, as far as it is right:

* Answers and states need no GPU to know of another: they get faster with the copies of the target. So does training inside one machine,
  where sums of gradients take less than 1 %. Between machines they take 11 to 12 % of it on 16 GPUs and a third on 64; a step of twice the
  micro-batches halves that.
* The optimiser, which every GPU does in full, stays below 3 %.
* Reading states on 64 GPUs asks for up to 19 GB/s of a disk that they share; `capture.mode = \"online\"` computes them where they are used.
* Drafts for targets of up to 235B fit one GPU. One of the shape of a layer of 405B fits on none of these numbers of GPUs. Moments by rank
  (`train.shard_optimizer`) make it fit on 64 alone, for the sums that wait in the tree are as large. It has to be made smaller:
  `draft.intermediate`, `draft.vocab_size`, fewer micro-batches a step.

## Held against measurements

";

const FOOT: &str = "
Measured beyond the formula's 1.00 is what it leaves out: attention, norms, reading rows, or compression where it is less.
";

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Shape> {
        TARGETS.iter().map(|(name, text)| Shape::of(name, text)).collect()
    }

    #[test]
    fn shapes_have_as_many_numbers_as_their_names_say() {
        let wanted =
            [(8.03e9, 8.03e9), (32.8e9, 32.8e9), (70.6e9, 70.6e9), (235.1e9, 22.2e9), (405.9e9, 405.9e9)];
        for (shape, (all, active)) in all().iter().zip(wanted) {
            assert!((shape.all / all - 1.0).abs() < 0.01, "{}: {}", shape.name, shape.all);
            // An embedding is looked up, not multiplied.
            assert!((shape.active / active - 1.0).abs() < 0.08, "{}: {}", shape.name, shape.active);
        }
        let small = Shape::of("SmolLM2-135M", SMALL);
        assert!((small.all / 134.5e6 - 1.0).abs() < 0.01, "{}", small.all);
        let copies: Vec<u64> = all().iter().map(Shape::gpus_of_a_copy).collect();
        assert_eq!(copies, [1, 2, 4, 16, 16]);
    }

    #[test]
    fn more_gpus_are_faster_but_never_by_more_than_their_number() {
        for shape in all() {
            for pair in COUNTS.windows(2) {
                let (few, many) = (costs(&shape, pair[0]), costs(&shape, pair[1]));
                let times = (pair[1] / pair[0]) as f64;
                let stages = [
                    (few.regenerate, many.regenerate),
                    (few.capture, many.capture),
                    (Some(few.train), Some(many.train)),
                ];
                for (few, many) in stages {
                    let Some(few) = few else { continue };
                    let gain = few / many.unwrap();
                    assert!(gain > 1.0 && gain < times + 1e-6, "{}: {gain} of {times}", shape.name);
                }
                assert!(many.sums > few.sums && many.optimiser > few.optimiser, "{}", shape.name);
                assert!(many.memory_shared < few.memory_shared && many.memory <= few.memory);
                assert_eq!(many.states, few.states);
            }
            assert_eq!(costs(&shape, 1).sums, 0.0);
            assert_eq!(costs(&shape, 1).memory, costs(&shape, 1).memory_shared);
        }
    }

    /// What the page says in words.
    #[test]
    fn the_words_of_the_page_are_what_its_numbers_say() {
        let percent = |share: f64| (100.0 * share).round() as u32;
        let room = USABLE * gpu::MEMORY;
        let mut most_read = 0.0f64;
        for shape in all() {
            for gpus in COUNTS {
                let c = costs(&shape, gpus);
                let sums = match gpus {
                    1..=8 => 0..=1,
                    16 => 11..=12,
                    _ => 33..=36,
                };
                assert!(sums.contains(&percent(c.sums)), "{} on {gpus}: {}", shape.name, c.sums);
                assert!(c.optimiser < 0.03, "{} on {gpus}: {}", shape.name, c.optimiser);
                let is_largest = shape.name == "Llama-3.1-405B";
                assert_eq!(c.memory > room, is_largest, "{} on {gpus}: {}", shape.name, c.memory);
                assert_eq!(c.memory_shared > room, is_largest && gpus < 64, "{} on {gpus}", shape.name);
                most_read = most_read.max(c.read_s);
            }
        }
        assert_eq!((most_read / 1e9).round(), 19.0);
    }

    #[test]
    fn numbers_are_right_where_they_can_be_done_by_hand() {
        // Llama-3.1-8B: fc 3 H², q, k, v of 2 H, output, MLP, head.
        let draft = all()[0].draft;
        let h = 4096.0f64;
        assert_eq!(draft.fc, 3.0 * h * h);
        assert_eq!(draft.layer, 2.0 * h * (h + 2.0 * 1024.0) + h * h + 3.0 * h * 14_336.0);
        assert_eq!(draft.head, h * 32_000.0);
        assert!(draft.trained > draft.fc + draft.layer + draft.head);
        let flops = draft.flops(10.0, 0.5, 2.0, 7.0);
        assert_eq!(flops, 10.0 * (4.0 * draft.fc + 12.0 * draft.layer + 0.5 * 12.0 * draft.head + 7.0));
        // 2 A operations for 90 M tokens on eight GPUs.
        let c = costs(&all()[0], 8);
        let wanted = 90e6 * 2.0 * all()[0].active / (8.0 * 989e12 * 0.4) / 3600.0;
        assert!((c.capture.unwrap() / wanted - 1.0).abs() < 1e-9);
        assert!((c.states / (90e6 * (4.0 * (4096.0 + 256.0) + 4.125)) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn formulas_agree_with_what_was_measured() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/results/2026-11-29-two-ranks.json");
        let record: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for check in checks(&record) {
            let ratio = check.measured / check.formula;
            let exact = check.unit == "B" && check.what.starts_with("bytes that")
                || check.what.starts_with("trained");
            let within = if exact { 1e-6 } else { 0.2 };
            assert!((ratio - 1.0).abs() < within, "{}: {} for {}", check.what, check.measured, check.formula);
        }
        let page = page(&record);
        assert!(!page.contains("NaN"), "{page}");
    }
}
