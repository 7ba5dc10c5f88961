//! Proposals from the text itself: what followed the last tokens when they stood there before (prompt lookup).
//!
//! Costs no network pass and wins where an answer copies: quotes, code edits, tables, loops.

use std::collections::HashMap;

/// Tokens that must repeat for a proposal.
const SHORT: usize = 2;
/// Tokens that are looked for first.
const LONG: usize = 4;
/// Longest repetition that is measured.
const LONGEST: usize = 8;

/// Where the last grams of a growing text stood before.
#[derive(Default)]
pub(crate) struct Lookup {
    /// Place behind the latest earlier occurrence of a gram.
    short: HashMap<[u32; SHORT], u32>,
    long: HashMap<[u32; LONG], u32>,
    /// Tokens whose grams are in the maps; the gram that ends the text is not, it would find itself.
    indexed: usize,
}

/// A place where the end of the text stood before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Match {
    /// Place of the token that followed.
    pub at: usize,
    /// Tokens that are the same, up to [`LONGEST`].
    pub length: usize,
}

impl Lookup {
    /// The latest earlier occurrence of the end of `text`, the longer gram before the shorter one.
    ///
    /// `text` is what it was at the call before, with tokens added.
    pub(crate) fn find(&mut self, text: &[u32]) -> Option<Match> {
        for behind in self.indexed + 1..text.len() {
            if let Some(gram) = text[..behind].last_chunk::<SHORT>() {
                self.short.insert(*gram, behind as u32);
            }
            if let Some(gram) = text[..behind].last_chunk::<LONG>() {
                self.long.insert(*gram, behind as u32);
            }
        }
        self.indexed = text.len().saturating_sub(1);
        let long = text.last_chunk::<LONG>().and_then(|gram| self.long.get(gram));
        let short = || text.last_chunk::<SHORT>().and_then(|gram| self.short.get(gram));
        let at = *long.or_else(short)? as usize;
        let length = (1..=LONGEST.min(at)).take_while(|i| text[at - i] == text[text.len() - i]).count();
        Some(Match { at, length })
    }

    /// The same for a text that goes on with `path`, which may never be committed.
    pub(crate) fn find_behind(&self, text: &[u32], path: &[u32]) -> Option<Match> {
        let back = |i: usize| match path.len().checked_sub(i) {
            Some(at) => Some(path[at]),
            None => Some(text[text.len().checked_sub(i - path.len())?]),
        };
        let long = || Some([back(4)?, back(3)?, back(2)?, back(1)?]);
        let short = || Some([back(2)?, back(1)?]);
        let found = long().and_then(|gram: [u32; LONG]| self.long.get(&gram));
        let found = found.or_else(|| short().and_then(|gram: [u32; SHORT]| self.short.get(&gram)));
        let at = *found? as usize;
        let length = (1..=LONGEST.min(at)).take_while(|i| Some(text[at - i]) == back(*i)).count();
        Some(Match { at, length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_longest_repetition_is_found_and_the_end_does_not_find_itself() {
        let mut lookup = Lookup::default();
        assert_eq!(lookup.find(&[]), None);
        assert_eq!(lookup.find(&[1, 2, 3, 4]), None);
        // 2, 3 stood before at 1..3, followed by place 3.
        assert_eq!(lookup.find(&[1, 2, 3, 4, 9, 2, 3]), Some(Match { at: 3, length: 2 }));
        // Now the latest occurrence is the second.
        assert_eq!(lookup.find(&[1, 2, 3, 4, 9, 2, 3, 7, 2, 3]), Some(Match { at: 7, length: 2 }));
        // Four equal tokens win over the later two.
        let text = [5, 6, 7, 8, 1, 7, 8, 2, 5, 6, 7, 8];
        assert_eq!(lookup_of(&text), Some(Match { at: 4, length: 4 }));
        // A loop finds itself one period earlier.
        assert_eq!(lookup_of(&[1, 1, 1, 1, 1]), Some(Match { at: 4, length: 4 }));
    }

    #[test]
    fn a_path_below_the_text_is_looked_for_as_the_text_that_it_would_be() {
        let text = [5, 6, 7, 8, 1, 7, 8, 2, 5, 6, 3];
        for path in [&[][..], &[7], &[7, 8], &[6, 7, 8], &[5, 6, 7, 8], &[9, 5, 6, 7, 8], &[3, 3]] {
            let mut lookup = Lookup::default();
            lookup.find(&text);
            let whole = [&text[..], path].concat();
            // What the text alone has, in the longer one.
            let mut longer = Lookup::default();
            longer.find(&text);
            longer.indexed = whole.len();
            assert_eq!(lookup.find_behind(&text, path), longer.find(&whole), "{path:?}");
        }
    }

    fn lookup_of(text: &[u32]) -> Option<Match> {
        let mut lookup = Lookup::default();
        let mut found = None;
        for end in 0..=text.len() {
            found = lookup.find(&text[..end]);
        }
        assert_eq!(found, Lookup::default().find(text), "token by token or at once");
        found
    }
}
