//! Text to token ids and back.
//!
//! Every id has a *piece*: the bytes it stands for. Decoding is the concatenation of pieces, read as UTF-8 with U+FFFD
//! for what is not; so decoding in parts ([`crate::StreamDecoder`]) and at once agree by construction. The pieces also
//! give exact byte spans of tokens in the text, which the tokenizer library's own offsets do not (they are trimmed of
//! spaces and rounded to characters).

use std::ops::Range;
use std::sync::Arc;

use draftsmith_core::TargetTokenId;
use sha2::{Digest, Sha256};

use crate::TextError;

/// Ids with a role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// Every id that ends generation (end of sequence, end of turn).
    pub eos: Vec<u32>,
    /// Unknown token.
    pub unk: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// `encode(…, true)` puts BOS in front, where the tokenizer itself does not say.
    pub add_bos: bool,
}

/// What each id stands for.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    /// `[V + 1]` borders of the pieces in `bytes`.
    ends: Vec<u32>,
    /// `[V]` control tokens, left out of text for people.
    special: Vec<bool>,
    /// `[V]` tokens that stand for one raw byte.
    byte: Vec<bool>,
    /// SentencePiece writes a space in front of the first word; decoding takes it away.
    pub(crate) strip_first_space: bool,
}

impl Pieces {
    pub(crate) fn with_capacity(count: usize) -> Pieces {
        Pieces { ends: vec![0], special: Vec::with_capacity(count), ..Pieces::default() }
    }

    pub(crate) fn push(&mut self, piece: &[u8], special: bool, byte: bool) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(self.bytes.len() as u32);
        self.special.push(special);
        self.byte.push(byte);
    }

    fn len(&self) -> usize {
        self.special.len()
    }

    pub(crate) fn get(&self, id: u32) -> &[u8] {
        let i = id as usize;
        match (self.ends.get(i), self.ends.get(i + 1)) {
            (Some(start), Some(end)) => &self.bytes[*start as usize..*end as usize],
            _ => &[],
        }
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

/// Ids of a text and where each one stands in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// `[S]` token ids.
    pub ids: Vec<u32>,
    /// `[S]` byte ranges in the text.
    pub spans: Vec<Range<usize>>,
}

