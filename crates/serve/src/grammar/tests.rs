use std::path::Path;
use std::sync::LazyLock;

use draftsmith_core::{Sampling, choose_token};
use draftsmith_text::{SpecialIds, TokenizerConfig};
use proptest::prelude::*;

use super::*;

/// Rows of a head that is wider than the vocabulary.
const ROWS_BEYOND: usize = 5;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
    let file = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let config =
        TokenizerConfig::parse(&file("tokenizer_config.json"), Some(&file("generation_config.json")));
    config.unwrap().tokenizer(&file("tokenizer.json")).unwrap()
});

static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&TOKENIZER).unwrap());

fn is_end(id: u32) -> bool {
    TOKENIZER.eos_ids().contains(&id)
}

/// Logits of a target that knows nothing, but would rather close something than go on for ever.
fn closing_logits() -> Vec<f32> {
    let rows = TOKENIZER.vocab_size() + ROWS_BEYOND;
    let closes = |id: u32| TOKENIZER.token_to_piece(id).iter().any(|b| b"\"]}".contains(b)) || is_end(id);
    (0..rows as u32).map(|id| if closes(id) { 4.0 } else { 0.0 }).collect()
}

/// The ids open in a state, ascending.
fn open(state: &mut dyn GrammarState) -> Vec<u32> {
    let mut logits = vec![0.0; TOKENIZER.vocab_size() + ROWS_BEYOND];
    state.mask(&mut logits);
    (0..logits.len() as u32).filter(|id| logits[*id as usize] == 0.0).collect()
}

/// A random answer under the masks; `None` if it did not end by itself within 600 tokens. `at_each` sees the text so far
/// and whether the answer may end there.
fn random_answer(grammar: &JsonGrammar, seed: u64, mut at_each: impl FnMut(&str, bool)) -> Option<String> {
    let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
    let mut state = grammar.begin();
    let mut ids = Vec::new();
    for position in 0..600 {
        let mut logits = closing_logits();
        state.mask(&mut logits);
        let may_end = TOKENIZER.eos_ids().iter().any(|id| logits[*id as usize].is_finite());
        at_each(&TOKENIZER.decode(&ids, false), may_end);
        let id = choose_token(&logits, &sampling, position).0;
        assert!(logits[id as usize].is_finite(), "a closed id was chosen");
        assert!(!grammar.was_cut());
        state.advance(id);
        if is_end(id) {
            return Some(TOKENIZER.decode(&ids, false));
        }
        ids.push(id);
    }
    None
}

/// The rules of JSON Schema that these tests use, written out from the standard.
fn accepts(root: &Value, schema: &Value, value: &Value) -> bool {
    let Some(schema) = schema.as_object() else { return schema == &Value::Bool(true) };
    let number = |keyword: &str| schema.get(keyword).map(|v| v.as_f64().unwrap());
    let all = |keyword: &str, test: &dyn Fn(&Value) -> bool| {
        schema.get(keyword).and_then(Value::as_array).is_none_or(|list| list.iter().all(test))
    };
    let any = |keyword: &str, test: &dyn Fn(&Value) -> bool| {
        schema.get(keyword).and_then(Value::as_array).is_none_or(|list| list.iter().any(test))
    };
    let is_type = |name: &Value| match name.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|v| v.fract() == 0.0),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{other}"),
    };
    let typed = match schema.get("type") {
        None => true,
        Some(Value::Array(names)) => names.iter().any(is_type),
        Some(name) => is_type(name),
    };
    let sized = |least: &str, most: &str, size: usize| {
        number(least).is_none_or(|n| size as f64 >= n) && number(most).is_none_or(|n| size as f64 <= n)
    };
    let shaped = match value {
        Value::Number(n) => {
            let n = n.as_f64().unwrap();
            number("minimum").is_none_or(|least| n >= least)
                && number("maximum").is_none_or(|most| n <= most)
                && number("exclusiveMinimum").is_none_or(|least| n > least)
                && number("exclusiveMaximum").is_none_or(|most| n < most)
                && number("multipleOf").is_none_or(|part| (n / part).fract() == 0.0)
        }
        Value::String(s) => sized("minLength", "maxLength", s.chars().count()),
        Value::Array(items) => {
            let first = schema.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let rest = schema.get("items");
            sized("minItems", "maxItems", items.len())
                && items
                    .iter()
                    .enumerate()
                    .all(|(i, item)| first.get(i).or(rest).is_none_or(|schema| accepts(root, schema, item)))
        }
        Value::Object(entries) => {
            let named = schema.get("properties").and_then(Value::as_object);
            all("required", &|name| entries.contains_key(name.as_str().unwrap()))
                && entries.iter().all(|(name, inner)| {
                    let schema =
                        named.and_then(|n| n.get(name)).or_else(|| schema.get("additionalProperties"));
                    schema.is_none_or(|schema| accepts(root, schema, inner))
                })
        }
        Value::Null | Value::Bool(_) => true,
    };
    let referred = schema
        .get("$ref")
        .and_then(Value::as_str)
        .is_none_or(|to| accepts(root, root.pointer(to.trim_start_matches('#')).unwrap(), value));
    typed
        && shaped
        && referred
        && schema.get("const").is_none_or(|constant| constant == value)
        && any("enum", &|allowed| allowed == value)
        && any("anyOf", &|inner| accepts(root, inner, value))
        && all("allOf", &|inner| accepts(root, inner, value))
        && any("oneOf", &|_| {
            let count =
                schema["oneOf"].as_array().unwrap().iter().filter(|s| accepts(root, s, value)).count();
            count == 1
        })
}

