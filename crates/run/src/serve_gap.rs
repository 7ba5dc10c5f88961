//! What a live engine does differently from ours, on the same prompts.
//!
//! Three things can part, one after the other: the prompt that is read (chat template, tokens that the engine adds), the
//! target's own choice (weights, sampling defaults, arithmetic), and the draft's guesses (captured layers, norms,
//! vocabulary map). Each is compared as far as the engine shows it. A difference that rounding explains is no gap.

use std::ops::ControlFlow;

use draftsmith_capture::{
    Alive, Answer, Asked, Generator, OpenAiGenerator, Outcome, Prompter, RegenerateError, Request,
    ServerError, metrics_page,
};
use draftsmith_core::report::{Report, Stop, Unit};
use draftsmith_core::{AcceptStats, Sampling, TokenTree};
use draftsmith_decode::{DraftPlan, GenerateOptions, Generation};
use draftsmith_formats::run::ServerTable;
use draftsmith_model::StepItem;
use draftsmith_text::{Message, RenderOptions, TextError};
use serde::Serialize;

use crate::Error;
use crate::engine::{LoadedDraft, LoadedTarget, engine};

/// Logits by which one token may lead another in one arithmetic and follow it in another (4-bit weights with 8-bit
/// activations against 32-bit floats).
const ROUNDING: f32 = 0.5;
/// Standard deviations between two shares that are no accident.
const SIGMAS: f64 = 3.0;
/// Smaller differences between shares are of no interest, however certain.
const SMALL_SHARE: f64 = 0.02;

/// What is replayed, and against whom.
pub struct Replay<'a> {
    /// Our side.
    pub target: &'a LoadedTarget,
    /// The draft that the engine serves.
    pub draft: Option<&'a LoadedDraft>,
    /// The engine.
    pub server: &'a ServerTable,
    /// Its key.
    pub key: Option<String>,
    /// Ids and messages.
    pub prompts: &'a [(String, Vec<Message>)],
    /// Longest answer.
    pub max_new_tokens: usize,
    /// Draft tokens per proposal.
    pub depth: usize,
}

/// The engine reads another prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromptGap {
    /// The row.
    pub id: String,
    /// Tokens of our rendering.
    pub ours: usize,
    /// Tokens that the engine counts.
    pub theirs: u64,
}

/// Where two answers part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The row.
    pub id: String,
    /// Token of the answer, from 0.
    pub at: usize,
    /// Our token.
    pub ours: String,
    /// Theirs.
    pub theirs: String,
    /// Logits by which our target prefers our token.
    pub margin: f32,
}

impl Difference {
    /// True if another arithmetic may choose either token.
    pub fn is_rounding(&self) -> bool {
        self.margin.abs() < ROUNDING
    }
}

/// Accepted drafts of one side.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Accepted {
    /// Committed tokens per verify step, the target's own included.
    pub accept_len: Option<f64>,
    /// Proposals.
    pub proposals: u64,
    /// Per position: accepted per proposal.
    pub rate_at: Vec<f64>,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Gap {
    /// Answers compared.
    pub rows: usize,
    /// Those with the same text.
    pub same: usize,
    /// Another prompt; nothing else is compared then.
    pub prompt: Option<PromptGap>,
    /// Other answers, in the order of the prompts.
    pub differences: Vec<Difference>,
    /// Our drafts.
    pub ours: Option<Accepted>,
    /// Theirs, where the engine tells.
    pub theirs: Option<Accepted>,
}

/// One gap, in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What parts.
    pub what: String,
    /// Where to look.
    pub hint: String,
}

impl Gap {
    /// The gaps, the first one to be mended first.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut add = |what: String, hint: &str| findings.push(Finding { what, hint: hint.to_string() });
        if let Some(PromptGap { id, ours, theirs }) = &self.prompt {
            add(
                format!("template: the prompt of `{id}` has {theirs} tokens in the engine, {ours} here"),
                "the engine renders another chat template, adds a system prompt or a BOS of its own; with `--api ids` it \
                 cannot",
            );
        }
        if let Some(Difference { id, at, ours, theirs, margin }) =
            self.differences.iter().find(|d| !d.is_rounding())
        {
            add(
                format!(
                    "target: at token {at} of `{id}` the engine says `{theirs}`, our target `{ours}` by {margin:.2} logits"
                ),
                "the engine serves other weights, or adds penalties or limits by default (`--extra`, docs/SERVERS.md)",
            );
        }
        if let (Some(ours), Some(theirs)) = (&self.ours, &self.theirs)
            && let Some((at, o, t)) = first_lower(ours, theirs)
        {
            let hint = match at {
                0 => {
                    "the draft's first step gets something else: captured layers (the engine may count them from 1, or \
                     mean a layer's input), `fc_norm`, the vocabulary map (`d2t` holds offsets), or other draft weights"
                }
                _ => {
                    "the first guess is as good as here, so layers and vocabulary map hold: look at what is fed back from \
                     step to step (`norm_output`: before or after the norm), at positions, and at the draft's attention to \
                     its own earlier steps"
                }
            };
            add(
                format!("draft: at position {at} the engine accepts {t:.3} of the proposals, we {o:.3}"),
                hint,
            );
        }
        findings
    }
}

