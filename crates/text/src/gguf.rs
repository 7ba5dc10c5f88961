//! The tokenizer that a GGUF file carries in its metadata.

use serde_json::json;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use crate::tokenizer::{PieceKind, Pieces, one_line};
use crate::{SpecialIds, TextError, Tokenizer};

/// `tokenizer.ggml.*` as plain values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is split before BPE; only for `gpt2`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Empty: all normal.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: `left right`, by rank; only for `gpt2`.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.scores`; needed for `llama`.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos_id: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`, and `eot_token_id`, `eom_token_id` where present.
    pub eos_ids: Vec<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk_id: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad_id: Option<u32>,
    /// Roles of further ids that templates may name: `sep_token`, `cls_token`, `mask_token`.
    pub named_ids: Vec<(&'static str, u32)>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; only for `llama`.
    pub add_space_prefix: Option<bool>,
}

/// Control tokens that end a turn in the known families. A GGUF often names only one end id; the end of a turn and
/// the end of a document are two.
const END_NAMES: [&str; 9] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<EOT>",
    "</s>",
];

pub(crate) const NORMAL: i32 = 1;
pub(crate) const CONTROL: i32 = 3;
pub(crate) const USER_DEFINED: i32 = 4;
pub(crate) const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Names of splits that are built here, the first of each.
pub(crate) const PRE_NAMES: [&str; 5] = ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"];

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is split before BPE, and whether a split that is a token itself skips the merges.
struct Split {
    steps: Vec<serde_json::Value>,
    ignore_merges: bool,
    nfc: bool,
}

fn split_of(pre: Option<&str>) -> Result<Split, TextError> {
    let regex = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let plain = |steps| Split { steps, ignore_merges: false, nfc: false };
    Ok(match pre.unwrap_or("default") {
        "gpt-2" | "gpt2" => plain(vec![regex(GPT2)]),
        "smollm" | "starcoder" | "refact" | "codeshell" | "command-r" => plain(vec![digits, regex(GPT2)]),
        // What llama.cpp does with a file that does not say: its own sequence of splits.
        "default" => plain(vec![
            regex(r"[\p{P}\$\+<=>\^~\|]+"),
            regex(GPT2),
            regex(r"\p{N}+"),
            regex(r"[0-9][0-9][0-9]"),
        ]),
        "llama-bpe" | "llama3" | "llama-v3" => {
            Split { steps: vec![regex(LLAMA3)], ignore_merges: true, nfc: false }
        }
        "qwen2" | "deepseek-r1-qwen" => Split { steps: vec![regex(QWEN2)], ignore_merges: false, nfc: true },
        other => {
            return Err(TextError::UnsupportedPre {
                pre: other.to_owned(),
                known: PRE_NAMES.map(|name| format!("`{name}`")).join(", "),
            });
        }
    })
}

fn bad(detail: impl Into<String>) -> TextError {
    TextError::BadGguf { detail: detail.into() }
}

impl GgufTokenizer {
    /// Builds the tokenizer.
    ///
    /// # Errors
    /// [`TextError::UnsupportedModel`], [`TextError::UnsupportedPre`]; [`TextError::BadGguf`] if the lists do not fit
    /// together.
    pub fn build(&self) -> Result<Tokenizer, TextError> {
        self.check()?;
        match self.model.as_str() {
            "gpt2" => self.build_byte_level(),
            "llama" => self.build_sentence_piece(),
            other => Err(TextError::UnsupportedModel { model: other.to_owned() }),
        }
        .map(|tokenizer| tokenizer.with_named(self.named()))
    }

    fn check(&self) -> Result<(), TextError> {
        let count = self.tokens.len();
        if count == 0 || u32::try_from(count).is_err() {
            return Err(bad(format!("`tokenizer.ggml.tokens` has {count} entries")));
        }
        if !self.token_types.is_empty() && self.token_types.len() != count {
            return Err(bad(format!(
                "`tokenizer.ggml.token_type` has {} entries for {count} tokens",
                self.token_types.len()
            )));
        }
        if let Some(scores) = &self.scores
            && scores.len() != count
        {
            return Err(bad(format!(
                "`tokenizer.ggml.scores` has {} entries for {count} tokens",
                scores.len()
            )));
        }
        let total: usize = self.tokens.iter().map(String::len).sum();
        if u32::try_from(total).is_err() {
            return Err(bad("`tokenizer.ggml.tokens` is longer than 4 GiB"));
        }
        for (key, id) in [("bos", self.bos_id), ("unknown", self.unk_id), ("padding", self.pad_id)]
            .into_iter()
            .chain(self.eos_ids.iter().map(|id| ("eos", Some(*id))))
        {
            if let Some(id) = id
                && id as usize >= count
            {
                return Err(bad(format!(
                    "`tokenizer.ggml.{key}_token_id` is {id}, but there are {count} tokens"
                )));
            }
        }
        Ok(())
    }

    /// What templates call the special tokens: each the file's own id of that role.
    fn named(&self) -> Vec<(&'static str, String)> {
        let roles = [
            ("bos_token", self.bos_id),
            ("eos_token", self.eos_ids.first().copied()),
            ("unk_token", self.unk_id),
            ("pad_token", self.pad_id),
        ];
        roles
            .into_iter()
            .chain(self.named_ids.iter().map(|(name, id)| (*name, Some(*id))))
            .filter_map(|(name, id)| Some((name, self.tokens.get(id? as usize)?.clone())))
            .collect()
    }

    fn token_type(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(NORMAL)
    }

