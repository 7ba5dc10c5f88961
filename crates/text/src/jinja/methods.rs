//! Attributes and methods of Python's strings, lists, objects and numbers.

use std::rc::Rc;

use super::eval::Interp;
use super::value::{Dict, Function, Value, View, char_count, equal};
use super::{Args, Result, fail, format, ops, type_error, unicode, value_error};

/// What `getattr` finds.
pub(super) enum Found {
    Method,
    Value(Value),
    /// There, but the sandbox hides it.
    Unsafe,
    /// There in Python, not here.
    Unsupported,
    Nothing,
}

const STR: [&str; 42] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
];

pub(super) fn find(value: &Value, name: &str) -> Found {
    let method = |known: bool| if known { Found::Method } else { Found::Nothing };
    match value {
        Value::Str(_) => match name {
            "zfill" => Found::Method,
            "encode" | "format_map" | "maketrans" | "translate" => Found::Unsupported,
            _ => method(STR.contains(&name)),
        },
        Value::Markup(_) => match name {
            "unescape" | "striptags" | "zfill" | "encode" | "format_map" | "maketrans" | "translate" => {
                Found::Unsupported
            }
            "isalnum" | "isalpha" | "isascii" | "isdecimal" | "isdigit" | "islower" | "isnumeric"
            | "isspace" | "isupper" | "startswith" | "endswith" | "find" | "rfind" | "count" | "index" => {
                Found::Method
            }
            _ if STR.contains(&name) => Found::Unsupported,
            _ => Found::Nothing,
        },
        Value::List(_) => match name {
            "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" => Found::Unsafe,
            _ => method(matches!(name, "copy" | "count" | "index")),
        },
        Value::Tuple(_) => method(matches!(name, "count" | "index")),
        Value::Dict(_) => match name {
            "clear" | "pop" | "popitem" | "setdefault" | "update" => Found::Unsafe,
            _ => method(matches!(name, "copy" | "fromkeys" | "get" | "items" | "keys" | "values")),
        },
        Value::View(..) => match name {
            "isdisjoint" | "mapping" => Found::Unsupported,
            _ => Found::Nothing,
        },
        Value::Range(start, stop, step) => match name {
            "start" => Found::Value(Value::Int(*start)),
            "stop" => Found::Value(Value::Int(*stop)),
            "step" => Found::Value(Value::Int(*step)),
            "count" | "index" => Found::Unsupported,
            _ => Found::Nothing,
        },
        Value::Bool(_) | Value::Int(_) => match name {
            "real" | "numerator" => Found::Value(Value::Int(value.as_int().unwrap_or(0))),
            "imag" => Found::Value(Value::Int(0)),
            "denominator" => Found::Value(Value::Int(1)),
            "bit_length" | "bit_count" | "conjugate" => Found::Method,
            "as_integer_ratio" | "from_bytes" | "to_bytes" | "is_integer" => Found::Unsupported,
            _ => Found::Nothing,
        },
        Value::Float(n) => match name {
            "real" => Found::Value(Value::Float(*n)),
            "imag" => Found::Value(Value::Float(0.0)),
            "is_integer" | "conjugate" => Found::Method,
            "as_integer_ratio" | "fromhex" | "hex" => Found::Unsupported,
            _ => Found::Nothing,
        },
        Value::Cycler(_) => method(matches!(name, "next" | "reset")),
        Value::Function(Function::Dict) => method(name == "fromkeys"),
        Value::Iter(_) => match name {
            "close" | "send" | "throw" => Found::Unsupported,
            _ => Found::Nothing,
        },
        _ => Found::Nothing,
    }
}

