//! `bench kernels`: what one target pass of `m` tokens costs, `t(m)`, with prefill and decode rates.

use std::time::Duration;

use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::record::{ArtifactInfo, Machine};
use crate::stats::median;
use crate::{BenchError, BoxError};

/// The engine, seen from here.
pub trait KernelRunner {
    /// One verify pass of `m` tokens behind a context of `context_tokens`; only the pass is timed.
    fn step(&mut self, context_tokens: usize, m: usize) -> Result<Duration, BoxError>;
    /// Prefill of `tokens` tokens into an empty cache.
    fn prefill(&mut self, tokens: usize) -> Result<Duration, BoxError>;
    /// Decoding of `tokens` tokens, one per pass, behind a context of `context_tokens`.
    fn decode(&mut self, context_tokens: usize, tokens: usize) -> Result<Duration, BoxError>;
    /// What the machine can do at best, and what a pass needs.
    fn limits(&mut self) -> Option<Limits> {
        None
    }
}

/// What bounds a pass: bytes over bandwidth, operations over peak.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Limits {
    /// Read by all threads from memory, measured.
    pub read_gb_per_s: f64,
    /// Multiply-adds of all threads with 4-bit weights in the nearest caches, measured; `None` for float weights.
    pub dot_gmac_per_s: Option<f64>,
    /// Weights that a pass reads.
    pub weight_bytes: usize,
    /// Multiply-adds with weights per row.
    pub macs_per_row: usize,
    /// The same weights by the form they stand in, each form timed alone.
    pub weights: Vec<WeightTimes>,
}

/// What the products with all weights of one form take, nothing around them.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct WeightTimes {
    /// Form in memory; of the head also what was asked of it.
    pub form: String,
    /// Of all its weights.
    pub bytes: usize,
    /// Multiply-adds of all its weights per row.
    pub macs_per_row: usize,
    /// Best milliseconds with 1 row and with 8.
    pub ms: [f64; 2],
}

impl Limits {
    /// Least milliseconds of a pass of `m` rows.
    pub fn floor_ms(&self, m: usize) -> f64 {
        let memory = self.weight_bytes as f64 / self.read_gb_per_s / 1e6;
        let dots = self.dot_gmac_per_s.map_or(0.0, |rate| (self.macs_per_row * m) as f64 / rate / 1e6);
        memory.max(dots)
    }
}

/// How much to measure.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Tokens per pass.
    pub widths: Vec<usize>,
    /// Timed rounds; every round visits every width once.
    pub rounds: usize,
    /// Untimed rounds before.
    pub warmup_rounds: usize,
    /// Context behind every pass.
    pub context_tokens: usize,
    /// Length of the measured prefill.
    pub prefill_tokens: usize,
    /// Length of the measured decoding.
    pub decode_tokens: usize,
}

impl Default for KernelOptions {
    fn default() -> KernelOptions {
        KernelOptions {
            widths: vec![1, 2, 4, 8, 16, 32],
            rounds: 15,
            warmup_rounds: 2,
            context_tokens: 256,
            prefill_tokens: 512,
            decode_tokens: 64,
        }
    }
}

/// Raw times of one width.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct StepTimes {
    /// Tokens per pass.
    pub m: usize,
    /// One entry per round.
    pub ns: Vec<u64>,
}

impl StepTimes {
    /// Median in milliseconds.
    pub fn median_ms(&self) -> Option<f64> {
        median(&self.ns.iter().map(|ns| *ns as f64 / 1e6).collect::<Vec<_>>())
    }
}

/// `OUT.json` of `bench kernels` [design §11]: the fixed keys first, then the raw samples.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct KernelReport {
    /// Median milliseconds per pass, keyed by the number of tokens.
    pub t_ms: WidthMap,
    /// Median over the rounds.
    pub prefill_tokens_per_s: f64,
    /// Median over the rounds.
    pub decode_tokens_per_s: f64,
    /// Context behind every pass.
    pub context_tokens: usize,
    /// Worker threads.
    pub threads: u32,
    /// The model.
    pub target: ArtifactInfo,
    /// Where it was run.
    pub machine: Machine,
    /// What bounds a pass here.
    pub limits: Option<Limits>,
    /// Raw times of the passes.
    pub step_samples: Vec<StepTimes>,
    /// Raw times of the prefills, nanoseconds.
    pub prefill_samples_ns: Vec<u64>,
    /// Raw times of the decodings, nanoseconds.
    pub decode_samples_ns: Vec<u64>,
}

/// Values keyed by width, written as a JSON object in order of width.
#[derive(Clone, Debug, PartialEq)]
pub struct WidthMap(pub Vec<(usize, f64)>);

impl WidthMap {
    /// Value of one width.
    pub fn get(&self, m: usize) -> Option<f64> {
        self.0.iter().find(|(width, _)| *width == m).map(|(_, value)| *value)
    }
}

impl Serialize for WidthMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (m, value) in &self.0 {
            map.serialize_entry(&m.to_string(), value)?;
        }
        map.end()
    }
}

