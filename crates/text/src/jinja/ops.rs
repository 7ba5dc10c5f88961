//! Operators and slices.

use super::ast::BinaryOp;
use super::eval::Interp;
use super::value::{Value, char_count, range_len, undefined_error};
use super::{Error, Result, fail, format, type_error, value_error};

fn too_large() -> Box<Error> {
    fail("an integer beyond 128 bits is not supported")
}

/// Where index `index` of `len` items is, counted from the end where negative.
pub(super) fn position(index: i128, len: usize) -> Option<usize> {
    let at = if index < 0 { index + len as i128 } else { index };
    (0..len as i128).contains(&at).then_some(at as usize)
}

pub(super) fn char_at(text: &str, index: i128) -> Option<char> {
    if text.is_ascii() {
        return position(index, text.len()).map(|at| char::from(text.as_bytes()[at]));
    }
    position(index, char_count(text)).and_then(|at| text.chars().nth(at))
}

/// Start, step and number of items of a slice, as Python's `slice.indices` has them.
fn bounds(given: [Option<i128>; 3], len: usize) -> Result<(i128, i128, usize)> {
    let len = len as i128;
    let step = given[2].unwrap_or(1).clamp(-(1 << 62), 1 << 62);
    if step == 0 {
        return Err(value_error("slice step cannot be zero"));
    }
    let (low, high) = if step < 0 { (-1, len - 1) } else { (0, len) };
    let place = |bound: Option<i128>, default: i128| match bound {
        None => default,
        Some(at) if at < 0 => at.saturating_add(len).max(low),
        Some(at) => at.min(high),
    };
    let (first, last) = if step < 0 { (high, low) } else { (low, high) };
    let start = place(given[0], first);
    let stop = place(given[1], last);
    Ok((start, step, range_len(start, stop, step) as usize))
}

/// `value[a:b:c]`.
pub(super) fn slice(interp: &Interp<'_>, value: &Value, given: [Option<i128>; 3]) -> Result<Value> {
    match value {
        Value::Str(text) | Value::Markup(text) => {
            interp.spend_text(text.len())?;
            let cut = if text.is_ascii() {
                let (start, step, count) = bounds(given, text.len())?;
                if step == 1 {
                    text[start as usize..start as usize + count].to_owned()
                } else {
                    let bytes = text.as_bytes();
                    (0..count).map(|i| char::from(bytes[(start + i as i128 * step) as usize])).collect()
                }
            } else {
                let chars: Vec<char> = text.chars().collect();
                let (start, step, count) = bounds(given, chars.len())?;
                (0..count).map(|i| chars[(start + i as i128 * step) as usize]).collect::<String>()
            };
            Ok(match value {
                Value::Markup(_) => Value::Markup(cut.into()),
                _ => Value::str(cut),
            })
        }
        Value::List(items) | Value::Tuple(items) => {
            let (start, step, count) = bounds(given, items.items.len())?;
            interp.spend(count as u64)?;
            let cut = (0..count).map(|i| items.items[(start + i as i128 * step) as usize].clone()).collect();
            if matches!(value, Value::List(_)) { Value::list(cut) } else { Value::tuple(cut) }
        }
        Value::Range(start, stop, step) => {
            let len = range_len(*start, *stop, *step) as usize;
            let (from, by, count) = bounds(given, len)?;
            let begin = start + from * step;
            let step = step * by;
            // Python writes the end that the bounds give, not the last item.
            if given[2].is_some_and(|s| s != 1) || count == 0 {
                return Err(fail("slices of ranges with a step or without items are not supported"));
            }
            Ok(Value::Range(begin, begin + count as i128 * step, step))
        }
        Value::Undefined(message) => Err(undefined_error(message)),
        Value::Dict(_) => Err(type_error("unhashable type: 'slice'")),
        other => Err(type_error(format!("'{}' object is not subscriptable", other.type_name()))),
    }
}

pub(super) fn negate(value: &Value) -> Result<Value> {
    match (value, value.as_int()) {
        (_, Some(n)) => n.checked_neg().map(Value::Int).ok_or_else(too_large),
        (Value::Float(n), _) => Ok(Value::Float(-n)),
        (Value::Undefined(message), _) => Err(undefined_error(message)),
        _ => Err(type_error(format!("bad operand type for unary -: '{}'", value.type_name()))),
    }
}

