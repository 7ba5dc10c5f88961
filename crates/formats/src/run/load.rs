//! From text and overrides to a checked run file, with errors that say where and what was meant.

use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::inputs::without_indices;
use super::{RunFile, eagle3, places, reference};

/// Where in the input something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the run file.
    File {
        /// The file.
        path: PathBuf,
        /// 1-based line, if it is one line's fault.
        line: Option<usize>,
    },
    /// In an override.
    Override {
        /// The override as written.
        text: String,
    },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::File { path, line: Some(line) } => write!(f, "run file `{}`, line {line}", path.display()),
            Place::File { path, line: None } => write!(f, "run file `{}`", path.display()),
            Place::Override { text } => write!(f, "override `{text}`"),
        }
    }
}

/// What is wrong with a run file or an override.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The file could not be read.
    #[error("cannot read run file `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The text is no TOML.
    #[error("{place}: {problem}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        problem: String,
    },
    /// A key that does not exist.
    #[error("{place}: unknown key `{key}`")]
    UnknownKey {
        /// Where.
        place: Place,
        /// Dotted key as written.
        key: String,
        /// Keys that exist in that table.
        known: Vec<String>,
    },
    /// A key without which there is no run.
    #[error("{place}: key `{key}` is missing")]
    MissingKey {
        /// Where.
        place: Place,
        /// Dotted key.
        key: String,
    },
    /// A value of the wrong type, or an unknown word.
    #[error("{place}: `{key}` is {found}, expected {wanted}")]
    Type {
        /// Where.
        place: Place,
        /// Dotted key.
        key: String,
        /// What stands there.
        found: String,
        /// What could stand there.
        wanted: String,
    },
    /// A value outside its range or in conflict with another.
    #[error("{place}: `{key}` {problem}")]
    Value {
        /// Where.
        place: Place,
        /// Dotted key.
        key: String,
        /// What is wrong.
        problem: String,
        /// What to do, if that is known.
        advice: Option<String>,
    },
}

impl RunError {
    /// The line of the run file that it speaks of.
    fn line(&self) -> Option<usize> {
        match self {
            RunError::Syntax { place, .. }
            | RunError::UnknownKey { place, .. }
            | RunError::MissingKey { place, .. }
            | RunError::Type { place, .. }
            | RunError::Value { place, .. } => match place {
                Place::File { line, .. } => *line,
                Place::Override { .. } => None,
            },
            RunError::Read { .. } => None,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            RunError::Read { .. } => None,
            RunError::Syntax { place: Place::Override { .. }, .. } => {
                Some("write overrides as `table.key=value`, for example `train.lr=5e-5`".to_string())
            }
            RunError::Syntax { .. } => None,
            RunError::UnknownKey { key, known, .. } => {
                let (table, last) = key.rsplit_once('.').unwrap_or(("", key));
                let full = |k: &str| if table.is_empty() { k.to_string() } else { format!("{table}.{k}") };
                if let Some(meant) = closest(last, known.iter().map(String::as_str)) {
                    let meant = full(meant);
                    let meant = eagle3::newer_place(&meant).unwrap_or(meant);
                    return Some(format!("did you mean `{meant}`?"));
                }
                let elsewhere: Vec<String> = reference(&[])
                    .into_iter()
                    .filter(|k| k.key.contains('.') && k.name() == last)
                    .map(|k| k.key)
                    .collect();
                match elsewhere.as_slice() {
                    [] => {
                        let current = known.iter().filter(|k| eagle3::newer_place(&full(k)).is_none());
                        let current: Vec<&str> = current.map(String::as_str).collect();
                        Some(format!("known keys here: {}", current.join(", ")))
                    }
                    keys => Some(format!("did you mean `{}`?", keys.join("` or `"))),
                }
            }
            RunError::MissingKey { key, .. } => reference(&[])
                .into_iter()
                .find(|k| k.key == *key)
                .map(|k| format!("`{key}`: {}", k.description)),
            RunError::Type { found, wanted, .. } => {
                let word = found.strip_prefix('`').and_then(|f| f.strip_suffix('`'))?;
                let words = backticked(wanted);
                closest(word, words.iter().map(String::as_str))
                    .map(|meant| format!("did you mean `{meant}`?"))
            }
            RunError::Value { advice, .. } => advice.clone(),
        }
    }
}

