//! What a template is made of once it is read.

use std::sync::Arc;

use super::filters::Filter;
use super::tests::Test;

/// A variable's name, as its place in the template's list of names.
pub(crate) type Sym = u32;

pub(crate) struct Expr {
    pub(super) line: u32,
    pub(super) kind: ExprKind,
}

#[derive(Clone)]
pub(crate) enum Literal {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum BinaryOp {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum CompareOp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

pub(crate) enum ExprKind {
    Literal(Literal),
    Name(Sym),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attr(Box<Expr>, Arc<str>),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, [Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Box<CallArgs>),
    Filter(Option<Box<Expr>>, Arc<str>, Option<Filter>, Box<CallArgs>),
    Test(Box<Expr>, Arc<str>, Option<Test>, Box<CallArgs>),
    Not(Box<Expr>),
    Neg(Box<Expr>),
    Pos(Box<Expr>),
    Binary(BinaryOp, Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(CompareOp, Expr)>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    If { test: Box<Expr>, then: Box<Expr>, otherwise: Option<Box<Expr>> },
}

#[derive(Default)]
pub(crate) struct CallArgs {
    pub(super) args: Vec<Expr>,
    pub(super) kwargs: Vec<(Arc<str>, Expr)>,
    pub(super) star: Option<Expr>,
    pub(super) star_star: Option<Expr>,
}

pub(crate) enum Target {
    Name(Sym),
    /// `namespace.attribute`.
    Attr(Sym, Arc<str>),
    Tuple(Vec<Target>),
}

pub(crate) struct ForNode {
    pub(super) target: Target,
    pub(super) iter: Expr,
    pub(super) filter: Option<Expr>,
    pub(super) body: Vec<Stmt>,
    pub(super) otherwise: Vec<Stmt>,
    pub(super) recursive: bool,
}

pub(crate) struct MacroNode {
    pub(super) name: Option<Arc<str>>,
    pub(super) params: Vec<(Sym, Arc<str>)>,
    /// Defaults of the last parameters.
    pub(super) defaults: Vec<Expr>,
    pub(super) body: Vec<Stmt>,
    /// The body names them, so that they may be given.
    pub(super) uses_caller: bool,
    pub(super) uses_varargs: bool,
    pub(super) uses_kwargs: bool,
}

pub(crate) enum Stmt {
    Data(Arc<str>),
    Print(Expr),
    If {
        arms: Vec<(Expr, Vec<Stmt>)>,
        otherwise: Vec<Stmt>,
    },
    For(Arc<ForNode>),
    Set {
        target: Target,
        value: Expr,
    },
    SetBlock {
        target: Target,
        filter: Option<Expr>,
        body: Vec<Stmt>,
        line: u32,
    },
    Macro {
        sym: Sym,
        node: Arc<MacroNode>,
    },
    CallBlock {
        call: Expr,
        node: Arc<MacroNode>,
    },
    FilterBlock {
        filter: Expr,
        body: Vec<Stmt>,
    },
    With {
        pairs: Vec<(Target, Expr)>,
        body: Vec<Stmt>,
    },
    /// `generation` and `block`: a scope of its own.
    Scope(Vec<Stmt>),
    Break,
    Continue,
}

/// A template that was read.
pub(crate) struct Tree {
    pub(super) body: Vec<Stmt>,
    /// Names of variables; the first are those of `parse::KNOWN`.
    pub(super) names: Vec<Arc<str>>,
}
