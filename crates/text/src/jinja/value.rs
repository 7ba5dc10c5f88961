//! Values of templates, with Python's rules for truth, equality, order and printing.
//!
//! Containers never change after they were made (transformers renders in an immutable sandbox); the exceptions are
//! `namespace`, `cycler`, `joiner` and iterators. Each container knows its depth, so that neither printing nor dropping
//! one recurses without a limit.

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt::Write;
use std::rc::Rc;
use std::sync::Arc;

use super::ast::{MacroNode, Sym};
use super::eval::{Frame, Interp, LoopState};
use super::{Error, Kind, Result, fail, type_error, unicode};

/// Containers nested deeper than this are refused.
pub(super) const MAX_DEPTH: u32 = 200;
/// Objects larger than this find their keys through a table.
const INDEXED: usize = 12;

#[derive(Clone)]
pub(crate) enum Value {
    /// Jinja2's lenient `Undefined`, with what it says when it is used after all.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    /// Text marked as safe HTML (`safe`, `escape`).
    Markup(Arc<str>),
    List(Rc<Items>),
    Tuple(Rc<Items>),
    Dict(Rc<Dict>),
    View(View, Rc<Dict>),
    Range(i128, i128, i128),
    /// A generator: can be walked once.
    Iter(Rc<Stream>),
    Namespace(Rc<Namespace>),
    Macro(Rc<Macro>),
    Function(Function),
    /// A method that was looked up.
    Method(Rc<(Value, Arc<str>)>),
    Loop(Rc<LoopState>),
    Cycler(Rc<Cycler>),
    Joiner(Rc<(Arc<str>, Cell<bool>)>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    Keys,
    Values,
    Items,
}

/// What the environment defines.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Function {
    Range,
    Dict,
    Namespace,
    Cycler,
    Joiner,
    Lipsum,
    RaiseException,
    StrftimeNow,
}

pub(crate) struct Items {
    pub(super) items: Vec<Value>,
    /// A tuple of `groupby`, which has `grouper` and `list`.
    pub(super) group: bool,
    depth: u32,
}

pub(crate) struct Stream {
    pub(super) rest: RefCell<std::collections::VecDeque<Value>>,
    pub(super) depth: u32,
}

pub(crate) struct Cycler {
    pub(super) items: Vec<Value>,
    pub(super) at: Cell<usize>,
}

pub(crate) struct Macro {
    pub(super) node: Arc<MacroNode>,
    /// Frames beyond the outermost one in which the macro was defined.
    pub(super) frames: Vec<Rc<Frame>>,
}

#[derive(Default)]
pub(crate) struct Namespace {
    pub(super) attrs: RefCell<Vec<(Arc<str>, Value)>>,
}

pub(crate) struct Dict {
    entries: Vec<(Value, Value)>,
    index: Option<HashMap<Arc<str>, usize>>,
    depth: u32,
    /// Arguments of a tool call that the conversation spells as a string: printed as such, never as an object.
    pub(super) spelled: bool,
}

impl Items {
    pub(crate) fn items(&self) -> &[Value] {
        &self.items
    }
}