/// The first position where the engine accepts less than we do, beyond accident.
fn first_lower(ours: &Accepted, theirs: &Accepted) -> Option<(usize, f64, f64)> {
    let (n, m) = (ours.proposals.max(1) as f64, theirs.proposals.max(1) as f64);
    ours.rate_at.iter().zip(&theirs.rate_at).enumerate().find_map(|(at, (o, t))| {
        let share = (o * n + t * m) / (n + m);
        let sigma = (share * (1.0 - share) * (1.0 / n + 1.0 / m)).sqrt();
        (o - t > (SIGMAS * sigma).max(SMALL_SHARE)).then_some((at, *o, *t))
    })
}

/// Replays the prompts on both sides.
///
/// # Errors
/// What either side cannot do; an engine that reads another prompt is a finding, not an error.
pub fn replay(replay: &Replay<'_>, report: &dyn Report, stop: &Stop) -> Result<Gap, Error> {
    let text = &replay.target.text;
    let context = replay.target.target.config().max_position;
    let prompter = Prompter {
        tokenizer: &text.tokenizer,
        template: text.template()?,
        max_new_tokens: replay.max_new_tokens,
        max_context: context,
    };
    let before = metrics_page(replay.server, replay.key.as_deref());
    let theirs = match ask(replay, prompter, report, stop) {
        Ok(answers) => answers,
        Err(RegenerateError::Server(ServerError::OtherPrompt { row, ours, theirs, .. })) => {
            return Ok(Gap { prompt: Some(PromptGap { id: row, ours, theirs }), ..Gap::default() });
        }
        Err(error) => return Err(error.into()),
    };
    let after = metrics_page(replay.server, replay.key.as_deref());
    let mut gap = Gap { theirs: served(before.as_deref(), after.as_deref()), ..Gap::default() };

    let engine = engine(replay.target, replay.draft);
    let plan = replay.draft.map_or(DraftPlan::None, |_| DraftPlan::Chain { depth: replay.depth });
    let mut stats = AcceptStats::default();
    report.begin("decode here", Some(theirs.len() as u64), Unit::Rows);
    for (i, ((id, messages), theirs)) in replay.prompts.iter().zip(&theirs).enumerate() {
        if stop.requested() {
            return Err(Error::Interrupted { what: "doctor serve-gap".to_string(), resume: None });
        }
        // The engine has no room for this prompt, and so have we.
        let Some(theirs) = theirs else { continue };
        let prompt = crate::measure::prompt_ids(text, messages)?;
        let options = GenerateOptions {
            max_new_tokens: replay.max_new_tokens.min(context - prompt.len()),
            stop_ids: replay.target.stop_ids(),
            draft: plan,
            ..GenerateOptions::default()
        };
        let ours = engine.generate(&prompt, &options, &mut |_| ControlFlow::Continue(()))?;
        stats.add(&ours.stats);
        gap.rows += 1;
        match difference(replay.target, id, &prompt, &ours, theirs)? {
            None => gap.same += 1,
            Some(difference) => gap.differences.push(difference),
        }
        report.at(i as u64 + 1);
    }
    report.end();
    gap.ours = replay.draft.map(|_| Accepted {
        accept_len: stats.accept_len(),
        proposals: stats.proposals_at.first().copied().unwrap_or(0),
        // Per proposal, as engines count: a proposal that had no room for a position did not fill it.
        rate_at: stats
            .accepted_at
            .iter()
            .map(|a| *a as f64 / stats.proposals_at.first().copied().unwrap_or(0).max(1) as f64)
            .collect(),
    });
    Ok(gap)
}

