//! Rows to token ids and loss mask.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use draftsmith_formats::tokens::TokenRow as PreparedRow;
use draftsmith_text::{
    ChatTemplate, MaskOptions, MaskedRow, Message, TextError, Tokenizer, control_token_in, mask_conversation,
};

use crate::error::text_reason;
use crate::load::{Fingerprint, token_fingerprint};
use crate::row::is_trained;
use crate::{
    Change, Conversation, DataError, DomainCounts, DropReason, LocatedRow, Report, Row, RowError,
    TokenCounts, TokenRow,
};

/// How rows become tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareOptions {
    /// What the template gets, which turns are trained.
    pub mask: MaskOptions,
    /// Longest row in tokens.
    pub max_length: usize,
    /// Rows with fewer trained tokens are dropped.
    pub min_trained_tokens: usize,
    /// Vocabulary of the target (rows of its head).
    pub target_vocab: usize,
    /// Rows that train nothing, cannot be rendered or hold control tokens in their text are errors instead of being
    /// dropped and counted.
    pub strict: bool,
}

/// File, and line or row in it.
type Place = (Arc<Path>, u64);

/// Turns rows into tokens one by one, and counts.
#[derive(Debug)]
pub struct Preparer<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    options: PrepareOptions,
    report: Report,
    counts: TokenCounts,
    lengths: Vec<u64>,
    /// Where each row stood first, by its ids; absent if duplicates may pass.
    seen: Option<HashMap<Fingerprint, Place>>,
}

