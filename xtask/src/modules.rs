//! Which file of a crate names which, and circles among them.
//!
//! Read from the text: `use` with its trees, and paths that begin with `crate`, `self`, `super`, a child or an imported
//! module. A name that a module only hands on counts for the file that it comes from. Methods are not seen, and code for
//! tests does not count.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::source::{Source, closing, line, words};
use crate::tree::{Findings, Tree};

/// Circles that stay: where all their files lie, and why.
const KEPT: [(&[&str], &str); 8] = [
    (
        &["crates/text/src/jinja/", "crates/text/src/python_json.rs"],
        "an interpreter: values hold macros and loops, filters call the evaluation that calls filters",
    ),
    (
        &["crates/kernels/src/"],
        "the trait names the plain form of an operation, which is written over the trait; its implementation on the CPU \
         stands beside the paths that its operations choose from",
    ),
    (
        &["crates/model/src/"],
        "a family is a row of a table that names the reader of its parts, and the readers ask the table",
    ),
    (
        &["crates/bundle/src/foreign/"],
        "what is chosen by the kind of a draft names the kinds, whose layouts use its types",
    ),
    (&["crates/decode/src/"], "the choice of a drafter names the drafters, which stand over its traits"),
    (&["crates/train/src/"], "the choice of a method names the methods, which stand over its trait"),
    (
        &["crates/formats/src/run/"],
        "a run file holds the tables of its kinds, which check themselves against it",
    ),
    (
        &["crates/serve/src/"],
        "handlers take the state of the server, and the server starts the router that names them",
    ),
];

/// One `use`, or one leaf of its tree.
struct Import {
    path: Vec<String>,
    /// What it is called here; `None` for `*`.
    name: Option<String>,
    /// Handed on to other modules.
    is_public: bool,
    at: usize,
}

struct Module {
    file: String,
    parent: Option<usize>,
    children: BTreeMap<String, usize>,
    imports: Vec<Import>,
    /// Without its `use` lines.
    body: String,
    /// Modules inside this file, with the range of their bodies.
    inner: Vec<(String, std::ops::Range<usize>)>,
}

/// The modules of one library or program.
pub(crate) struct Modules(Vec<Module>);

/// From one file to another: where.
type Edges = BTreeMap<(usize, usize), usize>;

const DEPTH_MAX: usize = 16;