/// All that is wrong with a run file.
#[derive(Debug)]
pub struct Faulty {
    /// The faults, in the order in which they are found; at least one.
    pub faults: Vec<RunError>,
    /// The run file with what is wrong put back to its default, for whoever looks for more; `None` if a key is missing
    /// without which there is no run, or the text is none.
    pub mended: Option<Box<RunFile>>,
}

impl Faulty {
    /// The first fault.
    pub fn first(self) -> RunError {
        self.faults.into_iter().next().expect("there is at least one fault")
    }
}

impl From<RunError> for Faulty {
    fn from(fault: RunError) -> Faulty {
        Faulty { faults: vec![fault], mended: None }
    }
}

impl RunFile {
    /// Reads a run file, applies overrides in order, fills in defaults and checks everything. Relative paths in it count from
    /// its folder or from what `run.paths_from` says, those of overrides from the working directory.
    ///
    /// # Errors
    /// The first fault.
    pub fn load(path: impl AsRef<Path>, overrides: &[String]) -> Result<RunFile, RunError> {
        RunFile::load_all(path, overrides).map_err(Faulty::first)
    }

    /// Like [`RunFile::load`], from text; `path` is for errors.
    ///
    /// # Errors
    /// The first fault.
    pub fn parse(path: &Path, text: &str, overrides: &[String]) -> Result<RunFile, RunError> {
        RunFile::parse_all(path, text, overrides).map_err(Faulty::first)
    }

    /// Like [`RunFile::load`].
    ///
    /// # Errors
    /// All faults at once.
    pub fn load_all(path: impl AsRef<Path>, overrides: &[String]) -> Result<RunFile, Faulty> {
        let path = path.as_ref();
        RunFile::parse_all(path, &read(path)?, overrides)
    }

    /// Like [`RunFile::load_all`], of the completed copy in the folder of a run: it says what its paths count from
    /// ([`RunFile::to_saved_toml`]), and where it does not, an earlier version wrote it and they count from the working
    /// directory.
    ///
    /// # Errors
    /// All faults at once.
    pub fn load_saved(path: impl AsRef<Path>, overrides: &[String]) -> Result<RunFile, Faulty> {
        let path = path.as_ref();
        RunFile::parse_from(path, &read(path)?, overrides, Path::new(""))
    }

    /// Like [`RunFile::parse`].
    ///
    /// # Errors
    /// All faults at once. What is wrong is put back to its default, and the rest is looked at again; a fault that comes
    /// of that alone is not told.
    pub fn parse_all(path: &Path, text: &str, overrides: &[String]) -> Result<RunFile, Faulty> {
        RunFile::parse_from(path, text, overrides, path.parent().unwrap_or(Path::new("")))
    }

    /// `from` is what relative paths count from unless the run file says otherwise.
    fn parse_from(path: &Path, text: &str, overrides: &[String], from: &Path) -> Result<RunFile, Faulty> {
        let mut source = Source::new(path, text)?;
        source.is_here =
            from.as_os_str().is_empty() && !source.entries.iter().any(|e| e.key == "run.paths_from");
        let mut faults = Vec::new();
        // Errors that an override cannot mend are told with their line, before any override is looked at.
        let (mut table, mut told) = source.written(text, &mut faults)?;
        faults.sort_by_key(RunError::line);
        let mut state = source.deserialize(&table);
        if overrides.is_empty() && state.is_err() {
            // From the text the line of its table is known.
            let spanned = toml::from_str::<RunFile>(text).map_err(|e| source.explain(&e)).err();
            let spanned = spanned.filter(|fault| matches!(fault, RunError::MissingKey { .. }));
            let missing = spanned.or(state.err()).filter(|missing| !is_below(&told, missing));
            faults.extend(missing);
            return Err(Faulty { faults, mended: None });
        }
        if let Some((old, new)) = eagle3::given_twice(&table) {
            unset(&mut table, &old);
            faults.push(RunError::Value {
                place: source.place_of_key(&old, overrides),
                problem: format!("is given beside `{new}`, its newer name"),
                advice: Some(format!("remove `{old}`")),
                key: old,
            });
        }
        for text in overrides {
            match source.apply(&mut table, text) {
                Ok(now) => state = now,
                Err(fault) => faults.push(fault),
            }
        }
        let written = match state {
            Ok(written) => written,
            Err(missing) => {
                if !is_below(&told, &missing) {
                    faults.push(missing);
                }
                return Err(Faulty { faults, mended: None });
            }
        };
        let resolved = |mut written: RunFile, table: &toml::Table| {
            written.count_from(places::counted_from(table, from));
            let mut file = written.resolve();
            file.take_train_defaults(table);
            file
        };
        let mut file = resolved(written, &table);
        let rules = 1 + RunFile::RULES.len();
        for rule in 0..rules {
            loop {
                let held = match rule {
                    0 => file.check_size(&table),
                    n => RunFile::RULES[n - 1](&file),
                };
                let Err(broken) = held else { break };
                // Said already, and its default is no better beside the rest.
                if told.contains(&broken.key) {
                    break;
                }
                let follows = told.iter().any(|key| broken.problem.contains(&format!("`{key}`")));
                let key = broken.key.clone();
                if !follows {
                    faults.push(RunError::Value {
                        place: source.place_of_key(&broken.key, overrides),
                        key: broken.key,
                        problem: broken.problem,
                        advice: broken.advice,
                    });
                }
                let mut changed = table.clone();
                unset(&mut changed, &key);
                eagle3::other_place(&key).iter().for_each(|other| unset(&mut changed, other));
                told.push(key);
                let Ok(mended) = source.deserialize(&changed) else { break };
                file = resolved(mended, &changed);
                table = changed;
            }
        }
        match faults.is_empty() {
            true => Ok(file),
            false => Err(Faulty { faults, mended: Some(Box::new(file)) }),
        }
    }
}

