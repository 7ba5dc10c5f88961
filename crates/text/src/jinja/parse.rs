//! Tokens to a tree, by Jinja2's grammar (with `break`, `continue` and transformers' `generation`).

use std::collections::HashMap;
use std::sync::Arc;

use super::ast::*;
use super::lex::{Token, normalise, tokenize};
use super::{Error, Kind, Result, filters, tests};

/// Expressions and blocks nested deeper than this are refused.
const MAX_NESTING: u32 = 150;
/// Links of one chain (`a.b.c|d`, `a + b + c`).
const MAX_CHAIN: u32 = 400;

/// Names that the engine itself looks up, in this order at the front of the list of names.
pub(super) const KNOWN: [&str; 4] = ["loop", "caller", "varargs", "kwargs"];
pub(super) const LOOP: Sym = 0;
pub(super) const CALLER: Sym = 1;
pub(super) const VARARGS: Sym = 2;
pub(super) const KWARGS: Sym = 3;

/// Parameters of a macro and the defaults of the last ones.
type Signature = (Vec<(Sym, Arc<str>)>, Vec<Expr>);

struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    depth: u32,
    names: Vec<Arc<str>>,
    syms: HashMap<Arc<str>, Sym>,
    /// Loops around the current place, within one function.
    loops: u32,
    /// Names that were read since the surrounding macro began.
    used: Vec<Sym>,
    blocks: Vec<Arc<str>>,
}

/// Reads a template.
pub(super) fn parse(source: &str) -> Result<Tree> {
    let tokens = tokenize(&normalise(source))?;
    let mut parser = Parser {
        tokens,
        at: 0,
        depth: 0,
        names: Vec::new(),
        syms: HashMap::new(),
        loops: 0,
        used: Vec::new(),
        blocks: Vec::new(),
    };
    for name in KNOWN {
        parser.sym(name);
    }
    let body = parser.body(&[])?;
    check_names(&body)?;
    Ok(Tree { body, names: parser.names })
}

impl Parser {
    fn sym(&mut self, name: &str) -> Sym {
        if let Some(sym) = self.syms.get(name) {
            return *sym;
        }
        let sym = self.names.len() as Sym;
        let name: Arc<str> = name.into();
        self.names.push(name.clone());
        self.syms.insert(name, sym);
        sym
    }

    fn current(&self) -> &Token {
        &self.tokens[self.at].0
    }

