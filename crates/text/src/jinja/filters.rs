//! `|…`.

use std::cmp::Ordering;
use std::sync::Arc;

use super::ast::BinaryOp;
use super::eval::Interp;
use super::value::{Dict, Value, compare, equal, hashable, pairs, undefined_error};
use super::{Args, Error, Result, fail, format, methods, ops, type_error, unicode, value_error};
use crate::python_json::{Style, dumps};

pub(crate) type Filter = fn(&mut Interp<'_>, Value, Args) -> Result<Value>;

/// The filter of a name.
pub(super) fn find(name: &str) -> Option<Filter> {
    Some(match name {
        "abs" => abs,
        "attr" => attr,
        "batch" => batch,
        "capitalize" => |i, v, a| text_filter(i, v, a, "capitalize", methods::capitalize),
        "center" => center,
        "count" | "length" => |_, v, a| {
            a.none("length")?;
            Ok(Value::Int(v.len()? as i128))
        },
        "d" | "default" => default,
        "dictsort" => dictsort,
        "e" | "escape" => |i, v, a| {
            a.none("escape")?;
            match v {
                Value::Markup(_) => Ok(v),
                v => Ok(Value::Markup(escaped(i, &v)?.into())),
            }
        },
        "filesizeformat" => filesizeformat,
        "first" => first,
        "float" => float,
        "forceescape" => |i, v, a| {
            a.none("forceescape")?;
            Ok(Value::Markup(escaped(i, &v)?.into()))
        },
        "format" => format_filter,
        "groupby" => groupby,
        "indent" => indent,
        "int" => int,
        "items" => |_, v, a| {
            a.none("items")?;
            match &v {
                Value::Undefined(_) => Value::iter(Vec::new()),
                Value::Dict(dict) => Value::iter(pairs(dict)?),
                _ => Err(type_error("Can only get item pairs from a mapping.")),
            }
        },
        "join" => join,
        "last" => last,
        "list" => |i, v, a| {
            a.none("list")?;
            Value::list(i.items(&v)?)
        },
        "lower" => |i, v, a| text_filter(i, v, a, "lower", str::to_lowercase),
        "map" => map,
        "max" => |i, v, a| extreme(i, &v, a, Ordering::Greater),
        "min" => |i, v, a| extreme(i, &v, a, Ordering::Less),
        "pprint" => pprint,
        "random" => |_, _, _| Err(fail("`random` gives another value each time and is not supported")),
        "reject" => |i, v, a| select(i, &v, a, false, false),
        "rejectattr" => |i, v, a| select(i, &v, a, true, false),
        "replace" => replace,
        "reverse" => reverse,
        "round" => round,
        "safe" => |i, v, a| {
            a.none("safe")?;
            Ok(Value::Markup(v.text(i)?))
        },
        "select" => |i, v, a| select(i, &v, a, false, true),
        "selectattr" => |i, v, a| select(i, &v, a, true, true),
        "slice" => slice,
        "sort" => sort,
        "string" => |i, v, a| {
            a.none("string")?;
            match v {
                Value::Str(_) | Value::Markup(_) => Ok(v),
                v => Ok(Value::Str(v.text(i)?)),
            }
        },
        "striptags" => striptags,
        "sum" => sum,
        "title" => |i, v, a| text_filter(i, v, a, "title", title),
        "tojson" => tojson,
        "trim" => trim,
        "truncate" => truncate,
        "unique" => unique,
        "upper" => |i, v, a| text_filter(i, v, a, "upper", str::to_uppercase),
        "urlencode" => urlencode,
        "urlize" => |_, _, _| Err(fail("`urlize` is not supported")),
        "wordcount" => |i, v, a| {
            a.none("wordcount")?;
            let text = v.text(i)?;
            i.spend_text(text.len())?;
            let words = text.split(|c: char| c != '_' && !unicode::word(c)).filter(|word| !word.is_empty());
            Ok(Value::Int(words.count() as i128))
        },
        "wordwrap" => |_, _, _| Err(fail("`wordwrap` is not supported")),
        "xmlattr" => xmlattr,
        _ => return None,
    })
}

fn escaped(interp: &Interp<'_>, value: &Value) -> Result<String> {
    let text = value.text(interp)?;
    interp.spend_text(text.len() * 5)?;
    Ok(format::escape_html(&text))
}

fn text_filter(
    interp: &mut Interp<'_>,
    value: Value,
    args: Args,
    name: &str,
    make: fn(&str) -> String,
) -> Result<Value> {
    args.none(name)?;
    let text = value.text(interp)?;
    interp.spend_text(text.len())?;
    let made = make(&text);
    Ok(match value {
        Value::Markup(_) => Value::Markup(made.into()),
        _ => Value::str(made),
    })
}

/// Jinja2's own: words begin after `-`, white space and opening brackets.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let separator = |c: char| matches!(c, '-' | '(' | '{' | '[' | '<') || unicode::space(c);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if separator(first) {
            rest.find(|c| !separator(c)).unwrap_or(rest.len())
        } else {
            rest.find(separator).unwrap_or(rest.len())
        };
        let word = &rest[..length];
        out.extend(first.to_uppercase());
        // The rest is put in lower case by itself, so a final sigma counts from here.
        out.push_str(&word[first.len_utf8()..].to_lowercase());
        rest = &rest[length..];
    }
    out
}

