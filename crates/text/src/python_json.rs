//! `tojson` as Hugging Face templates know it: Python's `json.dumps(ensure_ascii=False)`, without HTML escapes.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Values nested deeper than this are refused rather than recursed into.
const DEPTH: usize = 128;

/// How lists and objects are laid out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Style {
    /// Spaces per level; `None` for one line.
    pub(crate) indent: Option<usize>,
    /// Between items and between key and value; Python's defaults where `None`.
    pub(crate) separators: Option<(String, String)>,
    pub(crate) sort_keys: bool,
    pub(crate) ensure_ascii: bool,
}

/// `charge` is told of work before it is done, in steps or 64 bytes, and may refuse: a value of a few lists that hold
/// each other several times spells a text of any length.
pub(crate) fn dumps(
    value: &Value,
    style: &Style,
    charge: &dyn Fn(u64) -> Result<(), Error>,
) -> Result<String, Error> {
    let mut out = String::new();
    Writer { style, charge }.write(value, 0, &mut out)?;
    Ok(out)
}

struct Writer<'a> {
    style: &'a Style,
    charge: &'a dyn Fn(u64) -> Result<(), Error>,
}

fn refuse(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {detail}"))
}

impl Writer<'_> {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(refuse("the value is nested too deeply"));
        }
        (self.charge)(1)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&value.to_string()),
            ValueKind::String => self.write_str(value.as_str().unwrap_or_default(), out)?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items = self.items(value)?;
                self.write_items(&items, depth, out, ['[', ']'], |item, out| {
                    self.write(item, depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut keys = self.items(value)?;
                if self.style.sort_keys {
                    keys.sort();
                }
                self.write_items(&keys, depth, out, ['{', '}'], |key, out| {
                    self.write_str(&key.to_string(), out)?;
                    out.push_str(self.style.separators.as_ref().map_or(": ", |s| s.1.as_str()));
                    self.write(&value.get_item(key)?, depth + 1, out)
                })?;
            }
            ValueKind::Undefined => return Err(refuse("the value is undefined")),
            _ => return Err(refuse("the value has no JSON form")),
        }
        Ok(())
    }

    fn items(&self, value: &Value) -> Result<Vec<Value>, Error> {
        let mut items = Vec::new();
        for item in value.try_iter()? {
            (self.charge)(1)?;
            items.push(item);
        }
        Ok(items)
    }

    fn write_items(
        &self,
        items: &[Value],
        depth: usize,
        out: &mut String,
        brackets: [char; 2],
        mut write_item: impl FnMut(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(brackets[0]);
        let line = |level: usize, out: &mut String| -> Result<(), Error> {
            if let Some(indent) = self.style.indent {
                (self.charge)((indent * level) as u64 / 64)?;
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * level));
            }
            Ok(())
        };
        let comma = match (&self.style.separators, self.style.indent) {
            (Some(separators), _) => separators.0.as_str(),
            (None, Some(_)) => ",",
            (None, None) => ", ",
        };
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                (self.charge)(comma.len() as u64 / 64)?;
                out.push_str(comma);
            }
            line(depth + 1, out)?;
            write_item(item, out)?;
        }
        if !items.is_empty() {
            line(depth, out)?;
        }
        out.push(brackets[1]);
        Ok(())
    }

    fn write_str(&self, text: &str, out: &mut String) -> Result<(), Error> {
        (self.charge)(text.len() as u64 / 64)?;
        write_str(text, self.style, out);
        Ok(())
    }
}

fn write_str(text: &str, style: &Style, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 || (style.ensure_ascii && !c.is_ascii()) => {
                let mut units = [0u16; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_pythons() {
        let value = Value::from_pairs([
            ("b", Value::from_iter([1, 2])),
            ("a", Value::from("<é\"\n")),
            ("empty", Value::from_iter(Vec::<i32>::new())),
        ]);
        assert_eq!(
            dumps(&value, &Style::default(), &|_| Ok(())).expect("json"),
            "{\"b\": [1, 2], \"a\": \"<é\\\"\\n\", \"empty\": []}"
        );
        let style = Style { indent: Some(2), sort_keys: true, ensure_ascii: true, ..Style::default() };
        assert_eq!(
            dumps(&value, &style, &|_| Ok(())).expect("json"),
            "{\n  \"a\": \"<\\u00e9\\\"\\n\",\n  \"b\": [\n    1,\n    2\n  ],\n  \"empty\": []\n}"
        );
    }
}
