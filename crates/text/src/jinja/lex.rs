//! Text to tokens, by Jinja2's rules: line ends, trimmed blocks, white space control, literals.

use std::sync::Arc;

use super::{Error, Kind, Result, unicode};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Data(Arc<str>),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(Arc<str>),
    Str(Arc<str>),
    Int(i128),
    Float(f64),
    Op(&'static str),
    Eof,
}

/// Operators, longest first.
const OPERATORS: [&str; 27] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",", ";", "!",
];

fn syntax(line: u32, detail: impl Into<String>) -> Box<Error> {
    let mut error = Error::new(Kind::Syntax, detail);
    error.line = line;
    error
}

/// Jinja2 reads all line ends as `\n` and drops the last one.
pub(super) fn normalise(source: &str) -> String {
    let mut text = source.replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

struct Lexer<'s> {
    source: &'s str,
    at: usize,
    line: u32,
    tokens: Vec<(Token, u32)>,
    /// The text before `at` ends a line that holds nothing of the template's code.
    line_starting: bool,
}

/// Tokens of a normalised source, each with its line.
pub(super) fn tokenize(source: &str) -> Result<Vec<(Token, u32)>> {
    let mut lexer = Lexer { source, at: 0, line: 1, tokens: Vec::new(), line_starting: true };
    lexer.run()?;
    let line = lexer.line;
    lexer.tokens.push((Token::Eof, line));
    Ok(lexer.tokens)
}