/// A tokenizer: text to ids and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Arc<Pieces>,
    special: SpecialIds,
    special_ids: Vec<u32>,
    content_hash: String,
    /// What templates know special tokens by, where a configuration says it.
    named: Option<Vec<(&'static str, String)>>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special", &self.special)
            .field("content_hash", &self.content_hash)
            .finish()
    }
}

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// That file does not say which ids end generation; `special` does (see [`crate::TokenizerConfig`]).
    ///
    /// # Errors
    /// [`TextError::TokenizerJson`]; [`TextError::UnsupportedDecoder`] for anything but byte-level and byte-fallback
    /// pieces.
    pub fn from_json(json: &[u8], special: SpecialIds) -> Result<Tokenizer, TextError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| TextError::TokenizerJson { detail: one_line(&e.to_string()) })?;
        // A length limit stored in the file would silently cut conversations.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| TextError::TokenizerJson { detail: one_line(&e.to_string()) })?;
        let decoder = serde_json::to_value(inner.get_decoder())
            .map_err(|e| TextError::TokenizerJson { detail: e.to_string() })?;
        let mut parts = Vec::new();
        decoder_parts(&decoder, &mut parts);
        let has = |name: &str| parts.iter().any(|part| part.0 == name);
        let kind = if has("ByteLevel") {
            PieceKind::ByteLevel
        } else if has("ByteFallback") || has("Metaspace") {
            PieceKind::ByteFallback
        } else {
            let names: Vec<&str> = parts.iter().map(|part| part.0.as_str()).collect();
            return Err(TextError::UnsupportedDecoder { decoder: names.join("+") });
        };
        let count = inner.get_vocab(true).values().max().map_or(0, |max| *max as usize + 1);
        let added = inner.get_added_tokens_decoder();
        let mut pieces = Pieces::with_capacity(count);
        for id in 0..count as u32 {
            match (added.get(&id), inner.id_to_token(id)) {
                (Some(token), _) => pieces.push(token.content.as_bytes(), token.special, false),
                (None, Some(token)) => {
                    let (bytes, byte) = kind.piece(&token);
                    pieces.push(&bytes, false, byte);
                }
                (None, None) => pieces.push(&[], false, false),
            }
        }
        pieces.strip_first_space = kind == PieceKind::ByteFallback && parts.iter().any(|part| part.1);
        Tokenizer::assemble(inner, pieces, special)
    }

    /// The same tokenizer with other roles.
    pub(crate) fn with_special(mut self, special: SpecialIds) -> Result<Tokenizer, TextError> {
        check_special(&special, self.pieces.len())?;
        self.special = special;
        Ok(self)
    }

    /// The same tokenizer with names for its special tokens: `bos_token` and the like.
    pub(crate) fn with_named(mut self, named: Vec<(&'static str, String)>) -> Tokenizer {
        self.named = Some(named);
        self
    }

    /// The special tokens that templates may name: those of the tokenizer's own configuration, which need not be the
    /// ones that stop an answer. A token that the tokenizer does not have is not defined.
    pub(crate) fn template_tokens(&self) -> Vec<(String, serde_json::Value)> {
        let text = |id: u32| String::from_utf8_lossy(self.pieces.get(id)).into_owned();
        match &self.named {
            Some(named) => {
                named.iter().map(|(name, text)| (name.to_string(), text.as_str().into())).collect()
            }
            None => [
                ("bos_token", self.special.bos),
                ("eos_token", self.special.eos.first().copied()),
                ("unk_token", self.special.unk),
                ("pad_token", self.special.pad),
            ]
            .into_iter()
            .filter_map(|(name, id)| Some((name.to_string(), text(id?).into())))
            .collect(),
        }
    }

    /// Puts a built tokenizer and its pieces together and hashes them.
    pub(crate) fn assemble(
        inner: tokenizers::Tokenizer,
        pieces: Pieces,
        special: SpecialIds,
    ) -> Result<Tokenizer, TextError> {
        check_special(&special, pieces.len())?;
        let mut hasher = Sha256::new();
        hasher.update((pieces.len() as u64).to_le_bytes());
        for id in 0..pieces.len() as u32 {
            let piece = pieces.get(id);
            hasher.update((piece.len() as u32).to_le_bytes());
            hasher.update(piece);
            hasher.update([u8::from(pieces.is_special(id))]);
        }
        let content_hash = hex(&hasher.finalize());
        let special_ids = (0..pieces.len() as u32).filter(|id| pieces.is_special(*id)).collect();
        Ok(Tokenizer { inner, pieces: Arc::new(pieces), special, special_ids, content_hash, named: None })
    }

    /// The ids of a text. Special tokens written out in the text become their ids.
    ///
    /// With `add_special`, BOS and whatever else the tokenizer puts around a text; rendered chats want `false`, their
    /// template writes those tokens itself.
    ///
    /// # Errors
    /// [`TextError::Encode`].
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoded = self
            .inner
            .encode_fast(text, add_special)
            .map_err(|e| TextError::Encode { detail: one_line(&e.to_string()) })?;
        let mut ids = encoded.get_ids().to_vec();
        if let (true, true, Some(bos), None) =
            (add_special, self.special.add_bos, self.special.bos, self.inner.get_post_processor())
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The ids of a text without added tokens, and the bytes each one covers.
    ///
    /// Spans come from the pieces: they follow one another without gap and may end inside a character. Where the
    /// pieces do not spell the text (a normaliser changed it), the spans are the tokenizer library's offsets.
    ///
    /// # Errors
    /// [`TextError::Encode`].
    pub fn encode_with_spans(&self, text: &str) -> Result<Encoding, TextError> {
        let encoded = self
            .inner
            .encode(text, false)
            .map_err(|e| TextError::Encode { detail: one_line(&e.to_string()) })?;
        let ids = encoded.get_ids().to_vec();
        let spans = self
            .spell(text, &ids)
            .unwrap_or_else(|| encoded.get_offsets().iter().map(|(start, end)| *start..*end).collect());
        Ok(Encoding { ids, spans })
    }

    /// Walks through the text piece by piece; `None` as soon as they disagree.
    fn spell(&self, text: &str, ids: &[u32]) -> Option<Vec<Range<usize>>> {
        let bytes = text.as_bytes();
        let mut at = 0;
        let mut spans = Vec::with_capacity(ids.len());
        for id in ids {
            let piece = self.pieces.get(*id);
            let rest = &bytes[at..];
            let taken = if rest.starts_with(piece) {
                piece.len()
            } else if self.pieces.strip_first_space
                && piece.first() == Some(&b' ')
                && rest.starts_with(&piece[1..])
            {
                // The space that SentencePiece puts before a segment stands for no byte of the text.
                piece.len() - 1
            } else {
                return None;
            };
            spans.push(at..at + taken);
            at += taken;
        }
        (at == bytes.len()).then_some(spans)
    }

    /// The text of ids; bytes that are no UTF-8 become U+FFFD. Ids outside the vocabulary stand for nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for id in ids {
            if !(skip_special && self.pieces.is_special(*id)) {
                bytes.extend_from_slice(self.pieces.get(*id));
            }
        }
        let from = usize::from(self.pieces.strip_first_space && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[from..]).into_owned()
    }

    /// The bytes an id stands for; empty outside the vocabulary.
    pub fn token_to_piece(&self, id: u32) -> &[u8] {
        self.pieces.get(id)
    }

    /// The id whose text is exactly this token, special tokens included.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Highest id plus one. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Ids with a role.
    pub fn special(&self) -> &SpecialIds {
        &self.special
    }

    /// Beginning-of-sequence id.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// Every id that ends generation.
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// True for control tokens, which are left out of text for people.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    /// The first control token (by id) that stands written out in a text, and so would be read as control.
    pub fn special_in(&self, text: &str) -> Option<u32> {
        let written = |id: &u32| {
            let piece = self.pieces.get(*id);
            std::str::from_utf8(piece).is_ok_and(|piece| !piece.is_empty() && text.contains(piece))
        };
        self.special_ids.iter().copied().find(written)
    }

    /// All control tokens, ascending.
    pub fn special_ids(&self) -> &[u32] {
        &self.special_ids
    }

    /// All tokens that stand for one raw byte, ascending.
    pub fn byte_ids(&self) -> Vec<u32> {
        (0..self.vocab_size() as u32).filter(|id| self.pieces.byte[*id as usize]).collect()
    }

    /// What every draft vocabulary must hold: control tokens, ids that end generation, raw bytes.
    pub fn always_in_draft_vocab(&self) -> Vec<TargetTokenId> {
        let mut ids = self.special_ids.clone();
        ids.extend(self.byte_ids());
        ids.extend(&self.special.eos);
        ids.extend(self.special.bos);
        ids.sort_unstable();
        ids.dedup();
        ids.into_iter().map(TargetTokenId).collect()
    }

    /// SHA-256 (hex) over the pieces and their roles: equal for a `tokenizer.json` and a GGUF of the same vocabulary.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    pub(crate) fn pieces(&self) -> &Arc<Pieces> {
        &self.pieces
    }
}

