//! Numbers as text, `%` formatting and `str.format`.

use super::eval::Interp;
use super::value::{Value, char_count};
use super::{Args, Error, Result, fail, type_error, unicode, value_error};

/// `repr(float)`: the shortest digits that read back, in Python's layout.
pub(crate) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let (negative, digits, exponent) = shortest(value);
    let mut out = String::from(if negative { "-" } else { "" });
    if (-4..16).contains(&exponent) {
        plain(&digits, exponent, &mut out);
        if !out.contains('.') {
            out.push_str(".0");
        }
    } else {
        scientific(&digits, exponent, &mut out);
    }
    out
}

/// Sign, shortest digits and decimal exponent of the first digit.
fn shortest(value: f64) -> (bool, String, i32) {
    let text = format!("{:e}", value.abs());
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    (value.is_sign_negative(), digits.replace('.', ""), exponent.parse().unwrap_or(0))
}

fn plain(digits: &str, exponent: i32, out: &mut String) {
    let point = exponent + 1;
    if point <= 0 {
        out.push_str("0.");
        out.extend(std::iter::repeat_n('0', (-point) as usize));
        out.push_str(digits);
    } else if digits.len() as i32 <= point {
        out.push_str(digits);
        out.extend(std::iter::repeat_n('0', point as usize - digits.len()));
    } else {
        out.push_str(&digits[..point as usize]);
        out.push('.');
        out.push_str(&digits[point as usize..]);
    }
}

