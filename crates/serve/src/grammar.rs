//! Answers held to a JSON schema.
//!
//! The grammar engine is `llguidance`; it walks a trie of our own tokenizer's pieces, so there is no second tokenizer to
//! disagree with. Invariants, each a test: an answer that was chosen under the masks and ended by itself is JSON that the
//! schema accepts; an id that ends the answer is open exactly where the JSON may end; control tokens are never open;
//! what one answer does never changes another's masks.
//!
//! A schema comes from outside. Its size and nesting are limited here, the work to compile it and to take one step by
//! the fuel of the grammar engine.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use draftsmith_decode::{Grammar, GrammarState};
use draftsmith_text::Tokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Map, Value, json};

use crate::api::ApiError;

/// Longest schema, as JSON text.
const MAX_SCHEMA_BYTES: usize = 64 << 10;

/// Longest grammar of the tools of a request.
const MAX_TOOLS_BYTES: usize = 1 << 20;

/// Deepest nesting of a schema, in JSON values.
const MAX_SCHEMA_DEPTH: usize = 64;

/// Longest `pattern`, and name in `patternProperties`.
const MAX_PATTERN_BYTES: usize = 1 << 10;

/// Compiled grammars that are kept.
const KEPT_GRAMMARS: usize = 64;

/// Parts of a refused schema that are tried alone to find the one that is wrong.
const MAX_TRIALS: usize = 64;

/// The grammar engine descends once per nesting and per chained reference; a schema of [`MAX_SCHEMA_BYTES`] that is one
/// long chain needs this much. Only what is used becomes memory.
const COMPILE_STACK_BYTES: usize = 256 << 20;

/// Longest piece that goes into the trie; its limit is 1,024.
const MAX_PIECE_BYTES: usize = 1000;

/// White space between the parts of the JSON: one space, or one line break with indentation. Any amount would also be
/// JSON, and some models never stop writing it.
const WHITESPACE: &str = r" |\r?\n[ \t]{0,64}";
/// The same in the arguments of a call, which are short.
const CALL_WHITESPACE: &str = r" |\r?\n[ \t]{0,12}";

/// Why a schema is not taken. `path` names the place in the schema, for example `properties.age`; empty at its top.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum GrammarError {
    /// More text than is compiled.
    #[error("the schema has {found} bytes, {limit} are taken")]
    TooLarge {
        /// Its length as JSON text.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Nested too deep.
    #[error("`{path}` is nested deeper than {limit} levels")]
    TooDeep {
        /// The place.
        path: String,
        /// The limit.
        limit: usize,
    },
    /// A pattern that is too long.
    #[error("the pattern at `{path}` has {found} bytes, {limit} are taken")]
    LongPattern {
        /// The place.
        path: String,
        /// Its length.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Something that is no schema, or that cannot be held to.
    #[error("{}{detail}", at(path))]
    Refused {
        /// The place.
        path: String,
        /// What the grammar engine says.
        detail: String,
    },
    /// A tokenizer that cannot say when an answer ends.
    #[error("the target's tokenizer names no token that ends an answer")]
    NoEnd,
    /// A tokenizer without a trie.
    #[error("no grammar can be made for the target's tokenizer: {detail}")]
    Tokenizer {
        /// Why.
        detail: String,
    },
}

impl GrammarError {
    /// What the user can do.
    pub(crate) fn hint(&self) -> Option<String> {
        Some(match self {
            GrammarError::TooLarge { .. } | GrammarError::TooDeep { .. } => {
                "move repeated parts to `$defs`, or ask for less in one answer".into()
            }
            GrammarError::LongPattern { .. } => "use a shorter pattern, or `enum`".into(),
            GrammarError::Refused { .. } => "mend it, or leave it out and check the answer yourself".into(),
            GrammarError::NoEnd | GrammarError::Tokenizer { .. } => return None,
        })
    }

    /// The answer to a request with such a schema, which stands in its field `at`.
    pub(crate) fn into_api_error(self, at: &str) -> ApiError {
        let mut param = at.to_owned();
        if !self.path().is_empty() {
            param = format!("{param}.{}", self.path());
        }
        let hint = self.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
        ApiError::invalid(param, format!("the answer cannot be held to the schema: {self}{hint}"))
    }

    /// The place in the schema; empty at its top or where the schema is not to blame.
    pub(crate) fn path(&self) -> &str {
        match self {
            GrammarError::TooDeep { path, .. }
            | GrammarError::LongPattern { path, .. }
            | GrammarError::Refused { path, .. } => path,
            GrammarError::TooLarge { .. } | GrammarError::NoEnd | GrammarError::Tokenizer { .. } => "",
        }
    }
}

/// The place in front of a message.
fn at(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("`{path}`: ") }
}