impl Dict {
    pub(crate) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }

    pub(super) fn get_str(&self, key: &str) -> Option<&Value> {
        if let Some(index) = &self.index {
            return index.get(key).map(|i| &self.entries[*i].1);
        }
        self.entries
            .iter()
            .find(|(k, _)| matches!(k, Value::Str(k) | Value::Markup(k) if **k == *key))
            .map(|(_, value)| value)
    }

    pub(super) fn get(&self, key: &Value) -> Result<Option<&Value>> {
        match key {
            Value::Str(text) | Value::Markup(text) => Ok(self.get_str(text)),
            _ => {
                hashable(key)?;
                for (k, value) in &self.entries {
                    if equal(k, key)? {
                        return Ok(Some(value));
                    }
                }
                Ok(None)
            }
        }
    }

    /// Builds an object; later values of a key replace earlier ones in place.
    pub(super) fn build(
        pairs: impl IntoIterator<Item = (Value, Value)>,
        interp: &Interp<'_>,
    ) -> Result<Dict> {
        let mut entries: Vec<(Value, Value)> = Vec::new();
        let mut index: HashMap<Arc<str>, usize> = HashMap::new();
        for (key, value) in pairs {
            interp.spend(1)?;
            let at = match &key {
                Value::Str(text) | Value::Markup(text) => match index.get(text) {
                    Some(at) => Some(*at),
                    None => {
                        index.insert(text.clone(), entries.len());
                        None
                    }
                },
                other => {
                    hashable(other)?;
                    interp.spend(entries.len() as u64 / 8)?;
                    let mut at = None;
                    for (i, (k, _)) in entries.iter().enumerate() {
                        if equal(k, other)? {
                            at = Some(i);
                            break;
                        }
                    }
                    at
                }
            };
            match at {
                Some(at) => entries[at].1 = value,
                None => entries.push((key, value)),
            }
        }
        Dict::from_entries(entries)
    }

    /// Entries whose keys are known to differ.
    pub(crate) fn from_entries(entries: Vec<(Value, Value)>) -> Result<Dict> {
        let depth = depth_over(entries.iter().flat_map(|(k, v)| [k, v]))?;
        let index = (entries.len() > INDEXED).then(|| {
            entries
                .iter()
                .enumerate()
                .filter_map(|(i, (key, _))| match key {
                    Value::Str(text) | Value::Markup(text) => Some((text.clone(), i)),
                    _ => None,
                })
                .collect()
        });
        Ok(Dict { entries, index, depth, spelled: false })
    }
}

fn depth_over<'a>(values: impl Iterator<Item = &'a Value>) -> Result<u32> {
    let mut depth = 0;
    for value in values {
        depth = depth.max(value.depth());
    }
    if depth >= MAX_DEPTH {
        return Err(fail("a value is nested too deeply"));
    }
    Ok(depth + 1)
}

/// Comparisons of one rendering: lists that hold each other several times take exponential time to compare.
const MAX_COMPARED: u64 = 20_000_000;

thread_local! {
    static COMPARED: Cell<u64> = const { Cell::new(0) };
}

/// A new rendering begins on this thread.
pub(super) fn start_comparing() {
    COMPARED.set(0);
}

fn compared(items: usize) -> Result<()> {
    COMPARED.set(COMPARED.get() + items as u64);
    if COMPARED.get() > MAX_COMPARED {
        return Err(Error::new(Kind::Fuel, "the template spent its budget of comparisons (fuel)"));
    }
    Ok(())
}

pub(super) fn hashable(value: &Value) -> Result<()> {
    match value {
        Value::List(_) | Value::Dict(_) | Value::View(..) => {
            Err(type_error(format!("unhashable type: '{}'", value.type_name())))
        }
        Value::Tuple(items) => {
            compared(items.items.len())?;
            items.items.iter().try_for_each(hashable)
        }
        _ => Ok(()),
    }
}

impl Value {
    pub(crate) fn str(text: impl Into<Arc<str>>) -> Value {
        Value::Str(text.into())
    }

    pub(crate) fn list(items: Vec<Value>) -> Result<Value> {
        let depth = depth_over(items.iter())?;
        Ok(Value::List(Rc::new(Items { items, group: false, depth })))
    }

    pub(super) fn tuple(items: Vec<Value>) -> Result<Value> {
        let depth = depth_over(items.iter())?;
        Ok(Value::Tuple(Rc::new(Items { items, group: false, depth })))
    }

    pub(super) fn group(key: Value, items: Value) -> Result<Value> {
        let items = vec![key, items];
        let depth = depth_over(items.iter())?;
        Ok(Value::Tuple(Rc::new(Items { items, group: true, depth })))
    }

    pub(super) fn iter(items: Vec<Value>) -> Result<Value> {
        let depth = depth_over(items.iter())?;
        Ok(Value::Iter(Rc::new(Stream { rest: RefCell::new(items.into()), depth })))
    }

    pub(crate) fn dict(dict: Dict) -> Value {
        Value::Dict(Rc::new(dict))
    }