impl Modules {
    /// Follows `mod` from a root file.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub(crate) fn of(tree: &Tree, root: &str) -> anyhow::Result<Modules> {
        Modules::read(root, &|file| tree.files.iter().any(|f| f == file), &|file| tree.read(file))
    }

    fn read(
        root: &str,
        exists: &dyn Fn(&str) -> bool,
        text: &dyn Fn(&str) -> anyhow::Result<String>,
    ) -> anyhow::Result<Modules> {
        let mut modules = Modules(Vec::new());
        let mut waiting = VecDeque::from([(root.to_string(), None::<(usize, String)>)]);
        while let Some((file, above)) = waiting.pop_front() {
            let mut code = Source::of(&text(&file)?).code;
            let imports = take_imports(&mut code);
            let id = modules.0.len();
            let (folder, name) = file.rsplit_once('/').unwrap_or(("", &file));
            let below = match name {
                "lib.rs" | "main.rs" | "mod.rs" => folder.to_string(),
                name => format!("{folder}/{}", name.trim_end_matches(".rs")),
            };
            let mut inner = Vec::new();
            for at in words(&code, "mod") {
                let name: String = code[at + 3..].trim_start().chars().take_while(|c| in_name(*c)).collect();
                let behind = at + 3 + code[at + 3..].find(&name).unwrap_or_default() + name.len();
                match code[behind..].trim_start().chars().next() {
                    Some(';') => {
                        let files = [format!("{below}/{name}.rs"), format!("{below}/{name}/mod.rs")];
                        waiting.extend(files.into_iter().find(|f| exists(f)).map(|f| (f, Some((id, name)))));
                    }
                    Some('{') => {
                        let open = behind + code[behind..].find('{').unwrap_or_default();
                        inner.push((name, open..closing(code.as_bytes(), open)));
                    }
                    _ => {}
                }
            }
            let parent = above.map(|(parent, name)| {
                modules.0[parent].children.insert(name, id);
                parent
            });
            modules.0.push(Module { file, parent, children: BTreeMap::new(), imports, body: code, inner });
        }
        Ok(modules)
    }

    /// Its files; others beside them are compiled for tests alone.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|m| m.file.as_str())
    }

    /// The module that a path names something in; `whole` if it names the module itself.
    fn resolve(&self, from: usize, path: &[String], depth: usize) -> Option<(usize, bool)> {
        let (first, mut rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => 0,
            "self" => from,
            "super" => self.0[from].parent?,
            name => match self.0[from].children.get(name) {
                Some(child) => *child,
                None => {
                    rest = path;
                    let known = self.0[from].imports.iter().any(|i| i.name.as_deref() == Some(name));
                    // Neither here nor imported: a library, or an item of this file.
                    if !known {
                        return None;
                    }
                    from
                }
            },
        };
        while let Some((name, behind)) = rest.split_first() {
            let module = &self.0[at];
            if name == "super" {
                (at, rest) = (module.parent?, behind);
            } else if let Some(child) = module.children.get(name) {
                (at, rest) = (*child, behind);
            } else if module.inner.iter().any(|(inner, _)| inner == name) {
                return Some((at, false));
            } else if let Some(import) = module.imports.iter().find(|i| i.name.as_ref() == Some(name)) {
                if depth == DEPTH_MAX {
                    return None;
                }
                let path: Vec<String> = import.path.iter().chain(behind).cloned().collect();
                // From outside the crate: whoever hands it on is not where it stands.
                return self.resolve(at, &path, depth + 1);
            } else {
                if !defines(&module.body, name) {
                    let globs = module.imports.iter().filter(|i| i.name.is_none());
                    let mut homes = globs.filter_map(|i| self.resolve(at, &i.path, DEPTH_MAX));
                    if let Some((home, _)) = homes.find(|(m, _)| defines(&self.0[*m].body, name)) {
                        return Some((home, false));
                    }
                }
                return Some((at, false));
            }
        }
        Some((at, true))
    }

    fn edges(&self) -> Edges {
        let mut edges = Edges::new();
        for (from, module) in self.0.iter().enumerate() {
            let mut edge = |to: usize, at: usize| {
                if to != from {
                    edges.entry((from, to)).or_insert(line(&module.body, at));
                }
            };
            let mut imported = Vec::new();
            for import in &module.imports {
                let depth = module.inner.iter().filter(|(_, range)| range.contains(&import.at)).count();
                let path = outwards(&import.path, depth);
                let Some((to, whole)) = self.resolve(from, path, 0) else { continue };
                match &import.name {
                    // What is used of it is looked for below.
                    Some(name) if whole => imported.push(name.clone()),
                    Some(name) if import.is_public && !is_used(&module.body, name) => {}
                    None if import.is_public => {}
                    _ => edge(to, import.at),
                }
            }
            let heads = ["crate", "self", "super"].map(str::to_string);
            let children = module.children.keys().cloned();
            for head in heads.into_iter().chain(children).chain(imported).collect::<BTreeSet<_>>() {
                for at in words(&module.body, &head) {
                    let before = module.body[..at].trim_end();
                    let path = path_at(&module.body, at);
                    if before.ends_with("::") || path.len() < 2 {
                        continue;
                    }
                    let depth = module.inner.iter().filter(|(_, range)| range.contains(&at)).count();
                    if let Some((to, _)) = self.resolve(from, outwards(&path, depth), 0) {
                        edge(to, at);
                    }
                }
            }
        }
        edges
    }

    /// Files that name each other in a circle, one circle of each knot, as `a.rs:1 names b.rs`.
    fn circles(&self) -> Vec<(BTreeSet<&str>, String)> {
        let edges = self.edges();
        let reach = |from: usize| {
            let (mut seen, mut todo) = (BTreeSet::new(), vec![from]);
            while let Some(at) = todo.pop() {
                let next = edges.range((at, 0)..(at + 1, 0)).map(|((_, to), _)| *to);
                todo.extend(next.filter(|to| seen.insert(*to)));
            }
            seen
        };
        let reach: Vec<BTreeSet<usize>> = (0..self.0.len()).map(reach).collect();
        let mut done = BTreeSet::<usize>::new();
        let mut circles = Vec::new();
        for at in 0..self.0.len() {
            if !reach[at].contains(&at) || done.contains(&at) {
                continue;
            }
            let knot: Vec<usize> = reach[at].iter().copied().filter(|to| reach[*to].contains(&at)).collect();
            done.extend(&knot);
            let circle = knot.iter().filter_map(|m| shortest(&edges, *m)).min_by_key(Vec::len);
            let circle = circle.unwrap_or_default();
            let steps = circle.iter().zip(circle.iter().cycle().skip(1)).map(|(from, to)| {
                format!("{}:{} names {}", self.0[*from].file, edges[&(*from, *to)], self.0[*to].file)
            });
            let steps: Vec<String> = steps.collect();
            circles.push((knot.iter().map(|m| self.0[*m].file.as_str()).collect(), steps.join(", ")));
        }
        circles
    }
}