/// Makes grammars for one tokenizer and keeps those that were made.
pub(crate) struct Grammars {
    factory: ParserFactory,
    /// Most recently used last; the key is the schema's text, whose order is the order of the answer's properties.
    kept: Mutex<VecDeque<(String, Arc<Compiled>)>>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    /// Builds the trie of a tokenizer, in a fraction of a second.
    ///
    /// # Errors
    /// [`GrammarError::NoEnd`], [`GrammarError::Tokenizer`].
    pub(crate) fn new(tokenizer: &Tokenizer) -> Result<Grammars, GrammarError> {
        let ends = tokenizer.eos_ids();
        let first = *ends.first().ok_or(GrammarError::NoEnd)?;
        let pieces: Vec<Vec<u8>> =
            (0..tokenizer.vocab_size() as u32).map(|id| trie_piece(tokenizer, id)).collect();
        let info = TokRxInfo::new(pieces.len() as u32, first);
        let trie = TokTrie::from(&info, &pieces).with_eos_tokens(ends);
        // Not canonical: the grammar never forces a tokenisation, the target chooses among all that spell the JSON.
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env)
            .map_err(|e| GrammarError::Tokenizer { detail: first_line(&e.to_string()) })?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            // A state takes one to two kilobytes; an answer that needs more of them is cut.
            max_lexer_states: 20_000,
            max_grammar_size: 200_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Grammars { factory, kept: Mutex::default() })
    }

    /// The grammar of a JSON schema. Properties are written in the schema's order.
    ///
    /// # Errors
    /// [`GrammarError::TooLarge`], [`GrammarError::TooDeep`], [`GrammarError::LongPattern`]; [`GrammarError::Refused`]
    /// for a schema that is none, that no value satisfies, that uses a keyword which cannot be held to (`not`, `if`,
    /// `uniqueItems`, …), or that takes too much work.
    pub(crate) fn json_schema(&self, schema: &Value) -> Result<JsonGrammar, GrammarError> {
        let text = schema.to_string();
        if text.len() > MAX_SCHEMA_BYTES {
            return Err(GrammarError::TooLarge { found: text.len(), limit: MAX_SCHEMA_BYTES });
        }
        if let Some(compiled) = self.look_up(&text) {
            return Ok(JsonGrammar::new(compiled));
        }
        check(schema, schema, &mut Vec::new())?;
        let compiled = self.compile_aside(schema)?;
        Ok(JsonGrammar::new(self.keep(text, compiled)))
    }

    /// The grammar of calls, in Lark's words with schemas inside that [`Grammars::json_schema`] takes one by one.
    ///
    /// # Errors
    /// [`GrammarError::TooLarge`]; [`GrammarError::Refused`] without a place.
    pub(crate) fn calls(
        &self,
        lark: &str,
        trigger: Option<Trigger>,
        tokenizer: &Arc<Tokenizer>,
    ) -> Result<JsonGrammar, GrammarError> {
        let limit = MAX_TOOLS_BYTES;
        if lark.len() > limit {
            return Err(GrammarError::TooLarge { found: lark.len(), limit });
        }
        let compiled = match self.look_up(lark) {
            Some(compiled) => compiled,
            None => {
                let refused = |detail: String| GrammarError::Refused { path: String::new(), detail };
                let grammar = TopLevelGrammar::from_lark(lark.to_owned());
                let compiled = aside(|| self.compile_grammar(grammar).map_err(refused))?;
                self.keep(lark.to_owned(), compiled)
            }
        };
        let lazy = trigger.map(|trigger| (trigger, Arc::clone(tokenizer)));
        Ok(JsonGrammar { lazy, ..JsonGrammar::new(compiled) })
    }

    fn keep(&self, key: String, compiled: Compiled) -> Arc<Compiled> {
        let compiled = Arc::new(compiled);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT_GRAMMARS {
            kept.pop_front();
        }
        kept.push_back((key, Arc::clone(&compiled)));
        compiled
    }

    /// A grammar made before; it becomes the most recently used.
    fn look_up(&self, text: &str) -> Option<Arc<Compiled>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let place = kept.iter().position(|(key, _)| key == text)?;
        let entry = kept.remove(place)?;
        let compiled = Arc::clone(&entry.1);
        kept.push_back(entry);
        Some(compiled)
    }

    /// Compiles on a thread with room for deep recursion, and names the place that is wrong.
    fn compile_aside(&self, schema: &Value) -> Result<Compiled, GrammarError> {
        aside(|| {
            self.compile(schema.clone()).map_err(|detail| {
                let path = self.find_cause(schema, &detail);
                GrammarError::Refused { path, detail }
            })
        })
    }

    fn compile(&self, mut schema: Value) -> Result<Compiled, String> {
        if schema == Value::Bool(true) {
            schema = json!({});
        }
        if schema.get(OPTIONS_KEYWORD).is_some() {
            return Err(format!("`{OPTIONS_KEYWORD}` is not taken"));
        }
        self.compile_grammar(TopLevelGrammar::from_json_schema(with_options(&schema)))
    }

    fn compile_grammar(&self, grammar: TopLevelGrammar) -> Result<Compiled, String> {
        let parser = self.factory.create_parser(grammar).map_err(|e| first_line(&e.to_string()))?;
        let trie = self.factory.tok_env().tok_trie();
        let start = Matcher::new(Ok(parser));
        // A schema that nothing satisfies shows here, not in the middle of an answer.
        start.deep_clone().compute_mask().map_err(|e| first_line(&e.to_string()))?;
        Ok(Compiled { start, ends: trie.eos_token_set(), env: Arc::clone(self.factory.tok_env()) })
    }

    /// The deepest part of a refused schema that is refused for the same reason when it stands alone.
    fn find_cause(&self, schema: &Value, detail: &str) -> String {
        let whole = moved_to(schema, "#/$defs/whole");
        let mut path: Vec<String> = Vec::new();
        let mut trials = 0;
        let mut part = schema;
        'deeper: loop {
            for (steps, inner) in inner_schemas(part) {
                trials += 1;
                if trials > MAX_TRIALS {
                    break 'deeper;
                }
                let tried: Vec<String> = path.iter().chain(&steps).cloned().collect();
                let alone =
                    json!({"$ref": format!("#/$defs/whole/{}", tried.join("/")), "$defs": {"whole": whole}});
                if self.compile(alone).err().as_deref() == Some(detail) {
                    (path, part) = (tried, inner);
                    continue 'deeper;
                }
            }
            break;
        }
        path.join(".")
    }
}