    pub(super) fn undefined(message: impl Into<Rc<str>>) -> Value {
        Value::Undefined(message.into())
    }

    fn depth(&self) -> u32 {
        match self {
            Value::List(items) | Value::Tuple(items) => items.depth,
            Value::Dict(dict) | Value::View(_, dict) => dict.depth,
            Value::Iter(stream) => stream.depth,
            Value::Method(method) => method.0.depth(),
            Value::Cycler(cycler) => cycler.items.iter().map(Value::depth).max().unwrap_or(0) + 1,
            _ => 0,
        }
    }

    /// JSON as a value, keys in their order.
    pub(crate) fn of(json: &serde_json::Value) -> Result<Value> {
        Ok(match json {
            serde_json::Value::Null => Value::None,
            serde_json::Value::Bool(value) => Value::Bool(*value),
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(value), _, _) => Value::Int(value.into()),
                (None, Some(value), _) => Value::Int(value.into()),
                (None, None, value) => Value::Float(value.unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => Value::str(text.as_str()),
            serde_json::Value::Array(items) => {
                Value::list(items.iter().map(Value::of).collect::<Result<_>>()?)?
            }
            serde_json::Value::Object(map) => Value::of_map(map)?,
        })
    }

    pub(crate) fn of_map(map: &serde_json::Map<String, serde_json::Value>) -> Result<Value> {
        let entries = map
            .iter()
            .map(|(key, value)| Ok((Value::str(key.as_str()), Value::of(value)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Value::dict(Dict::from_entries(entries)?))
    }

    /// The same object, marked as one that the conversation spells as a string.
    pub(crate) fn spelled(self) -> Value {
        match self {
            Value::Dict(dict) => match Rc::try_unwrap(dict) {
                Ok(dict) => Value::dict(Dict { spelled: true, ..dict }),
                Err(dict) => Value::Dict(dict),
            },
            other => other,
        }
    }

    /// Why a value has no JSON.
    pub(crate) fn json_error(detail: &str) -> Box<Error> {
        type_error(format!("tojson: {detail}"))
    }

    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "Undefined",
            Value::None => "NoneType",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::Markup(_) => "Markup",
            Value::List(_) => "list",
            Value::Tuple(_) => "tuple",
            Value::Dict(_) => "dict",
            Value::View(View::Keys, _) => "dict_keys",
            Value::View(View::Values, _) => "dict_values",
            Value::View(View::Items, _) => "dict_items",
            Value::Range(..) => "range",
            Value::Iter(_) => "generator",
            Value::Namespace(_) => "Namespace",
            Value::Macro(_) => "Macro",
            Value::Function(_) => "function",
            Value::Method(_) => "method",
            Value::Loop(_) => "LoopContext",
            Value::Cycler(_) => "Cycler",
            Value::Joiner(_) => "Joiner",
        }
    }

    pub(super) fn as_str(&self) -> Option<&Arc<str>> {
        match self {
            Value::Str(text) | Value::Markup(text) => Some(text),
            _ => None,
        }
    }

