//! Files to one list of rows: validated, de-duplicated, decontaminated, weighted, shuffled.

use std::collections::HashSet;
use std::path::PathBuf;

use draftsmith_text::Message;
use sha2::{Digest, Sha256};

use crate::decontam::words;
use crate::rng::Rng;
use crate::{
    Conversation, DataError, Decontaminator, DropReason, LocatedRow, ReadOptions, Report, Row, SourceReader,
};

/// A file and how much of it is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceSpec {
    /// The file.
    pub path: PathBuf,
    /// How often each row is taken; a fraction takes that share of the rows.
    pub weight: f64,
    /// Take at most this many rows, before weighting.
    pub max_rows: Option<u64>,
}

impl SourceSpec {
    /// All rows of a file, once.
    pub fn new(path: impl Into<PathBuf>) -> SourceSpec {
        SourceSpec { path: path.into(), weight: 1.0, max_rows: None }
    }
}

/// What makes a row a duplicate of an earlier one. Case, punctuation and white space do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dedupe {
    /// Nothing.
    Off,
    /// The same turns, answers included.
    #[default]
    Conversation,
    /// The same system and user turns: for prompts whose answers are written anew.
    Prompt,
}

/// How files become rows.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// How files are read.
    pub read: ReadOptions,
    /// Broken rows are errors instead of being dropped and counted.
    pub strict: bool,
    /// Which rows are duplicates.
    pub dedupe: Dedupe,
    /// System message for conversations that have none.
    pub system: Option<String>,
    /// Rows that overlap with these texts are dropped.
    pub decontaminate: Option<Decontaminator>,
    /// Mix the rows of all files; without it they stay in the order of the files.
    pub shuffle: bool,
    /// Key of sampling and shuffling.
    pub seed: u64,
}

/// Rows and how they came about.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The rows.
    pub rows: Vec<LocatedRow>,
    /// What was read and dropped; tokens are not counted yet.
    pub report: Report,
}

/// Reads the files. `progress` gets the rows read so far, now and then.
///
/// # Errors
/// Those of [`SourceReader`]; in strict mode [`DataError::BadRow`]; [`DataError::NoRows`] if nothing is left.
pub fn load(
    sources: &[SourceSpec],
    options: &LoadOptions,
    mut progress: impl FnMut(u64),
) -> Result<Loaded, DataError> {
    let mut report = Report::default();
    let mut rows = Vec::new();
    let mut seen: HashSet<[u8; 16]> = HashSet::new();
    for (index, source) in sources.iter().enumerate() {
        let mut sample = Rng::new(options.seed, &format!("weight {index}"));
        let mut reader = SourceReader::open(&source.path, options.read.clone())?;
        let mut taken = 0u64;
        while source.max_rows.is_none_or(|max| taken < max) {
            let Some((location, row)) = reader.next_row()? else { break };
            report.rows_read += 1;
            if report.rows_read.is_multiple_of(1000) {
                progress(report.rows_read);
            }
            let mut row = match row {
                Ok(row) => row,
                Err(problem) if options.strict => return Err(DataError::BadRow { location, problem }),
                Err(problem) => {
                    report.drop_row(problem.reason());
                    continue;
                }
            };
            if let (Row::Conversation(row), Some(system)) = (&mut row, &options.system)
                && row.messages.first().is_none_or(|m| m.role != "system")
            {
                row.messages.insert(0, Message::new("system", system.as_str()));
            }
            if let (Some(eval), Row::Conversation(row)) = (&options.decontaminate, &row)
                && row.messages.iter().any(|m| m.role != "system" && eval.overlaps(&m.content))
            {
                report.drop_row(DropReason::Contaminated);
                continue;
            }
            if options.dedupe != Dedupe::Off && !seen.insert(fingerprint(&row, options.dedupe)) {
                report.drop_row(DropReason::Duplicate);
                continue;
            }
            taken += 1;
            // A weight is so many whole copies, and one more with the probability of the rest.
            let whole = source.weight.max(0.0).floor();
            let copies = whole as u32 + u32::from(sample.unit() < source.weight.max(0.0) - whole);
            report.rows_repeated += u64::from(copies.saturating_sub(1));
            report.limited += u64::from(copies == 0);
            for repeat in 0..copies {
                rows.push(LocatedRow { row: row.clone(), location: location.clone(), repeat });
            }
        }
    }
    if rows.is_empty() {
        let files: Vec<String> = sources.iter().map(|s| format!("`{}`", s.path.display())).collect();
        return Err(DataError::NoRows {
            files: files.join(", "),
            dropped: format!("{} read, {}", report.rows_read, report.dropped_in_words()),
        });
    }
    if options.shuffle {
        Rng::new(options.seed, "order").shuffle(&mut rows);
    }
    report.rows = rows.len() as u64;
    Ok(Loaded { rows, report })
}

/// Takes `count` prompts away from the end of the list, for validation; rows with the same prompt go with them, so that
/// no validation prompt is trained. Each prompt is held back once.
pub fn hold_back(loaded: &mut Loaded, count: usize) -> Vec<LocatedRow> {
    let mut keys = HashSet::new();
    let mut held = Vec::new();
    for row in loaded.rows.iter().rev() {
        if held.len() == count {
            break;
        }
        if keys.insert(fingerprint(&row.row, Dedupe::Prompt)) {
            held.push(row.clone());
        }
    }
    held.reverse();
    leave_out_prompts(loaded, &held);
    held
}

/// Takes away the rows whose prompt is that of one of `held`, which are for validation.
pub fn leave_out_prompts(loaded: &mut Loaded, held: &[LocatedRow]) {
    let key = |row: &LocatedRow| fingerprint(&row.row, Dedupe::Prompt);
    let keys: HashSet<[u8; 16]> = held.iter().map(key).collect();
    let before = loaded.rows.len();
    loaded.rows.retain(|row| !keys.contains(&key(row)));
    loaded.report.held_back += (before - loaded.rows.len()) as u64;
    loaded.report.rows = loaded.rows.len() as u64;
}

/// 128 bits of a row's normalised content.
fn fingerprint(row: &Row, dedupe: Dedupe) -> [u8; 16] {
    let mut hasher = Sha256::new();
    match row {
        Row::Conversation(row) if dedupe == Dedupe::Prompt => add_words(&mut hasher, &row.prompt_text()),
        Row::Conversation(row) => add_conversation(&mut hasher, row),
        Row::Tokens(row) => row.ids.iter().for_each(|id| hasher.update(id.to_le_bytes())),
    }
    let digest = hasher.finalize();
    digest[..16].try_into().expect("a digest has 32 bytes")
}

fn add_conversation(hasher: &mut Sha256, row: &Conversation) {
    for message in &row.messages {
        hasher.update(message.role.as_bytes());
        hasher.update([1]);
        add_words(hasher, &message.content);
        for more in [message.reasoning_content.clone(), message.tool_calls.as_ref().map(|c| c.to_string())] {
            hasher.update([2]);
            add_words(hasher, &more.unwrap_or_default());
        }
    }
}

fn add_words(hasher: &mut Sha256, text: &str) {
    let words = words(text);
    if words.is_empty() {
        // Text without words (code, emoji) is taken as it is.
        hasher.update(text.trim().as_bytes());
    }
    for word in words {
        hasher.update(word.as_bytes());
        hasher.update([0]);
    }
}