/// The shortest way from a module back to itself.
fn shortest(edges: &Edges, start: usize) -> Option<Vec<usize>> {
    let mut ways = VecDeque::from([vec![start]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        let last = *way.last()?;
        for ((_, to), _) in edges.range((last, 0)..(last + 1, 0)) {
            if *to == start {
                return Some(way);
            }
            if seen.insert(*to) {
                ways.push_back(way.iter().copied().chain([*to]).collect());
            }
        }
    }
    None
}

/// A path as the file itself would write it, for one that stands so many modules deeper inside it.
fn outwards(path: &[String], depth: usize) -> &[String] {
    let supers = path.iter().take_while(|s| *s == "super").count().min(depth);
    &path[supers..]
}

fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// True if an item of this name stands in a module.
fn defines(body: &str, name: &str) -> bool {
    words(body, name).any(|at| {
        let before = body[..at].trim_end();
        let keyword = before.rsplit(|c: char| !in_name(c)).next().unwrap_or_default();
        ["fn", "struct", "enum", "trait", "type", "const", "static", "union"].contains(&keyword)
            || before.ends_with("macro_rules!")
    })
}

/// True if a body uses a name, and does not merely declare one like it or name one of something else.
fn is_used(body: &str, name: &str) -> bool {
    words(body, name).any(|at| {
        let before = body[..at].trim_end();
        let keyword = before.rsplit(|c: char| !in_name(c)).next().unwrap_or_default();
        !before.ends_with("::") && !before.ends_with('.') && !["fn", "mod"].contains(&keyword)
    })
}

/// The path that begins here.
fn path_at(text: &str, at: usize) -> Vec<String> {
    let mut path = Vec::new();
    let mut rest = &text[at..];
    loop {
        let name: String = rest.chars().take_while(|c| in_name(*c)).collect();
        if name.is_empty() {
            return path;
        }
        rest = rest[name.len()..].trim_start();
        path.push(name);
        match rest.strip_prefix("::") {
            Some(behind) => rest = behind.trim_start(),
            None => return path,
        }
    }
}

/// Reads all `use` lines and blanks them.
fn take_imports(code: &mut String) -> Vec<Import> {
    let mut imports = Vec::new();
    let places: Vec<usize> = words(code, "use").collect();
    for at in places {
        let Some(length) = code[at..].find(';') else { continue };
        let before = code[..at].trim_end();
        // `use<'a>` in a type is none.
        if code[at + 3..].trim_start().starts_with('<') {
            continue;
        }
        let is_public = before.ends_with("pub")
            || before.ends_with(')') && before.rfind("pub(") > before.rfind(['{', '}', ';']);
        let tree = code[at + 3..at + length].to_string();
        leaves(&tree, &[], &mut |path, name| imports.push(Import { path, name, is_public, at }));
        let blank: String = code[at..at + length].chars().map(|c| if c == '\n' { c } else { ' ' }).collect();
        code.replace_range(at..at + length, &blank);
    }
    imports
}

/// Every leaf of a tree of `use`: its path, and its name if it has one.
fn leaves(tree: &str, above: &[String], found: &mut dyn FnMut(Vec<String>, Option<String>)) {
    let tree = tree.trim();
    let (head, group) = match tree.find('{') {
        Some(open) => (&tree[..open], Some(&tree[open + 1..closing(tree.as_bytes(), open) - 1])),
        None => (tree, None),
    };
    let (head, renamed) = match head.split_once(" as ") {
        Some((head, name)) => (head, Some(name.trim().to_string())),
        None => (head, None),
    };
    let mut path = above.to_vec();
    path.extend(head.split("::").map(str::trim).filter(|s| !s.is_empty()).map(str::to_string));
    if let Some(group) = group {
        let (mut depth, mut start) = (0, 0);
        for (i, c) in group.char_indices().chain([(group.len(), ',')]) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    if !group[start..i].trim().is_empty() {
                        leaves(&group[start..i], &path, found);
                    }
                    start = i + 1;
                }
                _ => {}
            }
        }
        return;
    }
    match path.last().map(String::as_str) {
        Some("*") => {
            path.pop();
            found(path, None);
        }
        Some("self") if path.len() > 1 => {
            path.pop();
            let name = renamed.or_else(|| path.last().cloned());
            found(path, name);
        }
        _ => {
            let name = renamed.or_else(|| path.last().cloned());
            found(path, name);
        }
    }
}

