//! Answers of the target on disk, and which of them are trained on.
//!
//! Invariant: a line of the log is used again exactly as long as everything that its answer depends on is the same; that
//! is what its key is the hash of. How many rows are wanted is not among it. Rows are made of the ids in the log, and every
//! generated token is either in a row or counted among those left out.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use draftsmith_capture::{AnswerMark, AnswerSpan, AnsweredRow, Dialogue, FinishedDialogue, SamplingMix};
use draftsmith_core::Sampling;
use draftsmith_data::{Conversation, LocatedRow, Row, TokenRow};
use draftsmith_formats::atomic::AtomicError;
use draftsmith_formats::hash::Hasher;
use draftsmith_formats::run::RegenerateTable;
use draftsmith_text::{Message, Tokenizer};
use serde::{Deserialize, Serialize};

use super::data::RowLog;
use super::state::ANSWERS;
use crate::Error;

/// Beginning of the names of logs of other ranks.
const RANK_LOG: &str = "answers-rank-";

/// Changed whenever the same inputs give other answers.
const ANSWERS_VERSION: &str = "answers 1";

/// One line of `answers.jsonl`.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct AnswerLine {
    /// Hash of everything that the answers depend on.
    pub(super) key: String,
    pub(super) id: String,
    pub(super) domain: String,
    /// All turns; empty if there was no room for an answer.
    pub(super) messages: Vec<Message>,
    /// The same as ids. Logs of earlier versions have none: what was written then is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) rows: Option<Vec<AnsweredRow>>,
    pub(super) generated_tokens: u64,
    pub(super) greedy: bool,
    /// The token limit ended the last answer.
    pub(super) cut: bool,
    pub(super) mark: Option<AnswerMark>,
    /// Why the template refused to go on, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) refused: Option<String>,
    /// Answers whose ids were made here, from the text of a server.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) tokenised_here: u64,
    /// Of those, answers where the server counted other tokens: how many more, and how often.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) count_differences: BTreeMap<i64, u64>,
}

/// For fields that are absent where they say nothing.
pub(super) fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl AnswerLine {
    pub(super) fn new(key: String, done: FinishedDialogue) -> AnswerLine {
        AnswerLine {
            key,
            id: done.id,
            domain: done.domain,
            messages: done.messages,
            rows: Some(done.rows),
            generated_tokens: done.generated_tokens as u64,
            greedy: done.greedy,
            cut: done.cut,
            mark: done.mark,
            refused: done.refused,
            tokenised_here: done.tokenised_here,
            count_differences: done.count_differences,
        }
    }

    /// True if the ids of all answers are there.
    fn has_ids(&self) -> bool {
        let rows = self.rows.as_deref().unwrap_or_default();
        let sum: usize = rows.iter().map(AnsweredRow::generated_tokens).sum();
        let in_messages = |row: &AnsweredRow| row.answers.iter().all(|a| a.message < self.messages.len());
        sum as u64 == self.generated_tokens && rows.iter().all(|row| row.is_sound() && in_messages(row))
    }
}

/// A conversation that wants answers.
pub(super) struct Wanted {
    /// Its place among those of the data.
    pub(super) number: u32,
    pub(super) key: String,
    pub(super) dialogue: Dialogue,
    /// Where the answers go.
    pub(super) row: LocatedRow,
}

/// What all answers of a run depend on.
pub(super) struct Origin<'a> {
    pub(super) target_sha256: &'a str,
    pub(super) template_sha256: &'a str,
    pub(super) tokenizer_sha256: &'a str,
    /// Longest prompt and answer together.
    pub(super) max_context: usize,
    pub(super) mix: SamplingMix,
    pub(super) table: &'a RegenerateTable,
    /// Arithmetic of the target in this process.
    pub(super) precision: &'a str,
}

impl Origin<'_> {
    /// The key of a dialogue's answers.
    pub(super) fn key(&self, dialogue: &Dialogue) -> String {
        let writer = match &self.table.server {
            // An address may change; the model behind it must not.
            Some(server) => serde_json::json!([server.api, server.model, server.extra]).to_string(),
            None => self.precision.to_string(),
        };
        // A run file has no `min_p`.
        let Sampling { temperature, top_k, top_p, min_p: _, seed } = self.mix.of(&dialogue.id);
        let turns: Vec<&Message> = dialogue.turns.iter().filter(|m| m.role != "assistant").collect();
        let inputs = serde_json::json!([
            dialogue.id,
            turns,
            dialogue.render.tools,
            dialogue.render.kwargs,
            [u64::from(temperature.to_bits()), u64::from(top_k), u64::from(top_p.to_bits()), seed],
            [self.table.max_new_tokens as usize, self.max_context],
        ]);
        let mut hasher = Hasher::default();
        for part in [
            ANSWERS_VERSION,
            self.target_sha256,
            self.template_sha256,
            self.tokenizer_sha256,
            &writer,
            &inputs.to_string(),
        ] {
            hasher.field(part.as_bytes());
        }
        hasher.finish()
    }
}