fn truth(value: Option<Value>) -> bool {
    value.is_some_and(|v| v.truth())
}

fn integer(value: &Value, what: &str) -> Result<i128> {
    match (value, value.as_int()) {
        (_, Some(n)) => Ok(n),
        (Value::Undefined(message), _) => Err(undefined_error(message)),
        _ => Err(type_error(format!("{what}: an integer is needed, not {}", value.type_name()))),
    }
}

fn required(value: Option<Value>, what: &str) -> Result<Value> {
    value.ok_or_else(|| type_error(format!("{what}: an argument is missing")))
}

fn abs(_: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    args.none("abs")?;
    match (&value, value.as_int()) {
        (_, Some(n)) => Ok(Value::Int(n.checked_abs().ok_or_else(|| fail("the integer is too large"))?)),
        (Value::Float(n), _) => Ok(Value::Float(n.abs())),
        (Value::Undefined(message), _) => {
            Err(type_error(format!("bad operand type for abs(): 'Undefined' ({message})")))
        }
        _ => Err(type_error(format!("bad operand type for abs(): '{}'", value.type_name()))),
    }
}

fn attr(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [name] = args.bind("attr", ["name"])?;
    let name = required(name, "attr")?;
    let Some(name) = name.as_str() else { return Err(type_error("attribute name must be string")) };
    if let Value::Undefined(message) = &value {
        return Err(undefined_error(message));
    }
    let found = interp.python_attr(&value, name)?;
    Ok(found.unwrap_or_else(|| {
        Value::undefined(format!("'{} object' has no attribute '{name}'", value.type_name()))
    }))
}

fn batch(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [count, fill] = args.bind("batch", ["linecount", "fill_with"])?;
    let count = required(count, "batch")?;
    let count = match &count {
        // Python compares lengths with it, so a float may do.
        Value::Float(n) if n.fract() == 0.0 => *n as i128,
        other => integer(other, "batch")?,
    };
    let fill = fill.filter(|v| !matches!(v, Value::None));
    let mut out = Vec::new();
    let mut row: Vec<Value> = Vec::new();
    let mut begun = false;
    for item in interp.items(&value)? {
        if row.len() as i128 == count {
            // A line of nothing is a list, too.
            out.push(Value::list(std::mem::take(&mut row))?);
        }
        row.push(item);
        begun = true;
    }
    if begun && !row.is_empty() {
        if let Some(fill) = fill {
            let room = (count - row.len() as i128).max(0);
            interp.spend(u64::try_from(room).unwrap_or(u64::MAX))?;
            row.extend(std::iter::repeat_n(fill, room as usize));
        }
        out.push(Value::list(row)?);
    }
    Value::iter(out)
}

fn slice(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [slices, fill] = args.bind("slice", ["slices", "fill_with"])?;
    let slices = integer(&required(slices, "slice")?, "slice")?;
    let items = interp.items(&value)?;
    if slices == 0 {
        return Err(value_error("integer division or modulo by zero"));
    }
    if slices < 0 {
        return Value::iter(Vec::new());
    }
    interp.spend(u64::try_from(slices).unwrap_or(u64::MAX))?;
    let slices = slices as usize;
    let fill = fill.filter(|v| !matches!(v, Value::None));
    let (each, extra) = (items.len() / slices, items.len() % slices);
    let mut items = items.into_iter();
    let mut out = Vec::with_capacity(slices);
    for number in 0..slices {
        let mut part: Vec<Value> = items.by_ref().take(each + usize::from(number < extra)).collect();
        if let (Some(fill), true) = (&fill, number >= extra) {
            part.push(fill.clone());
        }
        out.push(Value::list(part)?);
    }
    Value::iter(out)
}

fn center(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [width] = args.bind("center", ["width"])?;
    let width = match width {
        Some(width) => integer(&width, "center")?,
        None => 80,
    };
    let text = value.text(interp)?;
    Ok(Value::str(methods::pad(interp, &text, width, ' ', "center")?))
}