    fn look(&self) -> &Token {
        &self.tokens[(self.at + 1).min(self.tokens.len() - 1)].0
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].1
    }

    fn next(&mut self) -> Token {
        let token = self.tokens[self.at].0.clone();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        token
    }

    fn fail<T>(&self, detail: impl Into<String>) -> Result<T> {
        let mut error = Error::new(Kind::Syntax, detail);
        error.line = self.line();
        Err(error)
    }

    fn found(&self) -> String {
        match self.current() {
            Token::Data(_) => "text".into(),
            Token::VariableBegin => "`{{`".into(),
            Token::VariableEnd => "`}}`".into(),
            Token::BlockBegin => "`{%`".into(),
            Token::BlockEnd => "`%}`".into(),
            Token::Name(name) => format!("`{name}`"),
            Token::Str(_) => "a string".into(),
            Token::Int(_) | Token::Float(_) => "a number".into(),
            Token::Op(op) => format!("`{op}`"),
            Token::Eof => "the end of the template".into(),
        }
    }

    fn is_op(&self, op: &str) -> bool {
        matches!(self.current(), Token::Op(o) if *o == op)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.current(), Token::Name(n) if **n == *name)
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let is = self.is_op(op);
        if is {
            self.at += 1;
        }
        is
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let is = self.is_name(name);
        if is {
            self.at += 1;
        }
        is
    }

    fn expect_op(&mut self, op: &str) -> Result<()> {
        if self.skip_op(op) {
            return Ok(());
        }
        self.fail(format!("expected `{op}`, found {}", self.found()))
    }

    fn expect_word(&mut self, word: &str) -> Result<()> {
        if self.skip_name(word) {
            return Ok(());
        }
        self.fail(format!("expected `{word}`, found {}", self.found()))
    }

    fn expect_name(&mut self) -> Result<Arc<str>> {
        match self.current() {
            Token::Name(name) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            _ => self.fail(format!("expected a name, found {}", self.found())),
        }
    }

    fn block_end(&mut self) -> Result<()> {
        if *self.current() == Token::BlockEnd {
            self.at += 1;
            return Ok(());
        }
        self.fail(format!("expected the end of the statement, found {}", self.found()))
    }

    fn deeper<T>(&mut self, run: impl FnOnce(&mut Parser) -> Result<T>) -> Result<T> {
        if self.depth >= MAX_NESTING {
            return self.fail("the template is nested too deeply (recursion limit)");
        }
        self.depth += 1;
        let result = run(self);
        self.depth -= 1;
        result
    }

    /// Statements up to one of `ends`, whose name is left as the current token; with no ends up to the end.
    fn body(&mut self, ends: &[&str]) -> Result<Vec<Stmt>> {
        self.deeper(|p| p.body_inner(ends))
    }

    fn body_inner(&mut self, ends: &[&str]) -> Result<Vec<Stmt>> {
        let mut out = Vec::new();
        loop {
            match self.current().clone() {
                Token::Data(text) => {
                    self.at += 1;
                    out.push(Stmt::Data(text));
                }
                Token::VariableBegin => {
                    self.at += 1;
                    let value = self.tuple(true)?;
                    if *self.current() != Token::VariableEnd {
                        return self
                            .fail(format!("expected the end of the expression, found {}", self.found()));
                    }
                    self.at += 1;
                    out.push(Stmt::Print(value));
                }
                Token::BlockBegin => {
                    self.at += 1;
                    if let Token::Name(name) = self.current()
                        && ends.contains(&&**name)
                    {
                        return Ok(out);
                    }
                    out.extend(self.statement()?);
                }
                Token::Eof => {
                    if ends.is_empty() {
                        return Ok(out);
                    }
                    return self
                        .fail(format!("unexpected end of template, expected `{}`", ends.join("` or `")));
                }
                _ => return self.fail(format!("unexpected {}", self.found())),
            }
        }
    }

    /// The body of a tag up to `end`, which is eaten.
    fn block(&mut self, end: &str) -> Result<Vec<Stmt>> {
        self.block_end_or_colon()?;
        let body = self.body(&[end])?;
        self.at += 1;
        self.block_end()?;
        Ok(body)
    }

    /// Jinja2 allows a colon before the end of a block's head.
    fn block_end_or_colon(&mut self) -> Result<()> {
        self.skip_op(":");
        self.block_end()
    }

    /// A body in which loops of the outside cannot be left.
    fn closed_block(&mut self, end: &str) -> Result<Vec<Stmt>> {
        let loops = std::mem::take(&mut self.loops);
        let body = self.block(end);
        self.loops = loops;
        body
    }

    fn statement(&mut self) -> Result<Option<Stmt>> {
        let line = self.line();
        let name = match self.current() {
            Token::Name(name) => name.clone(),
            _ => return self.fail("expected the name of a statement"),
        };
        self.at += 1;
        let statement = match &*name {
            "for" => self.for_loop()?,
            "if" => {
                let mut arms = Vec::new();
                let mut otherwise = Vec::new();
                loop {
                    let test = self.tuple_without_if()?;
                    self.block_end_or_colon()?;
                    let body = self.body(&["elif", "else", "endif"])?;
                    arms.push((test, body));
                    if self.skip_name("elif") {
                        continue;
                    }
                    if self.skip_name("else") {
                        self.block_end_or_colon()?;
                        otherwise = self.body(&["endif"])?;
                    }
                    self.at += 1;
                    break;
                }
                self.block_end()?;
                Stmt::If { arms, otherwise }
            }
            "set" => {
                let target = self.target(true)?;
                if self.skip_op("=") {
                    let value = self.tuple(true)?;
                    self.block_end()?;
                    Stmt::Set { target, value }
                } else {
                    let filter = if self.is_op("|") { Some(self.filter_chain(None)?) } else { None };
                    Stmt::SetBlock { target, filter, body: self.block("endset")?, line }
                }
            }
            "macro" => {
                let name = self.expect_name()?;
                let sym = self.sym(&name);
                let node = self.macro_node(Some(name), "endmacro")?;
                Stmt::Macro { sym, node }
            }
            "call" => {
                let (params, defaults) = if self.is_op("(") { self.signature()? } else { Default::default() };
                let call = self.expression()?;
                if !matches!(call.kind, ExprKind::Call(..)) {
                    return self.fail("expected a call");
                }
                let node = self.macro_body(None, params, defaults, "endcall")?;
                Stmt::CallBlock { call, node }
            }
            "filter" => {
                let filter = self.filter_chain_inline()?;
                Stmt::FilterBlock { filter, body: self.block("endfilter")? }
            }
            "with" => {
                let mut pairs = Vec::new();
                while *self.current() != Token::BlockEnd {
                    if !pairs.is_empty() {
                        self.expect_op(",")?;
                    }
                    let target = self.target(false)?;
                    self.expect_op("=")?;
                    pairs.push((target, self.expression()?));
                }
                Stmt::With { pairs, body: self.block("endwith")? }
            }
            "generation" => Stmt::Scope(self.closed_block("endgeneration")?),
            "block" => {
                let name = self.expect_name()?;
                if self.blocks.contains(&name) {
                    return self.fail(format!("block `{name}` is defined twice"));
                }
                self.blocks.push(name.clone());
                if !self.skip_name("scoped") {
                    // Jinja2 shows such a block none of the loops' variables; outside of loops there is no difference.
                    if self.loops > 0 {
                        return self.fail("`block` inside of a loop is not supported without `scoped`");
                    }
                }
                self.skip_name("required");
                self.block_end_or_colon()?;
                let loops = std::mem::take(&mut self.loops);
                let body = self.body(&["endblock"])?;
                self.loops = loops;
                self.at += 1;
                self.skip_name(&name);
                self.block_end()?;
                Stmt::Scope(body)
            }
            "break" | "continue" => {
                if self.loops == 0 {
                    return self.fail(format!("`{name}` outside of a loop"));
                }
                self.block_end()?;
                if &*name == "break" { Stmt::Break } else { Stmt::Continue }
            }
            "print" => {
                let mut out = Vec::new();
                while *self.current() != Token::BlockEnd {
                    if !out.is_empty() {
                        self.expect_op(",")?;
                    }
                    out.push(self.expression()?);
                }
                self.block_end()?;
                let parts = out.into_iter().map(Stmt::Print).collect::<Vec<_>>();
                if parts.is_empty() {
                    return Ok(None);
                }
                // Printing opens no scope; expressions cannot assign, so none is needed.
                Stmt::Scope(parts)
            }
            "autoescape" => {
                let value = self.expression()?;
                if !matches!(value.kind, ExprKind::Literal(Literal::Bool(false))) {
                    return self.fail("`autoescape` is not supported in chat templates");
                }
                Stmt::Scope(self.block("endautoescape")?)
            }
            "include" | "import" | "from" | "extends" => {
                return self.fail(format!("`{name}`: a chat template cannot load another one"));
            }
            other => return self.fail(format!("unknown statement `{other}`")),
        };
        Ok(Some(statement))
    }

    fn for_loop(&mut self) -> Result<Stmt> {
        let target = self.target(false)?;
        self.expect_word("in")?;
        let iter = self.tuple_without_if()?;
        let filter = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        self.block_end_or_colon()?;
        self.loops += 1;
        let body = self.body(&["endfor", "else"]);
        self.loops -= 1;
        let body = body?;
        let mut otherwise = Vec::new();
        if self.skip_name("else") {
            self.block_end_or_colon()?;
            otherwise = self.body(&["endfor"])?;
        }
        self.at += 1;
        self.block_end()?;
        if let Target::Attr(..) = target {
            return self.fail("a loop cannot assign to an attribute");
        }
        let mut names = Vec::new();
        target_names(&target, &mut names);
        if names.contains(&LOOP) {
            return self.fail("`loop` cannot be assigned by a loop");
        }
        Ok(Stmt::For(Arc::new(ForNode { target, iter, filter, body, otherwise, recursive })))
    }

    /// What `set`, `for` and `with` assign to.
    fn target(&mut self, attributes: bool) -> Result<Target> {
        let mut targets = Vec::new();
        let mut tuple = false;
        loop {
            if !targets.is_empty() && !matches!(self.current(), Token::Name(_)) && !self.is_op("(") {
                break;
            }
            if self.skip_op("(") {
                let inner = self.deeper(|p| p.target(false))?;
                self.expect_op(")")?;
                targets.push(inner);
            } else if self.is_name("in") && !targets.is_empty() {
                break;
            } else {
                let name = self.expect_name()?;
                if ["true", "false", "none", "True", "False", "None"].contains(&&*name) {
                    return self.fail(format!("can't assign to `{name}`"));
                }
                let sym = self.sym(&name);
                if attributes && self.skip_op(".") {
                    let attr = self.expect_name()?;
                    self.used.push(sym);
                    targets.push(Target::Attr(sym, attr));
                } else {
                    targets.push(Target::Name(sym));
                }
            }
            if !self.skip_op(",") {
                break;
            }
            tuple = true;
        }
        match targets.pop() {
            Some(target) if !tuple => Ok(target),
            Some(last) => {
                targets.push(last);
                Ok(Target::Tuple(targets))
            }
            None => self.fail("expected a name to assign to"),
        }
    }

    fn signature(&mut self) -> Result<Signature> {
        self.expect_op("(")?;
        let mut params = Vec::new();
        let mut defaults = Vec::new();
        while !self.is_op(")") {
            if !params.is_empty() {
                self.expect_op(",")?;
                if self.is_op(")") {
                    return self.fail("expected a parameter");
                }
            }
            let name = self.expect_name()?;
            params.push((self.sym(&name), name));
            if self.skip_op("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self.fail("non-default argument follows default argument");
            }
        }
        self.expect_op(")")?;
        Ok((params, defaults))
    }

    fn macro_node(&mut self, name: Option<Arc<str>>, end: &str) -> Result<Arc<MacroNode>> {
        let (params, defaults) = self.signature()?;
        self.macro_body(name, params, defaults, end)
    }

    fn macro_body(
        &mut self,
        name: Option<Arc<str>>,
        params: Vec<(Sym, Arc<str>)>,
        defaults: Vec<Expr>,
        end: &str,
    ) -> Result<Arc<MacroNode>> {
        let before = std::mem::take(&mut self.used);
        let body = self.closed_block(end)?;
        let used = std::mem::replace(&mut self.used, before);
        let declared = |sym| params.iter().any(|(s, _)| *s == sym);
        let node = MacroNode {
            uses_caller: used.contains(&CALLER) && !declared(CALLER),
            uses_varargs: used.contains(&VARARGS) && !declared(VARARGS),
            uses_kwargs: used.contains(&KWARGS) && !declared(KWARGS),
            name,
            params,
            defaults,
            body,
        };
        // What is read inside a macro is read inside of the one around it, too.
        self.used.extend(used);
        Ok(Arc::new(node))
    }

    fn expression(&mut self) -> Result<Expr> {
        self.deeper(Parser::conditional)
    }

    fn conditional(&mut self) -> Result<Expr> {
        let mut line = self.line();
        let mut value = self.or()?;
        while self.skip_name("if") {
            let test = self.or()?;
            let otherwise = if self.skip_name("else") { Some(Box::new(self.expression()?)) } else { None };
            value =
                Expr { line, kind: ExprKind::If { test: Box::new(test), then: Box::new(value), otherwise } };
            line = self.line();
        }
        Ok(value)
    }

    fn chain_limit(&self, links: &mut u32) -> Result<()> {
        *links += 1;
        if *links > MAX_CHAIN {
            return self.fail("an expression has too many parts (recursion limit)");
        }
        Ok(())
    }

    fn or(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.and()?;
        let mut links = 0;
        while self.skip_name("or") {
            self.chain_limit(&mut links)?;
            let right = self.and()?;
            left = Expr { line, kind: ExprKind::Or(Box::new(left), Box::new(right)) };
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.not()?;
        let mut links = 0;
        while self.skip_name("and") {
            self.chain_limit(&mut links)?;
            let right = self.not()?;
            left = Expr { line, kind: ExprKind::And(Box::new(left), Box::new(right)) };
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expr> {
        let line = self.line();
        if self.skip_name("not") {
            let value = self.deeper(Parser::not)?;
            return Ok(Expr { line, kind: ExprKind::Not(Box::new(value)) });
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let op = match self.current() {
                Token::Op("==") => CompareOp::Eq,
                Token::Op("!=") => CompareOp::Ne,
                Token::Op("<") => CompareOp::Lt,
                Token::Op("<=") => CompareOp::Le,
                Token::Op(">") => CompareOp::Gt,
                Token::Op(">=") => CompareOp::Ge,
                Token::Name(name) if &**name == "in" => CompareOp::In,
                Token::Name(name)
                    if &**name == "not" && matches!(self.look(), Token::Name(n) if &**n == "in") =>
                {
                    self.at += 1;
                    CompareOp::NotIn
                }
                _ => break,
            };
            self.at += 1;
            rest.push((op, self.sum()?));
        }
        if rest.is_empty() {
            return Ok(first);
        }
        Ok(Expr { line, kind: ExprKind::Compare(Box::new(first), rest) })
    }

    fn sum(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.concat()?;
        let mut links = 0;
        loop {
            let op = match self.current() {
                Token::Op("+") => BinaryOp::Add,
                Token::Op("-") => BinaryOp::Sub,
                _ => return Ok(left),
            };
            self.at += 1;
            self.chain_limit(&mut links)?;
            let right = self.concat()?;
            left = Expr { line, kind: ExprKind::Binary(op, Box::new(left), Box::new(right)) };
        }
    }

    fn concat(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op("~") {
            parts.push(self.product()?);
        }
        Ok(Expr { line, kind: ExprKind::Concat(parts) })
    }

    fn product(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.power()?;
        let mut links = 0;
        loop {
            let op = match self.current() {
                Token::Op("*") => BinaryOp::Mul,
                Token::Op("/") => BinaryOp::Div,
                Token::Op("//") => BinaryOp::FloorDiv,
                Token::Op("%") => BinaryOp::Mod,
                _ => return Ok(left),
            };
            self.at += 1;
            self.chain_limit(&mut links)?;
            let right = self.power()?;
            left = Expr { line, kind: ExprKind::Binary(op, Box::new(left), Box::new(right)) };
        }
    }

    fn power(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut left = self.unary(true)?;
        let mut links = 0;
        while self.skip_op("**") {
            self.chain_limit(&mut links)?;
            let right = self.unary(true)?;
            // Jinja2 writes a negative constant without brackets into Python's code, where it binds less than `**`; only
            // if both sides are constants it computes the power itself.
            let outside = negative_constant(&left) && !constant(&right);
            if outside && let ExprKind::Neg(inner) = left.kind {
                let power = Expr { line, kind: ExprKind::Binary(BinaryOp::Pow, inner, Box::new(right)) };
                left = Expr { line, kind: ExprKind::Neg(Box::new(power)) };
            } else {
                left = Expr { line, kind: ExprKind::Binary(BinaryOp::Pow, Box::new(left), Box::new(right)) };
            }
        }
        Ok(left)
    }

    fn unary(&mut self, with_filters: bool) -> Result<Expr> {
        let line = self.line();
        let value = if self.skip_op("-") {
            let value = self.deeper(|p| p.unary(false))?;
            Expr { line, kind: ExprKind::Neg(Box::new(value)) }
        } else if self.skip_op("+") {
            let value = self.deeper(|p| p.unary(false))?;
            Expr { line, kind: ExprKind::Pos(Box::new(value)) }
        } else {
            self.primary()?
        };
        let value = self.postfix(value)?;
        if with_filters { self.filters_and_tests(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Result<Expr> {
        let line = self.line();
        let literal = |literal| Ok(Expr { line, kind: ExprKind::Literal(literal) });
        match self.next() {
            Token::Name(name) => match &*name {
                "true" | "True" => literal(Literal::Bool(true)),
                "false" | "False" => literal(Literal::Bool(false)),
                "none" | "None" => literal(Literal::None),
                "self" => self.fail("`self` is not supported in chat templates"),
                _ => {
                    let sym = self.sym(&name);
                    self.used.push(sym);
                    Ok(Expr { line, kind: ExprKind::Name(sym) })
                }
            },
            Token::Str(text) => {
                if !matches!(self.current(), Token::Str(_)) {
                    return literal(Literal::Str(text));
                }
                let mut joined = text.to_string();
                while let Token::Str(more) = self.current() {
                    joined.push_str(more);
                    self.at += 1;
                }
                literal(Literal::Str(joined.into()))
            }
            Token::Int(value) => literal(Literal::Int(value)),
            Token::Float(value) => literal(Literal::Float(value)),
            Token::Op("(") => {
                let value = self.deeper(|p| p.tuple_items(true, true))?;
                self.expect_op(")")?;
                Ok(value)
            }
            Token::Op("[") => {
                let items = self.deeper(|p| p.items("]"))?;
                Ok(Expr { line, kind: ExprKind::List(items) })
            }
            Token::Op("{") => {
                let mut pairs = Vec::new();
                while !self.is_op("}") {
                    if !pairs.is_empty() {
                        self.expect_op(",")?;
                    }
                    if self.is_op("}") {
                        break;
                    }
                    let key = self.expression()?;
                    self.expect_op(":")?;
                    pairs.push((key, self.expression()?));
                }
                self.expect_op("}")?;
                Ok(Expr { line, kind: ExprKind::Dict(pairs) })
            }
            _ => {
                self.at = self.at.saturating_sub(usize::from(self.at + 1 < self.tokens.len()));
                self.fail(format!("unexpected {}", self.found()))
            }
        }
    }

    fn items(&mut self, end: &str) -> Result<Vec<Expr>> {
        let mut items = Vec::new();
        while !self.is_op(end) {
            if !items.is_empty() {
                self.expect_op(",")?;
            }
            if self.is_op(end) {
                break;
            }
            items.push(self.expression()?);
        }
        self.expect_op(end)?;
        Ok(items)
    }

    fn tuple(&mut self, with_if: bool) -> Result<Expr> {
        self.deeper(|p| p.tuple_items(with_if, false))
    }

    /// For heads of `for` and `if`, whose own `if` and `else` end the expression.
    fn tuple_without_if(&mut self) -> Result<Expr> {
        self.tuple(false)
    }

    fn tuple_items(&mut self, with_if: bool, explicit: bool) -> Result<Expr> {
        let line = self.line();
        let mut items = Vec::new();
        let mut tuple = false;
        loop {
            if !items.is_empty() {
                self.expect_op(",")?;
            }
            let ends = matches!(self.current(), Token::VariableEnd | Token::BlockEnd) || self.is_op(")");
            if ends {
                break;
            }
            items.push(if with_if { self.expression()? } else { self.deeper(Parser::or)? });
            if self.is_op(",") {
                tuple = true;
            } else {
                break;
            }
        }
        if !tuple {
            if let Some(item) = items.pop() {
                return Ok(item);
            }
            if !explicit {
                return self.fail(format!("expected an expression, found {}", self.found()));
            }
        }
        Ok(Expr { line, kind: ExprKind::Tuple(items) })
    }

    fn postfix(&mut self, mut value: Expr) -> Result<Expr> {
        let mut links = 0;
        loop {
            if self.is_op(".") || self.is_op("[") {
                value = self.subscript(value)?;
            } else if self.is_op("(") {
                value = self.call(value)?;
            } else {
                return Ok(value);
            }
            self.chain_limit(&mut links)?;
        }
    }

    fn filters_and_tests(&mut self, mut value: Expr) -> Result<Expr> {
        let mut links = 0;
        loop {
            if self.is_op("|") {
                value = self.filter(Some(value))?;
            } else if self.is_name("is") {
                value = self.test(value)?;
            } else if self.is_op("(") {
                value = self.call(value)?;
            } else {
                return Ok(value);
            }
            self.chain_limit(&mut links)?;
        }
    }

    fn subscript(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        if self.skip_op(".") {
            return match self.next() {
                Token::Name(name) => Ok(Expr { line, kind: ExprKind::Attr(Box::new(value), name) }),
                Token::Int(index) => {
                    let index = Expr { line, kind: ExprKind::Literal(Literal::Int(index)) };
                    Ok(Expr { line, kind: ExprKind::Item(Box::new(value), Box::new(index)) })
                }
                _ => self.fail("expected a name or a number after `.`"),
            };
        }
        self.expect_op("[")?;
        let mut parts = Vec::new();
        while !self.is_op("]") {
            if !parts.is_empty() {
                self.expect_op(",")?;
            }
            parts.push(self.subscript_part()?);
        }
        self.expect_op("]")?;
        if parts.len() > 1 {
            let mut items = Vec::new();
            for part in parts {
                match part {
                    Part::Index(item) => items.push(item),
                    Part::Slice(_) => return self.fail("slices in a tuple of subscripts are not supported"),
                }
            }
            let index = Expr { line, kind: ExprKind::Tuple(items) };
            return Ok(Expr { line, kind: ExprKind::Item(Box::new(value), Box::new(index)) });
        }
        match parts.pop() {
            Some(Part::Index(index)) => {
                Ok(Expr { line, kind: ExprKind::Item(Box::new(value), Box::new(index)) })
            }
            Some(Part::Slice(bounds)) => Ok(Expr { line, kind: ExprKind::Slice(Box::new(value), bounds) }),
            None => self.fail("expected a subscript"),
        }
    }

    fn subscript_part(&mut self) -> Result<Part> {
        let mut bounds: [Option<Box<Expr>>; 3] = [None, None, None];
        if !self.is_op(":") {
            let value = self.expression()?;
            if !self.is_op(":") {
                return Ok(Part::Index(value));
            }
            bounds[0] = Some(Box::new(value));
        }
        self.expect_op(":")?;
        if !self.is_op(":") && !self.is_op("]") && !self.is_op(",") {
            bounds[1] = Some(Box::new(self.expression()?));
        }
        if self.skip_op(":") && !self.is_op("]") && !self.is_op(",") {
            bounds[2] = Some(Box::new(self.expression()?));
        }
        Ok(Part::Slice(bounds))
    }

    fn call(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        let args = self.call_args()?;
        Ok(Expr { line, kind: ExprKind::Call(Box::new(value), Box::new(args)) })
    }

    fn call_args(&mut self) -> Result<CallArgs> {
        self.expect_op("(")?;
        let mut out = CallArgs::default();
        let mut first = true;
        while !self.is_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            first = false;
            let plain = out.star_star.is_none();
            if self.skip_op("*") {
                if out.star.is_some() || !plain {
                    return self.fail("invalid syntax for function call expression");
                }
                out.star = Some(self.expression()?);
            } else if self.skip_op("**") {
                if !plain {
                    return self.fail("invalid syntax for function call expression");
                }
                out.star_star = Some(self.expression()?);
            } else if matches!(self.current(), Token::Name(_)) && *self.look() == Token::Op("=") {
                if !plain {
                    return self.fail("invalid syntax for function call expression");
                }
                let name = self.expect_name()?;
                self.at += 1;
                if out.kwargs.iter().any(|(n, _)| *n == name) {
                    return self.fail(format!("keyword argument `{name}` is given twice"));
                }
                out.kwargs.push((name, self.expression()?));
            } else {
                if out.star.is_some() || !plain || !out.kwargs.is_empty() {
                    return self.fail("invalid syntax for function call expression");
                }
                out.args.push(self.expression()?);
            }
        }
        self.expect_op(")")?;
        Ok(out)
    }

    fn dotted_name(&mut self) -> Result<Arc<str>> {
        let mut name = self.expect_name()?;
        while self.skip_op(".") {
            name = format!("{name}.{}", self.expect_name()?).into();
        }
        Ok(name)
    }

    /// `|name(…)`.
    fn filter(&mut self, value: Option<Expr>) -> Result<Expr> {
        self.expect_op("|")?;
        self.filter_named(value)
    }

    fn filter_named(&mut self, value: Option<Expr>) -> Result<Expr> {
        let line = self.line();
        let name = self.dotted_name()?;
        let args = if self.is_op("(") { self.call_args()? } else { CallArgs::default() };
        let filter = filters::find(&name);
        Ok(Expr { line, kind: ExprKind::Filter(value.map(Box::new), name, filter, Box::new(args)) })
    }

    /// `|a|b` of a `set` block; the innermost filter takes the block.
    fn filter_chain(&mut self, mut value: Option<Expr>) -> Result<Expr> {
        let mut links = 0;
        loop {
            let filter = self.filter(value)?;
            self.chain_limit(&mut links)?;
            if !self.is_op("|") {
                return Ok(filter);
            }
            value = Some(filter);
        }
    }

    /// `a|b` of a `filter` block.
    fn filter_chain_inline(&mut self) -> Result<Expr> {
        let filter = self.filter_named(None)?;
        if self.is_op("|") { self.filter_chain(Some(filter)) } else { Ok(filter) }
    }

    fn test(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        self.expect_word("is")?;
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        let takes_argument = match self.current() {
            Token::Name(word) => !matches!(&**word, "else" | "or" | "and"),
            Token::Str(_) | Token::Int(_) | Token::Float(_) => true,
            Token::Op(op) => matches!(*op, "(" | "[" | "{"),
            _ => false,
        };
        let args = if self.is_op("(") {
            self.call_args()?
        } else if takes_argument {
            if self.is_name("is") {
                return self.fail("You cannot chain multiple tests with is");
            }
            let argument = self.deeper(Parser::primary)?;
            CallArgs { args: vec![self.postfix(argument)?], ..CallArgs::default() }
        } else {
            CallArgs::default()
        };
        let test = tests::find(&name);
        let test = Expr { line, kind: ExprKind::Test(Box::new(value), name, test, Box::new(args)) };
        Ok(if negated { Expr { line, kind: ExprKind::Not(Box::new(test)) } } else { test })
    }
}

fn constant(expr: &Expr) -> bool {
    match &expr.kind {
        ExprKind::Literal(_) => true,
        ExprKind::Neg(value) | ExprKind::Pos(value) => constant(value),
        _ => false,
    }
}

fn negative_constant(expr: &Expr) -> bool {
    matches!(&expr.kind, ExprKind::Neg(value) if matches!(
        value.kind,
        ExprKind::Literal(Literal::Int(1..) | Literal::Float(_))
    ))
}

enum Part {
    Index(Expr),
    Slice([Option<Box<Expr>>; 3]),
}

pub(super) fn target_names(target: &Target, out: &mut Vec<Sym>) {
    match target {
        Target::Name(sym) => out.push(*sym),
        Target::Attr(..) => {}
        Target::Tuple(targets) => targets.iter().for_each(|target| target_names(target, out)),
    }
}

/// Refuses unknown filters and tests where Jinja2 refuses them before rendering: everywhere but inside of an `if`,
/// where one may ask first whether a filter exists.
fn check_names(body: &[Stmt]) -> Result<()> {
    body.iter().try_for_each(|statement| check_stmt(statement, false))
}

fn check_stmt(statement: &Stmt, soft: bool) -> Result<()> {
    let each = |body: &[Stmt], soft: bool| body.iter().try_for_each(|s| check_stmt(s, soft));
    match statement {
        Stmt::Data(_) | Stmt::Break | Stmt::Continue => Ok(()),
        Stmt::Print(value) => check_expr(value, soft),
        Stmt::If { arms, otherwise } => {
            for (test, body) in arms {
                check_expr(test, true)?;
                each(body, true)?;
            }
            each(otherwise, true)
        }
        Stmt::For(node) => {
            check_expr(&node.iter, soft)?;
            node.filter.iter().try_for_each(|f| check_expr(f, false))?;
            each(&node.body, false)?;
            each(&node.otherwise, false)
        }
        Stmt::Set { value, .. } => check_expr(value, soft),
        Stmt::SetBlock { filter, body, .. } => {
            filter.iter().try_for_each(|f| check_expr(f, false))?;
            each(body, false)
        }
        Stmt::Macro { node, .. } => {
            node.defaults.iter().try_for_each(|e| check_expr(e, false))?;
            each(&node.body, false)
        }
        Stmt::CallBlock { call, node } => {
            check_expr(call, soft)?;
            node.defaults.iter().try_for_each(|e| check_expr(e, false))?;
            each(&node.body, false)
        }
        Stmt::FilterBlock { filter, body } => {
            check_expr(filter, false)?;
            each(body, false)
        }
        Stmt::With { pairs, body } => {
            pairs.iter().try_for_each(|(_, e)| check_expr(e, false))?;
            each(body, false)
        }
        Stmt::Scope(body) => each(body, false),
    }
}

fn check_args(args: &CallArgs, soft: bool) -> Result<()> {
    args.args.iter().try_for_each(|e| check_expr(e, soft))?;
    args.kwargs.iter().try_for_each(|(_, e)| check_expr(e, soft))?;
    args.star.iter().chain(&args.star_star).try_for_each(|e| check_expr(e, soft))
}

fn check_expr(expr: &Expr, soft: bool) -> Result<()> {
    let unknown = |what: &str, name: &str| {
        let mut error = Error::new(Kind::Syntax, format!("No {what} named '{name}'."));
        error.line = expr.line;
        Err(error)
    };
    match &expr.kind {
        ExprKind::Literal(_) | ExprKind::Name(_) => Ok(()),
        ExprKind::List(items) | ExprKind::Tuple(items) | ExprKind::Concat(items) => {
            items.iter().try_for_each(|e| check_expr(e, soft))
        }
        ExprKind::Dict(pairs) => pairs.iter().try_for_each(|(k, v)| {
            check_expr(k, soft)?;
            check_expr(v, soft)
        }),
        ExprKind::Attr(value, _) | ExprKind::Not(value) | ExprKind::Neg(value) | ExprKind::Pos(value) => {
            check_expr(value, soft)
        }
        ExprKind::Item(a, b) | ExprKind::Binary(_, a, b) | ExprKind::And(a, b) | ExprKind::Or(a, b) => {
            check_expr(a, soft)?;
            check_expr(b, soft)
        }
        ExprKind::Slice(value, bounds) => {
            check_expr(value, soft)?;
            bounds.iter().flatten().try_for_each(|e| check_expr(e, soft))
        }
        ExprKind::Call(value, args) => {
            check_expr(value, soft)?;
            check_args(args, soft)
        }
        ExprKind::Filter(value, name, filter, args) => {
            if filter.is_none() && !soft {
                return unknown("filter", name);
            }
            value.iter().try_for_each(|e| check_expr(e, soft))?;
            check_args(args, soft)
        }
        ExprKind::Test(value, name, test, args) => {
            if test.is_none() && !soft {
                return unknown("test", name);
            }
            check_expr(value, soft)?;
            check_args(args, soft)
        }
        ExprKind::Compare(first, rest) => {
            check_expr(first, soft)?;
            rest.iter().try_for_each(|(_, e)| check_expr(e, soft))
        }
        ExprKind::If { test, then, otherwise } => {
            check_expr(test, true)?;
            check_expr(then, true)?;
            otherwise.iter().try_for_each(|e| check_expr(e, true))
        }
    }
}