    /// Integers and booleans, which are integers too.
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Value::Bool(value) => Some(i128::from(*value)),
            Value::Int(value) => Some(*value),
            _ => None,
        }
    }

    pub(super) fn truth(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(value) => *value,
            Value::Int(value) => *value != 0,
            Value::Float(value) => *value != 0.0,
            Value::Str(text) | Value::Markup(text) => !text.is_empty(),
            Value::List(items) | Value::Tuple(items) => !items.items.is_empty(),
            Value::Dict(dict) | Value::View(_, dict) => !dict.entries.is_empty(),
            Value::Range(start, stop, step) => range_len(*start, *stop, *step) > 0,
            Value::Loop(_) | Value::Iter(_) | Value::Namespace(_) | Value::Macro(_) | Value::Function(_) => {
                true
            }
            Value::Method(_) | Value::Cycler(_) | Value::Joiner(_) => true,
        }
    }

    /// `len(value)`.
    pub(super) fn len(&self) -> Result<usize> {
        Ok(match self {
            Value::Undefined(_) => 0,
            Value::Str(text) | Value::Markup(text) => char_count(text),
            Value::List(items) | Value::Tuple(items) => items.items.len(),
            Value::Dict(dict) | Value::View(_, dict) => dict.entries.len(),
            Value::Range(start, stop, step) => range_len(*start, *stop, *step) as usize,
            other => return Err(type_error(format!("object of type '{}' has no len()", other.type_name()))),
        })
    }

    pub(super) fn is_iterable(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::Str(_) | Value::Markup(_) | Value::List(_) | Value::Tuple(_) => true,
            Value::Dict(_) | Value::View(..) | Value::Range(..) | Value::Iter(_) | Value::Loop(_) => true,
            // Cycler has `__next__` but no `__iter__`; the others have neither.
            _ => false,
        }
    }

    /// `str(value)` into `out`.
    pub(super) fn print(&self, out: &mut String, interp: &Interp<'_>) -> Result<()> {
        match self {
            Value::Undefined(_) => Ok(()),
            Value::Str(text) | Value::Markup(text) => {
                interp.spend_text(text.len())?;
                out.push_str(text);
                Ok(())
            }
            other => other.repr(out, interp),
        }
    }

    /// `str(value)`.
    pub(super) fn text(&self, interp: &Interp<'_>) -> Result<Arc<str>> {
        match self {
            Value::Str(text) | Value::Markup(text) => Ok(text.clone()),
            other => {
                let mut out = String::new();
                other.print(&mut out, interp)?;
                Ok(out.into())
            }
        }
    }

    /// `repr(value)` into `out`.
    pub(super) fn repr(&self, out: &mut String, interp: &Interp<'_>) -> Result<()> {
        self.repr_at(out, interp, 0)
    }

    fn repr_at(&self, out: &mut String, interp: &Interp<'_>, depth: u32) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(fail("a value is nested too deeply"));
        }
        interp.spend(1)?;
        let list = |items: &[Value], out: &mut String| -> Result<()> {
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                item.repr_at(out, interp, depth + 1)?;
            }
            Ok(())
        };
        match self {
            Value::Undefined(_) => out.push_str("Undefined"),
            Value::None => out.push_str("None"),
            Value::Bool(value) => out.push_str(if *value { "True" } else { "False" }),
            Value::Int(value) => {
                let _ = write!(out, "{value}");
            }
            Value::Float(value) => out.push_str(&super::format::float_repr(*value)),
            Value::Str(text) => {
                interp.spend_text(text.len())?;
                repr_str(text, out);
            }
            Value::Markup(text) => {
                interp.spend_text(text.len())?;
                out.push_str("Markup(");
                repr_str(text, out);
                out.push(')');
            }
            Value::List(items) => {
                out.push('[');
                list(&items.items, out)?;
                out.push(']');
            }
            Value::Tuple(items) => {
                out.push('(');
                list(&items.items, out)?;
                if items.items.len() == 1 {
                    out.push(',');
                }
                out.push(')');
            }
            Value::Dict(dict) => {
                if dict.spelled {
                    return Err(Error::new(
                        Kind::Spelled,
                        "arguments of a tool call are printed as they are",
                    ));
                }
                out.push('{');
                for (i, (key, value)) in dict.entries.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    key.repr_at(out, interp, depth + 1)?;
                    out.push_str(": ");
                    value.repr_at(out, interp, depth + 1)?;
                }
                out.push('}');
            }
            Value::View(view, dict) => {
                let (name, items) = match view {
                    View::Keys => ("dict_keys", dict.entries.iter().map(|(k, _)| k.clone()).collect()),
                    View::Values => ("dict_values", dict.entries.iter().map(|(_, v)| v.clone()).collect()),
                    View::Items => ("dict_items", pairs(dict)?),
                };
                let _ = write!(out, "{name}([");
                list(&items, out)?;
                out.push_str("])");
            }
            Value::Range(start, stop, step) => {
                let _ = match step {
                    1 => write!(out, "range({start}, {stop})"),
                    step => write!(out, "range({start}, {stop}, {step})"),
                };
            }
            Value::Namespace(namespace) => {
                out.push_str("<Namespace {");
                for (i, (key, value)) in namespace.attrs.borrow().iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    repr_str(key, out);
                    out.push_str(": ");
                    value.repr_at(out, interp, depth + 1)?;
                }
                out.push_str("}>");
            }
            Value::Macro(value) => {
                let name = value.node.name.as_deref();
                let _ = match name {
                    Some(name) => write!(out, "<Macro '{name}'>"),
                    None => write!(out, "<Macro anonymous>"),
                };
            }
            Value::Loop(state) => {
                let _ = write!(out, "<LoopContext {}/{}>", state.index0() + 1, interp.loop_length(state)?);
            }
            Value::Iter(_) | Value::Function(_) | Value::Method(_) | Value::Cycler(_) | Value::Joiner(_) => {
                return Err(fail(format!(
                    "a {} cannot be printed: Python writes its address in memory",
                    self.type_name()
                )));
            }
        }
        Ok(())
    }
}