/// Calls a method that [`find`] found.
pub(super) fn call(interp: &mut Interp<'_>, value: &Value, name: &str, args: Args) -> Result<Value> {
    match value {
        Value::Str(text) | Value::Markup(text) => {
            let text = text.clone();
            interp.spend_text(text.len())?;
            call_str(interp, &text, name, args)
        }
        Value::List(items) | Value::Tuple(items) => match name {
            "copy" => {
                args.none("copy")?;
                Ok(value.clone())
            }
            "count" => {
                let item = needed(args, "count")?;
                interp.spend(items.items.len() as u64)?;
                let mut count = 0;
                for other in &items.items {
                    count += i128::from(equal(other, &item)?);
                }
                Ok(Value::Int(count))
            }
            _ => {
                let [item, start, stop] = args.bind("index", ["VALUE", "START", "STOP"])?;
                let item = item.ok_or_else(|| type_error("index expected at least 1 argument, got 0"))?;
                let (start, stop) = window(start, stop, items.items.len())?;
                for (i, other) in items.items.iter().enumerate().take(stop).skip(start) {
                    interp.spend(1)?;
                    if equal(other, &item)? {
                        return Ok(Value::Int(i as i128));
                    }
                }
                Err(value_error("the value is not in the list"))
            }
        },
        Value::Dict(dict) => call_dict(interp, value, dict, name, args),
        Value::Function(_) => from_keys(interp, args),
        Value::Bool(_) | Value::Int(_) => {
            args.none(name)?;
            let n = value.as_int().unwrap_or(0);
            Ok(Value::Int(match name {
                "bit_length" => i128::from(128 - n.unsigned_abs().leading_zeros()),
                "bit_count" => n.unsigned_abs().count_ones().into(),
                _ => n,
            }))
        }
        Value::Float(n) => {
            args.none(name)?;
            Ok(match name {
                "is_integer" => Value::Bool(n.is_finite() && n.fract() == 0.0),
                _ => Value::Float(*n),
            })
        }
        Value::Cycler(cycler) => {
            args.none(name)?;
            let at = cycler.at.get();
            if name == "reset" {
                cycler.at.set(0);
                return Ok(Value::None);
            }
            cycler.at.set((at + 1) % cycler.items.len());
            Ok(cycler.items[at].clone())
        }
        other => Err(type_error(format!("'{}' object has no method '{name}'", other.type_name()))),
    }
}

fn needed(args: Args, what: &str) -> Result<Value> {
    let [value] = args.bind(what, ["VALUE"])?;
    value.ok_or_else(|| type_error(format!("{what}() takes exactly one argument (0 given)")))
}

fn from_keys(interp: &mut Interp<'_>, args: Args) -> Result<Value> {
    let [keys, value] = args.bind("fromkeys", ["ITERABLE", "VALUE"])?;
    let keys = keys.ok_or_else(|| type_error("fromkeys expected at least 1 argument, got 0"))?;
    let value = value.unwrap_or(Value::None);
    let keys = interp.items(&keys)?;
    Ok(Value::dict(Dict::build(keys.into_iter().map(|key| (key, value.clone())), interp)?))
}

fn call_dict(
    interp: &mut Interp<'_>,
    value: &Value,
    dict: &Rc<Dict>,
    name: &str,
    args: Args,
) -> Result<Value> {
    let view = |args: Args, view| {
        args.none(name)?;
        Ok(Value::View(view, dict.clone()))
    };
    match name {
        "get" => {
            let [key, default] = args.bind("get", ["KEY", "DEFAULT"])?;
            let key = key.ok_or_else(|| type_error("get expected at least 1 argument, got 0"))?;
            Ok(match dict.get(&key)? {
                Some(found) => found.clone(),
                None => default.unwrap_or(Value::None),
            })
        }
        "items" => view(args, View::Items),
        "keys" => view(args, View::Keys),
        "values" => view(args, View::Values),
        "fromkeys" => from_keys(interp, args),
        _ => {
            args.none(name)?;
            Ok(value.clone())
        }
    }
}

fn index(value: &Value) -> Result<i128> {
    value.as_int().ok_or_else(|| {
        type_error(format!("'{}' object cannot be interpreted as an integer", value.type_name()))
    })
}

/// Start and end of a search, by the rules of slices.
fn window(start: Option<Value>, stop: Option<Value>, len: usize) -> Result<(usize, usize)> {
    let len = len as i128;
    let place = |bound: Option<Value>, default: i128| -> Result<i128> {
        Ok(match bound {
            None | Some(Value::None) => default,
            Some(value) => {
                let at = value.as_int().ok_or_else(|| {
                    type_error("slice indices must be integers or None or have an __index__ method")
                })?;
                if at < 0 { (at.saturating_add(len)).max(0) } else { at }
            }
        })
    };
    let start = place(start, 0)?;
    let stop = place(stop, len)?.min(len);
    // A start beyond the end finds nothing, not even the empty text.
    Ok((usize::try_from(start).unwrap_or(usize::MAX), stop as usize))
}