fn scientific(digits: &str, exponent: i32, out: &mut String) {
    out.push_str(&digits[..1]);
    if digits.len() > 1 {
        out.push('.');
        out.push_str(&digits[1..]);
    }
    out.push_str(&format!("e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()));
}

/// A finite float without its sign as `e`, `f` or `g` with a precision; `alternate` keeps point and zeros.
fn float_digits(value: f64, kind: char, precision: usize, alternate: bool) -> String {
    let value = value.abs();
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return "inf".into();
    }
    match kind {
        'f' => {
            let mut text = format!("{value:.precision$}");
            if alternate && precision == 0 {
                text.push('.');
            }
            text
        }
        'e' => {
            let text = format!("{value:.precision$e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let exponent: i32 = exponent.parse().unwrap_or(0);
            let point = if alternate && precision == 0 { "." } else { "" };
            format!("{digits}{point}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => {
            let precision = precision.max(1);
            let text = format!("{value:.*e}", precision - 1);
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let exponent: i32 = exponent.parse().unwrap_or(0);
            let mut digits = digits.replace('.', "");
            if !alternate {
                let kept = digits.trim_end_matches('0').len().max(1);
                digits.truncate(kept);
            }
            let mut out = String::new();
            if exponent < -4 || exponent >= precision as i32 {
                scientific(&digits, exponent, &mut out);
            } else {
                plain(&digits, exponent, &mut out);
                if alternate && !out.contains('.') {
                    out.push('.');
                }
            }
            out
        }
    }
}

pub(super) fn escape_html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

/// Widths and precisions beyond this are refused.
const MAX_WIDTH: usize = 1 << 20;

fn number_of(value: &Value) -> Result<f64> {
    match (value, value.as_int()) {
        (_, Some(n)) => Ok(n as f64),
        (Value::Float(n), _) => Ok(*n),
        _ => Err(type_error(format!("must be real number, not {}", value.type_name()))),
    }
}

/// `ascii(text)`: characters beyond ASCII as escapes.
fn ascii(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match u32::from(c) {
            0..=0x7f => out.push(c),
            code @ 0x80..=0xff => out.push_str(&format!("\\x{code:02x}")),
            code @ 0x100..=0xffff => out.push_str(&format!("\\u{code:04x}")),
            code => out.push_str(&format!("\\U{code:08x}")),
        }
    }
    out
}

fn radix(n: u128, radix: u32, upper: bool) -> String {
    match (radix, upper) {
        (2, _) => format!("{n:b}"),
        (8, _) => format!("{n:o}"),
        (16, false) => format!("{n:x}"),
        (16, true) => format!("{n:X}"),
        _ => n.to_string(),
    }
}

/// `text % args`.
pub(super) fn printf(interp: &mut Interp<'_>, text: &str, args: &Value) -> Result<String> {
    interp.spend_text(text.len())?;
    let single = [args.clone()];
    let (values, mapping): (&[Value], Option<&Value>) = match args {
        Value::Tuple(items) => (&items.items, None),
        // Whatever has `__getitem__` and is no tuple or string may be a mapping.
        Value::Dict(_) | Value::List(_) | Value::Range(..) | Value::Undefined(_) => (&single, Some(args)),
        _ => (&single, None),
    };
    let mut used = 0;
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    let mut by_key = false;
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let incomplete = || value_error("incomplete format");
        let mut keyed = None;
        if chars.peek() == Some(&'(') {
            let mapping = mapping.ok_or_else(|| type_error("format requires a mapping"))?;
            chars.next();
            let mut key = String::new();
            let mut depth = 1;
            loop {
                match chars.next() {
                    None => return Err(value_error("incomplete format key")),
                    Some(')') if depth == 1 => break,
                    Some(c) => {
                        depth += i32::from(c == '(') - i32::from(c == ')');
                        key.push(c);
                    }
                }
            }
            keyed = match mapping {
                Value::Dict(dict) => Some(
                    dict.get_str(&key).cloned().ok_or_else(|| value_error(format!("KeyError: '{key}'")))?,
                ),
                _ => return Err(type_error("list indices must be integers or slices, not str")),
            };
            by_key = true;
        }
        let take = |used: &mut usize| -> Result<Value> {
            let value = values.get(*used).cloned();
            *used += 1;
            value.ok_or_else(|| type_error("not enough arguments for format string"))
        };
        let (mut left, mut plus, mut blank, mut alternate, mut zero) = (false, false, false, false, false);
        loop {
            match chars.peek() {
                Some('-') => left = true,
                Some('+') => plus = true,
                Some(' ') => blank = true,
                Some('#') => alternate = true,
                Some('0') => zero = true,
                _ => break,
            }
            chars.next();
        }
        let mut width = 0;
        if chars.peek() == Some(&'*') {
            chars.next();
            let n = take(&mut used)?.as_int().ok_or_else(|| type_error("* wants int"))?;
            left |= n < 0;
            width = usize::try_from(n.unsigned_abs()).unwrap_or(usize::MAX);
        } else {
            while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
                width = width.saturating_mul(10).saturating_add(digit as usize);
                chars.next();
            }
        }
        let mut precision = None;
        if chars.peek() == Some(&'.') {
            chars.next();
            let mut n = 0usize;
            if chars.peek() == Some(&'*') {
                chars.next();
                let given = take(&mut used)?.as_int().ok_or_else(|| type_error("* wants int"))?;
                n = usize::try_from(given.max(0)).unwrap_or(usize::MAX);
            } else {
                while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
                    n = n.saturating_mul(10).saturating_add(digit as usize);
                    chars.next();
                }
            }
            precision = Some(n);
        }
        if width > MAX_WIDTH || precision.is_some_and(|p| p > MAX_WIDTH) {
            return Err(fail("a format is too wide"));
        }
        if matches!(chars.peek(), Some('h' | 'l' | 'L')) {
            chars.next();
        }
        let kind = chars.next().ok_or_else(incomplete)?;
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match keyed {
            Some(value) => value,
            None => take(&mut used)?,
        };
        interp.spend_text(width.max(precision.unwrap_or(0)))?;
        let sign_of = |negative: bool| match (negative, plus, blank) {
            (true, ..) => "-",
            (false, true, _) => "+",
            (false, false, true) => " ",
            (false, false, false) => "",
        };
        let mut sign = "";
        let mut numeric = false;
        let body = match kind {
            's' | 'r' | 'a' => {
                let mut text = String::new();
                if kind == 's' {
                    value.print(&mut text, interp)?
                } else {
                    value.repr(&mut text, interp)?
                }
                if kind == 'a' {
                    text = ascii(&text);
                }
                match precision {
                    Some(n) => text.chars().take(n).collect(),
                    None => text,
                }
            }
            'c' => match (&value, value.as_int()) {
                (_, Some(n)) => u32::try_from(n)
                    .ok()
                    .and_then(char::from_u32)
                    .ok_or_else(|| value_error("%c arg not in range(0x110000)"))?
                    .to_string(),
                (Value::Str(text), _) if char_count(text) == 1 => text.to_string(),
                _ => return Err(type_error("%c requires int or char")),
            },
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
                numeric = true;
                let n = match (&value, value.as_int()) {
                    (_, Some(n)) => n,
                    (Value::Float(n), _) if matches!(kind, 'd' | 'i' | 'u') => whole(*n)?,
                    (Value::Undefined(message), _) => return Err(super::value::undefined_error(message)),
                    _ => {
                        return Err(type_error(format!(
                            "%{kind} format: a number is required, not {}",
                            value.type_name()
                        )));
                    }
                };
                sign = sign_of(n < 0);
                let (base, prefix) = match kind {
                    'x' => (16, "0x"),
                    'X' => (16, "0X"),
                    'o' => (8, "0o"),
                    _ => (10, ""),
                };
                let mut digits = radix(n.unsigned_abs(), base, kind == 'X');
                if let Some(precision) = precision {
                    digits = format!("{}{digits}", "0".repeat(precision.saturating_sub(digits.len())));
                }
                if alternate && !prefix.is_empty() {
                    if zero && !left {
                        let room = width.saturating_sub(sign.len() + prefix.len());
                        digits = format!("{}{digits}", "0".repeat(room.saturating_sub(digits.len())));
                    }
                    format!("{prefix}{digits}")
                } else {
                    digits
                }
            }
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                numeric = true;
                if let Value::Undefined(message) = &value {
                    return Err(super::value::undefined_error(message));
                }
                let n = number_of(&value)?;
                sign = sign_of(n.is_sign_negative() && !n.is_nan());
                let text = float_digits(n, kind.to_ascii_lowercase(), precision.unwrap_or(6), alternate);
                // No zeros before `inf`.
                if kind.is_ascii_uppercase() { text.to_uppercase() } else { text }
            }
            other => {
                return Err(value_error(format!("unsupported format character '{other}'")));
            }
        };
        let length = char_count(&body) + sign.len();
        let fill = width.saturating_sub(length);
        if left {
            out.push_str(sign);
            out.push_str(&body);
            out.extend(std::iter::repeat_n(' ', fill));
        } else if zero && numeric {
            out.push_str(sign);
            out.extend(std::iter::repeat_n('0', fill));
            out.push_str(&body);
        } else {
            out.extend(std::iter::repeat_n(' ', fill));
            out.push_str(sign);
            out.push_str(&body);
        }
    }
    if used < values.len() && mapping.is_none() && !by_key {
        return Err(type_error("not all arguments converted during string formatting"));
    }
    interp.spend_text(out.len())?;
    Ok(out)
}

