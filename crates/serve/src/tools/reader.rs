//! Calls in an answer, found while its text arrives.
//!
//! Invariant: wherever the text is cut, the texts and the arguments that are given out are the same when they are put
//! together, and so are the names and their order.

use std::sync::Arc;

use serde_json::Value;

use super::json::{Kind, Object, Scan, Step, Taken};
use super::{Family, Ids, Pairs, Style, Tools};

/// Longest name; what is longer is text.
const MAX_NAME: usize = 256;

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Text for people.
    Text(String),
    /// A call begins.
    Call {
        /// Counted from 0.
        index: usize,
        id: String,
        name: String,
    },
    /// More of a call's arguments, as JSON text.
    Arguments { index: usize, text: String },
}

/// Makes ids of calls.
pub(crate) type Random = fn() -> u64;

#[derive(Debug)]
enum State {
    /// Outside calls.
    Text,
    /// Behind the mark that opens calls, or behind a call.
    Between,
    Object(Object),
    /// Behind the text that opens a named call, with the style's separator and close.
    Name(&'static str, &'static str),
    /// In the arguments of a named call, with the style's close.
    Value(Scan, &'static str),
    Close(&'static str),
    PairName(&'static Pairs),
    PairKey(&'static Pairs),
    PairValue(&'static Pairs, String),
    /// All calls that are wanted were read.
    Over,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Reader {
    tools: Arc<Tools>,
    random: Random,
    state: State,
    /// Not looked at yet.
    rest: String,
    /// White space that is only shown if text follows.
    space: String,
    /// What was read since the last piece that was certain; shown as text if it turns out to be no call.
    held: String,
    /// The block began without a mark.
    bare: bool,
    /// In the brackets of a list.
    in_list: bool,
    /// Calls of this block, and of the answer.
    block_calls: usize,
    calls: usize,
    /// The present call was told, and its name.
    told: Option<String>,
    /// Arguments of the present call that stand one by one.
    pairs: usize,
    /// Text was given out.
    said: bool,
    out: Vec<Part>,
}

/// What looking for a text at a place found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Yes,
    /// The text may begin here.
    Maybe,
    No,
}

fn look(rest: &str, wanted: &str, last: bool) -> Found {
    match (wanted.is_empty(), rest.starts_with(wanted)) {
        (true, _) => Found::No,
        (_, true) => Found::Yes,
        _ if !last && wanted.starts_with(rest) => Found::Maybe,
        _ => Found::No,
    }
}

/// Length of the longest tail of a text that may begin with one of these.
fn begun(text: &str, wanted: &str) -> usize {
    let most = wanted.len().saturating_sub(1).min(text.len());
    (1..=most)
        .rev()
        .find(|n| text.is_char_boundary(text.len() - n) && wanted.starts_with(&text[text.len() - n..]))
        .unwrap_or(0)
}

impl Reader {
    pub(crate) fn new(tools: Arc<Tools>, random: Random) -> Reader {
        Reader {
            tools,
            random,
            state: State::Text,
            rest: String::new(),
            space: String::new(),
            held: String::new(),
            bare: false,
            in_list: false,
            block_calls: 0,
            calls: 0,
            told: None,
            pairs: 0,
            said: false,
            out: Vec::new(),
        }
    }

    fn family(&self) -> &'static Family {
        self.tools.family
    }

    /// Takes in text; what became certain.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Part> {
        self.rest.push_str(text);
        while self.step(false) {}
        self.take()
    }

    /// The answer ended; the rest of it.
    pub(crate) fn finish(&mut self) -> Vec<Part> {
        while self.step(true) {}
        match &mut self.state {
            State::Object(object) => {
                let arguments = object.take();
                match self.told.is_some() {
                    true => self.argue(&arguments),
                    false => self.give_back(),
                }
            }
            State::Value(..) | State::Close(_) | State::PairKey(_) | State::PairValue(..) | State::Over => {}
            // What separates calls is no text.
            State::Between if self.block_calls > 0 => {}
            State::Text | State::Between | State::Name(..) | State::PairName(_) => {
                self.give_back();
                let rest = std::mem::take(&mut self.rest);
                self.give(&rest);
            }
        }
        if self.calls == 0 {
            let space = std::mem::take(&mut self.space);
            self.say(space);
        }
        self.take()
    }

    /// True once all calls that are wanted were read.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    fn take(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.out)
    }

    /// One step on; false if more text is needed.
    fn step(&mut self, last: bool) -> bool {
        if self.rest.is_empty() {
            return false;
        }
        match self.state {
            State::Text => self.text(last),
            State::Between => self.between(last),
            State::Object(_) => self.object(last),
            State::Name(separator, close) => self.name(separator, close),
            State::Value(_, close) => self.value(close, last),
            State::Close(close) => self.close(close, last),
            State::PairName(pairs) => self.pair_name(pairs),
            State::PairKey(pairs) => self.pair_key(pairs, last),
            State::PairValue(pairs, _) => self.pair_value(pairs),
            State::Over => {
                self.rest.clear();
                false
            }
        }
    }

    /// Moves the first bytes of what was not looked at to what is held.
    fn hold(&mut self, bytes: usize) {
        self.held.extend(self.rest.drain(..bytes));
    }

    /// Text outside calls. White space at its end waits for what follows.
    fn give(&mut self, text: &str) {
        self.space.push_str(text);
        let mut text = std::mem::take(&mut self.space);
        let end = text.trim_end().len();
        self.space = text.split_off(end);
        // Nothing but calls stood before it.
        if self.calls > 0 && !self.said {
            text = text.trim_start().to_owned();
        }
        self.say(text);
    }

    fn say(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        self.said = true;
        match self.out.last_mut() {
            Some(Part::Text(before)) => before.push_str(&text),
            _ => self.out.push(Part::Text(text)),
        }
    }

    /// What was held is no call.
    fn give_back(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.give(&held);
        self.state = State::Text;
    }

    /// Tells of a call. False if it is none.
    fn tell(&mut self, name: &str) -> bool {
        if name.is_empty() || name.len() > MAX_NAME || (self.bare && self.tools.tool(name).is_none()) {
            return false;
        }
        self.held.clear();
        self.space.clear();
        let index = self.calls;
        let id = self.id(name, index);
        self.out.push(Part::Call { index, id, name: name.to_owned() });
        self.told = Some(name.to_owned());
        self.calls += 1;
        self.block_calls += 1;
        self.pairs = 0;
        true
    }

    fn argue(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let now = self.calls - 1;
        match self.out.last_mut() {
            Some(Part::Arguments { index, text: before }) if *index == now => before.push_str(text),
            _ => self.out.push(Part::Arguments { index: now, text: text.to_owned() }),
        }
    }

    fn end_call(&mut self) {
        self.told = None;
        self.held.clear();
        self.state = if self.calls >= self.tools.most { State::Over } else { State::Between };
    }

    fn id(&self, name: &str, index: usize) -> String {
        let letters = |count: usize| -> String {
            const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
            (0..count).map(|_| char::from(LETTERS[((self.random)() % 62) as usize])).collect()
        };
        match self.family().ids {
            Ids::Any => format!("call_{}", letters(24)),
            Ids::Nine => letters(9),
            Ids::Counted => format!("functions.{name}:{index}"),
        }
    }

    fn text(&mut self, last: bool) -> bool {
        let family = self.family();
        let at_start = family.bare && !self.said && self.calls == 0;
        if at_start && self.rest.trim_start().starts_with('{') {
            let bytes = self.rest.len() - self.rest.trim_start().len();
            self.held = std::mem::take(&mut self.space);
            self.hold(bytes);
            self.open(true);
            return true;
        }
        if let Some(at) = self.rest.find(family.begin) {
            let before: String = self.rest.drain(..at).collect();
            self.give(&before);
            self.held = std::mem::take(&mut self.space);
            self.hold(family.begin.len());
            self.open(false);
            return true;
        }
        let keep = if last { 0 } else { begun(&self.rest, family.begin) };
        let certain: String = self.rest.drain(..self.rest.len() - keep).collect();
        self.give(&certain);
        false
    }

    fn open(&mut self, bare: bool) {
        self.bare = bare;
        self.in_list = false;
        self.block_calls = 0;
        self.state = State::Between;
    }

    fn between(&mut self, last: bool) -> bool {
        let family = self.family();
        let space = self.rest.len() - self.rest.trim_start().len();
        if space > 0 {
            self.hold(space);
            return true;
        }
        match look(&self.rest, family.end, last) {
            Found::Yes => {
                self.hold(family.end.len());
                match self.block_calls {
                    0 => self.give_back(),
                    _ => {
                        self.held.clear();
                        self.state = State::Text;
                    }
                }
                return true;
            }
            Found::Maybe => return false,
            Found::No => {}
        }
        let first = self.rest.chars().next().unwrap_or_default();
        let json = family.styles.iter().any(|style| matches!(style, Style::Json { .. }));
        match first {
            '{' if json => {
                self.state = State::Object(Object::new());
                return true;
            }
            '[' if json && !self.in_list && self.block_calls == 0 => self.in_list = true,
            // What separates calls, and brackets too many.
            ',' | ';' | '}' | ']' if self.block_calls > 0 && json => {}
            _ => return self.other_styles(last),
        }
        self.hold(1);
        true
    }

    /// A call that is no JSON object, or none at all.
    fn other_styles(&mut self, last: bool) -> bool {
        let mut wait = false;
        for style in self.family().styles {
            let (open, state) = match style {
                Style::Json { .. } => continue,
                Style::Named { open, separator, close } => (*open, State::Name(separator, close)),
                Style::Pairs(pairs) => (pairs.name_open, State::PairName(pairs)),
            };
            let found = match open {
                "" if self.block_calls == 0 => Found::Yes,
                _ => look(&self.rest, open, last),
            };
            match found {
                Found::Yes => {
                    self.hold(open.len());
                    self.state = state;
                    return true;
                }
                Found::Maybe => wait = true,
                Found::No => {}
            }
        }
        if wait {
            return false;
        }
        if self.block_calls > 0 {
            self.held.retain(char::is_whitespace);
        }
        self.give_back();
        true
    }

    fn object(&mut self, last: bool) -> bool {
        let end = self.family().end;
        let told = self.told.is_some();
        let mut done = None;
        let mut ready = false;
        let mut read = 0;
        let State::Object(object) = &mut self.state else { return false };
        for (at, c) in self.rest.char_indices() {
            // A block that is closed in the middle of a call: what there is of it is given through.
            let found = if object.in_text() { Found::No } else { look(&self.rest[at..], end, last) };
            let step = match found {
                Found::Yes => Step::Broken,
                Found::Maybe => break,
                Found::No => object.push(c),
            };
            if step == Step::Broken {
                done = Some(step);
                break;
            }
            read = at + c.len_utf8();
            if step == Step::Done {
                done = Some(step);
                break;
            }
            // At the very character, so that it does not depend on how the text is cut.
            ready = !told && object.has_arguments() && object.name().is_some() && object.may_hand_on();
            if ready {
                break;
            }
        }
        let name = object.name().map(str::to_owned);
        let complete = done == Some(Step::Done);
        // A call without arguments is one where a mark says so.
        let is_call = object.has_arguments() || (complete && !self.bare);
        let is_ready = ready || done.is_some();
        let missing = complete && !object.has_arguments();
        let arguments = match (told || is_ready) && (object.may_hand_on() || done.is_some()) {
            true if missing => "{}".to_owned(),
            true => object.take(),
            false => String::new(),
        };
        self.hold(read);
        if !told && is_ready {
            let tells = is_call && name.is_some_and(|name| self.tell(&name));
            if !tells {
                self.give_back();
                return true;
            }
        }
        if self.told.is_some() {
            self.held.clear();
            self.argue(&arguments);
        }
        match done {
            Some(_) => self.end_call(),
            None => return ready,
        }
        true
    }

    fn name(&mut self, separator: &'static str, close: &'static str) -> bool {
        let Some(at) = self.rest.find(separator) else {
            if self.rest.len() <= MAX_NAME + separator.len() {
                return false;
            }
            self.give_back();
            return true;
        };
        if at > MAX_NAME {
            self.give_back();
            return true;
        }
        let raw = self.rest[..at].split("[CALL_ID]").next().unwrap_or_default().trim();
        // Kimi's names have a counter, and say that they are functions.
        let bare = match self.family().ids {
            Ids::Counted => {
                raw.strip_prefix("functions.").unwrap_or(raw).split(':').next().unwrap_or_default()
            }
            Ids::Any | Ids::Nine => raw,
        };
        let name = bare.to_owned();
        if name.contains(char::is_whitespace) || !self.tell(&name) {
            self.give_back();
            return true;
        }
        self.rest.drain(..at + separator.len());
        self.state = State::Value(Scan::default(), close);
        true
    }

    fn value(&mut self, close: &'static str, last: bool) -> bool {
        let State::Value(scan, _) = &mut self.state else { return false };
        let mut given = String::new();
        let mut read = 0;
        let mut ended = false;
        for (at, c) in self.rest.char_indices() {
            if !scan.in_text() {
                match look(&self.rest[at..], close, last) {
                    Found::Yes => {
                        ended = true;
                        break;
                    }
                    Found::Maybe => break,
                    Found::No => {}
                }
            }
            let taken = match scan.kind() {
                // Words that are no JSON end with the call.
                Some(Kind::Bare) if !close.is_empty() => Taken::In,
                _ => scan.push(c),
            };
            if taken == Taken::Before {
                ended = true;
                break;
            }
            if scan.kind().is_some() {
                given.push(c);
            }
            read = at + c.len_utf8();
            if taken == Taken::Last {
                ended = true;
                break;
            }
        }
        self.rest.drain(..read);
        self.argue(&given);
        if ended {
            // Nothing is waited for behind the last one.
            match close.is_empty() || self.calls >= self.tools.most {
                true => self.end_call(),
                false => self.state = State::Close(close),
            }
        }
        ended
    }

    fn close(&mut self, close: &'static str, last: bool) -> bool {
        // White space may be part of what closes.
        match look(&self.rest, close, last) {
            Found::Yes => {
                self.rest.drain(..close.len());
            }
            Found::Maybe => return false,
            Found::No => {
                let space = self.rest.len() - self.rest.trim_start().len();
                if space > 0 && !close.is_empty() {
                    let first = self.rest.chars().next().map_or(0, char::len_utf8);
                    self.rest.drain(..first);
                    return true;
                }
            }
        }
        self.end_call();
        true
    }

    fn pair_name(&mut self, pairs: &'static Pairs) -> bool {
        let family = self.family();
        let ends = [pairs.name_close, pairs.key_open, family.end];
        let first = ends.iter().filter(|end| !end.is_empty()).filter_map(|end| self.rest.find(end)).min();
        let longest = ends.iter().map(|end| end.len()).max().unwrap_or(0);
        let Some(at) = first.filter(|at| *at <= MAX_NAME) else {
            if first.is_none() && self.rest.len() <= MAX_NAME + longest {
                return false;
            }
            self.give_back();
            return true;
        };
        let name = self.rest[..at].trim().to_owned();
        if name.contains(char::is_whitespace) || name.contains('{') || !self.tell(&name) {
            self.give_back();
            return true;
        }
        let close = if self.rest[at..].starts_with(pairs.name_close) { pairs.name_close.len() } else { 0 };
        self.rest.drain(..at + close);
        self.state = State::PairKey(pairs);
        true
    }

    fn pair_key(&mut self, pairs: &'static Pairs, last: bool) -> bool {
        let space = self.rest.len() - self.rest.trim_start().len();
        self.rest.drain(..space);
        if self.rest.is_empty() {
            return false;
        }
        match look(&self.rest, pairs.key_open, last) {
            Found::Yes => {
                let Some(at) = self.rest.find(pairs.key_close) else { return false };
                let key = self.rest[pairs.key_open.len()..at].trim().to_owned();
                self.rest.drain(..at + pairs.key_close.len());
                self.state = State::PairValue(pairs, key);
                return true;
            }
            Found::Maybe => return false,
            Found::No => {}
        }
        match look(&self.rest, pairs.close, last) {
            Found::Yes => {
                self.rest.drain(..pairs.close.len());
            }
            Found::Maybe => return false,
            // The block's end, or something that is no argument.
            Found::No => {
                if look(&self.rest, self.family().end, last) == Found::Maybe {
                    return false;
                }
            }
        }
        self.argue(if self.pairs == 0 { "{}" } else { "}" });
        self.end_call();
        true
    }

    fn pair_value(&mut self, pairs: &'static Pairs) -> bool {
        let Some(end) = self.rest.find(pairs.value_close) else { return false };
        let raw = self.rest[..end].to_owned();
        self.rest.drain(..end + pairs.value_close.len());
        let State::PairValue(_, key) = std::mem::replace(&mut self.state, State::PairKey(pairs)) else {
            return false;
        };
        let inner = match raw.find(pairs.value_open) {
            Some(at) if !pairs.value_open.is_empty() => &raw[at + pairs.value_open.len()..],
            _ => raw.as_str(),
        };
        let inner = match pairs.lines {
            true => {
                let inner = inner.strip_prefix('\n').unwrap_or(inner);
                inner.strip_suffix('\n').unwrap_or(inner)
            }
            false => inner,
        };
        let tool = self.told.as_deref().and_then(|name| self.tools.tool(name));
        let value = typed(inner, &tool.map(|tool| tool.types(&key)).unwrap_or_default());
        let before = if self.pairs == 0 { "{" } else { ", " };
        let text = format!("{before}{}: {value}", Value::String(key));
        self.pairs += 1;
        self.argue(&text);
        true
    }
}

/// A value that was written without quotes, as one of the types that its schema allows. Without any it is a text.
fn typed(raw: &str, types: &[&str]) -> Value {
    let text = || Value::String(raw.to_owned());
    let word = raw.trim();
    let read = match word {
        "True" => Some(Value::Bool(true)),
        "False" => Some(Value::Bool(false)),
        "None" => Some(Value::Null),
        _ => serde_json::from_str(word).ok(),
    };
    let Some(read) = read else { return text() };
    let fits = types.iter().any(|kind| match *kind {
        "integer" => read.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => read.is_number(),
        "boolean" => read.is_boolean(),
        "null" => read.is_null(),
        "object" => read.is_object(),
        "array" => read.is_array(),
        _ => false,
    });
    if fits { read } else { text() }
}