fn read(path: &Path) -> Result<String, RunError> {
    std::fs::read_to_string(path).map_err(|source| RunError::Read { path: path.to_path_buf(), source })
}

/// True if a missing key stood where something was put aside: then it is not missing.
fn is_below(told: &[String], missing: &RunError) -> bool {
    let RunError::MissingKey { key, .. } = missing else { return false };
    told.iter().any(|t| t == key || t.starts_with(&format!("{key}.")) || key.starts_with(&format!("{t}.")))
}

/// Where a key is set: the last override that sets it, or else its line in the run file, or that of the closest table
/// above it. For faults that show only beside something else than the run file.
pub fn place_of_key(path: &Path, overrides: &[String], key: &str) -> Place {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    match Source::new(path, &text) {
        Ok(source) => source.place_of_key(key, overrides),
        Err(_) => Place::File { path: path.to_path_buf(), line: None },
    }
}

/// Tables without which there is no run; no other required key has such a name (a test compares).
const TOP_LEVEL_REQUIRED: [&str; 2] = ["target", "data"];

/// The text of a run file and where its keys stand in it.
struct Source<'t> {
    path: &'t Path,
    text: &'t str,
    entries: Vec<Entry>,
    /// True if its paths count from the working directory, as those of overrides do.
    is_here: bool,
}

struct Entry {
    key: String,
    key_span: std::ops::Range<usize>,
    value_span: std::ops::Range<usize>,
}