/// Where the grammar engine reads its own options from; ours to set.
const OPTIONS_KEYWORD: &str = "x-guidance";

/// What an id spells in the trie; nothing for ids that no JSON may hold. An end token is open by its id, not its text.
fn trie_piece(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let piece = tokenizer.token_to_piece(id);
    let usable = !tokenizer.is_special(id)
        && !tokenizer.eos_ids().contains(&id)
        && piece.len() <= MAX_PIECE_BYTES
        // The trie's mark of control tokens; no UTF-8 has this byte.
        && !piece.contains(&TokTrie::SPECIAL_TOKEN_MARKER);
    if usable { piece.to_vec() } else { Vec::new() }
}

/// The grammar engine adds its state behind the first line.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// Nesting, patterns and references below `value`, which stands in `whole` at `path`. Recursion ends at the limit that it
/// checks.
fn check(whole: &Value, value: &Value, path: &mut Vec<String>) -> Result<(), GrammarError> {
    if path.len() > MAX_SCHEMA_DEPTH {
        path.truncate(4);
        return Err(GrammarError::TooDeep { path: path.join("."), limit: MAX_SCHEMA_DEPTH });
    }
    match value {
        Value::Object(entries) => {
            for (key, inner) in entries {
                if path.last().is_some_and(|last| last == "patternProperties") {
                    check_pattern(key, path)?;
                }
                path.push(key.clone());
                match (key.as_str(), inner) {
                    ("pattern", Value::String(text)) => check_pattern(text, path)?,
                    ("$ref", Value::String(to)) => check_reference(whole, to, path)?,
                    _ => {}
                }
                check(whole, inner, path)?;
                path.pop();
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                path.push(index.to_string());
                check(whole, inner, path)?;
                path.pop();
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
    Ok(())
}

fn check_pattern(text: &str, path: &[String]) -> Result<(), GrammarError> {
    let (found, limit) = (text.len(), MAX_PATTERN_BYTES);
    if found > limit {
        return Err(GrammarError::LongPattern { path: path.join("."), found, limit });
    }
    Ok(())
}

fn check_reference(whole: &Value, to: &str, path: &[String]) -> Result<(), GrammarError> {
    let detail = match to.strip_prefix('#') {
        None => format!("`{to}` leads out of the schema"),
        Some("" | "/") => return Ok(()),
        Some(pointer) if whole.pointer(pointer).is_some() => return Ok(()),
        Some(_) => format!("`{to}` is not in the schema"),
    };
    Err(GrammarError::Refused { path: path.join("."), detail })
}

/// The schemas directly inside a schema, each with the steps that lead to it. Names that a reference cannot spell are
/// left out.
fn inner_schemas(schema: &Value) -> Vec<(Vec<String>, &Value)> {
    let mut inner = Vec::new();
    for (keyword, value) in schema.as_object().into_iter().flatten() {
        match (keyword.as_str(), value) {
            ("properties" | "patternProperties" | "$defs" | "definitions", Value::Object(named)) => {
                let plain =
                    named.iter().filter(|(name, _)| !name.is_empty() && !name.contains(['/', '~', '%']));
                inner.extend(plain.map(|(name, value)| (vec![keyword.clone(), name.clone()], value)));
            }
            ("anyOf" | "oneOf" | "allOf" | "prefixItems" | "items", Value::Array(listed)) => {
                let numbered = listed.iter().enumerate();
                inner.extend(numbered.map(|(i, value)| (vec![keyword.clone(), i.to_string()], value)));
            }
            ("items" | "additionalItems" | "additionalProperties", value) => {
                inner.push((vec![keyword.clone()], value));
            }
            _ => {}
        }
    }
    inner
}

/// Works on a thread with room for deep recursion.
fn aside<T: Send>(work: impl FnOnce() -> Result<T, GrammarError> + Send) -> Result<T, GrammarError> {
    let refused = |detail: String| GrammarError::Refused { path: String::new(), detail };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("grammar".into())
            .stack_size(COMPILE_STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|e| refused(format!("no thread to compile it on: {e}")))?
            .join()
            .unwrap_or_else(|_| Err(refused("the schema could not be compiled".into())))
    })
}

/// A schema with what we ask of the grammar engine.
pub(crate) fn with_options(schema: &Value) -> Value {
    with_white_space(schema, WHITESPACE)
}

/// The same for the arguments of a call.
pub(crate) fn with_call_options(schema: &Value) -> Value {
    with_white_space(schema, CALL_WHITESPACE)
}

fn with_white_space(schema: &Value, pattern: &str) -> Value {
    let mut schema = schema.clone();
    if schema.is_object() {
        let options =
            JsonCompileOptions { whitespace_pattern: Some(pattern.into()), ..JsonCompileOptions::default() };
        options.apply_to(&mut schema);
    }
    schema
}

/// A schema as it stands at `place`, for example `#/$defs/whole`: references into it follow.
pub(crate) fn moved_to(value: &Value, place: &str) -> Value {
    match value {
        Value::Object(entries) => {
            let entries = entries.iter().map(|(key, inner)| {
                let inner = match (key.as_str(), inner) {
                    ("$ref", Value::String(to)) if to.starts_with('#') => {
                        let below = to.trim_start_matches('#').trim_end_matches('/');
                        Value::String(format!("{place}{below}"))
                    }
                    _ => moved_to(inner, place),
                };
                (key.clone(), inner)
            });
            Value::Object(entries.collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.iter().map(|item| moved_to(item, place)).collect()),
        other => other.clone(),
    }
}

/// A schema made ready.
struct Compiled {
    /// The state before the first token; copied, never advanced.
    start: Matcher,
    /// The ids that end an answer.
    ends: SimpleVob,
    env: TokEnv,
}

impl Compiled {
    /// Ids that spell these bytes.
    fn spell(&self, bytes: &[u8]) -> Vec<u32> {
        self.env.tok_trie().greedy_tokenize(bytes)
    }
}

/// The grammar of one request.
pub(crate) struct JsonGrammar {
    compiled: Arc<Compiled>,
    /// The answer is free until this.
    lazy: Option<(Trigger, Arc<Tokenizer>)>,
    cut: Arc<AtomicBool>,
}

/// What a grammar begins at that holds a part of the answer alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trigger {
    /// This text, which is the grammar's own first one.
    pub(crate) begin: String,
    /// Or a brace, where nothing stands before it.
    pub(crate) bare: bool,
    /// What is behind a part that was held is free again; else the answer ends there.
    pub(crate) again: bool,
}

impl JsonGrammar {
    fn new(compiled: Arc<Compiled>) -> JsonGrammar {
        JsonGrammar { compiled, lazy: None, cut: Arc::default() }
    }

    /// True once an answer of this request was ended before its JSON was complete, because a step of the grammar would
    /// have taken too much work.
    pub(crate) fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for JsonGrammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JsonGrammar").field("cut", &self.was_cut()).finish_non_exhaustive()
    }
}

