//! The description of the routes, kept by hand beside them. A test compares it with the routes that there are, in both
//! directions.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// OpenAPI 3.1.
const DOCUMENT: &str = include_str!("openapi.json");

pub(super) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::super::{guarded, open};
    use super::*;

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        let paths = document["paths"].as_object().unwrap();
        let described: BTreeSet<(String, String)> = paths
            .iter()
            .flat_map(|(path, methods)| {
                methods.as_object().unwrap().keys().map(|method| (method.clone(), path.clone()))
            })
            .collect();
        let open = open().made;
        let routes: BTreeSet<(String, String)> = guarded()
            .made
            .iter()
            .chain(&open)
            .map(|(method, path)| ((*method).to_owned(), path.replace("{*", "{")))
            .collect();
        assert_eq!(described, routes);
        // Who needs a key is said, too.
        for (method, path) in routes {
            let security = &document["paths"][&path][&method]["security"];
            let free = open.iter().any(|(_, open)| *open == path) && path != "/admin/draft";
            assert_eq!(security.as_array().is_some_and(Vec::is_empty), free, "{path}");
        }
    }

    /// References lead somewhere.
    #[test]
    fn what_the_description_refers_to_is_there() {
        fn check(document: &Value, value: &Value) {
            match value {
                Value::Object(entries) => {
                    for (key, value) in entries {
                        if key == "$ref" {
                            let to = value.as_str().unwrap().strip_prefix('#').unwrap();
                            assert!(document.pointer(to).is_some(), "{to}");
                        }
                        check(document, value);
                    }
                }
                Value::Array(items) => items.iter().for_each(|item| check(document, item)),
                _ => {}
            }
        }
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        check(&document, &document);
    }
}
