//! The text of one trained turn: what the model was asked, and what it writes then.
//!
//! As a rule that is the conversation as the template renders it, cut where the generation prompt ends. Reasoning models
//! break the rule in three ways: the generation prompt opens the reasoning (`<think>`) that a rendered answer does not
//! show; the template takes reasoning out of the very answer that is trained; an answer that a token limit ended inside
//! its reasoning is shown with an empty thought in front that nobody wrote. What is trained then is the generation
//! prompt followed by the answer as it was written, with the end of turn that the template writes. Where that does not
//! follow from template and message, there is no row.

use std::ops::Range;

use crate::{Message, Tokenizer};

/// Marks around reasoning, as models in use write them.
const MARKS: [(&str, &str); 9] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("\u{25c1}think\u{25b7}", "\u{25c1}/think\u{25b7}"),
];

/// True for the text of a token that opens or closes reasoning. Chat templates look for it in the answers that clients
/// send back, so it belongs to an answer's text even where the tokenizer calls it a control token.
pub fn is_reasoning_mark(piece: &[u8]) -> bool {
    MARKS.iter().any(|(open, close)| piece == open.as_bytes() || piece == close.as_bytes())
}

/// The first control token that stands written out in a message (content, reasoning, calls) and so would be read as
/// control. An assistant may write the marks of its reasoning.
pub fn control_token_in(tokenizer: &Tokenizer, message: &Message) -> Option<u32> {
    let calls = message.tool_calls.as_ref().map(ToString::to_string);
    let texts = [Some(message.content.as_str()), message.reasoning_content.as_deref(), calls.as_deref()];
    let written = |text: &str, id: u32| {
        let piece = tokenizer.token_to_piece(id);
        let allowed = message.role == "assistant" && is_reasoning_mark(piece);
        !allowed && std::str::from_utf8(piece).is_ok_and(|piece| !piece.is_empty() && text.contains(piece))
    };
    let mut texts = texts.into_iter().flatten().filter(|text| !text.is_empty());
    texts.find_map(|text| tokenizer.special_ids().iter().copied().find(|id| written(text, *id)))
}

/// A turn with everything before it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TurnText {
    /// The text.
    pub(crate) text: String,
    /// Where the answer begins in it; the generation prompt ends here.
    pub(crate) start: usize,
    /// Prompt and answer were put together here, so at inference no token reaches over the border between them.
    pub(crate) joined: bool,
    /// The text ends with the answer: no end of turn follows.
    pub(crate) open_end: bool,
}

impl TurnText {
    fn rendered(text: &str, start: usize) -> TurnText {
        TurnText { text: text.to_owned(), start, joined: false, open_end: false }
    }

    fn joined(prompt: &str, answer: &str) -> TurnText {
        TurnText { text: format!("{prompt}{answer}"), start: prompt.len(), joined: true, open_end: false }
    }
}

/// How a generation prompt leaves the reasoning.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Thought {
    /// Not mentioned.
    None,
    /// Opened at this byte: the model goes on inside.
    Open(usize, (&'static str, &'static str)),
    /// Opened at this byte and closed again: the model writes the answer proper.
    Closed(usize),
}

fn thought_of(prompt: &str) -> Thought {
    let body = prompt.trim_end();
    for marks in MARKS {
        if let Some(head) = body.strip_suffix(marks.0) {
            return Thought::Open(head.len(), marks);
        }
        if let Some(inside) = body.strip_suffix(marks.1) {
            // A thought that is only closed (DeepSeek V3.1) begins where it is closed.
            let head = inside.trim_end().strip_suffix(marks.0).unwrap_or(inside);
            return Thought::Closed(head.len());
        }
    }
    Thought::None
}

/// Text without a thought without words at its beginning, or the part of one that is there.
fn without_empty_thought(text: &str) -> &str {
    for (open, close) in MARKS {
        let inside = text.trim_start();
        let inside = inside.strip_prefix(open).unwrap_or(inside);
        if let Some(rest) = inside.trim_start().strip_prefix(close) {
            return rest;
        }
    }
    text
}

/// The content of a message parted behind the last mark that closes reasoning; `None` without such a mark, or if there
/// are no words in the reasoning.
fn written_reasoning(content: &str) -> Option<(&str, &str)> {
    MARKS.iter().find_map(|(open, close)| {
        let end = content.rfind(close)? + close.len();
        let words = content[..end - close.len()].trim();
        let words = words.strip_prefix(open).unwrap_or(words);
        (!words.trim().is_empty()).then(|| content.split_at(end))
    })
}