impl<'t> Source<'t> {
    fn new(path: &'t Path, text: &'t str) -> Result<Source<'t>, RunError> {
        let mut source = Source { path, text, entries: Vec::new(), is_here: true };
        let table = DeTable::parse(text).map_err(|e| RunError::Syntax {
            place: source.at(e.span().map(|s| s.start)),
            problem: first_line(e.message()),
        })?;
        walk("", table.get_ref(), &mut source.entries);
        Ok(source)
    }

    fn at(&self, offset: Option<usize>) -> Place {
        // The parser may point one past the end.
        let before = |at: usize| &self.text.as_bytes()[..at.min(self.text.len())];
        let line = offset.map(|at| before(at).iter().filter(|b| **b == b'\n').count() + 1);
        Place::File { path: self.path.to_path_buf(), line }
    }

    /// What is written, without what no override could mend: unknown keys and wrong types, each told with its line. Beside
    /// it the keys that went with them.
    fn written(&self, text: &str, faults: &mut Vec<RunError>) -> Result<(toml::Table, Vec<String>), Faulty> {
        let give_up = |faults: &mut Vec<RunError>| Faulty { faults: std::mem::take(faults), mended: None };
        let mut text = text.to_string();
        let mut told: Vec<String> = Vec::new();
        while let Err(error) = toml::from_str::<RunFile>(&text) {
            let fault = self.explain(&error);
            let key = match &fault {
                RunError::UnknownKey { key, .. } | RunError::Type { key, .. } => key.clone(),
                _ => break,
            };
            faults.push(fault);
            // The nearest thing that stands in the text; where nothing does, the rest cannot be looked at.
            let Some(gone) = self.blank(&mut text, &key).filter(|gone| !told.contains(&gone[0])) else {
                return Err(give_up(faults));
            };
            told.extend(gone);
        }
        match toml::from_str(&text) {
            Ok(table) => Ok((table, told)),
            // What is left after a part of a list went need not be TOML: what was found by then is enough.
            Err(error) => {
                if faults.is_empty() {
                    faults.push(self.explain(&error));
                }
                Err(give_up(faults))
            }
        }
    }

    /// Blanks the lines of a key with everything below it, so that all others keep their places; gives the keys that stood
    /// there, its own first.
    fn blank(&self, text: &mut String, key: &str) -> Option<Vec<String>> {
        let below = format!("{key}.");
        let own = |entry: &&Entry| entry.key == key || entry.key.starts_with(&below);
        let start =
            self.entries.iter().filter(own).map(|e| e.key_span.start.min(e.value_span.start)).min()?;
        let end = self.entries.iter().filter(own).map(|e| e.key_span.end.max(e.value_span.end)).max()?;
        let first = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let last = text[end..].find('\n').map_or(text.len(), |at| end + at);
        let mut keys = vec![key.to_string()];
        let inside = |e: &&Entry| (first..last).contains(&e.key_span.start) && e.key != key;
        keys.extend(self.entries.iter().filter(inside).map(|e| e.key.clone()));
        let blanks: String = text[first..last].bytes().map(|b| if b == b'\n' { '\n' } else { ' ' }).collect();
        text.replace_range(first..last, &blanks);
        Some(keys)
    }

    /// The override that set the key, or else its line in the file.
    fn place_of_key(&self, key: &str, overrides: &[String]) -> Place {
        let other = eagle3::other_place(key);
        let is_it = |k: &str| k == key || other.as_deref() == Some(k);
        let sets = |text: &&String| text.split('=').next().is_some_and(|k| is_it(k.trim()));
        if let Some(text) = overrides.iter().rev().find(sets) {
            return Place::Override { text: text.clone() };
        }
        // By one of its names it may stand there; the tables around it are asked after both.
        let there = |name: &str| self.entries.iter().any(|e| e.key == name);
        let mut name = match other.as_deref() {
            Some(other) if !there(key) && there(other) => other,
            _ => key,
        };
        loop {
            if let Some(entry) = self.entries.iter().find(|e| e.key == name) {
                return self.at(Some(entry.key_span.start));
            }
            match name.rsplit_once('.') {
                Some((parent, _)) => name = parent,
                None => return self.at(None),
            }
        }
    }

    /// Turns what serde says about the file into our words and our place.
    fn explain(&self, e: &toml::de::Error) -> RunError {
        let span = e.span();
        let start = span.as_ref().map(|s| s.start);
        let (mut key, mut offset) = (String::new(), start);
        if let Some(span) = &span {
            let by_key = self.entries.iter().find(|entry| entry.key_span == *span);
            let by_value = self
                .entries
                .iter()
                .filter(|entry| entry.value_span.start <= span.start && span.end <= entry.value_span.end)
                .min_by_key(|entry| (entry.value_span.len(), std::cmp::Reverse(entry.key.len())));
            if let Some(entry) = by_key.or(by_value) {
                key.clone_from(&entry.key);
                offset = Some(entry.key_span.start);
            }
        }
        // The span of a missing key is that of its table; the top table has no line of its own.
        if let Some(name) = e.message().strip_prefix("missing field `").and_then(|m| m.split('`').next())
            && (key.is_empty() || TOP_LEVEL_REQUIRED.contains(&name))
        {
            (key, offset) = (String::new(), None);
        }
        self.reword(e.message(), self.at(offset), key)
    }

    fn reword(&self, message: &str, place: Place, key: String) -> RunError {
        let message = first_line(message);
        let quoted = backticked(&message);
        let join = |last: &str| {
            // The span may already be that of the key itself.
            let there = key == last || key.rsplit_once('.').is_some_and(|(_, k)| k == last);
            match key.as_str() {
                "" => last.to_string(),
                _ if there => key.clone(),
                table => format!("{table}.{last}"),
            }
        };
        if message.starts_with("unknown field") {
            let mut quoted = quoted.into_iter();
            let last = quoted.next().unwrap_or_default();
            return RunError::UnknownKey { place, key: join(&last), known: quoted.collect() };
        }
        if message.starts_with("missing field") {
            let last = quoted.into_iter().next().unwrap_or_default();
            let key = if key.is_empty() { last } else { format!("{key}.{last}") };
            return RunError::MissingKey { place, key };
        }
        let (found, wanted) = message.split_once(", expected ").unwrap_or((&message, "something else"));
        let found = ["invalid type: ", "invalid value: ", "unknown variant "]
            .iter()
            .find_map(|prefix| found.strip_prefix(prefix))
            .unwrap_or(found);
        RunError::Type { place, key, found: found.to_string(), wanted: plain_type(wanted) }
    }

    fn deserialize(&self, table: &toml::Table) -> Result<RunFile, RunError> {
        let value = toml::Value::Table(table.clone());
        value.try_into().map_err(|e: toml::de::Error| {
            match self.reword(e.message(), self.at(None), String::new()) {
                // Without a span only the last part of the key is known; the required keys all have their own.
                RunError::MissingKey { place, key } => {
                    let full = reference(&[]).into_iter().find(|k| k.required && k.name() == key);
                    RunError::MissingKey { place, key: full.map_or(key, |k| k.key) }
                }
                other => other,
            }
        })
    }

    /// Applies one override. The outer error is the override's own fault; the inner one is a key that is still
    /// missing and may be set by a later override.
    fn apply(&self, table: &mut toml::Table, text: &str) -> Result<Result<RunFile, RunError>, RunError> {
        let place = || Place::Override { text: text.to_string() };
        let syntax = |problem: &str| RunError::Syntax { place: place(), problem: problem.to_string() };
        let (key, written) = text.split_once('=').ok_or_else(|| syntax("no `=`"))?;
        let (key, written) = (key.trim(), written.trim());
        if key.split('.').any(|part| part.trim().is_empty()) {
            return Err(syntax("the key is empty or has an empty part"));
        }
        let value = parse_value(written).map_err(|problem| syntax(&problem))?;
        // A word that happens to look like a number or a date may stand where text is wanted.
        let as_text = (!value.is_str()).then(|| toml::Value::String(written.to_string()));
        let mut first_error = None;
        for mut candidate in [Some(value), as_text].into_iter().flatten() {
            if !self.is_here {
                places::fix(&without_indices(key), &mut candidate);
            }
            let mut changed = table.clone();
            // An override holds, by whatever name the file has its key.
            if let Some(other) = eagle3::other_place(key) {
                unset(&mut changed, &other);
            }
            set(&mut changed, key, candidate).map_err(|problem| syntax(&problem))?;
            let result = self.deserialize(&changed);
            let fault = match &result {
                Ok(_) | Err(RunError::MissingKey { .. }) => None,
                Err(e) => Some(e),
            };
            if fault.is_none() {
                *table = changed;
                return Ok(result);
            }
            first_error = first_error.or(result.err());
        }
        let error = first_error.expect("there is at least one candidate");
        Err(match error {
            RunError::UnknownKey { known, key: last, .. } => {
                RunError::UnknownKey { place: place(), key: cut_after(key, &last), known }
            }
            RunError::Type { found, wanted, .. } => {
                RunError::Type { place: place(), key: key.to_string(), found, wanted }
            }
            other => other,
        })
    }
}

