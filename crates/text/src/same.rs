//! Whether two tokenizers give the same ids the same meaning.

use crate::Tokenizer;

/// The first id that stands for something else in another tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenDifference {
    /// The id.
    pub id: u32,
    /// What it stands for in the first tokenizer; `None` for nothing, or padding.
    pub first: Option<Vec<u8>>,
    /// The same in the second.
    pub second: Option<Vec<u8>>,
}

impl TokenDifference {
    /// In words, for tokenizers of these owners.
    pub fn told(&self, first: &str, second: &str) -> String {
        let piece = |piece: &Option<Vec<u8>>| match piece {
            None => "nothing".to_owned(),
            Some(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => format!("`{}`", text.escape_debug()),
                Err(_) => format!("the bytes `{}`", bytes.escape_ascii()),
            },
        };
        let (id, a, b) = (self.id, piece(&self.first), piece(&self.second));
        format!("id {id} is {a} in {first} and {b} in {second}")
    }
}

/// True for names of ids that only fill a vocabulary up: `[PAD151665]`, `<unused7>`, `<|reserved_special_token_3|>`.
fn is_padding(piece: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(piece) else { return false };
    // A word of a text is none.
    if !text.starts_with(['[', '<']) {
        return false;
    }
    let lower = text.to_lowercase();
    let mut words = lower.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).peekable();
    let fills =
        |word: &str| matches!(word, "pad" | "unused" | "reserved" | "extra" | "dummy" | "placeholder");
    let mut any = false;
    let all = words.all(|word| {
        any |= fills(word);
        fills(word) || matches!(word, "special" | "token" | "tok" | "id")
    });
    any && all
}

impl Tokenizer {
    /// The first id that means something else in `other`; ids that only fill up one vocabulary may be missing in the
    /// other.
    pub fn difference(&self, other: &Tokenizer) -> Option<TokenDifference> {
        let most = self.vocab_size().max(other.vocab_size()) as u32;
        let says = |tokenizer: &Tokenizer, id: u32| {
            let piece = tokenizer.token_to_piece(id);
            (!piece.is_empty() && !is_padding(piece)).then(|| piece.to_vec())
        };
        (0..most)
            .filter(|id| self.token_to_piece(*id) != other.token_to_piece(*id))
            .map(|id| TokenDifference { id, first: says(self, id), second: says(other, id) })
            .find(|difference| difference.first != difference.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_told_from_tokens() {
        for name in [
            "[PAD151665]",
            "<unused12>",
            "<|reserved_special_token_5|>",
            "<extra_id_3>",
            "[unused3]",
            "<|dummy_1|>",
        ] {
            assert!(is_padding(name.as_bytes()), "{name}");
        }
        for name in
            ["pad", "unused", "<tool_call>", "<|fim_pad|>", "<|im_end|>", "[", "<", "<s>", "extra1", "\u{e9}"]
        {
            assert!(!is_padding(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn the_first_difference_is_told_and_padding_is_none() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-target/tokenizer.json");
        let text = std::fs::read_to_string(path).unwrap();
        let of = |json: &serde_json::Value| {
            Tokenizer::from_json(json.to_string().as_bytes(), crate::SpecialIds::default()).unwrap()
        };
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let one = of(&json);
        assert_eq!(one.difference(&of(&json)), None);
        let count = one.vocab_size() as u32;
        let with = |content: &str, id: u32| {
            let mut json = json.clone();
            let token = serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true});
            json["added_tokens"].as_array_mut().unwrap().push(token);
            of(&json)
        };
        let padded = with("[PAD7]", count);
        assert_eq!(padded.vocab_size() as u32, count + 1);
        assert_eq!((one.difference(&padded), padded.difference(&one)), (None, None));
        let more = with("<|image|>", count);
        let found = one.difference(&more).unwrap();
        assert_eq!(
            found.told("the target", "the draft model"),
            format!("id {count} is nothing in the target and `<|image|>` in the draft model")
        );
        // A token of the text is another one.
        let changed = {
            let mut json = json.clone();
            let vocab = json["model"]["vocab"].as_object_mut().unwrap();
            let last =
                vocab.iter().max_by_key(|(_, id)| id.as_u64()).map(|(token, _)| token.clone()).unwrap();
            let id = vocab.remove(&last).unwrap();
            vocab.insert("abracadabra".into(), id);
            let named = |merge: &serde_json::Value| {
                merge.as_str().map_or_else(
                    || merge.as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect::<String>(),
                    |text| text.replace(' ', ""),
                )
            };
            json["model"]["merges"].as_array_mut().unwrap().retain(|merge| named(merge) != last);
            of(&json)
        };
        let found = one.difference(&changed).unwrap();
        assert_eq!(found.second.as_deref(), Some(&b"abracadabra"[..]));
    }
}