/// The words of reasoning that [`written_reasoning`] found.
fn reasoning_words(before: &str) -> &str {
    let mut words = before.trim();
    for (open, close) in MARKS {
        words = words.strip_prefix(open).unwrap_or(words);
        words = words.strip_suffix(close).unwrap_or(words);
    }
    words.trim()
}

/// An answer without the opening mark, and the white space behind it, that the prompt has already.
fn without_overlap<'c>(prompt: &str, answer: &'c str) -> &'c str {
    let Thought::Open(at, (open, _)) = thought_of(prompt) else { return answer };
    let Some(rest) = answer.trim_start().strip_prefix(open) else { return answer };
    rest.strip_prefix(&prompt[at + open.len()..]).unwrap_or(rest)
}

/// Reasoning and answer in the form that models write: the mark on its own line, a blank line behind it.
fn with_reasoning(reasoning: &str, close: &str, content: &str) -> String {
    let line = if reasoning.ends_with('\n') { "" } else { "\n" };
    let gap = if content.starts_with('\n') { "" } else { "\n\n" };
    format!("{reasoning}{line}{close}{gap}{content}")
}

/// The reasoning that stands beside the content.
fn reasoning_of(message: &Message) -> Option<&str> {
    message.reasoning_content.as_deref().filter(|text| !text.trim().is_empty())
}

/// The text of a turn. `prompt` is the conversation before the message with the generation prompt, `rendered` the
/// conversation up to and including the message. `None` if what the model was asked and wrote does not follow from them.
pub(crate) fn turn_text(prompt: &str, rendered: &str, message: &Message) -> Option<TurnText> {
    let content = message.content.as_str();
    let written = written_reasoning(content);
    let thought = thought_of(prompt);
    if let Some(added) = rendered.strip_prefix(prompt) {
        let taken_out = written.filter(|(before, _)| !added.contains(reasoning_words(before)));
        return match (taken_out, thought) {
            // Behind a closed thought the model cannot reason, so this is what it would write.
            (None, _) | (_, Thought::Closed(_)) => Some(TurnText::rendered(rendered, prompt.len())),
            // A template that writes something else in place of the reasoning is taken at its word.
            (Some(written), _) => {
                put_back(prompt, added, written).or_else(|| Some(TurnText::rendered(rendered, prompt.len())))
            }
        };
    }
    match thought {
        Thought::Open(head, (open, close)) => {
            let body = rendered.strip_prefix(&prompt[..head])?;
            if let Some(written) = written {
                return put_back(prompt, body, written);
            }
            if let Some(reasoning) = reasoning_of(message) {
                let whole = with_reasoning(reasoning, close, content);
                let (before, after) = whole.split_at(whole.len() - content.len());
                return put_back(prompt, body, (before, after));
            }
            let inside = body.trim_start();
            let inside = inside.strip_prefix(open).unwrap_or(body);
            if inside.trim_start().starts_with(close) {
                return Some(TurnText::joined(prompt, inside));
            }
            // An answer without reasoning: the row is the rendered text, without the opening mark that only prompts have.
            Some(TurnText::rendered(rendered, head))
        }
        Thought::Closed(head) if written.is_none() && reasoning_of(message).is_none() => {
            let rest = without_empty_thought(rendered.strip_prefix(&prompt[..head])?);
            let words = rest.trim_start();
            if !words.starts_with(content.trim()) {
                return None;
            }
            let own = rest.starts_with(content) || !prompt.ends_with(char::is_whitespace);
            Some(TurnText::joined(prompt, if own { rest } else { words }))
        }
        Thought::Closed(_) | Thought::None => None,
    }
}

/// The prompt followed by reasoning as it was written and the answer as it is rendered. `body` is the rendered answer,
/// which must show no more than the words behind the reasoning.
fn put_back(prompt: &str, body: &str, (before, after): (&str, &str)) -> Option<TurnText> {
    let rest = without_empty_thought(body).trim_start();
    if !rest.starts_with(after.trim()) {
        return None;
    }
    let gap = &after[..after.len() - after.trim_start().len()];
    Some(TurnText::joined(prompt, &format!("{}{gap}{rest}", without_overlap(prompt, before))))
}

