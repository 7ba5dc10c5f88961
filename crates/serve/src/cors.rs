//! Pages of other origins: which ones a browser lets read our answers (the Fetch standard's CORS protocol). None unless
//! they are named.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::App;
use crate::api::ApiError;

/// What a page may send.
const METHODS: &str = "GET, POST, OPTIONS";
/// What it may send along if it does not say: a key, and JSON.
const HEADERS: &str = "authorization, content-type";
/// Seconds for which a browser need not ask again; none keeps it longer than a day.
const MAX_AGE: &str = "86400";
/// What it may read of an answer besides the usual.
const EXPOSED: &str = "retry-after";

/// Asked by a page of a public address for a server in the private network.
const REQUEST_PRIVATE: HeaderName = HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE: HeaderName = HeaderName::from_static("access-control-allow-private-network");

/// Where a page comes from, as its browser says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Anywhere (`*`).
    Any,
    /// `scheme://host` or `scheme://host:port`, or `null` for pages without an origin, like files.
    One(String),
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Origin, String> {
        let wrong = |what: &str| what.to_string();
        match text {
            "*" => return Ok(Origin::Any),
            "null" => return Ok(Origin::One(text.into())),
            _ => {}
        }
        let lower = text.to_ascii_lowercase();
        let (scheme, rest) = lower.split_once("://").ok_or_else(|| wrong("the scheme is missing"))?;
        let scheme_ok = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
        let host = rest.strip_suffix('/').unwrap_or(rest);
        if !scheme_ok
            || host.is_empty()
            || host.chars().any(|c| c.is_whitespace() || c.is_control() || c == '*')
        {
            return Err(wrong("the host or the scheme is none"));
        }
        if host.contains(['/', '?', '#', '@']) {
            return Err(wrong("a path, a query or a user is no part of it"));
        }
        // Browsers leave the scheme's own port out.
        let usual = match scheme {
            "http" => ":80",
            "https" => ":443",
            _ => "",
        };
        let bare = host.strip_suffix(usual).unwrap_or(host);
        // A colon that stands behind the brackets of an address, if it has some, comes before a port.
        let port = bare.rsplit_once(']').map_or(bare, |(_, port)| port).split_once(':').map(|(_, port)| port);
        if port.is_some_and(|port| port.parse::<u16>().is_err()) {
            return Err(wrong("the port is no number up to 65535"));
        }
        Ok(Origin::One(format!("{scheme}://{bare}")))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Any => f.write_str("*"),
            Origin::One(origin) => f.write_str(origin),
        }
    }
}

/// The value of `Access-Control-Allow-Origin` for a request, if its page may read the answer.
fn allowed(origins: &[Origin], headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get(header::ORIGIN)?;
    let text = value.to_str().ok()?;
    if origins.contains(&Origin::Any) {
        return Some(HeaderValue::from_static("*"));
    }
    origins
        .iter()
        .any(|origin| matches!(origin, Origin::One(one) if one.eq_ignore_ascii_case(text)))
        .then(|| value.clone())
}

/// Answers what browsers ask before a page's request, and marks the answers to the request itself. `/admin` is for the
/// server's own page alone.
pub(crate) async fn share(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let origins = &app.options.allow_origins;
    let asks_before = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ORIGIN)
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if origins.is_empty() {
        return next.run(request).await;
    }
    let admin = request.uri().path().starts_with("/admin");
    let origin = allowed(origins, request.headers()).filter(|_| !admin);
    let mut response = match (&origin, asks_before) {
        (_, false) => next.run(request).await,
        (None, true) => {
            let message = match admin {
                true => "/admin is not for pages of other origins",
                false => "this origin is not among those of `--allow-origin`",
            };
            ApiError::forbidden(message).into_response()
        }
        (Some(_), true) => {
            let asked = request.headers();
            let mut response = StatusCode::NO_CONTENT.into_response();
            let headers = response.headers_mut();
            let wanted = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
            let wanted = wanted.unwrap_or_else(|| HeaderValue::from_static(HEADERS));
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted);
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
            if asked.get(REQUEST_PRIVATE).is_some_and(|value| value == "true") {
                headers.insert(ALLOW_PRIVATE, HeaderValue::from_static("true"));
            }
            response
        }
    };
    let headers = response.headers_mut();
    let vary = match asks_before {
        true => "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
        false => "Origin",
    };
    // A cache in between must not give one page's answer to another.
    headers.append(header::VARY, HeaderValue::from_static(vary));
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Result<&str, &str>) {
        match (text.parse::<Origin>(), expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found.to_string(), expected, "{text}"),
            (Err(found), Err(expected)) => assert!(found.contains(expected), "{text}: {found}"),
            (found, expected) => panic!("{text}: {found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn origins_are_read_as_browsers_write_them() {
        check("*", Ok("*"));
        check("null", Ok("null"));
        check("http://app.local", Ok("http://app.local"));
        check("HTTP://App.Local:3000/", Ok("http://app.local:3000"));
        check("http://app.local:80", Ok("http://app.local"));
        check("https://app.local:443", Ok("https://app.local"));
        check("https://app.local:80", Ok("https://app.local:80"));
        check("http://[::1]:8080", Ok("http://[::1]:8080"));
        check("http://[::1]", Ok("http://[::1]"));
        check("chrome-extension://abcdef", Ok("chrome-extension://abcdef"));
        check("app.local", Err("the scheme is missing"));
        check("", Err("the scheme is missing"));
        check("http://", Err("the host"));
        check("http://*.app.local", Err("the host"));
        check("http://app.local/path", Err("a path"));
        check("http://me@app.local", Err("a path"));
        check("http://app.local:99999", Err("the port"));
        check("http://app.local:", Err("the port"));
    }
}
