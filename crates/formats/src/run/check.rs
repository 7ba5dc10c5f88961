//! Rules between the keys of a run file that types alone do not express.

use super::{CaptureServerKind, CaptureServerTable, Device, Products, RunFile, ServerTable};
use crate::hash::is_sha256_hex;

/// A broken rule: dotted key, what is wrong, and advice where there is any.
pub(super) struct Broken {
    pub(super) key: String,
    pub(super) problem: String,
    pub(super) advice: Option<String>,
}

impl Broken {
    fn inside(self, table: &str) -> Broken {
        Broken { key: format!("{table}.{}", self.key), ..self }
    }
}

pub(super) fn broken(key: &str, problem: impl Into<String>) -> Result<(), Broken> {
    Err(Broken { key: key.to_string(), problem: problem.into(), advice: None })
}

pub(super) fn broken_with(
    key: &str,
    problem: impl Into<String>,
    advice: impl Into<String>,
) -> Result<(), Broken> {
    Err(Broken { key: key.to_string(), problem: problem.into(), advice: Some(advice.into()) })
}

/// `value` must be finite and inside; the bounds are named in words because some are open.
pub(super) fn number(key: &str, value: f64, inside: bool, wanted: &str) -> Result<(), Broken> {
    if value.is_finite() && inside { Ok(()) } else { broken(key, format!("is {value}, expected {wanted}")) }
}

pub(super) fn positive(key: &str, value: u64) -> Result<(), Broken> {
    if value > 0 { Ok(()) } else { broken(key, "is 0, expected at least 1") }
}

pub(super) fn at_most(key: &str, value: u64, limit: u64) -> Result<(), Broken> {
    if value <= limit { Ok(()) } else { broken(key, format!("is {value}, expected at most {limit}")) }
}

/// An address that may stand in a file that others read.
fn check_address(key: &str, url: &str, example: &str) -> Result<(), Broken> {
    let host = ["http://", "https://"].iter().find_map(|scheme| url.strip_prefix(scheme));
    let odd = |c: char| c.is_whitespace() || "?#".contains(c);
    if host.is_none_or(|host| host.is_empty() || host.starts_with('/')) || url.contains(odd) {
        return broken(key, format!("is `{url}`, expected an address like `{example}`"));
    }
    if url.contains('@') {
        // The run file is kept beside the results and goes into the bundle.
        return broken_with(
            key,
            "holds a user name or password",
            "put the key into an environment variable and its name into `key_env` of this table",
        );
    }
    Ok(())
}

/// One address or several, and what goes with them. Keys are relative to the table.
fn check_addresses(
    (url, urls): (&Option<String>, &Option<Vec<String>>),
    weights: &Option<Vec<f64>>,
    example: &str,
) -> Result<(), Broken> {
    match (url, urls) {
        (Some(url), None) => {
            check_address("url", url, example)?;
            if weights.is_some() {
                let advice = "leave it out, or name several addresses in `urls`";
                return broken_with("weights", "is set, but there is only one server", advice);
            }
        }
        (None, Some(urls)) => {
            check_list("urls", urls, example)?;
            let Some(weights) = weights else { return Ok(()) };
            check_count("weights", weights.len(), urls.len())?;
            for (i, weight) in weights.iter().enumerate() {
                let inside = *weight > 0.0 && *weight <= 100.0;
                number(&format!("weights.{i}"), *weight, inside, "a number above 0 and at most 100")?;
            }
        }
        (Some(_), Some(_)) => {
            let advice =
                "leave one of them out: `url` is the address of one server, `urls` are those of several";
            return broken_with("urls", "is set beside `url`", advice);
        }
        (None, None) => {
            let advice = format!("name the server's address, for example `url = \"{example}\"`");
            return broken_with("url", "is missing", advice);
        }
    }
    Ok(())
}

/// Addresses, each once.
fn check_list(key: &str, urls: &[String], example: &str) -> Result<(), Broken> {
    if urls.is_empty() {
        return broken_with(key, "is an empty list", format!("name at least one address, `{example}`"));
    }
    for (i, url) in urls.iter().enumerate() {
        check_address(&format!("{key}.{i}"), url, example)?;
        let plain = |url: &String| url.trim_end_matches('/').to_ascii_lowercase();
        if urls[..i].iter().any(|other| plain(other) == plain(url)) {
            let advice = "name each server once; `weights` says how much one may have under way";
            return broken_with(&format!("{key}.{i}"), format!("names `{url}` again"), advice);
        }
    }
    Ok(())
}

/// One for each address.
fn check_count(key: &str, found: usize, wanted: usize) -> Result<(), Broken> {
    if found == wanted {
        return Ok(());
    }
    let entries = |n: usize| if n == 1 { "1 entry".to_string() } else { format!("{n} entries") };
    let problem = format!("has {}, but `urls` has {}", entries(found), entries(wanted));
    broken_with(key, problem, format!("give `{key}` one entry for each address, in the same order"))
}