/// Items of an object as tuples.
pub(super) fn pairs(dict: &Dict) -> Result<Vec<Value>> {
    dict.entries.iter().map(|(key, value)| Value::tuple(vec![key.clone(), value.clone()])).collect()
}

pub(super) fn char_count(text: &str) -> usize {
    if text.is_ascii() { text.len() } else { text.chars().count() }
}

pub(super) fn range_len(start: i128, stop: i128, step: i128) -> i128 {
    let (low, high, step) = if step > 0 { (start, stop, step) } else { (stop, start, -step) };
    if low >= high { 0 } else { (high - low - 1) / step + 1 }
}

/// Python's `repr` of a string.
pub(super) fn repr_str(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            ' '..='~' => out.push(c),
            c if unicode::printable(c) => out.push(c),
            c => {
                let code = u32::from(c);
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// Compares an integer with a float exactly.
fn int_float(int: i128, float: f64) -> Option<Ordering> {
    if float.is_nan() {
        return None;
    }
    if float >= 1.7e38 {
        return Some(Ordering::Less);
    }
    if float <= -1.7e38 {
        return Some(Ordering::Greater);
    }
    let whole = float.trunc();
    Some(
        int.cmp(&(whole as i128))
            .then_with(|| 0.0_f64.partial_cmp(&(float - whole)).unwrap_or(Ordering::Equal)),
    )
}

/// Order of two numbers; outer `None` if one is none.
fn numbers(a: &Value, b: &Value) -> Option<Option<Ordering>> {
    match (a, b) {
        (Value::Float(a), Value::Float(b)) => Some(a.partial_cmp(b)),
        (Value::Float(a), b) => Some(int_float(b.as_int()?, *a).map(Ordering::reverse)),
        (a, Value::Float(b)) => Some(int_float(a.as_int()?, *b)),
        (a, b) => Some(Some(a.as_int()?.cmp(&b.as_int()?))),
    }
}

/// `a == b`.
pub(super) fn equal(a: &Value, b: &Value) -> Result<bool> {
    let all = |a: &[Value], b: &[Value]| -> Result<bool> {
        if a.len() != b.len() {
            return Ok(false);
        }
        compared(a.len())?;
        for (a, b) in a.iter().zip(b) {
            if !equal(a, b)? {
                return Ok(false);
            }
        }
        Ok(true)
    };
    Ok(match (a, b) {
        (Value::Str(a) | Value::Markup(a), Value::Str(b) | Value::Markup(b)) => a == b,
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            Rc::ptr_eq(a, b) || all(&a.items, &b.items)?
        }
        (Value::Dict(a), Value::Dict(b)) => {
            if Rc::ptr_eq(a, b) {
                return Ok(true);
            }
            if a.entries.len() != b.entries.len() {
                return Ok(false);
            }
            compared(a.entries.len())?;
            for (key, value) in &a.entries {
                match b.get(key)? {
                    Some(other) if equal(value, other)? => {}
                    _ => return Ok(false),
                }
            }
            true
        }
        (Value::Range(a, b, c), Value::Range(d, e, f)) => {
            let (n, m) = (range_len(*a, *b, *c), range_len(*d, *e, *f));
            n == m && (n == 0 || (a == d && (n == 1 || c == f)))
        }
        (Value::View(View::Values, _), _) | (_, Value::View(View::Values, _)) => false,
        (Value::View(..), Value::View(..)) => {
            return Err(fail("views of objects cannot be compared here; make lists of them"));
        }
        (Value::Iter(a), Value::Iter(b)) => Rc::ptr_eq(a, b),
        (Value::Namespace(a), Value::Namespace(b)) => Rc::ptr_eq(a, b),
        (Value::Macro(a), Value::Macro(b)) => Rc::ptr_eq(a, b),
        (Value::Loop(a), Value::Loop(b)) => Rc::ptr_eq(a, b),
        (Value::Cycler(a), Value::Cycler(b)) => Rc::ptr_eq(a, b),
        (Value::Joiner(a), Value::Joiner(b)) => Rc::ptr_eq(a, b),
        (Value::Function(a), Value::Function(b)) => a == b,
        (Value::Method(a), Value::Method(b)) => a.1 == b.1 && same(&a.0, &b.0),
        (a, b) => matches!(numbers(a, b), Some(Some(Ordering::Equal))),
    })
}

/// `a is b`, as far as it does not depend on Python's memory: `None`, booleans, one and the same object.
pub(super) fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::None, Value::None) => true,
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Int(a), Value::Int(b)) => a == b,
        (Value::Str(a), Value::Str(b)) | (Value::Markup(a), Value::Markup(b)) => a == b,
        (Value::Float(a), Value::Float(b)) => a == b,
        (Value::Undefined(a), Value::Undefined(b)) => Rc::ptr_eq(a, b),
        (Value::List(a), Value::List(b)) => Rc::ptr_eq(a, b),
        (Value::Tuple(a), Value::Tuple(b)) => Rc::ptr_eq(a, b) || (a.items.is_empty() && b.items.is_empty()),
        (Value::Dict(a), Value::Dict(b)) => Rc::ptr_eq(a, b),
        (Value::Namespace(_), _) | (Value::Macro(_), _) | (Value::Loop(_), _) | (Value::Function(_), _) => {
            equal(a, b).unwrap_or(false)
        }
        _ => false,
    }
}