/// The log of answers, and those in it that are wanted.
pub(super) struct Answers {
    log: RowLog,
    /// Keys of what is wanted; nothing else is kept in memory.
    wanted: HashSet<String>,
    by_key: HashMap<String, AnswerLine>,
    /// Answers that are wanted and in the log, but without ids.
    without_ids: usize,
}

impl Answers {
    /// Opens the log, and takes over what other ranks left beside it. Lines that nobody wants stay in it: a later run file may want
    /// them again.
    pub(super) fn open<'w>(dir: &Path, wanted: impl Iterator<Item = &'w Wanted>) -> Result<Answers, Error> {
        let (log, lines) = RowLog::open(&dir.join(ANSWERS))?;
        let wanted = wanted.map(|w| w.key.clone()).collect();
        let mut answers = Answers { log, wanted, by_key: HashMap::new(), without_ids: 0 };
        let (mut known, mut without_ids) = (HashSet::new(), HashSet::new());
        let lines = lines.into_iter().filter_map(|line| serde_json::from_value::<AnswerLine>(line).ok());
        for line in lines {
            match line.has_ids() {
                true => {
                    known.insert(line.key.clone());
                    answers.keep(line);
                }
                false => drop(without_ids.insert(line.key)),
            }
        }
        answers.merge(dir, &mut known)?;
        without_ids.retain(|key| answers.wanted.contains(key) && !answers.by_key.contains_key(key));
        answers.without_ids = without_ids.len();
        Ok(answers)
    }

    /// The log of another rank than the first.
    pub(super) fn of_rank(dir: &Path, rank: usize) -> Result<Answers, Error> {
        let (log, _) = RowLog::open(&dir.join(format!("{RANK_LOG}{rank}.jsonl")))?;
        Ok(Answers { log, wanted: HashSet::new(), by_key: HashMap::new(), without_ids: 0 })
    }

    /// Ends the log: all of it is on the device, and seen by whoever opens it.
    pub(super) fn close(self) -> Result<(), Error> {
        self.log.sync()
    }

    /// Takes over what the other ranks wrote since this was opened.
    pub(super) fn take_over(&mut self, dir: &Path) -> Result<(), Error> {
        let mut known = self.by_key.keys().cloned().collect();
        self.merge(dir, &mut known)
    }

    /// Puts every answer of other ranks into the log, once, and removes their logs.
    fn merge(&mut self, dir: &Path, known: &mut HashSet<String>) -> Result<(), Error> {
        for path in rank_logs(dir) {
            let (_, lines) = RowLog::open(&path)?;
            for line in lines.into_iter().filter_map(|line| serde_json::from_value::<AnswerLine>(line).ok()) {
                if line.has_ids() && known.insert(line.key.clone()) {
                    self.push(line)?;
                }
            }
            self.log.sync()?;
            std::fs::remove_file(&path).map_err(|e| AtomicError::from_io("remove", &path, e))?;
        }
        Ok(())
    }

    fn keep(&mut self, line: AnswerLine) {
        if self.wanted.contains(&line.key) {
            self.by_key.insert(line.key.clone(), line);
        }
    }

    /// Answers that are wanted and in the log, but without ids: they have to be asked for again.
    pub(super) fn without_ids(&self) -> usize {
        self.without_ids
    }

    pub(super) fn get(&self, wanted: &Wanted) -> Option<&AnswerLine> {
        self.by_key.get(&wanted.key)
    }

    pub(super) fn push(&mut self, line: AnswerLine) -> Result<(), Error> {
        self.log.push(&serde_json::to_value(&line).expect("an answer is JSON"))?;
        self.keep(line);
        Ok(())
    }

    /// How many rows, from the first, reach a limit of tokens; `None` while they do not, or while one of them is missing. Those of
    /// other ranks are not here yet, but their tokens are known by place.
    pub(super) fn reach(
        &self,
        wanted: &[Wanted],
        max_tokens: Option<u64>,
        others: &HashMap<u32, u64>,
    ) -> Option<usize> {
        let max_tokens = max_tokens?;
        let mut sum = 0;
        for (i, wanted) in wanted.iter().enumerate() {
            let here = self.get(wanted).map(|line| line.generated_tokens);
            sum += here.or_else(|| others.get(&wanted.number).copied())?;
            if sum >= max_tokens {
                return Some(i + 1);
            }
        }
        None
    }
}

