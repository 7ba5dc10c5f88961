//! A Jinja2 engine for chat templates, with the rules of Python's Jinja2 as transformers sets it up.
//!
//! Chat templates are written for Jinja2 and lean on Python: `True` is printed with a capital, `'%.2f' % x` formats,
//! generators are truthy, `x.items` is the method even where a key has that name. An engine with rules of its own
//! renders other text without a sign, so this one follows Jinja2 3.1 and Python; what it cannot do alike it refuses
//! with an error (see `docs/TEMPLATES.md`).
//!
//! A template is foreign code: a budget of steps and bytes bounds each rendering, and so does the stack it may use;
//! nothing can be included or changed.
//!
//! `lex` and `parse` make the tree (`ast`), `eval` walks it; `value`, `ops`, `methods`, `format`, `filters` and `tests`
//! are Python's part.

mod ast;
mod eval;
mod filters;
mod format;
mod lex;
mod methods;
mod ops;
mod parse;
mod tests;
mod unicode;
mod value;

use std::collections::HashMap;
use std::sync::Arc;

pub(crate) use ast::Sym;
pub(crate) use eval::Interp;
pub(crate) use format::float_repr;
pub(crate) use value::{Dict, Value};

/// What kind of Python exception an error would be, as far as somebody asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Syntax,
    /// `TypeError`.
    Type,
    /// `ValueError`, `OverflowError`, `ZeroDivisionError`.
    Value,
    /// `UndefinedError`.
    Undefined,
    /// `raise_exception`.
    Raised,
    /// The budget is spent.
    Fuel,
    /// Arguments that are spelled as a string were to be printed as an object.
    Spelled,
    /// Anything else.
    Other,
}

#[derive(Clone, Debug)]
pub(crate) struct Error {
    pub(crate) kind: Kind,
    pub(crate) detail: String,
    /// From 1; 0 where unknown.
    pub(crate) line: u32,
}

impl Error {
    fn new(kind: Kind, detail: impl Into<String>) -> Box<Error> {
        Box::new(Error { kind, detail: detail.into(), line: 0 })
    }
}

/// What `dumps` fails with.
pub(crate) type JsonError = Box<Error>;

pub(crate) type Result<T> = std::result::Result<T, Box<Error>>;

fn fail(detail: impl Into<String>) -> Box<Error> {
    Error::new(Kind::Other, detail)
}

fn type_error(detail: impl Into<String>) -> Box<Error> {
    Error::new(Kind::Type, detail)
}

fn value_error(detail: impl Into<String>) -> Box<Error> {
    Error::new(Kind::Value, detail)
}

/// Arguments of a call.
#[derive(Default)]
pub(crate) struct Args {
    pos: Vec<Value>,
    kw: Vec<(Arc<str>, Value)>,
}

impl Args {
    /// Puts the arguments in the places of `names`; a name in capitals can only be given by its place.
    fn bind<const N: usize>(self, what: &str, names: [&str; N]) -> Result<[Option<Value>; N]> {
        let mut out = [const { None }; N];
        if self.pos.len() > N {
            return Err(type_error(format!(
                "{what}: takes at most {N} arguments, {} are given",
                self.pos.len()
            )));
        }
        for (slot, value) in out.iter_mut().zip(self.pos) {
            *slot = Some(value);
        }
        for (name, value) in self.kw {
            match names.iter().position(|n| **n == *name) {
                Some(at) if out[at].is_none() => out[at] = Some(value),
                Some(_) => return Err(type_error(format!("{what}: argument '{name}' is given twice"))),
                None => return Err(type_error(format!("{what}: unexpected keyword argument '{name}'"))),
            }
        }
        Ok(out)
    }

    fn none(self, what: &str) -> Result<()> {
        self.bind::<0>(what, []).map(|_| ())
    }
}

/// A parsed template.
pub(crate) struct Template {
    tree: ast::Tree,
    syms: HashMap<Arc<str>, Sym>,
}

impl Template {
    /// Reads a template.
    pub(crate) fn parse(source: &str) -> Result<Template> {
        let tree = parse::parse(source)?;
        let syms = tree.names.iter().enumerate().map(|(i, name)| (name.clone(), i as Sym)).collect();
        Ok(Template { tree, syms })
    }

    /// A rendering with `fuel` steps; `now` (seconds since 1970, UTC) is what `strftime_now` writes.
    pub(crate) fn start(&self, fuel: u64, now: i64) -> Interp<'_> {
        Interp::new(&self.tree, fuel, now, |name| self.syms.get(name).copied())
    }

    /// The variable `name`, if the template names it at all.
    pub(crate) fn sym(&self, name: &str) -> Option<Sym> {
        self.syms.get(name).copied()
    }
}