/// Random answers under a schema: each that ends is accepted, and an end is open exactly where the text is accepted.
fn check(schema: &Value, seeds: std::ops::Range<u64>) {
    let grammar = GRAMMARS.json_schema(schema).unwrap_or_else(|e| panic!("{e} in {schema}"));
    let mut ended = 0;
    for seed in seeds.clone() {
        let right = |text: &str| match serde_json::from_str::<Value>(text) {
            Ok(value) => accepts(schema, schema, &value),
            // JSON has numbers of any size; this reader stops at 1e308.
            Err(e) => e.to_string().contains("number out of range"),
        };
        let answer = random_answer(&grammar, seed, |text, may_end| {
            assert_eq!(right(text), may_end, "{schema}\nafter {text:?}");
        });
        if let Some(text) = answer {
            assert!(right(&text), "{schema}\nanswered {text:?}");
            ended += 1;
        }
    }
    assert!(ended * 2 > seeds.count(), "only {ended} answers ended for {schema}");
}

/// A schema of the kinds that people write, nested up to three levels.
fn schemas() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({"type": "boolean"})),
        Just(json!({"type": "null"})),
        (0u32..4, 0u32..6).prop_map(|(least, more)| {
            json!({"type": "string", "minLength": least, "maxLength": least + more})
        }),
        (-50i64..50, 0i64..300).prop_map(|(least, more)| {
            json!({"type": "integer", "minimum": least, "maximum": least + more})
        }),
        Just(json!({"enum": ["red", "green \"light\"", 7, null, "größe\n"]})),
        Just(json!({"const": {"kind": "a", "of": [1, true]}})),
        Just(json!({"type": ["string", "null"]})),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            (inner.clone(), 0u32..3, 0u32..3).prop_map(|(items, least, more)| {
                json!({"type": "array", "items": items, "minItems": least, "maxItems": least + more})
            }),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| json!({"anyOf": [a, b]})),
            (inner.clone(), inner, any::<[bool; 3]>()).prop_map(|(a, b, [with_a, with_b, open])| {
                let required: Vec<&str> = [("a", with_a), ("b \"x\"", with_b)]
                    .iter()
                    .filter(|(_, r)| *r)
                    .map(|(n, _)| *n)
                    .collect();
                json!({"type": "object", "properties": {"a": a, "b \"x\"": b}, "required": required,
                       "additionalProperties": open})
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_under_a_random_schema_is_accepted_by_it(schema in schemas()) {
        check(&schema, 0..4);
    }
}

#[test]
fn answers_follow_the_schemas_that_clients_send() {
    check(&json!({"type": "object"}), 0..20);
    check(&json!(true), 0..10);
    check(&json!({}), 0..10);
    check(&json!({"type": "number", "exclusiveMinimum": 0.5, "maximum": 20}), 0..20);
    check(&json!({"type": "integer", "multipleOf": 25, "minimum": 0, "maximum": 1000}), 0..20);
    check(
        &json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Person", "type": "object", "additionalProperties": false,
            "properties": {
                "name": {"type": "string", "description": "a name"},
                "age": {"type": "integer", "minimum": 0, "maximum": 150, "default": 7},
                "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}, "maxItems": 3},
            },
            "required": ["name", "age", "pets"],
            "$defs": {"Pet": {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}},
                              "required": ["kind"], "additionalProperties": false}},
        }),
        0..20,
    );
    // A tree: the schema refers to itself.
    check(
        &json!({"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#"}},
                "required": ["v"], "additionalProperties": false}),
        0..20,
    );
    check(
        &json!({"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": false, "minItems": 2}),
        0..5,
    );
    check(&json!({"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]}), 0..20);
    check(&json!({"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 9}]}), 0..20);
}

#[test]
fn patterns_and_formats_hold() {
    let grammar = GRAMMARS.json_schema(&json!({"type": "string", "pattern": "^[a-c]{2,4}-[0-9]$"})).unwrap();
    for seed in 0..20 {
        let text = random_answer(&grammar, seed, |_, _| {}).unwrap();
        let inner = text.trim().strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap();
        let (letters, digit) = inner.split_once('-').unwrap();
        assert!((2..=4).contains(&letters.len()) && letters.bytes().all(|b| b"abc".contains(&b)), "{text}");
        assert!(digit.len() == 1 && digit.as_bytes()[0].is_ascii_digit(), "{text}");
    }
    let grammar = GRAMMARS.json_schema(&json!({"type": "string", "format": "date"})).unwrap();
    let text = random_answer(&grammar, 1, |_, _| {}).unwrap();
    assert_eq!(text.trim().len(), "\"2026-11-23\"".len(), "{text}");
}

#[test]
fn exactly_the_open_ids_can_be_taken_in() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "number"}}});
    let compiled = GRAMMARS.compile(schema).unwrap();
    let mut matcher = compiled.start.deep_clone();
    for id in TOKENIZER.encode("{\"a\": \"ö\\n x\", \"b\": -1.5e3", false).unwrap() {
        let mask = matcher.compute_mask().unwrap();
        for other in 0..TOKENIZER.vocab_size() as u32 {
            let taken = matcher.deep_clone().consume_token(other).is_ok();
            assert_eq!(taken, mask.is_allowed(other), "id {other} {:?}", TOKENIZER.token_to_piece(other));
        }
        matcher.consume_token(id).unwrap();
    }
}

