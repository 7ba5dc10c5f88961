//! `is …`.

use super::ast::CompareOp;
use super::eval::Interp;
use super::value::{Value, hashable, same};
use super::{Args, Result, ast::BinaryOp, filters, methods, ops, type_error};

pub(crate) type Test = fn(&mut Interp<'_>, &Value, Args) -> Result<bool>;

fn none(args: Args) -> Result<()> {
    args.none("a test")
}

fn one(args: Args) -> Result<Value> {
    let [value] = args.bind("a test", ["other"])?;
    value.ok_or_else(|| type_error("a test: an argument is missing"))
}

fn rest(interp: &mut Interp<'_>, value: &Value, by: &Value) -> Result<Value> {
    ops::binary(interp, BinaryOp::Mod, value, by)
}

fn compares(interp: &mut Interp<'_>, value: &Value, args: Args, op: CompareOp) -> Result<bool> {
    let other = one(args)?;
    interp.compare(op, value, &other)
}

/// The test of a name.
pub(super) fn find(name: &str) -> Option<Test> {
    Some(match name {
        "defined" => |_, v, a| none(a).map(|()| !matches!(v, Value::Undefined(_))),
        "undefined" => |_, v, a| none(a).map(|()| matches!(v, Value::Undefined(_))),
        "none" => |_, v, a| none(a).map(|()| matches!(v, Value::None)),
        "boolean" => |_, v, a| none(a).map(|()| matches!(v, Value::Bool(_))),
        "true" => |_, v, a| none(a).map(|()| matches!(v, Value::Bool(true))),
        "false" => |_, v, a| none(a).map(|()| matches!(v, Value::Bool(false))),
        "integer" => |_, v, a| none(a).map(|()| matches!(v, Value::Int(_))),
        "float" => |_, v, a| none(a).map(|()| matches!(v, Value::Float(_))),
        "number" => |_, v, a| none(a).map(|()| matches!(v, Value::Bool(_) | Value::Int(_) | Value::Float(_))),
        "string" => |_, v, a| none(a).map(|()| v.as_str().is_some()),
        "mapping" => |_, v, a| none(a).map(|()| matches!(v, Value::Dict(_))),
        "iterable" => |_, v, a| none(a).map(|()| v.is_iterable()),
        "sequence" => |_, v, a| {
            none(a)?;
            Ok(match v {
                Value::View(..) => false,
                v => v.len().is_ok(),
            })
        },
        "callable" => |_, v, a| {
            none(a)?;
            // Undefined has a `__call__`, which fails; loops and joiners have one that works.
            Ok(matches!(
                v,
                Value::Undefined(_)
                    | Value::Macro(_)
                    | Value::Function(_)
                    | Value::Method(_)
                    | Value::Joiner(_)
                    | Value::Loop(_)
            ))
        },
        "escaped" => |_, v, a| none(a).map(|()| matches!(v, Value::Markup(_))),
        "lower" => |i, v, a| {
            none(a)?;
            Ok(methods::is_lower(&v.text(i)?))
        },
        "upper" => |i, v, a| {
            none(a)?;
            Ok(methods::is_upper(&v.text(i)?))
        },
        "odd" => |i, v, a| {
            none(a)?;
            let rest = rest(i, v, &Value::Int(2))?;
            i.compare(CompareOp::Eq, &rest, &Value::Int(1))
        },
        "even" => |i, v, a| {
            none(a)?;
            let rest = rest(i, v, &Value::Int(2))?;
            i.compare(CompareOp::Eq, &rest, &Value::Int(0))
        },
        "divisibleby" => |i, v, a| {
            let [by] = a.bind("divisibleby", ["num"])?;
            let by = by.ok_or_else(|| type_error("divisibleby: an argument is missing"))?;
            let rest = rest(i, v, &by)?;
            i.compare(CompareOp::Eq, &rest, &Value::Int(0))
        },
        "sameas" => |_, v, a| Ok(same(v, &one(a)?)),
        "in" => |i, v, a| {
            let [container] = a.bind("in", ["seq"])?;
            let container = container.ok_or_else(|| type_error("in: an argument is missing"))?;
            i.contains(&container, v)
        },
        "filter" => |_, v, a| {
            none(a)?;
            hashable(v)?;
            Ok(v.as_str().is_some_and(|name| filters::find(name).is_some()))
        },
        "test" => |_, v, a| {
            none(a)?;
            hashable(v)?;
            Ok(v.as_str().is_some_and(|name| find(name).is_some()))
        },
        "==" | "eq" | "equalto" => |i, v, a| compares(i, v, a, CompareOp::Eq),
        "!=" | "ne" => |i, v, a| compares(i, v, a, CompareOp::Ne),
        ">" | "gt" | "greaterthan" => |i, v, a| compares(i, v, a, CompareOp::Gt),
        ">=" | "ge" => |i, v, a| compares(i, v, a, CompareOp::Ge),
        "<" | "lt" | "lessthan" => |i, v, a| compares(i, v, a, CompareOp::Lt),
        "<=" | "le" => |i, v, a| compares(i, v, a, CompareOp::Le),
        _ => return None,
    })
}
