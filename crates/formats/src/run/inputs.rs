//! Which keys a stage depends on, and hashes over them.
//!
//! Invariant: a key that stands at its default is no input. So a later version may add a key, and finished work is
//! still recognised as long as nobody sets it. The map is as good as the full one: what is missing has its default.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use super::{RunFile, Stage, eagle3, flatten};
use crate::hash;

/// Keys that the first version of run folders put into a stage's hash, defaults included. `N` is any index, a last `*`
/// any rest. Never changed.
const KEYS_V1: [(&str, &[&str]); 10] = [
    ("run", &["seed", "device", "gpu_dtype"]),
    ("target", &["source", "sha256", "precision", "max_context"]),
    (
        "data",
        &[
            "sources.N.path",
            "sources.N.weight",
            "sources.N.max_rows",
            "max_length",
            "min_trained_tokens",
            "dedupe",
            "validation_rows",
            "validation",
            "system",
            "template",
        ],
    ),
    (
        "regenerate",
        &[
            "enabled",
            "max_new_tokens",
            "temperature",
            "top_p",
            "seed",
            "greedy_share",
            "max_rows",
            "max_tokens",
            "max_loop_share",
            "max_cut_share",
            "server.model",
            "server.api",
            "server.extra.*",
        ],
    ),
    ("capture", &["mode", "layers", "dtype", "shard_rows", "server.kind", "server.model"]),
    (
        "draft",
        &[
            "method",
            "vocab_size",
            "hidden",
            "intermediate",
            "heads",
            "kv_heads",
            "init",
            "fc_norm",
            "norm_output",
        ],
    ),
    (
        "train",
        &[
            "ttt_length",
            "step_decay",
            "loss",
            "kl_scale",
            "kl_decay",
            "lr",
            "warmup_ratio",
            "schedule",
            "weight_decay",
            "beta1",
            "beta2",
            "max_grad_norm",
            "epochs",
            "max_steps",
            "tokens_per_step",
            "pack_length",
            "seed",
        ],
    ),
    ("validate", &["every", "prompts", "max_new_tokens", "depth", "average_best", "domains.*"]),
    ("bundle", &["name", "license", "base_model"]),
    (
        "bench",
        &["workloads", "limit", "max_new_tokens", "depth", "tree.depth", "tree.top_k", "tree.nodes", "auto"],
    ),
];

/// Keys without a default of their own: they are always inputs.
const ALWAYS: [&str; 2] = ["target.source", "data.sources.N.path"];

/// Values of all keys that have a default, by dotted key with `N` for indices.
fn defaults() -> &'static BTreeMap<String, String> {
    static DEFAULTS: OnceLock<BTreeMap<String, String>> = OnceLock::new();
    DEFAULTS.get_or_init(|| {
        let text = "[target]\nsource = \"-\"\n[data]\nsources = [{ path = \"-\" }]\n";
        let file = RunFile::parse(Path::new("defaults"), text, &[]).expect("the smallest run file is one");
        let mut table = file.to_table();
        eagle3::to_old_places(&mut table);
        let mut flat = BTreeMap::new();
        flatten("", &toml::Value::Table(table), &mut flat);
        let mut out: BTreeMap<String, String> =
            flat.into_iter().map(|(key, value)| (without_indices(&key), value)).collect();
        ALWAYS.iter().for_each(|key| drop(out.remove(*key)));
        out
    })
}

/// `data.sources.0.path` → `data.sources.N.path`.
pub(super) fn without_indices(key: &str) -> String {
    let parts = key.split('.').map(|part| match part.bytes().all(|b| b.is_ascii_digit()) {
        true if !part.is_empty() => "N",
        _ => part,
    });
    parts.collect::<Vec<_>>().join(".")
}

fn is_of_v1(key: &str) -> bool {
    let key = without_indices(key);
    let Some((table, rest)) = key.split_once('.') else { return false };
    let Some((_, known)) = KEYS_V1.iter().find(|(name, _)| *name == table) else { return false };
    known.iter().any(|known| match known.strip_suffix('*') {
        Some(prefix) => rest.starts_with(prefix),
        None => rest == *known,
    })
}

impl RunFile {
    /// What a stage depends on in the run file: values that can change its results (those of its own table and of the
    /// tables before it) and are not the default, by dotted key. Names, folders, threads, logging and checkpoint
    /// intervals are not among them, so changing those does not make finished work stale.
    pub fn stage_inputs(&self, stage: Stage) -> BTreeMap<String, String> {
        let mut flat = BTreeMap::new();
        flatten("", &toml::Value::Table(self.stage_keys(stage)), &mut flat);
        let defaults = defaults();
        flat.retain(|key, value| defaults.get(&without_indices(key)) != Some(value));
        flat
    }

    /// SHA-256 over [`RunFile::stage_inputs`].
    pub fn stage_hash(&self, stage: Stage) -> String {
        let mut hasher = hash::Hasher::default();
        for (key, value) in &self.stage_inputs(stage) {
            hasher.field(key.as_bytes());
            hasher.field(value.as_bytes());
        }
        hasher.finish()
    }

    /// The hash that the first version of run folders had for a stage, which went over all its keys, defaults included.
    /// `None` if a key is set that did not exist then.
    pub fn stage_hash_v1(&self, stage: Stage) -> Option<String> {
        let mut flat = BTreeMap::new();
        flatten("", &toml::Value::Table(self.stage_keys(stage)), &mut flat);
        let set = self.stage_inputs(stage);
        let mut hasher = hash::Hasher::default();
        for (key, value) in &flat {
            match (is_of_v1(key), set.contains_key(key)) {
                (true, _) => {
                    hasher.field(key.as_bytes());
                    hasher.field(value.as_bytes());
                }
                (false, false) => {}
                (false, true) => return None,
            }
        }
        Some(hasher.finish())
    }
}