/// A float cut to an integer.
pub(super) fn whole(n: f64) -> Result<i128> {
    if n.is_nan() {
        return Err(value_error("cannot convert float NaN to integer"));
    }
    if n.is_infinite() {
        return Err(value_error("cannot convert float infinity to integer"));
    }
    if n.abs() >= 1e38 {
        return Err(fail("an integer beyond 128 bits is not supported"));
    }
    Ok(n.trunc() as i128)
}

/// `text.format(…)`.
pub(super) fn str_format(interp: &mut Interp<'_>, text: &str, args: &Args) -> Result<String> {
    let mut automatic = Some(0);
    format_fields(interp, text, args, &mut automatic, 0)
}

fn format_fields(
    interp: &mut Interp<'_>,
    text: &str,
    args: &Args,
    automatic: &mut Option<usize>,
    depth: u32,
) -> Result<String> {
    interp.spend_text(text.len())?;
    if depth > 1 {
        return Err(value_error("Max string recursion exceeded"));
    }
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let open = rest.as_bytes()[at] == b'{';
        rest = &rest[at + 1..];
        if rest.starts_with(if open { '{' } else { '}' }) {
            out.push(if open { '{' } else { '}' });
            rest = &rest[1..];
            continue;
        }
        if !open {
            return Err(value_error("Single '}' encountered in format string"));
        }
        let mut level = 1;
        let end = rest.char_indices().find_map(|(i, c)| {
            level += i32::from(c == '{') - i32::from(c == '}');
            (level == 0).then_some(i)
        });
        let Some(end) = end else { return Err(value_error("expected '}' before end of string")) };
        let field = &rest[..end];
        rest = &rest[end + 1..];
        let (name, spec) = match split_spec(field) {
            Some(at) => (&field[..at], &field[at..]),
            None => (field, ""),
        };
        let (conversion, spec) = match spec.strip_prefix('!') {
            Some(after) => {
                let mut parts = after.chars();
                let conversion = parts.next().ok_or_else(|| value_error("unmatched '{' in format spec"))?;
                let after = parts.as_str();
                if !after.is_empty() && !after.starts_with(':') {
                    return Err(value_error("expected ':' after conversion specifier"));
                }
                (Some(conversion), after.strip_prefix(':').unwrap_or(""))
            }
            None => (None, spec.strip_prefix(':').unwrap_or("")),
        };
        let value = field_value(interp, name, args, automatic)?;
        let value = match conversion {
            None => value,
            Some('s') => Value::Str(value.text(interp)?),
            Some(kind @ ('r' | 'a')) => {
                let mut text = String::new();
                value.repr(&mut text, interp)?;
                Value::str(if kind == 'a' { ascii(&text) } else { text })
            }
            Some(other) => return Err(value_error(format!("Unknown conversion specifier '{other}'"))),
        };
        let spec = format_fields(interp, spec, args, automatic, depth + 1)?;
        out.push_str(&format_value(interp, &value, &spec)?);
    }
    out.push_str(rest);
    interp.spend_text(out.len())?;
    Ok(out)
}

