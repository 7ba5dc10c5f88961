//! Where the relative paths of a run file count from.
//!
//! Written → counted → as written: in memory every place is one that the working directory leads to; what is saved, hashed
//! and handed over is what was written, so that it does not matter from where a run file was called. Overrides are typed at
//! a prompt and count from the working directory.

use std::path::{Component, Path, PathBuf};

use super::RunFile;
use crate::bundle_files::{is_of_a_machine, is_reference, portable};

/// Keys whose values are places; `N` is any index.
const KEYS: [&str; 12] = [
    "run.dir",
    "run.paths_from",
    "target.source",
    "data.sources.N.path",
    "data.validation",
    "data.template",
    "capture.server.shared_dir",
    "capture.server.shared_dirs",
    "capture.store.cache_dir",
    DRAFT,
    "bundle.dir",
    "bench.workloads",
];

/// The key of a draft to begin with, where a word alone is a name.
const DRAFT: &str = "draft.from";

/// Whether a draft to begin with is named, rather than told by its folder or by a reference.
pub fn is_bundle_name(place: &str) -> bool {
    !place.contains(['/', ':'])
}

/// Keys of lists are those of their elements too.
fn is_place(key: &str) -> bool {
    KEYS.contains(&key) || key.strip_suffix(".N").is_some_and(|list| KEYS.contains(&list))
}

/// A place in the type that its key has.
enum PlaceMut<'a> {
    Text(&'a mut String),
    Path(&'a mut PathBuf),
}

impl PlaceMut<'_> {
    fn get(&self) -> String {
        match self {
            PlaceMut::Text(text) => (*text).clone(),
            PlaceMut::Path(path) => path.to_string_lossy().into_owned(),
        }
    }

    fn set(self, place: String) {
        match self {
            PlaceMut::Text(text) => *text = place,
            PlaceMut::Path(path) => *path = place.into(),
        }
    }
}

/// True of what [`Path::join`] leads astray: no path, or one that counts from nowhere.
fn is_fixed(place: &str) -> bool {
    place.is_empty()
        || is_reference(place)
        || place == "~"
        || place.starts_with("~/")
        || Path::new(place).is_absolute()
}

/// A place that counts from `from`, as one that counts from the working directory.
fn joined(from: &Path, place: &str) -> String {
    match is_fixed(place) || from.as_os_str().is_empty() {
        true => place.to_string(),
        false => from.join(place).to_string_lossy().into_owned(),
    }
}

/// The way back: what leads to the same from `from`.
fn unjoined(from: &Path, place: &str) -> String {
    if is_fixed(place) && !Path::new(place).is_absolute() || from.as_os_str().is_empty() {
        return place.to_string();
    }
    match Path::new(place).strip_prefix(from) {
        Ok(below) if !below.as_os_str().is_empty() => below.to_string_lossy().into_owned(),
        _ => absolute(place),
    }
}

fn absolute(place: &str) -> String {
    std::path::absolute(place).map_or_else(|_| place.to_string(), |path| path.to_string_lossy().into_owned())
}