/// Logs of other ranks in a folder.
pub(super) fn rank_logs(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let is_one = |name: &str| name.starts_with(RANK_LOG) && name.ends_with(".jsonl");
    let mut logs: Vec<PathBuf> =
        entries.filter(|e| e.file_name().to_str().is_some_and(is_one)).map(|e| e.path()).collect();
    logs.sort();
    logs
}

/// Answers of one domain, counted. Tokens are conserved: `generated_tokens` = `trained_tokens` + `left_out_tokens`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct AnswerCounts {
    /// Conversations asked.
    pub(super) dialogues: u64,
    /// Those whose first prompt left no room for an answer.
    pub(super) unanswered: u64,
    /// Those that ended where the template refused to make the next prompt.
    pub(super) refused: u64,
    /// Those answered greedily.
    pub(super) greedy: u64,
    /// Answers in all turns.
    pub(super) answers: u64,
    /// Tokens in all answers, stop tokens included.
    pub(super) generated_tokens: u64,
    /// Those that are trained on.
    pub(super) trained_tokens: u64,
    /// Those that are not: in answers left out, behind the length limit, in rows that were dropped.
    pub(super) left_out_tokens: u64,
    /// Last answers without text.
    pub(super) empty: u64,
    /// Last answers that end in a loop.
    pub(super) looping: u64,
    /// Other last answers that the token limit ended.
    pub(super) cut: u64,
    /// Last answers that are not trained on: empty ones, loops and cut ones beyond their shares.
    pub(super) left_out: u64,
    /// Answers of a server that gave their text alone: their ids were made here.
    pub(super) tokenised_here: u64,
    /// Of those, answers where the server counted other tokens than we, by how many more.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) count_differences: BTreeMap<i64, u64>,
}

impl AnswerCounts {
    fn add(&mut self, other: &AnswerCounts) {
        let AnswerCounts {
            dialogues,
            unanswered,
            refused,
            greedy,
            answers,
            generated_tokens,
            trained_tokens,
            left_out_tokens,
            empty,
            looping,
            cut,
            left_out,
            tokenised_here,
            count_differences,
        } = other;
        self.dialogues += dialogues;
        self.unanswered += unanswered;
        self.refused += refused;
        self.greedy += greedy;
        self.answers += answers;
        self.generated_tokens += generated_tokens;
        self.trained_tokens += trained_tokens;
        self.left_out_tokens += left_out_tokens;
        self.empty += empty;
        self.looping += looping;
        self.cut += cut;
        self.left_out += left_out;
        self.tokenised_here += tokenised_here;
        for (more, count) in count_differences {
            *self.count_differences.entry(*more).or_default() += count;
        }
    }
}

/// Why generated tokens are not trained on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct LeftOutTokens {
    /// In answers without text.
    pub(super) empty: u64,
    /// In loops beyond their share.
    pub(super) looping: u64,
    /// In cut answers beyond their share.
    pub(super) cut: u64,
    /// Behind `data.max_length`.
    pub(super) beyond_max_length: u64,
    /// In rows with too few trained tokens or ids that the target does not have.
    pub(super) dropped_rows: u64,
}

impl LeftOutTokens {
    pub(super) fn total(&self) -> u64 {
        let LeftOutTokens { empty, looping, cut, beyond_max_length, dropped_rows } = self;
        empty + looping + cut + beyond_max_length + dropped_rows
    }
}

/// Why turns of one dialogue did not stay in one row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct RowsSplit {
    /// The template writes an earlier turn in another way once more turns follow.
    pub(super) history_rewritten: u64,
    /// The text is the same, but its tokens are not those that the model wrote.
    pub(super) tokens_differ: u64,
}

impl RowsSplit {
    pub(super) fn total(&self) -> u64 {
        self.history_rewritten + self.tokens_differ
    }
}

