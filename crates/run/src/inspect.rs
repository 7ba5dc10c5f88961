//! What lies at a path: a model, a draft, a bundle, a cache, a checkpoint, a token file or a whole run, as one tree.
//!
//! Containers are read by their own readers, so what is shown was checked; a damaged file is an error that names it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use draftsmith_bundle::{BUNDLE_FORMAT, CONFIG_FILE, MANIFEST_FILE, Manifest, WEIGHTS_FILE};
use draftsmith_formats::atomic;
use draftsmith_formats::cache::CacheManifest;
use draftsmith_formats::gguf::{GgufFile, GgufValue, SplitName, content_sha256, parts_of};
use draftsmith_formats::hash::{sha256_file, sha256_hex};
use draftsmith_formats::safetensors_dir::SafetensorsDir;
use draftsmith_formats::tokens::TokenFile;
use draftsmith_kernels::WeightDtype;
use draftsmith_model::{ModelError, weight_dtype};
use draftsmith_pull::is_hub_name;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::Error;
use crate::disk::human;
use crate::state::RunFolder;

/// Characters of a hash in the text form; JSON has all.
const HASH_SHOWN: usize = 12;
/// Longest value in the text form.
const VALUE_SHOWN: usize = 72;

/// Dots of a tensor's name that make a branch; names are foreign text and may hold any number.
const NAME_DEPTH: usize = 16;

/// A folder, a file, a tensor, or tensors with a common name.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Node {
    /// Name inside its parent.
    pub name: String,
    /// `bundle`, `draft`, `model`, `target cache`, `checkpoint`, `run`, `state of a run`, `folder`, `gguf`, `gguf part`,
    /// `safetensors`, `tokens`,
    /// `file`, `tensors`, `tensor`.
    pub kind: &'static str,
    /// Size, contents included.
    pub bytes: u64,
    /// Element type of a tensor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// Row-major shape of a tensor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<Vec<usize>>,
    /// Hash of a file or of a tensor's bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What the file says about itself.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub facts: Map<String, Value>,
    /// What it holds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<Node>,
}

/// Looks at a path. `hashes`: read every byte and name its hash.
///
/// # Errors
/// A path that is not there, or a file that is damaged, named.
pub fn inspect(path: &Path, hashes: bool) -> Result<Node, Error> {
    let name =
        path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    if !path.exists() {
        let what = "a model, draft, bundle, cache, checkpoint, token file or the folder of a run";
        let advice = match is_hub_name(path) {
            true => format!(
                "`draftsmith pull hf:{}` fetches a repository of the hub and prints its place; give that, or {what}",
                path.display()
            ),
            false => format!("give {what}"),
        };
        return Err(Error::input(format!("`{}` does not exist", path.display()), advice));
    }
    // Asked for by name, a part stands for its model; in a folder the first one does.
    let parts = if is_gguf(path) { parts_of(path)? } else { Vec::new() };
    if parts.len() > 1 {
        return split(path, &parts, name, hashes);
    }
    node(path, name, hashes)
}

fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|e| e == "gguf")
}

/// A model in several files, as one: sizes and hash are those of all parts.
fn split(path: &Path, parts: &[PathBuf], name: String, hashes: bool) -> Result<Node, Error> {
    let mut bytes = 0;
    for part in parts {
        bytes += std::fs::metadata(part).map_err(|e| Error::unreadable(part, e))?.len();
    }
    let sha256 = if hashes { Some(content_sha256(path)?) } else { None };
    Ok(gguf(&GgufFile::open(path)?, Node { name, bytes, sha256, ..Node::default() }, hashes))
}

fn node(path: &Path, name: String, hashes: bool) -> Result<Node, Error> {
    if !path.is_dir() {
        let part = path.file_name().and_then(|n| n.to_str()).and_then(SplitName::parse);
        if let Some(part) = part.filter(|part| part.count > 1 && is_gguf(path)) {
            let parts = parts_of(path)?;
            if part.no == 1 && parts.len() > 1 {
                return split(path, &parts, name, hashes);
            }
            if parts.len() > 1 {
                // Its tensors stand under the first part.
                let sha256 = if hashes { Some(sha256_file(path)?) } else { None };
                return Ok(Node { name, kind: "gguf part", bytes: 0, sha256, ..Node::default() });
            }
        }
        return file(path, name, hashes);
    }
    let (kind, facts) = folder_facts(path)?;
    let mut children = Vec::new();
    // What the layers of a quantised model run as, by their largest tensors.
    let forms: BTreeMap<String, &str> = match kind {
        "model" => match draftsmith_model::quantised_layers(path) {
            Ok(layers) => layers.into_iter().map(|l| (l.tensor, l.form)).collect(),
            // A method or layout that is not read: files are shown as they are.
            Err(ModelError::QuantisedConfig { .. } | ModelError::Config(_)) => BTreeMap::new(),
            Err(error) => return Err(error.into()),
        },
        _ => BTreeMap::new(),
    };
    for entry in entries(path)? {
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut child = node(&entry, name, hashes)?;
        if child.kind == "safetensors" && !forms.is_empty() {
            child.children.iter_mut().for_each(|tensor| add_form(tensor, "", &forms));
        }
        children.push(child);
    }
    let bytes = children.iter().map(|c| c.bytes).sum();
    Ok(Node { name, kind, bytes, facts, children, ..Node::default() })
}