/// Where `!` or `:` ends the name of a field; both may stand in brackets.
fn split_spec(field: &str) -> Option<usize> {
    let mut bracket = false;
    for (i, c) in field.char_indices() {
        match c {
            '[' => bracket = true,
            ']' => bracket = false,
            '!' | ':' if !bracket => return Some(i),
            _ => {}
        }
    }
    None
}

fn field_value(
    interp: &mut Interp<'_>,
    name: &str,
    args: &Args,
    automatic: &mut Option<usize>,
) -> Result<Value> {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(end);
    let by_index = |index: usize| {
        args.pos
            .get(index)
            .cloned()
            .ok_or_else(|| value_error("Replacement index out of range for positional args tuple"))
    };
    let switch =
        || value_error("cannot switch between manual field specification and automatic field numbering");
    let mut value = if first.is_empty() {
        let index = automatic.ok_or_else(switch)?;
        *automatic = Some(index + 1);
        by_index(index)?
    } else if first.bytes().all(|b| b.is_ascii_digit()) {
        if automatic.is_some_and(|n| n > 0) {
            return Err(switch());
        }
        *automatic = None;
        by_index(first.parse().unwrap_or(usize::MAX))?
    } else {
        let found = args.kw.iter().find(|(key, _)| **key == *first).map(|(_, value)| value.clone());
        found.ok_or_else(|| value_error(format!("KeyError: '{first}'")))?
    };
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            value = interp.get_attr(&value, &after[..end].into())?;
            rest = &after[end..];
        } else {
            let after = &rest[1..];
            let end = after.find(']').ok_or_else(|| value_error("Missing ']' in format string"))?;
            let key = &after[..end];
            let index = match key.parse::<i128>() {
                Ok(n) if key.bytes().all(|b| b.is_ascii_digit()) => Value::Int(n),
                _ => Value::str(key),
            };
            value = interp.get_item(&value, &index)?;
            rest = &after[end + 1..];
            if !rest.is_empty() && !rest.starts_with(['.', '[']) {
                return Err(value_error("Only '.' or '[' may follow ']' in format field specifier"));
            }
        }
    }
    Ok(value)
}

