//! Tokens of one sequence to the text and the tokens that a client sees.
//!
//! Text is given out as soon as it is certain that no stop text begins in it. Tokens (for log-probabilities and traces)
//! follow their text: none is shown before its text is, and of a stop text nothing is shown. Where the model may call
//! tools, calls are told apart from the text here, so that an answer ends at the token that completes its last call.

use std::sync::Arc;

use draftsmith_decode::TokenEvent;
use draftsmith_text::{StreamDecoder, Tokenizer};

use crate::tools::{Part, Reader, Tools};

/// A token as a client sees it.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub(crate) event: TokenEvent,
    /// Its bytes, as far as they are part of the text.
    pub(crate) bytes: Vec<u8>,
}

/// What became certain.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delta {
    pub(crate) text: String,
    /// The same with its calls told apart; empty unless there are tools.
    pub(crate) parts: Vec<Part>,
    /// Empty unless tokens were asked for.
    pub(crate) tokens: Vec<Shown>,
}

impl Delta {
    pub(crate) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty() && self.parts.is_empty()
    }
}

/// How text and tokens are shown.
#[derive(Clone, Debug, Default)]
pub(crate) struct SpeechOptions {
    /// Texts that end the answer.
    pub(crate) stops: Vec<String>,
    /// Control tokens are left out of the text.
    pub(crate) skip_special: bool,
    /// Tokens are wanted beside the text.
    pub(crate) tokens: bool,
    /// What the model may call.
    pub(crate) tools: Option<Arc<Tools>>,
}

/// State of one sequence.
pub(crate) struct Speech {
    decoder: StreamDecoder,
    reader: Option<Reader>,
    options: SpeechOptions,
    /// Not given out yet.
    ready: Delta,
    /// Tokens whose text is not certain.
    held: Vec<Shown>,
    /// Bytes of certain text that no token accounts for yet.
    uncounted: usize,
}

impl Speech {
    pub(crate) fn new(tokenizer: &Tokenizer, options: SpeechOptions) -> Speech {
        let decoder = tokenizer.stream_decoder(options.skip_special, &options.stops);
        let reader = options.tools.as_ref().map(|tools| Reader::new(Arc::clone(tools), crate::random));
        Speech {
            decoder: match &options.tools {
                Some(tools) => decoder.showing(Arc::clone(&tools.control_ids)),
                None => decoder,
            },
            reader,
            options,
            ready: Delta::default(),
            held: Vec::new(),
            uncounted: 0,
        }
    }

    /// Takes in a committed token; true if it completed a stop text, or the last call.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, event: &TokenEvent) -> bool {
        if self.stopped() || self.is_over() {
            return true;
        }
        let chunk = self.decoder.push(event.id);
        if self.options.tokens {
            let silent = self.decoder.hides(event.id);
            let bytes = if silent { Vec::new() } else { tokenizer.token_to_piece(event.id).to_vec() };
            self.held.push(Shown { event: event.clone(), bytes });
        }
        self.add(&chunk.text);
        chunk.stopped || self.is_over()
    }

    /// True once all calls that are wanted were made.
    fn is_over(&self) -> bool {
        self.reader.as_ref().is_some_and(Reader::is_over)
    }

    /// True once a stop text was completed.
    pub(crate) fn stopped(&self) -> bool {
        self.decoder.stopped()
    }

    /// What became certain since the last call.
    pub(crate) fn take(&mut self) -> Delta {
        std::mem::take(&mut self.ready)
    }

    /// The rest of it.
    pub(crate) fn finish(mut self) -> Delta {
        let stopped = self.stopped();
        let chunk = self.decoder.clone().finish();
        self.add(&chunk.text);
        if let Some(reader) = &mut self.reader {
            self.ready.parts.extend(reader.finish());
        }
        if stopped {
            // The token in which the stop text begins is shown up to there.
            if let Some(first) = self.held.first_mut()
                && self.uncounted > 0
            {
                first.bytes.truncate(self.uncounted);
                self.ready.tokens.push(first.clone());
            }
        } else {
            self.ready.tokens.append(&mut self.held);
        }
        self.ready
    }

    fn add(&mut self, text: &str) {
        self.ready.text.push_str(text);
        if let Some(reader) = &mut self.reader {
            self.ready.parts.extend(reader.push(text));
        }
        if self.options.stops.is_empty() {
            self.ready.tokens.append(&mut self.held);
            return;
        }
        self.uncounted += text.len();
        let mut certain = 0;
        for token in &self.held {
            if token.bytes.len() > self.uncounted {
                break;
            }
            self.uncounted -= token.bytes.len();
            certain += 1;
        }
        self.ready.tokens.extend(self.held.drain(..certain));
    }
}

#[cfg(test)]
mod tests {
    use draftsmith_decode::TokenOrigin;
    use draftsmith_text::SpecialIds;

    use super::*;

    /// Speaks a text token by token; returns the text, the tokens' texts, and whether a stop text ended it.
    fn speak(text: &str, stops: &[&str]) -> (String, Vec<String>, bool) {
        let json = include_bytes!("../../../fixtures/tiny-target/tokenizer.json");
        let tokenizer = Tokenizer::from_json(json, SpecialIds::default()).unwrap();
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut speech =
            Speech::new(&tokenizer, SpeechOptions { stops, skip_special: true, tokens: true, tools: None });
        let (mut said, mut tokens) = (String::new(), Vec::new());
        let mut hear = |delta: Delta, last: bool| {
            said.push_str(&delta.text);
            tokens.extend(delta.tokens.iter().map(|t| String::from_utf8_lossy(&t.bytes).into_owned()));
            let shown: String = tokens.concat();
            assert!(said.starts_with(&shown), "{shown:?} is shown before its text {said:?}");
            assert!(!last || said == shown, "{said:?} is not {shown:?}");
        };
        let mut stopped = false;
        for (position, id) in tokenizer.encode(text, false).unwrap().into_iter().enumerate() {
            let event = TokenEvent { id, position, origin: TokenOrigin::Plain, logprobs: None };
            stopped = speech.push(&tokenizer, &event);
            hear(speech.take(), false);
            if stopped {
                break;
            }
        }
        hear(speech.finish(), true);
        (said, tokens, stopped)
    }

    #[test]
    fn of_a_stop_text_no_byte_is_shown_wherever_tokens_end() {
        let text = "There are 2 boxes with 8 buttons in each box. So 2 times 8 is 16.";
        let (said, tokens, stopped) = speak(text, &[]);
        assert_eq!((said.as_str(), tokens.concat().as_str(), stopped), (text, text, false));
        for start in 0..text.len() {
            for length in 1..9.min(text.len() - start + 1) {
                let stop = &text[start..start + length];
                let (said, _, stopped) = speak(text, &[stop]);
                assert!(stopped, "{stop:?}");
                assert_eq!(Some(said.as_str()), text.split_once(stop).map(|(before, _)| before), "{stop:?}");
            }
        }
        assert_eq!(
            speak(text, &["buttons!", "16.\n"]).0,
            text,
            "what never completes is given out at the end"
        );
    }
}
