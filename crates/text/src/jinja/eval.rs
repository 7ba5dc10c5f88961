//! Walks the tree.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::ast::*;
use super::parse::{CALLER, KWARGS, LOOP, VARARGS};
use super::value::{
    Cycler, Dict, Function, Items, Macro, Namespace, Stream, Value, compare, equal, pairs, range_len,
    undefined_error,
};
use super::{Args, Error, Kind, Result, fail, filters, methods, ops, tests, type_error, value_error};

/// Stack that one rendering may use.
const STACK: usize = 640 << 10;
/// Longest `range`.
const MAX_RANGE: i128 = 100_000;

/// Variables of one scope.
#[derive(Default)]
pub(crate) struct Frame {
    pub(super) vars: RefCell<Vec<(Sym, Value)>>,
}

/// One rendering.
pub(crate) struct Interp<'t> {
    tree: &'t Tree,
    globals: Vec<Option<Value>>,
    /// Scopes from the outermost to the current one.
    frames: Vec<Rc<Frame>>,
    fuel: Cell<u64>,
    pub(super) now: i64,
    stack_start: usize,
    /// Things that could hold themselves; emptied at the end.
    namespaces: Vec<Rc<Namespace>>,
    kept: Vec<Rc<Frame>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

enum Source {
    Items(Rc<Items>, usize),
    Vec(std::vec::IntoIter<Value>),
    Stream(Rc<Stream>),
}

/// `loop`.
pub(crate) struct LoopState {
    source: RefCell<Source>,
    /// Items of the source; unknown for generators and filtered loops.
    length: Cell<Option<usize>>,
    peeked: RefCell<Option<Value>>,
    /// What is left in the source passed the filter already.
    filtered: Cell<bool>,
    index: Cell<usize>,
    previous: RefCell<Option<Value>>,
    current: RefCell<Option<Value>>,
    changed: RefCell<Option<Value>>,
    depth0: usize,
    node: Arc<ForNode>,
    /// Scopes around the loop, where it is filtered or recursive.
    frames: Vec<Rc<Frame>>,
}

impl LoopState {
    pub(super) fn index0(&self) -> usize {
        self.index.get() - 1
    }
}

impl Drop for Interp<'_> {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            namespace.attrs.borrow_mut().clear();
        }
        for frame in &self.kept {
            frame.vars.borrow_mut().clear();
        }
    }
}