pub(super) fn positive(value: &Value) -> Result<Value> {
    match (value, value.as_int()) {
        (_, Some(n)) => Ok(Value::Int(n)),
        (Value::Float(n), _) => Ok(Value::Float(*n)),
        (Value::Undefined(message), _) => Err(undefined_error(message)),
        _ => Err(type_error(format!("bad operand type for unary +: '{}'", value.type_name()))),
    }
}

/// A number as a float; integers that are too large for one are refused as Python refuses them.
fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Float(n) => Some(*n),
        other => other.as_int().map(|n| n as f64),
    }
}

fn symbol(op: BinaryOp) -> &'static str {
    match op {
        BinaryOp::Add => "+",
        BinaryOp::Sub => "-",
        BinaryOp::Mul => "*",
        BinaryOp::Div => "/",
        BinaryOp::FloorDiv => "//",
        BinaryOp::Mod => "%",
        BinaryOp::Pow => "** or pow()",
    }
}

pub(super) fn binary(interp: &mut Interp<'_>, op: BinaryOp, a: &Value, b: &Value) -> Result<Value> {
    if op == BinaryOp::Mod
        && let Value::Str(text) | Value::Markup(text) = a
    {
        if matches!(a, Value::Markup(_)) {
            return Err(fail("`%` on a text marked as safe is not supported"));
        }
        let text = text.clone();
        return Ok(Value::str(format::printf(interp, &text, b)?));
    }
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return integers(op, a, b);
    }
    if let (Some(x), Some(y)) = (float(a), float(b)) {
        return floats(op, x, y);
    }
    match (op, a, b) {
        (_, Value::Undefined(message), _) => return Err(undefined_error(message)),
        (BinaryOp::Add, Value::Str(x), Value::Str(y)) => {
            interp.spend_text(x.len() + y.len())?;
            return Ok(Value::str([&**x, &**y].concat()));
        }
        (BinaryOp::Add, Value::Str(_) | Value::Markup(_), Value::Str(_) | Value::Markup(_)) => {
            let mut out = String::new();
            for part in [a, b] {
                match part {
                    Value::Markup(text) => out.push_str(text),
                    other => out.push_str(&format::escape_html(&other.text(interp)?)),
                }
            }
            interp.spend_text(out.len())?;
            return Ok(Value::Markup(out.into()));
        }
        (BinaryOp::Add, Value::List(x), Value::List(y)) => {
            interp.spend((x.items.len() + y.items.len()) as u64)?;
            return Value::list(x.items.iter().chain(&y.items).cloned().collect());
        }
        (BinaryOp::Add, Value::Tuple(x), Value::Tuple(y)) => {
            interp.spend((x.items.len() + y.items.len()) as u64)?;
            return Value::tuple(x.items.iter().chain(&y.items).cloned().collect());
        }
        (BinaryOp::Mul, _, _) => {
            let pair = match (a.as_int(), b.as_int()) {
                (Some(n), None) => Some((b, n)),
                (None, Some(n)) => Some((a, n)),
                _ => None,
            };
            if let Some((value, n)) = pair {
                if i64::try_from(n).is_err() {
                    return Err(value_error("cannot fit 'int' into an index-sized integer"));
                }
                let times = n.clamp(0, 1 << 40) as usize;
                match value {
                    Value::Str(text) | Value::Markup(text) => {
                        interp.spend_text(text.len().saturating_mul(times))?;
                        let text = text.repeat(times);
                        return Ok(match value {
                            Value::Markup(_) => Value::Markup(text.into()),
                            _ => Value::str(text),
                        });
                    }
                    Value::List(items) | Value::Tuple(items) => {
                        let count = items.items.len().saturating_mul(times);
                        interp.spend(count as u64)?;
                        let repeated = (0..times).flat_map(|_| items.items.iter().cloned()).collect();
                        return match value {
                            Value::List(_) => Value::list(repeated),
                            _ => Value::tuple(repeated),
                        };
                    }
                    _ => {}
                }
            }
        }
        (BinaryOp::Sub, Value::View(..), _) | (BinaryOp::Sub, _, Value::View(..)) => {
            return Err(fail("sets made of views are not supported"));
        }
        _ => {}
    }
    if let Value::Undefined(message) = b {
        return Err(undefined_error(message));
    }
    if op == BinaryOp::Add && a.as_str().is_some() {
        return Err(type_error(format!("can only concatenate str (not \"{}\") to str", b.type_name())));
    }
    Err(type_error(format!(
        "unsupported operand type(s) for {}: '{}' and '{}'",
        symbol(op),
        a.type_name(),
        b.type_name()
    )))
}

