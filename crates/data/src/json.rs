//! JSON as Python writes and reads it.
//!
//! Python's `json` writes `NaN` and `Infinity`, and halves of surrogate pairs; data sets hold both. A text that is JSON is
//! read as it is. One that is not is read again with those two put right: a number that is none becomes `null`, half a
//! pair U+FFFD. Which top-level key each stood under is told, so that only those in fields that are read count.

use std::collections::BTreeSet;

use serde_json::Value;
use serde_json::error::Category;

use crate::RowError;

/// What was put right, by top-level key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Repairs {
    /// Keys with `NaN`, `Infinity` or a number beyond 64-bit floats.
    pub(crate) not_finite: BTreeSet<String>,
    /// Keys with half a surrogate pair.
    pub(crate) surrogates: BTreeSet<String>,
}

/// Parses one value.
pub(crate) fn parse(bytes: &[u8]) -> Result<(Value, Repairs), RowError> {
    let text = std::str::from_utf8(bytes).map_err(|e| RowError::InvalidUtf8 { at: e.valid_up_to() + 1 })?;
    let error = match serde_json::from_str(text) {
        Ok(value) => return Ok((value, Repairs::default())),
        Err(error) => error,
    };
    let (repaired, repairs) = repair(text);
    if repairs != Repairs::default()
        && let Ok(value) = serde_json::from_str(&repaired)
    {
        return Ok((value, repairs));
    }
    if text.contains('\0') {
        return Err(RowError::BrokenJson {
            column: error.column(),
            detail: "the text holds NUL bytes".into(),
        });
    }
    let detail = json_detail(&error);
    Err(match error.classify() {
        Category::Eof => RowError::CutOff { detail },
        _ => RowError::BrokenJson { column: error.column(), detail },
    })
}

/// What the parser said, without the place, which the error names itself.
fn json_detail(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(detail, _)| detail.to_owned())
}

/// The text with what Python allows and JSON does not replaced.
fn repair(text: &str) -> (String, Repairs) {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len() + 16);
    let mut repairs = Repairs::default();
    // Top-level key, and the last string on the top level, which becomes one at a colon.
    let (mut key, mut last) = (String::new(), String::new());
    let mut depth = 0usize;
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'"' => {
                at += 1;
                out.push('"');
                let from = out.len();
                while at < bytes.len() && bytes[at] != b'"' {
                    let piece = at;
                    if bytes[at] != b'\\' {
                        while at < bytes.len() && !matches!(bytes[at], b'"' | b'\\') {
                            at += 1;
                        }
                        out.push_str(&text[piece..at]);
                        continue;
                    }
                    match (escape(bytes, at), escape(bytes, at + 6)) {
                        (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => {
                            at += 12;
                            out.push_str(&text[piece..at]);
                        }
                        (Some(0xd800..=0xdfff), _) => {
                            at += 6;
                            out.push_str("\\ufffd");
                            repairs.surrogates.insert(key.clone());
                        }
                        (Some(_), _) => {
                            at += 6;
                            out.push_str(&text[piece..at]);
                        }
                        // The backslash and one whole character.
                        (None, _) => {
                            at += 1;
                            at += text[at..].chars().next().map_or(0, char::len_utf8);
                            out.push_str(&text[piece..at]);
                        }
                    }
                }
                if depth == 1 {
                    last = out[from..].to_owned();
                }
                if at < bytes.len() {
                    at += 1;
                    out.push('"');
                }
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b':' if depth == 1 => key.clone_from(&last),
            b'-' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => {
                while at < bytes.len()
                    && matches!(bytes[at], b'-' | b'+' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z')
                {
                    at += 1;
                }
                let word = &text[start..at];
                let is_number = word.ends_with(|c: char| c.is_ascii_digit());
                let infinite = is_number && word.parse::<f64>().is_ok_and(f64::is_infinite);
                if infinite || matches!(word, "NaN" | "Infinity" | "-Infinity") {
                    out.push_str("null");
                    repairs.not_finite.insert(key.clone());
                } else {
                    out.push_str(word);
                }
                continue;
            }
            _ => {}
        }
        let length = text[at..].chars().next().map_or(1, char::len_utf8);
        out.push_str(&text[at..at + length]);
        at += length;
    }
    (out, repairs)
}

/// The code of `\uXXXX` at a place.
fn escape(bytes: &[u8], at: usize) -> Option<u32> {
    let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
    let digits = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u32::from_str_radix(digits, 16).ok()
}

/// The elements of one JSON array, one by one, so that a broken one costs itself alone.
pub(crate) struct Elements {
    bytes: Vec<u8>,
    at: usize,
    /// Line of `at`, from 1.
    line: u64,
    started: bool,
    closed: bool,
}

/// What stands next in an array.
pub(crate) enum Element {
    /// An element, and the line it starts on.
    Item(std::ops::Range<usize>, u64),
    /// The array is closed and nothing follows.
    End,
    /// The text ends inside the array; the element that is cut, and its line.
    Cut(std::ops::Range<usize>, u64),
    /// More text follows the array, on this line.
    More(u64),
}

impl Elements {
    /// `bytes` starts with white space and `[`.
    pub(crate) fn new(bytes: Vec<u8>) -> Elements {
        let mut elements = Elements { bytes, at: 0, line: 1, started: false, closed: false };
        elements.skip_blank();
        elements.at += 1;
        elements
    }