impl<'a> Preparer<'a> {
    /// Starts with the report of [`crate::load`], or an empty one.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: &'a ChatTemplate,
        options: PrepareOptions,
        report: Report,
    ) -> Preparer<'a> {
        let counts = TokenCounts::new(options.target_vocab);
        let report = Report { rows: 0, ..report };
        Preparer { tokenizer, template, options, report, counts, lengths: Vec::new(), seen: None }
    }

    /// Drops rows whose token ids (and what of them is trained) occurred before. The copies of a row that a weight above 1
    /// asks for stay.
    pub fn without_duplicates(mut self) -> Preparer<'a> {
        self.seen = Some(HashMap::new());
        self
    }

    /// The rows that one row gives (their ids end in `#turnN` where there are several): usually one, none if it is dropped, several if the template rewrites history.
    ///
    /// # Errors
    /// [`DataError::Text`] if the conversation cannot be rendered; in strict mode [`DataError::BadRow`].
    pub fn push(&mut self, located: &LocatedRow) -> Result<Vec<PreparedRow>, DataError> {
        let drop = |this: &mut Self, problem: RowError| {
            if this.options.strict {
                return Err(DataError::BadRow { location: located.location.clone(), problem });
            }
            this.report.drop_row(problem.reason(), &located.location, &problem);
            Ok(Vec::new())
        };
        let candidates = match &located.row {
            Row::Tokens(row) => match self.check_tokens(row) {
                Ok(()) => {
                    vec![(located.id(), row.ids.clone(), row.loss_mask.clone(), turn_ends(&row.loss_mask))]
                }
                Err(problem) => {
                    self.report.trained_tokens_dropped += row.trained_tokens() as u64;
                    return drop(self, problem);
                }
            },
            Row::Conversation(row) => match self.mask(row) {
                Ok(answers) => {
                    self.report.change(Change::AnswersNotTrained, u64::from(answers.not_trained > 0));
                    self.report.change(Change::EndWithoutAnswerLeftOut, u64::from(answers.left_out > 0));
                    for change in &answers.not_rendered {
                        self.report.change(*change, 1);
                    }
                    let rows = answers.rows;
                    if rows.is_empty() {
                        return drop(self, RowError::NothingTrained);
                    }
                    let split = rows.len() > 1;
                    let name = |masked: &MaskedRow| match masked.turns.first() {
                        Some(turn) if split => format!("{}#turn{}", located.id(), turn.message),
                        _ => located.id(),
                    };
                    rows.into_iter()
                        .map(|masked| {
                            let ends = masked.turns.iter().map(|turn| turn.tokens.end).collect();
                            (name(&masked), masked.ids, masked.loss_mask, ends)
                        })
                        .collect()
                }
                Err(Problem::Row(problem)) => return drop(self, problem),
                Err(Problem::Text(source)) => match text_reason(&source) {
                    Some(reason) if !self.options.strict => {
                        self.report.drop_row(reason, &located.location, &source);
                        return Ok(Vec::new());
                    }
                    _ => return Err(DataError::Text { location: located.location.clone(), source }),
                },
            },
        };
        self.report.rows_split += candidates.len().saturating_sub(1) as u64;
        let mut out = Vec::with_capacity(candidates.len());
        for (id, mut ids, mut loss_mask, ends) in candidates {
            let cut = self.cut(&ids, &ends);
            if let Some((length, at_turn)) = cut {
                self.report.trained_tokens_cut += trained(&loss_mask[length..]);
                ids.truncate(length);
                loss_mask.truncate(length);
                let counter =
                    if at_turn { &mut self.report.cut_at_turn } else { &mut self.report.cut_inside_turn };
                *counter += 1;
            }
            let row = PreparedRow { id, domain: located.domain().to_owned(), ids, loss_mask };
            let found = row.trained_tokens();
            let wanted = self.options.min_trained_tokens.max(1);
            if found < wanted {
                self.report.trained_tokens_dropped += found as u64;
                out.extend(drop(self, RowError::TooFewTrainedTokens { found, wanted })?);
                continue;
            }
            if let Some(seen) = &mut self.seen {
                let place = (Arc::clone(&located.location.path), located.location.number);
                let first =
                    seen.entry(token_fingerprint(&row.ids, &row.loss_mask)).or_insert_with(|| place.clone());
                if *first != place {
                    let why = format!(
                        "its token ids are those of line or row {} of `{}`",
                        first.1,
                        file_name(&first.0)
                    );
                    self.report.drop_row(DropReason::Duplicate, &located.location, &why);
                    continue;
                }
            }
            self.count(&row);
            out.push(row);
        }
        Ok(out)
    }

    /// Where a row that is too long is cut: after the last turn that fits, else inside the first turn.
    fn cut(&self, ids: &[u32], ends: &[usize]) -> Option<(usize, bool)> {
        let max = self.options.max_length;
        if ids.len() <= max {
            return None;
        }
        match ends.iter().copied().filter(|end| *end <= max).max() {
            Some(end) => Some((end, true)),
            None => Some((max, false)),
        }
    }

    fn count(&mut self, row: &PreparedRow) {
        let (tokens, trained) = (row.ids.len() as u64, row.trained_tokens() as u64);
        self.report.rows += 1;
        self.report.tokens += tokens;
        self.report.trained_tokens += trained;
        let domain: &mut DomainCounts = self.report.domains.entry(row.domain.clone()).or_default();
        domain.rows += 1;
        domain.tokens += tokens;
        domain.trained_tokens += trained;
        self.counts.add(&row.ids, &row.loss_mask);
        self.lengths.push(tokens);
    }

    fn check_tokens(&self, row: &TokenRow) -> Result<(), RowError> {
        let vocab = self.options.target_vocab;
        match row.ids.iter().position(|id| *id as usize >= vocab) {
            Some(at) => Err(RowError::TokenOutOfVocabulary { at, id: row.ids[at], vocab }),
            None => Ok(()),
        }
    }

    fn mask(&self, row: &Conversation) -> Result<MaskedAnswers, Problem> {
        if !row.has_answer() {
            return Err(Problem::Row(RowError::NoAnswer));
        }
        if let Some(problem) = control_token(self.tokenizer, row.messages.iter().enumerate()) {
            return Err(Problem::Row(problem));
        }
        mask_row(self.tokenizer, self.template, row, &self.options.mask).map_err(|error| match error {
            TextError::TemplateRaised { message } => Problem::Row(RowError::TemplateRefused { message }),
            other => Problem::Text(other),
        })
    }

    /// The report so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The report and the token counts.
    pub fn finish(mut self) -> (Report, TokenCounts) {
        self.report.set_lengths(self.lengths);
        (self.report, self.counts)
    }
}

/// The first control token that is written out in messages, each of which comes with its index in the conversation.
pub fn control_token<'m>(
    tokenizer: &Tokenizer,
    mut messages: impl Iterator<Item = (usize, &'m Message)>,
) -> Option<RowError> {
    messages.find_map(|(at, message)| {
        let id = control_token_in(tokenizer, message)?;
        let token = String::from_utf8_lossy(tokenizer.token_to_piece(id)).into_owned();
        Some(RowError::SpecialTokenInText { at, token })
    })
}

