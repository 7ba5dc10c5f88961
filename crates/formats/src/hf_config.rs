//! `config.json` of a Hugging Face folder: lenient about what is there, exact about what is asked for.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// What is wrong with a `config.json`, or with a question asked of it.
#[derive(Debug, thiserror::Error)]
pub enum HfConfigError {
    /// The file could not be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is no JSON object.
    #[error("config `{}` is not a JSON object: {problem}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and column.
        problem: String,
    },
    /// A key that is needed and not there.
    #[error("config `{}` has no key `{key}`", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// Dotted key.
        key: String,
    },
    /// A value of the wrong type.
    #[error("config `{}` has `{key}` = {found}, expected {wanted}", path.display())]
    WrongType {
        /// The file.
        path: PathBuf,
        /// Dotted key.
        key: String,
        /// The value, shortened.
        found: String,
        /// Type that was expected.
        wanted: &'static str,
    },
}

impl HfConfigError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            HfConfigError::Read { .. } => {
                Some("a model folder needs its `config.json` beside the weights".into())
            }
            HfConfigError::Json { .. } => {
                Some("correct the file, or take it from the model's repository again".to_string())
            }
            HfConfigError::MissingKey { key, .. } => Some(format!(
                "add `{key}`, or take the `config.json` of the repository that the weights are from"
            )),
            HfConfigError::WrongType { key, wanted, .. } => Some(format!(
                "set `{key}` to {wanted}, or take the `config.json` of the repository that the weights are from"
            )),
        }
    }
}

/// A `config.json` or a table inside it.
#[derive(Clone, Debug)]
pub struct HfConfig {
    path: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl HfConfig {
    /// Reads a `config.json`; for a folder, the one inside it.
    pub fn open(path: impl AsRef<Path>) -> Result<HfConfig, HfConfigError> {
        let mut path = path.as_ref().to_path_buf();
        if path.is_dir() {
            path.push("config.json");
        }
        let bytes =
            std::fs::read(&path).map_err(|source| HfConfigError::Read { path: path.clone(), source })?;
        HfConfig::parse(&path, &bytes)
    }

    /// Parses bytes; `path` is for errors.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<HfConfig, HfConfigError> {
        let json = |problem| HfConfigError::Json { path: path.to_path_buf(), problem };
        match serde_json::from_slice(bytes).map_err(|e| json(e.to_string()))? {
            Value::Object(map) => Ok(HfConfig { path: path.to_path_buf(), prefix: String::new(), map }),
            other => Err(json(format!("found {}", shorten(&other)))),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys and values.
    pub fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// The value of a key; `None` if it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// The table under a key (such as `text_config`), if it is there.
    pub fn find_table(&self, key: &str) -> Result<Option<HfConfig>, HfConfigError> {
        self.typed(key, "a table", |v| {
            v.as_object().map(|map| HfConfig {
                path: self.path.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
            })
        })
    }

    /// True for a key that is there and `null`.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// A table under a key without any keys of its own: for what a file leaves out whole.
    pub fn empty_table(&self, key: &str) -> HfConfig {
        HfConfig { path: self.path.clone(), prefix: format!("{}{key}.", self.prefix), map: Map::new() }
    }

    /// This table with the keys of `over` in place of its own.
    pub fn overlaid(&self, over: &HfConfig) -> HfConfig {
        let mut table = self.clone();
        table.map.extend(over.map.iter().map(|(key, value)| (key.clone(), value.clone())));
        table
    }

    fn typed<'s, T>(
        &'s self,
        key: &str,
        wanted: &'static str,
        convert: impl FnOnce(&'s Value) -> Option<T>,
    ) -> Result<Option<T>, HfConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| HfConfigError::WrongType {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
            found: shorten(value),
            wanted,
        })
    }

    fn need<T>(&self, key: &str, found: Result<Option<T>, HfConfigError>) -> Result<T, HfConfigError> {
        found?.ok_or_else(|| HfConfigError::MissingKey {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
        })
    }

