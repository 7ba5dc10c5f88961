//! `tojson` as Hugging Face templates know it: Python's `json.dumps(ensure_ascii=False)`, without HTML escapes.

use std::sync::Arc;

use crate::jinja::{Interp, JsonError, Value};

/// Values nested deeper than this are refused rather than recursed into.
const DEPTH: usize = 220;

/// How lists and objects are laid out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Style {
    /// What a level is indented by; `None` for one line.
    pub(crate) indent: Option<Arc<str>>,
    /// Between items and between key and value; Python's defaults where `None`.
    pub(crate) separators: Option<(Arc<str>, Arc<str>)>,
    pub(crate) sort_keys: bool,
    pub(crate) ensure_ascii: bool,
}

/// The JSON of a value. Work is taken from the rendering's budget before it is done: a value of a few lists that hold
/// each other several times spells a text of any length.
pub(crate) fn dumps(interp: &Interp<'_>, value: &Value, style: &Style) -> Result<String, JsonError> {
    let mut out = String::new();
    Writer { style, interp }.write(value, 0, &mut out)?;
    Ok(out)
}

struct Writer<'a, 't> {
    style: &'a Style,
    interp: &'a Interp<'t>,
}

impl Writer<'_, '_> {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), JsonError> {
        if depth > DEPTH {
            return Err(Value::json_error("the value is nested too deeply"));
        }
        self.interp.spend(1)?;
        match value {
            Value::None => out.push_str("null"),
            Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Value::Int(value) => out.push_str(&value.to_string()),
            Value::Float(value) => out.push_str(&float(*value)),
            Value::Str(text) | Value::Markup(text) => self.write_str(text, out)?,
            Value::List(items) | Value::Tuple(items) => {
                self.write_items(items.items(), depth, out, ['[', ']'], |item, out| {
                    self.write(item, depth + 1, out)
                })?;
            }
            Value::Dict(dict) => {
                let sorted;
                let entries = if self.style.sort_keys {
                    sorted = self.interp.sorted_entries(dict)?;
                    &sorted[..]
                } else {
                    dict.entries()
                };
                self.write_items(entries, depth, out, ['{', '}'], |(key, value), out| {
                    match key {
                        Value::Str(text) | Value::Markup(text) => self.write_str(text, out)?,
                        Value::None => out.push_str("\"null\""),
                        Value::Bool(value) => out.push_str(if *value { "\"true\"" } else { "\"false\"" }),
                        Value::Int(value) => out.push_str(&format!("\"{value}\"")),
                        Value::Float(value) => out.push_str(&format!("\"{}\"", float(*value))),
                        other => {
                            return Err(Value::json_error(&format!(
                                "keys must be str, int, float, bool or None, not {}",
                                other.type_name()
                            )));
                        }
                    }
                    out.push_str(self.style.separators.as_ref().map_or(": ", |s| &s.1));
                    self.write(value, depth + 1, out)
                })?;
            }
            other => {
                return Err(Value::json_error(&format!(
                    "Object of type {} is not JSON serializable",
                    other.type_name()
                )));
            }
        }
        Ok(())
    }

    fn write_items<T>(
        &self,
        items: &[T],
        depth: usize,
        out: &mut String,
        brackets: [char; 2],
        mut write_item: impl FnMut(&T, &mut String) -> Result<(), JsonError>,
    ) -> Result<(), JsonError> {
        out.push(brackets[0]);
        let line = |level: usize, out: &mut String| -> Result<(), JsonError> {
            if let Some(indent) = &self.style.indent {
                self.interp.spend_text(indent.len().saturating_mul(level))?;
                out.push('\n');
                (0..level).for_each(|_| out.push_str(indent));
            }
            Ok(())
        };
        let comma = match (&self.style.separators, &self.style.indent) {
            (Some(separators), _) => &separators.0,
            (None, Some(_)) => ",",
            (None, None) => ", ",
        };
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.interp.spend_text(comma.len())?;
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

    fn write_str(&self, text: &str, out: &mut String) -> Result<(), JsonError> {
        self.interp.spend_text(text.len())?;
        write_str(text, self.style.ensure_ascii, out);
        Ok(())
    }
}

fn float(value: f64) -> String {
    if value.is_nan() {
        "NaN".into()
    } else if value.is_infinite() {
        if value > 0.0 { "Infinity" } else { "-Infinity" }.into()
    } else {
        crate::jinja::float_repr(value)
    }
}

fn write_str(text: &str, ensure_ascii: bool, out: &mut String) {
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
            c if u32::from(c) < 0x20 || (ensure_ascii && !(' '..='~').contains(&c)) => {
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