fn default(_: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [other, boolean] = args.bind("default", ["default_value", "boolean"])?;
    let other = other.unwrap_or_else(|| Value::str(""));
    let replaced = matches!(value, Value::Undefined(_)) || truth(boolean) && !value.truth();
    Ok(if replaced { other } else { value })
}

fn lowered(value: Value) -> Value {
    match value {
        Value::Str(text) | Value::Markup(text) => Value::str(text.to_lowercase()),
        other => other,
    }
}

/// Sorts by keys; the first error of a comparison ends it.
fn sorted(interp: &Interp<'_>, items: Vec<(Value, Value)>, reverse: bool) -> Result<Vec<Value>> {
    let count = items.len() as u64;
    interp.spend(count.saturating_mul(u64::from(count.max(2).ilog2())))?;
    let mut failed = None;
    let mut items = items;
    let mut order = |a: &Value, b: &Value| match compare(a, b, "<") {
        Ok(Some(order)) => order,
        Ok(None) => {
            failed.get_or_insert_with(|| fail("NaN cannot be sorted here"));
            Ordering::Equal
        }
        Err(error) => {
            failed.get_or_insert(error);
            Ordering::Equal
        }
    };
    // Equal items keep their order in both directions.
    if reverse {
        items.reverse();
        items.sort_by(|a, b| order(&a.0, &b.0));
        items.reverse();
    } else {
        items.sort_by(|a, b| order(&a.0, &b.0));
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(items.into_iter().map(|(_, value)| value).collect()),
    }
}

impl Interp<'_> {
    /// Entries of an object by their keys.
    pub(crate) fn sorted_entries(&self, dict: &Dict) -> Result<Vec<(Value, Value)>> {
        let keyed = pairs(dict)?.into_iter().zip(dict.entries()).map(|(pair, (key, _))| (key.clone(), pair));
        let mut out = Vec::new();
        for pair in sorted(self, keyed.collect(), false)? {
            if let Value::Tuple(parts) = &pair {
                out.push((parts.items[0].clone(), parts.items[1].clone()));
            }
        }
        Ok(out)
    }
}

fn dictsort(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [case, by, reverse] = args.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let by_value = match &by {
        None => false,
        Some(by) => match by.as_str().map(|by| &**by) {
            Some("key") => false,
            Some("value") => true,
            _ => return Err(fail("You can only sort by either \"key\" or \"value\"")),
        },
    };
    let case = truth(case);
    let dict = match &value {
        Value::Dict(dict) => dict,
        Value::Undefined(message) => return Err(undefined_error(message)),
        _ => return Err(type_error(format!("'{}' object has no attribute 'items'", value.type_name()))),
    };
    let mut items = Vec::new();
    for pair in pairs(dict)? {
        let Value::Tuple(parts) = &pair else { continue };
        let key = parts.items[usize::from(by_value)].clone();
        items.push((if case { key } else { lowered(key) }, pair.clone()));
    }
    Value::list(sorted(interp, items, truth(reverse))?)
}

/// Reads `a.b.0` of an item, as `map(attribute=…)` does.
struct Getter {
    parts: Vec<Value>,
    fold: bool,
    default: Option<Value>,
}

impl Getter {
    fn new(attribute: Option<&Value>, fold: bool, default: Option<Value>) -> Result<Getter> {
        let parts = match attribute {
            None | Some(Value::None) => Vec::new(),
            Some(Value::Str(path) | Value::Markup(path)) => path
                .split('.')
                .map(|part| match part.parse::<i128>() {
                    Ok(n) if part.bytes().all(|b| b.is_ascii_digit()) => Value::Int(n),
                    _ => Value::str(part),
                })
                .collect(),
            Some(value @ (Value::Int(_) | Value::Bool(_))) => vec![value.clone()],
            Some(other) => {
                return Err(type_error(format!("an attribute cannot be a {}", other.type_name())));
            }
        };
        Ok(Getter { parts, fold, default: default.filter(|v| !matches!(v, Value::None)) })
    }

    fn get(&self, interp: &mut Interp<'_>, item: &Value) -> Result<Value> {
        let mut value = item.clone();
        for part in &self.parts {
            value = interp.get_item(&value, part)?;
            if let (Value::Undefined(_), Some(default)) = (&value, &self.default) {
                value = default.clone();
            }
        }
        Ok(if self.fold { lowered(value) } else { value })
    }
}

