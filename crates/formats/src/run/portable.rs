//! A run file for others: without the folders of the machine that it ran on.

use std::path::PathBuf;

use super::RunFile;
use crate::bundle_files::{is_of_a_machine, portable};

impl RunFile {
    /// The same run with every place as a bundle may name it ([`portable`]); folders of the run that lie elsewhere go back
    /// to their defaults.
    pub fn portable(&self) -> RunFile {
        let mut file = self.clone();
        for place in file.places_mut() {
            let named = portable(&place.get());
            place.set(named);
        }
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
        file
    }

    /// Every place that this run file names and that means something on one machine only, folders of the run among them.
    pub fn machine_places(&self) -> Vec<String> {
        let mut copy = self.clone();
        let folders = [&self.run.dir, &self.bundle.dir].into_iter().flatten();
        let mut places: Vec<String> = folders.map(|dir| dir.to_string_lossy().into_owned()).collect();
        if let Some(store) = &self.capture.store {
            places.push(store.url.clone());
            places.extend(store.cache_dir.iter().map(|dir| dir.to_string_lossy().into_owned()));
        }
        places.extend(copy.places_mut().iter().map(PlaceMut::get));
        places.retain(|place| is_of_a_machine(place));
        places
    }

    /// What a run reads, wherever it is named.
    fn places_mut(&mut self) -> Vec<PlaceMut<'_>> {
        let mut places: Vec<PlaceMut<'_>> = Vec::new();
        places.extend(self.target.source.0.iter_mut().map(PlaceMut::Text));
        places.extend(self.data.sources.iter_mut().map(|source| PlaceMut::Text(&mut source.path)));
        places.extend(self.data.validation.iter_mut().map(PlaceMut::Text));
        places.extend(self.data.template.iter_mut().map(PlaceMut::Path));
        let states = self.capture.server.as_mut().and_then(|server| server.shared_dir.as_mut());
        places.extend(states.map(PlaceMut::Path));
        places.extend(self.bench.workloads.iter_mut().map(PlaceMut::Path));
        places
    }
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

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
        assert_eq!(kept.machine_places(), ["/scratch/me", "file:///big/x.jsonl"]);
        let store = kept.portable().capture.store.unwrap();
        assert_eq!((store.url.as_str(), store.cache_dir), ("s3://b/c", None));
        let gone = with("file:///big/share", "");
        assert_eq!(gone.machine_places(), ["file:///big/share", "file:///big/x.jsonl"]);
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