impl<'t> Interp<'t> {
    pub(super) fn new(tree: &'t Tree, fuel: u64, now: i64, sym: impl Fn(&str) -> Option<Sym>) -> Interp<'t> {
        let mut globals = vec![None; tree.names.len()];
        for (name, function) in [
            ("range", Function::Range),
            ("dict", Function::Dict),
            ("namespace", Function::Namespace),
            ("cycler", Function::Cycler),
            ("joiner", Function::Joiner),
            ("lipsum", Function::Lipsum),
            ("raise_exception", Function::RaiseException),
            ("strftime_now", Function::StrftimeNow),
        ] {
            if let Some(sym) = sym(name) {
                globals[sym as usize] = Some(Value::Function(function));
            }
        }
        Interp {
            tree,
            globals,
            frames: vec![Rc::default()],
            fuel: Cell::new(fuel),
            now,
            stack_start: 0,
            namespaces: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Sets a variable of the context.
    pub(crate) fn define(&mut self, sym: Sym, value: Value) {
        self.globals[sym as usize] = Some(value);
    }

    /// Renders.
    pub(crate) fn render(&mut self) -> Result<String> {
        let marker = 0u8;
        self.stack_start = std::ptr::from_ref(&marker) as usize;
        super::value::start_comparing();
        let mut out = String::new();
        let tree = self.tree;
        self.exec(&tree.body, &mut out)?;
        Ok(out)
    }

    /// Takes steps from the budget.
    pub(crate) fn spend(&self, steps: u64) -> Result<()> {
        let left = self.fuel.get();
        if left < steps {
            return Err(Error::new(Kind::Fuel, "the template spent its budget of steps and text (fuel)"));
        }
        self.fuel.set(left - steps);
        Ok(())
    }

    /// Takes the price of a text of so many bytes from the budget.
    pub(crate) fn spend_text(&self, bytes: usize) -> Result<()> {
        self.spend(bytes as u64 / 64)
    }

    fn check_stack(&self) -> Result<()> {
        let marker = 0u8;
        let here = std::ptr::from_ref(&marker) as usize;
        if self.stack_start.abs_diff(here) > STACK {
            return Err(fail("the template calls itself too often (recursion limit)"));
        }
        Ok(())
    }

    pub(super) fn name(&self, sym: Sym) -> &Arc<str> {
        &self.tree.names[sym as usize]
    }

    fn lookup(&self, sym: Sym) -> Value {
        for frame in self.frames.iter().rev() {
            if let Some(value) = Interp::frame_value(frame, sym) {
                return value;
            }
        }
        match &self.globals[sym as usize] {
            Some(value) => value.clone(),
            None => Value::undefined(format!("'{}' is undefined", self.name(sym))),
        }
    }

    fn assign_name(&mut self, sym: Sym, value: Value) {
        if let Some(frame) = self.frames.last() {
            let mut vars = frame.vars.borrow_mut();
            match vars.iter_mut().find(|(s, _)| *s == sym) {
                Some(slot) => slot.1 = value,
                None => vars.push((sym, value)),
            }
        }
    }

    fn assign(&mut self, target: &Target, value: Value) -> Result<()> {
        match target {
            Target::Name(sym) => self.assign_name(*sym, value),
            Target::Attr(sym, attr) => {
                let Value::Namespace(namespace) = self.lookup(*sym) else {
                    return Err(fail("cannot assign attribute on non-namespace object"));
                };
                set_attr(&namespace, attr.clone(), value)?;
            }
            Target::Tuple(targets) => {
                let items = self.items(&value)?;
                if items.len() != targets.len() {
                    return Err(value_error(format!(
                        "cannot unpack {} values into {} names",
                        items.len(),
                        targets.len()
                    )));
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item)?;
                }
            }
        }
        Ok(())
    }

    fn scoped<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.frames.push(Rc::default());
        let result = run(self);
        self.frames.pop();
        result
    }

    fn exec(&mut self, body: &[Stmt], out: &mut String) -> Result<Flow> {
        for statement in body {
            match self.exec_one(statement, out)? {
                Flow::Next => {}
                flow => return Ok(flow),
            }
        }
        Ok(Flow::Next)
    }

    fn exec_one(&mut self, statement: &Stmt, out: &mut String) -> Result<Flow> {
        self.spend(1)?;
        match statement {
            Stmt::Data(text) => {
                self.spend_text(text.len())?;
                out.push_str(text);
            }
            Stmt::Print(value) => {
                let line = value.line;
                let value = self.eval(value)?;
                value.print(out, self).map_err(|e| at(e, line))?;
            }
            Stmt::If { arms, otherwise } => {
                for (test, body) in arms {
                    if self.eval(test)?.truth() {
                        return self.exec(body, out);
                    }
                }
                return self.exec(otherwise, out);
            }
            Stmt::For(node) => {
                let line = node.iter.line;
                let value = self.eval(&node.iter)?;
                self.run_loop(node, value, 0, out).map_err(|e| at(e, line))?;
            }
            Stmt::Set { target, value } => {
                let line = value.line;
                let value = self.eval(value)?;
                self.assign(target, value).map_err(|e| at(e, line))?;
            }
            Stmt::SetBlock { target, filter, body, line } => {
                let value = self.scoped(|i| {
                    let mut text = String::new();
                    i.exec(body, &mut text)?;
                    let text = Value::str(text);
                    match filter {
                        Some(filter) => i.block_filter(filter, text),
                        None => Ok(text),
                    }
                })?;
                self.assign(target, value).map_err(|e| at(e, *line))?;
            }
            Stmt::Macro { sym, node } => {
                let value = self.make_macro(node);
                self.assign_name(*sym, value);
            }
            Stmt::CallBlock { call, node } => {
                let caller = self.make_macro(node);
                let value = self.eval_call(call, Some(caller)).map_err(|e| at(e, call.line))?;
                value.print(out, self).map_err(|e| at(e, call.line))?;
            }
            Stmt::FilterBlock { filter, body } => {
                let value = self.scoped(|i| {
                    let mut text = String::new();
                    i.exec(body, &mut text)?;
                    i.block_filter(filter, Value::str(text))
                })?;
                value.print(out, self).map_err(|e| at(e, filter.line))?;
            }
            Stmt::With { pairs, body } => {
                let mut values = Vec::with_capacity(pairs.len());
                for (_, value) in pairs {
                    values.push(self.eval(value)?);
                }
                return self.scoped(|i| {
                    for ((target, expr), value) in pairs.iter().zip(values) {
                        i.assign(target, value).map_err(|e| at(e, expr.line))?;
                    }
                    i.exec(body, out)
                });
            }
            Stmt::Scope(body) => return self.scoped(|i| i.exec(body, out)),
            Stmt::Break => return Ok(Flow::Break),
            Stmt::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn block_filter(&mut self, filter: &Expr, text: Value) -> Result<Value> {
        let ExprKind::Filter(inner, name, found, args) = &filter.kind else {
            return Err(fail("a block's filter is no filter"));
        };
        let value = match inner {
            Some(inner) => self.block_filter(inner, text)?,
            None => text,
        };
        self.apply_filter(value, name, *found, args).map_err(|e| at(e, filter.line))
    }

    fn make_macro(&mut self, node: &Arc<MacroNode>) -> Value {
        let frames = self.frames[1..].to_vec();
        self.kept.extend(frames.iter().cloned());
        Value::Macro(Rc::new(Macro { node: node.clone(), frames }))
    }

    /// Runs a loop over a value and its `else`.
    fn run_loop(&mut self, node: &Arc<ForNode>, value: Value, depth0: usize, out: &mut String) -> Result<()> {
        self.check_stack()?;
        let (source, length) = match value {
            Value::List(items) | Value::Tuple(items) => {
                let length = items.items.len();
                (Source::Items(items, 0), Some(length))
            }
            Value::Iter(stream) => (Source::Stream(stream), None),
            value => {
                let items = self.items(&value)?;
                let length = items.len();
                (Source::Vec(items.into_iter()), Some(length))
            }
        };
        let keeps = node.filter.is_some() || node.recursive;
        let state = Rc::new(LoopState {
            source: RefCell::new(source),
            length: Cell::new(length.filter(|_| node.filter.is_none())),
            peeked: RefCell::new(None),
            filtered: Cell::new(node.filter.is_none()),
            index: Cell::new(0),
            previous: RefCell::new(None),
            current: RefCell::new(None),
            changed: RefCell::new(None),
            depth0,
            node: node.clone(),
            frames: if keeps { self.frames.clone() } else { Vec::new() },
        });
        let level = self.frames.len();
        self.frames.push(Rc::default());
        let completed = self.iterate(&state, out);
        self.frames.truncate(level);
        // A loop that holds itself in its items would never be freed.
        state.current.replace(None);
        state.previous.replace(None);
        if !completed? && !node.otherwise.is_empty() {
            self.scoped(|i| i.exec(&node.otherwise, out))?;
        }
        Ok(())
    }

    /// Whether the body was run to its end at least once, which is what Jinja2's `else` goes by.
    fn iterate(&mut self, state: &Rc<LoopState>, out: &mut String) -> Result<bool> {
        let node = state.node.clone();
        let mut completed = false;
        while let Some(item) = self.fetch(state)? {
            self.spend(1)?;
            state.index.set(state.index.get() + 1);
            let before = state.current.replace(Some(item.clone()));
            state.previous.replace(before);
            if let Some(frame) = self.frames.last_mut() {
                if Rc::strong_count(frame) == 1 {
                    frame.vars.borrow_mut().clear();
                } else {
                    *frame = Rc::default();
                }
                frame.vars.borrow_mut().push((LOOP, Value::Loop(state.clone())));
            }
            self.assign(&node.target, item)?;
            match self.exec(&node.body, out)? {
                Flow::Next => completed = true,
                Flow::Continue => {}
                Flow::Break => break,
            }
        }
        if let Some(frame) = self.frames.last() {
            frame.vars.borrow_mut().clear();
        }
        Ok(completed)
    }

    fn fetch(&mut self, state: &LoopState) -> Result<Option<Value>> {
        if let Some(item) = state.peeked.take() {
            return Ok(Some(item));
        }
        loop {
            let item = match &mut *state.source.borrow_mut() {
                Source::Items(items, at) => {
                    let item = items.items.get(*at).cloned();
                    *at += 1;
                    item
                }
                Source::Vec(items) => items.next(),
                Source::Stream(stream) => stream.rest.borrow_mut().pop_front(),
            };
            let Some(item) = item else { return Ok(None) };
            let Some(filter) = state.node.filter.as_ref().filter(|_| !state.filtered.get()) else {
                return Ok(Some(item));
            };
            self.spend(1)?;
            let frames = std::mem::replace(&mut self.frames, state.frames.clone());
            self.frames.push(Rc::default());
            let kept = self.assign(&state.node.target, item.clone()).and_then(|()| self.eval(filter));
            self.frames = frames;
            if kept?.truth() {
                return Ok(Some(item));
            }
        }
    }

    fn peek(&mut self, state: &LoopState) -> Result<Option<Value>> {
        if state.peeked.borrow().is_none() {
            let next = self.fetch(state)?;
            state.peeked.replace(next);
        }
        Ok(state.peeked.borrow().clone())
    }

    /// `loop.length` where it is known already.
    pub(super) fn loop_length(&self, state: &LoopState) -> Result<usize> {
        state
            .length
            .get()
            .ok_or_else(|| fail("the length of a filtered loop cannot be printed with the loop"))
    }

    fn full_length(&mut self, state: &LoopState) -> Result<usize> {
        if let Some(length) = state.length.get() {
            return Ok(length);
        }
        let mut rest = Vec::new();
        while let Some(item) = self.fetch(state)? {
            self.spend(1)?;
            rest.push(item);
        }
        let length = state.index.get() + rest.len();
        state.length.set(Some(length));
        state.filtered.set(true);
        state.source.replace(Source::Vec(rest.into_iter()));
        Ok(length)
    }

    /// `loop.name`.
    fn loop_attr(&mut self, state: &Rc<LoopState>, name: &str) -> Result<Option<Value>> {
        let int = |n: usize| Ok(Some(Value::Int(n as i128)));
        match name {
            "index" => int(state.index.get()),
            "index0" => int(state.index0()),
            "first" => Ok(Some(Value::Bool(state.index0() == 0))),
            "last" => Ok(Some(Value::Bool(self.peek(state)?.is_none()))),
            "length" => int(self.full_length(state)?),
            "revindex" => int(self.full_length(state)? - state.index0()),
            "revindex0" => int(self.full_length(state)? - state.index.get()),
            "depth" => int(state.depth0 + 1),
            "depth0" => int(state.depth0),
            "previtem" => Ok(Some(match (state.index0(), &*state.previous.borrow()) {
                (1.., Some(value)) => value.clone(),
                _ => Value::undefined("there is no previous item"),
            })),
            "nextitem" => {
                let next = self.peek(state)?;
                Ok(Some(next.unwrap_or_else(|| Value::undefined("there is no next item"))))
            }
            "cycle" | "changed" => {
                Ok(Some(Value::Method(Rc::new((Value::Loop(state.clone()), name.into())))))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn call_loop(&mut self, state: &Rc<LoopState>, name: &str, args: Args) -> Result<Value> {
        match name {
            "cycle" => {
                if !args.kw.is_empty() {
                    return Err(type_error("loop.cycle: takes no keyword arguments"));
                }
                if args.pos.is_empty() {
                    return Err(type_error("no items for cycling given"));
                }
                Ok(args.pos[state.index0() % args.pos.len()].clone())
            }
            _ => {
                if !args.kw.is_empty() {
                    return Err(type_error("loop.changed: takes no keyword arguments"));
                }
                let value = Value::tuple(args.pos)?;
                let differs = match &*state.changed.borrow() {
                    Some(last) => !equal(last, &value)?,
                    None => true,
                };
                state.changed.replace(Some(value));
                Ok(Value::Bool(differs))
            }
        }
    }

    pub(super) fn eval(&mut self, expr: &Expr) -> Result<Value> {
        self.spend(1)?;
        match self.eval_inner(expr) {
            Ok(value) => Ok(value),
            Err(error) => Err(at(error, expr.line)),
        }
    }

    fn eval_all(&mut self, items: &[Expr]) -> Result<Vec<Value>> {
        let mut out = Vec::with_capacity(items.len());
        for item in items {
            out.push(self.eval(item)?);
        }
        Ok(out)
    }

    fn eval_inner(&mut self, expr: &Expr) -> Result<Value> {
        match &expr.kind {
            ExprKind::Literal(literal) => Ok(match literal {
                Literal::None => Value::None,
                Literal::Bool(value) => Value::Bool(*value),
                Literal::Int(value) => Value::Int(*value),
                Literal::Float(value) => Value::Float(*value),
                Literal::Str(text) => Value::Str(text.clone()),
            }),
            ExprKind::Name(sym) => Ok(self.lookup(*sym)),
            ExprKind::Attr(value, name) => {
                let value = self.eval(value)?;
                self.get_attr(&value, name)
            }
            ExprKind::Item(value, index) => {
                let value = self.eval(value)?;
                let index = self.eval(index)?;
                self.get_item(&value, &index)
            }
            ExprKind::Compare(first, rest) => self.eval_compare(first, rest),
            ExprKind::And(a, b) => {
                let value = self.eval(a)?;
                if value.truth() { self.eval(b) } else { Ok(value) }
            }
            ExprKind::Or(a, b) => {
                let value = self.eval(a)?;
                if value.truth() { Ok(value) } else { self.eval(b) }
            }
            ExprKind::Not(value) => Ok(Value::Bool(!self.eval(value)?.truth())),
            ExprKind::Call(..) => {
                self.check_stack()?;
                self.eval_call(expr, None)
            }
            ExprKind::Filter(value, name, filter, args) => {
                let Some(value) = value else { return Err(fail("a filter without a value")) };
                let value = self.eval(value)?;
                self.apply_filter(value, name, *filter, args)
            }
            ExprKind::Test(value, name, test, args) => {
                let value = self.eval(value)?;
                let Some(test) = test else { return Err(fail(format!("No test named '{name}'."))) };
                let args = self.eval_args(args, None)?;
                Ok(Value::Bool(test(self, &value, args)?))
            }
            ExprKind::Binary(op, a, b) => {
                let a = self.eval(a)?;
                let b = self.eval(b)?;
                ops::binary(self, *op, &a, &b)
            }
            ExprKind::Concat(parts) => self.eval_concat(parts),
            ExprKind::If { test, then, otherwise } => {
                if self.eval(test)?.truth() {
                    self.eval(then)
                } else if let Some(otherwise) = otherwise {
                    self.eval(otherwise)
                } else {
                    Ok(Value::undefined(
                        "the inline if-expression evaluated to false and no else section was defined.",
                    ))
                }
            }
            _ => self.eval_rare(expr),
        }
    }

    /// Kept apart, so that the frames of the common kinds stay small.
    #[inline(never)]
    fn eval_rare(&mut self, expr: &Expr) -> Result<Value> {
        match &expr.kind {
            ExprKind::List(items) => Value::list(self.eval_all(items)?),
            ExprKind::Tuple(items) => Value::tuple(self.eval_all(items)?),
            ExprKind::Dict(pairs) => {
                let mut entries = Vec::with_capacity(pairs.len());
                for (key, value) in pairs {
                    let key = self.eval(key)?;
                    entries.push((key, self.eval(value)?));
                }
                Ok(Value::dict(Dict::build(entries, self)?))
            }
            ExprKind::Slice(value, bounds) => {
                let value = self.eval(value)?;
                let mut given = [None, None, None];
                for (slot, bound) in given.iter_mut().zip(bounds) {
                    if let Some(bound) = bound {
                        *slot = match self.eval(bound)? {
                            Value::None => None,
                            other => match other.as_int() {
                                Some(n) => Some(n),
                                None => {
                                    return Err(type_error(
                                        "slice indices must be integers or None or have an __index__ method",
                                    ));
                                }
                            },
                        };
                    }
                }
                ops::slice(self, &value, given)
            }
            ExprKind::Neg(value) => {
                let value = self.eval(value)?;
                ops::negate(&value)
            }
            ExprKind::Pos(value) => {
                let value = self.eval(value)?;
                ops::positive(&value)
            }
            _ => Err(fail("an expression of an unknown kind")),
        }
    }

    #[inline(never)]
    fn eval_concat(&mut self, parts: &[Expr]) -> Result<Value> {
        let mut out = String::new();
        for part in parts {
            let value = self.eval(part)?;
            value.print(&mut out, self)?;
        }
        Ok(Value::str(out))
    }

    #[inline(never)]
    fn eval_compare(&mut self, first: &Expr, rest: &[(CompareOp, Expr)]) -> Result<Value> {
        let mut left = self.eval(first)?;
        for (op, right) in rest {
            let right = self.eval(right)?;
            if !self.compare(*op, &left, &right)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    pub(super) fn compare(&mut self, op: CompareOp, a: &Value, b: &Value) -> Result<bool> {
        use std::cmp::Ordering::{Greater, Less};
        // Comparing two long things costs what it reads.
        if let (Value::List(x), Value::List(_)) = (a, b) {
            self.spend(x.items.len() as u64)?;
        }
        Ok(match op {
            CompareOp::Eq => equal(a, b)?,
            CompareOp::Ne => !equal(a, b)?,
            CompareOp::Lt => compare(a, b, "<")? == Some(Less),
            CompareOp::Gt => compare(a, b, ">")? == Some(Greater),
            CompareOp::Le => matches!(compare(a, b, "<=")?, Some(o) if o != Greater),
            CompareOp::Ge => matches!(compare(a, b, ">=")?, Some(o) if o != Less),
            CompareOp::In => self.contains(b, a)?,
            CompareOp::NotIn => !self.contains(b, a)?,
        })
    }

    /// `item in container`.
    pub(super) fn contains(&mut self, container: &Value, item: &Value) -> Result<bool> {
        match container {
            Value::Str(text) | Value::Markup(text) => match item.as_str() {
                Some(part) => {
                    self.spend_text(text.len())?;
                    Ok(text.contains(&**part))
                }
                None => Err(type_error(format!(
                    "'in <string>' requires string as left operand, not {}",
                    item.type_name()
                ))),
            },
            Value::Dict(dict) => Ok(dict.get(item)?.is_some()),
            Value::Range(start, stop, step) => match item {
                Value::Bool(_) | Value::Int(_) => {
                    let n = item.as_int().unwrap_or(0);
                    let count = range_len(*start, *stop, *step);
                    let offset = n - start;
                    Ok(offset % step == 0 && (0..count).contains(&(offset / step)))
                }
                _ => {
                    let items = self.items(container)?;
                    self.any_equal(&items, item)
                }
            },
            Value::List(items) | Value::Tuple(items) => {
                let items = items.clone();
                self.any_equal(&items.items, item)
            }
            Value::Iter(stream) => loop {
                let next = stream.rest.borrow_mut().pop_front();
                match next {
                    None => return Ok(false),
                    Some(next) if equal(&next, item)? => return Ok(true),
                    Some(_) => self.spend(1)?,
                }
            },
            other if other.is_iterable() => {
                if matches!(other, Value::View(super::value::View::Keys, _)) {
                    super::value::hashable(item)?;
                }
                let items = self.items(other)?;
                self.any_equal(&items, item)
            }
            other => Err(type_error(format!("argument of type '{}' is not iterable", other.type_name()))),
        }
    }

    fn any_equal(&self, items: &[Value], item: &Value) -> Result<bool> {
        self.spend(items.len() as u64 / 4)?;
        for other in items {
            if equal(other, item)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What walking over a value gives.
    pub(super) fn items(&self, value: &Value) -> Result<Vec<Value>> {
        let items: Vec<Value> = match value {
            Value::Undefined(_) => Vec::new(),
            Value::Str(text) | Value::Markup(text) => {
                let mut utf8 = [0; 4];
                text.chars().map(|c| Value::str(&*c.encode_utf8(&mut utf8))).collect()
            }
            Value::List(items) | Value::Tuple(items) => items.items.clone(),
            Value::Dict(dict) => dict.entries().iter().map(|(key, _)| key.clone()).collect(),
            Value::View(super::value::View::Keys, dict) => {
                dict.entries().iter().map(|(k, _)| k.clone()).collect()
            }
            Value::View(super::value::View::Values, dict) => {
                dict.entries().iter().map(|(_, v)| v.clone()).collect()
            }
            Value::View(super::value::View::Items, dict) => pairs(dict)?,
            Value::Range(start, stop, step) => {
                let count = range_len(*start, *stop, *step);
                (0..count).map(|i| Value::Int(start + i * step)).collect()
            }
            Value::Iter(stream) => stream.rest.borrow_mut().drain(..).collect(),
            other => return Err(type_error(format!("'{}' object is not iterable", other.type_name()))),
        };
        self.spend(items.len() as u64)?;
        Ok(items)
    }

    pub(super) fn get_attr(&mut self, value: &Value, name: &Arc<str>) -> Result<Value> {
        if let Some(found) = self.python_attr(value, name)? {
            return Ok(found);
        }
        if let Value::Dict(dict) = value
            && let Some(found) = dict.get_str(name)
        {
            return Ok(found.clone());
        }
        Ok(missing(value, name))
    }

    /// Python's `getattr`, as far as the sandbox allows it.
    pub(super) fn python_attr(&mut self, value: &Value, name: &Arc<str>) -> Result<Option<Value>> {
        match value {
            Value::Undefined(message) => return Err(undefined_error(message)),
            Value::Namespace(namespace) => {
                let attrs = namespace.attrs.borrow();
                return Ok(attrs.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()));
            }
            Value::Loop(state) => return self.loop_attr(state, name),
            Value::Tuple(items) if items.group => match &**name {
                "grouper" => return Ok(Some(items.items[0].clone())),
                "list" => return Ok(Some(items.items[1].clone())),
                _ => {}
            },
            Value::Cycler(cycler) => match &**name {
                "current" => return Ok(Some(cycler.items[cycler.at.get()].clone())),
                "next" | "reset" => {}
                "items" | "pos" => {
                    return Err(fail("attributes of a cycler besides `current` are not supported"));
                }
                _ => return Ok(None),
            },
            Value::Joiner(state) => match &**name {
                "sep" => return Ok(Some(Value::Str(state.0.clone()))),
                "used" => return Ok(Some(Value::Bool(state.1.get()))),
                _ => return Ok(None),
            },
            Value::Macro(value) => {
                return match &**name {
                    "name" => Ok(Some(value.node.name.clone().map_or(Value::None, Value::Str))),
                    "arguments" => {
                        let names =
                            value.node.params.iter().map(|(_, name)| Value::Str(name.clone())).collect();
                        Ok(Some(Value::tuple(names)?))
                    }
                    "catch_kwargs" => Ok(Some(Value::Bool(value.node.uses_kwargs))),
                    "catch_varargs" => Ok(Some(Value::Bool(value.node.uses_varargs))),
                    "caller" => Ok(Some(Value::Bool(value.node.uses_caller))),
                    _ => Ok(None),
                };
            }
            _ => {}
        }
        match methods::find(value, name) {
            methods::Found::Method => Ok(Some(Value::Method(Rc::new((value.clone(), name.clone()))))),
            methods::Found::Value(found) => Ok(Some(found)),
            methods::Found::Unsafe => Ok(Some(Value::undefined(format!(
                "access to attribute '{name}' of '{}' object is unsafe.",
                value.type_name()
            )))),
            methods::Found::Unsupported => {
                Err(fail(format!("`{name}` of '{}' objects is not supported here", value.type_name())))
            }
            methods::Found::Nothing => Ok(None),
        }
    }

    pub(super) fn get_item(&mut self, value: &Value, index: &Value) -> Result<Value> {
        match value {
            Value::Undefined(message) => return Err(undefined_error(message)),
            Value::Dict(dict) => {
                // A key that cannot be one is no error here.
                if let Ok(Some(found)) = dict.get(index) {
                    return Ok(found.clone());
                }
            }
            Value::List(items) | Value::Tuple(items) => {
                if let Some(index) = index.as_int() {
                    return Ok(match ops::position(index, items.items.len()) {
                        Some(at) => items.items[at].clone(),
                        None => {
                            Value::undefined(format!("{} object has no element {index}", value.type_name()))
                        }
                    });
                }
            }
            Value::Str(text) | Value::Markup(text) => {
                if let Some(index) = index.as_int() {
                    return Ok(match ops::char_at(text, index) {
                        Some(c) => Value::str(&*c.encode_utf8(&mut [0; 4])),
                        None => Value::undefined(format!("str object has no element {index}")),
                    });
                }
            }
            Value::Range(start, stop, step) => {
                if let Some(index) = index.as_int() {
                    let count = range_len(*start, *stop, *step) as usize;
                    return Ok(match ops::position(index, count) {
                        Some(at) => Value::Int(start + at as i128 * step),
                        None => Value::undefined(format!("range object has no element {index}")),
                    });
                }
            }
            _ => {}
        }
        if let Some(name) = index.as_str()
            && let Some(found) = self.python_attr(value, name)?
        {
            return Ok(found);
        }
        match index.as_str() {
            Some(name) => Ok(missing(value, name)),
            None => Ok(Value::undefined(format!("'{} object' has no such element", value.type_name()))),
        }
    }

    fn eval_args(&mut self, args: &CallArgs, caller: Option<Value>) -> Result<Args> {
        let mut out = Args { pos: self.eval_all(&args.args)?, kw: Vec::with_capacity(args.kwargs.len()) };
        for (name, value) in &args.kwargs {
            out.kw.push((name.clone(), self.eval(value)?));
        }
        if let Some(star) = &args.star {
            let more = self.eval(star)?;
            out.pos.extend(self.items(&more)?);
        }
        if let Some(star_star) = &args.star_star {
            match self.eval(star_star)? {
                Value::Dict(dict) => {
                    for (key, value) in dict.entries() {
                        let Some(key) = key.as_str() else {
                            return Err(type_error("keywords must be strings"));
                        };
                        if out.kw.iter().any(|(k, _)| k == key) {
                            return Err(type_error(format!(
                                "got multiple values for keyword argument '{key}'"
                            )));
                        }
                        out.kw.push((key.clone(), value.clone()));
                    }
                }
                other => {
                    return Err(type_error(format!(
                        "argument after ** must be a mapping, not {}",
                        other.type_name()
                    )));
                }
            }
        }
        if let Some(caller) = caller {
            out.kw.push((self.name(CALLER).clone(), caller));
        }
        Ok(out)
    }

    #[inline(never)]
    fn eval_call(&mut self, expr: &Expr, caller: Option<Value>) -> Result<Value> {
        let ExprKind::Call(callee, args) = &expr.kind else { return Err(fail("not a call")) };
        if let ExprKind::Attr(object, name) = &callee.kind {
            let object = self.eval(object)?;
            // The usual method call without a value for the method in between.
            if matches!(object, Value::Str(_) | Value::Dict(_) | Value::List(_))
                && let methods::Found::Method = methods::find(&object, name)
            {
                let args = self.eval_args(args, caller)?;
                return methods::call(self, &object, name, args);
            }
            let callee = self.get_attr(&object, name)?;
            let args = self.eval_args(args, caller)?;
            return self.call(&callee, args);
        }
        let callee = self.eval(callee)?;
        let args = self.eval_args(args, caller)?;
        self.call(&callee, args)
    }

    fn apply_filter(
        &mut self,
        value: Value,
        name: &str,
        filter: Option<filters::Filter>,
        args: &CallArgs,
    ) -> Result<Value> {
        let Some(filter) = filter else { return Err(fail(format!("No filter named '{name}'."))) };
        let args = self.eval_args(args, None)?;
        filter(self, value, args)
    }

    /// Calls a filter by its name.
    pub(super) fn call_filter(&mut self, name: &Value, value: Value, args: Args) -> Result<Value> {
        let filter = name.as_str().and_then(|name| filters::find(name));
        match filter {
            Some(filter) => filter(self, value, args),
            None => Err(fail(format!("No filter named {}.", quoted(name, self)))),
        }
    }

    /// Calls a test by its name.
    pub(super) fn call_test(&mut self, name: &Value, value: &Value, args: Args) -> Result<bool> {
        let test = name.as_str().and_then(|name| tests::find(name));
        match test {
            Some(test) => test(self, value, args),
            None => Err(fail(format!("No test named {}.", quoted(name, self)))),
        }
    }

    pub(super) fn call(&mut self, callee: &Value, args: Args) -> Result<Value> {
        match callee {
            Value::Undefined(message) => Err(undefined_error(message)),
            Value::Method(method) => {
                let method = method.clone();
                match &method.0 {
                    Value::Loop(state) => self.call_loop(state, &method.1, args),
                    object => methods::call(self, object, &method.1, args),
                }
            }
            Value::Macro(value) => {
                let value = value.clone();
                self.call_macro(&value, args)
            }
            Value::Function(function) => self.call_function(*function, args),
            Value::Joiner(state) => {
                args.none("joiner")?;
                Ok(if state.1.replace(true) { Value::Str(state.0.clone()) } else { Value::str("") })
            }
            Value::Loop(state) => {
                let state = state.clone();
                let [value] = args.bind("loop", ["iterable"])?;
                if !state.node.recursive {
                    return Err(type_error(
                        "The loop must have the 'recursive' marker to be called recursively.",
                    ));
                }
                let Some(value) = value else { return Err(type_error("loop: an argument is missing")) };
                let frames = std::mem::replace(&mut self.frames, state.frames.clone());
                let mut out = String::new();
                let result = self.run_loop(&state.node, value, state.depth0 + 1, &mut out);
                self.frames = frames;
                result?;
                Ok(Value::str(out))
            }
            other => Err(type_error(format!("'{}' object is not callable", other.type_name()))),
        }
    }

    fn call_macro(&mut self, value: &Macro, args: Args) -> Result<Value> {
        self.check_stack()?;
        let node = value.node.clone();
        let name = node.name.as_deref().unwrap_or("caller");
        let frame: Rc<Frame> = Rc::default();
        let mut frames = Vec::with_capacity(value.frames.len() + 2);
        frames.push(self.frames[0].clone());
        frames.extend(value.frames.iter().cloned());
        frames.push(frame.clone());
        let Args { mut pos, mut kw } = args;
        let rest = if pos.len() > node.params.len() { pos.split_off(node.params.len()) } else { Vec::new() };
        let given = pos.len();
        let mut values: Vec<Option<Value>> = pos.into_iter().map(Some).collect();
        for (_, param) in &node.params[given..] {
            let at = kw.iter().position(|(key, _)| key == param);
            values.push(at.map(|at| kw.remove(at).1));
        }
        if node.uses_caller {
            let at = kw.iter().position(|(key, _)| &**key == "caller");
            let caller = at.map_or_else(|| Value::undefined("No caller defined"), |at| kw.remove(at).1);
            frame.vars.borrow_mut().push((CALLER, caller));
        }
        if node.uses_kwargs {
            let entries = kw.drain(..).map(|(key, value)| (Value::Str(key), value)).collect();
            frame.vars.borrow_mut().push((KWARGS, Value::dict(Dict::from_entries(entries)?)));
        } else if let Some((key, _)) = kw.first() {
            return Err(type_error(format!("macro '{name}' takes no keyword argument '{key}'")));
        }
        if node.uses_varargs {
            frame.vars.borrow_mut().push((VARARGS, Value::tuple(rest)?));
        } else if !rest.is_empty() {
            return Err(type_error(format!(
                "macro '{name}' takes not more than {} argument(s)",
                node.params.len()
            )));
        }
        let outer = std::mem::replace(&mut self.frames, frames);
        let result = self.macro_body(&node, values);
        self.frames = outer;
        result
    }

    fn macro_body(&mut self, node: &MacroNode, values: Vec<Option<Value>>) -> Result<Value> {
        let without = node.params.len() - node.defaults.len();
        for (i, ((sym, name), value)) in node.params.iter().zip(values).enumerate() {
            let value = match value {
                Some(value) => value,
                None if i >= without => self.eval(&node.defaults[i - without])?,
                None => Value::undefined(format!("parameter '{name}' was not provided")),
            };
            self.assign_name(*sym, value);
        }
        let mut out = String::new();
        self.exec(&node.body, &mut out)?;
        self.spend_text(out.len())?;
        Ok(Value::str(out))
    }

    /// `dict(…)`.
    pub(super) fn make_dict(&mut self, what: &str, args: Args) -> Result<Dict> {
        let mut entries = Vec::new();
        if args.pos.len() > 1 {
            return Err(type_error(format!("{what} expected at most 1 argument, got {}", args.pos.len())));
        }
        if let Some(from) = args.pos.into_iter().next() {
            match &from {
                Value::Dict(dict) => entries.extend(dict.entries().iter().cloned()),
                other => {
                    for pair in self.items(other)? {
                        let mut parts = self.items(&pair)?.into_iter();
                        match (parts.next(), parts.next(), parts.next()) {
                            (Some(key), Some(value), None) => entries.push((key, value)),
                            _ => {
                                return Err(value_error(format!(
                                    "{what}: an element of the sequence is no pair"
                                )));
                            }
                        }
                    }
                }
            }
        }
        entries.extend(args.kw.into_iter().map(|(key, value)| (Value::Str(key), value)));
        Dict::build(entries, self)
    }

    fn call_function(&mut self, function: Function, args: Args) -> Result<Value> {
        match function {
            Function::Range => {
                if !args.kw.is_empty() {
                    return Err(type_error("range() takes no keyword arguments"));
                }
                let mut numbers = Vec::new();
                for value in &args.pos {
                    match value.as_int() {
                        Some(n) if n.unsigned_abs() < 1 << 100 => numbers.push(n),
                        Some(_) => return Err(value_error("range: a number is too large")),
                        None => {
                            return Err(type_error(format!(
                                "'{}' object cannot be interpreted as an integer",
                                value.type_name()
                            )));
                        }
                    }
                }
                let (start, stop, step) = match numbers[..] {
                    [stop] => (0, stop, 1),
                    [start, stop] => (start, stop, 1),
                    [start, stop, step] => (start, stop, step),
                    _ => return Err(type_error("range expected 1 to 3 arguments")),
                };
                if step == 0 {
                    return Err(value_error("range() arg 3 must not be zero"));
                }
                if range_len(start, stop, step) > MAX_RANGE {
                    return Err(value_error(format!(
                        "Range too big. The sandbox blocks ranges larger than {MAX_RANGE}."
                    )));
                }
                Ok(Value::Range(start, stop, step))
            }
            Function::Dict => Ok(Value::dict(self.make_dict("dict", args)?)),
            Function::Namespace => {
                let dict = self.make_dict("namespace", args)?;
                let namespace = Rc::new(Namespace::default());
                for (key, value) in dict.entries() {
                    let Some(key) = key.as_str() else {
                        return Err(fail("attributes of a namespace that are no strings are not supported"));
                    };
                    set_attr(&namespace, key.clone(), value.clone())?;
                }
                self.namespaces.push(namespace.clone());
                Ok(Value::Namespace(namespace))
            }
            Function::Cycler => {
                if args.pos.is_empty() {
                    return Err(fail("at least one item has to be provided"));
                }
                if !args.kw.is_empty() {
                    return Err(type_error("cycler: takes no keyword arguments"));
                }
                // Counts the depth of what it holds.
                Value::list(args.pos.clone())?;
                Ok(Value::Cycler(Rc::new(Cycler { items: args.pos, at: Cell::new(0) })))
            }
            Function::Joiner => {
                let [sep] = args.bind("joiner", ["sep"])?;
                let sep = match sep {
                    Some(Value::Str(sep)) => sep,
                    Some(_) => return Err(fail("joiner: a separator that is no string is not supported")),
                    None => ", ".into(),
                };
                Ok(Value::Joiner(Rc::new((sep, Cell::new(false)))))
            }
            Function::Lipsum => Err(fail("lipsum() writes other text each time and is not supported")),
            Function::RaiseException => {
                let [message] = args.bind("raise_exception", ["message"])?;
                let Some(message) = message else {
                    return Err(type_error("raise_exception: the message is missing"));
                };
                Err(Error::new(Kind::Raised, &*message.text(self)?))
            }
            Function::StrftimeNow => {
                let [format] = args.bind("strftime_now", ["format"])?;
                match format {
                    Some(Value::Str(format)) => {
                        self.spend_text(format.len())?;
                        let text = crate::strftime::strftime(&format, self.now).map_err(fail)?;
                        Ok(Value::str(text))
                    }
                    _ => Err(type_error("strftime_now: the format must be a string")),
                }
            }
        }
    }
}

fn quoted(name: &Value, interp: &Interp<'_>) -> String {
    let mut out = String::new();
    match name.repr(&mut out, interp) {
        Ok(()) => out,
        Err(_) => "?".into(),
    }
}

fn missing(value: &Value, name: &str) -> Value {
    let object = match value {
        Value::None => "None".to_string(),
        other => format!("'{} object'", other.type_name()),
    };
    Value::undefined(format!("{object} has no attribute '{name}'"))
}

pub(super) fn set_attr(namespace: &Namespace, name: Arc<str>, value: Value) -> Result<()> {
    if name.starts_with('_') {
        return Err(fail(format!(
            "chat templates cannot store underscore-prefixed attributes on a namespace, but got '{name}'"
        )));
    }
    let mut attrs = namespace.attrs.borrow_mut();
    match attrs.iter_mut().find(|(key, _)| *key == name) {
        Some(slot) => slot.1 = value,
        None => attrs.push((name, value)),
    }
    Ok(())
}

/// Gives an error the line where it happened, unless it has one.
fn at(mut error: Box<Error>, line: u32) -> Box<Error> {
    if error.line == 0 {
        error.line = line;
    }
    error
}