struct Spec {
    fill: char,
    align: Option<char>,
    sign: char,
    alternate: bool,
    width: usize,
    group: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

fn parse_spec(spec: &str) -> Result<Spec> {
    let invalid = || value_error(format!("Invalid format specifier '{spec}'"));
    let chars: Vec<char> = spec.chars().collect();
    let mut at = 0;
    let mut out = Spec {
        fill: ' ',
        align: None,
        sign: '-',
        alternate: false,
        width: 0,
        group: None,
        precision: None,
        kind: None,
    };
    let is_align = |c: Option<&char>| matches!(c, Some('<' | '>' | '=' | '^'));
    let mut filled = false;
    if is_align(chars.get(1)) {
        out.fill = chars[0];
        out.align = Some(chars[1]);
        filled = true;
        at = 2;
    } else if is_align(chars.first()) {
        out.align = Some(chars[0]);
        at = 1;
    }
    if let Some(c @ ('+' | '-' | ' ')) = chars.get(at) {
        out.sign = *c;
        at += 1;
    }
    if chars.get(at) == Some(&'z') {
        return Err(fail("the `z` of a format is not supported"));
    }
    if chars.get(at) == Some(&'#') {
        out.alternate = true;
        at += 1;
    }
    if chars.get(at) == Some(&'0') {
        if !filled {
            out.fill = '0';
            if out.align.is_none() {
                out.align = Some('=');
            }
        }
        at += 1;
    }
    let number = |at: &mut usize| -> Option<usize> {
        let start = *at;
        let mut n = 0usize;
        while let Some(digit) = chars.get(*at).and_then(|c| c.to_digit(10)) {
            n = n.saturating_mul(10).saturating_add(digit as usize);
            *at += 1;
        }
        (*at > start).then_some(n)
    };
    out.width = number(&mut at).unwrap_or(0);
    if let Some(c @ (',' | '_')) = chars.get(at) {
        out.group = Some(*c);
        at += 1;
    }
    if chars.get(at) == Some(&'.') {
        at += 1;
        out.precision =
            Some(number(&mut at).ok_or_else(|| value_error("Format specifier missing precision"))?);
    }
    if let Some(c) = chars.get(at) {
        out.kind = Some(*c);
        at += 1;
    }
    if at < chars.len() {
        return Err(invalid());
    }
    if out.width > MAX_WIDTH || out.precision.is_some_and(|p| p > MAX_WIDTH) {
        return Err(fail("a format is too wide"));
    }
    Ok(out)
}

fn unknown_code(kind: char, value: &Value) -> Box<Error> {
    value_error(format!("Unknown format code '{kind}' for object of type '{}'", value.type_name()))
}

/// `format(value, spec)`.
fn format_value(interp: &mut Interp<'_>, value: &Value, spec: &str) -> Result<String> {
    if spec.is_empty() {
        return Ok(value.text(interp)?.to_string());
    }
    match value {
        Value::Str(_) | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {}
        other => {
            return Err(type_error(format!(
                "unsupported format string passed to {}.__format__",
                other.type_name()
            )));
        }
    }
    let s = parse_spec(spec)?;
    interp.spend_text(s.width.max(s.precision.unwrap_or(0)))?;
    if let Value::Str(text) = value {
        if !matches!(s.kind, None | Some('s')) {
            return Err(unknown_code(s.kind.unwrap_or(' '), value));
        }
        if s.sign != '-' || s.alternate || s.group.is_some() || s.align == Some('=') && s.fill != '0' {
            return Err(value_error("a sign, `#`, a separator or `=` is not allowed in a string's format"));
        }
        let text: String = match s.precision {
            Some(n) => text.chars().take(n).collect(),
            None => text.to_string(),
        };
        let align = match s.align {
            None | Some('=') => '<',
            Some(align) => align,
        };
        return Ok(pad("", &text, &s, align));
    }
    let integer = value.as_int();
    let (negative, prefix, body, grouped) = match (integer, s.kind) {
        (Some(n), Some('c')) => {
            let c = u32::try_from(n).ok().and_then(char::from_u32);
            let c = c.ok_or_else(|| value_error("%c arg not in range(0x110000)"))?;
            (false, "", c.to_string(), 0)
        }
        (Some(n), None | Some('d' | 'n' | 'b' | 'o' | 'x' | 'X')) => {
            if s.precision.is_some() {
                return Err(value_error("Precision not allowed in integer format specifier"));
            }
            let (base, prefix, group) = match s.kind {
                Some('b') => (2, "0b", 4),
                Some('o') => (8, "0o", 4),
                Some('x') => (16, "0x", 4),
                Some('X') => (16, "0X", 4),
                _ => (10, "", 3),
            };
            if s.group == Some(',') && base != 10 {
                return Err(value_error(format!("Cannot specify ',' with '{}'.", s.kind.unwrap_or(' '))));
            }
            let digits = radix(n.unsigned_abs(), base, s.kind == Some('X'));
            (n < 0, if s.alternate { prefix } else { "" }, digits, group)
        }
        (_, None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | 'n' | '%')) => {
            let n = number_of(value)?;
            let body = match s.kind {
                None => match s.precision {
                    None => float_repr(n.abs()),
                    Some(_) => {
                        return Err(fail("a precision without a type in a float's format is not supported"));
                    }
                },
                Some('%') => {
                    format!("{}%", float_digits(n * 100.0, 'f', s.precision.unwrap_or(6), s.alternate))
                }
                Some(kind) => {
                    let lower = if kind == 'n' { 'g' } else { kind.to_ascii_lowercase() };
                    let text = float_digits(n, lower, s.precision.unwrap_or(6), s.alternate);
                    if kind.is_ascii_uppercase() { text.to_uppercase() } else { text }
                }
            };
            (n.is_sign_negative() && !n.is_nan(), "", body, 3)
        }
        (_, Some(kind)) => return Err(unknown_code(kind, value)),
    };
    let sign = match (negative, s.sign) {
        (true, _) => "-",
        (false, '+') => "+",
        (false, ' ') => " ",
        _ => "",
    };
    let head = format!("{sign}{prefix}");
    let mut body = body;
    if let Some(separator) = s.group.filter(|_| grouped > 0) {
        let whole = body.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(body.len());
        let whole =
            if grouped == 3 { body.find(|c: char| !c.is_ascii_digit()).unwrap_or(body.len()) } else { whole };
        let (mut digits, rest) = (body[..whole].to_owned(), body[whole..].to_owned());
        if s.fill == '0' && s.align == Some('=') {
            // Zeros are grouped, too, and fill at least the width.
            let room = s.width.saturating_sub(head.len() + rest.len());
            while digits.len() + (digits.len() - 1) / grouped < room {
                digits.insert(0, '0');
            }
        }
        let mut spaced = String::new();
        for (i, c) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i) % grouped == 0 {
                spaced.push(separator);
            }
            spaced.push(c);
        }
        body = spaced + &rest;
    }
    Ok(pad(&head, &body, &s, s.align.unwrap_or('>')))
}

