//! The web page: files embedded in the binary, the same for everybody and without a key; what they show is asked from
//! the API, which wants one.

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use draftsmith_formats::hash::sha256_hex;

/// Nothing but our own files, no inline script or style, no frame around the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// A file of the page.
struct Asset {
    path: &'static str,
    kind: &'static str,
    body: &'static [u8],
}

macro_rules! asset {
    ($name:literal, $kind:expr) => {
        Asset {
            path: concat!("/assets/", $name),
            kind: $kind,
            body: include_bytes!(concat!("../web/", $name)),
        }
    };
}

static ASSETS: [Asset; 27] = [
    Asset { path: "/", kind: HTML, body: include_bytes!("../web/index.html") },
    asset!("api.js", JS),
    asset!("app.css", CSS),
    asset!("app.js", JS),
    asset!("bundle.js", JS),
    asset!("code.js", JS),
    asset!("curve.js", JS),
    asset!("dom.js", JS),
    asset!("follow.js", JS),
    asset!("generations.js", JS),
    asset!("icon.svg", SVG),
    asset!("journal.js", JS),
    asset!("kinds.js", JS),
    asset!("live.js", JS),
    asset!("markdown.js", JS),
    asset!("model.js", JS),
    asset!("models.js", JS),
    asset!("notices.js", JS),
    asset!("play.js", JS),
    asset!("plot.js", JS),
    asset!("race.js", JS),
    asset!("records.js", JS),
    asset!("runs.js", JS),
    asset!("settings.js", JS),
    asset!("state.js", JS),
    asset!("theme.js", JS),
    asset!("tokens.js", JS),
];

/// The routes of the page.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let mut router = Router::new();
    for asset in &ASSETS {
        let tag = HeaderValue::from_str(&format!("\"{}\"", &sha256_hex(asset.body)[..16]))
            .expect("hex digits in quotes are a header value");
        router = router.route(asset.path, get(async move |headers: HeaderMap| answer(asset, &tag, &headers)));
    }
    router
}

/// The file, or 304 if the browser has this very version.
fn answer(asset: &'static Asset, tag: &HeaderValue, headers: &HeaderMap) -> Response {
    let known = headers.get(header::IF_NONE_MATCH).is_some_and(|value| {
        value.as_bytes().split(|b| *b == b',').any(|one| {
            let one = one.trim_ascii();
            one == b"*" || one.strip_prefix(b"W/").unwrap_or(one) == tag.as_bytes()
        })
    });
    let fixed = [
        (header::CONTENT_TYPE, HeaderValue::from_static(asset.kind)),
        (header::ETAG, tag.clone()),
        // Always asked for: another build may serve another page at the same address.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    if known {
        (StatusCode::NOT_MODIFIED, fixed).into_response()
    } else {
        (fixed, asset.body).into_response()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, HttpBody};
    use axum::http::Request;
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;

    use super::*;

    fn ask(path: &str, tag: Option<&str>) -> (StatusCode, HeaderMap, usize) {
        let mut request = Request::builder().uri(path);
        if let Some(tag) = tag {
            request = request.header(header::IF_NONE_MATCH, tag);
        }
        let router = TowerToHyperService::new(routes::<()>());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let response = runtime.block_on(router.call(request.body(Body::empty()).unwrap())).unwrap();
        let (head, body) = response.into_parts();
        (head.status, head.headers, body.size_hint().exact().unwrap() as usize)
    }

    fn text(asset: &Asset) -> &'static str {
        std::str::from_utf8(asset.body).unwrap()
    }

    #[test]
    fn every_file_is_served_with_its_type_and_a_strict_policy() {
        for asset in &ASSETS {
            let (status, headers, length) = ask(asset.path, None);
            assert_eq!((status, length), (StatusCode::OK, asset.body.len()), "{}", asset.path);
            assert_eq!(headers[header::CONTENT_TYPE], asset.kind);
            assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
            assert_eq!(headers[header::CONTENT_SECURITY_POLICY], POLICY);
        }
        assert!(!POLICY.contains("unsafe"));
    }

    #[test]
    fn a_version_that_the_browser_has_is_not_sent_again() {
        let (_, headers, _) = ask("/", None);
        let tag = headers[header::ETAG].to_str().unwrap();
        for known in [tag.to_owned(), format!("W/{tag}"), format!("\"x\", {tag}"), "*".to_owned()] {
            let (status, again, length) = ask("/", Some(&known));
            assert_eq!((status, length), (StatusCode::NOT_MODIFIED, 0), "{known}");
            assert_eq!(again[header::ETAG], tag);
        }
        assert_eq!(ask("/", Some("\"other\"")).0, StatusCode::OK);
    }

    #[test]
    fn whatever_a_file_asks_for_is_served_and_nothing_comes_from_elsewhere() {
        for asset in &ASSETS {
            let mut rest = text(asset);
            while let Some(at) = rest.find("\"/assets/") {
                let path = rest[at + 1..].split('"').next().unwrap();
                assert!(ASSETS.iter().any(|a| a.path == path), "{} asks for {path}", asset.path);
                rest = &rest[at + 1..];
            }
            let foreign = text(asset).replace("http://www.w3.org/2000/svg", "").contains("http://");
            assert!(!foreign && !text(asset).contains("src=\"//"), "{}", asset.path);
        }
    }

    #[test]
    fn no_file_turns_text_into_markup_or_code() {
        let ways = [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "DOMParser",
            "eval(",
            "new Function",
        ];
        for asset in &ASSETS {
            for way in ways {
                assert!(!text(asset).contains(way), "{} uses {way}", asset.path);
            }
        }
        let page = text(&ASSETS[0]);
        assert!(!page.contains("<style") && !page.contains("style=") && !page.contains("onclick="));
    }

    #[test]
    fn every_file_of_the_folder_is_served() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("web");
        for entry in std::fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let served = ASSETS.iter().any(|a| a.path.ends_with(&format!("/{name}")));
            assert!(served || name == "index.html", "web/{name} is not served");
        }
    }
}