/// Stands for the reasoning in a probe: a character that no text has.
const REASONING: char = '\u{f0000}';
/// Stands for the content in a probe.
const CONTENT: char = '\u{f0001}';

/// What the template writes around the words of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Frame {
    /// From the prompt to the reasoning; `None` if the template shows no reasoning.
    reasoning: Option<String>,
    /// From the reasoning, or without one from the prompt, to the content.
    content: String,
}

impl Frame {
    /// The message whose rendering shows the frame.
    pub(crate) fn probe(message: &Message) -> Message {
        Message {
            reasoning_content: reasoning_of(message).map(|_| REASONING.to_string()),
            content: CONTENT.to_string(),
            ..message.clone()
        }
    }

    /// The frame in a rendered probe; `None` if it does not continue the prompt or does not show the content.
    pub(crate) fn of(prompt: &str, rendered: &str) -> Option<Frame> {
        let (front, _) = rendered.strip_prefix(prompt)?.split_once(CONTENT)?;
        Some(match front.split_once(REASONING) {
            Some((reasoning, content)) => {
                Frame { reasoning: Some(reasoning.to_owned()), content: content.to_owned() }
            }
            None => Frame { reasoning: None, content: front.to_owned() },
        })
    }
}

/// A cut answer: exactly what was written, without an end of turn.
pub(crate) fn cut_text(prompt: &str, frame: Option<&Frame>, message: &Message) -> Option<TurnText> {
    let content = message.content.as_str();
    let whole = |answer: String| {
        let text = format!("{prompt}{answer}");
        Some(TurnText { text, start: prompt.len(), joined: true, open_end: true })
    };
    if let Some(reasoning) = reasoning_of(message) {
        let inside = content.trim().is_empty();
        if let Some(Frame { reasoning: Some(front), content: between }) = frame {
            let spaced = prompt.ends_with(char::is_whitespace) || front.ends_with(char::is_whitespace);
            let words = if spaced { reasoning.trim_start() } else { reasoning };
            return match inside {
                true => whole(format!("{front}{words}")),
                false => whole(format!("{front}{}{between}{}", words.trim_end(), content.trim_start())),
            };
        }
        match thought_of(prompt) {
            Thought::Open(..) if inside => return whole(reasoning.to_owned()),
            Thought::Open(_, (_, close)) => return whole(with_reasoning(reasoning, close, content)),
            _ if inside => return None,
            // A template that knows no reasoning leaves it out.
            _ => {}
        }
    }
    match frame {
        // White space of the template's own, which the model has to write too.
        Some(Frame { content: front, .. }) if !front.is_empty() && front.trim().is_empty() => {
            match content.starts_with(char::is_whitespace) {
                true => whole(content.to_owned()),
                false => whole(format!("{front}{content}")),
            }
        }
        // A header inside the turn (channels); but an empty thought was written by nobody.
        Some(Frame { content: front, .. }) if !without_empty_thought(front).trim().is_empty() => {
            whole(format!("{front}{content}"))
        }
        _ => whole(without_overlap(prompt, content).to_owned()),
    }
}

/// Byte behind the message's own words inside a rendered answer (`text[added]`); the start of the answer if they are not
/// found. Words are looked for from the front, behind a thought without words, reasoning before content: the same words
/// may stand in what the template writes behind them.
pub(crate) fn words_end(text: &str, added: &Range<usize>, message: &Message) -> usize {
    let answer = &text[added.clone()];
    if let Some(name) = last_call(message) {
        // Calls stand behind the words; what is behind the name of the last one is its arguments.
        return answer.rfind(name).map_or(added.start, |at| added.start + at + name.len());
    }
    let mut at = answer.len() - without_empty_thought(answer).len();
    let mut found = false;
    for words in [reasoning_of(message).unwrap_or_default(), message.content.as_str()] {
        let words = words.trim();
        if !words.is_empty()
            && let Some(next) = answer[at..].find(words)
        {
            at += next + words.len();
            found = true;
        }
    }
    if found { added.start + at } else { added.start }
}

fn last_call(message: &Message) -> Option<&str> {
    let call = message.tool_calls.as_ref()?.as_array()?.last()?;
    call.get("function").unwrap_or(call).get("name")?.as_str()
}
