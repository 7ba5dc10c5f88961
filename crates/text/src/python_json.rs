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

pub(crate) fn dumps(value: &Value, style: &Style) -> Result<String, Error> {
    let mut out = String::new();
    write(value, style, 0, &mut out)?;
    Ok(out)
}

fn refuse(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {detail}"))
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > DEPTH {
        return Err(refuse("the value is nested too deeply"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => write_str(value.as_str().unwrap_or_default(), style, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(&items, style, depth, out, ['[', ']'], |item, out| {
                write(item, style, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            write_items(&keys, style, depth, out, ['{', '}'], |key, out| {
                write_str(&key.to_string(), style, out);
                out.push_str(style.separators.as_ref().map_or(": ", |s| s.1.as_str()));
                write(&value.get_item(key)?, style, depth + 1, out)
            })?;
        }
        ValueKind::Undefined => return Err(refuse("the value is undefined")),
        _ => return Err(refuse("the value has no JSON form")),
    }
    Ok(())
}

fn write_items(
    items: &[Value],
    style: &Style,
    depth: usize,
    out: &mut String,
    brackets: [char; 2],
    mut item_fn: impl FnMut(&Value, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    out.push(brackets[0]);
    let line = |level: usize, out: &mut String| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * level));
        }
    };
    let comma = match (&style.separators, style.indent) {
        (Some(separators), _) => separators.0.as_str(),
        (None, Some(_)) => ",",
        (None, None) => ", ",
    };
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push_str(comma);
        }
        line(depth + 1, out);
        item_fn(item, out)?;
    }
    if !items.is_empty() {
        line(depth, out);
    }
    out.push(brackets[1]);
    Ok(())
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
            dumps(&value, &Style::default()).expect("json"),
            "{\"b\": [1, 2], \"a\": \"<é\\\"\\n\", \"empty\": []}"
        );
        let style = Style { indent: Some(2), sort_keys: true, ensure_ascii: true, ..Style::default() };
        assert_eq!(
            dumps(&value, &style).expect("json"),
            "{\n  \"a\": \"<\\u00e9\\\"\\n\",\n  \"b\": [\n    1,\n    2\n  ],\n  \"empty\": []\n}"
        );
    }
}