fn sort(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [reverse, case, attribute] = args.bind("sort", ["reverse", "case_sensitive", "attribute"])?;
    let fold = !truth(case);
    let getters = match attribute.as_ref().and_then(Value::as_str) {
        Some(paths) => paths
            .split(',')
            .map(|path| Getter::new(Some(&Value::str(path)), fold, None))
            .collect::<Result<Vec<_>>>()?,
        None => vec![Getter::new(attribute.as_ref(), fold, None)?],
    };
    let mut items = Vec::new();
    for item in interp.items(&value)? {
        // A list even for one attribute: lists of equal keys are equal, whether or not the keys have an order.
        let mut keys = Vec::with_capacity(getters.len());
        for getter in &getters {
            keys.push(getter.get(interp, &item)?);
        }
        let key = Value::list(keys)?;
        items.push((key, item));
    }
    Value::list(sorted(interp, items, truth(reverse))?)
}

fn unique(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [case, attribute] = args.bind("unique", ["case_sensitive", "attribute"])?;
    let getter = Getter::new(attribute.as_ref(), !truth(case), None)?;
    let mut seen: Vec<Value> = Vec::new();
    let mut out = Vec::new();
    for item in interp.items(&value)? {
        let key = getter.get(interp, &item)?;
        hashable(&key)?;
        interp.spend(seen.len() as u64 / 8)?;
        let mut known = false;
        for other in &seen {
            if equal(other, &key)? {
                known = true;
                break;
            }
        }
        if !known {
            seen.push(key);
            out.push(item);
        }
    }
    Value::iter(out)
}