    pub(crate) fn bytes(&self, range: std::ops::Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    fn skip_blank(&mut self) {
        while let Some(byte) = self.bytes.get(self.at).filter(|b| b.is_ascii_whitespace()) {
            self.line += u64::from(*byte == b'\n');
            self.at += 1;
        }
    }

    pub(crate) fn next(&mut self) -> Element {
        if self.closed {
            return self.after();
        }
        let first = !std::mem::replace(&mut self.started, true);
        self.skip_blank();
        let (start, line) = (self.at, self.line);
        let mut depth = 0usize;
        let mut in_string = false;
        while let Some(byte) = self.bytes.get(self.at).copied() {
            self.line += u64::from(byte == b'\n');
            match (in_string, byte) {
                (true, b'\\') => self.at += 1,
                (_, b'"') => in_string = !in_string,
                (true, _) => {}
                (false, b'{' | b'[') => depth += 1,
                (false, b']') if depth == 0 => {
                    let end = self.at;
                    self.at += 1;
                    self.closed = true;
                    // `[]`: closed without an element.
                    return if end == start && first {
                        self.after()
                    } else {
                        Element::Item(start..end, line)
                    };
                }
                (false, b'}' | b']') => depth = depth.saturating_sub(1),
                (false, b',') if depth == 0 => {
                    self.at += 1;
                    return Element::Item(start..self.at - 1, line);
                }
                (false, _) => {}
            }
            self.at += 1;
        }
        let end = self.bytes.len();
        self.at = end;
        Element::Cut(start..end, line)
    }

    fn after(&mut self) -> Element {
        self.skip_blank();
        if self.at < self.bytes.len() { Element::More(self.line) } else { Element::End }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python's `json.loads` makes of the text, with `nan` and `inf` as null and half a pair as U+FFFD.
    #[track_caller]
    fn check(text: &str, expected: Value, not_finite: &[&str], surrogates: &[&str]) {
        let (value, repairs) = parse(text.as_bytes()).expect(text);
        assert_eq!(value, expected, "{text}");
        let keys = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&repairs.not_finite), not_finite, "{text}");
        assert_eq!(keys(&repairs.surrogates), surrogates, "{text}");
    }

    #[test]
    fn what_python_writes_is_read() {
        use serde_json::json;
        check(r#"{"a":1,"b":"NaN \ud83d\ude00"}"#, json!({"a": 1, "b": "NaN 😀"}), &[], &[]);
        check(
            r#"{"a":NaN,"b":[1,-Infinity],"c":Infinity}"#,
            json!({"a": null, "b": [1, null], "c": null}),
            &["a", "b", "c"],
            &[],
        );
        check(
            r#"{"a":1e999,"b":{"NaN":NaN,"x":"NaN"}}"#,
            json!({"a": null, "b": {"NaN": null, "x": "NaN"}}),
            &["a", "b"],
            &[],
        );
        check(
            r#"{"a":"x\ud83d y","b":"\ude00\ud83d\ude00"}"#,
            json!({"a": "x\u{fffd} y", "b": "\u{fffd}😀"}),
            &[],
            &["a", "b"],
        );
        check(
            r#"{"a":"\ud83d\ud83d\ude00","é\"":"\\ud83d"}"#,
            json!({"a": "\u{fffd}😀", "é\"": "\\ud83d"}),
            &[],
            &["a"],
        );
        check(r#"{"\ud83d":1}"#, json!({"\u{fffd}": 1}), &[], &[""]);
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for text in [
            "{\"a\": nan}",
            "{\"a\": NaN,}",
            "{\"a\": \"\\ud83\"}",
            "{\"a\": -NaN}",
            "{\"a\": 01}",
            "\u{0}\u{0}",
            "",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        assert_eq!(parse(b"{\"a\": \"\xff\"}"), Err(RowError::InvalidUtf8 { at: 8 }));
        assert!(matches!(parse(b"{\"a\": \"x"), Err(RowError::CutOff { .. })));
        let nul = parse(b"{\"a\": 1\0}").expect_err("NUL");
        assert!(nul.to_string().contains("NUL bytes"), "{nul}");
    }

    #[test]
    fn an_array_is_taken_apart() {
        let parts = |text: &str| {
            let mut elements = Elements::new(text.as_bytes().to_vec());
            let mut out = Vec::new();
            loop {
                match elements.next() {
                    Element::Item(range, line) => {
                        out.push(format!("{line}:{}", String::from_utf8_lossy(elements.bytes(range))))
                    }
                    Element::Cut(range, line) => {
                        out.push(format!("{line}:cut {}", String::from_utf8_lossy(elements.bytes(range))));
                        return out;
                    }
                    Element::More(line) => {
                        out.push(format!("{line}:more"));
                        return out;
                    }
                    Element::End => return out,
                }
            }
        };
        assert_eq!(parts(" []\n"), [""; 0]);
        assert_eq!(parts("[1]"), ["1:1"]);
        assert_eq!(parts("[{\"a\":[1,2]},\n\"],\\\"\"]\n"), ["1:{\"a\":[1,2]}", "2:\"],\\\"\""]);
        assert_eq!(parts("[1,]"), ["1:1", "1:"]);
        assert_eq!(parts("[1,\n{]"), ["1:1", "2:cut {]"]);
        assert_eq!(parts("[1]\n[2]"), ["1:1", "2:more"]);
    }
}
