//! Ids to text while they arrive.
//!
//! Invariants: the parts put together equal [`crate::Tokenizer::decode`] of all ids, cut before the first stop string;
//! no part ends inside a character; nothing that may turn out to be the start of a stop string is given out.

use std::sync::Arc;

use crate::tokenizer::Pieces;

/// What a pushed token adds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// New text; empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// A stop string was completed; no more text comes.
    pub stopped: bool,
}

/// Incremental detokeniser of one answer.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    pieces: Arc<Pieces>,
    skip_special: bool,
    /// Control tokens whose text is shown all the same.
    shown: Arc<[u32]>,
    stops: Vec<String>,
    /// Bytes of an incomplete character, at most three.
    pending: Vec<u8>,
    /// Text that may be the start of a stop string.
    held: String,
    /// No byte was seen yet: the space in front of the first word is still to be taken away.
    at_start: bool,
    stopped: bool,
}

impl crate::Tokenizer {
    /// Starts a stream. Empty stop strings are ignored.
    pub fn stream_decoder(&self, skip_special: bool, stops: &[String]) -> StreamDecoder {
        StreamDecoder {
            pieces: Arc::clone(self.pieces()),
            skip_special,
            shown: Arc::from([]),
            stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(),
            pending: Vec::new(),
            held: String::new(),
            at_start: true,
            stopped: false,
        }
    }
}

impl StreamDecoder {
    /// Shows the text of these control tokens even where control tokens are skipped: marks that a reader looks for.
    pub fn showing(self, ids: Arc<[u32]>) -> StreamDecoder {
        StreamDecoder { shown: ids, ..self }
    }

    /// True if the text of this token is no part of what is given out.
    pub fn hides(&self, id: u32) -> bool {
        self.skip_special && self.pieces.is_special(id) && !self.shown.contains(&id)
    }

    /// Takes the next id.
    pub fn push(&mut self, id: u32) -> Chunk {
        let pieces = Arc::clone(&self.pieces);
        if self.stopped || self.hides(id) {
            return Chunk { text: String::new(), stopped: self.stopped };
        }
        let mut piece = pieces.get(id);
        if self.at_start && !piece.is_empty() {
            self.at_start = false;
            if pieces.strip_first_space && piece[0] == b' ' {
                piece = &piece[1..];
            }
        }
        self.pending.extend_from_slice(piece);
        let text = self.take_characters(false);
        self.filter_stops(&text, false)
    }

    /// Gives out what was held back. The stream is used up.
    pub fn finish(mut self) -> Chunk {
        if self.stopped {
            return Chunk { text: String::new(), stopped: true };
        }
        let text = self.take_characters(true);
        self.filter_stops(&text, true)
    }

    /// True once a stop string was completed.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Moves whole characters out of `pending`. The same cuts as `String::from_utf8_lossy`: one U+FFFD for each longest
    /// start of a character that cannot go on.
    fn take_characters(&mut self, last: bool) -> String {
        let mut out = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (good, bad) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(good));
                    match error.error_len() {
                        Some(length) => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            rest = &bad[length..];
                        }
                        None if last => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            rest = &[];
                            break;
                        }
                        None => {
                            rest = bad;
                            break;
                        }
                    }
                }
            }
        }
        self.pending = rest.to_vec();
        out
    }

    /// Adds text to what is held, cuts at the stop string that is completed first (of several, the longest), and gives
    /// out all but the longest tail that may still become one.
    fn filter_stops(&mut self, text: &str, last: bool) -> Chunk {
        if self.stops.is_empty() {
            return Chunk { text: text.to_owned(), stopped: false };
        }
        let scanned = self.held.len();
        self.held.push_str(text);
        for (at, c) in text.char_indices() {
            let end = scanned + at + c.len_utf8();
            let stop = self
                .stops
                .iter()
                .filter(|stop| self.held[..end].ends_with(stop.as_str()))
                .map(String::len)
                .max();
            if let Some(length) = stop {
                self.held.truncate(end - length);
                self.stopped = true;
                return Chunk { text: std::mem::take(&mut self.held), stopped: true };
            }
        }
        let keep = if last { 0 } else { self.held_back() };
        let rest = self.held.split_off(self.held.len() - keep);
        Chunk { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Length of the longest tail of `held` that starts a stop string.
    fn held_back(&self) -> usize {
        let starts = |stop: &String| {
            let most = (stop.len() - 1).min(self.held.len());
            (1..=most).rev().find(|n| {
                let cut = self.held.len() - n;
                self.held.is_char_boundary(cut) && stop.starts_with(&self.held[cut..])
            })
        };
        self.stops.iter().filter_map(starts).max().unwrap_or(0)
    }
}