/// Order of two values, as `<` and its like and `sort` use it; `None` for what has none (NaN).
pub(super) fn compare(a: &Value, b: &Value, operator: &str) -> Result<Option<Ordering>> {
    if let Some(order) = numbers(a, b) {
        return Ok(order);
    }
    match (a, b) {
        (Value::Str(a) | Value::Markup(a), Value::Str(b) | Value::Markup(b)) => Ok(Some(a.cmp(b))),
        (Value::List(x), Value::List(y)) | (Value::Tuple(x), Value::Tuple(y)) => {
            compared(x.items.len())?;
            for (a, b) in x.items.iter().zip(&y.items) {
                if !equal(a, b)? {
                    return compare(a, b, operator);
                }
            }
            Ok(Some(x.items.len().cmp(&y.items.len())))
        }
        (Value::Undefined(message), _) | (_, Value::Undefined(message)) => Err(undefined_error(message)),
        (Value::View(..), Value::View(..)) => Err(fail("views of objects cannot be ordered here")),
        _ => Err(type_error(format!(
            "'{operator}' not supported between instances of '{}' and '{}'",
            a.type_name(),
            b.type_name()
        ))),
    }
}

pub(super) fn undefined_error(message: &str) -> Box<Error> {
    Error::new(Kind::Undefined, message)
}

impl Interp<'_> {
    /// Defined here, so that frames keep their symbols to themselves.
    pub(super) fn frame_value(frame: &Frame, sym: Sym) -> Option<Value> {
        frame.vars.borrow().iter().find(|(s, _)| *s == sym).map(|(_, value)| value.clone())
    }
}