/// `train.lrx.y` and the unknown key `lrx` give `train.lrx`.
fn cut_after(key: &str, last: &str) -> String {
    let mut out = Vec::new();
    for part in key.split('.') {
        out.push(part.trim());
        if part.trim() == last {
            break;
        }
    }
    out.join(".")
}

/// A TOML value, or else a bare word as a string.
fn parse_value(written: &str) -> Result<toml::Value, String> {
    let parsed = toml::from_str::<toml::Table>(&format!("v = {written}"));
    if let Ok(mut table) = parsed
        && table.len() == 1
        && let Some(value) = table.remove("v")
    {
        return Ok(value);
    }
    if written.is_empty() || written.starts_with(['"', '\'', '[', '{']) || written.contains(['\n', '\r']) {
        return Err(format!("`{written}` is not a TOML value"));
    }
    Ok(toml::Value::String(written.to_string()))
}

/// Sets a dotted key; numbers index lists.
fn set(table: &mut toml::Table, key: &str, value: toml::Value) -> Result<(), String> {
    let (parents, last) = match key.rsplit_once('.') {
        Some((parents, last)) => (Some(parents), last.trim()),
        None => (None, key),
    };
    let mut slot: &mut toml::Value;
    let mut parts = parents.into_iter().flat_map(|p| p.split('.')).map(str::trim);
    let Some(first) = parts.next() else {
        table.insert(last.to_string(), value);
        return Ok(());
    };
    slot = table.entry(first).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    for part in parts {
        slot = match slot {
            toml::Value::Table(inner) => {
                inner.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()))
            }
            toml::Value::Array(items) => element(items, part)?,
            _ => return Err(format!("`{part}` is below a plain value")),
        };
    }
    match slot {
        toml::Value::Table(inner) => {
            inner.insert(last.to_string(), value);
        }
        toml::Value::Array(items) => *element(items, last)? = value,
        _ => return Err(format!("`{last}` is below a plain value")),
    }
    Ok(())
}