#[test]
fn the_first_token_opens_the_object_and_nothing_else() {
    let grammar = GRAMMARS.json_schema(&json!({"type": "object"})).unwrap();
    let mut state = grammar.begin();
    for id in open(state.as_mut()) {
        assert_eq!(TOKENIZER.token_to_piece(id)[0], b'{', "{:?}", TOKENIZER.token_to_piece(id));
    }
}

#[test]
fn an_end_is_open_when_the_answer_is_complete_and_stays_the_only_choice() {
    let grammar = GRAMMARS.json_schema(&json!({"const": true})).unwrap();
    let mut state = grammar.begin();
    assert!(!open(state.as_mut()).iter().any(|id| is_end(*id)));
    for id in TOKENIZER.encode("true", false).unwrap() {
        state.advance(id);
    }
    let end = TOKENIZER.eos_ids()[0];
    assert!(open(state.as_mut()).contains(&end));
    // A draft may go on behind the end; the state must have an answer for those rows too.
    for _ in 0..3 {
        state.advance(end);
        let mut ends = TOKENIZER.eos_ids().to_vec();
        ends.sort_unstable();
        assert_eq!(open(state.as_mut()), ends);
    }
    assert!(!grammar.was_cut());
}

#[test]
fn control_tokens_and_rows_without_a_token_are_never_open() {
    let grammar = GRAMMARS.json_schema(&json!({"type": "string"})).unwrap();
    let mut state = grammar.begin();
    for id in TOKENIZER.encode("\"a", false).unwrap() {
        state.advance(id);
    }
    let open = open(state.as_mut());
    assert!(open.len() > 500, "inside a string nearly everything is open");
    let vocab = TOKENIZER.vocab_size() as u32;
    assert!(open.iter().all(|id| *id < vocab && !TOKENIZER.is_special(*id)), "{open:?}");
}

#[test]
fn answers_that_share_a_grammar_do_not_disturb_each_other() {
    let grammar = GRAMMARS.json_schema(&json!({"type": "array", "items": {"type": "integer"}})).unwrap();
    let alone = random_answer(&grammar, 3, |_, _| {});
    let mut other = grammar.begin();
    let mixed = random_answer(&grammar, 3, |_, _| {
        let id = *open(other.as_mut()).last().unwrap();
        other.advance(id);
    });
    assert_eq!(alone, mixed);
}

#[test]
fn a_head_narrower_than_the_vocabulary_is_masked_without_a_panic() {
    let mut logits = vec![0.0; 40];
    GRAMMARS.json_schema(&json!({"type": "object"})).unwrap().begin().mask(&mut logits);
    assert!(logits.iter().any(|l| l.is_infinite()));
}