fn check_patience(timeout_s: f64, retries: u32) -> Result<(), Broken> {
    let wanted = "seconds above 0, at most a day";
    number("timeout_s", timeout_s, timeout_s > 0.0 && timeout_s <= 86_400.0, wanted)?;
    at_most("retries", u64::from(retries), 100)
}

impl CaptureServerTable {
    /// Keys are relative to the table.
    fn check(&self) -> Result<(), Broken> {
        let unused = |key: &str, is_set: bool, kind: &str| match is_set {
            true => broken(key, format!("is set, but means nothing for `{kind}`")),
            false => Ok(()),
        };
        let addresses = (&self.url, &self.urls);
        let several = self.urls.is_some();
        // What goes with one address, and what with several.
        let other = |key: &str, is_set: bool, instead: &str| match is_set {
            true => {
                let which = if several { "`urls` has several" } else { "`url` is one" };
                broken_with(key, format!("is set, but {which}"), format!("use `{instead}` in its place"))
            }
            false => Ok(()),
        };
        match self.kind {
            CaptureServerKind::Vllm => {
                check_addresses(addresses, &self.weights, "http://127.0.0.1:8000/v1")?;
                unused("final_url", self.final_url.is_some(), "vllm")?;
                unused("final_urls", self.final_urls.is_some(), "vllm")?;
                other("shared_dirs", self.shared_dirs.is_some() && !several, "shared_dir")?;
                match (&self.shared_dir, &self.shared_dirs) {
                    (Some(_), Some(_)) => {
                        let advice = "leave one of them out: `shared_dir` is one folder for all servers";
                        return broken_with("shared_dirs", "is set beside `shared_dir`", advice);
                    }
                    (None, Some(dirs)) => check_count("shared_dirs", dirs.len(), self.addresses().len())?,
                    (Some(_), None) => {}
                    (None, None) => {
                        let advice = "name the folder that the server writes to (`shared_storage_path`), as seen from here";
                        return broken_with(
                            "shared_dir",
                            "is missing, but vLLM hands states out as files",
                            advice,
                        );
                    }
                }
            }
            CaptureServerKind::Sglang => {
                check_addresses(addresses, &self.weights, "http://127.0.0.1:30000")?;
                other("final_url", self.final_url.is_some() && several, "final_urls")?;
                other("final_urls", self.final_urls.is_some() && !several, "final_url")?;
                let example = "http://127.0.0.1:30001";
                match (&self.final_url, &self.final_urls) {
                    (Some(final_url), _) => check_address("final_url", final_url, example)?,
                    (None, Some(final_urls)) => {
                        check_list("final_urls", final_urls, example)?;
                        check_count("final_urls", final_urls.len(), self.addresses().len())?;
                    }
                    (None, None) => {
                        let (key, advice) = match several {
                            false => (
                                "final_url",
                                "start a second server of the same model without speculation, and name it here",
                            ),
                            true => (
                                "final_urls",
                                "start a second server without speculation for each of `urls`, and name them here",
                            ),
                        };
                        let problem = "is missing, but one SGLang server shows captured layers or final states, not both";
                        return broken_with(key, problem, advice);
                    }
                }
                unused("shared_dir", self.shared_dir.is_some(), "sglang")?;
                unused("shared_dirs", self.shared_dirs.is_some(), "sglang")?;
                unused("model", self.model.is_some(), "sglang")?;
            }
        }
        positive("concurrency", u64::from(self.concurrency))?;
        at_most("concurrency", u64::from(self.concurrency), 1024)?;
        check_patience(self.timeout_s, self.retries)
    }
}

impl ServerTable {
    /// The first key that cannot be, and why; for tables that come from elsewhere than a run file.
    pub fn problem(&self) -> Option<(String, String)> {
        self.check().err().map(|broken| (broken.key, broken.problem))
    }

    /// Keys are relative to the table.
    fn check(&self) -> Result<(), Broken> {
        check_addresses((&self.url, &self.urls), &self.weights, "http://127.0.0.1:8000/v1")?;
        check_patience(self.timeout_s, self.retries)?;
        match self.extra.keys().find(|key| Self::OWN_FIELDS.contains(&key.as_str())) {
            Some(own) => broken(&format!("extra.{own}"), "is set by a key of its own"),
            None => Ok(()),
        }
    }
}

/// Longest chain or deepest tree that makes sense to draft.
const MAX_DEPTH: u64 = 64;

/// One rule of a run file.
pub(super) type Rule = fn(&RunFile) -> Result<(), Broken>;