impl Grammar for JsonGrammar {
    fn begin(&self) -> Box<dyn GrammarState> {
        let compiled = Arc::clone(&self.compiled);
        match &self.lazy {
            None => Box::new(JsonState::new(compiled, Arc::clone(&self.cut))),
            Some((trigger, tokenizer)) => Box::new(LazyState {
                trigger: trigger.clone(),
                tokenizer: Arc::clone(tokenizer),
                compiled,
                cut: Arc::clone(&self.cut),
                stage: Stage::Free { tail: Vec::new(), at_start: true },
            }),
        }
    }
}

/// Where one answer stands.
struct JsonState {
    matcher: Matcher,
    compiled: Arc<Compiled>,
    cut: Arc<AtomicBool>,
}

impl JsonState {
    fn new(compiled: Arc<Compiled>, cut: Arc<AtomicBool>) -> JsonState {
        // A deep copy: a plain one would share the lexer's states, and with them its limits, with other answers.
        JsonState { matcher: compiled.start.deep_clone(), compiled, cut }
    }

    fn forked(&self) -> JsonState {
        JsonState {
            // Deep, so that what drafted tokens make of the lexer's states stays with them.
            matcher: self.matcher.deep_clone(),
            compiled: Arc::clone(&self.compiled),
            // An answer is cut by what is committed alone.
            cut: Arc::default(),
        }
    }
}

