//! Counters and histograms, under the names that dashboards of vLLM know. Ratios are left to the reader of the page.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use draftsmith_core::AcceptStats;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::swap::DraftInfo;

/// The type of the page.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;

const TTFT_S: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0,
];
const TOKEN_S: [f64; 15] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5];
const REQUEST_S: [f64; 16] =
    [0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 60.0, 120.0, 600.0];
const TOKENS: [f64; 14] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 1e5];

/// Everything that is counted.
pub(crate) struct Metrics {
    registry: Registry,
    drafts: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
    accepted_at: Family<Labels, Counter>,
    pub(crate) prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    pub(crate) prefix_queries: Counter,
    pub(crate) prefix_hits: Counter,
    pub(crate) ttft: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) queue_time: Histogram,
    pub(crate) request_time: Histogram,
    pub(crate) request_prompt_tokens: Histogram,
    pub(crate) request_generated_tokens: Histogram,
    pub(crate) running: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) cache_share: Gauge<f64, AtomicU64>,
    finished: Family<Labels, Counter>,
    requests: Family<Labels, Counter>,
    swaps: Family<Labels, Counter>,
    draft_info: Family<Labels, Gauge>,
    pub(crate) connections: Gauge<i64, AtomicI64>,
    verify_steps: Counter,
    committed_tokens: Counter,
    /// Faults of ours that a request, at most, paid for.
    pub(crate) panics: Counter,
}

impl Metrics {
    /// Counters at zero, labelled with the model's name.
    pub(crate) fn new(model: &str) -> Metrics {
        let labels = [("model_name".into(), model.to_owned().into())].into_iter();
        let mut registry = Registry::with_labels(labels);
        let mut metrics = Metrics {
            registry: Registry::default(),
            drafts: Counter::default(),
            draft_tokens: Counter::default(),
            accepted_tokens: Counter::default(),
            accepted_at: Family::default(),
            prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            prefix_queries: Counter::default(),
            prefix_hits: Counter::default(),
            ttft: Histogram::new(TTFT_S),
            inter_token: Histogram::new(TOKEN_S),
            queue_time: Histogram::new(REQUEST_S),
            request_time: Histogram::new(REQUEST_S),
            request_prompt_tokens: Histogram::new(TOKENS),
            request_generated_tokens: Histogram::new(TOKENS),
            running: Gauge::default(),
            waiting: Gauge::default(),
            cache_share: Gauge::default(),
            finished: Family::default(),
            requests: Family::default(),
            swaps: Family::default(),
            draft_info: Family::default(),
            connections: Gauge::default(),
            verify_steps: Counter::default(),
            committed_tokens: Counter::default(),
            panics: Counter::default(),
        };
        let r = &mut registry;
        let m = &metrics;
        r.register("vllm:spec_decode_num_drafts", "Proposals verified", m.drafts.clone());
        r.register("vllm:spec_decode_num_draft_tokens", "Draft tokens verified", m.draft_tokens.clone());
        r.register(
            "vllm:spec_decode_num_accepted_tokens",
            "Draft tokens accepted",
            m.accepted_tokens.clone(),
        );
        let help = "Draft tokens accepted at each position of a proposal";
        r.register("vllm:spec_decode_num_accepted_tokens_per_pos", help, m.accepted_at.clone());
        r.register("vllm:prompt_tokens", "Prompt tokens taken in", m.prompt_tokens.clone());
        r.register("vllm:generation_tokens", "Tokens generated", m.generated_tokens.clone());
        let help = "Prompt tokens that kept caches were asked for";
        r.register("vllm:prefix_cache_queries", help, m.prefix_queries.clone());
        let help = "Prompt tokens that were in a kept cache";
        r.register("vllm:prefix_cache_hits", help, m.prefix_hits.clone());
        let mut seconds = |name: &str, help: &str, histogram: &Histogram| {
            r.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        };
        seconds("vllm:time_to_first_token", "From the arrival of a request to its first token", &m.ttft);
        seconds("vllm:inter_token_latency", "From token to token of an answer", &m.inter_token);
        seconds("vllm:request_queue_time", "From the arrival of a request to its first step", &m.queue_time);
        seconds("vllm:e2e_request_latency", "From the arrival of a request to its end", &m.request_time);
        r.register(
            "vllm:request_prompt_tokens",
            "Prompt tokens per sequence",
            m.request_prompt_tokens.clone(),
        );
        let help = "Tokens generated per sequence";
        r.register("vllm:request_generation_tokens", help, m.request_generated_tokens.clone());
        r.register("vllm:num_requests_running", "Sequences being decoded", m.running.clone());
        r.register("vllm:num_requests_waiting", "Sequences in the queue", m.waiting.clone());
        r.register("vllm:kv_cache_usage_perc", "Share of the cache that is reserved", m.cache_share.clone());
        r.register("vllm:request_success", "Sequences that ended, by reason", m.finished.clone());
        r.register("draftsmith:http_requests", "Answered requests by route and status", m.requests.clone());
        r.register("draftsmith:draft_swaps", "Changes of the draft by outcome", m.swaps.clone());
        let help = "1 for the draft in use: its name, and its method or `small` for an ordinary model";
        r.register("draftsmith:draft_info", help, m.draft_info.clone());
        r.register("draftsmith:connections", "Open connections", m.connections.clone());
        let help = "Target passes that verified a proposal, an empty one included";
        r.register("draftsmith:verify_steps", help, m.verify_steps.clone());
        let help = "Tokens that verify steps committed";
        r.register("draftsmith:committed_tokens", help, m.committed_tokens.clone());
        r.register("draftsmith:panics", "Faults that were caught", m.panics.clone());
        metrics.registry = registry;
        metrics
    }

