//! The run file described by itself: JSON Schema for editors, and a list of keys for the reference page.

use serde_json::{Value, json};

use super::{MethodWord, RunFile};

/// JSON Schema of the run file. `methods` are the kinds of drafts; without any, every word is one.
pub fn json_schema(methods: &[MethodWord]) -> Value {
    let mut schema = schemars::schema_for!(RunFile).to_value();
    if !methods.is_empty() {
        let word =
            |word: &MethodWord| json!({ "type": "string", "const": word.name, "description": word.about });
        let method = &mut schema["$defs"]["Method"];
        let words: Vec<Value> = methods.iter().map(word).collect();
        *method = json!({ "oneOf": words, "description": method["description"] });
    }
    schema
}

/// One key of the run file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyReference {
    /// Dotted key; elements of lists show as `data.sources.N`.
    pub key: String,
    /// Type in words.
    pub kind: String,
    /// Default as TOML, or `None` if the key must be set or its default is described in words.
    pub default: Option<String>,
    /// True if the file is incomplete without it.
    pub required: bool,
    /// What it does.
    pub description: String,
}

impl KeyReference {
    /// The last part of the key.
    pub fn name(&self) -> &str {
        self.key.rsplit('.').next().unwrap_or_default()
    }
}

/// Every key of the run file, in the order of the tables. Tables themselves are listed too, with kind `table`. `methods` as
/// for [`json_schema`].
pub fn reference(methods: &[MethodWord]) -> Vec<KeyReference> {
    let schema = json_schema(methods);
    let mut out = Vec::new();
    keys_of(&schema, &schema, "", &mut out);
    out
}

/// Follows `$ref`, and the one alternative that is not null.
fn follow<'s>(root: &'s Value, mut node: &'s Value) -> &'s Value {
    for _ in 0..8 {
        if let Some(name) = node["$ref"].as_str().and_then(|r| r.strip_prefix("#/$defs/")) {
            node = &root["$defs"][name];
        } else if let Some(options) = node["anyOf"].as_array() {
            let mut real = options.iter().filter(|o| o["type"] != "null");
            match (real.next(), real.next()) {
                (Some(one), None) => node = one,
                _ => return node,
            }
        } else {
            return node;
        }
    }
    node
}

fn keys_of(root: &Value, table: &Value, prefix: &str, out: &mut Vec<KeyReference>) {
    let Some(properties) = table["properties"].as_object() else { return };
    let required: Vec<&str> =
        table["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, node) in properties {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        let target = follow(root, node);
        let text = |n: &Value| n["description"].as_str().map(|d| d.replace('\n', " "));
        let description = text(node).or_else(|| text(target)).unwrap_or_default();
        let is_table = target["properties"].is_object();
        let default = match &node["default"] {
            Value::Null => None,
            _ if is_table => None,
            value => Some(as_toml(value)),
        };
        let required = required.contains(&name.as_str());
        let kind = if is_table { "table".to_string() } else { kind_of(root, target) };
        out.push(KeyReference { key: key.clone(), kind, default, required, description });
        if is_table {
            keys_of(root, target, &key, out);
        } else {
            let items = follow(root, &target["items"]);
            keys_of(root, items, &format!("{key}.N"), out);
        }
    }
}

/// JSON values of the schema are also TOML, except for tables, which no default needs but the empty one.
fn as_toml(value: &Value) -> String {
    value.to_string()
}

fn kind_of(root: &Value, node: &Value) -> String {
    if let Some(options) = node["oneOf"].as_array() {
        let words: Vec<String> = options.iter().filter_map(|o| o["const"].as_str()).map(quoted).collect();
        return words.join(" or ");
    }
    if let Some(words) = node["enum"].as_array() {
        return words.iter().filter_map(Value::as_str).map(quoted).collect::<Vec<_>>().join(" or ");
    }
    if let Some(options) = node["anyOf"].as_array() {
        let kinds: Vec<String> = options.iter().map(|o| kind_of(root, follow(root, o))).collect();
        return kinds.join(" or ");
    }
    let kind = match &node["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).find(|k| *k != "null"),
        kind => kind.as_str(),
    };
    match kind.unwrap_or_default() {
        "integer" => "whole number".to_string(),
        "array" => format!("list of {}", plural(&kind_of(root, follow(root, &node["items"])))),
        "object" => "table".to_string(),
        other => other.to_string(),
    }
}

fn plural(kind: &str) -> String {
    if kind.is_empty() { "tables".to_string() } else { format!("{kind}s") }
}

fn quoted(word: &str) -> String {
    format!("\"{word}\"")
}
