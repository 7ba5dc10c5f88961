//! Files to one list of rows: validated, de-duplicated, decontaminated, weighted, shuffled.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use draftsmith_text::Message;
use sha2::{Digest, Sha256};

use crate::decontam::words;
use crate::rng::Rng;
use crate::row::is_system;
use crate::{
    DataError, Decontaminator, DropReason, LocatedRow, Ranged, ReadOptions, Report, Row, SourceReader,
};

/// A file and how much of it is taken.
#[derive(Clone, Debug)]
pub struct SourceSpec {
    /// The file; of one that lies elsewhere its name in messages.
    pub path: PathBuf,
    /// The file itself, if it lies elsewhere.
    pub elsewhere: Option<Arc<dyn Ranged>>,
    /// How often each row is taken; a fraction takes that share of the rows.
    pub weight: f64,
    /// Take at most this many rows, before weighting.
    pub max_rows: Option<u64>,
}

impl SourceSpec {
    /// All rows of a file, once.
    pub fn new(path: impl Into<PathBuf>) -> SourceSpec {
        SourceSpec { path: path.into(), elsewhere: None, weight: 1.0, max_rows: None }
    }

    /// Its rows.
    ///
    /// # Errors
    /// As [`SourceReader::open`].
    pub fn open(&self, options: ReadOptions) -> Result<SourceReader, DataError> {
        match &self.elsewhere {
            Some(file) => SourceReader::open_ranged(&self.path, Arc::clone(file), options),
            None => SourceReader::open(&self.path, options),
        }
    }
}

/// What makes a row a duplicate of an earlier one here, before there are token ids: everything that the rendered text
/// depends on is the same. Rows whose token ids are the same nevertheless are found by [`crate::Preparer`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dedupe {
    /// Nothing.
    Off,
    /// The same turns, tools and template variables, answers included.
    #[default]
    Conversation,
    /// The same, answers aside: for prompts whose answers are written anew.
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
/// Those of [`SourceReader`], which speak of a whole file; in strict mode [`DataError::BadRow`]; [`DataError::NoRows`] if nothing is left.
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
        let mut reader = source.open(options.read.clone())?;
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
                    let more = reader.notes().rows_lost;
                    report.rows_read += more;
                    report.drop_row(problem.reason(), &location, &problem);
                    report.drop_more(problem.reason(), more);
                    continue;
                }
            };
            report.note(reader.notes());
            if let (Row::Conversation(row), Some(system)) = (&mut row, &options.system)
                && row.messages.first().is_none_or(|m| !is_system(&m.role))
            {
                row.messages.insert(0, Message::new("system", system.as_str()));
            }
            if let (Some(eval), Row::Conversation(row)) = (&options.decontaminate, &row)
                && row.messages.iter().any(|m| m.role != "system" && eval.overlaps(&m.content))
            {
                report.drop_row(DropReason::Contaminated, &location, &"it overlaps with an evaluation set");
                continue;
            }
            if options.dedupe != Dedupe::Off && !seen.insert(fingerprint(&row, options.dedupe)) {
                report.drop_row(DropReason::Duplicate, &location, &"an earlier row says the same");
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
/// no validation prompt is trained. Each prompt is held back once. Prompts are compared without case and punctuation:
/// what is nearly a validation prompt shall not be trained either.
pub fn hold_back(loaded: &mut Loaded, count: usize) -> Vec<LocatedRow> {
    let mut keys = HashSet::new();
    let mut held = Vec::new();
    for row in loaded.rows.iter().rev() {
        if held.len() == count {
            break;
        }
        if keys.insert(prompt_words(&row.row)) {
            held.push(row.clone());
        }
    }
    held.reverse();
    leave_out_prompts(loaded, &held);
    held
}

/// Takes away the rows whose prompt is that of one of `held`, which are for validation. Those that differ from it in case,
/// punctuation, tools or other fields are counted under [`DropReason::LikeValidation`].
pub fn leave_out_prompts(loaded: &mut Loaded, held: &[LocatedRow]) {
    let alike: HashSet<Fingerprint> = held.iter().map(|row| prompt_words(&row.row)).collect();
    let same: HashSet<Fingerprint> = held.iter().map(|row| fingerprint(&row.row, Dedupe::Prompt)).collect();
    let report = &mut loaded.report;
    loaded.rows.retain(|row| {
        if !alike.contains(&prompt_words(&row.row)) {
            return true;
        }
        if same.contains(&fingerprint(&row.row, Dedupe::Prompt)) {
            report.held_back += 1;
        } else {
            let why = "its prompt is one of validation's but for case, punctuation, tools or other fields";
            report.drop_row(DropReason::LikeValidation, &row.location, &why);
        }
        false
    });
    loaded.report.rows = loaded.rows.len() as u64;
}

/// 128 bits of a hash.
pub(crate) type Fingerprint = [u8; 16];

/// Of everything that makes a row what it is.
fn fingerprint(row: &Row, dedupe: Dedupe) -> Fingerprint {
    let mut hasher = Sha256::new();
    match row {
        Row::Conversation(row) => {
            hasher.update(row.inputs(dedupe != Dedupe::Prompt).to_string());
        }
        Row::Tokens(row) => add_tokens(&mut hasher, &row.ids, &row.loss_mask),
    }
    finish(hasher)
}

/// Of a prompt's words.
fn prompt_words(row: &Row) -> Fingerprint {
    let mut hasher = Sha256::new();
    match row {
        Row::Conversation(row) => add_words(&mut hasher, &row.prompt_text()),
        Row::Tokens(row) => add_tokens(&mut hasher, &row.ids, &[]),
    }
    finish(hasher)
}

/// Of token ids and what of them is trained.
pub(crate) fn token_fingerprint(ids: &[u32], loss_mask: &[bool]) -> Fingerprint {
    let mut hasher = Sha256::new();
    add_tokens(&mut hasher, ids, loss_mask);
    finish(hasher)
}

fn finish(hasher: Sha256) -> Fingerprint {
    hasher.finalize()[..16].try_into().expect("a digest has 32 bytes")
}

fn add_tokens(hasher: &mut Sha256, ids: &[u32], loss_mask: &[bool]) {
    for id in ids {
        hasher.update(id.to_le_bytes());
    }
    for trained in loss_mask {
        hasher.update([u8::from(*trained)]);
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