/// One row of a dialogue that is trained on.
pub(super) struct KeptRow<'l> {
    /// Ids and mask.
    pub(super) row: LocatedRow,
    /// What was asked.
    before: &'l Conversation,
    /// The turns up to its last answer.
    turns: &'l [Message],
    /// Its last answer is a cut one.
    cut: bool,
}

impl KeptRow<'_> {
    /// The turns for people.
    pub(super) fn conversation(&self) -> Conversation {
        Conversation { messages: self.turns.to_vec(), last_answer_cut: self.cut, ..self.before.clone() }
    }
}

/// Chooses the answers that are trained on, and counts all of them.
pub(super) struct Selection<'a> {
    tokenizer: &'a Tokenizer,
    loops_left: u64,
    cuts_left: u64,
    pub(super) domains: BTreeMap<String, AnswerCounts>,
    pub(super) left_out: LeftOutTokens,
    pub(super) rows_split: RowsSplit,
}

impl<'a> Selection<'a> {
    /// Shares are of `dialogues` conversations; the first ones in the order of the data keep their odd answers.
    fn new(tokenizer: &'a Tokenizer, table: &RegenerateTable, dialogues: usize) -> Selection<'a> {
        let of = |share: f64| (share * dialogues as f64).floor() as u64;
        let (loops_left, cuts_left) = (of(table.max_loop_share), of(table.max_cut_share));
        Selection {
            tokenizer,
            loops_left,
            cuts_left,
            domains: BTreeMap::new(),
            left_out: LeftOutTokens::default(),
            rows_split: RowsSplit::default(),
        }
    }

    /// The rows of all dialogues that are answered, in the order of the data.
    pub(super) fn choose(
        tokenizer: &'a Tokenizer,
        table: &RegenerateTable,
        wanted: &'a [Wanted],
        answers: &'a Answers,
    ) -> (Vec<KeptRow<'a>>, Selection<'a>) {
        let mut selection = Selection::new(tokenizer, table, wanted.len());
        let lines = wanted.iter().filter_map(|w| Some((w, answers.get(w)?)));
        let rows = lines.flat_map(|(w, line)| selection.take(&w.row, line)).collect();
        (rows, selection)
    }

    /// The rows of a dialogue, without a last answer that is left out.
    fn take<'l>(&mut self, row: &'l LocatedRow, line: &'l AnswerLine) -> Vec<KeptRow<'l>> {
        let mut rows = line.rows.clone().unwrap_or_default();
        let counts = self.domains.entry(line.domain.clone()).or_default();
        counts.dialogues += 1;
        counts.unanswered += u64::from(line.messages.is_empty());
        counts.refused += u64::from(line.refused.is_some());
        counts.greedy += u64::from(line.greedy);
        counts.answers += rows.iter().map(|row| row.answers.len() as u64).sum::<u64>();
        counts.generated_tokens += line.generated_tokens;
        counts.tokenised_here += line.tokenised_here;
        for (more, count) in &line.count_differences {
            *counts.count_differences.entry(*more).or_default() += count;
        }
        let one_of = |left: &mut u64| {
            let some = *left > 0;
            *left -= u64::from(some);
            some
        };
        let (keep, tokens_of) = match line.mark {
            None => (true, None),
            Some(AnswerMark::Empty) => {
                counts.empty += 1;
                (false, Some(&mut self.left_out.empty))
            }
            Some(AnswerMark::Loop) => {
                counts.looping += 1;
                (one_of(&mut self.loops_left), Some(&mut self.left_out.looping))
            }
            Some(AnswerMark::Cut) => {
                counts.cut += 1;
                (one_of(&mut self.cuts_left), Some(&mut self.left_out.cut))
            }
        };
        if !keep {
            counts.left_out += 1;
            if let Some(last) = rows.pop() {
                let tokens = last.answers.last().map_or(0, |a| (a.end - a.start) as u64);
                counts.left_out_tokens += tokens;
                if let Some(sum) = tokens_of {
                    *sum += tokens;
                }
                rows.extend(last.without_last());
            }
        }
        for pair in rows.windows(2) {
            let text = |row: &AnsweredRow| self.tokenizer.decode(&row.ids, false);
            match text(&pair[1]).starts_with(&text(&pair[0])) {
                true => self.rows_split.tokens_differ += 1,
                false => self.rows_split.history_rewritten += 1,
            }
        }
        let Row::Conversation(before) = &row.row else { return Vec::new() };
        let (id, several, last) = (row.id(), rows.len() > 1, rows.len().saturating_sub(1));
        let rows = rows.into_iter().enumerate().map(|(i, answered)| {
            // A row without an answer is not sound, and the log holds only sound ones.
            let message = |a: Option<&AnswerSpan>| a.map_or(0, |a| a.message);
            let end = message(answered.answers.last()) + 1;
            let turns = &line.messages[..end.min(line.messages.len())];
            let id = match several {
                true => format!("{id}#turn{}", message(answered.answers.first())),
                false => id.clone(),
            };
            let tokens = TokenRow {
                id: Some(id),
                domain: before.domain.clone(),
                loss_mask: answered.loss_mask(),
                ids: answered.ids,
            };
            let row = LocatedRow { row: Row::Tokens(tokens), location: row.location.clone(), repeat: 0 };
            KeptRow { row, before, turns, cut: keep && line.cut && i == last }
        });
        rows.collect()
    }

    /// Counts what became of the tokens that [`Selection::take`] gave: those trained on in each domain, and why others
    /// are not.
    pub(super) fn settle(&mut self, trained: impl Fn(&str) -> u64, cut: u64, dropped: u64) {
        for (domain, counts) in &mut self.domains {
            counts.trained_tokens = trained(domain);
            counts.left_out_tokens = counts.generated_tokens.saturating_sub(counts.trained_tokens);
        }
        self.left_out.beyond_max_length += cut;
        self.left_out.dropped_rows += dropped;
    }

    /// True if every generated token is trained on or counted as left out, with a reason.
    pub(super) fn is_balanced(&self) -> bool {
        let total = self.total();
        total.generated_tokens == total.trained_tokens + self.left_out.total()
            && total.left_out_tokens == self.left_out.total()
    }

    /// All domains together.
    pub(super) fn total(&self) -> AnswerCounts {
        let mut sum = AnswerCounts::default();
        self.domains.values().for_each(|counts| sum.add(counts));
        sum
    }

    /// One line per domain, for people.
    pub(super) fn table(&self) -> String {
        let mut out = format!(
            "{:<24} {:>9} {:>7} {:>8} {:>10} {:>10} {:>15} {:>6} {:>8} {:>6} {:>9}\n",
            "answers",
            "dialogues",
            "greedy",
            "answers",
            "generated",
            "trained",
            "left out tokens",
            "empty",
            "looping",
            "cut",
            "left out"
        );
        let total = ("all".to_string(), self.total());
        for (domain, c) in self.domains.clone().into_iter().chain([total]) {
            out.push_str(&format!(
                "{domain:<24} {:>9} {:>7} {:>8} {:>10} {:>10} {:>15} {:>6} {:>8} {:>6} {:>9}\n",
                c.dialogues,
                c.greedy,
                c.answers,
                c.generated_tokens,
                c.trained_tokens,
                c.left_out_tokens,
                c.empty,
                c.looping,
                c.cut,
                c.left_out
            ));
        }
        let LeftOutTokens { empty, looping, cut, beyond_max_length, dropped_rows } = self.left_out;
        let parts = [
            ("in empty answers", empty),
            ("in loops", looping),
            ("in cut answers", cut),
            ("behind `data.max_length`", beyond_max_length),
            ("in dropped rows", dropped_rows),
        ];
        let parts: Vec<String> =
            parts.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n} {what}")).collect();
        if !parts.is_empty() {
            out.push_str(&format!("tokens left out: {}\n", parts.join(", ")));
        }
        let RowsSplit { history_rewritten, tokens_differ } = self.rows_split;
        if self.rows_split.total() > 0 {
            out.push_str(&format!(
                "turns in rows of their own: {history_rewritten} because the template rewrites earlier turns, \
                 {tokens_differ} because an answer's text is tokenised in another way than it was written\n"
            ));
        }
        let total = self.total();
        if total.refused > 0 {
            out.push_str(&format!("dialogues that the template did not let go on: {}\n", total.refused));
        }
        if total.tokenised_here > 0 {
            let differ: u64 = total.count_differences.values().sum();
            let how: Vec<String> =
                total.count_differences.iter().map(|(more, n)| format!("{more:+}: {n}")).collect();
            let how = if how.is_empty() { String::new() } else { format!(" ({})", how.join(", ")) };
            out.push_str(&format!(
                "answers tokenised here, as the server gave no ids: {}; the server counted other tokens in {differ}{how}\n",
                total.tokenised_here
            ));
        }
        out
    }
}
