//! Loss mask by rendering.
//!
//! For each assistant message the conversation is rendered twice: up to the message with the generation prompt, and
//! with the message. What the second adds to the first is what the model has to write itself, whatever the template
//! looks like. The whole text is tokenised once; character spans become token spans by the bytes each token covers.
//!
//! What is trained: a token that *starts* inside the added text, up to and including the token that ends the turn (the
//! one the model must emit to stop). What the template writes after that (a line break in ChatML) is not trained: the
//! server never asks the model for it. A token that starts before the answer and reaches into it is not trained either;
//! at inference the prompt is tokenised on its own and such a token cannot appear.
//!
//! A rendered answer need not continue its generation prompt, and need not be what the model wrote: see `turn`. Such a row
//! is the prompt followed by the answer as it was written. A cut answer always is.
//!
//! Templates that rewrite earlier turns when later ones follow (Qwen3 drops old reasoning) have no single text in
//! which every answer looks as it did when it was written. Then each answer becomes a row of its own.

use std::ops::Range;

use crate::tokenizer::Encoding;
use crate::turn::{Frame, TurnText, cut_text, turn_text, words_end};
use crate::{ChatTemplate, Message, RenderOptions, TextError, Tokenizer};

/// Which assistant turns are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turns {
    /// All of them.
    #[default]
    All,
    /// The last one.
    Last,
}

/// How a conversation becomes rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MaskOptions {
    /// What the template gets; `add_generation_prompt` is set here as needed.
    pub render: RenderOptions,
    /// Which assistant turns are trained.
    pub turns: Turns,
    /// The last answer was cut off (by a token limit), so the model did not end its turn there: the row ends with the
    /// answer, and no end-of-turn token is trained.
    pub last_answer_cut: bool,
}

/// Why a conversation became several rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitReason {
    /// The template renders this assistant message differently once more messages follow.
    HistoryRewritten {
        /// Index of the message.
        turn: usize,
    },
}

impl std::fmt::Display for SplitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SplitReason::HistoryRewritten { turn } => {
                write!(f, "the template renders message {turn} differently once more messages follow")
            }
        }
    }
}

/// One assistant turn inside a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainedTurn {
    /// Index of the message in the conversation.
    pub message: usize,
    /// Bytes of the rendered text that the turn added, end of turn and what follows it included.
    pub added: Range<usize>,
    /// Trained tokens, the end-of-turn token included.
    pub tokens: Range<usize>,
    /// The turn ends with a token that stops generation.
    pub ends_turn: bool,
}

/// Ids and loss mask of (a part of) a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskedRow {
    /// The rendered text.
    pub text: String,
    /// `[S]` token ids.
    pub ids: Vec<u32>,
    /// `[S]` true where the token is trained as an output.
    pub loss_mask: Vec<bool>,
    /// `[S]` bytes of `text` that each token covers.
    pub spans: Vec<Range<usize>>,
    /// The trained turns, in order.
    pub turns: Vec<TrainedTurn>,
    /// Set if the conversation became several rows.
    pub split: Option<SplitReason>,
}

impl MaskedRow {
    /// Number of trained tokens.
    pub fn trained_tokens(&self) -> usize {
        self.loss_mask.iter().filter(|m| **m).count()
    }
}

/// Renders a conversation, tokenises it and finds what is trained.
///
/// Messages after the last assistant turn are left out: they train nothing. No assistant turn gives no rows.
///
/// # Errors
/// Those of the template; [`TextError::AnswerNotContinued`] if an answer does not continue its generation prompt;
/// [`TextError::DoubleBos`].
pub fn mask_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    options: &MaskOptions,
) -> Result<Vec<MaskedRow>, TextError> {
    let mut answers: Vec<usize> = (0..messages.len()).filter(|i| messages[*i].role == "assistant").collect();
    if options.turns == Turns::Last {
        answers.drain(..answers.len().saturating_sub(1));
    }
    let ask = options.render.with_generation_prompt(true);
    let plain = options.render.with_generation_prompt(false);
    let cut = answers.last().copied().filter(|_| options.last_answer_cut);
    let mut rendered: Vec<(usize, TurnText)> = Vec::with_capacity(answers.len());
    for turn in answers {
        let prompt = template.render(&messages[..turn], &ask)?;
        let message = &messages[turn];
        let text = template.render(&messages[..=turn], &plain)?;
        // Calls stand behind the words: a cut answer with calls is the rendered one without its end.
        let found = if cut == Some(turn) && message.tool_calls.is_none() {
            let mut probe = messages[..turn].to_vec();
            probe.push(Frame::probe(message));
            // A template may refuse the probe; then nothing is known of what stands around the words.
            let shown = template.render(&probe, &plain).ok();
            cut_text(&prompt, shown.and_then(|shown| Frame::of(&prompt, &shown)).as_ref(), message)
        } else {
            turn_text(&prompt, &text, message)
        };
        rendered.push((turn, found.ok_or_else(|| not_continued(turn, &prompt, &text))?));
    }
    let Some((_, whole)) = rendered.last() else { return Ok(Vec::new()) };
    let rewritten =
        rendered.iter().find(|(_, turn)| !whole.text.starts_with(&turn.text)).map(|(turn, _)| *turn);
    match rewritten {
        None => Ok(vec![row(tokenizer, rendered, messages, cut, None)?]),
        Some(turn) => rendered
            .into_iter()
            .map(|answer| {
                let split = Some(SplitReason::HistoryRewritten { turn });
                row(tokenizer, vec![answer], messages, cut, split)
            })
            .collect(),
    }
}