/// The engine's answers, one after the other; `None` for a prompt that leaves no room.
fn ask(
    replay: &Replay<'_>,
    prompter: Prompter<'_>,
    report: &dyn Report,
    stop: &Stop,
) -> Result<Vec<Option<Answer>>, RegenerateError> {
    let note = |line: &str| report.note(line);
    let mut generator = OpenAiGenerator {
        server: replay.server,
        key: replay.key.clone(),
        prompter,
        batch_size: 1,
        stop: stop.flag(),
        note: &note,
        asked: Asked::default(),
        asked_each: Vec::new(),
        alive: Alive::default(),
    };
    let mut requests = replay.prompts.iter().enumerate().map(|(key, (id, messages))| Request {
        key,
        id: id.clone(),
        messages: messages.clone(),
        render: RenderOptions::default(),
        sampling: Sampling::GREEDY,
        before: None,
    });
    let mut answers = vec![None; replay.prompts.len()];
    report.begin("ask the engine", Some(answers.len() as u64), Unit::Rows);
    generator.answer(&mut || requests.next(), &mut |key, outcome| {
        answers[key] = match outcome {
            Outcome::Answered(answer) => Some(answer),
            // The target's own prompts were rendered before, so none is refused here.
            Outcome::NoRoom | Outcome::Refused(_) => None,
        };
        report.at(key as u64 + 1);
        ControlFlow::Continue(())
    })?;
    report.end();
    Ok(answers)
}

/// Where two answers to one prompt part, if they do. Both texts are tokenised anew, since the engine shows only text.
fn difference(
    target: &LoadedTarget,
    id: &str,
    prompt: &[u32],
    ours: &Generation,
    theirs: &Answer,
) -> Result<Option<Difference>, TextError> {
    let tokenizer = &target.text.tokenizer;
    let ends = tokenizer.eos_ids();
    let (body, end) = match ours.token_ids.split_last() {
        Some((last, body)) if ends.contains(last) => (body, Some(*last)),
        _ => (ours.token_ids.as_slice(), None),
    };
    let text = tokenizer.decode(body, true);
    if text == theirs.text {
        return Ok(None);
    }
    let (mine, other) = (tokenizer.encode(&text, false)?, tokenizer.encode(&theirs.text, false)?);
    let at = mine.iter().zip(&other).take_while(|(a, b)| a == b).count();
    // Behind the last token stands the end of the answer, unless the token limit was.
    let my_token = mine.get(at).copied().or(end);
    let other_tokens = match other.get(at) {
        Some(token) => vec![*token],
        None if theirs.cut => Vec::new(),
        None => ends.to_vec(),
    };
    let Some((my_token, first)) = my_token.zip(other_tokens.first().copied()) else { return Ok(None) };
    let context: Vec<u32> = prompt.iter().chain(&mine[..at]).copied().collect();
    let parents = TokenTree::chain_parents(context.len());
    let mut kv = target.target.new_kv();
    let output =
        target.target.forward(&mut [StepItem { kv: &mut kv, tokens: &context, parents: &parents }], &[]);
    let logits = target.target.logits(&output, &[context.len() as u32 - 1]);
    let logit = |token: u32| logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let best = other_tokens.into_iter().max_by(|a, b| logit(*a).total_cmp(&logit(*b))).unwrap_or(first);
    let piece = |token: u32| String::from_utf8_lossy(tokenizer.token_to_piece(token)).into_owned();
    Ok(Some(Difference {
        id: id.to_string(),
        at,
        ours: piece(my_token),
        theirs: piece(best),
        margin: logit(my_token) - logit(best),
    }))
}

/// Sums of the counters that engines show on their metrics page.
#[derive(Clone, Debug, Default, PartialEq)]
struct Counters {
    drafts: Option<f64>,
    accepted: f64,
    accepted_at: Vec<f64>,
    /// SGLang shows a moving mean instead of counters.
    accept_len: Option<f64>,
}

/// Most positions that are believed: more are not drafted by any engine.
const MAX_POSITIONS: usize = 128;

