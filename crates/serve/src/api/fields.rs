//! Fields of a JSON body, read one by one so that an error names the field.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// A JSON object with its place in the body; `null` is the same as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// `""`, or `stream_options.`
    at: &'a str,
}

/// What a value is, in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl<'a> Fields<'a> {
    pub(crate) fn of(body: &'a Value) -> Result<Fields<'a>, ApiError> {
        let object = body
            .as_object()
            .ok_or_else(|| ApiError::malformed(format!("the body is {}, not an object", kind(body))))?;
        Ok(Fields { object, at: "" })
    }

    /// The fields of a value inside the body; `at` is its own name with a dot behind it.
    pub(crate) fn inside(value: &'a Value, at: &'a str) -> Result<Fields<'a>, ApiError> {
        let object = value.as_object().ok_or_else(|| {
            let name = at.trim_end_matches('.');
            ApiError::invalid(name, format!("`{name}` is {}, not an object", kind(value)))
        })?;
        Ok(Fields { object, at })
    }

    /// The same fields under another name; `at` has a dot behind it.
    pub(crate) fn below(self, at: &'a str) -> Fields<'a> {
        Fields { at, ..self }
    }

    /// The full name of a field.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.at)
    }

    fn wrong(&self, field: &str, found: &Value, wanted: &str) -> ApiError {
        let name = self.name(field);
        ApiError::invalid(&name, format!("`{name}` is {}, not {wanted}", kind(found)))
    }

    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// A nested object; `at` is its own name with a dot behind it.
    pub(crate) fn object(&self, field: &str, at: &'a str) -> Result<Option<Fields<'a>>, ApiError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields { object, at })),
            Some(other) => Err(self.wrong(field, other, "an object")),
        }
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        self.object.iter()
    }

    pub(crate) fn bool(&self, field: &str) -> Result<Option<bool>, ApiError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.wrong(field, other, "a boolean")),
        }
    }

    pub(crate) fn string(&self, field: &str) -> Result<Option<&'a str>, ApiError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(field, other, "a string")),
        }
    }

    pub(crate) fn list(&self, field: &str) -> Result<Option<&'a [Value]>, ApiError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(self.wrong(field, other, "a list")),
        }
    }

    /// A number within a range.
    pub(crate) fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| self.wrong(field, value, "a number"))?;
        if !range.contains(&number) {
            let name = self.name(field);
            let message =
                format!("`{name}` is {number}, expected a number from {} to {}", range.start(), range.end());
            return Err(ApiError::invalid(name, message));
        }
        Ok(Some(number as f32))
    }

    /// A whole number within a range.
    pub(crate) fn integer(&self, field: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_i64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ if !value.is_number() => Err(self.wrong(field, value, "a whole number")),
            _ => {
                let name = self.name(field);
                let message = format!(
                    "`{name}` is {value}, expected a whole number from {} to {}",
                    range.start(),
                    range.end()
                );
                Err(ApiError::invalid(name, message))
            }
        }
    }

    /// As [`Fields::integer`], for counts.
    pub(crate) fn count(&self, field: &str, range: RangeInclusive<i64>) -> Result<Option<usize>, ApiError> {
        Ok(self.integer(field, range)?.map(|number| number as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, read: impl Fn(Fields<'_>) -> Result<(), ApiError>, message: Option<&str>) {
        let body: Value = serde_json::from_str(json).expect("the case is JSON");
        let error = Fields::of(&body).and_then(read).err();
        let text = error.map(|e| e.body()["error"]["message"].as_str().expect("a text").to_owned());
        assert_eq!(text.as_deref(), message, "{json}");
    }

    #[test]
    fn what_is_wrong_is_named_with_what_was_expected() {
        let temperature = |f: Fields<'_>| f.number("temperature", 0.0..=2.0).map(drop);
        check("{}", temperature, None);
        check(r#"{"temperature":null}"#, temperature, None);
        check(r#"{"temperature":"1"}"#, temperature, Some("`temperature` is a string, not a number"));
        check(r#"{"temperature":3}"#, temperature, Some("`temperature` is 3, expected a number from 0 to 2"));
        let n = |f: Fields<'_>| f.count("n", 1..=16).map(drop);
        check(r#"{"n":1.5}"#, n, Some("`n` is 1.5, expected a whole number from 1 to 16"));
        check(r#"{"n":-1}"#, n, Some("`n` is -1, expected a whole number from 1 to 16"));
        check("[]", |_| Ok(()), Some("the body is a list, not an object"));
        let nested = |f: Fields<'_>| {
            f.object("stream_options", "stream_options.")?.expect("there").bool("include_usage").map(drop)
        };
        check(
            r#"{"stream_options":{"include_usage":1}}"#,
            nested,
            Some("`stream_options.include_usage` is a number, not a boolean"),
        );
    }
}