fn extreme(interp: &mut Interp<'_>, value: &Value, args: Args, wanted: Ordering) -> Result<Value> {
    let [case, attribute] = args.bind("min or max", ["case_sensitive", "attribute"])?;
    let getter = Getter::new(attribute.as_ref(), !truth(case), None)?;
    let mut best: Option<(Value, Value)> = None;
    for item in interp.items(value)? {
        let key = getter.get(interp, &item)?;
        let better = match &best {
            None => true,
            Some((best, _)) => {
                let operator = if wanted == Ordering::Greater { ">" } else { "<" };
                compare(&key, best, operator)? == Some(wanted)
            }
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(match best {
        Some((_, item)) => item,
        None => Value::undefined("No aggregated item, sequence was empty."),
    })
}

fn groupby(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [attribute, default, case] = args.bind("groupby", ["attribute", "default", "case_sensitive"])?;
    let attribute = required(attribute, "groupby")?;
    let fold = !truth(case);
    let getter = Getter::new(Some(&attribute), fold, default.clone())?;
    let plain = Getter::new(Some(&attribute), false, default)?;
    let mut items = Vec::new();
    for item in interp.items(&value)? {
        items.push((getter.get(interp, &item)?, item));
    }
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for item in sorted(interp, items, false)? {
        let key = getter.get(interp, &item)?;
        match groups.last_mut() {
            Some((last, members)) if equal(last, &key)? => members.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let mut out = Vec::new();
    for (key, members) in groups {
        let key = if fold { plain.get(interp, &members[0])? } else { key };
        out.push(Value::group(key, Value::list(members)?)?);
    }
    Value::list(out)
}

fn filesizeformat(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [binary] = args.bind("filesizeformat", ["binary"])?;
    let binary = truth(binary);
    let Value::Float(bytes) = to_float(interp, &value)? else {
        return Err(fail("filesizeformat: no number"));
    };
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return Ok(Value::str("1 Byte"));
    }
    if bytes < base {
        return Ok(Value::str(format!("{} Bytes", format::whole(bytes)?)));
    }
    let names = if binary {
        ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"]
    } else {
        ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"]
    };
    let mut text = String::new();
    for (i, name) in names.iter().enumerate() {
        let unit = base.powi(i as i32 + 2);
        text = format!("{:.1} {name}", base * bytes / unit);
        if bytes < unit {
            break;
        }
    }
    Ok(Value::str(text))
}

fn first(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    args.none("first")?;
    let item = match &value {
        Value::List(items) | Value::Tuple(items) => items.items.first().cloned(),
        Value::Iter(stream) => stream.rest.borrow_mut().pop_front(),
        Value::Str(text) => text.chars().next().map(|c| Value::str(&*c.encode_utf8(&mut [0; 4]))),
        other => interp.items(other)?.into_iter().next(),
    };
    Ok(item.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
}

fn last(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    args.none("last")?;
    let item = match &value {
        Value::List(items) | Value::Tuple(items) => items.items.last().cloned(),
        Value::Str(text) => text.chars().next_back().map(|c| Value::str(&*c.encode_utf8(&mut [0; 4]))),
        Value::Iter(_) => return Err(type_error("'generator' object is not reversible")),
        other => interp.items(other)?.into_iter().next_back(),
    };
    Ok(item.unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
}

/// `float(value)`, where it fails with a type or value error.
fn to_float(_: &Interp<'_>, value: &Value) -> Result<Value> {
    match (value, value.as_int()) {
        (_, Some(n)) => Ok(Value::Float(n as f64)),
        (Value::Float(n), _) => Ok(Value::Float(*n)),
        (Value::Str(text) | Value::Markup(text), _) => match format::parse_float(text) {
            Some(n) => Ok(Value::Float(n)),
            None => Err(value_error(format!("could not convert string to float: '{text}'"))),
        },
        (Value::Undefined(message), _) => Err(undefined_error(message)),
        _ => Err(type_error(format!(
            "float() argument must be a string or a real number, not '{}'",
            value.type_name()
        ))),
    }
}

/// Python's `TypeError` and `ValueError`, which `int` and `float` answer with their default.
fn convertible(error: &Error) -> bool {
    matches!(error.kind, super::Kind::Type | super::Kind::Value)
}

fn float(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [default] = args.bind("float", ["default"])?;
    match to_float(interp, &value) {
        Err(error) if convertible(&error) => Ok(default.unwrap_or(Value::Float(0.0))),
        result => result,
    }
}

fn int(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [default, base] = args.bind("int", ["default", "base"])?;
    let base = match base {
        Some(base) => integer(&base, "int")?,
        None => 10,
    };
    let default = default.unwrap_or(Value::Int(0));
    match (&value, value.as_int()) {
        (_, Some(n)) => return Ok(Value::Int(n)),
        (Value::Float(n), _) if n.is_finite() => return Ok(Value::Int(format::whole(*n)?)),
        // Infinity ends Python's first attempt with an error that is not caught.
        (Value::Float(n), _) if n.is_infinite() => {
            return Err(value_error("cannot convert float infinity to integer"));
        }
        (Value::Str(text) | Value::Markup(text), _) => {
            interp.spend_text(text.len())?;
            if base != 0 && !(2..=36).contains(&base) {
                return Ok(default);
            }
            if let Some(result) = format::parse_int(text, base as u32) {
                return result.map(Value::Int);
            }
        }
        _ => {}
    }
    match to_float(interp, &value) {
        Ok(Value::Float(n)) if n.is_finite() => Ok(Value::Int(format::whole(n)?)),
        Ok(_) => Ok(default),
        Err(error) if convertible(&error) => Ok(default),
        Err(error) => Err(error),
    }
}

fn format_filter(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    if !args.pos.is_empty() && !args.kw.is_empty() {
        return Err(fail("can't handle positional and keyword arguments at the same time"));
    }
    if matches!(value, Value::Markup(_)) {
        return Err(fail("`format` of a text marked as safe is not supported"));
    }
    let text = value.text(interp)?;
    let given = if args.kw.is_empty() {
        Value::tuple(args.pos)?
    } else {
        let entries = args.kw.into_iter().map(|(key, value)| (Value::Str(key), value)).collect();
        Value::dict(Dict::from_entries(entries)?)
    };
    Ok(Value::str(format::printf(interp, &text, &given)?))
}

fn indent(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
    let text = match &value {
        Value::Str(text) => text.clone(),
        Value::Markup(_) => return Err(fail("`indent` of a text marked as safe is not supported")),
        Value::Undefined(message) => return Err(undefined_error(message)),
        other => {
            return Err(type_error(format!(
                "unsupported operand type(s) for +=: '{}' and 'str'",
                other.type_name()
            )));
        }
    };
    let indention: Arc<str> = match width {
        None => "    ".into(),
        Some(Value::Str(text)) => text,
        Some(width) => {
            let width = integer(&width, "indent")?.max(0);
            interp.spend_text(usize::try_from(width).unwrap_or(usize::MAX))?;
            " ".repeat(width as usize).into()
        }
    };
    let text = format!("{text}\n");
    let lines = methods::split_lines(&text, false);
    interp.spend_text(text.len() + lines.len().saturating_mul(indention.len()))?;
    let mut out = String::new();
    if truth(first) {
        out.push_str(&indention);
    }
    let blank = truth(blank);
    for (i, line) in lines.iter().enumerate() {
        if i > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(&indention);
            }
        }
        out.push_str(line);
    }
    Ok(Value::str(out))
}

fn join(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [sep, attribute] = args.bind("join", ["d", "attribute"])?;
    let sep = match sep {
        Some(sep) => sep.text(interp)?,
        None => "".into(),
    };
    let getter = match attribute {
        None | Some(Value::None) => None,
        Some(attribute) => Some(Getter::new(Some(&attribute), false, None)?),
    };
    let mut out = String::new();
    for (i, item) in interp.items(&value)?.iter().enumerate() {
        if i > 0 {
            interp.spend_text(sep.len())?;
            out.push_str(&sep);
        }
        match &getter {
            Some(getter) => getter.get(interp, item)?.print(&mut out, interp)?,
            None => item.print(&mut out, interp)?,
        }
    }
    interp.spend_text(out.len())?;
    Ok(Value::str(out))
}

fn map(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    if !value.truth() {
        return Value::iter(Vec::new());
    }
    let items = interp.items(&value)?;
    let mut out = Vec::with_capacity(items.len());
    if args.pos.is_empty() && args.kw.iter().any(|(key, _)| &**key == "attribute") {
        let [attribute, default] = args.bind("map", ["attribute", "default"])?;
        let getter = Getter::new(attribute.as_ref(), false, default)?;
        for item in &items {
            out.push(getter.get(interp, item)?);
        }
    } else {
        let mut pos = args.pos.into_iter();
        let Some(name) = pos.next() else { return Err(fail("map requires a filter argument")) };
        let pos: Vec<Value> = pos.collect();
        for item in items {
            let args = Args { pos: pos.clone(), kw: args.kw.clone() };
            out.push(interp.call_filter(&name, item, args)?);
        }
    }
    Value::iter(out)
}

fn select(interp: &mut Interp<'_>, value: &Value, args: Args, by_attr: bool, wanted: bool) -> Result<Value> {
    if !value.truth() {
        return Value::iter(Vec::new());
    }
    let mut pos = args.pos.into_iter();
    let getter = if by_attr {
        let Some(attribute) = pos.next() else { return Err(fail("Missing parameter for attribute name")) };
        Some(Getter::new(Some(&attribute), false, None)?)
    } else {
        None
    };
    let test = pos.next();
    let pos: Vec<Value> = pos.collect();
    let mut out = Vec::new();
    for item in interp.items(value)? {
        let tested = match &getter {
            Some(getter) => getter.get(interp, &item)?,
            None => item.clone(),
        };
        let passes = match &test {
            Some(name) => interp.call_test(name, &tested, Args { pos: pos.clone(), kw: args.kw.clone() })?,
            None => tested.truth(),
        };
        if passes == wanted {
            out.push(item);
        }
    }
    Value::iter(out)
}

/// `pformat`, where one line is enough.
fn pprint(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    args.none("pprint")?;
    fn ordered(interp: &Interp<'_>, value: &Value) -> Result<Value> {
        match value {
            Value::Dict(dict) => {
                let mut entries = Vec::new();
                for (key, value) in interp.sorted_entries(dict)? {
                    entries.push((key, ordered(interp, &value)?));
                }
                Ok(Value::dict(Dict::from_entries(entries)?))
            }
            Value::List(items) => {
                interp.spend(items.items.len() as u64)?;
                Value::list(items.items.iter().map(|item| ordered(interp, item)).collect::<Result<_>>()?)
            }
            Value::Tuple(items) => {
                interp.spend(items.items.len() as u64)?;
                Value::tuple(items.items.iter().map(|item| ordered(interp, item)).collect::<Result<_>>()?)
            }
            other => Ok(other.clone()),
        }
    }
    let mut out = String::new();
    ordered(interp, &value)?.repr(&mut out, interp)?;
    if out.chars().count() > 79 {
        return Err(fail("`pprint` of what takes more than one line is not supported"));
    }
    Ok(Value::str(out))
}

fn replace(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [old, new, count] = args.bind("replace", ["old", "new", "count"])?;
    let (old, new) = (required(old, "replace")?.text(interp)?, required(new, "replace")?.text(interp)?);
    let count = match count {
        None | Some(Value::None) => -1,
        Some(count) => integer(&count, "replace")?,
    };
    let text = value.text(interp)?;
    Ok(Value::str(methods::replace(interp, &text, &old, &new, count)?))
}

fn reverse(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    args.none("reverse")?;
    match &value {
        Value::Str(text) => methods::reversed(interp, text),
        Value::Markup(_) => Err(fail("`reverse` of a text marked as safe is not supported")),
        Value::Iter(_) => {
            let mut items = interp.items(&value)?;
            items.reverse();
            Value::list(items)
        }
        other => match interp.items(other) {
            Ok(mut items) => {
                items.reverse();
                Value::iter(items)
            }
            Err(error) if error.kind == super::Kind::Type => Err(fail("argument must be iterable")),
            Err(error) => Err(error),
        },
    }
}

fn round(_: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [precision, method] = args.bind("round", ["precision", "method"])?;
    let method = match &method {
        None => "common",
        Some(method) => match method.as_str().map(|m| &**m) {
            Some(m @ ("common" | "ceil" | "floor")) => m,
            _ => return Err(fail("method must be common, ceil or floor")),
        },
    };
    let given = precision.unwrap_or(Value::Int(0));
    let none = matches!(given, Value::None) && method == "common";
    let precision = if none { 0 } else { integer(&given, "round")? };
    if let Value::Undefined(message) = &value {
        return Err(type_error(format!("type Undefined doesn't define __round__ method ({message})")));
    }
    if method == "common" {
        return match (&value, value.as_int()) {
            (_, Some(n)) if precision >= 0 => Ok(Value::Int(n)),
            (_, Some(n)) => {
                let Some(unit) = u32::try_from(-precision).ok().and_then(|p| 10_i128.checked_pow(p)) else {
                    return Ok(Value::Int(0));
                };
                let (quotient, rest) = (n.div_euclid(unit), n.rem_euclid(unit));
                let up = match (rest * 2).cmp(&unit) {
                    Ordering::Greater => true,
                    Ordering::Equal => quotient % 2 != 0,
                    Ordering::Less => false,
                };
                Ok(Value::Int((quotient + i128::from(up)) * unit))
            }
            (Value::Float(n), _) if none => Ok(Value::Int(format::whole(format::round(*n, 0)?)?)),
            (Value::Float(n), _) => Ok(Value::Float(format::round(*n, precision)?)),
            _ => Err(type_error(format!("type {} doesn't define __round__ method", value.type_name()))),
        };
    }
    // 10 ** precision is an integer, or a float where negative.
    let unit = integers_power(precision)?;
    let scaled = match (&value, &unit, value.as_int()) {
        (_, Value::Int(unit), Some(n)) => {
            let n = n.checked_mul(*unit).ok_or_else(|| fail("the integer is too large"))?;
            Value::Int(n)
        }
        (Value::Float(n), _, _) => Value::Float(n * as_float(&unit)),
        (_, _, Some(n)) => Value::Float(n as f64 * as_float(&unit)),
        _ => return Err(type_error(format!("must be real number, not {}", value.type_name()))),
    };
    let whole = match scaled {
        Value::Float(n) => format::whole(if method == "ceil" { n.ceil() } else { n.floor() })?,
        other => other.as_int().unwrap_or(0),
    };
    if whole.unsigned_abs() > 1 << 53 {
        return Err(fail("rounding so large a number is not supported"));
    }
    Ok(Value::Float(whole as f64 / as_float(&unit)))
}

fn as_float(value: &Value) -> f64 {
    match value {
        Value::Float(n) => *n,
        other => other.as_int().unwrap_or(0) as f64,
    }
}

fn integers_power(precision: i128) -> Result<Value> {
    if precision < 0 {
        return Ok(Value::Float(10_f64.powi(i32::try_from(precision).unwrap_or(i32::MIN))));
    }
    let power = u32::try_from(precision).ok().and_then(|p| 10_i128.checked_pow(p));
    power.map(Value::Int).ok_or_else(|| fail("round: the precision is too large"))
}

fn striptags(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    args.none("striptags")?;
    let mut text = value.text(interp)?.to_string();
    interp.spend_text(text.len() * 4)?;
    // Comments first, then tags, then white space.
    while let Some(start) = text.find("<!--") {
        let Some(end) = text[start..].find("-->") else { break };
        text.replace_range(start..start + end + 3, "");
        interp.spend_text(text.len())?;
    }
    while let Some(start) = text.find('<') {
        let Some(end) = text[start..].find('>') else { break };
        text.replace_range(start..start + end + 1, "");
        interp.spend_text(text.len())?;
    }
    let joined = text.split(unicode::space).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
    if joined.contains('&') {
        return Err(fail("`striptags` of text with `&` is not supported"));
    }
    Ok(Value::str(joined))
}

fn sum(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [attribute, start] = args.bind("sum", ["attribute", "start"])?;
    let getter = match attribute {
        None | Some(Value::None) => None,
        Some(attribute) => Some(Getter::new(Some(&attribute), false, None)?),
    };
    let mut total = start.unwrap_or(Value::Int(0));
    if total.as_str().is_some() {
        return Err(type_error("sum() can't sum strings [use ''.join(seq) instead]"));
    }
    for item in interp.items(&value)? {
        let item = match &getter {
            Some(getter) => getter.get(interp, &item)?,
            None => item,
        };
        total = ops::binary(interp, BinaryOp::Add, &total, &item)?;
    }
    Ok(total)
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, as transformers defines it.
fn tojson(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [ascii, indent, separators, sort_keys] =
        args.bind("tojson", ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text),
        Some(value) => {
            let width = integer(&value, "tojson")?.max(0);
            interp.spend_text(usize::try_from(width).unwrap_or(usize::MAX))?;
            Some(" ".repeat(width as usize).into())
        }
    };
    let separators = match separators {
        None | Some(Value::None) => None,
        Some(pair) => {
            let parts = interp.items(&pair)?;
            match &parts[..] {
                [Value::Str(item), Value::Str(key)] => Some((item.clone(), key.clone())),
                _ => return Err(type_error("tojson: separators are two strings")),
            }
        }
    };
    let style = Style { indent, separators, sort_keys: truth(sort_keys), ensure_ascii: truth(ascii) };
    Ok(Value::str(dumps(interp, &value, &style)?))
}

fn trim(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [chars] = args.bind("trim", ["chars"])?;
    let text = value.text(interp)?;
    interp.spend_text(text.len())?;
    let chars = match chars {
        None | Some(Value::None) => None,
        Some(chars) => match chars.as_str() {
            Some(chars) => Some(chars.clone()),
            None => return Err(type_error("strip arg must be None or str")),
        },
    };
    let cut = methods::strip(&text, chars.as_deref(), true, true);
    Ok(match value {
        Value::Markup(_) => Value::Markup(cut.into()),
        Value::Str(text) if cut.len() == text.len() => Value::Str(text),
        _ => Value::str(cut),
    })
}

fn truncate(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [length, kill, end, leeway] = args.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let length = match length {
        Some(length) => integer(&length, "truncate")?,
        None => 255,
    };
    let end: Arc<str> = match end {
        None => "...".into(),
        Some(end) => match end.as_str() {
            Some(end) => end.clone(),
            None => return Err(type_error("truncate: the end must be a string")),
        },
    };
    let leeway = match leeway {
        None | Some(Value::None) => 5,
        Some(leeway) => integer(&leeway, "truncate")?,
    };
    let end_len = super::value::char_count(&end) as i128;
    if length < end_len {
        return Err(fail(format!("expected length >= {end_len}, got {length}")));
    }
    if leeway < 0 {
        return Err(fail(format!("expected leeway >= 0, got {leeway}")));
    }
    if value.len()? as i128 <= length + leeway {
        return Ok(value);
    }
    let Value::Str(text) = &value else {
        return Err(type_error(format!("truncate: a string is needed, not {}", value.type_name())));
    };
    interp.spend_text(text.len())?;
    let cut: String = text.chars().take((length - end_len) as usize).collect();
    let kept = match cut.rfind(' ') {
        Some(at) if !truth(kill) => &cut[..at],
        _ => &cut,
    };
    Ok(Value::str(format!("{kept}{end}")))
}

fn quote(text: &str, query: bool, out: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(char::from(byte)),
            b'/' if !query => out.push('/'),
            b' ' if query => out.push('+'),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
}

fn urlencode(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    args.none("urlencode")?;
    let mut out = String::new();
    if value.as_str().is_some() || !value.is_iterable() {
        let text = value.text(interp)?;
        interp.spend_text(text.len() * 3)?;
        quote(&text, false, &mut out);
        return Ok(Value::str(out));
    }
    let items = match &value {
        Value::Dict(dict) => pairs(dict)?,
        other => interp.items(other)?,
    };
    for (i, item) in items.iter().enumerate() {
        let parts = interp.items(item)?;
        let [key, value] = &parts[..] else {
            return Err(value_error("urlencode: an item is no pair"));
        };
        if i > 0 {
            out.push('&');
        }
        for (part, after) in [(key, "="), (value, "")] {
            let text = part.text(interp)?;
            interp.spend_text(text.len() * 3)?;
            quote(&text, true, &mut out);
            out.push_str(after);
        }
    }
    Ok(Value::str(out))
}

fn xmlattr(interp: &mut Interp<'_>, value: Value, args: Args) -> Result<Value> {
    let [autospace] = args.bind("xmlattr", ["autospace"])?;
    let autospace = autospace.is_none_or(|v| v.truth());
    let dict = match &value {
        Value::Dict(dict) => dict,
        Value::Undefined(message) => return Err(undefined_error(message)),
        other => return Err(type_error(format!("'{}' object has no attribute 'items'", other.type_name()))),
    };
    let mut parts = Vec::new();
    for (key, value) in dict.entries() {
        if matches!(value, Value::None | Value::Undefined(_)) {
            continue;
        }
        let Some(name) = key.as_str() else { return Err(type_error("expected string or bytes-like object")) };
        if name.contains([' ', '\t', '\n', '\r', '\u{b}', '\u{c}', '/', '>', '=']) {
            return Err(value_error(format!("Invalid character in attribute name: '{name}'")));
        }
        let safe = |i: &Interp<'_>, v: &Value| match v {
            Value::Markup(text) => Ok(text.to_string()),
            v => escaped(i, v),
        };
        parts.push(format!("{}=\"{}\"", safe(interp, key)?, safe(interp, value)?));
    }
    let mut out = parts.join(" ");
    if autospace && !out.is_empty() {
        out.insert(0, ' ');
    }
    interp.spend_text(out.len())?;
    Ok(Value::str(out))
}