fn want_str(value: &Value, what: &str) -> Result<std::sync::Arc<str>> {
    match value {
        Value::Str(text) | Value::Markup(text) => Ok(text.clone()),
        Value::Undefined(message) if what != "join" => {
            // Undefined is no `str`, so Python names the type.
            Err(type_error(format!("{what}: must be str, not Undefined ({message})")))
        }
        other => Err(type_error(format!("{what}: must be str, not {}", other.type_name()))),
    }
}

/// Characters to strip; `None` for white space.
fn strip_chars(args: Args, what: &str) -> Result<Option<std::sync::Arc<str>>> {
    let [chars] = args.bind(what, ["CHARS"])?;
    match chars {
        None | Some(Value::None) => Ok(None),
        Some(value) => Ok(Some(want_str(&value, what)?)),
    }
}

pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let test = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => unicode::space(c),
    };
    let text = if left { text.trim_start_matches(test) } else { text };
    if right { text.trim_end_matches(test) } else { text }
}

/// Lines without their ends, by Python's list of line ends.
pub(super) fn split_lines(text: &str, keep: bool) -> Vec<&str> {
    let mut out = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((i, c)) = chars.next() {
        let ends = matches!(
            c,
            '\n' | '\r'
                | '\u{b}'
                | '\u{c}'
                | '\u{1c}'
                | '\u{1d}'
                | '\u{1e}'
                | '\u{85}'
                | '\u{2028}'
                | '\u{2029}'
        );
        if !ends {
            continue;
        }
        let mut end = i + c.len_utf8();
        if c == '\r' && matches!(chars.peek(), Some((_, '\n'))) {
            chars.next();
            end += 1;
        }
        out.push(&text[start..if keep { end } else { i }]);
        start = end;
    }
    if start < text.len() {
        out.push(&text[start..]);
    }
    out
}

pub(super) fn capitalize(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    if let Some(first) = chars.next() {
        unicode::push_title(first, &mut out);
        let lower = text.to_lowercase();
        // Lower case of the rest in its context (final sigma).
        let first_lower: usize = first.to_lowercase().map(char::len_utf8).sum();
        out.push_str(lower.get(first_lower..).unwrap_or_default());
    }
    out
}

fn cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || unicode::title_cased(c)
}

/// Lower case of the character at `at`; a sigma at the end of a word has a form of its own.
fn push_lower(text: &str, at: usize, c: char, out: &mut String) {
    let letter = |c: &char| !matches!(c, '\'' | '.' | ':' | '\u{b7}' | '\u{300}'..='\u{36f}');
    if c == 'Σ' {
        let before = text[..at].chars().rev().find(letter).is_some_and(cased);
        let after = text[at + c.len_utf8()..].chars().find(letter).is_some_and(cased);
        out.push(if before && !after { 'ς' } else { 'σ' });
    } else {
        out.extend(c.to_lowercase());
    }
}

fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for (at, c) in text.char_indices() {
        if inside {
            push_lower(text, at, c, &mut out);
        } else {
            unicode::push_title(c, &mut out);
        }
        inside = cased(c);
    }
    out
}

fn is_title(text: &str) -> bool {
    let mut any = false;
    let mut inside = false;
    for c in text.chars() {
        if c.is_uppercase() || unicode::title_cased(c) {
            if inside {
                return false;
            }
            any = true;
            inside = true;
        } else if c.is_lowercase() {
            if !inside {
                return false;
            }
            any = true;
        } else {
            inside = false;
        }
    }
    any
}

pub(super) fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase) && !text.chars().any(|c| c.is_uppercase() || unicode::title_cased(c))
}

pub(super) fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase) && !text.chars().any(|c| c.is_lowercase() || unicode::title_cased(c))
}

fn justify(interp: &Interp<'_>, text: &str, args: Args, what: &str) -> Result<Value> {
    let [width, fill] = args.bind(what, ["WIDTH", "FILL"])?;
    let width = width.ok_or_else(|| type_error(format!("{what}: the width is missing")))?;
    let width = index(&width)?;
    let fill = match fill {
        None => ' ',
        Some(value) => {
            let text = want_str(&value, what)?;
            let mut chars = text.chars();
            match (chars.next(), chars.next()) {
                (Some(c), None) => c,
                _ => return Err(type_error("The fill character must be exactly one character long")),
            }
        }
    };
    Ok(Value::str(pad(interp, text, width, fill, what)?))
}