fn counters(page: &str) -> Counters {
    let mut counters = Counters::default();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let Some(value) = value.parse::<f64>().ok().filter(|v| v.is_finite() && *v >= 0.0) else { continue };
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        match name.trim_end_matches("_total") {
            "vllm:spec_decode_num_drafts" => *counters.drafts.get_or_insert(0.0) += value,
            "vllm:spec_decode_num_accepted_tokens" => counters.accepted += value,
            "vllm:spec_decode_num_accepted_tokens_per_pos" => {
                let position =
                    labels.split("position=\"").nth(1).and_then(|l| l.split('"').next()?.parse().ok());
                let Some(position) = position.filter(|p| *p < MAX_POSITIONS) else { continue };
                if counters.accepted_at.len() <= position {
                    counters.accepted_at.resize(position + 1, 0.0);
                }
                counters.accepted_at[position] += value;
            }
            "sglang:spec_accept_length" => counters.accept_len = Some(value),
            _ => {}
        }
    }
    counters
}

/// What the engine accepted between two looks at its metrics.
fn served(before: Option<&str>, after: Option<&str>) -> Option<Accepted> {
    let (before, after) = (counters(before?), counters(after?));
    if let Some(accept_len) = after.accept_len {
        return Some(Accepted { accept_len: Some(accept_len), ..Accepted::default() });
    }
    let drafts = after.drafts? - before.drafts.unwrap_or(0.0);
    if drafts <= 0.0 {
        return None;
    }
    let was = |at: usize| before.accepted_at.get(at).copied().unwrap_or(0.0);
    Some(Accepted {
        accept_len: Some(1.0 + (after.accepted - before.accepted) / drafts),
        proposals: drafts as u64,
        rate_at: after.accepted_at.iter().enumerate().map(|(at, n)| (n - was(at)) / drafts).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# HELP x\nvllm:spec_decode_num_drafts_total{model_name=\"m\"} 100.0\n\
        vllm:spec_decode_num_accepted_tokens_total{model_name=\"m\"} 60.0\n\
        vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name=\"m\",position=\"0\"} 50.0\n";
    const AFTER: &str = "vllm:spec_decode_num_drafts_total{model_name=\"m\"} 300.0\n\
        vllm:spec_decode_num_accepted_tokens_total{model_name=\"m\"} 260.0\n\
        vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name=\"m\",position=\"0\"} 170.0\n\
        vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name=\"m\",position=\"1\"} 80\n\
        vllm:spec_decode_num_accepted_tokens_per_pos_total{position=\"99999999999\"} 80\nnot a line\nnan NaN\n";

    #[test]
    fn counters_between_two_looks_give_rates() {
        let found = served(Some(BEFORE), Some(AFTER)).unwrap();
        assert_eq!((found.accept_len, found.proposals), (Some(2.0), 200));
        assert_eq!(found.rate_at, [0.6, 0.4]);
        assert_eq!(served(Some(AFTER), Some(AFTER)), None, "nothing was drafted");
        assert_eq!(served(None, Some(AFTER)), None);
        assert_eq!(served(Some("other 1"), Some("other 2")), None);
        let sglang = "sglang:spec_accept_length{a=\"b\"} 2.5\n";
        assert_eq!(served(Some(sglang), Some(sglang)).unwrap().accept_len, Some(2.5));
    }

    #[track_caller]
    fn check(ours: &[f64], theirs: &[f64], proposals: u64, expected: Option<usize>) {
        let side = |rates: &[f64]| Accepted { accept_len: None, proposals, rate_at: rates.to_vec() };
        let gap = Gap { ours: Some(side(ours)), theirs: Some(side(theirs)), ..Gap::default() };
        let found = gap.findings();
        let at = found
            .first()
            .map(|f| f.what.split("position ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap());
        assert_eq!(at, expected, "{found:?}");
    }

    #[test]
    fn the_first_position_that_is_lower_beyond_accident_is_named() {
        check(&[0.6, 0.4], &[0.6, 0.4], 1000, None);
        check(&[0.6, 0.4], &[0.3, 0.1], 1000, Some(0));
        check(&[0.6, 0.4], &[0.6, 0.2], 1000, Some(1));
        check(&[0.6, 0.4], &[0.5, 0.4], 20, None);
        check(&[0.60, 0.4], &[0.59, 0.4], 1_000_000, None);
        check(&[0.3], &[0.6], 1000, None);
    }

    #[test]
    fn a_difference_within_rounding_is_no_gap() {
        let with =
            |margin| Difference { id: "a".into(), at: 3, ours: "x".into(), theirs: "y".into(), margin };
        let gap = |differences| Gap { rows: 2, differences, ..Gap::default() };
        assert!(gap(vec![with(0.4)]).findings().is_empty());
        assert!(gap(vec![with(0.4), with(2.0)]).findings()[0].what.contains("by 2.00 logits"));
    }
}