#[test]
fn a_schema_is_compiled_once_and_old_ones_are_forgotten() {
    let grammars = Grammars::new(&TOKENIZER).unwrap();
    let schema = |i: usize| json!({"const": i});
    let first = grammars.json_schema(&schema(0)).unwrap();
    assert!(Arc::ptr_eq(&first.compiled, &grammars.json_schema(&schema(0)).unwrap().compiled));
    for i in 1..=KEPT_GRAMMARS {
        grammars.json_schema(&schema(i)).unwrap();
    }
    assert_eq!(grammars.kept.lock().unwrap().len(), KEPT_GRAMMARS);
    assert!(!Arc::ptr_eq(&first.compiled, &grammars.json_schema(&schema(0)).unwrap().compiled));
}

#[track_caller]
fn refused(schema: Value, path: &str, part: &str) {
    let error = GRAMMARS.json_schema(&schema).map(|_| ()).unwrap_err();
    assert_eq!(error.path(), path, "{error}");
    assert!(error.to_string().contains(part), "{error}");
    assert_eq!(error.to_string().lines().count(), 1, "{error}");
}

#[test]
fn a_bad_schema_is_refused_with_its_place() {
    let inside = |bad: Value| json!({"type": "object", "properties": {"x": {"type": "string"}, "a": bad}});
    refused(json!(3), "", "schema must be an object or boolean");
    refused(json!({"type": "strnig"}), "", "strnig");
    refused(inside(json!({"type": "strnig"})), "properties.a", "strnig");
    refused(inside(json!({"type": "string", "pattern": "("})), "properties.a", "");
    refused(inside(json!({"type": "array", "items": {"not": {}}})), "properties.a.items", "not");
    refused(
        inside(json!({"anyOf": [{"type": "null"}, {"uniqueItems": true}]})),
        "properties.a.anyOf.1",
        "uniqueItems",
    );
    refused(
        inside(json!({"$ref": "#/$defs/none"})),
        "properties.a.$ref",
        "`#/$defs/none` is not in the schema",
    );
    refused(inside(json!({"type": "integer", "minimum": "1"})), "properties.a", "minimum");
    refused(
        json!({"$ref": "#/$defs/b", "$defs": {"a": {"minLength": 2}, "b": {"minLength": -2}}}),
        "$defs.b",
        "minLength",
    );
    refused(json!({"$ref": "https://example.com/schema"}), "$ref", "leads out");
    refused(json!({"type": "integer", "minimum": 3, "maximum": 2}), "", "");
    refused(json!(false), "", "");
    refused(json!({"type": "object", "x-guidance": {"lenient": true}}), "", "x-guidance");
}

#[test]
fn a_schema_beyond_the_limits_is_refused() {
    let mut deep = json!({"type": "null"});
    for _ in 0..MAX_SCHEMA_DEPTH {
        deep = json!({"items": deep});
    }
    refused(deep, "items.items.items.items", "deeper than 64");
    refused(json!({"description": "x".repeat(MAX_SCHEMA_BYTES)}), "", "bytes");
    refused(
        json!({"properties": {"p": {"pattern": "a".repeat(2000)}}}),
        "properties.p.pattern",
        "2000 bytes",
    );
    refused(json!({"patternProperties": {"a".repeat(2000): true}}), "patternProperties", "2000 bytes");
    // The longest chain of references that fits: compiled or refused, but never the end of the process.
    let links = 1500;
    let defs: Map<String, Value> = (0..links)
        .map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", (i + 1) % links)})))
        .collect();
    let chain = json!({"$ref": "#/$defs/d0", "$defs": defs});
    assert!(chain.to_string().len() < MAX_SCHEMA_BYTES);
    let _ = GRAMMARS.json_schema(&chain);
    let _ = GRAMMARS.json_schema(&json!({"type": "string", "pattern": "((a{1,900}b){1,900}c){1,900}"}));
    let _ = GRAMMARS.json_schema(&json!({"type": "string", "minLength": 1_000_000_000}));
    let _ = GRAMMARS.json_schema(&json!({"type": "array", "minItems": 1_000_000_000}));
    let mut ends_well = chain;
    ends_well["$defs"][format!("d{}", links - 1)] = json!({"type": "null"});
    check(&ends_well, 0..2);
}

#[test]
fn a_tokenizer_without_an_end_makes_no_grammars() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
    let json = std::fs::read(folder.join("tokenizer.json")).unwrap();
    let endless = Tokenizer::from_json(&json, SpecialIds::default()).unwrap();
    assert_eq!(Grammars::new(&endless).err(), Some(GrammarError::NoEnd));
}
