//! A `tokenizer.json` as the metadata that a GGUF file carries.
//!
//! GGUF names the way text is split before BPE instead of describing it. The name is found by trial: of those that are
//! built here, the one whose tokenizer gives the same ids on text that tells them apart.

use serde_json::Value;

use crate::gguf::{CONTROL, NORMAL, PRE_NAMES, UNUSED, USER_DEFINED};
use crate::{GgufTokenizer, TextError, Tokenizer};

/// Contractions in both cases, runs of digits, of spaces and of punctuation, line ends, letters with marks, and scripts
/// beyond Latin: where the splits of the families differ.
const TELLING: [&str; 6] = [
    "It's 1, 22, 333, 4444 and 1234567890; you'LL see: I'M here, THEY'RE not.",
    "a  b   c    d\te\n\nf \n g\r\n  h   ",
    "x=y+1; if (a<b) { return \"it's\"; } // ~~~ $5.00 100% #1 @you (don't!) --- ...",
    "Ünïcödé Straße café naïve e\u{301} 日本語 の テスト 1２３ العربية עברית हिन्दी 한국어 🙂🙃 ²³ ½",
    "http://example.org/a_b-c?d=e&f=1 snake_case CamelCase ALLCAPS 3.14159e-10",
    " leading, trailing ",
];

impl GgufTokenizer {
    /// The metadata of a byte-level BPE `tokenizer.json`; `tokenizer` is the one built from it.
    ///
    /// # Errors
    /// [`TextError::NoGgufForm`] for other kinds, and where no known split gives the same ids.
    pub fn of(tokenizer_json: &[u8], tokenizer: &Tokenizer) -> Result<GgufTokenizer, TextError> {
        let none = |why: &str| TextError::NoGgufForm { why: why.to_owned() };
        let json: Value =
            serde_json::from_slice(tokenizer_json).map_err(|e| none(&format!("it is no JSON: {e}")))?;
        let model = &json["model"];
        if model["type"] != "BPE" || model["byte_fallback"] == true {
            return Err(none("only byte-level BPE is written"));
        }
        let vocab = model["vocab"].as_object().ok_or_else(|| none("`model.vocab` is no object"))?;
        let count = tokenizer.vocab_size();
        // Ids without a token are filled as llama.cpp's converter does it.
        let mut tokens: Vec<String> = (0..count).map(|id| format!("[PAD{id}]")).collect();
        let mut token_types = vec![UNUSED; count];
        let mut put = |id: Option<u64>, text: &str, kind: i32| -> Result<(), TextError> {
            let slot = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < count);
            let slot = slot.ok_or_else(|| none(&format!("token `{text}` has no id below {count}")))?;
            (tokens[slot], token_types[slot]) = (text.to_owned(), kind);
            Ok(())
        };
        for (text, id) in vocab {
            put(id.as_u64(), text, NORMAL)?;
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
            put(added["id"].as_u64(), added["content"].as_str().unwrap_or_default(), kind)?;
        }
        // Newer files hold pairs, older ones a text with a space.
        let merge = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Array(pair) => Some(format!("{} {}", pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
            _ => None,
        };
        let merges: Option<Vec<String>> =
            model["merges"].as_array().map(Vec::as_slice).unwrap_or_default().iter().map(merge).collect();
        let special = tokenizer.special();
        let plain = GgufTokenizer {
            model: "gpt2".into(),
            pre: None,
            tokens,
            token_types,
            merges: merges.ok_or_else(|| none("`model.merges` is no list of pairs"))?,
            scores: None,
            bos_id: special.bos,
            eos_ids: special.eos.clone(),
            unk_id: special.unk,
            named_ids: Vec::new(),
            pad_id: special.pad,
            add_bos: Some(special.add_bos),
            add_space_prefix: None,
        };
        // Where the vocabulary cannot tell two of them apart, the one with the same steps: only `smollm` splits digits.
        let mut names = PRE_NAMES;
        if json["pre_tokenizer"].to_string().contains("\"Digits\"") {
            names.swap(0, 1);
        }
        for pre in names {
            let candidate = GgufTokenizer { pre: Some(pre.to_owned()), ..plain.clone() };
            if same_ids(&candidate.build()?, tokenizer)? {
                return Ok(candidate);
            }
        }
        Err(none(&format!("it splits text like none of {}", PRE_NAMES.join(", "))))
    }
}

fn same_ids(one: &Tokenizer, other: &Tokenizer) -> Result<bool, TextError> {
    for text in TELLING {
        if one.encode(text, false)? != other.encode(text, false)? {
            return Ok(false);
        }
    }
    Ok(true)
}