fn integers(op: BinaryOp, a: i128, b: i128) -> Result<Value> {
    let zero = || value_error("division by zero");
    let int = |n: Option<i128>| n.map(Value::Int).ok_or_else(too_large);
    match op {
        BinaryOp::Add => int(a.checked_add(b)),
        BinaryOp::Sub => int(a.checked_sub(b)),
        BinaryOp::Mul => int(a.checked_mul(b)),
        BinaryOp::Div => {
            const EXACT: u128 = 1 << 53;
            if b == 0 {
                return Err(zero());
            }
            if a.unsigned_abs() > EXACT || b.unsigned_abs() > EXACT {
                return Err(fail("dividing integers beyond 2**53 is not supported"));
            }
            Ok(Value::Float(a as f64 / b as f64))
        }
        BinaryOp::FloorDiv => {
            if b == 0 {
                return Err(zero());
            }
            let quotient = a.checked_div(b).ok_or_else(too_large)?;
            Ok(Value::Int(quotient - i128::from(a % b != 0 && (a < 0) != (b < 0))))
        }
        BinaryOp::Mod => {
            if b == 0 {
                return Err(zero());
            }
            let rest = a.checked_rem(b).unwrap_or(0);
            Ok(Value::Int(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }))
        }
        BinaryOp::Pow => {
            if b < 0 {
                if a == 0 {
                    return Err(value_error("0.0 cannot be raised to a negative power"));
                }
                return floats(op, a as f64, b as f64);
            }
            match a {
                0 | 1 => Ok(Value::Int(if b == 0 { 1 } else { a })),
                -1 => Ok(Value::Int(if b % 2 == 0 { 1 } else { -1 })),
                _ => int(u32::try_from(b).ok().and_then(|b| a.checked_pow(b))),
            }
        }
    }
}

/// Quotient and rest of floats as Python's `divmod` gives them.
fn divmod(a: f64, b: f64) -> (f64, f64) {
    let mut rest = a % b;
    let mut quotient = (a - rest) / b;
    if rest != 0.0 {
        if (b < 0.0) != (rest < 0.0) {
            rest += b;
            quotient -= 1.0;
        }
    } else {
        rest = 0.0_f64.copysign(b);
    }
    let floor = if quotient != 0.0 {
        let floor = quotient.floor();
        if quotient - floor > 0.5 { floor + 1.0 } else { floor }
    } else {
        0.0_f64.copysign(a / b)
    };
    (floor, rest)
}

fn floats(op: BinaryOp, a: f64, b: f64) -> Result<Value> {
    let zero = |what: &str| value_error(format!("float {what} by zero"));
    Ok(Value::Float(match op {
        BinaryOp::Add => a + b,
        BinaryOp::Sub => a - b,
        BinaryOp::Mul => a * b,
        BinaryOp::Div if b == 0.0 => return Err(zero("division")),
        BinaryOp::Div => a / b,
        BinaryOp::FloorDiv if b == 0.0 => return Err(zero("floor division")),
        BinaryOp::FloorDiv => divmod(a, b).0,
        BinaryOp::Mod if b == 0.0 => return Err(zero("modulo")),
        BinaryOp::Mod => divmod(a, b).1,
        BinaryOp::Pow => {
            if a == 0.0 && b < 0.0 {
                return Err(value_error("0.0 cannot be raised to a negative power"));
            }
            let power = a.powf(b);
            if power.is_nan() && !a.is_nan() && !b.is_nan() {
                return Err(fail("complex numbers are not supported"));
            }
            if power.is_infinite() && a.is_finite() && b.is_finite() {
                return Err(value_error("(34, 'Numerical result out of range')"));
            }
            power
        }
    }))
}
