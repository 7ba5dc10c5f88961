//! Answers of the target on disk, and which of them are trained on.
//!
//! Invariant: a line of the log is used again exactly as long as everything that its answer depends on is the same; that
//! is what its key is the hash of. How many rows are wanted is not among it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use draftsmith_capture::{AnswerMark, Dialogue, FinishedDialogue, SamplingMix};
use draftsmith_core::Sampling;
use draftsmith_data::{Conversation, LocatedRow, Row};
use draftsmith_formats::hash::Hasher;
use draftsmith_formats::run::RegenerateTable;
use draftsmith_text::Message;
use serde::{Deserialize, Serialize};

use super::data::RowLog;
use crate::Error;

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
    pub(super) generated_tokens: u64,
    pub(super) greedy: bool,
    /// The token limit ended the last answer.
    pub(super) cut: bool,
    pub(super) mark: Option<AnswerMark>,
}

impl AnswerLine {
    pub(super) fn new(key: String, done: FinishedDialogue) -> AnswerLine {
        AnswerLine {
            key,
            id: done.id,
            domain: done.domain,
            messages: done.messages,
            generated_tokens: done.generated_tokens as u64,
            greedy: done.greedy,
            cut: done.cut,
            mark: done.mark,
        }
    }
}

/// A conversation that wants answers.
pub(super) struct Wanted {
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
    by_key: HashMap<String, AnswerLine>,
}

impl Answers {
    /// Opens the log. Lines that nobody wants stay in it: a later run file may want them again.
    pub(super) fn open<'w>(path: &Path, wanted: impl Iterator<Item = &'w Wanted>) -> Result<Answers, Error> {
        let (log, lines) = RowLog::open(path)?;
        let wanted: HashSet<&str> = wanted.map(|w| w.key.as_str()).collect();
        let lines = lines.into_iter().filter_map(|line| serde_json::from_value::<AnswerLine>(line).ok());
        let lines = lines.filter(|line| wanted.contains(line.key.as_str()));
        Ok(Answers { log, by_key: lines.map(|line| (line.key.clone(), line)).collect() })
    }

    pub(super) fn get(&self, wanted: &Wanted) -> Option<&AnswerLine> {
        self.by_key.get(&wanted.key)
    }

    pub(super) fn push(&mut self, line: AnswerLine) -> Result<(), Error> {
        self.log.push(&serde_json::to_value(&line).expect("an answer is JSON"))?;
        self.by_key.insert(line.key.clone(), line);
        Ok(())
    }

    /// How many rows, from the first, reach a limit of tokens; `None` while they do not, or while one of them is missing.
    pub(super) fn reach(&self, wanted: &[Wanted], max_tokens: Option<u64>) -> Option<usize> {
        let max_tokens = max_tokens?;
        let mut sum = 0;
        for (i, wanted) in wanted.iter().enumerate() {
            sum += self.get(wanted)?.generated_tokens;
            if sum >= max_tokens {
                return Some(i + 1);
            }
        }
        None
    }
}

/// Answers of one domain, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct AnswerCounts {
    /// Conversations asked.
    pub(super) dialogues: u64,
    /// Those whose first prompt left no room for an answer.
    pub(super) unanswered: u64,
    /// Those answered greedily.
    pub(super) greedy: u64,
    /// Tokens in all answers.
    pub(super) generated_tokens: u64,
    /// Last answers without text.
    pub(super) empty: u64,
    /// Last answers that end in a loop.
    pub(super) looping: u64,
    /// Other last answers that the token limit ended.
    pub(super) cut: u64,
    /// Last answers that are not trained on: empty ones, loops and cut ones beyond their shares.
    pub(super) left_out: u64,
}

/// Chooses the answers that are trained on, and counts all of them.
pub(super) struct Selection {
    loops_left: u64,
    cuts_left: u64,
    pub(super) domains: BTreeMap<String, AnswerCounts>,
}

impl Selection {
    /// Shares are of `dialogues` conversations; the first ones in the order of the data keep their odd answers.
    pub(super) fn new(table: &RegenerateTable, dialogues: usize) -> Selection {
        let of = |share: f64| (share * dialogues as f64).floor() as u64;
        let (loops_left, cuts_left) = (of(table.max_loop_share), of(table.max_cut_share));
        Selection { loops_left, cuts_left, domains: BTreeMap::new() }
    }

    /// The row with its answers, without a last one that is left out; `None` if nothing is left of it.
    pub(super) fn take(&mut self, row: &LocatedRow, line: &AnswerLine) -> Option<LocatedRow> {
        let counts = self.domains.entry(line.domain.clone()).or_default();
        counts.dialogues += 1;
        counts.unanswered += u64::from(line.messages.is_empty());
        counts.greedy += u64::from(line.greedy);
        counts.generated_tokens += line.generated_tokens;
        let one_of = |left: &mut u64| {
            let some = *left > 0;
            *left -= u64::from(some);
            some
        };
        let keep = match line.mark {
            None => true,
            Some(AnswerMark::Empty) => {
                counts.empty += 1;
                false
            }
            Some(AnswerMark::Loop) => {
                counts.looping += 1;
                one_of(&mut self.loops_left)
            }
            Some(AnswerMark::Cut) => {
                counts.cut += 1;
                one_of(&mut self.cuts_left)
            }
        };
        let mut messages = line.messages.clone();
        if !keep {
            counts.left_out += 1;
            // The answer and the turn that asked for it.
            messages.truncate(messages.len().saturating_sub(2));
        }
        let Row::Conversation(before) = &row.row else { return None };
        let answered = Conversation { messages, last_answer_cut: keep && line.cut, ..before.clone() };
        let location = row.location.clone();
        answered.has_answer().then(|| LocatedRow {
            row: Row::Conversation(answered),
            location,
            repeat: row.repeat,
        })
    }

    /// All domains together.
    pub(super) fn total(&self) -> AnswerCounts {
        let mut sum = AnswerCounts::default();
        for counts in self.domains.values() {
            let AnswerCounts {
                dialogues,
                unanswered,
                greedy,
                generated_tokens,
                empty,
                looping,
                cut,
                left_out,
            } = counts;
            sum.dialogues += dialogues;
            sum.unanswered += unanswered;
            sum.greedy += greedy;
            sum.generated_tokens += generated_tokens;
            sum.empty += empty;
            sum.looping += looping;
            sum.cut += cut;
            sum.left_out += left_out;
        }
        sum
    }

    /// One line per domain, for people.
    pub(super) fn table(&self) -> String {
        let mut out = format!(
            "{:<24} {:>9} {:>7} {:>10} {:>6} {:>8} {:>6} {:>9}\n",
            "answers", "dialogues", "greedy", "tokens", "empty", "looping", "cut", "left out"
        );
        let total = ("all".to_string(), self.total());
        for (domain, c) in self.domains.clone().into_iter().chain([total]) {
            out.push_str(&format!(
                "{domain:<24} {:>9} {:>7} {:>10} {:>6} {:>8} {:>6} {:>9}\n",
                c.dialogues, c.greedy, c.generated_tokens, c.empty, c.looping, c.cut, c.left_out
            ));
        }
        out
    }
}