/// Removes a dotted key, if it is there.
fn unset(table: &mut toml::Table, key: &str) {
    match key.split_once('.') {
        None => drop(table.remove(key)),
        Some((first, rest)) => match table.get_mut(first) {
            Some(toml::Value::Table(inner)) => unset(inner, rest),
            Some(toml::Value::Array(items)) => {
                let (number, rest) = rest.split_once('.').unwrap_or((rest, ""));
                if let Ok(toml::Value::Table(inner)) = element(items, number) {
                    unset(inner, rest);
                }
            }
            _ => {}
        },
    }
}

fn element<'a>(items: &'a mut [toml::Value], part: &str) -> Result<&'a mut toml::Value, String> {
    let len = items.len();
    let index = part.parse::<usize>().ok().filter(|i| *i < len);
    index.map(|i| &mut items[i]).ok_or_else(|| format!("`{part}` is not an index into a list of {len}"))
}

fn walk(prefix: &str, table: &DeTable<'_>, out: &mut Vec<Entry>) {
    for (key, value) in table.iter() {
        let name: &str = key.get_ref();
        let full = if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") };
        let (key_span, value_span) = (key.span(), value.span());
        walk_value(&full, value.get_ref(), key_span.clone(), out);
        out.push(Entry { key: full, key_span, value_span });
    }
}

fn walk_value(full: &str, value: &DeValue<'_>, key_span: std::ops::Range<usize>, out: &mut Vec<Entry>) {
    match value {
        DeValue::Table(inner) => walk(full, inner, out),
        DeValue::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                let name = format!("{full}.{i}");
                walk_value(&name, item.get_ref(), item.span(), out);
                // Elements of `[[…]]` begin at their own header.
                let at = if item.span().is_empty() { key_span.clone() } else { item.span() };
                out.push(Entry { key: name, key_span: at, value_span: item.span() });
            }
        }
        _ => {}
    }
}

fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_string()
}

/// The words between backticks.
fn backticked(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_string).collect()
}

/// Rust's names of types in words.
fn plain_type(wanted: &str) -> String {
    match wanted {
        "f64" => "a number".to_string(),
        "u32" | "u64" | "usize" => "a whole number of at least 0".to_string(),
        "a sequence" => "a list".to_string(),
        "a map" => "a table".to_string(),
        other => match other.strip_prefix("struct ") {
            Some(_) => "a table".to_string(),
            None => other.to_string(),
        },
    }
}

/// The candidate with the fewest changed letters, if it is close enough to be a misspelling.
fn closest<'c>(word: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    let limit = (word.chars().count() / 3).max(1);
    let by_distance = candidates.map(|c| (distance(word, c), c)).min();
    by_distance.filter(|(d, _)| *d <= limit).map(|(_, c)| c)
}

/// Edit distance with transposed neighbours counted as one (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = vec![0; b.len() + 1];
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut next = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let change = row[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            next[j] = change.min(row[j] + 1).min(next[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                next[j] = next[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut row, next);
    }
    row[b.len()]
}