fn space(c: char) -> bool {
    unicode::space(c)
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn advance(&mut self, bytes: usize) {
        let text = &self.source[self.at..self.at + bytes];
        self.line += text.bytes().filter(|b| *b == b'\n').count() as u32;
        if bytes > 0 {
            self.line_starting = text.ends_with('\n');
        }
        self.at += bytes;
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.advance(rest.len() - rest.trim_start_matches(space).len());
    }

    /// Text before a tag, stripped as the tag's sign (`-`, `+` or none) asks; `block` for tags that `lstrip` concerns.
    fn data(&mut self, text: &'s str, sign: Option<char>, block: bool) {
        let mut kept = text;
        match sign {
            Some('-') => kept = text.trim_end_matches(space),
            Some('+') => {}
            _ if block => {
                let start = text.rfind('\n').map_or(0, |i| i + 1);
                if (start > 0 || self.line_starting) && start < text.len() && text[start..].chars().all(space)
                {
                    kept = &text[..start];
                }
            }
            _ => {}
        }
        if !kept.is_empty() {
            self.tokens.push((Token::Data(kept.into()), self.line));
        }
        self.advance(text.len());
    }

    fn run(&mut self) -> Result<()> {
        while self.at < self.source.len() {
            let rest = self.rest();
            let open = rest
                .char_indices()
                .find(|(i, c)| *c == '{' && matches!(rest.as_bytes().get(i + 1), Some(b'{' | b'%' | b'#')))
                .map(|(i, _)| i);
            let Some(open) = open else {
                self.tokens.push((Token::Data(rest.into()), self.line));
                self.advance(rest.len());
                break;
            };
            let kind = rest.as_bytes()[open + 1];
            let sign = rest[open + 2..].chars().next().filter(|c| matches!(c, '-' | '+'));
            // `{{+` is no sign for variables with lstrip, but the sign is eaten all the same.
            self.data(&rest[..open], sign, kind != b'{');
            let start_line = self.line;
            self.advance(2 + usize::from(sign.is_some()));
            match kind {
                b'#' => {
                    let rest = self.rest();
                    let Some(end) = rest.find("#}") else {
                        return Err(syntax(start_line, "missing end of comment tag"));
                    };
                    let mark = rest[..end].chars().next_back().filter(|c| matches!(c, '-' | '+'));
                    self.advance(end + 2);
                    self.after_block(mark);
                }
                b'{' => {
                    self.tokens.push((Token::VariableBegin, start_line));
                    self.code("}}")?;
                }
                _ => {
                    if let Some(length) = raw_begin(self.rest()) {
                        self.raw(length, start_line)?;
                    } else {
                        self.tokens.push((Token::BlockBegin, start_line));
                        self.code("%}")?;
                    }
                }
            }
        }
        Ok(())
    }

    /// White space behind the end of a block or comment.
    fn after_block(&mut self, mark: Option<char>) {
        match mark {
            Some('-') => self.skip_space(),
            Some('+') => {}
            _ if self.rest().starts_with('\n') => self.advance(1),
            _ => {}
        }
    }

    fn raw(&mut self, length: usize, start_line: u32) -> Result<()> {
        self.advance(length);
        let rest = self.rest();
        let mut from = 0;
        while let Some(open) = rest[from..].find("{%").map(|i| i + from) {
            let tail = &rest[open + 2..];
            let sign = tail.chars().next().filter(|c| matches!(c, '-' | '+'));
            let tail = &tail[usize::from(sign.is_some())..];
            let word = tail.trim_start_matches(space);
            if let Some(after) = word.strip_prefix("endraw") {
                let end = after.trim_start_matches(space);
                let mark = end.chars().next().filter(|c| matches!(c, '-' | '+'));
                if let Some(after) = end[usize::from(mark.is_some())..].strip_prefix("%}") {
                    self.data(&rest[..open], sign, true);
                    self.advance(rest.len() - open - after.len());
                    self.after_block(mark);
                    return Ok(());
                }
            }
            from = open + 2;
        }
        Err(syntax(start_line, "missing end of raw directive"))
    }

    /// The inside of a tag, up to and including its end.
    fn code(&mut self, end: &str) -> Result<()> {
        let mut brackets: Vec<char> = Vec::new();
        loop {
            let rest = self.rest();
            let line = self.line;
            if rest.is_empty() {
                return Err(syntax(line, format!("unexpected end of template, `{end}` is missing")));
            }
            if brackets.is_empty() {
                if let Some(after) = rest.strip_prefix('-').and_then(|r| r.strip_prefix(end)) {
                    self.advance(rest.len() - after.len());
                    self.push_end(end, line);
                    self.skip_space();
                    return Ok(());
                }
                if end == "%}" && rest.starts_with("+%}") {
                    self.advance(3);
                    self.push_end(end, line);
                    return Ok(());
                }
                if rest.starts_with(end) {
                    self.advance(2);
                    self.push_end(end, line);
                    if end == "%}" {
                        self.after_block(None);
                    }
                    return Ok(());
                }
            }
            let c = rest.chars().next().unwrap_or(' ');
            if space(c) {
                self.skip_space();
            } else if c.is_ascii_digit() {
                self.number()?;
            } else if c == '"' || c == '\'' {
                self.string(c)?;
            } else if c == '_' || unicode::word(c) {
                let length = rest.find(|c| c != '_' && !unicode::word(c)).unwrap_or(rest.len());
                let name = &rest[..length];
                if !unicode::identifier(name) {
                    return Err(syntax(line, format!("invalid character in identifier `{name}`")));
                }
                self.tokens.push((Token::Name(name.into()), line));
                self.advance(length);
            } else {
                let Some(operator) =
                    OPERATORS.iter().find(|op| rest.starts_with(**op)).filter(|op| **op != "!")
                else {
                    return Err(syntax(line, format!("unexpected character {c:?}")));
                };
                let first = operator.chars().next().unwrap_or(' ');
                match first {
                    '(' | '[' | '{' => brackets.push(match first {
                        '(' => ')',
                        '[' => ']',
                        _ => '}',
                    }),
                    ')' | ']' | '}' => match brackets.pop() {
                        Some(expected) if expected == first => {}
                        Some(expected) => {
                            return Err(syntax(line, format!("unexpected `{first}`, expected `{expected}`")));
                        }
                        None => return Err(syntax(line, format!("unexpected `{first}`"))),
                    },
                    _ => {}
                }
                self.tokens.push((Token::Op(operator), line));
                self.advance(operator.len());
            }
        }
    }

    fn push_end(&mut self, end: &str, line: u32) {
        let token = if end == "%}" { Token::BlockEnd } else { Token::VariableEnd };
        self.tokens.push((token, line));
    }

    fn number(&mut self) -> Result<()> {
        let rest = self.rest();
        let bytes = rest.as_bytes();
        let line = self.line;
        // Digits with single underscores between them, from `from`; where they end.
        let digits = |from: usize, digit: fn(&u8) -> bool| -> usize {
            let mut at = from;
            while let Some(b) = bytes.get(at) {
                let joined = *b == b'_' && at > from && bytes.get(at + 1).is_some_and(digit);
                if !digit(b) && !joined {
                    break;
                }
                at += 1;
            }
            at
        };
        let whole = digits(0, u8::is_ascii_digit);
        let mut end = whole;
        // `a.1.2` are two subscripts.
        let after_dot = self.at > 0 && self.source.as_bytes()[self.at - 1] == b'.';
        if !after_dot {
            if bytes.get(end) == Some(&b'.') {
                let fraction = digits(end + 1, u8::is_ascii_digit);
                if fraction > end + 1 {
                    end = fraction;
                }
            }
            if matches!(bytes.get(end), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
                let exponent = digits(end + 1 + sign, u8::is_ascii_digit);
                if exponent > end + 1 + sign {
                    end = exponent;
                }
            }
        }
        if end > whole {
            let text = rest[..end].replace('_', "");
            let value = text.parse().map_err(|_| syntax(line, format!("`{text}` is no number")))?;
            self.tokens.push((Token::Float(value), line));
            self.advance(end);
            return Ok(());
        }
        let prefixed = |radix: u32, digit: fn(&u8) -> bool| {
            let start = 2 + usize::from(bytes.get(2) == Some(&b'_'));
            let end = digits(start, digit);
            (end > start).then_some((radix, 2, end))
        };
        let special = match (bytes[0], bytes.get(1)) {
            (b'0', Some(b'x' | b'X')) => prefixed(16, u8::is_ascii_hexdigit),
            (b'0', Some(b'o' | b'O')) => prefixed(8, |b| (b'0'..=b'7').contains(b)),
            (b'0', Some(b'b' | b'B')) => prefixed(2, |b| matches!(b, b'0' | b'1')),
            _ => None,
        };
        let (radix, start, end) = match special {
            Some(parts) => parts,
            // A leading zero is a number of its own, unless only zeros follow.
            None if bytes[0] == b'0' => (10, 0, digits(0, |b| *b == b'0')),
            None => (10, 0, whole),
        };
        let text = rest[start..end].replace('_', "");
        let value = i128::from_str_radix(&text, radix).map_err(|_| {
            syntax(line, format!("the integer `{text}` is beyond 128 bits, which is not supported"))
        })?;
        self.tokens.push((Token::Int(value), line));
        self.advance(end);
        Ok(())
    }

    fn string(&mut self, quote: char) -> Result<()> {
        let rest = self.rest();
        let line = self.line;
        let mut escaped = false;
        let mut end = None;
        for (i, c) in rest.char_indices().skip(1) {
            if escaped {
                escaped = false;
            } else if c == '\\' {
                escaped = true;
            } else if c == quote {
                end = Some(i);
                break;
            }
        }
        let Some(end) = end else {
            return Err(syntax(line, format!("unexpected character {quote:?}: the string has no end")));
        };
        let text = unescape(&rest[1..end]).map_err(|detail| syntax(line, detail))?;
        self.tokens.push((Token::Str(text.into()), line));
        self.advance(end + 1);
        Ok(())
    }
}