/// Adds the form that a tensor runs in, here or further down.
fn add_form(node: &mut Node, before: &str, forms: &BTreeMap<String, &str>) {
    let name = format!("{before}{}", node.name);
    if node.kind == "tensor"
        && let Some(form) = forms.get(&name)
    {
        node.facts.insert("runs_as".into(), (*form).into());
    }
    node.children.iter_mut().for_each(|child| add_form(child, &format!("{name}."), forms));
}

/// Files and folders inside, by name; hidden ones are work in progress. Links are not followed into folders: one could
/// lead in a circle.
fn entries(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let unreadable = |e| Error::unreadable(path, e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        let link = entry.file_type().map_err(unreadable)?.is_symlink();
        if !(hidden || link && entry.path().is_dir()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => Map::from_iter([("value".to_string(), other)]),
    }
}

/// A JSON file as an object of facts.
fn json_facts(path: &Path) -> Result<Map<String, Value>, Error> {
    let value: Value = serde_json::from_slice(&atomic::read(path)?).map_err(|e| {
        Error::input(
            format!("`{}` is no JSON: {e}", path.display()),
            "correct the file, or take it anew from where it came",
        )
    })?;
    Ok(object(value))
}

/// What a folder is, and what it says about itself.
fn folder_facts(path: &Path) -> Result<(&'static str, Map<String, Value>), Error> {
    // Stage files have the names of stages; one of them is `bundle.json`.
    if is_state_folder(path) {
        return Ok(("state of a run", Map::new()));
    }
    if is_bundle(path) {
        let manifest = Manifest::read(path)?;
        let mut facts = object(serde_json::to_value(&manifest).unwrap_or_default());
        // The files stand below with their hashes as they are.
        facts.remove("files");
        return Ok(("bundle", facts));
    }
    // Another `manifest.json` is just a file.
    if let Ok(Some(manifest)) = CacheManifest::read(path) {
        let mut facts = object(serde_json::to_value(&manifest.spec).unwrap_or_default());
        facts.insert("complete".into(), manifest.complete.into());
        facts.insert("rows_done".into(), manifest.rows_done().into());
        return Ok(("target cache", facts));
    }
    if path.join("state.json").is_file() && path.join("tensors.safetensors").is_file() {
        return Ok(("checkpoint", json_facts(&path.join("state.json"))?));
    }
    if path.join("run.toml").is_file() && path.join("state").is_dir() {
        return Ok(("run", Map::new()));
    }
    if path.join(CONFIG_FILE).is_file() {
        let facts = json_facts(&path.join(CONFIG_FILE))?;
        let draft = ["draft_vocab_size", "speculators_model_type"].iter().any(|key| facts.contains_key(*key));
        return Ok((if draft { "draft" } else { "model" }, facts));
    }
    Ok(("folder", Map::new()))
}

/// The folder in which a run keeps its stage files.
fn is_state_folder(path: &Path) -> bool {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    path.file_name().is_some_and(|name| name == "state")
        && path.parent().is_some_and(|root| RunFolder::new(root).is_run())
}

/// True for a folder that means to be a bundle: a manifest that is damaged counts if there are weights beside it.
/// Anything else that is called `bundle.json`, such as the record of a workload of that name, is just a file.
fn is_bundle(path: &Path) -> bool {
    let manifest = path.join(MANIFEST_FILE);
    manifest.is_file()
        && (path.join(WEIGHTS_FILE).is_file()
            || json_facts(&manifest)
                .is_ok_and(|facts| facts.get("format").is_some_and(|f| f.as_str() == Some(BUNDLE_FORMAT))))
}

fn file(path: &Path, name: String, hashes: bool) -> Result<Node, Error> {
    let bytes = std::fs::metadata(path).map_err(|e| Error::unreadable(path, e))?.len();
    let sha256 = if hashes { Some(sha256_file(path)?) } else { None };
    let base = Node { name, bytes, sha256, kind: "file", ..Node::default() };
    let ends = |end: &str| path.extension().is_some_and(|e| e == end);
    if ends("gguf") {
        return Ok(gguf(&GgufFile::open(path)?, base, hashes));
    }
    if ends("safetensors") {
        let open = SafetensorsDir::open(path)?;
        let tensors = open
            .names()
            .filter_map(|name| open.find(name))
            .map(|t| tensor(t.name, format!("{:?}", t.dtype), t.shape.to_vec(), t.bytes, hashes))
            .collect();
        return Ok(Node { kind: "safetensors", children: grouped(tensors, NAME_DEPTH), ..base });
    }
    if ends("tokens") {
        let open = TokenFile::open(path)?;
        let summary = open.summary();
        let mut facts = object(json!({
            "rows": summary.rows,
            "tokens": summary.tokens,
            "trained_tokens": summary.trained_tokens,
            "content_sha256": summary.sha256,
        }));
        facts.extend(open.meta().iter().map(|(key, value)| (key.clone(), value.clone().into())));
        return Ok(Node { kind: "tokens", facts, ..base });
    }
    Ok(base)
}

/// A GGUF model's metadata and tensors, added to what is known of its file.
fn gguf(file: &GgufFile<'_>, base: Node, hashes: bool) -> Node {
    let mut facts: Map<String, Value> =
        file.metadata().iter().map(|(key, value)| (key.clone(), gguf_fact(value))).collect();
    if let Some(bytes) = bytes_per_token(file) {
        facts.insert("bytes_per_token".into(), bytes.into());
    }
    let tensors = file
        .tensors()
        .iter()
        .map(|t| {
            let shape = t.dims.iter().rev().copied().collect();
            let mut node = tensor(&t.name, t.ggml_type.to_string(), shape, file.data(t), hashes);
            if let Some(form) = weight_dtype(t.ggml_type).and_then(WeightDtype::widened) {
                node.facts.insert("runs_as".into(), form.into());
            }
            node
        })
        .collect();
    Node { kind: "gguf", facts, children: grouped(tensors, NAME_DEPTH), ..base }
}

/// Bytes of the weights that compute a token of a model with experts: of those the share that is chosen, and not the
/// embedding, of which a row is read, unless it is the head, too.
fn bytes_per_token(file: &GgufFile<'_>) -> Option<u64> {
    let arch = file.get_str("general.architecture").ok()?;
    let count = |key: &str| file.find_u64(&format!("{arch}.{key}")).ok().flatten();
    let (experts, used) = (count("expert_count")?, count("expert_used_count")?);
    if used == 0 || used > experts {
        return None;
    }
    let tied = file.find_tensor("output.weight").is_none();
    let read = file.tensors().iter().filter(|t| tied || t.name != "token_embd.weight").map(|t| {
        let bytes = t.byte_len as u64;
        // A tensor of all experts holds equal parts.
        if t.name.contains("_exps.") { bytes / experts * used } else { bytes }
    });
    Some(read.sum())
}

/// A metadata value; of an array only what it is, for vocabularies have many thousand entries.
fn gguf_fact(value: &GgufValue) -> Value {
    match value {
        GgufValue::Array(array) if array.len() > 8 => {
            format!("{} of {}", value.type_name(), array.len()).into()
        }
        GgufValue::Array(array) => match array.to_i64() {
            Some(numbers) => numbers.into(),
            None => format!("{} of {}", value.type_name(), array.len()).into(),
        },
        GgufValue::Str(text) => text.clone().into(),
        GgufValue::Bool(flag) => (*flag).into(),
        GgufValue::F32(x) => f64::from(*x).into(),
        GgufValue::F64(x) => (*x).into(),
        GgufValue::U64(n) => (*n).into(),
        other => other.to_i64().into(),
    }
}

fn tensor(name: &str, dtype: String, shape: Vec<usize>, bytes: &[u8], hashes: bool) -> Node {
    Node {
        name: name.to_string(),
        kind: "tensor",
        bytes: bytes.len() as u64,
        dtype: Some(dtype),
        shape: Some(shape),
        sha256: hashes.then(|| sha256_hex(bytes)),
        ..Node::default()
    }
}

/// Tensors as a tree of their dotted names, `depth` levels deep; a branch with a single twig is one.
fn grouped(tensors: Vec<Node>, depth: usize) -> Vec<Node> {
    if depth == 0 {
        return tensors;
    }
    let mut branches: BTreeMap<Natural, Vec<Node>> = BTreeMap::new();
    for mut tensor in tensors {
        let (first, rest) = match tensor.name.split_once('.') {
            Some((first, rest)) => (first.to_string(), rest.to_string()),
            None => (tensor.name.clone(), String::new()),
        };
        tensor.name = rest;
        branches.entry(Natural::of(first)).or_default().push(tensor);
    }
    let mut nodes = Vec::new();
    for (Natural(_, name), mut members) in branches {
        let joined = |rest: &str| if rest.is_empty() { name.clone() } else { format!("{name}.{rest}") };
        // A tensor that is itself the start of other names stays beside them.
        let (own, below): (Vec<Node>, Vec<Node>) = members.drain(..).partition(|m| m.name.is_empty());
        nodes.extend(own.into_iter().map(|m| Node { name: name.clone(), ..m }));
        let mut children = grouped(below, depth - 1);
        match children.len() {
            0 => {}
            1 => {
                let only = children.remove(0);
                nodes.push(Node { name: joined(&only.name), ..only });
            }
            _ => {
                let bytes = children.iter().map(|c| c.bytes).sum();
                nodes.push(Node { name, kind: "tensors", bytes, children, ..Node::default() });
            }
        }
    }
    nodes
}

/// A name that sorts `2` before `10`.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Natural(Option<u64>, String);

impl Natural {
    fn of(name: String) -> Natural {
        Natural(name.parse().ok(), name)
    }
}

impl Node {
    /// The tree as text, facts above contents. Ends with a line feed.
    pub fn text(&self) -> String {
        let mut out = String::new();
        self.write(0, &mut out);
        out
    }

    fn write(&self, depth: usize, out: &mut String) {
        let indent = "  ".repeat(depth);
        let mut line = format!("{indent}{}", self.name);
        if let (Some(dtype), Some(shape)) = (&self.dtype, &self.shape) {
            let _ = write!(line, "  {dtype} {shape:?}");
        } else {
            let _ = write!(line, "  ({})", self.kind);
        }
        let _ = write!(line, "  {}", human(self.bytes));
        if let Some(sha256) = &self.sha256 {
            let _ = write!(line, "  {}", &sha256[..HASH_SHOWN.min(sha256.len())]);
        }
        let _ = writeln!(out, "{line}");
        for (key, value) in &self.facts {
            let text = match value {
                Value::String(text) => text.replace('\n', "\\n"),
                other => other.to_string(),
            };
            let shown: String = text.chars().take(VALUE_SHOWN).collect();
            let more = if shown.len() < text.len() { "…" } else { "" };
            let _ = writeln!(out, "{indent}  {key} = {shown}{more}");
        }
        for child in &self.children {
            child.write(depth + 1, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(names: &[&str], expected: &[&str]) {
        let tensors = names.iter().map(|name| tensor(name, "F32".into(), vec![1], &[0; 4], false)).collect();
        fn list(nodes: &[Node], depth: usize, found: &mut Vec<String>) {
            for node in nodes {
                found.push(format!("{}{}", "-".repeat(depth), node.name));
                list(&node.children, depth + 1, found);
            }
        }
        let mut found = Vec::new();
        list(&grouped(tensors, NAME_DEPTH), 0, &mut found);
        assert_eq!(found, expected);
    }

    #[test]
    fn names_become_a_tree_in_the_order_that_people_count() {
        check(
            &["m.layers.10.q", "m.layers.2.q", "m.layers.2.k", "m.norm", "d2t"],
            &["d2t", "m", "-layers", "--2", "---k", "---q", "--10.q", "-norm"],
        );
    }

    #[test]
    fn a_type_that_runs_in_a_wider_form_says_so() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/gguf/all_types.gguf");
        let node = inspect(&path, false).unwrap();
        let form = |name: &str| {
            let tensor = node.children.iter().find(|n| n.name == name).unwrap();
            tensor.facts.get("runs_as").cloned()
        };
        assert_eq!(form("iq2_xs"), Some("8 bits, an f32 scale per 16".into()));
        assert_eq!(form("tq1_0"), Some("2 bits, an f16 scale per 32".into()));
        assert_eq!(form("q5_k"), None);
        assert!(node.text().contains("runs_as = 8 bits, an f32 scale per 32"));
    }

    #[test]
    fn layers_of_a_quantised_folder_say_what_they_run_as() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/quantised");
        for (name, tensor, wanted) in [
            ("gptq_g32_act", "qweight", "4 bits, f16 and zero per group, inputs reordered"),
            ("ct_int4_channel", "weight_packed", "4 bits, f32 and zero per group"),
            ("fp8_block", "weight", "FP8, f32 per group"),
        ] {
            let text = inspect(&path.join(name), false).unwrap().text();
            let shown = format!("runs_as = {wanted}\n");
            assert!(text.contains(&shown), "{name} {tensor}: {text}");
        }
        let plain = inspect(&path.join("../families/llama"), false).unwrap().text();
        assert!(!plain.contains("runs_as"), "{plain}");
    }

    #[test]
    fn a_name_that_begins_another_stays_beside_it() {
        check(&["a", "a.b", "a.c"], &["a", "a", "-b", "-c"]);
    }
}