/// `ljust`, `rjust` and `center`.
pub(super) fn pad(interp: &Interp<'_>, text: &str, width: i128, fill: char, what: &str) -> Result<String> {
    let length = char_count(text) as i128;
    let room = (width - length).max(0);
    interp.spend_text(usize::try_from(room).unwrap_or(usize::MAX).saturating_mul(4))?;
    let left = match what {
        "ljust" => 0,
        "rjust" => room,
        // Python puts the odd one to the left where the width is odd.
        _ => room / 2 + (room & width & 1),
    };
    let fill = |n: i128| std::iter::repeat_n(fill, n as usize);
    let mut out: String = fill(left).collect();
    out.push_str(text);
    out.extend(fill(room - left));
    Ok(out)
}

/// `replace(old, new, count)`; negative counts are all.
pub(super) fn replace(interp: &Interp<'_>, text: &str, old: &str, new: &str, count: i128) -> Result<String> {
    let limit = if count < 0 { usize::MAX } else { usize::try_from(count).unwrap_or(usize::MAX) };
    let places = if old.is_empty() { char_count(text) + 1 } else { text.matches(old).count() }.min(limit);
    interp.spend_text(text.len() + places.saturating_mul(new.len()))?;
    // Rust, too, finds the empty text before each character and at the end.
    Ok(text.replacen(old, new, limit))
}

/// Splits at a separator, at most `limit` times, from the left or from the right.
fn split_at<'a>(text: &'a str, sep: &str, limit: usize, right: bool) -> Vec<&'a str> {
    if right {
        let mut parts: Vec<&str> = text.rsplitn(limit.saturating_add(1), sep).collect();
        parts.reverse();
        parts
    } else {
        text.splitn(limit.saturating_add(1), sep).collect()
    }
}

/// Splits at runs of white space.
fn split_space(text: &str, limit: usize, right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = strip(text, None, true, true);
    while !rest.is_empty() {
        if parts.len() == limit {
            parts.push(rest);
            break;
        }
        let cut = if right { rest.rfind(unicode::space) } else { rest.find(unicode::space) };
        let Some(at) = cut else {
            parts.push(rest);
            break;
        };
        if right {
            let width = rest[at..].chars().next().map_or(1, char::len_utf8);
            parts.push(&rest[at + width..]);
            rest = strip(&rest[..at], None, false, true);
        } else {
            parts.push(&rest[..at]);
            rest = strip(&rest[at..], None, true, false);
        }
    }
    // What is over keeps its outer white space only on the side that was not walked.
    if right {
        if parts.len() > limit
            && let Some(last) = parts.last_mut()
        {
            *last = keep_left(text, last);
        }
        parts.reverse();
    } else if parts.len() > limit
        && let Some(last) = parts.last_mut()
    {
        *last = keep_right(text, last);
    }
    parts
}

/// The tail of `text` that begins where `part` begins.
fn keep_right<'a>(text: &'a str, part: &str) -> &'a str {
    let start = part.as_ptr() as usize - text.as_ptr() as usize;
    &text[start..]
}

/// The head of `text` that ends where `part` ends.
fn keep_left<'a>(text: &'a str, part: &str) -> &'a str {
    let end = part.as_ptr() as usize - text.as_ptr() as usize + part.len();
    &text[..end]
}

fn strs(interp: &Interp<'_>, parts: Vec<&str>) -> Result<Value> {
    interp.spend(parts.len() as u64)?;
    Value::list(parts.into_iter().map(Value::str).collect())
}

/// Byte borders of the characters `start..stop`; `None` if `start` is beyond the end.
fn part_of(text: &str, start: usize, stop: usize) -> Option<(usize, usize)> {
    let count = char_count(text);
    if start > count {
        return None;
    }
    let byte = |at: usize| {
        if text.is_ascii() { at } else { text.char_indices().nth(at).map_or(text.len(), |(i, _)| i) }
    };
    let (from, to) = (byte(start), byte(stop.min(count)));
    (from <= to).then_some((from, to))
}

