//! One call that is written as a JSON object, read character by character: `{"name": …, "arguments": …}`.
//!
//! Arguments are handed on as they are written, also where they are no JSON; so nothing here fails because of them.

/// How far a value goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// The character is part of it, or white space in front.
    In,
    /// The character is its last.
    Last,
    /// It ended before the character.
    Before,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An object or a list.
    Nested,
    Text,
    /// A number or a word.
    Bare,
}

/// Finds the end of a JSON value by its brackets and quotes.
#[derive(Debug, Default)]
pub(super) struct Scan {
    kind: Option<Kind>,
    depth: usize,
    in_text: bool,
    escaped: bool,
}

impl Scan {
    pub(super) fn kind(&self) -> Option<Kind> {
        self.kind
    }

    /// True inside quotes, where every character is the value's.
    pub(super) fn in_text(&self) -> bool {
        self.in_text
    }

    pub(super) fn push(&mut self, c: char) -> Taken {
        let kind = match self.kind {
            Some(kind) => kind,
            None if c.is_whitespace() => return Taken::In,
            None => {
                let kind = match c {
                    '{' | '[' => Kind::Nested,
                    '"' => Kind::Text,
                    ',' | '}' | ']' => return Taken::Before,
                    _ => Kind::Bare,
                };
                self.kind = Some(kind);
                if kind == Kind::Text {
                    self.in_text = true;
                    return Taken::In;
                }
                kind
            }
        };
        if self.in_text {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.in_text = false;
                    if kind == Kind::Text {
                        return Taken::Last;
                    }
                }
                _ => {}
            }
            return Taken::In;
        }
        match (kind, c) {
            (Kind::Bare, ',' | '}' | ']') => return Taken::Before,
            (Kind::Bare, c) if c.is_whitespace() => return Taken::Before,
            (Kind::Nested, '"') => self.in_text = true,
            (Kind::Nested, '{' | '[') => self.depth += 1,
            (Kind::Nested, '}' | ']') => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Taken::Last;
                }
            }
            _ => {}
        }
        Taken::In
    }
}

/// Where the reader stands.
#[derive(Debug)]
enum At {
    Open,
    KeyOrEnd,
    Key(Scan, String),
    Colon(String),
    /// A value that is read in full before it is looked at.
    Whole(String, Scan, String),
    /// Arguments, handed on as they come.
    Arguments(Scan),
    CommaOrEnd,
    Done,
}

/// What a character did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    More,
    /// The object is complete.
    Done,
    /// It is no call, or none any more; the character is not part of it.
    Broken,
}

/// A call under way.
#[derive(Debug)]
pub(super) struct Object {
    at: At,
    /// Objects around the fields: `{"function": {…}}`.
    depth: usize,
    name: Option<String>,
    /// Arguments, or a part of them, that nobody has taken yet.
    arguments: String,
    has_arguments: bool,
}

impl Object {
    pub(super) fn new() -> Object {
        Object { at: At::Open, depth: 0, name: None, arguments: String::new(), has_arguments: false }
    }

    pub(super) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The key of its arguments was read.
    pub(super) fn has_arguments(&self) -> bool {
        self.has_arguments
    }

    /// Arguments that came since the last call.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.arguments)
    }

    /// True inside quotes.
    pub(super) fn in_text(&self) -> bool {
        match &self.at {
            At::Key(scan, _) | At::Whole(_, scan, _) | At::Arguments(scan) => scan.in_text(),
            _ => false,
        }
    }

    pub(super) fn push(&mut self, c: char) -> Step {
        match &mut self.at {
            At::Open | At::KeyOrEnd | At::CommaOrEnd if c.is_whitespace() => {}
            At::Open if c == '{' => {
                self.depth += 1;
                self.at = At::KeyOrEnd;
            }
            At::KeyOrEnd if c == '"' => {
                let mut scan = Scan::default();
                scan.push(c);
                self.at = At::Key(scan, c.into());
            }
            // Templates that double the braces of their example have models that do so.
            At::KeyOrEnd if c == '{' => self.depth += 1,
            At::KeyOrEnd | At::CommaOrEnd if c == '}' => return self.close(),
            At::CommaOrEnd if c == ',' => self.at = At::KeyOrEnd,
            At::Key(scan, text) => {
                text.push(c);
                if scan.push(c) == Taken::Last {
                    self.at = At::Colon(unquoted(text));
                }
            }
            At::Colon(_) if c.is_whitespace() => {}
            At::Colon(key) if c == ':' => {
                let key = std::mem::take(key);
                self.at = match key.as_str() {
                    "arguments" | "parameters" if !self.has_arguments => {
                        self.has_arguments = true;
                        At::Arguments(Scan::default())
                    }
                    _ => At::Whole(key, Scan::default(), String::new()),
                };
            }
            At::Whole(key, scan, _) if key == "function" && scan.kind().is_none() && c == '{' => {
                self.depth += 1;
                self.at = At::KeyOrEnd;
            }
            At::Whole(_, scan, text) => {
                let taken = scan.push(c);
                if taken != Taken::Before {
                    text.push(c);
                }
                if taken != Taken::In {
                    let At::Whole(key, scan, text) = std::mem::replace(&mut self.at, At::CommaOrEnd) else {
                        return Step::Broken;
                    };
                    let names = matches!(key.as_str(), "name" | "tool_name" | "function");
                    if names && self.name.is_none() && scan.kind() == Some(Kind::Text) {
                        self.name = Some(unquoted(text.trim()));
                    }
                    if taken == Taken::Before {
                        return self.push(c);
                    }
                }
            }
            At::Arguments(scan) => {
                let taken = scan.push(c);
                let begun = scan.kind().is_some();
                if taken != Taken::Before && begun {
                    self.arguments.push(c);
                }
                if taken != Taken::In {
                    self.end_arguments();
                    if taken == Taken::Before {
                        return self.push(c);
                    }
                }
            }
            At::Done | At::Open | At::KeyOrEnd | At::CommaOrEnd | At::Colon(_) => return Step::Broken,
        }
        Step::More
    }

    /// Arguments may be handed on: those of an object or a list as they come, any other when they are complete.
    pub(super) fn may_hand_on(&self) -> bool {
        match &self.at {
            At::Arguments(scan) => scan.kind() == Some(Kind::Nested),
            _ => true,
        }
    }

    /// Arguments that are a text are what it says; `null` and nothing are an empty object.
    fn end_arguments(&mut self) {
        if let At::Arguments(scan) = &self.at {
            match scan.kind() {
                Some(Kind::Text) => self.arguments = unquoted(&self.arguments),
                Some(Kind::Bare) if self.arguments == "null" => self.arguments = "{}".into(),
                None => self.arguments = "{}".into(),
                Some(_) => {}
            }
        }
        self.at = At::CommaOrEnd;
    }

    fn close(&mut self) -> Step {
        self.depth -= 1;
        if self.depth > 0 {
            self.at = At::CommaOrEnd;
            return Step::More;
        }
        self.at = At::Done;
        Step::Done
    }
}

/// What a JSON text says; as it is written where it is none.
fn unquoted(text: &str) -> String {
    serde_json::from_str(text).unwrap_or_else(|_| text.trim_matches('"').to_owned())
}
