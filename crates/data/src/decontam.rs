//! Keeping evaluation questions out of the training data.
//!
//! A text is contaminated if it shares a sequence of 13 words with an evaluation text, or holds a whole evaluation text
//! of 5 to 12 words, or equals a shorter one. Sequences that occur in more than five evaluation texts are boilerplate
//! ("reason step by step …") and do not count. Words are lower case, without punctuation.

use std::collections::{HashMap, HashSet};

use sha2::{Digest, Sha256};

/// Words in a sequence that counts as copied; the length that GPT-3's authors used.
const WORDS: usize = 13;
/// Shorter evaluation texts must equal the whole text.
const MIN_CONTAINED: usize = 5;
/// In more evaluation texts than this a sequence is boilerplate.
const BOILERPLATE: u32 = 5;

/// Finds overlaps with evaluation texts.
#[derive(Clone, Debug, Default)]
pub struct Decontaminator {
    /// Sequence length to hashes of evaluation sequences of that length.
    grams: HashMap<usize, HashSet<u64>>,
    /// Whole texts shorter than `MIN_CONTAINED` words.
    whole: HashSet<u64>,
}

impl Decontaminator {
    /// Learns the evaluation texts (prompts, and references where they are texts).
    pub fn new<'a>(texts: impl IntoIterator<Item = &'a str>) -> Decontaminator {
        let mut counts: HashMap<u64, u32> = HashMap::new();
        let mut out = Decontaminator::default();
        for text in texts {
            let words = words(text);
            if words.is_empty() {
                continue;
            }
            if words.len() < MIN_CONTAINED {
                out.whole.insert(hash(&words));
            } else if words.len() < WORDS {
                out.grams.entry(words.len()).or_default().insert(hash(&words));
            } else {
                let here: HashSet<u64> = words.windows(WORDS).map(hash).collect();
                for gram in here {
                    *counts.entry(gram).or_default() += 1;
                }
            }
        }
        out.grams
            .entry(WORDS)
            .or_default()
            .extend(counts.into_iter().filter(|(_, count)| *count <= BOILERPLATE).map(|(gram, _)| gram));
        out
    }

    /// True if the text overlaps with an evaluation text.
    pub fn overlaps(&self, text: &str) -> bool {
        let words = words(text);
        if words.is_empty() {
            return false;
        }
        if words.len() < MIN_CONTAINED && self.whole.contains(&hash(&words)) {
            return true;
        }
        self.grams.iter().any(|(length, grams)| {
            !grams.is_empty() && words.windows(*length).any(|w| grams.contains(&hash(w)))
        })
    }
}

/// Lower-case words without punctuation.
pub(crate) fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
}

fn hash(words: &[String]) -> u64 {
    let mut hasher = Sha256::new();
    for word in words {
        hasher.update(word.as_bytes());
        hasher.update([0]);
    }
    let digest = hasher.finalize();
    u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(evaluation: &[&str], text: &str, expected: bool) {
        assert_eq!(Decontaminator::new(evaluation.iter().copied()).overlaps(text), expected, "{text}");
    }

    #[test]
    fn thirteen_shared_words_are_an_overlap_and_twelve_are_not() {
        let long = "a b c d e f g h i j k l m n";
        check(&[long], "x A, b; c d e f g h i j k l m! y", true);
        check(&[long], "x a b c d e f g h i j k l y", false);
    }

    #[test]
    fn short_questions_count_when_they_are_whole() {
        check(&["Who wrote the Iliad, please?"], "Tell me: who wrote the iliad please", true);
        check(&["Who wrote the Iliad, please?"], "who wrote the iliad", false);
        check(&["Tell a joke"], "tell a joke!", true);
        check(&["Tell a joke"], "tell a joke about cats", false);
        check(&[""], "", false);
    }

    #[test]
    fn boilerplate_does_not_count() {
        let tail = "please reason step by step and put your final answer within the box now";
        let texts: Vec<String> = (0..6).map(|i| format!("question {i} {tail}")).collect();
        check(&texts.iter().map(String::as_str).collect::<Vec<_>>(), tail, false);
        check(&texts[..5].iter().map(String::as_str).collect::<Vec<_>>(), tail, true);
    }
}