fn not_continued(turn: usize, prompt: &str, text: &str) -> TextError {
    let same = prompt.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
    let part = |s: &str| {
        let mut start = same.min(s.len());
        while !s.is_char_boundary(start) {
            start -= 1;
        }
        s[start..].chars().take(40).collect::<String>()
    };
    TextError::AnswerNotContinued { turn, prompt: part(prompt), rendered: part(text) }
}

/// One row of turns whose texts begin each other; the last one is the whole text.
fn row(
    tokenizer: &Tokenizer,
    turns: Vec<(usize, TurnText)>,
    messages: &[Message],
    cut: Option<usize>,
    split: Option<SplitReason>,
) -> Result<MaskedRow, TextError> {
    let added: Vec<(usize, Range<usize>)> =
        turns.iter().map(|(message, turn)| (*message, turn.start..turn.text.len())).collect();
    let Some((_, last)) = turns.into_iter().next_back() else {
        unreachable!("a row has a turn");
    };
    let mut encoding = encode(tokenizer, &last)?;
    let text = last.text;
    if let (Some(bos), [first, second, ..]) = (tokenizer.bos_id(), encoding.ids.as_slice())
        && *first == bos
        && *second == bos
    {
        return Err(TextError::DoubleBos { bos });
    }
    let mut loss_mask = vec![false; encoding.ids.len()];
    let mut trained = Vec::with_capacity(added.len());
    for (message, added) in added {
        // Spans ascend, so both borders are found by bisection.
        let start = encoding.spans.partition_point(|span| span.start < added.start);
        let stop = encoding.spans.partition_point(|span| span.start < added.end);
        let (end, ends_turn) = if cut == Some(message) && last.open_end {
            (stop, false)
        } else {
            let behind = words_end(&text, &added, &messages[message]);
            let (end, ends_turn) =
                end_of_turn(tokenizer, &encoding.ids[..stop], &encoding.spans, start, behind);
            if cut == Some(message) { (end - usize::from(ends_turn), false) } else { (end, ends_turn) }
        };
        if cut == Some(message) {
            encoding.ids.truncate(end);
            encoding.spans.truncate(end);
            loss_mask.truncate(end);
        }
        loss_mask[start..end].fill(true);
        trained.push(TrainedTurn { message, added, tokens: start..end, ends_turn });
    }
    Ok(MaskedRow { text, ids: encoding.ids, loss_mask, spans: encoding.spans, turns: trained, split })
}

/// The text as a whole; where prompt and answer were put together here and a token would reach from one into the other,
/// each of them alone, as at inference.
fn encode(tokenizer: &Tokenizer, turn: &TurnText) -> Result<Encoding, TextError> {
    let whole = tokenizer.encode_with_spans(&turn.text)?;
    let reaches_over = |span: &Range<usize>| span.start < turn.start && turn.start < span.end;
    if !turn.joined || !whole.spans.iter().any(reaches_over) {
        return Ok(whole);
    }
    let mut parts = tokenizer.encode_with_spans(&turn.text[..turn.start])?;
    let answer = tokenizer.encode_with_spans(&turn.text[turn.start..])?;
    parts.ids.extend(answer.ids);
    parts.spans.extend(answer.spans.iter().map(|s| s.start + turn.start..s.end + turn.start));
    Ok(parts)
}

/// Where the trained part of a turn ends: after the first token of it that stops generation, since the model is asked
/// for nothing after that; without one, after the first control token behind the answer's words (`behind`); without
/// that, after the last token that is not white space.
fn end_of_turn(
    tokenizer: &Tokenizer,
    ids: &[u32],
    spans: &[Range<usize>],
    start: usize,
    behind: usize,
) -> (usize, bool) {
    if let Some(at) = (start..ids.len()).find(|i| tokenizer.eos_ids().contains(&ids[*i])) {
        return (at + 1, true);
    }
    let behind = start.max(spans[..ids.len()].partition_point(|span| span.start < behind));
    if let Some(at) = (behind..ids.len()).find(|i| tokenizer.is_special(ids[*i])) {
        return (at + 1, true);
    }
    let blank = |id: u32| tokenizer.token_to_piece(id).iter().all(u8::is_ascii_whitespace);
    let end = (start..ids.len()).rev().find(|i| !blank(ids[*i])).map_or(start, |i| i + 1);
    (end, false)
}