    /// Counts the verify steps of a finished sequence.
    pub(crate) fn count_steps(&self, stats: &AcceptStats) {
        self.drafts.inc_by(stats.proposals_at.first().copied().unwrap_or(0));
        self.draft_tokens.inc_by(stats.proposed_drafts);
        self.accepted_tokens.inc_by(stats.accepted_drafts);
        self.verify_steps.inc_by(stats.verify_steps);
        self.committed_tokens.inc_by(stats.committed_tokens);
        for (position, accepted) in stats.accepted_at.iter().enumerate() {
            let labels = vec![("position", position.to_string())];
            self.accepted_at.get_or_create(&labels).inc_by(*accepted);
        }
    }

    /// Counts a finished sequence.
    pub(crate) fn count_finished(&self, reason: &str) {
        self.finished.get_or_create(&vec![("finished_reason", reason.to_owned())]).inc();
    }

    /// Counts an answered HTTP request.
    pub(crate) fn count_request(&self, route: &str, status: u16) {
        let labels = vec![("route", route.to_owned()), ("status", status.to_string())];
        self.requests.get_or_create(&labels).inc();
    }

    /// Names the draft in use.
    pub(crate) fn name_draft(&self, draft: Option<&DraftInfo>) {
        self.draft_info.clear();
        if let Some(draft) = draft {
            let labels = vec![("draft", draft.name.clone()), ("kind", draft.kind.clone())];
            self.draft_info.get_or_create(&labels).set(1);
        }
    }

    /// Counts a change of the draft.
    pub(crate) fn count_swap(&self, outcome: &str) {
        self.swaps.get_or_create(&vec![("outcome", outcome.to_owned())]).inc();
    }

    /// What is counted here, without what concerns the process.
    pub(crate) fn body(&self) -> String {
        let mut page = String::new();
        encode_registry(&mut page, &self.registry).expect("a string takes any text");
        page
    }

    /// The page. `began_unix_s`: when this process began to serve, in seconds since 1970.
    pub(crate) fn page(&self, began_unix_s: f64) -> String {
        whole_page(self.body(), began_unix_s)
    }
}

/// A page with what concerns the process, and its end.
pub(crate) fn whole_page(mut page: String, began_unix_s: f64) -> String {
    encode_registry(&mut page, &process(began_unix_s)).expect("a string takes any text");
    encode_eof(&mut page).expect("a string takes any text");
    page
}

/// Ticks of a processor's second, as Linux tells them to programs.
const TICKS_PER_S: f64 = 100.0;

/// What Prometheus' client libraries tell of a process. What the system does not say is left out.
fn process(began_unix_s: f64) -> Registry {
    let mut registry = Registry::default();
    let began = Gauge::<f64, AtomicU64>::default();
    began.set(began_unix_s);
    let help = "When the process began to serve, since 1970";
    registry.register_with_unit("process_start_time", help, Unit::Seconds, began);
    if let Some(bytes) = resident_bytes() {
        let resident = Gauge::<i64, AtomicI64>::default();
        resident.set(bytes);
        registry.register_with_unit("process_resident_memory", "Memory in use", Unit::Bytes, resident);
    }
    if let Some(seconds) = cpu_seconds() {
        let cpu = Counter::<f64, AtomicU64>::default();
        cpu.inc_by(seconds);
        let help = "Time of processors spent, for the program and for the system";
        registry.register_with_unit("process_cpu", help, Unit::Seconds, cpu);
    }
    registry
}

fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<i64>().ok()?.checked_mul(1024)
}

fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name may have spaces and brackets in it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / TICKS_PER_S)
}

/// Observes `count` tokens that came together after `gap`.
pub(crate) fn observe_tokens(histogram: &Histogram, gap: Duration, count: usize) {
    let each = gap.as_secs_f64() / count.max(1) as f64;
    (0..count).for_each(|_| histogram.observe(each));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Names as Prometheus stores them, from the `# TYPE` lines of the page.
    fn names() -> BTreeSet<String> {
        let metrics = Metrics::new("m");
        // A family without members is not on the page.
        metrics.count_steps(&AcceptStats {
            accepted_at: vec![1],
            proposals_at: vec![1],
            ..AcceptStats::default()
        });
        metrics.count_finished("stop");
        metrics.count_request("/health", 200);
        metrics.count_swap("kept");
        let page = metrics.page(0.0);
        let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        types
            .flat_map(|(name, kind)| match kind {
                "counter" => vec![format!("{name}_total")],
                "histogram" => ["bucket", "sum", "count"].map(|part| format!("{name}_{part}")).to_vec(),
                _ => vec![name.to_owned()],
            })
            .collect()
    }

    #[test]
    fn the_dashboard_asks_for_metrics_that_there_are() {
        let dashboard = include_str!("../../../contrib/grafana-dashboard.json");
        let names = names();
        let mut asked = BTreeSet::new();
        for prefix in ["vllm:", "draftsmith:"] {
            for (at, _) in dashboard.match_indices(prefix) {
                let rest = &dashboard[at + prefix.len()..];
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap();
                asked.insert(format!("{prefix}{}", &rest[..end]));
            }
        }
        assert!(asked.len() >= 14, "{asked:?}");
        let missing: Vec<_> = asked.difference(&names).collect();
        assert!(missing.is_empty(), "{missing:?} are not among {names:?}");
    }
}
