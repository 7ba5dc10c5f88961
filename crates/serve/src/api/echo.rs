//! Prompts that stand before their answers, with the log-probabilities of their tokens, as OpenAI's older route has
//! them.

use draftsmith_core::TokenLogprobs;
use draftsmith_text::Tokenizer;
use serde_json::{Map, Value, json};

/// A prompt as its reader sees it.
#[derive(Clone, Debug)]
pub(crate) struct Echo {
    pub(crate) text: String,
    /// Where each token begins in the text, in characters; empty unless log-probabilities are wanted.
    offsets: Vec<usize>,
}

impl Echo {
    /// The prompt `text` of these ids. What was asked as a text is shown as that text.
    pub(crate) fn new(tokenizer: &Tokenizer, text: Option<&str>, ids: &[u32], offsets: bool) -> Echo {
        let text = text.map_or_else(|| tokenizer.decode(ids, true), str::to_owned);
        let pieces = ids.iter().map(|id| (tokenizer.token_to_piece(*id), tokenizer.is_special(*id)));
        let offsets = if offsets { begins(&text, pieces) } else { Vec::new() };
        Echo { text, offsets }
    }

    /// Characters of the text.
    pub(crate) fn chars(&self) -> usize {
        self.text.chars().count()
    }

    /// The log-probabilities of the tokens: nothing stands before the first one, so it has none.
    pub(crate) fn logprobs(&self, tokenizer: &Tokenizer, ids: &[u32], scores: &[TokenLogprobs]) -> Columns {
        let mut columns = Columns::default();
        let scores = std::iter::once(None).chain(scores.iter().map(Some));
        for ((id, score), offset) in ids.iter().zip(scores).zip(&self.offsets) {
            columns.tokens.push(piece(tokenizer, *id).into());
            columns.chosen.push(score.map_or(Value::Null, |score| finite(score.chosen).into()));
            columns.top.push(score.map_or(Value::Null, |score| top(tokenizer, *id, score)));
            columns.offsets.push((*offset).into());
        }
        columns
    }
}

/// Log-probabilities as four lists.
#[derive(Default)]
pub(crate) struct Columns {
    pub(crate) tokens: Vec<Value>,
    pub(crate) chosen: Vec<Value>,
    pub(crate) top: Vec<Value>,
    pub(crate) offsets: Vec<Value>,
}

impl Columns {
    /// What follows.
    pub(crate) fn extend(&mut self, more: Columns) {
        self.tokens.extend(more.tokens);
        self.chosen.extend(more.chosen);
        self.top.extend(more.top);
        self.offsets.extend(more.offsets);
    }

    pub(crate) fn into_json(self) -> Value {
        json!({
            "tokens": self.tokens, "token_logprobs": self.chosen, "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}

fn piece(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_to_piece(id)).into_owned()
}

/// JSON has no infinities; OpenAI writes -9999 for a probability of zero.
pub(crate) fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// The best tokens and the one that stands there, by their texts; of two with the same text the better one.
pub(crate) fn top(tokenizer: &Tokenizer, id: u32, score: &TokenLogprobs) -> Value {
    let mut named = Map::new();
    for (id, logprob) in score.top.iter().copied().chain([(id, score.chosen)]) {
        named.entry(piece(tokenizer, id)).or_insert_with(|| finite(logprob).into());
    }
    Value::Object(named)
}

/// Where in `text` each token begins, in characters. Special tokens that the text does not show take no room, and a
/// token that goes on with a character begins behind it.
fn begins<'a>(text: &str, pieces: impl Iterator<Item = (&'a [u8], bool)>) -> Vec<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut chars) = (0, 0);
    let mut begins = Vec::new();
    for (piece, special) in pieces {
        begins.push(chars);
        let rest = &bytes[at..];
        // Some tokenizers put a space before the text.
        let bare = piece.strip_prefix(b" ").filter(|bare| at == 0 && rest.starts_with(bare));
        let length = match (rest.starts_with(piece), bare) {
            (true, _) => piece.len(),
            (false, Some(bare)) => bare.len(),
            (false, None) if special => 0,
            // The tokenizer changed the text, or the ids are no text.
            (false, None) => piece.len().min(rest.len()),
        };
        chars += rest[..length].iter().filter(|byte| **byte & 0xC0 != 0x80).count();
        at += length;
    }
    begins
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, pieces: &[(&[u8], bool)], expected: &[usize]) {
        assert_eq!(begins(text, pieces.iter().copied()), expected);
    }

    #[test]
    fn tokens_begin_where_their_text_does() {
        check("one two", &[(b"one", false), (b" two", false)], &[0, 3]);
        // A token that the template or the tokenizer added is no text; one that the prompt spells out is.
        check("one", &[(b"<s>", true), (b"one", false), (b"</s>", true)], &[0, 0, 3]);
        check("<s>one", &[(b"<s>", true), (b"one", false)], &[0, 3]);
        check("one two", &[(b"<s>", true), (b" one", false), (b" two", false)], &[0, 0, 3]);
        // Characters, not bytes; and one of three tokens.
        check("äö!", &["ä".as_bytes(), "ö".as_bytes(), b"!"].map(|piece| (piece, false)), &[0, 1, 2]);
        check("€!", &[(b"\xe2", false), (b"\x82", false), (b"\xac", false), (b"!", false)], &[0, 1, 1, 1]);
        // Lower-cased by its tokenizer, and longer than the text.
        check("One", &[(b"one", false), (b" two", false), (b"x", false)], &[0, 3, 3]);
    }
}