    fn special_ids(&self, default_add_bos: bool) -> SpecialIds {
        let mut eos = self.eos_ids.clone();
        for (id, token) in self.tokens.iter().enumerate() {
            if self.token_type(id) == CONTROL && END_NAMES.contains(&token.as_str()) {
                eos.push(id as u32);
            }
        }
        // The file's own choice stays first; the others follow by id.
        let mut seen = std::collections::BTreeSet::new();
        eos.retain(|id| seen.insert(*id));
        SpecialIds {
            bos: self.bos_id,
            eos,
            unk: self.unk_id,
            pad: self.pad_id,
            add_bos: self.add_bos.unwrap_or(default_add_bos),
        }
    }

    fn pieces(&self, kind: PieceKind) -> Pieces {
        let mut pieces = Pieces::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            match self.token_type(id) {
                CONTROL => pieces.push(token.as_bytes(), true, false),
                USER_DEFINED => pieces.push(token.as_bytes(), false, false),
                _ => {
                    let (bytes, byte) = kind.piece(token);
                    pieces.push(&bytes, false, byte);
                }
            }
        }
        pieces
    }

    fn add_tokens(&self, inner: &mut tokenizers::Tokenizer) {
        let added: Vec<AddedToken> = self
            .tokens
            .iter()
            .enumerate()
            .filter(|(id, _)| matches!(self.token_type(*id), CONTROL | USER_DEFINED))
            .map(|(id, token)| {
                AddedToken::from(token.clone(), self.token_type(id) == CONTROL).normalized(false)
            })
            .collect();
        inner.add_tokens(&added);
    }

    fn vocab(&self) -> impl Iterator<Item = (String, u32)> + '_ {
        // Reversed: of two tokens with one spelling the lower id is kept.
        self.tokens.iter().enumerate().rev().map(|(id, token)| (token.clone(), id as u32))
    }

    fn build_byte_level(&self) -> Result<Tokenizer, TextError> {
        let split = split_of(self.pre.as_deref())?;
        let merges = self
            .merges
            .iter()
            .enumerate()
            .map(|(i, merge)| match merge.split_once(' ') {
                Some((left, right)) if !left.is_empty() && !right.is_empty() => {
                    Ok((left.to_owned(), right.to_owned()))
                }
                _ => Err(bad(format!("`tokenizer.ggml.merges[{i}]` is not two tokens"))),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let bpe = BPE::builder()
            .vocab_and_merges(self.vocab().collect::<Vocab>(), merges)
            .ignore_merges(split.ignore_merges)
            .build()
            .map_err(|e| bad(one_line(&e.to_string())))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        let mut steps = split.steps;
        steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}));
        let pre: PreTokenizerWrapper = part(json!({"type": "Sequence", "pretokenizers": steps}))?;
        inner.with_pre_tokenizer(Some(pre));
        let decoder: DecoderWrapper = part(
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}),
        )?;
        inner.with_decoder(Some(decoder));
        if split.nfc {
            let nfc: NormalizerWrapper = part(json!({"type": "NFC"}))?;
            inner.with_normalizer(Some(nfc));
        }
        self.add_tokens(&mut inner);
        Tokenizer::assemble(inner, self.pieces(PieceKind::ByteLevel), self.special_ids(false))
    }

    /// SentencePiece BPE joins the neighbours whose joint token has the highest score; ranking all pairs by that score
    /// gives the same result from a table of merges.
    fn build_sentence_piece(&self) -> Result<Tokenizer, TextError> {
        let scores = self
            .scores
            .as_ref()
            .ok_or_else(|| bad("`tokenizer.ggml.scores` is missing, `llama` needs it"))?;
        let vocab: std::collections::HashMap<&str, u32> =
            self.tokens.iter().enumerate().rev().map(|(id, token)| (token.as_str(), id as u32)).collect();
        let mergeable = |id: usize| !matches!(self.token_type(id), CONTROL | BYTE);
        let mut ranked = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if !mergeable(id) || vocab.get(token.as_str()) != Some(&(id as u32)) {
                continue;
            }
            for (cut, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(cut);
                if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right))
                    && mergeable(*l as usize)
                    && mergeable(*r as usize)
                {
                    ranked.push((scores[id], id as u32, *l, *r));
                }
            }
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
        let token = |id: u32| self.tokens[id as usize].clone();
        let merges = ranked.into_iter().map(|(_, _, l, r)| (token(l), token(r))).collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(self.vocab().collect::<Vocab>(), merges)
            .fuse_unk(true)
            .byte_fallback(true);
        if let Some(unk) = self.unk_id {
            builder = builder.unk_token(token(unk));
        }
        let bpe = builder.build().map_err(|e| bad(one_line(&e.to_string())))?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        let prefix = self.add_space_prefix.unwrap_or(true);
        let mut normalizers = Vec::new();
        if prefix {
            normalizers.push(json!({"type": "Prepend", "prepend": "\u{2581}"}));
        }
        normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}));
        let normalizer: NormalizerWrapper = part(json!({"type": "Sequence", "normalizers": normalizers}))?;
        inner.with_normalizer(Some(normalizer));
        let decoder: DecoderWrapper = part(json!({"type": "ByteFallback"}))?;
        inner.with_decoder(Some(decoder));
        self.add_tokens(&mut inner);
        let mut pieces = self.pieces(PieceKind::ByteFallback);
        pieces.strip_first_space = prefix;
        Tokenizer::assemble(inner, pieces, self.special_ids(true))
    }
}

/// A part of the tokenizer library from its documented JSON form.
fn part<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> Result<T, TextError> {
    serde_json::from_value(value).map_err(|e| bad(format!("tokenizer part: {e}")))
}