fn call_str(interp: &mut Interp<'_>, text: &str, name: &str, args: Args) -> Result<Value> {
    let bool = |args: Args, test: &dyn Fn(&str) -> bool| {
        args.none(name)?;
        Ok(Value::Bool(test(text)))
    };
    let all = |args: Args, test: fn(char) -> bool| {
        args.none(name)?;
        Ok(Value::Bool(!text.is_empty() && text.chars().all(test)))
    };
    let made = |args: Args, make: &dyn Fn(&str) -> String| {
        args.none(name)?;
        Ok(Value::str(make(text)))
    };
    match name {
        "strip" => Ok(Value::str(strip(text, strip_chars(args, name)?.as_deref(), true, true))),
        "lstrip" => Ok(Value::str(strip(text, strip_chars(args, name)?.as_deref(), true, false))),
        "rstrip" => Ok(Value::str(strip(text, strip_chars(args, name)?.as_deref(), false, true))),
        "lower" => made(args, &str::to_lowercase),
        "upper" => made(args, &str::to_uppercase),
        "title" => made(args, &title),
        "capitalize" => made(args, &capitalize),
        "casefold" => made(args, &|text| {
            let mut out = String::with_capacity(text.len());
            text.chars().for_each(|c| unicode::push_folded(c, &mut out));
            out
        }),
        "swapcase" => made(args, &|text| {
            let mut out = String::with_capacity(text.len());
            for (at, c) in text.char_indices() {
                if c.is_uppercase() {
                    push_lower(text, at, c, &mut out);
                } else if c.is_lowercase() {
                    out.extend(c.to_uppercase());
                } else {
                    out.push(c);
                }
            }
            out
        }),
        "isalnum" => all(args, unicode::word),
        "isalpha" => all(args, unicode::alpha),
        "isdecimal" => all(args, unicode::decimal),
        "isdigit" => all(args, unicode::digit),
        "isnumeric" => all(args, unicode::numeric),
        "isspace" => all(args, unicode::space),
        "isascii" => bool(args, &str::is_ascii),
        "isprintable" => bool(args, &|text| text.chars().all(unicode::printable)),
        "islower" => bool(args, &is_lower),
        "isupper" => bool(args, &is_upper),
        "istitle" => bool(args, &is_title),
        "isidentifier" => {
            if !text.is_ascii() {
                return Err(fail("isidentifier of text beyond ASCII is not supported"));
            }
            bool(args, &|text| {
                unicode::identifier(text) && text.chars().all(|c| c == '_' || unicode::word(c))
            })
        }
        "startswith" | "endswith" => {
            let [part, start, stop] = args.bind(name, ["PART", "START", "STOP"])?;
            let part =
                part.ok_or_else(|| type_error(format!("{name} expected at least 1 argument, got 0")))?;
            let (start, stop) = window(start, stop, char_count(text))?;
            let Some((from, to)) = part_of(text, start, stop) else { return Ok(Value::Bool(false)) };
            let inside = &text[from..to];
            let matches = |part: &str| {
                if name == "startswith" { inside.starts_with(part) } else { inside.ends_with(part) }
            };
            match &part {
                Value::Tuple(items) => {
                    interp.spend(items.items.len() as u64)?;
                    for item in &items.items {
                        if matches(&want_str(item, name)?) {
                            return Ok(Value::Bool(true));
                        }
                    }
                    Ok(Value::Bool(false))
                }
                Value::Str(part) | Value::Markup(part) => Ok(Value::Bool(matches(part))),
                other => Err(type_error(format!(
                    "{name} first arg must be str or a tuple of str, not {}",
                    other.type_name()
                ))),
            }
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let [part, start, stop] = args.bind(name, ["PART", "START", "STOP"])?;
            let part =
                part.ok_or_else(|| type_error(format!("{name}() takes at least 1 argument (0 given)")))?;
            let part = want_str(&part, name)?;
            let (start, stop) = window(start, stop, char_count(text))?;
            let Some((from, to)) = part_of(text, start, stop) else {
                return match name {
                    "count" => Ok(Value::Int(0)),
                    "find" | "rfind" => Ok(Value::Int(-1)),
                    _ => Err(value_error("substring not found")),
                };
            };
            let inside = &text[from..to];
            if name == "count" {
                let count =
                    if part.is_empty() { char_count(inside) + 1 } else { inside.matches(&*part).count() };
                return Ok(Value::Int(count as i128));
            }
            let at = if name.starts_with('r') { inside.rfind(&*part) } else { inside.find(&*part) };
            match at {
                Some(at) => Ok(Value::Int(char_count(&text[..from + at]) as i128)),
                None if name.ends_with("find") => Ok(Value::Int(-1)),
                None => Err(value_error("substring not found")),
            }
        }
        "split" | "rsplit" => {
            let [sep, limit] = args.bind(name, ["sep", "maxsplit"])?;
            let limit = match limit {
                Some(value) => index(&value)?,
                None => -1,
            };
            let limit = if limit < 0 { usize::MAX } else { usize::try_from(limit).unwrap_or(usize::MAX) };
            let right = name == "rsplit";
            match sep {
                None | Some(Value::None) => strs(interp, split_space(text, limit, right)),
                Some(sep) => {
                    let sep = want_str(&sep, name)?;
                    if sep.is_empty() {
                        return Err(value_error("empty separator"));
                    }
                    strs(interp, split_at(text, &sep, limit, right))
                }
            }
        }
        "partition" | "rpartition" => {
            let sep = want_str(&needed(args, name)?, name)?;
            if sep.is_empty() {
                return Err(value_error("empty separator"));
            }
            let right = name == "rpartition";
            let at = if right { text.rfind(&*sep) } else { text.find(&*sep) };
            let (a, b, c) = match at {
                Some(at) => (&text[..at], &*sep, &text[at + sep.len()..]),
                None if right => ("", "", text),
                None => (text, "", ""),
            };
            Value::tuple(vec![Value::str(a), Value::str(b), Value::str(c)])
        }
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"])?;
            strs(interp, split_lines(text, keep.is_some_and(|keep| keep.truth())))
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["OLD", "NEW", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return Err(type_error("replace expected at least 2 arguments"));
            };
            let (old, new) = (want_str(&old, name)?, want_str(&new, name)?);
            let count = match count {
                Some(value) => index(&value)?,
                None => -1,
            };
            Ok(Value::str(replace(interp, text, &old, &new, count)?))
        }
        "removeprefix" => {
            let part = want_str(&needed(args, name)?, name)?;
            Ok(Value::str(text.strip_prefix(&*part).unwrap_or(text)))
        }
        "removesuffix" => {
            let part = want_str(&needed(args, name)?, name)?;
            Ok(Value::str(text.strip_suffix(&*part).unwrap_or(text)))
        }
        "join" => {
            let items = needed(args, name)?;
            if !items.is_iterable() {
                return Err(type_error("can only join an iterable"));
            }
            let mut out = String::new();
            for (i, item) in interp.items(&items)?.iter().enumerate() {
                let Some(item) = item.as_str() else {
                    return Err(type_error(format!(
                        "sequence item {i}: expected str instance, {} found",
                        item.type_name()
                    )));
                };
                interp.spend_text(item.len() + text.len())?;
                if i > 0 {
                    out.push_str(text);
                }
                out.push_str(item);
            }
            Ok(Value::str(out))
        }
        "ljust" | "rjust" | "center" => justify(interp, text, args, name),
        "zfill" => {
            let width = index(&needed(args, name)?)?;
            let room = (width - char_count(text) as i128).max(0);
            interp.spend_text(usize::try_from(room).unwrap_or(usize::MAX))?;
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => (&text[..1], digits),
                None => ("", text),
            };
            Ok(Value::str(format!("{sign}{}{digits}", "0".repeat(room as usize))))
        }
        "expandtabs" => {
            let [size] = args.bind(name, ["tabsize"])?;
            let size = match size {
                Some(value) => index(&value)?.max(0),
                None => 8,
            };
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            interp.spend_text(text.matches('\t').count().saturating_mul(size))?;
            let mut out = String::new();
            let mut column = 0;
            for c in text.chars() {
                match c {
                    '\t' if size > 0 => {
                        let room = size - column % size;
                        out.extend(std::iter::repeat_n(' ', room));
                        column += room;
                    }
                    '\t' => {}
                    c => {
                        out.push(c);
                        column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
                    }
                }
            }
            Ok(Value::str(out))
        }
        "format" => Ok(Value::str(format::str_format(interp, text, &args)?)),
        other => Err(fail(format!("the string method `{other}` is not supported here"))),
    }
}

/// The characters of a text in reverse.
pub(super) fn reversed(interp: &Interp<'_>, text: &str) -> Result<Value> {
    ops::slice(interp, &Value::str(text), [None, None, Some(-1)])
}