/// Prefill and decode are slow beside one pass; three rounds of them are enough for a median.
const LONG_ROUNDS_MAX: usize = 3;

/// Measures `t(m)`, prefill and decode. Widths take turns inside every round, so that drift meets all alike.
pub fn run_kernels(
    runner: &mut dyn KernelRunner,
    options: &KernelOptions,
    target: ArtifactInfo,
    threads: u32,
    machine: Machine,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<KernelReport, BenchError> {
    let failed = |source| BenchError::Kernels { source };
    let ns = |d: Duration| d.as_nanos() as u64;
    let mut widths = options.widths.clone();
    widths.sort_unstable();
    widths.dedup();
    widths.retain(|m| *m > 0);
    let rounds = options.rounds.max(1);
    let mut step_samples: Vec<StepTimes> = widths.iter().map(|&m| StepTimes { m, ns: Vec::new() }).collect();
    for round in 0..options.warmup_rounds + rounds {
        for step in &mut step_samples {
            let time = runner.step(options.context_tokens, step.m).map_err(failed)?;
            if round >= options.warmup_rounds {
                step.ns.push(ns(time));
            }
        }
        progress(round + 1, options.warmup_rounds + rounds);
    }
    let (mut prefill_samples_ns, mut decode_samples_ns) = (Vec::new(), Vec::new());
    for _ in 0..rounds.min(LONG_ROUNDS_MAX) {
        prefill_samples_ns.push(ns(runner.prefill(options.prefill_tokens).map_err(failed)?));
        decode_samples_ns
            .push(ns(runner.decode(options.context_tokens, options.decode_tokens).map_err(failed)?));
    }
    let limits = runner.limits();
    let rate = |tokens: usize, samples: &[u64]| {
        let rates: Vec<f64> = samples.iter().map(|ns| tokens as f64 * 1e9 / (*ns).max(1) as f64).collect();
        median(&rates).unwrap_or(0.0)
    };
    Ok(KernelReport {
        t_ms: WidthMap(step_samples.iter().filter_map(|s| Some((s.m, s.median_ms()?))).collect()),
        prefill_tokens_per_s: rate(options.prefill_tokens, &prefill_samples_ns),
        decode_tokens_per_s: rate(options.decode_tokens, &decode_samples_ns),
        context_tokens: options.context_tokens,
        threads,
        target,
        machine,
        limits,
        step_samples,
        prefill_samples_ns,
        decode_samples_ns,
    })
}

/// Aligned text of a kernel report: `t(m)`, its ratio to `t(1)`, and what it means per token.
pub fn kernels_text(report: &KernelReport) -> String {
    let one = report.t_ms.get(1);
    let mut out = report.machine.device_line();
    out.push_str("   m     t(m) ms   t(m)/t(1)   ms/token   rounds");
    out.push_str(if report.limits.is_some() { "   floor ms    GB/s   GMAC/s\n" } else { "\n" });
    for step in &report.step_samples {
        let Some(ms) = step.median_ms() else { continue };
        let ratio = one.map_or_else(|| "–".into(), |one| format!("{:.2}", ms / one));
        out.push_str(&format!(
            "{:4}  {ms:10.3}  {ratio:>10}  {:9.3}  {:7}",
            step.m,
            ms / step.m as f64,
            step.ns.len()
        ));
        if let Some(limits) = &report.limits {
            out.push_str(&format!(
                "  {:9.3}  {:6.1}  {:7.1}",
                limits.floor_ms(step.m),
                limits.weight_bytes as f64 / ms / 1e6,
                (limits.macs_per_row * step.m) as f64 / ms / 1e6,
            ));
        }
        out.push('\n');
    }
    if let Some(limits) = &report.limits {
        let dots = limits.dot_gmac_per_s.map_or_else(String::new, |rate| format!(", {rate:.0} GMAC/s"));
        out.push_str(&format!(
            "limits: {:.1} GB/s from memory{dots}; a pass reads {:.1} MB and makes {:.1} M multiply-adds a row\n",
            limits.read_gb_per_s,
            limits.weight_bytes as f64 / 1e6,
            limits.macs_per_row as f64 / 1e6,
        ));
        if !limits.weights.is_empty() {
            out.push_str(
                "weights alone                   MB   1 row ms    GB/s   of reads   8 rows ms   GMAC/s\n",
            );
        }
        for times in &limits.weights {
            let [one, eight] = times.ms;
            let rate = times.bytes as f64 / one / 1e6;
            out.push_str(&format!(
                "{:25} {:8.1}  {one:9.3}  {rate:6.1}  {:7.0} %   {eight:9.3}  {:7.1}\n",
                times.form,
                times.bytes as f64 / 1e6,
                100.0 * rate / limits.read_gb_per_s,
                (8 * times.macs_per_row) as f64 / eight / 1e6,
            ));
        }
    }
    out.push_str(&format!(
        "prefill {:.1} tokens/s, decode {:.1} tokens/s (medians; context {} tokens, {} threads)\n",
        report.prefill_tokens_per_s, report.decode_tokens_per_s, report.context_tokens, report.threads
    ));
    out
}