/// `recipes/../data/x` → `data/x`, by the letters alone.
fn without_detours(place: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in place.split('/') {
        match (part, parts.last()) {
            ("..", Some(last)) if !matches!(*last, ".." | "." | "") => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    parts.join("/")
}

/// The folder that the paths of a run file with this text count from, seen from the working directory; `default` where it
/// names none.
pub(super) fn counted_from(table: &toml::Table, default: &Path) -> PathBuf {
    let named = table.get("run").and_then(|run| run.get("paths_from")).and_then(toml::Value::as_str);
    match named {
        Some(named) => default.join(named),
        None => default.to_path_buf(),
    }
}

/// The value of an override with its places seen from the root, so that they no longer depend on what those of the run
/// file count from. `key` has `N` for indices.
pub(super) fn fix(key: &str, value: &mut toml::Value) {
    match value {
        toml::Value::String(place) if key == DRAFT && is_bundle_name(place) => {}
        toml::Value::String(place) if is_place(key) && !is_fixed(place) => *place = absolute(place),
        toml::Value::Array(items) => items.iter_mut().for_each(|item| fix(&format!("{key}.N"), item)),
        toml::Value::Table(table) => {
            table.iter_mut().for_each(|(name, value)| fix(&format!("{key}.{name}"), value));
        }
        _ => {}
    }
}

/// What to write in a run file whose paths count from `from` for a path that counts from the working directory.
///
/// ```
/// use draftsmith_formats::run::way_to;
///
/// assert_eq!(way_to("recipes".as_ref(), "data/chats.jsonl"), "../data/chats.jsonl");
/// assert_eq!(way_to("recipes".as_ref(), "recipes/data/chats.jsonl"), "data/chats.jsonl");
/// assert_eq!(way_to("".as_ref(), "data/chats.jsonl"), "data/chats.jsonl");
/// ```
pub fn way_to(from: &Path, place: &str) -> String {
    if is_fixed(place) {
        return place.to_string();
    }
    let plain = |path: &Path| path.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain(from) {
        return absolute(place);
    }
    match Path::new(place).strip_prefix(from) {
        Ok(below) if !below.as_os_str().is_empty() => below.to_string_lossy().into_owned(),
        _ => "../".repeat(from.components().count()) + place,
    }
}

impl RunFile {
    /// The folder that relative paths counted from where they were written, seen from the working directory; empty: that
    /// directory itself.
    pub fn paths_from(&self) -> &Path {
        &self.from
    }

    /// A place of this run file as it was written there. One that the run file cannot lead to (a default, an override)
    /// comes out as it is from the root.
    pub fn as_written(&self, place: &str) -> String {
        unjoined(&self.from, place)
    }

    /// The run file as one whose paths count from the working directory, as they did in earlier versions.
    pub fn from_here(&self) -> RunFile {
        let mut file = self.clone();
        file.places_mut().into_iter().for_each(|place| {
            let shorter = without_detours(&place.get());
            place.set(shorter);
        });
        file.from = PathBuf::new();
        file
    }

    /// The places that mean something on one machine only, as they were written.
    pub fn machine_places(&self) -> Vec<String> {
        let mut written = self.written();
        let mut places: Vec<String> = written.places_mut().iter().map(PlaceMut::get).collect();
        places.extend(written.capture.store.iter().map(|store| store.url.clone()));
        places.retain(|place| is_of_a_machine(place));
        places
    }

    /// The same run with every place as a bundle may name it ([`portable`]); folders of the run that lie elsewhere go back
    /// to their defaults.
    pub fn portable(&self) -> RunFile {
        let mut file = self.written();
        let elsewhere =
            |dir: &Option<PathBuf>| dir.as_ref().is_some_and(|d| is_of_a_machine(&d.to_string_lossy()));
        if elsewhere(&file.run.dir) {
            file.run.dir = Some(PathBuf::from("runs").join(&file.run.name));
        }
        if elsewhere(&file.bundle.dir) {
            file.bundle.dir = Some(file.dir().join("bundle"));
        }
        if let Some(store) = &mut file.capture.store {
            if elsewhere(&store.cache_dir) {
                store.cache_dir = None;
            }
            if is_of_a_machine(&store.url) {
                file.capture.store = None;
            }
        }
        for place in file.places_mut() {
            let named = portable(&place.get());
            place.set(named);
        }
        file
    }

    /// Has all places count from the working directory that counted from `from`.
    pub(super) fn count_from(&mut self, from: PathBuf) {
        self.run.paths_from = None;
        self.places_mut().into_iter().for_each(|place| {
            let there = joined(&from, &place.get());
            place.set(there);
        });
        self.from = from;
    }

    /// The run file as it was written.
    pub(super) fn written(&self) -> RunFile {
        let mut file = self.clone();
        file.places_mut().into_iter().for_each(|place| {
            let written = unjoined(&self.from, &place.get());
            place.set(written);
        });
        file.from = PathBuf::new();
        file
    }

    /// [`RunFile::to_toml`] for another folder than that of the run file: it says what its paths count from.
    pub fn to_saved_toml(&self) -> String {
        let mut file = self.written();
        let from = if self.from.as_os_str().is_empty() { Path::new(".") } else { &self.from };
        let from = std::path::absolute(from).ok();
        file.run.paths_from = from.map(|from| without_detours(&from.to_string_lossy()).into());
        toml::to_string(&file).expect("a checked run file has only values that TOML can write")
    }

    /// Every place of this run file: what a run reads, and its own folders where they are set.
    fn places_mut(&mut self) -> Vec<PlaceMut<'_>> {
        let RunFile { run, target, data, capture, draft, bundle, bench, .. } = self;
        let mut places: Vec<PlaceMut<'_>> = Vec::new();
        places.extend(run.dir.iter_mut().chain(&mut bundle.dir).map(PlaceMut::Path));
        places.extend(target.source.0.iter_mut().map(PlaceMut::Text));
        places.extend(data.sources.iter_mut().map(|source| PlaceMut::Text(&mut source.path)));
        places.extend(data.validation.iter_mut().map(PlaceMut::Text));
        places.extend(data.template.iter_mut().map(PlaceMut::Path));
        for server in capture.server.iter_mut() {
            places.extend(server.shared_dir.iter_mut().map(PlaceMut::Path));
            places.extend(server.shared_dirs.iter_mut().flatten().map(PlaceMut::Path));
        }
        let stores = capture.store.iter_mut();
        places.extend(stores.filter_map(|store| store.cache_dir.as_mut()).map(PlaceMut::Path));
        places.extend(draft.from.iter_mut().filter(|place| !is_bundle_name(place)).map(PlaceMut::Text));
        places.extend(bench.workloads.iter_mut().map(PlaceMut::Path));
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[run]\nname = \"a\"\n[target]\nsource = [\"../models/x.gguf\", \"hf:o/n:x.gguf\", \"/big/x.gguf\"]\n\
                        [data]\nsources = [{ path = \"chats.jsonl\" }]\nvalidation = \"~/held.jsonl\"\n\
                        template = \"chat.jinja\"\n[bundle]\nlicense = \"MIT\"\n[bench]\nworkloads = [\"w.jsonl\"]\n";

    fn places(file: &RunFile) -> Vec<String> {
        file.clone().places_mut().iter().map(PlaceMut::get).collect()
    }

    #[test]
    fn paths_of_a_run_file_count_from_its_folder_and_those_of_overrides_from_here() {
        let path = Path::new("own/a.toml");
        let file = RunFile::parse(path, TEXT, &[]).unwrap();
        let expected = [
            "runs/a",
            "runs/a/bundle",
            "own/../models/x.gguf",
            "hf:o/n:x.gguf",
            "/big/x.gguf",
            "own/chats.jsonl",
            "~/held.jsonl",
            "own/chat.jinja",
            "own/w.jsonl",
        ];
        assert_eq!(places(&file), expected);

        let here = |name: &str| std::env::current_dir().unwrap().join(name).to_str().unwrap().to_string();
        let overrides = [
            "run.dir=there",
            "target.source=[\"x.gguf\", \"hf:o/n\"]",
            "data.sources=[{ path = \"more.jsonl\" }]",
            "data.template=other.jinja",
            "bench.workloads.0=v.jsonl",
        ];
        let file = RunFile::parse(path, TEXT, &overrides.map(str::to_string)).unwrap();
        let expected = [
            here("there"),
            here("there/bundle"),
            here("x.gguf"),
            "hf:o/n".to_string(),
            here("more.jsonl"),
            "~/held.jsonl".to_string(),
            here("other.jinja"),
            here("v.jsonl"),
        ];
        assert_eq!(places(&file), expected);

        let elsewhere = TEXT.replace("name = \"a\"", "name = \"a\"\npaths_from = \"..\"");
        let file = RunFile::parse(path, &elsewhere, &[]).unwrap();
        assert_eq!(places(&file)[5], "own/../chats.jsonl");
        assert_eq!(file.as_written("own/../chats.jsonl"), "chats.jsonl");
    }

    /// What stages depend on, what is handed over and what is compared does not depend on the folder that a run file was
    /// called from, nor on whether it is the copy in the folder of the run.
    #[test]
    fn what_was_written_stays_what_it_was() {
        let at = |path: &str| RunFile::parse(Path::new(path), TEXT, &[]).unwrap();
        let (here, below, far) = (at("a.toml"), at("own/a.toml"), at("/big/own/a.toml"));
        let copied = |file: &RunFile| {
            let text = file.to_saved_toml();
            RunFile::parse(Path::new("runs/a/run.toml"), &text, &[]).unwrap()
        };
        for file in [&below, &far, &copied(&here), &copied(&below), &copied(&far)] {
            for stage in super::super::Stage::ALL {
                assert_eq!(file.stage_inputs(stage), here.stage_inputs(stage), "{stage:?}");
            }
            assert_eq!(file.portable().to_toml(), here.portable().to_toml());
            assert_eq!(file.differences(&here, Some(super::super::Stage::Bench)), [""; 0]);
        }
        assert_eq!(places(&copied(&far))[5], "/big/own/chats.jsonl");
        assert_eq!(copied(&copied(&far)), copied(&far));
        assert_eq!(below.from_here().data.sources[0].path, "own/chats.jsonl");
        assert_eq!(below.from_here().target.source.0[0], "models/x.gguf");
    }

    #[test]
    fn the_way_to_a_path_is_written_for_the_folder_of_the_run_file() {
        let way = |from: &str, place: &str| way_to(Path::new(from), place);
        assert_eq!(way("a/b", "c/d"), "../../c/d");
        assert_eq!(way("a/b", "a/b/d"), "d");
        assert_eq!(way("", "c/d"), "c/d");
        assert_eq!(way("a", "hf:o/n"), "hf:o/n");
        assert_eq!(way("a", "/c/d"), "/c/d");
        assert_eq!(Path::new(&way("../a", "c")), std::env::current_dir().unwrap().join("c"));
    }

    fn parse(text: &str) -> RunFile {
        RunFile::parse(Path::new("a.toml"), text, &[]).unwrap()
    }

    #[test]
    fn folders_of_a_machine_leave_a_run_file() {
        let file = parse(
            "[run]\nname = \"a\"\ndir = \"/big/me/runs/a\"\n[target]\nsource = [\"/big/me/x.gguf\", \"hf:o/n:x.gguf\"]\n\
             [data]\nsources = [{ path = \"../chats.jsonl\" }, { path = \"own/more.jsonl\" }]\nvalidation = \"~/held.jsonl\"\n\
             template = \"/big/me/chat.jinja\"\nsystem = \"/no_think\"\n[bundle]\nlicense = \"MIT\"\n\
             [bench]\nworkloads = [\"/big/me/w.jsonl\"]\n[capture.server]\nkind = \"vllm\"\nurl = \"http://127.0.0.1:8000/v1\"\n\
             shared_dir = \"/dev/shm/states\"\n",
        );
        assert_eq!(file.machine_places().len(), 8, "{:?}", file.machine_places());
        let portable = file.portable();
        assert_eq!(portable.machine_places(), [""; 0]);
        let text = portable.to_toml();
        assert!(!text.contains("/big/") && !text.contains("/dev/") && !text.contains(".."), "{text}");
        for kept in [
            "dir = \"runs/a\"",
            "\"x.gguf\", \"hf:o/n:x.gguf\"",
            "\"chats.jsonl\"",
            "\"own/more.jsonl\"",
            "\"/no_think\"",
            "http://127.0.0.1:8000/v1",
        ] {
            assert!(text.contains(kept), "{kept} in {text}");
        }
        assert_eq!(parse(&text), portable, "it is a run file");
    }

    #[test]
    fn a_store_of_others_stays_and_a_folder_goes() {
        let with = |url: &str, more: &str| {
            parse(&format!(
                "[target]\nsource = \"a\"\n[data]\nsources = [{{ path = \"file:///big/x.jsonl\" }}, {{ path = \"s3://b/x.jsonl\" }}]\n\
                 [bundle]\nlicense = \"MIT\"\n[capture.store]\nurl = \"{url}\"\n{more}"
            ))
        };
        let kept = with("s3://b/c", "cache_dir = \"/scratch/me\"\n");
        assert_eq!(kept.machine_places(), ["file:///big/x.jsonl", "/scratch/me"]);
        let store = kept.portable().capture.store.unwrap();
        assert_eq!((store.url.as_str(), store.cache_dir), ("s3://b/c", None));
        let gone = with("file:///big/share", "");
        assert_eq!(gone.machine_places(), ["file:///big/x.jsonl", "file:///big/share"]);
        assert_eq!(gone.portable().capture.store, None);
        assert_eq!(gone.portable().data.sources[0].path, "x.jsonl");
        assert_eq!(gone.portable().data.sources[1].path, "s3://b/x.jsonl");
    }

    #[test]
    fn a_run_file_of_references_and_places_below_stays_as_it_is() {
        let file = parse(
            "[run]\nname = \"a\"\n[target]\nsource = \"pip:p==1:x/y.gguf\"\n[data]\nsources = [{ path = \"recipes/a.jsonl\" }]\n\
             [bundle]\ndir = \"out/bundle\"\nlicense = \"MIT\"\n",
        );
        assert_eq!(file.portable(), file);
        assert_eq!(file.machine_places(), [""; 0]);
    }
}