impl RunFile {
    /// The rules, table by table; each gives the first that is broken.
    pub(super) const RULES: [Rule; 5] = [
        RunFile::check_run_and_target,
        RunFile::check_data,
        RunFile::check_capture_and_draft,
        RunFile::check_train,
        RunFile::check_validate_and_bench,
    ];

    fn check_run_and_target(&self) -> Result<(), Broken> {
        let name = &self.run.name;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            let problem = format!("is `{name}`, expected letters, digits, `-`, `_` and `.`");
            return broken("run.name", problem);
        }
        if let Some(threads) = self.run.threads {
            positive("run.threads", u64::from(threads))?;
        }
        if self.target.source.0.is_empty() {
            return broken("target.source", "is an empty list");
        }
        if self.target.source.0.iter().any(|s| s.trim().is_empty()) {
            return broken("target.source", "has an empty model reference");
        }
        if let Some(sha256) = &self.target.sha256
            && !is_sha256_hex(sha256)
        {
            let problem = format!("is `{sha256}`, expected 64 lower-case hex digits");
            return broken("target.sha256", problem);
        }
        match self.target.max_context {
            Some(n) => positive("target.max_context", u64::from(n)),
            None => Ok(()),
        }
    }

    fn check_data(&self) -> Result<(), Broken> {
        let data = &self.data;
        if data.sources.is_empty() {
            return broken("data.sources", "is an empty list");
        }
        for (i, source) in data.sources.iter().enumerate() {
            if source.path.trim().is_empty() {
                return broken(&format!("data.sources.{i}.path"), "is empty");
            }
            let weight = source.weight;
            number(&format!("data.sources.{i}.weight"), weight, weight > 0.0, "a number above 0")?;
        }
        if data.max_length < 2 {
            return broken("data.max_length", format!("is {}, expected at least 2", data.max_length));
        }
        if let Some(max) = self.target.max_context
            && data.max_length > max
        {
            let problem = format!("is {}, more than `target.max_context` = {max}", data.max_length);
            return broken("data.max_length", problem);
        }
        let regenerate = &self.regenerate;
        positive("regenerate.max_new_tokens", u64::from(regenerate.max_new_tokens))?;
        positive("regenerate.batch_size", u64::from(regenerate.batch_size))?;
        let (t, p, share) = (regenerate.temperature, regenerate.top_p, regenerate.greedy_share);
        number("regenerate.temperature", t, t >= 0.0, "a number of at least 0")?;
        number("regenerate.top_p", p, p > 0.0 && p <= 1.0, "a number above 0 and at most 1")?;
        for (key, share) in [
            ("regenerate.greedy_share", share),
            ("regenerate.max_loop_share", regenerate.max_loop_share),
            ("regenerate.max_cut_share", regenerate.max_cut_share),
        ] {
            number(key, share, (0.0..=1.0).contains(&share), "a number from 0 to 1")?;
        }
        if regenerate.enabled && data.validation.is_none() && data.validation_rows == 0 {
            let problem = "is 0, but some conversations are always held out and answered too";
            return broken_with(
                "data.validation_rows",
                problem,
                "hold back some rows, or name a file in `data.validation`",
            );
        }
        let server = regenerate.server.as_ref();
        server.map_or(Ok(()), |server| server.check().map_err(|broken| broken.inside("regenerate.server")))
    }

    fn check_capture_and_draft(&self) -> Result<(), Broken> {
        positive("capture.shard_rows", u64::from(self.capture.shard_rows))?;
        if let Some(server) = &self.capture.server {
            server.check().map_err(|broken| broken.inside("capture.server"))?;
        }
        self.check_store()?;
        let draft = &self.draft;
        if let Some(layers) = &self.capture.layers {
            let wanted = draft.own().captured_layers();
            let ascending = layers.windows(2).all(|w| w[0] < w[1]);
            if layers.is_empty() || wanted.is_some_and(|wanted| layers.len() != wanted) || !ascending {
                let count = wanted.map_or_else(String::new, |wanted| format!("{wanted} "));
                let problem = format!("is {layers:?}, expected {count}layers in ascending order");
                return broken("capture.layers", problem);
            }
        }
        positive("draft.vocab_size", u64::from(draft.vocab_size))?;
        self.check_block_drafts()?;
        for (key, value) in [
            ("draft.hidden", draft.hidden),
            ("draft.intermediate", draft.intermediate),
            ("draft.heads", draft.heads),
            ("draft.kv_heads", draft.kv_heads),
        ] {
            if let Some(value) = value {
                positive(key, u64::from(value))?;
            }
        }
        if let (Some(heads), Some(kv)) = (draft.heads, draft.kv_heads)
            && !heads.is_multiple_of(kv)
        {
            return broken(
                "draft.kv_heads",
                format!("is {kv}, which does not divide `draft.heads` = {heads}"),
            );
        }
        if let (Some(hidden), Some(heads)) = (draft.hidden, draft.heads)
            && !hidden.is_multiple_of(heads)
        {
            return broken(
                "draft.heads",
                format!("is {heads}, which does not divide `draft.hidden` = {hidden}"),
            );
        }
        Ok(())
    }

    fn check_train(&self) -> Result<(), Broken> {
        let t = &self.train;
        let e = &t.eagle3;
        positive("train.eagle3.ttt_length", u64::from(e.ttt_length))?;
        at_most("train.eagle3.ttt_length", u64::from(e.ttt_length), MAX_DEPTH)?;
        number("train.eagle3.step_decay", e.step_decay, e.step_decay > 0.0, "a number above 0")?;
        let scale = e.kl_scale;
        number("train.eagle3.kl_scale", scale, (0.0..=1.0).contains(&scale), "a number from 0 to 1")?;
        number("train.eagle3.kl_decay", e.kl_decay, e.kl_decay >= 0.0, "a number of at least 0")?;
        self.check_block_training()?;
        self.check_replay()?;
        number("train.lr", t.lr, t.lr > 0.0, "a number above 0")?;
        let ratio = t.warmup_ratio;
        number("train.warmup_ratio", ratio, (0.0..=1.0).contains(&ratio), "a number from 0 to 1")?;
        number("train.weight_decay", t.weight_decay, t.weight_decay >= 0.0, "a number of at least 0")?;
        for (key, beta) in [("train.beta1", t.beta1), ("train.beta2", t.beta2)] {
            number(key, beta, (0.0..1.0).contains(&beta), "a number from 0 to below 1")?;
        }
        number("train.max_grad_norm", t.max_grad_norm, t.max_grad_norm > 0.0, "a number above 0")?;
        if t.products != Products::F32 && self.run.device.unwrap_or_default() != Device::Cpu {
            return broken_with(
                "train.products",
                "says how the CPU computes, but `run.device` is not `cpu`",
                "leave it out: a device computes its products its own way",
            );
        }
        positive("train.epochs", u64::from(t.epochs))?;
        positive("train.max_steps", t.max_steps.unwrap_or(1))?;
        positive("train.tokens_per_step", u64::from(t.tokens_per_step))?;
        positive("train.log_every", t.log_every)?;
        positive("train.checkpoint_every", t.checkpoint_every)?;
        positive("train.keep_checkpoints", u64::from(t.keep_checkpoints))?;
        if t.pack_length < self.data.max_length {
            let problem = format!(
                "is {}, but rows can be as long as `data.max_length` = {}",
                t.pack_length, self.data.max_length
            );
            let advice =
                format!("set `train.pack_length` to {} or lower `data.max_length`", self.data.max_length);
            return broken_with("train.pack_length", problem, advice);
        }
        Ok(())
    }

    fn check_validate_and_bench(&self) -> Result<(), Broken> {
        let v = &self.validate;
        positive("validate.prompts", u64::from(v.prompts))?;
        positive("validate.max_new_tokens", u64::from(v.max_new_tokens))?;
        positive("validate.depth", u64::from(v.depth))?;
        at_most("validate.depth", u64::from(v.depth), MAX_DEPTH)?;
        for (domain, share) in &v.domains {
            number(&format!("validate.domains.{domain}"), *share, *share >= 0.0, "a number of at least 0")?;
        }
        if v.every > 0 && self.data.validation.is_none() && self.data.validation_rows < v.prompts {
            let problem = format!(
                "is {}, but `data.validation_rows` holds back only {}",
                v.prompts, self.data.validation_rows
            );
            let advice = "raise `data.validation_rows`, name a file in `data.validation`, or turn validation off \
                          with `validate.every = 0`";
            return broken_with("validate.prompts", problem, advice);
        }
        let b = &self.bench;
        positive("bench.max_new_tokens", u64::from(b.max_new_tokens))?;
        positive("bench.depth", u64::from(b.depth))?;
        at_most("bench.depth", u64::from(b.depth), MAX_DEPTH)?;
        positive("bench.limit", u64::from(b.limit.unwrap_or(1)))?;
        if let Some(tree) = &b.tree {
            positive("bench.tree.depth", u64::from(tree.depth))?;
            at_most("bench.tree.depth", u64::from(tree.depth), MAX_DEPTH)?;
            positive("bench.tree.top_k", u64::from(tree.top_k))?;
            if tree.nodes < tree.depth {
                let problem = format!("is {}, too few for `bench.tree.depth` = {}", tree.nodes, tree.depth);
                return broken("bench.tree.nodes", problem);
            }
        }
        Ok(())
    }
}