/// A conversation as rows, and what of it is in none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskedAnswers {
    /// The rows; none if no answer is trained.
    pub rows: Vec<MaskedRow>,
    /// Answers whose message says not to train on them.
    pub not_trained: usize,
    /// Messages behind the last answer.
    pub left_out: usize,
    /// What answers hold and the template leaves out of them.
    pub not_rendered: BTreeSet<Change>,
}

/// Renders, tokenises and masks a conversation. Answers whose message says so (`weight` 0, `train` or `loss` false) are
/// context alone, and so are answers of nothing but calls that the template leaves out; rows without another answer are
/// left out.
///
/// # Errors
/// Those of [`mask_conversation`].
pub fn mask_row(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    row: &Conversation,
    options: &MaskOptions,
) -> Result<MaskedAnswers, TextError> {
    let mut rows = mask_conversation(tokenizer, template, &row.messages, &row.mask_options(options))?;
    let mut not_rendered = BTreeSet::new();
    for masked in &mut rows {
        let text = &masked.text;
        let (kept, context) = std::mem::take(&mut masked.turns).into_iter().partition::<Vec<_>, _>(|turn| {
            let message = &row.messages[turn.message];
            let lost = missing(message, text.get(turn.added.clone()).unwrap_or_default());
            // Nothing but calls that the template leaves out: what would be left to train is to say nothing.
            let empty = message.content.trim().is_empty() && lost.contains(&Change::CallsNotRendered);
            not_rendered.extend(lost);
            is_trained(message) && !empty
        });
        masked.turns = kept;
        for turn in context {
            masked.loss_mask[turn.tokens].fill(false);
        }
    }
    rows.retain(|masked| !masked.turns.is_empty());
    let answers = row.messages.iter().filter(|m| m.role == "assistant");
    let last = row.messages.iter().rposition(|m| m.role == "assistant");
    Ok(MaskedAnswers {
        rows,
        not_trained: answers.filter(|m| !is_trained(m)).count(),
        left_out: last.map_or(0, |last| row.messages.len() - last - 1),
        not_rendered,
    })
}

/// What a message holds and its rendered turn does not.
fn missing(message: &Message, written: &str) -> Vec<Change> {
    let calls = message.tool_calls.as_ref().and_then(|calls| calls.as_array());
    let names = calls.into_iter().flatten().filter_map(|call| call.pointer("/function/name")?.as_str());
    let reasoning = message.reasoning_content.as_deref().unwrap_or_default().trim();
    let mut out = Vec::new();
    if names.into_iter().any(|name| !written.contains(name)) {
        out.push(Change::CallsNotRendered);
    }
    if !written.contains(reasoning) {
        out.push(Change::ReasoningNotRendered);
    }
    out
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What stops a conversation.
enum Problem {
    Row(RowError),
    Text(TextError),
}

fn trained(loss_mask: &[bool]) -> u64 {
    loss_mask.iter().filter(|m| **m).count() as u64
}

/// Ends of the runs of trained tokens.
fn turn_ends(loss_mask: &[bool]) -> Vec<usize> {
    (1..=loss_mask.len()).filter(|end| loss_mask[end - 1] && loss_mask.get(*end) != Some(&true)).collect()
}

/// Prepares all rows. `progress` gets the rows done so far, now and then.
///
/// # Errors
/// Those of [`Preparer::push`]; [`DataError::NoRows`] if nothing is left.
pub fn prepare(
    rows: &[LocatedRow],
    mut preparer: Preparer<'_>,
    mut progress: impl FnMut(u64),
) -> Result<(Vec<PreparedRow>, Report, TokenCounts), DataError> {
    let mut out = Vec::with_capacity(rows.len());
    for (done, row) in rows.iter().enumerate() {
        out.extend(preparer.push(row)?);
        if (done + 1).is_multiple_of(100) {
            progress(done as u64 + 1);
        }
    }
    let (report, counts) = preparer.finish();
    if out.is_empty() {
        let mut files: Vec<String> =
            rows.iter().map(|r| format!("`{}`", r.location.path.display())).collect();
        files.dedup();
        files.sort();
        files.dedup();
        return Err(DataError::NoRows { files: files.join(", "), dropped: report.dropped_in_words() });
    }
    Ok((out, report, counts))
}