    /// A non-negative integer, if the key is there.
    pub fn find_usize(&self, key: &str) -> Result<Option<usize>, HfConfigError> {
        self.typed(key, "a non-negative integer", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A number, if the key is there.
    pub fn find_f64(&self, key: &str) -> Result<Option<f64>, HfConfigError> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A boolean, if the key is there.
    pub fn find_bool(&self, key: &str) -> Result<Option<bool>, HfConfigError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    /// A string, if the key is there.
    pub fn find_str(&self, key: &str) -> Result<Option<&str>, HfConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list of strings, if the key is there.
    pub fn find_str_list(&self, key: &str) -> Result<Option<Vec<String>>, HfConfigError> {
        self.typed(key, "a list of strings", |v| {
            v.as_array()?.iter().map(|x| x.as_str().map(str::to_string)).collect()
        })
    }

    /// A list of non-negative integers, if the key is there; a single integer counts as a list of one (token ids
    /// are written both ways).
    pub fn find_usize_list(&self, key: &str) -> Result<Option<Vec<usize>>, HfConfigError> {
        let one = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        self.typed(key, "a list of non-negative integers", |v| match v.as_array() {
            Some(list) => list.iter().map(one).collect(),
            None => one(v).map(|n| vec![n]),
        })
    }

    /// A list of numbers; the key must be there.
    pub fn get_f64_list(&self, key: &str) -> Result<Vec<f64>, HfConfigError> {
        let list =
            self.typed(key, "a list of numbers", |v| v.as_array()?.iter().map(Value::as_f64).collect());
        self.need(key, list)
    }

    /// Like [`HfConfig::find_usize`], but the key must be there.
    pub fn get_usize(&self, key: &str) -> Result<usize, HfConfigError> {
        self.need(key, self.find_usize(key))
    }

    /// Like [`HfConfig::find_f64`], but the key must be there.
    pub fn get_f64(&self, key: &str) -> Result<f64, HfConfigError> {
        self.need(key, self.find_f64(key))
    }

    /// Like [`HfConfig::find_bool`], but the key must be there.
    pub fn get_bool(&self, key: &str) -> Result<bool, HfConfigError> {
        self.need(key, self.find_bool(key))
    }

    /// Like [`HfConfig::find_str`], but the key must be there.
    pub fn get_str(&self, key: &str) -> Result<&str, HfConfigError> {
        self.need(key, self.find_str(key))
    }
}

fn shorten(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { text.chars().take(57).collect::<String>() + "..." }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<HfConfig, HfConfigError> {
        HfConfig::parse(Path::new("m/config.json"), text.as_bytes())
    }

    #[test]
    fn values_are_typed_and_null_counts_as_absent() {
        let c = config(r#"{"n":3,"x":1e-5,"b":true,"s":"a","l":["p"],"e":2,"i":[1,2],"z":null,"t":{"m":1}}"#);
        let c = c.unwrap();
        assert_eq!(c.get_usize("n").unwrap(), 3);
        assert_eq!(c.get_f64("x").unwrap(), 1e-5);
        assert_eq!(c.get_f64("n").unwrap(), 3.0);
        assert_eq!(c.get_f64_list("i").unwrap(), [1.0, 2.0]);
        assert!(c.get_bool("b").unwrap());
        assert_eq!(c.get_str("s").unwrap(), "a");
        assert_eq!(c.find_str_list("l").unwrap().unwrap(), ["p"]);
        assert_eq!(c.find_usize_list("e").unwrap().unwrap(), [2]);
        assert_eq!(c.find_usize_list("i").unwrap().unwrap(), [1, 2]);
        assert_eq!(c.find_usize("z").unwrap(), None);
        assert_eq!(c.find_table("t").unwrap().unwrap().get_usize("m").unwrap(), 1);
    }

    #[test]
    fn errors_name_file_and_key() {
        let c = config(r#"{"n":-3,"t":{"m":"x"}}"#).unwrap();
        let said = |e: HfConfigError| e.to_string();
        assert_eq!(said(c.get_usize("q").unwrap_err()), "config `m/config.json` has no key `q`");
        assert_eq!(
            said(c.get_usize("n").unwrap_err()),
            "config `m/config.json` has `n` = -3, expected a non-negative integer"
        );
        let t = c.find_table("t").unwrap().unwrap();
        assert_eq!(
            said(t.get_usize("m").unwrap_err()),
            "config `m/config.json` has `t.m` = \"x\", expected a non-negative integer"
        );
        assert_eq!(said(t.get_bool("k").unwrap_err()), "config `m/config.json` has no key `t.k`");
        assert!(said(config("[1]").unwrap_err()).contains("is not a JSON object: found [1]"));
        assert!(said(config("{\n!").unwrap_err()).contains("line 2"));
        assert!(matches!(HfConfig::open("no/such"), Err(HfConfigError::Read { .. })));
    }
}