impl GrammarState for JsonState {
    fn mask(&mut self, logits: &mut [f32]) {
        let open = self.matcher.compute_mask_or_eos().unwrap_or_else(|_| {
            self.cut.store(true, Ordering::Relaxed);
            self.compiled.ends.clone()
        });
        let (tokens, beyond) = logits.split_at_mut(open.len().min(logits.len()));
        open.iter_unset_entries(|id| {
            if let Some(logit) = tokens.get_mut(id) {
                *logit = f32::NEG_INFINITY;
            }
        });
        // Rows of the head that no token has.
        beyond.fill(f32::NEG_INFINITY);
    }

    fn advance(&mut self, id: u32) {
        if !self.matcher.is_stopped() {
            // The matcher keeps its failure, and the next mask ends the answer.
            let _ = self.matcher.consume_token(id);
        }
    }

    fn fork(&self) -> Box<dyn GrammarState> {
        Box::new(self.forked())
    }
}

/// Where an answer stands whose parts alone are held.
enum Stage {
    /// No mark yet: the last bytes, and whether nothing but white space was said.
    Free {
        tail: Vec<u8>,
        at_start: bool,
    },
    Held(Box<JsonState>),
    /// Nothing may follow.
    Over,
}

/// An answer that is free until a mark, and then held to the grammar to its end.
struct LazyState {
    trigger: Trigger,
    tokenizer: Arc<Tokenizer>,
    compiled: Arc<Compiled>,
    cut: Arc<AtomicBool>,
    stage: Stage,
}