fn check_special(special: &SpecialIds, vocab: usize) -> Result<(), TextError> {
    let mut ids = special.eos.iter().chain(&special.bos).chain(&special.unk).chain(&special.pad);
    match ids.find(|id| **id as usize >= vocab) {
        Some(id) => Err(TextError::TokenizerJson {
            detail: format!("special id {id} is outside the vocabulary of {vocab}"),
        }),
        None => Ok(()),
    }
}

/// How token strings spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PieceKind {
    /// GPT-2: one printable character per byte.
    ByteLevel,
    /// SentencePiece: `▁` for space, `<0x0A>` for raw bytes.
    ByteFallback,
}

impl PieceKind {
    /// The bytes of a token string, and whether it is one raw byte.
    pub(crate) fn piece(self, token: &str) -> (Vec<u8>, bool) {
        match self {
            PieceKind::ByteLevel => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
                let bytes = bytes.unwrap_or_else(|| token.as_bytes().to_vec());
                let byte = bytes.len() == 1;
                (bytes, byte)
            }
            PieceKind::ByteFallback => match raw_byte(token) {
                Some(byte) => (vec![byte], true),
                None => (token.replace('\u{2581}', " ").into_bytes(), false),
            },
        }
    }
}

/// `<0x0A>` to 10.
fn raw_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    hexadecimal.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte that a character stands for in GPT-2's printable alphabet.
///
/// Printable Latin-1 stands for itself; the other 68 bytes, in ascending order, are U+0100 and up.
fn byte_of_char(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Names of a decoder's parts; the flag says that the part takes a space from the front.
fn decoder_parts(value: &serde_json::Value, parts: &mut Vec<(String, bool)>) {
    let Some(name) = value.get("type").and_then(|t| t.as_str()) else { return };
    if let Some(inner) = value.get("decoders").and_then(|d| d.as_array()) {
        inner.iter().for_each(|part| decoder_parts(part, parts));
        return;
    }
    let strips = match name {
        "Strip" => value.get("start").and_then(serde_json::Value::as_u64).unwrap_or(0) > 0,
        "Metaspace" => value.get("prepend_scheme").and_then(|s| s.as_str()) != Some("never"),
        _ => false,
    };
    parts.push((name.to_owned(), strips));
}

/// Messages of the tokenizer library may run over several lines; ours are one.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printable_alphabet_covers_every_byte_once() {
        let mut seen = [0u32; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(byte) = byte_of_char(c) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
    }

    #[test]
    fn raw_byte_tokens_are_recognised_and_nothing_else() {
        assert_eq!(raw_byte("<0x0A>"), Some(10));
        assert_eq!(raw_byte("<0xff>"), Some(255));
        for other in ["<0x0>", "<0x0AA>", "0x0A", "<0xGG>", "<0x+1>"] {
            assert_eq!(raw_byte(other), None, "{other}");
        }
    }
}