/// Bytes of `raw -%}` behind `{%` and its sign.
fn raw_begin(rest: &str) -> Option<usize> {
    let word = rest.trim_start_matches(space).strip_prefix("raw")?;
    let end = word.trim_start_matches(space);
    let after = match end.strip_prefix('-') {
        Some(end) => end.strip_prefix("%}")?.trim_start_matches(space),
        None => end.strip_prefix("%}")?,
    };
    Some(rest.len() - after.len())
}

/// Python's `unicode-escape`, after characters beyond ASCII were written as escapes themselves (so a backslash before
/// one of them is doubled and spells it out).
fn unescape(text: &str) -> std::result::Result<String, String> {
    if !text.contains('\\') {
        return Ok(text.to_owned());
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let hex = |digits: usize, chars: &mut std::iter::Peekable<std::str::Chars<'_>>| {
            let mut code = 0;
            for _ in 0..digits {
                let digit =
                    chars.peek().and_then(|c| c.to_digit(16)).ok_or("a truncated escape in a string")?;
                chars.next();
                code = code * 16 + digit;
            }
            char::from_u32(code).ok_or_else(|| {
                format!("the escape of U+{code:04X} in a string is no character (half of a pair?)")
            })
        };
        match chars.next() {
            None => return Err("a string ends with `\\`".into()),
            Some('\n') => {}
            Some(c @ ('\\' | '\'' | '"')) => out.push(c),
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some('a') => out.push('\u{7}'),
            Some('b') => out.push('\u{8}'),
            Some('f') => out.push('\u{c}'),
            Some('v') => out.push('\u{b}'),
            Some('x') => out.push(hex(2, &mut chars)?),
            Some('u') => out.push(hex(4, &mut chars)?),
            Some('U') => out.push(hex(8, &mut chars)?),
            Some('N') => return Err("the escape `\\N{…}` is not supported: write the character".into()),
            Some(c @ '0'..='7') => {
                let mut code = c as u32 - '0' as u32;
                for _ in 0..2 {
                    match chars.peek().and_then(|c| c.to_digit(8)) {
                        Some(digit) => {
                            chars.next();
                            code = code * 8 + digit;
                        }
                        None => break,
                    }
                }
                out.push(char::from_u32(code).ok_or("an octal escape is no character")?);
            }
            Some(c) if c.is_ascii() => {
                out.push('\\');
                out.push(c);
            }
            Some(c) => {
                let code = u32::from(c);
                out.push('\\');
                out.push_str(&match code {
                    0..=0xff => format!("x{code:02x}"),
                    0x100..=0xffff => format!("u{code:04x}"),
                    _ => format!("U{code:08x}"),
                });
            }
        }
    }
    Ok(out)
}