fn pad(head: &str, body: &str, spec: &Spec, align: char) -> String {
    let length = char_count(head) + char_count(body);
    let room = spec.width.saturating_sub(length);
    let fill = |n: usize| -> String { std::iter::repeat_n(spec.fill, n).collect() };
    match align {
        '<' => format!("{head}{body}{}", fill(room)),
        '^' => format!("{}{head}{body}{}", fill(room / 2), fill(room - room / 2)),
        '=' => format!("{head}{}{body}", fill(room)),
        _ => format!("{}{head}{body}", fill(room)),
    }
}

/// `round(value, digits)` of a float.
pub(super) fn round(value: f64, digits: i128) -> Result<f64> {
    if !value.is_finite() || value == 0.0 || digits > 330 {
        return Ok(value);
    }
    if digits >= 0 {
        return Ok(format!("{value:.*}", digits as usize).parse().unwrap_or(value));
    }
    if digits < -310 {
        return Ok(0.0_f64.copysign(value));
    }
    if value.abs() >= 1e30 || digits < -30 {
        return Err(fail("rounding so large a number to tens is not supported"));
    }
    let unit = 10_i128.pow(digits.unsigned_abs() as u32);
    let whole = value.abs().trunc() as i128;
    let fraction = value.abs().fract() > 0.0;
    let (quotient, rest) = (whole / unit, whole % unit);
    let up = match (rest * 2).cmp(&unit) {
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal => fraction || quotient % 2 == 1,
        std::cmp::Ordering::Less => false,
    };
    Ok((((quotient + i128::from(up)) * unit) as f64).copysign(value))
}