impl LazyState {
    /// The grammar behind the bytes that `id` completed; `None` if they are no beginning of it.
    fn begin_held(&self, id: u32, bytes: &[u8]) -> Option<JsonState> {
        let mut state = JsonState::new(Arc::clone(&self.compiled), Arc::clone(&self.cut));
        let whole = !bytes.is_empty() && self.tokenizer.token_to_piece(id) == bytes;
        let ids = if whole { vec![id] } else { self.compiled.spell(bytes) };
        if !ids.is_empty() {
            state.matcher.consume_tokens(&ids).ok()?;
        }
        Some(state)
    }
}

impl GrammarState for LazyState {
    fn mask(&mut self, logits: &mut [f32]) {
        match &mut self.stage {
            Stage::Free { .. } => {}
            Stage::Held(state) => state.mask(logits),
            Stage::Over => {
                for (id, logit) in logits.iter_mut().enumerate() {
                    if !u32::try_from(id).is_ok_and(|id| self.tokenizer.eos_ids().contains(&id)) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }

    fn advance(&mut self, id: u32) {
        let begun = match &mut self.stage {
            Stage::Over => return,
            Stage::Held(state) => {
                state.advance(id);
                if state.matcher.is_accepting().unwrap_or(false) {
                    self.stage = match self.trigger.again {
                        true => Stage::Free { tail: Vec::new(), at_start: false },
                        false => Stage::Over,
                    };
                }
                return;
            }
            Stage::Free { tail, at_start } => {
                let piece = self.tokenizer.token_to_piece(id);
                tail.extend_from_slice(piece);
                let begin = self.trigger.begin.as_bytes();
                let mark = tail.windows(begin.len()).position(|part| part == begin);
                // A grammar that a brace begins has no mark in it.
                let mark = mark.map(|at| if self.trigger.bare { at + begin.len() } else { at });
                let bare = tail.iter().position(|byte| !byte.is_ascii_whitespace());
                let brace = bare.filter(|at| self.trigger.bare && *at_start && tail[*at] == b'{');
                *at_start &= bare.is_none();
                let begun = mark.or(brace).map(|at| tail[at..].to_vec());
                // What may still become the mark.
                let keep = tail.len().min(begin.len() - 1);
                tail.drain(..tail.len() - keep);
                begun
            }
        };
        if let Some(state) = begun.and_then(|bytes| self.begin_held(id, &bytes)) {
            self.stage = Stage::Held(Box::new(state));
        }
    }

    fn fork(&self) -> Box<dyn GrammarState> {
        Box::new(LazyState {
            trigger: self.trigger.clone(),
            tokenizer: Arc::clone(&self.tokenizer),
            compiled: Arc::clone(&self.compiled),
            cut: Arc::default(),
            stage: match &self.stage {
                Stage::Free { tail, at_start } => Stage::Free { tail: tail.clone(), at_start: *at_start },
                Stage::Held(state) => Stage::Held(Box::new(state.forked())),
                Stage::Over => Stage::Over,
            },
        })
    }
}

#[cfg(test)]
mod tests;