/// Circles, and exceptions that were of use.
#[derive(Default)]
pub(crate) struct Circles {
    used: BTreeSet<usize>,
}

impl Circles {
    /// Finds circles in one library or program.
    pub(crate) fn check(&mut self, modules: &Modules, findings: &mut Findings) {
        for (knot, circle) in modules.circles() {
            let inside = |places: &[&str]| knot.iter().all(|file| places.iter().any(|p| file.starts_with(p)));
            match KEPT.iter().position(|(places, _)| inside(places)) {
                Some(kept) => drop(self.used.insert(kept)),
                None => {
                    let files: Vec<&str> = knot.into_iter().collect();
                    findings.push(format!("{}: {} files in a circle: {circle}", files[0], files.len()));
                }
            }
        }
    }

    /// Exceptions that nothing needs any more.
    pub(crate) fn finish(self, findings: &mut Findings) {
        for (_, (places, _)) in KEPT.iter().enumerate().filter(|(i, _)| !self.used.contains(i)) {
            findings.push(format!(
                "xtask/src/modules.rs: no circle is left in {}: the exception can go",
                places.join(", ")
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let find = |file: &str| files.iter().find(|(name, _)| *name == file).map(|(_, text)| *text);
        let read = |file: &str| Ok(find(file).unwrap().to_string());
        let modules = Modules::read(files[0].0, &|file| find(file).is_some(), &read).unwrap();
        modules.circles().into_iter().map(|(_, circle)| circle).collect()
    }

    #[test]
    fn two_files_that_name_each_other_are_a_circle_with_its_lines() {
        let found = circles(&[
            ("src/lib.rs", "mod a;\nmod b;\n"),
            ("src/a.rs", "//! A.\nuse crate::b::{B, C as D};\n"),
            ("src/b.rs", "fn f() {\n    super::a::g();\n}\n"),
        ]);
        assert_eq!(found, ["src/a.rs:2 names src/b.rs, src/b.rs:2 names src/a.rs"]);
    }

    #[test]
    fn a_longer_way_round_is_a_circle_too() {
        let found = circles(&[
            ("src/lib.rs", "mod a;\nmod b;\nmod c;\n"),
            ("src/a.rs", "use crate::b;\nfn f() { b::g() }\n"),
            ("src/b/mod.rs", "mod d;\npub(crate) use d::g;\n"),
            ("src/b/d.rs", "pub(crate) fn g() { crate::c::h() }\n"),
            ("src/c.rs", "use super::a::f;\n"),
        ]);
        assert_eq!(
            found,
            ["src/a.rs:2 names src/b/d.rs, src/b/d.rs:1 names src/c.rs, src/c.rs:1 names src/a.rs"]
        );
    }

    #[test]
    fn a_name_that_is_handed_on_counts_for_where_it_stands() {
        let found = circles(&[
            (
                "src/lib.rs",
                "mod a;\nmod error;\npub use a::A;\npub use error::Error;\npub use all::*;\nmod all;\n",
            ),
            ("src/a.rs", "use crate::Error;\nuse crate::In;\n"),
            ("src/error.rs", "pub enum Error {}\n"),
            ("src/all.rs", "pub struct In;\n"),
        ]);
        assert!(found.is_empty(), "{found:?}");
        let found = circles(&[
            ("src/lib.rs", "mod a;\npub use a::A;\npub struct Root(A);\n"),
            ("src/a.rs", "use crate::Root;\npub struct A;\n"),
        ]);
        assert_eq!(found, ["src/lib.rs:2 names src/a.rs, src/a.rs:1 names src/lib.rs"]);
    }

    #[test]
    fn code_for_tests_comments_and_other_crates_make_none() {
        let found = circles(&[
            ("src/lib.rs", "mod a;\nmod b;\n"),
            (
                "src/a.rs",
                "//! See [`crate::b`].\nuse core::b::B;\n#[cfg(test)]\nmod tests { use crate::b::B; }\n",
            ),
            ("src/b.rs", "use crate::a::A;\nmod inner { use super::X; }\n"),
        ]);
        assert!(found.is_empty(), "{found:?}");
    }
}