/// `int(text, base)`.
pub(super) fn parse_int(text: &str, base: u32) -> Option<Result<i128>> {
    let text = text.trim_matches(unicode::space);
    let (negative, body) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = body.to_ascii_lowercase();
    let (base, body) = match (base, lower.get(..2)) {
        (0 | 16, Some("0x")) => (16, &body[2..]),
        (0 | 8, Some("0o")) => (8, &body[2..]),
        (0 | 2, Some("0b")) => (2, &body[2..]),
        (0, _) => {
            if body.len() > 1 && body.starts_with('0') && body.chars().any(|c| !matches!(c, '0' | '_')) {
                return None;
            }
            (10, body)
        }
        (base, _) => (base, body),
    };
    let prefixed = lower.len() != body.len();
    let body = if prefixed { body.strip_prefix('_').unwrap_or(body) } else { body };
    let mut value: i128 = 0;
    let mut before = None;
    for c in body.chars() {
        if c == '_' {
            if !matches!(before, Some(b) if b != '_') {
                return None;
            }
        } else {
            let digit = unicode::decimal_value(c).or_else(|| c.to_digit(36)).filter(|d| *d < base)?;
            match value.checked_mul(base.into()).and_then(|v| v.checked_add(digit.into())) {
                Some(next) => value = next,
                None => return Some(Err(fail("an integer beyond 128 bits is not supported"))),
            }
        }
        before = Some(c);
    }
    if matches!(before, None | Some('_')) {
        return None;
    }
    Some(Ok(if negative { -value } else { value }))
}

/// `float(text)`.
pub(super) fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(unicode::space);
    let mut plain = String::with_capacity(text.len());
    let mut before = ' ';
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '_' {
            let digit_after = chars.peek().is_some_and(|c| unicode::decimal(*c));
            if !before.is_ascii_digit() || !digit_after {
                return None;
            }
        } else {
            let c = unicode::decimal_value(c).and_then(|d| char::from_digit(d, 10)).unwrap_or(c);
            plain.push(c);
            before = c;
            continue;
        }
        before = '_';
    }
    let body = plain.trim_start_matches(['+', '-']);
    if plain.len() - body.len() > 1 {
        return None;
    }
    match body.to_ascii_lowercase().as_str() {
        "inf" | "infinity" | "nan" => {}
        _ if body.starts_with(|c: char| c.is_ascii_digit() || c == '.') => {}
        _ => return None,
    }
    plain.parse().ok()
}
